"""The MoE model: training, inference, serving. No public API yet."""
