"""Names, versions and slots of a bank: which task is where, and which batches use it.

A version is the content of a prompt file and never changes; names point to versions. A batch leases the versions of its
tasks: a leased version keeps its slot, also after its name was removed or replaced. All methods are safe for threads.
Not here: the tensors of the slots (`tables.py`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from lpt_peft.bank.heads import Head, head_of
from lpt_peft.bank.output import PLAIN, TaskFacts, TaskInfo, facts_of, info_of
from lpt_peft.bank.streams import StreamOrder
from lpt_peft.bank.tables import Sizes, SlotTables, Tables, TaskNumbers, numbers_of
from lpt_peft.checkpoint import PromptContent
from lpt_peft.errors import InputError, StateError


@dataclass(eq=False)
class Version:
    """A prompt file in the bank.

    Attributes:
        digest: Of its content.
        content: Its tensors, on the CPU, from which a slot is filled.
        numbers: Its sizes.
        names: Tasks that point to it.
        slot: Its row of the tables; None while it is only in CPU memory.
        head: Its classifier on the device, while it has a slot.
        leases: Batches that use it.
        used: Time of its last use, as a count of uses.
    """

    digest: str
    content: PromptContent
    numbers: TaskNumbers
    names: set[str] = field(default_factory=set)
    slot: int | None = None
    head: Head | None = None
    leases: int = 0
    used: int = 0


class Leased(NamedTuple):
    """What a batch needs of the bank; its slots do not change during the lease."""

    tables: Tables
    sizes: Sizes
    """Sizes of the tables."""
    slots: list[int]
    """Slot of each image; 0 for the plain model."""
    heads: dict[int, Head]
    """Classifiers by slot."""
    numbers: list[TaskNumbers]
    """Sizes of the task of each image."""
    facts: tuple[TaskFacts, ...]


class Registry:
    """Tasks of a bank.

    Args:
        tables: Tables with the slots.
        capacity: Number of slots.
        order: Order of reading and writing the slots on an accelerator.
    """

    def __init__(self, tables: SlotTables, capacity: int, order: StreamOrder) -> None:
        self._tables, self._capacity, self._order, self._changed = tables, capacity, order, threading.Condition()
        self._tasks: dict[str, Version] = {}
        self._versions: dict[str, Version] = {}
        self._pinned: frozenset[str] = frozenset()
        self._free = list(range(capacity, 0, -1))
        self._uses = 0
        self._waiting: deque[object] = deque()
        self._plain = TaskNumbers(0, tables.sizes.depth, 0, 0, 0)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names, in the order in which they were added."""
        with self._changed:
            return tuple(self._tasks)

    def nbytes(self) -> dict[str, int]:
        """Bytes of the slots on the device, of the classifiers of their tasks, and of all files in CPU memory."""
        with self._changed:
            versions = list(self._versions.values())
            return {
                "slots": self._tables.nbytes(),
                "heads": sum(version.head.nbytes for version in versions if version.head is not None),
                "files": sum(tensor.nbytes for version in versions for tensor in version.content.tensors.values()),
            }

    def describe(self, name: str) -> TaskInfo:
        """Return what a task is now."""
        with self._changed:
            version = self._find(name)
            in_slot = version.slot is not None
            return info_of(name, version.digest, version.content, pinned=name in self._pinned, in_slot=in_slot)

    def add(self, name: str, digest: str, content: PromptContent, *, pinned: bool) -> None:
        """Add a task; it gets a slot now if there is an empty slot or a task that can be evicted."""
        with self._changed:
            if name in self._tasks:
                raise InputError(
                    f"The bank already has a task {name!r}. Call replace({name!r}, source) to give it other prompts, "
                    "or choose another name."
                )
            self._point(name, digest, content)
            if pinned:
                self._pinned |= {name}

    def replace(self, name: str, digest: str, content: PromptContent) -> None:
        """Let a name point to another version; batches that run keep the version that they leased."""
        with self._changed:
            self._find(name)
            self._point(name, digest, content)

    def remove(self, name: str) -> None:
        """Forget a task; its slot is free when the last batch that uses it is done."""
        with self._changed:
            version = self._find(name)
            self._pinned -= {name}
            self._name(name, None, version)
            self._release(version)
            self._changed.notify_all()

    @contextmanager
    def lease(self, names: Sequence[str | None]) -> Iterator[Leased]:
        """Keep the current versions of tasks in their slots, for a batch.

        Waits while other batches occupy the slots that this batch needs, in the order of the calls; it then leases all
        or nothing.

        Args:
            names: Task of each image; None is the plain model.

        Raises:
            InputError: A task is unknown, or the batch has more tasks than the bank has slots for them.
        """
        distinct = list(dict.fromkeys(name for name in names if name is not None))
        with self._changed:
            batch = self._wait_for(distinct)
            for version in batch:
                version.leases += 1
                self._touch(version)
            leased = self._leased(names)
        slots = list(leased.heads)
        try:
            self._order.before_reading(slots, [tensor for head in leased.heads.values() for tensor in head[:2]])
            yield leased
        finally:
            with self._changed:
                self._order.after_reading(slots)
                for version in batch:
                    version.leases -= 1
                    self._release(version)
                self._changed.notify_all()

    def _wait_for(self, names: list[str]) -> list[Version]:
        """Return the versions of tasks, all of which are in slots; batches that came earlier are first."""
        ticket = object()
        self._waiting.append(ticket)
        try:
            while True:
                batch = list(dict.fromkeys(self._find(name) for name in names))
                if self._waiting[0] is ticket and self._load(batch):
                    return batch
                self._changed.wait()
        finally:
            self._waiting.remove(ticket)
            self._changed.notify_all()

    def _leased(self, names: Sequence[str | None]) -> Leased:
        versions = {name: self._tasks[name] for name in names if name is not None}
        facts = {name: facts_of(name, version.digest, version.content) for name, version in versions.items()}
        return Leased(
            tables=self._tables.tables,
            sizes=self._tables.sizes,
            slots=[0 if name is None else versions[name].slot or 0 for name in names],
            heads={version.slot: version.head for version in versions.values() if version.slot and version.head},
            numbers=[self._plain if name is None else versions[name].numbers for name in names],
            facts=tuple(PLAIN if name is None else facts[name] for name in names),
        )

    def _find(self, name: str) -> Version:
        try:
            return self._tasks[name]
        except KeyError:
            known = ", ".join(sorted(map(repr, self._tasks))[:8]) or "none"
            raise InputError(
                f"The bank has no task {name!r:.80} (it has {len(self._tasks)}: {known:.300}). Add it with "
                "add(name, source)."
            ) from None

    def _point(self, name: str, digest: str, content: PromptContent) -> None:
        """Let a name point to a version, which gets a slot if possible; after an error nothing has changed."""
        old = self._tasks.get(name)
        pinned = {self._tasks[other].digest for other in self._pinned if other != name}
        if len(pinned | {digest}) > self._capacity:
            raise StateError(
                f"All {self._capacity} slots of the bank hold other, pinned tasks, so {name!r} could never be used. "
                "Remove a pinned task, or make the bank with a larger capacity."
            )
        version = self._versions.get(digest)
        if version is old is not None:
            return
        if version is None:
            self._tables.fit(content)
            version = Version(digest, content, numbers_of(content))
        self._name(name, version, old)
        try:
            self._load([version])
        except BaseException:  # memory ran out
            self._name(name, old, version)
            self._release(version)
            raise
        self._touch(version)
        if old is not None:
            self._release(old)
        self._changed.notify_all()

    def _name(self, name: str, version: Version | None, old: Version | None) -> None:
        if old is not None:
            old.names.discard(name)
        self._tasks.pop(name, None) if version is None else self._tasks.update({name: version})
        if version is not None:
            version.names.add(name)
            self._versions[version.digest] = version

    def _release(self, version: Version) -> None:
        """Forget a version that no name and no batch needs, and free its slot."""
        if version.names or version.leases:
            return
        if self._versions.get(version.digest) is version:
            del self._versions[version.digest]
        self._evict(version)

    def _evict(self, version: Version) -> None:
        if version.slot is not None:
            self._free.append(version.slot)
        version.slot = version.head = None

    def _load(self, batch: list[Version]) -> bool:
        """Give slots to versions that have none; False, without a change, while other batches hold too many slots.

        Raises:
            InputError: The batch needs more slots than there are, also when no other batch runs.
        """
        missing = [version for version in batch if version.slot is None]
        if not missing:
            return True
        pinned = sum(self._is_pinned(version) and version not in batch for version in self._versions.values())
        if len(batch) > self._capacity - pinned:
            raise InputError(
                f"The batch has {len(batch)} tasks, and the bank has {self._capacity} slots, of which {pinned} hold "
                "other, pinned tasks. Split the batch, or make the bank with a larger capacity."
            )
        idle = [
            version
            for version in self._versions.values()
            if version.slot is not None and not version.leases and not self._is_pinned(version) and version not in batch
        ]
        if len(missing) > len(self._free) + len(idle):
            return False
        # Last comes a version that was just replaced, before it the least recently used.
        idle.sort(key=lambda version: (bool(version.names), version.used), reverse=True)
        for version in missing:
            if not self._free:
                self._evict(idle.pop())
            slot = self._free[-1]  # stays free if memory runs out
            self._order.before_writing(slot)
            self._tables.write(slot, version.content)
            version.head = head_of(version.content, self._order.device)
            self._order.after_writing(slot)
            version.slot = self._free.pop()
        return True

    def _is_pinned(self, version: Version) -> bool:
        return not self._pinned.isdisjoint(version.names)

    def _touch(self, version: Version) -> None:
        self._uses += 1
        version.used = self._uses
