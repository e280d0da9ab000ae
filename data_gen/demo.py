"""`python -m data_gen.demo --out DIR`: runs `x2dfd detect` on a real photo (NASA's portrait of Eileen Collins, public
domain, from scikit-image) and on its forged twin, prints the truth about the forgery, and writes an HTML report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import typer

from data_gen.forge import METHODS, Photo, forge
from x2dfd.cli import main as x2dfd_command
from x2dfd.cli import run_command
from x2dfd.faces import find_faces
from x2dfd.files import write_text


def make_pair(out: Path) -> tuple[Path, Path]:
    """Write `real.jpg` and `forged.jpg` (same quality), and the forgery's truth; returns the two paths."""
    from skimage.data import astronaut

    pixels = np.asarray(astronaut(), np.uint8)
    face = find_faces(pixels)[0]
    photo = Photo(pixels, face.landmarks, "nasa", "eileen-collins")
    forged = forge(photo, METHODS["mouth"], np.random.default_rng(3), strength=0.9)
    out.mkdir(parents=True, exist_ok=True)
    for name, image in (("real.jpg", pixels), ("forged.jpg", forged.pixels)):
        cv2.imwrite(str(out / name), cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 95])
    cv2.imwrite(str(out / "mask.png"), forged.mask)
    truth = {
        "method": forged.method,
        "strength": forged.strength,
        "cues": [f"{c.area}: {c.artifact}" for c in forged.cues],
    }
    write_text(out / "truth.json", json.dumps(truth, indent=1) + "\n")
    return out / "real.jpg", out / "forged.jpg"


def run(out: Annotated[Path, typer.Option(help="folder for the pictures and the report")] = Path("build/demo")) -> None:
    """Forge a photo, judge both, write report.html."""
    real, forged = make_pair(out)
    print(f"what was really done to {forged}: {(out / 'truth.json').read_text()}", file=sys.stderr)
    sys.argv = ["x2dfd", "detect", str(real), str(forged), "--report", str(out / "report.html")]
    x2dfd_command()


if __name__ == "__main__":
    run_command(run, "Example:\n\n  python -m data_gen.demo --out build/demo")
