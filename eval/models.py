"""What is measured, opened in one place for every task, so that all models get the same samples and preprocessing.

| `--model` | is |
| --- | --- |
| `embedded`, a folder | the committed model, or an adapter directory, MLLM and experts together |
| with `--base NAME` | a LLaVA of the hub or a folder, bare or with `--model DIR` as its adapter |
| with `--served URL` | a model of an OpenAI-compatible endpoint, zero-shot or with `--adapter DIR` |
| `expert:NAME` | one expert alone, any that `x2dfd experts` lists |
| `fusion` | the experts of the embedded model and its calibration, the MLLM missing |
| `majority`, `template` | baselines that see no picture; `template` is told the label |

`--tools A,B` gives a model without an adapter the scores of these experts as the results of tools (the form of LAVID,
arXiv 2502.14994, for pictures).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from x2dfd.adapter import EMBEDDED
from x2dfd.errors import X2DFDError
from x2dfd.types import KINDS, Evidence

if TYPE_CHECKING:
    from x2dfd.detector import Mode

BASELINES = ("majority", "template")
FUSION = "fusion"
EXPERT = "expert:"


@dataclass(frozen=True)
class Choice:
    """Which model is measured, as the options of the command name it."""

    model: str = "embedded"  # embedded, an adapter's folder, expert:NAME, fusion, a baseline, or a served name
    base: str | None = None  # a base model of the hub or a folder, bare or under `model`
    served: str | None = None  # an OpenAI-compatible endpoint that serves `model`
    adapter: str | None = None  # with `served`: the adapter directory that it serves
    tools: str | None = None  # of a model without an adapter: these experts' scores as tool results
    mode: Mode | None = None  # default: calibrated where there is a calibration

    @property
    def folder(self) -> Path | None:
        """The adapter directory, if one is named."""
        if self.adapter or self.served or self.model in (FUSION, *BASELINES) or self.model.startswith(EXPERT):
            return Path(self.adapter) if self.adapter else EMBEDDED if self.model == FUSION else None
        if self.model == "embedded":
            return None if self.base else EMBEDDED
        return Path(self.model)

    def key(self) -> list[str | None]:
        """What tells rows of one choice from those of another, without paths."""
        names = [named(v) if v else None for v in (self.model, self.base, self.adapter)]
        return [*names, self.served, self.tools, self.mode]


@dataclass(frozen=True)
class Opened:
    """A model as every task uses it."""

    name: str  # as it stands in the result
    kind: str  # "model", "served", "fusion", "expert" or "baseline"
    detector: Any = None  # x2dfd.Detector; None for a baseline
    mode: str | None = None

    @property
    def expert(self) -> str | None:
        return self.name.removeprefix(EXPERT) if self.kind == "expert" else None

    @property
    def writes(self) -> bool:
        """Whether there is an MLLM, which can be asked for texts."""
        return self.kind in ("model", "served")


def named(model: str) -> str:
    """A model's name without the path of its folder."""
    own = model in ("embedded", FUSION, *BASELINES) or model.startswith(EXPERT)
    return model if own else Path(model).absolute().name


def has_mllm(model: str) -> bool:
    """Whether what is named has an MLLM, which can be asked for texts."""
    return model not in (FUSION, *BASELINES) and not model.startswith(EXPERT)


def label(choice: Choice) -> str:
    """A model with all that its options say, but for paths and addresses."""
    told = [f"adapter {named(choice.adapter)}"] if choice.adapter else []
    told += [f"tools {choice.tools}"] if choice.tools else []
    told += [choice.mode] if choice.mode else []
    return ", ".join([_name(choice), *(["served"] if choice.served else []), *told])


def _name(choice: Choice) -> str:
    return f"base:{named(choice.base)}" if choice.base and choice.model == "embedded" else named(choice.model)


def check(choice: Choice) -> None:
    """Raises X2DFDError where the options contradict each other; opens nothing."""
    if not has_mllm(choice.model) and (choice.base or choice.served or choice.adapter or choice.tools or choice.mode):
        raise X2DFDError(
            f"--model {choice.model} goes without --base, --served, --adapter, --tools and --mode",
            code="options_conflict",
        )
    if choice.adapter and not choice.served:
        raise X2DFDError(
            "--adapter goes with --served; without it the adapter's folder is --model", code="options_conflict"
        )
    if choice.served and choice.model == "embedded":
        raise X2DFDError(
            "--served needs --model NAME: the name that the endpoint gives its model", code="option_missing"
        )
    if choice.served and choice.base:
        raise X2DFDError("--served and --base are two models: give one", code="options_conflict")
    untrained = choice.served or choice.base
    if choice.tools and (not untrained or choice.adapter or (choice.base and choice.model != "embedded")):
        raise X2DFDError(
            "--tools is for a model without adapter (--served or --base): an adapter has its own prompt",
            code="options_conflict",
        )


def open_model(choice: Choice) -> Opened:
    """Raises X2DFDError (SetupError, UnknownName) for what cannot be had."""
    import x2dfd

    check(choice)
    model = choice.model
    if model in BASELINES:
        return Opened(model, "baseline")
    if model == FUSION:
        return Opened(model, "fusion", experts_alone(None), "calibrated")
    if model.startswith(EXPERT):
        return Opened(model, "expert", experts_alone(model.removeprefix(EXPERT)), None)
    tools = choice.tools.split(",") if choice.tools else None
    if choice.served:
        # Zero-shot unless tools are given: a bare model is told no scores.
        some = tools if tools is not None else None if choice.adapter else []
        detector = x2dfd.load(model, served=choice.served, adapter=choice.adapter, mode=choice.mode, experts=some)
    elif choice.base:
        folder = None if model == "embedded" else model
        mode: Mode = choice.mode or ("calibrated" if folder else "paper")
        some = tools if tools is not None else None if folder else []
        detector = x2dfd.load(base=choice.base, adapter=folder, mode=mode, experts=some)
    else:
        detector = x2dfd.load(None if model == "embedded" else model, mode=choice.mode or "calibrated")
    if tools is not None:
        detector = with_tools(detector)
    # A stand-in of the tests has no mode of its own.
    mode_of = getattr(detector, "mode", "calibrated")
    return Opened(_name(choice), "served" if choice.served else "model", detector, mode_of)


# ---------------------------------------------------------------- experts without an MLLM


class NoMLLM:
    """Stands where the MLLM would: the same number for every face, no text."""

    name = "none"
    batch = 32

    def __init__(self, logit: float) -> None:
        self._logit = logit

    def look(self, crops: NDArray[np.uint8]) -> Any:
        return SimpleNamespace(tower_states=None, size=len(crops), part=lambda rows: self.look(crops[rows]))

    def verdict_logits(self, look: Any, questions: Sequence[str]) -> NDArray[np.float64]:
        return np.full(len(questions), self._logit)

    def write(self, look: Any, questions: Sequence[str], starts: Sequence[str], **_: Any) -> list[str]:
        return [""] * len(questions)

    def yes_no(self, crop: NDArray[np.uint8], questions: Sequence[str], /) -> Any:
        raise X2DFDError("there is no language model to ask", code="no_language_model")


def without_mllm(weights: dict[str, float]) -> dict[str, float]:
    """A logistic's weights but that of the MLLM, which then counts as its mean."""
    from x2dfd.calibration import MLLM

    return {n: w for n, w in weights.items() if n != MLLM}


def experts_alone(name: str | None) -> Any:
    """A Detector of one expert, or of all that the embedded model's calibration weighs (None), without its MLLM.

    The MLLM counts as its mean, as the calibration treats what is missing. One expert decides by its own score, and
    has no threshold: what it says is not counted, only its score.
    """
    from x2dfd.adapter import expert_hashes, read_adapter_card
    from x2dfd.calibration import Calibration, Logistic
    from x2dfd.degrade import CODEC
    from x2dfd.detector import Detector
    from x2dfd.experts import load_expert

    if name is None:
        card, calibration = read_adapter_card(EMBEDDED), Calibration.load(EMBEDDED)
        wanted = expert_hashes(card, calibration)
        experts = [load_expert(n, EMBEDDED / "experts") for n in wanted if calibration.weights.get(n, 0) > 0]
        if other := [e.card.name for e in experts if wanted[e.card.name] != e.card.sha256]:
            raise X2DFDError(
                f"no fusion: the calibration was fitted to other weights of {', '.join(other)}",
                code="expert_weights_differ",
            )
        stated = f"{card.name} {card.version}, experts alone"
        kinds = {k: replace(one, weights=without_mllm(one.weights)) for k, one in calibration.kinds.items()}
        calibration = replace(calibration, kinds=kinds)
    else:
        experts = [load_expert(name)]
        calibration = Calibration({KINDS[1]: Logistic({name: 1.0}, {name: 0.0}, 0.0)}, 0.0, 1.0)
        stated = f"expert {name}"
    facts: dict[str, Any] = {
        "name": stated,
        "base": {"name": "none", "sha256": ""},
        "adapter_sha256": None,
        "crops_through": f"{CODEC[0]} {CODEC[1]}",
        "experts": {e.card.name: f"{e.card.version} {e.card.sha256}" for e in experts},
        "in_prompt": [],
        "score_form": "numbers",
        "held_out": [],
    }
    return Detector(NoMLLM(0.0), experts, calibration, facts, "calibrated")


# ---------------------------------------------------------------- scores as tool results


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


def with_tools(detector: Any) -> Any:
    """The same parts, asked with `tool_results` instead of the sentence that X2-DFD trains with."""
    from x2dfd import prompts
    from x2dfd.detector import Detector

    class ToolDetector(Detector):
        def _questions(self, evidence: Sequence[Sequence[Evidence]]) -> list[str]:
            return [tool_results(prompts.QUESTION, said) for said in evidence]

    facts = {**detector.facts, "asked_with": "tool results"}
    return ToolDetector(detector.mllm, detector.experts, detector.calibration, facts, detector.mode)
