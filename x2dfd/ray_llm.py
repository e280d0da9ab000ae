"""P(fake) of millions of face crops from an MLLM of billions of weights: ray.data.llm with vLLM's engine in the actors.

Prompts are rendered here, as in training; the engine gives the log-probabilities of one token. docs/ray.md holds the
recipe. Nothing here needs vLLM or Ray until `processor` is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from x2dfd import prompts
from x2dfd.calibration import sigmoid
from x2dfd.errors import InputError, SetupError, X2DFDError
from x2dfd.files import Json, read_json
from x2dfd.prompts import Processor


@dataclass(frozen=True)
class VllmScoring:
    """The settings of the pipeline. Raises X2DFDError for those that vLLM would refuse hours later."""

    model: str  # LLaVA directory (base/ of finetune.split) or hub name
    lora: Path | None = None  # lora/ of finetune.split
    engines: int = 1  # replicas, each on `gpus` cards
    gpus: int = 1  # that share one replica (tensor parallel)
    batch_size: int = 64  # rows sent to an engine at a time
    max_tokens: int = 1024  # of a prompt, its picture's tokens included
    memory: float = 0.9  # share of a card's memory that an engine takes
    likeliest: int = 20  # first tokens whose log-probability is asked for

    def __post_init__(self) -> None:
        for name in ("engines", "gpus", "batch_size", "max_tokens"):
            if getattr(self, name) < 1:
                raise X2DFDError(f"{name} must be 1 or more, not {getattr(self, name)}", code="number_out_of_range")
        if not 0 < self.memory <= 1:
            raise X2DFDError(f"memory is a share above 0 and up to 1, not {self.memory}", code="number_out_of_range")
        if not 2 <= self.likeliest <= 20:
            raise X2DFDError(
                f"likeliest must be from 2 to 20 (vLLM gives no more by default), not {self.likeliest}",
                code="number_out_of_range",
            )

    def rank(self) -> int | None:
        """The LoRA's rank; None without one. Raises SetupError when its configuration cannot be read."""
        if self.lora is None:
            return None
        path = self.lora / "adapter_config.json"
        try:
            return int(read_json(path)["r"])
        except (OSError, TypeError, ValueError, KeyError, X2DFDError) as error:
            raise SetupError(
                f"{path} cannot be read ({error}); make it: python -m finetune.split", code="split_unreadable"
            ) from error

    def config(self) -> Json:
        """The arguments of ray.data.llm.vLLMEngineProcessorConfig."""
        engine: Json = {
            "max_model_len": self.max_tokens,
            "tensor_parallel_size": self.gpus,
            "gpu_memory_utilization": self.memory,
            "enable_prefix_caching": True,
            "limit_mm_per_prompt": {"image": 1},
        }
        rank = self.rank()
        if rank is not None:
            engine |= {"enable_lora": True, "max_lora_rank": max(8, 1 << (rank - 1).bit_length())}  # a power of two
        return {
            "model_source": self.model,
            "engine_kwargs": engine,
            "concurrency": self.engines,
            "batch_size": self.batch_size,
            # Text and pixels are final: another template or tokenizer call would give another prompt.
            "chat_template_stage": False,
            "tokenize_stage": False,
            "detokenize_stage": False,
            "prepare_multimodal_stage": False,
        }

    def request(self, row: Json, base_processor: Processor) -> Json:
        """The engine's input from a row with `crop` [224, 224, 3] and optionally `question`; other columns stay."""
        from PIL import Image

        question = row.get("question") or prompts.QUESTION
        inputs = {
            "prompt": prompts.render(base_processor, question, prompts.STEM),
            "multimodal_data": {"image": Image.fromarray(np.asarray(row["crop"], np.uint8))},
            "sampling_params": {"max_tokens": 1, "temperature": 0.0, "logprobs": self.likeliest, "detokenize": False},
        }
        columns = {key: value for key, value in row.items() if key not in ("crop", "question")}
        return columns | inputs | ({"model": str(self.lora)} if self.lora else {})

    def processor(self) -> Any:
        """The pipeline. Called on a Ray dataset with a column `crop`, it returns one with `p_fake` and `reason`.

        Raises SetupError where ray[llm] is not installed.
        """
        try:
            from ray.data.llm import build_processor, vLLMEngineProcessorConfig
        except ImportError as error:
            raise SetupError(
                f"this needs ray[llm] with vLLM, on a GPU: pip install 'ray[llm]' ({error})", code="package_missing"
            ) from error
        from transformers import AutoProcessor

        base: Any = AutoProcessor.from_pretrained(self.model)
        labels = prompts.first_tokens(base, prompts.STEM, prompts.LABEL_WORDS)
        return build_processor(
            vLLMEngineProcessorConfig(**self.config()),
            preprocess=lambda row: self.request(row, base),
            postprocess=lambda row: _scored(row, labels),
        )


_ENGINE_COLUMNS = (
    "prompt", "multimodal_data", "sampling_params", "model", "prompt_token_ids", "num_input_tokens", "generated_tokens",
    "generated_text", "num_generated_tokens", "embeddings", "metrics", "logprobs", "prompt_logprobs",
)  # fmt: skip


def _scored(row: Json, labels: tuple[int, int]) -> Json:
    """A row with P(fake) instead of the engine's columns; None and the reason where it holds no label."""
    columns = {key: value for key, value in row.items() if key not in _ENGINE_COLUMNS}
    try:
        return columns | {"p_fake": p_fake(row, labels), "reason": None}
    except InputError as error:
        return columns | {"p_fake": None, "reason": error.code}


def p_fake(row: Json, labels: tuple[int, int]) -> float:
    """P(fake) from the log-probabilities of the first token; `labels` are the tokens of real and fake.

    A label that is not listed counts as the least likely of the listed tokens, as with a served model. Raises
    InputError when neither is listed.
    """
    first = (row.get("logprobs") or [{}])[0]
    logprobs = {int(token): float(entry["logprob"]) for token, entry in first.items() if entry is not None}
    if not any(label in logprobs for label in labels):
        raise InputError("no_label", "neither real nor fake is among the likeliest tokens")
    least = min(logprobs.values())
    real, fake = (logprobs.get(label, least) for label in labels)
    return float(sigmoid(fake - real))
