"""Films and pictures that the colour nodes coloured, for their help pages."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from .node_runs import node, photo
from .picture_rows import card, labelled, shown, stacked

OPTIONS = {"colour_size": 0, "edge_filter": "none"}


def held_out(frames: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """The demo's clip in colour and in grey, both [frames, H, W, 3]."""
    from .colorize_scenes import held_out_clip

    truth = held_out_clip(frames).permute(0, 2, 3, 1).contiguous()
    return truth, (truth @ torch.tensor([0.2126, 0.7152, 0.0722]))[..., None].expand(-1, -1, -1, 3)


def coloured_film(method: str = "ColorMNet") -> tuple[torch.Tensor, torch.Tensor, str, torch.Tensor]:
    """The grey clip, the same coloured, the node's report and its confidence."""
    truth, grey = held_out()
    frames, confidence, _, report = node(
        "HotpathColorizeVideo", frames=grey, reference=truth[:1], method=method, **OPTIONS
    )
    return grey, frames, report, confidence


def _strip(film: torch.Tensor, size: int = 148) -> Image.Image:
    return labelled([(f"frame {i}", shown(film[i : i + 1], size)) for i in (0, 5, 10, 15)])


def film() -> Image.Image:
    grey, frames, *_ = coloured_film()
    return stacked([_strip(grey), _strip(frames)])


def film_report() -> Image.Image:
    _, frames, report, confidence = coloured_film()
    row = labelled([("frame 15", shown(frames[15:])), ("confidence", shown(confidence[15:]))])
    return stacked(
        [row, card("Colorize Video", "\n".join(line for line in report.splitlines()[:5] if "fps" not in line))]
    )


def film_state() -> Image.Image:
    truth, _ = held_out()
    options = {"method": "ColorMNet", **OPTIONS}
    first, _, state, _ = node("HotpathColorizeVideo", frames=truth[:8], reference=truth[:1], **options)
    path = node("HotpathSaveColorState", state=state, name="film")[0]
    state, frame = node("HotpathLoadColorState", name="film")
    second = node("HotpathColorizeVideo", frames=truth[8:], reference=truth[:1], state=state, **options)[0]
    at_once = node("HotpathColorizeVideo", frames=truth, reference=truth[:1], **options)[0]
    assert torch.allclose(torch.cat([first, second]), at_once, atol=1e-5)
    row = labelled([(f"frame {i}", shown(torch.cat([first, second])[i : i + 1], 118)) for i in (0, 4, 7, 8, 15)])
    said = f"color_states/{Path(path).name}: the film goes on with frame {frame}; equal to colouring it at once"
    return stacked([row, card("Save Color State, Load Color State", said, row.width)])


def images_coloured() -> Image.Image:
    truth, grey = held_out()
    coloured = node("HotpathColorizeImage", images=grey[12:13], reference=truth[:1], method="ColorMNet", **OPTIONS)[0]
    return labelled([("reference", shown(truth[:1])), ("picture", shown(grey[12:13])), ("coloured", shown(coloured))])


def compatible_film() -> Image.Image:
    """The compatible Deep Exemplar node crops to its target size, as the pack it comes from did."""
    truth, grey = held_out(8)
    frames = node(
        "DeepExColorVideoNode",
        video_frames=grey,
        reference_image=truth[:1],
        frame_propagate=True,
        use_half_resolution=False,
        target_width=160,
        target_height=96,
    )[0]
    return labelled(
        [("frame", shown(grey[7:], 170)), ("coloured, 160x96: cropped to its shape", shown(frames[7:], 170))]
    )


def color_transfer() -> Image.Image:
    light, small = photo("colorize_grey.png"), photo("colorize_small.png")
    done = node("HotpathColorTransfer", luminance=light, colours=small, strength=1.0, edge_filter="guided")[0]
    return labelled(
        [("luminance", shown(light, 150)), ("colours, 75x50", shown(small, 100)), ("result, 600x400", shown(done, 150))]
    )
