"""One run at a time in one run folder, on a disk or on an object store.

A disk has `flock`, which the system lets go of when the process ends, however it ends. An object store has no lock and
pyarrow no conditional write, so a run writes an object of its own below `lock/` and reads the listing, which S3 and GCS
keep strongly consistent: `ask-ID` until no other run is alive there, then `hold-ID`, written again every BEAT_S. A hold
that was not written for EXPIRY_S belongs to a dead run and is removed. Ages are differences between the store's own
time stamps, so the machines' clocks need not agree. While it holds the lock a run watches it, and is stopped when the
lock is gone or another run holds it. Nothing on storage tells a paused process from a dead one: after a sleep
longer than EXPIRY_S a process may write for up to BEAT_S more.

Knows nothing of what a run is, nor how it is stopped.
"""

from __future__ import annotations

import fcntl
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from pyarrow.fs import FileSelector, FileSystem

from actors.errors import InputError, RunConflict
from pipeline.tables import filesystem, read_bytes

BEAT_S = 5.0
EXPIRY_S = 30.0
"""Also the longest time after which a killed run can be repeated."""


@contextmanager
def locked(
    out: str, lost: Callable[[InputError], None], waiting: Callable[[str], None] = lambda _: None
) -> Generator[None]:
    """Hold the run folder's lock.

    Args:
        out: run folder: local path, s3:// or gs://; made where it is absent.
        lost: called once, in a thread of its own, when the lock is lost while it is held, with RunConflict where
            another run has it now; it must see to it that this process writes nothing more.
        waiting: told whose lock it waits for, where a run may have been killed less than EXPIRY_S ago.

    Raises:
        InputError: `out` cannot be written to.
        RunConflict: another run is at work there.
    """
    held = _Objects(out) if "://" in out else _File(Path(out))
    held.acquire(waiting)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(held.beat_s):
            if error := held.renew():
                lost(error)
                return

    watcher = threading.Thread(target=watch, name="lock", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        held.release()


class _File:
    """`.lock` in a local folder, under flock."""

    beat_s = 1.0

    def __init__(self, folder: Path):
        self.path = folder / ".lock"
        self.file: IO[str]

    def acquire(self, waiting: Callable[[str], None]) -> None:
        out = str(self.path.parent)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a+")
        except OSError as e:
            raise InputError(f"not writable: {e.strerror}", field="out", got=out, wants="a folder to write to") from e
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self.file.seek(0)
            owner = self.file.read().strip()
            self.file.close()
            raise _conflict(out, owner) from e
        self.file.truncate(0)
        self.file.write(_myself() + "\n")
        self.file.flush()

    def renew(self) -> InputError | None:
        """Why the lock is lost, if it is."""
        mine = os.fstat(self.file.fileno())
        try:
            if os.path.samestat(mine, self.path.stat()):
                return None
        except FileNotFoundError:
            pass
        except OSError:  # the disk does not answer; the lock is the system's, and held
            return None
        return _removed(self.path.parent)

    def release(self) -> None:
        self.file.close()


class _Objects:
    """`lock/ask-ID` and `lock/hold-ID` on an object store."""

    def __init__(self, out: str):
        self.out, self.beat_s = out, BEAT_S
        self.fs: FileSystem
        self.fs, path = filesystem(out)
        self.folder = f"{path}/lock"
        name = uuid.uuid4().hex[:12]
        self.ask, self.hold = f"ask-{name}", f"hold-{name}"

    def acquire(self, waiting: Callable[[str], None]) -> None:
        seen: dict[str, datetime] = {}
        try:
            self.fs.create_dir(self.folder, recursive=True)
            while others := self._write(self.ask):
                # Of several that ask at once, the first by name goes before.
                before = {name: at for name, at in others.items() if name.startswith("hold-") or name < self.ask}
                for name, at in before.items():
                    if seen.get(name, at) != at:
                        raise self._conflict(name)
                    if name not in seen:
                        owner = self._owner(name) or "a process"
                        waiting(f"{owner} may have been killed; looking for up to {EXPIRY_S:.0f} s")
                seen |= before
                time.sleep(BEAT_S / 2)
            if rivals := [name for name in self._write(self.hold) if name.startswith("hold-")]:
                raise self._conflict(rivals[0])
            self._delete(self.ask)
            for name in self._listing().keys() - {self.hold}:
                if name.startswith("hold-"):  # of a dead run, as was just seen
                    self._delete(name)
        except OSError as e:
            raise InputError(f"not writable: {e}", field="out", got=self.out, wants="a bucket to write to") from e
        except BaseException:
            self.release()
            raise

    def renew(self) -> InputError | None:
        """Write the hold again; why it is lost, if it is."""
        try:
            if self.hold not in self._listing():
                return _removed(self.out)
            rivals = [name for name in self._write(self.hold) if name.startswith("hold-")]
            return self._conflict(rivals[0]) if rivals else None
        except OSError:  # the store is away; so it is for every other run
            return None

    def release(self) -> None:
        self._delete(self.ask)
        self._delete(self.hold)

    def _write(self, mine: str) -> dict[str, datetime]:
        """Write my object; then the objects of other runs that are alive, with the store's time of each."""
        with self.fs.open_output_stream(f"{self.folder}/{mine}") as stream:
            stream.write(_myself().encode())
        found = self._listing()
        if mine not in found:
            raise FileNotFoundError(f"{mine} was removed")
        others = {name: at for name, at in found.items() if name not in (self.ask, self.hold)}
        return {name: at for name, at in others.items() if (found[mine] - at).total_seconds() <= EXPIRY_S}

    def _listing(self) -> dict[str, datetime]:
        infos = self.fs.get_file_info(FileSelector(self.folder, allow_not_found=True))
        return {info.base_name: info.mtime for info in infos if info.is_file and info.mtime is not None}

    def _delete(self, name: str) -> None:
        with suppress(OSError):  # not there, or the store is away: it expires
            self.fs.delete_file(f"{self.folder}/{name}")

    def _owner(self, name: str) -> str:
        return (read_bytes(f"{self.out}/lock/{name}") or b"").decode()

    def _conflict(self, name: str) -> RunConflict:
        return _conflict(self.out, self._owner(name))


def _conflict(out: str, owner: str) -> RunConflict:
    what = f"another run is at work in this folder ({owner or 'unknown process'})"
    return RunConflict(what, field="out", got=out, wants="wait for it, or another folder")


def _removed(out: object) -> InputError:
    return InputError("the run folder was removed or replaced while the run was at work", field="out", got=str(out))


def _myself() -> str:
    return f"process {os.getpid()} on {platform.node()} since {datetime.now(UTC).isoformat(timespec='seconds')}"
