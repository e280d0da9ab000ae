"""The case record: a run's reports as one JSON file, and `verify`, which judges a file anew and compares."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from x2dfd.errors import SetupError, X2DFDError
from x2dfd.experts import cards
from x2dfd.types import Card, Failure, Report

if TYPE_CHECKING:
    from x2dfd.detector import Detector

FORMAT = "x2dfd case record 1"
NOT_PROOF = "This is a statistical estimate, not proof: do not accuse a person or clear a picture on it alone."
LIMITS = {
    "The estimate": "A probability fitted on pictures with known answers, forged and real taken as equally likely "
    "beforehand. It holds for pictures like those; for other cameras, other kinds of forgery or heavy compression it "
    "can be off in either direction.",
    "The likelihood ratio": "How many times as frequent such a score is among the forged as among the real pictures of "
    "one named run. It says nothing of how likely a forgery was before the picture was looked at, and it is bounded by "
    "what a run of that size can support.",
    "Inconclusive": "A real answer: the models are wrong too often at such scores. It means neither slightly fake nor "
    "slightly real.",
    "The explanation": "Text from a language model that was told the answer and the experts' scores. Look at the named "
    "areas yourself.",
    "Experts": "Separate detectors with different blind spots. Each sees some kinds of forgery and misses others, so "
    "they may disagree.",
    "Only faces": "Bodies, backgrounds, captions and the context of a picture are not examined. A real photo can still "
    "mislead.",
}
NEXT_STEPS = (
    "Look for the earliest copy by reverse image search, and see who published it.",
    "Ask for the original file from the camera, and judge that: copies lose traces and Content Credentials.",
    "Compare with other pictures of the same person, place and moment.",
    "Look at the named areas at full size, and let a person who knows the face look too.",
    "Several independent findings weigh more than one number: say which of them you have.",
)

Outcome = Literal["holds", "differs", "other_model"]
EXIT_CODES: dict[Outcome, int] = {"holds": 0, "differs": 3, "other_model": 4}


@dataclass(frozen=True)
class Verification:
    """Whether a record still says what judging the file gives."""

    outcome: Outcome
    differences: tuple[str, ...]  # what speaks against it, in plain words
    notes: tuple[str, ...]  # what could not be compared, and does not count


def record(results: Sequence[Report | Failure]) -> dict[str, Any]:
    """The case record as plain values, sealed."""
    named = {e.expert for r in results if isinstance(r, Report) for f in r.faces for e in f.evidence}
    made: dict[str, Any] = {
        "format": FORMAT,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "statement": NOT_PROOF,
        "reports": [r.to_dict() for r in results],
        "cards": {name: card.to_dict() for name, card in cards().items() if name in named and isinstance(card, Card)},
        "limits": LIMITS,
        "next_steps": list(NEXT_STEPS),
    }
    return made | {"seal": seal(made)}


def dumps(results: Sequence[Report | Failure]) -> str:
    """The case record as text, an end of line last."""
    return json.dumps(record(results), ensure_ascii=True, indent=1, allow_nan=False) + "\n"


def seal(made: dict[str, Any]) -> str:
    """SHA-256 over everything but the seal: it shows a careless edit. A forger makes a new one, and meets `verify`."""
    content = {key: value for key, value in made.items() if key != "seal"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def read(path: Path) -> dict[str, Any]:
    """A case record. Raises X2DFDError when the file is none."""
    try:
        made = json.loads(path.read_text("utf-8"))
        if made["format"] != FORMAT or not isinstance(made["reports"], list) or not isinstance(made["seal"], str):
            raise ValueError("it is of another format")
        for report in made["reports"]:
            shapes = {"model": dict, "media": dict, "provenance": dict, "faces": list}
            if not all(isinstance(report.get(key, kind()), kind) for key, kind in shapes.items()):
                raise ValueError("a report in it has another shape")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise X2DFDError(
            f"{path} is no case record ({error!r}); `x2dfd detect FILE --report NAME.html` writes NAME.case.json"
        ) from error
    return dict(made)


def stated_about(made: dict[str, Any], sha256: str | None) -> dict[str, Any] | None:
    """The record's report about a file of that hash."""
    return next((r for r in made["reports"] if isinstance(r, dict) and r.get("sha256") == sha256), None)


def verify(made: dict[str, Any], file: Path, detector: Detector) -> Verification:
    """Judge `file` anew and compare with the record. The detector must be in the mode that the record states."""
    differences, notes = [], []
    if made["seal"] != seal(made):
        differences.append("the record was changed after it was written: its seal does not fit")
    quick = next(iter(detector.detect_many([file], rationale=False)))
    stated = stated_about(made, quick.sha256)
    if stated is None:
        known = ", ".join(f"{r.get('path')} ({str(r.get('sha256'))[:12]}…)" for r in made["reports"])
        told = "the file has SHA-256 " + str(quick.sha256) + f", and the record is about {known or 'no file'}"
        return Verification("differs", (*differences, told), ())
    if "error" in stated or isinstance(quick, Failure):
        differences += _differing("", stated, quick.to_dict())
        return Verification("differs" if differences else "holds", tuple(differences), ())
    other = list(_differing("", _model(stated), _model(quick.to_dict()), exactly=True))
    if other:
        lines = [f"another model answers here than the record states: {line}" for line in other]
        return Verification("differs" if differences else "other_model", (*differences, *lines), ())
    try:
        wordy = any(face["rationale"] for face in stated["faces"])
    except (KeyError, TypeError):
        wordy = False
    fresh = detector.explain(quick, file) if wordy else quick
    expected = fresh.to_dict()
    notes += [f"versions: {line}" for line in _differing("", stated.get("versions"), fresh.versions, exactly=True)]
    states = [(r.get("provenance") or {}).get("state") for r in (stated, expected)]
    if "not_checked" in states and states[0] != states[1]:
        notes.append(f"Content Credentials: the record states {states[0]}, and here they are {states[1]}")
        stated, expected = stated | {"provenance": None}, expected | {"provenance": None}
    differences += _differing("cards", made.get("cards"), _cards_in(made, record([fresh])["cards"]), exactly=True)
    differences += _differing("", _comparable(stated), _comparable(expected))
    return Verification("differs" if differences else "holds", tuple(differences), tuple(notes))


def _cards_in(made: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """The fresh cards, beside those of experts that only other reports of the record name."""
    others = {name: card for name, card in (made.get("cards") or {}).items() if name not in fresh}
    return others | fresh


def _model(report: dict[str, Any]) -> dict[str, Any]:
    """What has to be the same for two answers to be compared: weights, prompt and mode; not the text about them."""
    keys = ("base", "adapter_sha256", "layers", "prompt_sha256", "crops_through", "experts", "mode")
    model = report.get("model")
    return {key: model.get(key) for key in keys} if isinstance(model, dict) else {}


def _comparable(report: dict[str, Any]) -> dict[str, Any]:
    """Without what another run, place, machine or copy may change: path, times, versions, device."""
    kept = {key: value for key, value in report.items() if key not in ("path", "timings", "versions")}
    if isinstance(kept.get("model"), dict):
        kept["model"] = {key: value for key, value in kept["model"].items() if key != "runs_on"}
    if isinstance(kept.get("media"), dict):
        kept["media"] = {key: value for key, value in kept["media"].items() if key != "modified"}
    return kept


def _differing(where: str, stated: Any, found: Any, *, exactly: bool = False) -> Iterator[str]:
    """Places at which two plain values differ. Numbers may differ by what another batch or processor changes."""
    if isinstance(stated, dict) and isinstance(found, dict):
        for key in [*found, *(k for k in stated if k not in found)]:
            yield from _differing(
                f"{where}.{key}" if where else str(key), stated.get(key), found.get(key), exactly=exactly
            )
    elif isinstance(stated, list | tuple) and isinstance(found, list | tuple):
        if len(stated) != len(found):
            yield f"{where}: the record holds {len(stated)} entries, and here there are {len(found)}"
        for i, (a, b) in enumerate(zip(stated, found, strict=False)):
            yield from _differing(f"{where}[{i}]", a, b, exactly=exactly)
    elif _number(stated) and _number(found) and not exactly:
        if not math.isclose(stated, found, rel_tol=1e-3, abs_tol=2e-3):
            yield f"{where}: the record states {stated}, and here it is {found}"
    elif stated != found or isinstance(stated, bool) != isinstance(found, bool):
        yield f"{where}: the record states {_short(stated)}, and here it is {_short(found)}"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) < 100 else f"{text[:96]} …"


def mode_stated(made: dict[str, Any]) -> Literal["calibrated", "paper"]:
    """The mode in which the record's files were judged. Raises SetupError when it states two, or none that is known."""
    modes = {(r.get("model") or {}).get("mode") for r in made["reports"] if isinstance(r, dict) and "error" not in r}
    if modes <= {"calibrated"}:
        return "calibrated"
    if modes == {"paper"}:
        return "paper"
    raise SetupError(f"the record states the modes {sorted(map(str, modes))}; it cannot be judged anew in one run")
