"""What is measured on a GPU runs on a toy geometry here; what `--dry-run` predicts is arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from finetune.config import FinetuneConfig
from finetune.data import IGNORE
from finetune.gpu import build, geometry, measure, random_batch
from finetune.memory import GB, Shape, predict, preset, report, shape, shape_of
from finetune.models import tune
from finetune.train import RowTrainer
from tests import tiny
from tests.raising import raises

ROOM = Path(__file__).parent.parent / "finetune"


def config(**given: Any) -> FinetuneConfig:
    plain = FinetuneConfig("i", "m", "o", base="b", base_dtype="bfloat16", bf16=True)
    return replace(plain, **given)


@pytest.fixture(scope="module")
def seven() -> Shape:
    return shape_of(geometry(tiny=False), config())


def test_the_real_geometry_is_llava_7b(seven: Shape) -> None:
    """A speed of another model would be quoted under this one's name."""
    assert (seven.total, seven.trained) == (7_063_427_072, 39_976_960 + 20_979_712)
    assert seven.linears == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert (seven.layers, seven.hidden, seven.inner, seven.vocabulary) == (32, 4096, 11008, 32064)


def test_memory_follows_from_the_settings(seven: Shape) -> None:
    """Each setting moves its own part: a preset that forgets one ends an hour later, out of memory."""
    plain = predict(config(), seven, 1)
    assert plain["weights"] == 2 * seven.total and plain["AdamW"] == 8 * seven.trained
    assert plain["total"] == pytest.approx(sum(v for k, v in plain.items() if k != "total"))
    four = predict(config(method="qlora"), seven, 1)
    assert 4.0 < four["weights"] / GB < 4.6
    two = predict(config(deepspeed=str(ROOM / "zero2.json")), seven, 8)
    assert two["weights"] == plain["weights"] and two["AdamW"] == plain["AdamW"] / 8
    three = predict(config(deepspeed=str(ROOM / "zero3.json")), seven, 8)
    assert three["weights"] == plain["weights"] / 8
    kept = predict(config(checkpointing=True), seven, 1)
    assert kept["activations"] < plain["activations"] / 5
    whole = predict(config(method="full"), replace(seven, trained=seven.total), 1)
    assert whole["total"] > 100 * GB


@pytest.mark.parametrize("method", ["lora", "full"])
def test_predicted_bytes_are_those_of_tensors_that_a_step_leaves(method: str) -> None:
    """Weights, gradients and moments counted from a model that took a step, not from the formula's own constants."""
    cpu, settings = torch.device("cpu"), geometry(tiny=True)
    used = config(method=method, base_dtype="float32", bf16=False)
    tuned, _ = tune(build(settings, cpu, torch.float32, False), used)
    learning = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning)
    batch = random_batch(settings, 1, 48, cpu)
    answers = float((batch["labels"] != IGNORE).float().mean())
    loss, out = RowTrainer.compute_loss(cast(Any, None), tuned, dict(batch), return_outputs=True)
    loss.backward()
    optimizer.step()

    def size(tensors: Iterable[torch.Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    parts = predict(used, shape_of(settings, used), 1, 48, answers)
    assert parts["logits"] == pytest.approx(3 * size([out["logits"]]))  # themselves, the losses and the gradient
    assert parts["weights"] + parts["trained copies"] == size(tuned.parameters())
    assert parts["gradients"] == size(p.grad for p in learning if p.grad is not None)
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert parts["AdamW"] == size(moments)


def test_what_is_predicted_is_a_little_more_than_was_measured(seven: Shape) -> None:
    """A preset that does not fit ends out of memory; one that asks for half as much again wants a dearer card."""
    measured = json.loads((ROOM.parent / "eval" / "results" / "gpu.json").read_text())
    assert len(measured["training"]) >= 4
    for row in measured["training"]:
        tried = config(method=row["method"], batch=row["batch"], checkpointing=row["checkpointing"])
        answers = (row["tokens"] - 576) / 2 / row["tokens"]  # of `random_batch`, whose picture is of 576 tokens
        assert 1.0 < predict(tried, seven, 1, row["tokens"], answers)["total"] / GB / row["peak_gb"] < 1.17, row


def test_a_preset_fits_its_card_and_a_larger_card_is_no_slower(seven: Shape) -> None:
    """A 12 GB card takes four bits, an 80 GB card needs neither that nor checkpointing."""
    chosen = {card: preset(config(), seven, card, 1) for card in (4, 12, 24, 40, 80)}
    assert chosen[4] is None
    small, large = chosen[12], chosen[80]
    assert small is not None and (small["method"], small["checkpointing"]) == ("qlora", True)
    assert large is not None and (large["method"], large["checkpointing"]) == ("lora", False)
    for card, found in chosen.items():
        if found:
            assert predict(config(**found), seven, 1)["total"] < card * GB


@pytest.mark.needs_base
def test_a_dry_run_loads_nothing_and_says_it_all(tmp_path: Path) -> None:
    """It is asked on a laptop about a model that does not fit there."""
    base = tiny.write_base(tmp_path / "base")
    (base / "model.safetensors").unlink()
    settings = config(base=str(base), method="dora")
    text, found = report(settings, 2), shape(settings)
    assert f"{found.trained:,} parameters (dora)" in text and f"{found.total:,} parameters" in text
    assert all(f"{card} GB" in text for card in (12, 24, 40, 80)) and "predicted" in text
    with raises("base_unreadable", "nowhere"):
        report(config(base=str(tmp_path / "nowhere")))


@pytest.mark.slow
def test_the_measurement_runs_on_a_toy() -> None:
    """The script has to work the first time that there is a GPU, and without bitsandbytes too."""
    found = measure(tiny=True)
    rows, methods = found["training"], ("lora", "qlora") if find_spec("bitsandbytes") else ("lora",)
    assert ("left_out" in found) == (len(methods) == 1)
    assert [(r["method"], r["tokens"], r["checkpointing"]) for r in rows] == [
        (method, length, kept) for method in methods for length in (48, 96) for kept in (True, False)
    ]
    assert all(r["steps_per_s"] > 0 and r["share_of_matmul_rate"] > 0 and r["predicted_gb"] > 0 for r in rows)
    assert found["verdicts_per_s"] > 0 and found["cue_questions_per_s"] > 0 and found["matmul_tflops"] > 0
    if not torch.cuda.is_available():
        with raises("cuda_missing", "--tiny"):
            measure()
