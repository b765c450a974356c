"""Whole runs, from a declaration to results beside the adapter, that anyone can repeat."""
