"""Explanations written by an OpenAI-compatible multimodal model that is told the truth, and checked against it.

What a model writes is taken only if `x2dfd.explain` reads nothing from it but cues that are there. A text that claims
more is rejected, counted and asked for again with the reason; after `attempts` texts the grammar of `data_gen.writers`
takes over. Answers are kept on disk: a build that was cut off, or is made again, asks nothing twice.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_gen import questions
from data_gen.writers import CLEAR_FROM, FAINT_BELOW
from x2dfd.errors import SetupError, X2DFDError
from x2dfd.explain import AREA_WORDS, contradictions, read_cues, said_label
from x2dfd.files import write_text
from x2dfd.progress import progress
from x2dfd.prompts import rationale_start
from x2dfd.types import Cue

PROMPT_VERSION = 1
MIN_WORDS, MAX_WORDS = 5, 45  # the grammar writes 12 to 40; much more does not fit into what a detector may write
MAX_TOKENS = 2000  # room for models that think first, an end for those that find none
FAILURES_IN_A_ROW = 8
"""So many pictures without any answer, one after another, end the build: the endpoint is down or refuses the key."""

SYSTEM = f"""You explain to a careful reader what can be seen in a photo of one face. With each photo you get the \
truth about it.
Rules:
- One to three plain sentences, 12 to 40 words in all (never more than {MAX_WORDS}). No lists, markup, numbers, quotes \
or questions.
- A sign is an area and what is wrong there. Say both in plain words, in one clause, the strongest sign first.
- Call nothing odd but the signs that you get, and name no other area in a sentence about them.
- Write what you see. No word about these rules, what you were given, labels, scores or other programs.
Answer with the explanation only."""
FAKE = """This photo is fake. Technique: {technique}. Signs that are there, strongest first: {signs}.
Write what follows the sentence "{start}", without that sentence. Name the first sign; name others if they help."""
REAL = """This photo is real. Nothing in it was forged, and it shows no sign of forgery.
Write what follows the sentence "{start}", without that sentence. Name one to three areas and say what is in order."""
AGAIN = "That text cannot be used: {reason}. Write another one by the same rules."
PROMPT = {"version": PROMPT_VERSION, "system": SYSTEM, "fake": FAKE, "real": REAL, "again": AGAIN}
PROMPT_SHA256 = hashlib.sha256(json.dumps(PROMPT).encode()).hexdigest()

_TECHNIQUES = {"FS": "face swap", "FR": "face reenactment", "FE": "face editing", "EFS": "entire face synthesis"}
_NAMES_TECHNIQUE = {
    "FS": re.compile(r"\bface[- ]?swap|\bswapped\b"),
    "FR": re.compile(r"\bre-?enact"),
    "FE": re.compile(r"\bface[- ]edit"),
    "EFS": re.compile(r"\bface synthesis|\b(?:entirely|fully|wholly|completely) (?:synthetic|generated)"),
}
_NO_PROSE = re.compile(r"[*_#`<>\[\]{}|\\~@\d?\"“”]|https?:")  # "?": what stands in a question is not read as said
_ASIDE = re.compile(
    r"\b(?:told|given|provided|listed|prompt\w*|instruct\w*|rules?|truth|records?|label\w*|metadata|cues?|according to|"
    r"as (?:stated|described|mentioned|requested|an? ai)|language model|sorry|apologi[sz]e|assist|you|your|i|my|we)\b"
)
# The form of the experts' closing sentence, which `read_cues` passes over: a claim could hide in it.
_EXPERTS = re.compile(
    r"\badditionally,? the image shows\b|\bart[ei]facts? supporting\b|\b(?:expert|score|detector)s?\b"
)
_AREA_FORMS = (w.replace("*", r"\w*").replace(" ", r"[\s-]+") for words in AREA_WORDS.values() for w in words)
_AREA = re.compile(rf"\b(?:{'|'.join(_AREA_FORMS)})(?:e?s)?\b")

Outcome = Literal["accepted", "rejected", "failed", "nothing to tell"]


@dataclass(frozen=True)
class WriterConfig:
    """Which model writes explanations, and how it is asked. The key comes from OPENAI_API_KEY and is kept nowhere."""

    model: str  # name at the endpoint
    url: str  # OpenAI-compatible endpoint; the training views of all pictures are sent there
    concurrency: int = 4  # requests at a time
    attempts: int = 3  # texts asked for before the grammar takes over
    timeout: float = 60.0  # seconds a request may take
    retries: int = 3  # of a request that failed, with back-off

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if not self.model or parts.scheme not in ("http", "https") or not parts.hostname:
            raise X2DFDError("a served writer needs a model and an address such as http://localhost:8000/v1")
        if self.concurrency < 1 or self.attempts < 1:
            raise X2DFDError("a served writer needs at least one request at a time and one attempt")

    @property
    def host(self) -> str:
        """The address without anything that could be a secret."""
        return urlsplit(self.url).hostname or ""

    @property
    def name(self) -> str:
        """How records name this writer."""
        return f"served:{self.model}"


@dataclass(frozen=True, eq=False)
class Subject:
    """A picture to be explained, and what is true of it."""

    id: str
    view: Callable[[], NDArray[np.uint8]]  # [h, w, 3] RGB, as training sees it; made only when needed
    label: str  # `fake` or `real`
    df_class: str  # one of DF_CLASSES
    cues: tuple[Cue, ...]  # the true cues that may be named; the model is told these
    truth: tuple[Cue, ...]  # all true cues


@dataclass(frozen=True)
class Written:
    """What became of one picture."""

    outcome: Outcome
    text: str | None = None  # the accepted explanation; without one the grammar writes
    rejected: tuple[dict[str, str], ...] = ()  # {"reason", "detail", "text"} of each text that was not taken
    error: str | None = None  # why the endpoint gave no answer; said, but kept nowhere


def connect(config: WriterConfig) -> Any:
    """A client for the endpoint, with time-out and retries. Raises SetupError without `openai` or without a key."""
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise SetupError("a served writer needs the package openai: pip install -e '.[serve]'") from error
    return questions.connect(config.url).with_options(timeout=config.timeout, max_retries=config.retries)


def fault(text: str, subject: Subject) -> tuple[str, str] | None:
    """Why an explanation cannot be taken (a reason to count, a detail to tell the model), or None.

    What `read_cues` cannot read is not noticed: it is a check of what is claimed in our vocabulary.
    """
    whole = f"{rationale_start(subject.label)} {text}"
    lower, words = text.lower(), len(text.split())
    if not text:
        return "empty", "it is empty"
    if not text.isprintable() or _NO_PROSE.search(text) or text[-1] not in ".!":
        return "form", "it is not one paragraph of whole, plain sentences"
    if not MIN_WORDS <= words <= MAX_WORDS:
        return "length", f"it has {words} words"
    if found := _ASIDE.search(lower):
        return "aside", f"the word {found[0]!r} speaks of something else than the photo"
    if found := _EXPERTS.search(lower):
        return "experts", f"{found[0]!r} speaks of other programs"
    # The sentence before can lend its subject to the next: the whole answer is read as well as the text alone.
    named = {(c.area, c.artifact): c.score for c in (*read_cues(whole), *read_cues(text))}
    told = {(c.area, c.artifact): c.score for c in strongest_first(subject.cues)}
    true = {(c.area, c.artifact) for c in subject.truth}
    for pair in named:
        if pair not in told:
            return ("weak cue" if pair in true else "untrue cue"), f"it says {' x '.join(pair)}, which is no given sign"
    if said_label(whole) != subject.label or contradictions(whole, subject.label, (), ()):
        return "label", f"it does not agree with {rationale_start(subject.label)!r}"
    top = {pair for pair, score in told.items() if score == next(iter(told.values()))}
    if top and not top & set(named):
        return "strongest cue", f"the strongest sign, {' x '.join(min(top))}, is not plainly named"
    for pair, degree in named.items():
        if {_degree(degree), _degree(told[pair])} == {"faint", "clear"}:
            return "strength", f"{' x '.join(pair)} is {_degree(told[pair])}"
    if not told and not _AREA.search(lower):
        return "no area", "it names no area"
    if any(kind != subject.df_class and shape.search(lower) for kind, shape in _NAMES_TECHNIQUE.items()):
        return "technique", "it names another technique"
    return None


def write_served(client: Any, config: WriterConfig, subjects: Sequence[Subject], cache: Path) -> list[Written]:
    """What the model wrote of each picture, in the order given; asked and checked answers are added to `cache`.

    A picture whose request fails is left to the grammar and not cached: the next build asks again. Raises X2DFDError
    when the endpoint does not answer at all, or when `cache` is not a cache; what was answered by then is kept.
    """
    known = _read_cache(cache)
    written: list[Written] = [Written("nothing to tell")] * len(subjects)
    in_a_row = 0
    pool = ThreadPoolExecutor(config.concurrency)
    try:
        # A fake without a cue to tell is left to the grammar: nothing that a model said of it could be checked.
        asked = {
            pool.submit(_explain, client, config, s, known): k
            for k, s in enumerate(subjects)
            if s.label == "real" or s.cues
        }
        with cache.open("a", encoding="utf-8") as stream:
            for future in progress(as_completed(asked), config.name, len(asked)):
                key, one = future.result()
                written[asked[future]] = one
                in_a_row = in_a_row + 1 if one.error else 0
                if in_a_row >= FAILURES_IN_A_ROW:
                    raise X2DFDError(f"{config.host} fails again and again: {one.error}; answers so far are in {cache}")
                if key is not None and not one.error:
                    line = {"key": key, "id": subjects[asked[future]].id, "text": one.text, "rejected": one.rejected}
                    stream.write(json.dumps(line) + "\n")
                    stream.flush()
    finally:
        pool.shutdown(cancel_futures=True)
    failed = [w for w in written if w.error]
    if failed and len(failed) == len(asked):
        raise X2DFDError(f"{config.host} answered nothing: {failed[-1].error}")
    if failed:
        print(
            f"{config.host} gave no answer for {len(failed)} of {len(asked)} pictures ({failed[-1].error}); "
            "the grammar wrote of those, the same command asks for them again",
            file=sys.stderr,
        )
    return written


def writer_card(
    config: WriterConfig, written: Sequence[Written], records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """For the data card: who was asked, how, what was taken, and the share of explanations by each writer."""
    outcomes = Counter(w.outcome for w in written)
    writers = Counter(r["writer"] for r in records if r["task"] in ("detect", "chat"))  # the tasks that explain
    return {
        "model": config.model,
        "url_host": config.host,
        "prompt_sha256": PROMPT_SHA256,
        "prompt": PROMPT,
        "attempts": config.attempts,
        "pictures_asked": len(written) - outcomes["nothing to tell"],
        "accepted": outcomes["accepted"],
        "rejected_texts": dict(sorted(Counter(r["reason"] for w in written for r in w.rejected).items())),
        "fallen_back": {k: outcomes[k] for k in ("rejected", "failed", "nothing to tell")},
        "explanations": dict(sorted(writers.items())),
        "share": {k: round(n / writers.total(), 4) for k, n in sorted(writers.items())},
    }


def strongest_first(cues: Sequence[Cue]) -> list[Cue]:
    """Each cue once, at its strongest, the strongest first."""
    first: dict[tuple[str, str], Cue] = {}
    for cue in sorted(cues, key=lambda c: -(c.score or 0.0)):
        first.setdefault((cue.area, cue.artifact), cue)
    return list(first.values())


def _degree(score: float | None) -> str:
    return "" if score is None else "faint" if score < FAINT_BELOW else "visible" if score < CLEAR_FROM else "clear"


def _messages(subject: Subject, view: NDArray[np.uint8]) -> list[dict[str, Any]]:
    """System prompt, picture, truth. What is the same for all stands first, so that servers can reuse it."""
    start = rationale_start(subject.label)
    if subject.label == "real":
        told = REAL.format(start=start)
    else:
        parts = [
            f"{_degree(c.score)} {c.artifact.replace('-', ' ')} at the {c.area.replace('-', ' ')}".strip()
            for c in strongest_first(subject.cues)
        ]
        told = FAKE.format(technique=_TECHNIQUES[subject.df_class], signs="; ".join(parts), start=start)
    png = io.BytesIO()
    Image.fromarray(view).save(png, "PNG")
    picture = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": told}]
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def _explain(
    client: Any, config: WriterConfig, subject: Subject, known: Mapping[str, Written]
) -> tuple[str | None, Written]:
    """The answer for one picture, and the key to cache it under; no key when it was cached.

    Raises nothing that an endpoint can cause.
    """
    view = subject.view()
    key = _key(config, subject, view)
    cached = known.get(key)
    # A cached text is checked again: the rules may be stricter now, or someone edited the file.
    if cached and (cached.text is None or fault(cached.text, subject) is None):
        return None, cached
    messages = _messages(subject, view)
    rejected: list[dict[str, str]] = []
    for attempt in range(config.attempts):
        content, error = _ask(client, config.model, messages, attempt)
        if error:
            return key, Written("failed", rejected=tuple(rejected), error=error)
        text = _tidy(content, subject.label)
        found = fault(text, subject)
        if found is None:
            return key, Written("accepted", text, tuple(rejected))
        rejected.append({"reason": found[0], "detail": found[1], "text": text})
        messages = [
            *messages,
            {"role": "assistant", "content": content or "(nothing)"},  # many servers refuse an empty turn
            {"role": "user", "content": AGAIN.format(reason=found[1])},
        ]
    return key, Written("rejected", None, tuple(rejected))


def _ask(client: Any, model: str, messages: list[dict[str, Any]], seed: int) -> tuple[str, str | None]:
    """The text of one reply, and why there is none."""
    import openai

    try:
        reply = client.chat.completions.create(
            model=model, messages=messages, seed=seed, max_completion_tokens=MAX_TOKENS
        )
        return str(reply.choices[0].message.content or ""), None
    except openai.OpenAIError as error:
        said = f"{type(error).__name__}: {error}"
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        said = f"the reply is no chat completion ({error!r})"
    for secret in {str(getattr(client, "api_key", "")), os.environ.get("OPENAI_API_KEY", "")} - {""}:
        said = said.replace(secret, "***")  # some servers repeat the key that they refuse
    return "", said[:300]


def _tidy(content: str, label: str) -> str:
    """Without quotes around it and without the verdict, which models repeat whatever they are told."""
    text = content.strip().strip('"“”').strip()
    text = text.removeprefix(rationale_start(label)).strip()
    text = re.sub(r"[ \t]+", " ", text)
    return text[:1].upper() + text[1:]


def _key(config: WriterConfig, subject: Subject, view: NDArray[np.uint8]) -> str:
    """Whatever decides what is asked and what is accepted. The picture too: other sets use the same ids."""
    parts = [
        subject.id, hashlib.sha256(np.ascontiguousarray(view).tobytes()).hexdigest(), subject.label, subject.df_class,
        [asdict(c) for c in subject.cues], [asdict(c) for c in subject.truth],
        PROMPT_SHA256, config.model, config.host,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read_cache(path: Path) -> dict[str, Written]:
    """Answers by key. The end of a line that was cut off is dropped; any other fault is an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        return {}
    text = path.read_text("utf-8", errors="replace")
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        write_text(path, text)
    known = {}
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            entry = json.loads(line)
            outcome: Outcome = "rejected" if entry["text"] is None else "accepted"
            known[str(entry["key"])] = Written(outcome, entry["text"], tuple(entry["rejected"]))
        except (ValueError, TypeError, KeyError) as error:
            raise X2DFDError(f"{path}, line {number}: not an answer of a served writer; delete the file") from error
    return known
