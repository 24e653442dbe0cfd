"""The phase in state dicts, checkpoints, averages and copies of every kind."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import safetensors.torch
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lpt_peft import LongTailPromptAdapter
from tests.conftest import tiny_vit

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
OWN = ["shared.prompts", "pool.prompts", "pool.keys", "head.weight"]


def build(seed=0, phase="shared"):
    """A small adapter with different logits in both phases; prompts depend on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = LongTailPromptAdapter.wrap(tiny_vit(), prompt_length=3, pool_size=5, query="final").eval()
        with torch.no_grad():
            for tensor in (adapter.shared.prompts, adapter.pool.prompts):
                tensor.normal_()
    adapter.phase = phase
    return adapter


def assert_same(loaded, saved):
    assert loaded.phase == saved.phase
    assert torch.equal(loaded(IMAGES), saved(IMAGES))
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == [
        n for n, p in saved.named_parameters() if p.requires_grad
    ]


@pytest.mark.parametrize("phase", ["shared", "group"])
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(phase, assign):
    saved = build(phase=phase)
    for before in ("shared", "group"):
        loaded = build(1, before)
        loaded.load_state_dict(saved.state_dict(), strict=True, assign=assign)
        assert_same(loaded, saved)


def test_loading_clears_gradients_and_keeps_a_frozen_adapter_frozen():
    saved = build(phase="group")
    loaded = build(1).train()
    loaded(IMAGES).sum().backward()
    loaded.load_state_dict(saved.state_dict())
    assert loaded.shared.prompts.grad is None
    frozen = build(1).requires_grad_(False)
    frozen.load_state_dict(saved.state_dict())
    assert frozen.phase == "group"
    assert not any(p.requires_grad for p in frozen.parameters())


def test_nested_in_another_module():
    """As in a LightningModule or DistributedDataParallel."""
    saved, loaded = (nn.ModuleDict({"model": build(seed, phase)}) for seed, phase in ((0, "group"), (1, "shared")))
    assert "model.phase_index" in saved.state_dict()
    loaded.load_state_dict(saved.state_dict())
    assert_same(loaded["model"], saved["model"])


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_without_the_phase_loads_with_a_warning(strict):
    state = build(phase="group").state_dict()
    del state["phase_index"]
    loaded = build(1)
    with pytest.warns(UserWarning, match=r'stays in "shared".*adapter\.phase = "group"') as caught:
        loaded.load_state_dict(state, strict=strict)
    assert len(caught) == 1
    assert loaded.phase == "shared"
    loaded.phase = "group"
    assert torch.equal(loaded(IMAGES), build(phase="group")(IMAGES))


def test_a_state_dict_of_the_backbone_alone_does_not_warn():
    adapter = build(phase="group")
    state = {f"vit.{name}": tensor for name, tensor in tiny_vit().state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.load_state_dict(state, strict=False)
    assert adapter.phase == "group"


def test_an_invalid_phase_is_refused():
    state = {**build().state_dict(), "phase_index": torch.tensor(7)}
    adapter = build(1, "group")
    with pytest.raises(RuntimeError, match=r"phase_index=7 must be 0.*Assign adapter\.phase"):
        adapter.load_state_dict(state)
    assert adapter.phase == "group"
    assert int(adapter.phase_index) == 1


def test_safetensors(tmp_path):
    saved, loaded = build(phase="group"), build(1)
    safetensors.torch.save_model(saved, tmp_path / "model.safetensors")
    safetensors.torch.load_model(loaded, tmp_path / "model.safetensors")
    assert_same(loaded, saved)


@pytest.mark.filterwarnings("ignore:.*weights_only.*")
def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    saved = accelerator.prepare(build(phase="group"))
    accelerator.save_state(tmp_path)
    saved.phase = "shared"
    accelerator.load_state(tmp_path)
    assert saved.phase == "group"
    assert torch.equal(saved(IMAGES), build(phase="group")(IMAGES))


@pytest.mark.parametrize("make", [lambda model: ModelEmaV3(model, decay=0.9), AveragedModel], ids=["timm", "torch"])
def test_moving_averages_have_the_phase_of_their_model(make):
    """A copy from phase "shared" is updated in phase "group", also after it was copied, cast or pickled."""
    model = build()
    averaged = make(model)
    model.phase = "group"
    update = getattr(averaged, "update_parameters", None) or averaged.update
    update(model)
    for twin in (copy.deepcopy(averaged), pickle.loads(pickle.dumps(averaged.module)), averaged):
        inner = getattr(twin, "module", twin).eval()
        expected = build(phase="group")
        expected.load_adapter_state_dict(inner.adapter_state_dict())
        assert torch.equal(inner(IMAGES), expected(IMAGES))
        assert inner.phase == "group"
    update(model)
    assert averaged.module.double().phase == "group"
    model.phase = "shared"
    update(model)
    assert averaged.module.eval().phase == "shared"


@pytest.mark.parametrize("phase", ["shared", "group"])
@pytest.mark.parametrize("options", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}], ids=["swa", "ema"])
def test_an_average_of_the_buffers_too_keeps_its_phase(phase, options):
    model = build(phase=phase)
    averaged = AveragedModel(model, use_buffers=True, **options)
    for _ in range(9):
        averaged.update_parameters(model)
    assert averaged.module.phase == phase
    assert torch.equal(averaged.module.eval()(IMAGES), model(IMAGES))


def replace_tensors(loaded, saved):
    """As accelerate's `load_checkpoint_and_dispatch` does."""
    set_tensor = pytest.importorskip("accelerate.utils").set_module_tensor_to_device
    for name, tensor in saved.state_dict().items():
        set_tensor(loaded, name, "cpu", value=tensor.clone())


def write_tensors(loaded, saved):
    """As `torch.distributed.checkpoint.load(adapter.state_dict())` does."""
    state = loaded.state_dict()
    for name, tensor in saved.state_dict().items():
        state[name].copy_(tensor)


@pytest.mark.parametrize("load", [replace_tensors, write_tensors])
@pytest.mark.parametrize(
    "use",
    [
        lambda adapter: adapter(IMAGES),
        lambda adapter: adapter.train(),
        lambda adapter: adapter.train()(IMAGES),
        lambda adapter: list(adapter.trainable_parameters()),
    ],
    ids=["eval", "train()", "train", "trainable_parameters"],
)
@pytest.mark.parametrize("training", [False, True])
def test_replacing_or_writing_the_buffer_sets_the_phase(load, use, training):
    saved, loaded = build(phase="group"), build(1).train(training)
    load(loaded, saved)
    use(loaded)
    assert loaded._phase == "group", "before anybody reads the property"
    assert_same(loaded.eval(), saved)


def test_trainable_parameters_are_those_of_the_loaded_phase():
    saved, loaded = build(phase="group"), build(1).train()
    write_tensors(loaded, saved)
    trained = {loaded.pool.prompts, loaded.pool.keys, loaded.head.weight}
    assert set(loaded.trainable_parameters()) == trained


def test_a_compiled_adapter_reads_the_phase_at_eval():
    saved, loaded = build(phase="group"), build(1)
    torch._dynamo.reset()
    compiled = torch.compile(loaded, backend="eager")
    compiled(IMAGES)
    write_tensors(loaded, saved)
    compiled.eval()
    torch.testing.assert_close(compiled(IMAGES), saved(IMAGES))


def test_functional_call_takes_the_phase_of_its_tensors():
    saved, adapter = build(phase="group"), build(1)
    before = adapter(IMAGES)
    with torch.no_grad():
        found = torch.func.functional_call(adapter, dict(saved.state_dict()), (IMAGES,))
    assert torch.equal(found, saved(IMAGES))
    assert torch.equal(adapter(IMAGES), before)


def test_an_ensemble_with_vmap_keeps_its_phase():
    adapters = [build(seed, "group") for seed in (0, 1)]
    base, (parameters, buffers) = copy.deepcopy(adapters[0]), torch.func.stack_module_state(adapters)

    def call(*tensors):
        return torch.func.functional_call(base, tensors, (IMAGES,))

    for found, adapter in zip(torch.func.vmap(call)(parameters, buffers), adapters, strict=True):
        torch.testing.assert_close(found, adapter(IMAGES), rtol=1e-4, atol=1e-4)


def test_loading_after_assigning_the_phase_in_inference_mode():
    saved, loaded = build(phase="group"), build(1, "group")
    with torch.inference_mode():
        loaded.phase = "shared"
    loaded.load_state_dict(saved.state_dict())
    assert_same(loaded, saved)


def test_casts_and_reallocation_keep_the_phase():
    adapter = build(phase="group")
    for changed in (adapter.half(), adapter.double(), adapter.to_empty(device="cpu"), adapter.to("meta")):
        assert changed.phase == "group"
        assert changed.phase_index.dtype == torch.int64
    assert int(adapter.to_empty(device="cpu").phase_index) == 1


def test_the_forward_reads_nothing_and_compiles_in_one_graph():
    adapter = build(phase="group")
    torch._dynamo.reset()
    compiled = torch.compile(adapter, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(IMAGES), adapter(IMAGES))
    adapter.phase = "shared"
    torch.testing.assert_close(compiled(IMAGES), adapter(IMAGES))


def test_created_or_changed_in_inference_mode():
    with torch.inference_mode():
        adapter = build(phase="group")
        assert adapter.phase == "group"
        adapter.phase = "shared"
        assert adapter(IMAGES).shape == (3, 7)
    assert copy.deepcopy(adapter).phase == "shared"


# Without the backbone


def test_state_dicts_without_the_backbone():
    saved, loaded = build(phase="group"), build(1)
    saved.backbone_in_state_dict = loaded.backbone_in_state_dict = False
    holder, other = nn.ModuleDict({"net": saved}), nn.ModuleDict({"net": loaded})
    state = holder.state_dict()
    assert set(state) == {f"net.{name}" for name in [*OWN, "pool.usage", "phase_index"]}
    other.load_state_dict(state, strict=True)
    assert_same(loaded, saved)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "net\.head\.weight"'):
        other.load_state_dict({name: tensor for name, tensor in state.items() if name != "net.head.weight"})
    saved.backbone_in_state_dict = True
    assert {name.removeprefix("vit.") for name in saved.state_dict() if name.startswith("vit.")} == set(
        tiny_vit().state_dict()
    )
    loaded.backbone_in_state_dict = True
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state, strict=True)


def test_trainable_parameters_of_the_backbone_stay_in_the_state_dict():
    peft = pytest.importorskip("peft")
    adapter = build()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv"], r=2), adapter.vit)
    adapter.phase = "shared"
    for name, parameter in adapter.vit.named_parameters():
        parameter.requires_grad_("lora_" in name)
    adapter.backbone_in_state_dict = False
    kept = {name for name in adapter.state_dict() if name.startswith("vit.")}
    assert len(kept) == 4
    assert all("lora_" in name for name in kept)
    state = adapter.state_dict()
    del state[kept.pop()]
    with pytest.raises(RuntimeError, match="lora_"):
        adapter.load_state_dict(state)
