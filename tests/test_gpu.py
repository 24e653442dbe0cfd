"""The adapter on a CUDA device: no synchronisation, precisions, compilation, graphs, DDP by NCCL, prompt files.

Skipped without a GPU. `python -m pytest tests/test_gpu.py -n 0` takes about a minute on a GPU.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn

from lpt_peft import LongTailPromptAdapter, LPTLoss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CLASSES = 20
COUNTS = [100 - 4 * label for label in range(CLASSES)]


@pytest.fixture(params=["shared", "group"])
def adapter(request):
    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch16_224", num_classes=CLASSES, img_size=64, depth=4).cuda()
    adapter = LongTailPromptAdapter.wrap(vit)
    adapter.phase = request.param
    return adapter


@pytest.fixture
def images():
    return torch.randn(16, 3, 64, 64, device="cuda")


@pytest.fixture
def target():
    return torch.arange(16, device="cuda") % CLASSES


@pytest.fixture
def criterion():
    return LPTLoss(COUNTS, epochs=3).cuda()


def sgd(adapter):
    return torch.optim.SGD(list(adapter.trainable_parameters()), lr=0.05, momentum=0.9)


@contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_check_of_synchronisation_finds_a_host_read():
    x = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"), no_synchronisation():
        x.sum().item()


def test_a_training_step_does_not_synchronise(adapter, images, target, criterion):
    adapter.train()
    optimizer = sgd(adapter)

    def step(epoch):
        criterion(adapter(images, return_output=True), target, epoch).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    with no_synchronisation():
        for epoch in range(3):
            step(epoch)


def test_evaluation_does_not_synchronise(adapter, images):
    adapter.eval()
    with torch.no_grad():
        adapter(images)
        with no_synchronisation():
            adapter(images, return_output=True)


def test_equals_the_cpu_in_float64(adapter, images):
    adapter.double().eval()
    images = images.double()
    with torch.no_grad():
        logits = adapter(images)
        torch.testing.assert_close(copy.deepcopy(adapter).cpu()(images.cpu()), logits.cpu(), atol=1e-11, rtol=0)


def test_float16_with_a_gradient_scaler(adapter, images, target, criterion):
    adapter.train()
    optimizer, scaler, losses = sgd(adapter), torch.amp.GradScaler("cuda"), []
    for _ in range(12):
        with torch.autocast("cuda", torch.float16):
            loss = criterion(adapter(images, return_output=True), target, 0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(adapter.trainable_parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_bfloat16_autocast_is_near_float32(adapter, images):
    adapter.eval()
    with torch.no_grad():
        logits = adapter(images)
        with torch.autocast("cuda", torch.bfloat16):
            rounded = adapter(images)
    assert (rounded.float() - logits).norm() < 0.03 * logits.norm()


def test_compiles_as_one_graph(adapter, images, target, criterion):
    torch._dynamo.reset()
    adapter.eval()
    with torch.no_grad():
        logits = adapter(images)
        torch.testing.assert_close(torch.compile(adapter, fullgraph=True)(images), logits, atol=2e-2, rtol=0)
    adapter.train()
    criterion(torch.compile(adapter, fullgraph=True)(images, return_output=True), target, 0).backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in adapter.trainable_parameters())


def test_a_cuda_graph_replays_with_other_images(adapter, images):
    adapter.eval()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(stream):
            for _ in range(3):
                adapter(images)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = adapter(images)
        images.copy_(torch.randn_like(images))
        graph.replay()
        torch.testing.assert_close(logits, adapter(images), atol=1e-3, rtol=0)


def test_activation_checkpointing_gives_the_same_gradients(adapter, images, target):
    adapter.train()
    gradients = []
    for enabled in (True, False):
        adapter.set_grad_checkpointing(enabled)
        torch.manual_seed(1)
        adapter.zero_grad()
        nn.functional.cross_entropy(adapter(images), target).backward()
        gradients.append([p.grad.clone() for p in adapter.trainable_parameters() if p.grad is not None])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=0)


def test_ddp_by_nccl(adapter, images, target, criterion, tmp_path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(adapter.train(), device_ids=[0])
        optimizer, losses = sgd(adapter), []
        for _ in range(6):
            loss = criterion(model(images, return_output=True), target, 0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    finally:
        dist.destroy_process_group()
    assert losses[-1] < losses[0]


def test_prompt_file(adapter, images, tmp_path):
    adapter.eval()
    adapter.save_pretrained(tmp_path)
    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch16_224", num_classes=CLASSES, img_size=64, depth=4).cuda()
    loaded = LongTailPromptAdapter.from_pretrained(tmp_path, vit).eval()
    assert loaded.head.weight.is_cuda
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), adapter(images), atol=0, rtol=0)
