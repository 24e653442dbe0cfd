"""Tests of the README's code, the reference page, the word list and the files for GitHub."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
import yaml
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


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda path: path.name)
def test_links_between_files_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = ROOT / name if name else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, target


def test_reference_lists_every_public_name_with_the_adapter_first() -> None:
    table = re.findall(r"^\| (?:\{py:\w+\})?`(?:~lpt_peft\.[\w.]*?)?(\w+)` \|", REFERENCE, re.MULTILINE)
    assert table[0] == "LongTailPromptAdapter"
    assert sorted(table) == sorted(lpt_peft.__all__), "docs/reference.md must list lpt_peft.__all__"


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
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{package}.{name} has no docstring"


def test_check_words_finds_phrases_across_lines_and_in_names() -> None:
    check_words = load_check_words()
    text = "# the run goes\n# on.\ndef test_labels_that_are_none(): ...\nx = None if y is None else z\n"  # words: allow
    found = [(line, phrase) for line, phrase, _ in check_words.hits(text)]
    assert found == [(1, "goes # on"), (3, "are_none")]  # words: allow


def test_check_words_has_an_exception_for_quotations() -> None:
    check_words = load_check_words()
    line = "says learnt"  # words: allow
    assert len(check_words.hits(line)) == 1
    assert check_words.hits(f"{line}  # words: allow") == []


def test_check_words_reads_all_prose() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in load_check_words().files()}
    expected = {"README.md", "CITATION.cff", "Makefile", "docs/index.md", "lpt_peft/__init__.py", "tests/test_docs.py"}
    assert names >= expected
    assert not any("__pycache__" in name for name in names)


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_pin_actions_and_permissions(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert "concurrency" in workflow
    for name, job in workflow["jobs"].items():
        assert "timeout-minutes" in job or "uses" in job, name
        assert set(job.get("permissions", {})) <= {"id-token"}, name
    for action in re.findall(r"uses: (\S+)", text):
        assert re.search(r"@v\d+|@release/v\d+$", action) or (ROOT / action).is_file(), action
    for script in re.findall(r"sh (tests/[\w/]+\.sh)", text):
        assert (ROOT / script).is_file(), script
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in re.findall(r"make ([a-z-]+)", text):
        assert target in targets, f"{path.name} runs make {target}"


def test_ci_covers_the_supported_versions_of_python_and_torch() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    matrix = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]["tests"]
    versions = matrix["strategy"]["matrix"]["python"]
    assert versions == re.findall(r"Python :: (3\.\d+)", project)
    assert f'requires-python = ">={versions[0]}"' in project
    oldest = re.search(r'"torch>=([\d.]+)"', project)
    assert oldest
    assert any(f"torch=={oldest[1]} " in step.get("run", "") for step in matrix["steps"])


def test_only_the_publishing_job_of_a_release_gets_a_token() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))["jobs"]
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]
    assert set(jobs["publish"]["needs"]) == {"checks", "build"}
    assert jobs["publish"]["environment"]["name"] == "pypi"
    assert not any("run" in step for step in jobs["publish"]["steps"]), "no code of ours runs beside the token"
    data_files = re.findall(r"grep -F (lpt_peft/\S+)", str(jobs["build"]["steps"]).replace("\\n", "\n"))
    assert len(data_files) == 2
    assert all((ROOT / name).is_file() for name in data_files), data_files


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_forms_have_the_fields_that_github_requires(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form["name"]
    assert form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert fields
    assert len({field["id"] for field in fields}) == len(fields)
    for field in fields:
        assert field["type"] in {"dropdown", "input", "textarea"}
        assert field["attributes"]["label"]
        assert set(field) <= {"type", "id", "attributes", "validations"}
        assert field["type"] != "dropdown" or all(isinstance(option, str) for option in field["attributes"]["options"])


def test_citation_names_the_paper_and_this_software() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["license"] == "Apache-2.0"
    assert "version" not in citation, "the version is in _version.py only"
    paper = citation["preferred-citation"]
    assert paper["title"] == "LPT: Long-tailed Prompt Tuning for Image Classification"
    assert [author["family-names"] for author in paper["authors"]] == ["Dong", "Zhou", "Yan", "Zuo"]
