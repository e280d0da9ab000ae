"""An adapter merged into its base: one model directory, whose probe scores are checked."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from x2dfd.adapter import WHOLE, check_probes, probe_logits, read_adapter_card, write_adapter_card
from x2dfd.checkpoints import base_identity
from x2dfd.errors import SetupError
from x2dfd.loading import load
from x2dfd.mllm import LocalMLLM
from x2dfd.model_spec import ModelSpec


def merge(model: str | Path | ModelSpec, out: Path) -> Path:
    """Write the merged model to `out`, a directory that `x2dfd.load` takes without the base; returns it. The written
    model scores the probe pictures of the adapter's card. Raises SetupError, and leaves nothing, if a score moved."""
    spec = ModelSpec.parse(model)
    if (adapter := spec.adapter) is None or spec.url is not None:
        raise SetupError(f"{spec} names no adapter to merge: give DIR, or hub:NAME+DIR", code="adapter_missing")
    card = read_adapter_card(adapter)
    if not card.probes:
        raise SetupError(
            f"{adapter / 'card.json'} has no probe scores to check by: train it again", code="probes_missing"
        )
    if out.exists():
        raise SetupError(f"{out} is there already; choose another folder", code="folder_taken")
    mllm = load(spec, mode="paper", experts=(), device="cpu").mllm
    assert isinstance(mllm, LocalMLLM)
    expected = probe_logits(mllm, card.crop_size)  # the card's may come from another precision
    draft = out.with_name(f".{out.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        mllm.save(draft / WHOLE)
        identity = base_identity(draft / WHOLE)
        text = len(card.text_layers) if isinstance(card.text_layers, tuple) else card.text_layers
        whole = replace(card, weights=WHOLE, sha256=identity["sha256"], base=identity, text_layers=text, probes=())
        write_adapter_card(draft, whole)
        logits = probe_logits(load(draft, mode="paper", experts=(), device="cpu").mllm, card.crop_size)
        check_probes(replace(card, probes=expected), logits)
        write_adapter_card(draft, replace(whole, probes=card.probes))
        for name in ("calibration.json", "experts"):
            source = adapter / name
            if source.is_dir():
                shutil.copytree(source, draft / name)
            elif source.is_file():
                shutil.copy(source, draft / name)
        draft.replace(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out
