"""The whole road of one model on a small sample, on a CPU: each stage by its own command, each reading the file before it.

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
from pathlib import Path

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
        face = Photo(pixels if person % 2 else np.ascontiguousarray(pixels[:, ::-1]), landmarks, "made", f"person-{person}")
        if person % 2 == 0:
            face = Photo(face.pixels, find_faces(face.pixels)[0].landmarks, face.source, face.group)
        for method in ("area_warp", "expression", "area_warp"):
            face = Photo(forge(face, METHODS[method], rng, strength=0.4).pixels, face.landmarks, face.source, face.group)
        face = Photo(forge(face, HARMLESS["global_tone"], rng, strength=0.5).pixels, face.landmarks, face.source, face.group)
        split = "val" if person % 6 == 5 else "train"
        for kind, image in (("real", face.pixels), ("fake", forge(face, METHODS["resynthesise"], rng, strength=0.9).pixels)):
            path = f"photos/{person:02d}-{kind}.jpg"
            cv2.imwrite(str(out / path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 94])
            made = kind == "fake"
            rows.append([path, kind, "resynthesised" if made else "none", "EFS" if made else "real", "made", face.group, split])
    with manifest.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "label", "method", "df_class", "source", "group", "split"])
        writer.writerows(rows)
    return manifest


def stage(title: str, *command: str | Path) -> None:
    """Run one command as a user would, with this interpreter; the road ends at the first that fails."""
    program, *arguments = map(str, command)
    print(f"\n=== {title}\n$ {' '.join([program, *arguments])}", flush=True)
    start = time.monotonic()
    module = [] if program == "python" else ["-m", "x2dfd.cli"]
    done = subprocess.run([sys.executable, *module, *arguments], check=False)
    if done.returncode:
        sys.exit(f"road: {title!r} ended with exit code {done.returncode}")
    print(f"--- {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/road"))
    parser.add_argument("--data", type=Path, help="manifest with real photos and some ready-made fakes, splits train and val")
    parser.add_argument("--count", type=int, default=96, help="pictures to forge")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    photos = arguments.data or make_photos(out)
    forged, experts, adapter = out / "forged" / "manifest.jsonl", out / "experts", out / "adapter"

    stage("forge: photos to forgeries with known cues",
          "python", "-m", "data_gen", "forge", "--data", photos, "--out", out / "forged", "--count", str(arguments.count),
          "--ready-made", "0.2", "--calib", "0.3", "--workers", "2")  # fmt: skip
    stage("expert: blending", "python", "-m", "external_detectors.train", "blending", "--data", forged, "--out", experts,
          "--state", out / "blending", "--steps", "8", "--batch", "8", "--from-scratch")  # fmt: skip
    stage("experts: clip and forgery, and the tower's features", "python", "-m", "external_detectors.train", "clip",
          "--data", forged, "--out", experts, "--oof", out / "oof.json", "--keep", "5,8,11")  # fmt: skip
    stage("questions", "python", "-m", "data_gen", "questions", "--out", out / "questions.json")
    stage("assess: which cues can the model see?", "x2dfd", "assess", "--data", forged, "--out", out / "mfa",
          "--questions", out / "questions.json", "--limit", "6")  # fmt: skip
    stage("build: the instruction set", "python", "-m", "data_gen", "build", "--data", forged, "--out", out / "instructions",
          "--assessment", out / "mfa" / "assessment.json", "--expert-weights", experts, "--oof", out / "oof.json")  # fmt: skip
    stage("fine-tune", "python", "-m", "finetune", "--config", "finetune/road.yaml",
          "--set", f"instructions={out}/instructions/instructions.jsonl", "--set", f"manifest={forged}",
          "--set", f"expert_weights={experts}", "--set", f"cached_features={out}/forged/.tower", "--set", f"out={adapter}")  # fmt: skip
    stage("calibrate", "python", "-m", "finetune.calibrate", "--adapter", adapter, "--data", forged)
    stage("score", "python", "eval/run_bench.py", "detect", "--data", forged, "--split", "val", "--model", adapter,
          "--out", out / "bench", "--bootstrap", "200")  # fmt: skip
    stage("detect with the adapter just made", "x2dfd", "detect", next(iter(sorted((out / "forged" / "images").rglob("*.jpg")))),
          "--model", adapter, "--report", out / "report.html")  # fmt: skip
    print(f"\nroad: done in {time.monotonic() - start:.0f} s; the adapter is {adapter}, the page {out / 'report.html'}")


if __name__ == "__main__":
    main()
