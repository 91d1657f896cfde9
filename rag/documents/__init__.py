"""From an uploaded file to its canonical text and the blocks that text is made of."""

from rag.documents.model import Block, BlockKind, Document, DocumentError, Limits
from rag.documents.parse import SUPPORTED_SUFFIXES, is_supported, parse

__all__ = [
    "SUPPORTED_SUFFIXES",
    "Block",
    "BlockKind",
    "Document",
    "DocumentError",
    "Limits",
    "is_supported",
    "parse",
]
