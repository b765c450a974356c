"""One file a format; its name is what `lorakit convert --to` takes."""
