"""The command line of `external_detectors.train`."""

from __future__ import annotations

import typer

from external_detectors.train import cues, heads, probe, ranges, tower
from x2dfd.cli import run_command

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _train() -> None:
    """Train an expert; weights and card are written whole or not at all."""


for command, example in (
    (tower.tower, "tower --data photos.csv --data build/forged/manifest.jsonl --out build/tower"),
    (heads.heads, "heads --data build/forged/manifest.jsonl --start build/tower --features F --out O"),
    (cues.cues, "cues --data build/forged/manifest.jsonl --tower build/tower --features F --out O"),
    (probe.probe, "probe --data photos.csv --data build/forged/manifest.jsonl --features F --out O"),
    (ranges.ranges, "ranges --data photos.csv --model build/adapter"),
):
    app.command(epilog=f"Example:\n\n  python -m external_detectors.train {example}")(command)


if __name__ == "__main__":
    run_command(app)
