"""What a model keeps of sequences: rows by layer and kind, in pages and rings."""
