"""A model split by layers: the first and last ones here, those between them on a worker."""
