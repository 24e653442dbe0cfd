"""A user's script that uses every public name; tests/test_typing.py has mypy check it, and nothing runs it.

Each `assert_type` fails where mypy sees another type, `Any` included.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import lpt_peft
from lpt_peft import (
    SHOT_RULES,
    AdapterOutput,
    AGCLLoss,
    ClassBalancedSampler,
    CosineClassifier,
    DualSampler,
    LongTailPromptAdapter,
    LPTError,
    LPTLoss,
    PoolMatch,
    PromptConfig,
    PromptPool,
    SharedPrompt,
    ShotMetrics,
    ShotResult,
    ShotRule,
    agcl_loss,
    cosine_logits,
    decay_selected,
    shot_metrics,
)
from lpt_peft.adapter import Phase

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

assert_type(lpt_peft.__version__, str)


def use_adapter(vit: nn.Module, images: Tensor, labels: Tensor) -> None:
    adapter = LongTailPromptAdapter.wrap(vit, 5)
    assert_type(adapter, LongTailPromptAdapter)
    assert_type(adapter(images), Tensor)
    assert_type(adapter(images, return_output=True), AdapterOutput)
    assert_type(adapter.forward(images), Tensor)
    assert_type(adapter.features(images), Tensor)
    assert_type(adapter.phase, Phase)
    adapter.phase = "group"
    assert_type(adapter.vit, nn.Module)
    assert_type(adapter.shared, SharedPrompt)
    assert_type(adapter.pool, PromptPool)
    assert_type(adapter.head, CosineClassifier)
    assert_type(adapter.prompt_config, PromptConfig)
    assert_type(adapter.metadata.label_names, tuple[str, ...] | None)
    assert_type(adapter.fingerprint, str)
    assert_type(adapter.num_classes, int)
    assert_type(adapter.num_features, int)
    assert_type(adapter.device, torch.device)
    assert_type(adapter.dtype, torch.dtype)
    assert_type(adapter.get_classifier(), CosineClassifier)
    assert_type(adapter.pretrained_cfg, dict[str, object])
    assert_type(adapter.default_cfg, dict[str, object])
    assert_type(adapter.no_weight_decay(), set[str])
    assert_type(adapter.get_nb_trainable_parameters(), tuple[int, int])
    assert_type(adapter.trainable_parameters(), Iterator[nn.Parameter])
    assert_type(adapter.adapter_state_dict(), dict[str, Tensor])
    assert_type(adapter.backbone_in_state_dict, bool)
    adapter.load_adapter_state_dict(adapter.adapter_state_dict())
    adapter.cast_backbone(torch.bfloat16)
    adapter.set_grad_checkpointing(True)
    adapter.print_trainable_parameters()
    with adapter.disable_adapter() as nothing:
        assert_type(nothing, None)
    assert_type(adapter.train(), LongTailPromptAdapter)
    assert_type(adapter.unwrap(), nn.Module)


def use_output(output: AdapterOutput) -> None:
    assert_type(output.logits, Tensor)
    assert_type(output.features, Tensor)
    assert_type(output.query, Tensor)
    assert_type(output.similarity, Tensor)
    assert_type(output.groups, Tensor)


def use_files(adapter: LongTailPromptAdapter, vit: nn.Module) -> CommitInfo:
    adapter.save_pretrained("folder", class_counts=[3, 2], label_names=["a", "b"], is_main_process=True)
    assert_type(LongTailPromptAdapter.from_pretrained("folder", vit), LongTailPromptAdapter)
    adapter.load_prompts("folder", part="shared", check_backbone="warn")
    return adapter.push_to_hub("owner/name")


def use_losses(output: AdapterOutput, target: Tensor, class_counts: Tensor) -> None:
    criterion = LPTLoss(class_counts, epochs=40)
    assert_type(criterion(output, target), Tensor)
    assert_type(criterion.terms(output, target), dict[str, Tensor])
    assert_type(criterion.epoch, float)
    criterion.set_epoch(3)
    assert_type(AGCLLoss([5, 3])(output.logits, target), Tensor)
    assert_type(agcl_loss(output.logits, target, class_counts), Tensor)


def use_samplers(labels: list[int]) -> None:
    dual = DualSampler(labels, batch_size=16)
    for batch in dual:
        assert_type(batch, list[int])
    assert_type(len(dual), int)
    assert_type(dual.epoch, int)
    assert_type(dual.state_dict(), dict[str, int])
    dual.load_state_dict(dual.state_dict())
    for index in ClassBalancedSampler(torch.tensor(labels), samples_per_class=4):
        assert_type(index, int)


def use_prompts(query: Tensor, config: PromptConfig) -> None:
    pool = PromptPool.from_config(config)
    match = pool(query)
    assert_type(match, PoolMatch)
    assert_type(match.prompts, Tensor)
    assert_type(match.similarity, Tensor)
    assert_type(pool.usage, Tensor)
    assert_type(SharedPrompt(2, 3, 24)(), Tensor)
    assert_type(CosineClassifier(24, 5)(query), Tensor)
    assert_type(cosine_logits(query, query, 20.0), Tensor)
    assert_type(config.num_classes, int)
    decay_selected(pool.keys, 0.1)


def use_metrics(logits: Tensor, target: Tensor, counts: list[int]) -> None:
    metrics = ShotMetrics(counts, many=100, few=20)
    metrics.update(logits, target)
    result = metrics.compute()
    assert_type(result, ShotResult)
    assert_type(result.overall, float | None)
    assert_type(result.few, float | None)
    assert_type(ShotMetrics.from_rule("lpt", counts), ShotMetrics)
    assert_type(shot_metrics(logits, target, counts), ShotResult)
    assert_type(SHOT_RULES["lpt"], ShotRule)


def use_errors(adapter: LongTailPromptAdapter) -> None:
    try:
        adapter.phase = "shared"
    except LPTError as error:
        assert_type(error, LPTError)


def use_wrong(adapter: LongTailPromptAdapter, images: Tensor, mode: Literal["error"]) -> Any:
    """mypy refuses each of these; an `ignore` that is not needed is an error, too."""
    adapter.phase = "joint"  # type: ignore[assignment]
    _ = adapter(images).groups  # type: ignore[attr-defined]
    _ = adapter(images, return_output=True).nonsense  # type: ignore[attr-defined]
    adapter.load_prompts("folder", part="head")  # type: ignore[arg-type]
    DualSampler([0, 1], batch_size="16")  # type: ignore[arg-type]
    return mode
