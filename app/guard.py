"""Protection of the page: which hosts may call it, and how much uploads may take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from x2dfd.addresses import host_of, parsed

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Guard:
    """Refuses requests that another site's page makes (DNS rebinding, forged forms) and uploads beyond the quota."""

    def __init__(self, app: ASGIApp, *, uploads: Path, quota: int, address: str, names: frozenset[str]) -> None:
        """`uploads`: their folder; `quota`: the most bytes that may lie there; `address`: where the app listens;
        `names`: host names by which browsers call it, as behind a proxy.

        Other hosts are refused if the app listens on this machine alone or if names are given; pages of other sites
        always are.
        """
        self.app, self.uploads, self.quota, self.names = app, uploads, quota, names
        self.hosts = {address, *LOOPBACK, *names} if names or address in LOOPBACK else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if (reason := self._refusal(headers)) is not None:
            await _answer(send, 403, reason)
        elif scope["method"] == "POST" and scope["path"].endswith("/upload") and self._full():
            await _answer(send, 507, "too many uploads are stored here; they are deleted after about an hour")
        else:
            await self.app(scope, receive, send)

    def _full(self) -> bool:
        return sum(f.stat().st_size for f in self.uploads.rglob("*") if f.is_file()) >= self.quota

    def _refusal(self, headers: dict[str, str]) -> str | None:
        header = headers.get("host", "")
        host = host_of(f"//{header}")
        if host is None or (self.hosts is not None and host not in self.hosts):
            return "this page is not served under that name"
        origin = parsed(headers.get("origin", f"//{header}"))  # "null" has no host at all
        # Another port of the same host is another site; a proxy that shows the page has a name of its own.
        if origin is None or (origin.netloc != header and origin.hostname not in self.names):
            return "requests from pages of another site are refused"
        return None


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
