"""Detectors of the names of people and companies, in English and Chinese."""
