"""Stop is heard inside what is one call: loading, the vision tower, the prefill; and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hotpath import host
from hotpath.host import Interrupted
from hotpath.vision_language.answering import AnswerOptions, answer
from hotpath.vision_language.interruption import block_lists, interruptible
from hotpath.vision_language.loaded_model import LoadOptions
from hotpath.vision_language.loading import MODELS
from hotpath.vision_language.pictures import from_images
from hotpath.vision_language.prompts import Question
from hotpath.vision_language.sampling import Sampling

QUESTION = Question("what is it?", "", tuple(from_images(torch.rand(1, 64, 64, 3))))
GREEDY = Sampling(False, 0.0, None, None, None, None, seed=1)


class StopAt:
    """Counts the host's questions, and answers the one numbered `at` with a stop."""

    def __init__(self, here: Any, at: int | None = None) -> None:
        self.asked = 0
        self.at = at
        here.check_interrupt = self

    def __call__(self) -> None:
        self.asked += 1
        if self.asked == self.at:
            raise Interrupted("stop")


def hooks(network: torch.nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in network.modules())


def test_loading_asks_for_every_few_weights(llm, headless_host):
    counted = StopAt(headless_host)
    MODELS.get("qwen3_vl", LoadOptions())
    if counted.asked == 0:
        pytest.skip("this transformers has no hook for its bars")
    assert counted.asked > 10
    MODELS.clear()
    StopAt(headless_host, at=5)
    with pytest.raises(Interrupted):
        MODELS.get("qwen3_vl", LoadOptions())
    assert MODELS.loaded() == []
    del headless_host.check_interrupt
    assert MODELS.get("qwen3_vl", LoadOptions()) is not None  # and the next run is none the worse


def test_the_librarys_hook_is_given_back(llm):
    from transformers.utils import logging as library

    if not hasattr(library, "set_tqdm_hook"):
        pytest.skip("this transformers has no hook for its bars")
    seen: list[Any] = []

    def mine(factory: Any, arguments: Any, options: Any) -> Any:
        seen.append(arguments)
        return factory(*arguments, **options)

    before = library.set_tqdm_hook(mine)
    try:
        MODELS.get("qwen3_vl", LoadOptions())
        assert seen, "a hook that was there is still called"
        assert library.set_tqdm_hook(mine) is mine
    finally:
        library.set_tqdm_hook(before)


def test_blocks_of_tower_and_decoder_are_found(load):
    network = load("qwen3_vl").network
    lists = block_lists(network)
    names = {name for name, module in network.named_modules() if any(module is one for one in lists)}
    assert any("visual" in name for name in names) and any("language_model" in name for name in names)


def test_every_block_asks_while_inside_and_none_afterwards(load, headless_host):
    model = load("qwen3_vl")
    blocks = [block for one in block_lists(model.network) for block in one]
    with interruptible(model.network):
        assert hooks(model.network) == len(blocks)
    assert hooks(model.network) == 0
    answer(model, [QUESTION], GREEDY, AnswerOptions(2))
    assert hooks(model.network) == 0


def test_a_stop_in_tower_or_prefill_is_heard_and_leaves_nothing(load, headless_host):
    model = load("qwen3_vl")
    expected = answer(model, [QUESTION], GREEDY, AnswerOptions(2, cache_images=False))[0].text
    counted = StopAt(headless_host)
    answer(model, [QUESTION], GREEDY, AnswerOptions(2, cache_images=False))
    blocks = sum(len(one) for one in block_lists(model.network))
    assert counted.asked >= blocks  # the tower's and the decoder's, each before it runs
    for at in range(1, blocks + 1):
        StopAt(headless_host, at)
        with pytest.raises(Interrupted):
            answer(model, [QUESTION], GREEDY, AnswerOptions(2, cache_images=False))
        assert hooks(model.network) == 0
    del headless_host.check_interrupt
    assert answer(model, [QUESTION], GREEDY, AnswerOptions(2, cache_images=False))[0].text == expected
    assert host.current() is headless_host
