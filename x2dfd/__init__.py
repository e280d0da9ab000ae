"""Explainable deepfake detection with a multimodal LLM (X2-DFD, arXiv 2410.06126).

>>> import x2dfd
>>> detector = x2dfd.load()                      # doctest: +SKIP
>>> report = detector.detect("face.jpg")         # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from x2dfd.errors import InputError, SetupError, UnknownName, X2DFDError
from x2dfd.types import Card, Cue, Evidence, Face, FaceReport, Failure, Report, Verdict

if TYPE_CHECKING:
    from x2dfd.detector import Detector, load

__all__ = [
    "Card",
    "Cue",
    "Detector",
    "Evidence",
    "Face",
    "FaceReport",
    "Failure",
    "InputError",
    "Report",
    "SetupError",
    "UnknownName",
    "Verdict",
    "X2DFDError",
    "load",
]


def __getattr__(name: str) -> Any:
    """`load` and `Detector` need torch, which is imported when they are first asked for."""
    if name in ("load", "Detector"):
        from x2dfd import detector

        return getattr(detector, name)
    raise AttributeError(f"module 'x2dfd' has no attribute {name!r}")
