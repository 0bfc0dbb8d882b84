"""Sources of truth: what decides the text."""
