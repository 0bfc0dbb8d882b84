"""``sllm worker token``: users come, change and go without a restart of the worker."""

from __future__ import annotations

import signal
import stat
from typing import TYPE_CHECKING, Any

import pytest
from processes import ONE
from remote_worker import wait_until

import sllm
from sllm.cli import main as cli
from sllm.wire import auth
from sllm.wire.tokens import checked_token, token_digest
from sllm.worker.token_file import TokenFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs ``sllm worker token`` with a folder of its own for state; exit status, stdout and stderr."""
    monkeypatch.setenv("SLLM_STATE", str(tmp_path / "state"))

    def run(*args: str) -> tuple[int, str, str]:
        status = cli.main(["worker", "token", *args])
        return status, *capsys.readouterr()

    return run


def test_the_life_of_a_user(token: Callable[..., Any], tmp_path: Path) -> None:
    status, out, note = token("add", "alice", "--sessions", "2", "--tokens-per-minute", "600")
    assert status == 0
    secret = out.strip()
    assert checked_token(secret) == secret and len(secret) == 43
    assert "secret" in note and secret not in note
    file = TokenFile(tmp_path / "state" / "tokens.json")
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert file.read()["alice"].sha256 == token_digest(secret)
    status, out, _ = token("list")
    assert status == 0
    assert "alice" in out and "2 at once, 600 tokens per minute" in out
    assert secret not in out and token_digest(secret) not in out
    assert token("limit", "alice", "--no-grammars", "--max-prompt", "9")[0] == 0
    assert "9 tokens of prompt, no grammars" in token("list")[1]
    status, out, _ = token("rotate", "alice", "--keep", "100")
    assert status == 0 and out.strip() != secret
    assert "the old token for" in token("list")[1]
    status, out, note = token("revoke", "alice")
    assert (status, out) == (0, "") and "revoked the token of alice" in note
    status, out, note = token("list")
    assert (status, out) == (0, "") and "there are no tokens" in note


def test_the_line_for_a_client(token: Callable[..., Any], tmp_path: Path) -> None:
    """Made before the worker has started for the first time: its certificate is the one that is kept."""
    status, out, _ = token("add", "alice", "--public", "[::1]:77")
    assert status == 0
    address = auth.Address.parse(out)
    assert (address.host, address.port) == ("::1", 77)
    assert address.fingerprint == auth.fingerprint(auth.load_or_make_certificate(tmp_path / "state")[0])
    status, out, note = token("rotate", "alice", "--public", "host:78")
    assert status == 0 and auth.Address.parse(out).token != address.token
    assert "sllm://" not in note


@pytest.mark.parametrize(
    ("args", "what"),
    [
        ((), "arguments are required: ACTION"),
        (("forget", "alice"), "invalid choice: 'forget'"),
        (("add",), "arguments are required: NAME"),
        (("add", "bob"), "there is a token of bob already"),
        (("add", "default"), "the worker's own token"),
        (("add", "a b"), "'a b' is not possible"),
        (("add", "carol", "--sessions", "0"), "0 is out of range"),
        (("add", "carol", "--public", "nowhere"), "--public is 'nowhere', expected HOST:PORT"),
        (("add", "carol", "--public", ":50051"), "--public is ':50051', expected HOST:PORT"),
        (("add", "carol", "--public", "host:1", "--cert", "missing.pem"), "missing.pem: No such file"),
        (("revoke", "carol"), "has no token of carol: it has bob"),
        (("rotate", "carol"), "has no token of carol"),
        (("rotate", "bob", "--keep", "-1"), "-1 is out of range"),
        (("limit", "carol", "--sessions", "1"), "has no token of carol"),
        (("revoke", "default"), "default has the worker's own token"),
        (("revoke", "bob", "--tokens", "missing.json"), "there are no tokens in missing.json"),
    ],
)
def test_what_cannot_be_done(token: Callable[..., Any], tmp_path: Path, args: Any, what: str) -> None:
    token("add", "bob")
    before = (tmp_path / "state" / "tokens.json").read_bytes()
    status, out, note = token(*args)
    assert status == 2 and not out
    assert what in note
    assert note.startswith("sllm: ") and note.count("\n") == 1
    assert (tmp_path / "state" / "tokens.json").read_bytes() == before


def test_a_file_that_others_may_use_or_that_is_damaged(token: Callable[..., Any], tmp_path: Path) -> None:
    token("add", "bob")
    path = tmp_path / "state" / "tokens.json"
    path.chmod(0o666)
    for args in (("list",), ("add", "carol"), ("revoke", "bob")):
        status, out, note = token(*args)
        assert status == 2 and not out and "others on this machine" in note
    path.chmod(0o600)
    path.write_bytes(b"{")
    for args in (("list",), ("add", "carol"), ("revoke", "bob")):
        status, out, note = token(*args)
        assert status == 2 and not out and "tokens.json is damaged" in note


def test_a_folder_that_cannot_be_written(token: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, out, note = token("add", "alice", "--state", str(tmp_path / "file" / "state"))
    assert status == 2 and not out and note.count("\n") == 1 and "file" in note


def test_a_running_worker_takes_changes_up(
    start: Callable[..., Any], token: Callable[..., Any], tmp_path: Path
) -> None:
    """And with --no-print-line nothing on stdout shows the worker's own token."""
    state = str(tmp_path / "state")
    process = start("worker", "--listen", "127.0.0.1:0", "--state", state, "--no-print-line", *ONE)
    assert process.stderr is not None
    first, second = (process.stderr.readline().decode() for _ in range(2))
    assert "sllm worker token add NAME --public" in second
    port = int(first.partition(" on 127.0.0.1:")[2].partition(",")[0])
    alice = token("add", "alice", "--public", f"127.0.0.1:{port}", "--max-prompt", "50")[1].strip()

    def connected() -> bool:
        try:
            with sllm.connect(alice) as remote:
                return remote.info.max_prompt == 50
        except sllm.AuthError:
            return False

    wait_until(connected)
    with sllm.connect(alice) as remote:
        assert sllm.generate(remote.target(), "Once", max_tokens=4).text()
        token("revoke", "alice")
        wait_until(lambda: not connected())
        with pytest.raises(sllm.AuthError):
            remote.status()
    process.send_signal(signal.SIGTERM)
    out, note = process.communicate(timeout=60)
    assert out == b""
    own = (tmp_path / "state" / "token").read_text().strip()
    assert own not in first + second + note.decode()
