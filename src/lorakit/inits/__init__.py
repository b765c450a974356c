"""Initialisations of low-rank factors, one file each: `init(in_features, out_features, rank) -> (A, B)`."""
