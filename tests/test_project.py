"""The frame: what the wheel installs, what import costs, what must be absent, and that documents name real things."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement

from x2dfd.doctor import EXTRAS
from x2dfd.experts import Expert, ask
from x2dfd.types import Face

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = ("x2dfd", "external_detectors")
SOURCE = ("x2dfd", "data_gen", "finetune", "external_detectors", "eval", "app", "benchmarks")
CHECKOUT_ONLY = ("data_gen", "finetune", "eval", "app", "benchmarks", "examples", "experiments", "tests")
HEAVY = {
    "torch", "numpy", "PIL", "cv2", "av", "transformers", "peft", "accelerate", "pyarrow", "pandas", "scipy", "onnx",
    "gguf", "ai_edge_litert", "gradio", "openai", "typer",
}  # fmt: skip


def project() -> dict[str, Any]:
    metadata: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return metadata


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonical(name): version for name, version in pairs}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[Requirement]:
    groups = [project()["dependencies"], *project()["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


def tree() -> list[Path]:
    """The files a clone would hold: what git tracks or would track; without git, everything but what is generated."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, check=False) if shutil.which("git") else None
    if listed is not None and listed.returncode == 0 and listed.stdout:
        paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    else:
        generated = {".git", ".venv", "build", "dist", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
        made = [p for p in ROOT.rglob("*") if generated.isdisjoint(p.relative_to(ROOT).parts)]
        paths = [p for p in made if not any(part.endswith(".egg-info") for part in p.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file()]


# --- import ---------------------------------------------------------------------------------------------------------


def test_import_is_instant_and_light() -> None:
    """Bug prevented: a module-level `import torch` makes every `x2dfd --help` take seconds."""
    code = "import json, sys, time; t = time.process_time(); import x2dfd; s = time.process_time() - t; "
    code += "print(json.dumps([s, sorted({m.partition('.')[0] for m in sys.modules})]))"
    seconds = []
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        took, modules = json.loads(run.stdout)
        seconds.append(took)
        assert HEAVY.isdisjoint(modules), f"import x2dfd loads {sorted(HEAVY.intersection(modules))}"
    assert min(seconds) < 0.15  # of CPU, which a busy machine hardly moves; 0.05 were measured


def test_torchvision_comes_only_where_it_is_asked_for() -> None:
    """Bug prevented: torchvision beside a CPU build of torch makes LlavaForConditionalGeneration fail to import.

    Some dependency pulled it in: find it with `pip show torchvision` and keep it out of pyproject.toml.
    """
    assert importlib.util.find_spec("torchvision") is None
    sets = {"": project()["dependencies"], **project()["optional-dependencies"]}
    holding = [name for name, lines in sets.items() if any(Requirement(line).name == "torchvision" for line in lines)]
    assert holding == ["hub"]


# --- rooms ----------------------------------------------------------------------------------------------------------

KNOWN_EXCEPTIONS = {
    ("app/__main__.py", "data_gen"): "offers the demo's two pictures, which the forge makes",
    ("benchmarks/quality.py", "eval"): "intervals, and the origin of its result file, are those of the bench",
    ("benchmarks/speed.py", "data_gen"): "the demo's forged photo, of which a text is written",
    ("benchmarks/speed.py", "external_detectors"): "the views of the tower's training are timed",
    ("benchmarks/speed.py", "eval"): "its result file states its origin as those of the bench do",
}
"""Imports that the table of rooms does not allow, each with the reason why it is there all the same."""


def allowed_imports() -> dict[str, set[str]]:
    """Room -> the rooms that it may import, from the table of docs/architecture.md, in the order of its rows."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| `([a-z0-9_]+)/` \|.*\|([^|]*)\|$", text, re.MULTILINE)
    return {room: set(re.findall(r"`([a-z0-9_]+)`", cell)) for room, cell in rows}


def rooms_imported(path: Path, rooms: set[str]) -> set[str]:
    """The rooms that a file imports anywhere, also inside of functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found & rooms


def test_table_of_rooms_has_no_circle_and_misses_no_room() -> None:
    """Bug prevented: two rooms that need each other, so that neither can be read or used alone."""
    allowed = allowed_imports()
    rooms = {path.relative_to(ROOT).parts[0] for path in tree() if path.suffix == ".py" and path.parent != ROOT}
    assert rooms - allowed.keys() == {".ci", "docs", "tests"}
    above: set[str] = set()
    for room, imports in allowed.items():
        assert imports <= above, f"{room} may import {sorted(imports - above)}, which stands below it"
        above.add(room)


def test_rooms_import_what_the_table_allows() -> None:
    """Bug prevented: an arrow up, such as the library importing the benchmark, which then drags all of it along."""
    allowed = allowed_imports()
    found = set()
    for path in tree():
        room = path.relative_to(ROOT).parts[0]
        if path.suffix == ".py" and room in allowed:
            extra = rooms_imported(path, set(allowed)) - allowed[room] - {room}
            found |= {(path.relative_to(ROOT).as_posix(), other) for other in extra}
    assert found - KNOWN_EXCEPTIONS.keys() == set()
    outlived = {(name, room) for name, room in KNOWN_EXCEPTIONS if (ROOT / name).is_file()} - found
    assert outlived == set(), "no exceptions any more: take them off the list"


def modules_imported(path: Path) -> set[str]:
    """Names that a module imports when it is imported itself, or for its types: not inside of functions."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text("utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Module | ast.If | ast.Try):
            todo += node.body
    return found


def test_no_module_needs_itself() -> None:
    """Bug prevented: two modules that need each other, so that neither can be read, tested or moved alone."""
    paths = {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
        for path in tree()
        if path.suffix == ".py" and path.name != "__init__.py" and path.relative_to(ROOT).parts[0] in SOURCE
    }
    TopologicalSorter({name: modules_imported(path) & paths.keys() for name, path in paths.items()}).prepare()


# Most of the `Any` are models and configurations of transformers, which have no types of their own.
LONGEST_FUNCTION, LONGEST_FILE, MOST_ANY = 80, 600, 150


def test_functions_and_files_stay_short() -> None:
    """Bug prevented: a function or a file that nobody reads whole grows by a line at a time."""
    long: list[str] = []
    for path in (p for p in tree() if p.suffix == ".py" and p.relative_to(ROOT).parts[0] in SOURCE):
        text, name = path.read_text("utf-8"), path.relative_to(ROOT).as_posix()
        if (lines := text.count("\n")) > LONGEST_FILE:
            long.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    long.append(f"{name}: {node.name}, {lines} lines")
    assert not long


def test_doctor_names_the_extras_that_there_are() -> None:
    """Bug prevented: "to get it: pip install 'x2dfd[heif]'", which installs nothing more."""
    extras = project()["optional-dependencies"]
    for extra, (package, _) in EXTRAS.items():
        assert package in {Requirement(line).name for line in extras[extra]}


def test_values_have_types() -> None:
    """Bug prevented: what crosses from room to room is checked by nobody, one `Any` at a time."""
    rooms = set(SOURCE) - {"benchmarks"}
    paths = [p for p in tree() if p.suffix == ".py" and p.relative_to(ROOT).parts[0] in rooms]
    lines = [line for path in paths for line in path.read_text("utf-8").splitlines()]
    assert sum(bool(re.search(r"\bAny\b", line)) for line in lines) < MOST_ANY


# --- wheel ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wheel_holds_the_two_packages_and_all_of_them(tmp_path: Path) -> None:
    """Bug prevented: a package named `eval` or `tests` lands in a user's site-packages; weights, cards, templates or
    licence texts that work from a checkout are missing after `pip install`; our own experts are registered twice."""
    source = tmp_path / "source"  # a copy: a build in the checkout would pick up stale files from build/
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    for room in (*INSTALLED, *CHECKOUT_ONLY):
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(tmp_path), str(source)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    [path] = tmp_path.glob("*.whl")
    info = f"x2dfd-{project()['version']}.dist-info"
    with zipfile.ZipFile(path) as archive:
        carried = set(archive.namelist())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    assert {name.partition("/")[0] for name in carried} == {*INSTALLED, info}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for room in INSTALLED
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".md", ".pyc")
    }
    assert wanted - carried == set()
    assert "x2dfd = x2dfd.cli:main" in entry_points and "x2dfd.experts" not in entry_points
    assert "License-Expression: Apache-2.0" in metadata
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= carried


# --- pins, licences, files ------------------------------------------------------------------------------------------


def test_pins_cover_and_satisfy_every_requirement() -> None:
    """Bug prevented: a requirement raised above its pin, or never tested at all, so that a fresh set-up fails."""
    pinned = pins()
    unmet = [str(r) for r in requirements() if not r.specifier.contains(pinned.get(canonical(r.name), "0"))]
    assert unmet == []
    assert [pin for pin in pinned.values() if "+" in pin] == [], "a local build cannot be installed elsewhere"


def test_notice_names_the_vendored_models_by_hash() -> None:
    """Bug prevented: a face model is replaced or added without its origin and licence."""
    notice = (ROOT / "NOTICE").read_text("utf-8")
    models = sorted((ROOT / "x2dfd" / "weights" / "faces").glob("*.tflite"))
    assert models
    for path in models:
        assert f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" in notice


FORBIDDEN = {
    "package host": r"\b(?:pypi\.(?:org|python\.org)|pythonhosted\.org|anaconda\.org|download\.pytorch\.org)",
    "package index setting": r"index[-_]url|find[-_]links|trusted[-_]host",
    "address with a password": r"https?://[^/\s\"'`@]+:[^/\s\"'`@]+@",
    "path of one machine": r"(?<![\w.~])/(?:root|work|home/\w+|Users/\w+|tmp|opt)/\w",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds_a(what: str) -> None:
    """Bug prevented: what works only where it was written, or sends a user's installer to a fixed host."""
    pattern = re.compile(FORBIDDEN[what])
    found = []
    for path in tree():
        content = path.read_bytes()
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


# --- documents ------------------------------------------------------------------------------------------------------


def test_documented_make_targets_exist() -> None:
    """Bug prevented: README or CI names a target that the Makefile lost."""
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    ci = set(re.findall(r"^step make ([a-z-]+)", (ROOT / ".ci" / "run").read_text("utf-8"), re.MULTILINE))
    readme = set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE))
    assert {"test-all", "demo"} <= ci and "test" in readme
    assert ci | readme <= targets


PAGES = ("README.md", "GLOSSARY.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/index.md", "docs/architecture.md")


@pytest.mark.parametrize("page", PAGES)
def test_links_of_documents_lead_somewhere(page: str) -> None:
    """Bug prevented: a file moves, and the page that names it sends its reader nowhere."""
    path = ROOT / page
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s#]+)", path.read_text("utf-8"))
    assert links
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


def test_tree_of_the_readme_exists() -> None:
    """Bug prevented: the README shows a newcomer files that are gone."""
    readme = (ROOT / "README.md").read_text("utf-8")
    block = re.search(r"^## The tree\n+```\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert block
    names = [name for line in block[1].splitlines() for name in re.split(r"\s{2,}", line)[0].split(", ")]
    assert {room for room in allowed_imports() if f"{room}/" not in names} == set()
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_every_help_shows_an_example() -> None:
    """Bug prevented: a command whose options are listed, and nobody knows how to call it."""
    without = []
    rooms = [room for room in (*INSTALLED, *CHECKOUT_ONLY) if room not in ("tests", "experiments")]
    for path in (ROOT / "road.py", *(path for room in rooms for path in (ROOT / room).rglob("*.py"))):
        module = ast.parse(path.read_text("utf-8"))
        in_docstring = "\n    python " in (ast.get_docstring(module) or "")  # which argparse is given whole
        for call in (node for node in ast.walk(module) if isinstance(node, ast.Call)):
            named = {keyword.arg for keyword in call.keywords}
            match call.func:
                case ast.Attribute(attr="command"):
                    shows = "epilog" in named
                case ast.Attribute(attr="ArgumentParser"):
                    shows = "epilog" in named or in_docstring
                case ast.Name(id="run_command"):  # an app's commands have their own
                    shows = len(call.args) > 1 or (isinstance(call.args[0], ast.Name) and call.args[0].id == "app")
                case _:
                    continue
            if not shows:
                without.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert without == []


def test_expert_of_the_readme_is_one() -> None:
    """Bug prevented: the expert that a reader copies lacks something that the registry wants."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    space: dict[str, Any] = {}
    exec(compile(blocks[1], "README.md", "exec"), space)
    expert, crop = space["Sharpness"](), np.zeros((224, 224, 3), np.uint8)
    points = np.zeros((468, 2), np.float32)
    face = Face(0, (0.0, 0.0, 224.0, 224.0), points, 1.0, crop, points, 0.0)
    assert isinstance(expert, Expert)
    assert [said.score for said in ask(expert, [face, face])] == [1.0, 1.0]  # nothing is sharp in it
