"""Memory use of a CUDA device."""

from __future__ import annotations

import torch


def device_memory(device: torch.device) -> dict[str, int]:
    """Bytes: `allocated` by this process's tensors, `reserved` by its allocator; `free` and `total` of the device."""
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return {"allocated": allocated, "reserved": reserved, "free": free, "total": total}
