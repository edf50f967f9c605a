"""Convert a Wan2.1 checkpoint in bf16, fp16 or fp32 to NVFP4 and MXFP8, in the comfy_quant format.

    python convert.py -i MODEL.safetensors            writes MODEL-nvfp4.safetensors

A file in LightX2V's NVFP4 layout (quant.from_lightx2v) is repacked instead: nothing in it is rounded again.

The sections follow the steps of a conversion, in reading order:

  Source        the checkpoint: names, shapes and dtypes of all tensors; reads one tensor at a time, and merges
                LoRAs into it on request
  Plan          a format for each weight: NVFP4 (4.5 bits per weight), MXFP8 (8.25), or "bf16", which means
                kept in the source's dtype; chosen by regular expressions, by a score of each weight, or by the
                error that each format causes, within a file size. Also the layers whose inputs are not
                quantized (W4A16), or are quantized in two passes
  Round         one weight to the stored tensors of its format: to nearest, with searched block scales, or
                with the second moment of the layer's inputs, which minimizes the error of the outputs
  LoRA          low-rank factors of the rounding error, and of a part of the weight on request, for a second file
  Calibrate     what each layer is fed, and what its rounding does to the latents: runs the pipeline on
                pictures, the model one block at a time
  Write         the output. A safetensors header lists all names, shapes and offsets; they follow from the
                source's shapes and the plan, so the header is written first and then each tensor in its place.
                A journal lists what is complete, to resume an interrupted run
  Convert       every tensor of the source, rounded as planned. Memory holds a few weights, whatever the size of
                the model
  Report        the plan as a table, a map and a picture; the errors of each type of layer
  Command line

A quantized layer L is stored as quant.py describes: L.weight, L.weight_scale, for NVFP4 L.weight_scale_2, on
request L.input_scale or L.pre_quant_scale, and the marker L.comfy_quant, which ComfyUI reads. Older tools
read the same information from the header entry _quantization_metadata; both are always written. The header
also keeps the source's own entries (head_dim and so on) and records the command.

Under torchrun, the processes on one machine (wan_fp4.Ranks) share the weights and the pictures of --calib, and
write into the same file.

For callers: main(argv); make_outputs with convert, repack and concat_loras for a file; quantize_weight,
dequantize_weight and snr for a single weight; plan, layout and marker for the contents of a file without its
data. To vendor this file, copy quant.py and wan_fp4.py with it; sample.py is needed only by --calib.
"""
import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C during the slow imports; main() then handles it
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import ctypes
import functools
import hashlib
import itertools
import json
import math
import re
import shlex
import shutil
import time
import warnings
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: files are not locked
    fcntl = None

if __name__ == "__main__":  # torch warns while it is imported; nothing here needs numpy
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages: faster allocation
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # fragments the GPU's memory less
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import safetensors
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tqdm import tqdm

import quant
import wan_fp4

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn}  # as a safetensors header spells them
FLOATS = torch.float32, torch.float16, torch.bfloat16  # of tensors that are not quantized
PLAN_FORMATS = {"bf16": "bf16", "mxfp8": "MXFP8", "nvfp4": "NVFP4"}  # as in the flags -> as printed
PRINTED = PLAN_FORMATS | {"mxfp8_fpmm": "W8A16", "nvfp4_fpmm": "W4A16", "nvfp4_two_pass": "2-pass"}  # with marks


# ----------------------------------------------------------------------------------------------------
# Source: the checkpoint to convert
# ----------------------------------------------------------------------------------------------------

def model_files(path):
    """Every file that is read for a model: its shards, and the index that lists them."""
    path = Path(path)
    return [path, *wan_fp4.shards(path), *(path.glob("*.json") if path.is_dir() else ())]


class DamagedError(ValueError):
    """The checkpoint holds values that no run could convert."""


class Source:
    """A checkpoint's tensors by bare official name: shapes, dtypes, metadata; tensor(name) reads one.

    packed: whether it is in LightX2V's NVFP4 layout, for repack. Raises FileNotFoundError, and ValueError if path
    is not a Wan DiT in safetensors, or is quantized in another way.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.files = wan_fp4.shards(self.path)
        self.shapes, self.dtypes, self.metadata, self.stored = {}, {}, {}, {}
        headers = {file: wan_fp4.read_header(file) for file in self.files}
        self.packed = any(wan_fp4.is_lightx2v(tensors) for _, tensors in headers.values())
        for file, (metadata, tensors) in headers.items():
            if "_quantization_metadata" in metadata:
                raise ValueError(f"{file}: already quantized (its header has _quantization_metadata); "
                                 f"convert the bf16 model")
            self.metadata |= metadata
            for stored, (dtype, shape) in tensors.items():
                self.add(file, stored, dtype, shape)
        if not any(".self_attn." in name for name in plan(self.shapes)):
            first = min(self.shapes, default="no tensor")[:200]
            raise ValueError(f"{path}: not a Wan DiT (got {first}, expected matrices such as "
                             f"blocks.0.self_attn.q.weight, or diffusers' blocks.0.attn1); give the DiT")
        blocks = {name.split(".")[1] for name in self.shapes if name.startswith("blocks.")}
        if missing := {str(i) for i in range(len(blocks))} - blocks:
            raise ValueError(f"{path}: got blocks {', '.join(sorted(blocks))[:200]}, expected also "
                             f"{min(missing)}; give all shards of the model")
        self.nbytes = sum(math.prod(s) * self.dtypes[name].itemsize for name, s in self.shapes.items())
        self.reads = model_files(self.path)  # every file that the run reads; merge and calibrate add theirs
        self.terms = {}  # {tensor's name: what LoRAs add to it, as wan_fp4.lora_terms gives it}

    def add(self, file, stored, dtype, shape):
        name = wan_fp4.official_dit_name(wan_fp4.bare_name(stored))
        if name in self.shapes:
            raise ValueError(f"{file}: {stored}: duplicate tensor (also in {self.stored[name][0]}, as "
                             f"{self.stored[name][1]}); give one model")
        if not self.packed and name.endswith((".comfy_quant", ".weight_scale")):
            raise ValueError(f"{file}: already quantized (it has {name}); convert the bf16 model")
        if not self.packed and (dtype.startswith("F8") or name.endswith((".scale_weight", "scaled_fp8"))):
            raise ValueError(f"{file}: {name}: already 8-bit ({dtype}), and rounding it again would add to "
                             f"its error; convert the bf16 model")
        if dtype not in DTYPES or name.endswith(".weight") and not self.packed and DTYPES[dtype] not in FLOATS:
            raise ValueError(f"{file}: {name}: got {dtype}, expected BF16, F16 or F32; convert the bf16 model")
        if 0 in shape:
            raise ValueError(f"{file}: {name}: got shape {shape}, expected no size of 0; get an undamaged copy")
        self.shapes[name], self.dtypes[name], self.stored[name] = shape, DTYPES[dtype], (file, stored)

    def tensor(self, name):
        """The tensor, memory-mapped, or with its LoRAs. Raises DamagedError if it has NaN or infinite values.

        The file is opened for each tensor, because an open map keeps every page that was ever read.
        """
        file, stored = self.stored[name]
        try:
            with safe_open(file, "pt") as f:
                tensor = f.get_tensor(stored)
        except safetensors.SafetensorError as error:  # the header could be read when the run started
            raise OSError(f"{file}: {stored}: cannot be read ({error})") from None
        if tensor.is_floating_point() and not quant.matrix_amax(tensor).isfinite():
            raise DamagedError(f"{file}: {stored}: got NaN or infinite values, expected finite ones; get an "
                               f"undamaged copy")
        return self.merged(name, tensor) if name in self.terms else tensor

    def merge(self, path, strength):
        """Have tensor() add a LoRA, factors and whole differences. Returns a line that says how much is merged,
        and what is skipped and why. Raises ValueError if nothing fits, for wrong shapes and damaged factors."""
        merged, skipped = [], []
        for name, shape, scale, factors in wan_fp4.lora_terms(path, strength):
            expected = self.shapes.get(name)
            if expected is None or len(factors) == 2 and len(expected) != 2:
                skipped.append(f"{name} ({'no such tensor' if expected is None else 'not a Linear'})")
                continue
            if shape != expected:
                raise ValueError(f"{path}: {name}: got a difference of shape {shape}, expected {expected}; use a "
                                 f"LoRA for a model of this size")
            self.terms.setdefault(name, []).append((path, scale, factors))
            merged.append(name)
        if not merged:
            raise ValueError(f"{path}: got {len(skipped)} differences, none of which fits, the first "
                             f"{next(iter(skipped), 'none')}, expected names such as blocks.0.self_attn.q; use a "
                             f"LoRA for this kind of model")
        self.reads += model_files(path)
        more = f", skipped {len(skipped)}: {skipped[0]}" if skipped else ""
        return f"{path} at {strength:g}: merged into {len(merged)} tensors{more}"

    def merged(self, name, tensor):
        """A tensor with its LoRAs: the sum in float32, rounded once to the tensor's dtype."""
        total = tensor.float()
        for _, scale, factors in self.terms[name]:
            first, *down = (factor.float() for factor in factors)
            total = total.addmm(first, *down, alpha=scale) if down else total.add(first, alpha=scale)
        total = total.to(tensor.dtype)
        if not quant.matrix_amax(total).isfinite():
            files = ", ".join(str(path) for path, _, _ in self.terms[name])
            raise DamagedError(f"{files}: {name}: gives NaN or infinite values, expected finite ones; get an "
                               f"undamaged LoRA, or lower its strength")
        return total


# ----------------------------------------------------------------------------------------------------
# Plan: a format for each weight
# ----------------------------------------------------------------------------------------------------

# The Linears of the blocks hold 98 % of the weights. Of the others, only those in OPTIONAL may be quantized,
# and only on request: every pixel depends on the time layers and the head, and norms, biases and modulation
# are too small to matter.
BLOCK_WEIGHT = re.compile(r"blocks\.([0-9]+)\.(.+)\.weight")
OPTIONAL = re.compile(r"(text_embedding|img_emb)\..+\.weight")

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


def layer_type(name):
    """blocks.3.ffn.0.weight -> ffn.0; other names are returned unchanged."""
    match = BLOCK_WEIGHT.fullmatch(name)
    return match[2] if match else name


def matching(pattern, names, flag):
    """The names in which a regular expression is found, in their order. Raises ValueError if it is invalid or
    finds none."""
    try:
        found = [name for name in names if re.search(pattern, name)]
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{flag} {pattern!r}: not a regular expression ({error})") from None
    if not found:
        raise ValueError(f"{flag} {pattern!r}: matches none of {len(names)} weights, for example {min(names)}")
    return found


def quantizable(shapes):
    """The weights that may be quantized: those of the blocks, and on request those in OPTIONAL."""
    return [name for name, shape in shapes.items()
            if len(shape) == 2 and (BLOCK_WEIGHT.fullmatch(name) or OPTIONAL.fullmatch(name))]


def plan(shapes, base="nvfp4", custom_type=None, custom=None, exclude=None):
    """{name: shape} -> {name: format} for the 2-D weights of the blocks. All other tensors are kept.

    base      the format of weights that no regular expression matches
    custom    regular expression of weights that get custom_type; takes precedence over exclude
    exclude   regular expression of weights that are kept
    """
    allowed = quantizable(shapes)
    formats = {name: base for name in allowed if BLOCK_WEIGHT.fullmatch(name)}
    for name in matching(exclude, shapes, "--exclude-layers") if exclude else ():
        if name in formats:
            formats[name] = "bf16"
    if custom:
        formats |= dict.fromkeys(matching(custom, allowed, "--custom-layers"), custom_type)
    return formats


def mark(formats, names, how="_fpmm"):
    """The formats with these weights marked, if they are quantized: "_fpmm" for full_precision_matrix_mult, or
    "_two_pass"."""
    return {name: fmt + how if name in names and fmt + how in PRINTED else fmt for name, fmt in formats.items()}


def unmarked(fmt):
    """The format in which a weight is stored: "nvfp4" for "nvfp4_fpmm" and "nvfp4_two_pass"."""
    return fmt.removesuffix("_fpmm").removesuffix("_two_pass")


def regex(names):
    """The regular expression of these weights."""
    groups = {}  # {type of layer: blocks}
    for name in names:
        match = BLOCK_WEIGHT.fullmatch(name)
        groups.setdefault(layer_type(name), []).append(match and match[1])
    return "|".join(rf"blocks\.({'|'.join(sorted(blocks, key=int))})\.{re.escape(kind)}\.weight"
                    if blocks[0] else re.escape(kind) for kind, blocks in sorted(groups.items()))


def flags(formats):
    """A plan as flags: all are convert_to_quant's but --fpmm-layers."""
    mxfp8 = [name for name, fmt in formats.items() if unmarked(fmt) == "mxfp8"]
    kept = [name for name, fmt in formats.items() if fmt == "bf16"]
    marked = [name for name, fmt in formats.items() if fmt.endswith("_fpmm")]
    layers = {"--custom-type mxfp8 --custom-layers": mxfp8, "--exclude-layers": kept, "--fpmm-layers": marked}
    return "--nvfp4" + "".join(f' {flag} "{regex(names)}"' for flag, names in layers.items() if names)


# By score: statistics of the weight alone
#
# This is the analysis that made the published recipe (https://github.com/insecure-erasure/quant_probe), with
# MXFP8 in place of its FP8. By their scores alone, a tenth of the weights are kept and some of the next 15 % get
# MXFP8, whatever the model: the thresholds are percentiles of its own scores. Then the verdict on a whole group
# of blocks may overrule those on its weights. The score does not predict the error of NVFP4 on real activations
# (bench/RESULTS.md), which is why plan_by_error exists.

KURTOSIS_KEPT = 8.0  # a weight of this excess kurtosis is kept, whatever its score
LOWEST_MXFP8_SCORE = 0.50
LEAST_SPREAD = 0.06  # groups of blocks whose scores differ by less count as alike
OWN_VERDICT = {"cross_attn.k", "cross_attn.q", "self_attn.k", "self_attn.q"}  # no group overrules these types
ONE_LOWER = {"bf16": "mxfp8", "mxfp8": "nvfp4", "nvfp4": "nvfp4"}


def sensitivity(w):
    """The statistics of a weight (M, K) that its score is made of:

    - excess kurtosis, 0 for a Gaussian: how often one large weight dominates a block's scale
    - dynamic range, max |w| - min |w|
    - aspect ratio, longer side / shorter side
    """
    smallest, largest = w.abs().aminmax()
    x = w.float()  # (M, K)
    x = (x - x.mean()).square_()
    variance = x.sum() / max(x.numel() - 1, 1)
    kurtosis = x.div_(variance).square_().mean().item() - 3 if variance > 0 else 0.0
    return kurtosis, largest.item() - smallest.item(), max(w.shape) / min(w.shape)


def scaled(values, low, high):
    """values, clipped to [low, high], as a share of the way from low to high; 0 if the two are equal."""
    return (values.clamp(low, high) - low) / (high - low) if high > low else torch.zeros_like(values)


def score(measures):
    """{name: sensitivity} -> {name: score}, from 0 to 1.

    Kurtosis counts 0.6, scaled between Tukey's fences of all weights: 1.5 interquartile ranges outside the
    quartiles. Dynamic range counts 0.3 and aspect ratio 0.1, scaled between the smallest and the largest of the
    weight's type of layer.
    """
    kurtosis, ranges, aspects = torch.tensor(list(measures.values()), dtype=torch.float64).T  # (weights,) each
    low, high = kurtosis.quantile(0.25), kurtosis.quantile(0.75)
    fence = 1.5 * (high - low)
    total = 0.6 * scaled(kurtosis, low - fence, high + fence)
    kinds = [layer_type(name) for name in measures]
    for kind in dict.fromkeys(kinds):
        same = torch.tensor([other == kind for other in kinds])
        for share, values in ((0.3, ranges[same]), (0.1, aspects[same])):
            total[same] += share * scaled(values, values.min(), values.max())
    return dict(zip(measures, total.tolist()))


def block_groups(names):
    """Weights of the blocks -> {type of layer: [names in the first blocks, in the middle, in the last]}.

    First and last are a tenth of the blocks each, at least one; groups without blocks are left out.
    """
    blocks = {name: int(BLOCK_WEIGHT.fullmatch(name)[1]) for name in names}
    count = 1 + max(blocks.values())
    n, groups = max(1, round(count / 10)), {}
    for name, block in sorted(blocks.items(), key=lambda item: item[1]):
        place = "first" if block < n else "last" if block >= count - n else "middle"
        groups.setdefault(layer_type(name), {}).setdefault(place, []).append(name)
    return {kind: list(places.values()) for kind, places in groups.items()}


def plan_by_score(scores, kurtosis):
    """{name: score} and {name: excess kurtosis} of the blocks' weights -> {name: format}, and {name: reason} for
    each weight whose format is not that of its own score."""
    values = torch.tensor(list(scores.values()), dtype=torch.float64)
    mxfp8, kept = values.quantile(0.75).item(), values.quantile(0.90).item()

    def by_score(value):
        if value >= kept:
            return "bf16"
        return "mxfp8" if value >= max(mxfp8, LOWEST_MXFP8_SCORE) else "nvfp4"

    def verdict(value, peak):
        return "bf16" if peak >= KURTOSIS_KEPT else by_score(value)

    formats, reasons = {}, {}
    for kind, groups in block_groups(scores).items():
        means = [sum(scores[name] for name in names) / len(names) for names in groups]
        alike = max(means) - min(means) < LEAST_SPREAD
        for names, value in zip(groups, means):
            group, why = verdict(value, max(kurtosis[name] for name in names)), "group"
            if kind in OWN_VERDICT or group == "bf16" and not alike:
                formats |= {name: verdict(scores[name], kurtosis[name]) for name in names}
                why = "kurtosis"
            elif alike and group != "nvfp4":
                formats |= dict.fromkeys(names, ONE_LOWER[group])
                why = "spread"
            else:
                formats |= dict.fromkeys(names, group)
            reasons |= {name: f"{PLAN_FORMATS[formats[name]]} instead of {PLAN_FORMATS[own]}: {why}"
                        for name in names if (own := by_score(scores[name])) != formats[name]}
    return {name: formats[name] for name in scores}, reasons


# By error: the error that each format causes, against its size

def weight_errors(w):
    """{format: relative squared error of the weight}, on 256 of its rows, rounded to nearest."""
    w = w[::math.ceil(len(w) / 256)].float()  # (256, K)
    errors = {"bf16": 0.0}
    for fmt in ("mxfp8", "nvfp4"):
        approximation = dequantize_weight(quantize_weight(w, fmt, method="rtn"), w.shape)
        errors[fmt] = errors[f"{fmt}_fpmm"] = 10 ** (-snr(w, approximation) / 10)
    return errors


def output_errors(w, x):
    """{format: relative squared error of the layer's outputs} for inputs x (R, K). Both sides are quantized, but
    in the formats of --fpmm-layers only the weight."""
    y, errors = x @ w.float().T, {"bf16": 0.0}  # (R, M)
    for stored in ("mxfp8", "nvfp4"):
        tensors = quantize_weight(w, stored)
        for fmt, mode in ((stored, "emulate"), (f"{stored}_fpmm", "dequantize")):
            layer = quant.QuantLinear.from_tensors("weight", tensors, *w.shape[::-1], mode=mode)
            errors[fmt] = 10 ** (-snr(y, layer(x)) / 10)
    return errors


def measure_errors(source, names, calibration, ranks):
    """{name: {format: error}}. Without calibration, the relative squared error of the weight. With it, the
    squared error that the layer's rounding causes in the latents: measured for NVFP4 (gradient_scores), and for
    other formats scaled by the error of the layer's outputs, divided by that of NVFP4."""
    if calibration:
        errors = ((name, output_errors(source.tensor(name).to(calibration.device),
                                       torch.cat(seen[name].rows)[:512]))
                  for seen in calibration.stages() for name in share(seen, source, ranks))
    else:
        errors = in_order(lambda name: weight_errors(source.tensor(name)), share(names, source, ranks))
    errors = joined(tqdm(errors, total=len(names) // ranks.size, desc="measuring", disable=None), names, ranks)
    if not calibration:
        return errors
    scores = calibration.gradient_scores()
    return {name: {fmt: scores.get(name, 0.0) * error / max(own["nvfp4"], 1e-30) for fmt, error in own.items()}
            for name, own in errors.items()}


def plan_by_error(errors, sizes, budget):
    """errors and sizes {name: {format: number}} -> {name: format} of least total error in `budget` bytes.

    Every weight starts in its smallest format. Its next step up is the one that removes most error per byte.
    These steps follow the lower convex hull of error over bytes, so each removes less per byte than the one
    before, and a format off the hull is never the best choice. Taking the steps of all weights in order of
    error per byte, as long as they fit, is optimal except for the last bytes. Raises ValueError if even the
    smallest formats do not fit.
    """
    formats = {name: min(size, key=size.get) for name, size in sizes.items()}
    left = budget - sum(sizes[name][fmt] for name, fmt in formats.items())
    if left < 0:
        raise ValueError(f"plan_by_error: got a budget of {budget} bytes, expected at least {budget - left}")
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
    stuck = set()  # weights with a step that did not fit; they must not skip it
    for _, name, fmt, extra in sorted(steps, reverse=True):
        if extra > left or name in stuck:
            stuck.add(name)
        else:
            formats[name], left = fmt, left - extra
    return formats


FEW_TOKENS = re.compile(r"blocks\.[0-9]+\.cross_attn\.[kv](_img)?\.weight|" + OPTIONAL.pattern)  # prompt, picture


def choose_exact(errors, flops, share, formats):
    """The weights whose inputs should stay unquantized or, which is almost as accurate, be quantized in two
    passes: all that see only the prompt or the picture, which have few tokens, then those that save most error
    per FLOP, up to `share` of all FLOPs.

    errors: {name: {format: error}}, flops: {name: FLOPs}, formats: the plan so far, with no weight marked
    """
    saved = {name: errors[name][fmt] - errors[name][f"{fmt}_fpmm"] for name, fmt in formats.items()
             if fmt != "bf16" and name in flops}
    chosen, left = {name for name in saved if FEW_TOKENS.fullmatch(name)}, share * sum(flops.values())
    for name in sorted(saved.keys() - chosen, key=lambda name: (-saved[name] / flops[name], name)):
        if 0 < saved[name] and flops[name] <= left:
            chosen.add(name)
            left -= flops[name]
    return chosen


def lora_ranks(source, calibration, errors, formats, targets, rank, seed=0):
    """{name: rank} of the absorbing LoRA of `targets`: the ranks of least total error, at most 4 * rank each, in
    as many bytes as if all layers had `rank`. A LoRA is assumed to remove from its layer's error the share of the
    weight's energy that it holds, in the metric of Inputs.lost."""
    left = {}  # {name: {rank: the error that is left}}
    for seen in calibration.stages():
        for name in share(sorted(seen.keys() & targets), source, calibration.ranks):
            fmt = formats[name].replace("_two_pass", "_fpmm")  # two passes are nearly exact
            w = source.tensor(name).to(calibration.device)
            shares = [0.0, *low_rank(w, 4 * rank, seen[name].lost(fmt), seed)[2].tolist()]
            steps = {r for i in range(17) if (r := round(rank * i / 4)) < len(shares)}
            left[name] = {r: errors[name][fmt] * (1 - shares[r]) for r in steps}
    left = joined(left.items(), targets, calibration.ranks)
    sizes = {name: {r: r * sum(source.shapes[name]) for r in steps} for name, steps in left.items()}
    budget = rank * sum(sum(source.shapes[name]) for name in targets)
    return {name: r for name, r in plan_by_error(left, sizes, budget).items() if r}


def lora_targets(args, source, calibration, errors, formats):
    """{name: rank} of the LoRA that the command line asks for."""
    rounded = [name for name, fmt in formats.items() if fmt != "bf16"]
    targets = matching(args.lora_target, rounded, "--lora-target")
    if calibration and args.lora_mode == "absorb":
        return lora_ranks(source, calibration, errors, formats, targets, args.lora_rank, args.seed)
    return dict.fromkeys(targets, args.lora_rank)


def rank_correlation(a, b):
    """Spearman's rank correlation of two sequences of numbers."""
    ranks = [torch.tensor(list(values)).argsort().argsort().double() for values in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def plan_measured(source, errors, scores, by_score, limit, size):
    """The plan of least error in a file of `limit` bytes, by default the size of by_score, the score's plan.
    errors: {name: {format: error}}; size: a function from plans to bytes. Returns {name: format} and lines that
    compare it with the score's plan."""
    sizes = {name: {fmt: stored_bytes(fmt, source.shapes[name], source.dtypes[name]) for fmt in PLAN_FORMATS}
             for name in errors}
    smallest, limit = size(dict.fromkeys(errors, "nvfp4")), limit or size(by_score)
    if limit < smallest:
        raise ValueError(f"--size {gib(limit)}: too small, the smallest formats need {gib(smallest)}")
    others = smallest - sum(sizes[name]["nvfp4"] for name in errors)
    formats = plan_by_error(errors, sizes, limit - others)

    def summary(plan):
        total = sum(error[plan.get(name, "bf16")] for name, error in errors.items())
        return f"{total:.4g} in {gib(size(plan))}"

    correlation = rank_correlation(scores.values(), [errors[name]["nvfp4"] for name in scores])
    return formats, [f"rank correlation of the score with NVFP4's error: {correlation:.2f}",
                     f"sum of the errors: {summary(formats)}; by the score's plan: {summary(by_score)}"]


def scored_plan(source, ranks):
    """The score's plan: {name: format}, {name: score}, and lines on the weights whose score does not decide."""
    names = list(plan(source.shapes))
    measures = in_order(lambda name: sensitivity(source.tensor(name)), share(names, source, ranks))
    measures = tqdm(measures, total=len(names) // ranks.size, desc="analyzing", disable=None)
    measures = joined(measures, names, ranks)
    scores = score(measures)
    formats, reasons = plan_by_score(scores, {name: kurtosis for name, (kurtosis, *_) in measures.items()})
    return formats, scores, list(reason_report(reasons))


def choose_plan(args, source, calibration, errors, made, ranks):
    """The plan that the command line asks for: {name: format}, and lines to print about it. errors: what
    measure_errors returns, where uses_errors(args), otherwise empty."""
    names, notes = quantizable(source.shapes), []
    if names_formats(args):
        formats = plan(source.shapes, args.base or "nvfp4", args.custom_type, args.custom_layers,
                       args.exclude_layers)
    elif args.plan == "recipe":
        formats = plan(source.shapes, "nvfp4", "mxfp8", RECIPE_MXFP8, RECIPE_KEPT)
    else:
        by_score, scores, notes = scored_plan(source, ranks)
        formats = dict.fromkeys(names, "nvfp4") if least_error(args) else by_score

    marked = named = set(matching(args.fpmm_layers, names, "--fpmm-layers")) if args.fpmm_layers else set()
    if calibration and (least_error(args) or args.w4a16 is not None):
        others = {name: fmt for name, fmt in formats.items() if name not in named}
        marked = named | choose_exact(errors, calibration.flops, args.w4a16 or 0.0, others)
    if least_error(args):
        as_marked = {name: {fmt: error[mark({name: fmt}, marked)[name]] for fmt in PLAN_FORMATS}
                     for name, error in errors.items()}
        formats, notes = plan_measured(source, as_marked, scores, by_score, args.size,
                                       lambda plan: planned_size(args, source, mark(plan, marked), made))
    formats = mark(formats, marked)
    if args.two_pass is not None:
        others = {name: fmt for name, fmt in formats.items() if fmt == "nvfp4"}
        formats = mark(formats, choose_exact(errors, calibration.flops, args.two_pass, others), "_two_pass")

    if calibration and errors:
        notes += error_report(errors)
    if kept := [name for name in named if formats.get(name, "bf16") == "bf16"]:
        notes.append(f"--fpmm-layers: {len(kept)} of the {len(named)} layers are kept, so they are not marked")
    return formats, notes


# ----------------------------------------------------------------------------------------------------
# Round: one weight to its stored tensors
# ----------------------------------------------------------------------------------------------------
#
# A layer's output is off by x E^T, where E = W - Q (M, K) is the error of its weights. Averaged over inputs x
# with second moment H = mean(x^T x), the squared error is tr(E H E^T): each row e of E contributes e H e^T,
# independently of the others. Without inputs, H is the identity, and all there is to choose is the best scale
# for each block (quant.py searches). With inputs, the columns are rounded one after another, and each
# compensates for the errors of those before it:
#
#     H = N diag(D) N^T, N unit upper triangular      so      e H e^T = sum_j D_j (e_j + sum_{k<j} N_kj e_k)^2
#
# Once the columns k < j are rounded, term j is smallest if q_j is the value nearest to w_j + sum_k N_kj e_k,
# and the remaining difference costs D_j times its square. This is GPTQ (Frantar et al. 2022,
# https://arxiv.org/abs/2210.17323), which computes the same numbers from the inverse of H. Here the scale of
# each block is chosen along the way: ten candidate scales run through the block's columns side by side, and
# the one with the smallest sum of terms is kept.
#
# The first columns know nothing of those after them, so sweeps follow: each block is rounded again while all
# others are fixed. Then e H e^T is a parabola in the block's q with its minimum at q + H_bb^-1 (H e)_b, of the
# form above with H_bb in place of H. A row takes the new codes only if they cost less, so the error never
# rises.
#
# Biases are not changed. convert_to_quant corrects them by the mean of E x over random inputs x; these have
# mean zero, so the correction is zero too, up to noise.

NUM_ITER = 4  # sweeps; the first removes a tenth of the error, four a seventh, all later ones a hundredth
DAMPING = 0.01  # added to the diagonal of H, whose mean is 1: an allowance for inputs that were not seen


def damped(hessian):
    """hessian (K, K) -> float64, scaled to a mean diagonal of 1, with DAMPING added."""
    h = hessian.double() / hessian.diagonal().double().mean().clamp(min=1e-30)
    h.diagonal().add_(DAMPING)
    return h


def factor(h):
    """Symmetric positive h (..., n, n) -> N (..., n, n) unit upper triangular, D (..., n): h = N diag(D) N^T.

    Cholesky gives a lower triangle; flipping both axes before and after turns it into an upper one.
    """
    root = torch.linalg.cholesky(h.flip(-1, -2)).flip(-1, -2)
    d = root.diagonal(dim1=-2, dim2=-1).clone()
    return root.div_(d[..., None, :]).float(), d.square().float()


def candidate_scales(fmt, amax, tensor_scale):
    """Block amax (M,) -> candidates for the stored scale byte (C, M), and the float32 scales (C, M).

    The best E4M3 scale maps the largest weight to between 3.5 and 7.3, an octave; the best E8M0 scale is the
    smallest that avoids clipping, or half of that.
    """
    if fmt == "nvfp4":
        first = (amax / 7.3 / tensor_scale).clamp_(max=quant.E4M3_MAX).to(torch.float8_e4m3fn)
        byte = first.view(torch.uint8) + torch.arange(10, dtype=torch.uint8, device=amax.device)[:, None]
        byte = byte.clamp_(1, 126)  # from the smallest scale to 448
        return byte, byte.view(torch.float8_e4m3fn).float() * tensor_scale
    exponent = torch.log2((amax / quant.E4M3_MAX).clamp_(min=2.0 ** -125)).ceil_().to(torch.int32)
    byte = torch.stack((exponent, exponent - 1)).add_(127).to(torch.uint8)
    return byte, torch.exp2(byte.float() - 127)


def nearest(fmt, x):
    """x, already divided by its scale -> the nearest representable values, as floats."""
    if fmt == "nvfp4":
        return quant.round_e2m1(x.abs()).copysign_(x)
    return x.clamp_(-quant.E4M3_MAX, quant.E4M3_MAX).to(torch.float8_e4m3fn).float()


def round_block(fmt, target, n, d, tensor_scale):
    """Round one block of columns, target (B, M), under the metric n diag(d) n^T -> scale bytes (M,), q (B, M),
    cost (M,)."""
    byte, scale = candidate_scales(fmt, target.abs().amax(0), tensor_scale)  # (C, M)
    q = target.new_empty(len(target), *scale.shape)  # (B, C, M)
    error, cost = torch.empty_like(q), torch.zeros_like(scale)
    for j in range(len(target)):
        x = target[j] + torch.tensordot(n[:j, j], error[:j], 1)  # (C, M)
        q[j] = nearest(fmt, x / scale) * scale
        error[j] = target[j] - q[j]
        cost += d[j] * (x - q[j]).square_()
    best = cost.argmin(0, keepdim=True)  # (1, M)
    q = q.gather(1, best.expand(len(target), 1, -1))[:, 0]  # (B, M)
    return byte.gather(0, best)[0], q, cost.gather(0, best)[0]


def round_once(fmt, w, h, tensor_scale):
    """Round w (K, M) block after block, each compensating for those before it -> scale bytes (N, M), q (K, M)."""
    size = quant.BLOCK[fmt]
    q, error = torch.zeros_like(w), torch.zeros_like(w)  # (K, M)
    scale_bytes = torch.zeros(len(w) // size, w.shape[1], dtype=torch.uint8, device=w.device)  # (N, M)
    n, d = factor(h)
    for i in range(len(scale_bytes)):
        b = slice(i * size, (i + 1) * size)
        target = w[b] + n[:b.start, b].T @ error[:b.start]  # (B, M)
        scale_bytes[i], q[b], _ = round_block(fmt, target, n[b, b], d[b], tensor_scale)
        error[b] = w[b] - q[b]
    return scale_bytes, q


def sweep(fmt, w, h, tensor_scale, scale_bytes, q, num_iter):
    """Round every block again with all others fixed, at most num_iter times; updates scale_bytes and q."""
    size = quant.BLOCK[fmt]
    own = torch.stack([h[i:i + size, i:i + size] for i in range(0, len(h), size)])  # (N, B, B)
    n, d = factor(own)
    h, inverse, error = h.float(), torch.linalg.inv(own).float(), w - q
    for _ in range(num_iter):
        changed = False
        for i in range(len(scale_bytes)):
            b = slice(i * size, (i + 1) * size)
            step = inverse[i] @ (h[b] @ error)  # (B, M), from q to the minimum of the parabola
            byte, new, cost = round_block(fmt, q[b] + step, n[i], d[i], tensor_scale)
            better = cost < 0.99999 * ((n[i].T @ step).square_() * d[i][:, None]).sum(0)  # (M,)
            scale_bytes[i] = torch.where(better, byte, scale_bytes[i])
            q[b] = torch.where(better, new, q[b])
            error[b] = w[b] - q[b]
            changed |= better.any().item()
        if not changed:
            break


def round_compensated(w, fmt, hessian, num_iter):
    """As quant.quantize_nvfp4 or quantize_mxfp8, but for the least tr(E H E^T)."""
    expected = (w.shape[1], w.shape[1])
    if tuple(hessian.shape) != expected or not hessian.isfinite().all():
        raise ValueError(f"quantize_weight: got hessian {tuple(hessian.shape)}, expected {expected}, all finite")
    if not w.isfinite().all():
        raise ValueError("quantize_weight: got NaN or infinite values, expected finite ones")
    tensor_scale = quant.quantize_nvfp4(w)[2] if fmt == "nvfp4" else None
    size = quant.BLOCK[fmt]
    w = F.pad(w.float(), (0, -w.shape[1] % size, 0, -w.shape[0] % size)).T.contiguous()  # (K, M)
    h = damped(F.pad(hessian.double(), (0, len(w) - len(hessian)) * 2))  # (K, K)
    blocks = len(w) // size

    # The blocks that matter most come first, while most columns are left to compensate.
    order = h.diagonal().view(blocks, size).sum(1).argsort(descending=True)  # (N,)
    columns = (order[:, None] * size + torch.arange(size, device=w.device)).flatten()  # (K,)
    w, h = w[columns], h[columns][:, columns]
    scale_bytes, q = round_once(fmt, w, h, tensor_scale)
    sweep(fmt, w, h, tensor_scale, scale_bytes, q, num_iter)

    values, scales = torch.empty_like(q), torch.empty_like(scale_bytes)
    values[columns], scales[order] = q, scale_bytes  # back to the weight's own order
    values, scales = values.T.reshape(-1, blocks, size), scales.T.contiguous()  # (M, N, B), (M, N)
    if fmt == "mxfp8":
        data = quant.encode_mxfp8(values, torch.exp2(scales.float() - 127)).flatten(1)  # (M, K)
        return data, quant.swizzle(scales)
    scales = scales.view(torch.float8_e4m3fn)
    data = quant.pack_e2m1(quant.encode_nvfp4(values, scales.float() * tensor_scale)).flatten(1)  # (M, K/2)
    return data, quant.swizzle(scales), tensor_scale


@torch.no_grad()
def quantize_weight(w, fmt, hessian=None, method="search", num_iter=NUM_ITER) -> dict[str, torch.Tensor]:
    """A weight (M, K) -> its stored tensors by suffix, as QuantLinear.from_tensors takes them.

    fmt        "nvfp4", "mxfp8", or "bf16": returned unchanged
    hessian    (K, K), the second moment x^T x of the layer's inputs, of any scale: minimizes the error of the
               outputs; method is then ignored
    method     "search": block scales of least squared error; "rtn": from the largest weight of each block
    num_iter   with a Hessian, the maximum number of sweeps after the first rounding

    Raises ValueError for an unknown format, shapes that do not fit, and values that are not finite.
    """
    if fmt == "bf16":
        return {"weight": w}
    if fmt not in PLAN_FORMATS:
        raise ValueError(f"quantize_weight: got format {fmt!r}, expected one of {', '.join(PLAN_FORMATS)}")
    if hessian is not None:
        stored = round_compensated(w, fmt, hessian, num_iter)
    elif fmt == "nvfp4":
        stored = quant.quantize_nvfp4(w, method=method)
    else:
        stored = quant.quantize_mxfp8(w, method)
    stored = dict(zip(("weight", "weight_scale", "weight_scale_2"), stored))
    return stored | {"comfy_quant": quant.write_marker(marker(fmt, w.shape, w.dtype))}


def dequantize_weight(stored, shape) -> torch.Tensor:
    """The inverse of quantize_weight: stored tensors -> (M, K) float32."""
    layer = quant.QuantLinear.from_tensors("weight", stored, shape[1], shape[0])
    return layer.dequantized(torch.float32)


def marker(fmt, shape, dtype):
    """What L.comfy_quant and the header say about a layer, with the keys of convert_to_quant."""
    stored = unmarked(fmt)
    info = {"format": stored, "group_size": quant.BLOCK[stored], "orig_dtype": str(dtype),
            "orig_shape": list(shape)}
    if fmt.endswith("_fpmm"):
        info["full_precision_matrix_mult"] = True
    if fmt.endswith("_two_pass"):
        info["two_pass"] = True
    return info


def snr(w, approximation, hessian=None) -> float:
    """Signal-to-noise ratio in dB, infinite without noise. With a Hessian, that of the layer's outputs."""
    signal = noise = 0.0
    for i in range(0, len(w), 512):  # a few rows at a time: no second copy of w in float32
        x, y = w[i:i + 512].float(), approximation[i:i + 512]
        signal, noise = signal + energy(x, hessian), noise + energy(x - y, hessian)
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf


def energy(x, hessian):
    """tr(x H x^T): each row in float32, which is fast; the sum over rows in float64, which is accurate."""
    squares = x.square() if hessian is None else (x @ hessian).mul_(x)
    return squares.sum(1).double().sum().item()


def as_nvfp4(x, tensor_scale=None):
    """x (R, K) rounded to NVFP4, as activations are."""
    return quant.dequantize_nvfp4(*quant.quantize_nvfp4(x, tensor_scale), shape=tuple(x.shape))


def pre_quant_scale(w, seen):
    """Factors (K,) that multiply the channels of the inputs and divide those of w (M, K): of a grid of powers of
    the channels' magnitudes in both, the ones with the least error of the outputs, both in NVFP4."""
    x, w, least = torch.cat(seen.rows)[:512].to(w.device), w.float(), math.inf  # (R, K), (M, K)
    y = x @ w.T  # (R, M)
    by_x, by_w = (side.square().mean(0).sqrt().clamp(min=1e-9).log() for side in (x, w))  # (K,) each
    for a, b in itertools.product((0, 0.25, 0.5, 0.75), (0, 0.25, 0.5)):
        log = b * by_w - a * by_x  # (K,)
        scale = (log - log.mean()).clamp(-7, 7).exp().bfloat16().float()  # (K,)
        rounded = dequantize_weight(quantize_weight(w / scale, "nvfp4", method="rtn"), w.shape)
        error = (as_nvfp4(x * scale) @ rounded.T - y).square().sum().item()
        if error < least:
            best, least = scale, error
    return best


# ----------------------------------------------------------------------------------------------------
# LoRA: a low-rank correction of W - Q
# ----------------------------------------------------------------------------------------------------
#
# The LoRA runs beside the layer, y = Q x + up (down x), and must not be merged: the sum would have to be
# rounded again, which undoes the correction. Rounding errors are nearly white, so rank 64 of 5120 holds about
# 4 % of their energy. With a Hessian, the energy is that of the output error, which is concentrated in far
# fewer directions.
#
# Mode "absorb" goes further: the best rank-r part of the weight itself is subtracted before rounding, so a
# smaller matrix is rounded, with a smaller error (SVDQuant, Li et al. 2024, https://arxiv.org/abs/2411.05007).
# The factors are then those of W - Q: the part that was subtracted and some of the rounding error. The
# checkpoint is useless without them. After calibration, "best" is what keeps most of the outputs' energy that
# rounding the inputs loses (Inputs.lost), and the ranks differ between layers (lora_ranks).

RECIPE_TARGET = r"ffn\.(0|2)\.weight|self_attn\.(v|o)\.weight"


@torch.no_grad()
def low_rank(error, rank, hessian=None, seed=0):
    """error = W - Q (M, K) -> up (M, r), down (r, K), and the shares (r,) of the energy of `error` in the first
    1, 2, ..., r of their columns and rows.

    r = min(rank, M, K). With a Hessian H = C C^T of the inputs, the energy is |error C|^2 = tr(E H E^T), and
    the best factors are those of the SVD of error C, with down multiplied by C^-1. The SVD is exact for small
    matrices, otherwise randomized (Halko et al. 2011, https://arxiv.org/abs/0909.4061, algorithm 4.4).
    """
    error, rank = error.float(), min(rank, *error.shape)
    root = None if hessian is None else torch.linalg.cholesky(damped(hessian)).float()  # C (K, K)
    scaled = error if root is None else error @ root
    if min(error.shape) <= max(512, rank + 16):
        u, s, v = torch.linalg.svd(scaled, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)  # the global one is shared between threads
        start = torch.randn(scaled.shape[1], rank + 16, generator=generator).to(scaled)  # (K, r + 16)
        basis = torch.linalg.qr(scaled @ start).Q  # (M, r + 16)
        for _ in range(6):
            basis = torch.linalg.qr(scaled @ torch.linalg.qr(scaled.T @ basis).Q).Q
        u, s, v = torch.linalg.svd(basis.T @ scaled, full_matrices=False)
        u = basis @ u
    u, s, down = u[:, :rank], s[:rank], v[:rank]  # (M, r), (r,), (r, K)
    total = torch.linalg.vector_norm(scaled, dim=1).double().square().sum().clamp(min=1e-300)
    shares = s.double().square().cumsum(0) / total
    if root is not None:
        down = torch.linalg.solve_triangular(root, down, upper=False, left=False)
    balance = s.sqrt()  # both factors of the same magnitude, within the range of their dtype
    return u * balance, down * balance[:, None], shares


DIFFERENCES = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}  # parameter -> ending in a LoRA file


def lora_names(name):
    """A weight's tensors in a LoRA file, by ComfyUI's names: up, down, alpha."""
    prefix = "diffusion_model." + name.removesuffix(".weight")
    return f"{prefix}.lora_up.weight", f"{prefix}.lora_down.weight", f"{prefix}.alpha"


def lora_layout(shapes, targets):
    """The tensors of a LoRA file for targets {weight: rank}: {name: (dtype, shape)}."""
    tensors = {}
    for name, rank in targets.items():
        m, k = shapes[name]
        r = min(rank, m, k)
        up, down, alpha = lora_names(name)
        tensors |= {up: (torch.bfloat16, (m, r)), down: (torch.bfloat16, (r, k)), alpha: (torch.float32, ())}
    return tensors


# ----------------------------------------------------------------------------------------------------
# Calibrate: what each layer is fed
# ----------------------------------------------------------------------------------------------------
#
# The pipeline runs on pictures with the recipe's four steps and the unquantized model, which gives the DiT's
# inputs at the four timesteps. Then the DiT runs on all of them together, one block at a time: record what
# each layer of the block is fed, round the block, and feed the next block with the outputs of the rounded one.
# So each block is rounded with the errors of those before it in its inputs. Memory holds one block and the
# tokens of all inputs. A measured plan, --w4a16, --two-pass and absorbing LoRAs need passes through the
# unquantized model before that: one for the errors of each layer's outputs, one with gradients for their effect
# on the latents.

HEADROOM = 2  # of a fixed activation scale over the largest input seen: a power of two costs nothing


class Inputs:
    """What one layer is fed: second moment (K, K), largest magnitude, a sample of the rows (R, K), and the
    squared error of each channel when the rows are rounded to NVFP4 (K,)."""

    def __init__(self, samples, forwards, steps):
        self.share, self.forwards, self.steps = math.ceil(samples / forwards), forwards, steps
        self.moment, self.noise, self.amax, self.count, self.rows = 0, 0, 0.0, 0, []

    def add(self, x):
        """Record the rows of x (R, K), at most `share` of them, evenly spaced."""
        self.amax = max(self.amax, x.abs().amax().item())
        x = x[::math.ceil(len(x) / self.share)].float()
        self.moment, self.count = self.moment + x.T @ x, self.count + len(x)
        self.noise = self.noise + (as_nvfp4(x) - x).square().sum(0)
        self.rows.append(x[::math.ceil(len(x) * self.forwards / 512)].clone())  # a view would keep all of x

    def merge(self, ranks):
        """Add what the layer is fed in the other ranks."""
        if ranks.size > 1:
            parts = ranks.gather((self.amax, self.count, torch.cat(self.rows).cpu()))
            amaxes, counts, rows = zip(*parts)
            self.amax, self.count = max(amaxes), sum(counts)
            self.moment, self.noise = ranks.sum(self.moment), ranks.sum(self.noise)
            self.rows = [part.to(self.moment.device) for part in rows]

    def hessian(self):
        """The second moment, shrunk toward a multiple of the identity by oracle approximating shrinkage (Chen
        et al. 2010, https://arxiv.org/abs/0907.4698): a prompt has only a dozen tokens, and the weight must
        work for all others too. The inputs of different timesteps resemble each other, so they count once.
        """
        h, k, n = self.moment / self.count, len(self.moment), self.count / self.steps
        trace = h.diagonal().double().sum().item()
        square = torch.linalg.vector_norm(h, dim=1).double().square().sum().item()
        spread = (n + 1) * (square - trace ** 2 / k)
        rho = min(1.0, (square + trace ** 2) / spread) if spread > 0 else 1.0
        h = h * (1 - rho)
        h.diagonal().add_(rho * trace / k)
        return h

    def lost(self, fmt):
        """The second moment (K, K) of the part of x that cannot be predicted from the rounded inputs Q(x): of
        x - A Q(x), A being the linear regression of x on Q(x). Rounding errors are taken as uncorrelated between
        channels and with x; with their diagonal second moment E, the result is H - H (H + E)^-1 H. For inputs
        that are not quantized, it is H itself, because only the weight is rounded."""
        h = self.hessian()
        if fmt != "nvfp4":
            return h
        noise = torch.diag(self.noise / self.count)
        lost = h @ torch.linalg.solve(h + noise, noise)
        return (lost + lost.T) / 2


class Calibration:
    """The DiT, one block at a time: velocity() records its inputs; stages() and gradient_scores() run on all
    those recorded."""

    def __init__(self, source, samples, steps, device="cpu", ranks=wan_fp4.Ranks()):
        self.source, self.samples, self.steps, self.device = source, samples, steps, torch.device(device)
        self.ranks = ranks  # each has the inputs of its own pictures
        first = {name: source.tensor(name) for name in source.shapes
                 if not name.startswith("blocks.") or name.startswith("blocks.0.")}
        self.dit = wan_fp4.dit_from_tensors(first, source.metadata, source.path, self.device)
        self.num_blocks = wan_fp4.count(source.shapes, "blocks.")
        self.inputs = []  # arguments of WanDiT.prepare
        self.attention_losses = torch.zeros(self.num_blocks, 2)  # of E4M3; of rounding the output to NVFP4
        self.flops = Counter()  # of each weight: set by gradient_scores

    def block(self, i):
        """Block i of the source, loaded each time: none stays in memory."""
        prefix = f"blocks.{i}."
        tensors = {name.removeprefix(prefix): self.source.tensor(name)
                   for name in self.source.shapes if name.startswith(prefix)}
        with torch.device("meta"):
            block = wan_fp4.Block(self.dit.cfg)
        return wan_fp4.load_weights(block, tensors, self.source.path, self.device, self.dit.dtype)

    def velocity(self, x, sigma, conditions, progress):
        """WanDiT.forward, block by block; records its inputs and calls progress() after each block."""
        t = torch.full((1,), 1000 * sigma, device=self.device)
        inputs = x, t, conditions.text, conditions.image, conditions.y
        self.inputs.append(moved(inputs, "cpu"))
        tokens, e, context = self.dit.prepare(*inputs)
        for i in range(self.num_blocks):
            block = self.block(i)
            block.self_attn.attention = functools.partial(self.attention, i)
            tokens = block(tokens, *context)
            progress()
        return self.dit.unpatchify(self.dit.head(tokens, e), x.shape[2:])

    def attention(self, i, q, k, v):
        """Self-attention of block i; adds up what some of its rows would lose in E4M3, and in NVFP4."""
        y = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, d)
        few = slice(None, None, math.ceil(q.shape[2] / 64))
        exact = y[:, :, few].float()  # (B, heads, 64, d)
        rows = wan_fp4.join_heads(exact).flatten(0, 1)  # (B * 64, D)
        losses = wan_fp4.fp8_attention(q[:, :, few], k, v) - exact, as_nvfp4(rows) - rows
        self.attention_losses[i] += torch.stack([x.square().sum() / rows.square().sum() for x in losses]).cpu()
        return y

    def sensitive_attention(self):
        """The blocks whose self-attention loses more in E4M3 than the next layer's rounding to NVFP4 does."""
        e4m3, nvfp4 = self.attention_losses.T
        return (e4m3 > nvfp4).nonzero().flatten().tolist()

    def gradient_scores(self, draws=4):
        """{weight name: squared error of the latents when only this layer's weight and inputs are in NVFP4}, the
        mean over all recorded inputs. Also counts self.flops, {weight name: FLOPs of all of them}.

        If a layer's outputs are off by delta, the velocity is off by J delta to first order, J being its Jacobian
        with respect to these outputs. For random signs v, the mean of (v^T J delta)^2 is |J delta|^2 (Hutchinson
        1990), and backpropagating v gives v^T J. The latents are off by sigma times that. Each block is computed
        again on the way back: memory holds the activations of one block; the tokens between blocks are in CPU
        memory.
        """
        scores, self.flops = Counter(), Counter()
        for number, inputs in enumerate(self.inputs):
            picture = self.ranks.rank + number // self.steps * self.ranks.size
            generator = torch.Generator().manual_seed(picture * self.steps + number % self.steps)
            (x, t, *features, y), states = moved(inputs, self.device), []
            with torch.no_grad():
                tokens, e, (e0, rope, text, text_bias, image) = self.dit.prepare(x, t, *features, y)
                for i in range(self.num_blocks):
                    states.append(tokens.to("cpu", torch.bfloat16))
                    tokens = self.block(i)(tokens, e0, rope, text, text_bias, image)

            def last(tokens):
                return self.dit.unpatchify(self.dit.head(tokens, e), x.shape[2:]),

            signs = [(torch.randn(x.shape, generator=generator).sign() * t.cpu() / 1000,) for _ in range(draws)]
            signs = self.backward(last, [tokens], signs, self.dit, "", scores)
            to_context = [(0, 0)] * draws  # the gradients of text and image
            for i in reversed(range(self.num_blocks)):
                block = self.block(i)

                def forward(tokens, text, image):
                    return block(tokens, e0, rope, text, text_bias, image),

                leaves = [states.pop().to(self.device, torch.float32), text, image]
                signs = self.backward(forward, leaves, [s[:1] for s in signs], block, f"blocks.{i}.", scores)
                to_context = [(a + s[1], b + s[2]) for (a, b), s in zip(to_context, signs)]

            def embed(text, image):
                _, _, (_, _, text, _, image) = self.dit.prepare(x, t, text, image, y)
                return text, image

            self.backward(embed, [x.clone() for x in features], to_context, self.dit, "", scores)
        forwards = sum(self.ranks.gather(len(self.inputs)))
        scores, self.flops = (sum(self.ranks.gather(counts), Counter()) for counts in (scores, self.flops))
        return {name: score / (draws * forwards) for name, score in scores.items()}

    def backward(self, forward, leaves, gradients, module, prefix, scores):
        """Backpropagate through forward, which returns a tuple of outputs. gradients: of these outputs, a tuple
        for each draw. Returns those of the leaves in the same way, in CPU memory. For each of the module's
        Linears, adds to scores (v^T J delta)^2 of gradient_scores, summed over the draws, and counts its FLOPs.
        """
        cramped = self.cramped(leaves[0])
        store = "cpu" if cramped else self.device

        def parts(x):  # a few rows at a time: less memory
            return x.flatten(0, -2).split(4096)

        @torch.no_grad()
        def record(name, layer, args, y):
            tensors = quantize_weight(layer.weight, "nvfp4", method="rtn")
            tensors |= {} if layer.bias is None else {"bias": layer.bias}
            rounded = quant.QuantLinear.from_tensors(name, tensors, layer.in_features, layer.out_features,
                                                     compute_dtype=y.dtype, mode="dequantize")
            scale = quant.nvfp4_tensor_scale(args[0].abs().amax().float())  # of all parts
            errors = [moved(rounded(as_nvfp4(x, scale).to(y.dtype)) - exact, store)
                      for x, exact in zip(parts(args[0]), parts(y))]
            y.register_hook(functools.partial(add_score, name, errors))
            self.flops[name] += 2 * y.numel() * layer.in_features

        def add_score(name, errors, g):
            scores[name] += sum((a.float() * b.to(a)).sum().item() for a, b in zip(parts(g), errors)) ** 2

        hooks = [layer.register_forward_hook(functools.partial(record, name))
                 for name, layer in linears(module, prefix)]
        with torch.enable_grad(), torch.autograd.graph.save_on_cpu() if cramped else nullcontext():
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            results = forward(*leaves)
        for hook in hooks:
            hook.remove()
        grad = functools.partial(torch.autograd.grad, results, leaves, retain_graph=True)
        return [moved(grad(moved(gradient, self.device)), "cpu") for gradient in gradients]

    def cramped(self, tokens):
        """Whether a block's activations do not fit the GPU, so that CPU memory keeps them for the gradients."""
        return self.device.type == "cuda" and torch.cuda.mem_get_info(self.device)[0] < 32 * tokens.nbytes

    @torch.no_grad()
    def stages(self):
        """Yields {weight name: Inputs} for the embeddings, then for each block. Weights given to replace()
        before the next stage is requested compute that stage's inputs."""
        states = yield from self.stage(self.dit, "", self.dit.prepare, self.inputs)
        tokens, contexts = [state[0] for state in states], [state[2] for state in states]
        for i in range(self.num_blocks):
            block, inputs = self.block(i), [(x, *context) for x, context in zip(tokens, contexts)]
            tokens = yield from self.stage(block, f"blocks.{i}.", block, inputs)

    def stage(self, module, prefix, forward, inputs):
        """Yields what the module's layers are fed by forward(*args), args in inputs; returns the outputs with the
        layers replaced. Inputs and outputs stay in CPU memory: at full size, the tokens of a picture's steps take
        2.7 GB."""
        def run():
            return [moved(forward(*moved(args, self.device)), "cpu") for args in inputs]

        self.module, self.prefix, self.replaced = module, prefix, False
        seen, outputs = self.observe(module, prefix, run)
        yield seen
        return run() if self.replaced else outputs

    def observe(self, module, prefix, run):
        """{weight name: Inputs} of what run() feeds the module's Linears, and what it returns."""
        seen, last = {}, (None, None)
        forwards = sum(self.ranks.gather(len(self.inputs)))

        def record(name, layer, args):
            nonlocal last
            x = args[0]
            if x is last[0]:  # q, k and v are fed the same tensor: one second moment for all three
                seen[name] = last[1]
                return
            if name not in seen:
                seen[name] = Inputs(self.samples, forwards, self.steps)
            seen[name].add(x.flatten(0, -2))
            last = x, seen[name]

        hooks = [layer.register_forward_pre_hook(functools.partial(record, name))
                 for name, layer in linears(module, prefix)]
        outputs = run()
        for hook in hooks:
            hook.remove()
        for inputs in dict.fromkeys(seen.values()):  # each once: q, k and v have theirs in common
            inputs.merge(self.ranks)
        return seen, outputs

    def replace(self, name, stored, factors=()):
        """Give a weight of this stage other stored tensors, and optionally a LoRA's up and down beside it."""
        layer = name.removesuffix(".weight")
        place = layer.removeprefix(self.prefix)
        old = self.module.get_submodule(place)
        tensors = stored if old.bias is None else stored | {"bias": old.bias}
        new = quant.QuantLinear.from_tensors(
            layer, {suffix: tensor.to(self.device) for suffix, tensor in tensors.items()}, old.in_features,
            old.out_features, compute_dtype=self.dit.dtype, mode="dequantize")
        if factors:
            new.attach_lora(*(factor.to(self.device) for factor in factors))
        self.module.set_submodule(place, new)
        self.replaced = True


def linears(module, prefix):
    """Yields (weight name, layer) of the Linears that may be quantized: of a block, or of the DiT (prefix "")."""
    for name, layer in module.named_modules():
        weight = f"{prefix}{name}.weight"
        if isinstance(layer, quant.QuantLinear) and (prefix or OPTIONAL.fullmatch(weight)):
            yield weight, layer


def moved(value, device):
    """A tensor, or a tuple of them and of further tuples, on another device."""
    return value.to(device) if isinstance(value, torch.Tensor) else tuple(moved(v, device) for v in value)


def find_encoders(source, named=(), models=None):
    """{network: file} for calibrate: those named, others from the folder `models`, or else the demo's. Raises
    what sample.find_files raises."""
    import sample
    named = dict.fromkeys(sample.NETWORKS) | dict(named)
    if models or any(named.values()) or (sample.HERE / "models").is_dir():
        named["dit"] = source.files[0]  # the model that is converted
    return sample.find_files(named, models)[0]


def caption_file(picture):
    return Path(picture).parent / f"{Path(picture).stem}.txt"


def calibration_files(pictures, encoders):
    """Every file that calibrate reads, whether it exists or not."""
    files = [file for encoder in encoders.values() for file in model_files(encoder)]
    files.append(encoders["text-encoder"].parent / "spiece.model")
    return [*files, *map(Path, pictures), *map(caption_file, pictures)]


def calibrate(source, pictures, encoders=None, samples=8192, seed=0, device="cpu",
              ranks=wan_fp4.Ranks()) -> Calibration:
    """Sample a video from each picture and record the DiT's inputs at every step.

    A picture's prompt is the text file beside it, or else the prompt in the source's header. encoders: as
    find_encoders gives them. Raises what sample.py and the loaders raise, and ValueError if the encoders do not
    fit the model.
    """
    import sample

    if len(pictures) < ranks.size:
        raise ValueError(f"--calib: got fewer pictures ({len(pictures)}) than ranks ({ranks.size}), expected at "
                         f"least one for each; give more, or lower torchrun's --nproc-per-node")
    files = encoders or find_encoders(source)
    frames, area = (sample.own_number(source.metadata, key, source.path) for key in ("frames", "area"))
    settings = sample.Settings(frames=frames, area=area, seed=seed, device=device)
    images = [sample.read_image(path, settings) for path in pictures]
    captions = [caption_file(path) for path in pictures]
    prompts = [(caption.read_text("utf-8") if caption.exists() else source.metadata.get("prompt", "")).strip()
               for caption in captions]
    levels = sample.sigmas(settings.scheduler, settings.steps, settings.shift)

    calibration = Calibration(source, samples, settings.steps, device, ranks)
    source.reads += calibration_files(pictures, files)
    conditions = ranks.once(lambda: sample.encode_conditions(images, prompts, files, settings))
    cfg, conditions = calibration.dit.cfg, conditions[ranks.rank::ranks.size]
    widths = conditions[0].text.shape[2], conditions[0].image.shape[2]
    if widths != (cfg.text_dim, cfg.image_dim):
        raise ValueError(f"--calib: {files['text-encoder']} and {files['clip']}: got features of width "
                         f"{widths[0]} and {widths[1]}, expected {cfg.text_dim} and {cfg.image_dim} for this "
                         f"model; give the folder of its own encoders with --models")
    total = len(conditions) * settings.steps * calibration.num_blocks
    with tqdm(total=total, desc="sampling", unit="block", disable=None) as progress:
        for c in conditions:
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn((1, 16, *c.y.shape[2:]), generator=generator).to(device)
            sample.sample_latents(lambda x, sigma: calibration.velocity(x, sigma, c, progress.update), noise,
                                  levels, settings.sampler, generator)
    calibration.attention_losses = ranks.sum(calibration.attention_losses) / (len(pictures) * settings.steps)
    return calibration


# ----------------------------------------------------------------------------------------------------
# Write: a safetensors file, one tensor at a time
# ----------------------------------------------------------------------------------------------------

@functools.cache
def stored_layout(fmt, shape, dtype):
    """What quantize_weight makes of such a weight: {suffix: (dtype, shape)}."""
    if fmt == "bf16":
        return {"weight": (dtype, shape)}
    required, _ = quant.stored_tensors(unmarked(fmt), *shape[::-1])
    stored = {suffix: (dtypes[0], stored_shape) for suffix, (dtypes, stored_shape, _) in required.items()}
    return stored | {"comfy_quant": (torch.uint8, tuple(quant.write_marker(marker(fmt, shape, dtype)).shape))}


def stored_bytes(fmt, shape, dtype):
    return sum(math.prod(s) * d.itemsize for d, s in stored_layout(fmt, shape, dtype).values())


def layout(source, formats, static=False, pre_quant=False):
    """The tensors of the converted file: {name: (dtype, shape)}. static, pre_quant: whether NVFP4 layers get an
    input_scale, and a pre_quant_scale."""
    tensors = {}
    for name, shape in source.shapes.items():
        layer, dot, suffix = name.rpartition(".")
        stored = stored_layout(formats.get(name, "bf16"), shape, source.dtypes[name])
        for new, tensor in stored.items():
            tensors[layer + dot + (suffix if new == "weight" else new)] = tensor
        if formats.get(name) == "nvfp4":
            tensors |= {f"{layer}.input_scale": (torch.float32, ())} if static else {}
            tensors |= {f"{layer}.pre_quant_scale": (torch.bfloat16, shape[1:])} if pre_quant else {}
    return tensors


def metadata(source, formats, made):
    """The converted file's header entries: the source's, those on how it was made, and all markers."""
    markers = {name.removesuffix(".weight"): marker(fmt, source.shapes[name], source.dtypes[name])
               for name, fmt in formats.items() if fmt != "bf16"}
    layers = json.dumps({"format_version": "1.0", "layers": markers})
    return source.metadata | made | {"_quantization_metadata": layers}


def header(tensors, metadata):
    """{name: (dtype, shape)} and {key: text} -> the file's first bytes, {name: offset}, the file's size.

    A safetensors file (https://github.com/huggingface/safetensors#format) is the length of the JSON in 8
    bytes, the JSON, and the bytes of the tensors. The largest dtypes come first and the JSON is padded with
    spaces, so that every tensor is aligned to its dtype.
    """
    spelling = {dtype: text for text, dtype in DTYPES.items()}
    entries, offsets, end = {}, {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
        dtype, shape = tensors[name]
        offsets[name], end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": spelling[dtype], "shape": shape, "data_offsets": [offsets[name], end]}
    entries["__metadata__"] = dict(sorted(metadata.items()))  # safetensors returns them in any order
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    return start, {name: len(start) + offset for name, offset in offsets.items()}, len(start) + end


def planned_size(args, source, formats, made):
    """The size in bytes of the file that these arguments make of a plan, or a few bytes more."""
    tensors = layout(source, formats, args.static_input_scale, args.pre_quant_scale)
    if args.two_pass is not None:  # which layers is not known yet; all would need the most
        formats = mark(formats, formats, "_two_pass")
        tensors |= layout(source, formats)
    return header(tensors, metadata(source, formats, made))[2]


def raw_bytes(tensor):
    """The memory of a contiguous CPU tensor as a buffer. Without numpy, torch has no function for it."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


def part_file(path):
    """Where a file is written until it is complete."""
    return path.with_name(path.name + ".part")


def journal_file(path):
    return path.with_name(path.name + ".journal")


def lock(file, path):
    """Raises ValueError if another process writes to the open file. The lock ends when the file is closed."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())  # not renamed meanwhile
    except BlockingIOError:
        free = False
    except OSError:  # a file system without locks
        return
    if not free:
        raise ValueError(f"{path}: {lock_holder(file)} is writing this file; wait for it, or choose another name")


def lock_holder(file):
    """Who holds the lock of a file, where the system says so."""
    inode = f":{os.fstat(file.fileno()).st_ino}"
    locks = Path("/proc/locks").read_text().splitlines() if Path("/proc/locks").exists() else []
    pids = [fields[4] for fields in map(str.split, locks) if fields[1] != "->" and fields[5].endswith(inode)]
    return f"process {pids[0]}" if pids else "another process"


class Output:
    """A safetensors file of the tensors {name: (dtype, shape)}, written in any order to path.part."""

    def __init__(self, path, tensors, metadata):
        self.path, self.part, self.tensors = path, part_file(path), tensors
        self.start, self.offsets, self.size = header(tensors, metadata)
        self.missing, self.file = set(tensors), None

    def open(self):
        """Open and lock the .part file. What is in it stays: another process may be writing it."""
        self.file = open(os.open(self.part, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b",
                         buffering=0)
        lock(self.file, self.part)

    def begin(self, resume=False):
        self.file.truncate(self.size if resume else 0)
        self.put(self.start, 0)
        self.file.truncate(self.size)

    def put(self, data, offset):
        """Write all of data; a single call may write only a part."""
        self.file.seek(offset)
        data = memoryview(data)
        while data:
            data = data[self.file.write(data):]

    def write(self, name, tensor):
        """Write a tensor; returns its checksum."""
        tensor = tensor.cpu().contiguous()
        expected, got = self.tensors[name], (tensor.dtype, tuple(tensor.shape))
        if got != expected:
            raise ValueError(f"{self.path}: {name}: got {got}, expected {expected}, as in the header")
        self.missing.remove(name)
        data = raw_bytes(tensor)
        self.put(data, self.offsets[name])
        return zlib.crc32(data)

    def read(self, name):
        """A tensor that was written; returns it and its checksum."""
        dtype, shape = self.tensors[name]
        tensor = torch.empty(shape, dtype=dtype)
        self.file.seek(self.offsets[name])
        self.file.readinto(raw_bytes(tensor))
        return tensor, zlib.crc32(raw_bytes(tensor))

    def flush(self):
        if self.missing:
            raise ValueError(f"{self.path}: {len(self.missing)} tensors were never written, for example "
                             f"{min(self.missing)}")
        os.fsync(self.file.fileno())  # otherwise a power cut could leave the new name with old bytes


class Journal:
    """What a run has finished: a line per weight, beside the unfinished files. Write within running().

    The first line identifies the run: the files that it reads, plan and command must be the same to resume. The
    other lines are JSON after its checksum: a weight, its quality and the checksums of its tensors. So a weight
    is done again if a crash kept it from the disk, or damaged its line.
    """

    def __init__(self, outputs, reads):
        self.outputs, self.path, self.file, self.done = outputs, journal_file(outputs[0].path), None, {}
        stats = [file.stat() if file.is_file() else None for file in reads]
        state = repr([stat and (stat.st_size, stat.st_mtime_ns) for stat in stats]).encode()
        self.identity = hashlib.sha256(b"".join(output.start for output in outputs) + state).hexdigest().encode()

    @contextmanager
    def running(self, resume=False, ranks=wan_fp4.Ranks()):
        """A context for writing; when it ends, the files get their final names. What a failure leaves is as in
        convert."""
        try:
            ranks.once(lambda: self.open(resume))
            if ranks.rank > 0:
                self.follow()
            self.merge(ranks)
            yield
            ranks.once(self.finish)
        except DamagedError:
            self.discard()
            raise
        except OSError as error:
            if error.strerror and not error.filename:  # of a write, for which Python names no file
                error.filename = self.outputs[0].path
            raise
        finally:
            self.close()

    def open(self, resume):
        """Open and lock all files. Raises ValueError if another process writes one, if there is nothing to
        resume, and if the disk is too small."""
        if resume and not all(path.exists() for path in (self.path, *(output.part for output in self.outputs))):
            raise ValueError(f"--resume: nothing to resume, {self.path} or a .part file is missing; start "
                             f"without --resume")
        self.check_space()
        for output in self.outputs:
            output.open()
        lines = self.read() if resume else []
        for output in self.outputs:
            output.begin(resume)
        self.file = open(self.path, "ab", buffering=0)  # appending: other ranks write lines too
        if not lines:
            self.file.truncate(0)
        self.file.write(b"\n" if lines else self.identity + b"\n")  # the last line may be incomplete
        for line in lines:
            self.restore(line)

    def follow(self):
        """Open the files that rank 0 has opened; each rank writes its own tensors and lines."""
        for output in self.outputs:
            output.file = open(output.part, "r+b", buffering=0)
        self.file = open(self.path, "ab", buffering=0)

    def merge(self, ranks):
        """Take as done what other ranks have done."""
        for done in ranks.gather(self.done):
            self.done |= done
        for output in self.outputs:
            output.missing.intersection_update(*ranks.gather(output.missing))

    def read(self):
        """The lines after the first. Raises ValueError if they are of another run."""
        first, *lines = self.path.read_bytes().split(b"\n")
        if not self.identity.startswith(first):
            raise ValueError(f"--resume: {self.path} belongs to another run (the source, the plan or the "
                             f"command differs); start without --resume")
        return lines if first == self.identity else []

    def restore(self, line):
        """Take a weight as done, if neither its line nor its tensors are damaged."""
        checksum, _, text = line.partition(b" ")
        if checksum != b"%08x" % zlib.crc32(text):
            return
        name, quality, written = json.loads(text)
        if all(self.outputs[i].read(tensor)[1] == expected for i, tensor, expected in written):
            self.done[name] = quality
            for i, tensor, _ in written:
                self.outputs[i].missing.discard(tensor)

    def check_space(self):
        """Raises ValueError if the disk has no room for the outputs, less what is already written."""
        need = sum(output.size - (output.part.stat().st_blocks * 512 if output.part.exists() else 0)
                   for output in self.outputs)
        free = shutil.disk_usage(self.path.parent).free
        if need > free:
            raise ValueError(f"{self.outputs[0].path}: needs {gib(need)} more, but only {gib(free)} of the "
                             f"disk are free; free some space, or choose another disk with -o")

    def write(self, name, quality, *parts):
        """Write a weight's tensors, a dict for each output, and record it as done."""
        written = [(i, tensor, output.write(tensor, value))
                   for i, (output, part) in enumerate(zip(self.outputs, parts)) for tensor, value in part.items()]
        text = json.dumps([name, quality, written]).encode()
        self.file.write(b"%08x %s\n" % (zlib.crc32(text), text))
        self.done[name] = quality

    def finish(self):
        """Everything is written: rename the files to their final names."""
        for output in self.outputs:
            output.flush()
        if fcntl is None:
            self.close()  # Windows neither renames nor deletes an open file
        for output in reversed(self.outputs):
            os.replace(output.part, output.path)
        self.path.unlink()

    def discard(self):
        if fcntl is None:
            self.close()
        for path in (self.path, *(output.part for output in self.outputs)):
            path.unlink(missing_ok=True)

    def close(self):
        for file in (self.file, *(output.file for output in self.outputs)):
            if file:
                file.close()


# ----------------------------------------------------------------------------------------------------
# Convert: every tensor of the source, rounded as planned
# ----------------------------------------------------------------------------------------------------

def in_order(work, items, device="cpu"):
    """Yields (item, work(item)) in order, computed in threads that run a little ahead.

    On a CPU, torch's own threads are divided among them, so that each weight is rounded on one core.
    """
    threads, futures = torch.get_num_threads(), deque()
    workers = min(4, threads) if torch.device(device).type == "cpu" else 2
    torch.set_num_threads(max(1, threads // workers))
    if torch.device(device).type == "cuda":  # loads torch's solvers, which fails if two threads do it at once
        torch.linalg.cholesky(torch.eye(2, device=device))
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            futures.append((item, pool.submit(work, item)))
            if len(futures) > workers:
                item, future = futures.popleft()
                yield item, future.result()
        while futures:
            item, future = futures.popleft()
            yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def share(names, source, ranks):
    """The weights of this rank. Sorted by size, weights go to the ranks in turn."""
    mine = set(sorted(names, key=lambda name: (math.prod(source.shapes[name]), name))[ranks.rank::ranks.size])
    return [name for name in names if name in mine]


def joined(results, names, ranks):
    """The (name, result) pairs of all ranks, as a dict in the order of names."""
    parts = ranks.gather(dict(results))
    return {name: part[name] for name in names for part in parts if name in part}


@dataclass(frozen=True)
class Rounding:
    """How convert rounds, and the weights for which it makes a LoRA."""
    method: str = "search"  # or "rtn"
    num_iter: int = NUM_ITER
    targets: dict = field(default_factory=dict)  # {weight: rank of its LoRA}
    lora_mode: str = "correct"  # or "absorb"
    static: bool = False  # write input_scale
    pre_quant: bool = False  # write pre_quant_scale
    seed: int = 0


def round_tensor(source, name, fmt, rounding, seen, device):
    """One tensor of the source -> {measure: dB}, empty if it is kept, and the tensors of the converted file and
    of the LoRA, by full name. seen: its Inputs, or None."""
    tensor, layer = source.tensor(name), name.removesuffix(".weight")
    if fmt == "bf16":
        return {}, {name: tensor}, {}
    w, lora, rank = tensor.to(device), {}, rounding.targets.get(name, 0)
    hessian = None if seen is None else seen.hessian().to(device)
    base, scale = w, None  # the matrix to round, and its pre_quant_scale
    if rank and rounding.lora_mode == "absorb":
        up, down, _ = low_rank(w, rank, None if seen is None else seen.lost(fmt).to(device), rounding.seed)
        base = torch.addmm(w.float(), up, down, alpha=-1)
    metric = None if rounding.method == "rtn" else hessian
    if rounding.pre_quant and fmt == "nvfp4":
        scale = pre_quant_scale(base, seen)
        base = base.float() / scale
        metric = None if metric is None else metric * scale * scale[:, None]
    stored = quantize_weight(base, unmarked(fmt), metric, rounding.method, rounding.num_iter)
    stored["comfy_quant"] = quant.write_marker(marker(fmt, w.shape, w.dtype))  # base may be float32
    approximation = dequantize_weight(stored, w.shape)
    if scale is not None:
        approximation, stored["pre_quant_scale"] = approximation * scale, scale.bfloat16()
    measures = {"weight": None} | ({} if seen is None else {"output": seen.moment.to(device)})
    quality = {key: snr(w, approximation, h) for key, h in measures.items()}
    if rank:
        error = approximation.neg_().add_(w)  # in place: a weight of the 14B takes 280 MB in float32
        up, down, shares = low_rank(error, rank, hessian, rounding.seed)
        up, down, quality["share"] = up.bfloat16(), down.bfloat16(), shares[-1].item()
        lora = dict(zip(lora_names(name), (up, down, torch.tensor(float(len(down))))))
        approximation = error.addmm_(up.float(), down.float(), alpha=-1).neg_().add_(w)
        quality |= {f"{key} with LoRA": snr(w, approximation, h) for key, h in measures.items()}
    if rounding.static and fmt == "nvfp4":
        stored["input_scale"] = torch.tensor(seen.amax * HEADROOM / (quant.E4M3_MAX * quant.E2M1_MAX))
    return quality, {f"{layer}.{suffix}": part for suffix, part in stored.items()}, lora


def make_outputs(source, formats, rounding, out, lora_file, made):
    """The files that convert writes: the converted model `out`, and the LoRA of rounding.targets if lora_file is
    not None. made: header entries on how they were made."""
    about = made | {"base": out.name}
    if lora_file and rounding.lora_mode == "absorb":  # wan_fp4.load_dit checks that the two belong together
        about["lora_id"] = lora_file.name
        made = made | {"needs_lora": lora_file.name}
    tensors = layout(source, formats, rounding.static, rounding.pre_quant)
    outputs = [Output(out, tensors, metadata(source, formats, made))]
    if lora_file:
        outputs.append(Output(lora_file, lora_layout(source.shapes, rounding.targets), about))
    return outputs


def names_by_stage(names):
    """Tensor names in the order of Calibration.stages(): all outside the blocks, then block after block."""
    groups = {}
    for name in names:
        match = re.match(r"blocks\.(\d+)\.", name)
        groups.setdefault(int(match[1]) if match else -1, []).append(name)
    return [groups[i] for i in sorted(groups)]


def convert(source, formats, outputs, rounding=Rounding(), calibration=None, device="cpu", resume=False,
            ranks=wan_fp4.Ranks()):
    """Writes `source` in the planned formats.

    outputs      as make_outputs gives them for the same plan and rounding
    calibration  a Calibration: rounding then minimizes the error of the layers' outputs
    resume       continue an interrupted run; the files come out the same, byte for byte
    ranks        those that share the weights, on one machine

    Returns {name: quality}: for each quantized weight its signal-to-noise ratios in dB and, with a LoRA, the
    share of the error's energy that the LoRA holds. The files get their final names only on success. After a
    failure the unfinished files stay, for `resume`, unless the source is damaged and no run could succeed.
    """
    journal = Journal(outputs, source.reads)
    stages = names_by_stage(source.shapes) if calibration else [list(source.shapes)]
    beside = rounding.targets if rounding.lora_mode == "absorb" else ()  # the layers that need their LoRA
    with journal.running(resume, ranks):
        total = source.nbytes // ranks.size
        with tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=None) as progress:
            for names, seen in zip(stages, calibration.stages() if calibration else [{}]):
                def work(name):
                    if name not in journal.done:
                        fmt = formats.get(name, "bf16")
                        return round_tensor(source, name, fmt, rounding, seen.get(name), device)

                for name, result in in_order(work, share(names, source, ranks), device):
                    if result:
                        journal.write(name, *result)
                    progress.set_postfix_str(f"{len(journal.done)}/{len(source.shapes)} tensors", refresh=False)
                    progress.update(math.prod(source.shapes[name]) * source.dtypes[name].itemsize)
                journal.merge(ranks)
                for name in names:
                    if calibration and journal.done[name]:
                        layer, factors = name.removesuffix("weight"), lora_names(name)[:2]
                        calibration.replace(
                            name, {stored.removeprefix(layer): outputs[0].read(stored)[0]
                                   for stored in outputs[0].tensors if stored.startswith(layer)},
                            [outputs[1].read(factor)[0] for factor in factors if name in beside])
    return {name: quality for name, quality in journal.done.items() if quality}


# A packed source: its weights are NVFP4 already, in another layout

def repack(source, out, made=None, resume=False):
    """Writes a packed `source` to the file `out` in the comfy_quant format. No value is rounded again.

    Returns the number of NVFP4 layers. Raises ValueError, before anything is written, for a layer that is
    incomplete or in another layout. What a later failure leaves is as in convert.
    """
    layers = {}  # {layer's name and a dot: its tensors' names}
    for name in source.shapes:
        layers.setdefault(name[:name.rfind(".") + 1], []).append(name)

    def repacked(layer, read):
        """{name: tensor} of a layer in the output, from the tensors that read(name) returns."""
        where, stored = f"{source.path}: {layer[:-1]}", {name[len(layer):]: read(name) for name in layers[layer]}
        new = quant.from_lightx2v(where, stored)
        for suffix, tensor in stored.items():
            if new is stored and tensor.dtype not in FLOATS:
                raise ValueError(f"{where}.{suffix}: got {tensor.dtype}, expected BF16, F16 or F32 in a layer "
                                 f"without LightX2V's NVFP4 scales; the file mixes layouts: download it again")
        return {layer + suffix: tensor for suffix, tensor in new.items()}

    def outline(name):
        """A single number, or the shape and dtype of a larger tensor."""
        if math.prod(source.shapes[name]) == 1:
            return source.tensor(name)
        return torch.empty(source.shapes[name], dtype=source.dtypes[name], device="meta")

    tensors = {name: (new.dtype, tuple(new.shape))
               for layer in layers for name, new in repacked(layer, outline).items()}
    packed = [name.removesuffix(".comfy_quant") for name in tensors if name.endswith(".comfy_quant")]
    markers = json.dumps({"format_version": "1.0", "layers": dict.fromkeys(packed, {"format": "nvfp4"})})
    about = source.metadata | (made or {}) | {"_quantization_metadata": markers}
    journal = Journal([Output(out, tensors, about)], source.reads)
    with journal.running(resume):
        for layer in tqdm(layers, desc="repacking", disable=None):
            if layer not in journal.done:
                journal.write(layer, {}, repacked(layer, source.tensor))
    return len(packed)


# Several LoRAs in one file: ComfyUI applies only the last of several bypass nodes

def concat_loras(loras, out, made=None):
    """Writes a LoRA file that does at strength 1 what several do together; loras: (file, strength) pairs.

    Ranks are concatenated, with strength and alpha multiplied into up; whole differences are added. A dtype of 16
    bits that all files share is kept, otherwise it is float32. Returns a line on the result. Raises ValueError,
    before anything is written, for LoRAs that do not fit together.
    """
    terms, ids, tensors = {}, set(), {}  # terms: {(parameter, number of factors): [(shape, scale, factors)]}
    for path, strength in loras:
        for name, shape, scale, factors in wan_fp4.lora_terms(path, strength):
            same = terms.setdefault((name, len(factors)), [])
            same.append((shape, scale, factors))
            if shape != same[0][0]:
                raise ValueError(f"{path}: {name}: got a difference of shape {shape}, expected {same[0][0]}, as "
                                 f"in the files before it; give LoRAs for one model")
        if path.suffix not in wan_fp4.PICKLES and strength == 1:
            ids |= {wan_fp4.read_header(path)[0].get("lora_id")} - {None}
    if len(ids) > 1:
        raise ValueError(f"--concat-loras: got {' and '.join(sorted(ids))}, each a part of another checkpoint's "
                         f"weights (--lora-mode absorb), expected one at most; leave the others out")
    for (name, count), group in terms.items():
        dtypes = {factor.dtype for _, _, factors in group for factor in factors}
        dtype = dtypes.pop() if dtypes in ({torch.bfloat16}, {torch.float16}) else torch.float32
        scaled = [scale * factors[0].float() for _, scale, factors in group]
        if count == 2:
            up = torch.cat(scaled, dim=1).to(dtype)  # (M, r)
            down = torch.cat([down.to(dtype) for _, _, (_, down) in group])  # (r, K)
            tensors |= zip(lora_names(name), (up, down, torch.tensor(float(len(down)))))
        else:
            layer, _, part = name.rpartition(".")
            tensors[f"diffusion_model.{layer}.{DIFFERENCES[part]}"] = sum(scaled).to(dtype)
    for name, tensor in tensors.items():
        if not quant.matrix_amax(tensor).isfinite():
            raise ValueError(f"--concat-loras: {name}: gives NaN or infinite values, expected finite ones; get "
                             f"undamaged files, or lower their strengths")
    output = Output(out, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()},
                    (made or {}) | {"lora_id": name for name in ids})
    journal = Journal([output], [file for path, _ in loras for file in model_files(path)])
    with journal.running():
        for name, tensor in tensors.items():
            journal.write(name, {}, {name: tensor})
    layers = sum(count == 2 for _, count in terms)
    return f"{len(loras)} LoRAs in one: {layers} layers, {len(terms) - layers} differences"


# ----------------------------------------------------------------------------------------------------
# Report
# ----------------------------------------------------------------------------------------------------

COLORS = {"bf16": (200, 75, 75), "mxfp8": (230, 170, 50), "nvfp4": (70, 160, 90), "mxfp8_fpmm": (150, 100, 190),
          "nvfp4_fpmm": (60, 130, 190), "nvfp4_two_pass": (110, 180, 200)}
LETTERS = {"bf16": "b", "mxfp8": "8", "nvfp4": "4", "mxfp8_fpmm": "W", "nvfp4_fpmm": "w", "nvfp4_two_pass": "2"}


def gib(size):
    return f"{size / 2 ** 30:.2f} GiB" if size >= 2 ** 28 else f"{size / 2 ** 20:.2f} MiB"


def grid(values):
    """{name: value} of the blocks' weights, such as a plan -> {type of layer: {block: value}}."""
    rows = {}
    for name, value in values.items():
        if match := BLOCK_WEIGHT.fullmatch(name):
            rows.setdefault(match[2], {})[int(match[1])] = value
    return dict(sorted(rows.items()))


def listed(formats):
    """The formats that a report lists: all of PLAN_FORMATS, and those of marked layers that are used."""
    return [fmt for fmt in PRINTED if fmt in PLAN_FORMATS or fmt in formats.values()]


def plan_report(shapes, formats):
    """Lines: the percentage of each format per type of layer. Norms count as bf16, in the total too."""
    norms = [name for name in shapes if BLOCK_WEIGHT.fullmatch(name) and name not in formats]
    rows = {kind: list(row.values()) for kind, row in grid(formats).items()} | {"norms": ["bf16"] * len(norms)}
    rows["total"] = sum(rows.values(), [])
    yield f"{'percent of layers':17}" + "".join(f"{PRINTED[fmt]:>8}" for fmt in listed(formats))
    for kind, row in rows.items():
        if row:
            yield f"{kind:17}" + "".join(f"{100 * row.count(fmt) / len(row):8.1f}" for fmt in listed(formats))
    yield from sorted(f"{name}: {PRINTED[fmt]}" for name, fmt in formats.items()
                      if not BLOCK_WEIGHT.fullmatch(name))


def plan_map(formats, color):
    """Lines: a row for each type of layer, a character for each block, and the legend."""
    def cell(fmt):
        r, g, b = COLORS[fmt]
        return f"\033[48;2;{r};{g};{b}m{LETTERS[fmt]}\033[0m" if color else LETTERS[fmt]

    for kind, row in grid(formats).items():
        yield f"{kind:17} " + "".join(cell(row[i]) if i in row else " " for i in range(max(row) + 1))
    yield f"{'blocks 0, 1, ...':17} " + ", ".join(f"{cell(fmt)} {PRINTED[fmt]}" for fmt in listed(formats))


def plan_svg(formats):
    """The map as an SVG picture."""
    rows, left, size, top = grid(formats), 130, 14, 24
    blocks = 1 + max(max(row) for row in rows.values())
    width, height = left + blocks * size + 10, top + len(rows) * size + 30
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
             f'font-family="sans-serif" font-size="11">']
    lines += [f'<text x="{left + i * size}" y="{top - 8}">{i}</text>' for i in range(0, blocks, 5)]
    for y, (kind, row) in enumerate(rows.items()):
        lines.append(f'<text x="4" y="{top + y * size + 11}">{kind}</text>')
        lines += [f'<rect x="{left + i * size}" y="{top + y * size}" width="{size - 1}" height="{size - 1}" '
                  f'fill="rgb{COLORS[fmt]}"><title>blocks.{i}.{kind}: {PRINTED[fmt]}</title></rect>'
                  for i, fmt in row.items()]
    for i, fmt in enumerate(listed(formats)):
        x = left + 80 * i
        lines.append(f'<rect x="{x}" y="{height - 22}" width="12" height="12" fill="rgb{COLORS[fmt]}"/>'
                     f'<text x="{x + 17}" y="{height - 12}">{PRINTED[fmt]}</text>')
    return "\n".join([*lines, "</svg>", ""])


def reason_report(reasons):
    """Lines: the weights whose format is not that of their own score, by type of layer and reason."""
    if reasons:
        yield ("weights that get another format than their own score gives (kurtosis: 8 or more is kept; group: "
               "the mean score of the first, middle or last blocks decides; spread: the groups score alike, so "
               "they get one format lower):")
    for kind, row in grid(reasons).items():
        for reason in sorted(set(row.values())):
            blocks = ", ".join(str(block) for block in sorted(row) if row[block] == reason)
            yield f"{kind:17} {reason}: blocks {blocks}"


def error_report(errors):
    """Lines: the ten layers whose rounding to NVFP4 changes the latents most, whatever the plan gives them."""
    total = max(sum(error["nvfp4"] for error in errors.values()), 1e-30)
    first = sorted(errors, key=lambda name: -errors[name]["nvfp4"])[:10]
    yield "share of the video's error if all were W4A4, by layer: " + ", ".join(
        f"{name.removesuffix('.weight')} {errors[name]['nvfp4'] / total:.0%}" for name in first)


def attention_report(calibration):
    """Lines: what self-attention loses in E4M3, on average over the blocks, and the blocks that are kept."""
    e4m3, nvfp4 = (-10 * calibration.attention_losses.mean(0).log10()).tolist()
    kept = ", ".join(map(str, calibration.sensitive_attention())) or "none"
    yield (f"self-attention in E4M3: {e4m3:.1f} dB, rounding its output to NVFP4: {nvfp4:.1f} dB; blocks that "
           f"--attention fp8 keeps in bf16: {kept}")


def lora_report(shapes, targets):
    """Lines: how large the LoRA of targets {weight: rank} is."""
    ranks, size = targets.values(), header(lora_layout(shapes, targets), {})[2]
    yield (f"LoRA of rank {min(ranks, default=0)} to {max(ranks, default=0)} for {len(targets)} layers: "
           f"{gib(size)}")


def quality_report(quality, formats):
    """Lines: mean and worst SNR per type of layer and format, and the worst layers; with a LoRA also the
    share of the error's energy that it holds, and the SNR with it. After calibration, the SNR of the layers'
    outputs for the inputs that were seen; otherwise of the weights."""
    key = "output" if any("output" in measures for measures in quality.values()) else "weight"
    measured = {name: measures for name, measures in quality.items() if key in measures}
    groups = {}
    for name, measures in measured.items():
        for kind in (layer_type(name), "all"):
            groups.setdefault((kind == "all", kind, formats[name]), []).append(measures)
    title = f"{key} SNR               layers  mean dB  worst dB"
    if any("share" in measures for measures in measured.values()):
        title += "   LoRA: layers  holds  mean dB  with it"
    yield title
    for (_, kind, fmt), group in sorted(groups.items(), key=lambda item: item[0]):
        line = f"{kind:16} {PRINTED[fmt]:7} {len(group):6} {mean(group, key):8.2f}"
        line += f" {min(m[key] for m in group):9.2f}"
        if corrected := [m for m in group if "share" in m]:
            line += f" {len(corrected):15} {mean(corrected, 'share'):6.1%} {mean(corrected, key):8.2f}"
            line += f" {mean(corrected, f'{key} with LoRA'):8.2f}"
        yield line
    worst = sorted((measures[key], name) for name, measures in measured.items())[:5]
    yield "worst: " + ", ".join(f"{name} {value:.2f}" for value, name in worst)


def mean(group, key):
    return sum(measures[key] for measures in group) / len(group)


# ----------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------

def whole_number(low, high=10 ** 9):
    """The type of an argument: a whole number within bounds."""
    def parse(text):
        if not re.fullmatch("-?[0-9]{1,19}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text[:50]!r}: expected a whole number from {low} to {high}")
        return int(text)
    return parse


def parse_size(text):
    """"9.76GiB" or "500MB" -> bytes."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{0,15})?) ?([KMG]?)(i?)B?", text, re.IGNORECASE)
    size = float(match[1]) * (1024 if match[3] else 1000) ** " KMG".index(match[2].upper() or " ") if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text[:50]!r}: expected a size such as 9.76GiB or 500MB")
    return int(size)


def parse_share(text):
    value = float(text) if re.fullmatch(r"[0-9]{0,9}\.?[0-9]{1,9}", text) else -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text[:50]!r}: expected a number from 0 to 1, such as 0.1")
    return value


ENCODERS = "text-encoder", "clip", "vae"  # the networks that --calib runs besides the model


def named_encoders(args):
    return {flag: getattr(args, flag.replace("-", "_")) for flag in ENCODERS}


def refuse(message):
    raise ValueError(message)


def make_parser():
    parser = argparse.ArgumentParser(
        "convert.py", usage="python convert.py -i MODEL [options]", allow_abbrev=False,
        description="Convert a Wan2.1 checkpoint in bf16, fp16 or fp32 to NVFP4 and MXFP8.",
        epilog="Flags that convert_to_quant has too are spelled as there, with dashes or underscores. A REGEX is "
        "searched in the full name of a weight, such as blocks.0.ffn.2.weight.")
    parser.error = refuse  # argparse's own prints the usage too
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("-i", "--input", type=Path, metavar="MODEL",
        help="a safetensors file, a shard index .json, or a folder of shards; official or diffusers names. If it "
        "is in LightX2V's NVFP4 layout, it is repacked, and nothing is rounded")
    what.add_argument("--concat-loras", nargs="+", metavar="FILE[:STRENGTH]",
        help="instead of converting, join several LoRAs in one file, OUT, for use at strength 1: ComfyUI applies "
        "only the last of several bypass nodes")
    add("--merge-lora", action="append", metavar="FILE[:STRENGTH]",
        help="merge a LoRA (low-rank factors or whole differences) into MODEL before it is analyzed and rounded; "
        "can be given several times")
    add("-o", "--output", type=Path, metavar="OUT", help="default: MODEL-nvfp4.safetensors beside the input")
    add_plan_flags(parser.add_argument_group("format of each layer (default: --plan score)"))
    add_rounding_flags(parser.add_argument_group("rounding"))
    add_lora_flags(parser.add_argument_group("error-correction LoRA"))
    add("--device", default="cpu", metavar="D", help="where to round: cpu, cuda, cuda:1 (%(default)s)")
    add("--seed", type=whole_number(-2 ** 63, 2 ** 63 - 1), default=0,
        help="for the noise of the calibration videos and the SVD of the LoRA (%(default)s)")
    add("--resume", action="store_true", help="continue an interrupted run of the same command")
    for flag, why in (("--wan", "only Wan is converted"), ("--comfy-quant", "the format that is written"),
                      ("--save-quant-metadata", "always in the header")):
        add(flag, action="store_true", help=f"accepted for compatibility, always on: {why}")
    add("--top-p", type=float, metavar="P", help="accepted for compatibility, ignored: weighting the search by "
        "the weight's own leading directions makes real outputs worse (bench/RESULTS.md)")
    return parser


def add_plan_flags(group):
    add, base = group.add_argument, group.add_mutually_exclusive_group()
    for fmt in ("nvfp4", "mxfp8"):
        base.add_argument(f"--{fmt}", action="store_const", dest="base", const=fmt,
                          help=f"{PLAN_FORMATS[fmt]} for every layer that no REGEX matches")
    add("--custom-layers", metavar="REGEX",
        help="layers that get --custom-type; takes precedence over --exclude-layers")
    add("--custom-type", choices=PLAN_FORMATS, help="format of --custom-layers")
    add("--exclude-layers", metavar="REGEX", help="layers that are kept as they are")
    add("--plan", choices=("score", "recipe", "measured"), help="score: the analysis that made the "
        "published recipe, by kurtosis, dynamic range and aspect ratio of each weight; recipe: what it gave for "
        "the 14B; measured: by the error that each layer's rounding causes in the latents, requires --calib and "
        "is then the default; layers that see only the prompt or the picture are then marked as by --fpmm-layers")
    add("--size", type=parse_size, metavar="9.76GiB", help="the plan of least error within this file size: of "
        "the latents with --calib, otherwise of the weights. A LoRA is not counted. --plan measured defaults to "
        "the size of the score's plan")
    add("--fpmm-layers", metavar="REGEX", help="quantized layers that multiply in full precision, W4A16 (MXFP8: "
        "W8A16): their inputs are not quantized. More accurate, slower on tensor cores, the same file size")
    add("--w4a16", type=parse_share, metavar="SHARE", help="mark layers as --fpmm-layers does: those where it "
        "saves most of the video's error, up to this share of the FLOPs of all layers, such as 0.1. Requires "
        "--calib. Layers that see only the prompt or the picture are always marked and do not count: they have "
        "few tokens")
    add("--two-pass", type=parse_share, metavar="SHARE", help="like --w4a16, but for NVFP4 layers whose inputs "
        "sample.py then quantizes in two passes: nearly as accurate as W4A16, and on Blackwell twice the cost of "
        "W4A4. ComfyUI ignores this mark")
    add("--plot", type=Path, metavar="FILE.svg", help="draw the plan")
    add("--print-flags", action="store_true", help="print the plan as flags for convert_to_quant")
    add("--dry-run", action="store_true", help="stop after the plan")


def add_rounding_flags(group):
    add = group.add_argument
    add("--simple", action="store_true", help="round to nearest, without searching block scales")
    add("--calib", nargs="+", type=Path, metavar="IMAGE", help="run the pipeline on these pictures and round "
        "each layer for what it is fed. The prompt is read from a .txt file beside the picture, if there is one")
    add("--models", type=Path, metavar="DIR", help="the other networks for --calib, as in sample.py (default: "
        "models/ beside this script, or the demo's)")
    for flag in ENCODERS:
        add(f"--{flag}", type=Path, metavar="FILE", help="network for --calib (default: found in --models)")
    add("--calib-samples", type=whole_number(1), default=8192, metavar="N",
        help="with --calib, the maximum number of tokens to record for each layer (%(default)s)")
    add("--num-iter", type=whole_number(1), default=NUM_ITER, metavar="N", help="with --calib, the maximum "
        "number of sweeps over a weight; stops early when nothing changes (%(default)s)")
    add("--pre-quant-scale", action="store_true", help="with --calib: store factors for the input channels of "
        "each NVFP4 layer, chosen for the least error of its outputs in W4A4. Gains a little with --lora-mode "
        "absorb, almost nothing alone. ComfyUI applies them since August 2026, older versions ignore them")
    add("--static-input-scale", action="store_true", help="with --calib: store fixed tensor scales for the "
        "activations; by default each activation gets its own")


def add_lora_flags(group):
    add = group.add_argument
    add("--extract-lora", action="store_true", help="also write a LoRA that runs beside the quantized layers")
    add("--lora-rank", type=whole_number(1), default=64, metavar="R", help="its rank (%(default)s); with --calib "
        "and --lora-mode absorb, the average: layers where it saves more get more")
    add("--lora-target", metavar="REGEX", default=RECIPE_TARGET, help="its layers (%(default)s)")
    add("--lora-mode", choices=("correct", "absorb"), default="correct", help="what it holds. correct: a part "
        "of the rounding error. absorb: also a part of the weight, which is then not rounded; the checkpoint "
        "needs this LoRA")
    add("--lora-output", type=Path, metavar="FILE", help="default: OUT with _lora before .safetensors")


def names_formats(args):
    """Whether the command line gives the formats by name, so that no analysis chooses them."""
    return args.base or args.custom_layers or args.exclude_layers


def least_error(args):
    """Whether the plan is the one of least error: by default where errors can be measured or a size is given."""
    return args.plan == "measured" or not (args.plan or names_formats(args)) and (args.calib or args.size)


def uses_errors(args):
    """Whether anything is chosen by the errors of measure_errors."""
    return (least_error(args) or args.w4a16 is not None or args.two_pass is not None
            or args.calib and args.lora_mode == "absorb")


def check_flags(args):
    """Flags that require or exclude one another, which argparse cannot express. Raises ValueError."""
    if bool(args.custom_layers) != bool(args.custom_type):
        raise ValueError("--custom-layers and --custom-type: give both or neither")
    if names_formats(args) and (args.plan or args.size):
        raise ValueError(f"--{'plan' if args.plan else 'size'}: chooses the format of every layer, cannot be "
                         f"combined with --nvfp4, --mxfp8, --custom-layers or --exclude-layers")
    if args.size and args.plan in ("score", "recipe"):
        raise ValueError(f"--size: --plan {args.plan} has a fixed size; leave one of the two out, or give "
                         f"--plan measured")
    others = args.models, *named_encoders(args).values()
    if not args.calib and (args.plan == "measured" or args.static_input_scale or args.pre_quant_scale
                           or args.w4a16 is not None or args.two_pass is not None or any(others)):
        raise ValueError("--plan measured, --static-input-scale, --pre-quant-scale, --w4a16, --two-pass, "
                         "--models and networks: require --calib IMAGE...")
    if args.static_input_scale and args.pre_quant_scale:
        raise ValueError("--static-input-scale and --pre-quant-scale: cannot be combined; leave one out")
    if not args.extract_lora and (args.lora_output or args.lora_target != RECIPE_TARGET
                                  or args.lora_mode != "correct"):
        raise ValueError("--lora-target, --lora-mode and --lora-output: require --extract-lora")
    if not re.fullmatch("(cpu|cuda)(:[0-9]{1,3})?", args.device):
        raise ValueError(f"--device {args.device[:50]!r}: expected cpu, cuda or cuda:N")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}") from None


def output_files(args):
    """The converted model's file, and the LoRA's or None."""
    path = Path(os.path.abspath(args.input))  # not resolve(): a download cache links to files named by hashes
    stem = path.name if path.is_dir() else re.sub(r"(\.safetensors)?(\.index)?\.\w+$", "", path.name)
    out = args.output or path.with_name(f"{stem}-nvfp4.safetensors")
    lora = args.lora_output or out.with_name(f"{out.stem}_lora.safetensors") if args.extract_lora else None
    return out, lora


def check_files(reads, out, lora=None, plot=None):
    """The one place that compares every file that a run creates with each other and with those that it reads.
    Raises ValueError if one would overwrite another, is no regular file, or is in no writable folder."""
    taken = list(reads)
    for output in (out, lora, plot):
        if output is None:
            continue
        if not output.parent.is_dir():
            raise ValueError(f"{output}: cannot be written, its folder does not exist; create it first")
        if not os.access(output.parent, os.W_OK | os.X_OK):
            raise ValueError(f"{output}: cannot be written, no permission in its folder; choose another one")
        if output.is_dir():
            raise ValueError(f"{output}: cannot be written, it is a folder; give a file name")
        for file in (output, part_file(output), *([journal_file(output)] if output is out else [])):
            if file.exists() and not file.is_file():
                raise ValueError(f"{file}: cannot be written, it is not a regular file; give another name")
            for other in taken:
                if file.resolve() == other.resolve() or file.exists() and other.exists() and file.samefile(other):
                    via = "" if file == output else f"its temporary file {file.name} "
                    raise ValueError(f"{output}: {via}would overwrite {other}; give another file name")
            taken.append(file)
        kinds = [".svg"] if output is plot else ["", ".safetensors", ".sft"]
        if output.exists() and output.suffix not in kinds:
            raise ValueError(f"{output}: would overwrite a file of another kind; choose another name")


def print_plan(args, source, formats, notes, size):
    """Print the plan as a table, a map and, on request, flags; draw it."""
    print(*plan_report(source.shapes, formats), "", *plan_map(formats, sys.stdout.isatty()), "", *notes,
          f"{gib(source.nbytes)} -> {gib(size)}", sep="\n")
    if args.print_flags:
        print(flags(formats))
        if marked := [name for name, fmt in formats.items() if fmt.endswith("_fpmm")]:
            layers = regex(marked).replace(r"\.weight", "$")
            print(f"(convert_to_quant has no --fpmm-layers; edit its output with --edit-quant --add-keys "
                  f"\"'full_precision_matrix_mult': true\" --quant-filter \"{layers}\")")
        if beyond := sorted(n for n, fmt in formats.items()
                            if unmarked(fmt) == "nvfp4" and OPTIONAL.fullmatch(n)):
            print(f"(convert_to_quant has one custom type and would keep, not NVFP4: {', '.join(beyond)})")
    if args.plot:
        write_text(args.plot, plan_svg(formats))


def write_text(path, text):
    """Write a file that is complete or absent."""
    part = part_file(path)
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


COMPATIBLE = "wan", "comfy_quant", "save_quant_metadata", "top_p"  # flags that never have an effect


def check_only(args, allowed, reason):
    """Raises ValueError for a flag that is not among `allowed` and so would be ignored."""
    defaults = vars(make_parser().parse_args(["-i", "MODEL"]))
    for name, value in vars(args).items():
        if name not in (*allowed, *COMPATIBLE) and value != defaults[name]:
            flag = value if name == "base" else name.replace("_", "-")
            raise ValueError(f"--{flag}: {reason}; leave it out")


def run(args, command, ranks):
    if ranks.size > int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size)):
        raise ValueError("got ranks on several machines, expected all on one, where they write the same file; "
                         "start torchrun without --nnodes")
    args.device = ranks.device(args.device)
    made = {"quantization_command": command,
            "quantization_versions": f"torch {torch.__version__}, safetensors {safetensors.__version__}"}
    if args.concat_loras:
        run_concat(args, made, ranks)
        return
    check_flags(args)
    source = Source(args.input)
    if source.packed:
        run_repack(args, source, made, ranks)
    else:
        run_convert(args, source, made, ranks)


def run_concat(args, made, ranks):
    check_only(args, ("concat_loras", "input", "output"), "has no effect with --concat-loras")
    if args.output is None:
        raise ValueError("--concat-loras: got no output file, expected one; name it with -o")
    loras = [wan_fp4.parse_lora(text) for text in args.concat_loras]
    check_files([file for path, _ in loras for file in model_files(path)], args.output)
    if ranks.rank == 0:
        print(concat_loras(loras, args.output, made))
        print(f"{gib(args.output.stat().st_size)}: {args.output}")


def run_repack(args, source, made, ranks):
    check_only(args, ("input", "output", "resume"), f"{args.input} is NVFP4 already, so it is only repacked")
    out, _ = output_files(args)
    check_files(source.reads, out)
    if ranks.rank > 0:
        return  # there is nothing to share
    begin = time.monotonic()
    print(f"{args.input}: NVFP4 in LightX2V's layout; its {repack(source, out, made, args.resume)} "
          f"layers were repacked (nibbles swapped, scales renamed and inverted), without rounding anything")
    print(f"{gib(source.nbytes)} -> {gib(out.stat().st_size)} in {time.monotonic() - begin:.1f} s: {out}")


def run_convert(args, source, made, ranks):
    begin, (out, lora_file) = time.monotonic(), output_files(args)
    for text in args.merge_lora or ():
        print(source.merge(*wan_fp4.parse_lora(text)))
    reads, calibration = source.reads, None
    if args.calib:
        encoders = find_encoders(source, named_encoders(args), args.models)
        reads = [*reads, *calibration_files(args.calib, encoders)]
    check_files(reads, out, lora_file, args.plot)

    if args.calib:
        calibration = calibrate(source, args.calib, encoders, args.calib_samples, args.seed, args.device, ranks)
        if kept := calibration.sensitive_attention():
            made["bf16_attention"] = ",".join(map(str, kept))  # for sample.py --attention fp8
    errors = measure_errors(source, quantizable(source.shapes), calibration, ranks) if uses_errors(args) else {}
    needs = {"needs_lora": lora_file.name} if lora_file and args.lora_mode == "absorb" else {}
    formats, notes = choose_plan(args, source, calibration, errors, made | needs, ranks)
    targets = lora_targets(args, source, calibration, errors, formats) if lora_file else {}
    if ranks.rank == 0:
        notes += attention_report(calibration) if calibration else ()
        notes += lora_report(source.shapes, targets) if lora_file else ()
        print_plan(args, source, formats, notes, planned_size(args, source, formats, made))
    if args.dry_run:
        return

    rounding = Rounding("rtn" if args.simple else "search", args.num_iter, targets, args.lora_mode,
                        args.static_input_scale, args.pre_quant_scale, args.seed)
    outputs = make_outputs(source, formats, rounding, out, lora_file, made)
    quality = convert(source, formats, outputs, rounding, calibration, args.device, args.resume, ranks)
    print("", *quality_report(quality, formats), sep="\n")
    if lora_file:
        print(f"{gib(lora_file.stat().st_size)}: {lora_file}")
    print(f"\n{made['quantization_command']}\n{gib(source.nbytes)} -> {gib(out.stat().st_size)} in "
          f"{time.monotonic() - begin:.1f} s: {out}")
    if lora_file:
        print(*comfyui_note(lora_file, args.lora_mode), sep="\n")


def comfyui_note(lora_file, mode):
    """Lines: how to load a LoRA of ours in ComfyUI, and why."""
    yield f'\nIn ComfyUI, load {lora_file.name} with the node "Load LoRA (Bypass, Model Only)", at strength 1.'
    yield '"Load LoRA" would merge it into the quantized weights and round them again, worse than no LoRA.'
    if mode == "absorb":
        yield "The model is useless without this LoRA, and ComfyUI does not check that it is loaded."
    yield "Of several bypass nodes, ComfyUI applies only the last: join LoRAs in one file with --concat-loras."


def with_dashes(arg):
    """--custom_type=mxfp8 -> --custom-type=mxfp8: convert_to_quant has its flags in both spellings."""
    flag, equals, value = arg.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else arg


def parse_args(parser, argv):
    """The arguments. Raises ValueError for the first flag that does not exist, without its value."""
    args, unknown = parser.parse_known_args([with_dashes(arg) for arg in argv])
    if unknown:
        first = next((arg for arg in unknown if arg.startswith("-")), unknown[0])
        typed = next((arg for arg in argv if with_dashes(arg) == first), first).partition("=")[0]
        raise ValueError(f"{typed[:200]}: not supported here; --help lists all flags, with those of "
                         f"convert_to_quant that are supported")
    return args


def main(argv=None):
    """The command line; argv without the program's name, by default that of this process.

    Bad input raises SystemExit(2) after one line on stderr; Ctrl-C raises SystemExit(130).
    """
    argv = sys.argv[1:] if argv is None else [str(arg) for arg in argv]
    parser = make_parser()
    with errors_in_one_line(parser), wan_fp4.join_ranks() as ranks:
        if __name__ == "__main__":
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if any("\0" in arg for arg in argv):
            raise ValueError("got a NUL character in an argument, expected none")
        args = parse_args(parser, argv)
        for name, value in vars(args).items():
            if value == []:  # argparse drops a value of "--"
                raise ValueError(f"--{name.replace('_', '-')}: got no value, expected one")
        run(args, shlex.join(["convert.py", *(arg for arg in argv if arg != "--resume")]), ranks)


@contextmanager
def errors_in_one_line(parser):
    """The one place that turns exceptions, those of libraries too, into messages and exit codes."""
    def fail(message):
        parser.exit(2, f"convert.py: error: {message}\n")

    try:
        yield
    except KeyboardInterrupt:
        parser.exit(130, "\nconvert.py: interrupted; to continue, run the same command with --resume\n")
    except torch.OutOfMemoryError as error:
        fail(f"{str(error).splitlines()[0]} Free memory on the GPU, or give --device cpu")
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except ValueError as error:
        fail(str(error))
    except (RuntimeError, safetensors.SafetensorError) as error:  # of operations on damaged data
        fail((str(error) or type(error).__name__).splitlines()[0])


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text
    main()
