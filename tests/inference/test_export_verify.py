"""The comparison of an exported file with its model, with runners that are wrong in a known way."""

from __future__ import annotations

import pytest
import torch

from lpt_peft.errors import ExportError
from lpt_peft.inference.export.verify import Expected, verification_images, verify

IMAGES = verification_images((3, 8, 8))
LOGITS = torch.tensor([[8.0, 1.0], [0.0, 4.0], [-3.0, 2.0], [1.0, 1.0]])
GROUPS = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2]])
GAPS = torch.tensor([0.5, 0.5, 0.5, 1e-5])
EXPECTED = Expected(LOGITS, 2.0, GROUPS, GAPS)


def runner(logits=LOGITS, groups=GROUPS, temperature=2.0):
    """A file that answers the verification images, in whatever batches they come."""

    def run(inputs):
        rows = [next(i for i, other in enumerate(IMAGES) if torch.equal(image, other)) for image in inputs["images"]]
        return {
            "logits": logits[rows],
            "probabilities": (logits[rows] / temperature).softmax(1),
            "groups": groups[rows],
        }

    return run


def check(run, dtype="float32"):
    return verify(run, {}, images=IMAGES, expected=EXPECTED, dtype=dtype, name="model.onnx")


def changed(tensor, row, value):
    tensor = tensor.clone()
    tensor[row] = torch.as_tensor(value, dtype=tensor.dtype)
    return tensor


def test_equal_results():
    assert check(runner()) == 0


@pytest.mark.parametrize("row", range(4))
def test_deviations_are_relative_to_the_largest_logit(row):
    assert check(runner(LOGITS + 0.0007)) == pytest.approx(0.0007 / 8, rel=1e-3)
    wrong = LOGITS.clone()
    wrong[row, 1] += 0.001
    with pytest.raises(ExportError, match="model.onnx returns other results than the model: logits differ by 0.0001"):
        check(runner(wrong))
    assert check(runner(wrong), "float16") == pytest.approx(0.001 / 8, rel=1e-3)


def test_other_temperature():
    with pytest.raises(ExportError, match="from the softmax of the logits"):
        check(runner(temperature=1.9))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_nan(dtype):
    with pytest.raises(ExportError, match="logits differ by nan"):
        check(runner(changed(LOGITS, 1, [float("nan"), 4.0])), dtype)


def test_groups_may_differ_only_at_a_tie():
    assert check(runner(groups=GROUPS.flip(1))) == 0, "the order of the selected groups has no effect"
    tie = changed(GROUPS, 3, [3, 1])
    assert check(runner(changed(LOGITS, 3, [5.0, 0.0]), tie)) == 0
    with pytest.raises(ExportError, match=r"selects the groups \[0, 2\] for image 0 .* the model \[0, 1\]"):
        check(runner(groups=changed(GROUPS, 0, [0, 2])))
    with pytest.raises(ExportError, match="selects the groups"):
        check(runner(groups=changed(tie, 1, [2, 1])))


def test_every_image_is_run_once_in_batches_of_two_sizes():
    sizes = []
    run = runner()

    def counted(inputs):
        sizes.append(len(inputs["images"]))
        assert inputs["images"].is_contiguous()
        return run(inputs)

    check(counted)
    assert sizes == [1, 3]
