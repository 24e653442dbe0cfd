"""Use of trained models: export to other runtimes."""

from __future__ import annotations

from lpt_peft.inference.export import DTYPES, FORMATS, ExportDtype, ExportFormat, ExportResult, export_model

__all__ = ["DTYPES", "FORMATS", "ExportDtype", "ExportFormat", "ExportResult", "export_model"]
