"""Drivers whose stages are threads of this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.driver import group
from serving.process import make_group_directory, remove_group_directory
from tests.serving.driver.threads import StageThread


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setattr(group, "Child", StageThread)
    monkeypatch.setattr(group, "_SETTLE_SECONDS", 0.05)
    monkeypatch.setenv("LECTERN_HOME", str(tmp_path))
    made = make_group_directory()
    yield made
    remove_group_directory(made)
