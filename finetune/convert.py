"""Published X2-DFD adapters to the layout that `x2dfd.load` takes, and back.

LLaVA's own code keeps LoRA under `model.layers.N`, and the projector, which is no LoRA, in `non_lora_trainables.bin` as
`model.mm_projector.0` and `.2`. Transformers calls the same modules `model.language_model.layers.N` and
`model.multi_modal_projector.linear_1` and `linear_2`. Every tensor keeps its bits and its precision.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig

from finetune.config import LANGUAGE_LINEARS
from finetune.published import PROJECTOR, read_trained
from x2dfd import prompts
from x2dfd.adapter import PEFT_PREFIX, WEIGHTS, AdapterCard, check_tensors, probe_logits, write_adapter_card
from x2dfd.checkpoints import base_identity, crop_size_of, load_processor
from x2dfd.errors import SetupError
from x2dfd.experts import load_expert
from x2dfd.faces import preprocessing
from x2dfd.files import Json, atomic_write, file_sha256, parse_json, write_text
from x2dfd.loading import load
from x2dfd.model_spec import ModelSpec

OTHERS = PROJECTOR[0]
SETTINGS = "adapter_config.json"
NAMES = (
    ("base_model.model.model.layers.", "base_model.model.model.language_model.layers."),
    ("base_model.model.model.mm_projector.0.", "base_model.model.model.multi_modal_projector.linear_1."),
    ("base_model.model.model.mm_projector.2.", "base_model.model.model.multi_modal_projector.linear_2."),
)
"""How tensors begin in LLaVA's layout and in the hub's."""

PLACE, LINEARS = LANGUAGE_LINEARS.rsplit("(", 1)[0], LANGUAGE_LINEARS.rsplit("(", 1)[1].rstrip(")").split("|")
"""Where the language model's linear layers are, as a regular expression, and their names."""

NEWER = (
    "corda_config", "eva_config", "exclude_modules", "target_parameters", "trainable_token_indices", "lora_bias",
    "use_qalora", "qalora_group_size",
)  # fmt: skip
"""Settings that an older PEFT refuses to read, and that have no effect if empty."""


def renamed(state: Mapping[str, Tensor], to_hub: bool) -> dict[str, Tensor]:
    """The same tensors under the other layout's names. Raises SetupError for a name that the layout does not have."""
    pairs = NAMES if to_hub else [(hub, llava) for llava, hub in NAMES]
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        names = [new + key.removeprefix(old) for old, new in pairs if key.startswith(old)]
        if not names:
            raise SetupError(
                f"{key} belongs to no {'LLaVA' if to_hub else 'hub'} adapter of X2-DFD", code="tensor_unknown"
            )
        out[names[0]] = value
    return out


def hub_settings(settings: Json, base: str) -> Json:
    """PEFT's settings for the hub's layout. There `["q_proj", ...]` would match the tower too, so the targets become an
    expression over the language model. Raises SetupError if a newer key is in use, or a target is not of that model."""
    grouped = bool(settings.get("use_qalora"))  # without it, a group size has no effect
    newer = {k: settings[k] for k in NEWER if k in settings and (grouped or k != "qalora_group_size")}
    used = [k for k, value in newer.items() if value]
    if used:
        raise SetupError(f"{SETTINGS}: converting would lose {', '.join(used)}", code="setting_unsupported")
    targets = settings["target_modules"]
    unsupported = sorted(set(targets) - set(LINEARS)) if isinstance(targets, list) else [targets]
    if unsupported:
        raise SetupError(
            f"{SETTINGS}: not linear layers of the language model: {', '.join(unsupported)}", code="targets_unsupported"
        )
    return _settings_of(settings, base, f"{PLACE}({'|'.join(sorted(targets))})", ["multi_modal_projector"])


def _settings_of(settings: Json, base: str, targets: object, whole: list[str] | None) -> Json:
    older = {k: v for k, v in settings.items() if k not in NEWER}
    return older | {"base_model_name_or_path": base, "target_modules": targets, "modules_to_save": whole}


def check_complete(
    state: Mapping[str, Tensor], others: Mapping[str, Tensor], settings: Json, layers: int, where: Path
) -> None:
    """Refuse a published adapter that lacks matrices of its targets in any of a base's `layers`, or projector tensors:
    it would load, but without part of its training. `state`, `others`: in LLaVA's layout. Raises SetupError."""
    expected = {
        (n, target, half)
        for n in range(layers)
        for target in settings["target_modules"]
        for half in ("lora_A", "lora_B")
    }
    present = {
        (int(part[4]), part[6], part[7])
        for part in (key.split(".") for key in state)
        if len(part) == 9 and part[3] == "layers" and part[4].isdigit()
    }
    if missing := sorted(expected - present):
        layer, target, half = missing[0]
        raise SetupError(
            f"{where} lacks {len(missing)} of {len(expected)} matrices of a base with {layers} layers, first {half} of "
            f"{target} in layer {layer}: another base, or an incomplete copy",
            code="adapter_incomplete",
        )
    projector = [f"{NAMES[k][0]}{part}" for k in (1, 2) for part in ("weight", "bias")]
    if lacking := [k for k in projector if k not in others]:
        raise SetupError(
            f"{where} lacks {len(lacking)} of 4 projector tensors: {lacking[0]}", code="projector_incomplete"
        )


def llava_settings(settings: Json, base: str) -> Json:
    """PEFT's settings for LLaVA's own code. Raises SetupError for targets that `hub_settings` would not write."""
    start, sign, words = str(settings["target_modules"]).rpartition("(")
    if start != PLACE or not sign:
        raise SetupError(
            f"{SETTINGS}: targets {settings['target_modules']!r} have no counterpart in LLaVA's layout",
            code="targets_without_counterpart",
        )
    return _settings_of(settings, base, words.rstrip(")").split("|"), None)


def check_shapes(state: Mapping[str, Tensor], config: PretrainedConfig, where: Path) -> None:
    """Refuse tensors in the hub's layout whose shapes do not fit the base. Raises SetupError."""
    with torch.device("meta"):
        base = AutoModelForImageTextToText.from_config(config)
    shapes = {name: tuple(p.shape) for name, p in base.named_parameters()}
    for key, value in state.items():
        module, half, _ = key.removeprefix(PEFT_PREFIX).partition(".lora_")
        expected, shape = shapes.get(f"{module}.weight" if half else module), tuple(value.shape)
        if half and expected is not None and len(shape) == 2:  # A: [rank, in], B: [out, rank]
            expected = (shape[0], expected[1]) if ".lora_A." in key else (expected[0], shape[1])
        if shape != expected:
            raise SetupError(
                f"{where}: {key} is {list(shape)} where the base has {expected and list(expected)}",
                code="adapter_does_not_fit",
            )


def to_hub(
    source: Path,
    out: Path,
    *,
    base: str,
    frame: str = "train_consistent",
    experts: tuple[str, ...] = (),
    aliases: Mapping[str, str] | None = None,
) -> AdapterCard:
    """Convert a published adapter directory, or a checkpoint of its training; returns the written card.

    `base`: the hub's LLaVA that it fits, which is also loaded to score the probe pictures; `frame`: see
    `x2dfd.prompts.CHAT_TEMPLATES`; `experts`: those whose scores its prompt states, in that order, with the weights
    found here; `aliases`: names of experts in the prompt. `out` must hold no adapter yet. Raises SetupError.
    """
    settings = _settings(source)
    state, others = read_trained(source)
    try:
        processor, config = load_processor(base), AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise SetupError(f"{base} cannot be read: {error}", code="adapter_unreadable") from error
    prompts.set_chat_template(processor, frame)
    identity = base_identity(base)
    tensors, target_settings = renamed({**state, **others}, True), hub_settings(settings, identity["name"])
    check_tensors(tensors, source)
    check_complete(state, others, settings, int(config.text_config.num_hidden_layers), source)
    check_shapes(tensors, config, source)
    expert_hashes = {name: load_expert(name).card.sha256 for name in experts}
    side = crop_size_of(processor)
    _write(out, tensors, target_settings)
    card = AdapterCard(
        name=source.resolve().name,
        version="published",
        source="a published X2-DFD adapter, converted: python -m finetune convert",
        licence="that of its publisher",
        sha256=file_sha256(out / WEIGHTS),
        preprocessing=preprocessing(side),
        paper="X2-DFD, arXiv 2410.06126",
        blind_spot="trained on other face crops than it is shown here; forgeries unlike those of its training",
        weights=WEIGHTS,
        base=identity,
        frame=frame,
        prompt_sha256=prompts.prompt_hash(processor),
        experts=expert_hashes,
        aliases=dict(aliases or {}),
        crop_size=side,
    )
    write_adapter_card(out, card)
    try:
        mllm = load(ModelSpec(base=base, adapter=out), mode="paper", experts=(), device="cpu").mllm
    except SetupError:
        (out / WEIGHTS).unlink()  # so that another attempt finds no adapter in `out`
        raise
    card = replace(card, probes=probe_logits(mllm, side))
    write_adapter_card(out, card)
    return card


def to_llava(source: Path, out: Path, *, base: str) -> None:
    """Convert an adapter directory for LLaVA's own code, which loads its base by the name `base`
    (liuhaotian/llava-v1.5-7b). `out` must not hold an adapter yet. Raises SetupError with the reason."""
    settings = _settings(source)
    try:
        state = renamed(load_file(source / WEIGHTS), False)
    except OSError as error:
        raise SetupError(f"{source} cannot be read: {error}", code="adapter_unreadable") from error
    lora = {k: v for k, v in state.items() if ".lora_" in k}
    _write(out, lora, llava_settings(settings, base))
    torch.save({k: v for k, v in state.items() if k not in lora}, out / f".{OTHERS}")
    (out / f".{OTHERS}").replace(out / OTHERS)


def _settings(source: Path) -> Json:
    try:
        settings: Json = parse_json((source / SETTINGS).read_bytes())
        if settings["peft_type"] != "LORA":
            raise SetupError(f"{source / SETTINGS}: {settings['peft_type']} is not LORA", code="not_lora")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SetupError(
            f"{source / SETTINGS} cannot be read: {error!r:.200}", code="adapter_config_unreadable"
        ) from error
    return settings


def _write(out: Path, state: dict[str, Tensor], settings: Json) -> None:
    if (out / WEIGHTS).exists():
        raise SetupError(f"{out} holds an adapter already; choose another folder", code="folder_taken")
    write_text(out / SETTINGS, json.dumps(settings, indent=1) + "\n")
    with atomic_write(out / WEIGHTS) as temporary:
        save_file(state, temporary, {"format": "pt"})
