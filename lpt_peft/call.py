"""Calls of an adapter: images to logits, as torch, timm or transformers call a model; and the plain model's answer.

Not here: the two passes that give the features (`lpt_peft.adapter`).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from lpt_peft.backbones.base import Backbone, refuse_offloaded
from lpt_peft.backbones.weights import FrozenWeights
from lpt_peft.errors import InputError, StateError
from lpt_peft.losses import AGCLLoss
from lpt_peft.output import AdapterOutput, cross_entropy_with_match, image_classifier_output
from lpt_peft.state import StateMixin

if TYPE_CHECKING:
    from transformers.modeling_outputs import ImageClassifierOutput

_NOTHING_TRAINS = (
    "Prompts and head are all frozen while training; peft.get_peft_model(adapter) does that. Assign adapter.phase once "
    "more to open what the phase trains, or give PEFT the ViT alone: wrap(get_peft_model(vit, ...))."
)
_DISABLING = threading.Lock()


class CallMixin(StateMixin):
    """The part of an adapter that answers calls.

    Attributes:
        head_drop: Dropout before the head, while training.
        criterion: Loss of a call with `labels=` in training mode: called as `criterion(output, labels)` with an
            `AdapterOutput`, as `LPTLoss` is; `AGCLLoss` and the losses and functions of torch and timm get the logits.
            At first `cross_entropy_with_match`.
        eval_criterion: The same in eval mode, at first `cross_entropy_with_match`. It is separate because `LPTLoss`
            needs the two halves of a `DualSampler`'s batch, which evaluation data do not have.
    """

    head_drop: nn.Dropout
    criterion: Callable[..., Tensor]
    eval_criterion: Callable[..., Tensor]
    backbone: Backbone
    frozen_weights: FrozenWeights
    _gradient_gap: str | None

    def _init_call(self) -> None:
        self.criterion = self.eval_criterion = cross_entropy_with_match
        self._disabled_threads: frozenset[int] = frozenset()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("criterion", "eval_criterion"):  # where a module was, torch refuses a function
            self._modules.pop(name, None)
            if isinstance(value, nn.Module):  # a loss that draws noise in training draws none in eval mode
                value.train(self.training)
        super().__setattr__(name, value)

    @overload
    def forward(
        self,
        images: Any = None,
        *args: Any,
        pixel_values: None = None,
        labels: None = None,
        return_output: Literal[False] = False,
        **kwargs: Any,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        images: Any = None,
        *args: Any,
        pixel_values: Tensor | None = None,
        labels: None = None,
        return_output: Literal[True],
        **kwargs: Any,
    ) -> AdapterOutput: ...

    @overload
    def forward(
        self,
        images: None = None,
        *,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        return_output: Literal[False] = False,
        **kwargs: Any,
    ) -> ImageClassifierOutput: ...

    @overload
    def forward(
        self,
        images: Any,
        *args: Any,
        pixel_values: None = None,
        labels: Tensor,
        return_output: Literal[False] = False,
        **kwargs: Any,
    ) -> ImageClassifierOutput: ...

    def forward(
        self,
        images: Any = None,
        *args: Any,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        return_output: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Classify images.

        Args:
            images: What the wrapped model's own forward takes first: (B, 3, H, W) for most, a dict of padded
                patches for NaFlex.
            *args: The rest of what the wrapped model takes.
            pixel_values: The images in a call as transformers makes it; works with models of every library.
            labels: Classes (B,) int64, for a loss by `criterion`, or by `eval_criterion` in eval mode.
            return_output: Return an `AdapterOutput` instead of the logits alone.
            **kwargs: The rest of what the wrapped model takes.

        Returns:
            Logits (B, C) float32 or float64; `AdapterOutput` with `return_output=True`; transformers'
            `ImageClassifierOutput` (loss, logits) with `pixel_values=` or `labels=`. Inside `disable_adapter()`, what
            the wrapped model returns.

        Raises:
            InputError: `labels` together with `return_output`, or `images` together with `pixel_values`.
            StateError: The adapter was unwrapped, the model's pooling was changed, DistributedDataParallel was built
                in another phase, or the model is quantized so that no gradient passes it while training.
            BackboneError: accelerate offloads a model that cannot be offloaded.
        """
        if args[-3:-1] == (None, None) and torch.onnx.is_in_onnx_export():
            args = args[:-3]  # torch.onnx.export(dynamo=False) passes the defaults of the keywords by position
        if images is not None and pixel_values is not None:
            raise InputError("images and pixel_values= are the same argument: give one of them.")
        if return_output and labels is not None:
            raise InputError("return_output=True has no place for a loss: leave labels= out.")
        self._check_wrapped()
        call = kwargs
        if pixel_values is not None:
            if hasattr(self.vit, "config"):  # transformers' models name their input so
                call = {"pixel_values": pixel_values, **kwargs}
            else:
                images = pixel_values
        if self._is_disabled():
            if return_output:
                raise InputError(
                    "return_output=True is the adapter's; inside disable_adapter() the plain model answers."
                )
            call = call if labels is None else {"labels": labels, **call}
            images, args, call = self.frozen_weights.cast_inputs((images, args, call))
            return self.vit(*args, **call) if images is None else self.vit(images, *args, **call)
        if self.training and torch.is_grad_enabled():
            if self._gradient_gap is not None:
                raise StateError(
                    f"Prompts cannot be trained on this ViT: no gradient passes its {self._gradient_gap}. Use it for "
                    "inference (eval()), or train on the ViT before quantization, or with weight-only quantization "
                    "(torchao's Int8WeightOnlyConfig), and load the prompts here."
                )
            flags = [parameter.requires_grad for parameter in self._learned_parameters()]
            if flags and not any(flags):  # FSDP1 may hold them all in a tensor of its own
                warnings.warn(_NOTHING_TRAINS, UserWarning, stacklevel=2)
            self._check_ddp()
        features, query, similarity, groups = self._features(images, *args, **call)
        logits = self.head(self.head_drop(features))
        output = AdapterOutput(logits, features, query, similarity, groups)
        if return_output:
            return output
        if labels is None:
            return logits if pixel_values is None else image_classifier_output(logits, None)
        criterion = self.criterion if self.training else self.eval_criterion
        return image_classifier_output(logits, criterion(logits if _takes_logits(criterion) else output, labels))

    if TYPE_CHECKING:  # torch's own __call__ returns Any
        __call__ = forward

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, on this thread, a call of the adapter answers as the plain model does: its output, its own head.

        Example:
            >>> import timm
            >>> from lpt_peft import LongTailPromptAdapter
            >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
            >>> adapter, images = LongTailPromptAdapter.wrap(vit, num_classes=5), torch.randn(2, 3, 32, 32)
            >>> with adapter.disable_adapter():
            ...     adapter(images).shape
            torch.Size([2, 1000])
        """
        thread = threading.get_ident()
        with _DISABLING:
            before = thread in self._disabled_threads
            self._disabled_threads |= {thread}
        try:
            yield
        finally:
            if not before:
                with _DISABLING:
                    self._disabled_threads -= {thread}

    def _is_disabled(self) -> bool:
        return bool(self._disabled_threads) and threading.get_ident() in self._disabled_threads

    def _features(self, images: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features, query, similarity and groups, as in `AdapterOutput`."""
        raise NotImplementedError

    def _check_wrapped(self) -> None:
        if "vit" not in self._modules:
            raise StateError("This adapter was unwrapped; call LongTailPromptAdapter.wrap(vit) for a new one.")
        if not self.backbone.runs_own_forward and hasattr(self.vit, "_hf_hook"):
            refuse_offloaded(self.vit)

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle: a copy is not disabled."""
        return {**super().__getstate__(), "_disabled_threads": frozenset()}


def _takes_logits(criterion: Callable[..., Tensor]) -> bool:
    """Whether a loss is called with logits: AGCLLoss, and the losses and functions of torch and timm."""
    if isinstance(criterion, (nn.modules.loss._Loss, AGCLLoss)):
        return True
    return str(getattr(criterion, "__module__", "")).startswith(("torch.", "timm."))
