"""Samplers for long-tailed data: the class-balanced draw, and LPT's pair of an instance- and a class-balanced batch.

They take labels, never a dataset, give indices into them, and serve any `torch.utils.data.DataLoader`.
Not here: loading images (`lpt_peft.data`) and what the two halves of a batch weigh (`lpt_peft.losses.LPTLoss`).

The order of an epoch is one endless row of indices, a pure function of (seed, epoch), of which every rank takes its own
part: together W ranks of batch B draw, step by step, what one process of batch W * B draws. It is made in blocks, each
with its own generator, so resuming is a jump and memory stays small. Global random state is neither read nor changed.
"""

from lpt_peft.samplers.balanced import ClassBalancedSampler
from lpt_peft.samplers.checks import Labels
from lpt_peft.samplers.dual import DualSampler

__all__ = ["ClassBalancedSampler", "DualSampler", "Labels"]
