"""What a model may be called, and which of a repository's files is meant."""

from __future__ import annotations

import os
import shutil
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sllm
from sllm import embedded
from sllm.cli import main as cli
from sllm.engine import hub
from sllm.engine.hub_files import choose
from sllm.engine.layers import Embedding, open_layers, open_source
from sllm.engine.model_name import HubName, looks_like_model, parse
from sllm.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)


FILE = HubName("me/it", "sub/m.gguf")

UNDERSTOOD = [
    ("hf://me/it/sub/m.gguf", FILE),
    ("HF://me/it/sub/m.gguf", FILE),
    ("hf://models/me/it/sub/m.gguf", FILE),
    ("hf.co/me/it/sub/m.gguf", FILE),
    ("huggingface.co/me/it/resolve/main/sub/m.gguf", HubName("me/it", "sub/m.gguf", "main")),
    ("https://huggingface.co/me/it/resolve/main/sub/m.gguf", HubName("me/it", "sub/m.gguf", "main")),
    ("https://huggingface.co/me/it/resolve/main/m.gguf?download=true", HubName("me/it", "m.gguf", "main")),
    ("https://huggingface.co/me/it/blob/main/m.gguf", HubName("me/it", "m.gguf", "main")),
    ("http://www.huggingface.co/me/it/raw/v1.0/m.gguf#L1", HubName("me/it", "m.gguf", "v1.0")),
    ("https://HuggingFace.co/me/it/tree/main/m.gguf", HubName("me/it", "m.gguf", "main")),
    ("https://hf.co/me/it/blob/refs/pr/7/s/m.gguf", HubName("me/it", "s/m.gguf", "refs/pr/7")),
    ("https://hf.co/me/it/blob/refs%2Fpr%2F7/m.gguf", HubName("me/it", "m.gguf", "refs/pr/7")),
    ("https://hf.co/me/it/resolve/main/a%20b%E6%A8%A1.gguf", HubName("me/it", "a b模.gguf", "main")),
    ("https://hf.co/me/it?show_file_info=s%2Fm.gguf", HubName("me/it", "s/m.gguf")),
    ("https://hf.co/me/it", HubName("me/it", None)),
    ("https://hf.co/me/it/", HubName("me/it", None)),
    ("https://hf.co/me/it?local-app=llama.cpp", HubName("me/it", None)),
    ("https://hf.co/me/it:Q8_0", HubName("me/it", None, None, "Q8_0")),
    ("https://hf.co/me/it/tree/main", HubName("me/it", None, "main")),
    ("https://hf.co/me/it/tree/main/Q8_0", HubName("me/it", None, "main", None, "Q8_0")),
    ("hf://me/it", HubName("me/it", None)),
    ("hf://me/it:any-Tag.gguf", HubName("me/it", None, None, "any-Tag.gguf")),
    ("hf://me/it@v1:Q8_0", HubName("me/it", None, "v1", "Q8_0")),
    ("hf://me/it@refs/pr/7", HubName("me/it", None, "refs/pr/7")),
    ("hf://me/it@refs/pr/7:F16", HubName("me/it", None, "refs/pr/7", "F16")),
    ("hf://me/it@a%2Fb/m.gguf", HubName("me/it", "m.gguf", "a/b")),
    ("hf://me/it/m:x.gguf", HubName("me/it", "m:x.gguf")),
    ("hf.co/me/it:latest", HubName("me/it", None, None, "latest")),
    ("hf.co/me/it:anything", HubName("me/it", None, None, "anything")),
    ("me/it:Q4_K_M", HubName("me/it", None, None, "Q4_K_M")),
    ("me/it:q4_k_m", HubName("me/it", None, None, "q4_k_m")),
    ("me/it-1.5.x:UD-IQ2_XXS", HubName("me/it-1.5.x", None, None, "UD-IQ2_XXS")),
    ("me/it@v1:BF16", HubName("me/it", None, "v1", "BF16")),
    ("me/it:latest", HubName("me/it", None, None, "latest")),
    ("me/it:MXFP4", HubName("me/it", None, None, "MXFP4")),
]


@pytest.mark.parametrize(("name", "expected"), UNDERSTOOD, ids=[name for name, _ in UNDERSTOOD])
def test_names_of_the_hub(name: str, expected: HubName) -> None:
    assert parse(name) == expected
    assert hub.is_uri(name)
    assert parse(expected.uri) == HubName(*expected.__dict__.values()) or expected.folder
    assert looks_like_model(name)


@pytest.mark.parametrize("name", [name for name, _ in UNDERSTOOD if "://" in name and "\\" not in name])
def test_a_path_made_of_a_name(name: str) -> None:
    folded = PurePosixPath(name)  # two slashes have become one
    assert "//" not in str(folded)
    assert parse(folded) == parse(name.rstrip("/"))


def test_the_mirror_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    address = "https://mirror.example:8443/me/it/resolve/main/m.gguf"
    with pytest.raises(ModelLoadError, match="from the Hugging Face hub and"):
        parse(address)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example:8443")
    assert parse(address) == HubName("me/it", "m.gguf", "main")
    assert parse("mirror.example:8443/me/it:Q8_0") == HubName("me/it", None, None, "Q8_0")
    assert parse("https://huggingface.co/me/it/resolve/main/m.gguf") == HubName("me/it", "m.gguf", "main")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf://", "owner, repository or file is missing; expected hf://owner/repo"),
        ("hf.co/me", "owner, repository or file is missing"),
        ("hf.co/", "owner, repository or file is missing"),
        ("https://huggingface.co", "owner, repository or file is missing"),
        ("https://huggingface.co/me/it/resolve/main", "the file after /resolve/ is missing"),
        ("https://huggingface.co/me/it/blob/main/", "the file after /blob/ is missing"),
        ("https://huggingface.co/me/it/tree", "the file after /tree/ is missing"),
        ("https://huggingface.co/datasets/me/it/resolve/main/m.gguf", "one of the hub's datasets"),
        ("hf.co/spaces/me/it", "one of the hub's spaces"),
        ("https://example.com/m.gguf", "https://example.com/...: sllm downloads from the Hugging Face hub"),
        ("https://huggingface.co.example.com/me/it/resolve/main/m.gguf", "from the Hugging Face hub and"),
        ("s3://bucket/m.gguf", "cannot load s3://...: no such kind of address is known; expected hf://"),
        ("ollama://llama3.2", "no such kind of address"),
        ("file://server/share/m.gguf", "with three slashes"),
        ("file://m.gguf", "expected file:///folder/file.gguf"),
        ("file://", "three slashes"),
        ("sllm://secret@host:5", "names a worker, expected a model"),
        ("~nobody-of-that-name/m.gguf", "name the whole path"),
    ],
)
def test_what_is_not_understood_says_what_is(name: str, words: str) -> None:
    with pytest.raises(ModelLoadError) as refused:
        parse(name)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_secret_of_an_address_is_shown() -> None:
    for name in (
        "sllm://secret@host:5#sha256=00",
        "https://me:secret@example.com/m.gguf?token=secret",
        "s3://secret@bucket/m.gguf",
    ):
        with pytest.raises(ModelLoadError) as refused:
            parse(name)
        assert "secret" not in str(refused.value)


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("~/m.gguf") == tmp_path / "m.gguf"
    assert parse(Path("~/m.gguf")) == tmp_path / "m.gguf"
    for form in ("file://{}", "file:{}", "FILE://localhost{}"):
        assert parse(form.format("/a%20b/%E6%A8%A1%25.gguf")) == Path("/a b/模%.gguf")
    assert os.fsencode(parse("file:///%FF.gguf")) == b"/\xff.gguf"  # type: ignore[arg-type]
    assert parse(PurePosixPath("file:///m.gguf")) == Path("/m.gguf")
    for text in (
        "m.gguf",
        "a/b.gguf",
        "a/b",
        "me/it:tag",
        "a:Q8_0",
        "a/b/c:Q8_0",
        "C:/m.gguf",
        "C:\\m",
        "é/x:Q8_0",
    ):
        assert parse(text) == Path(text)
        assert parse(Path(text)) == Path(text)


def test_a_file_of_this_machine_counts_more(tmp_path: Path) -> None:
    for name in ("hf.co/me/it.gguf", "me/it:Q8_0", "~/m.gguf"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.touch()
        assert parse(name) == Path(name)


@given(st.text(), st.booleans())
def test_any_text_is_understood_or_refused(text: str, is_path: bool) -> None:
    try:
        found = parse(Path(text) if is_path else text)
    except (ModelLoadError, UnicodeEncodeError):
        found = None
    assert found is None or isinstance(found, (Path, HubName))
    looks_like_model(text)


@given(st.from_regex(r"(hf://|hf\.co/|https://hf\.co/|file:)[a-z/:@%?#.]{0,20}", fullmatch=True))
def test_any_address_is_understood_or_refused(text: str) -> None:
    try:
        found = parse(text)
    except ModelLoadError:
        return
    if isinstance(found, HubName):
        assert found.repo_id.count("/") == 1
        assert found.filename != ""


# ---- a prompt that is a model


def test_prompts_that_are_models(tmp_path: Path) -> None:
    (tmp_path / "a b.gguf").touch()
    (tmp_path / "blob").write_bytes(b"GGUF\x03\0\0\0")
    (tmp_path / "notes.txt").write_text("GGUF is a format")
    (tmp_path / "folder").mkdir()
    for text in ("x.gguf", "a/B.GGUF", "a b.gguf", "blob", "me/it:Q4_K_M", "hf://me", "file:///x.gguf"):
        assert looks_like_model(text), text
    for text in (
        "Hello",
        "What is x.gguf",
        "and/or",
        "and/or:maybe",
        "notes.txt",
        "folder",
        "",
        ".",
        "~",
        "a\nx.gguf",
    ):
        assert not looks_like_model(text), text
    for text in ("https://example.com/page", "hf.co is down", "me/it:Q4_K_M is large", "\0", "x" * 9999):
        assert not looks_like_model(text), text


# ---- which file of a repository

REPO = [
    ".gitattributes",
    "README.md",
    "imatrix.gguf",
    "it-BF16/it-BF16-00001-of-00002.gguf",
    "it-BF16/it-BF16-00002-of-00002.gguf",
    "it-IQ4_XS.gguf",
    "it-Q4_K.gguf",
    "it-Q4_K_M.gguf",
    "it-Q4_K_S.gguf",
    "it-UD-Q4_K_M.gguf",
    "it-q8_0.gguf",
    "mmproj-it-Q8_0.gguf",
    "mtp-it-Q8_0.gguf",
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("me/it:Q4_K_M", "it-Q4_K_M.gguf"),
        ("me/it:q4_k_m", "it-Q4_K_M.gguf"),
        ("me/it:Q4_K", "it-Q4_K.gguf"),
        ("me/it:UD-Q4_K_M", "it-UD-Q4_K_M.gguf"),
        ("me/it:Q8_0", "it-q8_0.gguf"),
        ("me/it:BF16", "it-BF16/it-BF16-00001-of-00002.gguf"),
        ("hf://me/it:mmproj-it-Q8_0.gguf", "mmproj-it-Q8_0.gguf"),
        ("hf://me/it:IT-BF16-00001-of-00002.gguf", "it-BF16/it-BF16-00001-of-00002.gguf"),
        ("hf://me/it", "it-Q4_K_M.gguf"),
        ("hf.co/me/it:latest", "it-Q4_K_M.gguf"),
        ("https://hf.co/me/it/tree/main/it-BF16", "it-BF16/it-BF16-00001-of-00002.gguf"),
    ],
)  # fmt: skip
def test_the_file_that_is_meant(name: str, expected: str) -> None:
    found = parse(name)
    assert isinstance(found, HubName)
    assert choose(found, REPO) == expected
    assert choose(found, reversed(REPO)) == expected


@pytest.mark.parametrize(
    ("tag", "files", "words"),
    [
        ("Q6_K", REPO, ["no GGUF file of Q6_K", "me/it:BF16, IQ4_XS, Q4_K, Q4_K_M, Q4_K_S, UD-Q4_K_M, q8_0"]),
        ("Q4", REPO, ["no GGUF file of Q4"]),
        (None, ["a-Q5_K_M.gguf", "a-Q6_K.gguf"], ["has 2 GGUF files", "me/it:Q5_K_M, Q6_K"]),
        (None, ["a.gguf", "b.gguf"], ["hf://me/it/a.gguf, b.gguf"]),
        ("Q8_0", ["a-Q8_0.gguf", "b-Q8_0.gguf", "b-F16.gguf"], ["2 GGUF files of Q8_0", "hf://me/it/a-Q8_0.gguf"]),
        (None, ["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], ["has 2 GGUF files"]),
        (None, ["model.safetensors"], ["no GGUF file, but a safetensors checkpoint", "-GGUF at its end"]),
        ("Q8_0", ["README.md"], ["no GGUF file; look at the repository's files"]),
        (None, [f"m-{i}.gguf" for i in range(99)], ["has 99 GGUF files", "and 83 more"]),
    ],
)  # fmt: skip
def test_a_choice_that_is_none(tag: str | None, files: list[str], words: list[str]) -> None:
    with pytest.raises(ModelLoadError) as refused:
        choose(HubName("me/it", None, None, tag), files)
    for word in words:
        assert word in str(refused.value)
    assert str(refused.value).startswith("cannot load hf://me/it")


def test_one_file_needs_no_tag() -> None:
    assert choose(HubName("me/it", None), ["a.gguf", "mmproj.gguf", "x.txt"]) == "a.gguf"
    assert choose(HubName("me/it", None), ["a-Q8_0.gguf", "a-Q6_K.gguf"]) == "a-Q8_0.gguf"


# ---- wherever a model is named


@pytest.fixture(params=["file", "home"])
def named(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The small model, by a name that is no path."""
    shutil.copyfile(embedded.DRAFT, tmp_path / "a b.gguf")
    monkeypatch.setenv("HOME", str(tmp_path))
    return f"{tmp_path.as_uri()}/a%20b.gguf" if request.param == "file" else "~/a b.gguf"


def closed(thing: Any) -> None:
    thing.close()


@pytest.mark.parametrize(
    "use",
    [
        lambda name: closed(sllm.Model(name)),
        lambda name: closed(sllm.LocalTarget(name, n_ctx=64)),
        lambda name: closed(sllm.LayerRange(name, 0, 1, n_ctx=64)),
        lambda name: closed(sllm.Worker(name, layers=True, n_ctx=64, insecure=True)),
        lambda name: closed(Embedding(open_layers(name))),
        lambda name: sllm.export_layers(name, "out.gguf", 0, 1),
        open_source,
    ],
    ids=["Model", "LocalTarget", "LayerRange", "Worker", "Embedding", "export_layers", "open_source"],
)
def test_names_are_understood_wherever_a_model_is_named(named: str, use: Callable[[str], object]) -> None:
    use(named)


@pytest.mark.parametrize(
    "before",
    [
        ["run", "-n", "1", "Once", "--target"],
        ["run", "-n", "1", "Once", "--draft"],
        ["inspect"],
        ["split", "--layers", "0:1"],
        ["codec-report", "--head", "1", "--tail", "0", "MODEL", "text.txt"],
        ["ask", "-n", "1", "Once", "--small"],
    ],
    ids=lambda before: before[0],
)
def test_commands_understand_names(named: str, before: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    words = [named if word == "MODEL" else word for word in before]
    Path("text.txt").write_text("Once upon a time there was a fox.")
    assert cli.main(words if "MODEL" in before else [*words, named]) == 0, capfd.readouterr().err
    assert capfd.readouterr().out
