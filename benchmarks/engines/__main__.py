"""``python -m benchmarks.engines {vllm,llama-server,plugin} ...``: see README.md beside this file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import sllm
from benchmarks import smollm2
from benchmarks.engines import plugin, servers, texts

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("what", choices=("vllm", "llama-server", "plugin"))
    parser.add_argument("--python", type=Path, help="the Python of the environment that vLLM is installed in")
    parser.add_argument("--binary", type=Path, help="llama-server")
    parser.add_argument("--model", choices=("embedded", "smollm2"), default="embedded")
    parser.add_argument("--folder", type=Path, required=True, help="for converted models and logs")
    parser.add_argument("--texts", type=int, default=20, help="for each way and temperature (default: 20)")
    parser.add_argument("--tokens", type=int, default=48, help="of a text, at most (default: 48)")
    parser.add_argument("--round-trips", metavar="MS", type=float, nargs="*", default=[0.0, 50.0])
    parser.add_argument("--timed", type=int, default=6, help="texts that are timed (default: 6)")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()

    gguf, draft = sllm.embedded.TARGET, sllm.embedded.DRAFT
    if args.model == "smollm2":
        found = smollm2.find()
        if found is None:
            parser.error(smollm2.MISSING)
        gguf = draft = found  # for a draft there is the same model, quantised
    if args.what == "llama-server" and args.binary is None:
        parser.error("--binary says where llama-server is")
    if args.what != "llama-server" and args.python is None:
        parser.error("--python says which Python has vLLM")
    args.folder.mkdir(parents=True, exist_ok=True)

    figures: dict[str, object] = {"model": args.model, "texts": args.texts, "tokens": args.tokens}
    if args.what == "plugin":
        figures |= plugin.measure(args.python, gguf, draft, args.folder, args.texts, args.tokens)
    else:
        server: AbstractContextManager[servers.Server] = (
            servers.vllm(args.python, gguf, args.folder)
            if args.what == "vllm"
            else servers.llama_server(args.binary, gguf, args.folder)
        )
        with server as engine, sllm.Model(draft) as small, sllm.Model(gguf, vocab_only=True) as vocab:
            print(f"{engine.name} {engine.version}", flush=True)
            figures |= texts.measure(
                engine,
                vocab,
                small,
                args.texts,
                args.tokens,
                [ms / 1e3 for ms in args.round_trips],
                args.timed,
            )
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0 if figures["wrong"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
