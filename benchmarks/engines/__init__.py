"""sllm against engines that somebody else wrote: vLLM and llama-server, started here (README.md)."""
