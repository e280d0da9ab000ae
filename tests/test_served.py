"""A served model answers as the local one does, and what goes wrong at an endpoint is said, counted and survived."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import math
import random
import shutil
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

import x2dfd
from tests import tiny
from tests.raising import raises, says
from tests.stand_in import Behind, Reply, Request, StandIn, odd, picture_of, question_of, writes
from x2dfd import case, cli, prompts, served
from x2dfd.adapter import probe_logits
from x2dfd.assessment import BANK, read_assessment, read_questions
from x2dfd.checkpoints import load_model
from x2dfd.detector import UNCALIBRATED
from x2dfd.errors import InputError, X2DFDError
from x2dfd.mllm import LocalMLLM
from x2dfd.served import ServedMLLM, _http_client
from x2dfd.tower import closer
from x2dfd.types import Failure, Report

pytest.importorskip("openai")

Pixels = NDArray[np.uint8]
KEY = "sk-of-the-test-0123456789"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy between the two ends, a key to look for in what is said, and short pauses between tries."""
    import openai._base_client as base

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(base, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(base, "MAX_RETRY_DELAY", 0.02)


@pytest.fixture
def crops(astronaut: Pixels) -> Pixels:
    face = astronaut[20:244, 110:334]
    return np.stack([face, face[:, ::-1], 255 - face])


def steady(request: Request) -> Reply:
    """The same to every question, in the words that belong to it."""
    if request.get("max_tokens") != 1:
        return Reply("The jaw looks blurred.")
    if prompts.CUE_ENDING in question_of(request):
        return Reply("Yes", {"Yes": math.log(0.7), "No": math.log(0.2)})
    return Reply(" fake", {" fake": math.log(0.6), " real": math.log(0.3)})


# --- against the local model -----------------------------------------------------------------------------------------


def test_a_served_bare_model_answers_as_the_local_one(folders: tuple[Path, Path], crops: Pixels) -> None:
    """Another prompt, another token or another picture at the endpoint would be another detector."""
    local = LocalMLLM(*load_model(folders[0]), "tiny")
    questions = [prompts.QUESTION, f"{prompts.QUESTION} And the x score is 0.500.", prompts.QUESTION]
    cues = [f"Is number {i} odd? {prompts.CUE_ENDING}" for i in range(3)]
    behind = Behind(local)
    with StandIn(behind, tokenize=behind.tokenize) as endpoint:
        model = ServedMLLM(endpoint.url, "m")
        encoding, own = model.encode(crops), local.encode(crops)
        np.testing.assert_allclose(
            model.verdict_logits(encoding, questions), local.verdict_logits(own, questions), atol=1e-3
        )
        said, wanted = model.yes_no(crops[0], cues), local.yes_no(crops[0], cues)
        np.testing.assert_allclose(said.p_yes, wanted.p_yes, atol=1e-4)
        assert said.answers == wanted.answers
        starts = ["This image is fake.", "This image is real.", ""]
        assert model.write(encoding, questions, starts, max_new_tokens=5) == local.write(
            own, questions, starts, max_new_tokens=5
        )
        turns = [("This image is fake. The jaw.", "And the eyes?")]
        assert model.write(encoding, questions, [""] * 3, turns=turns, max_new_tokens=4) == local.write(
            own, questions, [""] * 3, turns=turns, max_new_tokens=4
        )
        model.close()


def test_a_served_adapter_gives_the_local_verdict(
    folders: tuple[Path, Path], known_expert: None, face_photo: Path
) -> None:
    """Experts, calibration and band are the adapter's; only the matrix products happen elsewhere."""
    local = x2dfd.load(f"hub:{folders[0]}+{folders[1]}")
    assert isinstance(local.mllm, LocalMLLM)
    behind = Behind(local.mllm)
    with StandIn(behind, models=["base", "tiny"], tokenize=behind.tokenize) as endpoint:
        detector = x2dfd.load(f"tiny@{endpoint.url}+{folders[1]}")
        ours, wanted = detector.detect(face_photo, rationale=False), local.detect(face_photo, rationale=False)
        assert "continue_final_message" in endpoint.requests[0]
        record = case.record([ours])
    # Anywhere that serves it, the record holds; the local model may round otherwise, and is named as another.
    with StandIn(behind, models=["tiny"], tokenize=behind.tokenize) as elsewhere:
        again = x2dfd.load(f"tiny@{elsewhere.url}+{folders[1]}")
        found = case.verify(record, face_photo, again)
        assert found.outcome == "holds" and any("served.host" in note for note in found.notes), found
    assert case.verify(record, face_photo, local).outcome == "other_version"
    assert ours.verdict.label == wanted.verdict.label and ours.verdict.reason == wanted.verdict.reason
    assert ours.verdict.p_fake == pytest.approx(wanted.verdict.p_fake, abs=1e-4)
    assert ours.faces[0].p_fake_mllm == pytest.approx(wanted.faces[0].p_fake_mllm, abs=1e-3)
    assert ours.evidence == wanted.evidence and ours.warnings == wanted.warnings == ()
    same = {k: v for k, v in ours.model.items() if k not in ("served", "runs_on")}
    assert same == {k: v for k, v in wanted.model.items() if k != "runs_on"}
    assert ours.model["served"]["model"] == "tiny"
    assert Report.from_json(ours.to_json()) == ours


def test_an_endpoint_with_other_weights_is_refused(
    folders: tuple[Path, Path], known_expert: None, tmp_path: Path
) -> None:
    """The adapter's calibration would be put on another model's numbers, and nothing would say so."""
    local = x2dfd.load(f"hub:{folders[0]}+{folders[1]}").mllm
    assert isinstance(local, LocalMLLM)
    adapter = Path(shutil.copytree(folders[1], tmp_path / "adapter"))
    tiny.edit_card(adapter, probes=probe_logits(local))
    own, bare = Behind(local), Behind(LocalMLLM(*load_model(folders[0]), "bare"))
    with StandIn(own, tokenize=own.tokenize) as endpoint:
        x2dfd.load(f"m@{endpoint.url}+{adapter}")
    with StandIn(bare, tokenize=bare.tokenize) as endpoint, raises("probes_differ"):
        x2dfd.load(f"m@{endpoint.url}+{adapter}")
    (adapter / "adapter_model.safetensors").unlink()  # damaged: refused before anything is asked
    with StandIn(steady) as endpoint, raises("weights_missing", "adapter_model"):
        x2dfd.load(f"m@{endpoint.url}+{adapter}")
    assert not endpoint.requests


def test_a_model_with_a_forensic_tower_is_sent_closer_views(
    folders: tuple[Path, Path], known_expert: None, crops: Pixels, tmp_path: Path
) -> None:
    """Bug prevented: the server's tower sees other pictures than in training, and its answers shift by a little."""
    adapter = Path(shutil.copytree(folders[1], tmp_path / "adapter"))
    wanted = closer(torch.from_numpy(crops).permute(0, 3, 1, 2).float()).permute(0, 2, 3, 1).numpy()
    with StandIn(steady) as endpoint:
        for tower, picture in (("frozen", crops.astype(np.float32)), ("forensic", wanted)):
            tiny.edit_card(adapter, tower=tower, probes=())
            mllm: Any = x2dfd.load(f"m@{endpoint.url}+{adapter}").mllm
            urls = [url.split(",")[1] for url in mllm.encode(crops).urls]
            sent = [np.array(Image.open(io.BytesIO(base64.b64decode(url)))) for url in urls]
            assert np.abs(np.stack(sent).astype(np.float32) - picture.clip(0, 255)).max() <= 0.5


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_a_hosted_model_is_told_in_words(crops: Pixels) -> None:
    """It cannot continue an answer; and what changes must stand last, or no prefix is cached twice."""
    with StandIn(steady, owned_by="somebody") as endpoint:
        model = ServedMLLM(endpoint.url, "m")
        encoding = model.encode(crops[:1])
        assert model.verdict_logits(encoding, ["Real? And the x score is 0.1."])[0] == pytest.approx(math.log(2))
        assert model.write(encoding, ["Real?"], ["This image is fake."]) == ["The jaw looks blurred."]
        assert model.yes_no(crops[0], ["A? Answer Yes or No."]).p_yes[0] == pytest.approx(7 / 9)
        verdict, text, cue = endpoint.requests
    assert [m["role"] for m in verdict["messages"]] == ["system", "user"]
    kinds = [p.get("text", "picture") for p in verdict["messages"][1]["content"]]
    assert kinds == ["picture", prompts.SERVED_VERDICT, "Real? And the x score is 0.1."]
    assert "This image is fake." in text["messages"][1]["content"][1]["text"]
    assert [p["type"] for p in cue["messages"][1]["content"]] == ["image_url", "text"]
    for request in (verdict, text, cue):
        assert request["messages"][0] == verdict["messages"][0]
        assert request["messages"][1]["content"][0] == verdict["messages"][1]["content"][0]
        assert "continue_final_message" not in request and "logprob_token_ids" not in request
    np.testing.assert_array_equal(picture_of(verdict), crops[0])


@pytest.mark.parametrize(
    ("top", "logit"),
    [
        ({"Fake": math.log(0.5), " fake": math.log(0.25), "real": math.log(0.25)}, math.log(3)),
        ({"▁fa": math.log(0.8), "Ġreal": math.log(0.2)}, math.log(4)),
        ({"fake": math.log(0.9), "a": math.log(0.05), "b": math.log(0.01)}, math.log(90)),
        ({"real": math.log(0.9), "a": math.log(0.05)}, -math.log(18)),
        ({"f": -0.1, "r": -0.2, "realistic": -0.3}, None),
        ({"I": -0.001, "fake": -11.0, "real": -12.0}, None),  # next to impossible: their ratio is noise
        ({"I": -0.1, "Sorry": -2.0}, None),
    ],
)
def test_labels_are_read_from_the_likeliest_tokens(crops: Pixels, top: dict[str, float], logit: float | None) -> None:
    """Endpoints spell one label in many ways; a refusal to answer is no "real"."""
    with StandIn(Reply(next(iter(top)), top), owned_by="somebody") as endpoint:
        model = ServedMLLM(endpoint.url, "m")
        if logit is None:
            with raises("no_label"):
                model.verdict_logits(model.encode(crops[:1]), ["?"])
        else:
            assert model.verdict_logits(model.encode(crops[:1]), ["?"])[0] == pytest.approx(logit)
            return
        reply = model.yes_no(crops[0], ["?", "??"])  # an assessment goes on, and the answer counts for neither side
        assert reply.p_yes.tolist() == [0.5, 0.5] and reply.answers == ("other", "other")


def test_answers_come_in_order_and_no_more_at_a_time_than_allowed(crops: Pixels) -> None:
    """Forty answers that arrive in any order must not slip against their questions."""

    def late(request: Request) -> Reply:
        number = int(question_of(request).split()[1])
        p = (number + 1) / 50
        return Reply("Yes", {"Yes": math.log(p), "No": math.log(1 - p)}, delay=0.02 * (number % 3))

    with StandIn(late, models=None) as endpoint:  # it has no list of models either
        model = ServedMLLM(endpoint.url, "m", concurrency=5)
        assert not model.continues
        answers = model.yes_no(crops[0], [f"Number {i} ?" for i in range(40)])
    np.testing.assert_allclose(answers.p_yes, [(i + 1) / 50 for i in range(40)], atol=1e-9)
    assert 2 <= endpoint.most <= 5


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("owned_by", ["vllm", "somebody"])
def test_faults_are_survived(crops: Pixels, owned_by: str) -> None:
    """One answer in three fails, is late or breaks off: none may be lost or belong to another question."""
    faults = random.Random(1)

    def answer(request: Request) -> Reply:
        p = (int(question_of(request).split()[1]) + 1) / 100
        whole = Reply("Yes", {"Yes": math.log(p), "No": math.log(1 - p)})
        bad = (Reply("out of order", status=500), Reply("", status=429), replace(whole, delay=2.5))
        return faults.choices((whole, replace(whole, cut=True), *bad), (65, 10, 10, 10, 5))[0]

    with StandIn(answer, owned_by=owned_by) as endpoint:
        model = ServedMLLM(endpoint.url, "m", retries=12, timeout=2.0)
        answers = model.yes_no(crops[0], [f"Number {i} ?" for i in range(60)])
    np.testing.assert_allclose(answers.p_yes, [(i + 1) / 100 for i in range(60)], atol=1e-9)
    assert len(endpoint.requests) > 70


@pytest.mark.parametrize(
    ("answer", "code", "told"),
    [
        (Reply("no", status=500), "endpoint_error", "InternalServerError"),
        (Reply("no", status=429), "endpoint_error", "RateLimitError"),
        (Reply("the picture is not wanted", status=400), "endpoint_error", "not wanted"),
        (Reply(f"bad key {KEY}", status=401), "key_refused", "OPENAI_API_KEY"),
        (Reply("no", status=403), "key_refused", "OPENAI_API_KEY"),
        (Reply("no", status=404), "model_not_served", "'m'"),
        (Reply(" fake", {" fake": -0.1}, delay=1.5), "endpoint_timeout", "127.0.0.1"),
        (Reply(" fake", {" fake": -0.1}, cut=True), "endpoint_unreachable", "127.0.0.1"),
    ],
    ids=["500", "429", "400", "401", "403", "404", "slow", "cut"],
)  # fmt: skip
def test_an_error_says_what_is_wrong_and_never_the_key(
    crops: Pixels, answer: Reply, code: str, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What one picture can cause is that picture's row; what all will meet ends the run."""
    caplog.set_level(logging.DEBUG)
    with StandIn(answer) as endpoint:
        model = ServedMLLM(endpoint.url, "m", retries=1, timeout=0.3 if code == "endpoint_timeout" else 20.0)
        with raises(code, told) as caught:
            model.verdict_logits(model.encode(crops[:1]), ["?"])
    assert isinstance(caught.value, InputError) == code.startswith(("endpoint_error", "endpoint_timeout"))
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value) and KEY not in caplog.text


def caught(url: str, crops: Pixels, **options: Any) -> X2DFDError:
    """What asking once raises."""
    model = ServedMLLM(url, "m", retries=0, **options)
    with pytest.raises(X2DFDError) as raised:
        model.verdict_logits(model.encode(crops[:1]), ["?"])
    return raised.value


FAKE = {" fake": math.log(0.6), " real": math.log(0.3)}
MALFORMED = (
    *(b"", b"{", b'{"a":' * 100_000, b"[]", b"3", b'{"choices": []}'),
    b'{"choices": {"a": 1}}',
    b'{"choices": [{"message": null}]}',
    b'{"choices": [{"message": {"content": "x"}, "logprobs": {"content": [3]}}]}',
    b'{"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"token": "a", "logprob": "b"}]}}]}',
)


def learnt(crops: Pixels, refusal: str, takes: Callable[[Request], bool]) -> None:
    """What one refusal taught is not asked again."""

    def particular(request: Request) -> Reply:
        return Reply(" fake", FAKE) if takes(request) else Reply(refusal, status=400)

    with StandIn(particular) as endpoint:
        model = ServedMLLM(endpoint.url, "m")
        encoding = model.encode(crops)
        assert model.verdict_logits(encoding, ["?"] * 3) == pytest.approx([math.log(2)] * 3)
        before = len(endpoint.requests)
        model.verdict_logits(encoding, ["?"] * 3)
        assert len(endpoint.requests) == before + 3


def gives_none(crops: Pixels) -> None:
    for answer in (Reply(" fake"), Reply("logprobs are not supported", status=400)):
        with StandIn(answer) as endpoint:
            says(caught(endpoint.url, crops), "log_probabilities_missing")


def thinks(crops: Pixels) -> None:
    """Its first token is no verdict, whatever probability the labels have beside it, and its text no rationale."""
    reasons = b'{"choices": [{"message": {"content": "", "reasoning_content": "Okay"}}]}'
    for text in ("<think>", "<think>\nOkay"):
        with StandIn(Reply(text, {text: -0.001, "fake": -11.0, "real": -12.0})) as endpoint:
            says(caught(endpoint.url, crops), "model_thinks")
            model = ServedMLLM(endpoint.url, "m")
            with raises("model_thinks"):
                model.write(model.encode(crops[:1]), ["?"], ["This image is fake."])
    with odd(lambda handler: writes(handler, reasons)) as url:
        says(caught(url, crops), "model_thinks")


def redirects(crops: Pixels) -> None:
    with StandIn(steady) as other:
        with odd(lambda handler: writes(handler, status=307, Location=other.url + "/chat/completions")) as url:
            error = caught(url, crops)
        says(error, "redirected")
        assert not other.requests


def is_this_machine(crops: Pixels) -> None:
    with StandIn(steady) as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.delenv("NO_PROXY")
        patch.delenv("no_proxy", raising=False)
        with odd(lambda handler: writes(handler, status=502)) as proxy:
            for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
                patch.setenv(name, proxy)
            model = ServedMLLM(endpoint.url, "m")
            assert model.verdict_logits(model.encode(crops[:1]), ["?"])[0] == pytest.approx(math.log(2))


def writes_no_chat_completion(crops: Pixels) -> None:
    for body in MALFORMED:
        with odd(partial(writes, body=body)) as url:
            error = caught(url, crops)
        assert isinstance(error, InputError) and error.code == "endpoint_reply", (body[:80], error)
        assert "\n" not in str(error) and len(str(error)) < 200


def never_ends(crops: Pixels) -> None:
    """Endpoints are others' machines: neither a flood nor a drip of bytes may hold a run."""

    def flood(handler: BaseHTTPRequestHandler) -> None:
        writes(handler)
        for _ in range(served.REPLY_BYTES // (1 << 20) * 8):
            handler.wfile.write(bytes(1 << 20))

    def drip(handler: BaseHTTPRequestHandler) -> None:
        writes(handler)
        for _ in range(400):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)

    with odd(flood) as url:
        error = caught(url, crops)
    assert isinstance(error, InputError) and error.code == "endpoint_error" and "8 MB" in str(error)
    with odd(drip) as url:
        error = caught(url, crops, timeout=0.5)
    assert isinstance(error, InputError) and error.code == "endpoint_timeout"


def counts_requests(crops: Pixels) -> None:
    """Tries count, not questions: those that are made again are refused too."""
    begun: list[float] = []

    def counting(request: Request) -> Reply:
        begun.append(time.monotonic())
        return Reply("slow down", status=429) if len(begun) == 2 else steady(request)

    with StandIn(counting) as endpoint:
        model = ServedMLLM(endpoint.url, "m", requests_per_minute=600)
        start = time.monotonic()  # not the first arrival, which a busy machine may notice late
        assert len(model.verdict_logits(model.encode(crops), ["?"] * 3)) == 3
        with raises("option_invalid", 0):
            ServedMLLM(endpoint.url, "m", requests_per_minute=0)
    assert len(begun) == 4 and begun[3] - start > 0.25


def test_tries_begin_evenly_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause that is not used must not become a burst later, and a slow reply must not lengthen the pause."""
    import openai

    stock: Any = openai.DefaultAsyncHttpxClient
    httpx: Any = sys.modules[stock.__mro__[1].__module__.partition(".")[0]]
    loop, now, begun = asyncio.new_event_loop(), [100.0], list[float]()

    async def sleep(seconds: float) -> None:
        now[0] += seconds

    async def send(self: object, request: object, **options: object) -> object:
        begun.append(round(now[0] - 100, 6))
        now[0] += 0.4  # what the reply takes
        return httpx.Response(200, content=b"{}", request=request)

    async def asked() -> None:
        client = _http_client(openai, "localhost", 60.0, 60 / 60)
        for pause in (0, 0, 0, 7.5, 0):
            now[0] += pause
            await client.send(httpx.Request("GET", "http://localhost/v1"))
        await client.aclose()

    monkeypatch.setattr(loop, "time", lambda: now[0])
    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(stock, "send", send)
    loop.run_until_complete(asked())
    loop.close()
    assert begun == [0, 1, 2, 9.9, 10.9]


ODD: dict[str, Callable[[Pixels], None]] = {
    "takes `max_completion_tokens` alone": partial(
        learnt,
        refusal="Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
        takes=lambda request: "max_tokens" not in request,
    ),
    "refuses `temperature: 0`": partial(
        learnt,
        refusal="Unsupported value: 'temperature' does not support 0.",
        takes=lambda request: "temperature" not in request,
    ),
    "gives 5 log-probabilities at most": partial(
        learnt, refusal="Invalid 'top_logprobs': at most 5", takes=lambda request: request["top_logprobs"] <= 5
    ),
    "gives no log-probabilities": gives_none,
    "thinks before it answers (`<think>`, `reasoning_content`)": thinks,
    "redirects": redirects,
    "is this machine (localhost, 127.0.0.0/8, ::1)": is_this_machine,
    "answers with broken, deeply nested or misshapen JSON": writes_no_chat_completion,
    "sends more than 8 MB, or too slowly": never_ends,
    "limits the requests per minute": counts_requests,
}
"""What endpoints differ in, as the table of docs/served.md names it, and what shows how that is met."""


@pytest.mark.parametrize("name", ODD)
def test_an_odd_endpoint_is_met_as_the_docs_say(crops: Pixels, name: str) -> None:
    """A traceback, a run without end, a number read from what is none; or a row of the docs that nothing shows."""
    ODD[name](crops)
    text = (Path(__file__).parent.parent / "docs" / "served.md").read_text(encoding="utf-8")
    rows = text.split("| an endpoint that | what x2dfd does |\n|---|---|\n")[1].split("\n\n")[0]
    assert [row.split(" | ")[0] for row in rows.splitlines()] == [f"| {differs}" for differs in ODD]


def test_a_chat_gets_the_begin_token_of_training(crops: Pixels, tmp_path: Path, needs_base: None) -> None:
    """An engine adds none to a chat template that has none, as LLaVA-1.5's, and would score another prompt."""
    local = LocalMLLM(*load_model(tiny.write_base(tmp_path, tiny.processor_of_llava_15())), "tiny")
    behind = Behind(local)
    with StandIn(behind, tokenize=behind.tokenize) as endpoint:
        model = ServedMLLM(endpoint.url, "m")
        np.testing.assert_allclose(
            model.verdict_logits(model.encode(crops), ["?"] * 3),
            local.verdict_logits(local.encode(crops), ["?"] * 3),
            atol=1e-3,
        )
        assert all(request["add_special_tokens"] for request in endpoint.requests)


def test_the_key_is_the_environments_and_sent_only_to_the_endpoint(
    crops: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StandIn(steady, key=KEY) as endpoint:
        model = ServedMLLM(endpoint.url, "m")
        model.verdict_logits(model.encode(crops[:1]), ["?"])
        monkeypatch.setenv("OPENAI_API_KEY", "another")
        with raises("key_refused") as caught:
            ServedMLLM(endpoint.url, "m")
        assert "another" not in str(caught.value)
    for url in ("ftp://h/v1", "localhost:8000", "http://user:" + KEY + "@h/v1", "", "http://[", "http://h:99999/v1"):
        with raises("address_missing") as caught:
            ServedMLLM(url, "m")
        assert KEY not in str(caught.value)


def test_a_wrong_name_or_address_is_told_at_once() -> None:
    """After the first thousand pictures would be late."""
    models = ["llava-7b", "llava-7b-x2dfd"]
    with StandIn(steady, models=models) as endpoint:
        assert ServedMLLM(endpoint.url, "llava-7b:x2dfd").name == "served:llava-7b:x2dfd"  # as SGLang names an adapter
    with StandIn(steady, models=models) as endpoint, raises("unknown_name", "did you mean 'llava-7b'"):
        ServedMLLM(endpoint.url, "llava-7")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with raises("endpoint_unreachable", port):
        ServedMLLM(f"http://127.0.0.1:{port}/v1", "m", retries=1)


# --- through the doors -----------------------------------------------------------------------------------------------


@pytest.fixture
def no_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("x2dfd.loading.DEFAULT", ())


def test_without_a_calibration_the_report_says_so(no_experts: None, face_photo: Path) -> None:
    """A raw number that looks calibrated misleads; asking for a calibrated one must fail."""
    with StandIn(steady) as endpoint:
        detector = x2dfd.load(f"m@{endpoint.url}")
        report = detector.detect(face_photo)
        assert detector.chat(report, "And the eyes?") == "The jaw looks blurred."
        with raises("calibration_missing"):
            x2dfd.load(f"m@{endpoint.url}", mode="calibrated")
    assert report.verdict.p_fake == pytest.approx(2 / 3) and report.verdict.label == "fake"
    assert report.warnings == (UNCALIBRATED,) and report.model["mode"] == "paper" and report.model["band"] is None
    assert report.rationale == "The jaw looks blurred." and [c.area for c in report.cues] == ["jaw"]
    assert Report.from_json(report.to_json()) == report
    with raises("model_malformed"):
        x2dfd.load("@http://localhost:1/v1")


def test_one_picture_that_the_endpoint_refuses_is_one_row(no_experts: None, astronaut: Pixels, tmp_path: Path) -> None:
    """Content filters and overlong answers happen; seven good neighbours in the batch must not go with them."""
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for file in files:
        Image.fromarray(astronaut if file != files[2] else np.minimum(astronaut, 185) + 70).save(file)

    def picky(request: Request) -> Reply:
        return Reply("not this one", status=400) if picture_of(request).mean() > 160 else steady(request)

    with StandIn(picky) as endpoint:
        rows = list(x2dfd.load(f"m@{endpoint.url}").detect_many(files))
    assert [isinstance(r, Failure) for r in rows] == [False, False, True, False]
    failed = rows[2]
    assert isinstance(failed, Failure) and failed.code == "endpoint_error" and "not this one" in failed.reason
    assert failed.path == str(files[2]) and failed.sha256 is not None


def test_an_endpoint_that_fails_all_the_time_ends_the_run(
    no_experts: None, face_photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million rows of failures are not a result."""
    with StandIn(Reply("no", status=503)) as endpoint:
        detector = x2dfd.load(f"m@{endpoint.url}")
        monkeypatch.setattr(detector.mllm._client, "max_retries", 0)  # type: ignore[attr-defined]
        rows = []
        with raises("endpoint_failing", served.FAILURES_IN_A_ROW):
            for row in detector.detect_many([face_photo] * 50, batch_size=1):
                rows.append(row)
    assert len(rows) == served.FAILURES_IN_A_ROW - 1


def test_pictures_that_an_endpoint_refuses_do_not_end_the_run(no_experts: None, face_photo: Path) -> None:
    """A folder of pictures against a server's rules is a row each; the endpoint is well."""
    files = [face_photo] * (served.FAILURES_IN_A_ROW + 2)
    with StandIn(Reply("not this one", status=400)) as endpoint:
        rows = list(x2dfd.load(f"m@{endpoint.url}").detect_many(files, batch_size=2))
        assert [r.code for r in rows if isinstance(r, Failure)] == ["endpoint_error"] * len(files)
        # But a model that takes no pictures at all is a matter of setting up, not a million rows.
        with raises("requests_refused"):
            list(x2dfd.load(f"m@{endpoint.url}").detect_many([face_photo] * (2 * served.REFUSALS_FIRST)))


@pytest.mark.slow
def test_a_model_is_assessed_from_manifest_to_files(no_experts: None, astronaut: Pixels, tmp_path: Path) -> None:
    """Parts that fit alone and not together: manifest, crops, shipped questions, model, files; and a model that is not
    there is one line."""
    run, given = CliRunner(), ["assess", "--data", str(tiny.write_small_manifest(tmp_path / "m", astronaut, 2))]
    with StandIn(steady) as endpoint:
        done = run.invoke(cli.app, [*given, "--out", str(tmp_path / "a"), "--model", f"m@{endpoint.url}"])
        assert done.exit_code == 0, done.output
        gone = run.invoke(cli.app, [*given, "--out", str(tmp_path / "b"), "--model", f"n@{endpoint.url}"])
    made = read_assessment(tmp_path / "a")
    assert (made.model, made.n_real, made.n_fake) == ("served:m", 1, 1) and len(made.manifest_sha256 or "") == 64
    assert len(made.questions) == len(read_questions(BANK)) and {q.yes_rate for q in made.questions} == {1.0}
    assert "# What served:m sees" in done.stdout and str(tmp_path / "a" / "assessment.json") in done.stdout
    assert gone.exit_code == 1 and gone.stderr.startswith("error [unknown_name]: ") and "Traceback" not in gone.output
