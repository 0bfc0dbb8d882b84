"""``sllm inspect``: what is in a model file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import sllm
from sllm.cli.arguments import MODEL, add_json
from sllm.cli.console import one_line, parameters, size, table
from sllm.engine import exact

if TYPE_CHECKING:
    import argparse

    from sllm.cli.console import Output

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sllm inspect``."""
    parser.add_argument("model", metavar="GGUF", help=MODEL)
    add_json(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """Show what is in a model file."""
    with sllm.Model(args.model, n_gpu_layers=0) as model:
        found = _figures(model)
    if args.json:
        out.line(json.dumps(found, indent=2))
        return 0
    for line in table([(name, one_line(value)) for name, value in _rows(found)]):
        out.line(line)
    return 0


def _figures(model: sllm.Model) -> dict[str, Any]:
    obstacles = exact.obstacles(model.path)
    return {
        "file": str(model.path),
        "file_bytes": model.path.stat().st_size,
        "architecture": model.architecture,
        "description": model.description,
        "name": model.metadata.get("general.name"),
        "n_params": model.n_params,
        "size_bytes": model.size_bytes,
        "n_layer": model.n_layer,
        "n_embd": model.n_embd,
        "n_head": model.n_head,
        "n_head_kv": model.n_head_kv,
        "n_ctx_train": model.n_ctx_train,
        "n_vocab": model.vocab.n_tokens,
        "vocab_fingerprint": _fingerprint(model),
        "chat_template": bool(model.chat_templates),
        "can_rollback": model.can_rollback,
        "state_bytes": model.state_bytes,
        "n_mtp": model.n_mtp,
        "exact": not obstacles,
        "exact_obstacles": list(obstacles),
    }


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures for people."""
    state = size(found["state_bytes"])
    speculation = {
        "free": "yes",
        "snapshots": f"yes, {state} for each token that can be taken back (sllm worker --n-rollback)",
        "recompute": f"yes, {state} for each checkpoint; rejected tokens cost some computed again",
    }[found["can_rollback"]]
    obstacles = "; ".join(found["exact_obstacles"])
    return [
        ("file", f"{found['file']} ({size(found['file_bytes'])})"),
        ("architecture", found["architecture"]),
        ("description", found["description"]),
        ("name", found["name"] or "-"),
        ("parameters", f"{parameters(found['n_params'])} in {size(found['size_bytes'])}"),
        ("layers", str(found["n_layer"])),
        ("width", str(found["n_embd"])),
        ("heads", f"{found['n_head']}, {found['n_head_kv']} of keys and values"),
        ("context", f"{found['n_ctx_train']} tokens"),
        ("vocabulary", f"{found['n_vocab']} tokens"),
        ("fingerprint", found["vocab_fingerprint"] or "-"),
        ("chat template", "yes" if found["chat_template"] else "no"),
        ("speculation", speculation),
        (
            "MTP heads",
            f"{found['n_mtp']} (sllm run --draft mtp)" if found["n_mtp"] == 1 else str(found["n_mtp"]),
        ),
        ("exact", f"no: {obstacles}" if obstacles else "yes, with flash attention and a q8_0 cache"),
    ]


def _fingerprint(model: sllm.Model) -> str | None:
    try:
        return model.vocab.fingerprint
    except (sllm.UnsupportedModelError, ValueError):
        return None  # a file of layers alone has no vocabulary
