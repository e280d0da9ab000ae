"""An adapter is used only on what it was made for, and only if there is something in it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import x2dfd
from tests import tiny
from tests.raising import raises
from x2dfd import prompts
from x2dfd.adapter import (
    EMBEDDED,
    WEIGHTS,
    _merge_plain,
    attach,
    check_adapter,
    lora_b_sum,
    read_adapter_card,
    write_adapter_card,
)
from x2dfd.calibration import Calibration
from x2dfd.checkpoints import base_identity, load_model
from x2dfd.experts import BUILTIN, Shared
from x2dfd.faces import find_faces
from x2dfd.files import file_sha256
from x2dfd.types import Evidence, Face, Verdict

pytestmark = [pytest.mark.needs_base, pytest.mark.usefixtures("known_expert")]


@pytest.fixture
def adapter(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(folders[1], tmp_path / "adapter"))


@pytest.fixture
def check(base: Path) -> Callable[[Path], None]:
    identity, prompt = base_identity(base), prompts.prompt_hash(tiny.processor_of_base())
    return lambda folder: check_adapter(folder, read_adapter_card(folder), identity, prompt)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def resealed(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Changes tensors and writes the new hash into the card: what is wrong is then not the file's identity."""

    def spoil(folder: Path) -> None:
        save_file({k: change(k, v) for k, v in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
        tiny.edit_card(folder, sha256=file_sha256(folder / WEIGHTS))

    return spoil


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:200])
    tiny.edit_card(folder, sha256=file_sha256(folder / WEIGHTS))


OTHER, HUB = {"name": "other", "sha256": "d" * 64}, {"name": "hub/one", "sha256": ""}
LORA_A = "layers.0.self_attn.q_proj.lora_A"


@pytest.mark.parametrize(
    ("spoil", "code", "fact"),
    [
        # A half-copied or exchanged file would judge in the card's name.
        (lambda a: flipped(a / WEIGHTS), "weights_hash_differs", ""),
        (lambda a: (a / WEIGHTS).unlink(), "weights_missing", WEIGHTS),
        (cut, "weights_unreadable", ""),
        # LoRA on other weights is noise; a card that does not name its base fits none.
        (lambda a: tiny.edit_card(a, base=OTHER), "base_differs", ""),
        (lambda a: tiny.edit_card(a, base=HUB), "base_differs", ""),
        (lambda a: tiny.edit_card(a, base={}), "base_differs", ""),
        # In other words, or on faces cut with another margin, a model answers something else.
        (lambda a: tiny.edit_card(a, prompt_sha256="e" * 64), "prompt_hash_differs", ""),
        (lambda a: tiny.edit_card(a, preprocessing="whole pictures"), "crops_differ", ""),
        # ZeRO-3 once saved zeros, or empty tensors where it had pieces; fp16 leaves infinities.
        (resealed(lambda k, v: v * 0 if "lora_B" in k else v), "lora_b_zero", "lora_B"),
        (resealed(lambda k, v: v * torch.nan if "lora_B" in k else v), "weights_not_finite", "lora_B"),
        (resealed(lambda k, v: torch.zeros(0) if LORA_A in k else v), "adapter_in_pieces", LORA_A),
        (resealed(lambda k, v: v + torch.inf if LORA_A in k else v), "weights_not_finite", LORA_A),
        (lambda a: tiny.edit_json(a / "card.json", novel=1), "not_an_adapter", "novel"),
        # Numbers that no training writes cut the model's layers from the other end, or end in a traceback.
        (lambda a: tiny.edit_json(a / "card.json", tower_layers=-1), "not_an_adapter", "tower_layers"),
        (lambda a: tiny.edit_json(a / "card.json", text_layers=-1), "not_an_adapter", "text_layers"),
        (lambda a: tiny.edit_json(a / "card.json", text_layers=[-1, 2]), "not_an_adapter", "text_layers"),
        (lambda a: tiny.edit_json(a / "card.json", temperature=-1), "not_an_adapter", "temperature"),
        (lambda a: tiny.edit_json(a / "card.json", crop_size=0), "not_an_adapter", "crop_size"),
        (lambda a: tiny.edit_json(a / "card.json", name=" "), "not_an_adapter", "name"),
    ],
)
def test_a_spoilt_adapter_is_refused(
    adapter: Path, check: Callable[[Path], None], spoil: Callable[[Path], Any], code: str, fact: str
) -> None:
    """It would judge, in the card's name, as something else."""
    check(adapter)
    assert lora_b_sum(adapter) > 0
    spoil(adapter)
    with raises(code, fact):
        check(adapter)


def test_bases_from_the_hub_are_told_apart_by_name(adapter: Path) -> None:
    """Neither has a hash, and two absent hashes are equal."""
    tiny.edit_card(adapter, base=HUB)
    card = read_adapter_card(adapter)
    check_adapter(adapter, card, HUB, card.prompt_sha256)
    with raises("base_differs", "hub/one", "hub/two"):
        check_adapter(adapter, card, {"name": "hub/two", "sha256": ""}, card.prompt_sha256)


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        (lambda k: ".layers.1." in k, ("lacks 7 ", ".layers.1.")),
        (lambda k: "k_proj.lora_B" in k, ("lacks 2 ", "k_proj")),
        (lambda k: "multi_modal_projector" in k, ("lacks 4 ", "linear_1.bias")),
        (lambda k: "linear_2" in k, ("lacks 2 ", "linear_2.bias")),
    ],
    ids=["layer", "lora_B", "projector", "half projector"],
)
def test_an_adapter_with_parts_missing_is_refused(
    base: Path, adapter: Path, gone: Callable[[str], bool], told: tuple[str, str]
) -> None:
    """PEFT warns at most: the model then answers with half of what it learnt, or through a random projector."""
    state = {k: v for k, v in load_file(adapter / WEIGHTS).items() if not gone(k)}
    save_file(state, adapter / WEIGHTS)
    with raises("adapter_incomplete", *told):
        attach(load_model(base)[0], adapter)
    # Under LLaVA's own names LoRA fits no module, and PEFT applies nothing.
    save_file({k.replace("model.language_model.", "model."): v for k, v in state.items()}, adapter / WEIGHTS)
    with raises("adapter_does_not_fit", "finetune convert"):
        attach(load_model(base)[0], adapter)


def test_the_card_comes_back_whole(adapter: Path, tmp_path: Path) -> None:
    """Order of experts, tuples and non-ASCII text survive JSON."""
    tiny.edit_card(adapter, feature_layers=(5, 8, 11), experts={"z": "1", "a": "2"}, trained_on="Gesichter für Tests")
    card = read_adapter_card(adapter)
    write_adapter_card(tmp_path / "again", card)
    again = read_adapter_card(tmp_path / "again")
    assert again == card
    assert again.feature_layers == (5, 8, 11)
    assert list(again.experts) == ["z", "a"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "x"}'])
def test_a_folder_that_is_no_adapter_is_named(adapter: Path, text: str) -> None:
    """A mistyped folder must be a sentence, not a traceback."""
    (adapter / "card.json").write_text(text)
    with raises("not_an_adapter"):
        read_adapter_card(adapter)
    with raises("not_an_adapter", "nowhere"):
        read_adapter_card(adapter / "nowhere")


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "FOO"}, {"peft_type": None}, {"r": 0}, {"r": "x"}, {"r": 4.0}, {"r": True}, {"lora_alpha": None},
        {"lora_alpha": "8"}, {"lora_alpha": 0}, {"target_modules": 5}, {"target_modules": "("},
        {"target_modules": [5]}, {"modules_to_save": 5}, {"modules_to_save": "multi_modal_projector"},
        {"modules_to_save": [None]}, {"bias": 5}, {"rank_pattern": 5}, {"use_dora": "x"}, {"exclude_modules": 5},
    ],
    ids=str,
)  # fmt: skip
def test_a_broken_configuration_is_refused_before_any_picture(
    adapter: Path, check: Callable[[Path], None], change: dict[str, object]
) -> None:
    """Bug prevented: the embedded model, whose language model is loaded when it first writes, ends a batch in the
    middle with a traceback of PEFT."""
    tiny.edit_json(adapter / "adapter_config.json", **change)
    with raises("adapter_config_invalid", "adapter_config.json", next(iter(change))):
        check(adapter)


@pytest.mark.parametrize(
    ("file", "change", "code"),
    [
        ("adapter_config.json", {"r": 0}, "adapter_config_invalid"),
        ("card.json", {"tower_layers": 0}, "not_an_adapter"),
        ("card.json", {"tower_layers": 13}, "tower_layers_invalid"),
        ("card.json", {"prompt_sha256": "e" * 64}, "prompt_hash_differs"),
    ],
)  # fmt: skip
def test_the_embedded_model_is_checked_before_its_language_model_is_loaded(
    tmp_path: Path, file: str, change: dict[str, object], code: str
) -> None:
    """Bug prevented: a damaged copy, or one for other prompts, judges faces until it writes of one; or it ends in a
    KeyError of the tower."""
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "model"))
    tiny.edit_json(folder / file, **change)
    with raises(code):
        x2dfd.load(folder)


@pytest.mark.parametrize("change", [{"bias": "foo"}, {"rank_pattern": {"q_proj": "x"}}], ids=str)
def test_what_peft_does_not_take_is_a_sentence(base: Path, adapter: Path, change: dict[str, object]) -> None:
    """Bug prevented: the settings that only PEFT reads end in a traceback."""
    tiny.edit_json(adapter / "adapter_config.json", **change)
    with raises("adapter_config_invalid", "PEFT says", "save the adapter again"):
        attach(load_model(base)[0], adapter)


def test_a_plain_adapter_needs_no_peft_and_any_other_goes_there(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Importing PEFT would outlast the first verdict; merging DoRA or other ranks as plain LoRA would be wrong."""

    def weights(model: Any) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in model.state_dict().items()}

    bare, _ = load_model(base)
    before, settings = weights(bare), adapter / "adapter_config.json"
    plain = json.loads(settings.read_text())
    for change in ({"use_dora": True}, {"rank_pattern": {"q_proj": 2}}, {"init_lora_weights": "pissa"}, {"r": 2}):
        settings.write_text(json.dumps(plain | change))
        assert not _merge_plain(bare, adapter, load_file(adapter / WEIGHTS))
    assert all(torch.equal(value, before[name]) for name, value in weights(bare).items())
    settings.write_text(json.dumps(plain))
    through_peft = PeftModel.from_pretrained(load_model(base)[0], str(adapter)).merge_and_unload()
    monkeypatch.setitem(sys.modules, "peft", None)
    ours, theirs = weights(attach(bare, adapter)), weights(through_peft)
    assert set(ours) == set(theirs)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    assert any(not torch.equal(ours[name], before[name]) for name in ours)


def test_an_expert_that_joined_at_calibration_judges_but_is_not_in_the_question(
    adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug prevented: a question that no training showed the model, or weights that the calibration never saw."""
    monkeypatch.setitem(BUILTIN, "darkness", "tests.test_adapter:Darkness")
    before = Calibration.load(adapter)
    fitted = {"experts": {tiny.EXPERT: "b" * 64, "darkness": "c" * 64}}
    [(kind, one)] = before.kinds.items()
    joined = replace(one, weights=one.weights | {"darkness": 1.0}, means=one.means | {"darkness": 0.0})
    extended = replace(before, kinds={kind: joined}, fitted_on=fitted)
    extended.save(adapter)
    detector = x2dfd.load(f"hub:{base}+{adapter}")
    assert [e.card.name for e in detector.experts] == [tiny.EXPERT, "darkness"]
    [face] = find_faces(np.array(skimage.data.astronaut()))
    _, [said] = detector.judge_faces([face])
    assert [e.expert for e in said] == [tiny.EXPERT, "darkness"]
    [question] = detector._questions([said])
    assert tiny.EXPERT in question and "darkness" not in question
    # Newer weights of a trained expert: what the calibration was fitted to counts, not the card.
    replace(extended, fitted_on={"experts": fitted["experts"] | {tiny.EXPERT: "e" * 64}}).save(adapter)
    with raises("expert_weights_differ", "--other-experts"):
        x2dfd.load(f"hub:{base}+{adapter}")
    assert x2dfd.load(f"hub:{base}+{adapter}", other_experts=True).info.in_prompt == [tiny.EXPERT]


def test_an_expert_that_got_no_weight_locks_no_model_and_decides_nothing(
    adapter: Path, base: Path, face_photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug prevented: a calibration that was fitted beside an expert which no logistic takes is refused by the next
    command as one that never met it; or the expert is shown, and its signs are named, as if it had a say."""
    monkeypatch.setitem(BUILTIN, "darkness", "tests.test_adapter:Darkness")
    alone = x2dfd.load(f"hub:{base}+{adapter}").detect(face_photo, rationale=False)
    beside = {"experts": {tiny.EXPERT: "b" * 64, "darkness": "c" * 64}}
    replace(Calibration.load(adapter), fitted_on=beside).save(adapter)
    told: list[str] = []

    def readable(text: str, _: Verdict, evidence: Sequence[Evidence], **__: bool) -> str:
        told.extend(e.expert for e in evidence)
        return text

    monkeypatch.setattr("x2dfd.detector.readable", readable)
    report = x2dfd.load(f"hub:{base}+{adapter}").detect(face_photo)
    assert report.verdict == alone.verdict and report.verdict.p_fake is not None and told == [tiny.EXPERT]
    assert [e.expert for e in report.evidence] == [tiny.EXPERT, "darkness"] and report.uncounted == {"darkness"}


def test_an_expert_that_the_calibration_weighs_is_not_left_out_without_a_word(
    adapter: Path, base: Path, face_photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug prevented: experts=[...] leaves out a score that the band was fitted with, and no warning says so."""
    monkeypatch.setitem(BUILTIN, "darkness", "tests.test_adapter:Darkness")
    before = Calibration.load(adapter)
    [(kind, one)] = before.kinds.items()
    joined = replace(one, weights=one.weights | {"darkness": 1.0}, means=one.means | {"darkness": 0.0})
    fitted = {"experts": {tiny.EXPERT: "b" * 64, "darkness": "c" * 64}}
    replace(before, kinds={kind: joined}, fitted_on=fitted).save(adapter)
    spec = f"hub:{base}+{adapter}"
    assert x2dfd.load(spec).detect(face_photo, rationale=False).warnings == ()
    [warning] = x2dfd.load(spec, experts=["darkness"]).detect(face_photo, rationale=False).warnings
    assert tiny.EXPERT in warning and "darkness" not in warning
    assert (
        joined.weights["mllm"] and len(x2dfd.load(spec, experts=[]).detect(face_photo, rationale=False).warnings) == 1
    )
    assert x2dfd.load(spec, mode="paper", experts=[]).experts == []
    alone = replace(joined, weights={k: v for k, v in joined.weights.items() if k != "mllm"})
    replace(before, kinds={kind: alone}, fitted_on=fitted).save(adapter)
    with raises("expert_missing", tiny.EXPERT, "darkness"):
        x2dfd.load(spec, experts=[])


class Darkness(tiny.Brightness):
    """Another expert, that no adapter of these tests was trained with."""

    card = replace(tiny.Brightness.card, name="darkness", sha256="c" * 64)

    def judge(self, faces: Sequence[Face], shared: Shared | None = None) -> list[Evidence]:
        return [Evidence("darkness", 1 - float(f.crop.mean()) / 255) for f in faces]


@pytest.mark.slow
def test_load_refuses_before_it_judges(adapter: Path, base: Path) -> None:
    """The checks are worth nothing if the front door does not call them."""
    assert x2dfd.load(f"hub:{base}+{adapter}").info.name == "tiny 1"
    fitted = Calibration.load(adapter)
    others = dict.fromkeys(fitted.fitted_on["experts"], "f" * 64)
    replace(fitted, fitted_on={"experts": others}).save(adapter)
    with raises("expert_weights_differ", "brightness"):
        x2dfd.load(f"hub:{base}+{adapter}")
    tiny.edit_card(adapter, prompt_sha256="e" * 64)
    with raises("prompt_hash_differs"):
        x2dfd.load(f"hub:{base}+{adapter}")
