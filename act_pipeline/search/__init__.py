"""Search for faster variants of a detector that need no training: decoder layers, queries, input size, INT8.

Modules: ``variants`` (what can be varied, and the exports), ``halving`` (fewer variants on more images), ``pareto``
(the front of latency and mAP), ``int8_models`` (the best ones calibrated), ``outcome`` (record, table and picture),
``search`` (the whole search), and ``second_result`` (the search as the last step of a compression).
"""
