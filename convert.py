"""From a bf16 Wan checkpoint to an NVFP4 / MXFP8 one in the comfy_quant format, tensor by tensor.

    python convert.py -i MODEL.safetensors            writes MODEL-nvfp4.safetensors

How it goes, and in which order to read this file:

  Source    the checkpoint: its names (without prefix), shapes and dtypes, and one tensor at a time.
  plan      which weight gets which format: NVFP4 (4.5 bits a weight), MXFP8 (8.25), or "bf16", which means:
            kept as the source has it. From regexes on the names, or from a score of each weight.
  round     one weight to the stored tensors of its format: to nearest, with searched block scales, or, given
            the second moment of the layer's inputs, so that the layer's outputs come out best.
  LoRA      low-rank factors of what rounding lost, for a second file.
  write     a safetensors file begins with a header of all names, shapes and offsets. All of them follow from
            the source's shapes and the plan, so the header goes first and then tensor after tensor, each to
            its place: memory holds one weight, whatever the size of the model. The file has a temporary
            name until it is complete.

What is written for a quantised layer L, in quant.py's layout: L.weight, L.weight_scale, for NVFP4
L.weight_scale_2, and the marker L.comfy_quant, which ComfyUI reads. Older tools read the same in the header,
under _quantization_metadata: both are always there. The header also keeps the source's own entries
(head_dim and so on), and says how the file was made.
"""
import argparse
import ctypes
import functools
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path

if __name__ == "__main__":  # torch warns while it is imported; nothing here needs numpy
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")

import safetensors
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tqdm import tqdm

import quant

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn}  # as a safetensors header spells them
FORMATS = {"bf16": "bf16", "mxfp8": "MXFP8", "nvfp4": "NVFP4"}  # as in the flags -> as printed
BLOCK = {"mxfp8": quant.MXFP8_BLOCK, "nvfp4": quant.NVFP4_BLOCK}


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
    """A checkpoint's tensors under their bare names: shapes, dtypes, metadata; tensor(name) reads one.

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
                    raise Refusal(f"{file}: already quantised, its header says: convert the bf16 model")
                for stored in f.keys():
                    self._add(f, file, stored)
        if not any(re.match(r"blocks\.\d+\.self_attn\.", name) for name in self.shapes):
            raise Refusal(f"{path}: not a Wan model under its official names: no blocks.N.self_attn")
        self.bytes = sum(math.prod(s) * self.dtypes[name].itemsize for name, s in self.shapes.items())

    def _add(self, f, file, stored):
        name = re.sub(r"^(model\.)?diffusion_model\.", "", stored)
        if name in self.shapes:
            raise Refusal(f"{file}: {name} is there twice, here as {stored}: are two models in one place?")
        tensor = f.get_slice(stored)
        dtype = tensor.get_dtype()
        if dtype.startswith("F8") or name.endswith((".scale_weight", "scaled_fp8")):
            raise Refusal(f"{file}: {name} is already 8-bit ({dtype}): its rounding error would add to "
                          f"NVFP4's, and black frames are reported. Convert the bf16 model")
        if name.endswith((".comfy_quant", ".weight_scale")):
            raise Refusal(f"{file}: already quantised, it has {name}: convert the bf16 model")
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
        if tensor.is_floating_point() and tensor.numel() and not tensor.abs().amax().isfinite():
            raise Refusal(f"{file}: {stored} has NaN or infinite values: is the file damaged?")
        return tensor


# ----------------------------------------------------------------------------------------------------
# Plan: which weight gets which format
# ----------------------------------------------------------------------------------------------------

# The Linears of the blocks hold 98 % of the weights. Of the others only those in OPTIONAL may be quantised,
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


def flags(formats):
    """A plan as the regexes of convert_to_quant's command line."""
    groups = {"mxfp8": {}, "bf16": {}, "nvfp4": {}}
    for name, fmt in formats.items():
        match = BLOCK_WEIGHT.fullmatch(name)
        groups[fmt].setdefault(match[2] if match else name, []).append(match and match[1])

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

NUM_ITER = 4  # sweeps; the first takes off a third of the error, all after the fourth together a fiftieth
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

    A weight on the meta device gives tensors of the right shapes and dtypes, if method is "rtn".
    Raises ValueError for an unknown format, shapes that do not fit, and values that are not finite.
    """
    if fmt == "bf16":
        return {"weight": w}
    if fmt not in FORMATS:
        raise ValueError(f"quantize_weight: got format {fmt!r}, expected one of {', '.join(FORMATS)}")
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


def snr(w, approximation):
    """Signal to noise in dB; infinite without noise."""
    signal, noise = _energy(w), _energy(w - approximation)
    return 10 * math.log10(signal / noise) if noise else math.inf


def _energy(x):
    """The sum of squares: float32 within a row, which is fast, float64 over the rows, which is exact."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).double().square().sum().item()


# ----------------------------------------------------------------------------------------------------
# Error-correction LoRA: what a low rank can give back of W - Q
# ----------------------------------------------------------------------------------------------------
#
# It runs beside the layer, y = Q x + up (down x), and is never merged: the sum would have to be rounded
# again, and rounding takes it away. Rounding errors are nearly white, so rank 64 of 5120 holds some 4 % of
# their energy. With a Hessian the energy is that of the output's error, which sits in far fewer directions.

RECIPE_TARGET = r"ffn\.(0|2)\.weight|self_attn\.(v|o)\.weight"


@torch.no_grad()
def low_rank(error, rank, hessian=None):
    """error = W - Q (M, K) -> up (M, r), down (r, K), share: of the energy of `error` that up @ down holds.

    r = min(rank, M, K). With a Hessian H = C C^T of the inputs the energy is |error C|^2 = tr(E H E^T), and
    the best rank r comes from the SVD of error C, C taken out again after. The SVD is exact for small
    matrices and else randomised (Halko et al. 2011, arXiv:0909.4061), with the same seed each time.
    """
    error, rank, root = error.float(), min(rank, *error.shape), None
    if hessian is not None:
        h = hessian.double() / hessian.diagonal().double().mean().clamp(min=1e-30)
        h.diagonal().add_(DAMPING)
        root = torch.linalg.cholesky(h).float()  # (K, K)
    scaled = error if root is None else error @ root
    if min(error.shape) <= max(512, rank + 16):
        u, s, v = torch.linalg.svd(scaled, full_matrices=False)
        v = v.T
    else:
        with torch.random.fork_rng([error.device] if error.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(scaled, rank + 16, niter=6)
    u, s, v = u[:, :rank], s[:rank], v[:, :rank]
    share = (s.double().square().sum() / scaled.double().square().sum().clamp(min=1e-300)).item()
    down = v.T  # (r, K)
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
# Write: a safetensors file as a stream
# ----------------------------------------------------------------------------------------------------

@functools.cache
def _stored_layout(fmt, shape, dtype):
    stored = quantize_weight(torch.empty(shape, dtype=dtype, device="meta"), fmt, method="rtn")
    return {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in stored.items()}


def layout(source, formats):
    """What the converted file will hold: {name: (dtype, shape)}."""
    tensors = {}
    for name, shape in source.shapes.items():
        layer, dot, suffix = name.rpartition(".")
        stored = _stored_layout(formats.get(name, "bf16"), shape, source.dtypes[name])
        for new, tensor in stored.items():
            tensors[layer + dot + (suffix if new == "weight" else new)] = tensor
    return tensors


def header(tensors, metadata):
    """{name: (dtype, shape)} and {key: text} -> (the file's first bytes, {name: offset}, the file's size).

    A safetensors file is: the length of the JSON in 8 bytes, the JSON, the tensors' bytes. The largest
    dtypes come first and the JSON is padded with spaces, so that every tensor is aligned to its dtype.
    """
    spelling = {dtype: text for text, dtype in DTYPES.items()}
    entries, offsets, end = {"__metadata__": metadata}, {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
        dtype, shape = tensors[name]
        offsets[name], end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": spelling[dtype], "shape": shape, "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    return start, {name: len(start) + offset for name, offset in offsets.items()}, len(start) + end


@contextmanager
def writing(path, tensors, metadata):
    """Gives write(name, tensor), to be called once for each of the tensors {name: (dtype, shape)}.

    The file gets its name when all are written, and leaves nothing behind if that never happens.
    """
    start, offsets, size = header(tensors, metadata)
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise Refusal(f"{path}: needs {_gib(size)}, but only {_gib(free)} of the disk are free")
    missing = set(tensors)
    part = path.with_name(path.name + ".part")

    def write(name, tensor):
        tensor = tensor.cpu().contiguous()
        expected, got = tensors[name], (tensor.dtype, tuple(tensor.shape))
        if got != expected:
            raise ValueError(f"{name}: got {got}, expected {expected} from the header")
        file.seek(offsets[name])
        if tensor.numel():  # its bytes where they lie: torch has no buffer interface of its own
            file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
        missing.remove(name)

    try:
        with open(part, "wb") as file:
            file.write(start)
            yield write
            if missing:
                raise ValueError(f"{path}: {len(missing)} tensors were never written, as {min(missing)}")
            file.truncate(size)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name with old bytes
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def convert(source, formats, out, method="search", made=None, lora=None, device="cpu"):
    """Writes `source` to the file `out` in the planned formats; `made`: header entries on how.

    lora  (file, names of the weights, rank): writes also a LoRA of the errors of these weights

    Returns {name: dB}, the signal-to-noise ratios of the quantised weights, and {name: share}, the part of
    the error's energy that the LoRA holds.
    """
    made = made or {}
    markers = {name.removesuffix(".weight"): marker(fmt, source.shapes[name], source.dtypes[name])
               for name, fmt in formats.items() if fmt != "bf16"}
    metadata = source.metadata | made | {
        "_quantization_metadata": json.dumps({"format_version": "1.0", "layers": markers})}
    lora_file, targets, rank = lora or (None, (), 0)
    quality, shares = {}, {}
    with ExitStack() as stack:
        if lora:
            write_lora = stack.enter_context(
                writing(lora_file, lora_layout(source.shapes, targets, rank), made | {"base": out.name}))
        write = stack.enter_context(writing(out, layout(source, formats), metadata))
        progress = stack.enter_context(_progress(source.bytes))
        for name in source.shapes:
            tensor, fmt, layer = source.tensor(name), formats.get(name, "bf16"), name.removesuffix(".weight")
            if fmt == "bf16":
                write(name, tensor)
            else:
                w = tensor.to(device)
                stored = quantize_weight(w, fmt, method=method)
                for suffix, part in stored.items():
                    write(f"{layer}.{suffix}", part)
                approximation = dequantize_weight(stored, w.shape)
                quality[name] = snr(w, approximation)
                if name in targets:
                    up, down, shares[name] = low_rank(w.float() - approximation, rank)
                    write_lora(f"diffusion_model.{layer}.lora_up.weight", up.bfloat16())
                    write_lora(f"diffusion_model.{layer}.lora_down.weight", down.bfloat16())
                    write_lora(f"diffusion_model.{layer}.alpha", torch.tensor(float(len(down))))
            progress.update(tensor.nbytes)
    return quality, shares


# ----------------------------------------------------------------------------------------------------
# Report
# ----------------------------------------------------------------------------------------------------

def _progress(total):
    return tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=None)  # None: a terminal


def _gib(size):
    return f"{size / 2 ** 30:.2f} GiB" if size >= 2 ** 28 else f"{size / 2 ** 20:.2f} MiB"


def plan_report(shapes, formats):
    """Lines: percent of the blocks per format and type of layer; norms count as bf16, in the total too."""
    counts = {}
    for name in shapes:
        if match := BLOCK_WEIGHT.fullmatch(name):
            kind = match[2] if name in formats else "norms"
            counts.setdefault(kind, dict.fromkeys(FORMATS, 0))[formats.get(name, "bf16")] += 1
    counts["total"] = {fmt: sum(row[fmt] for row in counts.values()) for fmt in FORMATS}
    yield f"{'percent of layers':17}" + "".join(f"{FORMATS[fmt]:>8}" for fmt in FORMATS)
    for kind, row in counts.items():
        yield f"{kind:17}" + "".join(f"{100 * row[fmt] / sum(row.values()):8.1f}" for fmt in FORMATS)
    extra = [f"{name}: {FORMATS[fmt]}" for name, fmt in formats.items() if not BLOCK_WEIGHT.fullmatch(name)]
    yield from sorted(extra)


def quality_report(quality, formats):
    """Lines: per type of layer and format the mean and the worst weight SNR."""
    groups = {}
    for name, decibel in quality.items():
        match = BLOCK_WEIGHT.fullmatch(name)
        groups.setdefault((match[2] if match else name, formats[name]), []).append((decibel, name))
    yield "weight SNR               layers  mean dB  worst dB"
    for (kind, fmt), values in sorted(groups.items()):
        mean, (worst, name) = sum(decibel for decibel, _ in values) / len(values), min(values)
        yield f"{kind:16} {FORMATS[fmt]:7} {len(values):6} {mean:8.2f} {worst:9.2f}  {name}"


def lora_report(shares, quality):
    """Lines: per type of layer the share of the error's energy, and the weight SNR without and with it."""
    groups = {}
    for name, share in shares.items():
        match = BLOCK_WEIGHT.fullmatch(name)
        groups.setdefault(match[2] if match else name, []).append((share, quality[name]))
    yield "LoRA              layers  % of error  mean dB alone  with it"
    for kind, values in sorted(groups.items()):
        share, alone = (sum(column) / len(values) for column in zip(*values))
        both = sum(db - 10 * math.log10(max(1 - share, 1e-12)) for share, db in values) / len(values)
        yield f"{kind:17} {len(values):6} {100 * share:11.1f} {alone:14.2f} {both:8.2f}"


# ----------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------

def _positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return number


def _parser():
    parser = argparse.ArgumentParser(
        "convert.py", usage="python convert.py -i MODEL [options]", allow_abbrev=False,
        description="A Wan2.1 checkpoint in bf16, fp16 or fp32 -> NVFP4 and MXFP8.",
        epilog="Flags as in convert_to_quant. A regex may match any part of a name: blocks.0.ffn.2.weight")
    add = parser.add_argument
    add("-i", "--input", required=True, type=Path, metavar="MODEL",
        help="a safetensors file, a shard index .json, or a folder of shards")
    add("-o", "--output", type=Path, metavar="OUT", help="default: MODEL-nvfp4.safetensors beside the input")
    base = parser.add_mutually_exclusive_group()
    for fmt in ("nvfp4", "mxfp8"):
        base.add_argument(f"--{fmt}", action="store_const", dest="base", const=fmt, default="nvfp4",
                          help=f"{FORMATS[fmt]} for every layer that no regex names; the default is NVFP4")
    add("--custom-layers", metavar="REGEX", help="layers that take --custom-type; wins over --exclude-layers")
    add("--custom-type", choices=FORMATS, help="format of --custom-layers")
    add("--exclude-layers", metavar="REGEX", help="layers that stay as they are")
    add("--plan", choices=("score", "recipe"), help="score: by kurtosis, dynamic range and aspect ratio of "
        "each weight; recipe: the published one for the 14B")
    add("--print-flags", action="store_true", help="print the plan as flags for convert_to_quant")
    add("--simple", action="store_true", help="round to nearest, without a search of block scales")
    add("--extract-lora", action="store_true", help="write a LoRA of the errors, to run beside the layers")
    add("--lora-rank", type=_positive, default=64, metavar="R", help="its rank (%(default)s)")
    add("--lora-target", metavar="REGEX", default=RECIPE_TARGET, help="its layers (%(default)s)")
    add("--lora-output", type=Path, metavar="FILE", help="default: OUT with _lora before .safetensors")
    add("--device", default="cpu", metavar="D", help="where to round: cpu, cuda, cuda:1 (%(default)s)")
    add("--dry-run", action="store_true", help="stop after the plan")
    for flag, why in (("--wan", "Wan is what this converts"), ("--comfy_quant", "the format it writes"),
                      ("--save-quant-metadata", "always in the header")):
        add(flag, action="store_true", help=f"accepted and always on: {why}")
    for flag, kind in (("--num-iter", _positive), ("--top-p", float), ("--calib-samples", _positive)):
        add(flag, type=kind, metavar="N", help="accepted: without calibration every scale is tried anyway")
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


def _run(args, command):
    begin = time.monotonic()
    source, out = Source(args.input), _output(args)
    _check_output(out, source.files)
    if bool(args.custom_layers) != bool(args.custom_type):
        raise Refusal("--custom-layers and --custom-type: give both or neither")
    if args.plan and (args.custom_layers or args.exclude_layers):
        raise Refusal(f"--plan {args.plan}: chooses the layers itself, without --custom- or --exclude-layers")
    formats = plan(source.shapes, args.base, args.custom_type, args.custom_layers, args.exclude_layers)
    if args.plan == "recipe":
        formats = plan(source.shapes, "nvfp4", "mxfp8", RECIPE_MXFP8, RECIPE_KEPT)
    elif args.plan == "score":
        names = tqdm(formats, desc="analysing", disable=None)
        formats = plan_by_score(score({name: sensitivity(source.tensor(name)) for name in names}))
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise Refusal(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    lora = None
    if not args.extract_lora and (args.lora_output or args.lora_target != RECIPE_TARGET):
        raise Refusal("--lora-target and --lora-output: need --extract-lora")
    if args.extract_lora:
        rounded = [name for name, fmt in formats.items() if fmt != "bf16"]
        lora = (args.lora_output or out.with_name(f"{out.stem}_lora.safetensors"),
                matching(args.lora_target, rounded, "--lora-target"), args.lora_rank)
        _check_output(lora[0], [*source.files, out])

    print("\n".join(plan_report(source.shapes, formats)))
    print(f"{_gib(source.bytes)} -> {_gib(header(layout(source, formats), {})[2])}")
    if lora:
        print(f"LoRA of rank {args.lora_rank} for {len(lora[1])} layers: "
              f"{_gib(header(lora_layout(source.shapes, *lora[1:]), {})[2])}")
    if args.print_flags:
        print(flags(formats))
    if args.dry_run:
        return
    made = {"quantization_command": command,
            "quantization_versions": f"torch {torch.__version__}, safetensors {safetensors.__version__}"}
    method = "rtn" if args.simple else "search"
    quality, shares = convert(source, formats, out, method, made, lora, args.device)
    print("", *quality_report(quality, formats), sep="\n")
    if lora:
        print("", *lora_report(shares, quality), f"{_gib(lora[0].stat().st_size)}: {lora[0]}", sep="\n")
    print(f"\n{_gib(source.bytes)} -> {_gib(out.stat().st_size)} in {time.monotonic() - begin:.1f} s: {out}")


def main(argv=None):
    """The command line: argv without the program's name, by default this process's own.

    Raises SystemExit(2) after one line on stderr for what it refuses.
    """
    argv = sys.argv[1:] if argv is None else [str(arg) for arg in argv]
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        _run(args, shlex.join(["convert.py", *argv]))
    except (Refusal, OSError) as error:
        parser.exit(2, f"convert.py: {error}\n")


if __name__ == "__main__":
    main()
