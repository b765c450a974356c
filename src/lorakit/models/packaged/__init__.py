"""Models that ship in Python packages: a file here, with a record `model`, is one of them."""
