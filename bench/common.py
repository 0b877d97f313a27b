"""What every benchmark needs: the device and its measured rates, versions, random models, tables, JSON.

A result file is `{"bench", "commit", "device", "versions", "workload", "results", "summary"}`; `write_json` makes it
appear whole or not at all. Models have random weights of a public shape: speed does not depend on what they say.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from actors.engine.attention import kernels_for, page_tokens_of
from actors.engine.paged import PagedEngine
from bench.scripted import made_up_word

# Qwen3-8B, -1.7B and -32B and Llama-3.1-70B as published; `small` for checks with a fp32 reference, `tiny` for a CPU.
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "1.7b": {
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 6144,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
    "32b": {
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 25600,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 28672,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "small": {
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 3072,
        "vocab_size": 32000,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "vocab_size": 2048,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    },
}
_PACKAGES = ("torch", "transformers", "flash-attn", "vllm", "triton")


# --- models


def model_config(shape: str) -> Any:
    """The config of a shape in `SHAPES`, a Qwen3 one where it does not say; without an eos token, so that nothing ends
    early. `.save_pretrained(folder)` makes a folder that `berth plan` reads."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    fields = {"model_type": "qwen3"} | SHAPES[shape]
    return AutoConfig.for_model(bos_token_id=None, eos_token_id=None, rope_parameters=rope, **fields)


def random_model(
    shape: str, *, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, attention: str = "sdpa", seed: int = 0
) -> Any:
    """A model of a shape with seeded random weights, made on its device: 8B takes about 12 s."""
    torch.manual_seed(seed)
    torch.set_default_device(device)
    try:
        return AutoModelForCausalLM.from_config(model_config(shape), dtype=dtype, attn_implementation=attention).eval()
    finally:
        torch.set_default_device(None)


def made_up_tokenizer(words: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: the 256 bytes, then made-up words, a token each with a blank; none ends a turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = alphabet + ["Ġ" + made_up_word(n) for n in range(words - len(alphabet))]
    tokenizer = Tokenizer(models.BPE({name: id for id, name in enumerate(names)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token that differs; None where they are equal."""
    if tuple(a) == tuple(b):
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def runner_of(engine: PagedEngine) -> Any:
    """The runner under an engine, to time it or to feed it by hand while the engine has nothing to do."""
    return engine._runner


def empty_cache() -> None:
    """Give unused memory back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- what it ran on


def default_device() -> str:
    """Cuda where there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _median_s(fn: Any, device: str, repeats: int = 10) -> float:
    """Median seconds of a call, after three that are not counted."""
    times: list[float] = []
    for repeat in range(repeats + 3):
        synchronize(device)
        if device.startswith("cuda"):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            fn()
            end.record()
            end.synchronize()
            seconds = start.elapsed_time(end) / 1e3
        else:
            begin = time.perf_counter()
            fn()
            seconds = time.perf_counter() - begin
        if repeat >= 3:
            times.append(seconds)
    return statistics.median(times)


def measured_rates(device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """Bytes a second of a large copy (read and written) and operations a second of a square matrix product.

    On random data: a product of zeros runs some 13 % faster than any real one.
    """
    cuda = device.startswith("cuda")
    size, side = (2 << 30, 8192) if cuda else (32 << 20, 512)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _median_s(partial(target.copy_, source), device)
    del source, target
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    product_s = _median_s(partial(torch.mm, a, b, out=out), device)
    del a, b, out
    empty_cache()
    return {"copy_bytes_s": 2 * size / copy_s, "matrix_flop_s": 2 * side**3 / product_s}


def device_info(device: str) -> dict[str, Any]:
    """Name, memory and cores of what runs the benchmark."""
    info: dict[str, Any] = {"type": torch.device(device).type, "cpu_cores": os.cpu_count()}
    if not device.startswith("cuda"):
        return info | {"name": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(device)
    info |= {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
    }
    try:
        import pynvml

        pynvml.nvmlInit()
        info["driver"] = pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # the driver's version is nice to have, and its library fails in many ways
        info["driver"] = None
    return info


def versions() -> dict[str, str | None]:
    """Versions of Python, CUDA and the libraries that matter; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str:
    """The commit that runs: $BERTH_COMMIT, else git's, with `-dirty` where files differ from it."""
    if given := os.environ.get("BERTH_COMMIT"):
        return given
    root = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(("git", *args), cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def rss_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# --- output


def workload_of(args: argparse.Namespace) -> dict[str, Any]:
    """What of a command line says what is measured."""
    return {key: value for key, value in vars(args).items() if key not in ("out", "device", "models")}


@contextmanager
def replicas_of(kind: type) -> Generator[None]:
    """Pools start replicas of this class; Serve and Ray end with the block."""
    import ray
    from ray import serve

    from pipeline import pools

    deployment = pools._deployment
    pools._deployment = lambda *a, **k: deployment(*a, **k).options(func_or_class=kind)
    try:
        yield
    finally:
        pools._deployment = deployment
        serve.shutdown()
        ray.shutdown()


def own_page_tokens(device: torch.device | str, dtype: torch.dtype) -> int:
    """Tokens of a page of an engine that is not told, by the fastest kernel there is."""
    return page_tokens_of(kernels_for(device, dtype)[0])


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows under the union of their keys."""
    table = Table(title=title, title_justify="left")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        numeric = all(isinstance(row.get(column), int | float | None) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    # In a log file a narrow default width would break every line.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def write_json(
    path: str | Path | None,
    bench: str,
    *,
    device: Mapping[str, Any],
    workload: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
) -> dict[str, Any]:
    """The result document; also written to `path` where there is one."""
    document = {
        "bench": bench,
        "commit": commit(),
        "device": dict(device),
        "versions": versions(),
        "workload": dict(workload),
        "results": list(results),
        "summary": dict(summary),
    }
    if path is not None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".tmp", delete=False) as f:
            json.dump(document, f, indent=1)
            f.write("\n")
        os.chmod(f.name, 0o644)
        os.replace(f.name, target)
        print(f"wrote {target}")
    return document
