"""ColorMNet against the original's numbers, and what its session promises."""

from __future__ import annotations

import gc
import json
import runpy
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hotpath.colorization import colour_space
from hotpath.colorization.batch_size import BatchSize
from hotpath.colorization.checkpoint_file import WrongCheckpoint, key_names, load_network
from hotpath.colorization.colormnet import checkpoint
from hotpath.colorization.colormnet.engine import ColorMNetEngine, ColorMNetFunctions
from hotpath.colorization.colormnet.key_encoder import convolve_enlarged
from hotpath.colorization.colormnet.network import ColorMNet, ColorMNetWidths
from hotpath.colorization.colormnet.session import ColorMNetSession
from hotpath.colorization.colormnet.settings import MODES, ColorMNetSettings
from hotpath.colorization.networks import laid_out
from hotpath.host.errors import is_out_of_memory
from tiny_colorizers import TINY, colormnet_state
from torch import Tensor

DATA = Path(__file__).parent / "data" / "colorization"


def filled(name: str, seed: str) -> dict[str, Tensor]:
    """The weights the original was filled with."""
    fill = runpy.run_path(str(DATA / "fill.py"))["fill"]
    arrays = fill(json.loads((DATA / f"{name}_keys.json").read_text()), seed)
    return {key: torch.from_numpy(value) for key, value in arrays.items()}


def tiny_state() -> dict[str, Tensor]:
    """A small network whose keys differ enough between places for a memory to tell them apart."""
    return colormnet_state("key_proj.key_proj.weight", "decoder.pred.weight")


@pytest.fixture(scope="module")
def network() -> ColorMNet:
    """As on a CPU, where weights of wide layers are kept in another order."""
    built = checkpoint.build(filled("colormnet", "a"))
    laid_out(built)
    return built


@pytest.fixture(scope="module")
def tiny() -> ColorMNet:
    return checkpoint.build(tiny_state())


def lab_of(pictures: np.ndarray[Any, Any]) -> Tensor:
    return colour_space.rgb_to_lab(torch.from_numpy(pictures).movedim(-1, -3).float() / 255)


@pytest.fixture(autouse=True)
def one_thread_no_gradients() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["s1_exemplar", "s2_longterm_pad", "s3_firstframe"])
def test_equals_the_original(network: ColorMNet, name: str) -> None:
    golden = np.load(DATA / f"colormnet_{name}.npz")
    config = json.loads(str(golden["config"]))
    settings = ColorMNetSettings(
        config["mem_every"], config["max_mid_term_frames"], config["min_mid_term_frames"],
        config["num_prototypes"], config["max_long_term_elements"], config["top_k"],
    )  # fmt: skip
    lab, reference = lab_of(golden["frames"]), lab_of(golden["ref"])
    first = name == "s3_firstframe"
    session = ColorMNetSession(network, settings, *lab.shape[-2:], [] if first else [reference])
    given = {0: reference[1:]} if first else {}
    # Frame by frame where the memory's sizes are known, else in windows.
    step = 1 if settings.memory_every == 1 else len(lab)
    chroma, sizes = [], []
    for start in range(0, len(lab), step):
        stop = start + step
        chroma.append(session.colorize(lab[start:stop, :1], given, last=stop >= len(lab)).chroma)
        sizes.append([session.memory.work, session.memory.long])
    out = torch.cat(chroma)
    worst = (out[..., 1::3, 2::3] / 110 - torch.from_numpy(golden["ab"])).abs().max().item()
    assert worst <= 2e-5, f"{worst:.2e}"
    assert sizes == golden["mem_sizes"].tolist()[step - 1 :: step]
    rgb = (colour_space.with_luminance(lab[:, :1], out) * 255).to(torch.uint8).movedim(1, -1)[:, 1::3, 2::3]
    different = rgb.int() - torch.from_numpy(golden["rgb"]).int()
    assert different.abs().max() <= 1
    # A given frame lies on whole numbers, where truncation hangs on the last bit.
    assert (different[int(first) :] != 0).float().mean() < 0.01


def test_published_keys_load_strictly(network: ColorMNet) -> None:
    assert network.widths == ColorMNetWidths()
    with torch.device("meta"):
        keys = set(ColorMNet().state_dict())
    assert keys == {key for key, _, _ in json.loads((DATA / "colormnet_keys.json").read_text())}


@pytest.mark.parametrize("scale", [2, 4])
def test_convolution_of_an_enlargement_equals_both_in_turn(scale: int) -> None:
    conv = torch.nn.Conv2d(5, 7, 3, padding=1).double()
    x = torch.randn(2, 5, 6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(scale))
    direct = conv(torch.nn.functional.interpolate(x, scale_factor=scale, mode="bilinear"))
    torch.testing.assert_close(convolve_enlarged(x, conv, scale), direct, atol=1e-12, rtol=0)


def clip(frames: int, height: int = 40, width: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Smooth moving luminance [T, 1, H, W] in 0..100 and a Lab reference."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(frames, 1, 5, 6, generator=random) * 100
    luminance = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    chroma = torch.randn(2, height, width, generator=random) * 20
    return luminance, torch.cat((luminance[0], chroma))


def test_portions_and_batches_change_nothing(tiny: ColorMNet) -> None:
    luminance, reference = clip(23)
    # Few enough elements to read them all: near ties at the edge of a top 10 are settled by rounding.
    settings = ColorMNetSettings(3, 4, 2, 4, 30, 1000)

    def coloured(portions: list[int], batch: int) -> Tensor:
        session = ColorMNetSession(tiny, settings, 40, 60, [reference], batch)
        return torch.cat([session.colorize(part).chroma for part in luminance.split(portions)])

    whole = coloured([23], 8)
    torch.testing.assert_close(coloured([1] * 23, 1), whole, atol=1e-3, rtol=0)
    torch.testing.assert_close(coloured([2, 9, 12], 2), whole, atol=1e-3, rtol=0)


def test_state_goes_on_where_it_was_taken(tiny: ColorMNet) -> None:
    luminance, reference = clip(20)
    settings = ColorMNetSettings(2, 4, 2, 4, 30, 10)

    def session() -> ColorMNetSession:
        return ColorMNetSession(tiny, settings, 40, 60, [reference])

    whole = session().colorize(luminance).chroma
    first, second = session(), session()
    first.colorize(luminance[:13])
    second.load(first.state())
    assert torch.equal(second.colorize(luminance[13:]).chroma, whole[13:])


def test_stills_are_first_frames(tiny: ColorMNet) -> None:
    luminance, reference = clip(4)
    settings = ColorMNetSettings()
    together = ColorMNetSession(tiny, settings, 40, 60, [reference]).colorize_stills(luminance).chroma
    alone = [ColorMNetSession(tiny, settings, 40, 60, [reference]).colorize(frame[None]).chroma for frame in luminance]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-3, rtol=0)


def test_several_references_stay_and_given_frames_come_back(tiny: ColorMNet) -> None:
    luminance, reference = clip(12)
    other = clip(1, seed=5)[1]
    session = ColorMNetSession(tiny, ColorMNetSettings(1, 4, 2, 4, 30, 10), 40, 60, [reference, other])
    given = torch.full((2, 40, 60), 33.0)
    out = session.colorize(luminance, {7: given})
    torch.testing.assert_close(out.chroma[7], given)
    assert out.confidence.shape == (12, 1, 7, 7) and out.confidence.min() >= 0 and out.confidence.max() <= 1
    # Both references' keys are still the first ones after several compressions.
    start, places = session.memory.boundary, session.memory.places
    assert session.memory.long > 0
    fresh = ColorMNetSession(tiny, session.settings, 40, 60, [reference, other])
    fresh.colorize(luminance[:1])
    assert torch.equal(
        session.memory.key[start : start + 2 * places], fresh.memory.key[fresh.memory.boundary :][: 2 * places]
    )


def test_a_first_frame_that_is_given_stays_beside_the_references(tiny: ColorMNet) -> None:
    luminance, reference = clip(12)
    settings, given = ColorMNetSettings(1, 4, 2, 4, 30, 10), {0: torch.full((2, 40, 60), 33.0)}
    sessions = [ColorMNetSession(tiny, settings, 40, 60, [reference], first_given=True) for _ in range(2)]
    for session, frames in zip(sessions, (1, 12), strict=True):
        session.colorize(luminance[:frames], given)
    (start, places), long = ((s := sessions[1].memory).boundary, s.places), s.long
    assert long > 0
    before, after = (session.memory.value[start : start + 2 * places] for session in sessions)
    assert torch.equal(after, before) and not torch.equal(before[:places], before[places:])


def test_2500_frames_in_constant_memory(tiny: ColorMNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long-term memory, its eviction and usage counts, in one buffer that never grows; over 1,990 frames the
    predecessor of the compatible nodes crashed."""
    luminance, reference = clip(50, 16, 16)
    settings = ColorMNetSettings(5, 4, 2, 8, 60, 10)
    session = ColorMNetSession(tiny, settings, 16, 16, [reference])
    encode, encoded = session.engine.encode_keys, {}

    def encode_once(frames: Tensor, position: Tensor) -> Any:
        """The clip comes 50 times; its keys depend on nothing else."""
        known = frames.numpy().tobytes()
        if known not in encoded:
            encoded[known] = encode(frames, position)
        return encoded[known]

    monkeypatch.setattr(session.engine, "encode_keys", encode_once)
    monkeypatch.setattr(Tensor, "kthvalue", None)  # as on Macs with older releases of torch
    allocated, addresses = session.memory.nbytes, session.memory.value.data_ptr()
    for _ in range(50):
        out = session.colorize(luminance)
        assert session.memory.long <= settings.long_term
        assert session.memory.work < 4 * session.memory.places
    assert session.time == 2500
    # 500 frames were remembered, ten times what fits: without eviction the buffer would have overflown.
    assert session.memory.long > settings.long_term - settings.prototypes
    assert out.chroma.isfinite().all() and out.chroma.std() > 0
    assert (session.memory.nbytes, session.memory.value.data_ptr()) == (allocated, addresses)
    assert session.memory.used[session.memory.filled].sum() > 0
    state_bytes = sum(tensor.nbytes for tensor in session.state().values())
    session.colorize(luminance)
    assert sum(tensor.nbytes for tensor in session.state().values()) <= state_bytes + allocated // 2


@pytest.mark.parametrize("mode", MODES)
def test_memory_modes_hold_the_bytes_they_say(tiny: ColorMNet, mode: str) -> None:
    settings = ColorMNetSettings.for_mode(mode)
    reference = clip(1)[1]
    session = ColorMNetSession(tiny, settings, 40, 60, [reference])
    said = settings.nbytes(session.memory.places, TINY.key, TINY.values.value, 4)
    assert session.memory.nbytes == said
    published = ColorMNetWidths()
    sizes = [
        ColorMNetSettings.for_mode(name).nbytes(1372, published.key, published.values.value, 2)
        for name in ("low_memory", "balanced", "high_quality")
    ]
    assert sizes == sorted(sizes) and sizes[2] > 2 * sizes[0]


def test_bfloat16_stays_near_float32(tiny: ColorMNet) -> None:
    luminance, reference = clip(8)
    half = checkpoint.build(tiny_state()).to(torch.bfloat16)
    full = tiny
    settings = ColorMNetSettings()
    outputs = [ColorMNetSession(n, settings, 40, 60, [reference]).colorize(luminance).chroma for n in (half, full)]
    assert outputs[0].dtype == torch.float32
    assert (outputs[0] - outputs[1]).abs().mean() < 0.1 * outputs[1].abs().mean() + 0.5


def test_tiny_checkpoint_round_trip(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = ColorMNet(replace(TINY, key=6, window=7)).state_dict()
    assert checkpoint.widths_of(state) == replace(TINY, key=6, window=7)
    save_file(state, tmp_path / "mine.safetensors")
    torch.save({"state_dict": state}, tmp_path / "wrapped.pth")
    # Renamed, as people do.
    (tmp_path / "mine.SAFETENSORS").write_bytes((tmp_path / "mine.safetensors").read_bytes())
    (tmp_path / "mine.pth").write_bytes((tmp_path / "mine.safetensors").read_bytes())
    (tmp_path / "wrapped.safetensors").write_bytes((tmp_path / "wrapped.pth").read_bytes())
    for name in ("mine.safetensors", "mine.SAFETENSORS", "mine.pth", "wrapped.pth", "wrapped.safetensors"):
        assert "key_encoder.conv1.weight" in key_names(tmp_path / name)
        loaded = load_network(tmp_path / name, "a ColorMNet checkpoint", checkpoint.build)
        assert loaded.widths.window == 7 and not any(p.requires_grad for p in loaded.parameters())


def test_four_channel_value_stem_is_completed() -> None:
    state = ColorMNet(TINY).state_dict()
    state["value_encoder.conv1.weight"] = state["value_encoder.conv1.weight"][:, :4]
    assert checkpoint.build(state, fold=False).value_encoder.conv1.weight[:, 4].abs().sum() == 0


def test_wrong_files_are_refused_by_name(tmp_path: Path) -> None:
    def refused(name: str, match: str) -> None:
        with pytest.raises(WrongCheckpoint, match=match) as caught:
            load_network(tmp_path / name, "a ColorMNet checkpoint", checkpoint.build)
        assert name in str(caught.value)

    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    refused("other.pth", "is not a ColorMNet checkpoint: it has no 'key_encoder")
    state = ColorMNet(TINY).state_dict()
    torch.save({**state, "decoder.extra.weight": torch.zeros(1)}, tmp_path / "more.pth")
    refused("more.pth", "Unexpected key")
    torch.save(state, tmp_path / "whole.pth")
    (tmp_path / "truncated.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-4000])
    refused("truncated.pth", "truncated")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    refused("empty.safetensors", "cannot be read")
    (tmp_path / "pointer.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused("pointer.pth", "git lfs pull")


def test_sessions_refuse_what_they_cannot_colour(tiny: ColorMNet) -> None:
    luminance, reference = clip(2)
    with pytest.raises(ValueError, match="needs a reference"):
        ColorMNetSession(tiny, ColorMNetSettings(), 40, 60).colorize(luminance)
    with pytest.raises(ValueError, match="colours"):
        ColorMNetSession(tiny, ColorMNetSettings(), 40, 60, [reference]).colorize(luminance[..., :50])
    with pytest.raises(ValueError, match="reference must be Lab"):
        ColorMNetSession(tiny, ColorMNetSettings(), 40, 61, [reference])
    for wrong in ({"most_frames": 5}, {"prototypes": 20000}, {"memory_every": 0}):
        with pytest.raises(ValueError):
            ColorMNetSettings(**wrong)
    with pytest.raises(ValueError, match="no memory mode 'huge'"):
        ColorMNetSettings.for_mode("huge")


@pytest.mark.parametrize("what", ["keys", "surroundings", "readout"])
def test_out_of_memory_halves_the_batch_and_says_so(
    tiny: ColorMNet, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    luminance, reference = clip(11)
    settings = ColorMNetSettings(memory_every=5, top_k=1000)
    expected = ColorMNetSession(tiny, settings, 40, 60, [reference]).colorize(luminance).chroma
    session = ColorMNetSession(tiny, settings, 40, 60, [reference], batch=8)
    place, name = {
        "keys": (session.engine, "encode_keys"),
        "surroundings": (session.engine, "near"),
        "readout": (tiny.decoder, "add_readout"),
    }[what]
    compute = getattr(place, name)

    def scarce(frames: Any, *others: Tensor) -> Any:
        if len(getattr(frames, "skip8", frames)) > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return compute(frames, *others)

    monkeypatch.setattr(place, name, scarce)
    torch.testing.assert_close(session.colorize(luminance).chroma, expected, atol=1e-3, rtol=0)
    assert session.frames_together.size == 1
    assert any("halved from" in note for note in session.notes())


def test_other_errors_are_not_taken_for_memory() -> None:
    def broken(size: int) -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        BatchSize(8, "frames").run(broken)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    for said in (
        "DefaultCPUAllocator: can't allocate memory: you tried",
        "DefaultCPUAllocator: not enough memory: you tried",
        "MPS backend out of memory (MPS allocated: 5.60 GB)",
        "There is not enough GPU video memory available!",
    ):
        assert is_out_of_memory(RuntimeError(said))


def test_graphed_step_is_plain_without_cuda(tiny: ColorMNet) -> None:
    luminance, reference = clip(2)
    session = ColorMNetSession(tiny, ColorMNetSettings(), 40, 60, [reference])
    session.colorize(luminance)
    if not torch.cuda.is_available():
        assert session.engines()["CUDA graph of the decoder"] == "none: CUDA only, this is cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_graph_equals_plain_run_on_the_gpu(tiny: ColorMNet) -> None:
    luminance, reference = clip(23)
    settings = ColorMNetSettings(3, 4, 2, 4, 30, 1000)
    plain = ColorMNetSession(tiny, settings, 40, 60, [reference]).colorize(luminance).chroma
    on_gpu = checkpoint.build(tiny_state()).cuda()
    session = ColorMNetSession(on_gpu, settings, 40, 60, [reference.cuda()])
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        out = session.colorize(luminance.cuda()).chroma.cpu()
    torch.testing.assert_close(out, plain, atol=0.05, rtol=0)
    assert session.engines()["CUDA graph of the decoder"].startswith("captured")


def test_a_network_that_nobody_holds_is_gone_at_once() -> None:
    """Without waiting for Python to look for what holds itself: it may be on a card whose memory is wanted."""
    network = ColorMNet(TINY)
    engine, gone = ColorMNetEngine(ColorMNetFunctions(network)), weakref.ref(network)
    gc.disable()
    try:
        del network, engine
        assert gone() is None
    finally:
        gc.enable()
