"""`python -m finetune --config FILE.yaml [--set key=value ...]`; `python -m finetune convert`, `merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from x2dfd.cli import run_command

_EPILOG = """Examples:\n
  python -m finetune --config finetune/embedded.yaml\n
  python -m finetune --config finetune/embedded.yaml --set max_steps=200 --set out=build/adapter
"""
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True, epilog=_EPILOG)
def run(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="YAML file; see finetune/config.py for every key")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, which overrides the file")] = None,
    dry_run: Annotated[bool, typer.Option(help="print what would be trained and how much memory it takes")] = False,
    gpus: Annotated[int, typer.Option(help="number of GPUs, with --dry-run", min=1)] = 1,
) -> None:
    """Fine-tune an MLLM on an instruction set; a cut-off run resumes."""
    if context.invoked_subcommand is not None:
        return
    if config is None:
        raise typer.BadParameter("a training needs --config FILE.yaml")
    from finetune.config import check_inputs, load_config

    settings = load_config(config, set_ or ())
    if dry_run:
        from finetune.memory import report

        print(report(settings, gpus))
        check_inputs(settings)  # after the answer, which may be wanted before there are any
        return
    from finetune.train import train

    print(train(settings))


@app.command(
    epilog="Example:\n\n  python -m finetune convert build/published build/adapter --base llava-hf/llava-1.5-7b-hf"
)
def convert(
    source: Annotated[Path, typer.Argument(help="adapter directory")],
    out: Annotated[Path, typer.Argument(help="directory to write")],
    base: Annotated[str, typer.Option(help="the base's name or directory in the target layout")],
    to: Annotated[str, typer.Option(help="layout: hub, or llava for LLaVA's own code")] = "hub",
    frame: Annotated[str, typer.Option(help="chat template: train_consistent, or official_infer")] = "train_consistent",
    experts: Annotated[
        str,
        typer.Option(help="experts in the prompt's order; ALIAS=NAME if renamed there: blending=NAME,NAME"),
    ] = "",
) -> None:
    """Published X2-DFD adapters (LLaVA's layout, or a checkpoint of its training) to the hub's layout, and back."""
    from finetune.convert import to_hub, to_llava
    from x2dfd.errors import UnknownName
    from x2dfd.experts import aliased

    if to not in ("hub", "llava"):
        raise UnknownName("layout", to, ("hub", "llava"))
    if to == "hub":
        names, aliases = aliased(experts)
        to_hub(source, out, base=base, frame=frame, experts=names, aliases=aliases)
    else:
        to_llava(source, out, base=base)
    print(out)


@app.command(epilog="Example:\n\n  python -m finetune merge --model build/adapter --out build/merged")
def merge(
    model: Annotated[str, typer.Option(metavar="SPEC", help="adapter directory DIR, or hub:NAME+DIR")],
    out: Annotated[Path, typer.Option(help="directory to write")],
) -> None:
    """Merge an adapter into its base; refused if the scores of the card's probe pictures change."""
    from finetune.merge import merge as merge_adapter

    print(merge_adapter(model, out))


if __name__ == "__main__":
    run_command(app)
