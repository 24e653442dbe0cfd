"""Head rows kept by class name: `label_names=` of `from_pretrained` and `load_prompts`."""

from __future__ import annotations

import unicodedata
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpt_peft import LongTailPromptAdapter
from lpt_peft.checkpoint import decode, encode, relabel
from lpt_peft.config import PromptMetadata
from lpt_peft.errors import ConfigError, InputError
from tests.checkpoint.adapters import IMAGES, encode_adapter, tiny_adapter, tiny_content
from tests.conftest import tiny_vit

OLD = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
COUNTS = [70, 60, 50, 40, 30, 20, 10]
from_pretrained = LongTailPromptAdapter.from_pretrained


@pytest.fixture
def saved(tmp_path):
    adapter = tiny_adapter()
    adapter.metadata = PromptMetadata(temperature=2.0)
    adapter.save_pretrained(tmp_path / "old", label_names=OLD, class_counts=COUNTS, training={"metrics": {"few": 0.5}})
    return tmp_path / "old"


def test_a_class_is_added(saved):
    names = ["ape", *OLD]
    with pytest.warns(UserWarning, match=r"keeps the trained rows of 7 classes\. New, not trained yet: 'ape'\.$"):
        adapter = from_pretrained(saved, tiny_vit(), label_names=names)
    old = tiny_adapter()
    assert torch.equal(adapter.head.weight[1:], old.head.weight)
    assert adapter.head.weight[0].norm() > 0
    logits = adapter(IMAGES)
    assert logits.shape == (4, 8)
    assert torch.allclose(logits[:, 1:], old(IMAGES), atol=1e-5)
    assert adapter.prompt_config.num_classes == 8
    assert adapter.metadata.label_names == tuple(names)
    assert adapter.metadata.class_counts is None  # of the new class it is unknown
    assert adapter.metadata.training == {}  # figures of other classes must not get onto a card
    assert adapter.metadata.temperature is None
    assert decode(encode_adapter(adapter).weights).config.num_classes == 8


def test_another_order_and_fewer_classes(saved, recwarn):
    adapter = from_pretrained(saved, tiny_vit(), label_names=OLD[::-1])
    assert not recwarn.list
    assert torch.equal(adapter.head.weight, tiny_adapter().head.weight.flip(0))
    assert adapter.metadata.class_counts == tuple(COUNTS[::-1])
    assert adapter.metadata.training == {"metrics": {"few": 0.5}}
    assert adapter.metadata.temperature == 2.0
    with pytest.warns(UserWarning, match=r"rows of 2 classes\. In the file, but not used: 'ant', 'bee',"):
        adapter = from_pretrained(saved, tiny_vit(), label_names=["gnu", "cat"])
    assert torch.equal(adapter.head.weight, tiny_adapter().head.weight[[6, 2]])
    assert adapter.metadata.class_counts == (10, 50)


def test_the_names_of_the_file_change_nothing(saved, recwarn):
    adapter = from_pretrained(saved, tiny_vit(), label_names=OLD, num_classes=7)
    assert encode_adapter(adapter) == encode_adapter(from_pretrained(saved, tiny_vit()))
    assert not recwarn.list


@pytest.mark.parametrize("names", [dict(enumerate(OLD)), {name: label for label, name in enumerate(OLD)}])
def test_names_as_a_mapping(saved, names):
    adapter = from_pretrained(saved, tiny_vit(), label_names=dict(reversed(names.items())))
    assert adapter.metadata.label_names == tuple(OLD)


def test_load_prompts_of_everything(saved):
    adapter = tiny_adapter(seed=1, num_classes=3)
    with pytest.warns(UserWarning, match="New, not trained yet: 'owl'"):
        changes = adapter.load_prompts(saved, label_names=["owl", "cat"])
    assert changes.rows == (None, 2)
    assert (changes.kept, changes.new) == (("cat",), ("owl",))
    assert changes.dropped == ("ant", "bee", "dog", "eel", "fox", "gnu")
    assert torch.equal(adapter.head.weight[1], tiny_adapter().head.weight[2])
    assert torch.equal(adapter.pool.prompts, tiny_adapter().pool.prompts)
    assert adapter.load_prompts(saved) is None


def test_load_prompts_of_the_shared_prompts_and_head_rows(saved):
    adapter = tiny_adapter(seed=1, num_classes=3, pool_size=9)
    before = adapter.head.weight.detach().clone()
    parameter, pool = adapter.head.weight, adapter.pool.prompts.detach().clone()
    with pytest.warns(UserWarning, match="New, not trained yet: 'owl'"):
        changes = adapter.load_prompts(saved, part="shared", label_names=["fox", "owl", "cat"])
    assert changes.new == ("owl",)
    assert adapter.head.weight is parameter
    assert torch.equal(adapter.head.weight[[0, 2]], tiny_adapter().head.weight[[5, 2]])
    assert torch.equal(adapter.head.weight[1], before[1])  # stays as it was initialized
    assert torch.equal(adapter.shared.prompts, tiny_adapter().shared.prompts)
    assert torch.equal(adapter.pool.prompts, pool)
    with pytest.raises(ConfigError, match="label_names has 2 names, but the adapter's head has 3 classes"):
        adapter.load_prompts(saved, part="shared", label_names=["fox", "owl"])


def test_the_random_state_is_not_advanced(saved):
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="New, not trained yet"):
        from_pretrained(saved, tiny_vit(), label_names=[*OLD, "owl"])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_head_of_another_dtype(tmp_path):
    tiny_adapter(dtype=torch.bfloat16).save_pretrained(tmp_path, label_names=OLD)
    with pytest.warns(UserWarning, match="New, not trained yet"):
        adapter = from_pretrained(tmp_path, tiny_vit(), label_names=[*OLD, "owl"])
    assert adapter.head.weight.dtype == torch.bfloat16
    assert torch.equal(adapter.head.weight[:7], tiny_adapter(dtype=torch.bfloat16).head.weight)


def test_refusals_change_nothing(saved, tmp_path):
    tiny_adapter().save_pretrained(tmp_path / "unnamed")
    adapter = tiny_adapter(seed=1)
    before = encode_adapter(adapter)
    for source, names, words in (
        (tmp_path / "unnamed", OLD, 'does not name its classes.*part="shared"'),
        (saved, "cat", "must be one string per class, such as .*not the text"),
        (saved, {"a", "b"}, "is a set; its entries are not in the order"),
        (saved, ["cat", "cat"], "has 'cat' for the classes 0 and 1"),
        (saved, [], "at least 1|head"),
    ):
        with pytest.raises((InputError, ConfigError), match=words):
            adapter.load_prompts(source, label_names=names)
        with pytest.raises((InputError, ConfigError), match=words):
            from_pretrained(source, tiny_vit(), label_names=names)
    assert encode_adapter(adapter) == before
    twice = tiny_content()
    twice = replace(twice, metadata=replace(twice.metadata, label_names=("cat", "cat", *OLD[2:])))
    with pytest.raises(InputError, match="names several classes 'cat'"):
        relabel(decode(encode(twice).weights), OLD)


def test_num_classes(saved):
    assert from_pretrained(saved, tiny_vit(), num_classes=7).prompt_config.num_classes == 7
    with pytest.raises(ConfigError, match=r"num_classes=10, but .* has 7 classes.*label_names=.*part=\"shared\""):
        from_pretrained(saved, tiny_vit(), num_classes=10)
    with pytest.raises(ConfigError, match="num_classes=3, but .* has 2 classes"):
        from_pretrained(saved, tiny_vit(), num_classes=3, label_names=["cat", "dog"])


# -- names ------------------------------------------------------------------------------------------------

NAMES = {
    "Persian with a non-joiner": "می\u200cخواهم",
    "Hindi with a joiner": "क्\u200dष",
    "Japanese with an ideographic space": "山田\u3000太郎",
    "no-break space": "guinea\u00a0pig",
    "thin space": "a\u2009b",
    "soft hyphen": "land\u00adscape",
    "family emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "flag of Wales": "\U0001f3f4\U000e0067\U000e0062\U000e0077\U000e006c\U000e0073\U000e007f",
    "right-to-left mark": "\u200fעברית",
    "private use": "\ue000",
    "decomposed accent": "cafe\u0301",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_of_every_script_are_kept_as_they_are(tmp_path, name):
    tiny_adapter().save_pretrained(tmp_path, label_names=[name, *OLD[1:]])
    loaded = from_pretrained(tmp_path, tiny_vit())
    assert loaded.metadata.label_names[0] == name
    for form in ("NFC", "NFD"):
        adapter = from_pretrained(tmp_path, tiny_vit(), label_names=[*OLD[1:], unicodedata.normalize(form, name)])
        assert torch.equal(adapter.head.weight[6], loaded.head.weight[0])


@pytest.mark.parametrize(
    ("name", "code"), [("a\nb", "000A"), ("\x1b[1m", "001B"), ("\x85", "0085"), ("\x7f", "007F"), ("a\x00", "0000")]
)
def test_control_characters_are_refused(tmp_path, name, code):
    with pytest.raises(InputError, match=rf"must not contain control characters, but contains U\+{code}"):
        tiny_adapter().save_pretrained(tmp_path, label_names=[name, *OLD[1:]])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("guinea pig", "guinea\u00a0pig", r"character 7 is U\+0020 SPACE in the first and U\+00A0 NO-BREAK SPACE in"),
        ("Yak", "yak", r"character 1 is U\+0059 LATIN CAPITAL LETTER Y in the first and U\+0079 LATIN SMALL LETTER Y"),
        ("می\u200cخ", "میخ", r"character 3 is U\+200C ZERO WIDTH NON-JOINER in the first"),
        ("yak", "yak ", r"character 4 is missing in the first and U\+0020 SPACE in the second"),
        ("ﬁsh", "fish", r"U\+FB01 LATIN SMALL LIGATURE FI"),
    ],
)
def test_names_that_look_alike_are_shown_with_their_difference(tmp_path, old, new, words):
    tiny_adapter().save_pretrained(tmp_path, label_names=[old, *OLD[1:]])
    with pytest.warns(UserWarning, match=words):
        from_pretrained(tmp_path, tiny_vit(), label_names=[new, *OLD[1:]])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*OLD, *"hijklm"]), min_size=1, max_size=10, unique=True))
def test_rows_against_a_dictionary(names):
    content = replace(tiny_content(), metadata=PromptMetadata(label_names=tuple(OLD), class_counts=tuple(COUNTS)))
    found, changes = relabel(content, names)
    rows = dict(zip(OLD, content.tensors["head.weight"], strict=True))
    counts = dict(zip(OLD, COUNTS, strict=True))
    assert found.tensors["head.weight"].shape == (len(names), 24)
    for label, name in enumerate(names):
        if name in rows:
            assert torch.equal(found.tensors["head.weight"][label], rows[name])
    assert set(changes.kept) == set(names) & set(OLD)
    assert set(changes.new) == set(names) - set(OLD)
    assert set(changes.dropped) == set(OLD) - set(names)
    assert found.metadata.class_counts == (tuple(counts[name] for name in names) if set(names) <= set(OLD) else None)
    assert torch.equal(found.tensors["pool.prompts"], content.tensors["pool.prompts"])
