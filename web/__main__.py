"""`python -m web` starts the web application alone."""

from __future__ import annotations

import typer

from web.cli import register

app = typer.Typer(add_completion=False)
register(app)

if __name__ == "__main__":
    app()
