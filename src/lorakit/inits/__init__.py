"""Initialisations of low-rank factors, one file each.

A file has `init(weight_OI, rank, statistics) -> (A, B)` and may declare `NEEDS`, `SPLITS` and `ranks`, which
`lorakit.core.initialise.Initialisation` describes.
"""
