"""Rows of `lpt-peft compare`: the file, the built-in names, and errors that name the row."""

from __future__ import annotations

import pytest

from lpt_peft.cli.common.rows import BUILT_IN, default_settings, overridden_flags, read_rows
from lpt_peft.cli.common.run_settings import RunSettings
from lpt_peft.errors import ConfigError
from lpt_peft.recipe.presets import preset
from lpt_peft.recipe.settings import PhaseSettings, TrainSettings

FILE = """
baseline = "probe"

[defaults]
backbone = "glyph_vit"
batch-size = 32
shared.epochs = 20
clip_norm = 5
scale = [0.9, 1]

[rows.probe]
loss = "cross_entropy"
sampling = "instance"
shared.learning-rate = 2
group = { epochs = 3 }

[rows.lpt]
prompt_length = 4
clip_norm = "None"
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path / "rows.toml").write_text(text)
        return str(tmp_path / "rows.toml")

    return write


def test_rows_are_settings_of_train(write):
    rows = read_rows(write(FILE))
    base = default_settings(rows)
    assert base == RunSettings(
        backbone="glyph_vit",
        images=type(base.images)(scale=(0.9, 1)),
        training=TrainSettings(batch_size=32, clip_norm=5, shared=PhaseSettings(epochs=20)),
    )
    settings = rows.settings(base)
    assert list(settings) == ["probe", "lpt"]
    assert rows.baseline == "probe"
    probe, lpt = settings.values()
    assert probe.training == TrainSettings(
        batch_size=32,
        clip_norm=5,
        loss="cross_entropy",
        sampling="instance",
        shared=PhaseSettings(epochs=20, learning_rate=2),
        group=PhaseSettings(epochs=3),
    )
    assert (lpt.prompts.prompt_length, lpt.training.clip_norm) == (4, None)
    assert lpt.training.shared.epochs == 20


def test_a_preset_is_the_start_of_a_row(write):
    text = '[rows.a]\nshared.epochs = 3\npreset = "inat2018"\n'
    run = read_rows(write(text)).settings(RunSettings(backbone="glyph_vit"))["a"]
    published = preset("inat2018")
    assert run.training.group == published.settings.group
    assert run.training.init_keys == "random"
    assert run.training.shared == PhaseSettings(epochs=3, learning_rate=0.02)
    assert (run.training.phases, run.training.optimizer, run.prompts.query) == ("decoupled", "sgd", "final")
    assert run.images.crop_pct == published.crop_pct


def test_built_in_rows_by_name():
    rows = read_rows("vpt_deep, lpt")
    assert list(rows.rows) == ["vpt_deep", "lpt"]
    settings = read_rows(",".join(BUILT_IN)).settings(RunSettings(backbone="glyph_vit"))
    assert settings["lpt"].training == TrainSettings()
    assert {name: run.training.method for name, run in settings.items()} == {
        name: name.removesuffix("_phase1") for name in BUILT_IN
    }


def test_flags_without_effect_on_a_row(write):
    words = ["compare", "x", "--shared.learning-rate", "1", "--clip-norm=2", "--batch-size", "8", "--no-compile"]
    found = list(overridden_flags(read_rows(write(FILE + "compile = true\n")), words))
    assert found == [("probe", "--shared.learning-rate"), ("lpt", "--clip-norm"), ("lpt", "--no-compile")]


WRONG = {
    "[rows.lpt]\nlerning_rate = 1": r"rows.toml: row lpt has no setting 'lerning_rate'. Did you mean",
    "[rows.lpt]\nbatchsize = 1": r"Did you mean batch_size\? The settings are the flags of lpt-peft train",
    "[rows.lpt]\nbatch_size = 3": r"row lpt: TrainSettings: batch_size=3 must be even",
    '[rows.lpt]\nbatch_size = "3"': r"row lpt: TrainSettings: batch_size='3' must be int",
    '[rows.lpt]\nloss = "none"': r"row lpt: TrainSettings: loss='none' must be one of",
    "[rows.lpt]\nshared.epochs = -1": r"row lpt: shared: PhaseSettings: epochs=-1 must be at least 0",
    "[rows.lpt]\nshared.lr = 1": r"row lpt: shared: PhaseSettings has no lr",
    "[rows.lpt]\nshared = 1": r"row lpt: shared: PhaseSettings needs a mapping",
    "[rows.lpt]\ntop_k = 30": r"row lpt: PromptSettings: top_k=30 must be from 1 to pool_size=20",
    "[rows.lpt]\nscale = 1": r"row lpt: ImageSettings: scale=1 must be 2 numbers",
    "[rows.lpt]\nseed = 1": r"row lpt: seed is not a setting of a row; --seed and --seeds",
    "[rows.lpt]\nvalidation_share = 0.1": r"row lpt: validation_share must be the same for all rows.* \[defaults\]",
    '[rows.lpt]\nshot_rule = "oltr"': r"row lpt: shot_rule must be the same for all rows",
    '[rows.lpt]\npreset = "best"': r"row lpt: There is no preset 'best'",
    "[rows.lpt]\npreset = 1": r"row lpt: There is no preset",
    "[defaults]\nbatch_size = 3\n[rows.lpt]": r"rows.toml: \[defaults\]: TrainSettings: batch_size=3",
    "[defaults]\noutput = 3\n[rows.lpt]": r"\[defaults\] has no setting 'output'",
    "defaults = 3\n[rows.lpt]": r"defaults=3 must be a table",
    "[lpt]\nbatch_size = 2": r"unknown key 'lpt': .* A row is a table \[rows.NAME\]",
    "batch_size = 2\n[rows.lpt]": r"unknown key 'batch_size'",
    "": r"needs at least one row",
    "rows = 3": r"needs at least one row",
    "[rows]\nlpt = 3": r"needs at least one row",
    "[rows.'../a']": r"the row name '../a' must be 1 to 64 letters",
    "[rows.'-a']": r"the row name '-a' must be",
    "[rows.'']": r"the row name '' must be",
    "[rows.'table.md']": r"'table.md' is that of a file which the comparison writes: rename the row",
    "[rows.'Results.JSON']": r"'Results.JSON' is that of a file which the comparison writes",
    "[rows.a]\nbatch-size = 8\nbatch_size = 4": r"row a has both batch-size and batch_size, which are the same setting",
    "[rows.a]\neta = inf": r"row a: TrainSettings: eta=inf must be at least 0 and finite",
    "[rows.a]\n[rows.A]": r"must differ in more than case",
    "baseline = 'b'\n[rows.a]": r"baseline='b' must be a row of the file: a",
    "[rows.a]\n[rows.a]": r"rows.toml is not TOML: ",
    "[rows.a": r"rows.toml is not TOML: ",
}


def read_all(file):
    rows = read_rows(file)
    return rows.settings(RunSettings.from_dict({**default_settings(rows).to_dict(), "backbone": "glyph_vit"}))


@pytest.mark.parametrize("text", WRONG)
def test_wrong_files_name_the_row(write, text):
    with pytest.raises(ConfigError, match=WRONG[text]):
        read_all(write(text))


def test_a_row_without_a_backbone_is_refused(write):
    rows = read_rows(write("[rows.a]"))
    with pytest.raises(ConfigError, match="row a: RunSettings: backbone='' must be a name"):
        rows.settings(default_settings(rows))


def test_unreadable_files_and_unknown_names(tmp_path):
    with pytest.raises(ConfigError, match=r"The rows .*none.toml cannot be read: No such file"):
        read_rows(str(tmp_path / "none.toml"))
    (tmp_path / "latin.toml").write_bytes(b"a = '\xe9'")
    with pytest.raises(ConfigError, match=r"latin.toml is not UTF-8: .* at byte 5"):
        read_rows(str(tmp_path / "latin.toml"))
    with pytest.raises(ConfigError, match="no built-in row 'vpt_dep'. Did you mean vpt_deep"):
        read_rows("lpt,vpt_dep")
    with pytest.raises(ConfigError, match="names lpt twice"):
        read_rows("lpt,vpt_deep,lpt")


def test_a_file_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.toml"
    path.write_bytes(b"\xef\xbb\xbf[rows.a]\nbatch_size = 8\n")
    assert read_rows(str(path)).rows == {"a": {"batch_size": 8}}
