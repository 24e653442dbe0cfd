"""The calls of torchvision's reference script (references/classification/train.py) on a wrapped ViT.

The script is in no package; these tests use the same functions of torch and torchvision in the same way.
"""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision.models import VisionTransformer
from torchvision.transforms import v2

from lpt_peft import LongTailPromptAdapter

CLASSES = 3
phases = pytest.mark.parametrize("phase", ["shared", "group"])


def build(phase="shared", seed=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=CLASSES)
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        torch.manual_seed(seed)
        adapter = LongTailPromptAdapter.wrap(vit, prompt_length=2, pool_size=4, head_dropout=0.0)
    adapter.phase = phase
    return adapter


def data(count=24):
    generator = torch.Generator().manual_seed(2)
    target = torch.arange(count) % CLASSES
    means = torch.randn(CLASSES, 3, 1, 1, generator=generator)
    return TensorDataset(means[target] + 0.5 * torch.randn(count, 3, 32, 32, generator=generator), target)


def average(model, decay=0.5):
    """Moving average of the script, of parameters and buffers."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def parameter_groups(model, decay, norm_decay, custom):
    """Groups of the script: norms by class, some parameters by name, the rest; only trainable parameters."""
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    groups = {"norm": [], **{key: [] for key in custom}, "other": []}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            full = f"{module_name}.{name}" if module_name else name
            key = next((key for key in custom if key in (name, full)), None)
            groups[key or ("norm" if isinstance(module, norms) else "other")].append(parameter)
    decays = {"norm": norm_decay, **custom, "other": decay}
    return [{"params": found, "weight_decay": decays[key]} for key, found in groups.items() if found]


def run(model, without_ddp, ema, optimizer, schedule, batches, epochs, start=0):
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    for _ in range(start, epochs):
        model.train()
        for images, target in batches:
            loss = criterion(model(images), target)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            ema.update_parameters(without_ddp)
        schedule.step()
    return loss.item()


def start_of(model):
    groups = parameter_groups(model, 0.05, 0.0, {"shared.prompts": 0.01})
    optimizer = torch.optim.AdamW(groups, lr=0.02)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)


@phases
def test_parameter_groups(phase):
    """Each trainable parameter is in one group, with the decay of its name; the frozen ViT is in no group."""
    model = build(phase)
    groups = parameter_groups(model, 0.05, 0.0, {"shared.prompts": 0.01, "class_token": 0.0})
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decay.keys() == {id(parameter) for parameter in model.trainable_parameters()}
    assert decay[id(model.head.weight)] == 0.05
    if phase == "shared":
        assert decay[id(model.shared.prompts)] == 0.01


@phases
def test_resume_gives_the_same_result(phase, tmp_path):
    """--resume of model, optimizer, schedule and average, into an adapter in phase "shared"."""
    batches = list(DataLoader(data(), 8))
    model = build(phase)
    ema, (optimizer, schedule) = average(model), start_of(model)
    run(model, model, ema, optimizer, schedule, batches, 2)
    parts = {"model": model, "model_ema": ema, "optimizer": optimizer, "lr_scheduler": schedule}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "checkpoint.pth")
    run(model, model, ema, optimizer, schedule, batches, 4, start=2)

    checkpoint = torch.load(tmp_path / "checkpoint.pth", map_location="cpu", weights_only=True)
    resumed = build("shared", seed=5)
    resumed.load_state_dict(checkpoint["model"])  # before the optimizer is created: the phase sets its parameters
    assert resumed.phase == phase
    ema_resumed, (optimizer, schedule) = average(resumed), start_of(resumed)
    optimizer.load_state_dict(checkpoint["optimizer"])
    schedule.load_state_dict(checkpoint["lr_scheduler"])
    ema_resumed.load_state_dict(checkpoint["model_ema"])
    run(resumed, resumed, ema_resumed, optimizer, schedule, batches, 4, start=2)
    images = data().tensors[0]
    for got, expected in ((resumed, model), (ema_resumed, ema)):
        assert torch.equal(got.eval()(images), expected.eval()(images))
    assert not torch.allclose(ema(images), model(images), atol=1e-3)
    assert ema.module.phase == phase


@phases
@pytest.mark.parametrize("mix", [v2.MixUp, v2.CutMix])
def test_mixing_in_the_collate_function(phase, mix):
    """MixUp and CutMix in collate_fn, label smoothing in the loss."""
    torch.manual_seed(0)
    mixed = mix(num_classes=CLASSES, alpha=1.0)
    batches = DataLoader(data(), 8, collate_fn=lambda rows: mixed(*default_collate(rows)))
    _, target = next(iter(batches))
    assert target.shape == (8, CLASSES)
    model = build(phase)
    images_clean, target_clean = data().tensors
    before = nn.functional.cross_entropy(model.eval()(images_clean), target_clean)
    run(model, model, average(model), *start_of(model), batches, 6)
    assert nn.functional.cross_entropy(model.eval()(images_clean), target_clean) < before


def test_an_optimizer_of_the_other_phase_is_refused():
    """Created before the checkpoint is loaded, it has the parameters of the old phase; torch refuses the state."""
    model = build("group")
    optimizer, _ = start_of(model)
    fresh = build("shared")
    stale, _ = start_of(fresh)
    fresh.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="parameter group"):
        stale.load_state_dict(optimizer.state_dict())


# Two processes


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    images, target = data(32).tensors
    for phase in ("shared", "group"):
        adapter = build(phase)
        model = DistributedDataParallel(adapter)
        ema, (optimizer, schedule) = average(adapter), start_of(adapter)
        half = [
            (images[i + 4 * rank : i + 4 * rank + 4], target[i + 4 * rank : i + 4 * rank + 4]) for i in range(0, 32, 8)
        ]
        run(model, adapter, ema, optimizer, schedule, half, 2)
        state = {"model": adapter.state_dict(), "model_ema": ema.state_dict()}
        torch.save(state, f"{folder}/{phase}{rank}.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=2)
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="gloo with a file store")
@phases
def test_two_processes_equal_a_single_process(two_processes, phase):
    """DistributedDataParallel over gloo without find_unused_parameters: ranks agree with each other and one process."""
    first, second = (torch.load(two_processes / f"{phase}{rank}.pth", weights_only=True) for rank in (0, 1))
    images, target = data(32).tensors
    model = build(phase)
    ema, (optimizer, schedule) = average(model), start_of(model)
    batches = [(images[i : i + 8], target[i : i + 8]) for i in range(0, 32, 8)]
    run(model, model, ema, optimizer, schedule, batches, 2)
    for part, expected in (("model", model.state_dict()), ("model_ema", ema.state_dict())):
        assert first[part].keys() == expected.keys()
        for name, value in expected.items():
            if "usage" not in name:  # each process counts its own images
                torch.testing.assert_close(first[part][name], second[part][name], rtol=0, atol=0, msg=name)
                torch.testing.assert_close(first[part][name], value, rtol=1e-3, atol=1e-4, msg=name)
