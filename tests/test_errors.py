"""Exceptions: what derives from what, what a message says, and that none of them hides another."""

from __future__ import annotations

import inspect
import logging
import pickle
import re
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from oracles import GREEDY

import sllm
from sllm import embedded, errors
from sllm.engine._ffi import check, lib, take_log

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EVERY = [getattr(errors, name) for name in errors.__all__]

# What a caller who has not read the documentation would catch.
BUILTINS: dict[type[Exception], type[Exception]] = {
    sllm.ModelLoadError: OSError,
    sllm.UndecidedError: ValueError,
    sllm.VocabMismatchError: ValueError,
    sllm.ContextFullError: RuntimeError,
    sllm.InferenceError: RuntimeError,
    sllm.CancelledError: RuntimeError,
    sllm.BusyError: RuntimeError,
    sllm.ClosedError: ValueError,
    sllm.RemoteError: ConnectionError,
    sllm.AuthError: PermissionError,
    sllm.RPCError: ConnectionError,
    sllm.UnsupportedModelError: NotImplementedError,
    sllm.LeakError: RuntimeError,
    sllm.BackendError: ImportError,
    sllm.UnsupportedCPUError: ImportError,
}


# ---- the family ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_every_exception_is_ours_and_a_builtin(kind: type[Exception]) -> None:
    assert issubclass(kind, sllm.SllmError)
    assert getattr(sllm, kind.__name__) is kind
    assert kind.__name__ in sllm.__all__
    assert inspect.getdoc(kind)
    if kind is not sllm.SllmError:
        assert issubclass(kind, BUILTINS[kind])
        with pytest.raises(BUILTINS[kind], match="said"):
            raise kind("what was said")


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_exceptions_travel_between_processes(kind: type[Exception]) -> None:
    original = kind("what was said")
    back = pickle.loads(pickle.dumps(original))
    assert type(back) is kind and str(back) == str(original) and back.args == original.args


def test_refused_credentials_are_a_remote_error() -> None:
    assert issubclass(sllm.AuthError, sllm.RemoteError)
    assert issubclass(sllm.RPCError, sllm.RemoteError)


def test_every_status_has_an_exception() -> None:
    statuses = {name: getattr(lib, name) for name in dir(lib) if name.startswith("SLLM_ERR_")}
    assert len(statuses) == len(set(statuses.values())) >= 12
    for name, status in statuses.items():
        with pytest.raises((sllm.SllmError, ValueError, MemoryError)) as caught:
            check(status, name)
        assert str(caught.value).startswith(f"{name}: ")
    with pytest.raises(sllm.SllmError):
        check(max(statuses.values()) + 1)  # one that this version does not know
    check(lib.SLLM_OK)


# ---- messages -----------------------------------------------------------------------------------------


@pytest.fixture
def context(draft_model: sllm.Model, make_context: Callable[..., sllm.Context]) -> sllm.Context:
    return make_context(draft_model, n_ctx=256, n_seq_max=1, n_outputs_max=8)


def message_of(kind: type[Exception], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert text and "\n" not in text and "%" not in text
    return text


def test_messages_name_what_was_found_and_what_was_expected(
    context: sllm.Context, draft_model: sllm.Model, tmp_path: Path
) -> None:
    n_vocab = context.model.vocab.n_tokens
    context.decode([5, 6, 7])
    said: list[tuple[type[Exception], Callable[[], object], list[str]]] = [
        (ValueError, lambda: context.decode([n_vocab]), [str(n_vocab), "vocabulary"]),
        (ValueError, lambda: context.decode([-1]), ["-1", str(n_vocab)]),
        (ValueError, lambda: context.decode([5], pos=9), ["9", "gap", "3"]),
        (ValueError, lambda: context.decode([5], pos=-2), ["-2", "pos"]),
        (ValueError, lambda: context.decode([5], seq_id=4), ["4", "n_seq_max"]),
        (ValueError, lambda: context.decode([5], logits="some"), ["some", "'last'"]),
        (ValueError, lambda: context.memory.truncate(0, 4), ["4", "3"]),
        (sllm.ContextFullError, lambda: context.decode([5] * 300), ["300", "256"]),
        (ValueError, lambda: context.verify([0], [5], [[6] * 8]), ["9", "8", "n_outputs_max"]),
        (ValueError, lambda: context.draft([0], [5], p_min=1.5), ["p_min", "1.5"]),
        (ValueError, lambda: context.draft([0, 0], [5, 5]), ["0", "twice"]),
        (ValueError, lambda: draft_model.context(n_ctx=0), ["n_ctx", "0"]),
        (ValueError, lambda: draft_model.context(type_k="f17"), ["type_k", "f17", "f16", "q8_0"]),
        (ValueError, lambda: context.load(b"x" * 100), ["state"]),
        (ValueError, lambda: sllm.SamplingParams(temperature=-1), ["temperature", "-1"]),
        (TypeError, lambda: sllm.SamplingParams(top_k=1.5), ["top_k", "1.5"]),  # type: ignore[arg-type]
        (TypeError, lambda: context.decode("text"), ["tokens", "Vocab.encode"]),
        (sllm.ModelLoadError, lambda: sllm.Model(tmp_path / "no.gguf"), ["no.gguf", "does not exist"]),
        (sllm.ModelLoadError, lambda: sllm.Model(tmp_path), [str(tmp_path), "directory"]),
        (ValueError, lambda: sllm.Model(embedded.DRAFT, devices=["TPU7"]), ["TPU7", "CPU"]),
    ]
    for kind, call, words in said:
        text = message_of(kind, call)
        assert all(word in text for word in words), text


def test_a_failed_load_carries_llama_cpp_s_own_words(tmp_path: Path) -> None:
    whole = embedded.DRAFT.read_bytes()
    cases = {
        "tensor": (whole[: len(whole) // 2], "tensor|data|size|read"),
        "architecture": (whole.replace(b"llama", b"zebra", 1), "zebra"),
        "version": (whole[:4] + b"\x63" + whole[5:], "version|99"),
    }
    for name, (content, words) in cases.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        text = message_of(sllm.ModelLoadError, lambda path=path: sllm.Model(path))  # type: ignore[misc]
        assert text.startswith(str(path))
        assert re.search(words, text.removeprefix(str(path))), text


def test_a_grammar_s_message_says_what_is_wrong_with_it(context: sllm.Context) -> None:
    for grammar, complaint in (
        ('root ::= "b"\nx ::= x', "line 2: the rule 'x' is nothing but itself"),
        ('start ::= "a"', "there is no rule named root"),
        ('# one\nroot ::= "a" |\n  ("b" other)', "line 3: undefined rule 'other'"),
        ('root ::= "a"\n\n  | "b"', "line 3: '|' where the name of a rule was expected"),
    ):
        sampling = sllm.SamplingParams(grammar=grammar)
        found = message_of(ValueError, lambda s=sampling: context.verify([0], [5], sampling=s))  # type: ignore[misc]
        assert complaint in found


def test_long_input_makes_no_long_message(context: sllm.Context, tmp_path: Path) -> None:
    sampling = sllm.SamplingParams(grammar="root ::= " + "x" * 100_000)
    with pytest.raises(ValueError, match="grammar") as caught:
        context.verify([0], [5], sampling=sampling)
    assert len(str(caught.value)) < 5000


SMALL_MACHINE = """
import resource, sllm
from sllm import embedded
with sllm.Model(embedded.DRAFT) as model:
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, resource.RLIM_INFINITY))
    for n_ctx in (2**20, 2**25):  # what llama.cpp says of itself, and what the C++ library throws under it
        try:
            model.context(n_ctx=n_ctx, n_threads=1)
        except MemoryError as error:
            print("MemoryError:", error)
    with model.context(n_ctx=256, n_threads=1) as context:
        context.decode([5])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the size of the process is read from /proc")
def test_a_cache_that_cannot_be_allocated_is_a_memory_error() -> None:
    result = subprocess.run(
        [sys.executable, "-c", SMALL_MACHINE], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first.startswith("MemoryError: draft.gguf: ") and "failed to allocate" in first
    assert second.startswith("MemoryError: draft.gguf: ") and "alloc" in second


@pytest.mark.skipif(sys.platform != "linux", reason="what is free is read from /proc")
def test_a_cache_beyond_what_is_free_is_refused_before_it_is_touched(draft_model: sllm.Model) -> None:
    """Linux would hand the pages out all the same, and end the process when they are written to."""
    with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123
        (free,) = (int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    two_rows = 2 * int(draft_model.metadata["llama.attention.head_count_kv"]) * 2 * draft_model.n_layer
    head = draft_model.n_embd // int(draft_model.metadata["llama.attention.head_count"])
    n_ctx = int(1.5 * free / (two_rows * head))
    text = message_of(MemoryError, lambda: draft_model.context(n_ctx=min(n_ctx, 2**31 - 1), n_threads=1))
    assert "GB free" in text and str(min(n_ctx, 2**31 - 1)) in text


# ---- one error does not hide another ----------------------------------------------------------------------


def test_the_last_error_belongs_to_its_thread(context: sllm.Context) -> None:
    wrong: list[str] = []
    vocab = context.model.vocab

    def work(token: int) -> None:
        for _ in range(300):
            with pytest.raises(ValueError, match="vocabulary") as caught:
                vocab.decode([token])
            if str(token) not in str(caught.value):
                wrong.append(str(caught.value))

    threads = [threading.Thread(target=work, args=(10**6 + i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_error_after_an_error_is_its_own(context: sllm.Context, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(embedded.DRAFT.read_bytes()[:5000])
    for _ in range(2):
        with pytest.raises(sllm.ModelLoadError) as load:
            sllm.Model(tmp_path / "cut.gguf")
        with pytest.raises(ValueError, match="token -1") as tokens:
            context.decode([-1])
        assert str(load.value) not in str(tokens.value)
        assert load.value.__context__ is load.value.__cause__  # llama.cpp's own words, that is
        assert tokens.value.__context__ is None


def test_errors_leave_the_context_as_it_was(context: sllm.Context) -> None:
    context.decode([5, 6, 7])
    wanted = context.verify([0], [8], sampling=GREEDY).tokens.tolist()
    bad: list[Callable[[], Any]] = [
        lambda: context.decode([5, -1], pos=2),
        lambda: context.decode([5] * 300, pos=1),
        lambda: context.verify([0], [10**6], pos=[3]),
        lambda: context.verify([0], [8], [[5] * 20], pos=[3]),
        lambda: context.draft([0], [-5], pos=[3]),
        lambda: context.draft([0], [8], pos=[3], n_max=-1),
        lambda: context.load(b"nothing"),
        lambda: context.memory.truncate(0, 99),
        lambda: context.memory.copy(0, 1),
    ]
    for call in bad:
        with pytest.raises((ValueError, sllm.ContextFullError)):
            call()
        assert context.memory.tokens(0).tolist() == [5, 6, 7, 8]
        assert context.verify([0], [8], sampling=GREEDY, pos=[3]).tokens.tolist() == wanted


# ---- the log ----------------------------------------------------------------------------------------------


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str], tmp_path: Path, context: sllm.Context) -> None:
    (tmp_path / "cut.gguf").write_bytes(embedded.DRAFT.read_bytes()[:5000])
    with pytest.raises(sllm.ModelLoadError):
        sllm.Model(tmp_path / "cut.gguf")
    with sllm.Model(embedded.DRAFT) as model, model.context(n_ctx=256, n_threads=1) as other:
        other.decode([5])
    with pytest.raises(ValueError, match="token"):
        context.decode([-1])
    with pytest.raises(sllm.InferenceError):
        context.verify([0], [5], sampling=sllm.SamplingParams(grammar="root ::= [z-a]"))
    assert capfd.readouterr() == ("", "")


def test_nothing_is_printed_about_a_bad_grammar(
    capfd: pytest.CaptureFixture[str], context: sllm.Context
) -> None:
    with pytest.raises(ValueError, match="undefined rule 'other'"):
        context.verify([0], [5], sampling=sllm.SamplingParams(grammar="root ::= other"))
    assert capfd.readouterr() == ("", "")


def test_llama_cpp_s_log_goes_to_logging(caplog: pytest.LogCaptureFixture) -> None:
    take_log()
    with caplog.at_level(logging.INFO, logger="sllm.llama_cpp"), sllm.Model(embedded.DRAFT) as model:
        take_log()  # the level counts from the next call on
        with sllm.Model(model.path):
            pass
    lines = [record for record in caplog.records if record.name == "sllm.llama_cpp"]
    assert any("general.architecture" in record.getMessage() for record in lines)
    assert all(record.getMessage().strip() for record in lines)
    take_log()


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    drawn: list[tuple[str, str, str]] = []
    parents = ["SllmError"]
    for line in str(errors.__doc__).splitlines():
        found = re.match(r"    ((?:\|   )?)\+-- (\w+)(?: +\((\w+)\))?  ", line)
        if found:
            depth = 1 + bool(found[1])
            parents[depth:] = [found[2]]
            drawn.append((found[2], parents[depth - 1], found[3] or ""))
    real = []
    for name in errors.__all__:
        kind = getattr(errors, name)
        if kind is not sllm.SllmError:
            builtin = [base.__name__ for base in kind.__bases__ if not issubclass(base, sllm.SllmError)]
            real.append((name, kind.__bases__[0].__name__, "".join(builtin)))
    assert sorted(drawn) == sorted(real)
