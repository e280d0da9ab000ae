"""Speed, side by side: `make bench`, or `python -m benchmarks.speed --out eval/results/speed.json` for the tables.

The cases of a comparison take turns in one process, on a CPU and on CUDA if there is one; times are medians with the
10th and 90th percentile. Ways of doing the same thing must give the same answers, or the run ends with an error (in 16
bits texts may differ, and the result lists them). Each time has its bound (benchmarks.roofline) and its share of it.

`--geometry llava-7b` replaces the model with LLaVA-1.5-7B of random weights, which are as fast as trained ones; `toy`
runs the same code on a toy in seconds. Both skip the comparisons that need a trained model (faces, experts, command).
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

import x2dfd
from x2dfd import prompts
from x2dfd.calibration import sigmoid
from x2dfd.cli import run_command
from x2dfd.errors import X2DFDError
from x2dfd.files import Json, write_text
from x2dfd.model_spec import Dtype, ModelSpec
from x2dfd.options import Model
from x2dfd.types import Cue, Evidence

ROOT = Path(__file__).resolve().parent.parent
AT_ONCE = (1, 8)  # faces in a call of an expert
BATCHES = (1, 8)  # pictures in a batch of `detect`
PICTURES = 24  # three batches, as each is decoded while the one before is judged
N_QUESTIONS, FEW = 100, 16  # cue questions about one face: of an assessment, of one picture's whole story
EVIDENCE = (
    (Evidence("tower", 0.93, cues=(Cue("mouth", "blur", 0.9), Cue("jaw", "blending", 0.6))),),
    (Evidence("tower", 0.08),),
    (Evidence("tower", 0.71, cues=(Cue("eyes", "colour", 0.8),)),),
    (Evidence("tower", None, "no score"),),
)
"""The experts' evidence on the faces whose verdicts are timed."""
FACES = 4  # of the verdicts against the published recipe
VIEWS = 400  # augmented views: a few in a hundred take twenty times as long as most
FOLLOW_UP = "What about the eyes?"
SAME = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.02, "int8": 0.01}
"""The largest allowed difference between the answers of two ways."""

Answers = Mapping[str, Any]  # name -> numbers or text; those of one name must agree between the ways of a comparison

Geometry = Literal["embedded", "llava-7b", "toy"]
"""The model that is timed."""
Place = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Case:
    """One way of doing something."""

    run: Callable[[], Answers | None]
    part: Callable[[], object] | None = None  # counted instead of `run`, if that takes long
    parts: int = 1  # so many parts make the whole
    per: int = 1  # pictures or faces in a run; seconds are of one of them
    reads: int = 0  # bytes that are read or written outside of torch operations


Cases = dict[str, Case]
Listed = tuple[str, Cases, int | None]  # name, ways, rounds; None for as many as asked


@dataclass(frozen=True)
class Bench:
    """The settings of every comparison."""

    rounds: int
    rates: Any  # roofline.Rates
    precision: str = "fp32"
    finish: Callable[[], object] = lambda: None  # waits until the device has computed everything


def timed(cases: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case, `rounds` numbers each: every case once a round, in alternating order, so that none has the
    quieter machine or the warmer cache."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds):
        for name in list(cases)[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            cases[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: Sequence[float], digits: int) -> dict[str, float]:
    """Median, p10 and p90."""
    quantiles = (("median", 50), ("p10", 10), ("p90", 90))
    return {name: round(float(np.percentile(values, q)), digits) for name, q in quantiles}


def compare(name: str, cases: Cases, bench: Bench, rounds: int | None = None) -> dict[str, Any]:
    """Time and bound of every way, and against the first: the ratio of times and the largest change of an answer.

    Raises X2DFDError when two ways give different answers.
    """
    from benchmarks.roofline import Operations

    print(f"{name} ...", file=sys.stderr, flush=True)
    bounds: dict[str, tuple[float, float]] = {}  # FLOPs, seconds
    for way, case in cases.items():  # operations are counted in the warm-up round
        with Operations() as operations:
            (case.part or case.run)()
        bench.finish()
        flop, seconds = operations.flop * case.parts, operations.bound(bench.rates) * case.parts
        bounds[way] = flop / case.per, (seconds + case.reads / bench.rates.bytes_per_s) / case.per
    answers: dict[str, Answers | None] = {}

    def run(way: str) -> Callable[[], None]:
        def call() -> None:
            answers[way] = cases[way].run()
            bench.finish()

        return call

    rounds = rounds or bench.rounds
    elapsed = timed({way: run(way) for way in cases}, rounds)
    first = next(iter(cases))
    each = {way: [s / cases[way].per for s in values] for way, values in elapsed.items()}
    result: dict[str, Any] = {"name": name, "rounds": rounds, "ways": {}}
    for way, values in each.items():
        seconds, (flop, bound) = spread(values, 5), bounds[way]
        row: dict[str, Any] = {"seconds": seconds, "gflop": round(flop / 1e9, 3), "bound_seconds": round(bound, 6)}
        row["share_of_bound"] = round(bound / seconds["median"], 3) if seconds["median"] else None
        if way != first:
            row["times_first"] = spread([a / b for a, b in zip(values, each[first], strict=True)], 2)
            answer, reference = answers[way], answers[first]
            if answer is not None and reference is not None:
                row["largest_difference"] = difference(f"{name}: {way}", reference, answer, SAME[bench.precision])
                row["other_texts"] = other_texts(reference, answer)
                if row["other_texts"] and bench.precision == "fp32":
                    raise X2DFDError(f"{name}: {way} gives another {row['other_texts'][0]}", code="results_differ")
        result["ways"][way] = row
        share = f"{100 * row['share_of_bound']:.0f} % of the bound" if row["share_of_bound"] else "no bound"
        times = f", {row['times_first']['median']:.2f} times the first" if "times_first" in row else ""
        print(f"  {way}: {seconds['median']:.4f} s, {share}{times}", file=sys.stderr, flush=True)
    return result


def difference(what: str, first: Answers, other: Answers, most: float) -> float:
    """The largest difference of the numbers. Raises X2DFDError when it is above `most`."""
    if set(first) != set(other):
        raise X2DFDError(f"{what} does not answer the same questions", code="results_differ")
    largest = 0.0
    for key, value in first.items():
        if not isinstance(value, str):
            gap = np.abs(np.asarray(value, float) - np.asarray(other[key], float))
            if not (gap <= most).all():  # nor for NaN
                raise X2DFDError(f"{what}: {key} differs by {gap.max():.1e}, above {most:.0e}", code="results_differ")
            largest = max(largest, float(gap.max(initial=0.0)))
    return largest


def other_texts(first: Answers, other: Answers) -> list[str]:
    """The names of the texts that differ. In 16 bits two words may be as likely, and each way then takes its own."""
    return sorted(key for key, value in first.items() if isinstance(value, str) and value != other[key])


# --- the comparisons ------------------------------------------------------------------------------------------------


def cue_questions(mllm: Any, crop: NDArray[np.uint8], questions: Sequence[str]) -> Cases:
    """P(yes) of every question: packed, in batches over copies of the prefix, one by one over it, and each in a stock
    forward pass of its own, as in the published code. All begin with the picture."""
    import torch

    from x2dfd.mllm import PACK

    def batched() -> Answers:
        encoding = mllm.encode(crop[None])
        probabilities = []
        for at in range(0, len(questions), PACK):
            batch = questions[at : at + PACK]
            suffixes = [mllm._suffix(q) for q in batch]
            with torch.inference_mode():
                mllm._prefill(encoding)
                cache = copy.deepcopy(encoding.cache)
                cache.batch_repeat_interleave(len(batch))
                last = mllm._run_suffixes(replace(encoding, cache=cache), suffixes).last
                probabilities.append(mllm._scores(last, mllm._yes_no_ids).double().softmax(-1)[:, 0].cpu().numpy())
        return {"P(yes)": np.concatenate(probabilities)}

    def single() -> Answers:
        encoding = mllm.encode(crop[None])
        return {"P(yes)": np.concatenate([mllm.yes_no_packed(encoding, [q]).p_yes for q in questions])}

    def stock(batch: Sequence[str]) -> Answers:
        return {"P(yes)": mllm.yes_no_plain(crop, batch).p_yes}

    sample = list(questions[:: max(1, len(questions) // 4)])[:4]
    return {
        "packed": Case(lambda: {"P(yes)": mllm.yes_no(crop, questions).p_yes}),
        "cached, in batches": Case(batched),
        "cached, one by one": Case(single),
        "one by one, stock forward pass": Case(
            lambda: stock(questions), lambda: stock(sample), len(questions) // len(sample)
        ),
    }


def verdicts(mllm: Any, crops: NDArray[np.uint8], questions: Sequence[str]) -> Cases:
    """P(fake) of each face: ours in one batch, and the published recipe, per picture: four tokens by `generate`, the
    labels' logits read at the fourth. If it generates no verdict, there is no answer to compare."""

    import torch

    def recipe() -> Answers | None:
        logits, stated = [], True
        for crop, question in zip(crops, questions, strict=True):
            text = prompts.render(mllm.processor, question)
            inputs = mllm.processor(images=Image.fromarray(crop), text=text, return_tensors="pt")
            with torch.inference_mode():
                out = mllm._model.generate(
                    **inputs.to(mllm.device, mllm._head.dtype), max_new_tokens=4, min_new_tokens=4, do_sample=False,
                    return_dict_in_generate=True, output_logits=True,
                )  # fmt: skip
            real, fake = out.logits[3][0, list(mllm.label_ids)].double().cpu().tolist()
            logits.append(fake - real)
            stated = stated and int(out.sequences[0, -1]) in mllm.label_ids
        return {"P(fake)": sigmoid(np.array(logits))} if stated else None

    return {
        "scored label, in a batch": Case(
            lambda: {"P(fake)": sigmoid(mllm.verdict_logits(mllm.encode(crops), questions))}, per=len(crops)
        ),
        "published recipe": Case(recipe, per=len(crops)),
    }


def whole_story(mllm: Any, crop: NDArray[np.uint8], question: str, cues: Sequence[str]) -> Cases:
    """Verdict, rationale, cue questions and a chat turn about one face: on one encoding, and each on its own."""

    def answered(encode: Callable[[], Any], apart: bool) -> Answers:
        logit = float(mllm.verdict_logits(encode(), [question])[0])
        start = prompts.rationale_start("fake" if logit > 0 else "real")
        [text] = mllm.write(encode(), [question], [start])
        groups = [[c] for c in cues] if apart else [list(cues)]
        p_yes = np.concatenate([mllm.yes_no_packed(encode(), group).p_yes for group in groups])
        [answer] = mllm.write(encode(), [question], [""], turns=[(f"{start} {text}".strip(), FOLLOW_UP)])
        return {"P(fake)": float(sigmoid(logit)), "rationale": text, "P(yes)": p_yes, "answer": answer}

    def once() -> Answers:
        encoding = mllm.encode(crop[None])
        return answered(lambda: encoding, apart=False)

    return {
        "one encoding": Case(once),
        "encoded each time": Case(lambda: answered(lambda: mllm.encode(crop[None]), True)),
    }


def training_step(model: Any, layers: Sequence[int]) -> Cases:
    """A LoRA step: over the tower's cached outputs, and with the tower's pass. The loss is the same."""
    import torch

    from finetune.config import FinetuneConfig
    from finetune.gpu import random_batch
    from finetune.models import CachedTower, tune
    from finetune.train import RowTrainer

    config = FinetuneConfig("", "", "", base="random", lora_dropout=0.0, base_dtype="float32")
    tuned, _ = tune(model, config)
    tuned.train()
    tower, strategy = model.model.vision_tower, model.config.vision_feature_select_strategy
    vision, head = model.config.vision_config, model.lm_head.weight
    image = (vision.image_size // vision.patch_size) ** 2
    rows, text = 2, 128
    batch = random_batch(model.config, rows, image + text, head.device)
    words = batch["input_ids"][:, image:]
    words[words == model.config.image_token_id] += 1
    batch["pixel_values"] = batch["pixel_values"].to(head.dtype)
    with torch.inference_mode():
        states = tower(batch["pixel_values"], output_hidden_states=True).hidden_states
        first = 1 if strategy == "default" else 0
        features = torch.stack([states[k][:, first:] for k in layers], 1).clone()
    stand_in = CachedTower(tuple(layers), strategy == "default")

    def step(module: Any, pixels: Any) -> Answers:
        model.model.vision_tower = module
        loss = RowTrainer.compute_loss(None, tuned, {**batch, "pixel_values": pixels})  # type: ignore[arg-type]
        loss.backward()
        tuned.zero_grad()
        return {"loss": float(loss.detach())}

    cached, computed = lambda: step(stand_in, features), lambda: step(tower, batch["pixel_values"])
    return {"cached tower features": Case(cached, per=rows), "tower computed": Case(computed, per=rows)}


def forged_pictures() -> list[Any]:
    """The demo's forged photo at several brightnesses, as PIL images."""

    from data_gen.demo import make_pair

    with tempfile.TemporaryDirectory() as folder, Image.open(make_pair(Path(folder))[1]) as opened:
        return [ImageEnhance.Brightness(opened).enhance(0.98 + 0.002 * k) for k in range(max(BATCHES))]


def augmented_views() -> Cases:
    """The views that the tower's training makes, of one photo and its forged twin; the same ones every time."""
    from data_gen.demo import make_pair
    from external_detectors.train.tower import Pictures
    from x2dfd.crops import load_crops

    with tempfile.TemporaryDirectory() as folder:
        real, fake = make_pair(Path(folder))
        manifest = Path(folder, "pair.csv")
        manifest.write_text(f"path,label,df_class\n{real},real,\n{fake},fake,FS\n")
        pictures = Pictures([load_crops(manifest)], (), seed=0)

    def make() -> None:
        for _ in itertools.islice(pictures, VIEWS):
            pass

    return {"on one core": Case(make, per=VIEWS)}


def expert_case(expert: Any, face: Any, n: int) -> Case:
    """An expert on n faces, other ones in every run, because experts keep what they computed of the last crops."""
    runs = itertools.count()

    def judge() -> Answers:
        moved = replace(face, crop=np.roll(face.crop, next(runs), axis=1))
        return {"score": expert.judge([moved] * n)[0].score}

    return Case(judge, per=n)


def batch_case(detector: Any, pictures: Sequence[Any], size: int) -> Case:
    """`detect` on all pictures, other ones in every run, because experts keep what they computed of the last crops."""
    sets = [[ImageEnhance.Contrast(p).enhance(contrast) for p in pictures] for contrast in (1.0, 0.98, 0.96)]
    turns = itertools.cycle(sets)

    def judge() -> Answers:
        reports = detector.detect_many(next(turns), batch_size=size, rationale=False)
        return {"p_fake": [r.verdict.p_fake for r in reports]}

    return Case(judge, per=len(pictures))


def of_detector(detector: Any, threads: int, tower_alone: bool) -> list[Listed]:
    """Comparisons of the whole pipeline; with `tower_alone`, only those that the tower's precision changes."""
    from skimage.data import astronaut

    from x2dfd.experts import BUILTIN, load_expert
    from x2dfd.faces import find_faces
    from x2dfd.fetch import require
    from x2dfd.media import load_media

    pixels = np.asarray(astronaut(), np.uint8)
    image = Image.fromarray(pixels)
    face = find_faces(pixels)[0]
    pictures = [ImageEnhance.Brightness(image).enhance(0.8 + 0.02 * k) for k in range(PICTURES)]
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95)
    data = stream.getvalue()

    # Another picture each time, because a detector caches the last encoding.
    turns, forged_turns = itertools.cycle(pictures), itertools.cycle(forged_pictures())

    def single(rationale: bool) -> None:
        detector.detect(next(turns), rationale=rationale)

    def explained() -> None:
        """The language model must write, which it does for a fake with a sign that an expert points at."""
        report = detector.detect(next(forged_turns))
        if "rationale" not in report.timings:
            raise X2DFDError("the language model wrote no text about the forged picture", code="no_text")

    weights = (require("base") / "model.safetensors").stat().st_size

    def command(whole: bool) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "face.jpg")
            path.write_bytes(data)
            place, precision = detector.info.runs_on.replace(",", " ").split()[:2]
            words = ["detect", str(path), "--json", "--no-rationale", "--threads", str(threads)]
            words = ["-m", "x2dfd.cli", *words, "--device", place, "--dtype", precision]
            with subprocess.Popen(
                [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
            ) as run:
                assert run.stdout is not None
                line = run.stdout.readline()
                if whole:
                    run.communicate()
                else:
                    run.kill()  # the answer is there; the rest is the interpreter's shutdown
            if '"p_fake"' not in line or (whole and run.returncode):
                raise X2DFDError(f"the command ended with {run.returncode}, first line {line!r}", code="command_failed")

    sizes = {f"{n} at a time": batch_case(detector, pictures, n) for n in BATCHES}
    warm = {"verdict": Case(lambda: single(False)), "verdict and rationale of a fake": Case(explained)}
    decode = Case(lambda: {"format": load_media(data).format}, reads=len(data) + pixels.nbytes)
    first, ended = (Case(partial(command, whole), part=lambda: single(False), reads=weights) for whole in (False, True))
    comparisons: list[Listed] = [
        ("warm, one face", warm, None),
        ("detect, a picture", sizes, 2),
        ("the command, from its start", {"to the first verdict": first, "to its end": ended}, 2),
    ]
    if tower_alone:
        return comparisons
    return [
        *comparisons,
        *(
            (f"expert {name}, a face", {f"{n} at a time": expert_case(e, face, n) for n in AT_ONCE}, None)
            for name in BUILTIN
            for e in [load_expert(name)]
        ),
        ("an augmented view for the tower's training", augmented_views(), 2),
        ("decode a JPEG", {"decode": decode}, None),
        ("find faces", {"find": Case(lambda: {"faces": len(find_faces(pixels))}, reads=pixels.nbytes)}, None),
    ]  # fmt: skip


# --- devices --------------------------------------------------------------------------------------------------------


def of_language_model(mllm: Any, crops: NDArray[np.uint8], questions: Sequence[str], form: str) -> list[Listed]:
    """Comparisons of the language model itself."""
    # Their lengths vary as those of real questions do.
    verdict = [prompts.verdict_question(EVIDENCE[k % len(EVIDENCE)], form) for k in range(FACES)]
    few = questions[:FEW]
    story = f"verdict, rationale, {len(few)} cue questions, a chat turn"
    return [
        (f"{len(questions)} cue questions", cue_questions(mllm, crops[0], questions), 2),
        ("verdict, a face", verdicts(mllm, crops, verdict), None),
        (story, whole_story(mllm, crops[0], verdict[0], few), 2),
    ]


def embedded(
    detector: Any, device: Any, dtype: Any, threads: int, n_questions: int, model: ModelSpec, tower_alone: bool
) -> tuple[list[Listed], Any]:
    """The comparisons of a trained model, and the model to time a training step on, None with `tower_alone`."""
    pipeline = of_detector(detector, threads, tower_alone)
    if tower_alone:
        return pipeline, None
    from skimage.data import astronaut

    from x2dfd.adapter import EMBEDDED, read_adapter_card
    from x2dfd.assessment import BANK, read_questions
    from x2dfd.checkpoints import load_model
    from x2dfd.faces import find_faces

    crop = find_faces(np.asarray(astronaut(), np.uint8))[0].crop
    crops = np.stack([np.clip(crop.astype(np.int16) + 8 * k, 0, 255).astype(np.uint8) for k in range(FACES)])
    questions = [q.text for q in read_questions(BANK)[:n_questions]]
    card = read_adapter_card(model.adapter or EMBEDDED)
    trained, _ = load_model(
        model.base, tower_layers=card.tower_layers or None, text_layers=card.text_layers or None,
        feature_layers=card.feature_layers or None,
    )  # fmt: skip
    mllm = getattr(detector.mllm, "whole", detector.mllm)
    return [*of_language_model(mllm, crops, questions, detector.info.score_form), *pipeline], trained.to(device, dtype)


def measure(
    device: Any, precision: Dtype, threads: int, rounds: int, n_questions: int, geometry: Geometry, model: ModelSpec
) -> Iterator[Json]:
    """Runs every comparison on one device; yields the device's part of the result after each."""
    import torch

    from benchmarks.roofline import Rates
    from finetune.gpu import QUESTIONS, build, words_processor
    from finetune.gpu import geometry as random_geometry
    from x2dfd.checkpoints import TORCH_DTYPES
    from x2dfd.mllm import LocalMLLM

    dtype = TORCH_DTYPES[precision]
    rates = Rates.measured(device, dtype)
    bench = Bench(rounds, rates, precision, torch.cuda.synchronize if device.type == "cuda" else lambda: None)
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    result: Json = {"device": f"{device.type} {precision}", "name": device_name}
    if geometry == "embedded":
        start = time.perf_counter()
        detector = x2dfd.load(model, threads=threads, device=str(device), dtype=precision)
        seconds = round(time.perf_counter() - start, 3)
        hashes = {"base": detector.info.base["sha256"], "adapter": detector.info.adapter_sha256}
        result |= {"model": detector.info.name, "hashes": hashes, "load_seconds": seconds}
        tower_alone = device.type == "cpu" and precision != "fp32"
        comparisons, trained = embedded(detector, device, dtype, threads, n_questions, model, tower_alone)
    else:
        settings = random_geometry(geometry == "toy")
        trained = build(settings, device, dtype, False)
        processor = words_processor(settings)
        trained.config.image_token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        mllm = LocalMLLM(trained, processor, f"{geometry}, random weights")
        result |= {"model": mllm.name, "hashes": None, "load_seconds": None}
        crops = np.random.default_rng(0).integers(0, 256, (FACES, 224, 224, 3), np.uint8)
        comparisons = of_language_model(mllm, crops, QUESTIONS[:n_questions], "numbers")
    result |= {"comparisons": [], "matmul_gflop_per_s": rates.flop_per_s / 1e9}
    result["read_gb_per_s"] = rates.bytes_per_s / 1e9
    for title, cases, r in comparisons:
        result["comparisons"].append(compare(title, cases, bench, min(r or rounds, rounds)))
        yield result
    if trained is not None:  # last: it wraps the model's layers
        layers = trained.config.vision_feature_layer
        step = training_step(trained, [layers] if isinstance(layers, int) else layers)
        result["comparisons"].append(compare("a training step, a picture", step, bench))
    rates = rates.better(Rates.measured(device, dtype))
    result["matmul_gflop_per_s"] = round(rates.flop_per_s / 1e9, 2)
    result["read_gb_per_s"] = round(rates.bytes_per_s / 1e9, 2)
    yield result


def run(
    out: Annotated[Path, typer.Option(help="result file")] = Path("build/speed.json"),
    model: Model = "embedded",
    geometry: Annotated[Geometry, typer.Option(help="embedded, or one with random weights")] = "embedded",
    rounds: Annotated[int, typer.Option(min=1, help="of the quick cases; slow ones have fewer")] = 5,
    questions: Annotated[int, typer.Option(min=4, help="cue questions about one face")] = N_QUESTIONS,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    only: Annotated[Place | None, typer.Option(help="of the two; default: both, where there is CUDA")] = None,
) -> None:
    """Time A against B, interleaved, with bounds."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    from eval.bench import code_state
    from x2dfd.detector import versions

    torch.set_num_threads(threads)
    load = os.getloadavg()[0]  # of other processes, as the bench has not begun
    devices = _devices(geometry, only, torch.cuda.is_available())
    result: Json = {
        "task": {"name": "speed", "version": 7},
        "geometry": geometry,
        "threads": threads,
        "devices": [],
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "load_before": load, "platform": platform.machine()},
        "code": code_state(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": versions(),
    }
    for place, precision in devices:
        done = list(result["devices"])
        settings = (threads, rounds, questions, geometry, ModelSpec.parse(model))
        for part in measure(torch.device(place), precision, *settings):
            result["devices"] = [*done, part]  # after every comparison, so that a run that is cut off keeps its results
            write_text(out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _devices(geometry: Geometry, only: Place | None, cuda: bool) -> list[tuple[str, Dtype]]:
    """Device and precision of each run. Raises X2DFDError for a missing device."""
    if geometry == "llava-7b" and (only == "cpu" or not cuda):
        raise X2DFDError("llava-7b needs a CUDA device: on a CPU its weights alone are 28 GB", code="cuda_missing")
    if only == "cuda" and not cuda:
        raise X2DFDError("there is no CUDA device here", code="cuda_missing")
    from x2dfd.tower import quick_in_16_bits
    from x2dfd.tower_pass import adds_bytes_in_full

    devices: list[tuple[str, Dtype]] = [] if only == "cuda" or geometry == "llava-7b" else [("cpu", "fp32")]
    if devices and geometry == "embedded" and quick_in_16_bits("cpu"):
        devices.append(("cpu", "bf16"))
    if devices and geometry == "embedded" and adds_bytes_in_full():
        devices.append(("cpu", "int8"))
    if cuda and only != "cpu":
        devices += [("cuda", "fp32")] if geometry == "embedded" else []
        devices.append(("cuda", "bf16"))
    return devices


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    run_command(run, "Example:\n\n  python -m benchmarks.speed --out build/speed.json")
