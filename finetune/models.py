"""The model to be trained: its base, the weights that learn, and where they start."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

from finetune.config import TARGETS, TOWER_LINEARS, FinetuneConfig
from x2dfd import prompts
from x2dfd.adapter import WEIGHTS, check_contents, read_adapter_card
from x2dfd.checkpoints import base_identity, checkpoint_dtype, family_of, in_bits, load_model
from x2dfd.errors import X2DFDError
from x2dfd.files import Json
from x2dfd.prompts import Processor
from x2dfd.tower import add_to_tower, read_additions

NO_TOWER = "tower: lora fits a tower of CLIP's kind in a LLaVA alone, and this model has none: take frozen or norms"


def resolved(config: FinetuneConfig) -> FinetuneConfig:
    """The configuration with `base_dtype: auto` replaced by a precision, and with bf16 if the checkpoint has 16 bits,
    which is never read in 32. Raises SetupError when it cannot be read."""
    if config.base_dtype != "auto":
        return config
    if config.bf16 or config.fp16:
        return replace(config, base_dtype="float16" if config.fp16 else "bfloat16" if config.base else "float32")
    if config.base is None or checkpoint_dtype(config.base) == torch.float32:
        return replace(config, base_dtype="float32")
    return replace(config, base_dtype="bfloat16", bf16=True)


def open_base(config: FinetuneConfig) -> tuple[Any, Processor]:
    """The base model, quantised for qlora, and its processor. Raises SetupError if it cannot be read."""
    options: Json = {"dtype": getattr(torch, resolved(config).base_dtype)}
    cut = {k: getattr(config, k) for k in ("tower_layers", "text_layers", "feature_layers")}
    if config.method == "qlora" and config.base is not None:
        options["quantization_config"] = in_bits(config.base, 4, options["dtype"])
    model, processor = load_model(config.base, **cut, **options)
    prompts.set_chat_template(processor, config.frame)
    if not is_llava(model) and (config.cached_features is not None or config.tower == "forensic"):
        raise X2DFDError(
            f"cached_features and `tower: forensic` need a LLaVA with CLIP's tower, and {config.base} is a "
            f"{model.config.model_type!r} model: remove them",
            code="not_llava",
        )
    if (additions := additions_of(config)) is not None:
        add_to_tower(model.model.vision_tower, read_additions(additions))
    return model, processor


def is_llava(model: Any) -> bool:
    """Whether this is a LLaVA with CLIP's tower, whose outputs can be cached and whose layers can be cut."""
    kinds = (model.config.model_type, model.config.vision_config.model_type)
    return kinds == ("llava", "clip_vision_model")


def additions_of(config: FinetuneConfig) -> Path | None:
    """The weight file of the forensic tower, with `tower: forensic`."""
    return Path(str(config.expert_weights)) / "tower.safetensors" if config.tower == "forensic" else None


def part_name(model: nn.Module, part: nn.Module) -> str:
    """The name of a submodule."""
    return next(str(name) for name, module in model.named_modules() if module is part)


def projector_parts(model: Any) -> list[str]:
    """The names of a family's modules between tower and language model; each element of a list is named."""
    modules = dict(model.named_modules())
    names = [n for n in modules if any(n.endswith(f".{p}") for p in family_of(model.config).projector)]
    lists = [n for n in names if isinstance(modules[n], nn.ModuleList)]
    return [n for n in modules if n.rpartition(".")[0] in lists or (n in names and n not in lists)]


def targets_of(model: Any, targets: str) -> str:
    """LoRA's targets as a regular expression: a preset of `TARGETS` for this model, or the expression itself."""
    if targets not in TARGETS:
        return targets
    text = model.get_decoder()
    names = [n for n, m in text.named_modules() if isinstance(m, nn.Linear)]
    ends = {n.rpartition(".")[2]: None for n in names if targets == "language" or "attn" in n}
    return rf".*{part_name(model, text).rpartition('.')[2]}.*\.({'|'.join(ends)})"


def tune(model: Any, config: FinetuneConfig) -> tuple[Any, list[str]]:
    """The model with only the trained weights unfrozen, and the names of the modules that learn at `projector_lr`.
    Projector and norms learn whole, the language model through LoRA matrices or whole. Raises X2DFDError when `targets`
    names a module outside of the language model, or none."""
    text, projector = part_name(model, model.get_decoder()), projector_parts(model)
    whole = projector if config.projector_lr > 0 else []
    if config.tower == "norms":
        outside = [(n, m) for n, m in model.named_modules() if not n.startswith((text, *projector))]
        whole = whole + [n for n, m in outside if type(m).__name__.endswith("Norm")]
    torch.manual_seed(config.seed)
    if config.method == "full":
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith((text, "lm_head", *whole)))
        tuned = model
    else:
        tuned = _with_lora(model, text, whole, config)
    if config.base_dtype != "float32" and not config.deepspeed:  # DeepSpeed keeps fp32 masters of its own
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # a step of 2e-5 is lost in 16 bits
    return tuned, whole


def _with_lora(model: Any, text: str, whole: list[str], config: FinetuneConfig) -> Any:
    """The model with LoRA in its language model `text`, and with `tower: lora` in its tower. Raises X2DFDError."""
    targets = targets_of(model, config.targets)
    tower_pattern = _tower_linears(model) if config.tower == "lora" else None
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=f"{targets}|{tower_pattern.pattern}" if tower_pattern else targets,
        use_dora=config.method == "dora",
        modules_to_save=[n.removeprefix("model.") for n in whole] or None,
    )
    try:
        tuned: Any = get_peft_model(model, lora)
    except ValueError as error:
        raise X2DFDError(f"targets {targets!r}: {error}", code="targets_invalid") from error
    if config.start:
        _start_from(tuned, Path(config.start), config)
    adapted = [n.removeprefix("base_model.model.") for n, _ in tuned.named_parameters() if "lora_A" in n]
    if tower_pattern and not any(tower_pattern.match(n) for n in adapted):
        raise X2DFDError(NO_TOWER, code="tower_missing")
    if not any(n.startswith(text) for n in adapted):
        raise X2DFDError(f"targets {targets!r} name nothing in {text}", code="targets_match_nothing")
    outside = [n for n in adapted if not n.startswith(text) and not (tower_pattern and tower_pattern.match(n))]
    if outside:
        raise X2DFDError(f"targets {targets!r} reach outside of {text}: {outside[0]}", code="targets_outside_text")
    return tuned


def _tower_linears(model: Any) -> re.Pattern[str]:
    """LoRA's targets in the tower, up to the last layer that the projector reads: later ones would learn nothing.
    Raises X2DFDError if there is no such tower."""
    depth = getattr(getattr(model.config, "vision_config", None), "num_hidden_layers", None)
    layers = getattr(model.config, "vision_feature_layer", None)
    if not isinstance(depth, int) or layers is None:
        raise X2DFDError(NO_TOWER, code="tower_missing")
    last = max(k if k >= 0 else depth + 1 + k for k in ([layers] if isinstance(layers, int) else layers))
    return re.compile(TOWER_LINEARS.replace("LAYERS", "|".join(map(str, range(last)))))


def _start_from(tuned: Any, folder: Path, config: FinetuneConfig) -> None:
    """Give LoRA and projector the values of an adapter. Raises X2DFDError if it belongs to another model."""
    card = read_adapter_card(folder)
    check_contents(folder, card)
    # The tower's depth does not matter, and a projector soon adapts to neighbours of the layers that it knew.
    differing = ["text_layers"] if config.text_layers not in (None, card.text_layers) else []
    if config.feature_layers is not None and len(config.feature_layers) != len(card.feature_layers):
        differing.append("feature_layers")
    if config.crop_size not in (None, card.crop_size):
        differing.append("crop_size")
    if differing or card.base != base_identity(config.base):
        raise X2DFDError(
            f"start: {folder} has another {differing[0] if differing else 'base'}", code="start_base_differs"
        )
    if leaked := sorted(set(config.left_out) - set(card.left_out)):
        raise X2DFDError(
            f"start: {folder} was trained on {leaked[0]}, which `left_out` holds out", code="start_knows_left_out"
        )
    state = load_file(folder / WEIGHTS)
    result: Any = set_peft_model_state_dict(tuned, {k: v.float() for k, v in state.items()})
    # All keys of the base are missing, as they should be, but no trained one may be.
    trained = {n for n, p in tuned.named_parameters() if p.requires_grad}
    missing = trained & set(result.missing_keys)
    if config.tower == "lora" and card.tower != "lora":  # the tower's matrices begin at zero
        missing = {n for n in missing if "vision_tower" not in n}
    unmatched = sorted({*result.unexpected_keys, *missing})
    if unmatched:
        raise X2DFDError(
            f"start: {folder} has other matrices than are trained here: {unmatched[0]}", code="start_matrices_differ"
        )


class CachedTower(nn.Module):
    """Replaces a frozen vision tower: `pixel_values` are its cached outputs [n, layers, patches, hidden]."""

    def __init__(self, layers: tuple[int, ...], class_token: bool) -> None:
        super().__init__()
        self.layers, self.class_token = layers, class_token

    def forward(self, pixel_values: Tensor, **_: object) -> object:
        # A class-token row in front, which LLaVA's "default" strategy drops again.
        states = {
            layer: F.pad(pixel_values[:, k], (0, 0, int(self.class_token), 0)) for k, layer in enumerate(self.layers)
        }
        return BaseModelOutputWithPooling(hidden_states=states)  # type: ignore[arg-type]


@torch.no_grad()
def fit_projector(model: Any, patches: Tensor) -> None:
    """Initialise a projector for patches [n, layers, patches, hidden]. Inputs are standardised, as tower outputs have a
    few huge dimensions, and outputs get the scale of the language model's embeddings."""
    projector = model.model.multi_modal_projector
    x = patches.transpose(1, 2).flatten(2).flatten(0, 1)  # [n * patches, layers * hidden]
    mean, std = x.mean(0), x.std(0) + 1e-3
    generator = torch.Generator().manual_seed(0)
    for linear in (projector.linear_1, projector.linear_2):
        linear.weight.normal_(0, linear.in_features**-0.5, generator=generator)
        linear.bias.zero_()
    projector.linear_1.weight /= std
    projector.linear_1.bias -= projector.linear_1.weight @ mean
    out = projector(x[:: max(1, len(x) // 4096)])
    target = model.model.language_model.embed_tokens.weight.square().mean().sqrt()
    projector.linear_2.weight *= target / out.square().mean().sqrt()
