"""InstantID weights: file formats, the resampler, and the keys and values it gives each attention block.

From outside to inside: an `Identity` is face embeddings with a name; an `InstantIDAdapter` is the network in
`ip-adapter.bin`; `prepare` runs one through the other and gives a `PreparedIdentity`, everything that attention needs.
InstantID: Wang et al., "InstantID: Zero-shot Identity-Preserving Generation in Seconds", 2024.
"""

from .adapter import InstantIDAdapter, adopt_adapter, load_adapter
from .embedding import COMBINE_MODES, combine_embeddings, unconditional_embedding
from .identity import Identity, load_identity, save_identity
from .prepared import PreparedIdentity, prepare

__all__ = [
    "COMBINE_MODES",
    "Identity",
    "InstantIDAdapter",
    "PreparedIdentity",
    "adopt_adapter",
    "combine_embeddings",
    "load_adapter",
    "load_identity",
    "prepare",
    "save_identity",
    "unconditional_embedding",
]
