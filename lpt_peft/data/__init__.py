"""Long-tailed data sets: images, labels, class names and class counts from folders, lists and other libraries.

Every source becomes a `LabelledImages`, a map-style dataset of (image, label). Samplers take its `labels`, losses and
metrics its `class_counts`; none of them takes the dataset itself. Public names are imported on first use.

    images.py       LabelledImages                 files/          decoding, readable formats, class folders
    sources.py      files, arrays, other datasets  inspection/     summary of a data set, check of all images
    transforms.py   preprocessing of a backbone    long_tail.py    long-tailed subsets, from labels alone

    folder.py       one folder per class           cifar.py        CIFAR-10/100-LT from the Python archives
    image_list.py   Places-LT, ImageNet-LT, CSV    inaturalist.py  the JSON of iNaturalist 2018
    from_dataset.py any map-style dataset          huggingface.py  `datasets`: lpt_peft[hf]
    digits.py       a small demo data set: lpt_peft[demo]
    workers.py      worker processes of DataLoaders

Not here: samplers (`lpt_peft.samplers`) and downloads.
"""

from typing import TYPE_CHECKING

from lpt_peft._lazy import import_on_first_use

if TYPE_CHECKING:
    from lpt_peft.data.cifar import cifar_lt
    from lpt_peft.data.files.reading import Reading, open_image, read_image
    from lpt_peft.data.folder import image_folder
    from lpt_peft.data.from_dataset import from_dataset
    from lpt_peft.data.huggingface import from_huggingface, open_huggingface
    from lpt_peft.data.image_list import image_list
    from lpt_peft.data.images import LabelledImages
    from lpt_peft.data.inaturalist import inaturalist
    from lpt_peft.data.inspection.check_images import check_images
    from lpt_peft.data.inspection.report import CheckReport, Finding
    from lpt_peft.data.inspection.summary import DataSummary
    from lpt_peft.data.long_tail import make_long_tailed
    from lpt_peft.data.transforms import RECIPE_CROP_PCT, transforms

__all__ = [
    "RECIPE_CROP_PCT",
    "CheckReport",
    "DataSummary",
    "Finding",
    "LabelledImages",
    "Reading",
    "check_images",
    "cifar_lt",
    "from_dataset",
    "from_huggingface",
    "image_folder",
    "image_list",
    "inaturalist",
    "make_long_tailed",
    "open_huggingface",
    "open_image",
    "read_image",
    "transforms",
]

import_on_first_use(  # the imports above, for the interpreter
    __name__,
    {
        "cifar": ["cifar_lt"],
        "files.reading": ["Reading", "open_image", "read_image"],
        "folder": ["image_folder"],
        "from_dataset": ["from_dataset"],
        "huggingface": ["from_huggingface", "open_huggingface"],
        "image_list": ["image_list"],
        "images": ["LabelledImages"],
        "inaturalist": ["inaturalist"],
        "inspection.check_images": ["check_images"],
        "inspection.report": ["CheckReport", "Finding"],
        "inspection.summary": ["DataSummary"],
        "long_tail": ["make_long_tailed"],
        "transforms": ["RECIPE_CROP_PCT", "transforms"],
    },
)
