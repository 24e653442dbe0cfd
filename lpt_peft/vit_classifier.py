"""A ViT and a cosine classifier without prompts: linear probe or full fine-tuning, called like the adapter.

Not here: prompts (`lpt_peft.adapter`), training (`lpt_peft.recipe`), the format of model files
(`lpt_peft.checkpoint.model_file`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from lpt_peft._run_folder import MODEL_METHODS, ModelMethod
from lpt_peft.backbones.base import Backbone, execution_device
from lpt_peft.backbones.detect import find_backbone, resolve_num_classes
from lpt_peft.backbones.freezing import FrozenState, feature_parameters
from lpt_peft.backbones.input_errors import explain_failure
from lpt_peft.backbones.weights import FrozenWeights
from lpt_peft.config import PromptMetadata
from lpt_peft.errors import BackboneError, ConfigError, LPTError, StateError
from lpt_peft.heads import CosineClassifier
from lpt_peft.model_pretrained import ModelFileMixin
from lpt_peft.output import AdapterOutput


class ViTClassifier(ModelFileMixin):
    """A Vision Transformer and a cosine classifier, without prompts: what prompt tuning is compared with.

    The head is the adapter's, `logits = s * cos(features, weight)`, because the losses of this library need logits of
    that form. Create it with `wrap(vit, num_classes, method=...)`, or load it with `from_pretrained(folder, vit)`.

    The statistics of batch norms, which few ViTs have, stay frozen with both methods.

    Attributes:
        vit: The model that was given to `wrap`, the same object.
        head: `CosineClassifier`, weight (C, d).
        method: "linear_probe" trains the head on a frozen ViT in eval mode; "full" trains all weights that the feature
            depends on, without the ViT's own classifier.
        metadata: `PromptMetadata` for the model file, such as class names and counts.
        backbone: Driver of `vit`, for its library.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0)
        >>> model = ViTClassifier.wrap(vit, num_classes=5, method="linear_probe")
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 5])
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['head.weight']
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        method: ModelMethod,
        head_dropout: float = 0.1,
        logit_scale: float = 20.0,
    ) -> None:
        """Use `wrap` instead, which finds the driver of a model."""
        super().__init__()
        if method not in MODEL_METHODS:
            raise ConfigError(
                f'method={method!r} must be "linear_probe" or "full"; methods with prompts are those of '
                "LongTailPromptAdapter."
            )
        if not isinstance(head_dropout, (int, float)) or not 0.0 <= head_dropout < 1.0:
            raise ConfigError(f"head_dropout={head_dropout!r} must be a number of at least 0 and below 1.")
        self.backbone, self.method, self.vit = backbone, method, backbone.model
        device = execution_device(self.vit)
        dtype = torch.promote_types(next(self.vit.parameters()).dtype, torch.float32)
        with torch.inference_mode(False):  # parameters created in inference mode would silently get no gradient
            self.head_drop = nn.Dropout(head_dropout)
            self.head = CosineClassifier(backbone.feature_dim, num_classes, logit_scale).to(device=device, dtype=dtype)
        trained = feature_parameters(backbone) if method == "full" else {}
        if quantized := [name for name, parameter in trained.items() if not parameter.is_floating_point()]:
            raise BackboneError(
                f"{quantized[0]} of this {type(self.vit).__name__} is quantized and cannot be trained: use the model "
                'before its quantization, or method="linear_probe".'
            )
        self._frozen = FrozenState(self.vit)
        self.frozen_weights = FrozenWeights(backbone)
        self.metadata = PromptMetadata()
        self._initial: str | None = None
        self._frozen.freeze(self.vit)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        self.train(self.vit.training)

    @classmethod
    def wrap(
        cls,
        vit: nn.Module,
        num_classes: int | None = None,
        *,
        method: ModelMethod,
        head_dropout: float = 0.1,
        logit_scale: float = 20.0,
    ) -> ViTClassifier:
        """Put a cosine classifier on a ViT, and freeze the ViT or make it trainable.

        Args:
            vit: A ViT that the adapter takes as well: of timm, transformers, torchvision or open_clip.
            num_classes: Number of classes `C`; None takes that of the model's classifier.
            method: "linear_probe" or "full".
            head_dropout: Dropout probability before the classifier in training.
            logit_scale: Scale `s` of the cosine classifier.

        Raises:
            BackboneError: The model is not a supported ViT.
            ConfigError: A number is out of range.
        """
        backbone = find_backbone(vit)
        num_classes = resolve_num_classes(backbone, num_classes)
        return cls(backbone, num_classes, method=method, head_dropout=head_dropout, logit_scale=logit_scale)

    def unwrap(self) -> nn.Module:
        """Return the ViT, with its trained weights after "full"; the classifier cannot be used afterwards.

        Its classes, forwards and `requires_grad` are as they were before `wrap`.
        """
        vit = self.vit
        self.backbone.detach()
        self._frozen.restore(vit)
        del self.vit
        return vit

    @overload
    def forward(self, images: Any, *args: Any, return_output: Literal[False] = False, **kwargs: Any) -> Tensor: ...

    @overload
    def forward(self, images: Any, *args: Any, return_output: Literal[True], **kwargs: Any) -> AdapterOutput: ...

    def forward(self, images: Any, *args: Any, return_output: bool = False, **kwargs: Any) -> Any:
        """Classify images.

        Args:
            images: Images (B, 3, H, W) floating point, or the first argument of the ViT's forward.
            *args: Further arguments of the ViT's forward.
            return_output: Return an `AdapterOutput`, without groups, instead of the logits.
            **kwargs: Further arguments of the ViT's forward.

        Returns:
            Logits (B, C) float32 or float64, or `AdapterOutput`.

        Raises:
            InputError: The images do not fit the ViT.
            StateError: The ViT was unwrapped.
        """
        features = self.features(images, *args, **kwargs)
        logits = self.head(self.head_drop(features))
        if not return_output:
            return logits
        empty = features.new_empty(features.shape[0], 0)
        return AdapterOutput(logits, features, features, empty, empty.long())

    if TYPE_CHECKING:  # torch's own __call__ returns Any
        __call__ = forward

    def features(self, images: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the input of the classifier, (B, d), before dropout; without a gradient for "linear_probe"."""
        if "vit" not in self._modules:
            raise StateError("This classifier was unwrapped; create another with ViTClassifier.wrap(vit).")
        args, kwargs = self.frozen_weights.cast_inputs(((images, *args), kwargs))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.method == "full"):
            try:
                return self.backbone.plain_feature(*args, **kwargs)
            except LPTError:
                raise
            except Exception as error:
                explained = explain_failure(self.backbone, args, kwargs, error, prompted=False)
                if explained is not None:
                    raise explained from error
                raise

    def train(self, mode: bool = True) -> ViTClassifier:
        """Set train or eval mode; a frozen ViT stays in eval mode, and batch norms always do."""
        super().train(mode)
        if (vit := self._modules.get("vit")) is not None:
            if self.method == "linear_probe":
                vit.eval()
            self._frozen.sync_mode(vit)
        return self

    @property
    def num_classes(self) -> int:
        """Number of classes `C`."""
        return len(self.head.weight)

    @property
    def device(self) -> torch.device:
        """Device of the ViT's first parameter, on which images should be."""
        return next(self.vit.parameters()).device

    @property
    def fingerprint(self) -> str:
        """Hash of the ViT's current weights (`sha256-tensors-v1`); its classifier is left out."""
        return self.frozen_weights.fingerprint()

    def initial_fingerprint(self) -> str:
        """Hash of the ViT's weights at the first call, which identifies a run that changes them."""
        if self._initial is None:
            self._initial = self.frozen_weights.compute_fingerprint()
        return self._initial

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the trained parameters."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def preprocess(self) -> dict[str, Any]:
        """Return how images become tensors, for `lpt_peft.data.transforms`: as in `LongTailPromptAdapter`."""
        return {**self.backbone.preprocess(), **self.metadata.preprocess}

    def cast_backbone(self, dtype: torch.dtype) -> None:
        """Cast the weights of a frozen ViT to float32, bfloat16 or float16, and its inputs from now on.

        Raises:
            ConfigError: The method is "full", whose weights are trained.
        """
        if self.method == "full":
            raise ConfigError('method="full" trains the weights of the ViT: leave them in float32.')
        self.frozen_weights.cast(dtype)
