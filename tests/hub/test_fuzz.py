"""Any value in any place of the configuration: an `LPTError`, or content that every consumer accepts.

`tests/checkpoint/test_hostile.py` fuzzes the reader; here the content that it accepts goes to the card, the builder,
the command and the comparison with a backbone.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from functools import cache

import pytest
import timm
from hypothesis import given, settings
from hypothesis import strategies as st

from lpt_peft.backbones import find_backbone
from lpt_peft.backbones.loading import can_build
from lpt_peft.checkpoint import decode, encode
from lpt_peft.checkpoint.match import check_match
from lpt_peft.cli.inspect import describe
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
# Places with free values are drawn as often as all others together.
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


def use(content):
    """Use content in every way that needs no download."""
    assert isinstance(model_card(content, "me/x", CardOptions(datasets=("me/d",))), str)
    assert isinstance(describe("me/x", content), str)
    assert isinstance(can_build(asdict(content.backbone)), bool)
    assert decode(encode(content).weights).metadata == content.metadata
    with pytest.raises(BackboneMismatchError):
        check_match(content, backbone(), "error", "0" * 64)


@settings(FUZZ, max_examples=600)
@given(places, values)
def test_any_value_in_any_place(place, value):
    forgery = Forgery.start()
    parent = forgery.config
    for key in place.split("/")[:-1]:
        parent = parent.get(key) if isinstance(parent, dict) else None
    if not isinstance(parent, dict):
        return
    put(forgery.config, place, copy.deepcopy(value))
    try:
        content = decode(forgery.bytes())
    except LPTError:
        return
    use(content)


@settings(FUZZ, max_examples=600)
@given(edits())
def test_edited_text_of_the_configuration(changes):
    """The hashes are right, so the text itself is read."""
    edit = lambda text: edited(text.encode(), changes).decode("utf-8", "replace")  # noqa: E731
    try:
        content = decode(Forgery.start().bytes(edit_config=edit))
    except LPTError:
        return
    use(content)


def test_timm_lists_are_large_enough_to_matter():
    assert len(timm.list_models()) > 100
