"""Content Credentials (C2PA): what a file's own signed history says, read offline and kept apart from the estimate.

Five states and a sixth for "nobody looked": `absent`, `valid_untrusted`, `trusted`, `invalid`, `error`, `not_checked`.
Silence is no sign of forgery, a valid signature is no sign of truth, and an invalid one may come from ordinary editing.
The reader is c2pa-python (extra `[c2pa]`); nothing is fetched: no remote manifest, no revocation list, no trust list.
A trust list of your own (PEM) is named by the environment variable `X2DFD_C2PA_TRUST`; without it nobody is trusted.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from x2dfd.errors import SetupError

TRUST = "X2DFD_C2PA_TRUST"
MEND = "pip install -c constraints.txt '.[c2pa]'"
MIME = {
    "JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif", "TIFF": "image/tiff",
    "AVIF": "image/avif", "HEIF": "image/heif", "mov": "video/mp4", "avi": "video/avi",
}  # fmt: skip
"""Formats (as `media` names them) that can carry Content Credentials, and the names the reader knows them by."""
_STATES = {"Trusted": "trusted", "Valid": "valid_untrusted", "Invalid": "invalid"}
_WORDS = 200  # characters of a text that stands in the file


def read_provenance(source: str | Path | bytes, format: str) -> dict[str, Any]:
    """The C2PA state of a file that `media` could read, with the reader's own codes; what a file holds never raises.

    `format` as in `Report.media`. The result has `state`, and where they apply `codes` (failures and remarks of the
    validation, C2PA specification 2.x), `signer`, `generator`, `signed`, `source_types` (IPTC digital source types that
    the claim states) and `reason`. Raises SetupError when the trust list that the environment names cannot be read.
    """
    if find_spec("c2pa") is None:
        return {"state": "not_checked", "reason": f"the package c2pa-python is not installed: {MEND}"}
    if format not in MIME:
        return {"state": "not_checked", "reason": f"{format} files carry no Content Credentials that can be read here"}
    import c2pa

    settings: dict[str, Any] = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_trust": True}}
    if anchors := os.environ.get(TRUST):
        try:
            settings["trust"] = {"user_anchors": Path(anchors).read_text("ascii")}
        except (OSError, ValueError) as error:
            raise SetupError(f"the trust list {anchors} cannot be read ({error}); unset {TRUST} or mend it") from error
    try:
        context = c2pa.Context(c2pa.Settings.from_dict(settings))
    except c2pa.C2paError as error:
        raise SetupError(f"the trust list {anchors} is none ({error}); unset {TRUST} or mend it") from error
    try:
        with (
            io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as stream,
            c2pa.Reader(MIME[format], stream, context=context) as reader,
        ):
            return _stated(reader)
    except c2pa.C2paError.ManifestNotFound:
        return {"state": "absent"}
    except (c2pa.C2paError, OSError, ValueError) as error:
        return {"state": "error", "reason": _plain(str(error))}


def _stated(reader: Any) -> dict[str, Any]:
    state = _STATES.get(str(reader.get_validation_state()))
    if state is None:
        return {"state": "error", "reason": f"the reader gave the state {reader.get_validation_state()!r}"}
    manifest = reader.get_active_manifest() or {}
    signature = manifest.get("signature_info") or {}
    found: dict[str, Any] = {"state": state, "codes": sorted(set(_codes(reader.get_validation_results() or {})))}
    names = [str(g.get("name")) for g in manifest.get("claim_generator_info") or () if g.get("name")]
    facts = {
        "signer": signature.get("common_name") or signature.get("issuer"),
        "generator": ", ".join(names) or manifest.get("claim_generator"),
        "signed": signature.get("time"),
    }
    found |= {key: _plain(str(value)) for key, value in facts.items() if value}
    types = sorted(
        {
            _plain(str(action["digitalSourceType"]).rsplit("/", 1)[-1])
            for assertion in manifest.get("assertions") or ()
            if str(assertion.get("label", "")).startswith("c2pa.actions")
            for action in (assertion.get("data") or {}).get("actions", ())
            if action.get("digitalSourceType")
        }
    )
    return found | ({"source_types": types} if types else {})


def _codes(results: dict[str, Any]) -> Iterator[str]:
    """Failures and remarks of the active manifest and of its ingredients."""
    parts = [results.get("activeManifest") or {}]
    parts += [delta.get("validationDeltas") or {} for delta in results.get("ingredientDeltas") or ()]
    for part in parts:
        for kind in ("failure", "informational"):
            yield from (str(entry["code"]) for entry in part.get(kind) or () if entry.get("code"))


def _plain(text: str) -> str:
    """Text out of the file: one printable line of bounded length."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:_WORDS]
