"""Labelled requests of the small world, for ``sllm calibrate``: what the pair was taught, and what it cannot.

A row is a pure function of (seed, index). Taught are questions of the corpus with one right answer (facts,
opposites and small sums, in English and Chinese; every wording of a fact counts). Open are stories, replies
to messages and translations: they have many right answers, so that none can be told by comparing, and none
counts as right that nobody has verified. Out of reach are requests that need reasoning or knowledge from
outside that world: nothing that the models could say to them is right.
The corpus teaches what hard requests look like with other ones (lexicon.HARD), so these test what was
learnt::

    python labelled_requests.py --rows 2400 --out build/requests.jsonl
    sllm calibrate ../sllm/embedded/target.gguf build/requests.jsonl -o ../sllm/embedded/target.profile.json
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

import corpus

HARD_SHARE = 0.3
OPEN_SHARE = 0.2
SUM_SHARE = 0.2
# Greetings and thanks have no right answer.
SMALL_TALK = ("hello", "hi", "good ", "thank", "你好", "谢谢", "早上好", "晚安", "再见", "goodbye")
WORDINGS = 40_000  # draws, so that every wording of every answer is known

# The numbers make many requests of one; they are no part of what makes them hard.
OUT_OF_REACH = [
    ("What is {a} + {b}?", "{a} + {b} 等于多少？"),
    ("What is {a} times {b}?", "{a} 乘以 {b} 等于多少？"),
    ("Prove that the square root of {a} is irrational.", "证明根号{a}是无理数。"),
    ("Write a Python function that sorts {a} numbers.", "写一个给{a}个数排序的 Python 函数。"),
    ("Who was king of France in 1{a}?", "1{a}年法国国王是谁？"),
    ("Solve the equation x^2 + {a}x - {b} = 0.", "解方程 x^2 + {a}x - {b} = 0。"),
    ("Explain the theory of relativity in {a} words.", "用{a}个字解释相对论。"),
    ("Summarise the causes of the First World War in {a} points.", "用{a}点概括第一次世界大战的起因。"),
    ("Design a bridge of {a} metres and compute its load.", "设计一座{a}米长的桥，并计算它的荷载。"),
    ("Integrate x^{a} sin x from 0 to {b}.", "求 x^{a} sin x 从 0 到 {b} 的积分。"),
    ("Find the error in this long program and repair it.", "找出这段长程序里的错误并修好它。"),
    ("Who won the {a}th election, and why?", "第{a}届选举谁赢了，为什么？"),
    ("How do vaccines train the immune system?", "疫苗是怎样训练免疫系统的？"),
    ("Draw up a contract for the sale of {a} machines.", "起草一份出售{a}台机器的合同。"),
    ("Which compiler flags make this loop {a} times faster?", "哪些编译选项能让这个循环快{a}倍？"),
    ("What is the boiling point of water at {a} kilopascals?", "水在{a}千帕时的沸点是多少？"),
]


def answers() -> dict[str, list[str]]:
    """Every question of the corpus that has a right answer, with all wordings of it."""
    rng = random.Random("answers")
    found: dict[str, set[str]] = {}
    for _ in range(WORDINGS):
        question, answer = corpus.fact(rng, chinese=rng.random() < 0.5)
        if not question.lower().startswith(SMALL_TALK):
            found.setdefault(question, set()).add(answer)
    return {question: sorted(wordings) for question, wordings in found.items()}


def row(seed: str, index: int, known: dict[str, list[str]]) -> dict[str, Any]:
    rng = random.Random(f"{seed}:{index}")
    chinese = rng.random() < 0.5
    kind = rng.random()
    if kind < SUM_SHARE:
        question, answer = corpus.small_sum(rng, chinese)
        # "1 stones" is bad English and the right number.
        plural = re.sub(r" 1 (\w+) now\.$", r" 1 \1s now.", answer)
        return {"prompt": question, "reference": sorted({answer, plural}), "label": "easy"}
    if kind > 1 - OPEN_SHARE:
        while (request := corpus.request(rng, chinese))[0] != 1:
            pass
        return {"prompt": request[1], "reference": [], "label": "medium"}
    if kind < 1 - OPEN_SHARE - HARD_SHARE:
        question = rng.choice([q for q in known if q.isascii() != chinese])
        return {"prompt": question, "reference": known[question], "label": "easy"}
    text = rng.choice(OUT_OF_REACH)[chinese].format(a=rng.randint(12, 97), b=rng.randint(12, 97))
    return {"prompt": text, "reference": [], "label": "hard"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=2400)
    parser.add_argument("--seed", default="calibration")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    known = answers()
    with args.out.open("w", encoding="utf-8") as out:
        for index in range(args.rows):
            out.write(json.dumps(row(args.seed, index, known), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
