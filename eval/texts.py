"""How close texts are to reference texts. Every number names its implementation: BLEU of two packages is two metrics.

`references` holds one or more texts a sample (multi-reference: never flattened), `candidates` one. A metric that cannot
run here is None with the reason; nothing is downloaded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path

import numpy as np

from x2dfd.errors import SetupError, X2DFDError
from x2dfd.files import Json, file_sha256, parse_json
from x2dfd.manifest import Sample

References = Sequence[Sequence[str]]

WORDS = "lower-case words"
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def references_of(sample: Sample) -> tuple[str, ...]:
    """The texts of a manifest's column `references` (JSON list, or annotations: every answer to every question) or
    `reference`; () where there is none. Raises X2DFDError for other `references`."""
    if annotated := _given(sample):
        return tuple(text for _, texts in annotated for text in texts)
    reference = sample.extra.get("reference")
    return (reference.strip(),) if isinstance(reference, str) and reference.strip() else ()


def questions_of(sample: Sample) -> Counter[str]:
    """The number of answers to each question in a sample's annotations; empty if its references are plain texts."""
    counts: Counter[str] = Counter()
    for question, texts in _given(sample):
        if question is not None:
            counts[question] += len(texts)
    return counts


def _given(sample: Sample) -> list[tuple[str | None, list[str]]]:
    """Questions (None for plain texts) and their texts in the column `references`, without empty texts."""
    value = sample.extra.get("references")
    if value in (None, ""):
        return []
    try:
        items = parse_json(value) if isinstance(value, str) else value
        if not isinstance(items, list):
            raise TypeError("not a list")
        pairs = [(None, [i]) if isinstance(i, str) else (i["question"], i["answers"]) for i in items]
        if not all(isinstance(q, str | None) and isinstance(t, list) for q, t in pairs):
            raise TypeError("a question is not text, or its answers are not a list")
        if not all(isinstance(text, str) for _, texts in pairs for text in texts):
            raise TypeError("not all are texts")
    except (TypeError, ValueError, KeyError) as error:
        form = "no JSON list of texts or of {question, answers}"
        raise X2DFDError(f"{sample.id}: `references` is {form}: {error}", code="references_malformed") from error
    return [(question, [text.strip() for text in texts if text.strip()]) for question, texts in pairs]


def text_metrics(references: References, candidates: Sequence[str], *, encoder: Path | None = None) -> Json:
    """BLEU-1 to 4 and their mean, ROUGE-L, CIDEr and sentence similarity: name -> value and `by`, or `reason`.
    `encoder`: a folder of a sentence encoder (Transformers). All are 0..1, but CIDEr, which is times ten as usual."""
    if not candidates:
        return {}
    metrics: Json = {}
    for names, metric in (
        (tuple(f"bleu_{n}" for n in range(1, 5)), _bleu),
        (("rouge_l",), _rouge),
        (("cider",), _cider),
        (("similarity",), lambda r, s: _similarity(r, s, encoder)),
    ):
        try:
            values, by = metric(references, candidates)
            metrics |= {n: {"value": v, "by": by} for n, v in zip(names, values, strict=True)}
        except (ImportError, PackageNotFoundError) as error:
            reason = f"{error.name or error} is not installed (pip install -e '.[bench]')"
            metrics |= {n: {"value": None, "reason": reason} for n in names}
        except SetupError as error:
            metrics |= {n: {"value": None, "reason": str(error)} for n in names}
    bleu = [metrics[f"bleu_{n}"]["value"] for n in range(1, 5)]
    if None not in bleu:
        metrics["bleu_mean"] = {"value": sum(bleu) / 4, "by": "mean of bleu_1 to bleu_4"}
    return metrics


def _bleu(references: References, candidates: Sequence[str]) -> tuple[list[float], str]:
    from sacrebleu.metrics import BLEU

    streams = [list(column) for column in zip_longest(*references)]  # None where a sample has fewer
    values = []
    for order in range(1, 5):
        bleu = BLEU(max_ngram_order=order, lowercase=True, tokenize="13a", smooth_method="exp")
        values.append(bleu.corpus_score(list(candidates), streams).score / 100)
    return values, f"sacrebleu {version('sacrebleu')}, corpus, 13a, lower case, exp smoothing"


def _rouge(references: References, candidates: Sequence[str]) -> tuple[list[float], str]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [scorer.score_multi(list(r), s)["rougeL"].fmeasure for r, s in zip(references, candidates, strict=True)]
    return [float(np.mean(scores))], f"rouge-score {version('rouge-score')}, F1 with stemming, best reference"


def _cider(references: References, candidates: Sequence[str]) -> tuple[list[float], str]:
    from pycocoevalcap.cider.cider import Cider

    if len(candidates) < 2:
        raise SetupError("CIDEr needs several samples, and there is one", code="too_few_samples")
    # Words, in the form that the package expects; its own tokenizer needs Java.
    reference_words = {i: [_words(text) for text in texts] for i, texts in enumerate(references)}
    value, _ = Cider().compute_score(reference_words, {i: [_words(text)] for i, text in enumerate(candidates)})
    by = f"pycocoevalcap {version('pycocoevalcap')}, {WORDS}, document frequencies of these references"
    return [float(value)], by


def _words(text: str) -> str:
    return " ".join(_WORD.findall(text.lower()))


def _similarity(references: References, candidates: Sequence[str], encoder: Path | None) -> tuple[list[float], str]:
    """Mean over samples of the best cosine between the text and its references."""
    if encoder is None:
        raise SetupError("no sentence encoder was given (--sentence-encoder DIR)", code="sentence_encoder_missing")
    weights = encoder / "model.safetensors"
    if not weights.is_file():
        raise SetupError(f"{encoder} holds no sentence encoder (no model.safetensors)", code="sentence_encoder_missing")
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=True)
        model = AutoModel.from_pretrained(encoder, local_files_only=True, use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        raise SetupError(f"{encoder}: no sentence encoder ({error})", code="sentence_encoder_unreadable") from error

    def embed(texts: Sequence[str]) -> torch.Tensor:
        batches = []
        for at in range(0, len(texts), 64):
            batch = tokenizer(list(texts[at : at + 64]), padding=True, truncation=True, return_tensors="pt")
            with torch.no_grad():
                states = model(**batch).last_hidden_state  # [n, tokens, width]
            mask = batch["attention_mask"][..., None]
            mean = (states * mask).sum(1) / mask.sum(1)
            batches.append(torch.nn.functional.normalize(mean, dim=1))
        return torch.cat(batches)

    vectors = embed(candidates)
    reference_vectors = embed([t for r in references for t in r])
    of_each = reference_vectors.split([len(r) for r in references])
    best = [float((own @ vector).max()) for own, vector in zip(of_each, vectors, strict=True)]
    by = f"cosine of mean-pooled states of {encoder.name}, model.safetensors {file_sha256(weights)[:12]}"
    return [float(np.mean(best))], by
