"""`python -m lpt_peft`, and `accelerate launch -m lpt_peft train ...` on several processes: the lpt-peft command."""

from __future__ import annotations

import sys

from lpt_peft.cli import main

if __name__ == "__main__":
    sys.exit(main())
