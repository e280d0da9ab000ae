"""Does what a user does with the wheel, the plug-in and the container, in an environment that begins empty.

The wheel is built, installed with its own dependencies, and judges a portrait; the plug-in of examples/ is installed
beside it. Then come the steps of app/Dockerfile: by `docker build`, where a Docker daemon answers; elsewhere its `pip`
and `x2dfd` steps and its CMD run in that same environment, and the others are only read. Options are pip's:
`python .ci/clean_install.py --no-index ...`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CARRIED = ("FROM", "ARG", "RUN", "WORKDIR", "COPY", "USER", "ENV", "EXPOSE", "CMD")  # instructions that are understood


def main(options: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="x2dfd-clean-") as folder:
        place = Path(folder)
        source = _copy(place / "source")
        subprocess.run([sys.executable, "-m", "venv", place / "venv"], check=True)
        path = f"{place / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
        _wheel(source, place, path, options)
        steps = _instructions(source / "app" / "Dockerfile")
        port = next(words for name, words in steps if name == "EXPOSE")
        head = (source / "app" / "space.md").read_text("utf-8").split("---")[1]
        assert "sdk: docker" in head and f"app_port: {port}" in head, "the Space asks for another port than is exposed"
        if shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True).returncode == 0:
            _run(["docker", "build", "--file", "app/Dockerfile", "."], source, path)
        else:
            print(
                "no Docker daemon answers: the steps of app/Dockerfile run in the environment of the wheel", flush=True
            )
            _steps(steps, source, path, options)


def _copy(to: Path) -> Path:
    """What a checkout holds, without what was built in it."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    return to


def _environment(path: str) -> dict[str, str]:
    """Modules are compiled at their first import, of torch's many a small part, and kept for the next command."""
    return os.environ | {"PATH": path, "PYTHONPATH": "", "PIP_NO_COMPILE": "1", "PYTHONDONTWRITEBYTECODE": ""}


def _run(command: list[str], where: Path, path: str) -> str:
    print("$", shlex.join(command), flush=True)
    begin = time.monotonic()
    done = subprocess.run(command, cwd=where, env=_environment(path), stdout=subprocess.PIPE, text=True)
    print(f"  {time.monotonic() - begin:.0f} s", flush=True)
    if done.returncode:
        sys.exit(f"failed with {done.returncode}: {shlex.join(command)}\n{done.stdout}")
    return done.stdout


def _wheel(source: Path, place: Path, path: str, options: list[str]) -> None:
    _run(["pip", "wheel", "--quiet", *options, "--no-deps", "--wheel-dir", str(place), str(source)], place, path)
    [wheel] = place.glob("*.whl")
    pins = ["-c", str(source / "constraints.txt")]
    _run(["pip", "install", "--quiet", *options, *pins, str(wheel)], place, path)
    _run(["x2dfd", "fetch"], place, path)
    photo = str(source / "docs" / "verdict.png")
    [judged] = _run(["x2dfd", "detect", "--json", photo], place, path).splitlines()
    assert json.loads(judged)["faces"], judged
    _run(["pip", "install", "--quiet", *options, *pins, str(source / "examples" / "spectrum_expert")], place, path)
    names = [row["expert"] for row in json.loads(_run(["x2dfd", "experts", "--json"], place, path))]
    assert "spectrum" in names, names


def _instructions(dockerfile: Path) -> list[tuple[str, str]]:
    lines = [line for line in dockerfile.read_text("utf-8").splitlines() if not line.startswith("#")]
    steps = [line.split(maxsplit=1) for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]
    unknown = [name for name, _ in steps if name not in CARRIED]
    assert not unknown, f"instructions of app/Dockerfile that this check does not know: {unknown}"
    return [(name, words) for name, words in steps]


def _steps(steps: list[tuple[str, str]], source: Path, path: str, options: list[str]) -> None:
    for name, words in steps:
        if name == "COPY":
            assert words.split()[-2:] == [".", "."], words
        elif name == "RUN" and words.startswith(("pip ", "x2dfd ")):
            words = words.replace("--no-cache-dir ", "")  # it keeps an image small; here it costs a download a run
            words = re.sub(r"\$\{PIP_OPTIONS\}", shlex.join(options), words)
            _run(shlex.split(words), source, path)
        elif name == "CMD":
            _serve(json.loads(words), source, path)
        else:
            print(f"only read: {name} {words}", flush=True)


def _serve(command: list[str], source: Path, path: str) -> None:
    """The page comes up, shows its examples, and ends on a service manager's signal."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    print("$", shlex.join(command), flush=True)
    serving = subprocess.Popen([*command, "--port", str(port)], cwd=source, env=_environment(path))
    try:
        end = time.monotonic() + 600
        while True:
            try:
                page = urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=10).read().decode()
                break
            except OSError:
                assert serving.poll() is None and time.monotonic() < end, "the page did not come up"
                time.sleep(1)
        assert "its forged twin" in page, "the page has no examples"
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(60) == 0, serving.returncode
    finally:
        serving.kill()


if __name__ == "__main__":
    main(sys.argv[1:])
