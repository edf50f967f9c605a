"""Us and what a user would take instead, side by side: python bench/bench.py [--only NAME] [--rounds 5]

Each row runs in a process of its own: ours and the peer alternate on the same work, after a turn each that
does not count, unless it is a whole program, and the medians are printed: seconds, and the peer's time over
ours. Memory, MiB of each side, is what the work adds to the peak of a process that does nothing else, or all
that a program held. CPU, float32 unless the row says otherwise, as many threads as torch takes. Random
weights. What the machine could do at best: bench/floors.py. Needs requirements-test.txt; and the rows that
convert: pip install --no-deps convert-to-quant==1.3.4 prodigy-plus-schedule-free==2.0.1
"""
import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import convert  # noqa: E402
import quant  # noqa: E402
import wan_fp4  # noqa: E402

PEERS = "comfy-kitchen", "torchao", "diffusers", "transformers", "convert-to-quant"


def weight(rows=5120, columns=5120):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()


def saved(model, folder, load):
    """A library's model, saved by itself and read by our loader: both."""
    model.eval().save_pretrained(folder)
    return model, load(folder)


# Each row: an empty folder -> (peer, ours), two functions that do the same. What they need is made before.

def quantize_nvfp4(peer, folder):
    w = weight()
    scale = quant.quantize_nvfp4(w)[2]  # comfy-kitchen gets it for nothing; we find it
    if peer == "torchao":
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
        return lambda: NVFP4Tensor.to_nvfp4(w, per_tensor_scale=scale), lambda: quant.quantize_nvfp4(w)
    from comfy_kitchen.backends.eager import quantization
    return lambda: quantization.quantize_nvfp4(w, scale), lambda: quant.quantize_nvfp4(w)


def quantize_mxfp8(peer, folder):
    w = weight()
    if peer == "torchao":
        from torchao.prototype.mx_formats.mx_tensor import MXTensor
        return lambda: MXTensor.to_mx(w, torch.float8_e4m3fn, 32), lambda: quant.quantize_mxfp8(w)
    from comfy_kitchen.backends.eager import quantization
    return lambda: quantization.quantize_mxfp8(w), lambda: quant.quantize_mxfp8(w)


def dequantize_nvfp4(peer, dtype, folder):
    w = weight()
    data, block_scale, scale = quant.quantize_nvfp4(w)
    if peer == "torchao":
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
        theirs = NVFP4Tensor.to_nvfp4(w, per_tensor_scale=scale)
        return (lambda: theirs.dequantize(dtype),
                lambda: quant.dequantize_nvfp4(data, block_scale, scale, dtype=dtype))
    from comfy_kitchen.backends.eager import quantization
    return (lambda: quantization.dequantize_nvfp4(data, scale, block_scale, dtype),
            lambda: quant.dequantize_nvfp4(data, block_scale, scale, dtype=dtype))


def dequantize_mxfp8(peer, dtype, folder):
    w = weight()
    data, block_scale = quant.quantize_mxfp8(w)
    if peer == "torchao":
        from torchao.prototype.mx_formats.mx_tensor import MXTensor
        theirs = MXTensor.to_mx(w, torch.float8_e4m3fn, 32)
        return (lambda: theirs.dequantize(dtype),
                lambda: quant.dequantize_mxfp8(data, block_scale, dtype=dtype))
    from comfy_kitchen.backends.eager import quantization
    e8m0 = block_scale.view(torch.float8_e8m0fnu)
    return (lambda: quantization.dequantize_mxfp8(data, e8m0, dtype),
            lambda: quant.dequantize_mxfp8(data, block_scale, dtype=dtype))


DIT = dict(num_attention_heads=12, in_channels=36, ffn_dim=8960, num_layers=2, image_dim=1280,
           added_kv_proj_dim=1536)  # of width 1536


def dit_inputs():
    g = torch.Generator().manual_seed(0)
    x, y, text, image = (torch.randn(1, *shape, generator=g) for shape in (
        (16, 3, 50, 52), (20, 3, 50, 52), (30, 4096), (257, 1280)))  # 1,950 tokens
    return x, torch.tensor([900.0]), text, image, y


def dit(folder):
    """The prompt has 30 tokens; diffusers' DiT is given it padded to 512, as it needs it."""
    import diffusers
    theirs, ours = saved(diffusers.WanTransformer3DModel(**DIT), folder, wan_fp4.load_dit)
    x, t, text, image, y = dit_inputs()
    both, padded = torch.cat([x, y], 1), torch.nn.functional.pad(text, (0, 0, 0, 482))
    return lambda: theirs(both, t, padded, image), lambda: ours(x, t, text, image, y)


def dit_nvfp4(folder):
    """The peer is our own DiT with plain weights."""
    import diffusers
    _, plain = saved(diffusers.WanTransformer3DModel(**DIT), folder, wan_fp4.load_dit)
    with contextlib.redirect_stdout(io.StringIO()):
        convert.main(["-i", str(folder), "-o", str(folder / "nvfp4.safetensors"), "--nvfp4", "--simple"])
    ours, arguments = wan_fp4.load_dit(folder / "nvfp4.safetensors"), dit_inputs()
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
    theirs.encoder.layers = theirs.encoder.layers[:4]  # ours leaves the fifth out
    pixels = torch.randn(1, 3, 224, 224)
    return lambda: theirs(pixels), lambda: ours(pixels)


def checkpoint(folder, blocks):
    """Blocks of width 2048, 71 M parameters each, in bf16."""
    g = torch.Generator().manual_seed(0)
    names = [*(f"self_attn.{x}" for x in "qkvo"), *(f"cross_attn.{x}" for x in "qkvo"), "ffn.0", "ffn.2"]
    shapes = {"ffn.0": (8192 + 1024, 2048), "ffn.2": (2048, 8192 + 1024)}
    tensors = {f"blocks.{i}.{n}.weight": 0.02 * torch.randn(shapes.get(n, (2048, 2048)), generator=g)
               for i in range(blocks) for n in names}
    save_file({name: w.bfloat16() for name, w in tensors.items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


HELD = []  # the most memory that each program run held, in MiB
# A program's own figure begins with its parent's memory, which here is large: this small one starts it.
WATCH = """import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print("\\n", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(code)"""


def silently(command):
    done = subprocess.run([sys.executable, "-c", WATCH, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    HELD.append(float(done.stdout.split()[-1]))


def conversion(blocks, ours, theirs, folder):
    model = checkpoint(folder, blocks)
    both = ["-i", model, "-o", folder / "out.safetensors", "--nvfp4", "--comfy_quant"]
    us = [sys.executable, ROOT / "convert.py", *both, *ours]
    them = [sys.executable, "-m", "convert_to_quant.convert_to_quant", *both, *theirs]
    return lambda: silently(them), lambda: silently(us)


def program(before, folder):
    """The whole process, against the same at an earlier commit, with the same demo files."""
    files = ["sample.py", "wan_fp4.py", "quant.py"]
    packed = subprocess.run(["git", "-C", ROOT, "archive", before, *files], check=True, capture_output=True)
    subprocess.run(["tar", "-x", "-C", folder], input=packed.stdout, check=True)
    (folder / "demo").mkdir(exist_ok=True)
    for file in (ROOT / "demo").glob("*.safetensors"):
        (folder / "demo" / file.name).write_bytes(file.read_bytes())
    photo, out = ROOT / "demo" / "photo.jpg", folder / "out.mp4"
    return (lambda: silently([sys.executable, folder / "sample.py", photo, "-o", out]),
            lambda: silently([sys.executable, ROOT / "sample.py", photo, "-o", out]))


BEFORE = "cbe52c7"  # where the work on speed began
PROGRAMS = "convert", "sample"  # how the names of rows begin that run processes of their own
BF16, F32 = torch.bfloat16, torch.float32
ROWS = [  # the work, the peer, what the ratio should be, and how to make the two functions
    *((f"NVFP4 {what}", peer, target, partial(work, peer, *dtype))
      for what, target, work, dtype in (("quantize bf16", 5, quantize_nvfp4, ()),
                                        ("dequantize to bf16", 3, dequantize_nvfp4, (BF16,)),
                                        ("dequantize to float32", 3, dequantize_nvfp4, (F32,)))
      for peer in ("comfy-kitchen", "torchao")),
    *((f"MXFP8 {what}", peer, 2, partial(work, peer, *dtype))
      for what, work, dtype in (("quantize bf16", quantize_mxfp8, ()),
                                ("dequantize to bf16", dequantize_mxfp8, (BF16,)),
                                ("dequantize to float32", dequantize_mxfp8, (F32,)))
      for peer in ("comfy-kitchen", "torchao")),
    ("DiT, 2 layers of 1536, 1950 tokens", "diffusers", 1.3, dit),
    ("the same with NVFP4 weights", "ours, plain", 0.9, dit_nvfp4),
    ("VAE decode, 9 frames of 240x416", "diffusers", 1.4, vae_decode),
    ("VAE encode, 9 frames of 240x416", "diffusers", 1.4, vae_encode),
    ("UMT5, 512 tokens, 2 layers", "transformers", 1.3, umt5),
    ("CLIP image tower, 4 layers", "transformers", 1.2, clip),
    ("convert 425 M, simple", "convert-to-quant", 5, partial(conversion, 6, ["--simple"], ["--simple"])),
    ("convert 71 M, search / learned", "convert-to-quant", 100,
     partial(conversion, 1, [], ["--num_iter", "500"])),
    ("sample.py demo/photo.jpg", BEFORE, 1.5, partial(program, BEFORE))]


def peak():
    """The most memory that this process has held, in MiB."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def child(row, rounds, side):
    """One row: medians of both by turns; or with a side, 0 the peer and 1 us, the memory that it takes."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        both = ROWS[row][3](Path(folder))
        if side is not None:
            both[side]()  # what is mapped is in memory now
            Path("/proc/self/clear_refs").write_text("5")  # and the peak so far is forgotten
            before = peak()
            both[side]()
            print(json.dumps(peak() - before))
            return
        seconds = [], []
        for i in range(ROWS[row][0].startswith(PROGRAMS), rounds + 1):
            for run, taken in zip(both, seconds):
                start = time.perf_counter()
                run()
                if i:
                    taken.append(time.perf_counter() - start)
        print(json.dumps([statistics.median(taken) for taken in seconds] + HELD[-2:]))


def ask(*arguments):
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose names contain this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        return child(args.child, args.rounds, args.side)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PEERS)
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "?")
    print(f"{model}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads\n"
          f"{versions}")
    print(f"{'':36}{'peer':>17}{'s':>9}{'ours s':>9}{'ratio':>8}{'target':>8}{'MiB':>8}{'ours':>8}")
    for row, (name, peer, target, _) in enumerate(ROWS):
        if args.only not in name:
            continue
        theirs, ours, *held = ask("--child", row, "--rounds", args.rounds)
        line = f"{name:36}{peer:>17}{theirs:9.3f}{ours:9.3f}{theirs / ours:7.2f}x{target:7}x"
        held = held or [ask("--child", row, "--side", side) for side in (0, 1)]
        print(line + "".join(f"{mib:8.0f}" for mib in held), flush=True)


if __name__ == "__main__":
    main()
