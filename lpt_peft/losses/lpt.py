"""LPTLoss: the whole objective of LPT on a dual-sampled batch, in both phases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from lpt_peft.errors import InputError
from lpt_peft.losses.checks import check_batch, loss_dtype
from lpt_peft.losses.counted import CountedLoss
from lpt_peft.losses.rows import Branches, agcl_rows


class MatchedOutput(Protocol):
    """What `LPTLoss` reads of an adapter's output, for example of `adapter(images, return_output=True)`."""

    @property
    def logits(self) -> Tensor:
        """`(2B, C)`, scale times cosine."""

    @property
    def similarity(self) -> Tensor:
        """`(2B, k)`, cosines of each image's query with the keys chosen for it; `k = 0` in phase "shared"."""


class LPTLoss(CountedLoss):
    """The whole objective of LPT on a batch of `DualSampler`, in both phases, arXiv 2210.01033.

        loss = beta_bal * (A-GCL_bal + match_bal) + beta_ins * (A-GCL_ins + match_ins)
        match = match_weight * (1 - mean_k similarity),   beta_bal = 1,   beta_ins = eta * (epochs - epoch) / epochs

    Rows 0 to `B - 1` are the instance-balanced branch, rows `B` to `2B - 1` the class-balanced one; each term is a
    mean over its own `B` rows. The match term pulls the chosen keys to the queries; in phase "shared" it is 0.
    Noise is drawn in `train()` only, as by `AGCLLoss`. Every setting is an attribute that may be assigned later.

    The epoch is 0 at first and changes by `set_epoch` alone; `print(criterion)` shows it. It is not in the state dict:
    a resumed loop calls `set_epoch` before its first step, as it does for the sampler.

    Args:
        class_counts: `(C,)` integers, 1 or more: training images of each class.
        epochs: Epochs of the phase, greater than 0.
        eta: Weight of the instance-balanced branch at the start, from where it falls linearly to 0.
        match_weight: Weight of the match term against A-GCL.
        gamma_pos: Exponent of the target's weight in the class-balanced branch, see `agcl_loss`.
        gamma_neg: Exponent of the other classes' weights in the class-balanced branch.
        instance_gamma_pos: Exponent of the target's weight in the instance-balanced branch.
        instance_gamma_neg: Exponent of the other classes' weights in the instance-balanced branch.
        scale: The adapter's `logit_scale`; see `agcl_loss`, as for the settings below.
        margin: How much larger the target's cosine must be.
        noise_scale: The most that noise takes from a cosine.
        label_smoothing: Fraction of the target distribution that is uniform.
        normalize: Divide delta by its largest value.

    Raises:
        InputError: A class count is not an integer of at least 1; the message names the class.
        ConfigError: A setting is out of its range.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> output = SimpleNamespace(logits=20 * torch.eye(4), similarity=torch.full((4, 2), 0.25))
        >>> criterion = LPTLoss(class_counts=[90, 30, 10, 3], epochs=40).eval()
        >>> criterion.set_epoch(20)
        >>> criterion(output, torch.arange(4))  # (1 - 0.25) + 0.25 * (1 - 0.25), and hardly any A-GCL
        tensor(0.9375)
    """

    _beta: Tensor  # the weight at the set epoch, for torch.compile, which takes a module's numbers as constants
    _SETTINGS: ClassVar[tuple[str, ...]] = (
        "epochs",
        "eta",
        "match_weight",
        "gamma_pos",
        "gamma_neg",
        "instance_gamma_pos",
        "instance_gamma_neg",
        "scale",
        "margin",
        "noise_scale",
        "label_smoothing",
        "normalize",
    )

    _DERIVED_FROM: ClassVar[tuple[str, ...]] = ("normalize", "epochs", "eta")

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
        super().__init__(class_counts, normalize)
        self.epochs = epochs
        self.eta = eta
        self.match_weight = match_weight
        self.gamma_pos = gamma_pos
        self.gamma_neg = gamma_neg
        self.instance_gamma_pos = instance_gamma_pos
        self.instance_gamma_neg = instance_gamma_neg
        self.scale = scale
        self.margin = margin
        self.noise_scale = noise_scale
        self.label_smoothing = label_smoothing
        self._epoch: float = 0
        self.register_buffer("_beta", None, persistent=False)
        self._derive()

    @property
    def epoch(self) -> float:
        """Epochs done, as `set_epoch` was last called; 0 before."""
        return self._epoch

    def set_epoch(self, epoch: float) -> None:
        """Choose the epoch, which sets the weight of the instance-balanced branch; call it before each epoch.

        Args:
            epoch: Epochs done in this phase, from 0 to `epochs`; a fraction counts.

        Raises:
            InputError: `epoch` is out of its range.
        """
        beta = self.instance_weight(epoch)
        self._epoch = epoch
        self._beta.fill_(beta)

    def _derive(self) -> None:
        super()._derive()
        if "_beta" in self._buffers:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside of it
                self._beta = self._delta.new_tensor(self.instance_weight(self._epoch))

    if TYPE_CHECKING:  # nn.Module's own __call__ returns Any

        def __call__(
            self, output: MatchedOutput, target: Tensor, epoch: float | None = None, noise: Tensor | None = None
        ) -> Tensor:
            """As `forward`."""

    def forward(
        self, output: MatchedOutput, target: Tensor, epoch: float | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """The scalar loss, sum of `terms`; same arguments and errors."""
        agcl, match, beta = self._branch_means(output, target, epoch, noise)
        instance, balanced = (agcl if match is None else agcl + match).unbind()
        return beta * instance + balanced

    def terms(
        self, output: MatchedOutput, target: Tensor, epoch: float | None = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The four scalars that add up to the loss, each with its weights in it; computed as `forward` does.

        Args:
            output: Has `logits (2B, C)` and `similarity (2B, k)`, instance-balanced half first.
            target: `(2B,)` integer labels.
            epoch: Epochs done, from 0 to `epochs`, for this call; None takes that of `set_epoch`.
            noise: `(2B, C)`, replaces the draw; see `agcl_loss`.

        Returns:
            "balanced_agcl", "balanced_match", "instance_agcl" and "instance_match".

        Raises:
            InputError: The number of rows is odd, shapes disagree, the epoch is out of range, or `agcl_loss` refuses
                the batch.
        """
        agcl, match, beta = self._branch_means(output, target, epoch, noise)
        match = torch.zeros_like(agcl) if match is None else match
        return {
            "balanced_agcl": agcl[1],
            "balanced_match": match[1],
            "instance_agcl": beta * agcl[0],
            "instance_match": beta * match[0],
        }

    def _branch_means(
        self, output: MatchedOutput, target: Tensor, epoch: float | None, noise: Tensor | None
    ) -> tuple[Tensor, Tensor | None, float | Tensor]:
        """`(2,)` means of A-GCL and of the match term, instance-balanced first, and beta; no match term if k = 0."""
        logits, similarity = getattr(output, "logits", None), getattr(output, "similarity", None)
        if not isinstance(logits, Tensor) or not isinstance(similarity, Tensor):
            raise InputError(
                f"output is a {type(output).__name__} without the tensors logits and similarity that LPTLoss reads: "
                "give it adapter(x, return_output=True)."
            )
        rows = logits.shape[0]
        check_batch(logits, target, noise, num_classes=len(self.class_counts))
        if similarity.ndim != 2 or similarity.shape[0] != rows:
            raise InputError(f"output.similarity must have shape ({rows}, k), not {tuple(similarity.shape)}.")
        if rows % 2:
            raise InputError(f"A batch of {rows} rows has no two equal halves: draw it with DualSampler.")
        if epoch is None and torch.compiler.is_compiling():
            beta: float | Tensor = self._beta
        else:
            beta = self.instance_weight(self._epoch if epoch is None else epoch)

        branches = Branches(
            (self.instance_gamma_pos, self.gamma_pos),
            (self.instance_gamma_neg, self.gamma_neg),
            self.scale,
            self.margin,
            self.noise_scale,
            self.label_smoothing,
            self._delta_in(loss_dtype(logits)),
        )
        losses = agcl_rows(logits, target.long(), self._noise_or(noise), branches)
        agcl = losses.view(2, -1).mean(1)
        if similarity.shape[1] == 0:  # phase "shared": nothing is matched
            return agcl, None, beta
        cosines = similarity.reshape(2, -1).mean(1, dtype=loss_dtype(similarity))
        return agcl, self.match_weight * (1 - cosines), beta

    def instance_weight(self, epoch: float) -> float:
        """Weight `beta` of the instance-balanced branch at `epoch`; InputError outside 0 to `epochs`."""
        if not 0 <= epoch <= self.epochs:
            raise InputError(f"epoch={epoch} must be from 0 to epochs={self.epochs}: count from 0 in every phase.")
        return self.eta * (self.epochs - epoch) / self.epochs

    def extra_repr(self) -> str:
        """Epoch, number of classes and settings, for `print(loss)`."""
        return f"epoch={self.epoch}, {super().extra_repr()}"
