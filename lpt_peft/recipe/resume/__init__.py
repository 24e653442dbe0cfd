"""Checkpoints of a run and interruption."""
