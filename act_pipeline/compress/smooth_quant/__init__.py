"""SmoothQuant (Xiao et al., 2023): what is hard to round moves from activations into weights."""
