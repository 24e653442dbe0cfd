"""Tests of lpt_peft.data.inspection."""
