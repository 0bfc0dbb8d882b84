"""What the cloud of a request is sent: hints as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sllm
from sllm.draft.drafters import ModelDrafter
from sllm.draft.growth import Shape
from sllm.draft.tree import DraftedTree
from sllm.triage import cloud

if TYPE_CHECKING:
    import pytest

    from sllm.engine.model import Model


def test_no_branch_of_a_hint_gives_a_private_value_away(
    draft_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tree is sent without the branches that spell out, with the text before them, what the vault knows."""
    vocab = draft_model.vocab
    vault = sllm.Vault()
    vault.mask("Write to emma.stone@example.org today.")
    begin = vocab.encode("Her address is emma.sto", add_special=False).tolist()
    secret = vocab.encode("ne@example.org", add_special=False).tolist()
    other = vocab.encode(" not known", add_special=False).tolist()
    tree = DraftedTree.chain(secret, [0.9] * len(secret)).merged(DraftedTree.chain(other, [0.9] * len(other)))
    monkeypatch.setattr(ModelDrafter, "draft_tree", lambda *_: tree)
    drafter = cloud._GuardedDrafter(draft_model, vault, vocab, n_ctx=64, n_threads=1)
    try:
        found = drafter.draft_tree(begin, Shape(4, 4, 32, 0.02))
        ways = [[found.tokens[i] for i in found.way_to(place)] for place in range(len(found))]
        assert other in ways
        assert secret not in ways
        assert drafter.draft_tree([], Shape(4, 4, 32, 0.02)).tokens == tree.tokens
    finally:
        drafter.close()
