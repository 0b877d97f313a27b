"""What a run folder holds already, put in order before it is resumed, and rows of it that are to be done again.

`results/` is the truth: what Ray Data's checkpoint says is written anew from it, so that neither a part that a crash
cut short nor one that somebody removed loses a row. Every step can be interrupted and repeated. Runs under the run
lock, with nothing of the run alive. Knows no Ray.
"""

from __future__ import annotations

import asyncio
import posixpath
from collections.abc import Callable, Collection

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow.fs import FileSelector, FileSystem

from actors.errors import RunConflict
from pipeline.journal import RECORD_FILE, Journal
from pipeline.tables import ATTEMPTS, RESULTS, filesystem, read_table, table_files, write_table
from pipeline.tasks import packed

REOPENED_AT_ONCE = 4096
"""Each waits in a task of its own for the journal's commit: 2.8 GB for 10⁶ rows."""


def reconcile(out: str, tell: Callable[[str], None]) -> pa.Array:
    """Put results/ in order; the ids of the rows that are done. Changes nothing where all is well.

    A part that cannot be read goes to journal/damaged/, and its rows are done again: from the journal, where they
    are finished there. A row that stands twice is kept once.

    Raises:
        RunConflict: a readable part is not of a run; it stays where it is.
    """
    fs, folder = filesystem(f"{out}/results")
    parts: dict[str, pa.ChunkedArray] = {}
    for path in table_files(fs, folder):
        try:
            with pq.ParquetFile(path, filesystem=fs) as part:
                if "row_id" not in part.schema_arrow.names:
                    raise RunConflict("not a table of results: it has no row_id", file=path, wants="another folder")
                parts[path] = part.read(columns=["row_id"])["row_id"].cast(pa.string())
        except (pa.ArrowInvalid, OSError) as e:
            if isinstance(e, OSError) and not isinstance(e, pa.ArrowException):
                raise
            _set_aside(fs, path, f"{out}/journal/damaged")
            tell(f"{posixpath.basename(path)} cannot be read and was moved to journal/damaged/: {e}")
    rows = pa.chunked_array([chunk for ids in parts.values() for chunk in ids.chunks], pa.string())
    done = rows.unique()
    if len(done) < len(rows):
        seen: set[str] = set()
        for path, ids in parts.items():
            if twice := seen.intersection(ids.to_pylist()):
                _drop_rows(fs, path, twice)
            seen.update(ids.to_pylist())
    return done


def failed_rows(out: str, kinds: Collection[str]) -> list[str]:
    """Ids of the failed rows whose error is of these types (model, tool, infra); of all types where none is given."""
    where = ds.field("status") == "failed"
    if kinds:
        where &= ds.field("error_type").isin(list(kinds))
    return read_table(f"{out}/results", RESULTS, ["row_id"], where=where)["row_id"].to_pylist()


def reopen(out: str, row_ids: Collection[str]) -> None:
    """Take rows out of results/, so that a resumed run does them again. Their attempts stay in attempts/.

    The journal forgets the rows first: a run that is killed in between either still has a row in its table or does
    it again.
    """
    asyncio.run(_forget(out, row_ids))
    wanted = set(row_ids)
    fs, folder = filesystem(f"{out}/results")
    for path in table_files(fs, folder):
        found = pq.read_table(path, columns=["row_id"], filesystem=fs)["row_id"].to_pylist()
        if again := wanted.intersection(found):
            _drop_rows(fs, path, again)


async def _forget(out: str, row_ids: Collection[str]) -> None:
    journal = Journal(f"{out}/journal")
    for some in packed(row_ids, REOPENED_AT_ONCE):
        await journal.reopen(some)


def attempts_so_far(out: str, done: pa.Array) -> dict[str, int]:
    """The last attempt of each row that is not done, by the table attempts/."""
    table = read_table(f"{out}/attempts", ATTEMPTS, ["row_id", "attempt"], where=~ds.field("row_id").isin(done))
    last = table.group_by("row_id").aggregate([("attempt", "max")]).to_pylist()
    return {row["row_id"]: row["attempt_max"] for row in last}


def write_checkpoint(out: str, row_ids: pa.Array) -> None:
    """Ray Data's checkpoint: the ids it is to leave out. The new one is written before old ones are removed."""
    fs, folder = filesystem(f"{out}/journal/checkpoint")
    old = table_files(fs, folder)
    fs.create_dir(folder, recursive=True)
    if len(row_ids):
        new = f"{folder}/results.parquet"
        write_table(pa.table({"row_id": row_ids.sort()}), new, fs)
        old = [path for path in old if path != new]
    for path in old:
        fs.delete_file(path)


def clear_journal(out: str) -> None:
    """Remove the journal's records and Ray Data's checkpoint; anything else in there, as damaged/, stays."""
    fs, folder = filesystem(f"{out}/journal")
    found = fs.get_file_info(FileSelector(folder, allow_not_found=True))
    for info in found:
        if info.base_name == "checkpoint":
            fs.delete_dir(info.path)
        elif RECORD_FILE.fullmatch(info.base_name):
            fs.delete_file(info.path)
    left = fs.get_file_info(FileSelector(folder, recursive=True, allow_not_found=True))
    if found and not any(info.is_file for info in left):
        fs.delete_dir(folder)


def _drop_rows(fs: FileSystem, path: str, row_ids: Collection[str]) -> None:
    """Rewrite one part without these rows; at each moment the old part or the new one is there."""
    table = pq.read_table(path, filesystem=fs)
    kept = table.filter(~ds.field("row_id").isin(list(row_ids)))
    if kept.num_rows:
        write_table(kept, path, fs)
    else:
        fs.delete_file(path)


def _set_aside(fs: FileSystem, path: str, folder: str) -> None:
    _, aside = filesystem(folder)
    fs.create_dir(aside, recursive=True)
    fs.move(path, posixpath.join(aside, posixpath.basename(path) + ".damaged"))
