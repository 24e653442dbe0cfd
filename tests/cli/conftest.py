"""A small data set and a finished run on it, for all tests of the command."""

from __future__ import annotations

import pytest

from lpt_peft.cli import main
from tests.cli.runs import BACKBONE, SMALL, write_images


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with train/, val/ and test/."""
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "train", [20, 8, 3])
    write_images(folder / "val", [4, 4, 0], seed=1)
    write_images(folder / "test", [5, 5, 5], seed=2)
    return folder


@pytest.fixture(scope="session")
def run(data, tmp_path_factory):
    """The output folder of a finished run; not to be changed."""
    output = tmp_path_factory.mktemp("run")
    assert main(["train", str(data), "--output", str(output), *BACKBONE, *SMALL]) == 0
    return output


@pytest.fixture(scope="session")
def pair_run(tmp_path_factory):
    """A finished run with two classes, whose names are not ASCII, on the bundled backbone; without other splits."""
    folder = tmp_path_factory.mktemp("pair")
    write_images(folder / "data", [12, 6], names=["été", "日本"])
    words = ["--backbone", "glyph_vit", *SMALL, "--group.epochs", "0"]
    assert main(["train", str(folder / "data"), "--output", str(folder / "run"), *words]) == 0
    return folder / "run"
