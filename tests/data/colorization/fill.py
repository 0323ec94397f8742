"""Weights from names: what the original programs were filled with when the numbers beside this file were computed.

fill(spec, seed) -> {key: np.ndarray}
  spec : iterable of (key, shape, dtype_str) as found in *_keys.json
  seed : 'a' or 'b' (any short string); it is part of the hashed text.

Every tensor depends ONLY on (seed, key, shape, dtype): never on order or on
other keys.  For each key: rng = np.random.Generator(np.random.PCG64(
zlib.crc32(f"{seed}:{key}".encode()))); all draws are float64, then cast.
Rules are tried top to bottom, first match wins.
"""

import zlib

import numpy as np

RELU_GAIN = 2.0**0.5


def _gain(key):
    # last prediction convs: keep tanh() away from both 0 and saturation
    if key == "decoder.pred.weight":
        return 0.35  # ColorMNet logits
    if key == "conv10_ab.weight":
        return 0.15  # ColorVidNet logits
    # keys used for the memory similarity: keep exp() in range
    if key.startswith("key_proj."):
        return 0.7
    # plain conv+relu stacks without normalisation (VGG19)
    if (
        key.startswith("conv")
        and key.split(".")[0][4:5] in "12345"
        and key.split(".")[0][5:6] == "_"
        and key.count(".") == 1
    ):
        return RELU_GAIN
    return 1.0


def fill_one(key, shape, dtype, seed):
    shape = tuple(int(s) for s in shape)
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(f"{seed}:{key}".encode())))
    if dtype == "int64":  # num_batches_tracked
        return np.zeros(shape, np.int64)
    n = rng.standard_normal(shape)
    last = key.rsplit(".", 1)[-1]
    if last == "running_var":
        x = 0.5 + np.abs(n)  # > 0
    elif last == "running_mean":
        x = 0.1 * n
    elif last == "temperature":  # CrossChannelAttention (8,1,1)
        x = 6.0 + 2.0 * np.abs(n)
    elif last in ("cls_token", "pos_embed", "mask_token"):
        x = 0.5 * n
    elif last == "gamma":  # DINOv2 LayerScale (384,)
        x = 0.5 + 0.1 * n
    elif last == "weight" and len(shape) == 1 and shape[0] == 1:
        x = 0.25 + 0.02 * n  # PReLU slope
    elif len(shape) >= 2:  # conv / linear weights
        fan_in = int(np.prod(shape[1:]))
        x = n * (_gain(key) / np.sqrt(fan_in))
        if key == "conv1_1.0.weight" and shape[1] == 7:
            x[:, 4:7] *= 0.2  # ColorVidNet: damp the fed-back last frame (else chaotic)
    elif last == "weight":  # 1-d norm scales
        x = 1.0 + 0.1 * n
    else:  # biases
        x = 0.05 * n
    return np.ascontiguousarray(x.astype({"float32": np.float32}[dtype]))


def fill(spec, seed):
    return {k: fill_one(k, s, d, seed) for k, s, d in spec}
