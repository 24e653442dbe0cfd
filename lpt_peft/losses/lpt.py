"""Training objective of LPT for dual-sampled batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from lpt_peft._numbers import is_finite_number
from lpt_peft.errors import InputError
from lpt_peft.losses.agcl_definition import Branches
from lpt_peft.losses.agcl_rows import agcl_rows
from lpt_peft.losses.base import ClassCountsLoss
from lpt_peft.losses.checks import check_batch, loss_dtype


class MatchedOutput(Protocol):
    """Attributes that `LPTLoss` reads from a model output, such as `adapter(images, return_output=True)`."""

    @property
    def logits(self) -> Tensor:
        """Logits `(2B, C)`: scale times cosine."""

    @property
    def similarity(self) -> Tensor:
        """Cosines `(2B, k)` of each query with its selected keys; `k = 0` in phase "shared"."""


class LPTLoss(ClassCountsLoss):
    """Training objective of LPT for batches of `DualSampler`, in both phases, arXiv 2210.01033.

        loss = beta_bal * (A-GCL_bal + match_bal) + beta_ins * (A-GCL_ins + match_ins)
        match = match_weight * (1 - mean_k similarity),   beta_bal = 1,   beta_ins = eta * (epochs - epoch) / epochs

    Rows 0 to `B - 1` are the instance-balanced branch, rows `B` to `2B - 1` the class-balanced branch; each term is a
    mean over its `B` rows. The match term pulls the selected keys toward the queries; in phase "shared" it is 0.
    Noise is drawn in `train()` mode only, as in `AGCLLoss`. Every setting is an attribute that can be assigned later.

    The epoch starts at 0 and only `set_epoch` changes it; `print(criterion)` shows it. It is not in the state dict:
    after resuming, call `set_epoch` before the first step, as for the sampler.

    Args:
        class_counts: `(C,)` integers of at least 1: training images of each class; or a mapping from label to count.
        epochs: Number of epochs in the phase, greater than 0.
        eta: Initial weight of the instance-balanced branch; it decreases linearly to 0.
        match_weight: Weight of the match term relative to A-GCL.
        gamma_pos: Exponent of the target's weight in the class-balanced branch, see `agcl_loss`.
        gamma_neg: Exponent of the other classes' weights in the class-balanced branch.
        instance_gamma_pos: Exponent of the target's weight in the instance-balanced branch.
        instance_gamma_neg: Exponent of the other classes' weights in the instance-balanced branch.
        scale: The adapter's `logit_scale`. See `agcl_loss` for this and all settings below.
        margin: Amount by which the target's cosine must exceed the others.
        noise_scale: Largest amount that the noise subtracts from a cosine.
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
        >>> criterion(output, torch.arange(4))  # (1 - 0.25) + 0.25 * (1 - 0.25); A-GCL is close to 0
        tensor(0.9375)
    """

    _beta: Tensor  # weight at the current epoch; a buffer because torch.compile treats float attributes as constants
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
        class_counts: Sequence[int] | Mapping[int, int] | Tensor,
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
        self._update_buffers()

    @property
    def epoch(self) -> float:
        """Number of completed epochs, as set by `set_epoch`; initially 0."""
        return self._epoch

    def set_epoch(self, epoch: float) -> None:
        """Set the epoch, which determines the weight of the instance-balanced branch. Call it before each epoch.

        Args:
            epoch: Number of completed epochs in this phase, from 0 to `epochs`; can be fractional.

        Raises:
            InputError: `epoch` is out of its range.
        """
        beta = self.instance_weight(epoch)
        self._epoch = epoch
        self._beta.fill_(beta)

    def _update_buffers(self) -> None:
        super()._update_buffers()
        if "_beta" in self._buffers:
            with torch.inference_mode(False):  # an inference tensor could not be updated outside
                self._beta = self._class_values.new_tensor(self.instance_weight(self._epoch))

    if TYPE_CHECKING:  # nn.Module's own __call__ returns Any

        def __call__(
            self, output: MatchedOutput, target: Tensor, epoch: float | None = None, noise: Tensor | None = None
        ) -> Tensor:
            """See `forward`."""

    def forward(
        self, output: MatchedOutput, target: Tensor, epoch: float | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Compute the scalar loss, the sum of `terms`, which has the same arguments and errors."""
        agcl, match, beta = self._branch_means(output, target, epoch, noise)
        instance, balanced = (agcl if match is None else agcl + match).unbind()
        return beta * instance + balanced

    def terms(
        self, output: MatchedOutput, target: Tensor, epoch: float | None = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute the four scalars that add up to the loss, including their weights.

        Args:
            output: Object with `logits (2B, C)` and `similarity (2B, k)`, instance-balanced half first.
            target: `(2B,)` integer labels or `(2B, C)` probabilities, see `agcl_loss`.
            epoch: Number of completed epochs for this call, from 0 to `epochs`; None uses the value of `set_epoch`.
            noise: `(2B, C)`, replaces the draw; see `agcl_loss`.

        Returns:
            "balanced_agcl", "balanced_match", "instance_agcl" and "instance_match".

        Raises:
            InputError: The number of rows is odd, shapes disagree, the epoch is out of range, or the batch is invalid
                for `agcl_loss`.
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
        """Means `(2,)` of A-GCL and of the match term (None if k = 0), instance-balanced first, and beta."""
        logits, similarity = getattr(output, "logits", None), getattr(output, "similarity", None)
        if not isinstance(logits, Tensor) or not isinstance(similarity, Tensor):
            raise InputError(
                f"output is a {type(output).__name__} without the tensors logits and similarity that LPTLoss reads: "
                "pass adapter(images, return_output=True)."
            )
        rows = logits.shape[0]
        check_batch(logits, target, noise, self.class_counts)
        if similarity.ndim != 2 or similarity.shape[0] != rows:
            raise InputError(f"output.similarity must have shape ({rows}, k), not {tuple(similarity.shape)}.")
        if rows % 2:
            raise InputError(f"A batch of {rows} rows cannot be split into two equal halves: draw it with DualSampler.")
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
            self._class_values_in(loss_dtype(logits)),
        )
        losses = agcl_rows(logits, target, self._noise_or_default(noise), branches)
        agcl = losses.view(2, -1).mean(1)
        if similarity.shape[1] == 0:  # phase "shared" has no match term
            return agcl, None, beta
        cosines = similarity.reshape(2, -1).mean(1, dtype=loss_dtype(similarity))
        return agcl, self.match_weight * (1 - cosines), beta

    def instance_weight(self, epoch: float) -> float:
        """Compute the weight `beta` of the instance-balanced branch.

        Raises:
            InputError: `epoch` is not from 0 to `epochs`.
        """
        if not is_finite_number(epoch) or not 0 <= epoch <= self.epochs:
            raise InputError(
                f"epoch={epoch!r} must be from 0 to epochs={self.epochs}: count epochs from 0 in each phase."
            )
        return self.eta * (self.epochs - epoch) / self.epochs

    def extra_repr(self) -> str:
        """Epoch, number of classes and settings, for `print(loss)`."""
        return f"epoch={self.epoch}, {super().extra_repr()}"
