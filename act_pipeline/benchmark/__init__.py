"""Every engine and precision of a machine on one model, side by side: speed, memory, start-up and accuracy.

Read ``plan`` (what is run), ``worker`` (an engine in a process of its own), ``timing`` (rounds, percentiles, ratios),
``run`` (all of it), ``record`` and ``chart`` (what comes of it); ``nncf_peer`` makes the INT8 model that others would
have used.
"""
