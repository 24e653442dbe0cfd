"""The server as a process or in threads, its prompt files, and the answers of single adapters. No tests here."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import uvicorn
from PIL import Image

from lpt_peft import Classifier
from lpt_peft.backbones.bundled.glyph_vit import glyph_vit
from tests.clients.example_processes import load_example
from tests.inference.digit_models import digit_adapter

ROOT = Path(__file__).parents[2]
DARK = {"mean": [0.1, 0.2, 0.3], "std": [0.25, 0.2, 0.3]}
TASKS = {
    "cars": {"phase": "group", "classes": 10},
    "birds": {"phase": "shared", "classes": 4, "temperature": 2.5},
    "fish": {"phase": "group", "query": "block_k", "classes": 9, "pool_size": 5},
    "dark": {"phase": "group", "classes": 7, "preprocess": DARK},
    "cars-2": {"phase": "group", "classes": 8, "preprocess": DARK, "prompt_length": 2},
}


class Prompts:
    """Prompt files of tasks, and a classifier for each.

    The tasks differ in classes, phase, query, temperature and preprocessing, and all but one in the number of tokens.
    """

    def __init__(self, folder):
        self.folder, self.classifiers = folder, {}
        for seed, (name, task) in enumerate(TASKS.items()):
            options = dict(task)
            preprocess = options.pop("preprocess", {})
            phase, query = options.pop("phase"), options.pop("query", "final")
            adapter = digit_adapter(phase, query, seed=seed, build=glyph_vit, **options)
            adapter.save_pretrained(folder / name, preprocess={**adapter.preprocess(), **preprocess})
            self.classifiers[name] = Classifier.from_pretrained(folder / name)

    def source(self, name):
        return str(self.folder / name)

    def expected(self, name, photo):
        """All classes as the server names them, with the probabilities of the single adapter."""
        classifier = self.classifiers[name]
        [prediction] = classifier(photo, show=classifier.num_classes)
        return prediction.to_dict()["classes"]

    def is_answer(self, answer, name, photo):
        """Whether an answer with all classes is that of a prompt file."""
        expected = sorted(self.expected(name, photo), key=lambda entry: entry["label"])
        found = sorted(answer["classes"], key=lambda entry: entry["label"])
        return [entry["class"] for entry in found] == [entry["class"] for entry in expected] and np.allclose(
            [entry["probability"] for entry in found], [entry["probability"] for entry in expected], atol=1e-4
        )


def photo(seed):
    """The bytes of a PNG file, 30 to 60 px, of large patches."""
    generator = np.random.default_rng(seed)
    patches = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    file = io.BytesIO()
    patches.resize(tuple(map(int, generator.integers(30, 60, 2)))).save(file, "png")
    return file.getvalue()


class Client:
    """Requests to the server at a port."""

    port: int

    def connect(self):
        return contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=900))

    def request(self, method, path, body=None, content_type="application/octet-stream"):
        """Return status code, headers and content of an answer."""
        with self.connect() as connection:
            connection.request(method, path, body, {"Content-Type": content_type})
            response = connection.getresponse()
            return response.status, response.headers, json.loads(response.read())

    def get(self, path):
        status, _, content = self.request("GET", path)
        assert status == 200, content
        return content

    @property
    def tasks(self):
        return self.get("/tasks")["tasks"]

    def ask(self, task, data, show=99):
        status, _, content = self.request("POST", f"/tasks/{task}?show={show}", data)
        return status, content

    def put(self, task, source, **options):
        body = json.dumps({"source": source, **options})
        status, _, content = self.request("PUT", f"/tasks/{task}", body, "application/json")
        return status, content

    def delete(self, task):
        status, _, content = self.request("DELETE", f"/tasks/{task}")
        return status, content


class Process(Client):
    """The process `python examples/serve.py ARGUMENTS`, on a free port."""

    def __init__(self, *arguments, folder=ROOT):
        words = [sys.executable, str(ROOT / "examples" / "serve.py"), *arguments, "--port", "0", "--device", "cpu"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder
        )
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"The server did not start: {self.process.communicate()[1]}")
        self.port = int(re.search(r":(\d+)$", line)[1])

    def stop(self, number=signal.SIGTERM):
        """Send a signal; return the exit status and what was printed to stderr."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=120)
        return self.process.returncode, errors

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@contextlib.contextmanager
def in_threads(*arguments):
    """The server in threads of this process, which starts faster than `Process`; yields a client."""
    module = load_example("serve")
    options = module.parse([*arguments, "--port", "0", "--device", "cpu"])
    app = module.Server(module.open_bank(options), options).app()
    config = uvicorn.Config(app, port=0, log_level="warning")
    listener = config.bind_socket()
    listener.listen()
    client = Client()
    client.port = listener.getsockname()[1]
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield client
    finally:
        server.should_exit = True
        thread.join()


def together(calls):
    """Run functions in as many threads at the same time; return their results in order."""
    barrier = threading.Barrier(len(calls))

    def run(call):
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(run, calls))
