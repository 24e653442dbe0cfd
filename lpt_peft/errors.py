"""Every error the library raises on purpose: one base class, one class per cause.

A message names the input, the rule it broke and the call that mends it. Classes also derive from the
built-in a caller would expect (`ValueError`, `TypeError`, ...), so ordinary `except` clauses work.
"""

from __future__ import annotations


class LPTError(Exception):
    """Base class of all errors of lpt_peft."""


class ConfigError(LPTError, ValueError):
    """A setting is out of its range or contradicts another."""


class InputError(LPTError, ValueError):
    """Labels, counts or tensors given by the caller break a rule."""


class UnlabelledError(InputError):
    """The images have no labels, for example a test set without class folders."""


class StateError(LPTError, RuntimeError):
    """A call that the object's present state does not allow."""


class BackboneError(LPTError, TypeError):
    """This model cannot take prompts; the message names the module class and the nearest thing that works."""


class MissingExtraError(LPTError, ImportError):
    """An optional library is not installed; the message names the extra that brings it."""


class PromptFileError(LPTError):
    """Base class of everything that can be wrong with a prompt file."""


class PromptFileNotFoundError(PromptFileError, FileNotFoundError):
    """The folder or one of its two files is missing."""


class PromptFileFormatError(PromptFileError, ValueError):
    """config.json or the safetensors header breaks the format."""


class PromptFileVersionError(PromptFileError):
    """The file was written by a later format version."""


class PromptFileTensorError(PromptFileError, ValueError):
    """Names, dtypes, shapes or values of the tensors are not what the configuration needs."""


class PromptFileIntegrityError(PromptFileError):
    """The bytes are not those that were written: truncated, flipped, of another size."""


class BackboneMismatchError(PromptFileError):
    """The prompts were learnt on another backbone, or on other weights of the same one."""


class HubError(LPTError):
    """The Hugging Face Hub did not give or take a prompt file; base class of the causes below."""


class HubNotFoundError(HubError, FileNotFoundError):
    """No such repository, revision or file, as far as the token may see."""


class HubAccessError(HubError, PermissionError):
    """The Hub knows what is meant and does not allow it: gated, a wrong token, or one that may only read."""


class HubUnavailableError(HubError, ConnectionError):
    """The Hub cannot be asked (offline, no answer, out of order), and what is wanted is not in the cache."""


class HubConflictError(HubError):
    """Someone else pushed meanwhile; nothing was overwritten."""


class HubIntegrityError(HubError, PromptFileIntegrityError):
    """What arrived, twice, is not what the Hub says it sent."""
