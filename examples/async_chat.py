"""Several conversations at once in asyncio, as in a chat server: they share the passes of one worker.

python examples/async_chat.py [TARGET.gguf DRAFT.gguf]     without arguments: the pair that comes with sllm

`async for` computes on one thread for each text. A task that is cancelled (a client has left, or the time is
over) ends its text, and gives its place to another.
"""

import asyncio
import time

import arguments

import sllm
from sllm import embedded

target_path, draft_path = arguments.parse(__doc__, "TARGET", "DRAFT")
SECONDS = 3  # nobody waits longer for an answer
QUESTIONS = ["What comes after spring?", "春天之后是什么季节？", "Tell me a story about a lost kite."]


async def answer(target: sllm.RemoteTarget, draft: sllm.Model, question: str) -> int:
    text = ""
    prompt = target.chat([{"role": "user", "content": question}])
    async with sllm.generate(target, prompt, draft=draft, max_tokens=400) as stream:
        try:
            async for run in stream:
                text += run.text
        except asyncio.CancelledError:
            text += " [cancelled]"
    print(f"{question}\n    {text}")
    return stream.stats.n_tokens


async def answers(target: sllm.RemoteTarget, draft: sllm.Model) -> int:
    tasks = [asyncio.create_task(answer(target, draft, question)) for question in QUESTIONS]
    _, late = await asyncio.wait(tasks, timeout=SECONDS)
    for task in late:
        task.cancel()
    return sum(await asyncio.gather(*tasks))


slow = {"pass_seconds": 0.03}  # each pass takes as long as one of a large model
with (
    sllm.Worker(target_path or embedded.TARGET, insecure=True, **slow) as worker,
    sllm.connect(worker.uri) as remote,
    sllm.Model(draft_path or embedded.DRAFT) as draft,
):
    began = time.monotonic()
    n_tokens = asyncio.run(answers(remote.target(), draft))
    print(f"{n_tokens} tokens in {time.monotonic() - began:.1f} s, all conversations together")
