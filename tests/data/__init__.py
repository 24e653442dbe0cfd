"""Tests of lpt_peft.data; `tests/data` is a folder of files."""
