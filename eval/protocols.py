"""Published protocols as manifests: `python -m eval.protocols list | write | annotations`.

A protocol names test sets; each becomes a manifest of its own for `run_bench.py`. The readers are in data_gen;
here are each protocol's sets, the clips that its makers count, and the quirks of their loader, which are off by default
(`Compat`). Formats and counts: DeepfakeBench (github.com/SCLBD/DeepfakeBench), DF40 (arXiv 2406.13495),
FaceForensics++ (arXiv 1901.08971), Celeb-DF (arXiv 1909.12962).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from data_gen.public_sets import CELEBDF, DFD, FF_METHODS, read_celebdf, read_deepfakebench, read_dfdc, read_ffpp
from data_gen.readers import (
    Group,
    Label,
    Media,
    Read,
    Reroot,
    evenly,
    finish,
    labelled,
    listed_frames,
    load_json,
    natural,
    path_parts,
    read_folders,
    read_x2dfd_lists,
    row,
)
from eval.metrics import means_by
from eval.stats import Floats, Labels
from x2dfd.cli import run_command
from x2dfd.errors import UnknownName, X2DFDError
from x2dfd.files import Json, write_text
from x2dfd.manifest import Sample, manifest_sha256, write_manifest
from x2dfd.options import names

FRAMES = 32
"""Frames per clip in DeepfakeBench and DF40. Fewer or more frames give numbers that cannot be compared."""


@dataclass(frozen=True)
class Protocol:
    """Test sets by the names of their index files, and the permitted training data."""

    name: str
    version: str
    line: str
    sets: tuple[str, ...] = ()  # index files, without `.json`; empty: the user's folders or lists say
    train: str = ""
    clips: tuple[tuple[int, int], ...] = ()  # real and fake test clips a set, where its makers count them


_FOUR = ("FF-DF", "FF-F2F", "FF-FS", "FF-NT")
_UNKNOWN = (
    *("deepfacelab", "heygen", "whichisreal", "MidJourney", "stargan", "starganv2"),
    *("styleclip", "e4e", "CollabDiff"),
)
_FF = "FaceForensics++, c23"

PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("df40-p1", "1", "same domain, other forgery", ("FSAll_ff", "FRAll_ff", "EFSAll_ff"), "one of them"),
        Protocol(
            "df40-p2",
            "1",
            "same forgery, other domain",
            ("FSAll_cdf", "FRAll_cdf", "EFSAll_cdf"),
            "FSAll_ff, FRAll_ff or EFSAll_ff",
        ),
        Protocol("df40-p3", "1", "held-out forgery, other domain", _UNKNOWN, "the FF domain of the 31 known methods"),
        Protocol("df40-p4", "1", "one against all: --sets names the index files", (), "one METHOD_ff"),
        Protocol("ffpp", "1", "four-way: each manipulation against the originals", _FOUR, _FF, ((140, 140),) * 4),
        Protocol(
            "deepfakebench",
            "1",
            "across data sets",
            ("Celeb-DF-v1", CELEBDF, "DeepFakeDetection", "DFDCP", "DFDC"),
            _FF,
            ((38, 62), (178, 340)),
        ),
        Protocol("celebdf", "1", "Celeb-DF-v2: its list of test clips", (), "anything else", ((178, 340),)),
        Protocol("dfd", "1", "DeepFakeDetection, from its folders; the same actors in every clip", (), "anything else"),
        Protocol("dfdc", "1", "DFDC, from metadata.json or labels.csv", (), "anything else"),
        Protocol("wilddeepfake", "1", "folders of clips; you say which are real", (), "anything else"),
        Protocol("deepfakeface", "1", "folders by generator; you say which are real", (), "anything else"),
        Protocol("x2dfd", "1", "X2-DFD's lists; you say which are real", (), _FF),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Compat:
    """Quirks of the stock loader and metrics, to get its numbers; all are off by default.

    Two are not reproduced: it fails on a frame whose name is no number, and when its grouping fails, it silently gives
    the frame AUC for the video AUC.
    """

    clips: bool = False  # clips are identified by their folder's name alone, so equal names merge; label int(mean)
    frames: bool = False  # take a clip's first frames instead of evenly spread ones

    @classmethod
    def parse(cls, text: str) -> Compat:
        """`clips,frames`; raises UnknownName."""
        chosen = names(text)
        for name in chosen:
            if name not in cls.__dataclass_fields__:
                raise UnknownName("quirk", name, cls.__dataclass_fields__)
        return cls(**dict.fromkeys(chosen, True))


CORRECT = Compat()


def pool_clips(samples: Sequence[Sample], labels: Labels, scores: Floats) -> tuple[list[str], Labels, Floats]:
    """The clips of `Compat.clips`, sorted by name: their names, labels [clips] and mean scores [clips]. The label of a
    mixed clip is int(mean), which is real. The right way is `eval.metrics.pool_by`."""
    names, share, pooled = means_by([s.path.parent.name for s in samples], labels, scores)
    return names, share.astype(np.int64), pooled


def sampled(samples: Sequence[Sample], frames: int | None, compat: Compat = CORRECT) -> list[Sample]:
    """At most `frames` of each clip, in natural order: evenly spread, or with `compat.frames` the first ones."""
    clips: dict[str, list[Sample]] = {}
    for s in samples:
        clips.setdefault(s.video or s.id, []).append(s)
    selected: list[Sample] = []
    for clip in clips.values():
        clip.sort(key=lambda s: natural(s.path.name))
        selected += clip[:frames] if compat.frames and frames is not None else evenly(clip, frames)
    return selected


def index_sets(
    protocol: Protocol,
    indices: Path,
    roots: Sequence[Path],
    *,
    sets: Sequence[str] = (),
    frames: int | None = FRAMES,
    compression: str = "c23",
    compat: Compat = CORRECT,
    allow_missing: bool = False,
) -> dict[str, tuple[list[Sample], list[str]]]:
    """The test split of each of a protocol's index files: samples, and notes for the summary.
    Raises X2DFDError when an index file is absent, when more than 1 % of a set's files are (unless `allow_missing`),
    and when the protocol comes without index files."""
    chosen = tuple(sets) or protocol.sets
    if not chosen:
        raise X2DFDError(f"{protocol.name} names no index files: give them with --sets A,B", code="option_missing")
    for name in sets:
        if protocol.sets and name not in protocol.sets:
            raise UnknownName(f"set of {protocol.name}", name, protocol.sets)
    absent = [name for name in chosen if not (indices / f"{name}.json").is_file()]
    if absent:
        raise X2DFDError(
            f"{protocol.name}: {indices} lacks {', '.join(f'{n}.json' for n in absent)}. To score the "
            "others, which is another protocol, name them with --sets",
            code="index_missing",
        )
    test_sets = {}
    for name in chosen:
        level = compression if _has_levels(indices / f"{name}.json") else ""
        every = None if compat.frames else frames
        read = read_deepfakebench([indices / f"{name}.json"], roots, only=("test",), compression=level, frames=every)
        read.samples = sampled(read.samples, frames, compat)
        test_sets[name] = _test_set(read, protocol, name, allow_missing)
    return test_sets


def _has_levels(file: Path) -> bool:
    """Whether the content of an index distinguishes compression levels."""

    def inside(value: object, depth: int) -> bool:
        if not isinstance(value, dict) or not value:
            return False
        if depth == 0:
            return set(value) <= {"raw", "c23", "c40"}
        return any(inside(v, depth - 1) for v in value.values())

    return inside(load_json(file), 3)


def _test_set(read: Read, protocol: Protocol, name: str, allow_missing: bool) -> tuple[list[Sample], list[str]]:
    # No split is made here, so people may appear in several clips; frames of a clip stay together.
    samples = finish(read, split="test", group=Group.clip, allow_missing=allow_missing)
    samples = [replace(s, extra=s.extra | {"protocol": protocol.name, "set": name}) for s in samples]
    clips = _clips(samples)
    notes = list(read.notes)
    at = protocol.sets.index(name) if name in protocol.sets else 0
    if at < len(protocol.clips) and tuple(clips.values()) != protocol.clips[at]:
        real, fake = protocol.clips[at]
        notes.append(
            f"{name}: {clips['real']} real and {clips['fake']} fake clips, where its makers count {real} and {fake}: "
            "numbers are not comparable with published ones"
        )
    return samples, notes


def _clips(samples: Sequence[Sample]) -> dict[str, int]:
    """The number of clips by label."""
    return {label: len({s.video for s in samples if s.video and s.label == label}) for label in ("real", "fake")}


def write_sets(
    protocol: Protocol, sets: Mapping[str, tuple[list[Sample], list[str]]], out: Path, compat: Compat
) -> Path:
    """Writes a manifest for each set, and `protocol.json` with their counts and hashes, whose path it returns."""
    card: Json = {
        "protocol": protocol.name,
        "version": protocol.version,
        "line": protocol.line,
        "may_be_trained_on": protocol.train,
        "compat": [name for name in Compat.__dataclass_fields__ if getattr(compat, name)],
        "sets": {},
    }
    for name, (samples, notes) in sets.items():
        manifest = out / f"{name}.jsonl"
        write_manifest(manifest, samples)
        card["sets"][name] = {
            "manifest": manifest.name,
            "sha256": manifest_sha256(manifest),
            "frames": {label: sum(s.label == label for s in samples) for label in ("real", "fake")},
            "clips": _clips(samples),
            "notes": notes,
        }
    write_text(out / "protocol.json", json.dumps(card, indent=1) + "\n")
    return out / "protocol.json"


# --- annotations: texts to compare rationales with -------------------------------------------------------------------


def read_annotations(
    file: Path,
    roots: Sequence[Path],
    *,
    real: Sequence[str],
    fake: Sequence[str],
    image: str = "image",
    label: str = "label",
    question: str = "question",
    answer: str = "answer",
) -> Read:
    """Annotated pictures in a JSON list, the form of DD-VQA, SID-Set and FakeClue; each answer is a reference.

    A record is {image, label, conversations: [{from: human|gpt, value}]} or {image, label, question, answer}, where
    `answer` is a text or a list of texts; records of one picture and question are joined. The caller says which
    values of `label` mean real: 1 is real in FakeVLM's data and fake in most others. The column `references` of a
    sample holds [{"question", "answers": [...]}].
    """
    if not real or not fake:
        raise X2DFDError("say which labels mean real and fake: --real-value 1 --fake-value 0", code="option_missing")
    records = load_json(file)
    if not isinstance(records, list) or not records:
        raise X2DFDError(f"{file.name}: not a list of records", code="list_malformed")
    references: dict[tuple[str, ...], dict[str, list[str]]] = {}
    labels: dict[tuple[str, ...], Label] = {}
    for number, record in enumerate(records, start=1):
        where = f"{file.name}: record {number}"
        if not isinstance(record, dict) or not isinstance(record.get(image), str) or label not in record:
            raise X2DFDError(f"{where}: no {image!r} or no {label!r}", code="field_missing")
        parts = path_parts(record[image])
        value = str(record[label])
        if (value in real) == (value in fake):
            raise X2DFDError(
                f"{where}: the label {value!r} means {'both' if value in real else 'neither'}", code="label_unclear"
            )
        truth: Label = "real" if value in real else "fake"
        if labels.setdefault(parts, truth) != truth:
            raise X2DFDError(
                f"{where}: {record[image]} is called real in one record and fake in another", code="label_contradicts"
            )
        for question_text, answer_texts in _exchanges(record, question, answer, where):
            answers = references.setdefault(parts, {}).setdefault(question_text, [])
            answers += [a for a in answer_texts if a not in answers]
    read, reroot = Read(), Reroot(roots)
    for parts, truth in labels.items():
        for path, place, _ in listed_frames(read, reroot, file.name, ["/".join(parts)], None):
            sample = row(path, place, truth, source=file.stem, clip=False)
            texts = [{"question": q, "answers": a} for q, a in references.get(parts, {}).items()]
            read.samples.append(replace(sample, extra=sample.extra | {"references": texts}))
    read.notes += reroot.notes()
    return read


def _exchanges(record: Json, question: str, answer: str, where: str) -> list[tuple[str, list[str]]]:
    """The questions of a record, each with its answers."""
    turns = record.get("conversations")
    if turns is None:
        texts = record.get(answer)
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise X2DFDError(f"{where}: neither conversations nor an {answer!r}", code="exchange_malformed")
        return [(str(record.get(question) or ""), [t.strip() for t in texts])]
    if not isinstance(turns, list) or len(turns) % 2 or not all(isinstance(t, dict) for t in turns):
        raise X2DFDError(f"{where}: conversations are not pairs of question and answer", code="exchange_malformed")
    exchanges = []
    for human, model in zip(turns[::2], turns[1::2], strict=True):
        if human.get("from") != "human" or model.get("from") != "gpt":
            raise X2DFDError(f"{where}: conversations are not turns of human and gpt", code="exchange_malformed")
        text = str(human.get("value", "")).replace("<image>", "").strip()
        exchanges.append((text, [str(model.get("value", "")).strip()]))
    return exchanges


# --- the command -----------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
_Many = list[str] | None


@app.command("list", epilog="Example:\n\n  python -m eval.protocols list")
def list_protocols() -> None:
    """The protocols, their sets and what a model may be trained on."""
    for p in PROTOCOLS.values():
        print(f"{p.name}\tv{p.version}\t{p.line}\tsets: {' '.join(p.sets) or 'as given'}\ttrained on: {p.train}")


@app.command(epilog="Example:\n\n  python -m eval.protocols write df40-p2 --indices dataset_json --root DF40 --out p2")
def write(
    name: Annotated[str, typer.Argument(help="see `list`")],
    out: Annotated[Path, typer.Option(help="folder for a manifest a set, and protocol.json")],
    indices: Annotated[Path | None, typer.Option(help="folder of the index files")] = None,
    root: Annotated[list[Path] | None, typer.Option(help="folder with the files; repeatable")] = None,
    sets: Annotated[str, typer.Option(help="only these index files, comma-separated")] = "",
    files: Annotated[list[Path] | None, typer.Option(help="dfdc: metadata.json or labels.csv; repeatable")] = None,
    real: Annotated[_Many, typer.Option(help="folder or list of reals; repeatable")] = None,
    fake: Annotated[_Many, typer.Option(help="folder or list of fakes, or METHOD=it; repeatable")] = None,
    frames: Annotated[int | None, typer.Option(help="frames a clip", min=1)] = FRAMES,
    compression: Annotated[str, typer.Option(help="where there are levels")] = "c23",
    compat: Annotated[str, typer.Option(help="quirks of the stock loader: frames (clips: when scoring)")] = "",
    allow_missing: Annotated[bool, typer.Option(help="leave out missing files, even more than 1 %")] = False,
) -> None:
    """Write the test sets of a protocol as manifests."""
    if name not in PROTOCOLS:
        raise UnknownName("protocol", name, PROTOCOLS)
    protocol, quirks, roots = PROTOCOLS[name], Compat.parse(compat), root or []
    if (name in ("celebdf", "dfd") or (name == "ffpp" and indices is None)) and len(roots) != 1:
        raise X2DFDError(f"{name} is read from its folders: give one --root", code="option_missing")
    if protocol.sets and indices is None and name != "ffpp":
        raise X2DFDError(f"{name} is read from index files: give --indices and --root", code="option_missing")
    if (protocol.sets and indices is not None) or name == "df40-p4":
        chosen = names(sets)
        test_sets = index_sets(
            protocol, indices or Path("."), roots, sets=chosen, frames=frames, compression=compression, compat=quirks,
            allow_missing=allow_missing,
        )  # fmt: skip
    elif name == "ffpp":
        test_sets = {}
        for key, method in zip(_FOUR, FF_METHODS, strict=False):
            read = read_ffpp(roots[0], methods=[method], compression=compression, only=("test",), frames=None)
            read.samples = sampled(read.samples, frames, quirks)
            test_sets[key] = _test_set(read, protocol, key, allow_missing)
    else:
        readers: dict[str, Callable[[], Read]] = {
            "celebdf": lambda: read_celebdf(roots[0], frames=None),
            "dfd": lambda: read_ffpp(roots[0], methods=[DFD], compression=compression, frames=None),
            "dfdc": lambda: read_dfdc(files or [], media=Media.frames, frames=None),
            "wilddeepfake": lambda: read_folders(labelled(real, fake), source="WildDeepfake", clips=True),
            "deepfakeface": lambda: read_folders(labelled(real, fake), source="DeepFakeFace"),
            "x2dfd": lambda: read_x2dfd_lists(labelled(real, fake), roots=roots, clips=True),
        }
        if name == "dfdc" and not files:
            raise X2DFDError("dfdc is read from its label files: give --files metadata.json", code="option_missing")
        read = readers[name]()
        read.samples = sampled(read.samples, frames, quirks)
        test_sets = {name: _test_set(read, protocol, name, allow_missing)}
    print(write_sets(protocol, test_sets, out, quirks))
    for key, (samples, notes) in test_sets.items():
        print(f"{key}: {len(samples)} frames", *(f"  {note}" for note in notes), sep="\n")


_EXAMPLE = "python -m eval.protocols annotations a.json --root img --real-value 1 --fake-value 0 --out a.jsonl"


@app.command("annotations", epilog=f"Example:\n\n  {_EXAMPLE}")
def write_annotations(
    file: Annotated[Path, typer.Argument(help="JSON list of annotated pictures")],
    root: Annotated[list[Path], typer.Option(help="folder with the pictures; repeatable")],
    out: Annotated[Path, typer.Option(help="manifest (.jsonl) with the column `references`")],
    real_value: Annotated[_Many, typer.Option(help="label of reals; repeatable")] = None,
    fake_value: Annotated[_Many, typer.Option(help="label of fakes; repeatable")] = None,
    image: str = "image",
    label: str = "label",
    question: str = "question",
    answer: str = "answer",
    allow_missing: bool = False,
) -> None:
    """Annotated pictures (DD-VQA, SID-Set, FakeClue and their like) with every answer as a reference of its own."""
    read = read_annotations(
        file, root, real=real_value or (), fake=fake_value or (), image=image, label=label, question=question,
        answer=answer,
    )  # fmt: skip
    samples = finish(read, split="test", allow_missing=allow_missing)
    write_manifest(out, samples)
    answer_counts = [len(r["answers"]) for s in samples for r in s.extra["references"]]
    print(f"{out}: {len(samples)} pictures, {len(answer_counts)} questions, {sum(answer_counts)} answers")


if __name__ == "__main__":
    run_command(app)
