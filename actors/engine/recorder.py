"""What torch knows of an out of memory, kept in files: its memory snapshot, and a trace of the steps behind it.

The snapshot has the last HISTORY allocations and frees with the Python lines that made them, and every block as it lies
when the failed step's tensors are gone and before caches are dropped; where the allocation failed stands in the
history. It is a pickle, for pytorch.org/memory_viz; nothing here reads one. The trace is of the next TRACED_STEPS
steps, the repetition of the failed one first: a profiler that ran all the time would slow every step, and one that
starts when memory has run out is too late for the step that failed.

Each process keeps LIMIT of each kind of a stage, however often memory runs out. Nothing that goes wrong here is raised:
it is logged by name. Knows nothing of steps, and does nothing at all where nothing was asked for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from actors.engine.oom import is_out_of_memory
from actors.engine.protocol import EngineSpec, NoRecorder, Recorder
from actors.errors import InputError, OutOfMemory

log = logging.getLogger(__name__)

RECORDS = ("off", "snapshot", "trace", "all")
LIMIT = 2
HISTORY = 20_000
"""Events. On a GPU a prefill step of 36 compiled layers has some 1,500; each takes up to a few KB of the host."""
TRACED_STEPS = 3
_COPY_S = 30.0
_memory: Any = torch.cuda.memory  # these functions are documented, for all their underscores


class OomRecorder:
    """Implements `protocol.Recorder`. Steps, and so all calls but the first few, are one thread's.

    Args:
        what: one of RECORDS.
        folder: where files go, a path or an address such as s3://…; made when the first is written.
        device: what this process computes on; torch has no snapshot of a CPU.
        rank: of this process in its gang.
    """

    def __init__(self, what: str, folder: str, device: torch.device, rank: int = 0):
        self._snapshots = what in ("snapshot", "all")
        self._traces = what in ("trace", "all")
        self._folder, self._cuda, self._rank = folder.rstrip("/"), device.type == "cuda", rank
        self._counts: Counter[str] = Counter()
        self._profiler: Any = None
        self._trace, self._left = "", 0
        self._staging: Path | None = None
        self._copies: list[threading.Thread] = []
        if self._snapshots and not self._cuda:
            log.warning("memory.record_oom: torch has no memory snapshot of a CPU, none will be written")
            self._snapshots = False
        if self._snapshots:
            with _told("torch's memory history could not be switched on"):
                torch.cuda.init()
                _memory._record_memory_history(stacks="python", max_entries=HISTORY)

    def failed(self, stage: str, traced: bool = True) -> str:
        """Memory ran out: write what there is, and trace what comes next.

        Args:
            stage: load, capture, prefill, decode, or step; part of the files' names.
            traced: whether steps come next, of which `ended` tells.

        Returns:
            words for the log line, beginning with `; `; empty where nothing is written.
        """
        traced = traced and self._traces and self._profiler is None
        if not (self._snapshots or traced) or self._counts[stage] >= LIMIT:
            return ""
        self._counts[stage] += 1
        name = f"rank{self._rank}-{stage}-{self._counts[stage]}"
        names: list[str] = []
        if self._snapshots:
            with _told(f"the memory snapshot {name}.pickle could not be written"):
                with self._file(f"{name}.pickle") as path:
                    _memory._dump_snapshot(str(path))
                names.append(f"{name}.pickle")
        if traced:
            with _told(f"the trace {name}.json.gz could not be started"):
                self._start(f"{name}.json.gz")
                names.append(f"{name}.json.gz")
        # An address may hold a secret.
        place = "/".join(self._folder.split("/")[-2:]) if "://" in self._folder else self._folder
        return f"; recorded in {place}/: {', '.join(names)}" if names else ""

    def ended(self) -> None:
        """A step has ended, well or not."""
        if self._profiler is not None:
            self._left -= 1
            if self._left <= 0:
                self._stop()

    def close(self) -> None:
        """No step follows from this thread: end its trace; where files are copied, wait for that, _COPY_S at most."""
        if self._profiler is not None:
            self._stop()
        while self._copies:
            self._copies.pop().join(_COPY_S)
        if self._staging is not None:
            with contextlib.suppress(OSError):  # what could not be copied stays
                self._staging.rmdir()
            self._staging = None

    def _start(self, name: str) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self._cuda:
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        # Without `acc_events` torch 2.11 warns that a cycle's end clears events, of which there is one.
        profiler = torch.profiler.profile(activities=kinds, record_shapes=True, profile_memory=True, acc_events=True)
        profiler.start()
        self._profiler, self._trace, self._left = profiler, name, TRACED_STEPS

    def _stop(self) -> None:
        profiler, self._profiler = self._profiler, None
        with _told(f"the trace {self._trace} could not be written"):
            profiler.stop()
            with self._file(self._trace) as path:
                profiler.export_chrome_trace(str(path))

    @contextlib.contextmanager
    def _file(self, name: str) -> Generator[Path]:
        """A path to write to, on this machine's disk; the file appears in the folder, whole, when the block ends."""
        if "://" not in self._folder:
            Path(self._folder).mkdir(parents=True, exist_ok=True)
            hidden = Path(self._folder, f".{name}")
            try:
                yield hidden
                hidden.replace(Path(self._folder, name))
            finally:
                hidden.unlink(missing_ok=True)
            return
        self._staging = self._staging or Path(tempfile.mkdtemp(prefix="berth-oom-"))
        path = self._staging / name
        try:
            yield path
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        # A slow store must not keep the other ranks of a gang waiting.
        copy = threading.Thread(target=self._copy, args=(path,), name="berth-oom-copy", daemon=True)
        self._copies.append(copy)
        copy.start()

    def _copy(self, path: Path) -> None:
        said = f"{path.name} could not be copied to the run's folder; it stays at {path} on {os.uname().nodename}"
        with _told(said, self._folder):
            from pyarrow import fs  # seconds that engines which record nothing need not wait

            to, folder = fs.FileSystem.from_uri(self._folder)
            to.create_dir(folder, recursive=True)
            with path.open("rb") as source, to.open_output_stream(f"{folder}/{path.name}") as stream:
                shutil.copyfileobj(source, stream, 1 << 20)
            path.unlink()


def recorder_of(spec: EngineSpec, device: torch.device, rank: int = 0) -> OomRecorder | None:
    """What the spec asks for; None where that is nothing.

    Raises:
        InputError: it asks for what there is not.
    """
    if spec.record_oom not in RECORDS:
        wants = " | ".join(RECORDS)
        raise InputError("no such record", field="memory.record_oom", got=spec.record_oom, wants=wants)
    return None if spec.record_oom == "off" else OomRecorder(spec.record_oom, spec.oom_folder, device, rank)


@contextlib.contextmanager
def loading(model: str, recorder: Recorder | None) -> Generator[None]:
    """A model is loaded.

    Raises:
        OutOfMemory: its weights do not fit.
    """
    try:
        yield
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        recorder = recorder or NoRecorder()
        log.warning("the weights of %s do not fit: %s%s", model, e, recorder.failed("load", traced=False))
        recorder.close()
        raise OutOfMemory(f"the weights of {model} do not fit: {e}", "load") from e


@contextlib.contextmanager
def _told(what: str, address: str = "") -> Generator[None]:
    """Whatever goes wrong is logged, without the address: a record is worth no row."""
    try:
        yield
    except Exception as e:
        text = str(e).replace(address, "(its address)") if address else str(e)
        log.warning("%s: %s: %s", what, type(e).__name__, text)
