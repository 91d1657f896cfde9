"""Which device a rank of a stage runs on, and who else runs there."""

from __future__ import annotations

import torch

from serving.config.engine import EngineConfig
from serving.errors import ConfigError

__all__ = ["choose_device", "workers_on"]


def choose_device(config: EngineConfig, stage: int, rank: int = 0) -> torch.device:
    """As configured; else a GPU for each rank of each stage where there are any, else the CPU.

    Raises ConfigError where that cannot be.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = config.stage_device(stage, rank)
    stages, ranks = config.pipeline_parallel_size, config.tensor_parallel_size
    if config.devices is not None:
        _check_kinds(config.devices, found)
    elif name != "cpu" and (found or name != "auto") and found < stages * ranks:
        raise ConfigError(_too_few(stages, ranks, found), _flag(config))
    if name == "auto":
        name = f"cuda:{stage * ranks + rank}" if found else "cpu"
    device = torch.device(name)
    if device.type == "cpu" and stages > 1 and config.transport != "auto":
        raise ConfigError(
            f"--transport {config.transport} links stages on GPUs, and these run on the CPU, where "
            "gloo links them; leave it at auto.",
            "--transport",
        )
    if device.type == "cpu" and config.attention == "flashinfer":
        raise ConfigError(
            "--attention flashinfer runs on NVIDIA GPUs, and this stage runs on the CPU; leave it "
            "at auto.",
            "--attention",
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def workers_on(config: EngineConfig, device: torch.device) -> int:
    """How many ranks of stages use this GPU."""
    if config.devices is None:
        return 1
    others = (torch.device(name) for name in config.devices)
    return sum(other.type == device.type and (other.index or 0) == device.index for other in others)


def _check_kinds(devices: list[str], found: int) -> None:
    parsed = [torch.device(name) for name in devices]
    if len({device.type for device in parsed}) > 1:
        raise ConfigError(
            f"--devices mixes kinds of devices ({', '.join(devices)}), which no transport links; "
            "give GPUs only, or the CPU only.",
            "--devices",
        )
    for name, device in zip(devices, parsed, strict=True):
        if device.type == "cuda" and (device.index or 0) >= found:
            raise ConfigError(
                f"--devices names {name}, and torch finds {_gpus(found)} here; check the driver "
                "with nvidia-smi, or name others.",
                "--devices",
            )


def _too_few(stages: int, ranks: int, found: int) -> str:
    needed = f"{stages} pipeline stage{'s' if stages > 1 else ''}"
    if ranks > 1:
        needed += f" of {ranks} ranks"
    if not found:
        return (
            f"GPUs were asked for, for {needed}, and torch finds no GPU here; check the driver "
            "with nvidia-smi, or use --device cpu."
        )
    return (
        f"{needed} need {_gpus(stages * ranks)}, and torch finds {_gpus(found)} here; lower "
        f"{'--tensor-parallel-size' if stages == 1 else '--pipeline-parallel-size'}, let stages "
        "share a GPU with --devices such as cuda:0,cuda:0, or use --device cpu."
    )


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count or 'no'} GPUs"


def _flag(config: EngineConfig) -> str:
    if config.pipeline_parallel_size > 1:
        return "--pipeline-parallel-size"
    return "--tensor-parallel-size" if config.tensor_parallel_size > 1 else "--device"
