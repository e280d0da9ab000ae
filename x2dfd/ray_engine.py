"""Runs the Detector in actors of Ray Data, on many processes or machines, with the same rows as the local runner.

`x2dfd detect … --engine ray` joins the cluster that RAY_ADDRESS names, or starts one on this machine. Ray handles
scheduling, queues and faults: it restarts an actor that dies, and its batch is judged again.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from x2dfd.errors import SetupError, X2DFDError
from x2dfd.files import Json, json_object
from x2dfd.model_spec import LoadOptions, ModelSpec
from x2dfd.stores import Judging, detect_places
from x2dfd.types import Failure, ModelInfo, Report, result_of

if TYPE_CHECKING:
    from x2dfd.stores import Place

WINDOW = 10_000  # files in one dataset: bounds the driver's memory, and takes long compared to loading a model
BATCHES_AHEAD = 4  # batches that an actor gets at once: it decodes one while it judges the one before
FILES_PER_LOAD = 1000  # files for which loading a model is worth its time
TRIES = 4  # of a batch whose actors die; the run then ends, and --out resumes where it stopped
BLOCKS = 1024  # of a dataset at most: the rows of a block arrive together


class Actor:
    """A Ray actor: it loads a detector once and judges batches of paths."""

    def __init__(self, model: ModelSpec, options: LoadOptions, judging: Judging) -> None:
        """`judging`: options of Detector.detect_many."""
        import x2dfd

        self._detector = x2dfd.load(model, **options)
        self._judging = judging

    def __call__(self, batch: Json) -> dict[str, list[str]]:
        places = [_place(bytes(raw)) for column in batch["places"] for raw in column]
        results = detect_places(self._detector, places, **self._judging)
        return {"result": [json.dumps(r.to_dict(), allow_nan=False) for r in results]}


class RayDetector:
    """Replaces a Detector for `detect`, with `info` and `detect_many`.

    Raises SetupError when ray is missing or when the model does not load in the cluster.
    """

    def __init__(self, model: ModelSpec, options: LoadOptions, actors: int, judge: type[Actor] = Actor) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise SetupError("--engine ray needs Ray Data: pip install 'x2dfd[ray]'", code="package_missing") from error
        self._ray = ray
        self._model, self._options, self._actors, self._actor_class = model.absolute(), options, actors, judge
        self.window = max(WINDOW, FILES_PER_LOAD * actors)  # files in one dataset; each dataset loads the models anew
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # it warns that its progress bars are off
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        cluster = ray.cluster_resources()
        device = options.get("device")
        on_gpu = model.url is None and (str(device).startswith("cuda") if device else cluster.get("GPU", 0) > 0)
        cpus, gpus = options.get("threads") or 1, int(on_gpu)
        self._resources = {"num_cpus": cpus, "num_gpus": gpus}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        # Ray would wait for ever.
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            sizes = "; ".join(f"{node.get('CPU', 0):g} and {node.get('GPU', 0):g}" for node in nodes) or "none"
            raise SetupError(
                f"an actor needs {cpus} CPUs and {gpus} GPUs of one machine, and the cluster's machines have {sizes}",
                code="cluster_too_small",
            )
        self.info = self._remote_info()

    def _remote_info(self) -> ModelInfo:
        """Detector.info of the model in the cluster: this machine need not hold it."""
        model, options = self._model, self._options

        def info() -> ModelInfo:
            import x2dfd

            return x2dfd.load(model, **options).info

        try:
            result: ModelInfo = self._ray.get(self._ray.remote(**self._resources)(info).remote())
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, X2DFDError):
                raise error.cause from None
            raise
        return result

    def detect_many(
        self, places: Iterable[Place], *, batch_size: int = 8, rationale: bool = True, frames: int = 32
    ) -> Iterator[Report | Failure]:
        """As Detector.detect_many, in the order of the places. Raises X2DFDError when a batch fails for good."""
        source = iter(places)
        while window := list(islice(source, self.window)):
            yield from self._detect_window(window, {"batch_size": batch_size, "rationale": rationale, "frames": frames})

    def _detect_window(self, places: list[Place], judging: Judging) -> Iterator[Report | Failure]:
        data = self._ray.data
        context = data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.raise_original_map_exception = True  # else Ray's own error hides the one line about a wrong model
        # A row is a batch, so that every batch holds the same faces as in the local runner.
        batch_size = judging["batch_size"]
        raw = [_raw(place) for place in places]
        rows = [{"places": raw[k : k + batch_size]} for k in range(0, len(raw), batch_size)]
        at_once = max(1, min(BATCHES_AHEAD, len(rows) // self._actors))  # of few, every actor gets some
        dataset = data.from_items(rows, override_num_blocks=min(BLOCKS, -(-len(rows) // at_once)))
        with warnings.catch_warnings():
            # About the last parameter, which Ray 2.64 drops; until then nothing else bounds the tries of a batch.
            warnings.simplefilter("ignore", DeprecationWarning)
            results = dataset.map_batches(
                self._actor_class,
                fn_constructor_args=(self._model, self._options, judging),
                batch_size=at_once,
                compute=data.ActorPoolStrategy(size=self._actors),
                **self._resources,
                max_task_retries=TRIES - 1,
            )
        try:
            for place, row in zip(places, results.iter_rows(), strict=True):
                yield replace(result_of(json_object(row["result"], "an actor's row")), path=str(place))
        except self._ray.exceptions.RayError as error:
            if isinstance(cause := getattr(error, "cause", None), X2DFDError):
                raise cause from None
            raise X2DFDError(f"Ray gave up on a batch: {error}", code="batch_failed") from error


def _raw(place: Place) -> bytes:
    """A place as bytes for a column: a local name need not be UTF-8, and an actor works in another folder."""
    return b"local:" + os.fsencode(place.absolute()) if isinstance(place, Path) else b"store:" + place.encode()


def _place(raw: bytes) -> Place:
    kind, name = raw[:6], raw[6:]
    return Path(os.fsdecode(name)) if kind == b"local:" else name.decode()
