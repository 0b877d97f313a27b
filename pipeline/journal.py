"""What is durable before the tables are: the start, the failure and the finished row of every attempt.

Records are appended to small immutable objects, a line of JSON each, written by group commit; `begin` and
`finish` return when their record is on storage. Loaded again, the journal knows which rows are finished, so
that no finished trajectory is computed twice. One process owns a journal. Knows no Ray and no engine.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import pyarrow as pa
from pyarrow import fs

from actors.messages import DeviceBytes
from pipeline.tables import filesystem
from pipeline.tasks import packed

log = logging.getLogger(__name__)

COMMIT_S = 0.1
MERGE_OBJECTS = 64
ALONE_WAIT_S = 1.0
AWAY_S = 600.0
"""How long an object store may be away; a local disk that refuses a write ends the run at once."""

RECORD_FILE = re.compile(r"\d{20}-[0-9a-f]{8}(-merged)?\.jsonl(\.\d+\.tmp)?")
"""Names of the objects, and of what a write that was cut off leaves."""

DEVICE = tuple(f"{field.name}_bytes" for field in fields(DeviceBytes))

RECORDS = pa.schema(
    [(name, pa.string()) for name in ("kind", "row_id", "pool", "rung", "replica", "status", "cause")]
    + [(name, pa.int64()) for name in ("attempt", "predicted_bytes", "kv_bytes", *DEVICE)]
    + [(name, pa.float64()) for name in ("at", "gpu_s", "lost_gpu_s")]
)
"""Starts, failures and ends of attempts; of finished rows no more than what they cost."""


@dataclass(frozen=True, slots=True)
class Begin:
    """The journal's answer to a row that wants to start.

    Attributes:
        attempt: number of this attempt, from 1.
        row: the finished result row, where there is one: emit it, compute nothing.
        stop: the run is stopping; do not start.
        exhausted: too many attempts of this session ended without an outcome; record the row as failed.
        wait_s: not now: ask again after this many seconds.
        events: what earlier attempts did, oldest first (`journal: steps`); see `actors.replay`.
    """

    attempt: int
    row: dict[str, Any] | None = None
    stop: bool = False
    exhausted: bool = False
    wait_s: float | None = None
    events: tuple[dict[str, Any], ...] = ()


@dataclass(slots=True)
class Progress:
    """Counts of the run so far, all sessions together."""

    finished: int = 0
    failed: int = 0
    resumed: int = 0
    running: int = 0
    score_sum: float = 0.0
    generated_tokens: int = 0
    prefilled_tokens: int = 0
    reused_tokens: int = 0
    stopping: bool = False

    def count(self, result: Mapping[str, Any], sign: int = 1) -> None:
        """Add a finished row, or take one out."""
        self.finished += sign
        self.failed += sign * (result["status"] == "failed")
        self.score_sum += sign * (result["score"] or 0.0)
        self.generated_tokens += sign * (result["generated_tokens"] or 0)
        self.prefilled_tokens += sign * (result["prefilled_tokens"] or 0)
        self.reused_tokens += sign * (result["reused_tokens"] or 0)


@dataclass(slots=True)
class _Row:
    """What the journal knows of one row."""

    attempts: int = 0
    lost_here: int = 0
    place: tuple[str, int, int] | None = None
    """Object, offset and length of the finished row's line."""
    finishing: asyncio.Future[None] | None = None
    """Set while the finished row is on its way to storage."""
    events: tuple[dict[str, Any], ...] = ()
    next_event: int = 0


class Journal:
    """The journal of one run folder.

    Args:
        uri: folder of the objects: local path, s3:// or gs://.
        max_attempts: attempts of one row that may end without an outcome (their agent or replica died)
            in this session. A run that was killed and resumed starts this count again.
        attempts: attempts that rows had before this journal, by row id.
    """

    def __init__(self, uri: str, max_attempts: int = 3, attempts: Mapping[str, int] | None = None):
        self.fs, self.folder = filesystem(uri)
        self.fs.create_dir(self.folder, recursive=True)
        self.max_attempts = max_attempts
        self.session = uuid.uuid4().hex[:8]
        self.rows: dict[str, _Row] = defaultdict(_Row)
        self.progress = Progress()
        self.objects: list[str] = []
        self._alone: str | None = None
        self._rows_in: dict[str, list[_Row]] = defaultdict(list)
        self._pending: list[tuple[bytes, dict[str, Any]]] = []
        self._flushed: asyncio.Future[None] | None = None
        self._flusher: asyncio.Task[None] | None = None
        for row_id, count in (attempts or {}).items():
            self.rows[row_id].attempts = count
        for record, place in _read_all(self.fs, self.folder):
            self._apply(record, place)
            if place[0] not in self.objects:
                self.objects.append(place[0])
        self.progress.running = 0
        self.progress.resumed = self.progress.finished

    def _apply(self, record: dict[str, Any], place: tuple[str, int, int] | None) -> None:
        row = self.rows[record["row_id"]]
        row.attempts = max(row.attempts, record["attempt"])
        match record["kind"]:
            case "event" if row.place is None and record["n"] == len(row.events):  # a merge may leave two copies
                row.events += (record["event"],)
            case "finish" if row.place is None and place is not None:
                row.place, row.events = place, ()
                self.progress.count(record["row"])
                if "-merged" not in place[0]:
                    self._rows_in[place[0]].append(row)
            case "reopen" if row.place is not None:
                self.progress.count(self._read(row.place), -1)
                row.place = None
            case _:
                pass

    async def begin(self, row_id: str, pool: str | None, rung: str, predicted_bytes: int | None = None) -> Begin:
        """Record the start of an attempt; returns when it is durable. `pool` is None where it is still to be chosen.

        The last attempt of a row runs alone among such attempts: a row that kills its replica every time takes
        its neighbours with it twice, but they get a turn without it.
        """
        row = self.rows[row_id]
        if (finished := await self._finished(row)) is not None:
            return Begin(row.attempts, row=finished)
        if self.progress.stopping:
            return Begin(row.attempts, stop=True)
        if row.lost_here >= self.max_attempts:
            self._release(row_id)
            return Begin(row.attempts, exhausted=True)
        if row.lost_here and row.lost_here == self.max_attempts - 1:
            if self._alone not in (None, row_id):
                return Begin(row.attempts, wait_s=ALONE_WAIT_S)
            self._alone = row_id
        row.attempts += 1
        row.lost_here += 1
        self.progress.running += 1
        attempt = row.attempts
        record = {"kind": "begin", "row_id": row_id, "attempt": attempt, "pool": pool, "rung": rung}
        await self._append(record | {"predicted_bytes": predicted_bytes})
        row.next_event = len(row.events)  # what an earlier attempt still had under way is on storage by now
        return Begin(attempt, events=row.events)

    def _release(self, row_id: str) -> None:
        if self._alone == row_id:
            self._alone = None

    async def _finished(self, row: _Row) -> dict[str, Any] | None:
        if row.finishing is not None:
            await asyncio.wait([row.finishing])
        if row.place is None:
            return None
        try:
            return await asyncio.to_thread(self._read, row.place)
        except FileNotFoundError:  # merged meanwhile: the place has moved
            return await asyncio.to_thread(self._read, row.place)

    async def event(self, row_id: str, attempt: int, event: dict[str, Any]) -> None:
        """Record what an attempt did; returns when it is durable. An attempt that has a successor is not heard."""
        row = self.rows[row_id]
        if attempt == row.attempts:
            record = {"kind": "event", "row_id": row_id, "attempt": attempt, "n": row.next_event, "event": event}
            row.next_event += 1
            await self._append(record)

    async def fail(
        self,
        row_id: str,
        attempt: int,
        replica: str,
        cause: str,
        lost_gpu_s: float | None = None,
        pool: str | None = None,
        device: DeviceBytes | None = None,
    ) -> None:
        """Record that an attempt failed for reasons of infrastructure; its row is not finished."""
        self.progress.running -= 1
        self._release(row_id)
        await self._append(
            {
                "kind": "fail",
                "row_id": row_id,
                "attempt": attempt,
                "replica": replica,
                "cause": cause[:2000],
                "lost_gpu_s": lost_gpu_s,
                "pool": pool,
                **_device(device),
            }
        )

    async def finish(
        self,
        row_id: str,
        attempt: int,
        replica: str,
        result: dict[str, Any],
        device: DeviceBytes | None = None,
        lost_gpu_s: float | None = None,
    ) -> dict[str, Any] | None:
        """Record a finished row; returns when it is durable: None, or the row that counts in its place.

        Where another attempt of the row finished first, that one counts and this one is dropped.
        """
        row = self.rows[row_id]
        if (finished := await self._finished(row)) is not None:
            return finished
        self.progress.running -= 1
        self._release(row_id)
        record = {
            "kind": "finish",
            "row_id": row_id,
            "attempt": attempt,
            "replica": replica,
            "status": result["status"],
            "pool": result["pool"],
            "cause": (result["error"] or "")[:2000] or None,
            "lost_gpu_s": lost_gpu_s,
            **_device(device),
            "row": result,
        }
        await self._append(record, row)
        return None

    async def do(self, requests: Sequence[tuple[str, tuple[Any, ...]]]) -> list[Any]:
        """Several of the above at once, (name, arguments) each: their answers, in order."""
        return await asyncio.gather(*(getattr(self, name)(*arguments) for name, arguments in requests))

    async def reopen(self, row_ids: Sequence[str]) -> None:
        """Take rows as not finished: they are to be done again."""
        await asyncio.gather(
            *(
                self._append({"kind": "reopen", "row_id": row_id, "attempt": self.rows[row_id].attempts})
                for row_id in row_ids
            )
        )

    async def stop(self) -> None:
        """Start no further row."""
        self.progress.stopping = True

    async def counts(self) -> Progress:
        """Counts so far."""
        return self.progress

    def _read(self, place: tuple[str, int, int]) -> dict[str, Any]:
        path, offset, length = place
        with self.fs.open_input_file(path) as file:
            file.seek(offset)
            return json.loads(file.read(length))["row"]

    async def _append(self, record: dict[str, Any], finished: _Row | None = None) -> None:
        record |= {"at": time.time(), "session": self.session}
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        if self._flushed is None:
            self._flushed = asyncio.get_running_loop().create_future()
        waiting = self._flushed
        self._pending.append((line, record))
        if finished is not None:
            finished.finishing = waiting
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush())
        await asyncio.shield(waiting)

    async def _flush(self) -> None:
        """Write what is pending as one object, until nothing is pending."""
        while self._pending:
            await asyncio.sleep(COMMIT_S)
            batch, waiting = self._pending, self._flushed
            self._pending, self._flushed = [], None
            assert waiting is not None
            name = f"{self.folder}/{time.time_ns():020d}-{self.session}.jsonl"
            try:
                await self._write(name, b"".join(line for line, _ in batch))
            except OSError as e:
                waiting.set_exception(e)
                waiting.exception()
                continue
            finally:
                for _, record in batch:
                    if self.rows[record["row_id"]].finishing is waiting:
                        self.rows[record["row_id"]].finishing = None
            offset = 0
            for line, record in batch:
                self._apply(record, (name, offset, len(line)))
                offset += len(line)
            self.objects.append(name)
            waiting.set_result(None)
            if sum("-merged" not in path for path in self.objects) >= MERGE_OBJECTS:
                try:
                    await self._merge()
                except OSError as e:  # more objects than need be; the next commit tries again
                    log.warning("journal objects could not be merged: %s", e)

    async def _write(self, name: str, content: bytes) -> None:
        until = time.monotonic() + (0 if isinstance(self.fs, fs.LocalFileSystem) else AWAY_S)
        while True:
            try:
                return await asyncio.to_thread(write_whole, self.fs, name, content)
            except OSError as e:
                if time.monotonic() >= until:
                    raise
                log.warning("the journal could not be written and tries again: %s", e)
                await asyncio.sleep(1)

    async def _merge(self) -> None:
        """Put small objects together, so that their number grows with the rows and not with the time."""
        small = [path for path in self.objects if "-merged" not in path]
        name = f"{small[-1].removesuffix('.jsonl')}-merged.jsonl"
        starts = await asyncio.to_thread(self._concatenate, small, name)
        for path in small:
            for row in self._rows_in.pop(path, ()):
                if row.place is not None and row.place[0] == path:
                    row.place = (name, starts[path] + row.place[1], row.place[2])
        self.objects = [path for path in self.objects if path not in starts] + [name]
        for path in small:
            await asyncio.to_thread(self.fs.delete_file, path)

    def _concatenate(self, small: list[str], name: str) -> dict[str, int]:
        """Write the objects as one; where each now starts."""
        starts: dict[str, int] = {}
        content = bytearray()
        for path in small:
            starts[path] = len(content)
            with self.fs.open_input_stream(path) as stream:
                content += stream.read()
        write_whole(self.fs, name, bytes(content))
        return starts

    async def settled(self) -> None:
        """Return when all that was recorded is on storage, and no objects are being put together."""
        while self._flusher is not None and not self._flusher.done():
            await asyncio.shield(self._flusher)


def records(folder: str) -> pa.Table:
    """All records of attempts in the folder of a journal that has settled, as RECORDS, in the order of writing; a merge
    may have left some twice."""

    def told() -> Iterator[dict[str, Any]]:
        for record, _ in _read_all(*filesystem(folder)):
            if (row := record.pop("row", None)) is not None:
                record |= {"gpu_s": row.get("gpu_s"), "kv_bytes": row.get("observed_peak_bytes")}
            if record["kind"] in ("begin", "fail", "finish"):
                yield record

    packs = (pa.Table.from_pylist(pack, schema=RECORDS) for pack in packed(told()))
    return pa.concat_tables([RECORDS.empty_table(), *packs])


def _read_all(store: fs.FileSystem, folder: str) -> Iterator[tuple[dict[str, Any], tuple[str, int, int]]]:
    """Every record, and in which object it stands, from where, how long."""
    infos = store.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    for info in sorted(infos, key=lambda info: info.base_name):
        if info.type != fs.FileType.File or not info.base_name.endswith(".jsonl"):
            continue
        with store.open_input_stream(info.path) as stream:
            content = stream.read()
        offset = 0
        for line in content.splitlines(keepends=True):
            yield json.loads(line), (info.path, offset, len(line))
            offset += len(line)


def _device(found: DeviceBytes | None) -> dict[str, int]:
    return dict(zip(DEVICE, astuple(found), strict=True)) if found else {}


def write_whole(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    """Write a file that appears whole or not at all, and is on the disk when this returns.

    Unlike the tables' writer it makes no folder: a run folder that was deleted stays deleted.
    """
    if not isinstance(filesystem, fs.LocalFileSystem):
        with filesystem.open_output_stream(path) as stream:
            stream.write(content)
        return
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
