"""Storage of the local Hub: repositories with commits, branches and tags, large objects by sha256, accounts.

Not here: HTTP (`server.py`). Independent of lpt_peft.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import datetime, timezone

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs diff=lfs merge=lfs -text\n"


class Refused(Exception):  # noqa: N818 - an answer, not a failure
    """A refusal of the Hub: an HTTP status, a code and a message."""

    def __init__(self, status: int, code: str | None = None, message: str = "", **body: object) -> None:
        super().__init__(message or code)
        self.status, self.code, self.message, self.body = status, code, message, body


@dataclass(frozen=True)
class File:
    """A file of a commit; of a large one (`lfs`), `content` is in the object store as well.

    `size` is the size that the Hub states, which tests of absurd sizes change.
    """

    content: bytes
    lfs: bool
    said: int | None = None

    @property
    def size(self) -> int:
        """Bytes, as stated before a download."""
        return len(self.content) if self.said is None else self.said

    @property
    def etag(self) -> str:
        """The sha256 of a large file, git's blob sha1 of the others."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A state of all files."""

    oid: str
    files: dict[str, File]
    message: str
    parent: str | None


@dataclass
class Repository:
    """One model repository; `refs` holds branches, tags and pull requests by name."""

    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.refs["main"] = self.add({".gitattributes": File(GITATTRIBUTES, lfs=False)}, "initial commit", None).oid

    def add(self, files: dict[str, File], message: str, parent: str | None) -> Commit:
        """Store a commit, on no branch yet."""
        listing = "".join(f"{path} {file.etag}\n" for path, file in sorted(files.items()))
        oid = hashlib.sha1(f"{parent} {message} {len(self.commits)}\n{listing}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, files, message, parent)
        return self.commits[oid]

    def at(self, revision: str) -> Commit:
        """The commit of a branch, tag, pull request or oid."""
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]

    def put(self, files: dict[str, bytes], message: str = "put", branch: str = "main") -> str:
        """Commit without a request, as another user would."""
        head = self.at(branch)
        new = {path: File(content, lfs=path.endswith((".safetensors", ".bin"))) for path, content in files.items()}
        self.refs[branch] = self.add({**head.files, **new}, message, head.oid).oid
        return self.refs[branch]

    @property
    def history(self) -> list[Commit]:
        """The commits of main, newest first."""
        line, oid = [], self.refs["main"]
        while oid is not None:
            line.append(self.commits[oid])
            oid = self.commits[oid].parent
        return line


@dataclass
class Accounts:
    """Owners and permissions of tokens."""

    tokens: dict[str, tuple[str, bool]] = field(
        default_factory=lambda: {
            "hf_write": ("me", True),
            "hf_read": ("me", False),
            "hf_stranger": ("stranger", True),
        }
    )

    def who(self, token: str | None) -> tuple[str | None, bool]:
        """Name and permission to write; no name without a token."""
        if token is None:
            return None, False
        if token not in self.tokens:
            raise Refused(401, None, "Invalid credentials in Authorization header")
        return self.tokens[token]


@dataclass
class Hub:
    """Repositories, objects and accounts."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    accounts: Accounts = field(default_factory=Accounts)

    def find(self, name: str, token: str | None, *, content: bool = True) -> Repository:
        """A repository that the token may read; a private repository looks missing to others."""
        user, _ = self.accounts.who(token)
        repository = self.repositories.get(name)
        if repository is None or (repository.private and user != name.partition("/")[0]):
            raise Refused(401 if token is None else 404, "RepoNotFound", "Repository not found")
        if content and repository.gated and user != name.partition("/")[0]:
            raise Refused(401 if token is None else 403, "GatedRepo", f"Access to model {name} is restricted.")
        return repository

    def writable(self, name: str, token: str | None, *, pull_request: bool = False) -> Repository:
        """A repository that the token may commit to; every reader may open a pull request."""
        repository = self.find(name, token)
        user, may_write = self.accounts.who(token)
        if not may_write or (user != name.partition("/")[0] and not pull_request):
            raise Refused(403, None, f"You don't have the rights to write to {name}")
        return repository

    def create(self, name: str, token: str | None, *, private: bool) -> Repository:
        """Create a repository; 409 with its address if it exists."""
        user, may_write = self.accounts.who(token)
        if user is None:
            raise Refused(401, None, "Invalid username or password.")
        full = name if "/" in name else f"{user}/{name}"
        if not may_write or full.partition("/")[0] != user:
            raise Refused(403, None, "You don't have the rights to create a model under this namespace")
        if full in self.repositories:
            raise Refused(409, None, "You already created this model repo", name=full)
        self.repositories[full] = Repository(full, private=private)
        return self.repositories[full]


def now() -> str:
    """The time as the Hub writes it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
