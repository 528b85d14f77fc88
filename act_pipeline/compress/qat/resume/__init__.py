"""A training that was broken off goes on from its checkpoint, to the same bits."""
