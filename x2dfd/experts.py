"""Experts: conventional detectors that look where the MLLM is weak, and the registry that finds them.

An expert is a class with a `card` and a method `judge`. It is registered in `BUILTIN` or `PUBLISHED` below, or by an
installed package in the entry point group `x2dfd.experts`. It is imported only when it is needed.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from x2dfd.errors import InputError, SetupError, UnknownName, X2DFDError
from x2dfd.files import parse_json, write_text
from x2dfd.types import KINDS, Card, Evidence, Face
from x2dfd.worker import Worker

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BUILTIN: dict[str, str] = {
    "tower": "external_detectors.tower:Tower",
    "clip-probe": "external_detectors.clip_probe:ClipProbe",
    "clip-cues": "external_detectors.clip_cues:ClipCues",
}
DEFAULT: tuple[str, ...] = ("tower",)
"""Experts whose scores a prompt states by default, in that order; also those of a model without an adapter."""
PUBLISHED: dict[str, str] = {
    "mesonet": "external_detectors.mesonet:MesoNet",
    "aligned-forensics": "external_detectors.published:AlignedForensics",
    "swinv2-blending": "external_detectors.published:SwinV2Blending",
    "universal-fake-detect": "external_detectors.published:UniversalFakeDetect",
}
"""Loaders of third parties' weights. The weights are a user's own: nothing ships them, nothing uses them by default."""

GROUP = "x2dfd.experts"


@dataclass(frozen=True, eq=False)
class Shared:
    """Results for a batch of faces that an expert may reuse."""

    tower_states: tuple[Tensor, ...] | None = None
    """Hidden states of a CLIP tower of the base's shape, embeddings first: each [n, 1 + patches, 768], fp32."""
    tower: str = ""
    """SHA-256 of the additions that the tower carries; it then saw `closer` views (x2dfd.tower), whose points follow
    from `CLOSER_MATRIX`. "" for the base's own tower, which saw the crops."""
    tower_dtype: torch.dtype | None = None
    """Of the tower's matrix products, for experts that run a tower of their own; None leaves it to them."""


@runtime_checkable
class Expert(Protocol):
    """The interface of a plug-in. Its constructor loads the weights and may raise SetupError.

    An expert whose weights may be replaced takes `folder: Path`, which holds `<name>.card.json` and the file that it
    names. If a card's `covers` names classes of forgeries, its "real" clears a face of their kinds alone.
    """

    card: ClassVar[Card]

    def judge(self, faces: Sequence[Face], shared: Shared | None = None) -> list[Evidence]:
        """One Evidence a face, in order: a score in [0, 1], or None and the reason. Never raises for a face."""
        ...


def _targets() -> dict[str, str]:
    """Every registered name and its class ("module:attribute"). Raises X2DFDError when two claim one name."""
    targets = BUILTIN | PUBLISHED
    for entry in entry_points(group=GROUP):
        if targets.get(entry.name, entry.value) != entry.value:
            raise X2DFDError(
                f"expert {entry.name!r} is registered twice: {targets[entry.name]} and {entry.value}",
                code="expert_registered_twice",
            )
        targets[entry.name] = entry.value
    return targets


def names() -> list[str]:
    """All registered names: ours, then the loaders of published weights, then those of installed packages."""
    return list(_targets())


def expert_class(name: str) -> type[Expert]:
    """The class registered under `name`; imports its module. Raises UnknownName, SetupError."""
    targets = _targets()
    if name not in targets:
        raise UnknownName("expert", name, targets)
    return _imported(name, targets[name])


def _imported(name: str, target: str) -> type[Expert]:
    module, _, attribute = target.partition(":")
    try:
        cls: type[Expert] = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a plug-in's file may fail in any way when it is run
        raise SetupError(
            f"expert {name!r} cannot be imported from {target}: {type(error).__name__}: {error}",
            code="expert_import_failed",
        ) from error
    return cls


def card_of(name: str, folder: Path | None = None) -> Card:
    """The card of an expert's own weights, or of those in `folder` if it holds `<name>.card.json`.

    Raises UnknownName, SetupError.
    """
    card_file = folder / f"{name}.card.json" if folder else None
    return read_card(card_file) if card_file and card_file.is_file() else expert_class(name).card


def load_expert(name: str, folder: Path | None = None) -> Expert:
    """The expert, ready to judge, with its own weights, or those in `folder` if it holds `<name>.card.json`.

    An expert of an installed package is loaded in a separate process: see `PlugIn`. Raises UnknownName, SetupError.
    """
    if name in _targets() and name not in BUILTIN | PUBLISHED:
        return PlugIn(name, folder)
    return _load(name, folder)


def _load(name: str, folder: Path | None) -> Expert:
    cls = expert_class(name)
    if folder is None or not (folder / f"{name}.card.json").is_file():
        expert = cls()
    elif not inspect.signature(cls).parameters:
        raise SetupError(
            f"{folder} holds a card of expert {name!r}, which takes no weights but its own",
            code="expert_without_weights",
        )
    else:
        expert = cls(folder)  # type: ignore[call-arg]
    if expert.card.name != name:  # a calibration would look for its score under one name and find none
        raise SetupError(
            f"expert {name!r} has the card of {expert.card.name!r}: card and entry point of a plug-in must have the "
            "same name",
            code="expert_name_differs",
        )
    return expert


PLUGIN_SECONDS = 300.0  # of the clock, for loading and for each batch of faces
LIST_SECONDS = 60.0  # for the import alone, when experts are listed
_PLUGIN_TRIES = 2  # batches in which it may hang or die before it is not asked again


class PlugIn:
    """An expert of an installed package in a separate process, which is ended if it hangs or crashes.

    The faces of that batch then get the reason instead of a score; after `_PLUGIN_TRIES` such batches, all faces do.
    """

    card: ClassVar[Card]  # of the weights that it loaded

    def __init__(self, name: str, folder: Path | None = None) -> None:
        """Raises SetupError if it cannot be loaded, or not in time."""
        self._source = name, folder
        self._failures = 0
        self._worker = Worker(None, None, clock=PLUGIN_SECONDS, doing=f"expert {name!r}", module=__name__)
        try:
            self.card = self._worker.call(_card_in_worker, *self._source)  # type: ignore[misc]
        except InputError as error:
            raise SetupError(f"expert {name!r} cannot be loaded: {error.reason}", code="expert_load_failed") from error

    def judge(self, faces: Sequence[Face], shared: Shared | None = None) -> list[Evidence]:
        """As `Expert.judge`, through `ask` in the other process."""
        reason = "the expert hung or crashed twice, so it is not asked again"
        if self._failures < _PLUGIN_TRIES:
            try:
                return self._worker.call(_ask_in_worker, *self._source, list(faces), shared)
            except InputError as error:
                self._failures += 1
                reason = error.reason
        return [Evidence(self.card.name, None, reason)] * len(faces)


_loaded = cache(_load)  # the plug-in, in its process


def _card_in_worker(name: str, folder: Path | None) -> Card:
    return _loaded(name, folder).card


def _ask_in_worker(name: str, folder: Path | None, faces: list[Face], shared: Shared | None) -> list[Evidence]:
    return ask(_loaded(name, folder), faces, shared)


def aliased(text: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """The experts' names in "alias=name,name", and by name the alias that a prompt uses instead.

    Raises X2DFDError if two would have one name. It does not check that the experts exist.

    >>> aliased("blending=swinv2-blending,tower")
    (('swinv2-blending', 'tower'), {'swinv2-blending': 'blending'})
    """
    pairs = [part.strip().rpartition("=") for part in text.split(",") if part.strip()]
    names = tuple(name for _, _, name in pairs)
    prompt_names = [alias or name for alias, _, name in pairs]
    if len(set(names)) < len(names) or len(set(prompt_names)) < len(prompt_names):
        raise X2DFDError(f"experts {text!r}: an expert or an alias is named twice", code="expert_twice")
    return names, {name: alias for alias, _, name in pairs if alias}


def ask(expert: Expert, faces: Sequence[Face], shared: Shared | None = None) -> list[Evidence]:
    """The expert's evidence for each face: the checked answers of `judge`.

    If it raises, or does not return one Evidence a face, it gets the faces one by one. A face with which it still
    fails, or whose score is outside of [0, 1], gets a note with the reason instead of a score. An X2DFDError and the
    lack of memory are raised: a user can mend either, while a stored row would keep lacking the score.
    """
    name = expert.card.name
    try:
        return _checked(name, list(expert.judge(faces, shared)), len(faces))
    except (X2DFDError, MemoryError):
        raise
    except Exception as error:  # a plug-in may raise anything; it becomes the face's note
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be imported here
            raise
        if len(faces) > 1:
            return [e for k, face in enumerate(faces) for e in ask(expert, [face], _shared_of_face(shared, k))]
        return [Evidence(name, None, f"the expert failed: {type(error).__name__}: {error}")] * len(faces)


def _shared_of_face(shared: Shared | None, k: int) -> Shared | None:
    if shared is None or shared.tower_states is None:
        return shared
    return replace(shared, tower_states=tuple(states[k : k + 1] for states in shared.tower_states))


def _checked(name: str, answers: list[Evidence], n: int) -> list[Evidence]:
    """The answers under the expert's own name, with plain numbers. Raises ValueError and TypeError."""
    if len(answers) != n:
        raise ValueError(f"{len(answers)} answers for {n} faces")
    evidence = []
    for e in answers:
        if not isinstance(e, Evidence):
            raise TypeError(f"{type(e).__name__} instead of Evidence")
        score = None if e.score is None else float(e.score)
        if score is not None and not 0 <= score <= 1:
            evidence.append(Evidence(name, None, f"the expert's score {score} is not a probability"))
            continue
        if not isinstance(e.note, str | None):
            raise TypeError(f"its note is {type(e.note).__name__} instead of text")
        notes = [e.note] if e.note else []
        kinds = {k: float(v) for k, v in e.kinds.items() if score is not None}
        if not all(k in KINDS and 0 <= v <= 1 for k, v in kinds.items()):
            kinds = {}
            notes.append("its numbers for the kinds of fake are not probabilities and were dropped")
        cues = tuple(replace(c, score=None if c.score is None else float(c.score)) for c in e.cues)
        cells = tuple(tuple(float(v) for v in row) for row in e.map)
        no_photo = None if e.no_photo is None else float(e.no_photo)
        if not all(0 <= v <= 1 for v in (*(c.score or 0.0 for c in cues), *(v for row in cells for v in row))):
            cues, cells = (), ()
            notes.append("its cues and map hold other numbers than probabilities and were dropped")
        if no_photo is not None and not 0 <= no_photo <= 1:
            notes.append(f"its P(no photograph) {no_photo} is not a probability and was dropped")
            no_photo = None
        evidence.append(Evidence(name, score, "; ".join(notes) or None, cues, cells, kinds, no_photo))
    return evidence


def cards(some: Collection[str] | None = None) -> dict[str, Card | SetupError]:
    """The cards of the registered experts, or of `some`, without loading weights; an error in place of a missing one.

    A plug-in is imported in a separate process within LIST_SECONDS.
    """
    result: dict[str, Card | SetupError] = {}
    for name, target in _targets().items():
        if some is not None and name not in some:
            continue
        try:
            result[name] = _card(name, target) if name in BUILTIN | PUBLISHED else _card_from_worker(name, target)
        except SetupError as error:
            result[name] = error
    return result


def _card(name: str, target: str) -> Card:
    try:
        return _imported(name, target).card
    except AttributeError as error:
        raise SetupError(f"expert {name!r} has no card: {error}", code="expert_card_missing") from error


def _card_from_worker(name: str, target: str) -> Card:
    worker = Worker(None, None, clock=LIST_SECONDS, doing=f"expert {name!r}", module=__name__)
    try:
        return worker.call(_card, name, target)
    except InputError as error:
        raise SetupError(f"expert {name!r} cannot be listed: {error.reason}", code="expert_import_failed") from error
    finally:
        worker.close()


def read_card(path: Path) -> Card:
    """Read a card file (JSON). Raises SetupError when it is absent or incomplete."""
    try:
        return Card.from_dict(parse_json(path.read_bytes()))
    except (OSError, ValueError) as error:  # not there, not JSON or not UTF-8, not a card
        raise SetupError(f"card {path} cannot be read: {error}", code="expert_card_unreadable") from error


def write_card(path: Path, card: Card) -> None:
    """Write a card whole or not at all."""
    write_text(path, json.dumps(card.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def availability(name: str) -> str | None:
    """None if the expert can be loaded, else the command that gets the missing part, or the reason."""
    try:
        load_expert(name)
    except SetupError as error:
        text = str(error)
        return text.rsplit(": ", 1)[-1] if "x2dfd fetch" in text else text
    except Exception as error:  # a plug-in may fail in any way; the list of the others is still wanted
        return f"{type(error).__name__}: {error}"
    return None
