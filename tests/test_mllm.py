"""The shared prefix and the packed passes give the numbers of the plain model, and only a whole model loads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from data_gen.questions import cue_questions
from data_gen.writers import write_explanation
from tests import tiny
from tests.raising import raises
from x2dfd import prompts
from x2dfd.checkpoints import base_identity, load_model
from x2dfd.files import file_sha256
from x2dfd.mllm import CIRCLE, MAX_NEW_TOKENS, LocalMLLM, _repeats, said_once
from x2dfd.types import Cue, Evidence

pytestmark = pytest.mark.needs_base

QUESTIONS = [
    prompts.QUESTION,
    prompts.verdict_question([Evidence("blending", 0.812)]),
    prompts.verdict_question([Evidence("blending", 0.1), Evidence("clip", None), Evidence("consistency", 0.99)]),
    prompts.CLASS_QUESTION,
]


@pytest.fixture(scope="module")
def mllm(base: Path) -> LocalMLLM:
    return LocalMLLM(*load_model(base), "tiny")


@pytest.fixture
def crops(astronaut: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Eight different crops: [8, 224, 224, 3]."""
    return np.stack([np.roll(astronaut[10 * i : 224 + 10 * i, 100:324], 3 * i, 1) for i in range(8)])


Edit = Callable[[dict[str, torch.Tensor]], object]
"""It changes some tensors of a model."""


def changed(base: Path, copy: Path, edit: Edit) -> Path:
    """A copy of the base with other tensors in its weight file."""
    shutil.copytree(base, copy)
    state = load_file(copy / "model.safetensors")
    edit(state)
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    return copy


# --- scoring ---------------------------------------------------------------------------------------------------------


def test_packed_questions_are_those_asked_one_by_one(mllm: LocalMLLM, crops: NDArray[np.uint8]) -> None:
    """30 questions in two packs: a question that sees its neighbour answers something else."""
    questions = [q.text for q in cue_questions()[:30]]
    packed, plain = mllm.yes_no(crops[0], questions), mllm.yes_no_plain(crops[0], questions)
    assert len(packed.p_yes) == len(packed.answers) == 30
    assert np.ptp(plain.p_yes) > 0.1
    np.testing.assert_allclose(packed.p_yes, plain.p_yes, atol=1e-4)
    assert packed.answers == plain.answers
    assert mllm.yes_no(crops[0], []).p_yes.shape == (0,)
    with pytest.raises(ValueError, match="one picture"):  # else the answers would be of the first alone
        mllm.yes_no_packed(mllm.encode(crops[:2]), questions[:1])


def test_asking_leaves_the_prefix_as_it_was(mllm: LocalMLLM, crops: NDArray[np.uint8]) -> None:
    """What one question leaves in the cache, the next one would read."""
    assert mllm.encode(crops[:1]).cache is None  # the language model has not run yet
    encoding = mllm.encode(crops[:1])
    cues = [q.text for q in cue_questions()[:30]]
    first = mllm.verdict_logits(encoding, QUESTIONS[:1]), mllm.yes_no_packed(encoding, cues).p_yes
    keys = encoding.cache.layers[0].keys.clone()
    text = mllm.write(encoding, QUESTIONS[:1], ["This image is fake."], max_new_tokens=5)
    second = mllm.verdict_logits(encoding, QUESTIONS[:1]), mllm.yes_no_packed(encoding, cues).p_yes
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    assert mllm.write(encoding, QUESTIONS[:1], ["This image is fake."], max_new_tokens=5) == text
    assert encoding.cache.get_seq_length() == encoding.length
    assert torch.equal(encoding.cache.layers[0].keys, keys)


def test_several_feature_layers_are_joined_as_the_stock_model_does(
    base: Path, crops: NDArray[np.uint8], tmp_path: Path
) -> None:
    """Joined in another order, the projector's input is scrambled and nothing says so."""
    folder = changed(base, tmp_path / "joined", wider(2 * 32))
    tiny.edit_json(folder / "config.json", vision_feature_layer=[1, 3])
    mllm = LocalMLLM(*load_model(folder), "joined")
    got = mllm.verdict_logits(mllm.encode(crops[:1]), QUESTIONS[:1])
    text = prompts.render(mllm.processor, QUESTIONS[0], prompts.STEM)
    inputs = mllm.processor(images=Image.fromarray(crops[0]), text=text, return_tensors="pt")
    with torch.inference_mode():
        logits = mllm._model(**inputs).logits[0, -1].double().numpy()
    fake, real = (mllm.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in (" fake", " real"))
    assert got[0] == pytest.approx(logits[fake] - logits[real], abs=1e-4)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_drawn_texts_are_those_of_their_picture(
    mllm: LocalMLLM, crops: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text that another picture of the batch, or another run, would change could not be checked by anyone."""
    start = prompts.rationale_start("fake")
    greedy = mllm.write(mllm.encode(crops[:4]), QUESTIONS, [start] * 4, max_new_tokens=12)
    monkeypatch.setattr(mllm, "temperature", 1.5)
    drawn = mllm.write(mllm.encode(crops[:4]), QUESTIONS, [start] * 4, max_new_tokens=12)
    assert drawn != greedy
    assert drawn == [
        mllm.write(mllm.encode(c[None]), [q], [start], max_new_tokens=12)[0]
        for c, q in zip(crops, QUESTIONS, strict=False)
    ]
    monkeypatch.setattr(mllm, "temperature", 1e-4)
    assert mllm.write(mllm.encode(crops[:4]), QUESTIONS, [start] * 4, max_new_tokens=12) == greedy


def test_the_end_token_ends_the_text_and_is_not_part_of_it(mllm: LocalMLLM, crops: NDArray[np.uint8]) -> None:
    """Without an end, every rationale runs on to the limit."""
    told: list[str] = []
    start = prompts.rationale_start("fake")
    prompt = prompts.render(mllm.processor, QUESTIONS[0], start)
    inputs = mllm.processor(images=Image.fromarray(crops[0]), text=prompt, return_tensors="pt")
    with torch.inference_mode():  # ten greedy tokens of transformers' own
        whole = mllm._model.generate(**inputs, max_new_tokens=10, do_sample=False)
    ids = whole[0, inputs["input_ids"].shape[1] :].tolist()
    assert ids[3] not in ids[:3]
    usual, mllm.tokenizer.eos_token = mllm.tokenizer.eos_token, mllm.tokenizer.convert_ids_to_tokens(ids[3])
    try:
        text = mllm.write(mllm.encode(crops[:1]), [QUESTIONS[0]], [start], max_new_tokens=10, on_text=told.append)
    finally:
        mllm.tokenizer.eos_token = usual
    assert text == [mllm.tokenizer.decode(ids[:3]).strip()]
    assert told == [mllm.tokenizer.decode(ids[:k]).strip() for k in (1, 2, 3, 3)]


def test_each_text_ends_where_it_is_enough(mllm: LocalMLLM, crops: NDArray[np.uint8]) -> None:
    """Bug prevented: a text that is cut for its neighbour's sake, or that runs on for nobody."""
    start = prompts.rationale_start("fake")
    encode = partial(mllm.encode, crops[:2])
    whole = mllm.write(encode(), QUESTIONS[:2], [start] * 2, max_new_tokens=8)
    checks = [lambda text: len(text) >= 3, lambda text: False]
    cut = mllm.write(encode(), QUESTIONS[:2], [start] * 2, max_new_tokens=8, enough=checks)
    assert cut[1] == whole[1]
    assert whole[0].startswith(cut[0]) and 3 <= len(cut[0]) < len(whole[0])


def test_no_text_is_longer_than_its_bound(
    mllm: LocalMLLM, crops: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text that comes to no end would hold the model, and every visitor behind, for as long as its context lasts."""
    told: list[str] = []
    monkeypatch.setattr("x2dfd.mllm._repeats", lambda ids: False)
    monkeypatch.setattr(mllm, "_end_ids", set)
    mllm.write(mllm.encode(crops[:1]), [QUESTIONS[0]], [""], on_text=told.append)
    assert len(told) == MAX_NEW_TOKENS


def test_text_that_repeats_itself_ends(tmp_path: Path, crops: NDArray[np.uint8]) -> None:
    """A small model that loops would fill the report with one phrase."""
    parrot = LocalMLLM(*load_model(tiny.write_base(tmp_path / "base", text_layers=1, parrot=True)), "parrot")
    told: list[str] = []
    text = parrot.write(parrot.encode(crops[:1]), [QUESTIONS[0]], ["This image is fake."], on_text=told.append)
    assert text == ["."]
    assert len(told) == CIRCLE + 1
    assert told[:3] == [".", "..", "..."]


def test_a_sentence_is_said_once() -> None:
    """Bug prevented: a report that says one thing twice, or that loses the sentences between."""
    twice = "The skin is smooth. The jaw has a seam! The skin is smooth. The jaw has a faint seam."
    assert said_once(twice) == "The skin is smooth. The jaw has a seam! The jaw has a faint seam."
    assert said_once("No end") == "No end" and said_once("") == ""


@pytest.mark.slow
def test_no_training_text_would_be_cut_off() -> None:
    """A guard against circles that fires on a colour named twice takes the last cue from the rationale."""
    tokenizer = load_model()[1].tokenizer
    rng = np.random.default_rng(0)
    cues = [Cue("jaw", "blending", score=0.5), Cue("skin", "noise", score=0.5), Cue("skin", "blur", score=0.5)]
    for label, known, df_class in (("fake", cues, "FS"), ("real", [], "real")):
        for _ in range(300):
            ids = tokenizer(write_explanation(label, known, df_class, rng))["input_ids"]
            assert not any(_repeats(ids[:k]) for k in range(len(ids) + 1))


# --- loading ---------------------------------------------------------------------------------------------------------


def test_chosen_layers_are_those_that_were_asked_for(base: Path, crops: NDArray[np.uint8]) -> None:
    """Other layers than the adapter was trained on, or a cache that files two layers' keys under one number."""
    model, processor = load_model(base, text_layers=[1])
    whole, _ = load_model(base)
    (layer,) = model.model.language_model.layers
    theirs = whole.model.language_model.layers[1].state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in layer.state_dict().items())
    assert model.config.text_config.num_hidden_layers == 1
    turned = LocalMLLM(*load_model(base, text_layers=[1, 0]), "turned")
    straight = LocalMLLM(*load_model(base, text_layers=[0, 1]), "straight")
    logits = [m.verdict_logits(m.encode(crops[:2]), [QUESTIONS[0]] * 2) for m in (turned, straight)]
    assert np.abs(logits[0] - logits[1]).max() > 1e-4
    usual = LocalMLLM(whole, processor, "usual")
    assert np.allclose(logits[1], usual.verdict_logits(usual.encode(crops[:2]), [QUESTIONS[0]] * 2), atol=1e-5)
    packed = turned.yes_no(crops[0], QUESTIONS[:3]).p_yes
    assert np.allclose(packed, turned.yes_no_plain(crops[0], QUESTIONS[:3]).p_yes, atol=1e-4)
    for odd in ([], [2], [-1], [0, 0]):
        with raises("text_layers_invalid", odd):
            load_model(base, text_layers=odd)
    # A number of layers is that of the first ones; those that do not exist would be random.
    kept = load_model(base, tower_layers=2, text_layers=1, feature_layers=[2])[0].state_dict()
    assert len(kept) < len(whole.state_dict())
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in kept.items())
    with raises("model_does_not_fit", "layers.2"):
        load_model(base, text_layers=3)
    with raises("feature_layers_invalid", "[3]", 2):
        load_model(base, tower_layers=2, feature_layers=[3])


def drop(part: str) -> Edit:
    """An edit that leaves out the tensors of a part."""

    def edit(state: dict[str, torch.Tensor]) -> None:
        gone = [name for name in state if part in name]
        assert gone
        for name in gone:
            del state[name]

    return edit


def wider(width: int) -> Edit:
    """An edit that makes a projector for inputs of that width."""

    def edit(state: dict[str, torch.Tensor]) -> None:
        (key,) = (k for k in state if "multi_modal_projector.linear_1.weight" in k)
        state[key] = torch.randn(len(state[key]), width) * 0.2

    return edit


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (drop("layers.1.mlp.up_proj.weight"), "up_proj"),
        (drop("multi_modal_projector.linear_1.weight"), "multi_modal_projector"),
        (drop("vision_tower"), "vision_tower"),
        (drop("embed_tokens"), "embed_tokens"),
        (wider(99), "linear_1"),
        (lambda state: state.update({"model.language_model.odd_one.weight": torch.zeros(2)}), "odd_one"),
    ],
)
def test_weights_that_do_not_fit_are_refused(base: Path, tmp_path: Path, edit: Edit, named: str) -> None:
    """transformers fills what is missing with random numbers, and the model then answers at random."""
    with raises("model_does_not_fit", named):
        load_model(changed(base, tmp_path / "changed", edit))


def test_a_missing_head_is_refused_where_it_is_not_the_embedding(tmp_path: Path) -> None:
    """An untied head that is not in the file would be random: label logits of noise."""
    folder = tiny.write_base(tmp_path / "base", text_layers=1, tied=False)
    load_model(folder)
    with raises("model_does_not_fit", "lm_head"):
        load_model(changed(folder, tmp_path / "changed", drop("lm_head")))


def test_a_model_that_cannot_be_read_is_refused(base: Path, tmp_path: Path) -> None:
    """A mistyped folder or a cut-off download must not end in a traceback."""
    with raises("model_unreadable", "nowhere"):
        load_model(tmp_path / "nowhere")
    cut = shutil.copytree(base, tmp_path / "cut")
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with raises("model_unreadable", cut):
        load_model(cut)
    (cut / "model.safetensors").unlink()
    with raises("model_unreadable", cut):
        load_model(cut)


def test_only_the_embedded_base_may_lack_its_projector(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedded base's projector comes with the adapter; anybody else's would be random for good."""
    folder = changed(base, tmp_path / "changed", drop("multi_modal_projector"))
    with raises("model_does_not_fit", "multi_modal_projector"):
        load_model(folder)
    (folder / "base.json").write_text("{}")
    folder.rename(tmp_path / "x2dfd-base-v1")
    monkeypatch.setenv("X2DFD_CACHE", str(tmp_path))
    first, _ = load_model()
    second, _ = load_model()
    weight = first.model.multi_modal_projector.linear_1.weight
    assert torch.equal(weight, second.model.multi_modal_projector.linear_1.weight)  # the same random start each time
    weights = tmp_path / "x2dfd-base-v1" / "model.safetensors"
    assert base_identity(None)["sha256"] == file_sha256(weights)  # of the file itself, not of a note beside it


@pytest.mark.parametrize(("name", "words"), [("LABEL_WORDS", (" fake", " fake news")), ("YES_NO_WORDS", ("No", "No"))])
def test_words_that_begin_with_one_token_are_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: tuple[str, str]
) -> None:
    """Their logits are the same number: every picture would get 0.5."""
    model, processor = load_model(base)
    monkeypatch.setattr(prompts, name, words)
    with raises("tokenizer_words_alike"):
        LocalMLLM(model, processor, "tiny")


def test_a_base_is_known_by_its_weights(base: Path, tmp_path: Path) -> None:
    """A folder's name says nothing: an adapter must find the weights it was trained on."""
    same = shutil.copytree(base, tmp_path / "elsewhere")
    other = changed(base, tmp_path / "other", lambda state: next(iter(state.values())).add_(1))
    assert base_identity(base)["sha256"] == base_identity(same)["sha256"] != ""
    assert base_identity(base)["sha256"] != base_identity(other)["sha256"]
    assert base_identity("llava-hf/llava-1.5-7b-hf") == {"name": "llava-hf/llava-1.5-7b-hf", "sha256": ""}
