"""Measure the exported pair: held-out loss, binding in stories, sums, facts, acceptance of the draft, texts.

Acceptance is the share of positions, along the target's own text on held-out prompts, where the draft, given
the same prefix, selects the same token: greedily, and at a temperature with the same Gumbel noise on both
sides. A story binds when the names, animals and things of its prompt occur in it and no third name does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

import corpus
import lexicon as lex
from gguf_model import load_gguf
from labelled_requests import answers
from manners import MARKS, details_right, labels_right, placeholders_right, subjects_kept
from model import Llama
from sample import answer, continue_text, coupled, greedy
from train import held_out_loss

MESSAGE = (
    "Hello, this is Clara Brook. I would like to meet you on Friday at 4. "
    "My phone number is 415-555-0147 and my e-mail is clara.brook@example.org."
)
SAMPLES = [
    [("user", "Tell me a short story about a little fox named Pip who loses a red kite.")],
    [("user", "Write a story about a brave girl.")],
    [("user", "讲一个小兔子花花帮助朋友的故事。")],
    [("user", "Tell me a very short story about Leo, Ruby and a golden drum.")],
    [("user", "Why is the sky blue?")],
    [("user", "你好")],
    [("user", "What is 7 + 8?")],
    [("user", "Mia has 9 apples. She gives 4 to a friend. How many apples does Mia have now?")],
    [("user", "Translate into Chinese: The old man is drinking tea by the river.")],
    [("user", "翻译成英文：小狗在花园里睡觉。")],
    [("user", f"Write a polite reply to this message:\n{MESSAGE}")],
]
PLAIN_SAMPLES = ["Once upon a time", "The little fox", "从前，", "小狐狸"]


def held_out_prompts(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Prompts of held-out chats, and the openings of held-out plain texts."""
    prompts: list[list[int]] = []
    for doc in corpus.documents("heldout"):
        if doc.turns:
            n = next(i for i, (role, _) in enumerate(doc.turns) if role == "assistant")
            text = corpus.chatml(doc.turns[:n], add_generation_prompt=True)
        else:
            text = doc.plain[:40]
        ids = tokenizer.encode(text).ids
        if len(ids) <= 400:
            prompts.append(ids)
        if len(prompts) == count:
            return prompts
    raise AssertionError("the corpus is endless")


@torch.no_grad()
def acceptance(
    target: Llama,
    draft: Llama,
    prompts: list[list[int]],
    rules: list[Callable[[Tensor, int], int]],
    n_max: int,
) -> tuple[float, int]:
    """Share of the target's tokens that the draft selects too, and how many there were."""
    same = total = 0
    for prompt, select in zip(prompts, rules, strict=True):
        ids = continue_text(target, prompt, select, n_max)
        logits = draft(torch.tensor([ids]))[0]
        for position in range(len(prompt), len(ids)):
            same += select(logits[position - 1], position) == ids[position]
            total += 1
    return same / total, total


NAMES = {name for table in (lex.NAMES_EN, lex.NAMES_ZH) for names in table.values() for name in names}
NAMES -= {"石头"}  # a stone as well
WORDS = NAMES | {word for thing in lex.THINGS for word in (thing.en, thing.zh)}
WORDS |= {word for kind in lex.KINDS for word in (kind.en.split()[-1], kind.zh)}
MENTION = re.compile(r"\b[A-Za-z]+\b|" + "|".join(sorted(w for w in WORDS if not w.isascii())))


def mentioned(text: str) -> set[str]:
    """The names, animals and things that a text speaks of."""
    return WORDS.intersection(MENTION.findall(text))


def binding(target: Llama, tokenizer: Tokenizer, count: int) -> dict[str, float]:
    """Shares of held-out story prompts with a name: names and things kept, no stranger, all of it."""
    asks = (
        doc.turns[0][1] for doc in corpus.documents("heldout") if doc.kind in ("chat_story", "tiny_story")
    )
    names = things = alone = everything = with_thing = 0
    for ask in itertools.islice((ask for ask in asks if mentioned(ask) & NAMES), count):
        found = mentioned(answer(target, tokenizer, ask, 400))
        wanted = mentioned(ask)
        kept = wanted & NAMES <= found
        kept_thing = wanted - NAMES <= found
        no_stranger = len((found | wanted) & NAMES) <= 2
        names, alone = names + kept, alone + no_stranger
        with_thing, things = with_thing + bool(wanted - NAMES), things + (kept_thing and bool(wanted - NAMES))
        everything += kept and kept_thing and no_stranger
    return {
        "names": names / count,
        "things": things / max(with_thing, 1),
        "no_strangers": alone / count,
        "all": everything / count,
        "prompts": count,
    }


@torch.no_grad()
def loss_by_position(model: Llama, tokens: Tensor, weights: Tensor) -> tuple[float, float]:
    """Loss per own token in the first and in the second half of the rows."""
    sums = torch.zeros(2)
    counts = torch.zeros(2)
    for t, w in zip(tokens.split(4), weights.split(4), strict=True):
        own = (w[:, 1:] >= 1).float()
        logits = model(t[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), t[:, 1:].flatten(), reduction="none").view_as(own)
        sums += (loss * own).unflatten(1, (2, -1)).sum((0, 2))
        counts += own.unflatten(1, (2, -1)).sum((0, 2))
    first, second = (sums / counts).tolist()
    return first, second


def sums_right(target: Llama, tokenizer: Tokenizer, count: int) -> float:
    """Share of single sums of the taught range that the target answers rightly."""
    rng = corpus.random.Random("sums")
    right = 0
    for _ in range(count):
        expression, value = corpus.sum_line(rng)
        right += answer(target, tokenizer, f"What is {expression}?", 32).endswith(f"= {value}")
    return right / count


def facts_right(target: Llama, tokenizer: Tokenizer, count: int) -> float:
    """Share of the questions that the training text answers, among ``count`` of them, answered so."""
    known = {q: right for q, right in answers().items() if not corpus.held_out(q)}
    asked = corpus.random.Random("facts").sample(sorted(known), count)
    right = 0
    for question in asked:
        right += answer(target, tokenizer, question, 48) in known[question]
    return right / count


def markdown(figures: dict[str, Any], samples: list[dict[str, str]]) -> str:
    """The figures and the samples as the model card shows them."""
    greedy_share, coupled_share = figures["acceptance_greedy"], figures["acceptance_coupled"]
    lines = [
        f"Measured {figures['date']} on the files as they are (dequantised), held-out prompts:",
        "",
        "| | target | draft |",
        "|---|---|---|",
    ]
    for label, key, form in (
        ("parameters", "parameters", "{:,}"),
        ("multiply-adds per token, output matrix included", "multiply_adds_per_token", "{:,}"),
        ("bytes", "bytes", "{:,}"),
        ("held-out loss, nats per token", "held_out_loss", "{:.3f}"),
    ):
        values = figures[key]
        lines.append(f"| {label} | {form.format(values['target'])} | {form.format(values['draft'])} |")
    lines += [
        "",
        f"- cost of the draft: {figures['cost_ratio']:.4f} of the target's",
        f"- acceptance, greedy: {greedy_share['share']:.3f} ({greedy_share['positions']:,} tokens)",
        "- acceptance, same noise, temperature {temperature}: {share:.3f} ({positions:,} tokens)".format(
            **coupled_share
        ),
        f"- sums of the taught range (to 10 + 10, 10 - 10, 5 × 5) right: {figures['sums_right']:.2f}",
        f"- questions that the training text answers, answered so: {figures['facts_right']:.2f}",
        "- stories on {prompts} held-out prompts that keep the names: {names:.2f}; "
        "the animals and things: {things:.2f}; bring in no third name: {no_strangers:.2f}; "
        "all of it: {all:.2f}".format(**figures["binding"]),
        "- replies to messages about untaught things that have thing, number, day and hour: {:.2f}".format(
            figures["details_right"]
        ),
        "- masked requests answered with just the right placeholders, of {} with different marks: {}".format(
            MARKS, ", ".join(map(str, figures["placeholders_right"]))
        ),
        "- held-out labelled requests: grade right {grade:.2f}, privacy right {privacy:.2f}".format(
            **figures["labels_right"]
        ),
        "- English stories on held-out prompts that have every telling word of the prompt: {:.2f}".format(
            figures["subjects_kept"]
        ),
        "- held-out loss of the target at positions 0 to 511: {:.3f}, 512 to 1,023: {:.3f}".format(
            *figures["loss_by_position"]
        ),
        "",
        "Greedy texts, not chosen:",
    ]
    for sample in samples:
        lines += ["", "```text", (sample["prompt"] + sample["text"]).strip(), "```"]
    return "\n".join(lines)


def update_card(card: Path, text: str) -> None:
    """Put the measured part between its two marks."""
    begin, end = "<!-- measured -->", "<!-- /measured -->"
    head, _, rest = card.read_text(encoding="utf-8").partition(begin)
    tail = rest.partition(end)[2]
    card.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    embedded = Path(__file__).parent.parent / "sllm" / "embedded"
    parser.add_argument("--target", type=Path, default=embedded / "target.gguf")
    parser.add_argument("--draft", type=Path, default=embedded / "draft.gguf")
    parser.add_argument("--tokenizer", type=Path, default=Path("build/tokenizer.json"))
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--stories", type=int, default=60)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="JSON with the figures and the sample texts")
    parser.add_argument("--card", type=Path, help="Markdown file whose measured part is replaced")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    target, draft = load_gguf(args.target), load_gguf(args.draft)
    data = np.load(args.heldout)
    tokens = torch.from_numpy(data["tokens"].astype(np.int64))
    weights = torch.from_numpy(data["weights"].astype(np.float32))
    prompts = held_out_prompts(tokenizer, args.prompts)
    accepted, n_greedy = acceptance(target, draft, prompts, [greedy] * len(prompts), 256)
    rules = [coupled(args.temperature, seed) for seed in range(len(prompts))]
    accepted_coupled, n_coupled = acceptance(target, draft, prompts, rules, 256)
    cost = {name: m.c.multiply_adds for name, m in (("target", target), ("draft", draft))}
    result = {
        "date": date.today().isoformat(),
        "multiply_adds_per_token": cost,
        "cost_ratio": cost["draft"] / cost["target"],
        "parameters": {
            n: sum(p.numel() for p in m.parameters()) for n, m in (("target", target), ("draft", draft))
        },
        "bytes": {"target": args.target.stat().st_size, "draft": args.draft.stat().st_size},
        "held_out_loss": {
            "target": held_out_loss(target, tokens, weights),
            "draft": held_out_loss(draft, tokens, weights),
        },
        "acceptance_greedy": {"share": accepted, "positions": n_greedy},
        "acceptance_coupled": {
            "share": accepted_coupled,
            "positions": n_coupled,
            "temperature": args.temperature,
        },
        "sums_right": sums_right(target, tokenizer, 200),
        "facts_right": facts_right(target, tokenizer, 100),
        "binding": binding(target, tokenizer, args.stories),
        "details_right": details_right(target, tokenizer),
        "placeholders_right": placeholders_right(target, tokenizer),
        "subjects_kept": subjects_kept(target, tokenizer, args.stories),
        "labels_right": labels_right(target, tokenizer, 250),
        "loss_by_position": loss_by_position(target, tokens, weights),
    }
    samples = []
    texts = [corpus.chatml(turns, add_generation_prompt=True) for turns in SAMPLES] + PLAIN_SAMPLES
    for text in texts:
        ids = tokenizer.encode(text).ids
        samples.append(
            {"prompt": text, "text": tokenizer.decode(continue_text(target, ids, greedy, 400)[len(ids) :])}
        )
    if args.card:
        update_card(args.card, markdown(result, samples))
    args.out.write_text(json.dumps({"figures": result, "samples": samples}, ensure_ascii=False, indent=2))


if __name__ == "__main__":
    main()
