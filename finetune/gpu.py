"""`python -m finetune.gpu --out build/gpu.json`: how fast LLaVA-1.5-7B trains and judges on this GPU.

The model has the real geometry and random weights, which are as fast as trained ones, so that nothing is downloaded.
Trainings are measured with LoRA and QLoRA, for two row lengths, with and without checkpointing: steps and tokens a
second, measured and predicted peak memory, the share of the card's own matrix rate, and a profile of one step. Then
verdicts and cue questions a second are measured. Each result is written at once, so that an interrupted run keeps it.
`--tiny` runs the same code on a toy geometry, on a CPU too. `benchmarks/gpu.sh` runs this and the other GPU figures.
"""

from __future__ import annotations

import gc
import json
import platform
import re
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from finetune.config import FinetuneConfig
from finetune.data import IGNORE
from finetune.memory import GB, Shape, predict, shape_of
from finetune.models import tune
from finetune.train import RowTrainer
from x2dfd import prompts
from x2dfd.cli import run_command
from x2dfd.errors import SetupError, X2DFDError
from x2dfd.files import Json, write_text
from x2dfd.mllm import LocalMLLM
from x2dfd.prompts import Processor

QUESTIONS = [
    f"Does the lighting of area number {k} contradict the rest of the face? Answer Yes or No." for k in range(100)
]
VERDICTS = 16  # faces in one batch


def geometry(tiny: bool) -> Any:
    """LLaVA-1.5-7B's configuration: LlavaConfig's default with the hub checkpoint's vocabulary; or a toy's."""
    if not tiny:
        return LlavaConfig(text_config=LlamaConfig(vocab_size=32064))
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=32064, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return LlavaConfig(vision_config=vision, text_config=text)


def words_processor(config: Any) -> Any:
    """A processor with one token per word, whose prompts are about as long as those of a real tokenizer."""
    texts = " ".join([prompts.CHAT_TEMPLATES["train_consistent"], prompts.QUESTION, *QUESTIONS, prompts.STEM])
    words = re.findall(
        r"\w+|[^\w\s]+", " ".join([texts, *prompts.LABEL_WORDS, *prompts.YES_NO_WORDS, "USER ASSISTANT : ?"])
    )
    vocabulary = {word: k for k, word in enumerate(dict.fromkeys(["<unk>", "</s>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>", eos_token="</s>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    side = config.vision_config.image_size
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=fast,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    prompts.set_chat_template(processor, "train_consistent")
    return processor


def build(config: Any, device: torch.device, dtype: torch.dtype, four_bits: bool) -> Any:
    """The model with random weights; with `four_bits`, the language model's linear layers in NF4."""
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    if four_bits:
        import bitsandbytes as bnb

        for layer in model.get_decoder().layers:
            for name, linear in [(n, m) for n, m in layer.named_modules() if isinstance(m, nn.Linear)]:
                quantised = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4",
                    device="meta",
                )  # fmt: skip
                weight = linear.weight.data.cpu()  # moving it to the device quantises it
                quantised.weight = bnb.nn.Params4bit(
                    weight, requires_grad=False, quant_type="nf4", compress_statistics=True
                )
                layer.set_submodule(name, quantised.to(device))
        model.is_loaded_in_4bit = True
    return model


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """FLOP per second of a square matrix product, or operations with int8."""
    if dtype == torch.int8:
        b = torch.ones(side, side, device=device, dtype=dtype)
        return 2 * side**3 / median_seconds(lambda: torch._int_mm(b, b), device, 10)
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / median_seconds(lambda: a @ a, device, 10)


def measure_training(
    model: Any, config: FinetuneConfig, shape: Shape, lengths: tuple[int, ...], rate: float, steps: int
) -> list[Json]:
    """A measurement for each length, with and without checkpointing."""
    device = next(model.parameters()).device
    tuned, _ = tune(model, config)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-4)
    tuned.train()
    rows = []
    for length in lengths:
        batch = random_batch(model.config, config.batch, length, device)
        answers = float((batch["labels"] != IGNORE).float().mean())

        def step(batch: dict[str, Tensor] = batch) -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                loss = RowTrainer.compute_loss(cast(Any, None), tuned, dict(batch))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        for checkpointing in (True, False):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                model.gradient_checkpointing_disable()
            settings = replace(config, checkpointing=checkpointing)
            row: Json = {
                "method": config.method,
                "tokens": length,
                "batch": config.batch,
                "checkpointing": checkpointing,
                "predicted_gb": round(predict(settings, shape, 1, length, answers)["total"] / GB, 2),
            }
            try:
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                seconds = median_seconds(step, device, steps)
            except torch.cuda.OutOfMemoryError:
                rows.append({**row, "out_of_memory": True})
                optimizer.zero_grad()
                continue
            # Forward pass and gradients of the inputs, as frozen weights need none; linear layers alone are counted.
            flop = (4 + 2 * checkpointing) * shape.linears * config.batch * length
            row |= {"steps_per_s": round(1 / seconds, 3), "tokens_per_s": round(config.batch * length / seconds, 1)}
            row["share_of_matmul_rate"] = round(flop / seconds / rate, 3)
            row["peak_gb"] = round(torch.cuda.max_memory_allocated() / GB, 2) if device.type == "cuda" else None
            if length == lengths[-1] and not checkpointing:
                row["profile"] = profile(step, device)
            rows.append(row)
    return rows


def profile(step: Callable[[], None], device: torch.device) -> Json:
    """A profile of one step: its time, the time in which the device computes, and the slowest kernels or operations."""
    cuda = device.type == "cuda"
    start = time.perf_counter()
    with profiler(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    kind, clock = ("CUDA", "self_device_time_total") if cuda else ("CPU", "self_cpu_time_total")
    times = {e.key: (getattr(e, clock) / 1e3, e.count) for e in profiled.key_averages() if e.device_type.name == kind}
    dearest = sorted(times, key=lambda name: times[name], reverse=True)[:12]
    busy = sum(ms for ms, _ in times.values())
    kernels = [{"name": n[:80], "ms": round(times[n][0], 3), "calls": times[n][1]} for n in dearest]
    return {"step_ms": round(1e3 * seconds, 2), "busy_ms": round(busy, 2), "dearest": kernels}


def measure_judging(model: Any, processor: Processor, device: torch.device, rounds: int) -> dict[str, float]:
    """Verdicts per second in batches, and cue questions per second about one face, including its prefix."""
    mllm = LocalMLLM(model, processor, "random weights")
    crops = np.random.default_rng(0).integers(0, 256, (VERDICTS, 224, 224, 3), np.uint8)
    verdict_s = median_seconds(
        lambda: mllm.verdict_logits(mllm.encode(crops), [prompts.QUESTION] * VERDICTS), device, rounds
    )
    question_s = median_seconds(lambda: mllm.yes_no(crops[0], QUESTIONS), device, rounds)
    return {
        "verdicts_per_s": round(VERDICTS / verdict_s, 3),
        "cue_questions_per_s": round(len(QUESTIONS) / question_s, 2),
    }


def random_batch(config: Any, rows: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """Random rows of `length` tokens: those of the picture, and text of which the second half is the answer."""
    vision = config.vision_config
    image = (vision.image_size // vision.patch_size) ** 2
    if length <= image:
        raise X2DFDError(f"a row of {length} tokens has no room for a picture of {image}", code="row_too_short")
    ids = torch.randint(5, 1000, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, :image] = config.image_token_id
    labels = ids.clone()
    labels[:, : (length + image) // 2] = IGNORE
    pixels = torch.rand(rows, 3, vision.image_size, vision.image_size, generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}
    batch["weights"] = (labels != IGNORE).float()
    return {k: v.to(device) for k, v in batch.items()}


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a call, after one call to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def measure(tiny: bool = False, save: Callable[[Json], object] = lambda results: None) -> Json:
    """All measurements as one JSON object, which `save` also gets after each of them. Raises SetupError without a GPU,
    unless `tiny`."""
    if not tiny and not torch.cuda.is_available():
        raise SetupError("no CUDA GPU here; on a toy geometry: python -m finetune.gpu --tiny", code="cuda_missing")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    settings = geometry(tiny)
    rate = matmul_rate(device, dtype, 256 if tiny else 8192)
    lengths = (48, 96) if tiny else (768, 1536)
    card = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    results: Json = {
        "task": {"name": "gpu", "version": 2},
        "geometry": "toy" if tiny else "LLaVA-1.5-7B, random weights",
        "device": card,
        "dtype": str(dtype).removeprefix("torch."),
        "date": datetime.now(UTC).date().isoformat(),
        "matmul_tflops": round(rate / 1e12, 3),
        "training": [],
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "cuda": torch.version.cuda},
    }
    for method in ("lora", "qlora"):
        if method == "qlora" and find_spec("bitsandbytes") is None:
            results["left_out"] = "qlora: bitsandbytes is not installed (the extra `train` brings it)"
            save(results)
            break
        model = build(settings, device, dtype, method == "qlora")
        if method == "lora":
            results |= measure_judging(model, words_processor(settings), device, 2 if tiny else 10)
            save(results)
        config = FinetuneConfig(
            "", "", "", base="random", method=method, batch=2, bf16=device.type == "cuda", base_dtype=results["dtype"]
        )
        shape = shape_of(settings, config)
        results["training"] += measure_training(model, config, shape, lengths, rate, 2 if tiny else 8)
        save(results)
        del model
        gc.collect()
    return results


def _run(
    out: Annotated[Path, typer.Option(help="JSON file to write")] = Path("build/gpu.json"),
    tiny: Annotated[bool, typer.Option(help="a toy geometry, on a CPU too")] = False,
) -> None:
    """Measure training and judging with LLaVA-1.5-7B's geometry and random weights on this GPU."""
    results = measure(tiny, lambda partial: write_text(out, json.dumps(partial, indent=1) + "\n"))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    run_command(_run, "Example:\n\n  python -m finetune.gpu --out build/gpu.json")
