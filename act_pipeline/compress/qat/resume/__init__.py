"""Resume an interrupted training from its checkpoint, with results that are identical bit by bit."""
