"""from_pretrained without a ViT: the backbone the file names, from the Hub as timm gets it, checked by fingerprint."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save

from lpt_peft import LongTailPromptAdapter
from lpt_peft.errors import BackboneMismatchError, ConfigError, HubError, HubNotFoundError
from tests.hub.conftest import REPO

BACKBONE = "timm/test_vit.r160_in1k"
IMAGES = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def serve(local, seed=0):
    """The pretrained weights of timm's smallest ViT, made up, on the local Hub."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = timm.create_model("test_vit", img_size=160)
    local.hub.create(BACKBONE, "hf_timm", private=False) if BACKBONE not in local.hub.repositories else None
    local.hub.repositories[BACKBONE].put({"model.safetensors": save(vit.state_dict())})


@pytest.fixture
def pushed(local):
    """A prompt file on the pretrained backbone, and what its adapter says."""
    local.hub.accounts.tokens["hf_timm"] = ("timm", True)
    serve(local)
    vit = timm.create_model("test_vit.r160_in1k", pretrained=True, img_size=96).eval()
    adapter = LongTailPromptAdapter.wrap(vit, 3, prompt_length=2, pool_size=3)
    adapter.phase = "group"
    adapter.push_to_hub(REPO)
    return adapter(IMAGES)


def test_built_pretrained_and_checked(local, pushed):
    adapter = LongTailPromptAdapter.from_pretrained(REPO)
    assert not adapter.training
    assert torch.equal(adapter(IMAGES), pushed)
    assert local.hub.repositories[REPO].at("main").files.keys() == {
        *("config.json", "prompts.safetensors", "README.md", ".gitattributes")
    }


def test_the_snippet_on_the_card_runs(local, pushed):
    card = local.hub.repositories[REPO].at("main").files["README.md"].content.decode()
    code, _ = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {}
    exec(code, names)
    assert names["logits"].shape == (1, 3)


def test_the_card_names_the_base_model_where_its_weights_are_the_backbones(local, pushed):
    """Not here: at 96 px the position embedding is another. At the weights' own size it is."""
    card = local.hub.repositories[REPO].at("main").files["README.md"].content.decode()
    assert "base_model" not in card
    vit = timm.create_model("test_vit.r160_in1k", pretrained=True).eval()
    LongTailPromptAdapter.wrap(vit, 3).push_to_hub("me/same")
    card = local.hub.repositories["me/same"].at("main").files["README.md"].content.decode()
    data = ModelCard(card).data
    assert (data.base_model, data.base_model_relation) == (BACKBONE, "adapter")
    LongTailPromptAdapter.wrap(timm.create_model("test_vit.r160_in1k"), 3).push_to_hub("me/random")
    card = local.hub.repositories["me/random"].at("main").files["README.md"].content.decode()
    assert "base_model" not in card


def test_other_weights_of_the_same_name_are_refused(local, pushed):
    serve(local, seed=1)
    with pytest.raises(BackboneMismatchError, match="same architecture, other weights"):
        LongTailPromptAdapter.from_pretrained(REPO)
    with pytest.warns(UserWarning, match="other weights"):
        LongTailPromptAdapter.from_pretrained(REPO, check_backbone="warn")


def test_a_backbone_that_cannot_be_fetched(local, pushed, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    del local.hub.repositories[BACKBONE]
    local.hub.objects.clear()
    with pytest.raises(HubError, match=r"Downloading the backbone test_vit") as caught:
        LongTailPromptAdapter.from_pretrained(REPO)
    assert isinstance(caught.value, HubNotFoundError)


def test_a_random_backbone_has_no_tag_to_build(local):
    vit = timm.create_model("test_vit4")
    LongTailPromptAdapter.wrap(vit, 3).push_to_hub(REPO)
    with pytest.raises(ConfigError, match=r"test_vit4 \(tag .*\).*from_pretrained\(folder, vit\)"):
        LongTailPromptAdapter.from_pretrained(REPO)
    assert "vit: the backbone that" in local.hub.repositories[REPO].at("main").files["README.md"].content.decode()


@pytest.fixture
def pretrained(local, tmp_path):
    """A transformers model with its weights on the local Hub, as its maker would push it."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)  # it asks for a recent client
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48}

    def serve_model(layers=2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = transformers.ViTModel(transformers.ViTConfig(**sizes, num_hidden_layers=layers))
        model.save_pretrained(tmp_path / "model")
        names = ("config.json", "model.safetensors")
        local.hub.repositories["google/tiny"].put({name: (tmp_path / "model" / name).read_bytes() for name in names})
        return transformers.ViTModel

    local.hub.accounts.tokens["hf_google"] = ("google", True)
    local.hub.create("google/tiny", "hf_google", private=False)
    return serve_model


def test_a_transformers_backbone_is_built_and_checked(local, pretrained):
    small = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    vit = pretrained().from_pretrained("google/tiny").eval()
    adapter = LongTailPromptAdapter.wrap(vit, 3, prompt_length=2, pool_size=3)
    adapter.phase = "group"
    adapter.push_to_hub(REPO)
    twin = LongTailPromptAdapter.from_pretrained(REPO)
    assert type(twin.vit) is type(vit)
    assert not twin.training
    assert torch.equal(twin(small), adapter(small))


def test_a_repository_with_a_model_of_another_size_downloads_no_weights(local, pretrained, monkeypatch):
    model_class = pretrained()
    vit = model_class.from_pretrained("google/tiny").eval()
    LongTailPromptAdapter.wrap(vit, 3).push_to_hub(REPO)
    pretrained(layers=4)
    monkeypatch.setattr(model_class, "from_pretrained", None)  # to call it would be an error
    with pytest.raises(ConfigError, match=r"google/tiny on the Hub has depth 4, and .* trained on a model with 2"):
        LongTailPromptAdapter.from_pretrained(REPO)
