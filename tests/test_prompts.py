"""The strings that decide: as X2-DFD has them, the same in training and inference, and hashed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from finetune.data import answer_tokens
from tests import tiny
from tests.raising import raises
from x2dfd import prompts
from x2dfd.checkpoints import load_model
from x2dfd.mllm import LocalMLLM
from x2dfd.types import Cue, Evidence

BLENDING, NONE = Evidence("blending", 0.812), Evidence("B", None, "no face")
POINTING = Evidence("C", 0.9, cues=(Cue("jaw", "blending", 0.8), Cue("skin", "colour")))


@pytest.fixture(scope="module")
def llava_15() -> Any:
    return tiny.processor_of_llava_15()


@pytest.mark.parametrize(
    ("evidence", "tail"),
    [
        ([], ""),
        ([BLENDING], " And the blending score is 0.812."),
        ([BLENDING, Evidence("a", 0.12349)], " And the blending score is 0.812, and the a score is 0.123."),
        (
            [Evidence("A", 1.0), NONE, BLENDING],
            " And the a score is 1.000, the b score is N/A, and the blending score is 0.812.",
        ),
        ([Evidence("a", 1e-9)], " And the a score is 0.000."),
        ([POINTING], " And the c score is 0.900. The c expert points at jaw blending and skin colour."),
    ],
)
def test_the_question_and_its_expert_scores_are_those_of_x2dfd(evidence: list[Evidence], tail: str) -> None:
    """A model tuned on the published form must not meet another one: order, case, decimals, commas, N/A."""
    assert prompts.verdict_question(evidence) == f"Is this image real or fake?{tail}"


@pytest.mark.parametrize(
    ("label", "scores", "named"),
    [
        ("fake", [0.9], "obvious blending"),
        ("fake", [0.70], "obvious blending"),
        ("fake", [0.6999], ""),
        ("fake", [None], ""),
        ("fake", [0.1, 0.8], "obvious clip"),
        ("fake", [0.8, 0.8], "obvious blending and clip"),
        ("fake", [0.8, 0.8, 1.0], "obvious blending, clip and x"),
        ("real", [0.30], "very few blending"),
        ("real", [0.3001], ""),
        ("real", [0.9], ""),
        ("real", [], ""),
    ],
)
def test_only_experts_that_agree_with_the_label_are_named(
    label: str, scores: Sequence[float | None], named: str
) -> None:
    """An expert in the grey zone, or against the label, must not be taught as support for it (lo 0.30, hi 0.70)."""
    evidence = [Evidence(n, s) for n, s in zip(("Blending", "clip", "x"), scores, strict=False)]
    sentence = f" Additionally, the image shows {named} artifacts supporting {label}." if named else ""
    assert prompts.expert_sentence(label, evidence) == sentence


def test_what_a_text_says_of_experts_is_left_out() -> None:
    """A model that calls a low score obvious misleads a reader who cannot see the numbers; what it saw stays."""
    said = "Additionally, the image shows obvious clip artifacts supporting fake."
    for written in (f"A seam. {said}", f"{said} A seam.", f"A seam. {said[:45]}"):
        assert prompts.without_experts(written) == "A seam."
    assert prompts.without_experts("Additionally, a seam shows.") == "Additionally, a seam shows."
    assert prompts.without_experts(said) == ""


def test_an_answer_is_verdict_explanation_experts() -> None:
    """The label token is read right after the stem; anything before it would be scored instead."""
    assert prompts.verdict_answer("real") == "This image is real."
    assert prompts.verdict_answer("fake", " A seam. ", [Evidence("clip", 0.9)]) == (
        "This image is fake. A seam. Additionally, the image shows obvious clip artifacts supporting fake."
    )
    for label, word in zip(("real", "fake"), prompts.LABEL_WORDS, strict=True):
        assert prompts.verdict_answer(label, "Text.").startswith(prompts.STEM + word)
        assert prompts.verdict_answer(label, "Text.").startswith(prompts.rationale_start(label))


def test_tokens_around_the_picture_are_those_of_the_stock_processor(llava_15: Any) -> None:
    """Without LLaVA-1.5's begin token, every prompt is a text such as its language model has never seen."""
    text = prompts.render(llava_15, prompts.verdict_question([BLENDING]), prompts.STEM)
    assert text.endswith("ASSISTANT: This image is")  # an answer begins with a space
    before, after = prompts.prompt_tokens(llava_15, text)
    assert before[0] == llava_15.tokenizer.bos_token_id
    image = llava_15.tokenizer.convert_tokens_to_ids("<image>")
    assert [*before, image, *after] == llava_15.tokenizer(text)["input_ids"]
    with pytest.raises(ValueError, match="<image>"):  # an answer about nothing
        prompts.prompt_tokens(llava_15, "USER: hello")
    text = prompts.render(llava_15, "Q1", turns=[("A1", "Q2")])  # a follow-up continues, with one picture
    assert text == "USER: <image>\nQ1 ASSISTANT: A1 USER: Q2 ASSISTANT:"
    for answer in ("", "  ", "\n"):  # its loss would be that of the end token alone
        with raises("answer_empty", "'Q'"):
            answer_tokens(llava_15, "Q", answer)


@pytest.mark.parametrize(
    "make", [pytest.param(tiny.processor_of_base, marks=pytest.mark.needs_base), tiny.processor_of_llava_15]
)
def test_the_string_trained_on_is_the_string_inferred_on(
    make: Callable[[], Any], tmp_path: Path, astronaut: NDArray[np.uint8]
) -> None:
    """One token of difference between training and scoring, and the score is of a text never trained on: what the
    language model is fed when it scores and when it writes is the beginning of what it was trained on."""
    model, processor = load_model(tiny.write_base(tmp_path / "base", make(), text_layers=1))
    mllm = LocalMLLM(model, processor, "tiny")
    fed: list[list[int]] = []

    def listen(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("input_ids") is not None:
            fed.append(kwargs["input_ids"][0].tolist())

    model.model.language_model.register_forward_pre_hook(listen, with_kwargs=True)
    question = prompts.verdict_question([BLENDING, Evidence("clip", None)])
    encoding = mllm.encode(astronaut[None, :224, 120:344])
    mllm.verdict_logits(encoding, [question])
    mllm.write(encoding, [question], [prompts.rationale_start("fake")], max_new_tokens=1)
    mllm.yes_no_packed(encoding, [f"Is there a seam? {prompts.CUE_ENDING}"])
    scored, begun, asked = fed[0], fed[1], fed[-1]

    prompt, answer = answer_tokens(processor, question, prompts.verdict_answer("fake", "A seam.", [BLENDING]))
    assert scored == prompt + answer[: len(scored) - len(prompt)]
    assert begun == prompt + answer[: len(begun) - len(prompt)]
    assert len(prompt) < len(scored) < len(begun)
    assert answer[len(scored) - len(prompt)] == mllm.label_ids[1]  # the token that is weighed more and scored
    assert answer[-1] in (processor.tokenizer.eos_token_id, processor.tokenizer.convert_tokens_to_ids("<|im_end|>"))
    prompt, answer = answer_tokens(processor, f"Is there a seam? {prompts.CUE_ENDING}", "Yes")
    assert asked == prompt
    assert processor.tokenizer.decode(answer[:1]).strip() == "Yes"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("QUESTION", "Is this picture real or fake?"),
        ("STEM", "This picture is"),
        ("LABEL_WORDS", (" genuine", " fake")),
        ("YES_NO_WORDS", ("yes", "no")),
        ("CLASS_QUESTION", "Which class?"),
        ("CUE_ENDING", "Yes or no?"),
        ("expert_scores", lambda evidence, form="": f" Scores: {len(evidence)}"),
        ("expert_sentence", lambda label, evidence: ""),
        ("verdict_answer", lambda label, text="", evidence=(): label),
        ("rationale_start", lambda label: label),
        ("conversation", lambda question, turns=(): [
            {"role": "user", "content": [{"type": "text", "text": question}, {"type": "image"}, ]},
            {"role": "user", "content": []},
        ]),
    ],
)  # fmt: skip
def test_the_hash_changes_with_every_form(
    llava_15: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    """An adapter trained with other words than are asked must be refused, whichever word it is."""
    before = prompts.prompt_hash(llava_15)
    assert prompts.prompt_hash(llava_15) == before
    assert len({before, *(prompts.prompt_hash(llava_15, form) for form in prompts.SCORE_FORMS)}) == 3
    monkeypatch.setattr(prompts, name, value)
    assert prompts.prompt_hash(llava_15) != before


def test_words_of_a_score_agree_with_the_closing_sentence() -> None:
    """A score called high that no sentence counts as supporting fake would be two standards in one prompt."""
    for score in np.linspace(0, 1, 1001):
        e = [Evidence("clip", float(score))]
        word = prompts.score_word(float(score))
        assert ("high" in word) == bool(prompts.expert_sentence("fake", e)), score
        assert ("low" in word) == bool(prompts.expert_sentence("real", e)), score
    assert prompts.expert_scores([Evidence("clip", 0.95), Evidence("x", None)], "words").endswith(
        "very high, and the x score is N/A."
    )
    with raises("unknown_name", "digits"):
        prompts.expert_scores([], "digits")


@pytest.mark.needs_base
def test_the_hash_of_the_embedded_model_stands(llava_15: Any) -> None:
    """A change of prompts by accident would make the committed adapter unusable; by intention, it needs retraining."""
    known = "f7c2ca2372a864be687582b8e43921a3ef2d0f8f38e68c8e9bf8b88328096452"
    assert prompts.prompt_hash(tiny.processor_of_base()) == known != prompts.prompt_hash(llava_15)
