"""The paged engine with a KV pool of so many pages: `BERTH_PAGES` (JSON), by ranks."""

import json
import os
from dataclasses import replace

from actors.engine import assemble
from actors.engine.paged import PagedEngine
from actors.engine.protocol import EngineSpec


def build(spec: EngineSpec) -> PagedEngine:
    pages = json.loads(os.environ["BERTH_PAGES"])[str(spec.tp)]
    return assemble.build(replace(spec, engine="paged", kv_pages=pages))
