"""Explainable deepfake detection with a multimodal LLM (X2-DFD, arXiv 2410.06126).

>>> import x2dfd
>>> detector = x2dfd.load()                      # doctest: +SKIP
>>> report = detector.detect("face.jpg")         # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from x2dfd.errors import InputError, SetupError, UnknownName, X2DFDError
from x2dfd.model_spec import ModelSpec
from x2dfd.types import Card, Cue, Evidence, Face, FaceReport, Failure, ModelInfo, Report, Verdict

if TYPE_CHECKING:
    from x2dfd.detector import Detector
    from x2dfd.loading import load

__all__ = [
    "Card", "Cue", "Detector", "Evidence", "Face", "FaceReport", "Failure", "InputError", "ModelInfo", "ModelSpec",
    "Report", "SetupError", "UnknownName", "Verdict", "X2DFDError", "load",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """`load` and `Detector` need torch, which is imported when they are first asked for."""
    if name == "load":
        from x2dfd.loading import load

        return load
    if name == "Detector":
        from x2dfd.detector import Detector

        return Detector
    raise AttributeError(f"module 'x2dfd' has no attribute {name!r}")
