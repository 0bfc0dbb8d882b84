"""What is kept because it is likely to be asked for again, within a bound of bytes."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["Kept"]

_ALWAYS = 2
"""So many of the newest stay, however large they are."""

K = TypeVar("K", bound="Hashable")
V = TypeVar("V")


class Kept(Generic[K, V]):
    """Values by keys: those that somebody uses, and of the others the newest ones. Any number of threads may
    use it.

    Args:
        n_most: values that are kept for nobody.
        n_bytes: of their sizes together; the two newest may have more.

    Examples:
        >>> from sllm.engine.kept import Kept
        >>> kept = Kept(8, 1000)
        >>> used, unused = {1}, {2}
        >>> kept.put("used", used, 900)
        >>> kept.put("unused", unused, 900)
        >>> del unused
        >>> kept.put("x", {3}, 900)
        >>> kept.put("y", {4}, 1)
        >>> kept.get("used"), kept.get("unused"), kept.get("x"), len(kept)
        ({1}, None, {3}, 2)

    """

    def __init__(self, n_most: int, n_bytes: int) -> None:
        self._n_most = n_most
        self._n_bytes = n_bytes
        self._lock = threading.Lock()
        self._held: OrderedDict[K, tuple[V, int]] = OrderedDict()  # the newest last
        self._alive: weakref.WeakValueDictionary[K, V] = weakref.WeakValueDictionary()

    def get(self, key: K) -> V | None:
        """The value of a key, which is the newest one from now on; None where there is none any more."""
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
                return found[0]
            return self._alive.get(key)

    def put(self, key: K, value: V, n_bytes: int) -> None:
        """Keep a value of this size."""
        with self._lock:
            self._alive[key] = value
            self._held[key] = value, n_bytes
            self._held.move_to_end(key)
            total = sum(size for _, size in self._held.values())
            gone = []  # freed without the lock: what that runs may come back here
            while len(self._held) > self._n_most or (len(self._held) > _ALWAYS and total > self._n_bytes):
                _, (old, size) = self._held.popitem(last=False)
                gone.append(old)
                total -= size

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            gone = list(self._held.values())
            self._held.clear()
            self._alive.clear()
        del gone

    def __len__(self) -> int:
        return len(self._held)
