"""An OpenAI-compatible HTTP server over a target or a hybrid; see :mod:`sllm.openai_server.server`."""
