"""A run's tasks as columns, which take a tenth of what they take as objects.

Knows column names through tables.py, and neither where tasks come from nor what is forecast of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar, overload

import pyarrow as pa

from actors.messages import Task
from pipeline.tables import TASK, bare_row, rows_to_table, task_from_row

PACK = 1024

Item = TypeVar("Item")


class Tasks(Sequence[Task]):
    """A sequence of tasks as an Arrow table: reading 10⁶ short questions takes 0.36 GiB. A task is made when it is
    asked for.

    Its data row is what JSON leaves of it, as it is for the agents, who read the manifest.
    """

    def __init__(self, tasks: Iterable[Task] = ()):
        packs = (rows_to_table([bare_row(task) for task in pack], TASK) for pack in packed(tasks))
        self.table = pa.concat_tables([TASK.empty_table(), *packs]).combine_chunks()

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> list[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | list[Task]:
        places = range(len(self))[index]
        return self.at([places])[0] if isinstance(places, int) else self.at(places)

    def __iter__(self) -> Iterator[Task]:
        for batch in self.table.to_batches(PACK):
            yield from map(task_from_row, batch.to_pylist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tasks) and self.table.equals(other.table)

    def at(self, places: Any) -> list[Task]:
        """The tasks at these places."""
        return [task_from_row(row) for row in self.table.take(pa.array(places, pa.int64())).to_pylist()]


def packed(items: Iterable[Item], size: int = PACK) -> Iterator[list[Item]]:
    """All items, `size` at a time."""
    left = iter(items)
    while pack := list(islice(left, size)):
        yield pack
