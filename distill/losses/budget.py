"""How many logits are in memory at once, on this device."""

from __future__ import annotations

import torch

# 128 MiB of float32: on a CPU the products with a head don't get faster above some hundred positions.
_BUFFER_ELEMENTS = 2**25
# On a GPU they do, and a chunk costs its processor some dozens of launches. A 64th of its memory is the same on an 8 GiB card.
_BUFFER_SHARE = 64


def buffer_elements(device: torch.device, most: int) -> int:
    """Number of logits that go through a head together: positions times vocabulary. A few copies may exist at a time.

    Args:
        device: Where.
        most: However large the device is.
    """
    if device.type != "cuda":
        return _BUFFER_ELEMENTS
    allowed = torch.cuda.get_per_process_memory_fraction(device) * torch.cuda.get_device_properties(device).total_memory
    return elements_of(allowed, most)


def elements_of(memory: float, most: int) -> int:
    """The same for a GPU by its bytes of memory, also of one that is not here."""
    return min(max(int(memory) // (4 * _BUFFER_SHARE), _BUFFER_ELEMENTS), most)
