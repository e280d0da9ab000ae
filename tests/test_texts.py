"""Text metrics: a number under a known name that is another metric."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import texts
from tests.raising import raises
from x2dfd.manifest import Sample

REFERENCES = [["The jaw is blurred.", "The line of the jaw is soft."], ["The eyes differ in size."]]


def sample(**extra: object) -> Sample:
    return Sample("a", Path("/a.png"), "fake", extra=dict(extra))


def test_references_are_several_or_one_or_none() -> None:
    """A list flattened into one text, or an empty text that everything is far from."""
    assert texts.references_of(sample(references=json.dumps(["One.", " ", "Two."]))) == ("One.", "Two.")
    assert texts.references_of(sample(reference="One.")) == ("One.",)
    assert texts.references_of(sample()) == texts.references_of(sample(references="", reference="")) == ()
    assert texts.questions_of(sample(references=["One."])) == {}
    annotated = [{"question": "Why?", "answers": ["One.", " ", "Two."]}, {"question": "", "answers": ["Three."]}]
    for given in (annotated, json.dumps(annotated)):
        assert texts.references_of(sample(references=given)) == ("One.", "Two.", "Three.")
        assert texts.questions_of(sample(references=given)) == {"Why?": 2, "": 1}
    for wrong in ("{oops", [1], '{"One.": 1}', [{"question": "Why?"}], [{"question": "Why?", "answers": "One."}]):
        with raises("references_malformed", "JSON list"):
            texts.references_of(sample(references=wrong))


def test_what_does_not_run_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A missing package must not become a zero, nor stop the run."""
    for package in ("sacrebleu.metrics", "rouge_score.rouge_scorer", "pycocoevalcap.cider.cider"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    found = texts.text_metrics(REFERENCES, ["a", "b"], encoder=tmp_path)
    assert all(part["value"] is None for part in found.values())
    assert "pip install" in found["bleu_1"]["reason"] and "pip install" in found["cider"]["reason"]
    assert "no sentence encoder" in found["similarity"]["reason"]
    assert texts.text_metrics([], []) == {}


def test_known_answers() -> None:
    """Scaled by 100 in one package and not in another; the first reference only; stemming or not."""
    for package in ("sacrebleu", "rouge_score", "pycocoevalcap"):
        pytest.importorskip(package, reason=f"{package} is not installed (pip install -e '.[bench]')")
    same = texts.text_metrics(REFERENCES, ["The line of the jaw is soft.", "The eyes differ in size."])
    assert [same[f"bleu_{n}"]["value"] for n in (1, 2, 3, 4)] == pytest.approx([1.0] * 4)
    assert [same[n]["value"] for n in ("rouge_l", "bleu_mean")] == pytest.approx([1.0, 1.0])
    other = texts.text_metrics(REFERENCES, ["The jaw is soft.", "The eyes differed."])
    # Words and stops: 5 of "the jaw is soft ." and 3 of "the eyes differed ." are in a reference; the length of the
    # nearest references is 5 + 6 against 9: the brevity penalty is exp(1 - 11 / 9).
    assert other["bleu_1"]["value"] == pytest.approx(8 / 9 * 2.718281828 ** (1 - 11 / 9), rel=1e-6)
    # Longest common subsequences: "the jaw is" of 4 and 4 words; "the eyes differ" (stemmed) of 3 and 5.
    assert other["rouge_l"]["value"] == pytest.approx((3 / 4 + 2 * 3 / 8) / 2)
    assert 0 < other["cider"]["value"] < same["cider"]["value"]
    assert "sacrebleu" in other["bleu_1"]["by"] and "rouge-score" in other["rouge_l"]["by"]


def test_similarity_names_its_encoder(tmp_path: Path) -> None:
    """A "CSS 0.87" of an encoder that nobody knows cannot be reproduced."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = sorted({w for r in REFERENCES for t in r for w in t.lower().split()})
    plain = Tokenizer(WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *words])}, unk_token="[UNK]"))
    plain.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=len(words) + 2, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(tmp_path)
    said = ["The line of the jaw is soft.", "The eyes differ in size."]
    found = texts.text_metrics(REFERENCES, said, encoder=tmp_path)["similarity"]
    assert found["value"] == pytest.approx(1.0, abs=1e-5)  # each is one of its references, whatever the weights
    assert tmp_path.name in found["by"]
    assert texts.text_metrics(REFERENCES, said[::-1], encoder=tmp_path)["similarity"]["value"] < 1.0
