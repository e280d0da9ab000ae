"""The case record: a run's reports as one JSON file, and `verify`, which judges a file anew and compares."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeGuard, get_args

from x2dfd.answer import LIMITS, NEXT_STEPS, NOT_PROOF
from x2dfd.errors import SetupError, X2DFDError, first_line
from x2dfd.experts import cards
from x2dfd.files import Json, json_sha256, parse_json
from x2dfd.model_spec import Dtype, Mode
from x2dfd.paths import shown_names
from x2dfd.provenance import CREDENTIALS
from x2dfd.types import MAX_FRAMES, Card, Failure, ModelInfo, Report, frames_asked, renamed

if TYPE_CHECKING:
    from x2dfd.detector import Detector

FORMAT = "x2dfd case record 1"
Outcome = Literal["holds", "differs", "other_version", "other_file"]
EXIT_CODES: dict[Outcome, int] = {"holds": 0, "differs": 3, "other_version": 4, "other_file": 5}

SCORING = (
    "base", "adapter_sha256", "layers", "prompt_sha256", "crops_through", "experts", "in_prompt", "aliases",
    "score_form", "temperature", "mode", "calibration_sha256", "validation_sha256",
)  # fmt: skip
"""Facts of a model that two answers must share to be compared. Beside them: the name in `served`, and `runs_on`."""
WORDING = re.compile(
    r"(model\.(name|blind_spot|licence|held_out)|cards\.[^.]+\.(?!sha256|version)\w+|limits|next_steps|statement|warnings"
    r"|media\.notes|(faces\[\d+\]\.)?evidence\[\d+\]\.note|faces\[\d+\]\.contradictions"
    r"|likelihood_ratio\.(reason|propositions)|provenance\.(reason|statements\[\d+\]\.says)|error\.reason)\b"
)
"""Places of a record whose text another version of the program may word otherwise; what was found stands elsewhere."""
KEYS = {"format", "made", "statement", "reports", "cards", "limits", "next_steps", "seal"}


@dataclass(frozen=True)
class Verification:
    """Whether a record still says what judging the file gives."""

    # `other_version`: what differs can come from another model or wording here, not only from edits; `other_file`: the
    # record, whose seal fits, is about files with other bytes
    outcome: Outcome
    differences: tuple[str, ...]  # what does not come out again, in plain words
    notes: tuple[str, ...]  # what could not be compared, and does not count
    unchecked: int = 0  # reports of the record that are about other files


def record(results: Sequence[Report | Failure]) -> Json:
    """The case record as plain values, sealed. Its paths are those of the page: `verify` needs the SHA-256 alone."""
    experts = {e.expert for r in results if isinstance(r, Report) for f in r.faces for e in f.evidence}
    contents: Json = {
        "format": FORMAT,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "statement": NOT_PROOF,
        "reports": [r.to_dict() for r in renamed(results, shown_names([r.path for r in results]))],
        "cards": {name: card.to_dict() for name, card in cards(experts).items() if isinstance(card, Card)},
        "limits": LIMITS,
        "next_steps": list(NEXT_STEPS),
    }
    return contents | {"seal": seal(contents)}


def dumps(results: Sequence[Report | Failure]) -> str:
    """The case record as text, an end of line last."""
    return json.dumps(record(results), ensure_ascii=True, indent=1, allow_nan=False) + "\n"


def seal(case: Json) -> str:
    """SHA-256 over everything but the seal: it shows a careless edit. A forger makes a new one, and meets `verify`."""
    return json_sha256({key: value for key, value in case.items() if key != "seal"})


def read(path: Path) -> Json:
    """A case record. Raises X2DFDError when the file is none."""
    try:
        case = parse_json(path.read_bytes())
        if case["format"] != FORMAT or not isinstance(case["reports"], list) or not isinstance(case["seal"], str):
            raise ValueError("its format is another")
        for report in case["reports"]:
            shapes = {"model": dict, "media": dict, "provenance": dict, "faces": list}
            if not all(isinstance(report.get(key, kind()), kind) for key, kind in shapes.items()):
                raise ValueError("a report in it has another shape")
        if not isinstance(case.get("cards", {}), dict):
            raise ValueError("its cards have another shape")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
            why = "it is not JSON"
        else:
            why = first_line(error) if isinstance(error, OSError | ValueError) else "its format is another"
        raise X2DFDError(
            f"{path} is not a case record ({why}). "
            "`x2dfd detect FILE --report NAME.html` writes one as NAME.case.json, beside the page",
            code="not_a_case_record",
        ) from error
    return dict(case)


def _experts_named(case: Json) -> set[str]:
    """The experts whose evidence stands in any report of the record, which may hold anything."""

    def entries(holder: object, key: str) -> list[object]:
        held = holder.get(key) if isinstance(holder, dict) else None
        return held if isinstance(held, list) else []

    evidence = (e for r in case["reports"] for face in entries(r, "faces") for e in entries(face, "evidence"))
    return {str(e.get("expert")) for e in evidence if isinstance(e, dict)}


def _frames_stated(stated: Json) -> int | None:
    """How many frames of a clip the report is about; None of a picture, and where it is no number."""
    try:
        frames = frames_asked(stated["media"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return frames if frames is not None and 1 <= frames <= MAX_FRAMES else None


def verify(made: Json, file: Path, detector: Detector) -> Verification:
    """Judge `file` anew and compare with the record. The detector must be in the mode that the record states.

    A changed finding speaks against the record; another model, calibration or wording leaves it unconfirmed, and so
    does a file that it is not about. Reports about other files are counted, not checked.
    """
    changed: list[str] = []
    if made["seal"] != seal(made):
        changed.append("the record was changed after it was written: its seal does not fit")
    changed += [f"{key}: a case record has no such entry" for key in made if key not in KEYS]
    quick = next(iter(detector.detect_many([file], rationale=False)))
    if isinstance(quick, Failure) and quick.sha256 is None:
        raise X2DFDError(
            f"{file} cannot be read ({quick.reason}), so the record cannot be checked", code="picture_unreadable"
        )
    reports = [r for r in made["reports"] if r.get("sha256") == quick.sha256]  # several: a run judged copies of it
    if not reports:
        known = ", ".join(f"{r.get('path')} ({str(r.get('sha256'))[:12]}…)" for r in made["reports"][:3])
        known += f" and {len(made['reports']) - 3} more" if len(made["reports"]) > 3 else ""
        line = f"the file has SHA-256 {quick.sha256}, and the record is about {known or 'no file'}"
        return Verification("differs" if changed else "other_file", (*changed, line), ())
    verification = _compared(made, reports, file, quick, detector, changed)
    return replace(verification, unchecked=len(made["reports"]) - len(reports))


def _compared(
    made: Json, reports: Sequence[Json], file: Path, quick: Report | Failure, detector: Detector, changed: list[str]
) -> Verification:
    """Compare the record's reports about a file, and what stands around them, with the file judged anew.

    `quick`: the file's result without a rationale; `changed`: what speaks against the record already.
    """
    other: list[str] = []
    notes: list[str] = []
    stated = reports[0]
    for double in reports[1:]:
        lines = _differing("", _comparable(stated), _comparable(double))
        changed += [f"two reports of the record are about this file and differ: {place}" for place, _ in lines]
    asked = _frames_stated(stated)
    if isinstance(quick, Report) and asked and asked != frames_asked(quick.media):
        quick = next(iter(detector.detect_many([file], rationale=False, frames=asked)))
    if "error" in stated or isinstance(quick, Failure):
        _sort(_differing("", _comparable(stated), _comparable(quick.to_dict())), changed, other)
        return _outcome(changed, other, notes)
    models = _scoring(stated), _scoring(quick.to_dict())
    other += [f"another model answers here: {line}" for _, line in _differing("", *models, exactly=True)]
    if other:
        return _outcome(changed, other, notes)
    try:
        wordy = any(face["rationale"] for face in stated["faces"])
    except (KeyError, TypeError):
        wordy = False
    fresh = detector.explain(quick, file) if wordy else quick
    expected = fresh.to_dict()
    notes += [f"versions: {line}" for _, line in _differing("", stated.get("versions"), fresh.versions, exactly=True)]
    notes += [
        f"model: {line}"
        for key in ("runs_on", "served")
        for _, line in _differing(key, stated["model"].get(key), fresh.model.get(key), exactly=True)
    ]
    states = [(r.get("provenance") or {}).get("state") for r in (stated, expected)]
    if "not_checked" in states and states[0] != states[1]:
        notes.append(f"Content Credentials: the record states {states[0]}, and here they are {states[1]}")
        stated, expected = _without_credentials(stated), _without_credentials(expected)
    again = record([fresh])
    named = _experts_named(made)  # some only by other reports of the record
    again["cards"] = {k: card for k, card in (made.get("cards") or {}).items() if k in named} | again["cards"]
    frame = ("statement", "cards", "limits", "next_steps")
    around = ({key: whole.get(key) for key in frame} for whole in (made, again))
    _sort(_differing("", *around, exactly=True), changed, other)
    _sort(_differing("", _comparable(stated), _comparable(expected)), changed, other)
    return _outcome(changed, other, notes)


def _without_credentials(report: Json) -> Json:
    """The report with nothing of its provenance but what the metadata state."""
    statements = (report.get("provenance") or {}).get("statements")
    entries = statements if isinstance(statements, list) else []
    own = [s for s in entries if not (isinstance(s, dict) and str(s.get("where")).startswith(CREDENTIALS))]
    return report | {"provenance": {"statements": own}}


def _sort(differences: Iterable[tuple[str, str]], changed: list[str], other: list[str]) -> None:
    """Differences of wording to `other`, of findings to `changed`."""
    for place, line in differences:
        if WORDING.match(place):
            other.append(f"worded otherwise here: {line}")
        else:
            changed.append(line)


def _outcome(changed: Sequence[str], other: Sequence[str], notes: Sequence[str]) -> Verification:
    outcome: Outcome = "differs" if changed else "other_version" if other else "holds"
    return Verification(outcome, (*changed, *other), tuple(notes))


def _scoring(report: Json) -> Json:
    """What has to be the same for two answers to be compared; not the text about it, nor where a server stands."""
    model = report.get("model")
    if not isinstance(model, dict):
        return {}
    served, runs_on = model.get("served"), str(model.get("runs_on"))
    return {key: model.get(key) for key in SCORING} | {
        "served": served.get("model") if isinstance(served, dict) else None,
        "runs_on": "fp32" if runs_on.endswith("fp32") else runs_on,  # shorter numbers round otherwise on other devices
    }


def _comparable(report: Json) -> Json:
    """Without what another run, place, machine or copy may change: path, times, versions, device, address."""
    rest = {key: value for key, value in report.items() if key not in ("path", "timings", "versions")}
    if isinstance(rest.get("model"), dict):
        rest["model"] = {key: value for key, value in rest["model"].items() if key not in ("runs_on", "served")}
    if isinstance(rest.get("media"), dict):
        rest["media"] = {key: value for key, value in rest["media"].items() if key != "modified"}
    return rest


def _differing(place: str, stated: object, current: object, *, exactly: bool = False) -> Iterator[tuple[str, str]]:
    """Places at which two plain values differ, each with a line about it.

    Numbers, but not whole ones, may differ by what another batch or processor changes.
    """
    if isinstance(stated, dict) and isinstance(current, dict):
        for key in [*current, *(k for k in stated if k not in current)]:
            yield from _differing(
                f"{place}.{key}" if place else str(key), stated.get(key), current.get(key), exactly=exactly
            )
    elif isinstance(stated, list | tuple) and isinstance(current, list | tuple):
        if len(stated) != len(current):
            yield place, f"{place}: the record holds {len(stated)} entries, and here there are {len(current)}"
        for i, (a, b) in enumerate(zip(stated, current, strict=False)):
            yield from _differing(f"{place}[{i}]", a, b, exactly=exactly)
    elif _number(stated) and _number(current) and not exactly and float in (type(stated), type(current)):
        if not math.isclose(stated, current, rel_tol=1e-3, abs_tol=2e-3):
            yield place, f"{place}: the record states {stated}, and here it is {current}"
    elif stated != current or isinstance(stated, bool) != isinstance(current, bool):
        yield place, f"{place}: the record states {_short(stated)}, and here it is {_short(current)}"


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) < 100 else f"{text[:96]} …"


def another_adapter(case: Json, info: ModelInfo) -> bool:
    """Whether a report of the record names an adapter that is not this model's."""
    models = (r.get("model") or {} for r in case["reports"] if "error" not in r)
    return any(model.get("adapter_sha256") != info.adapter_sha256 for model in models)


def precision_stated(case: Json) -> Dtype | None:
    """The precision in which a model of this machine judged the record's files; None when it names none, or several."""
    devices = {str((r.get("model") or {}).get("runs_on", "")) for r in case["reports"]}
    precisions: list[Dtype] = [
        dtype for dtype in get_args(Dtype) if any(dtype in text.replace(",", " ").split() for text in devices)
    ]
    return precisions[0] if len(precisions) == 1 else None


def mode_stated(case: Json) -> Mode:
    """The mode in which the record's files were judged. Raises SetupError when it states two, or none that is known."""
    # A mode may be anything that JSON holds, a list too, which no set does.
    modes = {json.dumps((r.get("model") or {}).get("mode")).strip('"') for r in case["reports"] if "error" not in r}
    if modes <= {"calibrated"}:
        return "calibrated"
    if modes == {"paper"}:
        return "paper"
    raise SetupError(
        f"the record states the modes {sorted(modes)}; its files cannot be judged anew in one run", code="modes_mixed"
    )
