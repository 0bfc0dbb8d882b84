"""Messages with names, numbers and addresses, and what is asked about them: plain, and with placeholders.

``sllm.privacy`` masks a text before it leaves the machine, so the pair has to copy placeholders:
``[KIND_INDEX_NONCE]``, with one index over all kinds, counted in the order in which the values occur. A
message is written with ``@NAME@``, ``@PHONE2@`` and the like first; :func:`fill` puts in the values or the
placeholders.
"""

from __future__ import annotations

import json
import random
import re

import lexicon as lex

Turn = tuple[str, str]

PLACEHOLDERS = 0.55  # share of the messages that are masked
_FIELD = re.compile("@([A-Z]+)([0-9]*)@")


def person(rng: random.Random, chinese: bool) -> dict[str, str]:
    """An invented person, in the clear: numbers and addresses of invented patterns."""
    gender = rng.choice("mf")
    first, last = rng.choice(lex.NAMES_EN[gender]), rng.choice(lex.FAMILY_EN)
    login = rng.choices(
        [f"{first}.{last}", f"{first}{rng.randint(1, 99)}", f"{last}{rng.randint(10, 99)}"], [1, 0.6, 0.4]
    )[0].lower()
    email = f"{login}@example.{rng.choice(['com', 'org', 'net'])}"
    if chinese:
        name = rng.choice(lex.FAMILY_ZH) + rng.choice(lex.GIVEN_ZH)
        phone = f"1{rng.choice(['38', '39', '50', '86'])}0000{rng.randint(0, 9999):04d}"
        address = f"{rng.choice(['公园', '长江', '学院', '花园'])}路{rng.randint(2, 99)}号"
    else:
        name = f"{first} {last}"
        phone = f"{rng.choice(['212', '415', '503', '617'])}-555-01{rng.randint(0, 99):02d}"
        address = f"{rng.randint(2, 99)} {rng.choice(['Park', 'Mill', 'Lake', 'Hill'])} Road"
    if rng.random() < 0.2:
        name = lex.made_up(rng, chinese)
        name = (
            rng.choice([*lex.FAMILY_ZH, *"孙徐胡朱高郭马"]) + name[: rng.choice([1, 2])]
            if chinese
            else name.capitalize()
        )
        name = name if chinese else f"{name} {rng.choice([last, lex.made_up(rng, False).capitalize()])}"
    return {"NAME": name, "PHONE": phone, "EMAIL": email, "ADDRESS": address}


def people(rng: random.Random, chinese: bool, count: int) -> dict[str, str]:
    """Values of several invented people: NAME, PHONE, ... of the first, NAME2, ... of the second."""
    found: dict[str, str] = {}
    for i in range(count):
        one = person(rng, chinese)
        while one["NAME"] in found.values():
            one = person(rng, chinese)
        found |= {f"{key}{i + 1 if i else ''}": value for key, value in one.items()}
    return found


def nonce(rng: random.Random) -> str:
    """As sllm.privacy.Placeholders makes them: letters and digits in turn."""
    return "".join(rng.choice(("bcdfghjkmnpqrtvwxz", "23456789")[i % 2]) for i in range(4))


def fill(text: str, values: dict[str, str]) -> str:
    """The text with its values."""
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


def placeholders(rng: random.Random, text: str) -> dict[str, str]:
    """A placeholder for each value of a text, with the index counted in the order in which they occur."""
    # A conversation that goes on has masked other values before.
    index = 1 if rng.random() < 0.6 else rng.randint(2, 12)
    mark, found = nonce(rng), dict[str, str]()
    for match in _FIELD.finditer(text):
        key = match[1] + match[2]
        if key not in found:
            found[key] = f"[{match[1]}_{index}_{mark}]"
            index += 1
    return found


# ---- one message -------------------------------------------------------------------------------------------

# What it says, in the third person, and what the reply says to it; then the same in Chinese.
SUBJECTS = [
    (
        "I would like to meet you on {day} at {hour}",
        "to meet on {day} at {hour}",
        "{day} at {hour} suits me well.",
        "我想{zday}{hour}点和您见面",
        "想在{zday}{hour}点见面",
        "{zday}{hour}点我有时间。",
    ),
    (
        "your {thing} has arrived and you can fetch it on {day}",
        "to say that the {thing} can be fetched on {day}",
        "I will fetch the {thing} on {day}.",
        "您的{zthing}到了，{zday}可以来取",
        "{zthing}到了，{zday}可以取",
        "我{zday}来取{zthing}。",
    ),
    (
        "I cannot come on {day}, because I am ill",
        "to say that {day} is not possible because of an illness",
        "I am sorry that you are ill and cannot come on {day}. I hope that you feel better soon.",
        "我生病了，{zday}不能来",
        "生病了，{zday}不能来",
        "知道您生病了，{zday}不能来，祝您早日康复。",
    ),
    (
        "you are invited to our party on {day} at {hour}",
        "to invite to a party on {day} at {hour}",
        "I will gladly come to your party on {day} at {hour}.",
        "请您{zday}{hour}点来参加我们的聚会",
        "邀请参加{zday}{hour}点的聚会",
        "我很高兴{zday}{hour}点来参加聚会。",
    ),
    (
        "I have lost my {thing}, please call me if you find it",
        "to ask for help to find a lost {thing}",
        "I am sorry that you have lost your {thing}. I will look for it.",
        "我的{zthing}丢了，如果您找到了，请给我打电话",
        "{zthing}丢了，请人帮忙找",
        "听说您的{zthing}丢了，我会帮您找。",
    ),
    (
        "I have found {a_thing} and think that it is yours",
        "to say that {a_thing} was found",
        "I am glad that you have found my {thing}.",
        "我捡到了您的{zthing}",
        "捡到了{zthing}",
        "很高兴您捡到了我的{zthing}。",
    ),
    (
        "the bill for the {thing} is {amount} dollars and is due on {day}",
        "about a bill of {amount} dollars for the {thing}, due on {day}",
        "I will pay the {amount} dollars for the {thing} by {day}.",
        "{zthing}的账单是{amount}元，请在{zday}之前付款",
        "{zthing}的账单{amount}元，{zday}之前付款",
        "{zthing}的{amount}元我会在{zday}之前付。",
    ),
    (
        "our meeting moves from {day} to {other}, at {hour} in room {room}",
        "to say that the meeting moves from {day} to {other} at {hour} in room {room}",
        "I will come to room {room} on {other} at {hour}.",
        "会议从{zday}改到{zother}{hour}点，在{room}号房间",
        "会议从{zday}改到{zother}{hour}点，{room}号房间",
        "我{zother}{hour}点到{room}号房间。",
    ),
    (
        "thank you for the {thing}, I use it every day",
        "to give thanks for the {thing}",
        "I am glad that you like the {thing}.",
        "谢谢您送的{zthing}，我每天都用",
        "感谢送的{zthing}",
        "很高兴您喜欢{zthing}。",
    ),
    (
        "I would like to buy {n} of your {things}, please send them by {day}",
        "to buy {n} {things} by {day}",
        "I will send the {n} {things} by {day}.",
        "我想买{n}个{zthing}，请在{zday}之前寄给我",
        "想买{n}个{zthing}，{zday}之前寄到",
        "{n}个{zthing}会在{zday}之前寄给您。",
    ),
]
# News that no reply of the above is for; the reply only takes note of it.
NEWS = [
    ("the {thing} is too small and the box is broken", "{zthing}太小了，盒子也坏了"),
    ("the train was late, so we missed the boat", "火车晚点了，我们没赶上船"),
    ("the roof leaks since {day} and the floor is wet", "从{zday}起屋顶漏水，地上都湿了"),
    ("the shop has sold all of its {things}", "店里的{zthing}都卖完了"),
    ("my brother broke the {thing} on {day}", "我弟弟{zday}把{zthing}弄坏了"),
    ("the lamp in room {room} does not work", "{room}号房间的灯坏了"),
    ("nobody opened the door at {hour}", "{hour}点没有人开门"),
    ("the price of the {thing} is now {amount} dollars", "{zthing}现在卖{amount}元"),
    ("somebody has left a {made} at my house", "有人把{zmade}忘在我家了"),
    ("the {made} stopped in the night and the {thing} fell down", "{zmade}夜里停了，{zthing}掉下来了"),
]
NEWS_SHARE = 0.2


DAYS = [
    ("Monday", "星期一"),
    ("Tuesday", "星期二"),
    ("Wednesday", "星期三"),
    ("Thursday", "星期四"),
    ("Friday", "星期五"),
    ("Saturday", "星期六"),
    ("Sunday", "星期天"),
]


def _details(rng: random.Random) -> dict[str, str]:
    (day, zday), (other, zother) = rng.sample(DAYS, 2)
    thing, zthing = rng.choice([*((one.en, one.zh) for one in lex.THINGS), *lex.BELONGINGS, *lex.BELONGINGS])
    made_up = lex.made_up(rng, chinese=False), lex.made_up(rng, chinese=True)
    if rng.random() < 0.04:
        thing, zthing = made_up
    elif rng.random() < 0.12:
        thing, zthing = lex.BELONGINGS[0]  # what the demo asks for
    return {
        "day": day,
        "zday": zday,
        "other": other,
        "zother": zother,
        "hour": str(rng.randint(1, 12)),
        "thing": thing,
        "made_up": "yes" if (thing, zthing) == made_up else "",
        "made": lex.made_up(rng, chinese=False),
        "zmade": lex.made_up(rng, chinese=True),
        "a_thing": ("an " if thing[0] in "aeiou" else "a ") + thing,
        "things": _plural(thing),
        "zthing": zthing,
        "amount": str(rng.randint(11, 990)),
        "room": str(rng.randint(10, 499)),
        "n": str(rng.randint(2, 20)),
    }


def _plural(noun: str) -> str:
    if noun.endswith("fe"):
        return f"{noun[:-2]}ves"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def _said(rng: random.Random, details: dict[str, str]) -> list[str]:
    """What a message says, a summary of it and the reply, in English and then in Chinese."""
    if rng.random() >= NEWS_SHARE:
        return [text.format(**details) for text in rng.choice(SUBJECTS)]
    if rng.random() < 0.3:
        (who, zwho), (does, zdoes) = rng.choice(lex.SUBJECTS), rng.choice(lex.VERBS_AT)
        site, zsite = rng.choice(lex.SITES)
        told, ztold = f"{who[0].lower()}{who[1:]} {does} {site}", f"{zwho}{zsite}{zdoes}"
    else:
        news = rng.choice(NEWS)
        told, ztold = (text.format(**details) for text in news)
        details["made_up"] = details["made_up"] or ("yes" if "{made}" in news[0] else "")
    return [told, f"that {told}", "I have noted it.", ztold, ztold, "我知道了。"]


def _english(rng: random.Random, contact: list[str]) -> tuple[str, str, str, str]:
    """A message in English, its reply and summary, and the message in Chinese, or ""."""
    details = _details(rng)
    body, gist, reply, zbody, _, _ = _said(rng, details)
    body = body[0].upper() + body[1:]
    says = {"PHONE": "phone number", "EMAIL": "e-mail", "ADDRESS": "address"}
    parts = [f"{says[key]} is @{key}@" for key in contact]
    where = f" My {' and my '.join(parts)}." if parts else ""
    if contact == ["PHONE"] and rng.random() < 0.3:
        where = rng.choice([" Please call me at @PHONE@.", " You can reach me at @PHONE@ today."])
    if contact == ["EMAIL"] and rng.random() < 0.3:
        where = rng.choice([" Please write to @EMAIL@.", " You can reach me at @EMAIL@."])
    text = rng.choice(
        [
            f"Hello, this is @NAME@. {body}.{where}",
            f"Good morning, this is @NAME@. {body}.{where}",
            f"@NAME@ here. {body}.{where}",
            f"Hello, this is @NAME@. {body}.{where}",
            f"Hello, my name is @NAME@. {body}.{where}",
            f"Hello! {body}.{where} Kind regards, @NAME@",
        ]
    )
    says_zh = {"PHONE": "电话", "EMAIL": "邮箱", "ADDRESS": "地址"}
    zwhere = f"我的{'，'.join(f'{says_zh[key]}是@{key}@' for key in contact)}。" if contact else ""
    close = _close(contact, lost="lost" in body)
    answer = f"Dear @NAME@, thank you for your message. {reply} {close}Kind regards"
    summary = f"@NAME@ writes {gist}{_told(contact)}."
    translated = "" if details["made_up"] else f"您好，我是@NAME@。{zbody}。{zwhere}"
    return text, answer, summary, translated


def _close(contact: list[str], *, lost: bool) -> str:
    when = "If I find it" if lost else "If anything changes"
    if "PHONE" in contact:
        return f"{when}, I will call you at @PHONE@. "
    return f"{when}, I will write to you at @EMAIL@. " if "EMAIL" in contact else ""


def _told(contact: list[str]) -> str:
    says = {"PHONE": "phone number", "EMAIL": "e-mail address", "ADDRESS": "address"}
    return "".join(f"; the {says[key]} is @{key}@" for key in contact)


def _chinese(rng: random.Random, contact: list[str]) -> tuple[str, str, str, str]:
    """A message in Chinese, its reply and summary, and the message in English, or ""."""
    details = _details(rng)
    body, _, _, zbody, zgist, zreply = _said(rng, details)
    says = {"PHONE": "电话", "EMAIL": "邮箱", "ADDRESS": "地址"}
    where = f"我的{'，'.join(f'{says[key]}是@{key}@' for key in contact)}。" if contact else ""
    if contact == ["PHONE"] and rng.random() < 0.25:
        where = rng.choice(["请打@PHONE@找我。", "可以打@PHONE@联系我。"])
    forms = ["您好，我是@NAME@。{}。{}"] * 3 + ["您好！{}。{}@NAME@", "我叫@NAME@。{}。{}"]
    text = rng.choice(forms).format(zbody, where)
    when = "如果找到了" if "丢" in zbody else "如果有变化"
    close = f"{when}，我会打@PHONE@联系您。" if "PHONE" in contact else ""
    if not close and "EMAIL" in contact:
        close = f"{when}，我会写信到@EMAIL@。"
    answer = f"@NAME@您好：谢谢您的消息。{zreply}{close}祝好！"
    summary = f"@NAME@的消息：{zgist}。" + "".join(f"{says[key]}：@{key}@。" for key in contact)
    english = {"PHONE": "phone number", "EMAIL": "e-mail", "ADDRESS": "address"}
    parts = [f"{english[key]} is @{key}@" for key in contact]
    en_where = f" My {' and my '.join(parts)}." if parts else ""
    translated = f"Hello, this is @NAME@. {body[0].upper() + body[1:]}.{en_where}"
    return text, answer, summary, "" if details["made_up"] else translated


def one_message(rng: random.Random, chinese: bool) -> list[Turn]:
    """A message, and one to three things to do with it."""
    contact = rng.choice(
        [["PHONE"], ["PHONE"], ["PHONE", "EMAIL"], ["PHONE", "EMAIL"], ["EMAIL"], ["EMAIL", "PHONE"], []]
    )
    contact = [*contact, "ADDRESS"] if rng.random() < 0.12 else contact
    if chinese:
        text, reply, summary, translated = _chinese(rng, contact)
        jobs = [
            (rng.choice(["请给这条消息写一个有礼貌的回复：", "请礼貌地回复这条消息："]), reply),
            (rng.choice(["请用一句话概括这条消息：", "请总结这条消息："]), summary),
            ("这条消息是谁写的？", "这条消息是@NAME@写的。"),
            ("请把这条消息翻译成英文：", translated),
        ]
        asked = {"PHONE": "电话是多少", "EMAIL": "邮箱是什么", "ADDRESS": "地址是什么"}
        says = {"NAME": "姓名", "PHONE": "电话", "EMAIL": "邮箱", "ADDRESS": "地址"}
        jobs += [(f"这条消息里的{asked[key]}？", f"{says[key]}是@{key}@。") for key in contact]
        lines = [f"{says[key]}：@{key}@" for key in ("NAME", *contact)]
        jobs += [("请列出这条消息里的联系方式：", "\n".join(lines))]
        as_json = "请用 JSON 写出这条消息里的联系方式："
    else:
        text, reply, summary, translated = _english(rng, contact)
        jobs = [
            (
                rng.choice(["Write a polite reply to this message:", "Please answer this message politely:"]),
                reply,
            ),
            (rng.choice(["Summarise this message in one sentence:", "Summarise this message:"]), summary),
            ("Who wrote this message?", "@NAME@ wrote this message."),
            ("Translate this message into Chinese:", translated),
        ]
        says = {"NAME": "Name", "PHONE": "Phone", "EMAIL": "E-mail", "ADDRESS": "Address"}
        asked = {"PHONE": "phone number", "EMAIL": "e-mail address", "ADDRESS": "address"}
        jobs += [
            (f"What is the {asked[key]} in this message?", f"The {asked[key]} is @{key}@.") for key in contact
        ]
        jobs += [
            (
                "List the contact details in this message:",
                "\n".join(f"{says[key]}: @{key}@" for key in ("NAME", *contact)),
            )
        ]
        as_json = "Write the contact details in this message as JSON:"
    jobs.append((as_json, json.dumps({key.lower(): f"@{key}@" for key in ("NAME", *contact)})))
    jobs = [(ask, answer) for ask, answer in jobs if answer]
    # A reply is what is wanted most; translations and lists are hardest.
    hard = [job for job in jobs if "ranslat" in job[0] or "翻译" in job[0] or job[1].count("@") > 3]
    chosen = rng.sample(jobs, rng.choice([1, 1, 2]))
    if hard and rng.random() < 0.35:
        chosen = [rng.choice(hard)]
    if rng.random() < 0.4:
        chosen = [jobs[0], *(job for job in chosen[:1] if job != jobs[0])]
    turns: list[Turn] = []
    for i, (ask, answer) in enumerate(chosen):
        turns += [("user", f"{ask}\n{text}" if i == 0 else ask.rstrip(":：")), ("assistant", answer)]
    return turns


# ---- lists and tables of several people --------------------------------------------------------------------


def contacts(rng: random.Random, chinese: bool) -> list[Turn]:
    """Several people as a list or as JSON, written in another form, or one of them picked out."""
    count = rng.choice([2, 2, 3])
    ends = ["", *(str(i + 1) for i in range(1, count))]
    key = rng.choice(["PHONE", "PHONE", "EMAIL"])
    en, zh = {"PHONE": ("phone number", "电话"), "EMAIL": ("e-mail address", "邮箱")}[key]
    forms = {
        "list": "\n".join(f"{i + 1}. @NAME{end}@: @{key}{end}@" for i, end in enumerate(ends)),
        "lines": "\n".join(f"- @NAME{end}@, @{key}{end}@" for end in ends),
        "JSON": json.dumps([{"name": f"@NAME{end}@", key.lower(): f"@{key}{end}@"} for end in ends]),
        "table": "\n".join(
            ["| name | " + key.lower() + " |", *(f"| @NAME{end}@ | @{key}{end}@ |" for end in ends)]
        ),
    }
    given, wanted = rng.sample(sorted(forms), 2)
    picked = rng.choice(ends)
    if chinese:
        shapes = {"list": "编号列表", "lines": "列表", "JSON": " JSON", "table": "表格"}
        rewrite = (f"请把它写成{shapes[wanted]}：", forms[wanted])
        question = (f"@NAME{picked}@的{zh}是多少？", f"@NAME{picked}@的{zh}是@{key}{picked}@。")
        who = (f"@{key}{picked}@是谁的{zh}？", f"这是@NAME{picked}@的{zh}。")
        names = ("这里有哪些人？", "、".join(f"@NAME{end}@" for end in ends) + "。")
    else:
        shapes = {"list": "a numbered list", "lines": "a list", "JSON": "JSON", "table": "a table"}
        rewrite = (f"Write this as {shapes[wanted]}:", forms[wanted])
        question = (f"What is the {en} of @NAME{picked}@?", f"The {en} of @NAME{picked}@ is @{key}{picked}@.")
        who = (f"Whose {en} is @{key}{picked}@?", f"It is the {en} of @NAME{picked}@.")
        names = ("Which people are named here?", " and ".join(f"@NAME{end}@" for end in ends) + ".")
    turns: list[Turn] = []
    for i, (ask, answer) in enumerate(rng.sample([rewrite, question, who, names], rng.choice([1, 2, 2]))):
        turns += [("user", f"{ask}\n{forms[given]}" if i == 0 else ask.rstrip(":：")), ("assistant", answer)]
    return turns


def message_turns(rng: random.Random, chinese: bool) -> tuple[str, list[Turn]]:
    """A conversation about a message or a list of people, with the values in it, and what identifies it."""
    several = rng.random() < 0.28
    turns = contacts(rng, chinese) if several else one_message(rng, chinese)
    clear = people(rng, chinese, 3)
    text = "".join(content for _, content in turns)
    values = placeholders(rng, text) if rng.random() < PLACEHOLDERS else clear
    filled = [(role, fill(content, values)) for role, content in turns]
    # The same words with other values are the same request.
    return turns[0][1] + (clear["NAME"] if several else ""), filled
