"""The `lectern` command.

Each subcommand belongs to one part of the house, and only that part is imported when it is
called: `lectern serve` never loads the backend, `lectern web` never loads torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

import typer

#: subcommand -> (module whose `register(app)` adds it, the line shown by `lectern --help`)
SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "up": ("deploy.up", "Start engine, backend, index worker and page on this machine."),
    "serve": ("serving.cli", "Start one engine alone, with an OpenAI-style API."),
    "bench": ("serving.cli", "Run a load against an engine and print its figures."),
    "simulate": ("serving.cli", "Run the scheduler against predicted step times, without a GPU."),
    "eval": ("rag.cli", "Measure retrieval on a folder of documents and questions."),
    "prepare": ("backend.cli", "Create the state directory, the database and the sample course."),
    "backend": ("backend.cli", "Start the backend: accounts, courses, keys, the /v1 gateway."),
    "worker": ("backend.cli", "Start the worker that parses and indexes documents."),
    "user": ("backend.cli", "Add, reset or disable an account."),
    "web": ("web.cli", "Start the web pages."),
}


def _no_operation() -> None:
    """Run Lectern: a course platform with its own language model."""


def _placeholder(line: str) -> Callable[[], None]:
    def command() -> None:
        raise AssertionError("a placeholder only stands in the list of commands")

    command.__doc__ = line
    return command


def build(subcommand: str | None) -> typer.Typer:
    """Return the application with `subcommand` loaded, or with the bare list for None."""
    app = typer.Typer(
        name="lectern",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    app.callback()(_no_operation)
    if subcommand in SUBCOMMANDS:
        importlib.import_module(SUBCOMMANDS[subcommand][0]).register(app)
    else:
        for name, (_, line) in SUBCOMMANDS.items():
            app.command(name)(_placeholder(line))
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `lectern` command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--version"]:
        from importlib.metadata import version

        print(f"lectern {version('lectern')}")
        return
    subcommand = next((word for word in given if not word.startswith("-")), None)
    build(subcommand)(given, prog_name="lectern")


if __name__ == "__main__":
    main()
