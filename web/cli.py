"""The command `web`."""

from __future__ import annotations

from typing import Annotated

import typer


def web(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8501,
    backend_url: Annotated[
        str, typer.Option(envvar="LECTERN_BACKEND_URL", help="Where the backend answers.")
    ] = "http://127.0.0.1:8080",
    api_base_url: Annotated[
        str | None,
        typer.Option(
            envvar="LECTERN_API_BASE_URL",
            help="The base URL that students give to an OpenAI client; default: the backend's /v1.",
        ),
    ] = None,
) -> None:
    """Serve the web pages."""
    from web.server import ServeError, serve

    try:
        serve(host, port, backend_url, api_base_url)
    except ServeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


def register(app: typer.Typer) -> None:
    """Add this part's commands to `app`."""
    app.command("web")(web)
