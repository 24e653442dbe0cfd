"""Command-line options of `gpu.py`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

PRECISIONS = ("bf16 autocast", "bf16 weights", "float32")
MODES = ("eager", "compiled")

TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TINY = {"model": "vit_tiny_patch16_224", "batch": [4, 2], "classes": 11, "loss_classes": [11, 29], "repeats": 2}
TINY |= {"prompt_length": 2, "device": "cpu", "modes": ["eager"], "backend": "eager"}


def parse(arguments: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """Parse the options; --tiny changes the defaults of the others."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a VisionTransformer of timm")
    parser.add_argument("--image-size", type=int, help="pixels per side (default: that of the model)")
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 8], help="even, the most important first")
    parser.add_argument("--classes", type=int, default=365)
    parser.add_argument(
        "--loss-classes", type=int, nargs="+", default=[365, 8142], help="classes of the table of losses"
    )
    parser.add_argument("--prompt-length", type=int, default=10)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--backend", default="inductor", help="backend of torch.compile")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of each table, fewer if time is short")
    parser.add_argument(
        "--budget", type=float, default=240, help="seconds; cells that do not fit are dropped and listed"
    )
    parser.add_argument("--device", help="default: cuda if available, else cpu")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write all samples to this file")
    parser.add_argument("--tiny", action="store_true", help="a ViT of two blocks on the CPU, eager mode only")
    if parser.parse_known_args(arguments)[0].tiny:
        parser.set_defaults(**TINY)
    options = parser.parse_args(arguments)
    if odd := [batch for batch in options.batch if batch < 2 or batch % 2]:
        parser.error(f"--batch {odd[0]}: LPTLoss needs two equal halves; give an even number.")
    if options.repeats < 1 or min(options.classes, *options.loss_classes) < 2:
        parser.error("--repeats must be at least 1, --classes and --loss-classes at least 2.")
    return options
