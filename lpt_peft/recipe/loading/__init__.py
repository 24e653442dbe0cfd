"""Images of a run: batches, DataLoaders and the validation split."""
