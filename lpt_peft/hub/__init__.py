"""Prompt files on the Hugging Face Hub: `push_to_hub` and `from_pretrained` of an adapter, and the parts they are of.

Only prompts travel: a repository holds the two files of a prompt file and a model card, about 4 MB for ViT-B. Nothing
but this package talks to the Hub. Not here: format and checks (`lpt_peft.checkpoint`).
"""

from lpt_peft.hub.card import CardOptions, model_card
from lpt_peft.hub.load import from_pretrained, is_repository, read_prompts, swap_from
from lpt_peft.hub.pull import Place, Pulled, pull
from lpt_peft.hub.push import push_files, push_to_hub

__all__ = [
    "CardOptions",
    "Place",
    "Pulled",
    "from_pretrained",
    "is_repository",
    "model_card",
    "pull",
    "push_files",
    "push_to_hub",
    "read_prompts",
    "swap_from",
]
