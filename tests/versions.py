"""Skips for features that an older timm or transformers lacks; floors.sh runs the oldest supported versions."""

from __future__ import annotations

from types import ModuleType

import pytest
import timm
from packaging.version import Version

_COMPLETE = {"timm": "1.0.31", "transformers": "5.16"}  # the tests use nothing newer


def skip_unless(available: bool, feature: str, library: ModuleType = timm) -> None:
    """Skip if an older library lacks `feature`; fail if the installed version should have it."""
    if not available:
        version, complete = library.__version__, _COMPLETE[library.__name__]
        assert Version(version) < Version(complete), f"{library.__name__} {version} should have {feature}"
        pytest.skip(f"{library.__name__} {version} has no {feature}")
