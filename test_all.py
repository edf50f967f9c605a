"""The tests of the core, in the order of the files they test. extra/test_extra.py has those of extra/.

Oracles are other people's libraries (comfy-kitchen, diffusers, transformers, pillow, safetensors) or mathematics.
Nothing here needs a GPU, nor extra/.
"""
import ast
import contextlib
import ctypes
import functools
import html
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import types
import unicodedata
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import ftfy
import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from comfy_kitchen.backends.eager import quantization as ck
from comfy_kitchen.float_utils import to_blocked
from PIL import Image, ImageCms, ImageOps
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

import convert
import quant
import sample
import wan_fp4

REPOSITORY = Path(__file__).resolve().parent
DEMO = REPOSITORY / "demo"
# The most bytes that a process has held; getrusage's figure begins with the parent's.
PEAK = """
def peak():
    return 1024 * next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
"""

# The demo model, which may be trained anew
PHOTO = DEMO / "cat.png"
PROMPT, OTHER_PROMPT = "jump", "slide left"  # its default, and another that it was trained on


def fails(main, argv, text, code=2):
    """main(argv) exits with `code` after one line on stderr, in which the regex `text` is found."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in argv])
    line = stderr.getvalue()
    assert stop.value.code == code and line.count("\n") == 1 and re.search(text, line), line


PROCESSES = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
PROCESSES.set_forkserver_preload(["torch", "torch.distributed.run", "av", "sentencepiece"])  # once for all
CHILD = """
import os, sys, torch
os.environ |= own
os.chdir(cwd)
sys.argv, sys.path[:] = ["program", *argv], [cwd, *(path for path in sys.path if path != repository)]
for number, file in enumerate(files, 1):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
torch.set_num_threads(1)
"""


def run_processes(code, *argv, cwd=REPOSITORY, environments=({},)):
    """Run the program in a process for each environment, all at once: their exit codes, what each prints, and
    what each writes to stderr."""
    names, processes = {"argv": [*map(str, argv)], "cwd": str(cwd), "repository": str(REPOSITORY)}, []
    with tempfile.TemporaryDirectory() as folder:
        files = [[Path(folder) / f"{i} {stream}" for stream in ("out", "err")] for i in range(len(environments))]
        for own, pair in zip(environments, files):
            given = names | {"own": own, "files": pair}
            processes.append(PROCESSES.Process(target=exec, args=(CHILD + code, given)))
            processes[-1].start()
        for process in processes:
            process.join(120)
            process.kill()
            process.join()
        printed, errors = zip(*([file.read_text() for file in pair] for pair in files))
        return [process.exitcode for process in processes], printed, errors


def run_python(code, *argv, cwd=REPOSITORY):
    """What the program prints, run in a process of its own."""
    codes, (printed,), (errors,) = run_processes(code, *argv, cwd=cwd)
    assert codes == [0], errors
    return printed


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def decibels(exact, other):
    """Signal-to-noise ratio."""
    return -20 * math.log10(relative_error(other.double(), exact.double()))


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
    """The groups of a regex's one match in the docstring, from the worked block on."""
    (found,) = re.findall(pattern, quant.__doc__.split("worked\n")[1])
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


def test_the_examples_of_the_docstring_run():
    linear, x = torch.nn.Linear(32, 48).requires_grad_(False), torch.randn(3, 32)
    names = vars(quant) | {"linear": linear, "w": linear.weight, "x": x}
    for example in re.findall(r"\n\n((?:    .+ = .+\n)+)", quant.__doc__.split("NVFP4 in one equation")[0]):
        exec(textwrap.dedent(example), names)
    assert names["w_again"].shape == (48, 32) and decibels(linear.weight, names["w_again"]) > 18
    torch.testing.assert_close(names["y"], F.linear(x, names["w_again"], linear.bias))


# E2M1, nibbles, swizzle

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
def test_nvfp4_rtn_is_comfy_kitchens_bits(kind, dtype):
    w = example(kind, dtype)
    for given in (None, 1e-7, 3e-5, 1.0):  # 1e-7: block scales saturate; 1.0: most are 0
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
    data, block_scale = quant.quantize_mxfp8(w, method="search")
    assert quant.dequantize_mxfp8(data, block_scale).abs().max() <= 1e-40
    assert block_scale.count_nonzero() == (value != 0)  # a block of zeros has scale 0
    for fmt in "nvfp4", "mxfp8":  # an activation; as a weight, "rtn" repeats comfy-kitchen's NaN
        assert make(fmt, 32, 32, mode="emulate", bias=False)[0](w).abs().max() <= 1e-39
    assert torch.equal(quant.dequantize_mxfp8(*quant.quantize_mxfp8(w)).isnan(), (w == 0) & w[:, :1].ne(0))


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


# The fast paths give the bits of the plain forms

@pytest.fixture
def seven_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(quant, "row_chunks", lambda n, *_: [slice(i, min(i + 7, n)) for i in range(0, n, 7)])


@every_example
def test_quantize_by_chunks_gives_the_plain_bits(kind, dtype, seven_rows_at_a_time):
    w = example(kind, dtype)
    for method in ("rtn", "search"):
        data, scale, tensor_scale = quant.plain_nvfp4(quant.pad_to(w, 16, 16), None, method)
        assert all_same_bits(quant.quantize_nvfp4(w, method=method), (data, quant.swizzle(scale), tensor_scale))
        data, scale = quant.plain_mxfp8(quant.pad_to(w, 32, 32), method)
        assert all_same_bits(quant.quantize_mxfp8(w, method=method), (data, quant.swizzle(scale)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize_by_tables_gives_the_plain_bits(dtype, seven_rows_at_a_time):
    w = example("gaussian", torch.float32)
    data, block_scale, tensor_scale = quant.plain_nvfp4(w)
    plain = quant.decode_nvfp4(data, tensor_scale * block_scale.float()).to(dtype)
    assert same_bits(quant.dequantize_nvfp4(data, quant.swizzle(block_scale), tensor_scale, dtype=dtype), plain)
    data, block_scale = quant.plain_mxfp8(w)
    plain = quant.decode_mxfp8(data, quant.decode_e8m0(block_scale)).to(dtype)
    assert same_bits(quant.dequantize_mxfp8(data, quant.swizzle(block_scale), dtype=dtype), plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("fmt, tensor_scale, columns, two_pass", [
    ("nvfp4", None, 96, False), ("mxfp8", None, 96, False), ("nvfp4", 0.0003, 96, True)])
def test_activations_get_the_plain_bits_by_chunks_and_compiled(fmt, tensor_scale, columns, two_pass,
                                                               seven_rows_at_a_time):
    """On a CPU; not yet run with Triton on a GPU."""
    x = torch.randn(250, columns).bfloat16()
    x[3], x[5] = 0, -0.0
    x[4] *= 1e-38
    scale = None if tensor_scale is None else torch.tensor(tensor_scale)
    with torch.inference_mode():
        if fmt == "mxfp8":
            expected = *quant.plain_mxfp8(x, "rtn", 448 * 2.0 ** -127), None
        elif two_pass:
            first, first_scale, second, second_scale = quant.plain_two_pass(x, scale)
            expected = first, first_scale, scale, second, second_scale, scale / 6
        else:
            expected = quant.plain_nvfp4(x, scale)
        for quantize in quant.quantize_rows, quant.compiled(quant.quantize_rows.__wrapped__):
            assert all_same_bits(sum(quantize(x, fmt, scale, two_pass), ()), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_activations_compile_per_width_for_any_number_of_rows(monkeypatch):
    """The 14B's Linears in one run, some with input_scale; torch runs more than eight variants uncompiled."""
    variants, compile_with = [], torch.compile

    def backend(graph, inputs):
        variants.append(inputs)
        return graph.forward
    monkeypatch.setattr(torch, "compile", lambda f, options: compile_with(f, backend=backend))
    torch._dynamo.reset()  # variants of other tests count too
    quantize = quant.compiled.__wrapped__(quant.quantize_rows.__wrapped__)
    scale = torch.empty(1, device="meta")
    for columns, rows in itertools.product((5120, 13824), (32760, 128, 257)):
        x = torch.empty(rows, columns, dtype=torch.bfloat16, device="meta")
        for fmt, given, two_pass in (("nvfp4", None, False), ("nvfp4", scale, False), ("nvfp4", scale, True),
                                     ("mxfp8", None, False)):
            assert quantize(x, fmt, given, two_pass)[0][0].shape[0] == rows
    assert len(variants) == 2 * 4  # two widths, four ways
    assert not any(isinstance(tensor, float) for inputs in variants for tensor in inputs)


@pytest.mark.parametrize("gradients, triton, compiles", [(False, True, True), (True, True, False),
                                                         (False, False, False)])
def test_elementwise_functions_on_cuda_are_compiled_where_they_can_be(gradients, triton, compiles, monkeypatch):
    """A compiled function propagates gradients only once, and convert.py --calib needs several draws."""
    class OnCuda(torch.Tensor):
        is_cuda = True

    used = []
    monkeypatch.setattr(quant, "compiled", lambda function: used.append(function) or function)
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: triton)
    monkeypatch.setattr(quant, "has_compiler", quant.has_compiler.__wrapped__)
    x = torch.randn(1, 60, 96).as_subclass(OnCuda).requires_grad_(gradients)
    with contextlib.nullcontext() if triton else pytest.warns(UserWarning, match="pip install triton-windows"):
        y = wan_fp4.layer_norm(x, torch.ones(96), torch.zeros(96), torch.bfloat16)
    assert y.requires_grad == gradients and bool(used) == compiles


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


def make(fmt, out_features=40, in_features=56, extra=None, bias=True, seed=0, marker=(), **kwargs):
    """A layer with these tensors and `extra`, and its weight; kwargs go to from_tensors."""
    tensors, w = stored(fmt, out_features, in_features, bias, seed, **dict(marker))
    layer = quant.QuantLinear.from_tensors("blocks.3.ffn.0", tensors | (extra or {}), in_features, out_features,
                                           **kwargs)
    return layer, w


def through_nvfp4(x, scale=None):
    """x rounded by comfy-kitchen."""
    scale = x.abs().max() / 2688 if scale is None else scale
    data, block_scale = ck.quantize_nvfp4(x, scale, pad_16x=True)
    return ck.dequantize_nvfp4(data, scale, block_scale, torch.float32)[:x.shape[0], :x.shape[1]]


def through_mxfp8(x):
    rounded = ck.dequantize_mxfp8(*ck.quantize_mxfp8(x, pad_32x=True), torch.float32)
    return rounded[:x.shape[0], :x.shape[1]]


def through_two_passes(x, scale=None):
    """The first pass, and what it lost on a scale that is a sixth of it."""
    scale = x.abs().max() / 2688 if scale is None else scale
    first = through_nvfp4(x, scale)
    return first + through_nvfp4(x - first, scale / 6)


@pytest.fixture(params=["nvfp4", "mxfp8", "float8_e4m3fn", None])
def fmt(request):
    return request.param


FIXED, SMOOTH, EXACT = torch.tensor(0.004), torch.linspace(0.5, 2, 88), {"full_precision_matrix_mult": True}
PRODUCTS = {  # the layer; what becomes of x before it meets the weight
    "plain": (dict(fmt=None), lambda x: x), "FP8": (dict(fmt="float8_e4m3fn"), lambda x: x),
    "NVFP4": (dict(fmt="nvfp4"), lambda x: x), "MXFP8": (dict(fmt="mxfp8"), lambda x: x),
    "W4A4": (dict(fmt="nvfp4", mode="emulate"), through_nvfp4),
    "W4A4, in float32 always": (dict(fmt="nvfp4", mode="emulate", compute_dtype=torch.float16), through_nvfp4),
    "W8A8": (dict(fmt="mxfp8", mode="emulate"), through_mxfp8),
    "two passes": (dict(fmt="nvfp4", mode="emulate", two_pass=True), through_two_passes),
    "two passes are of NVFP4 only": (dict(fmt="mxfp8", mode="emulate", two_pass=True), through_mxfp8),
    "input_scale": (dict(fmt="nvfp4", mode="emulate", extra={"input_scale": FIXED}),
                    lambda x: through_nvfp4(x, FIXED)),
    "input_scale, two passes": (dict(fmt="nvfp4", mode="emulate", two_pass=True, extra={"input_scale": FIXED}),
                                lambda x: through_two_passes(x, FIXED)),
    "input_scale, W4A16": (dict(fmt="nvfp4", extra={"input_scale": FIXED}), lambda x: x),
    "input_scale, W8A8": (dict(fmt="mxfp8", mode="emulate", extra={"input_scale": FIXED}), through_mxfp8),
    "input_scale, FP8": (dict(fmt="float8_e4m3fn", extra={"input_scale": FIXED}), lambda x: x),
    "pre_quant_scale": (dict(fmt="nvfp4", extra={"pre_quant_scale": SMOOTH}), lambda x: x * SMOOTH),
    "pre_quant_scale, W4A4": (dict(fmt="nvfp4", mode="emulate", extra={"pre_quant_scale": SMOOTH}),
                              lambda x: through_nvfp4(x * SMOOTH)),
    "marked W4A16": (dict(fmt="nvfp4", mode="emulate", marker=EXACT), lambda x: x),
    "marked W4A16 on tensor cores": (dict(fmt="nvfp4", mode="tensor_cores", marker=EXACT), lambda x: x),
    "marked W8A16": (dict(fmt="mxfp8", mode="emulate", marker=EXACT), lambda x: x)}


@pytest.mark.parametrize("case", PRODUCTS)
def test_a_layer_multiplies_by_its_weight_what_its_format_makes_of_x(case):
    options, rounded = PRODUCTS[case]
    layer, w = make(out_features=48, in_features=88, **options)
    x = torch.randn(2, 19, 88, generator=torch.Generator().manual_seed(1))
    y, expected = layer(x), rounded(x.flatten(0, 1)).double() @ w.double().T + layer.bias.double()
    assert y.shape == (2, 19, 48) and y.dtype == torch.float32
    assert relative_error(y.double(), expected.view(y.shape)) < 1e-6
    assert torch.equal(layer.dequantized(torch.float32), w)


@pytest.mark.parametrize("fmt, dtype", [("nvfp4", torch.uint8), ("mxfp8", torch.float8_e8m0fnu)])
def test_scales_may_be_bytes_or_float8(fmt, dtype):
    layer, w = make(fmt)
    other = layer.weight_scale.view(dtype)
    assert torch.equal(make(fmt, extra={"weight_scale": other})[0].dequantized(torch.float32), w)
    parts = [t for t in (layer.weight, other, layer.weight_scale_2) if t is not None]
    assert torch.equal(getattr(quant, f"dequantize_{fmt}")(*parts, shape=(40, 56)), w)


@pytest.mark.parametrize("fmt, least", [("nvfp4", 19.5), ("mxfp8", 30)])
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_quantizes_a_linear(fmt, least, bias):
    linear = torch.nn.Linear(200, 72, bias=bias).requires_grad_(False)
    layer = quant.QuantLinear.from_linear(linear, fmt)
    assert decibels(linear.weight, layer.dequantized(torch.float32)) > least
    stored = getattr(quant, f"quantize_{fmt}")(linear.weight)
    assert same_bits(layer.weight, stored[0]) and same_bits(layer.weight_scale, stored[1])
    x = torch.randn(5, 200)
    torch.testing.assert_close(layer(x), F.linear(x, layer.dequantized(torch.float32), linear.bias))
    options = dict(method="search", compute_dtype=torch.bfloat16, mode="emulate", two_pass=True)
    other = quant.QuantLinear.from_linear(linear, fmt, **options)
    assert decibels(linear.weight, other.dequantized(torch.float32)) > least + 0.1
    assert (other.compute_dtype, other.mode, other.two_pass) == (torch.bfloat16, "emulate", fmt == "nvfp4")


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_layer_returns_the_dtype_and_the_shape_of_its_input(fmt, dtype):
    layer, w = make(fmt, compute_dtype=torch.bfloat16, bias=False)
    for shape in (5, 56), (0, 56), (56,), (2, 1, 3, 56):
        x = torch.randn(shape).to(dtype)
        y = layer(x)
        assert y.dtype == dtype and y.shape == (*shape[:-1], 40)
        torch.testing.assert_close(y.float(), F.linear(x.float(), w), rtol=0.03, atol=0.03)
        assert make(fmt, mode="emulate")[0](x).shape == y.shape


@pytest.mark.parametrize("shape", [(5, 56), (2, 3, 56), (0, 56), (56,)])
def test_a_layer_computes_the_same_with_gradients_and_without(fmt, shape):
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


@pytest.mark.parametrize("fmt, input_scale, nan_rows",
                         [("nvfp4", None, 4), ("nvfp4", 0.01, 1), ("mxfp8", None, 1)])
def test_nan_in_an_activation_stays_nan_in_its_row_or_everywhere(fmt, input_scale, nan_rows):
    layer, _ = make(fmt, extra={"input_scale": torch.tensor(input_scale)} if input_scale else {}, mode="emulate")
    x = torch.randn(4, 56)
    x[2, 40] = math.nan
    nan = layer(x).isnan()
    assert nan[2].all() and nan.all(1).sum() == nan.any(1).sum() == nan_rows


def test_a_layer_adds_every_lora_branch_outside_the_state_dict():
    layer, w = make("nvfp4", extra={"pre_quant_scale": torch.full((56,), 2.0)})
    keys, x = set(layer.state_dict()), torch.randn(3, 56)
    base = layer(x)
    branches = [(torch.randn(40, r), torch.randn(r, 56), scale) for r, scale in ((4, 0.5), (8, -2.0))]
    for up, down, scale in branches:
        layer.attach_lora(up, down, scale)
    expected = base + sum(scale * x @ down.T @ up.T for up, down, scale in branches)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert set(layer.state_dict()) == keys and "2 LoRA" in repr(layer)


def test_a_layer_keeps_the_given_tensors_and_their_names(fmt):
    tensors, _ = stored(fmt)
    kept = quant.QuantLinear.from_tensors("x", tensors, 56, 40).state_dict()
    assert set(kept) == set(tensors)
    assert all(kept[key].data_ptr() == tensors[key].data_ptr() for key in tensors)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(),
                                  lambda m: m.to("cpu", torch.bfloat16), lambda m: m.to("meta", torch.float16)])
def test_a_layer_moves_but_is_never_cast(fmt, cast):
    layer, _ = make(fmt)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    moved = cast(torch.nn.Linear(1, 1)).weight.device.type
    after = cast(torch.nn.Sequential(layer))[0].state_dict()
    assert all(value.dtype == before[key].dtype and value.device.type == moved for key, value in after.items())
    assert moved == "meta" or same_tensors(after, before)


def test_what_a_layer_computes_follows_it_to_its_device(monkeypatch):
    """Unless it was given, or the layer's marker says W4A16. The meta device stands for a GPU."""
    for name, value in (("mode", "tensor_cores"), ("dtype", torch.bfloat16)):
        there, here = value, getattr(quant, f"default_{name}")("cpu")
        monkeypatch.setattr(quant, f"default_{name}", lambda device, there=there, here=here:
                            there if torch.device(device).type == "meta" else here)
    for layer, mode, dtype in (
            (make("nvfp4")[0], "tensor_cores", torch.bfloat16), (make(None)[0], "dequantize", torch.bfloat16),
            (make("nvfp4", mode="emulate", compute_dtype=torch.float16)[0], "emulate", torch.float16),
            (make("nvfp4", marker=EXACT)[0], "dequantize", torch.bfloat16)):
        layer.to("meta")
        assert (layer.mode, layer.compute_dtype) == (mode, dtype)


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("rows", [1, 130])
@pytest.mark.parametrize("out_features, in_features", [(5120, 13824), (24, 5120), (130, 48), (5, 7)])
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
    assert y.shape == (rows, -(-out_features // quant.BLOCK[fmt]) * quant.BLOCK[fmt])
    assert (tensor_scale is None) == (fmt == "mxfp8") and layer(x).shape == (rows, out_features)
    operands[2] = operands[2].flatten()[:-4]  # too few scales
    with pytest.raises(RuntimeError):
        torch._scaled_mm(*operands, out_dtype=torch.bfloat16)


@pytest.mark.parametrize("fmt, two_pass", [("nvfp4", False), ("mxfp8", False), ("nvfp4", True)])
@pytest.mark.parametrize("shape", [(3, 40, 56), (130, 24, 48), (1, 16, 7)])
def test_tensor_core_operands_give_the_emulated_product(fmt, two_pass, shape, monkeypatch):
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
    layer, _ = make(fmt, out_features, in_features, mode="tensor_cores", extra=smooth, two_pass=two_pass)
    x = torch.randn(rows, in_features)
    monkeypatch.setattr(torch, "_scaled_mm", reference_mm)
    got = layer(x)
    assert layer(x[:0]).shape == (0, out_features)
    layer.mode = "emulate"
    torch.testing.assert_close(got, layer(x), rtol=1e-5, atol=1e-5)


def test_layers_of_one_input_quantize_it_once_for_each_format(monkeypatch):
    own = {"input_scale": torch.tensor(0.01)}, {"pre_quant_scale": torch.linspace(0.5, 2, 56)}  # not shared
    kinds = [("nvfp4", None)] * 2 + [("mxfp8", None)] * 2 + [("nvfp4", extra) for extra in own]
    layers = [make(fmt, mode="emulate", seed=seed, extra=extra)[0] for seed, (fmt, extra) in enumerate(kinds)]
    layers += [make("nvfp4", mode="emulate", seed=seed, two_pass=True)[0] for seed in (6, 7)]
    x, seen, real = torch.randn(3, 56), [], quant.quantize_activation
    expected = [layer(x) for layer in layers]
    monkeypatch.setattr(quant, "quantize_activation", lambda *args: seen.append(args[1].format) or real(*args))
    assert all_same_bits(quant.project(x, *layers), expected)
    assert seen == ["nvfp4", "mxfp8", "nvfp4", "nvfp4", "nvfp4"]


@pytest.mark.parametrize("capability, mode, dtype", [
    ((7, 0), "dequantize", torch.float16), ((7, 5), "dequantize", torch.float16),
    ((8, 0), "dequantize", torch.bfloat16), ((8, 6), "dequantize", torch.bfloat16),
    ((8, 9), "dequantize", torch.bfloat16), ((9, 0), "dequantize", torch.bfloat16),
    ((10, 0), "tensor_cores", torch.bfloat16), ((10, 3), "tensor_cores", torch.bfloat16),
    ((12, 0), "tensor_cores", torch.bfloat16), ((12, 1), "tensor_cores", torch.bfloat16)])
def test_what_each_gpu_computes_by_default(capability, mode, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    for device in "cuda", torch.device("cuda:1"):
        assert quant.capability(device) == capability
        assert quant.default_mode(device) == mode and quant.default_dtype(device) == dtype
    monkeypatch.setattr(torch.version, "hip", "6.4")  # an AMD GPU, whatever number it gives
    assert quant.default_mode("cuda") == "dequantize" and quant.default_dtype("cuda") == torch.bfloat16
    assert quant.default_mode("cpu") == "dequantize" and quant.default_dtype("cpu") == torch.float32


def test_describe_counts_layers_by_format():
    """Two passes are only of NVFP4, and only where activations are quantized."""
    wanted = *[("nvfp4", "emulate", True)] * 2, ("mxfp8", "emulate", True), ("nvfp4", None, True), (None,) * 3
    layers = [make(fmt, mode=mode, two_pass=two_pass)[0] for fmt, mode, two_pass in wanted]
    line = quant.describe(torch.nn.Sequential(*layers, torch.nn.Linear(2, 2).half()))
    assert line == ("NVFP4 2 layers (emulate, two passes), MXFP8 1 layers (emulate), "
                    "NVFP4 1 layers (dequantize), float32 1 layers, float16 1 layers")
    assert "56 -> 40, NVFP4, emulate" in repr(layers[0])


# Refusals: each names the place, and says what it got and what it expected

BLOCKS = quant.quantize_nvfp4(torch.ones(32, 32))
OCTETS = quant.quantize_mxfp8(torch.ones(32, 32))


def layer_of(fmt, change, **kwargs):
    """From 256 x 256 tensors after a change, which is a dict of new ones or, if None, of those to leave out."""
    tensors = {key: value for key, value in (stored(fmt, 256, 256)[0] | change).items() if value is not None}
    return lambda: quant.QuantLinear.from_tensors("blocks.3.ffn.0", tensors, 256, 256, **kwargs)


REFUSED_BY_QUANT = [
    (lambda: quant.quantize_nvfp4(torch.ones(16)), r"nvfp4: got shape \(16,\), expected a non-empty \(M, K\)"),
    (lambda: quant.quantize_fp8(torch.tensor([[1.0, -math.inf]])), "fp8: got NaN, or values that are infinite"),
    (lambda: quant.quantize_nvfp4(torch.ones(16, 16), 0.0), "expected one positive number"),
    (lambda: quant.quantize_nvfp4(torch.ones(16, 16), method="best"), "got method 'best', expected 'rtn'"),
    (lambda: quant.dequantize_nvfp4(*OCTETS, 1.0), "got data torch.float8_e4m3fn .*, expected uint8"),
    (lambda: quant.dequantize_nvfp4(BLOCKS[0], BLOCKS[1][:64], BLOCKS[2]), r"got \(64, 4\), expected \(128, 4\)"),
    (layer_of("nvfp4", {"weight_scale": torch.ones(32, 16).to(torch.float8_e4m3fn)}),
     r"0\.weight_scale: got \(32, 16\), expected \(256, 16\); the scales must be padded and swizzled"),
    (layer_of("nvfp4", {"weight_scale_2": None}), r"0\.weight_scale_2: got no such tensor, but bias, .*NVFP4"),
    (layer_of("nvfp4", {"weight_scale_2": torch.ones((), dtype=torch.bfloat16)}), "do not cast stored"),
    (layer_of("nvfp4", {"comfy_quant": None}), r"0\.weight: got torch.uint8, .* plain, without a comfy_quant"),
    (layer_of(None, {"bias": torch.ones(255)}), r"0\.bias: got \(255,\), expected"),
    (layer_of("nvfp4", {"comfy_quant": quant.write_marker({"format": "int3"})}), "comfy_quant: got .*int3.*nvfp"),
    (layer_of("nvfp4", {}, mode="fast"), ": got mode 'fast', expected one of tensor_cores, dequantize, emulate"),
    (lambda: quant.QuantLinear.from_linear(torch.nn.Linear(9, 9), "fp4"), "got format 'fp4', expected one of nv"),
    (lambda: make("nvfp4")[0](torch.ones(2, 57)), r"got x .* \(2, 57\), expected .*56.*NVFP4"),
    (lambda: make(None)[0].attach_lora(torch.ones(4, 56), torch.ones(40, 4)), r"expected \(40, r\) and \(r, 5"),
]


@pytest.mark.parametrize("call, message", REFUSED_BY_QUANT)
def test_what_quant_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(TypeError):  # nor can methods be mistaken for scales
        quant.quantize_mxfp8(torch.ones(16, 16), "search")


@pytest.mark.parametrize("text", ["[1]", "7", '{"format": ["nvfp4"]}', "[" * 10 ** 5, "9" * 5000, '{"format":'])
def test_markers_that_are_refused(text):
    with pytest.raises(ValueError, match="^L.comfy_quant: got .*; (the file|convert)") as error:
        quant.read_marker(torch.tensor(list(text.encode()), dtype=torch.uint8), "L.comfy_quant")
    assert len(str(error.value)) < 400


# --------------------------------------------------------------------------------------------------
# wan_fp4.py
# --------------------------------------------------------------------------------------------------

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

def diffusers_dit(heads=2, head_dim=32, ffn=96, layers=2, **options):
    from diffusers import WanTransformer3DModel
    theirs = WanTransformer3DModel(**dict(
        num_attention_heads=heads, attention_head_dim=head_dim, in_channels=36, out_channels=16,
        text_dim=24, freq_dim=256, ffn_dim=ffn, num_layers=layers, image_dim=40,
        added_kv_proj_dim=heads * head_dim) | options)
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


def test_angles_are_those_of_float64():
    """Of the largest times and places, where float32 is off by 6e-5."""
    t, shares = torch.tensor([1000.0, 909.707]), 10000.0 ** (-np.arange(128) / 128)
    angles = t.double().numpy()[:, None] * shares
    time = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(wan_fp4.timestep_embedding(t, 256).numpy(), time, rtol=0, atol=1e-6)
    angles = np.arange(1024)[:, None] * 10000.0 ** (-np.arange(21) / 21)  # of 64 pairs, those of the width
    rope = wan_fp4.rope_3d(1, 1, 1024, 128, "cpu").numpy()
    np.testing.assert_allclose(rope[..., -21:], [np.cos(angles), np.sin(angles)], rtol=0, atol=1e-6)
    assert (rope[0, :, :-21] == 1).all() and (rope[1, :, :-21] == 0).all()


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
def test_after_the_first_frame_a_vae_decodes_any_number_at_a_time(small_vae):
    z = torch.randn(1, 16, 4, 2, 3)
    def decode_by(*sizes):
        cache = {}
        parts = [small_vae.decoder(small_vae.conv2(x, cache), cache) for x in z.split(sizes, dim=2)]
        return torch.cat(parts, 2)
    assert relative_error(decode_by(1, 1, 1, 1), decode_by(1, 3)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_black_pixel_stays_finite(dtype):
    """Where all channels are 0, a norm that divides by their length must not divide by 0."""
    norm = wan_fp4.ChannelNorm(8, 3)
    assert norm(torch.zeros(1, 8, 1, 2, 2, dtype=dtype)).eq(0).all()


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


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_umt5_is_in_float32_where_others_are_in_float16(capability, dtype, cuda):
    """T5's activations exceed float16's range."""
    cuda.capability = capability
    with PretendedCuda():
        umt5 = wan_fp4.load_umt5(DEMO / "umt5.safetensors", "cuda")
    assert {layer.compute_dtype for layer in umt5.modules() if isinstance(layer, quant.QuantLinear)} == {dtype}


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


# Attention


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
    ({}, ValueError, "got 0 models, expected one; name its file or folder"),
    ({"m.safetensors.index.json": b"{}"}, ValueError, "index.json: not a shard index .*weight_map"),
    ({"m.safetensors.index.json": b'{"weight_map": {"x": "."}}'}, ValueError, "model: not a .* only regular"),
    ({"a.safetensors.index.json": b"", "b.safetensors.index.json": b""}, ValueError, "got 2 models, expected"),
    ({"m.safetensors.index.json": b'{"weight_map": {"x": "lost.safetensors"}}'}, FileNotFoundError,
     "lost.safetensors: no such file"),
    ({"m-00002-of-00003.safetensors": b""}, FileNotFoundError, "m-00001-of-00003.safetensors: no such file"),
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
    torch.save({"state_dict": {"x": torch.ones(1)}}, tmp_path / "nested.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    for name, text in (("broken", "not a file of torch weights .*; download it again"), ("list", "a list: got"),
                       ("code", "not a file of torch weights"), ("nested", "state_dict: got dict, expected a")):
        with pytest.raises(ValueError, match=f"{name}.pth: {text}"):
            wan_fp4.load_vae(tmp_path / f"{name}.pth")


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.index.json"])
def test_pipes_and_files_without_permission_are_refused(name, tmp_path):
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


def test_a_name_that_is_there_twice_is_refused(dit_path, tmp_path):
    tensors = load_file(dit_path)
    save_file(tensors | {"diffusion_model.head.head.bias": torch.zeros(64)}, tmp_path / "x", {"head_dim": "32"})
    with pytest.raises(ValueError, match="x: .*head.head.bias: got a second tensor of this name"):
        wan_fp4.load_dit(tmp_path / "x")


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
        monkeypatch.setattr(wan_fp4, "read_tensors", lambda path, *_: (
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
@torch.no_grad()
def test_load_dit_reads_markers_in_tensors_or_in_the_header(place, tmp_path):
    """Under a prefix. A tensor counts, whatever the header says; in the header, a layer that the file does not
    have is ignored."""
    markers = demo_markers() | ({"blocks.99.ffn.0": MXFP8} if place == "header" else {})
    given = {"header": dict.fromkeys(markers, MXFP8)} | {place: markers}
    got = wan_fp4.load_dit(marked(tmp_path / "x", prefix="diffusion_model.", **given))
    expected = wan_fp4.load_dit(DEMO / "dit.safetensors")
    inputs = demo_inputs(got.cfg, 900.0)
    assert torch.equal(got(*inputs), expected(*inputs)) and "NVFP4" in quant.describe(got)


# Building

@pytest.mark.parametrize("network, name, change, text", [
    ("dit", "blocks.1.ffn.2.weight", None, r"1 missing (first blocks.1.ffn.2.weight, (64, 96)); check that"),
    ("dit", "blocks.1.norm3.bias", None, "1 missing (first blocks.1.norm3.bias, (64,)); check that it is"),
    ("dit", "patch_embedding.weight", None, "patch_embedding.weight: got nothing, expected a tensor"),
    ("dit", "blocks.0.extra.weight", torch.zeros(2), "1 unexpected (first blocks.0.extra.weight)"),
    ("dit", "blocks.0.self_attn.q.weight", torch.zeros(64, 63), "q.weight, (64, 63) instead of (64, 64))"),
    ("dit", "head.modulation", torch.zeros(1, 2, 63), "modulation, (1, 2, 63) instead of (1, 2, 64))"),
    ("dit", "blocks.0.ffn.0.comfy_quant", quant.write_marker({"format": "int3"}), "ffn.0.comfy_quant: got"),
    ("dit", "blocks.999999999.ffn.0.weight", torch.zeros(1), "1 unexpected (first blocks.99999"),
    ("dit", "\n.x", torch.zeros(1), r"1 unexpected (first \n.x)"),
    ("dit", "text_embedding.0.weight", torch.tensor(1.0), "0.weight: got shape (), expected (64, any)"),
    ("dit", "head.modulation", torch.zeros(1, 2, 64).int(), "not in a float dtype (first head.modulat"),
    ("vae", "conv2.bias", torch.zeros(8), "conv2.bias: got shape (8,), expected (16)"),
    ("clip", "transformer.0.attn.to_qkv.weight", torch.zeros(7, 64), "to_qkv.weight, (7, 64) instead of (")])
def test_loaders_name_what_is_wrong(network, name, change, text, dit_path, tmp_path):
    tensors = load_file(dit_path if network == "dit" else DEMO / f"{network}.safetensors")
    tensors = {n: tensor for n, tensor in tensors.items() if n != name}
    save_file(tensors if change is None else tensors | {name: change}, tmp_path / network, {"head_dim": "32"})
    with pytest.raises(ValueError, match=f"/{network}: .*{re.escape(text)}") as error:
        getattr(wan_fp4, f"load_{network}")(tmp_path / network)
    assert "\n" not in str(error.value)


def test_the_headers_alone_tell_whether_a_model_fits(dit_path, tmp_path, capsys):
    """Also one of an all-in-one file, whose other networks are left out."""
    others = {"first_stage_model.x": torch.ones(3), "text_encoders.umt5xxl.y": torch.ones(3)}
    save_file(load_file(dit_path) | others, tmp_path / "all", {"head_dim": "32"})
    header = (tmp_path / "all").read_bytes()
    length = 8 + int.from_bytes(header[:8], "little")
    with open(tmp_path / "all", "r+b") as file:
        file.seek(length)
        file.write(bytes([255]) * (len(header) - length))  # NaN everywhere: the values are not read
    checked = wan_fp4.load_dit(tmp_path / "all", "meta")
    assert {p.device.type for p in checked.parameters()} == {"meta"} and capsys.readouterr().out == ""
    assert checked.cfg == wan_fp4.load_dit(tmp_path / "all").cfg
    assert "left out 2 tensors of other networks" in capsys.readouterr().out
    save_file({"x": torch.ones(2)}, tmp_path / "bad", {"head_dim": "32"})
    with pytest.raises(ValueError, match="bad: "):
        wan_fp4.load_dit(tmp_path / "bad", "meta")


@pytest.mark.parametrize("head_dim", ["50", "0", "1", "x", "1e9", "9" * 5000])
def test_wrong_head_widths_are_named(head_dim, tmp_path):
    for network in ("dit", "clip"):
        save_file(load_file(DEMO / f"{network}.safetensors"), tmp_path / "x", {"head_dim": head_dim})
        with pytest.raises(ValueError, match=f"x: head width: got {head_dim[:50]}, expected an even divisor of"):
            getattr(wan_fp4, f"load_{network}")(tmp_path / "x")


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


def test_loading_keeps_the_file_mapped_and_needs_no_compiler_and_no_garbage_collector(tmp_path):
    """A DiT adds far less memory than the file's size: Linears are views of the mapped file."""
    cfg = wan_fp4.DiTConfig(dim=1024, ffn_dim=4096, num_blocks=6, text_dim=64, image_dim=64)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in wan_fp4.WanDiT(cfg).named_parameters()}
    path = tmp_path / "dit.safetensors"
    save_file({n: torch.zeros(s, dtype=torch.bfloat16) for n, s in shapes.items()}, path)
    code = f"""
import gc, sys, torch, weakref, wan_fp4
def private():
    return sum(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) / 1024
with torch.device("meta"):
    wan_fp4.WanDiT(wan_fp4.DiTConfig(num_blocks=1))  # what torch imports for its first meta tensor
before = private()
model = wan_fp4.load_dit({str(path)!r})
print(private() - before)
gc.disable()
for name in ("umt5", "clip", "vae", "dit"):
    model = getattr(wan_fp4, "load_" + name)("demo/" + name + ".safetensors")
    alive = weakref.ref(model), weakref.ref(next(model.parameters()))
    del model
    assert [ref() for ref in alive] == [None, None], name
assert not {{"torch._dynamo", "sympy"}} & sys.modules.keys()
"""
    assert path.stat().st_size > 200e6 and float(run_python(code)) < 40  # MB


def test_what_streams_stays_in_cpu_memory_and_computes_elsewhere(cuda):
    with PretendedCuda():
        dit = wan_fp4.load_dit(DEMO / "dit.safetensors", "cuda", stream=True)
        umt5 = wan_fp4.load_umt5(DEMO / "umt5.safetensors", "cuda")
    assert {p.device.type for p in dit.blocks.parameters()} == {"cpu"}
    assert "cpu" not in {p.device.type for n, p in dit.named_parameters() if not n.startswith("blocks.")}
    layer = dit.blocks[0].ffn[0]
    assert layer.compute_dtype == torch.bfloat16 and layer.mode == "tensor_cores"
    assert [n for n, p in umt5.named_parameters() if p.device.type == "cpu"] == ["token_embedding.weight"]


# What a file is: one line says it before any network is loaded

def transformers_t5():
    """google/t5-v1_1-xxl in small: only its first block has a position bias."""
    from transformers import T5Config, T5EncoderModel
    return T5EncoderModel(T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                                   feed_forward_proj="gated-gelu")).state_dict()


def without_image(tensors, channels=36, **more):
    """A DiT's tensors without those of the image branch; patch_embedding takes `channels`."""
    return {name: tensor for name, tensor in tensors.items() if "img" not in name} | {
        "patch_embedding.weight": torch.zeros(64, channels, 1, 2, 2), **more}


def adapter(*parts):
    return {f"diffusion_model.blocks.0.self_attn.q.{part}": torch.ones(64, 64) for part in parts}


def stored_as(tensors, dtype, **more):
    """A DiT's tensors, those of q in another dtype."""
    return tensors | {"blocks.0.self_attn.q.weight": torch.ones(64, 64).to(dtype), **{
        f"blocks.0.self_attn.q.{suffix}": tensor for suffix, tensor in more.items()}}


DIT_ADVICE = "is not supported; use Wan2.1 I2V or Wan2.2 I2V A14B"
OTHER_FILES = {  # the flag, the file's tensors made of a small DiT's, what the line says
    "T2V": ("dit", lambda dit: without_image(dit, 16), f"Wan T2V, which {DIT_ADVICE}"),
    "TI2V 5B": ("dit", lambda dit: without_image(dit, 48), f"Wan2.2 TI2V 5B, which {DIT_ADVICE}"),
    "FLF2V": ("dit", lambda dit: dit | {"img_emb.emb_pos": torch.zeros(1, 514, 40)},
              f"Wan2.1 FLF2V, which {DIT_ADVICE}"),
    "diffusers' FLF2V": ("dit", lambda dit: diffusers_dit(pos_embed_seq_len=514).state_dict(), "Wan2.1 FLF2V"),
    "VACE": ("dit", lambda dit: without_image(dit, 16, **{"vace_blocks.0.after_proj.bias": torch.zeros(64)}),
             f"Wan VACE, which {DIT_ADVICE}"),
    "Fun Control": ("dit", lambda dit: dit | {"patch_embedding.weight": torch.zeros(64, 48, 1, 2, 2)},
                    f"Wan Fun Control or another variant, which {DIT_ADVICE}"),
    "Fun Camera of Wan2.2": ("dit", lambda dit: without_image(dit, **{
        "control_adapter.conv.bias": torch.zeros(64)}), f"Wan Fun Control, which {DIT_ADVICE}"),
    "Animate": ("dit", lambda dit: dit | {"face_adapter.fuser_blocks.0.k_norm.weight": torch.zeros(64)},
                f"Wan Animate, which {DIT_ADVICE}"),
    "S2V": ("dit", lambda dit: without_image(dit, 16, **{"audio_injector.injector.0.q.bias": torch.zeros(64)}),
            f"Wan S2V, which {DIT_ADVICE}"),
    "GGUF": ("dit", None, r"\(a GGUF file, which is not supported: take the safetensors file\)$"),
    "a GGUF of UMT5": ("text-encoder", None, "a GGUF file, which is not supported"),
    "a LoRA as model": ("dit", lambda _: adapter("lora_A.weight", "lora_B.weight"),
                        "a LoRA, which is no model; pass it with --lora"),
    "DoRA": ("lora", lambda _: adapter("lora_A.weight", "lora_B.weight", "dora_scale"),
             "a DoRA, which is not supported; merge it"),
    "PEFT's DoRA": ("lora", lambda _: adapter("lora_A.weight", "lora_magnitude_vector"), "a DoRA, which is not"),
    "LoKr": ("lora", lambda _: adapter("alpha", "lokr_w1", "lokr_w2"), "a LoKr, which is not supported; merge"),
    "LoHa": ("lora", lambda _: adapter("hada_w1_a", "hada_w1_b"), "a LoHa, which is not supported; merge it"),
    "a model as LoRA": ("lora", lambda dit: dit, "a WanDiT, which belongs to --dit"),
    "int8": ("dit", lambda dit: stored_as(dit, torch.int8, weight_scale=torch.ones(64)),
             "an int8 model, which is not supported; use the bf16 or the fp8 one"),
    "ModelOpt's NVFP4": ("dit", lambda dit: stored_as(
        dit, torch.uint8, weight=torch.zeros(64, 32, dtype=torch.uint8), weight_scale=torch.zeros(64, 4),
        weight_scale_2=torch.ones(())), "NVFP4 without comfy_quant markers, .*not supported; convert the bf16"),
    "T5": ("text-encoder", lambda _: transformers_t5(), "T5, which is not UMT5; use umt5_xxl"),
    "the VAE of 5B": ("vae", lambda _: {"decoder.upsamples.0.upsamples.0.residual.2.weight": torch.zeros(1),
                                        "conv2.bias": torch.zeros(48)}, "the VAE of Wan2.2 5B, .*use Wan2.1's"),
    "diffusers' DiT as VAE": ("vae", lambda _: diffusers_dit().state_dict(), "a WanDiT, which belongs to --dit"),
    "ComfyUI's UMT5 as DiT": ("dit", lambda _: transformers_umt5().state_dict(),
                              "a UMT5Encoder, which belongs to --text-encoder"),
    **{f"{other} as {flag}": (flag, lambda _, name=name: load_file(DEMO / f"{name}.safetensors"),
                              f"a {network}, which belongs to --{other}")
       for other, name, network in (("dit", "dit", "WanDiT"), ("text-encoder", "umt5", "UMT5Encoder"),
                                    ("clip", "clip", "CLIPVision"), ("vae", "vae", "WanVAE"))
       for flag in ("dit", "vae") if flag != other}}


@pytest.mark.parametrize("case", OTHER_FILES)
def test_a_file_is_named_before_a_network_is_loaded(case, dit_path, tmp_path, monkeypatch):
    """And not called incomplete: downloading it again would not help."""
    flag, make, text = OTHER_FILES[case]
    monkeypatch.setattr(sample, "generate", None)
    path = tmp_path / "x.safetensors"
    if make:
        save_file({name: t.contiguous().clone() for name, t in make(load_file(dit_path)).items()}, path,
                  {"head_dim": "32"})
    else:
        path.write_bytes(b"GGUF" + bytes(100))
    files = demo_files() | {flag: path}
    argv = [part for name, file in files.items() for part in (f"--{name}", file)]
    fails(sample.main, [PHOTO, "-o", tmp_path / "o.mp4", *argv],
          rf"^(?!.*(complete|[Dd]ownload)).*x\.safetensors: .*{text}")
    assert os.listdir(tmp_path) == ["x.safetensors"]


def three_shards(dit_path, folder):
    """A model in three files, without an index."""
    tensors = load_file(dit_path)
    folder.mkdir()
    for i in range(3):
        save_file({name: tensors[name] for name in sorted(tensors)[i::3]},
                  folder / f"m-0000{i + 1}-of-00003.safetensors", {"head_dim": "32"})
    return folder


@pytest.mark.parametrize("name", ["", "m-00001-of-00003.safetensors", "m-00003-of-00003.safetensors"])
def test_shards_need_no_index_but_each_other(name, dit_path, tmp_path):
    folder = three_shards(dit_path, tmp_path / "dit")
    assert same_tensors(dict(wan_fp4.load_dit(folder / name).state_dict()), load_file(dit_path))
    assert sample.search(tmp_path) == ({"dit": [folder / "m-00001-of-00003.safetensors"]}, [])
    (folder / "m-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="m-00002-of-00003.safetensors: no such file$"):
        wan_fp4.load_dit(folder / name, "meta")
    _, broken = sample.search(tmp_path)
    assert broken and all("m-00002-of-00003.safetensors: no such file" in line for line in broken)


E4M3FN, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FP8_FILES = {  # dtype, a scale per row, the scale's name, the tensors beside them, the names' prefix
    "fp8_scaled": (E4M3FN, False, "scale_weight", {
        "scaled_fp8": torch.zeros(0).to(E4M3FN), "blocks.0.ffn.0.scale_input": torch.ones(1)},
                   "model.diffusion_model."),
    "e5m2": (E5M2, False, "scale_weight", {"scaled_fp8": torch.zeros(2).to(E5M2)}, "diffusion_model."),
    "LightX2V's": (E4M3FN, True, "weight_scale", {}, "")}


@pytest.mark.parametrize("case", FP8_FILES)
@torch.no_grad()
def test_fp8_files_are_what_they_dequantize_to(case, dit_path, tmp_path):
    dtype, by_row, scale_name, more, prefix = FP8_FILES[case]
    packed, exact = load_file(dit_path), load_file(dit_path)
    for name, w in load_file(dit_path).items():
        if name.startswith("blocks.") and name.endswith(".weight") and w.dim() == 2:
            scale = w.abs().amax(1, keepdim=True) if by_row else w.abs().max()
            scale = scale / torch.finfo(dtype).max
            packed[name], exact[name] = (w / scale).to(dtype), (w / scale).to(dtype).float() * scale
            packed[name.removesuffix("weight") + scale_name] = scale
    save_file({prefix + name: tensor for name, tensor in (packed | more).items()}, tmp_path / "fp8",
              {"head_dim": "32"})
    save_file(exact, tmp_path / "exact", {"head_dim": "32"})
    ours, inputs = wan_fp4.load_dit(tmp_path / "fp8"), dit_inputs(1, 4, 6, 5)
    assert relative_error(ours(**inputs), wan_fp4.load_dit(tmp_path / "exact")(**inputs)) < 1e-6
    assert re.match(r"FP8( \(E5M2\))? 24 layers", quant.describe(ours))


# LoRA

@functools.cache
def diffusers_layers():
    """{official name: diffusers'} of every Linear."""
    return {wan_fp4.official_dit_name(layer): layer for layer, module in diffusers_dit().named_modules()
            if isinstance(module, torch.nn.Linear)}


def diffusers_layer(name):
    return diffusers_layers()[name]


SPELLINGS = {  # a layer's name from the official one, lora_up's ending, lora_down's
    "ComfyUI": (lambda n: f"diffusion_model.{n}", "lora_up.weight", "lora_down.weight"),
    "older ComfyUI": (lambda n: f"model.diffusion_model.{n}", "lora_B.weight", "lora_A.weight"),
    "bare": (str, "lora_up.weight", "lora_down.weight"),
    "PEFT in memory": (str, "lora_B.default.weight", "lora_A.default.weight"),
    "PEFT of official names": (lambda n: f"base_model.model.{n}", "lora_B.weight", "lora_A.weight"),
    "bare diffusers": (diffusers_layer, "lora_B.weight", "lora_A.weight"),
    "diffusers": (lambda n: f"transformer.{diffusers_layer(n)}", "lora_B.weight", "lora_A.weight"),
    "PEFT's endings": (lambda n: f"diffusion_model.{n}", "lora_B.weight", "lora_A.weight"),
    "kohya and musubi": (lambda n: "lora_unet_" + n.replace(".", "_"), "lora_up.weight", "lora_down.weight"),
    "VideoX-Fun": (lambda n: "lora_unet__" + n.replace(".", "_"), "lora_up.weight", "lora_down.weight"),
    "half kohya": (lambda n: re.sub(r"^blocks\.(\d+)\.", r"lora_unet_blocks_\1.", n), "lora_up.weight",
                   "lora_down.weight"),
    "kohya of diffusers": (lambda n: "lora_unet_" + diffusers_layer(n).replace(".", "_"), "lora_up.weight",
                           "lora_down.weight"),
    "DiffSynth": (lambda n: f"pipe.dit.{n}", "lora_B.default.weight", "lora_A.default.weight"),
    "PEFT": (lambda n: f"base_model.model.{diffusers_layer(n)}", "lora_B.weight", "lora_A.weight"),
    "an adapter's name": (lambda n: f"transformer.{diffusers_layer(n)}", "lora_B.lightx2v_t1.weight",
                          "lora_A.lightx2v_t1.weight")}
PARTLY = {"half kohya": "blocks.", "kohya of diffusers": "blocks."}  # what those who use it train


def spelled(layers, spelling="ComfyUI", alpha=None):
    """The tensors of a LoRA {official name: (up, down)} under a program's names."""
    name_of, up_ending, down_ending = SPELLINGS[spelling]
    lora = {}
    for layer, (up, down) in layers.items():
        lora |= {f"{name_of(layer)}.{up_ending}": up, f"{name_of(layer)}.{down_ending}": down}
        lora |= {} if alpha is None else {f"{name_of(layer)}.alpha": torch.tensor(alpha)}
    return lora


def lora_factors(layer, up, down):
    """A LoRA's tensors for one layer, under bare names."""
    return spelled({layer: (up, down)}, "bare")


@pytest.fixture
def lora_file(tmp_path):
    """Saves a LoRA's tensors; a shape stands for zeros."""
    def save(tensors, metadata=None, name="lora"):
        save_file({key: torch.zeros(value) if isinstance(value, tuple) else value
                   for key, value in tensors.items()}, tmp_path / name, metadata)
        return tmp_path / name
    return save


UP, DOWN = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(3)) * 0.3  # (64, 4) each
ATTN = "blocks.1.self_attn.q.weight"


def of_attn(spelling, alpha=None):
    return spelled({"blocks.1.self_attn.q": (UP, DOWN.T.contiguous())}, spelling, alpha)


def differences():
    """Whole differences in a LoRA's tensors, and what each is added to."""
    lora, merged = {}, {}
    for layer, part, name, size in (
            ("blocks.0.self_attn.norm_q", "diff", "weight", (64,)), ("blocks.0.ffn.0", "diff_b", "bias", (96,)),
            ("blocks.1", "diff_m", "modulation", (1, 6, 64)), ("head", "diff_m", "modulation", (1, 2, 64)),
            ("patch_embedding", "diff_b", "bias", (64,)), ("blocks.1.ffn.2", "diff", "weight", (64, 96))):
        lora[f"diffusion_model.{layer}.{part}"] = merged[f"{layer}.{name}"] = torch.randn(size) * 0.3
    return lora, merged


LORAS = {  # the LoRAs and their strengths, what they add to the weights, the end of the last one's line
    "one": ([(of_attn("ComfyUI"), 0.7)], {ATTN: 0.7 * UP @ DOWN.T}, "1 layers"),
    "alpha": ([(of_attn("ComfyUI", alpha=2.0), 0.7)], {ATTN: 0.35 * UP @ DOWN.T}, "1 layers"),
    "differences": ([(differences()[0], 0.5)], None, ": 6 differences"),
    "several": ([(of_attn("bare"), 1.0), (of_attn("ComfyUI"), -0.25)], {ATTN: 0.75 * UP @ DOWN.T}, "1 layers"),
    "16 bits": ([({n: t.bfloat16() for n, t in of_attn("bare").items()}, 1.0)],
                {ATTN: UP.bfloat16().float() @ DOWN.T.bfloat16().float()}, "1 layers")}


@pytest.mark.parametrize("case", LORAS)
@torch.no_grad()
def test_a_lora_is_what_it_adds_to_the_weights(case, dit_path, tmp_path, lora_file):
    loras, merged, line = LORAS[case]
    if merged is None:
        lora, merged = differences()
        loras, merged = [(lora, 0.5)], {name: 0.5 * difference for name, difference in merged.items()}
    tensors, inputs = load_file(dit_path), dit_inputs(1, 4, 6, 5)
    save_file(tensors | {name: tensors[name] + more for name, more in merged.items()}, tmp_path / "merged",
              {"head_dim": "32"})
    files = [(lora_file(lora, name=str(i)), strength) for i, (lora, strength) in enumerate(loras)]
    dit = wan_fp4.load_dit(dit_path, loras=files)
    expected = wan_fp4.load_dit(tmp_path / "merged")(**inputs)
    assert (dit(**inputs) - expected).abs().max() < 1e-5 and dit.loras[-1].endswith(line)
    assert (wan_fp4.load_dit(dit_path)(**inputs) - expected).abs().max() > 1e-3


def test_lora_does_not_write_to_the_parameters_it_changes(dit, lora_file):
    """They may be mapped from a file, or shared."""
    bias = dit.blocks[0].ffn[0].bias
    before = bias.clone()
    line = wan_fp4.attach_lora(dit, lora_file({"blocks.0.ffn.0.diff_b": torch.ones(96)}), 2.0)
    assert line == "lora: 1 differences"
    assert torch.equal(bias, before) and torch.equal(dit.blocks[0].ffn[0].bias, before + 2)


@pytest.mark.parametrize("names, skipped", [
    (["blocks.7.ffn.0.lora_up.weight", "blocks.7.ffn.0.lora_down.weight"], "1: blocks.7.ffn.0 (has no weight)"),
    (["patch_embedding.lora_up.weight", "patch_embedding.lora_down.weight"],
     "1: patch_embedding (has no weight of a Linear)"),
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
    ({"blocks.7.ffn.0.diff_b": (96,)}, "lora: got 1 differences, none of which fits, the first blocks.7.ffn.0 "),
    ({"blocks.0.ffn.0.lora_up.weight": (96, 2)}, "blocks.0.ffn.0: got up"),
    ({"blocks.0.ffn.0.lora_A.weight": (2, 64), "blocks.0.ffn.0.alpha": ()}, "got down, expected lora_up and"),
    (lora_factors("blocks.0.ffn.0", (90, 2), (2, 64)), r"blocks.0.ffn.0: got up \(90, 2\) and down \(2, 64\)"),
    (lora_factors("blocks.0.ffn.0", (96, 3), (2, 64)), "got up .96, 3."),
    (lora_factors("blocks.0.ffn.0", (96, 0), (0, 64)), "got up .96, 0."),
    *((lora_factors("blocks.0.ffn.0", (96, 2), (2, 64)) | {"blocks.0.ffn.0.alpha": alpha},
       "blocks.0.ffn.0: got alpha .*, expected one finite number; check how the LoRA")
      for alpha in ((2,), torch.tensor(math.nan))),
    ({"blocks.0.ffn.0.diff_b": (90,)}, r"ffn.0.*got .*\(90,\).* expected .*\(96,\)"),
    ({"blocks.0.ffn.0.weight": (96, 64)}, "is no part of a LoRA")])
def test_loras_that_are_refused(lora, error, dit_path, lora_file):
    with pytest.raises(ValueError, match=error):
        wan_fp4.load_dit(dit_path, loras=[(lora_file(lora), 1.0)])


# The same LoRA of every layer under the names of each program

@pytest.fixture(scope="session")
def every_layer(dit_path):
    """{name: (up, down)} of every Linear of the small DiT."""
    g, linears = torch.Generator().manual_seed(5), wan_fp4.load_dit(dit_path, "meta").named_modules()
    return {name: (torch.randn(module.out_features, 4, generator=g) * 0.1,
                   torch.randn(4, module.in_features, generator=g) * 0.1)
            for name, module in linears if isinstance(module, quant.QuantLinear)}


@torch.no_grad()
def velocity_with(dit_path, *files):
    """A velocity of the small DiT with LoRAs at strength 0.5, and the line about the last one."""
    dit = wan_fp4.load_dit(dit_path, loras=[(file, 0.5) for file in files])
    return dit(**dit_inputs(1, 4, 6, 5)), dit.loras[-1:]


@pytest.mark.parametrize("naming", [*SPELLINGS][1:])
def test_every_programs_names_are_read(naming, every_layer, dit_path, lora_file):
    layers = {name: factors for name, factors in every_layer.items() if name.startswith(PARTLY.get(naming, ""))}
    usual = lora_file(spelled(layers, alpha=8.0), name="usual")
    lora = lora_file(spelled(layers, naming, alpha=8.0))
    expected, _ = velocity_with(dit_path, usual)
    got, line = velocity_with(dit_path, lora)
    assert torch.equal(got, expected) and line == [f"lora: {len(layers)} layers"]
    assert relative_error(got, velocity_with(dit_path)[0]) > 0.1


PEFT_CONFIG = {"r": 4, "lora_alpha": 16, "use_rslora": False, "alpha_pattern": {"attn1.to_q": 2}}


@pytest.mark.parametrize("place", ["diffusers", "adapter_model.safetensors", "peft/"])
def test_alpha_is_where_diffusers_and_peft_keep_it(place, every_layer, dit_path, lora_file, tmp_path):
    """diffusers writes the file itself. One pattern gives q of self-attention another alpha."""
    usual = spelled(every_layer, alpha=16.0)
    usual |= {name: torch.tensor(2.0) for name in usual if name.endswith("self_attn.q.alpha")}
    expected, _ = velocity_with(dit_path, lora_file(usual))
    if place == "diffusers":
        from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
        path = tmp_path / "diffusers.safetensors"
        WanLoraLoaderMixin.save_lora_weights(
            str(tmp_path), spelled(every_layer, "bare diffusers"),
            weight_name=path.name, transformer_lora_adapter_metadata=PEFT_CONFIG)
    else:
        path, folder = tmp_path / "peft", tmp_path / "peft"
        folder.mkdir()
        save_file(spelled(every_layer, "PEFT"), folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(PEFT_CONFIG))
        path = folder if place == "peft/" else folder / place
    assert torch.equal(velocity_with(dit_path, path)[0], expected)


@pytest.mark.parametrize("alpha", [4.0, 16.0])
def test_the_bias_of_lora_b_is_scaled_as_its_weight(alpha, every_layer, dit_path, lora_file):
    """PEFT multiplies all that lora_B gives by alpha / r. diffusers' reading of diff_b has alpha = r."""
    biases = {name: up[:, 0].clone() for name, (up, _) in every_layer.items()}
    usual = spelled(every_layer, alpha=alpha) | {
        f"diffusion_model.{name}.diff_b": bias * (alpha / 4) for name, bias in biases.items()}
    lora = spelled(every_layer, "PEFT") | {
        f"base_model.model.{diffusers_layer(name)}.lora_B.bias": bias for name, bias in biases.items()}
    header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": alpha, "transformer.r": 4})}
    expected, _ = velocity_with(dit_path, lora_file(usual, name="usual"))
    got, _ = velocity_with(dit_path, lora_file(lora, header))
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("stored, text", [
    ({"transformer.use_rslora": True, "transformer.lora_alpha": 4}, "rank-stabilized LoRA .*not supported"),
    ({"transformer.lora_alpha": "much"}, "got .*, expected JSON with lora_alpha"),
    ({"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"(": 1}}, "expected JSON with lora_alpha"),
    ([], "expected JSON with lora_alpha")])
def test_an_alpha_that_cannot_be_used_is_refused(stored, text, every_layer, dit_path, lora_file):
    path = lora_file(spelled(every_layer), {"lora_adapter_metadata": json.dumps(stored)})
    with pytest.raises(ValueError, match=f"lora: .*{text}"):
        wan_fp4.load_dit(dit_path, "meta", loras=[(path, 1.0)])


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


@pytest.mark.parametrize("shift", [0.05, 1.0, 3.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50])
def test_sigmas_by_comfyui_algorithm(shift, steps):
    """ComfyUI's algorithm, on its own table of sigmas, step by step."""
    def time_shift(t):
        return shift * t / (1 + (shift - 1) * t)

    table = [time_shift(i / 1000) for i in range(1, 1001)]
    simple = [table[-(1 + int(i * (1000 / steps)))] for i in range(steps)] + [0]
    assert sample.sigmas("simple", steps, shift).tolist() == pytest.approx(simple, abs=1e-6)
    ends_at_zero = time_shift(table[0]) < 1e-5  # then one point more, and no 0 after them
    times = np.linspace(1000 * table[-1], 1000 * table[0], steps + ends_at_zero)
    normal = [time_shift(t / 1000) for t in times] + [0] * (not ends_at_zero)
    assert sample.sigmas("normal", steps, shift).tolist() == pytest.approx(normal, abs=1e-6)
    got = sample.sigmas("linear_quadratic", steps, shift)
    assert got[0] == 1 and got[-1] == 0 and (got.diff() < 0).all()


def test_orders_of_convergence():
    """Gaussian data of width w: v = x (s - (1-s) w^2) / (s^2 + (1-s)^2 w^2), and x shrinks from 1 to w.
    Halving the step halves euler's error and quarters heun's, which takes two forwards in all but the last."""
    w, calls = 0.5, []

    def velocity(x, s):
        calls.append(s)
        return x * (s - (1 - s) * w * w) / (s * s + (1 - s) ** 2 * w * w)

    def error(sampler, steps):
        levels = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return abs(sample.sample_latents(velocity, torch.ones(1), levels, sampler).item() - w)

    assert 1.8 < error("euler", 32) / error("euler", 64) < 2.2 and len(calls) == 32 + 64
    assert error("heun", 8) / error("heun", 16) > 3 and len(calls) == 96 + 15 + 31
    assert error("heun", 16) < error("euler", 16) / 4


def test_lcm_step_by_hand_and_its_seed():
    noise, levels = torch.ones(1, 2), torch.tensor([1.0, 0.5, 0.0])
    seen = []

    def velocity(x, s):
        seen.append((x.clone(), s))
        return 0.1 * x

    a, b, other = (sample.sample_latents(velocity, noise, levels, "lcm", torch.Generator().manual_seed(seed))
                   for seed in (7, 7, 8))
    fresh = torch.randn(1, 2, generator=torch.Generator().manual_seed(7))
    x1 = 0.5 * (noise - 1.0 * 0.1 * noise) + 0.5 * fresh
    assert torch.equal(seen[1][0], x1) and [s for _, s in seen] == 3 * [1.0, 0.5]
    assert torch.allclose(a, x1 - 0.5 * 0.1 * x1)
    assert torch.equal(a, b) and not torch.equal(a, other)


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
    image = Image.fromarray(picture()).resize((width, 300))
    image.save(tmp_path / "a.jpg", quality=95, subsampling=2)
    expected = np.asarray(Image.open(tmp_path / "a.jpg")).astype(int)
    assert np.abs(as_uint8(sample.read_image(tmp_path / "a.jpg")) - expected).max() <= 25


@pytest.mark.parametrize("ext", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_pictures_are_turned_upright(tmp_path, ext, orientation):
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ext}"
    Image.fromarray(picture()).save(path, exif=exif, quality=95, subsampling=0, lossless=True)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    got = as_uint8(sample.read_image(path))
    assert got.shape == expected.shape and np.abs(got.astype(int) - expected).mean() < 3


@pytest.mark.parametrize("name, text", [
    ("large.png", "has 81 megapixels, expected at most 64"), ("a.gif", "is GIF, expected png, jpg or webp"),
    ("black.tiff", "is TIFF"), ("a.bmp", "is BMP"), ("film.mp4", "is a video"), ("a.avif", "is AVIF"),
    ("text.png", "is not a picture, expected png, jpg or webp")])
def test_pictures_that_cannot_be_trusted_are_refused(tmp_path, name, text):
    path, image = tmp_path / name, Image.fromarray(picture(300, 400))
    if name == "film.mp4":
        sample.write_video(path, clip(3))
    elif name == "text.png":
        path.write_text("no picture\n" * 50)
    else:
        (Image.new("1", (9000, 9000)) if name == "large.png" else image).save(path)
    with pytest.raises(ValueError, match=f"{name}: {text}"):
        sample.read_image(path)


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


def saved_picture(kind):
    """The bytes of a picture, by its kind."""
    ext, options = {"baseline": ("jpeg", {}), "progressive": ("jpeg", {"progressive": True}),
                    "restarts": ("jpeg", {"restart_marker_rows": 1}), "png": ("png", {}), "webp": ("webp", {}),
                    "lossless": ("webp", {"lossless": True})}[kind]
    Image.fromarray(picture(120, 160)).save(data := io.BytesIO(), ext, quality=92, **options)
    return data.getvalue()


@pytest.mark.parametrize("kind", ["baseline", "progressive", "restarts", "png", "webp", "lossless"])
def test_half_a_download_is_refused_and_what_follows_a_picture_ignored(kind, tmp_path):
    """Phones append a video or a gain map to a jpg."""
    data, path = saved_picture(kind), tmp_path / "a.jpg"
    for share in (0.1, 0.5, 0.9, 0.99):
        path.write_bytes(data[:int(share * len(data))])
        with pytest.raises(ValueError, match="a.jpg: is (damaged|not a picture)"):
            sample.read_image(path)
    pictures = []
    for more in (b"", bytes(1000), b"\xff\xd8 not a picture" * 50, data):
        path.write_bytes(data + more)
        pictures.append(sample.read_image(path))
        assert torch.equal(pictures[0], pictures[-1])
    expected = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert np.abs(as_uint8(pictures[0]) - expected).max() <= 25


@pytest.mark.parametrize("start, name", [
    (b"\0\0\0\x18ftypheic", "HEIC"), (b"\0\0\0\x18ftypmif1", "HEIC"), (b"\0\0\0\x18ftyphevc", "HEIC"),
    (b"\0\0\0\x1cftypavis", "AVIF"), (b"\0\0\0\x14ftypqt  ", "a video"), (b"MM\0*\0\0\0\x08", "TIFF")])
def test_other_pictures_are_named_by_their_first_bytes(start, name, tmp_path):
    """A file's name may lie. Pictures that Pillow writes are in the table above."""
    (tmp_path / "photo.jpg").write_bytes(start + bytes(200))
    with pytest.raises(ValueError, match=f"photo.jpg: is {name}, expected png, jpg or webp; convert it: ffmpeg "):
        sample.read_image(tmp_path / "photo.jpg")


@pytest.mark.parametrize("ext", ["png", "webp"])
def test_an_animation_is_called_one(ext, tmp_path):
    frames = [Image.fromarray(picture(seed=seed)) for seed in range(2)]
    frames[0].save(tmp_path / f"a.{ext}", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=f"a.{ext}: is .*an animation"):
        sample.read_image(tmp_path / f"a.{ext}")


@pytest.mark.parametrize("ext", ["png", "jpg", "webp"])
def test_a_profile_other_than_srgb_is_ignored_with_a_warning(ext, tmp_path, capsys):
    for space, warned in ("LAB", True), ("sRGB", False):
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()
        Image.fromarray(picture()).save(tmp_path / f"a.{ext}", icc_profile=profile)
        sample.read_image(tmp_path / f"a.{ext}")
        assert ("its color profile is ignored" in capsys.readouterr().err) == warned


# the prompt

@pytest.fixture(scope="session")
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
    with pytest.raises(ValueError, match="no tokenizer found; expected a tensor spiece_model.*spiece.model"):
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
    for broken in (spiece_tensor[:20], spiece_tensor[:0]):
        save_file({"spiece_model": broken}, weights)
        with pytest.raises(ValueError, match="t.safetensors: spiece_model: "):
            sample.load_tokenizer(weights)


def test_tokenize(spiece, capsys):
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    ids = sample.tokenize(tokenizer, "  pan \n left\t")
    assert ids.dtype == torch.int64 and ids.tolist() == [[*tokenizer.encode("pan left"), 3]]  # 3 is its </s>
    assert sample.tokenize(tokenizer, "").tolist() == [[3]] and capsys.readouterr().err == ""



PROMPTS = [  # as people paste them
    "a\u00a0cat\u3000in \u2028 the\tsun\r\n", "she said \u201chi\u201d and it\u2019s \u2018fine\u2019",
    "\u201elow\u201f \u201asingle\u201b \u02bcletter", "cats &amp; dogs", "&quot;cats&quot; &amp;amp; dogs &#39;",
    "&ldquo;curly&rdquo; entities", "fish &lt;3 chips", "a < b &amp; c", "AT&T, R&D; &notanentity;",
    "镜头向左移动，“小猫”在跑！", "  "]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts_are_cleaned_as_by_ftfy_and_html(prompt):
    """Wan's tokenizers.py: ftfy.fix_text, html.unescape twice, white space. SentencePiece applies NFKC."""
    expected = re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()
    seen = []
    stand_in = types.SimpleNamespace(encode=lambda text: seen.append(text) or [], eos_id=lambda: 3)
    assert sample.tokenize(stand_in, prompt).tolist() == [[3]]
    assert unicodedata.normalize("NFKC", seen[0]) == unicodedata.normalize("NFKC", expected)


@pytest.mark.parametrize("words, lost", [(511, 0), (512, 1), (600, 89)])
def test_a_long_prompt_is_cut_with_a_count(words, lost, capsys):
    stand_in = types.SimpleNamespace(encode=lambda text: [int(word) for word in text.split()], eos_id=lambda: 1,
                                     decode=lambda ids: " ".join(map(str, ids)))
    ids = sample.tokenize(stand_in, " ".join(map(str, range(10, 10 + words))))
    assert ids.tolist() == [[*range(10, 10 + min(words, 511)), 1]]
    err = capsys.readouterr().err
    assert (err == "") if not lost else f"has {words} tokens, 511 are used: its last {lost} words are cut" in err


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


@pytest.mark.parametrize("fps", [16, 24, 7])
def test_mp4(tmp_path, fps):
    video, metadata = clip(), {"title": "pan left", "comment": "seed 0"}
    sample.write_video(tmp_path / "a.mp4", video, fps, metadata)
    frames, rate, codec, stored = decode(tmp_path / "a.mp4")
    assert frames.shape == (9, 48, 64, 3) and rate == fps and metadata.items() <= stored.items()
    assert codec.name == "h264" and codec.pix_fmt == "yuv420p" and codec.colorspace == 1
    assert psnr(frames, video.numpy()) > 30 and os.listdir(tmp_path) == ["a.mp4"]


def test_the_same_frames_give_the_same_bytes(tmp_path):
    """At the size at which x264's macroblock-tree rate control showed its uninitialized memory."""
    video, files = clip(9, 480, 832), set()
    for _ in range(4):
        sample.write_video(tmp_path / "a.mp4", video, 16, {"title": "pan left"})
        files.add((tmp_path / "a.mp4").read_bytes())
    assert len(files) == 1


@pytest.mark.parametrize("name", ["out", "out.d/"])
def test_folder_of_png(tmp_path, name):
    video, path = clip(5), f"{tmp_path}/{name}"
    sample.write_video(path, video)
    assert sorted(os.listdir(path)) == [f"000{i}.png" for i in range(5)]
    for i in range(5):
        assert np.array_equal(np.asarray(Image.open(f"{path}/000{i}.png")), video[i].numpy())
    with pytest.raises(ValueError, match="is a folder that is not empty; give another name"):
        sample.write_video(path, video)
    (tmp_path / "empty").mkdir()
    sample.write_video(tmp_path / "empty", video)
    assert len(os.listdir(tmp_path / "empty")) == 5 and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("name", ["a.mp4", "a"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [0, 3])
def test_no_partial_video(tmp_path, name, error, after, monkeypatch):
    """And an older one is kept until the new one is complete."""
    to_picture, frames = sample.to_picture, []

    def fail(frame):
        hidden, = {*os.listdir(tmp_path)} - {"a.mp4"}
        assert hidden.startswith(".")
        frames.append(frame)
        if len(frames) > after:
            raise error("boom")
        return to_picture(frame)

    monkeypatch.setattr(sample, "to_picture", fail)
    if name == "a.mp4":
        (tmp_path / name).write_text("old")
    with pytest.raises(error, match="boom"):
        sample.write_video(tmp_path / name, clip(5))
    assert [path.read_text() for path in tmp_path.iterdir()] == (["old"] if name == "a.mp4" else [])


def test_a_full_disk_is_one_line_that_leaves_nothing(tmp_path):
    """Of an mp4, and of a folder of png."""
    run_python("""
import resource, signal, sys, torch, sample, wan_fp4
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
for name in sys.argv[1:]:
    try:
        with wan_fp4.one_line_errors("sample.py"):
            sample.write_video(name, torch.randint(0, 256, (9, 64, 64, 3), dtype=torch.uint8))
    except SystemExit as stop:
        assert stop.code == 2
    else:
        raise AssertionError("written")
""", tmp_path / "a.mp4", tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_a_browser_can_play_an_mp4_while_it_loads(tmp_path):
    sample.write_video(tmp_path / "a.mp4", clip(5))
    data, at, boxes = (tmp_path / "a.mp4").read_bytes(), 0, []
    while at < len(data):
        boxes.append(data[at + 4:at + 8].decode())
        at += int.from_bytes(data[at:at + 4], "big")
    assert boxes.index("moov") < boxes.index("mdat")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_run_that_is_terminated_leaves_nothing(tmp_path):
    """SIGTERM comes while the video is written, as when a container stops."""
    latents = tmp_path / "a.mp4.latents.safetensors"
    save_file({"latents": torch.zeros(1, 16, 1, 2, 2)}, latents)
    codes, (printed,), (errors,) = run_processes("""
import av, runpy, signal
av_open = av.open
def stop(file, *args, **kwargs):
    if ".part" in str(file):  # the temporary file is there
        print(os.listdir(os.path.dirname(file)), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
    return av_open(file, *args, **kwargs)
av.open = stop
runpy.run_path("sample.py", run_name="__main__")
""", "--decode", latents, "--vae", DEMO / "vae.safetensors", "-o", tmp_path / "a.mp4", "--device", "cpu")
    assert ".part" in printed and codes == [130], errors
    assert "sample.py: interrupted" in errors and "Traceback" not in errors
    assert os.listdir(tmp_path) == [latents.name]


@pytest.mark.parametrize("flags, text", [
    ("--cfg 5", "warning: --cfg 5 with an empty --negative prompt"), ("--cfg 5 --negative blur", None),
    ("", None)])
def test_guidance_without_a_negative_prompt_is_reported(flags, text, capsys):
    sample.make_settings(sample.make_parser().parse_args(flags.split()), {})
    err = capsys.readouterr().err
    assert (text in err) if text else err == ""


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
    """Pretends a GPU of cuda.capability, with cuda.free bytes, of which PyTorch holds cuda.unused; to be used
    together with PretendedCuda."""
    cuda = types.SimpleNamespace(capability=(12, 0), free=80 << 30, unused=0)
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    symbol = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * 22).in_dll(ctypes.CDLL(str(library)), symbol)
    guards[1] = guards[1] or guards[14]  # by type of device: the meta device's guard, which does nothing
    empty = torch.empty
    for name, value in dict(get_device_capability=lambda device=None: cuda.capability,
                            mem_get_info=lambda device=None: (cuda.free - cuda.unused, 80 << 30),
                            memory_reserved=lambda device=None: cuda.unused + 1,
                            memory_allocated=lambda device=None: 1,
                            Stream=NoStream, Event=NoStream, set_device=lambda device: None,
                            synchronize=lambda device=None: None, empty_cache=lambda: None,
                            current_stream=lambda device=None: NoStream(),
                            stream=lambda stream: contextlib.nullcontext()).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **rest: empty(*size, **rest))
    monkeypatch.setattr(quant, "has_compiler", lambda: False)
    return cuda


def demo_files(folder=DEMO):
    return {flag: folder / network.demo for flag, network in sample.NETWORKS.items() if network.demo}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with small networks, a LoRA, latents and a picture."""
    folder, meta = tmp_path_factory.mktemp("tiny"), {"head_dim": "32", "frames": "1", "area": "1024"}
    text, image = (getattr(wan_fp4, f"load_{name}")(DEMO / f"{name}.safetensors", "meta").cfg.dim
                   for name in ("umt5", "clip"))
    dit = wan_fp4.WanDiT(wan_fp4.DiTConfig(dim=64, ffn_dim=96, num_blocks=1, head_dim=32, text_dim=text,
                                           image_dim=image))
    save_file({n: t.bfloat16() for n, t in dit.state_dict().items()}, folder / "dit.safetensors", meta)
    save_file(wan_fp4.WanVAE(wan_fp4.VAEConfig((8, 8, 8, 8), 1)).state_dict(), folder / "vae.safetensors")
    save_file({"latents": torch.randn(1, 16, 1, 4, 4)}, folder / "latents.safetensors")
    for name in ("umt5", "clip"):
        shutil.copy(DEMO / f"{name}.safetensors", folder)
    Image.effect_noise((48, 40), 90).convert("RGB").save(folder / "photo.jpg")
    convert.main([part.replace("out", str(folder / "nvfp4")) if part.startswith("out") else
                  part.replace("dit", str(folder / "dit")) for part in CONVERT])
    (folder / "folder").mkdir()
    return folder


CONVERT = ["-i", "dit.safetensors", "-o", "out.safetensors", "--nvfp4", "--simple", "--extract-lora",
           "--lora-rank", "4", "--lora-output", "out_lora.safetensors"]


def waits_on_a_gpu(tiny, monkeypatch, **settings):
    """A video of the tiny model on the pretended GPU, and how often the CPU waited for the GPU in each step."""
    waits = []

    def progress(steps, **_):
        for step in steps:
            before = mode.waits
            yield step
            waits.append(mode.waits - before)

    monkeypatch.setattr(sample, "tqdm", progress)
    monkeypatch.setattr(sample, "check_finite", lambda *_: None)  # the CPU looks at the last step's result
    files = demo_files(tiny) | {"dit": tiny / "nvfp4.safetensors"}
    with PretendedCuda() as mode:
        image = sample.read_image(tiny / "photo.jpg")
        video = sample.generate(image, PROMPT, files, sample.Settings(steps=2, device="cuda:0", **settings))
    return video, waits[:2]


@pytest.mark.parametrize("capability, settings", [
    ((7, 5), {"frames": 1}), ((9, 0), {"frames": 1, "emulate": True}),
    ((12, 0), {"frames": 5, "two_pass": True, "lora": True, "cfg": 2.0})])
def test_no_step_waits_for_the_gpu_or_mixes_devices(capability, settings, cuda, tiny, monkeypatch):
    cuda.capability = capability
    loras = [(tiny / "nvfp4_lora.safetensors", 1.0)] if settings.pop("lora", False) else []
    video, waits = waits_on_a_gpu(tiny, monkeypatch, size=(64, 48), loras=loras, **settings)
    assert video.shape == (settings["frames"], 48, 64, 3) and video.device.type == "cpu" and waits == [0, 0]


# the pipeline, with networks that only record what they are given

class Fakes:
    """The VAE repeats averages of 8 x 8 pixels; the DiT's velocity leads to the latents of the picture."""

    def __init__(self, monkeypatch):
        self.log, self.loaded, self.dit_calls, self.clip_calls, self.prompts = [], [], [], [], []
        self.modes, self.adapters = [], []  # of the DiT's quantized layers; its LoRAs
        for name in ("dit", "vae", "umt5", "clip"):
            monkeypatch.setattr(wan_fp4, f"load_{name}", self.loader(name), raising=False)
        monkeypatch.setattr(sample, "check_files", lambda *_: None)  # the files hold no networks

    def loader(self, name):
        def load(path, device="cpu", dtype=None, loras=(), stream=False, mode=None, two_pass=False):
            assert all(network() is None for network in self.loaded)  # one network in memory at a time
            self.log.append(name)
            self.modes += [(mode, two_pass)] if name == "dit" else []
            self.adapters += loras
            module = torch.nn.Module()
            self.loaded.append(weakref.ref(module))
            module.forward = getattr(self, name, None)
            module.encode, module.decode_chunks = self.encode, self.decode_chunks
            module.blocks = torch.nn.ModuleList()
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

    def decode_chunks(self, latents):
        for i in range(latents.shape[2]):
            piece = latents[:, :3, i:i + 1].repeat(1, 1, 4 if i else 1, 1, 1).clamp(-1, 1)
            yield piece.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)

    def dit(self, x, t, text, image, y):
        self.dit_calls.append((x.clone(), t, text, image, y))
        return (x - y[:, 4:, :1]) / (t / 1000) + 0 * text.mean()


@pytest.fixture
def fakes(monkeypatch):
    return Fakes(monkeypatch)


SIGNS_OF_NETWORKS = {  # by flag: a tensor's official name, and that of a library
    "dit": ("img_emb.proj.1.weight", "condition_embedder.image_embedder.ff.net.0.proj.weight"),
    "dit-low": ("time_projection.1.weight", "condition_embedder.time_proj.weight"),
    "text-encoder": ("blocks.1.pos_embedding.embedding.weight",
                     "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"),
    "clip": ("transformer.0.attn.to_qkv.weight", "vision_model.encoder.layers.0.self_attn.q_proj.weight"),
    "vae": ("decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma")}


def signs(flag, naming=0):
    """The tensors by which a network is recognized."""
    patch = {"patch_embedding.weight": torch.zeros(4, 36, 1, 2, 2)} if flag.startswith("dit") else {}
    return patch | {SIGNS_OF_NETWORKS[flag][naming]: torch.zeros(1)}


@pytest.fixture
def place(tmp_path, monkeypatch, spiece_tensor):
    """A checkout with a demo (headers only), a photo, and nothing else; the current folder."""
    (tmp_path / "demo").mkdir()
    for flag, path in demo_files(tmp_path / "demo").items():
        tensors = signs(flag) | ({"spiece_model": spiece_tensor} if flag == "text-encoder" else {})
        save_file(tensors, path, {"frames": "13", "area": "9216", "prompt": "zoom in"} if flag == "dit" else None)
    Image.fromarray(picture(150, 200)).save(tmp_path / "photo.png")
    monkeypatch.setattr(sample, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def models(place):
    """A models folder. Its files hold the tensors that identify them and no more: the fakes do not read them."""
    (place / "models").mkdir()
    for flag, path in demo_files(place / "demo").items():
        shutil.copy(path, place / "models" / f"{flag}.safetensors")
    return place / "models"


def run(arguments):
    sample.main(arguments.split())


NOT_NAMED = dict.fromkeys(sample.NETWORKS)


def test_demo_run(place, fakes, capsys):
    run("photo.png --fps 25")
    out, err = capsys.readouterr()
    assert err.count("this is the demo model") == 1 and "create the folder models/" in err
    assert "photo-zoom-in-seed0.mp4: 112x80, 13 frames, seed 0" in out.splitlines()[-1]
    for words in ("photo.png -> 13 frames of 112x80", "peak memory", "text ", "decode ", "'zoom in'"):
        assert words in out
    frames, rate, _, metadata = decode(place / "photo-zoom-in-seed0.mp4")
    assert frames.shape == (13, 80, 112, 3) and rate == 25
    assert metadata["title"] == "zoom in" and "seed 0" in metadata["comment"] and "lcm" in metadata["comment"]
    still = np.asarray(Image.open("photo.png").resize((112, 80), Image.BICUBIC))
    assert psnr(frames[0], still) > 20 and psnr(frames[-1], still) > 20  # the photo, in blocks of 8 x 8
    assert sorted(os.listdir(place)) == ["demo", "photo-zoom-in-seed0.mp4", "photo.png"]


@pytest.mark.parametrize("seed", [0, 7])
def test_what_the_networks_are_given(place, fakes, seed):
    run(f"photo.png --seed {seed}")
    assert fakes.log == ["umt5", "clip", "vae", "dit", "vae"] and fakes.clip_calls[0].shape == (1, 3, 28, 28)
    assert all(network() is None for network in fakes.loaded)  # each was freed
    assert fakes.video.shape == (1, 3, 13, 80, 112) and (fakes.video[:, :, 1:] == 0).all()
    assert -1 <= fakes.video.min() < -0.2
    generator, shape = torch.Generator().manual_seed(seed), (1, 16, 4, 10, 14)
    levels = golden_sigmas("normal", 5, 4).tolist()
    assert len(fakes.dit_calls) == 4
    for (x, t, text, image, y), sigma in zip(fakes.dit_calls, levels):
        noise = torch.randn(shape, generator=generator)  # all noise is from one generator
        latents = y[:, 4:, :1].expand(shape)  # where the fake DiT's velocity leads
        torch.testing.assert_close(x, (1 - sigma) * latents + sigma * noise, rtol=1e-5, atol=1e-5)
        assert t.shape == (1,) and t.item() == pytest.approx(1000 * sigma, rel=1e-4)
        assert text.shape == (1, fakes.prompts[0].shape[1], 8) and image.shape == (1, 5, 6)
        assert y.shape == (1, 20, 4, 10, 14) and (y[:, :4, 0] == 1).all() and (y[:, :4, 1:] == 0).all()


@pytest.mark.parametrize("cfg", [1.0, 3.0, 0.5])
def test_guidance_leads_away_from_the_negative_prompt(place, fakes, spiece, cfg):
    """v = v_negative + cfg (v_positive - v_negative), step by step in float64, far from where pixels saturate."""
    fakes.dit = lambda x, t, text, image, y: fakes.dit_calls.append(0) or 0.3 * x + 0.02 * text.mean()
    files, kept = demo_files(place / "demo"), []
    settings = sample.Settings(frames=5, size=(64, 96), steps=3, cfg=cfg, negative="zoom out", sampler="euler")
    video = sample.generate(torch.rand(3, 96, 64), "pan left", files, settings, kept.append)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    positive, negative = (0.02 * np.mean([*tokenizer.encode(text), 3]) for text in ("pan left", "zoom out"))
    assert abs(positive - negative) > 0.01
    x = torch.randn(1, 16, 2, 12, 8, generator=torch.Generator().manual_seed(0)).double().numpy()
    for sigma, sigma_next in itertools.pairwise(sample.sigmas("normal", 3, 5.0).double().tolist()):
        v, v_negative = 0.3 * x + positive, 0.3 * x + negative
        x = x + (sigma_next - sigma) * (v_negative + cfg * (v - v_negative))
    np.testing.assert_allclose(kept[0].double().numpy(), x, rtol=0, atol=1e-5)
    assert len(fakes.dit_calls) == (3 if cfg == 1 else 6)
    decoded = torch.cat(list(fakes.decode_chunks(kept[0])), dim=2)
    assert video.shape == (5, 96, 64, 3) and video.dtype == torch.uint8
    assert torch.equal(video, ((decoded[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0))


def test_the_flags_reach_the_dit(place, fakes, capsys):
    run("photo.png -o a.mp4 --frames 1 --size 70x90")
    out = capsys.readouterr().out
    assert fakes.modes == [(None, False)] and ", sdpa attention, on cpu" in out
    assert "1 frames of 64x96" in out  # the nearest multiples of 16
    run("photo.png -o a.mp4 --frames 1 --emulate --two-pass")
    assert fakes.modes[1:] == [("emulate", True)] and "tensor cores emulated" in capsys.readouterr().out


def test_loras_are_used_reported_and_recorded(place, fakes, capsys):
    for name in ("a", "b"):
        save_file({"w.diff": torch.zeros(1)}, f"{name}.safetensors")
    run("photo.png -o a.mp4 --lora a.safetensors:0.5 --lora b.safetensors")
    lines = capsys.readouterr().out.splitlines()
    first = lines.index("a.safetensors at 0.5: used")
    assert lines[first - 1].startswith("dit.safetensors: ")
    assert lines[first + 1] == "b.safetensors at 1.0: used"
    comment = decode(place / "a.mp4")[3]["comment"]
    assert "dit.safetensors, a.safetensors at 0.5, b.safetensors at 1; 112x80, 13 frames; torch" in comment


# memory

def test_free_memory_is_what_the_system_says():
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2 ** 20 < sample.free_memory(torch.device("cpu")) < pages


@pytest.mark.parametrize("spare, streams", [(0, False), (-1, True)])
@pytest.mark.parametrize("network", ["dit", "umt5"])
def test_blocks_stream_where_they_do_not_fit(network, spare, streams, cuda, monkeypatch):
    """On a GPU whose free memory is that of the blocks, of the forward and of a margin, or a byte less."""
    streamed = []
    stand_in = types.SimpleNamespace(stream_blocks=lambda network, *_: streamed.append(network))
    monkeypatch.setitem(sys.modules, "extra.stream", stand_in)
    with PretendedCuda():
        model = getattr(wan_fp4, f"load_{network}")(DEMO / f"{network}.safetensors", "cuda", stream=True)
        size = sum(t.nbytes for t in (*model.blocks.parameters(), *model.blocks.buffers()))
        cuda.free, cuda.unused = size + 2 ** 20 + sample.MARGIN + spare, 2 ** 19
        sample.place_blocks(model, 2 ** 20, torch.device("cuda"), False)
    assert streamed == [model] * streams
    assert len({p.device for p in model.blocks.parameters()} | {torch.device("cpu")}) == (1 if streams else 2)


def test_what_decides_on_streaming(monkeypatch):
    """--offload, and the memory of a forward: one of the DiT has a token for 2 x 2 latents."""
    given = []
    monkeypatch.setattr(sample, "place_blocks",
                        lambda network, *rest: given.append((type(network).__name__, *rest)))
    for offload in True, False:
        sample.encode_text(DEMO / "umt5.safetensors", ["a"], "cpu", offload)
        settings, y = sample.Settings(offload=offload), torch.zeros(1, 20, 3, 4, 6)
        dit = sample.load_dit(DEMO / "dit.safetensors", (), settings, y)
        working = sample.WORKING * (3 * 2 * 3) * dit.cfg.dim
        assert given[-2:] == [("UMT5Encoder", 0, "cpu", offload), ("WanDiT", working, "cpu", offload)]


# the video's name, and the latents beside it

@pytest.mark.parametrize("image, prompt, name", [
    ("x/my photo.jpg", "Pan: 50% left/up*", "my-photo-Pan-50-left-up-seed0.mp4"), ("图.jpg", "", "图-seed0.mp4"),
    ("фото.jpg", "поверни налево", "фото-поверни-налево-seed0.mp4"), ("?.png", "", "seed0.mp4"),
    ("a/../b c.jpg", "\u202e/\\:*?\"<>|\0\n%d", "b-c-d-seed0.mp4"), ("\ud800.png", "zoom", "zoom-seed0.mp4"),
    ("-x.png", "", "x-seed0.mp4"), ("CON.png", "é图" * 200, None)])
def test_names_keep_letters_of_every_script_and_nothing_else(image, prompt, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with sample.reserve(None, image, prompt, 0) as (path, kept):
        assert path == name if name else len(os.fsencode(path)) <= 115
        assert os.fsdecode(os.fsencode(path)) == path and os.path.dirname(path) == ""
        assert Path(f"{path}.latents.safetensors").samefile(kept)


def test_names_are_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photo-seed3.mp4", "photo-seed3-1.mp4", "photo-seed3-2.mp4", "photo-seed3-4.mp4"):
        with sample.reserve(None, "photo.jpg", "", 3) as (path, _):
            assert path == name
        Path(path).touch()
        if path == "photo-seed3-2.mp4":
            Path("photo-seed3-3.mp4.latents.safetensors").touch()  # of an interrupted run
    assert [*map(str, Path().glob("*.latents.*"))] == ["photo-seed3-3.mp4.latents.safetensors"]
    with sample.reserve("b.mp4", "photo.jpg", "", 3) as (path, _):
        assert path == "b.mp4"


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


@pytest.mark.parametrize("output", ["again.mp4", "again/"])
def test_latents_outlive_a_decode_that_fails(place, fakes, monkeypatch, capsys, output):
    """Hours of sampling are not lost: --decode makes the video that the run would have made."""
    run("photo.png -o whole.mp4")
    decode_chunks, fakes.decode_chunks = fakes.decode_chunks, lambda latents: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run(f"photo.png -o {output}")
    kept = f"{output.rstrip('/')}.latents.safetensors"
    assert sorted(os.listdir(place)) == [kept, "demo", "photo.png", "whole.mp4"]
    assert f"--decode {place / kept}" in capsys.readouterr().err
    fakes.decode_chunks = decode_chunks
    run(f"--decode {kept} -o {output}")
    if output == "again/":
        assert len(os.listdir("again")) == 13
    else:
        assert Path("whole.mp4").read_bytes() == Path("again.mp4").read_bytes()
        run(f"--decode {kept}")  # into the place that its name tells, as a run that was not interrupted
        assert Path("whole.mp4").read_bytes() == Path("again.mp4").read_bytes() and not Path(kept).exists()
    assert "again" in capsys.readouterr().out.splitlines()[-1]


def test_latents_that_cannot_be_kept_are_a_warning(place, fakes, monkeypatch, capsys):
    def full(*args):
        Path(args[1]).write_bytes(b"half")
        raise wan_fp4.SafetensorError("I/O error: No space left on device")
    monkeypatch.setattr(wan_fp4, "serialize_file", full)
    run("photo.png -o a.mp4 --frames 1")
    assert "warning: the latents are not kept: " in capsys.readouterr().err
    assert sorted(os.listdir(place)) == ["a.mp4", "demo", "photo.png"]


RAISED = {  # where, what: what the one line says
    ("dit", torch.OutOfMemoryError("CUDA out of memory.\nTried")): "dit.safetensors: out of memory; try --offlo",
    ("decode_chunks", torch.OutOfMemoryError("CUDA out")): "vae.safetensors: out of memory; try --offload",
    ("umt5", RuntimeError("DefaultCPUAllocator: can't allocate memory")): "out of memory; try --offload",
    ("clip", RuntimeError("shapes do not match\nmore")): "clip.safetensors: shapes do not match; check that",
    ("umt5", IndexError("index out of range")): "text: {demo}/umt5.safetensors: index out of range; check",
    ("encode", ValueError("math domain error")): "encode: {demo}/vae.safetensors: math domain error\n",
    ("dit", wan_fp4.SafetensorError("header")): "dit.safetensors: header; check that the file is complete",
    ("clip", PermissionError(13, "Permission denied", "x")): "error: x: permission denied\n",
    ("dit", KeyboardInterrupt()): "sample.py: interrupted",
}


@pytest.mark.parametrize("where, error", RAISED)
def test_errors_of_libraries_become_one_line(place, fakes, monkeypatch, capsys, where, error):
    def fail(*args):
        raise error
    monkeypatch.setattr(fakes, where, fail)
    monkeypatch.setattr(sample, "tqdm", lambda items, **_: items)
    with pytest.raises(SystemExit) as stop:
        run("photo.png -o a.mp4 --frames 1")
    code, start = (130, "interrupted") if isinstance(error, KeyboardInterrupt) else (2, "error: ")
    err = capsys.readouterr().err
    assert stop.value.code == code and RAISED[where, error].format(demo=place / "demo") in err
    assert err.splitlines()[-1].startswith(f"sample.py: {start}") and not Path("a.mp4").exists()
    assert sorted({*os.listdir(place)} - {"a.mp4.latents.safetensors"}) == ["demo", "photo.png"]


@pytest.mark.parametrize("at", [0, 3])
def test_nan_is_an_error_not_a_video(place, fakes, capsys, at):
    dit, count = fakes.dit, itertools.count()
    fakes.dit = lambda x, *rest: dit(x, *rest) * (math.nan if next(count) == at else 1)
    with pytest.raises(SystemExit):
        run("photo.png -o a.mp4 --frames 1")
    assert "got NaN or infinity, expected numbers" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(os.listdir(place)) == ["demo", "photo.png"]


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
    "flat": {flag: (f"{flag}.safetensors", 0) for flag in SIGNS_OF_NETWORKS if flag != "dit-low"},
    "Wan2.2": {"dit": ("a_high_noise.safetensors", 0), "dit-low": ("a_low_noise.safetensors", 0),
               "text-encoder": ("b.safetensors", 0), "vae": ("c.safetensors", 0)},
    "Wan2.2 of diffusers": {"dit": ("transformer/a.safetensors", 1), "vae": ("vae/a.safetensors", 1),
                            "dit-low": ("transformer_2/a.safetensors", 1),
                            "text-encoder": ("text_encoder/a.safetensors", 1)}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_models_folder(place, layout):
    for flag, (name, naming) in LAYOUTS[layout].items():
        path, prefix = place / "models" / name, "visual." if name.startswith("models_clip") else ""
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "dit-low" if flag == "dit" and "Wan2.2" in layout else flag  # without an image branch
        tensors = {prefix + name: tensor for name, tensor in signs(kind, naming).items()}
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


def test_models_may_be_links_that_lead_back(models, tmp_path_factory, monkeypatch):
    """As in a download cache, or where ComfyUI's folder is linked. Nothing is found twice, nor walked twice."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for i in range(2):  # cycles that are not stopped would be walked 2 ** 40 times
        os.symlink(models, models / f"itself{i}")
    os.symlink("vae.safetensors", models / "the-same-vae.safetensors")
    (models / "dit.safetensors").rename(elsewhere / "0123abcd.safetensors")
    os.symlink(elsewhere, models / "linked")
    os.symlink("0123abcd.safetensors", elsewhere / "dit.safetensors")
    os.mkfifo(models / "a.safetensors")
    walk = os.walk

    def counted(*args, **kwargs):
        for count, entry in enumerate(walk(*args, **kwargs)):
            assert count < 100
            yield entry

    monkeypatch.setattr(os, "walk", counted)
    found, _ = sample.find_files(NOT_NAMED)
    assert found.keys() == demo_files().keys() and found["dit"].parent == models / "linked"


def test_two_files_of_a_network(models):
    other = models / "vae" / "other.safetensors"
    other.parent.mkdir()
    shutil.copy(models / "vae.safetensors", other)
    with pytest.raises(ValueError, match="models: 2 files found for vae: .*; choose one with --vae"):
        sample.find_files(NOT_NAMED)
    assert sample.find_files(NOT_NAMED | {"vae": str(other)})[0]["vae"] == other


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


def test_a_named_network_never_falls_back_to_the_demo(place):
    with pytest.raises(FileNotFoundError, match="no file found for Wan2.1 I2V's dit, text-encoder, clip"):
        sample.find_files(NOT_NAMED | {"vae": DEMO / "vae.safetensors"})
    (place / "demo" / "clip.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="clip.safetensors: no such file"):
        sample.find_files(NOT_NAMED)


# the command line

REFUSED = {  # arguments: what the one line says
    "photo.png --frames 80": "frames 80: expected 4k \\+ 1; the nearest are 77 and 81",
    "photo.png --size 16x17000": "size: side 17008: expected 16 to 16384",
    "photo.png --seed -1": "seed -1: expected 0 to",
    "photo.png --sampler dpm": "'?lcm'?, '?euler'?, '?heun'?",
    "photo.png --device mps": "--device mps: only cpu and cuda are supported",
    "photo.png --two-pass --device cpu": "--two-pass: cpu does not quantize activations",
    "photo.png --negative blur": "--negative: .*--cfg",
    "photo.png -o kept.mp4": "kept.mp4.latents.safetensors: holds the latents of",
    "photo.png -o a.avi": "a.avi: unknown extension '.avi', expected .mp4",
    "photo.png -o demo": "demo: is a folder that is not empty; give another name",
    f"photo.png -o {'a' * 240}.mp4": "aaa.mp4.*: [Ff]ile name too long",
    "missing.png": "missing.png: no such file",
    "text.png": "text.png: is not a picture, expected png, jpg or webp",
    "photo.png --lora-low x": "--lora-low: this model has one DiT",
    "photo.png --vae {demo}/clip.safetensors": "this is a CLIPVision, which belongs to --clip",
    "photo.png --dit-low {demo}/dit.safetensors": "dit.safetensors: this model does not use it; leave it out",
    "photo.png --lora lost.safetensors:1": "lost.safetensors: no such file",
    "photo.png --lora model.safetensors": "model.safetensors: blocks.0.ffn.0.weight: .*no part of a LoRA",
    "--decode channels": "--decode channels: latents: got F32 \\(1, 17, 1, 2, 2\\), expected F32 \\(1, 16, T",
    "--decode nan": "--decode nan: latents: got NaN or infinity",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_bad_arguments_are_refused_before_any_work(place, monkeypatch, capsys, arguments):
    monkeypatch.setattr(sample, "HERE", REPOSITORY)  # the real demo, checked by its headers
    monkeypatch.setattr(sample, "generate", None)
    Path("text.png").write_text("not an image\n" * 50)
    save_file({"blocks.0.ffn.0.weight": torch.ones(2, 2)}, "model.safetensors")
    for name, latents in {"latents": torch.ones(1, 16, 1, 2, 2), "channels": torch.ones(1, 17, 1, 2, 2),
                          "nan": torch.full((1, 16, 1, 2, 2), math.nan),
                          "kept.mp4.latents.safetensors": torch.ones(1)}.items():
        save_file({"latents": latents}, name)
    before, given = sorted(os.listdir(place)), arguments.format(demo=DEMO).split()
    if "{demo}" in arguments:
        given += [part for flag, path in demo_files().items() if f"--{flag}" not in given
                  for part in (f"--{flag}", str(path))]
    fails(sample.main, given, REFUSED[arguments])
    assert capsys.readouterr().out == "" and sorted(os.listdir(place)) == before


@pytest.mark.parametrize("key, value, text", [
    ("frames", "many", "dit.safetensors: frames in its header: got 'many', expected a whole number"),
    ("frames", "6", "frames 6: expected 4k"), ("area", "5", "area 5: expected 256 to"),
    ("area", "9" * 5000, "dit.safetensors: area in its header: got '99999999999999999999', expected")])
def test_bad_numbers_in_the_header_of_the_dit(place, fakes, key, value, text):
    save_file(signs("dit"), "demo/dit.safetensors", {key: value})
    fails(sample.main, ["photo.png"], text)


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
    tensors, cfg = demo_tensors("umt5"), wan_fp4.load_umt5(DEMO / "umt5.safetensors").cfg
    umt5 = UMT5EncoderModel(UMT5Config(vocab_size=cfg.vocab, d_model=cfg.dim, d_kv=cfg.inner // cfg.heads,
                                       d_ff=cfg.ffn_dim, num_layers=cfg.num_blocks, num_heads=cfg.heads))
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
    ours = wan_fp4.load_clip(DEMO / "clip.safetensors")
    cfg, side = ours.cfg, ours.image_size
    clip = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=cfg.dim, intermediate_size=cfg.ffn_dim, num_hidden_layers=cfg.num_blocks + 1,
        num_attention_heads=cfg.dim // cfg.head_dim, image_size=side, patch_size=cfg.patch, hidden_act="gelu"))
    tensors, shapes = demo_tensors("clip"), {name: tensor.shape for name, tensor in clip.state_dict().items()}
    for name in [name for name in tensors if "to_qkv" in name]:
        tensors |= {name.replace("attn.to_qkv", x): part for x, part in zip("qkv", tensors.pop(name).chunk(3))}
    names = official_clip_names(clip, blocks=cfg.num_blocks + 1).items()
    filled(clip, {name: tensors[official].view(shapes[name]) for official, name in names},
           ["post_layernorm.weight", "post_layernorm.bias"])
    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    pixels = (library_pixels(photo, side, side) - mean[:, None, None]) / std[:, None, None]
    return clip(pixels, output_hidden_states=True).hidden_states[-2]


def library_vae():
    """diffusers' VAE, and the mean and the deviation of its latents."""
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
    cfg = wan_fp4.load_vae(DEMO / "vae.safetensors").cfg
    assert cfg.num_res_blocks == 1  # the converter expects two, and so a third in the decoder

    def renumbered(match):
        level, i = divmod(int(match[1]), 3)
        return f"decoder.upsamples.{4 * level + (3 if i == 2 else i)}."
    vae = AutoencoderKLWan(base_dim=cfg.dims[0], dim_mult=[dim // cfg.dims[0] for dim in cfg.dims],
                           num_res_blocks=1)
    tensors = {re.sub(r"^decoder\.upsamples\.(\d+)\.", renumbered, name): tensor
               for name, tensor in demo_tensors("vae").items()}
    filled(vae, convert_wan_vae_to_diffusers(tensors))
    return vae, *(torch.tensor(values)[:, None, None, None]
                  for values in (vae.config.latents_mean, vae.config.latents_std))


@torch.no_grad()
def library_video(photo, frames):
    """The recipe by hand, 4 steps of LCM from seed 0: latents (1, 16, T, H, W), video (1, 3, F, h, w)."""
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
    cfg = wan_fp4.load_dit(DEMO / "dit.safetensors").cfg
    dit = filled(WanTransformer3DModel(
        num_attention_heads=cfg.dim // cfg.head_dim, attention_head_dim=cfg.head_dim, in_channels=36,
        text_dim=cfg.text_dim, ffn_dim=cfg.ffn_dim, num_layers=cfg.num_blocks, image_dim=cfg.image_dim,
        added_kv_proj_dim=cfg.dim), convert_wan_transformer_to_diffusers(demo_tensors("dit")))
    text, image, (vae, mean, std) = library_text(PROMPT), library_image(photo), library_vae()
    video = F.pad(library_pixels(photo, *photo.size)[:, :, None] * 2 - 1, (0, 0, 0, 0, 0, frames - 1))
    z = (vae.encode(video).latent_dist.mode() - mean) / std  # (1, 16, T, H, W)
    mask = torch.zeros_like(z[:, :4])
    mask[:, :, 0] = 1
    y, generator = torch.cat([mask, z], 1), torch.Generator().manual_seed(0)
    x = torch.randn(z.shape, generator=generator)
    for sigma, sigma_next in itertools.pairwise(golden_sigmas("normal", 5, 4).tolist()):
        x = x - sigma * dit(torch.cat([x, y], 1), torch.tensor([1000 * sigma]), text, image).sample
        if sigma_next:
            x = (1 - sigma_next) * x + sigma_next * torch.randn(x.shape, generator=generator)
    return x, vae.decode(x * std + mean).sample


def test_the_demos_video_is_that_of_the_libraries():
    """The whole path, for the demo's picture and seed 0, by Pillow, transformers, diffusers and comfy-kitchen."""
    own, ours, photo = sample.own_settings(demo_files()), [], Image.open(PHOTO)
    assert own["prompt"] == PROMPT and own["area"] == math.prod(photo.size) and photo.mode == "RGB"
    settings = sample.Settings(frames=9, area=own["area"])  # more take diffusers' VAE longer
    video = sample.generate(sample.read_image(PHOTO), PROMPT, demo_files(), settings, ours.append)
    latents, frames = library_video(photo, settings.frames)
    assert relative_error(ours[0], latents) < 5e-5
    frames = ((frames[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 3, 0)  # (F, h, w, 3)
    assert video.shape == frames.shape and (video - frames).abs().max() < 1


def test_the_seed_changes_the_frames(tmp_path):
    frames = []
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(frames))
        run(f"{PHOTO} -o {folder} --seed {seed} --frames 1 --size 64x64 --steps 1")
        frames.append(np.asarray(Image.open(folder / "0000.png")).astype(int))
    assert np.array_equal(*frames[:2]) and np.abs(frames[0] - frames[2]).mean() > 1


# Wan2.2's two experts, by diffusers

def expert(seed):
    """One of diffusers' transformers without an image branch."""
    return random_weights(diffusers_dit(image_dim=None, added_kv_proj_dim=None), seed)


def expert_file(theirs, path, prefix="", names=wan_fp4.official_dit_name):
    path.parent.mkdir(exist_ok=True)
    tensors = {prefix + names(name): tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    save_file(tensors, path, {"head_dim": "32"})
    return path


@pytest.mark.parametrize("prefix, names", [
    ("", wan_fp4.official_dit_name), ("model.diffusion_model.", wan_fp4.official_dit_name), ("", str)])
@torch.no_grad()
def test_an_expert_equals_diffusers_under_all_names(prefix, names, tmp_path):
    theirs, i = expert(3), dit_inputs(2, 4, 6, 9)
    path = expert_file(theirs, tmp_path / "x.safetensors", prefix, names)
    ours = wan_fp4.load_dit(path)
    expected = theirs(torch.cat([i["x"], i["y"]], 1), i["t"], padded(i["text"])).sample
    assert relative_error(ours(**i | {"image": None}), expected) < 1e-5
    assert ours.cfg.image_dim is None


def test_a_damaged_wan21_is_not_taken_for_an_expert(dit_path, tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {name: tensor for name, tensor in load_file(dit_path).items() if not name.startswith("img_emb.")}
    save_file(tensors, path, {"head_dim": "32"})
    with pytest.raises(ValueError, match="img_emb.proj.0.weight: got nothing, expected a tensor"):
        sample.check_files(sample.find_files(NOT_NAMED | demo_files() | {"dit": path})[0], sample.Settings())


@pytest.fixture(scope="session")
def two_experts(tmp_path_factory):
    """diffusers' two transformers, and their files as a run takes them."""
    folder, theirs = tmp_path_factory.mktemp("wan22"), (expert(1), expert(2))
    names = ("high_noise_model/m.safetensors", "low_noise_model/m.safetensors")
    return theirs, dict(zip(("dit", "dit-low"), (expert_file(t, folder / n) for t, n in zip(theirs, names))))


@pytest.fixture
def sampled(two_experts, monkeypatch):
    """Runs generate without text encoder and VAE: gives its latents, its inputs and how often it loaded a DiT."""
    i, loaded = dit_inputs(2, 4, 6, 9), []
    load = wan_fp4.load_dit

    def load_dit(path, *args, **kwargs):
        assert all(dit() is None for dit in loaded)  # the expert before is freed
        dit = load(path, *args, **kwargs)
        loaded.append(weakref.ref(dit))
        return dit
    monkeypatch.setattr(wan_fp4, "load_dit", load_dit)
    monkeypatch.delattr(wan_fp4, "load_clip")
    monkeypatch.setattr(sample, "encode_text", lambda path, prompts, *_: [i["text"], -i["text"]][:len(prompts)])
    monkeypatch.setattr(sample, "encode_first_frames", lambda *_: [i["y"]])
    monkeypatch.setattr(sample, "decode", lambda *_: None)
    files = {flag: None for flag in ("text-encoder", "vae")} | two_experts[1]

    def run(files=files, **settings):
        kept = []
        sample.generate(torch.rand(3, 32, 48), "x", files, sample.Settings(**settings), kept.append)
        return kept[0], i, len(loaded)
    return run


def pipeline_latents(theirs, i, noise, steps, shift, cfg):
    """Sampled by diffusers' pipeline with Euler's steps and ComfyUI's schedule "simple"."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline

    class Simple(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, steps, device=None):
            super().set_timesteps(sigmas=[1 - i / steps for i in range(steps)], device=device)
    pipeline = WanImageToVideoPipeline(None, None, None, Simple(shift=shift), transformer=theirs[0],
                                       transformer_2=theirs[1], boundary_ratio=0.9)
    pipeline.vae = types.SimpleNamespace(config=types.SimpleNamespace(z_dim=16))
    pipeline.prepare_latents = lambda *_: (noise, i["y"])
    pipeline.set_progress_bar_config(disable=True)
    text = padded(i["text"])
    return pipeline(Image.new("RGB", (48, 32)), prompt_embeds=text, negative_prompt_embeds=-text, height=32,
                    width=48, num_frames=5, num_inference_steps=steps, guidance_scale=cfg,
                    output_type="latent").frames


@pytest.mark.parametrize("steps, shift, cfg", [(4, 5.0, 1.0), (4, 3.0, 1.0), (8, 5.0, 1.0), (8, 3.0, 3.5)])
@torch.no_grad()
def test_two_experts_sample_what_diffusers_pipeline_does(steps, shift, cfg, sampled, two_experts):
    """With shift 3, a step is at exactly 900."""
    got, i, loads = sampled(steps=steps, shift=shift, cfg=cfg, negative="y" if cfg != 1 else "",
                            sampler="euler", scheduler="simple")
    noise = torch.randn(got.shape, generator=torch.Generator().manual_seed(0))
    expected = pipeline_latents(two_experts[0], i, noise, steps, shift, cfg)
    assert relative_error(got, expected) < 1e-5 and loads == 2
    swapped = pipeline_latents(two_experts[0][::-1], i, noise, steps, shift, cfg)
    assert relative_error(got, swapped) > 0.01


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_two_experts_of_the_same_weights_are_one_model(sampler, sampled, two_experts, tmp_path):
    """The noise that lcm adds goes on where the first one stopped."""
    copy = shutil.copy(two_experts[1]["dit"], tmp_path / "m.safetensors")
    one = {flag: None for flag in ("text-encoder", "vae")} | {"dit": two_experts[1]["dit"]}
    both = sampled(one | {"dit-low": copy}, sampler=sampler)[0]
    assert relative_error(both, sampled(one, sampler=sampler)[0]) < 1e-6


HIGH = {  # scheduler, shift, steps: how many of them the high-noise expert takes
    ("simple", 5.0, 4): 2, ("simple", 3.0, 4): 2, ("simple", 5.0, 8): 3, ("simple", 3.0, 8): 3,
    ("simple", 8.0, 4): 2, ("simple", 3.0, 20): 6, ("simple", 5.0, 1): 1, ("normal", 5.0, 4): 2,
    ("normal", 3.0, 4): 1, ("normal", 5.0, 8): 3, ("normal", 0.05, 4): 1, ("linear_quadratic", 5.0, 4): 3,
    ("linear_quadratic", 5.0, 8): 6}


@pytest.mark.parametrize("case", HIGH)
def test_steps_are_dealt_out_at_900(case):
    scheduler, shift, steps = case
    settings = sample.Settings(scheduler=scheduler, shift=shift, steps=steps, loras=(1,), loras_low=(2,))
    experts = sample.experts({"dit": "high", "dit-low": "low"}, settings)
    assert [(path, loras) for path, loras, _ in experts] == [("high", (1,)), ("low", (2,))][:len(experts)]
    assert [len(levels) - 1 for *_, levels in experts] == [n for n in (HIGH[case], steps - HIGH[case]) if n]
    levels = torch.cat([experts[0][2], *(levels[1:] for *_, levels in experts[1:])])
    assert torch.equal(levels, sample.sigmas(scheduler, steps, shift))
    assert experts[-1][2][0] == experts[0][2][-1] or len(experts) == 1


PAIRS_OF_EXPERTS = {  # two paths, and what the error says; high comes first where it says nothing
    ("high_noise_model/m.safetensors", "low_noise_model/m.safetensors"): None,
    ("wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors", "wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors"): None,
    ("transformer/m.safetensors", "transformer_2/m.safetensors"): None,
    ("HighNoise.safetensors", "LowNoise.safetensors"): None, ("a.safetensors", "b.safetensors"): None,
    ("low_noise_model/m.safetensors", "high_noise_model/m.safetensors"): "exchange them",
    ("transformer_2/m.safetensors", "transformer/m.safetensors"): "exchange them",
    ("transformer_2", "transformer"): "exchange them", ("low_noise_model", "high_noise_model"): "exchange them",
    ("a.safetensors", "x/../a.safetensors"): "exchange them",
    ("a.safetensors", "link.safetensors"): "exchange them",
    ("a.safetensors", None): "no file found for Wan2.2 I2V's dit-low; name it with --dit-low FILE",
    (None, "b.safetensors"): "no file found for Wan2.2 I2V's dit; name it with --dit FILE"}


@pytest.mark.parametrize("pair", PAIRS_OF_EXPERTS)
def test_pairs_of_experts(pair, two_experts, place):
    text = PAIRS_OF_EXPERTS[pair]
    for folder in ("x", "models"):
        (place / folder).mkdir()
    for i, name in enumerate(pair):
        path = place / (name or "unused.safetensors")
        path = path if path.suffix else path / "m.safetensors"
        path.parent.mkdir(exist_ok=True)
        if name == "link.safetensors":
            path.symlink_to("a.safetensors")
        elif name:
            shutil.copy(two_experts[1]["dit"], path)
    files = {flag: path for flag, path in demo_files(place / "demo").items() if flag in ("text-encoder", "vae")}
    named = NOT_NAMED | files | dict(zip(("dit", "dit-low"), pair))
    if text:
        with pytest.raises((ValueError, FileNotFoundError), match=text):
            sample.find_files(named)
    else:
        assert sample.find_files(named)[0].keys() == {"dit", "dit-low", "text-encoder", "vae"}  # no CLIP


@pytest.mark.parametrize("high, low, text", [
    ("a", None, "got LoRAs for one of the two experts, expected them for both"),
    (None, "a", "got LoRAs for one of the two experts, expected them for both"), ("a", "a", None),
    (None, None, None)])
def test_loras_are_for_both_experts_or_none(high, low, text, two_experts, every_layer, lora_file):
    """A LoRA of Wan2.1 fits, without its parts for the image."""
    a = lora_file(spelled(every_layer), name="a")
    settings = sample.Settings(loras=((a, 1.0),) if high else (), loras_low=((a, 1.0),) if low else ())
    files = two_experts[1] | {flag: demo_files()[flag] for flag in ("text-encoder", "vae")}
    with pytest.raises(ValueError, match=text) if text else contextlib.nullcontext():
        sample.check_files(files, settings)
    if text is None and high:
        line, = wan_fp4.load_dit(two_experts[1]["dit"], loras=settings.loras).loras
        assert re.fullmatch(r"a: \d+ layers, skipped 6: .*img.* \(has no weight\)", line)


# --------------------------------------------------------------------------------------------------
# convert.py
# --------------------------------------------------------------------------------------------------

WIDTH, HIDDEN = 64, 200  # HIDDEN is a multiple of neither 16 nor 32
LINEARS = [f"{kind}.{x}" for kind, layers in {"self_attn": "q k v o", "cross_attn": "q k v o k_img v_img",
                                              "ffn": "0 2"}.items() for x in layers.split()]


def wan_shapes(**sizes):
    """{name: shape} of the Wan2.1 I2V DiT, at the 14B's sizes by default."""
    with torch.device("meta"):
        dit = wan_fp4.WanDiT(wan_fp4.DiTConfig(**sizes))
    return {name: tuple(tensor.shape) for name, tensor in dit.state_dict().items()}


def checkpoint(dtype=torch.bfloat16, prefix="", **sizes):
    """A small Wan checkpoint: {name: tensor}, some of the kept tensors in float32."""
    g = torch.Generator().manual_seed(0)
    sizes = dict(dim=WIDTH, ffn_dim=HIDDEN, num_blocks=2, head_dim=32, text_dim=32, image_dim=32) | sizes
    shapes = wan_shapes(**sizes)
    tensors = {name: torch.randn(shape, generator=g) * 0.05 for name, shape in shapes.items()}
    return {prefix + name: tensor if name.endswith(".modulation") else tensor.to(dtype)
            for name, tensor in tensors.items()}


def write_checkpoint(path, tensors=None, **metadata):
    save_file(checkpoint() if tensors is None else tensors, path, {"head_dim": "32"} | metadata)
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
    (checkpoint() | {"blocks.0.norm3.weight": torch.tensor([-math.inf] + [1.0] * (WIDTH - 1))},
     "norm3.weight: got NaN or inf"),
    ({"layer.weight": torch.ones(16, 16)}, "patch_embedding.weight: got nothing, expec"),
    ({n: t for n, t in checkpoint().items() if not n.startswith("blocks.1.ffn")}, "4 missing .first blocks.1.f"),
    (lora_factors("blocks.0.self_attn.q", torch.ones(64, 2), torch.ones(2, 64)), "this is a LoRA, which is no"),
    (checkpoint() | {"blocks.0.ffn.0.weight": torch.ones(16, 16).to(torch.float8_e4m3fn)}, "already quantized"),
    (checkpoint() | {"blocks.0.ffn.0.weight": torch.ones(16, 16).int()}, "got I32, expected BF16"),
    (checkpoint() | {"blocks.0.ffn.0.comfy_quant": torch.ones(2)}, "already quantized"),
    (checkpoint() | {"diffusion_model.head.head.bias": torch.ones(2)}, "head.head.bias: duplicate tensor .also"),
    (checkpoint() | {"blocks.0.ffn.0.weight": torch.ones(0, 16)}, "ffn.0.weight: got shape .0, 16., expected no"),
    (checkpoint() | {"blocks.999999999.ffn.0.weight": torch.ones(16, 16)}, "1 unexpected .first blocks.99999999"),
    (checkpoint() | {"blocks.0.ffn.0.weight_global_scale": torch.ones(())}, "python -m extra.lightx2v "),
])
def test_sources_that_are_refused(tmp_path, out, tensors, text):
    """At the analysis, or without one when the output is open. An older output is kept."""
    model = write_checkpoint(tmp_path / "m.safetensors", tensors)
    out.write_text("old")
    for flags in [], ["--nvfp4"]:
        fails(convert.main, ["-i", model, "-o", out, *flags], text)
        assert out.read_text() == "old" and sorted(tmp_path.iterdir()) == [model, out]


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
         "self_attn.o": (0, 0, 100), "ffn.0": (0, 20, 80), "ffn.2": (0, 0, 100),
         "all, with norms": (36.0, 4.7, 59.3)}


@pytest.fixture(scope="module")
def full_shapes():
    return wan_shapes()


def percentages(text):
    """Of a printed plan: {type of layer: (bf16, MXFP8, NVFP4)}."""
    return {kind: tuple(map(float, numbers.split())) for kind, numbers in re.findall(
        r"(?m)^([a-z][\w., ]*?) +(?:[b84]* )? +((?:[0-9.]+ *){3})$", text)}


def plan_of(shapes, flags):
    """The plan that --nvfp4, --custom-layers and so on give."""
    args = parse(flags)
    return convert.plan(shapes, args.base, args.custom_type, args.custom_layers, args.exclude_layers)


def test_the_recipe_gives_its_table_at_full_size(full_shapes):
    assert sum(map(math.prod, full_shapes.values())) == 16_394_878_784
    formats = plan_of(full_shapes, RECIPE)
    assert Counter(formats.values()) == {"nvfp4": 427, "mxfp8": 34, "bf16": 19}
    source = types.SimpleNamespace(shapes=full_shapes, dtypes=dict.fromkeys(full_shapes, torch.bfloat16))
    size = convert.header(convert.layout(source, formats), {})[2]
    assert f"{size / 2 ** 30:.2f}" == "10.13"
    fp8 = {name: "fp8" if fmt == "mxfp8" else fmt for name, fmt in formats.items()}
    size = convert.header(convert.layout(source, fp8), {})[2]  # as the card had it at first: 9.76 there
    assert size / 2 ** 30 == pytest.approx(10.13, abs=0.06)


@pytest.mark.parametrize("flags", [
    RECIPE, "--nvfp4", "--fp8", "--mxfp8", "--nvfp4 --custom-type fp8 --custom-layers ffn",
    "--fp8 --custom-type mxfp8 --custom-layers 'ffn|text_emb'",
    "--nvfp4 --fpmm-layers 'blocks.(1|3).(ffn.0|self_a)'"])
def test_printed_flags_give_the_same_plan(flags):
    shapes, args = wan_shapes(dim=64, ffn_dim=96), parse(flags)
    formats, exact = plan_of(shapes, flags), set()
    if args.fpmm_layers:
        exact = set(convert.matching(args.fpmm_layers, list(formats), "--fpmm-layers"))
    printed = convert.flags(formats, exact)
    assert plan_of(shapes, printed) == formats
    again = parse(printed).fpmm_layers
    assert (set(convert.matching(again, list(formats), "x")) if again else set()) == exact


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
    text = capsys.readouterr().out
    assert percentages(text.split("LoRA of rank")[0]) == TABLE
    assert "without effect here, accepted for compatibility: --wan, --comfy-quant, --save-quant" in text
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


@pytest.mark.parametrize("kind, scores, kurtosis, plan", [
    # each weight by its own score or kurtosis
    ("self_attn.k", [0.59, 0.6, 0.79, 0.8] + 16 * [0.1], {}, "488b" + 16 * "4"),
    ("cross_attn.q", 20 * [0.1], {3: 8.0, 4: 7.99}, "444b" + 16 * "4"),
    # a group's mean score decides for all its weights: the first two blocks, the last two, the others
    ("ffn.0", [0.5, 0.9] + 18 * [0.1], {}, "88" + 18 * "4"),
    ("ffn.2", 2 * [0.1] + [0.9, 0.7] + 14 * [0.1] + 2 * [0.3], {}, 20 * "4"),
    ("v_img", 5 * [0.1] + [0.7] + 14 * [0.1], {}, 20 * "4"),
    # a group that would be kept leaves it to each weight
    ("cross_attn.o", 18 * [0.1] + [0.7, 0.95], {}, 18 * "4" + "8b"),
    ("cross_attn.v", 18 * [0.1] + [0.7, 0.1], {19: 8.0}, 18 * "4" + "8b"),
    # groups that are alike get one format lower
    ("self_attn.v", [0.65, 0.65] + 18 * [0.62], {}, 20 * "4"),
    ("self_attn.v", [0.69, 0.69] + 18 * [0.62], {}, 20 * "8"),
    ("self_attn.o", [0.82, 0.82] + 18 * [0.78], {}, "88" + 18 * "4"),
    ("cross_attn.k_img", 20 * [0.1], {5: 20.0}, "44" + 16 * "8" + "44"),
    # MXFP8 takes a score of 0.5, even where the percentile is 0.3
    ("low", [0.45, 0.45] + 16 * [0.1] + [0.55, 0.55], {}, 18 * "4" + "88"),
])
def test_the_rules_of_the_plan_by_score(kind, scores, kurtosis, plan):
    """181 other weights make the 75th percentile 0.6 (0.3 for "low") and the 90th 0.8, whatever these 20 are."""
    names = [f"blocks.{i}.{kind}.weight" for i in range(20)]
    others = 120 * [0.1] + 40 * [0.3 if kind == "low" else 0.6] + 21 * [0.8]
    table = dict(zip(names, scores)) | {f"blocks.0.other{i}.weight": score for i, score in enumerate(others)}
    peaks = dict.fromkeys(table, 0.0) | {names[i]: peak for i, peak in kurtosis.items()}
    formats = convert.plan_by_score(table, peaks)
    assert "".join({"bf16": "b", "mxfp8": "8", "nvfp4": "4"}[formats[name]] for name in names) == plan


def test_the_plan_by_score_of_a_model(tmp_path, out, capsys):
    """48 weights of 288 have an excess kurtosis over 8: more than the tenth that a score alone keeps."""
    tensors = checkpoint(num_blocks=24)
    for i in range(24):
        for layer in "q", "k":
            tensors[f"blocks.{i}.self_attn.{layer}.weight"][0, 0] = 0.9 + 0.02 * i  # 18 sigma or more
    model = write_checkpoint(tmp_path / "m.safetensors", tensors)
    convert.main(["-i", model, "-o", out, "--plan", "score", "--simple", "--print-flags"])
    layers, text = read_layers(out), capsys.readouterr().out
    assert {f"blocks.{i}.{layer}" for i in range(24) for layer in LINEARS} - layers.keys() == {
        f"blocks.{i}.self_attn.{layer}" for i in range(24) for layer in ("q", "k")}
    blocks = "|".join(map(str, range(24)))
    assert rf'--exclude-layers "blocks\.({blocks})\.self_attn\.k\.weight|blocks' in text


def test_the_map_shows_every_layer():
    labels = {f"blocks.{n}.{layer}.weight": text for n in range(12)
              for layer, text in (("ffn.0", "NVFP4"), ("self_attn.q", "MXFP8" if n == 3 else "bf16"))}
    legend, *rows = convert.plan_map(labels | {"text_embedding.0.weight": "FP8"}, norms=6)
    assert [row.split() for row in rows[:3]] == [
        ["ffn.0", 12 * "4", "0.0", "0.0", "0.0", "100.0"],
        ["self_attn.q", "bbb8bbbbbbbb", "91.7", "0.0", "8.3", "0.0"],
        ["all,", "with", "norms", "56.7", "0.0", "3.3", "40.0"]]
    assert rows[3:] == ["text_embedding.0.weight: FP8", ""]
    assert legend.split()[4:] == "b bf16 % f FP8 % 8 MXFP8 % 4 NVFP4 %".split()
    colors = re.findall(r"\033\[48;2;([0-9;]+)m[48b]\033\[0m", "".join(convert.plan_map(labels, color=True)))
    assert Counter(colors) == {"70;160;90": 13, "230;170;50": 2, "200;75;75": 12}  # one of each in the legend


FPMM = ["--custom-type", "mxfp8", "--custom-layers", r"ffn\.0", "--fpmm-layers", r"blocks\.1\.(ffn|self_attn\.k)"]


def test_fpmm_layers_differ_only_in_their_markers(model, out, tmp_path, capsys):
    """They dequantize where the others quantize their inputs; ComfyUI reads the same key."""
    plain = tmp_path / "plain.safetensors"
    convert.main(["-i", model, "-o", plain, *FPMM[:4]])
    capsys.readouterr()
    convert.main(["-i", model, "-o", out, *FPMM])
    text = capsys.readouterr().out
    for kind, cells in ("ffn.0", "8W"), ("ffn.2", "4w"), ("self_attn.k", "4w"), ("self_attn.q", "44"):
        assert re.search(rf"\n{kind} +{cells} ", text)
    assert re.search(r"\nffn.0 +W8A16 +1 .*\nself_attn.k +NVFP4 +1 .*\nself_attn.k +W4A16 +1 ", text, re.DOTALL)
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
    convert.main(["-i", model, "--exclude-layers", r"blocks\.0\.ffn", "--fpmm-layers", "ffn", "--dry-run"])
    text = capsys.readouterr().out
    assert "--fpmm-layers: 2 of the 4 layers are kept" in text and re.search(r"\nffn.0 +bw .*\nffn.2 +bw ", text)


# Rounding

def rounded(w, fmt, *args, **kwargs):
    """w after quantize_weight and back."""
    return convert.dequantize_weight(convert.quantize_weight(w, fmt, *args, **kwargs), w.shape)


@pytest.mark.parametrize("fmt, least", [("nvfp4", 21), ("mxfp8", 30), ("fp8", 30), ("bf16", 999)])
def test_quantize_weight_gives_what_quant_linear_takes(fmt, least):
    w = torch.randn(72, 200).bfloat16()
    layer = quant.QuantLinear.from_tensors("x", convert.quantize_weight(w, fmt), 200, 72)
    assert layer.kind() == convert.FORMATS[fmt].replace("bf16", "bfloat16")
    assert convert.snr(w, layer.dequantized(torch.float32)) > least
    assert convert.snr(w, rounded(w, fmt)) == convert.snr(w, layer.dequantized(torch.float32))


@pytest.mark.parametrize("flags, layers", [("--fp8", 24), ("--custom-type fp8 --custom-layers ffn", 4)])
def test_fp8_has_one_scale_for_a_weight(model, out, flags, layers):
    convert.main(["-i", model, "-o", out, *flags.split()])
    written, markers = load_file(out), read_layers(out)
    names = [name for name, info in markers.items() if info["format"] == "float8_e4m3fn"]
    assert len(names) == layers and len(markers) == 24
    for name in names:
        stored, w = layer_tensors(written, name), checkpoint()[f"{name}.weight"]
        scale = w.float().abs().max() / 448
        assert stored["weight_scale"].dtype == torch.float32 and stored["weight_scale"] == scale
        assert same_bits(stored["weight"], (w.float() / scale).to(torch.float8_e4m3fn))
        assert json.loads(bytes(stored["comfy_quant"].tolist())) == markers[name] == {
            "format": "float8_e4m3fn", "orig_dtype": "torch.bfloat16", "orig_shape": list(w.shape)}
        linear = quant.QuantLinear.from_tensors(name, stored, *w.shape[::-1])
        assert linear.kind() == "FP8" and convert.snr(w, linear.dequantized(torch.float32)) > 30


# The LoRA of the error

def test_low_rank_is_the_best_there_is():
    error = torch.randn(160, 256, generator=torch.Generator().manual_seed(0))
    up, down, shares = convert.low_rank(error, 16)
    s = torch.linalg.svdvals(error)
    assert torch.allclose(shares, (s.square().cumsum(0) / s.square().sum())[:16].double(), atol=1e-5)
    assert up.shape == (160, 16) and down.shape == (16, 256)
    left = (error - up @ down).square().sum() / error.square().sum()
    assert abs(1 - left - shares[-1]) < 1e-5
    assert convert.low_rank(error[:8], 64)[0].shape == (8, 8)


def test_large_low_rank_is_randomized_and_nearly_the_best():
    error, state = torch.randn(600, 700), torch.random.get_rng_state()
    up, down, shares = convert.low_rank(error, 64)
    s = torch.linalg.svdvals(error)
    assert 0.98 < shares[-1] / (s[:64].square().sum() / s.square().sum()) <= 1.0001
    assert torch.equal(state, torch.random.get_rng_state())
    assert all_same_bits((up, down), convert.low_rank(error, 64)[:2])
    assert not torch.equal(up, convert.low_rank(error, 64, seed=1)[0])


def test_the_lora_corrects_the_layers_that_it_names(model, out, capsys):
    convert.main(["-i", model, "-o", out, "--extract-lora", "--lora-rank", "16",
                  "--exclude-layers", r"blocks\.1\."])
    lora, base = load_file(out.with_name("out_lora.safetensors")), load_file(out)
    layers = [f"blocks.0.{layer}" for layer in ("ffn.0", "ffn.2", "self_attn.v", "self_attn.o")]  # by default
    suffixes = "lora_up.weight", "lora_down.weight", "alpha"
    assert set(lora) == {f"diffusion_model.{x}.{suffix}" for x in layers for suffix in suffixes}
    report, found = capsys.readouterr().out, []
    assert "LoRA: layers  holds  mean dB  with it" in report
    assert 'load out_lora.safetensors with the node "Load LoRA (Bypass, Model Only) (for debugging)"' in report
    for layer in layers:
        w = checkpoint()[f"{layer}.weight"]
        stored = layer_tensors(base, layer) | {"bias": torch.zeros(len(w))}
        linear, x = quant.QuantLinear.from_tensors(layer, stored, *w.shape[::-1]), torch.randn(32, w.shape[1])
        alone, weight = convert.snr(x @ w.float().T, linear(x)), linear.dequantized(torch.float32)
        up, down, alpha = (lora[f"diffusion_model.{layer}.{suffix}"] for suffix in suffixes)
        linear.attach_lora(up, down, alpha.item() / len(down))
        assert convert.snr(x @ w.float().T, linear(x)) > alone + 1.5
        before, after = (decibels(w, q) for q in (weight, weight + up.float() @ down.float()))
        found.append((100 - 100 * 10 ** ((before - after) / 10), before, after))
    row = re.search(r"\nall +NVFP4 .* 4 +([0-9.]+)% +([0-9.]+) +([0-9.]+)\n", report)
    assert [*map(float, row.groups())] == pytest.approx(np.mean(found, axis=0), abs=0.06)


def test_solvers_are_loaded_before_the_threads_start(monkeypatch):
    """torch loads them at their first use on a GPU, and fails if two threads do so at once."""
    calls = []
    monkeypatch.setattr(torch, "eye", lambda n, device: calls.append(device))
    monkeypatch.setattr(torch.linalg, "cholesky", lambda _: calls.append("cholesky"))
    for device in ("cuda", "cpu"):
        assert list(convert.in_order(lambda item: calls.append(item), ["work"], device)) == [("work", None)]
    assert calls == ["cuda", "cholesky", "work", "work"]
    assert list(convert.in_order(lambda item: -item, list(range(20)))) == [(i, -i) for i in range(20)]


# What is written

@pytest.mark.parametrize("dtype, prefix", [(torch.bfloat16, ""), (torch.float16, "diffusion_model."),
                                           (torch.float32, "model.diffusion_model.")])
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
    assert all(entry["data_offsets"][0] % wan_fp4.DTYPES[entry["dtype"]].itemsize == 0
               for entry in entries.values())


def test_shards_convert_to_the_same_tensors(tmp_path, model):
    tensors, shards = checkpoint(), tmp_path / "Wan2.1"
    shards.mkdir()
    places = {name: "ab"[i % 2] + ".safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        write_checkpoint(shards / file, {name: tensors[name] for name in places if places[name] == file})
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


def test_the_report_has_means_and_the_worst(model, out, capsys):
    convert.main(["-i", model, "-o", out, "--custom-type", "mxfp8", "--custom-layers", r"1\.ffn\.0"])
    report, written, found = capsys.readouterr().out, load_file(out), {}
    for layer in read_layers(out):
        stored, w = layer_tensors(written, layer), checkpoint()[f"{layer}.weight"]
        weight = quant.QuantLinear.from_tensors(layer, stored, *w.shape[::-1]).dequantized(torch.float32)
        found[layer] = decibels(w, weight)
    nvfp4 = {layer: value for layer, value in found.items() if layer != "blocks.1.ffn.0"}
    for kind, values in (("self_attn.q", [found[f"blocks.{n}.self_attn.q"] for n in range(2)]),
                         ("ffn.2", [found[f"blocks.{n}.ffn.2"] for n in range(2)]), ("all", [*nvfp4.values()])):
        assert f"{kind:16} NVFP4   {len(values):6} {np.mean(values):8.2f} {min(values):9.2f}\n" in report
    assert f"ffn.0            MXFP8        1 {found['blocks.1.ffn.0']:8.2f}" in report
    worst = min(found, key=found.get)
    assert f"worst: {worst}.weight {found[worst]:.2f}, " in report
    assert f"MiB -> {out.stat().st_size / 2 ** 20:.2f} MiB in " in report and str(out) in report.splitlines()[-1]


# Memory and interruptions

@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: the peak of memory is not checked")
def test_memory_holds_a_few_weights_not_the_model(tmp_path):
    """For 200 MB more in the file, the peak of the process rises by less than a third of that."""
    program = f"import sys, convert\n{PEAK}\nconvert.main(sys.argv[1:])\nprint(peak())"
    peaks, sizes = [], []
    for blocks in (1, 5):  # both keep all threads busy, which hold a few weights each
        tensors = checkpoint(torch.float32, num_blocks=blocks, dim=1024, ffn_dim=1024)
        file = write_checkpoint(tmp_path / "m", tensors)
        peaks.append(int(run_python(program, "-i", file, "-o", tmp_path / "out", "--simple").split()[-1]))
        sizes.append(file.stat().st_size)
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 3


def interrupt(patch, failure, after, module=convert):
    """Make convert fail at its weight number `after`; returns the list of weights that were rounded. module: that
    whose quantize_weight it calls."""
    rounded, quantize = [], module.quantize_weight

    def count_and_fail(w, *args, **kwargs):
        rounded.append(w)
        if len(rounded) == after:
            raise failure
        return quantize(w, *args, **kwargs)

    patch.setattr(module, "quantize_weight", count_and_fail)
    patch.setattr(convert, "ThreadPoolExecutor", lambda workers: ThreadPoolExecutor(1))  # one after another
    return rounded


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """interrupted(failure) stops a conversion half way: its argv, the bytes that its two files should have, the
    exit code."""
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
    (KeyboardInterrupt(), 130, "convert.py: interrupted; to continue, run the same command with --resume"),
    (OSError(28, "No space left on device", "m.safetensors"), 2, "error: m.safetensors: no space left on device"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 2, "error: out of memory; try")])
def test_an_interrupted_run_resumes_to_the_same_bytes(interrupted, monkeypatch, capsys, failure, code, text):
    """Of what was written after the list of what is finished, an incomplete line may be left."""
    argv, complete, got = interrupted(failure)
    assert got == code and text in capsys.readouterr().err
    with open(argv[3].with_name("out.safetensors.progress"), "a") as progress:
        progress.write('["blocks.1.ffn.2.wei')
    rounded = interrupt(monkeypatch, None, after=math.inf)
    convert.main([*argv, "--resume"])
    assert 19 <= len(rounded) <= 20  # of 24; one thread runs a little ahead
    assert all(file.read_bytes() == data for file, data in complete.items())
    assert len(list(argv[1].parent.iterdir())) == 3  # no .part, no list


def test_another_run_is_refused(interrupted, out, capsys):
    argv, complete, _ = interrupted()
    fails(convert.main, argv, "out.safetensors.part: another run is writing this file, or was interrupted")
    fails(convert.main, [*argv, "--simple", "--resume"], "out.safetensors.progress belongs to another run")
    state = os.stat(argv[1])
    os.utime(argv[1], ns=(state.st_atime_ns, state.st_mtime_ns + 1))  # the same shapes, perhaps other values
    fails(convert.main, [*argv, "--resume"], "out.safetensors.progress belongs to another run .the source")
    os.utime(argv[1], ns=(state.st_atime_ns, state.st_mtime_ns))
    convert.main([*argv, "--resume"])  # none of these has harmed it
    assert all(file.read_bytes() == data for file, data in complete.items())
    fails(convert.main, [*argv, "--resume"], "nothing to resume")


def test_a_killed_run_resumes(model, out):
    """Without a chance to clean up."""
    command = ["-i", model, "-o", out, "--nvfp4"]
    convert.main(command)
    complete = out.read_bytes()
    out.unlink()
    codes, *_ = run_processes("""
import convert
write, count = convert.write, iter(range(99))
convert.write = lambda *args: os._exit(9) if next(count) == 12 else write(*args)
convert.main(sys.argv[1:])""", *command)
    assert codes == [9] and not out.exists()
    convert.main([*command, "--resume"])
    assert out.read_bytes() == complete


def test_two_runs_do_not_write_one_file(model, out, monkeypatch):
    """In the middle of a conversion, a second one is refused, and the first is not harmed."""
    flags = ["--nvfp4", "--extract-lora", "--lora-rank", "4", "--lora-output", out.with_name("lora.safetensors")]
    quantize, started = convert.quantize_weight, []

    def start_second(*args, **kwargs):
        if not started:
            started.append(None)
            for other in out, out.with_name("other.safetensors"):
                fails(convert.main, ["-i", model, "-o", other, *flags], r"\.part: another run is writing this")
            convert.main(["-i", model, "-o", out, *flags, "--dry-run"])  # which writes nothing
        return quantize(*args, **kwargs)

    monkeypatch.setattr(convert, "quantize_weight", start_second)
    monkeypatch.setattr(convert, "ThreadPoolExecutor", lambda workers: ThreadPoolExecutor(1))
    convert.main(["-i", model, "-o", out, *flags])
    assert started and len(load_file(out)) == len(checkpoint()) + 3 * 24  # complete
    assert sorted(file.name for file in out.parent.iterdir()) == [
        "lora.safetensors", "m.safetensors", "out.safetensors"]
    output = convert.Output(out, {"a": (torch.uint8, (1,))}, {})
    output.create()
    with pytest.raises(FileExistsError):  # of two that start at the same moment, too
        output.create()


def test_too_little_disk_is_reported_before_the_start(model, monkeypatch):
    usage = convert.shutil.disk_usage(model.parent)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    fails(convert.main, ["-i", model], "of the disk are free")


# The command line

REFUSED_BY_CONVERT = [
    (["-i", "lost"], "lost: no such file"),
    (["-i", "damaged"], "damaged: not a safetensors file"),
    (["-o", "m.safetensors"], "would overwrite"), (["-o", "link"], "link: would overwrite"),
    (["-o", "no/x"], "no/x: cannot be written, its fold"),
    (["-o", "x", "--extract-lora", "--lora-output", "x"], "x: got one name"),
    (["--nvpf4"], "error: --nvpf4: not supported here"),
    (["--nvfp4", "--mxfp8"], "error: argument --mxfp8: not allowed with argument --nvfp4"),
    (["--lora-rank", "0"], "argument --lora-rank: '0': expected a whole number from 1 to 1000000000"),
    (["--exclude-layers", "*"], "--exclude-layers '.': not a regular expression"),
    (["--custom-type", "mxfp8", "--custom-layers", "time_embedding"], "'time_embedding': matches none of"),
    (["--custom-layers", "ffn"], "give both or neither"),
    (["--plan", "score", "--exclude-layers", "ffn"], "--plan: chooses the format of every layer"),
    (["--size", "1GB"], "--size.* requires? --calib"), (["--plan", "measured"], "requires? --calib"),
    (["--lora-target", "ffn"], "require --extract-lora"), (["--device", "abacus"], "--device 'abacus': expected"),
]


@pytest.mark.parametrize("flags, text", REFUSED_BY_CONVERT)
def test_bad_arguments_of_convert_are_refused(model, monkeypatch, flags, text):
    folder = model.parent
    monkeypatch.chdir(folder)
    (folder / "link").hardlink_to(model)
    (folder / "damaged").write_bytes(model.read_bytes()[:-1])
    before = sorted(folder.iterdir())
    fails(convert.main, ["-i", "m.safetensors", *flags], text)
    assert sorted(folder.iterdir()) == before


def parse(flags):
    return convert.parse_args(["-i", "x_y", *shlex.split(flags)])


def test_flags_with_underscores_are_the_same_flags():
    dashes = "--custom-type mxfp8 --custom-layers x --save-quant-metadata --comfy-quant --exclude-layers c_d"
    assert parse("--custom_type=mxfp8 --custom_layers x --save_quant_metadata --comfy_quant "
                 "--exclude_layers=c_d") == parse(dashes)


@pytest.mark.parametrize("flags, named", [
    ("--low-memory --verbose", "low-memory, verbose"), ("--low_memory --verbose NORMAL", "low-memory, verbose"),
    ("--manual-seed 4 --optimizer=prodigy --lr 1.0", "optimizer, lr, manual-seed"), ("--heur --wan", "wan, heur"),
    ("--lr_schedule exponential --min_k 64 --max-k=99", "min-k, max-k, lr-schedule"), ("--top-p 0.35", "top-p")])
def test_flags_of_convert_to_quant_without_effect_are_named(model, capsys, flags, named):
    """With and without values, in both spellings: in one line, and the plan is the same."""
    convert.main(["-i", model, "--nvfp4", "--dry-run"])
    expected = capsys.readouterr().out
    convert.main(["-i", model, "--nvfp4", "--dry-run", *flags.split()])
    line, rest = capsys.readouterr().out.split("\n", 1)
    assert rest == expected and line.startswith("without effect here")
    assert {*re.findall("--([a-z-]+)", line)} == {*named.split(", ")}


# --------------------------------------------------------------------------------------------------
# Fuzz
# --------------------------------------------------------------------------------------------------
#
# Damaged files and odd command lines, chosen by seed: exit code 0 and a new file, or 2 after one line; no source
# is touched, and nothing but latents is left.

NAMES = ["", "blocks.999999999.ffn.0.weight", "blocks.x.y", "transformer.99999999.mlp.0.bias", "a" * 3000,
         "encoder.downsamples.999999999.residual.6.bias", "block0.convblock.99999999.beta", "spiece_model",
         "blocks.0.self_attn.q.lora_up.weight", f"blocks.{'9' * 5000}.x"]
SHAPES = [(), (0,), (1,), (3,), (64,), (0, 64), (64, 0), (64, 64), (1, 64), (1,) * 5, (2, 3, 4)]
ODD_DTYPES = [torch.int64, torch.uint8, torch.bool, torch.float64, torch.float8_e4m3fn, torch.complex64]
NUMBERS = ["", "0", "-1", "1.5", "nan", "inf", "abc", "9" * 30, "9" * 5000, "\u0663", " ", "1e400"]
MARKERS = [b"", b"[]", b"5", b"\xff", b'{"format":', b'{"format": ["nvfp4"]}', b'{"format": "mxfp8"}',
           9999 * b"[", b'{"format": "nvfp4", "orig_shape": 5}', b'{"format": "nvfp4", "orig_shape": [64, -64]}']
def sample_argv(flag="--dit", network="nvfp4"):
    files = {"--dit": "nvfp4", "--vae": "vae", "--text-encoder": "umt5", "--clip": "clip", flag: network}
    return ["photo.jpg", "--steps", "1", "-o", "out.mp4"] + [
        part for flag, name in files.items() for part in (flag, f"{name}.safetensors")]


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
        metadata[rng.choice(["head_dim", "frames", "area"])] = rng.choice(NUMBERS)
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
                 if line and "%|" not in line and not line.startswith("    ")
                 and not line.startswith(("sample.py: warning", "sample.py: the latents are kept"))]
        assert code == 0 or code == 2 and len(lines) == 1 and ".py: error: " in lines[0], (argv, code, lines)
        assert (code == 0) == (files() != before), (argv, lines)
    return run


GIVEN_BY = {"dit": "--dit", "nvfp4": "--dit", "vae": "--vae", "umt5": "--text-encoder", "clip": "--clip",
            "nvfp4_lora": "--lora", "latents": "--decode"}


@pytest.mark.parametrize("seed", range(30))
def test_damaged_files(seed, keeps_the_contract):
    rng = random.Random(seed)
    name = rng.choice([*GIVEN_BY, "convert", "photo"])
    damage(rng, Path({"convert": "dit.safetensors", "photo": "photo.jpg"}.get(name, f"{name}.safetensors")))
    argv = sample_argv(GIVEN_BY[name], name) if name in GIVEN_BY else sample_argv()
    if name == "convert":
        keeps_the_contract(convert.main, CONVERT)
    else:
        keeps_the_contract(sample.main, argv[1:] if name == "latents" else argv)


# --------------------------------------------------------------------------------------------------
# The repository
# --------------------------------------------------------------------------------------------------

IMPORTS = {"quant": "torch", "wan_fp4": "torch safetensors einops quant",
           "convert": "torch safetensors tqdm quant wan_fp4",
           "sample": "torch safetensors av sentencepiece tqdm quant wan_fp4"}


def imports(path):
    """Yields (module, the statements around its import, the outermost first) for each import of a file."""
    def walk(node, around):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, around) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield child.module, around
            else:
                yield from walk(child, [*around, child])
    yield from walk(ast.parse(path.read_text()), [])


@pytest.mark.parametrize("name", IMPORTS)
def test_a_file_of_the_core_imports_extra_only_in_the_branch_that_needs_it(name):
    allowed = {*IMPORTS[name].split(), *sys.stdlib_module_names}
    for module, around in imports(REPOSITORY / f"{name}.py"):
        if module.partition(".")[0] == "extra":
            assert any(isinstance(node, ast.FunctionDef) for node in around), module
            assert any(isinstance(node, ast.If) for node in around), module
        else:
            assert module.partition(".")[0] in allowed, module


@pytest.mark.parametrize("path", sorted((REPOSITORY / "extra").glob("[!t]*.py")), ids=lambda path: path.name)
def test_a_file_of_extra_imports_the_core_at_its_top(path):
    for module, around in imports(path):
        assert module.partition(".")[0] not in {*IMPORTS, "extra"} or not around, module


VENDORED = """
import shutil, sys
allowed = {"torch"}
class Finder:
    def find_spec(name, *_):
        if name in {"numpy", "safetensors", "einops", "tqdm", "av", "sentencepiece", "sample"} - allowed:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Finder)
def add(name, *imports):
    allowed.update(imports)
    shutil.copy(sys.argv[1] + "/" + name + ".py", ".")
add("quant")
import torch, quant
quant.QuantLinear.from_linear(torch.nn.Linear(32, 32), "nvfp4")(torch.eye(32))
quant.dequantize_nvfp4(*quant.quantize_nvfp4(torch.eye(32), method="search"))
add("wan_fp4", "safetensors", "einops")
import wan_fp4
wan_fp4.WanVAE(wan_fp4.VAEConfig((8, 8, 8, 8), 1)).decode(torch.zeros(1, 16, 2, 2, 2))
add("convert", "tqdm")
import convert
convert.quantize_weight(torch.eye(9), "nvfp4")
"""


def test_a_file_works_where_only_its_imports_are(tmp_path):
    """quant.py in an empty folder, wan_fp4.py beside it, convert.py beside both."""
    subprocess.run([sys.executable, "-c", VENDORED, REPOSITORY], cwd=tmp_path, check=True)


WITHOUT_EXTRA = """
import contextlib, io, sys, convert, sample
sample.main([sys.argv[1], "-o", "out.mp4", "--prompt", "x", "--frames", "5", "--size", "64x64"])
convert.main(["-i", "demo/dit-bf16.safetensors", "-o", "nvfp4", "--nvfp4", "--simple", "--extract-lora"])
for main, flags, missing in (
        (sample.main, "--attention fp8 --emulate", "attention"), (sample.main, "--interpolate x", "rife"),
        (sample.main, "--offload -o x.mp4", "stream"), (sample.main, "--dit packed.safetensors", "lightx2v"),
        (convert.main, "--calib " + sys.argv[1], "calibrate"), (convert.main, "--merge-lora x", "loras")):
    given = [sys.argv[1]] if main is sample.main else ["-i", "demo/dit-bf16.safetensors", "-o", "out"]
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            main([*given, *flags.split()])
    except SystemExit as stop:
        last = stderr.getvalue().splitlines()[-1]
        assert stop.code == 2 and f" extra/{missing}.py: no such file" in last and "Traceback" not in last, last
    else:
        raise AssertionError(flags)
"""


def test_the_core_works_without_extra(tmp_path):
    """It makes a video and converts; a flag of extra/ then ends in one line that names the missing file."""
    shutil.copytree(DEMO, tmp_path / "demo", ignore=shutil.ignore_patterns("work"))
    for name in IMPORTS:
        shutil.copy(REPOSITORY / f"{name}.py", tmp_path)
    save_file({"img_emb.proj.1.weight": torch.ones(1), "blocks.0.ffn.0.weight_global_scale": torch.ones(())},
              tmp_path / "packed.safetensors")
    (tmp_path / "models").mkdir()
    for network in ("dit", "vae", "clip", "umt5"):
        shutil.copy(DEMO / f"{network}.safetensors", tmp_path / "models")
    run_python(WITHOUT_EXTRA, f"demo/{PHOTO.name}", cwd=tmp_path)
    assert {"out.mp4", "nvfp4", "nvfp4_lora.safetensors"} <= {*os.listdir(tmp_path)}


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_during_the_imports_leaves_no_traceback():
    code = """
import os, runpy, signal, sys
class Finder:
    def find_spec(name, *_):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
sys.argv = ["sample.py", "--help"]
runpy.run_path("sample.py", run_name="__main__")"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode in (130, -2) and "Traceback" not in done.stderr  # -2: ended by the signal itself


def test_the_readme_s_python_runs_as_it_says():
    code = re.search(r"```python\n(.+?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)[1]
    names = {}
    exec(code, names)
    y, expected = names["y"], names["linear"](names["x"])
    assert 0.07 < relative_error(y, expected) < 0.11


def test_the_readme_s_conversions_of_the_demo_run(tmp_path, monkeypatch, capsys):
    """As dry runs. Of those with --calib, which would take a minute, only the arguments are checked."""
    readme = (REPOSITORY / "README.md").read_text()
    commands = re.findall(r"^    python convert.py (-i demo/.+?)(?:   .*)?$", readme, re.M)
    assert len(commands) >= 3
    monkeypatch.chdir(REPOSITORY)
    for command in commands:
        if "--calib" in command:
            assert all(picture.is_file() for picture in convert.parse_args(shlex.split(command)).calib)
        else:
            convert.main([*shlex.split(command), "--dry-run"])
            assert re.search(r"\n\d\.\d\d MiB -> \d\.\d\d MiB\n", capsys.readouterr().out)


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
    dit = wan_fp4.load_dit(shipped)
    assert quant.describe(dit.blocks) == f"NVFP4 {12 * len(dit.blocks)} layers (dequantize)"


@pytest.mark.parametrize("prompt, x, y, frame", [("move to the left", -32, 0, 16), ("slide right", 32, 0, 16),
                                                  ("hop", 0, -32, 8)])
def test_demo_videos_show_the_moves_asked_for(prompt, x, y, frame):
    """On a picture that the training has not seen: where the subject should be then, by pixels."""
    picture = sample.read_image(PHOTO)  # (3, h, w)
    settings = sample.Settings(frames=17, area=picture[0].numel())
    video = sample.generate(picture, prompt, demo_files(), settings)  # (F, h, w, 3)
    got = video[frame].permute(2, 0, 1) / 255
    moved = picture.roll((y, x), (1, 2))
    assert (got - moved).square().mean() < (got - picture).square().mean() / 4
