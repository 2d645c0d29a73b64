"""Weights in 8 and 4 bits: exact out, nearest in. Run: pytest tests/trainer/test_blocks.py."""

from __future__ import annotations

import pytest
import torch
from embertrain.errors import NotFinite, WeightsError
from embertrain.weights.blocks import Scales, dequantise, quantise_fp4, quantise_fp8, scale_shape
from torch import Tensor

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Numbers whose blocks are of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.rand(-(-rows // 64), 1, generator=g).repeat_interleave(64, 0)[:rows]
    return torch.randn(rows, columns, generator=g) * 10 ** (-3 * sizes)


def test_every_fp8_code_times_every_power_of_two_is_a_bf16_number() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = codes[~codes.float().isnan()].repeat(1, 2)[:, :384].contiguous()
    for exponent in range(3, 240):  # of 2 ** (exponent - 127); fp8's largest number is below 2 ** 9
        scale = torch.full((1, 3), exponent, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        out = dequantise(finite, scale)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out.double(), finite.double() * 2.0 ** (exponent - 127))


def test_fp32_scales_give_the_fp32_product() -> None:
    codes, scale = quantise_fp8(weight(300, 200), "fp32")
    out = dequantise(codes, scale)
    assert out.dtype == torch.float32 and scale.shape == (3, 2)
    for row, column in [(0, 0), (127, 127), (128, 0), (299, 199), (200, 130)]:
        expected = codes[row, column].float() * scale[row // 128, column // 128]
        assert out[row, column] == expected


def test_every_fp4_code_is_its_number_and_the_even_column_is_the_low_half() -> None:
    low, high = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="xy")
    codes = (low + 16 * high).flatten().to(torch.uint8).view(torch.int8).view(16, 16)
    scale = torch.full((16, 1), 127 + 3, dtype=torch.uint8)
    out = dequantise(codes, scale)
    table = torch.tensor([*E2M1, *(-x for x in E2M1)])
    assert torch.equal(out[:, 0::2].float(), 8 * table[low])
    assert torch.equal(out[:, 1::2].float(), 8 * table[high])


@pytest.mark.parametrize("scales", ["fp32", "e8m0"])
@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (300, 200), (1100, 40)])
def test_fp8_is_within_half_a_step(scales: Scales, shape: tuple[int, int]) -> None:
    x = weight(*shape)
    codes, scale = quantise_fp8(x, scales)
    assert scale.shape == scale_shape(shape, fp4=False)
    out = dequantise(codes, scale).float()
    wide = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    # Three bits of mantissa; below the smallest normal number, 2 ** -6, steps of 2 ** -9.
    assert bool(((out - x).abs() <= torch.maximum(x.abs() * 2.0**-4, wide * 2.0**-10) * 1.0001).all())
    if scales == "fp32":
        assert torch.equal(codes.float().abs().amax(), torch.tensor(448.0))


@pytest.mark.parametrize("shape", [(1, 32), (40, 96), (1030, 64)])
def test_fp4_is_the_nearest_number_and_the_scale_the_smallest_that_fits(shape: tuple[int, int]) -> None:
    x = weight(*shape)
    codes, scale = quantise_fp4(x)
    out = dequantise(codes, scale).float()
    wide = scale.float().repeat_interleave(32, 1)
    table = torch.tensor([*E2M1, *(-n for n in E2M1)])
    nearest = (x[..., None] - wide[..., None] * table).abs().amin(-1)
    assert torch.equal((x - out).abs(), nearest)
    largest = x.unflatten(1, (-1, 32)).abs().amax(-1)
    assert bool((largest <= 6 * scale.float()).all() and (largest > 3 * scale.float()).all())


def test_ties_go_to_the_even_code() -> None:
    x = torch.zeros(1, 32)
    x[0, :9] = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.75])
    out = dequantise(*quantise_fp4(x))
    assert out[0, :9].tolist() == [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -1.0]


def test_what_came_out_goes_in_again_unchanged() -> None:
    x = weight(260, 256)
    once = dequantise(*quantise_fp8(x, "e8m0"))
    assert torch.equal(dequantise(*quantise_fp8(once, "e8m0")), once)
    once = dequantise(*quantise_fp4(x))
    assert torch.equal(dequantise(*quantise_fp4(once)), once)


def test_zeros_and_signs_of_zero_are_kept() -> None:
    x = torch.tensor([[0.0, -0.0] * 16])
    for out in (
        dequantise(*quantise_fp8(x, "e8m0")),
        dequantise(*quantise_fp8(x, "fp32")),
        dequantise(*quantise_fp4(x)),
    ):
        assert torch.equal(torch.signbit(out), torch.signbit(x)) and not out.any()


def test_any_dtype_can_be_asked_for() -> None:
    codes, scale = quantise_fp8(weight(130, 130), "fp32")
    out = dequantise(codes, scale, torch.empty(130, 130, dtype=torch.bfloat16))
    assert torch.equal(out, dequantise(codes, scale).to(torch.bfloat16))


def test_what_cannot_be_quantised_is_told() -> None:
    with pytest.raises(NotFinite):
        quantise_fp8(torch.tensor([[float("nan")]]), "fp32")
    with pytest.raises(WeightsError, match="multiple of 32 columns, not 33"):
        quantise_fp4(torch.zeros(1, 33))
    codes, scale = quantise_fp8(weight(256, 128), "fp32")
    with pytest.raises(WeightsError, match=r"a weight of \[256, 128\] cannot have scales of \[1, 1\]"):
        dequantise(codes, scale[:1])


@pytest.mark.parametrize("fp4", [False, True])
def test_transformers_reads_the_same(fp4: bool) -> None:
    theirs = pytest.importorskip("transformers.integrations.finegrained_fp8").Fp8Dequantize(None)
    for codes, scale in [quantise_fp4(weight(64, 128))] if fp4 else [
        quantise_fp8(weight(256, 128), "fp32"), quantise_fp8(weight(256, 128), "e8m0")
    ]:  # fmt: skip
        assert torch.equal(theirs._dequantize_one(codes, scale), dequantise(codes, scale))
