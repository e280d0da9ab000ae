"""What each part of the method is worth: trainings without it, on the same pictures and with the same number of steps.

    python -m eval.trained_ablation --instructions build/instructions/instructions.jsonl \\
        --manifest build/forged/manifest.jsonl --data build/val/manifest.jsonl --config finetune/embedded.yaml \\
        --set cached_features=build/forged/.tower --set batch=1 --set accumulate=4 --set bf16=false --set workers=0 \\
        --set max_steps=150 --out build/trained_ablation

Explanations (SFS) and what experts say (WFS) are left out of an instruction set's verdicts, one at a time and together;
cues are drawn at random; scores are told in other forms; more and fewer language layers are kept. Everything else is
one configuration, and no training starts from an adapter. Each is then asked as it was trained: the MLLM alone, the
largest face of a picture. A cut-off run goes on at the training that was cut; `result.json` is made of those that are
done.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_gen.writers import write_explanation
from eval.experts_bench import Panel, largest
from eval.run_bench import code_state, device
from eval.scoring import Resampling, Row, common_auc, equalise, micro_f1, say
from finetune.config import FinetuneConfig, load_config
from x2dfd import prompts
from x2dfd.adapter import read_adapter_card
from x2dfd.detector import load, through_codec, versions
from x2dfd.errors import InputError, UnknownName, X2DFDError
from x2dfd.explain import read_cues
from x2dfd.fetch import BASE_NAME
from x2dfd.files import file_sha256, write_text
from x2dfd.manifest import Sample, manifest_sha256, read_manifest
from x2dfd.media import load_picture
from x2dfd.types import AREAS, ARTIFACTS, Cue, Evidence, Face

VERSION = "1"
WHOLE, CHANCE, FUSION = "SFS + WFS", "SFS + WFS, scores of chance", "experts alone"


@dataclass(frozen=True)
class Variant:
    """What is trained, and asked."""

    line: str
    explained: bool = True  # SFS: answers go on with an explanation
    told: bool = True  # WFS: questions hold scores and pointing
    drawn: bool = False  # explanations name cues drawn at random
    form: str | None = None  # of the scores; None: as in the instruction set
    layers: int | None = None  # language layers; None: the configuration's
    steps: bool = True  # False: nothing is trained


VARIANTS = {
    "zero-shot": Variant("the base, untrained (its projector at random), asked barely", False, False, steps=False),
    "SFS": Variant("explanations; no word of the experts", told=False),
    "WFS": Variant("what experts say; verdicts without an explanation", explained=False),
    WHOLE: Variant("both"),
    "random cues": Variant("both, but explanations name cues at random instead of those that are there", drawn=True),
    "numbers": Variant("both, scores as numbers", form="numbers"),
    "words": Variant("both, scores as words", form="words"),
    "16 layers": Variant("both, the first 16 language layers", layers=16),
    "30 layers": Variant("both, all 30 language layers", layers=30),
}
ASKED = {
    CHANCE: f"as {WHOLE}, asked with scores drawn at random and nothing pointed at",
    FUSION: "the shipped experts' fusion, without any MLLM",
}


def variant_records(records: Sequence[Row], variant: Variant, form: str, seed: int = 0) -> list[Row]:
    """The verdicts among an instruction set's records, one a picture, without what the variant leaves out.

    `form`: how the set gives scores, where the variant says nothing.
    """
    out = []
    for record in records:
        if record["task"] != "detect":
            continue
        evidence = [
            Evidence(name, score, cues=tuple(Cue(c["area"], c["artifact"]) for c in record["pointed"].get(name, ())))
            for name, score in record["scores"].items()
        ]
        label = record["label"]
        question = prompts.verdict_question(evidence, variant.form or form) if variant.told else prompts.QUESTION
        said = str(record["conversations"][1]["value"]).removeprefix(prompts.rationale_start(label))
        explanation = prompts.closed(said, label, ())
        if variant.drawn and record["cues"]:
            rng = np.random.default_rng([seed, record["row"]])
            count = min(len(record["cues"]), 3)
            cues = [Cue(str(rng.choice(AREAS)), str(rng.choice(ARTIFACTS)), float(rng.random())) for _ in range(count)]
            explanation = write_explanation(label, cues, record["df_class"], rng)
        answer = prompts.verdict_answer(label, explanation if variant.explained else "")
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        out.append(record | {"conversations": turns})
    return out


def write_set(instructions: Path, variant: Variant, out: Path) -> Path:
    """The variant's instruction set in `out`, with its card; returns its path. Raises X2DFDError without verdicts."""
    card = json.loads((instructions.parent / "card.json").read_text("utf-8"))
    records = [json.loads(line) for line in instructions.read_text("utf-8").splitlines()]
    form = card["config"]["score_form"]
    kept = variant_records(records, variant, form)
    if not kept:
        raise X2DFDError(f"{instructions} holds no verdicts to leave something out of")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "instructions.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))
    card["config"] |= {"score_form": variant.form or form, "experts": card["config"]["experts"] if variant.told else []}
    write_text(out / "card.json", json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    return out / "instructions.jsonl"


# ---------------------------------------------------------------- asking


@dataclass(frozen=True)
class Asked:
    """A picture whose largest face is asked about."""

    sample: Sample
    face: Face
    evidence: tuple[Evidence, ...]  # of the experts in the instruction set's order


def look_at(samples: Sequence[Sample], panel: Panel) -> tuple[list[Asked], dict[str, int]]:
    """The pictures that show a face, with what the experts say of it; how many were not usable, by reason."""
    found: list[tuple[Sample, Face]] = []
    lost: Counter[str] = Counter()
    for sample in samples:
        try:
            face = largest(load_picture(equalise(load_picture(sample.path).pixels)).pixels)
        except InputError as error:
            lost[error.code] += 1
            continue
        if face is None:
            lost["no_face"] += 1
        else:
            found.append((sample, face))
    faces = through_codec([face for _, face in found])
    said: list[list[Evidence]] = [[] for _ in faces]
    for expert in panel.experts:
        for at in range(0, len(faces), 8):
            for k, one in enumerate(expert.judge(faces[at : at + 8]), start=at):
                said[k].append(one)
    return [Asked(s, f, tuple(e)) for (s, _), f, e in zip(found, faces, said, strict=True)], dict(sorted(lost.items()))


def answers(mllm: Any, asked: Sequence[Asked], variant: Variant, form: str, chance: bool = False) -> list[Row]:
    """A row a picture: the logit of fake, and the cues of a text under "fake" where a forgery's cues are known."""
    rows: list[Row] = []
    rng = np.random.default_rng(0)
    for at in range(0, len(asked), mllm.batch):
        part = asked[at : at + mllm.batch]
        look = mllm.look(np.stack([a.face.crop for a in part]))
        told = [
            [replace(e, score=float(rng.random()), cues=()) for e in a.evidence] if chance else a.evidence for a in part
        ]
        questions = [prompts.verdict_question(e, form) if variant.told else prompts.QUESTION for e in told]
        logits = mllm.verdict_logits(look, questions)
        texts = [""] * len(part)
        if variant.explained:
            texts = mllm.write(look, questions, [prompts.rationale_start("fake")] * len(part))
        for a, logit, text in zip(part, logits, texts, strict=True):
            named = sorted({(c.area, c.artifact) for c in read_cues(text)}) if variant.explained else None
            rows.append({"id": a.sample.id, "logit": float(logit), "named": named, "text": text})
        say(f"{len(rows)}/{len(asked)} pictures asked about")
    return rows


def run_variant(
    name: str, config: FinetuneConfig, asked: Sequence[Asked], out: Path, key: Mapping[str, Any]
) -> dict[str, list[Row]]:
    """Train the variant where it is not yet trained, ask it where it was not yet asked; its rows by name."""
    from finetune.train import train

    variant, folder = VARIANTS[name], out / name.replace(" ", "_")
    form = (
        variant.form or json.loads((Path(config.instructions).parent / "card.json").read_text())["config"]["score_form"]
    )
    adapter = folder / "adapter"
    instructions = write_set(Path(config.instructions), variant, folder)
    settings = replace(
        config,
        instructions=str(instructions),
        out=str(adapter),
        start=None,
        name=f"ablation: {name}",
        text_layers=variant.layers or config.text_layers,
    )
    if variant.steps and not (adapter / "card.json").is_file():
        say(f"training: {name}")
        train(settings)
    key = dict(key) | {"adapter": read_adapter_card(adapter).sha256 if variant.steps else None}
    done = folder / "answers.json"
    kept = json.loads(done.read_text("utf-8")) if done.is_file() else {}
    if kept.get("key") == key:
        rows: dict[str, list[Row]] = kept["rows"]
        return rows
    mllm = load(
        base=config.base or BASE_NAME, adapter=adapter if variant.steps else None, mode="paper", experts=()
    ).mllm
    rows = {name: answers(mllm, asked, variant, form)}
    if name == WHOLE:
        rows[CHANCE] = answers(mllm, asked, replace(variant, explained=False), form, chance=True)
    write_text(done, json.dumps({"key": key, "rows": rows}, ensure_ascii=False) + "\n")
    return rows


# ---------------------------------------------------------------- the result


def measured(
    asked: Sequence[Asked], rows: Mapping[str, Sequence[Row]], fusion: Sequence[float | None], draw: Resampling
) -> Row:
    """AUC of every variant on the same pictures, and what their texts name of what is there."""
    samples = [a.sample for a in asked]
    columns: dict[str, list[float | None]] = {n: [r["logit"] for r in of] for n, of in rows.items()}
    if None not in fusion:  # else the experts' weights are not those that were calibrated: there is no fusion
        columns[FUSION] = list(fusion)
    auc = common_auc(samples, columns, draw)
    known = [i for i, s in enumerate(samples) if s.label == "fake" and s.cues]
    groups = [samples[i].group for i in known]
    texts: Row = {}
    for name, of in rows.items():
        if not known or any(of[i]["named"] is None for i in known):
            continue
        truth = [{(c.area, c.artifact) for c in samples[i].cues} for i in known]
        named = [{(a, k) for a, k in of[i]["named"]} for i in known]
        areas = [[{a for a, _ in pairs} for pairs in both] for both in (truth, named)]
        texts[name] = {
            "areas": micro_f1(areas[0], areas[1], groups, draw),
            "cues": micro_f1(truth, named, groups, draw),
            "distinct_texts": len({of[i]["text"] for i in known}) / len(known),
        }
    lines = {name: v.line for name, v in VARIANTS.items()} | ASKED
    return {"n": len(asked), "n_texts": len(known), "auc": auc["auc"], "texts": texts, "variants": lines}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 on what the user has to mend."""
    parser = argparse.ArgumentParser(description="Trainings with parts of the method left out.", allow_abbrev=False)
    parser.add_argument("--instructions", type=Path, required=True, metavar="JSONL", help="of data_gen build")
    parser.add_argument("--manifest", type=Path, required=True, help="that they were built from")
    parser.add_argument("--data", type=Path, required=True, metavar="MANIFEST", help="what is judged")
    parser.add_argument("--config", type=Path, required=True, metavar="YAML", help="of the trainings")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="on top of the configuration")
    parser.add_argument("--only", metavar="A,B", help=f"some of {', '.join(VARIANTS)}")
    parser.add_argument("--limit", type=int, default=200, help="pictures that are judged, drawn with the seed")
    parser.add_argument("--bootstrap", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    try:
        result = run(args)
    except X2DFDError as error:
        say(f"error: {error}")
        return 2
    write_text(args.out / "result.json", json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    from eval.tables import trained

    print(trained({"result": result}))
    return 0


def run(args: argparse.Namespace) -> Row:
    """Trains and asks what is wanted; the result holds it and all that was done before. Raises X2DFDError."""
    wanted = args.only.split(",") if args.only else list(VARIANTS)
    for name in wanted:
        if name not in VARIANTS:
            raise UnknownName("variant", name, VARIANTS)
    given = {"instructions": args.instructions, "manifest": args.manifest, "out": args.out}
    config = load_config(args.config, [*args.set, *(f"{k}={v}" for k, v in given.items())])
    every = read_manifest(args.data)
    chosen = np.random.default_rng(args.seed).permutation(len(every))[: args.limit]
    samples = [every[int(k)] for k in sorted(chosen)]
    card = json.loads((args.instructions.parent / "card.json").read_text("utf-8"))
    panel = Panel.load("embedded", card["config"]["experts"])
    asked, lost = look_at(samples, panel)
    facts = panel.facts()
    key = {
        "manifest": manifest_sha256(args.data),
        "instructions": file_sha256(args.instructions),
        "ids": [a.sample.id for a in asked],
        "experts": facts["experts"],
        "steps": config.max_steps,
    }
    rows: dict[str, list[Row]] = {}
    for name in VARIANTS:
        done = args.out / name.replace(" ", "_") / "answers.json"
        if name in wanted or (done.is_file() and _same(json.loads(done.read_text("utf-8"))["key"], key)):
            rows |= run_variant(name, config, asked, args.out, key)
    joined = [panel.joined({e.expert: e.score for e in a.evidence}) for a in asked]
    fusion = [answer.p_fake if answer else None for answer in joined]
    draw = Resampling(args.bootstrap, args.seed)
    labels = Counter(a.sample.label for a in asked)
    return {
        "task": {"name": "trained", "version": VERSION, "unit": "image"},
        "data": {
            "manifest": args.data.name, "sha256": key["manifest"], "limit": args.limit, "n": len(asked),
            "n_real": labels["real"], "n_fake": labels["fake"], "n_groups": len({a.sample.group for a in asked}),
        },
        "settings": {"seed": args.seed, "bootstrap": args.bootstrap, "steps": config.max_steps,
                     "pictures_a_step": config.batch * config.accumulate, "lr": config.lr,
                     "instructions": key["instructions"]},
        "model": {"experts": facts["experts"], "fusion": panel.fusion},
        "code": code_state(), "device": device(), "versions": versions() | {"python": platform.python_version()},
        "failures": lost,
        "trained": measured(asked, rows, fusion, draw),
    }  # fmt: skip


def _same(key: Row, wanted: Mapping[str, Any]) -> bool:
    return {k: v for k, v in key.items() if k != "adapter"} == dict(wanted)


if __name__ == "__main__":
    sys.exit(main())
