"""The processor of the V2 runner by its interface, on the CPU: the runner itself needs a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: it comes with vLLM")
interface = pytest.importorskip(
    "vllm.v1.worker.gpu.sample.logits_processor", reason="vLLM is not installed, or has no V2 runner"
)

import numpy as np  # noqa: E402
from sllm_vllm.arguments import Selection  # noqa: E402
from sllm_vllm.runner_v2 import SeededSelection  # noqa: E402
from sllm_vllm.selection import Settings, select  # noqa: E402

N_VOCAB = 300


def processor(n_slots: int = 8) -> SeededSelection:
    states = SimpleNamespace(device=torch.device("cpu"), max_num_reqs=n_slots)
    return SeededSelection(None, states)  # type: ignore[arg-type]


def params(selection: Selection | None) -> Any:
    extra_args = None if selection is None else selection.xargs()
    return SimpleNamespace(
        extra_args=extra_args, repetition_penalty=1, presence_penalty=0, frequency_penalty=0
    )


def context(rows: list[tuple[int, int]]) -> Any:
    """Of (slot, position of the input token) for each row; a slot's rows stand together."""
    slots = [slot for slot, _ in rows]
    batch = list(dict.fromkeys(slots))
    return interface.LogitsContext(
        expanded_idx_mapping=torch.tensor(slots, dtype=torch.int32),
        idx_mapping=torch.tensor(batch, dtype=torch.int32),
        idx_mapping_np=np.array(batch, dtype=np.int32),
        expanded_local_pos=torch.tensor([slots[:i].count(slot) for i, slot in enumerate(slots)]),
        input_ids=torch.zeros(len(rows), dtype=torch.int32),
        pos=torch.tensor([pos for _, pos in rows], dtype=torch.int64),
        seq_lens_upper_bound_np=np.array([0] * len(batch), dtype=np.int32),
    )


def expected(selection: Selection, row: torch.Tensor, pos: int) -> int:
    return int(select(row[None], torch.tensor([pos]), Settings.of([selection], torch.device("cpu")))[0])


def test_it_is_what_the_runner_loads() -> None:
    assert issubclass(SeededSelection, interface.LogitsProcessor)


def test_rows_of_drafted_tokens_have_their_own_noise() -> None:
    p = processor()
    ours = {
        5: Selection(1, temperature=1.0),
        0: Selection(2**64 - 1, top_k=0, top_p=0.9),
        3: Selection(3, 0.0),
    }
    for slot, selection in ours.items():
        assert p.add_request(slot, params(selection))
    assert not p.add_request(2, params(None))
    p.apply_staged_writes()
    rows = [(5, 10), (5, 11), (5, 12), (2, 4), (0, 99), (0, 100), (3, 7)]
    logits = torch.randn(len(rows), N_VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    before = logits.clone()
    after = p.apply(logits, context(rows))
    for (slot, pos), old, new in zip(rows, before, after, strict=True):
        if slot == 2:
            assert torch.equal(old, new)
            continue
        left = torch.nonzero(torch.isfinite(new)).flatten().tolist()
        assert left == [expected(ours[slot], old, pos + 1)]
        assert new[left[0]] == old[left[0]]


def test_a_slot_forgets_who_had_it() -> None:
    p = processor()
    logits = torch.randn(1, N_VOCAB, generator=torch.Generator().manual_seed(1))
    first, second = Selection(1, temperature=2.0), Selection(2, temperature=2.0)
    for selection in (first, second, None, first):
        assert p.add_request(4, params(selection)) == (selection is not None)
        p.apply_staged_writes()
        after = p.apply(logits.clone(), context([(4, 20)]))[0]
        if selection is None:
            assert torch.equal(after, logits[0])
        else:
            assert int(after.argmax()) == expected(selection, logits[0], 21)


def test_wrong_arguments_are_refused() -> None:
    wrong = params(None)
    wrong.extra_args = {"sllm_seed": "x"}
    with pytest.raises(ValueError, match="sllm_seed is 'x'"):
        SeededSelection.validate_params(wrong)
    penalized = params(Selection(1))
    penalized.repetition_penalty = 1.2
    with pytest.raises(ValueError, match="repetition_penalty"):
        SeededSelection.validate_params(penalized)
