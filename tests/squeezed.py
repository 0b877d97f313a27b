"""The paged engine, short of memory by `BERTH_SQUEEZE` (JSON): by ranks, the KV `pages` it has, or the `tokens` of a
row from which on its steps run out of memory; `step_tokens`, the most that a step may compute; `taken`, a file: while
it is there another process holds all memory; `load`, the least ranks that the weights fit."""

import json
import os
from dataclasses import replace
from typing import Any

from actors.engine import assemble
from actors.engine.paged import PagedEngine
from actors.engine.protocol import EngineSpec
from actors.errors import OutOfMemory


def build(spec: EngineSpec) -> PagedEngine:
    squeeze = json.loads(os.environ["BERTH_SQUEEZE"])
    pages, most = (squeeze.get(name, {}).get(str(spec.tp)) for name in ("pages", "tokens"))
    step_tokens, taken = squeeze.get("step_tokens"), squeeze.get("taken")
    if spec.tp < squeeze.get("load", 1):
        raise OutOfMemory(f"the weights do not fit {spec.tp} GPUs", "load")
    engine = assemble.build(replace(spec, engine="paged", kv_pages=pages))
    runner: Any = engine._runner
    step = runner.step

    def squeezed(rows):
        tokens = sum(len(row.token_ids) for row in rows)
        if (
            (most is not None and any(row.start + len(row.token_ids) > most for row in rows))
            or (step_tokens is not None and tokens > step_tokens)
            or (taken and os.path.exists(taken))
        ):
            raise MemoryError("out of memory")
        return step(rows)

    runner.step = squeezed
    if taken:
        engine._squeezed = lambda: os.path.exists(taken)
    return engine
