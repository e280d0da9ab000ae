"""`x2dfd serve`: a loaded detector behind HTTP, by default for this machine alone.

A file is posted to /detect, as the body or as the only file of a form; the answer is the object of
`x2dfd detect --json`. /openapi.json describes the interface.
Importing this module raises SetupError where FastAPI is missing.
"""

import asyncio
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import TYPE_CHECKING

from x2dfd.addresses import check_host, host_of, is_loopback
from x2dfd.errors import SetupError
from x2dfd.files import Json
from x2dfd.remote import MAX_UPLOAD
from x2dfd.types import MAX_FRAMES, Failure, Report

try:
    import python_multipart  # noqa: F401
    import uvicorn
    from fastapi import FastAPI, Query, Request, Response
    from fastapi.concurrency import run_in_threadpool
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise SetupError(
        f"x2dfd serve needs FastAPI, uvicorn and python-multipart ({error}): pip install 'x2dfd[serve-http]'",
        code="package_missing",
    ) from error

if TYPE_CHECKING:
    from x2dfd.detector import Detector

UPLOAD_SECONDS = 60.0  # for one upload: slow clients would keep every place
AT_ONCE = 8  # uploads in memory; further ones are refused as `busy`
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANY_ADDRESS = ("0.0.0.0", "::")  # every address of this machine; its names are not known here
FORM = "multipart/form-data"
_BYTES = {"type": "string", "format": "binary"}
_FIELDS = {"type": "object", "properties": {"file": _BYTES}, "required": ["file"]}
FILE = {"content": {"application/octet-stream": {"schema": _BYTES}, FORM: {"schema": _FIELDS}}, "required": True}
_ERROR = {"type": "object", "properties": {"code": {"type": "string"}, "reason": {"type": "string"}}}
_REFUSAL = {"application/json": {"schema": {"type": "object", "properties": {"error": _ERROR}}}}
FAILED: dict[int | str, Json] = {422: {"description": "a bad file or parameter", "content": _REFUSAL}}


def application(detector: "Detector", hosts: Collection[str] | None = LOOPBACK) -> FastAPI:
    """The server. `hosts`: the names under which it answers, None for any; pages of other origins are refused."""
    lock = Lock()
    uploads = 0

    async def same_origin(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        # A page elsewhere could post here through its reader's browser, or point its own name at this address.
        host = host_of(f"//{request.headers.get('host', '')}")
        allowed = (host,) if hosts is None and host else hosts or ()
        if not {host, *map(host_of, request.headers.getlist("origin"))} <= set(allowed):
            return _error(403, "foreign_host", "this server answers only under its own address")
        return await call_next(request)

    def root() -> Json:
        """The routes."""
        return {
            "POST /detect": "judges a picture or a video: curl -F file=@face.jpg ADDRESS/detect",
            "GET /model": "facts about the model that answers here",
            "GET /openapi.json": "describes it all",
        }

    def model() -> Json:
        """Facts about the model that answers."""
        return detector.info.to_dict()

    def judge(data: bytes, rationale: bool, frames: int) -> Report | Failure:
        with lock:
            return next(iter(detector.detect_many([data], rationale=rationale, frames=frames)))

    async def detect(
        request: Request, rationale: bool = True, frames: int = Query(32, ge=1, le=MAX_FRAMES)
    ) -> Response:
        """Judge the posted picture or video. 422: it cannot be judged, with the reason in `error`."""
        nonlocal uploads
        if uploads >= AT_ONCE:
            await _read_past(request)
            return _error(503, "busy", "too many files at once: ask again later")
        uploads += 1
        try:
            try:
                async with asyncio.timeout(UPLOAD_SECONDS):
                    data = await _uploaded_file(request)
            except _TooLarge:
                return _error(413, "file_too_large", f"more than {MAX_UPLOAD:,} bytes")
            except TimeoutError:
                return _error(408, "too_slow", f"the file did not arrive within {UPLOAD_SECONDS:g} seconds")
            except ClientDisconnect:
                return _error(400, "cut_off", "the file did not arrive")
            except MultiPartException as error:
                return _error(400, "bad_form", error.message)
            result = await run_in_threadpool(judge, data, rationale, frames)
        finally:
            uploads -= 1
        return JSONResponse(result.to_dict(), 422 if isinstance(result, Failure) else 200)

    app = FastAPI(title="x2dfd", docs_url=None, redoc_url=None)  # those pages load scripts from elsewhere
    app.middleware("http")(same_origin)
    app.exception_handler(RequestValidationError)(_parameter_error)
    app.add_api_route("/", root, include_in_schema=False)
    app.add_api_route("/model", model)
    app.add_api_route("/detect", detect, methods=["POST"], openapi_extra={"requestBody": FILE}, responses=FAILED)
    return app


class _TooLarge(Exception):
    """The upload is larger than MAX_UPLOAD."""


async def _uploaded_file(request: Request) -> bytes:
    """The posted file. Raises _TooLarge, and MultiPartException for a form that does not hold one file."""

    if int(request.headers.get("content-length", 0)) > MAX_UPLOAD:
        raise _TooLarge  # before reading it

    async def bounded() -> AsyncGenerator[bytes, None]:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > MAX_UPLOAD:
                raise _TooLarge
            yield chunk

    if not request.headers.get("content-type", "").lower().startswith(FORM):
        return b"".join([chunk async for chunk in bounded()])
    form = await MultiPartParser(request.headers, bounded(), max_files=1).parse()
    try:
        files = [value for value in form.values() if isinstance(value, UploadFile)]
        if not files:
            raise MultiPartException("the form holds no file: curl -F file=@photo.jpg")
        return await files[0].read()
    finally:
        await form.close()


async def _read_past(request: Request) -> None:
    """Reads an upload and keeps nothing: a client that is still sending when the connection closes sees no answer."""
    size = 0
    with suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(UPLOAD_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > MAX_UPLOAD:
                    return


def _error(status: int, code: str, reason: str) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "reason": reason}}, status)


async def _parameter_error(_: Request, error: RequestValidationError) -> Response:
    """FastAPI's message about a wrong parameter, in the shape of every other error."""
    first = error.errors()[0]
    return _error(422, "bad_request", f"{first['loc'][-1]}: {first['msg']}")


def warm_up(detector: "Detector") -> None:
    """Load the rest of a model of which only the tower is here, or the first request that asks for a text waits."""
    from x2dfd.tower_first import TowerFirst

    if isinstance(detector.mllm, TowerFirst):
        _ = detector.mllm.whole


def serve(detector: "Detector", host: str, listener: socket.socket) -> None:
    """Answer on a socket of `listening` until interrupted. `host`: the one that it listens on."""
    hosts = LOOPBACK if is_loopback(host) else None if host in ANY_ADDRESS else (*LOOPBACK, host)
    uvicorn.Server(uvicorn.Config(application(detector, hosts), log_level="warning")).run(sockets=[listener])


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens there, opened before a model is loaded. Raises SetupError where that fails."""
    check_host(host)
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise SetupError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); give another port with --port",
            code="port_unavailable",
        ) from error
    with listener:
        yield listener
