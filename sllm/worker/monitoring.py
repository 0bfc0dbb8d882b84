"""How a worker is watched: health tied to its passes, figures, an access log."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sllm.worker.access_log import AccessLog
from sllm.worker.calls import Calls
from sllm.worker.watch import Watch

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from sllm.worker.calls import Metadata
    from sllm.worker.metrics import MetricsServer
    from sllm.worker.passes import PassLoop
    from sllm.worker.service import Health

__all__ = ["Monitor", "Monitoring"]


@dataclass(frozen=True)
class Monitoring:
    """How a worker is watched by those who run it.

    Attributes:
        pass_limit: seconds that one step of computing may take (a chunk of the prompts and a pass). A longer
            one counts as hung, and the health is NOT_SERVING until it ends. None: found from the model's size
            and from what steps take (:class:`sllm.worker.progress.Progress`), a minute at least.
        pass_grace: seconds after which a step that hangs ends the whole process, with exit status 70; None:
            it never does, which is what a program wants that has other things to do.
        metrics: (host, port) on which Prometheus may ask for figures, without TLS or a token; needs the extra
            ``metrics``. Port 0: any that is free. None: nowhere.
        access_log: the file that gets a line of JSON for each call
            (:class:`sllm.worker.access_log.AccessLog`); ``"-"``: stderr; None: none. Neither texts nor token
            ids are in it.

    Examples:
        >>> from sllm.worker.monitoring import Monitoring
        >>> Monitoring(metrics=("127.0.0.1", 0)).pass_grace is None
        True

    """

    pass_limit: float | None = None
    pass_grace: float | None = None
    metrics: tuple[str, int] | None = None
    access_log: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name, least in (("pass_limit", "more than 0"), ("pass_grace", "0 or more")):
            value = getattr(self, name)
            low = 0 if least[0] == "0" else math.ulp(0.0)
            if value is not None and not (low <= value < math.inf):  # also true of NaN
                raise ValueError(f"monitoring.{name} is {value!r}, expected {least}, or None")
        if self.metrics is not None and not 0 <= self.metrics[1] <= 65535:
            raise ValueError(f"monitoring.metrics has port {self.metrics[1]}, expected 0 to 65535")


class Monitor:
    """What watches a worker that runs.

    Args:
        monitoring: what is wanted.
        loop: what computes.
        health: gets to know of a step that hangs.
        size_bytes: of the weights.
        user_of: as for :class:`~sllm.worker.calls.Calls`.
        build: the software and the model, for the figures; ``model`` is also in the access log.
        chores: done about once a second.

    Raises:
        ImportError: ``metrics`` is wanted, and prometheus_client is not installed.
        OSError: the address for the figures is in use, or the log's file cannot be opened.

    Attributes:
        calls: the interceptor that counts calls.
        watch: times the steps.
        metrics: the server of the figures; None: none.

    """

    def __init__(
        self,
        monitoring: Monitoring,
        loop: PassLoop[Any],
        health: Health,
        *,
        size_bytes: int,
        user_of: Callable[[Metadata], str | None],
        build: dict[str, str],
        chores: Callable[[], object] = lambda: None,
    ) -> None:
        progress = loop.progress
        progress.limit = monitoring.pass_limit
        progress.most_rows, progress.size_bytes = loop.most_rows, size_bytes
        with ExitStack() as stack:
            log = None
            if monitoring.access_log is not None:
                log = AccessLog(monitoring.access_log)
                stack.callback(log.close)
            self.calls = Calls(build["model"], log, user_of)
            self.watch = Watch(
                progress,
                lambda hung: health.set_hung(hung=hung),
                grace=monitoring.pass_grace,
                chores=chores,
            )
            stack.callback(self.watch.close)
            self.metrics: MetricsServer | None = None
            if monitoring.metrics is not None:
                from sllm.worker.metrics import Figures, MetricsServer  # needs an extra

                figures = Figures(loop, self.calls, health, self.watch, log, build)
                self.metrics = MetricsServer(*monitoring.metrics, figures)
                stack.callback(self.metrics.close)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """End it all. More calls do nothing."""
        self._stack.close()
