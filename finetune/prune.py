"""`python -m finetune.prune`: which language layers a small model can do without.

Whichever layer costs the least loss on text is dropped, again and again (after Men et al., "ShortGPT: Layers in Large
Language Models are More Redundant Than You Expect", 2024, with the loss itself instead of their similarity). Prints a
line for each number of layers: what `text_layers` of a fine-tuning configuration takes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from data_gen.writers import write_explanation
from x2dfd import prompts
from x2dfd.cli import run_command
from x2dfd.loading import load_model
from x2dfd.types import Cue

_PLAIN = (
    "The quick brown fox jumps over the lazy dog. A photograph of a person shows the face, with eyes, nose and mouth. "
    "If light comes from one side, the shadow falls on the other side."
)


def sample_text(processor: Any, seed: int = 0) -> Tensor:
    """Token ids [1, s]: conversations as training has them, and some plain English."""
    rng = np.random.default_rng(seed)
    seam = (Cue("jaw", "blending", 0.8), Cue("skin", "colour", 0.5))
    pairs = [("real", ()), ("fake", seam), ("real", ())]
    texts = []
    for label, cues in pairs:
        explanation = write_explanation(label, cues, "FS" if cues else "real", rng)
        question = prompts.render(processor, prompts.QUESTION).replace(processor.image_token, "")
        texts.append(f"{question}{prompts.verdict_answer(label, explanation)}\n")
    return torch.tensor([processor.tokenizer("".join(texts) + _PLAIN)["input_ids"]])


@torch.inference_mode()
def prune(model: Any, ids: Tensor, least: int) -> Iterator[tuple[list[int], float, float]]:
    """(layers kept, loss in nats a token, loss of as many layers from the front), from all layers down to `least`."""
    text, head = model.model.language_model, model.lm_head.weight
    hidden = text.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    turns = text.rotary_emb(hidden, positions)
    mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)[None, None]

    def through(x: Tensor, layers: Sequence[int]) -> Tensor:
        for k in layers:
            out = text.layers[k](x, attention_mask=mask, position_embeddings=turns, position_ids=positions)
            x = out[0] if isinstance(out, tuple) else out
        return x

    def loss(x: Tensor) -> float:
        return float(F.cross_entropy((text.norm(x) @ head.T)[0, :-1], ids[0, 1:]))

    kept = list(range(len(text.layers)))
    yield kept, (whole := loss(through(hidden, kept))), whole
    while len(kept) > least:
        before, found = hidden, []
        for place, layer in enumerate(kept):  # what stands before the dropped layer is computed once
            found.append((loss(through(before, kept[place + 1 :])), place))
            before = through(before, [layer])
        cost, place = min(found)
        kept = kept[:place] + kept[place + 1 :]
        yield kept, cost, loss(through(hidden, range(len(kept))))


def _run(
    base: Annotated[str | None, typer.Option(help="LLaVA directory or hub name; default: the embedded base")] = None,
    least: Annotated[int, typer.Option(help="go down to this many layers", min=1)] = 8,
) -> None:
    """Drop language layers one by one, always the one that costs the least loss on text."""
    model, processor = load_model(base)
    for kept, cost, first in prune(model, sample_text(processor), least):
        line = {"layers": len(kept), "loss": round(cost, 4), "loss_of_the_first": round(first, 4), "kept": kept}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    run_command(_run)
