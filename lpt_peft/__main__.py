"""The lpt-peft command as `python -m lpt_peft`, for `accelerate launch -m lpt_peft train ...`."""

from __future__ import annotations

import sys

from lpt_peft.cli import main

if __name__ == "__main__":
    sys.exit(main())
