"""The contract between the parts: sites, deltas, methods, plans, routing, merging and files."""
