"""Text in, token ids out, and back: tokenizers, chat templates, streaming detokenisation."""

from serving.tokenizer.detokenizer import Detokenizer
from serving.tokenizer.tokenizer import Tokenizer

__all__ = ["Detokenizer", "Tokenizer"]
