"""Detectors with random weights, made on the spot, that the importer and `ptq` are tried on."""
