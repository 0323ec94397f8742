"""What nodes declare, and a picture to give them."""

from __future__ import annotations

import torch

IMAGE = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(0))


def declared(node_class):
    found = {}
    for section in ("required", "optional"):
        for name, spec in node_class.INPUT_TYPES().get(section, {}).items():
            found[name] = (section, spec)
    return found


def is_socket(spec):
    return isinstance(spec[0], str) and spec[0] not in ("INT", "FLOAT", "STRING", "BOOLEAN")
