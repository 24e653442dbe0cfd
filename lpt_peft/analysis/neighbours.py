"""Accuracy of the k nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lpt_peft._numbers import checked_integer, is_finite_number
from lpt_peft.analysis._inputs import check_labels, check_rows, chunks, unit_rows
from lpt_peft.errors import ConfigError, InputError

Vote = Literal["majority", "weighted"]


@torch.no_grad()
def knn_predict(
    features: Tensor,
    labels: Any,
    queries: Tensor,
    *,
    k: Sequence[int] = (20, 1),
    vote: Vote = "majority",
    temperature: float = 0.07,
) -> dict[int, Tensor]:
    r"""Classify features by their nearest training features, under the cosine.

    With the k training features of the largest cosines :math:`s_1 \ge ... \ge s_k` and their classes :math:`y_i`, the
    prediction is :math:`\arg\max_c \sum_i v_i [y_i = c]`, where :math:`v_i = 1` ("majority"), or
    :math:`v_i = e^{s_i / \tau}` ("weighted"; Wu et al., CVPR 2018, arXiv 1805.01978). Of classes with equal votes, that
    of the nearest neighbour wins. Which training features count among several with the same cosine at the boundary of
    the k nearest is not defined. The classes of a long tail that have fewer than k / 2 training features can hardly win
    a majority: compare k = 20 with k = 1.

    Exact, in chunks of queries: O(N M d) operations, and about 100 MiB of memory beyond the arguments.

    Args:
        features: Training features (N, d), floating point, on any device; N at least the largest k.
        labels: Their classes (N,), integers of at least 0.
        queries: Features to classify (M, d), on the same device.
        k: Numbers of neighbours, computed in a single pass.
        vote: "majority" or "weighted".
        temperature: :math:`\tau` of the weighted vote.

    Returns:
        For each k the predicted classes (M,) int64, on the CPU.

    Raises:
        InputError: A shape is wrong, a value is not finite, or there are fewer training features than k.
        ConfigError: k, vote or temperature is out of range.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> knn_predict(features, [0, 0, 1], torch.tensor([[1.0, 0.2], [0.1, 2.0]]), k=[1])
        {1: tensor([0, 1])}
    """
    check_rows("features", features)
    check_rows("queries", queries, features.shape[1])
    if queries.device != features.device:
        raise InputError(f"queries are on {queries.device}, features on {features.device}: move them to one device.")
    sizes = [checked_integer("k", size, 1) for size in k]
    if not sizes:
        raise ConfigError("k is empty: pass at least one number of neighbours, such as k=[20].")
    if vote not in ("majority", "weighted"):
        raise ConfigError(f'vote={vote!r} must be "majority" or "weighted".')
    if not is_finite_number(temperature) or temperature <= 0:
        raise ConfigError(f"temperature={temperature!r} must be a number greater than 0.")
    largest = max(sizes)
    if largest > len(features):
        raise InputError(
            f"k={largest} neighbours need at least as many training features, and there are {len(features)}: reduce k."
        )
    classes = check_labels("labels", labels, len(features), None).to(features.device)
    train = unit_rows(features)
    found: dict[int, list[Tensor]] = {size: [] for size in sizes}
    for rows in chunks(len(queries), 8 * len(train) + 8 * largest**2):
        similarity, nearest = (unit_rows(queries[rows]).to(train.dtype) @ train.T).topk(largest, dim=1)
        neighbours = classes[nearest]
        weights = torch.ones_like(similarity) if vote == "majority" else ((similarity - 1) / temperature).exp()
        for size in sizes:
            own = neighbours[:, :size]
            votes = ((own[:, :, None] == own[:, None, :]) * weights[:, None, :size]).sum(2)
            # argmax returns the first of several maxima: the nearest neighbour.
            found[size].append(own.gather(1, votes.argmax(1, keepdim=True)).squeeze(1).cpu())
    return {size: torch.cat(parts) for size, parts in found.items()}
