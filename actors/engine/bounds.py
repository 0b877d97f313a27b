"""How large a step may be: as configured, halved as often as the GPU's memory wants.

Measured before the KV pool and the graphs exist. All ranks of a gang come to the same bounds: a step that one rank has
no memory for fails on all of them, and what is compared is the largest of all.

Knows nothing of budgets.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Literal

import torch

from actors.engine.gang import Gang
from actors.engine.oom import is_out_of_memory
from actors.engine.protocol import NoRecorder, Recorder
from actors.engine.runner import Runner
from actors.errors import OutOfMemory

log = logging.getLogger(__name__)

MIN_PREFILL_TOKENS = 64
Bound = Literal["max_prefill_tokens", "max_batch"]
_LEAST: dict[Bound, int] = {"max_prefill_tokens": MIN_PREFILL_TOKENS, "max_batch": 1}
_STAGES: dict[Bound, str] = {"max_prefill_tokens": "prefill", "max_batch": "decode"}
_EVENTS: dict[Bound, tuple[str, str]] = {
    "max_prefill_tokens": ("oom_prefill", "prefill_halved"),
    "max_batch": ("oom_decode", "batch_halved"),
}


class Bounds:
    """`max_prefill_tokens` and `max_batch` of a runner, on CUDA.

    Args:
        runner: has one page of KV, and no graphs.
        gang: this rank's seat, where there are several.
        recorder: is told of each out-of-memory error and each step.

    Attributes:
        measured: bytes by field of `Memory`, of the largest steps under these bounds.
        events: what happened, by the engine's names for it.
    """

    def __init__(self, runner: Runner, gang: Gang | None = None, recorder: Recorder | None = None):
        self._runner, self._gang, self._recorder = runner, gang, recorder or NoRecorder()
        self.measured: dict[str, int] = {}
        self.events: Counter[str] = Counter()

    @property
    def max_batch(self) -> int:
        """Rows of a decode step at most."""
        return self._runner.max_batch

    def measure(self, before: int) -> None:
        """Run the largest steps; bounds that do not fit are halved.

        Args:
            before: bytes that were allocated before any step.

        Raises:
            OutOfMemory: not even a step at the smallest bounds fits.
        """
        device = self._runner.kv.device
        self._profile("max_prefill_tokens", 1, 1)  # cuBLAS takes its workspace, modules are loaded: no step's
        self.measured["workspace_bytes"] = torch.cuda.memory_allocated(device) - before
        self._measure("max_prefill_tokens")
        self._measure("max_batch")
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        self.measured["context_bytes"] = total - free - reserved
        self.measured["slack_bytes"] = reserved - torch.cuda.memory_allocated(device)

    def settle(self) -> None:
        """Run the largest steps once more, when all else has its memory, so that torch's allocator takes its segments
        for them: they serve smaller steps too, while segments of smaller steps are too small for larger ones."""
        try:
            self._runner.profile()
        except Exception as e:
            if not is_out_of_memory(e):
                raise
            failure = e.with_traceback(None)
        else:
            return
        recorded = self.record("settle", traced=False)
        torch.cuda.empty_cache()
        log.warning("the largest steps do not fit behind the KV pool: %s%s", failure, recorded)

    def record(self, stage: str, traced: bool = True) -> str:
        """Memory ran out: where that is recorded, as the end of a log line."""
        recorded = self._recorder.failed(stage, traced)
        if recorded:
            self.events["oom_recorded"] += 1
        return recorded

    def relax(self, pool_bytes: int, page_bytes: int, longest_bytes: int) -> bool:
        """Halve the bound whose steps take most, and measure it again; False where that is not wanted, or not possible.

        It is wanted where the KV pool has no room for a page beside the scratch page, or where it neither holds a
        sequence of full length nor as much as a step takes.

        Args:
            pool_bytes: that are left for the KV pool; all but the bounds is the same on all ranks.
        """
        prefill, batch = (self._largest(name) for name in ("activation_bytes", "logits_bytes"))
        if pool_bytes >= 2 * page_bytes and pool_bytes >= min(longest_bytes, max(prefill, batch)):
            return False
        order: list[Bound] = ["max_prefill_tokens", "max_batch"]
        for name in order if prefill >= batch else reversed(order):
            if self._halve(name):
                self._measure(name)
                torch.cuda.empty_cache()
                return True
        return False

    def _measure(self, name: Bound) -> None:
        prefill = name == "max_prefill_tokens"
        field, sizes = ("activation_bytes", (None, 1)) if prefill else ("logits_bytes", (1, None))
        self.measured[field] = self._profile(name, *sizes)

    def _profile(self, name: Bound, max_prefill_tokens: int | None, max_batch: int | None) -> int:
        while True:
            try:
                return self._runner.profile(max_prefill_tokens, max_batch)
            except Exception as e:
                if not is_out_of_memory(e):
                    raise
                failure = e.with_traceback(None)  # its frames hold the step's tensors
            finally:
                self._recorder.ended()
            log.warning("a step of the start failed: %s%s", failure, self.record(_STAGES[name]))
            torch.cuda.empty_cache()
            self.events[_EVENTS[name][0]] += 1
            if not self._halve(name):
                text = f"a step with {name} {_LEAST[name]} does not fit beside the weights: {failure}"
                raise OutOfMemory(text, "load")

    def _halve(self, name: Bound) -> bool:
        now: int = getattr(self._runner, name)
        half = max(_LEAST[name], now // 2)
        if half >= now:
            return False
        setattr(self._runner, name, half)
        self.events[_EVENTS[name][1]] += 1
        log.warning("%s is %d, not %d: memory does not suffice", name, half, now)
        return True

    def _largest(self, field: str) -> int:
        mine = self.measured[field]
        return mine if self._gang is None else -self._gang.smallest(-mine)
