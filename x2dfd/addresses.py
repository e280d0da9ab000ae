"""Network addresses out of options and headers: their parts, or None where they are malformed."""

from __future__ import annotations

import ipaddress
from urllib.parse import SplitResult, urlsplit

from x2dfd.errors import SetupError


def parsed(address: str) -> SplitResult | None:
    """The parts of an address that names a host; None for anything else."""
    try:
        parts = urlsplit(address)
        return parts if parts.hostname and parts.port != 0 else None  # `port` raises for what is none
    except ValueError:
        return None


def host_of(address: str) -> str | None:
    """The host of an address, in lower case; None for anything else."""
    parts = parsed(address)
    return parts.hostname if parts else None


def is_loopback(host: str) -> bool:
    """Whether a name or number means this machine alone (RFC 6761 for names)."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def check_host(host: str) -> None:
    """Refuse a blank address to listen on, as of an unset shell variable: sockets take it for every address."""
    if not host.strip():
        raise SetupError(
            "--host is empty: give an address, such as 127.0.0.1 for this machine alone", code="host_missing"
        )
