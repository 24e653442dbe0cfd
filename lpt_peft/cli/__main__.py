"""`python -m lpt_peft.cli`, the same as `lpt-peft`."""

import sys

from lpt_peft.cli import main

sys.exit(main())
