"""A server for many tasks on one ViT: requests that arrive within milliseconds are answered in one mixed batch.

pip install -e . fastapi uvicorn
python examples/serve.py cars=runs/cars/prompts birds=runs/birds/prompts  # or owner/name on the Hub

curl --data-binary @photo.jpg 'http://127.0.0.1:8000/tasks/cars?show=3'
curl -X PUT -H 'Content-Type: application/json' -d '{"source": "runs/fish/prompts"}' http://127.0.0.1:8000/tasks/fish
curl -X DELETE http://127.0.0.1:8000/tasks/fish
curl http://127.0.0.1:8000/tasks

There is no authentication, and PUT reads folders of this machine: let only administrators reach PUT and DELETE.
docs/how-to/serve.md has advice on the options, and measurements.
"""

import argparse
import asyncio
import threading
import warnings
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

import anyio
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from lpt_peft import Classifier, PromptBank
from lpt_peft.bank import TaskInfo, TaskPrediction
from lpt_peft.data import open_image, transforms
from lpt_peft.errors import HubError, InputError, LPTError, StateError

Image.MAX_IMAGE_PIXELS = 60_000_000
warnings.simplefilter("error", Image.DecompressionBombWarning)  # refuse images with more pixels

Waiting = tuple[str, torch.Tensor, "asyncio.Future[TaskPrediction]"]  # task, image and answer


class Batcher:
    """Answers images in batches of at most `max_batch`; an image waits at most `wait` seconds for others."""

    def __init__(self, bank: PromptBank, max_batch: int, wait: float) -> None:
        self.bank, self.max_batch, self.wait = bank, max_batch, wait
        self.device = next(bank.vit.parameters()).device
        self.queue: asyncio.Queue[Waiting] = asyncio.Queue()
        self.batches = self.images = 0
        threads = torch.get_num_threads()  # all for the ViT, while images are decoded with one thread each
        self.thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))

    async def ask(self, task: str, image: torch.Tensor) -> TaskPrediction:
        """Return the answer to a preprocessed image."""
        answer: asyncio.Future[TaskPrediction] = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((task, image, answer))
        return await answer

    async def run(self) -> None:
        """Collect and answer batches until the server stops."""
        while True:
            idle = self.queue.empty()  # otherwise images have waited during the last batch
            batch = [await self.queue.get()]
            if idle and self.max_batch > 1:
                await asyncio.sleep(self.wait)
            while len(batch) < self.max_batch and not self.queue.empty():
                batch.append(self.queue.get_nowait())
            await self.answer(batch)

    async def answer(self, batch: Sequence[Waiting]) -> None:
        """Answer a batch; after an error its halves, so that the error reaches only the request that caused it."""
        tasks, images, answers = zip(*batch, strict=True)
        try:
            output = await asyncio.get_running_loop().run_in_executor(self.thread, self.forward, images, tasks)
        except Exception as error:
            if len(batch) > 1:
                await self.answer(batch[: len(batch) // 2])
                await self.answer(batch[len(batch) // 2 :])
            elif not answers[0].done():
                answers[0].set_exception(error)
            return
        self.batches += 1
        self.images += len(batch)
        for answer, prediction in zip(answers, output, strict=True):
            if not answer.done():  # otherwise its request was cancelled
                answer.set_result(prediction)

    def forward(self, images: Sequence[torch.Tensor], tasks: Sequence[str]) -> list[TaskPrediction]:
        """Run the bank."""
        return list(self.bank(torch.stack(tuple(images)).to(self.device), tasks).cpu())


class Prompts(BaseModel, extra="forbid", strict=True):
    """Body of PUT."""

    source: str
    pinned: bool = False


class Server:
    """HTTP requests to a bank."""

    def __init__(self, bank: PromptBank, options: argparse.Namespace) -> None:
        self.bank, self.options, self.waiting = bank, options, 0
        self.batcher = Batcher(bank, options.max_batch, options.wait_ms / 1000)
        self.decoders = ThreadPoolExecutor(initializer=torch.set_num_threads, initargs=(1,))
        self.changing, self.changes = threading.Lock(), 0  # PUT and DELETE

    def app(self) -> FastAPI:
        """Return the application."""
        image: Any = {"requestBody": {"content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}}}
        app = FastAPI(title="Many tasks on one ViT", lifespan=self.lifespan, exception_handlers={LPTError: refuse})
        app.get("/tasks")(self.overview)
        app.get("/tasks/{name:path}")(self.describe)
        app.post("/tasks/{name:path}", openapi_extra=image)(self.predict)
        app.put("/tasks/{name:path}")(self.put)
        app.delete("/tasks/{name:path}")(self.remove)
        return app

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Run the batcher as long as the application."""
        running = asyncio.create_task(self.batcher.run())
        yield
        running.cancel()

    async def overview(self) -> Any:
        """List the tasks, and count the work."""
        counts = {"waiting": self.waiting, "batches": self.batcher.batches, "images": self.batcher.images}
        return {"tasks": self.bank.tasks, **counts, "bytes": self.bank.memory()}

    async def describe(self, name: str) -> Any:
        """Describe a task."""
        return self.find(name)._asdict()

    async def predict(self, request: Request, name: str, show: Annotated[int, Query(ge=1)] = 5) -> Any:
        """Return the most probable classes of the image in the body."""
        if self.waiting >= self.options.max_waiting:
            raise HTTPException(503, "Too many images are waiting. Try again later.", {"Retry-After": "1"})
        self.waiting += 1
        try:
            found = await self.classify(name, await self.body(request))
        finally:
            self.waiting -= 1
        if not bool(found.logits.isfinite().all()):
            raise HTTPException(500, "The logits are NaN or infinite. Start the server with --dtype float32.")
        names = found.label_names or [str(label) for label in range(len(found.logits))]
        top = found.probabilities.topk(min(show, len(names)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        classes = [{"class": names[label], "label": label, "probability": round(value, 6)} for label, value in pairs]
        return {"task": name, "version": found.digest[:12], "classes": classes}

    def put(self, name: str, prompts: Prompts) -> Any:
        """Add a task, or replace it; a replaced task keeps its value of `pinned`."""
        with self.changing:
            if name in self.bank.tasks:
                self.bank.replace(name, prompts.source)
            else:
                self.bank.add(name, prompts.source, prompts.pinned)
            self.changes += 1
            return self.find(name)._asdict()

    def remove(self, name: str) -> Any:
        """Remove a task; images that wait for it are answered with 404."""
        with self.changing:
            self.find(name)
            self.bank.remove(name)
            self.changes += 1
        return {"removed": name}

    async def body(self, request: Request) -> bytes:
        """Return the body of a request."""
        content, options = bytearray(), self.options
        try:
            with anyio.fail_after(options.body_seconds):
                async for part in request.stream():
                    content += part
                    if len(content) > options.max_mebibytes << 20:
                        raise HTTPException(413, f"The limit of an image file is {options.max_mebibytes} MiB.")
        except (TimeoutError, ClientDisconnect) as error:
            raise HTTPException(408, "The image did not arrive in time.", {"Connection": "close"}) from error
        return bytes(content)

    async def classify(self, name: str, content: bytes) -> TaskPrediction:
        """Return the answer of a version of the task for which the image was preprocessed."""
        while True:
            changes, info = self.changes, self.find(name)
            image = await asyncio.get_running_loop().run_in_executor(self.decoders, preprocessed, info, content)
            try:
                found = await self.batcher.ask(name, image)
            except InputError:
                self.find(name)  # 404 if it was removed meanwhile
                if changes == self.changes:
                    raise
                continue  # it may have been removed and added again
            if found.digest == info.digest:  # otherwise the task was replaced meanwhile
                return found

    def find(self, name: str) -> TaskInfo:
        """Return the current version of a task."""
        with suppress(InputError):
            return self.bank.describe(name)
        raise HTTPException(404, f"There is no task {name!r:.80}; GET /tasks lists the tasks.")


def preprocessed(info: TaskInfo, content: bytes) -> torch.Tensor:
    """Return an image as a tensor; tasks may differ in preprocessing, because images meet as tensors."""
    try:
        image: torch.Tensor = transforms(info.preprocess, train=False)(open_image(content))
    except Exception as error:  # decoders raise all kinds of exceptions on broken bytes
        raise HTTPException(400, f"The image cannot be read: {error}") from error
    return image


async def refuse(_: Request, error: Exception) -> JSONResponse:
    """Answer an error of the library with its message."""
    status = 502 if isinstance(error, HubError) else 409 if isinstance(error, StateError) else 422
    return JSONResponse({"detail": str(error)}, status)


def open_bank(options: argparse.Namespace) -> PromptBank:
    """Build the ViT that the first task names, and add all tasks."""
    first = options.backbone or options.tasks[0][1]
    # In float32, because prompt files are compared with the weights before the cast.
    classifier = Classifier.from_pretrained(first, device=options.device, dtype=torch.float32)
    bank = PromptBank(classifier.model.unwrap().requires_grad_(False), capacity=options.capacity)
    for name, source in options.tasks:
        bank.add(name, source)
    if options.dtype != "float32":
        bank.cast_backbone(getattr(torch, options.dtype))
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
    add("tasks", nargs="+", type=named_source, metavar="NAME=SOURCE", help="SOURCE: folder, or owner/name on the Hub")
    add("--backbone", metavar="SOURCE", help="run or prompts whose ViT is built; default: the first task")
    add("--device", help="default: the accelerator if there is any")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the ViT")
    add("--compile", action="store_true", help="compile the forward; the first batches then take minutes")
    add("--capacity", type=int, default=32, help="tasks on the device; further tasks wait in CPU memory")
    add("--max-batch", type=int, default=32, help="images of a batch")
    add("--wait-ms", type=float, default=5, help="time that an image waits for others, in ms")
    add("--max-waiting", type=int, default=256, help="images in work; beyond it, the answer is 503")
    add("--max-mebibytes", type=int, default=16, help="size of an image file")
    add("--body-seconds", type=float, default=60, help="time in which an image file must arrive, in s")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000, help="0 chooses a free port")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    app = Server(open_bank(options), options).app()
    config = uvicorn.Config(app, options.host, options.port, log_level="warning")
    socket = config.bind_socket()
    socket.listen()  # clients may connect as soon as they have read the address
    print(
        f"{', '.join(name for name, _ in options.tasks)}: http://{options.host}:{socket.getsockname()[1]}", flush=True
    )
    with suppress(KeyboardInterrupt):  # uvicorn raises it after a graceful stop
        uvicorn.Server(config).run([socket])


if __name__ == "__main__":
    main()
