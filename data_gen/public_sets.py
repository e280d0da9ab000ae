"""The public deepfake data sets as their makers distribute them: DeepfakeBench and DF40 indices, FF++, Celeb-DF, DFDC.

Formats and their oddities: DeepfakeBench (github.com/SCLBD/DeepfakeBench), DF40 (arXiv 2406.13495), FaceForensics++
(arXiv 1901.08971), Celeb-DF (arXiv 1909.12962), DFDC (arXiv 2006.07397).
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from data_gen.readers import (
    Label,
    Media,
    Read,
    Reroot,
    add_clip,
    clips_in,
    df_class,
    listed_frames,
    load_json,
    mapping,
    natural,
    row,
)
from x2dfd.errors import UnknownName, X2DFDError
from x2dfd.files import Json

FFPP, DFD, CELEBDF = "FaceForensics++", "DeepFakeDetection", "Celeb-DF-v2"


def source_ids(dataset: str, clip: str) -> list[str]:
    """The people or original clips that went into a clip, by the naming that its data set documents; [] if unknown.
    FaceForensics++ `TARGET_SOURCE`, DeepFakeDetection `ACTOR_ACTOR__SCENE`, Celeb-DF `idA_idB_NUMBER` or a bare
    number."""
    pattern = {
        FFPP: r"(\d{3})(?:_(\d{3}))?",
        DFD: r"(\d{2})(?:_(\d{2}))?__.*",
        "Celeb-DF-v1": r"(id\d+|\d{5})(?:_(id\d+))?(?:_\d{4})?",
        CELEBDF: r"(id\d+|\d{5})(?:_(id\d+))?(?:_\d{4})?",
    }.get(dataset)
    match = pattern and re.fullmatch(pattern, clip)
    family = "Celeb-DF" if dataset.startswith("Celeb-DF") else dataset  # should both versions number the same people
    return [f"{family}/{name}" for name in match.groups() if name] if match else []


LEVELS = ("raw", "c23", "c40")
_INDEX_METHODS = {
    "FF-DF": "Deepfakes", "FF-F2F": "Face2Face", "FF-FS": "FaceSwap", "FF-NT": "NeuralTextures", "FF-SH": "FaceShifter",
    "FF-FH": "FaceShifter", "DFD_fake": "DeepFakeDetection", "CelebDFv1_fake": "Celeb-DF", "CelebDFv2_fake": "Celeb-DF",
    "DFDCP_FakeA": "DFDCP method A", "DFDCP_FakeB": "DFDCP method B", "DFDC_Fake": "DFDC", "DF_fake": "DeeperForensics",
    "UADFV_Fake": "UADFV",
}  # fmt: skip
_FF_KEYS = {FFPP, "FF-DF", "FF-F2F", "FF-FS", "FF-NT", "FaceShifter"}


_TAKEN_BACK = {
    "not", "non", "no", "un", "never", "isnt", "anti", "semi", "half", "part", "partly", "pseudo", "quasi", "near",
    "nearly", "almost", "hyper", "photo", "sur", "ultra", "real", "fake",
}  # fmt: skip
"""Words before `real` or `fake` that make it something else."""


def index_label(name: str, declared: Mapping[str, Label] | None = None) -> tuple[Label, str]:
    """Label and method that a class name of a DeepfakeBench index stands for.

    The format's rule is "ends in real: 0, anything else: 1". Here a fake needs a known name (or DF40's `METHOD_Fake`),
    so that a misspelt or foreign class is an error. A name that negates its last word (`not-real`) is neither.
    """
    if declared and name in declared:
        return declared[name], ""
    *before, last = re.split("[-_ ]+", name.lower())
    if _TAKEN_BACK.intersection(before):
        last = ""
    if last == "real":
        return "real", ""
    if name in _INDEX_METHODS or (last == "fake" and name.lower().endswith("_fake")):
        return "fake", _INDEX_METHODS.get(name) or name[: -len("_fake")]
    raise X2DFDError(f"class {name!r} needs a label: --label {name}=fake, or =real", code="class_unlabelled")


def index_source(key: str) -> str:
    """The data set that the pictures under a key of an index come from: FF++ and Celeb-DF serve many keys."""
    key = key.removesuffix("_c40")
    if key in _FF_KEYS or key.endswith("_ff"):
        return FFPP
    return CELEBDF if key.endswith("_cdf") else key


def read_deepfakebench(
    files: Sequence[Path],
    roots: Sequence[Path],
    *,
    compression: str = "",
    only: Sequence[str] = (),
    frames: int | None = None,
    labels: Mapping[str, Label] | None = None,
) -> Read:
    """Indices of DeepfakeBench and DF40: {data set: {class: {split: {[level:] clip: {"label", "frames"}}}}}.

    The key inside the file names the data set; the file's name does not matter. If the keys below a split are
    compression levels, `compression` chooses among several (a file or key that ends in `_c40` means c40).
    """
    read, reroot = Read(only), Reroot(roots)
    for file in files:
        for where, key, name, split, clips in _index_parts(file, read):
            label, method = index_label(name, labels)
            source = index_source(key)
            level, clips = _level(clips, where, compression, file.stem, key)
            collected = re.fullmatch("(FS|FR|FE|EFS)All", method)  # many methods of one class
            for clip, record in clips.items():
                paths = record.get("frames") if isinstance(record, dict) else None
                if not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
                    read.listed += 1
                    read.lacks(where, f"{clip} of {where} (no list of frames)")
                    continue
                if index_label(own := str(record.get("label", name)), labels)[0] != label:
                    raise X2DFDError(f"{where}: {clip} of class {name!r} is labelled {own!r}", code="label_contradicts")
                for path, relative, folder_parts in listed_frames(read, reroot, where, paths, frames):
                    if collected:  # DF40 lays each method out in a folder of its own
                        method = next((m for m in folder_parts if df_class("fake", m) == collected[1]), "")
                    sources = source_ids(source, folder_parts[-1]) if folder_parts else ()
                    fields: Json = {"source": source, "method": method, "split": split, "compression": level}
                    sample = row(path, relative, label, sources=sources, **fields)
                    read.samples.append(replace(sample, df_class=collected[1]) if collected else sample)
    read.notes += reroot.notes()
    return read


def _index_parts(file: Path, read: Read) -> Iterator[tuple[str, str, str, str, Json]]:
    """The parts of an index to read: place (for messages), data set, class, split, and the clips."""
    for key, classes in mapping(load_json(file), file.name).items():
        for name, splits in mapping(classes, f"{file.name}: {key}").items():
            for split, clips in mapping(splits, f"{file.name}: {key}: {name}").items():
                where = f"{file.name}: {key}: {name}: {split}"
                if read.takes(split):
                    yield where, key, name, split, mapping(clips, where)


def _level(clips: Json, where: str, compression: str, stem: str, key: str) -> tuple[str, Json]:
    """The compression level in force ("" where the format has none) and the clips below it."""
    if not clips or not set(clips) <= set(LEVELS):
        return "", clips
    filled = [level for level in clips if clips[level]]
    compression = compression or ("c40" if stem.endswith("_c40") or key.endswith("_c40") else "")
    if not filled:
        return compression, {}
    if not compression and len(filled) > 1:
        raise X2DFDError(
            f"{where}: choose one of the levels {', '.join(filled)} with --compression", code="compression_ambiguous"
        )
    level = compression or filled[0]
    if level not in filled:
        raise X2DFDError(f"{where}: it has no level {level} (levels: {', '.join(filled)})", code="compression_unknown")
    return level, mapping(clips[level], f"{where}: {level}")


FF_METHODS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures", "FaceShifter", DFD)


def read_ffpp(
    root: Path,
    *,
    methods: Sequence[str] = FF_METHODS[:4],
    compression: str = "c23",
    media: Media = Media.frames,
    lists: Path | None = None,
    only: Sequence[str] = (),
    frames: int | None = None,
) -> Read:
    """FaceForensics++ as it is unpacked: {original,manipulated}_sequences/NAME/LEVEL/{frames,videos}/CLIP. train.json,
    val.json and test.json hold each split's pairs of ids, in `lists` (default: the root). DeepFakeDetection and its
    actors come without splits."""
    for method in methods:
        if method not in FF_METHODS:
            raise UnknownName("method of FaceForensics++", method, FF_METHODS)
    if compression not in LEVELS:
        raise UnknownName("compression level", compression, LEVELS)
    read = Read(only)

    def add(clip_path: Path | None, name: str, label: Label, dataset: str, method: str = "", split: str = "") -> None:
        fields = {"source": dataset, "method": method, "split": split, "compression": compression}
        clip_name = f"{method or 'originals'}/{name}"
        add_clip(read, clip_path, root, clip_name, label, frames=frames, sources=source_ids(dataset, name), **fields)

    swaps = [m for m in methods if m != DFD]
    if swaps:
        originals = clips_in(root / "original_sequences" / "youtube" / compression, media)
        forged = {m: clips_in(root / "manipulated_sequences" / m / compression, media) for m in swaps}
        for split in ("train", "val", "test"):
            if not read.takes(split):
                continue
            pairs = load_json((lists or root) / f"{split}.json")
            if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
                raise X2DFDError(
                    f'{split}.json: expected pairs of ids, such as [["071", "054"], ...]', code="list_malformed"
                )
            for a, b in pairs:
                for name in (a, b):
                    add(originals.get(name), name, "real", FFPP, split=split)
                for method in swaps:
                    for name in (f"{a}_{b}", f"{b}_{a}"):
                        add(forged[method].get(name), name, "fake", FFPP, method, split)
    if DFD in methods and read.takes(""):
        for name, clip_path in clips_in(root / "original_sequences" / "actors" / compression, media).items():
            add(clip_path, name, "real", DFD)
        for name, clip_path in clips_in(root / "manipulated_sequences" / DFD / compression, media).items():
            add(clip_path, name, "fake", DFD, DFD)
    return read


_CELEB_FOLDERS: dict[str, Label] = {"Celeb-real": "real", "YouTube-real": "real", "Celeb-synthesis": "fake"}


def read_celebdf(
    root: Path,
    *,
    source: str = CELEBDF,
    media: Media = Media.frames,
    test_list: Path | None = None,
    everything: bool = False,
    frames: int | None = None,
) -> Read:
    """Celeb-DF v1 or v2: the clips of List_of_testing_videos.txt become split `test` (in that list, 1 is REAL).
    `everything` adds the other clips, without a split. They show the people of the test clips, so `finish` refuses them
    unless it divides anew or groups by clip."""
    if source not in ("Celeb-DF-v1", CELEBDF):
        raise UnknownName("data set", source, ("Celeb-DF-v1", CELEBDF))
    file = test_list or root / "List_of_testing_videos.txt"
    try:
        lines = [line.split(maxsplit=1) for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise X2DFDError(f"{file}: cannot be read ({error})", code="list_unreadable") from error
    read = Read()
    clips = {folder: clips_in(root / folder, media) for folder in _CELEB_FOLDERS if (root / folder).is_dir()}
    test_clips: set[tuple[str, str]] = set()

    def add(folder: str, name: str, split: str) -> None:
        label, clip_path = _CELEB_FOLDERS[folder], clips.get(folder, {}).get(name)
        fields = {"source": source, "method": "" if label == "real" else "Celeb-DF", "split": split}
        sources = source_ids(source, name)
        add_clip(read, clip_path, root, f"{folder}/{name}", label, frames=frames, sources=sources, **fields)

    for number, line in enumerate(lines, start=1):
        folder, _, name = line[-1].strip().replace("\\", "/").partition("/")
        if len(line) != 2 or line[0] not in ("0", "1") or folder not in _CELEB_FOLDERS or not name:
            raise X2DFDError(
                f"{file.name}: line {number}: expected `1 FOLDER/CLIP.mp4`, found {' '.join(line)!r}",
                code="list_malformed",
            )
        if (line[0] == "1") != (_CELEB_FOLDERS[folder] == "real"):
            raise X2DFDError(
                f"{file.name}: line {number}: {line[0]} for a clip of {folder}, but 1 means real here, and 0 fake",
                code="label_contradicts",
            )
        test_clips.add((folder, Path(name).stem))
    for folder, name in sorted(test_clips, key=lambda t: (t[0], natural(t[1]))):
        add(folder, name, "test")
    if everything:
        for folder, names in clips.items():
            for name in names:
                if (folder, name) not in test_clips:
                    add(folder, name, "")
    return read


def read_dfdc(files: Sequence[Path], *, media: Media = Media.videos, frames: int | None = None) -> Read:
    """DFDC: metadata.json ({"x.mp4": {"label": "REAL|FAKE", "split", "original"}}) or labels.csv (filename,label; 1 is
    fake). Clips lie beside that file, or in `frames/` or `videos/` there. A fake is grouped with its original; the same
    actor in two originals is not known."""
    read = Read()
    folders = [Path(os.path.abspath(f.parent)) for f in files]
    top = Path(os.path.commonpath(folders))
    for file, folder in zip(files, folders, strict=True):
        clips = clips_in(folder, media)
        for name, label, split, original in _dfdc_csv(file) if file.suffix == ".csv" else _dfdc_json(file):
            stem = Path(name).stem
            sources = [f"DFDC/{n}" for n in dict.fromkeys((stem, Path(original).stem if original else stem))]
            fields = {"source": "DFDC", "method": "" if label == "real" else "DFDC", "split": split}
            clip_name = f"{folder.name}/{file.name}/{name}"
            add_clip(read, clips.get(stem), top, clip_name, label, frames=frames, sources=sources, **fields)
    return read


_DfdcRow = tuple[str, Label, str, str]  # file name, label, split, original


def _dfdc_json(file: Path) -> list[_DfdcRow]:
    names: dict[object, Label] = {"REAL": "real", "FAKE": "fake"}
    rows: list[_DfdcRow] = []
    for name, entry in mapping(load_json(file), file.name).items():
        label = names.get(entry.get("label")) if isinstance(entry, dict) else None
        if label is None:
            raise X2DFDError(f"{file}: {name}: the label must be REAL or FAKE", code="label_missing")
        rows.append((name, label, str(entry.get("split") or ""), str(entry.get("original") or "")))
    return rows


def _dfdc_csv(file: Path) -> list[_DfdcRow]:
    names: dict[object, Label] = {"0": "real", "1": "fake"}
    rows: list[_DfdcRow] = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            for number, row in enumerate(csv.DictReader(stream, strict=True), start=1):
                label = names.get(row.get("label"))
                if label is None or not row.get("filename"):
                    raise X2DFDError(
                        f"{file}: row {number}: expected a filename and a label that is 0 or 1", code="list_malformed"
                    )
                rows.append((row["filename"], label, "", ""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise X2DFDError(f"{file}: cannot be read ({error})", code="list_unreadable") from error
    return rows
