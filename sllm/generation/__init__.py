"""The loops that make text of a target and a draft."""
