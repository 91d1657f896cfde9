"""Real model shapes, to be run with random weights, by name."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent / "models"


def shape_names() -> list[str]:
    """Names of all shapes, smallest model first."""
    names = [path.name for path in _FOLDER.iterdir() if (path / "config.json").is_file()]
    return sorted(names, key=lambda name: (float(name.rpartition("-")[2].rstrip("b")), name))


def shape_folder(name: str) -> Path | None:
    """Folder of a shape such as `qwen3-8b`, which holds only its config.json."""
    folder = _FOLDER / name
    return folder if name in shape_names() else None
