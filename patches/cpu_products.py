"""A native MODEL on a CPU: its linear layers, and those of its ControlNets, multiplied by oneDNN where that is faster.

torch gives them to MKL, which leaves half of the width of other makers' processors unused.
"""

from __future__ import annotations

from typing import Any

from ..products.rerouting import Rerouting, rerouted

KEY = "hotpath_cpu_products"


def multiply_by_onednn(model: Any) -> str:
    """Let `model`, a ModelPatcher that is our clone, multiply so while it is sampled; a line for a report, "" on a card.

    Nothing is put on the model itself: products are rerouted in the thread that samples, for the length of each step.
    """
    from comfy.patcher_extension import WrappersMP

    multiply_as_before(model)
    enter, line = rerouted(model.load_device)

    def multiplied(executor: Any, *args: Any, **kwargs: Any) -> Any:
        with enter():
            return executor(*args, **kwargs)

    if enter is Rerouting:
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, multiplied)
    return line


def multiply_as_before(model: Any) -> None:
    """Take it off again."""
    from comfy.patcher_extension import WrappersMP

    model.remove_wrappers_with_key(WrappersMP.PREDICT_NOISE, KEY)
