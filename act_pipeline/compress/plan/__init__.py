"""Select the ops that compute in INT8, and list those that do in a model."""
