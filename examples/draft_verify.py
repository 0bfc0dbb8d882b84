"""The primitives under generate(), for loops of one's own: two texts side by side, in one batch.

python examples/draft_verify.py [TARGET.gguf DRAFT.gguf]     without arguments: the pair that comes with sllm
"""

import arguments
import numpy as np

import sllm
from sllm import embedded
from sllm.engine.exact import SETTINGS

target_path, draft_path = arguments.parse(__doc__, "TARGET", "DRAFT")
N_TOKENS = 48  # of each text, its prompt included
sampling = [sllm.SamplingParams(temperature=0.7, seed=seed) for seed in (1, 2)]


def write(target: sllm.Context, drafter: sllm.Context, n_max: int) -> tuple[list[str], int]:
    """Both texts, and how many passes of the target they took; n_max: drafted tokens, 0 for none."""
    vocab = target.model.vocab
    texts = [vocab.encode(prompt).tolist() for prompt in ("Once upon a time there was", "从前有一只")]
    n_passes, active = 0, [0, 1]
    # All but the last token of each prompt, from position 0: what the contexts held before is void.
    for context in (target, drafter):
        context.decode([text[:-1] for text in texts], seq_id=active, pos=[0, 0])
    while active:
        params = [sampling[seq] for seq in active]
        last = np.array([texts[seq][-1] for seq in active], dtype=np.int32)
        draft = None
        if n_max:  # after what was committed since the last draft; wrong tokens of that one are overwritten
            new = [np.array(texts[seq][drafter.memory.length(seq) :], dtype=np.int32) for seq in active]
            draft = drafter.draft(active, new, n_max=n_max, p_min=0.2, sampling=params)
        verdict = target.verify(active, last, draft, sampling=params)
        n_passes += 1
        for row, seq in enumerate(active):
            texts[seq] += verdict.tokens[row, : verdict.n_accepted[row] + 1].tolist()
        active = [s for s in active if len(texts[s]) < N_TOKENS and not vocab.is_eog(texts[s][-1])]
    return [vocab.decode(text[:N_TOKENS]) for text in texts], n_passes


with (
    sllm.Model(target_path or embedded.TARGET) as big,
    sllm.Model(draft_path or embedded.DRAFT) as small,
    big.context(n_ctx=1024, n_seq_max=2, **SETTINGS) as target,
    small.context(n_ctx=1024, n_seq_max=2, **SETTINGS) as drafter,
):
    big.vocab.check_same(small.vocab)
    texts, n_passes = write(target, drafter, n_max=4)
    alone, n_alone = write(target, drafter, n_max=0)
    print(*texts, sep="\n")
    print(f"{n_passes} passes over both texts, {n_alone} without drafts; same texts: {texts == alone}")
