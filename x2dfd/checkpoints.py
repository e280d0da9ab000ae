"""Loads an image-text-to-text model and its processor from a directory or a hub name, and checks them.

Models and processors are those of transformers. Processors are put together from parts that need no torchvision, so
that scores do not depend on whether it is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from x2dfd.errors import SetupError, UnknownName, first_line
from x2dfd.faces import CROP_SIZE, LARGEST_CROP
from x2dfd.fetch import BASE_NAME, require
from x2dfd.files import Json, file_sha256
from x2dfd.model_spec import Bits, Dtype
from x2dfd.prompts import Processor

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


@dataclass(frozen=True)
class Family:
    """The particulars of a kind of model."""

    processor: str  # its processor's class, and the module of transformers.models that holds it
    module: str
    shares: bool = True  # the picture's pass does not depend on the question, so that one serves all
    chat: bool = True  # it has a chat template
    first_position: int = 0  # position number of the first token
    needs: tuple[str, ...] = ()  # packages without which transformers has no such processor
    projector: tuple[str, ...] = ("multi_modal_projector",)  # its modules between tower and language model


FAMILIES = {
    "llava": Family("LlavaProcessor", "llava"),
    "llava_next": Family("LlavaNextProcessor", "llava_next"),
    "llava_onevision": Family("LlavaOnevisionProcessor", "llava_onevision"),
    "qwen2_vl": Family("Qwen2VLProcessor", "qwen2_vl", projector=("visual.merger",)),
    "qwen2_5_vl": Family("Qwen2_5_VLProcessor", "qwen2_5_vl", projector=("visual.merger",)),
    "qwen3_vl": Family("Qwen3VLProcessor", "qwen3_vl", projector=("visual.merger", "visual.deepstack_merger_list")),
    "internvl": Family("InternVLProcessor", "internvl"),
    "idefics3": Family("Idefics3Processor", "idefics3", projector=("connector",)),
    "smolvlm": Family("SmolVLMProcessor", "smolvlm", needs=("num2words",), projector=("connector",)),
    "gemma3": Family("Gemma3Processor", "gemma3"),
    # Picture and question are one prefix, whose tokens all see each other.
    "paligemma": Family("PaliGemmaProcessor", "paligemma", shares=False, chat=False, first_position=1),
    "pixtral": Family("PixtralProcessor", "pixtral", needs=("torchvision",)),
    "mistral3": Family("PixtralProcessor", "pixtral", needs=("torchvision",)),
}
"""By `model_type`; a LLaVA with Pixtral's tower is "pixtral"."""

ELSEWHERE = {
    "internvl_chat": "take its conversion for transformers, whose name ends in -hf (OpenGVLab/InternVL3-1B-hf ...)",
    "llava_llama": "take its conversion for transformers (llava-hf/llava-1.5-7b-hf ...)",
    "llava_mistral": "take its conversion for transformers (llava-hf/llava-v1.6-mistral-7b-hf ...)",
    "llava_qwen": "take its conversion for transformers (llava-hf/llava-onevision-qwen2-7b-ov-hf ...)",
}
"""Advice for layouts that transformers does not have."""


def family_of(config: Any) -> Family:
    """The family of a model's configuration: an object, or the contents of config.json. Raises SetupError."""
    settings: Json = config if isinstance(config, dict) else config.to_dict()
    kind = str(settings.get("model_type"))
    if kind == "llava" and (settings.get("vision_config") or {}).get("model_type") == "pixtral":
        kind = "pixtral"
    if kind not in FAMILIES:
        instead = ELSEWHERE.get(kind, f"give one of {', '.join(sorted(FAMILIES))}, or serve it (docs/served.md)")
        raise SetupError(f"a {kind!r} model cannot be loaded here: {instead}", code="model_unsupported")
    return FAMILIES[kind]


def load_processor(folder: str | Path) -> Processor:
    """A model's own processor, from a directory or a hub name, with its chat template.

    Its image processor computes with Pillow, and it has none for videos. Raises SetupError, with what to install, for a
    missing package, and for a model of no known family or without a chat template.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    try:
        family = family_of(AutoConfig.from_pretrained(folder))
        stock = processor_class(family)
        with quietly():
            parts = [AutoImageProcessor.from_pretrained(folder, backend="pil"), AutoTokenizer.from_pretrained(folder)]
            processor = put_together(stock, parts, stock.get_processor_dict(folder)[0])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SetupError(
            f"the processor of {folder} cannot be read: {first_line(error)}", code="processor_unreadable"
        ) from error
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    if family.chat and not processor.chat_template:
        raise SetupError(
            f"{folder} has no chat template: take the variant that was tuned for chat (-it, -Instruct)",
            code="chat_template_missing",
        )
    return processor


def crop_size_of(processor: Processor) -> int:
    """Side of a model's face crops: its image processor's own, or the largest; between CROP_SIZE and LARGEST_CROP."""
    size = processor.image_processor.crop_size or processor.image_processor.size
    side: int = size.get("height") or LARGEST_CROP
    return min(max(side, CROP_SIZE), LARGEST_CROP)


def put_together(stock: Any, parts: Sequence[Any], settings: Json) -> Processor:
    """A processor, of a class from `processor_class`, made of its image processor and its tokenizer."""
    videos = [None] if "video_processor" in inspect.signature(stock).parameters else []
    processor: Processor = stock.from_args_and_dict([*parts, *videos], settings)
    return processor


def processor_class(family: Family) -> Any:
    """The stock class, without its video processor, which needs torchvision."""
    try:
        stock: Any = getattr(
            importlib.import_module(f"transformers.models.{family.module}.processing_{family.module}"), family.processor
        )
        for package in family.needs:
            importlib.import_module(package)
    except (ImportError, RuntimeError) as error:  # torchvision for another build of torch raises RuntimeError
        package = " ".join(family.needs) or str(getattr(error, "name", "another version of torchvision"))
        raise SetupError(
            f"{family.processor} of transformers needs {package}, made for this torch: pip install {package}",
            code="package_missing",
        ) from error
    from transformers import ProcessorMixin

    names = ["image_processor", "tokenizer"]
    if stock.get_attributes() == names:
        return stock
    # SmolVLM's own apply_chat_template asks its processor of videos, whatever the conversation shows.
    plain = {"get_attributes": classmethod(lambda _: names), "apply_chat_template": ProcessorMixin.apply_chat_template}
    return type(stock.__name__, (stock,), {**plain, "__module__": __name__})


def load_model(
    base: str | Path | None = None,
    *,
    tower_layers: int | None = None,
    text_layers: int | Sequence[int] | None = None,
    feature_layers: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[Any, Processor]:
    """An image-text-to-text model and its processor: the embedded base (None), a directory, or a hub name.

    Of a LLaVA only the first `tower_layers` and `text_layers` layers are kept (or just the language layers of a list),
    and the tower's outputs after `feature_layers` are joined as the projector's input. The embedded base's projector is
    random (seed 0) until an adapter brings one. `dtype`: by default the checkpoint's own, fp32 for the embedded base.
    `options`: of `from_pretrained`. Raises SetupError when the model cannot be read, is of no known family, or when
    anything is missing, left over or of another shape.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder = require("base") if base is None else base
    family_of(_config_dict(folder))
    try:
        config: Any = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise SetupError(
            f"{folder} cannot be loaded; give a directory or a hub name: {first_line(error)}", code="model_unreadable"
        ) from error
    text_numbers = cut_layers(config, folder, tower_layers, text_layers, feature_layers)
    try:
        with quietly(), torch.random.fork_rng():  # dropped layers are expected; others are checked below
            torch.manual_seed(0)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                folder,
                config=config,
                dtype=dtype or (torch.float32 if base is None else checkpoint_dtype(folder)),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise SetupError(f"{folder} cannot be loaded: {first_line(error)}", code="model_unreadable") from error
    model, info = loaded
    if any(p.is_meta for p in model.parameters()):
        raise SetupError(
            f"{folder} does not fit into the memory of its devices: take bits=4, more devices, or a smaller model",
            code="model_too_large",
        )
    processor = load_processor(folder)
    # The embedded base has no projector.
    misfits = {k for k in info["missing_keys"] if base is not None or "multi_modal_projector" not in k}
    misfits |= {k for k in info["unexpected_keys"] if not _is_dropped(k, config)}
    misfits |= {str(k[0]) for k in info["mismatched_keys"]}
    if misfits:
        raise SetupError(
            f"{folder} does not fit its configuration: {', '.join(sorted(misfits)[:4])} ({len(misfits)} in all)",
            code="model_does_not_fit",
        )
    if text_numbers is not None:
        _keep_text_layers(model, text_numbers)
    return model, processor


def checkpoint_dtype(base: str | Path) -> torch.dtype:
    """The precision of a checkpoint's weights as its configuration states it; fp32 where it states none."""
    config = _config_dict(base)
    for section in (config, config.get("text_config") or {}):
        if (name := section.get("dtype") or section.get("torch_dtype")) is not None:
            dtype = getattr(torch, str(name).removeprefix("torch."), None)
            return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
    return torch.float32


def _config_dict(folder: str | Path) -> Json:
    """The contents of a model's config.json. Raises SetupError."""
    from transformers import PreTrainedConfig

    try:
        config: Json = PreTrainedConfig.get_config_dict(folder)[0]
        if "model_type" not in config:
            raise OSError(f"{folder} has no config.json that names a model type")
    except (OSError, ValueError) as error:
        raise SetupError(
            f"{folder} cannot be loaded; give a directory or a hub name: {first_line(error)}", code="model_unreadable"
        ) from error
    return config


def cut_layers(
    config: Any,
    folder: str | Path,
    tower_layers: int | None,
    text_layers: int | Sequence[int] | None,
    feature_layers: Sequence[int] | None,
) -> list[int] | None:
    """Write the cuts into a configuration; returns the language layers that are kept by their numbers.

    Raises SetupError for layers that do not exist, and for any cut of another family than LLaVA.
    """
    if config.model_type != "llava":
        if tower_layers is None and text_layers is None and feature_layers is None:
            return None
        raise SetupError(
            f"only a LLaVA can be loaded with some of its layers, and {folder} is a {config.model_type!r} model",
            code="layers_unsupported",
        )
    if tower_layers is not None:
        config.vision_config.num_hidden_layers = tower_layers
    numbers = None if text_layers is None or isinstance(text_layers, int) else [int(k) for k in text_layers]
    valid = range(config.text_config.num_hidden_layers)
    if numbers is not None and (not numbers or len(set(numbers)) < len(numbers) or not set(numbers) <= set(valid)):
        raise SetupError(
            f"text layers {numbers}: the model has {len(valid)}, and each may be named once", code="text_layers_invalid"
        )
    if isinstance(text_layers, int):
        config.text_config.num_hidden_layers = text_layers
        if getattr(config.text_config, "layer_types", None):
            config.text_config.layer_types = config.text_config.layer_types[:text_layers]
    if feature_layers is not None:
        config.vision_feature_layer = list(feature_layers)
    layers = config.vision_feature_layer
    tower = int(config.vision_config.num_hidden_layers)
    if any(not -tower <= layer <= tower for layer in ([layers] if isinstance(layers, int) else layers)):
        raise SetupError(f"feature layers {layers}: the tower has {tower} layers", code="feature_layers_invalid")
    return numbers


def _keep_text_layers(model: Any, numbers: Sequence[int]) -> None:
    """Leave only the language layers of the given numbers, in that order."""
    text = model.model.language_model
    text.layers = torch.nn.ModuleList([text.layers[k] for k in numbers])
    for position, layer in enumerate(text.layers):
        layer.self_attn.layer_idx = position  # the index of its keys and values in the cache
    for config in (text.config, model.config.text_config):
        if len(getattr(config, "layer_types", None) or ()) > len(numbers):
            config.layer_types = [config.layer_types[k] for k in numbers]
        config.num_hidden_layers = len(numbers)


def _is_dropped(key: str, config: Any) -> bool:
    """Whether the key belongs to a layer that the configuration leaves out."""
    if config.model_type != "llava":
        return False
    for part, part_config in (("vision_tower", config.vision_config), ("language_model", config.text_config)):
        if part in key and ".layers." in key:
            return int(key.split(".layers.")[1].split(".")[0]) >= int(part_config.num_hidden_layers)
    return False


def read_options(
    base: str | Path | None, target: torch.device, precision: Dtype, device_map: str | None, bits: Bits | None
) -> Json:
    """Options of `load_model` that read a base in the precision it will compute in: a 7B in fp32 takes 28 GB.

    The embedded base is read in fp32: it is small, and its sum with an adapter is rounded once. `device_map`: as in
    transformers ("auto" spreads a model over all GPUs). Raises SetupError.
    """
    if base is None:
        if device_map or bits:
            raise SetupError(
                "the embedded model is small: it takes no bits and no device map", code="option_not_for_embedded"
            )
        return {}
    options: Json = {"dtype": TORCH_DTYPES[precision]}
    if device_map:
        options["device_map"] = device_map
    if bits:
        options["quantization_config"] = in_bits(base, bits, TORCH_DTYPES[precision])
        options.setdefault("device_map", {"": str(target)})
    return options


def in_bits(base: str | Path, bits: Bits, compute: torch.dtype) -> Any:
    """The `quantization_config` that reads a base's language layers in 4 (NF4) or 8 bits.

    Tower, projector and head are too few to be worth it. Raises SetupError for other bits, or without bitsandbytes.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

    if bits not in get_args(Bits):
        raise SetupError(f"weights are read in 4 or 8 bits, not in {bits}", code="bits_unsupported")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SetupError(f"weights in {bits} bits need bitsandbytes: pip install bitsandbytes", code="package_missing")
    with torch.device("meta"):
        skeleton: Any = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(base))
    text = next(name for name, module in skeleton.named_modules() if module is skeleton.get_decoder())
    skipped = [n for n, _ in skeleton.named_children() if n != "model"]
    skipped += [f"model.{n}" for n, _ in skeleton.model.named_children() if f"model.{n}" != text]
    return BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=skipped,
    )


def choose_device(
    device: str | None, dtype: Dtype | None, base: str | Path | None = None
) -> tuple[torch.device, Dtype]:
    """Device and precision: by default CUDA in bf16, else the CPU in fp32, or in bf16 for a `base` in 16 bits.

    Raises SetupError for a missing device, a precision that it does not have or an unreadable base, and UnknownName.
    """
    if dtype is not None and dtype not in get_args(Dtype):
        raise UnknownName("dtype", dtype, get_args(Dtype))
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise SetupError(
            f"{device!r} is not a device; give cpu, cuda or, for the second GPU, cuda:1", code="device_unknown"
        ) from error
    if target.type == "cuda" and (not torch.cuda.is_available() or (target.index or 0) >= torch.cuda.device_count()):
        raise SetupError(
            f"there is no {target} here (torch {torch.__version__}); take --device cpu", code="device_missing"
        )
    if target.type not in ("cpu", "cuda"):
        raise SetupError(f"{target.type} is not supported; take cpu or cuda", code="device_unsupported")
    if target.type == "cpu" and dtype == "fp16":
        raise SetupError("fp16 needs a CUDA device; take fp32, or bf16", code="dtype_unsupported")
    if dtype is not None:
        return target, dtype
    if target.type == "cuda":
        return target, "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return target, "bf16" if base is not None and checkpoint_dtype(base) != torch.float32 else "fp32"


@contextmanager
def quietly() -> Iterator[None]:
    """Silence the progress bar and the loading report of transformers within the block."""
    from transformers.utils import logging

    level, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if progress:
            logging.enable_progress_bar()


def base_identity(base: str | Path | None) -> dict[str, str]:
    """Name and SHA-256 of a base model's weights; the hash is "" for a hub name (its revision stands for it)."""
    if base is None:
        return {"name": BASE_NAME, "sha256": file_sha256(require("base") / "model.safetensors")}
    files = sorted(Path(base).glob("*.safetensors")) if Path(base).is_dir() else []
    if not files:
        return {"name": str(base), "sha256": ""}
    digests = b"".join(bytes.fromhex(file_sha256(file)) for file in files)
    return {"name": Path(base).name, "sha256": hashlib.sha256(digests).hexdigest()}
