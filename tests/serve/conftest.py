"""Prompt files of the tests of the server, and a server of two of them."""

from __future__ import annotations

import signal

import pytest

from tests.serve.server import Process, Prompts


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    return Prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def server(prompts):
    """A server of cars and birds; tests leave it with these tasks."""
    with Process(f"cars={prompts.source('cars')}", f"birds={prompts.source('birds')}", "--wait-ms", "100") as process:
        yield process
        code, errors = process.stop()
    assert (code, errors) == (-signal.SIGTERM, "")
