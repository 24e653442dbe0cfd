"""PromptBank: many prompt files on one backbone, mixed in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from torch import nn

from lpt_peft._numbers import checked_integer
from lpt_peft.backbones.base import execution_device
from lpt_peft.backbones.detect import find_backbone
from lpt_peft.backbones.weights import FrozenWeights
from lpt_peft.bank.export import BankModule
from lpt_peft.bank.output import BankOutput, TaskInfo
from lpt_peft.bank.reader import Source, TaskReader, check_keywords
from lpt_peft.bank.registry import Registry
from lpt_peft.bank.runner import Runner, tasks_of
from lpt_peft.bank.streams import StreamOrder
from lpt_peft.bank.tables import Sizes, SlotTables
from lpt_peft.checkpoint import CheckBackbone
from lpt_peft.errors import BackboneError, InputError, StateError


class PromptBank:
    """Many prompt files on one frozen ViT, of which every image of a batch uses its own.

    The prompts of the tasks are rows of tables of fixed capacity, and images take theirs by the number of the row. A
    mixed batch is therefore a single forward, and `compile` compiles it once for all tasks: adding and removing tasks
    compiles nothing, as long as they fit the reserved sizes. Tasks may differ in classes, prompt tokens, groups,
    phase, query and shared layers. Calls, `add`, `replace` and `remove` may come from several threads.

    Every answer comes from the version that its name had when the batch started: `replace` and `remove` do not disturb
    batches that are running. When all slots are taken, the least recently used task that is not pinned moves to CPU
    memory, and back when it is used.

    Args:
        vit: A plain ViT as for `LongTailPromptAdapter.wrap`; its blocks are changed in place, and it is set to eval
            mode. Move it to its device before.
        capacity: Slots for tasks.
        max_classes: Most classes of a task. It reserves nothing, because classifiers have the size of their task.
        max_prompt_length: Most prompt tokens `n` of a task, reserved from the start. For this and the following sizes,
            None grows with the tasks, which compiles a compiled bank again.
        max_pool_size: Most groups `m`.
        max_top_k: Most selected groups `k`.
        max_group_layers: Most blocks with group prompts, `L - K`.
        check_backbone: For prompts of another backbone or of other weights: "error" refuses, "warn" warns, "off" does
            not check.

    Raises:
        BackboneError: The model cannot take prompts, is already wrapped, or is on the meta device.
        ConfigError: A number is out of range.

    Example:
        >>> import tempfile, timm
        >>> from lpt_peft import LongTailPromptAdapter
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
        >>> folders = []
        >>> for classes in (3, 5):
        ...     adapter = LongTailPromptAdapter.wrap(vit, classes)
        ...     folders.append(tempfile.mkdtemp())
        ...     adapter.save_pretrained(folders[-1])
        ...     vit = adapter.unwrap()
        >>> bank = PromptBank(vit, capacity=8)
        >>> bank.add("cars", folders[0])
        >>> bank.add("birds", folders[1], pinned=True)
        >>> output = bank(torch.randn(2, 3, 32, 32), tasks=["birds", "cars"])
        >>> [(result.task, len(result.probabilities)) for result in output]
        [('birds', 5), ('cars', 3)]
    """

    def __init__(
        self,
        vit: nn.Module,
        *,
        capacity: int = 32,
        max_classes: int | None = None,
        max_prompt_length: int | None = None,
        max_pool_size: int | None = None,
        max_top_k: int | None = None,
        max_group_layers: int | None = None,
        check_backbone: CheckBackbone = "error",
    ) -> None:
        checked_integer("capacity", capacity, 1)
        backbone = find_backbone(vit)
        depth = len(backbone.blocks)
        sizes = {
            "prompt_length": max_prompt_length,
            "pool_size": max_pool_size,
            "top_k": max_top_k,
            "group_layers": max_group_layers,
        }
        limits = {**sizes, "num_classes": max_classes}
        check_keywords(limits, depth)
        device = execution_device(vit)
        if device.type == "meta":
            raise BackboneError(f"This {type(vit).__name__} is on the meta device: load its weights first.")
        # The width of keys is reserved with the groups: that of the feature, or of the tokens with query="block_k".
        key_dim = max(backbone.dim, backbone.feature_dim) if max_pool_size is not None else 0
        reserved = Sizes(depth, **{name: limit or 0 for name, limit in sizes.items()}, key_dim=key_dim)
        self.vit = vit
        self.backbone = backbone
        self._order = StreamOrder(device)
        tables = SlotTables(capacity=capacity, dim=backbone.dim, order=self._order, reserved=reserved)
        self._registry = Registry(tables, capacity, self._order)
        self._weights = FrozenWeights(backbone)
        self._reader = TaskReader(backbone, self._weights, limits, check_backbone)
        self._runner = Runner(backbone, device)
        backbone.attach()
        vit.eval()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order in which they were added."""
        return self._registry.tasks

    def add(
        self,
        name: str,
        source: Source,
        pinned: bool = False,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Add the prompts of a folder or repository as a task.

        Args:
            name: Name of the task.
            source: A folder if it exists, else "owner/name" on the Hub.
            pinned: Keep the task in its slot; other tasks are evicted when the slots are taken.
            revision: Branch, tag or commit; for repositories only.
            subfolder: Folder inside the folder or repository.
            token: True or None for the token of the login, False for none, or the token itself.
            cache_dir: Cache of the Hub client; None is its default.
            local_files_only: Load from the cache without a request to the Hub.

        Raises:
            InputError: The bank already has a task of this name, or it is not a text.
            PromptFileError: The file is refused, or is for another backbone.
            HubError: The Hub did not deliver the prompts.
            ConfigError: The prompts are shallow or larger than a limit of the bank, or an argument is out of range.
            StateError: All slots hold pinned tasks, or the bank was unwrapped.
        """
        self._check_open()
        if not isinstance(name, str) or not name:
            raise InputError(f"name={name!r:.80} must be a text that is not empty.")
        location = {"revision": revision, "subfolder": subfolder, "token": token, "cache_dir": cache_dir}
        digest, content = self._reader.read(source, **location, local_files_only=local_files_only)
        self._registry.add(name, digest, content, pinned=pinned)

    def replace(
        self,
        name: str,
        source: Source,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Give a task other prompts, for batches that start afterwards; a pinned task stays pinned.

        The new prompts are read and checked before anything changes. Arguments and errors are those of `add`.

        Raises:
            InputError: The bank has no task of this name.
        """
        self._check_open()
        self._registry.describe(name)  # an unknown name raises before the file is read
        location = {"revision": revision, "subfolder": subfolder, "token": token, "cache_dir": cache_dir}
        digest, content = self._reader.read(source, **location, local_files_only=local_files_only)
        self._registry.replace(name, digest, content)

    def remove(self, name: str) -> None:
        """Forget a task; batches that are running still get its answers.

        Raises:
            InputError: The bank has no task of this name.
        """
        self._registry.remove(name)

    def describe(self, name: str) -> TaskInfo:
        """Return the current version of a task: digest, classes, temperature, preprocessing, phase and slot.

        Raises:
            InputError: The bank has no task of this name.
        """
        return self._registry.describe(name)

    @torch.no_grad()
    def __call__(self, images: Any, tasks: Sequence[str | None] | str | None) -> BankOutput:
        """Answer a batch, each image by its own task.

        Args:
            images: (B, 3, H, W) floating point, or the first argument of the ViT's forward.
            tasks: Task of each image, or a task for all images. None is the plain model, whose result has features
                and no classes.

        Returns:
            B results, a sequence of `TaskPrediction`.

        Raises:
            InputError: A task is unknown, the number of tasks is not that of the images, or the batch has more tasks
                than slots; nothing was computed. Or the images do not fit the ViT.
            BackboneError: The tasks differ in prompt tokens or shared layers, and the ViT cannot exclude padding.
            StateError: The ViT was moved to another device, or the bank was unwrapped.
        """
        self._check_open()
        names = tasks_of(images, tasks)
        with self._registry.lease(names) as leased:
            (images,) = self._weights.cast_inputs((images,))
            return self._runner(leased, images)

    def compile(self, **options: Any) -> None:
        """Compile the forward up to the features with `torch.compile(fullgraph=True)` at its first call.

        A graph is compiled for each kind of batch when it first occurs: see `lpt_peft.bank.forward.Mode`. Batches of
        another size, and tasks larger than all before, compile again; reserved sizes prevent the latter. Classifiers
        may have any number of classes; they are not part of the graph.

        Args:
            **options: Of `torch.compile`, such as `mode` or `dynamic`.
        """
        self._runner.compile(**options)

    def export_module(self, tasks: Sequence[str]) -> BankModule:
        """Return a module that answers some tasks, for `torch.export` and other tools that need a module.

        Its forward takes images and the index (B,) int64 of the task of each image among `tasks`: export it with
        `torch.export.export(module, (images, task))`. The prompts are copied to buffers; the ViT is that of the bank.

        Raises:
            InputError: There is no task, a task is unknown, or there are more tasks than slots.
        """
        self._check_open()
        if isinstance(tasks, str) or not tasks:
            raise InputError(f"tasks={tasks!r:.80} must be a list of at least 1 name of a task.")
        with self._registry.lease(list(tasks)) as leased:
            return BankModule(self.backbone, leased)

    def cast_backbone(self, dtype: torch.dtype) -> None:
        """Cast the ViT's weights to float32, bfloat16 or float16, and images from now on; see the adapter's method."""
        self._check_open()
        self._weights.cast(dtype, trainable=True)

    def unwrap(self) -> nn.Module:
        """Remove the prompts from the ViT and return it, in eval mode; the bank cannot be used afterwards.

        Call it when no batch is running.
        """
        self._check_open()
        self.backbone.detach()
        vit = self.vit
        del self.vit
        return vit

    def memory(self) -> dict[str, int]:
        """Return bytes.

        Returns:
            "slots", the tables on the device; "heads", the classifiers of the tasks in slots, on the device; and
            "files", all prompt files in CPU memory.
        """
        return self._registry.nbytes()

    def __repr__(self) -> str:
        """Sizes and model, for `print(bank)`."""
        return f"PromptBank({type(self.backbone.model).__name__}, {len(self.tasks)} tasks)"

    def _check_open(self) -> None:
        if "vit" not in vars(self):
            raise StateError("This bank was unwrapped; create another with PromptBank(vit).")
        device = execution_device(self.vit)
        if device != self._order.device:
            raise StateError(
                f"The ViT was moved to {device}, and the tasks of the bank are on {self._order.device}. Move the ViT "
                "back, or unwrap() it and create the bank again."
            )
