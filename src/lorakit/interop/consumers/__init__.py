"""One file a program; its name is what `lorakit check --for` takes."""
