"""The demo under many visitors, slow ones and odd uploads, and when it is stopped."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed: pip install -c constraints.txt '.[app]'")

from app import demo
from tests.pictures import encoded
from tests.test_app import free_port
from x2dfd.files import file_sha256
from x2dfd.types import Failure, Report

SECONDS = 120.0  # generous: the machine may be busy


class Hashes:
    """In the place of a detector: its answer is the file's hash, which no other visitor's file has."""

    def detect_many(self, sources: Iterable[str], **_: Any) -> Iterator[Report | Failure]:
        for source in sources:
            yield Failure(source, file_sha256(Path(source)), "no_model", "a stand-in")

    def explain(self, report: Report, source: str, **_: Any) -> Report:
        return report

    def chat(self, report: Report, question: str, **_: Any) -> str:
        return ""


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    page = demo.build(Hashes())
    yield demo.launch(page, "127.0.0.1", free_port(), block=False).rstrip("/")
    page.close(verbose=False)


def png(shade: int) -> bytes:
    return encoded(Image.new("RGB", (32, 32), (shade, 80, 40)), "PNG")


def upload(address: str, data: bytes, name: str = "a.png") -> httpx.Response:
    # By hand: httpx sends no file at all where its name is empty.
    head = f'--b\r\ncontent-disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    form = {"content-type": "multipart/form-data; boundary=b"}
    body = head + data + b"\r\n--b--\r\n"
    return httpx.post(f"{address}/gradio_api/upload", content=body, headers=form, timeout=SECONDS)


def judged(address: str, data: bytes) -> Any:
    """The endpoint's answer about a file, as a program gets it."""
    file = {"path": upload(address, data).raise_for_status().json()[0], "meta": {"_type": "gradio.FileData"}}
    call = f"{address}/gradio_api/call/judge"
    event = httpx.post(call, json={"data": [file]}, timeout=SECONDS).raise_for_status().json()["event_id"]
    with httpx.stream("GET", f"{call}/{event}", timeout=SECONDS) as stream:
        lines = list(stream.iter_lines())
    assert "event: complete" in lines, lines
    return json.loads(next(line for line in reversed(lines) if line.startswith("data:")).removeprefix("data:"))[0]


def test_thirty_visitors_at_once_get_their_own_answers(address: str) -> None:
    """Answers that are mixed up, or visitors who are turned away, where a class of thirty opens the page."""
    files = [png(shade) for shade in range(30)]
    with ThreadPoolExecutor(30) as visitors:
        answers = list(visitors.map(lambda data: judged(address, data), files))
    assert [a["sha256"] for a in answers] == [hashlib.sha256(data).hexdigest() for data in files]


def test_an_upload_of_any_name_is_taken_or_refused_and_stays_in_its_folder(address: str, tmp_path: Path) -> None:
    """A name is the visitor's to choose: it must neither end the app nor lead out of the folder."""
    for name in ("", " ", ".", "..", "/", "../../a.png", "a\0b.png", "x" * 400, "\u202egnp.exe"):
        answer = upload(address, png(1), name)
        assert answer.status_code < 500, name
        for path in answer.json() if answer.status_code == 200 else ():
            assert Path(path).resolve().is_relative_to((tmp_path / "uploads").resolve()), name
    assert judged(address, png(2))["error"]["code"] == "no_model"


def test_slow_visitors_keep_nobody_waiting(address: str) -> None:
    """Forty that send a byte now and then, or never read, took all places of a server that waits for each."""
    host, port = address.removeprefix("http://").split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(40)]
    try:
        for number, one in enumerate(slow):
            one.sendall(b"POST /gradio_api/upload HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 9999\r\n")
            if number % 2:
                one.sendall(b"content-type: multipart/form-data; boundary=b\r\n\r\n--b\r\n")
        start = time.monotonic()
        assert judged(address, png(3))["error"]["code"] == "no_model"
        assert time.monotonic() - start < SECONDS / 2
    finally:
        for one in slow:
            one.close()
    assert judged(address, png(4))["error"]["code"] == "no_model"
