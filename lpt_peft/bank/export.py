"""A bank as a module for torch.export, with a fixed choice of tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpt_peft.backbones.base import Backbone
from lpt_peft.bank.forward import bank_forward, mode_of
from lpt_peft.bank.heads import cosines_with
from lpt_peft.bank.registry import Leased
from lpt_peft.bank.tables import Tables


class BankModule(nn.Module):
    """Tasks of a bank, in which an integer selects the task of an image.

    Prompts, keys and class vectors are buffers: a copy that later changes of the bank do not reach. The ViT is that of
    the bank. Classifiers of all tasks run on every image, which costs `B * T * C * feature_dim` products and no copy.

    Args:
        backbone: The wrapped ViT.
        leased: The tasks, a row for each.
    """

    shared: Tensor
    groups: Tensor
    keys: Tensor
    numbers: Tensor
    head: Tensor
    head_norms: Tensor
    scale: Tensor
    num_classes: Tensor

    def __init__(self, backbone: Backbone, leased: Leased) -> None:
        super().__init__()
        self.vit = backbone.model
        self._backbone = backbone
        self._mode = mode_of(leased.numbers, None)
        for name, table in leased.tables._asdict().items():
            self.register_buffer(name, table[leased.slots])
        heads = [leased.heads[slot] for slot in leased.slots]
        classes = [len(head.weight) for head in heads]
        width = max(classes)
        self.register_buffer("head", torch.stack([F.pad(h.weight, (0, 0, 0, width - len(h.weight))) for h in heads]))
        norms = [F.pad(head.norms, (0, width - len(head.norms)), value=1.0) for head in heads]
        self.register_buffer("head_norms", torch.stack(norms))
        self.register_buffer("scale", norms[0].new_tensor([head.scale for head in heads]))
        self.register_buffer("num_classes", torch.tensor(classes, device=self.numbers.device))

    def forward(self, images: Tensor, task: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Answer a batch.

        Args:
            images: (B, 3, H, W) in the dtype of the ViT, or what its forward takes.
            task: (B,) int64, indices of the tasks that the module was created with.

        Returns:
            Logits (B, C) with -inf beyond the classes of an image's task, features (B, feature_dim), and groups (B, k)
            int64, valid up to the `top_k` of an image's task.
        """
        tables = Tables(self.shared, self.groups, self.keys, self.numbers)
        features, groups = bank_forward(self._backbone, tables, self._mode, images, task)
        cosines = cosines_with(features, self.head.flatten(0, 1), self.head_norms.flatten())
        cosines = cosines.unflatten(1, self.head.shape[:2])
        cosines = cosines.gather(1, task[:, None, None].expand(-1, 1, cosines.shape[2])).squeeze(1)
        logits = self.scale[task, None].to(cosines.dtype) * cosines
        padding = torch.arange(logits.shape[1], device=task.device) >= self.num_classes[task, None]
        return logits.masked_fill(padding, -torch.inf), features, groups

    if TYPE_CHECKING:  # torch's own __call__ returns Any
        __call__ = forward
