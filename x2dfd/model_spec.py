"""The choice of a model: one string, the same in every command, in `x2dfd.load`, in the app and in the benchmark.

| `--model` | is |
| --- | --- |
| `embedded` | the model that comes with the package |
| `DIR` | an adapter directory on the embedded base, or one that holds a whole model |
| `hub:NAME` | a base model alone, by its hub name or its directory |
| `hub:NAME+DIR` | that base with an adapter directory |
| `NAME@http://HOST/v1` | a model alone, by its name at an OpenAI-compatible endpoint |
| `NAME@http://HOST/v1+DIR` | the same with the adapter directory that the endpoint serves under that name |
| `expert:NAME` | one expert without a language model; for the benchmark only |

`?requests-per-minute=60` after an address limits the rate of requests. A base's directory and an endpoint's address
cannot hold a `+`. A directory whose name looks like another form is written with its path: `./embedded`. Nothing here
imports torch.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self, TypedDict

from x2dfd.addresses import parsed
from x2dfd.errors import SetupError

Mode = Literal["calibrated", "paper"]
Dtype = Literal["fp32", "bf16", "fp16", "int8"]
Bits = Literal[4, 8]
MAX_THREADS = 1024  # of a CPU

EMBEDDED_NAME, HUB, EXPERT, PACE = "embedded", "hub:", "expert:", "?requests-per-minute="


class LoadOptions(TypedDict, total=False):
    """Options for loading a model: the keyword arguments of `x2dfd.load`, which explains them."""

    mode: Mode | None
    threads: int | None
    experts: Sequence[str] | None
    other_experts: bool
    device: str | None
    dtype: Dtype | None
    device_map: str | None
    bits: Bits | None


@dataclass(frozen=True)
class ModelSpec:
    """A parsed `--model`. Without any field it is the embedded model; `str` gives the text back."""

    base: str | None = None  # a base model's hub name or directory; None: the embedded base
    adapter: Path | None = None  # adapter directory
    name: str | None = None  # at the endpoint
    url: str | None = None  # of the endpoint
    requests_per_minute: float | None = None  # to the endpoint at most; None: no limit
    expert: str | None = None

    @classmethod
    def parse(cls, text: str | Path | ModelSpec) -> ModelSpec:
        """A Path is a directory, whatever its name. Raises SetupError where a part is missing."""
        if isinstance(text, ModelSpec):
            return text
        if isinstance(text, Path):
            return cls(adapter=text)
        if text == EMBEDDED_NAME:
            return cls()
        if text.startswith(EXPERT):
            return cls(expert=_required(text, text.removeprefix(EXPERT)))
        if text.startswith(HUB):
            base, plus, folder = text.removeprefix(HUB).partition("+")
            return cls(base=_required(text, base), adapter=Path(_required(text, folder)) if plus else None)
        if match := re.search("@(?=https?://)", text):
            name, (address, plus, folder) = text[: match.start()], text[match.end() :].partition("+")
            adapter = Path(_required(text, folder)) if plus else None
            url, query, number = address.partition(PACE)
            _required(text, url if parsed(url) else "")
            pace = _pace(text, number) if query else None
            return cls(adapter=adapter, name=_required(text, name), url=url, requests_per_minute=pace)
        return cls(adapter=Path(_required(text, text)))

    def __str__(self) -> str:
        adapter = "" if self.adapter is None else str(self.adapter)
        if self.expert is not None:
            return f"{EXPERT}{self.expert}"
        if self.base is None and self.url is None:
            return adapter or EMBEDDED_NAME
        text = f"{HUB}{self.base}" if self.url is None else f"{self.name}@{self.url}"
        text += "" if self.requests_per_minute is None else f"{PACE}{self.requests_per_minute:g}"
        return f"{text}+{adapter}" if adapter else text

    @property
    def embedded(self) -> bool:
        """Whether it is the model that comes with the package."""
        return self == ModelSpec()

    @property
    def bare(self) -> bool:
        """Whether it is a language model without an adapter, and so without calibration."""
        return self.adapter is None and (self.base is not None or self.url is not None)

    @property
    def host(self) -> str:
        """The endpoint's host and port; "" for a model of this machine."""
        address = parsed(self.url or "")
        return address.netloc if address else ""

    @property
    def label(self) -> str:
        """Its name in results, without the path of a folder and without an address."""
        folder = self.adapter.absolute().name if self.adapter else ""
        if self.name is not None:
            return self.name
        if self.base is not None and not folder:
            return f"base:{Path(self.base).absolute().name}"
        return folder or str(self)

    def absolute(self) -> Self:
        """The same with absolute paths of directories that exist here, for a process in another working directory."""
        base = str(Path(self.base).absolute()) if self.base and Path(self.base).exists() else self.base
        adapter = self.adapter.absolute() if self.adapter and self.adapter.exists() else self.adapter
        return replace(self, base=base, adapter=adapter)


def _required(text: str, part: str) -> str:
    if not part:
        raise SetupError(
            f"{text!r} does not name a model: give embedded, DIR, hub:NAME, hub:NAME+DIR or NAME@http://HOST/v1",
            code="model_malformed",
        )
    return part


def _pace(text: str, number: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (pace := float(number)) < math.inf:
            return pace
    raise SetupError(f"{text!r}: requests-per-minute is a number above 0, not {number!r}", code="model_malformed")
