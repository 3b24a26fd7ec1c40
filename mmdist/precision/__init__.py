"""Two sides' answers compared, number by number, and scored: files in, figures out; no config, no engine of its own."""
