"""Regularizer of keys whose queries come from a block in the middle: `query_regularizer`."""

from __future__ import annotations

from torch import Tensor

from lpt_peft._features import check_features
from lpt_peft._numerics import cosine


def query_regularizer(query: Tensor, features: Tensor, keys: Tensor) -> Tensor:
    """Compute the query-pool regularizer of OS-Prompt++, Kim et al., ECCV 2024, arXiv 2402.16189.

    With the query `q` of an image, its final feature `r` and the keys `k_i`:

        loss = mean over images of || softmax_i cos(k_i, q) - softmax_i cos(k_i, r) ||^2

    The same keys are compared with both, as in the paper, so that similarities of a query in the middle of the model
    resemble those of the final feature. In the paper `r` comes from a second, frozen ViT without prompts; here it is
    the feature of the same pass, without gradient. The paper weights the loss by 1e-4.

    Args:
        query: (B, d), floating point.
        features: (B, d) final features; no gradient flows into them.
        keys: (m, d), floating point.

    Returns:
        A scalar, float64 where an argument is, else float32.

    Raises:
        InputError: The shapes do not fit, or an argument is not floating point.

    Example:
        >>> import torch
        >>> keys = torch.eye(2)
        >>> query_regularizer(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]), keys)
        tensor(0.)
        >>> query_regularizer(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), keys)
        tensor(0.4271)
    """
    hint = "pass AdapterOutput.query and AdapterOutput.features of an adapter whose feature width is that of its keys"
    check_features("keys", keys, keys.shape[-1], rows="m", hint="pass adapter.pool.keys")
    for name, values in (("query", query), ("features", features)):
        check_features(name, values, keys.shape[1], rows="B", hint=hint)
    found, reference = (cosine(rows, keys).softmax(-1) for rows in (query, features.detach()))
    return (found - reference).square().sum(-1).mean()
