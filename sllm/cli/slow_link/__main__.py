"""The emulated link from the command line: ``python -m sllm.cli.slow_link``."""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from sllm.cli.arguments import DEFAULT, Parser, endpoint
from sllm.cli.slow_link.link import Link
from sllm.hosts import host_port

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def _milliseconds(text: str) -> float:
    try:
        return float(text) / 1e3
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _arguments() -> Parser:
    parser = Parser(
        prog="python -m sllm.cli.slow_link",
        description="Stand between a client and a server as a slow or broken network would. Says where it"
        " listens; SIGINT or SIGTERM ends it, and it says what it has carried.",
        allow_abbrev=False,
    )
    parser.add_argument("port", metavar="LISTEN_PORT", type=int, help="where to listen; 0: any free port")
    parser.add_argument(
        "target", metavar="TARGET_HOST:PORT", type=endpoint, help="what is at the far end of the link"
    )
    parser.add_argument("--host", default="127.0.0.1", help=f"the address to listen on {DEFAULT}")
    parser.add_argument(
        "--delay-ms", metavar="MS", type=_milliseconds, default=0.0, help="one way (default: 0)"
    )
    parser.add_argument(
        "--mbit", metavar="N", type=float, help="Mbit/s in each direction (default: no limit)"
    )
    parser.add_argument(
        "--jitter-ms", metavar="MS", type=_milliseconds, default=0.0, help="at most (default: 0)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help=f"of the jitter {DEFAULT}")
    parser.add_argument("--cut-after-ms", metavar="MS", type=_milliseconds, help="cut each connection then")
    parser.add_argument("--cut-after-bytes", metavar="N", type=int, help="cut each connection after them")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (None: the process's own) and return the exit status."""
    parser = _arguments()
    args = parser.parse_args(argv)
    # Before there is a thread: it takes over what is blocked, and so the signals stay for sigwait().
    ends = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    try:
        with Link(
            args.target,
            delay=args.delay_ms,
            mbit_s=args.mbit,
            jitter=args.jitter_ms,
            seed=args.seed,
            cut_after=args.cut_after_ms,
            cut_after_bytes=args.cut_after_bytes,
            host=args.host,
            port=args.port,
        ) as link:
            _say(f"listening on {host_port(link.host, link.port)} for {host_port(*args.target)}")
            signal.sigwait(ends)
        _say(" ".join(f"{name}={value}" for name, value in asdict(link.stats).items()))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
