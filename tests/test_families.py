"""Every family of models is asked as transformers itself asks it: its model with its processor is the oracle.

Without this, a family would load with another's processor, see its picture at other positions or through other masks,
and give a plausible number that is not the model's. `python -m eval.families` makes the table of docs/models.md of what
passes here.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

import x2dfd
from data_gen.build import BuildConfig, build
from finetune import train as training
from finetune.config import FinetuneConfig
from finetune.data import Collate, Rows, read_records
from finetune.models import open_base, part_name, tune
from finetune.split import split
from tests import families, tiny
from tests.raising import raises
from x2dfd import prompts
from x2dfd.adapter import WEIGHTS, AdapterCard, write_adapter_card
from x2dfd.assessment import CueQuestion, assess
from x2dfd.checkpoints import FAMILIES, base_identity, in_bits, load_model, processor_class
from x2dfd.crops import load_crops
from x2dfd.detector import through_codec
from x2dfd.errors import SetupError, X2DFDError
from x2dfd.faces import PREPROCESSING, find_faces
from x2dfd.files import file_sha256
from x2dfd.mllm import LocalMLLM
from x2dfd.tower import augmented_view
from x2dfd.types import Evidence

QUESTIONS = [prompts.QUESTION, prompts.verdict_question([Evidence("blending", 0.812), Evidence("clip", None)])]
CUES = [f"{q} {prompts.CUE_ENDING}" for q in ("Is there a seam?", "Does the skin look too smooth?", "Odd nose?")]


class Kind(NamedTuple):
    """A checkpoint, transformers' own view of it, and ours."""

    key: str
    folder: Path
    model: Any
    processor: Any
    mllm: LocalMLLM


@pytest.fixture(scope="module", params=families.KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    key = families.KINDS[request.param][0]
    try:
        processor_class(FAMILIES[key])
    except SetupError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp(key)
    model, processor = families.write_model(folder, request.param)
    return Kind(key, folder, model, processor, LocalMLLM(*load_model(folder), request.param))


@pytest.fixture
def crops(astronaut: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.stack([astronaut[10 * i : 224 + 10 * i, 100:324] for i in range(2)])


def stock_inputs(kind: Kind, crop: NDArray[np.uint8], question: str, start: str = "") -> dict[str, Any]:
    """The stock processor's inputs for an answer begun by `start`."""
    picture = Image.fromarray(crop)
    if kind.key == "paligemma":
        found = kind.processor(images=picture, text=f"<image>{question}", suffix=start or None, return_tensors="pt")
        found.pop("labels")
        sequence = ("input_ids", "attention_mask", "token_type_ids")
        return {k: v[:, :-1] if start and k in sequence else v for k, v in found.items()}  # without the end token
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}
    ]
    if kind.key == "mistral3":
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": prompts.SERVED_SYSTEM}]})
    if start:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": start}]})
    return dict(
        kind.processor.apply_chat_template(
            messages,
            add_generation_prompt=not start,
            continue_final_message=bool(start),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    )


def stock_logits(kind: Kind, model: Any, crop: NDArray[np.uint8], question: str, start: str = "") -> Any:
    with torch.inference_mode():
        return model(**stock_inputs(kind, crop, question, start)).logits[0, -1].double()


def next_token(kind: Kind, crop: NDArray[np.uint8], start: str, word: str) -> int:
    """The token with which the stock processor goes on after `start`."""
    before, after = (
        stock_inputs(kind, crop, prompts.QUESTION, text)["input_ids"][0].tolist() for text in (start, start + word)
    )
    return int(after[len(before)])


def stock_verdict(kind: Kind, model: Any, crop: NDArray[np.uint8], question: str) -> float:
    logits = stock_logits(kind, model, crop, question, prompts.STEM)
    real, fake = (logits[next_token(kind, crop, prompts.STEM, word)] for word in prompts.LABEL_WORDS)
    return float(fake - real)


SOME = ("LLaVA-1.5", "Qwen3-VL", "Gemma 3", "PaliGemma")
"""Families whose parts differ the most: of the others, what depends little on the family or costs seconds is slow."""
some_families = pytest.mark.parametrize(
    "kind",
    [pytest.param(name, marks=() if name in SOME else pytest.mark.slow) for name in families.KINDS],
    indirect=True,
    scope="module",
)


@pytest.mark.slow
def test_load(kind: Kind, astronaut: NDArray[np.uint8]) -> None:
    """Through the front door, a photo's face as large as the family takes it is judged as the stock model judges it."""
    detector = x2dfd.load(f"hub:{kind.folder}", mode="paper", experts=(), device="cpu")
    any_size = kind.key in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "pixtral", "mistral3")
    assert detector.info.crop_size == (448 if any_size else 224)
    [face] = through_codec(find_faces(astronaut, detector.info.crop_size))
    [said] = detector.detect(Image.fromarray(astronaut), rationale=False).faces
    want = stock_verdict(kind, kind.model, face.view, prompts.QUESTION)
    assert said.p_fake_mllm == pytest.approx(1 / (1 + np.exp(-want)), abs=1e-4)


@some_families
def test_verdict(kind: Kind, crops: NDArray[np.uint8]) -> None:
    """Not just alike but the stock numbers, of pictures in a batch whose questions differ in length."""
    got = kind.mllm.verdict_logits(kind.mllm.encode(crops), QUESTIONS)
    want = [stock_verdict(kind, kind.model, c, q) for c, q in zip(crops, QUESTIONS, strict=True)]
    assert np.allclose(got, want, atol=1e-4)
    assert abs(want[0] - want[1]) > 1e-2


@pytest.mark.slow
def test_cues(kind: Kind, crops: NDArray[np.uint8]) -> None:
    """Packed questions would see each other, or stand at each other's positions."""
    got = kind.mllm.yes_no(crops[0], CUES)
    both = [next_token(kind, crops[0], "", word) for word in prompts.YES_NO_WORDS]
    want = [float(stock_logits(kind, kind.model, crops[0], q)[both].softmax(-1)[0]) for q in CUES]
    assert np.allclose(got.p_yes, want, atol=1e-4)
    assert np.ptp(want) > 1e-3
    assert np.allclose(kind.mllm.yes_no_plain(crops[0], CUES).p_yes, want, atol=1e-4)


@pytest.mark.slow
def test_assess(kind: Kind, taught: tuple[Path, Path], tmp_path: Path) -> None:
    """A ranking of other numbers than the stock model's would call other cues strong."""
    data = load_crops(taught[1])
    asked = [CueQuestion(q, "nose", a, "bank") for q, a in zip(CUES[:2], ("blur", "noise"), strict=True)]
    assess(kind.mllm, data, asked, tmp_path, limit=2, progress=False)
    [row, _] = pq.read_table(tmp_path / "answers.parquet").to_pylist()
    [crop] = (c for c, s in zip(data.crops, data.samples, strict=True) if s.id == row["id"])
    both = [next_token(kind, crop, "", word) for word in prompts.YES_NO_WORDS]
    want = [float(stock_logits(kind, kind.model, crop, q)[both].softmax(-1)[0]) for q in CUES[:2]]
    assert np.allclose(row["p_yes"], want, atol=1e-4)


@some_families
def test_rationale(kind: Kind, crops: NDArray[np.uint8]) -> None:
    """The text is what the stock model goes on to write, and the look can be asked again afterwards."""
    encoding, start = kind.mllm.encode(crops), prompts.rationale_start("fake")
    got = kind.mllm.write(encoding, QUESTIONS, [start] * 2, max_new_tokens=8)
    for crop, question, text in zip(crops, QUESTIONS, got, strict=True):
        inputs = stock_inputs(kind, crop, question, start)
        with torch.inference_mode():
            whole = kind.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
        new = whole[inputs["input_ids"].shape[1] :]
        assert text == kind.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert any(got)
    again = kind.mllm.verdict_logits(encoding, QUESTIONS)
    assert np.allclose(again, kind.mllm.verdict_logits(kind.mllm.encode(crops), QUESTIONS), atol=1e-5)


@pytest.mark.slow
def test_adapter(kind: Kind, crops: NDArray[np.uint8], tmp_path: Path) -> None:
    """A PEFT adapter for the family loads through the front door, and is PEFT's own numbers."""
    from peft import LoraConfig, get_peft_model

    text = next(n for n, m in kind.model.named_modules() if m is kind.model.get_decoder())
    model, processor = load_model(kind.folder)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=rf"{text}\..*\.(q_proj|v_proj|down_proj)")
    torch.manual_seed(3)
    tuned = get_peft_model(model, lora).eval()
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    tuned.save_pretrained(str(tmp_path))
    card = AdapterCard(
        name="tiny", version="1", source="a test", licence="Apache-2.0", sha256=file_sha256(tmp_path / WEIGHTS),
        preprocessing=PREPROCESSING, paper="none", blind_spot="everything", weights=WEIGHTS,
        base=base_identity(kind.folder), prompt_sha256=prompts.prompt_hash(processor),
    )  # fmt: skip
    write_adapter_card(tmp_path, card)
    loaded = x2dfd.load(f"hub:{kind.folder}+{tmp_path}", mode="paper", experts=(), device="cpu").mllm
    got = loaded.verdict_logits(loaded.encode(crops), QUESTIONS)
    want = [stock_verdict(kind, tuned, c, q) for c, q in zip(crops, QUESTIONS, strict=True)]
    assert np.allclose(got, want, atol=1e-4)
    assert not np.allclose(got, kind.mllm.verdict_logits(kind.mllm.encode(crops), QUESTIONS), atol=1e-2)


@pytest.mark.slow
def test_one_begin_token(kind: Kind) -> None:
    """A template that writes the begin token, and a tokenizer that adds it, would give two."""
    bos = kind.processor.tokenizer.bos_token
    before, after = prompts.prompt_tokens(kind.mllm.processor, prompts.render(kind.mllm.processor, prompts.QUESTION))
    if bos is not None:
        [token] = kind.processor.tokenizer.convert_tokens_to_ids([bos])
        assert (before + after).count(token) == 1


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, known_expert: None) -> tuple[Path, Path]:
    """Instructions about four training pictures, and their manifest."""
    import skimage.data

    folder = tmp_path_factory.mktemp("taught")
    manifest = tiny.write_small_manifest(folder, np.asarray(skimage.data.astronaut()), 6)
    return build(BuildConfig(str(manifest), experts=(tiny.EXPERT,), follow_ups=0), folder / "built"), manifest


def test_training_text(kind: Kind, taught: tuple[Path, Path]) -> None:
    """Token by token what the stock processor makes of question and answer, and so what inference asks.

    And its loss, of all conversations about a picture together, is that of the stock model one by one: they neither see
    each other nor stand at each other's positions.
    """
    data = load_crops(taught[1])
    rows = Rows(read_records(taught[0], "train", data), kind.model, kind.mllm.processor, data, 1)
    [view] = (augmented_view(data.crops[row], 1, row) for row in [1])
    records = [r for r in map(json.loads, taught[0].read_text().splitlines()) if r["row"] == 1]
    items = [rows[k] for k, (row, _) in enumerate(rows._rows) if row == 1]
    tokens = [i["prefix"]["input_ids"][0].tolist() + c.tokens for i in items for c in i["conversations"]]
    losses, answered = [], 0
    for record, got in zip(records, tokens, strict=True):
        asked, said = (turn["value"] for turn in record["conversations"])
        stock = stock_inputs(kind, view, asked.removeprefix("<image>\n"), said)
        assert got[:-1] == stock["input_ids"][0].tolist()
        bos = kind.processor.tokenizer.bos_token_id
        assert bos is None or got.count(bos) == 1
        before = len(stock_inputs(kind, view, asked.removeprefix("<image>\n"))["input_ids"][0])
        with torch.inference_mode():
            logits = kind.model(**stock).logits[0, before - 1 :].double()
        each = torch.nn.functional.cross_entropy(logits, torch.tensor(got[before:]), reduction="sum")
        losses.append(float(each))
        answered += len(got) - before
    batch = Collate(0, 1.0, 1.0, rows.positions, rows.marks_answers)(items)
    with torch.inference_mode():
        got_loss = training.RowTrainer.compute_loss(cast(Any, None), kind.model, batch)
    assert float(got_loss) == pytest.approx(sum(losses) / answered, abs=1e-4)


def trained(kind: Kind, taught: tuple[Path, Path], out: Path, **given: Any) -> tuple[FinetuneConfig, Any]:
    """Three steps over everything; what they gave in memory, before anything was written."""
    plain, kept = training._save, list[Any]()

    def save(config: FinetuneConfig, out: Path, model: Any, tuned: Any, processor: Any, state: Any) -> None:
        mllm = LocalMLLM(model, processor, "in memory")

        def logits(crops: NDArray[np.uint8]) -> NDArray[np.float64]:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
                return mllm.verdict_logits(mllm.encode(crops), QUESTIONS)

        kept.append(logits)
        plain(config, out, model, tuned, processor, state)

    config = FinetuneConfig(
        str(taught[0]), str(taught[1]), str(out), base=str(kind.folder), lora_r=4, lora_alpha=8, lora_dropout=0.0,
        lr=1e-2, projector_lr=1e-3, accumulate=1, batch=32, max_steps=3, save_steps=100, crop_size=224,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_save", save)
        training.train(replace(config, **given))
    log = json.loads((out / "log.json").read_text())
    assert log[-1]["train_loss"] < log[0]["loss"]  # the mean of the steps, each over the same rows; and the first
    return config, kept[0]


def reloaded(out: str, crops: NDArray[np.uint8], *, base: str | None = None, **given: Any) -> NDArray[np.float64]:
    mllm = x2dfd.load(f"hub:{base}+{out}" if base else out, mode="paper", experts=(), device="cpu", **given).mllm
    return mllm.verdict_logits(mllm.encode(crops), QUESTIONS)


@pytest.fixture(scope="module")
def lora(kind: Kind, taught: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[FinetuneConfig, Any]:
    return trained(kind, taught, tmp_path_factory.mktemp("lora") / "out")


def test_lora(kind: Kind, lora: tuple[FinetuneConfig, Any], crops: NDArray[np.uint8]) -> None:
    """What is written judges as what was trained: no part is lost, none is left in another state."""
    config, memory = lora
    got = reloaded(config.out, crops, base=config.base)
    assert np.allclose(got, memory(crops), atol=1e-4)
    assert not np.allclose(got, kind.mllm.verdict_logits(kind.mllm.encode(crops), QUESTIONS), atol=1e-2)
    projector = [k for k in load_file(Path(config.out) / WEIGHTS) if ".lora_" not in k]
    assert projector and not any(part in k for k in projector for part in ("language_model", "text_model", "layers."))


def test_split(kind: Kind, lora: tuple[FinetuneConfig, Any], crops: NDArray[np.uint8], tmp_path: Path) -> None:
    """An engine loads the base of a split with transformers' names and puts PEFT's matrices on it."""
    from peft import PeftModel

    config, memory = lora
    base, matrices, rank = split(f"hub:{config.base}+{config.out}", tmp_path)
    model, processor = load_model(base)
    served = LocalMLLM(PeftModel.from_pretrained(model, str(matrices)).base_model.model, processor, "split")
    assert rank == 4 and not [k for k in load_file(matrices / WEIGHTS) if ".lora_" not in k]
    assert json.loads((matrices / "adapter_config.json").read_text())["modules_to_save"] is None
    assert np.allclose(served.verdict_logits(served.encode(crops), QUESTIONS), memory(crops), atol=1e-4)


@some_families
def test_qlora(kind: Kind, taught: tuple[Path, Path], crops: NDArray[np.uint8], tmp_path: Path) -> None:
    """The adapter fits the base in four bits as it was trained on it."""
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    config, memory = trained(kind, taught, tmp_path / "out", method="qlora")
    assert np.allclose(reloaded(config.out, crops, base=config.base, bits=4), memory(crops), atol=1e-4)


@some_families
def test_full(kind: Kind, taught: tuple[Path, Path], crops: NDArray[np.uint8], tmp_path: Path) -> None:
    """A whole model loads without its base, with the head and the projector that were trained."""
    config, memory = trained(kind, taught, tmp_path / "out", method="full", lr=1e-3)
    assert np.allclose(reloaded(config.out, crops), memory(crops), atol=1e-4)


# --- precisions ------------------------------------------------------------------------------------------------------


@some_families
def test_bits(kind: Kind, crops: NDArray[np.uint8]) -> None:
    """Transformers' own numbers in four and in eight bits; the tower and the head are left as they were."""
    bnb = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    from transformers import AutoModelForImageTextToText

    # In eight bits a token's largest numbers are kept apart by what else is in its batch.
    for bits, quantised, near in (4, bnb.nn.Linear4bit, 1e-4), (8, bnb.nn.Linear8bitLt, 0.1):
        mllm = x2dfd.load(f"hub:{kind.folder}", mode="paper", experts=(), device="cpu", bits=cast(Any, bits)).mllm
        assert isinstance(mllm, LocalMLLM)
        options: dict[str, Any] = {"quantization_config": in_bits(kind.folder, cast(Any, bits), torch.float32)}
        stock: Any = AutoModelForImageTextToText.from_pretrained(
            kind.folder, device_map={"": "cpu"}, dtype=torch.float32, **options
        )
        got = mllm.verdict_logits(mllm.encode(crops), QUESTIONS)
        want = [stock_verdict(kind, stock.eval(), c, q) for c, q in zip(crops, QUESTIONS, strict=True)]
        assert np.allclose(got, want, atol=near)
        small = [n for n, m in mllm._model.named_modules() if isinstance(m, quantised)]
        assert small and all("layers" in n and "vision" not in n and "visual" not in n for n in small)


@pytest.mark.slow
def test_device_map(kind: Kind, crops: NDArray[np.uint8], tmp_path: Path) -> None:
    """Language layers elsewhere than tower and head, as they are where one card does not hold them all."""
    from accelerate import dispatch_model

    model, processor = load_model(kind.folder)
    text = part_name(model, model.get_decoder())
    away = (f"{text}.layers.1", f"{text}.norm")
    places = dict.fromkeys(away, "disk")
    for name in (n for n, _ in model.named_parameters() if not n.startswith(away)):
        places[f"{text}.layers.0" if f"{text}.layers" in name else name.rpartition(".")[0]] = "cpu"
    spread = dispatch_model(model, cast(Any, places), main_device=cast(Any, "cpu"), offload_dir=str(tmp_path))
    assert {p.device.type for p in spread.parameters()} == {"cpu", "meta"}
    mllm = LocalMLLM(spread, processor, "spread")
    got, want = (m.verdict_logits(m.encode(crops), QUESTIONS) for m in (mllm, kind.mllm))
    assert np.allclose(got, want, atol=1e-4)
    assert np.allclose(mllm.yes_no(crops[0], CUES).p_yes, kind.mllm.yes_no(crops[0], CUES).p_yes, atol=1e-4)


@some_families
def test_sixteen_bits(kind: Kind, taught: tuple[Path, Path], crops: NDArray[np.uint8], tmp_path: Path) -> None:
    """A checkpoint in 16 bits is read so on a CPU too, trained so and loaded again: in 32, a 7B takes 28 GB there."""
    half = kind.model.__class__.from_pretrained(kind.folder, dtype=torch.bfloat16)
    for part in (half, kind.processor):
        part.save_pretrained(tmp_path / "half")
    mllm = x2dfd.load(f"hub:{tmp_path / 'half'}", mode="paper", experts=(), device="cpu").mllm
    assert isinstance(mllm, LocalMLLM) and {p.dtype for p in mllm._model.parameters()} == {torch.bfloat16}
    wide = LocalMLLM(*load_model(tmp_path / "half", dtype=torch.float32), "in 32 bits")
    got, want = (m.verdict_logits(m.encode(crops), QUESTIONS) for m in (mllm, wide))
    assert np.abs(got - want).max() < 0.3
    config, memory = trained(kind._replace(folder=tmp_path / "half"), taught, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (saved["base_dtype"], saved["bf16"]) == ("bfloat16", True)
    assert np.abs(reloaded(config.out, crops, base=config.base) - memory(crops)).max() < 0.3


# --- what a family cannot do is refused in one line ------------------------------------------------------------------


def test_parts_of_another_family_are_refused(tmp_path: Path) -> None:
    """Bug prevented: a setting of LLaVA's tower that is silently without effect, or a traceback from inside a model."""
    families.write_model(tmp_path, "Idefics3")
    plain = FinetuneConfig("i", "m", "o", base=str(tmp_path))
    for given in ({"cached_features": "f"}, {"tower": "forensic", "expert_weights": "w"}, {"tower_layers": 1}):
        with pytest.raises(X2DFDError) as caught:
            open_base(replace(plain, **given))
        assert "\n" not in str(caught.value)
    model, _ = open_base(plain)
    with raises("tower_missing", "tower: lora"):
        tune(model, replace(plain, tower="lora"))
    tuned, whole = tune(model, replace(plain, targets="attention", projector_lr=0.0))
    learnt = {n for n, p in tuned.named_parameters() if p.requires_grad}
    assert not whole and learnt and all("lora_" in n and "self_attn" in n and "text_model" in n for n in learnt)


# --- what cannot be asked is refused in one line that says what to use -----------------------------------------------


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "internvl_chat"}, "-hf"),
        ({"model_type": "llava_llama"}, "llava-hf/"),
        ({"model_type": "llama"}, "qwen3_vl"),
        ({"model_type": "no-such-kind"}, "docs/served.md"),
        ({}, "model type"),
    ],
)
def test_an_unknown_kind_is_one_line_that_says_what_to_use(tmp_path: Path, config: dict[str, Any], told: str) -> None:
    """transformers' own message is forty lines, and the first is empty."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SetupError) as caught:
        load_model(tmp_path)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Layers on disk would be read again for every question: hours, where four bits or a second GPU take seconds."""
    families.write_model(tmp_path, "LLaVA-1.5")
    with raises("model_too_large", "bits=4"):
        load_model(tmp_path, device_map="auto", max_memory={"cpu": 300_000}, offload_folder=str(tmp_path / "disk"))


def test_a_package_that_is_missing_is_named() -> None:
    """Pixtral's processor needs torchvision: the traceback of an import does not say that it can be installed."""
    with raises("package_missing", "pip install no_such_package"):
        processor_class(replace(FAMILIES["llava"], needs=("no_such_package",)))


def test_a_base_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    """A pretrained base would be asked in a made-up form."""
    families.write_model(tmp_path, "Gemma 3")
    (tmp_path / "chat_template.jinja").unlink()
    with raises("chat_template_missing", "-it, -Instruct"):
        load_model(tmp_path)


def test_the_date_does_not_change_the_prompt() -> None:
    """Mistral's template tells the model what day it is, and an adapter's prompt hash would differ tomorrow."""
    processor = families.plain_processor(families.TODAY + families.INST.replace("PICTURE", "<image>"))
    assert "Today is" not in prompts.render(processor, prompts.QUESTION)


def test_a_model_that_thinks_first_is_refused() -> None:
    """Its answer begins inside its thoughts: the stem would be one of them."""
    thinks = families.CHATML.replace("assistant\n{%", "assistant\n<think>\n{%").replace("SYSTEM", "")
    with raises("model_thinks", "Instruct"):
        prompts.render(families.plain_processor(thinks.replace("PICTURE", "<image>")), prompts.QUESTION, prompts.STEM)
