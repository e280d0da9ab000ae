"""Writes the tables of README.md and eval/RESULTS.md from the result files, so that no number there is typed by hand.

    python -m eval.tables           # rewrite the tables
    python -m eval.tables --check   # exit 1 when a table differs from the results, or a result must not be quoted

A result must not be quoted when it was made from code that is in no commit, or does not say by SHA-256 which manifest
and weights it is of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from eval.stats import TOO_FEW, Measured, rate_like, rate_share
from x2dfd.cli import run_command
from x2dfd.errors import X2DFDError
from x2dfd.files import Json, parse_json, write_text

ROOT = Path(__file__).resolve().parent.parent
Result = Json
NOT_MEASURED = "Not measured."
FEW_MARK = "‡"
MIN_SLICE = 10
"""Fakes, and photos, that a slice of the experts' table has at least."""
DATA_TASKS = ("detect", "describe", "experts", "quality", "rotation")
"""Tasks whose results are of labelled pictures."""

_BLOCK = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)

Cell = str | int | float | Measured | Json | None
"""A text, a number, or a figure, also in the form of a result file."""


@dataclass(frozen=True)
class Table:
    """A table as data: what stands above it, its column heads, its rows. On a page, a caption too."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    @property
    def texts(self) -> list[list[str]]:
        """The rows as they are shown."""
        return [[shown(cell) for cell in row] for row in self.rows]

    def markdown(self) -> str:
        """The table, and what its signs mean."""
        lines = [[*self.columns], ["---"] * len(self.columns), *self.texts]
        text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        few = any(FEW_MARK in cell for cells in lines for cell in cells) and f"{FEW_MARK} {TOO_FEW}" not in self.title
        note = f" {FEW_MARK} {TOO_FEW}." if few else ""
        return f"{self.title}{note}\n\n{text}"


def shown(cell: Cell, *, percent: bool = False) -> str:
    """A cell's text: figures with three digits and their interval, or `FEW_MARK` where groups are too few for one."""
    if isinstance(cell, dict):
        cell = Measured.read(cell)
    if cell is None or (isinstance(cell, Measured) and cell.value is None):
        return "–"
    if isinstance(cell, str | int):
        return str(cell)

    def number(value: float) -> str:
        return f"{100 * value:.1f} %" if percent else f"{value:.3f}"

    if not isinstance(cell, Measured):
        return number(cell)
    value = number(cell.value if cell.value is not None else 0.0)
    if cell.interval:
        return f"{value} [{number(cell.interval[0])}, {number(cell.interval[1])}]"
    return value + (FEW_MARK if cell.note == TOO_FEW else " (no interval)" if cell.note else "")


def percent(part: Json | None) -> str:
    """A rate of a result file."""
    return shown(part, percent=True)


def detect(name: str, result: Result) -> Iterator[Table]:
    """Scorers in columns; AUC over all, then by every column's values, each with its counts and, of verdicts, the
    shares of fakes and photos that were called fake."""
    scorers = _apart(result["scorers"])
    held_out = result["model"]["stated"].get("held_out", [])
    first = next(iter(scorers.values()))
    overall, answers = first["overall"], first.get("answers")
    said, of_source = called(first), first.get("promise", {}).get("by_source", {})
    rates = ["fakes called fake", "photos called fake"] if answers else []
    found = [counted(said.get("fakes called fake")), counted(answers["false_alarms"])] if answers else []
    rows: list[list[Cell]] = [["**all**", *_aucs(scorers), *found, *_counts(overall["auc"], overall)]]
    for column, value in _parts(first["by"]):
        known = first["by"][column][value]
        marks = ("" if known["against"] == "own reals" else "*") + ("†" if value in held_out else "")
        aucs = [s["by"].get(column, {}).get(value, {}).get("auc") for s in scorers.values()]
        alarms = known.get("false_alarms") or (of_source.get(value) if column == "source" else None)
        found = [counted(known.get("found")), counted(alarms)] if answers else []
        rows.append([f"{column} {value}{marks}", *aucs, *found, *_counts(known["auc"], known)])
    title = _title(name, result)
    if answers:
        title += (
            f" {percent(answers['coverage'])} of the pictures were answered; the others got no answer. "
            f"Fakes called real: {counted(answers['misses'])}."
        )
        title += f" Photos called real: {counted(said['photos called real'])}." if said else ""
        unscored = sum(first.get("unscored", {}).values()) - sum(result["failures"].values())
        title += f" Pictures without a score ({unscored}) count in these shares, not in AUC." if unscored > 0 else ""
        title += (
            " By method and source the file holds only what was called fake; the others were called real or got no "
            "answer. The photos of a method are those of its sources."
        )
    title += " * AUC against all photos (or all fakes), as there are too few of the same source."
    title += " † held out of the training of the MLLM and of the calibration." if held_out else ""
    yield Table(title, ["AUC", *scorers, *rates, "fake / real", "groups"], rows)


def describe(name: str, result: Result) -> Iterator[Table]:
    """What rationales name against the truth, beside the baselines; by method too, but for baselines. Of pictures with
    reference texts and without known cues, how near the texts come."""
    scorers: dict[str, Result] = result["scorers"]
    title = _title(name, result)
    if not any("cues" in s for s in scorers.values()):
        keys = {"rouge_l": "ROUGE-L", "bleu_mean": "BLEU, mean"}
        near: list[list[Cell]] = [
            [scorer, *(s["text"].get(k, {}).get("value") for k in keys), s.get("distinct_texts"),
             percent(s.get("contradictions")), s["text"]["n"]]
            for scorer, s in scorers.items()
        ]  # fmt: skip
        title += " No cues are known: each text against all references of its picture"
        questions = result["references"]["annotations"]["questions"]
        title += f", answers to {questions} different questions." if questions else "."
        yield Table(title, ["", *keys.values(), "distinct texts", "contradictions", "n"], near)
        return
    rows: list[list[Cell]] = []
    alike: dict[str, list[str]] = {}
    for scorer, s in scorers.items():
        alike.setdefault(repr([s["areas"], s["cues"], s["by_method"]]), []).append(scorer)
    for names in alike.values():
        s = scorers[names[0]]
        areas, cues = (s[what]["micro_f1"] for what in ("areas", "cues"))
        said = [s.get("distinct_texts"), percent(s.get("contradictions"))]
        rows.append([" = ".join(names), areas, cues, *said, s["n_fake"], areas["groups"]])
        for method, part in s["by_method"].items() if _sees(names[0]) else ():
            counts = [part["n"], part["areas"]["groups"]]
            rows.append([f"{names[0]}, {method}", part["areas"], part["cues"], "–", "–", *counts])
    head = ["", "area F1", "cue F1", "distinct texts", "contradictions", "n fake", "groups"]
    yield Table(f"{title} Forgeries with known cues.{_beside_pointing(scorers)}", head, rows)


def _sees(scorer: str) -> bool:
    """Whether a scorer sees the picture, which a baseline does not."""
    return scorer == "model" or scorer.startswith("expert:")


def _beside_pointing(scorers: dict[str, Result]) -> str:
    """The comparison that matters: the texts beside the pointing on which they rest."""
    pointing = {name: shown(s["areas"]["micro_f1"]) for name, s in scorers.items() if name.startswith("expert:")}
    if not pointing or "model" not in scorers:
        return ""
    own = " and ".join(f"that of `{name}` alone {f1}" for name, f1 in pointing.items())
    return (
        " The comparison that matters is between the texts and the pointing on which they rest: the area F1 of the "
        f"texts (`model`) is {shown(scorers['model']['areas']['micro_f1'])}, {own}."
    )


def experts(name: str, result: Result) -> Iterator[Table]:
    """Experts, fusion and baselines in columns: all metrics over all, then the AUC of every slice."""
    scorers, held_out = result["scorers"], result["held_out"]
    measures = {"auc": "AUC", "average_precision": "AP", "tpr_at_fpr_0.05": "TPR at 5 % FPR", "eer": "EER"}
    measures["ece"] = "ECE"
    title = (
        f"{_title(name, result)} The largest face of each picture; `fusion` is the verdict"
        f"{'' if 'mllm' in scorers else ' without the MLLM'}. `baseline:sharpness` is the variance of the crop's "
        "Laplacian: the smoother, the likelier fake."
    )
    first = next(iter(scorers.values()))
    counts = _counts(first["overall"]["auc"], first["overall"])
    rows: list[list[Cell]] = [
        [text, *(s["overall"].get(key) for s in scorers.values()), *counts] for key, text in measures.items()
    ]
    yield Table(title, ["all", *scorers, "fake / real", "groups"], rows)
    rows = []
    for column, value in _parts(first["by"]):
        known = first["by"][column][value]
        if min(known["n_fake"], known["n_real"]) < MIN_SLICE:
            continue
        cells = [shown(s["by"][column][value]["auc"]) + ("†" if value in held_out.get(c, ()) else "")
                 if value in s["by"].get(column, {}) else "–" for c, s in scorers.items()]  # fmt: skip
        mark = "" if known["against"] == "own reals" else "*"
        rows.append([f"{column} {value}{mark}", *cells, *_counts(known["auc"], known)])
    title = (
        f"The AUC by slice, of slices with at least {MIN_SLICE} fakes and {MIN_SLICE} photos. † held out of training, "
        "as its card says (fusion: of the calibration and of every expert that weighs). * against all reals (or all "
        f"fakes). {FEW_MARK} {TOO_FEW}."
    )
    if rows:
        yield Table(title, ["AUC", *scorers, "fake / real", "groups"], rows)


def localisation(name: str, result: Result) -> Iterator[Table]:
    """How well the experts' maps find what was changed, beside maps that ignore the picture."""
    found = result.get("localisation") or {}
    if not found.get("maps"):
        return
    rows: list[list[Cell]] = [
        [way, part["auc"], part["iou"], part["n"], part["auc"]["groups"]] for way, part in found["maps"].items()
    ]
    missed = ", ".join(f"{n} ({reason.replace('_', ' ')})" for reason, n in found["left_out"].items())
    what = "; ".join(f"`{way}`: {line}" for way, line in found["baselines"].items())
    title = (
        f"{_title(name, result)} {found['n']} of these fakes have a map and a mask that says what was changed "
        f"({found['n_masks']} have a mask{f'; not measured: {missed}' if missed else ''}). Means over the fakes: "
        "pixel AUC, the chance that a changed pixel of the crop gets a higher value than an unchanged one, and IoU, "
        f"the overlap of map and mask at {found['iou_at']}. {what}."
    )
    yield Table(title, ["map", "pixel AUC", "IoU", "n fake", "groups"], rows)


def robustness(name: str, result: Result) -> Iterator[Table]:
    """AUC of every column under every change; the fusion's false alarms and misses; how far JPEG 95 moves P(fake)."""
    scorers, changes = result["scorers"], result["robustness"]
    if not changes:
        return
    answers = scorers.get("fusion", {}).get("answers", {})
    rates = [key for key in ("false_alarms", "misses") if key in answers]
    rows: list[list[Cell]] = [
        ["unchanged", *_aucs(scorers), *(percent(answers[k]) for k in rates), "–",
         next(iter(scorers.values()))["overall"]["n_groups"]]
    ]  # fmt: skip
    for change, part in changes.items():
        figures = [part["auc"][c] for c in scorers]
        lost = "{fake} / {real}".format_map(part["lost_face"])
        rows.append([change, *figures, *(percent(part[k]) for k in rates), lost, figures[0]["groups"]])
    what = "; ".join(f"{change}: {part['what']}" for change, part in changes.items())
    head = ["AUC", *scorers, *(k.replace("_", " ") for k in rates), "faces lost, fake / real", "groups"]
    yield Table(f"{_title(name, result)} Pictures that keep their face. {what}.", head, rows)
    if swap := result["format_swap"]:
        moved: list[list[Cell]] = [[c, part["median"], part["p90"], part["n"]] for c, part in swap.items()]
        title = "How far P(fake) moves when a PNG becomes a JPEG of quality 95."
        yield Table(title, ["", "median of the change", "90 % stay below", "n"], moved)


def speed(name: str, result: Result) -> Iterator[Table]:
    """Seconds of everything that was set side by side."""
    for device in result["devices"]:
        rows: list[list[Cell]] = []
        for comparison in device["comparisons"]:
            for way, found in comparison["ways"].items():
                times, share, change = (found.get(k) for k in ("times_first", "share_of_bound", "largest_difference"))
                row = [_spread(found["seconds"], ".2f" if found["seconds"]["median"] >= 0.1 else ".4f")]
                row.append(_spread(times, ".1f") if times else "–")
                row.append("–" if share is None else f"{100 * share:.0f} %")
                row.append("–" if change is None else f"{change:.1e}")
                rows.append([f"{comparison['name']}: {way}", *row, comparison["rounds"]])
        rounds = sorted({comparison["rounds"] for comparison in device["comparisons"]})
        title = (
            f"`{name}`, by `{_speed_command(result)}`: {device['model']} on {device['device']}, {result['threads']} "
            f"threads of {device['name']}, which was measured at {device['matmul_gflop_per_s']:,.0f} GFLOP/s and "
            f"{device['read_gb_per_s']:.0f} GB/s. A spread from 10 to 90 % is interpolated between the "
            f"{' or '.join(str(n) for n in rounds)} rounds of its row: so few tell little about other runs."
        )
        if any(comparison["name"].startswith("the command") for comparison in device["comparisons"]):
            title += (
                " `the command` is `x2dfd detect FILE --json --no-rationale` with one photo, timed from the start of "
                "Python: it writes no explanation."
            )
        yield Table(title, ["", "s [10–90 %]", "times the first", "of the bound", "largest change", "rounds"], rows)


def _speed_command(result: Result) -> str:
    comparisons = [comparison for device in result["devices"] for comparison in device["comparisons"]]
    asked = [re.match(r"(\d+) cue questions", comparison["name"]) for comparison in comparisons]
    words = ["python -m benchmarks.speed", f"--rounds {max(comparison['rounds'] for comparison in comparisons)}"]
    words += [f"--questions {match[1]}" for match in asked if match][:1]
    words += [f"--geometry {result['geometry']}"] if result.get("geometry", "embedded") != "embedded" else []
    words += [f"--threads {result['threads']}"] if result["threads"] != 2 else []
    return " ".join([*words, "--out FILE"])


def quality(name: str, result: Result) -> Iterator[Table]:
    """Peers that scored the same pictures in turns: seconds, weights, AUC."""
    data, moved = result["data"], result["bf16_against_fp32"]
    rows: list[list[Cell]] = [[way["name"], way["seconds"], way["megabytes"], way["auc"]] for way in result["ways"]]
    n_real, n_fake = data["n_real"], data["n_fake"]
    title = (
        f"`{name}`: {n_real + n_fake} pictures of manifest `{data['sha256'][:12]}`, {n_real} real and {n_fake} fake, "
        f"{result['threads']} CPU threads, eight faces at a time. bf16 moves P(fake) by {moved['p_median']:.4f} in the "
        f"median and by {moved['p_90']:.4f} at most for nine faces of ten; its AUC less that of fp32: "
        f"{shown(moved['auc'])}."
    )
    yield Table(title, ["", "s a face", "MB of weights", "AUC"], rows)


def rotation(name: str, result: Result) -> Iterator[Table]:
    """By what was held out of the experts' training its AUC, and the verdicts on their scores."""
    for tower in result["towers"]:
        columns = list(dict.fromkeys(column for part in tower["rows"].values() for column in part.get("auc", {})))
        rows: list[list[Cell]] = []
        for what, part in sorted(tower["rows"].items(), key=lambda item: (item[1]["kind"], item[0])):
            aucs = [part.get("auc", {}).get(column) for column in columns]
            said = [percent(part["answered"]), percent(part["wrong"])]
            rows.append([what, *aucs, *said, part["n"], part["answered"]["groups"]])
        title = (
            f"`{name}`: experts trained without {', '.join(tower['left_out'])}. AUC against the photos of the held-out "
            "sources, and of generators among photos of known sources too; each expert alone; `met`: the shipped "
            "experts, which were trained on all of them. Wrong: photos called fake, fakes called real."
        )
        if "limit" in result:
            title += f" At most {result['limit']} pictures of a source, generator or method (`--limit`)."
        yield Table(title, ["AUC", *columns, "answered", "wrong", "n", "groups"], rows)


def _spread(part: dict[str, float], form: str) -> str:
    return f"{part['median']:{form}} [{part['p10']:{form}}–{part['p90']:{form}}]"


def _title(name: str, result: Result) -> str:
    data, change = result["data"], result["settings"].get("change")
    limit = f"that `--limit {data['limit']}` drew from" if data.get("limit") else "of"
    note = f"; every picture changed before it was judged, {change}." if change else "."
    note += " Another limit draws another subset of the same set." if data.get("limit") else ""
    return (
        f"`{name}`, by `{_command(result)}`: model `{result['model']['name']}`, {data['n']} pictures {limit} manifest "
        f"`{data['sha256'][:12]}`, split {data['split'] or 'all'}; {data['n_real']} real and {data['n_fake']} fake in "
        f"{data['n_groups']} groups, {sum(result['failures'].values())} not readable{note} 95 % intervals by groups."
    )


def _command(result: Result) -> str:
    """The command that made a result of `eval/run_bench.py`, with those options that the result records."""
    data, settings, model = result["data"], result["settings"], result["model"]["name"]
    given: dict[str, object] = {"--model": model if model != "embedded" else None}
    given |= {f"--{option}": value for option, value in settings.get("options", {}).items()}
    given |= {"--split": data["split"], "--limit": data.get("limit"), "--seed": settings.get("seed")}
    by = ",".join(next(iter(result["scorers"].values())).get("by", ()))
    given["--by"] = by if by != "source,method" else None
    given["--changes"] = settings["change"].split(":")[0] if settings.get("change") else None
    if result["task"]["name"] == "experts":
        given["--changes"] = ",".join(result["robustness"]) or "none"
    given["--reporting"] = "eval/results/looks.jsonl" if "reporting" in result else None
    words = [f"{option} {value}" for option, value in given.items() if value]
    words += ["--with-mllm"] if result["task"]["name"] == "experts" and "mllm" in result["scorers"] else []
    words += ["--no-equalise"] if "equalise" in settings and not settings["equalise"] else []
    return " ".join(["python eval/run_bench.py", result["task"]["name"], "--data MANIFEST", *words, "--out DIR"])


def _parts(by: Result) -> list[tuple[str, str]]:
    """Column and value of the slices, without those that have no AUC."""
    found = sorted((c, v) for c, table in by.items() for v in table if table[v]["auc"]["value"] is not None)
    # A set of one generator's fakes bears its name as source and as method: one row says it.
    return [(c, v) for c, v in found if c != "source" or ("method", v) not in found]


def _apart(scorers: dict[str, Result]) -> dict[str, Result]:
    """Scorers whose figures are all equal as one, under their names: a second column would say nothing more."""
    parts = [(column, value) for column, values in next(iter(scorers.values()))["by"].items() for value in values]
    alike: dict[str, list[str]] = {}
    for name, scorer in scorers.items():
        by = [scorer["by"].get(column, {}).get(value, {}).get("auc") for column, value in parts]
        alike.setdefault(repr([scorer["overall"]["auc"], *by]), []).append(name)
    return {" = ".join(names): scorers[names[0]] for names in alike.values()}


def _aucs(scorers: dict[str, Result]) -> list[Cell]:
    return [s["overall"]["auc"] for s in scorers.values()]


def _counts(figure: Result, part: Result) -> list[Cell]:
    return [f"{part['n_fake']} / {part['n_real']}", figure["groups"]]


def called(scorer: Result) -> dict[str, Measured]:
    """Of a scorer with verdicts: the fakes that were called fake and the photos that were called real, as far as its
    parts tell. A column whose slices hold as many fakes as were scored has every one of them once."""
    answers = scorer.get("answers")
    if not answers or answers["accuracy"]["value"] is None:
        return {}
    misses, alarms = Measured.read(answers["misses"]), Measured.read(answers["false_alarms"])
    for slices in scorer.get("by", {}).values():
        found = [Measured.read(part["found"]) for part in slices.values() if "found" in part]
        if sum(part.n for part in found) == scorer["overall"]["n_fake"] > 0:  # what has no score was not called fake
            hits = sum(_hits(part) for part in found)
            right = _hits(Measured.read(answers["accuracy"])) - hits  # the other right answers are about photos
            return {"fakes called fake": rate_like(misses, hits), "photos called real": rate_like(alarms, right)}
    return {}


def _hits(rate: Measured) -> int:
    return round((rate.value or 0.0) * rate.n)


def counted(figure: Measured | Json | None) -> str:
    """A rate with its counts: "5 of 18, 27.8 % [10.3 %, 52.6 %]"."""
    rate = Measured.read(figure) if isinstance(figure, dict) else figure
    if rate is None or rate.value is None:
        return "–"
    return f"{_hits(rate)} of {rate.n}, {shown(rate, percent=True)}"


def _of_verdicts(found: Result) -> Iterator[list[Cell]]:
    """Rows of the summary: verdicts against the truth."""
    scorer = next(iter(found["scorers"].values()))
    answers, overall, said = scorer["answers"], scorer["overall"], called(scorer)
    counts = f"{overall['n_fake']} fakes, {overall['n_real']} photos"
    yield ["A fake gets a higher score than a photo (AUC: 1 is perfect, 0.5 is a coin)", overall["auc"], counts]
    shares = {
        "Share of the pictures that get an answer": answers["coverage"],
        "Share of these answers that is right": answers["accuracy"],
        "Share of all photos that is called fake": answers["false_alarms"],
        "Share of all fakes that is called fake": said.get("fakes called fake"),
        "Share of all fakes that is called real": answers["misses"],
    }
    for text, part in shares.items():
        rate = Measured.read(part) if isinstance(part, dict) else part
        if rate is not None:
            yield [text, shown(rate, percent=True), f"{_hits(rate)} of {rate.n}"]
    if said:
        misses, right = Measured.read(answers["misses"]), said["photos called real"]
        text = 'Of the answers "likely real", the share that is in truth fake, if fakes and photos are equally frequent'
        among = f"{_hits(misses)} of {misses.n} fakes and {_hits(right)} of {right.n} photos called real"
        yield [text, shown(rate_share(misses, right), percent=True), among]


def _of_map(found: Result) -> Iterator[list[Cell]]:
    """The summary's row on the first map, beside the best figures of the maps that do not see the forgery."""
    maps = (found.get("localisation") or {}).get("maps", {})
    baselines = [part for way, part in maps.items() if way.startswith("baseline:")]
    for part in [part for way, part in maps.items() if not way.startswith("baseline:")][:1]:
        text, figures = "The map against the changed pixels: AUC, overlap (IoU)", [part["auc"], part["iou"]]
        row = ", ".join(map(shown, figures))
        if baselines:
            text += "; a bell or the face's oval in its place, at best"
            best = [max((b[key] for b in baselines), key=lambda f: float(f["value"])) for key in ("auc", "iou")]
            row += "; " + ", ".join(map(shown, best))
        yield [text, row, f"{part['n']} fakes"]


def summary(results: dict[str, Result]) -> str:
    """What a reader asks first, in plain words, from the results that bear their task's name."""
    rows: list[list[Cell]] = []
    if found := results.get("detect"):
        rows += _of_verdicts(found)
    if found := results.get("rotation"):
        kinds = {
            "generator among known photos": "AUC on a held-out generator (four, three of them held out twice)",
            "generator": "the same, among photos of sources that were held out too",
            "method on new photos": "AUC on forgeries in photos of a source that was held out",
        }
        for kind, text in kinds.items():
            if part := found["summary"].get(kind):
                rows.append([f"{text}: mean, worst", f"{part['mean_auc']:.2f}, {part['worst_auc']:.2f}", part["n"]])
    if areas := results.get("describe", {}).get("scorers", {}).get("model", {}).get("areas"):
        parts = areas["micro"]
        right = f"{100 * parts['precision']:.0f} %, {100 * parts['recall']:.0f} %"
        rows.append(["Named areas that were changed, changed areas that are named", right, f"{areas['n']} fakes"])
    rows += _of_map(results.get("experts", {}))
    speed = results.get("speed", {"devices": []})
    for device in speed["devices"]:
        warm = [comparison for comparison in device["comparisons"] if comparison["name"].startswith("warm")]
        text = f"Seconds for a verdict, and with the explanation of a fake ({device['device']}, {{}} threads)"
        for comparison in warm[:1]:
            spent = ", ".join(_spread(way["seconds"], ".2f") for way in comparison["ways"].values())
            rows.append([text.format(speed["threads"]), spent, f"{comparison['rounds']} rounds"])
    if not rows:
        return NOT_MEASURED
    title = "Brackets hold 95 % intervals; of seconds, what lies between the 10th and 90th percentile of the rounds."
    return Table(title, ["", "figure", "n"], rows).markdown()


Maker = Callable[[str, Result], Iterator[Table]]

TABLES: dict[str, tuple[str, Maker]] = {
    "detect": ("detect", detect),
    "describe": ("describe", describe),
    "experts": ("experts", experts),
    "robustness": ("experts", robustness),
    "localisation": ("experts", localisation),
    "speed": ("speed", speed),
    "quality": ("quality", quality),
    "rotation": ("rotation", rotation),
}
"""Name of a table -> the task whose results it shows, and how. Beside them there is `summary`."""


def table(name: str, results: dict[str, Result]) -> str:
    """The Markdown of a named table, or that nothing was measured."""
    if name == "summary":
        return summary(results)
    task, make = TABLES[name]
    own = {file: r for file, r in results.items() if r["task"]["name"] == task}
    return "\n\n".join(t.markdown() for file, r in own.items() for t in make(file, r)) or NOT_MEASURED


def filled(text: str, results: dict[str, Result]) -> str:
    """The text with every block between `<!-- table:NAME -->` and `<!-- /table -->` made anew. Raises X2DFDError on an
    unknown name and on a marker without its end."""

    def block(match: re.Match[str]) -> str:
        if match["name"] not in (known := ("summary", *TABLES)):
            raise X2DFDError(f"unknown table {match['name']!r} (known: {', '.join(known)})", code="table_unknown")
        return f"{match[1]}{table(match['name'], results)}\n{match[3]}"

    new, n = _BLOCK.subn(block, text)
    if n != text.count("<!-- table:"):
        raise X2DFDError("a table marker has no line <!-- /table -->, or none of its own", code="table_not_closed")
    return new


def faults(name: str, result: Result) -> list[str]:
    """Why a result must not be quoted; none for those that are in no table."""
    task = result["task"]["name"]
    if task not in {own for own, _ in TABLES.values()}:
        return []
    code, hashes = result.get("code"), result.get("hashes", {})
    found = [] if code else ["it does not say from which commit it was made"]
    if code and code["dirty"]:
        found.append("it was made from code with changes that are in no commit")
    if (look := result.get("reporting", {}).get("look", 1)) > 1:
        found.append(f"it is look number {look} of one version at a reporting set")
    wanted = ["manifest"] if task in DATA_TASKS else []
    if result.get("model", {}).get("name") == "embedded":
        wanted += ["calibration"] if task in ("experts", "rotation") else ["base", "adapter", "calibration"]
    found += [f"it holds no SHA-256 of its {part}" for part in wanted if not hashes.get(part)]
    return [f"{name}.json: {fault}" for fault in found]


def main(
    check: Annotated[bool, typer.Option("--check", help="change nothing; exit 1 when a table differs")] = False,
    pages: Annotated[list[Path] | None, typer.Option(help="pages to fill; default: README.md, eval/RESULTS.md")] = None,
    results: Annotated[Path, typer.Option(help="folder of result files", show_default="eval/results")] = ROOT
    / "eval"
    / "results",
) -> None:
    """Write the tables of the pages from the result files, or check that they are theirs."""
    try:
        found = {p.stem: parse_json(p.read_bytes()) for p in sorted(results.glob("*.json"))}
        texts = {page: page.read_text("utf-8") for page in pages or [ROOT / "README.md", ROOT / "eval" / "RESULTS.md"]}
    except (OSError, ValueError) as error:
        raise X2DFDError(str(error), code="not_a_result") from error
    wrong = [fault for name, result in found.items() for fault in faults(name, result)]
    for page, old in texts.items():
        new = filled(old, found)
        if new != old and check:
            wrong.append(f"{page.name}: tables differ from the results; run `make tables`")
        elif new != old:
            write_text(page, new)
    for line in wrong:
        typer.echo(line, err=True)
    if wrong and check:
        raise typer.Exit(1)


if __name__ == "__main__":
    run_command(main, "Example:\n\n  python -m eval.tables --check")
