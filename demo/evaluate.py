"""The demo model's figures, on photos that it was never trained on: python demo/evaluate.py

Six views of the two held-out photos, nine moves each, against the true camera move over the photo:

  VAE              the truth, encoded and decoded: no video of this model can be nearer
  repeated         the first frame, shown all the time: what has to be beaten
  video            what the four steps of the recipe make; PSNR in dB, mean over the eight moves
  right move       how often, of all nine true moves, the one nearest to the video is the one asked for
  same picture     SSIM of the last frame with the truth, where it shows what the first frame showed

With --work, train.py's folder, the bf16 model and the undistilled one in forty steps stand beside it; and
--picture OUT.webp shows photo.jpg, three moves of it by bf16 and NVFP4, from the same noise.
"""
import argparse
import functools
from pathlib import Path

import numpy
import torch
import train
from PIL import Image, ImageDraw
from skimage.metrics import structural_similarity
from train import HERE, MOVES, sample, wan_fp4

OWN, _ = wan_fp4.read_header(HERE / "dit.safetensors")
FRAMES, SIDE = int(OWN["frames"]), round(int(OWN["area"]) ** 0.5)

VIEWS = [*(("chelsea", (x, 150, 200)) for x in (160, 235, 310)),  # centre and width in pixels of the photo
         *(("flower", (x, 215, 260)) for x in (200, 320, 440))]


@functools.cache  # the same for every model
def truth_of(name, window):
    """The nine true moves (9, 3, F, h, w) in [-1, 1], and masks (9, h, w) of where the last frames show what
    the first one showed."""
    photo, (x, y, width) = train.load_photo(name), window
    seen, half = torch.zeros_like(photo), width / 2
    seen[:, round(y - half):round(y + half), round(x - half):round(x + half)] = 1
    clips = torch.stack([train.render(photo, move, FRAMES, SIDE, SIDE, window) for move in MOVES])
    masks = torch.stack([train.render(seen, m, FRAMES, SIDE, SIDE, window)[0, -1] > 0.99 for m in MOVES])
    return clips * 2 - 1, masks


def make(dit, text, image, y, vae, steps, sampler, scheduler):
    """Nine videos (9, 3, F, h, w): one view, every move, the same noise."""
    def denoise(x, sigma):
        t = torch.full((1,), 1000 * float(sigma))
        return torch.cat([dit(x[i:i + 1], t, text[i], image, y) for i in range(len(x))])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((1, 16, *y.shape[2:]), generator=generator).expand(len(MOVES), -1, -1, -1, -1)
    levels = sample.sigmas(scheduler, steps, 5.0)
    return vae.decode(sample.sample_latents(denoise, noise, levels, sampler, generator))


def similarity(video, truth, mask):
    """Mean SSIM of two frames (3, h, w) in [-1, 1] under a mask (h, w)."""
    _, table = structural_similarity(video.numpy(), truth.numpy(), channel_axis=0, data_range=2, full=True)
    return torch.from_numpy(table).mean(0)[mask].mean().item()


def figures(make_videos):
    """Of videos for every view and move: mean PSNR, share of right moves, mean SSIM of the last frame."""
    quality, right, same = [], [], []
    for name, window in VIEWS:
        truth, masks = truth_of(name, window)
        for i, video in enumerate(make_videos(truth)):
            right.append((video - truth).square().flatten(1).mean(1).argmin().item() == i)
            if MOVES[i] != "still":
                quality.append(train.psnr(video, truth[i]))
                same.append(similarity(video[:, -1], truth[i][:, -1], masks[i]))
    return [sum(values) / len(values) for values in (quality, right, same)]


def pipeline(dit, umt5, clip, vae, tokenizer, steps=4, sampler="lcm", scheduler="normal"):
    """The truth -> videos by these networks from its first frame and the nine prompts."""
    text = [train.encode_prompts(umt5, tokenizer, [move]) for move in MOVES]

    def make_videos(truth):
        first = truth[:1, :, 0]
        y = sample.image_condition(vae.encode(sample.first_frame_video(first, FRAMES)))
        image = clip(train.clip_pixels(first[0])[None])
        return make(dit, text, image, y, vae, steps, sampler, scheduler)
    return make_videos


def picture(path, work):
    """A moving picture: a row of videos by bf16, one by NVFP4, and before each the photo."""
    photo, moves = sample.read_image(HERE / "photo.jpg"), ["pan left", "zoom in", "rotate right"]
    demo = {flag: HERE / tiny for flag, (tiny, *_) in sample.NETWORKS.items()}
    rows = []
    for name, dit in (("bf16", work / "dit.safetensors"), ("NVFP4", HERE / "dit.safetensors")):
        files, area = demo | {"dit": dit}, int(OWN["area"])
        videos = list(sample.generate_all([photo] * 3, files, moves, FRAMES, area=area))
        h, w = videos[0].shape[1:3]
        still = (sample.resize(photo, w, h) * 255).byte().permute(1, 2, 0).expand(FRAMES, -1, -1, -1)
        labels = ["the photo", *(f"{move}, {name}" for move in moves)]
        rows.append(torch.cat([labelled(video, label) for video, label in zip([still, *videos], labels)], 2))
    sheet = torch.cat(rows, 1)  # (F, h', w', 3)
    with sample.open_video(path, sheet.shape[2], sheet.shape[1]) as write:
        for frame in [*sheet, *[sheet[-1]] * 8]:  # half a second at the end
            write(frame.contiguous())


def labelled(video, label, scale=1.5):
    """Frames (F, h, w, 3) uint8, enlarged, with a line of text above."""
    h, w = (int(scale * side) // 2 * 2 for side in video.shape[1:3])
    frames = []
    for frame in video:
        sheet = Image.new("RGB", (w + 8, h + 24), "white")
        sheet.paste(Image.fromarray(frame.numpy()).resize((w, h), Image.BICUBIC), (4, 20))
        ImageDraw.Draw(sheet).text((6, 4), label, fill="black")
        frames.append(torch.from_numpy(numpy.array(sheet)))
    return torch.stack(frames)  # (F, h', w', 3)


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="train.py's folder")
    parser.add_argument("--picture", type=Path, metavar="OUT.webp", help="this alone, with --work")
    args = parser.parse_args()
    if args.picture:
        return picture(args.picture, args.work)
    vae, umt5 = wan_fp4.load_vae(HERE / "vae.safetensors"), wan_fp4.load_umt5(HERE / "umt5.safetensors")
    clip = wan_fp4.load_clip(HERE / "clip.safetensors")
    tokenizer = sample.load_tokenizer(HERE / "umt5.safetensors")
    rows = {"VAE": lambda truth: torch.cat([vae.decode(vae.encode(clip[None])) for clip in truth]),
            "first frame repeated": lambda truth: truth[:, :, :1].expand_as(truth)}
    shipped = wan_fp4.load_dit(HERE / "dit.safetensors")
    rows["NVFP4, as shipped"] = pipeline(shipped, umt5, clip, vae, tokenizer)
    if args.work:
        rows["bf16"] = pipeline(wan_fp4.load_dit(args.work / "dit.safetensors"), umt5, clip, vae, tokenizer)
        before = train.networks(tokenizer).eval()
        before.load_state_dict(train.average_of(args.work / "dit.pt"))
        parts = before["dit"], before["umt5"], before["clip"], vae, tokenizer
        rows["undistilled, 4 steps"] = pipeline(*parts)
        rows["undistilled, 40 steps"] = pipeline(*parts, steps=40, sampler="euler", scheduler="simple")
    print(f"{len(VIEWS)} views, {len(MOVES)} moves, {FRAMES} frames of {SIDE}x{SIDE}")
    print(f"{'':24}{'PSNR dB':>8}{'right move':>12}{'same picture':>14}")
    for name, make_videos in rows.items():
        quality, right, same = figures(make_videos)
        print(f"{name:24}{quality:8.2f}{right:12.1%}{same:14.3f}", flush=True)


if __name__ == "__main__":
    main()
