"""Text metrics: a number under a known name that is another metric."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from eval import texts
from x2dfd.errors import X2DFDError
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
        with pytest.raises(X2DFDError, match="JSON list"):
            texts.references_of(sample(references=wrong))


def test_what_does_not_run_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A missing package must not become a zero, nor stop the run."""
    lacking = ("sacrebleu.metrics", "rouge_score.rouge_scorer", "pycocoevalcap.cider.cider", "nltk.corpus")
    for package in (*lacking, "nltk.translate.meteor_score"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    found = texts.text_metrics(REFERENCES, ["a", "b"], encoder=tmp_path)
    assert all(part["value"] is None for part in found.values())
    assert "pip install" in found["bleu_1"]["reason"] and "pip install" in found["cider"]["reason"]
    for name in ("meteor_nltk", "meteor_nltk_exact_stem"):
        assert "nltk" in found[name]["reason"] and "pip install" in found[name]["reason"]
    assert "--meteor" in found["meteor"]["reason"] and "no sentence encoder" in found["similarity"]["reason"]
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


def words(rng: np.random.Generator, n: int) -> list[str]:
    """Different words that no stemmer takes for one."""
    return [f"{a}{b}x" for a, b in (divmod(int(k), 97) for k in rng.choice(97 * 97, n, replace=False))]


def test_meteor_of_nltk_on_generated_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts handed over as letters, the worst reference or all of them as one, or synonyms that nobody looked up."""
    scorer = pytest.importorskip("nltk.translate.meteor_score", reason="nltk is not installed: '.[bench]'")
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])  # whatever this machine has
    nltk.corpus.wordnet._unload()
    rng = np.random.default_rng(0)

    def exact_stem(references: list[list[str]], said: list[str]) -> float:
        found = texts.text_metrics(references, said)
        assert found["meteor_nltk"]["value"] is None
        assert "WordNet's data is not here" in found["meteor_nltk"]["reason"]
        assert "exact and stem matching only" in found["meteor_nltk_exact_stem"]["by"]
        return float(found["meteor_nltk_exact_stem"]["value"])

    # m words in c pieces that stand together: penalty (c / m)^3 / 2 (Lavie & Agarwal 2007), all words found.
    own = words(rng, 12)
    text = " ".join(own)
    assert exact_stem([[text]], [text]) == pytest.approx(1 - 0.5 / 12**3)
    assert exact_stem([[text]], [" ".join(own[6:] + own[:6])]) == pytest.approx(1 - 0.5 * (2 / 12) ** 3)
    # Half of the words: precision 1, recall 1/2, their mean with nine parts of recall.
    half = 0.5 / (0.9 + 0.1 * 0.5) * (1 - 0.5 / 6**3)
    assert exact_stem([[text]], [" ".join(own[:6]) + "."]) == pytest.approx(half)
    # The best of several references, the mean over samples; nothing in common is nothing.
    assert exact_stem([[" ".join(words(rng, 4)), text]], [" ".join(own[:6])]) == pytest.approx(half)
    assert exact_stem([[text], ["None of these"]], [text, "q z"]) == pytest.approx((1 - 0.5 / 12**3) / 2)
    # Stems are matched, synonyms are not, capitals do not count.
    assert exact_stem([["Blurred edges"]], ["blurring edge"]) == pytest.approx(1 - 0.5 / 2**3)
    assert exact_stem([["big"]], ["large"]) == 0.0
    # As nltk itself has it, on words drawn with repetitions.
    for _ in range(20):
        drawn = [[str(w) for w in rng.choice(own, 9)] for _ in range(3)]
        wanted = scorer.meteor_score(drawn[:2], drawn[2], wordnet=texts._NoSynonyms())
        joined = [" ".join(d) for d in drawn]
        assert exact_stem([joined[:2]], joined[2:]) == pytest.approx(wanted)


def test_meteor_of_nltk_with_synonyms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number without synonyms under the name of the one with them, or the other way round."""
    pytest.importorskip("nltk.translate.meteor_score", reason="nltk is not installed: '.[bench]'")
    import nltk.corpus

    class WordNet:
        def ensure_loaded(self) -> None:
            pass

        def synsets(self, word: str) -> list[Any]:
            lemma = SimpleNamespace(name=lambda: "auto")
            return [SimpleNamespace(lemmas=lambda: [lemma])] if word == "car" else []

    monkeypatch.setattr(nltk.corpus, "wordnet", WordNet())
    found = texts.text_metrics([["auto"]], ["car"])  # nltk compares stems, and these are their own
    assert found["meteor_nltk"]["value"] == pytest.approx(0.5) and "synonym" in found["meteor_nltk"]["by"]
    assert found["meteor_nltk_exact_stem"]["value"] == 0.0


def test_meteor_of_java_is_asked_in_words_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of 2 GB that stays; capitals and stops that count; a zero where there is no Java."""
    started: list[subprocess.Popen[bytes]] = []
    asked: list[Any] = []

    class Meteor:
        def __init__(self) -> None:
            pipe = subprocess.PIPE
            self.meteor_p = subprocess.Popen(["cat"], stdin=pipe, stdout=pipe, stderr=pipe)
            started.append(self.meteor_p)

        def compute_score(self, references: Any, said: Any) -> tuple[float, list[float]]:
            asked.append((references, said))
            if said[0] == ["fail"]:
                raise BrokenPipeError
            return 0.25, [0.25]

    monkeypatch.setitem(sys.modules, "pycocoevalcap.meteor.meteor", SimpleNamespace(Meteor=Meteor))
    monkeypatch.setattr(texts, "version", lambda name: "0")
    monkeypatch.setattr(shutil, "which", lambda name: "java")
    assert texts._meteor([["The Jaw.", "It is so"]], ["A jaw!"])[0] == [0.25]
    assert asked == [({0: ["the jaw", "it is so"]}, {0: ["a jaw"]})]
    with pytest.raises(BrokenPipeError):
        texts._meteor([["x"]], ["fail"])
    assert len(started) == 2 and all(p.returncode is not None for p in started)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = texts.text_metrics([["x"]], ["x"], meteor=True)["meteor"]
    assert found["value"] is None and "Java" in found["reason"] and len(started) == 2


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
