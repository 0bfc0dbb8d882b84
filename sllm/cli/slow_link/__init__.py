"""An emulated network link: a TCP proxy with a delay, a bandwidth and faults on demand.

It stands between a client and a worker on one machine, in the demo, in tests and in benchmarks::

    with Link(("127.0.0.1", 50051), delay=0.025, mbit_s=50) as link:
        ...  # connect to link.host, link.port instead

One thread serves all connections of a link. From the command line::

    python -m sllm.cli.slow_link 50052 127.0.0.1:50051 --delay-ms 25 --mbit 50

From the bottom: ``settings``, the ``clock`` that can stand still, the ``wire`` of each direction, the
``connection`` of a client, the ``proxy`` with its thread, and the ``link`` that users hold.
"""

from __future__ import annotations

from sllm.cli.slow_link.link import Link
from sllm.cli.slow_link.settings import LinkStats

__all__ = ["Link", "LinkStats"]
