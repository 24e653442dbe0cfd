"""What differs between methods in a run: the model that they need, its phases, its checkpoints and its file.

`method_of` chooses the implementation of `Method` for a model. Not here: settings (`method_settings.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from lpt_peft._run_folder import MODEL, PROMPTS
from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.checkpoint.model_file import MODEL_FORMAT
from lpt_peft.checkpoint.schema import FORMAT
from lpt_peft.errors import ConfigError, StateError
from lpt_peft.recipe.progress import Reporter
from lpt_peft.recipe.settings import TrainSettings
from lpt_peft.recipe.training.image_passes import ImagePasses
from lpt_peft.recipe.training.phase_init import TRAINED_PARTS, begin_phase, init_head
from lpt_peft.vit_classifier import ViTClassifier

Model = LongTailPromptAdapter | ViTClassifier
"""A model that a run trains."""


class Method(Protocol):
    """A method, for a model.

    Attributes:
        folder: Name of the folder of the result in the output folder.
        format: Value of "format" in that folder's `config.json`.
    """

    folder: str
    format: str

    def identity(self) -> dict[str, Any]:
        """Return what identifies the model of a run, as plain JSON: sizes, and the weights before the training."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint: everything that the run trains."""

    def begin(
        self,
        phase: str,
        dataset: Dataset[Any],
        settings: TrainSettings,
        *,
        accelerator: Accelerator,
        reporter: Reporter,
        saved: Mapping[str, Tensor] | None,
    ) -> None:
        """Initialize a phase, or load the tensors of a checkpoint, and enable gradients of its parameters."""

    def end(self, phases: Sequence[str]) -> None:
        """Leave the model as its result, after these phases."""


def method_of(model: Model, settings: TrainSettings) -> Method:
    """Return the method of the settings for a model.

    Raises:
        ConfigError: The model is not one that this method trains.
    """
    name = settings.method
    if isinstance(model, ViTClassifier):
        if model.method != name:
            raise ConfigError(
                f'The settings have method="{name}", and the model is a ViTClassifier for method="{model.method}": '
                "give both the same method; for prompts, LongTailPromptAdapter.wrap(vit, num_classes)."
            )
        return _ClassifierMethod(model)
    if name in ("linear_probe", "full"):
        raise ConfigError(
            f'method="{name}" trains no prompts: give ViTClassifier.wrap(vit, num_classes, method="{name}") in place '
            f"of a {type(model).__name__}."
        )
    placement = model.prompt_config.placement
    if name not in {"lpt", f"vpt_{placement}"}:
        raise ConfigError(
            f'method="{name}" does not fit an adapter with placement="{placement}": '
            f'LongTailPromptAdapter.wrap(vit, num_classes, placement="{name.removeprefix("vpt_")}").'
        )
    if not model.prompt_config.has_groups and set(settings.plan) - {"shared"}:
        raise ConfigError(
            f'method="{name}" trains groups, and placement="shallow" has no groups: use method="vpt_shallow", or '
            'phases="shared".'
        )
    return _PromptMethod(model)


class _PromptMethod:
    """LPT and VPT: an adapter, whose phase is set before each phase of the run."""

    folder, format = PROMPTS, FORMAT

    def __init__(self, adapter: LongTailPromptAdapter) -> None:
        self._adapter = adapter

    def identity(self) -> dict[str, Any]:
        sizes = self._adapter.prompt_config.to_dict()
        return {
            **{f"prompts.{name}": value for name, value in sizes.items()},
            "prompts.head_dropout": self._adapter.head_drop.p,
            "backbone fingerprint": self._adapter.fingerprint,
        }

    def state(self) -> dict[str, Tensor]:
        return self._adapter.adapter_state_dict()

    def begin(
        self,
        phase: str,
        dataset: Dataset[Any],
        settings: TrainSettings,
        *,
        accelerator: Accelerator,
        reporter: Reporter,
        saved: Mapping[str, Tensor] | None,
    ) -> None:
        begin_phase(self._adapter, phase, dataset, settings, accelerator=accelerator, reporter=reporter, saved=saved)

    def end(self, phases: Sequence[str]) -> None:
        if phases:  # "joint" also trained the shared prompt
            self._adapter.phase = "shared" if phases[-1] == "shared" else "group"
        for phase in phases:
            self._adapter.trained_parts |= dict.fromkeys(TRAINED_PARTS[phase], "as trained before")


class _ClassifierMethod:
    """Linear probe and full fine-tuning: all trained parameters are trained in the only phase."""

    folder, format = MODEL, MODEL_FORMAT

    def __init__(self, model: ViTClassifier) -> None:
        self._model = model

    def identity(self) -> dict[str, Any]:
        model = self._model
        # Full fine-tuning changes the weights: a run that is resumed in this process started from those of the wrap.
        fingerprint = model.fingerprint if model.method == "linear_probe" else model.initial_fingerprint()
        return {
            "head.num_classes": model.num_classes,
            "head.logit_scale": model.head.scale,
            "head.head_dropout": model.head_drop.p,
            "backbone fingerprint": fingerprint,
        }

    def state(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._trained().items()}

    @torch.no_grad()
    def begin(
        self,
        phase: str,
        dataset: Dataset[Any],
        settings: TrainSettings,
        *,
        accelerator: Accelerator,
        reporter: Reporter,
        saved: Mapping[str, Tensor] | None,
    ) -> None:
        if saved is None:
            if settings.init_head == "class_mean":
                init_head(self._model, ImagePasses(dataset, settings, accelerator, reporter), reporter)
            return
        trained = self._trained()
        if {name: tensor.shape for name, tensor in saved.items()} != {n: p.shape for n, p in trained.items()}:
            raise StateError(
                "The tensors of the checkpoint are not those that this model trains: it belongs to another model, or "
                "layers were added since. Choose another folder; resume=False (--no-resume) removes its checkpoints."
            )
        for name, parameter in trained.items():
            parameter.copy_(saved[name])

    def end(self, phases: Sequence[str]) -> None:
        pass

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self._model.named_parameters() if parameter.requires_grad}
