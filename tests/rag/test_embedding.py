"""Embedders: the packaged model, the hashing one, and clear refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rag.embedding import (
    DEFAULT_EMBEDDER,
    EmbedderError,
    HashingEmbedder,
    Prompts,
    SentenceEmbedder,
    find_folder,
    load_embedder,
)


@pytest.fixture(scope="module")
def packaged() -> SentenceEmbedder:
    embedder = load_embedder(DEFAULT_EMBEDDER, threads=2)
    assert isinstance(embedder, SentenceEmbedder)
    return embedder


def test_hashing_embedder_is_deterministic_and_of_unit_length() -> None:
    texts = ["register allocation", "寄存器分配", "", "register allocation"]
    vectors = HashingEmbedder().embed_documents(texts)
    assert vectors.shape == (4, 256)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 1, 0, 1], atol=1e-6)
    np.testing.assert_array_equal(vectors[0], vectors[3])
    np.testing.assert_array_equal(vectors, HashingEmbedder().embed_queries(texts))
    # Fixed places: another process or version must give the same vectors.
    assert np.flatnonzero(vectors[0]).tolist() == [45, 163]


def test_the_packaged_model_tells_what_it_is_without_loading() -> None:
    code = (
        "import sys; from rag.embedding import load_embedder; e = load_embedder();"
        "assert e.identity['dim'] == e.dim == 384, e.identity; assert e.english_only;"
        "assert 'torch' not in sys.modules and 'sentence_transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_the_packaged_model_puts_near_texts_near(packaged: SentenceEmbedder) -> None:
    seen: list[tuple[int, int]] = []
    documents = ["Variables that do not fit into registers are stored on the stack.", "A banana."]
    vectors = packaged.embed_documents(documents, lambda done, total: seen.append((done, total)))
    query = packaged.embed_queries(["Where do values go when registers run out?"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    scores = (query @ vectors.T)[0]
    assert scores[0] > scores[1] + 0.2
    assert seen == [(0, 2), (2, 2)]
    assert packaged.embed_documents([]).shape == (0, 384)


def test_the_order_of_texts_is_kept(packaged: SentenceEmbedder) -> None:
    texts = ["short", "a much longer text about parsing tables and states", "mid length text"]
    together = packaged.embed_documents(texts)
    alone = np.concatenate([packaged.embed_documents([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_a_folder_with_prompts_has_its_own_identity(packaged: SentenceEmbedder) -> None:
    folder = str(find_folder(DEFAULT_EMBEDDER))
    other = load_embedder(folder, prompts=Prompts("query: ", "passage: "))
    assert other.identity != packaged.identity
    assert other.identity["query_prompt"] == "query: "
    assert other.identity["weights_sha256"] == packaged.identity["weights_sha256"]


def test_other_weights_under_the_default_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not the weights")
    monkeypatch.setattr("rag.embedding.find_folder", lambda name: tmp_path)
    with pytest.raises(EmbedderError, match="not the ones"):
        _ = load_embedder(DEFAULT_EMBEDDER).identity


def test_missing_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(EmbedderError, match="nothing is downloaded"):
        load_embedder("somebody/no-such-model")
    with pytest.raises(EmbedderError, match="no sentence-transformers model"):
        load_embedder(str(tmp_path))
    with pytest.raises(EmbedderError, match="neither a folder"):
        load_embedder("not a valid//name")


def test_the_setting_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LECTERN_EMBEDDER", "hashing")
    assert isinstance(load_embedder(), HashingEmbedder)
