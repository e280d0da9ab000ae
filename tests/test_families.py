"""Every family of models is asked as transformers itself asks it: its model with its processor is the oracle.

Without this, a family would load with another's processor, see its picture at other positions or through other masks,
and give a plausible number that is not the model's. `python -m eval.families` makes the table of docs/models.md of what
passes here.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import x2dfd
from tests import families
from tests.raising import raises
from x2dfd import prompts
from x2dfd.adapter import WEIGHTS, AdapterCard, write_adapter_card
from x2dfd.errors import SetupError
from x2dfd.faces import PREPROCESSING
from x2dfd.files import file_sha256
from x2dfd.loading import FAMILIES, base_identity, load_model, processor_class
from x2dfd.mllm import LocalMLLM
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


@pytest.mark.slow
def test_verdict(kind: Kind, crops: NDArray[np.uint8]) -> None:
    """Not just alike but the stock numbers, of pictures in a batch whose questions differ in length."""
    got = kind.mllm.verdict_logits(kind.mllm.look(crops), QUESTIONS)
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
def test_rationale(kind: Kind, crops: NDArray[np.uint8]) -> None:
    """The text is what the stock model goes on to write, and the look can be asked again afterwards."""
    look, start = kind.mllm.look(crops), prompts.rationale_start("fake")
    got = kind.mllm.write(look, QUESTIONS, [start] * 2, max_new_tokens=8)
    for crop, question, text in zip(crops, QUESTIONS, got, strict=True):
        inputs = stock_inputs(kind, crop, question, start)
        with torch.inference_mode():
            whole = kind.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
        new = whole[inputs["input_ids"].shape[1] :]
        assert text == kind.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert any(got)
    again = kind.mllm.verdict_logits(look, QUESTIONS)
    assert np.allclose(again, kind.mllm.verdict_logits(kind.mllm.look(crops), QUESTIONS), atol=1e-5)


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
    got = loaded.verdict_logits(loaded.look(crops), QUESTIONS)
    want = [stock_verdict(kind, tuned, c, q) for c, q in zip(crops, QUESTIONS, strict=True)]
    assert np.allclose(got, want, atol=1e-4)
    assert not np.allclose(got, kind.mllm.verdict_logits(kind.mllm.look(crops), QUESTIONS), atol=1e-2)


@pytest.mark.slow
def test_one_begin_token(kind: Kind) -> None:
    """A template that writes the begin token, and a tokenizer that adds it, would give two."""
    bos = kind.processor.tokenizer.bos_token
    before, after = prompts.prompt_tokens(kind.mllm.processor, prompts.render(kind.mllm.processor, prompts.QUESTION))
    if bos is not None:
        [token] = kind.processor.tokenizer.convert_tokens_to_ids([bos])
        assert (before + after).count(token) == 1


# --- what cannot be asked is refused in one line that says what to use -----------------------------------------------


def refusal(folder: Path, **config: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SetupError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    assert told in refusal(tmp_path / "model", **config)


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
