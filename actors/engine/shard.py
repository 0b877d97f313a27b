"""One rank's part of a model, and the runner of it: tensor parallelism after Megatron-LM (Shoeybi et al. 2019, §3).

Which weights are cut, and how, stands in the model's own `base_model_tp_plan` (transformers). Heads and MLP columns lie
on different ranks; attention and MLP each end in a partial sum, which is added up over the gang. Embeddings, norms,
routers and the output layer are whole on every rank; experts are cut inside, like an MLP. Unlike transformers' own
tensor parallelism the weights are plain tensors: no DTensor dispatch, and CUDA graphs see nothing new.

The sum is an operator, `berth::add_up`, so that layers compile in one piece with it. As with attention, what belongs to
the gang is not among its arguments: it is done by the runner whose forward goes on on this thread.

A rank that fails within a forward would leave the others waiting in the next sum. So it goes on taking part, with
zeros, and after the step all ranks agree that it failed and can be repeated. Layers are compiled without any sum, each
rank by itself: one may take minutes longer than another, or fail, and nobody waits within a step.

Knows nothing of scheduling, of commands between ranks or of Ray. Shapes: T tokens, E hidden size.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Generator, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from actors.engine.gang import START_S, Gang
from actors.engine.int8 import Int8Linear
from actors.engine.protocol import RowStep
from actors.engine.runner import Runner
from actors.errors import UnsupportedModel

_CUT = {"colwise": 0, "rowwise": -1, "packed_colwise": -2}
_WHOLE = {"replicated_with_grad_allreduce", "moe_tp_experts"}

P = ParamSpec("P")
T = TypeVar("T")


def split(model: Any, rank: int, size: int, device: torch.device, quantization: str | None = None) -> None:
    """Cut the model's weights down to one rank's part, and move all of it to `device`.

    Weights may lie on the host, mapped from files: only the parts are copied.

    Args:
        quantization: int8 quantises each linear layer whole, on the device, before it is cut: the ranks' parts are then
            those of the model on one GPU.

    Raises:
        UnsupportedModel: the model has no plan, or one with a kind of cut that is not done.
    """
    body = model.base_model
    for name, module, style in list(_planned(model)):
        if quantization == "int8" and isinstance(module, nn.Linear):  # plans name all of them
            module = Int8Linear(module, device)
            body.set_submodule(name, module)
        if style in _WHOLE:
            continue
        if style not in _CUT:
            raise UnsupportedModel(
                "no tensor parallelism for this layer", field=name, got=style, wants="tensor_parallel_size: 1"
            )

        def part(whole: Tensor, dim: int, packed: bool = style == "packed_colwise") -> nn.Parameter:
            halves = whole.chunk(2, dim) if packed else [whole]
            mine = [half.tensor_split(size, dim)[rank] for half in halves]
            return nn.Parameter(torch.cat(mine, dim).to(device), requires_grad=False)

        if isinstance(module, nn.Parameter):
            owner, _, attribute = name.rpartition(".")
            setattr(body.get_submodule(owner), attribute, part(module, _CUT[style]))
            continue
        module.weight = part(module.weight, _CUT[style])
        if isinstance(module, Int8Linear) and style == "colwise":
            module.scale = part(module.scale, 0)
        if module.bias is not None and style == "colwise":
            module.bias = part(module.bias, 0)
        elif module.bias is not None and rank:
            module.bias = None  # a bias after a sum is added once
        module.out_features, module.in_features = module.weight.shape
    model.to(device)


def partial_sums(model: Any) -> list[nn.Module]:
    """The modules whose output each rank has a summand of, in no order."""
    return [
        module
        for _, module, style in _planned(model)
        if style == "moe_tp_experts" or (style == "rowwise" and isinstance(module, nn.Linear))
    ]


def _planned(model: Any) -> Generator[tuple[str, Any, str]]:
    """(name, module or parameter, kind of cut) of what the model's plan names."""
    plan = getattr(model.config, "base_model_tp_plan", None)
    if not plan:
        raise UnsupportedModel(
            "this model has no plan for tensor parallelism", field="model.id", got=model.config.model_type
        )
    kinds = [(re.compile(pattern.replace(".", r"\.").replace("*", r"\d+")), kind) for pattern, kind in plan.items()]
    body = model.base_model
    for name, thing in (*body.named_modules(), *body.named_parameters()):
        for pattern, kind in kinds:
            if pattern.fullmatch(name):
                yield name, thing, kind


def _agreed(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """The method's effect counts where all ranks had it; else all raise (see `Gang.agree`)."""

    @wraps(method)
    def run(self: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.gang.agreed():
            return method(self, *args, **kwargs)

    return run


class _Current(threading.local):
    sum: Callable[[Tensor], None] | None = None


_current = _Current()


def _add_up(part: Tensor) -> None:
    if _current.sum is None:
        raise RuntimeError("a rank's part of a model was called outside its runner's step")
    _current.sum(part)


def _ends_in_a_sum(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    torch.ops.berth.add_up(output)
    return output


class ShardedRunner(Runner):
    """A `Runner` over one rank's part. Each method is called on all ranks, with the same arguments.

    Args:
        model: cut by `split`.
        gang: this rank's seat.
        Others as in `Runner`; the KV cache has this rank's heads.
    """

    def __init__(self, model: Any, *args: Any, gang: Gang, **options: Any):
        super().__init__(model, *args, **options)
        self.gang = gang
        gang.ordered = self.invariant
        sums = partial_sums(model)
        for module in sums:
            module.register_forward_hook(_ends_in_a_sum)  # the compiler follows it into the layer's graph
        self._sums = len(sums)
        self._apart = False  # while layers are compiled
        self._due = 0  # sums that the others still wait for in this forward
        self._failure: Exception | None = None
        tokens = max(self.max_prefill_tokens, self.max_batch, self.tile_tokens) if self._device.type == "cuda" else 0
        self._spare = torch.zeros(tokens * model.config.hidden_size, dtype=model.dtype, device=self._device)
        self._width: int = model.config.hidden_size
        gang.reduce(self._spare[:1])  # NCCL sets itself up in its first operation, which no graph could hold

    @_agreed
    def step(self, rows: Sequence[RowStep]) -> list[tuple[int, float] | None]:
        """See `Runner.step`; raises on every rank what `Gang.agree` raises."""
        self._failure = None
        drawn = super().step(rows)
        if self._failure is not None:
            raise self._failure
        return drawn

    @_agreed
    def copy_pages(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """See `Runner.copy_pages`."""
        super().copy_pages(copies)

    @_agreed
    def resize(self, num_pages: int) -> None:
        """See `Runner.resize`."""
        super().resize(num_pages)

    @_agreed
    def drop_graphs(self) -> None:
        """See `Runner.drop_graphs`."""
        super().drop_graphs()

    @_agreed
    def drop_caches(self) -> None:
        """Give the device what the allocator keeps for later."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _compile(self, backend: str) -> None:
        """The forward that compiles adds nothing up. All ranks compile, or none."""
        with self.gang.agreed(START_S):
            self._apart = True
            try:
                super()._compile(backend)
            finally:
                self._apart = False

    def _forward(self, spans: Sequence[Any], decode: bool, tokens: int, moved: Any = None) -> Tensor | None:
        if self._apart:
            return super()._forward(spans, decode, tokens, moved)
        self._due = self._sums
        try:
            return super()._forward(spans, decode, tokens, moved)
        except Exception as e:
            self._failure = self._failure or e.with_traceback(None)
        self._take_part(tokens)
        return None

    def _body_forward(self, packed: Any) -> Tensor:
        _current.sum = self._sum
        try:
            return super()._body_forward(packed)
        finally:
            _current.sum = None

    def _sum(self, part: Tensor) -> None:
        if not self._apart:
            self.gang.reduce(part)
            self._due -= 1

    @_agreed
    def _capture(self, size: int, pool: Any) -> Any:
        self._due = self._sums  # of the first run; those in the graph wait for nobody
        try:
            return super()._capture(size, pool)
        except Exception:
            self._take_part(size)
            raise

    def _take_part(self, tokens: int) -> None:
        """Join in the sums that are due, with zeros: a nan in the others' KV would survive being masked."""
        count = tokens * self._width
        spare = self._spare if len(self._spare) >= count else self._spare.new_zeros(count)
        while self._due > 0:
            self.gang.reduce(spare[:count].zero_())
            self._due -= 1


# It writes into its argument, which is nobody else's: the compiler adds up in place, without a copy.
torch.library.custom_op("berth::add_up", _add_up, mutates_args=("part",), schema="(Tensor(a!) part) -> ()")
