"""The adapter against the oracle of the method, and as an ordinary torch module."""

from __future__ import annotations

import copy
import inspect
import pickle
import pydoc

import pytest
import timm
import torch
from torch import nn

from lpt_peft import AdapterOutput, LongTailPromptAdapter, PromptConfig
from lpt_peft.backbones import find_backbone
from lpt_peft.errors import BackboneError, ConfigError, InputError, LPTError, StateError
from lpt_peft.prompting import Prompted
from tests.conftest import tiny_vit
from tests.oracle import lpt_by_concatenation

IMAGES = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LOW_PRECISION = 0.15  # of logits up to 8; bfloat16 makes 0.05, and a permuted pool 0.34


def tiny_adapter(phase="shared", dtype=torch.float64, seed=0, **options):
    vit = tiny_vit(depth=3, **options).to(dtype)
    adapter = LongTailPromptAdapter.wrap(vit, prompt_length=4, pool_size=6, top_k=2, shared_layers=1, query="final")
    generator = torch.Generator().manual_seed(seed)
    adapter.load_adapter_state_dict(
        {name: torch.randn(shape, generator=generator) for name, shape in adapter.prompt_config.tensor_shapes.items()}
    )
    adapter.phase = phase
    return adapter.eval()


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_whole_method_against_the_oracle(pool):
    adapter = tiny_adapter("group", global_pool=pool)
    trained = adapter.adapter_state_dict()
    images = IMAGES.double()
    out = adapter(images, return_output=True)
    assert isinstance(out, AdapterOutput)
    vit = adapter.unwrap()
    expected = lpt_by_concatenation(
        vit,
        images,
        trained["shared.prompts"],
        trained["pool.prompts"],
        trained["pool.keys"],
        trained["head.weight"],
        2,
        20.0,
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(getattr(out, name), tensor, rtol=0, atol=1e-11, msg=name)


def test_groups_and_logits_do_not_depend_on_the_batch():
    adapter = tiny_adapter("group")
    images = IMAGES.double()
    whole = adapter(images, return_output=True)
    for i in range(len(images)):
        alone = adapter(images[i : i + 1], return_output=True)
        assert torch.equal(alone.groups[0], whole.groups[i])
        torch.testing.assert_close(alone.logits[0], whole.logits[i], rtol=0, atol=1e-12)


def test_first_blocks_run_once_and_the_query_pass_has_no_gradient():
    adapter = tiny_adapter("group")
    calls: list[tuple[int, bool]] = []
    for index, block in enumerate(adapter.vit.blocks):
        block.register_forward_hook(lambda _, __, out, index=index: calls.append((index, out.requires_grad)))
    out = adapter(IMAGES.double(), return_output=True)
    # K = 1: block 0 once; blocks 1 and 2 for the query without gradient, then with.
    assert calls == [(0, False), (1, False), (2, False), (1, True), (2, True)]
    assert not out.query.requires_grad
    assert out.similarity.requires_grad


@pytest.mark.parametrize("phase", ["shared", "group"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_parameters_of_the_phase_get_gradients(phase, checkpointing):
    adapter = tiny_adapter(phase).train()
    adapter.vit.set_grad_checkpointing(checkpointing)
    out = adapter(IMAGES.double(), return_output=True)
    (out.logits.square().sum() + out.similarity.sum()).backward()
    got = {name for name, p in adapter.named_parameters() if p.grad is not None}
    expected = {"shared": {"shared.prompts"}, "group": {"pool.prompts", "pool.keys"}}[phase] | {"head.weight"}
    assert got == expected == {name for name, p in adapter.named_parameters() if p.requires_grad}
    assert {id(p) for p in adapter.trainable_parameters()} == {id(adapter.get_parameter(name)) for name in expected}


@pytest.mark.parametrize("phase", ["shared", "group"])
def test_input_gradients_flow(phase):
    """Saliency maps need gradients through frozen parameters."""
    images = IMAGES.double().requires_grad_()
    tiny_adapter(phase)(images).sum().backward()
    assert images.grad.abs().sum() > 0


def test_vit_base_counts_neutrality_and_unwrap():
    vit = timm.create_model("vit_base_patch16_224").eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        before = vit(images)
    state = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    trainable = {name: p.requires_grad for name, p in vit.named_parameters()}
    classes = [type(module) for module in vit.modules()]
    adapter = LongTailPromptAdapter.wrap(vit, 365)

    def unchanged():
        with torch.no_grad():
            assert torch.equal(vit(images), before)
        assert list(vit.state_dict()) == list(state)
        assert all(torch.equal(tensor, state[name]) for name, tensor in vit.state_dict().items())

    unchanged()
    trained: set[str] = set()
    for phase in ("shared", "group"):
        adapter.phase = phase
        trained |= {name for name, p in adapter.named_parameters() if p.requires_grad}
    assert sum(adapter.get_parameter(name).numel() for name in trained if name != "head.weight") == 1_029_120
    assert adapter.prompt_config.num_prompt_parameters == 1_029_120
    with torch.no_grad():
        assert adapter(images).shape == (1, 365)
    unchanged()
    assert adapter.unwrap() is vit
    unchanged()
    assert [type(module) for module in vit.modules()] == classes
    assert {name: p.requires_grad for name, p in vit.named_parameters()} == trainable


def test_unwrap_restores_a_partly_frozen_model():
    vit = tiny_vit()
    vit.patch_embed.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in vit.named_parameters()}
    adapter = LongTailPromptAdapter.wrap(vit)
    assert not any(p.requires_grad for p in vit.parameters())
    adapter.unwrap()
    assert {name: p.requires_grad for name, p in vit.named_parameters()} == flags
    for call in (adapter.unwrap, lambda: adapter(IMAGES), lambda: adapter.fingerprint):
        with pytest.raises(StateError, match=r"unwrapped.*wrap\(vit\)"):
            call()


def test_second_wrap_is_refused():
    vit = tiny_vit()
    adapter = LongTailPromptAdapter.wrap(vit)
    with pytest.raises(BackboneError, match=r"already takes prompts.*unwrap"):
        LongTailPromptAdapter.wrap(vit)
    assert adapter(IMAGES).shape == (5, 7), "the refused second wrap changed the first"
    adapter.unwrap()
    LongTailPromptAdapter.wrap(vit)


@pytest.mark.parametrize("phase", ["shared", "group"])
def test_deepcopy_and_pickle(phase):
    adapter = tiny_adapter(phase)
    images = IMAGES.double()
    expected = adapter(images)
    for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert twin.phase == phase
        assert torch.equal(twin(images), expected)
        assert twin.backbone.model is twin.vit
        with torch.no_grad():
            for parameter in twin.vit.parameters():
                parameter.zero_()
    assert torch.equal(adapter(images), expected), "copies must not share tensors"
    vit = copy.deepcopy(adapter.vit)
    assert all(isinstance(block, Prompted) for block in vit.blocks)
    torch.testing.assert_close(vit(images), adapter.vit(images), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["shared", "group"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compile_in_one_graph(phase, checkpointing):
    adapter = tiny_adapter(phase, torch.float32)
    adapter.vit.set_grad_checkpointing(checkpointing)
    torch._dynamo.reset()
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    out, expected = compiled(IMAGES, return_output=True), adapter(IMAGES, return_output=True)
    for actual, value in zip(out, expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-4, atol=1e-4)
    gradients = [
        torch.autograd.grad(o.logits.square().mean() + o.similarity.sum(), list(adapter.trainable_parameters()))
        for o in (out, expected)
        if phase == "group"
    ] or [torch.autograd.grad(o.logits.square().mean(), list(adapter.trainable_parameters())) for o in (out, expected)]
    for actual, value in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compile_with_inductor():
    adapter = tiny_adapter("group", torch.float32)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(adapter, fullgraph=True)
        torch.testing.assert_close(compiled(IMAGES), adapter(IMAGES), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("phase", ["shared", "group"])
def test_autocast_bfloat16(phase):
    adapter = tiny_adapter(phase, torch.float32)
    expected = adapter(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        out = adapter(IMAGES, return_output=True)
    assert out.logits.dtype == torch.float32, "logits and selection keep full precision"
    torch.testing.assert_close(out.logits, expected, rtol=0, atol=LOW_PRECISION)
    out.logits.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in [adapter.head.weight])


@pytest.mark.parametrize("phase", ["shared", "group"])
def test_bfloat16_backbone(phase):
    expected = tiny_adapter(phase, torch.float32)(IMAGES)
    adapter = tiny_adapter(phase, torch.bfloat16)
    assert adapter.shared.prompts.dtype == adapter.pool.keys.dtype == adapter.head.weight.dtype == torch.float32
    logits = adapter(IMAGES.bfloat16())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=LOW_PRECISION)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.trainable_parameters() if p.ndim > 2)


@pytest.mark.parametrize(
    "mix",
    [
        lambda adapter: (adapter.pool.prompts, adapter.pool.prompts.flip(0)),
        lambda adapter: (adapter.pool.prompts, adapter.pool.prompts.roll(1, 0)),
        lambda adapter: (adapter.pool.prompts, adapter.pool.prompts.flip(1)),
        lambda adapter: (adapter.shared.prompts, adapter.shared.prompts.roll(1, 0)),
    ],
    ids=["groups reversed", "groups shifted", "layers reversed", "shared layers shifted"],
)
def test_tolerance_of_low_precision_detects_mixed_up_prompts(mix):
    expected = tiny_adapter("group", torch.float32)(IMAGES)
    adapter = tiny_adapter("group", torch.bfloat16)
    with torch.no_grad():
        parameter, mixed = mix(adapter)
        parameter.copy_(mixed.clone())
        assert (adapter(IMAGES.bfloat16()) - expected).abs().max() > 2 * LOW_PRECISION


def test_train_to_and_state_dict():
    adapter = tiny_adapter("group", torch.float32)
    assert not adapter.vit.training
    assert adapter.train().vit.training
    assert adapter.double().pool.prompts.dtype == torch.float64
    state = adapter.state_dict()
    assert {name for name in state if not name.startswith("vit.")} == {
        *adapter.prompt_config.tensor_shapes,
        *("pool.usage", "phase_index"),
    }
    twin = tiny_adapter("group", seed=1).double().eval()
    twin.load_state_dict(state)
    assert torch.equal(twin(IMAGES.double()), adapter.eval()(IMAGES.double()))
    assert "CosineClassifier" in repr(adapter)


def test_wrap_keeps_train_and_eval_modes():
    assert LongTailPromptAdapter.wrap(tiny_vit().train()).training
    assert not LongTailPromptAdapter.wrap(tiny_vit().eval()).training
    vit = tiny_vit().train()
    vit.blocks[0].mlp.eval()
    modes = [module.training for module in vit.modules()]
    adapter = LongTailPromptAdapter.wrap(vit)
    assert [module.training for module in vit.modules()] == modes
    assert adapter.pool.training


def test_batch_norms_of_a_hybrid_stay_frozen():
    vit = timm.create_model("vit_small_resnet26d_224", img_size=64, depth=2).train()
    norms = [part for part in vit.modules() if isinstance(part, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    adapter = LongTailPromptAdapter.wrap(vit, 5)
    adapter(torch.randn(2, 3, 64, 64))
    adapter.train()(torch.randn(2, 3, 64, 64))
    assert norms
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    assert adapter.unwrap() is vit
    assert all(norm.training for norm in norms)


def test_head_dropout_in_training_only():
    adapter = tiny_adapter(dtype=torch.float32)
    assert torch.equal(adapter(IMAGES), adapter(IMAGES))
    adapter.train()
    assert not torch.equal(adapter(IMAGES), adapter(IMAGES))
    assert torch.equal(adapter.features(IMAGES), adapter.features(IMAGES))


def test_output_in_the_shared_phase():
    out = tiny_adapter()(IMAGES.double(), return_output=True)
    assert out.similarity.shape == out.groups.shape == (5, 0)
    assert out.groups.dtype == torch.int64
    assert torch.equal(out.features, out.query)


def test_usage_is_counted_in_training_only():
    adapter = tiny_adapter("group")
    adapter(IMAGES.double())
    assert adapter.pool.usage.sum() == 0
    out = adapter.train()(IMAGES.double(), return_output=True)
    assert torch.equal(adapter.pool.usage, torch.bincount(out.groups.flatten(), minlength=6))
    assert adapter.pool.dead_groups() == [i for i in range(6) if i not in out.groups]


def test_adapter_state_dict_round_trip_and_refusals():
    adapter, other = tiny_adapter(seed=0), tiny_adapter(seed=1)
    tensors = adapter.adapter_state_dict()
    assert list(tensors) == ["shared.prompts", "pool.prompts", "pool.keys", "head.weight"]
    assert [tuple(t.shape) for t in tensors.values()] == [(3, 4, 24), (6, 2, 4, 24), (6, 24), (7, 24)]
    assert not any(t.requires_grad for t in tensors.values())
    before = {name: t.clone() for name, t in other.adapter_state_dict().items()}
    bad = {
        "missing": {k: v for k, v in tensors.items() if k != "pool.keys"},
        "unknown": {**tensors, "vit.cls_token": torch.zeros(1)},
        "shape": {**tensors, "head.weight": tensors["head.weight"].T},
        "NaN": {**tensors, "head.weight": torch.full((7, 24), float("nan"))},
        "floating": {**tensors, "head.weight": torch.zeros(7, 24, dtype=torch.int64)},
    }
    for word, broken in bad.items():
        with pytest.raises(InputError, match=word):
            other.load_adapter_state_dict(broken)
        assert all(torch.equal(t, before[name]) for name, t in other.adapter_state_dict().items())
    other.load_adapter_state_dict(tensors)
    assert all(torch.equal(t, tensors[name]) for name, t in other.adapter_state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt_length": 0}, "prompt_length=0"),
        ({"pool_size": 3, "top_k": 4}, "top_k=4 must be from 1 to 3"),
        ({"shared_layers": 2}, "shared_layers=2 must be from 0 to 1"),
        ({"shared_layers": "1"}, "shared_layers='1' must be an integer"),
        ({"head_dropout": 1.0}, "head_dropout"),
        ({"logit_scale": 0}, "logit_scale=0"),
        ({"logit_scale": float("nan")}, "logit_scale=nan"),
        ({"num_classes": True}, "num_classes=True"),
    ],
)
def test_invalid_settings_leave_the_model_unchanged(arguments, words):
    vit = tiny_vit()
    with pytest.raises(ConfigError, match=words):
        LongTailPromptAdapter.wrap(vit, **arguments)
    assert not any(isinstance(module, Prompted) for module in vit.modules())
    assert all(p.requires_grad for p in vit.parameters())


def test_errors_name_the_model():
    with pytest.raises(ConfigError, match="has no classifier"):
        LongTailPromptAdapter.wrap(tiny_vit(num_classes=0))
    with pytest.raises(BackboneError, match="wrap\\(\\) takes a ViT"):
        LongTailPromptAdapter.wrap("vit_base_patch16_224")
    with pytest.raises(BackboneError, match="Linear of torch.*vit_base_patch16_224"):
        LongTailPromptAdapter.wrap(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r'"shared" or "group"'):
        tiny_adapter().phase = "both"
    assert issubclass(BackboneError, LPTError)


def test_a_configuration_of_another_size_is_refused():
    config = PromptConfig(dim=16, depth=2, num_classes=3)
    vit = tiny_vit()
    with pytest.raises(ConfigError, match="width 16, 2 blocks"):
        LongTailPromptAdapter(find_backbone(vit), config)
    assert not any(isinstance(module, Prompted) for module in vit.modules())


def test_unwrap_keeps_requires_grad_of_lora():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    vit = tiny_vit()
    adapter = LongTailPromptAdapter.wrap(vit)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv"], r=2), vit)
    for name, parameter in vit.named_parameters():
        parameter.requires_grad_("lora_" in name)
    before = {name: parameter.requires_grad for name, parameter in vit.named_parameters()}
    assert {name: p.requires_grad for name, p in adapter.unwrap().named_parameters()} == before


def test_state_dict_holds_copies():
    adapter = LongTailPromptAdapter.wrap(tiny_vit())
    best = adapter.adapter_state_dict()
    before = {name: tensor.clone() for name, tensor in best.items()}
    with torch.no_grad():
        adapter.shared.prompts.add_(1)
    assert all(torch.equal(best[name], before[name]) for name in best)


def test_errors_in_the_self_check_leave_the_model_unchanged():
    class Odd(torch.nn.Module):
        def forward(self, x):
            assert x.shape[1] == 5
            return x

    vit = tiny_vit()
    vit.blocks[1].mlp = Odd()
    kinds = [type(block) for block in vit.blocks]
    with pytest.raises(BackboneError, match="cannot be run on tokens alone"):
        LongTailPromptAdapter.wrap(vit)
    assert [type(block) for block in vit.blocks] == kinds
    vit.blocks[1].mlp.forward = lambda x: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        LongTailPromptAdapter.wrap(vit)
    assert [type(block) for block in vit.blocks] == kinds


def test_a_block_that_is_used_several_times():
    tied = tiny_vit()
    untied = copy.deepcopy(tied)
    untied.blocks = torch.nn.Sequential(*(copy.deepcopy(untied.blocks[0]) for _ in range(3)))
    tied.blocks = torch.nn.Sequential(*[tied.blocks[0]] * 3)
    ours, theirs = (LongTailPromptAdapter.wrap(vit, 4) for vit in (tied, untied))
    theirs.load_adapter_state_dict(ours.adapter_state_dict())
    for phase in ("shared", "group"):
        ours.phase = theirs.phase = phase
        assert torch.equal(ours(IMAGES), theirs(IMAGES))
    kinds = {type(block) for block in ours.unwrap().blocks}
    assert kinds == {type(tiny_vit().blocks[0])}


def test_help():
    text = pydoc.plain(pydoc.render_doc(LongTailPromptAdapter))
    head = text.splitlines()[:10]
    assert any("Create an adapter with `wrap(vit, num_classes)`" in line for line in head)
    assert "Initialize internal Module state" not in text
    places = [
        text.index(f"\n |  {name}(") for name in ("wrap", "forward", "save_pretrained", "get_classifier", "buffers")
    ]
    assert places == sorted(places), "the class itself, then calls, files, delegates, and nn.Module last"
    own = [cls for cls in LongTailPromptAdapter.__mro__ if cls.__module__.startswith("lpt_peft")]
    for cls in own:
        for name, member in vars(cls).items():
            if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                doc = inspect.getdoc(member)
                assert doc, name
                assert doc.splitlines()[0].endswith("."), name
