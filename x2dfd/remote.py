"""A client of `x2dfd serve` with a detector's interface: it imports nothing heavy and loads no model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

from x2dfd.addresses import is_loopback, parsed
from x2dfd.errors import InputError, SetupError, X2DFDError
from x2dfd.files import Json, parse_json
from x2dfd.paths import open_source
from x2dfd.types import Failure, Report, result_of

MAX_UPLOAD = 100_000_000  # bytes; the server holds it in memory
TIMEOUT_S = 600.0  # seconds for an answer: a long clip on a busy machine
HEADERS = {"Content-Type": "application/octet-stream"}
BUSY, FAILED = 503, 422  # of the status; the file of a failed one is a row
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # seconds before a server that is busy is asked again


class ServerDetector:
    """Replaces a Detector for `detect` and asks a server instead. Raises X2DFDError when there is none."""

    def __init__(self, url: str) -> None:
        address = parsed(url)
        if address is None or address.scheme not in ("http", "https"):
            raise SetupError(
                f"{url} is not an address of a server: give the one that `x2dfd serve` prints, such as http://127.0.0.1:8417",
                code="address_missing",
            )
        self._url = url.rstrip("/")
        # A proxy would be handed the pictures on their way to this machine.
        self._open = build_opener(*([ProxyHandler({})] if is_loopback(str(address.hostname)) else [])).open
        self.facts: Json = self._request("/model", None)

    def detect_many(
        self, sources: Iterable[Path | bytes], *, batch_size: int = 8, rationale: bool = True, frames: int = 32
    ) -> Iterator[Report | Failure]:
        """As Detector.detect_many, one file after the other."""
        options = urlencode({"rationale": rationale, "frames": frames})
        for source in sources:
            try:
                with open_source(source) as (file, _):
                    data = file.read(MAX_UPLOAD + 1)
                if len(data) > MAX_UPLOAD:
                    raise InputError("file_too_large", f"a server takes {MAX_UPLOAD:,} bytes at most")
            except InputError as error:
                yield Failure(None if isinstance(source, bytes) else str(source), None, error.code, error.reason)
                continue
            reply = self._request(f"/detect?{options}", data)
            try:
                result = result_of(reply)
            except (ValueError, KeyError, TypeError) as error:
                raise X2DFDError(
                    f"the answer of {self._url} cannot be read by this version: {error}", code="server_reply"
                ) from error
            yield result

    def _request(self, path: str, data: bytes | None) -> Json:
        try:
            content = parse_json(self._answer(Request(self._url + path, data, HEADERS)))
        except (URLError, OSError, HTTPException, ValueError) as error:
            raise X2DFDError(
                f"{self._url} does not answer ({getattr(error, 'reason', error)}); start it: x2dfd serve",
                code="server_missing",
            ) from error
        if not isinstance(content, dict):
            raise X2DFDError(
                f"{self._url} is not an `x2dfd serve`: it answered {json.dumps(content)[:60]}", code="server_reply"
            )
        return content

    def _answer(self, request: Request) -> bytes:
        """The body of the answer; a server that is busy is asked again after each pause."""
        pauses = iter(PAUSES_S)
        while True:
            try:
                with self._open(request, timeout=TIMEOUT_S) as reply:
                    return bytes(reply.read())
            except HTTPError as error:
                with error:
                    body = error.read()
                if error.code == FAILED:
                    return body
                pause = next(pauses, None)
                if error.code != BUSY or pause is None:  # else it answers under other names only, or takes no such file
                    raise X2DFDError(f"{self._url} refuses: {error}{_reason(body)}", code="server_refuses") from error
            time.sleep(pause)


def _reason(body: bytes) -> str:
    """The reason in a refusal of `x2dfd serve`, to follow its status; "" in any other body."""
    try:
        return f": {parse_json(body)['error']['reason']}"[:200]
    except (ValueError, KeyError, TypeError):
        return ""
