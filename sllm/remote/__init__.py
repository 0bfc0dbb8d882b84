"""The client of a worker: connection, streams that survive a loss, and the worker as a target."""
