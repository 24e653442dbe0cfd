"""A server for many tasks on one ViT: requests that arrive at the same time are answered in one mixed batch.

pip install -e .
python examples/serve.py cars=runs/cars/prompts birds=runs/birds/prompts  # or owner/name on the Hub

curl --data-binary @photo.jpg 'http://127.0.0.1:8000/tasks/cars?show=3'
curl -X PUT -d '{"source": "runs/fish/prompts"}' http://127.0.0.1:8000/tasks/fish  # add or replace
curl -X DELETE http://127.0.0.1:8000/tasks/fish
curl http://127.0.0.1:8000/tasks
curl http://127.0.0.1:8000/health

There is no authentication, and PUT reads folders of this machine: let only administrators reach PUT and DELETE.
docs/how-to/serve.md has advice on the options, and measurements.
"""

from __future__ import annotations

import argparse
import json
import queue
import re
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import torch
from PIL import Image
from torch import Tensor

from lpt_peft import Classifier, PromptBank
from lpt_peft.bank import TaskInfo, TaskPrediction
from lpt_peft.data import open_image, transforms
from lpt_peft.errors import HubError, InputError, LPTError, StateError

Image.MAX_IMAGE_PIXELS = 30_000_000  # Pillow refuses images of more than twice as many pixels


class Request(NamedTuple):
    """An image that waits for its batch."""

    task: str
    image: Tensor
    arrived: float
    answer: Future[TaskPrediction]


class Batcher(threading.Thread):
    """Answers images in batches of at most `max_batch`; an image waits at most `wait` seconds for others."""

    def __init__(self, bank: PromptBank, max_batch: int, wait: float) -> None:
        super().__init__(daemon=True)
        self.bank, self.max_batch, self.wait = bank, max_batch, wait
        self.device, self.threads = next(bank.vit.parameters()).device, torch.get_num_threads()
        self.requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self.batches = self.images = 0

    def ask(self, task: str, image: Tensor) -> TaskPrediction:
        """Return the answer to an image, for the thread of its connection."""
        request = Request(task, image, time.monotonic(), Future())
        self.requests.put(request)
        return request.answer.result()

    def run(self) -> None:
        """Collect and answer batches until the process ends."""
        torch.set_num_threads(self.threads)  # of this thread, while connections decode with one each
        while True:
            batch = [self.requests.get()]
            with suppress(queue.Empty):
                while len(batch) < self.max_batch:
                    left = batch[0].arrived + self.wait - time.monotonic()
                    batch.append(self.requests.get(timeout=max(0.0, left)))
            self.answer(batch)

    def answer(self, batch: list[Request]) -> None:
        """Answer a batch; after an error its halves, so that the error reaches only the request that caused it."""
        try:
            images = torch.stack([request.image for request in batch]).to(self.device)
            output = self.bank(images, [request.task for request in batch]).cpu()
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
            else:
                self.answer(batch[: len(batch) // 2])
                self.answer(batch[len(batch) // 2 :])
            return
        self.batches += 1
        self.images += len(batch)
        for request, prediction in zip(batch, output, strict=True):
            request.answer.set_result(prediction)


class Refusal(Exception):  # noqa: N818 - an answer
    """Status code and reason, as the answer to a request."""


class Server(ThreadingHTTPServer):
    """HTTP server of a bank, with a thread for each connection."""

    daemon_threads = False  # server_close() waits for them
    request_queue_size = 128

    def __init__(self, bank: PromptBank, options: argparse.Namespace) -> None:
        self.bank, self.max_bytes = bank, options.max_mebibytes << 20
        self.batcher = Batcher(bank, options.max_batch, options.wait_ms / 1000)
        self.max_waiting, self.waiting, self.stopping = options.max_waiting, 0, False
        self.counting, self.changing = threading.Lock(), threading.Lock()
        super().__init__((options.host, options.port), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the error of a connection, unless the client has gone."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def stop(self, *_: object) -> None:
        """Handle the first SIGINT or SIGTERM; the second ends the process at once."""
        self.stopping = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        threading.Thread(target=self.shutdown).start()

    @contextmanager
    def place(self) -> Iterator[None]:
        """Count an image from its decoding to its answer."""
        with self.counting:
            if self.waiting >= self.max_waiting:
                raise Refusal(503, "Too many images are waiting. Try again later.")
            self.waiting += 1
        try:
            yield
        finally:
            with self.counting:
                self.waiting -= 1

    def run(self) -> None:
        """Answer requests until `stop`, and then those that have connected before."""
        self.batcher.start()
        self.serve_forever(poll_interval=0.1)
        while select.select([self], [], [], 0)[0]:
            self.handle_request()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of a connection with JSON."""

    server: Server
    protocol_version = "HTTP/1.1"  # a connection stays open for further requests
    timeout = 5  # seconds without a byte
    disable_nagle_algorithm = True

    def respond(self) -> None:
        """Answer a request."""
        torch.set_num_threads(1)  # of this thread, for decoding
        try:
            status, content = self.route()
        except Refusal as refusal:
            status, content = refusal.args[0], {"error": refusal.args[1]}
        except LPTError as error:
            status = 502 if isinstance(error, HubError) else 409 if isinstance(error, StateError) else 422
            content = {"error": str(error)}
        except (ConnectionError, TimeoutError):
            raise
        except Exception:
            traceback.print_exc()
            status, content = 500, {"error": "The server failed; its log has the reason."}
        self.send(status, content)

    do_GET = do_POST = do_PUT = do_DELETE = respond  # noqa: N815

    def route(self) -> tuple[int, Any]:
        """Return status code and content of the answer."""
        url, body, bank, batcher = urlsplit(self.path), self.body(), self.server.bank, self.server.batcher
        match self.command, [unquote(part) for part in url.path.strip("/").split("/")]:
            case "POST", ["tasks", name]:
                return 200, self.predict(name, body, parse_qs(url.query).get("show", ["5"])[-1])
            case "PUT", ["tasks", name]:
                with self.server.changing:
                    return self.put(name, body)
            case "DELETE", ["tasks", name]:
                with self.server.changing:
                    self.find(name)
                    bank.remove(name)
                return 200, {"removed": name}
            case "GET", ["tasks", name]:
                return 200, self.find(name)._asdict()
            case "GET", ["tasks"]:
                return 200, {"tasks": bank.tasks}
            case "GET", ["health"]:
                counts = {"waiting": self.server.waiting, "batches": batcher.batches, "images": batcher.images}
                return 200, {"tasks": len(bank.tasks), **counts, "bytes": bank.memory()}
            case _, ["tasks"] | ["tasks", _] | ["health"]:
                raise Refusal(405, f"{self.command} {url.path} is not possible.")
        raise Refusal(404, "The paths are /tasks, /tasks/NAME and /health.")

    def predict(self, name: str, body: bytes, show: str) -> dict[str, Any]:
        """Return the most probable classes of an image."""
        if not re.fullmatch("[1-9][0-9]{0,8}", show):
            raise Refusal(400, f"show={show!r:.80} must be a number of classes, at least 1.")
        with self.server.place():
            found = self.ask(name, body)
        if not bool(found.logits.isfinite().all()):
            raise Refusal(500, "The logits are NaN or infinite. Start the server with --dtype float32.")
        names = found.label_names or tuple(map(str, range(len(found.logits))))
        top = found.probabilities.topk(min(int(show), len(names)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        classes = [{"class": names[label], "label": label, "probability": round(value, 6)} for label, value in pairs]
        return {"task": name, "version": found.digest[:12], "classes": classes}

    def ask(self, name: str, body: bytes) -> TaskPrediction:
        """Return the answer of a version of the task for which the image was preprocessed."""
        while True:
            info = self.find(name)
            try:
                image = transform(json.dumps(info.preprocess))(open_image(body))
            except Exception as error:  # decoders raise all kinds of exceptions on broken bytes
                raise Refusal(400, f"The image cannot be read: {error}") from error
            try:
                found = self.server.batcher.ask(name, image)
            except InputError:
                self.find(name)  # 404 if it was removed meanwhile
                raise
            if found.digest == info.digest:  # otherwise it was replaced meanwhile
                return found

    def put(self, name: str, body: bytes) -> tuple[int, Any]:
        """Add or replace a task."""
        try:
            options = json.loads(body)
            source, pinned = options.pop("source"), options.pop("pinned", None)
            valid = isinstance(source, str) and pinned in (True, False, None) and not options
        except (ValueError, LookupError, TypeError, AttributeError):
            valid = False
        if not valid:
            raise Refusal(400, 'The body must be {"source": FOLDER or "owner/name"}, and optionally "pinned": true.')
        bank = self.server.bank
        if name not in bank.tasks:
            bank.add(name, source, bool(pinned))
            return 201, self.find(name)._asdict()
        if pinned not in (None, self.find(name).pinned):
            raise Refusal(409, f"A replaced task keeps its value of pinned. DELETE {name!r} before, or omit pinned.")
        bank.replace(name, source)
        return 200, self.find(name)._asdict()

    def find(self, name: str) -> TaskInfo:
        """Return the current version of a task."""
        with suppress(InputError):
            return self.server.bank.describe(name)
        raise Refusal(404, f"There is no task {name!r:.80}; GET /tasks lists the tasks.")

    def body(self) -> bytes:
        """Read the body of the request."""
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not re.fullmatch("[0-9]{1,15}", length):
            self.close_connection = True
            raise Refusal(411, "The request needs a valid Content-Length.")
        left = int(length)
        if left > self.server.max_bytes:
            self.close_connection = True
            left = min(left, 16 * self.server.max_bytes)
            while left and (part := self.rfile.read(min(left, 1 << 16))):  # many clients send all before they read
                left -= len(part)
            raise Refusal(413, f"The body has {length} bytes; the limit is {self.server.max_bytes}.")
        body = self.rfile.read(left)
        if len(body) < left:
            raise ConnectionError
        return body

    def send(self, status: int, content: Any) -> None:
        """Send an answer."""
        body = json.dumps(content).encode() + b"\n"
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        if status == 503:
            headers["Retry-After"] = "1"
        if self.close_connection or self.server.stopping:
            headers["Connection"] = "close"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send an error that the base class finds, such as an invalid request line."""
        self.close_connection = True
        self.send(code, {"error": message or HTTPStatus(code).phrase})

    def log_message(self, *_: object) -> None:
        """Print no line for each request."""


@cache
def transform(preprocess: str) -> Any:
    """Return the preprocessing of a prompt file; tasks may differ in it, because images meet as tensors."""
    return transforms(json.loads(preprocess), train=False)


def open_bank(options: argparse.Namespace) -> PromptBank:
    """Build the ViT that the first task names, and add all tasks."""
    dtype = getattr(torch, options.dtype) if options.dtype else None
    first = options.backbone or options.tasks[0][1]
    vit = Classifier.from_pretrained(first, device=options.device, dtype=dtype).model.unwrap()
    bank = PromptBank(vit, capacity=options.capacity)
    for name, source in options.tasks:
        bank.add(name, source)
    if options.compile:
        bank.compile(dynamic=True)
    return bank


def named_source(text: str) -> tuple[str, str]:
    name, _, source = text.partition("=")
    if not (name and source):
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=SOURCE, such as cars=runs/cars/prompts.")
    return name, source


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "tasks",
        nargs="+",
        type=named_source,
        metavar="NAME=SOURCE",
        help="task, and a folder of prompts or owner/name on the Hub",
    )
    add("--backbone", metavar="SOURCE", help="run or prompts whose ViT is built; default: the first task")
    add("--device", help="default: the accelerator if there is any")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the ViT")
    add("--compile", action="store_true", help="compile the forward; the first batches then take minutes")
    add("--capacity", type=int, default=32, help="tasks on the device; further tasks wait in CPU memory")
    add("--max-batch", type=int, default=32, help="images of a batch")
    add("--wait-ms", type=float, default=5, help="time that an image waits for others, in ms")
    add("--max-waiting", type=int, default=256, help="images in work; beyond it, the answer is 503")
    add("--max-mebibytes", type=int, default=16, help="size of an image file")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000, help="0 chooses a free port")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    server = Server(open_bank(options), options)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.stop)
    print(f"{', '.join(server.bank.tasks)}: http://{options.host}:{server.server_port}", flush=True)
    server.run()


if __name__ == "__main__":
    main()
