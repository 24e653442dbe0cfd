"""Errors: JSON with the right status code, and a server that continues."""

from __future__ import annotations

import io
import json
import socket
import struct
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from PIL import Image

from lpt_peft import LongTailPromptAdapter
from lpt_peft.checkpoint import WEIGHTS_NAME, encode, read_prompt_file
from lpt_peft.errors import InputError
from tests.clients.example_processes import load_example
from tests.processes import wait_until
from tests.serve.server import in_threads, photo, together


@pytest.fixture(scope="module")
def folders(prompts, tmp_path_factory):
    """Folders whose prompts are refused: damaged, for another ViT, or absent; and prompts whose logits are NaN."""
    folder = tmp_path_factory.mktemp("refused")
    content = read_prompt_file(prompts.folder / "cars")
    weights = bytearray(encode(content).weights)
    weights[-1] ^= 1
    (folder / "damaged").mkdir()
    (folder / "damaged" / WEIGHTS_NAME).write_bytes(weights)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=128, depth=4, num_heads=4)
    LongTailPromptAdapter.wrap(vit, 3).save_pretrained(folder / "another")
    huge = torch.full_like(content.tensors["shared.prompts"], 1e38)
    (folder / "huge").mkdir()
    overflow = encode(replace(content, tensors={**content.tensors, "shared.prompts": huge}))
    (folder / "huge" / WEIGHTS_NAME).write_bytes(overflow.weights)
    return folder


def blank(width, height):
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "png")
    return file.getvalue()


def body(**options):
    return json.dumps(options)


@pytest.mark.parametrize(
    ("method", "path", "data", "status", "words"),
    [
        ("POST", "/tasks/cars", b"", 400, "cannot be read: not an image: the file is empty"),
        ("POST", "/tasks/cars", b"hello", 400, "cannot be read: not an image"),
        ("POST", "/tasks/cars", photo(0)[:100], 400, "cannot be read"),
        ("POST", "/tasks/cars", blank(8000, 8000), 400, "limit of 60000000 pixels"),
        ("POST", "/tasks/cars?show=0", photo(0), 422, "greater than or equal to 1"),
        ("POST", "/tasks/cars?show=-1", photo(0), 422, "greater than or equal to 1"),
        ("POST", "/tasks/cars?show=all", photo(0), 422, "valid integer"),
        ("POST", f"/tasks/cars?show={'9' * 5000}", photo(0), 422, "as an integer"),
        ("POST", "/tasks/boats", photo(0), 404, "no task 'boats'"),
        ("GET", "/tasks/boats", None, 404, "no task 'boats'"),
        ("DELETE", "/tasks/boats", None, 404, "no task 'boats'"),
        ("GET", "/", None, 404, "Not Found"),
        ("POST", "/tasks", photo(0), 405, "Method Not Allowed"),
        ("DELETE", "/tasks", None, 405, "Method Not Allowed"),
        ("PATCH", "/tasks/new", None, 405, "Method Not Allowed"),
        ("PUT", "/tasks/new", "source", 422, "JSON"),
        ("PUT", "/tasks/new", "[]", 422, "object"),
        ("PUT", "/tasks/new", b"\xff", 400, "body"),
        ("PUT", "/tasks/new", body(pinned=True), 422, "source"),
        ("PUT", "/tasks/new", body(source=3), 422, "valid string"),
        ("PUT", "/tasks/new", body(source="a", pinned="yes"), 422, "valid boolean"),
        ("PUT", "/tasks/new", body(source="a", device="cpu"), 422, "device"),
        ("PUT", "/tasks/new", body(source="/does/not/exist"), 422, "/does/not/exist"),
        ("PUT", "/tasks/cars", body(source="/does/not/exist"), 422, "/does/not/exist"),
        ("PUT", "/tasks/", body(source="/does/not/exist"), 422, "name='' must be"),
        ("PUT", "/tasks/new", body(source="nobody/nothing"), 502, "nobody/nothing"),
    ],
)
def test_status_and_reason(server, method, path, data, status, words):
    content_type = "application/json" if method == "PUT" else "image/png"
    found, headers, content = server.request(method, path, data, content_type)
    assert (found, headers["Content-Type"]) == (status, "application/json")
    assert words in str(content["detail"])
    assert server.tasks == ["cars", "birds"]


@pytest.mark.parametrize(("name", "words"), [("damaged", "sha256"), ("another", "trained on")])
def test_refused_prompts_change_nothing(server, prompts, folders, name, words):
    for task in ("cars", "new"):
        status, content = server.put(task, str(folders / name))
        assert (status, words in content["detail"]) == (422, True), content
    assert server.tasks == ["cars", "birds"]
    assert prompts.is_answer(server.ask("cars", photo(0))[1], "cars", photo(0))


def test_logits_that_are_not_finite(server, prompts, folders):
    assert server.put("huge", str(folders / "huge"))[0] == 200
    calls = [partial(server.ask, task, photo(0)) for task in ["huge", "cars"] * 4]
    for number, (status, content) in enumerate(together(calls)):
        if number % 2:
            assert prompts.is_answer(content, "cars", photo(0)), "another image of the batch"
        else:
            assert (status, "NaN or infinite" in content["detail"]) == (500, True)
    assert server.delete("huge")[0] == 200


def test_pinned_tasks(prompts):
    with in_threads(f"cars={prompts.source('cars')}", "--capacity", "1") as server:
        assert server.put("birds", prompts.source("birds"), pinned=True)[0] == 200
        status, content = server.put("fish", prompts.source("fish"), pinned=True)
        assert (status, "pinned" in content["detail"]) == (409, True)
        assert server.put("birds", prompts.source("birds"), pinned=True)[0] == 200
        assert server.put("birds", prompts.source("fish"))[0] == 200
        assert server.get("/tasks/birds")["pinned"] is True
        assert prompts.is_answer(server.ask("birds", photo(0))[1], "fish", photo(0))


def test_more_images_than_may_wait(prompts):
    """With a single place, the first request keeps it until the next images of its batch come, which are refused."""
    with in_threads(f"cars={prompts.source('cars')}", "--max-waiting", "1", "--wait-ms", "2000") as server:
        answers = together([partial(server.request, "POST", "/tasks/cars?show=99", photo(0)) for _ in range(4)])
        assert sorted(status for status, *_ in answers) == [200, 503, 503, 503]
        for status, headers, content in answers:
            if status == 503:
                assert headers["Retry-After"] == "1"
                assert "Too many images" in content["detail"]
            else:
                assert prompts.is_answer(content, "cars", photo(0))
        assert server.ask("cars", photo(0))[0] == 200, "the place is free again"
        assert server.get("/tasks")["waiting"] == 0


def test_bodies_that_are_too_large(server, prompts):
    status, _, content = server.request("POST", "/tasks/cars", bytes((16 << 20) + 1))
    assert (status, content["detail"]) == (413, "The limit of an image file is 16 MiB.")
    assert server.request("POST", "/tasks/cars", bytes(16 << 20))[0] == 400
    assert prompts.is_answer(server.ask("cars", photo(0))[1], "cars", photo(0))


def test_a_body_in_chunks(server, prompts):
    data = photo(0)
    status, _, answer = server.request("POST", "/tasks/cars?show=99", iter([data[:10], data[10:]]))
    assert status == 200
    assert prompts.is_answer(answer, "cars", data)


def test_a_body_that_does_not_arrive(prompts):
    """A client that stops sending keeps its place only for a time."""
    arguments = [f"cars={prompts.source('cars')}", "--max-waiting", "1", "--body-seconds", "1"]
    with in_threads(*arguments) as server, socket.create_connection(("127.0.0.1", server.port), timeout=60) as stalled:
        stalled.sendall(f"{HEAD}Content-Length: 1000\r\n\r\n".encode())
        wait_until(lambda: server.get("/tasks")["waiting"])
        assert server.ask("cars", photo(0))[0] == 503
        answer = b"".join(iter(lambda: stalled.recv(65536), b"")).decode()
        assert answer.startswith("HTTP/1.1 408 ")
        assert "did not arrive in time" in answer
        assert server.ask("cars", photo(0))[0] == 200


def test_tasks_whose_names_have_slashes(server, prompts):
    assert server.put("customer/fish", prompts.source("fish"))[1]["name"] == "customer/fish"
    assert prompts.is_answer(server.ask("customer/fish", photo(0))[1], "fish", photo(0))
    assert server.delete("customer%2Ffish") == (200, {"removed": "customer/fish"})


HEAD = "POST /tasks/cars HTTP/1.1\r\nHost: localhost\r\n"


def test_clients_that_go_away(server, prompts):
    """In the middle of a body, and before the answer; by a close and by a reset. The server prints nothing."""
    data = photo(0)
    request = f"{HEAD}Content-Length: {len(data)}\r\n\r\n".encode() + data
    for sent in (b"", request[:20], request[:-10], request):
        for reset in (False, True):
            connection = socket.create_connection(("127.0.0.1", server.port))
            connection.sendall(sent)
            if reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
    assert prompts.is_answer(server.ask("birds", data)[1], "birds", data)


@pytest.mark.parametrize("text", ["cars", "=runs/cars", "cars="])
def test_a_task_on_the_command_line_needs_a_name_and_a_source(text, capsys):
    with pytest.raises(SystemExit):
        load_example("serve").parse(["birds=runs/birds", text])
    assert f"'{text}' must be NAME=SOURCE" in capsys.readouterr().err


def test_a_name_on_the_command_line_twice(prompts):
    with (
        pytest.raises(InputError, match="already has a task 'cars'"),
        in_threads(f"cars={prompts.source('cars')}", f"cars={prompts.source('birds')}"),
    ):
        pass
