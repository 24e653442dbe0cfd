"""Prompted blocks against token concatenation: every attention and block class of timm's vision_transformer."""

from __future__ import annotations

import copy
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from timm import layers
from timm.models import vision_transformer as timm_vit
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import nn

from lpt_peft import LongTailPromptAdapter, _call_state, _prompted
from lpt_peft.backbones import find_backbone
from lpt_peft.errors import BackboneError
from lpt_peft.prompting import Prompted, attach_blocks, attentions_of, detach_blocks
from tests.conftest import tiny_vit
from tests.oracle import concatenated_prompts
from tests.versions import skip_unless

BLOCKS = {
    "Block": {},
    "Block, layer scale": {"init_values": 0.3},
    "Block, qk and output norm": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "Block, no qkv bias": {"qkv_bias": False},
    "Block, differential": {"attn_layer": "diff"},
    "Block, differential, norms": {"attn_layer": "diff", "qk_norm": True, "scale_attn_norm": True},
    "ResPostBlock": {"block_fn": timm_vit.ResPostBlock, "init_values": 0.5},
    "ParallelThingsBlock": {"block_fn": timm_vit.ParallelThingsBlock, "init_values": 0.5},
    "ParallelThingsBlock, differential": {"block_fn": timm_vit.ParallelThingsBlock, "attn_layer": "diff"},
    "ParallelScalingBlock": {"block_fn": timm_vit.ParallelScalingBlock, "qk_norm": True, "init_values": 0.5},
    "ParallelScalingBlock, no qkv bias": {"block_fn": timm_vit.ParallelScalingBlock, "qkv_bias": False},
    "DiffParallelScalingBlock": {"block_fn": "DiffParallelScalingBlock"},
    "DiffParallelScalingBlock, norms": {
        "block_fn": "DiffParallelScalingBlock",
        "qk_norm": True,
        "qkv_bias": False,
        "init_values": 0.5,
    },
}
POOLS = {
    "avg": {"global_pool": "avg"},
    "avg, no CLS": {"global_pool": "avg", "class_token": False},
    "avg with registers": {"global_pool": "avg", "reg_tokens": 3},
    "avgmax": {"global_pool": "avgmax"},
    "max": {"global_pool": "max", "fc_norm": False},
    "map": {"global_pool": "map", "class_token": False},
    "prr": {"global_pool": "prr"},
    "none": {"global_pool": ""},
    "none, no CLS": {"global_pool": "", "class_token": False},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "pre-norm": {"pre_norm": True},
    "dynamic size": {"dynamic_img_size": True},
    "no position": {"pos_embed": "none"},
}
IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def vit_with(options):
    """A tiny ViT of a row; skipped if this timm lacks an option of it."""
    known = inspect.signature(VisionTransformer).parameters
    for name, value in options.items():
        skip_unless(name in known, name)
        if value in ("diff", "DiffParallelScalingBlock"):
            skip_unless(hasattr(timm_vit, "DiffParallelScalingBlock"), "differential attention")
        if value == "prr":
            skip_unless("prr" in str(known["global_pool"].annotation), 'global_pool="prr"')
    if isinstance(options.get("block_fn"), str):
        options = {**options, "block_fn": getattr(timm_vit, options["block_fn"])}
    return tiny_vit(**options).double()


def random_prompts(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def reference_feature(vit, images):
    """Pooled feature by timm's own methods."""
    out = vit.forward_head(vit.forward_features(images), pre_logits=True)
    if out.ndim == 3:
        out = out[:, 0] if vit.has_class_token else out.mean(1)
    return out


@pytest.mark.parametrize("per_image", [False, True], ids=["shared", "per-image"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "step-by-step"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_blocks_equal_concatenation(options, training, fused, checkpointing, per_image):
    plain = vit_with(options).train(training)
    for module in plain.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    ours = copy.deepcopy(plain)
    ours.set_grad_checkpointing(checkpointing)
    prompts = [random_prompts(*((3,) if per_image else ()), 4, 24, seed=layer) for layer in range(2)]
    with concatenated_prompts(plain.blocks, prompts):
        expected = reference_feature(plain, IMAGES)
    expected_gradients = torch.autograd.grad((expected**2).sum(), prompts)

    backbone = find_backbone(ours)
    backbone.attach()
    got = backbone.pool(backbone.run(backbone.embed(IMAGES), 0, prompts))
    gradients = torch.autograd.grad((got**2).sum(), prompts)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for actual, value in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(got, reference_feature(plain, IMAGES), atol=1e-3), "the prompt had no effect"


@pytest.mark.parametrize("options", POOLS.values(), ids=POOLS)
def test_pools_equal_concatenation(options):
    vit = vit_with(options)
    prompts = [random_prompts(4, 24, seed=layer) for layer in range(2)]
    with concatenated_prompts(vit.blocks, prompts):
        expected = reference_feature(vit, IMAGES)
    backbone = find_backbone(vit)
    backbone.attach()
    got = backbone.pool(backbone.run(backbone.embed(IMAGES), 0, prompts))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("kind", ["bool", "float", "causal", "per image"])
def test_masks(options, kind):
    """All tokens attend to prompts, whatever the mask. Oracle: the original block with a padded mask."""
    vit = vit_with(options)
    block = vit.blocks[0]
    taken = inspect.signature(block.forward).parameters
    skip_unless("attn_mask" in taken and (kind != "causal" or "is_causal" in taken), "such masks")
    x, prompt = random_prompts(3, 5, 24).detach(), random_prompts(2, 24, seed=1).detach().expand(3, 2, 24)
    mask = torch.rand(5, 5, generator=torch.Generator().manual_seed(2)) > 0.4
    mask |= torch.eye(5, dtype=torch.bool)
    if kind == "per image":
        mask = torch.stack([mask, mask.T, torch.ones_like(mask)])[:, None]
    causal = kind == "causal"
    allowed = torch.ones(5, 5, dtype=torch.bool).tril() if causal else mask
    padded = torch.ones(*allowed.shape[:-2], 7, 7, dtype=torch.bool)
    padded[..., :5, :5] = allowed
    expected = block(torch.cat([x, prompt], 1), attn_mask=padded)[:, :5]
    find_backbone(vit).attach()
    given = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~mask, float("-inf")) if kind == "float" else mask
    masks = {"is_causal": True} if causal else {"attn_mask": given}
    got = block(x, **masks, prompt=prompt)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 1), (3, 1, 5, 1), (1, 5), (3, 1, 1, 5)])
def test_masks_that_are_broadcast(shape):
    """A mask with a single row or column is broadcast; all tokens still attend to prompts."""
    vit = tiny_vit().double()
    block, (x, prompt) = vit.blocks[0], (random_prompts(3, 5, 24).detach(), random_prompts(3, 2, 24, seed=1).detach())
    mask = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    padded = torch.zeros(*mask.shape[:-2], 7, 7, dtype=torch.float64)
    padded[..., :5, :5] = mask
    expected = block(torch.cat([x, prompt], 1), attn_mask=padded)[:, :5]
    find_backbone(vit).attach()
    torch.testing.assert_close(block(x, attn_mask=mask, prompt=prompt), expected, rtol=0, atol=1e-12)


def test_masks_are_passed_to_the_blocks():
    skip_unless("is_causal" in inspect.signature(timm_vit.Block.forward).parameters, "is_causal")
    vit = tiny_vit(global_pool="avg").double()
    adapter = LongTailPromptAdapter.wrap(vit)
    assert not torch.allclose(adapter(IMAGES), adapter(IMAGES, is_causal=True), atol=1e-4)


def test_gated_attention():
    skip_unless("gated" in inspect.signature(Attention).parameters, "gated attention")
    attention = Attention(24, 2, qkv_bias=True, gated=True).double()
    block = tiny_vit().double().blocks[0]
    block.attn = attention
    x, prompt = random_prompts(3, 5, 24).detach(), random_prompts(3, 2, 24, seed=1).detach()
    expected = block(torch.cat([x, prompt], 1))[:, :5]
    vit = tiny_vit().double()
    vit.blocks[0] = block
    find_backbone(vit).attach()
    torch.testing.assert_close(block(x, prompt=prompt), expected, rtol=0, atol=1e-12)


def test_two_passes_before_one_backward_with_checkpointing():
    """The recomputation in the backward pass must use the prompt of its forward pass."""
    gradients = []
    for checkpointing in (False, True):
        vit = tiny_vit().double()
        vit.set_grad_checkpointing(checkpointing)
        backbone = find_backbone(vit)
        backbone.attach()
        first = [random_prompts(4, 24, seed=layer) for layer in range(2)]
        second = [random_prompts(3, 4, 24, seed=9 + layer) for layer in range(2)]
        total = 0
        for prompts in (first, second):
            total = total + (backbone.pool(backbone.run(backbone.embed(IMAGES), 0, prompts)) ** 2).sum()
        gradients.append(torch.autograd.grad(total, first + second))
    for actual, value in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-12, atol=1e-12)


def test_memory_for_backward_equals_that_of_the_plain_block():
    """Concatenation after a packed projection would keep q, k and v twice."""
    vit = tiny_vit()
    vit.requires_grad_(False)
    x, prompt = torch.randn(4, 64, 24, requires_grad=True), torch.randn(1, 2, 24, requires_grad=True)

    def kept(**arguments):
        saved = {}

        def note(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            vit.blocks[0](x, **arguments)
        return sum(saved.values())

    plain = kept()
    find_backbone(vit).attach()
    assert kept(prompt=prompt) < 1.1 * plain * 66 / 64


def test_self_check_refuses_drift(monkeypatch):
    def drifted(self, x, **masks):
        return self.proj(x * 2)

    monkeypatch.setattr(Attention, "forward", drifted)
    vit = tiny_vit()
    before = [type(module) for module in vit.modules()]
    with pytest.raises(BackboneError, match=r"Prompts do not work in Block .*report"):
        LongTailPromptAdapter.wrap(vit)
    assert [type(module) for module in vit.modules()] == before


def test_self_check_refuses_prompts_without_effect(monkeypatch):
    monkeypatch.setattr(_prompted, "_append", lambda tokens, prompt, axis=1: tokens)
    with pytest.raises(BackboneError, match="difference to token concatenation"):
        LongTailPromptAdapter.wrap(tiny_vit())


def test_self_check_does_not_change_modes_and_random_state():
    vit = tiny_vit(proj_drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5).train()
    vit.blocks[0].mlp.eval()
    modes = [module.training for module in vit.modules()]
    state = torch.get_rng_state()
    backbone = find_backbone(vit)
    backbone.attach()
    assert [module.training for module in vit.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_self_check_works_with_a_tiny_layer_scale(dtype):
    """A new LayerScale of 1e-6 makes attention smaller than the rounding error of 16 bits."""
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, init_values=1e-6).to(dtype)
    LongTailPromptAdapter.wrap(vit, 7)
    assert vit.blocks[0].attn.qkv.weight.dtype == dtype


def test_self_check_keeps_weights_that_are_not_floating_point():
    vit = tiny_vit()
    vit.blocks[0].attn.quantized = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    LongTailPromptAdapter.wrap(vit)


def test_self_check_of_meta_modules(monkeypatch):
    skip_unless(hasattr(layers, "calculate_drop_path_rates"), "models on the meta device")
    with torch.device("meta"):
        vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    LongTailPromptAdapter.wrap(vit, 7)
    assert all(isinstance(block, Prompted) for block in vit.blocks)
    assert all(parameter.is_meta for parameter in vit.parameters())
    monkeypatch.setattr(_prompted, "_append", lambda tokens, prompt, axis=1: tokens)
    with torch.device("meta"), pytest.raises(BackboneError, match="difference to token concatenation"):
        LongTailPromptAdapter.wrap(VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2), 7)


def test_attach_and_detach_are_all_or_nothing():
    vit = tiny_vit()
    before = [type(module) for module in vit.modules()]
    attach_blocks(vit.blocks, 24, hint="")
    assert all(isinstance(module, Prompted) for block in vit.blocks for module in (block, *attentions_of(block)))
    with pytest.raises(BackboneError, match=r"Block already takes prompts.*unwrap"):
        attach_blocks(vit.blocks, 24, hint="")
    for _ in range(2):
        detach_blocks(vit.blocks)
        assert [type(module) for module in vit.modules()] == before
    vit.blocks[1].attn.forward = vit.blocks[1].attn.forward
    with pytest.raises(BackboneError, match=r"Attention was replaced on the object.*without offloading"):
        attach_blocks(vit.blocks, 24, hint="")
    assert [type(module) for module in vit.modules()] == before


class Doubled(Attention):
    """A custom attention."""

    def forward(self, x, **masks):
        return 2 * super().forward(x, **masks)


class Ramped(Attention):
    """A custom attention that depends on positions, which prompts do not have."""

    def forward(self, x, **masks):
        ramp = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        return super().forward(x * ramp, **masks)


def with_attention(kind):
    vit = tiny_vit()
    for block in vit.blocks:
        block.attn.__class__ = kind
    return vit


def test_self_check_of_a_custom_attention():
    vit, prompts = with_attention(Doubled).double(), [random_prompts(4, 24, seed=layer) for layer in range(2)]
    with concatenated_prompts(vit.blocks, prompts):
        expected = reference_feature(vit, IMAGES)
    backbone = find_backbone(vit)
    backbone.attach()
    torch.testing.assert_close(backbone.pool(backbone.run(backbone.embed(IMAGES), 0, prompts)), expected)
    vit = with_attention(Ramped)
    before = [type(module) for module in vit.modules()]
    with pytest.raises(BackboneError, match=r"Prompts do not work in Block of .*difference to token.*attn_layer="):
        LongTailPromptAdapter.wrap(vit)
    assert [type(module) for module in vit.modules()] == before


# Attentions that turn autocast off


class Float32Attention(Attention):
    def forward(self, x, **masks):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float(), **masks)


class UncastAttention(Attention):
    """Fails with a dtype error for tokens in bfloat16."""

    def forward(self, x, **masks):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x, **masks)


class DecoratedAttention(Attention):
    @torch.autocast("cpu", enabled=False)
    def forward(self, x, **masks):
        return super().forward(x, **masks)


def in_full_precision(kind):
    return torch.autocast(kind, enabled=False)


class HelperAttention(Attention):
    def forward(self, x, **masks):
        with in_full_precision(x.device.type):
            return super().forward(x, **masks)


class MethodAttention(Attention):
    def full_precision(self):
        return torch.amp.autocast("cpu", enabled=False)

    def forward(self, x, **masks):
        with self.full_precision():
            return super().forward(x, **masks)


class Float32Linear(nn.Linear):
    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


def with_float32_projection():
    vit = tiny_vit()
    for block in vit.blocks:
        block.attn.qkv.__class__ = Float32Linear
    return vit


UNCAST = {
    kind.__name__: lambda kind=kind: with_attention(kind)
    for kind in (Float32Attention, UncastAttention, DecoratedAttention, HelperAttention, MethodAttention)
}
UNCAST["a projection of it"] = with_float32_projection


@pytest.mark.parametrize("name", UNCAST)
def test_attention_that_turns_autocast_off_gets_the_same_dtype_as_without_prompts(name):
    vit, prompts = UNCAST[name](), [random_prompts(4, 24, seed=layer).float() for layer in range(2)]
    images, inputs = IMAGES.float(), []
    for block in vit.blocks:
        block.attn.qkv.register_forward_pre_hook(lambda _, args: inputs.append(args[0].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with concatenated_prompts(vit.blocks, prompts):
            expected = reference_feature(vit, images)
        dtypes = inputs.copy()
        backbone = find_backbone(vit)
        backbone.attach()
        inputs.clear()  # those of the self-check
        actual = backbone.pool(backbone.run(backbone.embed(images), 0, prompts))
    assert set(inputs) == set(dtypes) == {torch.float32}
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_attention_without_autocast_gets_tokens_in_its_dtype():
    vit, dtypes = tiny_vit(), []
    backbone = find_backbone(vit)
    backbone.attach()
    for block in vit.blocks:
        block.attn.qkv.register_forward_pre_hook(lambda _, args: dtypes.append(args[0].dtype))
    prompts = [random_prompts(4, 24, seed=layer).float() for layer in range(2)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        backbone.run(backbone.embed(IMAGES.float()), 0, prompts)
    assert set(dtypes) == {torch.bfloat16}


@pytest.mark.parametrize("phase", ["shared", "group"])
def test_threads_have_their_own_prompts(phase):
    """Eight threads at once, with separate adapters on the same block classes, and with the same ViT."""
    vit = tiny_vit().double()
    adapters = []
    for seed in range(8):
        torch.manual_seed(seed)
        adapter = LongTailPromptAdapter.wrap(copy.deepcopy(vit), 5, prompt_length=3, pool_size=4)
        adapter.shared.prompts.data.normal_()
        adapter.pool.prompts.data.normal_()
        adapter.phase = phase
        adapters.append(adapter.eval())
    backbone = adapters[0].backbone

    def answers(adapter):
        own = backbone.pool(backbone.run(backbone.embed(IMAGES), 0, list(adapter.shared.prompts)))
        return adapter(IMAGES).detach(), own.detach()

    expected = [answers(adapter) for adapter in adapters]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            got = list(pool.map(answers, adapters))
            for actual, value in zip(got, expected, strict=True):
                assert torch.equal(actual[0], value[0])
                assert torch.equal(actual[1], value[1])


class Windowed(Attention):
    """Attention in windows of `window` tokens; 0 for all tokens."""

    window = 0

    def forward(self, x, attn_mask=None, is_causal=False):
        windows = x.split(self.window or x.shape[1], dim=1)
        return torch.cat([super(Windowed, self).forward(window) for window in windows], 1)


@pytest.mark.parametrize("window", [3, 10, 64])
def test_self_check_refuses_windows_in_any_block(window):
    vit = tiny_vit(attn_layer=Windowed)
    vit.blocks[0].attn.window = window  # the last block has the same class and attends to all tokens
    with pytest.raises(BackboneError, match="Prompts do not work in Block"):
        LongTailPromptAdapter.wrap(vit)
    vit.blocks[0].attn.window = 0
    LongTailPromptAdapter.wrap(vit)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_attention_replaced_after_wrap_is_refused(compiled):
    adapter = LongTailPromptAdapter.wrap(tiny_vit()).eval()
    adapter.vit.blocks[1].attn = Attention(24, num_heads=2, qkv_bias=True)
    features = torch.compile(adapter.features, backend="eager") if compiled else adapter.features
    with pytest.raises(BackboneError, match=r"in Block: it did not call the attention.*Replace modules before wrap"):
        features(IMAGES.float())


class Remembering(Attention):
    """Keeps its last output, like code for attention maps."""

    def forward(self, x, attn_mask=None, is_causal=False):
        self.last = super().forward(x, attn_mask, is_causal)
        return self.last


def test_self_check_copies_results_of_a_forward():
    vit = tiny_vit(attn_layer=Remembering)
    vit(IMAGES.float())
    LongTailPromptAdapter.wrap(vit)
    vit = tiny_vit()
    vit.blocks[1].lock = threading.Lock()
    with pytest.raises(BackboneError, match=r"Block of .* cannot be copied.*lock"):
        LongTailPromptAdapter.wrap(vit)
    assert not any(isinstance(module, Prompted) for module in vit.modules())


def test_blocks_called_with_keyword_arguments():
    vit = tiny_vit()
    tokens = torch.randn(2, 5, 24)
    expected = vit.blocks[0](x=tokens)
    LongTailPromptAdapter.wrap(vit)
    assert torch.equal(vit.blocks[0](x=tokens), expected)


def test_hooks_on_blocks_run_when_compiled_with_checkpointing():
    adapter = LongTailPromptAdapter.wrap(tiny_vit().double()).eval()
    adapter.vit.set_grad_checkpointing(True)
    adapter.vit.blocks[0].register_forward_pre_hook(lambda block, args: (args[0] * 0.5,))
    adapter.vit.blocks[1].register_forward_hook(lambda block, args, out: out * 3)
    expected = adapter.features(IMAGES)
    torch.compiler.reset()
    compiled = torch.compile(adapter.features, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGES), expected)


def test_a_failed_checkpointed_block_restores_the_state_of_its_thread(monkeypatch):
    """While compiling; here the function for compilers is called directly."""
    vit = tiny_vit()
    attach_blocks(vit.blocks, 24, hint="")
    tokens, prompt = torch.randn(2, 5, 24, requires_grad=True), torch.randn(1, 3, 24)
    plain = vit.blocks[1](tokens)

    def fail(*args, **kwargs):
        raise ValueError("in the block")

    with monkeypatch.context() as patch:
        patch.setattr(_prompted, "checkpoint", fail)
        with pytest.raises(ValueError, match="in the block"):
            _prompted.checkpoint_in_graph(vit.blocks[0], tokens, prompt, {})
    assert _call_state.call_state.prompt is None
    assert torch.equal(vit.blocks[1](tokens), plain)
