"""Classes of service: the syntax of the options, and what the engine's options are given."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from serving import cli
from serving.api import server
from serving.api.classes import Targets, service_classes
from serving.config.engine import EngineConfig
from serving.config.service import TtftTarget
from serving.demo_model import ensure_demo_model
from serving.errors import ConfigError


def test_built_in_classes() -> None:
    assert service_classes() == {
        "standard": Targets(TtftTarget(2.0, 0.0, 5.0), 0.1),
        "interactive": Targets(TtftTarget(0.5, 0.0005), 0.05),
        "batch": Targets(None, None),
    }


def test_classes_of_the_operator() -> None:
    classes = service_classes(
        "3", "none", ["a.b=max(2+0.001*tokens,5*own),0.2", " batch = 60 , none ", "x=none,1"]
    )
    assert classes["standard"] == Targets(TtftTarget(3.0), None)
    assert classes["a.b"] == Targets(TtftTarget(2.0, 0.001, 5.0), 0.2)
    assert classes["batch"] == Targets(TtftTarget(60.0), None)
    assert classes["x"] == Targets(None, 1.0)
    assert classes["interactive"] == Targets(TtftTarget(0.5, 0.0005), 0.05)


@pytest.mark.parametrize(
    "entry",
    [
        "", "x", "x=", "x=1", "x=max(2,5*own)", "=1,0.1", "x y=1,0.1", "x=1,0.1,", "x=1,0",
        "x=0,0.1", "x=1,2,0.1", "é=1,0.1", f"{'x' * 33}=1,0.1", "x=soon,0.1", "standard=1,0.1",
    ],
)  # fmt: skip
def test_a_wrong_class_names_the_option(entry: str) -> None:
    with pytest.raises(ConfigError) as refused:
        service_classes(more=[entry])
    assert refused.value.flag == "--slo-class"
    assert "--slo-class" in refused.value.message


def test_wrong_targets_name_their_options() -> None:
    with pytest.raises(ConfigError, match="--slo-ttft"):
        service_classes(ttft="max(2)")
    with pytest.raises(ConfigError, match="--slo-tpot"):
        service_classes(tpot="-1")


@pytest.fixture
def serve(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `lectern serve` with options up to where the engine is started."""
    folder = tmp_path_factory.mktemp("model") / "demo"
    ensure_demo_model(folder)
    seen: list[tuple[EngineConfig, Mapping[str, Targets]]] = []

    def run(config: EngineConfig, listening: socket.socket, classes: Mapping[str, Targets]) -> None:
        listening.close()
        seen.append((config, classes))

    monkeypatch.setattr(server, "run", run)
    app = typer.Typer()
    app.command()(cli.serve)

    def go(*arguments: str) -> tuple[EngineConfig, Mapping[str, Targets]] | str:
        done = CliRunner().invoke(app, [str(folder), "--port", "0", *arguments])
        return seen.pop() if done.exit_code == 0 else done.output

    return go


def test_options_reach_the_engine(serve: Any) -> None:
    config, classes = serve(
        "--order", "slo", "--order-window", "8", "--oldest-share", "0.25", "--oldest-age", "3",
        "--fairness-tokens", "100", "--max-predicted-ttft", "30", "--slo-ttft", "4",
        "--slo-tpot", "0.2", "--slo-class", "a=1,none", "--slo-class", "b=max(1,2*own),0.3",
    )  # fmt: skip
    assert (config.order, config.order_window, config.fairness_tokens) == ("slo", 8, 100)
    assert (config.oldest_share, config.oldest_age) == (0.25, 3.0)
    assert config.max_predicted_ttft == 30.0
    assert classes["standard"] == Targets(TtftTarget(4.0), 0.2)
    assert classes["a"] == Targets(TtftTarget(1.0), None)
    assert classes["b"] == Targets(TtftTarget(1.0, 0.0, 2.0), 0.3)


def test_defaults_are_those_of_the_engine(serve: Any) -> None:
    config, classes = serve("--served-model-name", "x")
    assert config == EngineConfig(model=config.model, served_model_name="x")
    assert classes == service_classes()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--order", "random"),
        ("--order-window", "0"),
        ("--oldest-share", "2"),
        ("--max-predicted-ttft", "-1"),
        ("--slo-ttft", "soon"),
        ("--slo-class", "x=1"),
    ],
)
def test_a_wrong_option_is_named(serve: Any, option: str, value: str) -> None:
    assert option in serve(option, value)
