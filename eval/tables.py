"""Writes the tables of README.md and eval/RESULTS.md from the result files, so that no number there is typed by hand.

python eval/tables.py           # rewrite the tables
python eval/tables.py --check   # exit 1 when a table differs from the results
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from x2dfd.files import write_text

ROOT = Path(__file__).resolve().parent.parent
Result = dict[str, Any]

_BLOCK = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def detect(results: dict[str, Result], *, all_methods: bool = False) -> str:
    """Scorers in columns; AUC over all, then per method and per source; false alarms last. One block a result file.

    Of the files the one named `detect` alone, of the columns method and source, and of the methods only those that were
    held out and those without reals of their own, unless `all_methods`.
    """
    blocks = []
    for name, result in _of("detect", results):
        if name != "detect" and not all_methods:
            continue
        scorers: dict[str, Result] = result["scorers"]
        parts = sorted({(c, v) for s in scorers.values() for c, table in s["by"].items() for v in table})
        # A set of one generator's fakes bears its name as source and as method: one row says it.
        parts = [part for part in parts if part[0] != "source" or ("method", part[1]) not in parts]
        held_out = result["model"]["stated"].get("held_out", [])
        if not all_methods:
            made = next(iter(scorers.values()))["by"].get("method", {})
            parts = [(c, v) for c, v in parts if c in ("method", "source")]
            parts = [(c, v) for c, v in parts if c != "method" or v in held_out or made[v]["against"] != "own reals"]
        lines = [["AUC", *scorers, "fake / real"], ["---"] * (len(scorers) + 2)]
        first = next(iter(scorers.values()))
        counts = "{n_fake} / {n_real}".format_map(first["overall"])
        lines.append(["**all**", *[_number(s["overall"]["auc"]) for s in scorers.values()], counts])
        pooled = False
        for column, value in parts:
            slices = [s["by"].get(column, {}).get(value) for s in scorers.values()]
            known = next(x for x in slices if x)
            if known["auc"]["value"] is None:
                continue
            apart = known["against"] != "own reals"
            pooled = pooled or apart
            cells = [_number(x["auc"]) if x else "–" for x in slices]
            marks = ("*" if apart else "") + ("†" if value in held_out else "")
            lines.append([f"{column} {value}{marks}", *cells, "{n_fake} / {n_real}".format_map(known)])
        alarms = [
            _number(s["answers"]["false_alarms"], percent=True) if "answers" in s else "–" for s in scorers.values()
        ]
        lines.append(["false alarms", *alarms, str(result["data"]["n_real"])])
        data, failed = result["data"], sum(result["failures"].values())
        caption = (
            f"`{name}`: model `{result['model']['name']}`, manifest `{data['sha256'][:12]}`, "
            f"split {data['split'] or 'all'}, {data['n_real']} real and {data['n_fake']} fake, "
            f"{data['n_groups']} groups, {failed} not readable{_changed(result)}. "
            f"False alarms: reals called fake at the shipped threshold{_answered(first)}."
            + (" † left out of the MLLM's training and the calibration (experts: see their cards)." if held_out else "")
        )
        if pooled:
            caption += " * against all reals (or all fakes), as there are too few of the same source."
        blocks.append(caption + "\n\n" + _table(lines))
    return "\n\n".join(blocks) or "No results yet."


def describe(results: dict[str, Result], *, all_methods: bool = False) -> str:
    """Cues and areas named in rationales against the truth, beside the majority baseline; by method if asked.

    Of pictures with reference texts and without known cues, how near the texts come.
    """
    blocks = []
    for name, result in _of("describe", results):
        if not any("cues" in s for s in result["scorers"].values()):
            blocks.append(_near_references(name, result))
            continue
        lines = [["", "area F1 [95 %]", "cue F1 [95 %]", "distinct texts", "contradictions", "n fake"], ["---"] * 6]
        held_out = result["model"]["stated"].get("held_out", [])
        for scorer, s in result["scorers"].items():
            if scorer == "template" and not all_methods:
                continue
            distinct, against = s.get("distinct_texts"), s.get("contradictions")
            share = "–" if distinct is None else f"{100 * distinct:.0f} %"
            wrong = "–" if against is None else f"{100 * against:.1f} %"
            f1 = [_number(s[what]["micro_f1"]) for what in ("areas", "cues")]
            lines.append([scorer, *f1, share, wrong, str(s["n_fake"])])
            for method, part in s.get("by_method", {}).items() if all_methods else ():
                cells = [_number(part[what]) for what in ("areas", "cues")]
                mark = "†" if method in held_out else ""
                lines.append([f"{scorer}, {method}{mark}", *cells, "–", "–", str(part["n"])])
        data = result["data"]
        caption = (
            f"`{name}`: manifest `{data['sha256'][:12]}`, split {data['split'] or 'all'}; forgeries with known cues."
            + (" † left out of the MLLM's training." if held_out and all_methods else "")
        )
        blocks.append(caption + "\n\n" + _table(lines))
    return "\n\n".join(blocks) or "No results yet."


_TEXT = {"rouge_l": "ROUGE-L", "bleu_mean": "BLEU, mean"}


def _near_references(name: str, result: Result) -> str:
    lines = [["", *_TEXT.values(), "distinct texts", "contradictions", "n"], ["---"] * (len(_TEXT) + 4)]
    for scorer, s in result["scorers"].items():
        cells = [_plain(s["text"].get(key, {}).get("value")) for key in _TEXT]
        cells += [_percent(s.get("distinct_texts")), _percent(s.get("contradictions"))]
        lines.append([scorer, *cells, str(s["text"]["n"])])
    data, asked = result["data"], result["references"]["annotations"]
    caption = (
        f"`{name}`: manifest `{data['sha256'][:12]}`, split {data['split'] or 'all'}; no cues are known. Each text "
        "against all references of its picture"
        + (f", answers to {asked['questions']} different questions." if asked["questions"] else ".")
    )
    return caption + "\n\n" + _table(lines)


def models(results: dict[str, Result]) -> str:
    """Models in rows over the same pictures: how well they tell fakes, then what their texts name (side_by_side.py)."""
    blocks = []
    for name, result in _of("models", results):
        for task, table in (("detect", _detected), ("describe", _described)):
            if not result[task]:
                continue
            data, left_out = result["data"][task], [o["model"] for o in result["left_out"] if o["task"] == task]
            caption = (
                f"`{name}`, {task}: manifest `{data['sha256'][:12]}`, split {data['split'] or 'all'}, {data['n_real']} "
                f"real and {data['n_fake']} fake, {data['n_groups']} groups{_changed(result)}."
                + (f" Not here: {', '.join(left_out)}." if left_out else "")
            )
            blocks.append(caption + "\n\n" + _table(table(result[task])))
    return "\n\n".join(blocks) or "No results yet."


def _detected(rows: Sequence[Result]) -> list[list[str]]:
    head = ["", "AUC [95 %]", f"less that of {rows[0]['model']}", "AP", "TPR at 5 % FPR", "ECE", "false alarms"]
    lines = [[*head, "answered", "n"], ["---"] * 9]
    for row in rows:
        pair, alarms = row["against_first"], row["false_alarms"]
        cells = [_number(row["auc"]), _number(pair["difference"]) if pair else "–", _number(row["average_precision"])]
        cells += [_number(row[key]) for key in ("tpr_at_fpr_0.05", "ece_15")]
        cells += [_number(alarms, percent=True) if alarms else "–", _percent(row["answered"])]
        lines.append([row["model"], *cells, f"{row['n_scored']} of {row['n']}"])
    return lines


def _described(rows: Sequence[Result]) -> list[list[str]]:
    head = ["", "area F1 [95 %]", "cue F1 [95 %]", "distinct texts", "contradictions", *_TEXT.values(), "n fake"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        text = row["text"] or {}
        cells = [_number(f1) if (f1 := row[key]) else "–" for key in ("areas_f1", "cues_f1")]
        cells += [_percent(row["distinct_texts"]), _percent(row["contradictions"])]
        cells += [_plain(text.get(key, {}).get("value")) for key in _TEXT]
        lines.append([row["model"], *cells, str(row["n_fake"])])
    return lines


def experts(results: dict[str, Result]) -> str:
    """Experts, fusion and baselines in columns: all metrics over all, AUC of every slice; then the fusion in full."""
    blocks = []
    for name, result in _of("experts", results):
        scorers, held_out = result["scorers"], result["held_out"]
        overall = [["all", *scorers], ["---"] * (len(scorers) + 1)]
        overall += [
            [title, *(_number(s["overall"][key]) if key in s["overall"] else "–" for s in scorers.values())]
            for key, title in _MEASURES.items()
        ]
        first = next(iter(scorers.values()))
        parts = [(column, value) for column, table in first["by"].items() for value in table]
        parts = [part for part in parts if part[0] != "source" or ("method", part[1]) not in parts]
        slices = [["AUC", *scorers, "fake / real"], ["---"] * (len(scorers) + 2)]
        for column, value in parts:
            known = first["by"][column][value]
            found = {c: s["by"].get(column, {}).get(value) for c, s in scorers.items()}
            cells = [
                f"{_number(x['auc'])}{'†' if value in held_out.get(c, ()) else ''}" if x else "–"
                for c, x in found.items()
            ]
            mark = "" if known["against"] == "own reals" else "*"
            slices.append([f"{column} {value}{mark}", *cells, "{n_fake} / {n_real}".format_map(known)])
        data, failed = result["data"], sum(result["failures"].values())
        missing = ", ".join(result["model"]["stated"]["experts_left_out"])
        caption = (
            f"`{name}`: `fusion` is the verdict of `{result['model']['name']}`{_lacks(scorers)}, manifest "
            f"`{data['sha256'][:12]}`, "
            f"split {data['split'] or 'all'}, {data['n_real']} real and {data['n_fake']} fake, {data['n_groups']} "
            f"groups, {failed} not readable; the largest face of each. {SHARPNESS_LINE} "
            "ECE: reals and fakes weigh a half each. † left out of training, as its card says (fusion: out of the "
            "calibration and of every expert that weighs). "
            "* against all reals (or all fakes), as there are too few of the same source."
            + (f" Not here: {missing}." if missing else "")
        )
        blocks += [caption, _table(overall), _table(slices)]
        if "fusion" in scorers:
            blocks += _fusion(scorers["fusion"], parts)
    return "\n\n".join(blocks) or "No results yet."


def _lacks(scorers: Result) -> str:
    return "" if "mllm" in scorers else " without its MLLM"


_MEASURES = {
    "auc": "AUC",
    "average_precision": "AP",
    "tpr_at_fpr_0.05": "TPR at 5 % FPR",
    "tpr_at_fpr_0.01": "TPR at 1 % FPR",
    "ece_15_even": "ECE",
}
SHARPNESS_LINE = "`baseline:sharpness` is the variance of the crop's Laplacian alone: the smoother, the likelier fake."


def _fusion(fusion: Result, parts: Sequence[tuple[str, str]]) -> list[str]:
    """The fusion's measures in every slice, and whose photos it calls fake at the shipped threshold."""
    rest = {key: title for key, title in _MEASURES.items() if key != "auc"}
    full = [["fusion", *rest.values(), "called fake", "fake / real"], ["---"] * (len(rest) + 3)]
    for column, value in parts:
        part = fusion["by"].get(column, {}).get(value)
        if part:
            found = _number(part["found"], percent=True) if "found" in part else "–"
            cells = [_number(part[key]) for key in rest]
            full.append([f"{column} {value}", *cells, found, "{n_fake} / {n_real}".format_map(part)])
    answers = fusion["answers"]
    alarms = [["false alarms of the fusion", "share of the reals [95 %]", "n"], ["---"] * 3]
    alarms.append(["**all**", _number(answers["false_alarms"], percent=True), str(answers["false_alarms"]["n"])])
    alarms += [
        [f"{column} {value}", _number(rate, percent=True), str(rate["n"])]
        for column, table in answers["false_alarms_by"].items()
        for value, rate in table.items()
    ]
    return [_table(full), _table(alarms)]


def robustness(results: dict[str, Result]) -> str:
    """AUC of every column under every change; the fusion's false alarms and misses; how far JPEG 95 moves P(fake)."""
    blocks = []
    for name, result in _of("experts", results):
        if not result["robustness"]:
            continue
        columns = list(result["scorers"])
        fused = "fusion" in columns
        lines = [["AUC", *columns, *(("false alarms", "misses") if fused else ()), "faces lost, fake / real"]]
        lines.append(["---"] * len(lines[0]))
        answers = result["scorers"]["fusion"]["answers"] if fused else {}
        rates = [_number(answers[key], percent=True) for key in ("false_alarms", "misses") if fused]
        lines.append(["unchanged", *(_number(s["overall"]["auc"]) for s in result["scorers"].values()), *rates, "–"])
        for change, part in result["robustness"].items():
            rates = [_number(part[key], percent=True) for key in ("false_alarms", "misses") if fused]
            lost = "{fake} / {real}".format_map(part["lost_face"])
            lines.append([change, *(_number(part["auc"][c]) for c in columns), *rates, lost])
        what = "; ".join(f"{change}: {part['what']}" for change, part in result["robustness"].items())
        blocks += [
            f"`{name}`, every picture scored again, on the pictures that keep their face. {what}.",
            _table(lines),
        ]
        if swap := result["format_swap"]:
            moved = [["PNG to JPEG 95", "median of the change of P(fake)", "90 % stay below", "n"], ["---"] * 4]
            moved += [[c, *(_plain(part[q]) for q in ("median", "p90")), str(part["n"])] for c, part in swap.items()]
            blocks.append(_table(moved))
    return "\n\n".join(blocks) or "No results yet."


def localisation(results: dict[str, Result]) -> str:
    """Where maps point against the forge's masks, beside two that know nothing of the picture; by method."""
    blocks = []
    for name, result in _of("experts", results):
        placed = result["localisation"]
        maps = placed["maps"]
        if not maps:
            continue
        lines = [["", *(f"{m} {what}" for m in maps for what in ("pixel AUC", "IoU")), "n"]]
        lines.append(["---"] * len(lines[0]))
        lines.append(
            ["**all**", *(_number(part[k]) for part in maps.values() for k in ("auc", "iou")), str(placed["n"])]
        )
        for method, known in next(iter(maps.values()))["by_method"].items():
            parts = [part["by_method"].get(method) for part in maps.values()]
            cells = [_number(part[k], interval=False) if part else "–" for part in parts for k in ("auc", "iou")]
            lines.append([method, *cells, str(known["n"])])
        base = "; ".join(f"`{key}`: {text}" for key, text in placed["baselines"].items())
        left_out = ", ".join(f"{reason} {n}" for reason, n in placed["left_out"].items()) or "none"
        blocks += [
            f"`{name}`: {placed['n']} of {placed['n_masks']} masked forgeries (left out: {left_out}), mean over "
            f"pictures. IoU at {placed['iou_at']}. {base}.",
            _table(lines),
        ]
    return "\n\n".join(blocks) or "No results yet."


def missing(results: dict[str, Result]) -> str:
    """The fusion with every choice of experts, as shipped and refitted; and what withholding by disagreement does."""
    blocks = []
    for name, result in _of("experts", results):
        found, apart = result["missing"], result["disagreement"]
        if not found:
            continue
        keys = ("false alarms", "found", "inconclusive")
        lines = [["here", "AUC, at their means", *keys, "AUC, refitted", *keys], ["---"] * 9]
        lines += [
            [here, *(cell for part in (p["imputed"], p["refitted"]) for cell in _pattern(part))]
            for here, p in found["patterns"].items()
        ]
        blocks += [
            f"`{name}`, {found['n']} pictures that all could score{_lacks(result['scorers'])}. What is missing stands "
            "at its mean, as shipped (an MLLM that is here has read all experts); beside it weights and band refitted "
            "to what is left, "
            f"on the other groups of {found['folds']} parts and as if no origin were new.",
            _table(lines),
        ]
        lines = [["no verdict where experts are apart by", "answered", "right of those", "false alarms", "misses"]]
        lines.append(["---"] * len(lines[0]))
        for at, said in apart["from_spread"].items():
            cells = [_percent(said[k]) for k in ("coverage", "accuracy", "false_alarms", "misses")]
            lines.append([at, *cells])
        blocks += [f"Disagreement: in force is {apart['in_force'] or 'never'}.", _table(lines)]
    return "\n\n".join(blocks) or "No results yet."


def _pattern(part: Result | None) -> list[str]:
    if part is None:
        return ["–"] * 4
    rates = [_number(part[key], percent=True, interval=False) for key in ("false_alarms", "found")]
    return [_number(part["auc"]), *rates, _percent(part["inconclusive"])]


def left_out(results: dict[str, Result]) -> str:
    """Methods that `consistency` and the fusion were not shown, beside the same when they were; false alarms."""
    blocks = []
    for name, result in _of("left-out", results):
        found, data, calib = result["left_out"], result["data"], result["calib"]
        kinds = ("seen", "seen, as long", "unseen")
        order = [f"{whose} {kind}" for whose in ("expert", "fusion") for kind in kinds]
        columns = [c for c in order if any(c in training["together"]["auc"] for training in found["trainings"])]
        lines = [
            ["method", *(c.replace("expert", "`consistency`") for c in columns), "fake / real"],
            ["---"] * (len(columns) + 2),
        ]
        for training in found["trainings"]:
            marked = {m: f"{m}{'‡' if m in training['shipped_did_not_see'] else ''}" for m in training["methods"]}
            parts = [(marked[method], part) for method, part in training["methods"].items()]
            for what, part in (*parts, (f"**{training['name']}**", training["together"])):
                cells = [_number(part["auc"][c]) if c in part["auc"] else "–" for c in columns]
                lines.append([what, *cells, "{n_fake} / {n_real}".format_map(part)])
        sources = list(next(iter(found["fusions"].values()))["false_alarms_by_source"])
        alarms = [["false alarms of the fusion", "all", *sources], ["---"] * (len(sources) + 2)]
        for fusion, part in found["fusions"].items():
            rates = [part["false_alarms"], *(part["false_alarms_by_source"][source] for source in sources)]
            alarms.append([fusion, *(f"{_number(rate, percent=True)} of {rate['n']}" for rate in rates)])
        caption = (
            f"`{name}`: `consistency` trained without some methods, and the fusion (no MLLM) fitted on split "
            f"{calib['split']} of `{calib['sha256'][:12]}` without them: unseen. Seen: the shipped one, and its fusion "
            "fitted there with them; as long: another of these trainings, that knew them. "
            f"Manifest `{data['sha256'][:12]}`, split {data['split'] or 'all'}, "
            f"{data['n_groups']} groups; the largest face of each. {found['rule']} A left-out method was not learnt, "
            "but had a say in which checkpoint was kept. The other experts are the shipped ones in every fusion, "
            "which is fitted on what they say of origins that they know. "
            + " ".join(f"`{expert}`: {text}." for expert, text in found["others"].items())
        )
        if any(training["shipped_did_not_see"] for training in found["trainings"]):
            caption += " ‡ the shipped `consistency` was not trained on it either."
        blocks += [caption, _table(lines), "At each fusion's own threshold:", _table(alarms)]
    return "\n\n".join(blocks) or "No results yet."


def assess(results: dict[str, Result], best: int = 12) -> str:
    """What an MLLM can see (MFA): the ranking against chance, and its best cues; one column a result file."""
    found = _of("assess", results)
    if not found:
        return "No results yet."
    lines = [["", *(f"`{r['model']['name']}`" for _, r in found)], ["---"] * (len(found) + 1)]

    def row(title: str, of: Callable[[Result], str]) -> None:
        lines.append([title, *(of(r["assessment"]) for _, r in found)])

    row("real / fake pictures", lambda a: f"{a['n_real']} / {a['n_fake']}")
    row("questions on cues", lambda a: f"{a['n_questions']} on {a['n_cues']}")
    row("strong cues", lambda a: str(len(a["strong"])))
    row("AUC of the best cues, mean", lambda a: f"{a['control']['cues']['top_mean_auc']:.3f}")
    row(
        "the same with shuffled truth, mean (95th percentile)",
        lambda a: "{shuffled_mean:.3f} ({shuffled_p95:.3f})".format_map(a["control"]["cues"]),
    )
    for title, key in (("cue", "cue_questions"), ("unrelated", "unrelated_questions")):
        row(
            f"all {title} questions, fake against real",
            lambda a, key=key: _plain(a["random"][key]["mean_auc"] if a["random"] else None),  # type: ignore[misc]
        )
    ranked = [
        sorted(((v["value"] or 0.0, k, v) for k, v in r["headline"].items()), key=lambda x: -x[0])[:best]
        for _, r in found
    ]
    for place in range(min(best, max(map(len, ranked)))):
        cells = [
            f"{part[place][1].removeprefix('cue ').removesuffix('.auc')} {_number(part[place][2])}"
            if place < len(part)
            else "–"
            for part in ranked
        ]
        lines.append([f"{place + 1}", *cells])
    manifests = ", ".join(sorted({f"`{r['data']['sha256'][:12]}`" for _, r in found}))
    caption = f"AUC of P(yes), manifest {manifests}. A cue is {found[0][1]['assessment']['rule']}."
    return caption + "\n\n" + _table(lines)


def ablation(results: dict[str, Result]) -> str:
    """What the MLLM makes of each part of its question: AUC without it, answers and texts when it is exchanged."""
    blocks = []
    for name, result in _of("ablation", results):
        part, data = result["ablation"], result["data"]
        lines = [["MLLM asked with", "AUC [95 %]", "what it is"], ["---"] * 3]
        for variant, measured in part["auc"]["auc"].items():
            lines.append([variant, _number(measured), part["variants"][variant]])
        against = [["all experts say fake, then all say real", "share of pictures [95 %]"], ["---"] * 2]
        for what, measured in part["scores against the picture"].items():
            against.append([what, _number(measured, percent=True)])
        truths = ("of what was pointed at", "of what is there")
        texts = [["texts name", *truths], ["---"] * 3]
        for what in ("areas", "cues"):
            for told in ("own", "exchanged"):
                cells = [
                    _number(part["texts"][told][what][of]) for of in ("of what was pointed at", "of what is there")
                ]
                texts.append([f"{what}, {told} pointing", *cells])
        caption = (
            f"`{name}`: the MLLM alone, manifest `{data['sha256'][:12]}`, {data['n_real']} real and {data['n_fake']} "
            f"fake; answers at P(fake) {part['mllm_threshold']:.2f}; texts (F1) of {part['texts']['n']} forgeries at "
            "which an expert points, explained once as it is and once with another cue in its place."
        )
        blocks.append("\n\n".join([caption, _table(lines), _table(against), _table(texts)]))
    return "\n\n".join(blocks) or "No results yet."


def trained(results: dict[str, Result]) -> str:
    """Trainings with parts of the method left out: the MLLM alone, and what its texts name (trained_ablation.py)."""
    blocks = []
    for name, result in _of("trained", results):
        part, data, made = result["trained"], result["data"], result["settings"]
        lines = [["trained with", "AUC [95 %]", "area F1 [95 %]", "cue F1 [95 %]", "what it is"], ["---"] * 5]
        for variant, auc in part["auc"].items():
            texts = part["texts"].get(variant)
            named = [_number(texts[what]) if texts else "–" for what in ("areas", "cues")]
            lines.append([variant, _number(auc), *named, part["variants"][variant]])
        caption = (
            f"`{name}`: {made['steps']} steps of {made['pictures_a_step']} pictures each, from no adapter; the MLLM "
            f"alone on manifest `{data['sha256'][:12]}`, {data['n_real']} real and {data['n_fake']} fake; texts of "
            f"{part['n_texts']} forgeries with known cues, all explained as fakes."
        )
        blocks.append(caption + "\n\n" + _table(lines))
    return "\n\n".join(blocks) or "No results yet."


def speed(results: dict[str, Result], *, all_cases: bool = False) -> str:
    """Seconds of a warm call on one face or, with `all_cases`, of everything that was set side by side."""
    blocks = []
    for name, result in _of("speed", results):
        measured = any(device["device"].startswith("cuda") for device in result["devices"])
        for device in result["devices"]:
            head = ["", "s [10–90 %]", "times the first"] + ["of the bound", "largest change"] * all_cases
            lines = [head, ["---"] * len(head)]
            for comparison in device["comparisons"]:
                if not all_cases and not comparison["name"].startswith("warm"):
                    continue
                for way, found in comparison["ways"].items():
                    times = found.get("times_first")
                    cells = [_spread(found["seconds"], ".2f" if found["seconds"]["median"] >= 0.1 else ".4f")]
                    cells.append(_spread(times, ".1f") if times else "–")
                    if all_cases:
                        share, change = found["share_of_bound"], found.get("largest_difference")
                        cells += ["–" if share is None else f"{100 * share:.0f} %"]
                        cells += ["–" if change is None else f"{change:.1e}"]
                    lines.append([f"{comparison['name']}: {way}", *cells])
            caption = (
                f"`{name}`: {device['model']} on {device['device']}, {result['threads']} threads of {device['name']}; "
                f"just measured at {device['matmul_gflop_per_s']:,.0f} GFLOP/s and {device['read_gb_per_s']:.0f} GB/s."
            )
            if not measured:
                caption += " On CUDA as a whole: not measured (LLaVA-1.5-7B on a GPU: eval/RESULTS.md)."
            blocks.append(caption + "\n\n" + _table(lines))
    return "\n\n".join(blocks) or "No results yet."


def gpu(results: dict[str, Result]) -> str:
    """Training and judging with LLaVA-1.5-7B's geometry on a GPU, by `finetune.gpu`."""
    blocks = []
    for name, result in _of("gpu", results):
        lines = [
            ["", "tokens a row", "activations", "steps/s", "tokens/s", "of the matrix rate", "peak GB", "predicted"]
        ]
        lines.append(["---"] * len(lines[0]))
        for row in result["training"]:
            cells = [row["method"], str(row["tokens"]), "computed twice" if row["checkpointing"] else "kept"]
            if row.get("out_of_memory"):
                cells += ["out of memory", "–", "–", "–"]
            else:
                cells += [f"{row['steps_per_s']:.2f}", f"{row['tokens_per_s']:,.0f}"]
                cells += [_percent(row["share_of_matmul_rate"]), f"{row['peak_gb']:.1f}" if row["peak_gb"] else "–"]
            lines.append([*cells, f"{row['predicted_gb']:.1f}"])
        caption = (
            f"`{name}`: {result['geometry']}, {result['dtype']}, on {result['device']}, whose matrix product ran at "
            f"{result['matmul_tflops']:.0f} TFLOP/s just before; {result['training'][0]['batch']} rows a step. "
            f"Verdicts in batches: {result['verdicts_per_s']:.1f} a second; "
            f"cue questions: {result['cue_questions_per_s']:.0f} a second."
        )
        blocks.append(caption + "\n\n" + _table(lines))
    return "\n\n".join(blocks) or "No results yet."


def _spread(part: dict[str, float], form: str) -> str:
    return f"{part['median']:{form}} [{part['p10']:{form}}–{part['p90']:{form}}]"


def unseen(_: dict[str, Result]) -> str:
    """What the card of the expert `clip` says of generators and real sources that were left out of its training."""
    card = json.loads((ROOT / "external_detectors" / "weights" / "clip.card.json").read_text("utf-8"))
    alarms = card["figures"]["false_alarms_of_a_source_left_out"]
    both = card["figures"]["auc_generator_and_source_left_out"]
    generators = sorted({name.split(" / ")[0] for name in both})
    lines = [["real source left out", "n", "false alarms at 5 %", *(f"AUC, {g} left out too" for g in generators)]]
    lines.append(["---"] * len(lines[0]))
    for source, found in alarms.items():
        aucs = [_plain(both.get(f"{g} / {source}")) for g in generators]
        lines.append([source, str(found["n"]), f"{100 * found['rate']:.1f} %", *aucs])
    caption = (
        f"Expert `clip` {card['version']}: the threshold that 5 % of the other sources' photos reach, on a source that "
        "its training lacked; and the AUC of a generator against that source when neither was seen. 0.5 is chance."
    )
    return "\n\n".join([caption, _table(lines), *_left_out_of_calibration()])


def _left_out_of_calibration() -> list[str]:
    """What happens to each source's reals and fakes when the shipped calibration is fitted without it."""
    calibration = json.loads((ROOT / "x2dfd" / "weights" / "embedded" / "calibration.json").read_text("utf-8"))
    fitted_on = calibration["fitted_on"]
    reals, fakes = fitted_on.get("false_alarms_of_a_source_left_out"), fitted_on.get("fakes_of_a_source_left_out", {})
    if not reals:
        return []
    lines = [["left out of the calibration", "reals", "called fake", "inconclusive", "fakes", "found", "called real"]]
    lines.append(["---"] * 7)
    for source in sorted({*reals, *fakes}):
        cells = ["–", "–", "–"]
        if told := reals.get(source):
            cells = [str(told["n"]), _percent(told["rate"]), _percent(told["inconclusive"])]
        if told := fakes.get(source):
            cells += [str(told["n"]), _percent(told["found"]), _percent(told["called_real"])]
        lines.append([source, *cells, *["–"] * (6 - len(cells))])
    caption = (
        "The shipped band with weights and floors that were fitted without one source or generator, on its own "
        f"pictures (`calib`; {_who_knew(fitted_on)}): at most {_percent(fitted_on['false_alarms_allowed'])} false "
        "alarms are promised of the sources it was fitted on, and twice that of one that it was not."
    )
    return [caption, _table(lines)]


def _who_knew(fitted_on: Result) -> str:
    """Of each part, about which of these sources and generators one was asked that was trained without them."""
    told = []
    for name, shown in {"mllm": "the MLLM", **{n: f"`{n}`" for n in fitted_on["experts"]}}.items():
        new = sorted(o for o, parts in fitted_on.get("fitted_also_unseen", {}).items() if name in parts)
        told.append(f"{shown} {'trained without it for ' + ', '.join(new) if new else 'as shipped'}")
    return "; ".join(told)


def overlays(results: dict[str, Result]) -> str:
    """How many verdicts flip under text over the picture, by what the text claims. One block a result file."""
    blocks = []
    for name, result in _of("overlays", results):
        lines = [["text claims", "verdicts that flip", "to", "P(fake) moved by", "the MLLM's own"], ["---"] * 5]
        for claim, told in result["claims"].items():
            rate = _number({"value": told["flip_rate"], "interval": told["interval"]}, percent=True)
            to = ", ".join(f"{label} {n}" for label, n in told["to"].items()) or "–"
            moved = [f"{told[k]:+.2f}" if told[k] is not None else "–" for k in ("p_fake_moved", "p_mllm_moved")]
            lines.append([claim, f"{rate} of {told['n']}", to, *moved])
        caption = (
            f"`{name}`: {result['overlays']} overlays on {result['pictures']} pictures of {result['groups']} groups, "
            f"manifest `{result['manifest_sha256'][:12]}`, model `{result['model']}`."
        )
        blocks.append(caption + "\n\n" + _table(lines))
    return "\n\n".join(blocks) or "No results yet."


def load(results: dict[str, Result]) -> str:
    """A million rows through the runner, and ten thousand requests to an endpoint that fails: what came of them."""
    blocks = []
    for name, result in _of("load_rows", results):
        curve, rows = result["memory_mib"]["curve"], result["rows"]
        at = [min(curve, key=lambda point: abs(point[0] - share * result["seconds"])) for share in _SHARES]
        lines = [["of the time", *(f"{100 * share:.0f} %" for share in _SHARES)], ["---"] * (len(_SHARES) + 1)]
        lines.append(["memory, MiB", *(f"{mib:.0f}" for _, mib in at)])
        order = "whole and in order" if result["whole_and_in_order"] else "NOT whole, or not in order"
        caption = (
            f"`{name}`: {rows:,} rows by a model that only pretends, {order}; {result['failures']:,} of them failures "
            f"with their reason; {result['rows_per_second']:,} rows/s; {result['memory_mib']['most']:.0f} MiB at most."
        )
        blocks.append(caption + "\n\n" + _table(lines))
    for name, result in _of("load_served", results):
        faults = ", ".join(f"{n} {what}" for what, n in result["server"]["faults"].items())
        curve, n = result["memory_mib"]["curve"], result["requests"]
        at = [min(curve, key=lambda point: abs(point[0] - share * n)) for share in _SHARES]
        lines = [["of the requests", *(f"{100 * share:.0f} %" for share in _SHARES)], ["---"] * (len(_SHARES) + 1)]
        lines.append(["memory, MiB", *(f"{mib:.0f}" for _, mib in at)])
        caption = (
            f"`{name}`: {n:,} requests, {result['concurrency']} at a time, to a stand-in endpoint ({faults}); "
            f"{result['wrong_or_lost']} wrong or lost; {result['requests_per_second']:.1f} a second."
        )
        blocks.append(caption + "\n\n" + _table(lines))
    return "\n\n".join(blocks) or "No results yet."


_SHARES = (0.01, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Where the tables of memory look."""


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _of(task: str, results: dict[str, Result]) -> list[tuple[str, Result]]:
    return [(name, result) for name, result in results.items() if result["task"]["name"] == task]


def _changed(result: Result) -> str:
    change = result["settings"].get("change")
    return f"; every picture changed before it was judged, {change}" if change else ""


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _answered(scorer: Result) -> str:
    """How much the verdicts answer, and how many fakes they call real; nothing for scores without answers."""
    found = scorer.get("answers")
    if not found or "misses" not in found:
        return ""
    misses = _number(found["misses"], percent=True)
    return f"; {100 * found['coverage']:.0f} % were answered, the others are inconclusive; fakes called real: {misses}"


def _number(measured: Result, *, percent: bool = False, interval: bool = True) -> str:
    def show(value: float) -> str:
        return f"{100 * value:.1f} %" if percent else f"{value:.3f}"

    if measured["value"] is None:
        return "–"
    bounds = f" [{', '.join(map(show, measured['interval']))}]" if interval and measured["interval"] else ""
    return show(measured["value"]) + bounds


TABLES: dict[str, Callable[[dict[str, Result]], str]] = {
    "ablation": ablation,
    "assess": assess,
    "detect": detect,
    "detect-all": partial(detect, all_methods=True),
    "describe": describe,
    "describe-all": partial(describe, all_methods=True),
    "experts": experts,
    "robustness": robustness,
    "localisation": localisation,
    "missing": missing,
    "gpu": gpu,
    "left-out": left_out,
    "load": load,
    "models": models,
    "overlays": overlays,
    "trained": trained,
    "unseen": unseen,
    "speed": speed,
    "speed-all": partial(speed, all_cases=True),
}


def filled(text: str, results: dict[str, Result]) -> str:
    """The text with every block between `<!-- table:NAME -->` and `<!-- /table -->` made anew.

    Raises ValueError on an unknown name and on a marker without its end.
    """

    def block(match: re.Match[str]) -> str:
        if match["name"] not in TABLES:
            raise ValueError(f"unknown table {match['name']!r} (known: {', '.join(TABLES)})")
        return f"{match[1]}{TABLES[match['name']](results)}\n{match[3]}"

    new, n = _BLOCK.subn(block, text)
    if n != text.count("<!-- table:"):
        raise ValueError("a table marker is not closed by <!-- /table -->, or does not stand on a line of its own")
    return new


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes the README's tables from result files.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a table differs")
    parser.add_argument("--pages", type=Path, nargs="+", default=[ROOT / "README.md", ROOT / "eval" / "RESULTS.md"])
    parser.add_argument("--results", type=Path, default=ROOT / "eval" / "results", help="folder of result files")
    args = parser.parse_args(argv)
    try:
        results = {p.stem: json.loads(p.read_text("utf-8")) for p in sorted(args.results.glob("*.json"))}
        pages = [(page, old := page.read_text("utf-8"), filled(old, results)) for page in args.pages]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    differing = [(page, new) for page, old, new in pages if new != old]
    for page, new in differing:
        if args.check:
            print(f"{page.name}: tables differ from the results; run `make tables`", file=sys.stderr)
        else:
            write_text(page, new)
    return 1 if args.check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
