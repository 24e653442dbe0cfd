"""The way from images to features: embed, blocks with prompts, select groups, pool.

With the final query, the blocks after `K` run twice; with the block-K query, all blocks run once. Not here: the
classifier and the kinds of call (`lpt_peft.call`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt_peft.backbones.base import Stream
from lpt_peft.errors import InputError, StateError
from lpt_peft.phase import in_process_group
from lpt_peft.prompts import PoolMatch
from lpt_peft.routing import RoutingMixin


class PassesMixin(RoutingMixin):
    """The part of an adapter that computes features and queries."""

    def _init_passes(self) -> None:
        self._pooling = getattr(self.backbone, "pooling", None)

    def features(self, images: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the input of the classifier, (B, d), in the current phase, before dropout.

        Arguments are those of the wrapped model's forward, or `pixel_values=` in place of `images`.

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
        run alone. Without gradient. Arguments are those of `features`.

        Raises:
            InputError: The images do not fit the wrapped model.
            StateError: As `forward`; also inside `disable_adapter()`.
        """
        self._refuse_disabled("queries")
        if not self.prompt_config.has_groups:
            raise StateError('Queries select groups, and placement="shallow" has none: use features().')
        args, kwargs = self._inputs(images, args, kwargs)
        queries: Tensor = self._run(self._query_pass, args, kwargs)
        return queries

    @torch.no_grad()
    def mixture_features(
        self, mixtures: Sequence[Tensor | None], images: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Compute features under mixtures of the groups in place of the selected groups, to measure the selection.

        The first `K` blocks run once for all mixtures. Weights 1/k for k groups and 0 for the others are the prompt of
        a selection.

        Args:
            mixtures: S weights of the groups, each (m,) for all images or (B, m), floating point; None in place of
                weights is the shared prompt alone.
            images: Images (B, 3, H, W), or the first argument of the wrapped model's forward.
            *args: Further arguments of that forward.
            **kwargs: Further arguments of that forward.

        Returns:
            Features (S, B, feature_dim), without gradient.

        Raises:
            InputError: A mixture has another shape, or the images do not fit the wrapped model.
            StateError: As `forward`; also inside `disable_adapter()`.
        """
        self._refuse_disabled("mixture_features")
        size = len(self.pool.keys)
        for weights in mixtures:
            if weights is not None and (weights.ndim not in (1, 2) or weights.shape[-1] != size):
                raise InputError(
                    f"A mixture must have the shape ({size},) or (B, {size}), a weight for each group, not "
                    f"{tuple(weights.shape)}."
                )
        args, kwargs = self._inputs(images, args, kwargs)
        features: Tensor = self._run(partial(self._mixture_passes, mixtures), args, kwargs)
        return features

    def _mixture_passes(self, mixtures: Sequence[Tensor | None], *args: Any, **kwargs: Any) -> Tensor:
        shared = self.shared()
        kept = self._first_blocks(shared, args, kwargs)
        features = []
        for weights in mixtures:
            if weights is None:
                features.append(self._shared_features(kept, shared))
                continue
            prompts = self.pool.prompts
            mixed = (weights.to(prompts) @ prompts.flatten(1)).unflatten(-1, prompts.shape[1:]).to(kept.tokens.dtype)
            mixed = mixed.expand(kept.tokens.shape[0], *prompts.shape[1:])
            features.append(self._group_features(kept, shared, PoolMatch(mixed, *[kept.tokens[:, :0, 0]] * 2)))
        return torch.stack(features)

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
        images, kwargs = self._name_images(images, kwargs)
        args, kwargs = self.frozen_weights.cast_inputs((args if images is None else (images, *args), kwargs))
        return args, kwargs

    def _passes(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shared = self.shared()
        if not self.prompt_config.has_groups:
            features = self._shallow_features(shared, args, kwargs)
            empty = features.new_empty(features.shape[0], 0)
            return features, features, empty, empty.long()
        router = None if self._phase == "shared" or self.training or self.route == "exact" else self.router
        if router is None:
            kept = self._first_blocks(shared, args, kwargs)
        else:
            kept, tokens = self._blocks_and_tokens(shared, args, kwargs, router.layout.blocks)
        if self._phase == "shared":
            features = self._shared_features(kept, shared)
            empty = features.new_empty(features.shape[0], 0)
            query = features if self.prompt_config.query == "final" else self._query(kept, shared)
            return features, query, empty, empty.long()
        if router is None:
            query = self._query(kept, shared)
            match = self.pool(query)
        else:
            query = kept.tokens.new_empty(kept.tokens.shape[0], 0)
            match = self.pool.select(self._routed_similarity(kept, tokens, shared, args, kwargs), kept.tokens.dtype)
        features = self._group_features(kept, shared, match)
        if self.training:
            # Adds 0: the keys then get a gradient (0) from any loss, which DDP waits for.
            features = features + 0 * match.similarity.sum(-1, keepdim=True).to(features.dtype)
        return features, query, match.similarity, match.groups

    def _query_pass(self, *args: Any, **kwargs: Any) -> Tensor:
        shared = self.shared()
        return self._query(self._first_blocks(shared, args, kwargs), shared)

    def _shallow_features(self, shared: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Feature (B, feature_dim) with the prompt (1, n, d) appended to the tokens that enter block 1."""
        stream = self.backbone.embed(*args, **kwargs)
        tokens, length = stream.tokens, self.prompt_config.prompt_length
        prompt = shared.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        joined = stream._replace(tokens=torch.cat([tokens, prompt], 1))
        carried = self.backbone.run(joined, 0, [length] * self.prompt_config.depth)
        return self.backbone.pool(carried._replace(tokens=carried.tokens[:, :-length]))

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
        return F.layer_norm(token, (self.prompt_config.dim,))  # a constant for the older ONNX exporter

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
