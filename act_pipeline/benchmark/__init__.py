"""Benchmark of every engine and precision of a machine on one model: speed, memory, start-up time and accuracy.

Modules: ``plan`` (what is run), ``worker`` (an engine in its own process), ``timing`` (rounds, percentiles, ratios),
``run`` (the whole benchmark), ``rows`` (the content of ``benchmark.json``), ``record``, ``table`` and ``chart``
(results), and ``nncf_peer`` (NNCF's INT8 model of the same float model, for comparison).
"""
