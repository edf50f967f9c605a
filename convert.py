"""From a bf16 Wan checkpoint to an NVFP4 / MXFP8 one in the comfy_quant format, tensor by tensor.

    python convert.py -i MODEL.safetensors            writes MODEL-nvfp4.safetensors

How it goes, and in which order to read this file:

  Source     the checkpoint: its names (without prefix), shapes and dtypes, and one tensor at a time.
  plan       which weight gets which format: NVFP4 (4.5 bits a weight), MXFP8 (8.25), or "bf16", which means:
             kept as the source has it. From regexes on the names, from a score of each weight, or from the
             error that each format would cause, under a size.
  round      one weight to the stored tensors of its format: to nearest, with searched block scales, or, given
             the second moment of the layer's inputs, so that the layer's outputs come out best.
  LoRA       low-rank factors of what rounding lost, for a second file.
  calibrate  what every layer is fed: the pipeline runs on pictures, one block of the model after another.
  write      a safetensors file begins with a header of all names, shapes and offsets. All of them follow from
             the source's shapes and the plan, so the header goes first and then tensor after tensor, each to
             its place: memory holds a few weights, whatever the size of the model. The file has a temporary
             name until it is complete, and an interrupted run can go on from there.

What is written for a quantized layer L, in quant.py's layout: L.weight, L.weight_scale, for NVFP4
L.weight_scale_2, and the marker L.comfy_quant, which ComfyUI reads. Older tools read the same in the header,
under _quantization_metadata: both are always there. The header also keeps the source's own entries
(head_dim and so on), and says how the file was made.
"""
import argparse
import ctypes
import functools
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
import warnings
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # torch warns while it is imported; nothing here needs numpy
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages: new memory comes several times faster

import safetensors
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tqdm import tqdm

import quant

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn}  # as a safetensors header spells them
PLAN_FORMATS = {"bf16": "bf16", "mxfp8": "MXFP8", "nvfp4": "NVFP4"}  # as in the flags -> as printed
BLOCK = {"mxfp8": quant.MXFP8_BLOCK, "nvfp4": quant.NVFP4_BLOCK}
DIFFUSERS = re.compile(r"attn[12]\.|ffn\.net\.|norm2\.|condition_embedder\.|scale_shift_table|proj_out\.")


class Refusal(Exception):
    """Something that the user can put right: main prints it as one line and exits with code 2."""


# ----------------------------------------------------------------------------------------------------
# Source: the checkpoint that is converted
# ----------------------------------------------------------------------------------------------------

def _shards(path):
    """The safetensors files that a path means: itself, an index's shards, or a folder's."""
    if not path.exists():
        raise Refusal(f"{path}: no such file or folder")
    if path.is_dir():
        indices = sorted(path.glob("*.safetensors.index.json"))
        if len(indices) > 1:
            raise Refusal(f"{path}: holds {len(indices)} models: name one of {', '.join(map(str, indices))}")
        files = _shards(indices[0]) if indices else sorted(path.glob("*.safetensors"))
        if not files:
            raise Refusal(f"{path}: holds no .safetensors file")
        return files
    if path.suffix != ".json":
        return [path]
    try:
        names = json.loads(path.read_text())["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Refusal(f"{path}: not the index of a sharded checkpoint: it has no weight_map") from None
    return [path.parent / name for name in sorted(set(names))]


def _open(file):
    try:
        return safe_open(file, "pt")
    except FileNotFoundError:
        raise Refusal(f"{file}: no such file: is a shard missing?") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise Refusal(f"{file}: not a complete safetensors file ({error})") from None


class Source:
    """A checkpoint's tensors by their official names, bare: shapes, dtypes, metadata; tensor(name) reads one.

    Raises Refusal if path is not a plain Wan DiT in safetensors.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.files = _shards(self.path)
        self.shapes, self.dtypes, self.metadata, self._where = {}, {}, {}, {}
        for file in self.files:
            with _open(file) as f:
                self.metadata |= f.metadata() or {}
                if "_quantization_metadata" in self.metadata:
                    raise Refusal(f"{file}: already quantized, its header says: convert the bf16 model")
                for stored in f.keys():
                    self._add(f, file, stored)
        if not any(re.match(r"blocks\.\d+\.self_attn\.", name) for name in self.shapes):
            raise Refusal(f"{path}: not a Wan DiT: it has neither blocks.N.self_attn nor diffusers' "
                          f"blocks.N.attn1, but for example {min(self.shapes, default='nothing')}")
        self.bytes = sum(math.prod(s) * self.dtypes[name].itemsize for name, s in self.shapes.items())

    def _add(self, f, file, stored):
        name = re.sub(r"^((model\.)?diffusion_model|transformer)\.", "", stored)
        if DIFFUSERS.search(name):
            from wan_fp4 import official_dit_name  # the table of names is with the networks
            name = official_dit_name(name)
        if name in self.shapes:
            raise Refusal(f"{file}: {name} is there twice, here as {stored}: are two models in one place?")
        tensor = f.get_slice(stored)
        dtype = tensor.get_dtype()
        if dtype.startswith("F8") or name.endswith((".scale_weight", "scaled_fp8")):
            raise Refusal(f"{file}: {name} is already 8-bit ({dtype}): its rounding error would add to "
                          f"NVFP4's, and black frames are reported. Convert the bf16 model")
        if name.endswith((".comfy_quant", ".weight_scale")):
            raise Refusal(f"{file}: already quantized, it has {name}: convert the bf16 model")
        if DTYPES.get(dtype) not in (torch.float32, torch.float16, torch.bfloat16):
            if dtype not in DTYPES or name.endswith(".weight"):
                raise Refusal(f"{file}: {name} is {dtype}, expected BF16, F16 or F32")
        self.shapes[name], self.dtypes[name] = tuple(tensor.get_shape()), DTYPES[dtype]
        self._where[name] = file, stored

    def tensor(self, name):
        """The tensor, memory-mapped. Raises Refusal if it has a NaN or an infinity.

        The file is opened anew each time: a map that stayed open would keep every page that was ever read.
        """
        file, stored = self._where[name]
        with _open(file) as f:
            tensor = f.get_tensor(stored)
        if (tensor.is_floating_point() and tensor.numel()
                and not torch.stack(tensor.aminmax()).isfinite().all()):
            raise Refusal(f"{file}: {stored} has NaN or infinite values: is the file damaged?")
        return tensor


# ----------------------------------------------------------------------------------------------------
# Plan: which weight gets which format
# ----------------------------------------------------------------------------------------------------

# The Linears of the blocks hold 98 % of the weights. Of the others only those in OPTIONAL may be quantized,
# and only when asked for by name: the time layers and the head decide every pixel, and norms, biases and
# modulation are too small to matter.
BLOCK_WEIGHT = re.compile(r"blocks\.(\d+)\.(.+)\.weight")
OPTIONAL = re.compile(r"(text_embedding|img_emb)\..+\.weight")


def matching(pattern, names, flag):
    """The names in which a regex is found, anywhere. Raises Refusal if it is none, or is found nowhere."""
    try:
        found = {name for name in names if re.search(pattern, name)}
    except re.error as error:
        raise Refusal(f"{flag} {pattern!r}: not a regular expression: {error}") from None
    if not found:
        raise Refusal(f"{flag} {pattern!r}: matches no weight out of {len(names)}, as {min(names)}")
    return found


def plan(shapes, base="nvfp4", custom_type=None, custom=None, exclude=None):
    """{name: shape} -> {name: format} for every 2-D weight of a block; what is not in it is kept.

    base         the format of every weight that no regex names
    custom       regex of weights that take custom_type instead; it wins over exclude
    exclude      regex of weights that are kept
    """
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    formats = {name: base for name in matrices if BLOCK_WEIGHT.fullmatch(name)}
    for name in matching(exclude, shapes, "--exclude-layers") if exclude else ():
        if name in formats:
            formats[name] = "bf16"
    if custom:
        allowed = [name for name in matrices if name in formats or OPTIONAL.fullmatch(name)]
        formats |= dict.fromkeys(matching(custom, allowed, "--custom-layers"), custom_type)
    return formats


# The published plan for the distilled Wan2.1 I2V 14B 480P: 34 layers MXFP8, 19 kept, 427 NVFP4.
RECIPE_MXFP8 = (
    r"blocks\.(1|2|3)\.cross_attn\.k\.weight|blocks\.(6|8|9|10)\.cross_attn\.k\.weight|"
    r"blocks\.(0|1|2|3)\.cross_attn\.v\.weight|blocks\.(6)\.cross_attn\.q\.weight|"
    r"blocks\.(6|14)\.cross_attn\.o\.weight|blocks\.(0|1|2|3)\.cross_attn\.v_img\.weight|"
    r"blocks\.(0)\.self_attn\.k\.weight|blocks\.(7|9|10|12|13|14)\.self_attn\.k\.weight|"
    r"blocks\.(19)\.self_attn\.q\.weight|blocks\.(0|1|2|3)\.ffn\.0\.weight|"
    r"blocks\.(36|37|38|39)\.ffn\.0\.weight")
RECIPE_KEPT = (
    r"blocks\.(4|5|7)\.cross_attn\.k\.weight|blocks\.(0)\.cross_attn\.q\.weight|"
    r"blocks\.(5|7|9|10|11|12|19|20)\.cross_attn\.o\.weight|blocks\.(8|11|33)\.self_attn\.k\.weight|"
    r"blocks\.(38)\.self_attn\.k\.weight|blocks\.(14|16|17)\.self_attn\.q\.weight")


def sensitivity(w):
    """Three numbers on a weight (M, K), each meant to be larger where four bits are likelier to hurt.

    - ln(1 + excess kurtosis), 0 for a Gaussian: how often a large weight takes the block scale for itself
    - dynamic range, log2(amax / rms), in octaves: E2M1 spans 3.6 of them, block scales must do the rest
    - aspect ratio, log2 of the longer side over the shorter: the error of a long sum, or of many outputs

    They are the criteria of the published recipe. Measured on the 36 matrices of MiniLM, they do not predict
    the error of NVFP4 on real activations: the rank correlation is -0.48.
    """
    x = w.float() - w.float().mean()
    variance = x.square().mean().clamp(min=1e-30)
    kurtosis = (x.square_() / variance).square_().mean().item() - 3  # x is squared from here on
    octaves = (x.amax() / variance).clamp(min=1).log2().item() / 2
    return math.log1p(max(kurtosis, 0)), octaves, math.log2(max(w.shape) / min(w.shape))


def score(measures):
    """{name: sensitivity} -> {name: score}: kurtosis and range, each from its median in quartile distances,
    plus the aspect ratio as it is: nearly all layers share one value, so it has no quartiles.

    A quartile distance counts as 0.1 at least: in a model of layers all alike, noise is no reason.
    """
    table = torch.tensor(list(measures.values()), dtype=torch.float64)  # (layers, 3)
    low, middle, high = table.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=0)
    table[:, :2] = ((table - middle) / (high - low).clamp(min=0.1))[:, :2]
    return dict(zip(measures, table.sum(1).tolist()))


def plan_by_score(scores):
    """{name: score} -> {name: format}, by Tukey's fences around the model's own scores.

    Above the upper quartile by 1.5 quartile distances is an outlier: MXFP8. By 3, far out: kept.
    """
    values = torch.tensor(list(scores.values()), dtype=torch.float64)
    low, high = values.quantile(0.25).item(), values.quantile(0.75).item()

    def choose(value):
        distance = (value - high) / max(high - low, 1.0)  # 1: the same, in units of the score
        return "bf16" if distance > 3 else "mxfp8" if distance > 1.5 else "nvfp4"
    return {name: choose(value) for name, value in scores.items()}


def stored_bytes(shape, dtype):
    """What a weight takes in each format: {format: bytes}."""
    return {fmt: sum(math.prod(s) * d.itemsize for d, s in _stored_layout(fmt, shape, dtype).values())
            for fmt in PLAN_FORMATS}


def plan_by_error(errors, sizes, budget):
    """errors and sizes {name: {format: number}} -> {name: format} of least total error in `budget` bytes.

    All weights begin in their smallest format. A weight's next step is the one that saves most error per
    byte, and its steps save less and less: they follow the lower convex hull of error over bytes, and no
    format off the hull is best at any price of a byte. Taking the steps of all weights in that order, while
    they fit, is optimal but for the last bytes. Raises ValueError if even the smallest formats do not fit.
    """
    formats = {name: min(size, key=size.get) for name, size in sizes.items()}
    left = budget - sum(sizes[name][fmt] for name, fmt in formats.items())
    if left < 0:
        raise ValueError(f"plan_by_error: got {budget} bytes, too few: {budget - left} are the least")
    steps = []
    for name, size in sizes.items():
        at, error = formats[name], errors[name]
        while True:
            saved = {fmt: (error[at] - error[fmt]) / (size[fmt] - size[at])
                     for fmt in size if size[fmt] > size[at] and error[fmt] < error[at]}
            if not saved:
                break
            best = max(saved, key=saved.get)
            steps.append((saved[best], name, best, size[best] - size[at]))
            at = best
    stuck = set()  # a weight whose next step does not fit may not jump over it
    for _, name, fmt, extra in sorted(steps, reverse=True):
        if extra > left or name in stuck:
            stuck.add(name)
        else:
            formats[name], left = fmt, left - extra
    return formats


def weight_errors(w):
    """{format: relative squared error of the weight itself}, on 256 of its rows, rounded to nearest."""
    w = w[::-(-len(w) // 256)].float()  # (256, K)
    return {fmt: 0.0 if fmt == "bf16" else 10 ** (-snr(w, dequantize_weight(
        quantize_weight(w, fmt, method="rtn"), w.shape)) / 10) for fmt in PLAN_FORMATS}


def output_errors(w, x):
    """{format: relative squared error of the layer's outputs} for inputs x (R, K), both sides quantized."""
    y, errors = x @ w.float().T, {"bf16": 0.0}  # (R, M)
    for fmt in ("mxfp8", "nvfp4"):
        layer = quant.QuantLinear.from_tensors("weight", quantize_weight(w, fmt), w.shape[1], w.shape[0],
                                               mode="emulate")
        errors[fmt] = 10 ** (-snr(y, layer(x)) / 10)
    return errors


def rank_correlation(a, b):
    """Spearman's, of two sequences of numbers."""
    ranks = [torch.tensor(list(values)).argsort().argsort().double() for values in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def flags(formats):
    """A plan as the regexes of convert_to_quant's command line."""
    groups = {"mxfp8": {}, "bf16": {}, "nvfp4": {}}
    for name, fmt in formats.items():
        match = BLOCK_WEIGHT.fullmatch(name)
        groups[fmt].setdefault(_kind(name), []).append(match and match[1])

    def regex(kinds):
        return "|".join(rf"blocks\.({'|'.join(sorted(blocks, key=int))})\.{re.escape(kind)}\.weight"
                        if blocks[0] else re.escape(kind) for kind, blocks in sorted(kinds.items()))
    text = "--nvfp4"
    if groups["mxfp8"]:
        text += f' --custom-type mxfp8 --custom-layers "{regex(groups["mxfp8"])}"'
    return text + (f' --exclude-layers "{regex(groups["bf16"])}"' if groups["bf16"] else "")


# ----------------------------------------------------------------------------------------------------
# Round: one weight to its stored tensors
# ----------------------------------------------------------------------------------------------------
#
# A layer's output is wrong by x E^T, where E = W - Q (M, K) is the error of the weights. Over many inputs x
# with second moment H = mean(x^T x), that is tr(E H E^T): each row of E, by itself, costs e H e^T. Without
# inputs H is the identity, and the best scale for each block is all there is to choose (quant.py searches).
# With them, the columns are rounded one after another, each making up for the errors of those before it:
#
#     H = N diag(D) N^T, N unit upper triangular      so      e H e^T = sum_j D_j (e_j + sum_{k<j} N_kj e_k)^2
#
# Once the columns k < j are rounded, term j is smallest if q_j is the value nearest to w_j + sum_k N_kj e_k,
# and what it then misses costs D_j. That is GPTQ (Frantar et al. 2022, arXiv:2210.17323), which reaches the
# same numbers through the inverse of H. Here a block's scale is chosen on the way: ten scales run through the
# block's columns side by side, and the one whose terms sum to least stays.
#
# The first columns know nothing of those that follow, so sweeps come after: each block is rounded again with
# all others fixed. Then e H e^T is a parabola in the block's q, lowest at q + H_bb^-1 (H e)_b, of the form
# above with H_bb in place of H. A row takes the new codes only if they cost less, so the error only falls.
#
# Biases stay as they are. convert_to_quant corrects them by the mean of E x over random inputs x; these have
# mean zero, so the correction has too, and what it adds is noise.

NUM_ITER = 4  # sweeps; the first takes off a tenth of the error, four a seventh, all after them a hundredth
DAMPING = 0.01  # of H's mean diagonal, added to the diagonal: inputs that were not seen may still come


def _factor(h):
    """Symmetric positive h (..., n, n) -> N (..., n, n) unit upper triangular, D (..., n): h = N diag(D) N^T.

    Cholesky gives a lower triangle; flipping both axes before and after turns it into an upper one.
    """
    root = torch.linalg.cholesky(h.flip(-1, -2)).flip(-1, -2)
    d = root.diagonal(dim1=-2, dim2=-1)
    return (root / d[..., None, :]).float(), d.square().float()


def _scales(fmt, amax, tensor_scale):
    """Candidates for blocks of this amax (M,): scale bytes (C, M) and what they multiply by (C, M) float32.

    The best E4M3 scale puts the largest weight between 3.5 and 7.3, an octave; the best E8M0 scale is the
    smallest that holds it, or half that.
    """
    if fmt == "nvfp4":
        first = (amax / 7.3 / tensor_scale).clamp_(max=quant.E4M3_MAX).to(torch.float8_e4m3fn)
        byte = first.view(torch.uint8) + torch.arange(10, dtype=torch.uint8, device=amax.device)[:, None]
        byte = byte.clamp_(1, 126)  # from the smallest scale to 448
        return byte, byte.view(torch.float8_e4m3fn).float() * tensor_scale
    exponent = torch.log2((amax / quant.E4M3_MAX).clamp_(min=2.0 ** -125)).ceil_().to(torch.int32)
    byte = torch.stack((exponent, exponent - 1)).add_(127).to(torch.uint8)
    return byte, torch.exp2(byte.float() - 127)


def _nearest(fmt, x):
    """x / scale -> the nearest values that a code stands for."""
    if fmt == "nvfp4":
        return quant.round_e2m1(x.abs()).copysign_(x)
    return x.clamp_(-quant.E4M3_MAX, quant.E4M3_MAX).to(torch.float8_e4m3fn).float()


def _round_block(fmt, aim, n, d, tensor_scale):
    """One block of columns, aim (B, M), for the metric n diag(d) n^T -> bytes (M,), q (B, M), cost (M,)."""
    byte, scale = _scales(fmt, aim.abs().amax(0), tensor_scale)  # (C, M)
    q = aim.new_empty(len(aim), *scale.shape)  # (B, C, M)
    error, cost = torch.empty_like(q), torch.zeros_like(scale)
    for j in range(len(aim)):
        x = aim[j] + torch.tensordot(n[:j, j], error[:j], 1)  # (C, M)
        q[j] = _nearest(fmt, x / scale) * scale
        error[j] = aim[j] - q[j]
        cost += d[j] * (x - q[j]).square_()
    best = cost.argmin(0, keepdim=True)  # (1, M)
    q = q.gather(1, best.expand(len(aim), 1, -1))[:, 0]  # (B, M)
    return byte.gather(0, best)[0], q, cost.gather(0, best)[0]


def _round_compensated(w, fmt, hessian, num_iter):
    """quant.quantize_nvfp4 or _mxfp8 for the least tr(E H E^T). Transposed: columns of w are rows here."""
    expected = (w.shape[1], w.shape[1])
    if tuple(hessian.shape) != expected or not hessian.isfinite().all():
        raise ValueError(f"quantize_weight: got hessian {tuple(hessian.shape)}, "
                         f"expected {expected}, all finite")
    if not w.isfinite().all():
        raise ValueError("quantize_weight: got NaN or infinite values, expected finite ones: damaged?")
    tensor_scale = quant.quantize_nvfp4(w)[2] if fmt == "nvfp4" else None
    size = BLOCK[fmt]
    w = F.pad(w.float(), (0, -w.shape[1] % size, 0, -w.shape[0] % size)).T.contiguous()  # (K, M)
    blocks = len(w) // size

    h = F.pad(hessian.double(), (0, len(w) - len(hessian)) * 2)  # (K, K)
    h /= h.diagonal().mean().clamp(min=1e-30)
    h.diagonal().add_(DAMPING)
    # The blocks that matter most go first, while there are most columns left to make up for them.
    order = h.diagonal().view(blocks, size).sum(1).argsort(descending=True)
    columns = (order[:, None] * size + torch.arange(size, device=w.device)).flatten()  # (K,)
    w, h = w[columns], h[columns][:, columns]
    q, error = torch.zeros_like(w), torch.zeros_like(w)  # (K, M)
    scale_bytes = torch.zeros(blocks, w.shape[1], dtype=torch.uint8, device=w.device)  # (N, M)

    n, d = _factor(h)
    for i in range(blocks):
        b = slice(i * size, (i + 1) * size)
        aim = w[b] + n[:b.start, b].T @ error[:b.start]  # (B, M)
        scale_bytes[i], q[b], _ = _round_block(fmt, aim, n[b, b], d[b], tensor_scale)
        error[b] = w[b] - q[b]

    own = torch.stack([h[i:i + size, i:i + size] for i in range(0, len(h), size)])  # (N, B, B)
    n, d = _factor(own)
    h, inverse, changed = h.float(), torch.linalg.inv(own).float(), True
    for _ in range(num_iter):
        if not changed:
            break
        changed = False
        for i in range(blocks):
            b = slice(i * size, (i + 1) * size)
            step = inverse[i] @ (h[b] @ error)  # (B, M)
            byte, new, cost = _round_block(fmt, q[b] + step, n[i], d[i], tensor_scale)
            better = cost < 0.99999 * ((n[i].T @ step).square_() * d[i][:, None]).sum(0)  # (M,)
            scale_bytes[i] = torch.where(better, byte, scale_bytes[i])
            q[b] = torch.where(better, new, q[b])
            error[b] = w[b] - q[b]
            changed |= better.any().item()

    # Back in order: row `columns[j]` of values is row j of q.
    values, scales = torch.empty_like(q), torch.empty_like(scale_bytes)
    values[columns], scales[order] = q, scale_bytes
    values, scales = values.T.reshape(-1, blocks, size), scales.T.contiguous()  # (M, N, B), (M, N)
    if fmt == "mxfp8":
        data = quant.encode_mxfp8(values, torch.exp2(scales.float() - 127)).flatten(1)  # (M, K)
        return data, quant.swizzle(scales)
    scales = scales.view(torch.float8_e4m3fn)
    data = quant.pack_e2m1(quant.encode_nvfp4(values, scales.float() * tensor_scale)).flatten(1)  # (M, K/2)
    return data, quant.swizzle(scales), tensor_scale


@torch.no_grad()
def quantize_weight(w, fmt, hessian=None, method="search", num_iter=NUM_ITER):
    """One weight (M, K) -> its stored tensors by suffix, as QuantLinear.from_tensors takes them.

    fmt       "nvfp4", "mxfp8", or "bf16": kept as it is
    hessian   (K, K), the second moment x^T x of the layer's inputs, of any scale: the outputs' error is then
              made small, and method has no part
    method    "search": block scales of the least squared error; "rtn": from each block's largest weight
    num_iter  with a Hessian, the most sweeps over the codes after the first rounding

    Raises ValueError for an unknown format, shapes that do not fit, and values that are not finite.
    """
    if fmt == "bf16":
        return {"weight": w}
    if fmt not in PLAN_FORMATS:
        raise ValueError(f"quantize_weight: got format {fmt!r}, expected one of {', '.join(PLAN_FORMATS)}")
    if hessian is not None:
        stored = _round_compensated(w, fmt, hessian, num_iter)
    elif fmt == "nvfp4":
        stored = quant.quantize_nvfp4(w, method=method)
    else:
        stored = quant.quantize_mxfp8(w, method)
    stored = dict(zip(("weight", "weight_scale", "weight_scale_2"), stored))
    return stored | {"comfy_quant": quant.write_marker(marker(fmt, w.shape, w.dtype))}


def marker(fmt, shape, dtype):
    """What L.comfy_quant and the header say of a layer: the keys that convert_to_quant writes."""
    return {"format": fmt, "group_size": BLOCK[fmt], "orig_dtype": str(dtype), "orig_shape": list(shape)}


def dequantize_weight(stored, shape):
    """The inverse of quantize_weight: stored tensors -> (M, K) float32."""
    layer = quant.QuantLinear.from_tensors("weight", stored, shape[1], shape[0])
    return layer.dequantized(torch.float32)


def snr(w, approximation, hessian=None):
    """Signal to noise in dB, infinite without noise; with a Hessian that of the layer's outputs."""
    signal = noise = 0.0
    for rows in torch.arange(len(w)).split(512):  # a few rows at a time: no second copy of w in float32
        x, y = w[rows[0]:rows[-1] + 1].float(), approximation[rows[0]:rows[-1] + 1]
        signal, noise = signal + _energy(x, hessian), noise + _energy(x - y, hessian)
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf


def _energy(x, hessian):
    """tr(x H x^T): float32 within a row, which is fast, float64 over the rows, which is exact."""
    squares = x.square() if hessian is None else (x @ hessian).mul_(x)
    return squares.sum(1).double().sum().item()


# ----------------------------------------------------------------------------------------------------
# Error-correction LoRA: what a low rank can give back of W - Q
# ----------------------------------------------------------------------------------------------------
#
# It runs beside the layer, y = Q x + up (down x), and is never merged: the sum would have to be rounded
# again, and rounding takes it away. Rounding errors are nearly white, so rank 64 of 5120 holds some 4 % of
# their energy. With a Hessian the energy is that of the output's error, which sits in far fewer directions.
#
# Mode "absorb" goes further: the best rank r of the weight itself is taken out before rounding, so what is
# rounded is smaller, and so is its error (SVDQuant, Li et al. 2024, arXiv:2411.05007). The factors are then
# those of W - Q: what was taken out and part of what rounding lost. Without them the file is useless.

RECIPE_TARGET = r"ffn\.(0|2)\.weight|self_attn\.(v|o)\.weight"


@torch.no_grad()
def low_rank(error, rank, hessian=None, seed=0):
    """error = W - Q (M, K) -> up (M, r), down (r, K), share: of the energy of `error` that up @ down holds.

    r = min(rank, M, K). With a Hessian H = C C^T of the inputs the energy is |error C|^2 = tr(E H E^T), and
    the best rank r comes from the SVD of error C, C taken out again after. The SVD is exact for small
    matrices and else randomised: Halko et al. 2011, arXiv:0909.4061, algorithm 4.4.
    """
    error, rank, root = error.float(), min(rank, *error.shape), None
    if hessian is not None:
        h = hessian.double() / hessian.diagonal().double().mean().clamp(min=1e-30)
        h.diagonal().add_(DAMPING)
        root = torch.linalg.cholesky(h).float()  # (K, K)
    scaled = error if root is None else error @ root
    if min(error.shape) <= max(512, rank + 16):
        u, s, v = torch.linalg.svd(scaled, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)  # its own: threads share the global one
        start = torch.randn(scaled.shape[1], rank + 16, generator=generator).to(scaled)  # (K, r + 16)
        basis = torch.linalg.qr(scaled @ start).Q  # (M, r + 16)
        for _ in range(6):
            basis = torch.linalg.qr(scaled @ torch.linalg.qr(scaled.T @ basis).Q).Q
        u, s, v = torch.linalg.svd(basis.T @ scaled, full_matrices=False)
        u = basis @ u
    u, s, down = u[:, :rank], s[:rank], v[:rank]  # (M, r), (r,), (r, K)
    energy = torch.linalg.vector_norm(scaled, dim=1).double().square().sum().clamp(min=1e-300)
    share = (s.double().square().sum() / energy).item()
    if root is not None:
        down = torch.linalg.solve_triangular(root, down, upper=False, left=False)
    balance = s.sqrt()  # half the size on each side, for the sake of their dtype
    return u * balance, down * balance[:, None], share


def lora_layout(shapes, names, rank):
    """The tensors of a LoRA file for these weights, {name: (dtype, shape)}, under ComfyUI's names."""
    tensors = {}
    for name in names:
        (m, k), prefix = shapes[name], "diffusion_model." + name.removesuffix(".weight")
        r = min(rank, m, k)
        tensors |= {f"{prefix}.lora_up.weight": (torch.bfloat16, (m, r)),
                    f"{prefix}.lora_down.weight": (torch.bfloat16, (r, k)),
                    f"{prefix}.alpha": (torch.float32, ())}  # up @ down counts alpha / r: once
    return tensors


# ----------------------------------------------------------------------------------------------------
# Calibrate: what every layer is fed
# ----------------------------------------------------------------------------------------------------
#
# The pipeline runs on pictures, with the recipe's four steps, on the model as the source has it: that gives
# the DiT's inputs at the four timesteps. Then the DiT runs on all of them at once, one block at a time: look
# at what each layer of the block is fed, round the block, and feed the next with what the rounded one makes.
# So each block knows the errors of those before it. In memory are one block and the tokens of all inputs.

HEADROOM = 2  # of a fixed activation scale over what was seen: a power of two costs nothing, clipping does


class Inputs:
    """What one layer was fed: second moment (K, K), largest magnitude, and some rows (R, K) as they were."""

    def __init__(self, samples, forwards, steps):
        self.share, self.forwards, self.steps = -(-samples // forwards), forwards, steps
        self.moment, self.amax, self.count, self.rows = 0, 0.0, 0, []

    def add(self, x):
        self.amax = max(self.amax, x.abs().amax().item())
        x = x[::-(-len(x) // self.share)].float()
        self.moment, self.count = self.moment + x.T @ x, self.count + len(x)
        self.rows.append(x[::-(-len(x) * self.forwards // 512)])

    def hessian(self):
        """The second moment, shrunk towards a multiple of the identity by as much as so few inputs ask for:
        oracle approximating shrinkage, Chen et al. 2010, arXiv:0907.4698. A prompt has a dozen tokens, and
        the weight must not forget all others. Every timestep's inputs resemble the others': they count once.
        """
        h, k, n = self.moment / self.count, len(self.moment), self.count / self.steps
        trace = h.diagonal().double().sum().item()
        square = torch.linalg.vector_norm(h, dim=1).double().square().sum().item()
        spread = (n + 1) * (square - trace ** 2 / k)
        rho = min(1.0, (square + trace ** 2) / spread) if spread > 0 else 1.0
        h = h * (1 - rho)
        h.diagonal().add_(rho * trace / k)
        return h


class Calibration:
    """The pipeline on pictures; stages() walks through the DiT.

    files: the networks' paths as sample.find_files gives them. Raises what the loaders raise, and Refusal if
    the encoders do not fit the model.
    """

    def __init__(self, source, images, files, samples, seed, device):
        import sample
        import wan_fp4
        self.source, self.samples, self.device = source, samples, torch.device(device)
        first = {name: source.tensor(name) for name in source.shapes
                 if not name.startswith("blocks.") or name.startswith("blocks.0.")}
        self.dit = wan_fp4.dit_from_tensors(first, source.metadata, source.path, self.device)
        self.layers = wan_fp4.count(source.shapes, "blocks.")
        area, frames = (int(source.metadata.get(key, usual)) for key, usual in
                        (("area", sample.AREA), ("frames", sample.FRAMES)))
        self.steps, self.inputs = sample.sigmas("normal", 4, 5.0)[:-1].tolist(), []
        for path in images:
            image, caption = sample.read_image(path), Path(path).with_suffix(".txt")
            prompt = caption.read_text() if caption.exists() else source.metadata.get("prompt", "")
            text, = sample.encode_text(files["text-encoder"], [prompt.strip()], self.device)
            tokens, = sample.encode_pictures(files["clip"], [image], self.device)
            small = sample.resize(image, *sample.fit_size(image.shape[2], image.shape[1], area))
            y, = sample.encode_first_frames(files["vae"], [small], frames, self.device)
            cfg = self.dit.cfg
            if (text.shape[2], tokens.shape[2]) != (cfg.text_dim, cfg.image_dim):
                raise Refusal(f"--calib: {files['text-encoder']} and {files['clip']} give features of width "
                              f"{text.shape[2]} and {tokens.shape[2]}, but the model takes {cfg.text_dim} "
                              f"and {cfg.image_dim}: give the folder of its own encoders with --models")
            self._follow(sample, text, tokens, y, seed)

    def _follow(self, sample, text, tokens, y, seed):
        """Sample one video and keep the DiT's inputs at every step."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((1, 16, *y.shape[2:]), generator=generator).to(self.device)
        progress = tqdm(total=len(self.steps) * self.layers, desc="sampling", unit="block", disable=None)

        def denoise(x, sigma):
            self.inputs.append((x, torch.full((1,), 1000 * sigma, device=self.device), text, tokens, y))
            h, e, context = self.dit.prepare(*self.inputs[-1])
            for i in range(self.layers):
                h = self.block(i)(h, *context)
                progress.update()
            return self.dit.unpatchify(self.dit.head(h, e), x.shape[2:])

        with progress:
            sample.sample_latents(denoise, noise, [*self.steps, 0.0], generator=generator)

    def block(self, i):
        """Block i as the source has it, read anew: none stays in memory."""
        import wan_fp4
        prefix = f"blocks.{i}."
        tensors = {name.removeprefix(prefix): self.source.tensor(name)
                   for name in self.source.shapes if name.startswith(prefix)}
        with torch.device("meta"):
            block = wan_fp4.Block(self.dit.cfg)
        return wan_fp4.load_weights(block, tensors, self.source.path, self.device, self.dit.dtype)

    @contextmanager
    def _observing(self, module, prefix):
        """Gives {weight name: Inputs}, filled by every forward of the module's Linears."""
        seen, hooks, last = {}, [], (None, None)

        def observe(name, x):
            nonlocal last
            if x is last[0]:  # q, k and v are fed the same tensor: one second moment for all
                seen[name] = last[1]
                return
            if name not in seen:
                seen[name] = Inputs(self.samples, len(self.inputs), len(self.steps))
            seen[name].add(x.flatten(0, -2))
            last = x, seen[name]

        for name, layer in module.named_modules():
            full = f"{prefix}{name}.weight"
            if isinstance(layer, quant.QuantLinear) and (prefix or OPTIONAL.fullmatch(full)):
                hooks.append(layer.register_forward_pre_hook(lambda _, x, full=full: observe(full, x[0])))
        yield seen
        for hook in hooks:
            hook.remove()

    @torch.no_grad()
    def stages(self):
        """Yields {weight name: Inputs} for the embeddings and then for block after block. What replace() was
        given for these names, until the next is asked for, runs from there on."""
        self.module, self.prefix, self.replaced = self.dit, "", False
        with self._observing(self.dit, "") as seen:
            states = [self.dit.prepare(*inputs) for inputs in self.inputs]
        yield seen
        if self.replaced:
            states = [self.dit.prepare(*inputs) for inputs in self.inputs]
        tokens, contexts = [state[0] for state in states], [state[2] for state in states]
        for i in range(self.layers):
            block = self.module = self.block(i)
            self.prefix, self.replaced = f"blocks.{i}.", False
            with self._observing(block, self.prefix) as seen:
                after = [block(x, *context) for x, context in zip(tokens, contexts)]
            yield seen
            if self.replaced:
                after = [block(x, *context) for x, context in zip(tokens, contexts)]
            tokens = after

    def replace(self, layer, stored, factors=()):
        """From here on a layer of this stage runs with these stored tensors, and a LoRA's up and down."""
        name = layer.removeprefix(self.prefix)
        old = self.module.get_submodule(name)
        tensors = stored | ({"bias": old.bias} if old.bias is not None else {})
        new = quant.QuantLinear.from_tensors(
            layer, {suffix: tensor.to(self.device) for suffix, tensor in tensors.items()}, old.in_features,
            old.out_features, compute_dtype=self.dit.dtype, mode="dequantize")
        if factors:
            new.attach_lora(*(factor.to(self.device) for factor in factors))
        self.module.set_submodule(name, new)
        self.replaced = True


# ----------------------------------------------------------------------------------------------------
# Write: a safetensors file as a stream
# ----------------------------------------------------------------------------------------------------

@functools.cache
def _stored_layout(fmt, shape, dtype):
    """What quantize_weight makes of such a weight: {suffix: (dtype, shape)}."""
    if fmt == "bf16":
        return {"weight": (dtype, shape)}
    required, _ = quant.stored_tensors(fmt, *shape[::-1])
    stored = {suffix: (dtypes[0], stored_shape) for suffix, (dtypes, stored_shape, _) in required.items()}
    return stored | {"comfy_quant": (torch.uint8, tuple(quant.write_marker(marker(fmt, shape, dtype)).shape))}


def layout(source, formats, static=()):
    """What the converted file will hold: {name: (dtype, shape)}; static: weights that get an input_scale."""
    tensors = {}
    for name, shape in source.shapes.items():
        layer, dot, suffix = name.rpartition(".")
        stored = _stored_layout(formats.get(name, "bf16"), shape, source.dtypes[name])
        for new, tensor in stored.items():
            tensors[layer + dot + (suffix if new == "weight" else new)] = tensor
    return tensors | {f"{name.removesuffix('.weight')}.input_scale": (torch.float32, ()) for name in static}


def metadata(source, formats, made):
    """The converted file's header entries: the source's own, how it was made, and all markers once more."""
    markers = {name.removesuffix(".weight"): marker(fmt, source.shapes[name], source.dtypes[name])
               for name, fmt in formats.items() if fmt != "bf16"}
    layers = json.dumps({"format_version": "1.0", "layers": markers})
    return source.metadata | made | {"_quantization_metadata": layers}


def header(tensors, metadata):
    """{name: (dtype, shape)} and {key: text} -> (the file's first bytes, {name: offset}, the file's size).

    A safetensors file is: the length of the JSON in 8 bytes, the JSON, the tensors' bytes. The largest
    dtypes come first and the JSON is padded with spaces, so that every tensor is aligned to its dtype.
    """
    spelling = {dtype: text for text, dtype in DTYPES.items()}
    entries, offsets, end = {}, {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
        dtype, shape = tensors[name]
        offsets[name], end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": spelling[dtype], "shape": shape, "data_offsets": [offsets[name], end]}
    entries["__metadata__"] = dict(sorted(metadata.items()))  # read from a file, they come in any order
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    return start, {name: len(start) + offset for name, offset in offsets.items()}, len(start) + end


def _bytes(tensor):
    """A CPU tensor's bytes where they lie: torch has no buffer interface of its own."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


class Output:
    """A safetensors file of the tensors {name: (dtype, shape)}, written in any order to path.part."""

    def __init__(self, path, tensors, metadata):
        self.path, self.tensors, self.part = path, tensors, path.with_name(path.name + ".part")
        self.start, self.offsets, self.size = header(tensors, metadata)
        self.missing, self.file = set(tensors), None

    def open(self, resume):
        self.file = open(self.part, "r+b" if resume else "w+b", buffering=0)
        self.file.write(self.start)
        self.file.truncate(self.size)

    def write(self, name, tensor):
        """Write a tensor; returns its checksum."""
        tensor = tensor.cpu().contiguous()
        expected, got = self.tensors[name], (tensor.dtype, tuple(tensor.shape))
        if got != expected:
            raise ValueError(f"{name}: got {got}, expected {expected} from the header")
        self.missing.remove(name)
        if not tensor.numel():
            return 0
        data, done = _bytes(tensor), 0
        self.file.seek(self.offsets[name])
        while done < len(data):
            done += self.file.write(data[done:])  # at most 2 GiB a call
        return zlib.crc32(data)

    def read(self, name):
        """A tensor that was written; returns it and its checksum."""
        dtype, shape = self.tensors[name]
        tensor = torch.empty(shape, dtype=dtype)
        if not tensor.numel():
            return tensor, 0
        self.file.seek(self.offsets[name])
        self.file.readinto(_bytes(tensor))
        return tensor, zlib.crc32(_bytes(tensor))

    def close(self):
        if self.missing:
            raise ValueError(f"{self.path}: {len(self.missing)} tensors were never written, "
                             f"as {min(self.missing)}")
        os.fsync(self.file.fileno())  # or a power cut could leave the new name with old bytes
        self.file.close()
        os.replace(self.part, self.path)


class Journal:
    """What an interrupted run has finished: a line of JSON for each weight, beside the unfinished files.

    The first line identifies the run: source, plan and command must be the same to go on. A line holds the
    checksums of its tensors, so that what a crash kept from the disk is done again.
    """

    def __init__(self, outputs, resume):
        self.outputs = outputs
        self.path = outputs[0].path.with_name(outputs[0].path.name + ".journal")
        identity = hashlib.sha256(b"".join(output.start for output in outputs)).hexdigest()
        lines = []
        if resume:
            if not all(path.exists() for path in (self.path, *(output.part for output in outputs))):
                raise Refusal(f"--resume: nothing to go on from: {self.path} or its .part file is missing")
            first, *lines = self.path.read_text().splitlines()
            if first != identity:
                raise Refusal(f"--resume: {self.path} is of another run: the source, the plan or the command "
                              f"differs. Start again without --resume")
        need = sum(output.size - (output.part.stat().st_blocks * 512 if output.part.exists() else 0)
                   for output in outputs)
        free = shutil.disk_usage(self.path.parent).free
        if need > free:
            raise Refusal(f"{outputs[0].path}: needs {_gib(need)} more, "
                          f"but only {_gib(free)} of the disk are free")
        for output in outputs:
            output.open(resume)
        self.done, kept = {}, []  # {weight: quality}
        for line in lines:
            try:
                name, quality, written = json.loads(line)
            except ValueError:  # the last line, cut short
                break
            if all(outputs[i].read(tensor)[1] == crc for i, tensor, crc in written):
                self.done[name] = quality
                kept.append(line)
                for i, tensor, _ in written:
                    outputs[i].missing.remove(tensor)
        self.file = open(self.path, "w")
        print(identity, *kept, sep="\n", file=self.file, flush=True)

    def write(self, name, quality, parts):
        """Write a weight's tensors, one dict of them for each output, and note it as done."""
        written = [(i, tensor, self.outputs[i].write(tensor, value))
                   for i, part in enumerate(parts) for tensor, value in part.items()]
        print(json.dumps([name, quality, written]), file=self.file, flush=True)

    def discard(self):
        for path in (self.path, *(output.part for output in self.outputs)):
            path.unlink(missing_ok=True)

    def close(self):
        """All is done: give the files their names."""
        for output in reversed(self.outputs):
            output.close()
        self.file.close()
        self.path.unlink()


def in_order(work, items, device="cpu"):
    """Yields (item, work(item)) in order, computed in threads that run a little ahead. On a CPU the threads
    share out torch's own: one weight on one core, so that they do not wait for each other."""
    threads, futures = torch.get_num_threads(), deque()
    count = min(4, threads) if torch.device(device).type == "cpu" else 2
    torch.set_num_threads(max(1, threads // count))
    pool = ThreadPoolExecutor(count)
    try:
        for item in items:
            futures.append((item, pool.submit(work, item)))
            if len(futures) > count:
                item, future = futures.popleft()
                yield item, future.result()
        while futures:
            item, future = futures.popleft()
            yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Settings:
    """How convert rounds, and for which weights it makes a LoRA."""
    method: str = "search"
    num_iter: int = NUM_ITER
    targets: frozenset = frozenset()
    rank: int = 64
    lora_mode: str = "correct"  # or "absorb"
    static: bool = False  # write input_scale
    seed: int = 0


def _round(source, name, fmt, how, seen, device):
    """One tensor of the source -> the tensors of the converted file and of the LoRA, by full name; and, if it
    is quantized, {measure: dB}. `seen`: its Inputs, or None."""
    tensor, layer = source.tensor(name), name.removesuffix(".weight")
    if fmt == "bf16":
        return {name: tensor}, {}, {}
    w, lora = tensor.to(device), {}
    hessian = None if seen is None else seen.hessian().to(device)
    base, rank = w, how.rank if name in how.targets else 0
    if rank and how.lora_mode == "absorb":
        up, down, _ = low_rank(w, rank, hessian, how.seed)
        base = torch.addmm(w.float(), up, down, alpha=-1)
    stored = quantize_weight(base, fmt, None if how.method == "rtn" else hessian, how.method, how.num_iter)
    stored["comfy_quant"] = quant.write_marker(marker(fmt, w.shape, tensor.dtype))
    approximation = dequantize_weight(stored, w.shape)
    measures = {"weight": None} | ({"output": seen.moment.to(device)} if seen is not None else {})
    quality = {key: snr(w, approximation, h) for key, h in measures.items()}
    if rank:
        error = approximation.neg_().add_(w)  # in place: at 14B a weight in float32 is 280 MB
        up, down, quality["share"] = low_rank(error, rank, hessian, how.seed)
        up, down = up.bfloat16(), down.bfloat16()
        approximation = error.addmm_(up.float(), down.float(), alpha=-1).neg_().add_(w)
        quality |= {f"{key} with LoRA": snr(w, approximation, h) for key, h in measures.items()}
        prefix = f"diffusion_model.{layer}"
        lora = {f"{prefix}.lora_up.weight": up, f"{prefix}.lora_down.weight": down,
                f"{prefix}.alpha": torch.tensor(float(len(down)))}
    if how.static and fmt == "nvfp4":
        stored["input_scale"] = torch.tensor(seen.amax * HEADROOM / (quant.E4M3_MAX * quant.E2M1_MAX))
    return {f"{layer}.{suffix}": part for suffix, part in stored.items()}, lora, quality


def convert(source, formats, out, how=Settings(), made=None, lora_file=None, calibration=None, device="cpu",
            resume=False):
    """Writes `source` to the file `out` in the planned formats, and the LoRA of how.targets to lora_file.

    made         header entries on how
    calibration  a Calibration: rounding then minimises the error of the layers' outputs
    resume       go on from what an interrupted run left; the files come out the same, byte for byte

    Returns {name: quality}, for each quantized weight its signal-to-noise ratios in dB and, with a LoRA, the
    share of the error's energy that it holds. Whatever interrupts it, the files do not get their names.
    """
    made, about = made or {}, {**(made or {}), "base": out.name}
    if lora_file and how.lora_mode == "absorb":  # our loader refuses the one without the other
        about["lora_id"] = lora_file.name
        made = made | {"needs_lora": lora_file.name}
    static = [name for name, fmt in formats.items() if how.static and fmt == "nvfp4"]
    outputs = [Output(out, layout(source, formats, static), metadata(source, formats, made))]
    if lora_file:
        outputs.append(Output(lora_file, lora_layout(source.shapes, how.targets, how.rank), about))

    groups = {}  # the embeddings and so on, then block after block
    for name in source.shapes:
        match = re.match(r"blocks\.(\d+)\.", name)
        groups.setdefault(int(match[1]) if match else -1, []).append(name)
    groups = [groups.get(i, []) for i in range(-1, max(groups) + 1)]
    stages = calibration.stages() if calibration else [{}]
    if not calibration:
        groups = [sum(groups, [])]

    journal, quality = Journal(outputs, resume), {}
    try:
        with _progress(source, formats) as progress:
            for names, seen in zip(groups, stages):
                def work(name):
                    return None if name in journal.done else _round(
                        source, name, formats.get(name, "bf16"), how, seen.get(name), device)

                for name, result in in_order(work, names, device):
                    fmt, layer = formats.get(name, "bf16"), name.removesuffix(".weight")
                    if result:
                        tensors, lora, quality[name] = result
                        journal.write(name, quality[name], [tensors, lora][:len(outputs)])
                    else:
                        quality[name] = journal.done[name]
                    if calibration and fmt != "bf16":
                        written = _stored_layout(fmt, source.shapes[name], source.dtypes[name])
                        stored = {suffix: outputs[0].read(f"{layer}.{suffix}")[0] for suffix in written}
                        needs = lora_file and how.lora_mode == "absorb" and name in how.targets
                        calibration.replace(layer, stored, [
                            outputs[1].read(f"diffusion_model.{layer}.lora_{side}.weight")[0]
                            for side in ("up", "down") if needs])
                    progress(name)
        journal.close()
    except Refusal:
        journal.discard()
        raise
    return {name: measures for name, measures in quality.items() if measures}


# ----------------------------------------------------------------------------------------------------
# Report
# ----------------------------------------------------------------------------------------------------

@contextmanager
def _progress(source, formats):
    """A bar over the source's bytes, with the number of layers and the time left; done(name) moves it on."""
    count = 0
    with tqdm(total=source.bytes, unit="B", unit_scale=True, desc="converting", disable=None) as bar:
        def done(name):
            nonlocal count
            count += name in formats
            bar.set_postfix_str(f"{count}/{len(formats)} layers", refresh=False)
            bar.update(math.prod(source.shapes[name]) * source.dtypes[name].itemsize)
        yield done


def _gib(size):
    return f"{size / 2 ** 30:.2f} GiB" if size >= 2 ** 28 else f"{size / 2 ** 20:.2f} MiB"


def _kind(name):
    """blocks.3.ffn.0.weight -> ffn.0"""
    match = BLOCK_WEIGHT.fullmatch(name)
    return match[2] if match else name


def plan_report(shapes, formats):
    """Lines: percent of the blocks per format and type of layer; norms count as bf16, in the total too."""
    counts = {}
    for name in shapes:
        if BLOCK_WEIGHT.fullmatch(name):
            kind = _kind(name) if name in formats else "norms"
            counts.setdefault(kind, dict.fromkeys(PLAN_FORMATS, 0))[formats.get(name, "bf16")] += 1
    counts["total"] = {fmt: sum(row[fmt] for row in counts.values()) for fmt in PLAN_FORMATS}
    yield f"{'percent of layers':17}" + "".join(f"{PLAN_FORMATS[fmt]:>8}" for fmt in PLAN_FORMATS)
    for kind, row in counts.items():
        yield f"{kind:17}" + "".join(f"{100 * row[fmt] / sum(row.values()):8.1f}" for fmt in PLAN_FORMATS)
    extra = [f"{name}: {PLAN_FORMATS[fmt]}" for name, fmt in formats.items() if not BLOCK_WEIGHT.fullmatch(name)]
    yield from sorted(extra)


COLOURS = {"nvfp4": (70, 160, 90), "mxfp8": (230, 170, 50), "bf16": (200, 75, 75)}
LETTERS = {"nvfp4": "4", "mxfp8": "8", "bf16": "b"}


def _grid(formats):
    """{type of layer: {block: format}}, and the number of blocks."""
    rows = {}
    for name, fmt in formats.items():
        if match := BLOCK_WEIGHT.fullmatch(name):
            rows.setdefault(match[2], {})[int(match[1])] = fmt
    return dict(sorted(rows.items())), 1 + max(max(row) for row in rows.values())


def plan_map(formats, colour):
    """Lines: a row for each type of layer, a character for each block."""
    def cell(fmt):
        r, g, b = COLOURS[fmt]
        return f"\033[48;2;{r};{g};{b}m{LETTERS[fmt]}\033[0m" if colour else LETTERS[fmt]
    rows, blocks = _grid(formats)
    for kind, row in rows.items():
        yield f"{kind:17} " + "".join(cell(row[i]) if i in row else " " for i in range(blocks))
    yield f"{'block 0 and on':17} " + ", ".join(f"{cell(fmt)} {PLAN_FORMATS[fmt]}" for fmt in LETTERS)


def plan_svg(formats):
    """The same as an SVG picture."""
    rows, blocks = _grid(formats)
    left, size, top = 130, 14, 24
    width, height = left + blocks * size + 10, top + len(rows) * size + 30
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
             f'font-family="sans-serif" font-size="11">']
    lines += [f'<text x="{left + i * size}" y="{top - 8}">{i}</text>' for i in range(0, blocks, 5)]
    for y, (kind, row) in enumerate(rows.items()):
        lines.append(f'<text x="4" y="{top + y * size + 11}">{kind}</text>')
        lines += [f'<rect x="{left + i * size}" y="{top + y * size}" width="{size - 1}" height="{size - 1}" '
                  f'fill="rgb{COLOURS[fmt]}"><title>blocks.{i}.{kind}: {PLAN_FORMATS[fmt]}</title></rect>'
                  for i, fmt in row.items()]
    for i, fmt in enumerate(COLOURS):
        lines.append(f'<rect x="{left + i * 80}" y="{height - 22}" width="12" height="12" '
                     f'fill="rgb{COLOURS[fmt]}"/><text x="{left + i * 80 + 17}" y="{height - 12}">'
                     f'{PLAN_FORMATS[fmt]}</text>')
    return "\n".join([*lines, "</svg>", ""])


def quality_report(quality, formats):
    """Lines: mean and worst SNR per type of layer and format, and the worst layers; with a LoRA also the
    share of the error's energy that it holds, and the SNR with it. After calibration the SNR is that of the
    layers' outputs, for the inputs that were seen; otherwise that of the weights."""
    key = "output" if any("output" in measures for measures in quality.values()) else "weight"
    measured = {name: measures for name, measures in quality.items() if key in measures}
    groups = {}
    for name, measures in measured.items():
        for kind in (_kind(name), "all"):
            groups.setdefault((kind == "all", kind, formats[name]), []).append(measures)
    with_lora = any("share" in measures for measures in measured.values())
    yield (f"{key} SNR               layers  mean dB  worst dB"
           + "   LoRA: layers  holds  mean dB  with it" * with_lora)
    for (_, kind, fmt), group in sorted(groups.items(), key=lambda item: item[0]):
        values, line = [m[key] for m in group], f"{kind:16} {PLAN_FORMATS[fmt]:7}"
        line += f" {len(values):6} {sum(values) / len(values):8.2f} {min(values):9.2f}"
        if corrected := [m for m in group if "share" in m]:
            share, alone, both = (sum(m[k] for m in corrected) / len(corrected)
                                  for k in ("share", key, f"{key} with LoRA"))
            line += f" {len(corrected):15} {share:6.1%} {alone:8.2f} {both:8.2f}"
        yield line
    worst = sorted((measures[key], name) for name, measures in measured.items())[:5]
    yield "worst: " + ", ".join(f"{name} {value:.2f}" for value, name in worst)


# ----------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------

def _positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return number


def _size(text):
    match = re.fullmatch(r"([\d.]+)\s*([KMG]?)(i?)B?", text, re.IGNORECASE)
    try:
        number, unit = float(match[1]), " KMG".index(match[2].upper() or " ")
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 9.76GiB or 500MB") from None
    return int(number * (1024 if match[3] else 1000) ** unit)


def make_parser():
    parser = argparse.ArgumentParser(
        "convert.py", usage="python convert.py -i MODEL [options]", allow_abbrev=False,
        description="A Wan2.1 checkpoint in bf16, fp16 or fp32 -> NVFP4 and MXFP8.",
        epilog="Flags as in convert_to_quant. A regex may match any part of a name: blocks.0.ffn.2.weight")
    add = parser.add_argument
    add("-i", "--input", required=True, type=Path, metavar="MODEL",
        help="a safetensors file, a shard index .json, or a folder of shards; official or diffusers names")
    add("-o", "--output", type=Path, metavar="OUT", help="default: MODEL-nvfp4.safetensors beside the input")
    plan = parser.add_argument_group("which format for which layer (default: --plan score)")
    base = plan.add_mutually_exclusive_group()
    for fmt in ("nvfp4", "mxfp8"):
        base.add_argument(f"--{fmt}", action="store_const", dest="base", const=fmt,
                          help=f"{PLAN_FORMATS[fmt]} for every layer that no regex names")
    plan.add_argument("--custom-layers", metavar="REGEX",
                      help="layers that take --custom-type; wins over --exclude-layers")
    plan.add_argument("--custom-type", choices=PLAN_FORMATS, help="format of --custom-layers")
    plan.add_argument("--exclude-layers", metavar="REGEX", help="layers that stay as they are")
    plan.add_argument("--plan", choices=("score", "recipe", "measured"), help="score: by kurtosis, dynamic "
        "range and aspect ratio of each weight; recipe: the published one for the 14B; measured: by each "
        "layer's output error, needs --calib and is then the default")
    plan.add_argument("--size", type=_size, metavar="9.76GiB", help="the plan of least error in this size: "
        "of the outputs with --calib, else of the weights. Without it --plan measured takes the score plan's")
    plan.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the plan")
    plan.add_argument("--print-flags", action="store_true", help="print it as flags for convert_to_quant")
    plan.add_argument("--dry-run", action="store_true", help="stop after the plan")
    rounding = parser.add_argument_group("rounding")
    rounding.add_argument("--simple", action="store_true", help="to nearest, without searching block scales")
    rounding.add_argument("--calib", nargs="+", type=Path, metavar="IMAGE", help="run the pipeline on these "
        "pictures and round each layer for what it is fed. A prompt is read from IMAGE's name with .txt")
    rounding.add_argument("--models", type=Path, metavar="DIR", help="the other networks for --calib, as in "
        "sample.py (models/ beside this script, or the demo's)")
    rounding.add_argument("--calib-samples", type=_positive, default=8192, metavar="N",
                          help="at most so many inputs of each layer (%(default)s)")
    rounding.add_argument("--num-iter", type=_positive, default=NUM_ITER, metavar="N", help="with --calib, "
        "at most so many sweeps over a weight; it stops when nothing changes any more (%(default)s)")
    rounding.add_argument("--static-input-scale", action="store_true", help="with --calib: fix the tensor "
        "scales of the activations in the file; by default they are taken from each activation")
    lora = parser.add_argument_group("error-correction LoRA")
    lora.add_argument("--extract-lora", action="store_true", help="write it, to run beside the layers")
    lora.add_argument("--lora-rank", type=_positive, default=64, metavar="R", help="its rank (%(default)s)")
    lora.add_argument("--lora-target", metavar="REGEX", default=RECIPE_TARGET,
                      help="its layers (%(default)s)")
    lora.add_argument("--lora-mode", choices=("correct", "absorb"), default="correct", help="correct: what "
        "rounding lost. absorb: a part of the weight too, which is not rounded then; needs the LoRA always")
    lora.add_argument("--lora-output", type=Path, metavar="FILE",
                      help="default: OUT with _lora before .safetensors")
    add("--device", default="cpu", metavar="D", help="where to round: cpu, cuda, cuda:1 (%(default)s)")
    add("--seed", type=int, default=0, help="of the calibration videos' noise and the LoRA (%(default)s)")
    add("--resume", action="store_true", help="go on from where the same command was interrupted")
    for flag, why in (("--wan", "Wan is what this converts"), ("--comfy_quant", "the format it writes"),
                      ("--save-quant-metadata", "always in the header")):
        add(flag, action="store_true", help=f"accepted and always on: {why}")
    add("--top-p", type=float, metavar="P", help="accepted, without effect: weighting the search by the "
        "weight's own leading directions makes real outputs worse (bench/real_weights.py)")
    return parser


def _output(args):
    path = Path(os.path.abspath(args.input))  # not resolve: a download cache's links point to hashes
    stem = path.name if path.is_dir() else re.sub(r"(\.safetensors)?(\.index)?\.\w+$", "", path.name)
    return args.output or path.with_name(stem + "-nvfp4.safetensors")


def _check_output(out, others):
    if out.is_dir() or not out.parent.is_dir():
        raise Refusal(f"{out}: cannot be written: {'a folder' if out.is_dir() else 'its folder is missing'}")
    for other in others:
        if out.resolve() == other.resolve() or out.exists() and other.exists() and out.samefile(other):
            raise Refusal(f"{out}: would overwrite {other}: output and input must be different files")


def _check_flags(args):
    """What argparse cannot see: flags that need or exclude one another."""
    regexes = args.base or args.custom_layers or args.exclude_layers
    if bool(args.custom_layers) != bool(args.custom_type):
        raise Refusal("--custom-layers and --custom-type: give both or neither")
    if regexes and (args.plan or args.size):
        raise Refusal(f"--{'plan' if args.plan else 'size'}: chooses every layer's format itself, without "
                      f"--nvfp4, --mxfp8, --custom-layers or --exclude-layers")
    if args.size and args.plan in ("score", "recipe"):
        raise Refusal(f"--size: --plan {args.plan} knows no size: leave it out, or --plan measured")
    if not args.calib and (args.plan == "measured" or args.static_input_scale or args.models):
        raise Refusal("--plan measured, --static-input-scale and --models: need --calib IMAGE...")
    if not args.extract_lora and (args.lora_output or args.lora_target != RECIPE_TARGET
                                  or args.lora_mode != "correct"):
        raise Refusal("--lora-target, --lora-mode and --lora-output: need --extract-lora")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise Refusal(f"--device {args.device}: {str(error).splitlines()[0]}") from None


def _calibration(args, source):
    import sample
    named = dict.fromkeys(sample.NETWORKS)
    if args.models or (sample.HERE / "models").is_dir():
        named["dit"] = source.files[0]  # the one that is converted; or else the demo's others
    files, _ = sample.find_files(named, args.models)
    for image in args.calib:
        sample.read_image(image)  # a wrong one is said before the first network is loaded
    return Calibration(source, args.calib, files, args.calib_samples, args.seed, args.device)


def _analyse(source, names):
    """{name: score} in one streaming pass."""
    done = in_order(lambda name: sensitivity(source.tensor(name)), names)
    return score(dict(tqdm(done, total=len(names), desc="analysing", disable=None)))


def _choose(args, source, calibration, made):
    """The plan that the flags ask for, and lines to print about it."""
    if args.base or args.custom_layers or args.exclude_layers:
        return plan(source.shapes, args.base or "nvfp4", args.custom_type, args.custom_layers,
                    args.exclude_layers), []
    if args.plan == "recipe":
        return plan(source.shapes, "nvfp4", "mxfp8", RECIPE_MXFP8, RECIPE_KEPT), []
    blocks = list(plan(source.shapes))
    scores = _analyse(source, blocks)
    by_score = plan_by_score(scores)
    if args.plan == "score" or not (args.size or calibration):
        return by_score, []

    names = [name for name, shape in source.shapes.items() if len(shape) == 2
             and (name in scores or OPTIONAL.fullmatch(name))]
    errors = {}
    if calibration:
        with tqdm(total=len(names), desc="measuring", disable=None) as progress:
            for seen in calibration.stages():
                for name, inputs in seen.items():
                    rows = torch.cat(inputs.rows)[:512]
                    errors[name] = output_errors(source.tensor(name).to(rows.device), rows)
                    progress.update()
    else:
        done = in_order(lambda name: weight_errors(source.tensor(name)), names)
        errors = dict(tqdm(done, total=len(names), desc="measuring", disable=None))
    sizes = {name: stored_bytes(source.shapes[name], source.dtypes[name]) for name in names}
    size = args.size or _file_size(source, by_score, made)
    smallest = _file_size(source, dict.fromkeys(names, "nvfp4"), made)
    if size < smallest:
        raise Refusal(f"--size {_gib(size)}: even the smallest formats make it {_gib(smallest)}")
    rest = smallest - sum(sizes[name]["nvfp4"] for name in names)
    formats = plan_by_error(errors, sizes, size - rest)
    what = "outputs" if calibration else "weights"
    total, other = (sum(errors[name][f.get(name, "bf16")] for name in names) for f in (formats, by_score))
    return formats, [
        f"rank correlation of the score with NVFP4's error in the {what}: "
        f"{rank_correlation([scores[n] for n in blocks], [errors[n]['nvfp4'] for n in blocks]):.2f}",
        f"relative errors of the {what}, added up: {total:.4f} in {_gib(_file_size(source, formats, made))}; "
        f"by the score's plan {other:.4f} in {_gib(_file_size(source, by_score, made))}"]


def _file_size(source, formats, made):
    return header(layout(source, formats), metadata(source, formats, made))[2]


def _run(args, command):
    begin = time.monotonic()
    source, out = Source(args.input), _output(args)
    _check_output(out, source.files)
    if args.plot:
        _check_output(args.plot, [*source.files, out])
    _check_flags(args)
    calibration = _calibration(args, source) if args.calib else None
    made = {"quantization_command": command,
            "quantization_versions": f"torch {torch.__version__}, safetensors {safetensors.__version__}"}
    formats, notes = _choose(args, source, calibration, made)
    lora_file, targets = None, frozenset()
    if args.extract_lora:
        lora_file = args.lora_output or out.with_name(f"{out.stem}_lora.safetensors")
        rounded = [name for name, fmt in formats.items() if fmt != "bf16"]
        targets = frozenset(matching(args.lora_target, rounded, "--lora-target"))
        _check_output(lora_file, [*source.files, out])

    lines = *plan_report(source.shapes, formats), "", *plan_map(formats, sys.stdout.isatty()), "", *notes
    print(*lines, sep="\n")
    print(f"{_gib(source.bytes)} -> {_gib(_file_size(source, formats, made))}")
    if lora_file:
        size = header(lora_layout(source.shapes, targets, args.lora_rank), {})[2]
        print(f"LoRA of rank {args.lora_rank} for {len(targets)} layers: {_gib(size)}")
    if args.print_flags:
        print(flags(formats))
        if beyond := sorted(n for n, fmt in formats.items() if fmt == "nvfp4" and OPTIONAL.fullmatch(n)):
            print(f"(convert_to_quant has one custom type and would keep, not NVFP4: {', '.join(beyond)})")
    if args.plot:
        args.plot.write_text(plan_svg(formats))
    if args.dry_run:
        return
    how = Settings("rtn" if args.simple else "search", args.num_iter, targets, args.lora_rank, args.lora_mode,
                   args.static_input_scale, args.seed)
    quality = convert(source, formats, out, how, made, lora_file, calibration, args.device, args.resume)
    print("", *quality_report(quality, formats), sep="\n")
    if lora_file:
        print(f"{_gib(lora_file.stat().st_size)}: {lora_file}")
    print(f"\n{command}\n{_gib(source.bytes)} -> {_gib(out.stat().st_size)} in "
          f"{time.monotonic() - begin:.1f} s: {out}")


def main(argv=None):
    """The command line: argv without the program's name, by default this process's own.

    Raises SystemExit(2) after one line on stderr for what it refuses, SystemExit(130) after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else [str(arg) for arg in argv]
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        _run(args, shlex.join(["convert.py", *(arg for arg in argv if arg != "--resume")]))
    except KeyboardInterrupt:
        parser.exit(130, "\nconvert.py: interrupted; the same command with --resume goes on\n")
    except (Refusal, OSError, ValueError) as error:
        parser.exit(2, f"convert.py: {error}\n")


if __name__ == "__main__":
    main()
