"""Deterministic generator of the text that the embedded models learn: a small world of our own.

A document is a pure function of (split, index). Stories are drawn from plot files with a little state (who,
what, where, one bound row of events), so a plot stays coherent while its sentences vary. A document whose
*key* (its first prompt, or its first line) hashes into one residue class belongs to the held-out split and to
no other, so no training document opens with a held-out prompt, whatever its index.

``python corpus.py --split train --documents 200 --out sample.txt`` writes readable text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import lexicon as lex
import messages

WORLD = Path(__file__).parent / "world"
END_OF_TEXT = "<|endoftext|>"
HELD_OUT_ONE_IN = 40
CHOICE_SKEW = 0.8  # weight of the i-th alternative is (i + 1) ** -skew: real entropy, yet with a favourite

MADE_UP = 0.12  # share of the stories whose hero has a name of no list

Turn = tuple[str, str]


@dataclass(frozen=True)
class Document:
    """One training text: plain (``turns`` empty) or a chat; ``key`` decides its split."""

    kind: str
    key: str
    turns: tuple[Turn, ...] = ()
    plain: str = ""

    @property
    def text(self) -> str:
        if not self.turns:
            return self.plain + END_OF_TEXT
        return chatml(self.turns) + END_OF_TEXT


def chatml(turns: tuple[Turn, ...] | list[Turn], add_generation_prompt: bool = False) -> str:
    """The chat format, as the template in the GGUF renders it."""
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return text + "<|im_start|>assistant\n" if add_generation_prompt else text


def held_out(key: str) -> bool:
    return zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0


def pick(rng: random.Random, options: list[str]) -> str:
    if len(options) == 1:
        return options[0]
    return rng.choices(options, [(i + 1) ** -CHOICE_SKEW for i in range(len(options))])[0]


_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_FIELD = re.compile(r"\{(\w+)\}")


def expand(template: str, fields: dict[str, str], macros: dict[str, str], rng: random.Random) -> str:
    """Replace fields, macros and choices until none is left; innermost choices first."""
    text = template
    while True:
        text, n_fields = _FIELD.subn(lambda m: fields[m[1]] if m[1] in fields else macros[m[1]], text)
        text, n_choices = _CHOICE.subn(lambda m: pick(rng, m[1].split("|")), text)
        if not n_fields and not n_choices:
            return text


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


@dataclass
class Plot:
    """One plot of a plot file: how it is asked for, its bound rows, its sentences, its questions."""

    asks: list[str] = field(default_factory=list)
    tables: list[tuple[list[str], list[list[str]]]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    questions: list[tuple[str, str]] = field(default_factory=list)


def load_plots(path: Path) -> tuple[dict[str, str], dict[str, Plot]]:
    macros: dict[str, str] = {}
    plots: dict[str, Plot] = {}
    name = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("== "):
            name = line[3:].strip()
            if name != "common":
                plots[name] = Plot()
        elif name == "common":
            key, _, value = line.partition(" = ")
            macros[key] = value
        elif line.startswith("ask = "):
            plots[name].asks.append(line[6:])
        elif line.startswith("let "):
            names, _, rows = line[4:].partition(" = ")
            keys = [n.strip() for n in names.split(",")]
            table = [[cell.strip() for cell in row.split(", ", len(keys) - 1)] for row in rows.split(" ; ")]
            if any(len(row) != len(keys) for row in table):
                raise ValueError(f"{path.name}: {name}: a row of {names!r} does not have {len(keys)} cells")
            plots[name].tables.append((keys, table))
        elif line.startswith("? "):
            question, _, answer = line[2:].partition(" => ")
            plots[name].questions.append((question, answer))
        else:
            plots[name].lines.append(line.strip())
    return macros, plots


def load_pairs(path: Path) -> list[tuple[str, str]]:
    lines = [
        ln for ln in path.read_text(encoding="utf-8").splitlines() if ln.strip() and not ln.startswith("#")
    ]
    return [(q, a) for q, _, a in (line.partition(" => ") for line in lines)]


MACROS_EN, PLOTS_EN = load_plots(WORLD / "plots_en.txt")
MACROS_ZH, PLOTS_ZH = load_plots(WORLD / "plots_zh.txt")
TINY_EN = load_plots(WORLD / "tiny_en.txt")
TINY_ZH = load_plots(WORLD / "tiny_zh.txt")
QA_EN = load_pairs(WORLD / "qa_en.txt")
QA_ZH = load_pairs(WORLD / "qa_zh.txt")
PRONOUNS = {"m": ("he", "him", "his"), "f": ("she", "her", "her")}


@dataclass(frozen=True)
class Story:
    name: str
    ask: str
    text: str
    questions: list[tuple[str, str]]
    fields: dict[str, str]


def fields_en(rng: random.Random) -> dict[str, str]:
    hero, friend = rng.sample(lex.KINDS, 2)
    name = rng.choice(lex.NAMES_EN[hero.gender])
    friend_name = rng.choice([n for n in lex.NAMES_EN[friend.gender] if n != name])
    if rng.random() < MADE_UP:
        name = lex.made_up(rng, chinese=False).capitalize()
    colour, thing = rng.choice(lex.COLOURS)[0], rng.choice(lex.THINGS).en
    place, at, _ = rng.choice(lex.HOMES)
    (p1, _), (p2, _) = rng.sample(lex.PLACES, 2)
    he, him, his = PRONOUNS[hero.gender]
    fhe, fhim, fhis = PRONOUNS[friend.gender]
    trait, ftrait = rng.choice(lex.TRAITS)[0], rng.choice(["old", "wise", "clever"])
    return {
        "h": name,
        "f": friend_name,
        "hk": hero.en,
        "a_hk": article(hero.en),
        "a_tr": article(trait),
        "a_animal": article(hero.en.replace("little ", "")),
        "a_trk": article(f"{trait} {hero.en}"),
        "a_fk": article(friend.en),
        "a_wisefk": article(f"{ftrait} {friend.en.replace('little ', '')}"),
        "he": he,
        "him": him,
        "his": his,
        "He": capital(he),
        "His": capital(his),
        "they": "they",
        "fhe": fhe,
        "fhim": fhim,
        "fhis": fhis,
        "Fhe": capital(fhe),
        "o": f"{colour} {thing}",
        "a_o": article(f"{colour} {thing}"),
        "on": thing,
        "a_on": article(thing),
        "oc": colour,
        "place": place,
        "at": at,
        "p1": p1,
        "p2": p2,
        "food": rng.choice(lex.FOODS)[0],
    }


def fields_zh(rng: random.Random) -> dict[str, str]:
    hero, friend = rng.sample(lex.KINDS, 2)
    name = rng.choice(lex.NAMES_ZH[hero.gender])
    friend_name = rng.choice([n for n in lex.NAMES_ZH[friend.gender] if n != name])
    if rng.random() < MADE_UP:
        name = lex.made_up(rng, chinese=True)
    colour, thing = rng.choice(lex.COLOURS)[1], rng.choice(lex.THINGS)
    (_, p1), (_, p2) = rng.sample(lex.PLACES, 2)

    def pronoun(kind: lex.Kind) -> str:
        return "它" if kind.measure == "只" else {"m": "他", "f": "她"}[kind.gender]

    return {
        "h": name,
        "f": friend_name,
        "hk": hero.zh,
        "fk": friend.zh,
        "cl": hero.measure,
        "fcl": friend.measure,
        "tr": rng.choice(lex.TRAITS)[1],
        "he": pronoun(hero),
        "fhe": pronoun(friend),
        "oc": colour,
        "o": colour + thing.zh,
        "on": thing.zh,
        "mo": f"一{thing.measure}{colour}{thing.zh}",
        "home": rng.choice(lex.HOMES)[2],
        "p1": p1,
        "p2": p2,
        "food": rng.choice(lex.FOODS)[1],
    }


def story(rng: random.Random, chinese: bool, tiny: bool = False) -> Story:
    """Draw a plot, its people and things, and one row of each of its tables; then write it down."""
    if tiny:
        macros, plots = TINY_ZH if chinese else TINY_EN
    else:
        macros, plots = (MACROS_ZH, PLOTS_ZH) if chinese else (MACROS_EN, PLOTS_EN)
    name = rng.choice(sorted(plots))
    plot = plots[name]
    fields = fields_zh(rng) if chinese else fields_en(rng)
    for keys, rows in plot.tables:
        fields.update(zip(keys, rng.choice(rows), strict=True))
    for key in list(fields):
        fields[key] = _FIELD.sub(lambda m: fields[m[1]], fields[key])
    for key in list(fields):
        fields.setdefault(f"a_{key}", article(fields[key]))
        fields.setdefault(f"{key}_c", capital(fields[key]))
    sentences = [expand(line, fields, macros, rng).strip() for line in plot.lines]
    sentences = [s if chinese else capital(re.sub(r" +", " ", s)) for s in sentences if s]
    breaks = {len(sentences) // 2} if rng.random() < 0.5 else {2, 5}
    glue = "" if chinese else " "
    text = ""
    for i, sentence in enumerate(sentences):
        text += ("" if i == 0 else "\n\n" if i in breaks else glue) + sentence
    ask = expand(pick(rng, [*plot.asks, "{any}"]), fields, macros, rng).replace("  ", " ")
    questions = [(expand(q, fields, macros, rng), expand(a, fields, macros, rng)) for q, a in plot.questions]
    return Story(name, ask, text, questions, fields)


_BEGINNING_EN = re.compile(
    r"^(?:Once upon a time there (?:was|lived)|Long ago there lived|In a quiet valley there lived"
    r"|There once was) (?P<who>.*?) (?:named|called) (?P<name>[A-Z][a-z]+)\. "
)
_BEGINNING_ZH = re.compile(
    "^(?:从前，有|很久很久以前，有|在一个安静的山谷里，住着|有)(?P<who>[^，。]*?)，(?:名字叫|名叫|大家都叫.)(?P<name>[^。]+)。"
)
BEGINNINGS_EN = [
    "Today I will tell you about {name}. {name} was {who}. ",
    "In the forest there lived {who} named {name}. ",
    "Long ago, there was {who} called {name}. ",
    "My grandmother told me about {who} called {name}. ",
    "There was {who} named {name}. ",
    "{name} was {who}. ",
    "This is the story of {who} called {name}. ",
    "A long time ago, there was {who} named {name}. ",
    "Once there was {who} named {name}. ",
    "Many years ago there lived {who} called {name}. ",
    "Far away there lived {who} called {name}. ",
    "One day, there came {who} called {name}. ",
    "The {kind} {name} lived far away. ",
    "The {kind} called {name} had many friends. ",
    "{name} the {kind} was never tired. ",
    "In a small house there lived {who} named {name}. ",
]
BEGINNINGS_ZH = [
    "在森林里，住着{who}，名叫{name}。",
    "妈妈说，从前有{who}，名叫{name}。",
    "今天讲{name}的故事。{name}是{who}。",
    "从前有{who}，名叫{name}。",
    "{name}是{who}。",
    "这是{who}的故事，名叫{name}。",
    "很久以前，有{who}，名叫{name}。",
    "{kind}{name}住在很远的地方。",
    "有一天，{kind}{name}起得很早。",
    "{kind}名叫{name}。",
    "在很远的地方，有{who}，名字叫{name}。",
    "有一天，来了{who}，名叫{name}。",
    "森林里住着{who}，名叫{name}。",
    "小时候，我认识{who}，名叫{name}。",
]


def plain_story(rng: random.Random) -> Document:
    """A story without a prompt, half of them with a beginning that no answer has."""
    chinese = rng.random() < 0.5
    s = story(rng, chinese, tiny=rng.random() < 0.25)
    text = s.text
    beginning = (_BEGINNING_ZH if chinese else _BEGINNING_EN).match(text)
    if beginning and rng.random() < 0.5:
        form = rng.choice(BEGINNINGS_ZH if chinese else BEGINNINGS_EN)
        text = form.format(kind=s.fields["hk"], **beginning.groupdict()) + text[beginning.end() :]
    return Document("story", text[:40], plain=text)


def chat_story(rng: random.Random) -> Document:
    """A story on request, often with questions about it afterwards."""
    chinese = rng.random() < 0.45
    s = story(rng, chinese)
    turns = [("user", s.ask), ("assistant", s.text)]
    if rng.random() < 0.45:
        for question, answer in rng.sample(s.questions, rng.randint(1, len(s.questions))):
            turns += [("user", question), ("assistant", answer)]
    if rng.random() < 0.15:
        thanks, reply = ("谢谢！", "不客气！") if chinese else ("Thank you!", "You are welcome!")
        turns += [("user", thanks), ("assistant", reply)]
    return Document("chat_story", s.ask, tuple(turns))


def tiny_story(rng: random.Random) -> Document:
    """A story of a few sentences on request, with questions about it."""
    chinese = rng.random() < 0.45
    s = story(rng, chinese, tiny=True)
    turns = [("user", s.ask), ("assistant", s.text)]
    for question, answer in rng.sample(s.questions, rng.randint(0, len(s.questions))):
        turns += [("user", question), ("assistant", answer)]
    return Document("tiny_story", s.ask, tuple(turns))


def who_is_who(rng: random.Random) -> Document:
    """Two or three people, what each is and has, and questions that need the right one."""
    chinese = rng.random() < 0.45
    count = rng.choice([2, 2, 3])
    kinds, things = rng.sample(lex.KINDS, count), rng.sample(lex.THINGS, count)
    facts, asks, names = [], [], set()
    for kind, thing in zip(kinds, things, strict=True):
        colour, zh_colour = rng.choice(lex.COLOURS)
        table = lex.NAMES_ZH if chinese else lex.NAMES_EN
        name = rng.choice([n for n in table[kind.gender] if n not in names])
        names.add(name)
        if chinese:
            mine = f"一{thing.measure}{zh_colour}{thing.zh}"
            facts.append(f"{name}是一{kind.measure}{kind.zh}，有{mine}。")
            asks += [
                (f"谁是{kind.zh}？", f"{name}是{kind.zh}。"),
                (f"{name}有什么？", f"{name}有{mine}。"),
                (f"谁有{thing.zh}？", f"{name}有{thing.zh}。"),
                (f"{thing.zh}是什么颜色的？", f"{thing.zh}是{zh_colour}。"),
            ]
        else:
            mine = article(f"{colour} {thing.en}")
            facts.append(f"{name} is {article(kind.en)} and has {mine}.")
            asks += [
                (f"Who is the {kind.en}?", f"{name} is the {kind.en}."),
                (f"What does {name} have?", f"{name} has {mine}."),
                (f"Who has the {thing.en}?", f"{name} has the {thing.en}."),
                (f"What colour is {name}'s {thing.en}?", f"{name}'s {thing.en} is {colour}."),
            ]
    body = ("" if chinese else " ").join(facts)
    turns: list[Turn] = []
    for question, answer in rng.sample(asks, rng.randint(2, 4)):
        turns += [("user", question if turns else f"{body}\n{question}"), ("assistant", answer)]
    return Document("who_is_who", body, tuple(turns))


def reading(rng: random.Random) -> Document:
    """A story in the user's message and one question about it."""
    chinese = rng.random() < 0.45
    s = story(rng, chinese, tiny=rng.random() < 0.6)
    question, answer = rng.choice(s.questions)
    body = s.text.replace("\n\n", "" if chinese else " ")
    lead = pick(rng, ["请读下面的故事，回答问题。", "故事："] if chinese else ["Read this story.", "Story:"])
    return Document(
        "reading", body[:60] + question, (("user", f"{lead}\n{body}\n{question}"), ("assistant", answer))
    )


def fact(rng: random.Random, chinese: bool) -> Turn:
    """A question and its answer, from the hand-written list or from a small table of facts."""
    if rng.random() < 0.55:
        topic = rng.choice(sorted(lex.POEMS_ZH if chinese else lex.POEMS_EN))
        fields = {
            "topic": topic,
            "poem_en": lex.POEMS_EN.get(topic, ""),
            "poem_zh": lex.POEMS_ZH.get(topic, ""),
        }
        question, answer = rng.choice(QA_ZH if chinese else QA_EN)
        return expand(question, fields, {}, rng), expand(answer, fields, {}, rng)
    if rng.random() < 0.25:
        en1, en2, zh1, zh2 = rng.choice(lex.OPPOSITES)
        if rng.random() < 0.5:
            en1, en2, zh1, zh2 = en2, en1, zh2, zh1
        if chinese:
            return f"“{zh1}”的反义词是什么？", f"“{zh1}”的反义词是“{zh2}”。"
        return f"What is the opposite of {en1}?", f"The opposite of {en1} is {en2}."
    en, zh, food, home, sound, legs = rng.choice(lex.ANIMALS)
    en_facts = [
        (f"What does {article(en)} eat?", f"{capital(article(en))} eats {food[0]}."),
        (f"Where does {article(en)} live?", f"{capital(article(en))} lives {home[0]}."),
        (
            f"What sound does {article(en)} make?",
            f"{capital(article(en))} makes {sound[0]}."
            if " " in sound[0]
            else f'{capital(article(en))} says "{sound[0]}".',
        ),
        (f"How many legs does {article(en)} have?", f"{capital(article(en))} has {legs} legs."),
    ]
    zh_facts = [
        (f"{zh}吃什么？", f"{zh}吃{food[1]}。"),
        (f"{zh}住在哪里？", f"{zh}住在{home[1]}。"),
        (f"{zh}怎么叫？", f"{zh}{'' if '没有' in sound[1] else '的叫声是'}{sound[1]}。"),
        (f"{zh}有几条腿？", f"{zh}有{legs}条腿。"),
    ]
    return rng.choice(zh_facts if chinese else en_facts)


def question_answer(rng: random.Random) -> Document:
    chinese = rng.random() < 0.45
    turns: list[Turn] = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        question, answer = fact(rng, chinese)
        turns += [("user", question), ("assistant", answer)]
    return Document("qa", turns[0][1], tuple(turns))


def sum_line(rng: random.Random) -> tuple[str, int]:
    """A sum of the taught range: up to 10 + 10, 10 - 10 and 5 × 5."""
    kind = rng.random()
    if kind < 0.45:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        return f"{a} + {b}", a + b
    if kind < 0.85:
        a = rng.randint(0, 10)
        b = rng.randint(0, a)
        return f"{a} - {b}", a - b
    a, b = rng.randint(1, 5), rng.randint(1, 5)
    return f"{a} × {b}", a * b


def small_sum(rng: random.Random, chinese: bool) -> Turn:
    """One sum as a question, as a word problem or as counting."""
    kind = rng.random()
    if kind < 0.55:
        expression, value = sum_line(rng)
        words = expression.replace("+", "plus").replace("-", "minus").replace("×", "times")
        if chinese:
            ask = pick(rng, [f"{expression} 等于多少？", f"{expression} = ?", f"请计算 {expression}。"])
        else:
            ask = pick(
                rng,
                [f"What is {expression}?", f"{expression} = ?", f"What is {words}?", f"How much is {words}?"],
            )
        return ask, f"{expression} = {value}"
    if kind < 0.9:
        singular, plural, zh, measure = rng.choice(lex.COUNTABLES)
        gender = rng.choice("mf")
        a = rng.randint(2, 10)
        more = rng.random() < 0.5
        b = rng.randint(1, 10) if more else rng.randint(1, a - 1)
        value = a + b if more else a - b
        sign = "+" if more else "-"
        if chinese:
            who = rng.choice(lex.NAMES_ZH[gender])
            act = rng.choice(["又买了", "又找到"] if more else ["送给朋友", "用掉了"])
            ask = f"{who}有{a}{measure}{zh}，{act}{b}{measure}。现在有几{measure}{zh}？"
            return ask, f"{a} {sign} {b} = {value}。{who}现在有{value}{measure}{zh}。"
        who = rng.choice(lex.NAMES_EN[gender])
        he = capital(PRONOUNS[gender][0])
        act = rng.choice(
            [f"buys {b} more", f"finds {b} more"] if more else [f"gives {b} to a friend", f"loses {b}"]
        )
        noun = singular if value == 1 else plural
        ask = f"{who} has {a} {plural}. {he} {act}. How many {plural} does {who} have now?"
        return ask, f"{a} {sign} {b} = {value}. {who} has {value} {noun} now."
    start, step = rng.randint(0, 20), rng.choice([1, 1, 2, 5, 10])
    stop = start + step * rng.randint(3, 9)
    answer = ", ".join(str(n) for n in range(start, stop + 1, step))
    if chinese:
        return f"从{start}数到{stop}" + ("。" if step == 1 else f"，每次加{step}。"), answer
    return f"Count from {start} to {stop}" + ("." if step == 1 else f" in steps of {step}."), answer


def sums(rng: random.Random) -> Document:
    if rng.random() < 0.35:
        lines = [f"{e} = {v}" for e, v in (sum_line(rng) for _ in range(rng.randint(6, 24)))]
        return Document("sums", lines[0], plain="\n".join(lines))
    chinese = rng.random() < 0.4
    turns: list[Turn] = []
    for _ in range(rng.choice([1, 2, 3])):
        ask, answer = small_sum(rng, chinese)
        turns += [("user", ask), ("assistant", answer)]
    return Document("sums", turns[0][1], tuple(turns))


def pair(rng: random.Random) -> tuple[str, str]:
    """An English and a Chinese text that say the same."""
    kind = rng.random()
    if kind < 0.25:
        return rng.choice(lex.WORDS)
    if kind < 0.45:
        return rng.choice(lex.PHRASES)
    (subject, zh_subject) = rng.choice(lex.SUBJECTS)
    if kind < 0.75:
        (verb, zh_verb), (site, zh_site) = rng.choice(lex.VERBS_AT), rng.choice(lex.SITES)
        if rng.random() < 0.4:
            time, zh_time = rng.choice(lex.TIMES)
            return f"{subject} {verb} {site} {time}.", f"{zh_subject}{zh_time}{zh_site}{zh_verb}。"
        return f"{subject} {verb} {site}.", f"{zh_subject}{zh_site}{zh_verb}。"
    if kind < 0.9:
        liked, zh_liked = rng.choice(lex.LIKES)
        if rng.random() < 0.3:
            return f"{subject} does not like {liked}.", f"{zh_subject}不喜欢{zh_liked}。"
        return f"{subject} likes {liked}.", f"{zh_subject}喜欢{zh_liked}。"
    thing, (colour, zh_colour) = rng.choice(lex.THINGS), rng.choice(lex.COLOURS)
    return (
        f"{subject} has {article(f'{colour} {thing.en}')}.",
        f"{zh_subject}有一{thing.measure}{zh_colour}{thing.zh}。",
    )


def translation(rng: random.Random) -> Document:
    if rng.random() < 0.3:
        pairs = [pair(rng) for _ in range(rng.randint(5, 14))]
        if rng.random() < 0.5:
            lines = [f"{en} = {zh}" for en, zh in pairs]
        else:
            lines = [f"{zh} = {en}" for en, zh in pairs]
        return Document("translation", lines[0], plain="\n".join(lines))
    turns: list[Turn] = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        en, zh = pair(rng)
        if rng.random() < 0.5:
            ask = pick(
                rng,
                [
                    f"Translate into Chinese: {en}",
                    f"“{en}”用中文怎么说？",
                    f"翻译成中文：{en}",
                    f'How do you say "{en}" in Chinese?',
                ],
            )
            turns += [("user", ask), ("assistant", zh)]
        else:
            ask = pick(
                rng,
                [
                    f"Translate into English: {zh}",
                    f"“{zh}”用英语怎么说？",
                    f"翻译成英文：{zh}",
                    f'What does "{zh}" mean in English?',
                ],
            )
            turns += [("user", ask), ("assistant", en)]
    return Document("translation", turns[0][1], tuple(turns))


def message(rng: random.Random) -> Document:
    """A message or a list of people, with names, numbers and addresses, and something to do with it."""
    key, turns = messages.message_turns(rng, chinese=rng.random() < 0.5)
    if rng.random() < 0.06:
        return Document("message", key, plain=turns[0][1].partition("\n")[2])
    return Document("message", key, tuple(turns))


def request(rng: random.Random, chinese: bool) -> tuple[int, str]:
    """How hard a request is for the pair (0 to 2: what it was taught, what it can try, what it cannot do)."""
    grade = rng.randrange(3)
    if grade == 0:
        return 0, (fact if rng.random() < 0.6 else small_sum)(rng, chinese)[0]
    if grade == 2:
        text = rng.choice(lex.HARD)[chinese]
        return 2, text.format(a=rng.randint(12, 97), b=rng.randint(12, 97))
    if rng.random() < 0.5:
        return 1, story(rng, chinese).ask
    if rng.random() < 0.4:
        en, zh = pair(rng)
        return 1, f"翻译成英文：{zh}" if chinese else f"Translate into Chinese: {en}"
    while True:
        made = message(rng)
        if made.turns and (not made.turns[0][1].isascii()) == chinese:
            return 1, made.turns[0][1]


def triage(rng: random.Random) -> Document:
    """A request to grade as sllm.triage asks: how hard it is, or whether it holds something private."""
    chinese = rng.random() < 0.5
    question, labels, comma, privacy, verdicts, conjunction = lex.TRIAGE["zh" if chinese else "en"]
    grade, text = request(rng, chinese)
    secret = rng.random() < 0.5
    if secret:
        values = messages.person(rng, chinese)
        values |= {"LOGIN": values["EMAIL"].partition("@")[0], "AMOUNT": str(rng.randint(20, 9000))}
        more = messages.fill(rng.choice(lex.SECRETS)[chinese], values)
        space = "" if chinese else " "
        text = f"{text}{space}{more}" if rng.random() < 0.6 else f"{more}{space}{text}"
    answer = labels[grade]
    if rng.random() < 0.4:
        question, labels, comma = privacy, verdicts, conjunction
        told = secret or any(mark in text for mark in ("555-01", "0000", "@example"))
        answer = verdicts[told]
    turn = rng.randrange(len(labels))
    nonce = f"{rng.getrandbits(32):08x}"
    asked = question.format(nonce=nonce, options=comma.join([*labels[turn:], *labels[:turn]]))
    prompt = lex.TRIAGE_FORM.format(nonce=nonce, text=text, question=asked)
    return Document("triage", text, (("user", prompt), ("assistant", answer)))


def conversation(rng: random.Random) -> Document:
    """Several short things in one chat, so that the model learns to change the subject."""
    chinese = rng.random() < 0.45
    turns: list[Turn] = []
    if rng.random() < 0.3:
        turns.append(("system", "你是一个友好的助手。" if chinese else "You are a helpful assistant."))
    for _ in range(rng.randint(2, 4)):
        roll = rng.random()
        if roll < 0.4:
            ask, answer = fact(rng, chinese)
        elif roll < 0.7:
            ask, answer = small_sum(rng, chinese)
        elif roll < 0.85:
            en, zh = pair(rng)
            ask, answer = (f"翻译成英文：{zh}", en) if chinese else (f"Translate into Chinese: {en}", zh)
        else:
            s = story(rng, chinese)
            ask, answer = s.ask, s.text
        turns += [("user", ask), ("assistant", answer)]
    first = next(content for role, content in turns if role == "user")
    return Document("conversation", first, tuple(turns))


# Share of documents, chosen so that more than half of the *tokens* are stories.
MIX: list[tuple[Callable[[random.Random], Document], float]] = [
    (plain_story, 0.12),
    (chat_story, 0.21),
    (tiny_story, 0.13),
    (who_is_who, 0.07),
    (reading, 0.05),
    (question_answer, 0.10),
    (sums, 0.14),
    (translation, 0.10),
    (message, 0.20),
    (triage, 0.15),
    (conversation, 0.03),
]


def document(split: str, index: int, more: Mapping[str, float] | None = None) -> Document:
    """A pure function of its arguments; ``more`` multiplies the shares of some kinds, by function name."""
    rng = random.Random(f"{split}:{index}")
    weights = [w * (more or {}).get(m.__name__, 1.0) for m, w in MIX]
    return rng.choices([m for m, _ in MIX], weights)[0](rng)


def documents(split: str, more: Mapping[str, float] | None = None, first: int = 0) -> Iterator[Document]:
    """All documents of a split from an index on, endless: those of "train" never carry a held-out key,
    others always do.
    """
    unknown = set(more or {}) - {m.__name__ for m, _ in MIX}
    if unknown:
        raise ValueError(f"{sorted(unknown)} are no kinds, expected some of {[m.__name__ for m, _ in MIX]}")
    for index in itertools.count(first):
        doc = document(split, index, more)
        if held_out(doc.key) == (split != "train"):
            yield doc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=["train", "heldout"], default="train")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--jsonl", action="store_true", help="one JSON object per document instead of plain text"
    )
    args = parser.parse_args()
    with args.out.open("w", encoding="utf-8") as out:
        for doc in itertools.islice(documents(args.split), args.documents):
            if args.jsonl:
                record = {"kind": doc.kind, "turns": doc.turns, "plain": doc.plain}
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
            else:
                out.write(doc.text + "\n")


if __name__ == "__main__":
    main()
