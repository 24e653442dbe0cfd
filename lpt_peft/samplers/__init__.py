"""Class-balanced and dual samplers.

The samplers take labels (never a dataset), yield indices into them and work with any `torch.utils.data.DataLoader`.

The order of an epoch is an infinite sequence of indices that depends only on (seed, epoch). Each rank takes its share:
in every step, W ranks with batch size B together draw the indices that a single process with batch size W * B draws.
The sequence is generated in blocks, each with a separate generator, so resuming does not replay earlier draws and
memory use stays small. Global random state is neither read nor changed.
"""

from lpt_peft.samplers.checks import Labels
from lpt_peft.samplers.class_balanced import ClassBalancedSampler
from lpt_peft.samplers.dual import DualSampler

__all__ = ["ClassBalancedSampler", "DualSampler", "Labels"]
