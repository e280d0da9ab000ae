"""A clip's chance of a fake over its frames: the values that templates/curve.html.jinja draws, here and in the app."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from x2dfd import answer
from x2dfd.files import Json
from x2dfd.types import FaceReport, Report


def most_suspicious(faces: Sequence[FaceReport]) -> dict[int, FaceReport]:
    """The most suspicious face of each frame of a clip."""
    worst: dict[int, FaceReport] = {}
    for face in faces:
        if face.frame is not None:
            worst[face.frame] = max(worst.get(face.frame, face), face, key=FaceReport.suspicion)
    return worst


def curve(report: Report, frames: Sequence[int], marked: Collection[int | None] = ()) -> Json | None:
    """The curve of a clip over its `frames`, with some of them `marked`; None of fewer than two, or without estimate.

    Places are in percent, from the left and from the top. `runs` are the pieces of the line: it ends where a frame
    has no face.
    """
    worst = most_suspicious(report.faces)
    steps: list[Json] = []
    runs: list[list[Json]] = [[]]
    count = len(frames)
    for k, frame in enumerate(frames):
        face = worst.get(frame)
        if face is None or face.verdict.p_fake is None:
            runs.append([])
            continue
        seconds = f"{face.time_s:.1f} s" if face.time_s is not None else f"frame {frame}"
        step = {
            "face": face.index, "kind": answer.status(face.verdict), "marked": frame in marked,
            "left": 100 * k / count, "width": 100 / count, "x": 100 * (k + 0.5) / count,
            "y": 100 - 100 * face.verdict.p_fake, "when": seconds, "p": answer.estimate(face.verdict, report.model),
        }  # fmt: skip
        steps.append(step)
        runs[-1].append(step)
    if count < 2 or not steps:
        return None
    low, high = max(steps, key=lambda step: step["y"]), min(steps, key=lambda step: step["y"])
    band = answer.band(report.model)
    fake = sum(step["kind"] == "fake" for step in steps)
    several = "s" * (len(steps) > 1)
    spoken = f"chance of a fake over the clip, {len(steps)} frame{several} with a face from {steps[0]['when']} to "
    spoken += f"{steps[-1]['when']}: highest {high['p']} at {high['when']}, lowest {low['p']} at {low['when']}; "
    spoken += f"{fake or 'no'} frame{' looks' if fake == 1 else 's look'} fake"
    return {
        "steps": steps, "runs": [run for run in runs if len(run) > 1], "spoken": spoken,
        "band": None if band is None else (100 - 100 * band[1], 100 * (band[1] - band[0])),
    }  # fmt: skip
