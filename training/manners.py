"""Whether answers keep to what was asked: details of messages, placeholders, the subject of a story.

The requests here are none that the generator makes: their people and things are in no list of
``lexicon.py``. Only the masked ones are of the form that the pair was taught, and have other marks.
"""

from __future__ import annotations

import itertools
import random
import re

from tokenizers import Tokenizer

import corpus
import lexicon as lex
import messages
from model import Llama
from sample import answer

MARKS = 20
_BRACKETS = re.compile(r"\[[^\[\]]*\]")

_REPLY = "Write a polite reply to this message:"

# Request, and what its answer has to say.
DETAILS = [
    (
        f"{_REPLY}\nHello, this is Nora Winter. {says} My phone number is 617-555-0163.",
        [*words, "617-555-0163"],
    )
    for says, words in [
        ("I have lost my telescope, please call me if you find it.", ["telescope"]),
        ("I have lost my violin, please call me if you find it.", ["violin"]),
        ("I have lost my trumpet, please call me if you find it.", ["trumpet"]),
        ("Your sandals have arrived and you can fetch them on Tuesday.", ["sandals", "Tuesday"]),
        ("Your anchor has arrived and you can fetch it on Saturday.", ["anchor", "Saturday"]),
        ("I would like to meet you on Monday at 11.", ["Monday", "11"]),
        ("I would like to see you on Thursday at 9.", ["Thursday", "9"]),
        ("Our meeting moves from Friday to Sunday, at 10 in room 318.", ["Sunday", "10", "318"]),
        ("The bill for the piano is 452 dollars and is due on Wednesday.", ["piano", "452", "Wednesday"]),
        ("You are invited to our wedding on Sunday at 3.", ["Sunday", "3"]),
    ]
] + [
    (
        f"请给这条消息写一个有礼貌的回复：\n您好，我是孙丽华。{says}我的电话是13900007316。",
        [*words, "13900007316"],
    )
    for says, words in [
        ("我的望远镜丢了，如果您找到了，请给我打电话。", ["望远镜"]),
        ("我的小提琴丢了，如果您找到了，请给我打电话。", ["小提琴"]),
        ("我的喇叭丢了，如果您找到了，请给我打电话。", ["喇叭"]),
        ("您的凉鞋到了，星期二可以来取。", ["凉鞋", "星期二"]),
        ("您的船锚到了，星期六可以来取。", ["船锚", "星期六"]),
        ("我想星期一11点和您见面。", ["星期一", "11"]),
        ("我想星期四9点去看您。", ["星期四", "9"]),
        ("会议从星期五改到星期天10点，在318号房间。", ["星期天", "10", "318"]),
        ("钢琴的账单是452元，请在星期三之前付款。", ["钢琴", "452", "星期三"]),
        ("请您星期天3点来参加我们的婚礼。", ["星期天", "3"]),
    ]
]

# Each with the placeholders that its answer has to hold, and no others.
MASKED = [
    (
        (
            f"{_REPLY}\nHello, this is @NAME@. I have lost my umbrella, please call me if you find it. My"
            " phone number is @PHONE@."
        ),
        ["NAME", "PHONE"],
    ),
    (
        (
            "List the contact details in this message:\nHello, this is @NAME@. I would like to meet you on"
            " Friday at 4. My e-mail is @EMAIL@ and my phone number is @PHONE@."
        ),
        ["NAME", "EMAIL", "PHONE"],
    ),
    (
        (
            "Write the contact details in this message as JSON:\nHello! Your kite has arrived and you can"
            " fetch it on Monday. My phone number is @PHONE@ and my e-mail is @EMAIL@. Kind regards, @NAME@"
        ),
        ["PHONE", "EMAIL", "NAME"],
    ),
    (
        (
            "Translate this message into Chinese:\nHello, this is @NAME@. I cannot come on Sunday, because I"
            " am ill. My phone number is @PHONE@."
        ),
        ["NAME", "PHONE"],
    ),
    (
        "请给这条消息写一个有礼貌的回复：\n您好，我是@NAME@。我的雨伞丢了，如果您找到了，请给我打电话。我的电话是@PHONE@。",
        ["NAME", "PHONE"],
    ),
    (
        "请列出这条消息里的联系方式：\n您好，我是@NAME@。我想星期五4点和您见面。我的电话是@PHONE@，邮箱是@EMAIL@。",
        ["NAME", "PHONE", "EMAIL"],
    ),
    (
        "What is the phone number of @NAME2@?\n1. @NAME@: @PHONE@\n2. @NAME2@: @PHONE2@",
        ["NAME2", "PHONE2"],
    ),
    # A sentence that is not of their world.
    (
        (
            f"{_REPLY}\nGood evening, @NAME@ speaking. The ferry was late and so the glass broke. Please"
            " ring @PHONE@ tonight."
        ),
        ["NAME", "PHONE"],
    ),
]

# Words of a request that do not say what its story is about.
_IDLE = """
tell please write would like can you short little story about named called who the and with how which very has
does goes that lives from for two friends friend being after helping making long way learn lost
"""


def details_right(target: Llama, tokenizer: Tokenizer) -> float:
    """Share of messages whose reply has the name, the number and the details of the message."""
    right = 0
    for request, words in DETAILS:
        text = answer(target, tokenizer, request, 120)
        right += all(word in text for word in words)
    return right / len(DETAILS)


def placeholders_right(target: Llama, tokenizer: Tokenizer) -> list[int]:
    """For each of MASKED, how many of MARKS answers have all placeholders that are wanted, and no others."""
    counts = []
    for number, (request, wanted) in enumerate(MASKED):
        right = 0
        for mark in range(MARKS):
            rng = random.Random(f"marks:{number}:{mark}")
            issued = messages.placeholders(rng, request)
            text = answer(target, tokenizer, messages.fill(request, issued), 140)
            right += set(_BRACKETS.findall(text)) == {issued[key] for key in wanted}
        counts.append(right)
    return counts


def subjects_kept(target: Llama, tokenizer: Tokenizer, count: int) -> float:
    """Share of held-out English story requests whose telling words are all in the story."""
    asks = (
        doc.turns[0][1]
        for doc in corpus.documents("heldout")
        if doc.kind == "chat_story" and doc.turns[0][1].isascii()
    )
    right = 0
    for ask in itertools.islice(asks, count):
        text = answer(target, tokenizer, ask, 400).lower()
        about = {word for word in re.findall("[a-z]{3,}", ask.lower()) if word not in _IDLE.split()}
        right += all(word.removesuffix("s")[:5] in text for word in about)
    return right / count


def labels_right(target: Llama, tokenizer: Tokenizer, count: int) -> dict[str, float]:
    """Shares of held-out labelled requests with the right label: how hard they are, and whether private."""
    right, total = dict.fromkeys(("grade", "privacy"), 0), dict.fromkeys(("grade", "privacy"), 0)
    asked = (doc for doc in corpus.documents("heldout") if doc.kind == "triage")
    for doc in itertools.islice(asked, count):
        (_, request), (_, label) = doc.turns
        kind = "privacy" if any(label in lex.TRIAGE[language][4] for language in lex.TRIAGE) else "grade"
        right[kind] += answer(target, tokenizer, request, 4) == label
        total[kind] += 1
    return {kind: right[kind] / total[kind] for kind in right}
