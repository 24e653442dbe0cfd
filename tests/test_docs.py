"""The README's code, the reference page, the word list and the files for GitHub."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from PIL import Image

import lpt_peft

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
PACKAGES = ["losses", "samplers", "metrics", "checkpoint", "hub", "recipe", "demo", "backbones"]


def load_check_words() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_words", ROOT / ".ci" / "check_words.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_code_trains_on_a_folder_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed, except that the ViT is small and not pretrained and the run has 2 epochs instead of 40."""
    pytest.importorskip("accelerate")
    generator = torch.Generator().manual_seed(0)
    for name, count in {"cat": 20, "dog": 8, "eel": 3}.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(count):
            noise = torch.randint(256, (50, 40, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(tmp_path / "photos" / name / f"{number}.jpg")
    create_model = timm.create_model

    def small(name: str, *, pretrained: bool) -> torch.nn.Module:
        assert pretrained
        return create_model(name, img_size=32, patch_size=16, embed_dim=48, num_heads=2, depth=2)

    monkeypatch.setattr(timm, "create_model", small)
    monkeypatch.chdir(tmp_path)
    first, second = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert first.count("train(model, data, data.labels)") == 1
    first = first.replace(", data.labels)", ", data.labels, short, progress=False)")
    settings = importlib.import_module("lpt_peft.recipe.settings")
    phase = settings.PhaseSettings(epochs=2)
    page = {"short": settings.TrainSettings(shared=phase, group=phase)}
    with torch.random.fork_rng(devices=[]):
        exec(compile(first, "README.md", "exec"), page)
        before = {name: value.clone() for name, value in page["model"].adapter_state_dict().items()}
        assert {path.name for path in Path("photos-prompts").iterdir()} == {"config.json", "prompts.safetensors"}
        exec(compile(second.replace("40", "2"), "README.md", "exec"), page)
    after = page["model"].adapter_state_dict()
    assert page["model"].phase == "group"
    for name in ("shared.prompts", "pool.prompts", "pool.keys", "head.weight"):
        assert not torch.equal(before[name], after[name]), name
