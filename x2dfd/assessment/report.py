"""An assessment as a file, a Markdown page and a chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from x2dfd.assessment.ask import Pair
from x2dfd.assessment.rank import Finding, Interval
from x2dfd.errors import X2DFDError
from x2dfd.files import Json, checked, parse_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Assessment:
    """The ranking, its controls, and its inputs."""

    model: str
    manifest_sha256: str | None
    questions_sha256: str
    split: str | None
    limit: int | None
    seed: int
    n_real: int
    n_fake: int
    n_groups: int
    n_unusable: int  # files of the manifest (any split) without a usable face
    n_unknown_truth: int  # fakes without recorded cues, which comparisons of presence leave out
    ranked_by: str
    rule: str
    cues: tuple[Finding, ...]  # best first
    questions: tuple[Finding, ...]  # best first, without the controls
    unrelated: tuple[Finding, ...]  # the control questions, best first
    control: Json  # the same ranking with shuffled truth: mean and 95th percentile of the top-k mean AUC
    stability: Json  # Spearman correlation of the rankings of two halves of the groups
    random: Json | None  # unrelated questions beside ours, fake against real
    uncovered: tuple[Pair, ...]  # weak cues that no expert covers

    def published(self) -> list[Json]:
        """The question list in X2-DFD's result shape, best balanced accuracy first."""
        keys = ("question", "real_accuracy", "fake_accuracy", "balanced_accuracy")
        rows = [{k: getattr(f, k) for k in keys} for f in self.questions]
        return sorted(rows, key=lambda r: -float(r["balanced_accuracy"]))

    def to_dict(self) -> Json:
        return {**asdict(self), "published": self.published()}

    @classmethod
    def from_dict(cls, data: Json) -> Self:
        return checked(cls, {key: value for key, value in data.items() if key != "published"})  # which is derived


def read_assessment(path: Path) -> Assessment:
    """Read `assessment.json` (or the folder that holds it). Raises X2DFDError when it is not one."""
    file = path / "assessment.json" if path.is_dir() else path
    try:
        return Assessment.from_dict(parse_json(file.read_bytes()))
    except (OSError, ValueError, AttributeError) as error:
        raise X2DFDError(
            f"{file}: not an assessment ({error}); make one: x2dfd assess --data … --out …", code="not_an_assessment"
        ) from error


def strong_cues(assessment: Assessment) -> list[Pair]:
    """The strong cues, best first."""
    return [f.cue for f in assessment.cues if f.strong and f.cue]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _images(a: Assessment) -> str:
    split = f", split {a.split}" if a.split else ""
    return f"{a.n_fake} fake and {a.n_real} real images of {a.n_groups} groups{split}"


def _rows(findings: Sequence[Finding]) -> list[str]:
    rows = []
    for rank, f in enumerate(findings, start=1):
        cells = [str(rank), f.question.replace("|", "\\|")] if f.question else [str(rank)]
        cells.append(" · ".join(f.cue) if f.cue else "–")
        d, basis = f.deciding, "cue present" if f.decided_by == "present" else "fake"
        cells += [_number(d.auc), "–" if d.interval is None else f"{d.interval[0]:.3f} to {d.interval[1]:.3f}"]
        cells += [f"{basis}: {d.n_positive} / {d.n_negative}", _number(f.overall.auc), _number(f.balanced_accuracy)]
        cells += [_number(f.yes_rate), "strong" if f.strong else "weak", ", ".join(f.experts) or "none"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def table(a: Assessment) -> str:
    """The assessment as a Markdown page."""
    strong = sum(f.strong for f in a.cues)
    columns = "AUC | 95 % interval | positive / negative | AUC fake/real | balanced accuracy | yes-bias |  | experts"

    def grid(first: str, findings: Sequence[Finding]) -> list[str]:
        head = f"| {first} | {columns} |"
        return [head, "|" + "---|" * (head.count("|") - 1), *_rows(findings), ""]

    control, stability = a.control["cues"], a.stability["cues"]
    lines = [
        f"# What {a.model} sees",
        "",
        f"{_images(a)}; {len(a.questions)} questions on {len(a.cues)} cues; seed {a.seed}.",
        "",
        f"- **{strong} strong, {len(a.cues) - strong} weak.** {a.rule[0].upper()}{a.rule[1:]}.",
        f"- Ranked by: {a.ranked_by}.",
        f"- Best {control['k']} cues: mean AUC {_number(control['top_mean_auc'])}; with shuffled truth "
        f"{_number(control['shuffled_mean'])} (95th percentile {_number(control['shuffled_p95'])}).",
        f"- Two halves of the groups: rank correlation {_number(stability['spearman_mean'])}; best of one half have "
        f"mean AUC {_number(stability['held_out_top_mean_auc'])} on the other.",
    ]
    if a.random:
        cues, random = a.random["cue_questions"], a.random["unrelated_questions"]
        lines.append(
            f"- Fake against real, unrelated questions: best {random['best']} {_number(random['best_mean_auc'])}, "
            f"all {_number(random['mean_auc'])}; cue questions: best {cues['best']} {_number(cues['best_mean_auc'])}, "
            f"all {_number(cues['mean_auc'])}."
        )
    if a.n_unknown_truth:
        lines.append(f"- {a.n_unknown_truth} fakes without recorded cues are left out where presence is compared.")
    blind = ", ".join(f"{area} · {artifact}" for area, artifact in a.uncovered) or "none"
    lines += [f"- Weak, and covered by no expert: {blind}.", "", "## Cues", ""]
    lines += [*grid(" | cue", a.cues), "## Questions", "", *grid(" | question | cue", a.questions)]
    if a.unrelated:
        lines += ["## Unrelated questions (control)", "", *grid(" | question | cue", a.unrelated)]
    return "\n".join(lines)


_GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Eyes and forehead": ("#2f6db3", ("eyes", "eyebrows", "forehead")),
    "Mouth and jaw": ("#c2413b", ("mouth", "teeth", "jaw")),
    "Nose and cheeks": ("#c98a1b", ("nose", "cheeks")),
    "Skin": ("#8a5a3c", ("skin",)),
    "Contour, hair, ears, neck": ("#2e8b6f", ("face-contour", "hair", "ears", "neck")),
    "Surroundings": ("#6b7280", ("background", "accessories")),
    "Whole image": ("#7a4fa3", ("whole-image",)),
}


def _panel(axes: Axes, findings: Sequence[Finding], colour: str, limits: Interval, bar: float | None) -> None:
    """One area's bars; `bar` is the value that the best reach by chance."""
    for row, f in enumerate(findings):
        auc = f.deciding.auc or 0.0
        axes.barh(row, auc - 0.5, left=0.5, height=0.72, color=colour, alpha=1.0 if f.strong else 0.28)
        if f.deciding.interval:
            axes.plot(f.deciding.interval, (row, row), color="#222222", linewidth=0.9, solid_capstyle="butt")
        face = "#222222" if f.decided_by == "present" else "white"
        axes.plot(auc, row, "o", markersize=3.2, markerfacecolor=face, markeredgecolor="#222222", markeredgewidth=0.7)
    axes.set_yticks(range(len(findings)), [f"{f.area} · {f.artifact}" for f in findings], fontsize=8.5)
    for label, f in zip(axes.get_yticklabels(), findings, strict=True):
        label.set_color("#111111" if f.strong else "#777777")
    axes.set_xlim(*limits)
    axes.set_ylim(len(findings) - 0.4, -0.6)
    axes.axvline(0.5, color="#888888", linewidth=0.8)
    if bar is not None:
        axes.axvline(bar, color="#b00020", linewidth=1.0, linestyle=(0, (4, 2)))
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, length=2, color="#999999")
    axes.xaxis.grid(True, color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def chart(a: Assessment, path: Path) -> bool:
    """Draw the cues' AUC with intervals, by area; False when matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False

    groups = [
        (title, colour, [f for f in a.cues if f.area in areas and f.deciding.auc is not None])
        for title, (colour, areas) in _GROUPS.items()
    ]
    groups = [g for g in groups if g[2]]
    # Two columns of about equal length; a panel's title is worth two bars.
    cost = [len(g[2]) + 2.5 for g in groups]
    total, cut = sum(cost), 0
    while cut < len(groups) and sum(cost[: cut + 1]) <= total / 2 + 3:
        cut += 1
    columns = [c for c in (groups[: max(cut, 1)], groups[max(cut, 1) :]) if c]
    tallest = max((sum(len(g[2]) + 2.5 for g in c) for c in columns), default=3)
    ends = [e for f in a.cues for e in (f.deciding.interval or (f.deciding.auc or 0.5,) * 2)]
    low, high = min([0.4, *ends]) - 0.02, max([0.7, *ends]) + 0.02
    height = 0.2 * tallest + 2.1
    figure = Figure(figsize=(6.6 * max(len(columns), 1), height), facecolor="white")
    FigureCanvasAgg(figure)
    control = a.control["cues"]
    strong = sum(f.strong for f in a.cues)
    top = 1 - 1.15 / height
    figure.text(
        0.02,
        1 - 0.35 / height,
        f"What {a.model} sees: {strong} strong of {len(a.cues)} cues",
        fontsize=15,
        weight="bold",
        va="center",
    )
    note = f"AUC of P(yes) with 95 % interval. {_images(a)}; best {control['k']} cues "
    note += f"{_number(control['top_mean_auc'])}, shuffled truth {_number(control['shuffled_mean'])}"
    figure.text(0.02, 1 - 0.68 / height, note + ".", fontsize=9.5, color="#444444", va="center")
    unit = (top - 0.75 / height) / tallest
    for c, column in enumerate(columns):
        left = (c + 0.27) / len(columns)
        width = 0.70 / len(columns)
        y = top
        for title, colour, findings in column:
            axes = figure.add_axes((left, y - unit * (len(findings) + 1), width, unit * len(findings)))
            y -= unit * (len(findings) + 2.5)
            axes.set_title(title, loc="left", fontsize=10.5, weight="bold", color=colour, pad=4)
            _panel(axes, findings, colour, (low, high), control["shuffled_p95"])
    figure.text(
        0.02,
        0.22 / height,
        "Full colour: strong.  Pale: weak.  Filled dot: cue truly present against not.  Hollow: fake against real.  "
        "Dashed: 95th percentile of the shuffled control.",
        fontsize=9,
        color="#444444",
    )
    figure.savefig(path, dpi=140)
    return True
