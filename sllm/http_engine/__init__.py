"""Serving engines of others (vLLM, SGLang, llama-server) as what decides a text, over HTTP.

An engine gives the log-probabilities of the likeliest tokens of a position, and the selection is made here
with the noise of :class:`~sllm.SamplingParams`: certain, or asked for again with more of them. From the
bottom: ``transport`` (HTTP), ``rows`` (what an engine says of a position), ``dialect`` with ``vllm``,
``sglang`` and ``llama_server`` (what is asked and how the answer is read), ``probe`` (what stands there),
``selection`` (the token of a row), ``run_length`` (how far an engine is to run by itself), ``generation``,
``scoring`` and ``target``.
"""
