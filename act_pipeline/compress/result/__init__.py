"""What a compression leaves: the INT8 model, ``act.json``, its table, and the error where no model is good enough."""
