"""Configurations with a query or a router that break the format are refused, by name."""

from __future__ import annotations

import copy

import pytest

from lpt_peft.checkpoint import encode
from lpt_peft.checkpoint.schema import check_config
from lpt_peft.errors import PromptFileError, PromptFileFormatError, PromptFileTensorError
from tests.test_routing import TRAINING, trained_adapter

DELETE = object()


@pytest.fixture(scope="module")
def routed():
    """The configuration of a prompt file with a router."""
    from lpt_peft._prompt_content import content_of  # noqa: PLC0415 - beside its only use

    adapter = trained_adapter()
    adapter.fit_router(TRAINING, features="random", width=8, progress=False)
    return encode(content_of(adapter)).config


def edited(config, path, value):
    config = copy.deepcopy(config)
    *parents, last = path.split("/")
    target = config
    for key in parents:
        target = target[key]
    if value is DELETE:
        del target[last]
    else:
        target[last] = value
    return config


BROKEN = {
    "query of another kind": ("prompt/query", "block_2", PromptFileFormatError, "prompt.query"),
    "router without its query": ("prompt/query", "block_k", PromptFileFormatError, "router is for prompts of phase"),
    "router in phase shared": ("prompt/phase", "shared", PromptFileFormatError, "router is for prompts of phase"),
    "router without tensors": ("tensors/router.weight", DELETE, PromptFileTensorError, r"missing \['router.weight'\]"),
    "tensors without router": ("router", DELETE, PromptFileTensorError, r"unknown \['router.bias', 'router.weight'\]"),
    "another width": ("router/width", 9, PromptFileTensorError, r"router.weight with shape \(6, 56\).*need \(6, 57\)"),
    "huge width": ("router/width", 2**20, PromptFileFormatError, "router.width"),
    "negative seed": ("router/seed", -1, PromptFileFormatError, "router.seed"),
    "a missing seed": ("router/seed", DELETE, PromptFileFormatError, "seed"),
    "an unknown key": ("router/kernel", "rbf", PromptFileFormatError, "kernel"),
    "too many blocks": ("router/blocks", 3, PromptFileFormatError, "router.blocks must be at most 2"),
    "a bias of another size": (
        "tensors/router.bias/shape",
        [5],
        PromptFileTensorError,
        r"router.bias with shape \(5,\)",
    ),
    "integers": ("tensors/router.bias/dtype", "I64", PromptFileTensorError, "router.bias as I64"),
}


@pytest.mark.parametrize(("path", "value", "error", "words"), BROKEN.values(), ids=BROKEN)
def test_broken_configurations(routed, path, value, error, words):
    check_config(routed)
    with pytest.raises(error, match=words) as caught:
        check_config(edited(routed, path, value))
    assert isinstance(caught.value, PromptFileError)


def test_a_router_without_class_token_has_half_of_the_features(routed):
    check_config(edited(routed, "tensors/router.weight/shape", [6, 24 + 8]))


def test_the_default_query_may_be_stated(routed):
    check_config(edited(routed, "prompt/query", "final"))
