"""A tiny LLaVA with random weights on disk, an adapter for it, and an expert that needs no weights.

They take the road of the big ones in milliseconds. Weights are large enough that wrong code gives other numbers.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from finetune.config import LANGUAGE_LINEARS
from tests.families import VICUNA
from x2dfd import prompts
from x2dfd.adapter import WEIGHTS, AdapterCard, write_adapter_card
from x2dfd.calibration import Calibration, Logistic
from x2dfd.checkpoints import base_identity, load_model
from x2dfd.experts import Shared
from x2dfd.faces import PREPROCESSING
from x2dfd.fetch import require
from x2dfd.files import file_sha256
from x2dfd.manifest import Sample, write_manifest
from x2dfd.types import Card, Cue, Evidence, Face

EXPERT = "brightness"
EXPERT_TARGET = "tests.tiny:Brightness"
"""What `x2dfd.experts.BUILTIN` says of it while a test runs."""


class Brightness:
    """Calls bright faces fake: scores that a test can predict."""

    card: ClassVar[Card] = Card(
        name=EXPERT, version="1", source="a test", licence="Apache-2.0", sha256="b" * 64, preprocessing=PREPROCESSING,
        paper="none", blind_spot="everything but brightness",
    )  # fmt: skip

    def judge(self, faces: Sequence[Face], shared: Shared | None = None) -> list[Evidence]:
        return [Evidence(EXPERT, float(f.crop.mean()) / 255) for f in faces]


class Darkness(Brightness):
    """A second expert: the opposite of what brightness says."""

    card = replace(Brightness.card, name="darkness")

    def judge(self, faces: Sequence[Face], shared: Shared | None = None) -> list[Evidence]:
        return [Evidence("darkness", 1 - float(f.crop.mean()) / 255) for f in faces]


def processor_of_base() -> Any:
    """The embedded base's own processor."""
    from transformers import LlavaProcessor

    return LlavaProcessor.from_pretrained(require("base"))


def processor_of_llava_15() -> Any:
    """A processor that behaves as LLaVA-1.5's: begin token, "▁" for spaces, `USER: … ASSISTANT:`, end token "</s>"."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    words = re.findall(r"\w+", f"USER ASSISTANT {prompts.STEM} real fake {prompts.QUESTION} Yes No The nose Answer")
    alphabet = sorted({chr(c) for c in range(33, 127)} | {"▁", "\n"})
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(words * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"height": 224, "width": 224}, do_center_crop=False), fast, patch_size=16,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, image_token="<image>",
        chat_template=VICUNA,
    )  # fmt: skip


def write_base(
    folder: Path, processor: Any | None = None, *, text_layers: int = 2, tied: bool = True, parrot: bool = False
) -> Path:
    """A LLaVA checkpoint: CLIP with 3 layers, Llama with `text_layers`; a parrot repeats its last token for ever.

    The usual one is made once for all tests and copied.
    """
    if processor is None and text_layers == 2 and tied and not parrot:
        shutil.copytree(_usual_base().name, folder, dirs_exist_ok=True)
        return folder
    return _make_base(folder, processor, text_layers, tied, parrot)


@cache
def _usual_base() -> tempfile.TemporaryDirectory[str]:
    place = tempfile.TemporaryDirectory()  # gone with the process
    _make_base(Path(place.name), None, 2, True, False)
    return place


def _make_base(folder: Path, processor: Any | None, text_layers: int, tied: bool, parrot: bool) -> Path:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    processor = processor or processor_of_base()
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=224, patch_size=16
    )
    tokenizer = processor.tokenizer
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=text_layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, vision_feature_layer=-1, vision_feature_select_strategy="default",
        image_token_index=tokenizer.convert_tokens_to_ids(processor.image_token), tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(7)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                # The MLPs are loud and attention is soft, or the model would repeat one token for ever.
                loud = 12.0 if "down_proj" in name else 0.7 if "o_proj" in name else 1.5
                p.normal_(0, 0.3 if "embed_tokens" in name or "lm_head" in name else loud * p.shape[-1] ** -0.5)
            if parrot and ("o_proj" in name or "down_proj" in name):
                p.zero_()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_adapter(folder: Path, base: Path, experts: Sequence[str] = (EXPERT,)) -> Path:
    """An adapter directory as `python -m finetune` leaves it: random LoRA, the projector, card, calibration."""
    from peft import LoraConfig, get_peft_model

    model, processor = load_model(base)
    targets = LoraConfig(r=4, lora_alpha=8, target_modules=LANGUAGE_LINEARS, modules_to_save=["multi_modal_projector"])
    torch.manual_seed(3)
    tuned = get_peft_model(model, targets)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    tuned.save_pretrained(str(folder))
    card = AdapterCard(
        name="tiny", version="1", source="a test", licence="Apache-2.0", sha256=file_sha256(folder / WEIGHTS),
        preprocessing=PREPROCESSING, paper="X2-DFD, arXiv 2410.06126", blind_spot="everything", weights=WEIGHTS,
        base=base_identity(base), tower_layers=3, feature_layers=(-1,), prompt_sha256=prompts.prompt_hash(processor),
        text_layers=tuple(range(model.config.text_config.num_hidden_layers)),
        experts=dict.fromkeys(experts, Brightness.card.sha256),
    )  # fmt: skip
    write_adapter_card(folder, card)
    weights = dict.fromkeys(("mllm", *experts), 0.1) | {EXPERT: 4.0}
    means = dict.fromkeys(weights, 0.0) | {EXPERT: -0.4}
    fitted_on = {"experts": {name: Brightness.card.sha256 for name in weights if name != "mllm"}}
    Calibration({"part": Logistic(weights, means, bias=0.0)}, low=0.3, high=0.6, fitted_on=fitted_on).save(folder)
    return folder


def write_small_manifest(folder: Path, photo: np.ndarray[Any, Any], count: int = 8) -> Path:
    """`count` pictures of one face, half real, half forged on paper (their cues are only claimed), with splits."""
    folder.mkdir(parents=True, exist_ok=True)
    cues = (Cue("jaw", "blending", 0.9), Cue("eyes", "blur", 0.5), Cue("skin", "colour", 0.1))
    methods = ("swap", "warp", "swap+warp")
    samples = []
    for i in range(count):
        fake = i % 2 == 1
        pixels = np.clip(photo.astype(np.int16) + 8 * (i - count // 2), 0, 255).astype(np.uint8)
        path = folder / f"{i}.png"
        Image.fromarray(pixels[:320, 80:400]).save(path)
        one = Sample(f"s{i}", path, "real", df_class="real", source="generated", group=f"g{i}", split="train")
        if fake:
            one = replace(one, label="fake", method=methods[i // 2 % 3], df_class="FS", cues=cues)
        samples.append(replace(one, split="calib") if i >= count - 2 else one)
    write_manifest(folder / "manifest.jsonl", samples)
    return folder / "manifest.jsonl"


def edit_card(folder: Path, **changes: Any) -> None:
    """Write an adapter's card with other values."""
    from x2dfd.adapter import read_adapter_card

    write_adapter_card(folder, replace(read_adapter_card(folder), **changes))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
