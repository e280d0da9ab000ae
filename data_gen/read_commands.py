"""The commands `python -m data_gen read KIND`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from data_gen.public_sets import CELEBDF, FF_METHODS, read_celebdf, read_deepfakebench, read_dfdc, read_ffpp
from data_gen.readers import (
    Group,
    Label,
    Media,
    Read,
    finish,
    labelled,
    parse_shares,
    read_folders,
    read_manifests,
    read_x2dfd_lists,
    summary,
)
from data_gen.saved_sets import Columns, read_datasets
from x2dfd.errors import X2DFDError
from x2dfd.files import Json
from x2dfd.manifest import write_manifest
from x2dfd.options import names

Out = Annotated[Path, typer.Option(help="manifest to write (.jsonl)")]
Shares = Annotated[str, typer.Option(help="divide the groups anew by hash: train=0.8,val=0.1,test=0.1")]
Split = Annotated[str, typer.Option(help="put everything into this one split")]
Only = Annotated[list[str] | None, typer.Option(help="only this split of the source; may be repeated")]
Grouping = Annotated[Group, typer.Option("--group", help="what is kept on one side of a split")]
Frames = Annotated[int | None, typer.Option(min=1, help="at most this many frames a clip, evenly spaced")]
AllowMissing = Annotated[bool, typer.Option("--allow-missing", help="leave out missing files, even more than 1 %")]
Roots = Annotated[list[Path] | None, typer.Option("--root", help="folder that holds the listed files; repeatable")]
Real = Annotated[list[str] | None, typer.Option(metavar="PATH", help="everything in it is real; repeatable")]
Fake = Annotated[list[str] | None, typer.Option(metavar="[METHOD=]PATH", help="everything in it is fake; repeatable")]
Source = Annotated[str, typer.Option(help="name of the data set or camera")]
Clips = Annotated[bool, typer.Option("--clips", help="pictures in one folder are frames of one clip")]
Level = Annotated[str, typer.Option(help="raw, c23 or c40")]

EXAMPLE = "Example:\n\n  python -m data_gen read {}"
_EPILOG = """Examples:\n
  python -m data_gen read folder --real photos/ --fake StyleGAN2=generated/ --out set.jsonl\n
  python -m data_gen read deepfakebench Celeb-DF-v2.json --root datasets/ --only test --frames 32 --out celeb.jsonl
"""

kinds = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, epilog=_EPILOG, help="Turn what is on disk into a manifest."
)


def _write(
    out: Path,
    reader: Callable[[], Read],
    shares: str = "",
    split: str = "",
    group: Group = Group.identity,
    allow_missing: bool = False,
) -> None:
    if out.suffix != ".jsonl":
        raise X2DFDError(f"{out}: the manifest's name must end in .jsonl", code="manifest_format_unknown")
    if shares and split:
        raise X2DFDError("give either --shares or --split", code="options_conflict")
    split_shares = parse_shares(shares) if shares else None
    read = reader()
    samples = finish(read, shares=split_shares, split=split, group=group, allow_missing=allow_missing)
    write_manifest(out, samples)
    print(summary(out, samples, read.notes))


@kinds.command(epilog=EXAMPLE.format("folder --real photos --fake forged --out photos.jsonl"))
def folder(
    out: Out,
    real: Real = None,
    fake: Fake = None,
    source: Source = "",
    clips: Clips = False,
    frames: Frames = None,
    split: Split = "",
    shares: Shares = "",
) -> None:
    """Folders of pictures or videos; you say which are real and which fake."""
    _write(out, lambda: read_folders(labelled(real, fake), source=source, clips=clips, frames=frames), shares, split)


@kinds.command(
    "x2dfd-list", epilog=EXAMPLE.format("x2dfd-list --real real.json --fake fake.json --root data --out lists.jsonl")
)
def x2dfd_list(
    out: Out,
    lists: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    real: Real = None,
    fake: Fake = None,
    root: Roots = None,
    source: Source = "",
    clips: Clips = False,
    frames: Frames = None,
    split: Split = "",
    shares: Shares = "",
    allow_missing: AllowMissing = False,
) -> None:
    """Lists in X2-DFD's published format; you say which hold reals and which fakes."""
    given = [] if lists else labelled(real, fake)  # a list without a label is refused in any case
    reader = partial(read_x2dfd_lists, given, roots=root or (), source=source, clips=clips, frames=frames)
    _write(out, reader, shares, split, allow_missing=allow_missing)


@kinds.command("datasets", epilog=EXAMPLE.format("datasets build/saved --out saved.jsonl"))
def saved_datasets(
    paths: Annotated[list[Path], typer.Argument(metavar="DIR...", help="folders written by save_to_disk")],
    out: Out,
    images: Annotated[Path | None, typer.Option(help="folder for the pictures; default: beside --out")] = None,
    image_column: str = "image",
    label_column: str = "label",
    real_value: Annotated[list[str] | None, typer.Option(help="label of reals; repeatable")] = None,
    fake_value: Annotated[list[str] | None, typer.Option(help="label of fakes; repeatable")] = None,
    method_column: str = "",
    group_column: str = "",
    video_column: str = "",
    only: Only = None,
    split: Split = "",
    shares: Shares = "",
    allow_missing: AllowMissing = False,
) -> None:
    """Hugging Face data sets saved on disk; you say which column and which values."""
    labels = (tuple(real_value or ()), tuple(fake_value or ()))
    columns = Columns(image_column, label_column, *labels, method_column, group_column, video_column)
    reader = partial(read_datasets, paths, images or out.parent / f"{out.stem}-images", columns, only=only or ())
    _write(out, reader, shares, split, allow_missing=allow_missing)


@kinds.command(epilog=EXAMPLE.format("deepfakebench FaceForensics++.json --root data --out ffpp.jsonl"))
def deepfakebench(
    indices: Annotated[list[Path], typer.Argument(metavar="INDEX.json...")],
    out: Out,
    root: Annotated[list[Path], typer.Option(help="folder that holds the listed files; repeatable")],
    compression: Level = "",
    label: Annotated[
        list[str] | None, typer.Option(metavar="CLASS=real|fake", help="label of a class that is not known here")
    ] = None,
    frames: Frames = None,
    only: Only = None,
    split: Split = "",
    shares: Shares = "",
    group: Grouping = Group.identity,
    allow_missing: AllowMissing = False,
) -> None:
    """JSON indices of DeepfakeBench and DF40, with paths written in any way."""
    labels: dict[str, Label] = {}
    for text in label or ():
        name, _, value = text.rpartition("=")
        if value not in ("real", "fake"):
            raise X2DFDError(f"--label {text}: write CLASS=real or CLASS=fake", code="option_malformed")
        labels[name] = "real" if value == "real" else "fake"
    options: Json = {"compression": compression, "only": only or (), "frames": frames, "labels": labels}
    _write(out, partial(read_deepfakebench, indices, root, **options), shares, split, group, allow_missing)


@kinds.command(epilog=EXAMPLE.format("ffpp FaceForensics++ --out ffpp.jsonl"))
def ffpp(
    root: Annotated[Path, typer.Argument(help="folder with original_sequences/ and manipulated_sequences/")],
    out: Out,
    methods: Annotated[str, typer.Option(help="comma-separated")] = ",".join(FF_METHODS[:4]),
    compression: Level = "c23",
    media: Media = Media.frames,
    lists: Annotated[Path | None, typer.Option(help="folder of train.json, val.json, test.json")] = None,
    frames: Frames = None,
    only: Only = None,
    shares: Shares = "",
    allow_missing: AllowMissing = False,
) -> None:
    """FaceForensics++ with its own splits, which keep a pair and both of its sources together."""
    options: Json = {"methods": names(methods), "compression": compression, "only": only or (), "frames": frames}
    _write(out, partial(read_ffpp, root, media=media, lists=lists, **options), shares, allow_missing=allow_missing)


@kinds.command(epilog=EXAMPLE.format("celebdf Celeb-DF-v2 --out celebdf.jsonl"))
def celebdf(
    root: Annotated[Path, typer.Argument(help="folder with Celeb-real/, YouTube-real/, Celeb-synthesis/")],
    out: Out,
    source: Source = CELEBDF,
    media: Media = Media.frames,
    test_list: Annotated[Path | None, typer.Option(help="List_of_testing_videos.txt (default: in ROOT)")] = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="also clips outside the list, which show the same people: needs --shares or --group clip",
        ),
    ] = False,
    frames: Frames = None,
    shares: Shares = "",
    group: Grouping = Group.identity,
    allow_missing: AllowMissing = False,
) -> None:
    """Celeb-DF: the official test clips as split `test`."""
    options: Json = {"source": source, "test_list": test_list, "everything": everything, "frames": frames}
    _write(out, partial(read_celebdf, root, media=media, **options), shares, "", group, allow_missing)


@kinds.command(epilog=EXAMPLE.format("dfdc dfdc_train_part_0/metadata.json --out dfdc.jsonl"))
def dfdc(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="metadata.json or labels.csv")],
    out: Out,
    media: Media = Media.videos,
    frames: Frames = None,
    split: Split = "",
    shares: Shares = "",
    group: Grouping = Group.identity,
    allow_missing: AllowMissing = False,
) -> None:
    """DFDC: clips beside their metadata.json or labels.csv."""
    _write(out, partial(read_dfdc, files, media=media, frames=frames), shares, split, group, allow_missing)


@kinds.command(epilog=EXAMPLE.format("manifest a.csv b.jsonl --out both.jsonl"))
def manifest(
    files: Annotated[list[Path], typer.Argument(metavar="MANIFEST...", help=".csv, .jsonl or .parquet")],
    out: Out,
    only: Only = None,
    split: Split = "",
    shares: Shares = "",
    group: Grouping = Group.identity,
) -> None:
    """Convert, merge or divide manifests."""
    _write(out, partial(read_manifests, files, only=only or ()), shares, split, group)
