"""Use of trained models: images in, label names with probabilities out; and export to other runtimes.

    classifier.py    Classifier: labels, preprocessing, temperature
    prediction.py    Prediction: the result for an image
    image_paths.py   image files of paths, folders and patterns
    items.py         images of any kind as a tensor
    read_batches.py  batches of them, read in worker processes
    source.py        models from run folders, prompt files, model files and the Hub
    run_backbone.py  the backbone in the settings of a run
    export/          ONNX, torch.export and AOTInductor files

`Classifier` needs the core dependencies only. Public names are imported on first use. Not here: training and evaluation
(`lpt_peft.recipe`).
"""

from typing import TYPE_CHECKING

from lpt_peft._lazy import import_on_first_use

if TYPE_CHECKING:
    from lpt_peft.inference.classifier import Classifier
    from lpt_peft.inference.export import DTYPES, FORMATS, ExportDtype, ExportFormat, ExportResult, export_model
    from lpt_peft.inference.image_paths import image_paths
    from lpt_peft.inference.prediction import Prediction

__all__ = [
    "DTYPES",
    "FORMATS",
    "Classifier",
    "ExportDtype",
    "ExportFormat",
    "ExportResult",
    "Prediction",
    "export_model",
    "image_paths",
]

import_on_first_use(  # must match the imports above; a test compares them
    __name__,
    {
        "classifier": ["Classifier"],
        "export": ["DTYPES", "FORMATS", "ExportDtype", "ExportFormat", "ExportResult", "export_model"],
        "image_paths": ["image_paths"],
        "prediction": ["Prediction"],
    },
)
