"""Checkpoints of the paper's program, built from their names and shapes, against token concatenation."""

from __future__ import annotations

import json
import pickle
from functools import partial

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lpt_peft import LongTailPromptAdapter
from lpt_peft.checkpoint import read_prompt_file
from lpt_peft.checkpoint.convert_official import read_official, write_official
from lpt_peft.cli import main
from lpt_peft.errors import (
    BackboneError,
    BackboneMismatchError,
    ConfigError,
    PromptFileFormatError,
    PromptFileNotFoundError,
    PromptFileTensorError,
)
from tests.oracle import lpt_by_concatenation

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
L, N, D, M, K, C = 3, 4, 64, 5, 1, 6


def plain_vit(eps, seed=0, **options):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": D, "depth": L, "num_heads": 1, "num_classes": 10}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = VisionTransformer(**{**sizes, **options}, norm_layer=partial(nn.LayerNorm, eps=eps))
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return vit.eval()


def parts(seed=1):
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    return {
        "prompt_learner.Prompt_Tokens": draw(L, N, D),
        "prompt_learner.Prompt_Tokens_pool": draw(M, L - K, N, D),
        "prompt_learner.Prompt_Keys": draw(M, D),
        "prompt_learner.head.weight": draw(D, C),
    }


def checkpoint(path, module="module.", wrapped=True, state=None):
    state = {**plain_vit(1e-5).state_dict(), **parts(), **(state or {})}
    state = {module + name: tensor for name, tensor in state.items() if tensor is not None}
    torch.save({"state_dict": state, "epoch": 3, "best_acc": 0.5} if wrapped else state, path)
    return path


@pytest.mark.parametrize("module", ["module.", ""])
@pytest.mark.parametrize("wrapped", [True, False])
def test_logits_are_those_of_token_concatenation(tmp_path, module, wrapped):
    official = read_official(checkpoint(tmp_path / "a.pth", module, wrapped))
    write_official(official, tmp_path / "prompts", source="a.pth")
    given = parts()
    expected = lpt_by_concatenation(
        plain_vit(1e-5),
        IMAGES,
        given["prompt_learner.Prompt_Tokens"],
        given["prompt_learner.Prompt_Tokens_pool"],
        given["prompt_learner.Prompt_Keys"],
        given["prompt_learner.head.weight"].T,
        top_k=2,
        scale=20.0,
    )
    for vit in (official.vit, plain_vit(1e-5)):
        adapter = LongTailPromptAdapter.from_pretrained(tmp_path / "prompts", vit)
        out = adapter(IMAGES, return_output=True)
        assert adapter.phase == "group"
        assert torch.allclose(out.logits, expected["logits"], atol=1e-4)
        assert torch.equal(out.groups.sort().values, expected["groups"].sort().values)


def test_the_eps_is_carried_and_compared(tmp_path):
    official = read_official(checkpoint(tmp_path / "a.pth"))
    write_official(official, tmp_path / "prompts", source="a.pth")
    content = read_prompt_file(tmp_path / "prompts")
    assert content.backbone.model_args == {"norm_eps": 1e-5}
    assert content.metadata.training == {"converted_from": "a.pth"}
    with pytest.raises(BackboneMismatchError, match=r"eps=1e-05; the ViT given has 1e-06.*norm_layer=partial"):
        LongTailPromptAdapter.from_pretrained(tmp_path / "prompts", plain_vit(1e-6))


def test_whether_the_backbone_inside_is_the_pretrained_one(tmp_path):
    official = read_official(checkpoint(tmp_path / "a.pth"))
    pretrained = plain_vit(1e-6, num_classes=3)  # other head, other eps: the same weights
    pretrained.load_state_dict(
        plain_vit(1e-5).state_dict() | {n: t for n, t in pretrained.state_dict().items() if "head" in n}
    )
    pretrained.pretrained_cfg = {"architecture": "vit_x", "tag": "in21k", "hf_hub_id": "timm/vit_x.in21k"}
    assert write_official(official, tmp_path / "same", source="a", pretrained=pretrained) is True
    backbone = read_prompt_file(tmp_path / "same").backbone
    assert (backbone.pretrained_tag, backbone.hub_id) == ("in21k", "timm/vit_x.in21k")
    assert write_official(official, tmp_path / "other", source="a", pretrained=plain_vit(1e-6, seed=5)) is False
    assert write_official(official, tmp_path / "none", source="a") is None
    for name in ("other", "none"):
        backbone = read_prompt_file(tmp_path / name).backbone
        assert (backbone.pretrained_tag, backbone.hub_id) == (None, None)
        with pytest.raises(ConfigError, match=r"from_pretrained\(folder, vit\)"):
            LongTailPromptAdapter.from_pretrained(tmp_path / name)


def test_the_name_of_the_backbone_in_timm(tmp_path):
    vit = plain_vit(1e-5, img_size=224, patch_size=16, embed_dim=192, depth=1, num_heads=3)
    given = {**vit.state_dict(), **parts()}
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    given |= {
        "prompt_learner.Prompt_Tokens": draw(1, 2, 192),
        "prompt_learner.Prompt_Tokens_pool": draw(2, 1, 2, 192),
        "prompt_learner.Prompt_Keys": draw(2, 192),
        "prompt_learner.head.weight": draw(192, 2),
    }
    torch.save({"state_dict": given}, tmp_path / "a.pth")
    official = read_official(tmp_path / "a.pth")
    assert official.architecture == "vit_tiny_patch16_224"
    assert official.vit.blocks[0].attn.num_heads == 3


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def broken(**changes):
    return lambda path: checkpoint(path, state={name.replace("__", "."): value for name, value in changes.items()})


REFUSED = {
    "code": (lambda path: torch.save({"state_dict": {"a": Evil()}}, path), PromptFileFormatError, "running code"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Evil())), PromptFileFormatError, "running code"),
    "no archive": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), PromptFileFormatError, "running code"),
    "empty": (lambda path: path.write_bytes(b""), PromptFileFormatError, "running code"),
    "a list": (lambda path: torch.save([1], path), PromptFileFormatError, "no state_dict"),
    "not tensors": (lambda path: torch.save({"state_dict": {"a": 1}}, path), PromptFileFormatError, "no state_dict"),
    "a plain ViT": (
        lambda path: torch.save(plain_vit(1e-5).state_dict(), path),
        PromptFileFormatError,
        r"lacks \['prompt_learner.Prompt_Tokens'",
    ),
    "more prompts": (
        broken(prompt_learner__x=torch.zeros(1)),
        PromptFileFormatError,
        r"unknown \['prompt_learner.x'\]",
    ),
    "a flat key": (broken(prompt_learner__Prompt_Keys=torch.zeros(M)), PromptFileTensorError, "must have 2 dimensions"),
    "NaN": (
        broken(prompt_learner__Prompt_Keys=torch.full((M, D), float("nan"))),
        PromptFileTensorError,
        "finite values",
    ),
    "other pool": (broken(prompt_learner__Prompt_Keys=torch.zeros(M + 1, D)), PromptFileTensorError, "do not fit"),
    "other width": (broken(prompt_learner__head__weight=torch.zeros(D + 1, C)), PromptFileTensorError, "do not fit"),
    "deep pool": (
        broken(prompt_learner__Prompt_Tokens_pool=torch.zeros(M, L + 1, N, D)),
        PromptFileTensorError,
        "do not fit",
    ),
    "no patches": (broken(patch_embed__proj__weight=None), BackboneError, "tensors of a plain ViT"),
    "no norm": (broken(norm__weight=None), BackboneError, "do not fit a plain ViT"),
    "a million blocks": (broken(blocks__999999__norm1__bias=torch.zeros(D)), BackboneError, "its blocks are"),
    "blocks without number": (broken(blocks__x__norm1__bias=torch.zeros(D)), BackboneError, "tensors of a plain ViT"),
    "terabytes by stride": (
        broken(prompt_learner__Prompt_Keys=torch.zeros(1).expand(10**6, 10**6)),
        PromptFileTensorError,
        "claim 4000000",
    ),
    "another ViT": (broken(blocks__0__attn__bias=torch.zeros(1)), BackboneError, "do not fit a plain ViT"),
}


@pytest.mark.parametrize(("make", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, capsys, make, error, words):
    make(tmp_path / "a.pth")
    with pytest.raises(error, match=words) as caught:
        read_official(tmp_path / "a.pth")
    assert len(str(caught.value)) < 900
    assert capsys.readouterr().out == ""


def test_a_width_that_does_not_determine_the_heads(tmp_path):
    vit = plain_vit(1e-5, embed_dim=48, num_heads=4)
    state = {**vit.state_dict(), **{n: t[..., :48] if t.shape[-1] == D else t[:48] for n, t in parts().items()}}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(BackboneError, match="give num_heads="):
        read_official(tmp_path / "a.pth")
    with pytest.raises(BackboneError, match="give num_heads="):
        read_official(tmp_path / "a.pth", num_heads=5)
    assert read_official(tmp_path / "a.pth", num_heads=4).content.config.dim == 48


def test_missing_and_arguments(tmp_path):
    with pytest.raises(PromptFileNotFoundError, match="does not exist"):
        read_official(tmp_path / "a.pth")
    with pytest.raises(ConfigError, match="top_k=9"):
        read_official(checkpoint(tmp_path / "a.pth"), top_k=9)


def test_the_command(tmp_path, capsys):
    checkpoint(tmp_path / "a.pth")
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "prompts"), "--no-compare"]) == 0
    out = capsys.readouterr().out
    assert "VisionTransformer, LayerNorm eps 1e-05" in out
    assert "Unknown whether" in out
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "prompts"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["pretrained"], report["compared"]) == (None, "VisionTransformer.augreg_in21k")
    assert "no such architecture" in report["reason"]
    read_prompt_file(tmp_path / "prompts")
    assert main(["convert", str(tmp_path / "b.pth"), str(tmp_path / "prompts")]) == 1
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"blocks.0.norm1.bias": torch.zeros(D).to_sparse()}, PromptFileTensorError, "must be dense, real"),
        ({"blocks.0.norm1.bias": torch.zeros(D, dtype=torch.complex64)}, PromptFileTensorError, "must be dense, real"),
        ({"blocks.0.norm1.bias": torch.full((D,), float("nan"))}, PromptFileTensorError, "must hold finite values"),
        (
            {"patch_embed.proj.weight": torch.zeros(120_000, 1, 1, 1)},
            BackboneError,
            r"pos_embed is .*not \(1, 17, 120000",
        ),
        ({"patch_embed.proj.weight": torch.zeros(D, 3, 0, 0)}, BackboneError, "patches of 0 px"),
        (
            {"blocks.1.mlp.fc1.weight": torch.zeros(10**6, 1)},
            BackboneError,
            r"blocks.1.mlp.fc1.weight is \(1000000, 1\)",
        ),
        ({"blocks.0.mlp.fc1.weight": torch.zeros(10**6, 1)}, BackboneError, r"fc1.weight is .*not \(1000000, 64\)"),
    ],
)
def test_bombs_and_odd_tensors(tmp_path, changes, error, words):
    checkpoint(tmp_path / "a.pth", state=changes)
    with pytest.raises(error, match=words):
        read_official(tmp_path / "a.pth")
