"""Tasks as columns are the tasks they were made of."""

import pytest

from actors.messages import Task
from pipeline.tasks import PACK, Tasks, packed


def test_tasks_are_a_sequence_of_what_they_were_made_of():
    made = [
        Task(f"q{i}", i % 2, f"Question {i}?", ("yes", "3"), {"kind": "a"}, {"id": i, "facts": ["x", None]}, 2**62 + i)
        for i in range(2 * PACK + 3)
    ]
    tasks = Tasks(iter(made))
    assert len(tasks) == len(made)
    assert list(tasks) == made
    assert (tasks[0], tasks[-1], tasks[PACK]) == (made[0], made[-1], made[PACK])
    assert tasks[1:PACK:500] == made[1:PACK:500]
    assert tasks == Tasks(made)
    assert tasks != Tasks(made[1:])
    with pytest.raises(IndexError):
        tasks[len(made)]
    assert not Tasks()


def test_packs_hold_everything_in_order():
    assert list(packed(range(5), 2)) == [[0, 1], [2, 3], [4]]
