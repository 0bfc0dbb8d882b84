"""The file of named tokens: whatever happens to it, nobody gets in by it who should not."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import examples

import sllm
from sllm.wire.tokens import token_digest
from sllm.worker import token_file as module
from sllm.worker.token_file import Allowance, NamedToken, TokenFile, parse, serialize

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

names = st.sampled_from(["alice", "bob", "A.b-c_9", "0", "x" * 64])
digests = st.integers(0, 2**256 - 1).map(lambda number: f"{number:064x}")
limits = st.none() | st.integers(1, 2**31 - 1)
allowances = st.builds(
    Allowance,
    sessions=limits,
    tokens_per_minute=limits,
    max_prompt=limits,
    grammars=st.booleans(),
    rpc=st.booleans(),
)
entries = st.builds(
    NamedToken,
    name=names,
    sha256=digests,
    created=st.sampled_from(["", "2026-05-04T10:00:00Z", "\u00e4\n"]),
    allowance=allowances,
    previous=st.none() | digests,
    previous_until=st.floats(0, 1e11),
)


def distinct(tokens: list[NamedToken]) -> dict[str, NamedToken]:
    found: dict[str, NamedToken] = {}
    seen: set[str] = set()
    for token in tokens:
        own = {token.sha256, token.previous or token.sha256}
        if token.name not in found and not own & seen:
            found[token.name] = token
            seen |= own
    return found


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    return TokenFile(tmp_path / "state" / "tokens.json")


@examples(100)
@given(tokens=st.lists(entries, max_size=5).map(distinct))
def test_what_is_written_is_read(tokens: dict[str, NamedToken]) -> None:
    assert parse(serialize(tokens)) == tokens


@examples(100)
@given(tokens=st.lists(entries, min_size=1, max_size=3).map(distinct), data=st.data())
def test_a_damaged_file_is_an_error_or_says_less(tokens: dict[str, NamedToken], data: st.DataObject) -> None:
    """Bytes cut off, changed or put in between: no token of another is taken for valid."""
    whole = bytearray(serialize(tokens))
    at = data.draw(st.integers(0, len(whole) - 2))
    how = data.draw(st.sampled_from(["cut", "flip", "insert"]))
    if how == "cut":
        del whole[at:]
    elif how == "flip":
        whole[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        whole[at:at] = data.draw(st.binary(min_size=1, max_size=4))
    complaint, found = "", {}
    try:
        found = parse(bytes(whole))
    except ValueError as error:
        complaint = str(error)
    assert complaint or how != "cut"
    assert not any(token.sha256 in complaint for token in tokens.values())
    assert len(found) <= len(tokens)


@examples(50)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["format", "tokens", "name", "sha256", "sessions", "x"]), inner)
        ),
        max_leaves=8,
    )
)
def test_any_other_json_is_refused(value: Any) -> None:
    empty = {"format": 1, "tokens": []}
    if value != empty:
        with pytest.raises(ValueError, match=r"."):
            parse(json.dumps(value).encode())


GOOD = {"name": "alice", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("item", "what"),
    [
        ({"name": "alice"}, "missing"),
        ({**GOOD, "max_promt": 5}, "'max_promt' is not known"),
        ({**GOOD, "sessions": 0}, "sessions is 0"),
        ({**GOOD, "sessions": True}, "sessions is True"),
        ({**GOOD, "sessions": 2.0}, "sessions is 2.0"),
        ({**GOOD, "tokens_per_minute": "5"}, "tokens_per_minute is '5'"),
        ({**GOOD, "max_prompt": 1 << 40}, "max_prompt is"),
        ({**GOOD, "grammars": 0}, "grammars is 0"),
        ({**GOOD, "rpc": None}, "rpc is None"),
        ({**GOOD, "sha256": "A" * 64}, "no SHA-256"),
        ({**GOOD, "sha256": None}, "no SHA-256"),
        ({**GOOD, "previous": "short"}, "no SHA-256"),
        ({**GOOD, "previous_until": float("nan")}, "no time"),
        ({**GOOD, "previous_until": True}, "no time"),
        ({**GOOD, "created": 5}, "not a text"),
        ({**GOOD, "name": "default"}, "the worker's own"),
        ({**GOOD, "name": "a b"}, "not possible"),
        ({**GOOD, "name": "../x"}, "not possible"),
        ({**GOOD, "name": "x" * 65}, "not possible"),
        ({**GOOD, "name": ["x"]}, "not possible"),
        ([], "not an object"),
    ],
)
def test_entries_that_are_refused(item: Any, what: str) -> None:
    data = json.dumps({"format": 1, "tokens": [{"name": "bob", "sha256": "1" * 64}, item]}).encode()
    with pytest.raises(ValueError, match="token 2: ") as caught:
        parse(data)
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "not JSON"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "nested|not JSON"),
        (b" " * (1 << 21), "more than"),
        (b'{"format": 2, "tokens": []}', "later version"),
        (b'{"format": 1, "tokens": [], "tokens": []}', "twice"),
        (json.dumps({"format": 1, "tokens": [GOOD, GOOD]}).encode(), "alice.*twice"),
        (json.dumps({"format": 1, "tokens": [GOOD, {**GOOD, "name": "bob"}]}).encode(), "bob.*twice"),
        (json.dumps({"format": 1, "tokens": [GOOD] * 1001}).encode(), "1001 tokens"),
    ],
)
def test_files_that_are_refused(data: bytes, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        parse(data)


def test_the_life_of_a_token(file: TokenFile) -> None:
    token = file.add("alice", Allowance(sessions=2))
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.path.parent.stat().st_mode) == 0o700
    assert token not in file.path.read_text()
    (entry,) = file.read().values()
    assert entry.digests(time.time()) == (token_digest(token),)
    second = file.rotate("alice", keep_seconds=60)
    entry = file.read()["alice"]
    assert entry.allowance == Allowance(sessions=2)
    assert entry.digests(time.time()) == (token_digest(second), token_digest(token))
    assert entry.digests(time.time() + 61) == (token_digest(second),)
    third = file.rotate("alice")
    assert file.read()["alice"].digests(0) == (token_digest(third),)
    file.limit("alice", Allowance(max_prompt=5))
    assert file.read()["alice"] == NamedToken(
        "alice", token_digest(third), file.read()["alice"].created, Allowance(max_prompt=5)
    )
    file.revoke("alice")
    assert file.read() == {}
    assert sorted(p.name for p in file.path.parent.iterdir()) == ["tokens.json", "tokens.json.lock"]


def test_what_cannot_be_done_changes_nothing(file: TokenFile) -> None:
    for change in (file.rotate, file.revoke, lambda name: file.limit(name, Allowance())):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            change("alice")
    assert not file.path.parent.exists()
    file.add("alice")
    before = file.path.read_bytes()
    for change in (file.rotate, file.revoke, lambda name: file.limit(name, Allowance())):
        with pytest.raises(ValueError, match="no token of bob: it has alice"):
            change("bob")
    for name in ("alice", "default", "a/b", ""):
        with pytest.raises(ValueError, match=r"already|own token|not possible"):
            file.add(name)
    assert file.path.read_bytes() == before
    file.path.write_bytes(before[:-9])
    for damaged in (file.add, file.rotate, file.revoke):
        with pytest.raises(ValueError, match="is damaged: it is not JSON"):
            damaged("alice")
    assert file.path.read_bytes() == before[:-9]


@pytest.mark.parametrize("mode", [0o640, 0o602, 0o666])
def test_a_file_that_others_may_use_is_refused(file: TokenFile, mode: int) -> None:
    file.add("alice")
    file.path.chmod(mode)
    for use in (file.read, lambda: file.add("bob")):
        with pytest.raises(PermissionError, match="others on this machine"):
            use()


_ADD = """
import pathlib, sys
from sllm.worker.token_file import TokenFile
file = TokenFile(pathlib.Path(sys.argv[1]))
for i in range(15):
    file.add(f"{sys.argv[2]}-{i}")
"""


def test_writers_at_once_lose_nothing(file: TokenFile) -> None:
    """In processes of their own, and read meanwhile: the file is whole at any time."""
    writers = [subprocess.Popen([sys.executable, "-c", _ADD, str(file.path), name]) for name in "ab"]
    seen = 0
    while any(writer.poll() is None for writer in writers):
        try:
            found = len(file.read())
        except FileNotFoundError:
            continue
        assert found >= seen
        seen = found
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(file.read()) == 30


def test_a_writer_that_does_not_end_is_not_waited_for(
    file: TokenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.add("alice")
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.1)
    with file._locked(), pytest.raises(sllm.BusyError, match="another process"):
        file.revoke("alice")
    file.revoke("alice")


def test_a_disk_that_is_full_leaves_the_file_as_it_was(
    file: TokenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.add("alice")
    before = file.path.read_bytes()

    def fail(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        file.revoke("alice")
    assert file.path.read_bytes() == before
    assert sorted(p.name for p in file.path.parent.iterdir()) == ["tokens.json", "tokens.json.lock"]


def test_threads_at_once_lose_nothing(file: TokenFile) -> None:
    def work(add: Callable[[str], str], name: str) -> None:
        for i in range(10):
            add(f"{name}{i}")

    threads = [threading.Thread(target=work, args=(file.add, name)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(file.read()) == 40
