"""The worker: the big model on the other machine, served to many clients."""
