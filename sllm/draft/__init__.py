"""Drafting: who proposes tokens, how many, and how likely each is to be accepted."""
