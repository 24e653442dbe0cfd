"""One loop for both phases, on Accelerate; single process or many, CPU or GPU.

Random state: the loop seeds torch for dropout, loss noise and augmentation, and gives the caller's
random state back at the end. Not here: datasets, metrics, and what to do with the prompts afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Subset
from tqdm.auto import tqdm

from lpt_peft._random import seeded
from lpt_peft.adapter import PHASES, LongTailPromptAdapter
from lpt_peft.errors import InputError, StateError
from lpt_peft.losses import LPTLoss
from lpt_peft.output import AdapterOutput
from lpt_peft.prompts import decay_selected
from lpt_peft.recipe.schedule import warmup_cosine
from lpt_peft.recipe.settings import PhaseSettings, TrainSettings
from lpt_peft.samplers import DualSampler

Criterion = Callable[[Any, Tensor, int], Tensor]
History = list[dict[str, Any]]


def train(
    adapter: LongTailPromptAdapter,
    dataset: Dataset[Any],
    labels: Sequence[int],
    settings: TrainSettings | None = None,
    *,
    accelerator: Accelerator | None = None,
    progress: bool | str = True,
) -> History:
    """Train phase "shared", then phase "group"; the adapter is left in the last phase trained, in eval mode.

    Args:
        adapter: A wrapped ViT.
        dataset: Map-style, yields (image, label), `len(labels)` items.
        labels: Class of every item, 0 to `C - 1`; every class at least once.
        settings: How to train; None takes the defaults: the paper's recipe, but keys start at k-means centres and
            groups as copies of the shared prompt.
        accelerator: Yours, for mixed precision or several processes; None makes a plain one.
        progress: Show a bar for each phase; a text is put before the phase's name.

    Returns:
        One record for each epoch: phase, epoch, loss, learning_rate.

    Raises:
        InputError: Labels do not fit the dataset or the head, or a class has no image.
        StateError: The loss became NaN or infinite.
    """
    settings = settings or TrainSettings()
    history: History = []
    for phase in PHASES:
        phase_settings: PhaseSettings = getattr(settings, phase)
        if phase_settings.epochs == 0:
            continue
        if phase == "group":
            _open_pool(adapter, dataset, settings)
        adapter.phase = phase
        history += run_phase(
            adapter, dataset, labels, settings, phase_settings, name=phase, accelerator=accelerator, progress=progress
        )
    return history


def run_phase(
    model: nn.Module,
    dataset: Dataset[Any],
    labels: Sequence[int],
    settings: TrainSettings,
    phase: PhaseSettings,
    *,
    name: str = "training",
    criterion: Criterion | None = None,
    accelerator: Accelerator | None = None,
    progress: bool | str = True,
) -> History:
    """Train what requires a gradient in `model`: one phase of LPT, or a baseline by the same loop.

    Args:
        model: Called as `model(images, return_output=True)`; returns an `AdapterOutput`. Has a `CosineClassifier`
            named `head`.
        dataset: Map-style, yields (image, label).
        labels: Class of every item.
        settings: What both phases share.
        phase: What is this phase's own.
        name: For history and progress bar.
        criterion: Called as `criterion(output, target, epoch)`; None takes what `settings.loss` says.
        accelerator: Yours, or None for a plain one.
        progress: Show a bar; a text is put before the name.

    Returns:
        One record for each epoch.
    """
    accelerator = accelerator or Accelerator()
    criterion = criterion or _criterion(settings, phase, labels, model.get_submodule("head"))
    sampler = _batch_sampler(dataset, labels, settings)
    batches = DataLoader(dataset, batch_sampler=sampler, num_workers=settings.num_workers)
    steps = phase.epochs * len(batches)
    pool = getattr(model, "pool", None) if settings.decay == "selected" else None
    optimizer = torch.optim.SGD(
        _parameter_groups(model, pool, phase.weight_decay),
        lr=phase.learning_rate * settings.batch_size / 256,
        momentum=phase.momentum,
    )
    warmup = round(phase.warmup * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, warmup))
    if isinstance(criterion, nn.Module):
        criterion.to(accelerator.device).train()
    prepared, optimizer = accelerator.prepare(model, optimizer)
    prepared.train()
    history: History = []
    with seeded(settings.seed, accelerator.device), _bar(steps, name, progress, accelerator) as bar:
        for epoch in range(phase.epochs):
            sampler.set_epoch(epoch)
            total = torch.zeros((), device=accelerator.device)
            for images, target in batches:
                output = prepared(images.to(accelerator.device), return_output=True)
                loss = criterion(output, target.to(accelerator.device), epoch)
                if not bool(loss.isfinite()):
                    raise StateError(
                        f"The loss became {loss.item()} in epoch {epoch} of phase {name}; lower learning_rate "
                        f"(now {phase.learning_rate:g}) or look for broken images."
                    )
                accelerator.backward(loss)
                if pool is not None:
                    for parameter in pool.parameters():
                        decay_selected(parameter, phase.weight_decay)
                if settings.clip_norm is not None:
                    accelerator.clip_grad_norm_(prepared.parameters(), settings.clip_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                total += loss.detach()
                bar.update()
            mean = float(total / len(batches))
            history.append(
                {"phase": name, "epoch": epoch, "loss": mean, "learning_rate": optimizer.param_groups[0]["lr"]}
            )
            bar.set_postfix(loss=f"{mean:.3f}")
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False).eval()
    return history


class _InstanceSampler(BatchSampler):
    """Plain shuffled batches with `set_epoch`, as many and as large as a `DualSampler` would give."""

    def __init__(self, size: int, batch_size: int, num_batches: int, seed: int) -> None:
        self.seed = seed
        self.generator = torch.Generator()
        sampler = RandomSampler(range(size), num_samples=num_batches * batch_size, generator=self.generator)
        super().__init__(sampler, batch_size, drop_last=False)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed * 1_000_003 + epoch)


def _batch_sampler(
    dataset: Dataset[Any], labels: Sequence[int], settings: TrainSettings
) -> DualSampler | _InstanceSampler:
    size = len(dataset)  # type: ignore[arg-type]
    if size != len(labels):
        raise InputError(f"{len(labels)} labels do not fit a dataset of {size} items; give one label for each item.")
    dual = DualSampler(labels, settings.batch_size, samples_per_class=settings.samples_per_class, seed=settings.seed)
    if settings.sampling == "instance":
        return _InstanceSampler(size, 2 * settings.batch_size, len(dual), settings.seed)
    return dual


def _criterion(settings: TrainSettings, phase: PhaseSettings, labels: Sequence[int], head: Any) -> Criterion:
    if settings.loss == "lpt":
        counts = torch.bincount(torch.as_tensor(labels), minlength=len(head.weight))
        return LPTLoss(counts, phase.epochs, eta=settings.eta, scale=head.scale)

    def cross_entropy(output: AdapterOutput, target: Tensor, epoch: int) -> Tensor:
        return F.cross_entropy(output.logits, target)

    return cross_entropy


def _parameter_groups(model: nn.Module, pool: nn.Module | None, weight_decay: float) -> list[dict[str, Any]]:
    """All that is learnt; the pool without decay of the optimizer's own where only chosen groups shall decay."""
    apart = {id(parameter) for parameter in pool.parameters()} if pool is not None else set()
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in learnt if id(p) not in apart], "weight_decay": weight_decay},
        {"params": [p for p in learnt if id(p) in apart], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _open_pool(adapter: LongTailPromptAdapter, dataset: Dataset[Any], settings: TrainSettings) -> None:
    """Where keys and group prompts start from, as the settings say."""
    if settings.init_groups == "shared":
        adapter.pool.init_prompts(adapter.shared.prompts[adapter.config.first_group_layer :])
    if settings.init_keys == "kmeans":
        adapter.phase = "shared"
        with seeded(settings.seed, adapter.head.weight.device):
            adapter.pool.init_keys(_queries(adapter, dataset, settings), seed=settings.seed)


@torch.no_grad()
def _queries(adapter: LongTailPromptAdapter, dataset: Dataset[Any], settings: TrainSettings) -> Tensor:
    """Queries (N, d) of all images, at most 50,000 of them, evenly spread: enough for k-means."""
    size = len(dataset)  # type: ignore[arg-type]
    some = Subset(dataset, range(0, size, -(-size // 50_000)))
    device, mode = adapter.head.weight.device, adapter.training
    adapter.eval()
    loader: Iterable[Any] = DataLoader(some, 2 * settings.batch_size, num_workers=settings.num_workers)
    queries = torch.cat([adapter.features(images.to(device)) for images, _ in loader])
    adapter.train(mode)
    return queries


def _bar(steps: int, name: str, progress: bool | str, accelerator: Accelerator) -> Any:
    label = f"{progress}: {name}" if isinstance(progress, str) else name
    return tqdm(total=steps, desc=label, unit="step", disable=not (progress and accelerator.is_main_process))
