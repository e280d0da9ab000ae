"""What stands before the page: who may call it, and how much may lie here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Quota:
    """How much the uploads in a folder may take together."""

    def __init__(self, folder: Path, most: int) -> None:
        self.folder = folder
        self.most = most

    def full(self) -> bool:
        return sum(f.stat().st_size for f in self.folder.rglob("*") if f.is_file()) >= self.most


class Guard:
    """Refuses requests that another site's page makes (DNS rebinding, forged forms) and uploads beyond the quota."""

    def __init__(self, app: App, *, uploads: Quota, here: str, names: frozenset[str]) -> None:
        """`here`: the address it listens on; `names`: under which browsers call it, as behind a proxy.

        Other hosts are refused where it listens on this machine alone or where names are given; pages of other sites
        always are.
        """
        self.app = app
        self.uploads = uploads
        self.names = names
        self.hosts = {here, *LOOPBACK, *names} if names or here in LOOPBACK else None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if (refused := self._refused(headers)) is not None:
            await _answer(send, 403, refused)
        elif scope["method"] == "POST" and scope["path"].endswith("/upload") and self.uploads.full():
            await _answer(send, 507, "too many uploads lie here; they are deleted after about an hour")
        else:
            await self.app(scope, receive, send)

    def _refused(self, headers: dict[str, str]) -> str | None:
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        if self.hosts is not None and host not in self.hosts:
            return "this page is not served under that name"
        origin = urlsplit(headers.get("origin", f"//{headers.get('host', '')}"))  # "null" has no host at all
        # Another port of the same host is another site; a proxy that shows the page has a name of its own.
        if origin.netloc != headers.get("host", "") and (origin.hostname or "") not in self.names:
            return "requests from pages of another site are refused"
        return None


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
