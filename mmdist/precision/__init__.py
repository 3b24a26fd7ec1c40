"""Two sides' answers compared, number by number: files in, figures out; no config, no engine of its own."""
