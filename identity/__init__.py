"""InstantID weights: file formats, the resampler, and the keys and values it gives each attention block."""
