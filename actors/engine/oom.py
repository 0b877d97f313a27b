"""What counts as out of memory: one rule for loading, profiling, steps and the ranks of a gang.

Knows nothing of what is done about it. Imports no torch, which reading a config must not bring in.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from actors.errors import BerthError, OutOfMemory

# CUDA's own errors, those of cuBLAS and cuDNN, and the CPU allocator's have no class that says so.
_SAYS_SO = re.compile("out of memory|STATUS_ALLOC_FAILED|DefaultCPUAllocator: can't allocate")
# On a full device kernels that cuBLAS loads at their first use cannot be launched, which it does not explain.
_UNLAUNCHED = re.compile("CUBLAS_STATUS_(NOT_INITIALIZED|EXECUTION_FAILED|INTERNAL_ERROR)")


class RankFailed(RuntimeError):
    """Another rank failed, and not for memory: it has judged that itself, by a context that is not this process's."""


def device_works(device: Any = None) -> bool:
    """Whether the CUDA context has survived an error.

    Args:
        device: a torch device; None is the current one.
    """
    import torch

    if device is not None and torch.device(device).type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except (RuntimeError, AssertionError):  # the latter where torch was built without CUDA
        return False
    return True


def is_out_of_memory(error: BaseException, works: Callable[[], bool] = device_works) -> bool:
    """Whether `error` says that memory did not suffice, so that less of it may do.

    Args:
        works: whether the device still does; asked only after an error that may mean either.
    """
    if isinstance(error, BerthError | RankFailed):
        return isinstance(error, OutOfMemory)
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"OutOfMemoryError", "MemoryError"} or _SAYS_SO.search(str(error)):
        return True
    return bool(_UNLAUNCHED.search(str(error))) and works()
