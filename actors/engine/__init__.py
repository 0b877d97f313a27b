"""One model on one GPU or gang: token ids in, token ids out. Knows no Ray, no ReAct, no text.

>>> from actors.engine import EngineSpec, Request, build
>>> engine = build(EngineSpec("smollm2-135m"))
>>> answer = engine.submit(Request(token_ids, "my-trajectory", max_tokens=64)).result()
"""

from __future__ import annotations

import gc
import importlib

from actors.engine.protocol import Capacity, Engine, EngineSpec, Matcher, Request
from actors.errors import InputError

__all__ = ["Capacity", "Engine", "EngineSpec", "Matcher", "Request", "build", "settle_garbage"]


def build(spec: EngineSpec) -> Engine:
    """Load a model into an engine.

    Raises:
        InputError: no such model or engine, or a model that the engine refuses (UnsupportedModel).
    """
    if spec.engine == "reference":
        from actors.engine import reference

        return reference.build(spec)
    if spec.engine == "paged":
        from actors.engine import assemble

        return assemble.build(spec)
    module, _, factory = spec.engine.partition(":")
    try:
        make = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError, ValueError) as e:
        raise InputError(f"no such engine: {e}", field="engine", got=spec.engine, wants="module:factory") from e
    return make(spec)


def settle_garbage() -> None:
    """Keep Python's garbage collector from holding up steps; for a process that is there for an engine, once it stands.

    What the start made stays as long as the process and is not looked through again. A step of some hundred rows makes
    thousands of short-lived containers: by the usual threshold it pays for several collections (measured at 256 rows:
    3.8 of a step's 12.6 ms on the host), by this one for few (0.5 of 8.7).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
