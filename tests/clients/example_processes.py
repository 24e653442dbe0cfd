"""Every example on two processes: which images each rank loads, and what it has trained.

`torchrun --standalone --nproc-per-node 2 -m tests.clients.example_processes FOLDER NAME ...`, or `accelerate launch`;
each rank writes FOLDER/NAME-RANK.pt.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from tests.conftest import tiny_vit

EXAMPLES = Path(__file__).parents[2] / "examples"
LABELS = [0] * 120 + [1] * 60 + [2] * 20
EPOCHS = 2
OPTIONS = {
    "with_lightning": {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "strategy": "ddp",
        "devices": 2,
    },
    "hf_trainer": {"use_cpu": True, "disable_tqdm": True},
}


class Recorded(Dataset):
    """Random images; records which were loaded."""

    def __init__(self):
        self.images = torch.randn(len(LABELS), 3, 32, 32, generator=torch.Generator().manual_seed(0))
        self.indices = []

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, index):
        self.indices.append(index)
        return self.images[index], LABELS[index]


def load_example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main(folder, *names):
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    for name in names:
        # In the other examples the library does this, after the sampler is created.
        if name in {"plain_torch", "timm_loop"} and not dist.is_initialized():
            dist.init_process_group("gloo")
        options = dict(OPTIONS.get(name, {}))
        if name == "hf_trainer":
            options["output_dir"] = folder
        dataset = Recorded()
        torch.manual_seed(rank)  # different weights on each rank, until they are synchronized
        model = load_example(name).train(tiny_vit(), dataset, LABELS, epochs=EPOCHS, **options)
        trained = {"indices": dataset.indices, "tensors": model.adapter_state_dict(), "world": dist.get_world_size()}
        torch.save(trained, f"{folder}/{name}-{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
