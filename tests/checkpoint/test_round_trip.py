"""Valid prompt files: round trips, equal bytes, metadata, and the comparison of backbones.

Not here: writing to disk (`test_writing.py`), damaged and hostile files (`test_hostile.py`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

from lpt_peft import LongTailPromptAdapter
from lpt_peft.checkpoint import decode, encode, match, read_prompt_file
from lpt_peft.config import PromptMetadata
from lpt_peft.errors import BackboneError, BackboneMismatchError, ConfigError, InputError, StateError
from lpt_peft.prompting import Prompted
from tests.checkpoint.adapters import (
    IMAGES,
    NAMES,
    contents,
    encode_adapter,
    same_snapshot,
    snapshot,
    tiny_adapter,
    tiny_encoded,
)
from tests.conftest import tiny_vit

from_pretrained = LongTailPromptAdapter.from_pretrained
OPTIONS = {
    "class_counts": [90, 40, 17, 8, 3, 1, 0],
    "label_names": ["cat", "chien", "кот", "猫", 'quo"te', "\\", "\U0001f431"],
    "training": {
        "seed": 3,
        "lr": 0.1,
        "many": 1e-17,
        "history": [1, 2.0, None, True],
        "nested": {"ü": []},
        "[" * 40: "{" * 40,
    },
    "preprocess": {"exif": False, "background": (0, 128, 255), "crop_pct": 0.9},
}


# -- round trips ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("phase", ["shared", "group"])
def test_a_fresh_adapter_gives_the_same_logits_and_saves_the_same_bytes(tmp_path, phase, dtype):
    adapter = tiny_adapter(phase, dtype=dtype)
    adapter.pool.usage.copy_(torch.tensor([5, 0, 2**40, 1, 0]))
    adapter.save_pretrained(tmp_path / "a", **OPTIONS)
    assert contents(tmp_path / "a").keys() == NAMES

    twin = from_pretrained(tmp_path / "a", tiny_vit())
    assert twin.phase == phase
    for name, tensor in adapter.adapter_state_dict().items():
        assert twin.get_parameter(name).dtype == dtype
        assert torch.equal(twin.get_parameter(name), tensor)
    assert torch.equal(adapter(IMAGES), twin(IMAGES))
    assert torch.equal(adapter.pool.usage, twin.pool.usage)

    twin.save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("training", [True, False])
def test_a_loaded_adapter_is_in_eval_mode(tmp_path, training):
    tiny_adapter().save_pretrained(tmp_path)
    vit = tiny_vit().train(training)
    adapter = from_pretrained(tmp_path, vit)
    assert not any(module.training for module in adapter.modules())
    assert torch.equal(adapter(IMAGES), adapter(IMAGES))
    assert torch.equal(adapter(IMAGES), tiny_adapter()(IMAGES))
    trained = tiny_adapter().train(training)
    trained.load_prompts(tmp_path)  # keeps the mode: it replaces prompts of an adapter that may be training
    assert trained.training is training


def test_a_16_bit_backbone(tmp_path):
    adapter = LongTailPromptAdapter.wrap(tiny_vit().bfloat16()).eval()
    adapter.save_pretrained(tmp_path)
    twin = from_pretrained(tmp_path, tiny_vit().bfloat16())
    assert torch.equal(adapter(IMAGES.bfloat16()), twin(IMAGES.bfloat16()))
    with pytest.raises(BackboneMismatchError, match="other weights"):
        from_pretrained(tmp_path, tiny_vit())


def test_the_dtype_of_the_run_is_recorded_and_kept(tmp_path):
    adapter = tiny_adapter()
    assert encode_adapter(adapter).config["backbone"]["dtype"] == "float32"
    adapter.cast_backbone(torch.bfloat16)
    adapter.save_pretrained(tmp_path / "a")
    assert read_prompt_file(tmp_path / "a").metadata.backbone_dtype == "bfloat16"
    twin = from_pretrained(tmp_path / "a", tiny_vit())  # the fingerprint is that of the original weights
    twin.save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_another_process_reads_the_same_logits(tmp_path):
    adapter = tiny_adapter()
    adapter.save_pretrained(tmp_path)
    program = (
        "import sys, torch\n"
        "from lpt_peft import LongTailPromptAdapter\n"
        "from tests.conftest import tiny_vit\n"
        "torch.set_num_threads(1)\n"
        "images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))\n"
        "adapter = LongTailPromptAdapter.from_pretrained(sys.argv[1], tiny_vit())\n"
        "torch.save(adapter(images).detach(), sys.argv[2])\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    out = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", program, tmp_path, out], cwd=root, env=environment, check=True)
    assert torch.equal(torch.load(out), adapter(IMAGES))


def test_the_configuration_has_every_key_of_the_format(tmp_path):
    adapter = tiny_adapter()
    adapter.metadata = PromptMetadata(temperature=1.5)
    adapter.save_pretrained(tmp_path, **OPTIONS)
    text = (tmp_path / "config.json").read_text("utf-8")
    config = json.loads(text)
    assert text == json.dumps(config, sort_keys=True, ensure_ascii=False, indent=2) + "\n"
    assert config.keys() == {
        *("format", "format_version", "library_version", "prompt", "head", "class_counts", "preprocess"),
        *("backbone", "tensors", "training", "data_sha256"),
    }
    assert (config["format"], config["format_version"]) == ("lpt_peft-prompts", 2)
    assert config["prompt"] == {
        **{"prompt_length": 3, "shared_layers": 1, "pool_size": 5, "top_k": 2, "dim": 24, "depth": 2},
        "phase": "group",
    }
    assert config["head"] == {
        "num_classes": 7,
        "logit_scale": 20.0,
        "label_names": OPTIONS["label_names"],
        "temperature": 1.5,
    }
    assert config["class_counts"] == OPTIONS["class_counts"]
    assert config["training"] == OPTIONS["training"]
    assert config["preprocess"] == {
        **{"input_size": [3, 32, 32], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        **{"interpolation": "bicubic", "crop_mode": "center", "crop_pct": 0.9},
        **{"exif": False, "background": [0, 128, 255]},
    }
    assert config["backbone"].keys() == {
        *("library", "library_version", "architecture", "pretrained_tag", "hub_id", "hub_revision", "model_args"),
        *("embed_dim", "depth", "num_heads", "num_parameters", "fingerprint", "fingerprint_algorithm", "dtype"),
    }
    assert config["backbone"]["fingerprint"] == adapter.fingerprint
    assert config["tensors"] == {
        "head.weight": {"dtype": "F32", "shape": [7, 24]},
        "pool.keys": {"dtype": "F32", "shape": [5, 24]},
        "pool.prompts": {"dtype": "F32", "shape": [5, 1, 3, 24]},
        "pool.usage": {"dtype": "I64", "shape": [5]},
        "shared.prompts": {"dtype": "F32", "shape": [2, 3, 24]},
    }
    weights = (tmp_path / "prompts.safetensors").read_bytes()
    start = 8 + int.from_bytes(weights[:8], "little")
    assert config["data_sha256"] == hashlib.sha256(weights[start:]).hexdigest()


def test_safetensors_itself_reads_the_file(tmp_path):
    adapter = tiny_adapter(dtype=torch.bfloat16)
    adapter.head.float()  # dtypes may differ
    adapter.save_pretrained(tmp_path, **OPTIONS)
    with safe_open(tmp_path / "prompts.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert metadata.keys() == {"format", "lpt_peft", "header_sha256"}
    assert metadata["format"] == "pt"
    assert json.loads(metadata["lpt_peft"]) == json.loads((tmp_path / "config.json").read_bytes())
    trained = {**adapter.adapter_state_dict(), "pool.usage": torch.zeros(5, dtype=torch.int64)}
    assert tensors.keys() == trained.keys()
    assert all(torch.equal(tensors[name], trained[name]) for name in trained)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16, torch.float32, torch.int64}
    assert torch.equal(from_pretrained(tmp_path, tiny_vit())(IMAGES), adapter(IMAGES))


def test_equal_adapters_give_equal_bytes():
    adapter = tiny_adapter()
    assert len({encode_adapter(copy.deepcopy(adapter), **OPTIONS).weights for _ in range(20)}) == 1
    encoded = encode_adapter(tiny_adapter(), **OPTIONS)
    assert encode_adapter(adapter, **OPTIONS) == encoded
    length = int.from_bytes(encoded.weights[:8], "little")
    header = encoded.weights[8 : 8 + length].decode()
    assert header.rstrip(" ") == json.dumps(
        json.loads(header), sort_keys=True, ensure_ascii=False, separators=(",", ":")
    )
    reordered = {**OPTIONS, "training": dict(reversed(OPTIONS["training"].items()))}
    assert encode_adapter(tiny_adapter(), **reordered) == encoded
    assert encode(decode(encoded.weights)) == encoded


def test_the_tensors_are_aligned_to_eight_bytes():
    adapter = tiny_adapter()
    for length in range(8):
        weights = encode_adapter(adapter, training={"x": "y" * length}).weights
        assert int.from_bytes(weights[:8], "little") % 8 == 0


def test_the_memory_layout_does_not_change_the_bytes():
    adapter = tiny_adapter()
    weight = adapter.head.weight
    weight.data = weight.data.t().contiguous().t()  # equal, not contiguous
    both = torch.cat([adapter.pool.keys.data, adapter.pool.keys.data])
    adapter.pool.keys.data = both[:5]
    assert encode_adapter(adapter) == tiny_encoded()


# -- usage counts -----------------------------------------------------------------------------------------


def test_dead_groups_are_known_right_after_loading(tmp_path):
    adapter = tiny_adapter().train()
    chosen = set(adapter(IMAGES[:1], return_output=True).groups.flatten().tolist())
    dead = adapter.pool.dead_groups()
    assert dead == sorted(set(range(5)) - chosen)
    assert len(dead) == 3
    adapter.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, tiny_vit())
    assert loaded.pool.dead_groups() == dead
    other = tiny_adapter(seed=1)
    other.load_prompts(tmp_path, part="shared")
    with pytest.raises(StateError, match="no image was counted"):  # its own pool, which was never trained
        other.pool.dead_groups()
    other.load_prompts(tmp_path)
    assert other.pool.dead_groups() == dead


def test_a_file_without_usage_counts_says_that_they_are_unknown(tmp_path):
    content = decode(tiny_encoded().weights)
    tensors = {name: tensor for name, tensor in content.tensors.items() if name != "pool.usage"}
    encoded = encode(replace(content, tensors=tensors))
    (tmp_path / "prompts.safetensors").write_bytes(encoded.weights)
    adapter = from_pretrained(tmp_path, tiny_vit())
    with pytest.raises(StateError, match=r"usage of the groups is unknown.*reset_usage"):
        adapter.pool.dead_groups()
    adapter.train()(IMAGES)  # counts of a part of the training would mislead
    with pytest.raises(StateError, match="unknown"):
        adapter.pool.dead_groups()
    assert encode_adapter(adapter) == encoded  # and they stay unknown
    adapter.pool.reset_usage()
    adapter(IMAGES)
    assert len(adapter.pool.dead_groups()) < 5


# -- metadata ---------------------------------------------------------------------------------------------


def test_metadata_is_kept_between_files_and_arguments_replace_it(tmp_path):
    adapter = tiny_adapter()
    adapter.metadata = PromptMetadata(temperature=0.5)
    adapter.save_pretrained(tmp_path, **OPTIONS)
    loaded = from_pretrained(tmp_path, tiny_vit())
    assert loaded.metadata.class_counts == tuple(OPTIONS["class_counts"])
    assert loaded.metadata.label_names == tuple(OPTIONS["label_names"])
    assert loaded.metadata.training == OPTIONS["training"]
    assert loaded.metadata.temperature == 0.5
    assert (loaded.metadata.preprocess["exif"], loaded.metadata.preprocess["crop_pct"]) == (False, 0.9)
    config = encode_adapter(copy.deepcopy(loaded), training={}, preprocess={"crop_pct": 1.0}).config
    assert (config["training"], config["class_counts"]) == ({}, OPTIONS["class_counts"])
    assert (config["preprocess"]["exif"], config["preprocess"]["crop_pct"]) == (False, 1.0)
    loaded.metadata = PromptMetadata()
    assert encode_adapter(loaded) == tiny_encoded()


def test_optional_keys_may_be_absent(tmp_path):
    content = read_prompt_file_of(tiny_encoded().weights, tmp_path)
    assert content.metadata.temperature is None
    assert not {"exif", "background"} & content.preprocess.keys()


def read_prompt_file_of(weights, folder):
    (folder / "prompts.safetensors").write_bytes(weights)
    return read_prompt_file(folder)


@pytest.mark.parametrize(
    "counts", [torch.arange(7), torch.arange(7).numpy(), range(7), {label: label for label in reversed(range(7))}]
)
def test_class_counts_of_any_kind(counts):
    assert encode_adapter(tiny_adapter(), class_counts=counts).config["class_counts"] == list(range(7))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_counts": [1, 2, 3]}, "class_counts has 3 entries.*7 classes"),
        ({"class_counts": [1, 2, 3, 4, 5, 6, -7]}, r"class_counts\[6\]=-7 must be .* at least 0"),
        ({"class_counts": [1.5] * 7}, "class_counts must be one integer per class"),
        ({"class_counts": 7}, "class_counts must be one integer per class"),
        ({"label_names": ["a"]}, "label_names has 1 entries"),
        ({"label_names": "classes"}, "label_names must be one string per class"),
        ({"label_names": [0] * 7}, r"label_names\[0\]=0 must be a string"),
        ({"label_names": ["", *"abcdef"]}, r"label_names\[0\]='' must be text"),
        ({"label_names": ["x" * 1025, *"abcdef"]}, "1 to 1024 characters"),
        (
            {"label_names": ["\ud800", *"abcdef"]},
            r"head\.label_names\[0\]='\\ud800' must be plain JSON, .*surrogates \(U\+D800\)",
        ),
        ({"training": {"loss": float("nan")}}, r"training\.loss=nan must be plain JSON, which has finite numbers only"),
        ({"training": {"a": [1, {"b": float("inf")}]}}, r"training\.a\[1\]\.b=inf must be plain JSON"),
        ({"training": {"when": object()}}, r"training\.when=<object .* must be plain JSON, which has no object"),
        ({"training": {"lr": torch.tensor(1)}}, r"training\.lr=tensor\(1\) .* has no Tensor: pass \.item\(\)"),
        ({"training": {"x": "\udce9"}}, r"training\.x='\\udce9' must be plain JSON, .*surrogates \(U\+DCE9\)"),
        ({"training": {"\ud800": 1}}, r"a key of training='\\ud800' must be plain JSON"),
        ({"training": {1: "a", "1": "b"}}, r"training=\{.*must be plain JSON, whose keys are text"),
        ({"training": {"a": {(1, 2): 3}}}, r"a key of training\.a=\(1, 2\) must be plain JSON, whose keys are text"),
        ({"training": [1]}, "training=.1. must be an object"),
        ({"training": {"x": "y" * 2**16}}, "training has .* at most 65536"),
        ({"training": {"x": 2**70}}, "64 bits"),
        ({"preprocess": {"exif": 1}}, "preprocess.exif=1 must be true or false"),
        ({"preprocess": {"background": (0, 0, 256)}}, r"background\[2\]=256 must be an integer .* at most 255"),
        ({"preprocess": {"background": (0, 0)}}, "background=.* must be a list of 3"),
        ({"preprocess": {"pad": 1}}, r"preprocess has unknown key\(s\) \['pad'\]"),
    ],
)
def test_options_that_cannot_be_stored_are_refused_before_anything_is_written(tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        tiny_adapter().save_pretrained(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_training_that_nests_too_deeply_or_refers_to_itself():
    deep = {}
    for _ in range(40):
        deep = {"x": deep}
    circle = {}
    circle["x"] = circle
    for training in (deep, circle):
        with pytest.raises(InputError, match="plain JSON"):
            encode_adapter(tiny_adapter(), training=training)


def test_a_header_too_large_to_be_read_is_not_written():
    adapter = LongTailPromptAdapter.wrap(tiny_vit(), 2000, prompt_length=1, pool_size=2)
    with pytest.raises(InputError, match="the header takes .* shorten label_names"):
        encode_adapter(adapter, label_names=[f"{label:01000}" for label in range(2000)])
    adapter.metadata = PromptMetadata(label_names=("n" * 200,) * 2000)
    decode(encode_adapter(adapter).weights)
    with pytest.raises(InputError, match="the header takes .* shorten label_names"):
        encode_adapter(
            adapter, label_names=['"' * 200 + str(label) for label in range(2000)]
        )  # four characters each: escaped twice
    adapter = LongTailPromptAdapter.wrap(tiny_vit(), 600_000, prompt_length=1, pool_size=2)
    with pytest.raises(InputError, match="leave class_counts out"):
        encode_adapter(adapter, class_counts=[0] * 600_000)


def test_a_state_that_the_format_cannot_hold(tmp_path):
    with pytest.raises(StateError, match=r"float64.*adapter\.float\(\)"):
        tiny_adapter(dtype=torch.float64).save_pretrained(tmp_path / "new")
    for value in (float("nan"), float("-inf")):
        adapter = tiny_adapter()
        adapter.pool.keys.data[0, 0] = value
        with pytest.raises(StateError, match=r"pool\.keys holds NaN or infinity"):
            adapter.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# -- the backbone -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    tiny_adapter().save_pretrained(tmp_path / "saved", **OPTIONS)
    return tmp_path / "saved"


def other_weights():
    vit = tiny_vit()
    vit.blocks[1].mlp.fc1.weight.data[0, 0] += 1e-6
    return vit


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (other_weights, "same architecture, other weights: was pretrained=True forgotten"),
        (lambda: tiny_vit().half(), "cast to torch.float16"),
        (
            lambda: tiny_vit(img_size=64),
            r"20,712 instead of 19,560 parameters.*for images of 32 x 32 px and this ViT is for 64 x 64 px, so their "
            r"position embeddings differ in size. Build the ViT for 32 x 32 px \(img_size=\)",
        ),
        (lambda: tiny_vit(patch_size=16), "33,096 instead of 19,560 parameters, so it was built with other arguments"),
        (lambda: tiny_vit(in_chans=1), "prompts are for images of 3 channels, this ViT is for 1"),
        (lambda: tiny_vit(depth=3), r"3 blocks.*another architecture"),
        (lambda: tiny_vit(embed_dim=48), "width 48"),
        (lambda: tiny_vit(num_heads=4), "2 heads.*4 heads"),
        (lambda: timm.create_model("test_vit"), "VisionTransformer .*given is test_vit"),
    ],
    ids=["weights", "cast", "image size", "patch size", "channels", "depth", "width", "heads", "architecture"],
)
def test_another_backbone_is_refused_and_stays_as_it_was(saved, build, words):
    vit = build()
    before = snapshot(vit)
    with pytest.raises(BackboneMismatchError, match=words):
        from_pretrained(saved, vit)
    assert same_snapshot(before, snapshot(vit))
    LongTailPromptAdapter.wrap(vit, 7)  # it still takes prompts


def test_the_head_of_the_backbone_does_not_matter(saved):
    vit = tiny_vit()
    vit.reset_classifier(3)
    assert torch.equal(from_pretrained(saved, vit)(IMAGES), tiny_adapter()(IMAGES))


def test_warn_and_off(saved, monkeypatch):
    with pytest.warns(UserWarning, match="other weights"):
        from_pretrained(saved, other_weights(), check_backbone="warn")
    monkeypatch.setattr(match, "fingerprint", lambda tensors: pytest.fail("computed"))
    from_pretrained(saved, other_weights(), check_backbone="off")
    vit = tiny_vit(depth=3)
    before = snapshot(vit)
    with pytest.raises(ConfigError, match="2 blocks"):
        from_pretrained(saved, vit, check_backbone="off")
    assert same_snapshot(before, snapshot(vit))


def test_loading_onto_a_wrapped_vit_leaves_its_adapter_in_place(saved):
    adapter = tiny_adapter()
    logits = adapter(IMAGES)
    with pytest.raises(BackboneError, match="already takes prompts"):
        from_pretrained(saved, adapter.vit)
    assert torch.equal(adapter(IMAGES), logits)


def test_arguments_of_from_pretrained(saved):
    with pytest.raises(ConfigError, match=r"VisionTransformer.*from_pretrained\(folder, vit\)"):
        from_pretrained(saved)
    with pytest.raises(ConfigError, match="check_backbone='no'"):
        from_pretrained(saved, tiny_vit(), check_backbone="no")
    vit = tiny_vit()
    before = snapshot(vit)
    with pytest.raises(ConfigError, match="head_dropout"):
        from_pretrained(saved, vit, head_dropout=1.0)
    assert same_snapshot(before, snapshot(vit))
    assert from_pretrained(saved, vit.train(), head_dropout=0.3).head_drop.p == 0.3
    assert any(isinstance(module, Prompted) for module in vit.modules())


def test_loading_draws_no_random_numbers(saved):
    vit, state = tiny_vit(), torch.get_rng_state()
    from_pretrained(saved, vit)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_failure_after_attaching_restores_the_vit(saved, monkeypatch):
    def fail(self, tensors):
        raise MemoryError

    vit = tiny_vit()
    before = snapshot(vit)
    monkeypatch.setattr(LongTailPromptAdapter, "load_adapter_state_dict", fail)
    with pytest.raises(MemoryError):
        from_pretrained(saved, vit)
    assert same_snapshot(before, snapshot(vit))


@pytest.mark.parametrize("change", ["load_state_dict", "data", "bfloat16"])
def test_a_file_names_the_backbone_as_it_is_at_saving(tmp_path, change):
    vit = tiny_vit()
    adapter = LongTailPromptAdapter.wrap(vit)
    adapter.save_pretrained(tmp_path / "first")
    if change == "load_state_dict":
        vit.load_state_dict(other_weights().state_dict())
    elif change == "data":  # as PEFT merges
        vit.blocks[0].attn.qkv.weight.data += 1
    else:
        vit.to(torch.bfloat16)
    adapter.save_pretrained(tmp_path / "second")
    dtype = vit.pos_embed.dtype
    right = tiny_vit().to(dtype)
    right.load_state_dict(vit.state_dict())
    images = IMAGES.to(dtype)
    assert torch.equal(from_pretrained(tmp_path / "second", right)(images), adapter.eval()(images))
    with pytest.raises(BackboneMismatchError):
        from_pretrained(tmp_path / "second", tiny_vit())


def test_a_subclass_loads_as_itself(saved):
    class Subclass(LongTailPromptAdapter):
        pass

    assert type(Subclass.from_pretrained(saved, tiny_vit())) is Subclass
    assert type(Subclass.wrap(tiny_vit())) is Subclass


def test_only_the_main_process_writes(tmp_path):
    tiny_adapter().save_pretrained(tmp_path / "new", is_main_process=False, save_function=pytest.fail)
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="class_counts"):  # the same errors on every process
        tiny_adapter().save_pretrained(tmp_path / "new", is_main_process=False, class_counts=[1])
