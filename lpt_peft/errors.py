"""Exceptions of lpt_peft.

A message names the input, the rule that it breaks and the call that fixes it. Classes also derive from the built-in
exception that a caller expects (`ValueError`, `TypeError`, ...), so ordinary `except` clauses work.
"""

from __future__ import annotations


class LPTError(Exception):
    """Base class of all errors of lpt_peft."""


class ConfigError(LPTError, ValueError):
    """A setting is out of its range or contradicts another setting."""


class InputError(LPTError, ValueError):
    """Labels, counts or tensors from the caller break a rule."""


class UnlabelledError(InputError):
    """The images have no labels, for example a test set without class folders."""


class StateError(LPTError, RuntimeError):
    """The object's current state does not allow the call."""


class BackboneError(LPTError, TypeError):
    """The model cannot take prompts; the message names its class and the nearest alternative that works."""


class ExportError(LPTError, RuntimeError):
    """A model cannot be exported, or the exported file returns other results than the model."""


class MissingExtraError(LPTError, ImportError):
    """An optional library is not installed; the message names the extra that installs it."""


class PromptFileError(LPTError):
    """Base class of all errors about prompt files."""


class PromptFileNotFoundError(PromptFileError, FileNotFoundError):
    """The folder or its `prompts.safetensors` is missing."""


class PromptFileFormatError(PromptFileError, ValueError):
    """The header of `prompts.safetensors` breaks the format, or the file is not a regular file."""


class PromptFileVersionError(PromptFileError):
    """The file has another format version."""


class PromptFileTensorError(PromptFileError, ValueError):
    """Names, dtypes, shapes or values of the tensors do not match the configuration."""


class PromptFileIntegrityError(PromptFileError):
    """The bytes differ from those that were written: truncated, modified or of another size."""


class PromptFileExistsError(PromptFileError, FileExistsError):
    """The folder holds a `config.json` of another library, which is never overwritten."""


class BackboneMismatchError(PromptFileError):
    """Prompts or head were trained on another backbone, or on other weights of the same architecture."""


class ModelFileError(LPTError):
    """A model file (`model.safetensors` and `config.json`) breaks the format, is damaged, or does not fit the ViT."""


class ModelFileNotFoundError(ModelFileError, FileNotFoundError):
    """The folder, or a file of the model in it, is missing."""


class HubError(LPTError):
    """The Hugging Face Hub did not deliver or accept a prompt file; base class of the causes below."""


class HubNotFoundError(HubError, FileNotFoundError):
    """The repository, revision or file does not exist, or the token has no access to it."""


class HubAccessError(HubError, PermissionError):
    """The Hub denies access: a gated repository, an invalid token, or a read-only token."""


class HubUnavailableError(HubError, ConnectionError):
    """The Hub cannot be reached (offline, no answer, out of order) and the cache does not hold the file."""


class HubConflictError(HubError):
    """The push would overwrite a simultaneous push or another library's `config.json`; nothing was overwritten."""


class HubIntegrityError(HubError, PromptFileIntegrityError):
    """The download differs from the hash that the Hub states, twice in a row."""
