"""`check_writable`: a training that could not be saved is refused before it starts."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpt_peft.checkpoint import check_writable, decode
from lpt_peft.config import PromptConfig
from lpt_peft.errors import InputError, LPTError
from tests.checkpoint.adapters import encode_adapter, tiny_adapter

CONFIG = PromptConfig(dim=24, depth=2, num_classes=7, prompt_length=3, pool_size=5)
NAMES = list("abcdefg")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label_names": ["", *NAMES[1:]]}, r"label_names\[0\]='' must be text"),
        ({"label_names": ["x" * 1025, *NAMES[1:]]}, "1 to 1024 characters"),
        ({"label_names": ["a\nb", *NAMES[1:]]}, r"contains U\+000A"),
        ({"label_names": ["caf\udce9", *NAMES[1:]]}, "surrogates"),
        ({"label_names": NAMES[1:]}, "6 entries, the head has 7 classes"),
        ({"label_names": ["a", "a", *NAMES[2:]]}, "for the classes 0 and 1"),
        ({"class_counts": [1]}, "1 entries"),
        ({"class_counts": [-1] * 7}, "at least 0"),
        ({"class_counts": {1, 2}}, "is a set"),
        ({"training": {"x": "y" * 2**16}}, "at most 65536"),
        ({"training": {"x": float("nan")}}, "plain JSON"),
        ({"preprocess": {"exif": "yes"}}, "exif='yes' must be true or false"),
        ({"preprocess": {"background": [0, 0, -1]}}, "at least 0"),
    ],
)
def test_the_writer_refuses_the_same(options, words):
    with pytest.raises(InputError, match=words):
        check_writable(CONFIG, **options)
    with pytest.raises(LPTError, match=words):
        encode_adapter(tiny_adapter(), **options)


def test_sizes():
    many = PromptConfig(dim=24, depth=2, num_classes=10_000)
    with pytest.raises(InputError, match="header takes .* shorten label_names"):
        check_writable(many, label_names=[f"{label:0100}" for label in range(10_000)])
    check_writable(many, label_names=[f"{label:080}" for label in range(10_000)])
    check_writable(many, class_counts=Counter(dict.fromkeys(range(10000), 2)))
    with pytest.raises(InputError, match="tensors take .* at most 17179869184"):
        check_writable(PromptConfig(dim=10**5, depth=100, num_classes=7, prompt_length=100, pool_size=100))


names = st.lists(st.text(max_size=6), min_size=7, max_size=7)
counts = st.lists(st.integers(-1, 9), min_size=6, max_size=7)
values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3))
records = st.dictionaries(st.text(max_size=3), values, max_size=3)


@settings(max_examples=150, deadline=None)
@given(
    names,
    st.dictionaries(st.text(max_size=3), values, max_size=3),
    st.lists(st.integers(-1, 9), min_size=6, max_size=7),
)
def test_arguments_that_pass_can_be_saved_and_read(label_names, training, class_counts):
    options = {"label_names": label_names, "training": training, "class_counts": class_counts}
    try:
        check_writable(CONFIG, **options)
    except InputError:
        with pytest.raises(InputError):
            encode_adapter(adapter(), **options)
    else:
        assert decode(encode_adapter(adapter(), **options).weights).metadata.label_names == tuple(label_names)


def adapter(made=[]):  # noqa: B006 - built once
    return made[0] if made else made.append(tiny_adapter()) or made[0]
