import pytest

from actors.engine import attention, memory
from actors.errors import InputError
from pipeline.config import load_run
from pipeline.preflight import prepare
from tests.unit.test_config import ROOT
from tests.unit.test_suite import ROW, make

SHARDED = "pools={sharded: {tensor_parallel_size: %d}}"


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (
            [SHARDED % 2],
            r"pools\.sharded\.tensor_parallel_size: the model's 3 KV heads cannot be split .* \(got 2\); wants 1 or 3",
        ),
        (
            ["pools.single.tensor_parallel_size=4"],
            r"pools\.single\.tensor_parallel_size: .* \(got 4\); wants 1 or 3",
        ),
        ([SHARDED % 3, "engine=reference"], r"pools\.sharded\.tensor_parallel_size: .* \(got 3\); wants 1, or engine"),
        (["engine=no_such:build"], "engine: importing 'no_such' failed: ModuleNotFoundError"),
        (["engine=json:dmups"], "engine: json has no 'dmups'; did you mean `dumps`"),
        (["engine=:x"], "engine: importing '' failed"),
        (["pools={one: {}, two: {}}"], r"pools: .*'one': 1, 'two': 1.*wants another tensor_parallel_size for each"),
        (["fallback=[smaller_batch, kv_sparse]"], "fallback: not done yet .* wants half_precision, kv_fp8, kv_int8, "),
        (
            ["memory.kv_dtype=int8", "engine=reference"],
            "memory.kv_dtype: the reference engine .* wants auto, or",
        ),
    ],
)
def test_a_pool_that_cannot_run_is_refused(smollm2, sets, words):
    with pytest.raises(InputError, match=words):
        prepare(load_run(ROOT / "configs" / "quickstart.yaml", sets))


def test_a_size_that_divides_the_kv_heads_is_let_in(smollm2):
    prepared = prepare(load_run(ROOT / "configs" / "quickstart.yaml", [SHARDED % 3]))
    assert prepared.config.pools["sharded"].tensor_parallel_size == 3


def test_eight_bits_are_let_in(smollm2):
    sets = ["memory.kv_dtype=fp8", "model.quantization=int8", "fallback=[kv_int8, weights_int8]"]
    for engine in ("paged", "reference"):
        prepare(load_run(ROOT / "configs" / "quickstart.yaml", [*sets[engine == "reference" :], f"engine={engine}"]))


@pytest.mark.parametrize(
    ("sets", "refused"),
    [
        (["memory.kv_dtype=fp8"], "memory.kv_dtype"),
        (["fallback=[smaller_batch, kv_fp8]"], "fallback"),
        (["memory.kv_dtype=int8"], None),
        (["memory.kv_dtype=fp8", "model.dtype=float32"], None),
        (["memory.kv_dtype=fp8", "ray.address=auto"], None),
    ],
)
def test_fp8_is_refused_where_this_machines_gpu_cannot_read_it(smollm2, monkeypatch, sets, refused):
    config = load_run(ROOT / "configs" / "quickstart.yaml", sets)
    monkeypatch.setattr(attention, "installed", lambda: ["triton"])
    monkeypatch.setattr(memory, "local_devices", lambda: [memory.Device("NVIDIA L4", 22 << 30, (8, 9))])
    prepare(config)
    monkeypatch.setattr(memory, "local_devices", lambda: [memory.Device("NVIDIA A10G", 22 << 30, (8, 6))])
    if refused is None:
        prepare(config)
        return
    with pytest.raises(InputError, match=rf"{refused}: no attention .* on NVIDIA A10G .*wants int8, .*flash_attn or"):
        prepare(config)
    monkeypatch.setattr(attention, "installed", lambda: ["triton", "flash_attn"])
    prepare(config)


def test_two_pools_of_different_size_are_let_in(smollm2):
    pools = "pools={triple: {tensor_parallel_size: 3}, single: {}}"
    prepared = prepare(load_run(ROOT / "configs" / "quickstart.yaml", [pools, "fallback=memory_first"]))
    assert set(prepared.config.pools) == {"single", "triple"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scorers": ["exact_mach"]}, "suite.yaml: scorers: no such scorer"),
        ({"scorers": ["exact_match"], "primary": "f2"}, "suite.yaml: primary: no scorer gives this metric"),
    ],
)
def test_a_scorer_that_is_none_is_named_with_its_file(tmp_path, change, words):
    _, run = make(tmp_path, [ROW], change)
    with pytest.raises(InputError, match=words):
        prepare(run)
