"""The checks of `x2dfd doctor`: the installation, its weights, and a command for everything that is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from x2dfd.errors import SetupError, X2DFDError
from x2dfd.files import Json, file_sha256, read_json

LIBRARIES = ("torch", "transformers", "peft", "ai-edge-litert", "numpy", "pillow", "av")
EXTRAS = {  # of pyproject.toml: a package of each, and what is not possible without it
    "heic": ("pillow-heif", "photos in HEIC, as iPhones take them, are refused"),
    "c2pa": ("c2pa-python", "the Content Credentials (C2PA) of files are not checked"),
    "serve": ("openai", "models behind an endpoint cannot be asked"),
    "serve-http": ("fastapi", "`x2dfd serve` does not start"),
    "app": ("gradio", "the chat demo does not start"),
    "ray": ("ray", "`x2dfd detect --engine ray` does not start"),
}
FACE_MODELS = {  # SHA-256 of the files that mediapipe 0.10.21 carries
    "face_detection_full_range_sparse.tflite": "2c3728e6da56f21e21a320433396fb06d40d9088f2247c05e5635a688d45dfe1",
    "face_landmark.tflite": "1055cb9d4a9ca8b8c688902a3a5194311138ba256bcc94e336d8373a5f30c814",
}
WEIGHTS = Path(__file__).parent / "weights"
REINSTALL = "pip install --force-reinstall --no-deps -e .  (in a fresh checkout)"


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    ok: bool | None  # None: neither needed nor wrong
    detail: str  # for something absent: what is not possible without it
    mend: str | None = None  # the command that mends it, or the way to get it
    facts: Json = field(default_factory=dict)  # of an artefact: licence, size, SHA-256, source


def diagnose() -> list[Check]:
    """Check the installation, the weights and the machine. Reads local files only; a finding never raises.

    Imports torch, to learn its thread count and whether it sees a GPU.
    """
    steps: tuple[tuple[str, Callable[[], Iterator[Check]]], ...] = (
        ("python", _python),
        ("libraries", _libraries),
        ("extras", _extras),
        ("torch", _torch),
        ("torchvision", _torchvision),
        ("model families", _families),
        ("face models", _face_models),
        ("base model", _parts),
        ("embedded model", _embedded),
        ("experts", _experts),
        ("int8", _ranges),
        ("cache", _cache),
    )
    checks: list[Check] = []
    for name, step in steps:
        try:
            checks += step()
        except Exception as error:  # a broken installation is what this command is for: the fault is the finding
            checks.append(Check(name, False, f"{type(error).__name__}: {error}", REINSTALL))
    return checks


def _python() -> Iterator[Check]:
    enough = sys.version_info >= (3, 11)
    detail = f"{platform.python_version()}, {platform.platform()}"
    yield Check("python", enough, detail, None if enough else "python3.11")


def _libraries() -> Iterator[Check]:
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("x2dfd") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Check("x2dfd", None, "run from its source folder: no command `x2dfd` on the path", "pip install -e .")
        requirements = []
    else:
        yield Check("x2dfd", True, importlib.metadata.version("x2dfd"))
    specifiers = {requirement.name: requirement.specifier for requirement in requirements if requirement.marker is None}
    for name in LIBRARIES:
        needed = f"{name}{specifiers.get(name, '')}"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, False, "not installed", f'pip install "{needed}"')
            continue
        fits = name not in specifiers or specifiers[name].contains(version, prereleases=True)
        detail = version if fits else f"{version}, but {needed} is needed"
        yield Check(name, fits, detail, None if fits else f'pip install "{needed}"')


def _extras() -> Iterator[Check]:
    for extra, (package, detail) in EXTRAS.items():
        try:
            yield Check(extra, True, f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            yield Check(extra, None, detail, f"pip install 'x2dfd[{extra}]'")


def _torch() -> Iterator[Check]:
    import torch

    from x2dfd.tower import quick_in_16_bits
    from x2dfd.tower_pass import adds_bytes_in_full

    yield Check("threads", True, f"torch uses {torch.get_num_threads()} of {os.cpu_count()} processors")
    quick = "bf16 on this CPU, which has AMX or AMD's AVX-512 BF16 and is quicker in it"
    slow = "fp32 on this CPU, which has neither AMX nor AMD's AVX-512 BF16"
    takes = quick if quick_in_16_bits("cpu") else slow
    if adds_bytes_in_full() and not quick_in_16_bits("cpu"):
        takes += "; for many pictures, --dtype int8 takes half the time"
    yield Check("precision", True, f"the embedded model takes {takes}")
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        yield Check("gpu", True, f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB")
    else:
        detail = "larger models and trainings run on the CPU, where they are slow or do not fit"
        yield Check("gpu", None, detail, "an NVIDIA GPU, and a build of torch for it")


def _torchvision() -> Iterator[Check]:
    if importlib.util.find_spec("torchvision") is None:
        return  # `_families` says which models lack it
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a build for another torch fails in several ways
        detail = f"installed for another torch ({type(error).__name__}: {error}): LLaVA cannot be loaded beside it"
        yield Check("torchvision", False, detail, "pip uninstall torchvision, or take it from the index of torch")
    else:
        yield Check("torchvision", True, f"{importlib.metadata.version('torchvision')}, loads")


def _families() -> Iterator[Check]:
    """The model families of the hub that can be loaded here, as their processor can be imported."""
    from x2dfd.checkpoints import FAMILIES, processor_class

    missing: dict[str, str] = {}
    for name, family in FAMILIES.items():
        try:
            processor_class(family)
        except SetupError as error:
            missing[name] = ", ".join(family.needs) or str(error)
    ready = ", ".join(name for name in FAMILIES if name not in missing)
    yield Check("model families", True, f"{ready or 'none'} can be loaded from the hub")
    if missing:
        reasons = ", ".join(f"{name} (without {package})" for name, package in missing.items())
        yield Check("more families", None, f"cannot be loaded: {reasons}", "pip install 'x2dfd[hub]'")


def _face_models() -> Iterator[Check]:
    for name, expected in FACE_MODELS.items():
        path = WEIGHTS / "faces" / name
        facts = {"licence": "Apache-2.0", "source": "mediapipe 0.10.21", "sha256": expected}
        if not path.exists():
            yield Check(f"face model {path.stem}", False, "missing", REINSTALL, facts)
            continue
        whole = file_sha256(path) == expected
        facts["size"] = _size(path.stat().st_size)
        detail = "present" if whole else "present, but with another SHA-256"
        yield Check(f"face model {path.stem}", whole, detail, None if whole else REINSTALL, facts)


def _parts() -> Iterator[Check]:
    from x2dfd.fetch import PARTS, missing

    needed = missing()
    for name, part in PARTS.items():
        present = part.present()
        facts = {"licence": part.licence, "size": f"{part.size_mb:.0f} MB"}
        facts |= {"sha256": part.sha256, "source": part.url_hint}
        detail = f"{part.what}: {'present' if present else 'not fetched'}"
        ok = True if present else False if name in needed else None
        yield Check(f"part {name}", ok, detail, None if present else f"x2dfd fetch {name}", facts)


def _embedded() -> Iterator[Check]:
    path = WEIGHTS / "embedded" / "card.json"
    if not path.exists():
        yield Check("embedded model", False, "its card is missing", REINSTALL)
        return
    try:
        card = read_json(path)
    except X2DFDError as error:
        yield Check("embedded model", False, str(error), REINSTALL)
        return
    facts = {key: card[key] for key in ("licence", "sha256", "source") if card.get(key)}
    weights = path.parent / card["weights"] if card.get("weights") else None
    if weights is None:
        yield Check(
            "embedded model", True, f"{card.get('name', 'unnamed')}, without a weight file of its own", None, facts
        )
    elif not weights.exists():
        yield Check("embedded model", False, f"{weights.name} is missing", REINSTALL, facts)
    else:
        whole = file_sha256(weights) == card.get("sha256")
        facts["size"] = _size(weights.stat().st_size)
        detail = f"{card.get('name', 'unnamed')}: " + ("present" if whole else "its SHA-256 is not that of its card")
        yield Check("embedded model", whole, detail, None if whole else REINSTALL, facts)


def _ranges() -> Iterator[Check]:
    """The ranges that `--dtype int8` needs, of CLIP as it is and of the embedded model's tower."""
    from x2dfd.adapter import EMBEDDED, TOWER
    from x2dfd.tower import ranges_file, read_ranges

    for name, additions in (("CLIP", None), ("forensic tower", EMBEDDED / TOWER)):
        try:
            read_ranges(additions)
        except SetupError as error:
            yield Check(f"int8 {name}", False, str(error).removesuffix("; reinstall x2dfd"), REINSTALL)
        else:
            yield Check(f"int8 {name}", True, f"{ranges_file(additions).name}: present, and measured on this model")


def _experts() -> Iterator[Check]:
    from x2dfd.experts import BUILTIN, availability, cards

    for name, card in cards().items():
        if isinstance(card, SetupError):
            yield Check(f"expert {name}", None, str(card), f"reinstall or remove the package that registers {name!r}")
            continue
        missing = availability(name)
        facts = {"licence": card.licence, "source": card.source, "sha256": card.sha256, "blind spot": card.blind_spot}
        facts = {key: value for key, value in facts.items() if value}
        # The models that come with this package need the default experts; others are a user's own business.
        ok = True if missing is None else False if name in BUILTIN else None
        detail = "its weights are not here" if ok is False else "its score, for calibrations of your own, is not given"
        remedy = missing and missing.removeprefix(f"weights of expert {name!r} are not here: ")
        yield Check(f"expert {name}", ok, "ready" if ok else detail, remedy, facts)


def _cache() -> Iterator[Check]:
    from x2dfd.fetch import cache_dir

    folder = cache_dir()
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    size = _size(sum(file.stat().st_size for file in files)) if folder.exists() else "not there yet"
    yield Check("cache", True, f"{folder}, {size}")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    enough = free > 3 * 10**9
    yield Check("disk", enough, f"{_size(free)} free" + ("" if enough else "; assembling the model needs 3 GB"),
                None if enough else "export X2DFD_CACHE=/a/folder/on/a/larger/disk")  # fmt: skip


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
