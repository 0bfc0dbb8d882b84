"""The primitives under generate(), for loops of one's own: here two texts side by side, in one batch.

python examples/draft_verify.py
"""

import numpy as np

import sllm
from sllm import embedded

N_TOKENS = 48  # wanted of each text
sampling = [sllm.SamplingParams(temperature=0.7, seed=seed) for seed in (1, 2)]

with sllm.Model(embedded.TARGET) as big, sllm.Model(embedded.DRAFT) as small:
    texts = [big.vocab.encode(prompt).tolist() for prompt in ("Once upon a time there was", "从前有一只")]
    passes = 0
    with big.context(n_ctx=1024, n_seq_max=2) as target, small.context(n_ctx=1024, n_seq_max=2) as drafter:
        active = [0, 1]
        # All but the last token of each prompt: behind that one, drafting and verifying begin.
        for context in (target, drafter):
            context.decode([text[:-1] for text in texts], seq_id=active)
        while active:
            params = [sampling[seq] for seq in active]
            # What was committed since its last draft; whatever it had drafted wrongly is overwritten.
            new = [np.array(texts[seq][drafter.memory.length(seq) :], dtype=np.int32) for seq in active]
            draft = drafter.draft(active, new, n_max=4, p_min=0.2, sampling=params)
            last = np.array([texts[seq][-1] for seq in active], dtype=np.int32)
            verdict = target.verify(active, last, draft, sampling=params)
            passes += 1
            for row, seq in enumerate(active):
                texts[seq] += verdict.tokens[row, : verdict.n_accepted[row] + 1].tolist()
            ended = {seq for seq in active if big.vocab.is_eog(texts[seq][-1]) or len(texts[seq]) >= N_TOKENS}
            active = [seq for seq in active if seq not in ended]
    for text in texts:
        print(big.vocab.decode(text))
    print(f"{sum(map(len, texts))} tokens, prompts included, in {passes} passes over both texts")
