"""Tests of lpt_peft.data.files."""
