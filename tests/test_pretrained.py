"""Errors of saving and loading prompt files are those of this library.

Not here: the files themselves (`tests/checkpoint`), the Hub (`tests/hub`).
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from lpt_peft import LongTailPromptAdapter
from lpt_peft.data import transforms
from lpt_peft.errors import BackboneError, ConfigError, HubError, LPTError, PromptFileNotFoundError, StateError
from lpt_peft.pretrained import PretrainedMixin
from tests.checkpoint.adapters import IMAGES, encode_adapter, same_snapshot, snapshot, tiny_adapter
from tests.conftest import tiny_vit

from_pretrained = LongTailPromptAdapter.from_pretrained


@pytest.fixture
def saved(tmp_path):
    tiny_adapter().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_every_keyword_is_spelled_out():
    """Editors complete them, and a misspelt name is an error."""
    for name in ("save_pretrained", "from_pretrained", "load_prompts", "push_to_hub"):
        kinds = {parameter.kind for parameter in inspect.signature(getattr(PretrainedMixin, name)).parameters.values()}
        assert kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("check_backbone", ["error", "warn", "off"])
def test_a_vit_on_the_meta_device(saved, check_backbone):
    vit = tiny_vit().to("meta")
    classes = [type(module) for module in vit.modules()]
    with pytest.raises(BackboneError, match=r"no weights: it is on the meta device.*to_empty"):
        from_pretrained(saved, vit, check_backbone=check_backbone)
    assert [type(module) for module in vit.modules()] == classes
    vit = vit.to_empty(device="cpu")  # as the message says
    vit.load_state_dict(tiny_vit().state_dict())
    assert torch.equal(from_pretrained(saved, vit, check_backbone=check_backbone)(IMAGES), tiny_adapter()(IMAGES))


def test_saving_prompts_without_values(tmp_path):
    with torch.device("meta"):
        adapter = LongTailPromptAdapter.wrap(tiny_vit())
    adapter.to("meta")
    with pytest.raises(StateError, match="meta device"):
        adapter.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_vit_that_is_partly_on_the_meta_device(saved):
    vit = tiny_vit()
    vit.blocks[1].to("meta")
    before = [type(module) for module in vit.modules()]
    with pytest.raises(LPTError, match="meta device"):
        from_pretrained(saved, vit)
    assert [type(module) for module in vit.modules()] == before


def test_an_unwrapped_adapter(tmp_path, saved):
    adapter = tiny_adapter()
    adapter.unwrap()
    for call in (
        lambda: adapter.save_pretrained(tmp_path / "new"),
        lambda: adapter.push_to_hub("me/x"),
        lambda: adapter.load_prompts(saved),
    ):
        with pytest.raises(StateError, match="unwrapped"):
            call()


@pytest.mark.parametrize("vit", ["vit_base_patch16_224", 3, {}, torch.zeros(3)])
def test_something_else_in_place_of_a_vit(saved, vit):
    with pytest.raises(BackboneError, match="takes a ViT"):
        from_pretrained(saved, vit)


@pytest.mark.parametrize("source", ["", ".", "no-such-folder", "a/b/c", "~", "x" * 5000, "a\0b", "hf:me/x"])
def test_sources_that_are_not_prompt_files(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LPTError) as caught:
        from_pretrained(source, tiny_vit())
    assert "Errno" not in str(caught.value)


@pytest.mark.parametrize("source", [None, 3, b"folder", ["folder"]])
def test_sources_of_the_wrong_type(source):
    with pytest.raises(ConfigError, match=r'source=.* must be a folder, or "owner/name"'):
        from_pretrained(source, tiny_vit())
    with pytest.raises(ConfigError, match="source="):
        tiny_adapter().load_prompts(source)


def test_a_vit_in_place_of_a_source(saved):
    with pytest.raises(
        ConfigError, match=r"source=VisionTransformer must be .*from_pretrained\(source, vit\)"
    ) as caught:
        from_pretrained(tiny_vit(), saved)
    assert "\n" not in str(caught.value)


def test_a_file_or_a_run_in_place_of_the_folder(saved, tmp_path):
    for name in ("prompts.safetensors", "config.json"):
        with pytest.raises(
            PromptFileNotFoundError, match=rf"{name} is a file: give its folder, {re.escape(str(saved))}\."
        ):
            from_pretrained(saved / name, tiny_vit())
    saved.rename(tmp_path / "prompts")
    inner = re.escape(str(tmp_path / "prompts"))
    with pytest.raises(PromptFileNotFoundError, match=rf"{inner} is a prompt file: give that folder"):
        from_pretrained(tmp_path, tiny_vit())


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "file/x"], ids=["nul", "long", "file"])
def test_folders_that_cannot_be_created(name, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="choose another folder|Choose another folder") as caught:
        tiny_adapter().save_pretrained(f"{tmp_path}/{name}")
    assert "Errno" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_file_system_without_new_folders():
    with pytest.raises(ConfigError, match=r"The folder '/proc/lpt_peft' cannot be created"):
        tiny_adapter().save_pretrained("/proc/lpt_peft")


def test_options_of_the_wrong_kind(saved):
    vit = tiny_vit()
    before = snapshot(vit)
    for options, words in (
        ({"check_backbone": True}, "check_backbone=True"),
        ({"head_dropout": -0.1}, "head_dropout"),
        ({"subfolder": "../x"}, "subfolder="),
        ({"revision": "v1"}, "revision='v1' is for repositories"),
        ({"num_classes": 8}, "num_classes=8"),
        ({"num_classes": "7"}, "num_classes='7'"),
    ):
        with pytest.raises(ConfigError, match=words):
            from_pretrained(saved, vit, **options)
    assert same_snapshot(before, snapshot(vit))


def test_load_prompts_on_an_adapter_keeps_it_usable_after_errors(saved, tmp_path):
    adapter = tiny_adapter(seed=1)
    before = encode_adapter(adapter)
    for source in (tmp_path / "nothing", tmp_path):
        with pytest.raises(LPTError):
            adapter.load_prompts(source)
    assert encode_adapter(adapter) == before


def test_an_offloaded_transformers_model(tmp_path):
    """accelerate keeps its weights outside of the module."""
    transformers = pytest.importorskip("transformers")
    accelerate = pytest.importorskip("accelerate")
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2}
    config = transformers.ViTConfig(**sizes, num_attention_heads=2, intermediate_size=48)
    torch.manual_seed(0)
    vit = transformers.ViTModel(config).eval()
    state = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    adapter = LongTailPromptAdapter.wrap(vit, 3, prompt_length=2, pool_size=3)
    adapter.save_pretrained(tmp_path)
    offloaded = transformers.ViTModel(config).eval()
    offloaded.load_state_dict(state)
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    with pytest.raises(StateError, match="offloaded, or not loaded yet"):
        from_pretrained(tmp_path, offloaded)
    loaded = from_pretrained(tmp_path, offloaded, check_backbone="off")
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(loaded(images), adapter.eval()(images), atol=1e-5)


def test_images_are_read_as_the_prompt_file_records(tmp_path):
    tiny_adapter().save_pretrained(tmp_path, preprocess={"background": [0, 0, 0], "exif": False, "crop_pct": 1.0})
    adapter = LongTailPromptAdapter.from_pretrained(tmp_path, tiny_vit())
    plain = tiny_adapter().preprocess()
    assert adapter.preprocess() == {**plain, "background": [0, 0, 0], "exif": False, "crop_pct": 1.0}
    transparent = Image.new("RGBA", (40, 40), (255, 255, 255, 0))
    mean, std = (torch.tensor(plain[name])[:, None, None] for name in ("mean", "std"))
    for preprocess, value in ((adapter.preprocess(), 0.0), (plain, 1.0)):
        image = transforms(preprocess, train=False)(transparent)
        torch.testing.assert_close(image * std + mean, torch.full_like(image, value), atol=1e-6, rtol=0)
    adapter.unwrap()
    with pytest.raises(StateError, match="unwrapped"):
        adapter.preprocess()


@pytest.mark.parametrize("source", ["nosuch", "nosuch/folder"])
def test_a_missing_folder_that_could_be_a_repository(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (lambda: from_pretrained(source, tiny_vit()), lambda: tiny_adapter().load_prompts(source)):
        with pytest.raises(HubError) as caught:
            call()
        message = str(caught.value)
        assert message.startswith(f"No folder {tmp_path / source} exists, so {source} was taken for a repository. ")
        assert "Hugging Face Hub" in message
        assert message.endswith("For prompts on disk, correct the path.")


def test_home_directories(tmp_path, monkeypatch):
    home, current = tmp_path / "home", tmp_path / "current"
    home.mkdir()
    current.mkdir()
    monkeypatch.chdir(current)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    adapter = tiny_adapter()
    logits = adapter(IMAGES)
    for folder in ("~/text", Path("~/path")):
        adapter.save_pretrained(folder)
        adapter.load_prompts(folder)
        assert torch.equal(from_pretrained(folder, tiny_vit())(IMAGES), logits)
    adapter.save_pretrained("~/model", subfolder="prompts")
    from_pretrained("~/model", tiny_vit(), subfolder="prompts")
    assert sorted(path.relative_to(home).as_posix() for path in home.rglob("prompts.safetensors")) == [
        "model/prompts/prompts.safetensors",
        "path/prompts.safetensors",
        "text/prompts.safetensors",
    ]
    assert list(current.iterdir()) == []


def test_a_folder_whose_name_begins_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = tiny_adapter()
    for call in (adapter.save_pretrained, adapter.load_prompts):
        with pytest.raises(
            ConfigError, match=r"'~no-such-user/x': this home directory is unknown\. Give the full path"
        ):
            call("~no-such-user/x")
    assert list(tmp_path.iterdir()) == []
    adapter.save_pretrained("./~lpt-backup")
    assert [path.name for path in tmp_path.iterdir()] == ["~lpt-backup"]
    adapter.load_prompts("./~lpt-backup")
    adapter.load_prompts("~lpt-backup")


@pytest.mark.parametrize("folder", [None, 3, b"folder", ["folder"]])
def test_saving_to_something_that_is_not_a_path(folder):
    with pytest.raises(ConfigError, match=r"folder=.* must be a path"):
        tiny_adapter().save_pretrained(folder)
