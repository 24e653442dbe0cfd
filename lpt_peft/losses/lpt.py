"""LPTLoss: the whole objective of LPT on a dual-sampled batch, in both phases.

Not here: A-GCL itself (`agcl.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from lpt_peft.errors import InputError
from lpt_peft.losses.agcl import AGCLLoss
from lpt_peft.losses.checks import check_batch, check_settings, loss_dtype


class MatchedOutput(Protocol):
    """What `LPTLoss` reads of an adapter's output, of `adapter(images, return_output=True)` for one."""

    @property
    def logits(self) -> Tensor:
        """`(2B, C)`, scale times cosine."""

    @property
    def similarity(self) -> Tensor:
        """`(2B, k)`, cosines of each image's query with the keys chosen for it; `k = 0` in phase "shared"."""


class LPTLoss(nn.Module):
    """The whole objective of LPT on a batch of `DualSampler`, in both phases, arXiv 2210.01033.

        loss = beta_bal * (A-GCL_bal + match_bal) + beta_ins * (A-GCL_ins + match_ins)
        match = match_weight * (1 - mean_k similarity),   beta_bal = 1,   beta_ins = eta * (epochs - epoch) / epochs

    Rows 0 to `B - 1` are the instance-balanced branch, rows `B` to `2B - 1` the class-balanced one; each term is a
    mean over its own `B` rows. The match term pulls the chosen keys to the queries; in phase "shared" it is 0.
    The branches' A-GCL are the modules `loss.balanced` and `loss.instance`, so noise is drawn in `train()` only.

    Args:
        class_counts: `(C,)` whole numbers, 1 or more: training images of each class.
        epochs: Epochs of the phase, greater than 0.
        eta: Weight of the instance-balanced branch at the start, from where it falls linearly to 0.
        match_weight: Weight of the match term against A-GCL.
        gamma_pos, gamma_neg: Exponents of the class-balanced branch, see `agcl_loss`.
        instance_gamma_pos, instance_gamma_neg: Exponents of the instance-balanced branch.
        scale, margin, noise_scale, label_smoothing, normalize: See `agcl_loss`. `scale` is the adapter's `logit_scale`.

    Raises:
        InputError: A class count is not a whole number of at least 1; the message names the class.
        ConfigError: A setting is out of its range.

    Example:
        >>> from types import SimpleNamespace
        >>> output = SimpleNamespace(logits=20 * torch.eye(4), similarity=torch.full((4, 2), 0.25))
        >>> criterion = LPTLoss(class_counts=[90, 30, 10, 3], epochs=40).eval()
        >>> criterion(output, torch.arange(4), epoch=20)  # (1 - 0.25) + 0.25 * (1 - 0.25), and hardly any A-GCL
        tensor(0.9375)
    """

    def __init__(
        self,
        class_counts: Sequence[int] | Tensor,
        epochs: float,
        *,
        eta: float = 0.5,
        match_weight: float = 1.0,
        gamma_pos: float = 0.0,
        gamma_neg: float = 4.0,
        instance_gamma_pos: float = 0.5,
        instance_gamma_neg: float = 8.0,
        scale: float = 20.0,
        margin: float = 0.1,
        noise_scale: float = 0.5,
        label_smoothing: float = 0.1,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        check_settings(epochs=epochs, eta=eta, match_weight=match_weight)
        self.epochs = epochs
        self.eta = eta
        self.match_weight = match_weight
        agcl = partial(
            AGCLLoss, class_counts, scale=scale, margin=margin, noise_scale=noise_scale, label_smoothing=label_smoothing
        )
        self.balanced = agcl(gamma_pos=gamma_pos, gamma_neg=gamma_neg, normalize=normalize)
        self.instance = agcl(gamma_pos=instance_gamma_pos, gamma_neg=instance_gamma_neg, normalize=normalize)

    def forward(self, output: MatchedOutput, target: Tensor, epoch: float, noise: Tensor | None = None) -> Tensor:
        """The scalar loss, sum of `terms`; same arguments and errors."""
        return torch.stack(list(self.terms(output, target, epoch, noise).values())).sum()

    def terms(
        self, output: MatchedOutput, target: Tensor, epoch: float, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The four scalars that add up to the loss, each with its weights in it.

        Args:
            output: Has `logits (2B, C)` and `similarity (2B, k)`, instance-balanced half first.
            target: `(2B,)` integer labels.
            epoch: Epochs done, from 0 to `epochs`; a fraction counts.
            noise: `(2B, C)`, replaces the draw; see `agcl_loss`.

        Returns:
            "balanced_agcl", "balanced_match", "instance_agcl" and "instance_match".

        Raises:
            InputError: The rows are odd or do not agree, the epoch is out of range, or `agcl_loss` refuses the batch.
        """
        if isinstance(output, Tensor):
            raise InputError(
                "output is a tensor, but LPTLoss reads logits and similarity: adapter(x, return_output=True)."
            )
        logits, similarity = output.logits, output.similarity
        rows = logits.shape[0]
        check_batch(logits, target, noise, num_classes=len(self.balanced.class_counts))
        if similarity.ndim != 2 or similarity.shape[0] != rows:
            raise InputError(f"output.similarity must have shape ({rows}, k), not {tuple(similarity.shape)}.")
        if rows % 2:
            raise InputError(f"A batch of {rows} rows has no two equal halves: draw it by DualSampler.")
        beta = self.instance_weight(epoch)

        instance, balanced = slice(rows // 2), slice(rows // 2, rows)
        instance_noise, balanced_noise = (None, None) if noise is None else (noise[instance], noise[balanced])
        dtype = loss_dtype(similarity)
        if similarity.shape[1] > 0:
            match = self.match_weight * (1 - similarity.to(dtype).mean(dim=1))
        else:  # phase "shared": nothing is matched
            match = torch.zeros_like(target, dtype=dtype)
        return {
            "balanced_agcl": self.balanced(logits[balanced], target[balanced], balanced_noise),
            "balanced_match": match[balanced].mean(),
            "instance_agcl": beta * self.instance(logits[instance], target[instance], instance_noise),
            "instance_match": beta * match[instance].mean(),
        }

    def instance_weight(self, epoch: float) -> float:
        """Weight `beta` of the instance-balanced branch at `epoch`; InputError outside 0 to `epochs`."""
        if not 0 <= epoch <= self.epochs:
            raise InputError(f"epoch={epoch} must be from 0 to epochs={self.epochs}: count from 0 in every phase.")
        return self.eta * (self.epochs - epoch) / self.epochs
