"""The files of an index: generation folders, a manifest in each, and the pointer to one of them.

    <folder>/CURRENT                     name of the generation in use
    <folder>/generation-000007/          manifest.json vectors.faiss sparse.npz terms.txt keys.npz

A generation never changes after CURRENT has named it. Readers that opened an older one keep it
in memory, so it may be removed under them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

#: Changes when the files or the texts that are embedded and indexed take another form.
FORMAT = 1
_CURRENT = "CURRENT"
_GENERATION = re.compile(r"^generation-(\d{6,})$")


class IndexMissing(FileNotFoundError):
    """No index was ever built in the folder."""


class IndexCorrupt(RuntimeError):
    """Files of the index are missing or damaged; it has to be built again."""


class EmbedderMismatch(RuntimeError):
    """The index was made by another embedder than the one that asks."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a generation is. `files` holds the SHA-256 of each file by name."""

    generation: int
    embedder: Mapping[str, str | int | bool]
    dim: int
    count: int
    glossary_sha256: str
    files: Mapping[str, str]
    format: int = FORMAT


def current_generation(folder: Path) -> str | None:
    """Return the name of the generation in use, or None if there is none; cheap enough to poll."""
    try:
        name = (folder / _CURRENT).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    return name or None


def open_manifest(folder: Path, name: str, *, verify: bool = True) -> Manifest:
    """Return the manifest of a generation after comparing its files with their digests.

    Raises:
        IndexCorrupt: something is missing or differs.
    """
    place = folder / name
    try:
        raw = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
        if raw.get("format") != FORMAT:
            raise IndexCorrupt(
                f"The index in {place} has format {raw.get('format')} and this program reads"
                f" {FORMAT}; index the course again."
            )
        manifest = Manifest(**raw)
        for file, digest in manifest.files.items():
            if verify and _sha256(place / file) != digest:
                raise IndexCorrupt(f"The file {place / file} is damaged; index the course again.")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise IndexCorrupt(
            f"The index in {place} cannot be read ({error}); index the course again."
        ) from error
    return manifest


def check_embedder(folder: Path, manifest: Manifest, identity: Mapping[str, object]) -> None:
    """Refuse an embedder whose vectors do not belong to those of the index.

    Raises:
        EmbedderMismatch: with both names and what to do.
    """
    made_by = dict(manifest.embedder)
    if made_by == dict(identity):
        return
    old, new = made_by.get("model"), identity.get("model")
    if old == new:
        keys = sorted(k for k in {*made_by, *identity} if made_by.get(k) != identity.get(k))
        difference = f"the same model {new} with another {', '.join(keys)}"
    else:
        difference = f"{new}"
    raise EmbedderMismatch(
        f"The index in {folder} was made with the embedder {old}, and the one set now is"
        f" {difference}; index the course again with it, or set LECTERN_EMBEDDER back to {old}."
    )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the folder's writer lock: one build at a time, across processes."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".writer").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def next_number(folder: Path) -> int:
    return max(_numbers(folder), default=0) + 1


def publish(folder: Path, temporary: Path, manifest: Manifest, keep: int = 2) -> str:
    """Make the finished files in `temporary` the current generation; return its name.

    Every file and folder is on the disk before CURRENT names it, so a crash at any point leaves
    the old generation in use. Generations older than the last `keep` are removed.
    """
    text = json.dumps(asdict(manifest), ensure_ascii=False, indent=1, sort_keys=True)
    (temporary / "manifest.json").write_text(text + "\n", encoding="utf-8")
    for file in temporary.iterdir():
        _sync(file)
    _sync(temporary)
    name = f"generation-{manifest.generation:06d}"
    os.rename(temporary, folder / name)
    pointer = folder / f"{_CURRENT}.new"
    pointer.write_text(name + "\n", encoding="utf-8")
    _sync(pointer)
    os.replace(pointer, folder / _CURRENT)
    _sync(folder)
    for number in sorted(_numbers(folder))[:-keep]:
        shutil.rmtree(folder / f"generation-{number:06d}", ignore_errors=True)
    return name


def digests(place: Path) -> dict[str, str]:
    return {file.name: _sha256(file) for file in sorted(place.iterdir())}


def remove_leftovers(folder: Path) -> None:
    """Remove what builds that were cut short left behind; call it under `writing`."""
    for place in folder.glob("building-*"):
        shutil.rmtree(place, ignore_errors=True)


def _numbers(folder: Path) -> list[int]:
    found = (_GENERATION.match(place.name) for place in folder.iterdir())
    return [int(match.group(1)) for match in found if match]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
