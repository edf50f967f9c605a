"""Measure the demo model on photographs that it was never trained on: python demo/evaluate.py

Every view in VIEWS makes nine videos, one for each move. Each is compared with the true camera move over the
photograph:

  PSNR dB        of the video, mean over the eight moves
  right move     how often, of all nine true moves, the one nearest to the video is the one asked for
  SSIM           of the last frame, where it shows what the first frame showed

Besides the shipped NVFP4 model, the table has the bf16 model that it was converted from; the first frame
repeated, which a video has to beat; and the truth encoded and decoded by the VAE, which no video can beat.
--undistilled adds the model before the distil stage, from train.py's checkpoint, at 4 and at 40 steps.

For callers: VIEWS, true_moves, figures, autoencoder, pipeline.
"""
import argparse
from pathlib import Path

import numpy
import torch
import train
from PIL import Image, ImageDraw
from skimage.metrics import structural_similarity
from train import AREA, FRAMES, HERE, MOVES, WORK, sample, wan_fp4

SIDE = round(AREA ** 0.5)
VIEWS = [("chelsea", (235, 150, 200)),  # center x, center y, width: in pixels of the photo
         ("flower", (320, 215, 260)),
         ("palapeli/collection/castle-maintenon.jpg", (481, 330, 320)),
         ("backgrounds/picosdeeuropa_by_Aitzol_Berasategi.jpg", (440, 300, 320)),
         ("wallpapers/EveningGlow/contents/images/2560x1600.jpg", (512, 330, 320)),
         ("backgrounds/Picture_1A_by_freespace.jpg", (420, 330, 320)),
         ("backgrounds/Wine_by_Jakkub_Mede.jpg", (320, 420, 320)),
         ("backgrounds/friends_by_Aitzol_Berasategi.jpg", (300, 400, 320))]


def true_moves(name, window, frames=FRAMES, side=SIDE):
    """The nine true moves (9, 3, F, h, w) in [-1, 1], and masks (9, h, w): True where the last frame shows
    what the first one showed."""
    photo, (x, y, width) = train.load_photo(name), window
    seen, half = torch.zeros_like(photo), width / 2
    seen[:, round(y - half):round(y + half), round(x - half):round(x + half)] = 1
    clips = torch.stack([train.render(photo, move, frames, side, side, window) for move in MOVES])
    masks = torch.stack([train.render(seen, move, frames, side, side, window)[0, -1] > 0.99 for move in MOVES])
    return clips * 2 - 1, masks


def similarity(video, truth, mask):
    """Mean SSIM of two frames (3, h, w) in [-1, 1] under a mask (h, w)."""
    _, table = structural_similarity(video.numpy(), truth.numpy(), channel_axis=0, data_range=2, full=True)
    return torch.from_numpy(table).mean(0)[mask].mean().item()


def figures(make_videos, views=VIEWS, frames=FRAMES, side=SIDE):
    """Mean PSNR in dB, share of right moves, mean SSIM of the last frame: of the videos (9, 3, F, h, w) that
    make_videos(truth) returns for the true moves over each view."""
    quality, right, same = [], [], []
    for name, window in views:
        truth, masks = true_moves(name, window, frames, side)
        for i, video in enumerate(make_videos(truth)):
            right.append((video - truth).square().flatten(1).mean(1).argmin().item() == i)
            if MOVES[i] != "still":
                quality.append(train.psnr(video, truth[i]))
                same.append(similarity(video[:, -1], truth[i][:, -1], masks[i]))
    return [sum(values) / len(values) for values in (quality, right, same)]


def repeated(truth):
    """Videos that show the first frame all the time."""
    return truth[:, :, :1].expand_as(truth)


def autoencoder(vae):
    """A function from the true moves to what the VAE makes of them."""
    device = next(vae.parameters()).device
    return lambda truth: torch.cat([vae.decode(vae.encode(clip[None].to(device))).cpu() for clip in truth])


def pipeline(dit, umt5, clip, vae, tokenizer, steps=4, sampler="lcm", scheduler="normal"):
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
                                        sample.sigmas(scheduler, steps, 5.0), sampler, generator)
        return torch.cat([vae.decode(x[None]).cpu() for x in latents])  # (9, 3, F, h, w)
    return make_videos


def shipped_size():
    """Frames and area in pixels of the videos that the shipped model makes, from its header."""
    metadata, _ = wan_fp4.read_header(HERE / "dit.safetensors")
    return int(metadata["frames"]), int(metadata["area"])


def picture(path):
    """Write the README's moving picture: a row of videos by bf16, one by NVFP4, and before each the photo."""
    photo, moves = sample.read_image(HERE / "photo.jpg"), ["pan left", "zoom in", "rotate right"]
    demo = {flag: HERE / network.demo for flag, network in sample.NETWORKS.items() if network.demo}
    frames, area = shipped_size()
    settings, rows = sample.Settings(frames=frames, area=area), []
    for name, dit in (("bf16", "dit-bf16.safetensors"), ("NVFP4", "dit.safetensors")):
        videos = [sample.generate(photo, move, demo | {"dit": HERE / dit}, settings) for move in moves]
        h, w = videos[0].shape[1:3]
        still = (sample.resize(photo, w, h) * 255).byte().permute(1, 2, 0).expand(frames, -1, -1, -1)
        labels = ["the photo", *(f"{move}, {name}" for move in moves)]
        rows.append(torch.cat([labelled(video, label) for video, label in zip([still, *videos], labels)], 2))
    sheet = torch.cat(rows, 1)  # (F, h', w', 3)
    sheets = [*sheet, *[sheet[-1]] * 8]  # half a second at the end
    first, *others = [Image.fromarray(frame.numpy()) for frame in sheets]
    first.save(path, save_all=True, append_images=others, duration=1000 // 16, loop=0, quality=90)


def labelled(video, label):
    """Frames (F, h, w, 3) uint8 with a line of text above."""
    h, w, frames = *video.shape[1:3], []
    for frame in video:
        sheet = Image.new("RGB", (w + 8, h + 24), "white")
        sheet.paste(Image.fromarray(frame.numpy()), (4, 20))
        ImageDraw.Draw(sheet).text((6, 4), label, fill="black")
        frames.append(torch.from_numpy(numpy.array(sheet)))
    return torch.stack(frames)  # (F, h', w', 3)


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--undistilled", action="store_true", help="needs demo/work/dit.pt")
    parser.add_argument("--picture", type=Path, metavar="OUT.webp",
                        help="only write the README's picture: three moves of photo.jpg by bf16 and NVFP4")
    args = parser.parse_args()
    if args.picture:
        return picture(args.picture)
    vae, umt5 = wan_fp4.load_vae(HERE / "vae.safetensors"), wan_fp4.load_umt5(HERE / "umt5.safetensors")
    clip = wan_fp4.load_clip(HERE / "clip.safetensors")
    tokenizer = sample.load_tokenizer(HERE / "umt5.safetensors")
    rows = {"VAE": autoencoder(vae), "first frame repeated": repeated}
    for name, file in (("NVFP4, as shipped", "dit.safetensors"), ("bf16", "dit-bf16.safetensors")):
        rows[name] = pipeline(wan_fp4.load_dit(HERE / file), umt5, clip, vae, tokenizer)
    if args.undistilled:
        before = train.networks(tokenizer).eval()
        before.load_state_dict(train.average_of(WORK / "dit.pt"))
        networks = before["dit"], before["umt5"], before["clip"], vae, tokenizer
        rows["undistilled, 4 steps"] = pipeline(*networks)
        rows["undistilled, 40 steps"] = pipeline(*networks, steps=40, sampler="euler", scheduler="simple")
    frames, area = shipped_size()
    side = round(area ** 0.5)
    print(f"{len(VIEWS)} views, {len(MOVES)} moves, {frames} frames of {side}x{side}")
    print(f"{'':24}{'PSNR dB':>8}{'right move':>12}{'SSIM':>8}")
    for name, make_videos in rows.items():
        quality, right, same = figures(make_videos, VIEWS, frames, side)
        print(f"{name:24}{quality:8.2f}{right:12.1%}{same:8.3f}", flush=True)


if __name__ == "__main__":
    main()
