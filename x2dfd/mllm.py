"""The multimodal LLM: score the verdict from the label tokens, write the rationale given it, answer cue questions.

The picture and what stands before it in the prompt are computed once (`look`); everything that is asked of it
afterwards runs over that cache, the many cue questions packed into few passes under a block-diagonal mask.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, get_args
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from x2dfd import prompts
from x2dfd.errors import SetupError, UnknownName
from x2dfd.fetch import BASE_NAME, require
from x2dfd.files import file_sha256

MAX_NEW_TOKENS = 80
CIRCLE = 12  # repeated tokens that end an answer; fewer are normal: an area or a colour is named twice
TOP_P = 0.9  # of what may be drawn, where texts are drawn at all (Holtzman et al., arXiv 1904.09751)
BATCH = 16  # faces in one pass
PACK = 25  # cue questions in one pass: bounds the mask's and the activations' size


Dtype = Literal["fp32", "bf16", "fp16"]
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class YesNo:
    """Answers to yes/no questions about one picture."""

    p_yes: NDArray[np.float64]  # [q], softmax over the Yes and No tokens
    said: tuple[str, ...]  # the greedy first token: "yes", "no" or "other"


@dataclass(eq=False)
class Look:
    """A batch of pictures after their one pass through the tower; the language model's follows when it is asked."""

    image: Tensor  # [n, patches, hidden]: the projector's output
    states: tuple[Tensor, ...]  # hidden states of the vision tower, embeddings first, where they were computed
    seeds: tuple[int, ...] = ()  # of each picture, from its pixels: what its texts are drawn with
    tower: str | None = ""  # SHA-256 of the tower's additions; "" without, None where the adapter changed it itself
    cache: Any = None  # transformers' DynamicCache over the prefix, batch n, once it was computed
    length: int = 0  # tokens of the prefix

    @property
    def size(self) -> int:
        return int(self.states[0].shape[0])

    @property
    def tower_states(self) -> tuple[Tensor, ...] | None:
        """For the experts that read them: fp32 on the CPU. Moved when asked for: of a 7B model 60 MB a face.

        None of a tower that an adapter changed itself: no expert was trained on what it gives.
        """
        return None if self.tower is None else tuple(s.float().cpu() for s in self.states)


def _inference(method: Callable[P, T]) -> Callable[P, T]:
    """Without gradients, in the model's precision."""

    @wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        mllm: Any = args[0]
        with torch.inference_mode(), torch.autocast(mllm.device.type, torch.bfloat16, enabled=mllm.autocast):
            return method(*args, **kwargs)

    return run


class LocalMLLM:
    """A LLaVA of transformers, with or without an adapter. `name` says which.

    `autocast`: matrix products in bf16 over the weights as they are. Labels are scored in fp32 all the same.
    `temperature`: of texts; 0 takes the likeliest token, else one is drawn with a seed of picture and question, so that
    the same picture gets the same text, whatever is asked beside it. `tower`: as in `Look`.
    """

    batch = BATCH

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str,
        *,
        autocast: bool = False,
        temperature: float = 0.0,
        tower: str | None = "",
    ) -> None:
        self.autocast = autocast
        self.temperature = temperature
        self.tower = tower
        self.name = name
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self._llava = model.eval()
        self._text = model.model.language_model
        self._head: Tensor = model.lm_head.weight
        self.device = self._head.device
        self.label_ids = prompts.first_tokens(processor, prompts.STEM, prompts.LABEL_WORDS)  # real, fake
        self._yes_no_ids = prompts.first_tokens(processor, "", prompts.YES_NO_WORDS)
        # A hundred cue questions are the same for every picture. Nobody writes into what it returns.
        self._rendered = lru_cache(maxsize=1024)(partial(_after_image, processor))
        self._before_image, _ = prompts.prompt_tokens(processor, prompts.render(processor, prompts.QUESTION))

    def save(self, folder: Path) -> None:
        """Write model and processor as a directory that `load_llava` takes."""
        self._llava.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    # --- the shared prefix ---

    @_inference
    def look(self, crops: NDArray[np.uint8]) -> Look:
        """Encode aligned face crops [n, 224, 224, 3] once."""
        from PIL import Image

        images = [Image.fromarray(c) for c in crops]
        pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"].to(self._head)
        states = self._llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        layers = self._llava.config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        first = 1 if self._llava.config.vision_feature_select_strategy == "default" else 0
        features = torch.cat([states[i][:, first:] for i in layers], -1)
        image = self._llava.model.multi_modal_projector(features)  # [n, patches, hidden]
        seeds = tuple(crc32(np.ascontiguousarray(c).data) for c in crops)
        return Look(image, tuple(states), seeds, self.tower)

    def _prefix(self, look: Look) -> Look:
        """The look with the language model's pass over what stands before the question; computed once.

        A verdict that does not need the language model never pays for it.
        """
        from transformers import DynamicCache

        if look.cache is None:
            before = self._text.embed_tokens(torch.tensor(self._before_image, device=self.device))
            embeds = torch.cat([before.expand(look.size, -1, -1), look.image], 1)
            cache = DynamicCache(config=self._text.config)
            self._text(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
            look.cache, look.length = cache, embeds.shape[1]
        return look

    def _suffix(self, question: str, start: str = "", turns: Sequence[tuple[str, str]] = ()) -> list[int]:
        return _after_image(self.processor, question, start, turns) if turns else self._rendered(question, start)

    def _after(self, look: Look, suffixes: Sequence[Sequence[int]], keep: bool = False) -> tuple[Tensor, Tensor]:
        """One suffix a picture, right-padded: hidden states [n, s, d] and the attention mask over the cache [n, p + s].

        The cache is cut back to the prefix unless `keep`.
        """
        look, longest = self._prefix(look), max(map(len, suffixes))
        ids = torch.zeros(len(suffixes), longest, dtype=torch.long)
        mask = torch.ones(len(suffixes), look.length + longest, dtype=torch.long)
        for row, suffix in enumerate(suffixes):
            ids[row, : len(suffix)] = torch.tensor(suffix)
            mask[row, look.length + len(suffix) :] = 0
        mask = mask.to(self.device)
        hidden = self._text(
            input_ids=ids.to(self.device),
            position_ids=(look.length + torch.arange(longest, device=self.device)).expand(len(suffixes), -1),
            attention_mask=mask,
            past_key_values=look.cache,
            use_cache=True,
        ).last_hidden_state
        if not keep:
            look.cache.crop(-longest)
        return hidden, mask

    # --- verdict ---

    @_inference
    def verdict_logits(self, look: Look, questions: Sequence[str]) -> NDArray[np.float64]:
        """Logit of fake against real for each picture's own question: [n].

        The next-token distribution after the forced stem "This image is", restricted to the two labels.
        """
        suffixes = [self._suffix(q, prompts.STEM) for q in questions]
        hidden, _ = self._after(look, suffixes)
        last = hidden[torch.arange(len(suffixes)), torch.tensor([len(s) - 1 for s in suffixes])]
        real, fake = self._scores(last, self.label_ids).unbind(1)
        return np.asarray((fake - real).double().cpu().numpy())

    def _scores(self, hidden: Tensor, ids: Sequence[int]) -> Tensor:
        """Logits of two tokens in fp32: in 16 bits their difference would move in steps of a tenth."""
        with torch.autocast(self.device.type, enabled=False):
            return hidden.float() @ self._head[list(ids)].float().T

    # --- text ---

    @_inference
    def write(
        self,
        look: Look,
        questions: Sequence[str],
        starts: Sequence[str],
        *,
        turns: Sequence[tuple[str, str]] = (),
        max_new_tokens: int = MAX_NEW_TOKENS,
        on_text: Callable[[str], None] | None = None,
    ) -> list[str]:
        """The continuation of each picture's answer after its `start`: the new text alone.

        `on_text` is told the text so far (of the first picture) after every token. An answer ends when a dozen tokens
        repeat: a small model that goes round in circles has nothing more to say. A sentence that it says twice is kept
        once.
        """
        suffixes = [self._suffix(q, s, turns) for q, s in zip(questions, starts, strict=True)]
        hidden, mask = self._after(look, suffixes, keep=True)
        longest, n = hidden.shape[1], len(suffixes)
        positions = torch.tensor([look.length + len(s) for s in suffixes], device=self.device)
        last = hidden[torch.arange(n), positions - look.length - 1]
        written: list[list[int]] = [[] for _ in range(n)]
        open_rows = [True] * n
        ends = self._end_ids()
        added = longest
        asked = zip(look.seeds, suffixes, strict=True)
        draws = [torch.Generator().manual_seed(seed ^ crc32(repr(list(s)).encode())) for seed, s in asked]
        for _ in range(max_new_tokens):
            tokens = self._next(last @ self._head.T, draws)
            for row, token in enumerate(tokens.tolist()):
                if open_rows[row]:
                    written[row].append(token)
                    if token in ends or _repeats(written[row]):
                        open_rows[row] = False
                        del written[row][-1 if token in ends else -CIRCLE :]
            if on_text is not None:
                on_text(self._text_of(written[0]))
            if not any(open_rows):
                break
            mask = torch.cat([mask, mask.new_ones(n, 1)], 1)
            out = self._text(
                input_ids=tokens[:, None],
                position_ids=positions[:, None],
                attention_mask=mask,
                past_key_values=look.cache,
                use_cache=True,
            )
            last, positions, added = out.last_hidden_state[:, -1], positions + 1, added + 1
        look.cache.crop(-added)
        return [self._text_of(w) for w in written]

    def _next(self, logits: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
        """The next token of each picture: [n]. Of unlikely tokens, the last tenth of the probability, none is drawn."""
        if self.temperature == 0:
            return logits.argmax(-1)
        chances, order = (logits.float() / self.temperature).softmax(-1).cpu().sort(descending=True)
        kept = chances.where(chances.cumsum(-1) - chances < TOP_P, 0)
        drawn = [torch.multinomial(row, 1, generator=draw) for row, draw in zip(kept, draws, strict=True)]
        return order.gather(1, torch.stack(drawn))[:, 0].to(logits.device)

    def _text_of(self, tokens: Sequence[int]) -> str:
        return said_once(self.tokenizer.decode(tokens, skip_special_tokens=True).strip())

    def _end_ids(self) -> set[int]:
        ends = {self.tokenizer.eos_token_id, self.tokenizer.convert_tokens_to_ids("<|im_end|>")}
        return {e for e in ends if e is not None and e != self.tokenizer.unk_token_id}

    # --- cue questions ---

    def yes_no(self, crop: NDArray[np.uint8], questions: Sequence[str]) -> YesNo:
        """Every question about one face crop, in packed passes over one prefix."""
        return self.yes_no_packed(self.look(crop[None]), questions)

    @_inference
    def yes_no_packed(self, look: Look, questions: Sequence[str]) -> YesNo:
        """As `yes_no`, on a look at one picture."""
        if look.size != 1:
            raise ValueError(f"packed questions are about one picture, not {look.size}")
        look = self._prefix(look)
        chances: list[Tensor] = []
        said: list[str] = []
        for start in range(0, len(questions), PACK):
            suffixes = [self._suffix(q) for q in questions[start : start + PACK]]
            lengths = [len(s) for s in suffixes]
            total = sum(lengths)
            block = torch.repeat_interleave(torch.arange(len(suffixes)), torch.tensor(lengths))
            own = (block[:, None] == block[None]) & torch.ones(total, total, dtype=torch.bool).tril()
            mask = torch.cat([torch.ones(total, look.length, dtype=torch.bool), own], 1)[None, None]
            hidden = self._text(
                input_ids=torch.tensor([[t for s in suffixes for t in s]], device=self.device),
                position_ids=look.length + torch.cat([torch.arange(k) for k in lengths])[None].to(self.device),
                attention_mask=mask.to(self.device),
                past_key_values=look.cache,
                use_cache=True,
            ).last_hidden_state[0]
            look.cache.crop(-total)
            last = hidden[torch.tensor(lengths).cumsum(0) - 1]
            logits = last @ self._head.T  # [questions, vocabulary]
            exact = logits.dtype == torch.float32
            scores = logits[:, list(self._yes_no_ids)] if exact else self._scores(last, self._yes_no_ids)
            chances.append(scores.double().softmax(-1)[:, 0].cpu())
            said += [self._yes_or_no(t) for t in logits.argmax(-1).tolist()]
        return YesNo(torch.cat(chances).numpy() if chances else np.zeros(0), tuple(said))

    @_inference
    def yes_no_plain(self, crop: NDArray[np.uint8], questions: Sequence[str]) -> YesNo:
        """The same one by one through the stock forward pass: slow; the oracle of the packed pass."""
        from PIL import Image

        p_yes, said = [], []
        for question in questions:
            inputs = self.processor(
                images=Image.fromarray(crop), text=prompts.render(self.processor, question), return_tensors="pt"
            ).to(self.device, self._head.dtype)
            logits = self._llava(**inputs).logits[0, -1].float()
            p_yes.append(float(logits[list(self._yes_no_ids)].double().softmax(-1)[0]))
            said.append(self._yes_or_no(int(logits.argmax())))
        return YesNo(np.array(p_yes), tuple(said))

    def _yes_or_no(self, token: int) -> str:
        word = self.tokenizer.decode([token]).strip().lower()
        return word if word in ("yes", "no") else "other"


def _after_image(processor: Any, question: str, start: str = "", turns: Sequence[tuple[str, str]] = ()) -> list[int]:
    """The tokens of a prompt that follow the picture."""
    return prompts.prompt_tokens(processor, prompts.render(processor, question, start, turns))[1]


def said_once(text: str) -> str:
    """The text without the sentences that stood in it before."""
    return " ".join(dict.fromkeys(re.split(r"(?<=[.!?])\s+", text)))


def _repeats(tokens: Sequence[int]) -> bool:
    """The last `CIRCLE` tokens stood there before."""
    tail = list(tokens[-CIRCLE:])
    return any(list(tokens[i : i + CIRCLE]) == tail for i in range(len(tokens) - CIRCLE))


def choose_device(device: str | None, dtype: str | None) -> tuple[torch.device, Dtype]:
    """Where and how to compute: by default a CUDA device with bf16 where there is one, else the CPU with fp32.

    Raises SetupError for a device that is not there or that does not compute so, and UnknownName.
    """
    if dtype is not None and dtype not in get_args(Dtype):
        raise UnknownName("dtype", dtype, get_args(Dtype))
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise SetupError(f"{device!r} is no device; give cpu, cuda, or cuda:1 and so on") from error
    if place.type == "cuda" and (not torch.cuda.is_available() or (place.index or 0) >= torch.cuda.device_count()):
        raise SetupError(f"there is no {place} here (torch {torch.__version__}); take --device cpu")
    if place.type not in ("cpu", "cuda"):
        raise SetupError(f"{place.type} is not supported; take cpu or cuda")
    if place.type == "cpu":
        if dtype == "fp16":
            raise SetupError("fp16 needs a CUDA device; take fp32, or bf16")
        return place, "bf16" if dtype == "bf16" else "fp32"
    if dtype is None:
        return place, "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return place, "fp32" if dtype == "fp32" else "bf16" if dtype == "bf16" else "fp16"


def load_llava(
    base: str | Path | None = None,
    *,
    tower_layers: int | None = None,
    text_layers: int | Sequence[int] | None = None,
    feature_layers: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Any, Any]:
    """A LLaVA model and its processor: the embedded base (None), a directory, or a hub name.

    Only the first `tower_layers` and `text_layers` layers are kept (or, given as a list, just those language layers:
    which ones go matters more than how many), and the tower's outputs after `feature_layers` are joined as the
    projector's input. The embedded base has no projector: it starts at random (seed 0) until an adapter
    brings one. `options`: further ones of `from_pretrained` (attn_implementation, quantization_config).
    Raises SetupError when the model cannot be read, is no LLaVA, or when anything else is missing, left
    over or of another shape.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, LlavaForConditionalGeneration, LlavaProcessor

    folder = require("base") if base is None else base
    unreadable = f"{folder} cannot be loaded; give a LLaVA directory or hub name (llava-hf/llava-1.5-7b-hf ...)"
    try:
        config: Any = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise SetupError(f"{unreadable}: {error}") from error
    if config.model_type != "llava":
        raise SetupError(f"{folder} is a {config.model_type!r} model; {unreadable}")
    if tower_layers is not None:
        config.vision_config.num_hidden_layers = tower_layers
    chosen = None if text_layers is None or isinstance(text_layers, int) else [int(k) for k in text_layers]
    known = range(config.text_config.num_hidden_layers)
    if chosen is not None and (not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(known)):
        raise SetupError(f"text layers {chosen} of {len(known)}: each once, and only those that there are")
    if isinstance(text_layers, int):
        config.text_config.num_hidden_layers = text_layers
        if getattr(config.text_config, "layer_types", None):
            config.text_config.layer_types = config.text_config.layer_types[:text_layers]
    if feature_layers is not None:
        config.vision_feature_layer = list(feature_layers)
    layers = config.vision_feature_layer
    tower = int(config.vision_config.num_hidden_layers)
    if any(not -tower <= layer <= tower for layer in ([layers] if isinstance(layers, int) else layers)):
        raise SetupError(f"feature layers {layers} of a tower with {tower} layers: there are none such")
    stock: Any = LlavaForConditionalGeneration
    try:
        with quietly(), torch.random.fork_rng():  # dropped layers are expected; what is not is checked below
            torch.manual_seed(0)
            model, info = stock.from_pretrained(
                folder, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        processor = LlavaProcessor.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise SetupError(f"{unreadable}: {error}") from error
    # The embedded base has no projector.
    odd = {k for k in info["missing_keys"] if base is not None or "multi_modal_projector" not in k}
    odd |= {k for k in info["unexpected_keys"] if not _dropped(k, config)}
    odd |= {str(k[0]) for k in info["mismatched_keys"]}
    if odd:
        raise SetupError(f"{folder} does not fit its configuration: {', '.join(sorted(odd)[:4])} ({len(odd)} in all)")
    if chosen is not None:
        _keep_text_layers(model, chosen)
    return model, processor


def _keep_text_layers(model: Any, chosen: Sequence[int]) -> None:
    """Leave only the language layers of the given numbers, in that order."""
    text = model.model.language_model
    text.layers = torch.nn.ModuleList([text.layers[k] for k in chosen])
    for place, layer in enumerate(text.layers):
        layer.self_attn.layer_idx = place  # where its keys and values stand in the cache
    for config in (text.config, model.config.text_config):
        if len(getattr(config, "layer_types", None) or ()) > len(chosen):
            config.layer_types = [config.layer_types[k] for k in chosen]
        config.num_hidden_layers = len(chosen)


@contextmanager
def quietly() -> Iterator[None]:
    """Without the progress bar and the loading report of transformers."""
    from transformers.utils import logging

    level, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if progress:
            logging.enable_progress_bar()


def _dropped(key: str, config: Any) -> bool:
    """The key belongs to a layer that the configuration leaves out."""
    for part, kept in (("vision_tower", config.vision_config), ("language_model", config.text_config)):
        if part in key and ".layers." in key:
            return int(key.split(".layers.")[1].split(".")[0]) >= int(kept.num_hidden_layers)
    return False


def base_identity(base: str | Path | None) -> dict[str, str]:
    """Name and SHA-256 of a base model's weights; the hash is "" for a hub name (its revision stands for it)."""
    import hashlib

    if base is None:
        return {"name": BASE_NAME, "sha256": file_sha256(require("base") / "model.safetensors")}
    files = sorted(Path(base).glob("*.safetensors")) if Path(base).is_dir() else []
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return {"name": str(base) if not files else Path(base).name, "sha256": digest.hexdigest() if files else ""}
