"""Many models over the same pictures, in one table.

    python eval/side_by_side.py --data manifest.csv --split val --out build/models
    python eval/side_by_side.py --data build/cuebench --out build/models --model embedded --model expert:clip \\
        --model "NAME --served http://localhost:8000/v1 --tools blending,clip"

Each model is a run of `eval/run_bench.py`, in a folder of its own below --out (`detect/NAME`; `describe/NAME` of what
writes texts and of its baselines), so it gets the same pictures in the same form, is judged as it would be alone, and
goes on where it was cut off. A model that cannot be had is told in a line, and the others go on. The table is
`result.json`; `eval/tables.py` writes it as `models`. Options that are not named here are those of `run_bench.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval import models, paired, run_bench
from eval.experts_bench import BESIDE
from eval.scoring import Row, say
from x2dfd.errors import X2DFDError
from x2dfd.experts import BUILTIN
from x2dfd.files import write_text

if TYPE_CHECKING:
    from x2dfd.mllm import LocalMLLM

VERSION = "2"
ALL = ("embedded", models.FUSION, *(f"{models.EXPERT}{n}" for n in (*BUILTIN, *BESIDE)), *models.BASELINES)
"""What is compared unless models are named."""
TASKS = ("detect", "describe")
STAND_IN = "stand-in"


@dataclass(frozen=True)
class Entry:
    """A run that is wanted."""

    label: str
    task: str
    args: argparse.Namespace  # as `run_bench.run` takes them


def entries(chosen: Sequence[str], tasks: Sequence[str], out: Path, rest: Sequence[str]) -> list[Entry]:
    """The runs, a task after the other; of each task those that have an answer to it.

    `chosen`: what stands behind --model, with further options of that model. Raises X2DFDError for options that
    contradict each other, and for a model that is named twice.
    """
    found = []
    for task in tasks:
        labels = set()
        for words in chosen:
            args = run_bench.parse([task, *rest, "--out", str(out), "--model", *shlex.split(words)])
            models.check(args)
            label = models.label(args)
            if label in labels:
                raise X2DFDError(f"{label} is named twice")
            labels.add(label)
            if args.model == "template" and task == "detect":
                continue  # it is told the label
            if task == "describe" and not models.has_mllm(args.model) and args.model not in models.BASELINES:
                continue
            args.out = str(out / task / re.sub(r"[^\w.+-]+", "-", label))
            found.append(Entry(label, task, args))
    return found


def compare(wanted: Sequence[Entry]) -> Row:
    """Runs all of them and returns the table. Raises X2DFDError when none could be run."""
    results: dict[str, list[tuple[Entry, Row]]] = {task: [] for task in TASKS}
    left_out: list[Row] = []
    for entry in wanted:
        say(f"== {entry.task}: {entry.label}")
        try:
            result = run_bench.run(entry.args)
            if entry.task == "describe" and _own(entry) not in result["scorers"]:
                raise X2DFDError("it wrote no text")
            results[entry.task].append((entry, result))
        except X2DFDError as error:
            say(f"left out: {entry.task} of {entry.label}: {error}")
            left_out.append({"task": entry.task, "model": entry.label})  # the reason may name folders of this machine
    made = [result for part in results.values() for _, result in part]
    if not made:
        raise X2DFDError("no model could be run")
    for part in results.values():
        if len({(r["data"]["samples_sha256"], r["data"]["pictures_sha256"]) for _, r in part}) > 1:
            raise X2DFDError("pictures changed between the models: delete --out and run all of them again")
    first = made[0]
    return {
        "task": {"name": "models", "version": VERSION},
        "data": {task: part[0][1]["data"] for task, part in results.items() if part},
        "settings": {k: v for k, v in first["settings"].items() if k != "scores_of"},
        "code": first["code"],
        "versions": first["versions"],
        "device": first["device"],
        "detect": _detected(results["detect"]),
        "describe": [_described(entry, result) for entry, result in results["describe"]],
        "left_out": left_out,
    }


def _detected(runs: Sequence[tuple[Entry, Row]]) -> list[Row]:
    """A row a verdict (and one for the MLLM alone beside it), each compared with the first."""
    rows: list[Row] = []
    first = None
    for entry, result in runs:
        deciding = next(iter(result["scorers"]))
        scores = paired.read_scores(Path(entry.args.out), result)
        alone = ["mllm"] if "mllm" in result["scorers"] and models.has_mllm(entry.args.model) else []
        # In the mode of the paper the verdict is the MLLM's own.
        for name in [deciding, *(alone if deciding != "paper" else [])]:
            scorer = result["scorers"][name]
            column = {"mllm": "p_mllm"}.get(name, name if name.startswith(models.EXPERT) else "p_fake")
            of_run = scores[column]
            first = first or of_run
            draws = {"n": result["settings"]["bootstrap"], "seed": result["settings"]["seed"]}
            answers = scorer.get("answers")
            rows.append(
                {
                    "model": entry.label if name == deciding else f"{entry.label}: MLLM alone",
                    "stated": result["model"]["stated"],
                    "n": result["data"]["n"],
                    "n_scored": scorer["n_scored"],
                    "unscored": scorer["unscored"],
                    **{k: scorer["overall"][k] for k in ("auc", "average_precision", "tpr_at_fpr_0.05", "ece_15")},
                    "false_alarms": answers["false_alarms"] if answers else None,
                    "answered": answers["coverage"] if answers else None,
                    "against_first": None if of_run is first else paired.paired(of_run, first, **draws),
                }
            )
    return rows


def _own(entry: Entry) -> str:
    """Where a result of `describe` keeps what is of the model itself, not of the baselines beside it."""
    return entry.label if entry.args.model in models.BASELINES else "model"


def _described(entry: Entry, result: Row) -> Row:
    scorer = result["scorers"][_own(entry)]
    told = ("n_fake", "n_real", "invented_on_reals", "distinct_texts", "contradictions", "text")
    row = {"model": entry.label, "stated": result["model"]["stated"], "n": result["data"]["n"]}
    row |= {f"{what}_f1": scorer[what]["micro_f1"] if what in scorer else None for what in ("areas", "cues")}
    return row | {key: scorer.get(key) for key in told}


@contextlib.contextmanager
def stand_in(port: int) -> Iterator[str]:
    """The embedded model behind an OpenAI-compatible server on `port`; yields what --model takes for it."""
    import x2dfd
    from eval.stand_in import Behind, StandIn
    from x2dfd.adapter import EMBEDDED

    # Only an address would make it another kind.
    behind = Behind(cast("LocalMLLM", x2dfd.load().mllm))
    try:
        server = StandIn(behind, models=[STAND_IN], tokenize=behind.tokenize, keep=False, port=port)
    except OSError as error:
        raise X2DFDError(f"--stand-in {port}: {error.strerror}") from error
    with server as endpoint:
        yield shlex.join([STAND_IN, "--served", endpoint.url, "--adapter", str(EMBEDDED)])


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when at least one model ran, 2 on what the user has to mend."""
    parser = argparse.ArgumentParser(
        description="Runs many models over the same pictures; other options are those of run_bench.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for result.json and a folder a run")
    parser.add_argument(
        "--model",
        action="append",
        metavar="MODEL",
        help=f"as of run_bench.py, with its own options in quotes; repeat it (default: {', '.join(ALL)})",
    )
    parser.add_argument("--tasks", default=",".join(TASKS), help="of detect,describe (default: both)")
    parser.add_argument(
        "--stand-in", type=int, metavar="PORT", help="the embedded model too, as a served one at this port"
    )
    own, rest = parser.parse_known_args(argv)
    tasks = own.tasks.split(",")
    if not set(tasks) <= set(TASKS):
        parser.error(f"--tasks: some of {','.join(TASKS)}")
    try:
        with contextlib.ExitStack() as stack:
            chosen = list(own.model or ALL)
            if own.stand_in is not None:
                chosen.append(stack.enter_context(stand_in(own.stand_in)))
            wanted = entries(chosen, tasks, own.out, rest)
            if wanted and wanted[0].args.compare:
                parser.error("--compare is of one model: run_bench.py has it")
            result = compare(wanted)
    except X2DFDError as error:
        say(f"error: {error}")
        return 2
    text = json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False)
    write_text(own.out / "result.json", text + "\n")
    from eval.tables import models as table

    print(table({"result": result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
