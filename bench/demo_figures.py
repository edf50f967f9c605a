"""Figures of the demo model on photos it was not trained on: python bench/demo_figures.py [--dit FILE]

For both held-out photos and all nine moves, the sampler's four steps against the true camera move (PSNR, dB).
"""
import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]
import sample  # noqa: E402
import train  # noqa: E402
import wan_fp4  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--dit", default=ROOT / "demo" / "dit.safetensors", help="such as the bf16 one")
parser.add_argument("--emulate", action="store_true", help="4-bit activations too, as on tensor cores")
args = parser.parse_args()
demo = ROOT / "demo"
nets = {"dit": wan_fp4.load_dit(args.dit), "umt5": wan_fp4.load_umt5(demo / "umt5.safetensors"),
        "clip": wan_fp4.load_clip(demo / "clip.safetensors")}
for layer in nets["dit"].modules():
    if getattr(layer, "format", None) and args.emulate:
        layer.mode = "emulate"
tokenizer = sample.load_tokenizer(demo / "umt5.safetensors")
with torch.inference_mode():
    figures = train.evaluate(nets, tokenizer, wan_fp4.load_vae(demo / "vae.safetensors"), "cpu")
ours, still, bound, right = figures
print(f"{Path(args.dit).name}{' (emulated)' if args.emulate else ''}\n"
      f"video {ours:.2f} dB, first frame repeated {still:.2f} dB, the truth through the VAE {bound:.2f} dB, "
      f"the move nearest to the video is the right one: {right:.0%}")
