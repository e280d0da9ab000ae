"""The vision tower of the base: loading it with or without additions, its hidden states, and its cached features."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from x2dfd.crops import CropSet, new_array, old_array
from x2dfd.degrade import CODEC, DEGRADE_VERSION, codec, degrade
from x2dfd.errors import SetupError, X2DFDError
from x2dfd.faces import CROP_SIZE
from x2dfd.fetch import BASE_NAME, require
from x2dfd.files import Json, atomic_write, file_sha256, locked_folder, read_json, write_text
from x2dfd.progress import progress
from x2dfd.tower_pass import InputRange, Observer, TowerPass
from x2dfd.types import Face

CLOSER = 12
"""Pixels of a crop's 224 that the forensic tower leaves out on each side: it does better without them, most of all on
sources that it never met (LOG.md)."""

VIEWS = {"degrade": DEGRADE_VERSION, "codec": list(CODEC), "closer": CLOSER}
"""The settings of augmented views, and what the forensic tower takes of a crop. Caches and instruction sets that were
made with others are refused."""

WIDTH = 768
"""Width of the tower's hidden states (CLIP ViT-B)."""

HEAD_LAYERS = (3, 6, 9, 12)
"""Layers whose outputs the heads of the forensic tower read; 1 is the first layer. The projector of the embedded model
reads all but the first of them."""

_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])

_ZOOM = CROP_SIZE / (CROP_SIZE - 2 * CLOSER)
CLOSER_MATRIX = np.array([[_ZOOM, 0, _ZOOM * (0.5 - CLOSER) - 0.5], [0, _ZOOM, _ZOOM * (0.5 - CLOSER) - 0.5]])
"""From the pixels of a crop to those of its closer view, for cv2."""


def closer(pixels: Tensor) -> Tensor:
    """The closer view of crops [n, 3, side, side], which the forensic tower sees: less around the face, same size."""
    margin = CLOSER * pixels.shape[-1] // CROP_SIZE
    seen = slice(margin, pixels.shape[-1] - margin)
    view = F.interpolate(pixels[..., seen, seen].float(), size=pixels.shape[-2:], mode="bicubic")
    return view.to(pixels.dtype)


def clip_pixels(crops: Tensor) -> Tensor:
    """uint8 crops [n, 224, 224, 3] to CLIP's input [n, 3, 224, 224]; the same numbers as CLIP's image processor."""
    mean, std = _MEAN.to(crops.device), _STD.to(crops.device)
    return ((crops.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
PREFIX = "model.vision_tower."
"""Prefix of the tower's names in a LLaVA's weight file."""


def layer_of(name: str) -> int:
    """The number of the layer that a weight of the tower belongs to; -1 for one outside of the layers."""
    return int(name.split(".")[2]) if name.startswith("encoder.layers.") else -1


def add_to_tower(tower: torch.nn.Module, additions: Mapping[str, Tensor]) -> None:
    """Make a CLIP vision model the forensic tower: `add_to_parameters` and `look_closer`."""
    add_to_parameters(dict(tower.named_parameters()), len(tower.encoder.layers), additions)  # type: ignore[arg-type, union-attr]
    look_closer(tower)


def look_closer(tower: torch.nn.Module) -> None:
    """Let a CLIP vision model see the `closer` view of every picture, once, however often this is called."""
    if not any(hook is _closer_first for hook in tower._forward_pre_hooks.values()):
        tower.register_forward_pre_hook(_closer_first, with_kwargs=True)


def _closer_first(
    _: torch.nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The arguments of a CLIP vision model, pixels first or by name, with closer pixels."""
    if given:
        return (closer(given[0]), *given[1:]), named
    return given, {k: closer(v) if k == "pixel_values" else v for k, v in named.items()}


@torch.no_grad()
def add_to_parameters(parameters: Mapping[str, Tensor], layers: int, additions: Mapping[str, Tensor]) -> None:
    """Merge a training's additions into the weights of a tower of so many layers, so that they cost nothing in use.

    `additions`: by the tower's own names, a parameter's new value, or a pair `<module>.lora_A.weight` [r, in] and
    `<module>.lora_B.weight` [out, r] whose product is added to `<module>.weight` (LoRA, arXiv 2106.09685; its scale is
    in B). Additions to layers that the tower lacks are ignored. Raises SetupError for any other name or shape.
    """
    for name, value in additions.items():
        if name.endswith(LORA_B):
            if name.replace(LORA_B, LORA_A) not in additions:
                raise SetupError(f"the tower's additions hold {name} without its lora_A", code="tower_incomplete")
            continue
        target = name.replace(LORA_A, ".weight")
        if layer_of(target) >= layers:
            continue
        weight, update = parameters.get(target), value.float()
        if name.endswith(LORA_A):
            if (lora_b := additions.get(name.replace(LORA_A, LORA_B))) is None or lora_b.shape[1] != value.shape[0]:
                raise SetupError(f"the tower's additions hold no fitting lora_B for {target}", code="tower_incomplete")
            update = lora_b.float() @ value.float()
        if weight is None or weight.shape != update.shape:
            raise SetupError(
                f"the tower has no {target} of shape {tuple(update.shape)}: these additions fit another",
                code="tower_does_not_fit",
            )
        update = update.to(weight.device)
        weight.copy_(weight.float() + update if name.endswith(LORA_A) else update)


@cache
def load_tower(layers: int, additions: Path | None = None) -> Any:
    """The first `layers` layers of the base's CLIP vision model, fp32, eval, with the weight file `additions` merged.

    Raises SetupError when the base is not fetched, or when the additions do not fit.
    """
    from safetensors import safe_open
    from transformers import CLIPVisionModel, LlavaConfig

    folder = require("base")
    config: Any = LlavaConfig.from_pretrained(folder).vision_config
    config.num_hidden_layers = layers
    model = CLIPVisionModel(config)
    with safe_open(folder / "model.safetensors", "pt") as stream:
        state = {k: stream.get_tensor(PREFIX + k).float() for k in model.state_dict()}
    model.load_state_dict(state, strict=True)
    if additions is not None:
        add_to_tower(model, read_additions(additions))
    return model.eval()


def read_additions(path: Path) -> dict[str, Tensor]:
    """The additions in a weight file of the forensic tower, by the tower's own names. Raises SetupError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SetupError(
            f"the tower's weights {path} cannot be read: {error}; reinstall x2dfd", code="tower_unreadable"
        ) from error
    return {k.removeprefix("tower."): v for k, v in weights.items() if k.startswith("tower.")}


def additions_sha256(additions: Mapping[str, Tensor]) -> str:
    """A hash that identifies the tower with these additions. It does not depend on the heads."""
    digest = hashlib.sha256()
    for name in sorted(additions):
        digest.update(name.encode() + b"\n" + additions[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


@cache
def load_tower_pass(
    layers: int,
    additions: Path | None = None,
    dtype: torch.dtype = torch.float32,
    observe: Observer | None = None,
) -> TowerPass:
    """As `load_tower`, for inference on a CPU. `dtype` (fp32, bf16, int8): of the matrix products; `observe`: as in
    TowerPass."""
    from safetensors import safe_open

    folder = require("base")
    ranges = read_ranges(additions) if dtype == torch.int8 else None
    config = read_json(folder / "config.json")["vision_config"]
    with safe_open(folder / "model.safetensors", "pt") as stream:  # a memory map: only what is used is read
        names = [k.removeprefix(PREFIX) for k in stream.keys() if k.startswith(PREFIX)]  # noqa: SIM118
        weights = {k: stream.get_tensor(PREFIX + k).float() for k in names if layer_of(k) < layers}
    if additions is not None:
        add_to_parameters(weights, layers, read_additions(additions))
    return TowerPass(weights, layers, config.get("num_attention_heads", 12), dtype, ranges, observe)


CLIP_RANGES = Path(__file__).parent / "weights" / "clip"
"""Where the ranges of CLIP as it is lie, without the ending of `ranges_file`."""


def ranges_file(additions: Path | None) -> Path:
    """The file of a tower's ranges: beside its additions, or the package's own for the base without any."""
    return (additions or CLIP_RANGES).with_suffix(".int8.safetensors")


def _identity(additions: Path | None) -> str:
    """Base and additions of a tower, in words."""
    return f"{BASE_NAME} {additions_sha256(read_additions(additions))}" if additions else BASE_NAME


def write_ranges(additions: Path | None, ranges: Mapping[str, InputRange], pictures: int) -> None:
    """Write the ranges of a tower's inputs, measured on so many pictures (`external_detectors.train ranges`)."""
    from safetensors.torch import save_file

    tensors = {f"{name}.divisor": r.divisor.half() for name, r in ranges.items()}
    tensors |= {f"{name}.range": torch.tensor([r.low, r.high]) for name, r in ranges.items()}
    with atomic_write(ranges_file(additions)) as temporary:
        stated = {"tower": _identity(additions), "sha256": additions_sha256(tensors), "pictures": str(pictures)}
        save_file(tensors, temporary, stated)


def read_ranges(additions: Path | None) -> dict[str, InputRange]:
    """The ranges of a tower's inputs. Raises SetupError where there are none, or they are of another tower."""
    from safetensors import SafetensorError, safe_open

    path = ranges_file(additions)
    remedy = "reinstall x2dfd"
    if additions and not additions.is_relative_to(Path(__file__).parent):  # of an adapter of the user's own
        remedy = "measure them: python -m external_detectors.train ranges --data MANIFEST --model DIR"
    try:
        with safe_open(path, "pt") as stream:
            stated = stream.metadata() or {}
            tensors = {k: stream.get_tensor(k) for k in stream.keys()}  # noqa: SIM118
        if stated.get("sha256") != additions_sha256(tensors):
            raise SetupError(f"the ranges in {path} differ from their SHA-256; {remedy}", code="ranges_unreadable")
        names = [k.removesuffix(".divisor") for k in tensors if k.endswith(".divisor")]
        ranges = {n: InputRange(tensors[f"{n}.divisor"].float(), *tensors[f"{n}.range"].tolist()) for n in names}
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise SetupError(f"int8 needs the ranges in {path}: {error}; {remedy}", code="ranges_unreadable") from error
    if stated.get("tower") != _identity(additions):
        raise SetupError(f"the ranges in {path} are of another tower; {remedy}", code="ranges_differ")
    return ranges


def tower_states(
    crops: Tensor, layers: int, additions: Path | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Hidden states of uint8 crops [n, 224, 224, 3]: embeddings and each layer's output, [n, 197, 768], fp32.

    With `additions`, the forensic tower sees `closer` pixels. `dtype` of the matrix products is bf16 by default where
    that is quick, else fp32.
    """
    dtype = dtype or (torch.bfloat16 if quick_in_16_bits("cpu") else torch.float32)
    with torch.inference_mode():
        pixels = clip_pixels(crops) if additions is None else closer(clip_pixels(crops))
        return load_tower_pass(layers, additions, dtype)(pixels)


@dataclass(frozen=True, eq=False)
class TowerFeatures:
    """The outputs of a tower for some samples of a CropSet."""

    rows: NDArray[np.intp]  # [n]: indices of the samples in the CropSet, in order
    tokens: NDArray[np.float16]  # [n, len(keep), class token where there is one + patches, hidden]
    keep: tuple[int, ...]  # numbers of the layers whose outputs are kept; 1 is the first layer
    class_token: bool = True

    def patches(self, positions: slice | int | NDArray[np.intp], layers: Sequence[int]) -> NDArray[np.float32]:
        """The patch tokens of some of the kept layers: [n, layers, patches, hidden], or without n for one position."""
        indices = [self.keep.index(layer) for layer in layers]
        return np.asarray(self.tokens[positions][..., indices, int(self.class_token) :, :], np.float32)

    def states(self, positions: slice) -> tuple[Tensor, ...]:
        """Like `tower_states`, with an empty tensor for every layer that is not kept."""
        tokens = torch.from_numpy(self.tokens[positions].astype(np.float32))
        by_layer = dict(zip(self.keep, tokens.unbind(1), strict=True))
        return tuple(by_layer.get(layer, torch.empty(0)) for layer in range(max(self.keep) + 1))


def degraded_view(crop: NDArray[np.uint8], seed: int, i: int) -> tuple[NDArray[np.uint8], bool]:
    """Sample i's crop as training sees it, degraded at random and mirrored half of the time, and whether it is."""
    rng = np.random.default_rng([seed, i])
    view = degrade(np.ascontiguousarray(crop), rng)
    mirrored = bool(rng.random() < 0.5)
    return (np.ascontiguousarray(view[:, ::-1]) if mirrored else view), mirrored


def augmented_view(crop: NDArray[np.uint8], seed: int, i: int) -> NDArray[np.uint8]:
    """Sample i's augmented view, passed through the codec like every crop in use."""
    return codec(degraded_view(crop, seed, i)[0], *CODEC)


def view_face(data: CropSet, i: int, view_seed: int) -> Face:
    """Sample i's augmented view as a Face, for experts."""
    view, mirrored = degraded_view(data.crops[i], view_seed, i)
    large = None if data.large is None else degraded_view(data.large[i], view_seed, i)[0]
    points = data.landmarks[i].copy()
    if mirrored:  # mirrored points keep their numbers: no expert of ours reads left from right
        points[:, 0] = view.shape[1] - 1 - points[:, 0]
    size = float(view.shape[0])
    return Face(0, (0.0, 0.0, size, size), points, 1.0, view, points, 0.0, large)


def training_rows(data: CropSet, limit: int | None = None) -> NDArray[np.intp]:
    """The samples of splits `train`, `val` and `calib`, in the manifest's order; at most `limit`, drawn by their ids.

    A manifest may be sorted by label or source, and its first rows would all have the same one.
    """
    rows = [i for i, s in enumerate(data.samples) if s.split in ("train", "val", "calib")]
    if limit is not None and limit < len(rows):
        rows = sorted(sorted(rows, key=lambda i: hashlib.sha256(data.samples[i].id.encode()).digest())[:limit])
    return np.array(rows, int)


def cached_features(
    data: CropSet,
    rows: NDArray[np.intp],
    folder: Path,
    layers: int,
    keep: Sequence[int],
    seed: int = 0,
    batch: int = 16,
    additions: Path | None = None,
) -> TowerFeatures:
    """Features of the given samples, each on its `augmented_view`, computed once by the tower with its `additions`.

    A run that was cut off resumes.
    """
    n = len(rows)
    digest = hashlib.sha256()
    for i in rows:
        digest.update(data.samples[i].id.encode() + b"\n")
        digest.update(data.crops[i].data)
    base = file_sha256(require("base") / "model.safetensors")
    settings: Json = {"seed": seed, **VIEWS, "base": base}
    settings["additions"] = additions_sha256(read_additions(additions)) if additions else None
    key = {"samples": digest.hexdigest(), "layers": layers, "keep": list(keep), **settings}
    with locked_folder(folder, wait=True):
        store = CachedArray(folder, "tokens.npy", key, (n, len(keep), 197, WIDTH))
        tokens = store.open()
        for start in progress(range(store.done, n, batch), "tower features"):
            stop = min(start + batch, n)
            views = np.stack([augmented_view(data.crops[i], seed, int(i)) for i in rows[start:stop]])
            states = tower_states(torch.from_numpy(views), layers, additions)
            for position, layer in enumerate(keep):
                tokens[start:stop, position] = states[layer].half().numpy()
            if (start // batch) % 8 == 7 or stop == n:
                store.save(tokens, stop)
    return TowerFeatures(rows, tokens, tuple(keep))


def quick_in_16_bits(device: str) -> bool:
    """Whether matrix products are quicker in bf16 than in fp32: on CUDA, with AMX, and with AMD's AVX-512 BF16.

    Intel's AVX-512 BF16 alone takes 1.7 times as long as fp32 (LOG.md).
    """
    if device == "cuda" or torch.cpu._is_amx_tile_supported():
        return True
    return bool(torch.cpu._is_avx512_bf16_supported()) and _is_amd()


@cache
def _is_amd() -> bool:
    cpuinfo = Path("/proc/cpuinfo")  # of Linux; on Windows platform.processor() names the vendor
    return "AuthenticAMD" in (cpuinfo.read_text() if cpuinfo.is_file() else platform.processor())


class CachedArray:
    """A float16 array on disk that is filled in order; a folder may hold several, by their names.

    A run that was cut off resumes where it stopped; another `key` (plain values) or a damaged file starts over. For use
    under `files.locked_folder`. `shape`: its first sizes; `open` gets the others.
    """

    def __init__(self, folder: Path, name: str, key: Json, shape: tuple[int, ...]) -> None:
        self._file, self._state = folder / name, folder / f"{Path(name).stem}.progress.json"
        self._key, self._shape = json.loads(json.dumps(key)), shape
        self.done = self._resumed()  # rows that are filled
        if not self.done and self._state.is_file():
            self._state.unlink()  # before the array is emptied, whose content it describes
            print(
                f"{self._file} is damaged, or of other pictures or settings, and is computed anew",
                file=sys.stderr,
                flush=True,
            )

    def _resumed(self) -> int:
        """The rows of the file that are of this key; 0 where it is absent or damaged."""
        try:
            state = read_json(self._state)
        except (OSError, X2DFDError):
            return 0
        done = state.get("done")
        if state.get("key") != self._key or old_array(self._file, np.float16, self._shape) is None:
            return 0
        return done if type(done) is int and 0 < done <= self._shape[0] else 0

    def open(self, *others: int) -> np.memmap[tuple[int, ...], np.dtype[np.float16]]:
        if self.done:
            return np.lib.format.open_memmap(self._file, "r+")
        self._file.unlink(missing_ok=True)  # emptied in place, it would give zeros to a training that reads it
        return new_array(self._file, np.float16, (*self._shape, *others))

    def save(self, array: np.memmap[tuple[int, ...], np.dtype[np.float16]], done: int) -> None:
        array.flush()
        write_text(self._state, json.dumps({"key": self._key, "done": done}))
        self.done = done
