"""Soak test of the engine alone, on GPUs or the CPU: `python -m tests.soak.engine --help`.

A mix of chats, long prompts and code arrives for some minutes, without the prefix cache's help and
with it; one request in ten is given up at a random moment, before, while or after its first token.
It then checks that no request failed, that all others got every token, that all KV pages are free,
and that the memory of all processes and of the GPUs is within 5 % of what it was after a fifth of
the time. It needs no HTTP parts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from contextlib import aclosing
from typing import Any

import psutil
import torch

from serving.bench.loads import workload
from serving.cli import resolve_model
from serving.config.engine import EngineConfig
from serving.core import SamplingParams
from serving.engine import Engine
from tests.soak.memory import memory_bytes

KINDS = ("chat", "long", "code")
_GIVEN_UP = 0.1
_MOST_GROWTH = 0.05


class Soak:
    """Requests of one run: `source` decides their sizes, and when they are given up."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine = engine
        self.source = random.Random(seed)
        self.ended: Counter[str] = Counter()
        self.errors: list[str] = []
        self.tokens = 0
        drawn = {kind: workload.lengths(kind, 500, seed) for kind in KINDS}
        most = engine.max_model_len
        self.sizes = [
            (before, after)
            for lengths in drawn.values()
            for before, after in lengths
            if before + after <= most
        ]
        if not self.sizes:
            sys.exit(f"No request fits {most} tokens; raise --max-model-len.")
        self.start = [self.source.randrange(100, 200) for _ in range(2000)]

    async def one(self) -> None:
        before, after = self.source.choice(self.sizes)
        shared = self.source.randrange(before) if self.source.random() < 0.5 else 0
        shared = min(shared, len(self.start))
        own = [self.source.randrange(100, 200) for _ in range(before - shared)]
        patience = self.source.random() * 3 if self.source.random() < _GIVEN_UP else None
        params = SamplingParams(max_tokens=after, temperature=1.0, ignore_eos=True)
        got = 0
        try:
            async with asyncio.timeout(patience):
                outputs: Any = self.engine.generate([*self.start[:shared], *own], params)
                async with aclosing(outputs) as stream:
                    async for output in stream:
                        got += len(output.token_ids)
        except TimeoutError:
            self.ended["given up"] += 1
            return
        except Exception as error:
            self.errors.append(f"{type(error).__name__}: {error}")
            return
        finally:
            self.tokens += got
        if got == after:
            self.ended["length"] += 1
        else:
            self.errors.append(f"{got} tokens instead of {after}")

    async def arrive(self, rate: float, seconds: float) -> None:
        """Let requests arrive for so long, and all of them end."""
        until = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            while time.monotonic() < until:
                group.create_task(self.one())
                await asyncio.sleep(self.source.expovariate(rate))


def device_bytes() -> int:
    """Memory in use on all GPUs, whoever uses it."""
    used = 0
    for device in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(device)
        used += total - free
    return used


async def soak(a: argparse.Namespace) -> bool:
    folder, name = resolve_model(a.model)
    engine = await Engine.start(
        EngineConfig(
            model=folder, served_model_name=name, load_format=a.load_format, dtype=a.dtype,
            pipeline_parallel_size=a.pipeline_parallel_size,
            tensor_parallel_size=a.tensor_parallel_size,
            devices=a.devices.split(",") if a.devices else None,
            max_model_len=a.max_model_len, max_num_seqs=a.max_num_seqs,
            max_num_batched_tokens=a.max_num_batched_tokens,
            layer_rebalance=a.layer_rebalance,
        )
    )  # fmt: skip
    run = Soak(engine, a.seed)
    root = psutil.Process(os.getpid())
    seconds = 60 * a.minutes
    try:
        first = asyncio.create_task(run.arrive(a.rate, seconds))
        await asyncio.sleep(seconds / 5)
        early = (memory_bytes(root), device_bytes())
        await first
        late = (memory_bytes(root), device_bytes())
        for _ in range(200):
            stats = engine.stats
            if not (stats.running or stats.waiting or stats.in_flight or stats.pages_used):
                break
            await asyncio.sleep(0.05)
        stats = engine.stats
    finally:
        await engine.close()
    growth = [
        after / before - 1 if before else 0.0 for before, after in zip(early, late, strict=True)
    ]
    busy = stats.running + stats.waiting + stats.in_flight + stats.pages_used
    print(
        json.dumps(
            {
                "model": name, "pp": a.pipeline_parallel_size, "tp": a.tensor_parallel_size,
                "seconds": round(seconds, 1), "rate": a.rate, "ended": dict(run.ended),
                "errors": len(run.errors), "tokens": run.tokens,
                "preemptions": stats.preemptions, "restarts": stats.restarts,
                "kv_pages": {"free": stats.pages_free, "cached": stats.pages_cached,
                             "used": stats.pages_used},
                "memory_mib": [early[0] >> 20, late[0] >> 20],
                "device_memory_mib": [early[1] >> 20, late[1] >> 20],
                "growth": [round(one, 4) for one in growth],
            }
        )
    )  # fmt: skip
    for error in run.errors[:10]:
        print(error, file=sys.stderr)
    return (
        not run.errors and not busy and not stats.restarts
        and run.ended["length"] > 0 and run.ended["given up"] > 0
        and max(growth) <= _MOST_GROWTH
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Soak test of the engine alone.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--devices", default="")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--layer-rebalance", default="off")
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    passed = asyncio.run(soak(parser.parse_args()))
    print("PASS" if passed else "FAIL")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
