"""Prompt files that are as they should be: round trips, equal bytes, the right backbone, atomic writing.

Not here: files that are broken or hostile (`test_checkpoint_hostile.py`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

from lpt_peft import LongTailPromptAdapter
from lpt_peft.checkpoint import (
    decode,
    encode,
    load_prompts,
    parse_config,
    pretrained,
    read_prompt_file,
    save_prompts,
    write_prompt_file,
)
from lpt_peft.checkpoint.files import write_pair
from lpt_peft.config import PromptMetadata
from lpt_peft.errors import (
    BackboneError,
    BackboneMismatchError,
    ConfigError,
    InputError,
    PromptFileError,
    PromptFileFormatError,
    PromptFileIntegrityError,
    StateError,
)
from lpt_peft.prompting import Prompted
from tests.conftest import tiny_vit

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NAMES = {"config.json", "prompts.safetensors"}
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
}


def tiny_adapter(phase="group", seed=0, dtype=torch.float32, **options):
    adapter = LongTailPromptAdapter.wrap(tiny_vit(**options), prompt_length=3, pool_size=5, top_k=2)
    for learnt in (adapter.shared, adapter.pool, adapter.head):
        learnt.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    adapter.load_adapter_state_dict(
        {name: torch.randn(shape, generator=generator) for name, shape in adapter.prompt_config.tensor_shapes.items()}
    )
    adapter.phase = phase
    return adapter.eval()


@cache
def encoded(seed=0):
    return encode(tiny_adapter(seed=seed))


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def snapshot(vit):
    tensors = {name: (tensor.clone(), tensor.dtype) for name, tensor in vit.state_dict().items()}
    return tensors, [type(module) for module in vit.modules()], [p.requires_grad for p in vit.parameters()]


def same(left, right):
    equal = left[0].keys() == right[0].keys() and all(
        torch.equal(left[0][name][0], right[0][name][0]) and left[0][name][1] == right[0][name][1] for name in left[0]
    )
    return equal and left[1:] == right[1:]


# -- round trips ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("phase", ["shared", "group"])
def test_a_fresh_adapter_gives_the_same_logits_and_saves_the_same_bytes(tmp_path, phase, dtype):
    adapter = tiny_adapter(phase, dtype=dtype)
    adapter.save_pretrained(tmp_path / "a", **OPTIONS)
    assert contents(tmp_path / "a").keys() == NAMES

    twin = LongTailPromptAdapter.from_pretrained(tmp_path / "a", tiny_vit())
    assert twin.phase == phase
    assert not twin.training
    for name, tensor in adapter.adapter_state_dict().items():
        assert twin.get_parameter(name).dtype == dtype
        assert torch.equal(twin.get_parameter(name), tensor)
    assert torch.equal(adapter(IMAGES), twin(IMAGES))

    twin.save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_16_bit_backbone(tmp_path):
    adapter = LongTailPromptAdapter.wrap(tiny_vit().bfloat16()).eval()
    save_prompts(adapter, tmp_path)
    twin = load_prompts(tmp_path, tiny_vit().bfloat16())
    assert torch.equal(adapter(IMAGES.bfloat16()), twin(IMAGES.bfloat16()))
    with pytest.raises(BackboneMismatchError, match="other weights"):
        load_prompts(tmp_path, tiny_vit())


def test_another_process_reads_the_same_logits(tmp_path):
    adapter = tiny_adapter()
    save_prompts(adapter, tmp_path)
    program = (
        "import sys, torch\n"
        "from lpt_peft import LongTailPromptAdapter\n"
        "from tests.conftest import tiny_vit\n"
        "torch.set_num_threads(1)\n"
        "images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))\n"
        "adapter = LongTailPromptAdapter.from_pretrained(sys.argv[1], tiny_vit())\n"
        "torch.save(adapter(images).detach(), sys.argv[2])\n"
    )
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    out = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", program, tmp_path, out], cwd=root, env=environment, check=True)
    assert torch.equal(torch.load(out), adapter(IMAGES))


def test_the_file_says_all_of_the_format(tmp_path):
    adapter = tiny_adapter()
    save_prompts(adapter, tmp_path, **OPTIONS)
    text = (tmp_path / "config.json").read_text("utf-8")
    config = json.loads(text)
    assert text == json.dumps(config, sort_keys=True, ensure_ascii=False, indent=2) + "\n"
    assert config.keys() == {
        *("format", "format_version", "library_version", "prompt", "head", "class_counts", "preprocess"),
        *("backbone", "tensors", "weights", "training"),
    }
    assert (config["format"], config["format_version"]) == ("lpt_peft-prompts", 1)
    assert config["prompt"] == {
        **{"prompt_length": 3, "shared_layers": 1, "pool_size": 5, "top_k": 2, "dim": 24, "depth": 2},
        "phase": "group",
    }
    assert config["head"] == {"num_classes": 7, "logit_scale": 20.0, "label_names": OPTIONS["label_names"]}
    assert config["class_counts"] == OPTIONS["class_counts"]
    assert config["training"] == OPTIONS["training"]
    assert config["preprocess"].keys() == {"input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"}
    assert config["preprocess"]["input_size"] == [3, 32, 32]
    assert config["backbone"].keys() == {
        *("library", "library_version", "architecture", "pretrained_tag", "hub_id", "hub_revision", "model_args"),
        *("embed_dim", "depth", "num_heads", "num_parameters", "fingerprint", "fingerprint_algorithm"),
    }
    assert config["backbone"]["fingerprint"] == adapter.fingerprint
    assert config["tensors"] == {
        "head.weight": {"dtype": "F32", "shape": [7, 24]},
        "pool.keys": {"dtype": "F32", "shape": [5, 24]},
        "pool.prompts": {"dtype": "F32", "shape": [5, 1, 3, 24]},
        "shared.prompts": {"dtype": "F32", "shape": [2, 3, 24]},
    }
    weights = (tmp_path / "prompts.safetensors").read_bytes()
    assert config["weights"] == {"size": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}


def test_safetensors_itself_reads_the_file(tmp_path):
    adapter = tiny_adapter(dtype=torch.bfloat16)
    adapter.head.float()  # dtypes may differ
    save_prompts(adapter, tmp_path, **OPTIONS)
    config = json.loads((tmp_path / "config.json").read_bytes())
    with safe_open(tmp_path / "prompts.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert metadata.keys() == {"format", "lpt_peft"}
    assert metadata["format"] == "pt"
    del config["weights"]
    assert json.loads(metadata["lpt_peft"]) == config
    learnt = adapter.adapter_state_dict()
    assert tensors.keys() == learnt.keys()
    assert all(torch.equal(tensors[name], learnt[name]) for name in learnt)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16, torch.float32}
    assert torch.equal(load_prompts(tmp_path, tiny_vit())(IMAGES), adapter(IMAGES))


def test_equal_adapters_give_equal_bytes():
    adapter = tiny_adapter()
    assert len({encode(copy.deepcopy(adapter), **OPTIONS) for _ in range(20)}) == 1
    config, weights = encode(tiny_adapter(), **OPTIONS)
    assert encode(adapter, **OPTIONS) == (config, weights)
    length = int.from_bytes(weights[:8], "little")
    header = weights[8 : 8 + length].decode()
    assert header.rstrip(" ") == json.dumps(
        json.loads(header), sort_keys=True, ensure_ascii=False, separators=(",", ":")
    )
    reordered = {
        name: dict(reversed(value.items())) if name == "training" else value for name, value in OPTIONS.items()
    }
    assert encode(tiny_adapter(), **reordered) == (config, weights)


def test_the_tensors_are_aligned_to_eight_bytes():
    adapter = tiny_adapter()
    for length in range(8):
        weights = encode(adapter, training={"x": "y" * length})[1]
        assert int.from_bytes(weights[:8], "little") % 8 == 0


def test_the_layout_of_memory_leaves_no_trace():
    adapter, plain = tiny_adapter(), encoded()
    weight = adapter.head.weight
    weight.data = weight.data.t().contiguous().t()  # equal, not contiguous
    both = torch.cat([adapter.pool.keys.data, adapter.pool.keys.data])
    adapter.pool.keys.data = both[:5]
    assert encode(adapter) == plain


def test_files_that_are_there_already_are_not_touched(tmp_path):
    save_prompts(tiny_adapter(), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    time.sleep(0.01)
    save_prompts(tiny_adapter(), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    (tmp_path / "README.md").write_text("mine")
    save_prompts(tiny_adapter(seed=1), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert contents(tmp_path).keys() == NAMES | {"README.md"}


def test_new_files_have_ordinary_permissions(tmp_path):
    (tmp_path / "ordinary").write_text("")
    save_prompts(tiny_adapter(), tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_a_folder_is_made_and_links_are_followed(tmp_path):
    save_prompts(tiny_adapter(), tmp_path / "deep" / "blobs")
    links = tmp_path / "links"
    links.mkdir()
    for name in NAMES:
        (links / name).symlink_to(tmp_path / "deep" / "blobs" / name)
    assert read_prompt_file(links).config == read_prompt_file(str(tmp_path / "deep" / "blobs")).config


# -- metadata ---------------------------------------------------------------------------------------------


def test_metadata_travels_with_the_adapter_and_options_replace_it(tmp_path):
    save_prompts(tiny_adapter(), tmp_path, **OPTIONS)
    loaded = load_prompts(tmp_path, tiny_vit())
    assert loaded.metadata == PromptMetadata(
        class_counts=tuple(OPTIONS["class_counts"]),
        label_names=tuple(OPTIONS["label_names"]),
        training=OPTIONS["training"],
    )
    config = parse_config(encode(copy.deepcopy(loaded), training={})[0])
    assert (config["training"], config["class_counts"]) == ({}, OPTIONS["class_counts"])
    loaded.metadata = PromptMetadata()
    assert encode(loaded) == encoded()


@pytest.mark.parametrize("counts", [torch.arange(7), torch.arange(7).numpy(), range(7), iter(range(7))])
def test_class_counts_of_any_kind(counts):
    assert parse_config(encode(tiny_adapter(), class_counts=counts)[0])["class_counts"] == list(range(7))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_counts": [1, 2, 3]}, "class_counts has 3 entries.*7 classes"),
        ({"class_counts": [1, 2, 3, 4, 5, 6, -7]}, r"class_counts\[6\]=-7 must be .* at least 0"),
        ({"class_counts": [1.5] * 7}, "class_counts must hold one whole number"),
        ({"class_counts": 7}, "class_counts must hold"),
        ({"label_names": ["a"]}, "label_names has 1 entries"),
        ({"label_names": "classes"}, "label_names must be a list"),
        ({"label_names": [0] * 7}, "label_names must be a list"),
        ({"label_names": [""] * 7}, r"label_names\[0\]='' must be text"),
        ({"label_names": ["x" * 1025] * 7}, "1 to 1024 characters"),
        ({"label_names": ["\ud800"] * 7}, "plain JSON.*surrogates"),
        ({"training": {"loss": float("nan")}}, "plain JSON"),
        ({"training": {"when": object()}}, "plain JSON.*object"),
        ({"training": {1: "a", "1": "b"}}, "plain JSON"),
        ({"training": [1]}, "training=.1. must be an object"),
        ({"training": {"x": "y" * 2**16}}, "training has .* at most 65536"),
        ({"training": {"x": 2**70}}, "64 bits"),
    ],
)
def test_options_that_cannot_be_stored_are_refused_before_anything_is_written(tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        save_prompts(tiny_adapter(), tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_training_that_nests_too_deep_or_in_a_circle():
    deep = {}
    for _ in range(40):
        deep = {"x": deep}
    circle = {}
    circle["x"] = circle
    for training in (deep, circle):
        with pytest.raises(InputError, match="plain JSON"):
            encode(tiny_adapter(), training=training)


def test_a_configuration_too_large_to_be_read_is_not_written():
    adapter = LongTailPromptAdapter.wrap(tiny_vit(), 2000, prompt_length=1, pool_size=2)
    with pytest.raises(InputError, match="shorten label_names"):
        encode(adapter, label_names=["x" * 1000] * 2000)
    adapter.metadata = PromptMetadata(label_names=("n" * 200,) * 2000)  # fits as text, and twice with its escapes
    assert len(encode(adapter)[0]) < 2**20
    with pytest.raises(InputError, match="the header takes .* shorten label_names"):
        encode(adapter, label_names=['"' * 200] * 2000)
    adapter = LongTailPromptAdapter.wrap(tiny_vit(), 160_000, prompt_length=1, pool_size=2)
    with pytest.raises(InputError, match=r"config\.json takes .* leave class_counts out"):
        encode(adapter, class_counts=[0] * 160_000)


def test_a_state_that_the_format_has_no_place_for(tmp_path):
    with pytest.raises(StateError, match=r"float64.*adapter\.float\(\)"):
        save_prompts(tiny_adapter(dtype=torch.float64), tmp_path / "new")
    for value in (float("nan"), float("-inf")):
        adapter = tiny_adapter()
        adapter.pool.keys.data[0, 0] = value
        with pytest.raises(StateError, match=r"pool\.keys holds NaN or infinity"):
            save_prompts(adapter, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# -- the backbone -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    save_prompts(tiny_adapter(), tmp_path / "saved", **OPTIONS)
    return tmp_path / "saved"


def other_weights():
    vit = tiny_vit()
    vit.blocks[1].mlp.fc1.weight.data[0, 0] += 1e-6
    return vit


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (other_weights, "same architecture, other weights: was pretrained=True forgotten"),
        (lambda: tiny_vit().half(), "cast, to torch.float16"),
        (lambda: tiny_vit(depth=3), r"3 blocks.*another architecture"),
        (lambda: tiny_vit(embed_dim=48), "width 48"),
        (lambda: tiny_vit(num_heads=4), "2 heads.*4 heads"),
        (lambda: timm.create_model("test_vit"), "VisionTransformer .*given is test_vit"),
    ],
    ids=["weights", "cast", "depth", "width", "heads", "architecture"],
)
def test_another_backbone_is_refused_and_stays_as_it_was(saved, build, words):
    vit = build()
    before = snapshot(vit)
    with pytest.raises(BackboneMismatchError, match=words):
        load_prompts(saved, vit)
    assert same(before, snapshot(vit))
    LongTailPromptAdapter.wrap(vit, 7)  # it still takes prompts


def test_the_head_of_the_backbone_does_not_matter(saved):
    vit = tiny_vit()
    vit.reset_classifier(3)
    assert torch.equal(load_prompts(saved, vit)(IMAGES), tiny_adapter()(IMAGES))


def test_warn_and_off(saved, monkeypatch):
    with pytest.warns(UserWarning, match="other weights"):
        load_prompts(saved, other_weights(), check_backbone="warn")
    monkeypatch.setattr(pretrained, "fingerprint", lambda tensors: pytest.fail("computed"))
    load_prompts(saved, other_weights(), check_backbone="off")
    vit = tiny_vit(depth=3)
    before = snapshot(vit)
    with pytest.raises(ConfigError, match="2 blocks"):
        load_prompts(saved, vit, check_backbone="off")
    assert same(before, snapshot(vit))


def test_loading_onto_a_wrapped_vit_leaves_its_adapter_in_place(saved):
    adapter = tiny_adapter()
    logits = adapter(IMAGES)
    with pytest.raises(BackboneError, match="already takes prompts"):
        load_prompts(saved, adapter.vit)
    assert torch.equal(adapter(IMAGES), logits)


def test_arguments_of_load(saved):
    with pytest.raises(ConfigError, match=r"VisionTransformer.*from_pretrained\(folder, vit\)"):
        LongTailPromptAdapter.from_pretrained(saved)
    with pytest.raises(ConfigError, match="check_backbone='no'"):
        load_prompts(saved, tiny_vit(), check_backbone="no")
    vit = tiny_vit()
    before = snapshot(vit)
    with pytest.raises(ConfigError, match="head_dropout"):
        load_prompts(saved, vit, head_dropout=1.0)
    assert same(before, snapshot(vit))
    assert load_prompts(saved, vit.train(), head_dropout=0.3).head_drop.p == 0.3
    assert any(isinstance(module, Prompted) for module in vit.modules())


def test_loading_draws_no_random_numbers(saved):
    vit, state = tiny_vit(), torch.get_rng_state()
    load_prompts(saved, vit)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_failure_after_attaching_gives_the_vit_back(saved, monkeypatch):
    def fail(self, tensors):
        raise MemoryError

    vit = tiny_vit()
    before = snapshot(vit)
    monkeypatch.setattr(LongTailPromptAdapter, "load_adapter_state_dict", fail)
    with pytest.raises(MemoryError):
        load_prompts(saved, vit)
    assert same(before, snapshot(vit))


# -- writing ----------------------------------------------------------------------------------------------


class Fault:
    """Lets calls through to `call`; the n-th raises `error`, when it is done if `late`, else instead of its work."""

    def __init__(self, call, nth, error, late=False):
        self.call, self.left, self.error, self.late = call, nth, error, late

    def __call__(self, *arguments):
        self.left -= 1
        if self.left == 0 and not self.late:
            raise self.error
        answer = self.call(*arguments)
        if self.left == 0:
            raise self.error
        return answer


# Two files flushed, old configuration aside, weights, configuration into place, folder flushed.
@pytest.mark.parametrize(
    ("step", "nth", "late", "left"),
    [
        *(("open", 1, False, "old"), ("open", 2, False, "old"), ("fsync", 1, False, "old"), ("fsync", 2, False, "old")),
        *(("replace", 1, False, "old"), ("replace", 1, True, "old"), ("replace", 2, False, "old")),
        *(("replace", 2, True, "new"), ("replace", 3, False, "new"), ("replace", 3, True, "new")),
        ("fsync", 3, False, "new"),
    ],
)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "break"])
def test_a_write_that_fails_leaves_the_old_pair_or_the_new(tmp_path, monkeypatch, step, nth, late, left, error):
    pairs = {"old": encoded(0), "new": encoded(1)}
    write_prompt_file(tmp_path, *pairs["old"])
    with monkeypatch.context() as patch:
        if step == "fsync":
            patch.setattr(os, "fsync", Fault(os.fsync, nth, error))
        elif step == "replace":
            fault = Fault(Path.replace, nth, error, late)
            patch.setattr(Path, "replace", lambda *paths: fault(*paths))
        else:
            original = Path.open
            fault = Fault(original, nth, error)
            patch.setattr(Path, "open", lambda *call: fault(*call))
        with pytest.raises(type(error)):
            write_pair(tmp_path, *pairs["new"])
    assert contents(tmp_path).keys() <= NAMES
    assert contents(tmp_path) == dict(zip(("config.json", "prompts.safetensors"), pairs[left], strict=True))
    write_pair(tmp_path, *pairs["new"])
    assert read_prompt_file(tmp_path).config == decode(*pairs["new"]).config


@pytest.mark.parametrize(("nth", "left"), [(2, set()), (3, NAMES)])
def test_a_first_write_that_fails_leaves_nothing_or_all(tmp_path, monkeypatch, nth, left):
    fault = Fault(Path.replace, nth, OSError(5, "Input/output error"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *paths: fault(*paths))
        with pytest.raises(OSError, match="Input/output error"):
            save_prompts(tiny_adapter(), tmp_path)
    assert contents(tmp_path).keys() == left
    if left:
        read_prompt_file(tmp_path)


def test_names_taken_by_something_else_are_left_alone(tmp_path):
    for name in sorted(NAMES):
        folder = tmp_path / f"with {name}"
        (folder / name).mkdir(parents=True)
        with pytest.raises(PromptFileFormatError, match="not a regular file"):
            save_prompts(tiny_adapter(), folder)
        assert [path.name for path in folder.iterdir()] == [name]


def test_unreadable_bytes_are_never_written(tmp_path):
    config, weights = encoded()
    with pytest.raises(PromptFileIntegrityError):
        write_prompt_file(tmp_path / "new", config, weights[:-1])
    assert not (tmp_path / "new").exists()


def test_a_reader_beside_a_writer_sees_one_pair_or_the_other(tmp_path):
    pairs = [encoded(0), encoded(1)]
    wanted = [decode(*pair) for pair in pairs]
    write_pair(tmp_path, *pairs[0])
    stop = threading.Event()

    def write():
        turn = 0
        while not stop.is_set():
            turn += 1
            write_pair(tmp_path, *pairs[turn % 2])

    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    try:
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            found = read_prompt_file(tmp_path)
            seen.append([found.config["weights"] == want.config["weights"] for want in wanted].index(True))
            want = wanted[seen[-1]]
            assert all(torch.equal(tensor, want.tensors[name]) for name, tensor in found.tensors.items())
    finally:
        stop.set()
        writer.join()
    assert set(seen) == {0, 1}


def test_a_reader_waits_for_a_save_that_is_under_way(tmp_path):
    config, weights = encoded()
    (tmp_path / "prompts.safetensors").write_bytes(weights)
    timer = threading.Timer(0.03, lambda: (tmp_path / "config.json").write_bytes(config))
    timer.start()
    assert read_prompt_file(tmp_path).config == parse_config(config)
    timer.join()


def test_a_broken_file_at_rest_is_refused_at_once(tmp_path, monkeypatch):
    config, weights = encoded()
    write_pair(tmp_path, config, weights[:-1])
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited"))
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(PromptFileError):
            read_prompt_file(folder)


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
    assert torch.equal(load_prompts(tmp_path / "second", right)(images), adapter.eval()(images))
    with pytest.raises(BackboneMismatchError):
        load_prompts(tmp_path / "second", tiny_vit())


def test_a_subclass_reads_as_what_it_is(saved):
    class Mine(LongTailPromptAdapter):
        pass

    assert type(Mine.from_pretrained(saved, tiny_vit())) is Mine
    assert type(Mine.wrap(tiny_vit())) is Mine
