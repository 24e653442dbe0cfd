"""Input validation of the losses, and where it reads values."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from lpt_peft.errors import ConfigError, InputError
from lpt_peft.losses import AGCLLoss, LPTLoss, agcl_loss
from tests.host_reads import count_host_reads
from tests.losses.oracle import COUNTS, Output, batch


def test_class_counts_of_any_integer_type():
    logits, target, noise = batch()
    expected = agcl_loss(logits, target, COUNTS, noise)
    tensor = torch.tensor(COUNTS)
    forms = [tuple(COUNTS), tensor, tensor.to(torch.uint8), tensor.double(), tensor.numpy(), [*COUNTS[:-1], 1.0]]
    forms += [list(tensor), list(tensor.numpy()), tensor.numpy().astype(np.uint16), tensor.float().numpy()]
    forms += [Counter(label for label in (5, 3, 4, 0, 2, 1) for _ in range(COUNTS[label]))]
    forms += [{str(label): count for label, count in reversed(list(enumerate(COUNTS)))}]
    for counts in forms:
        assert torch.equal(agcl_loss(logits, target, counts, noise), expected)
        assert AGCLLoss(counts).class_counts.tolist() == LPTLoss(counts, 2).class_counts.tolist() == COUNTS
    loss = AGCLLoss([1] * 6)
    loss.class_counts = Counter({5: 1, 0: 120, 1: 57, 3: 30, 2: 30, 4: 4})
    assert loss.class_counts.tolist() == COUNTS
    assert AGCLLoss([2**24 + 1.0, 3]).class_counts.tolist() == [2**24 + 1, 3], "not rounded to float32"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [lambda: AGCLLoss(COUNTS), lambda: LPTLoss(COUNTS, 3)])
def test_no_host_read_in_forward_and_backward(make, training, monkeypatch):
    """No read for labels treated as on a device, nor on "meta", where every read is an error."""
    criterion = make().train(training)
    for device in ("cpu", "meta"):
        criterion = criterion.to(device)
        monkeypatch.setattr("lpt_peft.losses.checks.can_read_values", lambda tensor: False)
        logits = torch.randn(8, 6, device=device, requires_grad=True)
        similarity = torch.rand(8, 2, device=device, requires_grad=True)
        target = torch.randint(6, (8,), device=device)
        inputs = Output(logits, similarity) if isinstance(criterion, LPTLoss) else logits
        with count_host_reads() as reads:
            if isinstance(criterion, LPTLoss):
                criterion.set_epoch(1)
            criterion(inputs, target).backward()
            if isinstance(criterion, LPTLoss):
                criterion.terms(inputs, target)
        assert reads == [], reads.locations
        assert logits.grad.shape == logits.shape


def test_labels_are_read_on_a_cpu_only():
    logits, target, _ = batch(8)
    loss = AGCLLoss(COUNTS)
    with count_host_reads() as reads:
        loss(logits, target)
    assert reads == ["aten._local_scalar_dense"]
    loss.to("meta")(logits.to("meta"), target.to("meta"))  # reading a value would raise


def test_unchecked_label_out_of_range_fails_in_torch(monkeypatch):
    """On a CUDA device, the same index fails torch's assertion."""
    monkeypatch.setattr("lpt_peft.losses.checks.can_read_values", lambda tensor: False)
    for label in (-1, 6):
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            AGCLLoss(COUNTS)(torch.zeros(1, 6, requires_grad=True), torch.tensor([label]))


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([5, 0, 3], r"class_counts\[1\]=0 .*at least 1.*remove classes without training images"),
        ([5, 3, -2], r"class_counts\[2\]=-2 "),
        ([5.0, 2.5], r"class_counts\[1\]=2.5 .*integer"),
        ([math.nan, 2.0], r"class_counts\[0\]=nan "),
        ([2.0, math.inf], r"class_counts\[1\]=inf "),
        ([1e30, 2.0], r"class_counts\[0\]=1.*e\+30 "),
        ([], "class_counts must be one integer per class.*bincount"),
        ([[1, 2]], r"shape \(1, 2\).*bincount"),
        (7, r"class_counts must be .* shape \(\)"),
        ([True, True], "torch.bool"),
        ([1j, 2], "complex"),
        ([1, None], "class_counts must be one integer per class, not"),
        ("many", "class_counts must be one integer per class, not 'many'"),
        ({0: 5, 2: 3}, "class_counts is a dict .* missing 1, out of range 2"),
        ({"cat": 5, "dog": 3}, "class_counts has 'cat' where an integer label is needed"),
        (Counter([0, 0, 1]).values(), "class_counts is a dict_values"),
        ({5, 3}, "class_counts is a set"),
        ((count for count in [5, 3]), "class_counts is a generator"),
        ({0: 5, 1: 0}, r"class_counts\[1\]=0 .*at least 1"),
        ([np.bool_(True)], "torch.bool"),
        (["5", "3"], "class_counts must be one integer per class, not"),
        (np.array([5, 3], dtype=object), "class_counts must be one integer per class, not"),
        ([2**24 + 1.5, 2.0], r"class_counts\[0\]=16777217.5 "),
        ([[1], [2, 3]], "class_counts must be one integer per class, not"),
        (np.unique([0, 1, 1], return_counts=True), "not a tuple of arrays or tensors: use torch.bincount"),
        ([2**70], "class_counts must be one integer per class, not"),
    ],
)
def test_invalid_class_counts(counts, words):
    logits, target = torch.zeros(1, 2), torch.tensor([0])
    for call in (lambda: AGCLLoss(counts), lambda: LPTLoss(counts, 1), lambda: agcl_loss(logits, target, counts)):
        with pytest.raises(InputError, match=words):
            call()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": torch.tensor([0, 1, 6, 0])}, "label 6, but the classes are 0 to 5: drop rows"),
        ({"target": torch.tensor([0, -100, 2, 0])}, "label -100.*drop rows"),
        ({"target": torch.zeros(4)}, r"not torch.float32 of shape \(4,\): pass target\.long\(\) if"),
        ({"target": torch.full((4, 5), 0.2)}, r"not torch.float32 of shape \(4, 5\): create Mixup.* num_classes=6"),
        ({"target": torch.zeros(4, 5, dtype=torch.long)}, r"shape \(4, 5\): create Mixup.*one_hot with num_classes=6"),
        ({"target": torch.zeros(4, 1, dtype=torch.long)}, r"shape \(4, 1\): pass target\.squeeze\(1\)\.$"),
        ({"target": torch.zeros(4, 1)}, r"shape \(4, 1\): pass target\.squeeze\(1\)\.long\(\)\.$"),
        (
            {"target": torch.zeros(4, 6)},
            r"target\[0\] must be probabilities, .* smallest value is 0 and its sum is 0: ",
        ),
        ({"target": torch.ones(4, 6)}, r"its sum is 6: .*softmax.*divide multi-label targets"),
        ({"target": torch.eye(6)[:4] * 2 - torch.eye(6)[1:5]}, r"smallest value is -1 and its sum is 1: pass scores"),
        ({"target": torch.full((4, 6), math.nan)}, r"smallest value is nan"),
        (
            {"target": torch.eye(6).repeat(2, 1)},
            r"probabilities of shape \(4, 6\), not torch.float32 of shape \(12, 6\)",
        ),
        (
            {"target": torch.eye(6)[:4].bool()},
            r"not torch.bool of shape \(4, 6\): pass target\.float\(\) if it is one-hot",
        ),
        ({"target": torch.zeros(4, dtype=torch.complex64)}, "not torch.complex64"),
        ({"target": [0, 1, 2, 3]}, r"target must be a tensor, not list: pass torch\.as_tensor\(target\)"),
        (
            {"target": (torch.zeros(4), torch.zeros(4), 0.5)},
            r"target must be a tensor, not tuple: pass a single tensor .*weight \* one_hot\(y1, C\) \+",
        ),
        ({"target": None}, "target must be a tensor, not None: the batch has no labels"),
        ({"target": {"a": torch.zeros(4), "b": 0}}, "not dict: pass the tensor of labels among its entries, a, b"),
        (
            {"target": torch.zeros(4, dtype=torch.long, device="meta")},
            r"target is on meta, but logits are on cpu: pass",
        ),
        ({"noise": torch.zeros(4, 6, device="meta")}, r"noise is on meta, but logits are on cpu: pass noise\.to"),
        ({"noise": 0.5}, "noise must be a tensor, not float"),
        ({"target": torch.zeros(4, dtype=torch.bool)}, "not torch.bool"),
        ({"noise": torch.zeros(4, 6, requires_grad=True)}, r"noise requires a gradient.*noise.detach\(\)"),
        (
            {"target": torch.zeros(3, dtype=torch.long)},
            r"class indices of shape \(4,\) .* shape \(3,\): pass .*same batch",
        ),
        ({"target": torch.zeros(4, 6, dtype=torch.long)}, r"torch.int64 of shape \(4, 6\): pass target\.float\(\) if"),
        ({"target": torch.tensor(1)}, r"not torch.int64 of shape \(\): pass .*same batch"),
        ({"logits": torch.zeros(4, 5)}, "logits have 5 columns, but class_counts has 6 entries"),
        ({"logits": torch.zeros(6)}, r"logits must be floating point \(B, C\) .* shape \(6,\)"),
        ({"logits": torch.zeros(4, 6, 2)}, r"logits must be floating point .* shape \(4, 6, 2\)"),
        ({"logits": torch.zeros(4, 6, dtype=torch.long)}, "logits must be floating point .* torch.int64"),
        ({"logits": torch.zeros(0, 6), "target": torch.zeros(0, dtype=torch.long)}, "with B > 0"),
        ({"noise": torch.zeros(6)}, r"noise must have the shape of logits, \(4, 6\), not \(6,\)"),
        ({"noise": torch.zeros(4, 1)}, r"noise must have the shape of logits, \(4, 6\), not \(4, 1\)"),
    ],
)
def test_invalid_batches(change, words):
    call = {"logits": torch.zeros(4, 6), "target": torch.zeros(4, dtype=torch.long), "noise": None, **change}
    with pytest.raises(InputError, match=words):
        agcl_loss(**call, class_counts=COUNTS)
    with pytest.raises(InputError, match=words):
        AGCLLoss(COUNTS)(**call)
    output = Output(call.pop("logits"), torch.zeros(4, 2))
    with pytest.raises(InputError, match=words):
        LPTLoss(COUNTS, 3)(output, epoch=0, **call)


@pytest.mark.parametrize("name", ["scale", "margin", "noise_scale", "gamma_pos", "gamma_neg", "label_smoothing"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "0.1", True, None])
def test_invalid_settings(name, value):
    logits, target, _ = batch(2)
    for call in (
        lambda **keywords: AGCLLoss(COUNTS, **keywords),
        lambda **keywords: LPTLoss(COUNTS, 3, **keywords),
        lambda **keywords: agcl_loss(logits, target, COUNTS, **keywords),
    ):
        with pytest.raises(ConfigError, match=f"{name}=.* must be a finite number"):
            call(**{name: value})


def test_settings_out_of_range():
    with pytest.raises(ConfigError, match=r"scale=0 .*greater than 0"):
        AGCLLoss(COUNTS, scale=0)
    with pytest.raises(ConfigError, match=r"label_smoothing=1.1 .*from 0 to 1"):
        AGCLLoss(COUNTS, label_smoothing=1.1)
    with pytest.raises(ConfigError, match="reduction='avg' must be 'mean', 'sum' or 'none'"):
        AGCLLoss(COUNTS, reduction="avg")
    with pytest.raises(ConfigError, match="normalize='no' must be True or False"):
        AGCLLoss(COUNTS, normalize="no")
    for name in ("instance_gamma_pos", "instance_gamma_neg", "eta", "match_weight"):
        with pytest.raises(ConfigError, match="=-1 must be a finite number"):
            LPTLoss(COUNTS, 3, **{name: -1})
    for epochs in (0, -3, math.nan, None):
        with pytest.raises(ConfigError, match=r"epochs=.*greater than 0"):
            LPTLoss(COUNTS, epochs)


def test_loss_on_another_device_than_the_logits():
    for loss in (AGCLLoss(COUNTS), AGCLLoss(torch.tensor(COUNTS)).to("meta")):
        device = "meta" if loss.class_counts.device.type == "cpu" else "cpu"
        with pytest.raises(InputError, match=rf"loss is on .*, but logits are on {device}: use criterion\.to"):
            loss(torch.zeros(4, 6, device=device), torch.zeros(4, dtype=torch.long, device=device))


def test_numpy_numbers_as_settings():
    logits, target, noise = batch()
    expected = AGCLLoss(COUNTS, margin=0.25, label_smoothing=0.5, gamma_neg=2)(logits, target, noise)
    loss = AGCLLoss(COUNTS, margin=np.float32(0.25), label_smoothing=np.float16(0.5), gamma_neg=np.int64(2))
    assert loss(logits, target, noise) == expected
    assert "margin=0.25" in repr(loss)
    assert (
        agcl_loss(logits, target, COUNTS, noise, margin=np.float32(0.25), label_smoothing=0.5, gamma_neg=2) == expected
    )
    assert LPTLoss(COUNTS, np.int64(4)).instance_weight(np.float32(2)) == 0.25
    for value in (torch.tensor(0.1), np.float32("nan"), np.bool_(True), [0.1]):
        with pytest.raises(ConfigError, match="margin=.* must be a finite number"):
            AGCLLoss(COUNTS, margin=value)
    for epoch in ("1", None, torch.tensor(1), [1]):
        with pytest.raises(InputError, match="epoch=.* must be from 0 to epochs=4"):
            LPTLoss(COUNTS, 4).set_epoch(epoch)
