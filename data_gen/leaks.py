"""`python -m data_gen leaks MANIFEST...`: finds data on two sides of a split, and traits that give the label away.

A side is a split of a manifest; with several manifests (training set and benchmark, say) each has its own sides.

- groups and sources on two sides (inside one manifest, reading it refuses groups in two splits already);
- identical files on two sides, by SHA-256;
- near-duplicates on two sides, by difference hash (dHash): neighbouring pixels of a small grey picture are compared,
  64 bits to find candidates and 256 bits to confirm them;
- form: the accuracy of rules that use file format, size or JPEG quality alone, without looking at the picture.

Groups and identical files are certain leaks; a person has to judge near-duplicates and form.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image

from data_gen.readers import sources_of
from x2dfd.errors import InputError, X2DFDError
from x2dfd.faces import Array
from x2dfd.files import Json
from x2dfd.manifest import Sample, read_manifest
from x2dfd.media import Picture, load_media
from x2dfd.progress import progress

NEAR = 8
"""Bits of 64 that may differ between near-duplicates; of the 256 confirming bits four times as many.

Measured on 2,500 face photos: no two different photos (of 3 million pairs) are near. Of 400 copies, 99.8 % saved as
JPEG of quality 30 are near, all at half size, 85 % cropped by 2 % on each side, and under 1 % cropped by 5 %.
"""
_EXAMPLES = 5
_FLAT = 4.0  # grey levels (standard deviation of the small picture): below, a hash is noise


@dataclass(frozen=True)
class FileFacts:
    """The facts about one file that the report needs."""

    sha256: str = ""
    coarse: int | None = None  # 64-bit dHash; None for a flat picture
    fine: tuple[int, ...] = ()  # 256-bit dHash as four words
    form: dict[str, float | str] = field(default_factory=dict)  # of pictures: format, width, height, ...
    failed: str = ""  # reason code when the file cannot be decoded


def dhash(grey: NDArray[np.uint8], side: int) -> NDArray[np.uint64]:
    """Difference hash of a grey picture: a bit for each of `side` x `side` cells, set if the cell is darker than its
    right neighbour; [side * side / 64] words."""
    small = cv2.resize(grey, (side + 1, side), interpolation=cv2.INTER_AREA)
    return np.packbits(small[:, :-1] < small[:, 1:]).view(np.uint64)


def file_facts(path: str) -> FileFacts:
    """Decode a picture, or one frame of a clip, and measure it."""
    cv2.setNumThreads(1)
    try:
        media = load_media(path, max_frames=1)
    except InputError as error:
        return FileFacts(failed=error.code)
    pixels = media.pixels if isinstance(media, Picture) else media.frames[0].pixels
    grey = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), np.uint8)
    flat = float(cv2.resize(grey, (17, 16), interpolation=cv2.INTER_AREA).std()) < _FLAT
    return FileFacts(
        sha256=media.sha256,
        coarse=None if flat else int(dhash(grey, 8)[0]),
        fine=tuple(int(w) for w in dhash(grey, 16)),
        form=_form(path, media) if isinstance(media, Picture) else {},
    )


def _form(path: str, picture: Picture) -> dict[str, float | str]:
    height, width = picture.pixels.shape[:2]
    tables: dict[int, list[int]] = {}
    if picture.format == "JPEG":
        with Image.open(path) as image:  # reads the header only
            tables = getattr(image, "quantization", {})
    return {
        "format": picture.format,
        "width": float(width),
        "height": float(height),
        "aspect ratio": width / height,
        "bytes per pixel": os.path.getsize(path) / (width * height),
        "JPEG quantisation step": float(np.mean(tables[0])) if 0 in tables else 0.0,  # mean over luma; 0: no JPEG
    }


@dataclass
class Near:
    """Pairs of near-duplicates on two sides."""

    pairs: int = 0
    items: set[int] = field(default_factory=set)  # indices of the files that are in a pair
    closest: list[tuple[int, int, int]] = field(default_factory=list)  # (differing bits of 256, index, index)


def near_pairs(
    coarse: NDArray[np.uint64],
    fine: NDArray[np.uint64],
    side: NDArray[np.intp],
    near: int = NEAR,
    keep: int = _EXAMPLES,
) -> Near:
    """Pairs across sides with at most `near` differing bits of `coarse` [n] and 4 * `near` of `fine` [n, 4].

    Banding: cut into `near` + 1 bands, two hashes that differ in `near` bits agree in one band at least, so only files
    that share a band are compared and no pair is missed.
    """
    if not 0 <= near < 16:
        raise X2DFDError(f"--near must be from 0 to 15 bits, not {near}", code="near_out_of_range")
    edges = np.linspace(0, 64, near + 2).round().astype(int)
    masks = [np.uint64(((1 << int(b - a)) - 1) << int(a)) for a, b in itertools.pairwise(edges)]
    result = Near()

    def compare(left: NDArray[np.intp], right: NDArray[np.intp], earlier_masks: Sequence[np.uint64]) -> None:
        close = np.bitwise_count(coarse[left, None] ^ coarse[None, right]) <= near  # [left, right]
        i, j = np.nonzero(close)
        i, j = left[i], right[j]
        bits = np.bitwise_count(fine[i] ^ fine[j]).sum(axis=1, dtype=int)
        confirmed = bits <= 4 * near
        for mask in earlier_masks:  # a pair that agrees in an earlier band has been counted there
            confirmed &= ((coarse[i] ^ coarse[j]) & mask) != 0
        i, j, bits = i[confirmed], j[confirmed], bits[confirmed]
        result.pairs += len(i)
        result.items.update(i.tolist(), j.tolist())
        best = np.argsort(bits, kind="stable")[:keep]
        result.closest += zip(bits[best].tolist(), i[best].tolist(), j[best].tolist(), strict=True)
        result.closest = sorted(result.closest)[:keep]

    for number, mask in enumerate(masks):
        key = coarse & mask
        order = np.argsort(key, kind="stable")
        starts = np.flatnonzero(np.diff(key[order])) + 1
        for bucket in np.split(order, starts):
            sides = np.unique(side[bucket])
            for side_a, side_b in itertools.combinations(sides, 2):
                left, right = bucket[side[bucket] == side_a], bucket[side[bucket] == side_b]
                step = max(1, 4_000_000 // len(right))  # bounds the memory of a crowded bucket
                for start in range(0, len(left), step):
                    compare(left[start : start + step], right, masks[:number])
    return result


def form_leaks(samples: Sequence[Sample], facts: Sequence[FileFacts]) -> list[Json]:
    """The best rule on each trait of the files' form, and its balanced accuracy (0.5 is chance), fitted on half of the
    groups and scored on the other half, both ways. Empty without pictures of both labels in both halves."""
    pictures = [(s, k.form) for s, k in zip(samples, facts, strict=True) if k.form]
    fake = np.array([s.label == "fake" for s, _ in pictures], bool)
    halves = np.array([hashlib.sha256(s.group.encode()).digest()[0] % 2 for s, _ in pictures], int)
    if len({(bool(f), int(h)) for f, h in zip(fake, halves, strict=True)}) < 4:
        return []
    leaks = []
    for trait in pictures[0][1]:
        values = np.array([form[trait] for _, form in pictures])
        scores = []
        for fold in (0, 1):
            predicted, _ = _best_rule(values[halves != fold], fake[halves != fold], values[halves == fold])
            scores.append(_balanced_accuracy(predicted, fake[halves == fold]))
        leaks.append(
            {"trait": trait, "balanced_accuracy": float(np.mean(scores)), "rule": _best_rule(values, fake, values)[1]}
        )
    return sorted(leaks, key=lambda leak: -leak["balanced_accuracy"])


def _best_rule(values: Array, fake: NDArray[np.bool_], test_values: Array) -> tuple[NDArray[np.bool_], str]:
    """Fit the best rule on one trait; returns its predictions (fake?) for `test_values`, and the rule in words."""
    if values.dtype.kind == "U":
        shares = {v: (np.mean(values[fake] == v), np.mean(values[~fake] == v)) for v in np.unique(values)}
        fakes = sorted(str(v) for v, (of_fake, of_real) in shares.items() if of_fake > of_real)
        return np.isin(test_values, fakes), f"fake if {' or '.join(fakes)}" if fakes else "never fake"
    order = np.argsort(values, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(values[order]) > 0, True))  # last place of each distinct value
    fakes_below = np.cumsum(fake[order])[ends] / fake.sum()
    reals_below = np.cumsum(~fake[order])[ends] / (~fake).sum()
    at = int(np.argmax(np.abs(fakes_below - reals_below)))
    if fakes_below[at] == reals_below[at]:
        return np.zeros(len(test_values), bool), "never fake"
    below = bool(fakes_below[at] > reals_below[at])
    middle = float((values[order][ends[at]] + values[order][ends[min(at + 1, len(ends) - 1)]]) / 2)
    return (test_values <= middle) == below, f"fake if {'at most' if below else 'more than'} {middle:.4g}"


def _balanced_accuracy(predicted: NDArray[np.bool_], fake: NDArray[np.bool_]) -> float:
    return float((predicted[fake].mean() + (~predicted[~fake]).mean()) / 2)


def find_leaks(manifests: Sequence[Path], *, workers: int = 1, near: int = NEAR) -> Json:
    """The report as one JSON object. Raises X2DFDError for a manifest that cannot be read or contradicts itself."""
    samples: list[Sample] = []
    side_names: list[str] = []
    for file in manifests:
        name = file.stem if sum(f.stem == file.stem for f in manifests) == 1 else str(file)
        for s in read_manifest(file):
            split = s.split or "(no split)"
            samples.append(s)
            side_names.append(split if len(manifests) == 1 else f"{name}: {split}")
    sides = sorted(set(side_names))
    facts = _facts_of_all(samples, workers)
    by_sha: dict[str, list[int]] = defaultdict(list)
    for i, f in enumerate(facts):
        if f.sha256:
            by_sha[f.sha256].append(i)
    identical = [group for group in by_sha.values() if len({side_names[i] for i in group}) > 1]
    two_labels = [group for group in by_sha.values() if len({samples[i].label for i in group}) > 1]

    # One file of each content and side: identical files are reported as identical, not as near.
    firsts = [i for group in by_sha.values() for i in {side_names[j]: j for j in reversed(group)}.values()]
    usable = [
        i for i in firsts if facts[i].coarse is not None and len({side_names[j] for j in by_sha[facts[i].sha256]}) == 1
    ]
    side_index = {name: n for n, name in enumerate(sides)}
    copies = near_pairs(
        np.array([facts[i].coarse for i in usable], np.uint64),
        np.array([facts[i].fine for i in usable], np.uint64).reshape(-1, 4),
        np.array([side_index[side_names[i]] for i in usable], np.intp),
        near,
    )

    def describe(indices: Iterable[int]) -> list[str]:
        return [f"{samples[i].id} ({samples[i].label}, {side_names[i]})" for i in indices]

    def listed(found: Sequence[list[int]]) -> Json:
        return {"n": len(found), "examples": [describe(group[:4]) for group in found[:_EXAMPLES]]}

    groups = _shared_groups(samples, side_names)
    return {
        "manifests": [str(f) for f in manifests],
        "sides": {name: side_names.count(name) for name in sides},
        "groups": {"n": len(groups), "examples": dict(sorted(groups.items())[:_EXAMPLES])},
        "identical": listed(identical),
        "identical_with_two_labels": listed(two_labels),
        "near": {
            "pairs": copies.pairs,
            "files": len(copies.items),
            "bits": near,
            "examples": [{"bits_of_256": n, "files": describe((usable[i], usable[j]))} for n, i, j in copies.closest],
        },
        "form": form_leaks(samples, facts),
        "flat": sum(f.coarse is None and not f.failed for f in facts),
        "unreadable": dict(sorted(Counter(f.failed for f in facts if f.failed).items())),
        "leaks": bool(groups or identical),
    }


def _facts_of_all(samples: Sequence[Sample], workers: int) -> list[FileFacts]:
    paths = [str(s.path) for s in samples]
    if workers <= 1:
        return list(progress(map(file_facts, paths), "looking", len(paths)))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:  # a forked copy of running threads hangs
        return list(progress(pool.map(file_facts, paths, chunksize=32), "looking", len(paths)))


def _shared_groups(samples: Sequence[Sample], sides: Sequence[str]) -> dict[str, list[str]]:
    """Groups and sources on more than one side, with these sides. A row whose group is its own id has none to share."""
    sides_of: dict[str, set[str]] = defaultdict(set)
    for s, side in zip(samples, sides, strict=True):
        own = [] if s.group == s.id else [s.group]
        for name in {*own, *sources_of(s)}:
            sides_of[name].add(side)
    return {name: sorted(group_sides) for name, group_sides in sides_of.items() if len(group_sides) > 1}


def as_text(report: Json) -> str:
    """The report for a reader."""
    lines = ["sides: " + ", ".join(f"{name} ({n})" for name, n in report["sides"].items())]
    if len(report["sides"]) == 1:
        lines.append("only one side: nothing can stand on two; compare with another manifest or divide this one")
    lines.append(f"groups on two sides: {report['groups']['n']}")
    lines += [f"  {name}: {', '.join(group_sides)}" for name, group_sides in report["groups"]["examples"].items()]
    lines.append(f"identical files on two sides: {report['identical']['n']}")
    lines += [f"  {' = '.join(names)}" for names in report["identical"]["examples"]]
    if report["identical_with_two_labels"]["n"]:
        lines.append(f"identical files with two labels: {report['identical_with_two_labels']['n']}")
        lines += [f"  {' = '.join(names)}" for names in report["identical_with_two_labels"]["examples"]]
    near = report["near"]
    lines.append(
        f"near-duplicates on two sides: {near['pairs']} pairs of {near['files']} files ({near['bits']} of 64 bits)"
    )
    lines += [f"  {' ~ '.join(pair['files'])}: {pair['bits_of_256']} of 256 bits" for pair in near["examples"]]
    if report["form"]:
        lines.append("labels told apart without looking at the picture (balanced accuracy, held out; 0.5 is chance):")
        lines += [f"  {leak['balanced_accuracy']:.2f}  {leak['trait']}: {leak['rule']}" for leak in report["form"]]
    else:
        lines.append("form: too few pictures or groups of both labels to tell")
    if report["flat"]:
        lines.append(f"too flat to compare: {report['flat']}")
    if report["unreadable"]:
        lines.append("unreadable: " + ", ".join(f"{code} {n}" for code, n in report["unreadable"].items()))
    return "\n".join(lines)


EPILOG = """Examples:\n
  python -m data_gen leaks set.jsonl --workers 2\n
  python -m data_gen leaks train.jsonl celeb-df.jsonl --json --check
"""


def command(
    manifests: Annotated[list[Path], typer.Argument(metavar="MANIFEST...")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
    check: Annotated[bool, typer.Option("--check", help="exit code 1 for groups or files on two sides")] = False,
    near: Annotated[int, typer.Option(help="bits of 64 by which near-duplicates may differ")] = NEAR,
    workers: Annotated[int, typer.Option(help="processes")] = 1,
) -> None:
    """Find data on two sides of a split, and traits that give the label away.

    Exit code 0 means that it ran; with --check, 1 means that groups or identical files are on two sides.
    """
    report = find_leaks(manifests, workers=workers, near=near)
    print(json.dumps(report, ensure_ascii=False, indent=1) if as_json else as_text(report))
    if check and report["leaks"]:
        raise typer.Exit(1)
