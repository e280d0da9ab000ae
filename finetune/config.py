"""One dataclass is the whole configuration; YAML files and `--set key=value` are two spellings of it."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from x2dfd.errors import UnknownName, X2DFDError
from x2dfd.files import Json, parse_json

LANGUAGE_LINEARS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""What `targets: language` is in a LLaVA: every linear layer of the language model, none of tower and projector."""

TARGETS = ("language", "attention")
"""Presets of LoRA's targets, for any family: all linear layers of the language model, or those of its attention."""

TOWER_LINEARS = r".*vision_tower.*\.layers\.(LAYERS)\..*(q_proj|k_proj|v_proj|out_proj)"
"""LoRA's further targets with `tower: lora`: the attention of the layers with the numbers LAYERS, a third of the size
that all linear layers would have."""

CHOICES = {
    "method": ("lora", "qlora", "dora", "full"),
    "tower": ("frozen", "norms", "lora", "forensic"),
    "base_dtype": ("auto", "float32", "bfloat16", "float16"),
    "weights_dtype": ("float32", "float16"),
    "best_by": ("auc", "loss"),
}
"""The values that a key of the configuration may have."""

LEAST = {
    **dict.fromkeys(("lora_r", "lora_alpha", "batch", "accumulate", "save_steps", "eval_limit"), 1),
    **dict.fromkeys(("lr", "projector_lr", "clip", "weight_decay", "warmup", "epochs", "lora_dropout"), 0),
    **dict.fromkeys(("verdict_weight", "cue_weight", "eval_steps", "patience", "workers"), 0),
}
"""The smallest value of each number in the configuration; none may be infinite."""


@dataclass(frozen=True)
class FinetuneConfig:
    """All settings that decide the result of a training; saved in the folder of its weights."""

    instructions: str | tuple[str, ...]  # file of `data_gen build`, or conversations of another stack
    manifest: str | tuple[str, ...]  # from which each was built; for another stack's, the folder of pictures
    out: str  # adapter directory to write
    weights: tuple[float, ...] = ()  # how often an epoch shows each of several sets: 2 twice, 0.5 a new half of it
    base: str | None = None  # directory or hub name, of a family of docs/models.md; None is the embedded base
    method: str = "lora"  # lora; qlora: on a base in NF4 (bitsandbytes); dora; full: every language weight
    name: str = "x2dfd-embedded"  # the adapter's name in its card
    version: str = "1"  # the adapter's version in its card
    licence: str = "as the training data; not for redistribution unless you know better"  # of the weights
    trained_on: str = ""  # the data in words, for the card
    blind_spot: str = "forgeries unlike those of its instruction set"  # what the card must warn of
    expert_weights: str | None = None  # folder of other expert weights, copied into the adapter
    tower_layers: int | None = None  # vision layers kept; None keeps all
    text_layers: int | tuple[int, ...] | None = None  # language layers kept: the first so many, or these; None: all
    feature_layers: tuple[int, ...] | None = None  # tower outputs joined as the projector's input; None as the base
    lora_r: int = 16  # rank
    lora_alpha: int = 32  # scale is alpha / r
    lora_dropout: float = 0.05
    targets: str = "language"  # or attention, or a regular expression over module names; inside the language model
    tower: str = "frozen"  # or norms: its normalisation layers are trained, at the projector's rate; lora: LoRA too;
    # forensic: frozen, with the additions of the expert `tower` in `expert_weights`
    lr: float = 2e-4  # of the LoRA matrices
    projector_lr: float = 2e-5  # of the projector; 0 leaves it as it is
    optimizer: str = "adamw_torch"  # as transformers calls it: adamw_8bit, adafactor ...
    scheduler: str = "cosine"  # of the rates, as transformers calls it: linear, constant_with_warmup ...
    clip: float = 1.0  # largest norm of the gradients; 0 does not clip them
    weight_decay: float = 0.0
    warmup: float = 0.03  # share of the steps, or their number if 1 or more
    epochs: float = 1.0
    max_steps: int = -1  # if positive, ends the training before its epochs
    batch: int = 1  # rows per device and step: a picture with all its questions, or one question (docs/finetune.md)
    accumulate: int = 8  # steps per update
    verdict_weight: float = 4.0  # weight of label and yes/no tokens against one explanation token
    cue_weight: float = 1.0  # of explanation tokens that name an area, an artifact or a class; needs a fast tokenizer
    start: str | None = None  # adapter directory of the same base and layers to start from; None: LoRA at zero
    left_out: tuple[str, ...] = ()  # sources and generators (Sample.origin) without any training picture
    limit: int | None = None  # largest number of pictures whose features are cached
    cached_features: str | None = None  # folder of a frozen tower's features; None computes them while training
    bucket: bool = True  # rows of like length share a batch
    crop_size: int | None = None  # side of the face crops; None is what the base's image processor takes, 224 to 448
    frame: str | None = None  # a chat template of x2dfd.prompts (train_consistent); None is the base's own
    view_seed: int = 1  # of the augmented views; must be the one that the instructions were built with
    base_dtype: str = "auto"  # of the frozen base: 16 bits where bf16 or fp16 is on or the checkpoint is in 16 bits
    weights_dtype: str = "float32"  # of the adapter's file; float16 halves it and moves verdicts by hundredths
    checkpointing: bool = False  # activations computed twice rather than kept
    deepspeed: str | None = None  # DeepSpeed's JSON: finetune/zero2.json, zero3.json, zero3_offload.json, or your own
    workers: int = 0  # processes that read pictures ahead; 0 reads them in the training's own
    bf16: bool = False  # matrix products in 16 bits; quick only where the processor or GPU has units for them
    fp16: bool = False  # the same in fp16, for GPUs that have no bf16
    save_steps: int = 100  # updates between checkpoints; a cut-off run resumes from the last
    eval_steps: int = 0  # updates between validations, which then also write the checkpoints; 0: none
    eval_split: str = "val"  # the pictures that validations ask about, never trained on
    eval_limit: int = 256  # largest number of these pictures
    best_by: str = "auc"  # the validation figure that chooses the checkpoint; or loss
    patience: int = 0  # the training ends after so many validations without a better one; 0: never early
    report_to: tuple[str, ...] = ()  # tensorboard, wandb or another tracker of transformers
    seed: int = 0

    @property
    def sets(self) -> list[tuple[Path, Path, float]]:
        """Instructions, manifest and weight of each instruction set."""
        both = [[v] if isinstance(v, str) else list(v) for v in (self.instructions, self.manifest)]
        weights = self.weights or (1.0,) * len(both[0])
        return [(Path(i), Path(m), w) for i, m, w in zip(*both, weights, strict=True)]


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """The configuration of a YAML file with `key=value` overrides on top. Raises UnknownName for a key that does not
    exist, X2DFDError for a value of the wrong kind or a missing key."""
    known = {f.name: f for f in fields(FinetuneConfig)}
    values: Json = {}
    if path is not None:
        if not path.is_file():
            raise X2DFDError(f"no such configuration: {path}", code="config_not_found")
        try:
            content = _yaml(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise X2DFDError(f"{path}: not UTF-8 text ({error.reason})", code="config_not_yaml") from error
        if not isinstance(content, dict | None):
            raise X2DFDError(f"{path}: not `key: value` pairs but {type(content).__name__}", code="config_malformed")
        values = content or {}
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign:
            raise X2DFDError(f"--set takes key=value, not {override!r}", code="override_malformed")
        values[key.strip()] = _yaml(text, f"--set {override}")
    for key, value in values.items():
        if key not in known:
            raise UnknownName("configuration key", str(key), known)
        values[key] = _typed(key, value, str(known[key].type))
    try:
        config = FinetuneConfig(**values)
    except TypeError as error:
        raise X2DFDError(f"configuration incomplete: {error}", code="config_incomplete") from error
    check_config(config)
    return config


def check_config(config: FinetuneConfig) -> None:
    """Raises UnknownName for an unknown choice, X2DFDError for settings that exclude each other."""
    for key, known in CHOICES.items():
        if getattr(config, key) not in known:
            raise UnknownName(key, getattr(config, key), known)
    for key, least in LEAST.items():
        if not least <= getattr(config, key) < math.inf:
            raise X2DFDError(f"{key} must be {least} or more, not {getattr(config, key)}", code="number_out_of_range")
    stage = zero_stage(config)
    counts = {len(v) for v in (config.instructions, config.manifest, config.weights) if isinstance(v, tuple) and v}
    count = 1 if isinstance(config.instructions, str) else len(config.instructions)
    clashes = {
        "instructions, manifest and weights must be equal in number": bool(counts - {count})
        or isinstance(config.instructions, str) != isinstance(config.manifest, str),
        "an instruction set is listed twice: give it a weight": len({*map(str, config.instructions)}) < count
        and isinstance(config.instructions, tuple),
        "name must not be empty": not config.name.strip(),
        "weights must be above 0": not all(0 < w < math.inf for w in config.weights),
        "lora_dropout must be below 1": config.lora_dropout >= 1,
        "bf16 or fp16, not both": config.bf16 and config.fp16,
        "base_dtype: bfloat16 needs bf16: true": config.base_dtype == "bfloat16" and not config.bf16,
        "base_dtype: float16 needs fp16: true": config.base_dtype == "float16" and not config.fp16,
        f"targets must be {', '.join(TARGETS)} or a regular expression": not _is_expression(config.targets),
        "patience needs eval_steps": config.patience > 0 and config.eval_steps <= 0,
        "eval_split must not be train": config.eval_split == "train",
        "cached_features works with one instruction set only": config.cached_features is not None and count > 1,
        "ZeRO-3 cannot partition weights in four bits: take finetune/zero2.json with qlora": stage == 3
        and config.method == "qlora",
        "the embedded base is too small for ZeRO-3 to help: take finetune/zero2.json, or none": stage == 3
        and config.base is None,
        "cached_features needs tower: frozen or forensic": config.cached_features is not None
        and config.tower not in ("frozen", "forensic"),
        "tower: forensic needs expert_weights with the expert `tower`": config.tower == "forensic"
        and config.expert_weights is None,
        "qlora needs a base of your own: the embedded one is small enough": config.base is None
        and config.method == "qlora",
        "start needs method lora, qlora or dora, and no ZeRO-3": config.start is not None
        and (config.method == "full" or stage == 3),
        "method: full trains no LoRA in the tower: take tower: frozen or norms": config.method == "full"
        and config.tower == "lora",
        "crop_size must be an even number from 224 to 1024": config.crop_size not in (None, *range(224, 1026, 2)),
        "the embedded base takes crops of 224 pixels": config.base is None and config.crop_size not in (None, 224),
        "cached_features needs an adapter, not method: full": config.cached_features is not None
        and config.method == "full",
    }
    wrong = [reason for reason, holds in clashes.items() if holds]
    if wrong:
        raise X2DFDError(f"configuration: {'; '.join(wrong)}", code="config_invalid")


def check_inputs(config: FinetuneConfig) -> None:
    """Raises X2DFDError for files and folders to read that are not there."""
    given = [(key, path) for i, m, _ in config.sets for key, path in (("instructions", i), ("manifest", m))]
    others = {"start": config.start, "expert_weights": config.expert_weights}
    given += [(key, Path(path)) for key, path in others.items() if path]
    if missing := [f"{key}: {path}" for key, path in given if not path.exists()]:
        raise X2DFDError(f"missing: {', '.join(missing)}; make them, or correct the paths", code="input_missing")


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def zero_stage(config: FinetuneConfig) -> int:
    """The ZeRO stage of DeepSpeed's JSON, 0 without one. Raises X2DFDError when it cannot be read."""
    return int(zero_settings(config).get("stage", 0))


def zero_settings(config: FinetuneConfig) -> Json:
    """The ZeRO settings of DeepSpeed's JSON, none without one. Raises X2DFDError when it cannot be read."""
    if (path := config.deepspeed) is None:
        return {}
    try:
        settings: Json = parse_json(Path(path).read_bytes()).get("zero_optimization", {})
        int(settings.get("stage", 0))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise X2DFDError(f"deepspeed: {path} is not DeepSpeed's JSON: {error}", code="config_malformed") from error
    return settings


def _yaml(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date
        raise X2DFDError(f"{where}: not YAML: {error}", code="config_not_yaml") from error


def _typed(key: str, value: Any, kind: str) -> Any:
    if value is None and "None" in kind:
        return None
    kinds = kind.removesuffix(" | None").split(" | ")
    if isinstance(value, list):
        tuple_kind = next((k for k in kinds if k.startswith("tuple")), "")
        item_type = {"str": str, "int": int, "float": float}.get(tuple_kind.removeprefix("tuple[").split(",")[0])
        value = tuple(float(v) if item_type is float and type(v) is int else v for v in value)
        if item_type is not None and all(type(v) is item_type for v in value):
            return value
    if kinds[0] == "float" and isinstance(value, str | int) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):  # refused below
            return float(value)  # YAML reads 2e-4 as text
    if {"int": int, "float": float, "str": str, "bool": bool}.get(kinds[0]) is type(value):
        return value
    raise X2DFDError(f"configuration key {key!r} must be {kind}, not {value!r}", code="config_wrong_type")
