"""The arithmetic that is worth writing by hand: each function has a plain twin, and a test says that they agree."""
