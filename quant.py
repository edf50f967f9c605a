"""NVFP4 and MXFP8: two number formats, and a Linear layer that multiplies in them.

NVFP4 is NVIDIA's 4-bit floating-point format: 16 neighboring weights share an 8-bit scale, and the matrix has
one more scale in float32. A weight takes 4.5 bits instead of bfloat16's 16, and Blackwell GPUs multiply such
matrices in their tensor cores. MXFP8 is its 8-bit relative: larger and more accurate. Use them like this:

    layer = QuantLinear.from_linear(linear, "nvfp4")  # linear: an nn.Linear
    y = layer(x)  # x: (..., in_features)

or by hand, from the tensors that a checkpoint stores:

    data, block_scale, tensor_scale = quantize_nvfp4(w)  # w: (out_features, in_features)
    w_again = dequantize_nvfp4(data, block_scale, tensor_scale, shape=w.shape)

This file needs only torch (2.11 or later) and can be copied elsewhere. What runs on a CPU is tested against
comfy-kitchen; the path through the tensor cores has not been run on a GPU yet, only checked without one.

NVFP4 in one equation
---------------------
    w = e2m1[code] * block_scale * tensor_scale

  code          4 bits for every weight, E2M1: sign, 2 exponent bits, 1 mantissa bit. The eight magnitudes are
                0, 0.5, 1, 1.5, 2, 3, 4, 6, and code = sign << 3 | index: code 5 is 3, code 13 is -3.
  block_scale   8 bits for every 16 consecutive weights of a row, E4M3: sign, 4 exponent bits (bias 7),
                3 mantissa bits. The largest value is 448; below 2**-6 the values are 2**-9 apart; 0x7F is NaN;
                there is no infinity (arXiv 2209.05433).
  tensor_scale  one float32 for the whole matrix. It brings the block scales into E4M3's range.

All three multiply. (Some libraries store 1 / scale instead.) A weight costs 4 + 8 / 16 = 4.5 bits. To quantize,
find the scales from the outside in, all in float32. amax is the largest absolute value:

    tensor_scale = amax(w) / (448 * 6)
    block_scale  = e4m3(min(amax(block) / 6 / tensor_scale, 448))
    code         = e2m1(clamp(w / (tensor_scale * block_scale), -6, 6))

e4m3 and e2m1 round to the nearest value; a tie takes the even code. The block scale maps the largest weight
of its block to about 6, the largest E2M1 value; the tensor scale maps the largest block scale to 448, the
largest E4M3 value. The min matters only if the caller passes a smaller tensor_scale; then blocks are clipped.
A block whose scale rounds to 0 gets codes 0. Where amax / 2688 is 0 in float32, tensor_scale is 1.

That is method="rtn", round to nearest. A block scale other than amax / 6 often has a smaller error: a little
less clips the largest weight, but rounds the others more finely. method="search" tries every scale that could be
best and keeps the one with the least squared error. The stored format is the same; the signal-to-noise ratio of a
typical weight matrix rises by 1.3 dB.

One block, worked
-----------------
A matrix with amax 672 has tensor_scale = 672 / 2688 = 0.25. In one of its blocks of 16, amax is 61.5:

    block_scale = e4m3(61.5 / 6 / 0.25) = e4m3(41) = 40, the byte 0x62 (0 1100 010: 2**(12 - 7) * 1.25)

and the block is divided by 0.25 * 40 = 10. Codes and bytes are printed in hexadecimal:

  w          38   -15     4     0 -61.5    25     9    -1    19   -31    47   -12    -3    13   -22   7.5
  w / 10    3.8  -1.5   0.4     0 -6.15   2.5   0.9  -0.1   1.9  -3.1   4.7  -1.2  -0.3   1.3  -2.2  0.75
  e2m1        4  -1.5   0.5     0    -6     2     1    -0     2    -3     4    -1  -0.5   1.5    -2     1
  code        6     B     1     0     F     4     2     8     4     D     6     A     9     3     C     2
  byte             6B          10          F4          28          4D          6A          93          C2
  back       40   -15     5     0   -60    20    10    -0    20   -30    40   -10    -5    15   -20    10

41 is between the E4M3 values 40 and 44 and was rounded down, so the largest weight is clipped: -6.15 becomes
-6. 2.5 and 0.75 are ties, halfway between two values: 2.5 goes down to code 4, and 0.75 up to code 2.

Two codes share a byte, and elements 0, 2, 4, ... of a row are in the HIGH nibbles: 6, then B, is 6B. torchao and
torch's own float4_e2m1fn_x2 put them in the low nibbles. A product needs both operands in the same order. This
file packs activations high nibble first, so a weight packed in the other order gives wrong results here, and
nothing in the bytes shows it: swap the nibbles (data << 4 | data >> 4) before you use such a weight.

MXFP8 and FP8
-------------
    MXFP8: w = e4m3[byte] * 2 ** (scale - 127)        FP8: w = e4m3[byte] * scale

MXFP8 has one E4M3 byte for every weight, and for every 32 consecutive weights of a row one byte that is a bare
exponent (E8M0): 8.25 bits a weight, and no tensor scale. To quantize,

    scale = clamp(ceil(log2(amax(block) / 448)) + 127, 0, 254)
    byte  = e4m3(clamp(w / 2 ** (scale - 127), -448, 448))

The exponent is rounded up so that the largest weight is not clipped (arXiv 2506.08027). Scale 0 reads as 0 here,
as in comfy-kitchen (in the OCP specification it is 2**-127). A block of zeros gets it, and bytes 0; so would
every block with amax <= 448 * 2**-127 (2.6e-36), where w / 0 is no number: plain_mxfp8 says what is stored. For
MXFP8, method="search" also tries the exponent below, which is rarely better. FP8 has one float32 scale for the
whole matrix, amax / 448, or one for each row; the weight may also be E5M2. E2M1, E4M3, E5M2 and E8M0 are
specified in OCP Microscaling Formats 1.0:
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf

What is stored
--------------
Names and layout are those of checkpoints of ComfyUI (https://github.com/comfyanonymous/ComfyUI), which marks a
quantized layer L by the tensor L.comfy_quant, the "marker": JSON such as {"format": "nvfp4"}, as uint8. A weight
is (M, K) = (out_features, in_features), padded with zeros to (Mp, Kp), multiples of B = 16 (NVFP4) or 32 (MXFP8).
A row has N = Kp / B blocks. M128 is Mp rounded up to a multiple of 128, N4 is N rounded up to a multiple of 4:

                of the layer L    NVFP4                         MXFP8                         FP8
  data          L.weight          uint8         (Mp, Kp / 2)    float8_e4m3fn (Mp, Kp)        float8_e4m3fn (M, K)
  block_scale   L.weight_scale    float8_e4m3fn (M128, N4)      uint8         (M128, N4)      float32 () or (M, 1)
  tensor_scale  L.weight_scale_2  float32       ()              none                          none
  format        L.comfy_quant     "nvfp4"                       "mxfp8"                       "float8_e4m3fn"

Optional: L.bias (M,), and for NVFP4 L.pre_quant_scale (K,), which multiplies x, and L.input_scale (), a fixed
tensor scale for x. On other formats an input_scale is ignored. "full_precision_matrix_mult": true in the marker
says that x must not be quantized.

Block scales are "swizzled": stored in the order in which the tensor cores read them. The matrix of scales is
padded to (M128, N4) and cut into tiles of 128 x 4. Each tile is 512 consecutive bytes, and the tiles follow one
another row by row. The scale of row r, block c is at

    tile   = (r // 128) * (N4 / 4) + c // 4
    offset = 512 * tile + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4

A 5120 x 5120 weight in NVFP4 has 5120 x 320 scales, so 80 tiles in a row of tiles. The scale of row 200,
block 9 is in tile 1 * 80 + 2 = 82, at offset 512 * 82 + 16 * 8 + 4 * 2 + 1 = 42121. The stored 2-D shape has the
right number of bytes, but its element [r, c] is not that scale, and nothing in the bytes shows whether scales are
swizzled. This layout is cuBLAS's:
https://docs.nvidia.com/cuda/cublas/index.html#d-block-scaling-factors-layout

How a product is made
---------------------
For y = x @ w.T on Blackwell, the activation x (R, K) is quantized too, by round to nearest, each time the layer
runs:

    y = torch._scaled_mm(x_data, w_data.T, x_block_scale, w_block_scale, out_dtype=torch.bfloat16)
    y = y * (x_tensor_scale * w_tensor_scale) + bias

with NVFP4 data viewed as float4_e2m1fn_x2, and MXFP8 scales as float8_e8m0fnu. The tensor scale of x is
amax(x) / 2688, or the layer's input_scale. K is padded with zeros to a multiple of 32. On other devices w is
dequantized for each call, and x is not quantized; or the arithmetic of the tensor cores is emulated.

The rounding of x usually costs more accuracy than that of w, which is done once and can be optimized. Where that
matters, an NVFP4 layer can take two passes. Q(x) is x quantized and dequantized:

    y = Q(x) @ w.T + Q(x - Q(x)) @ w.T

The second product restores most of what the first one lost; the layer takes twice as long. Both Q round to
nearest; the second one's tensor scale is a sixth of the first one's, because where nothing is clipped x - Q(x) is
at most half the step from 4 to 6, a sixth of the largest value.

In this file, in order: E2M1, swizzled scales, NVFP4, MXFP8 and FP8, scale search, what a checkpoint stores,
QuantLinear, the operands of the tensor cores, and finally what only makes it faster. plain_nvfp4 and plain_mxfp8
are the equations above, in torch.

The stored layout is comfy-kitchen's (https://github.com/Comfy-Org/comfy-kitchen), and method="rtn" is
bit-identical to its eager backend, version 0.2.40. comfy-kitchen and torchao both wrap a weight in a tensor
subclass that intercepts torch's operators, and bring their own kernels. Here a weight is two or three plain
tensors in an nn.Module, and torch has all the kernels; there is no training and no sharding.
"""
import functools
import json
import warnings
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

E2M1_MAX, E4M3_MAX = 6.0, 448.0
NVFP4_BLOCK, MXFP8_BLOCK = 16, 32
BLOCK = {"nvfp4": NVFP4_BLOCK, "mxfp8": MXFP8_BLOCK}
FORMAT_NAMES = {"nvfp4": "NVFP4", "mxfp8": "MXFP8", "float8_e4m3fn": "FP8", "float8_e5m2": "FP8 (E5M2)"}
MODES = ("tensor_cores", "dequantize", "emulate")


def round_up(n, multiple):
    return -(-n // multiple) * multiple


def pad_to(w, rows, cols):
    """Pad with zeros, below and to the right, to multiples of rows and cols."""
    padding = (0, -w.shape[1] % cols, 0, -w.shape[0] % rows)
    return F.pad(w, padding) if any(padding) else w


def crop(caller, w, shape, multiple):
    """w without its padding: (Mp, Kp) -> shape (M, K), or all of w if shape is None."""
    if shape is None:
        return w
    if tuple(round_up(n, multiple) for n in shape) != w.shape:
        raise ValueError(f"{caller}: got shape {tuple(shape)}, which does not pad to the stored "
                         f"{tuple(w.shape)}; pass this layer's (out_features, in_features)")
    return w[:shape[0], :shape[1]].contiguous()


def check_weight(caller, w, method="rtn"):
    """w, in float32 if it is float8, and its amax. Raises ValueError for a weight that cannot be quantized, or an
    unknown method."""
    if method not in ("rtn", "search"):
        raise ValueError(f"{caller}: got method {method!r}, expected 'rtn' (fast) or 'search' (more accurate)")
    if w.dim() != 2 or w.numel() == 0:
        raise ValueError(f"{caller}: got shape {tuple(w.shape)}, expected a non-empty (M, K); reshape it")
    if not w.is_floating_point():
        raise ValueError(f"{caller}: got {w.dtype}, expected a float dtype; dequantize or cast it first")
    w = w.float() if w.element_size() == 1 else w
    low, high = torch.aminmax(w)  # one pass, without a copy for |w|
    amax = torch.maximum(low.abs(), high.abs()).float()
    if not amax.is_meta and not amax.isfinite():
        raise ValueError(f"{caller}: got NaN, or values that are infinite in float32, expected finite values; "
                         f"check the source of the weight")
    return w, amax


def check_scale(where, scale, device):
    """A scale, a number or a tensor -> 0-d float32. Raises ValueError if it is not one positive number."""
    scale = torch.as_tensor(scale, dtype=torch.float32, device=device)
    if scale.numel() != 1 or not (scale.is_meta or 0 < scale.item() < float("inf")):
        got = scale.item() if scale.numel() == 1 else f"shape {tuple(scale.shape)}"
        raise ValueError(f"{where}: got {got}, expected one positive number; check how it was made")
    return scale.reshape(())


# ----------------------------------------------------------------------------------------------------
# E2M1: values <-> codes <-> bytes
# ----------------------------------------------------------------------------------------------------

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def encode_e2m1(x: Tensor) -> Tensor:
    """Float values -> uint8 codes 0..15: the nearest value, ties to the even code, clamped to -6..6.

    Code against magnitude is three straight lines: slope 2 up to 2, slope 1 up to 4, slope 1/2 up to 6. The
    lowest of the three is the code. torch.round takes ties to even, and both offsets are even.
    """
    a = x.abs().clamp_(max=E2M1_MAX)
    code = torch.minimum((a * 2).round_(), a.round().add_(2))
    code = torch.minimum(code, a.div_(2).round_().add_(4))
    sign = x.float().view(torch.int32) >> 28 & 8  # bit 31 to bit 3
    return code.to(torch.uint8) | sign.to(torch.uint8)


def decode_e2m1(codes: Tensor) -> Tensor:
    """uint8 codes 0..15 -> float32 values."""
    return torch.tensor(E2M1_VALUES, dtype=torch.float32, device=codes.device)[codes.int()]


def pack_e2m1(codes: Tensor) -> Tensor:
    """uint8 codes (..., K) -> bytes (..., K / 2). The even element goes to the high nibble."""
    return torch.add(codes[..., 1::2], codes[..., ::2], alpha=16)


def unpack_e2m1(data: Tensor) -> Tensor:
    """Bytes (..., K / 2) -> uint8 codes (..., K)."""
    return torch.stack((data >> 4, data & 15), dim=-1).flatten(-2)


# ----------------------------------------------------------------------------------------------------
# Swizzled scales
# ----------------------------------------------------------------------------------------------------

def swizzle(scale: Tensor) -> Tensor:
    """2-D scales (R, C) of any dtype -> (R128, C4) in the tensor cores' order, padded with zeros."""
    if scale.dim() != 2:
        raise ValueError(f"swizzle: got shape {tuple(scale.shape)}, expected 2-D (rows, blocks in a row); "
                         f"reshape the scales")
    raw = scale.view(torch.uint8) if scale.element_size() == 1 else scale  # torch cannot pad every float8
    raw = pad_to(raw, 128, 4)  # (R128, C4)
    rows, cols = raw.shape
    tiles = raw.reshape(rows // 128, 4, 32, cols // 4, 4).permute(0, 3, 2, 1, 4)  # tile row, column, 32, 4, 4
    return tiles.reshape(rows, cols).view(scale.dtype)


def unswizzle(scale: Tensor, rows: int, cols: int) -> Tensor:
    """The inverse of swizzle: stored scales, 2-D or flat -> (rows, cols), with the padding dropped."""
    rows128, cols4 = round_up(rows, 128), round_up(cols, 4)
    if scale.numel() != rows128 * cols4:
        raise ValueError(f"unswizzle: got {tuple(scale.shape)}, expected {(rows128, cols4)} for {rows} x {cols} "
                         f"scales; pass this layer's scales, as stored")
    raw = scale.view(torch.uint8) if scale.element_size() == 1 else scale
    tiles = raw.reshape(rows128 // 128, cols4 // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)  # row, 4, 32, column, 4
    return tiles.reshape(rows128, cols4)[:rows, :cols].view(scale.dtype)


# ----------------------------------------------------------------------------------------------------
# NVFP4
# ----------------------------------------------------------------------------------------------------

def plain_nvfp4(w, tensor_scale=None, method="rtn"):
    """The three equations: padded w (Mp, Kp) -> data (Mp, Kp/2), block_scale (Mp, N), tensor_scale ().

    Rows are independent of one another once tensor_scale is given, so quantize_nvfp4 calls this on a few rows
    at a time (by_rows).
    """
    blocks = w.float().unflatten(1, (-1, NVFP4_BLOCK))  # (Mp, N, 16)
    amax = blocks.abs().amax(-1)  # (Mp, N)
    if tensor_scale is None:
        tensor_scale = nvfp4_tensor_scale(amax.amax(1).max())  # by rows first: faster if compiled
    block_scale = (amax / E2M1_MAX / tensor_scale).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)  # (Mp, N)
    if method == "search":
        block_scale = search_nvfp4(blocks, amax, tensor_scale, block_scale)  # (Mp, N)
    codes = encode_nvfp4(blocks, tensor_scale * block_scale.float())  # (Mp, N, 16)
    return pack_e2m1(codes).flatten(1), block_scale, tensor_scale


def nvfp4_tensor_scale(amax):
    """amax / (448 * 6), or 1 where that is 0 in float32: a scale of 0 would give 0 / 0."""
    tensor_scale = amax / (E4M3_MAX * E2M1_MAX)
    return torch.where(tensor_scale == 0, 1.0, tensor_scale)


def encode_nvfp4(x: Tensor, scale: Tensor) -> Tensor:
    """Blocks x (Mp, N, 16) float32, scale (Mp, N) = tensor_scale * block_scale -> E2M1 codes (Mp, N, 16)."""
    codes = encode_e2m1(x / scale[..., None])
    return codes.mul_((scale != 0)[..., None])  # a block whose scale is 0 gets codes 0, not those of x / 0


def decode_nvfp4(data: Tensor, scale: Tensor) -> Tensor:
    """data (Mp, Kp/2), scale (Mp, N) = tensor_scale * block_scale -> float32 (Mp, Kp)."""
    values = decode_e2m1(unpack_e2m1(data)).unflatten(1, (-1, NVFP4_BLOCK))  # (Mp, N, 16)
    return (values * scale[..., None]).flatten(1)


def round_nvfp4(x, scale):
    """x quantized and dequantized: blocks x (Mp, N, 16) float32 >= 0, scale (Mp, N) -> (Mp, N, 16)."""
    scale = scale[..., None]
    return round_e2m1(x / scale.clamp(min=2.0 ** -149)).mul_(scale)  # a scale of 0 gives 0, not 0 / 0


@torch.no_grad()
def quantize_nvfp4(w: Tensor, tensor_scale: Tensor | float | None = None, *,
                   method: str = "rtn") -> tuple[Tensor, Tensor, Tensor]:
    """Weight (M, K) of any float dtype -> data, block_scale (swizzled), tensor_scale.

    tensor_scale  a positive number; by default amax / (448 * 6), or 1 where that is 0 in float32
    method        "rtn": the block scale follows from the block's amax. "search": the block scale of least
                  squared error, about 8 times slower

    Raises ValueError if w is not 2-D, not floating-point, empty or not finite, and for a bad scale or method.
    """
    w, amax = check_weight("quantize_nvfp4", w, method)
    if tensor_scale is None:
        tensor_scale = nvfp4_tensor_scale(amax)
    else:
        tensor_scale = check_scale("quantize_nvfp4: tensor_scale", tensor_scale, w.device)
    w = pad_to(w, NVFP4_BLOCK, NVFP4_BLOCK)  # (Mp, Kp)
    data, block_scale = by_rows(plain_nvfp4, w, tensor_scale, method)  # (Mp, Kp/2), (Mp, N)
    return data, swizzle(block_scale), tensor_scale


@torch.no_grad()
def dequantize_nvfp4(data: Tensor, block_scale: Tensor, tensor_scale: Tensor | float,
                     shape: tuple[int, int] | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of quantize_nvfp4: stored tensors -> the weight in dtype, computed in float32.

    block_scale is float8_e4m3fn, or its bytes as uint8. shape (M, K) crops the padding; by default the padded
    weight is returned. Raises ValueError for wrong dtypes, and if the parts do not fit together.
    """
    if data.dim() != 2 or data.dtype != torch.uint8 or data.shape[1] % 8:
        raise ValueError(f"dequantize_nvfp4: got data {data.dtype} {tuple(data.shape)}, expected uint8 (Mp, "
                         f"Kp / 2), Kp a multiple of 16; use dequantize_mxfp8 for MXFP8; view float4_e2m1fn_x2 "
                         f"as uint8 and swap the nibbles (data << 4 | data >> 4)")
    if block_scale.dtype not in (torch.float8_e4m3fn, torch.uint8):
        raise ValueError(f"dequantize_nvfp4: got block_scale {block_scale.dtype}, expected float8_e4m3fn, "
                         f"swizzled; do not cast stored scales")
    rows, cols = data.shape[0], data.shape[1] * 2
    tensor_scale = torch.as_tensor(tensor_scale, dtype=torch.float32, device=data.device)
    if tensor_scale.numel() != 1:
        raise ValueError(f"dequantize_nvfp4: got tensor_scale {tuple(tensor_scale.shape)}, expected one number; "
                         f"pass the weight_scale_2 that belongs to the weight")
    block_scale = unswizzle(block_scale.view(torch.float8_e4m3fn), rows, cols // NVFP4_BLOCK)  # (Mp, N)
    w = decode_by_rows(data, tensor_scale.reshape(()) * block_scale.float(), dtype)  # (Mp, Kp)
    return crop("dequantize_nvfp4", w, shape, NVFP4_BLOCK)


# ----------------------------------------------------------------------------------------------------
# MXFP8 and FP8
# ----------------------------------------------------------------------------------------------------

def plain_mxfp8(w, method="rtn", zeros_up_to=0.0):
    """MXFP8's equations, in float32: padded w (Mp, Kp) -> data (Mp, Kp), block_scale (Mp, N).

    A block with amax <= zeros_up_to is stored as zeros. quantize_mxfp8 leaves this at 0, for comfy-kitchen's
    bits: in a block with 0 < amax <= 448 * 2**-127, zeros become NaN, and other values +-448, which read as 0.
    """
    blocks = w.float().unflatten(1, (-1, MXFP8_BLOCK))  # (Mp, N, 32)
    amax = blocks.abs().amax(-1)  # (Mp, N)
    exponent = torch.log2((amax / E4M3_MAX).clamp(min=2.0 ** -127)).ceil()
    block_scale = (exponent + 127).clamp(0, 254).to(torch.uint8)  # (Mp, N)
    if method == "search":
        block_scale = search_mxfp8(blocks, amax, block_scale)  # (Mp, N)
    data = encode_mxfp8(blocks, decode_e8m0(block_scale)).view(torch.uint8)  # (Mp, N, 32)
    data.mul_(~(amax <= zeros_up_to)[..., None])  # not amax > zeros_up_to: NaN in w stays
    return data.view(torch.float8_e4m3fn).flatten(1), block_scale


def encode_mxfp8(x: Tensor, scale: Tensor) -> Tensor:
    """Blocks x (Mp, N, 32) float32, scale (Mp, N) float32 -> float8_e4m3fn (Mp, N, 32), clamped to +-448."""
    return (x / scale[..., None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def decode_e8m0(byte):
    """E8M0 bytes -> float32. A byte is a float32's exponent field; byte 0 reads as 0, as in comfy-kitchen."""
    return (byte.view(torch.uint8).int() << 23).view(torch.float32)


def decode_mxfp8(data: Tensor, scale: Tensor) -> Tensor:
    """data (Mp, Kp) float8_e4m3fn, scale (Mp, N) float32 -> float32 (Mp, Kp)."""
    return (data.float().unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)


@torch.no_grad()
def quantize_mxfp8(w: Tensor, *, method: str = "rtn") -> tuple[Tensor, Tensor]:
    """Weight (M, K) of any float dtype -> data, block_scale (swizzled).

    method  "rtn": the exponent follows from the block's amax, with comfy-kitchen's NaN for the tiniest blocks
            (plain_mxfp8). "search": the exponent of least squared error in each block; no NaN.

    Raises ValueError if w is not 2-D, not floating-point, empty or not finite, and for an unknown method.
    """
    w, _ = check_weight("quantize_mxfp8", w, method)
    data, block_scale = by_rows(plain_mxfp8, pad_to(w, MXFP8_BLOCK, MXFP8_BLOCK), method)  # (Mp, Kp), (Mp, N)
    return data, swizzle(block_scale)


@torch.no_grad()
def dequantize_mxfp8(data: Tensor, block_scale: Tensor, shape: tuple[int, int] | None = None,
                     dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of quantize_mxfp8: stored tensors -> the weight in dtype, computed in float32.

    block_scale is uint8 or float8_e8m0fnu. shape (M, K) crops the padding; by default the padded weight is
    returned. Raises ValueError for wrong dtypes, and if the parts do not fit together.
    """
    if data.dim() != 2 or data.dtype != torch.float8_e4m3fn or data.shape[1] % MXFP8_BLOCK:
        raise ValueError(f"dequantize_mxfp8: got data {data.dtype} {tuple(data.shape)}, expected float8_e4m3fn "
                         f"(Mp, Kp), Kp a multiple of 32; use dequantize_nvfp4 for NVFP4")
    if block_scale.dtype not in (torch.uint8, torch.float8_e8m0fnu):
        raise ValueError(f"dequantize_mxfp8: got block_scale {block_scale.dtype}, expected uint8, swizzled; "
                         f"do not cast stored scales")
    rows, cols = data.shape
    scale = decode_e8m0(unswizzle(block_scale, rows, cols // MXFP8_BLOCK))  # (Mp, N)
    return crop("dequantize_mxfp8", decode_by_rows(data, scale, dtype), shape, MXFP8_BLOCK)


@torch.no_grad()
def quantize_fp8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (M, K) of any float dtype -> data float8_e4m3fn (M, K) and one float32 scale: amax / 448, or 1 for
    zeros. Raises ValueError if w is not 2-D, not floating-point, empty or not finite."""
    w, amax = check_weight("quantize_fp8", w)
    scale = amax / E4M3_MAX
    scale = torch.where(scale == 0, 1.0, scale)
    return (w.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


# ----------------------------------------------------------------------------------------------------
# Scale search: method="search"
# ----------------------------------------------------------------------------------------------------

def lowest_error(x, candidates, reconstruct):
    """For each block, the candidate scale byte that reconstructs x (Mp, N, B) best. Each candidate is (Mp, N)."""
    def squared_error(byte):
        # In float64, so that candidates compare as in exact arithmetic, however small the weights are.
        return (x - reconstruct(byte)).double().square_().sum(-1)  # (Mp, N)

    best = candidates[0]
    lowest = squared_error(best)
    for byte in candidates[1:]:
        error = squared_error(byte)
        best = torch.where(error < lowest, byte, best)  # in a tie, the first candidate wins
        lowest = torch.minimum(error, lowest)
    return best


def search_nvfp4(x, amax, tensor_scale, rtn):
    """The E4M3 block scale of least squared error: x (Mp, N, 16), amax and rtn (Mp, N) -> (Mp, N).

    Compared are rtn and the sixteen consecutive E4M3 values from amax / 8 / tensor_scale up. Smaller scales
    clip too much, and larger ones have coarser steps than they need. The tests compare with all 126 scales.
    """
    x = x.abs()

    def reconstruct(byte):
        return round_nvfp4(x, tensor_scale * byte.view(torch.float8_e4m3fn).float())

    first = (amax / 8 / tensor_scale).clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    candidates = [rtn.view(torch.uint8)] + [(first + i).clamp_(1, 126) for i in range(16)]  # byte 126 is 448
    return lowest_error(x, candidates, reconstruct).view(torch.float8_e4m3fn)


def search_mxfp8(x, amax, rtn):
    """The exponent of least squared error: x (Mp, N, 32), amax and rtn (Mp, N) -> (Mp, N).

    Only rtn - 1 can be better, and rarely is: it clips the largest values, and only values below 2**-6 of the
    scale get finer steps. At rtn + 1 no new value comes into range; rtn - 2 cuts the largest weight to less than
    half. Byte 0, read as 0, is for blocks of zeros.
    """
    def reconstruct(byte):
        scale = decode_e8m0(byte)
        return encode_mxfp8(x, scale).float() * scale[..., None]

    return lowest_error(x, [rtn.clamp(min=1), rtn.clamp(min=2) - 1], reconstruct) * (amax != 0)


# ----------------------------------------------------------------------------------------------------
# What a checkpoint stores for a layer
# ----------------------------------------------------------------------------------------------------

def write_marker(info: dict) -> Tensor:
    """A dict such as {"format": "nvfp4"} -> the uint8 tensor that a checkpoint stores as L.comfy_quant."""
    return torch.tensor(list(json.dumps(info).encode()), dtype=torch.uint8, device="cpu")


def read_marker(marker: Tensor, name: str = "comfy_quant") -> dict:
    """The inverse of write_marker. Raises ValueError, naming `name`, for bad JSON and unknown formats."""
    if marker.dtype != torch.uint8:
        raise ValueError(f"{name}: got {marker.dtype}, expected uint8; do not cast stored tensors")
    try:
        text = bytes(marker.flatten().tolist())
        info = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f'{name}: got bytes that are not JSON ({error}), expected {{"format": ...}}; '
                         f'the file is damaged: download it again') from None
    if not isinstance(info, dict) or info.get("format") not in list(FORMAT_NAMES):
        raise ValueError(f"{name}: got {text[:100]}, expected a format out of {', '.join(FORMAT_NAMES)}; "
                         f"convert the layer to one of these")
    return info


def stored_tensors(fmt: str | None, in_features: int, out_features: int) -> tuple[dict, dict]:
    """The tensors that a layer of this format must store, and may store: {suffix: (dtypes, shape, advice)}.

    The first of dtypes is the usual one; None stands for any float dtype. The advice is for a wrong shape.
    fmt is a key of FORMAT_NAMES, or None for a plain layer.
    """
    advice = "check that the file is for this model and its size"
    number = ((torch.float32,), (), "it must be one number, or of FP8 one for each row")
    optional = {"bias": (None, (out_features,), advice)}
    if fmt is None:
        return {"weight": (None, (out_features, in_features), advice)}, optional
    optional["input_scale"] = number
    if fmt not in BLOCK:  # FP8
        weight = ((getattr(torch, fmt),), (out_features, in_features), advice)
        return {"weight": weight, "weight_scale": number}, optional
    rows, cols = round_up(out_features, BLOCK[fmt]), round_up(in_features, BLOCK[fmt])
    scale_shape = (round_up(rows, 128), round_up(cols // BLOCK[fmt], 4))
    scale_advice = "the scales must be padded and swizzled"
    if fmt == "nvfp4":
        return {"weight": ((torch.uint8,), (rows, cols // 2), advice),
                "weight_scale": ((torch.float8_e4m3fn, torch.uint8), scale_shape, scale_advice),
                "weight_scale_2": number}, optional | {"pre_quant_scale": (None, (in_features,), advice)}
    return {"weight": ((torch.float8_e4m3fn,), (rows, cols), advice),
            "weight_scale": ((torch.uint8, torch.float8_e8m0fnu), scale_shape, scale_advice)}, optional


def check_stored(name, tensors, fmt, in_features, out_features):
    """Raises ValueError unless these are the tensors of such a layer."""
    required, optional = stored_tensors(fmt, in_features, out_features)
    kind = FORMAT_NAMES.get(fmt, "plain, without a comfy_quant marker")
    for suffix in required:
        if suffix not in tensors:
            raise ValueError(f"{name}.{suffix}: got no such tensor, but {', '.join(sorted(tensors)) or 'none'}; "
                             f"expected {', '.join(required)}, as the layer is {kind}; check that the file is "
                             f"complete, and that keys are suffixes such as weight, not full names")
    for suffix, tensor in tensors.items():
        if suffix not in required | optional:
            why = ", and ComfyUI applies it to NVFP4 only" if suffix == "pre_quant_scale" else ""
            raise ValueError(f"{name}.{suffix}: got a tensor, expected none, as the layer is {kind}{why}; "
                             f"check how the file was made")
        dtypes, shape, advice = (required | optional)[suffix]
        if not (tensor.is_floating_point() if dtypes is None else tensor.dtype in dtypes):
            expected = " or ".join(map(str, dtypes)) if dtypes else "a float dtype"
            advice = "quantized layers need a comfy_quant marker" if fmt is None else "do not cast stored tensors"
            raise ValueError(f"{name}.{suffix}: got {tensor.dtype}, expected {expected}, as the layer is {kind}; "
                             f"{advice}")
        one_per_row = suffix == "weight_scale" and fmt not in BLOCK and tuple(tensor.shape) == (out_features, 1)
        if tuple(tensor.shape) != shape and not (shape == () and tensor.numel() == 1) and not one_per_row:
            raise ValueError(f"{name}.{suffix}: got {tuple(tensor.shape)}, expected {shape}; {advice}")


# ----------------------------------------------------------------------------------------------------
# The Linear layer
# ----------------------------------------------------------------------------------------------------

def capability(device: torch.device | str) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU: (10, 0) for sm_100. (0, 0) for any other device."""
    device = torch.device(device)
    nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if nvidia else (0, 0)


def default_mode(device: torch.device | str) -> str:
    """"tensor_cores" on an NVIDIA GPU of sm_100 or later, else "dequantize"."""
    return "tensor_cores" if capability(device) >= (10, 0) else "dequantize"


def default_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype in which a device multiplies: float32 on a CPU; float16 on NVIDIA GPUs before sm_80, which do not
    multiply in bfloat16; bfloat16 elsewhere."""
    if torch.device(device).type == "cpu":
        return torch.float32
    return torch.float16 if (0, 0) < capability(device) < (8, 0) else torch.bfloat16


class QuantLinear(nn.Module):
    """y = x @ W.T + bias, with W kept as the checkpoint stores it: NVFP4, MXFP8, FP8 or plain.

    Make one with from_linear or from_tensors. It multiplies in one of three modes:
      tensor_cores  quantize x on the fly, and multiply by torch._scaled_mm (sm_100 and later)
      dequantize    dequantize W for this call, and multiply in compute_dtype
      emulate       compute what tensor_cores computes, except that the product is not rounded to bfloat16, on any
                    device: quantize and dequantize x, dequantize W, multiply in float32
    FP8 layers, plain layers and those whose marker says "full_precision_matrix_mult" always use "dequantize".
    If two_pass is true, an NVFP4 layer multiplies by Q(x), then by x - Q(x).

    x has any float dtype and any leading dimensions; y has x's dtype. A dequantized copy of W is freed after each
    call. Gradients pass to x in "dequantize" only. .to(device) moves the layer and chooses mode and compute_dtype
    again, unless they were given. .to(dtype) and .half() change nothing: what is stored must not be cast.
    """

    def __init__(self, stored, fmt, in_features, out_features, compute_dtype=None, mode=None, two_pass=False):
        """Called by from_tensors, with checked tensors."""
        super().__init__()
        self.in_features, self.out_features, self.format, self.two_pass = in_features, out_features, fmt, two_pass
        self.weight = nn.Parameter(stored["weight"], requires_grad=False)
        self.bias = nn.Parameter(stored["bias"], requires_grad=False) if "bias" in stored else None
        for suffix in ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "comfy_quant"):
            self.register_buffer(suffix, stored.get(suffix))
        self.given = compute_dtype, mode
        self.lora_scales = []
        self.choose()

    def choose(self):
        """Take the given mode and compute dtype, or else those of the weight's device."""
        compute_dtype, mode = self.given
        self.compute_dtype = compute_dtype or default_dtype(self.weight.device)
        self.mode = mode or default_mode(self.weight.device)

    @classmethod
    def from_tensors(cls, name: str, tensors: dict[str, Tensor], in_features: int, out_features: int,
                     bias: bool | None = None, compute_dtype: torch.dtype | None = None,
                     mode: str | None = None, two_pass: bool = False) -> "QuantLinear":
        """Make a layer from its stored tensors. They may be memory-mapped, and are not copied.

        name      the layer's name, for messages: "blocks.3.ffn.0"
        tensors   {suffix: tensor}: weight, bias, weight_scale, comfy_quant, ... The names scale_weight and
                  scale_input of older FP8 files are read as weight_scale and input_scale
        bias      True: required; False: forbidden; None: optional
        compute_dtype, mode   by default, those of the weight's device
        two_pass  quantize x in two passes; has no effect on formats other than NVFP4, and in mode "dequantize"

        Raises ValueError for missing or unexpected tensors, wrong shapes or dtypes, an unknown format or mode.
        """
        older = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
        tensors = {older.get(suffix, suffix): tensor for suffix, tensor in tensors.items() if tensor is not None}
        marker = tensors.pop("comfy_quant", None)
        info = {} if marker is None else read_marker(marker, f"{name}.comfy_quant")
        fmt, weight = info.get("format"), tensors.get("weight")
        if marker is None and "weight_scale" in tensors and weight is not None:  # FP8 needs no marker
            fmt = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}.get(weight.dtype)
        check_stored(name, tensors, fmt, in_features, out_features)
        for suffix in {"weight_scale_2", "input_scale"} & tensors.keys():
            check_scale(f"{name}.{suffix}", tensors[suffix], tensors[suffix].device)
        if bias is not None and bias != ("bias" in tensors):
            got, expected = ("nothing", "a tensor") if bias else ("a tensor", "none")
            raise ValueError(f"{name}.bias: got {got}, expected {expected}; check the file's model")
        if mode not in (None, *MODES):
            raise ValueError(f"{name}: got mode {mode!r}, expected one of {', '.join(MODES)}")
        if not (compute_dtype is None or isinstance(compute_dtype, torch.dtype) and compute_dtype.itemsize > 1):
            raise ValueError(f"{name}: got compute_dtype {compute_dtype!r}, expected one such as torch.bfloat16")
        if fmt not in BLOCK or info.get("full_precision_matrix_mult", False):
            mode = "dequantize"
        if fmt == "nvfp4":
            tensors["weight_scale"] = tensors["weight_scale"].view(torch.float8_e4m3fn)
        if marker is not None:
            tensors["comfy_quant"] = marker
        return cls(tensors, fmt, in_features, out_features, compute_dtype, mode, two_pass and fmt == "nvfp4")

    @classmethod
    def from_linear(cls, linear: nn.Linear, fmt: str, *, method: str = "rtn", **options) -> "QuantLinear":
        """Quantize an nn.Linear to "nvfp4" or "mxfp8". options: compute_dtype, mode and two_pass of from_tensors.
        Raises ValueError for another format, and as quantize_nvfp4 does."""
        if fmt not in BLOCK:
            raise ValueError(f"from_linear: got format {fmt!r}, expected one of {', '.join(BLOCK)}")
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"from_linear: got {type(linear).__name__}, expected nn.Linear; give the layer to "
                             f"be quantized")
        quantize = quantize_nvfp4 if fmt == "nvfp4" else quantize_mxfp8
        stored = dict(zip(("weight", "weight_scale", "weight_scale_2"), quantize(linear.weight, method=method)))
        stored |= {"bias": linear.bias, "comfy_quant": write_marker({"format": fmt})}
        return cls.from_tensors("from_linear", stored, linear.in_features, linear.out_features, **options)

    def attach_lora(self, up: Tensor, down: Tensor, scale: float = 1.0, name: str = "attach_lora"):
        """Add the side branch y += scale * (x @ down.T) @ up.T. A layer can have any number of them.

        up (M, r) and down (r, K) are usually bfloat16; scale = strength * alpha / r. The branch sees x before
        pre_quant_scale, as in training (arXiv 2106.09685), and is not part of state_dict.
        Raises ValueError, naming `name`, if the shapes do not fit.
        """
        expected = (self.out_features, down.shape[0]), (up.shape[-1], self.in_features)
        if (tuple(up.shape), tuple(down.shape)) != expected:
            raise ValueError(f"{name}: got up {tuple(up.shape)} and down {tuple(down.shape)}, expected "
                             f"({self.out_features}, r) and (r, {self.in_features}); check their order, and that "
                             f"the LoRA is for a model of this size")
        self.register_buffer(f"lora_up_{len(self.lora_scales)}", up, persistent=False)
        self.register_buffer(f"lora_down_{len(self.lora_scales)}", down, persistent=False)
        self.lora_scales.append(scale)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """W (M, K) in dtype."""
        shape = (self.out_features, self.in_features)
        if self.format == "nvfp4":
            return dequantize_nvfp4(self.weight, self.weight_scale, self.weight_scale_2, shape, dtype)
        if self.format == "mxfp8":
            return dequantize_mxfp8(self.weight, self.weight_scale, shape, dtype)
        if self.format is None:
            return self.weight.to(dtype)
        return decode_by_rows(self.weight, self.weight_scale.reshape(-1, 1).expand(self.out_features, 1), dtype)

    def forward(self, x: Tensor, quantized: dict | None = None) -> Tensor:
        """x (..., K) -> y (..., M). `quantized` is the cache of quantized x that the layers of project share.
        Raises ValueError for another K, and for an x that is not floating-point."""
        if x.shape[-1] != self.in_features or not x.is_floating_point():
            raise ValueError(f"QuantLinear: got x {x.dtype} {tuple(x.shape)}, expected a float dtype and "
                             f"(..., {self.in_features}); this layer is {self.extra_repr()}")
        flat = x.reshape(-1, self.in_features)  # (R, K)
        scaled = flat if self.pre_quant_scale is None else flat * self.pre_quant_scale  # (R, K)
        dtype = torch.float32 if self.mode == "emulate" else self.compute_dtype
        if self.mode == "tensor_cores" and len(flat):
            first, *second = self.quantize_input(scaled, quantized)
            y = multiply(first, self, self.bias, dtype)  # (R, M)
            for rest in second:  # only with two_pass
                y += multiply(rest, self, None, dtype)  # (R, M)
        else:
            if self.mode == "emulate" and len(flat):
                scaled = dequantize_activation(self.quantize_input(scaled, quantized), scaled.shape)  # (R, K)
            bias = None if self.bias is None else self.bias.to(dtype)
            y = linear(scaled.to(dtype), self.dequantized(dtype), bias)  # (R, M)
        for i, scale in enumerate(self.lora_scales):
            up, down = getattr(self, f"lora_up_{i}").to(dtype), getattr(self, f"lora_down_{i}").to(dtype)
            low = linear(flat.to(dtype), down)  # (R, r)
            y.addmm_(low.to(y.dtype), up.t().to(y.dtype), alpha=scale)  # (R, M), without another one in memory
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def quantize_input(self, x: Tensor, quantized: dict | None):
        """quantize_activation of x (R, K), cached in `quantized` unless this layer has its own scale for x."""
        if quantized is None or self.input_scale is not None or self.pre_quant_scale is not None:
            return quantize_activation(x, self)
        kind = self.format, self.two_pass
        if kind not in quantized:
            quantized[kind] = quantize_activation(x, self)
        return quantized[kind]

    def _apply(self, fn, recurse=True):
        # float8 is a floating-point dtype too, so .half() would cast it. An empty tensor shows what fn would do.
        def move(tensor):
            probe = fn(tensor.new_empty(0))
            return fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)
        super()._apply(move, recurse)
        self.choose()
        return self

    def kind(self) -> str:
        """The layer's format as printed: "NVFP4", or the dtype of a plain layer."""
        return FORMAT_NAMES.get(self.format, str(self.weight.dtype).removeprefix("torch."))

    def how(self) -> str:
        """How the layer multiplies, as printed: "tensor_cores, two passes"."""
        return self.mode + (", two passes" if self.two_pass and self.mode != "dequantize" else "")

    def extra_repr(self):
        lora = f", {len(self.lora_scales)} LoRA" if self.lora_scales else ""
        return f"{self.in_features} -> {self.out_features}, {self.kind()}, {self.how()}{lora}"


def project(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """[layer(x) for layer in layers], such as q, k and v. Layers of the same format share one quantized x."""
    quantized = {}
    return [layer(x, quantized) if isinstance(layer, QuantLinear) else layer(x) for layer in layers]


def describe(model: nn.Module) -> str:
    """One line on the Linear layers of a model: "NVFP4 427 layers (tensor cores), bfloat16 34 layers"."""
    counts = Counter()
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            how = f" ({layer.how().replace('_', ' ')})" if layer.format else ""
            counts[layer.kind(), how] += 1
        elif isinstance(layer, nn.Linear):
            counts[str(layer.weight.dtype).removeprefix("torch."), ""] += 1
    return ", ".join(f"{kind} {n} layers{how}" for (kind, how), n in counts.most_common())


# ----------------------------------------------------------------------------------------------------
# The operands of torch._scaled_mm. Separate from forward, so that they can be tested without a GPU.
# ----------------------------------------------------------------------------------------------------

def compiled_on_cuda(function):
    """A decorator for elementwise functions: on CUDA, torch.compile fuses their passes over memory.

    The first argument must be a tensor. The function runs uncompiled on other devices, inside a larger compiled
    graph, where gradients are needed, because a compiled function can propagate them only once, and, with a
    warning, where Triton is missing.
    """
    @functools.wraps(function)
    def run(x, *arguments):
        if not x.is_cuda or x.requires_grad or torch.compiler.is_compiling() or not has_compiler():
            return function(x, *arguments)
        return compiled(function)(x, *arguments)
    return run


@functools.cache
def has_compiler():
    from torch.utils._triton import has_triton
    if not has_triton():
        warnings.warn("elementwise functions run step by step, which is slow: torch.compile needs Triton and a C "
                      "compiler (on Windows: pip install triton-windows)")
    return has_triton()


# division_rounding gives the bits of the plain form. The thresholds keep the quantizer's unpacked codes out of
# memory: each is computed where it is packed, although the packing reads the codes twice.
COMPILER_OPTIONS = {"eager_numerics.division_rounding": True,
                    "realize_reads_threshold": 1000, "realize_opcount_threshold": 1000}


@functools.cache
def compiled(function):
    """The function, compiled once for each number of columns K of its tensors (..., R, K), whatever R is."""
    program = torch.compile(function, options=COMPILER_OPTIONS)

    def run(x, *arguments):
        for tensor in (x, *arguments):
            if isinstance(tensor, Tensor) and tensor.shape[-2:-1] == x.shape[-2:-1]:
                torch._dynamo.maybe_mark_dynamic(tensor, tensor.dim() - 2)
                torch._dynamo.mark_static(tensor, tensor.dim() - 1)  # else each element costs integer divisions
        return program(x, *arguments)
    return run


@torch.no_grad()
def quantize_activation(x: Tensor, layer: QuantLinear) -> list[tuple]:
    """Activation (R, K) -> [(data, block_scale (swizzled), tensor_scale (None for MXFP8))] in the layer's format.
    With two_pass, a second tuple holds x - Q(x).

    There is no check for NaN, which would wait for the GPU: NaN in x makes its row of y NaN or, for NVFP4 without
    input_scale, all of y.
    """
    x = pad_to(x, 1, 32)  # (R, K32), for NVFP4 too: torch._scaled_mm wants rows of a multiple of 16 bytes
    passes = quantize_rows(x, layer.format, layer.input_scale, layer.two_pass)
    return [(data, swizzle(block_scale), tensor_scale) for data, block_scale, tensor_scale in passes]


@compiled_on_cuda
def quantize_rows(x, fmt, tensor_scale, two_pass):
    """quantize_activation for an x whose columns are padded, with the scales not swizzled yet.

    Memory traffic with the swizzle, in multiples of x's bytes (bench/gpu.py): compiled, 2.7 for NVFP4, which
    reads x twice, and 1.6 for MXFP8; step by step, 78 and 21.
    """
    if fmt == "mxfp8":
        return [(*by_rows(plain_mxfp8, x, "rtn", E4M3_MAX * 2.0 ** -127), None)]  # no NaN for tiny blocks
    if tensor_scale is None and torch.compiler.is_compiling() and not two_pass:
        return [plain_nvfp4(x)]  # reads x once for the amax of its blocks and of all
    if tensor_scale is None:
        tensor_scale = nvfp4_tensor_scale(x.abs().amax(1).max().float())
    tensor_scale = tensor_scale.reshape(())
    if two_pass:
        data, block_scale, rest, rest_scale = by_rows(plain_two_pass, x, tensor_scale)
        return [(data, block_scale, tensor_scale), (rest, rest_scale, second_scale(tensor_scale))]
    return [(*by_rows(plain_nvfp4, x, tensor_scale), tensor_scale)]


def plain_two_pass(x, tensor_scale):
    """x (R, Kp) -> data and block_scale of Q(x), data and block_scale of Q(x - Q(x))."""
    data, block_scale, _ = plain_nvfp4(x, tensor_scale)  # (R, Kp/2), (R, N)
    blocks = x.float().unflatten(1, (-1, NVFP4_BLOCK))  # (R, N, 16)
    rest = blocks - round_nvfp4(blocks.abs(), tensor_scale * block_scale.float()).copysign(blocks)  # (R, N, 16)
    return data, block_scale, *plain_nvfp4(rest.flatten(1), second_scale(tensor_scale))[:2]


def second_scale(tensor_scale):
    """The tensor scale of the second pass; at least the smallest float32, as 0 would give 0 / 0."""
    return (tensor_scale / E2M1_MAX).clamp(min=2.0 ** -149)


def dequantize_activation(passes: list[tuple], shape: tuple[int, int]) -> Tensor:
    """The inverse of quantize_activation: the sum of the passes, float32, of shape (R, K)."""
    first, *second = (dequantize_mxfp8(data, block_scale) if tensor_scale is None
                      else dequantize_nvfp4(data, block_scale, tensor_scale)
                      for data, block_scale, tensor_scale in passes)  # (R, K32) each
    return sum(second, first)[:shape[0], :shape[1]]


def multiply(quantized, layer: QuantLinear, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One pass of quantize_activation times the layer's weight, plus bias: (R, M) in dtype."""
    *operands, tensor_scale = scaled_mm_operands(quantized, layer)
    y = torch._scaled_mm(*operands, out_dtype=torch.bfloat16)[:, :layer.out_features]  # (R, M)
    return scale_and_add(y.to(dtype), tensor_scale, bias)  # (R, M)


def scaled_mm_operands(quantized, layer: QuantLinear):
    """One pass of quantize_activation -> (a, b, scale_a, scale_b, tensor_scale).

    The first four go to torch._scaled_mm, which takes block scales only; tensor_scale (None for MXFP8) multiplies
    the product (R, Mp).
    """
    a, scale_a, tensor_scale = quantized  # a: (R, K32 / 2 or K32)
    # If Kp is an odd number of blocks, one block of zeros makes K32. Its scale is in the padding of the tiles.
    b, scale_b = pad_to(layer.weight, 1, a.shape[1]), layer.weight_scale  # b: (Mp, K32 / 2 or K32)
    if layer.format == "nvfp4":
        a, b = a.view(torch.float4_e2m1fn_x2), b.view(torch.float4_e2m1fn_x2)
        return a, b.t(), scale_a, scale_b, tensor_scale * layer.weight_scale_2.reshape(())
    return a, b.t(), scale_a.view(torch.float8_e8m0fnu), scale_b.view(torch.float8_e8m0fnu), None


def scale_and_add(y: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """y * scale + bias, in place and in one pass, computed in float32. Scale and bias may be None."""
    if scale is None:
        return y if bias is None else y.add_(bias)
    scale = scale.reshape(1)  # torch rounds a 0-d scale to y's dtype: for bfloat16, an error of up to 0.2 %
    return torch.mul(y, scale, out=y) if bias is None else torch.addcmul(bias, y, scale, out=y)


# ----------------------------------------------------------------------------------------------------
# Only faster. Nothing below is part of the formats.
# ----------------------------------------------------------------------------------------------------

def row_chunks(rows, cols, device):
    """Slices of rows whose float32 temporaries fit the L2 cache: 1 MB on a CPU, 16 MB on a GPU."""
    step = max(1, (1 << 18 if device.type == "cpu" else 1 << 22) // cols)
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def by_rows(plain, w, *arguments):
    """The 2-D tensors that plain(w, *arguments) returns, computed on a few rows at a time. `plain` is one of the
    plain forms, such as plain_nvfp4. The bits are the same."""
    def rows_of(w):
        return [part for part in plain(w, *arguments) if part.dim() == 2]  # without the tensor scale

    if torch.compiler.is_compiling():  # the compiler makes one loop of the plain form
        return rows_of(w)
    chunks = [rows_of(w[rows]) for rows in row_chunks(*w.shape, w.device)]
    return [torch.cat(parts) for parts in zip(*chunks)]


def round_e2m1(a: Tensor) -> Tensor:
    """decode_e2m1(encode_e2m1(a)) for float32 a >= 0, bit for bit.

    One addition rounds: next to 2**22 * p, where p is a's power of two (1 below 1), float32 has the steps
    that E2M1 has at a, and the hardware rounds to nearest, ties to even.
    """
    a = a.clamp(max=E2M1_MAX)
    power = (a.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=1.0)  # a without its mantissa
    return a.add_(power.mul_(2.0 ** 22)).sub_(power)


def decode_by_rows(data, scale, dtype):
    """decode_nvfp4 (uint8 data) or decode_mxfp8 (float8 data) in dtype, a few rows at a time, with the same bits.
    FP8 is the case of one block in each row: scale (M, 1)."""
    packed = data.dtype == torch.uint8
    if torch.compiler.is_compiling():  # as in by_rows
        return (decode_nvfp4 if packed else decode_mxfp8)(data, scale).to(dtype)
    rows, blocks = scale.shape
    block = data.shape[1] * (2 if packed else 1) // blocks
    table = e2m1_pairs(data.device) if packed else None
    out = torch.empty(rows, blocks, block, dtype=dtype, device=data.device)  # (Mp, N, B)
    for chunk in row_chunks(rows, blocks * block, data.device):
        part = data[chunk]
        values = table.index_select(0, part.flatten().int()).view(torch.float32) if packed else decode_e4m3(part)
        torch.mul(values.view(-1, blocks, block), scale[chunk, :, None], out=out[chunk])
    return out.flatten(1)  # (Mp, Kp)


@functools.cache  # making the table on a GPU would wait for it
def e2m1_pairs(device):
    """The 256 bytes decoded: (256,) int64, each the bits of two float32. One lookup then decodes two codes."""
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    return decode_e2m1(unpack_e2m1(byte[:, None])).view(torch.int64).flatten()


def decode_e4m3(data):
    """data.float() for float8; for E4M3 on a CPU by way of float16, which is several times faster.

    The byte moved up by 7 bits, its sign by 8, is the float16 of 1/256 of its value: float16 has one more
    exponent bit, and a bias of 15 instead of 7. NaN, the byte of all ones below the sign, is the exception.
    """
    byte = data.view(torch.int8)
    if data.dtype != torch.float8_e4m3fn or data.device.type != "cpu" or (byte & 127).max() == 127:
        return data.float()
    half = byte.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)  # clear the sign's copy, bit 14
    return half.view(torch.float16).float().mul_(256)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; in float32 on a CPU by oneDNN, as torch's own choice, MKL, can take twice the time. Sums are in
    another order, so the last bits differ. The operator has no public name, and no gradient."""
    if (x.device.type == "cpu" and x.dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and not torch.is_grad_enabled() and not torch.compiler.is_compiling()):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
