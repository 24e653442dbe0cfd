"""Compare the losses on long-tailed digits, for a cosine head on frozen features.

Features of eight augmented passes over the training digits are computed once, so that a run takes about two seconds.
Every loss is trained with each learning rate on several divisions of the non-test digits; the best learning rate on the
validation split is printed. Test images are never read.

    python examples/benchmarks/digits_losses.py
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.utils.data import Dataset

from lpt_peft._random import seeded
from lpt_peft.backbones.bundled.glyph_vit import glyph_vit
from lpt_peft.data.digits import NUM_CLASSES, DigitsLT, digits_counts
from lpt_peft.demo.rows import rows
from lpt_peft.heads import CosineClassifier
from lpt_peft.metrics import ShotMetrics, ShotResult
from lpt_peft.metrics.result import SHOTS
from lpt_peft.output import AdapterOutput
from lpt_peft.recipe import TrainSettings, evaluate, run_phase

DUAL, INSTANCE = {"sampling": "dual"}, {"sampling": "instance"}
PASSES = 8


@dataclass
class Options:
    """Length and size of the comparison."""

    epochs: int = 20
    divisions: int = 3
    learning_rates: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)


class Head(nn.Module):
    """Dropout and a cosine head, called with features like an adapter with images."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)
        self.head = CosineClassifier(dim, NUM_CLASSES)

    def forward(self, features: Tensor, return_output: bool = True) -> AdapterOutput:
        """Classify features (B, d); the output has no groups."""
        empty = features.new_empty(len(features), 0)
        return AdapterOutput(self.head(self.dropout(features)), features, features, empty, empty.long())


class Features(Dataset[Any]):
    """Features (P, N, d) of P augmented passes over N images; an item is that of a random pass."""

    @torch.no_grad()
    def __init__(self, images: DigitsLT, vit: Any, passes: int) -> None:
        batches = (torch.stack([image for image, _ in images]) for _ in range(passes))
        self.features = torch.stack([vit.forward_head(vit.forward_features(b), pre_logits=True) for b in batches])
        self.labels = list(images.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.features[int(torch.randint(len(self.features), ())), index], self.labels[index]


def variants(epochs: int) -> list[dict[str, Any]]:
    """Losses with the settings of `TrainSettings` that go with them."""
    late = {**INSTANCE, "reweight_from": epochs * 4 // 5}
    plain = [("logit_adjusted", INSTANCE), ("logit_adjusted", DUAL), ("lpt", DUAL), ("agcl", DUAL), ("agcl", INSTANCE)]
    plain += [("class_balanced", INSTANCE), ("class_balanced", DUAL), ("cross_entropy", INSTANCE)]
    plain += [("cross_entropy", DUAL), ("focal", INSTANCE), ("ldam", INSTANCE)]
    plain += [(loss, late) for loss in ("agcl", "cross_entropy", "ldam")]
    return [{"loss": loss, **change} for loss, change in plain]


def train_head(settings: TrainSettings, train: Features, validation: Features) -> ShotResult:
    """Train a head and evaluate it."""
    with seeded(settings.seed):
        model = Head(train.features.shape[-1])
    run_phase(model, train, train.labels, settings, settings.shared, name="head", progress=False)
    return evaluate(model, validation, ShotMetrics.from_rule("lpt", digits_counts()), num_workers=0)


def main(options: Options) -> None:
    """Print a line per loss."""
    vit, splits = glyph_vit().eval(), {}
    for division in range(1, options.divisions + 1):  # division 0 is that of the demo
        with seeded(division):
            train = Features(DigitsLT("train", augment=True, division=division), vit, PASSES)
        splits[division] = train, Features(DigitsLT("validation", division=division), vit, 1)
    base = replace(rows(options.epochs)[1].settings, method="lpt")
    for change in variants(options.epochs):
        found = {}
        for rate in options.learning_rates:
            settings = replace(base, **change, shared=replace(base.shared, learning_rate=rate))
            found[rate] = [train_head(replace(settings, seed=number), *pair) for number, pair in splits.items()]
        rate = max(found, key=lambda rate: sum(result.overall or 0.0 for result in found[rate]))
        means = [100 * statistics.fmean(getattr(result, shot) for result in found[rate]) for shot in SHOTS]
        figures = "  ".join(f"{shot} {mean:.1f}" for shot, mean in zip(SHOTS, means, strict=True))
        print(f"{', '.join(map(str, change.values())):32} learning rate {rate:<4g} {figures}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
