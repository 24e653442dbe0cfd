"""A Hub on 127.0.0.1 for the unmodified huggingface_hub client, with faults on demand and a record of all requests.

Honest: an upload whose sha256 is not its name, a parent that is not the head, a private repository, a read-only token
are refused as the real one does. Large files come from another host name (`localhost`), which takes no token.
Not here: what is stored (`repositories.py`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.repositories import File, Hub, Refused, now

KINDS = ("drop", "reset", "truncate", "flip", "hang", "html")
"""Faults besides a status code: no answer, a reset, half a body, a flipped bit, silence, a page of a proxy."""


@dataclass(frozen=True)
class Request:
    """A request."""

    method: str
    host: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes

    @property
    def token(self) -> str | None:
        """The text after "Bearer"."""
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        return token if scheme.lower() == "bearer" else None

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    """An answer."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """`kind` (a status code or one of KINDS) for requests of `method` whose path matches, `times` times."""

    method: str
    pattern: str
    kind: int | str
    times: int = 10**9
    met: int = 0


class XetStore(Protocol):
    """Xet's chunk store, as a Hub uses it: see `test_online_xet.py`."""

    url: str
    hashes: dict[str, str]
    """sha256 -> xet's own hash."""

    def content(self, oid: str) -> bytes:
        """Content uploaded under a sha256."""


def as_json(value: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: Any) -> None:
        """Ignore broken connections, which the tests cause."""


class LocalHub:
    """The server, its store, its faults and its record."""

    def __init__(self) -> None:
        self.reset()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.cdn = f"http://localhost:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def reset(self) -> None:
        """Remove repositories, faults and the record."""
        self.hub = Hub()
        self.requests: list[Request] = []
        self.sent = 0
        self.xet: XetStore | None = None
        self.faults: list[Fault] = []
        self.before: Callable[[Request], None] = lambda request: None
        self.lock = threading.RLock()
        self.silence = threading.Event()

    def close(self) -> None:
        """Stop the server."""
        self.silence.set()
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def fault(self, method: str, pattern: str, kind: int | str, times: int = 10**9) -> Iterator[Fault]:
        """Inside, matching requests meet the fault, which counts them in `met`."""
        fault = Fault(method, pattern, kind, times)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)
            self.silence.set()  # release hanging requests
            self.silence = threading.Event()

    def met(self, request: Request) -> int | str | None:
        """The fault of this request."""
        for fault in self.faults:
            if fault.method == request.method and fault.times > 0 and re.search(fault.pattern, request.path):
                fault.times -= 1
                fault.met += 1
                return fault.kind
        return None

    def answer(self, request: Request) -> Answer:
        """Route a request."""
        try:
            if request.host.startswith("localhost"):
                return self._object(request)
            for method, pattern, route in _ROUTES:
                if request.method in method and (match := re.fullmatch(pattern, request.path)):
                    return route(self, request, *(unquote(group) for group in match.groups()))
            return as_json({"error": f"no such route: {request.method} {request.path}"}, 404)
        except Refused as refusal:
            headers = {"X-Error-Code": refusal.code or "", "X-Error-Message": refusal.message}
            answer = as_json({"error": refusal.message, **refusal.body}, refusal.status)
            answer.headers |= {key: value for key, value in headers.items() if value}
            return answer

    # -- the other host: large objects ---------------------------------------------------------------------

    def _object(self, request: Request) -> Answer:
        oid = request.path.rpartition("/")[2]
        if "authorization" in request.headers:
            return Answer(400, b"Only one auth mechanism allowed")
        if request.method == "PUT":
            if hashlib.sha256(request.body).hexdigest() != oid:
                return Answer(400, b"The sha256 you specified did not match what we received.")
            self.hub.objects[oid] = request.body
            return Answer(200)
        if oid not in self.hub.objects:
            return Answer(403, b"AccessDenied")
        return _part(self.hub.objects[oid], request, {"ETag": f'"{oid}"'})

    # -- routes --------------------------------------------------------------------------------------------

    def _whoami(self, request: Request) -> Answer:
        user, _ = self.hub.accounts.who(request.token)
        if user is None:
            raise Refused(401, None, "Invalid username or password.")
        return as_json({"type": "user", "name": user, "fullname": user, "orgs": []})

    def _create(self, request: Request) -> Answer:
        body = request.json
        name = f"{body['organization']}/{body['name']}" if body.get("organization") else body["name"]
        private = body.get("private") or body.get("visibility") == "private"
        try:
            made = self.hub.create(name, request.token, private=bool(private))
        except Refused as refusal:
            if refusal.status != 409:
                raise
            return as_json({"error": refusal.message, "url": f"{self.endpoint}/{refusal.body['name']}"}, 409)
        return as_json({"url": f"{self.endpoint}/{made.name}", "name": made.name, "id": made.name})

    def _validate(self, request: Request) -> Answer:
        if re.search(r"(?m)^license: not-a-license$", request.json["content"]):
            return as_json({"errors": [{"message": '"license" must be one of the list'}], "warnings": []}, 400)
        return as_json({"errors": [], "warnings": []})

    def _preupload(self, request: Request, name: str, revision: str) -> Answer:
        pull_request = "create_pr" in request.query
        files = self.hub.writable(name, request.token, pull_request=pull_request).at(revision).files
        return as_json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".bin")) else "regular",
                        "shouldIgnore": False,
                        "oid": files[file["path"]].etag if file["path"] in files else None,
                    }
                    for file in request.json["files"]
                ]
            }
        )

    def _batch(self, request: Request, name: str) -> Answer:
        self.hub.writable(name, request.token, pull_request=True)
        if self.xet and "xet" in request.json["transfers"]:  # clients before 1.x ask here
            return as_json({"transfer": "xet", "objects": request.json["objects"]})
        objects = []
        for entry in request.json["objects"]:
            if entry["oid"] not in self.hub.objects:
                upload = {"href": f"{self.cdn}/objects/{entry['oid']}"}
                verify = {"href": f"{self.endpoint}/{name}.git/info/lfs/verify"}
                entry = {**entry, "actions": {"upload": upload, "verify": verify}}  # noqa: PLW2901
            objects.append(entry)
        return as_json({"transfer": "basic", "objects": objects})

    def _verify(self, request: Request, name: str) -> Answer:
        self.hub.writable(name, request.token, pull_request=True)
        entry = request.json
        if len(self.hub.objects.get(entry["oid"], b"")) != entry["size"]:
            raise Refused(404, None, "Object not found")
        return as_json({})

    def _commit(self, request: Request, name: str, revision: str) -> Answer:
        pull_request = "create_pr" in request.query
        repository = self.hub.writable(name, request.token, pull_request=pull_request)
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        base = repository.at(revision)
        if pull_request and header.get("parentCommit"):
            base = repository.at(header["parentCommit"])
        elif header.get("parentCommit", base.oid) != base.oid:
            raise Refused(412, None, "A commit has happened since. Please refresh and try again.")
        files = dict(base.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif line["key"] == "lfsFile":
                if self.xet and value["oid"] not in self.hub.objects:
                    self.hub.objects[value["oid"]] = self.xet.content(value["oid"])
                if value["oid"] not in self.hub.objects:
                    raise Refused(400, None, f"LFS object {value['oid']} is missing")
                files[value["path"]] = File(self.hub.objects[value["oid"]], lfs=True)
        commit = repository.add(files, header["summary"], base.oid)
        branch = revision
        if pull_request:
            branch = f"refs/pr/{sum(ref.startswith('refs/pr/') for ref in repository.refs) + 1}"
        repository.refs[branch] = commit.oid
        return as_json(
            {
                "success": True,
                "commitOid": commit.oid,
                "commitUrl": f"{self.endpoint}/{name}/commit/{commit.oid}",
                "pullRequestUrl": f"{self.endpoint}/{name}/discussions/{branch.rpartition('/')[2]}"
                if pull_request
                else None,
                "hookOutput": "",
            }
        )

    def _xet_token(self, request: Request, name: str, kind: str, revision: str) -> Answer:
        if self.xet is None:
            return Answer(404, b"no xet here")
        (self.hub.find if kind == "read" else self.hub.writable)(name, request.token)
        answer = as_json({"casUrl": self.xet.url, "accessToken": "xet", "exp": 2**33})
        answer.headers |= {
            "X-Xet-Cas-Url": self.xet.url,
            "X-Xet-Access-Token": "xet",
            "X-Xet-Token-Expiration": str(2**33),
        }
        return answer

    def _info(self, request: Request, name: str, revision: str = "main") -> Answer:
        repository = self.hub.find(name, request.token, content=False)
        commit = repository.at(revision)
        return as_json(
            {
                "_id": "0" * 24,
                "id": name,
                "modelId": name,
                "sha": commit.oid,
                "private": repository.private,
                "gated": "auto" if repository.gated else False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "lastModified": now(),
                "createdAt": now(),
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            }
        )

    def _tree(self, request: Request, name: str, revision: str) -> Answer:
        files = self.hub.find(name, request.token).at(revision).files
        return as_json(
            [
                {"type": "file", "path": path, "size": file.size, "oid": file.etag}
                for path, file in sorted(files.items())
            ]
        )

    def _ref(self, request: Request, name: str, kind: str, ref: str) -> Answer:
        repository = self.hub.writable(name, request.token)
        label, start = (ref, request.json.get("startingPoint", "main")) if kind == "branch" else ("", ref)
        label = label or request.json["tag"]
        if label in repository.refs:
            raise Refused(409, None, f"Reference {label} already exists")
        repository.refs[label] = repository.at(start).oid
        return as_json({})

    def _resolve(self, request: Request, name: str, revision: str, path: str) -> Answer:
        commit = self.hub.find(name, request.token).at(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            code = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return Answer(404, b"Entry not found", headers | code)
        file = commit.files[path]
        if not file.lfs:
            if file.said is not None:
                headers |= {"Content-Length": str(file.size)}
            return _part(file.content, request, headers | {"ETag": f'"{file.etag}"'})
        self.hub.objects[file.etag] = file.content
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
        if self.xet and (known := self.xet.hashes.get(file.etag)):
            route = f"{self.endpoint}/api/models/{name}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": known, "X-Xet-Refresh-Route": route}
        return Answer(302, b"", headers | {"Location": f"{self.cdn}/objects/{file.etag}", "ETag": '"pointer"'})


_NAME = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[tuple[str, ...], str, Callable[..., Answer]]] = [
    (("GET",), r"/api/whoami-v2", LocalHub._whoami),
    (("POST",), r"/api/repos/create", LocalHub._create),
    (("POST",), r"/api/validate-yaml", LocalHub._validate),
    (("POST",), rf"/api/models/{_NAME}/preupload/([^/]+)", LocalHub._preupload),
    (("POST",), rf"/api/models/{_NAME}/commit/([^/]+)", LocalHub._commit),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/batch", LocalHub._batch),
    (("POST",), rf"/{_NAME}\.git/info/lfs/verify", LocalHub._verify),
    (("GET",), rf"/api/models/{_NAME}/xet-(read|write)-token/([^/]+)", LocalHub._xet_token),
    (("GET",), rf"/api/models/{_NAME}", LocalHub._info),
    (("GET",), rf"/api/models/{_NAME}/revision/([^/]+)", LocalHub._info),
    (("GET",), rf"/api/models/{_NAME}/tree/([^/]+)", LocalHub._tree),
    (("POST",), rf"/api/models/{_NAME}/(branch|tag)/([^/]+)", LocalHub._ref),
    (("GET", "HEAD"), rf"/{_NAME}/resolve/([^/]+)/(.+)", LocalHub._resolve),
]


def _part(content: bytes, request: Request, headers: dict[str, str]) -> Answer:
    """A body, or the rest of it if the client resumes a download."""
    if (asked := re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))) is None:
        return Answer(200, content, headers)
    start = int(asked[1])
    end = f"bytes {start}-{len(content) - 1}/{len(content)}"
    return Answer(206, content[start:], headers | {"Content-Range": end})


def _handler(local: LocalHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            split = urlsplit(self.path)
            headers = {key.lower(): value for key, value in self.headers.items()}
            body = self._body(headers)
            request = Request(self.command, headers["host"], split.path, parse_qs(split.query), headers, body)
            with local.lock:
                local.requests.append(request)
                kind = local.met(request)
                if kind == "flip" and self.command in ("PUT", "POST"):  # of the upload
                    body = _flipped(body)
                    request = Request(self.command, headers["host"], split.path, parse_qs(split.query), headers, body)
                local.before(request)
                answer = local.answer(request) if kind not in ("drop", "reset", "hang") else Answer()
            self._send(answer, kind)

        do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815 - the names http.server asks for

        def _body(self, headers: dict[str, str]) -> bytes:
            if headers.get("transfer-encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(headers.get("content-length", 0)))

        def _send(self, answer: Answer, kind: int | str | None) -> None:
            if kind in ("drop", "reset"):
                self.close_connection = True
                if kind == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                return
            if kind == "hang":
                local.silence.wait(60)
                self.close_connection = True
                return
            if isinstance(kind, int):
                answer = Answer(kind, b"a fault", {"Content-Type": "text/plain"})
            elif kind == "html":
                answer = Answer(200, b"<html>Please sign in to the network</html>", {"Content-Type": "text/html"})
            body = answer.body
            if kind == "flip" and self.command == "GET":
                body = _flipped(body)
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if kind == "truncate":
                body = body[: len(body) // 2]
                self.close_connection = True
            if self.command != "HEAD":
                self.wfile.write(body)
                with local.lock:
                    local.sent += len(body)

        def log_message(self, *args: Any) -> None:
            """Print nothing."""

    return Handler


def _flipped(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 4]) + body[middle + 1 :] if body else body
