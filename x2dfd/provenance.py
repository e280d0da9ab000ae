"""Reads a file's Content Credentials and metadata, offline and without any effect on the estimate.

Content Credentials (C2PA) have five states, `absent`, `valid_untrusted`, `trusted`, `invalid`, `error`, and a sixth,
`not_checked`. Their absence is no sign of forgery, a valid signature is no sign of truth, and an invalid one may come
from ordinary editing. The reader is c2pa-python (extra `[c2pa]`); nothing is fetched: no remote manifest, no revocation
list, no trust list. The variable `X2DFD_C2PA_TRUST` names a trust list (PEM); without one nobody is trusted.
What both state about how the file was made becomes its statements: `x2dfd.statements`.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from x2dfd.errors import SetupError
from x2dfd.files import Json, parse_json
from x2dfd.statements import (
    GENERATED,
    MAX_STATEMENTS,
    PARTLY,
    SOURCE,
    generator_named,
    plain,
    read_statements,
    source_type,
)

if TYPE_CHECKING:
    import c2pa


CREDENTIALS = "Content Credentials"  # place of a statement that is not in the metadata
TRUST = "X2DFD_C2PA_TRUST"
INSTALL = "pip install -c constraints.txt '.[c2pa]'"
MIME = {
    "JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif", "TIFF": "image/tiff",
    "AVIF": "image/avif", "HEIF": "image/heif", "mov": "video/mp4", "avi": "video/avi",
}  # fmt: skip
"""Formats (as `media` names them) that can carry Content Credentials, and the reader's names for them."""
_STATES = {"Trusted": "trusted", "Valid": "valid_untrusted", "Invalid": "invalid"}
_MAX_STORE = 20_000_000  # characters of the reader's JSON in which statements are looked for
_MAX_MANIFESTS = 100  # and assertions of each
_MAX_VALUES = 10_000  # of one assertion


def read_provenance(source: str | Path | bytes, format: str) -> Json:
    """The C2PA state of a file that `media` could read, and all its statements about how it was made.

    `format` as in `Report.media`. The result has `state`, `statements` (each with `kind`, `says`, `where`), and where
    they apply `codes` (failures and remarks of the validation, C2PA specification 2.x), `signer`, `generator`,
    `signed`, `source_types` (IPTC digital source types that the claim states) and `reason`. No content of a file
    raises. Raises SetupError when the trust list that the environment names cannot be read.
    """
    credentials = _credentials(source, format)
    try:
        statements = read_statements(source, format)
    except OSError as error:  # removed since it was decoded
        credentials.setdefault("reason", f"the metadata cannot be read: {error.strerror}")
        statements = []
    return credentials | {"statements": [*statements, *credentials.get("statements", [])][:MAX_STATEMENTS]}


def _credentials(source: str | Path | bytes, format: str) -> Json:
    if find_spec("c2pa") is None:
        return {"state": "not_checked", "reason": f"the package c2pa-python is not installed: {INSTALL}"}
    if format not in MIME:
        return {"state": "not_checked", "reason": f"{format} files carry no Content Credentials that can be read here"}
    import c2pa

    settings: Json = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_trust": True}}
    if anchors := os.environ.get(TRUST):
        try:
            settings["trust"] = {"user_anchors": Path(anchors).read_text("ascii")}
        except (OSError, ValueError) as error:
            raise SetupError(
                f"the trust list {anchors} cannot be read ({error}); correct it, or unset {TRUST}",
                code="trust_list_unreadable",
            ) from error
    try:
        context = c2pa.Context(c2pa.Settings.from_dict(settings))
    except c2pa.C2paError as error:
        raise SetupError(
            f"{anchors} is not a trust list ({error}); correct it, or unset {TRUST}", code="trust_list_invalid"
        ) from error
    try:
        with (
            io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as stream,
            c2pa.Reader(MIME[format], stream, context=context) as reader,
        ):
            return _read_credentials(reader)
    except c2pa.C2paError.ManifestNotFound:
        return {"state": "absent"}
    except (c2pa.C2paError, OSError, ValueError) as error:
        return {"state": "error", "reason": plain(str(error))}


def _read_credentials(reader: c2pa.Reader) -> Json:
    state = _STATES.get(str(reader.get_validation_state()))
    if state is None:
        return {"state": "error", "reason": f"the reader gave the state {reader.get_validation_state()!r}"}
    manifest = reader.get_active_manifest() or {}
    signature = manifest.get("signature_info") or {}
    result: Json = {"state": state, "codes": sorted(set(_codes(reader.get_validation_results() or {})))}
    names = [str(g.get("name")) for g in manifest.get("claim_generator_info") or () if g.get("name")]
    facts = {
        "signer": signature.get("common_name") or signature.get("issuer"),
        "generator": ", ".join(names) or manifest.get("claim_generator"),
        "signed": signature.get("time"),
    }
    result |= {key: plain(str(value)) for key, value in facts.items() if value}
    types = sorted(
        {
            plain(str(action["digitalSourceType"]).rsplit("/", 1)[-1])
            for assertion in map(_object, _list(manifest.get("assertions")))
            for action in _actions(assertion)
            if action.get("digitalSourceType")
        }
    )
    return result | ({"source_types": types} if types else {}) | {"statements": _statements(reader)}


def _statements(reader: c2pa.Reader) -> list[dict[str, str]]:
    """Statements about how the file was made, in its manifest and then in those of its ingredients."""
    text = reader.json()
    try:
        store = _object(parse_json(text if len(text) <= _MAX_STORE else ""))
    except ValueError as error:  # the state is valid all the same
        return [{"kind": SOURCE, "says": f"could not be searched: {plain(str(error))}", "where": CREDENTIALS}]
    manifests = _object(store.get("manifests"))
    statements: dict[tuple[str, str, str], None] = {}
    queue: list[tuple[object, str, bool]] = [(store.get("active_manifest"), CREDENTIALS, False)]
    labels: list[object] = []
    while queue and len(labels) < _MAX_MANIFESTS and len(statements) < MAX_STATEMENTS:
        label, place, is_part = queue.pop(0)
        if label in labels or not isinstance(label, str):
            continue
        labels.append(label)
        manifest = _object(manifests.get(label))
        claims = list(_manifest_statements(manifest))
        programs = [str(_object(g).get("name")) for g in _list(manifest.get("claim_generator_info"))]
        programs += [str(manifest.get("claim_generator", ""))]
        if not claims and (generator := next(filter(generator_named, programs), None)):
            claims = [(GENERATED, f"names a generator: {plain(generator)}", "the claim's program")]
        for kind, says, where in claims:
            statements[PARTLY if is_part and kind == GENERATED else kind, says, f"{place}, {where}"] = None
        for ingredient in map(_object, _list(manifest.get("ingredients"))):
            name = plain(str(ingredient.get("title") or "without a title"))
            # A parent is an earlier version of the whole file; any other ingredient is a part of it.
            part = is_part or ingredient.get("relationship") != "parentOf"
            queue.append((ingredient.get("active_manifest"), f'{place}, ingredient "{name}"', part))
    return [{"kind": kind, "says": says, "where": where} for kind, says, where in statements]


def _manifest_statements(manifest: Json) -> Iterator[tuple[str, str, str]]:
    """Statements in the assertions of one manifest: kind, text, and the place in it."""
    for assertion in map(_object, _list(manifest.get("assertions"))[:_MAX_MANIFESTS]):
        label, actions = plain(str(assertion.get("label"))), _actions(assertion)
        for number, action in enumerate(actions, 1):
            name = plain(str(action.get("action")))
            yield from _action_statements(action, name, f"{label}, action {number} ({name})")
        for key, value in _texts(None if actions else assertion.get("data")):
            if _is_source_type(key):
                yield (*source_type(value), f"{label}, {plain(key)}")


def _actions(assertion: Json) -> list[Json]:
    if not str(assertion.get("label")).startswith("c2pa.actions"):
        return []
    return [_object(action) for action in _list(_object(assertion.get("data")).get("actions"))]


def _action_statements(action: Json, name: str, where: str) -> Iterator[tuple[str, str, str]]:
    whole = name == "c2pa.created"  # any other action changes a part of an earlier picture
    has_source_type = False
    for key, value in _texts(action):
        if _is_source_type(key):
            kind, says = source_type(value)
            has_source_type = True
            yield kind if whole or kind != GENERATED else PARTLY, says, f"{where}, {plain(key)}"
        elif not has_source_type and key.split(".")[0] in ("softwareAgent", "parameters") and generator_named(value):
            yield GENERATED if whole else PARTLY, f"names a generator: {plain(value)}", f"{where}, {plain(key)}"


def _texts(data: object) -> Iterator[tuple[str, str]]:
    """The texts in plain values, each with its path of keys, joined by dots; keys of C2PA's own schema hold none."""
    queue = [("", data)]
    for _ in range(_MAX_VALUES):
        if not queue:
            return
        key, value = queue.pop(0)
        if isinstance(value, str):
            yield key, value
        elif isinstance(value, dict):
            queue += [(f"{key}.{name}".lstrip("."), inner) for name, inner in value.items()]
        elif isinstance(value, list):
            queue += [(key, inner) for inner in value]


def _is_source_type(key: str) -> bool:
    return re.split(r"[.:]", key)[-1].lower() == "digitalsourcetype"


def _object(value: object) -> Json:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else ()


def _codes(results: Json) -> Iterator[str]:
    """Codes of failures and remarks about the active manifest and its ingredients."""
    sections = [results.get("activeManifest") or {}]
    sections += [delta.get("validationDeltas") or {} for delta in results.get("ingredientDeltas") or ()]
    for section in sections:
        for kind in ("failure", "informational"):
            yield from (str(entry["code"]) for entry in section.get(kind) or () if entry.get("code"))
