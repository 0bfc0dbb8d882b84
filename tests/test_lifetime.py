"""Handles: closing, use after it, the end of the process, forks, signals, and what is left behind.

What may crash or hang runs in a process of its own, so that this is one failed test and not the end of all.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import resource
import subprocess
import sys
import textwrap
import threading
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from oracles import EXACT, GREEDY

import sllm
from sllm import embedded
from sllm.draft.drafters import ModelDrafter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DRAFT = embedded.DRAFT
OPTIONS: dict[str, Any] = {"n_ctx": 256, "n_threads": 1}

PREAMBLE = """
import gc, os, signal, sys, threading, time, warnings
import sllm
from sllm.embedded import DRAFT, TARGET
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit "ignore"
"""


def script(body: str, *arguments: str, returncode: int = 0, options: tuple[str, ...] = ()) -> tuple[str, str]:
    """Run ``body`` in another Python; what it wrote to stdout and stderr."""
    ended = subprocess.run(
        [sys.executable, "-X", "faulthandler", *options, "-c", PREAMBLE + textwrap.dedent(body), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == returncode, f"{ended.returncode}\n{ended.stdout}\n{ended.stderr[-3000:]}"
    return ended.stdout, ended.stderr


@pytest.fixture
def model() -> Iterator[sllm.Model]:
    """A model that a test may close."""
    with sllm.Model(DRAFT) as opened:
        yield opened


# ---- closing ------------------------------------------------------------------------------------------


def test_everything_refuses_to_work_after_close() -> None:
    with sllm.Model(DRAFT) as model, model.context(**OPTIONS) as context:
        memory, vocab = context.memory, model.vocab
        context.decode([5, 6])
        state = context.save()
        target, idle = sllm.LocalTarget(model, **OPTIONS), sllm.LocalTarget(model, **OPTIONS)
        drafter = ModelDrafter(model, **OPTIONS)
        stream = sllm.generate(sllm.LocalTarget(model, **OPTIONS), [5, 6], max_tokens=50)
        generation = target.open(np.array([5, 6], np.int32), GREEDY, 50)
        next(generation)
        drafter.open([5, 6], GREEDY)
        next(stream)
    calls: dict[str, Callable[[], object]] = {
        "Model.context": lambda: model.context(**OPTIONS),
        "Model.metadata": lambda: model.metadata,
        "Model.description": lambda: model.description,
        "Model.chat": lambda: model.chat([{"role": "user", "content": "hello"}]),
        "Model.compiled": lambda: model.compiled(sllm.SamplingParams(seed=77)),
        "Model.__enter__": model.__enter__,
        "Vocab.encode": lambda: vocab.encode("hello"),
        "Vocab.decode": lambda: vocab.decode([5]),
        "Vocab.piece": lambda: vocab.piece(200),
        "Vocab.is_eog": lambda: vocab.is_eog(5),
        "Vocab.is_control": lambda: vocab.is_control(5),
        "Vocab.special_pieces": lambda: vocab.special_pieces,
        "Context.decode": lambda: context.decode([5]),
        "Context.draft": lambda: context.draft([0], [5]),
        "Context.verify": lambda: context.verify([0], [5]),
        "Context.score": lambda: context.score([5], [[6]]),
        "Context.save": context.save,
        "Context.load": lambda: context.load(state),
        "Context.cancel": context.cancel,
        "Context.set_threads": lambda: context.set_threads(1),
        "Context.__enter__": context.__enter__,
        "Memory.length": memory.length,
        "Memory.tokens": memory.tokens,
        "Memory.truncate": lambda: memory.truncate(0, 0),
        "Memory.copy": lambda: memory.copy(0, 0),
        "Memory.clear": memory.clear,
        "LocalTarget.open": lambda: idle.open(np.array([5], np.int32), GREEDY, 5),
        "Generation.__next__": lambda: next(generation),
        "ModelDrafter.draft": lambda: drafter.draft([5, 6], [], 4, 0.0),
        "TextStream.__next__": lambda: next(stream),
        "generate": lambda: sllm.generate(model, "hello"),
        "generate, draft": lambda: sllm.generate(other, "hello", draft=model),
    }
    with sllm.Model(DRAFT) as other:
        for name, call in calls.items():
            with pytest.raises(sllm.ClosedError, match="closed"):
                raise RuntimeError(f"{name} gave {call()!r}")
    # What needs nothing from C goes on, and closing is possible any number of times.
    assert model.closed and context.closed
    for thing in (model, context, memory, vocab, target, idle, drafter, stream, generation):
        assert "\n" not in repr(thing)
    assert "closed" in repr(model) and "closed" in repr(context)
    for closable in (generation, stream, drafter, target, idle, context, model):
        closable.close()
        closable.close()
    generation.cancel()
    drafter.cancel()


def test_a_model_closes_its_contexts_first() -> None:
    model = sllm.Model(DRAFT)
    contexts = [model.context(**OPTIONS) for _ in range(3)]
    contexts[1].close()
    target = sllm.LocalTarget(model, **OPTIONS)

    model.close()

    assert all(context.closed for context in contexts) and target.context.closed
    with pytest.raises(sllm.ClosedError):
        contexts[0].decode([5])
    for context in contexts:
        context.close()
    target.close()


def test_handles_may_be_closed_and_dropped_in_any_order() -> None:
    for order in range(6):
        model = sllm.Model(DRAFT)
        context = model.context(**OPTIONS)
        view = context.decode([5, 6], logits="last")
        assert view is not None
        kept = view.copy()
        closing: list[Callable[[], None]] = [model.close, context.close]
        if order % 2:
            closing.reverse()
        for close in closing[: 1 + order % 3]:
            close()
        model.close()
        context.close()
        del model, context, closing, close
        gc.collect()
        assert np.array_equal(view, kept)  # it holds its own reference


def test_leaving_a_with_block_closes_also_on_an_error() -> None:
    with pytest.raises(KeyError), sllm.Model(DRAFT) as model, model.context(**OPTIONS) as context:
        raise KeyError
    assert model.closed and context.closed


def test_streams_free_what_they_hold_however_they_end(model: sllm.Model) -> None:
    with sllm.LocalTarget(model, n_ctx=256, n_threads=1) as target:
        for _ in range(2):
            list(sllm.generate(target, "Once", max_tokens=2))
            for _run in sllm.generate(target, "Once", draft="ngram"):
                break
            with sllm.generate(target, "Once") as stream:
                next(stream)
            stream = sllm.generate(target, "Once")
            stream.close()
            assert list(stream) == []
            sllm.generate(target, "Once")  # dropped on the spot
            with pytest.raises(ZeroDivisionError):
                sllm.generate(target, "Once", draft=lambda _tokens, _n: [1 // 0], max_tokens=99).text()
    before = len(model._contexts)
    for _ in range(3):
        sllm.generate(model, "Once", draft=model, max_tokens=2).close()
    gc.collect()
    assert len(model._contexts) == before


@pytest.mark.parametrize("what", ["context", "model"])
def test_closing_cancels_the_call_inside(what: str) -> None:
    model = sllm.Model(embedded.TARGET)
    context = model.context(n_ctx=4096, n_batch=64, n_ubatch=32, n_threads=1)
    raised: list[sllm.SllmError] = []
    go = threading.Event()

    def work() -> None:
        try:
            context.decode([5])
            go.set()
            context.decode([7] * 4000, logits="last")
        except sllm.SllmError as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    go.wait()
    {"context": context.close, "model": model.close}[what]()
    thread.join()

    assert len(raised) == 1 and isinstance(raised[0], (sllm.CancelledError, sllm.ClosedError))
    assert context.closed
    model.close()


def test_many_threads_may_close_at_once() -> None:
    def round_of_closing() -> None:
        model = sllm.Model(DRAFT)
        contexts = [model.context(**OPTIONS) for _ in range(3)]
        start = threading.Barrier(6)
        closed: list[int] = []

        def close(i: int) -> None:
            start.wait()
            (contexts[i] if i < 3 else model).close()
            closed.append(i)

        threads = [threading.Thread(target=close, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(closed) == list(range(6))
        assert model.closed and all(context.closed for context in contexts)

    for _ in range(10):
        round_of_closing()


def test_handles_are_not_copied_into_bytes(model: sllm.Model) -> None:
    with model.context(**OPTIONS) as context:
        for thing in (model, context):
            with pytest.raises(TypeError):
                pickle.dumps(thing)
            with pytest.raises(TypeError):
                copy.deepcopy(thing)
        context.decode([5])


# ---- warnings and garbage -----------------------------------------------------------------------------


def test_what_is_not_closed_says_so(model: sllm.Model) -> None:
    def lose(make: Callable[[], object]) -> None:
        make()
        gc.collect()

    gc.collect()
    with pytest.warns(ResourceWarning, match=r"unclosed <sllm\.Model 'draft.gguf'"):
        lose(lambda: sllm.Model(DRAFT))
    with pytest.warns(ResourceWarning, match=r"unclosed <sllm\.Context of 'draft.gguf'"):
        lose(lambda: model.context(**OPTIONS))
    with pytest.warns(ResourceWarning, match=r"unclosed <sllm\.Context of 'draft.gguf'"):
        lose(lambda: sllm.LocalTarget(model, **OPTIONS))
    assert not model._contexts


def test_what_is_closed_says_nothing() -> None:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = sllm.Model(DRAFT)
        context = model.context(**OPTIONS)
        view = context.decode([5], logits="last")
        stream = sllm.generate(model, "Once", draft=model, max_tokens=3)
        next(stream)
        stream.close()
        model.close()
        del model, context, stream
        gc.collect()
        del view
        gc.collect()


def test_what_never_came_to_be_says_nothing(tmp_path: Path, model: sllm.Model) -> None:
    def fails() -> None:
        with pytest.raises(sllm.ModelLoadError):
            sllm.Model(tmp_path / "missing.gguf")
        with pytest.raises(ValueError, match="n_ctx"):
            model.context(n_ctx=-1)
        with pytest.raises(ValueError, match="type_k"):
            sllm.LocalTarget(model, type_k="zzz")
        sllm.Model.__new__(sllm.Model)

    # Errors in __del__ come to this hook.
    raised: list[object] = []
    hook = sys.unraisablehook
    sys.unraisablehook = raised.append
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fails()
            gc.collect()
    finally:
        sys.unraisablehook = hook
    assert not raised


def test_cycles_are_collected() -> None:
    class Holder:
        model: sllm.Model
        context: sllm.Context
        view: Any

    def make() -> list[weakref.ref[Any]]:
        holder = Holder()
        holder.model = sllm.Model(DRAFT)
        holder.context = holder.model.context(**OPTIONS)
        holder.view = holder.context.decode([5], logits="last")
        holder.model.holder = holder.context.holder = holder  # type: ignore[attr-defined]
        return [weakref.ref(holder), weakref.ref(holder.model), weakref.ref(holder.context)]

    def lose() -> list[object]:
        gone = make()
        gc.collect()
        return [ref() for ref in gone]

    with pytest.warns(ResourceWarning) as warned:
        assert lose() == [None] * 3
    assert len([w for w in warned if "unclosed" in str(w.message)]) == 2


# ---- what is left behind ------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of memory in use now; 0 where nobody says."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def test_loading_and_closing_leaves_nothing_behind() -> None:
    def once() -> None:
        with sllm.Model(DRAFT) as model:
            assert model.vocab.encode("hello").size and model.metadata
            with model.context(n_ctx=256, n_threads=1) as context:
                context.decode([5, 6, 7], logits="all")

    for _ in range(10):
        once()
    gc.collect()
    before = resident(), open_files(), threading.active_count()
    for _ in range(60):
        once()
    gc.collect()
    assert open_files() == before[1]
    assert threading.active_count() == before[2]
    assert resident() < before[0] + 30 * DRAFT.stat().st_size  # 60 leaks of the weights would be twice that


def test_contexts_leave_nothing_behind(model: sllm.Model) -> None:
    def once(n_seq_max: int) -> None:
        with model.context(n_ctx=1024, n_threads=1, n_seq_max=n_seq_max) as context:
            context.decode([5, 6, 7], logits="last")
            context.draft([0], [8], n_max=2)

    for i in range(20):
        once(1 + i % 2)
    gc.collect()
    before = resident(), open_files(), threading.active_count()
    for i in range(200):
        once(1 + i % 2)
    gc.collect()
    assert open_files() == before[1]
    assert threading.active_count() == before[2]
    assert resident() < before[0] + (60 << 20)  # a context's buffers are half a megabyte at least
    assert len(model._contexts) == 0


def test_calls_leave_nothing_behind(model: sllm.Model) -> None:
    with model.context(n_ctx=256, n_threads=1, n_seq_max=2) as context:

        def once(seed: int) -> None:
            sampling = sllm.SamplingParams(
                seed=seed, penalty_repeat=1.1, grammar='root ::= [a-z]+ "."', logit_bias={9: -1.0}
            )
            draft = context.draft([0], [5], n_max=3, sampling=sampling, pos=[0], start=[1])
            context.verify([0], [5], draft, sampling=sampling, pos=[0], start=[1])
            context.memory.copy(0, 1)
            context.load(context.save(0), 1)
            context.score([5, 6], [[7], [8, 9]], seq_ids=[1])
            with pytest.raises(ValueError, match="vocabulary"):
                context.decode([-1])
            assert context.decode([5, 6], pos=0, logits="all") is not None

        for seed in range(100):
            once(seed)
        before = resident()
        for seed in range(100, 500):
            once(seed)
        gc.collect()
        assert resident() < before + (40 << 20)


# ---- forks and other processes ------------------------------------------------------------------------

FORK = """
n_threads = int(sys.argv[1])
model = sllm.Model(DRAFT)
context = model.context(n_ctx=256, n_threads=n_threads)
row = context.decode([5, 6, 7] * 10, logits="last")
target = sllm.LocalTarget(model, n_ctx=256, n_threads=n_threads)
stream = sllm.generate(target, [5, 6], draft=model, max_tokens=20)
next(stream)

child = os.fork()
if child == 0:
    signal.alarm(60)
    calls = [
        lambda: context.decode([5]), lambda: context.memory.length(), context.cancel, context.save,
        lambda: model.vocab.encode("x"), lambda: model.context(), lambda: model.metadata,
        lambda: next(stream), context.__enter__, lambda: sllm.generate(model, "x"),
    ]
    for i, call in enumerate(calls):
        try:
            call()
        except sllm.ClosedError as error:
            assert "fork" in str(error), error
        else:
            raise AssertionError(i)
    repr(context), repr(context.memory), repr(model), float(row[0])
    context.close(); model.close(); stream.close()
    del context, model, stream, row, calls, call
    gc.collect()
    with sllm.Model(DRAFT) as model, model.context(n_ctx=256, n_threads=n_threads) as context:
        context.decode([5, 6, 7] * 10, logits="last")
    print("child", flush=True)
    sys.exit(0)

status = os.waitpid(child, 0)[1]
assert status == 0, status
kept = float(row[0])
assert float(context.decode([5, 6, 7] * 10, pos=0, logits="last")[0]) - kept < 0.1
stream.text()
context.close(); model.close()
print("parent")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_forked_child_is_told_and_may_start_afresh(n_threads: int) -> None:
    said, complaints = script(FORK, str(n_threads), options=("-W", "error::ResourceWarning"))
    assert said.split() == ["child", "parent"]
    assert not complaints


def test_a_fork_with_a_decode_under_way_on_another_thread() -> None:
    said, _ = script("""
        model = sllm.Model(TARGET)
        context = model.context(n_ctx=4096, n_batch=64, n_ubatch=32, n_threads=1)
        go = threading.Event()
        def work():
            try:
                context.decode([5]); go.set(); context.decode([7] * 4000)
            except sllm.CancelledError:
                print("cancelled")
        thread = threading.Thread(target=work)
        thread.start(); go.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            context.close(); model.close()
            with sllm.Model(DRAFT) as model, model.context(n_ctx=256, n_threads=1) as context:
                context.decode([5])
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        context.cancel(); thread.join()
        context.close(); model.close()
    """)
    assert said.split() in (["cancelled"], [])


def in_another_process(path: str) -> list[float]:
    with sllm.Model(path) as model, model.context(n_ctx=256, **EXACT) as context:
        row = context.decode([5, 6, 7], logits="last")
        assert row is not None
        return [float(x) for x in row[:8]]


def test_spawned_processes_compute_the_same(model: sllm.Model) -> None:
    script(
        """
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor
        sys.path.insert(0, sys.argv[1])
        import test_lifetime
        if __name__ == "__main__":
            with sllm.Model(DRAFT):
                with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
                    rows = list(pool.map(test_lifetime.in_another_process, [str(DRAFT)] * 3))
                assert rows == [test_lifetime.in_another_process(str(DRAFT))] * 3
        """,
        str(Path(__file__).parent),
    )


# ---- the end of the process ---------------------------------------------------------------------------

ENDS: dict[str, str] = {
    "unclosed": """
        model = sllm.Model(DRAFT)
        context = model.context(n_ctx=256, n_threads=1)
        row = context.decode([5, 6], logits="last")
    """,
    "a stream": """
        model = sllm.Model(DRAFT)
        stream = sllm.generate(sllm.LocalTarget(model, n_threads=1), "Once", draft=model)
        next(stream)
    """,
    "in a cycle": """
        class Holder: pass
        holder = Holder(); holder.self = holder
        holder.model = sllm.Model(DRAFT)
        holder.context = holder.model.context(n_ctx=256, n_threads=1)
        holder.row = holder.context.decode([5, 6], logits="last")
        del holder
    """,
    "held by a module": """
        sllm.kept = sllm.Model(DRAFT)
        sys.kept = sllm.kept.context(n_ctx=256, n_threads=1)
    """,
    "a thread that decodes": """
        model = sllm.Model(TARGET)
        context = model.context(n_ctx=4096, n_batch=64, n_ubatch=64, n_threads=1)
        go = threading.Event()
        def work():
            context.decode([5]); go.set()
            while True:
                context.decode([7] * 4000, pos=0, logits="last")
        threading.Thread(target=work, daemon=True).start()
        go.wait()
    """,
    "a thread that decodes on two threads": """
        model = sllm.Model(DRAFT)
        context = model.context(n_ctx=4096, n_threads=2)
        go = threading.Event()
        def work():
            while True:
                context.decode([7] * 200, pos=0, logits="last"); context.memory.clear(); go.set()
        threading.Thread(target=work, daemon=True).start()
        go.wait()
    """,
    "a thread with a context of its own": """
        go = threading.Event()
        def work():
            with sllm.Model(DRAFT) as model:
                while True:
                    with model.context(n_ctx=512, n_threads=1) as context:
                        context.decode([7] * 500, logits="last"); go.set()
        threading.Thread(target=work, daemon=True).start()
        go.wait()
    """,
    "a thread that loads": """
        go = threading.Event()
        def work():
            while True:
                sllm.Model(TARGET).close(); go.set()
        threading.Thread(target=work, daemon=True).start()
        go.wait()
    """,
    "a thread in a progress callback": """
        go = threading.Event()
        def progress(part):
            go.set(); time.sleep(0.3)
        threading.Thread(target=lambda: sllm.Model(TARGET, progress=progress), daemon=True).start()
        go.wait()
    """,
    "a thread that generates": """
        model = sllm.Model(DRAFT)
        go = threading.Event()
        def work():
            while True:
                with sllm.LocalTarget(model, n_ctx=512, n_threads=1) as target:
                    for run in sllm.generate(target, "Once", draft="ngram"):
                        go.set()
        threading.Thread(target=work, daemon=True).start()
        go.wait()
    """,
    "threads that begin": """
        model = sllm.Model(DRAFT)
        context = model.context(n_ctx=256, n_threads=1)
        go = threading.Event()
        def one():
            context.memory.length(); context.decode([5] * 4, pos=0, logits="last"); go.set()
        def work():
            while True:
                threading.Thread(target=one, daemon=True).start()
        threading.Thread(target=work, daemon=True).start()
        go.wait()
    """,
}


@pytest.mark.parametrize("how", ENDS)
def test_the_process_ends_well_with(how: str) -> None:
    # Threads that lose the race say so in tracebacks; what counts is that nothing crashes or hangs.
    script(ENDS[how], options=("-W", "ignore"))


def test_unclosed_handles_are_named_at_the_end() -> None:
    _, complaints = script(ENDS["unclosed"], options=("-W", "always::ResourceWarning"))
    assert "unclosed <sllm.Model" in complaints and "unclosed <sllm.Context" in complaints
    assert "Exception ignored" not in complaints


def test_exceptions_keep_their_status() -> None:
    _, complaints = script(
        """
        with sllm.Model(DRAFT) as model, model.context(n_ctx=256, n_threads=1) as context:
            context.decode([10**6])
        """,
        returncode=1,
    )
    assert complaints.splitlines()[-1].startswith("ValueError: token 1000000 is not in the vocabulary")


# ---- signals ------------------------------------------------------------------------------------------

SIGNALS = """
model = sllm.Model(TARGET)
context = model.context(n_ctx=4096, n_batch=256, n_ubatch=64, n_threads=1)
context.decode([5] * 10)
long = [7] * 4000

class Mine(Exception):
    pass

def later(call):
    # When the main thread has been inside the context for a moment.
    def wait():
        try:
            while not stop.is_set():
                context.memory.length(); time.sleep(0.0005)
        except sllm.BusyError:
            call()
    stop = threading.Event()
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()

def interrupted(call, exception, length=10):
    try:
        call()
    except exception as error:
        caught = error
    else:
        raise AssertionError("it was not interrupted")
    assert type(caught) is exception, caught
    assert context.memory.length(0) == length, context.memory.length(0)
    context.decode([5, 6, 7], logits="last")
    assert context.memory.length(0) == length + 3
    context.memory.truncate(0, 10)
    return caught

def on_alarm(handler):
    signal.signal(signal.SIGALRM, handler)
    later(lambda: os.kill(os.getpid(), signal.SIGALRM))
"""

INTERRUPTIONS: dict[str, str] = {
    "SIGINT": """
        later(lambda: os.kill(os.getpid(), signal.SIGINT))
        interrupted(lambda: context.decode(long), KeyboardInterrupt)
    """,
    "interrupt_main": """
        import _thread
        later(_thread.interrupt_main)
        interrupted(lambda: context.decode(long), KeyboardInterrupt)
    """,
    "raise_signal on another thread": """
        later(lambda: signal.raise_signal(signal.SIGINT))
        interrupted(lambda: context.decode(long), KeyboardInterrupt)
    """,
    "verify": """
        later(lambda: os.kill(os.getpid(), signal.SIGINT))
        interrupted(lambda: context.verify([0], [long], [[5, 6]]), KeyboardInterrupt)
    """,
    "draft": """
        later(lambda: os.kill(os.getpid(), signal.SIGINT))
        interrupted(lambda: context.draft([0], [long[:3900]], n_max=100), KeyboardInterrupt)
    """,
    "generate": """
        target = sllm.LocalTarget(model, n_ctx=4096, n_threads=1)
        context, other = target.context, context
        later(lambda: os.kill(os.getpid(), signal.SIGINT))
        try:
            sllm.generate(target, long, draft="ngram").text()
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("it was not interrupted")
        assert sllm.generate(target, [5, 6], max_tokens=3).text() is not None
        target.close(); other.close()
    """,
    "an exception of a handler": """
        def handler(*_):
            raise Mine("from the handler")
        on_alarm(handler)
        error = interrupted(lambda: context.decode(long), Mine)
        assert str(error) == "from the handler"
    """,
    "SystemExit of a handler": """
        def handler(*_):
            sys.exit("leaving")
        on_alarm(handler)
        interrupted(lambda: context.decode(long), SystemExit)
    """,
    "a handler that cancels": """
        on_alarm(lambda *_: context.cancel())
        interrupted(lambda: context.decode(long), sllm.CancelledError)
    """,
    "a handler that closes": """
        on_alarm(lambda *_: context.close())
        interrupted(lambda: context.decode(long), sllm.BusyError)
    """,
    "a handler that closes the model": """
        on_alarm(lambda *_: model.close())
        interrupted(lambda: context.decode(long), sllm.BusyError)
    """,
    "a handler that decodes": """
        on_alarm(lambda *_: context.decode([5]))
        interrupted(lambda: context.decode(long), sllm.BusyError)
    """,
    "a handler that uses other things": """
        seen = []
        def handler(*_):
            with sllm.Model(DRAFT) as other, other.context(n_ctx=256, n_threads=1) as small:
                small.decode([5, 6])
                try:
                    small.decode([-1])
                except ValueError:
                    seen.append(True)
            try:
                sllm.Model("/nowhere")
            except OSError:
                seen.append(True)
        on_alarm(handler)
        context.decode(long[:1000])
        assert seen == [True, True] and context.memory.length(0) == 1010
        # and nothing of that is raised later
        try:
            context.decode([-1])
        except ValueError as error:
            assert "token -1" in str(error)
    """,
    "a handler that returns": """
        seen = []
        signal.signal(signal.SIGALRM, lambda *_: seen.append(True))
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        context.decode(long[:1000])
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert seen and context.memory.length(0) == 1010
    """,
    "while another thread decodes": """
        # Signals are for the main thread; the other one's decode is not disturbed.
        done = []
        thread = threading.Thread(target=lambda: done.append(context.decode(long[:1000], logits="last")[0]))
        thread.start()
        try:
            os.kill(os.getpid(), signal.SIGINT)
            thread.join()
        except KeyboardInterrupt:
            thread.join()
        else:
            raise AssertionError("it was not interrupted")
        assert len(done) == 1 and context.memory.length(0) == 1010
    """,
    "a load": """
        def progress(part):
            if 0.4 < part < 0.8:
                signal.raise_signal(signal.SIGINT)
        try:
            sllm.Model(TARGET, use_mmap=False, progress=progress)
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("it was not interrupted")
        context.decode([5])
    """,
}


@pytest.mark.parametrize("how", INTERRUPTIONS)
def test_signals_during_a_call(how: str) -> None:
    _, complaints = script(
        SIGNALS + textwrap.dedent(INTERRUPTIONS[how]) + "\ncontext.close(); model.close()\n",
        options=("-W", "error::ResourceWarning"),
    )
    assert not complaints
