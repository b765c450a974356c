"""Built-in data sets: a file here, with a function `source(data) -> Source`, is one of them."""
