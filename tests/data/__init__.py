"""Tests of lpt_peft.data, and small files that they read."""
