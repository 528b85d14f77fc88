"""SmoothQuant (Xiao et al., 2023): move outliers from activations, which are hard to quantize, into weights."""
