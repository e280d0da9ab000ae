"""`python -m data_gen forge | build`: see `--help` of each."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from data_gen import catalogue, leaks, questions, read_commands
from x2dfd.cli import run_command
from x2dfd.files import Json
from x2dfd.options import Seed, names

T = TypeVar("T")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _rooms() -> None:
    """Forgeries with known cues, and the instruction set made of them."""


def _configured(kind: type[T], options: Json) -> T:
    """The configuration that a command's options of the same names make; an empty list is the default one."""
    values: Json = {}
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in options:
            value = options[field.name]
            if isinstance(field.default, tuple):
                value = names(value) or field.default
            values[field.name] = str(value) if isinstance(value, Path) else value
    return kind(**values)


_FORGE_EPILOG = """Examples:\n
  python -m data_gen forge --data photos.csv --out build/forged --count 2000 --seed 1\n
  python -m data_gen forge --data photos.csv --out build/sbi --count 500 --methods self_blend --workers 2
"""


@app.command(epilog=_FORGE_EPILOG)
def forge(
    data: Annotated[Path, typer.Option(help="manifest of photos (CSV, JSONL, Parquet)")],
    out: Annotated[
        Path, typer.Option(help="folder for images, masks and manifest.jsonl; a run that was cut off resumes there")
    ],
    count: Annotated[int, typer.Option(min=1, help="pictures in all")],
    seed: Annotated[int, typer.Option(min=0, help="same seed, same bytes, on any number of workers")] = 0,
    methods: Annotated[str, typer.Option(help="comma-separated forge methods; empty for all")] = "",
    forged: Annotated[float, typer.Option(help="share of forgeries; the others stay real")] = 0.55,
    harmless: Annotated[
        float, typer.Option(help="share of pictures with a harmless change, the same for real and fake")
    ] = 0.5,
    combine: Annotated[float, typer.Option(help="share of forgeries with a second manipulation")] = 0.0,
    ready_made: Annotated[
        float, typer.Option(help="share of pictures that are the manifest's own fakes, passed through")
    ] = 0.0,
    calib: Annotated[float, typer.Option(help="share of train groups put into split `calib`")] = 0.0,
    splits: Annotated[str, typer.Option(help="only these splits, comma-separated; empty for all")] = "",
    decoders: Annotated[Path | None, typer.Option(help="file of `data_gen decoders` to redraw with")] = None,
    redraw: Annotated[
        Path | None, typer.Option(help="folder of TAESD's weights: adds latent_redraw and latent_face to all methods")
    ] = None,
    video: Annotated[float, typer.Option(help="share of pictures put through H.264, the same for real and fake")] = 0.0,
    workers: Annotated[int, typer.Option(min=1, help="processes")] = 1,
) -> None:
    """Forge photos with known cues: image, mask, cues, strength, class, source group."""
    from data_gen.forge import LATENT, METHODS
    from data_gen.run_forge import ForgeConfig, run

    config = _configured(ForgeConfig, locals())
    if redraw and not methods:
        config = replace(config, methods=(*METHODS, *LATENT))
    print(run(config, out, workers))


_BUILD_EPILOG = """Examples:\n
  python -m data_gen build --data build/forged/manifest.jsonl --out build/instructions\n
  python -m data_gen build --data build/forged/manifest.jsonl --out build/instructions --assessment build/mfa.json\n
"""


@app.command(epilog=_BUILD_EPILOG)
def build(
    data: Annotated[Path, typer.Option(help="manifest.jsonl of `data_gen forge`")],
    out: Annotated[Path, typer.Option(help="folder for instructions.jsonl, its Parquet copy and card.json")],
    assessment: Annotated[Path | None, typer.Option(help="assessment.json: only its strong cues are explained")] = None,
    experts: Annotated[str, typer.Option(help="comma-separated, in prompt order; empty for the default set")] = "",
    expert_weights: Annotated[Path | None, typer.Option(help="folder of other weights than the experts' own")] = None,
    features: Annotated[
        Path | None, typer.Option(help="folder for the tower's outputs, which finetune takes as cached_features")
    ] = None,
    held_out: Annotated[
        str, typer.Option("--hold-out", help="forge methods kept out of training, comma-separated")
    ] = "",
    corrupt: Annotated[
        float, typer.Option(help="share of the experts' scores in questions that are made wrong or left out")
    ] = 0.15,
    score_form: Annotated[str, typer.Option(help="how questions give scores: numbers, words or both")] = "numbers",
    closing: Annotated[
        bool,
        typer.Option(help="end explanations with a sentence on the experts that agree; only paper mode shows it"),
    ] = True,
    explanations: Annotated[int, typer.Option(min=0, help="explained verdicts per fake whose cues are known")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="at most this many pictures, drawn by id")] = None,
    view_seed: Annotated[int, typer.Option(min=0, help="seed of the augmented views; finetune needs the same")] = 1,
    format: Annotated[
        str | None,
        typer.Option(
            help="also write the set, with its pictures, in another stack's format: llava, sharegpt, messages"
        ),
    ] = None,
    crop_size: Annotated[
        int, typer.Option(help="side of the pictures of --format: 336 for LLaVA-1.5", min=224, max=1024)
    ] = 224,
    seed: Seed = 0,
) -> None:
    """Instruction data from the forgeries' truth, the ranking and the experts' scores."""
    from data_gen.build import BuildConfig
    from data_gen.build import build as run_build

    print(run_build(_configured(BuildConfig, locals()), out))


@app.command(epilog="Example:\n\n  python -m data_gen adopt train.json --pictures images/ --out build/instructions")
def adopt(
    source: Annotated[Path, typer.Argument(help="conversations as LLaVA, LLaMA-Factory or ms-swift train on them")],
    out: Annotated[Path, typer.Option(help="folder for instructions.jsonl, manifest.jsonl and card.json")],
    pictures: Annotated[
        Path | None, typer.Option(help="where relative paths start; the file's folder if not given")
    ] = None,
    experts: Annotated[
        str,
        typer.Option(help="experts whose scores the questions state; ALIAS=NAME if renamed there: blending=NAME"),
    ] = "",
) -> None:
    """Another stack's conversations as an instruction set that finetune takes."""
    from data_gen.adopt import adopt as run_adopt

    print(run_adopt(source, out, pictures=pictures, experts=experts))


app.command("questions", epilog=questions.EPILOG)(questions.command)
app.add_typer(read_commands.kinds, name="read")
app.command("leaks", epilog=leaks.EPILOG)(leaks.command)
app.command("catalogue", epilog=catalogue.EPILOG)(catalogue.command)


@app.command(epilog="Example:\n\n  python -m data_gen decoders --data build/forged/manifest.jsonl")
def decoders(
    data: Annotated[Path, typer.Option(help="manifest of `data_gen forge`: its untouched real photos are used")],
    steps: Annotated[int, typer.Option(min=1, help="training steps of each decoder, of 16 patches")] = 600,
    work: Annotated[
        Path, typer.Option(help="folder of finished decoders, from which a run that was cut off resumes")
    ] = Path("build/decoders"),
    out: Annotated[
        Path, typer.Option(help="weight file to write; the forge reads the default one, or forge --decoders FILE")
    ] = Path(__file__).parent / "weights" / "decoders.safetensors",
) -> None:
    """Train the small autoencoders whose decoders redraw faces."""
    from data_gen.decoders import train  # torch

    train(data, steps, work, out)
    print(out)


if __name__ == "__main__":
    run_command(app)
