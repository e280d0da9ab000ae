"""The embedded model with only its tower loaded, which is enough for most verdicts and starts quickly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from typing import cast

import numpy as np
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray
from torch import Tensor

from x2dfd import prompts
from x2dfd.adapter import FORENSIC, TOWER, WHOLE, AdapterCard, check_adapter, checked_additions
from x2dfd.calibration import Calibration
from x2dfd.checkpoints import TORCH_DTYPES, base_identity
from x2dfd.errors import SetupError
from x2dfd.fetch import CHAT_TEMPLATE
from x2dfd.files import Json
from x2dfd.mllm import BATCH, LocalEncoding, LocalMLLM, YesNo, seeds_of
from x2dfd.model_spec import Dtype
from x2dfd.tower import load_tower_pass, read_ranges, tower_states
from x2dfd.types import MLLM


class TowerFirst:
    """Replaces the embedded LocalMLLM: encodes with the tower alone, and loads the rest when it is first needed."""

    batch = BATCH

    def __init__(
        self,
        name: str,
        run_tower: Callable[[Tensor], tuple[Tensor, ...]],
        tower: str,
        load: Callable[[], LocalMLLM],
        dtype: torch.dtype | None = None,
    ) -> None:
        """`run_tower`: hidden states of uint8 crops; `tower` and `dtype`: as in `LocalEncoding`."""
        self.name = name
        self._run_tower, self._tower, self._load, self._dtype = run_tower, tower, load, dtype
        self._loaded: LocalMLLM | None = None
        self._loading = Lock()

    @property
    def whole(self) -> LocalMLLM:
        """The whole model. Raises SetupError where it cannot be loaded."""
        with self._loading:
            self._loaded = self._loaded or self._load()
        return self._loaded

    def encode(self, crops: NDArray[np.uint8]) -> LocalEncoding:
        """Aligned face crops [n, s, s, 3] through the tower."""
        states = self._run_tower(torch.from_numpy(crops))
        return LocalEncoding(None, 0, states, seeds_of(crops), self._tower, tower_dtype=self._dtype)

    def verdict_logits(self, encoding: LocalEncoding, questions: Sequence[str]) -> NDArray[np.float64]:
        """As LocalMLLM.verdict_logits."""
        return self.whole.verdict_logits(encoding, questions)

    def write(
        self,
        encoding: LocalEncoding,
        questions: Sequence[str],
        starts: Sequence[str],
        *,
        turns: Sequence[tuple[str, str]] = (),
        on_text: Callable[[str], None] | None = None,
        enough: Sequence[Callable[[str], bool]] = (),
    ) -> list[str]:
        """As LocalMLLM.write."""
        return self.whole.write(encoding, questions, starts, turns=turns, on_text=on_text, enough=enough)

    def yes_no(self, crop: NDArray[np.uint8], questions: Sequence[str], /) -> YesNo:
        """As LocalMLLM.yes_no."""
        return self.whole.yes_no(crop, questions)


def tower_decides(card: AdapterCard, calibration: Calibration | None, mode: str) -> bool:
    """Whether a verdict reads nothing of the MLLM but its forensic tower."""
    reads_mllm = mode == "paper" or calibration is None or calibration.counts(MLLM)
    return not reads_mllm and card.tower == FORENSIC and card.weights != WHOLE


def tower_first(
    folder: Path, card: AdapterCard, precision: Dtype, whole: Callable[[], LocalMLLM]
) -> tuple[TowerFirst, dict[str, str], str]:
    """The model with its tower alone, the identity of its base, and the hash of its prompts.

    Its other files are checked here, too, but only loading `whole` shows whether they fit the base. Raises SetupError,
    and UnknownName for a chat template that is not known.
    """
    with ThreadPoolExecutor(1) as background:
        hashing = background.submit(base_identity, None)  # meanwhile: reading the tower's weights
        checked_additions(folder, card)
        additions, dtype = folder / TOWER, TORCH_DTYPES[precision]
        run_tower = partial(tower_states, layers=card.tower_layers, additions=additions, dtype=dtype)
        if dtype == torch.int8:
            read_ranges(None)  # of the experts on CLIP; a fault is raised here, not at the first face
        try:
            load_tower_pass(card.tower_layers, additions, dtype)  # raises here if the base is missing
        except KeyError as error:
            raise SetupError(
                f"the card of {card.name} names {card.tower_layers} tower layers, but the base lacks {error}; copy "
                "the directory again",
                code="tower_layers_invalid",
            ) from error
        processor = cast(prompts.Processor, _ChatTemplate())
        prompts.set_chat_template(processor, card.frame)
        prompt_sha256 = prompts.prompt_hash(processor, card.score_form)
        identity = hashing.result()
    check_adapter(folder, card, identity, prompt_sha256)
    name = f"{card.name} {card.version}"
    return TowerFirst(name, run_tower, card.tower_sha256, whole, dtype), identity, prompt_sha256


class _ChatTemplate:
    """A processor with nothing but its chat template, rendered as in transformers, which is slow to import."""

    chat_template = CHAT_TEMPLATE

    def apply_chat_template(self, conversation: list[Json], *, add_generation_prompt: bool, tokenize: bool) -> str:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(self.chat_template)
        return template.render(messages=conversation, add_generation_prompt=add_generation_prompt)
