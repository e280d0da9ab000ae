"""Training of the forensic tower: the base's CLIP ViT-B/16, trained end to end to see forgeries.

Small additions to the tower (LoRA on every linear layer) and the heads on it learn several targets at once: real or
fake, the kind of fake, area × artifact cues, and a map of changed places. The data are manifests of photos, ready-made
fakes, and forgeries of `data_gen forge` with their masks and cues. Photos are also blended with themselves, each time
differently. A training ends after a given time, so that one command serves CPU and GPU, and it resumes if interrupted.
Averages of the weights are compared on held-out pictures, and the best one is kept, because more steps can make
verdicts on new sources worse.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import torch
import typer
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from external_detectors.tower_net import GRID, KINDS, HeadLogits, TowerHeads, area_grid
from external_detectors.train.drawing import drawing
from external_detectors.train.loop import (
    ENOUGH,
    augmented,
    best_threshold,
    by_method,
    covered,
    cue_loss,
    cue_truth,
    licence_of,
    log,
    next_version,
    worst,
)
from external_detectors.train.self_blend import self_blend
from external_detectors.weights_io import save_weights
from x2dfd.crops import CropSet, load_sets
from x2dfd.degrade import CODEC, codec, video_codec
from x2dfd.errors import UnknownName, X2DFDError
from x2dfd.faces import PREPROCESSING
from x2dfd.files import Json, atomic_write, file_sha256, json_object, locked_folder
from x2dfd.manifest import Sample, manifest_sha256
from x2dfd.options import names
from x2dfd.tower import CLOSER, CLOSER_MATRIX, HEAD_LAYERS, LORA_B, clip_pixels, closer, load_tower, quick_in_16_bits
from x2dfd.types import Card

LORA_SCALE = 2  # of LoRA: alpha by rank
LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
FAKE_SHARE, BLENDED_SHARE = 0.34, 0.27  # of fakes among the sampled pictures, and of photos blended with themselves:
# together they make half of the views fake
DRAWING_SHARE = 0.05  # of views that become a drawing: no photograph, and neither real nor fake
VIDEO_SHARE = 0.2  # of views that go through H.264 after `degrade`
MAX_GROUP = 8  # the most pictures that a clip or person counts as
ALLOWED = "allowed"  # a buffer of the heads, not a weight
CHOICE_NOTE = "the best mean over the worst quarter of methods and sources, on these figures' pictures"
"""A card's note on its checkpoint: no held-out method was trained on, but they did take part in this choice."""


@dataclass(frozen=True)
class Settings:
    """The settings of a training. An interrupted run resumes only with the same ones."""

    data: tuple[str, ...]  # hashes of the manifests
    leave_out: tuple[str, ...]
    start: str  # hash of the weights that it starts from; "" for the bare base
    minutes: float
    batch: int
    lr: float
    rank: int
    seed: int
    cues: str  # hash of the training pictures' cues: it changes with the code or the list of cues


class Net(nn.Module):
    """Tower with LoRA, and heads."""

    def __init__(self, rank: int, seed: int) -> None:
        from peft import LoraConfig, get_peft_model

        super().__init__()
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, target_modules=list(LINEARS))
        self.tower: Any = get_peft_model(load_tower.__wrapped__(max(HEAD_LAYERS)), config)
        self.heads = TowerHeads()

    def forward(self, crops: Tensor, areas: Tensor) -> HeadLogits:
        states = self.tower(closer(clip_pixels(crops)), output_hidden_states=True).hidden_states
        logits: HeadLogits = self.heads(states, areas.float() / 255)
        return logits

    def own(self) -> dict[str, nn.Parameter]:
        """The parameters in a weight file: LoRA and heads."""
        return {n: p for n, p in self.named_parameters() if "lora_" in n or n.startswith("heads.")}

    def trained(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.named_parameters() if p.requires_grad}


def weights_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Trained parameters under the weight file's names, as in `tower.…lora_A.weight`. B includes LoRA's scale."""
    weights = {}
    for name, value in state.items():
        short = name.replace("tower.base_model.model.", "tower.").replace(".default.", ".").removeprefix("heads.")
        weights[short] = value * LORA_SCALE if short.endswith(LORA_B) else value
    return weights


def start_from(net: Net, weights: dict[str, Tensor]) -> None:
    """Give the net the values of a weight file; heads that the file lacks keep their random start. Raises X2DFDError
    for a weight that the net does not have in that shape."""
    parameters: dict[str, Tensor] = dict(net.own()) | {f"heads.{ALLOWED}": net.heads.allowed}
    by_short = {short: parameters[name] for name in parameters for short in weights_of({name: parameters[name]})}
    with torch.no_grad():
        for short, value in weights.items():
            if short not in by_short or by_short[short].shape != value.shape:
                raise X2DFDError(
                    f"--start: this tower has no {short} of shape {tuple(value.shape)}", code="start_does_not_fit"
                )
            by_short[short].copy_(value / LORA_SCALE if short.endswith(LORA_B) else value)


Item = tuple[NDArray[np.uint8], np.float32, int, NDArray[np.float32], NDArray[np.int8], NDArray[np.uint8], np.float32]
"""A training example: crop, label, kind, map, cues (1, 0, or -1: unknown), area grid, photograph or not. Map and areas
are of the closer view, which the net takes of the crop."""


class Pictures(IterableDataset[Item]):
    """Endless training examples."""

    def __init__(self, sets: Sequence[CropSet], leave_out: Sequence[str], seed: int) -> None:
        self.sets, self.seed = sets, seed
        self.all_rows = [(k, i) for k, crops in enumerate(sets) for i in range(len(crops.samples))]
        origins = {name for k, i in self.all_rows for name in own_origins(self.at(k, i))}
        for name in leave_out:
            if name not in origins:
                raise UnknownName("source, generator or method", name, origins)
        fakes = [s for crops in sets for s in crops.samples if s.label == "fake"]
        if no_class := [s.id for s in fakes if s.df_class not in KINDS[1:]]:
            raise X2DFDError(f"{len(no_class)} fakes without df_class, such as {no_class[0]}", code="df_class_missing")
        held_out = held_out_rows(sets, leave_out)
        self.rows = [r for r in self.all_rows if self.at(*r).split in ("", "train") and r not in held_out]
        # Only the held-out pictures of split `val` take part in the choice: the others are for reports and calibration.
        val_rows = [r for r in self.all_rows if self.at(*r).split == "val"]
        val_held_out = [r for r in val_rows if own_origins(self.at(*r)) & set(leave_out)]
        val_others = [r for r in val_rows if r not in held_out]
        self.validation_rows = _subset(val_held_out, 240) + _subset(val_others, 240)
        self.odds = _sampling_odds([self.at(k, i) for k, i in self.rows])

    def at(self, k: int, i: int) -> Sample:
        return self.sets[k].samples[i]

    def __iter__(self) -> Iterator[Item]:
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        cv2.setNumThreads(1)
        cumulative = np.cumsum(self.odds)
        while True:
            index = min(int(np.searchsorted(cumulative, rng.random() * cumulative[-1])), len(self.rows) - 1)
            yield self.sample(*self.rows[index], rng)

    def sample(self, k: int, i: int, rng: np.random.Generator | None) -> Item:
        """One picture, augmented with the generator's random numbers; without a generator, as it is in use."""
        crops, s = self.sets[k], self.at(k, i)
        view, points = np.ascontiguousarray(crops.crops[i]), crops.landmarks[i]
        label, kind = s.label == "fake", s.df_class if s.label == "fake" else "real"
        mask: NDArray[np.float32] = np.full((GRID, GRID), float(label), np.float32)
        cues = cue_truth(s)
        if label and s.mask is not None and crops.masks is not None:
            mask = _to_grid(np.asarray(crops.masks[i])) / np.float32(255)
        elif label:
            cues[:] = -1
        is_photo = True
        if rng is None:
            view, matrix = codec(view, *CODEC), np.eye(2, 3)
        else:
            if rng.random() < DRAWING_SHARE:
                view, is_photo = drawing(view, rng), False
            elif not label and rng.random() < BLENDED_SHARE:
                view, soft_mask = self_blend(view, points, rng)
                mask = _to_grid(soft_mask)
                label, kind, cues[:] = True, "FS", -1
            view, matrix = augmented(view, rng)
            if rng.random() < VIDEO_SHARE:
                view = video_codec(view, int(rng.integers(20, 38)))
            view = codec(view, *CODEC)
        matrix = CLOSER_MATRIX @ np.concatenate([matrix, [[0.0, 0.0, 1.0]]])
        step = view.shape[0] / GRID  # for the same transform on the map's grid, whose cells lie between the pixels
        centre = np.full(2, (step - 1) / 2)
        grid_matrix = matrix.copy()
        grid_matrix[:, 2] = (matrix[:, :2] @ centre + matrix[:, 2] - centre) / step
        mask = np.asarray(cv2.warpAffine(mask, grid_matrix, (GRID, GRID), borderMode=cv2.BORDER_REPLICATE), np.float32)
        areas = area_grid(cv2.transform(points[None], matrix)[0].astype(np.float32))
        changed = (mask > 0.25 * max(float(mask.max()), 1e-6)).astype(np.float32)  # a faint blend has a place too
        return view, np.float32(label), KINDS.index(kind), changed, cues, areas, np.float32(is_photo)


def _to_grid(mask: NDArray[np.uint8] | NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(cv2.resize(mask, (GRID, GRID), interpolation=cv2.INTER_AREA), np.float32)


def held_out_rows(sets: Sequence[CropSet], leave_out: Sequence[str]) -> set[tuple[int, int]]:
    """The set and row of every picture of a held-out source, generator or method, also by its donor."""
    donors = {s.group: s.source for crops in sets for s in crops.samples if not s.synthetic}
    return {
        (k, i)
        for k, crops in enumerate(sets)
        for i, s in enumerate(crops.samples)
        if {*own_origins(s), donors.get(str(s.extra.get("donor") or ""))} & set(leave_out)
    }


def own_origins(sample: Sample) -> set[str]:
    """A picture's generator or source, and its forge methods."""
    return {sample.origin, *sample.method.split("+")} - {""}


def _subset(rows: list[tuple[int, int]], n: int) -> list[tuple[int, int]]:
    """At most n of the rows, the same ones every time."""
    if len(rows) <= n:
        return rows
    return [rows[k] for k in np.sort(np.random.default_rng(0).choice(len(rows), n, replace=False))]


def _sampling_odds(samples: Sequence[Sample]) -> NDArray[np.float64]:
    """The chance of each sample. Fakes get FAKE_SHARE of the weight, and within a label each source or method the root
    of its size. Of a clip or person, at most MAX_GROUP pictures count."""
    keys = [(s.label, s.source if s.label == "real" else s.method.split("+")[0]) for s in samples]
    sizes, groups = Counter(keys), Counter(s.group for s in samples)
    shares = [min(1.0, MAX_GROUP / groups[s.group]) for s in samples]
    odds = np.array([sizes[k] ** -0.5 * share for k, share in zip(keys, shares, strict=True)])
    fake = np.array([k[0] == "fake" for k in keys])
    if not fake.any() or fake.all():
        raise X2DFDError("split `train` of the manifests lacks real or fake pictures", code="no_picture_of_label")
    odds[fake] *= FAKE_SHARE / odds[fake].sum()
    odds[~fake] *= (1 - FAKE_SHARE) / odds[~fake].sum()
    return odds


def loss_of(
    logits: HeadLogits, label: Tensor, kind: Tensor, mask: Tensor, cues: Tensor, photo: Tensor, allowed: Tensor
) -> Tensor:
    """The loss of "photograph or not" and, over photographs alone, of verdict, kind, map and cues together."""
    photo_loss = F.binary_cross_entropy_with_logits(logits.photo.float(), photo * 0.98 + 0.01)
    is_photo = photo > 0
    if not is_photo.any():
        return photo_loss
    logits = HeadLogits(*(v[is_photo] for v in logits))
    label, kind, mask, cues = (v[is_photo] for v in (label, kind, mask, cues))
    verdict_loss = F.binary_cross_entropy_with_logits(logits.fake.float(), label * 0.94 + 0.03)
    map_loss = F.binary_cross_entropy_with_logits(logits.map.float(), mask)
    naming_loss = cue_loss(logits.cues.float(), cues, allowed)
    kind_loss = F.cross_entropy(logits.kinds.float(), kind)
    total: Tensor = verdict_loss + 0.3 * kind_loss + 0.5 * map_loss + 0.5 * naming_loss + 0.5 * photo_loss
    return total


def tower(
    data: Annotated[list[Path], typer.Option(help="manifest of photos and fakes; give it again for more")],
    out: Annotated[Path, typer.Option(help="folder for weights and card")],
    state: Annotated[Path, typer.Option(help="folder for the resumable state")] = Path("build/tower"),
    start: Annotated[Path | None, typer.Option(help="weight file to start from; none: the bare base")] = None,
    leave_out: Annotated[
        str, typer.Option("--held-out", "--leave-out", help="sources, generators and methods, comma-separated")
    ] = "",
    minutes: Annotated[float, typer.Option(help="how long the training takes")] = 10.0,
    batch: int = 16,
    lr: float = 2e-4,
    rank: int = 16,
    seed: int = 0,
    workers: Annotated[int, typer.Option(help="processes that make the views")] = 1,
    checks: Annotated[int, typer.Option(help="how many averages are compared on held-out pictures")] = 3,
    crop_workers: int = 1,
) -> None:
    """Train the forensic tower: real or fake, kind of fake, cues and map from one pass."""
    version = next_version(out, "tower")
    sets = load_sets(data, crop_workers, on_remark=log)
    held_out = names(leave_out)
    pictures = Pictures(sets, held_out, seed)
    truth = np.stack([cue_truth(pictures.at(k, i)) for k, i in pictures.rows])
    settings = Settings(
        tuple(manifest_sha256(path) for path in data),
        held_out,
        file_sha256(start) if start else "",
        minutes,
        batch,
        lr,
        rank,
        seed,
        hashlib.sha256(truth.data).hexdigest(),
    )
    net = Net(rank, seed)
    if start is not None:
        start_from(net, {k: v.float() for k, v in load_file(start).items()})
    # Only pairs of area and artifact that enough pictures show are ever named.
    net.heads.allowed.copy_(torch.from_numpy((truth > 0).sum(0) >= ENOUGH))
    log(f"{len(pictures.rows)} training pictures, {len(pictures.validation_rows)} to choose the checkpoint by")
    with locked_folder(state):
        weights, figures = _train(net, pictures, settings, state, workers, checks)
    samples = [pictures.at(k, i) for k, i in pictures.rows]
    card = Card(
        name="tower",
        version=version,
        source="trained by this project: external_detectors/train",
        licence=licence_of(samples),
        sha256="",
        preprocessing=PREPROCESSING,
        paper="LoRA, arXiv 2106.09685, on CLIP, arXiv 2103.00020; self-blending after Shiohara & Yamasaki, CVPR 2022",
        blind_spot="Generators of a family that it never met, whose faces look like photos to it, and reenactment that "
        "moves little but the mouth; on video frames and on retouched portraits of sources that it does not know it is "
        f"readier to say fake. It does not see the outer {CLOSER} of a crop's 224 pixels.",
        trained_on=f"{len(samples)} pictures; sources: {', '.join(sorted({s.source for s in samples}))}",
        covers=covered(net.heads.allowed),
        figures={"left_out": list(held_out), "settings": asdict(settings), "checkpoint": CHOICE_NOTE, **figures},
    )
    save_weights(weights_of(weights), card, out)
    print(out / "tower.card.json")


def _train(
    net: Net, pictures: Pictures, settings: Settings, state: Path, workers: int, checks: int
) -> tuple[dict[str, Tensor], Json]:
    """Train until the time is up; returns the best average of the trained weights and its figures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = net.to(device)
    if quick_in_16_bits(device.type):
        _in_16_bits(net)
    trained = net.trained()
    tower_parameters = [p for n, p in trained.items() if n.startswith("tower.")]
    head_parameters = [p for n, p in trained.items() if not n.startswith("tower.")]
    groups = [{"params": tower_parameters, "base": settings.lr}, {"params": head_parameters, "base": 2.5 * settings.lr}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=0.02)
    average = {n: p.detach().clone() for n, p in trained.items()}
    state_path, seconds = state / "state.safetensors", settings.minutes * 60
    elapsed, step, best = _resume(state_path, settings, trained, average, optimizer)
    pictures.seed = settings.seed * 1_000_003 + step  # a resumed run draws new samples
    loader = DataLoader(
        pictures,
        settings.batch,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        prefetch_factor=4 if workers else None,
        pin_memory=device.type == "cuda",
    )
    batches, losses, started = iter(loader), [], time.monotonic() - elapsed
    next_check = len(best["tried"]) + 1
    net.train()
    while (elapsed := time.monotonic() - started) < seconds:
        views, label, kind, mask, cues, areas, photo = (
            column.to(device, non_blocking=True) for column in next(batches)
        )
        rate = min(1.0, (step + 1) / 60) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * elapsed / seconds)))
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * rate
        with torch.autocast(device.type, torch.bfloat16, enabled=quick_in_16_bits(device.type)):
            logits = net(views, areas)
        loss = loss_of(logits, label, kind, mask, cues, photo, net.heads.allowed)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.998, (step + 1) / (step + 20))
        for name, value in trained.items():
            average[name].lerp_(value.detach(), 1 - decay)
        losses.append(float(loss.detach()))
        if step % 20 == 0:
            log(f"{elapsed:.0f} of {seconds:.0f} s, step {step}, loss {np.mean(losses[-40:]):.4f}")
        if elapsed >= seconds * next_check / (checks + 1) and next_check < checks + 1:
            best = _keep_best(net, average, pictures, step, best, state)
            next_check += 1
            _save(state_path, settings, elapsed, step, best, trained, average, optimizer)
    best = _keep_best(net, average, pictures, step, best, state)
    weights = load_file(state / f"average-{best['figures']['step']}.safetensors")
    _set_values(trained, {n: weights[n].to(device) for n in trained})
    figures = {"steps": step, "pictures_seen": step * settings.batch, **best["figures"], "tried": best["tried"]}
    return weights, {**figures, **cue_threshold(net, pictures)}


def _in_16_bits(net: Net) -> None:
    """Convert the frozen linear layers to bf16 once, as autocast would convert them at every step."""
    for module in net.tower.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.to(torch.bfloat16)


def _keep_best(net: Net, average: dict[str, Tensor], pictures: Pictures, step: int, best: Json, state: Path) -> Json:
    """Score the average on the validation rows, save it as `average-STEP.safetensors`, and return the best so far."""
    trained = net.trained()
    current = {n: p.detach().clone() for n, p in trained.items()}
    _set_values(trained, average)
    samples = [pictures.at(k, i) for k, i in pictures.validation_rows]
    scores = head_logits(net, pictures, pictures.validation_rows).fake.double().numpy()
    figures = {"auc": by_method(samples, scores), "above_nought": _false_alarm_rates(samples, scores)}
    value = worst(samples, scores)
    log(json.dumps({"step": step, "worst": value, **figures}))
    tried = [*best["tried"], {"step": step, "worst": value}]
    tensors = {n: v.detach().cpu().contiguous() for n, v in average.items()}
    save_file(tensors | {f"heads.{ALLOWED}": net.heads.allowed.cpu()}, state / f"average-{step}.safetensors")
    if best["worst"] is None or (value or 0.0) >= best["worst"]:
        best = {"worst": value, "figures": {"step": step, "worst": value, **figures}}
    _set_values(trained, current)
    net.train()
    return {**best, "tried": tried}


def head_logits(net: Net, pictures: Pictures, rows: Sequence[tuple[int, int]]) -> HeadLogits:
    """The net's outputs, moved to the CPU, for pictures without augmentation."""
    device = next(net.heads.parameters()).device
    net.eval()
    outputs: list[HeadLogits] = []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=quick_in_16_bits(device.type)):
        for start in range(0, len(rows), 32):
            samples = [pictures.sample(k, i, None) for k, i in rows[start : start + 32]]
            views, areas = (torch.from_numpy(np.stack([s[n] for s in samples])).to(device) for n in (0, 5))
            outputs.append(HeadLogits(*(v.float().cpu() for v in net(views, areas))))
    if not outputs:
        return HeadLogits(*(torch.zeros(0) for _ in HeadLogits._fields))
    return HeadLogits(*(torch.cat(list(column)) for column in zip(*outputs, strict=True)))


def cue_threshold(net: Net, pictures: Pictures) -> Json:
    """The probability from which naming cues has the best F1 on the forgeries of split `calib`, which `data_gen forge`
    sets apart for such a choice; 0.5 without any."""
    calib = [r for r in pictures.all_rows if pictures.at(*r).split == "calib" and pictures.at(*r).cues]
    rows = _subset(calib, 300)
    if not rows:
        return {"cue_threshold": 0.5}
    truth = torch.stack([torch.from_numpy(pictures.sample(k, i, None)[4]) for k, i in rows])
    return {**best_threshold(head_logits(net, pictures, rows).cues, truth), "cue_n": len(rows)}


def _false_alarm_rates(samples: Sequence[Sample], scores: NDArray[np.float64]) -> dict[str, float]:
    """The share of each source's real pictures with a logit of 0 or more: false alarms at a threshold of one half."""
    real = np.array([s.label == "real" for s in samples], bool)
    sources = np.array([s.source for s in samples])
    return {str(s): round(float((scores[real & (sources == s)] >= 0).mean()), 3) for s in sorted(set(sources[real]))}


def _set_values(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def _save(
    path: Path,
    settings: Settings,
    elapsed: float,
    step: int,
    best: Json,
    trained: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write the training's state, whole or not at all."""
    tensors = {f"now.{n}": p.detach() for n, p in trained.items()} | {f"average.{n}": v for n, v in average.items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{k}": v for k, v in values.items()}
    metadata = {"run": json.dumps(asdict(settings)), "spent": str(elapsed), "step": str(step), "best": json.dumps(best)}
    with atomic_write(path) as temporary:
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)


def _resume(
    path: Path,
    settings: Settings,
    trained: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> tuple[float, int, Json]:
    """Restore a saved state; returns the elapsed seconds, the steps done and the best checkpoint so far. Raises
    X2DFDError for the state of another run."""
    from safetensors import safe_open

    if not path.is_file():
        return 0.0, 0, {"worst": None, "figures": {}, "tried": []}
    with safe_open(path, "pt") as stream:
        metadata = stream.metadata()
    if json_object(metadata["run"], path) != json.loads(json.dumps(asdict(settings))):
        raise X2DFDError(
            f"{path} is the state of a training with other data or settings; choose another --state",
            code="training_state_differs",
        )
    tensors = load_file(path)
    _set_values(trained, {n: tensors[f"now.{n}"] for n in trained})
    for name, value in average.items():
        value.copy_(tensors[f"average.{name}"])
    optimizer_state = optimizer.state_dict()
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, number, field = key.split(".", 2)
            optimizer_state["state"].setdefault(int(number), {})[field] = value
    optimizer.load_state_dict(optimizer_state)
    return float(metadata["spent"]), int(metadata["step"]), json_object(metadata["best"], path)
