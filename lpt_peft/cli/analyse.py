"""`lpt-peft analyse RUN [DATA]`: show what a finished run learned and where it fails."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tyro

from lpt_peft.cli.common.exit_codes import INCOMPLETE, OK
from lpt_peft.cli.common.extras import requires_extra
from lpt_peft.cli.common.options import Json
from lpt_peft.errors import ConfigError, InputError

if TYPE_CHECKING:
    from lpt_peft.cli.common.load_run import LoadedRun
    from lpt_peft.data.images import LabelledImages

_STATES = {"plain": "plain ViT", "shared": "shared prompt", "group": "with groups", "tuned": "tuned ViT"}


def analyse(
    run: tyro.conf.Positional[Path],
    data: tyro.conf.Positional[str | None] = None,
    /,
    *,
    shift: tuple[str, ...] = (),
    pretraining: Path | None = None,
    output: Path | None = None,
    max_images: int = 10_000,
    max_variant_images: int = 2_000,
    as_json: Json = False,
) -> int:
    """Write analysis.json and pictures of a finished run: features, groups, calibration, confused classes, shifts.

    The test split is analysed, or the validation split if there is no test split. Training images of the run serve as
    neighbours. Images that cannot be read are left out of the counts if the run was trained with --unreadable skip; the
    exit status is then 3.

    Args:
        run: Output folder of `lpt-peft train`, or a prompt file.
        data: Images, as for `lpt-peft train`; a folder of class folders, or a list, is a test split.
        shift: Shifted test sets, NAME=PATH each: a folder of class folders, or a list. Classes are matched by name.
            Noise and blur are always measured.
        pretraining: Images like those of the pretraining, in folders whose names do not matter.
        output: Folder to write into; by default RUN/analysis.
        max_images: Most training and most test images whose features are compared; rare classes are kept.
        max_variant_images: Most test images that are measured with other groups, noise and blur.
        as_json: Print the content of analysis.json instead of tables.
    """
    with requires_extra("lpt-peft analyse", "train"):
        from lpt_peft.cli.common.streams import print_json, print_text

    found = analyse_run(
        run,
        data,
        shifts=_named_paths(shift),
        pretraining=pretraining,
        output=output,
        max_images=max_images,
        max_variant_images=max_variant_images,
    )
    if as_json:
        print_json(found.analysis)
    else:
        _print_tables(found.analysis)
        print_text(f"Written to {found.written[0].parent}/: {', '.join(path.name for path in found.written)}")
    return INCOMPLETE if found.incomplete else OK


class AnalysedRun(NamedTuple):
    """An analysis that was written."""

    analysis: dict[str, Any]
    written: list[Path]
    """analysis.json and pictures."""
    incomplete: bool
    """Whether images could not be read."""


def analyse_run(
    run: Path,
    data: str | None,
    *,
    shifts: Mapping[str, Path],
    pretraining: Path | None = None,
    output: Path | None = None,
    max_images: int,
    max_variant_images: int,
) -> AnalysedRun:
    """Analyse a run and write the files; see `analyse`.

    Raises:
        LPTError: The run or the images are not usable, or a library is missing.
    """
    with requires_extra("lpt-peft analyse", "train"):
        from lpt_peft.cli.common.load_run import available_precision, class_counts_of, load_run
        from lpt_peft.recipe.analyse import ANALYSIS_FOLDER, analyse, write_analysis
        from lpt_peft.recipe.left_out import has_unreadable
        from lpt_peft.recipe.train import make_accelerator
    with requires_extra("lpt-peft analyse", "analysis"):
        import matplotlib  # noqa: F401 - before the passes, not after them

    loaded = load_run(run)
    counts = class_counts_of(loaded, run)
    images, splits = _open(loaded, run, data, shifts, pretraining)
    training = available_precision(loaded.training)
    analysis = analyse(
        loaded.model,
        images,
        class_names=loaded.class_names,
        class_counts=counts,
        shot_rule=loaded.shot_rule,
        settings=training,
        accelerator=make_accelerator(training),
        max_images=max_images,
        max_variant_images=max_variant_images,
    )
    written = write_analysis(analysis, output or (run.parent if run.is_file() else run) / ANALYSIS_FOLDER)
    return AnalysedRun(analysis, written, has_unreadable(splits))


def _named_paths(given: tuple[str, ...]) -> dict[str, Path]:
    """Paths by name, from NAME=PATH."""
    found: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"--shift {text} must be NAME=PATH, such as --shift sketch=data/sketch.")
        if name in found or name in ("noise", "blur"):
            taken = "is the name of a shift that is always measured" if name not in found else "is given twice"
            raise ConfigError(f"--shift {text}: the name {name} {taken}. Choose another.")
        found[name] = Path(path)
    return found


def _open(
    loaded: LoadedRun, run: Path, data: str | None, shifts: Mapping[str, Path], pretraining: Path | None
) -> tuple[Any, dict[str, LabelledImages]]:
    """Images of the analysis, and all splits among them."""
    from lpt_peft.cli.common.open_data import open_foreign, open_test_splits, set_transforms
    from lpt_peft.recipe.analyse import AnalysedImages

    own = _own_splits(loaded, required=data is None, run=run)
    splits = own
    if data is not None:
        splits = open_test_splits(data, loaded.images, loaded.training.seed, loaded.class_names)
    split = next((name for name in ("test", "validation") if name in splits), None)
    if split is None:
        raise InputError(
            f"{data or loaded.data} has neither a test nor a validation split, so there is nothing to analyse. Name "
            "the images: lpt-peft analyse RUN DATA."
        )
    named = {"evaluation": splits[split], "neighbours": own.get("train")}
    validation = splits.get("validation", own.get("validation"))
    named["validation"] = None if split == "validation" else validation
    named |= {f"shift {name}": open_foreign(path, loaded.images) for name, path in shifts.items()}
    named |= {"pretraining": None if pretraining is None else open_foreign(pretraining, loaded.images)}
    found = {name: images for name, images in named.items() if images is not None}
    set_transforms(found, loaded.model.preprocess(), loaded.images)  # no name is "train": no random crops
    images = AnalysedImages(
        evaluation=found["evaluation"],
        split=split,
        source=str(data or loaded.data),
        train=found.get("neighbours"),
        validation=found.get("validation"),
        shifts={name: (str(path), found[f"shift {name}"]) for name, path in shifts.items()},
        pretraining=None if pretraining is None else (str(pretraining), found["pretraining"]),
    )
    return images, found


def _own_splits(loaded: LoadedRun, *, required: bool, run: Path) -> dict[str, LabelledImages]:
    """Splits of the run's own data; none if they are not `required` and cannot be opened."""
    from lpt_peft.cli.common.messages import notice
    from lpt_peft.cli.common.open_data import open_splits

    if loaded.data is None:
        if required:
            raise ConfigError(f"{run} does not name its training data; name the images: lpt-peft analyse RUN DATA.")
        return {}
    try:
        return open_splits(loaded.data, loaded.images, loaded.training.seed)
    except InputError as error:
        if required:
            raise
        notice(f"The training images of the run are left out: {error}")
        return {}


def _print_tables(analysis: Mapping[str, Any]) -> None:
    from lpt_peft.cli.common.streams import print_text
    from lpt_peft.cli.common.tables import print_table

    rows = [
        (
            _STATES[state],
            *(_percent((row.get(name) or {}).get("balanced_accuracy")) for name in ("knn_1", "knn_20")),
            "-" if row["gamma"] is None else f"{row['gamma']:.3f}",
        )
        for state, row in analysis["features"].items()
    ]
    print_table(rows, ("features", "1-NN %", "20-NN %", "gamma"))
    if "pool" in analysis:
        print_text("")
        rows = [(name, _percent(row["balanced_accuracy"])) for name, row in analysis["pool"]["rows"].items()]
        print_table(rows, ("groups", "balanced %"))
    print_text("")
    rows = [
        (row["name"], _percent(row["original"]), _percent(row["shifted"]), f"{row['images']:,}")
        for row in analysis["shift"]
    ]
    print_table(rows, ("shift", "original %", "shifted %", "images"))
    for section, reason in analysis["left_out"].items():
        print_text(f"left out: {section}: {reason}")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
