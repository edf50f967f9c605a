"""What each way of converting costs the demo's video: python bench/demo_quality.py demo/work/dit.safetensors

The bf16 model (demo/train.py leaves it in its work folder) is converted with each set of flags, all layers of
the blocks to NVFP4 unless the flags say otherwise. Each file makes the videos of two photos never trained on,
nine moves each, from the same noise as the bf16 model. The figure is the PSNR of its videos against the bf16
model's: W4A16; W4A4, which tensor cores compute, in emulation; and W4A4 with --precise-steps, whose first
and last step are W4A16: half of the recipe's steps without tensor cores is what it costs. Calibration sees
two training photos, four moves each.
"""
import argparse
import io
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]
import train  # noqa: E402

import convert  # noqa: E402
import quant  # noqa: E402
import sample  # noqa: E402
import wan_fp4  # noqa: E402

LORA = ["--extract-lora", "--lora-rank", "16"]
WAYS = {"simple": ["--nvfp4", "--simple"], "simple + LoRA": ["--nvfp4", "--simple", *LORA],
        "default rounding": ["--nvfp4"], "default + LoRA": ["--nvfp4", *LORA],
        "calibrated": ["--nvfp4", "--calib"], "calibrated + LoRA": ["--nvfp4", "--calib", *LORA],
        "calibrated, absorb": ["--nvfp4", "--calib", *LORA, "--lora-mode", "absorb"],
        "calibrated, static": ["--nvfp4", "--calib", "--static-input-scale"],
        "plan score": [], "plan measured, same size": ["--calib"]}
VIEWS = {"chelsea": (245, 140, 200), "flower": (330, 240, 270)}


def conditions(area, frames):
    """Per held-out photo: y (1, 20, T, H, W) and CLIP's tokens."""
    demo, found = ROOT / "demo", []
    for name, window in VIEWS.items():
        side = round(area ** 0.5)
        photo = train.render(train.load_photo(name), "still", 1, side, side, window)[:, 0]
        found.append((*sample.encode_first_frames(demo / "vae.safetensors", [photo], frames, "cpu"),
                      *sample.encode_pictures(demo / "clip.safetensors", [photo], "cpu")))
    return found


def videos(dit, found, texts, vae, precise=False):
    """All photos and moves -> (18, 3, F, h, w)."""
    levels = sample.sigmas("normal", 4, 5.0)
    return torch.cat([
        vae.decode(sample.sample_video(dit, y, text, None, tokens, levels, "lcm", 1.0, seed, "cpu", precise))
        for y, tokens in found for seed, text in enumerate(texts)])


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dit", type=Path, help="the bf16 model")
    args = parser.parse_args()
    metadata, _ = wan_fp4.read_header(args.dit)
    found = conditions(int(metadata["area"]), int(metadata["frames"]))
    texts = sample.encode_text(ROOT / "demo" / "umt5.safetensors", train.MOVES, "cpu")
    vae = wan_fp4.load_vae(ROOT / "demo" / "vae.safetensors")
    truth = videos(wan_fp4.load_dit(args.dit), found, texts, vae)
    print(f"{'':26}{'MiB':>6}{'LoRA':>6}{'seconds':>9}{'W4A16 dB':>10}{'W4A4 dB':>9}{'precise':>9}")
    with tempfile.TemporaryDirectory() as folder:
        folder, pictures = Path(folder), []
        for name in ("astronaut", "coffee"):
            for move in ("pan left", "zoom in", "rotate right", "pan down"):
                path = folder / f"{name} {move}.png"
                with sample.open_video(folder / path.stem, 192, 192) as write:
                    photo = train.render(train.load_photo(name), "still", 1, 192, 192)[:, 0]
                    write((photo * 255).round().byte().permute(1, 2, 0).contiguous())
                (folder / path.stem / "0000.png").rename(path)
                path.with_suffix(".txt").write_text(move)
                pictures.append(path)
        for way, flags in WAYS.items():
            out = folder / "out.safetensors"
            flags = [x for flag in flags for x in ([flag, *pictures] if flag == "--calib" else [flag])]
            start = time.perf_counter()
            with redirect_stdout(io.StringIO()):
                convert.main(["-i", args.dit, "-o", out, *flags])
            seconds = time.perf_counter() - start
            lora = folder / "out_lora.safetensors"
            loras = [(lora, 1.0)] if lora.exists() else []
            figures = []
            for mode, precise in (("dequantize", False), ("emulate", False), ("emulate", True)):
                dit = wan_fp4.load_dit(out, loras=loras)
                for layer in dit.modules():
                    if isinstance(layer, quant.QuantLinear) and layer.format:
                        layer.mode = mode
                figures.append(train.psnr(videos(dit, found, texts, vae, precise), truth))
            sizes = [path.stat().st_size / 2 ** 20 if path.exists() else 0 for path in (out, lora)]
            print(f"{way:26}{sizes[0]:6.2f}{sizes[1]:6.2f}{seconds:9.1f}{figures[0]:10.2f}{figures[1]:9.2f}"
                  f"{figures[2]:9.2f}", flush=True)
            lora.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
