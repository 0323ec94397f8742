"""Inputs of identities that the families of InstantID declare alike; none imports another one, since each must register alone."""

from __future__ import annotations

from ..identity import COMBINE_MODES
from .sockets import number

IDENTITY = "HOTPATH_IDENTITY"
PERSON = (IDENTITY, {"tooltip": "The person, from Identity from Faces or Load Identity."})
COMBINE_EMBEDS = (
    list(COMBINE_MODES),
    {"default": "average", "tooltip": "How several pictures become one person."},
)
NEGATIVE_NOISE = number(0.35, 0.0, 1.0, "Noise instead of zeros as the negative identity.", 0.05)
