"""NVFP4 and MXFP8: the number formats, and a Linear layer that multiplies in them.

This file needs only torch. Copy it into another project and it works there.

NVFP4 in one equation
---------------------
    w = e2m1[code] * block_scale * tensor_scale

  code          4 bits per weight: sign, 2 exponent bits, 1 mantissa bit (E2M1).
                The magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4, 6, and code = sign << 3 | index.
  block_scale   8 bits (E4M3) for every 16 consecutive weights of a row.
  tensor_scale  one float32 for the whole matrix: it brings the block scales into E4M3's range.

All three multiply; nothing stored is a reciprocal. A weight costs 4 + 8/16 = 4.5 bits.

To quantize, work from the outside in, all in float32. 448 and 6 are the largest E4M3 and E2M1 values:

    tensor_scale = amax(w) / (448 * 6)
    block_scale  = e4m3(min(amax(block) / 6 / tensor_scale, 448))
    code         = e2m1(clamp(w / (tensor_scale * block_scale), -6, 6))    nearest; a tie takes the even code

One block, worked
-----------------
The matrix has amax 0.5376, so tensor_scale = 0.5376 / 2688 = 0.0002. One of its blocks of 16:

    block_scale = e4m3(0.0475 / 6 / 0.0002) = e4m3(39.58) = 40, stored as byte 98; and 40 * 0.0002 = 0.008

  w          .0310-.0120 .0042     0-.0475 .0205 .0071-.0010 .0163-.0259 .0388 .0095-.0034 .0127-.0198 .0060
  w / .008    3.88  -1.5  .525     0 -5.94  2.56  .888 -.125  2.04 -3.24  4.85  1.19 -.425  1.59 -2.48   .75
  e2m1           4  -1.5    .5     0    -6     3     1    -0     2    -3     4     1   -.5   1.5    -2     1
  code           6     B     1     0     F     5     2     8     4     D     6     2     9     3     C     2
  bytes               6B          10          F5          28          4D          62          93          C2
  back        .032 -.012  .004     0 -.048  .024  .008    -0  .016 -.024  .032  .008 -.004  .012 -.016  .008

The last weight is a tie: .75 lies half way between codes 1 and 2, and takes 2. Two codes share a byte, and
the EVEN element sits in the HIGH nibble: 6 then B is 6B. Some other tools put it in the low nibble. A matmul
comes out right in either order if both operands agree, so a swapped file shows only when it is dequantized.

MXFP8
-----
    w = e4m3[byte] * 2**(scale - 127)

One E4M3 byte per weight, and one E8M0 byte, a bare exponent, for every 32 consecutive weights: 8.25 bits.
scale = ceil(log2(amax(block) / 448)) + 127, so that the largest weight still fits. There is no tensor scale.

What is stored
--------------
For a weight of shape (M, K), with M16 for M rounded up to a multiple of 16, and so on:

    NVFP4   data uint8         (M16, K16 / 2)    block_scale float8_e4m3fn (M128, K16 / 16 rounded up to 4)
    MXFP8   data float8_e4m3fn (M32, K32)        block_scale uint8         (M128, K32 / 32 rounded up to 4)

The padding is zeros. Block scales are "swizzled", in the order in which the tensor cores fetch them: the
matrix of scales is cut into tiles of 128 x 4, and entry (r, c) of a tile moves to row r % 32, column
4 * (r // 32) + c of a 32 x 16 tile. The tiles follow in row-major order; the stored 2-D shape only counts
the bytes. Sources: the OCP Microscaling specification 1.0 for E2M1, E4M3, E8M0; the cuBLAS manual, "Block
Scaling Factors Layout"; and comfy-kitchen 0.2.40, whose eager backend method="rtn" repeats bit for bit.
"""
import functools
import json
import warnings

import torch
import torch.nn.functional as F
from torch import nn

E2M1_MAX, E4M3_MAX = 6.0, 448.0
NVFP4_BLOCK, MXFP8_BLOCK = 16, 32

# Letters in the shapes: M, K rows and columns of a weight, padded; N blocks in a row, B weights in a block;
# m rows in one chunk; R rows of an activation, O outputs of a layer. M128 is M rounded up to 128.


def _round_up(n, multiple):
    return -(-n // multiple) * multiple


def _pad_to(w, rows, cols):
    """Zeros below and to the right, up to multiples of rows and cols."""
    padding = (0, _round_up(w.shape[1], cols) - w.shape[1], 0, _round_up(w.shape[0], rows) - w.shape[0])
    return F.pad(w, padding) if any(padding) else w


def _row_chunks(shape, device):
    """Slices of rows that keep temporaries small: to the L2 cache on a CPU, to 128 MB elsewhere."""
    rows, cols = shape
    if torch.compiler.is_compiling():  # a compiler makes its own loop, without temporaries
        return [slice(0, rows)]
    step = max(1, (1 << 17 if device.type == "cpu" else 1 << 25) // cols)
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


# ----------------------------------------------------------------------------------------------------
# E2M1: values <-> codes <-> bytes
# ----------------------------------------------------------------------------------------------------

def encode_e2m1(x):
    """Float tensor -> uint8 codes 0..15 of the same shape: nearest, ties to even code, saturating at 6.

    Code against magnitude is three straight lines: slope 2 up to 2, slope 1 up to 4, slope 1/2 up to 6. The
    line that holds is the lowest of the three. torch.round takes ties to even, and both offsets are even.
    """
    a = x.abs().clamp_(max=E2M1_MAX)
    code = torch.minimum((a * 2).round_(), a.round() + 2)
    code = torch.minimum(code, (a / 2).round_() + 4)
    return code.to(torch.uint8) | (x.signbit().to(torch.uint8) << 3)


def decode_e2m1(codes):
    """uint8 codes 0..15 -> float32 values of the same shape."""
    index, negative = (codes & 7).float(), codes > 7
    value = torch.maximum(torch.maximum(index / 2, index - 2), index * 2 - 8)  # the three lines, inverted
    return torch.where(negative, -value, value)


def round_e2m1(a):
    """Magnitudes >= 0, float32 -> the nearest E2M1 magnitudes, as encode and decode give together.

    One addition rounds: next to 2**22 * p, where p is a's power of two (1 below 1), float32 has the steps
    that E2M1 has at a, and the hardware rounds to nearest, ties to even.
    """
    a = a.clamp(max=E2M1_MAX)
    power = (a.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=1.0)  # a without its mantissa
    return a.add_(power.mul_(2.0 ** 22)).sub_(power)


def pack_e2m1(codes):
    """uint8 codes (..., K) -> bytes (..., K/2); the even element goes to the high nibble."""
    if torch.compiler.is_compiling():  # which then needs no codes in memory
        return codes[..., ::2] << 4 | codes[..., 1::2]
    pairs = codes.contiguous().view(torch.int16)  # (..., K/2) = even | odd << 8, little-endian
    return (pairs << 4 | pairs >> 8).to(torch.uint8)  # (..., K/2)   keeps the low 8 bits


def unpack_e2m1(data):
    """Bytes (..., K/2) -> uint8 codes (..., K)."""
    return torch.stack((data >> 4, data & 15), dim=-1).flatten(-2)  # (..., K)


def _e2m1_pairs(device):
    """The 256 bytes decoded: (256,) int64, each one the bits of two float32.

    Decoding by this table moves one 8-byte item per byte of data; int64 is only its carrier.
    """
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    return decode_e2m1(unpack_e2m1(byte[:, None])).view(torch.int64).flatten()


# ----------------------------------------------------------------------------------------------------
# Swizzled scales
# ----------------------------------------------------------------------------------------------------

def swizzle(scale):
    """Scales (rows, cols) of any dtype -> (rows128, cols4) in the tensor cores' order, padded with zeros.

    Raises ValueError if scale is not 2-D.
    """
    if scale.dim() != 2:
        raise ValueError(f"swizzle: got shape {tuple(scale.shape)}, expected 2-D (rows, blocks in a row)")
    raw = scale.view(torch.uint8) if scale.element_size() == 1 else scale  # not every float8 can be padded
    raw = _pad_to(raw, 128, 4)  # (rows128, cols4)
    rows, cols = raw.shape
    tiles = raw.reshape(rows // 128, 4, 32, cols // 4, 4).permute(0, 3, 2, 1, 4)  # row, col of tile, 32, 4, 4
    return tiles.reshape(rows, cols).view(scale.dtype)


def unswizzle(scale, rows, cols):
    """The inverse of swizzle: stored scales, 2-D or flat -> (rows, cols), padding dropped.

    Raises ValueError if the element count is not that of swizzled (rows, cols) scales.
    """
    rows128, cols4 = _round_up(rows, 128), _round_up(cols, 4)
    if scale.numel() != rows128 * cols4:
        raise ValueError(f"unswizzle: got {tuple(scale.shape)}, expected {(rows128, cols4)} for {rows} x "
                         f"{cols} scales: not swizzled, or another layer's?")
    raw = scale.view(torch.uint8) if scale.element_size() == 1 else scale
    tiles = raw.reshape(rows128 // 128, cols4 // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)  # its own inverse
    return tiles.reshape(rows128, cols4)[:rows, :cols].view(scale.dtype)


# ----------------------------------------------------------------------------------------------------
# Quantize and dequantize
# ----------------------------------------------------------------------------------------------------

def _check_input(caller, w, method):
    if method not in ("rtn", "search"):
        raise ValueError(f"{caller}: got method {method!r}, expected 'rtn' (nearest) or 'search' (best)")
    if w.dim() != 2 or w.numel() == 0:
        raise ValueError(f"{caller}: got shape {tuple(w.shape)}, expected a non-empty (M, K): reshape it")
    if not w.is_floating_point():
        raise ValueError(f"{caller}: got {w.dtype}, expected a float dtype: dequantize or cast it first")


def _check_finite(caller, amax):
    if not amax.is_meta and not amax.isfinite().all():
        raise ValueError(f"{caller}: got NaN or infinite values, expected finite ones, in float32 too: "
                         f"is the source damaged?")


def _check_crop(caller, stored, shape, multiple):
    if shape is not None and tuple(_round_up(n, multiple) for n in shape) != stored:
        raise ValueError(f"{caller}: got shape {tuple(shape)}, which does not pad to the stored {stored}: "
                         f"the shape of another layer?")


def _blocks(w, block):
    return w.float().reshape(w.shape[0], -1, block)  # (M, N, B) float32


def _block_amax(w, block):
    """The largest magnitude in each block: (M, K) -> (M, N) float32.

    Without their sign, the bits of two floats compare as integers do, NaN above all, in half of the time.
    """
    w = w if w.element_size() > 1 else w.float()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[w.element_size()]
    bits = w.view(integer).reshape(w.shape[0], -1, block)  # (M, N, B)
    most = [(bits[rows] & torch.iinfo(integer).max).amax(-1) for rows in _row_chunks(w.shape, w.device)]
    return torch.cat(most).view(w.dtype).float()


def _squared_error(x, approximation):
    # In float64, so that two candidates compare as they would in exact arithmetic, however small the weights.
    return (x - approximation).double().square_().sum(-1)  # (M, N)


def _lowest_error(x, candidates, reconstruct):
    """Of the candidate scale bytes (each (M, N)), per block the one that reconstructs x (M, N, B) best."""
    best = candidates[0]
    lowest = _squared_error(x, reconstruct(best))
    for byte in candidates[1:]:
        error = _squared_error(x, reconstruct(byte))
        best = torch.where(error < lowest, byte, best)  # strictly: in a tie the first candidate stays
        lowest = torch.minimum(error, lowest)
    return best


def encode_nvfp4(x, scale):
    """E2M1 codes of blocks x (M, N, 16) float32 for scales (M, N), each tensor_scale * block_scale."""
    codes = encode_e2m1(x / scale[..., None])
    return codes.mul_((scale != 0)[..., None])  # x / 0 is no code; a block whose scale is 0 is all zeros


def _search_nvfp4(x, amax, tensor_scale, rtn):
    """The E4M3 block scale of the least squared error: x (M, N, 16), amax and rtn (M, N) -> (M, N).

    Sixteen consecutive E4M3 values from amax / 8 up always hold the optimum. Below amax / 8, clipping the
    largest weight costs more than doubling the scale costs the fifteen others together. Above amax / 3.5,
    half the scale gives every value that the scale itself gives, and more between. Half a scale is missing
    from E4M3 only for bytes under 16, and there sixteen steps reach all of them.
    """
    x = x.abs()

    def reconstruct(byte):
        scale = (tensor_scale * byte.view(torch.float8_e4m3fn).float())[..., None]
        return round_e2m1(x / scale.clamp(min=2.0 ** -149)).mul_(scale)  # a scale of 0 gives 0, not 0/0

    first = (amax / 8 / tensor_scale).clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    candidates = [rtn.view(torch.uint8)] + [(first + i).clamp_(1, 126) for i in range(16)]  # 126: 448
    return _lowest_error(x, candidates, reconstruct).view(torch.float8_e4m3fn)


def _quantize_nvfp4(w, amax, tensor_scale, method="rtn"):
    """quantize_nvfp4 for a padded w with its block amax (M, N), unchecked: nothing here waits for a GPU."""
    if tensor_scale is None:
        tensor_scale = amax.max() / (E4M3_MAX * E2M1_MAX)
        # 0 for nothing but zeros, or next to nothing. Any scale fits those, and 0 itself would divide 0 by 0.
        tensor_scale = torch.where(tensor_scale == 0, torch.ones_like(tensor_scale), tensor_scale)
    block_scale = (amax / E2M1_MAX / tensor_scale).clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn)  # (M, N)
    data = torch.empty(w.shape[0], w.shape[1] // 2, dtype=torch.uint8, device=w.device)  # (M, K/2)
    for rows in _row_chunks(w.shape, w.device):
        x = _blocks(w[rows], NVFP4_BLOCK)
        if method == "search":
            block_scale[rows] = _search_nvfp4(x, amax[rows], tensor_scale, block_scale[rows])
        codes = encode_nvfp4(x, tensor_scale * block_scale[rows].float())  # (m, N, 16)
        data[rows] = pack_e2m1(codes).flatten(1)
    return data, swizzle(block_scale), tensor_scale


@torch.no_grad()
def quantize_nvfp4(w, tensor_scale=None, method="rtn"):
    """Weight (M, K), any float dtype -> (data, block_scale, tensor_scale) as the top of this file lays out.

    tensor_scale  a positive number or 0-d tensor; by default amax / (448 * 6), or 1 where that is 0.
    method        "rtn": the block scale from the block's amax, bit-identical to comfy-kitchen for one
                  tensor_scale. "search": per block the scale of the least squared error, 9 times slower.

    Raises ValueError if w is not 2-D, not floating, empty or not finite, and for a bad scale or method.
    """
    _check_input("quantize_nvfp4", w, method)
    w = _pad_to(w, 16, 16)
    amax = _block_amax(w, NVFP4_BLOCK)  # (M, N)
    _check_finite("quantize_nvfp4", amax)
    if tensor_scale is not None:
        tensor_scale = torch.as_tensor(tensor_scale, dtype=torch.float32, device=w.device)
        if tensor_scale.numel() != 1 or not (tensor_scale.is_meta or 0 < tensor_scale.item() < float("inf")):
            raise ValueError(f"quantize_nvfp4: got tensor_scale {tensor_scale.tolist()}, expected one "
                             f"positive number: pass None to take it from the weight")
        tensor_scale = tensor_scale.reshape(())
    return _quantize_nvfp4(w, amax, tensor_scale, method)


@torch.no_grad()
def dequantize_nvfp4(data, block_scale, tensor_scale, shape=None, dtype=torch.float32):
    """The inverse of quantize_nvfp4: stored tensors -> (M, K) of `dtype`, computed in float32.

    shape crops the padding; without it the padded matrix returns. Raises ValueError if the parts do not fit.
    """
    if data.dim() != 2 or data.dtype != torch.uint8:
        raise ValueError(f"dequantize_nvfp4: got data {data.dtype} {tuple(data.shape)}, expected uint8 "
                         f"(M16, K16/2): an MXFP8 weight, or float4_e2m1fn_x2 to view as uint8?")
    rows, cols = data.shape[0], data.shape[1] * 2
    _check_crop("dequantize_nvfp4", (rows, cols), shape, 16)
    blocks = cols // NVFP4_BLOCK
    scale = tensor_scale * unswizzle(block_scale, rows, blocks).float()  # (M, N)
    pairs = _e2m1_pairs(data.device)
    out = torch.empty(rows, blocks, NVFP4_BLOCK, dtype=dtype, device=data.device)  # (M, N, 16)
    for chunk in _row_chunks((rows, cols), data.device):
        values = pairs.index_select(0, data[chunk].flatten().int()).view(torch.float32)  # (m * K,)
        torch.mul(values.view(-1, blocks, NVFP4_BLOCK), scale[chunk, :, None], out=out[chunk])
    out = out.flatten(1)  # (M, K)
    return out if shape is None else out[:shape[0], :shape[1]].contiguous()


def _decode_e8m0(byte):
    """E8M0 bytes -> float32: a byte IS a float32's exponent field. Byte 0 reads as 0, as in comfy-kitchen."""
    return (byte.view(torch.uint8).int() << 23).view(torch.float32)


def _decode_e4m3(data):
    """float8_e4m3fn -> float32: on a CPU by way of float16, several times faster than .float().

    A byte moved up by 7 bits, the sign by 8, is the float16 of 1/256 of its value: float16's exponent has one
    bit more and a bias of 15, not 7. Only NaN, the byte of all ones but the sign, has no such twin.
    """
    byte = data.view(torch.int8)
    if data.device.type != "cpu" or torch.compiler.is_compiling() or (byte & 127).max() == 127:
        return data.float()
    half = byte.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)  # the sign's copy below it goes
    return half.view(torch.float16).float().mul_(256)


def encode_mxfp8(x, scale):
    """float8_e4m3fn of blocks x (M, N, 32) float32 for the scales (M, N), saturating."""
    return (x / scale[..., None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _search_mxfp8(x, amax, rtn):
    """The exponent of the least squared error: x (M, N, 32), amax and rtn (M, N) -> (M, N).

    Only one less than rtn can win: its steps are finer for small values, and the largest one saturates. One
    more adds no value in range; two less cut the largest weight to under a half. Byte 0, which reads as no
    scale at all, is left to the blocks of zeros.
    """
    def reconstruct(byte):
        scale = _decode_e8m0(byte)
        return encode_mxfp8(x, scale).float() * scale[..., None]

    return _lowest_error(x, [rtn.clamp(min=1), rtn.clamp(min=2) - 1], reconstruct) * (amax != 0)


def _quantize_mxfp8(w, amax, method="rtn"):
    """quantize_mxfp8 for a padded w with its block amax (M, N), unchecked: nothing here waits for a GPU."""
    exponent = torch.log2((amax / E4M3_MAX).clamp_(min=2.0 ** -127)).ceil_()
    block_scale = (exponent + 127).clamp_(0, 254).to(torch.uint8)  # (M, N)
    data = torch.empty(w.shape, dtype=torch.uint8, device=w.device)  # (M, K)
    for rows in _row_chunks(w.shape, w.device):
        x = _blocks(w[rows], MXFP8_BLOCK)
        if method == "search":
            block_scale[rows] = _search_mxfp8(x, amax[rows], block_scale[rows])
        values = encode_mxfp8(x, _decode_e8m0(block_scale[rows])).view(torch.uint8)  # (m, N, 32)
        data[rows] = values.mul_((amax[rows] != 0)[..., None]).flatten(1)  # x / 0 is no value
    return data.view(torch.float8_e4m3fn), swizzle(block_scale)


@torch.no_grad()
def quantize_mxfp8(w, method="rtn"):
    """Weight (M, K), any float dtype -> (data, block_scale) as the top of this file lays out.

    method  "rtn": bit-identical to comfy-kitchen, even in blocks of amax <= 448 * 2**-127 (2.6e-36), whose
            byte 0 is read as scale 0 and whose zeros become NaN.
            "search": per block the exponent of the least squared error; no NaNs.

    Raises ValueError if w is not 2-D, not floating, empty or not finite, and for an unknown method.
    """
    _check_input("quantize_mxfp8", w, method)
    w = _pad_to(w, 32, 32)
    amax = _block_amax(w, MXFP8_BLOCK)  # (M, N)
    _check_finite("quantize_mxfp8", amax)
    return _quantize_mxfp8(w, amax, method)


@torch.no_grad()
def dequantize_mxfp8(data, block_scale, shape=None, dtype=torch.float32):
    """The inverse of quantize_mxfp8: stored tensors -> (M, K) of `dtype`, computed in float32.

    block_scale may be uint8 or float8_e8m0fnu. shape crops the padding; without it the padded matrix returns.
    Raises ValueError if the parts do not fit.
    """
    if data.dim() != 2 or data.dtype != torch.float8_e4m3fn:
        raise ValueError(f"dequantize_mxfp8: got data {data.dtype} {tuple(data.shape)}, expected "
                         f"float8_e4m3fn (M32, K32): an NVFP4 weight?")
    _check_crop("dequantize_mxfp8", tuple(data.shape), shape, 32)
    rows, cols = data.shape
    blocks = cols // MXFP8_BLOCK
    scale = _decode_e8m0(unswizzle(block_scale, rows, blocks))  # (M, N)
    out = torch.empty(rows, blocks, MXFP8_BLOCK, dtype=dtype, device=data.device)  # (M, N, 32)
    for chunk in _row_chunks((rows, cols), data.device):
        values = _decode_e4m3(data[chunk]).view(-1, blocks, MXFP8_BLOCK)
        torch.mul(values, scale[chunk, :, None], out=out[chunk])
    out = out.flatten(1)  # (M, K)
    return out if shape is None else out[:shape[0], :shape[1]].contiguous()


# ----------------------------------------------------------------------------------------------------
# The Linear layer
# ----------------------------------------------------------------------------------------------------

FORMAT_NAMES = {"nvfp4": "NVFP4", "mxfp8": "MXFP8", "float8_e4m3fn": "FP8"}  # as stored -> as printed
MODES = ("tensor_cores", "dequantize", "emulate")


def write_marker(info):
    """A dict such as {"format": "nvfp4"} -> the uint8 tensor that a checkpoint stores as L.comfy_quant."""
    return torch.tensor(list(json.dumps(info).encode()), dtype=torch.uint8)


def read_marker(marker, name="comfy_quant"):
    """The inverse of write_marker. Raises ValueError, naming `name`, for no JSON or an unknown format."""
    try:
        info = json.loads(bytes(marker.flatten().tolist()))
    except (ValueError, TypeError) as error:
        raise ValueError(f'{name}: got no JSON ({error}), expected {{"format": ...}}: damaged?') from None
    if not isinstance(info, dict) or info.get("format") not in FORMAT_NAMES:
        raise ValueError(f"{name}: got {info}, expected a format out of {', '.join(FORMAT_NAMES)}: "
                         f"convert the layer to one of these")
    return info


def default_mode(device):
    """"tensor_cores" on a CUDA device of sm_100 or later, else "dequantize"."""
    device = torch.device(device)
    nvidia = device.type == "cuda" and torch.version.hip is None
    return "tensor_cores" if nvidia and torch.cuda.get_device_capability(device) >= (10, 0) else "dequantize"


def default_dtype(device):
    """The dtype that a device multiplies in: float32 on a CPU, bfloat16 elsewhere."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def stored_tensors(fmt, in_features, out_features):
    """What a layer of this format stores, and may store: two dicts, suffix -> (dtypes, shape, hint).

    The first dtype is the usual one; None stands for every float dtype. The hint is for a wrong shape. fmt is
    a key of FORMAT_NAMES, or None for a plain layer.
    """
    hint = "is it another layer's, or another model size?"
    number = ((torch.float32,), (), "expected one number")
    optional = {"bias": (None, (out_features,), hint)}
    if fmt is None:
        return {"weight": (None, (out_features, in_features), hint)}, optional
    optional["pre_quant_scale"] = (None, (in_features,), hint)
    if fmt == "float8_e4m3fn":
        weight = ((torch.float8_e4m3fn,), (out_features, in_features), hint)
        return {"weight": weight, "weight_scale": number}, optional | {"input_scale": number}
    block = NVFP4_BLOCK if fmt == "nvfp4" else MXFP8_BLOCK  # each format pads both dimensions to its block
    rows, cols = _round_up(out_features, block), _round_up(in_features, block)
    scale_shape = (_round_up(rows, 128), _round_up(cols // block, 4))
    scale_hint = "swizzled twice, or not at all?"
    if fmt == "nvfp4":
        return {"weight": ((torch.uint8,), (rows, cols // 2), hint),
                "weight_scale": ((torch.float8_e4m3fn, torch.uint8), scale_shape, scale_hint),
                "weight_scale_2": number}, optional | {"input_scale": number}
    return {"weight": ((torch.float8_e4m3fn,), (rows, cols), hint),
            "weight_scale": ((torch.uint8, torch.float8_e8m0fnu), scale_shape, scale_hint)}, optional


def _check_stored(name, tensors, fmt, in_features, out_features):
    required, optional = stored_tensors(fmt, in_features, out_features)
    kind = FORMAT_NAMES.get(fmt, "plain")
    for suffix in required:
        if suffix not in tensors:
            raise ValueError(f"{name}.{suffix}: got nothing, expected a tensor, as the layer is {kind}: "
                             f"is the file incomplete?")
    for suffix, tensor in tensors.items():
        if suffix not in required | optional:
            raise ValueError(f"{name}.{suffix}: got a tensor, expected none, as the layer is {kind}: "
                             f"is its comfy_quant marker lost or wrong?")
        dtypes, shape, hint = (required | optional)[suffix]
        if not (tensor.is_floating_point() if dtypes is None else tensor.dtype in dtypes):
            expected = " or ".join(map(str, dtypes)) if dtypes else "a float dtype"
            raise ValueError(f"{name}.{suffix}: got {tensor.dtype}, expected {expected}: "
                             f"is the layer's comfy_quant marker lost or wrong?")
        if tuple(tensor.shape) != shape and not (shape == () and tensor.numel() == 1):
            raise ValueError(f"{name}.{suffix}: got {tuple(tensor.shape)}, expected {shape}: {hint}")


def linear(x, weight, bias=None):
    """F.linear. In float32 on a CPU by oneDNN, where torch takes MKL, which on AMD's processors uses half of
    the vector width and so twice the time. The operator has no public name and no gradient."""
    if (x.device.type == "cpu" and x.dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and not torch.is_grad_enabled() and not torch.compiler.is_compiling()):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class QuantLinear(nn.Module):
    """y = x @ W.T + bias, with W kept as the checkpoint stores it: NVFP4, MXFP8, FP8, or plain.

    mode, chosen once, when the layer is made:
      tensor_cores  the activation is quantized on the fly, and torch._scaled_mm multiplies (sm_100 and later)
      dequantize    W is dequantized for this call, and multiplied in compute_dtype
      emulate       what tensor_cores computes, on any device: both operands dequantized, times in float32
    FP8 and plain layers, and those marked full_precision_matrix_mult, always dequantize; an FP8 layer's
    input_scale is then kept but has no part. No dequantized copy outlives a call.

    x has any float dtype and any leading dimensions, and y has x's dtype. Build one with from_tensors.
    """

    @classmethod
    def from_tensors(cls, name, tensors, in_features, out_features, bias=None, compute_dtype=None, mode=None):
        """A layer from its stored tensors, which it keeps without a copy (they may be memory-mapped).

        name      the layer's name, for messages: "blocks.3.ffn.0"
        tensors   {suffix: tensor}: weight, bias, weight_scale, comfy_quant, ... An older FP8 file's names
                  scale_weight and scale_input are read too, as weight_scale and input_scale.
        bias      True: there must be one. False: there must be none. None: as found.
        compute_dtype, mode   by default those of the weight's device

        Raises ValueError for missing, left-over, mis-shaped or mis-typed tensors, an unknown format or mode.
        """
        older = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
        tensors = {older.get(suffix, suffix): tensor for suffix, tensor in tensors.items()}
        marker = tensors.pop("comfy_quant", None)
        info = {} if marker is None else read_marker(marker, f"{name}.comfy_quant")
        fmt = info.get("format")
        if marker is None and "weight_scale" in tensors and tensors["weight_scale"].numel() == 1:
            fmt = "float8_e4m3fn"  # files older than the marker know no other format
        _check_stored(name, tensors, fmt, in_features, out_features)
        if bias is not None and bias != ("bias" in tensors):
            got, expected = ("nothing", "a tensor") if bias else ("a tensor", "none")
            raise ValueError(f"{name}.bias: got {got}, expected {expected}: is it another layer's?")
        if mode not in (None, *MODES):
            raise ValueError(f"{name}: got mode {mode!r}, expected one of {', '.join(MODES)}")

        layer = cls()
        layer.in_features, layer.out_features, layer.format = in_features, out_features, fmt
        device = tensors["weight"].device
        layer.compute_dtype = compute_dtype or default_dtype(device)
        one_way = fmt not in ("nvfp4", "mxfp8") or info.get("full_precision_matrix_mult", False)
        layer.mode = "dequantize" if one_way else mode or default_mode(device)
        if fmt == "nvfp4":
            tensors["weight_scale"] = tensors["weight_scale"].view(torch.float8_e4m3fn)
        layer.weight = nn.Parameter(tensors["weight"], requires_grad=False)
        layer.bias = nn.Parameter(tensors["bias"], requires_grad=False) if "bias" in tensors else None
        for suffix in ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"):
            layer.register_buffer(suffix, tensors.get(suffix))
        layer.register_buffer("comfy_quant", marker)
        layer.lora_scales = []
        return layer

    def attach_lora(self, up, down, scale=1.0):
        """Add the side branch y += scale * (x @ down.T) @ up.T; any number of them may be attached.

        up (O, r), down (r, K), usually bfloat16; scale = strength * alpha / r. The branch sees x before
        pre_quant_scale, as the layer did on which it was trained. It is no part of state_dict.
        Raises ValueError if the shapes do not fit.
        """
        expected = (self.out_features, down.shape[0]), (up.shape[-1], self.in_features)
        if (tuple(up.shape), tuple(down.shape)) != expected:
            raise ValueError(f"attach_lora: got up {tuple(up.shape)} and down {tuple(down.shape)}, expected "
                             f"({self.out_features}, r) and (r, {self.in_features}): or swapped?")
        self.register_buffer(f"lora_up_{len(self.lora_scales)}", up, persistent=False)
        self.register_buffer(f"lora_down_{len(self.lora_scales)}", down, persistent=False)
        self.lora_scales.append(scale)

    def dequantized(self, dtype):
        """W as (O, K) in dtype."""
        shape = (self.out_features, self.in_features)
        if self.format == "nvfp4":
            return dequantize_nvfp4(self.weight, self.weight_scale, self.weight_scale_2, shape, dtype)
        if self.format == "mxfp8":
            return dequantize_mxfp8(self.weight, self.weight_scale, shape, dtype)
        if self.format == "float8_e4m3fn":
            return (_decode_e4m3(self.weight) * self.weight_scale).to(dtype)
        return self.weight.to(dtype)

    def forward(self, x):
        flat = x.reshape(-1, self.in_features)  # (R, K)
        scaled = flat if self.pre_quant_scale is None else flat * self.pre_quant_scale
        dtype = torch.float32 if self.mode == "emulate" else self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        if self.mode == "tensor_cores":
            *operands, tensor_scale = scaled_mm_operands(scaled, self)
            y = torch._scaled_mm(*operands, out_dtype=torch.bfloat16)  # (R128, O32)
            y = y[:flat.shape[0], :self.out_features].to(dtype)  # (R, O)
            y = y if tensor_scale is None else y * tensor_scale
            y = y if bias is None else y + bias
        else:
            if self.mode == "emulate":
                scaled = dequantize_activation(*quantize_activation(scaled, self), scaled.shape)
            y = linear(scaled.to(dtype), self.dequantized(dtype), bias)  # (R, O)
        for i, scale in enumerate(self.lora_scales):
            up, down = getattr(self, f"lora_up_{i}").to(dtype), getattr(self, f"lora_down_{i}").to(dtype)
            y = y + scale * linear(linear(flat.to(dtype), down), up)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _apply(self, fn, recurse=True):
        # .to(device) moves a layer; .to(dtype), .half() and so on must not cast what is stored: float8 too
        # is a floating dtype. An empty tensor shows what fn would do.
        def move(tensor):
            probe = fn(tensor.new_empty(0))
            return fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)
        return super()._apply(move, recurse)

    def extra_repr(self):
        kind = FORMAT_NAMES.get(self.format, str(self.weight.dtype).removeprefix("torch."))
        lora = f", {len(self.lora_scales)} LoRA" if self.lora_scales else ""
        return f"{self.in_features} -> {self.out_features}, {kind}, {self.mode}{lora}"


# What the tensor cores multiply. Kept apart from forward, so that the operands can be checked without a GPU.

@torch.no_grad()
def quantize_activation(x, layer, row_multiple=1):
    """Activation (R, K) -> (data, block_scale, tensor_scale) in the layer's format; None ends MXFP8's.

    Rounds as method="rtn" does. NVFP4's tensor scale is the layer's input_scale or, without one, x's own amax
    / (448 * 6): never 1. Nothing here waits for the GPU, so NaNs are not looked for: they stay NaNs.
    """
    x = _pad_to(x, row_multiple, 32)  # of 32 for NVFP4 too: torch._scaled_mm takes rows of whole 16 bytes
    fused = x.is_cuda and not torch.compiler.is_compiling()
    return (compiled_quantize_rows(x.device.type) if fused else quantize_rows)(x, layer.format, layer.input_scale)


def quantize_rows(x, fmt, input_scale):
    if fmt == "mxfp8":
        amax = F.threshold(_block_amax(x, MXFP8_BLOCK), E4M3_MAX * 2.0 ** -127, 0.0)  # what has no scale is 0
        return *_quantize_mxfp8(x, amax), None
    tensor_scale = None if input_scale is None else input_scale.reshape(())
    return _quantize_nvfp4(x, _block_amax(x, NVFP4_BLOCK), tensor_scale)


@functools.cache
def compiled_quantize_rows(device_type):
    """quantize_rows, compiled: x is read twice, for the magnitudes and for the codes, which are written once.

    Step by step 30 times as many bytes would move, and take longer than the product: bench/activation.py.
    Where the compiler does not work (it wants Triton and a C compiler) it stays quantize_rows, with a warning.
    """
    exact = {"eager_numerics.division_rounding": True}  # the same bits as step by step
    fused = torch.compile(quantize_rows, dynamic=True, options=exact)
    try:
        fused(torch.ones(128, 128, dtype=torch.bfloat16, device=device_type), "nvfp4", None)
    except Exception as error:
        warnings.warn(f"activations are quantized step by step, which is slow: torch.compile failed: {error}")
        return quantize_rows
    return fused


def dequantize_activation(data, block_scale, tensor_scale, shape):
    """The inverse of quantize_activation: -> float32 of `shape` (R, K)."""
    x = (dequantize_mxfp8(data, block_scale) if tensor_scale is None
         else dequantize_nvfp4(data, block_scale, tensor_scale))
    return x[:shape[0], :shape[1]]


def scaled_mm_operands(x, layer):
    """Activation (R, K) -> (a, b, scale_a, scale_b, tensor_scale): the first four are torch._scaled_mm's.

    The product is (R128, O16) for NVFP4 and (R128, O32) for MXFP8, rows padded because fewer than 128 are
    reported to fail. tensor_scale, None for MXFP8, multiplies it: torch._scaled_mm knows only block scales.
    """
    a, scale_a, tensor_scale = quantize_activation(x, layer, row_multiple=128)
    # Where K16 is an odd number of blocks, one more of zeros makes K32; the tiles hold its scale already.
    b, scale_b = _pad_to(layer.weight, 1, a.shape[1]), layer.weight_scale
    if layer.format == "nvfp4":
        a, b = a.view(torch.float4_e2m1fn_x2), b.view(torch.float4_e2m1fn_x2)
        return a, b.t(), scale_a, scale_b, tensor_scale * layer.weight_scale_2.reshape(())
    return a, b.t(), scale_a.view(torch.float8_e8m0fnu), scale_b.view(torch.float8_e8m0fnu), None


def describe(model):
    """One line on the Linear layers of a model: "NVFP4 427 layers (tensor cores), bfloat16 34 layers"."""
    counts = {}
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            kind = FORMAT_NAMES.get(layer.format, str(layer.weight.dtype).removeprefix("torch."))
            key = kind, f" ({layer.mode.replace('_', ' ')})" if layer.format else ""
            counts[key] = counts.get(key, 0) + 1
    most_first = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {n} layers{mode}" for (kind, mode), n in most_first)
