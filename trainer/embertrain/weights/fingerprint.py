"""Which weights a model has, as one word: pages of a prefix cache and adapters are of one and no other."""

from __future__ import annotations

import hashlib

import torch

from ..model.model import Model


def fingerprint(model: Model) -> str:
    """SHA-256 over all weights and buffers, by name, and how much adapters count (`lora`)."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        if isinstance(scale := getattr(module, "scale", None), float):
            digest.update(f"{name} {scale!r}\n".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"
