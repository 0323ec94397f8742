"""The pictures of the help pages and guides, made by the pack's own nodes on the demo's small models.

    python -m hotpath.demo.help_pictures [NAME ...]

Writes web/docs/images/<name>.jpg, each of 60 KB at most. Texts on the pictures are what the nodes said, word for word.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from .. import host
from ..host.headless import HeadlessHost
from .captioner_pictures import caption_folder, prompt_enhancer, vlm_answer, vlm_boxes, vlm_loader
from .colorize_pictures import color_transfer, compatible_film, film, film_report, film_state, images_coloured
from .comparison_pictures import block_profile, block_telemetry, compare
from .face_pictures import (
    face_crop,
    face_mask,
    face_match,
    face_models,
    face_paste,
    face_picked,
    faces_found,
    found,
    key_points,
    key_points_preprocessor,
)
from .identity_pictures import (
    apply_instantid,
    blocks,
    identity,
    identity_saved,
    identity_tokens,
    people,
    tokens_of_a_person,
)
from .map_pictures import map_workflow
from .node_runs import HERE, node, photo
from .picture_rows import card, save
from .text_to_image_pictures import z_image, z_image_loader, z_image_lora
from .workflow_pictures import instantid_weights

PICTURES = HERE.parent / "web" / "docs" / "images"


def cache_report() -> Image.Image:
    found(photo("astronaut.png"))
    found(photo("astronaut.png"))
    tokens_of_a_person()
    return card("Hotpath Cache", node("HotpathCache", clear="nothing")[0])


MADE: dict[str, Callable[[], Image.Image]] = {
    f.__name__: f
    for f in (
        face_models,
        faces_found,
        face_picked,
        key_points,
        key_points_preprocessor,
        face_crop,
        face_paste,
        face_match,
        face_mask,
        identity,
        identity_tokens,
        identity_saved,
        apply_instantid,
        instantid_weights,
        blocks,
        people,
        film,
        film_report,
        film_state,
        images_coloured,
        compatible_film,
        color_transfer,
        vlm_loader,
        vlm_answer,
        vlm_boxes,
        caption_folder,
        prompt_enhancer,
        cache_report,
        z_image_loader,
        z_image_lora,
        z_image,
        block_telemetry,
        block_profile,
        compare,
        map_workflow,
    )
}


@contextlib.contextmanager
def demo_host() -> Iterator[None]:
    """The demo's models and inputs, and a folder for what is written, which is removed at the end."""
    with tempfile.TemporaryDirectory() as work:
        before = host.use(
            HeadlessHost(
                models=Path(work) / "models",
                extra_models=[HERE / "models"],
                input_folder=HERE / "inputs",
                output_folder=Path(work),
                device="cpu",
                show_progress=False,
            )
        )
        try:
            yield
        finally:
            host.use(before)


def main(names: Sequence[str]) -> int:
    torch.set_num_threads(1)
    with demo_host():
        for name in names or MADE:
            size = save(MADE[name](), PICTURES / f"{name}.jpg")
            print(f"{name}.jpg {size / 1000:.1f} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
