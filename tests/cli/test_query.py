"""--query and --query-regularizer of lpt-peft train."""

from __future__ import annotations

import json

import pytest

from lpt_peft.checkpoint import read_prompt_file
from lpt_peft.cli import main
from tests.cli.runs import BACKBONE, SMALL
from tests.test_routing import TRAINING, trained_adapter


def test_a_run_in_a_single_pass(data, tmp_path, capsys):
    words = ["train", str(data), "--output", str(tmp_path), *BACKBONE, *SMALL, "--shared.epochs", "1"]
    words += ["--group.epochs", "1", "--query", "block_k", "--query-regularizer", "1e-4"]
    assert main(words) == 0
    assert "Groups: selected by query block_k, in a single pass" in capsys.readouterr().err
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["prompts"]["query"] == "block_k"
    assert settings["training"]["query_regularizer"] == 1e-4
    assert read_prompt_file(tmp_path / "prompts").config.query == "block_k"
    assert main(["inspect", str(tmp_path)]) == 0
    assert "query block_k" in capsys.readouterr().out
    assert main([*words[:-4], "--query", "final"]) == 1
    assert "prompts.query is 'final' now and was 'block_k'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shared-layers", "0"], '--shared-layers 0 must be at least 1, or 0 with query="final"'),
        (["--query", "final", "--shared-layers", "-1"], "--shared-layers -1 must be at least 1, or 0 with --query"),
        (["--query", "final", "--query-regularizer", "0.1"], 'must be 0, or used with --query "block_k"'),
        (["--query", "last"], "invalid choice"),
    ],
)
def test_refused_flags(tmp_path, capsys, flags, message):
    words = ["train", str(tmp_path / "no data"), "--output", str(tmp_path / "run"), "--backbone", "no model"]
    try:
        status = main([*words, *flags])
    except SystemExit as stopped:  # of the parser
        status = stopped.code
    assert status
    streams = capsys.readouterr()
    assert message in streams.err + streams.out


def test_inspect_describes_a_router(tmp_path, capsys):
    adapter = trained_adapter()
    adapter.fit_router(TRAINING, features="random", width=8, blocks=2, progress=False)
    adapter.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "router          tokens of the 2 block boundaries up to K and 8 random features of them" in text
    assert "router.weight" in text
