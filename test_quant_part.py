"""Tests of quant.py. Oracles: comfy-kitchen's eager backend, torchao, torch's dtypes, and enumeration."""
import math
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comfy_kitchen.backends.eager import quantization as ck
from comfy_kitchen.float_utils import to_blocked

import quant

GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # E2M1 by its definition: code -> magnitude
E4M3 = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # the 126 positive scales
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
KINDS = "gaussian, odd, one row, zero blocks, all zero, subnormal, outlier, ties, minus zero".split(", ")


def same_bits(a, b):
    a_bytes, b_bytes = a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    return a.shape == b.shape and torch.equal(a_bytes, b_bytes)


def example(kind, dtype):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(96, 160, generator=g) * 0.02
    if kind == "odd":
        w = torch.randn(133, 77, generator=g)
    elif kind == "one row":
        w = torch.randn(1, 5, generator=g)
    elif kind == "zero blocks":
        w[3:20, 32:96] = 0
    elif kind == "all zero":
        w = torch.zeros(17, 40)
    elif kind == "subnormal":
        w[:, :64] *= torch.finfo(dtype).smallest_normal
        w[0, :16] = torch.finfo(dtype).smallest_normal / 4
    elif kind == "outlier":
        w[5, 7] = 6e4
    elif kind == "ties":
        w = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(16, 4) * 448
        w[:, ::3] *= -1
    elif kind == "minus zero":
        w[2:9, :32] = -0.0
        w[:, 50] = -0.0
    return w.to(dtype)


def error_per_block(w, approximation, block):
    w, approximation = (F.pad(t.double(), (0, -t.shape[1] % block)) for t in (w, approximation))
    return (w - approximation).square().unflatten(-1, (-1, block)).sum(-1)


# E2M1, nibbles, swizzle

def test_e2m1_codes_are_the_sixteen_values():
    values = quant.decode_e2m1(torch.arange(16, dtype=torch.uint8))
    assert torch.equal(values, torch.cat([GRID, -GRID])) and values[8].signbit()
    assert quant.encode_e2m1(values).tolist() == list(range(16))


def test_e2m1_rounds_to_the_nearest_and_ties_to_the_even_code():
    middles = ((GRID[1:] + GRID[:-1]) / 2)
    near = torch.cat([middles.nextafter(torch.tensor(-9.0)), middles, middles.nextafter(torch.tensor(9.0))])
    x = torch.cat([torch.linspace(0, 9, 20001), near, torch.tensor([1e-45, 1e38, math.inf])])
    distance = (x.double().clamp(max=6)[:, None] - GRID.double()).abs()
    nearest = distance == distance.amin(-1, keepdim=True)
    nearest[nearest.sum(-1) == 2] &= torch.arange(8) % 2 == 0
    expected = nearest.int().argmax(-1).to(torch.uint8)
    assert nearest.sum(-1).eq(1).all()
    assert torch.equal(quant.encode_e2m1(x), expected)
    assert torch.equal(quant.encode_e2m1(-x), expected | 8)
    assert torch.equal(quant.round_e2m1(x), GRID[expected.long()])


def test_pack_and_unpack_are_inverses_with_the_even_element_high():
    codes = torch.arange(256, dtype=torch.uint8).repeat_interleave(2).view(16, 32)
    codes[:, ::2] >>= 4
    codes &= 15
    data = quant.pack_e2m1(codes)
    assert data.flatten().tolist() == list(range(256))
    assert torch.equal(quant.unpack_e2m1(data), codes)


@pytest.mark.parametrize("shape", [(128, 4), (1, 1), (130, 3), (300, 9)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float32])
def test_swizzle_is_the_cublas_layout_and_unswizzle_its_inverse(shape, dtype):
    scale = torch.randint(0, 120, shape, dtype=torch.uint8)
    def same_values(got, expected):
        assert got.dtype == dtype
        assert torch.equal(got.to(torch.uint8) if dtype == torch.float32 else got.view(torch.uint8), expected)

    stored = quant.swizzle(scale.to(dtype) if dtype == torch.float32 else scale.view(dtype))
    same_values(stored, to_blocked(scale, flatten=False))
    same_values(quant.unswizzle(stored, *shape), scale)
    same_values(quant.unswizzle(stored.flatten(), *shape), scale)


def test_swizzle_puts_entry_r_c_where_the_format_says():
    scale = torch.arange(128 * 4, dtype=torch.float32).view(128, 4)
    tile = quant.swizzle(scale).view(32, 16)
    for r in range(128):
        for c in range(4):
            assert tile[r % 32, r // 32 * 4 + c] == scale[r, c]


def test_swizzle_refuses_wrong_shapes():
    with pytest.raises(ValueError, match="expected 2-D"):
        quant.swizzle(torch.zeros(4))
    with pytest.raises(ValueError, match=r"got \(128, 4\), expected \(128, 8\)"):
        quant.unswizzle(torch.zeros(128, 4), 96, 5)


# Quantise, against comfy-kitchen

@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_nvfp4_rtn_is_comfy_kitchens_bits(kind, dtype):
    w = example(kind, dtype)
    data, block_scale, tensor_scale = quant.quantize_nvfp4(w)
    expected, expected_scale = ck.quantize_nvfp4(w, tensor_scale, pad_16x=True)
    assert same_bits(data, expected) and same_bits(block_scale, expected_scale)
    assert tensor_scale == w.float().abs().max() / (448 * 6) or (kind == "all zero" and tensor_scale == 1)
    assert same_bits(quant.dequantize_nvfp4(data, block_scale, tensor_scale),
                     ck.dequantize_nvfp4(data, tensor_scale, block_scale, torch.float32))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tensor_scale", [1e-7, 3e-5, 1.0])
def test_nvfp4_rtn_with_a_given_tensor_scale_is_comfy_kitchens_bits(tensor_scale, dtype):
    w = example("gaussian", dtype)  # 1e-7: every block scale saturates; 1.0: most become 0
    data, block_scale, kept = quant.quantize_nvfp4(w, tensor_scale)
    expected, expected_scale = ck.quantize_nvfp4(w, torch.tensor(tensor_scale))
    assert same_bits(data, expected) and same_bits(block_scale, expected_scale)
    assert kept.dtype == torch.float32 and kept.shape == () and kept == torch.tensor(tensor_scale)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_mxfp8_rtn_is_comfy_kitchens_bits(kind, dtype):
    w = example(kind, dtype)
    data, block_scale = quant.quantize_mxfp8(w)
    expected, expected_scale = ck.quantize_mxfp8(w, pad_32x=True)
    assert block_scale.dtype == torch.uint8
    assert same_bits(data, expected) and same_bits(block_scale, expected_scale)
    torch.testing.assert_close(quant.dequantize_mxfp8(data, block_scale.view(torch.float8_e8m0fnu)),
                               ck.dequantize_mxfp8(data, expected_scale, torch.float32),
                               rtol=0, atol=0, equal_nan=True)


def test_mxfp8_scales_at_every_power_of_two_are_comfy_kitchens():
    w = torch.zeros(3 * 277, 32)
    exact = 448 * 2.0 ** torch.arange(-157, 120).double()
    w[:, 5] = torch.cat([exact, exact * (1 + 2 ** -23), exact * (1 - 2 ** -23)]).float().clamp(max=3.4e38)
    w[:, torch.arange(32) != 5] = w[:, 5:6] / 3
    w[w == 0] = 1e-45
    data, block_scale = quant.quantize_mxfp8(w)
    expected, expected_scale = ck.quantize_mxfp8(w, pad_32x=True)
    rows = w.shape[0]
    assert same_bits(data[:rows], expected[:rows]) and same_bits(block_scale, expected_scale)


def test_weights_too_small_for_a_scale_become_zeros_not_nan():
    zero, tiny = torch.zeros(32, 32), torch.zeros(32, 32)
    tiny[0, 0] = 1e-40
    layer, _ = make("mxfp8", 32, 32, mode="emulate", bias=False)
    for w in (zero, tiny, tiny * 1e-5):
        for method in ("rtn", "search"):
            assert (quant.dequantize_nvfp4(*quant.quantize_nvfp4(w, method=method)) - w).abs().max() <= 1e-41
        assert quant.dequantize_mxfp8(*quant.quantize_mxfp8(w, method="search")).abs().max() <= 1e-40
        assert layer(w).eq(0).all()  # an activation; as a weight, "rtn" repeats comfy-kitchen's NaNs


def test_nvfp4_agrees_with_torchao():
    from torchao.prototype.mx_formats import nvfp4_tensor as nvfp4
    w = example("gaussian", torch.float32)
    data, block_scale, tensor_scale = quant.quantize_nvfp4(w)
    theirs = nvfp4.NVFP4Tensor.to_nvfp4(w, per_tensor_scale=tensor_scale).dequantize(torch.float32)
    ours = quant.dequantize_nvfp4(data, block_scale, tensor_scale)
    # torchao multiplies by reciprocals, so a value on a rounding boundary may fall to the other side.
    assert (ours - theirs).abs().gt(1e-6).float().mean() < 1e-3


def test_the_worked_block_of_the_docstring():
    w = torch.zeros(16, 16)
    w[0] = torch.tensor([.0310, -.0120, .0042, 0, -.0475, .0205, .0071, -.0010,
                         .0163, -.0259, .0388, .0095, -.0034, .0127, -.0198, .0060])
    data, block_scale = ck.quantize_nvfp4(w, torch.tensor(0.0002))
    row = " ".join(f"{byte:02X}" for byte in data[0].tolist())
    printed = next(line for line in quant.__doc__.splitlines() if line.strip().startswith("bytes"))
    assert row == " ".join(printed.split()[1:])
    assert f"stored as byte {block_scale.view(torch.uint8)[0, 0].item()}" in quant.__doc__


# Dequantise

def test_every_e2m1_byte_and_e4m3_scale_dequantises_to_the_product():
    data = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(8, 1)      # every byte, eight times
    scale = torch.arange(0, 127, dtype=torch.uint8)
    scale = F.pad(scale, (0, 1)).view(128, 1).repeat(1, 2).view(torch.float8_e4m3fn)
    got = quant.dequantize_nvfp4(data, quant.swizzle(scale), torch.tensor(0.25))
    signed = torch.cat([GRID, -GRID])
    for r in range(128):
        for c in range(16):
            byte, s = int(data[r, c]), float(scale[r, c // 8]) * 0.25
            assert got[r, 2 * c] == signed[byte >> 4] * s and got[r, 2 * c + 1] == signed[byte & 15] * s


def test_every_e8m0_byte_dequantises_to_its_power_of_two():
    bytes_ = torch.arange(256, dtype=torch.uint8).view(256, 1)
    got = quant.dequantize_mxfp8(torch.ones(256, 32).to(torch.float8_e4m3fn), quant.swizzle(bytes_))[:, 0]
    assert got[1:255].tolist() == [2.0 ** (b - 127) for b in range(1, 255)]
    assert got[0] == 0 and not got[255].isfinite()  # byte 0 as comfy-kitchen reads it; 255 is E8M0's NaN


def test_every_e4m3_byte_dequantises_as_torch_casts_it():
    data = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(32, 8).repeat(1, 4)
    got = quant.dequantize_mxfp8(data, quant.swizzle(torch.full((32, 1), 127, dtype=torch.uint8)))
    torch.testing.assert_close(got, data.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantise_crops_and_casts_from_float32(dtype):
    w = example("odd", torch.float32)
    for dequantize, parts in ((quant.dequantize_nvfp4, quant.quantize_nvfp4(w)),
                              (quant.dequantize_mxfp8, quant.quantize_mxfp8(w))):
        got, full = dequantize(*parts, shape=w.shape, dtype=dtype), dequantize(*parts)
        assert got.is_contiguous() and got.dtype == dtype
        assert torch.equal(got, full[:133, :77].to(dtype))
        assert full.shape in ((144, 80), (160, 96)) and full[133:].eq(0).all() and full[:, 77:].eq(0).all()


def test_dequantise_refuses_parts_that_do_not_fit():
    data, block_scale, tensor_scale = quant.quantize_nvfp4(torch.ones(32, 32))
    with pytest.raises(ValueError, match="expected uint8"):
        quant.dequantize_nvfp4(data.int(), block_scale, tensor_scale)
    with pytest.raises(ValueError, match="another layer"):
        quant.dequantize_nvfp4(data, block_scale, tensor_scale, shape=(33, 32))
    with pytest.raises(ValueError, match="expected float8_e4m3fn"):
        quant.dequantize_mxfp8(data, block_scale)
    with pytest.raises(ValueError, match="not swizzled"):
        quant.dequantize_nvfp4(data, block_scale[:64], tensor_scale)


# Search

@pytest.mark.parametrize("kind", ["gaussian", "small blocks", "adversarial"])
def test_nvfp4_search_is_the_best_of_all_126_block_scales(kind):
    g = torch.Generator().manual_seed(1)
    w = torch.randn(256, 128, generator=g)
    if kind == "small blocks":  # scales among E4M3's subnormals
        w *= 10 ** (-5 * torch.rand(256, 128 // 16, generator=g)).repeat_interleave(16, -1)
    elif kind == "adversarial":  # fifteen values on the grid of one scale, the largest outside it
        w = GRID[torch.randint(0, 8, w.shape, generator=g)]
        w *= torch.rand(256, 8, generator=g).repeat_interleave(16, -1)
        w.view(256, 8, 16)[..., 0] *= 1 + torch.rand(256, 8, generator=g)
    w[0, 0] = w.abs().max() * 2
    data, block_scale, tensor_scale = quant.quantize_nvfp4(w, method="search")
    got = error_per_block(w, quant.dequantize_nvfp4(data, block_scale, tensor_scale), 16)
    blocks, middles = w.abs().unflatten(-1, (-1, 16)), (GRID[1:] + GRID[:-1]) / 2
    best = torch.full(blocks.shape[:2], math.inf, dtype=torch.float64)
    for s in E4M3.float() * tensor_scale:
        rounded = GRID[torch.bucketize(blocks / s, middles)] * s
        best = torch.minimum(best, (blocks - rounded).double().square().sum(-1))
    assert (got <= best * (1 + 1e-6)).all()


def test_mxfp8_search_is_the_best_of_the_exponents_around():
    g = torch.Generator().manual_seed(2)
    w = torch.randn(64, 256, generator=g) * 10 ** (-4 * torch.rand(64, 256, generator=g))
    got = error_per_block(w, quant.dequantize_mxfp8(*quant.quantize_mxfp8(w, method="search")), 32)
    blocks = w.unflatten(-1, (-1, 32))
    best = torch.full(blocks.shape[:2], math.inf, dtype=torch.float64)
    for byte in range(100, 140):
        s = 2.0 ** (byte - 127)
        rounded = (blocks / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s
        best = torch.minimum(best, (blocks - rounded).double().square().sum(-1))
    assert torch.equal(got, best)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_search_is_never_worse_than_rtn_in_any_block(kind, dtype):
    w = example(kind, dtype)
    for quantize, dequantize, block in ((quant.quantize_nvfp4, quant.dequantize_nvfp4, 16),
                                        (quant.quantize_mxfp8, quant.dequantize_mxfp8, 32)):
        rtn, search = quantize(w), quantize(w, method="search")
        assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(rtn, search))
        before, after = (error_per_block(w, dequantize(*p, shape=w.shape), block) for p in (rtn, search))
        assert (after <= before.nan_to_num(math.inf)).all()
        if kind == "gaussian" and block == 16:
            assert after.sum() < 0.95 * before.sum()


def test_small_chunks_do_not_change_a_bit(monkeypatch):
    w = example("gaussian", torch.float32)
    whole = [quant.quantize_nvfp4(w, method="search"), quant.quantize_mxfp8(w)]
    monkeypatch.setattr(quant, "_row_chunks", lambda s, _: [slice(i, i + 7) for i in range(0, s[0], 7)])
    for a, b in zip(whole, [quant.quantize_nvfp4(w, method="search"), quant.quantize_mxfp8(w)]):
        assert all(same_bits(x, y) for x, y in zip(a, b))


# Bad inputs

@pytest.mark.parametrize("quantize", [quant.quantize_nvfp4, quant.quantize_mxfp8])
@pytest.mark.parametrize("w, message", [
    (torch.ones(16), r"got shape \(16,\), expected a non-empty \(M, K\)"),
    (torch.ones(2, 16, 16), "expected a non-empty"),
    (torch.ones(0, 16), "expected a non-empty"),
    (torch.ones(16, 16, dtype=torch.int32), "got torch.int32, expected a float dtype"),
    (torch.full((16, 16), math.nan), "got NaN or infinite"),
    (torch.tensor([[1.0, -math.inf]]), "got NaN or infinite"),
    (torch.tensor([[1e300]], dtype=torch.float64), "got NaN or infinite"),
])
def test_quantise_refuses_what_it_cannot_store(quantize, w, message):
    with pytest.raises(ValueError, match=message):
        quantize(w)


def test_quantise_refuses_unknown_methods_and_bad_scales():
    for quantize in (quant.quantize_nvfp4, quant.quantize_mxfp8):
        with pytest.raises(ValueError, match="got method 'best', expected 'rtn'"):
            quantize(torch.ones(16, 16), method="best")
    for bad in (0.0, -1.0, math.nan, math.inf, torch.ones(2)):
        with pytest.raises(ValueError, match="expected one positive number"):
            quant.quantize_nvfp4(torch.ones(16, 16), bad)


# QuantLinear

def stored(fmt, out_features=40, in_features=56, bias=True, seed=0, **marker):
    """The tensors of a layer as a checkpoint holds them, written by comfy-kitchen; and their weight."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(out_features, in_features, generator=g) * 0.05
    tensors = {"bias": torch.randn(out_features, generator=g)} if bias else {}
    if fmt == "nvfp4":
        scale = w.abs().max() / 2688
        data, block_scale = ck.quantize_nvfp4(w, scale, pad_16x=True)
        tensors |= {"weight": data, "weight_scale": block_scale, "weight_scale_2": scale}
        w = ck.dequantize_nvfp4(data, scale, block_scale, torch.float32)
    elif fmt == "mxfp8":
        data, block_scale = ck.quantize_mxfp8(w, pad_32x=True)
        tensors |= {"weight": data, "weight_scale": block_scale.view(torch.uint8)}
        w = ck.dequantize_mxfp8(data, block_scale, torch.float32)
    elif fmt == "float8_e4m3fn":
        scale = w.abs().max() / 448
        tensors |= {"weight": (w / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
        w = tensors["weight"].float() * scale
    else:
        tensors["weight"] = w
    if fmt:
        tensors["comfy_quant"] = quant.write_marker({"format": fmt, "orig_dtype": "torch.bfloat16", **marker})
    return tensors, w[:out_features, :in_features]


def make(fmt, out_features=40, in_features=56, mode=None, compute_dtype=None, extra=None, **kwargs):
    tensors, w = stored(fmt, out_features, in_features, **kwargs)
    layer = quant.QuantLinear.from_tensors("blocks.3.ffn.0", tensors | (extra or {}), in_features,
                                           out_features, mode=mode, compute_dtype=compute_dtype)
    return layer, w


def through_nvfp4(x, scale):
    data, block_scale = ck.quantize_nvfp4(x, scale, pad_16x=True)
    return ck.dequantize_nvfp4(data, scale, block_scale, torch.float32)[:x.shape[0], :x.shape[1]]


FORMATS = ["nvfp4", "mxfp8", "float8_e4m3fn", None]


@pytest.mark.parametrize("fmt", FORMATS)
def test_linear_dequantise_is_an_ordinary_linear_with_the_dequantised_weight(fmt):
    layer, w = make(fmt)
    x = torch.randn(2, 3, 56)
    y = layer(x)
    assert layer.mode == "dequantise" and layer.compute_dtype == torch.float32
    assert y.shape == (2, 3, 40) and y.dtype == torch.float32
    torch.testing.assert_close(y, F.linear(x, w, layer.bias), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.dequantized(torch.float32), w)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_returns_the_dtype_of_its_input(fmt, dtype):
    layer, w = make(fmt, compute_dtype=torch.bfloat16, bias=False)
    x = torch.randn(5, 56).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and layer.bias is None
    torch.testing.assert_close(y.float(), F.linear(x.float(), w), rtol=0.03, atol=0.03)


def test_linear_emulation_is_the_product_of_the_quantised_operands():
    for fmt, in_features in (("nvfp4", 5120), ("mxfp8", 1000), ("nvfp4", 88)):
        layer, w = make(fmt, 48, in_features, mode="emulate")
        x = torch.randn(37, in_features)
        if fmt == "nvfp4":
            a = through_nvfp4(x, x.abs().max() / 2688)
        else:
            a = ck.dequantize_mxfp8(*ck.quantize_mxfp8(x, pad_32x=True), torch.float32)
        expected = a[:37, :in_features].double() @ w.double().T + layer.bias.double()
        error = (layer(x).double() - expected).norm() / expected.norm()
        assert error < 1e-6
        assert (layer(x) - F.linear(x, w, layer.bias)).norm() / expected.norm() > 0.01  # x was rounded


def test_linear_input_scale_is_the_activations_tensor_scale():
    scale = torch.tensor(0.004)
    layer, w = make("nvfp4", mode="emulate", extra={"input_scale": scale})
    x = torch.randn(16, 56)
    expected = F.linear(through_nvfp4(x, scale), w, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(layer(x), make("nvfp4", mode="emulate")[0](x))


def test_linear_without_input_scale_does_not_depend_on_the_activations_range():
    layer, _ = make("nvfp4", mode="emulate", bias=False)
    x = torch.randn(16, 56)
    torch.testing.assert_close(layer(x * 2.0 ** -30) * 2.0 ** 30, layer(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["dequantise", "emulate"])
def test_linear_multiplies_the_input_by_pre_quant_scale(mode):
    smooth = torch.rand(56) + 0.5
    layer, _ = make("nvfp4", mode=mode, extra={"pre_quant_scale": smooth})
    plain, _ = make("nvfp4", mode=mode)
    x = torch.randn(4, 56)
    torch.testing.assert_close(layer(x), plain(x * smooth))
    assert not torch.allclose(layer(x), plain(x))


def test_linear_marked_full_precision_dequantises_in_every_mode():
    for mode in quant.MODES:
        layer, w = make("nvfp4", mode=mode, full_precision_matrix_mult=True)
        x = torch.randn(4, 56)
        assert layer.mode == "dequantise"
        torch.testing.assert_close(layer(x), F.linear(x, w, layer.bias), rtol=1e-5, atol=1e-5)


def test_linear_reads_the_older_fp8_names():
    tensors, w = stored("float8_e4m3fn")
    del tensors["comfy_quant"]
    tensors["scale_weight"] = tensors.pop("weight_scale")
    tensors["scale_input"] = torch.tensor([1.0])
    layer = quant.QuantLinear.from_tensors("shared", tensors, 56, 40)
    assert layer.format == "float8_e4m3fn" and torch.equal(layer.dequantized(torch.float32), w)


def test_linear_reads_scales_as_bytes_or_as_float8():
    for fmt, dtype in (("nvfp4", torch.uint8), ("mxfp8", torch.float8_e8m0fnu)):
        layer, w = make(fmt)
        other, _ = make(fmt, extra={"weight_scale": layer.weight_scale.view(dtype)})
        assert torch.equal(other.dequantized(torch.float32), w)


def test_linear_adds_every_lora_branch_and_keeps_it_out_of_the_state_dict():
    layer, w = make("nvfp4", extra={"pre_quant_scale": torch.full((56,), 2.0)})
    keys, x = set(layer.state_dict()), torch.randn(3, 56)
    base = layer(x)
    branches = [(torch.randn(40, r), torch.randn(r, 56), scale) for r, scale in ((4, 0.5), (8, -2.0))]
    for up, down, scale in branches:
        layer.attach_lora(up, down, scale)
    expected = base + sum(scale * x @ down.T @ up.T for up, down, scale in branches)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert set(layer.state_dict()) == keys and "2 LoRA" in repr(layer)
    with pytest.raises(ValueError, match="or swapped"):
        layer.attach_lora(torch.randn(4, 56), torch.randn(40, 4))


def test_linear_keeps_the_given_tensors_and_their_names():
    for fmt in FORMATS:
        tensors, _ = stored(fmt)
        layer = quant.QuantLinear.from_tensors("x", tensors, 56, 40)
        kept = layer.state_dict()
        assert set(kept) == set(tensors)
        assert all(kept[key].data_ptr() == tensors[key].data_ptr() for key in tensors)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(),
                                  lambda m: m.to("cpu", torch.bfloat16)])
def test_linear_is_never_cast(cast):
    for fmt in FORMATS:
        layer, _ = make(fmt)
        before = {key: value.clone() for key, value in layer.state_dict().items()}
        after = cast(torch.nn.Sequential(layer))[0].state_dict()
        assert {key: value.dtype for key, value in after.items()} == {k: v.dtype for k, v in before.items()}
        assert all(same_bits(after[key], value) for key, value in before.items())


def test_linear_moves_between_devices():
    for fmt in FORMATS:
        layer, _ = make(fmt)
        before = {key: value.dtype for key, value in layer.state_dict().items()}
        layer.to("meta", torch.float16)
        assert all(value.is_meta and value.dtype == before[key] for key, value in layer.state_dict().items())


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("rows", [1, 100, 128, 1950])
@pytest.mark.parametrize("out_features, in_features", [(5120, 5120), (24, 5120), (40, 72), (130, 48), (5, 7)])
def test_scaled_mm_accepts_the_tensor_core_operands(fmt, rows, out_features, in_features):
    """On the meta device torch checks dtypes, strides and the number of scales without a GPU."""
    layer, _ = make(fmt, 24, 24, mode="tensor_cores")
    def up(n, multiple):
        return -(-n // multiple) * multiple

    pad, block, per_byte = (16, 16, 2) if fmt == "nvfp4" else (32, 32, 1)
    m, k = up(out_features, pad), up(in_features, pad)
    layer.out_features, layer.in_features = out_features, in_features
    layer.weight = torch.nn.Parameter(layer.weight.new_empty(m, k // per_byte), requires_grad=False)
    layer.weight_scale = layer.weight_scale.new_empty(up(m, 128), up(k // block, 4))
    layer.bias = None
    layer.to("meta")
    x = torch.empty(rows, in_features, device="meta", dtype=torch.bfloat16)
    *operands, tensor_scale = quant.scaled_mm_operands(x, layer)
    y = torch._scaled_mm(*operands, out_dtype=torch.bfloat16)
    assert y.shape == (up(rows, 128), m) and (tensor_scale is None) == (fmt == "mxfp8")
    assert layer(x).shape == (rows, out_features)
    short = list(operands)
    short[2] = short[2].flatten()[:-4]
    with pytest.raises(RuntimeError):
        torch._scaled_mm(*short, out_dtype=torch.bfloat16)


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("shape", [(3, 40, 56), (130, 24, 48), (1, 16, 7)])
def test_tensor_core_operands_dequantise_to_the_emulated_product(fmt, shape, monkeypatch):
    """forward by tensor cores, with _scaled_mm replaced by what its documentation says it computes."""
    rows, out_features, in_features = shape

    def reference_mm(a, b, scale_a, scale_b, out_dtype):
        def operand(data, scale):
            if fmt == "mxfp8":
                assert scale.dtype == torch.float8_e8m0fnu
                return ck.dequantize_mxfp8(data, scale, torch.float32)
            return ck.dequantize_nvfp4(data.view(torch.uint8), torch.tensor(1.0), scale, torch.float32)
        return operand(a, scale_a) @ operand(b.t(), scale_b).T  # in float32, not out_dtype

    layer, _ = make(fmt, out_features, in_features, mode="tensor_cores",
                    extra={"pre_quant_scale": torch.rand(in_features)})
    x = torch.randn(rows, in_features)
    monkeypatch.setattr(torch, "_scaled_mm", reference_mm)
    got = layer(x)
    layer.mode = "emulate"
    torch.testing.assert_close(got, layer(x), rtol=1e-5, atol=1e-5)


def test_activation_scales_are_those_of_rtn():
    x = torch.randn(128, 64)
    layer, _ = make("nvfp4", in_features=64)
    for got, expected in zip(quant.quantize_activation(x, layer), quant.quantize_nvfp4(x)):
        assert same_bits(got.reshape(-1), expected.reshape(-1))
    layer, _ = make("mxfp8", in_features=64)
    for got, expected in zip(quant.quantize_activation(x, layer), quant.quantize_mxfp8(x)):
        assert same_bits(got, expected)


def test_linear_errors_name_the_tensor_what_was_found_and_what_was_expected():
    def refuse(message, fmt, change, **kwargs):
        tensors, _ = stored(fmt, 256, 256)
        change(tensors)
        with pytest.raises(ValueError, match=message):
            quant.QuantLinear.from_tensors("blocks.3.ffn.0", tensors, 256, 256, **kwargs)

    at = r"blocks\.3\.ffn\.0\."
    refuse(at + r"weight_scale: got \(32, 16\), expected \(256, 16\): swizzled twice", "nvfp4",
           lambda t: t.update(weight_scale=t["weight_scale"][:32]))
    refuse(at + r"weight: got \(128, 128\), expected \(256, 128\)", "nvfp4",
           lambda t: t.update(weight=t["weight"][:128]))
    refuse(at + r"weight_scale: got torch.float32, expected torch.float8_e4m3fn or torch.uint8", "nvfp4",
           lambda t: t.update(weight_scale=t["weight_scale"].float()))
    refuse(at + r"weight_scale_2: got nothing", "nvfp4", lambda t: t.pop("weight_scale_2"))
    refuse(at + r"weight_scale_2: got \(2,\), expected \(\)", "nvfp4",
           lambda t: t.update(weight_scale_2=torch.ones(2)))
    refuse(at + r"weight_scale_2: got a tensor, expected none, as the layer is MXFP8", "mxfp8",
           lambda t: t.update(weight_scale_2=torch.ones(())))
    refuse(at + r"wight: got a tensor, expected none", None, lambda t: t.update(wight=torch.ones(())))
    refuse(at + r"weight: got torch.uint8, expected a float dtype", "nvfp4",
           lambda t: [t.pop(k) for k in ("comfy_quant", "weight_scale", "weight_scale_2")])
    refuse(at + r"bias: got \(255,\), expected \(256,\)", None, lambda t: t.update(bias=torch.ones(255)))
    refuse(at + r"bias: got nothing", None, lambda t: t.pop("bias"), bias=True)
    refuse(at + r"bias: got a tensor, expected none", None, lambda t: None, bias=False)
    refuse(at + r"comfy_quant: got .*int3.*, expected a format out of nvfp4, mxfp8, float8_e4m3fn", "nvfp4",
           lambda t: t.update(comfy_quant=quant.write_marker({"format": "int3"})))
    refuse(at + r"comfy_quant: got no JSON", "nvfp4",
           lambda t: t.update(comfy_quant=torch.tensor([1, 2], dtype=torch.uint8)))
    refuse("got mode 'fast', expected one of tensor_cores", "nvfp4", lambda t: None, mode="fast")


def test_marker_round_trip():
    info = {"format": "nvfp4", "group_size": 16, "orig_shape": [512, 512]}
    marker = quant.write_marker(info)
    assert marker.dtype == torch.uint8 and quant.read_marker(marker) == info
    assert bytes(quant.write_marker({"format": "nvfp4"}).tolist()) == b'{"format": "nvfp4"}'


def test_the_default_mode_on_a_cpu_is_to_dequantise_in_float32():
    assert quant.default_mode("cpu") == "dequantise" and quant.default_dtype("cpu") == torch.float32


def test_describe_counts_layers_by_format():
    wanted = ("nvfp4", "emulate"), ("nvfp4", "emulate"), ("mxfp8", None), (None, None)
    layers = [make(fmt, mode=mode)[0] for fmt, mode in wanted]
    line = quant.describe(torch.nn.Sequential(*layers))
    assert line == "NVFP4 2 layers (emulate), MXFP8 1 layers (dequantise), float32 1 layers"
    assert "56 -> 40, NVFP4, emulate" in repr(layers[0])


# The file by itself, and its speed

def test_quant_alone_in_an_empty_folder_works(tmp_path):
    shutil.copy(Path(quant.__file__), tmp_path)
    code = """
import torch, quant
w = torch.randn(40, 56)
parts = quant.quantize_nvfp4(w)
layer = quant.QuantLinear.from_tensors("l", dict(zip(("weight", "weight_scale", "weight_scale_2"), parts),
    comfy_quant=quant.write_marker({"format": "nvfp4"})), 56, 40)
assert torch.allclose(layer(torch.eye(56)), quant.dequantize_nvfp4(*parts, shape=w.shape).T)
import os, sys
assert os.path.dirname(os.path.realpath(quant.__file__)) == os.path.realpath(os.getcwd())
assert not {"safetensors", "einops", "comfy_kitchen", "torchao", "wan_fp4"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nvfp4_is_three_times_as_fast_as_comfy_kitchen_to_quantise_and_twice_to_dequantise():
    w = torch.randn(5120, 5120).mul_(0.02).bfloat16()
    data, block_scale, scale = quant.quantize_nvfp4(w)

    def ratio(theirs, ours, rounds):
        seconds = {theirs: [], ours: []}
        for _ in range(rounds):
            for run in (theirs, ours, ours):  # alternating, so that a busy machine slows both
                start = time.perf_counter()
                run()
                seconds[run].append(time.perf_counter() - start)
        return statistics.median(seconds[theirs]) / statistics.median(seconds[ours])

    assert ratio(lambda: ck.quantize_nvfp4(w, scale), lambda: quant.quantize_nvfp4(w), 3) >= 3
    assert ratio(lambda: ck.dequantize_nvfp4(data, scale, block_scale, torch.float32),
                 lambda: quant.dequantize_nvfp4(data, block_scale, scale), 7) >= 2
