"""Experts: the contract that every registered one keeps, the registry, and cards and weights on disk."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import skimage.data
import torch
from safetensors.torch import save

from external_detectors.tower import WEIGHTS
from external_detectors.weights_io import load_weights, save_weights
from tests.raising import raises, says
from x2dfd import experts
from x2dfd.degrade import degrade
from x2dfd.errors import SetupError
from x2dfd.experts import (
    BUILTIN,
    DEFAULT,
    PUBLISHED,
    Expert,
    Shared,
    ask,
    expert_class,
    load_expert,
    read_card,
    write_card,
)
from x2dfd.faces import PADDING, PREPROCESSING, find_faces
from x2dfd.files import file_sha256
from x2dfd.types import Card, Cue, Evidence, Face

ROOT = Path(__file__).resolve().parents[1]
every_expert = pytest.mark.parametrize("name", experts.names())
every_builtin = pytest.mark.parametrize("name", BUILTIN)


@pytest.fixture(scope="module")
def faces() -> list[Face]:
    """Eight views of one face: as found, and on seven different ways through size, blur, noise and codecs."""
    [face] = find_faces(np.array(skimage.data.astronaut()))
    ways = (degrade(face.crop[:, ::-1] if s % 2 else face.crop, np.random.default_rng(s)) for s in range(7))
    views = [face.crop, *ways]
    return [replace(face, index=i, crop=np.ascontiguousarray(view)) for i, view in enumerate(views)]


Judged = Callable[[str], list[Evidence]]


@pytest.fixture(scope="module")
def judged(faces: list[Face]) -> Judged:
    """What an expert says of the eight faces in one batch; asked once a run."""
    return cache(lambda name: _loaded(name).judge(faces))


@cache
def _loaded(name: str) -> Expert:
    try:
        return load_expert(name)
    except SetupError as error:
        if name in PUBLISHED:  # a user's own files: tests/test_published.py holds what can be shown without them
            pytest.skip(str(error))
        raise


def _scores(evidence: list[Evidence]) -> list[float]:
    return [math.nan if e.score is None else e.score for e in evidence]


@every_expert
def test_contract_card_is_complete(name: str) -> None:
    """Bug prevented: an expert that hides what it is, what it may be used for, or what it cannot see."""
    card = expert_class(name).card
    assert card.name == name == _loaded(name).card.name
    optional = {"trained_on", "figures", "weights", "sha256", "covers"}
    empty = {f.name for f in fields(Card) if not getattr(card, f.name)}
    assert empty <= optional
    assert ("sha256" in empty) == ("weights" in empty)  # a weight file without a hash is nobody's
    assert len(card.blind_spot.split()) >= 3
    assert json.loads(json.dumps(card.to_dict(), allow_nan=False)) == card.to_dict()
    assert isinstance(_loaded(name), Expert)


@every_expert
def test_contract_scores_are_probabilities_or_none_with_a_reason(name: str, judged: Judged) -> None:
    """Bug prevented: logits or NaN passed on as P(fake), or a silent `None`."""
    evidence = judged(name)
    assert [e.expert for e in evidence] == [name] * 8
    assert all(e.note if e.score is None else 0 <= e.score <= 1 for e in evidence)
    assert len(set(_scores(evidence))) > 1, "the same answer whatever it sees"


@every_expert
def test_contract_a_batch_of_one_equals_a_batch_of_eight(name: str, faces: list[Face], judged: Judged) -> None:
    """Bug prevented: batch statistics at inference, or answers that go to the wrong face."""
    some = (5, 0, 2)
    together = [_scores(judged(name))[i] for i in some]
    alone = [e for i in some for e in _loaded(name).judge([faces[i]])]
    turned = _loaded(name).judge([faces[i] for i in some])
    assert _scores(alone) == pytest.approx(together, abs=1e-4, nan_ok=True)
    assert _scores(turned) == pytest.approx(together, abs=1e-4, nan_ok=True)


@every_expert
def test_contract_odd_crops_do_not_raise(name: str, faces: list[Face]) -> None:
    """Bug prevented: one black frame or a face outside the picture ends the run; a judge that writes into crops."""
    odd = [np.zeros_like(faces[0].crop), np.full_like(faces[0].crop, 255), np.empty_like(faces[0].crop)]
    odd[2][:] = PADDING
    before = [crop.copy() for crop in odd]
    evidence = _loaded(name).judge([replace(faces[0], crop=crop) for crop in odd], Shared())
    assert len(evidence) == 3
    assert all(e.note if e.score is None else 0 <= e.score <= 1 for e in evidence)
    assert all(np.array_equal(a, b) for a, b in zip(odd, before, strict=True))
    assert _loaded(name).judge([]) == _loaded(name).judge([], Shared()) == []  # many pictures have no face


class _Plugin:
    """An expert of somebody else's, that keeps its word or does not."""

    card: ClassVar[Card] = Card("odd", "1", "here", "MIT", "", PREPROCESSING, "no paper", "everything")

    def __init__(self, said: Callable[[int], list[Evidence]]) -> None:
        self.said = said

    def judge(self, faces: Sequence[Face], shared: Shared | None = None) -> list[Evidence]:
        return self.said(len(faces))


def _raises(n: int) -> list[Evidence]:
    raise KeyError("lens")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (_raises, "KeyError: 'lens'"),
        (lambda n: [Evidence("odd", 0.5)] * (n - 1), "0 answers for 1 faces"),
        (lambda n: ["0.5"] * n, "str instead of Evidence"),
        (lambda n: [Evidence("odd", math.nan)] * n, "nan is not a probability"),
        (lambda n: [Evidence("odd", 1.7)] * n, "1.7 is not a probability"),
        (lambda n: [Evidence("odd", 0.5, b"x")] * n, "bytes instead of text"),  # type: ignore[arg-type]
        (lambda n: [Evidence("odd", 0.5, no_photo="no")] * n, "could not convert"),  # type: ignore[arg-type]
    ],
)
def test_an_expert_that_breaks_its_word_has_no_score_and_says_why(
    said: Callable[[int], list[Evidence]], reason: str, faces: list[Face]
) -> None:
    """Bug prevented: one plug-in ends the run for all, or its NaN counts as the surest "fake"."""
    evidence = ask(_Plugin(said), faces[:2])
    assert [e.score for e in evidence] == [None, None] and all(reason in (e.note or "") for e in evidence)
    assert [e.score for e in ask(_Plugin(lambda n: [Evidence("odd", 0.2)] * n), faces[:2])] == [0.2, 0.2]


def test_kinds_of_fakes_that_are_no_probabilities_are_left_out(faces: list[Face]) -> None:
    """Bug prevented: a plug-in's NaN makes the probability NaN, which is neither below nor above a bound: "real"."""

    def said(evidence: Evidence) -> Evidence:
        return ask(_Plugin(lambda n: [evidence] * n), faces[:1])[0]

    for wrong in ({"whole": math.nan}, {"part": 1.2}, {"gan": 0.5}):
        heard = said(Evidence("odd", 0.5, kinds=wrong))
        assert heard.score == 0.5 and heard.kinds == {} and "kinds" in (heard.note or "")
    silent = said(Evidence("odd", None, "dark", kinds={"whole": 0.9}))
    assert silent.kinds == {} and silent.note == "dark"
    kept = said(Evidence("odd", 0.5, kinds={"whole": 0.1, "part": 0.4}))
    assert kept.kinds == {"whole": 0.1, "part": 0.4} and kept.note is None


def test_numbers_beside_the_score_are_plain_probabilities(faces: list[Face]) -> None:
    """Bug prevented: a plug-in's NumPy number ends the run where the report is written, or its P(no photograph) of 7
    takes every verdict back."""
    half = np.float32(0.5)
    given = Evidence("odd", 0.5, None, (Cue("eyes", "blur", half),), np.full((2, 2), half), {}, half)  # type: ignore[arg-type]
    [kept] = ask(_Plugin(lambda n: [given] * n), faces[:1])
    assert json.loads(json.dumps(asdict(kept))) == {
        "expert": "odd", "score": 0.5, "note": None, "cues": [{"area": "eyes", "artifact": "blur", "score": 0.5}],
        "map": [[0.5, 0.5], [0.5, 0.5]], "kinds": {}, "no_photo": 0.5,
    }  # fmt: skip
    noted = replace(given, note="dark")
    for wrong in (replace(noted, no_photo=7.0), replace(noted, map=((2.0,),)), replace(noted, no_photo=math.nan)):
        [heard] = ask(_Plugin(lambda n, e=wrong: [e] * n), faces[:1])  # type: ignore[misc]
        assert heard.score == 0.5 and (heard.note or "").startswith("dark; its ") and "dropped" in (heard.note or "")
        assert heard.no_photo in (None, 0.5) and heard.map in ((), kept.map)


def test_one_face_that_an_expert_cannot_judge_does_not_silence_it_for_the_others(faces: list[Face]) -> None:
    """Bug prevented: what is said of a face depends on the files beside it; a set-up error becomes a row that stays."""

    def judge(shown: Sequence[Face]) -> list[Evidence]:
        if any(f.index == 1 for f in shown):
            raise ValueError("too dark")
        bad = (Cue("eyes", "blur", math.nan),)
        return [Evidence("another name", np.float32(0.25), cues=bad) for _ in shown]  # type: ignore[arg-type]

    plugin = _Plugin(lambda n: [])
    plugin.judge = lambda shown, shared=None: judge(shown)  # type: ignore[method-assign, assignment]
    said = ask(plugin, faces[:3])
    assert [e.score for e in said] == [0.25, None, 0.25] and "too dark" in (said[1].note or "")
    assert {e.expert for e in said} == {"odd"} and said[0].cues == () and type(said[0].score) is float

    def wrong(n: int) -> list[Evidence]:
        raise SetupError("fetch it")

    with raises("setup", "fetch it"):
        ask(_Plugin(wrong), faces[:2])


def _copied(name: str, folder: Path) -> Path:
    """An expert's card and weights in `folder`; returns the weight file."""
    card = read_card(WEIGHTS / f"{name}.card.json")
    shutil.copy(WEIGHTS / f"{name}.card.json", folder)
    return Path(shutil.copy(WEIGHTS / card.weights, folder))


@every_builtin
def test_weights_may_stand_elsewhere(name: str, faces: list[Face], judged: Judged, tmp_path: Path) -> None:
    """Bug prevented: a model that brings its own experts is judged by the installed ones."""
    _copied(name, tmp_path)
    card = replace(read_card(tmp_path / f"{name}.card.json"), version="elsewhere")
    write_card(tmp_path / f"{name}.card.json", card)
    other = load_expert(name, tmp_path)
    assert other.card == card and expert_class(name).card.version != "elsewhere"
    assert _scores(other.judge(faces[:2])) == pytest.approx(_scores(judged(name)[:2]), abs=1e-4)
    assert load_expert(name, tmp_path / "without").card == expert_class(name).card


def test_weights_for_an_expert_that_takes_none_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: a model's own weights of an expert are passed over, and nobody is told."""

    class Fixed(_Plugin):
        def __init__(self) -> None:
            super().__init__(lambda n: [])

    monkeypatch.setattr(experts, "expert_class", lambda name: Fixed)
    assert load_expert("odd", tmp_path).card.name == "odd"
    write_card(tmp_path / "odd.card.json", _Plugin.card)
    with raises("expert_without_weights", "odd", tmp_path):
        load_expert("odd", tmp_path)


@every_builtin
def test_other_weights_than_the_cards_are_refused(name: str, tmp_path: Path) -> None:
    """Bug prevented: a damaged or exchanged file that still loads; weights that judge crops which they do not know; an
    expert speaks under a name that no calibration knows, and its weight goes to its mean."""
    shipped = expert_class(name).card
    assert shipped.sha256 == file_sha256(WEIGHTS / shipped.weights) and shipped.preprocessing == PREPROCESSING
    assert shipped.trained_on and shipped.figures
    weights, card = _copied(name, tmp_path), tmp_path / f"{name}.card.json"
    write_card(card, replace(shipped, preprocessing="square crop, margin 1.5"))
    with raises("crops_differ"):
        load_expert(name, tmp_path)
    write_card(card, replace(shipped, name="foo"))
    with raises("expert_name_differs", name, "foo"):
        load_expert(name, tmp_path)
    write_card(card, shipped)
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    with raises("weights_hash_differs"):
        load_expert(name, tmp_path)
    weights.unlink()
    with raises("weights_missing", name):
        load_expert(name, tmp_path)


_BIAS = torch.zeros(())


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("tower", b"no tensors at all", "weights_unreadable"), ("clip-probe", b"", "weights_unreadable"),
        ("tower", {"other": _BIAS}, "weights_do_not_fit"), ("clip-probe", {"other": _BIAS}, "weights_do_not_fit"),
        ("clip-probe", {"weight": torch.zeros(3072), "bias": torch.zeros(3)}, "weights_do_not_fit"),
        ("clip-probe", {"weight": torch.zeros(3072)}, "weights_do_not_fit"),
        ("clip-probe", {"weight": torch.zeros(3072), "bias": _BIAS.int()}, "weights_do_not_fit"),
        ("clip-probe", {"weight": torch.zeros(3072), "bias": _BIAS / 0}, "weights_not_finite"),
    ],
)  # fmt: skip
def test_weights_of_the_cards_hash_but_of_other_content_are_refused(
    name: str, content: bytes | dict[str, torch.Tensor], code: str, tmp_path: Path
) -> None:
    """Bug prevented: a KeyError out of the blue, or an expert that has no score for any face."""
    weights = _copied(name, tmp_path)
    weights.write_bytes(content if isinstance(content, bytes) else save(content))
    card = tmp_path / f"{name}.card.json"
    write_card(card, replace(read_card(card), sha256=file_sha256(weights)))
    with raises(code, tmp_path):
        load_expert(name, tmp_path)


def test_a_cue_threshold_is_a_number_from_0_to_1(tmp_path: Path) -> None:
    """Bug prevented: the whole number 1, which JSON may hold for 1.0, is called missing, and 7 hides every cue."""
    _copied("tower", tmp_path)
    path = tmp_path / "tower.card.json"
    card = read_card(path)
    for good in (0, 1, 0.5):
        write_card(path, replace(card, figures={"cue_threshold": good}))
        assert load_expert("tower", tmp_path).card.figures["cue_threshold"] == good
    for bad in (7, -0.1, True, "0.5", None):
        write_card(path, replace(card, figures={"cue_threshold": bad}))
        with raises("cue_threshold_missing", tmp_path):
            load_expert("tower", tmp_path)


def test_weights_survive_the_disk(tmp_path: Path) -> None:
    """Bug prevented: integer buffers turned into floats, a hash of another file, numbers that 16 bits cannot hold."""
    card = replace(read_card(WEIGHTS / "tower.card.json"), name="some", sha256="", weights="")
    state = {"a": torch.linspace(-2, 2, 7), "count": torch.tensor(3)}
    written = save_weights(state, card, tmp_path)
    assert written.weights == "some.safetensors" and written.sha256 == file_sha256(tmp_path / "some.safetensors")
    assert read_card(tmp_path / "some.card.json") == written
    read = load_weights(written, tmp_path)
    assert read["a"].dtype == torch.float32 and torch.allclose(read["a"], state["a"], atol=1e-3)
    assert read["count"].dtype == torch.int64 and read["count"] == 3
    for number in (math.nan, 1e6):
        with raises("weights_not_finite", "'some'"):
            save_weights({"a": torch.tensor([number])}, card, tmp_path)
    assert read_card(tmp_path / "some.card.json") == written


def _distribution(folder: Path, name: str, target: str) -> None:
    """As an installed package that claims an expert's name."""
    info = folder / "claims_a_name-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: claims-a-name\nVersion: 1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[x2dfd.experts]\n{name} = {target}\n", encoding="utf-8")


def test_two_claims_on_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: which expert speaks, or the order of scores in the prompt, depends on the order of sys.path."""
    assert experts.names()[: len(BUILTIN)] == list(BUILTIN) and set(DEFAULT) <= set(BUILTIN)
    assert list(experts.cards()) == experts.names()
    with raises("unknown_name", "'towe'", "did you mean 'tower'"):
        load_expert("towe")
    _distribution(tmp_path, "tower", "somebody.else:Tower")
    monkeypatch.syspath_prepend(str(tmp_path))
    with raises("expert_registered_twice", "'tower'", "external_detectors", "somebody.else:Tower"):
        experts.names()


@pytest.mark.parametrize(
    ("target", "fact"),
    [
        ("no_such_module:Thing", ""), ("x2dfd.types:NoSuchThing", ""), ("x2dfd.types", ""),
        ("slip_of_syntax:Odd", ""), ("slip_of_name:Odd", "missing_name"),
    ],
)  # fmt: skip
def test_a_broken_plugin_says_where_it_should_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, fact: str
) -> None:
    """Bug prevented: an ImportError out of the blue; a slip in somebody's file takes `x2dfd experts` down."""
    (tmp_path / "slip_of_syntax.py").write_text("class Odd(:\n")
    (tmp_path / "slip_of_name.py").write_text("missing_name\n")
    _distribution(tmp_path, "broken", target)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "broken" in experts.names()
    with raises("expert_import_failed", "broken", target, fact):
        load_expert("broken")
    assert "broken" in (experts.availability("broken") or "")
    listed = experts.cards()  # one broken package does not take the others from the list
    assert isinstance(listed["broken"], SetupError) and isinstance(listed["tower"], Card)


def test_a_plugin_that_hangs_is_listed_without_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: one package takes `x2dfd experts`, `x2dfd doctor` and every HTML report down for good."""
    _distribution(tmp_path, "hangs", "hanging_plugin:Odd")
    (tmp_path / "hanging_plugin.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(experts, "LIST_SECONDS", 2.0)
    says(experts.cards(["hangs"])["hangs"], "expert_import_failed", "hangs", "2 seconds")


def test_listing_names_imports_nothing() -> None:
    """Bug prevented: `x2dfd --help` waits for torch and for everybody's plug-ins."""
    code = "import sys; from x2dfd import experts; experts.names(); "
    code += "print([m for m in sys.modules if m.startswith(('torch', 'external_detectors', 'cv2'))])"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


@pytest.mark.slow
def test_an_installed_plugin_is_found_and_keeps_the_contract(tmp_path: Path) -> None:
    """Bug prevented: the documented way to add an expert does not work for anybody but us."""
    without = shutil.ignore_patterns("__pycache__")
    source = shutil.copytree(ROOT / "examples" / "spectrum_expert", tmp_path / "source", ignore=without)
    options = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
    pip = [sys.executable, "-m", "pip", "install", *options, "--target", str(tmp_path / "site"), str(source)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    contract = ["-p", "no:cacheprovider", "tests/test_experts.py", "-k", "contract and spectrum"]
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    tests = [sys.executable, "-m", "pytest", *contract]
    told = subprocess.run(tests, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout
    assert f"{sum(n.startswith('test_contract') for n in globals())} passed" in told.stdout


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"name": "x"}', '{"nmae": "x"}'])
def test_a_card_is_complete_or_refused(tmp_path: Path, content: str) -> None:
    """Bug prevented: a card with a missing or misspelt field, read as if it said something."""
    path = tmp_path / "x.card.json"
    with raises("expert_card_unreadable", path):
        read_card(path)
    path.write_text(content, encoding="utf-8")
    with raises("expert_card_unreadable", path):
        read_card(path)
    path.write_bytes(b"\xff\xfe" + content.encode())
    with raises("expert_card_unreadable", path):
        read_card(path)
