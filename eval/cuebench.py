"""CueBench: forgeries whose cues are known, from fixed seeds, on anybody's photos.

    python -m eval.cuebench --photos my_photos/ --out build/cuebench
    python eval/run_bench.py describe --data build/cuebench/manifest.jsonl --out results/cues

So everybody can check explanations against the truth, on any photos. This version, the forge's version and the photos'
bytes alone decide which forgeries are made of which photo, not file names or their order. `open_set` checks every file
against the card, and refuses an incomplete set.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import typer

from data_gen.forge import FORGE_VERSION, HARMLESS, METHODS, Photo, changed, forge, untouched
from data_gen.readers import labelled, read_folders
from data_gen.run_forge import load_photo, pose, resumed, save_jpeg
from x2dfd.cli import run_command
from x2dfd.errors import SetupError, X2DFDError
from x2dfd.files import Json, file_sha256, locked_folder, parse_json, read_json, write_bytes, write_text
from x2dfd.manifest import Sample, manifest_sha256, read_manifest, write_manifest
from x2dfd.progress import progress

VERSION = 2
"""Goes up when the same photos give another set."""
PER_METHOD = 12  # forgeries of each method; of each harmless change half as many
SIDE = 384  # longest side of a picture, pixels
CARD = "cuebench.json"


@dataclass(frozen=True)
class Item:
    """One picture of the set: a photo, and what is done to it."""

    name: str  # also the seed
    method: str  # a method or a harmless change of the forge, or `none`
    photo: int
    donor: int | None = None
    harmless: str | None = None  # what is laid over a forgery


def own_photos(folder: Path) -> Path:
    """The one portrait that comes with the installed packages, as a manifest: NASA's of Eileen Collins (public domain).
    One group: enough to see that everything works, not for an interval or a face swap."""
    import skimage.data

    # The file itself: encoding it again would be other bytes under another version of the encoder.
    portrait = Path(skimage.data.__file__).parent / "astronaut.png"
    if not portrait.is_file():
        raise SetupError(f"scikit-image lacks {portrait.name} here: give photos with --photos", code="photos_missing")
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / portrait.name, portrait.read_bytes())
    row = {"path": portrait.name, "label": "real", "source": "nasa", "group": "eileen-collins"}
    write_manifest(folder / "photos.jsonl", [row | {"licence": "public domain (NASA)"}])
    return folder / "photos.jsonl"


def photos_of(path: Path) -> list[tuple[str, Sample]]:
    """SHA-256 ("" of an absent file) and row of the real photos of a manifest, or of a folder, in which each is a group
    of its own; sorted by hash. Raises X2DFDError when there are none."""
    if path.is_dir():
        read = read_folders(labelled([str(path)], None), source="photos")
        hashed = [(file_sha256(s.path), s) for s in read.samples]
        hashed = [(digest, replace(s, group=f"photo-{digest[:16]}")) for digest, s in hashed]
    else:
        real = [s for s in read_manifest(path) if s.label == "real"]
        hashed = [(file_sha256(s.path) if s.path.is_file() else "", s) for s in real]
    if not hashed:
        raise X2DFDError(f"{path}: no real photo in it", code="no_real_picture")
    return sorted(hashed, key=lambda pair: (pair[0], pair[1].id))


def plan(photos: Sequence[Photo], names: Sequence[str], per_method: int = PER_METHOD) -> list[Item]:
    """The pictures to make: `per_method` of each method, half as many of each harmless change, every photo untouched.

    `names` identify the photos (hashes). Photos take turns, and each method starts with another one. Methods that need
    a donor are skipped when there is one group only. Every second forgery gets a harmless change as well, in turns:
    otherwise such a change would give a real picture away.
    """
    n, groups, turns = len(photos), {p.group for p in photos}, itertools.cycle(HARMLESS)
    items = [Item(f"none-{names[k][:12]}", "none", k) for k in range(n)]
    for name, method in (METHODS | HARMLESS).items():
        if method.needs_donor and len(groups) < 2:
            continue
        start = int(hashlib.sha256(name.encode()).hexdigest(), 16) % n
        for i in range(per_method if name in METHODS else max(1, per_method // 2)):
            k = (start + i) % n
            donor = _donor(photos, k, i) if method.needs_donor else None
            harmless = next(turns) if name in METHODS and i % 2 else None
            items.append(Item(f"{name}-{i:03d}-{names[k][:12]}", name, k, donor, harmless))
    return items


def _donor(photos: Sequence[Photo], k: int, turn: int) -> int:
    """The one of the next few photos of other groups whose head pose is most similar."""
    others: list[int] = [j for j in [*range(k + 1, len(photos)), *range(k)] if photos[j].group != photos[k].group]
    start = 4 * turn % len(others)
    candidates = [others[(start + j) % len(others)] for j in range(min(4, len(others)))]
    return min(candidates, key=lambda j: (float(np.abs(pose(photos[j]) - pose(photos[k])).max()), j))


def build(photos: Path | None, out: Path, *, per_method: int = PER_METHOD, allow_missing: bool = False) -> Json:
    """Makes (or finishes) the set in `out` and returns its card. Without `photos` it uses the package's own portrait.
    Raises X2DFDError when more than 1 % of the photos have no usable face (unless `allow_missing`), and when `out`
    holds another set."""
    if per_method < 1:
        raise X2DFDError(f"--per-method {per_method}: at least 1", code="number_out_of_range")
    candidates = photos_of(photos if photos is not None else own_photos(out / "own"))
    used: list[tuple[str, Sample]] = []
    usable: list[Photo] = []
    unusable: list[str] = []
    for digest, sample in progress(candidates, "finding faces"):
        photo = load_photo(str(sample.path), sample.source, sample.group, SIDE) if digest else None
        if photo is None:
            unusable.append(sample.id)
        elif not used or digest != used[-1][0]:  # the same photo twice is one
            used.append((digest, sample))
            usable.append(photo)
    if len(unusable) > 0.01 * len(candidates) and not allow_missing:
        raise X2DFDError(
            f"{len(unusable)} of {len(candidates)} photos cannot be read or show no face, such as {unusable[0]}. "
            "Remove them from the manifest, or skip them with --allow-missing",
            code="photos_unusable",
        )
    if not used:
        raise X2DFDError("none of the photos can be used", code="no_usable_picture")
    items = plan(usable, [d for d, _ in used], per_method)
    settings = {
        "version": VERSION,
        "forge": FORGE_VERSION,
        "per_method": per_method,
        "photos": hashlib.sha256("\n".join(f"{d} {s.group} {s.source}" for d, s in used).encode()).hexdigest(),
    }
    draft = out / "cuebench.part.json"
    for file in (draft, out / CARD):
        if file.is_file() and not settings.items() <= read_json(file).items():
            raise X2DFDError(
                f"{out} holds a set of other photos or settings: take another --out", code="settings_differ"
            )
    if (out / CARD).is_file():
        open_set(out)
        return read_json(out / CARD)
    with locked_folder(out):
        write_text(draft, json.dumps(settings) + "\n")
        rows = resumed(
            out, len(items), lambda todo: (_make(items[k], usable, used[items[k].photo][1], out) for k in todo)
        )
        skipped_methods = sorted(set(METHODS) - {i.method for i in items})
        card = settings | _counts(rows) | {
            "manifest_sha256": manifest_sha256(out / "manifest.jsonl"),
            "standard_size": per_method == PER_METHOD,
            "photos_given": len(candidates),
            "photos_unusable": len(unusable),
            "methods_left_out_for_want_of_a_second_group": skipped_methods,
            "versions": {name: version(name) for name in ("numpy", "opencv-python-headless", "torch")},
        }  # fmt: skip
        write_text(out / CARD, json.dumps(card, indent=1) + "\n")
        draft.unlink()
    return card


def _make(item: Item, photos: Sequence[Photo], sample: Sample, out: Path) -> Json:
    """Makes one picture and its mask, if it is a forgery, and returns its row."""
    photo = photos[item.photo]
    seed = hashlib.sha256(f"cuebench:{VERSION}:{item.name}".encode()).digest()
    rng = np.random.default_rng(np.frombuffer(seed, np.uint32))
    quality = int(rng.integers(88, 99))  # drawn alike for reals and forgeries
    if item.method == "none":
        picture = untouched(photo)
    else:
        donor = photos[item.donor] if item.donor is not None else None
        picture = forge(photo, (METHODS | HARMLESS)[item.method], rng, donor)
    harmless = item.method if item.method in HARMLESS else None
    if item.harmless is not None:
        forgery, picture = picture, changed(photo, picture, HARMLESS[item.harmless], rng)
        harmless = item.harmless if picture is not forgery else None
    row: Json = {"id": item.name, "path": f"images/{item.name}.jpg"}
    row |= {"label": "real" if picture.df_class == "real" else "fake", "method": picture.method}
    row |= {"df_class": picture.df_class, "source": sample.source, "group": sample.group, "split": "test"}
    row |= {"strength": picture.strength, "cues": [asdict(c) for c in picture.cues]}
    if harmless is not None:
        row["harmless"] = harmless
    (out / "images").mkdir(exist_ok=True)
    if item.method in METHODS:
        row["mask"] = f"images/{item.name}.mask.png"
        if not cv2.imwrite(str(out / row["mask"]), picture.mask):
            raise X2DFDError(f"could not write {out / row['mask']}", code="cannot_write")
        row["mask_sha256"] = file_sha256(out / row["mask"])
    if item.donor is not None:
        row["donor"] = photos[item.donor].group
    if sample.extra.get("licence"):
        row["licence"] = sample.extra["licence"]
    row["sha256"] = save_jpeg(out / row["path"], picture.pixels, quality)
    return row


def _counts(rows: Sequence[Json]) -> Json:
    def count(values: Iterable[str]) -> dict[str, int]:
        return dict(sorted(Counter(values).items()))

    return {
        "pictures": len(rows),
        "by_label": count(r["label"] for r in rows),
        "by_class": count(r["df_class"] for r in rows),
        "by_method": count(r["method"] for r in rows),
        "by_cue": count(f"{c['area']}: {c['artifact']}" for r in rows for c in r["cues"]),
        "by_source": count(r["source"] for r in rows),
        "groups": len({r["group"] for r in rows}),
        "licences": sorted({r.get("licence") or "not stated" for r in rows}),
    }


def open_set(folder: Path) -> Path:
    """The manifest of a set, after a check of every picture and mask against its hash. Raises X2DFDError when the set
    is unfinished, or anything is missing or changed."""
    card, manifest = folder / CARD, folder / "manifest.jsonl"
    if not card.is_file():
        raise X2DFDError(
            f"{folder} holds no finished CueBench: python -m eval.cuebench --photos none --out {folder}",
            code="cuebench_unfinished",
        )
    try:
        expected = parse_json(card.read_bytes())["manifest_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise X2DFDError(f"{card} is not a CueBench card ({error!r:.200})", code="cuebench_unfinished") from error
    if not manifest.is_file() or manifest_sha256(manifest) != expected:
        raise X2DFDError(f"{manifest} is not that of {card}: make the set anew", code="cuebench_manifest_differs")
    bad_files = [
        str(path)
        for s in read_manifest(manifest)
        for path, sha256 in ((s.path, s.extra.get("sha256")), (s.mask, s.extra.get("mask_sha256")))
        if path is not None
        if not path.is_file() or file_sha256(path) != sha256
    ]
    if bad_files:
        raise X2DFDError(
            f"{len(bad_files)} files of {folder} are missing or changed, such as {bad_files[0]}: make it anew",
            code="cuebench_files_differ",
        )
    return manifest


def run(
    photos: Annotated[str, typer.Option(help="folder or manifest of real photos; none: the package's own portrait")],
    out: Annotated[Path, typer.Option(help="folder for images, masks, manifest.jsonl and its card")],
    per_method: Annotated[int, typer.Option(help="forgeries of each method")] = PER_METHOD,
    allow_missing: Annotated[bool, typer.Option(help="leave out unusable photos, even more than 1 %")] = False,
) -> None:
    """Make a CueBench: forgeries with known cues from fixed seeds."""
    source = None if photos == "none" else Path(photos)
    card = build(source, out, per_method=per_method, allow_missing=allow_missing)
    print(json.dumps(card, indent=1))
    print(out / "manifest.jsonl")


_EPILOG = """Examples:\n
  python -m eval.cuebench --photos none --out build/cuebench\n
  python -m eval.cuebench --photos my_photos/ --out build/cuebench
"""

if __name__ == "__main__":
    run_command(run, _EPILOG)
