"""Backbones that a prompt file may name. Nothing is downloaded here; tests/hub has tests with downloads."""

from __future__ import annotations

from functools import partial

import pytest
import timm
from torch import nn

from lpt_peft.backbones import loading as module
from lpt_peft.backbones.loading import build
from lpt_peft.errors import ConfigError


def info(**changes):
    return {"library": "timm", "architecture": "test_vit", "pretrained_tag": "r160_in1k", "model_args": {}, **changes}


@pytest.fixture
def created(monkeypatch):
    """Calls of timm.create_model."""
    calls = []

    def create_model(name, **arguments):
        calls.append((name, arguments))
        return nn.Identity().train()

    monkeypatch.setattr(timm, "create_model", create_model)
    return calls


def test_named_model_is_pretrained_and_in_eval_mode(created):
    assert not build(info()).training
    assert created == [("test_vit.r160_in1k", {"pretrained": True})]


def test_arguments_that_weights_can_follow(created):
    args = {"img_size": [96, 64], "dynamic_img_size": True, "global_pool": "avg"}
    build(info(model_args=args))
    build(info(model_args={"img_size": 96}))
    assert created[0][1] == {"pretrained": True, "img_size": (96, 64), "dynamic_img_size": True, "global_pool": "avg"}
    assert created[1][1] == {"pretrained": True, "img_size": (96, 96)}


def test_the_eps_of_the_layer_norms(created):
    build(info(model_args={"norm_eps": 1e-5}))
    layer = created[0][1]["norm_layer"]
    assert isinstance(layer, partial)
    assert layer(4).eps == 1e-5


HF = {"library": "transformers", "architecture": "ViTModel", "hub_id": "google/vit", "hub_revision": None}
REFUSED = {
    "no class of transformers": ({**HF, "architecture": "AutoModel"}, "transformers .* has no such model"),
    "a function of transformers": ({**HF, "architecture": "pipeline"}, "transformers .* has no such model"),
    "another module's class": ({**HF, "architecture": "os.system"}, "transformers .* has no such model"),
    "no repository": ({**HF, "hub_id": None}, "names no Hub repository"),
    "a folder": ({**HF, "hub_id": "../../etc"}, "names no Hub repository"),
    "an address": ({**HF, "hub_id": "https://evil.example/x"}, "names no Hub repository"),
    "a branch": ({**HF, "hub_revision": "main"}, "'main' is not a commit"),
    "another library": ({"library": "os"}, 'models of "os" are not built here'),
    "torchvision": ({"library": "torchvision"}, 'models of "torchvision" are not built here'),
    "unknown architecture": ({"architecture": "VisionTransformer"}, "no such architecture"),
    "address": ({"architecture": "hf_hub:evil/model"}, "no such architecture"),
    "local folder": ({"architecture": "local-dir:/tmp/evil"}, "no such architecture"),
    "tag inside the name": ({"architecture": "test_vit.r160_in1k"}, "no such architecture"),
    "unknown tag": ({"pretrained_tag": "evil"}, "no pretrained weights of that tag"),
    "no tag": ({"pretrained_tag": None}, r"tag none.*no pretrained weights"),
    "unknown argument": ({"model_args": {"act_layer": "gelu"}}, "cannot follow its act_layer"),
    "file": ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "cannot follow its checkpoint_path"),
    "pretrained_cfg": ({"model_args": {"pretrained_cfg": "x"}}, "cannot follow its pretrained_cfg"),
    "cache": ({"model_args": {"cache_dir": "/tmp"}}, "cannot follow its cache_dir"),
    "width": ({"model_args": {"embed_dim": 10**6}}, "cannot follow its embed_dim=1000000"),
    "depth": ({"model_args": {"depth": 2}}, "cannot follow its depth=2"),
    "patches": ({"model_args": {"patch_size": 1}}, "cannot follow its patch_size=1"),
    "huge image": ({"model_args": {"img_size": 10**6}}, "img_size=1000000 must be"),
    "huge image twice": ({"model_args": {"img_size": [4096, 4096]}}, "img_size"),
    "three sizes": ({"model_args": {"img_size": [96, 96, 96]}}, "img_size"),
    "no size": ({"model_args": {"img_size": []}}, "img_size"),
    "negative image": ({"model_args": {"img_size": -1}}, "img_size"),
    "boolean image": ({"model_args": {"img_size": True}}, "img_size=True"),
    "text image": ({"model_args": {"img_size": "96"}}, "img_size='96'"),
    "switch": ({"model_args": {"dynamic_img_size": "yes"}}, "dynamic_img_size"),
    "pool": ({"model_args": {"global_pool": "map"}}, "global_pool='map'"),
    "eps": ({"model_args": {"norm_eps": 1.0}}, "norm_eps=1.0"),
    "eps text": ({"model_args": {"norm_eps": "1e-5"}}, "norm_eps="),
}


@pytest.mark.parametrize(("changes", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(created, changes, words):
    with pytest.raises(ConfigError, match=words) as caught:
        build(info(**changes))
    assert "from_pretrained(folder, vit)" in str(caught.value)
    assert len(str(caught.value)) < 500
    assert created == []


def test_timm_lists_the_model_of_these_tests():
    assert "test_vit.r160_in1k" in timm.list_models(pretrained=True)


def test_incompatible_version_of_transformers(monkeypatch):
    def fail(name):
        raise ImportError("cannot import name 'ResolvedRevision'")

    monkeypatch.setattr(module, "import_module", fail)
    with pytest.raises(ConfigError, match=r"cannot be imported \(cannot import name 'ResolvedRevision'\).*, vit\)"):
        build(info(**HF))
    assert not module.can_build(info(**HF))
