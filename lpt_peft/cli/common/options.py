"""Options that all sub-commands share."""

from __future__ import annotations

from typing import Annotated

import tyro

Json = Annotated[bool, tyro.conf.arg(name="json")]
"""`--json`: print one JSON document on standard output, and nothing else there."""
