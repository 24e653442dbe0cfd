"""Batches, worker processes and the validation split of a run."""
