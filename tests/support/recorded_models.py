"""Models whose calls are recorded without a GPU: a recording is played by running the recorded function on its own buffers."""

from __future__ import annotations

from typing import Any

from hotpath.patches.compilation import CompileSettings, compile_model, compiler_of
from hotpath.patches.compilation.recording import CallRecorder, record_calls


class Replay:
    """Stands in for a CUDA graph: the same buffers in, the same buffers out."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.output = function()

    def replay(self) -> Any:
        self.output.copy_(self.function())
        return self.output


def recorded(model: Any, record: Any = Replay, **changes: Any) -> tuple[Any, CallRecorder]:
    made, _ = compile_model(model, CompileSettings(mode="reduce-overhead", **changes), backend="eager")
    compiler = compiler_of(made)
    record_calls(made, compiler, record=record)
    assert compiler.recorder is not None
    return made, compiler.recorder
