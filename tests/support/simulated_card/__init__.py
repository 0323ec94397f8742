"""A CUDA device that is not there: what runs on a card runs here on the CPU, and what a card would take amiss is raised.

    simulated_card.install()        # before ComfyUI, triton or the pack is imported; for the whole process
    card = simulated_card.card()

Tensors on it are of class `OnCard`: they say `cuda:0` and hold a CPU tensor. Everything else of torch is real, so that the
branches for CUDA run as they stand, among them streams, events, CUDA graphs, pinned copies, memory counting and Triton's
kernels (through its interpreter). What it finds, as a card or a race detector would:

- operators given tensors of two devices, NumPy views of device memory;
- waits of the host (`card.waits`), also as errors under `torch.cuda.set_sync_debug_mode("error")` and within a capture;
- one stream using what another one may still write or read, host memory read before the copy to it was waited for or
  changed before the copy from it was: all of them a `Hazard`. Memory freed while another stream may use it, with no
  `record_stream`, is noted in `card.hazards`;
- graphs: nothing that is recorded runs, what it allocates holds nonsense until the first replay, a replay works on the
  recording's own memory, and one that reads memory which was freed since is a `Hazard`.

What it cannot: speed, the card's own rounding, torch.compile (functions run as they are, and `card.compiled` lists them),
fragmentation of memory.

    streams.py      the card's queues, events, memory and the order between them
    graphs.py       what is recorded, undone and replayed
    operators.py    tensors on the card and every operator on them
    torch_cuda.py   what stands for the functions of torch.cuda
"""

from __future__ import annotations

from .operators import OnCard
from .streams import Card, Hazard, card
from .torch_cuda import install

__all__ = ["Card", "Hazard", "OnCard", "card", "install"]
