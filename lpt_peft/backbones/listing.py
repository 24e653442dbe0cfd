"""The models that the installed libraries list by name, and suggestions for a misspelt name.

`lpt-peft doctor` reads this list. Models are built with random weights and nothing is downloaded. Not here: pretrained
models (`loading.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from lpt_peft.backbones.bundled import NAME as BUNDLED
from lpt_peft.backbones.detect import find_backbone
from lpt_peft.errors import BackboneError

_PLAIN_TIMM_MODULES = frozenset(
    (
        *("beit", "deepseek_vit", "deit", "eva", "gemma4_vit", "naflexvit", "qwen3_vit", "vision_transformer"),
        *("vision_transformer_hybrid", "vision_transformer_relpos", "vitamin"),
    )
)
_USUAL = ("vit_base_patch16_224", "vit_small_patch16_224", "deit3_base_patch16_224", BUNDLED)


@dataclass(frozen=True)
class Entry:
    """A model that a library lists.

    Attributes:
        library: "lpt_peft" (bundled), "timm", "transformers", "torchvision" or "open_clip".
        family: The module or kind it belongs to within its library.
        name: Its name in the library.
        make: Builds it, with random weights, on the current device.
    """

    library: str
    family: str
    name: str
    make: Callable[[], nn.Module]

    @property
    def title(self) -> str:
        """The name as users type it: without the library for timm's and the bundled model."""
        return self.name if self.library in {"lpt_peft", "timm"} else self.path

    @property
    def path(self) -> str:
        """`library/name`."""
        return f"{self.library}/{self.name}"

    def build(self) -> nn.Module:
        """Build the model in eval mode, on the meta device where possible, otherwise on the CPU.

        Raises:
            BackboneError: Its library cannot build it without further arguments.
        """
        try:
            try:
                with torch.device("meta"):
                    return self.make().eval()
            except (NotImplementedError, RuntimeError):  # an initialization that reads values
                return self.make().eval()
        except Exception as error:
            why = str(error).strip().partition("\n")[0]
            raise BackboneError(f"{self.library} cannot build {self.name} by name alone: {why}") from error


def entries(library: str | None = None) -> Iterator[Entry]:
    """List the models of the installed libraries, or of one library."""
    for name, source in _SOURCES.items():
        if library in (None, name) and find_spec(name) is not None:
            yield from source()


def find(title: str) -> Entry | None:
    """Find the model `library/name`, or `name` of timm; names of timm may have the tag of pretrained weights."""
    library, _, name = title.partition("/")
    titles = {title, _without_tag(title)}
    listed = entries(library if name and library in _SOURCES else None)
    return next((entry for entry in listed if titles & {entry.title, entry.path}), None)


def closest(title: str, library: str = "timm", count: int = 5) -> list[str]:
    """Suggest names for a misspelt `title`: plain ViTs, the most similar first.

    Example:
        >>> closest("glif_vit", count=1)
        ['glyph_vit']
        >>> closest("vit_base_patch16_22.augreg", count=2)
        ['vit_base_patch16_224', 'vit_base_patch16_224_miil']
        >>> closest("vit_b_16", count=1)
        ['torchvision/vit_b_16']
    """
    name = title.removeprefix(f"{library}/").partition(".")[0].lower().replace("-", "_")
    if library == "timm":
        names = [BUNDLED, *plain_timm_names()]
        elsewhere = [entry.title for entry in entries("torchvision") if entry.name == name]
    else:
        names, elsewhere = [entry.title for entry in entries(library)], []
    plain = {known.partition("/")[2].lower().replace("-", "_") or known: known for known in names}
    containing = sorted((known for known in plain if name and name in known), key=len)
    found = dict.fromkeys([*containing, *get_close_matches(name, plain, count, 0.5)])
    found = found or dict.fromkeys(_USUAL if library == "timm" else plain)
    return [*elsewhere, *(plain[known] for known in found)][:count]


def refusal(entry: Entry) -> str | None:
    """Return why the model cannot take prompts, or None; it is built on the meta device and checked."""
    try:
        find_backbone(entry.build()).attach()
    except BackboneError as error:
        return str(error)
    return None


@cache
def plain_timm_names() -> tuple[str, ...]:
    """Names of timm's plain ViTs, which take prompts."""
    import timm  # noqa: PLC0415 - see _timm

    modules = {name: timm.models.model_entrypoint(name).__module__ for name in timm.list_models()}
    return tuple(name for name, module in modules.items() if module.rpartition(".")[2] in _PLAIN_TIMM_MODULES)


def open_clip_tower(name: str, **vision: Any) -> nn.Module:
    """Build the visual tower of a model of open_clip with random weights; `vision` overrides its vision_cfg.

    The text tower, which takes no prompts, might need a download.
    """
    import open_clip  # noqa: PLC0415 - optional
    from open_clip.model import _build_vision_tower  # noqa: PLC0415

    config = open_clip.get_model_config(name)
    vision = {**config["vision_cfg"], "timm_model_pretrained": False, **vision}
    return _build_vision_tower(config["embed_dim"], vision, quick_gelu=config.get("quick_gelu", False))


def _without_tag(title: str) -> str:
    """A name of timm without its tag, if timm lists both together; other names unchanged."""
    import timm  # noqa: PLC0415 - see _timm

    name = title.removeprefix("timm/")
    return name.partition(".")[0] if timm.is_model_pretrained(name) and "." in name else title


def _bundled() -> Iterator[Entry]:
    def make() -> nn.Module:
        from lpt_peft.backbones.bundled.glyph_vit import glyph_vit  # noqa: PLC0415 - imports timm

        with torch.device("cpu"):  # its weights are values, which the meta device drops
            return glyph_vit()

    yield Entry("lpt_peft", "bundled", BUNDLED, make)


def _timm() -> Iterator[Entry]:
    import timm  # noqa: PLC0415 - takes a second to import

    for name in timm.list_models():
        family = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        yield Entry("timm", family, name, lambda name=name: timm.create_model(name))  # type: ignore[misc]


def _torchvision() -> Iterator[Entry]:
    from torchvision import models  # noqa: PLC0415 - optional

    for name in models.list_models(module=models):
        make = models.get_model_builder(name)
        yield Entry("torchvision", make.__module__.rpartition(".")[2], name, make)


def _open_clip() -> Iterator[Entry]:
    import open_clip  # noqa: PLC0415 - optional

    for name in open_clip.list_models():
        timm_tower = open_clip.get_model_config(name)["vision_cfg"].get("timm_model_name")
        family = "timm tower" if timm_tower else "native tower"
        yield Entry("open_clip", family, name, lambda name=name: open_clip_tower(name))  # type: ignore[misc]


def _transformers() -> Iterator[Entry]:
    import transformers  # noqa: PLC0415 - optional
    from transformers.models.auto import modeling_auto as auto  # noqa: PLC0415

    kinds = [kind for kind in auto.MODEL_MAPPING_NAMES if kind.endswith(("vision_model", "_vision"))]
    kinds += [*auto.MODEL_FOR_IMAGE_MAPPING_NAMES, *auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES]
    for kind in sorted(set(kinds)):

        def make(kind: str = kind) -> nn.Module:
            return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind))

        yield Entry("transformers", "vision model", kind, make)


_SOURCES: dict[str, Callable[[], Iterator[Entry]]] = {
    "lpt_peft": _bundled,
    "timm": _timm,
    "transformers": _transformers,
    "torchvision": _torchvision,
    "open_clip": _open_clip,
}
