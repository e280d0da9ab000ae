"""`python -m data_gen forge | build`: see `--help` of each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from x2dfd.errors import X2DFDError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _rooms() -> None:
    """Forgeries with known cues, and the instruction set made of them."""


_FORGE_EPILOG = """Examples:\n
  python -m data_gen forge --data photos.csv --out build/forged --count 2000 --seed 1\n
  python -m data_gen forge --data photos.csv --out build/sbi --count 500 --methods self_blend --workers 2
"""


@app.command(epilog=_FORGE_EPILOG)
def forge(
    data: Annotated[Path, typer.Option(help="manifest of photos (CSV, JSONL, Parquet)")],
    out: Annotated[Path, typer.Option(help="folder for images, masks and manifest.jsonl; a cut-off run goes on there")],
    count: Annotated[int, typer.Option(help="pictures in all")],
    seed: Annotated[int, typer.Option(help="same seed, same bytes, on any number of workers")] = 0,
    methods: Annotated[str, typer.Option(help="comma-separated forge methods; empty for all")] = "",
    forged: Annotated[float, typer.Option(help="share of forgeries; the others stay real")] = 0.55,
    harmless: Annotated[float, typer.Option(help="share of harmless changes among what stays real")] = 0.5,
    combine: Annotated[float, typer.Option(help="share of forgeries with a second manipulation")] = 0.0,
    ready_made: Annotated[float, typer.Option(help="share of the manifest's own fakes, passed through")] = 0.0,
    calib: Annotated[float, typer.Option(help="share of train groups put into split `calib`")] = 0.0,
    splits: Annotated[str, typer.Option(help="only these splits, comma-separated; empty for all")] = "",
    workers: Annotated[int, typer.Option(help="processes")] = 1,
) -> None:
    """Forge photos with known cues: image, mask, cues, strength, class, source group."""
    from data_gen.forge import METHODS
    from data_gen.run_forge import ForgeConfig, run

    config = ForgeConfig(
        data=str(data),
        count=count,
        seed=seed,
        forged=forged,
        harmless=harmless,
        combine=combine,
        ready_made=ready_made,
        calib=calib,
        methods=tuple(m for m in methods.split(",") if m) or tuple(METHODS),
        splits=tuple(s for s in splits.split(",") if s),
    )
    print(run(config, out, workers))


def main() -> None:
    try:
        app()
    except X2DFDError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
