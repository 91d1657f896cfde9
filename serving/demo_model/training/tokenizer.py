"""Trains the model's byte-level BPE tokenizer on its own training text.

    python -m serving.demo_model.training.tokenizer --corpus FILE --out FOLDER

Each common Chinese character becomes one token before longer words are learnt, so that text of
other subjects is not cut into bytes. Digits stay single, so that numbers are copied digit by digit.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from serving.demo_model.training.corpus import Corpus
from serving.demo_model.training.examples import Maker
from serving.demo_model.training.lectures import lectures
from serving.demo_model.training.lexicon import common_characters
from serving.demo_model.training.prompts import END_OF_TEXT, TURN_END, TURN_START
from serving.demo_model.vocabulary import write_tokenizer

VOCABULARY = 12_032
#: A character of GB 2312's first level counts this often, so that its bytes are joined first.
_CHARACTER_COUNT = 400
_PUNCTUATION = "，。！？；：、（）《》“”‘’【】—…·›"
#: Chinese words of grammar stand alone, so that a term beside them is cut the same everywhere.
_GRAMMAR = "的了和与或在是有把被就都也不这那个从到对为以及其"
#: Latin words with the space before them, runs of Chinese, digits alone.
_SPLIT = (
    r"[^\S\n]?[A-Za-z]+"
    rf"|[{_GRAMMAR}]|[\u3400-\u9fff&&[^{_GRAMMAR}]]+"
    r"|\d|[^\S\n]?[^\sA-Za-z\d\u3400-\u9fff]{1,4}|\n+|[^\S\n]+"
)


def _texts(corpus: Corpus, examples: int, seed: int) -> Iterator[str]:
    for character in [*common_characters(), *_PUNCTUATION]:
        yield from [character] * _CHARACTER_COUNT
    for passage in corpus.passages:
        yield passage.body
    for english, chinese in corpus.pairs:
        yield english
        yield chinese
    for lecture in lectures():
        yield from [lecture.passage.body] * 20
    maker = Maker(corpus)
    rng = Random(f"tokenizer-{seed}")
    for _ in range(examples):
        for piece in maker.example(rng).pieces():
            yield from piece


def train(
    corpus: Corpus, *, vocabulary: int = VOCABULARY, examples: int = 3000, seed: int = 1
) -> Tokenizer:
    """Return a tokenizer of `vocabulary` tokens, special ones included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True) for t in (END_OF_TEXT, TURN_START, TURN_END)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus, examples, seed), trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tokenizer.")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--context", type=int, default=4096)
    a = parser.parse_args()
    tokenizer = train(Corpus.load(a.corpus), vocabulary=a.vocabulary)
    a.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, a.out, a.context)
    print(f"{a.out}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
