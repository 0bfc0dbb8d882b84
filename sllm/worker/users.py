"""Who calls a worker, and how much of it they may still use.

A token stands for a name, and a name for an account, which all texts of its user share. The names and limits
are in a file (:mod:`sllm.worker.token_file`) that is watched: a change counts within a second or two, and
what runs under a token that was revoked ends.
"""

from __future__ import annotations

import hmac
import logging
import math
import threading
import time
from typing import TYPE_CHECKING

from sllm import folders
from sllm.engine.handle import join
from sllm.errors import AuthError, BusyError, ContextFullError
from sllm.wire import auth, tokens
from sllm.worker.token_file import DEFAULT_NAME, Allowance, TokenFile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import grpc

    from sllm.worker.token_file import NamedToken

__all__ = ["Account", "Users", "Visit"]

log = logging.getLogger("sllm.worker")

_POLL_SECONDS = 0.5

_SETTLED_SECONDS = 2.0
"""A file that was changed less than this ago is read again: its times may not tell the next change."""

_GOODBYE_SECONDS = 5.0
"""A call whose token was revoked has so long to tell its client."""

_N_TEXTS = 256
"""Of one user, that are remembered."""

_REST = 0.25
"""Of a minute's tokens, so much has to be there again before a user who had all of them may go on."""


class Account:
    """What one user has used and may use; from any thread.

    Args:
        name: the user's.
        allowance: its limits.

    Attributes:
        name: as given.
        allowance: the limits now; a change of the file changes them.

    Examples:
        >>> account = Account("alice", Allowance(tokens_per_minute=600, max_prompt=100))
        >>> account.spend(700)
        >>> account.check_rate()
        Traceback (most recent call last):
            ...
        sllm.errors.BusyError: alice may have 600 tokens per minute and has had them; try again in 25 seconds

    """

    def __init__(self, name: str, allowance: Allowance | None = None) -> None:
        self.name = name
        self.allowance = allowance or Allowance()
        self._lock = threading.Lock()
        self._spent = 0.0  # tokens that time has not made good yet
        self._resting = False  # all were spent, and not enough has come back
        self._at = time.monotonic()
        self._texts: dict[int, tuple[int, int]] = {}  # the newest ones: id -> start and length

    def spend(self, n_tokens: int) -> None:
        """Count tokens that were computed for the user, also more than are left: the next ones wait."""
        rate = self.allowance.tokens_per_minute
        if rate is None:
            return
        with self._lock:
            self._recover(rate)
            self._spent += n_tokens
            self._resting |= self._spent >= rate

    def check_rate(self) -> None:
        """Raise where the user has had its tokens of this minute.

        Raises:
            BusyError: with the seconds until there are some again.

        """
        rate = self.allowance.tokens_per_minute
        seconds = 0.0 if rate is None else self._seconds_to_rest(rate)
        if seconds > 0:
            whole = math.ceil(seconds)
            error = BusyError(
                f"{self.name} may have {rate} tokens per minute and has had them;"
                f" try again in {whole} second{'s' if whole > 1 else ''}"
            )
            error.retry_after = seconds
            raise error

    def _seconds_to_rest(self, rate: int) -> float:
        with self._lock:
            self._recover(rate)
            if not self._resting:
                return 0.0
            missing = self._spent - (1 - _REST) * rate
            self._resting = missing > 0
            return max(0.0, missing * 60 / rate)

    def _recover(self, rate: int) -> None:
        now = time.monotonic()
        self._spent = max(0.0, self._spent - (now - self._at) * rate / 60)
        self._at = now

    def check_sessions(self, n_others: int) -> None:
        """Raise where the user has ``n_others`` texts already and may not have one more.

        Raises:
            BusyError: it may not.

        """
        most = self.allowance.sessions
        if most is not None and n_others >= most:
            raise BusyError(
                f"{self.name} may have {most} text{'s' if most > 1 else ''} at once and has"
                f" {'them' if most > 1 else 'it'}; try again when one has ended"
            )

    def check_prompt(self, n_tokens: int, *, grammar: bool) -> None:
        """Raise where the user may not have such a prompt, or no grammar.

        Raises:
            ContextFullError: the prompt is too long.
            ValueError: a grammar or a JSON Schema.

        """
        most = self.allowance.max_prompt
        if most is not None and n_tokens > most:
            raise ContextFullError(f"the prompt has {n_tokens} tokens, and {self.name} may send {most}")
        if grammar and not self.allowance.grammars:
            raise ValueError(f"{self.name} may not use grammars on this worker")

    def note_text(self, text_id: int, start: int, length: int) -> None:
        """Note that a text (0: none) was written up to ``length`` tokens, those from ``start`` on here."""
        if text_id:
            with self._lock:
                self._texts.pop(text_id, None)
                self._texts[text_id] = (start, length)
                if len(self._texts) > _N_TEXTS:
                    del self._texts[next(iter(self._texts))]

    def wrote(self, text_id: int, start: int, length: int) -> bool:
        """Whether a text that its client goes on with, ``length`` tokens, was written here from ``start`` on:
        it is no longer prompt for that.
        """
        with self._lock:
            known = self._texts.get(text_id)
        return known is not None and known[0] == start and length <= known[1]

    def __repr__(self) -> str:
        return f"<account of {self.name}>"


class Visit:
    """One call, by somebody with a token.

    Attributes:
        account: the caller's.
        error: what the call ends with once its token is revoked; None: it is valid.

    """

    def __init__(self, account: Account, digest: str, context: grpc.ServicerContext) -> None:
        self.account = account
        self.digest = digest
        self.error: AuthError | None = None
        self._context = context
        self._end: Callable[[AuthError], object] | None = None
        self._lock = threading.Lock()

    def when_revoked(self, end: Callable[[AuthError], object]) -> None:
        """Have ``end`` called, with what the client is to be told, when the token is revoked; at once if that
        has happened.
        """
        with self._lock:
            self._end = end
            error = self.error
        if error is not None:
            end(error)

    def revoke(self) -> None:
        """End the call; its client is told."""
        error = AuthError(f"the token of {self.account.name} was revoked or replaced")
        with self._lock:
            self.error = error
            end = self._end
        if end is not None:
            end(error)

    def hang_up(self) -> None:
        """End the call at once, whatever its client hears of it."""
        self._context.cancel()  # type: ignore[no-untyped-call]


class Users:
    """Everybody who may call a worker.

    Args:
        token: the worker's own, whose user is called ``default``; None: there is none.
        path: the file of named tokens, which need not exist yet; None: there are none.
        open_to_all: anybody may call, and is called ``default``.
        poll_seconds: how often the file is looked at.

    Raises:
        OSError, ValueError: the file cannot be read, is open to others, or is damaged. Later on that is
            logged, and what it last said goes on to count; so it does where the file vanishes.

    """

    def __init__(
        self,
        token: str | None = None,
        path: Path | None = None,
        *,
        open_to_all: bool = False,
        poll_seconds: float = _POLL_SECONDS,
    ) -> None:
        self._own = () if token is None else (tokens.token_digest(token),)
        self._file = None if path is None else TokenFile(path)
        self._open_to_all = open_to_all
        self._poll_seconds = poll_seconds
        self._lock = threading.Lock()  # over all that follows
        self._default = Account(DEFAULT_NAME)
        self._accounts: dict[str, Account] = {}  # of the file
        self._tokens: dict[str, NamedToken] = {}
        self._known: list[tuple[str, Account]] = []  # the hashes that are taken now
        self._visits: set[Visit] = set()
        self._leaving: list[tuple[float, Visit]] = []  # when their calls are cut
        self._next_expiry = math.inf  # of a token that was replaced and is still taken, in seconds since 1970
        self._signature: object = None
        self._complaint = ""  # the last one, which is not repeated
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if self._file is not None:
            self._signature = folders.signature(self._file.path)
            try:
                self._tokens = self._file.read()
            except FileNotFoundError:
                log.info("there are no named tokens: %s does not exist", self._file.path)
        self._apply(self._tokens)
        if self._file is not None:
            self._thread = threading.Thread(target=self._watch, name="sllm-tokens", daemon=True)
            self._thread.start()

    # ---- for calls

    def knows(self, header: str | bytes | None) -> bool:
        """Whether an ``authorization`` header carries a valid token."""
        return self._open_to_all or self._find(auth.header_digest(header)) is not None

    def name_of(self, metadata: Sequence[tuple[str, str | bytes]]) -> str | None:
        """The name of the user whose token a call carries; None: it is not valid."""
        if self._open_to_all:
            return DEFAULT_NAME
        found = self._find(auth.header_digest(dict(metadata).get("authorization")))
        return None if found is None else found.name

    def caller(self, context: grpc.ServicerContext) -> Account:
        """Whose call this is.

        Raises:
            AuthError: its token is not valid.

        """
        return self._entry(context)[0]

    def visit(self, context: grpc.ServicerContext) -> Visit:
        """As :meth:`caller`, for a call that lasts: it ends when its token is revoked.

        Raises:
            AuthError: its token is not valid.

        """
        with self._lock:  # from here on a revocation finds it
            visit = Visit(*self._entry(context), context)
            self._visits.add(visit)
        if not context.add_callback(lambda: self._left(visit)):
            self._left(visit)
        return visit

    def _left(self, visit: Visit) -> None:
        with self._lock:
            self._visits.discard(visit)
            self._leaving = [one for one in self._leaving if one[1] is not visit]

    def _entry(self, context: grpc.ServicerContext) -> tuple[Account, str]:
        if self._open_to_all:
            return self._default, ""
        headers = dict(context.invocation_metadata() or ())
        digest = auth.header_digest(headers.get("authorization"))
        found = self._find(digest)
        if found is None:
            raise AuthError("the token is missing or wrong")
        return found, digest

    def _find(self, digest: str) -> Account | None:
        """The account of a token by its hash. All hashes are looked at, whichever it is."""
        found = None
        for known, account in self._known:
            if hmac.compare_digest(known, digest):
                found = account
        return found

    # ---- the file

    def _apply(self, tokens: dict[str, NamedToken]) -> None:
        """Let these named tokens be the ones that are taken, and end the calls of others."""
        now = time.time()
        with self._lock:
            self._tokens = tokens
            self._accounts = {name: self._accounts.get(name) or Account(name) for name in tokens}
            known = [(digest, self._default) for digest in self._own]
            for name, token in tokens.items():
                self._accounts[name].allowance = token.allowance
                known += [(digest, self._accounts[name]) for digest in token.digests(now)]
            self._known = known
            ends = (t.previous_until for t in tokens.values() if t.previous is not None)
            self._next_expiry = min((end for end in ends if end > now), default=math.inf)
            valid = {digest for digest, _ in known}
            revoked = [] if self._open_to_all else [v for v in self._visits if v.digest not in valid]
            until = time.monotonic() + _GOODBYE_SECONDS
            self._visits.difference_update(revoked)
            self._leaving += [(until, visit) for visit in revoked]
        for visit in revoked:
            visit.revoke()

    def _watch(self) -> None:
        while not self._closed.wait(self._poll_seconds):
            try:
                self.look()
            except Exception as error:  # noqa: BLE001, PERF203 - the next look may find better
                self._complain(f"the named tokens cannot be read: {error}")

    def look(self) -> None:
        """Read the file if it has changed, and let tokens go whose time is over."""
        tokens = self._changed()
        if tokens is not None or time.time() >= self._next_expiry:
            self._apply(self._tokens if tokens is None else tokens)
        with self._lock:
            late = [visit for until, visit in self._leaving if time.monotonic() > until]
        for visit in late:
            visit.hang_up()

    def _changed(self) -> dict[str, NamedToken] | None:
        """What the file says, if that is news and can be read."""
        assert self._file is not None
        signature = folders.signature(self._file.path)
        if signature == self._signature:
            return None
        began = time.time()
        try:
            tokens = self._file.read()
        except FileNotFoundError:
            self._signature = signature
            if self._tokens:
                self._complain(f"{self._file.path} is gone; the tokens that it held go on to count")
            return None
        except (OSError, ValueError) as error:
            self._signature = None
            self._complain(f"{error}; the tokens and limits that it last held go on to count")
            return None
        self._complaint = ""
        settled = isinstance(signature, tuple) and began - signature[4] * 1e-9 > _SETTLED_SECONDS
        self._signature = signature if settled else None
        if tokens == self._tokens:
            return None
        log.info("%s has changed: it holds %d tokens", self._file.path, len(tokens))
        return tokens

    def _complain(self, text: str) -> None:
        if text != self._complaint:
            log.warning("%s", text)
        self._complaint = text

    def close(self) -> None:
        """Look at the file no more. More calls do nothing."""
        self._closed.set()
        if self._thread is not None:
            join(self._thread)

    def __repr__(self) -> str:
        return f"<{len(self._known)} tokens>"
