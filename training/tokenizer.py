"""Train the byte-level BPE vocabulary that target and draft share.

The pre-tokenizer is the regular expression that llama.cpp calls ``qwen2`` (digits stand alone, so sums are
read digit by digit), without normalisation, so that llama.cpp cuts and merges every text exactly as
``tokenizers`` does.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

import corpus
import lexicon as lex

VOCAB_SIZE = 2560
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]  # ids 0, 1, 2, 3
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


CHINESE_WORDS = {
    *(name for names in lex.NAMES_ZH.values() for name in names),
    *(kind.zh for kind in lex.KINDS),
    *(thing.zh for thing in lex.THINGS),
    *(colour for _, colour in lex.COLOURS),
    *(place for _, place in lex.PLACES),
    *(food for _, food in lex.FOODS),
    *("他们", "她们", "他", "她", "它"),
}
BOUNDARIES = re.compile("(" + "|".join(sorted(CHINESE_WORDS, key=lambda w: (-len(w), w))) + ")")


def pieces(documents: int) -> Iterator[str]:
    """Texts, cut around the Chinese words of the stories: no token joins a name to its neighbour."""
    for doc in itertools.islice(corpus.documents("train"), documents):
        yield from filter(None, BOUNDARIES.split(doc.text))


def build(documents: int) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces(documents), trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the corpus gave {tokenizer.get_vocab_size()} tokens, expected {VOCAB_SIZE}")
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=20_000, help="training documents to count pairs in")
    parser.add_argument("--out", type=Path, default=Path("build/tokenizer.json"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    build(args.documents).save(str(args.out))


if __name__ == "__main__":
    main()
