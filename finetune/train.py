"""Fine-tuning of a multimodal LLM on the instruction set, with Trainer and PEFT: one path, top to bottom."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import mannwhitneyu
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Sampler
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.modeling_utils import unwrap_model
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import get_last_checkpoint

from finetune.config import FinetuneConfig, check_config, zero_stage
from finetune.data import IGNORE, PARTS, Collate, Rows, cache_tower, feature_layers, learnable, read_records
from finetune.foreign import adopted
from finetune.models import CachedTower, additions_of, fit_projector, is_llava, open_base, resolved, tune
from finetune.talks import Talks, read_talks
from x2dfd import prompts
from x2dfd.adapter import WEIGHTS, WHOLE, AdapterCard, lora_b_sum, probe_logits, read_adapter_card, write_adapter_card
from x2dfd.crops import CropSet, load_crops
from x2dfd.errors import X2DFDError, first_line
from x2dfd.experts import card_of
from x2dfd.faces import CROP_SIZE, preprocessing
from x2dfd.files import Json, file_sha256, parse_json, read_json, whole, write_text
from x2dfd.loading import base_identity, crop_size_of
from x2dfd.model_spec import ModelSpec
from x2dfd.opening import load
from x2dfd.prompts import Processor
from x2dfd.tower import (
    HEAD_LAYERS,
    VIEWS,
    TowerFeatures,
    additions_sha256,
    augmented_view,
    cached_features,
    read_additions,
    tower_states,
    training_rows,
)


class Shown(Sampler[int]):
    """The rows of an epoch: those of each set as often as its weight says, rows of like length in a batch. The order
    follows from seed and epoch alone: a cut-off run has it too. `sets`: rows and weight of each. `batch`: 1 mixes rows
    of any length."""

    def __init__(self, lengths: Sequence[int], sets: Sequence[tuple[int, float]], batch: int, seed: int) -> None:
        self._lengths, self._sets, self._batch, self._seed, self._epoch = lengths, sets, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(max(1, round(n * weight)) for n, weight in self._sets)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        shown: list[int] = []
        first = 0
        for n, weight in self._sets:
            times, rest = divmod(max(1, round(n * weight)), n)
            drawn = torch.randperm(n, generator=generator)[:rest].tolist() if rest else []
            shown += [first + k for k in [*range(n)] * times + drawn]
            first += n
        lengths = [self._lengths[k] for k in shown]
        if self._batch > 1:
            order = get_length_grouped_indices(lengths, self._batch, generator=generator)
        else:
            order = torch.randperm(len(shown), generator=generator).tolist()
        return iter([shown[k] for k in order])


class RowTrainer(Trainer):
    """Trainer with the rows' weighted loss, the verdict's AUC, and a rate of its own for the modules `whole`."""

    def __init__(
        self,
        *args: Any,
        projector_lr: float,
        whole: Sequence[str],
        shown: Shown,
        label_ids: Sequence[int],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._projector_lr, self._whole, self._shown = projector_lr, tuple(whole), shown
        self._label_ids = list(label_ids)  # real, fake
        self.model_accepts_loss_kwargs = False  # our loss is a mean of its own: divide by the accumulation steps

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Json,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        parts = inputs.pop(PARTS, None)
        found = [_summed(model, part) for part in parts or [inputs]]
        loss = torch.stack([summed for summed, _, _ in found]).sum() / torch.stack([w for _, w, _ in found]).sum()
        if parts and torch.distributed.is_initialized():
            # Talk without a picture passes through no projector, whose gradient the other processes wait for.
            loss = loss + 0 * torch.stack([p.sum() for p in model.parameters() if p.requires_grad]).sum()
        return (loss, found[0][2]) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: Json, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Loss; logit of fake against real of each row's verdict; which it is, 1 for fake and -1 for no verdict. The
        whole logits, which Trainer would gather, are gigabytes."""
        inputs = self._prepare_inputs(inputs)
        labels, verdicts = inputs["labels"], inputs["verdicts"]
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, out = self.compute_loss(model, dict(inputs), return_outputs=True)
        row, at = torch.arange(len(verdicts), device=verdicts.device), verdicts.clamp(min=1)
        place = (out["asked"][None] == (row * labels.shape[1] + at - 1)[:, None]).long().argmax(1)
        real, fake = out["logits"][place][:, self._label_ids].float().unbind(1)
        truth = (labels[row, at] == self._label_ids[1]).long()
        return loss.detach(), fake - real, truth.where(verdicts >= 0, -1)

    def create_optimizer(self, *_: object, **__: object) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model: Any = self.model
            trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            projector = [p for n, p in trained if any(w in n for w in self._whole)]
            others = [p for n, p in trained if not any(w in n for w in self._whole)]
            rates = ((others, self.args.learning_rate), (projector, self._projector_lr))
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            decay = {"weight_decay": self.args.weight_decay}
            self.optimizer = kind([{"params": p, "lr": lr, **decay} for p, lr in rates if p], **settings)
        assert self.optimizer is not None
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self._shown


def _summed(model: nn.Module, inputs: Json) -> tuple[Tensor, Tensor, Json]:
    """The weighted loss over a batch's answer tokens, added up; their weights, added up; and the logits with the tokens
    that they follow."""
    labels, weights = inputs.pop("labels"), inputs.pop("weights")
    inputs.pop("verdicts", None)
    target, weight = labels[:, 1:], weights[:, 1:]
    learnt = target != IGNORE
    asked = F.pad(learnt, (0, 1)).flatten().nonzero()[:, 0]  # places in the flattened batch that an answer follows
    with _head_sees(model, asked):
        logits = model(**inputs, use_cache=False).logits[0]  # [asked, vocabulary]
    each = F.cross_entropy(logits.float(), target[learnt], reduction="none")
    return (each * weight[learnt]).sum(), weight.sum(), {"logits": logits, "asked": asked}


@contextmanager
def _head_sees(model: nn.Module, places: Tensor) -> Iterator[None]:
    """Give the head just these `places` of the flattened batch, so that logits are [1, places, vocabulary]: it is a
    third of a small model's work, and `logits_to_keep` takes the same columns of every row."""

    def chosen(_: nn.Module, states: tuple[Tensor]) -> tuple[Tensor]:
        return (states[0].flatten(0, 1).index_select(0, places)[None],)

    inner: Any = unwrap_model(model)
    handle = inner.get_output_embeddings().register_forward_pre_hook(chosen)
    try:
        yield
    finally:
        handle.remove()


def verdict_auc(found: EvalPrediction) -> dict[str, float]:
    """AUC of the verdicts' logits. Raises X2DFDError when the pictures are all real or all fake."""
    logits, truth = np.asarray(found.predictions, float), np.asarray(found.label_ids)
    real, fake = logits[truth == 0], logits[truth == 1]
    if not len(real) or not len(fake):
        raise X2DFDError(
            "validation needs real and fake pictures: take another eval_split, or a larger eval_limit", code="one_class"
        )
    return {"auc": float(mannwhitneyu(fake, real).statistic) / (len(real) * len(fake))}


def train(config: FinetuneConfig) -> Path:
    """Fine-tune and write the adapter directory; returns it. A cut-off run resumes from its last checkpoint.

    Under a launcher (torchrun, accelerate, deepspeed) every process calls it, and the first alone writes.
    Raises X2DFDError (SetupError for what is missing) with the reason.
    """
    check_config(config)
    config = resolved(adopted(config))
    out = Path(config.out)
    work = out / "checkpoints"
    arguments = _arguments(config, work)  # before the model: under ZeRO-3 it is loaded in pieces
    record = _record(config)
    model, processor = open_base(config)
    config = replace(config, crop_size=config.crop_size or crop_size_of(processor))
    with arguments.main_process_first(local=False):  # the first makes the files, the others read them
        # An empty manifest is that of conversations that no picture of ours is about.
        side = config.crop_size or CROP_SIZE
        data = [load_crops(manifest, side=side) if manifest.stat().st_size else None for _, manifest, _ in config.sets]
    if config.cue_weight != 1 and not processor.tokenizer.is_fast:
        raise X2DFDError(
            "cue_weight needs a tokenizer with character offsets: take cue_weight: 1", code="cue_weight_unsupported"
        )
    with arguments.main_process_first(local=False):
        features = _features(config, model, processor, data[0]) if data[0] else None
    learnt, asked = _rows(config, model, processor, data, features)
    rows = next((rows for rows, _ in learnt if isinstance(rows, Rows)), None)
    collate = Collate(
        processor.tokenizer.pad_token_id or 0,
        config.verdict_weight,
        config.cue_weight,
        rows.positions if rows else None,
        rows is not None and rows.marks_answers,
    )
    tuned, whole = tune(model, config)
    with arguments.main_process_first(local=False):
        last = _last_checkpoint(work, config)
    if last is not None and _finished(Path(last), out):
        return out
    if arguments.process_index == 0:
        write_text(out / "config.json", json.dumps(asdict(config), indent=1) + "\n")
    trainer = _trainer(config, tuned, whole, arguments, collate, learnt, asked, processor)
    trainer.train(resume_from_checkpoint=last)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # of all processes together, on the first
    if arguments.process_index != 0:
        return out
    _save(config, out, model, tuned, processor, state)
    write_text(out / "log.json", json.dumps(trainer.state.log_history, indent=1) + "\n")
    card = _card(config, out, record, processor, model, _figures(config, trainer, learnt))
    write_adapter_card(out, card)
    # What x2dfd.load takes has to give these numbers ever after.
    del trainer, tuned, model, state, features, learnt, asked
    unset_hf_deepspeed_config()  # the other processes have gone: what is loaded now is this one's alone
    loaded = load(ModelSpec(base=config.base, adapter=out), mode="paper", experts=(), device="cpu")
    write_adapter_card(out, replace(card, probes=probe_logits(loaded.mllm, card.crop_size)))
    return out


def _rows(
    config: FinetuneConfig,
    model: Any,
    processor: Processor,
    data: Sequence[CropSet | None],
    features: TowerFeatures | None,
) -> tuple[list[tuple[Rows | Talks, float]], list[Rows]]:
    """What the sets have to learn from, with their weights, and what validation asks about: of left_out neither holds
    any."""

    def of(split: str, limit: int | None) -> list[tuple[Rows, float]]:
        found = []
        for (instructions, _, weight), crops in zip(config.sets, data, strict=True):
            if crops is not None:
                records = read_records(instructions, split, crops, config.left_out, limit)
                found.append((Rows(records, model, processor, crops, config.view_seed, features), weight))
        return found

    learnt: list[tuple[Rows | Talks, float]] = [*of("train", None)]
    for instructions, _, weight in config.sets:
        if records := read_talks(instructions):
            if config.cached_features or zero_stage(config) == 3:
                raise X2DFDError(
                    f"{instructions} holds conversations about several pictures or none, which need a run without "
                    "cached_features and ZeRO-3",
                    code="talk_unsupported",
                )
            side = config.crop_size or CROP_SIZE
            learnt.append((Talks(records, processor, side, config.view_seed), weight))
    return learnt, [rows for rows, _ in of(config.eval_split, config.eval_limit)] if config.eval_steps else []


def _trainer(
    config: FinetuneConfig,
    tuned: Any,
    whole: Sequence[str],
    arguments: TrainingArguments,
    collate: Collate,
    learnt: Sequence[tuple[Rows | Talks, float]],
    asked: Sequence[Rows],
    processor: Processor,
) -> RowTrainer:
    each = [(len(rows), weight) for rows, weight in learnt]
    lengths = [n for rows, _ in learnt for n in rows.lengths]
    together = config.batch * config.accumulate if config.bucket and config.batch > 1 else 1
    return RowTrainer(
        tuned,
        arguments,
        collate,
        ConcatDataset([rows for rows, _ in learnt]),
        ConcatDataset(asked) if asked else None,
        compute_metrics=verdict_auc,
        callbacks=[EarlyStoppingCallback(config.patience)] if config.patience else None,
        projector_lr=config.projector_lr,
        whole=whole,
        shown=Shown(lengths, each, together, config.seed),
        label_ids=prompts.first_tokens(processor, prompts.STEM, prompts.LABEL_WORDS),
    )


def _save(
    config: FinetuneConfig, out: Path, model: Any, tuned: Any, processor: Processor, state: dict[str, Tensor]
) -> None:
    """The trained weights, and the experts' that travel along. Raises X2DFDError when training moved nothing."""
    if config.method == "full":
        model.save_pretrained(out / WHOLE, state_dict=state)
        processor.save_pretrained(out / WHOLE)
    else:
        # PEFT notes the folder that the base was loaded from; the base's name says more and fits other machines.
        tuned.peft_config["default"].base_model_name_or_path = base_identity(config.base)["name"]
        # The vocabulary is not touched; left to itself, PEFT would ask a hub about it.
        tuned.save_pretrained(str(out), state_dict=state, save_embedding_layers=False)
        (out / "README.md").unlink(missing_ok=True)  # PEFT's empty form; card.json says what is known
        if config.weights_dtype == "float16":
            _to_half(out / WEIGHTS)
        if lora_b_sum(out) <= 0:
            raise X2DFDError(f"{out}: every lora_B is still zero: take more steps or a higher lr", code="lora_b_zero")
    ranking = config.sets[0][0].parent / "assessment.json"
    if ranking.is_file():
        shutil.copyfile(ranking, out / ranking.name)
    if config.expert_weights:
        shutil.copytree(config.expert_weights, out / "experts", dirs_exist_ok=True)


def _figures(config: FinetuneConfig, trainer: RowTrainer, learnt: Sequence[tuple[Rows | Talks, float]]) -> Json:
    """What the card records about the run."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    figures: Json = {"final_loss": round(float(np.mean(losses[-10:])), 4) if losses else None}
    figures |= {"pictures": sum(rows.pictures for rows, _ in learnt), "steps": trainer.state.global_step}
    if config.start:
        figures["start"] = read_adapter_card(Path(config.start)).sha256
    figures["pictures_a_step"] = config.batch * config.accumulate * trainer.args.world_size
    if trainer.state.best_metric is not None:
        figures |= {f"best_{config.best_by}": trainer.state.best_metric, "best_step": trainer.state.best_global_step}
    return figures


def _arguments(config: FinetuneConfig, work: Path) -> TrainingArguments:
    """Trainer's settings. Raises X2DFDError for what it does not take, and for launchers that are not supported."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        raise X2DFDError("FSDP is not supported: --set deepspeed=finetune/zero3.json", code="fsdp_unsupported")
    if absent := sorted(set(config.report_to) - {*get_available_reporting_integrations(), "none"}):
        raise X2DFDError(f"report_to: {absent[0]} is not installed, or unknown to transformers", code="tracker_missing")
    if config.fp16 and not torch.cuda.is_available():
        raise X2DFDError("fp16 needs a CUDA GPU: take bf16, or fp32 (neither)", code="dtype_unsupported")
    if config.deepspeed and not torch.cuda.is_available():  # which transformers leaves out on a CPU
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    every = "steps" if config.eval_steps else "no"
    try:
        arguments = TrainingArguments(
            output_dir=str(work),
            run_name=config.name,
            per_device_train_batch_size=config.batch,
            per_device_eval_batch_size=config.batch,
            gradient_accumulation_steps=config.accumulate,
            num_train_epochs=config.epochs,
            max_steps=config.max_steps,
            learning_rate=config.lr,
            weight_decay=config.weight_decay,
            optim=config.optimizer,
            lr_scheduler_type=config.scheduler,
            warmup_steps=config.warmup,
            max_grad_norm=config.clip,
            logging_steps=10,
            logging_first_step=True,
            save_steps=config.eval_steps or config.save_steps,  # the best is found among what was validated
            save_total_limit=2,
            eval_strategy=every,
            eval_steps=config.eval_steps or None,
            load_best_model_at_end=bool(config.eval_steps),
            metric_for_best_model=f"eval_{config.best_by}" if config.eval_steps else None,
            greater_is_better=config.best_by == "auc",
            report_to=list(config.report_to),
            remove_unused_columns=False,
            seed=config.seed,
            bf16=config.bf16,
            fp16=config.fp16,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
            dataloader_num_workers=config.workers,
            disable_tqdm=None,
            activation_checkpointing=config.checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False},
            deepspeed=config.deepspeed,
            # Conversations differ in length, but every trained weight takes part in every step.
            ddp_find_unused_parameters=False,
        )
    except (ValueError, ImportError) as error:
        raise X2DFDError(f"configuration: {first_line(error)}", code="config_invalid") from error
    if arguments.n_gpu > 1:  # Trainer would copy the model to every card anew for each step
        raise X2DFDError(
            f"each of {arguments.n_gpu} GPUs needs its own process: torchrun --nproc_per_node", code="launcher_missing"
        )
    return arguments


def _features(config: FinetuneConfig, model: Any, processor: Processor, data: CropSet) -> TowerFeatures | None:
    """Cached tower outputs in place of the tower, where asked for; the embedded base's projector gets its start."""
    if config.base is not None and not config.cached_features:
        return None
    layers = feature_layers(model)
    if config.base is None and any(layer < 1 for layer in layers):
        raise X2DFDError("the embedded base needs positive feature_layers", code="feature_layers_invalid")
    known = learnable(data, "train", config.left_out)
    if config.base is None and not config.cached_features:
        some = [augmented_view(data.crops[i], config.view_seed, i) for i in known[:: max(1, len(known) // 64)]]
        states = tower_states(torch.from_numpy(np.stack(some)), max(layers), additions_of(config))
        fit_projector(model, torch.stack([states[k][:, 1:] for k in layers], 1).clone())
        return None
    assert config.cached_features is not None
    rows, folder = training_rows(data, config.limit), Path(config.cached_features)
    if config.base is None:
        tower = model.config.vision_config.num_hidden_layers
        kept = HEAD_LAYERS if config.tower == "forensic" else layers  # the expert `tower` read the same pass
        features = cached_features(data, rows, folder, tower, kept, config.view_seed, additions=additions_of(config))
        places = np.flatnonzero(np.isin(rows, known))  # the cache also holds pictures that nothing is learnt from
        fit_projector(model, torch.from_numpy(features.patches(places[:: max(1, len(places) // 64)], layers)))
    else:
        key: Json = {"base": base_identity(config.base), "manifest": file_sha256(config.sets[0][1])}
        key["crop_size"] = config.crop_size
        features = cache_tower(model, processor, data, rows, folder, key, config.view_seed)
    model.model.vision_tower = CachedTower(layers, model.config.vision_feature_select_strategy == "default")
    return features


def _record(config: FinetuneConfig) -> Json:
    """The card of the instructions, of the first set where there are several, which have to agree with it.

    Instructions name pictures by their place in a manifest: with another they would be about others. Their questions
    hold scores of experts: with other weights the model would be asked what it was not trained on. Raises X2DFDError.
    """
    cards = []
    for instructions, manifest, _ in config.sets:
        path = instructions.parent / "card.json"
        try:
            card: Json = parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise X2DFDError(f"{path} cannot be read as a card: {error}", code="instructions_unreadable") from error
        if not isinstance(card, dict) or not isinstance(card.get("config"), dict):
            raise X2DFDError(
                f"{path} is no card of an instruction set: it has no `config`", code="instructions_unreadable"
            )
        if card.get("manifest_sha256") != file_sha256(manifest):
            raise X2DFDError(f"{instructions} were not built from {manifest}", code="manifest_differs")
        if card.get("views") != VIEWS or not isinstance(card.get("experts"), dict):
            raise X2DFDError(f"{instructions}: the augmented views have changed: build them again", code="views_differ")
        if (seed := card["config"].get("view_seed")) != config.view_seed:
            raise X2DFDError(f"{instructions} were built with view_seed {seed}", code="view_seed_differs")
        ranking, beside = card.get("assessment_sha256"), path.with_name("assessment.json")
        if ranking and (not beside.is_file() or file_sha256(beside) != ranking):
            raise X2DFDError(f"{beside} is not the ranking of {instructions}", code="assessment_differs")
        cards.append(card)
    first = cards[0]
    for card in cards[1:]:
        if _asked_with(card) != _asked_with(first):
            raise X2DFDError("these instruction sets differ in experts or score_form", code="instructions_differ")
    weights = Path(config.expert_weights) if config.expert_weights else None
    for name, sha256 in first["experts"].items():
        if card_of(name, weights).sha256 != sha256:
            raise X2DFDError(
                f"expert {name!r} has other weights than in the instructions (expert_weights)", code="expert_differs"
            )
    return first


def _asked_with(card: Json) -> tuple[object, ...]:
    """What questions give scores of, by which names, and how."""
    return card["experts"], card.get("aliases", {}), card["config"].get("score_form")


def _instructions_sha256(config: FinetuneConfig) -> str:
    each = [file_sha256(instructions) for instructions, _, _ in config.sets]
    return each[0] if len(each) == 1 else hashlib.sha256("\n".join(each).encode()).hexdigest()


def _last_checkpoint(work: Path, config: FinetuneConfig) -> str | None:
    """Where a run that was cut off resumes. Raises X2DFDError when `work` holds a run with other settings or data."""
    run = {"config": asdict(config), "instructions_sha256": _instructions_sha256(config)}
    run["base"] = base_identity(config.base)
    run = json.loads(json.dumps(run))  # tuples become lists, as they are read back
    key = work / "run.json"
    if not key.is_file():
        work.mkdir(parents=True, exist_ok=True)
        write_text(key, json.dumps(run, indent=1) + "\n")
    elif read_json(key) != run:
        raise X2DFDError(
            f"{work} holds a training with other settings or data: choose another `out`", code="settings_differ"
        )
    last: str | None = get_last_checkpoint(str(work))
    return last


def _finished(last: Path, out: Path) -> bool:
    """The run of that checkpoint came to its end, and its adapter is written; Trainer would take a step more."""
    state = TrainerState.load_from_json(str(last / "trainer_state.json"))
    written = (out / "card.json").is_file() and bool(read_adapter_card(out).probes)
    return state.global_step >= state.max_steps and written


def _to_half(path: Path) -> None:
    state = load_file(path)
    with whole(path) as temporary:
        save_file({k: v.half().contiguous() for k, v in state.items()}, temporary, {"format": "pt"})


def _card(
    config: FinetuneConfig, out: Path, record: Json, processor: Processor, model: Any, figures: Json
) -> AdapterCard:
    full = config.method == "full"
    form = record["config"]["score_form"]
    layers = _layers_of(model, config) if is_llava(model) else {}  # of no other family any can be left out
    return AdapterCard(
        name=config.name,
        version=config.version,
        source="trained by this project: python -m finetune",
        licence=config.licence,
        sha256=base_identity(out / WHOLE)["sha256"] if full else file_sha256(out / WEIGHTS),
        preprocessing=preprocessing(config.crop_size or CROP_SIZE),
        crop_size=config.crop_size or CROP_SIZE,
        paper="X2-DFD, arXiv 2410.06126",
        blind_spot=config.blind_spot,
        weights=WHOLE if full else WEIGHTS,
        trained_on=config.trained_on,
        figures=figures,
        held_out=tuple(record["config"]["held_out"]),
        left_out=config.left_out,
        aliases=record.get("aliases", {}),
        tower=config.tower,
        tower_sha256=additions_sha256(read_additions(additions)) if (additions := additions_of(config)) else "",
        assessment_sha256=record.get("assessment_sha256") or "",
        base=base_identity(out / WHOLE if full else config.base),
        frame=config.frame,
        prompt_sha256=prompts.prompt_hash(processor, form),
        score_form=form,
        experts=record["experts"],
        data_sha256=_instructions_sha256(config),
        **layers,
    )


def _layers_of(model: Any, config: FinetuneConfig) -> Json:
    """Which layers of a LLaVA are there, as its card says it."""
    text = int(model.config.get_text_config().num_hidden_layers)
    return {
        "tower_layers": int(model.config.vision_config.num_hidden_layers),
        "text_layers": text if config.method == "full" else config.text_layers or text,
        "feature_layers": feature_layers(model),
    }
