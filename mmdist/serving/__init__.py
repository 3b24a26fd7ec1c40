"""The engine behind HTTP: what every request format shares, and one file a format in formats/."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION: str | None = version("mmdist")
except PackageNotFoundError:  # run from its repository without being installed
    VERSION = None
