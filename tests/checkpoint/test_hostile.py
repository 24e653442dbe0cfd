"""Prompt files that are broken, of another kind, or made to do harm: each is refused by name, and nothing changes.

The forger below knows the format from its description alone; it shares no code with the library.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import socket
import struct
import threading
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lpt_peft import LongTailPromptAdapter
from lpt_peft.checkpoint import decode, encode, load_prompts, read_prompt_file, tensors
from lpt_peft.errors import (
    PromptFileError,
    PromptFileFormatError,
    PromptFileIntegrityError,
    PromptFileNotFoundError,
    PromptFileTensorError,
    PromptFileVersionError,
)
from tests.conftest import tiny_vit

FORMAT, VERSION, TENSOR = PromptFileFormatError, PromptFileVersionError, PromptFileTensorError
INTEGRITY, MISSING = PromptFileIntegrityError, PromptFileNotFoundError
DELETE = object()


@cache
def good(seed=0):
    """Bytes of a sound pair."""
    adapter = LongTailPromptAdapter.wrap(tiny_vit(), prompt_length=1, pool_size=3)
    generator = torch.Generator().manual_seed(seed)
    adapter.load_adapter_state_dict(
        {name: torch.randn(shape, generator=generator) for name, shape in adapter.prompt_config.tensor_shapes.items()}
    )
    return encode(
        adapter, class_counts=range(7), label_names=list("abcdefg"), training={"seed": seed, "deep": [{"x": 0.5}]}
    )


@dataclass
class Forgery:
    """A sound pair taken apart; `bytes()` puts it together, consistent but for what a case broke."""

    config: dict
    header: dict
    data: bytes

    @classmethod
    def start(cls):
        config, weights = good()
        (length,) = struct.unpack("<Q", weights[:8])
        return cls(json.loads(config), json.loads(weights[8 : 8 + length]), weights[8 + length :])

    def bytes(self, raw_header=None, length=None):
        if raw_header is None:
            raw_header = json.dumps(self.header).encode()
        weights = struct.pack("<Q", len(raw_header) if length is None else length) + raw_header + self.data
        return self.with_weights(weights)

    def with_weights(self, weights):
        self.config["weights"] = {"size": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
        return json.dumps(self.config).encode(), weights

    def sync(self):
        """Give the header the configuration as it now is."""
        content = {key: value for key, value in self.config.items() if key != "weights"}
        self.header["__metadata__"]["lpt_peft"] = json.dumps(content)
        return self


def put(root, path, value):
    *parents, last = path.split("/")
    for key in parents:
        root = root[key]
    if value is DELETE:
        del root[last]
    else:
        root[last] = value


def config(path, value):
    """config.json and the copy in the header say `value`."""

    def forge():
        forgery = Forgery.start()
        put(forgery.config, path, value)
        if path.startswith("weights"):
            return json.dumps(forgery.config).encode(), good()[1]
        return forgery.sync().bytes()

    return forge


def header(path, value):
    """The safetensors header says `value`; size and sha256 are right."""

    def forge():
        forgery = Forgery.start()
        put(forgery.header, path, value)
        return forgery.bytes()

    return forge


def raw_config(edit):
    return lambda: (edit(good()[0]), good()[1])


def raw_header(edit, length=None):
    def forge():
        forgery = Forgery.start()
        return forgery.bytes(edit(json.dumps(forgery.header).encode()), length)

    return forge


def values(number):
    """One value of the first tensor becomes `number`; size and sha256 are right."""

    def forge():
        forgery = Forgery.start()
        forgery.data = forgery.data[:8] + struct.pack("<f", number) + forgery.data[12:]
        return forgery.bytes()

    return forge


def resealed(edit):
    """prompts.safetensors edited, and config.json told so."""
    return lambda: Forgery.start().with_weights(edit(good()[1]))


def tensor(name, spec, data=b""):
    """One tensor more (or less: spec None) everywhere, laid out without a gap."""

    def forge():
        forgery = Forgery.start()
        if spec is None:
            begin, end = forgery.header.pop(name)["data_offsets"]
            del forgery.config["tensors"][name]
            forgery.data = forgery.data[:begin] + forgery.data[end:]
            for other in forgery.header.values():
                if "data_offsets" in other and other["data_offsets"][0] >= end:
                    other["data_offsets"] = [offset - (end - begin) for offset in other["data_offsets"]]
        else:
            forgery.config["tensors"][name] = spec
            offsets = [len(forgery.data), len(forgery.data) + len(data)]
            forgery.header[name] = {**spec, "data_offsets": offsets}
            forgery.data += data
        return forgery.sync().bytes()

    return forge


def swapped_offsets():
    forgery = Forgery.start()
    first, second = (forgery.header[name] for name in ("pool.keys", "pool.prompts"))  # of the same size
    first["data_offsets"] = second["data_offsets"]
    return forgery.bytes()


def gap():
    forgery = Forgery.start()
    forgery.data += b"\0" * 8
    return forgery.bytes()


def other_dtype():
    forgery = Forgery.start()
    for side in (forgery.config["tensors"], forgery.header):
        side["pool.keys"]["dtype"] = "F64"
    return forgery.sync().bytes()


def other_config():
    return good(0)[0], good(1)[1]


def absurd():
    """Consistent sizes that would take 96 TB."""
    forgery = Forgery.start()
    forgery.config["prompt"].update(pool_size=10**6, prompt_length=10**6)
    shapes = {"pool.prompts": [10**6, 1, 10**6, 24], "pool.keys": [10**6, 24], "shared.prompts": [2, 10**6, 24]}
    for name, shape in shapes.items():
        forgery.config["tensors"][name]["shape"] = shape
    return forgery.sync().bytes()


def of_another_save():
    """Only the copy in the header differs: the tensors, the size and the sha256 agree."""
    forgery = Forgery.start()
    forgery.config["training"] = {"seed": 9}
    return forgery.bytes()


def one_for_true():
    """Equal to Python, not to a reader of JSON."""
    forgery = Forgery.start()
    forgery.config["training"] = {"x": 1}
    forgery.sync()
    forgery.config["training"] = {"x": True}
    return forgery.bytes()


def before(old, new):
    def edit(data):
        assert old in data
        return data.replace(old, new, 1)

    return edit


HUGE = b"9" * 5000
CASES = {
    # config.json as bytes
    "config empty": (raw_config(lambda data: b""), FORMAT, "strict JSON"),
    "config blank": (raw_config(lambda data: b" \n"), FORMAT, "strict JSON"),
    "config truncated": (raw_config(lambda data: data[:-3]), FORMAT, "strict JSON"),
    "config with data behind": (raw_config(lambda data: data + b"{}"), FORMAT, "strict JSON: Extra data"),
    "config with BOM": (raw_config(lambda data: b"\xef\xbb\xbf" + data), FORMAT, "BOM"),
    "config UTF-16": (raw_config(lambda data: data.decode().encode("utf-16")), FORMAT, "utf-8"),
    "config not UTF-8": (raw_config(before(b'"F32"', b'"F\xff2"')), FORMAT, "utf-8"),
    "config binary": (raw_config(lambda data: bytes(range(256))), FORMAT, "strict JSON"),
    "config lone surrogate": (raw_config(before(b'"a"', b'"\\ud800"')), FORMAT, "surrogates"),
    "config NaN": (raw_config(before(b"0.5", b"NaN")), FORMAT, "NaN is not a JSON number"),
    "config Infinity": (raw_config(before(b"0.5", b"-Infinity")), FORMAT, "-Infinity is not"),
    "config 1e999": (raw_config(before(b"0.5", b"1e999")), FORMAT, "not finite"),
    "config huge integer": (raw_config(before(b"0.5", HUGE)), FORMAT, "64 bits"),
    "config 65-bit integer": (raw_config(before(b"0.5", str(2**64).encode())), FORMAT, "64 bits"),
    "config duplicate key": (
        raw_config(before(b'"top_k": 2', b'"top_k": 2, "top_k": 2')),
        FORMAT,
        "'top_k' appears twice",
    ),
    "config duplicate at top": (raw_config(lambda data: b'{"format": 1,' + data[1:]), FORMAT, "'format' appears twice"),
    "config deep": (raw_config(before(b"0.5", b"[" * 50 + b"]" * 50)), FORMAT, "nesting deeper than 32"),
    "config very deep": (raw_config(lambda data: b"[" * 500_000), FORMAT, "nesting deeper than 32"),
    "config very deep object": (raw_config(lambda data: b'{"a":' * 100_000), FORMAT, "nesting deeper than 32"),
    "config comment": (raw_config(lambda data: data + b"// hi"), FORMAT, "strict JSON"),
    "config control character": (raw_config(before(b'"a"', b'"\x00"')), FORMAT, "control character"),
    "config a list": (raw_config(lambda data: b"[" + data + b"]"), FORMAT, "must hold a JSON object"),
    "config null": (raw_config(lambda data: b"null"), FORMAT, "must hold a JSON object"),
    "config too large": (raw_config(lambda data: data + b" " * 2**20), FORMAT, "at most 1048576"),
    "config of transformers": (raw_config(lambda data: b'{"model_type": "vit"}'), FORMAT, "not of a prompt file"),
    # config.json as keys
    "format": (config("format", "peft"), FORMAT, "not of a prompt file"),
    "format missing": (config("format", DELETE), FORMAT, "not of a prompt file"),
    "version 2": (config("format_version", 2), VERSION, "(?i)upgrade lpt_peft"),
    "version 2 with new keys": (
        raw_config(lambda data: b'{"format": "lpt_peft-prompts", "format_version": 2, "new": 1}'),
        VERSION,
        "(?i)upgrade lpt_peft",
    ),
    "version 0": (config("format_version", 0), FORMAT, "format_version=0"),
    "version true": (config("format_version", True), FORMAT, "format_version=True"),
    "version text": (config("format_version", "1"), FORMAT, "format_version='1'"),
    "version 1.0": (config("format_version", 1.0), FORMAT, "format_version=1.0"),
    "version missing": (config("format_version", DELETE), FORMAT, "format_version"),
    "unknown at top": (config("auto_map", {}), FORMAT, r"unknown key\(s\) \['auto_map'\]"),
    "unknown in prompt": (config("prompt/init", 0), FORMAT, "prompt has unknown.*'init'"),
    "unknown in head": (config("head/bias", True), FORMAT, "head has unknown.*'bias'"),
    "unknown in preprocess": (config("preprocess/pad", 0), FORMAT, "preprocess has unknown.*'pad'"),
    "unknown in backbone": (config("backbone/url", "x"), FORMAT, "backbone has unknown.*'url'"),
    "unknown in tensors": (config("tensors/pool.keys/offset", 0), FORMAT, r"tensors\.pool\.keys has unknown"),
    "unknown in weights": (config("weights/url", "http://x"), FORMAT, "weights has unknown.*'url'"),
    "missing prompt": (config("prompt", DELETE), FORMAT, r"lacks \['prompt'\]"),
    "missing in backbone": (config("backbone/fingerprint", DELETE), FORMAT, r"backbone .*lacks \['fingerprint'\]"),
    "library_version": (config("library_version", ""), FORMAT, "library_version='' must be text"),
    "library_version long": (config("library_version", "x" * 5000), FORMAT, "1 to 1024"),
    "prompt a list": (config("prompt", []), FORMAT, r"prompt=\[\] must be an object"),
    "top_k true": (config("prompt/top_k", True), FORMAT, r"prompt\.top_k=True must be a whole number"),
    "top_k 2.0": (config("prompt/top_k", 2.0), FORMAT, r"prompt\.top_k=2\.0 must be a whole number"),
    "top_k too large": (config("prompt/top_k", 4), FORMAT, "top_k=4 must be from 1 to 3"),
    "top_k 0": (config("prompt/top_k", 0), FORMAT, "top_k=0"),
    "pool_size negative": (config("prompt/pool_size", -1), FORMAT, r"prompt\.pool_size=-1"),
    "pool_size huge": (config("prompt/pool_size", 10**7), FORMAT, "at most 1000000"),
    "shared_layers": (config("prompt/shared_layers", 2), FORMAT, "shared_layers=2"),
    "shared_layers null": (config("prompt/shared_layers", None), FORMAT, "shared_layers=None"),
    "phase": (config("prompt/phase", "both"), FORMAT, 'phase=\'both\' must be "shared" or "group"'),
    "phase a list": (config("prompt/phase", ["shared"]), FORMAT, "phase="),
    "dim": (config("prompt/dim", 48), FORMAT, "embed_dim"),
    "logit_scale 0": (config("head/logit_scale", 0), FORMAT, "logit_scale=0 must be greater than 0"),
    "logit_scale text": (config("head/logit_scale", "20"), FORMAT, "finite number"),
    "num_classes": (config("head/num_classes", 8), FORMAT, "7 entries, the head has 8"),
    "num_classes too many": (config("head/num_classes", 10**6 + 1), FORMAT, "num_classes"),
    "label_names short": (config("head/label_names", ["a"]), FORMAT, "label_names has 1 entries"),
    "label_names number": (config("head/label_names", [1] * 7), FORMAT, r"label_names\[0\]=1 must be text"),
    "class_counts negative": (config("class_counts", [-1] * 7), FORMAT, r"class_counts\[0\]=-1"),
    "class_counts boolean": (config("class_counts", [True] * 7), FORMAT, r"class_counts\[0\]=True"),
    "class_counts long": (config("class_counts", [1] * 8), FORMAT, "class_counts has 8 entries"),
    "std 0": (config("preprocess/std", [0.5, 0, 0.5]), FORMAT, r"std\[1\]=0 must be greater than 0"),
    "std short": (config("preprocess/std", [0.5]), FORMAT, "length of preprocess.mean"),
    "input_size": (config("preprocess/input_size", [3, 32]), FORMAT, "a list of 3"),
    "input_size 0": (config("preprocess/input_size", [3, 0, 32]), FORMAT, r"input_size\[1\]=0"),
    "crop_pct": (config("preprocess/crop_pct", False), FORMAT, "crop_pct=False"),
    "fingerprint": (config("backbone/fingerprint", "g" * 64), FORMAT, "64 lower-case hexadecimal"),
    "fingerprint with newline": (config("backbone/fingerprint", "0" * 64 + "\n"), FORMAT, "hexadecimal"),
    "fingerprint_algorithm": (config("backbone/fingerprint_algorithm", "md5"), FORMAT, "sha256-tensors-v1"),
    "hub_id": (config("backbone/hub_id", 5), FORMAT, "hub_id=5 must be text"),
    "model_args object": (config("backbone/model_args", {"act_layer": {"os": "system"}}), FORMAT, "model_args.act_lay"),
    "model_args many": (config("backbone/model_args", {str(i): 0 for i in range(65)}), FORMAT, "at most 64 keys"),
    "model_args long key": (config("backbone/model_args", {"x" * 300: 0}), FORMAT, "1 to 256 characters"),
    "depth": (config("backbone/depth", 3), FORMAT, "backbone's embed_dim and depth"),
    "training a list": (config("training", []), FORMAT, r"training=\[\] must be an object"),
    "training large": (config("training", {"x": "y" * 2**16}), FORMAT, "at most 65536"),
    "tensors many": (config("tensors", {str(i): {} for i in range(65)}), FORMAT, "at most 64 keys"),
    "tensors dtype": (other_dtype, FORMAT, 'must be "F32" or "F16" or "BF16"'),
    "tensors shape negative": (config("tensors/pool.keys/shape", [-3, -24]), FORMAT, r"shape\[0\]=-3"),
    "tensors shape empty": (config("tensors/head.weight/shape", []), FORMAT, "a list of 1 to 8"),
    "tensors shape": (config("tensors/pool.keys/shape", [24, 3]), TENSOR, r"pool\.keys with shape \(24, 3\)"),
    "tensors shape wide": (config("tensors/head.weight/shape", [7, 23]), TENSOR, "config.json lists"),
    "tensors absurd": (absurd, TENSOR, "at most 17179869184 are read"),
    "weights size": (config("weights/size", 10**9), TENSOR, "gives prompts.safetensors 1000000000 bytes"),
    "weights size small": (config("weights/size", 8), TENSOR, "gives prompts.safetensors 8 bytes"),
    "weights size negative": (config("weights/size", -1), FORMAT, "weights.size=-1"),
    "weights size off": (config("weights/size", len(good()[1]) + 1), INTEGRITY, "config.json says"),
    "weights sha256": (config("weights/sha256", "0" * 64), INTEGRITY, "sha256"),
    "weights sha256 upper": (config("weights/sha256", "A" * 64), FORMAT, "lower-case"),
    # prompts.safetensors, not resealed
    "weights empty": (lambda: (good()[0], b""), INTEGRITY, "has 0 bytes"),
    "weights truncated": (lambda: (good()[0], good()[1][:-1]), INTEGRITY, "truncated"),
    "weights longer": (lambda: (good()[0], good()[1] + b"\0"), INTEGRITY, "config.json says"),
    "weights a bit": (lambda: (good()[0], good()[1][:-1] + bytes([good()[1][-1] ^ 1])), INTEGRITY, "a byte changed"),
    "weights of another save": (other_config, INTEGRITY, "from different saves"),
    "weights a git-lfs pointer": (
        lambda: (good()[0], b"version https://git-lfs.github.com/spec/v1\n"),
        INTEGRITY,
        "LFS pointer",
    ),
    # prompts.safetensors, with size and sha256 made to agree
    "header of another save": (of_another_save, INTEGRITY, r"differ in \['training'\]"),
    "header 1 for true": (one_for_true, INTEGRITY, r"differ in \['training'\]"),
    "header configuration missing": (header("__metadata__/lpt_peft", DELETE), FORMAT, "__metadata__"),
    "header metadata missing": (header("__metadata__", DELETE), FORMAT, "__metadata__=None must be an object"),
    "header metadata format": (header("__metadata__/format", "tf"), FORMAT, "__metadata__.format='tf'"),
    "header metadata extra": (header("__metadata__/x", "y"), FORMAT, "__metadata__ has unknown"),
    "header metadata number": (header("__metadata__/lpt_peft", 5), FORMAT, "lpt_peft must be text"),
    "header metadata not JSON": (header("__metadata__/lpt_peft", "{"), FORMAT, "configuration in prompts.safetensors"),
    "header metadata surrogate": (header("__metadata__/lpt_peft", '"\ud800"'), FORMAT, "surrogates"),
    "header length huge": (raw_header(lambda raw: raw, length=2**63), FORMAT, "header of 9223372036854775808 bytes"),
    "header length max": (raw_header(lambda raw: raw, length=2**64 - 1), FORMAT, "declares a header"),
    "header length 0": (raw_header(lambda raw: raw, length=0), FORMAT, "strict JSON"),
    "header length short": (raw_header(lambda raw: raw, length=20), FORMAT, "strict JSON"),
    "header length long": (raw_header(lambda raw: raw, length=2**12), FORMAT, "strict JSON|declares a header|utf-8"),
    "header longer than read": (raw_header(lambda raw: raw + b" " * (2**20 + 1)), TENSOR, "at most 1048576 more"),
    "header duplicate key": (
        raw_header(before(b'"pool.keys": ', b'"pool.keys": {}, "pool.keys": ')),
        FORMAT,
        "'pool.keys' appears twice",
    ),
    "header NaN": (raw_header(before(b'"shape": [7', b'"shape": [NaN')), FORMAT, "NaN"),
    "header deep": (raw_header(lambda raw: b"[" * 1000), FORMAT, "nesting"),
    "header not UTF-8": (raw_header(before(b'"pt"', b'"\xff\xfe"')), FORMAT, "utf-8"),
    "header a list": (raw_header(lambda raw: b"[" + raw + b"]"), FORMAT, "must hold a JSON object"),
    "header null": (raw_header(lambda raw: b"null    "), FORMAT, "must hold a JSON object, not None"),
    "header entry a number": (header("pool.keys", 5), FORMAT, "pool.keys=5 must be an object"),
    "header entry extra": (header("pool.keys/device", "cuda"), FORMAT, "pool.keys has unknown"),
    "header entry shape": (header("pool.keys/shape", [24, 3]), TENSOR, r"pool.keys is F32 \[24, 3\]"),
    "header entry dtype": (header("pool.keys/dtype", "I32"), TENSOR, "pool.keys is I32"),
    "header shape boolean": (header("pool.keys/shape", [True, 24]), FORMAT, r"shape\[0\]=True"),
    "header shape negative": (header("pool.keys/shape", [-3, -24]), FORMAT, r"shape\[0\]=-3"),
    "header shape huge": (header("pool.keys/shape", [2**62, 2**62]), TENSOR, "pool.keys is F32"),
    "header offsets negative": (header("pool.keys/data_offsets", [-288, 0]), FORMAT, r"data_offsets\[0\]=-288"),
    "header offsets swapped": (header("head.weight/data_offsets", [672, 0]), TENSOR, "and should at"),
    "header offsets beyond": (header("shared.prompts/data_offsets", [10**6, 10**6 + 192]), TENSOR, "and should at"),
    "header offsets overlap": (swapped_offsets, TENSOR, "and should at"),
    "header offsets three": (header("pool.keys/data_offsets", [0, 1, 2]), FORMAT, "a list of 2"),
    "header offsets float": (header("pool.keys/data_offsets", [0.0, 288.0]), FORMAT, "whole number"),
    "header tensor missing": (header("pool.keys", DELETE), TENSOR, r"missing \['pool.keys'\]"),
    "header tensor extra": (
        header("evil", {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
        TENSOR,
        r"unknown \['evil'\]",
    ),
    "data behind the tensors": (gap, TENSOR, "the file has"),
    "data missing": (resealed(lambda weights: weights[:-4]), TENSOR, "bytes, the file has|gives prompts"),
    "tensor missing everywhere": (tensor("pool.keys", None), TENSOR, r"missing \['pool.keys'\]"),
    "tensor extra everywhere": (
        tensor("extra", {"dtype": "F32", "shape": [2]}, bytes(8)),
        TENSOR,
        r"unknown \['extra'\]",
    ),
    "NaN": (values(float("nan")), TENSOR, "holds NaN or infinity"),
    "infinity": (values(float("inf")), TENSOR, "holds NaN or infinity"),
    "minus infinity": (values(float("-inf")), TENSOR, "holds NaN or infinity"),
    "a pickle": (resealed(lambda weights: b"\x80\x04cos\nsystem\n." + weights[14:]), FORMAT, "declares a header"),
}


@pytest.fixture(scope="module")
def vit():
    return tiny_vit()


def snapshot(vit):
    state = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    return state, [type(module) for module in vit.modules()], [p.requires_grad for p in vit.parameters()]


def write(folder, pair):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(pair[0])
    (folder / "prompts.safetensors").write_bytes(pair[1])
    return folder


def refused(folder, vit, error, words):
    """Loading is refused with exactly this class; the ViT is as before, bit for bit, and so are random numbers."""
    before, random = snapshot(vit), torch.get_rng_state()
    for check_backbone in ("error", "off"):
        with pytest.raises(PromptFileError, match=words) as caught:
            load_prompts(folder, vit, check_backbone=check_backbone)
        assert type(caught.value) is error
        assert len(str(caught.value)) < 700
    after = snapshot(vit)
    assert before[1:] == after[1:]
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
    assert torch.equal(random, torch.get_rng_state())


def test_the_forger_forges_well(tmp_path, vit):
    """An unbroken forgery loads: what is refused below is refused for its fault alone."""
    pair = Forgery.start().sync().bytes()
    found = decode(*pair)
    wanted = decode(*good())
    assert found.tensors.keys() == wanted.tensors.keys()
    assert all(torch.equal(found.tensors[name], wanted.tensors[name]) for name in wanted.tensors)
    load_prompts(write(tmp_path, pair), vit).unwrap()


@pytest.mark.parametrize(("forge", "error", "words"), CASES.values(), ids=CASES)
def test_refused(tmp_path, vit, forge, error, words):
    refused(write(tmp_path, forge()), vit, error, words)


def test_the_vit_of_refused_loads_still_takes_prompts(tmp_path):
    vit = tiny_vit()
    write(tmp_path, values(float("nan"))())
    with pytest.raises(PromptFileTensorError):
        load_prompts(tmp_path, vit)
    adapter = load_prompts(write(tmp_path, good()), vit)
    assert adapter.unwrap() is vit


# -- every place ------------------------------------------------------------------------------------------


def test_truncated_anywhere():
    config_bytes, weights = good()
    for length in range(0, len(config_bytes) - 2, 7):  # the last two bytes close the object and the line
        with pytest.raises(PromptFileFormatError):
            decode(config_bytes[:length], weights)
    for length in range(0, len(weights), 97):
        with pytest.raises(PromptFileIntegrityError):
            decode(config_bytes, weights[:length])


def test_bytes_are_limited_as_files_are():
    with pytest.raises(PromptFileFormatError, match="at most 1048576"):
        decode(good()[0] + b" " * 2**20, good()[1])


def test_cut_anywhere_and_resealed():
    weights = good()[1]
    for length in range(0, len(weights), 53):
        with pytest.raises((PromptFileTensorError, PromptFileFormatError)):
            decode(*Forgery.start().with_weights(weights[:length]))


def test_one_bit_anywhere():
    config_bytes, weights = good()
    for place in range(len(weights)):
        if place % 11 == 0:
            flipped = bytearray(weights)
            flipped[place] ^= 1 << place % 8
            with pytest.raises(PromptFileIntegrityError):
                decode(config_bytes, bytes(flipped))
    wanted = json.loads(config_bytes)
    for place in range(len(config_bytes)):
        flipped = bytearray(config_bytes)
        flipped[place] ^= 1 << place % 7
        try:
            found = decode(bytes(flipped), weights).config
        except PromptFileError:
            continue
        assert json.dumps(found, sort_keys=True) == json.dumps(wanted, sort_keys=True)  # only white space


def edits():
    place = st.integers(0, 10**6)
    junk = st.one_of(
        st.binary(max_size=8),
        st.sampled_from([b"[", b"{", b"}", b'"', b"\\u", b"NaN", b"1e400", b"-", b"true", b"null", b",", b"0", b"99"]),
    )
    return st.lists(st.tuples(place, st.integers(0, 12), junk), min_size=1, max_size=4)


def edited(data, changes):
    for anywhere, length, junk in changes:
        place = anywhere % (len(data) + 1)
        data = data[:place] + junk + data[place + length :]
    return data


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def loads_only_what_was_written(pair, content):
    """Whatever the bytes: a PromptFileError, or the very content; the fingerprint and the values unharmed."""
    try:
        found = decode(*pair)
    except PromptFileError:
        return
    assert json.dumps(found.config, sort_keys=True) == json.dumps(content, sort_keys=True)


@FUZZ
@given(edits())
def test_fuzzed_config(changes):
    config_bytes, weights = good()
    loads_only_what_was_written((edited(config_bytes, changes), weights), json.loads(config_bytes))


@FUZZ
@given(edits(), st.booleans())
def test_fuzzed_weights(changes, in_header):
    weights = good()[1]
    changes = [(place % 3000 if in_header else place, length, junk) for place, length, junk in changes]
    forgery = Forgery.start()
    pair = forgery.with_weights(edited(weights, changes))
    loads_only_what_was_written(pair, forgery.config)
    loads_only_what_was_written((good()[0], pair[1]), json.loads(good()[0]))


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def paths(tree, prefix=""):
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from paths(value, f"{prefix}{key}/")


@FUZZ
@given(st.sampled_from(sorted(paths(Forgery.start().config))), json_values)
def test_any_value_in_any_place(path, value):
    """A value that passes is one of the format: it is read as it is, or the file is refused."""
    forgery = Forgery.start()
    put(forgery.config, path, copy.deepcopy(value))
    try:
        pair = forgery.sync().bytes()
    except TypeError:  # `weights` is written anew by the forger
        return
    loads_only_what_was_written(pair, forgery.config)


# -- folders ----------------------------------------------------------------------------------------------


def test_missing_files(tmp_path, vit):
    refused(tmp_path / "nothing", vit, MISSING, "does not exist.*save_pretrained")
    refused(tmp_path, vit, MISSING, r"config\.json does not exist")
    write(tmp_path, good())
    (tmp_path / "prompts.safetensors").unlink()
    refused(tmp_path, vit, MISSING, r"prompts\.safetensors does not exist")
    refused(tmp_path / "config.json", vit, MISSING, "does not exist")  # a file for a folder
    write(tmp_path, good())
    (tmp_path / "config.json").unlink()
    refused(tmp_path, vit, MISSING, r"config\.json does not exist")
    (tmp_path / "config.json").symlink_to(tmp_path / "gone")
    refused(tmp_path, vit, MISSING, r"config\.json does not exist")


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    os.chdir(path.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


@pytest.mark.parametrize("name", ["config.json", "prompts.safetensors"])
@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.mkdir(),
        make_fifo,
        make_socket,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path.parent),
    ],
    ids=["directory", "pipe", "socket", "device", "link to a directory"],
)
def test_what_is_no_regular_file_is_not_opened(tmp_path, monkeypatch, vit, name, make):
    monkeypatch.chdir(tmp_path)  # restored, wherever `make` goes
    write(tmp_path, good())
    (tmp_path / name).unlink()
    make(tmp_path / name)
    reader = threading.Thread(target=refused, args=(tmp_path, vit, FORMAT, "not a regular file"), daemon=True)
    reader.start()
    reader.join(20)
    assert not reader.is_alive()
    refused(tmp_path, vit, FORMAT, "not a regular file")


def test_a_sparse_file_of_a_terabyte_is_not_read(tmp_path, vit):
    write(tmp_path, good())
    with (tmp_path / "prompts.safetensors").open("r+b") as stream:
        stream.truncate(2**40)
    refused(tmp_path, vit, INTEGRITY, "has 1099511627776 bytes")
    write(tmp_path, good())
    with (tmp_path / "config.json").open("r+b") as stream:
        stream.truncate(2**40)
    refused(tmp_path, vit, FORMAT, "has 1099511627776 bytes")


def test_only_the_two_names_are_opened(tmp_path, monkeypatch):
    write(tmp_path, good())
    for name in ("pytorch_model.bin", "adapter_config.json", "model.py", "README.md"):
        (tmp_path / name).write_bytes(b"\x80\x04 not to be touched")
    opened = []
    original = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(path.name) or original(path, *rest))
    read_prompt_file(tmp_path)
    assert opened == ["config.json", "prompts.safetensors"]


def test_what_safetensors_alone_refuses_is_a_format_error(monkeypatch):
    def fail(data):
        raise tensors.SafetensorError("a rule of tomorrow")

    monkeypatch.setattr(tensors.safetensors.torch, "load", fail)
    with pytest.raises(PromptFileFormatError, match="a rule of tomorrow"):
        decode(*good())
