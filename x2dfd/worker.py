"""Runs untrusted work, on strangers' files and in plug-ins, in a separate process that can be killed.

A file that crashes a decoder, hangs it or takes all memory costs only its own row; the next file gets a new process. It
is no sandbox: the process has its user's rights. In its replies, only this project's records and arrays are read.

Codes: `decoder_died`, `too_slow`, `out_of_memory`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import pickle
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from threading import RLock
from typing import Any, ParamSpec, TypeVar

from x2dfd.errors import InputError, SetupError, X2DFDError, one_file

SECONDS = 300.0  # of CPU for one call: a clip at the limit of `x2dfd.video` takes minutes
MEMORY = 3 << 30  # bytes of address space that the process may take once it is ready
INTAKE = "x2dfd.intake"  # the module that opens files and finds their faces
START_SECONDS = 300.0  # of the clock, until a new process has imported what it needs
_CLOCK = 2.0  # seconds of the clock for each of CPU, as work that sleeps or waits for a lock uses none

P = ParamSpec("P")
T = TypeVar("T")


class Worker:
    """One process that runs functions, one at a time; it is replaced when it dies or has to be killed.

    One call may take `seconds` of CPU and `memory` bytes (on Linux; None: no bound), and `clock` seconds in all.
    `doing` names the work for readers; `module` is imported before the bounds begin.
    """

    def __init__(
        self,
        seconds: float | None,
        memory: int | None,
        *,
        clock: float | None = None,
        doing: str,
        module: str = "x2dfd.errors",
    ) -> None:
        self.seconds, self.memory, self.doing, self.module = seconds, memory, doing, module
        self.clock = clock or _CLOCK * (seconds or SECONDS)
        self._turn = RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._ready = False

    def start(self) -> None:
        """Begin to start the process if none runs; `call` waits until it is ready."""
        with self._turn:
            if self._process is not None and self._process.poll() is None:
                return
            self.close()
            # Not by multiprocessing: a fork would copy the model, and a spawn runs the caller's script once more.
            self._pipe, child_pipe = Pipe()
            arguments = [str(child_pipe.fileno()), self.module, str(self.seconds or 0), str(self.memory or 0)]
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, *arguments],
                pass_fds=[child_pipe.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # the command's data go there
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                process_group=0,  # Ctrl+C reaches this process, which ends the child
            )
            child_pipe.close()
            self._ready = False
            self._end = weakref.finalize(self, _end, self._process, self._pipe)  # at exit at the latest

    def close(self) -> None:
        """End the process, even in the middle of a call."""
        with self._turn:
            if self._process is not None:
                self._end()
                self._process = self._pipe = None

    def call(
        self, function: Callable[..., T], /, *args: Any, on_progress: Callable[[Any], None] | None = None, **named: Any
    ) -> T:
        """The function's result, or its exception. It must be a module's function, with picklable values.

        With `on_progress` the function gets one too, which passes its values on to it; an exception of it ends the
        process. Raises InputError if the process died of the call or had to be killed, and as
        `errors.one_file`; SetupError if no process starts.
        """
        with self._turn:
            self.start()
            complete = False
            try:
                self._wait_until_ready()
                # Not `send`: torch makes its pickler hand tensors over in shared memory, which the other cannot open.
                request = pickle.dumps((function, args, named, self.doing, on_progress is not None), 5)
                with self._open_pipe() as pipe:
                    pipe.send_bytes(request)
                end = time.monotonic() + self.clock
                while (message := self._read(end))[0] == "told":
                    if on_progress is not None:
                        on_progress(message[1])
                complete = True
            finally:
                if not complete:  # also after an interrupt: the next call would read this one's reply
                    self.close()
        kind, value = message
        if kind == "raised":
            raise value
        result: T = value
        return result

    def _read(self, end: float) -> tuple[str, Any]:
        """The next message: ("told" | "raised" | "gave", value)."""
        with self._open_pipe() as pipe:
            if not pipe.poll(max(0.0, end - time.monotonic())):
                raise InputError("too_slow", f"{self.doing} took longer than {self.clock:g} seconds")
            data = pipe.recv_bytes()
        try:
            kind, value = _Records(io.BytesIO(data)).load()
        except Exception as error:  # a hostile pickle raises nearly anything
            raise InputError("decoder_died", f"{self.doing} sent a reply that cannot be read") from error
        return kind, value

    @contextmanager
    def _open_pipe(self) -> Iterator[Connection]:
        """The pipe; if it breaks, the process has ended. Exceptions of `on_progress` do not pass through here."""
        assert self._pipe is not None
        try:
            yield self._pipe
        except (EOFError, OSError) as error:
            raise self._exit_error() from error

    def _wait_until_ready(self) -> None:
        assert self._pipe is not None
        if self._ready:
            return
        try:
            if not self._pipe.poll(START_SECONDS):
                raise SetupError(
                    f"the process for {self.doing} did not start within {START_SECONDS:g} seconds",
                    code="process_missing",
                )
            self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise SetupError(
                f"the process for {self.doing} cannot be started: x2dfd doctor", code="process_missing"
            ) from error
        self._ready = True

    def _exit_error(self) -> InputError:
        """The error that says why the process ended."""
        assert self._process is not None
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            return InputError("decoder_died", f"{self.doing} closed its pipe")
        if code == -signal.SIGXCPU:
            return InputError("too_slow", f"{self.doing} took more than {self.seconds:g} seconds of CPU")
        how = f"exit code {code}"
        if code < 0:
            with contextlib.suppress(ValueError):  # a signal without a name
                how = signal.Signals(-code).name
        return InputError("decoder_died", f"{self.doing} ended its process ({how})")


def _end(process: subprocess.Popen[bytes], pipe: Connection) -> None:
    process.kill()
    process.wait()
    pipe.close()


_ARRAYS = {
    "numpy": ("dtype", "ndarray"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.numeric": ("_frombuffer",),
}


class _Records(pickle.Unpickler):
    """Reads records, errors and arrays, and no code, as a hostile file may control the process."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _ARRAYS.get(module, ()):
            return super().find_class(module, name)
        if module.startswith("x2dfd.") and "." not in name:
            cls = super().find_class(module, name)
            if isinstance(cls, type) and (is_dataclass(cls) or issubclass(cls, X2DFDError)):
                return cls
        raise pickle.UnpicklingError(f"{module}.{name} is no record")


# --- inside the process ---


def _serve(pipe: Connection, module: str, seconds: float, memory: int) -> None:
    importlib.import_module(module)
    if memory and sys.platform == "linux":
        _bound_memory(memory)
    pipe.send_bytes(b"ready")
    while True:
        try:
            function, args, named, doing, wants_progress = pipe.recv()
        except (EOFError, OSError):  # the parent is gone
            return
        if seconds:
            _bound_cpu(seconds)
        if wants_progress:
            named["on_progress"] = lambda value: pipe.send_bytes(pickle.dumps(("told", value), protocol=5))
        try:
            with one_file(doing):
                reply = pickle.dumps(("gave", function(*args, **named)), protocol=5)
        except X2DFDError as error:
            reply = pickle.dumps(("raised", error))
        pipe.send_bytes(reply)
        del function, args, named, reply


def _bound_memory(memory: int) -> None:
    import resource  # not on Windows, where this module is imported all the same

    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _limit(resource.RLIMIT_AS, taken + memory)
    _limit(resource.RLIMIT_CORE, 0)  # a crash must not leave gigabytes behind


def _bound_cpu(seconds: float) -> None:
    """Allow `seconds` of CPU from now on."""
    import resource

    _limit(resource.RLIMIT_CPU, int(time.process_time() + seconds) + 1)


def _limit(kind: int, value: int) -> None:
    """Set a soft limit, but never above the system's."""
    import resource

    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


# --- files ---

_files: Worker | None = None  # of this process, while `isolating` lasts


@contextmanager
def isolating(seconds: float = SECONDS, memory: int | None = MEMORY) -> Iterator[None]:
    """Decode files within the block in a Worker with these bounds: see `isolated`."""
    global _files
    _files = Worker(seconds, memory, doing="decoding", module=INTAKE)
    _files.start()
    try:
        yield
    finally:
        _files.close()
        _files = None


def isolated(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function of a file's path or bytes: within `isolating` it runs in the Worker.

    An image object is handled in this process.
    """

    @functools.wraps(function)
    def call(*args: P.args, **named: P.kwargs) -> T:
        if _files is None or not any(isinstance(arg, str | Path | bytes) for arg in args):
            return function(*args, **named)
        options: dict[str, Any] = dict(named)  # `on_progress` among them
        return _files.call(call, *args, **options)

    return call


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
