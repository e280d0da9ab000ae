"""Fine-tuning of a multimodal LLM on the instruction set, with Trainer and PEFT: one road, top to bottom."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import get_last_checkpoint

from finetune.config import FinetuneConfig, check_config
from finetune.data import IGNORE, Collate, Packs, cache_tower, feature_layers, read_records
from finetune.foreign import adopted
from finetune.models import CachedTower, additions_of, fit_projector, open_base, tune
from x2dfd import prompts
from x2dfd.adapter import WEIGHTS, WHOLE, AdapterCard, lora_b_sum, probe_logits, read_adapter_card, write_adapter_card
from x2dfd.crops import CropSet, load_crops
from x2dfd.errors import X2DFDError
from x2dfd.experts import expert_class, read_card
from x2dfd.faces import PREPROCESSING
from x2dfd.files import Json, file_sha256, whole, write_text
from x2dfd.loading import base_identity
from x2dfd.model_spec import ModelSpec
from x2dfd.opening import load
from x2dfd.prompts import Processor
from x2dfd.tower import (
    HEAD_LAYERS,
    VIEWS,
    TowerFeatures,
    additions_sha256,
    cached_features,
    read_additions,
    seen_view,
    tower_states,
    training_rows,
)


class Bucketed(LengthGroupedSampler):
    """Rows of like length share a batch. The order follows from seed and epoch alone: a cut-off run has it too."""

    def __init__(self, batch: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch, lengths=lengths, generator=torch.Generator())
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self._seed + self._epoch)
        order: Iterator[int] = super().__iter__()  # type: ignore[no-untyped-call]
        return order


class PackTrainer(Trainer):
    """Trainer with the packs' weighted loss and a learning rate of its own for the modules `whole`."""

    def __init__(self, *args: Any, projector_lr: float, whole: Sequence[str], bucket: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._projector_lr, self._whole, self._bucket = projector_lr, tuple(whole), bucket
        self.model_accepts_loss_kwargs = False  # our loss is a mean of its own: divide by the accumulation steps

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Json,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels, weights = inputs.pop("labels"), inputs.pop("weights")
        # The head is a third of a small model's work: run it only where an answer token follows.
        asked = (labels[:, 1:] != IGNORE).any(0).nonzero()[:, 0]
        logits = model(**inputs, logits_to_keep=asked, use_cache=False).logits  # [n, asked, vocabulary]
        target, weight = labels[:, asked + 1], weights[:, asked + 1]
        each = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), ignore_index=IGNORE, reduction="none")
        loss = (each * weight.flatten()).sum() / weight.sum()
        return (loss, {"logits": logits}) if return_outputs else loss

    def create_optimizer(self, *_: object, **__: object) -> torch.optim.Optimizer:
        if self.optimizer is None:
            assert self.model is not None
            trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            projector = [p for n, p in trained if any(w in n for w in self._whole)]
            lora = [p for n, p in trained if not any(w in n for w in self._whole)]
            groups = [{"params": lora, "lr": self.args.learning_rate}, {"params": projector, "lr": self._projector_lr}]
            self.optimizer = torch.optim.AdamW(groups, weight_decay=self.args.weight_decay)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        batch = self.args.per_device_train_batch_size
        if not self._bucket or batch == 1:
            return super()._get_train_sampler(train_dataset)
        data: Any = self.train_dataset
        return Bucketed(batch * self.args.gradient_accumulation_steps, data.lengths, self.args.seed)


def train(config: FinetuneConfig) -> Path:
    """Fine-tune and write the adapter directory; returns it. A cut-off run resumes from its last checkpoint.

    Under a launcher (torchrun, accelerate, deepspeed) every process calls it, and the first alone writes.
    Raises X2DFDError (SetupError for what is missing) with the reason.
    """
    check_config(config)
    config = adopted(config)
    out = Path(config.out)
    work = out / "checkpoints"
    arguments = _arguments(config, work)  # before the model: under ZeRO-3 it is loaded in pieces
    with arguments.main_process_first(local=False):  # the first makes the files, the others read them
        data = load_crops(Path(config.manifest))
        _check_instructions(config)
    model, processor = open_base(config)
    if config.cue_weight != 1 and not processor.tokenizer.is_fast:
        raise X2DFDError(
            "cue_weight wants a tokenizer that knows where its tokens stand in a text: take cue_weight: 1",
            code="cue_weight_unsupported",
        )
    with arguments.main_process_first(local=False):
        features = _features(config, model, processor, data)
    label_ids = prompts.first_tokens(processor, prompts.STEM, prompts.LABEL_WORDS)
    records = read_records(Path(config.instructions), "train", data, config.left_out)
    packs = Packs(records, processor, label_ids, data, features, config.view_seed, feature_layers(model))
    collate = Collate(processor.tokenizer.pad_token_id or 0, config.verdict_weight, config.cue_weight)
    tuned, whole = tune(model, config)
    with arguments.main_process_first(local=False):
        last = _last_checkpoint(work, config)
    if arguments.process_index == 0:
        write_text(out / "config.json", json.dumps(asdict(config), indent=1) + "\n")
    trainer = PackTrainer(
        tuned, arguments, collate, packs, projector_lr=config.projector_lr, whole=whole, bucket=config.bucket
    )
    trainer.train(resume_from_checkpoint=last)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # of all processes together, on the first
    if arguments.process_index != 0:
        return out
    _save(config, out, model, tuned, processor, state)
    write_text(out / "log.json", json.dumps(trainer.state.log_history, indent=1) + "\n")
    card = _card(config, out, processor, model.config, _figures(config, trainer, packs))
    write_adapter_card(out, card)
    # What x2dfd.load takes has to give these numbers ever after.
    del trainer, tuned, model, state, features
    unset_hf_deepspeed_config()  # the other processes have gone: what is loaded now is this one's alone
    loaded = load(ModelSpec(base=config.base, adapter=out), mode="paper", experts=(), device="cpu", dtype="fp32")
    write_adapter_card(out, replace(card, probes=probe_logits(loaded.mllm)))
    return out


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
        _to_half(out / WEIGHTS)
        if lora_b_sum(out) <= 0:
            raise X2DFDError(
                f"{out}: training left every lora_B at zero; more steps or a higher lr are needed", code="lora_b_zero"
            )
    if (ranking := _data_card(config)["config"]["assessment"]) is not None:
        shutil.copyfile(ranking, out / "assessment.json")
    if config.expert_weights:
        shutil.copytree(config.expert_weights, out / "experts", dirs_exist_ok=True)


def _figures(config: FinetuneConfig, trainer: PackTrainer, packs: Packs) -> Json:
    """What the card says of the run."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    figures: Json = {"final_loss": round(float(np.mean(losses[-10:])), 4) if losses else None}
    figures |= {"pictures": len(packs), "steps": trainer.state.global_step}
    if config.start:
        figures["start"] = read_adapter_card(Path(config.start)).sha256
    figures["pictures_a_step"] = config.batch * config.accumulate * trainer.args.world_size
    return figures


def _arguments(config: FinetuneConfig, work: Path) -> TrainingArguments:
    """Trainer's settings. Raises X2DFDError for what ZeRO-3 cannot share out."""
    if config.deepspeed and not torch.cuda.is_available():  # which transformers leaves out on a CPU
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=config.batch,
        gradient_accumulation_steps=config.accumulate,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup,
        max_grad_norm=1.0,
        logging_steps=10,
        logging_first_step=True,
        save_steps=config.save_steps,
        save_total_limit=2,
        report_to=[],
        remove_unused_columns=False,
        seed=config.seed,
        bf16=config.bf16,
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
    if config.base is None and is_deepspeed_zero3_enabled():
        raise X2DFDError(
            "the embedded base is too small for ZeRO-3 to help: take finetune/zero2.json, or none",
            code="zero3_unsupported",
        )
    if config.method == "qlora" and is_deepspeed_zero3_enabled():
        raise X2DFDError(
            "weights in four bits cannot be shared out: take finetune/zero2.json with qlora", code="zero3_unsupported"
        )
    return arguments


def _features(config: FinetuneConfig, model: Any, processor: Processor, data: CropSet) -> TowerFeatures | None:
    """Cached tower outputs in place of the tower, where asked for; the embedded base's projector gets its start."""
    if config.base is not None and not config.cached_features:
        return None
    layers = feature_layers(model)
    if config.base is None and any(layer < 1 for layer in layers):
        raise X2DFDError("the embedded base needs positive feature_layers", code="feature_layers_invalid")
    if config.base is None and not config.cached_features:
        known = [int(i) for i in training_rows(data) if data.samples[i].origin not in config.left_out]
        some = [seen_view(data.crops[i], config.view_seed, int(i)) for i in known[:: max(1, len(known) // 64)]]
        states = tower_states(torch.from_numpy(np.stack(some)), max(layers), additions_of(config))
        fit_projector(model, torch.stack([states[k][:, 1:] for k in layers], 1).clone())
        return None
    assert config.cached_features is not None
    rows, folder = training_rows(data, config.limit), Path(config.cached_features)
    if config.base is None:
        tower = model.config.vision_config.num_hidden_layers
        kept = HEAD_LAYERS if config.tower == "forensic" else layers  # the expert `tower` read the same pass
        features = cached_features(data, rows, folder, tower, kept, config.view_seed, additions=additions_of(config))
        few = features.patches(slice(None, None, max(1, len(rows) // 64)), layers)
        fit_projector(model, torch.from_numpy(few))
    else:
        key = {"base": base_identity(config.base), "manifest": file_sha256(Path(config.manifest))}
        features = cache_tower(model, processor, data, rows, folder, key, config.view_seed)
    model.model.vision_tower = CachedTower(layers, model.config.vision_feature_select_strategy == "default")
    return features


def _check_instructions(config: FinetuneConfig) -> None:
    """Instructions name pictures by their place in a manifest: with another manifest they would be about others."""
    path = Path(config.instructions).parent / "card.json"
    try:
        made_from = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise X2DFDError(
            f"{path}, the card of the instructions, cannot be read: {error}", code="instructions_unreadable"
        ) from error
    if made_from["manifest_sha256"] != file_sha256(Path(config.manifest)):
        raise X2DFDError(
            f"{config.instructions} were built from another manifest than {config.manifest}", code="manifest_differs"
        )
    if made_from.get("views") != VIEWS:
        raise X2DFDError(
            f"{config.instructions} tell scores of other views of the pictures: run data_gen build again",
            code="views_differ",
        )
    if made_from["config"]["view_seed"] != config.view_seed:
        raise X2DFDError(
            f"{config.instructions} were built with view_seed {made_from['config']['view_seed']}",
            code="view_seed_differs",
        )


def _last_checkpoint(work: Path, config: FinetuneConfig) -> str | None:
    """Where a cut-off run goes on. Raises X2DFDError when `work` holds a run with other settings or other data."""
    run = {"config": asdict(config), "instructions_sha256": file_sha256(Path(config.instructions))}
    run["base"] = base_identity(config.base)
    run = json.loads(json.dumps(run))  # tuples become lists, as they are read back
    key = work / "run.json"
    if not key.is_file():
        work.mkdir(parents=True, exist_ok=True)
        write_text(key, json.dumps(run, indent=1) + "\n")
    elif json.loads(key.read_text(encoding="utf-8")) != run:
        raise X2DFDError(
            f"{work} holds a training with other settings or data; choose another out, or delete it",
            code="settings_differ",
        )
    last: str | None = get_last_checkpoint(str(work))
    return last


def _to_half(path: Path) -> None:
    state = load_file(path)
    with whole(path) as temporary:
        save_file({k: v.half().contiguous() for k, v in state.items()}, temporary, {"format": "pt"})


def _data_card(config: FinetuneConfig) -> Json:
    """The card of the instruction set."""
    card: Json = json.loads((Path(config.instructions).parent / "card.json").read_text(encoding="utf-8"))
    return card


def _card(config: FinetuneConfig, out: Path, processor: Processor, model: Any, figures: Json) -> AdapterCard:
    """`model`: its configuration."""
    data_card = _data_card(config)
    full = config.method == "full"
    form = data_card["config"]["score_form"]
    text = int(model.get_text_config().num_hidden_layers)
    layers = model.vision_feature_layer
    return AdapterCard(
        name=config.name,
        version=config.version,
        source="trained by this project: python -m finetune",
        licence=config.licence,
        sha256=base_identity(out / WHOLE)["sha256"] if full else file_sha256(out / WEIGHTS),
        preprocessing=PREPROCESSING,
        paper="X2-DFD, arXiv 2410.06126",
        blind_spot=config.blind_spot,
        weights=WHOLE if full else WEIGHTS,
        trained_on=config.trained_on,
        figures=figures,
        held_out=tuple(data_card["config"]["held_out"]),
        left_out=config.left_out,
        aliases=data_card.get("aliases", {}),
        tower=config.tower,
        tower_sha256=additions_sha256(read_additions(additions)) if (additions := additions_of(config)) else "",
        assessment_sha256=file_sha256(out / "assessment.json") if (out / "assessment.json").is_file() else "",
        base=base_identity(out / WHOLE if full else config.base),
        tower_layers=int(model.vision_config.num_hidden_layers),
        text_layers=text if full else config.text_layers or text,
        feature_layers=(layers,) if isinstance(layers, int) else tuple(layers),
        frame=config.frame,
        prompt_sha256=prompts.prompt_hash(processor, form),
        score_form=form,
        experts={name: _expert_sha256(name, out) for name in data_card["config"]["experts"]},
        data_sha256=file_sha256(Path(config.instructions)),
    )


def _expert_sha256(name: str, out: Path) -> str:
    own = out / "experts" / f"{name}.card.json"
    return (read_card(own) if own.is_file() else expert_class(name).card).sha256
