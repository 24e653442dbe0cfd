"""Any value in any place of config.json: refused by an `LPTError`, or everything that is done with it works.

`tests/checkpoint/test_hostile.py` fuzzes the reader itself; here what passes it goes on to the card, the builder, the
command and the comparison with a backbone.
"""

from __future__ import annotations

import copy
from functools import cache

import pytest
import timm
from hypothesis import given, settings
from hypothesis import strategies as st

from lpt_peft.backbones import find_backbone
from lpt_peft.backbones.loading import can_build
from lpt_peft.checkpoint import decode
from lpt_peft.checkpoint.pretrained import check_match
from lpt_peft.cli.inspect import _text
from lpt_peft.errors import BackboneMismatchError, LPTError
from lpt_peft.hub import CardOptions, model_card
from tests.checkpoint.test_hostile import FUZZ, Forgery, edited, edits, paths, put
from tests.conftest import tiny_vit

words = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["---", "\n---\n", "```", "|", "<script>", "{architecture}", "%s", "vit_base_patch16_224", "\x00", "\u202e"]
    ),
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), words)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=6
)
# Places whose values are anyone's to choose come as often as all others together.
FREE = [
    *("training", "training/metrics", "training/rule", "training/recipe", "backbone/model_args"),
    *("backbone/model_args/img_size", "backbone/model_args/norm_eps", "backbone/model_args/global_pool"),
    *("backbone/architecture", "backbone/library", "backbone/pretrained_tag", "backbone/hub_id", "head/label_names"),
    *("backbone/hub_revision", "preprocess/mean", "preprocess/interpolation", "backbone/num_parameters"),
]
places = st.one_of(st.sampled_from(FREE), st.sampled_from(sorted(paths(Forgery.start().config))))


@cache
def backbone():
    return find_backbone(tiny_vit())


def use(prompts):
    """What is done with a file that was read, short of a download."""
    config = prompts.config
    assert isinstance(model_card(config, "me/x", CardOptions(datasets=("me/d",))), str)
    assert isinstance(_text("me/x", config), str)
    assert isinstance(can_build(config["backbone"]), bool)
    assert prompts.metadata.training == config["training"]
    with pytest.raises(BackboneMismatchError):
        check_match(prompts, backbone(), "error", "0" * 64)


@settings(FUZZ, max_examples=600)
@given(places, values)
def test_any_value_in_any_place(place, value):
    forgery = Forgery.start()
    parent = forgery.config
    for key in place.split("/")[:-1]:
        parent = parent.get(key) if isinstance(parent, dict) else None
    if not isinstance(parent, dict) or place.startswith("weights"):
        return
    put(forgery.config, place, copy.deepcopy(value))
    try:
        pair = forgery.sync().bytes()
    except UnicodeEncodeError:  # lone surrogates: not even a file
        return
    try:
        prompts = decode(*pair)
    except LPTError:
        return
    use(prompts)


@settings(FUZZ, max_examples=600)
@given(edits())
def test_edited_header_bytes(changes):
    """Size and sha256 told anew, so that the header itself is what is read."""
    forgery = Forgery.start()
    changes = [(place % 3000, length, junk) for place, length, junk in changes]
    pair = forgery.with_weights(edited(Forgery.start().sync().bytes()[1], changes))
    try:
        prompts = decode(*pair)
    except LPTError:
        return
    use(prompts)


def test_timm_lists_are_large_enough_to_matter():
    assert len(timm.list_models()) > 100
