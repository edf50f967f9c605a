"""Measure the demo model on emoji that it was never trained on: python demo/evaluate.py

Each of 24 emoji makes nine videos, one for each move. Each is compared with the true move:

  PSNR dB        of the video, mean over the eight moves
  right move     how often, of all nine true moves, the one nearest to the video is the one asked for
  SSIM           of the last frame, mean over the eight moves

Besides the shipped NVFP4 model, the table has the bf16 model that it was converted from; the first frame
repeated, which a video has to beat; and the truth encoded and decoded by the VAE, about the most it can reach.

For callers: true_moves, first_frame, figures, autoencoder, pipeline, networks.
"""
import argparse
import random
from pathlib import Path

import torch
import train
from PIL import Image, ImageDraw
from skimage.metrics import structural_similarity
from train import FRAMES, HERE, MOVES, SIDE, sample, wan_fp4


def true_moves(name):
    """The nine true moves (9, 3, F, h, w) of a held-out emoji, in [-1, 1]."""
    scene = train.scene(train.all_emoji()[name].float() / 255, random.Random(name))
    return torch.stack([train.render(scene, move) for move in MOVES])


def first_frame(name):
    """What the videos of a held-out emoji start with: (3, h, w) in [0, 1]."""
    return (true_moves(name)[0, :, 0] + 1) / 2


def similarity(frame, truth):
    """SSIM of two frames (3, h, w) in [-1, 1]."""
    return structural_similarity(frame.numpy(), truth.numpy(), channel_axis=0, data_range=2)


SUBJECTS = 24


def figures(make_videos, subjects=SUBJECTS):
    """Mean PSNR in dB, share of right moves, and mean SSIM of the last frame, of the videos (9, 3, F, h, w) that
    make_videos(truth) returns for the true moves of the first held-out emoji."""
    quality, right, same = [], [], []
    for name in train.held_out()[:subjects]:
        truth = true_moves(name)
        for i, video in enumerate(make_videos(truth)):
            right.append((video - truth).square().flatten(1).mean(1).argmin().item() == i)
            if MOVES[i] != "stay still":
                quality.append(train.psnr(video, truth[i]))
                same.append(similarity(video[:, -1], truth[i][:, -1]))
    return [sum(values) / len(values) for values in (quality, right, same)]


def repeated(truth):
    """Videos that show the first frame all the time."""
    return truth[:, :, :1].expand_as(truth)


def autoencoder(vae):
    """A function from the true moves to what the VAE makes of them."""
    device = next(vae.parameters()).device
    return lambda truth: vae.decode(vae.encode(truth.to(device))).cpu()


def pipeline(dit, umt5, clip, vae, tokenizer):
    """A function from the true moves to the videos that these networks make of their first frame and the nine
    prompts, all from the same noise."""
    device = next(dit.parameters()).device

    def make_videos(truth):
        first = truth[:1, :, 0].to(device)  # (1, 3, h, w)
        text = train.encode_prompts(umt5, tokenizer, MOVES)  # (9, L, D)
        image = clip(train.clip_pixels(first[0].cpu())[None].to(device)).expand(len(MOVES), -1, -1)
        y = sample.image_condition(vae.encode(sample.first_frame_video(first, truth.shape[2])))
        y = y.expand(len(MOVES), -1, -1, -1, -1)  # (9, 20, T, H, W)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn((1, 16, *y.shape[2:]), generator=generator).to(device)

        def velocity(x, sigma):
            return dit(x, torch.full((len(x),), 1000 * float(sigma), device=device), text, image, y)

        latents = sample.sample_latents(velocity, noise.expand(len(MOVES), -1, -1, -1, -1),
                                        sample.sigmas("normal", 4, 5.0), "lcm", generator)
        return vae.decode(latents).cpu()  # (9, 3, F, h, w)
    return make_videos


def networks(dit="dit.safetensors"):
    """The networks in the folder of this file, as pipeline takes them."""
    return (wan_fp4.load_dit(HERE / dit), wan_fp4.load_umt5(HERE / "umt5.safetensors"),
            wan_fp4.load_clip(HERE / "clip.safetensors"), wan_fp4.load_vae(HERE / "vae.safetensors"),
            sample.load_tokenizer(HERE / "umt5.safetensors"))


def make_video(image, prompt, dit):
    """What `python sample.py IMAGE PROMPT --dit DIT` makes: frames (F, h, w, 3) uint8."""
    files = {flag: HERE / network.demo for flag, network in sample.NETWORKS.items() if network.demo}
    files["dit"] = HERE / dit
    return sample.generate(image, prompt, files, sample.Settings(frames=FRAMES, area=SIDE ** 2))


SHOWN = [("cat face", "jump"), ("fire engine", "slide right"), ("panda face", "tilt left")]
LINE = 18  # height of a line of text in pixels


def picture(path):
    """Write the README's moving picture: three emoji that training never saw, by bf16 and by NVFP4."""
    sheets = [Image.new("RGB", (3 * (SIDE + 8) - 8, 2 * (SIDE + LINE)), "white") for _ in range(FRAMES)]
    for row, (label, dit) in enumerate([("bf16", "dit-bf16.safetensors"), ("NVFP4", "dit.safetensors")]):
        for column, (name, move) in enumerate(SHOWN):
            image = first_frame(name)
            left, top = column * (SIDE + 8), row * (SIDE + LINE)
            for sheet, frame in zip(sheets, make_video(image, move, dit)):
                ImageDraw.Draw(sheet).text((left + 2, top + 3), f"{move}, {label}", fill="black")
                sheet.paste(Image.fromarray(frame.numpy()), (left, top + LINE))
    durations = [1000 // 16] * (FRAMES - 1) + [800]  # rests on the last frame
    sheets[0].save(path, save_all=True, append_images=sheets[1:], duration=durations, loop=0, quality=85)


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, metavar="OUT.webp", help="only write the README's moving picture")
    args = parser.parse_args()
    if args.picture:
        return picture(args.picture)
    rows = {"VAE": autoencoder(networks()[3]), "first frame repeated": repeated,
            "NVFP4, as shipped": pipeline(*networks()), "bf16": pipeline(*networks("dit-bf16.safetensors"))}
    print(f"{SUBJECTS} emoji, {len(MOVES)} moves, {FRAMES} frames of {SIDE}x{SIDE}")
    print(f"{'':24}{'PSNR dB':>8}{'right move':>12}{'SSIM':>8}")
    for name, make_videos in rows.items():
        quality, right, same = figures(make_videos)
        print(f"{name:24}{quality:8.2f}{right:12.1%}{same:8.3f}", flush=True)


if __name__ == "__main__":
    main()
