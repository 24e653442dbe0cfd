"""The backbone of a run."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from lpt_peft.cli import main
from lpt_peft.cli.common.build_adapter import build_run_backbone
from lpt_peft.cli.common.run_settings import RunSettings
from lpt_peft.errors import BackboneError, ConfigError


@pytest.mark.parametrize("flags", [["--img-size", "64"], ["--no-pretrained"], ["--backbone-weights", "nowhere"]])
def test_the_bundled_backbone_cannot_be_changed(data, tmp_path, capsys, flags):
    assert main(["train", str(data), "--output", str(tmp_path), "--backbone", "glyph_vit", *flags]) == 1
    assert "glyph_vit has fixed weights and takes images of 32 px" in capsys.readouterr().err


def test_a_backbone_of_timm(tmp_path):
    run = RunSettings(backbone="vit_tiny_patch16_224", pretrained=False, img_size=32)
    first, second = (build_run_backbone(run).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first), "random weights repeat with the seed"
    changed = {name: tensor + 1 for name, tensor in first.items()}
    save_file(changed, tmp_path / "w.safetensors")
    given = RunSettings(backbone="vit_tiny_patch16_224", backbone_weights=tmp_path / "w.safetensors", img_size=32)
    assert all(torch.equal(tensor, changed[name]) for name, tensor in build_run_backbone(given).state_dict().items())
    with pytest.raises(BackboneError, match="no model .*Similar names: .*vit_tiny_patch16_224"):
        build_run_backbone(RunSettings(backbone="vit_tiny_patch16_22"))
    with pytest.raises(BackboneError, match="cannot be loaded: .*--backbone-weights.*--no-pretrained"):
        build_run_backbone(RunSettings(backbone="vit_tiny_patch16_224.augreg_in21k", img_size=32))  # offline
    with pytest.raises(ConfigError, match="img_size=-5 must be a positive number"):
        build_run_backbone(RunSettings(backbone="vit_tiny_patch16_224", pretrained=False, img_size=-5))
