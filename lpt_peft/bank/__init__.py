"""Many tasks on one backbone: `PromptBank` answers batches in which every image has its own task.

Not here: a single task (`lpt_peft.adapter`), prompt files (`lpt_peft.checkpoint`).
"""

from lpt_peft.bank.bank import PromptBank
from lpt_peft.bank.export import BankModule
from lpt_peft.bank.output import BankOutput, TaskInfo, TaskPrediction

__all__ = ["BankModule", "BankOutput", "PromptBank", "TaskInfo", "TaskPrediction"]
