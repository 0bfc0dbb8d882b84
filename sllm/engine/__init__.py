"""What computes on this machine: models, contexts, layers, files, and the library that they call."""
