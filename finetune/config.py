"""One dataclass is the whole configuration; YAML files and `--set key=value` are two spellings of it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from x2dfd.errors import UnknownName, X2DFDError
from x2dfd.files import Json

LANGUAGE_LINEARS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""LoRA's targets: every linear layer of the language model, and none of the tower or the projector."""

TOWER_LINEARS = r".*vision_tower.*\.layers\.(LAYERS)\..*(q_proj|k_proj|v_proj|out_proj)"
"""LoRA's further targets with `tower: lora`, LAYERS being numbers: attention, a third of what all of it would weigh."""

CHOICES = {
    "method": ("lora", "qlora", "dora", "full"),
    "tower": ("frozen", "norms", "lora", "forensic"),
    "base_dtype": ("float32", "bfloat16"),
}
"""What a key of the configuration may be."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything that decides what a training gives; saved beside its weights."""

    instructions: str  # instructions.jsonl of `data_gen build`, or conversations of another stack (data_gen.exchange)
    manifest: str  # the manifest the instructions were built from; of conversations, the folder of their pictures
    out: str  # adapter directory to write
    base: str | None = None  # directory or hub name of a LLaVA; None is the embedded base
    method: str = "lora"  # lora; qlora: on a base in NF4 (bitsandbytes); dora; full: every language weight
    name: str = "x2dfd-embedded"  # the adapter's name in its card
    version: str = "1"  # the adapter's version in its card
    licence: str = "as the training data; not for redistribution unless you know better"  # of the weights
    trained_on: str = ""  # the data in words, for the card
    blind_spot: str = "forgeries unlike those of its instruction set"  # what the card must warn of
    expert_weights: str | None = None  # folder of other expert weights; they travel with the adapter
    tower_layers: int | None = None  # vision layers kept; None keeps all
    text_layers: int | tuple[int, ...] | None = None  # language layers kept: the first so many, or these; None: all
    feature_layers: tuple[int, ...] | None = None  # tower outputs joined as the projector's input; None as the base
    lora_r: int = 16  # rank
    lora_alpha: int = 32  # scale is alpha / r
    lora_dropout: float = 0.05
    targets: str = LANGUAGE_LINEARS  # regular expression over module names; inside the language model
    tower: str = "frozen"  # or norms: its normalisation layers are trained, at the projector's rate; lora: LoRA too;
    # forensic: frozen, with what the expert `tower` in `expert_weights` adds to it
    lr: float = 2e-4  # of the LoRA matrices
    projector_lr: float = 2e-5  # of the projector
    weight_decay: float = 0.0
    warmup: float = 0.03  # share of the steps
    epochs: float = 1.0
    max_steps: int = -1  # stops earlier than epochs when positive
    batch: int = 1  # packs (pictures) a device and step
    accumulate: int = 8  # steps per update
    verdict_weight: float = 4.0  # weight of label and yes/no tokens against one explanation token
    cue_weight: float = 1.0  # of explanation tokens that name an area, an artifact or a class; by fast tokenizers
    start: str | None = None  # adapter directory of the same base and layers to start from; None: LoRA at zero
    left_out: tuple[str, ...] = ()  # sources and generators (Sample.origin) of which no picture is trained on
    limit: int | None = None  # at most this many pictures of the manifest have their features cached
    cached_features: str | None = None  # folder of a frozen tower's features; None computes them while training
    bucket: bool = True  # packs of like length share a batch
    frame: str | None = None  # a chat frame of x2dfd.prompts (train_consistent); None is the base's own
    view_seed: int = 1  # degradation of each picture; must be the one the instructions were built with
    base_dtype: str = "float32"  # of the frozen base; bfloat16 halves its memory and wants bf16
    checkpointing: bool = False  # activations computed twice rather than kept
    deepspeed: str | None = None  # DeepSpeed's JSON: finetune/zero2.json, finetune/zero3.json
    workers: int = 0  # processes that read pictures ahead; 0 reads them in the training's own
    bf16: bool = False  # matrix products in 16 bits; quick only where the processor or GPU has units for them
    save_steps: int = 100  # updates between checkpoints; a cut-off run resumes from the last
    seed: int = 0


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """The configuration of a YAML file with `key=value` overrides on top.

    Raises UnknownName for a key that does not exist, X2DFDError for a value of the wrong kind or a missing key.
    """
    known = {f.name: f for f in fields(FinetuneConfig)}
    values: Json = {}
    if path is not None:
        if not path.is_file():
            raise X2DFDError(f"no such configuration: {path}", code="config_not_found")
        read = _yaml(path.read_text(encoding="utf-8"), str(path))
        if not isinstance(read, dict | None):
            raise X2DFDError(
                f"{path}: a configuration is a list of `key: value`, not {type(read).__name__}", code="config_malformed"
            )
        values = read or {}
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
    """Raises UnknownName for a choice that there is not, X2DFDError for settings that exclude each other."""
    for key, known in CHOICES.items():
        if getattr(config, key) not in known:
            raise UnknownName(key, getattr(config, key), known)
    clashes = {
        "base_dtype: bfloat16 wants bf16: true": config.base_dtype == "bfloat16" and not config.bf16,
        "cached features want tower: frozen or forensic": config.cached_features is not None
        and config.tower not in ("frozen", "forensic"),
        "tower: forensic wants expert_weights with the expert `tower`": config.tower == "forensic"
        and config.expert_weights is None,
        "qlora wants a base of its own; the embedded one is small enough": config.base is None
        and config.method == "qlora",
        "start: an adapter is continued by lora, qlora or dora, outside of ZeRO-3": config.start is not None
        and (config.method == "full" or "zero3" in (config.deepspeed or "")),
        "method: full trains no LoRA in the tower: take tower: frozen or norms": config.method == "full"
        and config.tower == "lora",
        "workers: 0 or more": config.workers < 0,
        "cached features want an adapter, not method: full": config.cached_features is not None
        and config.method == "full",
    }
    wrong = [reason for reason, holds in clashes.items() if holds]
    if wrong:
        raise X2DFDError(f"configuration: {'; '.join(wrong)}", code="config_invalid")


def _yaml(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise X2DFDError(f"{where}: not YAML: {error}", code="config_not_yaml") from error


def _typed(key: str, value: Any, kind: str) -> Any:
    if value is None and "None" in kind:
        return None
    plain = kind.removesuffix(" | None")
    if plain.startswith("int | tuple"):
        plain = "int" if isinstance(value, int) else "tuple"
    if plain == "float" and isinstance(value, str | int) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # it is refused below
            return float(value)  # YAML reads 2e-4 as text
    of = str if plain.startswith("tuple[str") else int
    if plain.startswith("tuple") and isinstance(value, list) and all(type(v) is of for v in value):
        return tuple(value)
    if {"int": int, "float": float, "str": str, "bool": bool}.get(plain) is type(value):
        return value
    raise X2DFDError(f"configuration key {key!r} wants {kind}, got {value!r}", code="config_wrong_type")
