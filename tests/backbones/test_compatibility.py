"""Compile, export, distribute, copy: a test for every cell of the table in docs/backbones.md.

Every test compares with the plain adapter on the same weights, which test_timm_all.py and the other files of this
folder compare with token concatenation.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from lpt_peft import LongTailPromptAdapter
from tests.backbones.models import DEPTH, ROWS, build, compiled_phases, images, make, phases, rows, wrap
from tests.backbones.two_processes import everything, gradients, saved
from tests.processes import run_ranks

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@rows
@compiled_phases
def test_compile(row, phase):
    adapter = build(row, phase)
    expected = adapter(images())
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), expected, **CLOSE)


@rows
@phases
def test_export(row, phase):
    adapter = build(row, phase)
    program = torch.export.export(adapter, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(images(3, seed=1)), adapter(images(3, seed=1)), **CLOSE)


@rows
@compiled_phases
def test_onnx(row, phase):
    onnxruntime = pytest.importorskip("onnxruntime")
    adapter = build(row, phase)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # many kinds, from the exporter
        program = torch.onnx.export(
            adapter,
            (images(2),),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    batch = images(3, seed=1)
    (found,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    expected = adapter(batch).detach()
    assert (torch.from_numpy(found) - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


@rows
@phases
def test_checkpointing(row, phase):
    """Two forward passes before a backward pass: recomputation must use the prompt of the same forward pass."""
    if ROWS[row].checkpointing is None:
        pytest.skip("this ecosystem has no checkpointing")
    results = []
    for switch in (None, ROWS[row].checkpointing):
        model = make(row)
        if switch is not None:
            switch(model)
        adapter = wrap(model, phase).double().train()
        first = adapter(images(seed=1).double())
        with torch.no_grad():  # as an optimizer step between two passes would
            for parameter in (adapter.shared.prompts, adapter.pool.prompts):
                parameter.data = parameter.data + 0.1
        second = adapter(images(seed=2).double())
        (first.square().sum() + second.square().sum()).backward()
        results.append({name: p.grad for name, p in adapter.named_parameters() if p.grad is not None})
    plain, recomputed = results
    assert plain.keys() == recomputed.keys()
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.fixture(scope="module")
def first_rank():
    """Results of rank 0 of two."""
    return run_ranks(everything, timeout=600)[0]


def check_gradients(found, row, phase):
    assert not isinstance(found, str), found
    expected = gradients(row, phase, "single")
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.slow
@rows
@phases
def test_ddp(first_rank, row, phase):
    check_gradients(first_rank[row, phase, "DDP"], row, phase)


@pytest.mark.slow
@rows
@phases
def test_fsdp2(first_rank, row, phase):
    check_gradients(first_rank[row, phase, "FSDP2"], row, phase)


@pytest.mark.slow
@rows
def test_fsdp2_saves_after_an_evaluation(first_rank, row):
    found, expected = first_rank[row,], saved(row, "group", "single")
    assert found["config"] == expected["config"]
    assert found["weights"] == expected["weights"]
    assert all(torch.equal(tensor, expected["best"][name]) for name, tensor in found["best"].items())


@rows
@phases
def test_lora(row, phase):
    """Before `wrap`, after it, or merged: the same logits, and different logits without LoRA."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=ROWS[row].lora, r=2, init_lora_weights=False)

    def with_lora(model: nn.Module) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return peft.get_peft_model(model, config)

    before = wrap(with_lora(make(row)), phase)
    after = build(row, phase)
    with_lora(after.vit)
    merged = wrap(with_lora(make(row)).merge_and_unload(), phase)
    plain = build(row, phase)(images())
    found = before(images())
    torch.testing.assert_close(after(images()), found, **CLOSE)
    torch.testing.assert_close(merged(images()), found, rtol=1e-3, atol=1e-4)
    assert (found - plain).abs().max() > 1e-2
    for adapter in (before, after):  # LoRA trains beside the prompts if its parameters require gradients
        lora = [p for name, p in adapter.named_parameters() if "lora_" in name]
        assert lora
        for parameter in lora:
            parameter.requires_grad_(True)
        adapter(images()).square().sum().backward()
        assert all(parameter.grad is not None for parameter in lora)


@rows
@phases
def test_autocast(row, phase):
    adapter = build(row, phase).train()
    expected = adapter(images())
    with torch.autocast("cpu", torch.bfloat16):
        logits = adapter(images())
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max() + 0.5
    logits.square().sum().backward()
    trained = [adapter.shared.prompts if phase == "shared" else adapter.pool.prompts, adapter.head.weight]
    assert all(bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in trained)


@rows
@phases
def test_pickle(row, phase):
    adapter = build(row, phase)
    expected = adapter(images())
    for twin in (pickle.loads(pickle.dumps(adapter)), copy.deepcopy(adapter)):
        assert torch.equal(twin(images()), expected)
        assert twin.vit is not adapter.vit
        assert [type(module) for module in twin.modules()] == [type(module) for module in adapter.modules()]
        twin.unwrap()
    assert torch.equal(adapter(images()), expected)


@rows
@phases
def test_threads(row, phase):
    """Eight threads, each with its adapter, a common adapter and the plain ViT."""
    adapters = [build(row, phase) for _ in range(8)]
    for seed, adapter in enumerate(adapters):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in (adapter.shared.prompts, adapter.pool.prompts):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    common = adapters[0]
    plain = common.vit if isinstance(common.vit(images()), torch.Tensor) else None

    def results(adapter):
        adapter.zero_grad()
        out = adapter(images(seed=1))
        out.square().sum().backward()
        return [
            out.detach(),
            adapter.head.weight.grad,
            common.features(images(seed=2)).detach(),
            torch.zeros(0) if plain is None else plain(images(seed=3)).detach(),
        ]

    expected = [[tensor.clone() for tensor in results(adapter)] for adapter in adapters]
    assert not torch.allclose(expected[0][0], expected[1][0], atol=1e-3)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for found, reference in zip(pool.map(results, adapters), expected, strict=True):
                assert all(torch.equal(*pair) for pair in zip(found, reference, strict=True))


@pytest.mark.parametrize("row", ["timm ViT", "torchvision", "transformers ViT classifier"])
@phases
def test_traces(row, phase):
    """torch.jit.trace, and the TorchScript exporter of ONNX, which uses it."""
    onnxruntime = pytest.importorskip("onnxruntime")
    adapter = build(row, phase).requires_grad_(False)
    expected = adapter(images(2, seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from tracing: shapes become constants
        traced = torch.jit.trace(adapter, (images(2),))
        torch.testing.assert_close(traced(images(2, seed=1)), expected, **CLOSE)
        file = io.BytesIO()
        torch.onnx.export(adapter, (images(2),), file, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    (found,) = session.run(None, {session.get_inputs()[0].name: images(2, seed=1).numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, **CLOSE)


@phases
def test_counting_operations(phase):
    """fvcore counts the matrix products of all passes, but not those of fused attention."""
    fvcore = pytest.importorskip("fvcore.nn")
    adapter = build("timm ViT", phase)
    counted = fvcore.FlopCountAnalysis(adapter, (images(1),)).unsupported_ops_warnings(False)
    blocks = DEPTH + DEPTH // 2 if phase == "group" else DEPTH  # a second pass with the final query
    width, tokens = 48, 17
    linear = blocks * 12 * tokens * width * width
    assert linear < counted.total() < 1.6 * linear


@phases
def test_tensorboard_graph(phase, tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with warnings.catch_warnings(), tensorboard.SummaryWriter(str(tmp_path)) as writer:
        warnings.simplefilter("ignore")
        writer.add_graph(build("timm ViT", phase), images(2))
    assert any(tmp_path.iterdir())


def test_get_peft_model_on_the_adapter_warns():
    peft = pytest.importorskip("peft")
    adapter = build("timm ViT").train()
    model = peft.get_peft_model(adapter, peft.LoraConfig(target_modules=["qkv"], r=2))
    with pytest.warns(UserWarning, match=r"all frozen while training.*Assign adapter\.phase"):
        model(images())
    adapter.phase = "shared"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images()).square().sum().backward()
    assert adapter.shared.prompts.grad is not None
    assert adapter.head.weight.grad is not None


def test_lora_that_upstream_ignores_warns():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make("timm BEiT"), peft.LoraConfig(target_modules=["qkv"], r=2))
    with pytest.warns(UserWarning, match=r"reads qkv\.weight directly, so LoRA on `qkv` has no effect.*proj"):
        LongTailPromptAdapter.wrap(model, 5)(images())
