"""What all tests share: no network, one torch thread, a real face, and the switch for tests of the embedded model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before any library reads them: nothing downloads or reports home, and tokenizers do not warn about forks.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    GRADIO_ANALYTICS_ENABLED="False",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)

import numpy as np
import skimage.data
import torch
from numpy.typing import NDArray
from PIL import Image


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """The same sums in the same order on every machine, and no fight over cores."""
    torch.set_num_threads(1)


@pytest.fixture
def astronaut() -> NDArray[np.uint8]:
    """A real photo with one frontal face: [512, 512, 3] RGB, a fresh copy for each test."""
    return np.array(skimage.data.astronaut(), dtype=np.uint8)


@pytest.fixture
def face_photo(astronaut: NDArray[np.uint8], tmp_path: Path) -> Path:
    """The same photo as a JPEG file."""
    path = tmp_path / "face.jpg"
    Image.fromarray(astronaut).save(path, quality=95)
    return path


def require_base() -> None:
    """Skip where the embedded model is not fetched; fail in CI, where a skip would hide that nothing was tested."""
    from x2dfd import fetch

    missing = fetch.missing()
    if not missing:
        return
    reason = f"the embedded model is not in the cache ({', '.join(missing)}): run `x2dfd fetch`"
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_base") is not None:
        require_base()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model of tests/tiny.py, which no test may change."""
    from tests import tiny

    require_base()
    return tiny.write_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def folders(base: Path) -> tuple[Path, Path]:
    """That model and an adapter of it, which no test may change either."""
    from tests import tiny

    return base, tiny.write_adapter(base.parent / "adapter", base)


@pytest.fixture(scope="module")
def known_expert() -> Iterator[None]:
    """The adapter's expert is registered."""
    from tests import tiny
    from x2dfd.experts import BUILTIN

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUILTIN, tiny.EXPERT, tiny.EXPERT_TARGET)
        yield


@pytest.fixture
def needs_base() -> None:
    """The marker `needs_base` as a fixture, for fixtures that build on the embedded model."""
    require_base()
