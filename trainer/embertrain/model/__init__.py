"""The model: its shape, its layers, one forward call."""
