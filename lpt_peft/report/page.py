"""Rendering of a page: templates, pictures and a policy that lets browsers run the page's own script only."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from lpt_peft.analysis.plots import png
from lpt_peft.errors import MissingExtraError
from lpt_peft.report.classes import STATIC_ROWS


class Picture(NamedTuple):
    """A picture of a page."""

    source: str
    """Data URI of a PNG."""
    alt: str
    """Text for readers who do not see the picture."""
    caption: str


def picture(figure: Any, alt: str, caption: str) -> Picture:
    """Draw a figure of matplotlib."""
    return Picture(f"data:image/png;base64,{base64.b64encode(png(figure)).decode()}", alt, caption)


def render(name: str, **values: Any) -> str:
    """Fill in a template; every value is escaped.

    Args:
        name: File in `templates/`.
        **values: Variables of the template.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415 - an optional extra
        from markupsafe import Markup  # noqa: PLC0415 - a dependency of jinja2
    except ImportError as error:
        raise MissingExtraError('The report needs jinja2: pip install "lpt_peft[analysis]".') from error
    environment = Environment(
        loader=PackageLoader("lpt_peft.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = _asset("style.css"), _asset("script.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return environment.get_template(name).render(
        style=Markup(style),
        script=Markup(script),
        policy=policy,
        static_rows=STATIC_ROWS,
        **values,
    )


@cache
def _asset(name: str) -> str:
    return (files("lpt_peft.report") / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}"
