"""Tiny checkpoints with random weights of every family, made with transformers' own classes, in their hub layout.

Chat templates are written for the tests in the shape of the published ones: the same roles, line breaks, begin tokens
and places of the picture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from x2dfd import prompts
from x2dfd.loading import FAMILIES, processor_class, put_together

_PARTS = (
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}PICTURE{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}SYSTEM{% endif %}"
    "<|im_start|>{{ m['role'] }}\n" + _PARTS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST]" + _PARTS + "[/INST]"
    "{% elif m['role'] == 'system' %}[SYSTEM_PROMPT]" + _PARTS + "[/SYSTEM_PROMPT]"
    "{% else %}" + _PARTS + "{{ eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SMOL = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    + _PARTS.replace("PICTURE", "<image>")
    + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    + _PARTS.replace("PICTURE", "<start_of_image>").replace("p['text']", "p['text'] | trim")
    + "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TODAY = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '[SYSTEM_PROMPT]Today is ' + strftime_now('%Y-%m-%d %H:%M:%S') + '.[/SYSTEM_PROMPT]' }}{% endif %}"
)

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SIGLIP = {**TOWER, "image_size": 56, "patch_size": 14}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def tokenizer(
    specials: Sequence[str],
    *,
    bos: str | None = None,
    eos: str = "</s>",
    adds_bos: bool = True,
    named: dict[str, str] | None = None,
) -> Any:
    """A byte-level tokenizer with whole words for what is asked; `named`: special tokens that have an attribute."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    words = re.findall(r" ?\w+", f"{prompts.STEM} real fake {prompts.QUESTION} Yes No {prompts.CUE_ENDING} The nose")
    begin = [bos] if bos else []
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(dict.fromkeys(["<pad>", eos, *begin, *specials, *(named or {}).values()])),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator([w for w in words for _ in range(9)], trainer)
    if bos and adds_bos:
        found.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, found.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=found,
        bos_token=bos,
        eos_token=eos,
        pad_token="<pad>",
        extra_special_tokens=named or {},
    )


def _processor(kind: str, *parts: Any, template: str | None, **settings: Any) -> Any:
    return put_together(processor_class(FAMILIES[kind]), parts, {"chat_template": template, **settings})


def _ids(processor: Any, *tokens: str) -> list[int]:
    return [processor.tokenizer.convert_tokens_to_ids(t) for t in tokens]


def _text(processor: Any, **more: Any) -> dict[str, Any]:
    fast = processor.tokenizer
    return {
        **TEXT,
        "vocab_size": len(fast),
        "bos_token_id": fast.bos_token_id,
        "eos_token_id": fast.eos_token_id,
        "pad_token_id": fast.pad_token_id,
        "tie_word_embeddings": False,
        **more,
    }


def plain_processor(template: str) -> Any:
    """A processor that renders a chat template; `<image>` is its picture."""
    from transformers import CLIPImageProcessorPil

    return _processor("llava", CLIPImageProcessorPil(), tokenizer(["<image>"], bos="<s>"), template=template)


def _llava() -> tuple[Any, Any]:
    from transformers import CLIPImageProcessorPil, LlavaConfig

    processor = _processor(
        "llava",
        CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
        tokenizer(["<image>"], bos="<s>"),
        template=VICUNA,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    [image] = _ids(processor, "<image>")
    return processor, LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **TOWER, "image_size": 64, "patch_size": 16},
        text_config={"model_type": "llama", **_text(processor)},
        image_token_index=image,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )


def _llava_next() -> tuple[Any, Any]:
    from transformers import LlavaNextConfig, LlavaNextImageProcessorPil

    grid = [[64, 128], [128, 64], [128, 128]]
    processor = _processor(
        "llava_next",
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_grid_pinpoints=grid
        ),
        tokenizer(["<image>", "[INST]", "[/INST]"], bos="<s>", adds_bos=False),
        template=INST.replace("PICTURE", "<image>\n"),
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    [image] = _ids(processor, "<image>")
    return processor, LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **TOWER, "image_size": 64, "patch_size": 16},
        # The window is shorter than a prompt.
        text_config={"model_type": "mistral", **_text(processor), "sliding_window": 24},
        image_token_index=image,
        image_grid_pinpoints=grid,
        tie_word_embeddings=False,
    )


def _llava_onevision() -> tuple[Any, Any]:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionImageProcessorPil

    grid = [[56, 112], [112, 56], [112, 112]]
    processor = _processor(
        "llava_onevision",
        LlavaOnevisionImageProcessorPil(size={"height": 56, "width": 56}, image_grid_pinpoints=grid),
        tokenizer(["<image>", "<video>", "<|im_start|>"], eos="<|im_end|>"),
        template=CHATML.replace("SYSTEM", "").replace("PICTURE", "<image>\n"),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )
    image, video = _ids(processor, "<image>", "<video>")
    return processor, LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", **SIGLIP, "vision_use_head": False},
        text_config={"model_type": "qwen2", **_text(processor)},
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=grid,
        tie_word_embeddings=False,
    )


def _qwen(kind: str) -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen2VLImageProcessorPil, Qwen3VLConfig

    patch = 16 if kind == "qwen3_vl" else 14
    processor = _processor(
        kind,
        Qwen2VLImageProcessorPil(
            size={"shortest_edge": 4 * patch * patch, "longest_edge": 64 * patch * patch}, patch_size=patch
        ),
        tokenizer(
            ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"], eos="<|im_end|>"
        ),
        template=CHATML.replace(
            "SYSTEM", "" if kind == "qwen3_vl" else "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        ).replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    image, video, start, end = _ids(processor, "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokens: dict[str, Any] = {
        "image_token_id": image, "video_token_id": video, "vision_start_token_id": start, "vision_end_token_id": end,
        "tie_word_embeddings": False,
    }  # fmt: skip
    text = _text(processor, rope_parameters=MROPE)
    if kind == "qwen2_vl":
        tower: dict[str, Any] = {
            "depth": 2,
            "embed_dim": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": patch,
            "hidden_size": 64,
        }
        return processor, Qwen2VLConfig(vision_config=tower, text_config=text, **tokens)
    tower = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": patch,
        "out_hidden_size": 64,
    }  # fmt: skip
    if kind == "qwen2_5_vl":
        tower |= {"window_size": 56, "fullatt_block_indexes": [1]}
        return processor, Qwen2_5_VLConfig(vision_config=tower, text_config=text, **tokens)
    tower |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    return processor, Qwen3VLConfig(vision_config=tower, text_config={**text, "head_dim": 16}, **tokens)


def _internvl() -> tuple[Any, Any]:
    from transformers import GotOcr2ImageProcessorPil, InternVLConfig

    named = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    processor = _processor(
        "internvl",
        GotOcr2ImageProcessorPil(size={"height": 56, "width": 56}),
        tokenizer(["<|im_start|>"], eos="<|im_end|>", named=named),
        template=CHATML.replace("SYSTEM", "").replace("PICTURE", "<IMG_CONTEXT>\n"),
        image_seq_length=4,
    )
    [image] = _ids(processor, "<IMG_CONTEXT>")
    return processor, InternVLConfig(
        vision_config={**TOWER, "image_size": [56, 56], "patch_size": [14, 14]},
        text_config={"model_type": "qwen2", **_text(processor)},
        image_token_id=image,
        image_seq_length=4,
        tie_word_embeddings=False,
    )


def _idefics(kind: str) -> tuple[Any, Any]:
    from transformers import Idefics3Config, Idefics3ImageProcessorPil, SmolVLMConfig, SmolVLMImageProcessorPil

    tiles = [f"<row_{r}_col_{c}>" for r in (1, 2, 3, 4) for c in (1, 2, 3, 4)]
    pictures = Idefics3ImageProcessorPil if kind == "idefics3" else SmolVLMImageProcessorPil
    processor = _processor(
        kind,
        pictures(size={"longest_edge": 112}, max_image_size={"longest_edge": 56}),
        tokenizer(
            ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles],
            bos="<|im_start|>",
            eos="<|im_end|>",
        ),
        template=SMOL,
        image_seq_len=4,
    )
    [image] = _ids(processor, "<image>")
    config = Idefics3Config if kind == "idefics3" else SmolVLMConfig
    return processor, config(
        vision_config=SIGLIP,
        text_config={"model_type": "llama", **_text(processor)},
        image_token_id=image,
        scale_factor=2,
        tie_word_embeddings=False,
    )


def _gemma3() -> tuple[Any, Any]:
    from transformers import Gemma3Config, Gemma3ImageProcessorPil

    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    processor = _processor(
        "gemma3",
        Gemma3ImageProcessorPil(size={"height": 56, "width": 56}),
        tokenizer(["<start_of_turn>", "<end_of_turn>"], bos="<bos>", eos="<eos>", named=named),
        template=GEMMA,
        image_seq_length=4,
    )
    image, begin, end = _ids(processor, "<image_soft_token>", "<start_of_image>", "<end_of_image>")
    text = _text(processor, head_dim=16, sliding_window=12, layer_types=["sliding_attention", "full_attention"])
    return processor, Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **SIGLIP},
        text_config=text,
        mm_tokens_per_image=4,
        image_token_index=image,
        boi_token_index=begin,
        eoi_token_index=end,
        tie_word_embeddings=False,
    )


def _paligemma(text_kind: str) -> tuple[Any, Any]:
    from transformers import PaliGemmaConfig, SiglipImageProcessorPil

    pictures: Any = SiglipImageProcessorPil(size={"height": 56, "width": 56})
    pictures.image_seq_length = 16
    processor = _processor(
        "paligemma",
        pictures,
        tokenizer(["<image>"], bos="<bos>", eos="<eos>", adds_bos=False, named={"image_token": "<image>"}),
        template=None,
    )
    [image] = _ids(processor, "<image>")
    more = {"final_logit_softcapping": 5.0, "sliding_window": 8} if text_kind == "gemma2" else {}
    return processor, PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **SIGLIP, "vision_use_head": False},
        text_config={"model_type": text_kind, **_text(processor, head_dim=16, **more)},
        image_token_index=image,
        projection_dim=64,
        tie_word_embeddings=False,
    )


def _pixtral(kind: str) -> tuple[Any, Any]:
    from transformers import LlavaConfig, Mistral3Config, PixtralImageProcessorPil

    merged = 2 if kind == "mistral3" else 1
    processor = _processor(
        kind,
        PixtralImageProcessorPil(size={"longest_edge": 128}, patch_size={"height": 16, "width": 16}),
        tokenizer(
            ["[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"], bos="<s>"
        ),
        template=(TODAY if kind == "mistral3" else "") + INST.replace("PICTURE", "[IMG]"),
        patch_size=16,
        spatial_merge_size=merged,
    )
    [image] = _ids(processor, "[IMG]")
    common: dict[str, Any] = {
        "vision_config": {"model_type": "pixtral", **TOWER, "image_size": 128, "patch_size": 16, "head_dim": 16},
        "text_config": {"model_type": "mistral", **_text(processor, head_dim=16, sliding_window=None)},
        "image_token_index": image,
        "vision_feature_layer": -1,
        "tie_word_embeddings": False,
    }
    if kind == "mistral3":
        return processor, Mistral3Config(**common, spatial_merge_size=2)
    return processor, LlavaConfig(**common, vision_feature_select_strategy="full")


KINDS: dict[str, tuple[str, Callable[[], tuple[Any, Any]]]] = {
    "LLaVA-1.5": ("llava", _llava),
    "LLaVA-NeXT": ("llava_next", _llava_next),
    "LLaVA-OneVision": ("llava_onevision", _llava_onevision),
    "Qwen2-VL": ("qwen2_vl", lambda: _qwen("qwen2_vl")),
    "Qwen2.5-VL": ("qwen2_5_vl", lambda: _qwen("qwen2_5_vl")),
    "Qwen3-VL": ("qwen3_vl", lambda: _qwen("qwen3_vl")),
    "InternVL (hf)": ("internvl", _internvl),
    "Idefics3": ("idefics3", lambda: _idefics("idefics3")),
    "SmolVLM": ("smolvlm", lambda: _idefics("smolvlm")),
    "Gemma 3": ("gemma3", _gemma3),
    "PaliGemma": ("paligemma", lambda: _paligemma("gemma")),
    "PaliGemma 2": ("paligemma", lambda: _paligemma("gemma2")),
    "Pixtral": ("pixtral", lambda: _pixtral("pixtral")),
    "Mistral 3": ("mistral3", lambda: _pixtral("mistral3")),
}
"""What a family is called, its key in `FAMILIES`, and how its processor and configuration are made."""


def write_model(folder: Path, name: str) -> tuple[Any, Any]:
    """Write a checkpoint of a family of KINDS; returns transformers' own model and processor, as they were made."""
    from transformers import AutoModelForImageTextToText

    processor, config = KINDS[name][1]()
    torch.manual_seed(7)
    model: Any = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim > 1:
                # The MLPs are loud and attention is soft, or the model would repeat one token for ever.
                loud = 6.0 if "down_proj" in key else 0.7 if "o_proj" in key else 1.5
                p.normal_(0, 0.3 if "embed_tokens" in key or "lm_head" in key else loud * p.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval(), processor
