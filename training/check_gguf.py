"""Check the exported files against llama.cpp, through ``sllm``: same token ids, same greedy text.

Needs ``sllm`` and the packages of requirements.txt in one environment. The greedy text may differ from
PyTorch's only where the two best logits nearly tie, because llama.cpp multiplies Q8_0 weights with quantised
activations.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
from pathlib import Path

import sllm
import torch
from sllm import embedded
from tokenizers import Tokenizer

import corpus
from evaluate import held_out_prompts
from gguf_model import load_gguf
from sample import ENDS

log = logging.getLogger("check")
AWKWARD = [
    "",
    " ",
    "  two  spaces",
    "\n\n\nlines\n",
    "tab\tand\r\nreturn",
    "I'm you're HE'S it'll",
    "3.14159 + 2,718 = ?",
    "１２３ ＡＢＣ",
    "日本語のテキスト",
    "Größe, naïve, ångström",
    "emoji 🦊🐇 👩‍👩‍👧",
    "a_b-c/d\\e",
    "“你好”，他说。",
    "e-mail: a.b@example.com, 555-0100",
    "\u3000全角空格",
    "\x00\x7f",
    "<|im_start|>user\nhi<|im_end|>\n",
    "don't—stop…",
    "x" * 300,
    "٣٤٥ मराठी ไทย",
]


def lines(count: int) -> list[str]:
    """Corpus lines of both splits, awkward strings, and random strings over all of Unicode's planes."""
    rng = random.Random(7)
    texts = list(AWKWARD)
    for split in ("train", "heldout"):
        texts += [doc.text for doc in itertools.islice(corpus.documents(split), count // 2)]
    for _ in range(count // 4):
        high = rng.choice([0x7F, 0x2FF, 0x9FFF, 0xD7FF, 0x1FAFF])
        chars = (chr(rng.randint(1, high)) for _ in range(rng.randint(1, 40)))
        texts.append("".join(c for c in chars if not 0xD800 <= ord(c) <= 0xDFFF))
    return texts


def check_tokens(model: sllm.Model, tokenizer: Tokenizer, count: int) -> int:
    wrong = 0
    for text in lines(count):
        ours = model.vocab.encode(text, add_special=False, parse_special=True).tolist()
        theirs = tokenizer.encode(text).ids
        if ours != theirs:
            wrong += 1
            log.error("token ids differ for %r: %s, expected %s", text[:60], ours[:20], theirs[:20])
    return wrong


@torch.no_grad()
def check_text(path: Path, tokenizer: Tokenizer, count: int, n_max: int, near_tie: float) -> int:
    """Greedy tokens of llama.cpp, checked against the logits that PyTorch computes for the same prefix."""
    reference = load_gguf(path)
    bad = equal = total = 0
    with sllm.Model(path) as model:
        target = sllm.LocalTarget(model)
        greedy = sllm.SamplingParams(temperature=0)
        for prompt in held_out_prompts(tokenizer, count):
            runs = sllm.generate(target, prompt, sampling=greedy, max_tokens=n_max)
            ids = prompt + [int(token) for run in runs for token in run.tokens]
            logits = reference(torch.tensor([ids]))[0]
            for position in range(len(prompt), len(ids)):
                row = logits[position - 1]
                total += 1
                equal += int(row.argmax()) == ids[position]
                if float(row.max() - row[ids[position]]) > near_tie:
                    bad += 1
                    log.error("position %d: token %d is not a near tie", position, ids[position])
                if ids[position] in ENDS:
                    break
    log.info("%s: %d of %d greedy tokens equal", path.name, equal, total)
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, default=Path("build/tokenizer.json"))
    parser.add_argument("--lines", type=int, default=4000)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument(
        "--near-tie", type=float, default=0.25, help="largest difference of logits that may flip"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    wrong = 0
    for path in (embedded.TARGET, embedded.DRAFT):
        with sllm.Model(path) as model:
            for token in ENDS:
                if not model.vocab.is_eog(token):
                    wrong += 1
                    log.error("%s: token %d does not end a text", path.name, token)
            wrong += check_tokens(model, tokenizer, args.lines)
        wrong += check_text(path, tokenizer, args.prompts, 200, args.near_tie)
    if wrong:
        raise SystemExit(f"{wrong} differences")
    log.info("no differences")


if __name__ == "__main__":
    main()
