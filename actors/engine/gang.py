"""The ranks of a tensor-parallel gang and how they talk: sums on the devices, commands and verdicts between the hosts.

All ranks lie on one node. Two groups: `reduce` runs on the devices (NCCL on CUDA, gloo on CPUs), everything else on a
gloo group between the hosts, where each operation has a deadline, so that a rank that is dead or stuck is an
`EngineDead` on the others and never a hang. Built on the groups themselves instead of torch's default group: a process
may belong to several gangs, and to a default group of somebody else's.

Knows nothing of models, steps or Ray.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Generator
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from actors.engine.oom import RankFailed, device_works, is_out_of_memory
from actors.errors import BerthError, EngineDead, InputError

START_S = 1800.0
"""How long ranks wait for each other while they load: the slowest disk decides."""
_STATUS_BYTES = 256
_FIRST_WORDS = 4096
_OUT_OF_MEMORY, _FAILED = 1, 2


class Gang:
    """One rank's seat in its gang. Each method is called by all ranks in the same order; not thread-safe.

    Args:
        rank: of this process; rank 0 also keeps the store by which the ranks find each other.
        size: ranks in all.
        device: where `reduce` is asked for.
        port: of rank 0's store.
        host: address of this node; `reduce` on CPUs and all commands use its interface.
        deadline_s: how long an operation may wait for the other ranks.

    Raises:
        EngineDead: the ranks do not find each other within START_S.
    """

    def __init__(
        self, rank: int, size: int, device: torch.device, port: int, host: str = "127.0.0.1", deadline_s: float = 60.0
    ):
        self.rank, self.size, self.device, self.deadline_s = rank, size, device, deadline_s
        # Sum in the order of the ranks, whatever the shape: slower, and the same bits for a row wherever it stands.
        self.ordered = False
        patience = timedelta(seconds=START_S)
        with _lost():
            self._store = self._open_store(host, port, patience)
            self._control: Any = self._gloo("control", host, patience)
            if device.type == "cuda":
                # NCCL would map the buffers of captured sums into the other ranks, and unmap them some time after the
                # graph is gone; by then `Runner.drop_graphs` has given their memory back.
                os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = timedelta(seconds=deadline_s)
                self._compute: Any = dist.ProcessGroupNCCL(
                    dist.PrefixStore("compute", self._store), rank, size, options
                )
            else:
                self._compute = self._gloo("compute", host, patience)

    @classmethod
    def join(cls, size: int, device: torch.device, deadline_s: float) -> Gang:
        """The gang that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name, as `torchrun` sets them.

        Raises:
            InputError: they are not set, or name another size.
            EngineDead: see the class.
        """
        env = os.environ
        if env.get("WORLD_SIZE") != str(size) or not {"RANK", "MASTER_PORT"} <= env.keys():
            raise InputError(
                "tensor parallelism runs one process a rank",
                field="tensor_parallel_size",
                got=size,
                wants=f"RANK, MASTER_PORT and WORLD_SIZE={size} in the environment, as torchrun sets them",
            )
        host = env.get("MASTER_ADDR", "127.0.0.1")
        return cls(int(env["RANK"]), size, device, int(env["MASTER_PORT"]), host, deadline_s)

    def reduce(self, part: Tensor) -> Tensor:
        """The sum of all ranks' `part`, in its place; the same bits on every rank."""
        if self.ordered:
            parts = [torch.empty_like(part) for _ in range(self.size)]
            with _lost():
                self._compute.allgather([parts], [part]).wait()
            part.copy_(parts[0])
            for other in parts[1:]:
                part.add_(other)
            return part
        with _lost():
            work = self._compute.allreduce([part], self._options(dist.AllreduceOptions(), self.deadline_s))
            if work is not None:
                work.wait()
        return part

    def agree(self, failure: Exception | None = None, timeout_s: float | None = None) -> None:
        """Tell the others whether this rank's last work failed, and hear of theirs. Returns if no rank's did.

        Raises:
            torch.OutOfMemoryError: a rank ran out of memory, and none failed otherwise.
            RankFailed: a rank failed otherwise; the text says which, and how.
            BerthError: this rank's own failure, where it is one.
            EngineDead: a rank did not answer in time.
        """
        if isinstance(failure, EngineDead):
            raise failure
        status = torch.zeros(self.size, _STATUS_BYTES, dtype=torch.uint8)
        if failure is not None:
            said = f"{type(failure).__name__}: {failure}".encode()[: _STATUS_BYTES - 1]
            oom = is_out_of_memory(failure, partial(device_works, self.device))
            status[self.rank, 0] = _OUT_OF_MEMORY if oom else _FAILED
            status[self.rank, 1 : 1 + len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        self._exchange(status, dist.ReduceOp.MAX, timeout_s)
        worst = int(status[:, 0].max())
        if not worst:
            return
        if isinstance(failure, BerthError):
            raise failure
        texts = [
            f"rank {rank}: {bytes(line[1:].tolist()).rstrip(bytes(1)).decode(errors='replace')}"
            for rank, line in enumerate(status)
            if line[0] == worst
        ]
        raise (torch.OutOfMemoryError if worst == _OUT_OF_MEMORY else RankFailed)("; ".join(texts)) from failure

    @contextlib.contextmanager
    def agreed(self, timeout_s: float | None = None) -> Generator[None]:
        """Work that counts only where all ranks did it; raises as `agree` does."""
        failure: Exception | None = None
        try:
            yield
        except Exception as e:
            failure = e.with_traceback(None)  # its frames hold tensors
        self.agree(failure, timeout_s)

    def smallest(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        found = torch.tensor([number], dtype=torch.int64)
        self._exchange(found, dist.ReduceOp.MIN, None)
        return int(found)

    def send(self, words: Tensor) -> None:
        """Rank 0: hand a flat int32 tensor to the others' `receive`."""
        first = torch.zeros(_FIRST_WORDS, dtype=torch.int32)
        here = words[: _FIRST_WORDS - 1]
        first[0] = len(words)
        first[1 : 1 + len(here)] = here
        self._broadcast(first, self.deadline_s)
        if len(here) < len(words):
            self._broadcast(words[len(here) :].contiguous(), self.deadline_s)

    def receive(self) -> Tensor:
        """Other ranks: what rank 0 sends next. It sends something well within its deadline, if only a sign of life."""
        first = torch.zeros(_FIRST_WORDS, dtype=torch.int32)
        self._broadcast(first, 2 * self.deadline_s)
        words = torch.empty(int(first[0]), dtype=torch.int32)
        here = words[: _FIRST_WORDS - 1]
        here.copy_(first[1 : 1 + len(here)])
        if len(here) < len(words):
            self._broadcast(words[len(here) :], self.deadline_s)
        return words

    def close(self) -> None:
        """Leave; the other ranks' next operation fails."""
        for group in (self._compute, self._control):
            group.shutdown()

    def _exchange(self, numbers: Tensor, op: Any, timeout_s: float | None) -> None:
        options = self._options(dist.AllreduceOptions(), timeout_s or self.deadline_s)
        options.reduceOp = op
        with _lost():
            self._control.allreduce([numbers], options).wait()

    def _broadcast(self, words: Tensor, timeout_s: float) -> None:
        with _lost():
            self._control.broadcast([words], self._options(dist.BroadcastOptions(), timeout_s)).wait()

    def _open_store(self, host: str, port: int, patience: timedelta) -> dist.TCPStore:
        if self.rank:
            return dist.TCPStore(host, port, self.size, False, patience, wait_for_workers=False)
        # Left to itself the store listens on every interface, for anybody.
        with socket.create_server((host, port)) as listener:
            fd = listener.detach()
        return dist.TCPStore(host, port, self.size, True, patience, wait_for_workers=False, master_listen_fd=fd)

    @staticmethod
    def _options(options: Any, timeout_s: float) -> Any:
        options.timeout = timedelta(seconds=timeout_s)
        options.asyncOp = False
        return options

    def _gloo(self, name: str, host: str, patience: timedelta) -> Any:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=host)]
        options._timeout = patience
        return gloo(dist.PrefixStore(name, self._store), self.rank, self.size, options)


@contextlib.contextmanager
def _lost() -> Generator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, OSError) as e:
        raise EngineDead(f"a rank of the gang is lost: {str(e).partition('. This is')[0]}") from e
