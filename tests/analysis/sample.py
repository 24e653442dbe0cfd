"""An analysis of random numbers with all sections, for the tests of pictures."""

from __future__ import annotations

import torch

from lpt_peft.recipe.analyse import sections
from lpt_peft.recipe.analyse.probe import Measured


def random_measured(classes, images, groups=8, width=6, seed=0):
    """Measured tensors of a model that is right about half of the time; every class has an image."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(images) % classes
    wrong = torch.rand(images, generator=generator) < 0.5

    def guesses():
        return torch.where(wrong, torch.randint(classes, (images,), generator=generator), target)

    probability = torch.rand(images, generator=generator)
    features = {
        state: torch.randn(images, width, generator=generator) + shift * target[:, None] % 3
        for shift, state in enumerate(("plain", "shared", "group"))
    }
    names = ["random", "averaged", "none", "noise", "blur", *(f"group {group}" for group in range(groups))]
    return Measured(
        target=target,
        prediction=guesses(),
        probability=probability,
        groups=torch.rand(images, groups - 1, generator=generator).topk(2, dim=1).indices,
        features=features,
        variants={name: guesses() for name in names},
        calibrated=probability.sqrt(),
        losses=torch.rand(images, 2, generator=generator),
    )


def sample_analysis(classes=6, images=300, groups=8):
    """Sections of random tensors; the last group is never selected."""
    test, train = random_measured(classes, images, groups), random_measured(classes, images, groups, seed=1)
    counts = [max(1, round(500 * 0.99 ** (400 * label / classes))) for label in range(classes)]
    names = [f"class ${label}$ with a long name" for label in range(classes)]
    first = random_measured(classes, images, groups, seed=2)
    row = {"kind": "folder", "source": "x", "strength": None, "unmatched": [], "missing": []}
    shift = {"classes": 3, "images": 30, "original": 0.9, "shifted": 0.4, "lost": 0.5, "kept": 0.4444, **row}
    empty = {"classes": 0, "images": 0, "original": None, "shifted": None, "lost": None, "kept": None, **row}
    return {
        "classes": sections.classes_section(test, names, counts, "lpt"),
        "confused_pairs": sections.pairs_section(test, classes),
        "features": sections.features_section(test, train, classes),
        "projection": sections.projection_section(test, train, counts),
        "pretraining": sections.pretraining_section(first, test, "glyphs"),
        "matching": sections.matching_section(test, classes, groups),
        "pool": sections.pool_section(test, counts, groups),
        "calibration": sections.calibration_section(test, counts, "lpt", (1.5, "file")),
        "shift": [{"name": "sketch", **shift}, {"name": "empty", **empty}],
    }
