"""Rows of `lpt-peft compare`: named settings of runs, from a TOML file or built in.

    baseline = "linear_probe"     # optional: paired differences to this row

    [defaults]                    # optional: settings of every row, named as the flags of lpt-peft train
    backbone = "glyph_vit"
    shared.epochs = 20

    [rows.lpt]
    group = { pool_learning_rate = 0.2 }

A row overrides the flags of the command, which override [defaults]. Not here: the runs (`lpt_peft.recipe.compare`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lpt_peft.cli.common.flags import unused_sizes
from lpt_peft.cli.common.messages import without_errno
from lpt_peft.cli.common.paths import home_path
from lpt_peft.cli.common.run_settings import ImageSettings, PromptSettings, RunSettings
from lpt_peft.errors import ConfigError, MissingExtraError
from lpt_peft.recipe.presets import preset
from lpt_peft.recipe.settings import PhaseSettings, TrainSettings
from lpt_peft.recipe.settings_checks import known

_PLAIN: Mapping[str, Any] = {"sampling": "instance", "loss": "cross_entropy"}
BUILT_IN: Mapping[str, Mapping[str, Any]] = {
    "linear_probe": {"method": "linear_probe", **_PLAIN},
    "full": {"method": "full", **_PLAIN},
    "vpt_shallow": {"method": "vpt_shallow", **_PLAIN},
    "vpt_deep": {"method": "vpt_deep", **_PLAIN},
    "lpt_phase1": {"phases": "shared"},
    "lpt": {},
}
"""Rows that --rows accepts by name."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
_GROUPS: Mapping[str, type] = {"prompts": PromptSettings, "images": ImageSettings, "training": TrainSettings}
_PLACES = {name.name: group for group, kind in _GROUPS.items() for name in fields(kind)}
_PLACES |= {name.name: "" for name in fields(RunSettings) if name.name not in _GROUPS}
_PHASES = ("shared", "group")
_TAKEN = ("results.json", "table.md", "compare.png")
"""Files that a comparison writes beside the folders of its rows."""
_COMMON = ("root", "val", "test", "validation_share", "unreadable", "shot_rule")
"""Settings that all rows share: which images a split has, and how they are counted."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows as given: nested settings, not yet validated."""

    source: str
    """Name of the file, or of the built-in rows, in messages."""
    rows: Mapping[str, Mapping[str, Any]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    baseline: str | None = None

    def settings(self, base: RunSettings) -> dict[str, RunSettings]:
        """Return the settings of every row, validated.

        Args:
            base: Settings of every row, which a row overrides.

        Raises:
            ConfigError: A setting is unknown or out of range; the message names the row.
        """
        return {name: self._row(name, values, base) for name, values in self.rows.items()}

    def _row(self, name: str, values: Mapping[str, Any], base: RunSettings) -> RunSettings:
        place = f"{self.source}: row {name}"
        nested = _nested(values, place)
        keys = [*nested, *nested.get("images", {})]
        if common := [key for key in keys if key in _COMMON]:
            raise ConfigError(
                f"{place}: {common[0]} must be the same for all rows, which are compared on the same images: move it "
                f"to [defaults], or give --{common[0].replace('_', '-')}."
            )
        return _run_settings(_merged(base.to_dict(), nested), place, complete=True)


def read_rows(text: str) -> Rows:
    """Read the rows of --rows: a TOML file, or names of built-in rows, separated by commas.

    Raises:
        ConfigError: The file cannot be read or breaks a rule, or a name is unknown.
        MissingExtraError: Python 3.10 without tomli.
    """
    if text.endswith(".toml"):
        return _from_file(home_path(text))
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in BUILT_IN:
            near = get_close_matches(name, BUILT_IN, 1)
            meant = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"There is no built-in row {name!r}.{meant} Give names of {', '.join(BUILT_IN)}, separated by commas, "
                "or a file of rows whose name ends in .toml."
            )
    if repeated := [name for name in BUILT_IN if names.count(name) > 1]:
        raise ConfigError(f"--rows {text} names {repeated[0]} twice: give each row once.")
    return Rows(source="--rows", rows={name: BUILT_IN[name] for name in names})


def default_settings(rows: Rows) -> RunSettings:
    """Return the [defaults] of the rows; without a backbone, its name is empty.

    Raises:
        ConfigError: A setting is unknown or out of range.
    """
    place = f"{rows.source}: [defaults]"
    return _run_settings(_merged({"backbone": ""}, _nested(rows.defaults, place)), place, complete=False)


def overridden_flags(rows: Rows, words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of a row and a flag of the command that does not change it, because the row has the setting itself."""
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    names = {flag: flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in flags}
    for row, values in rows.rows.items():
        own = {key for key, value in _flat(values) if not isinstance(value, dict)}
        yield from ((row, flag) for flag, name in names.items() if name in own)


def sizes_without_effect(rows: Rows, settings: Mapping[str, RunSettings]) -> Iterator[tuple[str, str]]:
    """Pairs of a row and a size of prompts that its method does not use, unless it is set for other rows.

    Args:
        rows: As given.
        settings: Of every row.
    """
    unused = {row: unused_sizes(run.prompts, run.training.method) for row, run in settings.items()}
    for row, values in rows.rows.items():
        own = {key for key, _ in _flat(values)}
        yield from ((row, name) for name in unused[row] if name in own or all(name in u for u in unused.values()))


def _from_file(path: Path) -> Rows:
    try:
        content = _parse(path.read_bytes().decode("utf-8-sig"), str(path))
    except OSError as error:
        raise ConfigError(f"The rows {path} cannot be read: {without_errno(str(error))}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error.reason} at byte {error.start}. Save it as UTF-8.") from error
    known_keys = ("baseline", "defaults", "rows")
    if unknown := sorted(set(content) - set(known_keys)):
        raise ConfigError(
            f"{path} has the unknown key {unknown[0]!r:.80}: the keys are {', '.join(known_keys)}. A row is a table "
            "[rows.NAME], and settings of all rows belong into [defaults]."
        )
    rows, defaults, baseline = content.get("rows", {}), content.get("defaults", {}), content.get("baseline")
    if not isinstance(rows, dict) or not rows or not all(isinstance(row, dict) for row in rows.values()):
        raise ConfigError(f"{path} needs at least one row, a table [rows.NAME] with settings of lpt-peft train.")
    if wrong := [name for name in rows if not _NAME.fullmatch(name)]:
        raise ConfigError(
            f"{path}: the row name {wrong[0]!r:.100} must be 1 to 64 letters, digits, '.', '_' or '-', beginning with "
            "a letter or a digit: it is the name of a folder."
        )
    if taken := [name for name in rows if name.casefold() in _TAKEN]:
        raise ConfigError(
            f"{path}: the row name {taken[0]!r} is that of a file which the comparison writes: rename the row."
        )
    if len({name.casefold() for name in rows}) < len(rows):
        raise ConfigError(f"{path}: names of rows must differ in more than case, as they are names of folders.")
    if not isinstance(defaults, dict):
        raise ConfigError(f"{path}: defaults={defaults!r:.80} must be a table [defaults].")
    if baseline is not None and baseline not in rows:
        raise ConfigError(f"{path}: baseline={baseline!r:.80} must be a row of the file: {', '.join(rows)}.")
    return Rows(source=str(path), rows=rows, defaults=defaults, baseline=baseline)


def _parse(text: str, source: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ModuleNotFoundError as error:
            raise MissingExtraError(f'{source} needs tomli: pip install "lpt_peft[cli]".') from error
    try:
        content: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not TOML: {without_errno(str(error))}.") from error
    return content


def _nested(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Arrange settings that are named as flags in the groups of `settings.json`."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name != key and name in values:
            raise ConfigError(f"{place} has both {key} and {name}, which are the same setting: remove one of them.")
        if name == "preset":
            nested = _merged(_preset(value, place), nested)
            continue
        if name == "seed":
            raise ConfigError(f"{place}: seed is not a setting of a row; --seed and --seeds choose the seeds.")
        if name not in _PLACES:
            near = get_close_matches(name, [*_PLACES, "preset"], 1) or get_close_matches(name, _phase_fields(), 1)
            meant = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"{place} has no setting {key!r:.80}.{meant} The settings are the flags of lpt-peft train."
            )
        converted = _without_dashes(value) if name in _PHASES else _none(value)
        group = nested.setdefault(_PLACES[name], {}) if _PLACES[name] else nested
        group[name] = _merged(group.get(name, {}), converted) if isinstance(converted, dict) else converted
    return nested


def _preset(name: Any, place: str) -> dict[str, Any]:
    try:
        found = preset(name if isinstance(name, str) else repr(name))
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
    training = found.settings.to_dict()
    del training["seed"]
    return {"training": training, "prompts": {"query": found.query}, "images": {"crop_pct": found.crop_pct}}


def _phase_fields() -> list[str]:
    return [f"{phase}.{name.name}" for phase in _PHASES for name in fields(PhaseSettings)]


def _without_dashes(value: Any) -> Any:
    return {key.replace("-", "_"): _none(item) for key, item in value.items()} if isinstance(value, dict) else value


def _none(value: Any) -> Any:
    return None if value == "None" else value  # TOML has no null


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        inner = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if inner else value
    return merged


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key.replace('-', '_')}"
        yield name, value
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")


def _run_settings(values: Mapping[str, Any], place: str, *, complete: bool) -> RunSettings:
    try:
        for phase in _PHASES:
            given = values.get("training", {}).get(phase, {})
            try:
                PhaseSettings(**known(PhaseSettings, given))
            except ConfigError as error:
                raise ConfigError(f"{phase}: {error}") from error
        run = RunSettings.from_dict(values)
        # Of [defaults] alone, the backbone may still be missing.
        (run if run.backbone or complete else replace(run, backbone="glyph_vit")).check()
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
    return run
