"""A seeded generator of texts with private values in known places, and of texts without any.

Values are made here from the published rules (ISO 7064, Luhn, ISO 13616, ...), by code of its own: nothing
is taken from the package under test. Templates are Chinese and English; surfaces vary in width, spacing and
neighbours.
"""

from __future__ import annotations

import base64
import hashlib
import random
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WIDE = str.maketrans("0123456789", "０１２３４５６７８９")


@dataclass(frozen=True)
class Case:
    """A text and where the values in it are: kind -> half-open ranges."""

    text: str
    spans: tuple[tuple[int, int, str], ...]


def digits(rng: random.Random, n: int) -> str:
    return "".join(rng.choice(string.digits) for _ in range(n))


def luhn_digit(body: str) -> str:
    total = 0
    for i, char in enumerate(reversed(body)):
        value = int(char) * (2 if i % 2 == 0 else 1)
        total += value - 9 if value > 9 else value
    return str(-total % 10)


# ---- values ------------------------------------------------------------------------------------------------


def email(rng: random.Random) -> str:
    user = rng.choice(
        ["zhang.san", "li_si", "wang-wu", "j.doe", "anna+news", "x", "m1ke", "sales.eu", "o_brien99"]
    )
    host = rng.choice(
        [
            "example.com",
            "qq.com",
            "163.com",
            "mail.example.co.uk",
            "uni-bonn.de",
            "foo.bar.org",
            "sina.com.cn",
        ]
    )
    return f"{user}{rng.randrange(1000)}@{host}"


MOBILE = [
    *(f"13{i}" for i in range(10)),
    "150",
    "151",
    "152",
    "153",
    "155",
    "156",
    "157",
    "158",
    "159",
    "166",
    "173",
    "175",
    "176",
    "177",
    "178",
    *(f"18{i}" for i in range(10)),
    "191",
    "198",
    "199",
]


def cn_mobile(rng: random.Random) -> str:
    number = rng.choice(MOBILE) + digits(rng, 8)
    a, b, c = number[:3], number[3:7], number[7:]
    return rng.choice(
        [
            number,
            number,
            f"{a} {b} {c}",
            f"{a}-{b}-{c}",
            f"+86 {number}",
            f"+86{number}",
            f"+86-{a}-{b}-{c}",
            f"86{number}",
            number.translate(WIDE),
            "\u200b".join(number),
            f"0086{number}",
            f"(+86) {number}",
            f"{a}\u00a0{b}\u00a0{c}",
        ]
    )


def cn_landline(rng: random.Random) -> str:
    area, n = rng.choice(
        [
            ("010", 8),
            ("021", 8),
            ("020", 8),
            ("0571", 8),
            ("0755", 8),
            ("0531", 8),
            ("0898", 8),
            ("0411", 8),
            ("0311", 8),
        ]
    )
    number = str(rng.randrange(2, 9)) + digits(rng, n - 1)
    return rng.choice(
        [
            f"{area}-{number}",
            f"{area} {number}",
            f"({area}){number}",
            f"（{area}）{number}",
            f"{area}-{number[:4]}-{number[4:]}",
        ]
    )


def us_phone(rng: random.Random) -> str:
    a = rng.choice(["212", "415", "312", "617", "206", "305", "702", "503"])
    b, c = f"{rng.randrange(2, 10)}{digits(rng, 2)}", digits(rng, 4)
    return rng.choice(
        [
            f"({a}) {b}-{c}",
            f"{a}-{b}-{c}",
            f"+1 {a} {b} {c}",
            f"+1-{a}-{b}-{c}",
            f"{a}.{b}.{c}",
            f"1-{a}-{b}-{c}",
            f"+1 ({a}) {b}-{c}",
        ]
    )


def world_phone(rng: random.Random) -> str:
    return rng.choice(
        [
            f"+44 20 7{digits(rng, 3)} {digits(rng, 4)}",
            f"+44 7{rng.choice('4578')}{digits(rng, 2)} {digits(rng, 6)}",
            f"+49 30 {rng.randrange(2, 9)}{digits(rng, 6)}",
            f"+49 151 {digits(rng, 8)}",
            f"+33 6 {digits(rng, 2)} {digits(rng, 2)} {digits(rng, 2)} {digits(rng, 2)}",
            f"+81 90-{rng.randrange(1, 10)}{digits(rng, 3)}-{digits(rng, 4)}",
            f"+852 9{digits(rng, 3)} {digits(rng, 4)}",
            f"+886 9{digits(rng, 2)} {digits(rng, 3)} {digits(rng, 3)}",
            f"+65 8{digits(rng, 3)} {digits(rng, 4)}",
            f"+91 98{digits(rng, 3)} {digits(rng, 5)}",
            f"+61 4{digits(rng, 2)} {digits(rng, 3)} {digits(rng, 3)}",
            f"+82 10-{rng.randrange(2, 10)}{digits(rng, 3)}-{digits(rng, 4)}",
            f"+7 916 {digits(rng, 3)}-{digits(rng, 2)}-{digits(rng, 2)}",
            f"+55 11 9{digits(rng, 4)}-{digits(rng, 4)}",
        ]
    )


REGIONS = [
    "110105",
    "310101",
    "440305",
    "330106",
    "510104",
    "420106",
    "610113",
    "350203",
    "230102",
    "530102",
    "650102",
    "320505",
]


def cn_id(rng: random.Random) -> str:
    body = (
        f"{rng.choice(REGIONS)}{rng.randrange(1940, 2015)}{rng.randrange(1, 13):02}"
        f"{rng.randrange(1, 29):02}{digits(rng, 3)}"
    )
    weights = [7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2]
    number = body + "10X98765432"[sum(int(d) * w for d, w in zip(body, weights, strict=True)) % 11]
    return rng.choice(
        [
            number,
            number,
            number,
            number.lower(),
            f"{number[:6]} {number[6:14]} {number[14:]}",
            f"{number[:6]}-{number[6:14]}-{number[14:]}",
            number.translate(WIDE),
        ]
    )


def bank_card(rng: random.Random) -> str:
    prefix, n = rng.choice(
        [
            ("4", 16),
            ("51", 16),
            ("55", 16),
            ("37", 15),
            ("6222", 19),
            ("6217", 19),
            ("6225", 16),
            ("6011", 16),
            ("3528", 16),
        ]
    )
    body = prefix + digits(rng, n - len(prefix) - 1)
    number = body + luhn_digit(body)
    if n == 16:
        grouped = " ".join(number[i : i + 4] for i in range(0, 16, 4))
        return rng.choice([number, grouped, grouped.replace(" ", "-"), number.translate(WIDE)])
    if n == 19:
        return rng.choice(
            [number, " ".join(number[i : i + 4] for i in range(0, 19, 4)), f"{number[:6]} {number[6:]}"]
        )
    return rng.choice([number, f"{number[:4]} {number[4:10]} {number[10:]}"])


def iban(rng: random.Random) -> str:
    country, body = rng.choice(
        [
            ("DE", digits(rng, 18)),
            ("AT", digits(rng, 16)),
            ("NL", "ABNA" + digits(rng, 10)),
            ("GB", "NWBK" + digits(rng, 14)),
            ("CH", digits(rng, 17)),
            ("SE", digits(rng, 20)),
        ]
    )
    text = body + country + "00"
    check = 98 - int("".join(str(int(c, 36)) for c in text)) % 97
    number = f"{country}{check:02}{body}"
    return rng.choice([number, " ".join(number[i : i + 4] for i in range(0, len(number), 4))])


def uscc(rng: random.Random) -> str:
    alphabet = "0123456789ABCDEFGHJKLMNPQRTUWXY"
    body = (
        rng.choice(["91", "92", "52", "12"])
        + rng.choice(REGIONS)
        + rng.choice(["MA", "07", "66"])
        + "".join(rng.choice(alphabet) for _ in range(6))
        + rng.choice(alphabet)
    )
    total = sum(alphabet.index(c) * pow(3, i, 31) for i, c in enumerate(body))
    return body + alphabet[(31 - total % 31) % 31]


def plate(rng: random.Random) -> str:
    head = rng.choice("京沪粤浙苏川渝鲁豫鄂湘闽赣皖桂") + rng.choice("ABCDEFGH")
    old = digits(rng, 4) + rng.choice("ABCKLMNPQRSTUVWXYZ0123456789")
    new = rng.choice("DF") + rng.choice("ABCDEFGHJK0123456789") + digits(rng, 4)
    tail = rng.choice([old, new, digits(rng, 5) + rng.choice("DF")])
    return head + rng.choice(["", "", "·", " "]) + tail


def passport(rng: random.Random) -> str:
    return rng.choice(
        ["E" + digits(rng, 8), "G" + digits(rng, 8), "E" + rng.choice("ABCDEFGHJK") + digits(rng, 7)]
    )


def ipv4(rng: random.Random) -> str:
    return (
        f"{rng.choice([10, 58, 101, 114, 172, 192, 203, 222])}.{rng.randrange(256)}."
        f"{rng.randrange(256)}.{rng.randrange(21, 255)}"
    )


def ipv6(rng: random.Random) -> str:
    groups = [f"{rng.randrange(0x1000, 0x10000):x}" for _ in range(5)]
    return rng.choice(
        [
            f"2001:db8:{groups[0]}:{groups[1]}:{groups[2]}:{groups[3]}:{groups[4]}:1",
            f"2400:{groups[0]}::{groups[1]}",
            f"fe80::{groups[0]}:{groups[1]}:{groups[2]}:{groups[3]}",
        ]
    )


def mac(rng: random.Random) -> str:
    return rng.choice([":", "-"]).join(f"{rng.randrange(256):02x}" for _ in range(6)).upper()


def url(rng: random.Random) -> str:
    return (
        f"{rng.choice(['https', 'postgres', 'mysql', 'redis', 'ftp'])}://"
        f"{rng.choice(['root', 'admin', 'app'])}:{secret_word(rng)}@db{rng.randrange(9)}.example.com/x"
        f"{rng.randrange(99)}"
    )


def secret_word(rng: random.Random) -> str:
    return (
        "".join(rng.choice(string.ascii_lowercase) for _ in range(5))
        + rng.choice(string.ascii_uppercase)
        + digits(rng, 3)
    )


def key(rng: random.Random) -> str:
    def some(n: int, alphabet: str = string.ascii_letters + string.digits) -> str:
        return "".join(rng.choice(alphabet) for _ in range(n - 2)) + "a7"

    claims = base64.urlsafe_b64encode(f'{{"sub":"{digits(rng, 10)}"}}'.encode()).decode().rstrip("=")
    return rng.choice(
        [
            f"sk-proj-{some(40)}",
            f"ghp_{some(36)}",
            f"AKIA{''.join(rng.choice(string.ascii_uppercase) for _ in range(13))}7Q2",
            f"AIza{some(35)}",
            f"xoxb-{digits(rng, 12)}-{some(24)}",
            f"hf_{some(34)}",
            f"glpat-{some(20)}",
            f"LTAI{some(20)}",
            f"sk_live_{some(24)}",
            f"eyJhbGciOiJIUzI1NiJ9.{claims}.{some(43)}",
        ]
    )


def ssn(rng: random.Random) -> str:
    return f"{rng.randrange(100, 650)}-{rng.randrange(10, 99)}-{rng.randrange(1000, 9999)}"


def address_cn(rng: random.Random) -> str:
    city = rng.choice(
        [
            "北京市海淀区",
            "上海市浦东新区",
            "广东省深圳市南山区",
            "浙江省杭州市西湖区",
            "四川省成都市武侯区",
            "江苏省苏州市工业园区",
            "湖北省武汉市洪山区",
        ]
    )
    road = rng.choice(
        ["中关村大街", "张江路", "科技园路", "文三路", "人民南路", "星湖街", "珞喻路", "长安街"]
    )
    house = f"{rng.randrange(1, 999)}号"
    more = rng.choice(
        [
            "",
            f"{rng.randrange(1, 30)}号楼{rng.randrange(1, 6)}单元{rng.randrange(101, 2505)}室",
            f"{rng.randrange(1, 30)}栋{rng.randrange(101, 2505)}",
            "阳光花园" + f"{rng.randrange(1, 30)}幢",
        ]
    )
    return city + road + house + more


def address_en(rng: random.Random) -> str:
    road = rng.choice(
        ["Baker", "Oak", "Maple", "Elm Park", "Martin Luther King", "Fifth", "Willow Creek", "St. John's"]
    )
    kind = rng.choice(["Street", "St", "Avenue", "Ave.", "Road", "Rd", "Lane", "Drive", "Boulevard", "Court"])
    tail = rng.choice(["", f", Apt {rng.randrange(1, 99)}", f", Springfield, IL {digits(rng, 5)}"])
    return f"{rng.randrange(1, 9999)} {road} {kind}{tail}"


def date_cn(rng: random.Random) -> str:
    y, m, d = rng.randrange(1940, 2015), rng.randrange(1, 13), rng.randrange(1, 29)
    return rng.choice([f"{y}年{m}月{d}日", f"{y}-{m:02}-{d:02}", f"{y}/{m}/{d}", f"{y}.{m:02}.{d:02}"])


def date_en(rng: random.Random) -> str:
    y, m, d = rng.randrange(1940, 2015), rng.randrange(1, 13), rng.randrange(1, 29)
    month = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ][m - 1]
    return rng.choice(
        [
            f"{month} {d}, {y}",
            f"{d} {month} {y}",
            f"{m:02}/{d:02}/{y}",
            f"{y}-{m:02}-{d:02}",
            f"{d} {month[:3]} {y}",
        ]
    )


def vin(rng: random.Random) -> str:
    alphabet = "ABCDEFGHJKLMNPRSTUVWXYZ0123456789"
    values = dict(zip("ABCDEFGHJKLMNPRSTUVWXYZ", map(int, "12345678123457923456789"), strict=True)) | {
        str(i): i for i in range(10)
    }
    while True:
        code = "L" + "".join(rng.choice(alphabet) for _ in range(10)) + digits(rng, 6)
        total = sum(
            values[c] * w
            for c, w in zip(code, (8, 7, 6, 5, 4, 3, 2, 10, 0, 9, 8, 7, 6, 5, 4, 3, 2), strict=True)
        )
        code = code[:8] + "0123456789X"[total % 11] + code[9:]
        if sum(c.isalpha() for c in code) >= 2:
            return code


def wallet(rng: random.Random) -> str:
    return rng.choice(
        [
            "0x" + "".join(rng.choice("0123456789abcdef") for _ in range(39)) + "7",
            "bc1q" + "".join(rng.choice("023456789acdefghjklmnpqrstuvwxyz") for _ in range(37)) + "7",
        ]
    )


# ---- texts with values -------------------------------------------------------------------------------------

# Kind -> value, and templates to put it in.
KINDS: dict[str, tuple[Callable[[random.Random], str], list[str]]] = {
    "EMAIL": (
        email,
        [
            "我的邮箱是{}，谢谢。",
            "请发到{}谢谢",
            "Please write to {} by Friday.",
            "邮件{}和附件",
            "<{}>",
            "mailto:{}",
            "Contact: {}; thanks",
        ],
    ),
    "PHONE": (
        cn_mobile,
        [
            "手机{}，请回电",
            "我的电话是{}。",
            "请加微信{}详聊",
            "call {} now",
            "打{}找我",
            "联系方式：{}",
            "（{}）",
            "Tel:{}",
        ],
    ),
    "PHONE/landline": (cn_landline, ["座机{}。", "公司电话：{}", "请致电 {} 咨询", "office: {}"]),
    "PHONE/us": (
        us_phone,
        ["Call me at {}.", "My number is {}, ask for Bob", "电话{}", "Fax: {}", "Reach us: {}"],
    ),
    "PHONE/world": (world_phone, ["WhatsApp {}", "my number: {}.", "海外电话{}请记下", "dial {} today"]),
    "IDCARD": (
        cn_id,
        ["身份证号{}。", "身份证{}号码", "他的证件是{}，请核实", "ID: {}", "号码为{}的乘客", "{}"],
    ),
    "CARD": (
        bank_card,
        [
            "银行卡{}，开户行招商银行",
            "卡号：{}",
            "Charge my card {} please.",
            "请转到{}",
            "card no {}",
            "信用卡是{}的",
        ],
    ),
    "IBAN": (iban, ["IBAN: {}", "Transfer to {}, please.", "账户{}。", "汇款到{}谢谢"]),
    "COMPANYID": (uscc, ["统一社会信用代码：{}", "税号{}开票", "公司代码{}。"]),
    "PLATE": (plate, ["车牌{}停在门口", "我的车是{}。", "{}请挪车", "车牌号：{}"]),
    "PASSPORT": (passport, ["护照{}", "护照号码：{}。", "passport number {}", "My passport is {}."]),
    "IP": (ipv4, ["服务器{}无法访问", "ssh root@{}", "ping {} fails", "IP地址：{}。"]),
    "IP/6": (ipv6, ["地址{}不通", "ping6 {} ok", "IPv6: {}"]),
    "MAC": (mac, ["MAC {}", "网卡{}已绑定", "device {} is offline"]),
    "URL": (url, ["连接{}失败", "DATABASE_URL={}", "Use {} for now"]),
    "SECRET/word": (
        secret_word,
        [
            "密码是{}",
            "密码：{}，别告诉别人",
            "password: {}",
            'password = "{}"',
            "PASSWORD={}",
            "口令为{}。",
            "my password is {}",
        ],
    ),
    "SECRET/key": (
        key,
        ["用这个key：{}", "OPENAI_API_KEY={}", 'token = "{}"', "Authorization: Bearer {}", "密钥{}已泄露"],
    ),
    "SSN": (ssn, ["SSN {}", "My social security number is {}.", "ssn: {}, thanks"]),
    "ADDRESS/cn": (address_cn, ["我住在{}。", "地址：{}", "请寄到{}，谢谢", "收货地址是{}，电话稍后给你"]),
    "ADDRESS/en": (address_en, ["I live at {}.", "Ship it to {} please", "Address: {}"]),
    "BIRTHDATE/cn": (date_cn, ["出生日期：{}", "生于{}，汉族", "他的生日是{}。", "{}出生"]),
    "BIRTHDATE/en": (date_en, ["DOB: {}", "I was born on {}.", "Date of birth: {}", "born {} in Ohio"]),
    "VIN": (vin, ["VIN {}", "车架号{}。", "the vehicle {} was sold"]),
    "WALLET": (wallet, ["send to {}", "钱包地址{}请转账", "BTC/ETH: {}"]),
}

FILLERS = [
    "",
    "",
    "你好，",
    "麻烦帮我处理一下：",
    "Hello, ",
    "FYI: ",
    "第3季度的报表里写着，",
    "As discussed yesterday, ",
]
TAILS = ["", "", "谢谢！", " Thanks!", "\n请尽快。", " (see above)"]


def cases(n_spans: int, seed: int) -> Iterator[Case]:
    """Texts that hold ``n_spans`` values together, every kind equally often."""
    rng = random.Random(seed)
    names = list(KINDS)
    for i in range(n_spans):
        name = names[i % len(names)]
        make, templates = KINDS[name]
        value = make(rng)
        head, tail = rng.choice(templates).split("{}")
        start = rng.choice(FILLERS) + head
        text = start + value + tail + rng.choice(TAILS)
        yield Case(text, ((len(start), len(start) + len(value), name),))


# ---- texts without -----------------------------------------------------------------------------------------


def _code(rng: random.Random) -> str:
    return rng.choice(
        [
            f"def f(x):\n    return x[{rng.randrange(9)}::{rng.randrange(2, 9)}] + {rng.randrange(1000)}",
            f'password = input("Password: ")\nif len(password) < {rng.randrange(6, 20)}: raise ValueError',
            f"token: str | None = None\nmax_tokens = {rng.choice([256, 512, 1024, 4096])}",
            (
                f"SELECT id, name FROM t{rng.randrange(99)} WHERE id = {rng.randrange(10**6)} LIMIT "
                f"{rng.randrange(100)};"
            ),
            f"std::vector<int> v({rng.randrange(1000)}); foo::bar::baz(v);",
            f"git checkout {hashlib.sha1(digits(rng, 9).encode()).hexdigest()}",
            (
                f"pip install numpy=={rng.randrange(3)}.{rng.randrange(30)}.{rng.randrange(9)} "
                f"lodash@4.{rng.randrange(20)}.{rng.randrange(30)}"
            ),
            f"for (int i = 0; i < {rng.randrange(10**5)}; ++i) sum += a[i] * {rng.random():.6f};",
            (
                f"@decorator\nclass A{rng.randrange(99)}: pass  # see "
                f"https://example.com/docs/{rng.randrange(99)}"
            ),
            f'api_key = os.environ["KEY_{rng.randrange(9)}"]; secret = config.get("secret")',
            f"#include <stdio.h>\nint main(void) {{ return {rng.randrange(256)}; }}",
            (
                f"color: #{rng.randrange(0x1000000):06x}; width: {rng.randrange(2000)}px;"
                f" margin: 0 {rng.randrange(99)}px;"
            ),
            (
                f"docker run -p 8080:{rng.randrange(80, 9999)} "
                f"image:{rng.randrange(9)}.{rng.randrange(99)} --memory {rng.randrange(64)}g"
            ),
        ]
    )


def _maths(rng: random.Random) -> str:
    return rng.choice(
        [
            f"Compute {rng.randrange(10**9)} * {rng.randrange(10**9)} and show your steps.",
            f"计算 {rng.randrange(10**6)}+{rng.randrange(10**6)}×{rng.randrange(100)} 等于多少？",
            f"pi is 3.14159265358979 and e is 2.718281828459045; compare with {rng.random():.12f}",
            f"Solve x^2 - {rng.randrange(100)}x + {rng.randrange(1000)} = 0",
            (
                f"求函数f(x)={rng.randrange(9)}x³-{rng.randrange(9)}x+{rng.randrange(99)}在区间["
                f"{rng.randrange(9)}, {rng.randrange(10, 99)}]上的最大值"
            ),
            (
                f"matrix [[{rng.randrange(99)}, {rng.randrange(99)}], [{rng.randrange(99)}, "
                f"{rng.randrange(99)}]] times [1, {rng.randrange(9)}]"
            ),
            f"{rng.randrange(1, 9)}/{rng.randrange(2, 9)} + {rng.randrange(1, 9)}/{rng.randrange(2, 9)} = ?",
            f"Is {rng.randrange(10**8)} prime? What about {rng.randrange(10**5)}?",
        ]
    )


def _numbers(rng: random.Random) -> str:
    isbn = "978" + digits(rng, 9)
    check = -sum(int(c) * (3 if i % 2 else 1) for i, c in enumerate(isbn)) % 10
    return rng.choice(
        [
            (
                f"订单号：{rng.randrange(2023, 2027)}{rng.randrange(1, 13):02}"
                f"{rng.randrange(1, 29):02}{digits(rng, 10)}，什么时候发货？"
            ),
            f"Order #{digits(rng, 8)} has not arrived yet.",
            (
                f"价格从¥{rng.randrange(100, 9999)}降到¥{rng.randrange(10, 99)}.{digits(rng, 2)}，便宜"
                f"了{rng.randrange(5, 80)}%"
            ),
            f"It costs ${rng.randrange(1, 999)},{digits(rng, 3)}.{digits(rng, 2)} or €{rng.randrange(1000)}.",
            f"ISBN {isbn[:3]}-{isbn[3]}-{isbn[4:7]}-{isbn[7:12]}-{check}",
            f"ISBN {isbn}{check}是哪本书？",
            (
                f"版本{rng.randrange(9)}.{rng.randrange(20)}.{rng.randrange(20)}.{rng.randrange(3000)}"
                f"修复了{rng.randrange(99)}个问题"
            ),
            (
                f"Version {rng.randrange(9)}.{rng.randrange(20)}.{rng.randrange(20)} was released on "
                f"2024-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}."
            ),
            f"sha256: {hashlib.sha256(digits(rng, 9).encode()).hexdigest()}",
            f"md5 {hashlib.md5(digits(rng, 9).encode()).hexdigest()} 校验失败",
            (
                f"uuid {hashlib.md5(digits(rng, 9).encode()).hexdigest()[:8]}-1234-4abc-8def-"
                f"{hashlib.md5(digits(rng, 8).encode()).hexdigest()[:12]}"
            ),
            (
                f"会议定在{rng.randrange(2024, 2027)}年{rng.randrange(1, 13)}月{rng.randrange(1, 29)}"
                f"日下午{rng.randrange(1, 9)}点{rng.randrange(10, 59)}分"
            ),
            (
                f"Meet on {rng.randrange(1, 13)}/{rng.randrange(1, 29)}/2025 at "
                f"{rng.randrange(10, 23)}:{rng.randrange(10, 59)}:{rng.randrange(10, 59)}."
            ),
            (
                f"unix time {rng.randrange(1_600_000_000, 1_800_000_000)}, that is "
                f"{rng.randrange(10**3)} ms late"
            ),
            (
                f"人口从{rng.randrange(10**4, 10**7)}增长到{rng.randrange(10**4, 10**7)}，增幅"
                f"{rng.random() * 10:.2f}%"
            ),
            (
                f"比分{rng.randrange(9)}-{rng.randrange(9)}，上半场{rng.randrange(5)}:"
                f"{rng.randrange(5)}，观众{rng.randrange(10**5)}人"
            ),
            (
                f"The sensor read {rng.random() * 100:.4f}, {rng.random() * 100:.4f} and "
                f"{rng.random() * 100:.4f} degrees."
            ),
            (
                f"第{rng.randrange(1, 99)}章第{rng.randrange(1, 20)}节，第{rng.randrange(1, 999)}页，"
                f"图{rng.randrange(1, 20)}.{rng.randrange(1, 20)}"
            ),
            f"乘坐{rng.randrange(1, 20)}号线到科技路站换乘{rng.randrange(1, 20)}号线",
        ]
    )


CHAT = [
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "帮我写一首关于春天的诗，要押韵。",
    "忘记密码怎么办？密码是什么意思？",
    "Explain how transformers work in simple terms.",
    "北京市是中国的首都，海淀区有很多大学。",
    "从南京路步行到人民广场要多久？",
    "What is the capital of Australia?",
    "Write a haiku about the sea.",
    "我是学生，想学习机器学习，应该从哪里开始？",
    "Shall I compare thee to a summer's day? Thou art more lovely and more temperate.",
    "周末和同学去爬山，需要准备什么？",
    "请把下面的句子翻译成英文：今天的天气真好。",
    "How do I reset my password on this site?",
    "The token is a unit of text that the model reads.",
    "苹果公司发布了新款手机，性能提升明显。",
    "身份证丢了怎么补办？",
    "手机号码怎么注销？",
    "What does an IP address look like?",
    "银行卡被锁了该怎么办",
    "Summarize the plot of Hamlet in three sentences.",
    "推荐几本关于历史的书。",
    "我国的高速公路总里程是世界第一。",
    "Give me three tips for better sleep.",
    "如何提高英语口语水平？",
    "Can you explain the difference between TCP and UDP?",
    "红烧肉怎么做才好吃？",
    "地址解析协议是什么？",
    "My favourite colour is blue and I like long walks.",
    "出生率下降的原因有哪些？",
    "Tell me a joke about programmers.",
    "这条路通向山顶，旁边有一个村庄。",
    "公司的发展需要每个人的努力。",
    "In the long run, prices adjust.",
    "他的电话打不通，可能在开会。",
    "Which is larger, Lake Superior or Lake Victoria?",
    "车牌限行的规定是什么？",
]


def clean(n: int, seed: int) -> Iterator[str]:
    """Texts in which nothing is private."""
    rng = random.Random(seed)
    for i in range(n):
        make = (_code, _maths, _numbers, lambda rng: rng.choice(CHAT))[i % 4]
        text = make(rng)
        yield text if rng.random() < 0.7 else f"{text}\n{rng.choice(CHAT)}"
