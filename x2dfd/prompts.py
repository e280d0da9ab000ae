"""Every string in a prompt or a training answer of an MLLM: one module, used by training and inference alike.

Question, expert scores and answer forms are those of X2-DFD (arXiv 2410.06126 and its released data); the chat
template around them is the base model's own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from x2dfd.errors import SetupError, UnknownName
from x2dfd.files import Json
from x2dfd.types import Cue, Evidence


class Processor(Protocol):
    """The used parts of a processor of transformers, whose families have no common type for them."""

    tokenizer: Any
    image_processor: Any
    image_token: str
    chat_template: Any  # a Jinja template
    patch_size: int
    num_additional_image_tokens: int
    vision_feature_select_strategy: str

    def apply_chat_template(self, conversation: list[Json], **options: Any) -> Any: ...
    def save_pretrained(self, save_directory: Path) -> object: ...
    def __call__(self, **inputs: Any) -> Any: ...


QUESTION = "Is this image real or fake?"
STEM = "This image is"
"""The forced beginning of the answer; the verdict is the distribution of the next token."""

LABEL_WORDS = (" real", " fake")
CLASS_QUESTION = "Which kind of manipulation, if any, does this face show?"
CUE_ENDING = "Answer Yes or No."
YES_NO_WORDS = ("Yes", "No")

SERVED_SYSTEM = (
    "You examine photos of one face for signs of forgery: face swap, reenactment, editing, synthesis. Scores in a "
    "question are those of detectors; they can be wrong."
)
SERVED_VERDICT = "Answer with one word: real or fake."
SERVED_RATIONALE = (
    'The verdict is given: "{start}" Do not repeat it. Tell in one to three plain sentences what in the photo speaks '
    "for it: name areas (eyes, mouth, jaw, skin, hair, background ...) and what is odd or in order there."
)
"""Instructions for models whose endpoint cannot continue a begun answer; no adapter was trained on them."""

AGREES_BELOW, AGREES_ABOVE = 0.30, 0.70
"""Scores up to which an expert agrees with real, and from which it agrees with fake (X2-DFD's lo and hi)."""

SCORE_FORMS = ("numbers", "words", "both")
"""Forms of a score in a question: 0.812, as in X2-DFD; high; or 0.812 (high). An adapter's card names its form."""

_VICUNA = (
    "A chat between a curious {who} and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the {who}'s questions. "
    "{{% for m in messages %}}{{% if m['role'] == 'user' %}}{{{{ 'USER: ' }}}}"
    "{{% for p in m['content'] %}}{{% if p['type'] == 'image' %}}{{{{ '{image}\n' }}}}{{% endif %}}{{% endfor %}}"
    "{{% for p in m['content'] %}}{{% if p['type'] == 'text' %}}{{{{ p['text'] + ' ' }}}}{{% endif %}}{{% endfor %}}"
    "{{% else %}}{{{{ 'ASSISTANT: ' }}}}{{% for p in m['content'] %}}{{{{ p['text'] }}}}{{% endfor %}}{{{{ '</s>' }}}}"
    "{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ 'ASSISTANT:' }}}}{{% endif %}}"
)
CHAT_TEMPLATES = {
    "train_consistent": _VICUNA.format(who="user", image="<image>"),
    "official_infer": _VICUNA.format(who="human", image="<im_start><image><im_end>"),
}
"""Chat templates of published X2-DFD adapters: that of their training, and that of their released code's questions."""


def set_chat_template(processor: Processor, frame: str | None) -> None:
    """Give the processor a chat template of CHAT_TEMPLATES; None leaves the base's own. Raises UnknownName."""
    if frame is None:
        return
    if frame not in CHAT_TEMPLATES:
        raise UnknownName("chat template", frame, CHAT_TEMPLATES)
    processor.chat_template = CHAT_TEMPLATES[frame]


def score_word(score: float) -> str:
    """A score in words; low and high begin where an expert agrees with real, and with fake."""
    if score <= AGREES_BELOW:
        return "very low" if score < 0.1 else "low"
    return "unclear" if score < AGREES_ABOVE else "high" if score < 0.9 else "very high"


def expert_scores(evidence: Sequence[Evidence], form: str = "numbers") -> str:
    """The experts' scores as the question states them, in a form of SCORE_FORMS; "" without experts.

    >>> expert_scores([Evidence("blending", 0.812), Evidence("diffusion", None)])
    ' And the blending score is 0.812, and the diffusion score is N/A.'
    >>> expert_scores([Evidence("blending", 0.812)], "both")
    ' And the blending score is 0.812 (high).'
    """
    if form not in SCORE_FORMS:
        raise UnknownName("score form", form, SCORE_FORMS)
    formats = {"numbers": "{0:.3f}", "words": "{1}", "both": "{0:.3f} ({1})"}
    scores = ["N/A" if e.score is None else formats[form].format(e.score, score_word(e.score)) for e in evidence]
    clauses = [f"the {e.expert.lower()} score is {score}" for e, score in zip(evidence, scores, strict=True)]
    return f" And {listed(clauses, ', and ')}." if clauses else ""


def expert_cues(evidence: Sequence[Evidence]) -> str:
    """The experts' cues, as the prompt states them after the scores; "" without any. X2-DFD has no such sentence.

    >>> expert_cues([Evidence("tower", 0.9, cues=(Cue("jaw", "blending"), Cue("skin", "colour")))])
    ' The tower expert points at jaw blending and skin colour.'
    """
    return "".join(
        f" The {e.expert.lower()} expert points at {listed([f'{c.area} {c.artifact}' for c in e.cues])}."
        for e in evidence
        if e.cues
    )


def expert_block(evidence: Sequence[Evidence], form: str = "numbers") -> str:
    """The expert block of a question (WFS): the experts' scores, in a form of SCORE_FORMS, and where they point."""
    return expert_scores(evidence, form) + expert_cues(evidence)


def verdict_question(evidence: Sequence[Evidence], form: str = "numbers") -> str:
    """The question that decides, real or fake, with its expert block."""
    return QUESTION + expert_block(evidence, form)


def expert_sentence(label: str, evidence: Sequence[Evidence]) -> str:
    """The closing sentence of a training answer: names the experts that agree with the label; "" when none does."""
    scores = [(e.expert.lower(), e.score) for e in evidence if e.score is not None]
    names = [name for name, p in scores if (p >= AGREES_ABOVE if label == "fake" else p <= AGREES_BELOW)]
    claim, side = ("obvious", "fake") if label == "fake" else ("very few", "real")
    return f" Additionally, the image shows {claim} {listed(names)} artifacts supporting {side}." if names else ""


_EXPERT_SENTENCE = re.compile(
    r"\s*Additionally, the image shows (?:obvious|very few)\b.*?(?:supporting (?:fake|real)\.|$)", re.DOTALL
)


def without_experts(text: str) -> str:
    """A rationale without the model's own sentence on the experts, whose scores it garbles.

    >>> without_experts("A seam. Additionally, the image shows obvious clip artifacts supporting fake.")
    'A seam.'
    """
    return _EXPERT_SENTENCE.sub("", text).strip()


def verdict_answer(label: str, explanation: str = "", evidence: Sequence[Evidence] = ()) -> str:
    """A whole answer: the verdict, the explanation (SFS), and the experts that agree."""
    return f"{STEM} {label}.{' ' + explanation.strip() if explanation else ''}{expert_sentence(label, evidence)}"


def rationale_start(label: str) -> str:
    """The forced beginning of a rationale: the verdict that was scored before."""
    return f"{STEM} {label}."


def listed(names: Sequence[str], last: str = " and ") -> str:
    """ "jaw, nose and skin": the names in a row, with `last` before the last one."""
    return last.join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def conversation(question: str, turns: Sequence[tuple[str, str]] = ()) -> list[Json]:
    """Chat messages: the picture with the first question, then earlier (answer, next question) turns."""
    messages: list[Json] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    for answer, following in turns:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        messages.append({"role": "user", "content": [{"type": "text", "text": following}]})
    return messages


def in_chat_template(processor: Processor, messages: list[Json], *, answer_next: bool) -> str:
    """Chat messages as text in the base model's chat template, with the next answer's header if `answer_next`.

    A template that states the date gets our own system message instead: otherwise prompts would change every day.
    """
    if "strftime_now" in str(processor.chat_template):
        messages = [{"role": "system", "content": [{"type": "text", "text": SERVED_SYSTEM}]}, *messages]
    text: str = processor.apply_chat_template(messages, add_generation_prompt=answer_next, tokenize=False)
    return text


def render(processor: Processor, question: str, start: str = "", turns: Sequence[tuple[str, str]] = ()) -> str:
    """The prompt as text, in the base model's chat template, with `start` as the beginning of the answer.

    Without a template (PaliGemma) it is the plain form of that family: picture, begin token, lines. Raises SetupError
    as `begun` does.
    """
    if not processor.chat_template:
        lines = [question, *(line for turn in turns for line in turn)]
        return "\n".join([processor.image_token + processor.tokenizer.bos_token + lines[0], *lines[1:], start])
    return begun(processor, conversation(question, turns), start)


def begun(processor: Processor, messages: list[Json], start: str = "") -> str:
    """Chat messages as text in the chat template, with `start` as the beginning of the next answer.

    Raises SetupError for a model that reasons before it answers: its first token is no verdict.
    """
    prompt = in_chat_template(processor, messages, answer_next=True)
    if prompt.rstrip().endswith("<think>"):
        raise SetupError(
            "this model reasons before it answers, so no verdict can be scored: take its Instruct variant",
            code="model_thinks",
        )
    if not start or prompt[-1].isspace():
        return prompt + start
    # LLaVA's template ends in "ASSISTANT:", its answers begin with a space; Mistral's in "[/INST]", and they do not.
    answer = {"role": "assistant", "content": [{"type": "text", "text": start}]}
    answered = in_chat_template(processor, [*messages, answer], answer_next=False)
    return prompt + ("" if answered.startswith(prompt + start) else " ") + start


def answer_end(processor: Processor) -> int:
    """The token that ends an answer: the one that the chat template writes after it, else the tokenizer's end token.

    Raises SetupError when the template changes the prompt where it adds an answer.
    """
    eos: int = processor.tokenizer.eos_token_id
    if not processor.chat_template:
        return eos
    answer = {"role": "assistant", "content": [{"type": "text", "text": STEM}]}
    answered = in_chat_template(processor, [*conversation(QUESTION), answer], answer_next=False)
    prompt = render(processor, QUESTION, STEM)
    if not answered.startswith(prompt):
        raise SetupError(
            "this chat template changes the prompt when an answer is added, so answers cannot be masked",
            code="template_unmaskable",
        )
    after: list[int] = processor.tokenizer(answered.removeprefix(prompt).strip(), add_special_tokens=False)["input_ids"]
    return after[0] if after and after[0] in processor.tokenizer.added_tokens_decoder else eos


def stock_text(processor: Processor, question: str) -> str:
    """The text for the base's own processor that gives, with the picture, the tokens of `render`."""
    return render(processor, question) if processor.chat_template else processor.image_token + question


def begins(processor: Processor, prompt: str) -> bool:
    """Whether a prompt holds its begin token, as in many chat templates; the tokenizer must not add another."""
    bos = processor.tokenizer.bos_token
    return bool(bos) and prompt.removeprefix(processor.image_token).startswith(bos)


def prompt_tokens(processor: Processor, prompt: str) -> tuple[list[int], list[int]]:
    """Token ids before the picture and after it: prefix and suffix of shared-prefix scoring.

    The prompt is tokenised as a whole, like in the processor: with the tokenizer's own begin token, where it has one.
    """
    ids: list[int] = processor.tokenizer(prompt, add_special_tokens=not begins(processor, prompt))["input_ids"]
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    if image not in ids:
        raise ValueError(f"the prompt holds no {processor.image_token}")
    position = ids.index(image)
    return ids[:position], ids[position + 1 :]


def first_tokens(processor: Processor, start: str, words: Sequence[str]) -> tuple[int, int]:
    """The first token of each of two words that continue an answer after `start`.

    Raises SetupError when both have the same one, or when it is joined with the text before it.
    """
    start_ids, first_ids, second_ids = (
        prompt_tokens(processor, render(processor, QUESTION, beginning))[1]
        for beginning in (start, *(start + w for w in words))
    )
    position = len(start_ids)
    if first_ids[:position] != start_ids or second_ids[:position] != start_ids:
        raise SetupError(
            f"this tokenizer joins {words[0]!r} or {words[1]!r} with what precedes; it cannot be scored",
            code="tokenizer_joins_words",
        )
    if first_ids[position] == second_ids[position]:
        raise SetupError(
            f"this tokenizer begins {words[0]!r} and {words[1]!r} with the same token; it cannot be scored",
            code="tokenizer_words_alike",
        )
    return first_ids[position], second_ids[position]


def prompt_hash(processor: Processor, score_form: str = "numbers") -> str:
    """SHA-256 over the rendered forms of every kind of prompt and answer; adapters with another hash do not load."""
    evidence = [Evidence("blending", 0.5), Evidence("clip", None)]
    forms = [
        render(processor, verdict_question(evidence, score_form), STEM),
        render(processor, verdict_question([])),
        render(processor, verdict_question([*evidence, Evidence("x", 1.0)], score_form)),
        expert_cues([Evidence("x", 1.0, cues=(Cue("jaw", "blur"), Cue("eyes", "noise"), Cue("skin", "colour")))]),
        render(processor, f"Do you see it? {CUE_ENDING}"),
        render(processor, CLASS_QUESTION),
        verdict_answer("fake", "Text.", [Evidence("a", 0.9), Evidence("b", 0.8)]),
        verdict_answer("real", "Text.", [Evidence("a", 0.1)]),
        rationale_start("fake"),
        str(LABEL_WORDS + YES_NO_WORDS),
    ]
    return hashlib.sha256(json.dumps(forms).encode()).hexdigest()
