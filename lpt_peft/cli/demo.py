"""`lpt-peft demo`: a frozen ViT learns long-tailed handwritten digits with prompts alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lpt_peft.cli.common.extras import extra_needed
from lpt_peft.cli.common.interrupted import telling_how_to_go_on
from lpt_peft.cli.common.options import Json


def demo(
    output: Path = Path("lpt-peft-demo"), seeds: int = 1, epochs: int = 20, resume: bool = True, as_json: Json = False
) -> None:
    """Train five ways on the digits, compare them, write table, picture and prompt file.

    Args:
        output: Folder for results.json, digits.png and prompts/.
        seeds: Repeat with this many seeds, for mean and spread.
        epochs: Passes over the training images, the same for every row.
        resume: Go on with a run that was broken off in that folder; --no-resume starts anew.
        as_json: Print the content of results.json instead of the table.
    """
    from lpt_peft.cli.common.tables import print_table

    with extra_needed("The demo", "demo"):
        from lpt_peft.demo.run import run_demo

    with telling_how_to_go_on():
        result = run_demo(output, seeds=seeds, epochs=epochs, resume=resume, progress=sys.stderr.isatty())
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    header, rows = result.table()
    print_table(rows, header)
    print(f"\n% of test images right. {result.rule}. {len(result.seeds)} seed(s), {result.seconds:.0f} s.")
    print(f"Groups that no training image chose: {result.dead_groups or 'none'}.")
    print(f"The prompt file was read back onto a fresh backbone: all predictions identical.\nWritten to {output}/:")
    print("  prompts/ (config.json, prompts.safetensors), results.json, digits.png")
