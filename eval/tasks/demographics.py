"""Task `demographics`: false alarms on real photos by skin tone, sex and age.

Sex and age are what the manifest records in columns of these names, and nothing is guessed. Skin tone is measured on
the cheeks, as the individual typology angle (Chardon, Cretois & Hourseau 1991), and so depends on light and camera: it
is counted within each source, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

from eval import stats
from eval.rows import SampleRow, score
from eval.scoring import Judged, Part, called_fake, equalised, share, unscored, value_of
from eval.task import DECIDING, Outcome, Run, Task, judge_of
from x2dfd.errors import InputError
from x2dfd.faces import area_polygons, find_faces
from x2dfd.manifest import Sample
from x2dfd.media import load_picture

TONES = ((55.0, "1 very light"), (41.0, "2 light"), (28.0, "3 intermediate"), (10.0, "4 tan"), (-30.0, "5 brown"))
DARKEST = "6 dark"
LEAST_CHROMA = 4.0  # of Lab: below it the photo is grey, and the angle says nothing


def tone(sample: Sample, equalise: bool) -> str:
    """The skin tone of the largest face's cheeks, "" if there is no face or no colour."""
    try:
        pixels = load_picture(equalised(sample.path) if equalise else sample.path).pixels
        faces = find_faces(pixels)
    except InputError:
        return ""
    if not faces:
        return ""
    crop = faces[0].crop
    mask = np.zeros(crop.shape[:2], np.uint8)
    cv2.fillPoly(mask, [p.round().astype(np.int32) for p in area_polygons(faces[0].crop_landmarks)["cheeks"]], 1)
    lab = cv2.cvtColor(crop.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[mask == 1]  # [pixels of the cheeks, 3]
    if not len(lab):
        return ""
    light, a, b = (float(v) for v in np.median(lab, axis=0))
    if math.hypot(a, b) < LEAST_CHROMA:
        return ""
    angle = math.degrees(math.atan2(light - 50, b))
    return next((name for least, name in TONES if angle > least), DARKEST)


def run(run: Run) -> Outcome:
    options, model = run.options, run.open()
    store = run.store()
    rows, origin = score(judge_of(run, model, rationale=False), run.samples, store)
    tones = [tone(s, options.equalise) for s in run.samples]
    measured = demographics_result(run.samples, rows, tones)
    return Outcome(store, rows, origin, measured, model.name, model.mode, scores_of=DECIDING)


def demographics_result(samples: Sequence[Sample], rows: Sequence[SampleRow], tones: Sequence[str]) -> Part:
    """The rates over all photos that could be opened; one without a face counts as no false alarm."""
    judged = list(zip(samples, rows, strict=True))
    opened = [i for i, row in enumerate(rows) if row.said]
    columns = {"tone": list(tones)} | {c: [value_of(s, c) for s in samples] for c in ("sex", "age", "source")}
    table = {name: _by(judged, opened, values) for name, values in columns.items() if any(values)}
    sources = sorted({samples[i].source for i in opened if samples[i].source})
    within = {s: _by(judged, [i for i in opened if samples[i].source == s], tones) for s in sources}
    return {
        "headline": {"false_alarms": share([judged[i] for i in opened], called_fake)},
        "by": table,
        "not_recorded": [name for name, values in columns.items() if not any(values)],
        "tone_within_source": within,
        "unscored": unscored(rows, [row.p_fake for row in rows]),
    }


def _by(judged: Sequence[Judged], at: Sequence[int], values: Sequence[str]) -> Part:
    """Each value's rate of false alarms, and how much higher it is than that of all other values together."""
    table: Part = {}
    for value in sorted({values[i] for i in at} - {""}):
        rate = share([judged[i] for i in at if values[i] == value], called_fake)
        others = share([judged[i] for i in at if values[i] not in ("", value)], called_fake)
        table[value] = {"false_alarms": rate, "above_the_others": stats.rate_difference(rate, others)}
    return table


TASK = Task(
    "demographics", "1", "image", "false alarms on real photos by skin tone, sex and age", run,
    needs=lambda s: s.label == "real", truth="the label real",
)  # fmt: skip
