"""Content Credentials: the five states on files signed here, and what is said where the reader is missing."""

from __future__ import annotations

import io
import json
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import skimage.data
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests import tiny
from tests.pictures import encoded
from tests.raising import raises
from x2dfd import provenance
from x2dfd.calibration import Calibration, Logistic
from x2dfd.html_report import PROVENANCE
from x2dfd.provenance import TRUST, read_provenance
from x2dfd.types import ModelInfo, Report

CAPTURE = "http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture"


def photo(format: str = "JPEG") -> bytes:
    return encoded(skimage.data.astronaut()[::4, ::4], format)


class Signer:
    """An authority and a signer's certificate, made for one test run; `anchors` is the authority's in PEM."""

    def __init__(self) -> None:
        pytest.importorskip("c2pa", reason="c2pa-python is not installed: pip install -c constraints.txt '.[c2pa]'")
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

        self.key = ec.generate_private_key(ec.SECP256R1())
        authority = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)

        def certificate(name: str, key: Any, ca: bool) -> Any:
            def named(text: str) -> Any:
                parts = ((NameOID.ORGANIZATION_NAME, "Test"), (NameOID.COMMON_NAME, text))
                return x509.Name([x509.NameAttribute(kind, value) for kind, value in parts])

            uses = dict.fromkeys(
                ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign",
                 "encipher_only", "decipher_only"), False,
            )  # fmt: skip
            usage = x509.KeyUsage(digital_signature=not ca, key_cert_sign=ca, **uses)
            builder = (
                x509.CertificateBuilder(named("an authority"), named(name), key.public_key())
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - timedelta(days=1))
                .not_valid_after(now + timedelta(days=2))
                .add_extension(x509.BasicConstraints(ca, None), True)
                .add_extension(usage, True)
                .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
                .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), False)
            )
            if not ca:
                mail = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
                builder = builder.add_extension(mail, True)
            return builder.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()

        self.anchors = certificate("an authority", authority, True)
        self.chain = certificate("a camera", self.key, False) + self.anchors

    def sign(
        self,
        content: bytes,
        mime: str = "image/jpeg",
        *,
        program: str = "a <b>test</b>",
        actions: Sequence[dict[str, Any]] = ({"action": "c2pa.created", "digitalSourceType": CAPTURE},),
        of: tuple[bytes, str] | None = None,
    ) -> bytes:
        """`content` with a manifest; `of`: an ingredient and its relationship."""
        import c2pa
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

        def raw(data: bytes) -> bytes:
            return b"".join(n.to_bytes(32, "big") for n in decode_dss_signature(self.key.sign(data, ec.ECDSA(sha))))

        sha = hashes.SHA256()
        manifest = {
            "claim_generator_info": [{"name": program, "version": "1"}],
            "assertions": [{"label": "c2pa.actions", "data": {"actions": list(actions)}}],
        }
        out = io.BytesIO()
        with c2pa.Signer.from_callback(raw, c2pa.C2paSigningAlg.ES256, self.chain) as signer:
            builder = c2pa.Builder(manifest)
            if of is not None:
                named = json.dumps({"title": "before.jpg", "relationship": of[1], "instance_id": "xmp:iid:1"})
                builder.add_ingredient(named, "image/jpeg", io.BytesIO(of[0]))
            builder.sign(signer, mime, io.BytesIO(content), out)
        return out.getvalue()


@pytest.fixture(scope="module")
def signer() -> Signer:
    return Signer()


@pytest.fixture(autouse=True)
def no_trust_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRUST, raising=False)


def test_a_signed_file_is_valid_and_not_trusted(signer: Signer) -> None:
    """Anyone can sign: a certificate of one's own must not read as a trusted camera."""
    for format, mime in (("JPEG", "image/jpeg"), ("PNG", "image/png"), ("WEBP", "image/webp")):
        found = read_provenance(signer.sign(photo(format), mime), format)
        assert found["state"] == "valid_untrusted" and "signingCredential.untrusted" in found["codes"]
        assert (found["signer"], found["generator"]) == ("a camera", "a <b>test</b>")
        assert found["source_types"] == ["digitalCapture"]
        assert json.loads(json.dumps(found)) == found


def test_changed_pixels_are_invalid_and_a_damaged_manifest_is_an_error(signer: Signer) -> None:
    """Silence read as a broken signature accuses; a broken signature, or store, read as silence hides an edit."""
    signed = bytearray(signer.sign(photo()))
    at = signed.find(b"jumb")
    damaged = signed[: at + 40] + bytes(20) + signed[at + 60 :]
    signed[-500] ^= 0x55
    found = read_provenance(bytes(signed), "JPEG")
    assert found["state"] == "invalid" and "assertion.dataHash.mismatch" in found["codes"]
    found = read_provenance(bytes(damaged), "JPEG")
    assert found["state"] == "error" and found["reason"]
    assert read_provenance(photo(), "JPEG") == {"state": "absent", "statements": []}


def test_a_signer_on_the_trust_list_is_trusted(signer: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newsroom's own list must count, and another authority's must not."""
    signed = signer.sign(photo())
    for anchors, state in ((signer.anchors, "trusted"), (Signer().anchors, "valid_untrusted")):
        (tmp_path / "trust.pem").write_text(anchors)
        monkeypatch.setenv(TRUST, str(tmp_path / "trust.pem"))
        assert read_provenance(signed, "JPEG")["state"] == state
    monkeypatch.setenv(TRUST, str(tmp_path / "none.pem"))
    with raises("trust_list_unreadable"):
        read_provenance(signed, "JPEG")


IPTC = "http://cv.iptc.org/newscodes/digitalsourcetype/"
TRAINED = IPTC + "trainedAlgorithmicMedia"
CREATED = {"action": "c2pa.created", "digitalSourceType": TRAINED}


def stated(data: bytes) -> list[tuple[str, str]]:
    """Kind and place of each statement."""
    return [(s["kind"], s["where"]) for s in read_provenance(data, "JPEG")["statements"]]


def test_what_an_ingredient_states_is_stated(signer: Signer) -> None:
    """Bug prevented: a generated picture that went through an editor reads as the editor's alone."""
    before = signer.sign(photo(), program="a generator", actions=[CREATED])
    assert stated(before) == [
        ("generated", "Content Credentials, c2pa.actions.v2, action 1 (c2pa.created), digitalSourceType")
    ]
    opened: dict[str, Any] = {"action": "c2pa.opened", "parameters": {"ingredientIds": ["xmp:iid:1"]}}
    edited = signer.sign(photo(), program="an editor", actions=[opened], of=(before, "parentOf"))
    place = 'Content Credentials, ingredient "before.jpg", c2pa.actions.v2, action 1 (c2pa.created), digitalSourceType'
    assert ("generated", place) in stated(edited)
    assert read_provenance(edited, "JPEG")["generator"] == "an editor"
    captured: dict[str, Any] = {"action": "c2pa.created", "digitalSourceType": CAPTURE}
    placed = [captured, opened | {"action": "c2pa.placed"}]
    composed = signer.sign(photo(), actions=placed, of=(before, "componentOf"))
    assert ("part_generated", place) in stated(composed) and "generated" not in dict(stated(composed))
    again = signer.sign(photo(), actions=[opened], of=(edited, "parentOf"))
    assert any(kind == "generated" and where.count("ingredient") == 2 for kind, where in stated(again))


def test_an_action_that_changes_a_part_is_no_statement_about_the_whole(signer: Signer) -> None:
    """Bug prevented: a photo with a generated sky leads as "made with a generator", or its fill is not told at all."""
    captured = {"action": "c2pa.created", "digitalSourceType": CAPTURE}
    for change in (
        {"digitalSourceType": IPTC + "trainedAlgorithmicMedia"},
        {"digitalSourceType": IPTC + "compositeWithTrainedAlgorithmicMedia"},
        {"softwareAgent": {"name": "Adobe Firefly"}},
        {"parameters": {"description": "filled by Adobe Firefly"}},
    ):
        found = stated(signer.sign(photo(), actions=[captured, {"action": "c2pa.edited"} | change]))
        assert [kind for kind, _ in found] == ["source", "part_generated"], change
        assert "action 2 (c2pa.edited)" in found[1][1]


def test_other_assertions_and_the_program_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: a generator that writes the type in another assertion, or only its own name, states nothing."""
    data = {"@context": {"iptc": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"}, "iptc:DigitalSourceType": TRAINED}
    made_so = {"action": "c2pa.created", "parameters": {"com.example.made": {"digitalSourceType": TRAINED}}}
    for manifest, where in (
        ({"assertions": [{"label": "org.example.iptc", "data": data}]}, "org.example.iptc, iptc:DigitalSourceType"),
        (
            {"assertions": [{"label": "c2pa.actions", "data": {"actions": [made_so]}}]},
            "c2pa.actions, action 1 (c2pa.created), parameters.com.example.made.digitalSourceType",
        ),
        ({"claim_generator_info": [{"name": "DALL-E"}]}, "the claim's program"),
        ({"claim_generator": "Adobe Firefly 1.0"}, "the claim's program"),
    ):
        stands_in(monkeypatch, json.dumps({"active_manifest": "a", "manifests": {"a": manifest}}))
        assert stated(photo()) == [("generated", f"Content Credentials, {where}")]
    stands_in(monkeypatch, json.dumps({"active_manifest": "a", "manifests": {"a": {"claim_generator": "Photoshop"}}}))
    assert stated(photo()) == []


def stands_in(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A valid file whose manifests the reader gives as `text`."""
    stub = Stub("Trusted")
    monkeypatch.setattr(stub, "json", lambda: text)
    monkeypatch.setattr(provenance, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "c2pa", stub)


def test_a_store_that_troubles_leaves_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: manifests of another shape, in circles or too deep end the run, or change the state."""
    manifests: list[Any] = [
        {"ingredients": [{"active_manifest": "a"}] * 3},
        {"assertions": {"label": 1}, "ingredients": [3], "claim_generator_info": 4},
        {"assertions": [{"label": "c2pa.actions", "data": [1]}, 7]},
        {"assertions": [{"label": "c2pa.actions", "data": {"actions": {"a": 1}}}]},
        {"assertions": [{"label": "c2pa.actions", "data": {"actions": [3, {"digitalSourceType": 7}]}}]},
    ]
    shapes = [{"active_manifest": "a", "manifests": {"a": manifest}} for manifest in manifests]
    others: list[Any] = [[], {"manifests": []}, {"active_manifest": ["a"], "manifests": {}}]
    for text in (*map(json.dumps, shapes + others), "[" * 100_000, "{"):
        stands_in(monkeypatch, text)
        found = read_provenance(photo(), "JPEG")
        assert found["state"] == "trusted" and all(s["kind"] == "source" for s in found["statements"])


def test_nothing_is_fetched() -> None:
    """A file that names a manifest elsewhere would tell its maker who looks at it."""
    pytest.importorskip("c2pa")
    content = photo()
    xmp = b"http://ns.adobe.com/xap/1.0/\0" + (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description xmlns:dcterms="http://purl.org/dc/terms/" dcterms:provenance="%s"/></rdf:RDF></x:xmpmeta>'
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        part = xmp % b"http://127.0.0.1:%d/m.c2pa" % server.getsockname()[1]
        part = b"\xff\xe1" + (len(part) + 2).to_bytes(2, "big") + part
        remote = content[:2] + part + content[2:]
        found = read_provenance(remote, "JPEG")
        assert found["state"] == "error"
        with pytest.raises(TimeoutError):
            server.accept()


class Stub:
    """Stands in for c2pa-python, so that the states are tested where it is not installed."""

    class C2paError(Exception):
        class ManifestNotFound(Exception):
            pass

    Settings = SimpleNamespace(from_dict=lambda settings: settings)

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.settings: Any = None

    def Context(self, settings: Any) -> Any:
        self.settings = settings

    def Reader(self, mime: str, stream: Any, context: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None: ...

    def json(self) -> str:
        return "{}"

    def get_validation_state(self) -> Any:
        return self.answer

    def get_active_manifest(self) -> dict[str, Any]:
        return {"signature_info": {"issuer": "X\nY" * 200}, "assertions": [{"label": "c2pa.actions.v2", "data": None}]}

    def get_validation_results(self) -> dict[str, Any]:
        failed = {"validationDeltas": {"failure": [{"code": "b"}, {"code": "a"}, {"code": "b"}]}}
        return {"activeManifest": None, "ingredientDeltas": [failed]}


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ("Trusted", "trusted"), ("Valid", "valid_untrusted"), ("Invalid", "invalid"), (None, "error"),
        (Stub.C2paError("broken"), "error"), (Stub.C2paError.ManifestNotFound(), "absent"),
    ],
)  # fmt: skip
def test_each_answer_of_the_reader_has_one_state(answer: Any, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that the reader learns to give, or an error, must not become "absent"."""
    stub = Stub(answer)
    monkeypatch.setitem(sys.modules, "c2pa", stub)
    monkeypatch.setattr(provenance, "find_spec", lambda name: True)
    found = read_provenance(photo(), "JPEG")
    assert found["state"] == state and state in PROVENANCE
    assert stub.settings["verify"] == {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_trust": True}
    if state == "invalid":
        assert found["codes"] == ["a", "b"] and found["signer"].startswith("X YX Y") and len(found["signer"]) == 200


def test_without_the_package_nobody_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "absent" where nobody looked would be an invented finding; what is stated in plain text is read all the same."""
    info = PngInfo()
    info.add_text("Software", "NovelAI")
    monkeypatch.setattr(provenance, "find_spec", lambda name: None)
    found = read_provenance(encoded(Image.new("RGB", (32, 32)), "PNG", pnginfo=info), "PNG")
    assert found["state"] == "not_checked" and "pip install" in found["reason"]
    assert found["statements"][0]["kind"] == "generated"
    monkeypatch.setattr(provenance, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "c2pa", Stub("Trusted"))
    assert read_provenance(photo("BMP"), "BMP")["state"] == "not_checked"


def test_provenance_never_moves_the_estimate(monkeypatch: pytest.MonkeyPatch, face_photo: Path) -> None:
    """Bug prevented: a signature, or what the file states of itself, moves a number that was fitted without it."""
    from x2dfd.detector import Detector

    one = Logistic({tiny.EXPERT: 1.0}, {tiny.EXPERT: 0.0}, bias=0.0)
    calibration = Calibration({"part": one}, low=0.3, high=0.6)
    unasked: Any = SimpleNamespace(batch=4, encode=lambda crops: SimpleNamespace(shared=None, size=len(crops)))
    judge = Detector(unasked, [tiny.Brightness()], calibration, ModelInfo("none", {"name": "none"}))
    seen: list[Report] = []
    for state in PROVENANCE:
        told = {"state": state, "statements": [{"kind": "generated", "says": state, "where": "XMP, byte 9"}]}
        monkeypatch.setattr("x2dfd.intake.read_provenance", lambda source, format, told=told: told)
        seen.append(judge.detect(face_photo, rationale=False))
        assert seen[-1].provenance == told and Report.from_json(seen[-1].to_json()).provenance == told
    assert len(seen) == 6 and seen[0].verdict.p_fake is not None
    assert all(replace(r, provenance={}, timings={}) == replace(seen[0], provenance={}, timings={}) for r in seen)
