"""A small OpenAI-compatible server, to test what asks one: chat completions with log-probabilities, a model list and
vLLM's `/tokenize`.

What it answers is up to a function; `Behind` is one that asks a local model.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from x2dfd.mllm import LocalMLLM

Request = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """One answer."""

    text: str = ""
    top: Mapping[str, float] | None = None  # log-probability of each first token that is told, likeliest first
    status: int = 200  # any other is an error with `text` as its message
    delay: float = 0.0  # seconds before it comes
    cut: bool = False  # the connection breaks in the middle of it


class _Server(ThreadingHTTPServer):
    """On this machine and a free port, in threads, within a context."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    """Says nothing of its own, and nothing of a client that gave up."""

    def log_message(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()


class _Endpoint(_Handler):
    """The addresses of a StandIn."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: StandIn

    def do_GET(self) -> None:
        if not self.path.endswith("/models") or self.server.models is None:
            self._refuse(404, "no such address")
        elif self._allowed():
            models = [{"id": m, "object": "model", "owned_by": self.server.owned_by} for m in self.server.models]
            self._send(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        if self.path == "/tokenize" and self.server.tokenize is not None:
            tokens = self.server.tokenize(request)
            self._send(200, {"tokens": tokens, "count": len(tokens)})
        elif self.path != "/v1/chat/completions":
            self._refuse(404, "no such address")
        elif self.server.models is not None and request["model"] not in self.server.models:
            self._refuse(404, f"the model {request['model']} does not exist")
        else:
            with self.server.counted(request):
                reply = self.server.answer(request)
                time.sleep(reply.delay)
                if reply.status != 200:
                    self._refuse(reply.status, reply.text)
                else:
                    self._send(200, _completion(request, reply), reply.cut)

    def _allowed(self) -> bool:
        given = self.headers["Authorization"] or ""
        if self.server.key is not None and given != f"Bearer {self.server.key}":
            self._refuse(401, f"the key {given} is not known")
            return False
        return True

    def _refuse(self, status: int, why: str) -> None:
        self._send(status, {"error": {"message": why}})

    def _send(self, status: int, body: dict[str, Any], cut: bool = False) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.wfile.flush()
        self.close_connection = self.close_connection or cut


class StandIn(_Server):
    """The server; use it as a context.

    `answer`: from the request's JSON to a Reply, or one for all. `tokenize`: from messages and the two template options
    to token ids, as vLLM's `/tokenize`; without it that address is not there. `owned_by`: the engine it passes for.
    """

    def __init__(
        self,
        answer: Callable[[Request], Reply] | Reply,
        *,
        models: Sequence[str] | None = ("m",),
        owned_by: str = "vllm",
        tokenize: Callable[[Request], list[int]] | None = None,
        key: str | None = None,
    ) -> None:
        super().__init__(_Endpoint)
        self.answer = (lambda _: answer) if isinstance(answer, Reply) else answer
        self.models, self.owned_by, self.tokenize, self.key = models, owned_by, tokenize, key
        self.requests: list[Request] = []  # for a completion
        self.now = self.most = 0  # under way, now and at most
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def counted(self, request: Request) -> Iterator[None]:
        with self.lock:
            self.requests.append(request)
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            yield
        finally:
            with self.lock:
                self.now -= 1


@contextlib.contextmanager
def odd(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """The address of an endpoint that answers every question by writing to the connection itself."""

    class Handler(_Handler):
        def do_GET(self) -> None:
            self.send_error(404)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            answer(self)

    with _Server(Handler) as server:
        yield server.url


def writes(handler: BaseHTTPRequestHandler, body: bytes = b"", status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def _completion(request: Request, reply: Reply) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply.text}, "logprobs": None,
    }  # fmt: skip
    if request.get("logprobs") and reply.top is not None:
        told = [{"token": t, "logprob": p, "bytes": None} for t, p in reply.top.items()]
        choice["logprobs"] = {"content": [{**told[0], "top_logprobs": told}]}
    return {
        "id": "1", "object": "chat.completion", "created": 0, "model": request["model"], "choices": [choice],
    }  # fmt: skip


def picture_of(request: Request) -> NDArray[np.uint8]:
    """The picture of a request, [h, w, 3]."""
    parts = [p for m in request["messages"] if isinstance(m["content"], list) for p in m["content"]]
    [url] = [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
    data = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def question_of(request: Request) -> str:
    """The last text that the user said in a request."""
    said = [m["content"] for m in request["messages"] if m["role"] == "user"][-1]
    return str(said if isinstance(said, str) else [p["text"] for p in said if p["type"] == "text"][-1])


class Behind:
    """A local model behind the stand-in: it renders messages with its chat template, as an engine does.

    And as an engine it adds no begin token to a chat that asks for none.
    """

    def __init__(self, local: LocalMLLM) -> None:
        self.local = local

    def _rendered(self, request: Request) -> str:
        messages = [dict(m) for m in request["messages"]]
        start = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
        for m in messages:
            parts = [{"type": "text", "text": m["content"]}] if isinstance(m["content"], str) else m["content"]
            m["content"] = [{"type": "image"} if p["type"] == "image_url" else p for p in parts]
        frame: str = self.local.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return frame + (" " if start and not frame[-1].isspace() else "") + start

    def tokenize(self, request: Request) -> list[int]:
        """As vLLM does: a plain prompt gets the tokenizer's begin token, a chat does where it is asked for."""
        text = request["prompt"] if "prompt" in request else self._rendered(request)
        adds = request.get("add_special_tokens", "prompt" in request)
        ids: list[int] = self.local.tokenizer(text, add_special_tokens=adds)["input_ids"]
        return ids

    def __call__(self, request: Request) -> Reply:
        import torch

        text, picture = self._rendered(request), Image.fromarray(picture_of(request))
        processor, model = self.local.processor, self.local._model
        adds = request.get("add_special_tokens", False)
        inputs = processor(images=picture, text=text, return_tensors="pt", add_special_tokens=adds)
        with torch.inference_mode():
            if request["max_tokens"] > 1:
                out = model.generate(**inputs, max_new_tokens=request["max_tokens"], do_sample=False)
                new = out[0, inputs["input_ids"].shape[1] :]
                return Reply(self.local.tokenizer.decode(new, skip_special_tokens=True))
            row = model(**inputs).logits[0, -1].double().log_softmax(-1)
        ids = request.get("logprob_token_ids") or row.topk(20).indices.tolist()
        word = self.local.tokenizer.decode([int(row.argmax())])
        return Reply(word, {self.local.tokenizer.decode([i]): float(row[i]) for i in ids})
