"""Write the long-tailed digits as PNG files in class folders, train/ val/ test/, to try out what reads image folders.

pip install -e ".[demo]"
python examples/digits_folder.py digits

The images and the split are the demo's: 120 images of "0" falling to 2 of "9" for training, up to 30 of each for
validation, 50 of each for the test. PNG has 8 bits a channel, so a pixel differs from the demo's by at most 1/510.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torchvision.utils import save_image

from lpt_peft.data.digits import DigitsLT

FOLDERS = {"train": "train", "validation": "val", "test": "test"}


def write(folder: Path) -> None:
    """Write `folder/<part>/<digit>/<number>.png`; files of the same name are overwritten."""
    for part, name in FOLDERS.items():
        digits = DigitsLT(part, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # values from 0 to 1
        for number, (image, label) in enumerate(digits):
            place = folder / name / str(label)
            place.mkdir(parents=True, exist_ok=True)
            save_image(image, place / f"{number:04}.png")
        print(f"{folder / name}: {len(digits)} images")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the long-tailed digits as PNG files in class folders.")
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
