"""Ray Data and object stores: the same rows as the local runner, also when an actor is killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import x2dfd
from tests import stub, tiny
from tests.families import VICUNA, plain_processor
from tests.raising import raises
from x2dfd import cli, ray_engine, stores
from x2dfd.errors import SetupError, UnknownName
from x2dfd.model_spec import LoadOptions, ModelSpec
from x2dfd.ray_llm import VllmScoring, _scored, p_fake
from x2dfd.types import Failure, Report


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture without a face, on which no model is asked."""
    Image.new("RGB", (40, 32), (90, 60, 30)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def memory(photo: Path) -> Iterator[str]:
    """A store with one picture; the address of its folder."""
    fsspec = pytest.importorskip("fsspec", reason="the extra [ray] is not installed: no fsspec")
    files = fsspec.filesystem("memory")
    files.pipe("/bucket/face.jpg", photo.read_bytes())
    yield "memory://bucket"
    files.rm("/bucket", recursive=True)


def test_a_store_and_a_disk_give_the_same_row(
    memory: str, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address must come back as it was given, a missing object as its own row, and a resumed run without judging."""
    asked, detector = list[Any](), stub.without_model()
    plain = detector.detect_many

    def counted(sources: Iterable[Any], **options: Any) -> Iterator[Report | Failure]:
        asked.extend(sources := list(sources))
        yield from plain(sources, **options)

    monkeypatch.setattr(detector, "detect_many", counted)
    monkeypatch.setattr(x2dfd, "load", lambda *_, **__: detector)
    places = [f"{memory}/face.jpg", f"{memory}/none.jpg", photo.as_uri(), str(photo)]
    manifest, out = tmp_path / "m.csv", tmp_path / "rows.jsonl"
    manifest.write_text("\n".join(["path", *places]) + "\n")
    words = ["detect", "--manifest", str(manifest), "--out", str(out), "--remote", "memory,file", "--batch-size", "3"]
    assert CliRunner().invoke(cli.app, words).exit_code == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["path"] for r in rows] == places
    assert [r["error_code"] for r in rows] == [None, "not_found", None, None]
    assert rows[0]["sha256"] == rows[2]["sha256"] == rows[3]["sha256"] and len(asked) == 3
    assert CliRunner().invoke(cli.app, words).exit_code == 0
    assert len(asked) == 3, "objects that are unchanged were judged again"


def test_no_address_is_read_unasked(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest from elsewhere must not make the program call a server."""

    def refuse(address: str) -> bytes:
        raise AssertionError(address)

    monkeypatch.setattr(stores, "read_address", refuse)
    monkeypatch.setattr(x2dfd, "load", lambda *_, **__: stub.without_model())
    manifest = tmp_path / "m.csv"
    manifest.write_text(f"path\n{memory}/face.jpg\n")
    done = CliRunner().invoke(cli.app, ["detect", "--manifest", str(manifest), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["error"]["code"] == "not_found"
    assert CliRunner().invoke(cli.app, ["detect", "a.jpg", "--remote", "s3"]).exit_code == 2
    manifest.write_text(f"path\n{memory}/face.jpg\nhttp://169.254.169.254/x\nfilecache::memory://a.jpg\n")
    asked = ["detect", "--manifest", str(manifest), "--json", "--remote", "s3,filecache"]
    rows = [json.loads(line) for line in CliRunner().invoke(cli.app, asked).stdout.splitlines()]
    assert [r["error"]["code"] for r in rows] == ["not_found"] * 3


def test_an_object_too_large_or_of_an_unknown_store_says_so(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object of gigabytes must not fill the memory; a store without its package is a matter of setting up."""
    monkeypatch.setattr("x2dfd.stores.MAX_BYTES", 100)
    with raises("file_too_large"):
        stores.read_address(f"{memory}/face.jpg")
    with raises("unreadable"):
        stores.read_address("nonsense://bucket/face.jpg")
    for place in (Path(os.fsdecode(b"/photos/\xff.jpg")), "s3://bucket/ä.jpg"):  # columns hold text, names need not
        assert ray_engine._place(ray_engine._raw(place)) == place


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="the extra [ray] is not installed: pip install -e '.[ray]'")
    pytest.importorskip("ray.data")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # by default 15: beside other work they would never come to an end
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
    yield ray
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.needs_base
def test_two_actors_of_which_one_is_killed_write_the_rows_of_the_local_runner(
    cluster: Any, face_photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row lost with its actor, doubled by the second try, or of another model or order than on one machine."""
    base, photos, killed = tiny.write_base(tmp_path / "base"), tmp_path / "photos", tmp_path / "killed"
    photos.mkdir()
    image = Image.open(face_photo)
    for k in range(4):
        image.crop((k, k, 512, 512)).save(photos / f"{k}.png")
    (photos / "text.png").write_text("no picture")

    class Dying(ray_engine.Actor):
        def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
            if not killed.exists():
                killed.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    load = x2dfd.load
    monkeypatch.setattr(x2dfd, "load", lambda *a, **k: load(*a, **k, experts=[]), raising=False)
    monkeypatch.chdir(tmp_path)  # actors work elsewhere, and a row keeps the path that was given
    made = ray_engine.RayDetector

    def without_experts(model: ModelSpec, options: LoadOptions, actors: int) -> ray_engine.RayDetector:
        return made(model, options | {"experts": []}, actors, Dying)

    monkeypatch.setattr(ray_engine, "RayDetector", without_experts)
    tables = {}
    for name, more in {"local": [], "ray": ["--engine", "ray", "--actors", "2"]}.items():
        out = tmp_path / f"{name}.jsonl"
        words = ["detect", photos.name, "--model", f"hub:{base.name}", "--threads", "1", "--no-rationale"]
        done = CliRunner().invoke(cli.app, [*words, "--out", str(out), "--batch-size", "2", *more])
        assert done.exit_code == 0, done.output
        tables[name] = out.read_bytes()
    assert killed.exists()
    assert tables["ray"] == tables["local"] and tables["ray"].count(b"\n") == 5
    with pytest.raises(SetupError):
        made(ModelSpec(base=str(tmp_path / "nowhere")), {"experts": []}, 1)


@pytest.mark.slow
@pytest.mark.needs_base
def test_what_a_user_did_wrong_comes_back_as_one_line(cluster: Any, face_photo: Path, tmp_path: Path) -> None:
    """A wrong model on an actor must not end in Ray's own trace, nor a need that no machine can meet in waiting."""

    class Wrong(ray_engine.Actor):
        def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
            raise UnknownName("lens", "wide", ["wider"])

    base = tiny.write_base(tmp_path / "base")
    spec, options = ModelSpec(base=str(base)), LoadOptions(experts=[])
    engine = ray_engine.RayDetector(spec, options, 1, Wrong)
    with raises("unknown_name", "did you mean 'wider'"):
        list(engine.detect_many([face_photo]))
    with raises("cluster_too_small", "4 CPUs", "3 and 0"):
        ray_engine.RayDetector(spec, options | {"threads": 4}, 1)
    with raises("unknown_name", "mode"):
        ray_engine.RayDetector(spec, options | {"mode": "papier"}, 1)  # type: ignore[arg-type]


def test_the_vllm_pipeline_asks_with_the_prompt_of_training(tmp_path: Path, astronaut: Any) -> None:
    """A template or tokenizer call of the engine's own would be another prompt than the model was trained with."""
    (tmp_path / "adapter_config.json").write_text('{"r": 12}')
    scoring = VllmScoring("base", lora=tmp_path, gpus=2)
    config = scoring.config()
    stages = ("chat_template_stage", "tokenize_stage", "detokenize_stage", "prepare_multimodal_stage")
    assert not any(config[stage] for stage in stages)
    assert config["engine_kwargs"]["max_lora_rank"] == 16 and config["engine_kwargs"]["tensor_parallel_size"] == 2
    assert "enable_lora" not in VllmScoring("base").config()["engine_kwargs"]
    row = {"id": "a", "crop": astronaut[:224, :224], "question": "Is it? And the clip score is 0.500."}
    asked = scoring.request(row, plain_processor(VICUNA))
    assert asked["prompt"] == "USER: <image>\nIs it? And the clip score is 0.500. ASSISTANT: This image is"
    assert asked["multimodal_data"]["image"].size == (224, 224) and asked["model"] == str(tmp_path)
    assert asked["id"] == "a" and "crop" not in asked


def test_scores_of_vllm_are_read_as_those_of_an_endpoint() -> None:
    """Swapped labels, or a label off the list taken as certain, would be confident nonsense."""
    said = {"7": {"logprob": np.log(0.6)}, "9": {"logprob": np.log(0.2)}, "1": {"logprob": np.log(0.1)}}
    assert p_fake({"logprobs": [said]}, (9, 7)) == pytest.approx(0.75)
    assert p_fake({"logprobs": [said]}, (8, 7)) == pytest.approx(6 / 7)
    row = {"id": "a", "prompt": "p", "generated_text": "", "logprobs": [said]}
    assert _scored(row, (7, 9)) == {"id": "a", "p_fake": pytest.approx(0.25), "reason": None}
    assert _scored(row, (2, 3)) == {"id": "a", "p_fake": None, "reason": "no_label"}
    assert _scored({"id": "a", "logprobs": None}, (2, 3))["reason"] == "no_label"


def test_settings_that_cannot_work_are_refused_at_once(tmp_path: Path) -> None:
    """A cluster's engines take minutes to start before they would say so."""
    for name, value in {"engines": 0, "memory": 1.5, "likeliest": 50, "max_tokens": 0}.items():
        given: dict[str, Any] = {name: value}
        with raises("number_out_of_range", name):
            VllmScoring("base", **given)
    with raises("split_unreadable", "finetune.split"):
        VllmScoring("base", lora=tmp_path).config()
    pytest.importorskip("ray", reason="the extra [ray] is not installed")
    from ray.data.llm import vLLMEngineProcessorConfig

    assert vLLMEngineProcessorConfig(**VllmScoring("base").config()).model_source == "base"
