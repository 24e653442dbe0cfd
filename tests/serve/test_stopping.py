"""SIGTERM and SIGINT: requests that were sent before are answered."""

from __future__ import annotations

import json
import signal
import socket

import pytest

from tests.serve.server import Process, photo

REQUESTS = 24


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_loses_no_request(prompts, number):
    tasks = ["cars", "birds"]
    arguments = [f"{name}={prompts.source(name)}" for name in tasks]
    with Process(*arguments, "--wait-ms", "300", "--max-batch", "8") as server:
        idle = socket.create_connection(("127.0.0.1", server.port))
        connections = []
        for position in range(REQUESTS):
            data = photo(position)
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
            head = f"POST /tasks/{tasks[position % 2]}?show=99 HTTP/1.1\r\nContent-Length: {len(data)}\r\n\r\n"
            connection.sendall(head.encode() + data)
            connections.append(connection)
        code, errors = server.stop(number)
        assert (code, errors) == (0, "")
        for position, connection in enumerate(connections):
            answer = b"".join(iter(lambda connection=connection: connection.recv(65536), b"")).decode()
            connection.close()
            assert answer.startswith("HTTP/1.1 200 "), answer
            content = json.loads(answer.partition("\r\n\r\n")[2])
            assert prompts.is_answer(content, tasks[position % 2], photo(position))
        assert idle.recv(1) == b"", "a connection without a request is closed"
        idle.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port))


def accepts(port):
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def test_the_second_signal_ends_the_process_at_once(prompts):
    with Process(f"cars={prompts.source('cars')}", "--wait-ms", "60000") as server:
        data = photo(0)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"POST /tasks/cars HTTP/1.1\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
            while not server.get("/health")["waiting"]:
                pass
            server.process.send_signal(signal.SIGINT)
            while accepts(server.port):  # until the signal is handled
                pass
            assert server.process.poll() is None
            assert server.stop(signal.SIGINT)[0] == -signal.SIGINT
