"""CheckReport: everything that a check of all images found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lpt_peft._text import printable
from lpt_peft.data.inspection.summary import DataSummary

UNREADABLE = ("missing", "not an image", "truncated", "corrupt", "unsupported mode", "too large")
"""Kinds of findings that stop a training, or are replaced by other images with `unreadable="skip"`."""

KINDS = {
    "missing": "the file does not exist or cannot be opened",
    "not an image": "no format of Pillow matches the content",
    "truncated": "the end of the file is missing",
    "corrupt": "the decoder fails",
    "unsupported mode": "grey without a defined white value",
    "too large": "more pixels than Pillow accepts",
    "duplicate in several splits": "the same pixels are in several splits; results are too good",
    "duplicate in several classes": "the same pixels have several labels",
    "duplicate": "the same pixels are several times in a class",
    "rotated": "EXIF orientation; followed unless exif=False",
    "transparent": "has transparency; composited on the background",
    "mode": "unusual colour mode; converted to RGB",
    "deep": "more than 8 bits per channel; the upper 8 bits are read",
    "animated": "several frames; the first is read",
    "blank": "all pixels have the same colour",
    "tiny": "shorter side below 16 pixels",
    "enormous": "more pixels than Pillow considers safe",
}
"""Kinds of findings in the order of the report, and their meaning."""


@dataclass(frozen=True)
class Finding:
    """A finding about an image, or about several images with the same pixels.

    Args:
        kind: A key of `KINDS`.
        files: Names of the images; those of a mapping of splits start with the split, as in "val: a/1.png".
        detail: Cause or value, such as "EXIF orientation 6"; may be empty.
    """

    kind: str
    files: tuple[str, ...]
    detail: str = ""

    def __str__(self) -> str:
        names = " = ".join(printable(name, 500) for name in self.files)
        return f"{names} ({printable(self.detail)})" if self.detail else names


@dataclass(frozen=True)
class CheckReport:
    """Result of `check_images`; `str()` lists all findings, `to_dict()` gives plain JSON.

    Args:
        summaries: Summary of each split.
        findings: Sorted by kind, in the order of `KINDS`, then by split and index.
    """

    summaries: Mapping[str, DataSummary]
    findings: Sequence[Finding]

    @property
    def readable(self) -> bool:
        """Whether every image can be read."""
        return not any(finding.kind in UNREADABLE for finding in self.findings)

    @property
    def counts(self) -> dict[str, int]:
        """Number of findings of each kind that occurs."""
        kinds = [finding.kind for finding in self.findings]
        return {kind: kinds.count(kind) for kind in KINDS if kind in kinds}

    def of_kind(self, kind: str) -> list[Finding]:
        """Findings of a kind."""
        return [finding for finding in self.findings if finding.kind == kind]

    def __str__(self) -> str:
        lines: list[str] = []
        for split, summary in self.summaries.items():
            lines += [f"{split}: {line}" if split else line for line in summary.lines(with_left_out=False)]
        for kind, count in self.counts.items():
            lines.append(f"{count} {kind}: {KINDS[kind]}")
            lines += [f"  {finding}" for finding in self.of_kind(kind)]
        for split, summary in self.summaries.items():
            for reason, files in sorted(summary.left_out.items()):
                lines.append(f"{len(files)} left out{f' of {split}' if split else ''}: {printable(reason)}")
                lines += [f"  {printable(file, 500)}" for file in files]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return summaries, counts and all findings as plain JSON."""
        return {
            "splits": {split: summary.to_dict() for split, summary in self.summaries.items()},
            "readable": self.readable,
            "counts": self.counts,
            "findings": [
                {"kind": finding.kind, "files": list(finding.files), "detail": finding.detail}
                for finding in self.findings
            ],
        }
