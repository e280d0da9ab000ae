"""LoRA fine-tuning of a LLaVA on the instruction set, with Transformers' Trainer and PEFT: one road, top to bottom."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from finetune.config import FinetuneConfig
from finetune.data import IGNORE, Collate, Packs
from x2dfd import prompts
from x2dfd.adapter import WEIGHTS, AdapterCard, lora_b_sum, write_adapter_card
from x2dfd.crops import load_crops
from x2dfd.errors import X2DFDError
from x2dfd.experts import expert_class, read_card
from x2dfd.faces import PREPROCESSING
from x2dfd.files import file_sha256, write_text
from x2dfd.mllm import LocalMLLM, base_identity, load_llava
from x2dfd.tower import cached_features, tower_states, training_rows, training_view


class CachedTower(nn.Module):
    """Stands in for a frozen vision tower: `pixel_values` are its cached outputs [n, layers, patches, hidden]."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        # A class-token row in front, which LLaVA's "default" strategy drops again.
        states = {layer: F.pad(pixel_values[:, k], (0, 0, 1, 0)) for k, layer in enumerate(self.layers)}
        return BaseModelOutputWithPooling(hidden_states=states)  # type: ignore[arg-type]


@torch.no_grad()
def fit_projector(model: Any, patches: Tensor) -> None:
    """Start a random projector from data: inputs standardised, outputs as large as the language model's own embeddings.

    Tower outputs have a few huge dimensions; a plain random start drowns the text.
    `patches`: [n, layers, patches, hidden].
    """
    projector = model.model.multi_modal_projector
    x = patches.transpose(1, 2).flatten(2).flatten(0, 1)  # [n * patches, layers * hidden]
    mean, std = x.mean(0), x.std(0) + 1e-3
    generator = torch.Generator().manual_seed(0)
    for linear in (projector.linear_1, projector.linear_2):
        linear.weight.normal_(0, linear.in_features**-0.5, generator=generator)
        linear.bias.zero_()
    projector.linear_1.weight /= std
    projector.linear_1.bias -= projector.linear_1.weight @ mean
    out = projector(x[:: max(1, len(x) // 4096)])
    target = model.model.language_model.embed_tokens.weight.square().mean().sqrt()
    projector.linear_2.weight *= target / out.square().mean().sqrt()


class PackTrainer(Trainer):
    """Trainer with the packs' weighted loss and a learning rate of its own for the projector."""

    def __init__(self, *args: Any, projector_lr: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._projector_lr = projector_lr
        self.model_accepts_loss_kwargs = False  # our loss is a mean of its own: divide by the accumulation steps

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
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

    def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            assert self.model is not None
            trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            projector = [p for n, p in trained if "multi_modal_projector" in n]
            lora = [p for n, p in trained if "multi_modal_projector" not in n]
            groups = [{"params": lora, "lr": self.args.learning_rate}, {"params": projector, "lr": self._projector_lr}]
            self.optimizer = torch.optim.AdamW(groups, weight_decay=self.args.weight_decay)
        return self.optimizer


def train(config: FinetuneConfig) -> Path:
    """Fine-tune and write the adapter directory; returns it. A cut-off run resumes from its last checkpoint.

    Raises X2DFDError (SetupError for what is missing) with the reason.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    work = out / "checkpoints"
    model, processor = load_llava(
        config.base,
        tower_layers=config.tower_layers,
        text_layers=config.text_layers,
        feature_layers=config.feature_layers,
    )
    mllm = LocalMLLM(model, processor, config.name)
    layers = model.config.vision_feature_layer
    layers = (layers,) if isinstance(layers, int) else tuple(layers)
    data = load_crops(Path(config.manifest))
    _check_instructions(config)
    features = None
    if config.base is None and any(layer < 1 for layer in layers):
        raise X2DFDError("the embedded base needs positive feature_layers")
    if config.cached_features:
        if config.base is not None:
            raise X2DFDError("cached_features serve the embedded base only")
        rows = training_rows(data, config.limit)
        tower = model.config.vision_config.num_hidden_layers
        features = cached_features(data, rows, Path(config.cached_features), tower, layers, config.view_seed)
        model.model.vision_tower = CachedTower(layers)
        fit_projector(model, torch.from_numpy(features.patches[:: max(1, len(rows) // 64)].astype("float32")))
    elif config.base is None:
        rows = training_rows(data)
        some = [training_view(data.crops[i], config.view_seed, int(i))[0] for i in rows[:: max(1, len(rows) // 64)]]
        states = tower_states(torch.from_numpy(np.stack(some)), max(layers))
        fit_projector(model, torch.stack([states[k][:, 1:] for k in layers], 1).clone())
    packs = Packs(Path(config.instructions), "train", processor, mllm.label_ids, data, features, config.view_seed)
    torch.manual_seed(config.seed)
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.targets,
        modules_to_save=["multi_modal_projector"],
    )
    peft_model = get_peft_model(model, lora)
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
        disable_tqdm=None,
    )
    collate = Collate(processor.tokenizer.pad_token_id or 0, config.verdict_weight)
    trainer = PackTrainer(peft_model, arguments, collate, packs, projector_lr=config.projector_lr)
    write_text(out / "config.json", json.dumps(asdict(config), indent=1) + "\n")
    trainer.train(resume_from_checkpoint=_last_checkpoint(work, config))
    write_text(out / "log.json", json.dumps(trainer.state.log_history, indent=1) + "\n")
    # PEFT notes the folder that the base was loaded from; the base's name says more and fits other machines.
    peft_model.peft_config["default"].base_model_name_or_path = base_identity(config.base)["name"]
    # The vocabulary is not touched; left to itself, PEFT would ask a hub about it.
    peft_model.save_pretrained(str(out), save_embedding_layers=False)
    _to_half(out / WEIGHTS)
    if lora_b_sum(out) <= 0:
        raise X2DFDError(f"{out}: training left every lora_B at zero; more steps or a higher lr are needed")
    if config.expert_weights:
        shutil.copytree(config.expert_weights, out / "experts", dirs_exist_ok=True)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    figures = {"final_loss": round(float(np.mean(losses[-10:])), 4) if losses else None, "pictures": len(packs)}
    figures |= {"steps": trainer.state.global_step, "pictures_a_step": config.batch * config.accumulate}
    write_adapter_card(out, _card(config, out, processor, model, layers, figures))
    (out / "README.md").unlink(missing_ok=True)  # PEFT's empty form; card.json says what is known
    return out


def _check_instructions(config: FinetuneConfig) -> None:
    """Instructions name pictures by their place in a manifest: with another manifest they would be about others."""
    path = Path(config.instructions).parent / "card.json"
    try:
        made_from = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise X2DFDError(f"{path}, the card of the instructions, cannot be read: {error}") from error
    if made_from["manifest_sha256"] != file_sha256(Path(config.manifest)):
        raise X2DFDError(f"{config.instructions} were built from another manifest than {config.manifest}")
    if made_from["config"]["view_seed"] != config.view_seed:
        raise X2DFDError(f"{config.instructions} were built with view_seed {made_from['config']['view_seed']}")


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
        raise X2DFDError(f"{work} holds a training with other settings or data; choose another out, or delete it")
    last: str | None = get_last_checkpoint(str(work))
    return last


def _to_half(path: Path) -> None:
    state = load_file(path)
    temporary = path.with_suffix(".tmp")
    save_file({k: v.half().contiguous() for k, v in state.items()}, temporary, {"format": "pt"})
    temporary.replace(path)


def _card(
    config: FinetuneConfig,
    out: Path,
    processor: Any,
    model: Any,
    layers: tuple[int, ...],
    figures: dict[str, Any],
) -> AdapterCard:
    data_card = json.loads((Path(config.instructions).parent / "card.json").read_text(encoding="utf-8"))
    return AdapterCard(
        name=config.name,
        version=config.version,
        source="trained by this project: python -m finetune",
        licence=config.licence,
        sha256=file_sha256(out / WEIGHTS),
        preprocessing=PREPROCESSING,
        paper="X2-DFD, arXiv 2410.06126",
        blind_spot=config.blind_spot,
        weights=WEIGHTS,
        trained_on=config.trained_on,
        figures=figures,
        held_out=tuple(data_card["config"]["held_out"]),
        base=base_identity(config.base),
        tower_layers=int(model.config.vision_config.num_hidden_layers),
        text_layers=config.text_layers or int(model.config.text_config.num_hidden_layers),
        feature_layers=layers,
        prompt_sha256=prompts.prompt_hash(processor),
        experts={name: _expert_sha256(name, out) for name in data_card["config"]["experts"]},
        data_sha256=file_sha256(Path(config.instructions)),
    )


def _expert_sha256(name: str, out: Path) -> str:
    own = out / "experts" / f"{name}.card.json"
    return (read_card(own) if own.is_file() else expert_class(name).card).sha256
