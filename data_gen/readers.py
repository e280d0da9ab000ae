"""`python -m data_gen read KIND`: turns what users have on disk into a manifest, which every other stage reads.

A label comes from the user (`--real`, `--fake`), from a column, or from an index whose format defines it, and never
from the name of a file or folder. Each row carries its clip (`video`) and its `sources`: the people or clips that went
into it. Rows that share a source are one group, so a face swap and the two people in it are never on two sides of a
split. `sources` stays in the manifest, so that merged manifests are grouped again.

This module reads folders, X2-DFD lists and manifests. `public_sets.py` reads the public deepfake sets, `saved_sets.py`
Hugging Face data sets, and `read_commands.py` holds the commands.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, TypeVar

from x2dfd.errors import UnknownName, X2DFDError
from x2dfd.files import Json, parse_json
from x2dfd.manifest import Sample, read_manifest

Label = Literal["real", "fake"]

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".heic", ".heif", ".avif"}
_VIDEOS = {".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".ts", ".flv", ".ogv"}

_CLASSES = {
    "FS": "Deepfakes FaceSwap FaceShifter DeepFakeDetection Celeb-DF UADFV DeeperForensics FSGAN SimSwap InSwapper "
    "inswap BlendFace UniFace MobileSwap e4s FaceDancer DeepFaceLab",
    "FR": "Face2Face NeuralTextures FOMM FS_vid2vid facevid2vid Wav2Lip MRAA OneShot one_shot_free PIRender TPSM "
    "TPSMM LIA DaGAN danet SadTalker MCNet HyperReenact HeyGen",
    "FE": "CollabDiff e4e StarGAN StarGANv2 StyleCLIP",
    "EFS": "VQGAN ProGAN StyleGAN StyleGAN2 StyleGAN3 StyleGAN-XL DDPM DDIM RDDM PixArt sd1.5 sd2.1 DiT SiT MidJourney "
    "WhichIsReal",
}  # FaceForensics++ (arXiv 1901.08971), FaceShifter (1912.13457), DF40 (2406.13495, table of methods)
_DF_CLASS = {re.sub(r"[^a-z0-9]", "", m.lower()): c for c, names in _CLASSES.items() for m in names.split()}


def df_class(label: Label, method: str) -> str:
    """FS, FR, FE or EFS for known public methods, `real` for real pictures, otherwise ""."""
    return "real" if label == "real" else _DF_CLASS.get(re.sub(r"[^a-z0-9]", "", method.lower()), "")


T = TypeVar("T")


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts `9.png` before `10.png`; letters and digits may alternate (`seed1128.png`)."""
    return (*((0, int(t), "") if t.isdecimal() else (1, 0, t) for t in re.split(r"(\d+)", name)), (2, 0, name))


def evenly(items: Sequence[T], n: int | None) -> list[T]:
    """`n` items spread evenly, with the first and the last among them; all items when there are at most `n`."""
    if n is None or n >= len(items):
        return list(items)
    if n == 1:
        return [items[len(items) // 2]]
    return [items[(2 * i * (len(items) - 1) + n - 1) // (2 * (n - 1))] for i in range(n)]


@dataclass
class Read:
    """The result of a reader, which `finish` turns into a data set."""

    only: Sequence[str] = ()  # the splits to read; empty for all
    splits: set[str] = field(default_factory=set)  # splits that the source names
    samples: list[Sample] = field(default_factory=list)  # `group` may still be empty, see `extra["sources"]`
    listed: int = 0  # files (for FF++, Celeb-DF and DFDC: clips) that the source names
    missing: Counter[str] = field(default_factory=Counter)  # number of these that are not there, by part of the source
    examples: list[str] = field(default_factory=list)  # of missing files
    notes: list[str] = field(default_factory=list)  # for the person who reads the summary

    def takes(self, split: str) -> bool:
        """Whether to read this split of the source."""
        self.splits.add(split)
        return not self.only or split in self.only

    def lacks(self, part: str, what: str, n: int = 1) -> None:
        self.missing[part] += n
        if len(self.examples) < 3:
            self.examples.append(what)


# --- groups, splits, the manifest -----------------------------------------------------------------------------------


class Group(StrEnum):
    """How rows are grouped; no group is on two sides of a split."""

    identity = "identity"  # by all people and clips that went into a file
    clip = "clip"  # by clip alone: for given splits in which people appear twice


def components(sets: Sequence[Sequence[str]]) -> dict[str, str]:
    """The name of each source's connected component: its first member in natural order."""
    from scipy.cluster.hierarchy import DisjointSet  # slow to import

    joined = DisjointSet(name for names in sets for name in names)
    for first, *rest in sets:
        for name in rest:
            joined.merge(first, name)
    named = ((min(members, key=natural), members) for members in joined.subsets())
    return {name: first for first, members in named for name in members}


def parse_shares(text: str) -> dict[str, float]:
    """`train=0.8,val=0.1,test=0.1` as a mapping; raises X2DFDError unless the shares are positive and sum to 1."""
    try:
        shares = {name.strip(): float(value) for name, value in (p.split("=") for p in text.split(","))}
    except ValueError:
        shares = {}
    if not shares or "" in shares or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise X2DFDError(f"shares {text!r}: write train=0.8,val=0.1,test=0.1, with a sum of 1", code="shares_malformed")
    return shares


def split_by_hash(group: str, shares: Mapping[str, float]) -> str:
    """The split of a group, which depends on its name and the shares alone, not on the rest of the data set."""
    number = int(hashlib.sha256(f"split:{group}".encode()).hexdigest()[:13], 16) / 16**13
    for name, share in shares.items():
        number -= share
        if number < 0:
            return name
    return list(shares)[-1]  # rounding


def finish(
    read: Read,
    *,
    shares: Mapping[str, float] | None = None,
    split: str = "",
    group: Group = Group.identity,
    allow_missing: bool = False,
) -> list[Sample]:
    """Refuse a partial data set, drop repetitions, and give every sample its group, its split and its own id.

    `shares` divides the groups anew, and `split` puts everything into one split; without either, the source's splits
    stay. Raises X2DFDError when more than 1 % is missing (unless allowed), when one file has two labels, methods or
    splits, and when a group is in two splits.
    """
    for name in read.only:
        if name not in read.splits:
            raise UnknownName("split", name, read.splits - {""})
    gone = read.missing.total()
    if gone > 0.01 * read.listed and not allow_missing:
        details = "; ".join(f"{part}: {n}" for part, n in read.missing.most_common(5))
        raise X2DFDError(
            f"{gone} of {read.listed} are missing ({details}), such as {', '.join(read.examples)}. Is the root right? "
            + "".join(f"{note}. " for note in read.notes)
            + "To leave them out: --allow-missing",
            code="files_missing",
        )
    if gone:
        read.notes.append(f"missing: {gone} of {read.listed} ({gone / read.listed:.2%}), such as {read.examples[0]}")

    unique: dict[Path, Sample] = {}
    for s in read.samples:
        if shares or split:
            s = replace(s, split=split)
        first = unique.setdefault(s.path, s)
        for column, a, b in (("label", first.label, s.label), ("method", first.method, s.method)):
            if a and b and a != b:
                raise X2DFDError(f"{s.path}: {column} {a!r} ({first.id}) and {b!r} ({s.id})", code="samples_contradict")
        if first.split != s.split:
            raise X2DFDError(
                f"{s.path} is in the splits {first.split!r} and {s.split!r} of its source. Read one of them (--only), "
                "or divide anew (--shares)",
                code="split_contradicts",
            )
    if not unique:
        raise X2DFDError("no picture or video was found, so there is nothing to write", code="nothing_found")
    if n_repeated := len(read.samples) - len(unique):
        read.notes.append(f"listed more than once, kept once: {n_repeated}")

    samples = list(unique.values())
    if group is Group.clip:
        groups = [_clip(s) or s.group or s.id for s in samples]
    else:
        nodes = [_nodes(s) for s in samples]
        component_of = components(nodes)
        groups = [component_of[first] for first, *_ in nodes]
    ids: Counter[str] = Counter()
    splits: dict[str, str] = {}
    result = []
    for s, name in zip(samples, groups, strict=True):
        s = replace(s, group=name, split=split_by_hash(name, shares) if shares else s.split)
        if splits.setdefault(name, s.split) != s.split:
            places = " and in ".join(repr(n) if n else "no split" for n in (splits[name], s.split))
            raise X2DFDError(
                f"the source's splits share people or clips: group {name!r} is in {places} ({s.id}). "
                "Read one split (--only), divide anew (--shares), or keep only the frames of each clip "
                "together (--group clip)",
                code="group_across_splits",
            )
        ids[s.id] += 1
        result.append(replace(s, id=f"{s.id}~{ids[s.id]}") if ids[s.id] > 1 else s)
    return result


def sources_of(sample: Sample) -> list[str]:
    """The column `sources`: a list or, in a CSV file, a JSON list; [] when there is none."""
    value = sample.extra.get("sources") or []
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            value = None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise X2DFDError(
            f"{sample.id}: `sources` must be a list, not {sample.extra['sources']!r}", code="sources_malformed"
        )
    return value


def _nodes(sample: Sample) -> list[str]:
    return sources_of(sample) or [sample.group or _clip(sample) or sample.id]


def _clip(sample: Sample) -> str:
    """The clip without the label that `row` writes into its id; "" when there is none. Real and fake frames of one
    folder are scored as two clips but grouped as one, so that neither leaks to the other side of a split."""
    prefix = f"{sample.source}/{sample.label}/"
    video = sample.video or ""
    return f"{sample.source}/{video[len(prefix) :]}" if video.startswith(prefix) else video


def summary(out: Path, samples: Sequence[Sample], notes: Sequence[str]) -> str:
    """The counts of a data set, split by split, in words."""
    lines = [f"{out}: {len(samples)} rows, {len({s.group for s in samples})} groups"]
    for split in sorted({s.split for s in samples}):
        rows = [s for s in samples if s.split == split]
        labels = Counter(s.label for s in rows)
        sizes = Counter(s.group for s in rows)
        lines.append(
            f"  {split or '(no split)'}: {labels['real']} real, {labels['fake']} fake, {len(sizes)} groups, "
            f"{len({s.video for s in rows if s.video})} clips; largest group {max(sizes.values()) / len(rows):.0%}"
        )
    return "\n".join(lines + [f"  {note}" for note in notes])


# --- files and clips ------------------------------------------------------------------------------------------------


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder, in natural order."""
    try:
        with os.scandir(folder) as iterator:
            return sorted(iterator, key=lambda e: natural(e.name))
    except OSError as error:
        raise X2DFDError(f"{folder}: cannot be read ({error.strerror})", code="folder_unreadable") from error


def _files(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Pictures and videos below a folder in natural order, links followed, and the number of other files by suffix."""
    if not folder.is_dir():
        raise X2DFDError(f"no such folder: {folder}", code="folder_missing")
    files: list[Path] = []
    other_suffixes: Counter[str] = Counter()
    seen: set[str] = set()
    for directory, subfolders, names in os.walk(folder, followlinks=True):
        real_path = os.path.realpath(directory)
        if real_path in seen:  # a link back to a folder above
            subfolders.clear()
            continue
        seen.add(real_path)
        subfolders[:] = [f for f in subfolders if not f.startswith(".")]
        for name in names:
            suffix = Path(name).suffix.lower()
            if suffix in _PICTURES | _VIDEOS:
                files.append(Path(directory, name))
            elif not name.startswith("."):
                other_suffixes[suffix or name] += 1
    return sorted(files, key=lambda p: [natural(part) for part in p.relative_to(folder).parts]), other_suffixes


def row(
    path: Path,
    relative: str,
    label: Label,
    *,
    source: str,
    method: str = "",
    split: str = "",
    clip: bool = True,
    sources: Sequence[str] = (),
    **extra: str,
) -> Sample:
    """A row. `relative` is the file's path below the data's root, with slashes, so that ids do not depend on the root.
    A frame's clip is its folder, a video's clip is the file; its id is source, label and path, as a real clip and its
    forgeries share names."""
    video = f"{source}/{label}/{relative if path.suffix.lower() in _VIDEOS else relative.rpartition('/')[0]}"
    columns: Json = {k: v for k, v in extra.items() if v}
    if sources:
        columns["sources"] = list(sources)
    return Sample(
        id=f"{source}/{relative}" if source else relative,
        path=Path(os.path.abspath(path)),
        label=label,
        method=method,
        df_class=df_class(label, method),
        source=source,
        split=split,
        video=video if clip else None,
        extra=columns,
    )


def add_clip(
    read: Read, clip_path: Path | None, root: Path, name: str, label: Label, *, frames: int | None, **fields: Any
) -> None:
    """Add the rows of one clip, a video file or the frames in a folder; a clip that is not there counts as missing."""
    read.listed += 1
    files = [clip_path] if clip_path and clip_path.is_file() else []
    if clip_path and clip_path.is_dir():
        names = [e.name for e in entries(clip_path) if Path(e.name).suffix.lower() in _PICTURES]
        files = [clip_path / n for n in evenly(names, frames)]
    if not files:
        read.lacks(name.rpartition("/")[0], name)
    read.samples += [row(f, f.relative_to(root).as_posix(), label, **fields) for f in files]


class Media(StrEnum):
    """The files of a clip that become rows."""

    frames = "frames"  # the pictures of `frames/CLIP/`
    videos = "videos"  # the file `videos/CLIP.mp4`


def clips_in(folder: Path, media: Media) -> dict[str, Path]:
    """Clips by name: in `frames/` or `videos/` below the folder or, without such a folder, directly in it."""
    directory = folder / media.value if (folder / media.value).is_dir() else folder
    if media is Media.frames:
        return {e.name: Path(e.path) for e in entries(directory) if e.is_dir()}
    return {Path(e.name).stem: Path(e.path) for e in entries(directory) if Path(e.name).suffix.lower() in _VIDEOS}


# --- listed paths ---------------------------------------------------------------------------------------------------


def path_parts(path: str) -> tuple[str, ...]:
    """Components of a listed path with either separator; a drive is one, and a leading slash is ignored."""
    return tuple(p for p in path.replace("\\", "/").split("/") if p not in ("", "."))


class Reroot:
    """Finds folders that an index made on another machine lists, below the roots that the user names. Each is searched
    below every root and its `rgb/`, `DF40/` and `DF40_train/`, with as few leading components stripped as possible.
    Prefixes that matched before are tried first."""

    def __init__(self, roots: Sequence[Path]) -> None:
        for root in roots:
            if not root.is_dir():
                raise X2DFDError(f"no such folder: {root}", code="folder_missing")
        below = ("", "rgb", "DF40", "DF40_train")
        self.bases = [(root, base) for root in roots for b in below if (base := root / b).is_dir()]
        self.mappings: list[tuple[tuple[str, ...], Path, Path]] = []  # stripped prefix, root, base; shortest first
        self.resolved: Counter[tuple[str, str]] = Counter()  # (stripped prefix, base) -> folders
        self.found_folders: dict[tuple[str, ...], tuple[Path, str] | None] = {}

    def folder(self, parts: tuple[str, ...]) -> tuple[Path, str] | None:
        """The folder and its path below its root, or None."""
        if parts not in self.found_folders:
            self.found_folders[parts] = None if ".." in parts else self._find(parts)
        return self.found_folders[parts]

    def _find(self, parts: tuple[str, ...]) -> tuple[Path, str] | None:
        untried = ((parts[:k], root, base) for k in range(max(1, len(parts))) for root, base in self.bases)
        for from_mapping, candidates in ((True, iter(self.mappings)), (False, untried)):
            for prefix, root, base in candidates:
                directory = base.joinpath(*parts[len(prefix) :])
                if parts[: len(prefix)] == prefix and directory.is_dir():
                    if not from_mapping:
                        self.mappings = sorted([*self.mappings, (prefix, root, base)], key=lambda m: len(m[0]))
                    self.resolved["/".join(prefix), str(base)] += 1
                    return directory, "" if directory == root else directory.relative_to(root).as_posix()
        return None

    def notes(self) -> list[str]:
        """The number of listed folders that each prefix mapping found."""
        total = len(self.found_folders)
        return [f"{n} of {total} folders found: {p or '(as listed)'} -> {b}" for (p, b), n in self.resolved.items()]


def listed_frames(
    read: Read, reroot: Reroot, part: str, paths: Iterable[str], frames: int | None
) -> list[tuple[Path, str, tuple[str, ...]]]:
    """The listed files that exist, by folder in natural order: (file, its path below the root, its listed folder)."""
    folders: dict[tuple[str, ...], set[str]] = {}
    for path in paths:
        *folder, name = path_parts(path) or ("",)
        folders.setdefault(tuple(folder), set()).add(name)
        read.listed += 1
    files = []
    for parts, names in folders.items():
        located = reroot.folder(parts)
        existing = names & {e.name for e in entries(located[0])} if located else set()
        if absent := sorted(names - existing, key=natural):
            read.lacks(part, "/".join((*parts, absent[0])), len(absent))
        if located:
            for name in evenly(sorted(existing, key=natural), frames):
                files.append((located[0] / name, f"{located[1]}/{name}".lstrip("/"), parts))
    return files


def load_json(file: Path) -> Any:
    try:
        return parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise X2DFDError(f"{file}: not a JSON file ({error})", code="not_json") from error


def mapping(value: object, where: str) -> Json:
    """The value, if it is a JSON object."""
    if not isinstance(value, dict):
        raise X2DFDError(f"{where}: expected a JSON object, found {type(value).__name__}", code="not_an_object")
    return value


# --- readers --------------------------------------------------------------------------------------------------------

Labelled = tuple[Path, Label, str]  # folder or list, its label, method


def labelled(real: Sequence[str] | None, fake: Sequence[str] | None) -> list[Labelled]:
    """The paths that the user calls real or fake; a fake may be written METHOD=PATH."""
    inputs: list[Labelled] = [(Path(r), "real", "") for r in real or ()]
    for text in fake or ():
        method, separator, path = text.partition("=")
        has_method = separator and not Path(text).exists()
        inputs.append((Path(path), "fake", method) if has_method else (Path(text), "fake", ""))
    return inputs


def read_folders(
    inputs: Sequence[Labelled], *, source: str = "", clips: bool = False, frames: int | None = None
) -> Read:
    """Read folders of pictures or videos, each of one label; with `clips`, the pictures of a folder are one clip."""
    if not inputs:
        raise X2DFDError(
            "say which folders are real and which fake: --real DIR, --fake [METHOD=]DIR", code="option_missing"
        )
    read = Read()
    root = Path(os.path.commonpath([os.path.abspath(p.parent) for p, _, _ in inputs]))
    for folder, label, method in inputs:
        files, other_suffixes = _files(folder)
        if other_suffixes:
            read.notes.append(f"{folder}: no picture or video, left out: {dict(other_suffixes.most_common(5))}")
        if not files:
            raise X2DFDError(f"{folder}: no picture or video in it", code="folder_empty")
        by_clip: dict[Path, list[Path]] = {}
        for f in files:
            by_clip.setdefault(f.parent if clips and f.suffix.lower() in _PICTURES else f, []).append(f)
        for f in (f for clip_files in by_clip.values() for f in evenly(clip_files, frames)):
            relative = Path(os.path.abspath(f)).relative_to(root).as_posix()
            is_clip = clips or f.suffix.lower() in _VIDEOS
            read.samples.append(row(f.absolute(), relative, label, source=source, method=method, clip=is_clip))
    read.listed = len(read.samples)
    return read


def read_x2dfd_lists(
    inputs: Sequence[Labelled],
    *,
    roots: Sequence[Path] = (),
    source: str = "",
    clips: bool = False,
    frames: int | None = None,
) -> Read:
    """Read X2-DFD lists, {"Description": root, "images": [{"image_path": path}]}, each of one label. Without `roots`,
    the root is the list's Description if there is such a folder, else the list's folder."""
    if not inputs:
        raise X2DFDError(
            "these lists hold no labels: give each as --real LIST or as --fake LIST", code="option_missing"
        )
    read = Read()
    for file, label, method in inputs:
        data = load_json(file)
        try:
            paths = [str(entry["image_path"]) for entry in data["images"]]
            listed_root = Path(str(data.get("Description") or "."))
        except (TypeError, KeyError, AttributeError) as error:
            raise X2DFDError(
                f'{file}: not {{"Description": ..., "images": [{{"image_path": ...}}]}}', code="list_malformed"
            ) from error
        reroot = Reroot(roots or [listed_root if listed_root.is_absolute() and listed_root.is_dir() else file.parent])
        for path, relative, _ in listed_frames(read, reroot, file.name, paths, frames if clips else None):
            read.samples.append(row(path, relative, label, source=source, method=method, clip=clips))
        read.notes += reroot.notes()
    return read


def read_manifests(files: Sequence[Path], *, only: Sequence[str] = ()) -> Read:
    """Read and merge manifests in any of the three formats; groups that share one of their `sources` become one."""
    read = Read(only)
    for file in files:
        for s in read_manifest(file):
            if not read.takes(s.split):
                continue
            if sources := sources_of(s):
                # The group becomes a source, so that its rows stay together.
                s = replace(s, extra=s.extra | {"sources": list(dict.fromkeys([*sources, s.group]))})
            read.samples.append(s)
    read.listed = len(read.samples)
    return read
