"""The questions of an assessment, its pictures, and the answers, which are saved on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from x2dfd.errors import X2DFDError
from x2dfd.files import Json, atomic_write, checked, parse_json
from x2dfd.progress import progress
from x2dfd.row_parts import RowParts
from x2dfd.types import Cue

if TYPE_CHECKING:
    from x2dfd.crops import CropSet
    from x2dfd.mllm import YesNo

BANK = Path(__file__).parents[1] / "questions.json"
"""The default questions."""

PART = 16  # images whose answers a killed run can lose

Floats = NDArray[np.float64]
Pair = tuple[str, str]
"""A cue: area, artifact."""


@dataclass(frozen=True)
class CueQuestion:
    """A yes/no question about one face."""

    text: str
    area: str | None  # of the cue that a yes asserts; None for a control, or when a published text names none
    artifact: str | None
    origin: str  # bank | random | published:FILE | generated:MODEL

    def __post_init__(self) -> None:
        if (self.area is None) != (self.artifact is None):
            raise ValueError(f"half a cue: {self.area} x {self.artifact}")
        if self.cue is not None:
            Cue(*self.cue)

    @property
    def cue(self) -> Pair | None:
        """Area and artifact."""
        return None if self.area is None or self.artifact is None else (self.area, self.artifact)


class Answerer(Protocol):
    """Any MLLM that answers yes/no questions about one aligned face crop [s, s, 3]."""

    name: str

    def yes_no(self, crop: NDArray[np.uint8], questions: Sequence[str], /) -> YesNo: ...


def read_questions(path: Path) -> list[CueQuestion]:
    """Read a question file of `python -m data_gen questions`. Raises X2DFDError when it is not one."""
    try:
        questions = [checked(CueQuestion, q) for q in parse_json(path.read_bytes())["questions"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise X2DFDError(
            f"{path}: not a question file ({error}); a published list becomes one by "
            f"`python -m data_gen questions --published {path} --out FILE`",
            code="questions_malformed",
        ) from error
    if not questions:
        raise X2DFDError(f"{path}: no questions", code="no_questions")
    return questions


def chosen_pictures(data: CropSet, split: str | None, limit: int | None, seed: int) -> list[int]:
    """Images to ask about, in the data's order; with `limit`, half real and half fake as far as they go.

    The choice of a smaller limit is a part of that of a larger one.
    """
    rng = np.random.default_rng([seed, 0])
    sides = {
        label: [i for i, s in enumerate(data.samples) if s.label == label and split in (None, s.split)]
        for label in ("real", "fake")
    }
    if empty := [label for label, side in sides.items() if not side]:
        scope = f" in split {split!r}" if split else ""
        raise X2DFDError(
            f"an assessment compares real and fake; there is no usable {empty[0]} image{scope}",
            code="no_picture_of_label",
        )
    if limit is not None and limit < 2:
        raise X2DFDError("--limit must be at least 2: one real, one fake", code="limit_too_small")
    order = sorted(
        (rank, label, i) for label, side in sides.items() for rank, i in enumerate(rng.permutation(side).tolist())
    )
    return sorted(i for _, _, i in order[:limit])


_TEXT, _NUMBER = pa.string(), pa.float64()
_SCHEMA = pa.schema({"id": _TEXT, "crop_sha256": _TEXT, "p_yes": pa.list_(_NUMBER), "said": pa.list_(_TEXT)})


def _saved_rows(out: Path, parts: RowParts, key: dict[str, str]) -> dict[str, Json]:
    """Answers of earlier runs in `out`, by image id."""
    batches = list(parts)
    if (table_file := out / "answers.parquet").is_file():
        table = pq.read_table(table_file)
        metadata = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        batches.insert(0, ({k: metadata.get(k) for k in key}, table.to_pylist()))
    if any(metadata != key for metadata, _ in batches):
        raise X2DFDError(
            f"{out} holds answers of another model or to other questions; choose another --out",
            code="answers_of_another_run",
        )
    return {row["id"]: row for _, rows in batches for row in rows}


def _ask(model: Answerer, crop: NDArray[np.uint8], texts: Sequence[str]) -> tuple[list[float], list[str]]:
    reply = model.yes_no(np.ascontiguousarray(crop), texts)
    p_yes, answers = np.asarray(reply.p_yes, np.float64), list(reply.answers)
    if p_yes.shape != (len(texts),) or len(answers) != len(texts):
        raise X2DFDError(
            f"{model.name} gave {p_yes.shape} probabilities and {len(answers)} answers to {len(texts)} questions",
            code="answers_malformed",
        )
    if not (np.isfinite(p_yes).all() and (p_yes >= 0).all() and (p_yes <= 1).all()):
        raise X2DFDError(f"{model.name} gave a P(yes) outside [0, 1]", code="answers_malformed")
    if invalid := set(answers) - {"yes", "no", "other"}:
        raise X2DFDError(
            f"{model.name} gave answers other than yes, no, other: {sorted(invalid)}", code="answers_malformed"
        )
    return p_yes.tolist(), answers


def ask_all(
    model: Answerer, data: CropSet, pictures: Sequence[int], texts: Sequence[str], out: Path, show: bool
) -> list[Json]:
    """Answers for the given pictures, in their order; those that an earlier run saved are not asked for again."""
    parts = RowParts(out / "answers.parts")
    key = {"model": model.name, "questions": json.dumps(list(texts), ensure_ascii=False)}
    saved = _saved_rows(out, parts, key)
    rows_by_id = {
        s.id: saved[s.id]
        for i, s in enumerate(data.samples)
        if s.id in saved and saved[s.id]["crop_sha256"] == _sha256(data, i)
    }
    repeat = next((i for i in pictures if data.samples[i].id in rows_by_id), None)
    if repeat is not None:  # two models may go by one name
        p_yes, _ = _ask(model, data.views[repeat], texts)
        if not np.allclose(p_yes, rows_by_id[data.samples[repeat].id]["p_yes"], rtol=0, atol=1e-3):
            raise X2DFDError(
                f"{out} holds answers of another model named {model.name!r}; choose another --out",
                code="answers_of_another_model",
            )
    todo = [i for i in pictures if data.samples[i].id not in rows_by_id]
    new_rows: list[Json] = []
    for n_done, i in enumerate(progress(todo, "asking") if show else todo, start=1):
        p_yes, answers = _ask(model, data.views[i], texts)
        new_rows.append({"id": data.samples[i].id, "crop_sha256": _sha256(data, i), "p_yes": p_yes, "said": answers})
        if len(new_rows) == PART or n_done == len(todo):
            parts.add(key, new_rows)
            rows_by_id.update({r["id"]: r for r in new_rows})
            new_rows = []
    # Saved answers about other pictures stay: a smaller --limit must not throw hours of work away.
    rows = [rows_by_id[s.id] for s in data.samples if s.id in rows_by_id]
    with atomic_write(out / "answers.parquet") as file:
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA.with_metadata(key)), file, use_dictionary=["said"])
    parts.clear()
    return [rows_by_id[data.samples[i].id] for i in pictures]


def _sha256(data: CropSet, i: int) -> str:
    return hashlib.sha256(data.views[i].tobytes()).hexdigest()
