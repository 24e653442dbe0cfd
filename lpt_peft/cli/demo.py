"""`lpt-peft demo`: train a frozen ViT on long-tailed handwritten digits, with prompts alone."""

from __future__ import annotations

import shlex
from pathlib import Path

from lpt_peft.cli.common.extras import requires_extra
from lpt_peft.cli.common.options import Json
from lpt_peft.cli.common.paths import check_new_folder


def demo(
    output: Path = Path("lpt-peft-demo"), seeds: int = 1, epochs: int = 10, resume: bool = True, as_json: Json = False
) -> None:
    """Train in five ways on the digits, compare them, and write a table, a figure and a prompt file.

    Args:
        output: Folder for prompts/, test/, results.json and digits.png.
        seeds: Number of seeds, for mean and spread.
        epochs: Passes over the training images, the same for every row.
        resume: Resume an interrupted run in that folder; --no-resume starts again.
        as_json: Print the content of results.json instead of the table.
    """
    from lpt_peft.cli.common.streams import print_json, print_text
    from lpt_peft.cli.common.tables import print_table

    check_new_folder(output)
    with requires_extra("The demo", "demo"):
        from lpt_peft.demo.run import run_demo

    result = run_demo(output, seeds=seeds, epochs=epochs, resume=resume)
    if as_json:
        print_json(result.to_dict())
        return
    header, rows = result.table()
    print_table(rows, header)
    seeds_noun = "seed" if len(result.seeds) == 1 else "seeds"
    print_text(f"\nTest accuracy in %. {result.rule}. {len(result.seeds)} {seeds_noun}, {result.seconds:.0f} s.")
    print_text(
        f"Groups: {100 * result.gain_of_groups():+.1f} points overall, LPT compared with phase 1 of the same number of "
        "passes. Differences of about 1.5 points are within the spread of the seeds. Groups pay on harder images: "
        "docs/results.md of the repository has them on 89 classes of emoji with a pretrained ViT."
    )
    print_text(f"Groups that no training image chose: {result.dead_groups or 'none'}.")
    print_text("The prompt file was loaded on a new backbone: all predictions are identical.")
    print_text(f"Written to {output}/: prompts/ (the prompt file), test/ (the test images), results.json, digits.png")
    print("Try next:")
    for words in next_commands(output):
        print(f"  {shlex.join(words)}")


def next_commands(output: Path) -> list[list[str]]:
    """Commands that use the output of the demo."""
    rarest = [str(path) for path in sorted((output / "test" / "9").glob("*.png"))[:3]]
    return [
        ["lpt-peft", "predict", str(output), *rarest],
        ["lpt-peft", "evaluate", str(output), str(output / "test")],
        ["lpt-peft", "inspect", str(output)],
        ["lpt-peft", "doctor", "glyph_vit"],
    ]
