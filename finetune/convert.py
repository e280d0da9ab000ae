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
from typing import TYPE_CHECKING

from torch import Tensor

from finetune.config import LANGUAGE_LINEARS
from finetune.published import PROJECTOR, read_trained
from x2dfd import prompts
from x2dfd.adapter import PEFT_PREFIX, WEIGHTS, AdapterCard, check_tensors, probe_logits, write_adapter_card
from x2dfd.errors import SetupError
from x2dfd.experts import load_expert
from x2dfd.faces import preprocessing
from x2dfd.files import Json, file_sha256, parse_json, write_text
from x2dfd.loading import base_identity, crop_size_of, load_processor
from x2dfd.model_spec import ModelSpec
from x2dfd.opening import load

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OTHERS = PROJECTOR[0]
SETTINGS = "adapter_config.json"
NAMES = (
    ("base_model.model.model.layers.", "base_model.model.model.language_model.layers."),
    ("base_model.model.model.mm_projector.0.", "base_model.model.model.multi_modal_projector.linear_1."),
    ("base_model.model.model.mm_projector.2.", "base_model.model.model.multi_modal_projector.linear_2."),
)
"""How tensors begin in LLaVA's layout and in the hub's."""

NEWER = (
    "corda_config", "eva_config", "exclude_modules", "target_parameters", "trainable_token_indices", "lora_bias",
    "use_qalora", "qalora_group_size",
)  # fmt: skip
"""Settings that an older PEFT refuses to read; empty, they do nothing."""


def renamed(state: Mapping[str, Tensor], to_hub: bool) -> dict[str, Tensor]:
    """The same tensors under the other layout's names. Raises SetupError for a name that the layout does not have."""
    pairs = NAMES if to_hub else [(hub, llava) for llava, hub in NAMES]
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        found = [new + key.removeprefix(old) for old, new in pairs if key.startswith(old)]
        if not found:
            raise SetupError(
                f"{key} belongs to no {'LLaVA' if to_hub else 'hub'} adapter of X2-DFD", code="tensor_unknown"
            )
        out[found[0]] = value
    return out


def hub_settings(settings: Json, base: str) -> Json:
    """PEFT's settings for the hub's layout, where `["q_proj", ...]` would reach into the tower: the targets become an
    expression over the language model. Raises SetupError when a newer key is in use, or a target is foreign to it."""
    grouped = bool(settings.get("use_qalora"))  # a group size says nothing where nothing is grouped
    said = {k: settings[k] for k in NEWER if k in settings and (grouped or k != "qalora_group_size")}
    used = [k for k, value in said.items() if value]
    if used:
        raise SetupError(f"{SETTINGS}: converting would lose {', '.join(used)}", code="setting_unsupported")
    linears = LANGUAGE_LINEARS.rsplit("(", 1)[1].rstrip(")").split("|")
    targets = settings["target_modules"]
    odd = sorted(set(targets) - set(linears)) if isinstance(targets, list) else [targets]
    if odd:
        raise SetupError(
            f"{SETTINGS}: not linear layers of the language model: {', '.join(odd)}", code="targets_unsupported"
        )
    kept = {k: v for k, v in settings.items() if k not in NEWER}
    expression = LANGUAGE_LINEARS.rsplit("(", 1)[0] + f"({'|'.join(sorted(targets))})"
    return {
        **kept,
        "base_model_name_or_path": base,
        "target_modules": expression,
        "modules_to_save": ["multi_modal_projector"],
    }


def check_complete(
    state: Mapping[str, Tensor], others: Mapping[str, Tensor], settings: Json, layers: int, where: Path
) -> None:
    """Refuse a published adapter that lacks matrices of its targets in any of a base's `layers`, or half its projector:
    it would load and do less than it was trained to. `state`, `others`: in LLaVA's layout. Raises SetupError."""
    wanted = {
        (n, target, half)
        for n in range(layers)
        for target in settings["target_modules"]
        for half in ("lora_A", "lora_B")
    }
    found = {
        (int(part[4]), part[6], part[7])
        for part in (key.split(".") for key in state)
        if len(part) == 9 and part[3] == "layers" and part[4].isdigit()
    }
    if missing := sorted(wanted - found):
        layer, target, half = missing[0]
        raise SetupError(
            f"{where} lacks {len(missing)} of {len(wanted)} matrices of a base with {layers} layers, first {half} of "
            f"{target} in layer {layer}: another base, or an incomplete copy",
            code="adapter_incomplete",
        )
    projector = [f"{NAMES[k][0]}{part}" for k in (1, 2) for part in ("weight", "bias")]
    if absent := [k for k in projector if k not in others]:
        raise SetupError(
            f"{where} lacks {len(absent)} of 4 projector tensors: {absent[0]}", code="projector_incomplete"
        )


def llava_settings(settings: Json, base: str) -> Json:
    """PEFT's settings for LLaVA's own code. Raises SetupError for targets that `hub_settings` would not write."""
    start, sign, words = str(settings["target_modules"]).rpartition("(")
    if start != LANGUAGE_LINEARS.rsplit("(", 1)[0] or not sign:
        raise SetupError(
            f"{SETTINGS}: targets {settings['target_modules']!r} have no counterpart in LLaVA's layout",
            code="targets_without_counterpart",
        )
    kept = {k: v for k, v in settings.items() if k not in NEWER}
    return {
        **kept,
        "base_model_name_or_path": base,
        "target_modules": words.rstrip(")").split("|"),
        "modules_to_save": None,
    }


def check_shapes(state: Mapping[str, Tensor], config: PretrainedConfig, where: Path) -> None:
    """Refuse tensors, in the hub's layout, that do not fit the base of a configuration. Raises SetupError."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        base = AutoModelForImageTextToText.from_config(config)
    shapes = {name: tuple(p.shape) for name, p in base.named_parameters()}
    for key, value in state.items():
        part, half, _ = key.removeprefix(PEFT_PREFIX).partition(".lora_")
        wanted, found = shapes.get(f"{part}.weight" if half else part), tuple(value.shape)
        if half and wanted is not None and len(found) == 2:  # A: [rank, in], B: [out, rank]
            wanted = (found[0], wanted[1]) if ".lora_A." in key else (wanted[0], found[1])
        if found != wanted:
            raise SetupError(
                f"{where}: {key} is {list(found)} where the base has {wanted and list(wanted)}",
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
    """Convert a published adapter directory, or a checkpoint of its training; returns the card that is written.

    `base`: the hub's LLaVA that it fits, which is loaded too, for what the probe pictures score; `frame`: see
    `x2dfd.prompts.CHAT_TEMPLATES`; `experts`: whose scores stand in its prompt, in that order, with the weights that
    are here; `aliases`: what the prompt calls some of them. `out` must hold no adapter yet. Raises SetupError.
    """
    from transformers import AutoConfig

    settings = _settings(source)
    state, others = read_trained(source)
    try:
        processor, config = load_processor(base), AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise SetupError(f"{base} cannot be read: {error}", code="adapter_unreadable") from error
    prompts.set_chat_template(processor, frame)
    identity = base_identity(base)
    both, target_settings = renamed({**state, **others}, True), hub_settings(settings, identity["name"])
    check_tensors(both, source)
    check_complete(state, others, settings, int(config.text_config.num_hidden_layers), source)
    check_shapes(both, config, source)
    used = {name: load_expert(name).card.sha256 for name in experts}
    side = crop_size_of(processor)
    _write(out, both, target_settings)
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
        experts=used,
        aliases=dict(aliases or {}),
        crop_size=side,
    )
    write_adapter_card(out, card)
    try:
        mllm = load(ModelSpec(base=base, adapter=out), mode="paper", experts=(), device="cpu").mllm
    except SetupError:
        (out / WEIGHTS).unlink()  # so that it can be converted again
        raise
    card = replace(card, probes=probe_logits(mllm, side))
    write_adapter_card(out, card)
    return card


def to_llava(source: Path, out: Path, *, base: str) -> None:
    """Convert an adapter directory for LLaVA's own code; `base` is the name that code loads (liuhaotian/llava-v1.5-7b).
    Raises SetupError with the reason; `out` must not hold an adapter yet."""
    import torch
    from safetensors.torch import load_file

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
        found: Json = parse_json((source / SETTINGS).read_bytes())
        if found["peft_type"] != "LORA":
            raise SetupError(f"{source / SETTINGS}: {found['peft_type']} is not LORA", code="not_lora")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SetupError(
            f"{source / SETTINGS} cannot be read: {error!r:.200}", code="adapter_config_unreadable"
        ) from error
    return found


def _write(out: Path, state: dict[str, Tensor], settings: Json) -> None:
    from safetensors.torch import save_file

    if (out / WEIGHTS).exists():
        raise SetupError(f"{out} holds an adapter already; choose another folder", code="folder_taken")
    out.mkdir(parents=True, exist_ok=True)
    save_file(state, out / f".{WEIGHTS}", {"format": "pt"})
    write_text(out / SETTINGS, json.dumps(settings, indent=1) + "\n")
    (out / f".{WEIGHTS}").replace(out / WEIGHTS)
