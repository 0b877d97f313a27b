"""One step of a transformers model over packed rows and paged KV: forward, logits, next tokens.

A step is packed into `[1, T]`, padding included only where stated below. Where every row computes one token it is a
decode step, which a CUDA graph replays once `capture` has run; anything else (prefill chunks, mixed with decoding rows
or not) is one varlen step. Nothing of a step is remembered here: after an out-of-memory error the same step can be run
again into the same slots.

On CUDA a step need not be waited for (`launch`), and the next can be launched on the tokens that it draws before the
host has seen them. Under the Triton kernels pages that several rows of a replayed step begin with are read once.

Knows nothing of scheduling, of who owns a page, of stop tokens or text.

Invariance. fp32 matrix products on CPU change a row's bits with the number of rows: with MKL on one thread for 1 to 3
rows only, with two threads wherever a thread is left with 1 to 3. Under the reference kernel on CPU a step is therefore
padded to a multiple of 4 rows a thread, after which no bit of a dense model was seen to depend on the rest of the batch
or on chunking. That is an observation about one library; `invariant=True` makes it hold by construction: every forward
has exactly `tile_tokens` tokens, every other one padding, so that all shapes are the same, and experts are computed
token by token. It is slower, for prefill most of all.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from actors.engine.attention import NAME, RUNS, Kernel, Plan, Row, Units, attending, check_kernel, queries_a_tile
from actors.engine.fused import fuse
from actors.engine.kv import SCRATCH_PAGE, KVCache, indices, kv_shapes
from actors.engine.protocol import RowStep
from actors.engine.sampling import choose, wrap_seed
from actors.engine.support import check_class, check_supported, window_of
from actors.errors import EngineDead
from actors.messages import Sampling

log = logging.getLogger(__name__)

_TILE_TOKENS = {"cpu": 8, "cuda": 64}
_NO_LOGPROB = math.nan
# The smallest graph for which reading shared pages once is quicker than reading them for each row.
_SHARING_ROWS = 8


@dataclass(slots=True)
class _Span:
    """Tokens of one sequence in one forward; after each of the last `draws` of them a token is drawn."""

    token_ids: Sequence[int]
    start: int
    pages: Sequence[int]
    draws: int


@dataclass(slots=True)
class _Packed:
    """A forward's integers, as int32 views of one buffer; N of them are for shared runs, I for `attention.Units`."""

    ids_T: Any
    positions_T: Any
    slots_T: Any
    lens_R: Any
    cu_q_R1: Any
    cu_k_R1: Any
    first_R1: Any
    row_I: Any
    pages_1: Any
    cu_q_N1: Any
    cu_k_N1: Any
    table_RP: Any
    table_NP: Any

    @classmethod
    def over(cls, flat: Any, tokens: int, rows: int, pages: int, units: int) -> _Packed:
        """Cut a flat buffer of `size(tokens, rows, pages, units)` elements (numpy or torch) into its fields."""
        ends = np.cumsum(cls._sizes(tokens, rows, pages, units)).tolist()
        parts = [flat[start:end] for start, end in itertools.pairwise([0, *ends])]
        parts[-2:] = [table.reshape(-1, pages) for table in parts[-2:]]
        return cls(*parts)

    @classmethod
    def size(cls, tokens: int, rows: int, pages: int, units: int) -> int:
        """Elements of the flat buffer."""
        return sum(cls._sizes(tokens, rows, pages, units))

    @staticmethod
    def _sizes(tokens: int, rows: int, pages: int, units: int) -> list[int]:
        per_row = [rows, rows + 1, rows + 1, rows + 1]
        return [tokens, tokens, tokens, *per_row, units, 1, RUNS + 1, RUNS + 1, rows * pages, RUNS * pages]


@dataclass(slots=True)
class _Graph:
    """A captured decode step of a fixed number of rows, and what it reads."""

    graph: torch.cuda.CUDAGraph
    device: Tensor
    units: int
    sharing: bool


@dataclass(slots=True)
class Drawn:
    """Tokens of a step that may still be under way.

    Attributes:
        ids_B: int64, on the device, in the order of the batch.
        place_R: each row's index there; None where nothing was drawn.
    """

    ids_B: Tensor
    place_R: Sequence[int | None]
    _ids_B: Tensor
    _logprobs_B: Tensor | None
    _wants_R: Sequence[bool]
    _ready: torch.cuda.Event | None

    def result(self) -> list[tuple[int, float] | None]:
        """Wait for the step: (token id, log-probability) of each row; nan where it was not asked for.

        Raises:
            RuntimeError: the device failed.
        """
        if self._ready is not None:
            self._ready.synchronize()
        ids = self._ids_B.tolist()
        logprobs = None if self._logprobs_B is None else self._logprobs_B.tolist()
        return [
            None if at is None else (ids[at], logprobs[at] if logprobs and wanted else _NO_LOGPROB)
            for at, wanted in zip(self.place_R, self._wants_R, strict=True)
        ]


class Runner:
    """Runs steps of one model on one device. Not thread-safe.

    Args:
        model: a transformers causal language model of a supported family, on the device of `kv`; its attention
            implementation is set to ours.
        kv: pages; page 0 is scratch and must not stand in any row's table.
        kernel: see `attention.kernels_for`.
        max_batch: rows of a decode step at most.
        max_prefill_tokens: what `profile` assumes where it is not told; `step` does not enforce it.
        max_model_len: longest sequence in tokens.
        graphs: let `capture` capture.
        invariant: same row, same bits, whatever else is in the step and however its prompt was cut. Reference only.

    Attributes:
        compiled: steps run compiled layers.

    Raises:
        UnsupportedModel: the model or its shapes are not done by the engine or the kernel.
        ValueError: arguments that do not go together.
    """

    def __init__(
        self,
        model: Any,
        kv: KVCache,
        kernel: Kernel,
        max_batch: int,
        max_prefill_tokens: int,
        max_model_len: int,
        graphs: bool = True,
        invariant: bool = False,
    ):
        config = model.config
        check_supported(config)
        check_class(config, type(model).__name__)
        check_kernel(kernel, kv, config)
        if invariant and kernel != "reference":
            raise ValueError(f"invariant steps need the reference kernel, got {kernel}")
        if len(kv.shapes) != config.num_hidden_layers:
            raise ValueError(f"the KV cache has {len(kv.shapes)} layers, the model {config.num_hidden_layers}")
        self.kv = kv
        self.kernel: Kernel = kernel
        self.max_batch = max_batch
        self.max_prefill_tokens = max_prefill_tokens
        self.max_model_len = max_model_len
        self.invariant = invariant
        self.tile_tokens = _TILE_TOKENS.get(kv.device.type, 64)
        self._device = kv.device
        self._max_pages = -(-max_model_len // kv.page_tokens)
        self.asynchronous = kv.device.type == "cuda" and not invariant
        # What a step copies of quantised KV has another shape each time; Triton's kernels need no copy.
        fixed = kernel == "triton" or (kernel != "reference" and not kv.quantised)
        self._use_graphs = graphs and fixed and kv.device.type == "cuda"
        self._graphs: dict[int, _Graph] = {}
        self._graph_logits_BV: Tensor | None = None
        self._graph_ids_B: Tensor | None = None
        self._warm_up: torch.cuda.Stream | None = None
        self._shares = kernel == "triton" and window_of(config) is None
        self.compiled = False
        self._least_tokens = 1  # of a forward; compiled code has sizes of 1 apart
        self._kv_heads = kv_shapes(config)[0][0]  # of the whole model
        self._model = model.eval()
        self._body = model.base_model
        self._lm_head = model.get_output_embeddings()
        self._final_softcap: float | None = getattr(config, "final_logit_softcapping", None)
        model.set_attn_implementation(NAME)
        if kernel == "reference":
            # TF32 keeps 10 bits of the mantissa; process-wide, as torch has it.
            torch.set_float32_matmul_precision("highest")
        if invariant and hasattr(config, "num_experts"):
            # The default groups tokens by expert: another number of rows in each product, by neighbours.
            model.set_experts_implementation("batched_mm")

    @property
    def captured(self) -> tuple[int, ...]:
        """Batch sizes that a CUDA graph replays, rising; empty where decode runs uncaptured."""
        return tuple(sorted(self._graphs))

    @torch.no_grad()
    def step(self, rows: Sequence[RowStep]) -> list[tuple[int, float] | None]:
        """Compute the rows' new tokens, write their KV, and draw where asked.

        Args:
            rows: at least one; a sequence appears once, or several times in a row, each time where it left off.

        Returns:
            for each row (token id, log-probability under the unmodified distribution), or None where `sample` is
            False. The log-probability is nan where `logprobs` is False.

        Raises:
            torch.OutOfMemoryError: nothing is kept of the step; it may be repeated.
            ValueError: a row without tokens, or a page table that is too short.
        """
        for row in rows:
            if not row.token_ids or len(row.pages) * self.kv.page_tokens < row.start + len(row.token_ids):
                raise ValueError(
                    f"a row of {len(row.token_ids)} tokens from {row.start} with {len(row.pages)} pages of "
                    f"{self.kv.page_tokens} tokens"
                )
        return self._start(rows, None, ()).result()

    @torch.no_grad()
    def launch(
        self, rows: Sequence[RowStep], after: Drawn | None = None, sources: Sequence[int | None] = ()
    ) -> Drawn | None:
        """Start a step and do not wait for it.

        Args:
            rows: as in `step`.
            after: a launched step on whose tokens this one goes on, before anybody has seen them.
            sources: for each row its index among the rows of `after`, whose token stands for its only one; None where
                its own `token_ids` count.

        Returns:
            None, and nothing was done, where steps are waited for: on a CPU, and where they are invariant.
        """
        return self._start(rows, after, sources) if self.asynchronous else None

    def _start(self, rows: Sequence[RowStep], after: Drawn | None, sources: Sequence[int | None]) -> Drawn:
        size = self._graph_size(rows)
        if size is not None:
            return self._replay(rows, size, after, sources)
        drawn = [row for row in rows if row.sample]
        places = itertools.count()
        place_R = [next(places) if row.sample else None for row in rows]
        hidden_BE = self._hidden(rows, _decodes(rows), after, sources)
        if hidden_BE is None:
            none_B = torch.empty(0, dtype=torch.int64)
            return Drawn(none_B, [None] * len(rows), none_B, None, [False] * len(rows), self._event())
        return self._draw(self._logits(hidden_BE), None, drawn, place_R)

    def fuse(self) -> bool:
        """See `fused.fuse`; before `compile`, and for the Triton kernels only."""
        return self.kernel == "triton" and fuse(self._model, self.kv)

    @torch.no_grad()
    def compile(self, backend: str = "inductor") -> bool:
        """Compile the decoder layers; False, with a warning, where that fails, and they run as they are.

        One compilation serves all layers and all sizes of a step. What it made is kept on disk by torch.

        Args:
            backend: see `torch.compile`.

        Raises:
            EngineDead: see `shard.ShardedRunner`.
        """
        try:
            self._compile(backend)
        except EngineDead:
            raise
        except Exception as e:
            for layer in self._layers():
                layer._compiled_call_impl = None
            self._least_tokens = 1
            log.warning("the layers could not be compiled and run as they are: %s: %s", type(e).__name__, e)
            return False
        self.compiled = True
        return True

    def _compile(self, backend: str) -> None:
        import torch._dynamo.config as dynamo  # seconds that an engine which does not compile need not wait

        if dynamo.disable:
            raise RuntimeError("torch.compile is switched off")
        # Layers differ in their index alone, which is to be an argument of one compiled function. Process-wide.
        dynamo.allow_unspec_int_on_nn_module = True
        self._least_tokens = 2
        for layer in self._layers():
            layer.compile(dynamic=True, fullgraph=True, backend=backend)
        self._start([RowStep([0, 0, 0], 0, [SCRATCH_PAGE], True, Sampling())], None, ()).result()

    def _layers(self) -> list[Any]:
        """What is compiled: the decoder layers, and the norm behind the last."""
        return [*self._body.layers, self._body.norm]

    def copy_pages(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """See `protocol.Runner`; pages are copied whole."""
        self.kv.copy_pages([(src, dst) for src, dst, _ in copies])

    def resize(self, num_pages: int) -> None:
        """Drop graphs and all KV, then allocate `num_pages` pages, the scratch page included.

        Raises:
            torch.OutOfMemoryError: they do not fit; the runner can be resized again, and not step until then.
        """
        self.drop_graphs()
        self.kv.resize(num_pages)

    @torch.no_grad()
    def capture(self) -> Exception | None:
        """Capture decode steps in CUDA graphs by batch size, largest first so that the others fit its memory.

        Does nothing without CUDA, under the reference kernel, or where graphs were not wanted. A failure is logged and
        returned, and decode goes on uncaptured.
        """
        if not self._use_graphs:
            return None
        self.drop_graphs()
        try:
            pool = torch.cuda.graph_pool_handle()
            sizes = {max(size, self._least_tokens) for size in graph_sizes(self.max_batch)}
            for size in sorted(sizes, reverse=True):
                self._graphs[size] = self._capture(size, pool)
        except Exception as e:  # Triton's errors have no common base
            self.drop_graphs()
            self._use_graphs = False
            log.warning("CUDA graphs could not be captured, decode runs without: %s", e)
            return e.with_traceback(None)
        return None

    def drop_graphs(self) -> None:
        """Free the CUDA graphs and their memory; decode runs uncaptured until `capture`."""
        if not self._graphs and self._graph_logits_BV is None:
            return
        torch.cuda.synchronize(self._device)
        self._graphs.clear()
        self._graph_logits_BV = self._graph_ids_B = None
        torch.cuda.empty_cache()

    def profile(self, max_prefill_tokens: int | None = None, max_batch: int | None = None) -> int:
        """Peak bytes of a step above what is allocated now, measured; 0 on CPU, which keeps no count.

        Runs the largest prefill and the largest decode step into the scratch page, with top-p sampling. One page of
        KV is enough for it.

        Raises:
            torch.OutOfMemoryError: such a step does not fit.
        """
        if self._device.type != "cuda":
            return 0
        prefill = self.max_prefill_tokens if max_prefill_tokens is None else max_prefill_tokens
        batch = self.max_batch if max_batch is None else max_batch
        sampling = Sampling(temperature=1.0, top_p=0.9, top_k=50)
        scratch = [SCRATCH_PAGE] * self._max_pages
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        lengths = [min(self.max_model_len, prefill - at) for at in range(0, prefill, self.max_model_len)]
        self.step([RowStep([0] * length, 0, scratch, True, sampling, True) for length in lengths])
        self.step([RowStep([0], self.max_model_len - 1, scratch, True, sampling, True) for _ in range(batch)])
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before

    def _graph_size(self, rows: Sequence[RowStep]) -> int | None:
        return next((size for size in self.captured if size >= len(rows)), None) if _decodes(rows) else None

    def _hidden(
        self, rows: Sequence[RowStep], decode: bool, after: Drawn | None, sources: Sequence[int | None]
    ) -> Tensor | None:
        """Last hidden states [B, E] of the rows that draw, in order; None where none does."""
        spans = _spans(rows)
        decode = decode and len(spans) == len(rows)
        if not self.invariant:
            ends = itertools.accumulate(len(row.token_ids) for row in rows)
            moved = after and self._moved([end - 1 for end in ends], after, sources)
            return self._forward(spans, decode, self._padded(sum(len(span.token_ids) for span in spans)), moved)
        parts = [self._forward(tile, False, self.tile_tokens) for tile in _tiles(spans, self.tile_tokens)]
        kept = [part for part in parts if part is not None]
        return torch.cat(kept) if kept else None

    def _padded(self, rows: int) -> int:
        if self.kernel != "reference" or self._device.type != "cpu":
            return max(rows, self._least_tokens)
        multiple = 4 * torch.get_num_threads()
        return -(-rows // multiple) * multiple

    def _forward(
        self, spans: Sequence[_Span], decode: bool, tokens: int, moved: tuple[Tensor, Tensor] | None = None
    ) -> Tensor | None:
        """One forward of exactly `tokens` tokens, padded on the scratch page; hidden states [B, E] or None.

        Args:
            moved: indices of tokens, and the ids that take the place of theirs.
        """
        real = list(spans)
        padding = tokens - sum(len(span.token_ids) for span in real)
        if padding:
            # Several rows of one page at most; padding attends to nothing under the reference.
            size = min(self.kv.page_tokens, 1 if decode else padding)
            spans = real + [
                _Span([0] * min(size, padding - at), 0, [SCRATCH_PAGE], 0) for at in range(0, padding, size)
            ]
        width = max(-(-(span.start + len(span.token_ids)) // self.kv.page_tokens) for span in spans)
        queries, units = self._units(spans, decode)
        sizes = (tokens, len(spans), width, units)
        flat = torch.empty(_Packed.size(*sizes), dtype=torch.int32, pin_memory=self._device.type == "cuda")
        host = _Packed.over(flat.numpy(), *sizes)
        _fill(host, spans, self.kv.page_tokens, queries)
        pages_N = None
        copied = self.kv.quantised and self.kernel != "triton"
        if copied:
            pages, place = np.unique(host.table_RP, return_inverse=True)
            host.table_RP[:] = place.reshape(host.table_RP.shape)
            pages_N = indices(pages.tolist(), self._device)
        packed = _Packed.over(flat.to(self._device, non_blocking=True), *sizes)
        if moved is not None:
            packed.ids_T[moved[0]] = moved[1]
        at = cast(list[int], host.cu_q_R1.tolist())
        plan = self._plan(packed, max(len(span.token_ids) for span in spans), int(host.lens_R.max()), decode, queries)
        plan.pages_N = pages_N
        plan.rows = [
            Row(at[r], span.start, len(span.token_ids), host.table_RP[r].tolist() if copied else span.pages)
            for r, span in enumerate(real)
        ]
        last = [t for r, span in enumerate(real) for t in range(at[r + 1] - span.draws, at[r + 1])]
        last_B = indices(last, self._device)
        with attending(plan):
            hidden_TE = self._body_forward(packed)
        return hidden_TE[last_B] if last else None

    def _moved(
        self, place_R: Sequence[int], after: Drawn, sources: Sequence[int | None]
    ) -> tuple[Tensor, Tensor] | None:
        """Places of the rows that have a source, and the tokens that their sources draw."""
        places = [place for place, r in zip(place_R, sources, strict=True) if r is not None]
        if not places:
            return None
        drawn = [cast(int, after.place_R[r]) for r in sources if r is not None]
        to_B, from_B = indices([*places, *drawn], self._device).reshape(2, -1)
        return to_B, after.ids_B[from_B].int()

    def _units(self, spans: Sequence[_Span], decode: bool) -> tuple[int, int]:
        """Query tokens of a tile, 0 in decode; and how many tiles, or chunks at most, there are."""
        if self.kernel != "triton":
            return 0, 0
        if decode:
            return 0, _chunks(len(spans))
        lengths = [len(span.token_ids) for span in spans]
        kv_heads, dim = self.kv.shapes[0]
        heads = self._model.config.num_attention_heads * kv_heads // self._kv_heads
        queries = queries_a_tile(heads, kv_heads, dim, sum(lengths), len(lengths))
        return queries, sum(-(-length // queries) for length in lengths)

    def _plan(self, packed: _Packed, max_q: int, max_k: int, decode: bool, queries: int) -> Plan:
        return Plan(
            kv=self.kv,
            kernel=self.kernel,
            slots_T=packed.slots_T.long(),
            cu_q_R1=packed.cu_q_R1,
            cu_k_R1=packed.cu_k_R1,
            lens_R=packed.lens_R,
            table_RP=packed.table_RP,
            max_q=max_q,
            max_k=max_k,
            decode=decode,
            units=Units(packed.row_I, packed.first_R1, queries, packed.pages_1),
        )

    def _body_forward(self, packed: _Packed) -> Tensor:
        output = self._body(
            input_ids=packed.ids_T.long()[None], position_ids=packed.positions_T.long()[None], use_cache=False
        )
        return output.last_hidden_state[0]

    def _logits(self, hidden_BE: Tensor) -> Tensor:
        """Logits [B, V], capped where the model caps them."""
        if self._device.type == "cuda" and not self.invariant:
            return self._head(hidden_BE)
        rows = hidden_BE.shape[0]
        tile = self.tile_tokens if self.invariant else self._padded(rows)
        short = -rows % tile
        padded_BE = torch.cat([hidden_BE, hidden_BE.new_zeros(short, hidden_BE.shape[1])]) if short else hidden_BE
        tiles = [self._head(padded_BE[at : at + tile]) for at in range(0, rows, tile)]
        return (tiles[0] if len(tiles) == 1 else torch.cat(tiles))[:rows]

    def _head(self, hidden_BE: Tensor) -> Tensor:
        logits_BV = self._lm_head(hidden_BE)
        if self._final_softcap is not None:
            logits_BV = torch.tanh(logits_BV / self._final_softcap) * self._final_softcap
        return logits_BV

    def _draw(
        self,
        logits_BV: Tensor,
        ids_B: Tensor | None,
        rows: Sequence[RowStep],
        place_R: Sequence[int | None],
    ) -> Drawn:
        """Next tokens of `rows`, which stand in the order of the batch; `ids_B` are the most likely ones where they are
        known already."""
        logprobs = any(row.logprobs for row in rows)
        if ids_B is None or logprobs or any(row.sampling.temperature > 0 for row in rows):
            ids_B, logprobs_B = choose(logits_BV, *self._sampling_tensors(rows, logits_BV.shape[1]), logprobs=logprobs)
        else:
            logprobs_B = None
        host_B = ids_B.to("cpu", non_blocking=True)
        host_logprobs_B = None if logprobs_B is None else logprobs_B.to("cpu", non_blocking=True)
        wants_R = [at is not None and rows[at].logprobs for at in place_R]
        return Drawn(ids_B, place_R, host_B, host_logprobs_B, wants_R, self._event())

    def _event(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _sampling_tensors(
        self, rows: Sequence[RowStep], vocabulary: int
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        samplings = [row.sampling for row in rows]
        hot = [sampling for sampling in samplings if sampling.temperature > 0]

        def tensor(values: list[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(self._device, non_blocking=True)

        seeds_B = tensor([wrap_seed(sampling.seed) for sampling in samplings], torch.int64)
        positions_B = tensor([row.start + len(row.token_ids) for row in rows], torch.int64)
        if not hot:
            return seeds_B, positions_B, None, None, None
        temperature_B = tensor([sampling.temperature for sampling in samplings], torch.float32)
        top_p_B = top_k_B = None
        if any(sampling.top_p < 1 for sampling in hot):
            top_p_B = tensor([sampling.top_p for sampling in samplings], torch.float32)
        if any(sampling.top_k is not None for sampling in hot):
            top_k_B = tensor([sampling.top_k or vocabulary for sampling in samplings], torch.int64)
        return seeds_B, positions_B, temperature_B, top_p_B, top_k_B

    def _replay(self, rows: Sequence[RowStep], size: int, after: Drawn | None, sources: Sequence[int | None]) -> Drawn:
        graph = self._graphs[size]
        order, runs = _runs(rows, self.kv.page_tokens) if graph.sharing else (range(len(rows)), [])
        ordered = [rows[r] for r in order]
        spans = [_Span(row.token_ids, row.start, row.pages, 1) for row in ordered]
        spans += [_Span([0], 0, [SCRATCH_PAGE], 0)] * (size - len(rows))
        # A new one each time: the last step's may still be on its way to the device.
        flat = torch.empty(len(graph.device), dtype=torch.int32, pin_memory=self._device.type == "cuda")
        host = _Packed.over(flat.numpy(), size, size, self._max_pages, graph.units)
        _fill(host, spans, self.kv.page_tokens, runs=runs)
        graph.device.copy_(flat, non_blocking=True)
        moved = after and self._moved(range(len(rows)), after, [sources[r] for r in order])
        if moved is not None:
            graph.device[moved[0]] = moved[1]
        graph.graph.replay()
        if self._graph_logits_BV is None or self._graph_ids_B is None:
            raise RuntimeError("a graph outlived its outputs")
        place_R = [0] * len(rows)
        for at, r in enumerate(order):
            place_R[r] = at
        return self._draw(self._graph_logits_BV[: len(rows)], self._graph_ids_B[: len(rows)], ordered, place_R)

    def _capture(self, size: int, pool: Any) -> _Graph:
        sharing = self._shares and size >= _SHARING_ROWS
        spans = [_Span([0], 0, [SCRATCH_PAGE], 0)] * size
        _, units = self._units(spans, decode=True)
        sizes = (size, size, self._max_pages, units)
        host = torch.zeros(_Packed.size(*sizes), dtype=torch.int32)
        _fill(_Packed.over(host.numpy(), *sizes), spans, self.kv.page_tokens)
        device = host.to(self._device)
        packed = _Packed.over(device, *sizes)

        def decode() -> tuple[Tensor, Tensor]:
            plan = self._plan(packed, 1, self.max_model_len, True, 0)
            if sharing and plan.units is not None:
                from actors.engine.kernels.decode import Runs  # torch does not bring Triton everywhere

                plan.units.runs = Runs(packed.cu_q_N1, packed.cu_k_N1, packed.table_NP)
            with attending(plan):
                logits_BV = self._head(self._body_forward(packed))
            return logits_BV, logits_BV.argmax(-1)

        # One for all sizes: cuBLAS keeps a workspace for each stream that ever ran a matrix product.
        stream = self._warm_up = self._warm_up or torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            # Libraries allocate their workspaces in a first run, which a graph could not hold.
            logits_BV, ids_B = decode()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        if self._graph_logits_BV is None or self._graph_ids_B is None:
            # One buffer that all sizes write, instead of one output a graph.
            self._graph_logits_BV, self._graph_ids_B = torch.empty_like(logits_BV), torch.empty_like(ids_B)
        del logits_BV, ids_B
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits_BV, ids_B = decode()
            self._graph_logits_BV[:size].copy_(logits_BV)
            self._graph_ids_B[:size].copy_(ids_B)
        return _Graph(graph, device, units, sharing)


def graph_sizes(max_batch: int) -> list[int]:
    """Batch sizes to capture, rising: dense where a padded row costs most, and `max_batch` itself."""
    sizes = {1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, max_batch + 1, 32)}
    return sorted({size for size in sizes if size < max_batch} | {max_batch})


def _chunks(rows: int) -> int:
    """Chunks of own pages that a decode step may have: enough for many rows of few pages, and for few of many."""
    return 2 * rows + 128


def _fill(
    host: _Packed,
    spans: Sequence[_Span],
    page_tokens: int,
    queries: int = 0,
    runs: Sequence[tuple[int, Sequence[int]]] = (),
) -> None:
    """Write the spans' ids, positions, slots, lengths, page tables and units into numpy views.

    Args:
        queries: of a tile; 0 cuts the rows' own pages into chunks, of as few pages as there is room for.
        runs: of the first spans: how many begin with which pages, which their own tables then leave out.
    """
    counts = np.fromiter((len(span.token_ids) for span in spans), np.int32, len(spans))
    starts = np.fromiter((span.start for span in spans), np.int32, len(spans))
    host.ids_T[:] = np.fromiter(
        itertools.chain.from_iterable(span.token_ids for span in spans), np.int32, len(host.ids_T)
    )
    left_out = [len(pages) for rows, pages in runs for _ in range(rows)]
    left_out += [0] * (len(spans) - len(left_out))
    skipped = np.array(left_out, np.int32) * page_tokens
    np.add(starts - skipped, counts, out=host.lens_R)
    host.cu_q_R1[0] = host.cu_k_R1[0] = 0
    np.cumsum(counts, out=host.cu_q_R1[1:])
    np.cumsum(host.lens_R, out=host.cu_k_R1[1:])
    used = -(-(starts + counts) // page_tokens)
    own = [span.pages[first:end] for span, first, end in zip(spans, left_out, used.tolist(), strict=True)]
    host.table_RP[:] = SCRATCH_PAGE
    places_RP = np.arange(host.table_RP.shape[1]) < (used - left_out)[:, None]
    host.table_RP[places_RP] = np.fromiter(itertools.chain.from_iterable(own), np.int32)
    row_T = np.repeat(np.arange(len(spans)), counts)
    host.positions_T[:] = np.arange(len(host.ids_T)) - (host.cu_q_R1[:-1] - starts)[row_T]
    page_T, offset_T = np.divmod(host.positions_T - skipped[row_T], page_tokens)
    host.slots_T[:] = host.table_RP[row_T, page_T] * page_tokens + offset_T
    if len(host.row_I):
        parts, size = (counts, queries) if queries else (-(-host.lens_R // page_tokens), 1)
        while not queries and (-(-parts // size)).sum() > len(host.row_I):
            size += 1
        units = -(-parts // size)
        host.pages_1[:] = size
        host.first_R1[0] = 0
        np.cumsum(units, out=host.first_R1[1:])
        host.row_I[: host.first_R1[-1]] = np.repeat(np.arange(len(spans)), units)
    host.cu_q_N1[:] = host.cu_k_N1[:] = 0
    host.table_NP[:] = SCRATCH_PAGE
    for n, (rows, pages) in enumerate(runs):
        host.cu_q_N1[n + 1 :] = host.cu_q_N1[n] + rows
        host.cu_k_N1[n + 1 :] = host.cu_k_N1[n] + len(pages) * page_tokens
        host.table_NP[n, : len(pages)] = pages


def _runs(rows: Sequence[RowStep], page_tokens: int) -> tuple[list[int], list[tuple[int, Sequence[int]]]]:
    """An order of decode rows in which those that begin with the same pages stand together, in front; and of each such
    group the number of rows and the pages. A row's guesses may share the page that it writes: it is written first."""
    groups: dict[int, list[int]] = {}
    for r, row in enumerate(rows):
        groups.setdefault(row.pages[0] if row.start >= page_tokens else SCRATCH_PAGE, []).append(r)
    groups.pop(SCRATCH_PAGE, None)
    order: list[int] = []
    runs: list[tuple[int, Sequence[int]]] = []
    for members in sorted(groups.values(), key=len, reverse=True)[:RUNS]:
        if len(members) > 1:
            alike = list(rows[members[0]].pages[: min(rows[r].start for r in members) // page_tokens])
            for r in members:
                while list(rows[r].pages[: len(alike)]) != alike:
                    alike.pop()
            runs.append((len(members), alike))
            order += members
    taken = set(order)
    return order + [r for r in range(len(rows)) if r not in taken], runs


def _decodes(rows: Sequence[RowStep]) -> bool:
    return all(row.sample and len(row.token_ids) == 1 for row in rows)


def _spans(rows: Sequence[RowStep]) -> list[_Span]:
    """One span a sequence: rows that go on where the one before left off are its guesses."""
    spans: list[_Span] = []
    for row in rows:
        last = spans[-1] if spans else None
        used = len(last.pages) if last else 0
        if last and last.draws and row.start == last.start + len(last.token_ids) and row.pages[:used] == last.pages:
            last.token_ids = [*last.token_ids, *row.token_ids]
            last.pages, last.draws = row.pages, last.draws + 1
        else:
            spans.append(_Span(row.token_ids, row.start, row.pages, int(row.sample)))
    return spans


def _tiles(spans: Sequence[_Span], tokens: int) -> list[list[_Span]]:
    """Cut spans into tiles of at most `tokens` tokens, in order."""
    tiles: list[list[_Span]] = [[]]
    room = tokens
    for span in spans:
        at = 0
        while at < len(span.token_ids):
            if not room:
                tiles.append([])
                room = tokens
            ids = span.token_ids[at : at + room]
            end = at + len(ids)
            draws = min(len(ids), max(0, end - len(span.token_ids) + span.draws))
            tiles[-1].append(_Span(ids, span.start + at, span.pages, draws))
            at, room = end, room - len(ids)
    return tiles
