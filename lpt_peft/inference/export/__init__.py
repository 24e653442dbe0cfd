"""Export of trained models to ONNX, torch.export and AOTInductor."""

from __future__ import annotations

from lpt_peft.inference.export.export_model import ExportResult, export_model
from lpt_peft.inference.export.formats import FORMATS, ExportFormat
from lpt_peft.inference.export.graph import DTYPES, ExportDtype

__all__ = ["DTYPES", "FORMATS", "ExportDtype", "ExportFormat", "ExportResult", "export_model"]
