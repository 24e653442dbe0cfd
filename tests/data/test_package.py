"""Public names of lpt_peft.data."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import lpt_peft.data


def test_interpreter_and_type_checker_read_the_same_names():
    tree = ast.parse(Path(lpt_peft.data.__file__).read_text())
    [guarded] = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {node.module.removeprefix("lpt_peft.data."): [a.name for a in node.names] for node in guarded.body}
    [call] = [node.value for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    assert ast.literal_eval(call.args[1]) == typed
    assert sorted(name for names in typed.values() for name in names) == sorted(lpt_peft.data.__all__)


def test_names_and_modules_of_the_same_name_do_not_collide():
    program = (
        "import lpt_peft.data.image_list, lpt_peft.data.transforms\n"
        "from lpt_peft.data import image_list, transforms, check_images, Reading\n"
        "from lpt_peft.data.transforms import transforms as direct\n"
        "print(callable(image_list), transforms is direct, check_images.__module__)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "True", "lpt_peft.data.inspection.check_images"]


def test_importing_the_package_imports_neither_torch_nor_pillow():
    program = "import sys, lpt_peft.data; print([name for name in ('torch', 'PIL', 'timm') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
