"""Training: what is written in the configuration happens, every answer token counts once, and a cut-off run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import skimage.data
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import EvalPrediction
from typer.testing import CliRunner

import x2dfd
from data_gen.build import BuildConfig, build
from finetune import train as training
from finetune.__main__ import app
from finetune.config import FinetuneConfig, load_config
from finetune.data import IGNORE, Collate, Conversation, Rows, conversation, learnable, read_records
from finetune.memory import ANSWERS
from finetune.models import open_base, tune
from finetune.split import split
from finetune.train import RowTrainer, Shown, _arguments, _features, train, verdict_auc
from tests import tiny
from tests.raising import raises, says
from x2dfd import prompts
from x2dfd.adapter import WEIGHTS, probe_crops, read_adapter_card
from x2dfd.checkpoints import base_identity, load_model
from x2dfd.crops import CropSet, load_crops
from x2dfd.degrade import CODEC, codec
from x2dfd.errors import X2DFDError
from x2dfd.files import file_sha256
from x2dfd.mllm import LocalMLLM
from x2dfd.tower import augmented_view, degraded_view

ROOM = Path(__file__).parent.parent / "finetune"
REQUIRED = ("instructions=i.jsonl", "manifest=m.jsonl", "out=o")
Configured = Callable[..., FinetuneConfig]
Small = tuple[Path, Path]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(ROOM.rglob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    """A slip in it would be found after an hour of loading."""
    assert load_config(path, [] if "instructions:" in path.read_text(encoding="utf-8") else REQUIRED).name


def test_yaml_and_flags_are_two_spellings_of_one_thing(tmp_path: Path) -> None:
    """A flag wins over the file; what neither names keeps its default; YAML reads 2e-4 as text."""
    path = written(tmp_path, "instructions: i\nmanifest: m\nout: o\nlr: 1e-3\nfeature_layers: [5, 8]\nbase: null\n")
    plain = load_config(path)
    assert (plain.lr, type(plain.lr), plain.feature_layers) == (1e-3, float, (5, 8))
    config = load_config(path, ["lr=3e-4", "out=elsewhere", "max_steps=7", "feature_layers=[1, 2]", "text_layers=null"])
    assert (config.lr, config.out, config.max_steps, config.feature_layers) == (3e-4, "elsewhere", 7, (1, 2))
    assert (config.instructions, config.base, config.text_layers) == ("i", None, None)
    defaults = FinetuneConfig("i", "m", "elsewhere")
    assert replace(config, lr=defaults.lr, max_steps=defaults.max_steps, feature_layers=None) == defaults
    assert load_config(None, REQUIRED) == FinetuneConfig("i.jsonl", "m.jsonl", "o")
    assert load_config(path, ["text_layers=4", "lr=1"]).text_layers == 4
    assert load_config(path, ["text_layers=[0, 5]"]).text_layers == (0, 5)


@pytest.mark.parametrize(
    ("override", "code", "fact"),
    [
        *((slip, "config_wrong_type", repr(slip.split("=")[0])) for slip in (
            "lora_r=four", "lora_r=4.0", "lora_r=true", "lr=fast", "lr=true", "lr=[1]", "lr=null", "out=3", "epochs=",
            "feature_layers=5", "feature_layers=[a]", "feature_layers=[1.5]", "base=[1]", "instructions=null",
            "text_layers=[a]", "text_layers=1.5", "bf16=1",
        )),
        *((slip, "number_out_of_range", slip.split("=")[0]) for slip in (
            "lr=.nan", "lr=-1", "clip=.inf", "batch=0", "lora_r=-4", "lora_dropout=.nan",
        )),
        ("lr", "override_malformed", "'lr'"), ("lr=[1", "config_not_yaml", ""),
        ("max_step=4", "unknown_name", "did you mean 'max_steps'"), ("method=lorra", "unknown_name", "mean 'lora'"),
        ("base_dtype=bfloat16", "config_invalid", "bf16"), ("method=qlora", "config_invalid", "qlora"),
        ("tower=forensic", "config_invalid", "expert_weights"), ("patience=2", "config_invalid", "eval_steps"),
        ("weights=[1, 2]", "config_invalid", "weights"), ("targets=(", "config_invalid", "targets"),
        ("targets=a{99999999999}", "config_invalid", "targets"),
        ("instructions=[i, i]", "config_invalid", "twice"),  # its pictures would count twice without a word
    ],
)  # fmt: skip
def test_a_slip_is_refused_before_anything_is_loaded(override: str, code: str, fact: str) -> None:
    """What YAML makes of a slip reaches the optimizer; not a number passes every comparison, and trains noise."""
    with raises(code, fact):
        load_config(None, [*REQUIRED, override])


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        (b"{", "record 2"), (b"\xff", "record 2"), (b"[1]", "an object"), (b"[" * 100_000, "nested"), (b"{}", "'id'"),
        (b'{"id": "a", "task": "detect", "split": "train", "row": true, "conversations": []}', "'row'"),
        (b'{"id": "a", "task": "detect", "split": "train", "row": 0, "conversations": [{"value": "?"}]}', "in turn"),
    ],
)  # fmt: skip
def test_a_record_that_cannot_be_read_is_named(tmp_path: Path, line: bytes, fact: str) -> None:
    """A KeyError out of the training said neither the file nor the line."""
    whole = {"id": "a", "task": "detect", "split": "val", "row": 0, "conversations": [{"value": "?"}, {"value": "!"}]}
    path = tmp_path / "instructions.jsonl"
    path.write_bytes(json.dumps(whole).encode() + b"\n" + line)
    with raises("instructions_unreadable", path, fact):
        read_records(path, "train", CropSet([], np.empty(0, np.uint8), np.empty(0, np.float32), {}))


@pytest.mark.parametrize(
    "text",
    [
        "- a\n- b\n", "just text", "lr: [1, 2\n", "a: b: c\n", "instructions: i\nmanifest: m\n", "name: 2024-99-99\n",
        "[" * 5000, "lr: 1" + "0" * 400 + "\n", "lora_rr: 4\n", None,
    ],
)  # fmt: skip
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str | None) -> None:
    """A list, a sentence, broken YAML, a missing or unknown key, no file: a reason, not a traceback."""
    with pytest.raises(X2DFDError):
        load_config(written(tmp_path, text) if text else tmp_path / "nowhere.yaml")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, known_expert: None) -> Small:
    """Manifest and instructions of six training and two calibration pictures."""
    folder = tmp_path_factory.mktemp("small")
    manifest = tiny.write_small_manifest(folder, np.asarray(skimage.data.astronaut()))
    config = BuildConfig(str(manifest), experts=(tiny.EXPERT,), cue_questions=2)
    return manifest, build(config, folder / "instructions")


@pytest.fixture(scope="module")
def packs(base: Path, small: Small) -> Rows:
    """Rows with all conversations about a picture each, as a LLaVA takes them."""
    model, processor = load_model(base)
    data = load_crops(small[0])
    return Rows(read_records(small[1], "train", data), model, processor, data, 1)


def collated(packs: Rows, places: Sequence[int], verdict: float = 4.0, cue: float = 1.0) -> dict[str, Tensor]:
    return Collate(0, verdict, cue, packs.positions)([packs[k] for k in places])


def loss(model: Any, batch: dict[str, Tensor]) -> float:
    """The loss that training minimises."""
    model.eval()
    with torch.inference_mode():
        return float(RowTrainer.compute_loss(cast(Any, None), model, dict(batch)))


@pytest.mark.needs_base
def test_memory_is_predicted_for_as_many_logits_as_an_instruction_set_asks_for(packs: Rows) -> None:
    """Bug prevented: a preset is refused for logits of the questions, which training does not compute; or one is
    promised that has no room for those of the answers."""
    for k in range(len(packs)):
        share = float((collated(packs, [k])["labels"] != IGNORE).float().mean())
        assert ANSWERS / 2 < share < ANSWERS, share


@pytest.mark.needs_base
def test_rows_in_a_batch_have_the_gradients_of_rows_alone(base: Path, packs: Rows) -> None:
    """Bug prevented: logits that are taken from a neighbouring row, or computed where nothing is learnt."""
    model, _ = load_model(base)
    batch = collated(packs, [0, 1, 2])
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, logits: rows.append(logits.numel() // logits.shape[-1]))

    def gradients(batches: Sequence[dict[str, Tensor]]) -> list[Tensor]:
        model.zero_grad()
        for one in batches:
            share = one["weights"].sum() / batch["weights"].sum()
            (RowTrainer.compute_loss(cast(Any, None), model, dict(one)) * share).backward()
        parts = (model.model.multi_modal_projector, model.model.language_model, model.lm_head)
        return [p.grad.clone() for part in parts for p in part.parameters() if p.grad is not None]

    together, alone = gradients([batch]), gradients([collated(packs, [k]) for k in range(3)])
    assert rows[0] == int((batch["labels"] != IGNORE).sum()) == sum(rows[1:])
    assert len(together) == len(alone) > 10
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.needs_base
def test_the_verdict_and_the_words_of_cues_weigh_more(base: Path, packs: Rows) -> None:
    """One token decides the verdict; among eighty of explanation, most of them small words, it would hardly count."""
    tokenizer = load_model(base)[1].tokenizer
    batch = collated(packs, [1], 7.0, 3.0)

    def words(weight: float) -> list[str]:
        return [tokenizer.decode([t]).strip() for t in batch["labels"][batch["weights"] == weight].tolist()]

    assert words(7.0)[:3] == ["fake"] * 3 and set(words(7.0)[3:]) <= {"Yes", "No"} and len(words(7.0)) in (5, 6)
    cues = {word.lower() for word in words(3.0)}
    assert {"jaw", "eyes"} & cues and not {"this", "is", "fake", "and", ".", "<|im_end|>"} & cues
    answered = batch["labels"] != IGNORE
    assert bool((batch["weights"][answered] >= 1).all()) and not bool(batch["weights"][~answered].any())
    ends = [c.tokens[-1] for c in packs[1]["conversations"]]
    assert {tokenizer.decode([t]) for t in ends} == {"<|im_end|>"}


@pytest.mark.needs_base
def test_a_follow_up_is_trained_on_the_prompt_that_chat_asks(base: Path, small: Small) -> None:
    """Earlier turns are context, not to be learnt again; a frame of its own for chat would be one nobody asks in."""
    processor = load_model(base)[1]
    records = [json.loads(line) for line in small[1].read_text().splitlines()]
    chat = next(r for r in records if r["task"] == "chat")
    asked, said, following, reply = (turn["value"] for turn in chat["conversations"])
    turned = conversation(processor, chat, (1, 2))
    prompt = prompts.render(processor, asked.removeprefix("<image>\n"), turns=[(said, following)])
    assert turned.tokens[: -turned.answer] == prompts.prompt_tokens(processor, prompt)[1]
    assert processor.tokenizer.decode(turned.tokens[-turned.answer :]) == f"{reply}<|im_end|>"
    assert turned.heavy is None


@pytest.mark.needs_base
def test_what_there_is_nothing_to_learn_from_is_refused(base: Path, small: Small, packs: Rows) -> None:
    """An empty mask gives a loss of 0/0, an empty answer one of the end token; both would train silently."""
    item = packs[0]
    with raises("label_mask_empty"):
        Collate(0, 4.0)([{**item, "conversations": [Conversation([1, 2, 3], 0, None)]}])
    processor = load_model(base)[1]
    record = json.loads(small[1].read_text().splitlines()[0])
    record["conversations"][1]["value"] = ""
    with raises("answer_empty"):
        conversation(processor, record, (1, 2))
    record["conversations"][1]["value"] = "I think that it is fake."
    with raises("verdict_not_first", "I think that it is fake."):
        conversation(processor, record, LocalMLLM(*load_model(base), "tiny").label_ids)
    with raises("split_empty", "'nowhere'"):
        read_records(small[1], "nowhere", load_crops(small[0]))


@pytest.fixture(scope="module")
def configured(base: Path, small: Small) -> Configured:
    def config(out: Path, **given: Any) -> FinetuneConfig:
        plain = FinetuneConfig(str(small[1]), str(small[0]), str(out), base=str(base), lora_r=4, lora_alpha=8)
        quick = replace(plain, lora_dropout=0.0, lr=1e-2, projector_lr=1e-3, accumulate=1, max_steps=3, save_steps=2)
        return replace(quick, **given)

    return config


LONGER: dict[str, Any] = {"batch": 3, "max_steps": 8}


@pytest.fixture(scope="module")
def first(configured: Configured, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that eight steps have trained, of which the base kept clear."""
    untouched = file_sha256(base / "model.safetensors")
    out = train(configured(tmp_path_factory.mktemp("first") / "adapter", **LONGER))
    assert file_sha256(base / "model.safetensors") == untouched
    return out


@pytest.mark.needs_base
def test_training_moves_the_adapter_and_nothing_else_and_lowers_its_loss(
    first: Path, base: Path, packs: Rows, face_photo: Path
) -> None:
    """LoRA and projector must move, the base must not, and what is written must be what `load` accepts; signs, masks
    and learning rates can all be wrong while weights move."""
    model, batch = load_model(base)[0], collated(packs, range(len(packs)))
    before = loss(model, batch)
    assert loss(PeftModel.from_pretrained(model, str(first)), batch) < before - 0.5
    state = load_file(first / WEIGHTS)
    parts = ("lora_A", "lora_B", "multi_modal_projector")
    counts = [sum(part in key for key in state) for part in parts]
    assert counts == [14, 14, 4] and len(state) == 32  # seven linears in each of two layers
    assert all("language_model" in key and "vision_tower" not in key for key in state if parts[2] not in key)
    assert all(float(v.abs().sum()) > 0 for k, v in state.items() if "lora_B" in k)
    of_base = load_file(base / "model.safetensors")
    for key, value in state.items():
        if "multi_modal_projector" in key:
            name = key.split("multi_modal_projector.")[1].removeprefix("modules_to_save.default.")
            (old,) = (v for k, v in of_base.items() if k.endswith(f"multi_modal_projector.{name}"))
            assert not torch.allclose(value.float(), old, atol=1e-4)

    card = read_adapter_card(first)
    assert card.base == base_identity(base) and card.experts == {tiny.EXPERT: tiny.Brightness.card.sha256}
    assert (card.tower_layers, card.text_layers) == (3, 2)
    assert card.figures["pictures"] == 6 and card.figures["final_loss"] > 0
    saved = json.loads((first / "config.json").read_text())
    assert saved["lr"] == 1e-2 and saved["max_steps"] == 8
    detector = x2dfd.load(f"hub:{base}+{first}", mode="paper")
    assert detector.detect(face_photo, rationale=False).faces[0].p_fake_mllm is not None
    with raises("calibration_unreadable", "x2dfd calibrate"):
        x2dfd.load(f"hub:{base}+{first}")


@pytest.mark.slow
@pytest.mark.needs_base
def test_a_tower_that_learns_is_the_adapters_own(
    configured: Configured, first: Path, base: Path, tmp_path: Path
) -> None:
    """Bug prevented: a tower said to be tuned that is not; a frozen adapter that cannot be continued so."""
    out = train(configured(tmp_path / "tower", start=str(first), tower="lora"))
    of_tower = {k: v for k, v in load_file(out / WEIGHTS).items() if "vision_tower" in k}
    assert len(of_tower) == 3 * 4 * 2 and all(float(v.abs().sum()) > 0 for v in of_tower.values())
    assert (read_adapter_card(first).tower, read_adapter_card(out).tower) == ("frozen", "lora")
    # An expert trained on the base's tower reads noise in another's; and loading finds the probes as they were.
    for adapter, shares in (first, True), (out, False):
        encoding = x2dfd.load(f"hub:{base}+{adapter}", mode="paper").mllm.encode(probe_crops())
        assert (encoding.shared is not None) is shares
    with raises("tower_changed"):
        split(f"hub:{base}+{out}", tmp_path / "split")
    for given, code, fact in (
        ({"method": "full"}, "config_invalid", "method: full"),
        ({"targets": "nothing"}, "targets_match_nothing", "'nothing'"),
        ({"workers": -1}, "number_out_of_range", "workers"),
    ):
        with raises(code, fact):
            train(configured(tmp_path / "wrong", tower="lora", **given))


@pytest.mark.needs_base
def test_what_is_left_out_is_not_trained_on(
    configured: Configured, first: Path, small: Small, base: Path, tmp_path: Path
) -> None:
    """Bug prevented: figures on a source that the model knows after all, by its photos, by donors, or by its start."""
    data = load_crops(small[0])
    assert {data.samples[r].split for r in read_records(small[1], "train", data)} == {"train"}
    sources = ["film", "gan", "ffhq", "film", "film", "ffhq", "film", "film"]
    changes: list[dict[str, Any]] = [{"source": s} for s in sources]
    changes[1] |= {"label": "fake", "df_class": "EFS", "method": "gan", "mask": None}
    changes[3] |= {"extra": {"donor": "g2"}}  # a film's face swapped for one of ffhq
    known = replace(data, samples=[replace(s, **c) for s, c in zip(data.samples, changes, strict=True)])
    assert list(read_records(small[1], "train", known)) == [0, 1, 2, 3, 4, 5]
    assert list(read_records(small[1], "train", known, ("ffhq",))) == [0, 1, 4]
    assert list(read_records(small[1], "train", known, ("gan",))) == [0, 2, 3, 4, 5]
    with raises("unknown_name", "ffqh"):
        read_records(small[1], "train", known, ("ffqh",))
    with raises("split_empty"):
        train(configured(tmp_path / "none", left_out=("generated",)))
    with raises("start_knows_left_out", "generated"):
        tune(load_model(base)[0], configured(tmp_path / "second", start=str(first), left_out=("generated",)))


@pytest.mark.slow
@pytest.mark.needs_base
def test_training_starts_from_an_adapter_and_resumes_no_other_run(
    configured: Configured, first: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that is not taken over trains from nothing, and nobody sees it in the loss of a long run; checkpoints of
    other settings would be saved as the result of these, with a card that lies."""
    near = {"start": str(first), "lr": 1e-9, "projector_lr": 1e-9, "max_steps": 1}
    trackers = ("tensorboard",) if find_spec("tensorboard") else ()
    second = train(configured(tmp_path / "second", **near, report_to=trackers))
    assert len([*second.rglob("events.out.tfevents.*")]) == len(trackers)  # a tracker that is named and never called
    before, after = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[k].float(), after[k].float(), atol=1e-3) for k in before)
    assert read_adapter_card(second).figures["start"] == read_adapter_card(first).sha256
    for given, code, fact in (
        ({"targets": r".*language_model.*\.(q_proj|v_proj)"}, "start_matrices_differ", ""),
        ({"method": "full"}, "config_invalid", "start"),
    ):
        with raises(code, fact):
            train(configured(tmp_path / "third", start=str(first), **given))
    with raises("settings_differ"):
        train(configured(first, **LONGER | {"lr": 2e-2}))
    # The same run is finished already: no step is taken, and the weights stay.
    monkeypatch.setattr(RowTrainer, "compute_loss", lambda *_, **__: pytest.fail("trained again"))
    again = load_file(train(configured(first, **LONGER)) / WEIGHTS)
    assert before.keys() == again.keys() and all(torch.equal(value, again[key]) for key, value in before.items())


@pytest.mark.needs_base
def test_other_instructions_than_those_of_the_manifest_are_refused(
    configured: Configured, small: Small, tmp_path: Path
) -> None:
    """Pictures are named by their place: with other rows, every answer would be about another picture; a card with
    the hashes of weights that were put there after the scores had been written."""
    other = tmp_path / "other.jsonl"
    rows = [json.loads(line) for line in small[0].read_text().splitlines()]
    for row in rows:
        row["path"] = str((small[0].parent / row["path"]).resolve())
    other.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    with raises("manifest_differs"):
        train(configured(tmp_path / "adapter", manifest=str(other)))
    with raises("view_seed_differs"):
        train(configured(tmp_path / "adapter", view_seed=5))
    card = small[1].parent / "card.json"
    before = card.read_text()
    for changes, code in (
        ({"views": {"degrade": 2}}, "views_differ"),  # as it was before the codec
        ({"experts": {tiny.EXPERT: "c" * 64}}, "expert_differs"),
    ):
        tiny.edit_json(card, **changes)
        with raises(code):
            train(configured(tmp_path / "adapter"))
        card.write_text(before)


@pytest.mark.slow
@pytest.mark.needs_base
def test_a_cut_off_run_ends_where_an_unbroken_one_does(
    configured: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that starts anew, repeats pictures or forgets its optimizer ends elsewhere."""
    whole = train(configured(tmp_path / "whole", max_steps=4))
    plain, calls = RowTrainer.compute_loss, list[str]()

    def counted(*given: Any, **named: Any) -> Any:
        batch = given[2]["input_ids"].numpy().tobytes()
        calls.append(hashlib.sha256(batch).hexdigest())
        if len(calls) == 4 and not (tmp_path / "resumed").exists():
            raise KeyboardInterrupt
        return plain(*given, **named)

    monkeypatch.setattr(RowTrainer, "compute_loss", counted)
    with pytest.raises(KeyboardInterrupt):
        train(configured(tmp_path / "cut", max_steps=4))
    assert not (tmp_path / "cut" / WEIGHTS).exists()  # nothing that could be taken for a finished adapter
    (tmp_path / "resumed").touch()
    first, calls[:] = calls[2:3], []
    cut = train(configured(tmp_path / "cut", max_steps=4))
    assert len(calls) == 2 and calls[0] == first[0]  # steps 3 and 4, on the pictures they would have had
    a, b = load_file(whole / WEIGHTS), load_file(cut / WEIGHTS)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key].float(), b[key].float(), atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.needs_base
@pytest.mark.parametrize("method", ["dora", "full"])
def test_every_method_gives_a_model_that_loads(configured: Configured, base: Path, tmp_path: Path, method: str) -> None:
    """One key chooses; what is written has to judge as it did when it was made."""
    out = train(configured(tmp_path / "adapter", method=method, max_steps=2))
    card = read_adapter_card(out)
    assert len(card.probes) == 3 and len(set(card.probes)) == 3
    loaded = x2dfd.load(out if method == "full" else f"hub:{base}+{out}", mode="paper")  # checks the probes
    if method == "full":
        before, after = load_file(base / "model.safetensors"), load_file(out / "model" / "model.safetensors")
        moved = {k for k in before if not torch.equal(before[k], after[k])}
        assert moved and all("language_model" in k or "projector" in k for k in moved)
        assert any("o_proj" in k for k in moved) and any("multi_modal_projector" in k for k in moved)
        assert not (out / WEIGHTS).exists() and loaded.info.adapter_sha256 == card.sha256
    else:
        assert any("lora_magnitude_vector" in k for k in load_file(out / WEIGHTS))
    tiny.edit_card(out, probes=(*card.probes[:2], card.probes[2] + 1.0))
    with raises("probes_differ"):
        x2dfd.load(out if method == "full" else f"hub:{base}+{out}", mode="paper")


@pytest.mark.needs_base
def test_qlora_quantises_the_language_model_alone(configured: Configured, tmp_path: Path) -> None:
    """Four bits in the tower or the projector cost accuracy and save next to nothing."""
    bnb = pytest.importorskip("bitsandbytes")
    model, _ = open_base(configured(tmp_path, method="qlora"))
    four = [n for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(four) == 14 and all("language_model.layers" in n for n in four)
    kinds = {m.weight.quant_type for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert kinds == {"nf4"}


@pytest.mark.needs_base
def test_what_is_trained_is_what_was_said(configured: Configured, tmp_path: Path) -> None:
    """A regex that reaches into the tower trains it unseen; a tower said to be tuned must be."""

    def tuned(**given: Any) -> tuple[Any, list[str]]:
        return tune(open_base(configured(tmp_path))[0], configured(tmp_path, **given))

    for given, code, fact in (
        ({"targets": r".*(q_proj|fc1)"}, "targets_outside_text", "model.language_model"),
        ({"targets": r".*(q_proj|fc1)", "tower": "lora"}, "targets_outside_text", "model.language_model"),
        ({"targets": "nothing"}, "targets_invalid", "'nothing'"),
    ):
        with raises(code, fact):
            tuned(**given)
    model, whole = tuned(tower="norms")
    moved = [n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n and "projector" not in n]
    assert len(moved) == 2 * (2 * 3 + 2)  # 3 layers and ends
    assert all("norm" in n and "vision_tower" in n and any(w in n for w in whole) for n in moved)
    model, _ = tuned(tower="lora")
    moved = [n for n, p in model.named_parameters() if p.requires_grad and "vision_tower" in n]
    assert len(moved) == 3 * 4 * 2 and all("lora_" in n and "self_attn" in n for n in moved)


@pytest.mark.slow
@pytest.mark.needs_base
def test_cached_features_of_any_llava_are_the_towers(
    configured: Configured, base: Path, small: Small, tmp_path: Path
) -> None:
    """A cache of other pictures, layers or views trains on noise; one that is whole is not made again."""
    config = configured(tmp_path / "adapter", cached_features=str(tmp_path / "cache"))
    data, (model, processor) = load_crops(small[0]), open_base(config)
    plain = Rows(read_records(small[1], "train", data), model, processor, data, 1)
    direct = loss(model, collated(plain, [2]))
    for _ in range(2):
        model, _ = open_base(config)
        features = _features(config, model, processor, data)
        written = (tmp_path / "cache" / "patches.npy").stat().st_mtime_ns
        cached = Rows(read_records(small[1], "train", data), model, processor, data, 1, features)
        assert loss(model, collated(cached, [2])) == pytest.approx(direct, rel=1e-3)
    assert (tmp_path / "cache" / "patches.npy").stat().st_mtime_ns == written


def test_rows_of_like_length_share_a_batch_and_sets_are_shown_as_they_weigh() -> None:
    """Padding is work for nothing; an order that a resumed run cannot repeat shows some pictures twice; half of a set,
    always the same half, would waste the other."""
    lengths = [10, 90] * 200
    sampler = Shown(lengths, [(400, 1.0)], 4, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(400)) and order == list(Shown(lengths, [(400, 1.0)], 4, seed=3))
    mixed = [{lengths[i] for i in order[k : k + 4]} for k in range(0, 400, 4)]
    assert sum(len(kinds) > 1 for kinds in mixed) <= 6  # of 100; at random it would be 88
    sampler.set_epoch(1)
    assert list(sampler) != order
    weighed, shown = Shown([1] * 50, [(10, 2.5), (40, 0.5)], 1, seed=0), set[int]()
    for epoch in range(12):
        weighed.set_epoch(epoch)
        indices = list(weighed)
        counts = [indices.count(k) for k in range(50)]
        assert len(indices) == len(weighed) == 45 and set(counts[:10]) == {2, 3} and set(counts[10:]) == {0, 1}
        shown |= set(indices)
    assert shown == set(range(50))


@pytest.mark.needs_base
def test_validation_chooses_and_ends(configured: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: the last checkpoint saved for the best; a run that goes on after it stopped getting better."""
    aucs = iter([0.7, 0.9, 0.8, 0.6])
    monkeypatch.setattr(training, "verdict_auc", lambda found: {"auc": next(aucs)})
    given = configured(tmp_path / "out", eval_steps=1, eval_split="calib", patience=1, max_steps=9)
    log = json.loads((train(given) / "log.json").read_text())
    figures = read_adapter_card(tmp_path / "out").figures
    assert (figures["steps"], figures["best_step"], figures["best_auc"]) == (3, 2, 0.9)
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(losses) == 3 and len(set(losses)) == 3
    best, saved = (load_file(tmp_path / "out" / f / WEIGHTS) for f in ("checkpoints/checkpoint-2", ""))
    assert best.keys() == saved.keys() and all(torch.equal(best[k], saved[k]) for k in best)


@pytest.mark.needs_base
def test_validation_scores_the_verdicts_of_use(base: Path, small: Small, packs: Rows) -> None:
    """An AUC of another token than the verdict's would choose a checkpoint by noise."""

    mllm = LocalMLLM(*load_model(base), "tiny")
    data, records = load_crops(small[0]), [json.loads(line) for line in small[1].read_text().splitlines()]
    said = {r["row"]: r["conversations"][0]["value"] for r in records if r["task"] == "detect"}
    asked = {row: text.removeprefix("<image>\n") for row, text in said.items()}
    looks = [augmented_view(data.crops[row], 1, row) for row in range(4)]
    want = mllm.verdict_logits(mllm.encode(np.stack(looks)), [asked[row] for row in range(4)])
    stand_in: Any = SimpleNamespace(_label_ids=mllm.label_ids, _prepare_inputs=lambda x: x)
    stand_in.compute_loss_context_manager = torch.no_grad
    stand_in.compute_loss = lambda *given, **named: RowTrainer.compute_loss(stand_in, *given, **named)
    _, got, truth = RowTrainer.prediction_step(stand_in, mllm._model, collated(packs, range(4)))
    assert np.allclose(got, want, atol=1e-4) and truth.tolist() == [0, 1, 0, 1]
    found = EvalPrediction(np.array([0.1, 0.4, 0.3, 0.9, 7.0]), np.array([0, 1, 0, 1, -1]))
    assert verdict_auc(found) == {"auc": 1.0}
    with raises("one_class", "eval_split"):
        verdict_auc(EvalPrediction(np.zeros(3), np.array([0, 0, -1])))


def test_zero_3_is_known_by_its_content(tmp_path: Path) -> None:
    """Bug prevented: `my_config.json` taken for no ZeRO-3 because of its name, in a dry run too."""
    mine = tmp_path / "mine.json"
    for given in (["method=qlora", "base=b"], ["start=a", "base=b"], []):
        for shipped in ("zero3.json", "zero3_offload.json"):
            mine.write_text((ROOM / shipped).read_text())
            with raises("config_invalid"):
                load_config(None, [*REQUIRED, *given, f"deepspeed={mine}"])
        load_config(None, [*REQUIRED, *given, f"deepspeed={ROOM / 'zero2.json'}"])
    mine.write_text("[]")
    with raises("config_malformed", mine):
        load_config(None, [*REQUIRED, "base=b", f"deepspeed={mine}"])


def test_what_cannot_be_started_so_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP would save pieces; a name that transformers does not know is a traceback of its own."""
    plain = FinetuneConfig("i", "m", "o")
    for given in ({"fp16": True}, {"scheduler": "cosinus"}, {"optimizer": "adamm"}, {"report_to": ("tensorbored",)}):
        changed = replace(plain, **cast(Any, given))
        with pytest.raises(X2DFDError) as caught:
            _arguments(changed, tmp_path)
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with raises("fsdp_unsupported", "zero3"):
        _arguments(plain, tmp_path)


def test_missing_inputs_are_named_by_a_dry_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: a rehearsal that passes, and a training that ends for a mistyped path once the model is loaded."""
    monkeypatch.setattr("finetune.memory.report", lambda *_: "predicted")
    (tmp_path / "i.jsonl").touch()
    given = [f"instructions=[{tmp_path}/i.jsonl, {tmp_path}/j.jsonl]", f"manifest=[{tmp_path}, {tmp_path}]"]
    (tmp_path / "c.yaml").write_text("out: o\n", encoding="utf-8")
    words = [word for pair in [*given, "start=nowhere"] for word in ("--set", pair)]
    done = CliRunner().invoke(app, ["--config", str(tmp_path / "c.yaml"), "--dry-run", *words])
    assert done.stdout == "predicted\n"
    says(done.exception, "input_missing", f"instructions: {tmp_path}/j.jsonl", "start: nowhere")
    assert "i.jsonl" not in str(done.exception) and "manifest" not in str(done.exception)
    with raises("input_missing", "j.jsonl"):
        train(load_config(None, [*given, "out=o"]))


def test_training_sees_what_use_sees_and_a_start_no_more_than_training(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug prevented: the projector of an adapter "without ffhq" standardised on pictures of ffhq or of calib; training
    on crops without the codec that every crop goes through in use."""
    data, seen = load_crops(small[0]), list[int]()

    def view(crop: Any, seed: int, i: int) -> Any:
        seen.append(i)
        return crop

    model: Any = SimpleNamespace(config=SimpleNamespace(vision_feature_layer=[1]))
    monkeypatch.setattr(training, "augmented_view", view)
    monkeypatch.setattr(training, "tower_states", lambda *_: (torch.zeros(1, 2, 3),) * 2)
    monkeypatch.setattr(training, "fit_projector", lambda *_: None)
    _features(FinetuneConfig("i", "m", "o"), model, cast(Any, None), data)
    assert seen == learnable(data, "train") == [0, 1, 2, 3, 4, 5]
    crop = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    plain = degraded_view(crop, 1, 0)[0]
    assert (augmented_view(crop, 1, 0) == codec(plain, *CODEC)).all() and (augmented_view(crop, 1, 0) != plain).any()
