"""The vLLM plugin (``examples/vllm-plugin``): is the server's own stream sllm's text, and what do clients'
drafts bring?
"""

from __future__ import annotations

import json
import secrets
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import sllm
from benchmarks.engines import plain, servers
from benchmarks.engines.texts import Case, cases, timed, ways, written

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.engines.servers import Server

SELECTION = ("--logits-processors", "sllm_vllm.runner_v1:SeededSelection")
N_DRAFTED = 8
SPECULATION = {
    "method": "custom_class",
    "model": "sllm_vllm.proposer.NoDrafts",
    "num_speculative_tokens": N_DRAFTED,
}
DRAFTS = (
    *("--scheduler-cls", "sllm_vllm.scheduler.ClientDrafts"),
    *("--speculative-config", json.dumps(SPECULATION)),
)


def measure(
    python: Path, gguf: Path, draft: Path, folder: Path, n_texts: int, n_tokens: int
) -> dict[str, Any]:
    """All figures, printed as they come."""
    figures: dict[str, Any]
    with sllm.Model(gguf, vocab_only=True) as vocab, sllm.Model(draft) as small:
        with servers.vllm(python, gguf, folder, SELECTION) as server:
            figures = {"engine": "vllm", "version": server.version, "times": []}
            figures |= streams(server, vocab, small, n_texts, n_tokens)
            for round_trip in (0.0, 0.05):
                with servers.link(server.port, round_trip) as port:
                    figures["times"] += timed(server, vocab, small, port, round_trip, 4, n_tokens, (0.8,))
        with servers.vllm(python, gguf, folder, DRAFTS) as server:
            figures |= drafts(server, vocab, small, n_tokens)
    figures["wrong"] = figures["streams_wrong"] + figures["drafted_wrong"]
    return figures


def fields(case: Case, vocab: sllm.Model) -> dict[str, Any]:
    """What asks the plugin for a text, by its own function for clients."""
    sys.path.insert(0, str(servers.PLUGIN))
    try:
        from sllm_vllm.arguments import request_fields  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(servers.PLUGIN))
    asked: dict[str, Any] = request_fields(case.sampling, plain.ends(vocab))
    return asked


def streams(
    server: Server, vocab: sllm.Model, small: sllm.Model, n_texts: int, n_tokens: int
) -> dict[str, Any]:
    """The server's streams, eight at once, and ``EngineTarget``'s texts, against one token for each plain
    request.
    """
    chosen = [case for t in (0.7, 1.2) for case in cases(vocab, (n_texts + 1) // 2, t)]
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(
                lambda case: plain.stream(server, vocab, case.prompt, n_tokens, fields=fields(case, vocab))[
                    0
                ],
                chosen,
            )
        )
    expected = [plain.one_by_one(server, vocab, case.prompt, case.sampling, n_tokens) for case in chosen]
    n_ended = sum(len(text) < n_tokens for text in expected)
    n_equal = sum(a == b for a, b in zip(found, expected, strict=True))
    print(f"streams equal: {n_equal} of {len(chosen)}; {n_ended} of the texts end by themselves", flush=True)
    for case, want, text in zip(chosen, expected, found, strict=True):
        if want != text:
            print(f"  {case.sampling.seed} at {case.sampling.temperature}: expected {want}, found {text}")
    n_wrong, rows = len(chosen) - n_equal, []
    with sllm.EngineTarget(f"http://127.0.0.1:{server.port}/v1", vocab) as target:
        for name, draft in ways(small).items():
            texts = [written(target, case, draft, n_tokens) for case in chosen]
            n_made = sum(len(text) for text, _ in texts)
            row = {
                "draft": name,
                "texts": len(texts),
                "equal": sum(text == want for (text, _), want in zip(texts, expected, strict=True)),
                "requests_per_token": round(sum(stats.n_requests for _, stats in texts) / n_made, 3),
                "jumped": sum(getattr(stats, "n_jumped", 0) for _, stats in texts),
                "disagreed": sum(getattr(stats, "n_disagreed", 0) for _, stats in texts),
            }
            n_wrong += len(texts) - row["equal"]
            rows.append(row)
            print(row, flush=True)
    return {
        "streams": len(chosen),
        "streams_equal": n_equal,
        "ended": n_ended,
        "engine_target": rows,
        "streams_wrong": n_wrong,
    }


def drafts(server: Server, vocab: sllm.Model, small: sllm.Model, n_tokens: int) -> dict[str, Any]:
    """Eight clients at once: without drafts, with a predicted text of which each tenth token is another, and
    with a small model's drafts, the first with the request and others while the text comes.
    """
    chosen = cases(vocab, 8, 0.0)
    rows: list[dict[str, Any]] = []
    expected: list[list[int]] = []
    for way in ("none", "predicted", "model"):
        before = server.metrics()
        with ThreadPoolExecutor(len(chosen)) as pool:
            jobs = [
                pool.submit(
                    client, server, vocab, small, case, way, expected[i] if expected else [], n_tokens
                )
                for i, case in enumerate(chosen)
            ]
            found = [job.result() for job in jobs]
        after = server.metrics()
        expected = expected or found

        def grown(name: str, before: dict[str, float] = before, after: dict[str, float] = after) -> float:
            return after.get(name, 0.0) - before.get(name, 0.0)

        n_made = sum(map(len, found))
        # Each text has its prompt's pass, and then one for every run of accepted tokens and one more.
        n_accepted = grown("vllm:spec_decode_num_accepted_tokens_total")
        row = {
            "draft": way,
            "equal": sum(a == b for a, b in zip(found, expected, strict=True)),
            "tokens": n_made,
            "tokens_per_pass_of_a_text": round(n_made / (n_made - n_accepted), 2),
            "engine_passes": int(grown("vllm:iteration_tokens_total_count")),
            "acceptance": round(n_accepted / max(grown("vllm:spec_decode_num_draft_tokens_total"), 1), 2),
        }
        rows.append(row)
        print(row, flush=True)
    n_wrong = sum(len(chosen) - row["equal"] for row in rows)
    return {"drafted": rows, "drafted_wrong": n_wrong}


def client(
    server: Server, vocab: sllm.Model, small: sllm.Model, case: Case, way: str, text: list[int], n_tokens: int
) -> list[int]:
    """One client's text."""
    if way == "none":
        return plain.stream(server, vocab, case.prompt, n_tokens)[0]
    if way == "predicted":
        changed = [
            (token + 1) % vocab.vocab.n_tokens if i % 10 == 9 else token for i, token in enumerate(text)
        ]
        xargs: dict[str, Any] = {"sllm_draft": changed}
        return plain.stream(server, vocab, case.prompt, n_tokens, fields={"vllm_xargs": xargs})[0]

    def drafted(tokens: list[int]) -> list[int]:
        stream = sllm.generate(small, tokens, sampling=case.sampling, max_tokens=4 * N_DRAFTED)
        return [token for run in stream for token in run.tokens]

    name = secrets.token_hex(8)
    draft, start = drafted(case.prompt), len(case.prompt)
    made: list[int] = []
    body = {
        **plain.neutral(),
        "prompt": case.prompt,
        "max_tokens": n_tokens,
        "stop_token_ids": plain.ends(vocab),
        "stream": True,
        "vllm_xargs": {"sllm_stream": name, "sllm_draft": draft},
    }
    for event in plain.events(server.port, "/v1/completions", body):
        for choice in event["choices"]:
            made += choice["token_ids"] or []
        so_far = case.prompt + made
        known = so_far[start:]
        used_up = len(draft) - len(known) < N_DRAFTED // 2
        if (known != draft[: len(known)] or used_up) and len(made) < n_tokens - 2:
            draft, start = drafted(so_far), len(so_far)
            later = {"sllm_about": name, "sllm_pos": start, "sllm_draft": draft}
            hint = {**plain.neutral(), "prompt": so_far[-1:], "max_tokens": 1, "vllm_xargs": later}
            server.request("/v1/completions", hint)
    return made
