"""A result as one self-contained HTML page, with its curves.

It has no scripts and loads nothing from outside. Its colours are variables, so that plots follow light and dark mode.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from eval.tables import Result, Table, percent
from x2dfd.files import Json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATE = Path(__file__).with_name("result.html.jinja")
NO_PLOTS = "No curves: matplotlib is not installed (pip install -e '.[bench]')."

# matplotlib draws in these colours; the page's variables replace them.
INK, SOFT, LINE, PAPER = "#010101", "#020202", "#030303", "#040404"
COLOURS = tuple(f"#0500{k:02x}" for k in range(8))
_VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", PAPER: "card"} | {c: f"c{k}" for k, c in enumerate(COLOURS)}


def render(result: Result) -> str:
    """The page of a `result.json`."""
    data, task = result["data"], result["task"]
    settings = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    plots, no_plots = [], ""
    try:
        plots = list(_plots(result))
    except ImportError:
        no_plots = NO_PLOTS
    return settings.from_string(TEMPLATE.read_text("utf-8")).render(
        title=f"{task['name']}: {result['model']['name']}",
        line=f"{data['n_real']} real and {data['n_fake']} fake in {data['n_groups']} groups, split "
        f"{data['split'] or 'all'} of {data['manifest']} {data['sha256'][:12]}; 95 % intervals by groups",
        warnings=list(_warnings(result)),
        tables=list(_tables(result)),
        plots=plots,
        no_plots=no_plots,
        origin=list(_origin(result)),
    )


def _warnings(result: Result) -> Iterator[str]:
    code = result["code"]
    if change := result["settings"].get("change"):
        yield f"Every picture was changed before it was judged. {change}."
    if code and code["dirty"]:
        yield "Made from code with changes that are in no commit."
    if (look := result.get("reporting", {}).get("look", 1)) > 1:
        yield f"This is look number {look} of this version at a reporting set; each version should have one only."
    if failed := sum(result["failures"].values()):
        yield f"{failed} files could not be judged; they are in no rate below."
    for name, scorer in result.get("scorers", {}).items():
        promise = scorer.get("promise")
        if promise and promise["seen"]:
            yield "The calibration was fitted on these pictures: its rates are not those of a test."
        elif promise and promise["measured"]["kept"] is False:
            rate = percent(promise["measured"])
            yield f"{name}: false alarms are {rate}, above the {100 * promise['false_alarms_allowed']:.0f} % allowed."


def _origin(result: Result) -> Iterator[tuple[str, str]]:
    task, code, data = result["task"], result["code"], result["data"]
    yield "Task", f"{task['name']}, version {task['version']}, per {task['unit']}"
    yield "Code", f"commit {code['commit']}{', changed' if code['dirty'] else ''}" if code else "not a git checkout"
    yield "Manifest", f"{data['manifest']}, SHA-256 {data['sha256']}"
    for name, key in (("Samples", "samples_sha256"), ("Pictures", "pictures_sha256")):
        if key in data:
            yield name, f"SHA-256 {data[key]}"
    yield "Device", result["device"]
    for section in ("settings", "versions"):
        yield section.capitalize(), ", ".join(f"{k} {v}" for k, v in result[section].items() if v is not None)
    stated = result["model"]["stated"]
    yield "Model", json.dumps(stated, ensure_ascii=False) if stated else "none: it sees no picture"
    if result["failures"]:
        yield "Not judged", ", ".join(f"{k} {n}" for k, n in result["failures"].items())


_OVERALL = {
    "auc": "AUC", "average_precision": "AP", "eer": "EER", "tpr_at_fpr_0.01": "TPR at 1 %",
    "tpr_at_fpr_0.05": "TPR at 5 %", "tpr_at_fpr_0.1": "TPR at 10 %", "nll": "NLL", "brier": "Brier",
    "ece": "ECE", "cllr": "Cllr", "aurc": "AURC",
}  # fmt: skip

_AT_HALF = {
    "accuracy": "accuracy at 0.5",
    "balanced_accuracy": "balanced accuracy at 0.5",
    "recall_real": "reals called real at 0.5",
    "recall_fake": "fakes called fake at 0.5",
}


def _counted(part: Result) -> list[str | int]:
    """A rate and its counts."""
    return [percent(part), part["n"], part["groups"]]


def _tables(result: Result) -> Iterator[Table]:
    lines = [[name, part, part["n"], part["groups"]] for name, part in result["headline"].items()]
    yield Table("Headline", ["", "value [95 %]", "n", "groups"], lines)
    scorers: dict[str, Result] = result.get("scorers", {})
    complete = {name: s for name, s in scorers.items() if "overall" in s}
    if complete:
        overall = [s["overall"] for s in complete.values()]
        titles = {key: text for key, text in _OVERALL.items() if any(key in o for o in overall)}
        lines = [[text, *(o.get(key) for o in overall)] for key, text in titles.items()]
        lines += [[text, *(o.get("at_0.5", {}).get(key) for o in overall)] for key, text in _AT_HALF.items()]
        lines.append(["scored", *(s["n_scored"] for s in complete.values())])
        lines.append(["groups", *(o["n_groups"] for o in overall)])
        missing = [", ".join(f"{why}: {n}" for why, n in s["unscored"].items()) or "–" for s in complete.values()]
        yield Table("All metrics, full coverage", ["", *complete], [*lines, ["not scored", *missing]])
    for name, scorer in scorers.items():
        yield from _of_scorer(name, scorer)
    within = {f"tone, {source}": part for source, part in result.get("tone_within_source", {}).items()}
    for column, values in (result.get("by", {}) | within).items():
        lines = [[v, *_counted(p["false_alarms"]), p["above_the_others"]] for v, p in values.items()]
        yield Table(f"False alarms by {column}", [column, "false alarms", "n", "groups", "above the others"], lines)
    for change, part in (result.get("robustness") or {}).items():
        before = part["unchanged"]
        lines = [[name, auc, before[name], auc["n"], auc["groups"]] for name, auc in part["auc"].items()]
        yield Table(f"Changed: {change}", ["AUC", "changed", "unchanged", "n", "groups"], lines, part["what"])


def _of_scorer(name: str, scorer: Result) -> Iterator[Table]:
    if answers := scorer.get("answers"):
        rates = {"answered": "coverage", "right of those": "accuracy", "reals called fake": "false_alarms",
                 "fakes called real": "misses"}  # fmt: skip
        lines = [[text, *_counted(answers[key])] for text, key in rates.items()]
        of_those = {"balanced accuracy": "balanced_accuracy", "AUC": "auc", "ECE": "ece"}
        lines += [[f"{text} of those", answers[key], answers["n_answered"], ""] for text, key in of_those.items()]
        lines += [[f"no answer: {why}", "", n, ""] for why, n in answers["inconclusive"].items()]
        yield Table(f"{name}: three answers", ["", "", "n", "groups"], lines, "After abstention.")
    if promise := scorer.get("promise"):
        marks = {True: "kept", False: "broken", None: "no interval"}
        figures = {"all reals": promise["measured"]} | promise["by_source"]
        lines = [[population, marks[part["kept"]], *_counted(part)] for population, part in figures.items()]
        seen = "these are the same pictures" if promise["seen"] else "these pictures were not used for it"
        caption = (
            f"Allowed: {100 * promise['false_alarms_allowed']:.1f} %, chosen on split "
            f"{promise['promised_on']['split']}; {seen}. Broken: the whole interval lies above what was allowed."
        )
        head = ["", "", "measured [95 %]", "n", "groups"]
        yield Table(f"{name}: false alarms, promised and measured", head, lines, caption)
    for column, gaps in scorer.get("gaps", {}).items():
        lines = [
            [figure, gap["value"], gap["highest"], gap["figures"][1], gap["lowest"], gap["figures"][0]]
            for figure, gap in gaps.items()
        ]
        caption = "Largest minus smallest; never negative, so chance alone makes one: look at the two intervals."
        head = ["", "gap", "highest", "[95 %]", "lowest", "[95 %]"]
        yield Table(f"{name}: gaps between values of {column}", head, lines, caption)
    for column, table in scorer.get("by", {}).items():
        lines = []
        for value, part in table.items():
            rates_of = [percent(part.get(key)) for key in ("false_alarms", "found")]
            counts = [f"{part['n_fake']} / {part['n_real']}", part["auc"]["groups"], part["against"]]
            lines.append([value, part["auc"], *rates_of, *counts])
        if lines:
            head = [column, "AUC [95 %]", "false alarms", "found", "fake / real", "groups", "against"]
            yield Table(f"{name}: by {column}", head, lines)
    yield from _clips_and_words(name, scorer)


def _clips_and_words(name: str, scorer: Result) -> Iterator[Table]:
    """The tables that only some tasks or manifests have."""
    if faces := scorer.get("faces"):
        line = [faces["auc"], faces["eer"], faces["n"], faces["fake_pictures_with_several"]]
        head = ["AUC [95 %]", "EER", "faces", "fakes with several"]
        caption = "With their pictures' labels: in a forged group, faces that nobody touched count as fake."
        yield Table(f"{name}: every face", head, [line], caption)
    if videos := scorer.get("videos"):
        lines = [[v["pooling"], v["auc"], v["eer"], v["n"], v["auc"]["groups"]] for v in (videos, videos["sbi"])]
        yield Table(f"{name}: clips", ["pooling", "AUC [95 %]", "EER", "clips", "groups"], lines)
    if confusion := scorer.get("confusion"):
        columns = list(next(iter(confusion.values())))
        lines = [[truth, *(counts[c] for c in columns)] for truth, counts in confusion.items()]
        yield Table("Confusion", ["true, then said", *columns], lines)
    if invalid := scorer.get("invalid_answers"):
        yield Table("Answers that could not be read", ["counted wrong"], [[text or "(empty)"] for text in invalid])
    if polarity := scorer.get("by_polarity"):
        keys = ("accuracy", "recall_real", "recall_fake", "n")
        lines = [[meaning, *(p[key] for key in keys)] for meaning, p in polarity.items()]
        yield Table("By what yes means", ["", *(key.replace("_", " ") for key in keys)], lines)
    if text := scorer.get("text"):
        lines = [[k, p["value"], p.get("by") or p.get("reason", "")] for k, p in text.items() if k != "n"]
        yield Table(f"{name}: text against references", ["", "value", "by, or why not"], lines, f"n = {text['n']}")


def _plots(result: Result) -> Iterator[Json]:
    """Raises ImportError without matplotlib, where there is something to plot."""
    curves = {name: s["curves"] for name, s in result.get("scorers", {}).items() if s.get("curves", {}).get("roc")}
    if curves:
        yield _plot("roc", lambda ax: _roc(ax, curves), "ROC: fakes found against reals called fake.")
        calibrated = {n: c for n, c in curves.items() if c["reliability"] and not n.startswith("expert:")}
        calibrated = calibrated or {n: c for n, c in curves.items() if c["reliability"]}
        caption = (
            "Calibration: at even odds, how many of the pictures with this P(fake) are fake. A dot's size: pictures."
        )
        yield _plot("reliability", lambda ax: _reliability(ax, calibrated), caption)
        caption = "Risk against coverage: wrong answers among the surest, at 0.5."
        yield _plot("risk", lambda ax: _risk(ax, curves), caption)
    for name, scorer in result.get("scorers", {}).items():
        rows = [
            (f"{column} {value}", part["auc"])
            for column, table in scorer.get("by", {}).items()
            for value, part in table.items()
            if part["auc"]["value"] is not None
        ]
        if rows:
            height = 0.8 + 0.27 * len(rows)
            yield _plot(f"by-{name}", partial(_forest, rows=rows), f"{name}: AUC by source and method, 95 %.",
                        size=(9.5, height), wide=True)  # fmt: skip
            break  # the first scorer is the verdict; the tables show the others
    if robust := result.get("robustness"):
        caption = "AUC under changes, on the pictures that keep their face; hollow: the same pictures unchanged."
        columns = list(next(iter(robust.values()))["auc"])
        height = 1.0 + 0.2 * len(robust) * (len(columns) + 1) / 2
        yield _plot("robustness", lambda ax: _robustness(ax, robust, columns), caption, size=(9.5, height), wide=True)


def _plot(
    name: str, draw: Callable[[Axes], None], caption: str, *, size: tuple[float, float] = (3.9, 4.2), wide: bool = False
) -> Json:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 9, "text.color": INK,
        "axes.edgecolor": LINE, "axes.labelcolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT,
        "xtick.labelcolor": SOFT, "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False,
        "grid.color": LINE, "grid.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 8,
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        axes.grid(True)
        axes.set_axisbelow(True)
        draw(axes)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"#0[0-9a-f]{5}", lambda hit: f"var(--{_VARIABLES[hit[0]]})" if hit[0] in _VARIABLES else hit[0], svg)
    # Each plot prefixes the names of its clip paths, so that one plot does not cut another.
    svg = re.sub(r"(\bid=\"|url\(#|href=\"#)", rf"\g<1>{name}-", svg)
    label = caption.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return {"svg": svg, "caption": caption, "wide": wide}


def _colour(k: int) -> str:
    return COLOURS[k % len(COLOURS)]


def _legend(ax: Axes, curves: Result) -> None:
    """Below the plot, where it hides no curve."""
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=min(2, len(curves)), handlelength=1.4)


def _square(ax: Axes, x: str, y: str) -> None:
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=x, ylabel=y)


def _lines(ax: Axes, curves: Result, kind: str, drawstyle: Any = "default") -> None:
    """A line a scorer, the first of them bold."""
    for k, (name, curve) in enumerate(curves.items()):
        x, y = zip(*curve[kind], strict=True)
        ax.plot(x, y, color=_colour(k), lw=2.2 if k == 0 else 1.2, label=name, drawstyle=drawstyle)


def _roc(ax: Axes, curves: Result) -> None:
    _lines(ax, curves, "roc", "steps-post")
    ax.plot([0, 1], [0, 1], color=SOFT, lw=0.8, ls=":")
    _square(ax, "reals called fake", "fakes found")
    _legend(ax, curves)


def _reliability(ax: Axes, curves: Result) -> None:
    ax.plot([0, 1], [0, 1], color=SOFT, lw=0.8, ls=":")
    for k, (name, curve) in enumerate(curves.items()):
        bins = curve["reliability"]
        x, y, n = [b["mean"] for b in bins], [b["fake"] for b in bins], [b["n"] for b in bins]
        ax.plot(x, y, color=_colour(k), lw=1.8 if k == 0 else 0.9, label=name)
        ax.scatter(x, y, s=[8 + 160 * v / sum(n) for v in n], color=_colour(k), linewidths=0)
    _square(ax, "P(fake)", "share of fakes")
    _legend(ax, curves)


def _risk(ax: Axes, curves: Result) -> None:
    _lines(ax, curves, "risk_coverage")
    ax.set(xlim=(0, 1.01), ylim=(-0.005, None), xlabel="share answered", ylabel="wrong of those")
    _legend(ax, curves)


def _forest(ax: Axes, rows: Sequence[tuple[str, Result]]) -> None:
    for y, (_, auc) in enumerate(rows):
        low, high = auc["interval"] or (auc["value"], auc["value"])
        ax.plot([low, high], [y, y], color=_colour(0), lw=2.2, solid_capstyle="round")
        ax.plot(auc["value"], y, "o", color=_colour(0), ms=6)
    _rows(ax, [label for label, _ in rows])


def _robustness(ax: Axes, robust: Result, columns: Sequence[str]) -> None:
    width = 0.8 / len(columns)
    for k, column in enumerate(columns):
        for row, part in enumerate(robust.values()):
            auc, y = part["auc"][column], row - 0.4 + (k + 0.5) * width
            if auc["value"] is None:
                continue
            low, high = auc["interval"] or (auc["value"], auc["value"])
            ax.plot([low, high], [y, y], color=_colour(k), lw=1.4)
            ax.plot(part["unchanged"][column], y, "o", mec=_colour(k), mfc="none", ms=4)
            ax.plot(auc["value"], y, "o", color=_colour(k), ms=4, label=column if row == 0 else None)
    _rows(ax, list(robust))
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.08), ncols=4)


def _rows(ax: Axes, labels: Sequence[str]) -> None:
    ax.axvline(0.5, color=SOFT, lw=0.8, ls=":")
    ax.set(yticks=range(len(labels)), ylim=(len(labels) - 0.4, -0.6), xlabel="AUC", xlim=(None, 1.01))
    ax.set_yticklabels(labels)
