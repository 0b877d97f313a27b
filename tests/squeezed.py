"""The paged engine, short of memory by `BERTH_SQUEEZE` (JSON): by ranks, the KV `pages` it has, or the `tokens` of a
row from which on its steps run out of memory."""

import json
import os
from dataclasses import replace
from typing import Any

from actors.engine import assemble
from actors.engine.paged import PagedEngine
from actors.engine.protocol import EngineSpec


def build(spec: EngineSpec) -> PagedEngine:
    squeeze = json.loads(os.environ["BERTH_SQUEEZE"])
    pages, most = (squeeze.get(name, {}).get(str(spec.tp)) for name in ("pages", "tokens"))
    engine = assemble.build(replace(spec, engine="paged", kv_pages=pages))
    runner: Any = engine._runner
    step = runner.step

    def squeezed(rows):
        if most is not None and any(row.start + len(row.token_ids) > most for row in rows):
            raise MemoryError("out of memory")
        return step(rows)

    runner.step = squeezed
    return engine
