"""Prompts with values of the wrong kind: what a node fails with names the input, and can be written."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hotpath.nodes import NODE_CLASS_MAPPINGS
from hotpath.nodes.door import guard


@pytest.mark.parametrize(
    ("node", "inputs", "said"),
    [
        (
            "HotpathFacePick",
            {"faces": 5, "choose": "largest", "index": 0, "when_none": "skip"},
            r"^faces is 5, and .*\(FACES\)",
        ),
        (
            "HotpathColorTransfer",
            {"luminance": "x", "colours": torch.zeros(1, 2, 2, 3)},
            "^luminance is 'x', and takes",
        ),
        ("HotpathVLMLoader", {"model": {"a": 1}}, "^model is {'a': 1}, and must be one of the words"),
        ("HotpathVLM", {"model": [True], "prompt": ["?"]}, r"^model is True, .*\(HOTPATH_VLM\)"),
        (
            "HotpathFacePick",
            {"faces": None, "choose": "largest", "index": 0, "when_none": "skip"},
            "^faces is None, and takes",
        ),
        (
            "HotpathCompare",
            {"image_a": [1, 2], "image_b": {}, "min_ssim": 0.9, "min_cosine": 0.9},
            r"^image_a is \[1, 2\], and",
        ),
    ],
)
def test_what_no_node_gives_is_named(headless_host: Any, node: str, inputs: dict[str, Any], said: str) -> None:
    made = NODE_CLASS_MAPPINGS[node]()
    with pytest.raises(ValueError, match=said) as refused:
        getattr(made, made.FUNCTION)(**inputs)
    assert refused.value.__cause__ is not None, "the log still tells where it broke"


@pytest.mark.parametrize("value", [math.nan, math.inf, [math.nan]])
def test_what_is_no_number_is_refused_before_anything_runs(headless_host: Any, value: Any) -> None:
    """ComfyUI compares NaN with the least and the largest value, and finds nothing wrong with it."""
    node = "HotpathVLM" if isinstance(value, list) else "HotpathColorTransfer"
    made = NODE_CLASS_MAPPINGS[node]()
    name = "temperature" if isinstance(value, list) else "strength"
    with pytest.raises(ValueError, match=f"^{name} is .*, and must be a number") as refused:
        getattr(made, made.FUNCTION)(**{name: value})
    assert refused.value.__cause__ is None, "nothing had begun that could break"


def test_an_error_can_be_written(headless_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a letter in a text that ComfyUI's log cannot write would end its thread, with every prompt that waits."""
    made = NODE_CLASS_MAPPINGS["HotpathCache"]()

    def broken(**_: Any) -> int:
        try:
            raise KeyError("\ud800", 1)
        except KeyError as error:
            raise ValueError("no \ud800 there") from error

    monkeypatch.setattr("hotpath.nodes.cache.clear_all", broken)
    with pytest.raises(ValueError, match=r"^no . there$") as refused:
        made.manage("all")
    assert refused.value.__cause__ is not None and refused.value.__cause__.args == ("\ufffd", 1)


def test_pictures_go_where_those_of_the_host_lie(headless_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --gpu-only ComfyUI's own are on the card, and its nodes join no two that lie apart."""

    class Draws:
        RETURN_TYPES = ("IMAGE", "STRING", "LATENT", "MASK")
        FUNCTION = "draw"

        def draw(self, image: Any = None, shown: bool = False) -> Any:
            made = torch.zeros(1)
            result = (made, "drawn", {"samples": made, "batch_index": [0]}, [made])
            return {"ui": {}, "result": result} if shown else result

    def places(**inputs: Any) -> tuple[str, ...]:
        outcome = Draws().draw(**inputs)
        image, text, latent, (mask,) = outcome["result"] if isinstance(outcome, dict) else outcome
        assert text == "drawn" and latent["batch_index"] == [0]
        return image.device.type, latent["samples"].device.type, mask.device.type

    guard(Draws)
    assert places() == ("cpu",) * 3
    monkeypatch.setattr(headless_host, "picture_device", lambda: torch.device("meta"))
    assert places() == places(shown=True) == places(image=torch.zeros(1, device="meta")) == ("meta",) * 3
    assert places(image=torch.zeros(1)) == ("cpu",) * 3, "a film's frames stay together"
