"""Speed and memory of this project, side by side with the libraries that a user would otherwise take.

    python bench/bench.py [--only TEXT] [--rounds 5]    ours against each peer, one row per task
    python bench/bench.py --floors                      the least time that this machine needs for the same work
    python bench/bench.py --conversion [--blocks 2]     convert.py at the 14B model's shapes
    python bench/bench.py --ranks                       two processes of one thread against one with two threads
    python bench/bench.py --scaling                     the 14B model on 2, 4 and 8 GPUs, by arithmetic

Peers. Every row runs in a process of its own. Ours and the peer take turns at the same work; the first turn is
a warm-up (whole programs need none), and the table shows the medians. Speed-up over the peer is the peer's time
divided by ours. Memory is what the work adds to the peak of a process that does nothing else; for a whole
program, it is the program's peak. Everything runs on the CPU with random weights, in float32 unless the row says
otherwise, on as many threads as torch chooses. If a peer is not installed, its rows are skipped and listed.

Floors. The floating-point operations of each network, counted on the meta device, divided by the rate of one
large matrix product or convolution. For the formats: the seconds to fill an output of 5120 x 5120.

Scaling. What the all-to-alls of a forward send at the nominal rate of a link, added to the published time of one
GPU divided by their number. Nothing else is counted, so efficiencies are upper bounds.

Peers come with requirements-test.txt, except convert_to_quant:
    pip install --no-deps convert-to-quant==1.3.4 prodigy-plus-schedule-free==2.0.1

The other scripts in this folder import ROOT, timed, process_memory and require from here.
"""
import argparse
import contextlib
import importlib
import importlib.metadata
import io
import json
import math
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
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import convert
import quant
import wan_fp4

PEERS = "comfy-kitchen", "torchao", "diffusers", "transformers", "convert-to-quant"
BEFORE = "cbe52c7"  # the commit before the work on speed, which sample.py is compared with

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


class Missing(ImportError):
    """What a row compares with is not on this machine."""


def require(*modules):
    """Raise ImportError if one of these modules is not installed."""
    for module in modules:
        importlib.import_module(module)


def weight():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5120, 5120, generator=generator).mul_(0.02).bfloat16()


def peer_codec(fmt, peer):
    """A library's quantize(w, tensor_scale) -> q, and dequantize(q, tensor_scale, dtype)."""
    if peer == "torchao" and fmt == "nvfp4":
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
        return (lambda w, scale: NVFP4Tensor.to_nvfp4(w, per_tensor_scale=scale),
                lambda q, scale, dtype: q.dequantize(dtype))
    if peer == "torchao":
        from torchao.prototype.mx_formats.mx_tensor import MXTensor
        return (lambda w, scale: MXTensor.to_mx(w, torch.float8_e4m3fn, 32),
                lambda q, scale, dtype: q.dequantize(dtype))
    from comfy_kitchen.backends.eager import quantization as eager
    if fmt == "nvfp4":
        return (lambda w, scale: eager.quantize_nvfp4(w, scale),
                lambda q, scale, dtype: eager.dequantize_nvfp4(q[0], scale, q[1], dtype))
    return (lambda w, scale: eager.quantize_mxfp8(w),
            lambda q, scale, dtype: eager.dequantize_mxfp8(q[0], q[1].view(torch.float8_e8m0fnu), dtype))


OURS = {"nvfp4": (quant.quantize_nvfp4, quant.dequantize_nvfp4),
        "mxfp8": (quant.quantize_mxfp8, quant.dequantize_mxfp8)}


def quantize(fmt, peer, folder):
    """The peer is given NVFP4's tensor scale; ours has to find it."""
    w, scale = weight(), quant.quantize_nvfp4(weight())[2]
    theirs, _ = peer_codec(fmt, peer)
    ours, _ = OURS[fmt]
    return lambda: theirs(w, scale), lambda: ours(w)


def dequantize(fmt, peer, dtype, folder):
    w, scale = weight(), quant.quantize_nvfp4(weight())[2]
    their_quantize, theirs = peer_codec(fmt, peer)
    our_quantize, ours = OURS[fmt]
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


def vae_decode(folder):
    import diffusers
    theirs, ours = saved(diffusers.AutoencoderKLWan(), folder, wan_fp4.load_vae)
    z = torch.randn(1, 16, 3, 30, 52, generator=torch.Generator().manual_seed(0))
    return lambda: theirs.decode(z), lambda: ours.decode(z)


def vae_encode(folder):
    import diffusers
    theirs, ours = saved(diffusers.AutoencoderKLWan(), folder, wan_fp4.load_vae)
    video = torch.rand(1, 3, 9, 240, 416, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return lambda: theirs.encode(video), lambda: ours.encode(video)


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


def demo_program(before, folder):
    """sample.py as a whole program, now and at an earlier commit, with the same demo files."""
    files = ["sample.py", "wan_fp4.py", "quant.py"]
    packed = subprocess.run(["git", "-C", ROOT, "archive", before, *files], capture_output=True)
    if packed.returncode:
        raise Missing(packed.stderr.decode().strip())
    subprocess.run(["tar", "-x", "-C", folder], input=packed.stdout, check=True)
    (folder / "demo").mkdir()
    for file in (ROOT / "demo").glob("*.safetensors"):
        (folder / "demo" / file.name).symlink_to(file)
    photo, out = ROOT / "demo" / "photo.jpg", folder / "out.mp4"
    return (lambda: run_program([sys.executable, folder / "sample.py", photo, "-o", out]),
            lambda: run_program([sys.executable, ROOT / "sample.py", photo, "-o", out]))


class Row(NamedTuple):
    name: str
    peer: str
    target: float  # the speed-up that we aim for
    make: Callable
    program: bool = False  # both sides are whole programs


def format_rows():
    """Quantize, and dequantize to two dtypes, in both formats, against both libraries."""
    for fmt, targets in (("nvfp4", (5, 3)), ("mxfp8", (2, 2))):
        for dtype in (None, torch.bfloat16, torch.float32):
            for peer in ("comfy-kitchen", "torchao"):
                name = quant.FORMAT_NAMES[fmt]
                if dtype is None:
                    yield Row(f"{name} quantize bf16", peer, targets[0], partial(quantize, fmt, peer))
                else:
                    to = {torch.bfloat16: "bf16", torch.float32: "float32"}[dtype]
                    yield Row(f"{name} dequantize to {to}", peer, targets[1],
                              partial(dequantize, fmt, peer, dtype))


ROWS = [
    *format_rows(),
    Row("DiT, 2 layers of 1536, 1950 tokens", "diffusers", 1.3, dit),
    Row("the same with NVFP4 weights", "ours, plain", 0.9, dit_nvfp4),
    Row("VAE decode, 9 frames of 240x416", "diffusers", 1.4, vae_decode),
    Row("VAE encode, 9 frames of 240x416", "diffusers", 1.4, vae_encode),
    Row("UMT5, 512 tokens, 2 layers", "transformers", 1.3, umt5),
    Row("CLIP image tower, 4 layers", "transformers", 1.2, clip),
    Row("convert 425 M, simple", "convert-to-quant", 5,
        partial(conversion, 6, ["--simple"], ["--simple"]), program=True),
    Row("convert 71 M, search / learned", "convert-to-quant", 100,
        partial(conversion, 1, [], ["--num_iter", "500"]), program=True),
    Row("sample.py demo/photo.jpg", BEFORE, 1.5, partial(demo_program, BEFORE), program=True)]


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
            peaks[i] = both[i]()

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
    print(f"{'':36}{'peer':>17}{'peer s':>9}{'ours s':>9}{'speed-up':>10}{'target':>8}{'peer MiB':>10}"
          f"{'ours MiB':>10}")
    for i, row in enumerate(ROWS):
        if only not in row.name:
            continue
        answer = ask("--row", i, "--rounds", rounds)
        if "skipped" in answer:
            print(f"{row.name:36}{row.peer:>17}  skipped: {answer['skipped']}", flush=True)
            continue
        (theirs, ours), peaks = answer
        speed_up = theirs / ours
        peaks = peaks or [ask("--row", i, "--side", side) for side in (0, 1)]
        print(f"{row.name:36}{row.peer:>17}{theirs:9.3f}{ours:9.3f}{speed_up:9.2f}x{row.target:7}x"
              f"{peaks[0]:10.0f}{peaks[1]:10.0f}{'  slower' if speed_up < 1 else ''}", flush=True)


def print_machine():
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "?")
    print(f"{model}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads")


# ----------------------------------------------------------------------------------------------------
# Floors
# ----------------------------------------------------------------------------------------------------


def rates():
    """Floating-point operations a second in float32, by kind of operation."""
    x, w = torch.randn(2048, 2048), torch.randn(2048, 2048)
    video, kernel = torch.randn(1, 192, 6, 120, 208), torch.nn.Conv3d(192, 192, 3, padding=(0, 1, 1))
    video = wan_fp4.channels_last(video)
    linear, = median_seconds(lambda: F.linear(x, w))
    product, = median_seconds(lambda: quant.linear(x, w))
    convolution, = median_seconds(lambda: wan_fp4.conv3d(video, kernel, kernel.padding))
    return {"products by F.linear": 2 * 2048 ** 3 / linear,
            "products": 2 * 2048 ** 3 / product,
            "convolutions": 2 * 27 * 192 * 192 * 4 * 120 * 208 / convolution}


def floor_networks():
    """{name: (kind of operation, forward on the meta device)}, at the sizes of the rows above."""
    new = torch.empty
    dit = wan_fp4.WanDiT(DIT)
    vae = wan_fp4.WanVAE()
    umt5 = wan_fp4.UMT5Encoder(wan_fp4.UMT5Config(vocab=1000, num_blocks=2))
    clip = wan_fp4.CLIPVision(wan_fp4.CLIPConfig(num_blocks=4))
    ids = torch.ones(1, 512, dtype=torch.long)
    return {"DiT": ("products", lambda: dit(new(1, 16, 3, 50, 52), new(1), new(1, 30, 4096),
                                            new(1, 257, 1280), new(1, 20, 3, 50, 52))),
            "VAE decode": ("convolutions", lambda: vae.decode(new(1, 16, 3, 30, 52))),
            "VAE encode": ("convolutions", lambda: vae.encode(new(1, 3, 9, 240, 416))),
            "UMT5": ("products", lambda: umt5(ids, ids)),
            "CLIP": ("products", lambda: clip(new(1, 3, 224, 224)))}


@torch.no_grad()
def floors():
    print_machine()
    rate = rates()
    for kind, value in rate.items():
        print(f"{kind}: {value / 1e9:.0f} GFLOP/s")
    with torch.device("meta"):
        for name, (kind, forward) in floor_networks().items():
            with FlopCounterMode(display=False) as counter:
                forward()
            flops = counter.get_total_flops()
            print(f"{name}: {flops / 1e9:.0f} GFLOP, {flops / rate[kind]:.2f} s at the rate of {kind}")
    for dtype in (torch.bfloat16, torch.float32):
        old = torch.empty(5120, 5120, dtype=dtype)
        new, = median_seconds(lambda: torch.full((5120, 5120), 1.0, dtype=dtype))
        again, = median_seconds(lambda: old.fill_(1))
        print(f"fill 5120 x 5120 {dtype}: {1e3 * new:.0f} ms in new memory, {1e3 * again:.0f} ms in used memory")


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


# ----------------------------------------------------------------------------------------------------
# Several processes
# ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def forward_seconds():
    """In one of the processes that torchrun starts, or alone: print the median time of a forward."""
    with wan_fp4.join_ranks() as ranks:
        dit = wan_fp4.WanDiT(DIT)
        for tensor in (*dit.parameters(), *dit.buffers()):
            ranks.sum(tensor.data)  # the same weights everywhere
        dit = dit if ranks.size == 1 else wan_fp4.SplitDiT(dit, ranks.group(ranks.size))
        arguments = dit_inputs()
        print(*median_seconds(lambda: dit(*arguments)))


def processes():
    """The DiT of the table above in two processes of one thread, against one process of two threads."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    seconds = []
    for command, threads in (([sys.executable], 2), (torchrun, 1)):
        done = subprocess.run([*command, __file__, "--forward"], capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        seconds.append(float(done.stdout.split()[-1]))
    print_machine()
    print(f"a forward: {seconds[0]:.3f} s in one process of two threads, {seconds[1]:.3f} s in two of one: "
          f"ratio {seconds[1] / seconds[0]:.2f}")


LINKS = {"NVLink 4": 450, "PCIe 5 x16": 64, "PCIe 4 x16": 32}  # nominal GB/s in each direction
PUBLISHED = 5.18 / 2  # LightX2V's seconds a forward of the 14B on one H100: 81 frames of 480 x 832, bf16


def scaling():
    """A forward of the 14B model in bf16. q, k, v and the output of attention pass through an all-to-all in every
    block; a rank keeps its own part and sends the others."""
    cfg = wan_fp4.DiTConfig()
    tokens = 21 * 30 * 52
    links = "".join(f"{f'{link}, {rate} GB/s':>28}" for link, rate in LINKS.items())
    print(f"{'GPUs':>4}{'sent by each':>14}   {links}")
    for gpus in (2, 4, 8):
        sent = 4 * cfg.num_blocks * 2 * cfg.dim * math.ceil(tokens / gpus) * (gpus - 1) / gpus  # bytes
        line = f"{gpus:4}{sent / 1e9:11.2f} GB   "
        for rate in LINKS.values():
            seconds = sent / (1e9 * rate)
            whole = PUBLISHED / gpus + seconds
            line += f"{f'{1e3 * seconds:.0f} ms of {whole:.2f} s, {PUBLISHED / gpus / whole:.0%}':>28}"
        print(line)
    print(f"LightX2V, published: {PUBLISHED:.2f} s on one H100; on eight 0.39 s, {PUBLISHED / 8 / 0.39:.0%}, and "
          f"0.35 s with fp8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="only the rows whose names contain this")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: 5)")
    parser.add_argument("--floors", action="store_true", help="the machine's floors instead of the table")
    parser.add_argument("--conversion", action="store_true", help="conversion speed instead of the table")
    parser.add_argument("--ranks", action="store_true", help="two processes against one instead of the table")
    parser.add_argument("--scaling", action="store_true",
                        help="several GPUs by arithmetic, instead of the table")
    parser.add_argument("--blocks", type=int, default=2, help="blocks to convert, of 40 (default: 2)")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)  # for a process that measures one row
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--forward", action="store_true", help=argparse.SUPPRESS)  # for one of several processes
    args = parser.parse_args()
    if args.row is not None:
        print(json.dumps(measure(ROWS[args.row], args.rounds, args.side)))
    elif args.forward:
        forward_seconds()
    elif args.ranks:
        processes()
    elif args.scaling:
        scaling()
    elif args.floors:
        floors()
    elif args.conversion:
        conversion_speed(args.blocks)
    else:
        compare(args.only, args.rounds)


if __name__ == "__main__":
    main()
