"""Triton in a process of its own: it speaks KServe and makes batches, which it sends back to this process."""
