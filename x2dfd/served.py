"""An MLLM behind an OpenAI-compatible endpoint (vLLM, SGLang, a hosted API), with the methods of a local one.

P(fake) and P(yes) are read from the log-probabilities of the answer's first token; texts are generated. The constant
parts of every prompt come first (system, picture, instruction, question), so that the endpoint's prefix cache hits.
The key comes from OPENAI_API_KEY and is neither stored nor shown.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import math
import os
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from x2dfd import prompts
from x2dfd.addresses import is_loopback, parsed
from x2dfd.errors import InputError, SetupError, UnknownName
from x2dfd.files import Json
from x2dfd.mllm import YesNo

CONCURRENCY = 32  # requests at a time
TOP_TOKENS = 20  # likeliest first tokens that are asked for, the maximum of hosted APIs
FEW_TOKENS = 5  # the maximum of some
MIN_LOGPROB = math.log(1e-4)  # of the likelier label; with less, an instructed model has answered something else
MAX_TOKENS = 200
REPLY_BYTES = 8 << 20  # of one reply; twenty log-probabilities take a few thousand
FAILURES_IN_A_ROW = 8
"""So many requests that failed one after another, each after its retries, end the run: the endpoint is down."""
REFUSALS_FIRST = 50  # refused requests that end the run when none was answered before: the endpoint refuses all
CONTINUING_ENGINES = ("vllm", "sglang")
"""Engines (`owned_by` in their model list) that continue a given beginning of the answer, as in training."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Pictures:
    """Face crops in the form that is sent to the endpoint."""

    urls: tuple[str, ...]  # data:image/png;base64,...
    shared: None = None  # the endpoint keeps its vision tower to itself

    @property
    def size(self) -> int:
        return len(self.urls)

    def part(self, rows: Sequence[int]) -> Pictures:
        """Some of the pictures."""
        return Pictures(tuple(self.urls[k] for k in rows))


@dataclass(frozen=True)
class _Reply:
    """The parts of a chat completion that are used."""

    text: str
    first: dict[str, float]  # log-probabilities of the likeliest first tokens; {} where the endpoint gives none

    @classmethod
    def of(cls, completion: Any) -> _Reply:
        """Raises AttributeError, TypeError, ValueError, KeyError or IndexError for any other shape."""
        choice = completion.choices[0]
        content = getattr(getattr(choice, "logprobs", None), "content", None) or ()
        tokens = [*(content[0].top_logprobs or ()), content[0]] if content else []
        first = {str(t.token): float(t.logprob) for t in tokens}
        text = str(choice.message.content or "")
        if any(getattr(choice.message, k, None) for k in ("reasoning_content", "reasoning")):
            text = f"{THINKS}{text}"
        return cls(text, {token: p for token, p in first.items() if math.isfinite(p)})


THINKS = "<think>"
"""The beginning of a reasoning model's answer."""


@dataclass(frozen=True)
class _Dialect:
    """The options of a request in which endpoints differ."""

    limit: str = "max_tokens"
    temperature: bool = True
    top: int = TOP_TOKENS

    def options(self, tokens: int, scored: bool) -> Json:
        options: Json = {self.limit: tokens}
        if self.temperature:
            options["temperature"] = 0
        return options | ({"logprobs": True, "top_logprobs": self.top} if scored else {})

    def after(self, refusal: str) -> _Dialect:
        """The options for another try after a refusal; the same ones where its reason is not known."""
        message = refusal.lower()
        if "max_completion_tokens" in message and self.limit == "max_tokens":
            return replace(self, limit="max_completion_tokens")
        if "temperature" in message and self.temperature:
            return replace(self, temperature=False)
        if "top_logprobs" in message and self.top > FEW_TOKENS:
            return replace(self, top=FEW_TOKENS)
        return self


class ServedMLLM:
    """A model of an OpenAI-compatible endpoint.

    An engine that continues the beginning of an answer gets the prompts of training; any other gets instructions on
    what to answer. Raises SetupError when it cannot be asked, and UnknownName when it does not serve `model`.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        continues: bool | None = None,
        closer: bool = False,
        concurrency: int = CONCURRENCY,
        retries: int = 5,
        timeout: float = 60.0,
        requests_per_minute: float | None = None,
    ) -> None:
        """`continues`: None asks the endpoint. `closer`: send `closer` views, for a forensic tower. `timeout`: seconds
        for one try, reading its reply included. `retries`: with growing pauses. `requests_per_minute`: a limit on
        tries, spread evenly; None: no limit.
        """
        if requests_per_minute is not None and requests_per_minute <= 0:
            raise SetupError(f"requests per minute: a number above 0, not {requests_per_minute}", code="option_invalid")
        address = parsed(url)
        if address is None or address.scheme not in ("http", "https") or address.username or address.password:
            raise SetupError(
                "a served model needs an address such as http://localhost:8000/v1; a key belongs in OPENAI_API_KEY",
                code="address_missing",
            )
        try:
            import openai
        except ImportError as error:
            raise SetupError(
                "a served model needs the package openai: pip install 'x2dfd[serve]'", code="package_missing"
            ) from error
        self.name = f"served:{model}"
        self.host = address.netloc
        self.batch = concurrency  # faces whose requests run together
        self._closer = closer
        self._model = model
        self._openai = openai
        self._key = os.environ.get("OPENAI_API_KEY", "")
        self._root = url.rstrip("/").removesuffix("/v1")
        self._dialect = _Dialect()
        self._adds_bos = False
        self._failures = self._refusals = 0
        self._answered = False
        # A loop in a thread of its own: it also works where the caller runs one (notebooks, the demo), and keeps
        # connections open from call to call.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=_run_loop, args=(self._loop,), daemon=True, name="x2dfd-served").start()
        self._slots = asyncio.Semaphore(concurrency)
        self._client = openai.AsyncOpenAI(
            base_url=url,
            api_key=self._key or "none",
            timeout=timeout,
            max_retries=retries,
            http_client=_http_client(openai, str(address.hostname), timeout, 60 / (requests_per_minute or math.inf)),
        )
        self.close = weakref.finalize(self, _close, self._loop, self._client)
        engine = self._run(self._engine())
        self.continues = engine in CONTINUING_ENGINES if continues is None else continues
        self._label_ids, self._yes_no_ids = (
            self._run(self._token_ids()) if self.continues and engine is not None else (None, None)
        )

    @property
    def prompt_sha256(self) -> str:
        """SHA-256 over the messages of every kind of prompt."""
        forms = [
            self._messages("URL", prompts.QUESTION, prompts.STEM, instruction=prompts.SERVED_VERDICT),
            self._messages("URL", prompts.QUESTION, prompts.rationale_start("fake")),
            self._messages("URL", f"Do you see it? {prompts.CUE_ENDING}"),
            self._messages("URL", prompts.QUESTION, turns=[("Answer.", "And?")]),
        ]
        return hashlib.sha256(json.dumps(forms).encode()).hexdigest()

    # --- for detector and assessment ---

    def encode(self, crops: NDArray[np.uint8]) -> Pictures:
        """Face crops [n, h, w, 3], encoded without loss for the endpoint."""
        from PIL import Image

        if self._closer:
            import torch

            from x2dfd.tower import closer

            views = closer(torch.from_numpy(np.array(crops)).permute(0, 3, 1, 2).float())
            crops = views.clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()
        urls = []
        for crop in crops:
            buffer = io.BytesIO()
            Image.fromarray(crop).save(buffer, "PNG", compress_level=1)
            urls.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
        return Pictures(tuple(urls))

    def verdict_logits(self, encoding: Pictures, questions: Sequence[str]) -> NDArray[np.float64]:
        """Logit of fake against real for each picture's own question: [n].

        A label that is not among the likeliest tokens counts as the least likely of them, which draws the logit
        towards zero. Raises InputError when neither is there.
        """

        async def logit(url: str, question: str) -> float:
            messages = self._messages(url, question, prompts.STEM, instruction=prompts.SERVED_VERDICT)
            reply = await self._first_token(messages, self._label_ids)
            real, fake = _logprobs(reply, prompts.LABEL_WORDS)
            # A model that continues a given beginning has its labels compared however unlikely both are, as locally.
            if real is None or fake is None or (max(real, fake) < MIN_LOGPROB and not self.continues):
                raise InputError(
                    "no_label",
                    f"{self.name} begins with {reply.text[:40]!r} and finds neither real nor fake likely",
                )
            return fake - real

        return np.array(self._gather([logit(u, q) for u, q in zip(encoding.urls, questions, strict=True)]), np.float64)

    def write(
        self,
        encoding: Pictures,
        questions: Sequence[str],
        starts: Sequence[str],
        *,
        turns: Sequence[tuple[str, str]] = (),
        max_new_tokens: int = MAX_TOKENS,
        on_text: Callable[[str], None] | None = None,
        enough: Sequence[Callable[[str], bool]] = (),
    ) -> list[str]:
        """The continuation of each `start`, without it. `on_text` is called once, with the whole first one. `enough` is
        not asked: every answer comes whole."""

        async def continuation(url: str, question: str, start: str) -> str:
            messages = self._messages(url, question, start, turns=turns)
            reply = await self._ask(messages, max_new_tokens)
            return reply.text.strip().removeprefix(start).strip()

        arguments = zip(encoding.urls, questions, starts, strict=True)
        texts = self._gather([continuation(u, q, s) for u, q, s in arguments])
        if on_text is not None and texts:
            on_text(texts[0])
        return texts

    def yes_no(self, crop: NDArray[np.uint8], questions: Sequence[str]) -> YesNo:
        """P(yes) and first word for every question about one face crop; 0.5 where neither yes nor no is likely."""
        [url] = self.encode(crop[None]).urls

        async def answer(question: str) -> tuple[float, str]:
            reply = await self._first_token(self._messages(url, question), self._yes_no_ids)
            yes, no = _logprobs(reply, prompts.YES_NO_WORDS)
            word = _bare(reply.text).rstrip(".,!")
            p = 0.5 if yes is None or no is None else 1 / (1 + math.exp(min(no - yes, 700.0)))
            return p, word if word in ("yes", "no") else "other"

        answers = self._gather([answer(q) for q in questions])
        return YesNo(np.array([p for p, _ in answers], np.float64), tuple(word for _, word in answers))

    # --- prompts ---

    def _messages(
        self, url: str, question: str, start: str = "", *, turns: Sequence[tuple[str, str]] = (), instruction: str = ""
    ) -> list[Json]:
        messages = prompts.conversation(question, turns)
        picture = {"type": "image_url", "image_url": {"url": url}}
        messages[0]["content"] = [picture, *messages[0]["content"][1:]]
        if self.continues:
            return [*messages, {"role": "assistant", "content": start}] if start else messages
        if start and not instruction:
            instruction = prompts.SERVED_RATIONALE.format(start=start)
        if instruction:
            messages[0]["content"].insert(1, {"type": "text", "text": instruction})
        return [{"role": "system", "content": prompts.SERVED_SYSTEM}, *messages]

    # --- requests ---

    def _run(self, job: Coroutine[object, object, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(job, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _gather(self, jobs: Sequence[Coroutine[object, object, T]]) -> list[T]:
        """The results of all jobs, in order; the first that fails cancels the others."""

        async def gathered() -> list[T]:
            tasks = [asyncio.ensure_future(job) for job in jobs]
            try:
                return await asyncio.gather(*tasks)
            except BaseException:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                raise

        return self._run(gathered())

    async def _first_token(self, messages: list[Json], ids: list[int] | None) -> _Reply:
        """A reply of one token with log-probabilities, of the tokens `ids` where the engine can restrict them."""
        reply = await self._ask(messages, 1, {"logprob_token_ids": ids} if ids else {}, scored=True)
        if not reply.first:
            raise SetupError(
                f"{self.host} gives no log-probabilities for {self._model!r}, so nothing can be scored: serve it with "
                "vLLM or SGLang, or choose a model whose API has logprobs",
                code="log_probabilities_missing",
            )
        return reply

    async def _ask(
        self, messages: list[Json], tokens: int, extra: Json | None = None, *, scored: bool = False
    ) -> _Reply:
        body = dict(extra or {})
        if messages[-1]["role"] == "assistant":
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        if self._adds_bos:
            body["add_special_tokens"] = True

        async def create() -> Any:
            while True:
                dialect = self._dialect
                try:
                    return await self._client.chat.completions.create(
                        model=self._model, messages=messages, extra_body=body or None, **dialect.options(tokens, scored)
                    )
                except (self._openai.BadRequestError, self._openai.UnprocessableEntityError) as error:
                    if self._dialect == dialect:  # another request may have changed it meanwhile
                        self._dialect = dialect.after(str(error))
                    if self._dialect == dialect:
                        raise

        async with self._slots:
            reply = await self._call(create)
        try:
            parsed = _Reply.of(reply)
        except (AttributeError, TypeError, ValueError, KeyError, IndexError):
            raise InputError(
                "endpoint_reply", f"{self.host} answered with something that is not a chat completion"
            ) from None
        if parsed.text.lstrip().startswith(THINKS):
            raise SetupError(
                f"{self._model!r} reasons before it answers, so nothing can be scored: serve its Instruct variant, or "
                "switch reasoning off at the server",
                code="model_thinks",
            )
        self._answered = True
        return parsed

    async def _call(self, call: Callable[[], Any]) -> Any:
        """The reply, its failures as our own errors: SetupError ends a run, InputError becomes one file's row."""
        api = self._openai
        try:
            reply = await call()
        except (ValueError, RecursionError):  # of the JSON parser, about the endpoint's reply
            self._count_failure("a reply that is not JSON")
            raise InputError("endpoint_reply", f"{self.host} answered with something that is not JSON") from None
        except (api.APITimeoutError, api.APIStatusError, api.APIResponseValidationError) as error:
            message = self._message(error)
            status = getattr(error, "status_code", None)
            if status is not None and 300 <= status < 400:
                raise SetupError(
                    f"{self.host} redirects to {error.response.headers.get('location')}. Face crops go only to the "
                    "address that you name: name that one, if you trust it",
                    code="redirected",
                ) from None
            if status in (401, 403):
                raise SetupError(
                    f"{self.host} refuses the key: set OPENAI_API_KEY ({message})", code="key_refused"
                ) from None
            if status == 404:
                raise SetupError(
                    f"{self.host} has no model {self._model!r}, or no such address (it ends in /v1 mostly): {message}",
                    code="model_not_served",
                ) from None
            if status in (400, 422) and "logprob" in message.lower():
                raise SetupError(
                    f"{self.host} gives no log-probabilities for {self._model!r}: {message}",
                    code="log_probabilities_missing",
                ) from None
            if status in (400, 413, 422):  # the endpoint is up, but may refuse every request
                self._failures, self._refusals = 0, self._refusals + 1
                if self._refusals >= REFUSALS_FIRST and not self._answered:
                    raise SetupError(
                        f"{self.host} refused the first {self._refusals} requests, last: {message}. Does "
                        f"{self._model!r} take pictures, and is its context long enough?",
                        code="requests_refused",
                    ) from None
            else:
                self._count_failure(message)
            if isinstance(error, api.APITimeoutError):
                raise InputError("endpoint_timeout", f"{self.host} gave no answer in time") from None
            raise InputError("endpoint_error", f"{self.host}: {message}") from None
        except api.APIConnectionError as error:
            raise SetupError(
                f"{self.host} cannot be reached ({self._message(error.__cause__ or error)}). Is the server up?",
                code="endpoint_unreachable",
            ) from None
        self._failures = 0
        return reply

    def _count_failure(self, message: str) -> None:
        """Raises SetupError after FAILURES_IN_A_ROW of them."""
        self._failures += 1
        if self._failures >= FAILURES_IN_A_ROW:
            raise SetupError(
                f"{self.host} failed {self._failures} times in a row, last: {message}. Run again when it answers",
                code="endpoint_failing",
            ) from None

    def _message(self, error: BaseException) -> str:
        text = f"{type(error).__name__}: {error}"
        if self._key:
            text = text.replace(self._key, "***")  # some servers repeat the key that they refuse
        return text[:300]

    # --- facts about the endpoint ---

    async def _engine(self) -> str | None:
        """`owned_by` of the model in the endpoint's list; None when it has no list."""
        list_models = self._client.models.list

        async def model_list() -> Any:
            try:
                return await list_models()
            except self._openai.NotFoundError:  # not every endpoint has one; the first request will show an error
                return None

        try:
            models = {str(m.id): m for m in getattr(await self._call(model_list), "data", None) or ()}
        except (InputError, AttributeError, TypeError) as error:
            raise SetupError(
                f"{self.host} has a model list that cannot be read: {error}", code="endpoint_malformed"
            ) from None
        if not models:
            return None
        listed_name = self._model if self._model in models else self._model.rpartition(":")[0]  # SGLang's BASE:ADAPTER
        if listed_name not in models:
            raise UnknownName(f"model of {self.host}:", self._model, models)
        return str(getattr(models[listed_name], "owned_by", "")).lower()

    async def _token_ids(self) -> tuple[list[int] | None, list[int] | None]:
        """First tokens of the two labels after the stem, and of yes and no; None where the engine gives none."""

        async def tokenize(**body: Any) -> list[int]:
            reply: Any = await self._client.with_options(max_retries=1).post(
                f"{self._root}/tokenize", cast_to=object, body={"model": self._model, **body}
            )
            return [int(t) for t in reply["tokens"]]

        async def tokens(start: str) -> list[int]:
            messages = [{"role": "user", "content": prompts.QUESTION}]
            messages += [{"role": "assistant", "content": start}] if start else []
            return await tokenize(
                messages=messages, add_generation_prompt=not start, continue_final_message=bool(start)
            )

        async def first(start: str, words: Sequence[str]) -> list[int] | None:
            before, *after = [await tokens(text) for text in (start, *(start + w for w in words))]
            n = len(before)
            firsts = [ids[n] for ids in after if ids[:n] == before and len(ids) > n]
            return firsts if len(set(firsts)) == len(words) else None

        try:
            ids = await first(prompts.STEM, prompts.LABEL_WORDS), await first("", prompts.YES_NO_WORDS)
        except (self._openai.OpenAIError, KeyError, TypeError, ValueError, RecursionError):
            return None, None  # then the labels are searched among the likeliest tokens
        try:
            with_bos, without = await tokenize(prompt="a"), await tokenize(prompt="a", add_special_tokens=False)
            # Training's prompts begin with what the tokenizer adds. A chat endpoint adds nothing to its template.
            self._adds_bos = with_bos[1:] == without and (await tokens(""))[0] != with_bos[0]
        except (self._openai.OpenAIError, KeyError, TypeError, ValueError, IndexError, RecursionError):
            pass  # it tokenises only chats, so whether its tokenizer adds a begin token stays unknown
        return ids


def _http_client(openai: Any, host: str, timeout: float, pause: float) -> Any:
    """openai's HTTP client that follows no redirect, takes no proxy to this machine, and reads no endless reply.

    Tries, first and later ones, begin `pause` seconds apart.
    """
    stock: Any = openai.DefaultAsyncHttpxClient
    # The library of its base class: httpx, or httpx2 in newer releases of openai.
    httpx: Any = sys.modules[stock.__mro__[1].__module__.partition(".")[0]]

    class Bounded(stock):  # type: ignore[misc]
        next_start = 0.0  # when the next try may begin

        async def send(self, request: Any, **options: Any) -> Any:
            now = asyncio.get_running_loop().time()
            start = max(now, self.next_start)
            self.next_start = start + pause
            await asyncio.sleep(start - now)
            try:
                async with asyncio.timeout(timeout):
                    response = await super().send(request, **{**options, "stream": True})
                    try:
                        body = b""
                        async for part in response.aiter_bytes():
                            body += part
                            if len(body) > REPLY_BYTES:
                                reason = f"the reply is larger than {REPLY_BYTES >> 20} MB"
                                return httpx.Response(413, json={"error": {"message": reason}}, request=request)
                    finally:
                        await response.aclose()
            except TimeoutError as error:
                raise httpx.ReadTimeout("the whole reply took too long", request=request) from error
            headers = [(k, v) for k, v in response.headers.items() if k not in ("content-encoding", "content-length")]
            return httpx.Response(response.status_code, headers=headers, content=body, request=request)

    return Bounded(timeout=timeout, trust_env=not is_loopback(host), follow_redirects=False)


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _close(loop: asyncio.AbstractEventLoop, client: Any) -> None:
    async def end() -> None:
        await client.close()
        loop.stop()

    asyncio.run_coroutine_threadsafe(end(), loop)


def _logprobs(reply: _Reply, words: Sequence[str]) -> tuple[float | None, float | None]:
    """Log-probability of each of two words: the sum over its spellings, or else over tokens that begin it.

    When only one word is listed, the other gets the least of the listed values: it cannot be likelier than that.
    """
    logprobs = reply.first
    totals: list[float | None] = []
    for word in map(_bare, words):
        spellings = [p for token, p in logprobs.items() if _bare(token) == word]
        beginnings = [p for token, p in logprobs.items() if len(_bare(token)) > 1 and word.startswith(_bare(token))]
        matches = spellings or beginnings
        totals.append(float(np.logaddexp.reduce(matches)) if matches else None)
    if any(p is not None for p in totals):
        totals = [min(logprobs.values()) if p is None else p for p in totals]
    return totals[0], totals[1]


def _bare(token: str) -> str:
    """A token as a word: without the signs that tokenizers put for a space."""
    return token.strip(" \u2581\u0120\n").lower()
