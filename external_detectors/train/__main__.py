"""The command line of `external_detectors.train`."""

from __future__ import annotations

import typer

from external_detectors.train import heads, probe, ranges, tower
from x2dfd.cli import run_command

EXAMPLE = "Example:\n\n  python -m external_detectors.train {}"
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _train() -> None:
    """Train an expert; weights and card are written whole or not at all."""


app.command(epilog=EXAMPLE.format("tower --data photos.csv --data build/forged/manifest.jsonl --out build/tower"))(
    tower.tower
)
app.command(epilog=EXAMPLE.format("heads --data build/forged/manifest.jsonl --start build/tower --features F --out O"))(
    heads.heads
)
app.command(epilog=EXAMPLE.format("probe --data photos.csv --data build/forged/manifest.jsonl --features F --out O"))(
    probe.probe
)
app.command(epilog=EXAMPLE.format("ranges --data photos.csv --model build/adapter"))(ranges.ranges)


if __name__ == "__main__":
    run_command(app)
