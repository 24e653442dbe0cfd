"""backbone_dtype, mixed precision outside the steps, and compile."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils.data import TensorDataset

from lpt_peft import LongTailPromptAdapter, ShotMetrics
from lpt_peft.data.from_dataset import from_dataset
from lpt_peft.errors import BackboneMismatchError, ConfigError, StateError
from lpt_peft.recipe import PhaseSettings, Splits, evaluate, fit, make_accelerator, predict, run_phase, train
from lpt_peft.recipe.parallel import check_precision
from lpt_peft.recipe.progress import Reporter
from lpt_peft.recipe.training.loop import Loop
from tests.conftest import tiny_vit
from tests.recipe.tiny import COUNTS, PHASE, SETTINGS, SHORT, NoiseFreeLoss, result_of, same, striped_data, tiny_adapter

TRAINED = ("shared", "pool", "head")
BFLOAT16 = replace(SHORT, backbone_dtype="bfloat16")


@pytest.fixture
def precision():
    """A fresh accelerator state, for a different mixed precision."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def dtypes_of(module):
    tensors = [*module.parameters(), *(buffer for buffer in module.buffers() if buffer.is_floating_point())]
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


def striped_splits():
    dataset, labels = striped_data()
    return Splits(from_dataset(dataset, labels), validation=striped_data(1)[0], test=striped_data(2)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_backbone_keeps_prompts_and_fingerprint(dtype):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    adapter = tiny_adapter().eval()
    adapter.phase = "group"
    fingerprint, logits = adapter.fingerprint, adapter(images)
    adapter.cast_backbone(dtype)
    assert dtypes_of(adapter.vit) == {dtype}
    assert all(dtypes_of(getattr(adapter, name)) == {torch.float32} for name in TRAINED)
    cast = adapter(images)
    assert cast.dtype == torch.float32
    assert not torch.equal(cast, logits)
    torch.testing.assert_close(cast, logits, rtol=0, atol=0.5)  # of logits up to 20
    assert adapter.features(images).dtype == dtype
    oracle = tiny_vit().to(dtype)  # a ViT cast directly, with the same prompts
    twin = LongTailPromptAdapter.wrap(oracle, 3, prompt_length=2, pool_size=4, query="final").eval()
    twin.load_adapter_state_dict(adapter.adapter_state_dict())
    twin.phase = "group"
    assert torch.equal(twin(images.to(dtype)), cast)
    assert adapter.fingerprint == adapter.frozen_weights.compute_fingerprint() == fingerprint != twin.fingerprint
    adapter.cast_backbone(dtype)
    assert adapter.fingerprint == fingerprint, "a second cast keeps the original fingerprint"
    moved = copy.deepcopy(adapter)
    for parameter in moved.vit.parameters():
        parameter.data = parameter.data.clone()  # as after moving to a device and back
    assert moved.fingerprint == fingerprint
    torch.testing.assert_close(moved.float()(images), cast, rtol=0, atol=0.5)  # inputs follow the weights
    with torch.no_grad():
        moved.vit.norm.weight.add_(1)
    assert moved.fingerprint != fingerprint, "changed weights have another fingerprint"


def test_trainable_layers_of_the_vit_are_not_cast():
    adapter = tiny_adapter()
    trained = adapter.vit.blocks[0].mlp.fc1.weight.requires_grad_(True)
    adapter.cast_backbone(torch.bfloat16)
    assert trained.dtype == torch.float32
    assert adapter.vit.blocks[0].mlp.fc2.weight.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"torch\.float64 must be torch\.float32, torch\.bfloat16 or torch\.float16"):
        adapter.cast_backbone(torch.float64)


def test_a_cast_vit_works_without_the_adapter_and_when_all_of_it_is_trained():
    adapter, images = tiny_adapter(), torch.randn(2, 3, 32, 32)
    adapter.cast_backbone(torch.bfloat16)
    with adapter.disable_adapter():
        assert torch.equal(adapter(images), adapter.vit(images.bfloat16()))
    expected = adapter(images)
    adapter.vit.requires_grad_(True)
    assert torch.equal(adapter(images), expected)


def test_a_run_on_a_cast_backbone(tmp_path):
    """Trained, resumed exactly, saved with the original fingerprint, and evaluated in the same dtype."""
    adapter = tiny_adapter()
    fingerprint = adapter.fingerprint
    results = fit(adapter, striped_splits(), BFLOAT16, tmp_path / "run", progress=False)
    assert dtypes_of(adapter.vit) == {torch.bfloat16}
    assert all(dtypes_of(getattr(adapter, name)) == {torch.float32} for name in TRAINED)
    config = json.loads((tmp_path / "run" / "prompts" / "config.json").read_text())
    assert config["backbone"]["fingerprint"] == fingerprint
    assert config["training"]["recipe"]["backbone_dtype"] == "bfloat16"

    loaded = LongTailPromptAdapter.from_pretrained(tmp_path / "run" / "prompts", tiny_vit())
    test = striped_data(2)[0]
    full = predict(loaded, test)[0].logits
    loaded.cast_backbone(torch.bfloat16)
    assert torch.equal(predict(loaded, test)[0].logits, predict(adapter, test)[0].logits)
    assert not torch.equal(predict(loaded, test)[0].logits, full)
    assert evaluate(loaded, test, ShotMetrics.from_rule("lpt", COUNTS)) == results["test"]
    with pytest.raises(BackboneMismatchError, match="Or was the model cast"):
        LongTailPromptAdapter.from_pretrained(tmp_path / "run" / "prompts", tiny_vit().bfloat16())

    class Interrupting(NoiseFreeLoss):
        def forward(self, output, target, epoch):
            steps.append(0)
            if len(steps) == 13:
                raise RuntimeError("power cut")
            return super().forward(output, target, epoch)

    steps, dataset, labels = [], *striped_data()
    options = {"progress": False, "checkpoints": tmp_path / "cut"}
    with pytest.raises(RuntimeError, match="power cut"):
        train(tiny_adapter(), dataset, labels, BFLOAT16, criterion=Interrupting(4), **options)
    with pytest.raises(StateError, match="settings.backbone_dtype is 'float32' now and was 'bfloat16'"):
        train(tiny_adapter(), dataset, labels, SHORT, criterion=Interrupting(4), **options)
    resumed, uninterrupted = tiny_adapter(), tiny_adapter()
    train(resumed, dataset, labels, BFLOAT16, criterion=Interrupting(4), **options)
    train(uninterrupted, dataset, labels, BFLOAT16, criterion=NoiseFreeLoss(4), progress=False)
    assert same(result_of(resumed), result_of(uninterrupted))


def test_unsupported_casts_are_refused():
    dataset, labels = striped_data()
    float16 = replace(SHORT, backbone_dtype="float16")
    with pytest.raises(ConfigError, match='backbone_dtype="float16" needs mixed_precision="fp16".*not "no"'):
        train(tiny_adapter(), dataset, labels, float16, progress=False)
    with pytest.raises(ConfigError, match="different 16-bit dtypes"):
        check_precision(BFLOAT16, SimpleNamespace(mixed_precision="fp16", scaler=object()))
    for settings, precision in ((float16, "fp16"), (BFLOAT16, "bf16"), (BFLOAT16, "no"), (SHORT, "fp16")):
        check_precision(settings, SimpleNamespace(mixed_precision=precision, scaler=object()))

    class Probe(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = tiny_adapter().head

    with pytest.raises(
        ConfigError, match=r"casts the frozen ViT of an adapter or a linear probe, and a Probe has none"
    ):
        run_phase(Probe(), dataset, labels, BFLOAT16, PHASE, progress=False)


def test_bfloat16_weights_under_bfloat16_autocast(precision):
    """No weight is cast in a step: they have the dtype of autocast."""
    dataset, labels = striped_data()
    adapter = tiny_adapter()
    settings = replace(BFLOAT16, mixed_precision="bf16", group=replace(PHASE, epochs=6))
    history = train(adapter, dataset, labels, settings, progress=False)
    assert dtypes_of(adapter.vit) == {torch.bfloat16}
    assert history[-1]["loss"] < history[0]["loss"]


def test_validation_queries_and_test_use_the_precision_of_the_run(precision, tmp_path, monkeypatch):
    """Every pass of the backbone during the run is in bfloat16, and none afterwards."""
    adapter, seen = tiny_adapter(), {"train": set(), "eval": set()}
    block = adapter.vit.blocks[0].mlp
    block.register_forward_hook(lambda *args: seen["train" if adapter.training else "eval"].add(args[2].dtype))
    counted = []
    queries = LongTailPromptAdapter.queries
    monkeypatch.setattr(
        LongTailPromptAdapter, "queries", lambda self, images: counted.append(images.shape) or queries(self, images)
    )
    settings = replace(SHORT, mixed_precision="bf16")
    results = fit(adapter, striped_splits(), settings, tmp_path, progress=False)
    assert seen == {"train": {torch.bfloat16}, "eval": {torch.bfloat16}}
    assert sum(shape[0] for shape in counted) == sum(COUNTS), "the queries of k-means"
    accelerator = make_accelerator(settings)
    metrics = ShotMetrics.from_rule("lpt", COUNTS)
    test = striped_data(2)[0]
    assert evaluate(adapter, test, metrics, accelerator=accelerator) == results["test"]
    seen["eval"].clear()
    plain = predict(adapter, test)[0].logits
    assert seen["eval"] == {torch.float32}
    assert not torch.equal(predict(adapter, test, accelerator=accelerator)[0].logits, plain)


def compiled_run(steps, restored=None, dtype=None):
    """State after some steps of a compiled phase."""
    settings = replace(SETTINGS, compile=True)
    adapter = tiny_adapter()
    if dtype is not None:
        adapter.cast_backbone(dtype)
    adapter.phase = "group"
    if restored is not None:
        adapter.load_adapter_state_dict(restored[0])
    loop = Loop(
        dataset=striped_data()[0],
        labels=striped_data()[1],
        settings=settings,
        criterion=NoiseFreeLoss(PHASE.epochs),
        accelerator=make_accelerator(settings),
        history=[],
        reporter=Reporter(False, True),
    )
    run = loop.start_phase(adapter, "group", PHASE)
    if restored is not None:
        run.restore(*restored[1:])
    adapter.train()
    images, labels = (tensor[:16] for tensor in striped_data()[0].tensors)
    for _ in range(steps):
        run.training_step(images, labels)
    tensors, numbers = run.state()
    return adapter.adapter_state_dict(), {name: tensor.clone() for name, tensor in tensors.items()}, numbers


@pytest.fixture
def quick_compiler(monkeypatch):
    """torch.compile without code generation: the captured graph runs on eager kernels."""
    calls, compile_ = [], torch.compile

    def quick(model):
        calls.append(model)
        return compile_(model, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", quick)
    yield calls
    torch.compiler.reset()


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-5), (torch.bfloat16, 0.05)])
def test_compiled_steps_resume_exactly_and_equal_eager_steps(quick_compiler, monkeypatch, dtype, tolerance):
    half = compiled_run(3, dtype=dtype)
    resumed, uninterrupted = compiled_run(2, half, dtype=dtype), compiled_run(5, dtype=dtype)
    assert len(quick_compiler) == 3
    assert all(same(*states) for states in zip(resumed[:2], uninterrupted[:2], strict=True))
    assert resumed[2] == uninterrupted[2]
    assert int(uninterrupted[1]["usage"].sum()) == 5 * 16 * 2
    monkeypatch.setattr(torch, "compile", lambda model: model)
    eager = compiled_run(5, dtype=dtype)
    for name, tensor in eager[0].items():
        torch.testing.assert_close(uninterrupted[0][name], tensor, rtol=1e-4, atol=tolerance, msg=name)


def test_compilation_is_announced_once_per_phase(quick_compiler, capsys):
    dataset, labels = striped_data()
    short = replace(SETTINGS, shared=PhaseSettings(epochs=1), group=PhaseSettings(epochs=0), compile=True)
    train(tiny_adapter(), TensorDataset(*dataset.tensors), labels, short, progress="stripes")
    assert capsys.readouterr().err.count("shared: compiling the model; the first step takes about a minute") == 1
    train(tiny_adapter(), dataset, labels, replace(short, compile=False), progress="stripes")
    assert "compiling" not in capsys.readouterr().err
    assert len(quick_compiler) == 1


@pytest.mark.slow
def test_the_real_compiler():
    try:
        states = compiled_run(2), compiled_run(2)
    finally:
        torch.compiler.reset()
    assert all(same(*tensors) for tensors in zip(states[0][:2], states[1][:2], strict=True))


def test_precisions_that_would_not_be_used_are_refused(precision):
    """A scaled loss without a GPU, a precision that only one side has, and one that the loop does not support."""
    dataset, labels = striped_data()
    with pytest.raises(ConfigError, match='mixed_precision="fp16" scales the loss only on a GPU; on cpu small'):
        train(tiny_adapter(), dataset, labels, replace(SHORT, mixed_precision="fp16"), progress=False)
    AcceleratorState._reset_state()
    plain = make_accelerator(SHORT)
    bfloat16 = replace(SHORT, mixed_precision="bf16")
    with pytest.raises(ConfigError, match='accelerator has mixed_precision="no" but the settings "bf16"'):
        train(tiny_adapter(), dataset, labels, bfloat16, accelerator=plain, progress=False)
    with pytest.raises(ConfigError, match='Accelerate cannot be set up with mixed_precision="bf16".*first Accelerator'):
        train(tiny_adapter(), dataset, labels, bfloat16, progress=False)
    with pytest.raises(ConfigError, match='mixed_precision="fp8" of Accelerate is not supported'):
        check_precision(SHORT, SimpleNamespace(mixed_precision="fp8"))
