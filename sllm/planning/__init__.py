"""Which way to a text is the fastest, predicted from what was measured (:func:`sllm.plan`)."""
