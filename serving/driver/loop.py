"""The driver: take arrivals, choose a micro-batch, send its plan, take finished results."""

from __future__ import annotations

import os
import time

import msgspec
import zmq

from serving.core import Layout, Request
from serving.driver.balance import Balancer, Move, stage_costs
from serving.driver.completion import Completion
from serving.driver.group import StageGroup
from serving.driver.limits import resolve_limits
from serving.driver.migration import Migration
from serving.driver.recovery import Deaths, check_pages, check_progress
from serving.driver.scheduler import Scheduler
from serving.driver.timings import StepTimings
from serving.driver.trial import Trial
from serving.errors import EngineDeadError
from serving.messages import (
    Abort,
    DriverSpec,
    EngineStats,
    LayersCopied,
    LayersMoved,
    Progress,
    Ready,
    Rebalance,
    Recovering,
    Refused,
    StageFailed,
    StageSeconds,
    StageStats,
    StageSteps,
    StepOutputs,
    StepPlanned,
    StepResult,
    Stop,
    Submit,
    ToClient,
    ToDriver,
    socket_address,
)

_STATS_SECONDS = 0.5
_BALANCE_SECONDS = 0.25
_MAX_REPORTED_BATCHES = 4096
#: A trial of fewer steps says too little to be kept.
_TRIAL_STEPS = 32


class Driver:
    """One engine's scheduler, its stage group, and its client (the process with the Engine)."""

    def __init__(self, spec: DriverSpec) -> None:
        self._spec = spec
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._client = self._context.socket(zmq.PUSH)
        self._client.set_hwm(1 << 16)
        self._client.connect(socket_address(spec.directory, "client"))
        self._arrivals = self._context.socket(zmq.PULL)
        self._arrivals.set_hwm(1 << 16)
        self._arrivals.connect(socket_address(spec.directory, "driver"))
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToDriver] = msgspec.msgpack.Decoder(ToDriver)
        self._group = StageGroup(spec, spec.layout, self._context, os.getpid())
        self._deaths = Deaths()
        self._stopping = False
        self._batches: list[tuple[int, int]] = []
        self._timings = StepTimings(spec.layout)
        # Whether anything depends on how long micro-batches will take.
        self._looks_ahead = spec.config.order == "slo" or bool(spec.config.max_predicted_ttft)
        self._migration = Migration(
            spec.layout, spec.config.movable, spec.config.tensor_parallel_size
        )
        self._balancer: Balancer | None = None
        if spec.config.movable and spec.config.layer_rebalance == "auto":
            self._balancer = Balancer(spec.layout, windows=self._migration.windows)
        self._balanced_at = 0.0
        self._asked: Layout | None = None
        #: Why layers are moving: the slowest stage if there is one, and a sentence.
        self._move_reason: tuple[int | None, str] = (None, "")
        self._measured: tuple[str, list[str], str] | None = None
        self._told_at = 0.0
        self._untold = True
        self._was_busy = True

    def run(self) -> None:
        """Start the stages, then serve until told to stop; stages that die are replaced.

        Raises LecternError if they cannot start, or die too often.
        """
        self._start()
        while not self._stopping:
            try:
                self._serve()
            except EngineDeadError as death:
                if not self._stopping:
                    self._recover(death)

    def tell(self, message: ToClient) -> None:
        self._client.send(self._encoder.encode(message))

    def close(self, *, orderly: bool) -> None:
        if self._measured is not None:
            self._timings.save(*self._measured)
        self._group.close(orderly=orderly)
        self._arrivals.close(linger=0)
        self._client.close(linger=1000)
        self._context.term()

    # ---- the loop and its parts

    def _serve(self) -> None:
        while not self._stopping:
            self._take_arrivals()
            self._move_layers()
            planned = self._send_next_plan()
            self._take_results(wait=not planned)
            self._tell_stats()

    def _take_arrivals(self) -> None:
        now = time.monotonic()
        try:
            while True:
                message = self._decoder.decode(self._arrivals.recv(zmq.NOBLOCK))
                self._untold = True
                if isinstance(message, Submit):
                    self._take(message.request, now)
                elif isinstance(message, Abort):
                    self._scheduler.abort(message.stream)
                elif isinstance(message, Rebalance):
                    self._asked = Layout.of_counts(message.counts)
                elif isinstance(message, Stop):
                    self._stopping = True
        except zmq.Again:
            return

    def _take(self, request: Request, now: float) -> None:
        """Queue a request, or refuse it when its first token would come too late.

        A prompt that takes longer than the limit by itself is refused only while it would have to
        wait as long again, so that there is a time at which it is taken. The first choice of a
        request decides for all of them: the others find its prefix in the cache.
        """
        scheduler = self._scheduler
        sequence = scheduler.submit(request, now)
        limit = self._spec.config.max_predicted_ttft
        if limit is None or request.choice > 0:
            return
        ttft = scheduler.predicted_ttft(sequence, now)
        limit = max(limit, 2 * scheduler.outlook.seconds(sequence))
        if ttft > limit:
            scheduler.withdraw(sequence)
            self.tell(StepOutputs(refused=[Refused(request.stream, ttft, ttft - limit)]))

    def _move_layers(self) -> None:
        """Begin a move that is asked for or worth it, or switch when one is ready."""
        migration = self._migration
        now = time.monotonic()
        if migration.idle:
            self._begin_move(now)
            return
        number = self._scheduler.next_number
        before, layout = migration.layout, migration.switch(number)
        if layout is None:
            return
        self._scheduler.epoch = layout.epoch
        self._timings.relayout(number, layout)
        self._untold = True
        slowest, why = self._move_reason
        self.tell(
            LayersMoved(
                epoch=layout.epoch,
                counts=layout.counts,
                before=before.counts,
                seconds=now - migration.decided,
                slowest=slowest,
                why=why,
            )
        )

    def _begin_move(self, now: float) -> None:
        migration = self._migration
        layout, self._asked = self._asked, None
        slowest, why = None, ""
        if layout is None:
            move = self._worthwhile_move(now)
            if move is None:
                return
            layout, slowest, why = move.layout, move.slowest, move.sentence()
        if layout.bounds == migration.layout.bounds:
            return
        why = why or f"layers move to {layout.counts}, as was asked for"
        self._move_reason = slowest, why
        held = self._scheduler.pool.held()
        number = self._scheduler.next_number
        self._group.send_all(migration.begin(layout, held, number, now))

    def _worthwhile_move(self, now: float) -> Move | None:
        balancer, timings = self._balancer, self._timings
        window = timings.window
        if balancer is None or now - self._balanced_at < _BALANCE_SECONDS:
            return None
        if len(window) < (window.maxlen or 0) or not self._scheduler.in_flight:
            return None
        self._balanced_at = now
        errors = timings.errors
        worst = None if None in errors else max(error for error in errors if error is not None)
        balancer.layout = self._migration.layout
        return balancer.decide(now, stage_costs(timings.predictors, window), worst)

    def _send_next_plan(self) -> bool:
        """Choose one micro-batch and send its plan; tells whether there was one."""
        scheduler = self._scheduler
        now = time.monotonic()
        choice = scheduler.choose(now)
        if scheduler.admitted:
            self.tell(StepOutputs(admitted=scheduler.admitted))
            scheduler.admitted = []
        if choice is None:
            return False
        batch, plan = choice
        batch.sent_at = now
        self._group.send_plan(plan)
        self._timings.sent(batch, scheduler.slots)
        self._untold = True
        held = (len(batch.decode_slots), int(batch.prefill_lens.sum()))
        if len(self._batches) < _MAX_REPORTED_BATCHES:
            self._batches.append(held)
        if self._spec.config.record_steps:
            self.tell(StepPlanned(batch.number, plan.epoch, *held))
        return True

    def _take_results(self, *, wait: bool) -> None:
        """Apply what came back. With nothing more to plan, wait for news of any kind."""
        if wait:
            self._wait_for_news()
        for message in self._group.receive():
            if isinstance(message, StepResult):
                batch, outputs = self._completion.finish(message)
                if self._looks_ahead:
                    self._timings.returned(batch, time.monotonic())
                if outputs.streams or outputs.ended:
                    self.tell(outputs)
                self._untold = True
            elif isinstance(message, StageStats):
                self._stages[message.stage] = message.seconds
                self._timings.took(message.stage, message.steps)
                if self._spec.config.record_steps:
                    self.tell(StageSteps(message.stage, message.steps))
                self._untold = True
            elif isinstance(message, LayersCopied):
                self._migration.copied(message)
            elif isinstance(message, StageFailed):
                raise self._group.failure(message)
        check_progress(self._scheduler.in_flight, self._spec.config.step_timeout)

    def _wait_for_news(self) -> None:
        timeout = self._spec.config.step_timeout * 1000
        if self._untold:
            timeout = min(timeout, _STATS_SECONDS * 1000)
        events = dict(self._poller.poll(int(timeout)))
        if any(descriptor in events for descriptor in self._ends):
            raise self._group.failure(None)

    def _tell_stats(self) -> None:
        """Every half second while anything changes, and at once when the last request ended."""
        if not self._untold:
            return
        now = time.monotonic()
        idle = not self._scheduler.streams and not self._scheduler.in_flight
        if now - self._told_at < _STATS_SECONDS and not (idle and self._was_busy):
            return
        self._was_busy = not idle
        self._told_at = now
        self._untold = False
        scheduler, pool = self._scheduler, self._scheduler.pool
        if idle:
            pool.check()
        counters = scheduler.counters
        self.tell(
            EngineStats(
                running=scheduler.num_running,
                waiting=scheduler.num_waiting,
                pages_free=pool.num_free,
                pages_cached=pool.num_cached,
                pages_used=pool.num_used,
                preemptions=counters.preemptions,
                prompt_tokens=counters.prompt_tokens,
                cached_prompt_tokens=counters.cached_prompt_tokens,
                generation_tokens=counters.generation_tokens,
                finished=counters.finished,
                in_flight=len(scheduler.in_flight),
                microbatches=self._batches,
                stages=self._stages,
                prediction_errors=self._timings.errors,
                layers=self._migration.layout.counts,
                restarts=self._deaths.restarts,
            )
        )
        self._batches = []

    # ---- start, and start again

    def _start(self) -> None:
        spec = self._spec
        fitting = self._group.wait_loaded(self._tell_progress)
        limits = self._limits = resolve_limits(spec.config, fitting, spec.context_length)
        self._tell_progress(
            f"{limits.num_pages} KV pages of {spec.config.page_size} tokens, "
            f"context of {limits.max_model_len} tokens ({limits.reason})"
        )
        self._measured = (spec.config.name, self._group.devices, self._group.dtype)
        self._timings.load(*self._measured)
        self._scheduler = Scheduler(
            spec.config, limits.num_pages, limits.max_model_len, self._timings.slowest
        )
        self._completion = Completion(self._scheduler, spec.eos_token_ids)
        self._begin()

    def _begin(self) -> None:
        """Let a group that has loaded make its pages and do one request, then all that wait."""
        limits, group = self._limits, self._group
        group.wait_started(limits.num_pages, limits.max_model_len)
        trial = Trial(group, self._spec, limits)
        trial.warm_up()
        self._timings.forget_sent()
        self._learn_times(trial)
        self._timings.forget_sent()
        self._scheduler.begin(trial.scheduler)
        self._stages = [StageSeconds() for _ in range(group.layout.num_stages)]
        self._poller = zmq.Poller()
        self._poller.register(self._arrivals, zmq.POLLIN)
        self._poller.register(group.results, zmq.POLLIN)
        for child in group.children:
            self._poller.register(child.fileno(), zmq.POLLIN)
        self._ends = {child.fileno() for child in group.children}
        self._untold = True
        self.tell(Ready(limits.num_pages, limits.max_model_len))

    def _learn_times(self, trial: Trial) -> None:
        """Where something depends on step times of which nothing is known yet."""
        seconds = self._spec.config.profile_seconds
        needed = self._looks_ahead or self._balancer is not None
        if not needed or self._timings.known or not seconds or self._measured is None:
            return
        self._tell_progress(f"measuring step times for {seconds:g} s")
        began = time.monotonic()
        steps = trial.measure(self._timings, seconds)
        self._timings.save(*self._measured, least=_TRIAL_STEPS)
        self._tell_progress(f"learnt from {steps} steps in {time.monotonic() - began:.1f} s")

    def _recover(self, death: EngineDeadError) -> None:
        """Replace the stages and put all that is unfinished back into the queue.

        Raises LecternError if that cannot be, or has been done too often.
        """
        while True:
            self._deaths.note(str(death), time.monotonic())
            self.tell(Recovering(str(death), len(self._scheduler.streams)))
            self._group.close(orderly=False)
            self._migration.forget()
            layout = self._migration.layout
            self._group = StageGroup(self._spec, layout, self._context, os.getpid())
            try:
                fitting = self._group.wait_loaded(self._tell_progress)
                check_pages(self._spec.config, fitting, self._limits.num_pages)
                self._begin()
                return
            except EngineDeadError as another:
                death = another

    def _tell_progress(self, text: str) -> None:
        self.tell(Progress(text))
