"""`python -m data_gen forge`: makes forgeries, harmless changes and untouched twins from a manifest of photos.

Item i depends on (seed, i) and the input manifest alone, so any number of workers gives the same bytes and a cut-off
run resumes where it stopped. Every picture, whatever its label, is processed alike: the region around its face, at most
`side` pixels long, re-encoded as JPEG of a random high quality.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from data_gen.forge import FORGE_VERSION, HARMLESS, LATENT, METHODS, Photo, changed, forge, joined_cues, untouched
from data_gen.harmless import through_video
from x2dfd.errors import InputError, UnknownName, X2DFDError
from x2dfd.faces import Array, find_faces
from x2dfd.files import Json, file_sha256, json_object, locked_folder, read_json, write_bytes, write_text
from x2dfd.manifest import Sample, manifest_sha256, read_manifest, write_manifest
from x2dfd.media import load_picture
from x2dfd.progress import progress

REGION = 1.9  # side of the region that is kept, over the longer side of the face's box
_TRIES = 30  # photos without a usable face are passed over, this many times at most


@dataclass(frozen=True)
class ForgeConfig:
    """The settings of a forge run, saved in its output folder."""

    data: str  # manifest of photos (label real) and, optionally, of ready-made fakes
    count: int  # how many pictures in all
    seed: int = 0
    side: int = 384  # longest side of the kept region, pixels
    forged: float = 0.55  # share of forgeries; the others stay real
    harmless: float = 0.5  # share of harmless changes, the same among reals, forgeries and ready-made fakes
    combine: float = 0.0  # share of forgeries that carry a second manipulation
    ready_made: float = 0.0  # share of pictures that are the manifest's own fakes, passed through
    calib: float = 0.0  # share of the train groups that become split `calib`, for calibration
    methods: tuple[str, ...] = tuple(METHODS)  # forge methods in use
    splits: tuple[str, ...] = ()  # only these splits of the manifest; empty for all
    decoders: str | None = None  # weight file of `data_gen decoders`; None for the committed one
    redraw: str | None = None  # folder of TAESD's weights, for the methods `latent_redraw` and `latent_face`
    video: float = 0.0  # share of pictures that go through H.264 as a whole, the same under every label


def split_of(sample: Sample, calib: float) -> str:
    """The manifest's split, or `calib` for a share of the train groups, chosen by the group's hash."""
    number = int(hashlib.sha256(f"calib:{sample.group}".encode()).hexdigest()[:8], 16) / 0x100000000
    return "calib" if (sample.split or "train") == "train" and number < calib else (sample.split or "train")


class _Source:
    """The input, arranged for drawing: by label, then split, then source, then group, each level evenly."""

    def __init__(self, config: ForgeConfig) -> None:
        self.config = config
        samples = read_manifest(config.data)
        self.tree: dict[str, dict[str, dict[str, dict[str, list[Sample]]]]] = {"real": {}, "fake": {}}
        split_by_group: dict[str, str] = {}  # a row without a split counts as train, but its group may be in another
        for s in samples:
            split = split_of(s, config.calib)
            if config.splits and split not in config.splits:
                continue
            by_source = self.tree[s.label].setdefault(split, {}).setdefault(s.source, {})
            by_source.setdefault(s.group, []).append(s)
            if split_by_group.setdefault(s.group, split) != split:
                raise X2DFDError(
                    f"{config.data}: group {s.group!r} is in {split!r} and in {split_by_group[s.group]!r}",
                    code="group_across_splits",
                )
        if not self.tree["real"]:
            raise X2DFDError(f"{config.data}: no real photos to forge from", code="no_real_picture")
        if config.ready_made and not self.tree["fake"]:
            raise X2DFDError(
                f"{config.data} holds no fake pictures, of which --ready-made {config.ready_made} takes a share",
                code="no_fake_picture",
            )
        # Frames of one clip are near copies: a group counts as ten pictures at most.
        self.sizes = {
            (label, split): {name: sum(min(len(g), 10) for g in groups.values()) for name, groups in sources.items()}
            for label, splits in self.tree.items()
            for split, sources in splits.items()
        }

    def draw(self, label: str, split: str, rng: np.random.Generator) -> Sample:
        sources = self.tree[label][split]
        source_names = sorted(sources)
        # Even sources would be small ones learnt by heart, even pictures small ones hardly seen: this lies between.
        weights = np.array([self.sizes[label, split][n] ** 0.7 for n in source_names])
        source = sources[str(rng.choice(source_names, p=weights / weights.sum()))]
        group = source[str(rng.choice(sorted(source)))]
        return group[int(rng.integers(len(group)))]

    def draw_split(self, label: str, rng: np.random.Generator) -> str:
        splits = sorted(self.tree[label])
        sizes = np.array([sum(self.sizes[label, s].values()) for s in splits], float)
        return str(rng.choice(splits, p=sizes / sizes.sum()))


@lru_cache(maxsize=1500)
def load_photo(path: str, source: str, group: str, side: int) -> Photo | None:
    """The region around the largest face, or None when the file cannot be read or has no face."""
    try:
        pixels = load_picture(path).pixels
        faces = find_faces(pixels)
    except InputError:
        return None
    if not faces:
        return None
    x, y, w, h = faces[0].box
    half = max(w, h) * REGION / 2
    cx, cy = x + w / 2, y + h / 2
    x0, y0 = max(0, round(cx - half)), max(0, round(cy - half))
    region: Array = pixels[y0 : round(cy + half), x0 : round(cx + half)]
    scale = min(1.0, side / max(region.shape[:2]))
    points = faces[0].landmarks - np.array([x0, y0], np.float32)
    if scale < 1:
        size = (round(region.shape[1] * scale), round(region.shape[0] * scale))
        points = points * np.array([size[0] / region.shape[1], size[1] / region.shape[0]], np.float32)
        region = cv2.resize(region, size, interpolation=cv2.INTER_AREA)
    return Photo(np.ascontiguousarray(region, np.uint8), points.astype(np.float32), source, group)


def _tighten(photo: Photo, rng: np.random.Generator) -> Photo:
    """Sometimes cut the picture close around the face, so that tight crops tell no source from another."""
    if rng.random() > 0.35:
        return photo
    low, high = photo.landmarks.min(0), photo.landmarks.max(0)
    size = float((high - low).max())
    height, width = photo.pixels.shape[:2]
    x0, y0 = (max(0, round(float(v - rng.uniform(0.02, 0.4) * size))) for v in low)
    x1, y1 = (round(float(v + rng.uniform(0.02, 0.4) * size)) for v in high)
    region = np.ascontiguousarray(photo.pixels[y0 : min(y1, height), x0 : min(x1, width)])
    return Photo(region, photo.landmarks - np.array([x0, y0], np.float32), photo.source, photo.group)


def _draw_photo(source: _Source, label: str, split: str, rng: np.random.Generator) -> tuple[Sample, Photo]:
    for _ in range(_TRIES):
        sample = source.draw(label, split, rng)
        photo = load_photo(str(sample.path), sample.source, sample.group, source.config.side)
        if photo is not None:
            return sample, _tighten(photo, rng)
    raise X2DFDError(f"none of {_TRIES} {label} pictures of split {split!r} shows a usable face", code="no_usable_face")


def save_jpeg(path: Path, pixels: NDArray[np.uint8], quality: int) -> str:
    ok, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not ok:
        raise X2DFDError(f"could not encode {path.name}", code="cannot_write")
    write_bytes(path, data.tobytes())
    return hashlib.sha256(data.tobytes()).hexdigest()


def _item(source: _Source, out: Path, index: int) -> Json:
    """Make picture `index` and return its manifest row."""
    config = source.config
    rng = np.random.default_rng([config.seed, index])
    draw = rng.random()
    quality = int(rng.integers(88, 99))
    row: Json = {"id": f"{config.seed}-{index:06d}", "path": f"images/{index // 1000:03d}/{index:06d}.jpg"}
    file = out / row["path"]
    file.parent.mkdir(parents=True, exist_ok=True)
    if draw < config.ready_made:
        split = source.draw_split("fake", rng)
        sample, photo = _draw_photo(source, "fake", split, rng)
        forgery = untouched(photo, sample.method, sample.df_class, 1.0)
    else:
        split = source.draw_split("real", rng)
        sample, photo = _draw_photo(source, "real", split, rng)
        draw = (draw - config.ready_made) / (1 - config.ready_made)
        if draw < config.forged:
            method = _ALL[str(rng.choice(config.methods))]
            donor = None
            if method.needs_donor:
                donor = _donor(source, split, sample, photo, rng)
                row["donor"] = donor.group
            elif method.same_group:
                donor = _sibling(source, split, sample, rng)
            forgery = forge(photo, method, rng, donor)
            if rng.random() < config.combine:
                second_method = _ALL[str(rng.choice([m for m in config.methods if not _ALL[m].needs_donor]))]
                second_forgery = forge(replace(photo, pixels=forgery.pixels), second_method, rng)
                forgery = replace(
                    forgery,
                    pixels=second_forgery.pixels,
                    mask=np.maximum(forgery.mask, second_forgery.mask),
                    cues=joined_cues(photo.pixels, forgery, second_forgery),
                    method=f"{forgery.method}+{second_forgery.method}",
                    strength=max(forgery.strength, second_forgery.strength),
                )
        else:
            forgery = untouched(photo)
    row["label"] = "real" if forgery.df_class == "real" else "fake"
    row |= {"method": forgery.method, "df_class": forgery.df_class}
    # The same odds for every label: a model would learn a change that only real photos had as their mark.
    change = HARMLESS[str(rng.choice(list(HARMLESS)))] if rng.random() < config.harmless else None
    if config.video and rng.random() < config.video:
        change = through_video(change)
    if change:
        previous = forgery
        forgery = forge(photo, change, rng) if row["label"] == "real" else changed(photo, forgery, change, rng)
        row["method"] = forgery.method
        if forgery is not previous:  # a change that would cover the whole forgery is not made
            row["harmless"] = change.name
    if forgery.mask.any():
        mask = file.with_suffix(".mask.png")
        if not cv2.imwrite(str(mask), forgery.mask):
            raise X2DFDError(f"could not write {mask}", code="cannot_write")
        row["mask"] = str(Path(row["path"]).with_suffix(".mask.png"))
    row["cues"] = [asdict(c) for c in forgery.cues]
    if forgery.cues:
        row["shows"] = shows(max(c.score or 0.0 for c in forgery.cues))
    row |= {"source": sample.source, "group": sample.group, "split": split, "strength": forgery.strength}
    if sample.extra.get("licence"):
        row["licence"] = sample.extra["licence"]  # the photo's licence holds for pictures made from it too
    row["sha256"] = save_jpeg(file, forgery.pixels, quality)
    return row


def shows(score: float) -> str:
    """A word for the score of a forgery's plainest cue, by which `run_bench.py --by shows` reports figures."""
    return "faint" if score < 0.25 else "clear" if score < 0.5 else "plain"


_DONORS = 4  # candidates that are compared by pose
_POSE_FITS = 0.06  # near enough to stop looking


def _donor(source: _Source, split: str, target: Sample, face: Photo, rng: np.random.Generator) -> Photo:
    """Another person's photo of the same split: of a few candidates, the one with the most similar head pose. A photo
    of another source becomes a candidate half of the times it is drawn."""
    candidates: list[tuple[float, Photo]] = []
    for _ in range(_TRIES):
        sample, photo = _draw_photo(source, "real", split, rng)
        if sample.group != target.group and (sample.source == target.source or rng.random() < 0.5):
            candidates.append((float(np.abs(pose(photo) - pose(face)).max()), photo))
            if candidates[-1][0] < _POSE_FITS or len(candidates) == _DONORS:
                break
    # In a set of one person, the last photo drawn is the donor.
    return min(candidates, key=lambda f: f[0])[1] if candidates else photo


def _sibling(source: _Source, split: str, target: Sample, rng: np.random.Generator) -> Photo | None:
    """Another picture of the same group, usually another frame of the clip; None if there is no usable one."""
    group = source.tree["real"][split][target.source][target.group]
    others = [s for s in group if s.path != target.path]
    for i in rng.permutation(len(others))[:_DONORS]:
        sample = others[int(i)]
        if (photo := load_photo(str(sample.path), sample.source, sample.group, source.config.side)) is not None:
            return photo
    return None


def pose(photo: Photo) -> NDArray[np.float64]:
    """The turn and tilt of the head, as the nose's position between the ends of the mesh: about 0.5 from the front."""
    p = photo.landmarks
    across, down = p[454] - p[234], p[152] - p[10]
    turn = (p[1] - p[234]) @ across / max(float(across @ across), 1e-6)
    return np.array([turn, (p[1] - p[10]) @ down / max(float(down @ down), 1e-6)])


_worker: tuple[_Source, Path] | None = None


_ALL = METHODS | LATENT
_REDRAWING = {"autoencode", "redraw"}
"""The methods that need the learnt decoders."""


def _start(config: ForgeConfig, out: Path) -> None:
    global _worker
    cv2.setNumThreads(1)
    if _REDRAWING & set(config.methods):
        from data_gen import decoders

        decoders.use(Path(config.decoders) if config.decoders else None)
    if config.redraw:
        from data_gen import latent

        latent.use(Path(config.redraw))
    _worker = (_Source(config), out)


def _work(index: int) -> Json:
    if _worker is None:
        raise RuntimeError("worker not started")
    return _item(*_worker, index)


def resumed(out: Path, count: int, make: Callable[[Sequence[int]], Iterable[Json]]) -> list[Json]:
    """The rows 0 .. `count` - 1 of a run; `make` gives those that an earlier run, which was cut off, lacks.

    Each row is written to disk as soon as it is made; at the end `manifest.jsonl` holds them all.
    """
    partial_file, rows = out / "manifest.part.jsonl", list[Json]()
    for line in partial_file.read_text(encoding="utf-8").splitlines() if partial_file.is_file() else ():
        try:
            rows.append(json_object(line, partial_file))
        except X2DFDError:  # half written
            break
    write_text(partial_file, "".join(json.dumps(row) + "\n" for row in rows))
    todo = range(len(rows), count)
    with partial_file.open("a", encoding="utf-8") as stream:
        for row in progress(make(todo), "forging", len(todo)):
            rows.append(row)
            stream.write(json.dumps(row) + "\n")
            stream.flush()
    write_manifest(out / "manifest.jsonl", rows)
    partial_file.unlink()
    return rows


def run(config: ForgeConfig, out: Path, workers: int = 1) -> Path:
    """Make (or finish) a forge run; returns the path of its `manifest.jsonl`. Raises X2DFDError when `out` holds
    another run or the input cannot be forged from, UnknownName for a method."""
    for name in config.methods:
        if name not in _ALL:
            raise UnknownName("forge method", name, _ALL)
    for share in ("forged", "harmless", "combine", "ready_made", "calib", "video"):
        if not 0 <= getattr(config, share) <= 1:
            raise X2DFDError(
                f"{share} must be a share from 0 to 1, not {getattr(config, share)}", code="share_out_of_range"
            )
    if config.combine and all(_ALL[name].needs_donor for name in config.methods):
        raise X2DFDError(
            f"--combine needs a method without a donor, and {', '.join(config.methods)} have one",
            code="donor_methods_alone",
        )
    _Source(config)  # refuse a bad manifest here with one line; in a worker it would break the pool
    settings = {**asdict(config), "data": manifest_sha256(config.data), "methods": list(config.methods)}
    settings |= {"splits": list(config.splits), "version": FORGE_VERSION, "decoders": None}
    if _REDRAWING & set(config.methods):  # other decoders draw other pictures
        from data_gen.decoders import WEIGHTS, load_bank

        weights = Path(config.decoders) if config.decoders else WEIGHTS
        load_bank(weights)  # refuse a bad file here, with one line
        settings["decoders"] = file_sha256(weights)
    elif config.decoders:
        raise X2DFDError(f"only the methods {' and '.join(sorted(_REDRAWING))} take --decoders", code="decoders_unused")
    if bool(config.redraw) != bool(set(LATENT) & set(config.methods)):
        raise X2DFDError(
            f"give --redraw exactly if the methods {' or '.join(LATENT)} are asked for", code="redraw_incomplete"
        )
    if config.redraw:
        from data_gen import latent

        settings["redraw"] = list(latent.load(Path(config.redraw)))  # by name: each is pinned
    with locked_folder(out):
        return _run_locked(config, settings, out, workers)


def _run_locked(config: ForgeConfig, settings: Json, out: Path, workers: int) -> Path:
    settings_file, manifest = out / "forge.json", out / "manifest.jsonl"
    if settings_file.is_file() and read_json(settings_file) != settings:
        raise X2DFDError(f"{out} holds a forge run with other settings; choose another --out", code="settings_differ")
    if manifest.is_file() and not settings_file.is_file():
        raise X2DFDError(f"{manifest} was not written by a forge run; choose another --out", code="not_a_forge_run")
    if not manifest.is_file():
        write_text(settings_file, json.dumps(settings, indent=1) + "\n")
        resumed(out, config.count, lambda todo: _forge_rows(config, out, todo, workers))
    _restore(config, out, manifest, workers)
    return manifest


def _restore(config: ForgeConfig, out: Path, manifest: Path, workers: int) -> None:
    """Make pictures again of which the file or its mask was deleted."""
    lines = manifest.read_text(encoding="utf-8").splitlines()
    rows = {row["path"]: row for row in (json_object(line, manifest) for line in lines)}
    lost = [
        int(Path(path).stem)
        for path, row in rows.items()
        if not all((out / row[file]).is_file() for file in ("path", "mask") if file in row)
    ]
    if lost:
        remade = progress(_forge_rows(config, out, lost, workers), "forging again", len(lost))
        write_manifest(manifest, (rows | {row["path"]: row for row in remade}).values())


def _forge_rows(config: ForgeConfig, out: Path, todo: Sequence[int], workers: int) -> Iterator[Json]:
    if workers <= 1:
        _start(config, out)
        try:
            yield from map(_work, todo)
        finally:
            if config.decoders:  # later calls in this process use the committed ones
                from data_gen import decoders

                decoders.use(None)
        return
    # Spawned, not forked: a forked copy of a process with running threads hangs.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start, initargs=(config, out)) as pool:
        yield from pool.map(_work, todo, chunksize=8)
