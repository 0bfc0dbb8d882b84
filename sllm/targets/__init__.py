"""Targets: what decides the text. The contract, and the lockstep that keeps two memories equal."""
