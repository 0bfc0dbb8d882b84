"""sllm's seeded selection, and the drafts of its clients, inside a vLLM server.

``runner_v1.SeededSelection`` and ``runner_v2.SeededSelection`` are logits processors,
``scheduler.ClientDrafts`` is a scheduler and ``proposer.NoDrafts`` what vLLM wants beside it. ``arguments``
is what a request says to them; a client can import it where neither vLLM nor torch is installed. README.md
says how to start a server.
"""
