"""The demo model: whole, deterministic, safe for Chinese, English and anything else."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.config.model import ModelConfig
from serving.demo_model import ensure_demo_model, make
from serving.demo_model.make import CONTEXT, MARKER, demo_model, read_marker, served_name
from serving.demo_model.vocabulary import build_tokenizer, common_characters
from serving.errors import ConfigError
from serving.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines: list[str] = []
    place = tmp_path_factory.mktemp("home") / "demo-model"
    assert ensure_demo_model(place, lines.append) == place
    assert len(lines) == 2
    return place


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    found = Tokenizer.from_folder(folder)
    assert found is not None
    return found


def digest(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def test_the_folder_is_a_checkpoint(folder: Path, tokenizer: Tokenizer) -> None:
    config = ModelConfig.from_folder(folder)
    assert config.family == "qwen3"
    assert config.context_length == CONTEXT
    assert config.vocab_size >= tokenizer.vocab_size
    assert tokenizer.encode("<|im_end|>")[0] in config.eos_token_ids
    marker = read_marker(folder)
    assert marker["untrained"] is True
    assert 8e6 < marker["parameters"] < 13e6


def test_it_is_the_same_every_time_and_made_once(folder: Path, tmp_path: Path) -> None:
    again = ensure_demo_model(tmp_path / "demo-model")
    assert digest(again) == digest(folder)
    before = {path: path.stat().st_mtime_ns for path in again.iterdir()}
    lines: list[str] = []
    ensure_demo_model(again, lines.append)
    assert {path: path.stat().st_mtime_ns for path in again.iterdir()} == before
    assert lines == []
    assert [path.name for path in tmp_path.iterdir()] == ["demo-model"]


def test_common_text_is_short(tokenizer: Tokenizer) -> None:
    assert len(common_characters()) == 3755
    assert len(tokenizer.encode("编译器的词法分析，怎么做？")) == 13
    assert len(tokenizer.encode(" the compiler parses a grammar")) <= 8


@given(st.text(max_size=60))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_the_chat_template(tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "你好"}]
    ids = tokenizer.apply_chat_template(messages)
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    )


def test_merges_have_tokens() -> None:
    state = json.loads(build_tokenizer().to_str())["model"]
    for left, right in state["merges"]:
        assert left + right in state["vocab"]


def test_a_place_that_is_taken_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "demo-model").mkdir()
    (tmp_path / "demo-model" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="does not hold the demo model"):
        ensure_demo_model(tmp_path / "demo-model")
    assert (tmp_path / "demo-model" / "thesis.txt").read_text() == "mine"


def test_an_older_version_is_made_again(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "demo-model"
    place.mkdir()
    (place / MARKER).write_text('{"version": 0}')
    assert digest(ensure_demo_model(place)) == digest(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["demo-model"]


def test_two_processes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    place = tmp_path / "demo-model"
    both = [context.Process(target=ensure_demo_model, args=(place,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert read_marker(place)["untrained"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["demo-model"]


def test_the_trained_model_is_served_once_its_weights_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    trained = tmp_path / "lectern-tiny"
    monkeypatch.setattr(make, "TRAINED", trained)
    home = tmp_path / "home"
    assert demo_model(home) == home / "demo-model"
    assert served_name() == "lectern-demo"
    trained.mkdir()
    index = trained / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    (trained / "one.safetensors").touch()
    assert served_name() == "lectern-demo"  # half of it is not a model
    (trained / "two.safetensors").touch()
    assert demo_model(home) == trained
    assert served_name() == "lectern-tiny"
