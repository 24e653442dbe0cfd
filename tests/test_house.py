"""Rules for all files of the package; see CONTRIBUTING.md. Not here: the layers, which import-linter checks."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lpt_peft

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lpt_peft"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PAGES = sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts)

MAX_LINES = 290  # "about 250": beyond this a file has two roles
CORE = {"torch", "timm", "safetensors", "huggingface-hub", "einops"}
OPTIONAL = ["accelerate", "datasets", "jinja2", "matplotlib", "open_clip", "peft", "rich", "sklearn", "torchmetrics"]
OPTIONAL += ["transformers", "tyro"]

FORBIDDEN_CALLS = {"torch.manual_seed", "np.random.seed", "numpy.random.seed", "random.seed"}
FORBIDDEN_CALLS |= {"torch.load", "pickle.load", "pickle.loads", "torch.save"}

# Names that the package must export.
CONTRACT = {
    "AGCLLoss",
    "AdapterOutput",
    "ClassBalancedSampler",
    "CosineClassifier",
    "DualSampler",
    "LPTError",
    "LPTLoss",
    "LongTailPromptAdapter",
    "PoolMatch",
    "PromptConfig",
    "PromptPool",
    "SharedPrompt",
    "ShotMetrics",
    "agcl_loss",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def section(text: str, heading: str) -> str:
    """The lines of `text` under a `[table]` heading of a TOML file (Python 3.10 has no parser)."""
    found = re.search(rf"^\[{re.escape(heading)}\]\n(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"pyproject.toml has no [{heading}]"
    return found[1]


def test_public_names_exist_and_fit_on_one_screen() -> None:
    names = lpt_peft.__all__
    assert len(names) == len(set(names)) <= 26
    assert set(names) >= CONTRACT, f"missing: {sorted(CONTRACT - set(names))}"
    for name in names:
        assert hasattr(lpt_peft, name), name
        assert name == "__version__" or not name.startswith("_")


def test_package_init_defines_nothing() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    defined = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert not defined


def test_every_public_name_is_documented() -> None:
    for name in set(lpt_peft.__all__) - {"__version__"}:
        value = getattr(lpt_peft, name)
        if isinstance(value, type) or callable(value):
            assert value.__doc__, name


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_are_short_and_have_a_docstring(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), f"{name_of(path)} has no docstring"
    lines = len(text.splitlines())
    assert lines <= MAX_LINES, f"{name_of(path)} has {lines} lines: one role per file, about 250 lines"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_global_random_state_and_no_pickle(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            allowed = path.name == "_random.py" and call == "torch.manual_seed"  # inside fork_rng
            # Checkpoints of the paper's program are pickles, of which torch reads only tensors.
            allowed |= (
                path.name == "convert_official.py" and call == "torch.load" and "weights_only=True" in ast.unparse(node)
            )
            assert allowed or call not in FORBIDDEN_CALLS, f"{name_of(path)}:{node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_internal_imports_are_absolute_and_of_the_module_that_defines(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} is a relative import"
            # import-linter has no layer for the package itself: importing from it would bypass the layers.
            assert node.module != "lpt_peft", f"{name_of(path)}:{node.lineno} imports from the package"
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            assert "lpt_peft" not in names, f"{name_of(path)}:{node.lineno} imports the package"


def test_core_import_does_not_import_optional_libraries() -> None:
    # Imports of timm, a required dependency, do not count.
    program = (
        "import sys, torch, timm, safetensors.torch, huggingface_hub, einops\n"
        "before = set(sys.modules)\n"
        "import lpt_peft\n"
        "for name in lpt_peft.__all__: getattr(lpt_peft, name)\n"
        f"print(sorted(set({OPTIONAL}) & (set(sys.modules) - before)))\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == "[]"


def test_standalone_modules_do_not_import_the_adapter() -> None:
    leaves = [
        "prompts",
        "heads",
        "losses",
        "samplers",
        "metrics",
        "analysis",
        "data.images",
        "data.long_tail",
        "data.folder",
    ]
    leaves += [
        "data.folder",
        "data.image_list",
        "data.inaturalist",
        "data.cifar",
        "data.huggingface",
        "data.from_dataset",
        "data.transforms",
    ]
    # Importing a module imports its package, so replace the package.
    program = (
        "import sys, types\n"
        "face = types.ModuleType('lpt_peft')\n"
        f"face.__path__ = [{str(PACKAGE)!r}]\n"
        "sys.modules['lpt_peft'] = face\n"
        "import importlib\n"
        f"for name in {leaves}: importlib.import_module('lpt_peft.' + name)\n"
        "print(sorted(name for name in sys.modules if name in ('timm', 'lpt_peft.adapter', 'lpt_peft.prompting')))\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == "[]"


def test_core_dependencies_are_exactly_the_five() -> None:
    project = section((ROOT / "pyproject.toml").read_text(), "project")
    listed = re.search(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert listed
    names = [re.split(r"[^\w.-]", entry)[0] for entry in re.findall(r'"([^"]+)"', listed[1])]
    assert sorted(names) == sorted(CORE)


def test_version_is_defined_once() -> None:
    assert lpt_peft.__version__ == importlib.import_module("lpt_peft._version").__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|(a|b|rc)\d+)?", lpt_peft.__version__)
    assert metadata("lpt_peft")["Version"] == lpt_peft.__version__, "pip install -e . again"
    project = section((ROOT / "pyproject.toml").read_text(), "project")
    assert 'dynamic = ["version"]' in project
    assert not re.search(r"^version\s*=", project, re.MULTILINE)


def test_changelog_has_an_unreleased_section() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    unreleased = re.search(r"^## \[Unreleased\]\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert unreleased
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (\w+)", unreleased[1], re.MULTILINE)) <= kinds


def test_licence_is_apache_and_types_are_shipped() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(text) == 11358  # characters of the text at apache.org
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_of_pages_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # timm's register_model looks for it
    state = torch.get_rng_state()
    try:
        exec(compile("\n".join(blocks), name_of(page), "exec"), module.__dict__)
    finally:
        torch.set_rng_state(state)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_name_files_that_exist(page: Path) -> None:
    for name in re.findall(r"`((?:tests|lpt_peft|examples)/[\w/.]+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{name_of(page)} names {name}"
