"""Trains the demo model, in legs that resume from a checkpoint.

    python -m serving.demo_model.training.train --run RUN --tokenizer FOLDER --corpus FILE \
        --minutes 18 --leg 7.5 --resume

The schedule follows the clock: after all legs together `--minutes` of training are spent, whatever
the machine's speed. With `--steps` it follows the number of steps instead, and two runs of the
same steps are alike. A leg ends with a checkpoint in the run's folder and an exported model.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from serving.demo_model.training.corpus import Corpus
from serving.demo_model.training.examples import LECTURES, Maker
from serving.demo_model.training.export import export, load, special_tokens
from serving.demo_model.training.model import (
    BlockMasks,
    Decoder,
    Shape,
    dense_mask,
    no_mask,
)
from serving.demo_model.training.optimiser import Optimiser
from serving.demo_model.training.probe import Probe
from serving.demo_model.training.prompts import END_OF_TEXT
from serving.demo_model.training.stream import Shards, batches, unpack

_STATE = "state.safetensors"
_LOG_SECONDS = 5.0


@dataclass
class Progress:
    """How far a training is: steps and seconds done, tokens seen, the next new shard."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    shard: int = 0


def rate_scale(share: float, warm: float = 0.01, stable: float = 0.55, last: float = 0.03) -> float:
    """Return the learning rate's share at a share of the training: up, level, linearly down."""
    if share < warm:
        return max(share / warm, 0.02)
    if share < stable:
        return 1.0
    return max(last, 1.0 - (1.0 - last) * (share - stable) / (1.0 - stable))


def context_weight(share: float, first: float, until: float = 0.35, last: float = 0.01) -> float:
    """Return the weight of what is only read: it falls, or the documents are learnt by heart."""
    return max(last, first + (last - first) * share / until)


class Trainer:
    """A model, its optimiser and where they stand."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.arguments = a
        self.device = torch.device(a.device)
        torch.manual_seed(a.seed)
        torch.set_float32_matmul_precision("high")
        ids = special_tokens(a.tokenizer)
        self.filler = ids[END_OF_TEXT]
        self.shape = Shape(**{**Shape().values(), **json.loads(a.shape)})
        self.model = Decoder(self.shape, a.dropout).to(self.device)
        self.optimiser = Optimiser(self.model, matrix_rate=a.rate, other_rate=a.other_rate)
        self.progress = Progress()
        if a.resume and (a.run / _STATE).is_file():
            self._restore(a.run / _STATE)
        elif a.start_from is not None:
            weights, progress = load(a.start_from)
            self.model.load_state_dict(weights)
            self.progress = Progress(**progress)
        self._loss: Any = self.model.loss
        masks = {"flex": BlockMasks(), "dense": dense_mask, "causal": no_mask}
        self._mask: Any = masks[a.attention]
        if a.compile:
            self._loss = torch.compile(self.model.loss)

    def _restore(self, file: Path) -> None:
        with safe_open(file, framework="pt", device=str(self.device)) as saved:
            metadata = saved.metadata()
            own = dict(self.model.named_parameters())
            with torch.no_grad():
                for name, parameter in own.items():
                    parameter.copy_(saved.get_tensor(f"p.{name}"))
                for name, tensor in self.optimiser.state.items():
                    tensor.copy_(saved.get_tensor(name))
        self.progress = Progress(**json.loads(metadata["progress"]))

    def save(self) -> None:
        """Write the checkpoint: the old one stays until the new one is whole."""
        a = self.arguments
        a.run.mkdir(parents=True, exist_ok=True)
        tensors = {f"p.{n}": p.detach().cpu() for n, p in self.model.named_parameters()}
        tensors |= {name: tensor.cpu() for name, tensor in self.optimiser.state.items()}
        partial = a.run / f"{_STATE}.part"
        save_file(tensors, partial, metadata={"progress": json.dumps(vars(self.progress))})
        os.replace(partial, a.run / _STATE)

    def share(self) -> float:
        """Return how much of the whole training is done."""
        a = self.arguments
        if a.steps:
            return self.progress.step / float(a.steps)
        return self.progress.seconds / (60.0 * float(a.minutes))

    def step(self, marked: Tensor) -> tuple[Tensor, Tensor]:
        """Train on one batch; return the weighted mean loss and the mean over answers."""
        a = self.arguments
        tokens, positions, documents, targets, weights = unpack(
            marked, self.filler, context_weight(self.share(), a.context_weight), a.lead_weight
        )
        mask = self._mask(documents)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=a.bf16):
            whole, answers = self._loss(tokens, positions, mask, targets, weights)
        total = weights.sum()
        (whole / total).backward()
        self.progress.step += 1
        self.progress.tokens += tokens.numel()
        self.optimiser.step(self.progress.step, rate_scale(self.share()))
        return whole.detach() / total, answers / (weights >= 1.0).sum().clamp(min=1)

    def run(self) -> None:
        """Train one leg."""
        a, progress = self.arguments, self.progress
        generator = None
        if a.shards is None:
            generator = ["--tokenizer", str(a.tokenizer), "--out", str(a.run / "shards"),
                         "--seed", str(a.seed), "--workers", str(a.workers),
                         "--shards", "1000000", "--lectures", str(a.lectures)]  # fmt: skip
            if a.corpus is not None:
                generator += ["--corpus", str(a.corpus)]
        folder = a.shards or a.run / "shards"
        shards = Shards(folder, progress.shard, generator, replay=not a.steps)
        probe = Probe(a.tokenizer)
        if a.probe is not None:
            probe.read(a.probe)
        if a.corpus is not None and a.held_out:
            probe.make(Maker(Corpus.load(a.corpus), held_out=True), a.held_out)
        stream = batches(shards, a.rows, self.device)
        log = (a.run / "log.jsonl") if a.run.is_dir() or a.run.mkdir(parents=True) is None else None
        assert log is not None
        try:
            self._leg(stream, shards, probe, log)
        except EOFError as error:
            print(error, flush=True)
        finally:
            shards.close()
        progress.shard = shards.number
        self.save()
        export(self.model, a.tokenizer, a.run / "model", vars(progress))
        print(json.dumps(probe.measure(self.model, self.device)), flush=True)
        print(f"leg ends: {json.dumps(vars(progress))}", flush=True)

    def _leg(self, stream: Any, shards: Shards, probe: Probe, log: Path) -> None:
        a, progress = self.arguments, self.progress
        # The first step compiles; the clock of the schedule starts behind it.
        losses = self.step(next(stream))
        _synchronise(self.device)
        began = logged = time.perf_counter()
        before, tokens, probed = progress.seconds, progress.tokens, progress.seconds
        while self.share() < 1.0:
            now = time.perf_counter()
            if now - began >= 60.0 * a.leg:
                break
            if now - logged >= _LOG_SECONDS or (a.steps and progress.step % 10 == 0):
                row = {"step": progress.step, "loss": round(losses[0].item(), 4),
                       "answers": round(losses[1].item(), 4),
                       "tokens": progress.tokens, "share": round(self.share(), 4),
                       "tokens_per_s": round((progress.tokens - tokens) / max(now - logged, 1e-9)),
                       "shard": shards.number, "replayed": shards.replayed}  # fmt: skip
                if progress.seconds - probed >= a.probe_seconds:
                    probed = progress.seconds
                    row |= probe.measure(self.model, self.device)
                with log.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
                logged, tokens = time.perf_counter(), progress.tokens
            losses = self.step(next(stream))
            if progress.step % 8 == 0:
                _synchronise(self.device)  # or the clock would run ahead of the device
            progress.seconds = before + time.perf_counter() - began
        _synchronise(self.device)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoint and logs")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, help="collected text; own text only if not given")
    parser.add_argument("--shards", type=Path, help="shards made before; else made alongside")
    parser.add_argument("--minutes", type=float, default=18.0, help="training time of all legs")
    parser.add_argument("--leg", type=float, default=7.5, help="minutes of this leg at most")
    parser.add_argument("--steps", type=int, default=0, help="schedule by steps, not by the clock")
    parser.add_argument("--resume", action="store_true", help="go on from the run's checkpoint")
    parser.add_argument("--start-from", type=Path, help="an exported model to go on from")
    parser.add_argument("--rows", type=int, default=32, help="rows of a batch")
    parser.add_argument("--rate", type=float, default=0.02, help="Muon's learning rate")
    parser.add_argument("--other-rate", type=float, default=3e-3, help="Adam's learning rate")
    parser.add_argument("--context-weight", type=float, default=0.1)
    parser.add_argument(
        "--lead-weight", type=float, default=5.0, help="of an answer's first tokens"
    )
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--lectures", type=float, default=LECTURES, help="share of lecture notes")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shape", default="{}", help="JSON with other sizes, for trials")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--attention", choices=("flex", "dense", "causal"), default="flex")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--probe", type=Path, help="prompts whose citation is known, JSON Lines")
    parser.add_argument(
        "--held-out", type=int, default=100, help="examples to measure with, a kind"
    )
    parser.add_argument("--probe-seconds", type=float, default=120.0)
    return parser.parse_args(given)


def main() -> None:
    Trainer(arguments()).run()


if __name__ == "__main__":
    main()
