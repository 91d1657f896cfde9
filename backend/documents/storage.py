"""Files of documents below LECTERN_HOME: originals by content hash, texts by document number."""

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from backend.errors import ApiError

_CHUNK = 1024 * 1024


@dataclass(frozen=True)
class StoredFile:
    sha256: str
    bytes: int


class DocumentStorage:
    """Every file is written aside, synced and renamed: a reader never sees half of one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def original(self, sha256: str) -> Path:
        return self._folder / "originals" / sha256[:2] / sha256

    def text_path(self, document_id: int) -> Path:
        return self._folder / "texts" / f"{document_id}.txt"

    def save(self, source: BinaryIO, limit: int) -> StoredFile:
        """Copy a file in; raises ApiError 413 beyond `limit` bytes. Memory use is one chunk."""
        digest, size = hashlib.sha256(), 0
        aside = self._folder / "incoming"
        aside.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=aside)
        try:
            with os.fdopen(handle, "wb") as target:
                while chunk := source.read(_CHUNK):
                    size += len(chunk)
                    if size > limit:
                        raise too_large(limit)
                    digest.update(chunk)
                    target.write(chunk)
                target.flush()
                os.fsync(target.fileno())
            final = self.original(digest.hexdigest())
            final.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.replace(name, final)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return StoredFile(digest.hexdigest(), size)

    def write_text(self, document_id: int, text: str) -> None:
        final = self.text_path(document_id)
        final.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=final.parent)
        try:
            with os.fdopen(handle, "wb") as target:
                target.write(text.encode("utf-8", "replace"))
            os.replace(name, final)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def read_text(self, document_id: int) -> str:
        """The extracted text; raises FileNotFoundError before the document was read."""
        # Read as bytes: text mode would turn "\r" into "\n" and every span behind it would slip.
        return self.text_path(document_id).read_bytes().decode("utf-8")

    def remove_text(self, document_id: int) -> None:
        self.text_path(document_id).unlink(missing_ok=True)

    def remove_original(self, sha256: str) -> None:
        self.original(sha256).unlink(missing_ok=True)


def too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        "request_too_large",
        f"The file is larger than {limit // (1024 * 1024)} MB. Split it, or leave out large "
        "pictures, and upload it again.",
    )
