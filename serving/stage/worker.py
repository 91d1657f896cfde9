"""The stage worker: loads its layers, then runs the micro-batches that plans describe."""

from __future__ import annotations

import gc
import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from serving.attention import StepInputs
from serving.config.engine import GIB
from serving.config.model import ModelConfig
from serving.config.shares import rank_config
from serving.core import StepPlan
from serving.errors import EngineDeadError
from serving.messages import (
    AllocateKv,
    FromStage,
    LayersCopied,
    MoveLayers,
    Shutdown,
    StageLoaded,
    StageProgress,
    StageSpec,
    StageStarted,
    StageStats,
    StepTime,
)
from serving.models import build_stage
from serving.sampling import SampleOutput, Sampler
from serving.stage.clock import StageClock
from serving.stage.copies import KvCopies, LinkedCopies
from serving.stage.devices import choose_device, workers_on
from serving.stage.inputs import InputBuilder
from serving.stage.links import DriverLinks
from serving.stage.mirror import Mirror, Rows
from serving.stage.moves import LayerMoves
from serving.transport.base import StreamTransport, Transport
from serving.transport.layers import GlooLayerLinks, LayerLinks
from serving.weights import LoadProgress

if TYPE_CHECKING:
    from serving.stage.gpu.stage import GpuStage
    from serving.transport.tensor_group import TensorGroup

_STATS_SECONDS = 0.5


def _not_sent(message: FromStage) -> None:
    """Results of ranks other than 0 say the same as those of rank 0."""


class StageWorker:
    """One rank of a stage of the pipeline. It decides nothing: plans say what runs, in which order.

    The ranks of a stage do the same steps on the same rows, each with its part of every layer;
    between layers all hold the whole hidden rows, and behind the head the whole logits, so that
    all sample the same tokens. Rank 0 speaks for its stage to the driver.
    """

    def __init__(self, spec: StageSpec, links: DriverLinks) -> None:
        self._stage, self._rank = spec.stage, spec.rank
        self._ranks = spec.config.tensor_parallel_size
        self._last = spec.layout.num_stages - 1
        self._config = spec.config
        self._links = links
        whole = ModelConfig.from_folder(spec.config.model)
        self._model_config = rank_config(whole, self._ranks)
        self._device = choose_device(spec.config, self._stage, self._rank)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        self._group = self._meet_ranks(spec)
        name = self._model_config.dtype if spec.config.dtype == "auto" else spec.config.dtype
        self._dtype: torch.dtype = getattr(torch, name)
        self._layout, self._home, self._directory = spec.layout, spec.home, spec.directory
        movable = spec.config.movable
        #: The part of all KV memory that one layer may take.
        self._resident_layers = sum(
            len(spec.home.resident(stage, movable)) for stage in range(self._last + 1)
        )
        self._model = build_stage(
            whole,
            spec.home.resident(self._stage, movable),
            first=self._stage == 0,
            last=self._stage == self._last,
            dtype=self._dtype,
            device=self._device,
            load_format=spec.config.load_format,
            seed=spec.config.seed,
            progress=self._report_loading if self._rank == 0 else None,
            group=self._group,
        )
        self._model.compute(spec.layout.layers(self._stage))
        self._layer_links: GlooLayerLinks | None = None
        if movable:
            rendezvous = f"{spec.directory}/layers-{self._rank}"
            self._layer_links = GlooLayerLinks(self._stage, self._last + 1, rendezvous)
        self._moves: LayerMoves | None = None
        self._transport: Transport | None = None
        self._gpu: GpuStage | None = None
        if self._device.type == "cuda":
            self._gpu = self._make_gpu_stage(spec)
        else:
            self._transport = self._make_transport(spec)
        self._sampler: Sampler | None = None
        self._clock = StageClock()
        #: Late micro-batches, on a CPU. Ranks that do not report drop the oldest.
        self._steps: deque[StepTime] = deque(maxlen=4096)
        self._expected: deque[tuple[int, np.ndarray[tuple[int], np.dtype[np.int64]]]] = deque()

    def run(self) -> None:
        """Until the driver says it is over."""
        self._links.send(self._loaded())
        allocation = self._links.next(None)
        if not isinstance(allocation, AllocateKv):
            return
        self._allocate(allocation)
        if self._transport is not None:
            self._transport.warm_up()
        self._links.send(StageStarted(self._stage, self._rank))
        # Objects made so far live as long as the process; they need no further looking through.
        gc.collect()
        gc.freeze()
        self._clock = StageClock()
        reported = time.monotonic()
        unreported = False
        while True:
            with self._clock.waiting("idle"):
                message = self._links.next(_STATS_SECONDS if unreported else None)
            if isinstance(message, StepPlan):
                self._clock.begin()
                self._step(message)
                if self._gpu is None:
                    self._steps.append(self._clock.step(message.number))
                unreported = self._rank == 0
            elif isinstance(message, MoveLayers) and self._moves is not None:
                self._moves.begin(message)
            elif message is not None:
                if isinstance(message, Shutdown):
                    return
                raise EngineDeadError("The driver sent a message that has no place in a step.")
            now = time.monotonic()
            if unreported and now - reported >= _STATS_SECONDS:
                # What a GPU has not come to the end of is reported next time.
                more = message is not None or (self._gpu is not None and self._gpu.behind)
                if self._gpu is None:
                    seconds, steps = self._clock.seconds(), list(self._steps)
                    self._steps.clear()
                else:
                    seconds, steps = self._gpu.seconds(), self._gpu.take_steps()
                self._links.send(StageStats(self._stage, seconds, steps))
                reported, unreported = now, more

    def close(self) -> None:
        if self._gpu is not None:
            self._gpu.close()
        if self._transport is not None:
            self._transport.close()

    # ---- one micro-batch

    @torch.inference_mode()
    def _step(self, plan: StepPlan) -> None:
        """Inputs are ready before the activations are waited for."""
        rows = self._mirror.apply(plan)
        if self._sampler is not None:
            self._admit(self._sampler, plan)
        if self._gpu is not None:
            if self._moves is not None:
                self._moves.before(plan.epoch, rows)
                self._gpu.compute(self._moves.layout.layers(self._stage))
            self._gpu.step(rows, plan)
            if self._moves is not None:
                self._moves.after(rows)
            return
        inputs = self._inputs.build(rows)
        if self._moves is not None:
            with self._clock.waiting("wait_input"):
                self._moves.before(plan.epoch, rows)
            self._model.compute(self._moves.layout.layers(self._stage))
        hidden = self._receive(rows, inputs)
        if self._stage == self._last:
            wanted = None
            if len(rows.sampled_tokens) < len(rows.positions):
                wanted = torch.from_numpy(rows.sampled_tokens).to(self._device)
            self._finish(rows, self._forward(rows, inputs, hidden, wanted))
            return
        out = self._forward(rows, inputs, hidden)
        if self._transport is None:
            raise AssertionError("a stage before the last has a transport")
        before = self._transport.seconds_waited
        self._transport.send_hidden(out)
        self._clock.add("wait_link", self._transport.seconds_waited - before)

    def _forward(
        self, rows: Rows, inputs: StepInputs, hidden: Tensor | None, wanted: Tensor | None = None
    ) -> Tensor:
        kv = [self._kv[layer] for layer in self._model.layers]
        out = self._model.forward(inputs, hidden, kv, wanted)
        if self._moves is not None:
            self._moves.after(rows)
        return out

    def _receive(self, rows: Rows, inputs: StepInputs) -> Tensor | None:
        """Activations of the stage before; on the first stage the sampled tokens instead."""
        if self._stage > 0:
            if self._transport is None:
                raise AssertionError("a stage after the first has a transport")
            with self._clock.waiting("wait_input"):
                return self._transport.receive_hidden(len(rows.positions))
        if self._transport is not None:
            if len(rows.sampled_slots):
                self._transport.expect_tokens(len(rows.sampled_slots))
                self._expected.append((rows.number, rows.sampled_slots))
            while self._expected and self._expected[0][0] <= rows.reads_from:
                _, slots = self._expected.popleft()
                with self._clock.waiting("wait_input"):
                    tokens = self._transport.receive_tokens()
                self._inputs.keep_tokens(slots, tokens)
        self._inputs.fill_tokens(inputs, rows)
        return None

    def _finish(self, rows: Rows, hidden: Tensor) -> None:
        """Last stage: sample, give the tokens to the first stage, then to the driver."""
        output = self._sample(rows, hidden) if len(rows.sampled_slots) else None
        if output is not None:
            if self._transport is not None:
                self._transport.send_tokens(output.token_ids)
            else:
                self._inputs.keep_tokens(rows.sampled_slots, output.token_ids)
        if self._rank == 0:
            self._links.send_result(rows.number, output)

    def _sample(self, rows: Rows, hidden: Tensor) -> SampleOutput:
        if self._sampler is None:
            raise AssertionError("only the last stage samples")
        logits = self._model.logits(hidden)
        slots = rows.sampled_slots.tolist()
        return self._sampler.sample(
            logits,
            torch.from_numpy(rows.sampled_slots).to(self._device),
            rows.sampled_positions.tolist(),
            slots,
        )

    def _admit(self, sampler: Sampler, plan: StepPlan) -> None:
        for slot in np.frombuffer(plan.released, dtype="<u2").tolist():
            sampler.release(slot)
        for admission in plan.admitted:
            if admission.params is None:
                raise EngineDeadError("A plan for the last stage came without sampling parameters.")
            sampler.admit(
                admission.slot,
                admission.params,
                np.frombuffer(admission.tokens, dtype="<i4").tolist(),
                admission.prompt_len,
                admission.choice,
            )

    # ---- start

    def _loaded(self) -> StageLoaded:
        """What is said once the weights are there."""
        name = "cpu"
        if self._device.type == "cuda":
            name = torch.cuda.get_device_name(self._device)
        if self._ranks > 1:
            name += f" x {self._ranks}"
        dtype = str(self._dtype).removeprefix("torch.")
        return StageLoaded(self._stage, self._max_pages(), self._rank, name, dtype)

    def _report_loading(self, progress: LoadProgress) -> None:
        self._links.send(
            StageProgress(self._stage, f"stage {self._stage}: loading weights, {progress}")
        )

    def _meet_ranks(self, spec: StageSpec) -> TensorGroup | None:
        if self._ranks == 1:
            return None
        from serving.transport.tensor_group import connect_ranks

        return connect_ranks(spec.directory, self._stage, self._rank, self._ranks, self._device)

    def _make_transport(self, spec: StageSpec) -> Transport | None:
        if self._last == 0:
            return None
        from serving.transport.gloo import GlooTransport

        return GlooTransport(
            self._stage,
            spec.layout.num_stages,
            f"{spec.directory}/rendezvous-{self._rank}",
            max_tokens=spec.config.max_num_batched_tokens,
            hidden_size=self._model_config.hidden_size,
            dtype=self._dtype,
        )

    def _make_gpu_stage(self, spec: StageSpec) -> GpuStage:
        from serving.stage.gpu.stage import GpuStage

        stream: torch.cuda.Stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(stream)
        sharing = workers_on(spec.config, self._device)
        sender = self._links.another()
        return GpuStage(
            self._model,
            spec.config,
            self._model_config,
            stream=stream,
            stage=self._stage,
            transport=self._link_gpus(spec, stream, sharing > 1) if self._last > 0 else None,
            sharing=sharing,
            send=sender.send if self._rank == 0 else _not_sent,
            failed=lambda what: sender.fail(self._stage, what, self._rank),
            pieces=spec.home.pieces(self._stage, spec.config.movable),
        )

    def _link_gpus(
        self, spec: StageSpec, stream: torch.cuda.Stream, shared: bool
    ) -> StreamTransport:
        """Every rank has a pipeline of its own: hidden rows are whole on all ranks of a stage."""
        from serving.transport.connect import StoreExchange, connect_stages

        stages = spec.layout.num_stages
        transport, sentence = connect_stages(
            spec.config.transport,
            self._stage,
            stages,
            stream,
            StoreExchange(f"{spec.directory}/rendezvous-{self._rank}", stages),
            max_tokens=spec.config.max_num_batched_tokens,
            hidden_size=self._model_config.hidden_size,
            dtype=self._dtype,
            max_rows=spec.config.max_num_seqs,
            shared=shared,
        )
        if self._rank == 0:
            self._links.send(StageProgress(self._stage, f"stage {self._stage}: {sentence}"))
        return transport

    def _max_pages(self) -> int:
        """Pages that this rank's part of the KV memory holds, at least 1."""
        shape = self._model_config.kv_shape(1, self._config.page_size)
        page = int(np.prod(shape)) * self._dtype.itemsize  # of one layer
        asked = self._config.kv_memory
        if self._gpu is not None:
            plan = self._gpu.plan_memory()
            if asked is None:
                if self._rank == 0:
                    self._links.send(
                        StageProgress(self._stage, f"stage {self._stage}: {plan.sentence()}")
                    )
                return max(1, plan.kv // (page * len(self._model.resident)))
        asked = (GIB if asked is None else asked) // self._ranks
        return max(1, asked // (page * self._resident_layers))

    def _allocate(self, allocation: AllocateKv) -> None:
        config = self._config
        shape = self._model_config.kv_shape(allocation.num_pages, config.page_size)
        if self._gpu is not None:
            self._mirror = self._new_mirror(allocation)
            self._gpu.allocate(allocation.num_pages, allocation.max_model_len)
            self._sampler = self._gpu.sampler
            if self._layer_links is not None:
                self._moves = self._make_moves(self._gpu_copies(self._layer_links))
            return
        # Zeros, so that memory is really there from the start and masked slots hold no NaN.
        self._kv = {
            layer: torch.zeros(shape, dtype=self._dtype, device=self._device)
            for layer in self._model.resident
        }
        if self._layer_links is not None:
            self._moves = self._make_moves(LinkedCopies(self._kv, self._layer_links))
        self._mirror = self._new_mirror(allocation)
        self._inputs = InputBuilder(config.max_num_seqs, config.page_size, self._device)
        if self._stage == self._last:
            self._sampler = Sampler(
                self._model_config.vocab_size,
                config.max_num_seqs,
                self._device,
                self._model_config.eos_token_ids,
            )

    def _owners(self) -> dict[int, list[int]]:
        """The stages that may come to own each layer."""
        home, movable = self._home, self._config.movable
        return {layer: home.residents(layer, movable) for layer in range(home.bounds[-1])}

    def _make_moves(self, copies: KvCopies) -> LayerMoves:
        copies.try_out(self._stage, self._owners())
        sender = self._links.another()
        stage, rank = self._stage, self._rank
        return LayerMoves(
            stage,
            self._layout,
            copies,
            tell=lambda epoch, settled: sender.send(LayersCopied(stage, rank, epoch, settled)),
            # From either thread of the moves, so with a socket of its own.
            failed=lambda what: self._links.another().fail(stage, what, rank),
        )

    def _gpu_copies(self, links: LayerLinks) -> KvCopies:
        """All ranks of a number have a meeting place of their own, as their activations have."""
        from serving.stage.gpu.copies import connect_copies
        from serving.transport.connect import StoreExchange

        if self._gpu is None:
            raise AssertionError("copies between GPUs are of a stage on one")
        stages = self._last + 1
        copies, how = connect_copies(
            self._stage,
            self._owners(),
            self._gpu.kv,
            links,
            torch.cuda.current_stream(self._device),
            StoreExchange(f"{self._directory}/copies-{self._rank}", stages),
            stages,
        )
        if self._rank == 0:
            self._links.send(
                StageProgress(self._stage, f"stage {self._stage}: KV of layers moves {how}")
            )
        return copies

    def _new_mirror(self, allocation: AllocateKv) -> Mirror:
        return Mirror(
            self._config.max_num_seqs,
            allocation.max_model_len,
            self._config.page_size,
            holds_tokens=self._stage == 0,
        )
