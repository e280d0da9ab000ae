"""Published adapters and merged models: the same weights under other names, and the same verdicts."""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import x2dfd
from finetune.__main__ import app
from finetune.convert import NEWER, OTHERS, SETTINGS, hub_settings, llava_settings, renamed, to_hub, to_llava
from finetune.data import answer_tokens
from finetune.merge import merge
from finetune.split import split
from tests import tiny
from tests.raising import raises
from x2dfd import prompts
from x2dfd.adapter import WEIGHTS, probe_logits, read_adapter_card
from x2dfd.checkpoints import load_processor
from x2dfd.errors import SetupError
from x2dfd.experts import BUILTIN, aliased
from x2dfd.mllm import LocalMLLM
from x2dfd.types import Report

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
INERT = {"lora_bias": False, "use_qalora": False, "qalora_group_size": 16}


def published(hidden: int, mlp: int, layers: int, vision: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published adapter: LoRA, then the projector."""
    shapes: dict[str, tuple[int, ...]] = {}
    for n in range(layers):
        for name in LINEARS:
            block = "self_attn" if name in LINEARS[:4] else "mlp"
            wide_in, wide_out = (mlp if name in wide else hidden for wide in (("down_proj",), ("gate_proj", "up_proj")))
            start = f"base_model.model.model.layers.{n}.{block}.{name}"
            shapes[f"{start}.lora_A.weight"] = (rank, wide_in)
            shapes[f"{start}.lora_B.weight"] = (wide_out, rank)
    for k, wide in ((0, vision), (2, hidden)):
        shapes[f"base_model.model.model.mm_projector.{k}.weight"] = (hidden, wide)
        shapes[f"base_model.model.model.mm_projector.{k}.bias"] = (hidden,)
    return shapes


def settings(rank: int) -> dict[str, Any]:
    """adapter_config.json as the published one has it, as far as it matters."""
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.05,
        "bias": "none", "base_model_name_or_path": "weights/base/llava-v1.5-7b", "inference_mode": True,
        "modules_to_save": None, "target_modules": sorted(LINEARS), **dict.fromkeys(NEWER), **INERT,
    }  # fmt: skip


def test_the_published_names_are_the_hub_models_own() -> None:
    """Bug prevented: a key that fits no module is dropped by PEFT with a warning, and the adapter does nothing."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForImageTextToText, LlavaConfig

    shapes = published(4096, 11008, 32, 1024, 16)
    sizes = {k: torch.Size(v).numel() for k, v in shapes.items()}
    lora = [k for k in shapes if ".lora_" in k]
    assert (len(lora), sum(sizes[k] for k in lora)) == (448, 39_976_960)
    assert sum(n for k, n in sizes.items() if k not in lora) == 20_979_712
    state = {k: torch.empty(v, device="meta") for k, v in shapes.items()}
    hub = renamed(state, True)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(LlavaConfig())  # its defaults are LLaVA-1.5-7B
        tuned = get_peft_model(model, LoraConfig(**hub_settings(settings(16), "llava-hf/llava-1.5-7b-hf")))
    wanted = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    assert {k: v.shape for k, v in hub.items()} == {k: v.shape for k, v in wanted.items()}
    back = renamed(hub, False)
    assert back.keys() == state.keys() and all(back[k] is state[k] for k in state)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "base"
    return tiny.write_base(folder, tiny.processor_of_llava_15(), tied=False)


def laid_out(folder: Path, files: dict[str, Any]) -> Path:
    """A folder with PEFT's settings and these files of tensors, or of what stands in their place."""
    folder.mkdir()
    (folder / SETTINGS).write_text(json.dumps(settings(4)))
    for name, content in files.items():
        (save_file if name == WEIGHTS else torch.save)(content, folder / name)
    return folder


def tensors(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(path) if path.name == WEIGHTS else torch.load(path, weights_only=True)
    return found


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: brackets in the name, fp32 LoRA, a 16-bit projector, newer settings."""
    folder = tmp_path_factory.mktemp("llava") / "llava-v1.5-tiny-lora-[ble-diff]"
    generator = torch.Generator().manual_seed(5)
    state: dict[str, Tensor] = {}
    for key, shape in published(64, 128, 2, 32, 4).items():
        if key.endswith(("k_proj.lora_B.weight", "v_proj.lora_B.weight")):
            shape = (32, 4)  # the tiny base groups its queries
        state[key] = torch.randn(shape, generator=generator) * 0.2
    lora = {k: v for k, v in state.items() if ".lora_" in k}
    return laid_out(folder, {WEIGHTS: lora, OTHERS: {k: v.half() for k, v in state.items() if k not in lora}})


def test_there_and_back_or_from_older_files_nothing_changes(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Every tensor keeps its name, bits and precision, and PEFT's settings what they say; an older PEFT writes a .bin,
    and LLaVA's own code names the projector without PEFT's wrapper."""
    card = to_hub(adapter, tmp_path / "hub", base=str(base))
    assert card.frame == "train_consistent" and card == read_adapter_card(tmp_path / "hub")
    to_llava(tmp_path / "hub", tmp_path / "back", base="weights/base/llava-v1.5-7b")
    for name in (WEIGHTS, OTHERS):
        before, after = tensors(adapter / name), tensors(tmp_path / "back" / name)
        assert before.keys() == after.keys()
        assert all(before[k].dtype == after[k].dtype and torch.equal(before[k], after[k]) for k in before)
    plain = {k: v for k, v in settings(4).items() if k not in NEWER}
    assert json.loads((tmp_path / "back" / SETTINGS).read_text()) == plain
    with raises("folder_taken", "hub"):
        to_hub(adapter, tmp_path / "hub", base=str(base))
    # An engine without the frame would ask in the base's own; a frame without its end token teaches never to stop.
    whole, _, rank = split(f"hub:{base}+{tmp_path / 'hub'}", tmp_path / "split")
    processor = load_processor(whole)
    assert rank == 4 and processor.chat_template == prompts.CHAT_TEMPLATES["train_consistent"]
    _, answer = answer_tokens(processor, prompts.QUESTION, "This image is fake.")
    assert answer[-1] == processor.tokenizer.eos_token_id and answer.count(answer[-1]) == 1
    lora = tensors(adapter / WEIGHTS)
    projector = {k.removeprefix("base_model.model."): v for k, v in tensors(adapter / OTHERS).items()}
    older = laid_out(tmp_path / "older", {"adapter_model.bin": lora, "mm_projector.bin": projector})
    assert to_hub(older, tmp_path / "hub of older", base=str(base)).sha256 == card.sha256
    for name in ("adapter_model.bin", "mm_projector.bin"):
        torch.save({"x": _Trap()}, older / name)
        with raises("adapter_unreadable", name):
            to_hub(older, tmp_path / "out", base=str(base))
        (older / name).unlink()
        with raises("adapter_incomplete"):
            to_hub(older, tmp_path / "out", base=str(base))
        torch.save(lora, older / "adapter_model.bin")


@pytest.mark.slow
def test_a_converted_adapter_judges_in_both_frames(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The released code asks in other words than it trained with: both can be had, and they are not the same."""
    bare = probe_logits(x2dfd.load(f"hub:{base}", mode="paper", experts=()).mllm)
    found = {}
    for frame in prompts.CHAT_TEMPLATES:
        to_hub(adapter, tmp_path / frame, base=str(base), frame=frame)
        mllm: Any = x2dfd.load(f"hub:{base}+{tmp_path / frame}", mode="paper").mllm
        found[frame] = probe_logits(mllm)
        assert read_adapter_card(tmp_path / frame).probes == pytest.approx(found[frame], abs=1e-3)
        asked = prompts.render(mllm.processor, prompts.QUESTION, prompts.STEM)
        who, image = ("user", "<image>") if frame == "train_consistent" else ("human", "<im_start><image><im_end>")
        assert asked == (
            f"A chat between a curious {who} and an artificial intelligence assistant. The assistant gives helpful, "
            f"detailed, and polite answers to the {who}'s questions. USER: {image}\nIs this image real or fake? "
            "ASSISTANT: This image is"
        )
    assert len({bare, *found.values()}) == 3
    with raises("unknown_name", "train_consistent"):
        to_hub(adapter, tmp_path / "other", base=str(base), frame="train_consistant")


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trapped",)


def test_what_would_be_lost_or_run_is_refused(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code in a .bin, settings that change the model, and names of other layouts."""
    monkeypatch.chdir(tmp_path)
    bad = laid_out(tmp_path / "bad", {WEIGHTS: tensors(adapter / WEIGHTS), OTHERS: {"x": _Trap()}})
    with raises("adapter_unreadable"):
        to_hub(bad, tmp_path / "out", base=str(base))
    assert not (tmp_path / "trapped").exists() and not (tmp_path / "out").exists()
    for used in ({"lora_bias": True}, {"use_qalora": True}, {"target_parameters": ["experts"]}):
        with raises("setting_unsupported", next(iter(used))):
            hub_settings({**settings(4), **used}, "b")
    with raises("targets_unsupported", "lm_head"):
        hub_settings({**settings(4), "target_modules": ["q_proj", "lm_head"]}, "b")
    with raises("targets_without_counterpart", ".*q_proj"):
        llava_settings({"target_modules": ".*q_proj"}, "b")
    with raises("tensor_unknown", "lm_head"):
        renamed({"base_model.model.lm_head.weight": torch.zeros(1)}, True)
    for text in ("a=x,a=y", "x,a=x", "x=y,x"):  # a prompt would give two scores of one expert
        with raises("expert_twice", text):
            aliased(text)


def zero_checkpoint(folder: Path, state: dict[str, Tensor], odd: Any = None) -> Path:
    """A ZeRO-2 checkpoint of two processes, as DeepSpeed lays it out: the trained weights flat, in halves."""
    part = folder / "global_step7"
    part.mkdir(parents=True)
    (folder / "latest").write_text("global_step7")
    (folder / SETTINGS).write_text(json.dumps(settings(4)))
    flat = torch.cat([v.float().flatten() for v in state.values()])
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % 4)])
    told = {
        "buffer_names": [], "module": {}, "shared_params": {}, "ds_version": "0.18.0", "odd": odd,
        "param_shapes": [OrderedDict((k, v.shape) for k, v in state.items())],
    }  # fmt: skip
    torch.save(told, part / "mp_rank_00_model_states.pt")
    for rank, half in enumerate(flat.chunk(2)):
        kept = {"zero_stage": 2, "partition_count": [2], "single_partition_of_fp32_groups": [half.clone()]}
        torch.save({"optimizer_state_dict": kept}, part / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def test_a_zero_checkpoint_is_gathered_without_running_what_it_holds(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off before it saved an adapter, a training under DeepSpeed leaves pickles in pieces."""
    pytest.importorskip("deepspeed")
    monkeypatch.chdir(tmp_path)
    whole = tensors(adapter / WEIGHTS) | tensors(adapter / OTHERS)
    live = {re.sub(r"\.lora_([AB])\.", r".lora_\1.default.", k): v for k, v in whole.items()}
    source = zero_checkpoint(tmp_path / "checkpoint-7", live)
    to_hub(source, tmp_path / "hub", base=str(base))
    found = renamed(tensors(tmp_path / "hub" / WEIGHTS), False)
    assert found.keys() == whole.keys() and all(torch.equal(found[k], whole[k].float()) for k in whole)
    bad = zero_checkpoint(tmp_path / "bad", live, _Trap())
    with raises("adapter_unreadable", "ZeRO"):
        to_hub(bad, tmp_path / "out", base=str(base))
    assert not (tmp_path / "trapped").exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_published_adapter_is_asked_as_it_was_trained(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, face_photo: Path
) -> None:
    """It was trained on "the blending score" and knows no "swinv2-blending"; a report names the experts themselves."""
    monkeypatch.setitem(BUILTIN, tiny.EXPERT, tiny.EXPERT_TARGET)
    monkeypatch.setitem(BUILTIN, "darkness", "tests.tiny:Darkness")
    out = tmp_path / "hub"
    asked_with = ["--base", str(base), "--experts", f"blending={tiny.EXPERT},diffusion=darkness"]
    done = CliRunner().invoke(app, ["convert", str(adapter), str(out), *asked_with])
    assert done.exit_code == 0, done.output
    assert read_adapter_card(out).aliases == {tiny.EXPERT: "blending", "darkness": "diffusion"}
    detector = x2dfd.load(f"hub:{base}+{out}", mode="paper")
    plain, asked = detector.mllm.verdict_logits, list[str]()

    def heard(encoding: Any, questions: Sequence[str]) -> Any:
        asked.extend(questions)
        return plain(encoding, questions)

    monkeypatch.setattr(detector.mllm, "verdict_logits", heard)
    monkeypatch.setattr(
        detector.mllm, "write", lambda *_, **__: ["It shows obvious blending artifacts supporting fake."]
    )
    report = detector.detect(face_photo)
    first, second = report.evidence
    assert (first.expert, second.expert) == (tiny.EXPERT, "darkness")
    assert asked == [
        f"Is this image real or fake? And the blending score is {first.score:.3f}, "
        f"and the diffusion score is {second.score:.3f}."
    ]
    assert not any("no blending expert" in line for line in report.faces[0].contradictions)
    assert Report.from_json(report.to_json()) == report


WIDE = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda state: {k: v for k, v in state.items() if ".layers.1." not in k}, "14 of 28"),
        (lambda state: {k: v for k, v in state.items() if "mm_projector.2" not in k}, "2 of 4"),
        (lambda state: state | {WIDE: torch.ones(4, 80)} if WIDE in state else state, "is [4, 80] where the base has"),
    ],
    ids=["layer", "projector", "another size"],
)
def test_a_published_adapter_that_does_not_fit_is_refused(
    base: Path, adapter: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], fact: str
) -> None:
    """Converted, half of one would look whole; of another size, PEFT says so only when the base is there."""
    bad = laid_out(tmp_path / "bad", {name: change(tensors(adapter / name)) for name in (WEIGHTS, OTHERS)})
    with pytest.raises(SetupError) as caught:
        to_hub(bad, tmp_path / "out", base=str(base))
    assert fact in str(caught.value) and not (tmp_path / "out").exists()


@pytest.fixture
def ours(needs_base: None, known_expert: None, tmp_path: Path) -> tuple[str, Path]:
    """An adapter on its base as one string, and the adapter's folder."""
    base = tiny.write_base(tmp_path / "base")
    folder = tiny.write_adapter(tmp_path / "adapter", base)
    return f"hub:{base}+{folder}", folder


def test_a_merged_model_judges_as_base_and_adapter_do(
    ours: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge that loses the projector, a layer or the frame still writes a model that talks."""
    spec, folder = ours
    with raises("probes_missing"):
        merge(spec, tmp_path / "merged")
    scores = probe_logits(x2dfd.load(spec).mllm)
    tiny.edit_card(folder, probes=scores)
    plain = LocalMLLM.save

    def spoilt(self: LocalMLLM, where: Path) -> None:
        with torch.no_grad():
            self._model.model.language_model.norm.weight.mul_(-1)
        plain(self, where)

    with monkeypatch.context() as patch, raises("probes_differ"):
        patch.setattr(LocalMLLM, "save", spoilt)
        merge(spec, tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))  # nothing that could be taken for the model
    out = merge(spec, tmp_path / "merged")
    detector = x2dfd.load(out)  # with calibration and experts, without the base
    assert probe_logits(detector.mllm) == pytest.approx(scores, abs=1e-3)
    assert list(detector.info.experts) == [tiny.EXPERT] and read_adapter_card(out).probes == scores
    with raises("folder_taken", out):
        merge(spec, out)


@pytest.mark.slow
def test_a_merged_tower_holds_its_additions_once(ours: tuple[str, Path], tmp_path: Path) -> None:
    """Bug prevented: a whole model whose tower gets the forensic additions again when it is loaded, or never."""
    from x2dfd.tower import additions_sha256

    spec, folder = ours
    where, plain = "encoder.layers.0.self_attn.q_proj", probe_logits(x2dfd.load(spec).mllm)
    torch.manual_seed(1)
    additions = {f"{where}.lora_A.weight": torch.randn(2, 32), f"{where}.lora_B.weight": torch.randn(32, 2)}
    (folder / "experts").mkdir()
    save_file({f"tower.{name}": value for name, value in additions.items()}, folder / "experts" / "tower.safetensors")
    tiny.edit_card(folder, tower="forensic", tower_sha256=additions_sha256(additions))
    scores = probe_logits(x2dfd.load(spec).mllm)
    assert scores != pytest.approx(plain, abs=1e-2)
    tiny.edit_card(folder, probes=scores)
    merged = x2dfd.load(merge(spec, tmp_path / "merged")).mllm
    assert probe_logits(merged) == pytest.approx(scores, abs=1e-3)
