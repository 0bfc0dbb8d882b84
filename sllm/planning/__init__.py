"""Prediction of the fastest setup from measurements (:func:`sllm.plan`)."""
