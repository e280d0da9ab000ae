"""Options that several commands share, with the same name, help and values in every room."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import typer

from x2dfd.model_spec import MAX_THREADS, Bits, Dtype, LoadOptions, Mode

MODEL_HELP = (
    "embedded, an adapter directory, hub:NAME, hub:NAME+DIR, NAME@http://HOST/v1 or NAME@http://HOST/v1+DIR. "
    "An endpoint gets the face crops; its key is read from OPENAI_API_KEY; ?requests-per-minute=N after its address "
    "spreads the requests to it."
)
of_model = partial(typer.Option, rich_help_panel="Model")
"""An option that stands in the panel of the model."""

Model = Annotated[str, of_model("--model", metavar="SPEC", help=MODEL_HELP)]
ModeOption = Annotated[
    Mode | None,
    of_model(
        "--mode",
        help="calibrated (the default if the model has a calibration): combines experts and MLLM, by weights that may "
        "be 0; paper: takes the MLLM's own P(fake), not calibrated.",
    ),
]
Device = Annotated[
    str | None,
    of_model("--device", metavar="NAME", help="cpu, cuda, cuda:1 ...; by default CUDA, where there is one."),
]
DtypeOption = Annotated[
    Dtype | None,
    of_model(
        "--dtype",
        help="Precision of the MLLM: by default bf16 on CUDA, fp32 on a CPU; the embedded model takes bf16 on a CPU "
        "that is quick in it. int8 (embedded model, CPUs with VNNI): tower and CLIP in 8 bits, half the time "
        "for many pictures; P(fake) moves by 0.01 in the median, by 0.04 or more for one in ten.",
    ),
]
BitsOption = Annotated[
    Literal["4", "8"] | None, of_model("--bits", help="Quantise a large MLLM's weights to 4 or 8 bits (bitsandbytes).")
]
DeviceMap = Annotated[str | None, of_model("--device-map", metavar="auto", help="Spread a large MLLM over all GPUs.")]
Threads = Annotated[int | None, of_model("--threads", min=1, max=MAX_THREADS, metavar="N", help="CPU threads.")]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of all random choices.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout.", rich_help_panel="Output")]


def names(text: str | None) -> tuple[str, ...]:
    """The names in a comma-separated option."""
    return tuple(name for part in (text or "").split(",") if (name := part.strip()))


def load_options(
    mode: Mode | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
    bits: Literal["4", "8"] | None = None,
    device_map: str | None = None,
    threads: int | None = None,
) -> LoadOptions:
    """The options of `x2dfd.load`."""
    width: Bits | None = None if bits is None else 4 if bits == "4" else 8
    return {"mode": mode, "threads": threads, "device": device, "dtype": dtype, "device_map": device_map, "bits": width}
