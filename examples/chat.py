"""A conversation in the terminal. Ctrl-C ends an answer; Ctrl-D or an empty line ends the conversation.

python examples/chat.py [TARGET.gguf]     without argument: SmolLM2 where it is installed, or sllm's own model
"""

import arguments

import sllm
from sllm import embedded

[path] = arguments.parse(__doc__, "TARGET")
messages: list[dict[str, str]] = []

with sllm.LocalTarget(path or arguments.smollm2() or embedded.TARGET) as target:
    longest = target.context.n_ctx_seq - 256  # what a prompt may take, so that there is room for an answer
    try:
        while line := input("> ").strip():
            messages.append({"role": "user", "content": line})
            while len(messages) > 1 and len(target.chat(messages)) > longest:
                del messages[:2]  # the oldest question and its answer
            answer = ""
            # The whole conversation each time: what the target still holds of it is not computed again.
            with sllm.generate(target, target.chat(messages), draft="ngram", max_tokens=256) as stream:
                try:
                    for run in stream:
                        print(run.text, end="", flush=True)
                        if run.kind == "text":  # what it thought first is no part of the conversation
                            answer += run.text
                except KeyboardInterrupt:
                    print(" [ended]", end="")
            print()
            messages.append({"role": "assistant", "content": answer})
    except (EOFError, KeyboardInterrupt):
        print()
