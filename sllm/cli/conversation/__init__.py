"""A conversation in the terminal: what ``sllm chat`` is made of."""
