"""Code, configuration, JSON and logs: what is private in them is found, and the rest stays as it is."""

from __future__ import annotations

import base64
import random
import string

import pytest

from sllm.privacy import Vault
from sllm.privacy.names import lac

with_extra = pytest.mark.skipif(lac.installed() is None, reason="the extra names is not installed")


def _masked(text: str) -> str:
    return Vault().mask(text).text


# ---- labels in code and configuration ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "name: Publish\non:\n  release:\njobs:\n  wheels:\n    name: Wheels\n    steps: []\n",
        "kind: Service\nmetadata:\n  name: Gateway\n  namespace: Staging\nspec:\n  owner: Platform\n",
        "services:\n  web:\n    image: nginx\n    name: Proxy\n    user: Worker\n",
        '{"name": "Storefront", "version": "2.1.0", "scripts": {"build": "vite"}, "author": "Builders"}',
        "name: Nightly",
        '[tool.x]\nname = "Quagga"\n',
        '[package]\nname = "Crawler"\nversion = "0.3.1"\nedition = "2021"\n',
        "from x import y\n\n@dataclass\nclass Visit:\n    patient: Patient\n    name: Text\n    owner: Any\n",
        "class Order(BaseModel):\n    customer: Customer\n    sender: Optional[Party] = None\n",
        "const user = {name: Input, manager: Props.manager}\n",
        'module "network" {\n  name = "Backbone"\n  source = "./net"\n}\n',
        "<project>\n  <artifactId>web</artifactId>\n  <name>Dashboard</name>\n</project>\n",
        "name: Rebuild\n\nThen rebuild the index.",
    ],
)
def test_a_label_in_code_needs_a_name(text: str) -> None:
    assert _masked(text) == text


@pytest.mark.parametrize(
    ("text", "name"),
    [
        pytest.param("教授曾国强来了", "曾国强", marks=with_extra),
        ("name: Wataru\nphone: 555-123-9876\n", "Wataru"),
        ('{"name": "Ottoline", "email": "o@example.org", "version": 3}', "Ottoline"),
        ("on: push\nauthor: Desmond Hargreaves\n", "Desmond Hargreaves"),
        ("version: 2\nmaintainer:\n  name: Margaret Kowalski\n", "Margaret Kowalski"),
        ("Patient: Oyelaran\nWard: 4\n", "Oyelaran"),
    ],
)
def test_a_person_in_a_record_is_found(text: str, name: str) -> None:
    assert name not in _masked(text)


def test_a_word_of_a_workflow_is_no_known_value_later() -> None:
    vault = Vault()
    vault.mask("name: Release\non: push\n")
    later = "Release the image, then tell me whether the Release is out."
    assert vault.mask(later).text == later


@pytest.mark.parametrize(
    "text",
    [
        'Github = "https://example.org/acme/tool"\nTwitter: "http://example.org/t1"\n',
        "data = {'username':self.name_1, 'login': request.login2}",
        "auth(username=config.user_1, login=args.login_2)",
        "handle: get_handle_1()",
    ],
)
def test_an_expression_is_no_user(text: str) -> None:
    assert _masked(text) == text


@pytest.mark.parametrize(
    ("text", "user"),
    [
        ("machine git.example.org login mferreira password Zq7-hhT2x", "mferreira"),
        ("machine files.example.org\n  login okwu.b\n  password Zq7-hhT2x\n", "okwu.b"),
        ('{"username": "mferreira_7"}', "mferreira_7"),
        ("username: m.ferreira", "m.ferreira"),
    ],
)
def test_a_user_is_found(text: str, user: str) -> None:
    assert user not in _masked(text)


# ---- numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Part K4-002-000027266-3 replaces R7-001-000031877-1.",
        "iat=1719914000 exp=1719917600456 nbf=1719914000123",
        "https://x.example.com/p?token_at=1719914000&page=2",
        "客服电话已停用。合同金额为2316547.80元。",
        "手机丢失！本月支出1876543元",
        "物料编码：110105194912310021",
        "运单号 440301199001011230 已签收",
        "流水号：31010119800307123X",
        "FROM node:8.17.0.31\nimage: redis:7.2.4.101\n",
        "Version 2.4.16.33-beta is out, after numpy:1.26.4.31 and openssl-1.1.1.22",
        "The plan of 2019 2020 office moves",
    ],
)
def test_numbers_of_things_stay(text: str) -> None:
    assert _masked(text) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Reach her at 617 4402 office or later", "617 4402"),
        ("802-9914 (Fax)", "802-9914"),
        ("493 2207-Fax", "493 2207"),
        ("https://x.example.com/cb?mobile=13912345670&ts=1719914000", "13912345670"),
        ("身份证号码：110105194912310021", "110105194912310021"),
        ("物料编码之外，身份证：110105194912310021", "110105194912310021"),
        ("server 192.168.4.20-backup is down", "192.168.4.20"),
        ("Assigned to EMP-47113 and STAFF 2", "EMP-47113"),
        ("see (MRN-5530172) for details", "MRN-5530172"),
        ("吕晴15912345678上海市浦东新区", "吕晴"),
        ("已寄出。郝文博15912345678", "郝文博"),
    ],
)
def test_numbers_of_people_are_found(text: str, value: str) -> None:
    assert value not in _masked(text)


def test_query_strings_keep_their_times() -> None:
    assert "ts=1719914000" in _masked("https://x.example.com/cb?mobile=13912345670&ts=1719914000")


@pytest.mark.parametrize(
    "text",
    [
        "导师曾建议先读论文",
        "教授曾批评过这种做法，主任曾强调质量",
        "老师曾提到这个方法",
        "新领导班子上任三个月",
        "别人的电话不要乱记",
        "Appointed Chairperson of the Board.",
        "Every Spokesperson of the Union agreed.",
    ],
)
def test_words_are_not_cut_into_names(text: str) -> None:
    assert _masked(text) == text


# ---- secrets -----------------------------------------------------------------------------------------------


def _random(alphabet: str, n: int, seed: int) -> str:
    return "".join(random.Random(seed).choices(alphabet, k=n))


_BASE62 = string.ascii_letters + string.digits
_HEX = "0123456789abcdef"


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "form",
    [
        'variable "x" {{\n  default = "{}"\n}}\n',
        "access_secret     {} shared-credentials-file",
        "api:\n  key: {}\n",
        'API_KEY = "{}"',
        "export SIGNING={}",
        '{{"storage": "{}"}}',
    ],
)
def test_a_random_value_that_is_assigned(form: str, seed: int) -> None:
    value = _random(_BASE62, 40, seed)
    assert value not in _masked(form.format(value))


@pytest.mark.parametrize("seed", range(20))
def test_a_key_without_a_digit(seed: int) -> None:
    value = _random(string.ascii_letters, 32, seed)
    assert value not in _masked(f'SECRET_KEY = "{value}"')


@pytest.mark.parametrize(
    "text",
    [
        "commit = " + _random(_HEX, 40, 1),
        'hash = "sha256:' + _random(_HEX, 64, 2) + '"',
        '"integrity": "sha512-' + _random(_BASE62, 86, 3) + '=="',
        'handler = "getAccountSettingsByOrganisation"',
        "title = quarterly_report_2024_final_version_2",
        "key = AbstractSingletonProxyFactoryBean",
        "path: src/components/UserProfileSettings/index",
        "id: " + _random(_BASE62, 24, 4),
        "default = some_quite_long_identifier_v2",
        "token = tokenizer.convert_tokens_to_ids",
        "sk-estimator-with-grid-search, sk-model-v2-large-2024",
        "n_tokens, cur->nb[2] and tokens, view->ne[1]",
    ],
)
def test_what_is_no_secret(text: str) -> None:
    assert _masked(text) == text


_KEYS = [
    "ntn_" + _random(_BASE62, 46, 1),
    "vercel_" + _random(string.ascii_letters, 24, 2),
    "sntrys_" + _random(_BASE62, 60, 3),
    "llx-" + _random(_BASE62, 48, 4),
    "fc-" + _random(_HEX, 32, 5),
    "AGE-SECRET-KEY-1" + _random("QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L", 58, 6),
    "sk-" + _random(_BASE62, 20, 7) + "." + _random(_BASE62, 20, 8),
    _random(_HEX, 32, 9) + "." + _random(_BASE62, 16, 10),
    "figd_" + _random(_BASE62, 40, 11),
    "dapi" + _random(_HEX, 32, 12),
    "pcsk_" + _random(_BASE62, 50, 13),
    "glsa_" + _random(_BASE62, 40, 14),
]


@pytest.mark.parametrize("key", _KEYS)
def test_keys_of_vendors_in_prose(key: str) -> None:
    for text in (f"it printed {key} and stopped", f"把 {key} 放进去", f"({key})"):
        assert key not in _masked(text)


def test_the_key_of_a_connection_string() -> None:
    key = _random(_BASE62 + "+/", 86, 20) + "=="
    masked = _masked(f"DefaultEndpointsProtocol=https;AccountName=logs;AccountKey={key};EndpointSuffix=core")
    assert key[:-2] not in masked and masked.endswith(";EndpointSuffix=core")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("pwd=Kx4<qz>Rt7!", "Kx4<qz>Rt7!"),
        ("DB_PASSWORD=mn$d`e8F!w", "mn$d`e8F!w"),
        ("password: ab'c\"d9Ef!", "ab'c\"d9Ef!"),
        ('password = "Yq7"tu!8b"', 'Yq7"tu!8b'),
        ("密码是：春眠不觉晓1984Xyz", "春眠不觉晓1984Xyz"),
        ("口令：大漠孤烟#77q", "大漠孤烟#77q"),
        ("登录密码为“小桥流水人家”", "小桥流水人家"),
    ],
)
def test_a_password_is_not_cut(text: str, value: str) -> None:
    masked = _masked(text)
    assert not any(value[i : i + 3] in masked for i in range(len(value) - 2)), masked


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("<password>Kx4qzRt7!</password>", "</password>"),
        ('{"password": "Kx4qzRt7!", "n": 1}', '", "n": 1}'),
        ("run with password='Kx4qzRt7!'.", "'."),
        ("password=Kx4qzRt7!&page=2", "&page=2"),
    ],
)
def test_what_follows_a_password_stays(text: str, rest: str) -> None:
    masked = _masked(text)
    assert masked.endswith(rest) and "Kx4qzRt7" not in masked


@pytest.mark.parametrize(
    "text", ["密码：北京2008年奥运会", "密码是：请在第3页查看", "密码为6位数字", "密码是由系统生成的"]
)
def test_a_sentence_is_no_password(text: str) -> None:
    assert _masked(text) == text


# ---- what is encoded ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inner",
    ["姓名：郝文博，手机15912345678", '{"phone": "15912345678", "n": 4}', "mail to d.hargreaves@example.org"],
)
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_base64_of_something_private(inner: str, encode: object) -> None:
    assert callable(encode)
    run = encode(inner.encode()).decode()
    for text in (f"payload: {run}", f"d={run}&n=1", f"curl -d {run.rstrip('=')} x"):
        assert run.rstrip("=") not in _masked(text)


def test_base64_of_something_else() -> None:
    run = base64.b64encode(b"the quick brown fox jumps").decode()
    assert _masked(f"body: {run}") == f"body: {run}"


def test_quoted_printable_needs_a_sign_of_mail() -> None:
    assert "15912345678" in _masked("a=A15912345678B") or "PHONE" in _masked("a=A15912345678B")
    mail = "Content-Transfer-Encoding: quoted-printable\n\nAnruf: =31=35912345678 bitte"
    assert "5912345678" not in _masked(mail)
    assert _masked("x=31=35912345678") == "x=31=35912345678"


@pytest.mark.parametrize(
    "text",
    [
        "def build(config: Wav2Vec2ConformerConfig) -> None:",
        'loader = "Qwen3VLMoeTextConfigLoader"',
        "handler: app.windll.shell32.CommandLineToArgvW",
        'checkpoint="ExampleOrgM4/Model3-8B-Base3"',
        "manager.register_pass<ov::pass::MakeStateful2>(x)",
        "the tokens of T5Tokenizer's vocabulary, num_windows^2",
    ],
)
def test_names_of_code_are_no_secrets(text: str) -> None:
    assert _masked(text) == text


@pytest.mark.parametrize(
    "form",
    [
        'variable "db_password" {{\n  type    = string\n  default = "{}"\n}}\n',
        "- name: API_TOKEN\n  value: {}\n",
        "api_secret     {} shared-credentials-file",
    ],
)
def test_hexadecimal_of_something_that_is_named_a_secret(form: str) -> None:
    value = _random(_HEX, 40, 21)
    assert value not in _masked(form.format(value))
