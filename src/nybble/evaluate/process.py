"""Worker: a model in a process of its own, asked through a pipe; ``worker.py`` is the other end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import IO, Any, Literal, overload

import numpy as np
import numpy.typing as npt

import nybble
from nybble import errors
from nybble.errors import NybbleError

# The child finds modules where this process does, whatever the working folder holds.
_START = (
    "import sys; sys.path[:] = sys.argv.pop(1).split({separator!r}); "
    "from nybble.evaluate.worker import main; main()"
)
_WAIT_SECONDS = 5.0
_OWN_GROUP: dict[str, Any] = (
    {"creationflags": 0x200} if sys.platform == "win32" else {"start_new_session": True}
)  # CREATE_NEW_PROCESS_GROUP


class WorkerDied(NybbleError):
    """The process of a model ended before it answered."""


class Worker:
    """A process with one model. Use it from one thread; ``kill`` may be called from any."""

    def __init__(self, label: str) -> None:
        self.label = label
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START.format(separator=os.pathsep), os.pathsep.join(_search_path())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            # Ctrl-C at a terminal is for the process that evaluates, which ends this one.
            **_OWN_GROUP,
        )

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            WorkerDied: there will be none.
            NybbleError: what the model's own process raised, by its class where that is nybble's.
        """
        try:
            pipe = _open(self._process.stdin)
            pipe.write(json.dumps({"do": do, **request}).encode() + b"\n")
            pipe.flush()
            line = _open(self._process.stdout).readline()
        except (OSError, ValueError):  # closed by kill()
            line = b""
        if not line.endswith(b"\n"):
            raise self._death()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _error(self.label, answer)
        return answer

    @overload
    def run(self, tokens: Sequence[int], logits: Literal["none"]) -> None: ...

    @overload
    def run(self, tokens: Sequence[int], logits: Literal["all"]) -> npt.NDArray[np.float32]: ...

    def run(self, tokens: Sequence[int], logits: str) -> npt.NDArray[np.float32] | None:
        """Append tokens to the open sequence; the logits after each: float32 (len(tokens), vocab_size)."""
        answer = self.ask("run", tokens=list(tokens), logits=logits)
        if logits == "none":
            return None
        result = np.empty((answer["rows"], answer["columns"]), np.float32)
        rest = memoryview(result.reshape(-1).view(np.uint8).data)
        while rest:
            try:
                count = _open(self._process.stdout).readinto(rest)  # type: ignore[attr-defined]
            except (OSError, ValueError):
                count = 0
            if not count:
                raise self._death()
            rest = rest[count:]
        return result

    def kill(self) -> None:
        """End the process now; whoever waits for an answer gets WorkerDied."""
        self._process.kill()

    def close(self) -> None:
        """Let the process end, and make sure that it does."""
        with suppress(OSError):
            _open(self._process.stdin).close()
        try:
            self._process.wait(_WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _open(self._process.stdout).close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()  # it may compute for minutes what nobody wants any more
        self.close()

    def _death(self) -> WorkerDied:
        try:
            code = self._process.wait(_WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if code >= 0:
            return WorkerDied(f"{self.label}: its process ended with exit code {code}")
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        why = "; the system kills so where memory runs out" if name == "SIGKILL" else ""
        return WorkerDied(f"{self.label}: its process was ended by {name}{why}")


def _open(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _error(label: str, answer: dict[str, Any]) -> NybbleError:
    kind = getattr(errors, str(answer["error"]), None)
    message = f"{label}: {answer['message']}"
    if isinstance(kind, type) and issubclass(kind, NybbleError):
        return kind(message)
    return NybbleError(f"{label}: {answer['error']}: {answer['message']}")


def _search_path() -> list[str]:
    """This process's ``sys.path`` with full names: the child's working folder is nobody's promise.

    Paths that hold another nybble than this one are left out: they may have been added since it was imported.
    """
    own = os.path.dirname(os.path.dirname(os.path.abspath(nybble.__file__)))
    paths = [os.path.abspath(path) for path in sys.path]
    kept = [path for path in paths if path == own or not os.path.isdir(os.path.join(path, "nybble"))]
    return kept if own in kept else [*kept, own]
