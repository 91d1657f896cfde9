"""`python -m serving.bench.sampler_time`: what choosing tokens costs on this machine's GPU.

One line for each number of rows and each kind of settings: microseconds on the device from logits
to tokens, and microseconds of the host to launch it. Logits are drawn from a normal distribution
that is flat (deviation 1, as of random weights) or peaked (a few tokens far above the rest).
"""

from __future__ import annotations

import json
import sys
import time
from statistics import median
from typing import Annotated

import typer

from serving.core import SamplingParams

KINDS = {
    "plain": SamplingParams(seed=1),
    "greedy": SamplingParams(temperature=0.0),
    "top_k=50": SamplingParams(seed=1, top_k=50),
    "top_p=0.9": SamplingParams(seed=1, top_p=0.9),
    "top_k=50,top_p=0.9": SamplingParams(seed=1, top_k=50, top_p=0.9),
    "top_k=2000": SamplingParams(seed=1, top_k=2000),
    "min_p=0.05": SamplingParams(seed=1, min_p=0.05),
    "penalties": SamplingParams(seed=1, frequency_penalty=0.5, repetition_penalty=1.1),
    "logprobs=5": SamplingParams(seed=1, logprobs=5),
}
PROMPT = 500  # tokens that a penalised sequence has seen
SETS = 8  # sets of logits that take turns, so that none lies in the cache


def sampler_times(rows: int, vocab: int, dtype: str, shape: str, kind: str) -> tuple[float, float]:
    """Median microseconds of one draw: on the device, and of the host."""
    import numpy as np
    import torch

    from serving.kernels.device import gpu_kernels
    from serving.sampling.device import DeviceSampler

    kernels = gpu_kernels()
    if kernels is None:
        raise SystemExit("lectern: the package triton is needed to draw on a GPU; install it.")
    device = torch.device("cuda")
    sampler = DeviceSampler(vocab, rows, device, [], kernels)
    torch.manual_seed(0)
    sets = []
    for _ in range(SETS):
        logits = torch.randn(rows, vocab, device=device)
        if shape == "peaked":
            logits = logits * 2.5
            logits[:, :: vocab // 12] += 14
        sets.append(logits.to(getattr(torch, dtype)))
    tokens = np.random.default_rng(0).integers(0, vocab, PROMPT).tolist()
    for slot in range(rows):
        sampler.admit(slot, KINDS[kind], tokens, PROMPT)
    host = np.arange(rows)
    positions = np.full(rows, PROMPT)
    numbers = sampler.numbers(host, positions)
    slots = torch.arange(rows, dtype=torch.int32, device=device)
    temperature = torch.from_numpy(numbers.temperature).to(device)
    uniform = torch.rand(rows, dtype=torch.float64, device=device)
    last = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    out = torch.zeros(rows, dtype=torch.int32, device=device)
    on_device, on_host = [], []
    for turn in range(5 + 40):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        # Something long goes before, so that the device does not wait for the host in between.
        torch.cuda._sleep(2_000_000)  # type: ignore[no-untyped-call]
        began = time.perf_counter()
        start.record()
        sampler.draw(
            sets[turn % SETS], host, positions, slots=slots, temperature=temperature,
            uniform=uniform, last_tokens=last, out=out,
        )  # fmt: skip
        end.record()
        launched = time.perf_counter() - began
        torch.cuda.synchronize()
        if turn >= 5:
            on_device.append(start.elapsed_time(end) * 1e3)
            on_host.append(launched * 1e6)
    return median(on_device), median(on_host)


def main(
    rows: Annotated[list[int], typer.Option(help="Rows of a step.")] = [64, 256, 1024],  # noqa: B006
    vocab: Annotated[int, typer.Option(help="Tokens of the vocabulary.")] = 151_936,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    kind: Annotated[
        list[str] | None, typer.Option(help=f"One of: {'; '.join(KINDS)}. All if none is named.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Time the sampler on the GPU."""
    import torch

    if not torch.cuda.is_available():
        print("lectern: no GPU here; run this where nvidia-smi shows one.", file=sys.stderr)
        raise typer.Exit(1)
    for name in kind or list(KINDS):
        if name not in KINDS:
            print(f"lectern: {name} is no kind; take one of {'; '.join(KINDS)}.", file=sys.stderr)
            raise typer.Exit(1)
        for shape in ("flat", "peaked"):
            for count in rows:
                device, host = sampler_times(count, vocab, dtype, shape, name)
                if as_json:
                    row: dict[str, object] = {"kind": name, "logits": shape, "rows": count}
                    row |= {
                        "vocab": vocab,
                        "dtype": dtype,
                        "device_us": round(device, 1),
                        "host_us": round(host),
                    }
                    print(json.dumps(row), flush=True)
                else:
                    print(
                        f"{name:20} {shape:7} {count:5} rows  {device:8.1f} us on the device  "
                        f"{host:6.0f} us to launch",
                        flush=True,
                    )


if __name__ == "__main__":
    typer.run(main)
