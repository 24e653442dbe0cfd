"""Sources of prompt files that the operating system cannot open."""

from __future__ import annotations

import pytest

from lpt_peft import LongTailPromptAdapter
from lpt_peft.errors import LPTError
from tests.conftest import tiny_vit


@pytest.mark.parametrize("source", ["a" * 300, "a\0b", "/" + "a" * 300, "loop"])
def test_unusable_sources_are_errors_of_the_library(tmp_path, monkeypatch, source):
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "config.json").symlink_to(tmp_path / "loop" / "config.json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LPTError):
        LongTailPromptAdapter.from_pretrained(source, tiny_vit())
