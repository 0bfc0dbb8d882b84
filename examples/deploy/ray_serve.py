"""Workers as a Ray Serve deployment: replicas on the machines of a Ray cluster, more where texts wait.

    pip install 'sllm[remote]' -r ray-requirements.txt             # on every machine of the cluster
    serve run ray_serve:app model=/models/big-q8_0.gguf token=/secrets/token cert=/secrets/tls.crt \\
        key=/secrets/tls.key threads=8 max_replicas=4

Ray places the replicas, replaces those that die, and counts them by what waits. Texts do not pass through
Ray: at its gRPC ingress TLS and token would end, and each message would pass two more processes. Each replica
listens on a port of its own, with our protocol, TLS and tokens, and the ingress hands out where they are:
``GET /`` answers ``{"addresses": ["10.0.0.2:41231", ...]}``. A client adds what it knows already, the token
and the certificate's fingerprint, which do not pass through Ray either; so whoever forges that answer learns
nothing. README.md, beside this file, has the client's lines.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

import sllm
from sllm.engine import exact
from sllm.worker.server import Limits

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

CLOSING_SECONDS = 10  # that a worker may take to hand back the texts that have not ended


@dataclass(frozen=True)
class Settings:
    """What ``serve run`` takes as NAME=VALUE.

    Attributes:
        model: path of the model, on every machine, or ``hf://owner/repo/file.gguf``.
        token, cert, key: files on every machine: the token that clients must know, the certificate that all
            replicas show, and its key (both PEM). Empty: made once on each machine, which is for one machine.
        host: where replicas listen; empty: at the address by which Ray knows their machine.
        threads: CPUs of a replica.
        sessions: texts of a replica at once.
        n_ctx: positions of a text; 0: the model's, 4096 at most.
        min_replicas, max_replicas: how many there may be.
        drain: seconds for texts to end where a replica is taken away.
        exact: whether a text is to the last bit what it is without neighbours, on CPUs (``--exact``).

    """

    model: str = sllm.embedded.TARGET
    token: str = ""
    cert: str = ""
    key: str = ""
    host: str = ""
    threads: int = 1
    sessions: int = 4
    n_ctx: int = 0
    min_replicas: int = 1
    max_replicas: int = 4
    drain: int = 60
    exact: bool = False

    @classmethod
    def parse(cls, given: dict[str, str]) -> Settings:
        """The settings that were typed.

        Raises:
            ValueError: one that there is not, or of another type.

        """
        kinds = {field.name: type(field.default) for field in fields(cls)}
        unknown = sorted(set(given) - set(kinds))
        if unknown:
            raise ValueError(f"there is no setting {unknown[0]!r}; there are {', '.join(kinds)}")
        found: dict[str, Any] = {}
        for name, value in given.items():
            if kinds[name] is not bool:
                found[name] = kinds[name](value)
            elif str(value) in ("True", "true", "False", "false"):
                found[name] = str(value).casefold() == "true"
            else:
                raise ValueError(f"{name} is {value!r}, expected true or false")
        return cls(**found)


@serve.deployment(max_ongoing_requests=16)
class Texts:
    """A worker in a replica; Ray's own requests to it ask where it is and how much waits."""

    def __init__(self, settings: Settings) -> None:
        self._drain = settings.drain
        self._sessions = settings.sessions
        certificate = (settings.cert, settings.key) if settings.cert else None
        self._worker = sllm.Worker(
            settings.model,
            host=settings.host or ray.util.get_node_ip_address(),
            token=Path(settings.token).read_text(encoding="utf-8").strip() if settings.token else None,
            certificate=certificate,
            limits=Limits(sessions=settings.sessions),
            n_ctx=settings.n_ctx or None,
            n_threads=settings.threads,
            n_threads_batch=settings.threads,
            **(exact.SETTINGS if settings.exact else {}),
        )
        self._status = sllm.connect(self._worker.uri)

    def where(self) -> dict[str, Any]:
        """The worker's address, and the process that it is in."""
        return {"address": self._worker.address.endpoint, "pid": os.getpid()}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve scales by, asked for again and again: texts that run or wait, by places for them."""
        status = await asyncio.to_thread(self._status.status)
        return {"texts_per_place": (status.sessions + status.queued) / self._sessions}

    def check_health(self) -> None:
        """Called by Serve; what it raises has the replica replaced."""
        if self._worker.failed or self._worker.hung:
            raise RuntimeError("the worker's passes fail or hang")

    def __del__(self) -> None:
        """Called by Serve when it takes the replica away: texts have some time to end, or go on elsewhere."""
        if hasattr(self, "_status"):
            self._status.close()
            self._worker.drain(self._drain)
            self._worker.close()


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0.1})
class Addresses:
    """The ingress: tells where the workers are."""

    def __init__(self, texts: Any) -> None:
        self._texts = texts

    async def __call__(self, _request: Any) -> dict[str, list[str]]:
        """``GET /``: the addresses of all replicas that answer, in any order: clients begin at the first."""
        found = await self._texts.broadcast("where").results_async(timeout_s=10, return_exceptions=True)
        addresses = [one["address"] for one in found if isinstance(one, dict)]
        random.shuffle(addresses)
        return {"addresses": addresses}


def enough_places(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Serve's autoscaling policy: so many replicas that each text has a place. Serve itself keeps to the
    bounds and the delays.
    """
    known = context.aggregated_metrics.get("texts_per_place", {})
    if not known:
        return context.target_num_replicas, {}
    return math.ceil(sum(known.values())), {}


def app(given: dict[str, str]) -> serve.Application:
    """What ``serve run ray_serve:app NAME=VALUE ...`` runs.

    Raises:
        ValueError: a setting that there is not, or of another type.

    """
    settings = Settings.parse(given)
    texts = Texts.options(
        ray_actor_options={"num_cpus": settings.threads},
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "upscale_delay_s": 10,
            "downscale_delay_s": 600,
            "policy": {"policy_function": enough_places},
        },
        # Texts are not Serve's requests: it would not wait for them. __del__() does.
        graceful_shutdown_wait_loop_s=1,
        graceful_shutdown_timeout_s=settings.drain + CLOSING_SECONDS,
    )
    return Addresses.bind(texts.bind(settings))
