"""Code on the card: loading the prompts, preprocessing an image."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from lpt_peft.backbones.loading import can_build
from lpt_peft.checkpoint import PromptContent
from lpt_peft.hub.card.markdown import code

_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
_DEFAULTS = {"exif": True, "background": [255, 255, 255]}


def load_snippet(content: PromptContent, repo_id: str, subfolder: str | None, revision: str | None) -> str:
    """Code that loads the prompts and runs them."""
    options = f", subfolder={json.dumps(subfolder)}" if subfolder else ""
    options += f", revision={json.dumps(revision)}" if revision not in (None, "main") else ""
    given = not can_build(asdict(content.backbone))
    vit = ", vit" if given else ""
    size = ", ".join(map(str, content.preprocess["input_size"]))
    return _python(
        "import torch",
        "from lpt_peft import LongTailPromptAdapter",
        "",
        *(["# vit: the backbone that these prompts were trained on, see below"] if given else []),
        f'adapter = LongTailPromptAdapter.from_pretrained("{repo_id}"{vit}{options})',
        f"logits = adapter(torch.rand(1, {size}))  # preprocessed images; see below",
    )


def preprocess_section(preprocess: Mapping[str, Any]) -> Iterator[str]:
    """Code that converts an image file to a tensor, as the evaluation does; in words if the library cannot."""
    size = " x ".join(map(str, preprocess["input_size"]))
    if not _can_transform(preprocess):
        yield (
            f"Images are tensors {size}, normalized with mean {code(list(preprocess['mean']))} and std "
            f"{code(list(preprocess['std']))}. `lpt_peft.data.transforms` has no transform for them."
        )
        return
    settings: dict[str, Any] = {name: preprocess[name] for name in _KEYS} | _DEFAULTS
    settings |= {name: preprocess[name] for name in _DEFAULTS if name in preprocess}
    plain = {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in settings.items()}
    yield _python(
        "from lpt_peft.data import open_image",
        "from lpt_peft.data.transforms import transforms",
        "",
        "preprocess = {",
        *(f'    "{name}": {_literal(value)},' for name, value in plain.items()),
        "}",
        "transform = transforms(preprocess, train=False)",
        f'images = transform(open_image("photo.jpg")).unsqueeze(0)  # 1 x {size}',
    )
    yield (
        f"The EXIF orientation of a photo is {'followed' if plain['exif'] else 'ignored'}, and transparent pixels are "
        f"placed on the colour {tuple(plain['background'])}."
    )


def _can_transform(preprocess: Mapping[str, Any]) -> bool:
    from lpt_peft.data.transforms import transforms  # noqa: PLC0415 - imports torchvision

    try:
        transforms(preprocess, train=False)
    except Exception:  # names of a file that timm does not know raise all kinds of exceptions
        return False
    return True


def _literal(value: Any) -> str:
    """Source of a value, with the quotes of the other lines where JSON and Python agree."""
    return json.dumps(value) if isinstance(value, str) and value.isascii() else repr(value)


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])
