"""Explanations by a served model: told the truth, checked against it, asked once, and never trusted blindly.

The endpoint is a local HTTP server. The client is the package `openai` where it is installed, else a stand-in of its
shape that speaks to the same server.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import threading
import time
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_gen.__main__ import app
from data_gen.build import BuildConfig, build
from data_gen.served_writer import (
    AGAIN,
    PROMPT_SHA256,
    SYSTEM,
    Subject,
    WriterConfig,
    fault,
    strongest_first,
)
from data_gen.writers import write_explanation
from tests import tiny
from x2dfd.crops import load_crops
from x2dfd.errors import SetupError, X2DFDError
from x2dfd.experts import BUILTIN
from x2dfd.explain import read_cues
from x2dfd.tower import seen_view
from x2dfd.types import Cue

KEY = "sk-of-the-test-0123456789"
SEAM = "A clear seam runs along the jaw, as if two layers met there"
CALM = "The eyes and the nose keep their natural shape, and the light on them is even"
UNTRUE = f"{SEAM}, and the ears are blurred."
REAL_OPENAI = importlib.util.find_spec("openai") is not None

Record = dict[str, Any]
Request = dict[str, Any]


# --- an endpoint, and a client for it --------------------------------------------------------------------------------


def picture_of(request: Request) -> bytes:
    url = str(request["messages"][1]["content"][0]["image_url"]["url"])
    return base64.b64decode(url.removeprefix("data:image/png;base64,"))


def truth_of(request: Request) -> str:
    return str(request["messages"][1]["content"][1]["text"])


def is_fake(request: Request) -> bool:
    return "This photo is fake" in truth_of(request)


def good(request: Request) -> str:
    """A text that is true, and different for each picture."""
    word = "".join(chr(ord("a") + int(c, 16)) for c in hashlib.sha256(picture_of(request)).hexdigest()[:6])
    return f"{SEAM if is_fake(request) else CALM}, near x{word}."


class Endpoint:
    """An OpenAI-compatible server; `reply` gives the text, or an HTTP status."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.keys: set[str | None] = set()
        self.reply: Callable[[Request], str | int] = good
        self.lock = threading.Lock()
        self.now = self.most = 0  # requests under way, now and at most
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    endpoint.requests.append(request)
                    endpoint.keys.add(self.headers["Authorization"])
                    endpoint.now += 1
                    endpoint.most = max(endpoint.most, endpoint.now)
                said = endpoint.reply(request)
                with endpoint.lock:
                    endpoint.now -= 1
                message = {"role": "assistant", "content": said}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                ok = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                refused = {"error": {"message": f"refused the key {KEY}"}}
                body = json.dumps(refused if isinstance(said, int) else ok).encode()
                self.send_response(said if isinstance(said, int) else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):  # the client that timed out is gone
                    super().handle()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def writer(self, **given: Any) -> WriterConfig:
        settings: dict[str, Any] = {"model": "m", "url": self.url, "retries": 0, "timeout": 10.0, **given}
        return WriterConfig(**settings)


def stand_in() -> types.ModuleType:
    """What we use of `openai`, over urllib, without its back-off."""
    module = types.ModuleType("openai")

    class OpenAIError(Exception):
        pass

    class OpenAI:
        def __init__(self, base_url: str) -> None:
            if "OPENAI_API_KEY" not in os.environ:
                raise OpenAIError("no key")
            self.base_url, self.api_key = base_url, os.environ["OPENAI_API_KEY"]
            self.timeout, self.max_retries = 600.0, 2
            self.chat = SimpleNamespace(completions=SimpleNamespace(create=self._create))

        def with_options(self, timeout: float, max_retries: int) -> Self:
            self.timeout, self.max_retries = timeout, max_retries
            return self

        def _create(self, **request: Any) -> Any:
            head = {"Authorization": f"Bearer {self.api_key}", "Content-Type": "application/json"}
            wire = urllib.request.Request(f"{self.base_url}/chat/completions", json.dumps(request).encode(), head)
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            for left in range(self.max_retries, -1, -1):
                try:
                    with opener.open(wire, timeout=self.timeout) as reply:
                        return json.loads(reply.read(), object_hook=lambda d: SimpleNamespace(**d))
                except OSError as error:
                    if not left:
                        body = error.read().decode() if isinstance(error, urllib.error.HTTPError) else ""
                        raise OpenAIError(f"{error} {body}") from error

    vars(module).update(OpenAI=OpenAI, OpenAIError=OpenAIError)
    return module


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    if not REAL_OPENAI:
        monkeypatch.setitem(__import__("sys").modules, "openai", stand_in())
    local = Endpoint()
    yield local
    local.server.shutdown()
    local.server.server_close()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import skimage.data

    return tiny.write_small_manifest(tmp_path_factory.mktemp("small"), np.asarray(skimage.data.astronaut()), 6)


@pytest.fixture(autouse=True)
def known_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILTIN, tiny.EXPERT, tiny.EXPERT_TARGET)


def made(manifest: Path, out: Path, writer: WriterConfig | None = None, **given: Any) -> list[Record]:
    path = build(BuildConfig(str(manifest), experts=(tiny.EXPERT,), writer=writer, **given), out)
    return [json.loads(line) for line in path.read_text().splitlines()]


def card_of(out: Path) -> dict[str, Any]:
    card: dict[str, Any] = json.loads((out / "card.json").read_text())
    return card


def explanations(records: list[Record]) -> list[str]:
    return [r["conversations"][1]["value"] for r in records if r["task"] == "detect"]


def without_writer(records: list[Record]) -> list[Record]:
    return [{k: v for k, v in r.items() if k != "writer"} for r in records]


# --- the check -------------------------------------------------------------------------------------------------------

TOLD = (Cue("jaw", "blending", 0.9), Cue("eyes", "blur", 0.1), Cue("mouth", "geometry"))
FAKE = Subject("f", lambda: np.zeros((2, 2, 3), np.uint8), "fake", "FS", TOLD, (*TOLD, Cue("nose", "noise", 0.5)))
REAL = Subject("r", FAKE.view, "real", "real", (), ())


@pytest.mark.parametrize(
    ("subject", "text", "reason"),
    [
        (FAKE, f"{SEAM}.", None),
        (
            FAKE,
            f"{SEAM}. The eyes are slightly blurred, and the mouth is warped. A face swap leaves such traces.",
            None,
        ),
        (FAKE, "", "empty"),
        (FAKE, UNTRUE, "untrue cue"),
        (FAKE, f"{SEAM}, and the nose is noisy.", "weak cue"),
        (FAKE, "The eyes are slightly blurred against the rest of the face.", "strongest cue"),
        (FAKE, "The jaw looks natural, and the eyes are slightly blurred.", "strongest cue"),
        (FAKE, f"{SEAM}, and the eyes are clearly blurred.", "strength"),
        (FAKE, "A faint seam runs along the jaw of this person.", "strength"),
        (FAKE, f"{SEAM}. Still, this is an authentic photo.", "label"),
        (FAKE, f"{SEAM}. This fits face reenactment.", "technique"),
        (FAKE, f"{SEAM}, " + "and so on " * 20 + "to the end.", "length"),
        (FAKE, "A seam.", "length"),
        (FAKE, f"**Jaw**: {SEAM}.", "form"),
        (FAKE, f"{SEAM}.\nThe mouth is warped.", "form"),
        (FAKE, f"{SEAM}. <image>", "form"),
        (FAKE, f"{SEAM}. Are the ears blurred?", "form"),
        (FAKE, f"{SEAM}\u2028and that is all.", "form"),
        (FAKE, f"{SEAM} and", "form"),
        (FAKE, f"{SEAM}, by 97 percent.", "form"),
        (FAKE, f"As I was told, {SEAM}.", "aside"),
        (FAKE, f"According to the record, {SEAM}.", "aside"),
        (FAKE, "I'm sorry, but I can't help with that.", "aside"),
        (FAKE, f"{SEAM}. Additionally, the image shows obvious ears blur here.", "experts"),
        (FAKE, f"{SEAM}. The blending score is high.", "experts"),
        (REAL, f"{CALM}.", None),
        (REAL, f"{SEAM}.", "untrue cue"),
        (REAL, f"{CALM}, but the face was manipulated.", "label"),
        (REAL, "All of it is fine and in very good order.", "no area"),
    ],
)
def test_what_a_model_writes_is_checked(subject: Subject, text: str, reason: str | None) -> None:
    """Bug prevented: what is taught is untrue, unreadable, about the prompt, or hides a claim where no parser looks."""
    found = fault(text, subject)
    assert (found and found[0]) == reason, found


def test_what_the_grammar_writes_passes() -> None:
    """Bug prevented: a check so strict, or so wrong, that no model can pass it."""
    rng = np.random.default_rng(3)
    for df_class in ("FS", "FR", "FE", "EFS"):
        fake = Subject("f", FAKE.view, "fake", df_class, TOLD, TOLD)
        for _ in range(50):
            assert fault(write_explanation("fake", TOLD, df_class, rng), fake) is None
            assert fault(write_explanation("real", (), "real", rng), REAL) is None


def test_the_strongest_cue_is_the_strongest() -> None:
    """Bug prevented: a cue that is listed twice comes at its weaker place, and another is demanded."""
    cues = (Cue("eyes", "blur", 0.2), Cue("jaw", "blending", 0.5), Cue("eyes", "blur", 0.9))
    assert strongest_first(cues) == [cues[2], cues[1]]


# --- the request -----------------------------------------------------------------------------------------------------


def first_two(manifest: Path, folder: Path) -> Path:
    """A manifest of the first two pictures: a limit would draw others."""
    rows = [json.loads(line) for line in manifest.read_text().splitlines()[:2]]
    rows = [row | {"path": str(manifest.parent / row["path"])} for row in rows]
    (folder / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "two.jsonl"


def test_the_model_sees_the_training_view_and_the_truth(manifest: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    """Bug prevented: the text speaks of another picture than the one it is trained with, or of a guess."""
    manifest = first_two(manifest, tmp_path)
    made(manifest, tmp_path, endpoint.writer(concurrency=1))
    data = load_crops(manifest)
    assert len(endpoint.requests) == 2
    for i, request in enumerate(endpoint.requests):
        view = np.asarray(Image.open(io.BytesIO(picture_of(request))))
        np.testing.assert_array_equal(view, seen_view(data.crops[i], 1, i))
        assert request["model"] == "m"
        assert request["messages"][0] == {"role": "system", "content": SYSTEM}
        assert is_fake(request) == (data.samples[i].label == "fake")
    signs = (
        "face swap. Signs that are there, strongest first: clear blending at the jaw; visible blur at the eyes; faint"
    )
    assert signs in truth_of(endpoint.requests[1])


# --- what lands in the data ------------------------------------------------------------------------------------------


def test_an_accepted_text_is_what_is_taught(manifest: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    """Bug prevented: texts are paid for and the grammar's stand in the data; another writer changes other records."""
    records = made(manifest, tmp_path / "served", endpoint.writer())
    plain = made(manifest, tmp_path / "plain")
    assert len(endpoint.requests) == 6
    for record, text in zip((r for r in records if r["task"] == "detect"), explanations(records), strict=True):
        assert text.startswith(
            f"This image is {record['label']}. {SEAM if record['label'] == 'fake' else CALM}, near x"
        )
        assert {(c.area, c.artifact) for c in read_cues(text)} <= {(c["area"], c["artifact"]) for c in record["cues"]}
    assert {r["writer"] for r in records} == {"served:m"}
    others = [[r for r in without_writer(some) if r["task"] not in ("detect", "chat")] for some in (records, plain)]
    assert others[0] == others[1]
    assert [r["conversations"][2:] for r in records] == [r["conversations"][2:] for r in plain]
    card = card_of(tmp_path / "served")["writer"]
    assert (card["model"], card["url_host"], card["prompt_sha256"]) == ("m", "127.0.0.1", PROMPT_SHA256)
    assert (card["pictures_asked"], card["accepted"], card["rejected_texts"]) == (6, 6, {})
    assert card["share"] == {"served:m": 1.0}
    table = pq.read_table(tmp_path / "served" / "instructions.parquet").to_pylist()
    assert [r["writer"] for r in table] == [r["writer"] for r in records]


def test_an_untrue_cue_is_rejected_counted_and_never_taught(manifest: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    """Bug prevented: a model's invention is taught as seen, or vanishes without a trace in the figures."""
    endpoint.reply = lambda request: UNTRUE if is_fake(request) else good(request)
    records = made(manifest, tmp_path / "served", endpoint.writer(attempts=2))
    plain = made(manifest, tmp_path / "plain")
    for name in ("instructions.jsonl", "instructions.parquet"):
        assert b"ears are blurred" not in (tmp_path / "served" / name).read_bytes()
    fakes = [r for r in records if r["label"] == "fake"]
    assert without_writer(fakes) == [r for r in plain if r["label"] == "fake"]  # the grammar's, word for word
    assert {r["writer"] for r in fakes} == {"grammar"}
    card = card_of(tmp_path / "served")["writer"]
    assert (card["pictures_asked"], card["accepted"], card["rejected_texts"]) == (6, 3, {"untrue cue": 6})
    assert card["fallen_back"] == {"rejected": 3, "failed": 0, "nothing to tell": 0}
    explained = [r for r in records if r["task"] in ("detect", "chat")]
    share = sum(r["writer"] == "grammar" for r in explained) / len(explained)
    assert card["share"] == {"grammar": round(share, 4), "served:m": round(1 - share, 4)}
    assert sum(card["explanations"].values()) == len(explained)


def test_a_second_text_may_be_better(manifest: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    """Bug prevented: a model asked again is not told what was wrong, or its better text is thrown away."""
    endpoint.reply = lambda request: UNTRUE if is_fake(request) and len(request["messages"]) == 2 else good(request)
    records = made(manifest, tmp_path, endpoint.writer())
    assert {r["writer"] for r in records} == {"served:m"}
    again = [r for r in endpoint.requests if len(r["messages"]) > 2]
    assert len(again) == 3
    for request in again:
        reason = AGAIN.format(reason="it says ears x blur, which is no given sign")
        assert [m["content"] for m in request["messages"][2:]] == [UNTRUE, reason]
    card = card_of(tmp_path)["writer"]
    assert (card["accepted"], card["rejected_texts"]) == (6, {"untrue cue": 3})


def test_quotes_and_a_repeated_verdict_are_taken_off(manifest: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    """Bug prevented: "This image is fake. This image is fake." is taught, or a good text is lost over quotes."""
    endpoint.reply = lambda request: f'"This image is {"fake" if is_fake(request) else "real"}. {good(request)}"'
    records = made(manifest, tmp_path, endpoint.writer())
    assert {r["writer"] for r in records} == {"served:m"}
    assert all(text.count("This image is") <= 1 and '"' not in text for text in explanations(records))


def test_a_fake_without_a_cue_to_tell_is_not_sent(manifest: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    """Bug prevented: of a fake that nobody knows a cue of, whatever a model says would pass for an explanation."""
    samples = [json.loads(line) for line in manifest.read_text().splitlines()]
    bare = [{**s, "path": str(manifest.parent / s["path"]), "cues": []} for s in samples[:4]]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(s) + "\n" for s in bare))
    records = made(tmp_path / "bare.jsonl", tmp_path / "out", endpoint.writer())
    assert len(endpoint.requests) == 2 and not any(is_fake(r) for r in endpoint.requests)
    assert {r["writer"] for r in records if r["label"] == "fake"} == {"grammar"}
    assert card_of(tmp_path / "out")["writer"]["fallen_back"]["nothing to tell"] == 2


# --- asked once ------------------------------------------------------------------------------------------------------


def test_a_build_that_was_cut_off_asks_nothing_twice(
    manifest: Path, tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug prevented: every answer is paid for again, or the set differs from one that was made in one go."""
    monkeypatch.setattr("data_gen.served_writer.FAILURES_IN_A_ROW", 2)
    made(manifest, tmp_path / "whole", endpoint.writer())
    endpoint.requests.clear()
    endpoint.reply = lambda request: good(request) if len(endpoint.requests) <= 3 else 503
    with pytest.raises(X2DFDError, match="again and again"):
        made(manifest, tmp_path / "cut", endpoint.writer(concurrency=1))
    assert 5 <= len(endpoint.requests) <= 6  # one more may be under way
    assert not (tmp_path / "cut" / "instructions.jsonl").exists()
    cache = tmp_path / "cut" / "written.jsonl"
    with cache.open("a") as stream:
        stream.write('{"key": "half a li')  # the power went off here
    endpoint.requests.clear()
    endpoint.reply = good
    for _ in range(2):
        made(manifest, tmp_path / "cut", endpoint.writer())
        assert len(endpoint.requests) == 3
    for name in ("instructions.jsonl", "card.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len([json.loads(line) for line in cache.read_text().splitlines()]) == 6


def test_rejected_pictures_are_not_asked_for_again(manifest: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    """Bug prevented: what no attempt could explain is asked for with every build; the counts shrink on the second."""
    endpoint.reply = lambda _: UNTRUE
    made(manifest, tmp_path, endpoint.writer(attempts=2))
    first = (tmp_path / "card.json").read_bytes()
    made(manifest, tmp_path, endpoint.writer(attempts=2))
    assert len(endpoint.requests) == 12
    assert (tmp_path / "card.json").read_bytes() == first


def test_another_model_picture_or_truth_is_asked_for_anew(manifest: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    """Bug prevented: the card names a model that never wrote the texts; a text outlives the picture it was about."""
    manifest = first_two(manifest, tmp_path)
    made(manifest, tmp_path, endpoint.writer())
    made(manifest, tmp_path, endpoint.writer(model="n"))
    assert len(endpoint.requests) == 4
    made(manifest, tmp_path, endpoint.writer(model="n"), view_seed=2)
    assert len(endpoint.requests) == 6
    changed = json.loads(manifest.read_text().splitlines()[1])
    changed |= {"cues": changed["cues"][:1]}
    same = json.loads(manifest.read_text().splitlines()[0])
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(s) + "\n" for s in (same, changed)))
    made(tmp_path / "other.jsonl", tmp_path, endpoint.writer(model="n"), view_seed=2)
    assert len(endpoint.requests) == 7 and is_fake(endpoint.requests[-1])


def test_a_cache_is_not_trusted(manifest: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    """Bug prevented: an edited or older cache smuggles in what the check would refuse; a wrong file is a traceback."""
    made(manifest, tmp_path, endpoint.writer())
    cache = tmp_path / "written.jsonl"
    lines = [json.loads(line) for line in cache.read_text().splitlines()]
    edited = [{**x, "text": UNTRUE} if x["id"] == "s1" else x for x in lines]
    cache.write_text("".join(json.dumps(x) + "\n" for x in edited))
    records = made(manifest, tmp_path, endpoint.writer())
    assert len(endpoint.requests) == 7
    assert not any("ears" in text for text in explanations(records))
    cache.write_text("no cache\n")
    with pytest.raises(X2DFDError, match="line 1: not an answer"):
        made(manifest, tmp_path, endpoint.writer())


# --- an endpoint that fails ------------------------------------------------------------------------------------------


def test_a_request_that_fails_is_left_to_the_grammar_and_asked_again(
    manifest: Path, tmp_path: Path, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug prevented: one 500 or one time-out of thousands ends the build, or is cached as the model's last word."""
    data = load_crops(manifest)
    odd = [Image.fromarray(seen_view(data.crops[i], 1, i)).tobytes() for i in (0, 1)]

    def reply(request: Request) -> str | int:
        seen = Image.open(io.BytesIO(picture_of(request))).tobytes()
        if seen == odd[1]:
            time.sleep(1.5)
        return 500 if seen == odd[0] else good(request)

    endpoint.reply = reply
    records = made(manifest, tmp_path, endpoint.writer(timeout=0.5, concurrency=2))
    assert {r["image"] for r in records if r["writer"] == "grammar"} == {"s0", "s1"}
    card = card_of(tmp_path)["writer"]
    assert (card["accepted"], card["rejected_texts"], card["fallen_back"]["failed"]) == (4, {}, 2)
    assert "no answer for 2 of 6 pictures" in capsys.readouterr().err
    endpoint.reply, before = good, len(endpoint.requests)
    records = made(manifest, tmp_path, endpoint.writer())
    assert len(endpoint.requests) == before + 2 and {r["writer"] for r in records} == {"served:m"}


def test_a_failed_request_is_tried_again_by_the_client(manifest: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    """Bug prevented: retries that are configured and never reach the client."""
    endpoint.reply = lambda request: 500 if len(endpoint.requests) == 1 else good(request)
    records = made(manifest, tmp_path, endpoint.writer(retries=1, concurrency=1), limit=2)
    assert {r["writer"] for r in records} == {"served:m"} and len(endpoint.requests) == 3


def test_an_endpoint_that_never_answers_is_an_error(manifest: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    """Bug prevented: a wrong key or address, and a whole set by the grammar under a model's name."""
    endpoint.reply = lambda _: 401
    with pytest.raises(X2DFDError, match=r"127\.0\.0\.1 answered nothing"):
        made(manifest, tmp_path, endpoint.writer(), limit=3)
    assert not (tmp_path / "instructions.jsonl").exists()


def test_keys_are_written_nowhere(
    manifest: Path, tmp_path: Path, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug prevented: a data set is published, and a key with it: from the environment, an address, a server's echo."""
    made(manifest, tmp_path / "out", endpoint.writer())
    assert endpoint.keys == {f"Bearer {KEY}"}
    secret = "of-the-address"
    account = f"user:{secret}"
    config = endpoint.writer(url=f"https://{account}@models.example:8443/v1?key={secret}")
    assert config.host == "models.example"
    endpoint.reply = lambda _: 401
    with pytest.raises(X2DFDError) as refused:
        made(manifest, tmp_path / "out", endpoint.writer(model="n"), limit=2)
    assert KEY not in str(refused.value) and "***" in str(refused.value)
    assert KEY not in "".join(capsys.readouterr())
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) == 4
    assert not any(KEY.encode() in path.read_bytes() for path in written)
    assert endpoint.url not in (tmp_path / "out" / "card.json").read_text()


# --- as before -------------------------------------------------------------------------------------------------------


def test_without_a_writer_nothing_has_changed(manifest: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    """Bug prevented: the option alone changes every set's bytes or card, or asks a server that nobody named."""
    records = made(manifest, tmp_path)
    assert not endpoint.requests
    assert all("writer" not in r for r in records)
    card = card_of(tmp_path)
    assert "writer" not in card
    assert list(card["config"]) == [f.name for f in fields(BuildConfig) if f.name != "writer"]
    assert {p.name for p in tmp_path.iterdir()} == {"instructions.jsonl", "instructions.parquet", "card.json"}
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in card["config"].items()}
    assert BuildConfig(**settings) == BuildConfig(str(manifest), experts=(tiny.EXPERT,))


def test_requests_at_a_time_change_no_byte(manifest: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    """Bug prevented: records in the order in which a server answered: never the same set twice."""

    def reply(request: Request) -> str:
        time.sleep(picture_of(request)[-20] / 255 * 0.2)  # some are slower than others
        return good(request)

    endpoint.reply = reply
    for n in (1, 5):
        endpoint.most = 0
        made(manifest, tmp_path / str(n), endpoint.writer(concurrency=n))
        assert endpoint.most == 1 if n == 1 else 1 < endpoint.most <= n
    for name in ("instructions.jsonl", "card.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "5" / name).read_bytes()
    assert len(set(explanations(made(manifest, tmp_path / "5", endpoint.writer())))) == 6


# --- set-up and command ----------------------------------------------------------------------------------------------


def test_without_openai_or_key_the_error_comes_first(
    manifest: Path, tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug prevented: a traceback, or a SetupError after an hour of expert scores."""
    monkeypatch.setattr("data_gen.build.expert_scores", lambda *_: pytest.fail("scored before the set-up was checked"))
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(SetupError, match="export OPENAI_API_KEY"):
        made(manifest, tmp_path, endpoint.writer())
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(SetupError, match=r"a served writer needs the package openai: pip install -e '\.\[serve\]'"):
        made(manifest, tmp_path, endpoint.writer())


@pytest.mark.parametrize(
    "given", [{"url": ""}, {"url": "localhost:8000"}, {"model": ""}, {"concurrency": 0}, {"attempts": 0}]
)
def test_half_a_writer_is_refused(given: dict[str, Any]) -> None:
    """Bug prevented: faces are sent to a package's default address because none was named."""
    with pytest.raises(X2DFDError, match="a served writer needs"):
        WriterConfig(**{"model": "m", "url": "http://localhost:8000/v1", **given})


def test_the_command_takes_a_writer(manifest: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    """Bug prevented: options that the command accepts and does not hand on."""
    common = ["build", "--data", str(manifest), "--out", str(tmp_path), "--experts", tiny.EXPERT, "--limit", "2"]
    result = CliRunner().invoke(app, [*common, "--writer-model", "m"])
    assert isinstance(result.exception, X2DFDError) and not endpoint.requests
    options = ["--writer-model", "m", "--writer-url", endpoint.url, "--writer-concurrency", "2"]
    result = CliRunner().invoke(app, [*common, *options])
    assert result.exit_code == 0, result.output
    assert len(endpoint.requests) == 2 and card_of(tmp_path)["writer"]["accepted"] == 2
