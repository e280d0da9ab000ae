"""`--dry-run`: what would be trained, the memory that it takes on each GPU, and the settings that fit a card. A
prediction from the model's shapes alone; `finetune.gpu` measures the same. Nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from finetune.config import FinetuneConfig, check_config, zero_settings, zero_stage
from finetune.models import part_name, resolved, tune
from x2dfd.checkpoints import cut_layers
from x2dfd.errors import SetupError
from x2dfd.fetch import require
from x2dfd.files import Json

GB = 1e9
CARDS = (12, 24, 40, 80)  # GB
USABLE = 0.92  # of a card: the rest goes to the driver and to gaps
TOKENS = 1024  # of a row: LLaVA-1.5's 576 of the picture, and the conversations about it
ANSWERS = 1 / 5  # of a row's tokens, for which alone there are logits: 6 to 10 % with LLaVA-1.5, 11 to 18 % embedded
CONTEXT = 1.0 * GB  # CUDA, libraries, buffers of the communication

LADDER: tuple[Json, ...] = (
    {"method": "lora", "checkpointing": False, "batch": 4},
    {"method": "lora", "checkpointing": False, "batch": 1},
    {"method": "lora", "checkpointing": True, "batch": 4},
    {"method": "lora", "checkpointing": True, "batch": 1},
    {"method": "qlora", "checkpointing": True, "batch": 4},
    {"method": "qlora", "checkpointing": True, "batch": 1},
)
"""Presets, quickest first."""


@dataclass(frozen=True)
class Shape:
    """What memory depends on."""

    total: int  # parameters of the base
    linears: int  # of them in the language model's linear layers, which qlora keeps in four bits
    trained: int  # parameters that learn, LoRA's own among them
    layers: int  # of the language model
    hidden: int
    inner: int  # width of its MLP
    vocabulary: int


def shape(config: FinetuneConfig) -> Shape:
    """The model's shape, from its configuration file alone. Raises SetupError when there is none."""
    try:
        settings: Any = AutoConfig.from_pretrained(require("base") if config.base is None else config.base)
    except (OSError, ValueError) as error:
        raise SetupError(f"{config.base}: no readable configuration: {error}", code="base_unreadable") from error
    chosen = cut_layers(settings, config.base or "", config.tower_layers, config.text_layers, config.feature_layers)
    if chosen is not None:
        settings.get_text_config().num_hidden_layers = len(chosen)
    return shape_of(settings, config)


def shape_of(settings: Any, config: FinetuneConfig) -> Shape:
    """The shape of a model of the given transformers configuration, trained as `config` says."""
    text = settings.get_text_config()
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(settings)
        name = part_name(model, model.get_decoder())
        total = sum(p.numel() for p in model.parameters())
        modules = model.named_modules()
        linears = sum(
            m.weight.numel() for n, m in modules if n.startswith(f"{name}.layers") and isinstance(m, torch.nn.Linear)
        )
        method = "lora" if config.method == "qlora" else config.method
        tuned, _ = tune(model, replace(config, method=method))
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    return Shape(
        total, linears, trained, text.num_hidden_layers, text.hidden_size, text.intermediate_size, text.vocab_size
    )


def predict(
    config: FinetuneConfig, found: Shape, gpus: int, tokens: int = TOKENS, answers: float = ANSWERS
) -> dict[str, float]:
    """Bytes on each GPU by what they are for; `total` is their sum. `tokens`: of one row; `answers`: their share."""
    stage, offloaded = zero_stage(config), zero_settings(config)
    width = 4 if config.base_dtype in ("float32", "auto") else 2
    four = found.linears if config.method == "qlora" else 0
    weights = (found.total - four) * width + four * 0.516  # NF4 with its scales quantised once more
    if config.method == "full":
        weights = found.total * width
    trained = found.trained * 4.0 if config.method != "full" or width == 2 else 0.0  # fp32 copies that learn
    gradients, moments = found.trained * 4.0, found.trained * 8.0
    if stage >= 2:
        gradients, moments = gradients / gpus, moments / gpus
    if stage == 3:
        weights, trained = weights / gpus, trained / gpus
    if "offload_param" in offloaded:
        weights = 0.0  # they pass through layer by layer
    if "offload_optimizer" in offloaded:
        trained = moments = 0.0
    rows = config.batch * tokens
    wide = 2 if config.bf16 else 4
    # Of a token in one layer: what the backward pass reads again, and LoRA's inputs in fp32, of q, k, v and of gate and
    # up one each. On an H200 the peak was 4 to 14 % below (eval/results/gpu.json). A tower that learns is not counted.
    layer = wide * (10 * found.hidden + 4 * found.inner) + 4 * (3 * found.hidden + found.inner)
    kept = found.layers * wide * found.hidden + layer if config.checkpointing else found.layers * layer
    parts = {
        "weights": weights,
        "trained copies": trained,
        "gradients": gradients,
        "AdamW": moments,
        "activations": float(rows * kept),
        "logits": rows * answers * found.vocabulary * (wide + 8.0),  # with their losses and gradients in fp32
        "context": CONTEXT,
    }
    return {**parts, "total": sum(parts.values())}


def preset(config: FinetuneConfig, found: Shape, card: int, gpus: int) -> Json | None:
    """The quickest of LADDER that fits a card of so many GB; None when none does."""
    for step in LADDER:
        tried = replace(config, **step, base_dtype="bfloat16", bf16=True)
        if predict(tried, found, gpus)["total"] <= card * GB * USABLE:
            return {**step, "base_dtype": "bfloat16", "bf16": True}
    return None


def report(config: FinetuneConfig, gpus: int = 1) -> str:
    """The whole answer as text. Raises X2DFDError for what training would refuse."""
    check_config(config)
    found = shape(config)
    config = resolved(config)
    parts = predict(config, found, gpus)
    lines = [
        f"base        {config.base or 'embedded'}: {found.total:,} parameters",
        f"trained     {found.trained:,} parameters ({config.method})",
        f"rows        {config.batch} of {TOKENS} tokens on each of {gpus} GPU(s), {config.accumulate} steps an update",
        "predicted   " + ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items()) + " GB a GPU",
    ]
    for card in CARDS:
        chosen = preset(config, found, card, gpus)
        words = " ".join(f"--set {k}={str(v).lower()}" for k, v in chosen.items()) if chosen else "does not fit"
        lines.append(f"{card:>2} GB       {words}")
    return "\n".join(lines)
