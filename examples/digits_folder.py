"""Write the long-tailed digits as PNG files in class folders train/, val/ and test/.

pip install -e ".[demo]"
python examples/digits_folder.py digits

Images and splits are those of the demo: 120 images of "0" falling to 2 of "9" for training, up to 30 images per class
for validation and 50 per class for the test. PNG stores 8 bits per channel, so pixels differ from the demo by at most
1/510.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torchvision.utils import save_image

from lpt_peft.data.digits import DigitsLT

FOLDERS = {"train": "train", "validation": "val", "test": "test"}


def write(folder: Path) -> None:
    """Write `folder/<split>/<digit>/<number>.png`; existing files of the same name are overwritten."""
    for split, name in FOLDERS.items():
        digits = DigitsLT(split, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # values from 0 to 1
        for number, (image, label) in enumerate(digits):
            class_folder = folder / name / str(label)
            class_folder.mkdir(parents=True, exist_ok=True)
            save_image(image, class_folder / f"{number:04}.png")
        print(f"{folder / name}: {len(digits)} images")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the long-tailed digits as PNG files in class folders.")
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
