"""Sphinx configuration: pages in Markdown (MyST), the reference from docstrings. A build does not need the network."""

from __future__ import annotations

import re
from typing import Any

from lpt_peft._version import __version__

project = "lpt_peft"
author = "The lpt_peft authors"
copyright = author
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
# Docstrings use single backticks for code.
default_role = "code"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # attributes as a list; their own entries would duplicate documented properties
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"lpt_peft {release}"


def as_restructured_text(*event: Any) -> None:
    """Convert docstrings, which are plain text: an indented block after a colon is literal, and a bar is not markup."""
    lines: list[str] = event[-1]
    in_block, indent = False, 0
    for number, line in enumerate(lines):
        if line.strip():
            depth = len(line) - len(line.lstrip())
            in_block = in_block and depth > indent
            if not in_block and ">>>" not in line:
                lines[number] = re.sub(r"(`[^`]*`)|\|", lambda found: found[1] or r"\|", line)
            following = lines[number + 1 : number + 3]
            opens = len(following) == 2 and not following[0].strip() and following[1].startswith(" " * (depth + 1))
            if not in_block and opens and line.rstrip().endswith(":") and ">>>" not in following[1]:
                lines[number] = lines[number].rstrip() + ":"
                in_block, indent = True, depth


def setup(app: Any) -> None:
    """Connect the conversion before napoleon, which has the default priority, 500."""
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)
