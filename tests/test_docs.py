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
AUTOMODULES = set(re.findall(r"^\.\. automodule:: (\S+)", REFERENCE, re.MULTILINE))
PACKAGES = [path.parent.name for path in ROOT.glob("lpt_peft/*/__init__.py") if "__all__" in path.read_text("utf-8")]


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


def test_reference_lists_every_public_name_with_the_adapter_first() -> None:
    table = re.findall(r"^\| (?:\{py:\w+\})?`(?:~lpt_peft\.[\w.]*?)?(\w+)` \|", REFERENCE, re.MULTILINE)
    assert table[0] == "LongTailPromptAdapter"
    assert sorted(table) == sorted(lpt_peft.__all__), "lpt_peft.__all__ and the table of docs/reference.md must be equal"


@pytest.mark.parametrize("name", re.findall(r"\{py:\w+\}`~([\w.]+)`", REFERENCE))
def test_reference_links_to_documented_modules(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute)
    assert module in AUTOMODULES


@pytest.mark.parametrize("package", PACKAGES)
def test_reference_documents_public_packages(package: str) -> None:
    """Sphinx lists what `__all__` lists, so a package is complete if it is on the page and every name exists."""
    module = importlib.import_module(f"lpt_peft.{package}")
    assert f"lpt_peft.{package}" in AUTOMODULES, f"add `.. automodule:: lpt_peft.{package}` to docs/reference.md"
    for name in module.__all__:
        value = getattr(module, name)
        documented = isinstance(value, type) or callable(value)
        assert not documented or value.__doc__, f"{package}.{name} has no docstring"


def test_reference_documents_the_modules_of_data() -> None:
    files = {path.stem for path in (ROOT / "lpt_peft" / "data").glob("[!_]*.py")} - {"checks"}
    assert {f"lpt_peft.data.{name}" for name in files} <= AUTOMODULES


def test_check_words_finds_phrases_across_lines_and_in_names() -> None:
    check_words = load_check_words()
    text = "# the run goes\n# on.\ndef test_labels_that_are_none(): ...\nx = None if y is None else z\n"  # words: allow
    found = [(line, phrase) for line, phrase, _ in check_words.hits(text)]
    assert found == [(1, "goes # on"), (3, "are_none")]  # words: allow


def test_check_words_has_an_exception_for_quotations() -> None:
    check_words = load_check_words()
    line = "says " + "learnt"
    assert len(check_words.hits(line)) == 1
    assert check_words.hits(f"{line}  # words: allow") == []


def test_check_words_reads_all_prose() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in load_check_words().files()}
    expected = {"README.md", "CITATION.cff", "Makefile", "docs/index.md", "lpt_peft/__init__.py", "tests/test_docs.py"}
    assert names >= expected
    assert not any("__pycache__" in name for name in names)
