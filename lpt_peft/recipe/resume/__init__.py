"""Checkpoints of a run, and saving on Ctrl-C."""
