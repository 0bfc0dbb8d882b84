"""Detection of an engine: which one it is, what it supports, and whether its vocabulary is ours."""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sllm.engine.vocab import EOG
from sllm.errors import RemoteError, VocabMismatchError
from sllm.http_engine import llama_server, sglang, vllm
from sllm.http_engine.rows import RowReader, field_of
from sllm.http_engine.transport import HttpStatusError, NotJsonError, limit_of

if TYPE_CHECKING:
    from sllm.engine.vocab import Vocab
    from sllm.http_engine.dialect import Dialect, Finder, Found
    from sllm.http_engine.transport import Call, EngineLink

__all__ = ["APIS", "EngineInfo", "find_engine", "look"]

APIS = ("llama-server", "sglang", "vllm")
_FINDERS: dict[str, Finder] = {
    "llama-server": llama_server.find,
    "sglang": sglang.find,
    "vllm": vllm.find,
}

ODD_TEXTS = (
    "Hello, world! It's 3.14e-5 or 0123456789.",
    " 你好，世界。「何」 한국어",
    "naïve café\n\n\tfunc(x){}\r\n   end",
    "🙂👩‍👩‍👧 e\u0301 \u200b\u2028",
)
"""Texts at which tokenisers differ."""

_LARGE_K = 1024
"""An engine that gives so many log-probabilities has no limit worth looking for."""

_ANY_TOKEN = 1 << 30

_PROMPT = 512
"""Tokens of the prompt that shows whether the beginnings of prompts are kept."""


@dataclass(frozen=True)
class EngineInfo:
    """The detected properties of an engine.

    Attributes:
        api: ``"vllm"``, ``"sglang"`` or ``"llama-server"``.
        version: its own version string; "" if unknown.
        model: the model's name in requests.
        n_ctx: positions of a text, prompt and answer together; None: it does not say.
        max_logprobs: maximum number of log-probabilities per position; None: no limit was found.
        n_slots: prompts that it computes at once, if that is a fixed number.
        tokenizer: ``"the same"``, ``"the same tokens, cut otherwise"`` (its texts become other tokens of the
            same vocabulary) or ``"not compared"`` (it does not tokenise).
        prefix_cache: whether a prefix shared with an earlier prompt is not computed again, as reported or
            measured; None: unknown.
        batch_invariant: whether it reports that its numbers do not depend on what else it computes; None: not
            reported.
        round_trip: duration of the fastest request in seconds.
        selects: whether its own stream is the text at any temperature, because it selects as sllm does (vLLM
            with the plugin of ``examples/vllm-plugin``).

    """

    api: str
    version: str
    model: str
    n_ctx: int | None
    max_logprobs: int | None
    n_slots: int | None
    tokenizer: str
    prefix_cache: bool | None
    batch_invariant: bool | None
    round_trip: float
    selects: bool = False

    def advice(self) -> list[str]:
        """Recommendations that would make its texts exact or faster, each a sentence."""
        said = []
        if self.max_logprobs is not None and self.max_logprobs < 40:
            said.append(
                f"Use top_k 1 to {self.max_logprobs}, or start it with --max-logprobs 64: it gives"
                f" {self.max_logprobs} log-probabilities of a position."
            )
        if self.prefix_cache is False:
            switch = {"vllm": "--enable-prefix-caching", "sglang": "no --disable-radix-cache"}.get(self.api)
            said.append(
                "Without a prefix cache it computes the whole text again for every request"
                + (f": start it with {switch}." if switch else ".")
            )
        if self.api == "vllm" and not self.batch_invariant:
            said.append(
                "Start it with VLLM_BATCH_INVARIANT=1 (GPUs) where texts must not depend on what else it"
                " computes: in bfloat16 near-ties may fall either way."
            )
        if self.api == "sglang" and not self.batch_invariant:
            said.append(
                "Start it with --enable-deterministic-inference where texts must not depend on what else it"
                " computes: in bfloat16 near-ties may fall either way."
            )
        if self.n_slots is not None and self.n_slots < 5:
            said.append(
                f"Start it with -np 8: it checks a draft of n tokens in n + 1 slots at once, and has"
                f" {self.n_slots}."
            )
        if self.tokenizer == "the same tokens, cut otherwise":
            said.append("Make prompts with one tokeniser alone: its own cuts some texts into other tokens.")
        return said


def find_engine(link: EngineLink, call: Call, api: str) -> tuple[str, Found]:
    """Which engine stands at the address, by what it says of itself.

    Raises:
        RemoteError: none that is known, or another one than ``api``.

    """
    with suppress(HttpStatusError, NotJsonError):  # what it says is no matter, if only it answers
        link.request("/v1/models", call=call, patient=False)
    for name in APIS if api == "auto" else (api,):
        found = _FINDERS[name](link, call)
        if found is not None:
            return name, found
    expected = "vLLM, SGLang or llama-server" if api == "auto" else api
    raise RemoteError(
        f"{link.endpoint} is not {expected}, as far as its addresses tell; what gives log-probabilities by"
        " the texts of tokens (the server of llama-cpp-python, hosted APIs) cannot be used"
    )


def make_dialect(api: str, found: Found, link: EngineLink, call: Call, vocab: Vocab | None) -> Dialect:
    """What asks an engine of this kind. Without a vocabulary, any token is taken for one of it."""
    reader = RowReader(link.endpoint, _ANY_TOKEN if vocab is None else vocab.n_tokens)
    ends = [] if vocab is None else sorted({*vocab.tokens_with(EOG).tolist(), *vocab.turn_ends()})
    if api == "vllm":
        return vllm.VLLM(found, reader, ends)
    if api == "sglang":
        return sglang.SGLang(reader, ends)
    if vocab is not None:
        return llama_server.LlamaServer(reader, llama_server.letter_token(vocab))
    letter = _tokenized(link, call, llama_server.LlamaServer(reader, 0), "a")
    return llama_server.LlamaServer(reader, letter[-1] if letter else 0)


def look(
    link: EngineLink, call: Call, vocab: Vocab | None, api: str, model: str | None
) -> tuple[Dialect, EngineInfo]:
    """Find out what stands at the address: some twenty small requests, and two with a prompt.

    Args:
        link: to it.
        call: what the requests belong to.
        vocab: what its tokens are to be those of; None: that is not compared.
        api: one of :data:`APIS`, or ``"auto"``.
        model: the model's name there; None: the first that it serves.

    Raises:
        RemoteError: it is no engine that is known, or does not answer as one.
        AuthError: it refuses the key.
        VocabMismatchError: it has another vocabulary.

    """
    name, found = find_engine(link, call, api)
    if model is not None:
        found = replace(found, model=model)
    dialect = make_dialect(name, found, link, call, vocab)
    round_trip = _round_trip(link, call)
    tokenizer = _compare_tokens(link, call, dialect, vocab)
    max_logprobs = _most_logprobs(link, call, dialect, vocab)
    prefix_cache = found.prefix_cache
    if prefix_cache is not False:
        measured = _keeps_prefixes(link, call, dialect, vocab, found.n_ctx, round_trip)
        prefix_cache = prefix_cache if measured is None else measured
    return dialect, EngineInfo(
        name,
        found.version,
        found.model,
        found.n_ctx,
        max_logprobs,
        found.n_slots,
        tokenizer,
        prefix_cache,
        found.batch_invariant,
        round_trip,
        found.selects,
    )


def _tokenized(link: EngineLink, call: Call, dialect: Dialect, text: str) -> list[int] | None:
    """The engine's own tokens of a text; None: it does not tokenise."""
    with suppress(HttpStatusError, NotJsonError):
        found = field_of(link.request(*dialect.tokenize_request(text), call=call).value, "tokens")
        if isinstance(found, list) and all(type(token) is int and token >= 0 for token in found):
            return found
    return None


def _round_trip(link: EngineLink, call: Call) -> float:
    took = []
    for _ in range(3):
        began = time.perf_counter()
        with suppress(HttpStatusError, NotJsonError):
            link.request("/v1/models", call=call)
        took.append(time.perf_counter() - began)
    return min(took)


def _compare_tokens(link: EngineLink, call: Call, dialect: Dialect, vocab: Vocab | None) -> str:
    """Whether the engine's tokens are those of the vocabulary, by texts that it tokenises."""
    if vocab is None:
        return "not compared"
    same = True
    for text in ODD_TEXTS:
        theirs = _tokenized(link, call, dialect, text)
        if theirs is None:
            return "not compared"
        ours = vocab.encode(text, add_special=False).tolist()
        if theirs == ours:
            continue
        same = False
        if not all(t < vocab.n_tokens for t in theirs) or vocab.decode(theirs) != vocab.decode(ours):
            raise VocabMismatchError(
                f"{link.endpoint} has another vocabulary than {vocab!r}: for {text!r} it has the tokens"
                f" {_shown(theirs)}, which are {_shown(ours)} here; pass the vocabulary of its model"
            )
    return "the same" if same else "the same tokens, cut otherwise"


def _shown(tokens: list[int]) -> str:
    return f"{tokens[:6]}".removesuffix("]") + (", ...]" if len(tokens) > 6 else "]")


def _most_logprobs(link: EngineLink, call: Call, dialect: Dialect, vocab: Vocab | None) -> int | None:
    """How many log-probabilities of a position it gives at most; None: as many as were tried."""
    prompt = _prompt(link, call, dialect, vocab, 2)
    wanted = _LARGE_K if vocab is None else min(_LARGE_K, vocab.n_tokens)
    for k in dict.fromkeys((wanted, 512, 256, 128, 100, 64, 50, 40, 32, 20, 16, 10, 8, 5, 4, 3, 2, 1)):
        if k > wanted:
            continue
        try:
            reply = link.request(*dialect.rows_request(prompt, [], k), call=call)
        except HttpStatusError as error:
            if error.status not in (400, 422):
                raise
            limit = limit_of(error)
            if limit is None:
                continue
            if limit < 1:
                break
            reply = link.request(*dialect.rows_request(prompt, [], limit), call=call)
            dialect.rows(reply.value, [], limit)
            return limit
        dialect.rows(reply.value, [], k)
        return None if k == wanted else k
    raise RemoteError(
        f"{link.endpoint} gives no log-probabilities, which selecting needs ({dialect.max_logprobs_option})"
    )


def _keeps_prefixes(
    link: EngineLink,
    call: Call,
    dialect: Dialect,
    vocab: Vocab | None,
    n_ctx: int | None,
    round_trip: float,
) -> bool | None:
    """Whether a prompt that was computed costs less the second time: by what the engine says, or the time."""
    prompt = _prompt(link, call, dialect, vocab, min(_PROMPT, (n_ctx or 2 * _PROMPT) // 2))
    took: list[float] = []
    reply: Any = None
    for _ in range(2):
        began = time.perf_counter()
        reply = link.request(*dialect.rows_request(prompt, [], 1), call=call)
        took.append(max(time.perf_counter() - began - round_trip, 0.0))
    n_cached = dialect.n_cached(reply)
    if n_cached is not None:
        return n_cached > 0
    # On a busy machine the second may take as long for other reasons.
    return True if took[0] > 0.02 and took[1] < 0.5 * took[0] else None


def _prompt(link: EngineLink, call: Call, dialect: Dialect, vocab: Vocab | None, n: int) -> list[int]:
    """A prompt of ``n`` tokens, or fewer, that nobody has sent before."""
    if vocab is None:
        tokens = _tokenized(link, call, dialect, secrets.token_hex(4 * n)) or []
        return tokens[:n] or [1]
    tokens = []
    while len(tokens) < n:
        token = secrets.randbelow(vocab.n_tokens)
        if vocab.piece(token) and not vocab.is_eog(token):
            tokens.append(token)
    return tokens
