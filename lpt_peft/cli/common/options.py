"""Options that several sub-commands share."""

from __future__ import annotations

from typing import Annotated

import tyro

Json = Annotated[bool, tyro.conf.arg(name="json")]
"""`--json`: print one JSON object on standard output, and nothing else there."""
