"""The whole story on real text, on one machine: `python -m emberline.quickstart`."""
