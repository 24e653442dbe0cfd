"""Model card (README.md) of a prompt file on the Hugging Face Hub.

It contains facts from the file and from the caller; license, datasets and base model are never guessed. Not here:
whether a repository already has a card (`lpt_peft.hub.push`).
"""

from lpt_peft.hub.card.model_card import CARD_NAME, CardOptions, model_card
from lpt_peft.hub.card.results import results_of_split

__all__ = ["CARD_NAME", "CardOptions", "model_card", "results_of_split"]
