"""`python -m finetune --config FILE.yaml [--set key=value ...]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from x2dfd.errors import X2DFDError

_EPILOG = """Examples:\n
  python -m finetune --config finetune/embedded.yaml\n
  python -m finetune --config finetune/embedded.yaml --set max_steps=200 --set out=build/adapter
"""


def run(
    config: Annotated[Path, typer.Option(help="YAML file; see finetune/config.py for every key")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, on top of the file")] = None,
) -> None:
    """Fine-tune an MLLM on an instruction set; a cut-off run resumes."""
    from finetune.config import load_config
    from finetune.train import train

    print(train(load_config(config, set_ or ())))


def main() -> None:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(epilog=_EPILOG)(run)
    try:
        app()
    except X2DFDError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
