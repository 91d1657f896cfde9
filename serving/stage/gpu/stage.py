"""A stage's steps on its GPU: stage inputs, launch layers, launch the drawing, pass results on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from serving.attention import StepInputs
from serving.attention.flashinfer_paged import FlashInferPlan
from serving.attention.triton_paged import TritonPlan
from serving.config.engine import EngineConfig
from serving.config.model import ModelConfig
from serving.core import StepPlan
from serving.errors import ConfigError
from serving.kernels.device import gpu_kernels
from serving.messages import StageSeconds, StepResult, StepTime
from serving.models import StageModel
from serving.sampling.device import DeviceSampler
from serving.stage.gpu.flow import Flow
from serving.stage.gpu.graphs import BUCKETS, StepGraphs, bucket_of
from serving.stage.gpu.memory import MemoryPlan, device_tensor, memory_plan
from serving.stage.gpu.prefill import long_prefills
from serving.stage.gpu.results import PendingResult, ResultThread, StepTimes, to_host
from serving.stage.gpu.staging import Cut, PageEntries, Size, Staging
from serving.stage.mirror import Rows
from serving.transport.base import StreamTransport

__all__ = ["GpuStage"]

_MIXED_PREFILLS = 8  # prefills that a recorded mixed step has room for, beside whole tiles
_ENTRIES = 1 << 14


class GpuStage:
    """A run of layers on one GPU; `step` only launches.

    Work runs on one stream of this stage, which must be the launching thread's current one. The
    page table lies on the device by slot and follows the plans' deltas; sampled tokens stay on the
    device, in `last_tokens` by slot, so a decode is launched before anybody has seen its token.
    `transport` links the stages where there are several; `sharing` of them use this GPU. Steps are
    recorded by `pieces` of the resident layers, so that the layers that run can change (`compute`).
    """

    def __init__(
        self,
        model: StageModel,
        config: EngineConfig,
        model_config: ModelConfig,
        *,
        stream: torch.cuda.Stream,
        stage: int,
        transport: StreamTransport | None,
        sharing: int,
        send: Callable[[StepResult], None],
        failed: Callable[[str], None],
        pieces: Sequence[range] = (),
    ) -> None:
        kernels = gpu_kernels()
        if kernels is None:
            raise ConfigError(
                "An engine on a GPU needs the package triton, which is not installed; install it "
                "or use --device cpu.",
                "--device",
            )
        self._kernels = kernels
        self._transport, self._sharing = transport, sharing
        self._model, self._config, self._model_config = model, config, model_config
        self._device, self._dtype = model.device, model.dtype
        self._send, self._stream = send, stream
        heads, kv_heads = model_config.num_heads, model_config.num_kv_heads
        self._shape = (heads, kv_heads, model_config.head_dim, self._dtype)
        self._short_tile = kernels.prefill_shape(*self._shape, longest=0)
        self._long_tile = kernels.prefill_shape(*self._shape, longest=1 << 30)
        self._tile_tokens = self._short_tile.tokens(heads, kv_heads)
        self._processors = torch.cuda.get_device_properties(self._device).multi_processor_count
        self._max_tokens, self._slots = config.max_num_batched_tokens, config.max_num_seqs
        self._long = long_prefills(
            config.attention,
            self._device,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=model_config.head_dim,
            page_size=config.page_size,
            dtype=self._dtype,
            windowed=any(window is not None for window in model_config.sliding_windows),
        )
        # One slot more than there are sequences takes what padding rows draw.
        self._last_tokens = torch.zeros(self._slots + 1, dtype=torch.int32, device=self._device)
        self._sampler: DeviceSampler | None = None
        if model.last:
            self._sampler = DeviceSampler(
                model_config.vocab_size, self._slots, self._device, model_config.eos_token_ids,
                kernels,
            )  # fmt: skip
        self._stages = config.pipeline_parallel_size
        self._flow: Flow | None = None
        if transport is not None:
            self._flow = Flow(transport, stage, self._stages, kernels, self._last_tokens)
        self._graphs = StepGraphs(self._stream)
        self._results = ResultThread(self._deliver, failed)
        self._kv: dict[int, Tensor] = {}
        self._pieces = list(pieces) or [model.resident]
        self._layers = model.layers
        self._steps = self._replayed = 0

    @property
    def sampler(self) -> DeviceSampler | None:
        """On the last stage."""
        return self._sampler

    # ---- start

    @torch.inference_mode()
    def plan_memory(self) -> MemoryPlan:
        """Run a worst-case step over one page and see what it takes."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._make_buffers(max_pages_a_slot=1)
        page = self._model_config.kv_shape(1, self._config.page_size)
        self._kv = {
            layer: torch.zeros(page, dtype=self._dtype, device=self._device)
            for layer in self._model.resident
        }
        tokens = self._max_tokens
        size = Size(tokens, 1, 0, -(-tokens // self._tile_tokens))
        # All zero: one sequence of no keys whose tokens are written nowhere that matters.
        self._run_body(size, 0)
        self._run_body(size, 0, longest=1 << 30)
        if self._sampler is not None:
            self._sampler.warm_up(self._model.scores(self._drawn_rows))
        self._stream.synchronize()
        peak = torch.cuda.max_memory_allocated(self._device) - before
        self._kv = {}
        torch.cuda.empty_cache()
        links = 0 if self._transport is None else self._transport.device_bytes
        return memory_plan(
            total,
            self._config.gpu_memory_utilization,
            taken=total - free,
            own=before + links,
            step=peak,
            sharing=self._sharing,
        )

    @torch.inference_mode()
    def allocate(self, num_pages: int, max_model_len: int) -> None:
        """Make the pages and record the steps."""
        self._make_buffers(-(-max_model_len // self._config.page_size))
        shape = self._model_config.kv_shape(num_pages, self._config.page_size)
        self._kv = {
            layer: device_tensor(shape, self._dtype, self._device) for layer in self._model.resident
        }
        started = time.perf_counter()
        if self._config.cuda_graphs:
            self._record()
        self._stream.synchronize()
        print(
            f"{len(self._graphs)} steps recorded in {time.perf_counter() - started:.1f} s",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        self._results.restart_clock()

    def _make_buffers(self, max_pages_a_slot: int) -> None:
        self._tables = torch.zeros(
            self._slots, max_pages_a_slot, dtype=torch.int32, device=self._device
        )
        most = Size(
            self._max_tokens,
            max(self._slots, min(self._max_tokens, BUCKETS[-1])),
            self._room(max(self._slots, BUCKETS[-1])),
            -(-self._max_tokens // self._tile_tokens) + self._slots + _MIXED_PREFILLS,
        )
        last = self._model.last
        # More host buffers than the micro-batches that can be in flight.
        self._staging = Staging(
            most, self._slots if last else 0, _ENTRIES, self._device, self._stages + 3
        )
        top = min(BUCKETS[-1], self._max_tokens)
        self._hidden = self._hidden_rows(top)
        self._incoming = None if self._model.first else self._hidden_rows(self._max_tokens)
        if last:
            self._drawn_rows = self._hidden_rows(self._slots)
            self._drawn = torch.zeros(self._slots, dtype=torch.int32, device=self._device)

    def _hidden_rows(self, count: int) -> Tensor:
        width = self._model_config.hidden_size
        return torch.zeros(count, width, dtype=self._dtype, device=self._device)

    def _record(self) -> None:
        """The largest first, so that all others fit into its memory."""
        for bucket in reversed(BUCKETS):
            if bucket <= self._max_tokens:
                if bucket <= self._slots:
                    self._record_body(Size(bucket, bucket, self._room(bucket), 0))
                mixed = self._mixed_size(bucket)
                if mixed is not None:
                    self._record_body(mixed)
            if bucket <= self._slots and self._model.last:
                self._graphs.record("draw", bucket, partial(self._draw, bucket))

    def _record_body(self, size: Size) -> None:
        for piece in self._pieces:
            self._graphs.record(_body(piece), size, partial(self._replayable, size, piece))

    def _mixed_size(self, bucket: int) -> Size | None:
        """Room of a recorded step with prefill tokens; the smallest ones are decodes."""
        if bucket < 8:
            return None
        tiles = -(-bucket // self._tile_tokens) + _MIXED_PREFILLS
        sequences = min(bucket, self._slots)
        return Size(bucket, sequences, self._room(sequences), tiles)

    def _room(self, sequences: int) -> int:
        room: int = self._kernels.share_room(sequences, self._shape[1], self._processors)
        return room

    # ---- one micro-batch

    @torch.inference_mode()
    def step(self, rows: Rows, plan: StepPlan) -> None:
        """Launch a micro-batch; its result follows from another thread."""
        size, cut, recorded = self._size(rows)
        # Host work is done before the device comes to this step, as a rule.
        words = self._staging.open()
        self._staging.fill_body(words, size, rows, cut)
        plain = self._fill_drawing(words, rows)
        times = StepTimes(self._stream)
        self._enter_entries(words, size, _page_entries(plan))
        pieces = [piece for piece in self._pieces if piece.start in self._layers]
        recorded = recorded and all((_body(piece), size) in self._graphs for piece in pieces)
        if self._flow is not None:
            self._flow.enter(rows, self._enters(recorded), times)

        self._steps += 1
        if recorded:
            for piece in pieces:
                self._graphs.replay(_body(piece), size)
            hidden = self._hidden
            self._replayed += 1
        else:
            prefills = None if self._long is None else self._long.plan(rows)
            longest = int(rows.context_lens.max())
            hidden = self._run_body(size, rows.num_decodes, longest, prefills)
        arrays: list[Tensor] = []
        sampled = len(rows.sampled_slots)
        if not self._model.last:
            if self._flow is None:
                raise AssertionError("a stage before the last has a transport")
            self._flow.leave(rows, hidden, times)
        elif sampled:
            more: list[Tensor] = []
            if plain:
                tokens = self._draw_plain(hidden, sampled)
            else:
                tokens, more = self._draw_any(hidden, rows)
            if self._flow is not None:
                slots = self._staging.drawing(sampled).slots
                self._flow.give_tokens(rows.number, slots, tokens)
            arrays = [to_host(tokens), *(to_host(array) for array in more)]
        times.end()
        self._results.put(PendingResult(rows.number, times, arrays))

    def compute(self, layers: range) -> None:
        """The resident layers that steps run from now on: whole pieces."""
        self._layers = layers

    @property
    def kv(self) -> Mapping[int, Tensor]:
        """KV of every resident layer, each an allocation of its own."""
        return self._kv

    def _enters(self, recorded: bool) -> Tensor | None:
        """Where a micro-batch's hidden rows come in: where its first layers read them."""
        return self._hidden if recorded and len(self._pieces) > 1 else self._incoming

    def _fill_drawing(self, words: Any, rows: Rows) -> bool:
        """Last stage: stage what drawing needs; whether a kernel can draw from the logits alone."""
        if self._sampler is None:
            return False
        slots, positions = rows.sampled_slots, rows.sampled_positions
        numbers = self._sampler.numbers(slots, positions)
        self._staging.fill_drawing(
            words, numbers.uniform, numbers.temperature, rows.sampled_tokens, slots, self._slots
        )
        return self._sampler.all_plain(slots, positions)

    def _enter_entries(self, words: Any, size: Size, entries: PageEntries) -> None:
        """Send what is staged to the device, and bring its page table up to date."""
        count = len(entries.slots)
        if count > self._staging.max_entries:
            self._staging.send(size, 0)
            self._enter_many(entries)
            return
        self._staging.fill_entries(words, size, entries)
        self._staging.send(size, count)
        if count:
            self._kernels.enter_pages(self._staging.entries(size, count), self._tables)

    def _size(self, rows: Rows) -> tuple[Size, Cut, bool]:
        """The size to run at, how attention is cut up, and whether it may have been recorded."""
        tokens, sequences, decodes = len(rows.positions), len(rows.slots), rows.num_decodes
        bucket = bucket_of(tokens) if self._graphs else None
        recorded: Size | None = None
        if bucket is not None and decodes == sequences:
            if bucket <= min(self._slots, self._max_tokens):
                recorded = Size(bucket, bucket, self._room(bucket), 0)
        elif bucket is not None:
            recorded = self._mixed_size(max(8, bucket))
            if recorded is not None and recorded.tokens > self._max_tokens:
                recorded = None
        tiles = self._tiles(rows, self._short_tile)
        if recorded is not None and (len(tiles) > recorded.tiles or sequences > recorded.sequences):
            recorded = None
        shape = self._tile_shape(int(rows.context_lens.max()))
        if recorded is None and shape is not self._short_tile:
            tiles = self._tiles(rows, shape)
        # No more shares than its own decodes fill: each costs a merge.
        room = self._room(decodes)
        if recorded is not None:
            room = min(room, recorded.shares)
        shares, part_starts = self._kernels.decode_shares(rows.context_lens[:decodes], room)
        size = recorded or Size(tokens, sequences, len(shares), len(tiles))
        return size, Cut(shares, part_starts, tiles), recorded is not None

    def _tiles(self, rows: Rows, shape: Any) -> Any:
        heads, kv_heads = self._shape[:2]
        return self._kernels.prefill_tiles(
            rows.query_starts, rows.context_lens, rows.num_decodes, shape.tokens(heads, kv_heads)
        )

    def _tile_shape(self, longest: int) -> Any:
        return self._long_tile if longest > 1024 else self._short_tile

    def _run_body(
        self,
        size: Size,
        decodes: int,
        longest: int = 0,
        prefills: FlashInferPlan | None = None,
        piece: range | None = None,
    ) -> Tensor:
        """Launch the layers of now, or those of a piece, which reads what the one before left."""
        body = self._staging.body(size)
        layers = piece or self._layers
        ids, hidden = body.ids, None
        if self._model.first and layers.start == 0:
            ids = self._kernels.resolve_tokens(ids, self._last_tokens)
        else:
            entering = self._enters(piece is not None)
            if entering is None:
                raise AssertionError("a stage after the first has a place for hidden rows")
            hidden = entering[: size.tokens]
        inputs = StepInputs(
            token_ids=ids,
            positions=body.positions,
            slot_mapping=body.slot_mapping,
            query_starts=body.query_starts,
            context_lens=body.context_lens,
            page_tables=self._tables,
            num_decodes=decodes,
            query_starts_host=[],
            context_lens_host=[],
            page_size=self._config.page_size,
            table_rows=body.table_rows,
            attention_plan=TritonPlan(
                body.shares, body.part_starts, body.tiles, self._tile_shape(longest), prefills
            ),
        )
        self._model.compute(layers)
        return self._model.forward(inputs, hidden, [self._kv[layer] for layer in layers])

    def _replayable(self, size: Size, piece: range) -> None:
        out = self._run_body(size, size.sequences, piece=piece)
        self._hidden[: size.tokens].copy_(out)

    def _draw_plain(self, hidden: Tensor, count: int) -> Tensor:
        """Rows without filters: gather, head, draw; returns the tokens [R] int32."""
        bucket = bucket_of(count) or count
        if bucket > self._slots:
            bucket = count
        drawing = self._staging.drawing(bucket)
        torch.index_select(hidden, 0, drawing.rows, out=self._drawn_rows[:bucket])
        if not (self._graphs and self._graphs.replay("draw", bucket)):
            self._draw(bucket)
        return self._drawn[:count]

    def _draw(self, count: int) -> None:
        drawing = self._staging.drawing(count)
        logits = self._model.scores(self._drawn_rows[:count])
        self._kernels.draw_tokens(
            logits, drawing.temperature, drawing.uniform, drawing.slots, self._last_tokens,
            self._drawn[:count],
        )  # fmt: skip

    def _draw_any(self, hidden: Tensor, rows: Rows) -> tuple[Tensor, list[Tensor]]:
        """Rows with filters, penalties or log probabilities among them: tokens [R] int32, and what
        was asked for beside them."""
        if self._sampler is None:
            raise AssertionError("only the last stage samples")
        count = len(rows.sampled_slots)
        drawing = self._staging.drawing(count)
        output = self._sampler.draw(
            self._model.scores(hidden.index_select(0, drawing.rows)),
            rows.sampled_slots,
            rows.sampled_positions,
            slots=drawing.slots,
            temperature=drawing.temperature,
            uniform=drawing.uniform,
            last_tokens=self._last_tokens,
            out=self._drawn[:count],
        )
        found = (output.logprobs, output.top_ids, output.top_logprobs)
        return output.token_ids, [array for array in found if array is not None]

    def _enter_many(self, entries: PageEntries) -> None:
        """More page-table entries than the staging buffer holds."""
        words = np.stack(
            [part.astype(np.int32) for part in (entries.slots, entries.columns, entries.pages)]
        )
        pinned = torch.from_numpy(words).pin_memory()
        self._kernels.enter_pages(pinned.to(self._device, non_blocking=True), self._tables)

    # ---- results

    def _deliver(self, result: PendingResult) -> None:
        """On a thread of its own."""
        if self._model.last:
            self._send(result.message())

    def seconds(self) -> StageSeconds:
        return self._results.seconds()

    @property
    def behind(self) -> bool:
        """Whether there are launched micro-batches whose times are not known yet."""
        return self._results.behind

    def take_steps(self) -> list[StepTime]:
        """The micro-batches that ended since the last call."""
        return self._results.take_steps()

    def close(self) -> None:
        """Bounded, also where the stream waits for a stage that is gone."""
        self._results.close()
        if self._transport is not None:
            self._transport.close()
        share = 100 * self._replayed / max(1, self._steps)
        print(
            f"{self._steps} steps, {share:.1f} % of them replayed from recorded ones",
            file=sys.stderr, flush=True,
        )  # fmt: skip


def _body(piece: range) -> str:
    return f"layers from {piece.start}"


def _page_entries(plan: StepPlan) -> PageEntries:
    return PageEntries(
        np.frombuffer(plan.page_slots, dtype="<u2"),
        np.frombuffer(plan.page_columns, dtype="<u4"),
        np.frombuffer(plan.page_ids, dtype="<u4"),
    )
