"""A conversation in the terminal; an empty line, Ctrl-D or Ctrl-C ends it.

python examples/chat.py [TARGET.gguf DRAFT.gguf]     without arguments: the pair that comes with sllm
"""

import sys

import sllm
from sllm import embedded

target_path, draft_path = sys.argv[1:3] or (embedded.TARGET, embedded.DRAFT)
messages: list[dict[str, str]] = []

with sllm.Model(target_path) as model, sllm.Model(draft_path) as draft, sllm.LocalTarget(model) as target:
    try:
        while line := input("> ").strip():
            messages.append({"role": "user", "content": line})
            # The whole conversation each time: what the target still holds of it is not computed again.
            answer = ""
            for run in sllm.generate(target, model.chat(messages), draft=draft, max_tokens=400):
                print(run.text, end="", flush=True)
                if run.kind == "text":  # what it thought first is no part of the conversation
                    answer += run.text
            print()
            messages.append({"role": "assistant", "content": answer})
    except (EOFError, KeyboardInterrupt):
        print()
