"""Grammars and JSON Schemas: which tokens may come next, by llguidance.

llguidance (MIT, guidance-ai/llguidance) is an Earley parser behind a lexer of regular-expression derivatives
(Brzozowski). It takes linear time for the grammars of everyday use, and has a limit for every step of the
others. :mod:`sllm.engine.gbnf` writes llama.cpp's grammars in its syntax; JSON Schemas it reads itself.

The C core asks :func:`_allowed` when it selects a token; nothing is known here of sequences and drafts, only
of texts. What was parsed of them is kept, and the text that is asked about is nearly always one of these and
a token more.
"""

from __future__ import annotations

import json
import re
import threading
import time
import weakref
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn, cast
from urllib.parse import unquote

import numpy as np

from sllm.engine._ffi import ffi, keep_exception, lib
from sllm.engine.gbnf import to_lark
from sllm.engine.kept import Kept
from sllm.engine.vocab import EOG
from sllm.extras import needs

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from sllm.engine.vocab import Vocab

__all__ = ["Asked", "Grammar", "Grammars", "complaint", "have_grammars", "kept_bytes"]

_MAX_TEXT = 1 << 17
"""Bytes of a grammar or a schema."""

_MAX_GRAMMARS = 8
_MAX_BYTES = 16 << 20
_MAX_STATES = 32
"""What is kept of a vocabulary: grammars, and texts that they were asked about."""

_BYTES_PER_BYTE = 100
"""What a compiled grammar takes for each byte of its text, at most (a chain of references in a schema)."""

_SECONDS = 0.5
_SECONDS_PER_TOKEN = 0.01
"""Time of a processor that the grammar may take for one text, and for each token of it besides."""

_MAX_MULTIPLE = 5000
_MAX_LEVELS = 4000
_STACK_BYTES = 128 << 20
"""Of a schema: the largest ``multipleOf``, levels that are compiled, and the stack for it, which is several
times of what is needed.
"""

_SMALL_VOCABULARY = 4096
"""Up to so many tokens the whole vocabulary is as quickly asked about as a short list."""

_GRAMMAR, _SCHEMA = "the grammar", "the JSON Schema"

_ITEMS_IN_ROW, _ITEMS_IN_ROW_OF_SCHEMA = 200, 2000
_LIMITS = {
    "step_max_items": 50_000,
    "initial_lexer_fuel": 100_000,
    "step_lexer_fuel": 200_000,
    "max_lexer_states": 10_000,
    "max_grammar_size": 30_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,  # these hold the grammar and the text
}
"""llguidance's ``ParserLimits``. A grammar for JSON has rows of fewer than 30 items, an object of a schema
four for each property that it may have; a step takes fewer than 40,000 for a vocabulary of 152,000 tokens.
"""

_OPTIONS = '%llguidance {"no_forcing": true}\n'
"""What a grammar allows is then a matter of the text alone. Else llguidance rules out what is not the
tokeniser's own way to cut a text into tokens.
"""


def _llguidance() -> Any:
    with needs("grammar"):
        import llguidance
    return llguidance


_WHITESPACE = r" |\n[ \t]{0,20}"
"""Between the parts of JSON there may be this, or nothing, where a schema does not say otherwise
(llguidance's ``x-guidance``). Without a bound a small model goes on with empty lines until its text ends.
"""


def have_grammars() -> bool:
    """Whether the package for grammars is installed."""
    try:
        _llguidance()
    except ImportError:
        return False
    return True


def _reason(error: str) -> str:
    """What llguidance says, in one line."""
    lines = [line.strip() for line in error.splitlines()]
    return next((line for line in lines if line and not line.startswith("<")), "no reason is given")[:300]


def _lark(grammar: str | None, json_schema: str | None, token_id: Callable[[str], int | None]) -> str | None:
    text = grammar if grammar is not None else cast("str", json_schema)
    what = _what((grammar, json_schema))
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > _MAX_TEXT:
        raise ValueError(f"{what} has {size} bytes, and {_MAX_TEXT} are the most")
    if grammar is None:
        schema = json.loads(text)
        n_levels = _n_levels(schema)
        if n_levels > _MAX_LEVELS:
            raise ValueError(
                f"the JSON Schema needs too much: it has {n_levels} levels, its references included"
            )
        if isinstance(schema, dict):
            schema = {"x-guidance": {"whitespace_pattern": _WHITESPACE}, **schema}
        return f"{_OPTIONS}start: %json {json.dumps(schema)}\n"
    lark = to_lark(grammar, token_id)
    return None if lark is None else f"{_OPTIONS}{lark}\n"


def _compile(tokenizer: Any, lark: str, what: str) -> Any:
    """A matcher at the beginning of a text."""
    guidance = _llguidance()
    row = _ITEMS_IN_ROW if what == _GRAMMAR else _ITEMS_IN_ROW_OF_SCHEMA
    limits = guidance.LLParserLimits(max_items_in_row=row, **_LIMITS)
    matcher = _on_a_deep_stack(lambda: guidance.LLMatcher(tokenizer, lark, log_level=0, limits=limits))
    if matcher.is_error():
        raise ValueError(f"{what} cannot be used: {_reason(matcher.get_error())}")
    return matcher


def _on_a_deep_stack(call: Callable[[], Any]) -> Any:
    """What ``call`` returns on a thread with a stack of its own: a compiler of grammars recurses, and a stack
    that overflows ends the process.
    """
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - it is raised where the caller is
            errors.append(error)

    thread = threading.Thread(target=run, name="sllm-grammar", daemon=True)
    with _starting:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


_starting = threading.Lock()


def _n_levels(schema: Any) -> int:
    """How deep a compiler may have to go into a schema: its own levels, and those of every ``$ref`` in it.

    Raises:
        ValueError: a ``multipleOf`` that takes a state for each remainder, and so too much memory.

    """
    targets = {""}
    depths: dict[int, int] = {}  # of objects and arrays, by identity
    waiting = [(schema, False)]
    while waiting:
        node, known = waiting.pop()
        parts = list(node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())
        if known:
            depths[id(node)] = 1 + max((depths.get(id(part), 0) for part in parts), default=0)
            continue
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                targets.add(node["$ref"])
            multiple = node.get("multipleOf")
            if isinstance(multiple, (int, float)) and multiple > _MAX_MULTIPLE:
                raise ValueError(f"the JSON Schema needs too much: multipleOf is more than {_MAX_MULTIPLE}")
        waiting.append((node, True))
        waiting += [(part, False) for part in parts if isinstance(part, (dict, list))]
    total = 0
    for target in targets:
        node = schema
        for name in target.removeprefix("#").split("/")[1:]:
            name = unquote(name).replace("~1", "/").replace("~0", "~")
            if isinstance(node, list) and name.isdigit() and int(name) < len(node):
                node = node[int(name)]
            elif isinstance(node, dict) and name in node:
                node = node[name]
            else:
                node = schema  # whatever it is, it is not deeper than all of it
                break
        total += 1 + depths.get(id(node), 0)
    return total


class _Tokens:
    """A vocabulary in the form that llguidance reads."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], eos: int) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = eos

    def __call__(self, _text: str | bytes) -> list[int]:
        """Not used for grammars that force nothing."""
        return []


class _State:
    """A text and the matcher behind it."""

    def __init__(self, grammar: Grammar, matcher: Any) -> None:
        self.grammar = weakref.ref(grammar)  # with which it goes
        self.matcher = matcher
        self.text = b""  # int32 ids
        self.seconds = 0.0


class Grammar:
    """A grammar or a JSON Schema, compiled for one vocabulary. Any number of threads may use it."""

    def __init__(self, grammars: Grammars, matcher: Any | None, *, shortlists: bool) -> None:
        self._grammars = grammars
        self._matcher = matcher  # at the beginning of a text; None: nothing is allowed
        self._shortlists = shortlists

    def allowed(self, text: bytes, asked: npt.NDArray[np.int32], into: npt.NDArray[np.uint32]) -> bool:
        """Which tokens may follow a text.

        Args:
            text: the ids of its tokens as int32.
            asked: int32 (n,): the tokens that matter; none: all.
            into: uint32 (n_tokens / 32, rounded up) of zeros; gets the bit of each allowed token.

        Returns:
            Whether the bits of all tokens are right, and not only of those asked about.

        Raises:
            ValueError: the text does not match, or takes too much.

        """
        if self._matcher is None:
            return True
        state = self._grammars.take_state(
            self, text
        )  # and it is gone where something fails: it may be half way
        began = time.thread_time()
        self._follow(state, text)
        complete = self._fill(state.matcher, asked, into)
        state.seconds += time.thread_time() - began
        if state.seconds > _SECONDS + _SECONDS_PER_TOKEN * (len(text) // 4):
            raise ValueError("the grammar takes too much time for this text")
        if not state.matcher.is_error():
            self._grammars.put_state(state)
        return complete

    def new_state(self) -> _State:
        """At the beginning of a text."""
        return _State(self, cast("Any", self._matcher).deep_copy())

    def _follow(self, state: _State, text: bytes) -> None:
        """Bring a state to a text."""
        matcher, ends = state.matcher, self._grammars.ends
        if not text.startswith(state.text):
            known, wanted = np.frombuffer(state.text, np.int32), np.frombuffer(text, np.int32)
            n = min(len(known), len(wanted))
            differ = np.flatnonzero(known[:n] != wanted[:n])
            same = int(differ[0]) if len(differ) else n
            n_back = sum(token not in ends for token in known[same:].tolist())
            if not matcher.rollback(n_back):
                _fail(matcher)
            state.text = state.text[: 4 * same]
        more = np.frombuffer(text, np.int32, offset=len(state.text)).tolist()
        for i, token in enumerate(more):
            if token in ends:
                if not matcher.is_accepting():
                    raise ValueError("the generated text ends where the grammar does not allow it")
            elif matcher.try_consume_tokens([token]) != 1:
                if matcher.is_error():
                    _fail(matcher)
                raise ValueError(f"the generated text does not match the grammar from token {i} on")
        state.text = text

    def _fill(self, matcher: Any, asked: npt.NDArray[np.int32], into: npt.NDArray[np.uint32]) -> bool:
        # 1. The tokens with text.
        complete = len(asked) == 0 or not self._shortlists
        if not matcher.is_stopped():
            if complete:
                matcher.unsafe_compute_mask_ptr(into.ctypes.data, into.nbytes)
            else:
                for token in asked.tolist():
                    if matcher.validate_tokens([token]):
                        into[token >> 5] |= np.uint32(1 << (token & 31))
        if matcher.is_error():
            if not matcher.get_error().startswith("NoExtensionBias"):
                _fail(matcher)
            into[:] = 0  # no token of this vocabulary goes on
            return True
        # 2. The tokens that end it.
        bit = np.uint32(1)
        accepting = matcher.is_accepting()
        for token in self._grammars.ends:
            mask = bit << np.uint32(token & 31)
            if accepting:
                into[token >> 5] |= mask
            else:
                into[token >> 5] &= ~mask
        return complete


def _fail(matcher: Any) -> NoReturn:
    raise ValueError(f"the grammar takes too much for this text: {_reason(matcher.get_error())}")


class Grammars:
    """The grammars of one vocabulary. Any number of threads may use them.

    Attributes:
        ends: the tokens that end a text.

    """

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._compiling = threading.Lock()  # one at a time: however many come, they take one core
        self._tokenizer: Any = None
        self._compiled: Kept[tuple[str | None, str | None], Grammar] = Kept(_MAX_GRAMMARS, _MAX_BYTES)
        self._states: list[_State] = []  # the newest last
        self.ends: frozenset[int] = frozenset()
        self.n_words = (vocab.n_tokens + 31) // 32

    def load(self) -> None:
        """Read the vocabulary: a second or so for 150,000 tokens. The first grammar does it otherwise.

        Raises:
            ImportError: the package for grammars is not installed.

        """
        guidance = _llguidance()
        with self._loading:
            if self._tokenizer is not None:
                return
            vocab = self._vocab
            ends = frozenset([*vocab.tokens_with(EOG).tolist(), *vocab.turn_ends()])
            tokens = [b"" if token in ends else vocab.piece(token) for token in range(vocab.n_tokens)]
            special = [token for token, piece in enumerate(tokens) if not piece]
            for token in special:
                tokens[token] = b"<%d>" % token
            eos = min(ends) if vocab.eos is None else vocab.eos
            self.ends = ends
            self._tokenizer = guidance.LLTokenizer(
                _Tokens(tokens, special, eos), n_vocab=vocab.n_tokens, eos_token=eos
            )

    def clear(self) -> None:
        """Forget everything, the vocabulary too."""
        with self._loading, self._lock:
            self._tokenizer = None
            self._compiled.clear()
            self._states.clear()

    def compiled(self, grammar: str | None, json_schema: str | None) -> Grammar:
        """A GBNF grammar or a JSON Schema (JSON text) for this vocabulary. Those in use are kept, and of the
        others the newest 8, or the newest of 16 MiB.

        Raises:
            ValueError: it does not parse, or needs too much.
            ImportError: the package for grammars is not installed.

        """
        self.load()
        key = (grammar, json_schema)
        found = self._compiled.get(key)
        if found is None:
            with self._compiling:
                lark = _lark(*key, self._token_id)
                matcher = None if lark is None else _compile(self._tokenizer, lark, _what(key))
            shortlists = grammar is not None and self._vocab.n_tokens > _SMALL_VOCABULARY
            found = Grammar(self, matcher, shortlists=shortlists)
        self._compiled.put(key, found, kept_bytes(*key))
        with self._lock:
            self._states = [one for one in self._states if one.grammar() is not None]
        return found

    def _token_id(self, text: str) -> int | None:
        tokens = self._vocab.encode(text, add_special=False, parse_special=True)
        return int(tokens[0]) if len(tokens) == 1 else None

    def take_state(self, grammar: Grammar, text: bytes) -> _State:
        """The state with the most of a text, for the caller alone."""
        with self._lock:
            best, best_same = None, 0
            for state in self._states:
                if state.grammar() is grammar:
                    same = _n_same(state.text, text)
                    if same >= best_same and (same == len(state.text) or 2 * same >= len(text)):
                        best, best_same = state, same
            if best is not None:
                self._states.remove(best)
                return best
        return grammar.new_state()

    def put_state(self, state: _State) -> None:
        """Keep a state; the newest 32 are, as long as their grammars."""
        with self._lock:
            self._states = [one for one in self._states if one.grammar() is not None][1 - _MAX_STATES :]
            self._states.append(state)


def kept_bytes(grammar: str | None, json_schema: str | None) -> int:
    """About what a grammar or a JSON Schema takes when it is compiled; nothing where there is none."""
    return _BYTES_PER_BYTE * len(grammar or json_schema or "")


def _n_same(known: bytes, text: bytes) -> int:
    """Bytes of whole tokens that two texts begin with."""
    if text.startswith(known):
        return len(known)
    n = min(len(known), len(text)) // 4
    differ = np.flatnonzero(np.frombuffer(known, np.int32, n) != np.frombuffer(text, np.int32, n))
    return 4 * (int(differ[0]) if len(differ) else n)


def _what(key: tuple[str | None, str | None]) -> str:
    return _SCHEMA if key[0] is None else _GRAMMAR


@lru_cache(maxsize=1)
def _bytes_alone() -> Any:
    tokens = [bytes([value]) for value in range(256)]
    return _llguidance().LLTokenizer(_Tokens([*tokens, b"<end>"], [256], 256), eos_token=256)


@lru_cache(maxsize=64)
def complaint(grammar: str | None, json_schema: str | None) -> str:
    """What is wrong with a grammar or a JSON Schema, whatever the vocabulary; "" for nothing."""
    key = (grammar, json_schema)
    try:
        lark = _lark(*key, lambda _name: 0)
        if lark is not None and have_grammars():
            if grammar is not None:
                lark = re.sub(r"<\[\^?\d+\]>", r"/[a]/", lark)  # tokens are a vocabulary's business
            _compile(_bytes_alone(), lark, _what(key))
    except ValueError as error:
        return str(error)
    return ""


class Asked:
    """What the C core asks, by a handle: a grammar, or None until it is compiled."""

    def __init__(self) -> None:
        self.grammar: Grammar | None = None
        self.n_words = 0


@ffi.def_extern(  # type: ignore[untyped-decorator]
    name="sllm_py_allowed", error=lib.SLLM_ALLOWED_STOPPED, onerror=keep_exception
)
def _allowed(
    user_data: Any, text: Any, n_text: int, asked: Any, n_asked: int, allowed: Any, why: Any, size: int
) -> int:
    """``sllm_grammar_callback``."""
    target: Asked = ffi.from_handle(user_data)
    assert target.grammar is not None
    try:
        complete = target.grammar.allowed(
            ffi.buffer(text, 4 * n_text)[:] if n_text else b"",
            np.frombuffer(ffi.buffer(asked, 4 * n_asked), np.int32) if n_asked else _NONE,
            np.frombuffer(ffi.buffer(allowed, 4 * target.n_words), np.uint32),
        )
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise  # somebody wants to end the program; a panic of Rust is not that
        reason = str(error).encode("utf-8", "replace")[: size - 1]
        ffi.memmove(why, reason, len(reason))
        return int(lib.SLLM_ALLOWED_FAILED)
    return int(lib.SLLM_ALLOWED_ALL if complete else lib.SLLM_ALLOWED_SOME)


_NONE = np.empty(0, np.int32)
