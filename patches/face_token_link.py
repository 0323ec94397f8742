"""The IdentityNet as one link of a ComfyUI chain of ControlNets, with face tokens, regions and drawings of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .mask import MAX_SHAPES, fit_batch
from .model_call import frames_of


def _of_the_net(name: str) -> property:
    """What a link has from its net, in the place of a ControlBase's own."""

    def get(link: Any) -> Any:
        return getattr(link.net, name)

    def put(link: Any, value: Any) -> None:
        if "net" in vars(link):  # not what ControlBase begins with
            setattr(link.net, name, value)

    def drop(link: Any) -> None:
        delattr(link.net, name)

    return property(get, put, drop)


def face_token_link(net: Any, name: str, region: Tensor | None) -> Any:
    """A link in a chain of ControlNets: `net` alone gets the tokens called `name` and is limited to `region` [M, H, W].

    The nets before it in the chain are given the prompt, as without it. In a context window over a batch, drawings and
    regions are those of its frames. Packs that sample a picture in tiles (Ultimate SD Upscale, Tiled Diffusion) find the
    drawings where those of any ControlNet are, and put the tile's in their place.
    """
    from comfy.controlnet import ControlBase

    class FaceTokenLink(ControlBase):
        cond_hint = _of_the_net("cond_hint")
        compression_ratio = _of_the_net("compression_ratio")
        upscale_algorithm = _of_the_net("upscale_algorithm")
        preprocess_image = _of_the_net("preprocess_image")
        latent_format = _of_the_net("latent_format")
        vae = _of_the_net("vae")
        extra_concat_orig = _of_the_net("extra_concat_orig")
        manual_cast_dtype = _of_the_net("manual_cast_dtype")
        control_model = _of_the_net("control_model")

        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.drawings: Any = getattr(net, "cond_hint_original", None)
            self.frames: tuple[int, ...] | None = None  # whose drawings `net` has; None: all of them
            self.regions: dict[tuple[Any, ...], Tensor] = {}
            # By the first of these AnimateDiff-Evolved and Advanced-ControlNet know what can be used in windows, and set them.
            self.sub_idxs, self.full_latent_length, self.context_length = None, 0, 0

        @property
        def cond_hint_original(self) -> Any:
            return self.drawings

        @cond_hint_original.setter
        def cond_hint_original(self, drawings: Any) -> None:
            if "net" in vars(self):
                self.drawings = net.cond_hint_original = drawings
                self.frames = None

        def get_control(
            self, x_noisy: Tensor, t: Tensor, cond: Mapping[str, Any], batched_number: int, transformer_options: Any
        ) -> Any:
            before = None
            if self.previous_controlnet is not None:
                before = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, transformer_options)
            given = {**cond, "crossattn_controlnet": cond[name]} if name in cond else cond
            window, length = frames_of(transformer_options or {})
            self.draw(window, length)
            control = net.get_control(x_noisy, t, given, batched_number, transformer_options)
            if control is None:
                return before
            if region is not None:
                control = {
                    kind: [x if x is None else x * self.region_like(x, batched_number, window, length) for x in outputs]
                    for kind, outputs in control.items()
                }
            return self.control_merge(control, before, output_dtype=None)

        def draw(self, window: tuple[int, ...] | None, length: int | None) -> None:
            """Give `net` the drawings of the frames in `window` of a batch of `length`."""
            if hasattr(net, "sub_idxs"):  # one of Advanced-ControlNet, which chooses for itself
                net.sub_idxs = None if window is None else list(window)
                net.full_latent_length, net.context_length = length or 0, len(window or ())
                return
            count = 1 if self.drawings is None else len(self.drawings)
            frames = None if window is None or count == 1 else tuple(i % count for i in window)
            if frames != self.frames:
                # ComfyUI takes the first drawings there are, and makes its copy for the device where there is none.
                net.cond_hint_original = self.drawings if frames is None else self.drawings[list(frames)]
                net.cond_hint, self.frames = None, frames

        def region_like(
            self, x: Tensor, batched_number: int, window: tuple[int, ...] | None, length: int | None
        ) -> Tensor:
            assert region is not None
            key = (x.shape[0], x.shape[-2:], x.device, x.dtype, window)
            if key not in self.regions:
                if len(self.regions) >= MAX_SHAPES:
                    self.regions.clear()
                whole = region[None] if region.ndim == 2 else region
                if len(whole) > 1 and window is not None and length is not None:
                    whole = fit_batch(whole, length)[list(window)]
                small = F.interpolate(whole[:, None].float(), size=x.shape[-2:], mode="bilinear")
                rows = fit_batch(small, x.shape[0] // batched_number).repeat(batched_number, 1, 1, 1)
                self.regions[key] = rows.to(x.device, x.dtype)
            return self.regions[key]

        def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
            super().pre_run(model, percent_to_timestep_function)
            net.pre_run(model, percent_to_timestep_function)

        def cleanup(self) -> None:
            super().cleanup()
            self.regions.clear()
            self.draw(None, None)
            net.cleanup()

        def get_models(self) -> list[Any]:
            return [*super().get_models(), *net.get_models()]

        def get_extra_hooks(self) -> list[Any]:
            return [*super().get_extra_hooks(), *net.get_extra_hooks()]

        def inference_memory_requirements(self, dtype: Any) -> int:
            return max(super().inference_memory_requirements(dtype), net.inference_memory_requirements(dtype))

        def copy(self) -> Any:
            return self.around(net.copy())

        def around(self, other: Any) -> Any:
            """This link with a copy of `net`, which may be at work in a window."""
            made = face_token_link(other, name, region)
            self.copy_to(made)
            return made

        def deepclone_multigpu(self, load_device: Any, autoregister: bool = False) -> Any:
            made = self.around(net.deepclone_multigpu(load_device))
            if autoregister:
                self.multigpu_clones[load_device] = made
            return made

    return FaceTokenLink()
