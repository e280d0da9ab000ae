"""Experts with published weights: networks against an independent computation, files checked, nothing run or fetched.

No published weights are here. Files of the same form are made up.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from external_detectors import published
from external_detectors.mesonet import MesoNet, load_mesonet
from external_detectors.published import AlignedForensics, ResNet50NoDown, SwinV2Blending, UniversalFakeDetect
from tests.raising import raises
from x2dfd import experts
from x2dfd.experts import BUILTIN, DEFAULT, PUBLISHED, load_expert
from x2dfd.faces import CROP_SIZE
from x2dfd.files import file_sha256
from x2dfd.types import Card, Face

Array = NDArray[Any]
FILES = {
    "mesonet": "MesoInception_DF.h5",
    "aligned-forensics": "ours-sync.pth",
    "swinv2-blending": "best_gf.pth",
    "universal-fake-detect": "fc_weights.pth",
}


CLIP_L = "clip-vit-large-patch14"


def face_of(crop: Array) -> Face:
    none = np.zeros((468, 2), np.float32)
    return Face(0, (0.0, 0.0, 1.0, 1.0), none, 1.0, crop, none, 0.0)


def grey(value: int) -> Face:
    """A crop of one grey: no resizing changes it."""
    return face_of(np.full((CROP_SIZE, CROP_SIZE, 3), value, np.uint8))


@pytest.fixture
def noise() -> list[Face]:
    draw = np.random.default_rng(7)
    return [face_of(draw.integers(0, 256, (CROP_SIZE, CROP_SIZE, 3), np.uint8)) for _ in range(3)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; returns its folder for experts."""
    monkeypatch.setenv("X2DFD_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "experts"
    folder.mkdir(parents=True)
    return folder


KERNELS = {
    "Meso4": [(3, 3, 3, 8), (5, 5, 8, 8), (5, 5, 8, 16), (5, 5, 16, 16)],
    "MesoInception4": [
        *((1, 1, 3, 1), (1, 1, 3, 4), (3, 3, 4, 4), (1, 1, 3, 4), (3, 3, 4, 4), (1, 1, 3, 2), (3, 3, 2, 2)),
        *((1, 1, 11, 2), (1, 1, 11, 4), (3, 3, 4, 4), (1, 1, 11, 4), (3, 3, 4, 4), (1, 1, 11, 2), (3, 3, 2, 2)),
        *((5, 5, 12, 16), (5, 5, 16, 16)),
    ],
}
NORMS = {"Meso4": [8, 8, 16, 16], "MesoInception4": [11, 12, 16, 16]}


def write_weights(path: Path, name: str, first: int = 8) -> Path:
    """A file as Keras writes it; numbers that pass ten, so that the order of names is not that of creation."""
    draw = np.random.default_rng(3)
    layers: dict[str, dict[str, Array]] = {}
    for i, shape in enumerate(KERNELS[name]):
        kernel = draw.normal(0, np.sqrt(2 / np.prod(shape[:3])), shape)
        layers[f"conv2d_{first + i}"] = {"kernel": kernel, "bias": draw.normal(0, 0.1, shape[3])}
    for i, n in enumerate(NORMS[name]):
        layers[f"batch_normalization_{first + i}"] = {
            "gamma": draw.uniform(0.5, 1.5, n), "beta": draw.normal(0, 0.3, n),
            "moving_mean": draw.normal(0.3, 0.2, n), "moving_variance": draw.uniform(0.01, 1, n),
        }  # fmt: skip
    for i, (inputs, outputs) in enumerate([(1024, 16), (16, 1)]):
        kernel = draw.normal(0, 0.3 / np.sqrt(inputs), (inputs, outputs))
        layers[f"dense_{first + i}"] = {"kernel": kernel, "bias": draw.normal(0, 0.1, outputs)}
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"] = "2.1.5"
        file.create_group(f"flatten_{first}")
        for layer, tensors in layers.items():
            for tensor, value in tensors.items():
                file[f"{layer}/{layer}/{tensor}:0"] = value.astype(np.float32)
    return path


# What an independent computation (numpy, in double precision, from the published definition and this very file) gave
# for a face, the same turned over, and noise; and what greys of 0, 90 and 255 gave.
LOGITS = {"Meso4": [1.5073, 2.4106, 1.9868], "MesoInception4": [-0.8118, -0.8783, -2.6705]}
LOGITS_OF_GREYS = [-0.3702, -0.5354, -0.8508]  # MesoInception4


@pytest.mark.parametrize("name", KERNELS)
def test_mesonet_computes_what_keras_would(name: str, tmp_path: Path, astronaut: Array) -> None:
    """Bug prevented: another order of flattening, another epsilon, layers swapped: plausible scores that are wrong."""
    net = load_mesonet(write_weights(tmp_path / "any name.h5", name))
    assert type(net).__name__ == name
    noise = np.random.default_rng(1).random((256, 256, 3))
    x = np.stack([astronaut[:256, 96:352] / 255, astronaut[256:0:-1, 96:352] / 255, noise])
    got = net(torch.from_numpy(x).float().permute(0, 3, 1, 2)).tolist()
    assert got == pytest.approx(LOGITS[name], abs=3e-4)  # before the sigmoid: behind it, 20 and 30 look alike


def test_mesonet_expert_gives_p_fake(cache: Path, noise: list[Face], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: P(real) passed on as P(fake); pictures in 0..255; a file put where a user is told changes nothing;
    an ImportError for an optional package, or h5py needed by those who do not use MesoNet."""
    path = write_weights(cache / FILES["mesonet"], "MesoInception4")
    assert experts.availability("mesonet") is None
    expert = load_expert("mesonet")
    assert isinstance(expert, MesoNet)
    got = [e.score for e in expert.judge([grey(v) for v in (0, 90, 255)])]
    assert got == pytest.approx([1 / (1 + np.exp(logit)) for logit in LOGITS_OF_GREYS], abs=1e-4)
    assert (expert.card.sha256, expert.card.weights) == (file_sha256(path), path.name) and MesoNet.card.sha256 == ""
    alone = [e.score for face in noise for e in expert.judge([face])]
    assert alone == pytest.approx([e.score for e in expert.judge(noise)], abs=1e-5) and len(set(alone)) == 3
    assert expert.judge([]) == []
    monkeypatch.setitem(sys.modules, "h5py", None)
    with raises("package_missing", "pip install h5py"):
        MesoNet(cache)
    assert isinstance(experts.cards()["mesonet"], Card)


def test_a_face_without_a_usable_crop_or_answer_is_none_with_a_reason(tmp_path: Path) -> None:
    """Bug prevented: one odd crop ends the batch or shifts the scores of the others; NaN passed on as a score."""
    expert = MesoNet(write_weights(tmp_path / FILES["mesonet"], "Meso4").parent)
    odd = face_of(np.zeros((0, 5, 3), np.uint8))
    first, middle, last = expert.judge([grey(90), odd, grey(255)])
    assert middle.score is None and "crop" in (middle.note or "")
    assert [first, last] == expert.judge([grey(90), grey(255)])
    expert.p_fake = lambda crops: torch.full((len(crops),), torch.nan)  # type: ignore[method-assign]
    [broken] = expert.judge([grey(1)])
    assert broken.score is None and broken.note


CHANGES: dict[str, tuple[Callable[[h5py.File], None], str, str]] = {
    "missing layer": (lambda f: f.__delitem__("conv2d_11"), "checkpoint_incomplete", "features.6"),
    "foreign layer": (lambda f: f.create_dataset("lstm_1/lstm_1/kernel:0", (8,), "f4"), "checkpoint_left_over", "lstm"),
    "other network": (lambda f: f.__delitem__("conv2d_8"), "network_unknown", "Meso4"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_mesonet_refuses_other_weights(what: str, tmp_path: Path) -> None:
    """Bug prevented: a file that fits in part loads, and the rest stays random."""
    path = write_weights(tmp_path / FILES["mesonet"], "Meso4")
    change, code, fact = CHANGES[what]
    with h5py.File(path, "r+") as file:
        change(file)
    with raises(code, fact):
        MesoNet(path.parent)


@pytest.mark.parametrize("content", [b"", b"kernel: 1 2 3\n", b"\x89HDF\r\n\x1a\n" + bytes(64), b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    """Bug prevented: a traceback out of h5py or the unpickler for a page of HTML saved as .pth."""
    save_checkpoint(tmp_path, {}).write_bytes(content)
    (tmp_path / FILES["mesonet"]).write_bytes(content)
    for expert in (MesoNet, AlignedForensics):
        with raises("checkpoint_unreadable", tmp_path):
            expert(tmp_path)


RESNET = {name: tuple(value.shape) for name, value in ResNet50NoDown().state_dict().items()}


def blank_state() -> dict[str, Tensor]:
    """All zero but the bias, so that every picture scores 0.75; views of one number, so that the file stays small."""
    kinds = {name: torch.int64 if name.endswith("tracked") else torch.float32 for name in RESNET}
    state = {name: torch.zeros((), dtype=kinds[name]).expand(shape) for name, shape in RESNET.items()}
    return state | {"fc.bias": torch.log(torch.tensor([3.0]))}


OPTIONS = "model_name: Ours-Sync\narch: res50nodown\nnorm_type: resnet\npatch_size: null\n"


def save_checkpoint(folder: Path, state: object) -> Path:
    """The checkpoint and its options in `folder`; returns the file."""
    path = folder / FILES["aligned-forensics"]
    (folder / "ours-sync.yaml").write_text(OPTIONS)
    torch.save({"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "total_steps": 7}, path)
    return path


def test_aligned_forensics_loads_the_published_form(tmp_path: Path) -> None:
    """Bug prevented: the same tensors in plain res50, which the options beside the file tell apart, give other scores;
    a state dict of which nobody knows what it is."""
    # Names and shapes of torchvision's ResNet-50 with one output, which are those of the release.
    named = hashlib.sha256(str(sorted(RESNET.items())).encode()).hexdigest()
    assert named == "fb104d8f2603506bda84bb687258e7de3f82c3a27817ee4520848b6f6415d23b"
    path = save_checkpoint(tmp_path, blank_state())
    expert = AlignedForensics(tmp_path)
    assert [e.score for e in expert.judge([grey(90)])] == pytest.approx([0.75])
    assert expert.card.sha256 == file_sha256(path)
    options = tmp_path / "ours-sync.yaml"
    lines = OPTIONS.splitlines()
    for text, code, fact in (
        (OPTIONS.replace("res50nodown", "res50"), "network_differs", "arch: res50"),
        (OPTIONS.replace("resnet", "clip"), "network_differs", "norm_type: clip"),
        (OPTIONS.replace("null", "224"), "network_differs", "patch_size: 224"),
        ("\n".join(lines[:-1]), "network_differs", "no patch_size"),
        ("- res50nodown\n", "network_differs", "no arch"),
        ("a: !!python/name:os.x", "network_unstated", "arch: res50nodown"),
    ):
        options.write_text(text)
        with raises(code, options, fact):
            AlignedForensics(tmp_path)
    options.unlink()
    with raises("network_unstated", options):
        AlignedForensics(tmp_path)
    save_checkpoint(tmp_path, blank_state())
    torch.save(blank_state(), path)
    with raises("checkpoint_malformed", "total_steps"):
        AlignedForensics(tmp_path)


def test_resnet_computes_res50nodown() -> None:
    """Bug prevented: strides, padding or shortcuts of another network under the right names."""
    draw = torch.Generator().manual_seed(5)
    state = {}
    for name, shape in RESNET.items():
        fan = shape[1] * shape[2] * shape[3] if len(shape) == 4 else 2048
        if name.endswith("tracked"):
            state[name] = torch.tensor(9)
        elif len(shape) == 1 and name.endswith(("weight", "var")):
            state[name] = 0.3 + 0.4 * torch.rand(shape, generator=draw)
        else:
            state[name] = torch.randn(shape, generator=draw) * (2 / fan) ** 0.5
    net = ResNet50NoDown()
    published.load_strictly(net, state, Path("made up"))
    x = torch.randn(2, 3, 40, 40, generator=draw)
    with torch.inference_mode():
        got = net(x).tolist()
    # By the operations written out one by one; plain res50 gives -2.00 and -2.27.
    assert got == pytest.approx([-3.55212, -3.54704], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "code", "fact"),
    [
        ({"layer3.5.bn2.running_var": None}, "checkpoint_incomplete", "layer3.5.bn2.running_var"),
        ({"layer5.0.conv1.weight": torch.zeros(1)}, "checkpoint_left_over", "layer5.0.conv1.weight"),
        ({"fc.weight": torch.zeros(1000, 2048)}, "checkpoint_shape_differs", "float32 [1000, 2048]"),
        ({"fc.bias": torch.zeros(1, dtype=torch.int64)}, "checkpoint_shape_differs", "int64"),
        ({"fc.bias": torch.tensor([torch.nan])}, "checkpoint_not_finite", "fc.bias"),
        ({"fc.bias": [0.0]}, "checkpoint_malformed", ""),
    ],
)
def test_aligned_forensics_refuses_other_tensors(change: dict[str, Any], code: str, fact: str, tmp_path: Path) -> None:
    """Bug prevented: a checkpoint that fits in part loads, and the rest stays random."""
    state = {name: value for name, value in (blank_state() | change).items() if value is not None}
    with raises(code, fact):
        AlignedForensics(save_checkpoint(tmp_path, state).parent)


class _Code:
    """Unpickled without care, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", list(FILES)[1:])
def test_a_pickle_with_code_is_refused_and_not_run(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: weights from the web that take over the machine when they are loaded."""
    monkeypatch.setitem(sys.modules, "timm", stand_in_timm())
    marker = cache / "ran"
    torch.save({"model": {"fc.bias": _Code(marker)}, "optimizer": {}, "total_steps": 1}, cache / FILES[name])
    (cache / "ours-sync.yaml").write_text(OPTIONS)
    with raises("checkpoint_unreadable"):
        load_expert(name)
    assert not marker.exists()


class _TwoClasses(nn.Module):
    """Class 0 reads the mean of red, class 1 that of blue; remembers the shape that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.seen: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        self.seen = tuple(x.shape)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def stand_in_timm(known: str = "swinv2_base_window16_256") -> ModuleType:
    module = ModuleType("timm")

    def create_model(name: str, *, pretrained: bool, num_classes: int) -> nn.Module:
        assert not pretrained and num_classes == 2, "downloads, or another head"
        if name != known:
            raise RuntimeError(f"Unknown model ({name})")
        return _TwoClasses()

    module.create_model = create_model  # type: ignore[attr-defined]
    return module


SWIN = {"head.weight": torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]), "head.bias": torch.tensor([0.0, 0.5])}


def test_swinv2_squashes_normalises_and_reads_class_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: P(real) for P(fake), BGR, pictures in 0..255 or of another size than the network's window."""
    monkeypatch.setitem(sys.modules, "timm", stand_in_timm())
    torch.save(SWIN | {"layers.0.blocks.1.attn_mask": torch.zeros(4, 2, 2)}, tmp_path / FILES["swinv2-blending"])
    expert = SwinV2Blending(tmp_path)
    crop = np.zeros((CROP_SIZE, CROP_SIZE, 3), np.uint8)
    crop[:] = (255, 51, 102)
    [evidence] = expert.judge([face_of(crop)])
    red, blue = (1 - 0.485) / 0.229, (0.4 - 0.406) / 0.225
    assert evidence.score == pytest.approx(1 / (1 + np.exp(red - blue - 0.5)), abs=1e-5)
    assert expert._net.seen == (1, 3, 256, 256)
    # Leaving out attention masks lets nothing else through.
    torch.save(SWIN | {"norm.weight": torch.zeros(3)}, tmp_path / FILES["swinv2-blending"])
    with raises("checkpoint_left_over", "norm.weight"):
        SwinV2Blending(tmp_path)
    monkeypatch.setitem(sys.modules, "timm", stand_in_timm(known="resnet50"))
    with raises("package_too_old", "swinv2_base_window16_256"):
        SwinV2Blending(tmp_path)
    monkeypatch.setitem(sys.modules, "timm", None)
    with raises("package_missing", "pip install timm"):
        SwinV2Blending(tmp_path)


def save_clip(folder: Path, embedding: int = 768, whole: bool = False) -> Path:
    """A random CLIP image tower on disk, alone or as part of a whole CLIP."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(2)
    small: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32}
    small |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 224, "patch_size": 56, "projection_dim": embedding}
    if whole:
        text = {**small, "vocab_size": 20, "projection_dim": embedding}
        model: Any = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=embedding))
    else:
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision))
    with torch.no_grad():
        model.visual_projection.weight.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prefix", ["", "fc."])
@pytest.mark.parametrize("whole", [False, True])
def test_ufd_is_a_linear_head_on_clips_embedding(whole: bool, prefix: str, tmp_path: Path, noise: list[Face]) -> None:
    """Bug prevented: the hidden state or a normalised embedding instead of the projection; ImageNet's normalisation."""
    from transformers import CLIPVisionModelWithProjection

    weight = torch.randn(1, 768, generator=torch.Generator().manual_seed(4)) * 0.01
    head = {"weight": weight, "bias": torch.tensor([0.2])}
    torch.save({prefix + k: v for k, v in head.items()}, tmp_path / FILES["universal-fake-detect"])
    folder = save_clip(tmp_path / CLIP_L, whole=whole)
    got = [e.score for e in UniversalFakeDetect(tmp_path).judge(noise)]
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    x = np.stack([((f.crop / 255 - mean) / std).transpose(2, 0, 1) for f in noise]).astype(np.float32)
    tower: Any = CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    with torch.inference_mode():
        pooled = tower.vision_model(torch.from_numpy(x)).pooler_output
        logits = pooled @ tower.visual_projection.weight.T @ head["weight"][0] + head["bias"]
    assert got == pytest.approx(logits.sigmoid().tolist(), abs=1e-5)
    assert len({round(score or 0, 6) for score in got}) == 3


def test_ufd_refuses_other_heads_and_towers(tmp_path: Path) -> None:
    """Bug prevented: a tower without its projection, which transformers fills with random numbers."""
    fc = tmp_path / FILES["universal-fake-detect"]
    torch.save({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, fc)
    clip = save_clip(tmp_path / CLIP_L)
    weights = load_file(clip / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "projection" not in k}, clip / "model.safetensors", {"format": "pt"})
    with raises("tower_incomplete", "visual_projection.weight"):
        UniversalFakeDetect(tmp_path)
    (clip / "model.safetensors").write_text("not weights")
    with raises("tower_unreadable", clip):
        UniversalFakeDetect(tmp_path)
    with raises("tower_differs", 512):
        UniversalFakeDetect(save_clip(clip, embedding=512).parent)
    torch.save({"weight": torch.zeros(1, 768)}, fc)
    with raises("checkpoint_incomplete", "bias"):
        UniversalFakeDetect(tmp_path)


def test_published_experts_are_listed_and_never_used_by_default(cache: Path) -> None:
    """Bug prevented: weights that nobody has asked for join the verdict, cards that hide licence and blind spot, "not
    ready" without what to put where, or 1.7 GB downloaded by listing the experts."""
    assert list(PUBLISHED) == list(FILES) and not set(PUBLISHED) & {*BUILTIN, *DEFAULT}
    assert experts.names()[: len(BUILTIN) + len(PUBLISHED)] == [*BUILTIN, *PUBLISHED]
    cards = experts.cards()
    for name in PUBLISHED:
        card = cards[name]
        assert isinstance(card, Card) and card.name == name
        assert card.licence and card.source and card.paper and card.preprocessing and len(card.blind_spot.split()) > 3
        assert card.sha256 == card.weights == ""  # of no file until one is loaded
        said = experts.availability(name) or ""
        assert FILES[name] in said and str(cache / FILES[name]) in said and f"licence {card.licence}" in said
        assert "\n" not in said
    torch.save({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, cache / FILES["universal-fake-detect"])
    with raises("weights_missing", "config.json", "model.safetensors", f"openai/{CLIP_L}", cache / CLIP_L):
        UniversalFakeDetect()
