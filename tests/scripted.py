"""An engine that answers from the prompt's last line, without a model: for what is not the model's business.

Each trajectory searches twice and finishes at its third step. `BERTH_SCRIPT` (JSON) adds delays and faults: `delay_s`
before each answer, `max_batch`, `count` (a file that gets a line for each call), `killer` (a row id that ends the
process), `hangs` (a file: the engine that takes it away answers no more), `oom` (row id → from which step on it needs
more than how many ranks), `load` (ranks that the weights need at least and at most), `budgets`: pages of PAGE tokens
that each replica has, in the order of their starts. What a trajectory holds it holds until `end`; a call that needs
more than is left fails, and each stands in the file `log`. A gang's other ranks do nothing.
"""

import asyncio
import contextlib
import itertools
import json
import os
import re
import threading
import time
from concurrent.futures import Future
from dataclasses import replace

from actors.engine.loader import load_tokenizer, resolve
from actors.engine.protocol import Capacity, EngineSpec, Request
from actors.errors import OutOfMemory
from actors.messages import Generation, Numerics, Usage

STEPS = 3
PAGE = 16


class ScriptedEngine:
    """Answers after `delay_s`; remembers the pages of each trajectory, if it has a budget."""

    dead: str | None = None

    def __init__(self, spec: EngineSpec):
        self.tokenizer = load_tokenizer(resolve(spec.model, spec.revision).folder)
        self.tp = spec.tp
        self.numerics = Numerics(
            "scripted", "none", "float32", "float32", "float32", self.tp, spec.revision or "", True
        )
        self.script = json.loads(os.environ.get("BERTH_SCRIPT", "{}"))
        least, most = self.script.get("load", (1, 8))
        if not least <= spec.tp <= most:
            raise OutOfMemory(f"the weights do not fit {spec.tp} GPUs", "load", 3 << 30, spec.tp << 30)
        self.answers: dict[int, tuple[int, ...]] = {}
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.hung_since: float | None = None
        self.held: dict[str, int] = {}
        self.budget = self._budget() if "budgets" in self.script else 0

    def _budget(self) -> int:
        """The budget of the first place that no other replica has taken."""
        for place in itertools.count():
            try:
                os.mkdir(f"{self.script['log']}.{place}")
            except FileExistsError:
                continue
            return self.script["budgets"][place % len(self.script["budgets"])]
        raise AssertionError

    def _hold(self, sequence_id: str, tokens: int) -> bool:
        """Take the pages of a call; False where the budget does not allow it."""
        pages = -(-tokens // PAGE)
        used = sum(self.held.values()) - self.held.get(sequence_id, 0) + pages
        line = {"pid": os.getpid(), "row": sequence_id, "used": used, "budget": self.budget}
        with open(self.script["log"], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if used > self.budget:
            return False
        self.held[sequence_id] = pages
        return True

    def submit(self, request: Request) -> Future[Generation]:
        future: Future[Generation] = Future()
        future.set_running_or_notify_cancel()
        tail = self.tokenizer.decode(list(request.token_ids[-12:]))
        found = re.findall(r"Thought (\d+):\s*$", tail)
        step = int(found[-1]) if found else STEPS
        if step not in self.answers:
            action = f"Search[thing {step}]" if step < STEPS else "Finish[yes]"
            text = f" I am at step {step}.\nAction {step}: {action}\n"
            self.answers[step] = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        if request.sequence_id == self.script.get("killer"):
            os._exit(1)
        if (path := self.script.get("hangs")) and self.hung_since is None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
                self.hung_since = time.monotonic()
        if self.hung_since is not None:
            return future
        oom_step, ranks = self.script.get("oom", {}).get(request.sequence_id, (STEPS + 1, 0))
        if step >= oom_step and self.tp <= ranks:
            text = f"failed alone at the smallest bound: step {step} on {self.tp} GPUs"
            future.set_exception(OutOfMemory(text, "prefill", 9 << 30, self.tp << 30))
            return future
        ids = self.answers[step]
        if self.budget and not self._hold(request.sequence_id, len(request.token_ids) + len(ids)):
            future.set_exception(OutOfMemory("over the budget"))
            return future
        if request.matcher is not None:
            request.matcher(ids)
        held = PAGE * self.held.get(request.sequence_id, 0)
        usage = Usage(len(request.token_ids), len(request.token_ids), 0, len(ids), held, batch_max=1, gpu_s=0.0)
        answer = Generation(ids, "stop", usage)
        if path := self.script.get("count"):
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{request.sequence_id} {step}\n")
        if delay_s := self.script.get("delay_s"):
            self.loop.call_soon_threadsafe(self.loop.call_later, delay_s, future.set_result, answer)
        else:
            future.set_result(answer)
        return future

    def end(self, sequence_id: str) -> None:
        self.held.pop(sequence_id, None)

    def capacity(self) -> Capacity:
        sizes = Capacity(max_model_len=8192, max_batch=self.script.get("max_batch", 64))
        free = self.budget - sum(self.held.values())
        held = {"kv_bytes_token": 1, "pages_total": self.budget, "pages_free": free, "page_tokens": PAGE}
        return replace(sizes, **held) if self.budget else sizes

    def step_s(self) -> float:
        return 0.0 if self.hung_since is None else time.monotonic() - self.hung_since

    def shrink(self, max_batch: int) -> None:
        pass

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)


def build(spec: EngineSpec) -> ScriptedEngine:
    if spec.tp > 1 and os.environ["RANK"] != "0":
        threading.Event().wait()
    started = time.monotonic()
    engine = ScriptedEngine(spec)
    assert time.monotonic() - started < 60
    return engine
