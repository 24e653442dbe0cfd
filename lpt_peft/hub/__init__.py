"""Transfer of prompt files from and to the Hugging Face Hub, and their model card.

Only prompts are transferred: a repository holds a prompt file, a model card and its pictures, about 4 MB for ViT-B. No
other package of the library talks to the Hub. Not here: format and checks (`lpt_peft.checkpoint`).
"""

from lpt_peft.hub.card import CardOptions, model_card, results_of_split
from lpt_peft.hub.errors import hub_errors
from lpt_peft.hub.location import HubLocation, check_subfolder
from lpt_peft.hub.pull import Pulled, folder_named, is_repository, pull, pull_copy, read_prompts
from lpt_peft.hub.push import push

__all__ = [
    "CardOptions",
    "HubLocation",
    "Pulled",
    "check_subfolder",
    "folder_named",
    "hub_errors",
    "is_repository",
    "model_card",
    "pull",
    "pull_copy",
    "push",
    "read_prompts",
    "results_of_split",
]
