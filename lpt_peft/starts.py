"""Prompts that start as tokens of images: what enters each block of the plain ViT.

Prompts enter attention through a norm, so even small random prompts disturb a pretrained model at full strength. Tokens
that the model computes itself lie where its blocks expect their inputs. Source: SPT, "Revisiting the Power of Prompt
for Visual Prompt Tuning", Wang et al., ICML 2024.

Not here: class means as the start of the head (`lpt_peft.heads`), and the starts of a training run
(`lpt_peft.recipe.training.phase_init`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lpt_peft._features import check_features
from lpt_peft._image_batches import image_batches, read_batch
from lpt_peft._numbers import checked_integer
from lpt_peft._numerics import cosine
from lpt_peft.backbones.base import Backbone, execution_device
from lpt_peft.errors import InputError
from lpt_peft.passes import PassesMixin


def block_inputs(backbone: Backbone, *args: Any, **kwargs: Any) -> Iterator[Tensor]:
    """Yield the tokens (B, N, d) that enter each block of the plain ViT, one block after the other.

    Only the tokens of the current block are kept in memory. Modes, gradients and autocast are the caller's.

    Args:
        backbone: Driver of a ViT whose blocks take prompts.
        *args: Arguments of the model's forward.
        **kwargs: Keyword arguments of the model's forward.
    """
    stream = backbone.embed(*args, **kwargs)
    for layer in range(len(backbone.blocks)):
        yield stream.tokens
        if layer + 1 < len(backbone.blocks):
            stream = backbone.run(stream, layer, [None])


def nearest_images(queries: Tensor, keys: Tensor, count: int) -> Tensor:
    """Find the images whose queries are nearest to each key.

    Args:
        queries: Features (N, d), floating point, N at least 1.
        keys: Keys of the groups (m, d), floating point.
        count: Number of images per key, T.

    Returns:
        Indices (m, T) int64 in descending order of cosine, on the device of the keys. If N < T, they repeat.

    Raises:
        InputError: A shape is wrong, or there is no query.

    Example:
        >>> nearest_images(torch.eye(3), torch.tensor([[0.0, 2.0, 1.0]]), 2)
        tensor([[1, 2]])
    """
    count = checked_integer("count", count, 1)
    check_features("keys", keys, keys.shape[-1], rows="m", hint="pass pool.keys")
    check_features("queries", queries, keys.shape[1], rows="N", hint="pass one feature per image")
    if not len(queries):
        raise InputError("nearest_images needs at least 1 query: pass the features of training images.")
    found = min(count, len(queries))
    nearest = cosine(keys, queries.to(keys.device)).topk(found, dim=-1).indices
    return nearest.repeat(1, -(-count // found))[:, :count]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and restore the mode of each of its modules afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class StartMixin(PassesMixin):
    """The part of an adapter that sets prompts to tokens of images."""

    @torch.no_grad()
    def sample_tokens(self, batches: Iterable[Any], count: int, *, seed: int = 0) -> Tensor:
        """Draw a token per image and block from the tokens that enter each block of the plain ViT.

        Every position of the sequence is equally likely, including the class token, register tokens and padding,
        because not all models mark them; a position is drawn for each image and block. The model runs in eval mode,
        without prompts and gradients. Memory is needed for the tokens of a batch in one block, and for the result.

        Args:
            batches: Batches as in `fit_router`, such as a DataLoader of shuffled training images; or a tensor of images
                (B, 3, H, W). Read until `count` images are found.
            count: Number of images, T.
            seed: Seed of the positions; global random state is not used. They do not depend on the size of batches.

        Returns:
            Tokens (L, T, d) in the dtype of the prompts; token t of each block is from image t.

        Raises:
            InputError: There are fewer images, or a token is NaN or infinite.
            StateError: As `forward`; also inside `disable_adapter()`.
        """
        count, seed = checked_integer("count", count, 1), checked_integer("seed", seed, 0)
        self._refuse_disabled("sample_tokens")
        prompts, depth = self.shared.prompts, self.prompt_config.depth
        generator = torch.Generator().manual_seed(seed)
        draws = torch.rand(count, depth, generator=generator, dtype=torch.float64)
        tokens = torch.empty(depth, count, self.prompt_config.dim, dtype=prompts.dtype, device=prompts.device)
        found = 0
        with eval_mode(self):
            for batch in [batches] if isinstance(batches, Tensor) else image_batches(batches, count):
                images, kwargs = read_batch(batch, execution_device(self.vit))
                args, kwargs = self._inputs(images, (), kwargs)
                found += self._run(partial(self._draw, tokens[:, found:], draws[found:]), args, kwargs)
                if found == count:
                    break
        if found < count:
            raise InputError(
                f"{count} tokens per block need {count} images, a token of each, and the batches hold {found}: pass "
                "more images, or the same batches several times."
            )
        if not bool(tokens.isfinite().all()):
            raise InputError("A token of the images is NaN or infinite: check the images and the backbone's dtype.")
        return tokens

    def init_prompts(self, batches: Iterable[Any], *, seed: int = 0) -> None:
        """Set the shared prompt to tokens of images: `n` per block, each from another image; see `sample_tokens`.

        Call it before phase "shared", with shuffled training images. Processes must be given the same images.

        Args:
            batches: As in `sample_tokens`; the first `prompt_length` images are used.
            seed: As in `sample_tokens`.

        Raises:
            LPTError: As `sample_tokens`.

        Example:
            >>> import timm
            >>> from lpt_peft import LongTailPromptAdapter
            >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
            >>> adapter = LongTailPromptAdapter.wrap(vit, num_classes=5, prompt_length=4)
            >>> adapter.init_prompts(torch.randn(4, 3, 32, 32))
        """
        tokens = self.sample_tokens(batches, self.prompt_config.prompt_length, seed=seed)
        self.shared.init_prompts(tokens[: len(self.shared.prompts)])  # block 1 alone with placement="shallow"

    def _draw(self, tokens: Tensor, draws: Tensor, *args: Any, **kwargs: Any) -> int:
        """Fill tokens (L, T, d) from a batch, at the positions of draws (T, L) in [0, 1); return how many are new."""
        used = 0
        for layer, entering in enumerate(block_inputs(self.backbone, *args, **kwargs)):
            used = min(entering.shape[0], tokens.shape[1])
            positions = (draws[:used, layer] * entering.shape[1]).long().to(entering.device)
            rows = torch.arange(used, device=entering.device)
            tokens[layer, :used] = entering[rows, positions].to(tokens)
        return used
