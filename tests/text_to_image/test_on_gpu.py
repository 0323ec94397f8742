"""What only a GPU can show: the devices' arithmetic, float8, and that nothing runs far ahead."""

from __future__ import annotations

import pytest
import torch
from hotpath import host
from hotpath.demo.z_image_model import Widths, write_checkpoint
from hotpath.host import streamed_layers
from hotpath.host.headless import HeadlessHost
from hotpath.text_to_image import decoding, precision
from hotpath.text_to_image.denoising import Guidance
from hotpath.text_to_image.jobs import forget_models
from hotpath.text_to_image.loading import MODELS, LoadOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
# Widths that float8 products and every attention kernel take; 26 million weights.
WIDTHS = Widths(
    transformer={
        "dim": 384, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 64,
        "in_channels": 16, "axes_dims": [32, 48, 48], "axes_lens": [1024, 512, 512],
    },
    text_encoder={
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16,
    },
    vae={
        "latent_channels": 16, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1, "norm_num_groups": 8,
        "sample_size": 256,
    },
)  # fmt: skip


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("wide") / "wide", WIDTHS, dtype=torch.bfloat16)


@pytest.fixture
def load_wide(wide_folder, tmp_path):
    here = HeadlessHost(models=tmp_path / "models", device="cuda", show_progress=False)
    here._cache = tmp_path / "cache"
    before = host.use(here)
    yield lambda **options: MODELS.get(str(wide_folder), LoadOptions(**options), anywhere=True)
    forget_models()
    host.use(before)


def psnr(a, b):
    return -10 * (a - b).square().mean().log10().item()


def test_bfloat16_is_near_diffusers(load_wide, wide_folder, draw):
    from diffusers import ZImagePipeline

    pipeline = ZImagePipeline.from_pretrained(wide_folder, torch_dtype=torch.bfloat16).to("cuda")
    wanted = pipeline(
        "a red fox", width=512, height=384, num_inference_steps=4, guidance_scale=0.0, output_type="np",
        generator=torch.Generator("cpu").manual_seed(3),
    ).images  # fmt: skip
    found = draw(load_wide(), seed=3, width=512, height=384, steps=4)
    assert psnr(found.pictures, torch.from_numpy(wanted)) > 40 and "bfloat16 on cuda" in found.report


def test_a_picture_does_not_know_its_company(load_wide, draw):
    model = load_wide()
    batch = draw(model, seed=3, pictures=3, width=256, height=256).pictures
    assert torch.equal(batch[2:], draw(model, seed=5, width=256, height=256).pictures)


def test_compiled_without_recompiling(load_wide, draw):
    from torch._dynamo.utils import counters

    model = load_wide(compile="regional")
    first = draw(model, width=256, height=256)
    assert psnr(first.pictures, draw(load_wide(), width=256, height=256).pictures) > 40
    before = counters["stats"]["unique_graphs"]
    for width, height in ((512, 256), (256, 384), (1024, 512)):
        draw(model, "another and rather longer prompt " * 9, width=width, height=height, guidance=Guidance(2.0))
    model.release()
    draw(model, width=256, height=256)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("method", ["float8", "int8"])
@pytest.mark.parametrize("compile", ["none", "regional"])
def test_packed_products(load_wide, draw, method, compile):
    if (reason := precision.unavailable(method, torch.device("cuda"), torch.bfloat16)) is not None:
        pytest.skip(reason)
    exact = draw(load_wide(), width=256, height=256).pictures
    found = draw(load_wide(precision=method, compile=compile), width=256, height=256)
    assert psnr(found.pictures, exact) > 15 and f"precision: {method} weights" in found.report


@pytest.mark.parametrize("options", [{}, {"precision": "float8"}, {"precision": "int8", "compile": "regional"}])
def test_layers_that_wait_in_the_machines_memory(load_wide, draw, options):
    """On the card by turns: the same picture, in less memory."""
    method = options.get("precision", "none")
    if method != "none" and (reason := precision.unavailable(method, torch.device("cuda"), torch.bfloat16)) is not None:
        pytest.skip(reason)
    model = load_wide(**options)
    whole = draw(model, width=256, height=256).pictures
    model.release()
    held = torch.cuda.memory_allocated()
    layers = model.transformer.managed.module.network.layers
    streamed_layers.stream(layers, len(layers))
    found = draw(model, width=256, height=256)
    assert psnr(found.pictures, whole) > 60 and "4 of 4 layers of the transformer wait" in found.report
    assert layers[0].weights.memory.is_pinned() and len(layers) * layers[0].weights.nbytes > streamed_layers.PLACES * (
        1 << 20
    )
    with model.transformer.resident():
        assert torch.cuda.memory_allocated() - held < streamed_layers.whole_bytes(model.transformer.managed.module) // 2


def test_the_estimate_covers_what_decoding_takes(load_wide):
    model = load_wide()
    latents = torch.randn(1, 16, 128, 128)
    decoding.decode(model, latents, "never")
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    decoding.decode(model, latents, "never")
    taken = torch.cuda.max_memory_allocated() - held
    assert taken <= decoding.activation_bytes(model, 1024, 1024) <= 4 * taken
