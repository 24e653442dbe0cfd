"""Names of backbones on the command line that no library can have, each with the name that was meant."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from lpt_peft.errors import BackboneError

_LIBRARIES = ("timm", "torchvision", "open_clip", "transformers", "lpt_peft")


def check_backbone_name(name: str) -> None:
    """Refuse a folder of a run, a misspelt library, and the spelling of another library, before any download.

    Raises:
        BackboneError: The name is of such a kind.
    """
    if (Path(name) / "prompts.safetensors").is_file() or (Path(name) / "settings.json").is_file():
        raise BackboneError(
            f"{name} is a run or a prompt file, not a backbone: lpt-peft inspect {name} names its backbone."
        )
    library, slash, rest = name.partition("/")
    if not slash or library in _LIBRARIES:
        return
    if near := get_close_matches(library.lower().replace("-", "_"), _LIBRARIES, 1, 0.7):
        raise BackboneError(f'There is no library "{library}". Did you mean {near[0]}/{rest}?')
    if library.startswith("hf-hub:"):
        raise BackboneError(
            f'"{name}" is a repository on the Hub. Give the name of its model in timm, such as '
            f"{rest.rpartition('/')[2]}; or transformers/OWNER/NAME for a model of transformers."
        )
    from lpt_peft.backbones import listing

    same = [entry.title for entry in listing.entries() if _plain(entry.name) == _plain(name)]
    if same:
        raise BackboneError(f'No library has a model "{name}". Did you mean {" or ".join(same)}?')


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace("/", "_")
