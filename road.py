"""The pipeline of one model on a small sample, on a CPU: each stage a command that reads the file of the one before.

    python road.py --out build/road                      photos made from one that scikit-image carries
    python road.py --out build/road --data MANIFEST      photos (and ready-made fakes) of your own

Thin, not fake: every stage is the real one with small numbers, so the model at its end is a toy. `--out` resumes.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

Words = list[str | Path | float]

PEOPLE = 18  # made-up people, each a group of its own


def make_photos(out: Path) -> Path:
    """Photos of made-up people: one portrait, its mesh bent and its tone changed at random, and its "generated" copies.

    The portrait is NASA's (public domain, from scikit-image). Real and fake labels here mean: bent only, or also
    resynthesised as a whole.
    """
    import cv2
    import numpy as np
    from skimage.data import astronaut

    from data_gen.forge import HARMLESS, METHODS, Photo, forge
    from x2dfd.faces import find_faces

    manifest = out / "photos.csv"
    if manifest.is_file():
        return manifest
    (out / "photos").mkdir(parents=True, exist_ok=True)
    pixels = np.asarray(astronaut(), np.uint8)[:300, 60:400]
    landmarks = find_faces(pixels)[0].landmarks
    rows = []
    for person in range(PEOPLE):
        rng = np.random.default_rng(person)
        face = Photo(pixels, landmarks, "made", f"person-{person}")
        if person % 2 == 0:
            mirrored = np.ascontiguousarray(pixels[:, ::-1])
            face = replace(face, pixels=mirrored, landmarks=find_faces(mirrored)[0].landmarks)
        for method in ("area_warp", "expression", "area_warp"):
            face = replace(face, pixels=forge(face, METHODS[method], rng, strength=0.4).pixels)
        face = replace(face, pixels=forge(face, HARMLESS["global_tone"], rng, strength=0.5).pixels)
        split = "val" if person % 6 == 5 else "train"
        made = forge(face, METHODS["resynthesise"], rng, strength=0.9).pixels
        for kind, method, df_class, image in (
            ("real", "none", "real", face.pixels),
            ("fake", "resynthesised", "EFS", made),
        ):
            path = f"photos/{person:02d}-{kind}.jpg"
            cv2.imwrite(str(out / path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 94])
            rows.append([path, kind, method, df_class, "made", face.group, split])
    with manifest.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "label", "method", "df_class", "source", "group", "split"])
        writer.writerows(rows)
    return manifest


def stage(title: str, *command: str | Path | float) -> None:
    """Run one command with this interpreter, as a user would; the pipeline ends at the first that fails."""
    words = [str(word) for word in command]
    print(f"\n=== {title}\n$ python {' '.join(words)}", flush=True)
    start = time.monotonic()
    done = subprocess.run([sys.executable, *words], check=False)
    if done.returncode:
        sys.exit(f"road: {title!r} ended with exit code {done.returncode}")
    print(f"--- {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/road"))
    parser.add_argument(
        "--data", type=Path, help="manifest with real photos and some ready-made fakes, splits train and val"
    )
    parser.add_argument("--count", type=int, default=96, help="pictures to forge")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    photos = arguments.data or make_photos(out)
    forged, experts, adapter = out / "forged" / "manifest.jsonl", out / "experts", out / "adapter"

    forge: Words = ["-m", "data_gen", "forge", "--data", photos, "--out", out / "forged", "--count", arguments.count]
    stage("forge: photos to forgeries with known cues", *forge, "--ready-made", 0.2, "--calib", 0.3, "--workers", 2)
    train: Words = ["-m", "external_detectors.train"]
    eye: Words = ["tower", "--data", photos, "--data", forged, "--out", experts, "--state", out / "tower"]
    stage("expert: tower", *train, *eye, "--minutes", 0.5, "--batch", 4, "--checks", 0, "--workers", 0)
    stage("questions", "-m", "data_gen", "questions", "--out", out / "questions.json")
    assess: Words = ["--data", forged, "--out", out / "mfa", "--questions", out / "questions.json", "--limit", 6]
    stage("assess: which cues can the model see?", "-m", "x2dfd.cli", "assess", *assess)
    build: Words = ["--data", forged, "--out", out / "instructions", "--assessment", out / "mfa" / "assessment.json"]
    features = out / "forged" / ".tower"
    build += ["--experts", "tower", "--expert-weights", experts, "--features", features]
    stage("build: the instruction set", "-m", "data_gen", "build", *build)
    settings = {
        "instructions": out / "instructions" / "instructions.jsonl",
        "manifest": forged,
        "expert_weights": experts,
        "cached_features": features,
        "out": adapter,
    }
    chosen = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    stage("fine-tune", "-m", "finetune", "--config", "finetune/road.yaml", *chosen)
    stage("calibrate", "-m", "x2dfd.cli", "calibrate", "--model", adapter, "--data", forged)
    bench: Words = ["--data", forged, "--split", "val", "--model", adapter, "--out", out / "bench"]
    stage("score", "eval/run_bench.py", "detect", *bench)
    picture = sorted((out / "forged" / "images").rglob("*.jpg"))[0]
    show: Words = [picture, "--model", adapter, "--report", out / "report.html"]
    stage("detect with the adapter just made", "-m", "x2dfd.cli", "detect", *show)
    print(f"\nroad: done in {time.monotonic() - start:.0f} s; the adapter is {adapter}, the page {out / 'report.html'}")


if __name__ == "__main__":
    main()
