"""Adapter directories: plain PEFT directories with a card and a calibration, checked before use.

- `adapter_config.json`, `adapter_model.safetensors`: PEFT's own files, LoRA on the language model, and the projector
- or `model/`, where every weight was trained: a model directory of its own
- `card.json`: its data, base, prompts and experts; see AdapterCard
- `calibration.json`: x2dfd.calibration
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from x2dfd.calibration import Calibration
from x2dfd.errors import SetupError, first_line
from x2dfd.faces import CROP_SIZE, preprocessing
from x2dfd.files import Json, file_sha256, parse_json, write_text
from x2dfd.prompts import QUESTION
from x2dfd.types import Card

if TYPE_CHECKING:
    from torch import Tensor

    from x2dfd.mllm import LanguageModel

EMBEDDED = Path(__file__).parent / "weights" / "embedded"
"""The committed adapter of the embedded model."""

WEIGHTS = "adapter_model.safetensors"
WHOLE = "model"
"""The entry `weights` of a card whose folder holds no adapter but a whole model, in a subfolder of this name."""

FORENSIC, TOWER = "forensic", "experts/tower.safetensors"
"""A card's name for a tower with the additions of the expert `tower`, and the path of these below its folder."""
PEFT_PREFIX = "base_model.model."
"""PEFT's prefix of every tensor's name."""

PROBES = 3  # pictures whose scores a card keeps


@dataclass(frozen=True)
class AdapterCard(Card):
    """A card that also names the base, prompts and data that an adapter belongs to."""

    base: dict[str, str] = field(default_factory=dict)  # name and sha256 of the base model's weights
    tower_layers: int = 0  # number of vision layers kept
    text_layers: int | tuple[int, ...] = 0  # language layers kept: the number of the first ones, or a list
    feature_layers: tuple[int, ...] = ()  # tower outputs joined as the projector's input
    crop_size: int = CROP_SIZE  # side of the face crops that it was trained on
    frame: str | None = None  # chat template of x2dfd.prompts; None is the base's own
    prompt_sha256: str = ""  # x2dfd.prompts.prompt_hash at training
    score_form: str = "numbers"  # how its questions give scores, of x2dfd.prompts.SCORE_FORMS
    temperature: float = 0.0  # of its texts: 0 takes the likeliest word, else it is sampled, with a seed from the face
    experts: dict[str, str] = field(default_factory=dict)  # name -> SHA-256 of weights, in the order of the prompt
    aliases: dict[str, str] = field(default_factory=dict)  # name -> its other name in the prompt
    data_sha256: str = ""  # of the instruction set
    probes: tuple[float, ...] = ()  # logit of fake against real of each probe picture; loading has to give the same
    left_out: tuple[str, ...] = ()  # sources and generators of which it was trained on no picture
    tower: str = "frozen"  # norms or lora: its training changed the vision tower, which then fits no expert;
    # forensic: the tower carries the additions of its expert `tower` (external_detectors.train.tower)
    tower_sha256: str = ""  # of a forensic tower's additions (x2dfd.tower.additions_sha256)
    assessment_sha256: str = ""  # of its assessment.json, whose strong cues it was taught to explain
    held_out: tuple[str, ...] = ()  # held-out forge methods, which the instruction set leaves out


def read_adapter_card(folder: Path) -> AdapterCard:
    """Read `card.json`. Raises SetupError when `folder` is no adapter directory."""
    try:
        card = AdapterCard.from_dict(parse_json((folder / "card.json").read_bytes()))
        _check_ranges(card)
    except FileNotFoundError:
        raise SetupError(
            f"{folder} is not an adapter directory of x2dfd: it holds no card.json. A model is `embedded`, DIR, "
            "`hub:NAME` or `NAME@http://HOST/v1`",
            code="not_an_adapter",
        ) from None
    except (OSError, ValueError) as error:  # not JSON, or not a card
        raise SetupError(
            f"{folder} is not an adapter directory of x2dfd: card.json: {error}", code="not_an_adapter"
        ) from error
    return card


def _check_ranges(card: AdapterCard) -> None:
    """Raises ValueError for values that no training writes."""
    if not card.name.strip():
        raise ValueError("'name' is empty")
    if card.temperature < 0:
        raise ValueError(f"'temperature' is {card.temperature}, which is below 0")
    if card.crop_size < 1:
        raise ValueError(f"'crop_size' is {card.crop_size}, not a number of pixels")
    numbers = (card.text_layers,) if isinstance(card.text_layers, int) else card.text_layers
    for field_name, values in (("tower_layers", (card.tower_layers,)), ("text_layers", numbers)):
        if min(values, default=0) < 0:
            raise ValueError(f"{field_name!r} is {min(values)}, which is below 0")
    if card.tower == FORENSIC and card.tower_layers == 0:
        raise ValueError("'tower_layers' is 0, but the forensic tower runs by their number")


def write_adapter_card(folder: Path, card: AdapterCard) -> None:
    write_text(folder / "card.json", json.dumps(asdict(card), indent=1, ensure_ascii=False) + "\n")


def lora_b_sum(folder: Path) -> float:
    """Sum of |lora_B| over all layers. Zero means that nothing was trained, or that saving lost it."""
    return float(sum(v.float().abs().sum() for k, v in _read_weights(folder / WEIGHTS).items() if "lora_B" in k))


def check_tensors(state: Mapping[str, Tensor], where: Path) -> None:
    """Raises SetupError for an adapter's tensors that are empty or not finite, or if every lora_B is zero."""
    empty = [k for k, v in state.items() if v.numel() == 0]
    if empty:
        raise SetupError(
            f"{where}: {len(empty)} tensors are empty ({empty[0]}): saved in pieces by ZeRO-3; gather them first "
            "(zero_to_fp32.py beside the checkpoint), or save with stage3_gather_16bit_weights_on_model_save",
            code="adapter_in_pieces",
        )
    infinite = [k for k, v in state.items() if not v.isfinite().all()]
    if infinite:
        raise SetupError(
            f"{where}: {len(infinite)} tensors hold numbers that are not finite ({infinite[0]}); train it again",
            code="weights_not_finite",
        )
    if not any(bool(v.any()) for k, v in state.items() if "lora_B" in k):
        raise SetupError(
            f"{where}: every lora_B is zero, so the adapter does nothing; train or save it again: python -m finetune",
            code="lora_b_zero",
        )


def check_adapter(folder: Path, card: AdapterCard, base: dict[str, str], prompt_sha256: str) -> None:
    """Raises SetupError for an adapter of another base or of other prompts, and as `check_contents`.

    A whole model is its own base.
    """
    check_contents(folder, card)
    made_for = {"name": "an unnamed base", "sha256": ""} | card.base
    # A base without a hash (a hub name) is known by its name.
    if made_for["sha256"] != base["sha256"] or (not base["sha256"] and made_for["name"] != base["name"]):
        raise SetupError(
            f"the adapter was trained on {made_for['name']} ({made_for['sha256'][:12] or 'no hash'}), "
            f"the base here is {base['name']} ({base['sha256'][:12] or 'no hash'}). "
            "Get the right base: x2dfd fetch base --force",
            code="base_differs",
        )
    if card.prompt_sha256 != prompt_sha256:
        raise SetupError(
            f"the adapter was trained with other prompts ({card.prompt_sha256[:12]}) than this version asks "
            f"({prompt_sha256[:12]}). Install the version that made it, or train it again: python -m finetune",
            code="prompt_hash_differs",
        )


def check_contents(folder: Path, card: AdapterCard) -> None:
    """The part of `check_adapter` that needs no base model: weight file, crops, configuration, and `check_tensors`."""
    weights = folder / WEIGHTS
    if card.weights != WHOLE and not weights.is_file():
        raise SetupError(
            f"{folder} has no {WEIGHTS}; copy the whole directory, or train it: python -m finetune",
            code="weights_missing",
        )
    if card.weights != WHOLE and file_sha256(weights) != card.sha256:
        raise SetupError(
            f"{weights} is not the file that its card names (SHA-256 differs); copy the directory again",
            code="weights_hash_differs",
        )
    if card.preprocessing != (current := preprocessing(card.crop_size)):
        raise SetupError(
            f"the adapter was trained on other crops ({card.preprocessing}) than this version makes ({current}). "
            "Install the version that made it, or train it again: python -m finetune",
            code="crops_differ",
        )
    if card.weights != WHOLE:
        _adapter_config(folder)
        check_tensors(_read_weights(weights), weights)


def expert_hashes(card: AdapterCard, calibration: Calibration | None) -> dict[str, str]:
    """Name -> SHA-256 of the expert weights that an adapter directory goes with, the prompt's experts first.

    They are those of its calibration, which may be newer or more than those of its training.
    """
    fitted: dict[str, str] = calibration.fitted_on.get("experts", {}) if calibration else {}
    return card.experts | fitted


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file. Raises SetupError when it is broken."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise SetupError(
            f"{path} cannot be read: {error}; copy the directory again", code="weights_unreadable"
        ) from error


PEFT_ERRORS = (TypeError, ValueError, KeyError, AttributeError, AssertionError, NotImplementedError)
"""Raised by PEFT for a configuration that makes no sense to it, as it hardly checks what it reads."""


def attach(model: Any, folder: Path) -> Any:
    """The base model with the adapter merged into its weights, or beside them if they are quantised.

    Merged, as one matrix product is quicker than three. Raises SetupError as `check_fit`, and where PEFT fails.
    """
    saved = check_fit(model, folder)
    quantised = bool(getattr(model, "is_quantized", False))
    if not quantised and _merge_plain(model, folder, saved):
        return model
    # bitsandbytes warns on import, through peft, of a kernel that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about a property that PEFT reads
        try:
            tuned: Any = PeftModel.from_pretrained(model, str(folder))
            return tuned.base_model.model if quantised else tuned.merge_and_unload()
        except PEFT_ERRORS as error:
            raise _config_error(folder, f"PEFT says {type(error).__name__}: {first_line(error)}") from error


def check_fit(model: Any, folder: Path) -> dict[str, Tensor]:
    """Refuse an adapter that lacks layers or modules of its configuration, or whose matrices fit no layer of the base.

    PEFT at most warns of either. Returns the adapter's tensors. Raises SetupError with the names.
    """
    config = _adapter_config(folder)
    saved = _read_weights(folder / WEIGHTS)
    names = {key.removeprefix(PEFT_PREFIX) for key in saved}
    layers = {n.rpartition(".lora_")[0]: n for n in names if ".lora_" in n}
    unpaired = [n for n in names if ".lora_A." in n and n.replace(".lora_A.", ".lora_B.") not in names]
    modules = dict(model.named_modules())
    if unknown := sorted(n for layer, n in layers.items() if layer not in modules):
        llavas = unknown[0].startswith("model.layers.")
        mend = "LLaVA's own names; convert it: python -m finetune convert" if llavas else "names of another base"
        raise SetupError(
            f"{folder / WEIGHTS} holds {len(unknown)} matrices that this base does not have ({unknown[0]}): {mend}",
            code="adapter_does_not_fit",
        )
    missing = {n.replace(".lora_A.", ".lora_B.") for n in unpaired}
    if not config.get("layers_to_transform") and not config.get("exclude_modules"):
        missing |= {n for n in _targets(config, modules) if n not in layers}
    for module in config.get("modules_to_save") or ():
        inside = {n for n in modules if n == module or n.endswith(f".{module}")}
        missing |= {f"{n}.{k}" for n in inside for k, _ in modules[n].named_parameters()} - names
    if missing:
        raise SetupError(
            f"{folder / WEIGHTS} lacks {len(missing)} of the parts that its configuration names "
            f"({sorted(missing)[0]}); copy the directory again, or save the adapter again",
            code="adapter_incomplete",
        )
    return saved


def _targets(config: Json, modules: Json) -> list[str]:
    """The linear layers that an adapter's `target_modules` name: an expression, or ends of names (PEFT's rule)."""
    targets = config.get("target_modules") or []
    if targets == "all-linear":
        return []
    linear = [n for n, m in modules.items() if getattr(getattr(m, "weight", None), "ndim", 0) == 2]
    if isinstance(targets, str):
        return [n for n in linear if re.fullmatch(targets, n)]
    return [n for n in linear if any(n == t or n.endswith(f".{t}") for t in targets)]


def _adapter_config(folder: Path) -> Json:
    try:
        config: Json = parse_json((folder / "adapter_config.json").read_bytes())
        config.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise SetupError(
            f"{folder} is not an adapter directory: adapter_config.json: {error}", code="not_an_adapter"
        ) from error
    if (fault := _fault_of(config)) is not None:
        raise _config_error(folder, fault)
    return config


_SETTING_TYPES = {
    "alpha_pattern": (dict, NoneType), "bias": (str, NoneType), "exclude_modules": (list, str, NoneType),
    "init_lora_weights": (bool, str, NoneType), "layers_pattern": (list, str, NoneType),
    "layers_to_transform": (list, int, NoneType), "rank_pattern": (dict, NoneType), "use_dora": (bool, NoneType),
    "use_rslora": (bool, NoneType),
}  # fmt: skip
"""Settings of an adapter that only PEFT reads, and hardly checks."""


def _fault_of(config: Json) -> str | None:
    """What is wrong with the settings of an adapter, as far as their types and ranges tell; PEFT judges the rest."""
    targets, modules = config.get("target_modules"), config.get("modules_to_save")
    if config.get("peft_type") != "LORA":
        return f"its peft_type is {config.get('peft_type')!r}, not 'LORA'"
    if type(config.get("r")) is not int or config["r"] < 1:
        return f"its r is {config.get('r')!r}, not a whole number from 1"
    if type(config.get("lora_alpha")) not in (int, float) or not config["lora_alpha"] > 0:
        return f"its lora_alpha is {config.get('lora_alpha')!r}, not a number above 0"
    for key, types in _SETTING_TYPES.items():
        if not isinstance(value := config.get(key), types):
            return f"its {key} is {value!r:.60}"
    if not (modules is None or _are_names(modules)):
        return "its modules_to_save is not a list of names"
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except (re.error, OverflowError, RecursionError) as error:
            return f"its target_modules is not a regular expression ({error})"
    elif not (targets is None or _are_names(targets)):
        return "its target_modules is neither an expression nor a list of names"
    return None


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _config_error(folder: Path, fault: str) -> SetupError:
    return SetupError(
        f"{folder / 'adapter_config.json'} cannot be used: {fault}; copy the directory again, or save the adapter "
        "again",
        code="adapter_config_invalid",
    )


def add_tower(llava: Any, folder: Path, card: AdapterCard) -> str | None:
    """Make a LLaVA's vision tower the forensic one, if the card names it.

    Returns `LocalEncoding.tower` for this adapter. Raises SetupError when they are not those of the card.
    """
    from x2dfd.tower import add_to_tower, look_closer

    if card.tower != FORENSIC:
        return "" if card.tower == "frozen" else None
    if card.weights == WHOLE:  # it was written with the additions in its tower
        look_closer(llava.model.vision_tower)
    else:
        add_to_tower(llava.model.vision_tower, checked_additions(folder, card))
    return card.tower_sha256


def checked_additions(folder: Path, card: AdapterCard) -> dict[str, Tensor]:
    """The tower's additions beside an adapter. Raises SetupError when they are not those of its card."""
    from x2dfd.tower import additions_sha256, read_additions

    additions = read_additions(folder / TOWER)
    if additions_sha256(additions) != card.tower_sha256:
        raise SetupError(
            f"{folder / TOWER} is not the tower that {card.name} was trained on; copy the whole directory again",
            code="tower_hash_differs",
        )
    return additions


_IGNORED_KEYS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_alpha", "lora_dropout", "megatron_core",
    "modules_to_save", "peft_version", "qalora_group_size", "r", "revision", "target_modules", "task_type",
}  # fmt: skip
"""Keys of an adapter's configuration that do not change how it is merged."""


def _merge_plain(model: Any, folder: Path, saved: Mapping[str, Tensor]) -> bool:
    """Merge a plain LoRA and the modules saved with it without PEFT, whose import takes longer than a verdict.

    Returns False, with the model unchanged, for all else: DoRA, ranks by pattern, other key names, a quantised base.
    """
    from x2dfd.tower import LORA_A, LORA_B, add_to_parameters

    config = _adapter_config(folder)
    settings = {key: value for key, value in config.items() if value and key not in _IGNORED_KEYS}
    if settings != {"peft_type": "LORA", "bias": "none", "init_lora_weights": True}:
        return False
    parameters = dict(model.named_parameters())
    scale = config["lora_alpha"] / config["r"]  # PEFT's rule: W + alpha / r · B A
    additions = {key.removeprefix(PEFT_PREFIX): value for key, value in saved.items()}
    additions |= {name: value.float() * scale for name, value in additions.items() if name.endswith(LORA_B)}

    def fits(name: str, value: Tensor) -> bool:
        if name.endswith(LORA_B):
            return name.replace(LORA_B, LORA_A) in additions
        shape = tuple(value.shape)
        if name.endswith(LORA_A):
            up = additions.get(name.replace(LORA_A, LORA_B))
            if up is None or shape[0] != config["r"]:
                return False
            name, shape = name.replace(LORA_A, ".weight"), (up.shape[0], shape[1])
        weight = parameters.get(name)
        return weight is not None and weight.is_floating_point() and tuple(weight.shape) == shape

    if not all(fits(name, value) for name, value in additions.items()):
        return False
    add_to_parameters(parameters, 0, additions)
    return True


def probe_crops(side: int = CROP_SIZE) -> NDArray[np.uint8]:
    """The pictures that every adapter scores when it is made and when it is loaded: [PROBES, side, side, 3].

    Integer arithmetic makes them the same everywhere, and no picture of a person travels with a card.
    """
    k, y, x = np.ogrid[:PROBES, :side, :side]
    waves = [(x * (c + k + 1) // 3 + y * (3 - c) // 2 + x * y * k // 96 + 40 * c) % 256 for c in range(3)]
    return np.stack(waves, -1).astype(np.uint8)


def probe_logits(mllm: LanguageModel, side: int = CROP_SIZE) -> tuple[float, ...]:
    """Logit of fake against real for each probe picture, without experts. `side`: the card's `crop_size`."""
    logits = mllm.verdict_logits(mllm.encode(probe_crops(side)), [QUESTION] * PROBES)
    return tuple(round(float(v), 4) for v in logits)


def check_probes(card: AdapterCard, logits: Sequence[float], tolerance: float = 0.1) -> None:
    """Raises SetupError if the probes' logits are further than `tolerance` from those on the card, if it has any.

    16 bits move them by hundredths; another base, projector or prompt moves them by whole numbers.
    """
    if not all(abs(a - b) <= tolerance for a, b in zip(card.probes, logits, strict=bool(card.probes))):
        here, then = (", ".join(f"{v:+.2f}" for v in values) for values in (logits, card.probes))
        raise SetupError(
            f"the probe pictures score {here} here, and {then} when {card.name} was made: "
            "base, adapter or library differ. Install the versions that made it, or train it again: python -m finetune",
            code="probes_differ",
        )
