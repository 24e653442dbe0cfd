"""Agreement and accuracy of routers against their cost, on the long-tailed digits.

Trains LPT on the bundled ViT (or loads its prompts), fits routers to training images, and evaluates them on the test
images with margins from 0 (no image takes the second pass) to infinity (all do). Cost is in forward passes: 1 for all
blocks once, and (L - K) / L more for an image that takes the second pass.

    python examples/benchmarks/router.py --figure router.png --json router.json
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from lpt_peft import LongTailPromptAdapter
from lpt_peft.backbones.bundled.glyph_vit import glyph_vit
from lpt_peft.data.digits import DigitsLT, digits_counts
from lpt_peft.recipe import PhaseSettings, TrainSettings, predict, train

FITS: dict[str, tuple[int, dict[str, Any]]] = {
    "tokens, images as they are": (0, {}),
    "tokens, augmented images": (1, {}),
    "tokens of all blocks, augmented": (1, {"blocks": 3}),
    "tokens and random features, augmented": (1, {"features": "random"}),
}
"""Name -> whether the images are augmented, and arguments of `fit_router`."""


@dataclass
class Settings:
    """Settings of the benchmark."""

    prompts: Path | None = None
    """Prompt file of an earlier run; None trains."""
    epochs: int = 12
    """Epochs of the training: three quarters in phase "shared"."""
    copies: int = 12
    """Augmented copies of every training image for the fit."""
    width: int = 2048
    """Random features."""
    shares: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
    """Shares of the held-out images that the margins send through the second pass."""
    test_images: int = 500
    """Test images, the first of every class; for tests of this script."""
    json: Path | None = None
    """File for the numbers."""
    figure: Path | None = None
    """PNG file for the curves."""


def main(settings: Settings) -> dict[str, Any]:
    """Run the benchmark and print a table."""
    adapter = trained(settings)
    test = Part(DigitsLT("test"), settings.test_images)
    exact, labels = predict(adapter, test, num_workers=0)
    plain, augmented = training_images(1, augment=False), training_images(settings.copies, augment=True)
    config = adapter.prompt_config
    second = config.group_layers / config.depth
    report: dict[str, Any] = {
        "epochs": None if settings.prompts else settings.epochs,
        "test_images": len(test),
        "cost_of_the_second_pass": second,
        "exact": {"cost": 1 + second, "accuracy": accuracy(exact.logits, labels)},
        "routers": {},
    }
    print(f"exact: cost {1 + second:.2f}, accuracy {100 * report['exact']['accuracy']:.1f} %")
    for name, (is_augmented, options) in FITS.items():
        if options.get("features") == "random":
            options = {**options, "width": settings.width}  # noqa: PLW2901
        images = augmented if is_augmented else plain
        fit = adapter.fit_router(images, progress=False, **options)
        print(f"{name}: {fit.images} images, penalty {fit.penalty:g}, held-out agreement {100 * fit.agreement:.1f} %")
        points = []
        for share in settings.shares:
            margin = float("inf") if share == 1 else float(fit.gaps.quantile(share)) if share else 0.0
            points.append(point(adapter, test, exact.groups, margin))
            print(
                "  margin {margin:.4f}: second pass {share:.3f}, cost {cost:.3f}, agreement {agreement:.3f}, "
                "accuracy {accuracy:.3f}".format_map(points[-1])
            )
        report["routers"][name] = {"images": fit.images, "penalty": fit.penalty, "points": points}
    if settings.json is not None:
        settings.json.write_text(json.dumps(report, indent=2).replace("Infinity", '"inf"') + "\n")
    if settings.figure is not None:
        draw(report, settings.figure)
    return report


class Part(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Evenly spaced images of a data set."""

    def __init__(self, dataset: DigitsLT, size: int) -> None:
        self.dataset, self.indices = dataset, range(0, len(dataset), max(1, len(dataset) // size))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.dataset[self.indices[index]]


def trained(settings: Settings) -> LongTailPromptAdapter:
    """An adapter with trained groups."""
    if settings.prompts is not None:
        return LongTailPromptAdapter.from_pretrained(settings.prompts, glyph_vit())
    torch.manual_seed(0)
    adapter = LongTailPromptAdapter.wrap(
        glyph_vit(), len(digits_counts()), prompt_length=8, pool_size=10, top_k=2, query="final"
    )
    second = max(1, settings.epochs // 4)
    recipe = TrainSettings(
        phases="decoupled",
        shared=PhaseSettings(epochs=settings.epochs - second, learning_rate=0.4),
        group=PhaseSettings(epochs=second, learning_rate=0.2, pool_learning_rate=0.2),
        optimizer="sgd",
        init_prompts="random",
        init_groups="shared",
        batch_size=32,
        samples_per_class=1,
        clip_norm=5.0,
        num_workers=0,
    )
    dataset = DigitsLT("train", augment=True)
    train(adapter, dataset, dataset.labels, recipe)
    return adapter


def training_images(copies: int, *, augment: bool) -> Tensor:
    """Training images (copies * N, 3, 32, 32)."""
    dataset = DigitsLT("train", augment=augment)
    torch.manual_seed(0)
    return torch.stack([dataset[index][0] for _ in range(copies) for index in range(len(dataset))])


def point(adapter: LongTailPromptAdapter, test: Part, groups: Tensor, margin: float) -> dict[str, float]:
    """Share of images with a second pass, cost, agreement with the exact groups, and accuracy of a margin."""
    images, config = [0], adapter.prompt_config
    handle = adapter.backbone.blocks[-1].register_forward_hook(lambda _, __, out: images.append(len(out)))
    adapter.route = margin
    output, labels = predict(adapter, test, num_workers=0)
    handle.remove()
    adapter.route = "exact"
    share = sum(images) / len(test) - 1  # the last block sees an image of the second pass twice
    agreement = (output.groups.sort(-1).values == groups.sort(-1).values).all(-1).float().mean()
    return {
        "margin": margin,
        "share": share,
        "cost": 1 + share * config.group_layers / config.depth,
        "agreement": float(agreement),
        "accuracy": accuracy(output.logits, labels),
    }


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Mean over classes."""
    right = (logits.argmax(1) == labels).double()
    return float(torch.stack([right[labels == label].mean() for label in labels.unique()]).mean())


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the curves as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(11, 4.4), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    for axes, key in zip(figure.subplots(1, 2), ("agreement", "accuracy"), strict=True):
        for (name, router), marker in zip(report["routers"].items(), "osD^", strict=True):
            points = router["points"]
            axes.plot([p["cost"] for p in points], [100 * p[key] for p in points], marker=marker, label=name)
        axes.set_xlabel("cost in forward passes")
        axes.grid(alpha=0.3)
    left, right = figure.axes
    left.set_ylabel("images with the exact set of groups, %")
    left.set_title("Agreement with the exact query")
    left.legend(loc="lower right", fontsize=9)
    right.axhline(100 * report["exact"]["accuracy"], color="black", linestyle="--", label="exact query")
    accuracies = [report["exact"]["accuracy"]]
    accuracies += [p["accuracy"] for router in report["routers"].values() for p in router["points"]]
    right.set_ylim(100 * min(accuracies) - 2, 100 * max(accuracies) + 2)  # an image is 0.2 points, no more than noise
    right.set_ylabel("test accuracy in % (mean over classes)")
    right.set_title("Accuracy")
    right.legend(loc="lower right", fontsize=9)
    figure.savefig(path)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
