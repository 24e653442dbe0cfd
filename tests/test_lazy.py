"""Packages that import their public names on first use."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import lpt_peft
import lpt_peft.recipe
import lpt_peft.recipe.settings

ROOT = Path(__file__).parents[1]
PACKAGES = [lpt_peft, lpt_peft.recipe]


def run(program):
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_interpreter_and_type_checker_read_the_same_names(package):
    tree = ast.parse(Path(package.__file__).read_text())
    [guarded] = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(guarded.test) == "TYPE_CHECKING"
    typed = {node.module.removeprefix(f"{package.__name__}."): [a.name for a in node.names] for node in guarded.body}
    [call] = [node.value for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    assert ast.literal_eval(call.args[1]) == typed
    assert sorted(name for names in typed.values() for name in names) == sorted(set(package.__all__) - {"__version__"})


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_names_are_the_objects_of_their_modules(package):
    assert isinstance(package, ModuleType)
    for name in set(package.__all__) - {"__version__"}:
        value = getattr(package, name)
        if isinstance(value, (type, FunctionType)):
            assert value is getattr(sys.modules[value.__module__], name)
            assert pickle.loads(pickle.dumps(value)) is value
        assert name in dir(package)
    assert {"__all__", "__doc__", "__path__"} <= set(dir(package))


def test_star_import_gives_all_names():
    namespace = {}
    exec("from lpt_peft import *", namespace)
    assert set(lpt_peft.__all__) <= namespace.keys()


def test_unknown_names_raise():
    with pytest.raises(AttributeError, match="module 'lpt_peft' has no attribute 'LPTLos'"):
        _ = lpt_peft.LPTLos
    with pytest.raises(ImportError, match="LPTLos"):
        exec("from lpt_peft import LPTLos")
    assert not hasattr(lpt_peft, "__wrapped__")


def test_submodules_are_attributes():
    assert run("import lpt_peft; print(lpt_peft.losses.agcl_loss is lpt_peft.agcl_loss)") == "True"


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_modules_do_not_hide_functions_of_the_same_name(name):
    program = f"import lpt_peft.recipe.{name}\nfrom lpt_peft.recipe import {name}\nprint(type({name}).__name__)"
    assert run(program) == "function"


def test_names_can_be_monkeypatched(monkeypatch):
    real = lpt_peft.cosine_logits
    with monkeypatch.context() as patch:
        patch.setattr(lpt_peft, "cosine_logits", len)
        assert lpt_peft.cosine_logits is len
    assert lpt_peft.cosine_logits is real


def test_importing_the_package_does_not_import_torch():
    program = "import sys, lpt_peft, lpt_peft.recipe.settings, lpt_peft.recipe.presets\n"
    program += "print([name for name in ('torch', 'timm', 'numpy', 'accelerate') if name in sys.modules])"
    assert run(program) == "[]"


def test_public_names_do_not_import_slow_modules():
    # torch's own imports do not count: they differ between versions.
    program = "import sys, torch, numpy\nbefore = set(sys.modules)\nfrom lpt_peft import *\n"
    program += "slow = ('torch.distributed.tensor', 'torch._dynamo', 'torch._inductor', 'timm', 'torchvision')\n"
    program += "print([name for name in slow if name in set(sys.modules) - before], LongTailPromptAdapter.__name__)"
    assert run(program) == "[] LongTailPromptAdapter"


def test_a_fingerprint_does_not_import_distributed_tensors():
    program = "import sys, torch\nbefore = set(sys.modules)\nfrom lpt_peft.backbones.fingerprint import fingerprint\n"
    program += "fingerprint([torch.zeros(2)])\nprint('torch.distributed.tensor' in set(sys.modules) - before)"
    assert run(program) == "False"
