"""One record a model family: under which module names the roles live."""
