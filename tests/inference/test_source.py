"""Models from run folders, prompt files, model files and repositories."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from lpt_peft import LongTailPromptAdapter
from lpt_peft.backbones.bundled.glyph_vit import glyph_vit
from lpt_peft.backbones.loading import build_backbone
from lpt_peft.errors import (
    BackboneMismatchError,
    ConfigError,
    HubError,
    ModelFileError,
    PromptFileNotFoundError,
    StateError,
)
from lpt_peft.inference import Classifier
from lpt_peft.inference.run_backbone import RunBackbone, read_run_backbone
from lpt_peft.inference.source import load_model
from lpt_peft.vit_classifier import ViTClassifier
from tests.conftest import tiny_vit
from tests.inference.sample import adapter_of, by_hand, classifier_model_of, pictures, write_run
from tests.inference.test_classifier import assert_predictions

RANDOM = {"backbone": "vit_tiny_patch16_224", "pretrained": False, "img_size": 32, "training": {"seed": 5}}
IMAGES = pictures(3)


def random_vit(seed=5):
    """The backbone of RANDOM, from the seed by hand."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_backbone("vit_tiny_patch16_224", pretrained=False, img_size=32)


@pytest.fixture(scope="module", params=["lpt", "linear_probe", "full"])
def trained(request, tmp_path_factory):
    """A model on a random backbone, and the output folder of its run."""
    vit = random_vit()
    model = adapter_of(vit=vit) if request.param == "lpt" else classifier_model_of(request.param, vit)
    if request.param == "full":
        with torch.no_grad():
            for parameter in model.vit.parameters():
                parameter.mul_(1.01)
    return model, write_run(tmp_path_factory.mktemp("run"), model, **RANDOM)


def test_a_run_builds_its_backbone_from_its_seed(trained):
    model, folder = trained
    assert_predictions(Classifier.from_pretrained(folder)(IMAGES, show=7), by_hand(model, IMAGES))


def test_the_files_of_a_run_load_on_a_given_vit(trained):
    model, folder = trained
    weights = "model/model.safetensors" if isinstance(model, ViTClassifier) else "prompts/prompts.safetensors"
    for source in (folder, str(folder), folder / weights, (folder / weights).parent):
        vit = random_vit()
        classifier = Classifier.from_pretrained(source, vit, batch_size=2)
        assert classifier.model.vit is vit
        assert type(classifier.model) is type(model)
        assert_predictions(classifier(IMAGES, show=7), by_hand(model, IMAGES))
    part = weights.partition("/")[0]
    assert_predictions(
        Classifier.from_pretrained(folder, random_vit(), subfolder=part)(IMAGES, show=7), by_hand(model, IMAGES)
    )


def test_a_cast_of_the_weights(trained):
    model, folder = trained
    classifier = Classifier.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in classifier.model.vit.parameters()} == {torch.bfloat16}
    assert classifier.model.head.weight.dtype is torch.float32
    expected = by_hand(model, IMAGES)
    for prediction, row in zip(classifier(IMAGES, show=7), expected, strict=True):
        found = torch.zeros(7)
        found[list(prediction.labels)] = torch.tensor(prediction.probabilities)
        assert (found - row).abs().max() < 0.1
        assert not torch.equal(found, row)
    with pytest.raises(ConfigError, match=r"dtype=torch.int8 must be torch.float32, torch.bfloat16 or torch.float16"):
        Classifier.from_pretrained(folder, dtype=torch.int8)


def test_a_run_in_bfloat16_is_cast_as_in_its_training(tmp_path):
    model = adapter_of(vit=random_vit())
    folder = write_run(tmp_path, model, **{**RANDOM, "training": {"seed": 5, "backbone_dtype": "bfloat16"}})
    model.cast_backbone(torch.bfloat16)
    loaded = load_model(folder)
    assert next(loaded.vit.parameters()).dtype is torch.bfloat16
    assert_predictions(Classifier(loaded)(IMAGES, show=7), by_hand(model, IMAGES))
    assert next(load_model(folder, dtype=torch.float32).vit.parameters()).dtype is torch.float32
    assert next(load_model(folder, random_vit()).vit.parameters()).dtype is torch.float32, "a given ViT is not changed"


def test_a_run_with_a_file_of_weights(tmp_path):
    vit = tiny = random_vit(8)
    save_file(tiny.state_dict(), tmp_path / "weights.safetensors")
    model = adapter_of(vit=vit)
    settings = {**RANDOM, "pretrained": True, "backbone_weights": str(tmp_path / "weights.safetensors")}
    folder = write_run(tmp_path / "run", model, **settings)
    assert_predictions(Classifier.from_pretrained(folder)(IMAGES, show=7), by_hand(model, IMAGES))


def test_a_prompt_file_builds_the_bundled_backbone(tmp_path):
    model = adapter_of(vit=glyph_vit())
    model.save_pretrained(tmp_path)
    classifier = Classifier.from_pretrained(tmp_path)
    assert not classifier.model.training
    images = torch.stack([classifier.transform(image) for image in IMAGES])
    with torch.no_grad():
        assert_predictions(classifier(IMAGES, show=7), (model(images) / 0.7).softmax(1), atol=1e-6)


def test_another_backbone_is_refused_unless_allowed(tmp_path):
    adapter_of().save_pretrained(tmp_path / "prompts")
    other = tiny_vit(num_classes=0)
    with torch.no_grad():
        other.norm.weight[0] += 1
    with pytest.raises(BackboneMismatchError):
        Classifier.from_pretrained(tmp_path / "prompts", other)
    with pytest.warns(UserWarning, match="weights"):
        Classifier.from_pretrained(tmp_path / "prompts", other, check_backbone="warn")
    classifier_model_of("linear_probe").save_pretrained(tmp_path / "model")
    with pytest.raises(BackboneMismatchError):
        Classifier.from_pretrained(tmp_path / "model", other.eval())
    with pytest.raises(ConfigError, match=r"check_backbone='off' is for prompt files.*leave it out"):
        Classifier.from_pretrained(tmp_path / "model", tiny_vit(num_classes=0), check_backbone="off")


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("nowhere", {}, PromptFileNotFoundError, "nowhere does not exist: give the output folder"),
        ("empty", {}, PromptFileNotFoundError, r"empty has no prompts\.safetensors: give the output folder"),
        ("a/b/c", {}, PromptFileNotFoundError, "a/b/c does not exist"),
        (3, {}, ConfigError, "source=3 must be a path"),
        (b"run", {}, ConfigError, "source=b'run' must be a path"),
        ("unfinished", {}, StateError, "holds no result yet: its training was interrupted"),
        ("prompts", {"revision": "main"}, ConfigError, "revision='main' is for repositories, and prompts is a folder"),
        ("prompts", {"subfolder": "../x"}, ConfigError, "subfolder='../x' must be a path inside"),
        ("prompts", {"device": "cuda:99"}, ConfigError, "device='cuda:99' is not available: .*Give \"cpu\""),
        ("prompts", {"device": "nothing"}, ConfigError, "device='nothing' is not available"),
        ("owner/name", {"local_files_only": True}, HubError, r"No folder .*owner/name exists, so owner/name was taken"),
        ("damaged", {}, ModelFileError, "sha256"),
    ],
)
def test_errors(tmp_path, monkeypatch, source, options, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "settings.json").write_text("{}")
    adapter_of().save_pretrained(tmp_path / "prompts")
    classifier_model_of("full").save_pretrained(tmp_path / "damaged")
    (tmp_path / "damaged" / "head.safetensors").write_bytes(b"x")
    with pytest.raises(error, match=message):
        Classifier.from_pretrained(source, tiny_vit(num_classes=0), **options)


def test_source_and_vit_swapped():
    with pytest.raises(ConfigError, match=r"source=VisionTransformer must be a folder.*from_pretrained\(source, vit\)"):
        Classifier.from_pretrained(tiny_vit(), "run")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "The settings file .*settings.json"),
        ("[]", "settings.json"),
        ("{}", r"does not describe a run: .*lacks \['backbone'\].*Copy the folder again"),
        ('{"backbone": 3}', "backbone=3 must be text"),
        ('{"backbone": "a", "img_size": 0}', "img_size=0 must be an integer of at least 1"),
        ('{"backbone": "a", "training": {"backbone_dtype": "int8"}}', "training.backbone_dtype='int8' must be"),
        ('{"backbone": "a", "training": 3}', "training=3 must be an object"),
    ],
)
def test_damaged_settings(tmp_path, content, message):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_run_backbone(tmp_path)


def test_settings_of_a_run(tmp_path):
    assert read_run_backbone(tmp_path) is None
    settings = {"backbone": "a", "data": "photos", "images": {}, "training": {"seed": 3, "loss": "lpt"}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert read_run_backbone(tmp_path) == RunBackbone(backbone="a", seed=3)
    (tmp_path / "folder" / "settings.json").mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_run_backbone(tmp_path / "folder")


def test_only_core_dependencies_are_imported(tmp_path):
    adapter_of(vit=glyph_vit()).save_pretrained(tmp_path)
    program = (
        "import sys\n"
        "for name in ('accelerate', 'tyro', 'rich', 'sklearn', 'matplotlib', 'transformers', 'datasets'):\n"
        "    sys.modules[name] = None\n"
        "from PIL import Image\n"
        "from lpt_peft import Classifier\n"
        f"print(len(Classifier.from_pretrained({str(tmp_path)!r})(Image.new('RGB', (40, 40)))[0].labels))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "5\n"


def test_the_adapter_remains_usable(tmp_path):
    """The classifier holds the adapter; its prompts can be replaced by those of another task of the same classes."""
    first, second = adapter_of(), adapter_of("shared")
    second.save_pretrained(tmp_path)
    classifier = Classifier(first)
    classifier.model.load_prompts(tmp_path)
    assert isinstance(classifier.model, LongTailPromptAdapter)
    assert_predictions(classifier(IMAGES, show=7), by_hand(second, IMAGES))
