"""The HTTP port: page, figures, metrics, labels, and KServe, which is passed on to Triton."""
