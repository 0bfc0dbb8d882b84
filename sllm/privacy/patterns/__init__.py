"""Detectors by pattern: numbers, codes, what labels announce, addresses, passwords."""
