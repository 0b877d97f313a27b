"""An engine in a process of its own: what crosses, what comes back, and how either process ends."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import replace

import psutil
import pytest

from actors.engine import EngineSpec, Request, build
from actors.engine.loader import load_tokenizer, stop_token_ids
from actors.errors import ContextOverflow, EngineDead, OutOfMemory
from actors.messages import Sampling, Stage, Turn
from actors.process import EngineProcess
from actors.stopping import speak
from bench.tiny import write_tiny_model
from tests.scripted import ScriptedEngine

TIMEOUT_S = 60
GREEDY = Sampling()
SHORT = Turn((Stage("thought", 12),))
LONG = Turn((Stage("thought", 10_000),))
LABELLED = Turn((Stage("thought", 9, None, "[a-z]", "\nAction 1:"), Stage("action", 8)))


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> EngineSpec:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder)
    return EngineSpec(str(folder), device="cpu", max_batch=8, max_model_len=4096, kv_pages=600)


@asynccontextmanager
async def process(spec: EngineSpec, **settings):
    engine = EngineProcess(spec, 1, **settings)
    try:
        yield engine
    finally:
        engine.close()


def scripted(monkeypatch, **script) -> EngineSpec:
    monkeypatch.setenv("BERTH_SCRIPT", json.dumps(script))
    return EngineSpec("smollm2-135m", engine="tests.scripted:build")


async def until(true, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_the_process_says_what_the_engine_would(spec):
    prompts = [list(range(100 + n, 160 + 7 * n)) for n in range(6)]
    draws = [Sampling(0.8, 0.9, 40, seed) if seed % 2 else GREEDY for seed in range(6)]
    turns = [SHORT, LABELLED] * 3
    async with process(spec) as engine:
        calls = zip(prompts, draws, turns, strict=True)
        found = await asyncio.gather(*(engine.speak(ids, f"row {ids[0]}", draw, turn) for ids, draw, turn in calls))
        numerics = engine.numerics
    own = build(spec)
    try:
        tokenizer, stops = load_tokenizer(spec.model), stop_token_ids(spec.model)
        calls = zip(prompts, draws, turns, strict=True)
        spoken = [
            speak(own, Request(ids, f"row {ids[0]}", turn.max_tokens, draw, stops), turn, tokenizer)
            for ids, draw, turn in calls
        ]
        assert [one.token_ids for one in found] == [one.result(TIMEOUT_S).token_ids for one in spoken]
        assert numerics == own.numerics
    finally:
        own.close()
    assert all(one.usage.generated for one in found)
    assert [one.usage.forced > 0 for one in found] == [False, True] * 3


async def test_a_call_is_given_up_a_row_is_ended_and_errors_come_back(spec):
    async with process(spec) as engine:
        await until(lambda: engine.capacity().pages_cached == 0)
        with pytest.raises(ContextOverflow, match="4096"):
            await engine.speak(range(5000), "long", GREEDY, SHORT)
        call = asyncio.create_task(engine.speak(range(40), "given up", GREEDY, LONG))
        await until(lambda: engine.capacity().running == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: engine.capacity().running == 0)
        await engine.speak(range(40), "ended", GREEDY, SHORT)
        assert (await engine.ask("capacity")).pages_cached > 0
        engine.end("ended")
        engine.end("given up")
        with pytest.raises(RuntimeError, match=r"TypeError.*shrink"):
            await engine.ask("shrink")
        with pytest.raises(RuntimeError, match="unterminated"):
            await engine.speak(range(40), "bad pattern", GREEDY, Turn((Stage("thought", 5, "("),)))
        with pytest.raises(TypeError, match="pickle"):
            await engine.ask("shrink", threading.Lock())
        assert engine.step_s() < 5


async def test_what_the_start_refuses_is_raised_here(spec, monkeypatch):
    with pytest.raises(OutOfMemory, match="do not fit 1 GPUs") as raised:
        EngineProcess(scripted(monkeypatch, load=[2, 8]))
    assert (raised.value.stage, raised.value.free_bytes) == ("load", 1 << 30)
    with pytest.raises(EngineDead, match="exit code 7"):
        EngineProcess(EngineSpec(spec.model, engine="tests.unit.test_process:quits"))


def quits(_: EngineSpec):
    os._exit(7)


def mortal(spec: EngineSpec) -> ScriptedEngine:
    engine = ScriptedEngine(spec)
    engine.die = lambda: setattr(engine, "dead", "as it was told")
    return engine


async def test_a_process_that_dies_or_hangs_is_noticed(monkeypatch):
    ended = []
    spec = replace(scripted(monkeypatch), engine="tests.unit.test_process:mortal")
    async with process(spec, on_end=ended.append) as engine:
        os.kill(engine.pid, signal.SIGSTOP)
        await until(lambda: engine.step_s() > 1)
        os.kill(engine.pid, signal.SIGCONT)
        await until(lambda: engine.step_s() == 0)
        assert await engine.ask("die") is None
        await until(lambda: ended)
        assert ended == ["the engine's process has ended, exit code 1"]


async def check_poisoned(spec: EngineSpec, how: str) -> None:
    """Calls under way fail with EngineDead, the process ends, and another one answers as it did (tests/poisoned.py)."""
    spec, ended = replace(spec, engine="tests.poisoned:build"), []

    async def answers(engine: EngineProcess, name: str) -> list:
        calls = (engine.speak(range(n, n + 60), f"{name} {n}", GREEDY, SHORT) for n in (100, 300))
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), TIMEOUT_S)

    async with process(spec, on_end=ended.append) as engine:
        before = [one.token_ids for one in await answers(engine, "before")]
        await engine.ask("poison", how)
        failed = await answers(engine, "under way")
        failed_s = time.monotonic()
        await until(lambda: ended)
        print(f"{how}: the process has ended after {time.monotonic() - failed_s:.2f} s: {failed[0]}")
    assert [type(error) for error in failed] == [EngineDead, EngineDead]
    assert all("CUDA" in str(error) for error in failed)
    assert ended == ["the engine's process has ended, exit code 1"]
    async with process(spec) as engine:
        assert [one.token_ids for one in await answers(engine, "after")] == before
    assert all(len(ids) > 4 for ids in before)


async def test_a_broken_context_ends_the_process_and_the_next_one_answers_as_before(spec):
    await check_poisoned(spec, "error")


def test_a_process_ends_with_the_one_that_started_it(spec):
    program = (
        "import asyncio, sys, time\n"
        "from actors.engine import EngineSpec\n"
        "from actors.process import EngineProcess\n"
        "async def main():\n"
        "    print(EngineProcess(EngineSpec(sys.argv[1], device='cpu', kv_pages=20)).pid, flush=True)\n"
        "    time.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, spec.model], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        child = psutil.Process(int(starter.stdout.readline()))
        assert child.is_running()
        if sys.platform == "linux":  # elsewhere one that is stopped does not see the pipe's end
            child.suspend()
        starter.kill()
    child.wait(TIMEOUT_S)
