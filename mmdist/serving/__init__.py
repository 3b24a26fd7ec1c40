"""The engine behind HTTP: what every request format shares, and one file a format in formats/."""
