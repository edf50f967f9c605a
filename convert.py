"""Convert a Wan2.1 checkpoint in bf16, fp16 or fp32 to NVFP4, MXFP8 or FP8, in the comfy_quant format.

    python convert.py -i MODEL.safetensors            writes MODEL-nvfp4.safetensors

main() is the conversion. The sections below it are its steps, each function after its first caller:

  Command line
  Source   the checkpoint: names, shapes and dtypes of all tensors; reads one tensor at a time
  Plan     {weight: format}. A format is "nvfp4" (4.5 bits per weight), "mxfp8" (8.25), "fp8" (8), or "bf16":
           kept in the source's dtype. Chosen by regular expressions, or by a score of each weight. Beside it a
           set of weights that multiply in full precision: their inputs are not quantized (W4A16, W8A16)
  Outputs  what the files will contain. A safetensors header lists all names, shapes and offsets; they follow from
           the source's shapes and the plan, so the header is written first and then each tensor in its place
  Print    the plan as a map
  Write    the files, and the list of what is finished, to resume an interrupted run
  Round    one weight to the stored tensors of its format. Memory holds a few weights, whatever the model's size
  LoRA     low-rank factors of the rounding error, for a second file
  Report   the errors of each type of layer

A quantized layer L is stored as quant.py describes: L.weight, L.weight_scale, for NVFP4 L.weight_scale_2, and the
marker L.comfy_quant, which ComfyUI reads. Older tools read the same information from the header entry
_quantization_metadata; both are always written. The header also keeps the source's own entries (head_dim and so
on) and records the command.

Rounding by what each layer is fed (--calib) is in extra/calibrate.py, the plan by measured errors in
extra/measure.py, LoRAs that are merged into the model in extra/loras.py.

For callers: main(argv); quantize_weight, dequantize_weight and snr for a single weight; plan and layout for the
contents of a file without its data. To vendor this file, copy quant.py and wan_fp4.py with it.
"""
import os
import warnings

if __name__ == "__main__":  # before torch is imported
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # nothing here needs numpy
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages: faster allocation

import argparse
import ctypes
import functools
import hashlib
import json
import math
import re
import shlex
import shutil
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors
import torch
from safetensors import safe_open
from tqdm import tqdm

import quant
import wan_fp4

FORMATS = {"bf16": "bf16", "fp8": "FP8", "mxfp8": "MXFP8", "nvfp4": "NVFP4"}  # of a plan, and as printed


def main(argv=None):
    """The command line; argv without the program's name, by default that of this process.

    Bad input raises SystemExit(2) after one line on stderr; Ctrl-C raises SystemExit(130).
    """
    argv = sys.argv[1:] if argv is None else [str(arg) for arg in argv]
    begin, calibration = time.monotonic(), None
    with wan_fp4.one_line_errors("convert.py", "interrupted; to continue, run the same command with --resume"):
        args = parse_args(argv)
        command = shlex.join(["convert.py", *(arg for arg in argv if arg != "--resume")])
        source = open_source(args)
        paths = output_paths(args, source)
        made = {"quantization_command": command,
                "quantization_versions": f"torch {torch.__version__}, safetensors {safetensors.__version__}"}
        made |= {"expert": f"{source.expert}_noise"} if source.expert else {}  # OUT's name may not show it
        if args.size:
            from extra.measure import check_size
            check_size(args.size, source, made)
        if args.calib:
            from extra.calibrate import calibrate
            named = {"dit": args.dit, "text-encoder": args.text_encoder, "clip": args.clip, "vae": args.vae}
            calibration = calibrate(source, args.calib, named, args.models, args.calib_samples, args.seed,
                                    args.device)
            made |= calibration.header_entries()

        formats, exact, notes = choose_plan(args, source, calibration, made)
        ranks = lora_ranks(args, formats)
        outputs = make_outputs(paths, source, formats, exact, ranks, made)
        print_plan(args, source, formats, exact, notes, outputs)
        if args.dry_run:
            return
        quality = convert(args, source, formats, exact, ranks, outputs, calibration)
        print_report(quality, formats, exact)
        print(f"\n{command}\n{gib(source.nbytes)} -> {gib(outputs[0].size)} in {time.monotonic() - begin:.1f} s: "
              f"{paths[0]}")
        if args.extract_lora:
            print_lora_note(outputs[1])


# ----------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------

# Flags of convert_to_quant that have no effect here, with or without a value: the first three are always on, the
# others tune its learned rounding. Its --top-p weights the search by the weight's own leading directions, which
# makes real outputs worse (bench/RESULTS.md).
WITHOUT_EFFECT = (
    "wan", "comfy-quant", "save-quant-metadata", "top-p", "min-k", "max-k", "full-matrix", "optimizer", "lr",
    "lr-schedule", "lr-gamma", "lr-patience", "lr-factor", "lr-min", "lr-cooldown", "lr-threshold",
    "lr-threshold-mode", "lr-adaptive-mode", "lr-shape-influence", "early-stop-loss", "early-stop-lr",
    "early-stop-stall", "scale-refinement", "scale-optimization", "heur", "low-memory", "manual-seed", "verbose")
RECIPE_TARGET = r"ffn\.(0|2)\.weight|self_attn\.(v|o)\.weight"  # of --lora-target


def parse_args(argv):
    """The arguments, checked. Raises ValueError for flags that do not exist, have a bad value, or exclude one
    another."""
    parser = make_parser()
    args, unknown = parser.parse_known_args([with_dashes(arg) for arg in argv])
    if unknown:
        first = next((arg for arg in unknown if arg.startswith("-")), unknown[0])
        typed = next((arg for arg in argv if with_dashes(arg) == first), first).partition("=")[0]
        raise ValueError(f"{typed[:200]}: not supported here; --help lists all flags, with those of "
                         f"convert_to_quant that are supported")
    for name, value in vars(args).items():
        if any("\0" in str(part) for part in (value if isinstance(value, list) else [value])):
            raise ValueError(f"--{name.replace('_', '-')}: got a NUL character, expected text")
    check_flags(args)
    if ignored := [flag for flag in WITHOUT_EFFECT if getattr(args, flag.replace("-", "_"))]:
        print(f"without effect here, accepted for compatibility: --{', --'.join(ignored)}")
    return args


def make_parser():
    parser = wan_fp4.Parser(
        "convert.py", usage="python convert.py -i MODEL [options]", allow_abbrev=False,
        description="Convert a Wan2.1 checkpoint in bf16, fp16 or fp32 to NVFP4, MXFP8 or FP8.",
        epilog="A REGEX is searched in the full name of a weight, such as blocks.0.ffn.2.weight. Flags that "
        "convert_to_quant has too are spelled as there, with dashes or underscores. These are accepted without "
        f"effect: {', '.join(WITHOUT_EFFECT)}.")
    add = parser.add_argument
    add("-i", "--input", type=Path, metavar="MODEL", required=True,
        help="a safetensors file, a shard index .json, or a folder of shards; official or diffusers names")
    add("-o", "--output", type=Path, metavar="OUT", help="replaced if it exists (default: "
        "MODEL-nvfp4.safetensors beside the input)")
    add("--merge-lora", action="append", metavar="FILE[:STRENGTH]",
        help="merge a LoRA (low-rank factors or whole differences) into MODEL before it is analyzed and rounded; "
        "can be given several times")
    add("--device", default="cpu", metavar="D", help="where to round and, with --calib, to "
        "run the networks: cpu, cuda, cuda:1 (%(default)s)")
    add("--seed", type=whole_number(-2 ** 63, 2 ** 63 - 1), default=0,
        help="for the noise of the calibration videos and the SVD of the LoRA (%(default)s)")
    add("--resume", action="store_true", help="continue an interrupted run of the same command")
    add_plan_flags(parser.add_argument_group("format of each layer (default: --plan score)"))
    add_rounding_flags(parser.add_argument_group("rounding"))
    add_lora_flags(parser.add_argument_group("error-correction LoRA"))
    for flag in WITHOUT_EFFECT:
        add(f"--{flag}", nargs="?", const=True, help=argparse.SUPPRESS)
    return parser


def whole_number(low, high=10 ** 9):
    """The type of an argument: a whole number within bounds."""
    def parse(text):
        if not re.fullmatch("-?[0-9]{1,19}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text[:50]!r}: expected a whole number from {low} to {high}")
        return int(text)
    return parse


def add_plan_flags(group):
    add, base = group.add_argument, group.add_mutually_exclusive_group()
    for fmt in ("nvfp4", "mxfp8", "fp8"):
        base.add_argument(f"--{fmt}", action="store_const", dest="base", const=fmt,
                          help=f"{FORMATS[fmt]} for every layer that no REGEX matches")
    add("--custom-layers", metavar="REGEX",
        help="layers that get --custom-type; takes precedence over --exclude-layers")
    add("--custom-type", choices=FORMATS, help="format of --custom-layers")
    add("--exclude-layers", metavar="REGEX", help="layers that are kept as they are")
    add("--plan", choices=("score", "recipe", "measured"), help="score: the analysis that made the "
        "published recipe, by kurtosis, dynamic range and aspect ratio of each weight; recipe: what it gave for "
        "the 14B; measured: by the error that each layer's rounding causes in the latents, requires --calib and "
        "is then the default; layers that see only the prompt or the picture are then marked as by --fpmm-layers")
    add("--size", type=parse_size, metavar="9.76GiB", help="requires --calib: the measured plan of least error "
        "within this file size, by default that of the score's plan. A LoRA is not counted")
    add("--fpmm-layers", metavar="REGEX", help="quantized layers that multiply in full precision, W4A16 (8 bits: "
        "W8A16): their inputs are not quantized. More accurate, slower on tensor cores, the same file size")
    add("--w4a16", type=parse_share, metavar="SHARE", help="requires --calib: mark layers as --fpmm-layers does, "
        "those where it saves most of the video's error, up to this share of the FLOPs of all layers, such as "
        "0.1. Layers that see only the prompt or the picture are always marked and do not count: they have few "
        "tokens")
    add("--print-flags", action="store_true", help="print the plan as flags for convert_to_quant")
    add("--dry-run", action="store_true", help="stop after the plan")


def add_rounding_flags(group):
    add = group.add_argument
    add("--simple", action="store_true", help="round to nearest, without searching block scales")
    add("--calib", nargs="+", type=Path, metavar="IMAGE", help="run the pipeline on these pictures and round "
        "each layer for what it is fed. The prompt is read from a .txt file beside the picture, if there is one")
    add("--models", type=Path, metavar="DIR", help="the other networks for --calib, as in sample.py (default: "
        "models/ beside this script, or the demo's)")
    for flag in ("text-encoder", "clip", "vae"):
        add(f"--{flag}", type=Path, metavar="FILE", help="network for --calib (default: found in --models)")
    add("--dit", type=Path, metavar="FILE", help="for --calib of Wan2.2's low-noise expert: the high-noise one, "
        "whose steps come first (default: found in --models)")
    add("--calib-samples", type=whole_number(1), default=8192, metavar="N",
        help="with --calib, the maximum number of tokens to record for each layer (%(default)s)")
    add("--num-iter", type=whole_number(1), default=4, metavar="N", help="with --calib, the maximum number of "
        "sweeps over a weight; stops early when nothing changes (%(default)s)")


def add_lora_flags(group):
    add = group.add_argument
    add("--extract-lora", action="store_true", help="also write a LoRA that runs beside the quantized layers and "
        "corrects a part of their rounding error")
    add("--lora-rank", type=whole_number(1), default=64, metavar="R", help="its rank (%(default)s)")
    add("--lora-target", metavar="REGEX", default=RECIPE_TARGET, help="its layers (%(default)s)")
    add("--lora-output", type=Path, metavar="FILE", help="default: OUT with _lora before .safetensors")


def parse_size(text):
    """"9.76GiB" or "500MB" -> bytes."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{0,15})?) ?([KMG]?)(i)?B?", text, re.IGNORECASE)
    size = float(match[1]) * (1024 if match[3] else 1000) ** " KMG".index(match[2].upper() or " ") if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text[:50]!r}: expected a size such as 9.76GiB or 500MB")
    return int(size)


def parse_share(text):
    value = float(text) if re.fullmatch(r"[0-9]{0,9}\.?[0-9]{1,9}", text) else -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text[:50]!r}: expected a number from 0 to 1, such as 0.1")
    return value


def with_dashes(arg):
    """--custom_type=mxfp8 -> --custom-type=mxfp8: convert_to_quant has its flags in both spellings."""
    flag, equals, value = arg.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else arg


def check_flags(args):
    """Settle args.plan: "named" where flags name the formats, "measured" by default with --calib, else "score".
    Raises ValueError for flags that require or exclude one another, which argparse cannot express."""
    named = args.base or args.custom_layers or args.exclude_layers
    if bool(args.custom_layers) != bool(args.custom_type):
        raise ValueError("--custom-layers and --custom-type: give both or neither")
    if named and (args.plan or args.size):
        raise ValueError(f"--{'plan' if args.plan else 'size'}: chooses the format of every layer, cannot be "
                         f"combined with --nvfp4, --mxfp8, --fp8, --custom-layers or --exclude-layers")
    if args.size and args.plan in ("score", "recipe"):
        raise ValueError(f"--size: --plan {args.plan} has a fixed size; leave one of the two out, or give "
                         f"--plan measured")
    others = args.models, args.text_encoder, args.clip, args.vae, args.dit, args.size
    if not args.calib and (args.plan == "measured" or args.w4a16 is not None or any(others)):
        flags = "--size" if args.size else "--w4a16, --plan measured, --models and networks"
        raise ValueError(f"{flags}: requires --calib IMAGE...")
    if not args.extract_lora and (args.lora_output or args.lora_target != RECIPE_TARGET):
        raise ValueError("--lora-target and --lora-output: require --extract-lora")
    wan_fp4.check_device(args.device)
    args.plan = "named" if named else args.plan or ("measured" if args.calib else "score")


# ----------------------------------------------------------------------------------------------------
# Source: the checkpoint to convert
# ----------------------------------------------------------------------------------------------------

FLOATS = torch.float32, torch.float16, torch.bfloat16  # of weights that can be quantized

# The Linears of the blocks hold 98 % of the weights. Of the others, only those in OPTIONAL may be quantized,
# and only on request: every pixel depends on the time layers and the head, and norms, biases and modulation
# are too small to matter.
BLOCK_WEIGHT = re.compile(r"blocks\.([0-9]+)\.(.+)\.weight")
OPTIONAL = re.compile(r"(text_embedding|img_emb)\..+\.weight")


def open_source(args):
    if args.merge_lora:
        from extra.loras import MergedSource
        return MergedSource(args.input, args.merge_lora)
    return Source(args.input)


class Source:
    """A checkpoint's tensors by bare official name: shapes, dtypes, metadata; tensor(name) reads one. expert:
    "high" or "low" for one of Wan2.2's two, "" for Wan2.1 or if the name does not tell.

    Raises FileNotFoundError, and ValueError if path is not a whole Wan DiT in safetensors, or is quantized
    already.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.files = wan_fp4.shards(self.path)
        self.shapes, self.dtypes, self.metadata, self.stored, self.others = {}, {}, {}, {}, []
        for file in self.files:
            metadata, tensors = wan_fp4.read_header(file)
            if wan_fp4.is_lightx2v(tensors):
                raise ValueError(f"{file}: already NVFP4, in LightX2V's layout; repack it without rounding: "
                                 f"python -m extra.lightx2v {shlex.quote(str(path))} -o OUT")
            self.metadata |= metadata
            for stored, (dtype, shape) in tensors.items():
                self.add(file, stored, dtype, shape)
        dit = wan_fp4.load_dit(self.path, "meta")  # raises ValueError unless this is a whole DiT of Wan
        self.expert = wan_fp4.expert_noise(self.path) if dit.cfg.image_dim is None else ""
        if self.others:
            print(f"{path}: left out {len(self.others)} tensors of other networks, such as "
                  f"{self.others[0][:200]}")
        self.nbytes = sum(self.size(name) for name in self.shapes)

    def add(self, file, stored, dtype, shape):
        name = wan_fp4.official_dit_name(wan_fp4.bare_name(stored))
        if name.startswith(wan_fp4.OTHER_NETWORKS):
            self.others.append(stored)
            return
        if name in self.shapes:
            raise ValueError(f"{file}: {stored}: duplicate tensor (also in {self.stored[name][0]}, as "
                             f"{self.stored[name][1]}); give one model")
        scales = ".comfy_quant", ".weight_scale", ".scale_weight", "scaled_fp8"
        if name.endswith(scales) or dtype.startswith("F8"):
            raise ValueError(f"{file}: {name}: already quantized ({dtype}), and rounding it again would add to "
                             f"its error; convert the bf16 model")
        if dtype not in wan_fp4.DTYPES or name.endswith(".weight") and wan_fp4.DTYPES[dtype] not in FLOATS:
            raise wan_fp4.wrong(f"{file}: {name}", dtype, "BF16, F16 or F32", "convert the bf16 model")
        if 0 in shape:
            raise wan_fp4.wrong(f"{file}: {name}", f"shape {shape}", "no size of 0", "get an undamaged copy")
        self.shapes[name], self.dtypes[name], self.stored[name] = shape, wan_fp4.DTYPES[dtype], (file, stored)

    def size(self, name):
        """The bytes of a tensor."""
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize

    def tensor(self, name):
        """The tensor, memory-mapped. Raises ValueError if it has NaN or infinite values.

        The file is opened for each tensor, because an open map keeps every page that was ever read.
        """
        file, stored = self.stored[name]
        try:
            with safe_open(file, "pt") as f:
                tensor = f.get_tensor(stored)
        except safetensors.SafetensorError as error:  # the header could be read when the run started
            raise OSError(f"{file}: {stored}: cannot be read ({error})") from None
        if tensor.is_floating_point() and not all(edge.isfinite() for edge in tensor.aminmax()):
            raise wan_fp4.wrong(f"{file}: {stored}", "NaN or infinite values", "finite ones",
                                "get an undamaged copy")
        return tensor


def output_paths(args, source):
    """The converted model's file and, if there is one, the LoRA's. Raises ValueError if one cannot be written, or
    would overwrite something."""
    path = Path(os.path.abspath(args.input))  # not resolve(): a download cache links to files named by hashes
    stem = path.name if path.is_dir() else re.sub(r"(\.safetensors)?(\.index)?\.\w+$", "", path.name)
    paths = [args.output or path.with_name(f"{stem}-nvfp4.safetensors")]
    check_overwritten(paths, source.files)
    if args.extract_lora:
        paths.append(args.lora_output or paths[0].with_name(f"{paths[0].stem}_lora.safetensors"))
        if paths[0].resolve() == paths[1].resolve():
            raise ValueError(f"{paths[1]}: got one name for the model and its LoRA, expected two; change one")
        check_overwritten(paths[1:], source.files)
    for path in paths:
        if part_file(path).exists() and not (args.resume or args.dry_run):
            raise ValueError(f"{part_file(path)}: another run is writing this file, or was interrupted; wait for "
                             f"it, continue it with --resume, or delete the .part file")
    return paths


def check_overwritten(paths, reads):
    """Raises ValueError if one of the paths is a file that is read or one of another kind, or has no folder."""
    for path in paths:
        if not path.parent.is_dir():
            raise ValueError(f"{path}: cannot be written, its folder does not exist; create it first")
        if path.exists() and any(path.samefile(file) for file in reads):
            raise ValueError(f"{path}: would overwrite a file that is read; give another name")
        if path.exists() and (not path.is_file() or path.suffix not in ("", ".safetensors", ".sft")):
            raise ValueError(f"{path}: would overwrite a file of another kind; give another name")


def part_file(path):
    """Where a file is written until it is complete."""
    return path.with_name(path.name + ".part")


# ----------------------------------------------------------------------------------------------------
# Plan: a format for each weight
# ----------------------------------------------------------------------------------------------------

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


def choose_plan(args, source, calibration, made):
    """The plan that the command line asks for: {name: format}, the set of weights that multiply in full
    precision, and lines to print about it."""
    allowed, scores, notes = quantizable(source.shapes), {}, []
    if args.plan == "named":
        formats = plan(source.shapes, args.base or "nvfp4", args.custom_type, args.custom_layers,
                       args.exclude_layers)
    elif args.plan == "recipe":
        formats = plan(source.shapes, "nvfp4", "mxfp8", RECIPE_MXFP8, RECIPE_KEPT)
    else:
        formats, scores = scored_plan(source)
    marked = exact = set(matching(args.fpmm_layers, allowed, "--fpmm-layers")) if args.fpmm_layers else set()
    if args.plan == "measured" or args.w4a16 is not None:
        from extra.measure import improve_plan
        formats, exact, notes = improve_plan(args, source, calibration, formats, marked, scores, made)
    if kept := [name for name in marked if formats.get(name, "bf16") == "bf16"]:
        notes.append(f"--fpmm-layers: {len(kept)} of the {len(marked)} layers are kept, so they are not marked")
    return formats, {name for name in exact if formats.get(name, "bf16") != "bf16"}, notes


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


# By score: statistics of the weight alone
#
# This is the analysis that made the published recipe (https://github.com/insecure-erasure/quant_probe), with
# MXFP8 in place of its FP8. By their scores alone, a tenth of the weights are kept and some of the next 15 % get
# MXFP8, whatever the model: the thresholds are percentiles of its own scores. Then the verdict on a whole group
# of blocks may overrule those on its weights. The score does not predict the error of NVFP4 on real activations
# (bench/RESULTS.md), which is why extra/measure.py exists.

KURTOSIS_KEPT = 8.0  # a weight of this excess kurtosis is kept, whatever its score
LOWEST_MXFP8_SCORE = 0.50
LEAST_SPREAD = 0.06  # groups of blocks whose scores differ by less count as alike
OWN_VERDICT = {"cross_attn.k", "cross_attn.q", "self_attn.k", "self_attn.q"}  # no group overrules these types
ONE_LOWER = {"bf16": "mxfp8", "mxfp8": "nvfp4", "nvfp4": "nvfp4"}


def scored_plan(source):
    """The score's plan {name: format}, and {name: score}."""
    names = [name for name in quantizable(source.shapes) if BLOCK_WEIGHT.fullmatch(name)]
    results = in_order(lambda name: sensitivity(source.tensor(name)), names)
    measures = dict(tqdm(results, total=len(names), desc="analyzing", disable=None))
    scores = score(measures)
    return plan_by_score(scores, {name: kurtosis for name, (kurtosis, *_) in measures.items()}), scores


def in_order(work, items, device="cpu"):
    """Yields (item, work(item)) for a list of items, in order, computed in threads that run a little ahead.

    On a CPU, torch's own threads are divided among them, so that each weight is rounded on one core.
    """
    threads = torch.get_num_threads()
    workers = min(4, threads) if torch.device(device).type == "cpu" else 2
    torch.set_num_threads(max(1, threads // workers))
    if torch.device(device).type == "cuda":  # loads torch's solvers, which fails if two threads do it at once
        torch.linalg.cholesky(torch.eye(2, device=device))
    pool = ThreadPoolExecutor(workers)
    try:
        ahead = deque(pool.submit(work, item) for item in items[:workers])
        for i, item in enumerate(items):
            ahead.extend(pool.submit(work, later) for later in items[i + workers:i + workers + 1])
            yield item, ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


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


def scaled(values, low, high):
    """values, clipped to [low, high], as a share of the way from low to high; 0 if the two are equal."""
    return (values.clamp(low, high) - low) / (high - low) if high > low else torch.zeros_like(values)


def layer_type(name):
    """blocks.3.ffn.0.weight -> ffn.0; other names are returned unchanged."""
    match = BLOCK_WEIGHT.fullmatch(name)
    return match[2] if match else name


def plan_by_score(scores, kurtosis):
    """{name: score} and {name: excess kurtosis} of the blocks' weights -> {name: format}."""
    values = torch.tensor(list(scores.values()), dtype=torch.float64)
    mxfp8, kept = values.quantile(0.75).item(), values.quantile(0.90).item()

    def verdict(value, peak):
        if value >= kept or peak >= KURTOSIS_KEPT:
            return "bf16"
        return "mxfp8" if value >= max(mxfp8, LOWEST_MXFP8_SCORE) else "nvfp4"

    formats = {}
    for kind, groups in block_groups(scores).items():
        means = [sum(scores[name] for name in names) / len(names) for names in groups]
        alike = max(means) - min(means) < LEAST_SPREAD
        for names, value in zip(groups, means):
            group = verdict(value, max(kurtosis[name] for name in names))
            if kind in OWN_VERDICT or group == "bf16" and not alike:
                formats |= {name: verdict(scores[name], kurtosis[name]) for name in names}
            else:
                formats |= dict.fromkeys(names, ONE_LOWER[group] if alike else group)
    return {name: formats[name] for name in scores}


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


def grid(values):
    """{name: value} of the blocks' weights, such as a plan -> {type of layer: {block: value}}."""
    rows = {}
    for name, value in values.items():
        if match := BLOCK_WEIGHT.fullmatch(name):
            rows.setdefault(match[2], {})[int(match[1])] = value
    return dict(sorted(rows.items()))


# ----------------------------------------------------------------------------------------------------
# Outputs: what the files will contain
# ----------------------------------------------------------------------------------------------------

MARKED = {"fp8": "float8_e4m3fn", "mxfp8": "mxfp8", "nvfp4": "nvfp4"}  # a plan's formats -> as markers say


def lora_ranks(args, formats):
    """{weight: rank of its LoRA}, for the weights for which one is extracted."""
    if not args.extract_lora:
        return {}
    rounded = [name for name, fmt in formats.items() if fmt != "bf16"]
    return dict.fromkeys(matching(args.lora_target, rounded, "--lora-target"), args.lora_rank)


def make_outputs(paths, source, formats, exact, ranks, made):
    """The files to write: the converted model, and the LoRA if there is a path for it. made: header entries on
    how they were made."""
    outputs = [model_output(paths[0], source, formats, exact, made)]
    if len(paths) > 1:
        tensors = {}
        for name, rank in ranks.items():
            m, k = source.shapes[name]
            r = min(rank, m, k)
            layouts = (torch.bfloat16, (m, r)), (torch.bfloat16, (r, k)), (torch.float32, ())
            tensors |= zip(lora_names(name), layouts)
        outputs.append(Output(paths[1], tensors, made | {"base": paths[0].name}))
    return outputs


def model_output(path, source, formats, exact, made):
    markers = {name.removesuffix(".weight"): marker(fmt, source.shapes[name], source.dtypes[name], name in exact)
               for name, fmt in formats.items() if fmt != "bf16"}
    entries = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": markers})}
    return Output(path, layout(source, formats, exact), source.metadata | made | entries)


def marker(fmt, shape, dtype, full_precision=False):
    """What L.comfy_quant and the header say about a layer, with the keys of convert_to_quant."""
    info = {"format": MARKED[fmt]}
    if fmt in quant.BLOCK:
        info["group_size"] = quant.BLOCK[fmt]
    info |= {"orig_dtype": str(dtype), "orig_shape": list(shape)}
    return info | ({"full_precision_matrix_mult": True} if full_precision else {})


def layout(source, formats, exact=()):
    """The tensors of the converted file: {name: (dtype, shape)}."""
    tensors = {}
    for name, shape in source.shapes.items():
        layer, dot, suffix = name.rpartition(".")
        stored = stored_layout(formats.get(name, "bf16"), shape, source.dtypes[name], name in exact)
        for new, tensor in stored.items():
            tensors[layer + dot + (suffix if new == "weight" else new)] = tensor
    return tensors


@functools.cache
def stored_layout(fmt, shape, dtype, full_precision=False):
    """What quantize_weight makes of such a weight: {suffix: (dtype, shape)}."""
    if fmt == "bf16":
        return {"weight": (dtype, shape)}
    required, _ = quant.stored_tensors(MARKED[fmt], *shape[::-1])
    stored = {suffix: (dtypes[0], stored_shape) for suffix, (dtypes, stored_shape, _) in required.items()}
    text = quant.write_marker(marker(fmt, shape, dtype, full_precision))
    return stored | {"comfy_quant": (torch.uint8, tuple(text.shape))}


class Output:
    """A safetensors file of the tensors {name: (dtype, shape)}, written in any order to PATH.part."""

    def __init__(self, path, tensors, metadata):
        self.path, self.part, self.tensors = path, part_file(path), tensors
        self.start, self.offsets, self.size = header(tensors, metadata)

    def create(self):
        """Raises FileExistsError if the .part file exists."""
        with open(self.part, "xb") as file:
            try:
                file.write(self.start)
                file.truncate(self.size)
                file.flush()
            except OSError as error:  # a full disk, which the system reports without a name
                self.part.unlink()
                error.filename = str(self.path)
                raise

    def write(self, tensors):
        """Write some of the tensors, {name: tensor}."""
        with open(self.part, "r+b") as file:
            for name, tensor in tensors.items():
                tensor = tensor.cpu().contiguous()
                expected, got = self.tensors[name], (tensor.dtype, tuple(tensor.shape))
                if got != expected:
                    raise wan_fp4.wrong(f"{self.path}: {name}", got, expected, "the header says so")
                file.seek(self.offsets[name])  # torch gives no buffer without numpy, but its address
                file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


def header(tensors, metadata):
    """{name: (dtype, shape)} and {key: text} -> the file's first bytes, {name: offset}, the file's size.

    A safetensors file (https://github.com/huggingface/safetensors#format) is the length of the JSON in 8
    bytes, the JSON, and the bytes of the tensors. The largest dtypes come first and the JSON is padded with
    spaces, so that every tensor is aligned to its dtype.
    """
    spelling = {dtype: text for text, dtype in wan_fp4.DTYPES.items()}
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


# ----------------------------------------------------------------------------------------------------
# Print: the plan as a map
# ----------------------------------------------------------------------------------------------------

CELLS = {"bf16": ("b", (200, 75, 75)), "FP8": ("f", (215, 130, 190)), "MXFP8": ("8", (230, 170, 50)),
         "NVFP4": ("4", (70, 160, 90)), "W8A16": ("W", (150, 100, 190)), "W4A16": ("w", (60, 130, 190))}


def print_plan(args, source, formats, exact, notes, outputs):
    """Print the plan as a map, what is known about it and, on request, as flags."""
    labels = {name: label(fmt, name in exact) for name, fmt in formats.items()}
    norms = sum(bool(BLOCK_WEIGHT.fullmatch(name)) and name not in formats for name in source.shapes)
    print(*plan_map(labels, norms, sys.stdout.isatty()), *notes, sep="\n")
    if len(outputs) > 1:
        print(f"LoRA of rank {args.lora_rank} for {len(outputs[1].tensors) // 3} layers: {gib(outputs[1].size)}")
    print(f"{gib(source.nbytes)} -> {gib(outputs[0].size)}")
    if args.print_flags:
        print(flags(formats, exact))


def label(fmt, full_precision):
    """How a layer's format is printed."""
    if full_precision:
        return "W4A16" if fmt == "nvfp4" else "W8A16"
    return FORMATS[fmt]


def plan_map(labels, norms=0, color=False):
    """Lines: a row for each type of layer, with a character for each block and the percentage of each format. The
    norms count as bf16, in the total too."""
    listed = [text for text in CELLS if text in ("bf16", "MXFP8", "NVFP4") or text in labels.values()]

    def cell(text):
        letter, (r, g, b) = CELLS[text]
        return f"\033[48;2;{r};{g};{b}m{letter}\033[0m" if color else letter

    def percentages(row):
        return "".join(f"{100 * row.count(text) / len(row):10.1f}" for text in listed)

    rows = grid(labels)
    width = 1 + max(max(row) for row in rows.values())
    lines = [f"{'blocks 0, 1, ...':17} {'':{width}}  " + "".join(f" {cell(text)} {text:>5} %" for text in listed)]
    for kind, row in rows.items():
        cells = "".join(cell(row[i]) if i in row else " " for i in range(width))
        lines.append(f"{kind:17} {cells} {percentages(list(row.values()))}")
    total = [text for row in rows.values() for text in row.values()] + ["bf16"] * norms
    lines.append(f"{'all, with norms':17} {'':{width}} {percentages(total)}")
    others = (f"{name}: {text}" for name, text in labels.items() if not BLOCK_WEIGHT.fullmatch(name))
    return [*lines, *sorted(others), ""]


def gib(size):
    return f"{size / 2 ** 30:.2f} GiB" if size >= 2 ** 28 else f"{size / 2 ** 20:.2f} MiB"


def flags(formats, exact=()):
    """A plan as flags, all of them convert_to_quant's but --fpmm-layers."""
    used = set(formats.values()) - {"bf16"}
    base = "fp8" if "fp8" in used and "nvfp4" not in used else "nvfp4"
    layers = {f"--custom-type {fmt} --custom-layers": [name for name in formats if formats[name] == fmt]
              for fmt in sorted(used - {base})}
    layers["--exclude-layers"] = [name for name in formats if formats[name] == "bf16"]
    layers["--fpmm-layers"] = [name for name in formats if name in exact]
    return f"--{base}" + "".join(f' {flag} "{regex(names)}"' for flag, names in layers.items() if names)


def regex(names):
    """The regular expression of these weights."""
    groups = {}  # {type of layer: blocks}
    for name in names:
        match = BLOCK_WEIGHT.fullmatch(name)
        groups.setdefault(layer_type(name), []).append(match and match[1])
    return "|".join(rf"blocks\.({'|'.join(sorted(blocks, key=int))})\.{re.escape(kind)}\.weight"
                    if blocks[0] else re.escape(kind) for kind, blocks in sorted(groups.items()))


# ----------------------------------------------------------------------------------------------------
# Write: every tensor of the source, rounded as planned
# ----------------------------------------------------------------------------------------------------

def convert(args, source, formats, exact, ranks, outputs, calibration):
    """Writes `source` in the planned formats. Returns {name: quality}: for each quantized weight its
    signal-to-noise ratios in dB and, with a LoRA, the share of the error's energy that the LoRA holds.

    The files get their final names only on success. What an interruption leaves is for --resume; if the source is
    damaged and no run could succeed, nothing stays.
    """
    progress = outputs[0].path.with_name(outputs[0].path.name + ".progress")
    reads = source.files if calibration is None else source.files + calibration.files
    done = begin(outputs, progress, reads, args.resume)
    method = "rtn" if args.simple else "search"

    def work(name):
        return round_tensor(source, name, formats.get(name, "bf16"), name in exact, args.device, method,
                            ranks.get(name, 0), args.seed)

    try:
        if calibration is None:
            results = in_order(work, [name for name in source.shapes if name not in done], args.device)
        else:
            from extra.calibrate import round_blocks
            results = round_blocks(calibration, formats, exact, ranks, method, args.num_iter, args.seed,
                                   outputs[0], done)
        with tqdm(total=source.nbytes, initial=sum(map(source.size, done)), unit="B", unit_scale=True,
                  desc="converting", disable=None) as bar:
            for name, (quality, *parts) in results:
                write(outputs, progress, name, quality, parts)
                done[name] = quality
                bar.update(source.size(name))
    except ValueError:
        for path in (progress, *(output.part for output in outputs)):
            path.unlink(missing_ok=True)
        raise
    except OSError as error:
        if error.strerror and not error.filename:  # a full disk is reported without a name
            error.filename = str(outputs[0].path)
        raise
    finish(outputs, progress)
    return {name: quality for name, quality in done.items() if quality}


def begin(outputs, progress, reads, resume):
    """Create the .part files, or check those of an interrupted run. Returns {name: quality} of what is finished.

    `progress` is a text file: the first line identifies the run, the others are finished tensors of the source.
    To resume, the files that are read, the plan and the command must be the same. Raises ValueError if they are
    not or if the disk is too small, and FileExistsError if another run has created a .part file.
    """
    check_overwritten([output.path for output in outputs], reads)
    stats = [(file.stat().st_size, file.stat().st_mtime_ns) for file in reads]
    identity = hashlib.sha256(b"".join(output.start for output in outputs) + repr(stats).encode()).hexdigest()
    if resume:
        if not all(path.exists() for path in (progress, *(output.part for output in outputs))):
            raise ValueError(f"--resume: nothing to resume, {progress} or a .part file is missing; start without "
                             f"--resume")
        first, *lines = progress.read_text().splitlines(keepends=True) or [""]
        if first != identity + "\n":
            raise ValueError(f"--resume: {progress} belongs to another run (the source, the plan or the command "
                             f"differs); delete the .part files and start without --resume")
        lines = [line for line in lines if line.endswith("\n")]  # the last one may be incomplete
        progress.write_text("".join([first, *lines]))
        return dict(json.loads(line) for line in lines)
    need, free = sum(output.size for output in outputs), shutil.disk_usage(progress.parent).free
    if need > free:
        raise ValueError(f"{outputs[0].path}: needs {gib(need)}, but only {gib(free)} of the disk are free; free "
                         f"some space, or choose another disk with -o")
    for output in outputs:
        output.create()
    progress.write_text(identity + "\n")
    return {}


def write(outputs, progress, name, quality, parts):
    """Write a tensor's part of each output, then its line."""
    for output, tensors in zip(outputs, parts):
        output.write(tensors)
    with open(progress, "a") as file:
        file.write(json.dumps([name, quality]) + "\n")


def finish(outputs, progress):
    """Everything is written: rename the files to their final names."""
    for output in reversed(outputs):
        with open(output.part, "r+b") as file:
            os.fsync(file.fileno())  # otherwise a power cut could leave the new name with old bytes
        os.replace(output.part, output.path)
    progress.unlink()


# ----------------------------------------------------------------------------------------------------
# Round: one weight to its stored tensors
# ----------------------------------------------------------------------------------------------------
#
# Without knowing its inputs, all there is to choose for a weight is the best scale of each block, which quant.py
# searches. Biases are not changed. convert_to_quant corrects them by the mean of E x, E being the error of the
# weight, over random inputs x; these have mean zero, so the correction is zero too, up to noise.

def round_tensor(source, name, fmt, full_precision, device, method, rank, seed):
    """One tensor of the source -> {measure: dB}, empty if it is kept, and the tensors of the converted file and
    of the LoRA, by full name."""
    w = source.tensor(name)
    if fmt == "bf16":
        return {}, {name: w}, {}
    w = w.to(device)
    stored = quantize_weight(w, fmt, method, full_precision)
    factors = functools.partial(low_rank, rank=rank, seed=seed) if rank else None
    return evaluate(name, w, stored, {"weight": snr}, factors)


def evaluate(name, w, stored, measures, factors):
    """round_tensor's result for a rounded weight. measures: {name: function of w and its approximation};
    factors: low_rank as a function of the error, or None for no LoRA."""
    approximation = dequantize_weight(stored, w.shape)
    quality = {key: measure(w, approximation) for key, measure in measures.items()}
    tensors, lora = {name.removesuffix("weight") + suffix: part for suffix, part in stored.items()}, {}
    if factors:
        error = approximation.neg_().add_(w)  # in place: a weight of the 14B takes 280 MB in float32
        up, down, shares = factors(error)
        up, down = up.bfloat16(), down.bfloat16()
        lora = dict(zip(lora_names(name), (up, down, torch.tensor(float(len(down))))))
        corrected = error.addmm_(up.float(), down.float(), alpha=-1).neg_().add_(w)
        quality |= {f"{key} with LoRA": measure(w, corrected) for key, measure in measures.items()}
        quality["share"] = shares[-1].item()
    return quality, tensors, lora


@torch.no_grad()
def quantize_weight(w, fmt, method="search", full_precision=False) -> dict[str, torch.Tensor]:
    """A weight (M, K) -> its stored tensors by suffix, as QuantLinear.from_tensors takes them.

    fmt        "nvfp4", "mxfp8", "fp8", or "bf16": returned unchanged
    method     "search": block scales of least squared error; "rtn": from the largest weight of each block
    full_precision   the marker says that the layer's inputs must not be quantized

    extra.calibrate.quantize_weight minimizes the error of the outputs instead. Raises ValueError for an unknown
    format, shapes that do not fit, and values that are not finite.
    """
    if fmt == "bf16":
        return {"weight": w}
    if fmt not in FORMATS:
        raise ValueError(f"quantize_weight: got format {fmt!r}, expected one of {', '.join(FORMATS)}")
    if fmt == "nvfp4":
        parts = quant.quantize_nvfp4(w, method=method)
    elif fmt == "mxfp8":
        parts = quant.quantize_mxfp8(w, method=method)
    else:
        parts = quant.quantize_fp8(w)
    stored = dict(zip(("weight", "weight_scale", "weight_scale_2"), parts))
    return stored | {"comfy_quant": quant.write_marker(marker(fmt, w.shape, w.dtype, full_precision))}


def dequantize_weight(stored, shape) -> torch.Tensor:
    """The inverse of quantize_weight: stored tensors -> (M, K) float32."""
    layer = quant.QuantLinear.from_tensors("weight", stored, shape[1], shape[0])
    return layer.dequantized(torch.float32)


def energy(x):
    """Each row's sum of squares in float32, which is fast; the sum over rows in float64, which is accurate."""
    return x.square().sum(1).double().sum().item()


def snr(w, approximation, energy=energy) -> float:
    """Signal-to-noise ratio in dB, infinite without noise. energy: a function from rows (R, K) to a number."""
    signal = noise = 0.0
    for i in range(0, len(w), 512):  # a few rows at a time: no second copy of w in float32
        x, y = w[i:i + 512].float(), approximation[i:i + 512]
        signal, noise = signal + energy(x), noise + energy(x - y)
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf


# ----------------------------------------------------------------------------------------------------
# LoRA: a low-rank correction of W - Q
# ----------------------------------------------------------------------------------------------------
#
# The LoRA runs beside the layer, y = Q x + up (down x), and must not be merged: the sum would have to be
# rounded again, which undoes the correction. Rounding errors are nearly white, so rank 64 of 5120 holds about
# 4 % of their energy.

@torch.no_grad()
def low_rank(error, rank, seed=0):
    """error = W - Q (M, K) -> up (M, r), down (r, K), and the shares (r,) of the energy of `error` in the first
    1, 2, ..., r of their columns and rows.

    r = min(rank, M, K). The SVD is exact for small matrices, otherwise randomized (Halko et al. 2011,
    https://arxiv.org/abs/0909.4061, algorithm 4.4).
    """
    error, rank = error.float(), min(rank, *error.shape)
    if min(error.shape) <= max(512, rank + 16):
        u, s, v = torch.linalg.svd(error, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)  # the global one is shared between threads
        start = torch.randn(error.shape[1], rank + 16, generator=generator).to(error)  # (K, r + 16)
        basis = torch.linalg.qr(error @ start).Q  # (M, r + 16)
        for _ in range(6):
            basis = torch.linalg.qr(error @ torch.linalg.qr(error.T @ basis).Q).Q
        u, s, v = torch.linalg.svd(basis.T @ error, full_matrices=False)
        u = basis @ u
    u, s, v = u[:, :rank], s[:rank], v[:rank]  # (M, r), (r,), (r, K)
    total = torch.linalg.vector_norm(error, dim=1).double().square().sum().clamp(min=1e-300)
    shares = s.double().square().cumsum(0) / total
    balance = s.sqrt()  # both factors of the same magnitude, within the range of their dtype
    return u * balance, v * balance[:, None], shares


def lora_names(name):
    """A weight's tensors in a LoRA file, by ComfyUI's names: up, down, alpha."""
    prefix = "diffusion_model." + name.removesuffix(".weight")
    return f"{prefix}.lora_up.weight", f"{prefix}.lora_down.weight", f"{prefix}.alpha"


# ----------------------------------------------------------------------------------------------------
# Report
# ----------------------------------------------------------------------------------------------------

def print_report(quality, formats, exact):
    """Print mean and worst SNR per type of layer and format, and the worst layers; with a LoRA also the share of
    the error's energy that it holds, and the SNR with it. After calibration, the SNR of the layers' outputs for
    the inputs that were seen; otherwise of the weights."""
    key = "output" if any("output" in measures for measures in quality.values()) else "weight"
    groups = {}
    for name, measures in quality.items():
        for kind in (layer_type(name), "all"):
            groups.setdefault((kind == "all", kind, label(formats[name], name in exact)), []).append(measures)
    title = f"{key} SNR               layers  mean dB  worst dB"
    if any("share" in measures for measures in quality.values()):
        title += "   LoRA: layers  holds  mean dB  with it"
    print(f"\n{title}")
    for (_, kind, fmt), group in sorted(groups.items()):
        line = f"{kind:16} {fmt:7} {len(group):6} {mean(group, key):8.2f} {min(m[key] for m in group):9.2f}"
        if corrected := [m for m in group if "share" in m]:
            line += (f" {len(corrected):15} {mean(corrected, 'share'):6.1%} {mean(corrected, key):8.2f}"
                     f" {mean(corrected, f'{key} with LoRA'):8.2f}")
        print(line)
    worst = sorted((measures[key], name) for name, measures in quality.items())[:5]
    print("worst: " + ", ".join(f"{name} {value:.2f}" for value, name in worst))


def mean(group, key):
    return sum(measures[key] for measures in group) / len(group)


def print_lora_note(output):
    """Print how to load the LoRA in ComfyUI, and why."""
    print(f'{gib(output.size)}: {output.path}\n\nIn ComfyUI, load {output.path.name} with the node "Load LoRA '
          '(Bypass, Model Only) (for debugging)", at strength 1.\n"Load LoRA" would merge it into the quantized '
          'weights and round them again, worse than no LoRA.\nOf several bypass nodes, ComfyUI applies only the '
          'last: join LoRAs in one file with python -m extra.loras.')


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text
    main()
