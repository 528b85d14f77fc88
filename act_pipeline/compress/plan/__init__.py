"""Which ops compute in INT8, as the config asks and as a model has it."""
