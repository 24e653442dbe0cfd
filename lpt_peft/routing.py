"""Routing of an adapter: the exact second pass, a fitted router, or both with a margin.

Not here: the regression (`lpt_peft.router`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lpt_peft._image_batches import image_batches, is_common, read_batch, select_rows, with_progress_bar
from lpt_peft._numbers import checked_integer, is_finite_number
from lpt_peft._numerics import cosine
from lpt_peft.backbones.base import Stream, execution_device
from lpt_peft.call import CallMixin
from lpt_peft.errors import ConfigError, InputError, StateError
from lpt_peft.router import (
    MAX_SEED,
    MAX_WIDTH,
    PENALTIES,
    RidgeSums,
    Router,
    RouterFit,
    RouterLayout,
    expand,
    normalized_tokens,
    random_projection,
    same_groups,
    selection_gap,
)

Route = Literal["exact", "router"] | float
_HELD_OUT = 5  # every fifth image
_MAX_REPORTED = 10_000  # held-out images whose inputs are kept in memory


class RoutingMixin(CallMixin):
    """The part of an adapter that selects groups without the second pass."""

    router: Router | None
    _refuse_disabled: Callable[[str], None]
    _query: Callable[[Stream, Tensor], Tensor]
    _inputs: Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]

    @property
    def route(self) -> Route:
        """How groups are selected in eval mode: "exact" (default), "router", or a margin.

        "exact" runs the second pass for the final query. "router" uses the similarities that the router predicts: all
        blocks run once. With a margin (float of at least 0), images whose predicted similarities of ranks k and k + 1
        differ by less than it take the second pass; a batch of which no image does is as fast as "router". In training
        mode and in phase "shared" the route has no effect: training is always exact. The route is not part of state
        dicts and prompt files.

        `AdapterOutput.similarity` then holds predicted similarities (of images without a second pass), and
        `AdapterOutput.query` is (B, 0). Under torch.compile, a margin breaks the graph; "router" does not.
        """
        return "exact" if self.router is None else self._route

    @route.setter
    def route(self, route: Route) -> None:
        margin = is_finite_number(route) or route == float("inf")
        if route not in ("exact", "router") and not (margin and route >= 0):  # type: ignore[operator]
            raise ConfigError(f'route={route!r} must be "exact", "router" or a margin of at least 0, such as 0.02.')
        if route != "exact":
            self._check_routable()
            if self.router is None:
                raise StateError(f"route={route!r} needs a router: call adapter.fit_router(training_images) first.")
            if self._router_is_stale():
                raise StateError(
                    f"route={route!r}: the shared prompts or keys have changed since the router was fitted. Call "
                    "adapter.fit_router(training_images) again."
                )
        self._route = route

    def fit_router(
        self,
        images: Tensor | Iterable[Any],
        *,
        ridge: float | None = None,
        features: Literal["linear", "random"] = "linear",
        width: int = 2048,
        blocks: int = 1,
        seed: int = 0,
        batch_size: int = 64,
        progress: bool = True,
    ) -> RouterFit:
        """Fit a router for prompts that were trained with the final query, without gradients; the route stays "exact".

        The router predicts the cosines of the final query with all keys from class token and mean patch at block K, by
        ridge regression in closed form. One exact pass over the images; memory does not grow with their number. Every
        fifth image is held out to choose `ridge` and to measure the agreement; the router is then fitted to all.

        Args:
            images: Images (N, 3, H, W), or an iterable of batches, such as a DataLoader: each a tensor, a mapping with
                "pixel_values" or other arguments of the model's forward, or a sequence that starts with either, such
                as (images, labels). Use training images, prepared as in evaluation or augmented.
            ridge: Penalty relative to the mean variance of a feature; None chooses among powers of ten by the error on
                held-out images.
            features: "linear" for the tokens alone, "random" to add `width` random features of them.
            width: Number of random features, at most 16,384.
            blocks: Block boundaries whose tokens are used, from 1 to `shared_layers`.
            seed: Seed of the random features.
            batch_size: Images of a batch, if `images` is a tensor.
            progress: Show a progress bar on a terminal, if tqdm is installed.

        Returns:
            Agreement with the exact selection on held-out images, and what a margin costs.

        Raises:
            StateError: The phase is "shared", whose groups are not trained, or the adapter was unwrapped.
            ConfigError: The adapter has `query="block_k"`, which needs no router, or an argument is out of range.
            InputError: There are fewer than 5 images, or the images do not fit the wrapped model.

        Example:
            >>> import timm
            >>> from lpt_peft import LongTailPromptAdapter
            >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
            >>> adapter = LongTailPromptAdapter.wrap(vit, num_classes=5, query="final")
            >>> adapter.phase = "group"  # after training
            >>> fit = adapter.fit_router(torch.randn(40, 3, 32, 32))
            >>> adapter.route = 0.01
            >>> adapter(torch.randn(2, 3, 32, 32)).shape
            torch.Size([2, 5])
        """
        self._refuse_disabled("fit_router")
        self._check_routable()
        if self.phase == "shared":
            raise StateError(
                'fit_router needs trained groups, and the phase is "shared", which does not use them. Train phase '
                '"group" first, or load its prompts.'
            )
        if features not in ("linear", "random"):
            raise ConfigError(f'features={features!r} must be "linear" or "random".')
        if ridge is not None and not (is_finite_number(ridge) and ridge > 0):
            raise ConfigError(f"ridge={ridge!r} must be above 0, or None to choose it on held-out images.")
        layout = RouterLayout(
            blocks=checked_integer("blocks", blocks, 1, max(1, self.prompt_config.first_group_layer)),
            width=checked_integer("width", width, 1, MAX_WIDTH) if features == "random" else 0,
            seed=checked_integer("seed", seed, 0, MAX_SEED),
        )
        checked_integer("batch_size", batch_size, 1)
        training, route, self._route = self.training, self._route, "exact"
        self.eval()
        try:
            router, fit = self._fit(image_batches(images, batch_size), layout, ridge, progress)
        except BaseException:
            self._route = route
            raise
        finally:
            self.train(training)
        self._set_router(router)
        return fit

    @torch.no_grad()
    def _fit(
        self, batches: Iterable[Any], layout: RouterLayout, ridge: float | None, progress: bool
    ) -> tuple[Router, RouterFit]:
        fitted, held = RidgeSums(), RidgeSums()
        kept: list[tuple[Tensor, Tensor]] = []
        projection, count = torch.empty(0, 0), 0
        for batch in with_progress_bar(batches, "fit_router", progress):
            found, kwargs = read_batch(batch, execution_device(self.vit))
            args, kwargs = self._inputs(found, (), kwargs)
            inputs, similarity = self._run(self._router_pass, (layout, *args), kwargs)
            if not count:
                projection = random_projection(inputs.shape[1], layout.width, layout.seed).to(inputs.device)
            position = torch.arange(count, count + len(inputs), device=inputs.device)
            expanded, is_held = expand(inputs, projection), position % _HELD_OUT == _HELD_OUT - 1
            for sums, rows in ((fitted, ~is_held), (held, is_held)):
                if bool(rows.any()):
                    sums.update(expanded[rows], similarity[rows])
            if held.count <= _MAX_REPORTED:
                kept.append((inputs[is_held].cpu(), similarity[is_held].cpu()))
            count += len(inputs)
        if not held.count:
            raise InputError(f"fit_router got {count} images and needs at least {_HELD_OUT}; a few thousand are good.")
        if not (fitted.is_finite() and held.is_finite()):
            raise InputError(
                "Features of the images are NaN or infinite, so no router can be fitted: check the images and the "
                "backbone's dtype."
            )
        penalties = PENALTIES if ridge is None else (ridge,)
        solutions = fitted.solve(penalties)
        best = min(range(len(penalties)), key=lambda index: held.squared_error(*solutions[index]))
        inputs, similarity = (torch.cat(parts) for parts in zip(*kept, strict=True))
        predicted = _router(*solutions[best], layout, inputs)(inputs)
        top_k = self.pool.top_k
        same = same_groups(predicted, similarity, top_k)
        router = _router(*(fitted + held).solve([penalties[best]])[0], layout, self.pool.keys.detach())
        gaps = selection_gap(predicted, top_k)
        return router, RouterFit(count, penalties[best], float(same.float().mean()), gaps, same)

    def _router_pass(self, layout: RouterLayout, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Inputs of the router, and exact similarities with all keys."""
        shared = self.shared()
        kept, tokens = self._blocks_and_tokens(shared, args, kwargs, layout.blocks)
        return normalized_tokens(tokens), cosine(self._query(kept, shared), self.pool.keys)

    def _blocks_and_tokens(
        self, shared: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], boundaries: int
    ) -> tuple[Stream, list[Tensor | None]]:
        """Tokens that enter block `K + 1`; class token and mean patch of the last block boundaries up to there."""
        backbone, split = self.backbone, self.prompt_config.first_group_layer
        first = split - boundaries + 1
        stream = backbone.run(backbone.embed(*args, **kwargs), 0, shared[:first].unbind())
        tokens: list[Tensor | None] = []
        for block in range(first, split + 1):
            if block > first:
                stream = backbone.run(stream, block - 1, shared[block - 1 : block].unbind())
            tokens += [backbone.class_token(stream), backbone.mean_patch(stream)]
        return stream, tokens

    def _routed_similarity(
        self, kept: Stream, tokens: Sequence[Tensor | None], shared: Tensor, args: Any, kwargs: Any
    ) -> Tensor:
        """Similarities (B, m): predicted, or exact for images whose selection is uncertain."""
        router = self.router
        assert router is not None  # noqa: S101 - narrows the type
        predicted: Tensor = router(normalized_tokens(tokens))
        if not isinstance(self._route, str):
            rows = (selection_gap(predicted, self.pool.top_k) < self._route).nonzero().squeeze(1)
            if len(rows):
                kept = self._rows_of(kept, rows, args, kwargs)
                exact = cosine(self._query(kept, shared), self.pool.keys)
                predicted = predicted.index_copy(0, rows, exact.to(predicted.dtype))
        return predicted

    def _rows_of(self, kept: Stream, rows: Tensor, args: Any, kwargs: Any) -> Stream:
        """Some images of a stream; masks and position tables are computed again for them."""
        size = kept.tokens.shape[0]
        if len(rows) == size:
            return kept
        args = tuple(select_rows(value, rows, size) for value in args)
        kwargs = {n: v if is_common(n, v) else select_rows(v, rows, size) for n, v in kwargs.items()}
        return Stream(kept.tokens[rows], self.backbone.embed(*args, **kwargs).context)

    def _check_routable(self) -> None:
        if not self.prompt_config.has_groups:
            raise ConfigError('An adapter with placement="shallow" has no groups, so it needs no router.')
        if self.prompt_config.query == "block_k":
            raise ConfigError(
                'An adapter with query="block_k" needs no router: its query is read at block K and all blocks run once '
                "already."
            )

    def _drop_stale_router(self) -> None:
        """Return to the exact route with a warning if training has changed what the router was fitted to."""
        if self.route != "exact" and self._router_is_stale():
            self._route = "exact"
            warnings.warn(
                "The shared prompts or keys have changed since the router was fitted, so the route is exact again. "
                "Call fit_router again, and assign adapter.route.",
                UserWarning,
                stacklevel=3,
            )


def _router(weight: Tensor, bias: Tensor, layout: RouterLayout, like: Tensor) -> Router:
    return Router(weight.to(like), bias.to(like), layout)
