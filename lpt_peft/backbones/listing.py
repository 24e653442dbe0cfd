"""Every model that the installed libraries list by name, and how to build it: what `lpt-peft doctor` looks through.

Models are built with random weights, nothing is downloaded, and whether one takes prompts is found by trying. Not
here: pretrained models that a prompt file names (`build.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from lpt_peft.backbones import find_backbone
from lpt_peft.errors import BackboneError


@dataclass(frozen=True)
class Entry:
    """One model by name.

    Attributes:
        library: "timm", "transformers", "torchvision" or "open_clip".
        family: The module or kind it belongs to within its library.
        name: As the library calls it.
        make: Builds it, with random weights, on the current device.
    """

    library: str
    family: str
    name: str
    make: Callable[[], nn.Module]

    @property
    def title(self) -> str:
        """Name for a person: timm's as they are, others behind their library."""
        return self.name if self.library == "timm" else self.path

    @property
    def path(self) -> str:
        """`library/name`."""
        return f"{self.library}/{self.name}"

    def build(self) -> nn.Module:
        """The model in eval mode, on the meta device where it takes no memory, on the CPU where it can't be made there.

        Raises:
            BackboneError: Its library cannot build it without further arguments.
        """
        try:
            try:
                with torch.device("meta"):
                    return self.make().eval()
            except (NotImplementedError, RuntimeError):  # an initialisation that looks at numbers
                return self.make().eval()
        except Exception as error:
            why = str(error).strip().partition("\n")[0]
            raise BackboneError(f"{self.library} cannot build {self.name} by name alone: {why}") from error


def entries() -> Iterator[Entry]:
    """All models of the libraries that are installed, library by library."""
    sources = {"timm": _timm, "transformers": _transformers, "torchvision": _torchvision, "open_clip": _open_clip}
    for library, source in sources.items():
        if find_spec(library) is not None:
            yield from source()


def find(title: str) -> Entry | None:
    """The model of that title, `library/name` or a name of timm, which may have the tag of pretrained weights."""
    titles = {title, _without_tag(title)}
    return next((entry for entry in entries() if titles & {entry.title, entry.path}), None)


def refusal(entry: Entry) -> str | None:
    """Why the model takes no prompts; None where it does. Built on the meta device, checked, and thrown away."""
    try:
        find_backbone(entry.build()).attach()
    except BackboneError as error:
        return str(error)
    return None


def _without_tag(title: str) -> str:
    """A name of timm without its tag, if timm knows the two together; other names as they are."""
    import timm  # noqa: PLC0415 - as the others

    name = title.removeprefix("timm/")
    return name.partition(".")[0] if timm.is_model_pretrained(name) and "." in name else title


def _timm() -> Iterator[Entry]:
    import timm  # noqa: PLC0415 - as the others

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
    from open_clip.model import _build_vision_tower  # noqa: PLC0415

    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision = {**config["vision_cfg"], "timm_model_pretrained": False}
        family = "timm tower" if vision.get("timm_model_name") else "native tower"

        def make(config: dict[str, Any] = config, vision: dict[str, Any] = vision) -> nn.Module:
            # The visual tower alone: text towers may want a download, and take no prompts.
            return _build_vision_tower(config["embed_dim"], vision, quick_gelu=config.get("quick_gelu", False))

        yield Entry("open_clip", family, name, make)


def _transformers() -> Iterator[Entry]:
    import transformers  # noqa: PLC0415 - optional
    from transformers.models.auto import modeling_auto as auto  # noqa: PLC0415

    kinds = [kind for kind in auto.MODEL_MAPPING_NAMES if kind.endswith(("vision_model", "_vision"))]
    kinds += [*auto.MODEL_FOR_IMAGE_MAPPING_NAMES, *auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES]
    for kind in sorted(set(kinds)):

        def make(kind: str = kind) -> nn.Module:
            return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind))

        yield Entry("transformers", "vision model", kind, make)
