"""Opens the measured model, in one place for every task, so that all models get the same samples and preprocessing.

`--model` takes every form of `x2dfd.model_spec`, `expert:NAME` included (any expert that `x2dfd experts` lists), and:

| `--model` | is |
| --- | --- |
| `fusion` | the experts of the embedded model and its calibration, the MLLM missing |
| `majority`, `template` | baselines that see no picture; `template` is given the label |

`--tools A,B` gives a model without an adapter the scores of these experts as the results of tools (the form of LAVID,
arXiv 2502.14994, for pictures).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

import x2dfd
from x2dfd import prompts
from x2dfd.adapter import EMBEDDED, expert_hashes, read_adapter_card
from x2dfd.calibration import Calibration, Logistic
from x2dfd.detector import Detector
from x2dfd.errors import X2DFDError
from x2dfd.experts import load_expert
from x2dfd.loading import crops_through
from x2dfd.model_spec import LoadOptions, ModelSpec
from x2dfd.types import KINDS, MLLM, Evidence, ModelInfo

BASELINES = ("majority", "template")
FUSION = "fusion"
TOOL_RESULTS = "tool results"


@dataclass(frozen=True)
class Choice:
    """The model to measure, as the options of the command name it."""

    model: str = "embedded"  # a ModelSpec, fusion, or a baseline
    tools: str | None = None  # of a model without an adapter: these experts' scores as tool results
    loading: LoadOptions = field(default_factory=LoadOptions)  # `mode`: calibrated where there is a calibration

    @property
    def spec(self) -> ModelSpec | None:
        """None for a baseline and for the fusion. Raises SetupError."""
        return None if self.model in (FUSION, *BASELINES) else ModelSpec.parse(self.model)

    @property
    def expert(self) -> str | None:
        """The expert, if the model is a single one."""
        return self.spec.expert if self.spec else None

    @property
    def has_mllm(self) -> bool:
        """Whether the model has an MLLM, which can write texts."""
        return self.spec is not None and self.spec.expert is None

    @property
    def folder(self) -> Path | None:
        """The adapter directory, if one is named."""
        if self.spec is None:
            return EMBEDDED if self.model == FUSION else None
        return EMBEDDED if self.spec.embedded else self.spec.adapter

    @property
    def label(self) -> str:
        """The name of the model in a result."""
        return self.spec.label if self.spec else self.model

    def key(self) -> list[str | None]:
        """Identifies the rows of this choice, without paths."""
        host, adapter = (self.spec.host, self.spec.adapter) if self.spec else ("", None)
        return [self.label, host, adapter.name if adapter else None, self.tools, self.loading.get("mode")]


@dataclass(frozen=True)
class Opened:
    """An opened model, in the form that every task uses."""

    name: str  # in the result
    kind: str  # "model", "fusion", "expert" or "baseline"
    loaded: Detector | None = None  # None for a baseline
    mode: str | None = None

    @property
    def detector(self) -> Detector:
        """Raises X2DFDError for a baseline, which has none."""
        if self.loaded is None:
            raise X2DFDError(f"{self.name} is a baseline, which does not judge pictures", code="model_not_for_task")
        return self.loaded

    @property
    def writes(self) -> bool:
        """Whether there is an MLLM, which can write texts."""
        return self.kind == "model"


def check(choice: Choice) -> None:
    """Raises X2DFDError where the options contradict each other; opens nothing."""
    if not choice.has_mllm and (choice.tools or any(choice.loading.values())):
        raise X2DFDError(
            f"--model {choice.model} takes no --tools, --mode, --device, --dtype, --bits or --device-map",
            code="options_conflict",
        )
    if choice.tools and not (choice.spec and choice.spec.bare):
        raise X2DFDError(
            "only a model without an adapter takes --tools: hub:NAME, or NAME@URL", code="options_conflict"
        )


def open_model(choice: Choice) -> Opened:
    """Opens a model that passed `check`. Raises X2DFDError (SetupError, UnknownName) if it cannot be opened."""
    spec = choice.spec
    if choice.model in BASELINES:
        return Opened(choice.model, "baseline")
    if spec is None:
        return Opened(FUSION, "fusion", experts_alone(None), "calibrated")
    if spec.expert is not None:
        return Opened(str(spec), "expert", experts_alone(spec.expert), None)
    options = choice.loading.copy()
    if spec.bare:  # zero-shot unless tools are given: the prompt holds no scores
        options["experts"] = choice.tools.split(",") if choice.tools else []
    detector = x2dfd.load(spec, **options)
    if choice.tools:
        detector = with_tools(detector)
    return Opened(spec.label, "model", detector, detector.mode)


@dataclass(frozen=True)
class FaceCount:
    """The encoding of `NoMLLM`: the number of faces."""

    size: int
    shared: None = None

    def part(self, rows: Sequence[int]) -> FaceCount:
        """The encoding of some of the faces."""
        return FaceCount(len(rows))


class NoMLLM:
    """Replaces the MLLM: it gives every face the same number, and writes no text."""

    name = "none"
    batch = 32

    def encode(self, crops: NDArray[np.uint8]) -> FaceCount:
        return FaceCount(len(crops))

    def verdict_logits(self, encoding: object, questions: Sequence[str]) -> NDArray[np.float64]:
        return np.zeros(len(questions))

    def write(self, encoding: object, questions: Sequence[str], starts: Sequence[str], **_: object) -> list[str]:
        return [""] * len(questions)

    def yes_no(self, crop: NDArray[np.uint8], questions: Sequence[str], /) -> NoReturn:
        raise X2DFDError("there is no language model to ask", code="no_language_model")


def experts_alone(name: str | None) -> Detector:
    """A Detector of one expert, or of all that the embedded model's calibration weighs (None), without its MLLM.

    The MLLM counts as its mean, as every missing score does in the calibration. A single expert decides by its own
    score without a threshold: only its score is measured, not its verdict.
    """
    if name is None:
        card, calibration = read_adapter_card(EMBEDDED), Calibration.load(EMBEDDED)
        expected = expert_hashes(card, calibration)
        experts = [load_expert(n, EMBEDDED / "experts") for n in expected if calibration.counts(n)]
        if mismatched := [e.card.name for e in experts if expected[e.card.name] != e.card.sha256]:
            raise X2DFDError(
                f"no fusion: the calibration was fitted with other weights of {', '.join(mismatched)}",
                code="expert_weights_differ",
            )
        title = f"{card.name} {card.version}, experts alone"
        weights = {
            k: {n: w for n, w in logistic.weights.items() if n != MLLM} for k, logistic in calibration.kinds.items()
        }
        kinds = {k: replace(logistic, weights=weights[k]) for k, logistic in calibration.kinds.items()}
        calibration = replace(calibration, kinds=kinds)
    else:
        experts = [load_expert(name)]
        calibration = Calibration({KINDS[1]: Logistic({name: 1.0}, {name: 0.0}, 0.0)}, 0.0, 1.0)
        title = f"expert {name}"
    info = ModelInfo(
        title,
        {"name": "none", "sha256": ""},
        crops_through=crops_through([e.card.name for e in experts]),
        experts={e.card.name: f"{e.card.version} {e.card.sha256}" for e in experts},
    )
    return Detector(NoMLLM(), experts, calibration, info, "calibrated")


def tool_results(question: str, evidence: Sequence[Evidence]) -> str:
    """The question with each expert's score as the result of a tool; the question alone without experts.

    >>> print(tool_results("Is it fake?", [Evidence("blending", 0.812), Evidence("clip", None, "no weights")]))
    Tool results, each the probability of a forgery by one detector, which can be wrong:
    blending: 0.812
    clip: no result (no weights)
    Is it fake?
    """
    if not evidence:
        return question
    lines = ["Tool results, each the probability of a forgery by one detector, which can be wrong:"]
    lines += [f"{e.expert}: {f'no result ({e.note})' if e.score is None else f'{e.score:.3f}'}" for e in evidence]
    return "\n".join([*lines, question])


def with_tools(detector: Detector) -> Detector:
    """The same parts, with `tool_results` in the question instead of the sentence that X2-DFD trains with."""
    info = replace(detector.info, asked_with=TOOL_RESULTS)
    question = partial(tool_results, prompts.QUESTION)
    return Detector(detector.mllm, detector.experts, detector.calibration, info, detector.mode, question=question)
