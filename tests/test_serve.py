"""The warm server and who asks it: the same answers, and nothing for strangers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import x2dfd
from tests.raising import raises
from tests.stub import StubDetector
from x2dfd.addresses import is_loopback
from x2dfd.cli import app
from x2dfd.errors import X2DFDError
from x2dfd.model_spec import ModelSpec
from x2dfd.remote import ServerDetector
from x2dfd.tower_first import TowerFirst
from x2dfd.types import Failure, ModelInfo, Report

uvicorn: Any = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
testclient: Any = pytest.importorskip("fastapi.testclient")

from x2dfd import serve  # noqa: E402


class Stub:
    """Judges bytes by their length."""

    info = StubDetector().info

    def detect_many(self, sources: Iterable[bytes], **options: Any) -> Iterator[Report | Failure]:
        for data in sources:
            if len(data) < 2000:
                yield Failure(None, "0" * 64, "not_an_image", "too short")
            else:
                report = StubDetector()._judge(Path(str(len(data))))
                assert isinstance(report, Report)
                yield report


@pytest.fixture
def client() -> Any:
    stub: Any = Stub()
    return testclient.TestClient(serve.application(stub), base_url="http://127.0.0.1:8417")


@pytest.fixture
def url() -> Iterator[str]:
    """A server on a port of its own."""
    stub: Any = Stub()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()  # from now on a request waits for the server
        server = uvicorn.Server(uvicorn.Config(serve.application(stub), log_level="error"))
        thread = threading.Thread(target=lambda: server.run(sockets=[taken]), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def test_the_server_says_what_the_detector_says(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: another answer over HTTP, or pictures that a proxy sees on their way to this machine."""
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers there
    remote = ServerDetector(url)
    assert remote.facts == Stub.info.to_dict()
    photo, bad = tmp_path / "photo.jpg", tmp_path / "bad.jpg"
    photo.write_bytes(b"x" * 2001)
    bad.write_bytes(b"no picture")
    said, broken, absent = remote.detect_many([photo, bad, tmp_path / "missing.jpg"], rationale=False)
    assert said == next(Stub().detect_many([photo.read_bytes()]))
    assert isinstance(broken, Failure) and broken.code == "not_an_image" and broken.sha256
    assert isinstance(absent, Failure) and absent.code == "not_found"


def test_a_busy_server_is_asked_again(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: one answer of "busy" ends a run over thousands of files, and does not say why."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            monkeypatch.setattr(serve, "AT_ONCE", 8)

    monkeypatch.setattr("x2dfd.remote.time.sleep", sleep)
    (tmp_path / "photo.jpg").write_bytes(b"x" * 20_000_001)  # still being sent when the server would have answered
    remote = ServerDetector(url)
    monkeypatch.setattr(serve, "AT_ONCE", 0)
    [said] = remote.detect_many([tmp_path / "photo.jpg"])
    assert isinstance(said, Report) and len(slept) == 2 and slept[0] < slept[1]
    monkeypatch.setattr(serve, "AT_ONCE", 0)
    with raises("server_refuses", "503", "too many files at once"):
        list(remote.detect_many([tmp_path / "photo.jpg"]))


def test_strangers_are_refused(client: Any) -> None:
    """Bug prevented: a web page that asks the server of whoever reads it, by its address or by a name made for it."""
    assert client.get("/model").status_code == 200
    assert client.get("/model", headers={"Origin": "http://localhost:8417"}).status_code == 200
    for header in (
        {"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Host": ""}, {"Host": "["},
        {"Origin": "http://["},
    ):  # fmt: skip
        for answer in (client.get("/model", headers=header), client.post("/detect", content=b"x", headers=header)):
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "foreign_host"


def test_an_upload_is_read_as_its_file_and_bounded(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: `curl -F file=@photo.jpg` has its boundaries judged as a picture; uploads fill the memory."""
    photo = bytes(range(256)) * 8
    plain, form = client.post("/detect", content=photo), client.post("/detect", files={"file": ("a.jpg", photo)})
    assert plain.status_code == form.status_code == 200 and form.json() == plain.json()
    two = [("file", ("a.jpg", photo)), ("file", ("b.jpg", photo))]
    for wrong in ({"files": two}, {"data": {"file": "a"}, "files": {"": ("", b"")}}):
        answer = client.post("/detect", **wrong)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "bad_form"
    monkeypatch.setattr(serve, "MAX_UPLOAD", 1000)
    assert client.post("/detect", files={"file": ("a.jpg", photo)}).status_code == 413
    assert client.post("/detect", content=b"x" * 1001).status_code == 413
    assert client.post("/detect", content=b"x" * 1000).status_code == 422  # taken in, and no picture
    for number in (0, 1001):
        wrong_number = client.post(f"/detect?frames={number}", content=b"x")
        assert wrong_number.status_code == 422 and wrong_number.json()["error"]["code"] == "bad_request"
        assert "frames" in wrong_number.json()["error"]["reason"]
    monkeypatch.setattr(serve, "AT_ONCE", 0)
    assert client.post("/detect", content=b"x").status_code == 503
    described = client.get("/openapi.json").json()["paths"]
    # Who opens the address in a browser is told where to ask, and every place that is named is there.
    assert {place.split()[1] for place in client.get("/").json()} == {*described, "/openapi.json"}
    body = described["/detect"]["post"]["requestBody"]
    assert set(body["content"]) == {"application/octet-stream", "multipart/form-data"}
    assert set(described) == {"/detect", "/model"}


def test_a_client_that_stalls_or_leaves_frees_its_place(
    capfd: pytest.CaptureFixture[str], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug prevented: eight idle uploads shut everybody out for good; one that was cut off left a traceback."""
    monkeypatch.setattr(serve, "AT_ONCE", 2)  # the one that left may be gone a moment later
    port = int(url.rpartition(":")[2])
    head = b"POST /detect HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\nx"
    for seconds, length, status in ((60.0, 9, None), (0.2, 9, b" 408 "), (60.0, 10**15, b" 413 "), (60.0, 1, b" 422 ")):
        monkeypatch.setattr(serve, "UPLOAD_SECONDS", seconds)
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            client.sendall(head % length)
            if status is None:
                client.shutdown(socket.SHUT_RDWR)
            else:
                assert status in client.recv(40)
    assert "Traceback" not in capfd.readouterr().err


def test_no_server_is_one_line(tmp_path: Path) -> None:
    """Bug prevented: a traceback where the server was not started; an address printed as if somebody listened there."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]  # is told before a model is loaded
        done = CliRunner().invoke(app, ["serve", "--port", str(port), "--model", "/no/such/model"])
    assert done.exit_code == 1 and "[port_unavailable]" in done.stderr and str(port) in done.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening
        with pytest.raises(X2DFDError):
            ServerDetector(f"http://127.0.0.1:{taken.getsockname()[1]}")
    for url in (
        "ftp://127.0.0.1",
        "127.0.0.1:8417",
        "http://",
        "http://[",
        "http://[x]",
        "http://a:99999",
        "http://a:x",
    ):
        with raises("address_missing", url):
            ServerDetector(url)
    # Only this machine goes past the proxy, and no name that looks like it.
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost", "a.localhost")))
    assert not any(map(is_loopback, ("127.0.0.1.example", "0.0.0.0", "10.0.0.1", "localhost.example")))


@pytest.mark.parametrize("host", ["", " "])
def test_a_blank_host_is_refused(host: str) -> None:
    """Bug prevented: `--host "$ADDRESS"` with the variable unset listens on every address of the machine."""
    with raises("host_missing", "--host"), serve.listening(host, 0):
        pass


def test_the_model_is_loaded_as_the_options_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: `x2dfd serve --device cuda:1` loads on the CPU, in another precision, and nobody is told;
    the address is printed, and who asks first waits until the language model is loaded."""
    given: dict[str, Any] = {}
    order: list[str] = []
    monkeypatch.setattr(TowerFirst, "whole", property(lambda self: order.append("loaded")))

    def load(model: ModelSpec, **options: Any) -> SimpleNamespace:
        given.update(options, model=model)
        return SimpleNamespace(mllm=TowerFirst.__new__(TowerFirst))

    monkeypatch.setattr(x2dfd, "load", load, raising=False)
    monkeypatch.setattr("x2dfd.cli.typer.echo", lambda *_, **__: order.append("address"))
    monkeypatch.setattr(serve, "serve", lambda detector, host, there: None)
    monkeypatch.setattr("x2dfd.worker.isolating", nullcontext)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    asked = ["--device", "cuda:1", "--dtype", "bf16", "--bits", "4", "--device-map", "auto", "--threads", "3"]
    done = CliRunner().invoke(app, ["serve", "--port", port, "--model", "hub:B+A", "--mode", "paper", *asked])
    assert done.exit_code == 0 and order == ["loaded", "address"], done.output
    assert given == {
        "model": ModelSpec(base="B", adapter=Path("A")), "mode": "paper", "device": "cuda:1", "dtype": "bf16",
        "bits": 4, "device_map": "auto", "threads": 3,
    }  # fmt: skip


def test_a_server_on_a_name_answers_under_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: a server that listens for others and refuses them all."""
    asked: list[Any] = []

    def server(config: Any) -> SimpleNamespace:
        asked.append(config.app)
        return SimpleNamespace(run=lambda sockets: None)

    monkeypatch.setattr(uvicorn, "Server", server)
    stub: Any = SimpleNamespace(info=ModelInfo("stub", {}))
    with socket.socket() as there:
        serve.serve(stub, "192.0.2.7", there)
    other = testclient.TestClient(asked[0], base_url="http://192.0.2.7")
    assert other.get("/model").json()["name"] == "stub"
