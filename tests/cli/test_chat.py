"""``sllm chat`` as a person meets it: a terminal, keys, and what goes wrong on the way."""

from __future__ import annotations

import json
import re
import stat
import time
from typing import TYPE_CHECKING, Any

import pytest
from chat_models import with_templates
from processes import ENDLESS, ONE, interrupt
from remote_worker import WorkerProcess, through
from terminal import ALT_ENTER, CTRL_C, CTRL_D, ENTER, Terminal

import sllm
from sllm import embedded
from sllm.cli.slow_link import Link
from sllm.engine import exact

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable

TARGET = str(embedded.TARGET)
PROMPT = ">"  # prompt_toolkit moves the cursor over the space behind it
STORY = "Tell me a short story about a lost kite."
FOX = 'root ::= "fox 狐狸."\n'
GREEDY = ("--temperature", "0")


@pytest.fixture
def fox(tmp_path: pathlib.Path) -> tuple[str, ...]:
    """Arguments of a conversation whose answers are all the same."""
    (tmp_path / "fox.gbnf").write_text(FOX, encoding="utf-8")
    return ("chat", *ONE, "--draft", "none", "--grammar-file", "fox.gbnf")


@pytest.fixture
def endless_chat(tmp_path: pathlib.Path) -> tuple[str, ...]:
    """Arguments of a conversation whose answers only Ctrl-C ends."""
    (tmp_path / "endless.gbnf").write_text(ENDLESS, encoding="utf-8")
    return ("chat", *ONE, "--draft", "none", "--n-ctx", "65536", "--grammar-file", "endless.gbnf")


def saved(path: pathlib.Path) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))["messages"]
    return messages


# ---- through a pipe


def test_each_line_of_a_pipe_is_a_message(command: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    typed = f"{STORY}\n\nAnd \\\nthen?\n/save talk.json\n"
    ended = command("chat", *ONE, *GREEDY, "-n", "12", typed=typed)
    assert ended.returncode == 0
    assert ended.stderr == "sllm: 2 turns in talk.json\n"
    messages = saved(tmp_path / "talk.json")
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert [m["content"] for m in messages[::2]] == [STORY, "And \nthen?"]
    assert ended.stdout == "".join(m["content"].rstrip("\n") + "\n" for m in messages[1::2])
    # They are the answers that a loop of one's own gets.
    with sllm.LocalTarget(embedded.TARGET, n_threads=1, **exact.SETTINGS) as target:
        for n in (1, 3):
            prompt = target.chat(messages[:n])
            text = sllm.generate(target, prompt, max_tokens=12, sampling=sllm.SamplingParams(temperature=0))
            assert text.text() == messages[n]["content"]


def test_a_model_alone_begins_a_conversation(command: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    typed = f"{STORY}\n/stats\n"
    ended = command(TARGET, *ONE, "-n", "5", "--draft", "none", typed=typed)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "text: 5 tokens" in ended.stdout and "ended by: --max-tokens" in ended.stdout
    named = command("chat", "--target", TARGET, *ONE, "-n", "5", "--draft", "none", typed=f"{STORY}\n")
    assert ended.stdout.startswith(named.stdout)


def test_turns_cost_what_is_new(command: Callable[..., Any], fox: tuple[str, ...]) -> None:
    ended = command(*fox, typed="One.\nTwo.\n/stats\n")
    found = re.fullmatch(
        r"fox 狐狸\.\nfox 狐狸\.\nprompt: (\d+) tokens, (\d+) of them in memory, .*", ended.stdout, re.DOTALL
    )
    assert found
    with sllm.Model(TARGET, vocab_only=True) as model:
        n_first = len(model.chat([{"role": "user", "content": "One."}]))
    assert n_first < int(found[2]) < int(found[1])  # and a part of the answer


def test_what_fails_shows_in_the_status(command: Callable[..., Any], fox: tuple[str, ...]) -> None:
    ended = command(*fox, typed="/nothing\nHi\n")
    assert (ended.returncode, ended.stdout) == (2, "fox 狐狸.\n")
    assert ended.stderr.startswith("sllm: /nothing is no command")
    ended = command(*fox, "--n-ctx", "256", typed="word " * 400 + "\nHi\n")
    assert (ended.returncode, ended.stdout) == (2, "fox 狐狸.\n")
    assert ended.stderr.endswith("a shorter message, /clear or a larger --n-ctx helps\n")


def test_pipes_that_hold_no_text(command: Callable[..., Any], refused: Callable[..., str]) -> None:
    ended = command("chat", *ONE, typed=b"caf\xe9\n")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "sllm: stdin is not UTF-8: invalid continuation byte at byte 3\n"
    assert command("chat", *ONE, typed="").returncode == 0


def test_ctrl_c_ends_a_conversation_that_nobody_types(
    start: Callable[..., Any], endless_chat: tuple[str, ...]
) -> None:
    process = start(*endless_chat)
    process.stdin.write(b"Hi\nHi\n")
    process.stdin.flush()
    assert process.stdout.read(1) == b"a"
    _, stderr = interrupt(process)
    assert stderr == ""


# ---- in a terminal


def test_a_conversation_in_a_terminal(tmp_path: pathlib.Path, fox: tuple[str, ...]) -> None:
    with Terminal(tmp_path, *fox) as terminal:
        terminal.expect("/help lists the commands")
        terminal.expect(PROMPT)
        terminal.type("从前有一只狐狸" + ENTER)
        terminal.expect("fox 狐狸.\n[")
        assert "positions" in terminal.expect("]")
        terminal.paste("one\ntwo")
        terminal.type(ENTER)
        terminal.expect("fox 狐狸.\n")
        for line in ("three \\", "four"):
            terminal.type(line + ENTER)
        terminal.expect("fox 狐狸.\n")
        for line in ('"""', "five", 'six"""'):
            terminal.type(line + ENTER)
        terminal.expect("fox 狐狸.\n")
        terminal.type("seven" + ALT_ENTER + "eight" + ENTER)
        terminal.expect("fox 狐狸.\n")
        terminal.type("/save talk.json" + ENTER)
        terminal.expect("5 turns in talk.json")
        terminal.type("/retyr" + ENTER)
        terminal.expect("/retyr is no command; was /retry meant?")
        terminal.expect(PROMPT)
        terminal.type(CTRL_D)
        assert terminal.ended() == 0
        assert "\x1b[2m[" in terminal.raw  # the figures are dim
    asked = [m["content"] for m in saved(tmp_path / "talk.json")[::2]]
    assert asked == ["从前有一只狐狸", "one\ntwo", "three \nfour", "five\nsix", "seven\neight"]
    assert stat.S_IMODE((tmp_path / "talk.json").stat().st_mode) == 0o600
    history = tmp_path / "state" / "chat-history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "从前有一只狐狸" in history.read_text(encoding="utf-8")
    # What was typed is there again, as a whole.
    with Terminal(tmp_path, *fox, NO_COLOR="1") as terminal:
        terminal.expect(PROMPT)
        terminal.type("\x1b[A\x1b[A\x1b[A\x1b[A" + ENTER)  # up, over the two commands, to the message's lines
        terminal.expect("fox 狐狸.\n[")
        terminal.type("/save again.json" + ENTER)
        terminal.expect("1 turn in")
        terminal.type("/exit" + ENTER)
        assert terminal.ended() == 0
        assert "\x1b[2m" not in terminal.raw
    assert saved(tmp_path / "again.json")[0]["content"] == "seven\neight"


def test_nothing_is_kept_where_nothing_is_to_be(tmp_path: pathlib.Path, fox: tuple[str, ...]) -> None:
    with Terminal(tmp_path, *fox, "--no-history") as terminal:
        terminal.expect(PROMPT)
        terminal.type("Hi" + ENTER)
        terminal.expect("fox")
        terminal.type("/exit" + ENTER)
        assert terminal.ended() == 0
    assert not (tmp_path / "state").exists()


def test_a_history_that_cannot_be_kept(tmp_path: pathlib.Path, fox: tuple[str, ...]) -> None:
    (tmp_path / "state").write_text("a file", encoding="utf-8")
    with Terminal(tmp_path, *fox) as terminal:
        terminal.expect("; what is typed is not kept")
        terminal.expect(PROMPT)
        terminal.type("Hi" + ENTER)
        terminal.expect("fox 狐狸.")


def test_without_the_package_that_edits_lines(tmp_path: pathlib.Path, endless_chat: tuple[str, ...]) -> None:
    hidden = "sys.modules['prompt_toolkit'] = None"
    with Terminal(tmp_path, *endless_chat, before=hidden) as terminal:
        terminal.expect("pip install 'sllm[chat]'")
        terminal.expect(PROMPT)
        terminal.type("Hi \\\nthere\n")
        terminal.expect("again again")
        terminal.type(CTRL_C)
        terminal.expect("[interrupted")
        terminal.expect(PROMPT)
        terminal.type("/save talk.json\n")
        terminal.expect("1 turn in")
        for _ in range(2):
            terminal.expect(PROMPT)
            terminal.type(CTRL_C)
        assert terminal.ended() == 130
    assert saved(tmp_path / "talk.json")[0]["content"] == "Hi \nthere"


_SIGNAL_ON_ANOTHER_THREAD = """
sys.modules['prompt_toolkit'] = None
import builtins, signal, threading, time
own = builtins.input
def late():
    time.sleep(0.5)  # so that input() waits by then; the test passes in any case
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)
def input(prompt):
    threading.Thread(target=late, daemon=True).start()
    return own(prompt)
builtins.input = input
"""


def test_a_ctrl_c_that_does_not_break_off_the_wait_for_a_key(
    tmp_path: pathlib.Path, fox: tuple[str, ...]
) -> None:
    """As one between the prompt and that wait: CPython notices it with the next key."""
    with Terminal(tmp_path, *fox, before=_SIGNAL_ON_ANOTHER_THREAD) as terminal:
        terminal.expect("Ctrl-C once more")
        assert terminal.ended() == 130


def test_ctrl_c_ends_an_answer_and_not_the_conversation(
    tmp_path: pathlib.Path, endless_chat: tuple[str, ...]
) -> None:
    with Terminal(tmp_path, *endless_chat) as terminal:
        terminal.expect(PROMPT)
        for _ in range(3):
            terminal.type("Go on." + ENTER)
            terminal.expect("again again again")
            terminal.type(CTRL_C)
            terminal.expect("[interrupted")
            terminal.expect(PROMPT)
            time.sleep(1.0)  # longer than what a program has that is to end
        assert terminal.process.poll() is None
        terminal.type("/save talk.json" + ENTER)
        terminal.expect("3 turns in")
        terminal.expect(PROMPT)
        terminal.type(CTRL_C)
        terminal.expect("Ctrl-C once more, Ctrl-D or /exit ends the conversation")
        terminal.type("/stats" + ENTER)  # not twice in a row
        terminal.expect("in memory")
        terminal.expect(PROMPT)
        terminal.type(CTRL_C)
        terminal.expect("Ctrl-C once more")
        terminal.expect(PROMPT)
        terminal.type(CTRL_C)
        assert terminal.ended() == 130
        assert "Traceback" not in terminal.shown
    answers = [m["content"] for m in saved(tmp_path / "talk.json")[1::2]]
    assert len(answers) == 3 and all(answer.startswith("again again") for answer in answers)


def test_ctrl_c_while_a_prompt_is_computed(tmp_path: pathlib.Path, endless_chat: tuple[str, ...]) -> None:
    talk = [
        {"role": "user", "content": "word and other words. " * 4_000},  # takes minutes
        {"role": "assistant", "content": "Yes."},
    ]
    (tmp_path / "long.json").write_text(json.dumps(talk), encoding="utf-8")
    with Terminal(tmp_path, *endless_chat, "--load", "long.json") as terminal:
        terminal.expect(PROMPT)
        terminal.type("Go on." + ENTER)
        time.sleep(2.0)
        terminal.type(CTRL_C)
        terminal.expect("[interrupted", patience=20)
        terminal.type("/clear" + ENTER)
        terminal.expect("a new conversation")
        terminal.type("Go on." + ENTER)
        terminal.expect("again again")
        terminal.type(CTRL_C)
        terminal.expect("[interrupted")
        terminal.expect(PROMPT)
        terminal.type(CTRL_D)
        assert terminal.ended() == 0


def test_a_context_that_is_full_costs_the_oldest_turns(tmp_path: pathlib.Path, fox: tuple[str, ...]) -> None:
    with Terminal(tmp_path, *fox, "--n-ctx", "256") as terminal:
        terminal.expect(PROMPT)
        for n in range(8):
            terminal.type(f"Message {n}: " + "word " * 20 + ENTER)
            terminal.expect("fox 狐狸.\n[")
        assert "the context of 256 positions is full; left out from here on: the oldest" in terminal.shown
        # A message that fits by no means.
        terminal.type("word " * 400 + ENTER)
        terminal.expect("a shorter message, /clear or a larger --n-ctx helps")
        terminal.type("Still there?" + ENTER)
        terminal.expect("fox 狐狸.\n[")
        terminal.type("/save talk.json" + ENTER)
        terminal.expect("9 turns in")  # also those that are no longer sent


def test_another_answer_has_another_seed(tmp_path: pathlib.Path) -> None:
    with Terminal(tmp_path, "chat", *ONE, "-n", "16", "--temperature", "1.5", "--seed", "3") as terminal:
        terminal.expect(PROMPT)
        terminal.type("/retry" + ENTER)
        terminal.expect("there is no message yet")
        terminal.type(STORY + ENTER)
        for name in ("one", "two"):
            terminal.expect("positions")
            terminal.type(f"/save {name}.json" + ENTER)
            terminal.expect("1 turn in")
            terminal.type("/retry" + ENTER)
        terminal.expect("positions")
        terminal.type("/undo" + ENTER)
        terminal.expect(f"taken back: {STORY}")
        terminal.type("/load one.json" + ENTER)
        terminal.expect("1 turn from one.json")
        terminal.type("/system Be brief." + ENTER)
        terminal.expect("system: Be brief.")
        terminal.type("/save three.json" + ENTER)
        terminal.expect("1 turn in")
    one, two, three = (saved(tmp_path / f"{name}.json") for name in ("one", "two", "three"))
    assert one[0] == two[0] and one[1] != two[1]
    assert three == [{"role": "system", "content": "Be brief."}, *one]


# ---- with a worker


def test_a_worker_that_is_lost_and_comes_back(tmp_path: pathlib.Path) -> None:
    options: dict[str, Any] = {"n_ctx": 1024, "pass_seconds": 0.05}
    (tmp_path / "endless.gbnf").write_text(ENDLESS, encoding="utf-8")
    with (
        WorkerProcess(tmp_path / "w", **options) as first,
        Link(first.address) as link,
        Terminal(
            tmp_path,
            *("chat", *ONE, "--grammar-file", "endless.gbnf"),
            *("--draft", "none", "--remote", through(link, first.uri)),
        ) as terminal,
    ):
        terminal.expect(" on ")
        terminal.expect(PROMPT)
        # Lost in the middle of an answer, which Ctrl-C ends while there is no link.
        terminal.type("Go on." + ENTER)
        terminal.expect("again again")
        first.kill()
        terminal.expect("is lost")
        terminal.type(CTRL_C)
        terminal.expect("[interrupted", patience=20)
        # Still away: asked, waited for, given up by the person again.
        terminal.type("Hello?" + ENTER)
        time.sleep(1.0)
        terminal.type(CTRL_C)
        terminal.expect("[interrupted", patience=20)
        # It is back, and what nobody has answered is asked again.
        with WorkerProcess(tmp_path / "w", **options) as second:
            link.retarget(second.address)
            terminal.type("/retry" + ENTER)
            terminal.expect("again again")
            terminal.type(CTRL_C)
            terminal.expect("[interrupted")
            terminal.type("/save talk.json" + ENTER)
            terminal.expect("2 turns in")
            terminal.expect(PROMPT)
            terminal.type(CTRL_D)
            assert terminal.ended() == 0
    messages = saved(tmp_path / "talk.json")
    assert [m["content"] for m in messages[::2]] == ["Go on.", "Hello?"]
    assert all(m["content"].startswith("again") for m in messages[1::2])


def test_an_answer_that_does_not_come_costs_a_line(tmp_path: pathlib.Path) -> None:
    with (
        WorkerProcess(tmp_path / "w", limits={"sessions": 1}, n_ctx=1024, pass_seconds=0.1) as worker,
        sllm.connect(worker.uri) as other,
        Terminal(tmp_path, "chat", *ONE, "-n", "4", "--remote", worker.uri, "--on-loss", "raise") as terminal,
    ):
        terminal.expect(PROMPT)
        with sllm.generate(other.target(), "Once upon a time", max_tokens=900) as stream:
            next(stream)
            terminal.type("Hi" + ENTER)  # which waits for a place
            time.sleep(1.0)
            terminal.type(CTRL_C)
            terminal.expect("[interrupted", patience=20)
        terminal.type("/retry" + ENTER)
        terminal.expect("4 tokens")
        terminal.type("/stats" + ENTER)
        terminal.expect("link: ")
        worker.kill()
        for _ in range(2):
            terminal.type("Hi" + ENTER)
            terminal.expect("sllm: the link to 127.0.0.1:")
        terminal.type("/save talk.json" + ENTER)
        terminal.expect("1 turn in")
        terminal.type("/exit" + ENTER)
        assert terminal.ended() == 0


# ---- by tiers


def test_answers_by_tiers(command: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    typed = "What comes after summer?\n/stats\n/clear\nMy phone is 13800138000.\n/stats\n"
    ended = command("chat", "--ask", *ONE, "-n", "6", typed=typed)
    assert ended.returncode == 0
    assert ended.stderr == "sllm: a new conversation\n"
    assert "privacy: public" in ended.stdout and "privacy: private" in ended.stdout
    assert ended.stdout.count("route: ") == 2


def test_ctrl_c_ends_an_answer_by_tiers(tmp_path: pathlib.Path) -> None:
    (tmp_path / "endless.gbnf").write_text(ENDLESS, encoding="utf-8")
    args = ("chat", "--ask", *ONE, "-n", "60000", "--n-ctx", "65536", "--grammar-file", "endless.gbnf")
    with Terminal(tmp_path, *args) as terminal:
        terminal.expect(PROMPT)
        terminal.type("Explain why the sky is blue, in detail." + ENTER)
        terminal.expect("again again")
        terminal.type(CTRL_C)
        terminal.expect("[interrupted", patience=20)
        terminal.expect(PROMPT)
        terminal.type(CTRL_D)
        assert terminal.ended() == 0


# ---- what cannot be


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["x.gguf", "Hello", "there"], "was `sllm run --chat --target x.gguf 'Hello there'` meant?"),
        (["x.gguf", "-n", "3", "Hello"], "was `sllm run --chat --target x.gguf Hello` meant?"),
        (["x.gguf"], "x.gguf does not exist, expected a GGUF file"),
        (["chat", "x.gguf", "--target", "y.gguf"], "x.gguf and --target name two models"),
        (["chat", "--small", TARGET], "--small is for --ask: add it"),
        (["chat", "--privacy", "deidentify"], "--privacy and --verify are for --ask"),
        (["chat", "--ask", "--draft", "ngram"], "--draft is not for --ask"),
        (["chat", "--ask", "--cloud-url", "http://x"], "--cloud-url needs --cloud-model"),
        (["chat", "--stop", ""], "--stop is empty"),
        (["chat", "--var", "a=1", "--var", "a=2"], "--var a is given twice"),
        (["chat", "--no-thinking"], "no switch for reasoning"),
        (["chat", "--load", "missing.json"], "missing.json: No such file or directory"),
        (["chat", "--remote", "127.0.0.1:1"], "begins with sllm://"),
        (["chat", "--draft", "x.gguf"], "--draft: x.gguf does not exist"),
        (["chat", "--n-ctx", "100", "--temperature=-1"], "temperature is -1.0, expected"),
    ],
)  # fmt: skip
def test_wrong_arguments(
    refused: Callable[..., str],
    args: list[str],
    words: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refused(*args)


def test_a_model_that_cannot_chat(refused: Callable[..., str], tmp_path: pathlib.Path) -> None:
    with_templates(tmp_path / "base.gguf", {}, weights=True)
    assert refused("chat", str(tmp_path / "base.gguf")).startswith(
        "base.gguf has no chat template; sllm run "
    )
