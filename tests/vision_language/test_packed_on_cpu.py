"""Packed weights on a CPU: which product is made how, that it is right, and that nothing is unpacked whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hotpath.products import int8
from hotpath.vision_language import cpu_kernels, quantization
from hotpath.vision_language.quantization import Int4Linear, Int4OnCpu, pack
from torch import nn

CPU, CARD = torch.device("cpu"), torch.device("cuda")
NEAR = {"int4": 2e-2, "kernel": 2e-2, "bytes": 1e-4, "unpacked": 1e-5}  # of the largest number, by how it is made


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "why_not", lambda method: "not here")
    monkeypatch.setattr(int8, "why_not", lambda: "not here")


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What makes each product from now on: `kernel`, `bytes`, or the dtype of weights that were unpacked."""
    made: list[str] = []

    def of(name: str, work: Any) -> Any:
        return lambda *given: (made.append(name), work(*given))[1]

    monkeypatch.setattr(cpu_kernels, "int8_product", of("kernel", cpu_kernels.int8_product))
    monkeypatch.setattr(cpu_kernels, "int4_product", of("int4", cpu_kernels.int4_product))
    monkeypatch.setattr(quantization, "two_byte_linear", of("bytes", quantization.two_byte_linear))
    monkeypatch.setattr(quantization, "product", of("unpacked", quantization.product))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_int8_products_are_those_of_the_unpacked_weights(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, vnni: bool, bias: bool
) -> None:
    if reason := cpu_kernels.why_not("int8") or (int8.why_not() if vnni else ""):
        pytest.skip(reason)
    if not vnni:
        monkeypatch.setattr(int8, "why_not", lambda: "no VNNI")
    torch.manual_seed(0)
    packed = pack(nn.Linear(128, 192, bias=bias).to(dtype), "int8", CPU)
    made = counted(monkeypatch)
    for rows in (1, 2, 8, 9, 16, 17, 70):
        x = torch.randn(rows, 1, 128).to(dtype)
        of, start, stop = len(made), 64, 160
        whole, part = packed(x), packed.rows(x, start, stop)
        if dtype == torch.float16 and not vnni and rows > 16:
            assert len(made) == of
            how = "unpacked"
        else:
            how = made[of]
            assert set(made[of:]) == {how}
            assert how == ("kernel" if rows <= (8 if vnni else 16) else "bytes" if vnni else "unpacked")
        wanted = F.linear(x.float(), packed.weight.float() * packed.scale.float().unsqueeze(1))
        wanted = wanted if packed.bias is None else wanted + packed.bias.float()
        near = max(NEAR[how], torch.finfo(dtype).eps) * float(wanted.abs().max())
        assert whole.dtype == dtype and whole.shape == (rows, 1, 192)
        torch.testing.assert_close(whole.float(), wanted, atol=near, rtol=0)
        torch.testing.assert_close(part.float(), wanted[..., start:stop], atol=near, rtol=0)


@torch.inference_mode()
def test_int4_on_a_cpu_is_kept_once_as_its_kernel_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := cpu_kernels.why_not("int4"):
        pytest.skip(reason)
    torch.manual_seed(0)
    linear = nn.Linear(128, 320)
    packed, elsewhere = pack(linear, "int4", CPU), pack(linear, "int4", CARD)
    assert type(packed) is Int4OnCpu and type(elsewhere) is Int4Linear
    assert sum(t.nbytes for t in packed.buffers()) <= sum(t.nbytes for t in elsewhere.buffers())
    assert type(pack(nn.Linear(128, 100), "int4", CPU)) is type(pack(nn.Linear(100, 128), "int4", CPU)) is Int4Linear
    made = counted(monkeypatch)
    for rows in (1, 5, 80):
        x = torch.randn(1, rows, 128)
        wanted = F.linear(x, elsewhere._unpacked(torch.eye(128), 0, 320).T, linear.bias)
        near = NEAR["int4"] * float(wanted.abs().max())
        made.clear()
        for layer in (packed, copy.deepcopy(packed)):
            for start, stop in (
                (0, 320),
                (64, 192),
                (192, 320),
                (10, 75),
            ):  # the last is none of the kernel's own parts
                part = layer.rows(x, start, stop)
                torch.testing.assert_close(part, wanted[..., start:stop], atol=near, rtol=0)
                assert torch.equal(part, packed(x)[..., start:stop])
        assert set(made) == {"int4"}


@pytest.mark.parametrize("method", ["int8", "int4", "float8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.inference_mode()
def test_weights_are_unpacked_some_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch, method: str, dtype: torch.dtype
) -> None:
    without_kernels(monkeypatch)
    torch.manual_seed(0)
    packed = pack(nn.Linear(100, 330).to(dtype), method, CPU)
    x = torch.randn(3, 7, 100).to(dtype)
    whole, part = packed(x), packed.rows(x, 30, 310)
    unpacked, parts = type(packed)._unpacked, []
    monkeypatch.setattr(quantization, "NEAR_BYTES", 64 * 4 * 100)
    monkeypatch.setattr(
        type(packed),
        "_unpacked",
        lambda self, x, start, stop: (parts.append(stop - start), unpacked(self, x, start, stop))[1],
    )
    torch.testing.assert_close(packed(x), whole)
    torch.testing.assert_close(packed.rows(x, 30, 310), part)
    assert max(parts) == 64 and sum(parts) == 330 + 280


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_cpu_kernels_are_kept_from_inputs_that_no_vector_fits(method: str) -> None:
    """torch's int8 kernel would read past the weights' end, and crash or give other numbers."""
    torch.manual_seed(0)
    linear, x = nn.Linear(66, 64), torch.randn(2, 66)
    with torch.no_grad():
        assert not cpu_kernels.serves(x)
        assert cpu_kernels.serves(torch.randn(2, 128)) is not bool(cpu_kernels.why_not("int8"))
        torch.testing.assert_close(pack(linear, method, CPU)(x), linear(x), atol=0.2, rtol=0)


def test_a_cpu_whose_int8_kernel_is_slow_unpacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels.platform, "machine", lambda: "AMD64")
    for capability, refused in (("DEFAULT", True), ("AVX2", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        assert ("without AVX2" in cpu_kernels.why_not.__wrapped__("int8")) is refused
        assert "without AVX2" not in cpu_kernels.why_not.__wrapped__("int4")


@pytest.mark.parametrize(
    ("method", "kernel", "vnni", "said"),
    [
        ("int8", "", "", "; oneDNN multiplies its bytes, torch's CPU kernel those of few rows, in bfloat16"),
        ("int8", "slow", "", "; oneDNN multiplies its bytes"),
        ("int8", "", "no", "; few rows by torch's CPU kernel, in bfloat16"),
        ("int8", "slow", "no", "; unpacked for every product: slow"),
        ("int4", "", "no", "; by torch's CPU kernel, in bfloat16"),
        ("int4", "slow", "", "; unpacked for every product: slow"),
        ("float8", "", "", "; unpacked for every product: torch has no kernel for it"),
    ],
)
def test_a_report_says_who_multiplies(
    monkeypatch: pytest.MonkeyPatch, method: str, kernel: str, vnni: str, said: str
) -> None:
    monkeypatch.setattr(cpu_kernels, "why_not", lambda method: kernel)
    monkeypatch.setattr(int8, "why_not", lambda: vnni)
    assert cpu_kernels.told(method, CPU) == said and cpu_kernels.told(method, CARD) == ""
