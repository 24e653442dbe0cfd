"""`lpt-peft check` of data without class names, and of a list with gaps."""

from __future__ import annotations

import json

import pytest

from lpt_peft.cli import main
from lpt_peft.cli.common.open_data import open_splits
from lpt_peft.cli.common.run_settings import ImageSettings
from lpt_peft.data import image_list
from lpt_peft.errors import ConfigError, InputError
from tests.cli.runs import NAMES


@pytest.mark.parametrize("name", ["list.txt", "list.csv"])
@pytest.mark.parametrize("first", [0, 1])
def test_lists_of_integers(data, tmp_path, capsys, name, first):
    """Labels that start at 1 are an error in training, and an empty class here."""
    separator = "," if name.endswith("csv") else " "
    files = [f"{name}/{number}.png{separator}{first + label}" for label, name in enumerate(NAMES) for number in (0, 1)]
    (tmp_path / name).write_text("\n".join(files))
    assert main(["check", str(tmp_path / name), "--root", str(data / "train"), "--json"]) == 0
    train = json.loads(capsys.readouterr().out)["splits"]["train"]
    assert (train["images"], train["classes"], train["empty"]) == (6, 3 + first, ["0"] * first)


def test_a_column_of_integers_of_hugging_face(data, tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    files = [str(data / "train" / name / "0.png") for name in NAMES]
    table = datasets.Dataset.from_dict({"image": files, "label": [0, 1, 2]}, features=features)
    table.save_to_disk(tmp_path / "saved")
    assert main(["check", f"hf:{tmp_path / 'saved'},label=label", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["classes"] == 3


def test_an_absurdly_large_label_is_refused(tmp_path):
    (tmp_path / "list.txt").write_text("a.png 0\nb.png 999999999999\n")
    with pytest.raises(InputError, match="the first is label 1"):
        open_splits(str(tmp_path / "list.txt"), ImageSettings(), 0, allow_empty=True)
    (tmp_path / "list.txt").write_text("a.png 0\nb.png 2\n")
    assert image_list(tmp_path / "list.txt", tmp_path, allow_empty="infer").class_counts == [1, 0, 1]
    with pytest.raises(ConfigError, match="allow_empty=True needs class_names"):
        image_list(tmp_path / "list.txt", tmp_path, allow_empty=True)
