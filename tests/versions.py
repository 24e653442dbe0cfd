"""Skips tests of features that an older timm or transformers lacks; see floors.sh for the versions that are run."""

from __future__ import annotations

from types import ModuleType

import pytest
import timm
from packaging.version import Version

_COMPLETE = {"timm": "1.0.31", "transformers": "5.16"}  # from here on, nothing that the tests ask for is missing


def skip_unless(available: bool, feature: str, library: ModuleType = timm) -> None:
    """Skip where an older library lacks `feature`; in a version that must have it, the lack is a failure."""
    if not available:
        version, complete = library.__version__, _COMPLETE[library.__name__]
        assert Version(version) < Version(complete), f"{library.__name__} {version} should have {feature}"
        pytest.skip(f"{library.__name__} {version} has no {feature}")
