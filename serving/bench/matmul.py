"""`python -m serving.bench.matmul`: the matrix products of a load alone, in a process of its own.

Reads {"model", "lengths", "dtype", "max_num_batched_tokens", "threads"} as JSON from standard
input and prints the seconds. Its memory is gone before the engine starts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from serving.errors import ConfigError


def matmul_seconds(
    model: Path,
    lengths: list[tuple[int, int]],
    dtype: str,
    max_num_batched_tokens: int,
    threads: int | None,
) -> float:
    """Seconds of the load's matrix products on this machine, as `matrix_product_seconds`."""
    settings = {
        "model": str(model),
        "lengths": lengths,
        "dtype": dtype,
        "max_num_batched_tokens": max_num_batched_tokens,
        "threads": threads,
    }
    done = subprocess.run(
        [sys.executable, "-m", "serving.bench.matmul"],
        input=json.dumps(settings),
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(f"The matrix products could not be timed: {last}; use --no-matmul.")
    return float(done.stdout)


def main() -> None:
    settings = json.load(sys.stdin)
    import torch

    from serving.config.model import ModelConfig
    from serving.kernels.matmul_time import matrix_product_seconds

    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    config = ModelConfig.from_folder(settings["model"])
    dtype = config.dtype if settings["dtype"] == "auto" else settings["dtype"]
    print(
        matrix_product_seconds(
            config,
            [tuple(size) for size in settings["lengths"]],
            getattr(torch, dtype),
            max_num_batched_tokens=settings["max_num_batched_tokens"],
        )
    )


if __name__ == "__main__":
    main()
