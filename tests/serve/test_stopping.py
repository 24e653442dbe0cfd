"""SIGTERM and SIGINT: requests that were received before are answered."""

from __future__ import annotations

import json
import signal
import socket

import pytest

from tests.processes import wait_until
from tests.serve.server import Process, photo

REQUESTS = 24
ENDED = {signal.SIGTERM: -signal.SIGTERM, signal.SIGINT: 0}
"""Exit status after each signal, as uvicorn sets it."""


def send(server, task, data):
    """Send a request; returns the connection."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = f"POST /tasks/{task}?show=99 HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("number", list(ENDED), ids=lambda number: number.name)
def test_a_signal_loses_no_request(prompts, number):
    tasks = ["cars", "birds"]
    arguments = [f"{name}={prompts.source(name)}" for name in tasks]
    with Process(*arguments, "--wait-ms", "2000", "--max-batch", "8") as server:
        idle = socket.create_connection(("127.0.0.1", server.port))
        connections = [send(server, tasks[position % 2], photo(position)) for position in range(REQUESTS)]
        wait_until(lambda: received(server.get("/tasks")) == REQUESTS)
        assert server.get("/tasks")["waiting"], "some images wait for their answer"
        assert server.stop(number) == (ENDED[number], "")
        for position, connection in enumerate(connections):
            answer = b"".join(iter(lambda connection=connection: connection.recv(65536), b"")).decode()
            connection.close()
            assert answer.startswith("HTTP/1.1 200 "), answer
            content = json.loads(answer.partition("\r\n\r\n")[2])
            assert prompts.is_answer(content, tasks[position % 2], photo(position))
        assert idle.recv(1) == b"", "a connection without a request is closed"
        idle.close()
        assert not accepts(server.port)


def received(counts):
    """Number of images that wait or are answered."""
    return counts["waiting"] + counts["images"]


def accepts(port):
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def test_a_second_sigint_waits_for_no_request(prompts):
    with Process(f"cars={prompts.source('cars')}", "--wait-ms", "600000") as server, send(server, "cars", photo(0)):
        wait_until(lambda: server.get("/tasks")["waiting"])
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: not accepts(server.port))  # until the signal is handled
        assert server.process.poll() is None
        assert server.stop(signal.SIGINT)[0] == 0
