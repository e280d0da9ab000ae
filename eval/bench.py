"""Runs a task: chooses samples, judges and measures them, and writes the results with their settings and hashes."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from eval import cuebench, looks, models, page
from eval.rows import digest, say
from eval.scoring import JPEG_QUALITY, LONGEST_SIDE, value_of
from eval.task import Options, Outcome, Run, Task
from eval.tasks import assess, demographics, describe, detect, experts, words
from x2dfd.errors import X2DFDError
from x2dfd.files import Json, file_sha256, locked_folder, write_bytes, write_text
from x2dfd.manifest import Sample, manifest_sha256, read_manifest

ROOT = Path(__file__).resolve().parent.parent
CODE = ("--", ".", ":!*.md", ":!eval/results")
"""The paths, to git, that decide a result."""
Result = Json
"""What `result.json` holds."""

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(detect.TASK, describe.TASK, experts.EXPERTS, experts.LOCATE),
        *(words.ANSWER, words.CLASSIFY, words.CHAT, assess.TASK, demographics.TASK),
    )
}


def run(options: Options) -> Result:
    """Judges, measures, writes the files and returns the content of `result.json`. Raises X2DFDError."""
    task, manifest = TASKS[options.task], Path(os.path.abspath(options.data))
    if manifest.is_dir():
        manifest = cuebench.open_set(manifest)
    check(options)
    samples, skipped = choose(task, manifest, options)
    request = Run(options, manifest, manifest_sha256(manifest), task.version, samples, skipped)
    with locked_folder(options.out):
        outcome = task.run(request)
        result: Result = as_json(_result(request, task, outcome))
        if options.reporting is not None:
            result["reporting"] = looks.count(options.reporting, result)
        outcome.store.finish(outcome.samples or samples, outcome.rows, outcome.origin, manifest.parent)
        text = json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False)
        write_bytes(options.out / "result.json", (text + "\n").encode())
        write_text(options.out / "result.html", page.render(result))
    return result


def _result(request: Run, task: Task, outcome: Outcome) -> Result:
    options, samples = request.options, outcome.samples or request.samples
    labels = Counter(s.label for s in samples)
    stated = outcome.origin["model"] | outcome.stated
    packages = {name: version(name) for name in ("numpy", "scikit-learn", "pillow", "pyarrow")}
    return {
        "task": {"name": task.name, "version": task.version, "unit": task.unit},
        "data": {
            "manifest": request.manifest.name,
            "sha256": request.sha256,
            "samples_sha256": digest([s.id, s.label] for s in samples),
            "pictures_sha256": digest([row.id, row.sha256] for row in outcome.rows),
            "split": options.split,
            "limit": options.limit,
            "n": len(samples),
            "n_real": labels["real"],
            "n_fake": labels["fake"],
            "n_groups": len({s.group for s in samples}),
        },
        "model": {"name": outcome.model, "mode": outcome.mode, "stated": stated},
        "hashes": {"manifest": request.sha256} | hashes(options.choice, stated),
        "settings": {
            "equalise": f"JPEG {JPEG_QUALITY}, longest side {LONGEST_SIDE}" if options.equalise else None,
            "change": outcome.change,
            "seed": options.seed,
            "interval": "95 %, by groups (eval.stats)",
            "scores_of": outcome.scores_of,
            "options": _chosen(options),
        },
        "code": code_state(),
        "versions": outcome.origin["versions"] | {"python": platform.python_version()} | packages,
        "device": device(),
        "failures": dict(sorted(Counter(row.reason for row in outcome.rows if row.error).items())),
        **outcome.measured,
    }


def _chosen(options: Options) -> Json:
    """The options, as a user gives them, that decide which scores there are."""
    loading, experts = options.choice.loading, options.experts
    given: dict[str, object] = {"tools": options.choice.tools, "experts": experts}
    given |= {name: loading.get(name) for name in ("mode", "dtype", "bits")}
    return {name: str(value) for name, value in given.items() if value is not None}


def as_json(value: Any) -> Any:
    """The value in JSON's own types: figures and other dataclasses as objects, tuples as lists."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value


def check(options: Options) -> None:
    """Raises X2DFDError for a model that the task cannot take, before anything is read or opened."""
    choice, task = options.choice, options.task
    models.check(choice)
    if options.changes is not None and task not in ("detect", "experts"):
        raise X2DFDError("only the tasks experts and detect take --changes", code="changes_not_for_task")
    if task == "detect":
        options.one_change()
    if choice.model == "template" and task != "describe":
        raise X2DFDError(
            "--model template reads the label: it is for the task describe alone", code="template_knows_label"
        )
    incomplete = options.experts or choice.loading.get("mode") or not choice.has_mllm
    if options.with_mllm and (task != "experts" or incomplete):
        raise X2DFDError(
            "--with-mllm needs the task experts, a calibrated model, and no --experts", code="with_mllm_not_for_run"
        )
    no_experts = choice.folder is None and not (choice.expert and task == "locate")
    if task in ("experts", "locate") and no_experts:
        allowed = "embedded, fusion or an adapter directory" + (", or expert:NAME" if task == "locate" else "")
        raise X2DFDError(
            f"{task} judges experts: give --model {allowed}, and --experts A,B for some of them alone",
            code="model_not_for_task",
        )


def choose(task: Task, manifest: Path, options: Options) -> tuple[list[Sample], int]:
    """The samples to judge, and how many were skipped because the task has no truth for them."""
    samples = read_manifest(manifest, split=options.split)
    if options.split is None and any(s.split == "train" for s in samples):
        say("no --split given: samples of the train split are judged too")
    usable = [s for s in samples if task.needs is None or task.needs(s)]
    skipped, samples = len(samples) - len(usable), usable
    if not samples:
        raise X2DFDError(
            f"{manifest.name}: none of the chosen samples has {task.truth}, so there is nothing to {task.name}",
            code="nothing_to_measure",
        )
    # `assess` draws its own pictures: as many real ones as fakes.
    if task.name != "assess" and options.limit is not None and options.limit < len(samples):
        chosen = np.random.default_rng(options.seed).permutation(len(samples))[: options.limit]
        samples = [samples[i] for i in sorted(chosen)]
    check_clips(samples)
    for column in options.by:
        if column not in ("source", "method") and not any(value_of(s, column) for s in samples):
            raise X2DFDError(f"--by {column}: the manifest has no such column, or it is empty", code="column_missing")
    return samples, skipped


def check_clips(samples: Iterable[Sample]) -> None:
    """Raises X2DFDError when one clip id names frames of different clips, which would merge their scores."""
    seen: dict[str, tuple[str, ...]] = {}
    for s in samples:
        traits = (s.label, s.method, s.source, s.group)
        if s.video and seen.setdefault(s.video, traits) != traits:
            raise X2DFDError(f"video {s.video!r} is two clips: {seen[s.video]} and {traits}", code="clips_share_id")


def hashes(choice: models.Choice, stated: Json) -> Json:
    """SHA-256 of base weights, adapter, experts' weights, prompt and calibration; None for those that are not used."""
    calibration = choice.folder / "calibration.json" if choice.folder else None
    model = stated | (stated.get("mllm") or {})  # task `experts` states its MLLM apart
    return {
        "base": (model.get("base") or {}).get("sha256") or None,
        "adapter": model.get("adapter_sha256"),
        "experts": {name: state.split()[-1] for name, state in (model.get("experts") or {}).items()},
        "prompt": model.get("prompt_sha256"),
        "calibration": file_sha256(calibration) if calibration and calibration.is_file() else None,
    }


def code_state() -> Json | None:
    """Commit, and whether tracked files differ from it; None outside a git checkout. Documents and result files do not
    count: they change no number, and a run must not make the next one dirty."""
    git = shutil.which("git")
    if git is None:
        return None

    def run_git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([git, "-C", str(ROOT), *words], capture_output=True, text=True, check=False)

    commit, status = run_git("rev-parse", "HEAD"), run_git("status", "--porcelain", "--untracked-files=no", *CODE)
    if commit.returncode or status.returncode:
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def device() -> str:
    torch = sys.modules.get("torch")
    return str(torch.cuda.get_device_name(0)) if torch and torch.cuda.is_available() else f"cpu ({platform.machine()})"
