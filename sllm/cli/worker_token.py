"""``sllm worker token``: the named tokens of a worker's users, in a file that running workers watch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from sllm import folders, hosts
from sllm.cli.arguments import number, whole
from sllm.cli.console import CommandError, table
from sllm.wire import auth
from sllm.worker.token_file import DEFAULT_NAME, FILE_NAME, Allowance, TokenFile

if TYPE_CHECKING:
    import argparse

    from sllm.cli.console import Output
    from sllm.worker.token_file import NamedToken

__all__ = ["EPILOG", "add_arguments", "run", "tokens_path"]

EPILOG = (
    "Running workers take a change up within seconds, without a restart; texts under a token that was revoked"
    " end. A token is shown once, when it is made: the file holds its SHA-256 alone."
)


def tokens_path(tokens: str | None, state: str | None) -> Path:
    """The file of named tokens that ``--tokens`` and ``--state`` name."""
    if tokens is not None:
        return Path(tokens)
    return (folders.state_folder() if state is None else Path(state)) / FILE_NAME


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sllm worker token``."""
    commands = parser.add_subparsers(required=True, metavar="ACTION", dest="action")

    def action(name: str, help_text: str, *, named: bool = True) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        if named:
            found.add_argument("name", metavar="NAME", help="of the user: letters, digits, '.', '_', '-'")
        found.add_argument("--tokens", metavar="FILE", help=f"the file (default: {FILE_NAME} in --state)")
        found.add_argument(
            "--state",
            metavar="DIR",
            help="the worker's --state (default: $SLLM_STATE, or sllm in your state folder)",
        )
        return found

    add = action("add", "Make a token for a new user, and print it.")
    _add_limits(add, "no limit of its own")
    _add_line(add)
    _add_limits(action("limit", "Give a user these limits, and no others."), "none")
    rotate = action("rotate", "Replace the token of a user, and print the new one.")
    rotate.add_argument(
        "--keep",
        metavar="SECONDS",
        type=number(above_zero=False),
        default=0.0,
        help="the old token works for so long, too (default: 0, and its texts end)",
    )
    _add_line(rotate)
    action("revoke", "Remove a user's token; its texts end.")
    action("list", "List the users and their limits.", named=False)


def _add_limits(parser: argparse.ArgumentParser, default: str) -> None:
    limits = parser.add_argument_group("limits", f"Each one's default: {default}.")
    add = limits.add_argument
    add("--sessions", metavar="N", type=whole(1), help="texts at once, waiting ones included")
    add(
        "--tokens-per-minute",
        metavar="N",
        type=whole(1),
        help="of prompts, as far as they are not in memory still, and answers; of layers, rows",
    )
    add("--max-prompt", metavar="N", type=whole(1), help="tokens of a prompt")
    add("--no-grammars", action="store_true", help="no grammars")
    add(
        "--no-rpc", action="store_true", help="not the RPC server of `sllm worker --rpc`, which has no limits"
    )


def _add_line(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--public",
        metavar="HOST:PORT",
        help="where clients find the worker: prints the whole sllm:// line instead of the token alone",
    )
    parser.add_argument(
        "--cert", metavar="FILE", help="the worker's --cert, for that line (default: of --state)"
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Change or show the file of tokens."""
    file = TokenFile(tokens_path(args.tokens, args.state))
    if args.action in ("limit", "rotate", "revoke") and args.name == DEFAULT_NAME:
        raise CommandError(
            f"{DEFAULT_NAME} has the worker's own token, which is in the file `token` of --state or in"
            " --token-file; for another one delete that file and start the worker again"
        )
    if args.action == "list":
        _list(file, out)
    elif args.action == "revoke":
        file.revoke(args.name)
        out.note(f"sllm: revoked the token of {args.name}; a worker ends its texts within seconds")
    elif args.action == "limit":
        file.limit(args.name, _allowance(args))
        out.note(f"sllm: {args.name}: {_limits(_allowance(args))}")
    else:
        fingerprint = None if args.public is None else _fingerprint(args)  # before anything is changed
        if args.action == "add":
            token = file.add(args.name, _allowance(args))
        else:
            token = file.rotate(args.name, keep_seconds=args.keep)
        out.line(token if fingerprint is None else _line(args.public, token, fingerprint))
        out.note(f"sllm: this is for {args.name} alone, and a secret; it is not shown again ({file.path})")
    return 0


def _allowance(args: argparse.Namespace) -> Allowance:
    return Allowance(
        args.sessions,
        args.tokens_per_minute,
        args.max_prompt,
        grammars=not args.no_grammars,
        rpc=not args.no_rpc,
    )


def _fingerprint(args: argparse.Namespace) -> str:
    """That of the worker's certificate."""
    host, port = hosts.split_host_port(args.public, 0)
    if host in ("0.0.0.0", "::") or not port:
        raise CommandError(f"--public is {args.public!r}, expected HOST:PORT")
    if args.cert is not None:
        return auth.fingerprint(Path(args.cert).read_bytes())
    state = folders.state_folder() if args.state is None else Path(args.state)
    return auth.fingerprint(auth.load_or_make_certificate(state)[0])


def _line(public: str, token: str, fingerprint: str) -> str:
    host, port = hosts.split_host_port(public, 0)
    return auth.Address(host, port, token, fingerprint).uri


def _list(file: TokenFile, out: Output) -> None:
    try:
        tokens = file.read()
    except FileNotFoundError:
        tokens = {}
    if not tokens:
        out.note(f"sllm: there are no tokens in {file.path}")
        return
    rows = [("NAME", "MADE", "LIMITS")]
    rows += [(token.name, token.created or "?", _limits(token.allowance, token)) for token in tokens.values()]
    for line in table(rows):
        out.line(line)


def _limits(allowance: Allowance, token: NamedToken | None = None) -> str:
    found = [
        f"{value} {what}"
        for value, what in (
            (allowance.sessions, "at once"),
            (allowance.tokens_per_minute, "tokens per minute"),
            (allowance.max_prompt, "tokens of prompt"),
        )
        if value is not None
    ]
    found += [] if allowance.grammars else ["no grammars"]
    found += [] if allowance.rpc else ["no RPC"]
    if token is not None and token.previous is not None and token.previous_until > time.time():
        found.append(f"the old token for {token.previous_until - time.time():.0f} s more")
    return ", ".join(found) or "none of its own"
