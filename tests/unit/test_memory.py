"""The memory model against published sizes, real steps on the CPU, and what was measured on GPUs."""

import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig

from actors.engine import assemble, memory
from actors.engine.attention import page_tokens_of
from actors.engine.bounds import Bounds
from actors.engine.kv import KVCache, kv_shapes
from actors.engine.protocol import EngineSpec, Memory, MemoryReport, RowStep
from actors.engine.runner import Runner
from actors.messages import Sampling
from bench import engine_gpu
from bench.common import model_config
from tests.unit.test_runner import CONFIGS

RESULTS = Path(__file__).parents[2] / "bench" / "results"
MIB = 1 << 20
BF16 = torch.bfloat16
SIZES = {"dtype": BF16, "max_prefill_tokens": 8192, "max_batch": 256, "max_model_len": 4096}


def moe_30b():
    """Qwen3-30B-A3B."""
    return Qwen3MoeConfig(
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        vocab_size=151936,
        tie_word_embeddings=False,
    )


def smollm2_135m():
    return AutoConfig.for_model(
        "llama",
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def changed(config, **fields):
    return type(config)(**config.to_dict() | fields)


# --- parameters


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (model_config("8b"), 8_190_735_360),
        (model_config("1.7b"), 1_720_574_976),
        (model_config("32b"), 32_762_123_264),
        (model_config("70b"), 70_553_706_496),
        (moe_30b(), 30_532_122_624),
        (smollm2_135m(), 134_515_008),
    ],
    ids=["Qwen3-8B", "Qwen3-1.7B", "Qwen3-32B", "Llama-3.1-70B", "Qwen3-30B-A3B", "SmolLM2-135M"],
)
def test_published_counts(config, published):
    assert memory.parameters(config).total == published
    assert memory.weights_bytes(config, BF16) == 2 * published
    assert memory.weights_bytes(config, torch.float32) == 4 * published


def test_parts_of_the_parameters():
    dense, moe = memory.parameters(model_config("8b")), memory.parameters(moe_30b())
    assert dense.active == dense.total - dense.embedding - dense.head
    assert dense.read == dense.total - dense.embedding
    assert moe.experts == 48 * 128 * 3 * 2048 * 768
    # 3.3 B are active a token (its name says 3 B), embedding and head included.
    assert moe.active + moe.embedding + moe.head == pytest.approx(3.35e9, rel=0.01)
    tied = memory.parameters(model_config("1.7b"))
    untied = memory.parameters(changed(model_config("1.7b"), tie_word_embeddings=False))
    assert tied.total == tied.read == untied.total - untied.embedding


def test_tensor_parallel_keeps_norms_embedding_and_head_whole():
    config = model_config("8b")
    whole = 36 * (2 * 4096 + 2 * 128) + 4096 + 2 * 151_936 * 4096
    split = memory.parameters(config).total - whole
    for tp in (2, 4, 8):
        assert memory.weights_bytes(config, BF16, tp=tp) == 2 * (split // tp + whole)


def test_tensor_parallel_adds_a_row_bias_once():
    config = changed(CONFIGS["llama"](), attention_bias=True)
    plain = changed(config, attention_bias=False)
    more = [memory.weights_bytes(config, BF16, tp=tp) - memory.weights_bytes(plain, BF16, tp=tp) for tp in (1, 2)]
    # Of 4 layers: q 64, k 32, v 32 are split, o 64 is not.
    assert more == [2 * 4 * (128 + 64), 2 * 4 * (128 // 2 + 64)]


def test_int8_is_for_the_layers_alone():
    config = model_config("8b")
    found = memory.parameters(config)
    rows = 36 * (4096 + 2 * 1024 + 4096 + 2 * 12288 + 4096)
    norms = 36 * (2 * 4096 + 2 * 128) + 4096
    linear = found.active - norms
    kept = found.embedding + found.head + norms
    assert memory.weights_bytes(config, BF16, "int8") == linear + 2 * rows + 2 * kept


# --- KV


def test_kv_bytes():
    config = model_config("8b")
    assert memory.kv_token_bytes(config, BF16) == 2 * 36 * 8 * 128 * 2 == 147_456
    assert memory.kv_token_bytes(config, BF16, "int8") == memory.kv_token_bytes(config, BF16, "fp8")
    assert memory.kv_token_bytes(config, BF16, "int8") == 2 * 36 * 8 * (128 + 4)
    assert memory.kv_token_bytes(config, torch.float32) == 2 * 147_456
    assert memory.kv_token_bytes(config, BF16, tp=8) == 147_456 // 8
    assert memory.kv_token_bytes(changed(config, num_key_value_heads=1), BF16) == 147_456 // 8
    assert memory.kv_token_bytes(changed(config, num_key_value_heads=32), BF16) == 4 * 147_456
    with pytest.raises(ValueError, match="3 KV heads"):
        memory.kv_token_bytes(smollm2_135m(), BF16, tp=2)


@pytest.mark.parametrize(("config", "dtype", "least"), [("8b", BF16, 1.94), ("8b", torch.float32, 3.46)])
def test_a_pool_in_8_bits_holds_so_many_more_tokens(config, dtype, least):
    """The copy that a step makes of a layer is counted where the kernels want one."""
    sizes = {"dtype": dtype, "max_prefill_tokens": 8192, "max_batch": 256, "max_model_len": 40_960, "graphs": False}
    full, small = (
        memory.predict(model_config(config), **sizes, kv_dtype=kv_dtype, device_bytes=80 << 30)
        for kv_dtype in ("auto", "int8")
    )
    held = [
        pool.pool_bytes / memory.kv_token_bytes(model_config(config), dtype, kv_dtype)
        for pool, kv_dtype in ((full, "auto"), (small, "int8"))
    ]
    assert full.fixed_bytes - full.slack_bytes == small.fixed_bytes - small.slack_bytes
    # Behind each of its tensors less than 2 MiB are left.
    assert abs(full.slack_bytes - small.slack_bytes) < 2 * MIB * 4 * model_config(config).num_hidden_layers
    assert held[1] / held[0] == pytest.approx(least, rel=0.02)


def test_a_kernel_that_copies_quantised_kv_leaves_room_for_it_and_has_no_graphs():
    sizes = SIZES | {"max_model_len": 40_960, "kv_dtype": "fp8", "device_bytes": 80 << 30}
    triton, flash = (memory.predict(model_config("8b"), **sizes, kernel=one) for one in ("triton", "flash_attn"))
    assert flash.graph_bytes == 0 < triton.graph_bytes
    page, copy = memory.kv_token_bytes(model_config("8b"), BF16, "fp8"), 8 * (128 * (2 * 2 + 1) + 4)
    room = triton.pool_bytes + triton.graph_bytes + triton.slack_bytes - flash.slack_bytes
    assert flash.pool_bytes == pytest.approx(room * page / (page + copy), abs=2 * 256 * page)


def test_a_sliding_window_saves_no_page():
    sliding = CONFIGS["gemma3"]()
    assert "sliding_attention" in sliding.layer_types
    assert memory.kv_token_bytes(sliding, BF16) == 2 * 4 * 2 * 16 * 2


# --- activations


def test_dense_activations_are_the_formula():
    for shape in ("8b", "1.7b", "32b", "70b"):
        config = model_config(shape)
        numbers = 4 * config.hidden_size + 3 * config.intermediate_size + 2 * config.head_dim
        assert memory.activation_bytes(config, BF16, 8192) == 2 * 8192 * numbers
        assert memory.activation_bytes(config, torch.float32, 100) == 4 * 100 * numbers


def test_moe_activations_are_four_copies_of_the_routed_tokens():
    numbers = 4 * 2048 + 4 * 8 * 2048
    assert memory.activation_bytes(moe_30b(), BF16, 8192) == pytest.approx(2 * 8192 * numbers, rel=0.01)


@pytest.mark.parametrize("name", CONFIGS)
def test_activations_are_those_of_a_real_step(name):
    config = CONFIGS[name]()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    kv = KVCache(kv_shapes(config), 2, 512, torch.float32, "cpu")
    runner = Runner(model, kv, "reference" if name == "gemma2" else "sdpa", 1, 512, 512)
    row = RowStep([3] * 512, 0, [1], False, Sampling())
    found = memory.live_peak_bytes(lambda: runner.step([row]))
    assert memory.activation_bytes(config, torch.float32, 512) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize(("name", "rows"), [("llama", 64), ("gemma2", 64), ("gemma2", 512)])
def test_logits_are_those_of_a_real_draw(name, rows):
    """Without the workspace of CUDA's sort, which a CPU does not take; 512 rows with a soft cap peak before drawing."""
    config = changed(CONFIGS[name](), vocab_size=20_000)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    kernel = "reference" if name == "gemma2" else "sdpa"
    runner = Runner(model, KVCache(kv_shapes(config), 2, 16, torch.float32, "cpu"), kernel, rows, rows, 16)
    steps = [RowStep([3], 0, [1], True, Sampling(1.0, 0.9, 50), True) for _ in range(rows)]
    found = memory.live_peak_bytes(lambda: runner.step(steps))
    sort = 0 if (name, rows) == ("gemma2", 512) else memory.SORT_BYTES * 16 * 20_000
    assert memory.logits_bytes(config, torch.float32, rows) - sort == pytest.approx(found, rel=0.05)


# --- the whole


def test_the_replay_on_an_h100():
    """Peak of what torch allocated, 70 GiB with the pool, and the size of the pool itself."""
    document = json.loads((RESULTS / "react_replay_8b.json").read_text())
    settings = document["summary"]["256"]["berth"]["settings"]
    config = model_config("8b")
    found = memory.predict(
        config,
        dtype=BF16,
        max_prefill_tokens=settings["max_prefill_tokens"],
        max_batch=settings["max_batch"],
        max_model_len=3584,
        device_bytes=int(document["device"]["memory_gib"] * 2**30),
    )
    pool = settings["pages"] * settings["page_tokens"] * memory.kv_token_bytes(config, BF16)
    allocated = found.weights_bytes + found.workspace_bytes + found.graph_bytes + found.activation_bytes
    peak = document["results"][0]["peak_bytes"]
    # Compiled layers keep one tensor of the MLP less alive than is counted: 192 MiB, 1.2 %.
    assert allocated == pytest.approx(peak - pool, rel=0.015)
    assert found.pool_bytes == pytest.approx(pool, rel=0.01)


def test_the_allocators_rests():
    """Two of 8 MiB in a segment of 20; a third and one of 4 fill two rests; 11 MiB take 12, whose rest is too small."""
    assert memory.unused_bytes([8 * MIB, 8 * MIB]) == 4 * MIB
    assert memory.unused_bytes([8 * MIB, 8 * MIB, 4 * MIB]) == 0
    assert memory.unused_bytes([11 * MIB, MIB]) == (1 + 1) * MIB
    assert memory.unused_bytes([100 * MIB + 1, MIB + 1]) == MIB - 2
    assert memory.unused_bytes([1, 513]) == 2 * MIB - 514


def test_the_rests_behind_the_weights_of_an_8b_on_an_h100():
    """Keys and values have 8 MiB a layer each: 4 MiB are left of every segment. Joined with queries they leave less."""
    document = json.loads((RESULTS / "react_replay_8b_unfused.json").read_text())
    said = document["summary"]["256"]["berth"]["settings"]["memory"]
    found = int(re.search(r"slack \d+ → (\d+)", said)[1]) * MIB
    sizes = memory._weight_sizes(model_config("8b"), BF16, None, 1)
    assert memory.unused_bytes(sizes) == pytest.approx(found, abs=2 * MIB)


def test_an_idle_engine_on_an_h100():
    """SmolLM2-135M in bf16, 256 pages, graphs up to 64 rows: what stays allocated between steps."""
    document = json.loads((RESULTS / "engine_gpu_c.json").read_text())
    config = smollm2_135m()
    pool = document["workload"]["pages"] * page_tokens_of("triton") * memory.kv_token_bytes(config, BF16)
    found = memory.predict(config, **SIZES | {"max_batch": 64, "max_model_len": engine_gpu.MAX_MODEL_LEN})
    idle = document["results"][0]["points"][-1]["allocated_mib"] * MIB
    # The graphs' own pool of memory is free between replays.
    held = found.weights_bytes + found.workspace_bytes + found.graph_bytes
    assert held == pytest.approx(idle - pool, rel=0.03)


def test_a_prefill_step_on_an_h100():
    """SmolLM2-135M in fp32: 8,192 tokens, and the workspace of the engine's thread."""
    document = json.loads((RESULTS / "engine_gpu_bd.json").read_text())
    step = memory.activation_bytes(smollm2_135m(), torch.float32, 8192) + memory.CUBLAS_BYTES[True]
    assert step == pytest.approx(document["results"][0]["step_mib"] * MIB, rel=0.01)


def test_components_grow_with_what_they_depend_on():
    config = model_config("8b")
    base = memory.predict(config, **SIZES)
    wider = memory.predict(config, **SIZES | {"max_prefill_tokens": 16384})
    fuller = memory.predict(config, **SIZES | {"max_batch": 512})
    longer = memory.predict(config, **SIZES | {"max_model_len": 32768})
    assert wider.activation_bytes == 2 * base.activation_bytes
    assert fuller.logits_bytes > base.logits_bytes
    assert fuller.graph_bytes > longer.graph_bytes > base.graph_bytes
    for tp in (2, 4, 8):
        part = memory.predict(config, **SIZES, tp=tp)
        assert base.weights_bytes / tp < part.weights_bytes < base.weights_bytes / (tp - 1) + (3 << 30)
        assert part.activation_bytes < base.activation_bytes
    assert memory.predict(config, **SIZES, hopper=False).graph_bytes < base.graph_bytes
    assert memory.predict(config, **SIZES, graphs=False).graph_bytes == 0
    cpu = memory.predict(config, **SIZES, cuda=False)
    assert cpu.total_bytes == cpu.weights_bytes + cpu.step_bytes


def test_the_pool_is_what_the_budget_leaves():
    config = model_config("8b")
    page = 128 * memory.kv_token_bytes(config, BF16)
    for fraction in (0.5, 0.9):
        found = memory.predict(config, **SIZES, device_bytes=80 << 30, budget_fraction=fraction)
        assert found.pool_bytes % page == 0
        # The last page may have had no room for what is left behind its 72 tensors.
        assert 0 <= fraction * (80 << 30) - found.total_bytes < page + 72 * 2 * MIB
    halved = memory.predict(config, **SIZES, device_bytes=80 << 30, gpu_memory_fraction=0.5)
    assert halved.pool_bytes == memory.predict(config, **SIZES, device_bytes=40 << 30).pool_bytes
    assert memory.predict(config, **SIZES, device_bytes=16 << 30).pool_bytes == 0
    few = memory.predict(config, **SIZES | {"max_batch": 2}, device_bytes=80 << 30)
    assert few.pool_bytes == (2 * 4096 // 128 + 1) * page  # a full batch of the longest needs no more


def test_an_engine_keeps_its_report():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"](), dtype=torch.float32).eval()
    engine = assemble.over_model(model, page_tokens=16, pages=9, max_batch=4, max_prefill_tokens=64)
    engine.close()
    report = engine.memory
    assert report.predicted.weights_bytes == report.measured["weights_bytes"]
    assert report.measured["pool_bytes"] == 9 * 16 * engine.capacity().kv_bytes_token
    assert report.device_used_bytes is None
    assert str(report).startswith("weights ")


def gpu_of_numbers(monkeypatch, free=60_000 * MIB, own=16_000 * MIB):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80_000 * MIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: own)
    return types.SimpleNamespace(
        device=torch.device("cuda"), bytes_page=10 * MIB, page_tokens=16, shapes=[(1, 5 << 15)], stored=BF16
    )


def test_the_pool_is_sized_by_the_measurement(monkeypatch):
    """On a GPU: measured step, predicted graphs and slack; here with a device made of numbers."""
    kv = gpu_of_numbers(monkeypatch)
    predicted = Memory(0, 1, 1, 64 * MIB, 900 * MIB, 0, 100 * MIB)
    measured = {"activation_bytes": 936 * MIB, "logits_bytes": 200 * MIB}
    # 60,000 free, 8,000 of them beyond the budget; less 936, 900, 64 of steps' slack, and 32 for the engine's thread.
    room = 52_000 - 936 - 900 - 64 - 32
    assert assemble._room(kv, predicted, measured, 0.9, 1.0, 1) // MIB == room
    bounds = types.SimpleNamespace(measured=measured, max_batch=4, relax=lambda *sizes: False)
    # Keys and values of a page take 5 MiB each: an odd number of pages leaves a MiB behind either tensor.
    for less, pages in (
        (0, room // 10),
        (room % 20 - 11, room // 20 * 2 + 1 - 1),
        (room % 20 - 12, room // 20 * 2 + 1),
    ):
        kv = gpu_of_numbers(monkeypatch, free=(60_000 - less) * MIB)
        assert assemble._fit(kv, kv.bytes_page, lambda: predicted, bounds, 0.9, 1.0, 1 << 20, None) == pages
    kv = gpu_of_numbers(monkeypatch)
    assert assemble._fit(kv, 12 * MIB, lambda: predicted, bounds, 0.9, 1.0, 1 << 20, None) == room // 12
    assert assemble._fit(kv, kv.bytes_page, lambda: predicted, bounds, 0.9, 1.0, 32, None) == 4 * 2 + 1
    with pytest.raises(assemble.OutOfMemory, match="no room for KV"):
        assemble._fit(kv, kv.bytes_page, lambda: predicted, bounds, 0.2, 1.0, 32, None)


def test_under_a_cap_the_rest_of_the_gpu_may_be_held_by_others(monkeypatch):
    kv = gpu_of_numbers(monkeypatch, free=30_000 * MIB, own=2_000 * MIB)
    context = Memory(0, 0, 0, 0, 0, 700 * MIB, 0)
    measured = {"activation_bytes": 0, "logits_bytes": 0}
    assert assemble._room(kv, context, measured, 0.9, 0.1, 1) // MIB == 0.9 * 8_000 - 2_000 - 700 - 64
    assert assemble._room(kv, context, measured, 0.9, 1.0, 1) // MIB == 30_000 - 8_000 - 64


@pytest.mark.parametrize("seconds", [0.0, 2.0, 1e9])
def test_an_engine_waits_for_the_process_that_had_its_gpu_and_not_for_ever(seconds, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(assemble.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    assemble.wait_for_memory(lambda: 70 << 30 if now[0] >= seconds else 5 << 30, 60 << 30, lambda: now[0])
    assert now[0] == pytest.approx(min(seconds, assemble.LEAVING_S), abs=0.5)
    assert ("5.00 GiB are free, the budget is 60.00 GiB" in caplog.text) is (seconds > assemble.LEAVING_S)


class Steps:
    """A runner on a GPU of which a step may take `most` bytes: a MiB a token of prefill, 4 a row of the batch."""

    def __init__(self, most, prefill=512, batch=64):
        self.most, self.max_prefill_tokens, self.max_batch = most, prefill, batch
        self.kv = types.SimpleNamespace(device=torch.device("cuda"))

    def profile(self, max_prefill_tokens=None, max_batch=None):
        prefill = self.max_prefill_tokens if max_prefill_tokens is None else max_prefill_tokens
        batch = self.max_batch if max_batch is None else max_batch
        taken = max(prefill, 4 * batch) * MIB
        if taken > self.most:
            raise torch.OutOfMemoryError(f"tried to allocate {taken} bytes")
        return taken


@pytest.fixture
def no_gpu(monkeypatch):
    for name in ("memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.parametrize(
    ("most_mib", "bounds", "events"),
    [
        (512, (512, 64), {}),
        (511, (256, 64), {"oom_prefill": 1, "prefill_halved": 1}),
        (100, (64, 16), {"oom_prefill": 3, "prefill_halved": 3, "oom_decode": 2, "batch_halved": 2}),
    ],
)
def test_a_step_that_does_not_fit_at_the_start_is_made_smaller(no_gpu, most_mib, bounds, events):
    runner = Steps(most_mib * MIB)
    found = Bounds(runner)
    found.measure(0)
    assert (runner.max_prefill_tokens, runner.max_batch) == bounds
    assert found.events == events
    assert found.measured["activation_bytes"] == bounds[0] * MIB
    assert found.measured["logits_bytes"] == 4 * bounds[1] * MIB


def test_a_step_that_never_fits_is_out_of_memory(no_gpu):
    with pytest.raises(assemble.OutOfMemory, match="max_prefill_tokens 64 does not fit") as caught:
        Bounds(Steps(63 * MIB)).measure(0)
    assert caught.value.stage == "load"


def test_ranks_come_to_the_same_bounds(no_gpu):
    """The other rank's prefill takes more than this one's, which its own numbers do not show."""
    runner = Steps(512 * MIB, prefill=128, batch=64)
    found = Bounds(runner, types.SimpleNamespace(smallest=lambda mine: min(mine, -300 * MIB)))
    found.measure(0)
    assert not found.relax(300 * MIB, 10 * MIB, 1000 * MIB)
    assert found.relax(299 * MIB, 10 * MIB, 1000 * MIB)
    assert (runner.max_prefill_tokens, runner.max_batch) == (64, 64)


def test_steps_leave_room_for_the_pool(no_gpu):
    """Of 400 MiB for both: a page takes 10, the longest sequence 200."""
    runner = Steps(512 * MIB, prefill=400, batch=40)
    found = Bounds(runner)
    found.measure(0)

    def left():
        return 400 * MIB - max(found.measured["activation_bytes"], found.measured["logits_bytes"])

    while found.relax(left(), 10 * MIB, 200 * MIB):
        pass
    assert (runner.max_prefill_tokens, runner.max_batch) == (200, 40)
    assert not found.relax(left(), 10 * MIB, 1000 * MIB)  # as much as a step takes
    assert found.relax(10 * MIB, 10 * MIB, 10 * MIB)  # no page beside the scratch page
    while found.relax(0, 10 * MIB, 10 * MIB):
        pass
    assert (runner.max_prefill_tokens, runner.max_batch) == (64, 1)


def test_weights_that_no_gpu_has_room_for_are_refused_unread():
    spec = EngineSpec("a-70b", tp=2)
    assemble.check_weights(10 << 30, 10 << 30, spec)
    with pytest.raises(assemble.OutOfMemory, match="on each of 2 GPUs") as caught:
        assemble.check_weights(65 << 30, 22 << 30, spec)
    assert str(caught.value).endswith("take 65.00 GiB on each of 2 GPUs, the budget is 22.00 GiB")
    assert (caught.value.stage, caught.value.needed_bytes, caught.value.free_bytes) == ("load", 130 << 30, 44 << 30)


def test_the_largest_steps_come_first_and_may_fail(no_gpu, monkeypatch, caplog):
    """Behind the KV pool another process may have taken what they want; the engine knows how to go on."""
    dropped = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: dropped.append(1))
    Bounds(Steps(512 * MIB)).settle()
    assert dropped == []
    Bounds(Steps(100 * MIB)).settle()
    assert dropped == [1]
    assert "the largest steps do not fit behind the KV pool: tried to allocate" in caplog.text
    with pytest.raises(AttributeError):  # not a matter of memory
        Bounds(types.SimpleNamespace()).settle()


class FakeRunner:
    """A runner whose steps allocate what a test says, on a device made of numbers."""

    def __init__(self):
        self.kv = types.SimpleNamespace(device=torch.device("cuda"))
        self.allocated = 1000
        self.asked = []

    def profile(self, max_prefill_tokens=None, max_batch=None):
        self.asked.append((max_prefill_tokens, max_batch))
        if len(self.asked) == 1:
            self.allocated += 32  # the workspace stays
        return {(None, 1): 800, (1, None): 200}.get((max_prefill_tokens, max_batch), 1)


def test_profile_steps_are_told_apart(monkeypatch):
    runner = FakeRunner()
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: runner.allocated)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1100)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8000, 10_000))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    bounds = Bounds(runner)
    bounds.measure(1000)
    assert bounds.measured == {
        "activation_bytes": 800,
        "logits_bytes": 200,
        "workspace_bytes": 32,
        "context_bytes": 900,
        "slack_bytes": 68,
    }
    assert runner.asked[0] == (1, 1)


# --- the device


class FakeNvml:
    """Stands in for pynvml on a machine without a GPU."""

    class NVMLError(Exception):
        pass

    def __init__(self, hidden=False, broken=False):
        self.hidden, self.broken = hidden, broken

    def nvmlInit(self):
        if self.broken:
            raise self.NVMLError("driver not loaded")

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-1234"
        if self.hidden:
            raise self.NVMLError("not found")
        return 0

    def nvmlDeviceGetName(self, handle):
        return "NVIDIA H200"

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return [9, 0]

    nvmlMemory_v2 = 2

    def nvmlDeviceGetMemoryInfo(self, handle, version=None):
        if version is None:  # counts as used what is reserved
            return types.SimpleNamespace(total=141 << 30, free=135 << 30, used=6 << 30)
        return types.SimpleNamespace(total=141 << 30, free=135 << 30, reserved=1 << 30, used=5 << 30)


def test_what_the_device_holds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1234"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 10 << 30))
    for nvml, wanted in ((FakeNvml(), 5), (FakeNvml(hidden=True), 7), (FakeNvml(broken=True), 7)):
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        assert memory.device_used_bytes(torch.device("cuda")) == wanted << 30


def test_local_devices(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    assert memory.local_devices() == [memory.Device("NVIDIA H200", 141 << 30, (9, 0))] * 2
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(broken=True))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert memory.local_devices() == []


def test_a_report_in_words():
    report = MemoryReport(Memory(3 * MIB, 2 * MIB, 1 * MIB, 0, 0, 0, 0, 8 * MIB), {"weights_bytes": 4 * MIB})
    assert str(report) == "weights 3 → 4"
    assert (report.predicted.step_bytes, report.predicted.fixed_bytes) == (2 * MIB, 5 * MIB)
    assert report.predicted.total_bytes == 13 * MIB
