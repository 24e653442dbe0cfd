"""The counter of host reads detects all kinds of reads and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.host_reads import count_host_reads

X = torch.tensor([3.0, 0.0, 2.0])
MASK = X > 0


def assign_by_mask():
    X.clone()[MASK] = torch.tensor([1.0, 2.0])


READS = {
    "item": (lambda: X.sum().item(), "aten._local_scalar_dense"),
    "float": (lambda: float(X[0]), "aten._local_scalar_dense"),
    "int": (lambda: int(X[0]), "aten._local_scalar_dense"),
    "bool": (lambda: bool(MASK.any()), "aten._local_scalar_dense"),
    "is_nonzero": (lambda: torch.is_nonzero(X[0]), "aten._local_scalar_dense"),
    "allclose": (lambda: torch.allclose(X, X), "aten.allclose"),
    "nonzero": (lambda: X.nonzero(), "aten.nonzero"),
    "where": (lambda: torch.where(MASK), "aten.nonzero"),
    "equal": (lambda: torch.equal(X, X), "aten.equal"),
    "boolean index": (lambda: X[MASK], "aten.index"),
    "boolean assignment": (assign_by_mask, "aten.index_put_"),
    "masked_select": (lambda: X.masked_select(MASK), "aten.masked_select"),
    "unique": (lambda: X.unique(), "aten._unique2"),
    "unique_consecutive": (lambda: X.unique_consecutive(), "aten.unique_consecutive"),
    "bincount": (lambda: X.long().bincount(), "aten.bincount"),
    "repeat_interleave": (lambda: X.repeat_interleave(X.long()), "aten.repeat_interleave"),
    "tolist": (lambda: X.tolist(), "Tensor.tolist"),
    "numpy": (lambda: X.numpy(), "Tensor.numpy"),
    "cpu": (lambda: X.cpu(), "Tensor.cpu"),
}


@pytest.mark.parametrize("case", READS)
def test_detects_every_kind_of_read(case):
    call, name = READS[case]
    with count_host_reads() as reads:
        call()
    assert name in reads
    assert all("test_host_reads.py" in location for location in reads.locations)


def test_detects_a_read_in_backward():
    class Reading(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * gradient.max().item()

    x = X.clone().requires_grad_()
    with count_host_reads() as reads:
        loss = Reading.apply(x).sum()
        before = list(reads)
        loss.backward()
    assert before == []
    assert reads == ["aten._local_scalar_dense"]


def test_does_not_count_work_on_the_device():
    x = X.clone().requires_grad_()
    index = torch.tensor([0, 2])
    with count_host_reads() as reads:
        kept = torch.where(MASK, x, 0).masked_fill(~MASK, -1.0)
        picked = kept[index] + kept.gather(0, index) + kept[1:].sum()
        picked = picked.repeat_interleave(torch.tensor([1, 2]), output_size=3)
        F.cross_entropy(picked[None], torch.tensor([1])).backward()
        torch.optim.SGD([x], lr=0.1).step()
    assert reads == [], reads.locations
