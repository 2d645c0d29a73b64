"""emberline: the umbrella package. It holds the version and the one command line; the work is in the four components."""

__version__ = "0.1.0"
