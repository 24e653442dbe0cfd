"""Answers: those of single adapters, in fewer batches than requests, also while tasks change."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from functools import partial

import pytest

from lpt_peft.errors import InputError
from tests.clients.example_processes import load_example
from tests.serve.server import in_threads, photo, together


@pytest.fixture
def all_tasks(server, prompts):
    for name in ("fish", "dark"):
        assert server.put(name, prompts.source(name))[0] == 200
    yield ["cars", "birds", "fish", "dark"]
    for name in ("fish", "dark"):
        assert server.delete(name) == (200, {"removed": name})


def test_fifty_requests_at_a_time_get_the_answers_of_single_adapters(server, prompts, all_tasks):
    before = server.get("/tasks")
    tasks = [all_tasks[number % 4] for number in range(50)]
    answers = together([partial(server.ask, task, photo(number)) for number, task in enumerate(tasks)])
    for number, (task, (status, answer)) in enumerate(zip(tasks, answers, strict=True)):
        assert status == 200, answer
        assert answer["task"] == task
        assert prompts.is_answer(answer, task, photo(number))
    after = server.get("/tasks")
    assert after["images"] - before["images"] == 50
    assert after["batches"] - before["batches"] < 25


def test_an_answer_has_the_most_probable_classes(server, prompts):
    status, answer = server.ask("cars", photo(3), show=2)
    assert status == 200
    expected = prompts.expected("cars", photo(3))[:2]
    assert [(entry["class"], entry["label"]) for entry in answer["classes"]] == [
        (entry["class"], entry["label"]) for entry in expected
    ]
    assert len(server.request("POST", "/tasks/cars", photo(3))[2]["classes"]) == 5
    info = server.get("/tasks/cars")
    assert answer["version"] == info["digest"][:12]
    assert info["temperature"] == 0.7


def test_a_task_is_preprocessed_as_its_prompt_file_says(prompts):
    """The oracle notices another mean and std."""
    classifier = prompts.classifiers["dark"]
    right = prompts.expected("dark", photo(0))
    transform, classifier.transform = classifier.transform, prompts.classifiers["cars"].transform
    try:
        assert not prompts.is_answer({"classes": right}, "dark", photo(0))
    finally:
        classifier.transform = transform


def test_a_connection_answers_several_requests(server, prompts):
    with server.connect() as connection:
        for path, status in [("/tasks/cars?show=99", 200), ("/tasks/none", 404), ("/tasks/cars?show=99", 200)]:
            connection.request("POST", path, photo(1))
            response = connection.getresponse()
            content = response.read()
            assert response.status == status, content
            assert response.headers["Connection"] is None
    assert server.tasks == ["cars", "birds"]


def test_the_interactive_page_describes_all_requests(server):
    with server.connect() as connection:
        connection.request("GET", "/docs")
        response = connection.getresponse()
        assert (response.status, b"/openapi.json" in response.read()) == (200, True)
    paths = server.get("/openapi.json")["paths"]
    assert {path: set(methods) for path, methods in paths.items()} == {
        "/tasks": {"get"},
        "/tasks/{name}": {"get", "post", "put", "delete"},
    }
    assert paths["/tasks/{name}"]["post"]["requestBody"]["content"]["image/*"]["schema"]["format"] == "binary"


def test_the_same_new_task_several_times_at_once(server, prompts):
    answers = together([partial(server.put, "new", prompts.source(name)) for name in ["cars", "birds"] * 4])
    assert [status for status, _ in answers] == [200] * 8
    assert server.delete("new")[0] == 200


def test_more_tasks_at_a_time_than_slots(prompts):
    tasks = ["cars", "birds", "fish", "dark"]
    arguments = [f"{name}={prompts.source(name)}" for name in tasks]
    with in_threads(*arguments, "--capacity", "2", "--wait-ms", "300") as server:
        answers = together([partial(server.ask, tasks[number % 4], photo(number)) for number in range(12)])
        for number, (status, answer) in enumerate(answers):
            assert status == 200, answer
            assert prompts.is_answer(answer, tasks[number % 4], photo(number))
        assert [server.get(f"/tasks/{name}")["in_slot"] for name in tasks].count(True) == 2
        assert server.get("/tasks")["batches"] < 12


def test_backbone_in_half_precision(prompts):
    with in_threads(f"cars={prompts.source('cars')}", "--dtype", "bfloat16") as server:
        assert server.put("dark", prompts.source("dark"))[0] == 200
        for task in ("cars", "dark"):
            status, answer = server.ask(task, photo(0))
            assert status == 200
            found = {entry["label"]: entry["probability"] for entry in answer["classes"]}
            expected = {entry["label"]: entry["probability"] for entry in prompts.expected(task, photo(0))}
            assert 1e-6 < max(abs(found[label] - expected[label]) for label in expected) < 0.1


@pytest.mark.nightly
def test_compiled(prompts):
    tasks = ["cars", "birds"]
    arguments = [f"{name}={prompts.source(name)}" for name in tasks]
    with in_threads(*arguments, "--compile", "--wait-ms", "300") as server:
        assert server.put("cars-2", prompts.source("cars-2"))[0] == 200
        tasks.append("cars-2")
        for count in (1, 3, 9):
            answers = together([partial(server.ask, tasks[number % 3], photo(number)) for number in range(count)])
            for number, (status, answer) in enumerate(answers):
                assert status == 200, answer
                assert prompts.is_answer(answer, tasks[number % 3], photo(number))


def test_a_request_that_waits_while_its_task_is_replaced_or_removed(prompts):
    """The versions differ in preprocessing: an image prepared for the old version must not meet the new version."""
    tasks = {"changed": "cars", "removed": "birds", "kept": "fish"}
    arguments = [f"{name}={prompts.source(source)}" for name, source in tasks.items()]
    with in_threads(*arguments, "--wait-ms", "1500") as server:
        results = {}

        def ask(name):
            results[name] = server.ask(name, photo(5))

        threads = [threading.Thread(target=ask, args=(name,)) for name in tasks]
        for thread in threads:
            thread.start()
        while server.get("/tasks")["waiting"] < 3:
            time.sleep(0.01)
        assert server.put("changed", prompts.source("cars-2"))[0] == 200
        assert server.delete("removed")[0] == 200
        for thread in threads:
            thread.join()
    assert results["removed"][0] == 404
    for name, source in {"changed": "cars-2", "kept": "fish"}.items():
        status, answer = results[name]
        assert status == 200, answer
        assert prompts.is_answer(answer, source, photo(5))


@pytest.mark.parametrize("added_again", [True, False])
def test_a_task_removed_when_its_batch_starts(prompts, added_again):
    """It is there again when the error of the bank arrives; without a change, the error is that of the image."""
    module = load_example("serve")
    options = module.parse([f"cars={prompts.source('cars')}", "--device", "cpu"])
    server = module.Server(module.open_bank(options), options)
    forward = server.batcher.forward

    def interrupted(images, tasks):
        if not added_again:
            raise InputError("refused")
        server.batcher.forward = forward
        server.remove("cars")
        try:
            return forward(images, tasks)
        finally:
            server.put("cars", module.Prompts(source=prompts.source("cars")))

    async def classify():
        async with server.lifespan(None):
            return await server.classify("cars", photo(0))

    server.batcher.forward = interrupted
    if added_again:
        found = asyncio.run(classify())
        expected = {entry["label"]: entry["probability"] for entry in prompts.expected("cars", photo(0))}
        assert found.probabilities.tolist() == pytest.approx([expected[label] for label in range(10)], abs=1e-4)
    else:
        with pytest.raises(InputError, match="refused"):
            asyncio.run(classify())


def test_tasks_that_change_while_requests_run(server, prompts):
    """An answer is that of a version which its task had during the request; another task is never disturbed."""
    photos = [photo(number) for number in range(6)]
    versions = {server.put("changing", prompts.source(name))[1]["digest"][:12]: name for name in ("cars", "cars-2")}
    history = [(time.monotonic(), None, "cars-2")]  # from, to, version; None is the time of the next change
    records, stopped, rng = [], threading.Event(), random.Random(0)

    def change():
        for _ in range(30):
            start, found = time.monotonic(), rng.choice(["cars", "cars-2", None, "cars", "cars-2"])
            if found is None:
                server.delete("changing")
            else:
                assert server.put("changing", prompts.source(found))[0] == 200
            history[-1] = (history[-1][0], time.monotonic(), history[-1][2])
            history.append((start, None, found))
            done = len(records) + 16
            while len(records) < done:  # all clients have asked at least once since then
                time.sleep(0.001)
        stopped.set()

    def client(number):
        while not stopped.is_set():
            task, which = ["changing", "birds"][number % 2], number % len(photos)
            start = time.monotonic()
            with_status = server.ask(task, photos[which])
            records.append((start, time.monotonic(), task, which, *with_status))

    together([change, *(partial(client, number) for number in range(8))])
    history[-1] = (history[-1][0], time.monotonic(), history[-1][2])
    assert len({status for *_, status, _ in records}) > 1, "the task was never missing"
    for start, end, task, which, status, answer in records:
        if task == "birds":
            assert status == 200
            assert prompts.is_answer(answer, "birds", photos[which])
            continue
        possible = {version for begun, ended, version in history if begun <= end and ended >= start}
        if status == 404:
            assert None in possible
        else:
            assert status == 200, answer
            assert versions[answer["version"]] in possible
            assert prompts.is_answer(answer, versions[answer["version"]], photos[which])
    server.delete("changing")
    assert server.tasks == ["cars", "birds"]
