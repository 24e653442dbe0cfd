"""Models from the output folder of a run, a prompt file, a model file, or a repository on the Hub.

Not here: the formats (`lpt_peft.checkpoint`), the transfer (`lpt_peft.hub`).
"""

from __future__ import annotations

from os import PathLike
from typing import Any, Literal

import torch
from torch import nn

from lpt_peft._run_folder import existing_prompt_folder, model_folder
from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.checkpoint.files import expand_user
from lpt_peft.errors import ConfigError
from lpt_peft.hub import check_subfolder
from lpt_peft.hub.pull import is_repository
from lpt_peft.inference.run_backbone import read_run_backbone
from lpt_peft.vit_classifier import ViTClassifier

Model = LongTailPromptAdapter | ViTClassifier
Source = str | PathLike[str]


def load_model(
    source: Source,
    vit: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    check_backbone: Literal["error", "warn", "off"] = "error",
    revision: str | None = None,
    subfolder: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Model:
    """Load a trained model in eval mode.

    Args:
        source: Output folder of `lpt-peft train`; a prompt file or model file, or its folder; or "owner/name" of a
            prompt file on the Hub, if no such folder exists.
        vit: The ViT of the training, not wrapped. None builds it: as the settings of a run describe it, cast to the
            dtype of the run, or as the prompt file or model file names it.
        device: Device of the model. None: that of `vit`; without `vit`, the accelerator if there is any, or the CPU.
        dtype: Cast the ViT's weights to float32, bfloat16 or float16; prompts and head keep their dtype. None leaves
            them as described under `vit`.
        check_backbone: For prompt files on another backbone or other weights: "error", "warn" or "off".
        revision: Branch, tag or commit of a repository.
        subfolder: Folder inside the folder or repository.
        token: As in `LongTailPromptAdapter.from_pretrained`, like all following arguments.
        cache_dir: Cache of the Hub client.
        local_files_only: Load a repository from the cache without a request to the Hub.
        force_download: Download a repository again.

    Raises:
        PromptFileError, ModelFileError: The file is missing, is refused, or is for another backbone.
        HubError: The Hub did not deliver the prompts or the backbone.
        StateError: The run has not written its result yet.
        BackboneError: The ViT cannot take prompts, or its weights are not available.
        ConfigError: An argument or a setting of the run is out of range, or the backbone cannot be built.
    """
    hub: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "force_download": force_download,
    }
    if isinstance(source, nn.Module):
        raise ConfigError(
            f'source={type(source).__name__} must be a folder, or "owner/name" on the Hugging Face Hub. Give it before '
            "the ViT: from_pretrained(source, vit)."
        )
    if device is not None:
        check_device(device)
    run_dtype = None
    built = vit is None
    model: Model
    if isinstance(source, str) and "/" in source and is_repository(source):
        model = LongTailPromptAdapter.from_pretrained(
            source, vit, check_backbone=check_backbone, subfolder=subfolder, **hub
        )
    else:
        if revision is not None:
            raise ConfigError(f"revision={revision!r} is for repositories, and {source} is a folder: leave it out.")
        check_subfolder(subfolder)
        path = expand_user(source, "source") / (subfolder or "")
        weights = model_folder(path)
        prompts = existing_prompt_folder(path) if weights is None else path
        if vit is None and (run := read_run_backbone(path.parent if path.is_file() else path)) is not None:
            vit, run_dtype = run.build(), getattr(torch, run.backbone_dtype)
        if weights is None:
            model = LongTailPromptAdapter.from_pretrained(prompts, vit, check_backbone=check_backbone)
        elif check_backbone == "error":
            model = ViTClassifier.from_pretrained(weights, vit)
        else:
            raise ConfigError(
                f"check_backbone={check_backbone!r} is for prompt files, and {source} is a model file, whose ViT is "
                "always checked: leave it out."
            )
    if dtype is None and run_dtype is not torch.float32:
        dtype = run_dtype
    if dtype is not None:
        # Full fine-tuning leaves the ViT's weights trainable; those of an adapter that are trainable are its LoRA's.
        model.frozen_weights.cast(dtype, trainable=isinstance(model, ViTClassifier))
    if device is None and built and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    return model.eval() if device is None else model.to(device).eval()


def check_device(device: torch.device | str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        ConfigError: It is not available.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        first_line = str(error).partition("\n")[0]
        raise ConfigError(
            f'device={str(device)!r:.80} is not available: {first_line:.200}. Give "cpu", or a device of this machine.'
        ) from error
