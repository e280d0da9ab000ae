"""Turns a `ModelSpec` into a Detector: language model, experts and calibration, each checked before use."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from x2dfd import prompts
from x2dfd.adapter import (
    EMBEDDED,
    FORENSIC,
    TOWER,
    WHOLE,
    AdapterCard,
    add_tower,
    attach,
    check_adapter,
    check_contents,
    check_probes,
    expert_hashes,
    probe_logits,
    read_adapter_card,
)
from x2dfd.calibration import Calibration
from x2dfd.checkpoints import (
    TORCH_DTYPES,
    base_identity,
    checkpoint_dtype,
    choose_device,
    crop_size_of,
    load_model,
    read_options,
)
from x2dfd.degrade import CODEC
from x2dfd.detector import Detector
from x2dfd.errors import SetupError
from x2dfd.experts import DEFAULT, Expert, load_expert
from x2dfd.fetch import BASE_NAME
from x2dfd.files import file_sha256
from x2dfd.mllm import LanguageModel, LocalMLLM
from x2dfd.model_spec import MAX_THREADS, Bits, Dtype, Mode, ModelSpec
from x2dfd.tower import CLOSER, quick_in_16_bits, ranges_file
from x2dfd.tower_first import tower_decides, tower_first
from x2dfd.types import MLLM, ModelInfo
from x2dfd.validation import Validation

if hasattr(os, "register_at_fork"):  # a forked process has none of its parent's threads: OpenMP would wait for its own
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


def load(
    model: str | Path | ModelSpec = "embedded",
    *,
    mode: Mode | None = None,
    threads: int | None = None,
    experts: Sequence[str] | None = None,
    other_experts: bool = False,
    device: str | None = None,
    dtype: Dtype | None = None,
    device_map: str | None = None,
    bits: Bits | None = None,
    ignore_calibration: bool = False,
) -> Detector:
    """A detector that is ready to use.

    `model` is described in `x2dfd.model_spec`. `mode` is calibrated, the default with an adapter, or paper, the
    language model's own P(fake). `experts` are some of those that the adapter was trained or calibrated with; a report
    warns where one is left out that the calibration gives a weight. mode="paper" takes any, and `other_experts` allows
    other weights. `device` (cpu, cuda, cuda:1 ...) and `dtype` (fp32, bf16, fp16) hold for a local language model (see
    `checkpoints.choose_device`). Experts stay on the CPU. With the embedded model on a CPU, whose MLLM only writes,
    they take its tower's precision: by default bf16 where that is quick, else fp32, and int8 on request. With other
    models they choose it themselves. `device_map` is as in transformers ("auto"), `bits` 4 or 8 (bitsandbytes), and
    `ignore_calibration` with mode="paper" is for fitting another one. Raises SetupError with the remedy.
    """
    spec = ModelSpec.parse(model)
    if threads is not None:
        if not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS:
            raise SetupError(
                f"threads is a whole number from 1 to {MAX_THREADS}, not {threads!r}", code="option_invalid"
            )
        torch.set_num_threads(threads)
    if spec.expert is not None:
        raise SetupError(
            f"{spec} is one expert without a language model; only eval/run_bench.py takes that",
            code="model_not_for_task",
        )
    if spec.url is not None and (device or dtype or device_map or bits):
        raise SetupError(
            "a served model runs on its server: leave out --device, --dtype, --device-map and --bits",
            code="option_not_for_served",
        )
    folder = EMBEDDED if spec.embedded else spec.adapter
    card = read_adapter_card(folder) if folder else None
    mode = mode or ("calibrated" if folder else "paper")
    if mode == "calibrated" and folder is None:
        raise SetupError(
            "a bare model has no calibration: give its adapter directory too, or take mode='paper'",
            code="calibration_missing",
        )
    if ignore_calibration and mode != "paper":
        raise SetupError("ignore_calibration goes with mode='paper'", code="option_invalid")
    calibration = None
    if folder and not ignore_calibration and (mode == "calibrated" or (folder / "calibration.json").is_file()):
        calibration = Calibration.load(folder)
    mllm: LanguageModel
    if spec.url is not None:
        mllm, info = _served(spec, folder, card)
    else:
        mllm, info = _here(spec, folder, card, calibration, mode, device, dtype, device_map, bits)
    chosen_experts = _experts(folder, card, calibration, mode, experts, other_experts)
    info = replace(
        info,
        crops_through=crops_through(chosen_experts, card),
        experts={n: f"{e.card.version} {e.card.sha256}" for n, e in chosen_experts.items()},
        in_prompt=[n for n in chosen_experts if not card or n in card.experts],
        aliases=(card.aliases or None) if card else None,
    )
    validation = Validation.load(folder) if folder else None
    return Detector(mllm, list(chosen_experts.values()), calibration, info, mode, validation)


def _here(
    spec: ModelSpec,
    folder: Path | None,
    card: AdapterCard | None,
    calibration: Calibration | None,
    mode: Mode,
    device: str | None,
    dtype: Dtype | None,
    device_map: str | None,
    bits: Bits | None,
) -> tuple[LanguageModel, ModelInfo]:
    """A model on this machine: the embedded one with its tower alone where that decides the verdict."""
    base = None if spec.base == BASE_NAME else spec.base  # the embedded base by its name: bare, without an adapter
    if folder and card and card.weights == WHOLE:
        base = str(folder / WHOLE)
    target, precision = choose_device(device or ("cpu" if dtype == "int8" else None), dtype, base)
    local = partial(_local, base, folder, card, target)
    embedded_on_cpu = spec.base is None and target.type == "cpu" and not bits and device_map is None
    mllm: LanguageModel
    if folder and card and embedded_on_cpu and tower_decides(card, calibration, mode):
        if dtype is None and quick_in_16_bits("cpu"):
            precision = "bf16"
        load_whole = partial(local, "fp32" if precision == "int8" else precision, None, None)
        mllm, identity, prompt_sha256 = tower_first(folder, card, precision, lambda: load_whole()[0])
    elif precision == "int8":
        raise SetupError(
            "int8 is for calibrated verdicts of the embedded model, or of an adapter like it, on a CPU, without --bits "
            "and --device-map; a large model takes --bits 8",
            code="dtype_unsupported",
        )
    else:
        mllm, identity, prompt_sha256 = local(precision, device_map, bits)
    runs_on = f"{target.type} {precision}" + (f", {bits}-bit weights" if bits else "")
    if folder and precision == "int8":  # other ranges give other scores
        digests = "".join(file_sha256(ranges_file(additions)) for additions in (folder / TOWER, None))
        runs_on += f", ranges {hashlib.sha256(digests.encode()).hexdigest()[:8]}"
    info = replace(_info(card, identity, prompt_sha256), runs_on=runs_on)
    if card is None and isinstance(mllm, LocalMLLM):
        info = replace(info, crop_size=crop_size_of(mllm.processor))
    return mllm, info


def _local(
    base: str | None,
    folder: Path | None,
    card: AdapterCard | None,
    target: torch.device,
    precision: Dtype,
    device_map: str | None,
    bits: Bits | None,
) -> tuple[LocalMLLM, dict[str, str], str]:
    """The MLLM with its adapter, checked, the identity of its base, and the hash of its prompts."""
    with ThreadPoolExecutor(1) as background:
        identity_future = background.submit(base_identity, base)  # most of loading is imports, which keep one core busy
        model, processor = load_model(
            base,
            **read_options(base, target, precision, device_map, bits),
            tower_layers=(card.tower_layers or None) if card else None,
            text_layers=(card.text_layers or None) if card else None,
            feature_layers=(card.feature_layers or None) if card else None,
        )
        identity = identity_future.result()
    tower: str | None = ""
    if folder and card:
        prompts.set_chat_template(processor, card.frame)
        tower = add_tower(model, folder, card)
        check_adapter(folder, card, identity, prompts.prompt_hash(processor, card.score_form))
        model = model if card.weights == WHOLE else attach(model, folder)
    if device_map is None and bits is None:
        model = model.to(target)
        for parameter in model.parameters():  # buffers keep their precision: rotary frequencies suffer from 16 bits
            if parameter.is_floating_point():  # in a quantised checkpoint, not all are
                parameter.data = parameter.data.to(TORCH_DTYPES[precision])
    temperature = card.temperature if card else 0.0
    mllm = LocalMLLM(model, processor, _name(card, identity), temperature=temperature, tower=tower)
    if card and card.probes and not bits:  # four bits move them as far as another projector would
        exact = precision == "fp32" and (base is None or checkpoint_dtype(base) == torch.float32)
        check_probes(card, probe_logits(mllm, card.crop_size), 0.1 if exact else 1.0)
    return mllm, identity, prompts.prompt_hash(processor, card.score_form if card else "numbers")


def _name(card: AdapterCard | None, identity: dict[str, str]) -> str:
    return f"{card.name} {card.version}" if card else identity["name"]


def _served(spec: ModelSpec, folder: Path | None, card: AdapterCard | None) -> tuple[LanguageModel, ModelInfo]:
    from x2dfd.served import ServedMLLM

    if folder and card:
        check_contents(folder, card)
    mllm = ServedMLLM(
        str(spec.url),
        str(spec.name),
        continues=True if card else None,
        closer=card is not None and card.tower == FORENSIC,
        requests_per_minute=spec.requests_per_minute,
    )
    if card and card.probes:  # an engine rounds and resizes otherwise; another model or prompt moves them further
        check_probes(card, probe_logits(mllm, card.crop_size), 1.0)
    identity = card.base if card else {"name": mllm.name, "sha256": ""}
    info = _info(card, identity, card.prompt_sha256 if card else mllm.prompt_sha256)
    # Every endpoint is asked with temperature 0.
    return mllm, replace(info, temperature=0.0, served={"host": mllm.host, "model": str(spec.name)})


def _info(card: AdapterCard | None, base: dict[str, str], prompt_sha256: str) -> ModelInfo:
    if card is None:
        return ModelInfo(base["name"], base, prompt_sha256=prompt_sha256)
    text = card.text_layers
    return ModelInfo(
        name=_name(card, base),
        base=base,
        adapter_sha256=card.sha256,
        # As JSON reads it back: a report has to equal itself after a round trip.
        layers={"tower": card.tower_layers, "text": text if isinstance(text, int) else list(text)},
        prompt_sha256=prompt_sha256,
        crop_size=card.crop_size,
        temperature=card.temperature,
        score_form=card.score_form,
        held_out=list(card.held_out),
        blind_spot=card.blind_spot,
        licence=card.licence,
    )


def crops_through(experts: Collection[str], card: AdapterCard | None = None) -> str:
    """`ModelInfo.crops_through` of experts, by name, beside an adapter: the codec, and what a forensic tower sees."""
    closer = "tower" in experts or (card is not None and card.tower == FORENSIC)
    return f"{CODEC[0]} {CODEC[1]}" + (f"; the tower leaves out {CLOSER} pixels a side" if closer else "")


def _experts(
    folder: Path | None,
    card: AdapterCard | None,
    calibration: Calibration | None,
    mode: Mode,
    requested: Sequence[str] | None,
    allow_other: bool,
) -> dict[str, Expert]:
    """The requested experts, by default those that the adapter was trained and calibrated with, in that order."""
    expected = expert_hashes(card, calibration) if card else {}
    names = list(requested) if requested is not None else list(expected if card else DEFAULT)
    loaded = [load_expert(n, folder / "experts" if folder else None) for n in names]
    differing = [n for n, e in zip(names, loaded, strict=True) if expected.get(n, e.card.sha256) != e.card.sha256]
    if differing and not allow_other:
        raise SetupError(
            f"the adapter was made with other weights of expert {differing[0]!r}. Put back the weights that its "
            "card and calibration name, or fit a calibration to the new ones: x2dfd calibrate --other-experts",
            code="expert_weights_differ",
        )
    unknown = [n for n in names if calibration and n not in calibration.weights]
    if unknown and mode == "calibrated":
        raise SetupError(
            f"the calibration was fitted without {', '.join(unknown)}: take mode='paper', or fit it: x2dfd calibrate",
            code="expert_not_calibrated",
        )
    missing = calibration.missing(names) if calibration and mode == "calibrated" else []
    if calibration and missing and not any(map(calibration.counts, [MLLM, *names])):
        raise SetupError(
            f"the calibration takes the scores of {', '.join(missing)}, and none of them is asked: name some of them "
            "in `experts`, or take mode='paper'",
            code="expert_missing",
        )
    return dict(zip(names, loaded, strict=True))
