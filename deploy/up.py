"""`lectern up`: the whole platform on one machine, under one supervisor."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Annotated
from urllib.parse import urlsplit

import typer

from deploy.supervisor import (
    BAD_CONFIGURATION,
    Service,
    Supervisor,
    SupervisorError,
    die_with_parent,
    lock_home,
    own_command,
    port_is_free,
)


def default_home() -> Path:
    """The state directory: `LECTERN_HOME`, or `.lectern` in the user's home."""
    return Path(os.environ.get("LECTERN_HOME") or Path.home() / ".lectern")


def register(app: typer.Typer) -> None:
    """Add the command `up`."""
    app.command("up")(up)


def up(
    model: Annotated[
        str,
        typer.Option(help="Folder of a Hugging Face checkpoint, or `demo` for the demo model."),
    ] = "demo",
    pipeline_parallel_size: Annotated[
        int,
        typer.Option(
            min=0,
            help="Pipeline stages the engine runs, a process each; 0: 2 for the demo, else 1.",
        ),
    ] = 0,
    tensor_parallel_size: Annotated[
        int, typer.Option(min=1, help="Processes that share out every layer of a stage.")
    ] = 1,
    device: Annotated[
        str,
        typer.Option(help="auto, cpu or cuda. auto is the CPU for the demo, else GPUs if any."),
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (as the checkpoint says), float32, bfloat16 or float16.")
    ] = "auto",
    served_model_name: Annotated[
        str, typer.Option(help="Name of the model in the API; default: the folder's name.")
    ] = "",
    max_model_len: Annotated[
        int, typer.Option(min=0, help="Longest prompt plus answer in tokens; 0: as the model.")
    ] = 0,
    order: Annotated[
        str,
        typer.Option(
            help="Which waiting prompt the engine serves next: fcfs, priority, lpm, sjf or slo; "
            "default: that of `lectern serve`."
        ),
    ] = "",
    max_predicted_ttft: Annotated[
        float,
        typer.Option(
            min=0,
            help="The engine refuses a request with 429 when its first token is predicted to take "
            "longer than so many seconds; 0: never.",
        ),
    ] = 0,
    upstream: Annotated[
        str,
        typer.Option(help="Address of a running OpenAI-style server; no engine is started then."),
    ] = "",
    embedder: Annotated[
        str,
        typer.Option(
            help="sentence-transformers name or folder for course search; "
            "default: the small English model that is installed with Lectern."
        ),
    ] = "",
    home: Annotated[
        Path | None,
        typer.Option(help="State directory; default: LECTERN_HOME, or .lectern in your home."),
    ] = None,
    host: Annotated[
        str,
        typer.Option(help="Address page and API listen on. The engine stays on loopback."),
    ] = "127.0.0.1",
    web_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 8501,
    backend_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the API.")] = 8080,
    engine_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of the engine, on loopback.")
    ] = 8100,
) -> None:
    """Start engine, backend, index worker and page, and keep them running until Ctrl-C."""
    started = time.monotonic()
    reach = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    state = (home or default_home()).expanduser().resolve()
    os.umask(0o077)  # logs and caches of every part are for this user alone
    try:
        lock = _take_state(state)
        _check_ports(host, web_port, backend_port, None if upstream else engine_port)
        environment = {
            "LECTERN_HOME": str(state),
            "LECTERN_UPSTREAM_URL": _address(upstream) or f"http://127.0.0.1:{engine_port}",
            "LECTERN_BACKEND_URL": f"http://{reach}:{backend_port}",
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if embedder:
            environment["LECTERN_EMBEDDER"] = embedder
        _prepare(environment)
        services = []
        if not upstream:
            command = own_command(
                "serve", model, "--port", str(engine_port), "--dtype", dtype,
                *_layout(model, pipeline_parallel_size, tensor_parallel_size, device),
            )  # fmt: skip
            if served_model_name:
                command += ["--served-model-name", served_model_name]
            if max_model_len:
                command += ["--max-model-len", str(max_model_len)]
            command += _service(order, max_predicted_ttft)
            services.append(
                Service("engine", command, environment, ("127.0.0.1", engine_port, "/health"))
            )
        # Search and indexing share the machine with the engine: one thread each.
        modest = {**environment, "OMP_NUM_THREADS": "1"}
        services += [
            Service(
                "backend",
                own_command("backend", "--host", host, "--port", str(backend_port)),
                modest,
                (reach, backend_port, "/health"),
            ),
            Service("worker", own_command("worker"), modest),
            Service(
                "web",
                own_command("web", "--host", host, "--port", str(web_port)),
                environment,
                (reach, web_port, "/_stcore/health"),
            ),
        ]

        def ready() -> None:
            print(f"\nLectern is ready after {time.monotonic() - started:.0f} s.")
            print(f"  page    http://{reach}:{web_port}")
            print(f"  API     http://{reach}:{backend_port}/v1   (keys are made on the page)")
            first = state / "initial-login"
            if first.exists():
                print(f"  logins  {first}")
            print(f"  logs    {state / 'logs'}")
            print("Ctrl-C stops everything.", flush=True)

        code = Supervisor(services, state / "logs").run(ready)
        lock.close()
    except SupervisorError as error:
        print(f"lectern: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    raise typer.Exit(code)


def _layout(model: str, stages: int, ranks: int, device: str) -> list[str]:
    """The engine's processes and where they run. The demo is made for CPU cores: its two stages
    would not fit a machine with one GPU."""
    demo = model == "demo"
    return [
        "--pipeline-parallel-size", str(stages or (2 if demo else 1)),
        "--tensor-parallel-size", str(ranks),
        "--device", "cpu" if demo and device == "auto" else device,
    ]  # fmt: skip


def _service(order: str, max_predicted_ttft: float) -> list[str]:
    """Options that say whom the engine serves next and whom it refuses; those not given are its
    own affair."""
    options = ["--order", order] if order else []
    if max_predicted_ttft:
        options += ["--max-predicted-ttft", str(max_predicted_ttft)]
    return options


def _take_state(state: Path) -> IO[str]:
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        return lock_home(state)
    except OSError as error:
        raise SupervisorError(
            f"The state directory {state} cannot be used: {error.strerror}. "
            "Choose another with --home or LECTERN_HOME.",
            BAD_CONFIGURATION,
        ) from None


def _address(upstream: str) -> str:
    if upstream and urlsplit(upstream).scheme not in ("http", "https"):
        raise SupervisorError(
            f"--upstream {upstream} is not an address. Give it as http://HOST:PORT.",
            BAD_CONFIGURATION,
        )
    return upstream.rstrip("/").removesuffix("/v1")


def _check_ports(host: str, web: int, backend: int, engine: int | None) -> None:
    wanted = [(host, web, "--web-port"), (host, backend, "--backend-port")]
    if engine is not None:
        wanted.append(("127.0.0.1", engine, "--engine-port"))
    numbers = [port for _, port, _ in wanted]
    for address, port, flag in wanted:
        if numbers.count(port) > 1:
            raise SupervisorError(
                f"Port {port} is asked for twice. Choose another with {flag}.", BAD_CONFIGURATION
            )
        try:
            free = port_is_free(address, port)
        except OSError as error:
            raise SupervisorError(
                f"Port {port} on {address} cannot be used: {error.strerror}. Give an address of "
                f"this machine with --host, or another port with {flag}.",
                BAD_CONFIGURATION,
            ) from None
        if not free:
            raise SupervisorError(
                f"Port {port} on {address} is in use. Stop what listens there, "
                f"or choose another with {flag}.",
                BAD_CONFIGURATION,
            )


def _prepare(environment: dict[str, str]) -> None:
    """Run `lectern prepare` to its end; what it says goes to the terminal."""
    done = subprocess.run(
        own_command("prepare"),
        env={**os.environ, **environment},
        preexec_fn=die_with_parent(os.getpid()),
        check=False,
    )
    if done.returncode == BAD_CONFIGURATION:
        raise SystemExit(BAD_CONFIGURATION)  # it has said why
    if done.returncode:
        raise SupervisorError(f"Preparing the state directory failed (code {done.returncode}).")
