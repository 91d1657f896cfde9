"""Chooses how stages on GPUs are linked, the same way on every stage, and links them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from serving.errors import ConfigError
from serving.transport.base import StreamTransport
from serving.transport.cuda import CudaDriver, LinkRefusedError
from serving.transport.nccl_links import NcclTransport
from serving.transport.peer import Exchange, PeerTransport

__all__ = ["StoreExchange", "agree", "connect_stages"]

# The type stubs of torch know only a part of what is used here.
dist: Any = torch.distributed


class StoreExchange(Exchange):
    """A file that all stages of the group share and nobody else can read."""

    def __init__(self, path: str, stages: int) -> None:
        self.store = dist.FileStore(path, stages)
        # Stages load at different speeds; the driver watches over those that die.
        self.store.set_timeout(timedelta(days=1))

    def publish(self, key: str, text: str) -> None:
        self.store.set(key, f"={text}")

    def lookup(self, key: str) -> str:
        return str(self.store.get(key).decode()).removeprefix("=")


def agree(stage: int, stages: int, refusal: str, exchange: Exchange) -> str:
    """What the first stage that was refused peer links says; empty if none was."""
    exchange.publish(f"refusal-{stage}", refusal)
    found = ((other, exchange.lookup(f"refusal-{other}")) for other in range(stages))
    return next((f"on stage {other}: {text}" for other, text in found if text), "")


def connect_stages(
    kind: str,
    stage: int,
    stages: int,
    stream: torch.cuda.Stream,
    exchange: StoreExchange,
    *,
    max_tokens: int,
    hidden_size: int,
    dtype: torch.dtype,
    max_rows: int,
    shared: bool,
) -> tuple[StreamTransport, str]:
    """The links of one stage, tried out, and a sentence about them.

    `kind` is a value of --transport; `shared` says that stages share a GPU. The stream must be the
    thread's current one. Raises ConfigError where what was asked for is refused.
    """
    sizes: dict[str, Any] = {
        "max_tokens": max_tokens, "hidden_size": hidden_size, "dtype": dtype, "max_rows": max_rows,
    }  # fmt: skip
    why = ""
    transport: StreamTransport | None = None
    if kind in ("auto", "peer"):
        refusal = ""
        try:
            driver = CudaDriver(stream.device)
            peer = PeerTransport(stage, stages, driver, stream.cuda_stream, exchange, **sizes)
        except LinkRefusedError as error:
            PeerTransport.give_up(stage, exchange)
            refusal = str(error)
        else:
            try:
                peer.connect()
                transport = peer
            except LinkRefusedError as error:
                refusal = str(error)
        why = agree(stage, stages, refusal, exchange)
        if why and kind == "peer":
            raise ConfigError(
                f"Peer copies between the stages are refused ({why}); use --transport nccl or "
                "auto.",
                "--transport",
            )
        if why:
            transport = None
    if transport is None:
        if shared:
            raise ConfigError(
                "Stages that share a GPU can only be linked by peer copies, not by NCCL"
                + (f", and those are refused ({why})" if why else "; use --transport auto")
                + ".",
                "--transport",
            )
        transport = NcclTransport(stage, stages, stream, exchange.store, **sizes)
    transport.warm_up()
    size = transport.device_bytes / (1 << 20)
    sentence = f"linked by {transport.name}, {size:.0f} MiB of buffers"
    return transport, sentence + (f"; no peer copies {why}" if why else "")
