"""Checkpoints of timm's training script and of Lightning, written and read by their own code."""

from __future__ import annotations

import argparse

import pytest
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3, unwrap_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lpt_peft import LongTailPromptAdapter
from tests.backbones.models import images, open_clip_model
from tests.conftest import tiny_vit

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 7


def build(seed=0, phase="shared"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = LongTailPromptAdapter.wrap(tiny_vit(), prompt_length=3, pool_size=5, head_dropout=0.0)
        with torch.no_grad():
            for tensor in (adapter.shared.prompts, adapter.pool.prompts):
                tensor.normal_()
    adapter.phase = phase
    return adapter


@pytest.mark.parametrize("slim", [False, True])
def test_timm_trains_saves_and_resumes(tmp_path, slim):
    """What timm's train.py does: optimizer factory, checkpointed blocks, moving average, CheckpointSaver, --resume."""
    model = build(phase="group").train()
    model.backbone_in_state_dict = not slim
    model.set_grad_checkpointing(enable=True)
    optimizer = create_optimizer_v2(model, "sgd", lr=0.05, weight_decay=0.01)
    ema = ModelEmaV3(model, decay=0.5)
    saver = CheckpointSaver(
        model,
        optimizer,
        args=argparse.Namespace(model="vit"),
        model_ema=ema,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    loss_fn = LabelSmoothingCrossEntropy(0.1)
    for step in range(3):
        loss = loss_fn(model(IMAGES), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model, step=step)
    saver.save_checkpoint(epoch=0, metric=float(loss))
    for use_ema, saved in ((False, model), (True, ema.module)):
        loaded = build(1)
        loaded.backbone_in_state_dict = not slim
        load_checkpoint(loaded, str(tmp_path / "last.pth.tar"), use_ema=use_ema, strict=True, weights_only=False)
        assert loaded.phase == "group"
        assert torch.equal(loaded.eval()(IMAGES), saved.eval()(IMAGES))
    resumed = build(1, "group")
    resumed.backbone_in_state_dict = not slim
    again = create_optimizer_v2(resumed, "sgd", lr=0.05, weight_decay=0.01)
    assert resume_checkpoint(resumed, str(tmp_path / "last.pth.tar"), again) == 1
    for adapter, sgd in ((model, optimizer), (resumed, again)):
        sgd.zero_grad()
        loss_fn(adapter.train()(IMAGES), LABELS).backward()
        sgd.step()
    assert torch.equal(model.eval()(IMAGES), resumed.eval()(IMAGES))
    names = set(torch.load(tmp_path / "last.pth.tar", weights_only=False)["state_dict"])
    assert any(name.startswith("vit.") for name in names) != slim
    assert unwrap_model(model) is model


def test_timm_distils_into_an_adapter():
    """--kd-model-name: student and teacher are called alike, on images."""
    student, teacher = build().train(), tiny_vit()
    logits = student(IMAGES)
    with torch.no_grad():
        soft = teacher(IMAGES).softmax(1)
    nn.functional.kl_div(logits.log_softmax(1), soft, reduction="batchmean").backward()
    assert student.shared.prompts.grad.any()


@pytest.mark.parametrize("slim", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_lightning(tmp_path, slim):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.adapter = build(1)
            self.adapter.backbone_in_state_dict = not slim

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.adapter(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.adapter.trainable_parameters(), lr=0.05)

    module = Module()
    module.adapter.phase = "group"
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Module.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=False).adapter
    assert loaded.phase == "group"
    assert torch.equal(loaded.eval()(IMAGES), module.adapter.eval()(IMAGES))
    names = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert any(name.startswith("adapter.vit.") for name in names) != slim


def test_an_adapter_in_the_place_of_an_open_clip_tower():
    """The lines of docs/how-to/works-with.md: the host model trains prompts; with the bare tower it does not."""

    class Prompted(nn.Module):
        def __init__(self, adapter):
            super().__init__()
            self.adapter = adapter

        def forward(self, batch):
            return self.adapter.features(batch)

    clip = open_clip_model()
    plain = clip.encode_image(images())
    adapter = LongTailPromptAdapter.wrap(clip.visual, 5)
    assert torch.allclose(clip.encode_image(images()), plain, atol=1e-6), "the tower alone answers without prompts"
    clip.visual = Prompted(adapter)
    prompted = clip.encode_image(images(), normalize=True)
    assert not torch.allclose(prompted, nn.functional.normalize(plain, dim=-1), atol=1e-3)
    clip(images(), torch.zeros(2, 8, dtype=torch.long))[0].sum().backward()
    assert adapter.shared.prompts.grad.any()
