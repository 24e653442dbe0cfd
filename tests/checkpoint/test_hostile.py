"""Damaged, foreign and hostile prompt files: each is refused with the right class, and nothing changes.

The forger below is written from the description of the format alone; it shares no code with the library.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import socket
import struct
import threading
from dataclasses import dataclass
from functools import cache

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lpt_peft import LongTailPromptAdapter
from lpt_peft.checkpoint import decode, encode, read_prompt_file, tensors
from lpt_peft.errors import (
    PromptFileError,
    PromptFileFormatError,
    PromptFileIntegrityError,
    PromptFileNotFoundError,
    PromptFileTensorError,
    PromptFileVersionError,
)
from tests.checkpoint.adapters import encode_adapter, same_snapshot, snapshot
from tests.conftest import tiny_vit

FORMAT, VERSION, TENSOR = PromptFileFormatError, PromptFileVersionError, PromptFileTensorError
INTEGRITY, MISSING = PromptFileIntegrityError, PromptFileNotFoundError
DELETE = object()


@cache
def valid(seed=0):
    """Bytes of a valid file."""
    adapter = LongTailPromptAdapter.wrap(tiny_vit(), prompt_length=1, pool_size=3, query="final")
    generator = torch.Generator().manual_seed(seed)
    adapter.load_adapter_state_dict(
        {name: torch.randn(shape, generator=generator) for name, shape in adapter.prompt_config.tensor_shapes.items()}
    )
    return encode_adapter(
        adapter, class_counts=range(7), label_names=list("abcdefg"), training={"seed": seed, "deep": [{"x": 0.5}]}
    ).weights


def canonical(value):
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


@dataclass
class Forgery:
    """A valid file taken apart; `bytes()` assembles it, with the right hashes."""

    config: dict
    header: dict
    data: bytes

    @classmethod
    def start(cls):
        weights = valid()
        (length,) = struct.unpack("<Q", weights[:8])
        header = json.loads(weights[8 : 8 + length])
        return cls(json.loads(header["__metadata__"]["lpt_peft"]), header, weights[8 + length :])

    def bytes(self, edit_config=None, edit_header=None, length=None):
        """The file; the edits change the canonical text before it is hashed, or after."""
        if "data_sha256" in self.config:
            self.config["data_sha256"] = hashlib.sha256(self.data).hexdigest()
        return self.assemble(canonical(self.config), edit_config, edit_header, length)

    def assemble(self, config_text, edit_config=None, edit_header=None, length=None):
        if edit_config:
            config_text = edit_config(config_text)
        metadata = self.header.get("__metadata__")
        if isinstance(metadata, dict) and "lpt_peft" in metadata:
            if isinstance(metadata["lpt_peft"], str):
                metadata["lpt_peft"] = config_text
            hashed = {
                **self.header,
                "__metadata__": {key: value for key, value in metadata.items() if key != "header_sha256"},
            }
            if "header_sha256" in metadata:
                text = canonical(hashed).encode("utf-8", "surrogatepass")
                metadata["header_sha256"] = hashlib.sha256(text).hexdigest()
        raw = canonical(self.header)
        if edit_header:
            raw = edit_header(raw)
        raw = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
        raw += b" " * (-len(raw) % 8)
        return struct.pack("<Q", len(raw) if length is None else length) + raw + self.data


def put(root, path, value):
    *parents, last = path.split("/")
    for key in parents:
        root = root[key]
    if value is DELETE:
        del root[last]
    else:
        root[last] = value


def config(path, value):
    """A file whose configuration has this value; all hashes are right."""

    def forge():
        forgery = Forgery.start()
        put(forgery.config, path, value)
        if path == "data_sha256":
            return forgery.assemble(canonical(forgery.config))
        return forgery.bytes()

    return forge


def header(path, value):
    """A file whose header has this value; all hashes are right."""

    def forge():
        forgery = Forgery.start()
        put(forgery.header, path, value)
        return forgery.bytes()

    return forge


def config_text(edit):
    """The text of the configuration is edited; all hashes are right."""
    return lambda: Forgery.start().bytes(edit_config=edit)


def header_text(edit, length=None):
    """The text of the header is edited after it was hashed."""
    return lambda: Forgery.start().bytes(edit_header=edit, length=length)


def values(number, offset=8):
    """A value of a tensor of floats becomes `number`; all hashes are right."""

    def forge():
        forgery = Forgery.start()
        start = 24 + offset  # behind pool.usage
        forgery.data = forgery.data[:start] + struct.pack("<f", number) + forgery.data[start + 4 :]
        return forgery.bytes()

    return forge


def negative_count():
    forgery = Forgery.start()
    assert forgery.header["pool.usage"]["data_offsets"] == [0, 24]
    forgery.data = struct.pack("<q", -1) + forgery.data[8:]
    return forgery.bytes()


def raw(edit):
    """The bytes of the file, edited."""
    return lambda: edit(valid())


def tensor(name, spec, data=b""):
    """A tensor is added, or removed (`spec` is None), everywhere and without a gap."""

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
        return forgery.bytes()

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


def cut():
    forgery = Forgery.start()
    forgery.data = forgery.data[:-4]
    return forgery.bytes()


def other_dtype(name, dtype):
    def forge():
        forgery = Forgery.start()
        for entries in (forgery.config["tensors"], forgery.header):
            entries[name]["dtype"] = dtype
        return forgery.bytes()

    return forge


def absurd():
    """Consistent sizes that would take 96 TB."""
    forgery = Forgery.start()
    forgery.config["prompt"].update(pool_size=10**6, prompt_length=10**6)
    shapes = {"pool.prompts": [10**6, 1, 10**6, 24], "pool.keys": [10**6, 24], "shared.prompts": [2, 10**6, 24]}
    shapes["pool.usage"] = [10**6]
    for name, shape in shapes.items():
        forgery.config["tensors"][name]["shape"] = shape
    return forgery.bytes()


def tensors_of_another_file():
    start = 8 + struct.unpack("<Q", valid()[:8])[0]
    other = valid(1)[8 + struct.unpack("<Q", valid(1)[:8])[0] :]
    return valid()[:start] + other


def version_1():
    forgery = Forgery.start()
    forgery.config["format_version"] = 1
    del forgery.config["data_sha256"], forgery.header["__metadata__"]["header_sha256"]
    return forgery.bytes()


def plain_safetensors():
    return safetensors.torch.save({"weight": torch.zeros(3)})


def before(old, new):
    def edit(text):
        assert old in text
        return text.replace(old, new, 1)

    return edit


HUGE = "9" * 5000
CASES = {
    # the configuration as text
    "config empty": (config_text(lambda text: ""), FORMAT, "strict JSON"),
    "config blank": (config_text(lambda text: " \n"), FORMAT, "strict JSON"),
    "config truncated": (config_text(lambda text: text[:-3]), FORMAT, "strict JSON"),
    "config with text behind": (config_text(lambda text: text + "{}"), FORMAT, "strict JSON: Extra data"),
    "config with BOM": (config_text(lambda text: "\ufeff" + text), FORMAT, "BOM"),
    "config lone surrogate": (config_text(before('"a"', '"\\ud800"')), FORMAT, "surrogates"),
    "config NaN": (config_text(before("0.5", "NaN")), FORMAT, "NaN is not a JSON number"),
    "config Infinity": (config_text(before("0.5", "-Infinity")), FORMAT, "-Infinity is not"),
    "config 1e999": (config_text(before("0.5", "1e999")), FORMAT, "not finite"),
    "config huge integer": (config_text(before("0.5", HUGE)), FORMAT, "64 bits"),
    "config 65-bit integer": (config_text(before("0.5", str(2**64))), FORMAT, "64 bits"),
    "config duplicate key": (config_text(before('"top_k":2', '"top_k":2,"top_k":2')), FORMAT, "'top_k' appears twice"),
    "config duplicate at top": (
        config_text(lambda text: '{"format":1,' + text[1:]),
        FORMAT,
        "'format' appears twice",
    ),
    "config deep": (config_text(before("0.5", "[" * 50 + "]" * 50)), FORMAT, "nesting deeper than 32"),
    "config very deep": (config_text(lambda text: "[" * 500_000), FORMAT, "nesting deeper than 32"),
    "config very deep object": (config_text(lambda text: '{"a":' * 100_000), FORMAT, "nesting deeper than 32"),
    "config comment": (config_text(lambda text: text + "// hi"), FORMAT, "strict JSON"),
    "config control character": (config_text(before('"a"', '"\x00"')), FORMAT, "control character"),
    "config a list": (config_text(lambda text: f"[{text}]"), FORMAT, "must hold a JSON object"),
    "config null": (config_text(lambda text: "null"), FORMAT, "must hold a JSON object"),
    "config of transformers": (config_text(lambda text: '{"model_type":"vit"}'), FORMAT, "not a prompt file"),
    "config with a space": (config_text(before('"top_k":2', '"top_k": 2')), INTEGRITY, "changed after it was written"),
    "config with an escape": (config_text(before('"a"', '"\\u0061"')), INTEGRITY, "changed after it was written"),
    "config of another order": (
        config_text(lambda text: json.dumps(dict(reversed(json.loads(text).items())), separators=(",", ":"))),
        INTEGRITY,
        "changed after it was written",
    ),
    # the configuration as keys
    "format": (config("format", "peft"), FORMAT, "not a prompt file"),
    "format missing": (config("format", DELETE), FORMAT, "not a prompt file"),
    "version 3": (config("format_version", 3), VERSION, "(?i)upgrade lpt_peft"),
    "version 3 with new keys": (
        config_text(lambda text: '{"format":"lpt_peft-prompts","format_version":3,"new":1}'),
        VERSION,
        "(?i)upgrade lpt_peft",
    ),
    "version 1": (version_1, VERSION, "format version 1;.*Save the prompts again"),
    "version 0": (config("format_version", 0), VERSION, "format version 0"),
    "version true": (config("format_version", True), FORMAT, "format_version=True"),
    "version text": (config("format_version", "2"), FORMAT, "format_version='2'"),
    "version 2.0": (config("format_version", 2.0), FORMAT, "format_version=2.0"),
    "version missing": (config("format_version", DELETE), FORMAT, "format_version"),
    "unknown at top": (config("auto_map", {}), FORMAT, r"unknown key\(s\) \['auto_map'\]"),
    "unknown in prompt": (config("prompt/init", 0), FORMAT, "prompt has unknown.*'init'"),
    "unknown in head": (config("head/bias", True), FORMAT, "head has unknown.*'bias'"),
    "unknown in preprocess": (config("preprocess/pad", 0), FORMAT, "preprocess has unknown.*'pad'"),
    "unknown in backbone": (config("backbone/url", "x"), FORMAT, "backbone has unknown.*'url'"),
    "unknown in tensors": (config("tensors/pool.keys/offset", 0), FORMAT, r"tensors\.pool\.keys has unknown"),
    "version 1's weights": (config("weights", {"size": 9}), FORMAT, "unknown.*'weights'"),
    "missing prompt": (config("prompt", DELETE), FORMAT, r"lacks \['prompt'\]"),
    "missing in backbone": (config("backbone/fingerprint", DELETE), FORMAT, r"backbone .*lacks \['fingerprint'\]"),
    "library_version": (config("library_version", ""), FORMAT, "library_version='' must be text"),
    "library_version long": (config("library_version", "x" * 5000), FORMAT, "1 to 1024"),
    "prompt a list": (config("prompt", []), FORMAT, r"prompt=\[\] must be an object"),
    "top_k true": (config("prompt/top_k", True), FORMAT, r"prompt\.top_k=True must be an integer"),
    "top_k 2.0": (config("prompt/top_k", 2.0), FORMAT, r"prompt\.top_k=2\.0 must be an integer"),
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
    "tensors dtype": (other_dtype("pool.keys", "F64"), FORMAT, 'must be "F32" or "F16" or "BF16" or "I64"'),
    "tensors keys of integers": (other_dtype("pool.keys", "I64"), TENSOR, "pool.keys as I64; it must be F32"),
    "tensors usage of floats": (other_dtype("pool.usage", "F32"), TENSOR, "pool.usage as F32; it must be I64"),
    "tensors usage of another size": (config("tensors/pool.usage/shape", [4]), TENSOR, r"pool.usage with shape \(4,\)"),
    "temperature 0": (config("head/temperature", 0), FORMAT, "temperature=0 must be greater than 0"),
    "temperature null": (config("head/temperature", None), FORMAT, "temperature=None"),
    "exif a number": (config("preprocess/exif", 1), FORMAT, "exif=1 must be true or false"),
    "background": (config("preprocess/background", [0, 0, 256]), FORMAT, r"background\[2\]=256"),
    "dtype of the backbone": (config("backbone/dtype", "int8"), FORMAT, "dtype='int8'"),
    "tensors shape negative": (config("tensors/pool.keys/shape", [-3, -24]), FORMAT, r"shape\[0\]=-3"),
    "tensors shape empty": (config("tensors/head.weight/shape", []), FORMAT, "a list of 1 to 8"),
    "tensors shape": (config("tensors/pool.keys/shape", [24, 3]), TENSOR, r"pool\.keys with shape \(24, 3\)"),
    "tensors shape wide": (config("tensors/head.weight/shape", [7, 23]), TENSOR, "The configuration lists"),
    "tensors absurd": (absurd, TENSOR, "at most 17179869184 are read"),
    "data_sha256": (config("data_sha256", "0" * 64), INTEGRITY, "a byte changed"),
    "data_sha256 upper": (config("data_sha256", "A" * 64), FORMAT, "lower-case"),
    "data_sha256 missing": (config("data_sha256", DELETE), FORMAT, r"lacks \['data_sha256'\]"),
    # the file as bytes
    "empty": (raw(lambda data: b""), INTEGRITY, "has 0 bytes"),
    "four bytes": (raw(lambda data: data[:4]), INTEGRITY, "has 4 bytes"),
    "truncated": (raw(lambda data: data[:-1]), INTEGRITY, "truncated"),
    "longer": (raw(lambda data: data + b"\0"), INTEGRITY, "extended"),
    "a bit": (raw(lambda data: data[:-1] + bytes([data[-1] ^ 1])), INTEGRITY, "a byte changed"),
    "tensors of another file": (tensors_of_another_file, INTEGRITY, "a byte changed"),
    "a Git LFS pointer": (raw(lambda data: b"version https://git-lfs.github.com/spec/v1\n"), INTEGRITY, "LFS pointer"),
    "a text": (raw(lambda data: b"A text of some kind"), FORMAT, "declares a header"),
    "a pickle": (raw(lambda data: b"\x80\x04cos\nsystem\n." + data[14:]), FORMAT, "declares a header"),
    "plain safetensors": (plain_safetensors, FORMAT, "not a prompt file"),
    # the header
    "header hash": (
        header_text(lambda text: re.sub('"header_sha256":"[^"]*"', f'"header_sha256":"{"0" * 64}"', text)),
        INTEGRITY,
        "changed after it was written",
    ),
    "header hash missing": (header("__metadata__/header_sha256", DELETE), FORMAT, r"lacks \['header_sha256'\]"),
    "header with a space": (header_text(before('"pool.keys":', '"pool.keys": ')), INTEGRITY, "changed after"),
    "header changed": (header_text(before('\\"c\\"', '\\"k\\"')), INTEGRITY, "changed after"),
    "header configuration missing": (header("__metadata__/lpt_peft", DELETE), FORMAT, "not a prompt file"),
    "header metadata missing": (header("__metadata__", DELETE), FORMAT, "not a prompt file"),
    "header metadata format": (header("__metadata__/format", "tf"), FORMAT, "__metadata__.format='tf'"),
    "header metadata extra": (header("__metadata__/x", "y"), FORMAT, "__metadata__ has unknown"),
    "header metadata number": (header("__metadata__/lpt_peft", 5), FORMAT, "not a prompt file"),
    "header surrogate": (header("__metadata__/format", "\ud800"), FORMAT, "utf-8"),
    "header length huge": (header_text(lambda text: text, length=2**63), FORMAT, "header of 9223372036854775808 bytes"),
    "header length max": (header_text(lambda text: text, length=2**64 - 1), FORMAT, "declares a header"),
    "header length 0": (header_text(lambda text: text, length=0), FORMAT, "strict JSON"),
    "header length short": (header_text(lambda text: text, length=20), FORMAT, "strict JSON"),
    "header length long": (header_text(lambda text: text, length=2**12), FORMAT, "strict JSON|declares a header|utf-8"),
    "header longer than read": (header_text(lambda text: text + " " * (2**20 + 1)), FORMAT, "at most 1048576 are read"),
    "header duplicate key": (
        header_text(before('"pool.keys":', '"pool.keys":{},"pool.keys":')),
        FORMAT,
        "'pool.keys' appears twice",
    ),
    "header NaN": (header_text(before('"shape":[7', '"shape":[NaN')), FORMAT, "NaN"),
    "header deep": (header_text(lambda text: "[" * 1000), FORMAT, "nesting"),
    "header not UTF-8": (header_text(lambda text: before(b'"pt"', b'"\xff\xfe"')(text.encode())), FORMAT, "utf-8"),
    "header a list": (header_text(lambda text: f"[{text}]"), FORMAT, "must hold a JSON object"),
    "header null": (header_text(lambda text: "null"), FORMAT, "must hold a JSON object, not None"),
    "header entry a number": (header("pool.keys", 5), FORMAT, "pool.keys=5 must be an object"),
    "header entry extra": (header("pool.keys/device", "cuda"), FORMAT, "pool.keys has unknown"),
    "header entry shape": (header("pool.keys/shape", [24, 3]), TENSOR, r"pool.keys is F32 \[24, 3\] in the header"),
    "header entry dtype": (header("pool.keys/dtype", "I32"), TENSOR, "pool.keys is I32"),
    "header shape boolean": (header("pool.keys/shape", [True, 24]), FORMAT, r"shape\[0\]=True"),
    "header shape negative": (header("pool.keys/shape", [-3, -24]), FORMAT, r"shape\[0\]=-3"),
    "header shape huge": (header("pool.keys/shape", [2**62, 2**62]), TENSOR, "pool.keys is F32"),
    "header offsets negative": (header("pool.keys/data_offsets", [-288, 0]), FORMAT, r"data_offsets\[0\]=-288"),
    "header offsets swapped": (header("head.weight/data_offsets", [672, 0]), TENSOR, "instead of"),
    "header offsets beyond": (header("shared.prompts/data_offsets", [10**6, 10**6 + 192]), TENSOR, "instead of"),
    "header offsets overlap": (swapped_offsets, TENSOR, "instead of"),
    "header offsets three": (header("pool.keys/data_offsets", [0, 1, 2]), FORMAT, "a list of 2"),
    "header offsets float": (header("pool.keys/data_offsets", [0.0, 288.0]), FORMAT, "integer"),
    "header tensor missing": (header("pool.keys", DELETE), TENSOR, r"missing \['pool.keys'\]"),
    "header tensor extra": (
        header("evil", {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
        TENSOR,
        r"unknown \['evil'\]",
    ),
    "data behind the tensors": (gap, INTEGRITY, "truncated or extended"),
    "data missing": (cut, INTEGRITY, "truncated or extended"),
    "tensor missing everywhere": (tensor("pool.keys", None), TENSOR, r"missing \['pool.keys'\]"),
    "tensor extra everywhere": (
        tensor("extra", {"dtype": "F32", "shape": [2]}, bytes(8)),
        TENSOR,
        r"unknown \['extra'\]",
    ),
    "NaN": (values(float("nan")), TENSOR, "holds NaN or infinity"),
    "infinity": (values(float("inf")), TENSOR, "holds NaN or infinity"),
    "minus infinity": (values(float("-inf")), TENSOR, "holds NaN or infinity"),
    "a negative count": (negative_count, TENSOR, "pool.usage holds a negative count"),
}


@pytest.fixture(scope="module")
def vit():
    return tiny_vit()


def write(folder, weights):
    folder.mkdir(exist_ok=True)
    (folder / "prompts.safetensors").write_bytes(weights)
    return folder


def refused(folder, vit, error, words):
    """Loading is refused with exactly this class; the ViT is as before, bit for bit, and so is the random state."""
    old, random = snapshot(vit), torch.get_rng_state()
    for check_backbone in ("error", "off"):
        with pytest.raises(PromptFileError, match=words) as caught:
            LongTailPromptAdapter.from_pretrained(folder, vit, check_backbone=check_backbone)
        assert type(caught.value) is error
        assert len(str(caught.value)) < 700
    assert same_snapshot(old, snapshot(vit))
    assert torch.equal(random, torch.get_rng_state())


def test_the_forger_forges_well(tmp_path, vit):
    """An unbroken forgery loads: the files below are refused for their fault alone."""
    weights = Forgery.start().bytes()
    assert weights == valid()
    LongTailPromptAdapter.from_pretrained(write(tmp_path, weights), vit).unwrap()


@pytest.mark.parametrize(("forge", "error", "words"), CASES.values(), ids=CASES)
def test_refused(tmp_path, vit, forge, error, words):
    refused(write(tmp_path, forge()), vit, error, words)
    with pytest.raises(error, match=words):
        decode(forge())


def test_the_vit_of_refused_loads_still_takes_prompts(tmp_path):
    vit = tiny_vit()
    write(tmp_path, values(float("nan"))())
    with pytest.raises(PromptFileTensorError):
        LongTailPromptAdapter.from_pretrained(tmp_path, vit)
    adapter = LongTailPromptAdapter.from_pretrained(write(tmp_path, valid()), vit)
    assert adapter.unwrap() is vit


def test_a_tensor_missing_from_the_file_and_from_its_configuration_is_optional_if_it_counts_usage():
    decode(tensor("pool.usage", None)())


# -- every position ---------------------------------------------------------------------------------------


def test_truncated_anywhere():
    weights = valid()
    for length in range(0, len(weights), 53):
        with pytest.raises((PromptFileIntegrityError, PromptFileFormatError), match=r"truncated|strict JSON"):
            decode(weights[:length])


def test_a_flipped_bit_anywhere():
    """A bit of every byte of the header and of every seventh byte after it; all bits of every seventh."""
    weights = valid()
    start = 8 + struct.unpack("<Q", weights[:8])[0]
    places = [(place, bit) for place in range(0, start, 7) for bit in range(8)]
    places += [(place, place % 8) for place in range(start)]
    places += [(place, place % 8) for place in range(start, len(weights), 7)]
    for place, bit in places:
        flipped = bytearray(weights)
        flipped[place] ^= 1 << bit
        with pytest.raises((PromptFileIntegrityError, PromptFileFormatError, PromptFileVersionError)):
            decode(bytes(flipped))


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


@FUZZ
@given(edits(), st.booleans())
def test_edited_bytes(changes, in_header):
    changes = [(place % 3000 if in_header else place, length, junk) for place, length, junk in changes]
    weights = edited(valid(), changes)
    if weights == valid():
        return
    with pytest.raises(PromptFileError):
        decode(weights)


@FUZZ
@given(edits())
def test_edited_text_of_the_configuration(changes):
    """The hashes are right, so the text itself is read."""
    edit = lambda text: edited(text.encode(), changes).decode("utf-8", "replace")  # noqa: E731
    try:
        content = decode(Forgery.start().bytes(edit_config=edit))
    except PromptFileError:
        return
    assert content.tensors.keys() == decode(valid()).tensors.keys()


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
    """A value that passes is kept as it is, or the file is refused."""
    forgery = Forgery.start()
    put(forgery.config, path, copy.deepcopy(value))
    weights = forgery.bytes()
    try:
        content = decode(weights)
    except PromptFileError:
        return
    assert encode(content).config == forgery.config


# -- folders ----------------------------------------------------------------------------------------------


def test_missing_files(tmp_path, vit):
    refused(tmp_path / "nothing", vit, MISSING, "does not exist.*save_pretrained")
    refused(tmp_path, vit, MISSING, r"prompts\.safetensors does not exist")
    write(tmp_path, valid())
    refused(tmp_path / "prompts.safetensors", vit, MISSING, "does not exist")  # a file in place of a folder
    (tmp_path / "prompts.safetensors").unlink()
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, vit, MISSING, r"prompts\.safetensors does not exist")
    (tmp_path / "prompts.safetensors").symlink_to(tmp_path / "gone")
    refused(tmp_path, vit, MISSING, r"prompts\.safetensors does not exist")


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    os.chdir(path.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.mkdir(),
        make_fifo,
        make_socket,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path.parent),
    ],
    ids=["folder", "pipe", "socket", "device", "link to a folder"],
)
def test_a_name_that_is_not_a_regular_file_is_not_opened(tmp_path, monkeypatch, vit, make):
    monkeypatch.chdir(tmp_path)  # restored, wherever `make` goes
    make(tmp_path / "prompts.safetensors")
    reader = threading.Thread(target=refused, args=(tmp_path, vit, FORMAT, "not a regular file"), daemon=True)
    reader.start()
    reader.join(20)
    assert not reader.is_alive()
    refused(tmp_path, vit, FORMAT, "not a regular file")


def test_a_sparse_file_of_a_terabyte_is_not_read(tmp_path, vit):
    write(tmp_path, valid())
    with (tmp_path / "prompts.safetensors").open("r+b") as stream:
        stream.truncate(2**40)
    refused(tmp_path, vit, INTEGRITY, "truncated or extended")


def test_only_one_file_is_opened(tmp_path, monkeypatch):
    write(tmp_path, valid())
    for name in ("config.json", "pytorch_model.bin", "adapter_config.json", "model.py", "README.md"):
        (tmp_path / name).write_bytes(b"\x80\x04 not to be read")
    opened = []
    original = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(path.name) or original(path, *rest))
    read_prompt_file(tmp_path)
    assert opened == ["prompts.safetensors"]


def test_a_file_that_only_safetensors_refuses_is_a_format_error(monkeypatch):
    def fail(data):
        raise tensors.SafetensorError("a future rule")

    monkeypatch.setattr(tensors.safetensors.torch, "load", fail)
    with pytest.raises(PromptFileFormatError, match="a future rule"):
        decode(valid())
