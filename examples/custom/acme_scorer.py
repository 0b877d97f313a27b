"""A scorer of one's own: did the model see what its answer rests on?"""

from __future__ import annotations

from actors.messages import Trajectory


def cite(trajectory: Trajectory, gold: tuple[str, ...]) -> dict[str, float]:
    """1.0 if one observation showed the row's article (`doc_id`, its title) together with a gold answer, else 0.0."""
    title = trajectory.task.metadata["doc_id"].casefold()
    seen = [step.observation.casefold() for step in trajectory.steps]
    return {"cite": float(any(title in text and any(answer.casefold() in text for answer in gold) for text in seen))}
