"""The scheduler: whatever sessions hint, share and break, each gets the text of the target alone."""

from __future__ import annotations

import math
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import EXACT, GGUF, GREEDY, PLAIN, examples, make_prompt, one_by_one, tokens_of, without_end
from tiny_models import gguf as gguf_of
from tiny_models import mamba

import sllm
from sllm import embedded
from sllm.draft.confidence import UNKNOWN_PROB, Confidence
from sllm.draft.length import PassTimes
from sllm.engine.sampling import SamplingParams
from sllm.targets.base import Commit
from sllm.worker.passes import Limits
from sllm.worker.scheduler import Scheduler, rows_to_check
from sllm.worker.session import Draining, Event, Finished, Opened, Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from sllm.engine.model import Model

PATIENCE = 120.0  # seconds until something that should happen is taken not to
N_CTX = 256

STUCK = "root ::= [z-a]"  # no token is a beginning of this
GRAMMAR = 'root ::= "{" [a-z ]{0,12} ("," [0-9]{1,4}){0,5} "}"'

samplings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 1, 40]),
    top_p=st.sampled_from([1.0, 0.9]),
    penalty_last_n=st.sampled_from([0, 64]),
    penalty_repeat=st.sampled_from([1.0, 1.2]),
    logit_bias=st.sampled_from([(), ((300, 4.0), (5, -math.inf))]),
    grammar=st.sampled_from([None, None, None, GRAMMAR]),
    seed=st.integers(0, 2**64 - 1),
)


@contextmanager
def running(
    model: Model, limits: Limits | None = None, *, draft: Model | None = None, **options: Any
) -> Iterator[Scheduler]:
    """A scheduler with a context of its own, as a worker makes it."""
    limits = limits or Limits()
    n = limits.sessions
    pass_seconds = options.pop("pass_seconds", 0.0)
    settings = {"n_ctx": N_CTX * n, "n_seq_max": n, **EXACT, **options}
    with ExitStack() as stack:
        context = stack.enter_context(model.context(**settings))
        drafting = None if draft is None else stack.enter_context(draft.context(**settings))
        scheduler = Scheduler(context, limits, draft=drafting, pass_seconds=pass_seconds)
        stack.callback(scheduler.close)
        yield scheduler


def submit(
    scheduler: Scheduler,
    prompt: Sequence[int] | Any,
    sampling: SamplingParams = GREEDY,
    max_tokens: int | None = 16,
    *,
    start: int | None = None,
    run_ahead: bool = True,
    text_id: int = 0,
) -> Session:
    tokens = np.array(prompt, dtype=np.int32)
    at = len(tokens) if start is None else start
    return scheduler.submit(tokens, at, sampling, max_tokens, run_ahead=run_ahead, text_id=text_id)


class Reader:
    """Takes a session's events on a thread of its own."""

    def __init__(self, session: Session, seen: Callable[[Session, list[int]], None] | None = None) -> None:
        self.session = session
        self.events: list[Event] = []
        self.text: list[int] = []
        self.trouble: list[BaseException] = []
        self._seen = seen
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            for event in self.session.events():
                self.events.append(event)
                if isinstance(event, Commit):
                    assert event.pos == self.session.n_prompt + len(self.text)
                    assert event.tokens
                    assert 0 <= event.n_accepted <= min(event.n_verified, len(event.tokens))
                    self.text += event.tokens
                if self._seen is not None and not isinstance(event, Finished):
                    self._seen(self.session, self.text)
        except BaseException as error:  # noqa: BLE001 - told by join()
            self.trouble.append(error)

    def join(self) -> Finished:
        """The end, once it has come."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "no end has come"
        assert not self.trouble, self.trouble
        last = self.events[-1]
        assert isinstance(last, Finished)
        return last

    @property
    def opened(self) -> Opened:
        first = self.events[0]
        assert isinstance(first, Opened)
        return first


def text_of(session: Session) -> tuple[list[int], Finished]:
    reader = Reader(session)
    end = reader.join()
    return reader.text, end


def wait_until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.005)


def scheduler_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "sllm-scheduler"]


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    yield
    assert not scheduler_threads()


# ---- the text ----------------------------------------------------------------------------------------------


def hints_for(
    draw: Callable[[Any], Any], prompt: list[int], wanted: list[int], n_vocab: int
) -> Callable[[Session, list[int]], None]:
    """A client that hints, right, wrong or mad, with whatever it is told."""
    kinds = ["none", "right", "wrong", "garbage", "far", "stale", "tree", "thicket"]
    kind = draw(st.sampled_from([*kinds, "mixed"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    whole = prompt + wanted
    counter = [0]

    def hint(session: Session, text: list[int]) -> None:
        what = kind
        if what == "mixed":
            what = str(rng.choice(kinds))
        if what == "none":
            return
        at = len(prompt) + len(text)
        n = int(rng.integers(0, 24))
        pos = int(rng.integers(max(0, at - 5), at + 1))
        tokens = whole[pos : at + n]
        if what == "wrong":
            tokens = [*tokens[: int(rng.integers(0, len(tokens) + 1))], *rng.integers(0, n_vocab, 9).tolist()]
        elif what == "garbage":
            tokens = rng.choice([0, n_vocab - 1, n_vocab, 2**31 - 1, 2**31, 2**32 - 1], n).tolist()
        elif what == "far":
            pos = int(rng.choice([at + 1, at + 7, N_CTX, N_CTX + 1, 2**31, 2**32 - 1]))
        elif what == "stale":
            pos = int(rng.integers(0, at))
            tokens = whole[pos : pos + n]
        counter[0] += 1
        if what in ("tree", "thicket"):
            among, parents = a_tree(rng, tokens, n_vocab, thick=what == "thicket")
            session.hint(pos, among, counter[0], parents)
        else:
            session.hint(pos, tokens, counter[0])

    return hint


def a_tree(
    rng: np.random.Generator, path: list[int], n_vocab: int, *, thick: bool
) -> tuple[list[int], list[int]]:
    """A tree with the beginning of ``path`` as one of its branches, and its parents."""
    places: dict[tuple[int, int], int] = {}  # parent and token, in order
    steps = [True] * min(len(path), int(rng.integers(0, 17)))
    steps += [False] * int(rng.integers(0, 41 if thick else 9))
    at, n = -1, 0
    for on_path in rng.permutation(steps):
        if on_path:
            at = places.setdefault((at, path[n]), len(places))
            n += 1
        else:
            token = int(rng.choice([int(rng.integers(0, n_vocab)), n_vocab, 2**32 - 1], p=[0.9, 0.05, 0.05]))
            places.setdefault((int(rng.integers(-1, len(places))), token), len(places))
    return [token for _, token in places], [parent for parent, _ in places]


@pytest.mark.parametrize("own_draft", [False, True], ids=["", "own draft"])
@examples(12)
@given(data=st.data())
def test_every_session_gets_the_text_of_the_target_alone(
    target_model: Model, draft_model: Model, own_draft: bool, data: st.DataObject
) -> None:
    """More of them than there are places, with prompts, samplings, lengths and hints of their own."""
    limits = Limits(
        sessions=data.draw(st.integers(1, 4)),
        prefill=data.draw(st.sampled_from([1, 7, 256])),
        backlog=data.draw(st.sampled_from([1, 3, 64])),
    )
    prompts: list[list[int]] = []
    params, lengths, wanted = [], [], []
    shared = make_prompt(target_model, 30, seed=data.draw(st.integers(0, 99))).tolist()
    for _ in range(data.draw(st.integers(1, 5))):
        n_shared = data.draw(st.sampled_from([0, 0, 5, 30]))
        rest = make_prompt(target_model, data.draw(st.integers(1, 25)), seed=data.draw(st.integers(0, 99)))
        prompts.append(shared[:n_shared] + rest.tolist())
        params.append(data.draw(samplings))
        lengths.append(data.draw(st.sampled_from([1, 2, 20, 40])))
        wanted.append(one_by_one(target_model, prompts[-1], params[-1], lengths[-1]))
    with running(target_model, limits, draft=draft_model if own_draft else None) as scheduler:
        readers = [
            Reader(
                submit(scheduler, prompt, sampling, n_tokens),
                hints_for(data.draw, prompt, own, scheduler.n_vocab),
            )
            for prompt, sampling, n_tokens, own in zip(prompts, params, lengths, wanted, strict=True)
        ]
        for reader, own, n_tokens in zip(readers, wanted, lengths, strict=True):
            end = reader.join()
            assert reader.text == own
            assert end.error is None
            ended = target_model.vocab.is_eog(own[-1])
            assert end.reason == ("eog" if ended else "length")
            assert ended or len(own) == n_tokens
            assert sum(isinstance(event, Opened) for event in reader.events) == 1
        stats = scheduler.stats
        assert stats.tokens == sum(map(len, wanted))
        assert stats.passes == sum(stats.batch_sizes)
        assert stats.rows >= stats.passes
        assert stats.accepted <= stats.drafted
        assert stats.sessions_total == len(prompts)
        assert stats.prompt_tokens == sum(map(len, prompts))


def test_a_session_that_goes_on_elsewhere_gets_the_rest_of_its_text(target_model: Model) -> None:
    prompt = make_prompt(target_model, 12, seed=3).tolist()
    for sampling in (replace(PLAIN, seed=4), replace(GREEDY, grammar=GRAMMAR)):
        wanted = one_by_one(target_model, prompt, sampling, 24)
        for n in {0, 1, len(wanted) // 2, len(wanted) - 1}:
            with running(target_model) as scheduler:
                session = submit(scheduler, prompt + wanted[:n], sampling, 24 - n, start=len(prompt))
                assert text_of(session)[0] == wanted[n:]


def test_a_right_branch_saves_passes_wherever_it_stands(target_model: Model) -> None:
    prompt = make_prompt(target_model, 6, seed=5).tolist()
    sampling = without_end(target_model, replace(PLAIN, seed=8))
    wanted = one_by_one(target_model, prompt, sampling, 60)
    with running(target_model, pass_seconds=0.03) as scheduler:
        assert scheduler.can_branch

        def hint(session: Session, text: list[int]) -> None:
            # What is right is what comes third after each token.
            rest = wanted[len(text) : len(text) + 4]
            tokens, parents, at = [], [], -1
            for token in rest:
                tokens += [(token + 1) % scheduler.n_vocab, (token + 2) % scheduler.n_vocab, token]
                parents += [at] * 3
                at = len(tokens) - 1
            session.hint(len(prompt) + len(text), tokens, len(text) + 1, parents)

        reader = Reader(submit(scheduler, prompt, sampling, 60), hint)
        assert reader.join().reason == "length"
        assert reader.text == wanted
        assert scheduler.stats.passes < 45
        assert scheduler.stats.drafted > 2 * scheduler.stats.accepted > 40


def test_right_hints_save_passes(target_model: Model) -> None:
    prompt = make_prompt(target_model, 6, seed=5).tolist()
    sampling = without_end(target_model, replace(PLAIN, seed=8))
    wanted = one_by_one(target_model, prompt, sampling, 60)
    with running(target_model, pass_seconds=0.03) as scheduler:

        def hint(session: Session, text: list[int]) -> None:
            session.hint(len(prompt), wanted, len(text) + 1)

        reader = Reader(submit(scheduler, prompt, sampling, 60), hint)
        assert reader.join().reason == "length"
        assert reader.text == wanted
        assert scheduler.stats.passes < 40
        assert scheduler.stats.accepted == scheduler.stats.drafted > 20


def test_the_context_is_filled_to_its_end(draft_model: Model) -> None:
    sampling = without_end(draft_model, GREEDY)
    with running(draft_model, Limits(sessions=2)) as scheduler:
        size = scheduler._context.n_ctx_seq
        prompt = make_prompt(draft_model, size - 3, seed=1).tolist()
        wanted = one_by_one(draft_model, prompt, sampling, 3, n_ctx=size)
        for max_tokens in (None, 2**32 - 1, 4):
            assert text_of(submit(scheduler, prompt, sampling, max_tokens)) == (wanted, Finished("context"))
        assert text_of(submit(scheduler, prompt, sampling, 3)) == (wanted, Finished("length"))
        full = make_prompt(draft_model, size, seed=1).tolist()
        assert text_of(submit(scheduler, full, sampling, None)) == ([], Finished("context"))
        with pytest.raises(sllm.ContextFullError, match=str(size)):
            submit(scheduler, [*full, 5])


@pytest.mark.parametrize("n_batch", [8, 20, 40])
def test_hints_never_ask_for_more_rows_than_the_context_has(target_model: Model, n_batch: int) -> None:
    """Four sessions with sixteen hinted tokens each, and room for a few."""
    sampling = without_end(target_model, GREEDY)
    prompts = [make_prompt(target_model, 5, seed=i).tolist() for i in range(4)]
    wanted = [one_by_one(target_model, prompt, sampling, 40) for prompt in prompts]
    with running(target_model, n_batch=n_batch, n_outputs_max=n_batch) as scheduler:
        readers = []
        for prompt, own in zip(prompts, wanted, strict=True):

            def hint(session: Session, text: list[int], prompt: Any = prompt, own: Any = own) -> None:
                session.hint(len(prompt), own, len(text) + 1)

            readers.append(Reader(submit(scheduler, prompt, sampling, 40), hint))
        for reader, own in zip(readers, wanted, strict=True):
            assert reader.join() == Finished("length")
            assert reader.text == own


# ---- the worker's own draft --------------------------------------------------------------------------------


def test_a_text_that_the_draft_cannot_follow_goes_on_without_it(target_model: Model, tmp_path: Path) -> None:
    """A smaller vocabulary and a shorter context: the others keep their drafts."""
    file = GGUF(embedded.DRAFT)
    file.resize_vocab(2000)
    path = file.write(tmp_path / "small.gguf")
    sampling = without_end(target_model, replace(PLAIN, seed=2))
    rng = np.random.default_rng(0)
    odd = rng.integers(2000, 2500, 20).tolist()
    biased = replace(sampling, logit_bias={**dict(sampling.logit_bias), 2100: 2.0})
    plain = make_prompt(target_model, 8, seed=9).tolist()
    plain = [token % 1990 + 5 for token in plain]
    jobs = [(odd, sampling), (plain, biased), (plain, replace(sampling, seed=3))]
    wanted = [one_by_one(target_model, prompt, params, 60) for prompt, params in jobs]
    with sllm.Model(path) as small, running(target_model, draft=small) as scheduler:
        for _ in range(2):
            readers = [Reader(submit(scheduler, prompt, params, 60)) for prompt, params in jobs]
            for reader, own in zip(readers, wanted, strict=True):
                assert reader.join() == Finished("length")
                assert reader.text == own
        assert scheduler._draft is not None
        assert not scheduler.failed


def test_a_prompt_that_the_drafts_context_does_not_hold(target_model: Model, draft_model: Model) -> None:
    sampling = without_end(target_model, replace(PLAIN, seed=2))
    long, short = (make_prompt(target_model, n, seed=n).tolist() for n in (300, 10))
    wanted = [one_by_one(target_model, prompt, sampling, 20, n_ctx=512) for prompt in (long, short)]
    with (
        target_model.context(n_ctx=2 * 512, n_seq_max=2, **EXACT) as context,
        draft_model.context(n_ctx=2 * 256, n_seq_max=2, **EXACT) as drafter,
    ):
        scheduler = Scheduler(context, Limits(sessions=2), draft=drafter)
        try:
            readers = [Reader(submit(scheduler, prompt, sampling, 20)) for prompt in (long, short)]
            for reader, own in zip(readers, wanted, strict=True):
                assert reader.join() == Finished("length")
                assert reader.text == own
        finally:
            scheduler.close()


# ---- sharing -----------------------------------------------------------------------------------------------


def test_equal_sessions_advance_together(target_model: Model) -> None:
    """A pass serves all: nobody is ever more than one commit ahead of another."""
    sampling = without_end(target_model, GREEDY)
    order: list[int] = []

    def noting(i: int, tell: Callable[[Any], None]) -> Callable[[Any], None]:
        def note(event: Any) -> None:
            if isinstance(event, Commit):
                order.append(i)
            tell(event)

        return note

    with running(target_model) as scheduler:
        sessions = []
        with scheduler._changed:  # they begin at once
            for i in range(4):
                sessions.append(submit(scheduler, make_prompt(target_model, 8, seed=i), sampling, 40))
                sessions[i].tell = noting(i, sessions[i].tell)  # type: ignore[assignment, method-assign]
        for session in sessions:
            assert text_of(session)[1] == Finished("length")
        assert len(order) == 4 * 40
        for at in range(0, len(order), 4):
            assert sorted(order[at : at + 4]) == [0, 1, 2, 3]
        assert scheduler.stats.passes == 40
        assert scheduler.stats.rows == 160
        assert scheduler.stats.batch_sizes == [0, 0, 40]


def test_a_long_prompt_does_not_stall_the_others(target_model: Model) -> None:
    """Between two of its chunks there is a pass for those who are at work."""
    sampling = without_end(target_model, GREEDY)
    limits = Limits(sessions=2, prefill=4)
    long = make_prompt(target_model, 120, seed=7).tolist()
    with running(target_model, limits, pass_seconds=0.002) as scheduler:
        first = Reader(submit(scheduler, [5, 6], sampling, 250))
        wait_until(lambda: len(first.text) > 0)
        with scheduler._changed:
            before = scheduler.stats.passes
            second = submit(scheduler, long, sampling, 2)
        counts: list[int] = []
        reader = Reader(second, lambda *_: counts.append(scheduler.stats.passes))
        assert reader.join() == Finished("length")
        assert reader.text == one_by_one(target_model, long, sampling, 2)
        assert before < 150, "the other text must not have been over by then"
        assert counts[0] - before >= (len(long) - 1) // limits.prefill - 1
        first.session.cancel()
        first.join()


def test_prompts_share_the_budget(target_model: Model) -> None:
    limits = Limits(sessions=4, prefill=9)
    with running(target_model, limits, pass_seconds=0.002) as scheduler:
        busy = Reader(submit(scheduler, [5], endless(target_model), None))
        with scheduler._changed:
            sessions = [
                submit(scheduler, make_prompt(target_model, 150, seed=i), GREEDY, 1) for i in range(3)
            ]
        readers = [Reader(session) for session in sessions]
        seen = []
        while not any(session.finished for session in sessions):
            with scheduler._changed:  # it stops where it looks for news, between two steps
                progress: list[int] = []
                while progress != [s.n_computed for s in sessions]:
                    progress = [s.n_computed for s in sessions]
                    time.sleep(0.01)
            seen.append(progress)
            assert max(progress) - min(progress) <= 3
        assert seen
        for reader in readers:
            reader.join()
        busy.session.cancel()
        busy.join()


# ---- memory that is kept -----------------------------------------------------------------------------------


def test_what_is_still_in_memory_is_not_computed_again(target_model: Model) -> None:
    sampling = without_end(target_model, replace(PLAIN, seed=6))
    prompt = make_prompt(target_model, 40, seed=6).tolist()
    wanted = one_by_one(target_model, prompt, sampling, 30)
    with running(target_model, Limits(sessions=2)) as scheduler:
        first = Reader(submit(scheduler, prompt, sampling, 10))
        first.join()
        assert first.opened.n_reused == 0
        again = Reader(submit(scheduler, prompt + first.text, sampling, 20, start=len(prompt)))
        again.join()
        assert again.opened.n_reused == len(prompt) + 9  # the last token was never written
        assert first.text + again.text == wanted
        # The same prompt from its beginning, in the memory that holds a longer text now.
        once_more = Reader(submit(scheduler, prompt, sampling, 30))
        once_more.join()
        assert once_more.opened.n_reused == len(prompt) - 1
        assert once_more.text == wanted
        assert scheduler.stats.reused_tokens == len(prompt) + 9 + len(prompt) - 1


def test_a_long_text_that_shares_little_is_copied_not_lost(target_model: Model, draft_model: Model) -> None:
    sampling = without_end(target_model, replace(PLAIN, seed=6))
    base = make_prompt(target_model, 100, seed=1).tolist()
    other = base[:20] + make_prompt(target_model, 30, seed=2).tolist()
    for draft in (None, draft_model):
        with running(target_model, Limits(sessions=2), draft=draft) as scheduler:
            first = Reader(submit(scheduler, base, sampling, 10))
            first.join()
            second = Reader(submit(scheduler, other, sampling, 10))
            second.join()
            assert second.opened.n_reused == 20
            assert second.text == one_by_one(target_model, other, sampling, 10)
            third = Reader(submit(scheduler, base + first.text, sampling, 10, start=100))
            third.join()
            assert third.opened.n_reused == 109  # it is still all there
            assert first.text + third.text == one_by_one(target_model, base, sampling, 20)


def test_the_one_longest_unused_makes_room(target_model: Model) -> None:
    prompts = [make_prompt(target_model, 20, seed=i).tolist() for i in range(3)]

    def reused(scheduler: Scheduler, i: int) -> int:
        reader = Reader(submit(scheduler, prompts[i], GREEDY, 1))
        reader.join()
        return reader.opened.n_reused

    with running(target_model, Limits(sessions=2)) as scheduler:
        assert [reused(scheduler, i) for i in (0, 1)] == [0, 0]
        assert reused(scheduler, 0) == 19  # now 1 is the older one
        assert reused(scheduler, 2) == 0
        assert reused(scheduler, 0) == 19
        assert reused(scheduler, 1) == 0


def test_memory_is_forgotten_after_a_while(target_model: Model) -> None:
    prompt = make_prompt(target_model, 20, seed=0).tolist()
    for keep, n_reused in ((0.0, 0), (600.0, 19)):
        with running(target_model, Limits(sessions=2, keep_seconds=keep)) as scheduler:
            Reader(submit(scheduler, prompt, GREEDY, 3)).join()
            if keep == 0.0:
                wait_until(lambda s=scheduler: not any(tokens_of(s._context, i) for i in range(2)))  # type: ignore[misc]
                assert not any(slot.held for slot in scheduler._slots)
            reader = Reader(submit(scheduler, prompt, GREEDY, 3))
            reader.join()
            assert reader.opened.n_reused == n_reused


# ---- places, refusals, ends --------------------------------------------------------------------------------


def endless(model: Model) -> SamplingParams:
    return without_end(model, GREEDY)


def test_who_finds_no_place_waits_and_one_more_is_refused(target_model: Model) -> None:
    with running(target_model, Limits(sessions=1, queue=2), pass_seconds=0.005) as scheduler:
        first = submit(scheduler, [5], endless(target_model), None)
        wait_until(lambda: scheduler.running() == [first])
        waiting = [submit(scheduler, [6 + i], endless(target_model), 2) for i in range(2)]
        assert scheduler.n_queued == 2
        with pytest.raises(sllm.BusyError, match="2 more are waiting"):
            submit(scheduler, [9])
        assert scheduler.stats.refused == 1
        readers = [Reader(one) for one in waiting]
        waiting[0].cancel()
        assert readers[0].join() == Finished("cancelled")
        assert not readers[0].text
        late = Reader(submit(scheduler, [7], endless(target_model), 2))
        first.cancel()
        for reader in (readers[1], late):
            assert reader.join() == Finished("length")
            assert reader.opened.queued_seconds >= 0
        wait_until(lambda: not scheduler.running())
        assert scheduler.stats.sessions_total == 4


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"prompt": []}, ValueError),
        ({"prompt": [-1]}, ValueError),
        ({"prompt": [5, 2560]}, ValueError),
        ({"prompt": [5] * 41}, sllm.ContextFullError),
        ({"start": 4}, ValueError),
        ({"start": -1}, ValueError),
        ({"sampling": replace(GREEDY, grammar="root ::= (")}, ValueError),
        ({"sampling": replace(GREEDY, grammar='root ::= "a"' + " " * 100)}, ValueError),
        ({"sampling": replace(GREEDY, logit_bias={2560: 1.0})}, ValueError),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    draft_model: Model, change: dict[str, Any], error: type[Exception]
) -> None:
    with running(draft_model, Limits(sessions=1, max_prompt=40, max_grammar=100)) as scheduler:
        with pytest.raises(error):
            submit(scheduler, **{"prompt": [5, 6, 7], **change})
        assert scheduler.stats.sessions_total == 0
        assert scheduler.n_queued == 0
        assert text_of(submit(scheduler, [5] * 40, max_tokens=1))[1].error is None


def test_a_worker_may_take_no_grammars(draft_model: Model) -> None:
    with (
        running(draft_model, Limits(max_grammar=0)) as scheduler,
        pytest.raises(ValueError, match="no grammars"),
    ):
        submit(scheduler, [5], replace(GREEDY, grammar="root ::= [a-z]"))


def test_cancelling_at_every_stage(target_model: Model) -> None:
    limits = Limits(sessions=1, prefill=1)
    prompt = make_prompt(target_model, 200, seed=0).tolist()
    with running(target_model, limits) as scheduler:
        in_prompt = submit(scheduler, prompt, endless(target_model), None)
        queued = submit(scheduler, prompt, endless(target_model), None)
        wait_until(lambda: in_prompt.n_computed > 3)
        queued.cancel()
        assert text_of(queued) == ([], Finished("cancelled"))
        in_prompt.cancel()
        assert text_of(in_prompt) == ([], Finished("cancelled"))
        at_work = Reader(submit(scheduler, [5], endless(target_model), None))
        wait_until(lambda: len(at_work.text) > 3)
        at_work.session.cancel()
        assert at_work.join() == Finished("cancelled")
        at_work.session.cancel()  # more of them do nothing
        wanted = one_by_one(target_model, prompt[:30], GREEDY, 5)
        assert text_of(submit(scheduler, prompt[:30], GREEDY, 5))[0] == wanted


def test_a_session_that_is_stuck_fails_alone(target_model: Model) -> None:
    sampling = without_end(target_model, GREEDY)
    prompts = [make_prompt(target_model, 6, seed=i).tolist() for i in range(3)]
    with running(target_model) as scheduler:
        others = [Reader(submit(scheduler, prompt, sampling, 40)) for prompt in prompts]
        for _ in range(3):
            stuck = Reader(submit(scheduler, [5, 6], replace(sampling, grammar=STUCK), 40))
            end = stuck.join()
            assert end.reason == "failed"
            assert isinstance(end.error, (ValueError, sllm.SllmError))
            assert not stuck.text
        for prompt, reader in zip(prompts, others, strict=True):
            assert reader.join() == Finished("length")
            assert reader.text == one_by_one(target_model, prompt, sampling, 40)
        assert not scheduler.failed


def test_a_text_that_is_taken_up_again_replaces_itself(target_model: Model) -> None:
    """Its client has lost the link and comes back before the worker has noticed."""
    sampling = endless(target_model)
    with running(target_model, Limits(sessions=1, queue=0), pass_seconds=0.002) as scheduler:
        first = Reader(submit(scheduler, [5, 6], sampling, None, text_id=77))
        wait_until(lambda: len(first.text) > 5)
        second = Reader(submit(scheduler, [5, 6], sampling, 8, text_id=77))
        assert first.join() == Finished("cancelled")
        assert second.join() == Finished("length")
        assert second.opened.n_reused == 1
        assert second.text == one_by_one(target_model, [5, 6], sampling, 8)
        # No id is no text of anybody's.
        third = Reader(submit(scheduler, [5], sampling, None))
        wait_until(lambda: len(third.text) > 0)
        with pytest.raises(sllm.BusyError):
            submit(scheduler, [5], sampling, 4)
        third.session.cancel()
        third.join()


# ---- clients that do not read, hint, or answer -------------------------------------------------------------


def test_a_client_that_does_not_read_stops_its_own_text_alone(target_model: Model) -> None:
    sampling = endless(target_model)
    limits = Limits(sessions=2, backlog=5)
    with running(target_model, limits) as scheduler:
        slow = submit(scheduler, [5, 6], sampling, 60)
        wait_until(lambda: slow.backlog == limits.backlog)
        other = Reader(submit(scheduler, [7, 8], sampling, 100))
        other.join()
        assert slow.backlog == limits.backlog
        assert len(slow.text) == 2 + limits.backlog - 1  # one of the events says that the prompt is done
        reader = Reader(slow)
        assert reader.join() == Finished("length")
        assert reader.text == one_by_one(target_model, [5, 6], sampling, 60)


@pytest.mark.parametrize("backlog", [1, 2, 64])
def test_a_reader_of_any_slowness_gets_everything(draft_model: Model, backlog: int) -> None:
    sampling = endless(draft_model)
    with running(draft_model, Limits(sessions=1, backlog=backlog)) as scheduler:

        def dawdle(_session: Session, text: list[int]) -> None:
            time.sleep(0.002 * (len(text) % 3))

        reader = Reader(submit(scheduler, [5], sampling, 50), dawdle)
        assert reader.join() == Finished("length")
        assert reader.text == one_by_one(draft_model, [5], sampling, 50)


def test_a_session_of_which_nothing_is_heard_ends(draft_model: Model) -> None:
    sampling = endless(draft_model)
    told: list[str] = []
    with running(draft_model, Limits(sessions=3, idle_seconds=1.0, backlog=4)) as scheduler:
        unread = submit(scheduler, [5], sampling, None)
        unread.on_stuck = lambda: told.append("idle")
        unhinted = Reader(submit(scheduler, [6], sampling, None, run_ahead=False))
        read = Reader(submit(scheduler, [7], sampling, None), lambda *_: time.sleep(0.008))
        wait_until(lambda: unread.finished)
        assert unhinted.join() == Finished("idle")
        assert told == ["idle"]
        assert read.join() == Finished("context")  # longer than idle_seconds, but read all the time


def test_waiting_for_a_place_is_not_idleness(draft_model: Model) -> None:
    """Nor is the time that a prompt takes."""
    limits = Limits(sessions=1, idle_seconds=0.5, prefill=1)
    with running(draft_model, limits, pass_seconds=0.01) as scheduler:
        first = Reader(submit(scheduler, [5], endless(draft_model), None))
        second = submit(scheduler, make_prompt(draft_model, 200, seed=0), GREEDY, 1, run_ahead=False)
        reader = Reader(second)
        time.sleep(3 * limits.idle_seconds)
        first.session.cancel()
        wait_until(lambda: len(reader.events) > 0)
        second.hint(second.n_prompt, [], 1)
        assert reader.join().reason in ("length", "eog")


def test_without_run_ahead_every_pass_is_asked_for(target_model: Model) -> None:
    prompt = [5, 6]
    sampling = endless(target_model)
    wanted = one_by_one(target_model, prompt, sampling, 30)
    with running(target_model, Limits(sessions=2)) as scheduler:
        reader = Reader(submit(scheduler, prompt, sampling, 30, run_ahead=False))
        session = reader.session
        other = Reader(submit(scheduler, [9], sampling, 60))
        other.join()
        assert not reader.text
        session.hint(2, [], 1)  # one pass, please
        wait_until(lambda: len(reader.text) == 1)
        session.hint(2, [], 1)  # that one has been answered
        Reader(submit(scheduler, [9], sampling, 60)).join()
        assert len(reader.text) == 1
        session.hint(2, [wanted[0] ^ 1, 5], 2)  # disagrees: its sender will see the commit, and hint again
        Reader(submit(scheduler, [10], sampling, 60)).join()
        assert len(reader.text) == 1
        session.hint(50, [5], 3)  # of a future that is not there yet
        Reader(submit(scheduler, [10], sampling, 60)).join()
        assert len(reader.text) == 1
        session.hint(2, wanted[:12], 4)  # goes on for as long as the hint does
        wait_until(lambda: len(reader.text) >= 12)
        Reader(submit(scheduler, [11], sampling, 60)).join()
        assert len(reader.text) <= 13
        while len(reader.text) < 30:
            n = len(reader.text)
            session.hint(2 + n, [], 5 + n)
            wait_until(lambda n=n: len(reader.text) > n)  # type: ignore[misc]
        assert reader.join() == Finished("length")
        assert reader.text == wanted


# ---- ends of the scheduler ---------------------------------------------------------------------------------


def test_draining_lets_the_running_ones_end(target_model: Model) -> None:
    sampling = endless(target_model)
    with running(target_model, Limits(sessions=1, queue=4), pass_seconds=0.003) as scheduler:
        first = Reader(submit(scheduler, [5], sampling, 60))
        wait_until(lambda: len(first.text) > 0)
        queued = Reader(submit(scheduler, [6], sampling, 60))
        assert not scheduler.drain(0.02)
        assert queued.join() == Finished("closing")
        with pytest.raises(sllm.ClosedError):
            submit(scheduler, [7])
        assert scheduler.drain(PATIENCE)
        assert first.join() == Finished("length")
        (told,) = [event for event in first.events if isinstance(event, Draining)]
        assert 0 < told.seconds <= 0.02, "the later drain() gave more time, which is no news"
        assert scheduler.drain(0)


@pytest.mark.parametrize("seed", range(12))
def test_closing_at_any_time_ends_everybody(target_model: Model, draft_model: Model, seed: int) -> None:
    rng = np.random.default_rng(seed)
    limits = Limits(sessions=2, prefill=int(rng.choice([1, 50])))
    with running(target_model, limits, draft=draft_model if seed % 2 else None) as scheduler:
        readers = [
            Reader(
                submit(scheduler, make_prompt(target_model, int(rng.integers(1, 200)), seed), GREEDY, None)
            )
            for _ in range(5)
        ]
        time.sleep(float(rng.uniform(0, 0.05)))
        closers = [threading.Thread(target=scheduler.close) for _ in range(2)]
        for thread in closers:
            thread.start()
        for reader in readers:
            assert reader.join().reason in ("closing", "eog", "context")
        for thread in closers:
            thread.join(PATIENCE)
        with pytest.raises(sllm.ClosedError):
            submit(scheduler, [5])
        assert not scheduler_threads()
        assert not scheduler.failed
        scheduler.close()


def test_submitting_while_it_closes_is_served_or_refused(draft_model: Model) -> None:
    ends: list[str] = []

    def client(scheduler: Scheduler) -> None:
        while True:
            try:
                session = submit(scheduler, [5], GREEDY, 2)
            except sllm.BusyError:
                continue
            except sllm.ClosedError:
                return
            ends.append(text_of(session)[1].reason)

    with running(draft_model, Limits(sessions=2, queue=2)) as scheduler:
        threads = [threading.Thread(target=client, args=(scheduler,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(ends) > 20)
        scheduler.close()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
    assert set(ends) <= {"length", "eog", "closing"}


def test_passes_that_fail_end_their_sessions_and_in_the_end_the_scheduler(
    draft_model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    """Its context is closed under its hands: every prompt fails."""
    failed = threading.Event()
    with running(draft_model, Limits(sessions=1, queue=8)) as scheduler:
        scheduler.on_failure = failed.set
        at_work = Reader(submit(scheduler, [5], endless(draft_model), None))
        wait_until(lambda: len(at_work.text) > 0)
        queued = [Reader(submit(scheduler, [6, 7, 8], GREEDY, 4)) for _ in range(5)]
        scheduler._context.close()
        ends = [reader.join() for reader in (at_work, *queued)]
        assert ends[0].reason in ("failed", "context")
        assert [end.reason for end in ends[1:4]] == ["failed"] * 3
        assert {end.reason for end in ends[4:]} == {"closing"}
        assert isinstance(ends[1].error, sllm.ClosedError)
        assert failed.wait(PATIENCE)
        assert scheduler.failed
        with pytest.raises(sllm.ClosedError):
            submit(scheduler, [5])
    assert "three passes in a row" in caplog.text


def test_a_pass_that_fails_tells_nobody_what_another_has_sent(
    draft_model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "what one of them has sent"
    with running(draft_model, Limits(sessions=2)) as scheduler:
        readers = [Reader(submit(scheduler, [5 + n], endless(draft_model), None)) for n in range(2)]
        wait_until(lambda: all(reader.text for reader in readers))

        def fail(*_arguments: object) -> None:
            monkeypatch.undo()
            raise ValueError(secret)

        monkeypatch.setattr(scheduler, "_pass", fail)
        ends = [reader.join() for reader in readers]
        errors = [end.error for end in ends]
        assert [type(error) for error in errors] == [sllm.InferenceError] * 2
        assert len({id(error) for error in errors}) == 2  # each call changes its own
        assert all("ValueError" in str(error) and secret not in str(error) for error in errors)
        assert Reader(submit(scheduler, [5], GREEDY, 2)).join().reason in ("length", "eog")
    assert secret not in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [
        {"sessions": 0},
        {"queue": -1},
        {"max_prompt": 0},
        {"max_hint": -1},
        {"hints_per_s": 0},
        {"max_grammar": -1},
        {"idle_seconds": -0.1},
        {"keep_seconds": math.nan},
        {"queue_seconds": -1.0},
        {"queue_seconds": math.nan},
        {"backlog": 0},
        {"prefill": 0},
    ],
)
def test_limits_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Limits(**wrong)


# ---- how many rows -----------------------------------------------------------------------------------------


def worths(lengths: Sequence[int], acceptances: Sequence[float]) -> list[list[float]]:
    """Of chains."""
    return [[a**j for j in range(1, n + 1)] for n, a in zip(lengths, acceptances, strict=True)]


def costs(
    pass_seconds: Callable[[int], float], counts: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
) -> PassTimes:
    times = PassTimes()
    for n in counts:
        times.add(n, pass_seconds(n))
    return times


sessions = st.lists(st.tuples(st.integers(0, 16), st.floats(0.0, 0.999)), min_size=1, max_size=8)


@examples(200)
@given(offered=sessions, base=st.floats(0.001, 1), row=st.floats(0, 1))
def test_never_more_rows_than_offered(offered: list[tuple[int, float]], base: float, row: float) -> None:
    lengths, acceptances = [n for n, _ in offered], [a for _, a in offered]
    counts = rows_to_check(costs(lambda n: base + row * n, range(1, 9)), worths(lengths, acceptances))
    assert len(counts) == len(offered)
    assert all(0 <= count <= n for count, n in zip(counts, lengths, strict=True))


@examples(100)
@given(offered=sessions, scale=st.floats(0.001, 1))
def test_rows_that_cost_nothing_are_all_checked(offered: list[tuple[int, float]], scale: float) -> None:
    lengths, acceptances = [n for n, _ in offered], [max(a, 0.3) for _, a in offered]
    assert rows_to_check(costs(lambda n: scale, range(1, 9)), worths(lengths, acceptances)) == lengths


@examples(100)
@given(offered=sessions)
def test_rows_that_cost_more_than_they_bring_are_not_checked(offered: list[tuple[int, float]]) -> None:
    lengths, acceptances = [n for n, _ in offered], [a for _, a in offered]
    # As in a model without any advantage of batches: a row is worth at most what it costs.
    assert not any(rows_to_check(costs(lambda n: 0.01 * n, range(1, 140)), worths(lengths, acceptances)))


@examples(60)
@given(offered=sessions, base=st.floats(0.01, 1))
def test_dearer_rows_are_never_more(offered: list[tuple[int, float]], base: float) -> None:
    lengths, acceptances = [n for n, _ in offered], [a for _, a in offered]
    totals = []
    for row in (0.0, base / 100, base / 10, base, 10 * base):
        times = PassTimes()
        for n in (*range(1, 12), 140):  # on a line, so the rest lies between
            times.add(n, base + row * n)
        totals.append(sum(rows_to_check(times, worths(lengths, acceptances))))
    assert totals == sorted(totals, reverse=True)


def test_better_hints_are_checked_first() -> None:
    times = costs(lambda n: 1 + 0.05 * n)
    for good, bad in ((0.9, 0.5), (0.8, 0.1)):
        counts = rows_to_check(times, worths([16, 16], [good, bad]))
        assert counts[0] > counts[1]
    counts = [rows_to_check(times, worths([16], [a]))[0] for a in (0.0, 0.3, 0.6, 0.9, 0.999)]
    assert counts == sorted(counts)
    assert counts[-1] == 16


def test_what_a_plain_pass_costs_is_found_out_first() -> None:
    assert rows_to_check(PassTimes(), worths([5, 5], [0.9, 0.9])) == [0, 0]
    only_one = costs(lambda n: 1.0, [1])
    assert rows_to_check(only_one, worths([5, 5], [0.9, 0.9])) == [0, 0]
    assert rows_to_check(only_one, worths([5], [0.9])) == [5]
    assert rows_to_check(only_one, []) == []


# ---- what passes take --------------------------------------------------------------------------------------


def test_pass_times_are_medians_of_the_newest() -> None:
    times = PassTimes()
    assert not times.known(1)
    times.add(1, 1.0)
    assert times.known(1) and not times.known(2)
    assert times.estimate(1) == 1.0
    assert 1.0 < times.estimate(5) < 1.5
    for seconds in (1.0, 100.0, 1.0, 1.0):
        times.add(1, seconds)
    assert times.estimate(1) == 1.0
    for _ in range(9):
        times.add(1, 2.0)
    assert times.estimate(1) == 2.0


@examples(100)
@given(
    seen=st.dictionaries(st.integers(1, 100), st.floats(1e-6, 10), min_size=1, max_size=6),
    asked=st.integers(1, 300),
)
def test_pass_times_between_and_beyond(seen: dict[int, float], asked: int) -> None:
    times = PassTimes()
    for count, seconds in 2 * list(seen.items()):  # one pass alone may be an outlier
        times.add(count, seconds)
    found = times.estimate(asked)
    assert found > 0 and math.isfinite(found)
    if asked in seen:
        assert found == seen[asked]
    elif len(seen) > 1 and min(seen) < asked < max(seen):
        low, high = max(n for n in seen if n < asked), min(n for n in seen if n > asked)
        slack = 1e-9
        assert seen[low] - slack <= found <= max(seen[low], seen[high]) + slack


def test_acceptance_is_learned_from_what_was_not_checked_too() -> None:
    for truth, low, high in (([1, 2, 3, 4], 0.9, 1.0), ([9], 0.0, 0.1)):
        confidence = Confidence()
        before = confidence.acceptance
        confidence.observe_truth([], [], [5])
        assert confidence.acceptance == before
        for _ in range(100):
            confidence.observe_truth([1, 2, 3, 4], [UNKNOWN_PROB] * 4, truth)
        assert low <= confidence.acceptance <= high
        assert confidence.acceptance < 1


# ---- models that cannot take tokens back -------------------------------------------------------------------


def test_hints_for_a_recurrent_model(tmp_path: Path) -> None:
    path = tmp_path / "mamba.gguf"
    path.write_bytes(gguf_of(*mamba()))
    with sllm.Model(path) as model:
        sampling = without_end(model, replace(PLAIN, seed=3))
        prompt = make_prompt(model, 10, seed=1).tolist()
        texts: list[list[int]] = []
        for hinting in (False, True):

            def hint(session: Session, text: list[int], hinting: bool = hinting) -> None:
                if hinting:
                    right = texts[0][len(text) : len(text) + 2]
                    chain = right if len(text) % 3 else [*right[:1], 5, 6]
                    session.hint(session.n_prompt + len(text), chain, len(text) + 1)

            with running(
                model, Limits(sessions=1), type_k="f16", type_v="f16", flash_attn=None, pass_seconds=0.005
            ) as scheduler:
                reader = Reader(submit(scheduler, prompt, sampling, 20), hint)
                assert reader.join() == Finished("length")
                texts.append(reader.text)
                assert (scheduler.stats.accepted > 0) == hinting
                rest = text_of(submit(scheduler, prompt + texts[0][:5], sampling, 15, start=10))
                assert rest[1] == Finished("length")
        assert texts[0] == texts[1]
