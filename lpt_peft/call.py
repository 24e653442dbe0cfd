"""Calls of an adapter: images to logits, in the ways that torch, timm and transformers call a model.

Not here: the passes that compute the features (`lpt_peft.passes`).
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
from lpt_peft.backbones.input_errors import explain_failure
from lpt_peft.backbones.weights import FrozenWeights
from lpt_peft.errors import ConfigError, InputError, LPTError, StateError
from lpt_peft.losses import AGCLLoss
from lpt_peft.output import AdapterOutput, cross_entropy_with_match, explain_labels, image_classifier_output
from lpt_peft.state import StateMixin

if TYPE_CHECKING:
    from transformers.modeling_outputs import ImageClassifierOutput

_NOTHING_TRAINS = (
    "Prompts and head are all frozen while training; peft.get_peft_model(adapter) does that. Assign adapter.phase "
    "again to make its parameters trainable, or give PEFT the ViT alone: wrap(get_peft_model(vit, ...))."
)
_DISABLING = threading.Lock()


class CallMixin(StateMixin):
    """Calls of an adapter, and of the plain model inside it.

    Attributes:
        head_drop: Dropout before the classifier in training.
        criterion: Loss of a call with `labels=` in training mode; `cross_entropy_with_match` by default. It is called
            as `criterion(output, labels)` with an `AdapterOutput`, like `LPTLoss`; `AGCLLoss` and the losses and
            functions of torch and timm get the logits.
        eval_criterion: The same in eval mode. It is separate because `LPTLoss` needs the two halves of a batch of
            `DualSampler`, which evaluation data do not have.
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
        if name in ("criterion", "eval_criterion"):
            if not callable(value):
                raise ConfigError(f"{name}={value!r:.80} must be a function or module: criterion(output, labels).")
            self._modules.pop(name, None)  # torch refuses to replace a module by a function
            if isinstance(value, nn.Module):  # a loss may add noise in training only
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
            images: Images (B, 3, H, W) floating point, or the first argument of the wrapped model's forward.
            *args: Further arguments of the wrapped model's forward.
            pixel_values: The images, under the name that transformers uses; works with models of every library.
            labels: Classes (B,) int64; computes a loss by `criterion`, or by `eval_criterion` in eval mode.
            return_output: Return an `AdapterOutput` instead of the logits.
            **kwargs: Further arguments of the wrapped model's forward.

        Returns:
            Logits (B, C) float32 or float64; `AdapterOutput` with `return_output=True`; transformers'
            `ImageClassifierOutput` (loss, logits) with `pixel_values=` or `labels=`. Inside `disable_adapter()`, the
            output of the wrapped model.

        Raises:
            InputError: The images do not fit the wrapped model, `labels` together with `return_output`, or `images`
                together with `pixel_values`.
            StateError: The adapter was unwrapped, pooling or blocks of the model were changed,
                DistributedDataParallel was built in another phase, nn.DataParallel is used, or the model is quantized
                and passes no gradient in training.
            BackboneError: accelerate offloads a model that cannot be offloaded.
        """
        if args[-3:-1] == (None, None) and torch.onnx.is_in_onnx_export():
            args = args[:-3]  # torch.onnx.export(dynamo=False) passes the defaults of the keywords by position
        if return_output and labels is not None:
            raise InputError("return_output=True returns no loss: leave labels= out.")
        self._check_wrapped()
        images, call = self._name_images(
            images, kwargs if pixel_values is None else {"pixel_values": pixel_values, **kwargs}
        )
        if self._is_disabled():
            if return_output:
                raise InputError(
                    "return_output=True is for calls with prompts: leave it out inside disable_adapter(), where the "
                    "plain model is called."
                )
            call = call if labels is None else {"labels": labels, **call}
            images, args, call = self.frozen_weights.cast_inputs((images, args, call))
            return self._run(self.vit, args if images is None else (images, *args), call)
        if self.training and torch.is_grad_enabled():
            if self._gradient_gap is not None:
                raise StateError(
                    f"Prompts cannot be trained on this ViT: no gradient passes {self._gradient_gap}. Use it for "
                    "inference (eval()), or train on the ViT before quantization, or with weight-only quantization "
                    "(torchao's Int8WeightOnlyConfig), and load the prompts here."
                )
            flags = [parameter.requires_grad for parameter in self._learned_parameters()]
            if flags and not any(flags):  # no flags: FSDP1 may keep all parameters in a flat tensor
                warnings.warn(_NOTHING_TRAINS, UserWarning, stacklevel=2)
            self._check_ddp()
        features, query, similarity, groups = self._features(images, *args, **call)
        logits = self.head(self.head_drop(features))
        output = AdapterOutput(logits, features, query, similarity, groups)
        if return_output:
            return output
        if labels is None:
            return logits if pixel_values is None else image_classifier_output(logits, None)
        return image_classifier_output(logits, self._loss(output, labels))

    if TYPE_CHECKING:  # torch's own __call__ returns Any
        __call__ = forward

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Call the plain model, without prompts and with its own classifier; a context for this thread.

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

    def _name_images(self, images: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Pass `pixel_values` by position, except to transformers' models."""
        if "pixel_values" not in kwargs:
            return images, kwargs
        if images is not None:
            raise InputError("images and pixel_values= are the same argument: give one of them.")
        if hasattr(self.vit, "config"):  # a transformers model
            return None, kwargs
        return kwargs["pixel_values"], {name: value for name, value in kwargs.items() if name != "pixel_values"}

    def _is_disabled(self) -> bool:
        return bool(self._disabled_threads) and threading.get_ident() in self._disabled_threads

    def _features(self, images: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return features, query, similarity and groups of `AdapterOutput`."""
        raise NotImplementedError

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of the wrapped model; its errors are replaced if its input explains them."""
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except LPTError:
            raise
        except Exception as error:
            if (explained := explain_failure(self.backbone, args, kwargs, error)) is not None:
                raise explained from error
            raise

    def _loss(self, output: AdapterOutput, labels: Tensor) -> Tensor:
        criterion = self.criterion if self.training else self.eval_criterion
        predicted = output.logits if _takes_logits(criterion) else output
        if torch.compiler.is_compiling():
            return criterion(predicted, labels)
        try:
            return criterion(predicted, labels)
        except LPTError:
            raise
        except Exception as error:
            if (reason := explain_labels(output.logits, labels)) is not None:
                raise InputError(f"{reason} The loss reports: {error!s:.200}") from error
            raise

    def _check_wrapped(self) -> None:
        if "vit" not in self._modules:
            raise StateError("This adapter was unwrapped; create another with LongTailPromptAdapter.wrap(vit).")
        if "_is_replica" in self.__dict__:
            raise StateError(
                "nn.DataParallel copies the adapter for each call, which prompts do not support. Use "
                "DistributedDataParallel(adapter), or a single device."
            )
        if not self.backbone.runs_own_forward and hasattr(self.vit, "_hf_hook"):
            refuse_offloaded(self.vit)

    def __prepare_scriptable__(self) -> nn.Module:
        raise StateError(
            "torch.jit.script does not support prompts. Use torch.compile(adapter), torch.export, or "
            "torch.jit.trace(adapter, images)."
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for deepcopy and pickle; the copy is not inside `disable_adapter()`."""
        return {**super().__getstate__(), "_disabled_threads": frozenset()}


def _takes_logits(criterion: Callable[..., Tensor]) -> bool:
    """Whether a loss takes logits: AGCLLoss, and the losses and functions of torch and timm."""
    if isinstance(criterion, (nn.modules.loss._Loss, AGCLLoss)):
        return True
    return str(getattr(criterion, "__module__", "")).startswith(("torch.", "timm."))
