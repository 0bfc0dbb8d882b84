"""Tokenize the corpus into rows for training: whole documents only, each row starting with a document.

A row is filled from a small pool with the longest document that still fits, so nothing is cut off and little
is padded. Position 0 is always the start of a document, which is what a prompt looks like at inference.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

import corpus
import lexicon as lex
import messages

PAD = 3
PROMPT_WEIGHT = 0.2  # what others say is worth less of the loss than what the model has to say
RECALL_WEIGHT = 3.0  # a name or a thing that was said before: few tokens, but a story needs them
# Behind its first sentence a story begins to be about what was asked for, or about something else; so does a
# reply.
SUBJECT_WEIGHT = 2.0
SUBJECT_TOKENS = {"chat_story": range(16, 56), "message": range(60)}
COPY_WEIGHT = 4.0  # what an answer to a message has from the message
EXACT_WEIGHT = 5.0  # a placeholder of which one character is wrong stands for nothing
TRANSLATION_WEIGHT = 2.0  # a short answer of which each word counts
LABEL_WEIGHT = 10.0  # the one word that says how hard a request is, behind a long wrapping
WRAPPING_WEIGHT = 0.02
POOL = 256


def recalled_words(tokenizer: Tokenizer) -> dict[int, str]:
    """Tokens that stand for a name, a pronoun, a thing, a place and so on: what a story must not mix up."""
    words = {name for table in (lex.NAMES_EN, lex.NAMES_ZH) for names in table.values() for name in names}
    words |= {*lex.FAMILY_EN, *lex.FAMILY_ZH, *lex.GIVEN_ZH}
    words |= {word for kind in lex.KINDS for word in (kind.en.split()[-1], kind.zh)}
    words |= {word for thing in lex.THINGS for word in (thing.en, thing.zh)}
    words |= {word for trait, zh in lex.TRAITS for word in (trait, zh, zh[:-1])}
    words |= {word for both in lex.BELONGINGS for word in both}
    words |= {word for both in messages.DAYS for word in both}
    words |= {word for colour in lex.COLOURS for word in (*colour, colour[1][:-1])}
    words |= {word for place, zh in lex.PLACES for word in (place.split()[-1], zh)}
    words |= {word for food, zh in lex.FOODS for word in (food.split()[-1], zh)}
    words |= {"he", "him", "his", "He", "His", "she", "her", "She", "Her", "他", "她", "它"}
    texts = {token: tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size())}
    bare = {token: text.strip(" \"'“”‘’，。：；！？、\n") for token, text in texts.items()}
    return {token: text for token, text in bare.items() if text in words}


def emphasised(ids: list[int], weights: list[float], recalled: dict[int, str]) -> list[float]:
    """Raise the weight of names and things that were said before."""
    seen: set[str] = set()
    result = []
    for token, weight in zip(ids, weights, strict=True):
        word = recalled.get(token)
        result.append(max(weight, RECALL_WEIGHT) if weight >= 1.0 and word in seen else weight)
        if word:
            seen.add(word)
    return result


def counted(doc: corpus.Document, tokens: list[str], weights: list[float]) -> list[float]:
    """Raise the weight of digits: those of an answer, and in a plain list of sums those after "="; and of
    all that stands in square brackets.
    """
    result, known, bracket = [], bool(doc.turns), False
    for text, weight in zip(tokens, weights, strict=True):
        known = bool(doc.turns) or "=" in text or (known and (text.isdigit() or text == " "))
        raised = EXACT_WEIGHT if bracket else RECALL_WEIGHT if known and text.isdigit() else weight
        result.append(max(weight, raised) if weight >= 1.0 else weight)
        bracket = "[" in text or (bracket and "]" not in text)
    return result


def cut(text: str) -> list[str]:
    """Most plain texts in two parts, for a model is asked to go on from a part: "从前，" ends in a token "，"
    where the whole text has one for "，有", and it would have to go on from what it has never seen.
    """
    rng = random.Random(text[:80])
    # Where one stops to type: behind a character in Chinese, at a word's end or behind a space in English.
    ends = [
        i for i in range(1, min(32, len(text))) if not text[:i].isascii() or not text[i - 1 : i + 1].isalnum()
    ]
    if not ends or rng.random() < 0.3:
        return [text]
    at = rng.choice(ends)
    return [text[:at], text[at:]]


def copied(ids: list[int], weights: list[float]) -> list[float]:
    """Raise the weight of what an answer to a message has from it, whatever word that is."""
    said = {token for token, weight in zip(ids, weights, strict=True) if weight == PROMPT_WEIGHT}
    return [
        max(weight, COPY_WEIGHT) if weight >= 1.0 and token in said else weight
        for token, weight in zip(ids, weights, strict=True)
    ]


def encode(tokenizer: Tokenizer, doc: corpus.Document) -> tuple[list[int], list[float]]:
    """Token ids and loss weights of one document."""
    if not doc.turns:
        ids = [token for part in cut(doc.text) for token in tokenizer.encode(part).ids]
        return ids, [1.0] * len(ids)
    ids, weights = [], []
    for role, content in doc.turns:
        graded = doc.kind == "triage"
        if role == "assistant":
            own = LABEL_WEIGHT if graded else TRANSLATION_WEIGHT if doc.kind == "translation" else 1.0
        else:
            own = WRAPPING_WEIGHT if graded else PROMPT_WEIGHT
        for text, weight in ((f"<|im_start|>{role}\n", 0.0), (f"{content}<|im_end|>", own), ("\n", 0.2)):
            part = tokenizer.encode(text).ids
            ids += part
            weights += [
                SUBJECT_WEIGHT if weight == 1.0 and i in SUBJECT_TOKENS.get(doc.kind, ()) else weight
                for i in range(len(part))
            ]
    return [*ids, tokenizer.token_to_id(corpus.END_OF_TEXT)], [*weights, 0.2]


def rows(
    split: str, tokenizer: Tokenizer, n_row: int, more: dict[str, float], first: int = 0
) -> Iterator[tuple[list[int], list[float]]]:
    source = corpus.documents(split, more, first)
    recalled = recalled_words(tokenizer)
    pool: list[tuple[list[int], list[float]]] = []
    while True:
        ids: list[int] = []
        weights: list[float] = []
        while True:
            while len(pool) < POOL:
                doc = next(source)
                tokens, weighted = encode(tokenizer, doc)
                if doc.kind in ("sums", "message"):
                    weighted = counted(doc, [tokenizer.decode([t]) for t in tokens], weighted)
                if doc.kind == "message":
                    weighted = copied(tokens, weighted)
                if len(tokens) <= n_row:
                    pool.append((tokens, emphasised(tokens, weighted, recalled)))
            space = n_row - len(ids)
            # The first document is simply the next one; only the last gap is filled by size.
            fitting = [i for i, d in enumerate(pool) if len(d[0]) <= space]
            if not fitting:
                break
            best = fitting[0] if space > n_row // 2 else max(fitting, key=lambda i: len(pool[i][0]))
            part = pool.pop(best)
            ids += part[0]
            weights += part[1]
        gap = n_row - len(ids)
        yield ids + [PAD] * gap, weights + [0.0] * gap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, default=Path("build/tokenizer.json"))
    parser.add_argument("--split", choices=["train", "heldout"], required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument(
        "--row-length", type=int, default=512, help="positions per row (one more token is stored)"
    )
    parser.add_argument(
        "--more",
        nargs="*",
        default=[],
        metavar="KIND=FACTOR",
        help="so many times as many documents of a kind",
    )
    parser.add_argument("--first", type=int, default=0, help="index of the first document, for fresh ones")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    more = {kind: float(factor) for kind, _, factor in (one.partition("=") for one in args.more)}
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    n_row = args.row_length + 1
    tokens = np.empty((args.rows, n_row), np.uint16)
    weights = np.empty((args.rows, n_row), np.float16)
    source = rows(args.split, tokenizer, n_row, more, args.first)
    for i, (ids, w) in zip(range(args.rows), source, strict=False):
        tokens[i], weights[i] = ids, w
    np.savez(args.out, tokens=tokens, weights=weights)


if __name__ == "__main__":
    main()
