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

from finetune.config import FinetuneConfig, check_config, check_inputs, zero_stage
from finetune.data import IGNORE, PARTS, Collate, Rows, adopted, cache_tower, feature_layers, learnable, read_records
from finetune.models import CachedTower, additions_of, fit_projector, is_llava, open_base, resolved, tune
from finetune.talks import Talks, read_talks
from x2dfd import prompts
from x2dfd.adapter import WEIGHTS, WHOLE, AdapterCard, lora_b_sum, probe_logits, read_adapter_card, write_adapter_card
from x2dfd.checkpoints import base_identity, crop_size_of
from x2dfd.crops import CropSet, load_crops
from x2dfd.errors import X2DFDError, first_line
from x2dfd.experts import card_of
from x2dfd.faces import CROP_SIZE, preprocessing
from x2dfd.files import Json, atomic_write, file_sha256, parse_json, read_json, write_text
from x2dfd.loading import load
from x2dfd.model_spec import ModelSpec
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
    """Samples the rows of an epoch: each set's as often as its weight says, with rows of similar length in a batch. The
    order depends on seed and epoch alone, so a resumed run has it too. `sets`: number of rows and weight of each.
    `batch`: 1 mixes rows of any length."""

    def __init__(self, lengths: Sequence[int], sets: Sequence[tuple[int, float]], batch: int, seed: int) -> None:
        self._lengths, self._sets, self._batch, self._seed, self._epoch = lengths, sets, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(max(1, round(n * weight)) for n, weight in self._sets)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        rows: list[int] = []
        offset = 0
        for n, weight in self._sets:
            repeats, remainder = divmod(max(1, round(n * weight)), n)
            extra = torch.randperm(n, generator=generator)[:remainder].tolist() if remainder else []
            rows += [offset + k for k in [*range(n)] * repeats + extra]
            offset += n
        lengths = [self._lengths[k] for k in rows]
        if self._batch > 1:
            order = get_length_grouped_indices(lengths, self._batch, generator=generator)
        else:
            order = torch.randperm(len(rows), generator=generator).tolist()
        return iter([rows[k] for k in order])


class RowTrainer(Trainer):
    """Trainer with the rows' weighted loss, the verdicts' AUC, and a separate learning rate for the modules `whole`."""

    def __init__(
        self,
        *args: Any,
        projector_lr: float,
        whole: Sequence[str],
        sampler: Shown,
        label_ids: Sequence[int],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._projector_lr, self._whole, self._sampler = projector_lr, tuple(whole), sampler
        self._label_ids = list(label_ids)  # real, fake
        self.model_accepts_loss_kwargs = False  # our loss is a mean, so Trainer divides by the accumulation steps

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Json,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        batches = inputs.pop(PARTS, None)
        sums = [_loss_sums(model, batch) for batch in batches or [inputs]]
        loss = torch.stack([loss_sum for loss_sum, _, _ in sums]).sum() / torch.stack([w for _, w, _ in sums]).sum()
        if batches and torch.distributed.is_initialized():
            # A talk without a picture bypasses the projector, but the other processes wait for its gradient.
            loss = loss + 0 * torch.stack([p.sum() for p in model.parameters() if p.requires_grad]).sum()
        return (loss, sums[0][2]) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: Json, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The loss; each row's verdict logit, fake against real; and its truth: 1 for fake, 0 for real, -1 for no
        verdict. Trainer would gather all logits, which are gigabytes."""
        inputs = self._prepare_inputs(inputs)
        labels, verdicts = inputs["labels"], inputs["verdicts"]
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, out = self.compute_loss(model, dict(inputs), return_outputs=True)
        row, position = torch.arange(len(verdicts), device=verdicts.device), verdicts.clamp(min=1)
        index = (out["positions"][None] == (row * labels.shape[1] + position - 1)[:, None]).long().argmax(1)
        real, fake = out["logits"][index][:, self._label_ids].float().unbind(1)
        truth = (labels[row, position] == self._label_ids[1]).long()
        return loss.detach(), fake - real, truth.where(verdicts >= 0, -1)

    def create_optimizer(self, *_: object, **__: object) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model: Any = self.model
            trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            projector = [p for n, p in trained if any(name in n for name in self._whole)]
            others = [p for n, p in trained if not any(name in n for name in self._whole)]
            rates = ((others, self.args.learning_rate), (projector, self._projector_lr))
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            decay = {"weight_decay": self.args.weight_decay}
            self.optimizer = optimizer_class([{"params": p, "lr": lr, **decay} for p, lr in rates if p], **settings)
        assert self.optimizer is not None
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self._sampler


def _loss_sums(model: nn.Module, inputs: Json) -> tuple[Tensor, Tensor, Json]:
    """The sum of the weighted losses of a batch's answer tokens, the sum of their weights, and the logits with their
    positions."""
    labels, weights = inputs.pop("labels"), inputs.pop("weights")
    inputs.pop("verdicts", None)
    target, weight = labels[:, 1:], weights[:, 1:]
    is_answer = target != IGNORE
    positions = F.pad(is_answer, (0, 1)).flatten().nonzero()[:, 0]  # in the flattened batch, before answer tokens
    with _logits_at(model, positions):
        logits = model(**inputs, use_cache=False).logits[0]  # [positions, vocabulary]
    losses = F.cross_entropy(logits.float(), target[is_answer], reduction="none")
    return (losses * weight[is_answer]).sum(), weight.sum(), {"logits": logits, "positions": positions}


@contextmanager
def _logits_at(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Compute logits [1, positions, vocabulary] at these `positions` of the flattened batch alone: the head is a third
    of a small model's work, and `logits_to_keep` would take the same columns of every row."""

    def select(_: nn.Module, states: tuple[Tensor]) -> tuple[Tensor]:
        return (states[0].flatten(0, 1).index_select(0, positions)[None],)

    inner: Any = unwrap_model(model)
    handle = inner.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def verdict_auc(prediction: EvalPrediction) -> dict[str, float]:
    """AUC of the verdict logits. Raises X2DFDError when the pictures are all real or all fake."""
    logits, truth = np.asarray(prediction.predictions, float), np.asarray(prediction.label_ids)
    real, fake = logits[truth == 0], logits[truth == 1]
    if not len(real) or not len(fake):
        raise X2DFDError(
            "validation needs real and fake pictures: take another eval_split, or a larger eval_limit", code="one_class"
        )
    return {"auc": float(mannwhitneyu(fake, real).statistic) / (len(real) * len(fake))}


def train(config: FinetuneConfig) -> Path:
    """Fine-tune and write the adapter directory; returns it. An interrupted run resumes from its last checkpoint.

    Under a launcher (torchrun, accelerate, deepspeed) every process calls it, and only the first one writes.
    Raises X2DFDError (SetupError if something is missing) with the reason.
    """
    check_config(config)
    check_inputs(config)
    config = resolved(adopted(config))
    out = Path(config.out)
    work = out / "checkpoints"
    arguments = _arguments(config, work)  # before the model: under ZeRO-3 it is loaded in pieces
    record = _instructions_card(config)
    model, processor = open_base(config)
    config = replace(config, crop_size=config.crop_size or crop_size_of(processor))
    with arguments.main_process_first(local=False):  # the first process writes the crops, the others read them
        # Conversations about none of our pictures have an empty manifest.
        side = config.crop_size or CROP_SIZE
        data = [load_crops(manifest, side=side) if manifest.stat().st_size else None for _, manifest, _ in config.sets]
    if config.cue_weight != 1 and not processor.tokenizer.is_fast:
        raise X2DFDError(
            "cue_weight needs a tokenizer with character offsets: take cue_weight: 1", code="cue_weight_unsupported"
        )
    with arguments.main_process_first(local=False):
        features = _features(config, model, processor, data[0]) if data[0] else None
    train_sets, eval_sets = _rows(config, model, processor, data, features)
    rows = next((rows for rows, _ in train_sets if isinstance(rows, Rows)), None)
    collate = Collate(
        processor.tokenizer.pad_token_id or 0,
        config.verdict_weight,
        config.cue_weight,
        rows.positions if rows else None,
        rows is not None and rows.marks_answers,
    )
    tuned, whole = tune(model, config)
    with arguments.main_process_first(local=False):
        checkpoint = _last_checkpoint(work, config)
    if checkpoint is not None and _finished(Path(checkpoint), out):
        return out
    if arguments.process_index == 0:
        write_text(out / "config.json", json.dumps(asdict(config), indent=1) + "\n")
    trainer = RowTrainer(
        tuned,
        arguments,
        collate,
        ConcatDataset([rows for rows, _ in train_sets]),
        ConcatDataset(eval_sets) if eval_sets else None,
        compute_metrics=verdict_auc,
        callbacks=[EarlyStoppingCallback(config.patience)] if config.patience else None,
        projector_lr=config.projector_lr,
        whole=whole,
        sampler=_sampler(config, train_sets),
        label_ids=prompts.first_tokens(processor, prompts.STEM, prompts.LABEL_WORDS),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # of all processes together, on the first
    if arguments.process_index != 0:
        return out
    _save(config, out, model, tuned, processor, state)
    write_text(out / "log.json", json.dumps(trainer.state.log_history, indent=1) + "\n")
    card = _card(config, out, record, processor, model, _figures(config, trainer, train_sets))
    write_adapter_card(out, card)
    # Probe scores of the written adapter, which `x2dfd.load` must reproduce later.
    del trainer, tuned, model, state, features, train_sets, eval_sets
    unset_hf_deepspeed_config()  # the other processes have ended, so this one must not shard what it loads
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
    """The training rows of each set with its weight, and the validation rows; both without the origins `left_out`."""

    def rows_of(split: str, limit: int | None) -> list[tuple[Rows, float]]:
        sets = []
        for (instructions, _, weight), crops in zip(config.sets, data, strict=True):
            if crops is not None:
                records = read_records(instructions, split, crops, config.left_out, limit)
                sets.append((Rows(records, model, processor, crops, config.view_seed, features), weight))
        return sets

    train_sets: list[tuple[Rows | Talks, float]] = [*rows_of("train", None)]
    for instructions, _, weight in config.sets:
        if records := read_talks(instructions):
            if config.cached_features or zero_stage(config) == 3:
                raise X2DFDError(
                    f"{instructions} holds conversations about several pictures or none, which need a run with neither "
                    "cached_features nor ZeRO-3",
                    code="talk_unsupported",
                )
            side = config.crop_size or CROP_SIZE
            train_sets.append((Talks(records, processor, side, config.view_seed), weight))
    return train_sets, [rows for rows, _ in rows_of(config.eval_split, config.eval_limit)] if config.eval_steps else []


def _sampler(config: FinetuneConfig, train_sets: Sequence[tuple[Rows | Talks, float]]) -> Shown:
    sizes = [(len(rows), weight) for rows, weight in train_sets]
    lengths = [n for rows, _ in train_sets for n in rows.lengths]
    group = config.batch * config.accumulate if config.bucket and config.batch > 1 else 1
    return Shown(lengths, sizes, group, config.seed)


def _save(
    config: FinetuneConfig, out: Path, model: Any, tuned: Any, processor: Processor, state: dict[str, Tensor]
) -> None:
    """Save the trained weights and copies of the experts' weights. Raises X2DFDError if LoRA's B stayed at zero."""
    if config.method == "full":
        model.save_pretrained(out / WHOLE, state_dict=state)
        processor.save_pretrained(out / WHOLE)
    else:
        # PEFT would record the base's folder, which other machines may not have.
        tuned.peft_config["default"].base_model_name_or_path = base_identity(config.base)["name"]
        # The vocabulary is unchanged, but by default PEFT would ask a hub about it.
        tuned.save_pretrained(str(out), state_dict=state, save_embedding_layers=False)
        (out / "README.md").unlink(missing_ok=True)  # PEFT's empty template; card.json has the facts
        if config.weights_dtype == "float16":
            half = {k: v.half().contiguous() for k, v in load_file(out / WEIGHTS).items()}
            with atomic_write(out / WEIGHTS) as temporary:
                save_file(half, temporary, {"format": "pt"})
        if lora_b_sum(out) <= 0:
            raise X2DFDError(f"{out}: every lora_B is still zero: take more steps or a higher lr", code="lora_b_zero")
    ranking = config.sets[0][0].parent / "assessment.json"
    if ranking.is_file():
        shutil.copyfile(ranking, out / ranking.name)
    if config.expert_weights:
        shutil.copytree(config.expert_weights, out / "experts", dirs_exist_ok=True)


def _figures(config: FinetuneConfig, trainer: RowTrainer, train_sets: Sequence[tuple[Rows | Talks, float]]) -> Json:
    """The card's figures on the run."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    figures: Json = {"final_loss": round(float(np.mean(losses[-10:])), 4) if losses else None}
    figures |= {"pictures": sum(rows.pictures for rows, _ in train_sets), "steps": trainer.state.global_step}
    if config.start:
        figures["start"] = read_adapter_card(Path(config.start)).sha256
    figures["pictures_a_step"] = config.batch * config.accumulate * trainer.args.world_size
    if trainer.state.best_metric is not None:
        figures |= {f"best_{config.best_by}": trainer.state.best_metric, "best_step": trainer.state.best_global_step}
    return figures


def _arguments(config: FinetuneConfig, work: Path) -> TrainingArguments:
    """Trainer's settings. Raises X2DFDError for settings that Trainer refuses and for unsupported launchers."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        raise X2DFDError("FSDP is not supported: --set deepspeed=finetune/zero3.json", code="fsdp_unsupported")
    if missing := sorted(set(config.report_to) - {*get_available_reporting_integrations(), "none"}):
        raise X2DFDError(f"report_to: {missing[0]} is not installed or unknown to transformers", code="tracker_missing")
    if config.fp16 and not torch.cuda.is_available():
        raise X2DFDError("fp16 needs a CUDA GPU: take bf16, or fp32 (neither)", code="dtype_unsupported")
    if config.deepspeed and not torch.cuda.is_available():  # transformers skips this on a CPU
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
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
            save_steps=config.eval_steps or config.save_steps,  # only validated checkpoints can be the best
            save_total_limit=2,
            eval_strategy="steps" if config.eval_steps else "no",
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
    if arguments.n_gpu > 1:  # Trainer would copy the model to every card for each step
        raise X2DFDError(
            f"each of {arguments.n_gpu} GPUs needs its own process: torchrun --nproc_per_node", code="launcher_missing"
        )
    return arguments


def _features(config: FinetuneConfig, model: Any, processor: Processor, data: CropSet) -> TowerFeatures | None:
    """The tower's cached outputs, which then replace it, or None without `cached_features`. Fits the embedded base's
    projector to the tower's outputs."""
    if config.base is not None and not config.cached_features:
        return None
    layers = feature_layers(model)
    if config.base is None and any(layer < 1 for layer in layers):
        raise X2DFDError("the embedded base needs positive feature_layers", code="feature_layers_invalid")
    train_rows, additions = learnable(data, "train", config.left_out), additions_of(config)
    if config.base is None and not config.cached_features:
        few = train_rows[:: max(1, len(train_rows) // 64)]
        views = np.stack([augmented_view(data.crops[i], config.view_seed, i) for i in few])
        states = tower_states(torch.from_numpy(views), max(layers), additions)
        fit_projector(model, torch.stack([states[k][:, 1:] for k in layers], 1).clone())
        return None
    assert config.cached_features is not None
    rows, folder = training_rows(data, config.limit), Path(config.cached_features)
    if config.base is None:
        depth = model.config.vision_config.num_hidden_layers
        cached_layers = HEAD_LAYERS if config.tower == "forensic" else layers  # the expert `tower` read the same pass
        features = cached_features(data, rows, folder, depth, cached_layers, config.view_seed, additions=additions)
        indices = np.flatnonzero(np.isin(rows, train_rows))  # the cache also holds pictures of other splits
        fit_projector(model, torch.from_numpy(features.patches(indices[:: max(1, len(indices) // 64)], layers)))
    else:
        key: Json = {"base": base_identity(config.base), "manifest": file_sha256(config.sets[0][1])}
        key["crop_size"] = config.crop_size
        key["additions"] = additions_sha256(read_additions(additions)) if additions else None
        features = cache_tower(model, processor, data, rows, folder, key, config.view_seed)
    model.model.vision_tower = CachedTower(layers, model.config.vision_feature_select_strategy == "default")
    return features


def _instructions_card(config: FinetuneConfig) -> Json:
    """The card of the first instruction set, with which all others have to agree.

    Instructions refer to pictures by their row in a manifest, so another manifest would mean other pictures. Their
    questions contain experts' scores, so experts with other weights would ask unlike the training. Raises X2DFDError.
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
                f"{path} is not the card of an instruction set: it has no `config`", code="instructions_unreadable"
            )
        if card.get("manifest_sha256") != file_sha256(manifest):
            raise X2DFDError(f"{instructions} were not built from {manifest}", code="manifest_differs")
        if card.get("views") != VIEWS or not isinstance(card.get("experts"), dict):
            raise X2DFDError(f"{instructions}: augmented views have changed since; build it again", code="views_differ")
        if (seed := card["config"].get("view_seed")) != config.view_seed:
            raise X2DFDError(f"{instructions} were built with view_seed {seed}", code="view_seed_differs")
        ranking, ranking_path = card.get("assessment_sha256"), path.with_name("assessment.json")
        if ranking and (not ranking_path.is_file() or file_sha256(ranking_path) != ranking):
            raise X2DFDError(f"{ranking_path} is not the ranking of {instructions}", code="assessment_differs")
        cards.append(card)
    asked = [(card["experts"], card.get("aliases", {}), card["config"].get("score_form")) for card in cards]
    if any(settings != asked[0] for settings in asked):
        raise X2DFDError("these instruction sets differ in experts or score_form", code="instructions_differ")
    weights = Path(config.expert_weights) if config.expert_weights else None
    for name, sha256 in cards[0]["experts"].items():
        if card_of(name, weights).sha256 != sha256:
            raise X2DFDError(
                f"expert {name!r} has other weights than in the instructions (expert_weights)", code="expert_differs"
            )
    return cards[0]


def _instructions_sha256(config: FinetuneConfig) -> str:
    hashes = [file_sha256(instructions) for instructions, _, _ in config.sets]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _last_checkpoint(work: Path, config: FinetuneConfig) -> str | None:
    """The checkpoint from which an interrupted run resumes, or None. Raises X2DFDError when `work` holds a run with
    other settings or data."""
    run = {"config": asdict(config), "instructions_sha256": _instructions_sha256(config)}
    text = json.dumps(run | {"base": base_identity(config.base)}, indent=1)
    run_path = work / "run.json"
    if not run_path.is_file():
        work.mkdir(parents=True, exist_ok=True)
        write_text(run_path, text + "\n")
    elif read_json(run_path) != json.loads(text):
        raise X2DFDError(
            f"{work} holds a training with other settings or data: choose another `out`", code="settings_differ"
        )
    last: str | None = get_last_checkpoint(str(work))
    return last


def _finished(last: Path, out: Path) -> bool:
    """Whether the checkpoint's run ended and its adapter is complete; Trainer would take another step."""
    state = TrainerState.load_from_json(str(last / "trainer_state.json"))
    written = (out / "card.json").is_file() and bool(read_adapter_card(out).probes)
    return state.global_step >= state.max_steps and written


def _card(
    config: FinetuneConfig, out: Path, record: Json, processor: Processor, model: Any, figures: Json
) -> AdapterCard:
    full = config.method == "full"
    form = record["config"]["score_form"]
    layers: Json = {}
    if is_llava(model):  # other families keep all layers
        text = int(model.config.get_text_config().num_hidden_layers)
        layers = {
            "tower_layers": int(model.config.vision_config.num_hidden_layers),
            "text_layers": text if full else config.text_layers or text,
            "feature_layers": feature_layers(model),
        }
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
