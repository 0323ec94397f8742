"""Control-LoRAs on a quantised model.

A Control-LoRA is a ControlNet that borrows the UNet's weights. ComfyUI hands it the tensors of the state dict, which of a
quantised layer are numbers without their scale. Here it gets the layer's weight whole, and restores it when it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

KEY = "hotpath_precision_control_lora"


def share_weights(executor: Any, guider: Any, *args: Any, **kwargs: Any) -> Any:
    """A SAMPLER_SAMPLE wrapper: ControlNets are ready by then, and no step has run."""
    from comfy.controlnet import ControlLora

    network = guider.inner_model.diffusion_model
    for net in _control_nets(guider.conds):
        if isinstance(net, ControlLora) and getattr(net, "control_model", None) is not None:
            _share(network, net)
    return executor(guider, *args, **kwargs)


def _share(network: Any, control_lora: Any) -> None:
    import comfy.utils
    from comfy.quant_ops import QuantizedTensor

    borrowers = dict(control_lora.control_model.named_modules())
    for name, layer in network.named_modules():
        weight = getattr(layer, "weight", None)
        key = f"{name}.weight"
        if not isinstance(weight, QuantizedTensor) or name not in borrowers or key in control_lora.control_weights:
            continue
        comfy.utils.set_attr_param(control_lora.control_model, key, weight)
        # ComfyUI restores a weight before it goes through functions, so that no product is made with a quantised one.
        borrowers[name].weight_function = [_as_it_is]


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


def _control_nets(conds: dict[str, list[dict[str, Any]]]) -> Iterator[Any]:
    """Every ControlNet of the chains on `conds`, also those that a link of a chain holds as its `net`."""
    seen: set[int] = set()
    waiting = [cond.get("control") for entries in conds.values() for cond in entries]
    while waiting:
        net = waiting.pop()
        if net is None or id(net) in seen:
            continue
        seen.add(id(net))
        yield net
        waiting += [getattr(net, "previous_controlnet", None), getattr(net, "net", None)]
