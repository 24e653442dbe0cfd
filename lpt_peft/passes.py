"""The way from images to features: embed, blocks with prompts, select groups, pool.

With the final query, the blocks after `K` run twice; with the block-K query, all blocks run once. Not here: the
classifier and the kinds of call (`lpt_peft.call`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt_peft.backbones.base import Stream
from lpt_peft.call import CallMixin
from lpt_peft.errors import StateError
from lpt_peft.phase import in_process_group
from lpt_peft.prompts import PoolMatch


class PassesMixin(CallMixin):
    """The part of an adapter that computes features and queries."""

    def _init_passes(self) -> None:
        self._pooling = getattr(self.backbone, "pooling", None)

    def features(self, images: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the input of the classifier, (B, d), in the current phase, before dropout.

        Arguments are those of the wrapped model's forward.

        Raises:
            InputError: The images do not fit the wrapped model.
            StateError: As `forward`; also inside `disable_adapter()`.
        """
        self._refuse_disabled("features")
        return self._features(images, *args, **kwargs)[0]

    @torch.no_grad()
    def queries(self, images: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the queries that are compared with the keys of the groups, (B, key_dim), in any phase.

        With `query="final"` this is the feature under the shared prompts; with `query="block_k"` the first `K` blocks
        run alone. Without gradient. Arguments are those of the wrapped model's forward.

        Raises:
            InputError: The images do not fit the wrapped model.
            StateError: As `forward`; also inside `disable_adapter()`.
        """
        self._refuse_disabled("queries")
        args, kwargs = self._inputs(images, args, kwargs)
        queries: Tensor = self._run(self._query_pass, args, kwargs)
        return queries

    def _features(self, images: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        args, kwargs = self._inputs(images, args, kwargs)
        features: tuple[Tensor, Tensor, Tensor, Tensor] = self._run(self._passes, args, kwargs)
        return features

    def _inputs(
        self, images: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the wrapped model's forward in the dtype of its weights, after checks of its state."""
        if not self.training or not in_process_group():
            self._follow_phase_index()
        self._check_unchanged()
        args, kwargs = self.frozen_weights.cast_inputs((args if images is None else (images, *args), kwargs))
        return args, kwargs

    def _passes(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shared = self.shared()
        kept = self._first_blocks(shared, args, kwargs)
        if self._phase == "shared":
            features = self._shared_features(kept, shared)
            empty = features.new_empty(features.shape[0], 0)
            query = features if self.prompt_config.query == "final" else self._query(kept, shared)
            return features, query, empty, empty.long()
        query = self._query(kept, shared)
        match = self.pool(query)
        features = self._group_features(kept, shared, match)
        if self.training:
            # Adds 0: the keys then get a gradient (0) from any loss, which DDP waits for.
            features = features + 0 * match.similarity.sum(-1, keepdim=True).to(features.dtype)
        return features, query, match.similarity, match.groups

    def _query_pass(self, *args: Any, **kwargs: Any) -> Tensor:
        shared = self.shared()
        return self._query(self._first_blocks(shared, args, kwargs), shared)

    def _first_blocks(self, shared: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Stream:
        """Tokens that enter block `K + 1`."""
        stream = self.backbone.embed(*args, **kwargs)
        return self.backbone.run(stream, 0, shared[: self.prompt_config.first_group_layer].unbind())

    def _shared_features(self, kept: Stream, shared: Tensor) -> Tensor:
        """Feature (B, feature_dim) under the shared prompts alone."""
        split = self.prompt_config.first_group_layer
        return self.backbone.pool(self.backbone.run(kept, split, shared[split:].unbind()))

    @torch.no_grad()
    def _query(self, kept: Stream, shared: Tensor) -> Tensor:
        """Queries (B, key_dim), without gradient."""
        if self.prompt_config.query == "final":
            return self._shared_features(kept, shared)
        token = self.backbone.class_token(kept)
        token = self.backbone.mean_patch(kept) if token is None else token
        return F.layer_norm(token, token.shape[-1:])

    def _group_features(self, kept: Stream, shared: Tensor, match: PoolMatch) -> Tensor:
        """Feature (B, feature_dim) under the shared prompts and those of the selected groups."""
        split = self.prompt_config.first_group_layer
        upper = shared[split:].to(match.prompts.dtype).unsqueeze(1)
        expanded = upper.expand(-1, kept.tokens.shape[0], -1, -1)  # not of `match`, where tracing makes it constant
        both = [torch.cat(pair, dim=1) for pair in zip(expanded.unbind(), match.prompts.unbind(1), strict=True)]
        return self.backbone.pool(self.backbone.run(kept, split, both))

    def _refuse_disabled(self, name: str) -> None:
        self._check_wrapped()
        if self._is_disabled():
            raise StateError(f"{name}() needs the prompts: call it outside disable_adapter().")

    def _check_unchanged(self) -> None:
        """Raise if the wrapped model was changed in a way that prompts and classifier do not fit any more."""
        pooling = getattr(self.backbone, "pooling", None)
        if pooling != self._pooling:
            raise StateError(
                f"The wrapped model pooled by {self._pooling!r} when it was wrapped, and by {pooling!r} now, which "
                "changes the features that prompts and head were made for. Set it back, or wrap the model again."
            )
        vit, model = self.vit, self.backbone.model
        if vit is not model and not any(module is model for module in vit.modules()):
            raise StateError(
                f"adapter.vit was replaced by another {type(vit).__name__}, which has no prompts. Wrap that model: "
                "LongTailPromptAdapter.wrap(vit), and load the prompts."
            )
        if len(self.backbone.blocks) != self.prompt_config.depth:
            raise StateError(
                f"The wrapped model has {len(self.backbone.blocks)} blocks, and {self.prompt_config.depth} when it was "
                "wrapped. Put the blocks back, or unwrap(), change the blocks and wrap the model again."
            )
