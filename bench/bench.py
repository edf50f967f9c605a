"""Speed and memory of this project on a CPU, side by side with the libraries that a user would otherwise take.

    python bench/bench.py [--only TEXT] [--rounds 5]    ours against each peer, one row per task
    python bench/bench.py --conversion [--blocks 2]     convert.py at the 14B model's shapes

Peers. Every row runs in a process of its own. Ours and the peer take turns at the same work; the first turn is
a warm-up (whole programs need none), and the table shows the medians. Speed-up is the peer's time divided by
ours. Memory is what the work adds to the peak of a process that does nothing else; for a whole program, it is the
program's peak. Everything runs on the CPU with random weights, in float32 unless the row says otherwise, on as
many threads as torch chooses. If a peer is not installed, its rows are skipped.

Peers come with requirements-test.txt, except convert_to_quant:
    pip install --no-deps convert-to-quant==1.3.4 prodigy-plus-schedule-free==2.0.1

The other scripts in this folder import ROOT, timed, median_seconds and require from here.
"""
import argparse
import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "demo" / "cat.png"
sys.path.insert(0, str(ROOT))
import convert
import quant
import wan_fp4

PEERS = "comfy-kitchen", "diffusers", "transformers", "convert-to-quant"

# ----------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------

def timed(work, clock=time.perf_counter):
    """Seconds that one call takes, and what it returns."""
    start = clock()
    result = work()
    return clock() - start, result


def median_seconds(*works, rounds=5, warm_up=1):
    """The median time of each function, all taking turns."""
    seconds = [[] for _ in works]
    for i in range(warm_up + rounds):
        for work, taken in zip(works, seconds):
            taken.append(timed(work)[0])
    return [statistics.median(taken[warm_up:]) for taken in seconds]


def process_memory(key):
    """A line of /proc/self/status in MiB: VmHWM is the peak, RssAnon this process's own, RssFile mapped files."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) / 1024


# A child process inherits its parent's peak memory. Starting it from this small process keeps the figure clean.
WATCH = """import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print("\\n", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(code)"""


def run_program(command):
    """Run a command with its output hidden. Returns its peak memory in MiB."""
    done = subprocess.run([sys.executable, "-c", WATCH, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


# ----------------------------------------------------------------------------------------------------
# Rows: each function takes an empty folder, prepares the work, and returns (peer's, ours)
# ----------------------------------------------------------------------------------------------------

def require(*modules):
    """Raise ImportError if one of these modules is not installed."""
    for module in modules:
        importlib.import_module(module)


def weight():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5120, 5120, generator=generator).mul_(0.02).bfloat16()


def comfy_kitchen_codec(fmt):
    """comfy-kitchen's quantize(w, tensor_scale) -> q, and dequantize(q, tensor_scale, dtype)."""
    from comfy_kitchen.backends.eager import quantization as eager
    if fmt == "nvfp4":
        return (lambda w, scale: eager.quantize_nvfp4(w, scale),
                lambda q, scale, dtype: eager.dequantize_nvfp4(q[0], scale, q[1], dtype))
    return (lambda w, scale: eager.quantize_mxfp8(w),
            lambda q, scale, dtype: eager.dequantize_mxfp8(q[0], q[1].view(torch.float8_e8m0fnu), dtype))


OURS = {"nvfp4": (quant.quantize_nvfp4, quant.dequantize_nvfp4),
        "mxfp8": (quant.quantize_mxfp8, quant.dequantize_mxfp8)}


def quantize(fmt, folder):
    """The peer is given NVFP4's tensor scale; ours has to find it."""
    w, scale = weight(), quant.quantize_nvfp4(weight())[2]
    (theirs, _), (ours, _) = comfy_kitchen_codec(fmt), OURS[fmt]
    return lambda: theirs(w, scale), lambda: ours(w)


def dequantize(fmt, dtype, folder):
    w, scale = weight(), quant.quantize_nvfp4(weight())[2]
    (their_quantize, theirs), (our_quantize, ours) = comfy_kitchen_codec(fmt), OURS[fmt]
    q, stored = their_quantize(w, scale), our_quantize(w)
    return lambda: theirs(q, scale, dtype), lambda: ours(*stored, dtype=dtype)


def saved(model, folder, load):
    """A library's model as it is, and its saved files read by our loader."""
    model.eval().save_pretrained(folder)
    return model, load(folder)


DIT = wan_fp4.DiTConfig(dim=1536, ffn_dim=8960, num_blocks=2)


def dit_inputs():
    """x, t, text, image, y: 1,950 tokens, and a prompt of 30."""
    g = torch.Generator().manual_seed(0)
    x, y, text, image = (torch.randn(1, *shape, generator=g) for shape in (
        (16, 3, 50, 52), (20, 3, 50, 52), (30, 4096), (257, 1280)))
    return x, torch.tensor([900.0]), text, image, y


def dit(folder):
    """diffusers' DiT needs the prompt padded to 512 tokens."""
    import diffusers
    theirs, ours = saved(diffusers.WanTransformer3DModel(
        num_attention_heads=12, in_channels=36, ffn_dim=8960, num_layers=2, image_dim=1280,
        added_kv_proj_dim=1536), folder, wan_fp4.load_dit)
    x, t, text, image, y = dit_inputs()
    both, padded = torch.cat([x, y], 1), F.pad(text, (0, 0, 0, 482))
    return lambda: theirs(both, t, padded, image), lambda: ours(x, t, text, image, y)


def dit_nvfp4(folder):
    """The peer is our own DiT with plain weights."""
    plain, nvfp4 = folder / "plain.safetensors", folder / "nvfp4.safetensors"
    save_file(wan_fp4.WanDiT(DIT).state_dict(), plain)
    with contextlib.redirect_stdout(io.StringIO()):
        convert.main(["-i", plain, "-o", nvfp4, "--nvfp4", "--simple"])
    plain, ours, arguments = wan_fp4.load_dit(plain), wan_fp4.load_dit(nvfp4), dit_inputs()
    return lambda: plain(*arguments), lambda: ours(*arguments)


def vae(work, shape, folder):
    """work: "encode" or "decode"."""
    import diffusers
    theirs, ours = saved(diffusers.AutoencoderKLWan(), folder, wan_fp4.load_vae)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    return lambda: getattr(theirs, work)(x), lambda: getattr(ours, work)(x)


def umt5(folder):
    import transformers
    config = transformers.UMT5Config(vocab_size=1000, d_model=4096, d_ff=10240, num_layers=2, num_heads=64)
    theirs, ours = saved(transformers.UMT5EncoderModel(config), folder, wan_fp4.load_umt5)
    ids = torch.randint(2, 1000, (1, 512))
    mask = torch.ones_like(ids)
    return lambda: theirs(ids, attention_mask=mask), lambda: ours(ids, mask)


def clip(folder):
    import transformers
    config = transformers.CLIPVisionConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=5,
                                           num_attention_heads=16, patch_size=14, hidden_act="gelu")
    theirs, ours = saved(transformers.CLIPVisionModel(config), folder, wan_fp4.load_clip)
    theirs.encoder.layers = theirs.encoder.layers[:4]  # ours leaves the last layer out
    pixels = torch.randn(1, 3, 224, 224)
    return lambda: theirs(pixels), lambda: ours(pixels)


def conversion(blocks, ours, theirs, folder):
    """Two converters as whole programs, on blocks of width 2048 with 71 M parameters each."""
    require("convert_to_quant", "prodigyplus")
    model = folder / "model.safetensors"
    layers = [*(f"self_attn.{x}" for x in "qkvo"), *(f"cross_attn.{x}" for x in "qkvo")]
    write_blocks(model, blocks, layers, 2048, 8192 + 1024)
    both = ["-i", model, "-o", folder / "out.safetensors", "--nvfp4", "--comfy_quant"]
    us = [sys.executable, ROOT / "convert.py", *both, *ours]
    them = [sys.executable, "-m", "convert_to_quant.convert_to_quant", *both, *theirs]
    return lambda: run_program(them), lambda: run_program(us)


def demo_program(folder):
    """sample.py as a whole program, without a peer."""
    command = [sys.executable, ROOT / "sample.py", PICTURE, "-o", folder / "out.mp4"]
    return None, lambda: run_program(command)


class Row(NamedTuple):
    name: str
    peer: str
    make: Callable
    program: bool = False  # both sides are whole programs


ROWS = [
    Row("NVFP4 quantize bf16", "comfy-kitchen", partial(quantize, "nvfp4")),
    Row("NVFP4 dequantize to bf16", "comfy-kitchen", partial(dequantize, "nvfp4", torch.bfloat16)),
    Row("NVFP4 dequantize to float32", "comfy-kitchen", partial(dequantize, "nvfp4", torch.float32)),
    Row("MXFP8 quantize bf16", "comfy-kitchen", partial(quantize, "mxfp8")),
    Row("MXFP8 dequantize to bf16", "comfy-kitchen", partial(dequantize, "mxfp8", torch.bfloat16)),
    Row("MXFP8 dequantize to float32", "comfy-kitchen", partial(dequantize, "mxfp8", torch.float32)),
    Row("DiT, 2 layers of 1536, 1950 tokens", "diffusers", dit),
    Row("the same with NVFP4 weights", "ours, plain", dit_nvfp4),
    Row("VAE decode, 9 frames of 240x416", "diffusers", partial(vae, "decode", (1, 16, 3, 30, 52))),
    Row("VAE encode, 9 frames of 240x416", "diffusers", partial(vae, "encode", (1, 3, 9, 240, 416))),
    Row("UMT5, 512 tokens, 2 layers", "transformers", umt5),
    Row("CLIP image tower, 4 layers", "transformers", clip),
    Row("convert 425 M, simple", "convert-to-quant",
        partial(conversion, 6, ["--simple"], ["--simple"]), program=True),
    Row("convert 71 M, search / learned", "convert-to-quant",
        partial(conversion, 1, [], ["--num_iter", "500"]), program=True),
    Row(f"sample.py {PICTURE.relative_to(ROOT)}", "", demo_program, program=True)]


@torch.no_grad()
def measure(row, rounds, side):
    """In a process of its own: the medians of peer and ours, and for programs their peaks in MiB. With a side,
    0 for the peer and 1 for ours, the MiB that this side adds to the process's peak."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            both = row.make(Path(folder))
        except ImportError as error:
            return {"skipped": str(error)}
        if side is not None:
            both[side]()  # from now on, mapped files are in memory
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before = process_memory("VmHWM")
            both[side]()
            return process_memory("VmHWM") - before
        peaks = [0.0, 0.0]

        def work(i):
            peaks[i] = both[i]() if both[i] else 0.0

        warm_up = 0 if row.program else 1
        seconds = median_seconds(partial(work, 0), partial(work, 1), rounds=rounds, warm_up=warm_up)
        return seconds, peaks if row.program else None


def ask(*arguments):
    """What measure() returns in a new process."""
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def compare(only, rounds):
    """Print the table of rows whose names contain `only`."""
    print_machine()
    versions, absent = [], []
    for name in PEERS:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
    print("installed: " + (", ".join(versions) or "none"))
    if absent:
        print(f"not installed: {', '.join(absent)}")
    print(f"{'':36}{'peer':>17}{'peer s':>9}{'ours s':>9}{'speed-up':>10}{'peer MiB':>10}{'ours MiB':>10}")
    for i, row in enumerate(ROWS):
        if only not in row.name:
            continue
        answer = ask("--row", i, "--rounds", rounds)
        if "skipped" in answer:
            print(f"{row.name:36}{row.peer:>17}  skipped: {answer['skipped']}", flush=True)
            continue
        (theirs, ours), peaks = answer
        peaks = peaks or [ask("--row", i, "--side", side) for side in (0, 1)]
        theirs = f"{theirs:9.3f}{ours:9.3f}{theirs / ours:9.2f}x{peaks[0]:10.0f}" if row.peer else (
            f"{'':9}{ours:9.3f}{'':20}")
        print(f"{row.name:36}{row.peer:>17}{theirs}{peaks[1]:10.0f}", flush=True)


def print_machine():
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "?")
    print(f"{model}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads")


# ----------------------------------------------------------------------------------------------------
# Conversion at the 14B model's shapes
# ----------------------------------------------------------------------------------------------------

PARAMETERS = 16394.9e6  # of the whole 14B image-to-video model
DIT_LAYERS = [*(f"self_attn.{x}" for x in "qkvo"),
              *(f"cross_attn.{x}" for x in ("q", "k", "v", "o", "k_img", "v_img"))]
CONVERSIONS = {"rtn": ["--nvfp4", "--simple"], "search": ["--nvfp4"], "MXFP8 search": ["--mxfp8"],
               "plan score, search": [], "search, LoRA of rank 64": ["--nvfp4", "--extract-lora"]}


def write_blocks(path, blocks, layers, dim, hidden):
    """A checkpoint of random DiT blocks in bf16: these square layers and the feed-forward. Returns its size."""
    generator = torch.Generator().manual_seed(0)
    shapes = {layer: (dim, dim) for layer in layers} | {"ffn.0": (hidden, dim), "ffn.2": (dim, hidden)}
    tensors = {f"blocks.{i}.{layer}.weight": torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
               for i in range(blocks) for layer, shape in shapes.items()}
    save_file(tensors, path)
    return sum(tensor.numel() for tensor in tensors.values())


def conversion_speed(blocks):
    """Convert some of the 40 blocks in each way, start-up and report included."""
    print_machine()
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "model.safetensors", Path(folder) / "out.safetensors"
        count = write_blocks(source, blocks, DIT_LAYERS, 5120, 13824)
        print(f"{count / 1e6:.0f} M parameters")
        print(f"{'':26}{'seconds':>8}{'Mparam/s':>10}{'peak GiB':>10}{'16.4 B in minutes':>19}")
        for name, flags in CONVERSIONS.items():
            command = [sys.executable, ROOT / "convert.py", "-i", source, "-o", out, *flags]
            seconds, peak = timed(lambda: run_program(command))
            print(f"{name:26}{seconds:8.1f}{count / 1e6 / seconds:10.1f}{peak / 1024:10.2f}"
                  f"{PARAMETERS / (count / seconds) / 60:19.1f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="only the rows whose names contain this")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: 5)")
    parser.add_argument("--conversion", action="store_true", help="conversion speed instead of the table")
    parser.add_argument("--blocks", type=int, default=2, help="blocks to convert, of 40 (default: 2)")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)  # for a process that measures one row
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row is not None:
        print(json.dumps(measure(ROWS[args.row], args.rounds, args.side)))
    elif args.conversion:
        conversion_speed(args.blocks)
    else:
        compare(args.only, args.rounds)


if __name__ == "__main__":
    main()
