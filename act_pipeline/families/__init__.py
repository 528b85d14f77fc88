"""Detector families: what a model's outputs are, and how they become detections.

A family is one file with an object of :class:`act_pipeline.families.interface.DetectorFamily`, and one entry in
:mod:`act_pipeline.families.registry`.
"""
