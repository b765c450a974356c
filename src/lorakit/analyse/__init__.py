"""What an adapter learned, as numbers: the study of Hu et al. 2021, section 7."""

from lorakit.analyse.subspace import amplification, projected, similarity

__all__ = ["amplification", "projected", "similarity"]
