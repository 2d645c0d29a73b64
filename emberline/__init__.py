"""emberline: the umbrella package: the version and the one command line. The work is in the four components."""

__version__ = "0.1.0"
