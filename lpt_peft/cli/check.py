"""`lpt-peft check DATA`: list the files of a data set that need attention, without training."""

from __future__ import annotations

import sys
from pathlib import Path

import tyro

from lpt_peft.cli.common.exit_codes import INCOMPLETE, OK
from lpt_peft.cli.common.extras import requires_extra
from lpt_peft.cli.common.messages import notice
from lpt_peft.cli.common.options import Json


def check(
    data: tyro.conf.Positional[str],
    /,
    *,
    root: Path | None = None,
    val: Path | None = None,
    test: Path | None = None,
    as_json: Json = False,
) -> int:
    """Open every image once and list files that are unreadable, left out, rotated, of an unusual mode or repeated.

    Nothing is changed. Exit status 0: nothing is listed, except hidden and system files; 3: some files are listed.

    Args:
        data: Images, as for `lpt-peft train`.
        root: Folder that the paths of a list start from; None: that of the list.
        val: List or folder of the validation split, if it is not in DATA.
        test: List or folder of the test split, if it is not in DATA.
        as_json: Print one JSON object.
    """
    with requires_extra("lpt-peft check", "train"):
        from tqdm import tqdm

        from lpt_peft.cli.common.open_data import open_splits
        from lpt_peft.cli.common.run_settings import ImageSettings
        from lpt_peft.cli.common.streams import print_json, print_text
        from lpt_peft.data.files.walk import HIDDEN
        from lpt_peft.data.inspection.check_images import check_images

    splits = open_splits(data, ImageSettings(root=root, val=val, test=test), seed=0, allow_empty=True)
    total = sum(map(len, splits.values()))
    notice(f"checking {total:,} images")
    with tqdm(total=total, unit="image", disable=None, file=sys.stderr) as bar:
        report = check_images(splits, progress=lambda done, total: bar.update())
    if as_json:
        print_json(report.to_dict())
    else:
        print_text(str(report))
    left_out = any(reason != HIDDEN for summary in report.summaries.values() for reason in summary.left_out)
    return INCOMPLETE if report.findings or left_out else OK
