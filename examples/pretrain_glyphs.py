"""Pretrain the small backbone of the demo: a ViT for printed letters and symbols, without digits.

The classes are letters and symbols of the twelve DejaVu Sans, Serif and Mono faces of matplotlib, drawn light on dark
with random affine, elastic, stroke-width, blur, contrast and noise changes. The script writes
`lpt_peft/backbones/bundled/glyph_vit.safetensors`, the frozen backbone of `lpt-peft demo`, and `glyph_vit.json`, its
configuration and training settings. Run it only to create these files again; it takes about 40 minutes on two cores.

    pip install -e ".[demo]"
    python examples/pretrain_glyphs.py --output lpt_peft/backbones/bundled
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
import tyro
from matplotlib import ft2font, get_data_path
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

FACES = tuple(
    f"DejaVu{family}{style}"
    for family, styles in {
        "Sans": ("", "-Bold", "-Oblique", "-BoldOblique"),
        "SansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
        "Serif": ("", "-Bold", "-Italic", "-BoldItalic"),
    }.items()
    for style in styles
)
CANVAS, FRAME, PIXELS = 64, 52, 32  # a character fills 52 px of a canvas of 64 px, which is resized to 32 px
BACKBONE: dict[str, Any] = {
    "img_size": PIXELS,
    "patch_size": 4,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
}


@dataclass
class Settings:
    """Pretraining settings; the bundled file was created with the defaults."""

    output: Path = Path("lpt_peft/backbones/bundled")
    classes: int = 300
    steps: int = 6000
    batch_size: int = 128
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    seed: int = 0
    resume: bool = False
    """Resume from `glyph_vit.checkpoint` in the output folder."""


def font_path(face: str) -> str:
    """Path of a font that matplotlib ships."""
    return str(Path(get_data_path()) / "fonts" / "ttf" / f"{face}.ttf")


def common_characters() -> list[str]:
    """Letters and symbols that all twelve faces contain, in code-point order, without numeric characters."""
    shared = set.intersection(*(set(ft2font.FT2Font(font_path(face)).get_charmap()) for face in FACES))

    def is_letter_or_symbol(character: str) -> bool:
        plain = unicodedata.normalize("NFKD", character)
        shape = unicodedata.category(character)
        return shape in {"Lu", "Ll", "Lo", "Sm", "Sc", "So", "Po"} and not any(
            unicodedata.category(c).startswith("N") or unicodedata.numeric(c, None) is not None for c in plain
        )

    return [chr(code) for code in sorted(shared) if is_letter_or_symbol(chr(code))]


def draw(character: str, font: ImageFont.FreeTypeFont) -> np.ndarray | None:
    """Draw a character scaled to the frame as a (64, 64) uint8 image; None where it has no ink."""
    left, top, right, bottom = font.getbbox(character)
    width, height = int(right - left), int(bottom - top)
    if width < 4 or height < 4:
        return None
    ink = Image.new("L", (width + 2, height + 2))
    ImageDraw.Draw(ink).text((1 - left, 1 - top), character, font=font, fill=255)
    box = ink.getbbox()
    if box is None:
        return None
    ink = ink.crop(box)
    zoom = FRAME / max(ink.size)
    size = (max(1, round(ink.size[0] * zoom)), max(1, round(ink.size[1] * zoom)))
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(ink.resize(size, Image.Resampling.BILINEAR), ((CANVAS - size[0]) // 2, (CANVAS - size[1]) // 2))
    return np.asarray(canvas)


def render_glyphs(count: int) -> tuple[Tensor, list[str]]:
    """Render the first `count` characters of distinct shape: glyphs (count, 12, 64, 64) uint8, and their names.

    Scaled to the same frame, many characters look alike ("o", "O", Greek omicron). In code-point order, a character is
    left out where its faces correlate by 0.8 or more with those of a character chosen before.
    """
    fonts = [ImageFont.truetype(font_path(face), 96) for face in FACES]
    names: list[str] = []
    glyphs: list[np.ndarray] = []
    shapes = torch.empty(0, len(FACES), (CANVAS // 4) ** 2)
    bar = tqdm(total=count, desc="rendering", unit="class")
    for character in common_characters():
        drawn = [draw(character, font) for font in fonts]
        faces = [face for face in drawn if face is not None]
        if len(faces) < len(fonts):
            continue
        # Images of a quarter of the size are robust to small shifts.
        small = F.avg_pool2d(torch.from_numpy(np.stack(faces))[:, None].float(), 4).flatten(1)
        shape = F.normalize(small - small.mean(-1, keepdim=True), dim=-1)
        if names and torch.einsum("cfp,fp->cf", shapes, shape).mean(-1).max() >= 0.8:
            continue
        names.append(character)
        glyphs.append(np.stack(faces))
        shapes = torch.cat([shapes, shape[None]])
        bar.update()
        if len(names) == count:
            break
    bar.close()
    return torch.from_numpy(np.stack(glyphs)), names


def augment(glyphs: Tensor, generator: torch.Generator) -> Tensor:
    """Create light-on-dark training images (B, 3, 32, 32) in [-1, 1] from glyphs (B, 64, 64) uint8."""
    batch = len(glyphs)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(batch, *shape).uniform_(low, high, generator=generator)

    # Affine: rotate, shear, scale each axis, shift; elastic: a smooth random displacement field.
    angle, shear = uniform(-0.3, 0.3), uniform(-0.35, 0.35)
    rotate = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(-1, 2, 2)
    skew = torch.eye(2).repeat(batch, 1, 1)
    skew[:, 0, 1] = shear
    scale = torch.diag_embed(1 / uniform(0.75, 1.15, 2))
    theta = torch.cat([rotate @ skew @ scale, uniform(-0.15, 0.15, 2, 1)], -1)
    grid = F.affine_grid(theta, [batch, 1, CANVAS, CANVAS], align_corners=False)
    bumps = torch.randn(batch, 2, 5, 5, generator=generator) * uniform(0.0, 0.09, 1, 1, 1)
    field = F.interpolate(bumps, size=(CANVAS, CANVAS), mode="bicubic", align_corners=True)
    ink = F.grid_sample(glyphs[:, None] / 255.0, grid + field.permute(0, 2, 3, 1), align_corners=False)

    # Stroke width: a third thicker, a third thinner, a third as drawn.
    kind = torch.randint(0, 3, (batch, 1, 1, 1), generator=generator)
    thick, thin = F.max_pool2d(ink, 5, 1, 2), -F.max_pool2d(-ink, 3, 1, 1)
    ink = torch.where(kind == 0, thick, torch.where(kind == 1, thin, ink))
    ink = F.avg_pool2d(ink, CANVAS // PIXELS)

    # Blur: a separable Gaussian, its width drawn per image.
    offsets = torch.arange(-4, 5, dtype=torch.float32)
    kernel = torch.exp(-(offsets**2) / (2 * uniform(0.2, 2.0, 1) ** 2))
    kernel = kernel / kernel.sum(-1, keepdim=True)
    ink = F.conv2d(ink.transpose(0, 1), kernel[:, None, None, :], padding=(0, 4), groups=batch)
    ink = F.conv2d(ink, kernel[:, None, :, None], padding=(4, 0), groups=batch).transpose(0, 1)

    # Contrast and noise; the ink is always lighter than the background.
    dark, light = uniform(0.0, 0.3, 1, 1, 1), uniform(0.6, 1.0, 1, 1, 1)
    peak = ink.amax((1, 2, 3), keepdim=True).clamp_min(0.1)
    image = dark + (light - dark) * (ink / peak).pow(uniform(0.6, 1.6, 1, 1, 1))
    image = image + torch.randn(image.shape, generator=generator) * uniform(0.0, 0.1, 1, 1, 1)
    return (image.clamp(0, 1) * 2 - 1).expand(-1, 3, -1, -1).contiguous()


def draw_batch(glyphs: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw random classes and faces: images (size, 3, 32, 32) float32, targets (size,) int64."""
    target = torch.randint(0, glyphs.shape[0], (size,), generator=generator)
    face = torch.randint(0, glyphs.shape[1], (size,), generator=generator)
    return augment(glyphs[target, face], generator), target


def build(classes: int) -> nn.Module:
    """Build the small timm VisionTransformer of the demo."""
    return timm.models.vision_transformer.VisionTransformer(**BACKBONE, num_classes=classes)


def train(settings: Settings, glyphs: Tensor) -> nn.Module:
    """Train with AdamW and a one-cycle schedule on newly drawn images; save a checkpoint every 500 steps."""
    torch.manual_seed(settings.seed)
    model = build(len(glyphs))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    checkpoint, first = settings.output / "glyph_vit.checkpoint", 0
    if settings.resume:
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]

    model.train()
    loss_mean = accuracy_mean = None
    bar = tqdm(range(first, settings.steps), initial=first, total=settings.steps, desc="pretraining")
    for step in bar:
        # A generator per step, so that a resumed run sees the same images as an uninterrupted run.
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        images, target = draw_batch(glyphs, settings.batch_size, generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images).float()
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        step_loss, accuracy = loss.item(), (logits.argmax(-1) == target).float().mean().item()
        loss_mean = step_loss if loss_mean is None else 0.98 * loss_mean + 0.02 * step_loss
        accuracy_mean = accuracy if accuracy_mean is None else 0.98 * accuracy_mean + 0.02 * accuracy
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss_mean:.3f}", accuracy=f"{accuracy_mean:.3f}")
        if (step + 1) % 500 == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save({**state, "schedule": schedule.state_dict()}, checkpoint)
    checkpoint.unlink(missing_ok=True)
    return model


@torch.no_grad()
def evaluate(model: nn.Module, glyphs: Tensor, batches: int = 50) -> float:
    """Compute the accuracy on newly drawn images."""
    model.eval()
    generator = torch.Generator().manual_seed(2**40)
    correct = total = 0
    for _ in range(batches):
        images, target = draw_batch(glyphs, 128, generator)
        correct += int((model(images).argmax(-1) == target).sum())
        total += len(target)
    return correct / total


def main(settings: Settings) -> None:
    """Render, train, evaluate and save."""
    settings.output.mkdir(parents=True, exist_ok=True)
    glyphs, names = render_glyphs(settings.classes)
    model = train(settings, glyphs)
    accuracy = evaluate(model, glyphs)
    print(f"{len(names)} classes, accuracy {accuracy:.1%} on newly drawn images")
    tensors = {k: v.contiguous() for k, v in model.state_dict().items() if not k.startswith("head.")}
    save_file(tensors, settings.output / "glyph_vit.safetensors", metadata={"format": "pt"})
    about = {
        "architecture": "timm.models.vision_transformer.VisionTransformer",
        "model_args": BACKBONE,
        "preprocess": {"input_size": [3, PIXELS, PIXELS], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0},
        "pretraining": {
            **{k: v for k, v in asdict(settings).items() if k not in {"output", "resume"}},
            "faces": list(FACES),
            "characters": "".join(names),
            "accuracy": accuracy,
        },
    }
    (settings.output / "glyph_vit.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
