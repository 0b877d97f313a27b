"""A gang of processes against one process, in fp32 on CPU: the same tokens, whatever happens in between."""

import gzip
import json
import os
import signal
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, Qwen3MoeConfig

from actors.engine import leader
from actors.engine.assemble import build, compiles, over_model
from actors.engine.gang import Gang
from actors.engine.int8 import quantise
from actors.engine.kv import KVCache, kv_shapes
from actors.engine.leader import pack, unpack
from actors.engine.protocol import EngineSpec, Request, RowStep
from actors.engine.shard import ShardedRunner, split
from actors.engine.support import check_tensor_parallel, tensor_parallel_sizes
from actors.errors import EngineDead, InputError, UnsupportedModel
from actors.messages import Sampling
from tests import ranks
from tests.unit.test_engine_equality import GREEDY, PAGE, SAMPLED, alone, pages_of, together, tokens
from tests.unit.test_runner import _one_thread  # noqa: F401

SETTINGS = {"pages": 100, "page_tokens": PAGE, "max_model_len": 256, "max_batch": 8, "max_prefill_tokens": 512}


@pytest.fixture(scope="module")
def all_seats():
    with ranks.seats(6) as found:
        yield found


@pytest.fixture
def others(all_seats):
    """Processes that take seats 1 to 3; the other three are lost in their tests."""
    return all_seats[:3]


@contextmanager
def gang(
    others,
    name,
    size,
    deadline_s=60.0,
    fail=None,
    changes=None,
    quantization=None,
    backend=None,
    record=None,
    **options,
):
    """Rank 0's engine; `fail` is {rank: arguments of `ranks.engine`}."""
    seat = {
        "name": name,
        "size": size,
        "port": ranks.free_port(),
        "deadline_s": deadline_s,
        "changes": changes,
        "quantization": quantization,
        "backend": backend,
        "record": record,
        "options": SETTINGS | options,
    }
    fail = fail or {}
    for rank in range(1, size):
        others[rank - 1].tell(**(seat | {"rank": rank} | fail.get(rank, {})))
    engine = ranks.engine(**(seat | {"rank": 0} | fail.get(0, {})))
    try:
        yield engine
    finally:
        engine.close()
        for other in others[: size - 1]:
            assert other.heard() == "closed"


def one_process(name, requests, **changes):
    engine = over_model(ranks.shape(name, **changes), **SETTINGS)
    try:
        return alone(engine, requests)
    finally:
        engine.close()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_moe"])
def test_a_gang_gives_the_tokens_of_one_process(others, name, size):
    rows = GREEDY + SAMPLED
    expected = tokens(one_process(name, rows))
    # Every prompt fits, in chunks, and no row has a page to grow into.
    with gang(others, name, size, pages=1 + pages_of(rows), max_prefill_tokens=13) as engine:
        assert engine.numerics.tp == size
        assert tokens(alone(engine, rows[:1])) == expected[:1]
        answers = together(engine, rows)
        assert engine.events["preemptions"] > 0
    assert max(answer.usage.batch_max for answer in answers) > 1
    assert tokens(answers) == expected


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_gang_in_8_bits_gives_the_tokens_of_one_process(others, name):
    model = ranks.shape(name)
    quantise(model, "cpu")
    engine = over_model(model, **SETTINGS, kv_dtype="int8")
    expected = alone(engine, GREEDY)
    engine.close()
    with gang(others, name, 2, quantization="int8", kv_dtype="int8") as engine:
        assert (engine.numerics.kv_dtype, engine.numerics.weights_dtype) == ("int8", "int8")
        got = together(engine, GREEDY)
        assert engine.capacity().kv_bytes_token == 4 * 2 * 4 * (16 + 4)
    assert tokens(got) == tokens(expected)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen2", {}),  # biases before the sums
        ("llama", {"attention_bias": True, "mlp_bias": True}),  # and after them
        ("qwen3", {"intermediate_size": 101}),  # parts of different sizes
        ("mistral", {}),
        ("gemma", {}),
        ("gemma2", {}),
        ("gemma3", {}),
    ],
)
def test_every_family_splits_right(others, name, changes):
    expected = one_process(name, GREEDY[:3], **changes)
    with gang(others, name, 2, changes=changes) as engine:
        got = together(engine, GREEDY[:3])
    assert tokens(got) == tokens(expected)
    for answer, wanted in zip(got, expected, strict=True):
        assert answer.logprobs == pytest.approx(wanted.logprobs, abs=1e-3)


def test_invariant_numbers_are_bit_equal_in_a_gang_of_four(others):
    with gang(others, "llama", 4, invariant=True) as engine:
        assert engine.numerics.reproducible
        single, batch = alone(engine, GREEDY[:3]), together(engine, GREEDY[:3])
    assert [(a.token_ids, a.logprobs) for a in single] == [(a.token_ids, a.logprobs) for a in batch]


@pytest.mark.parametrize(("rank", "call"), [(1, 1), (1, 4), (0, 4)])
def test_a_step_that_fails_on_one_rank_is_repeated_on_all(others, rank, call):
    expected = tokens(one_process("llama", GREEDY))
    with gang(others, "llama", 2, fail={rank: {"fail_at": call}}) as engine:
        assert tokens(together(engine, GREEDY)) == expected
        assert engine.events["oom_prefill"] + engine.events["oom_decode"] == 1
        assert engine.events["errors"] == 0
    with gang(others, "llama", 2, fail={rank: {"fail_at": call, "error": "RuntimeError"}}) as engine:
        assert tokens(together(engine, GREEDY)) == expected
        assert engine.events["errors"] == 1


def test_each_rank_records_an_out_of_memory_of_one(others, tmp_path):
    expected = tokens(one_process("llama", GREEDY))
    with gang(others, "llama", 2, fail={1: {"fail_at": 4}}, record=str(tmp_path)) as engine:
        assert tokens(together(engine, GREEDY)) == expected
        assert engine.events["oom_recorded"] == 1
    [mine, others_own] = sorted(tmp_path.iterdir())
    assert mine.name in ("rank0-prefill-1.json.gz", "rank0-decode-1.json.gz")
    assert others_own.name == "rank1-step-1.json.gz"
    for path in (mine, others_own):
        with gzip.open(path, "rt") as stream:
            assert any(event["name"] == "aten::linear" for event in json.load(stream)["traceEvents"])


def test_invariant_steps_fail_and_repeat_in_step(others):
    with gang(others, "llama", 2, invariant=True, fail={1: {"fail_at": 3}}) as engine:
        answers = tokens(together(engine, GREEDY[:2]))
        assert engine.events["oom_prefill"] + engine.events["oom_decode"] == 1
        assert tokens(alone(engine, GREEDY[:2])) == answers


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "size", "backend", "changes"), [
    ("llama", 2, "aot_eager", {}),
    ("qwen2", 4, "eager", {}),
    ("qwen3", 2, "eager", {"intermediate_size": 101}),  # parts of different sizes
    ("gemma3", 2, "eager", {}),
    pytest.param("llama", 2, "inductor", {}, marks=pytest.mark.slow),
])  # fmt: skip
def test_compiled_layers_of_a_gang_give_the_tokens_of_one_process(others, fresh_compiler, name, size, backend, changes):
    expected = tokens(one_process(name, GREEDY, **changes))
    with gang(others, name, size, changes=changes, backend=backend, max_prefill_tokens=13) as engine:
        assert engine.numerics.kernel == "sdpa+compiled"
        compiled = counters["stats"]["unique_graphs"]
        assert compiled > 0
        got = alone(engine, GREEDY), together(engine, GREEDY)
        # A rank that compiled in a step would let the others wait.
        assert counters["stats"]["unique_graphs"] == compiled
    assert [tokens(answers) for answers in got] == [expected, expected]


def test_sums_stand_in_the_graphs_of_the_layers(fresh_compiler):
    graphs = []

    def keep(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph.forward

    device = torch.device("cpu")
    seat = Gang(0, 1, device, ranks.free_port())
    model = ranks.shape("llama")
    split(model, 0, 1, device)
    kv = KVCache(kv_shapes(model.config), 2, PAGE, torch.float32, device)
    runner = ShardedRunner(model, kv, "sdpa", 8, 64, 64, gang=seat)
    summed = []
    seat.reduce = lambda part: summed.append(tuple(part.shape))
    assert runner.compile(keep)
    layers = [targets for targets in graphs if torch.ops.berth.attend in targets]
    assert layers
    for targets in layers:
        ours = [one for one in targets if one in (torch.ops.berth.attend, torch.ops.berth.add_up)]
        assert ours == [torch.ops.berth.attend, torch.ops.berth.add_up, torch.ops.berth.add_up]
    assert summed == []  # nobody need be there while a rank compiles
    runner.step([RowStep([1, 2, 3, 4, 5], 0, [0], True, Sampling())])
    assert summed == [(1, 5, 64)] * 2 * model.config.num_hidden_layers
    with torch.no_grad(), pytest.raises(RuntimeError, match="outside its runner's step"):
        model.base_model.layers[0].mlp.down_proj(torch.zeros(3, 128))
    seat.close()


@pytest.mark.parametrize(("rank", "call", "error"), [
    (1, 2, "MemoryError"),  # the first forward is the one that compiles
    (0, 5, "MemoryError"),
    (1, 5, "RuntimeError"),
])  # fmt: skip
def test_a_step_that_fails_in_a_compiled_layer_is_repeated_on_all(others, fresh_compiler, rank, call, error):
    expected = tokens(one_process("llama", GREEDY))
    fail = {rank: {"fail_at": call, "error": error}}
    with gang(others, "llama", 2, fail=fail, backend="eager") as engine:
        assert engine.numerics.kernel == "sdpa+compiled"
        assert tokens(together(engine, GREEDY)) == expected
        memory = engine.events["oom_prefill"] + engine.events["oom_decode"]
        assert (memory, engine.events["errors"]) == ((1, 0) if error == "MemoryError" else (0, 1))
        assert tokens(together(engine, GREEDY)) == expected


@pytest.mark.parametrize(("rank", "how"), [
    (0, {"backend": "no_such_compiler"}),
    (1, {"fail_at": 1, "error": "RuntimeError"}),
])  # fmt: skip
def test_layers_that_one_rank_cannot_compile_run_as_they_are_on_all(others, fresh_compiler, caplog, rank, how):
    expected = tokens(one_process("llama", GREEDY))
    with gang(others, "llama", 2, fail={rank: how}, backend="eager") as engine:
        assert engine.numerics.kernel == "sdpa"
        assert f"could not be compiled and run as they are: RankFailed: rank {rank}: " in caplog.text
        assert not engine._runner._runner.compiled
        assert tokens(together(engine, GREEDY)) == expected


def test_a_rank_may_compile_for_longer_than_the_deadline(others, fresh_compiler):
    with gang(others, "llama", 2, deadline_s=1.0, fail={1: {"backend": "slow"}}, backend="eager") as engine:
        assert engine.numerics.kernel == "sdpa+compiled"
        assert len(together(engine, GREEDY[:1])) == 1


def test_what_is_compiled():
    dense, experts = LlamaConfig(), Qwen3MoeConfig()
    for wanted, of_dense, of_experts in (("auto", True, False), ("on", True, True), ("off", False, False)):
        assert compiles(wanted, "triton", dense, 1) is compiles(wanted, "triton", dense, 4) is of_dense
        assert compiles(wanted, "flash_attn", experts, 1) is of_experts
        assert not compiles(wanted, "triton", experts, 2)
        assert not compiles(wanted, "sdpa", dense, 2)


def test_pool_and_graphs_change_on_all_ranks(others):
    expected = tokens(one_process("llama", GREEDY[:2]))
    with gang(others, "llama", 2) as engine:
        runner = engine._runner
        runner.drop_graphs()
        runner.drop_caches()
        runner.resize(60)
        assert runner._runner.kv.pages == 60
        assert tokens(together(engine, GREEDY[:2])) == expected


def test_an_idle_gang_lives_longer_than_its_deadline(others):
    with gang(others, "llama", 2, deadline_s=1.5) as engine:
        time.sleep(3.5)
        assert len(together(engine, GREEDY[:1])) == 1


LONG = Request(GREEDY[0].token_ids, "long", 200)


@contextmanager
def pair(seat, deadline_s=2.0):
    """Rank 0's engine of a gang whose rank 1 is going to be lost."""
    both = {"name": "llama", "size": 2, "port": ranks.free_port(), "options": SETTINGS, "deadline_s": deadline_s}
    seat.tell(rank=1, **both)
    engine = ranks.engine(rank=0, **both)
    try:
        yield engine
    finally:
        engine.close()


@pytest.mark.parametrize(("lost", "how"), [(3, signal.SIGKILL), (4, signal.SIGSTOP)])
def test_a_rank_lost_in_a_step_is_found_within_the_deadline(all_seats, monkeypatch, lost, how):
    monkeypatch.setattr(leader, "die", lambda error: pytest.fail("the engine's own thread can tell"))
    with pair(all_seats[lost]) as engine:
        future = engine.submit(LONG)
        time.sleep(0.1)
        started = time.monotonic()
        os.kill(all_seats[lost].pid, how)
        with pytest.raises(EngineDead, match="a rank of the gang is lost"):
            future.result(30)
        assert time.monotonic() - started < 6
        assert engine.dead
        with pytest.raises(EngineDead):
            engine.submit(LONG).result(30)


def test_a_rank_lost_while_nothing_runs_is_found_too(all_seats, monkeypatch):
    died = threading.Event()
    monkeypatch.setattr(leader, "die", lambda error: died.set())
    with pair(all_seats[5]) as engine:
        assert len(together(engine, GREEDY[:1])) == 1
        os.kill(all_seats[5].pid, signal.SIGSTOP)
        assert died.wait(10)


def test_rows_survive_the_wire():
    rows = [
        RowStep([5, 6, 7], 30, [4, 9, 2, 0, 0], False, Sampling()),
        RowStep([1], 0, [3], True, Sampling(temperature=1.0, seed=9), True),
        RowStep(list(range(9000)), 16, list(range(600)), True, Sampling()),
    ]
    back = unpack(pack(rows, PAGE), PAGE)
    for row, other in zip(rows, back, strict=True):
        used = -(-(row.start + len(row.token_ids)) // PAGE)
        assert (list(row.token_ids), row.start, row.sample) == (list(other.token_ids), other.start, other.sample)
        assert list(other.pages) == list(row.pages[:used])
        assert other.sampling.temperature == 0
    assert pack(rows, PAGE).dtype == np.int32


def test_the_sizes_that_divide_the_kv_heads_are_named():
    config = LlamaConfig(hidden_size=96, num_attention_heads=12, num_key_value_heads=6)
    assert tensor_parallel_sizes(config) == [1, 2, 3, 6]
    check_tensor_parallel(config, 3)
    with pytest.raises(UnsupportedModel, match=r"6 KV heads cannot be split evenly \(got 4\); wants 1 or 2 or 3 or 6"):
        check_tensor_parallel(config, 4)


def test_a_cut_that_is_not_known_is_refused():
    model = ranks.shape("llama")
    model.config.base_model_tp_plan = {"layers.*.self_attn.q_proj": "colwise_gather_output"}
    with pytest.raises(UnsupportedModel, match="colwise_gather_output"):
        split(model, 0, 2, torch.device("cpu"))
    model.config.base_model_tp_plan = None
    with pytest.raises(UnsupportedModel, match="no plan"):
        split(model, 0, 2, torch.device("cpu"))


def test_a_rank_wants_to_know_its_seat(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    ranks.shape("llama").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="WORLD_SIZE=2"):
        build(EngineSpec(str(tmp_path), device="cpu", tp=2))
