"""Experts with published weights: AlignedForensics, the SwinV2 blending detector of X2-DFD, UniversalFakeDetect.

Blind spot: each knows the forgeries that its authors trained on, and none of them was trained on our crops.
The package neither contains nor downloads these weights. A user who has them puts them into `experts/` of the cache
folder, or gives another folder. They are files of third parties, so the restricted unpickler reads the tensors, and
every name and shape is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from external_detectors.crop_expert import CropExpert
from x2dfd.errors import SetupError, first_line
from x2dfd.faces import CROP_SIZE, PREPROCESSING
from x2dfd.fetch import cache_dir
from x2dfd.files import file_sha256
from x2dfd.types import Card

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_L = "openai/clip-vit-large-patch14"

# --- shared by the published experts and MesoNet --------------------------------------------------------------------


class Published(CropExpert):
    """An expert whose weights are a third party's file, in `folder`: `experts/` of the cache if not given. Raises
    SetupError when the file is absent or does not fit."""

    FILE: ClassVar[str]
    """The file's name in the release."""

    def __init__(self, folder: Path | None = None) -> None:
        path = (folder or cache_dir() / "experts") / self.FILE
        if not path.is_file():
            raise SetupError(
                f"weights of expert {self.card.name!r} are not here: "
                f"put {self.FILE} of {self.card.source}, licence {self.card.licence}, at {path}",
                code="weights_missing",
            )
        self._net = self.open(path)
        # Reports and calibrations name the file and its SHA-256.
        self.card = replace(self.card, weights=path.name, sha256=file_sha256(path))  # type: ignore[misc]

    def open(self, path: Path) -> nn.Module:
        """The network with the weights of `path`, in evaluation mode. Raises SetupError."""
        raise NotImplementedError


def resized(crops: Tensor, side: int) -> Tensor:
    """Crops [n, s, s, 3] uint8 to [n, 3, side, side] in 0..1, bilinear."""
    pixels = crops.permute(0, 3, 1, 2).float() / 255
    return pixels if pixels.shape[-1] == side else F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)


def imagenet_normalised(pixels: Tensor) -> Tensor:
    """[n, 3, s, s] in 0..1, less ImageNet's mean, over its standard deviation."""
    return (pixels - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


def read_checkpoint(path: Path) -> object:
    """Read a third party's `.pth`. Raises SetupError when it is damaged or holds more than plain tensors."""
    try:
        content: object = torch.load(path, map_location="cpu", weights_only=True)
        return content
    except Exception as error:  # a damaged file can raise anything; code in a file is refused, never run
        raise SetupError(
            f"{path} is not a checkpoint of plain tensors ({first_line(error)}); get it again",
            code="checkpoint_unreadable",
        ) from error


def load_strictly(net: nn.Module, state: object, path: Path) -> None:
    """Load `state` into `net`, in evaluation mode. Raises SetupError unless every name and shape is the network's."""
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise SetupError(f"{path} does not hold tensors by name; get it again", code="checkpoint_malformed")
    expected = net.state_dict()
    for name in expected:
        if name not in state:
            raise SetupError(f"{path} lacks {name}, so it is of another network", code="checkpoint_incomplete")
    for name, value in state.items():
        if name not in expected:
            raise SetupError(f"{path} holds {name}, which this network lacks", code="checkpoint_left_over")
        if value.shape != expected[name].shape or value.is_floating_point() != expected[name].is_floating_point():
            found, needed = (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (value, expected[name]))
            raise SetupError(f"{path}: {name} is {found}, and has to be {needed}", code="checkpoint_shape_differs")
        if not value.isfinite().all():
            raise SetupError(f"{path}: {name} is not finite; get it again", code="checkpoint_not_finite")
    net.load_state_dict(state)
    net.eval().requires_grad_(False)


# --- AlignedForensics -----------------------------------------------------------------------------------------------


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes))
            if stride > 1 or inputs != 4 * planes
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        y = self.bn3(self.conv3(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50NoDown(nn.Module):
    """ResNet-50 (He et al. 2016) with stride 1 in the first convolution and in the max pooling, and one logit.

    [n, 3, s, s], ImageNet-normalised, to logits of fake [n]; `features` gives the last map [n, 2048, s/8, s/8], four
    times the side of plain ResNet-50's. Names of the tensors are torchvision's.
    Gragnaniello et al. 2021 (arXiv 2104.02617): early downsampling destroys the traces that generators leave.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=1, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=1, padding=1)
        self.layer1 = self._layer(64, 64, 3, 1)
        self.layer2 = self._layer(256, 128, 4, 2)
        self.layer3 = self._layer(512, 256, 6, 2)
        self.layer4 = self._layer(1024, 512, 3, 2)
        self.fc = nn.Linear(2048, 1)

    @staticmethod
    def _layer(inputs: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [_Bottleneck(4 * planes, planes, 1) for _ in range(blocks - 1)]
        return nn.Sequential(_Bottleneck(inputs, planes, stride), *rest)

    def features(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        out: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return out

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(x).mean((2, 3)))[:, 0]
        return logits


class AlignedForensics(Published):
    """P(fake) of each face's aligned crop by AlignedForensics "Ours-Sync".

    The checkpoint is a dict of `model`, `optimizer` and `total_steps`. The release's YAML file (`ours-sync.yaml`) must
    be in the same folder and say `arch: res50nodown`, `norm_type: resnet`, `patch_size: null`. The same tensors fit
    plain `res50` as well, which would give other scores without any error.
    """

    FILE = "ours-sync.pth"
    at_once = 2  # a map of the first layer takes 51 MB a face
    OPTIONS: ClassVar[dict[str, object]] = {"arch": "res50nodown", "norm_type": "resnet", "patch_size": None}
    card: ClassVar[Card] = Card(
        name="aligned-forensics",
        version="ours-sync",
        source="github.com/AniSundar18/AlignedForensics (Ours-Sync)",
        licence="not known to us (read the terms of the release)",
        sha256="",
        preprocessing=f"{PREPROCESSING}; not resized; ImageNet normalisation",
        paper="Rajan et al., Aligned Datasets Improve Detection of Latent Diffusion-Generated Images, arXiv 2410.11835",
        blind_spot="Forgeries that did not pass through the decoder of a latent diffusion model: swaps, edits by hand, "
        "most GANs; and it was trained on whole pictures, not on resampled face crops.",
        trained_on="real photos and their reconstructions by a latent diffusion autoencoder",
        covers=("EFS",),
    )

    def open(self, path: Path) -> nn.Module:
        self._check_options(path.with_suffix(".yaml"))
        checkpoint = read_checkpoint(path)
        if not isinstance(checkpoint, dict) or set(checkpoint) != {"model", "optimizer", "total_steps"}:
            raise SetupError(f"{path} must hold model, optimizer, total_steps", code="checkpoint_malformed")
        net = ResNet50NoDown()
        load_strictly(net, checkpoint["model"], path)
        return net

    @classmethod
    def _check_options(cls, path: Path) -> None:
        import yaml  # comes with transformers

        needed = "arch: res50nodown, norm_type: resnet, patch_size: null"
        try:
            options = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise SetupError(
                f"the checkpoint of expert {cls.card.name!r} does not name its network. Put a text file with "
                f"the lines {needed} at {path} ({type(error).__name__})",
                code="network_unstated",
            ) from error
        stated = options if isinstance(options, Mapping) else {}
        for key, value in cls.OPTIONS.items():
            if key not in stated or stated[key] != value:
                found = f"{key}: {stated[key]}" if key in stated else f"no {key}"
                raise SetupError(f"{path}: {found}, and {cls.card.name!r} needs {needed}", code="network_differs")

    def p_fake(self, crops: Tensor) -> Tensor:
        logits: Tensor = self._net(imagenet_normalised(resized(crops, CROP_SIZE)))
        return logits.sigmoid()


# --- the blending detector of X2-DFD --------------------------------------------------------------------------------


class SwinV2Blending(Published):
    """P(fake) of each face's aligned crop by the blending detector released with X2-DFD: timm's SwinV2-B, two
    classes."""

    FILE = "best_gf.pth"
    NETWORK: ClassVar[str] = "swinv2_base_window16_256"
    card: ClassVar[Card] = Card(
        name="swinv2-blending",
        version="best_gf",
        source="X2-DFD's weights package (blending_models)",
        licence="not known to us (read the terms of the release)",
        sha256="",
        preprocessing=f"{PREPROCESSING}; squashed to 256 px, bilinear; ImageNet normalisation",
        paper="X2-DFD: A framework for eXplainable and eXtendable Deepfake Detection, arXiv 2410.06126",
        blind_spot="A face that is synthetic as a whole has no seam, and heavy compression hides one.",
        trained_on="blended faces made from real ones, as far as the paper says",
        covers=("FS",),
    )

    def open(self, path: Path) -> nn.Module:
        try:
            import timm
        except ImportError as error:
            raise SetupError(
                f"expert {self.card.name!r} needs timm ({error}), and timm a torchvision that fits your torch: "
                "pip install timm",
                code="package_missing",
            ) from error
        try:
            net: nn.Module = timm.create_model(self.NETWORK, pretrained=False, num_classes=2)
        except RuntimeError as error:  # timm's answer to a name that it does not know
            raise SetupError(
                f"this version of timm has no {self.NETWORK} ({error}): pip install --upgrade timm",
                code="package_too_old",
            ) from error
        state = read_checkpoint(path)
        if isinstance(state, dict):
            # Only some versions of timm store these masks, which follow from the window size.
            own_keys = net.state_dict()
            state = {k: v for k, v in state.items() if k in own_keys or not str(k).endswith(".attn_mask")}
        load_strictly(net, state, path)
        return net

    def p_fake(self, crops: Tensor) -> Tensor:
        logits: Tensor = self._net(imagenet_normalised(resized(crops, 256)))  # [n, 2]: real, fake
        return logits.softmax(1)[:, 1]


# --- UniversalFakeDetect --------------------------------------------------------------------------------------------


class UniversalFakeDetect(Published):
    """P(fake) of each face's aligned crop by a linear head on the image embedding of CLIP ViT-L/14.

    The file is the head, a dict of `weight` [1, 768] and `bias` [1] (or `fc.weight`, `fc.bias`). The folder
    `clip-vit-large-patch14` next to it must hold CLIP as transformers saves it.
    """

    FILE = "fc_weights.pth"
    card: ClassVar[Card] = Card(
        name="universal-fake-detect",
        version="fc_weights",
        source="github.com/WisconsinAIVision/UniversalFakeDetect (pretrained_weights)",
        licence="MIT",
        sha256="",
        preprocessing=f"{PREPROCESSING}; not resized; CLIP normalisation",
        paper="Ojha et al., Towards Universal Fake Image Detectors that Generalize Across Generative Models, CVPR 2023",
        blind_spot="Local forgeries: it looks at the picture as a whole, and knows best what resembles ProGAN.",
        trained_on="ProGAN images and LSUN photos",
        covers=("EFS",),
    )

    def open(self, path: Path) -> nn.Module:
        state = read_checkpoint(path)
        if isinstance(state, dict):
            state = {str(k).removeprefix("fc."): v for k, v in state.items()}
        head = nn.Linear(768, 1)
        load_strictly(head, state, path)
        self._tower = self._load_tower(path.parent / CLIP_L.partition("/")[2])
        return head

    @classmethod
    def _load_tower(cls, tower: Path) -> nn.Module:
        from transformers import CLIPVisionModelWithProjection

        from x2dfd.checkpoints import quietly

        if not all((tower / name).is_file() for name in ("config.json", "model.safetensors")):
            raise SetupError(
                f"CLIP ViT-L/14 for expert {cls.card.name!r} is not here: "
                f"put config.json and model.safetensors of {CLIP_L}, licence MIT, into {tower}",
                code="weights_missing",
            )
        try:
            with quietly():  # a whole CLIP has tensors of a text tower too; missing ones are checked below
                loaded: Any = CLIPVisionModelWithProjection.from_pretrained(
                    str(tower),
                    dtype=torch.float32,
                    local_files_only=True,
                    use_safetensors=True,
                    output_loading_info=True,
                )
        except Exception as error:  # not CLIP or a damaged file: transformers raises many kinds
            raise SetupError(f"{tower} is not a readable CLIP: {first_line(error)}", code="tower_unreadable") from error
        model, info = loaded
        missing = sorted(info["missing_keys"])  # transformers fills these with random numbers
        if faulty := missing or sorted(map(str, info["mismatched_keys"])):
            raise SetupError(f"{tower} is not CLIP's image tower: see {faulty[0]}", code="tower_incomplete")
        if (model.config.projection_dim, model.config.image_size) != (768, CROP_SIZE):
            raise SetupError(
                f"{tower} is not CLIP ViT-L/14: it makes {model.config.projection_dim} numbers of a picture of "
                f"{model.config.image_size} px; expected 768 numbers of {CROP_SIZE} px",
                code="tower_differs",
            )
        net: nn.Module = model.eval().requires_grad_(False)
        return net

    def p_fake(self, crops: Tensor) -> Tensor:
        from x2dfd.tower import clip_pixels

        embedding = self._tower(pixel_values=clip_pixels(crops)).image_embeds  # [n, 768], not normalised
        logits: Tensor = self._net(embedding)[:, 0]
        return logits.sigmoid()
