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
from x2dfd.checkpoints import FAMILIES, processor_class, put_together

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
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = {"model_type": "clip_vision_model", **TOWER, "image_size": 64, "patch_size": 16}
SIGLIP = {"model_type": "siglip_vision_model", **TOWER, "image_size": 56, "patch_size": 14}
CLIP_SQUARE = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
SIGLIP_SQUARE = {"size": {"height": 56, "width": 56}}
CLIP_TOKENS = {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
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


def _processor(kind: str, pictures: tuple[str, Any], words: Any, template: str | None, **settings: Any) -> Any:
    """A family's processor; `pictures`: the class of its image processor and that one's settings."""
    import transformers

    parts = [getattr(transformers, pictures[0])(**pictures[1]), words]
    return put_together(processor_class(FAMILIES[kind]), parts, {"chat_template": template, **settings})


def _ids(processor: Any, **tokens: str) -> dict[str, int]:
    return {key: processor.tokenizer.convert_tokens_to_ids(token) for key, token in tokens.items()}


def _config(kind: str, processor: Any, text: dict[str, Any], **settings: Any) -> Any:
    """A configuration of a `model_type`; `text`: what of the language model is the family's own."""
    from transformers import AutoConfig

    fast = processor.tokenizer
    own = {key: getattr(fast, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text_config = {**TEXT, "vocab_size": len(fast), **own, "tie_word_embeddings": False, **text}
    return AutoConfig.for_model(kind, text_config=text_config, tie_word_embeddings=False, **settings)


def plain_processor(template: str) -> Any:
    """A processor that renders a chat template; `<image>` is its picture."""
    return _processor("llava", ("CLIPImageProcessorPil", {}), tokenizer(["<image>"], bos="<s>"), template)


def _llava() -> tuple[Any, Any]:
    words = tokenizer(["<image>"], bos="<s>")
    processor = _processor("llava", ("CLIPImageProcessorPil", CLIP_SQUARE), words, VICUNA, **CLIP_TOKENS)
    image = _ids(processor, image_token_index="<image>")
    return processor, _config(
        "llava", processor, {"model_type": "llama"}, vision_config=CLIP, vision_feature_layer=-2, **image
    )


def _llava_next() -> tuple[Any, Any]:
    grid = {"image_grid_pinpoints": [[64, 128], [128, 64], [128, 128]]}
    pictures = ("LlavaNextImageProcessorPil", CLIP_SQUARE | grid)
    words = tokenizer(["<image>", "[INST]", "[/INST]"], bos="<s>", adds_bos=False)
    processor = _processor("llava_next", pictures, words, INST.replace("PICTURE", "<image>\n"), **CLIP_TOKENS)
    image = _ids(processor, image_token_index="<image>")
    text = {"model_type": "mistral", "sliding_window": 24}  # the window is shorter than a prompt
    return processor, _config("llava_next", processor, text, vision_config=CLIP, **grid, **image)


def _llava_onevision() -> tuple[Any, Any]:
    grid = {"image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]}
    processor = _processor(
        "llava_onevision",
        ("LlavaOnevisionImageProcessorPil", SIGLIP_SQUARE | grid),
        tokenizer(["<image>", "<video>", "<|im_start|>"], eos="<|im_end|>"),
        CHATML.replace("SYSTEM", "").replace("PICTURE", "<image>\n"),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )
    tokens = _ids(processor, image_token_index="<image>", video_token_index="<video>")
    tower = {**SIGLIP, "vision_use_head": False}
    return processor, _config(
        "llava_onevision", processor, {"model_type": "qwen2"}, vision_config=tower, **grid, **tokens
    )


def _qwen(kind: str) -> tuple[Any, Any]:
    patch = 16 if kind == "qwen3_vl" else 14
    size = {"shortest_edge": 4 * patch * patch, "longest_edge": 64 * patch * patch}
    specials = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    system = "" if kind == "qwen3_vl" else "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    processor = _processor(
        kind,
        ("Qwen2VLImageProcessorPil", {"size": size, "patch_size": patch}),
        tokenizer(specials, eos="<|im_end|>"),
        CHATML.replace("SYSTEM", system).replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    tokens = _ids(
        processor, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>",
    )  # fmt: skip
    text: dict[str, Any] = {"rope_parameters": MROPE}
    tower: dict[str, Any] = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
    tower |= {"patch_size": patch, "out_hidden_size": 64}
    if kind == "qwen2_vl":
        tower = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": patch, "hidden_size": 64}
    elif kind == "qwen2_5_vl":
        tower |= {"window_size": 56, "fullatt_block_indexes": [1]}
    else:
        tower |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
        text |= {"head_dim": 16}
    return processor, _config(kind, processor, text, vision_config=tower, **tokens)


def _internvl() -> tuple[Any, Any]:
    named = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    processor = _processor(
        "internvl",
        ("GotOcr2ImageProcessorPil", SIGLIP_SQUARE),
        tokenizer(["<|im_start|>"], eos="<|im_end|>", named=named),
        CHATML.replace("SYSTEM", "").replace("PICTURE", "<IMG_CONTEXT>\n"),
        image_seq_length=4,
    )
    image = _ids(processor, image_token_id="<IMG_CONTEXT>")
    tower = {**TOWER, "image_size": [56, 56], "patch_size": [14, 14]}
    return processor, _config(
        "internvl", processor, {"model_type": "qwen2"}, vision_config=tower, image_seq_length=4, **image
    )


def _idefics(kind: str) -> tuple[Any, Any]:
    pictures = "Idefics3ImageProcessorPil" if kind == "idefics3" else "SmolVLMImageProcessorPil"
    tiles = [f"<row_{r}_col_{c}>" for r in (1, 2, 3, 4) for c in (1, 2, 3, 4)]
    specials = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles]
    processor = _processor(
        kind,
        (pictures, {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}),
        tokenizer(specials, bos="<|im_start|>", eos="<|im_end|>"),
        SMOL,
        image_seq_len=4,
    )
    image = _ids(processor, image_token_id="<image>")
    tower = {k: v for k, v in SIGLIP.items() if k != "model_type"}
    return processor, _config(kind, processor, {"model_type": "llama"}, vision_config=tower, scale_factor=2, **image)


def _gemma3() -> tuple[Any, Any]:
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    words = tokenizer(["<start_of_turn>", "<end_of_turn>"], bos="<bos>", eos="<eos>", named=named)
    processor = _processor("gemma3", ("Gemma3ImageProcessorPil", SIGLIP_SQUARE), words, GEMMA, image_seq_length=4)
    tokens = _ids(processor, **{key.replace("token", "token_index"): token for key, token in named.items()})
    text = {"head_dim": 16, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
    return processor, _config("gemma3", processor, text, vision_config=SIGLIP, mm_tokens_per_image=4, **tokens)


def _paligemma(text_kind: str) -> tuple[Any, Any]:
    words = tokenizer(["<image>"], bos="<bos>", eos="<eos>", adds_bos=False, named={"image_token": "<image>"})
    pictures = ("SiglipImageProcessorPil", {**SIGLIP_SQUARE, "image_seq_length": 16})
    processor = _processor("paligemma", pictures, words, None)
    image = _ids(processor, image_token_index="<image>")
    more = {"final_logit_softcapping": 5.0, "sliding_window": 8} if text_kind == "gemma2" else {}
    text = {"model_type": text_kind, "head_dim": 16, **more}
    tower = {**SIGLIP, "vision_use_head": False}
    return processor, _config("paligemma", processor, text, vision_config=tower, projection_dim=64, **image)


def _pixtral(kind: str) -> tuple[Any, Any]:
    mistral = kind == "mistral3"
    specials = ["[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    processor = _processor(
        kind,
        ("PixtralImageProcessorPil", {"size": {"longest_edge": 128}, "patch_size": {"height": 16, "width": 16}}),
        tokenizer(specials, bos="<s>"),
        (TODAY if mistral else "") + INST.replace("PICTURE", "[IMG]"),
        patch_size=16,
        spatial_merge_size=2 if mistral else 1,
    )
    image = _ids(processor, image_token_index="[IMG]")
    text = {"model_type": "mistral", "head_dim": 16, "sliding_window": None}
    tower = {"model_type": "pixtral", **TOWER, "image_size": 128, "patch_size": 16, "head_dim": 16}
    more = {"spatial_merge_size": 2} if mistral else {"vision_feature_select_strategy": "full"}
    name = kind if mistral else "llava"
    return processor, _config(name, processor, text, vision_config=tower, vision_feature_layer=-1, **image, **more)


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
