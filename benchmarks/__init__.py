"""What sllm is measured with: the models, the peers and the suites (see README.md)."""
