"""The multimodal LLM: score the verdict from the label tokens, write the rationale given it, answer cue questions.

The picture and the prompt before it are computed once (`encode`). Every question then runs over that cache; the many
cue questions are packed into few passes under a block-diagonal mask.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from x2dfd import prompts
from x2dfd.checkpoints import FAMILIES, family_of
from x2dfd.errors import InputError, SetupError
from x2dfd.experts import Shared
from x2dfd.prompts import Processor

MAX_NEW_TOKENS = 80
CIRCLE = 12  # repeated tokens that end an answer; fewer are normal, as an area or a colour may be named twice
TOP_P = 0.9  # of nucleus sampling, where a temperature is set (Holtzman et al., arXiv 1904.09751)
BATCH = 16  # faces in one pass
PACK = 25  # cue questions in one pass: bounds the mask's and the activations' size
NOT_FINITE = "the model's numbers are not finite: a broken adapter, or too large for 16 bits; take --dtype bf16 or fp32"


@dataclass(frozen=True)
class YesNo:
    """Answers to yes/no questions about one picture."""

    p_yes: NDArray[np.float64]  # [q], softmax over the Yes and No tokens
    answers: tuple[str, ...]  # the greedy first token: "yes", "no" or "other"


@dataclass(eq=False)
class LocalEncoding:
    """A batch of pictures after their one pass through tower and language model.

    A LLaVA's have passed the tower alone: the language model's pass follows with the first question.
    """

    cache: Any  # transformers' DynamicCache over the prefix, batch n; None if unfilled or not shared
    length: int  # tokens of the prefix
    states: tuple[Tensor, ...]  # hidden states of the vision tower, embeddings first, where they were computed
    seeds: tuple[int, ...]  # one a picture, from its pixels, for the sampling of its texts
    tower: str | None = ""  # SHA-256 of the tower's additions; "" without any, None if the adapter changed the tower
    shift: int = 0  # position of a token after the prefix, less the tokens before it: a picture may take few positions
    inputs: dict[str, Tensor] = field(default_factory=dict)  # the model inputs of a family that shares no prefix
    tower_dtype: torch.dtype | None = None  # as in `Shared`

    @property
    def size(self) -> int:
        return len(self.seeds)

    def part(self, rows: Sequence[int]) -> LocalEncoding:
        """The encoding of some of the pictures; this encoding is used up."""
        if self.cache is not None:
            self.cache.batch_select_indices(torch.tensor(rows, device=self.cache.layers[0].keys.device))
        states, seeds = tuple(s[list(rows)] for s in self.states), tuple(self.seeds[k] for k in rows)
        return replace(self, states=states, seeds=seeds, inputs={k: v[list(rows)] for k, v in self.inputs.items()})

    @property
    def shared(self) -> Shared | None:
        """The states for experts that read the tower, in fp32 on the CPU; a copy of 60 MB a face for a 7B model.

        None where an adapter itself changed the tower, as no expert was trained on it, and for families but LLaVA.
        """
        if self.tower is None or not self.states:
            return None
        return Shared(tuple(s.float().cpu() for s in self.states), self.tower, self.tower_dtype)


class Encoding(Protocol):
    """The result of `encode`: all that code outside of its model reads of it."""

    @property
    def size(self) -> int: ...
    @property
    def shared(self) -> Shared | None: ...  # as in `LocalEncoding`
    def part(self, rows: Sequence[int]) -> Encoding: ...  # some of the faces; this encoding is used up


class LanguageModel(Protocol):
    """The interface of an MLLM to a Detector: local (LocalMLLM) or served (x2dfd.served)."""

    name: str
    batch: int  # faces that go through it together

    def encode(self, crops: NDArray[np.uint8]) -> Encoding: ...  # [n, h, w, 3]
    def verdict_logits(self, encoding: Any, questions: Sequence[str]) -> NDArray[np.float64]: ...
    def write(
        self,
        encoding: Any,
        questions: Sequence[str],
        starts: Sequence[str],
        *,
        turns: Sequence[tuple[str, str]] = (),
        on_text: Callable[[str], None] | None = None,
        enough: Sequence[Callable[[str], bool]] = (),
    ) -> list[str]: ...
    def yes_no(self, crop: NDArray[np.uint8], questions: Sequence[str], /) -> YesNo: ...


class Suffix(NamedTuple):
    """The part of a prompt after the picture."""

    tokens: list[int]
    n_question: int  # tokens of the question; the rest begins the answer


@dataclass
class _DecodingState:
    """A batch of answers under way."""

    last: Tensor  # [n, d], hidden state of each row's last token
    cache: Any
    positions: Tensor  # [n, k], of each cached token in its row; -1 for padding


class LocalMLLM:
    """An image-text-to-text model of transformers, with or without an adapter; `name` identifies it.

    Labels are scored in fp32 in every precision. `temperature` is that of texts: 0 takes the likeliest token, else one
    is sampled with a seed from picture and question. `tower`: as in `LocalEncoding`.
    """

    batch = BATCH

    def __init__(
        self,
        model: Any,
        processor: Processor,
        name: str,
        *,
        temperature: float = 0.0,
        tower: str | None = "",
    ) -> None:
        self.temperature = temperature
        self.tower = tower
        self.name = name
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self._model = model.eval()
        self._family = family_of(model.config)
        self._text = model.get_decoder()
        self._head: Tensor = model.get_output_embeddings().weight
        self._softcap: float | None = getattr(self._text.config, "final_logit_softcapping", None)
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.label_ids = prompts.first_tokens(processor, prompts.STEM, prompts.LABEL_WORDS)  # real, fake
        self._yes_no_ids = prompts.first_tokens(processor, "", prompts.YES_NO_WORDS)
        # A hundred cue questions are the same for every picture. No caller writes into the result.
        self._suffix_of = lru_cache(maxsize=1024)(partial(after_image, processor))

    def save(self, folder: Path) -> None:
        """Write model and processor as a directory that `load_model` takes."""
        self._model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    # --- the shared prefix ---

    @torch.inference_mode()
    def encode(self, crops: NDArray[np.uint8]) -> LocalEncoding:
        """Encode aligned face crops [n, s, s, 3] once."""
        from transformers import DynamicCache

        seeds = seeds_of(crops)
        inputs = self._to_device(prefix_inputs(self.processor, crops, self._suffix(prompts.QUESTION).tokens))
        length = inputs["input_ids"].shape[1]
        if not self._family.shares:
            return LocalEncoding(None, length, (), seeds, self.tower, self._family.first_position, inputs)
        if self._family is FAMILIES["llava"]:  # the tower alone, which is enough for many verdicts
            tower = self._model.model.vision_tower
            states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
            return LocalEncoding(None, length, tuple(states), seeds, self.tower)
        cache = DynamicCache()  # every layer keeps every token: those with a window are given it by their mask
        self._model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        deltas = getattr(self._model.model, "rope_deltas", None)  # Qwen-VL: crops of one size have the same
        shift = self._family.first_position if deltas is None else int(deltas.flatten()[0])
        return LocalEncoding(cache, length, (), seeds, self.tower, shift)

    def _prefill(self, encoding: LocalEncoding) -> None:
        """Fill the cache with projector and language model over the prompt before the question, if that is not done."""
        from transformers import DynamicCache

        if encoding.cache is not None or not encoding.states:
            return
        config = self._model.config
        layers = config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        start = 1 if config.vision_feature_select_strategy == "default" else 0
        states = torch.cat([encoding.states[i][:, start:] for i in layers], -1)
        image = self._model.model.multi_modal_projector(states.to(self._model.dtype))  # `TowerPass` gives fp32
        tokens, _ = prompts.prompt_tokens(self.processor, prompts.render(self.processor, prompts.QUESTION))
        before = self._text.embed_tokens(torch.tensor(tokens, device=self.device)).expand(encoding.size, -1, -1)
        cache = DynamicCache()
        self._text(inputs_embeds=torch.cat([before, image], 1), past_key_values=cache, use_cache=True)
        encoding.cache, encoding.length = cache, len(tokens) + image.shape[1]

    def _to_device(self, inputs: Any) -> dict[str, Tensor]:
        return {k: v.to(self.device, self._model.dtype if v.is_floating_point() else None) for k, v in inputs.items()}

    def _suffix(self, question: str, start: str = "", turns: Sequence[tuple[str, str]] = ()) -> Suffix:
        return after_image(self.processor, question, start, turns) if turns else self._suffix_of(question, start)

    def _run_suffixes(self, encoding: LocalEncoding, suffixes: Sequence[Suffix]) -> _DecodingState:
        """Run one suffix a picture, right-padded. They stay in the encoding's cache until `_cut_cache`."""
        self._prefill(encoding)
        lengths = torch.tensor([len(s.tokens) for s in suffixes])
        steps = torch.arange(int(lengths.max()))
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(s.tokens) for s in suffixes], batch_first=True)
        tail = (encoding.length + steps).where(steps < lengths[:, None], -1)
        positions = torch.cat([torch.arange(encoding.length).expand(len(suffixes), -1), tail], 1).to(self.device)
        ids = ids.to(self.device)
        if encoding.cache is None:
            cache, hidden = self._full_pass(encoding, suffixes, ids)
        else:
            cache, queries = encoding.cache, (encoding.length + steps).expand_as(tail).to(self.device)
            hidden = self._forward(ids, queries, cache, positions, encoding.shift)
        last = hidden[torch.arange(len(suffixes)), lengths - 1]
        return _DecodingState(last, cache, positions)

    def _full_pass(self, encoding: LocalEncoding, suffixes: Sequence[Suffix], ids: Tensor) -> tuple[Any, Tensor]:
        """Picture and suffixes in one pass of the stock model: its cache, and the suffixes' hidden states [n, s, d]."""
        from transformers import DynamicCache

        steps = torch.arange(ids.shape[1], device=self.device).expand_as(ids)
        starts = torch.tensor([[s.n_question] for s in suffixes], device=self.device)
        ends = torch.tensor([[len(s.tokens)] for s in suffixes], device=self.device)
        extra = {"input_ids": ids, "attention_mask": (steps < ends).long(), "token_type_ids": (steps >= starts).long()}
        inputs = encoding.inputs | {k: torch.cat([encoding.inputs[k], v], 1) for k, v in extra.items()}
        cache = DynamicCache()
        hidden = self._model.model(**inputs, past_key_values=cache, use_cache=True).last_hidden_state
        return cache, hidden[:, encoding.length :]

    def _forward(
        self, ids: Tensor, queries: Tensor, cache: Any, positions: Tensor, shift: int, barred: Tensor | None = None
    ) -> Tensor:
        """Hidden states [n, s, d] of further tokens [n, s], which are the last of `positions` [n, k].

        A token sees the earlier ones of its row, without those that `barred` [s, k] hides from it. `queries` [n, s] are
        the tokens' own positions.
        """
        visible = (positions[:, None] >= 0) & (positions[:, None] <= queries[..., None])  # [n, s, k]
        if barred is not None:
            visible &= ~barred
        config = self._text.config
        mask: Any = self._mask(visible)
        if window := getattr(config, "sliding_window", None):
            windowed = self._mask(visible & (positions[:, None] > queries[..., None] - window))
            kinds = getattr(config, "layer_types", None)
            mask = {"full_attention": mask, "sliding_attention": windowed} if kinds else windowed
        output = self._text(
            input_ids=ids, position_ids=queries + shift, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _mask(self, visible: Tensor) -> Tensor:
        """The mask of visible tokens [n, s, k] in the form that the model's attention takes: [n, 1, s, k]."""
        if self._text.config._attn_implementation != "eager":  # eager: Gemma 2's, whose attention has a soft cap
            return visible[:, None]
        least = torch.finfo(self._model.dtype).min
        return torch.zeros_like(visible, dtype=self._model.dtype).masked_fill(~visible, least)[:, None]

    # --- verdict ---

    @torch.inference_mode()
    def verdict_logits(self, encoding: LocalEncoding, questions: Sequence[str]) -> NDArray[np.float64]:
        """Logit of fake against real for each picture's own question: [n]. NaN where the model's numbers overflow.

        The next-token distribution after the forced stem "This image is", restricted to the two labels.
        """
        state = self._run_suffixes(encoding, [self._suffix(q, prompts.STEM) for q in questions])
        self._cut_cache(encoding)
        real, fake = self._scores(state.last, self.label_ids).unbind(1)
        return np.asarray((fake - real).double().cpu().numpy())

    def _cut_cache(self, encoding: LocalEncoding) -> None:
        if encoding.cache is not None:
            encoding.cache.crop(encoding.length - encoding.cache.get_seq_length())

    def _scores(self, hidden: Tensor, ids: Sequence[int]) -> Tensor:
        """Logits of two tokens in fp32: in 16 bits their difference would be rounded to tenths."""
        return self._capped(hidden.to(self._head.device).float() @ self._head[list(ids)].float().T)

    def _capped(self, logits: Tensor) -> Tensor:
        return logits if self._softcap is None else (logits / self._softcap).tanh() * self._softcap

    # --- text ---

    @torch.inference_mode()
    def write(
        self,
        encoding: LocalEncoding,
        questions: Sequence[str],
        starts: Sequence[str],
        *,
        turns: Sequence[tuple[str, str]] = (),
        max_new_tokens: int = MAX_NEW_TOKENS,
        on_text: Callable[[str], None] | None = None,
        enough: Sequence[Callable[[str], bool]] = (),
    ) -> list[str]:
        """The new text that continues each picture's answer after its start.

        `on_text` gets the first picture's text so far after every token. An answer ends when a dozen tokens repeat, and
        when its text is `enough`, if there is such a check for each picture; a repeated sentence is kept once.
        """
        suffixes = [self._suffix(q, s, turns) for q, s in zip(questions, starts, strict=True)]
        state = self._run_suffixes(encoding, suffixes)
        n = len(suffixes)
        queries = torch.tensor([[encoding.length + len(s.tokens)] for s in suffixes], device=self.device)
        tokens_of: list[list[int]] = [[] for _ in range(n)]
        open_rows = [True] * n
        ends = self._end_ids()
        seeded = zip(encoding.seeds, suffixes, strict=True)
        generators = [torch.Generator().manual_seed(seed ^ crc32(repr(s.tokens).encode())) for seed, s in seeded]
        for _ in range(max_new_tokens):
            tokens = self._next(self._logits(state.last), generators)
            for row, token in enumerate(tokens.tolist()):
                if open_rows[row]:
                    tokens_of[row].append(token)
                    if token in ends or _repeats(tokens_of[row]):
                        open_rows[row] = False
                        del tokens_of[row][-1 if token in ends else -CIRCLE :]
                    elif enough and enough[row](self._text_of(tokens_of[row])):
                        open_rows[row] = False
            if on_text is not None:
                on_text(self._text_of(tokens_of[0]))
            if not any(open_rows):
                break
            state.positions = torch.cat([state.positions, queries], 1)
            state.last = self._forward(tokens[:, None], queries, state.cache, state.positions, encoding.shift)[:, -1]
            queries = queries + 1
        self._cut_cache(encoding)
        return [self._text_of(w) for w in tokens_of]

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits of the whole vocabulary, in the model's precision: [n, vocabulary]."""
        return self._capped(hidden.to(self._head.device) @ self._head.T).to(self.device)

    def _next(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """The next token of each picture: [n]. The unlikeliest tokens, together a tenth, are never sampled."""
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities, order = (logits.float() / self.temperature).softmax(-1).cpu().sort(descending=True)
        nucleus = probabilities.where(probabilities.cumsum(-1) - probabilities < TOP_P, 0)
        samples = [torch.multinomial(row, 1, generator=g) for row, g in zip(nucleus, generators, strict=True)]
        return order.gather(1, torch.stack(samples))[:, 0].to(logits.device)

    def _text_of(self, tokens: Sequence[int]) -> str:
        return said_once(self.tokenizer.decode(tokens, skip_special_tokens=True).strip())

    def _end_ids(self) -> set[int]:
        """Tokens that end an answer: those of training, and those of the checkpoint's generation_config."""
        ends = {self.tokenizer.eos_token_id, prompts.answer_end(self.processor)}
        eos_ids = getattr(self._model.generation_config, "eos_token_id", None)
        ends |= set(eos_ids) if isinstance(eos_ids, list | tuple) else {eos_ids}
        return {e for e in ends if e is not None and e != self.tokenizer.unk_token_id}

    # --- cue questions ---

    def yes_no(self, crop: NDArray[np.uint8], questions: Sequence[str]) -> YesNo:
        """Every question about one face crop, in packed passes over one prefix.

        One by one where the family shares no prefix. Raises InputError when the model's numbers are not finite.
        """
        return self.yes_no_packed(self.encode(crop[None]), questions)

    @torch.inference_mode()
    def yes_no_packed(self, encoding: LocalEncoding, questions: Sequence[str]) -> YesNo:
        """As `yes_no`, on the encoding of one picture."""
        if encoding.size != 1:
            raise ValueError(f"packed questions are about one picture, not {encoding.size}")
        self._prefill(encoding)
        p_yes_chunks: list[Tensor] = []
        answers: list[str] = []
        pack = PACK if encoding.cache is not None else 1
        for start in range(0, len(questions), pack):
            suffixes = [self._suffix(q) for q in questions[start : start + pack]]
            if pack > 1:
                hidden = self._packed(encoding, [s.tokens for s in suffixes])
            else:
                hidden = self._run_suffixes(encoding, suffixes).last
            p_yes_chunks.append(self._scores(hidden, self._yes_no_ids).double().softmax(-1)[:, 0].cpu())
            answers += [self._yes_or_no(t) for t in self._logits(hidden).argmax(-1).tolist()]
        p_yes = torch.cat(p_yes_chunks).numpy() if p_yes_chunks else np.zeros(0)
        if not np.isfinite(p_yes).all():
            raise InputError("no_score", NOT_FINITE)
        return YesNo(p_yes, tuple(answers))

    def _packed(self, encoding: LocalEncoding, suffixes: Sequence[list[int]]) -> Tensor:
        """Last hidden states of many suffixes of one picture, in one row in which none sees another."""
        lengths = torch.tensor([len(s) for s in suffixes])
        block = torch.repeat_interleave(torch.arange(len(suffixes)), lengths)
        barred = torch.nn.functional.pad(block[:, None] != block, (encoding.length, 0))  # nothing of the prefix
        queries = encoding.length + torch.cat([torch.arange(k) for k in lengths.tolist()])
        positions = torch.cat([torch.arange(encoding.length), queries])[None].to(self.device)
        ids = torch.tensor([[t for s in suffixes for t in s]], device=self.device)
        hidden = self._forward(
            ids, queries[None].to(self.device), encoding.cache, positions, encoding.shift, barred.to(self.device)
        )
        self._cut_cache(encoding)
        return hidden[0, lengths.cumsum(0) - 1]

    @torch.inference_mode()
    def yes_no_plain(self, crop: NDArray[np.uint8], questions: Sequence[str]) -> YesNo:
        """As `yes_no`, one by one through the stock forward pass: slow, to check the packed pass against."""
        p_yes, answers = [], []
        for question in questions:
            inputs = self._to_device(stock_inputs(self.processor, crop[None], question))
            logits = self._model(**inputs).logits[0, -1].float()
            p_yes.append(float(logits[list(self._yes_no_ids)].double().softmax(-1)[0]))
            answers.append(self._yes_or_no(int(logits.argmax())))
        return YesNo(np.array(p_yes), tuple(answers))

    def _yes_or_no(self, token: int) -> str:
        word = self.tokenizer.decode([token]).strip().lower()
        return word if word in ("yes", "no") else "other"


def seeds_of(crops: NDArray[np.uint8]) -> tuple[int, ...]:
    """`LocalEncoding.seeds` of crops [n, s, s, 3]."""
    return tuple(crc32(np.ascontiguousarray(c).data) for c in crops)


TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""The processor's outputs that have one entry a token."""


def stock_inputs(processor: Processor, crops: NDArray[np.uint8], question: str) -> dict[str, Tensor]:
    """The stock processor's inputs for one question about each of the pictures [n, h, w, 3], in its own precision."""
    from PIL import Image

    text = prompts.stock_text(processor, question)
    inputs = processor(
        images=[[Image.fromarray(c)] for c in crops],
        text=[text] * len(crops),
        return_tensors="pt",
        add_special_tokens=not prompts.begins(processor, text),
    )
    inputs.pop("labels", None)  # PaliGemma's processor is made for training
    return dict(inputs)


def prefix_inputs(processor: Processor, crops: NDArray[np.uint8], after: Sequence[int]) -> dict[str, Tensor]:
    """The stock processor's inputs up to the end of the picture, with which inference and training both begin.

    `after`: the tokens after the picture in `prompts.QUESTION`. Raises SetupError if the processor has others.
    """
    inputs = stock_inputs(processor, crops, prompts.QUESTION)
    end = inputs["input_ids"].shape[1] - len(after)
    if inputs["input_ids"][0, end:].tolist() != list(after):
        raise SetupError(
            f"{type(processor).__name__} changes the words after the picture; they cannot be scored",
            code="processor_changes_words",
        )
    return {k: v[:, :end] if k in TEXT_INPUTS else v for k, v in inputs.items()}


def after_image(processor: Processor, question: str, start: str = "", turns: Sequence[tuple[str, str]] = ()) -> Suffix:
    """The tokens of a prompt that follow the picture."""
    question_tokens, tokens = (
        prompts.prompt_tokens(processor, prompts.render(processor, question, text, turns))[1] for text in ("", start)
    )
    return Suffix(tokens, len(question_tokens) if start else len(tokens))


def said_once(text: str) -> str:
    """The text without repetitions of a sentence."""
    return " ".join(dict.fromkeys(re.split(r"(?<=[.!?])\s+", text)))


def _repeats(tokens: Sequence[int]) -> bool:
    """Whether the last `CIRCLE` tokens occurred before."""
    tail = list(tokens[-CIRCLE:])
    return any(list(tokens[i : i + CIRCLE]) == tail for i in range(len(tokens) - CIRCLE))
