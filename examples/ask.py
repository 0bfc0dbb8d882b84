"""Who answers, and what leaves: a small model, a local one, and a worker behind a slow link as the cloud.

python examples/ask.py [SMALL.gguf LOCAL.gguf]     without arguments: the pair that comes with sllm

`sllm ask` is the same with more options, and with OpenAI-compatible endpoints (sllm.triage.openai_cloud).
"""

import sys
from dataclasses import replace

import sllm
from sllm import embedded
from sllm.cli.slow_link import Link
from sllm.triage import ContextScorer, Policy

small_path, local_path = sys.argv[1:3] or (embedded.DRAFT, embedded.TARGET)
questions = [
    "What comes after spring?",
    "My mail is li.wei@example.com. What comes after spring?",
    "我的手机号是13800138000。春天之后是什么季节？",
]

with (
    sllm.Worker(local_path, insecure=True) as worker,  # in earnest: a larger model on another machine
    Link((worker.address.host, worker.address.port), delay=0.025, mbit_s=50) as link,  # half the round trip
    sllm.connect(replace(worker.address, host=link.host, port=link.port).uri) as remote,
    sllm.Model(small_path) as small,
    sllm.Model(local_path) as local,
    # The small model is too small to judge what is private: the detectors do. Without a profile
    # (`sllm calibrate`) nothing is promised of its own answers, and every request is tier 2.
    ContextScorer(small) as scorer,
):
    grader = sllm.Triage(scorer, Policy(ask_privacy=False))
    settings = {"privacy": "deidentify", "sampling": sllm.SamplingParams(temperature=0)}
    with sllm.Hybrid(small, local, remote.target(), triage=grader, **settings) as hybrid:
        for question in questions:
            answer = hybrid.ask([{"role": "user", "content": question}], max_tokens=48)
            print(answer.text())
            print(f"-- tier {answer.grade.tier:d}, {' > '.join(answer.route)}, masked: {answer.masked}\n")
