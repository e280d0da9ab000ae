"""A model that only pretends: the runner's own road, killed where a test wants it."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import x2dfd
from x2dfd import cli
from x2dfd.types import Evidence, FaceReport, Failure, ModelInfo, Report, Verdict

if TYPE_CHECKING:
    from x2dfd.detector import Detector

FAILS = 1000  # every so manieth file cannot be judged


class StubDetector:
    """Gives each path a verdict that follows from its name; kills its process before the file `dies_at`."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.info = ModelInfo("stub", {}, mode="paper", threshold=0.5)
        self.judged = 0
        self._dies_at = dies_at

    def detect_many(
        self, sources: Iterable[Path], *, batch_size: int = 8, rationale: bool = True, frames: int = 32
    ) -> Iterator[Report | Failure]:
        for source in sources:
            if self.judged == self._dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.judged += 1
            yield self._judge(source)

    def _judge(self, source: Path) -> Report | Failure:
        name = hashlib.sha256(source.name.encode())
        number = int.from_bytes(name.digest()[:4])
        if number % FAILS == 0:
            return Failure(str(source), None, "not_an_image", "the stub does not like its name")
        digest = hashlib.sha256(source.read_bytes()) if source.is_file() else name
        verdict = Verdict("fake" if number % 2 else "real", number / 2**32)
        evidence = (Evidence("blending", 0.25), Evidence("clip", None, "no weights"))
        face = FaceReport(0, (1.0, 2.0, 30.0, 40.0), 0.9, verdict, verdict.p_fake, "", (), evidence)
        return Report(
            str(source), digest.hexdigest(), {"kind": "image"}, verdict, (face,), "", (), evidence, {"state": "absent"},
            self.info.to_dict(), {}, {},
        )  # fmt: skip


def without_model() -> Detector:
    """The real road, for pictures without faces, of which no model is asked."""
    from x2dfd.detector import Detector  # here: its imports take seconds

    model: Any = SimpleNamespace(batch=8)
    return Detector(model, [], None, ModelInfo("none", {"name": "none"}), "paper")


def run(manifest: Path, out: Path, *options: str, dies_at: int | None = None) -> StubDetector:
    """The command on a manifest, with the stub as its model."""
    stub = StubDetector(dies_at)
    loaded = x2dfd.load
    vars(x2dfd)["load"] = lambda *_, **__: stub
    try:
        cli.app(["detect", "--manifest", str(manifest), "--out", str(out), *options], standalone_mode=False)
    finally:
        vars(x2dfd)["load"] = loaded
    return stub


class Killed(BaseException):
    """The process ends here, as far as a test can make it."""
