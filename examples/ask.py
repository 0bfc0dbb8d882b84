"""Who answers, and what leaves: a model here that grades, and a worker behind a slow link as the cloud.

python examples/ask.py [SMALL.gguf LOCAL.gguf]     without arguments: the model that comes with sllm, for both

`sllm ask` is the same with more options, and with OpenAI-compatible endpoints (sllm.triage.openai_cloud).
"""

from dataclasses import replace

import arguments

import sllm
from sllm import embedded
from sllm.cli.slow_link import Link
from sllm.triage import ContextScorer, Policy, Profile

small_path, local_path = arguments.parse(__doc__, "SMALL", "LOCAL")
# What `sllm calibrate` found of the model. Without a profile nothing is promised, and all is tier 2.
profile = None if small_path else Profile.load(embedded.TARGET_PROFILE)
questions = [
    "What comes after spring?",
    "翻译成英文：小狗在花园里睡觉。",
    """Write a polite reply to this message:
Hello, this is Clara Brook. I have lost my umbrella, please call me if you find it. \
My phone number is 415-555-0162.""",
    "Prove that the square root of 47 is irrational.",  # too much for the model that comes with sllm
]

with (
    sllm.Worker(
        local_path or embedded.TARGET, insecure=True
    ) as worker,  # in earnest: a larger one, elsewhere
    Link((worker.address.host, worker.address.port), delay=0.025, mbit_s=50) as link,  # half the round trip
    sllm.connect(replace(worker.address, host=link.host, port=link.port).uri) as remote,
    sllm.Model(small_path or embedded.TARGET) as small,
    sllm.Model(local_path or embedded.TARGET) as local,
    # So small a model is no judge of what is private: the detectors are.
    ContextScorer(small) as scorer,
):
    grader = sllm.Triage(scorer, Policy(ask_privacy=False), profile)
    with sllm.Hybrid(small, local, remote.target(), triage=grader, privacy="deidentify") as hybrid:
        for question in questions:
            hybrid.new_conversation()
            answer = hybrid.ask([{"role": "user", "content": question}], max_tokens=48)
            print(f"{question}\n    {answer.text()}")
            route, stats = " > ".join(answer.route), answer.stats
            print(f"    -- tier {answer.grade.tier:d}, {route}, masked: {answer.masked}", end="")
            print(f", {stats.cloud_in} tokens sent, {stats.cloud_out} received")
