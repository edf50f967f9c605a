"""Train the embedded demo model: a tiny Wan2.1 I2V that turns a picture of an emoji and "jump" into that move.

Each stage is a command. An interrupted stage continues from its checkpoint in demo/work, to the same weights:

    python demo/train.py vae      the video autoencoder, on parts of clips of moving emoji
    python demo/train.py decoder  its decoder alone, further; can run beside the next three
    python demo/train.py latents  encode a set of whole clips with it, once
    python demo/train.py dit      flow matching: DiT, text encoder and image tower together, on those clips
    python demo/train.py distil   continue from there on the sampler's own four steps
    python demo/train.py pixels   and then with the decoder, on what one sees
    python demo/train.py export   write demo/*.safetensors; convert.py makes the NVFP4 DiT from the bf16 one

The emoji are those of Debian's fonts-noto-color-emoji, which the first stage downloads.
"""
import argparse
import colorsys
import functools
import io
import math
import multiprocessing
import random
import string
import subprocess
import sys
import time
import unicodedata
from contextlib import contextmanager
from pathlib import Path

import numpy
import sentencepiece
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

HERE = Path(__file__).resolve().parent
WORK = HERE / "work"  # checkpoints, latents and the font
sys.path.insert(0, str(HERE.parent))
import sample  # noqa: E402
import wan_fp4  # noqa: E402

FRAMES, SIDE = 17, 128  # of a video

# ----------------------------------------------------------------------------------------------------
# Emoji and their moves
# ----------------------------------------------------------------------------------------------------

PACKAGE = "fonts-noto-color-emoji=2.042-0+deb12u1"  # of Debian 12; SIL Open Font License 1.1
CODES = [*range(0x2600, 0x3300), *range(0x1F000, 0x1F3FB), *range(0x1F400, 0x1F9B0), *range(0x1F9B4, 0x1FB00)]


def font_file():
    """NotoColorEmoji.ttf, from the Debian package, which is downloaded and unpacked at the first call."""
    folder, part = WORK / "font", WORK / "font.part"
    if not folder.exists():
        part.mkdir(parents=True, exist_ok=True)
        if subprocess.run(["apt-get", "download", PACKAGE], cwd=part).returncode:
            raise OSError(f"apt-get download {PACKAGE}: failed; run apt-get update first, or, on another release "
                          f"than Debian 12, unpack this package into {folder}")
        subprocess.run(["dpkg-deb", "-x", next(part.glob("*.deb")), part], check=True)
        part.rename(folder)
    return folder / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"


@functools.cache
def all_emoji():
    """Every emoji of one code point: {name: RGBA picture (4, 128, 128) uint8}, cropped to the subject."""
    font, emoji = ImageFont.truetype(font_file(), 109), {}  # 109: the one size the font has
    for code in CODES:
        name, image = unicodedata.name(chr(code), None), Image.new("RGBA", (136, 128))
        ImageDraw.Draw(image).text((0, 0), chr(code), font=font, embedded_color=True)
        if name is not None and image.getbbox() is not None:
            image = ImageOps.pad(image.crop(image.getbbox()), (128, 128), color=(0, 0, 0, 0))
            emoji[name.lower()] = torch.tensor(numpy.array(image)).permute(2, 0, 1)
    return emoji


@functools.cache
def held_out():
    """The names of the 60 emoji that training never sees."""
    names = list(all_emoji())
    return ["cat face"] + [name for name in random.Random(0).sample(names, 60) if name != "cat face"][:59]


def training_names():
    return [name for name in all_emoji() if name not in held_out()]


MOVES = ["jump", "tilt left", "tilt right", "grow", "shrink", "slide left", "slide right", "shake", "stay still"]
PIVOT = 0, 6  # the subject's place: x, y in pixels from the frame's center


def motion(move, frame):
    """The subject in a frame of a move: x, y in pixels, size, angle in radians clockwise; at first 0, 0, 1, 0.

    The DiT's attention copies whole tokens of 16 x 16 pixels, one for each latent frame, which is 4 frames long.
    The moves along an axis therefore travel 16 pixels in 4 frames.
    """
    s = frame / (FRAMES - 1)
    kind, _, way = move.partition(" ")
    sign = -1 if way == "left" or kind == "shrink" else 1
    if kind == "jump":
        return 0, -32 * math.sin(math.pi * s) ** 2, 1, 0
    if kind == "slide":
        return sign * 32 * ease(min(1, 2 * s)), 0, 1, 0
    if kind == "shake":
        return 16 * math.sin(2 * math.pi * s), 0, 1, 0
    if kind == "tilt":
        return 0, 0, 1, sign * math.radians(30) * ease(s)
    return 0, 0, (1 if kind == "stay" else 1.35 ** (sign * ease(s))), 0


def ease(s):
    return s * s * (3 - 2 * s)


def random_scene(names, rng):
    """What the clips of an emoji show: the emoji in slightly different colors, its size and place, and the
    background, a plain color or a soft ramp between two."""
    emoji = all_emoji()[rng.choice(names)].float() / 255
    color, alpha = emoji[:3], emoji[3:]
    if rng.random() < 0.3:
        color = color[rng.sample(range(3), 3)]
    color = color.pow(math.exp(rng.uniform(-0.3, 0.3))).lerp(color.mean(0, keepdim=True), rng.uniform(0, 0.3))
    emoji = torch.cat([color, alpha])
    return scene(emoji.flip(-1) if rng.random() < 0.5 else emoji, rng)


def scene(emoji, rng):
    """(emoji (4, 128, 128) in [0, 1], size, x, y, background (3, SIDE, SIDE))"""
    light = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.5), rng.uniform(0.7, 1))
    light = torch.tensor(light)[:, None, None] * (0.4 if rng.random() < 0.15 else 1)
    angle, slope = rng.uniform(0, 2 * math.pi), rng.choice([0, 0.15, 0.3])
    at = torch.linspace(-1, 1, SIDE)
    ramp = slope * (math.sin(angle) * at[:, None] + math.cos(angle) * at + 1) / 2  # (SIDE, SIDE)
    return emoji, rng.randint(77, 96), rng.uniform(-4, 4), rng.uniform(-4, 4), light * (1 - ramp)


def render(scene, move, frames=range(17), window=None):
    """Frames of a move as a clip (3, F, h, w) in [-1, 1]. window: left, top, right and bottom of a part of the
    frame in pixels."""
    emoji, size, x, y, background = scene
    left, top, right, bottom = window or (0, 0, SIDE, SIDE)
    h, w, affine = bottom - top, right - left, []
    for frame in frames:
        dx, dy, zoom, angle = motion(move, frame)
        cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
        cx, cy = ((left + right - SIDE) / 2 - PIVOT[0] - dx, (top + bottom - SIDE) / 2 - PIVOT[1] - dy)
        affine.append([[cos * w / 2, sin * h / 2, cos * cx + sin * cy - x],
                       [-sin * w / 2, cos * h / 2, cos * cy - sin * cx - y]])
    small = torch.cat([emoji[:3] * emoji[3:], emoji[3:]])[None]  # premultiplied by its opacity
    small = F.interpolate(small, size=(size, size), mode="bicubic", antialias=True)
    grid = F.affine_grid(torch.tensor(affine) / (size / 2), (len(affine), 4, h, w), align_corners=False)
    subject = F.grid_sample(small.expand(len(affine), -1, -1, -1), grid, "bicubic", "zeros", align_corners=False)
    color, alpha = subject[:, :3], subject[:, 3:].clamp(0, 1)  # (F, 3, h, w), (F, 1, h, w)
    clip = color + (1 - alpha) * background[:, top:bottom, left:right]
    return clip.clamp(0, 1).transpose(0, 1) * 2 - 1  # (3, F, h, w)


def random_clip(names, frames, side, rng):
    """A clip (3, frames, side, side): a part of a random scene, and of a random move."""
    start = rng.randint(0, FRAMES - frames)
    left, top = rng.randint(0, SIDE - side), rng.randint(0, SIDE - side)
    return render(random_scene(names, rng), rng.choice(MOVES), range(start, start + frames),
                  (left, top, left + side, top + side))


# ----------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1]."""
    return 10 * math.log10(4 / max((a - b).square().mean().item(), 1e-12))


def save_whole(path, content):
    """torch.save under a temporary name, renamed on success."""
    part = Path(f"{path}.part")
    torch.save(content, part)
    part.replace(path)


class Trainer:
    """AdamW with warm-up, cosine decay and an average of the weights.

    A checkpoint holds the states of the random generators too, so on a CPU an interrupted run ends in the same
    weights, bit for bit, as one that was not interrupted.
    """

    def __init__(self, modules, path, steps, lr, seed, device):
        self.modules, self.path, self.steps, self.lr = modules.to(device), path, steps, lr
        self.average = {k: v.detach().clone() for k, v in modules.state_dict().items()}
        self.optimizer = torch.optim.AdamW(modules.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)
        self.step, self.rng = 0, random.Random(seed)
        torch.manual_seed(seed)
        if path.exists():
            saved = torch.load(path, weights_only=True, map_location=device)
            modules.load_state_dict(saved["weights"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.average, self.step = saved["average"], saved["step"]
            self.rng.setstate(saved["python_rng"])
            torch.set_rng_state(saved["torch_rng"].cpu())
            print(f"{path}: continuing from step {self.step}", flush=True)
        self.first, self.start = self.step, time.time()

    def update(self, loss):
        rise = min(1, (self.step + 1) / 200)
        fall = 0.5 + 0.5 * math.cos(math.pi * min(1, self.step / self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rise * max(fall, 1e-3)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(0.99, 1 - 10 / (10 + self.step))
        for k, v in self.modules.state_dict().items():
            self.average[k].lerp_(v, 1 - decay)
        if self.step % 100 == 0 or self.step == self.steps:
            save_whole(self.path, {
                "weights": self.modules.state_dict(), "optimizer": self.optimizer.state_dict(),
                "average": self.average, "step": self.step, "python_rng": self.rng.getstate(),
                "torch_rng": torch.get_rng_state()})

    @contextmanager
    def averaged(self):
        """The modules hold the average of the weights while this lasts."""
        now = {k: v.clone() for k, v in self.modules.state_dict().items()}
        self.modules.load_state_dict(self.average)
        yield
        self.modules.load_state_dict(now)

    def report_held_out(self, make_videos):
        """The figures of the averaged weights on a few held-out emoji."""
        import evaluate  # which imports this file
        with self.averaged(), torch.no_grad():
            quality, right, same = evaluate.figures(make_videos, subjects=3)
        self.report(f"held-out: {quality:.2f} dB, right move {right:.1%}, SSIM {same:.3f}")

    def report(self, text):
        rate = (time.time() - self.start) / max(self.step - self.first, 1)
        print(f"step {self.step}/{self.steps}  {text}  {rate:.2f} s/step", flush=True)


VAE = wan_fp4.VAEConfig(dims=(16, 32, 64, 80), num_res_blocks=1)


class TrainedVAE(wan_fp4.WanVAE):
    def sample_latents(self, clips):
        """Clips (B, 3, F, h, w) -> latents (B, 16, T, H, W) with the encoder's noise, and the KL divergence per
        latent value."""
        cache = {}
        moments = torch.cat([self.conv1(self.encoder(x, cache), cache) for x in wan_fp4.chunks(clips, 8)], 2)
        mean, logvar = moments.chunk(2, dim=1)
        logvar = logvar.clamp(-12, 6)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return mean + (0.5 * logvar).exp() * torch.randn_like(mean), kl

    def reconstruct(self, z):
        cache = {}
        return torch.cat([self.decoder(self.conv2(x, cache), cache) for x in wan_fp4.chunks(z, 4)], 2)


@torch.no_grad()
def pca_start(vae, images):
    """Start the encoder as a linear codec, which is far better than random weights: it computes the 16
    principal components of 8 x 8 patches, level by level, and copies frames in time.

    Every ChannelNorm divides by the length of a pixel's channels, which would lose the brightness. Channel 0
    therefore carries a large constant through all levels: lengths are then almost equal, norms almost linear.
    """
    for name, m in vae.named_modules():
        if name.endswith(("residual.6", "middle.1.proj")):  # every residual branch starts as zero
            m.weight.zero_(), m.bias.zero_()
        elif name.endswith(("coder.conv1", "resample.1", "shortcut")):
            m.weight[0], m.bias[0] = 0, 1.5 * len(m.bias) ** 0.5
        if isinstance(m, torch.nn.Conv3d) and m.kernel_size[0] == 3:  # ignore the past
            m.weight[:, :, :2] = 0
            m.weight[:, :, 2] *= 3 ** 0.5
        if name.endswith("time_conv"):  # copies of the newest frame
            c_out, c_in = m.weight.shape[:2]
            m.weight[:, :, 2] = torch.eye(c_in).repeat(c_out // c_in, 1)[..., None, None]
            m.bias.zero_()

    def copy_channels(weight):  # copy the first channels; new ones keep small random weights
        n = weight.shape[1]
        weight *= 0.3
        weight[:n] = torch.eye(n).view(n, n, *[1] * (weight.dim() - 2))

    first = vae.encoder.conv1
    first.weight[1:4] = 0
    first.weight[1:4, :, 2, 1, 1] = torch.eye(3)
    first.bias[1:4] = 0
    f = images  # (B, C, h, w): the features of this level
    downs = [m for m in vae.encoder.downsamples if isinstance(m, wan_fp4.Downsample)]
    for level, down in enumerate(downs):
        blocks = rearrange(f, "b c (h p) (w q) -> (b h w) (c p q)", p=2, q=2)
        mean, (values, vectors) = blocks.mean(0), torch.linalg.eigh(torch.cov(blocks.T))
        conv, last = down.resample[1], level == len(downs) - 1
        k = VAE.z_dim if last else min(len(conv.bias) - 1, len(values))
        basis = vectors[:, -k:] / values[-k:].sqrt() if last else vectors[:, -k:]  # the last: of variance 1
        for sign, rows in ((1, slice(1, 1 + k)), (-1, slice(1 + k, 1 + 2 * k)))[:1 + last]:
            conv.weight[rows], conv.bias[rows] = 0, -sign * mean @ basis
            conv.weight[rows, 1:1 + f.shape[1], :2, :2] = sign * basis.T.reshape(k, f.shape[1], 2, 2)
        f = rearrange((blocks - mean) @ basis, "(b h w) k -> b k h w", h=f.shape[2] // 2, w=f.shape[3] // 2)
    for block in vae.encoder.downsamples:
        if isinstance(block, wan_fp4.ResidualBlock) and block.shortcut is not None:
            copy_channels(block.shortcut.weight)
            block.shortcut.bias.zero_()  # the constant is among the channels that pass
    # silu(u) - silu(-u) = u: the head recovers the components from their positive and negative copies
    head, dim = vae.encoder.head[2], VAE.dims[-1]
    length = (1.5 ** 2 * VAE.dims[-2] + 2 * k) ** 0.5
    head.weight.zero_(), head.bias.zero_()
    head.bias[VAE.z_dim:] = -4  # log-variance
    for i in range(VAE.z_dim):
        head.weight[i, 1 + i, 2, 1, 1] = length / dim ** 0.5
        head.weight[i, 1 + k + i, 2, 1, 1] = -length / dim ** 0.5
    for conv in (vae.conv1, vae.conv2):
        conv.weight.copy_(torch.eye(len(conv.bias))[..., None, None, None])
        conv.bias.zero_()


def vae_loss(out, clips):
    """L1, L2, and L1 of the differences between neighboring pixels, which keeps outlines crisp."""
    error = out - clips
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 10 * error.square().mean() + edges


def fit_linear_decoder(vae, names, rng, device, steps=600):
    """Fit the decoder to the PCA encoder, without the residual branches: a minute that saves an hour."""
    forward = wan_fp4.ResidualBlock.forward

    def only_shortcut(self, x, cache):
        return x if self.shortcut is None else self.shortcut(x, cache)

    wan_fp4.ResidualBlock.forward = only_shortcut
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), 3e-3, betas=(0.9, 0.98), weight_decay=0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 30) * (1 - step / steps)
        clips = torch.stack([random_clip(names, 1, 64, rng) for _ in range(16)]).to(device)
        out = vae.reconstruct(vae.sample_latents(clips)[0])
        optimizer.zero_grad()
        vae_loss(out, clips).backward()
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"linear start {step + 1}/{steps}  {psnr(out.detach(), clips):.2f} dB", flush=True)
    wan_fp4.ResidualBlock.forward = forward


SHAPES = [(1, 64, 12), (5, 64, 3), (9, 64, 2), (17, 64, 1)]  # of a batch: frames, side, clips


def random_batch(names, rng):
    """Clips (B, 3, F, side, side) of one of SHAPES."""
    frames, side, count = rng.choice(SHAPES)
    return torch.stack([random_clip(names, frames, side, rng) for _ in range(count)])


def train_vae(args):
    import evaluate  # which imports this file
    names = training_names()
    torch.manual_seed(args.seed)
    vae, path = TrainedVAE(VAE).to(args.device), WORK / "vae.pt"
    if args.start:
        vae.load_state_dict(load_file(args.start / "vae.safetensors"))
    elif not path.exists():
        rng = random.Random(args.seed)
        pca_start(vae, torch.stack([random_clip(names, 1, 64, rng)[:, 0] for _ in range(1500)]))
        fit_linear_decoder(vae, names, rng, args.device)
    run = Trainer(vae, path, args.steps or 1000, 6e-4, args.seed, args.device)
    while run.step < run.steps:
        clips = random_batch(names, run.rng).to(args.device)
        z, kl = vae.sample_latents(clips)  # in float32: bfloat16 changes the latents by 3 %
        out = vae.reconstruct(z)
        run.update(vae_loss(out, clips) + 2e-4 * kl)
        if run.step % 50 == 0:
            run.report(f"{clips.shape[2]} frames: {psnr(out.detach(), clips):.2f} dB  kl {kl.item():.3f}")
        if run.step % 600 == 0 or run.step == run.steps:
            run.report_held_out(evaluate.autoencoder(vae))
    vae.cpu().load_state_dict(run.average)
    rng = random.Random(args.seed)
    normalize(vae, [random_clip(names, FRAMES, SIDE, rng) for _ in range(100)])
    save(HERE / "vae.safetensors", vae.state_dict(), torch.float16)


def dissimilarity(a, b):
    """1 - SSIM of the frames of clips (B, 3, F, h, w) in [-1, 1], in windows of 7 x 7 pixels."""
    def mean(x):
        return F.avg_pool2d(x.transpose(1, 2).flatten(0, 1), 7, stride=1)  # (B * F, 3, h - 6, w - 6)

    mean_a, mean_b = mean(a), mean(b)
    variances = mean(a * a) - mean_a ** 2 + mean(b * b) - mean_b ** 2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    ssim = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / (
        (mean_a ** 2 + mean_b ** 2 + c1) * (variances + c2))
    return 1 - ssim.mean()


def visible_loss(out, clips):
    """With SSIM, as ripples in a plain background cost little in dB but are what one sees."""
    return vae_loss(out, clips) + 0.5 * dissimilarity(out, clips)


def train_decoder(args):
    """The decoder alone, which leaves the latents, and so the DiT, as they are."""
    import evaluate  # which imports this file
    names, tensors = training_names(), load_file(HERE / "vae.safetensors")
    vae = TrainedVAE(VAE)
    vae.load_state_dict(tensors)
    vae.to(args.device)
    run = Trainer(vae.decoder, WORK / "decoder.pt", args.steps or 1000, 4e-4, args.seed, args.device)
    while run.step < run.steps:
        clips = random_batch(names, run.rng).to(args.device)
        with torch.no_grad():
            z, _ = vae.sample_latents(clips)
        out = vae.reconstruct(z)
        run.update(visible_loss(out, clips))
        if run.step % 50 == 0:
            run.report(f"{clips.shape[2]} frames: {psnr(out.detach(), clips):.2f} dB")
        if run.step % 250 == 0:
            run.report_held_out(evaluate.autoencoder(vae))
    decoder = {f"decoder.{name}": tensor for name, tensor in run.average.items()}
    save(HERE / "vae.safetensors", tensors | decoder, torch.float16)


@torch.no_grad()
def normalize(vae, clips):
    """Fold each latent channel's own mean and deviation over the clips into the 1 x 1 x 1 convolutions around
    the latents, so that Wan's published constants hold for this VAE too."""
    z = torch.cat([vae.encode(clip[None]) for clip in clips])  # (clips, 16, T, H, W)
    z = z.transpose(0, 1).flatten(1)  # (16, all positions)
    old_mean, old_std = (v.flatten() for v in wan_fp4.latent_statistics("cpu", len(z)))
    mean, std = z.mean(1) * old_std + old_mean, z.std(1) * old_std  # of the output of conv1
    gain = old_std / std
    w, n = vae.conv1, len(z)
    w.weight[:n] *= gain[:, None, None, None, None]
    w.bias[:n] = (w.bias[:n] - mean) * gain + old_mean
    w = vae.conv2
    w.bias += w.weight[..., 0, 0, 0] @ (mean - old_mean / gain)
    w.weight /= gain[None, :, None, None, None]


def save(path, tensors, dtype, **metadata):
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    wan_fp4.write_safetensors(path, tensors, metadata)


def average_of(path):
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint; run the stage that writes it first")
    return torch.load(path, weights_only=True, map_location="cpu")["average"]


def clip_pixels(frame):
    """A frame (3, h, w) in [-1, 1] -> normalized pixels of the image tower, as sample.py prepares them."""
    return sample.clip_pixels((frame + 1) / 2, CLIP_SIZE)[0]


cached_vae = functools.cache(wan_fp4.load_vae)  # one for each worker


def view(i, seed):
    """The i-th training example: a random scene and the numbers of two of its moves."""
    rng = random.Random(f"{seed} {i}")
    return random_scene(training_names(), rng), rng.sample(range(len(MOVES)), 2)


def encode_view(i, seed):
    """The latents of a view's first frame and of its two clips, and that frame's pixels for the image tower."""
    torch.set_num_threads(1)
    (picture, moves), vae = view(i, seed), cached_vae(HERE / "vae.safetensors")
    clips = torch.stack([render(picture, MOVES[m]) for m in moves])  # (2, 3, F, h, w)
    with torch.no_grad():
        z = vae.encode(torch.cat([sample.first_frame_video(clips[:1, :, 0], FRAMES), clips])).half()
    return {"condition": z[0].clone(), "clips": z[1:].clone(), "moves": torch.tensor(moves),
            "pixels": clip_pixels(clips[0, :, 0]).half()}


def train_latents(args):
    training_names()  # before the workers fork, so that they share the pictures
    start, views = time.time(), []
    with multiprocessing.get_context("fork").Pool() as pool:
        for encoded in pool.imap(functools.partial(encode_view, seed=args.seed), range(args.steps or 2000)):
            views.append(encoded)
            if len(views) % 50 == 0:
                print(f"{len(views)} views, {(time.time() - start) / len(views):.2f} s each", flush=True)
    save_whole(WORK / "latents.pt", views)


# ----------------------------------------------------------------------------------------------------
# DiT, text encoder and image tower
# ----------------------------------------------------------------------------------------------------

PHRASES = {  # the prompts for each move, the plainest first
    "jump": ["jump", "jump up", "it jumps", "make it jump", "hop", "it hops up and down"],
    "tilt": ["tilt {}", "tilt to the {}", "it tilts {}", "lean {}", "it leans to the {}", "rotate {}", "spin {}"],
    "grow": ["grow", "it grows", "make it grow", "get bigger", "it becomes larger", "bigger"],
    "shrink": ["shrink", "it shrinks", "make it shrink", "get smaller", "it becomes smaller", "smaller"],
    "slide": ["slide {}", "slide to the {}", "it slides {}", "move {}", "it moves to the {}", "go {}"],
    "shake": ["shake", "it shakes", "make it shake", "wobble", "it wobbles", "shake from side to side"],
    "stay": ["stay still", "still", "it stays still", "it does not move", "no movement", "stand still"],
}


def phrases(move):
    kind, _, way = move.partition(" ")
    return [phrase.format(way) for phrase in PHRASES[kind]]


DIT = wan_fp4.DiTConfig(dim=192, ffn_dim=768, num_blocks=6, head_dim=64, text_dim=64, image_dim=64)
UMT5 = dict(dim=64, ffn_dim=128, num_blocks=2, heads=4, inner=64)
CLIP = wan_fp4.CLIPConfig(dim=64, ffn_dim=256, num_blocks=2, head_dim=32, patch=14, tokens=65)
CLIP_SIZE = 112


def tokenizer_model():
    """A SentencePiece unigram model of the phrases, as bytes: case-insensitive, with UMT5's special ids."""
    rules, out = WORK / "lower.tsv", io.BytesIO()  # sentencepiece's own rules for all of Unicode take 240 kB
    rules.write_text("".join(f"{ord(c):X}\t{ord(c.lower()):X}\n" for c in string.ascii_uppercase))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([p for m in MOVES for p in phrases(m)] * 20), model_writer=out, vocab_size=128,
        hard_vocab_limit=False, normalization_rule_tsv=str(rules), pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2)
    return out.getvalue()


def networks(tokenizer):
    umt5 = wan_fp4.UMT5Config(vocab=tokenizer.vocab_size(), **UMT5)
    nets = torch.nn.ModuleDict({"dit": wan_fp4.WanDiT(DIT), "umt5": wan_fp4.UMT5Encoder(umt5),
                                "clip": wan_fp4.CLIPVision(CLIP), "place": torch.nn.Linear(DIT.dim, 2),
                                "source": torch.nn.Linear(DIT.dim, 4)})
    torch.nn.init.normal_(nets["clip"].pos_embedding, std=0.02)
    torch.nn.init.zeros_(nets["dit"].head.head.weight)
    look_nearby(nets["dit"])
    hear_the_prompt(nets["dit"])
    return nets


def start_from(folder, nets):
    """Load the networks of an earlier demo model, but not the embeddings of its words."""
    for kind, file in (("dit", "dit-bf16"), ("umt5", "umt5"), ("clip", "clip")):
        own = nets[kind].state_dict()
        tensors = load_file(folder / f"{file}.safetensors")
        nets[kind].load_state_dict({n: t for n, t in tensors.items() if n in own and own[n].shape == t.shape},
                                   strict=False)


OFFSETS = [(0, 0), (0, 1), (0, -1), (0, 0), (1, 0), (-1, 0)]  # rows, columns; head by head, block by block


@torch.no_grad()
def look_nearby(dit):
    """Start self-attention at the same position in all frames, or one token beside it.

    With RoPE, a query bias equal to the key bias rotated by some tokens attends to that offset. Set in each
    head's pair that rotates fastest with the row (1 radian per token), and in the one for the column.
    """
    d, c = DIT.head_dim, DIT.head_dim // 2
    rows = c - 2 * (c // 3)  # as rope_3d splits a head's pairs: time, rows, columns
    for i, block in enumerate(dit.blocks):
        attn = block.self_attn
        for head in range(DIT.dim // d):
            offset = OFFSETS[(i * (DIT.dim // d) + head) % len(OFFSETS)]
            for angle, pair in zip(offset, (rows, rows + c // 3)):
                at = head * d + 2 * pair
                attn.k.bias[at:at + 2] = torch.tensor([2.3, 0])
                attn.q.bias[at:at + 2] = 2.3 * torch.tensor([math.cos(angle), math.sin(angle)])


@torch.no_grad()
def hear_the_prompt(dit):
    """Start cross-attention so that it ignores padding.

    A prompt of 5 tokens has 507 of padding, which would get 99 % of the attention and of the gradient. Padding
    is embedded as 0, so its key is the bias. With the sign of the query's bias reversed, it gets hundreds of
    times less attention; the bias is too small to affect other keys.
    """
    for layer in (dit.text_embedding[0], dit.text_embedding[2]):
        layer.bias.zero_()
    for block in dit.blocks:
        signs = torch.randn(DIT.dim).sign()
        block.cross_attn.q.bias.copy_(0.7 * signs)
        block.cross_attn.k.bias.copy_(-0.01 * signs)


def encode_prompts(umt5, tokenizer, prompts):
    """Prompts -> features (B, L, D), padded with zeros to the longest."""
    ids = [sample.tokenize(tokenizer, prompt)[0] for prompt in prompts]
    mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)  # (B, L)
    ids = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_id())  # (B, L)
    device = next(umt5.parameters()).device
    return umt5(ids.to(device), mask.to(device))


def places(frames, height, width):
    """The position of each of frames * height * width tokens: (row, column) from the center, (N, 2)."""
    rows, columns = (torch.arange(n) - (n - 1) / 2 for n in (height, width))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1).repeat(frames, 1)


def sources(move, frames, height, width):
    """The offset from each token to where the first frame shows its content, if that is a part of the subject:
    (row, column) in tokens, (N, 2)."""
    place, pivot, out = places(1, height, width), torch.tensor([PIVOT[1], PIVOT[0]]) / 16, []
    for f in range(frames):
        x, y, zoom, angle = motion(move, max(0, 4 * f - 1.5))  # a latent holds 4 frames
        turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]) / zoom
        out.append((place - pivot - torch.tensor([y, x]) / 16) @ turn + pivot - place)
    return torch.cat(out)


def with_readers(nets, x, t, text, image, y, moves):
    """The DiT's velocity, and the loss of two linear readers, which help to train it and are not exported:
    `place` predicts each token's row and column from the second block's output; `source` predicts from the
    third's how far away the first frame shows the token's content.

    To grow or tilt, a token needs its position. RoPE only encodes the distance between tokens; the frame's
    borders are faintly visible in the latents of the empty frames. The token also has to turn the prompt into
    an offset to attend to, which attention finds by cosine and sine. Without the readers, training takes
    thousands of steps to discover either; with them, hundreds.
    """
    dit, (_, _, frames, height, width) = nets["dit"], x.shape
    grid = frames, height // 2, width // 2
    tokens, e, context = dit.prepare(x, t, text, image, y)
    for i, block in enumerate(dit.blocks):
        tokens = block(tokens, *context)  # (B, N, D)
        if i == 1:
            place = nets["place"](tokens).float()  # (B, N, 2)
        if i == 2:
            source = nets["source"](tokens).float()  # (B, N, 4)
    where = places(*grid).to(x.device) / 4
    far = torch.stack([sources(m, *grid) for m in moves]).to(x.device)  # (B, N, 2)
    loss = (place - where).square().mean() + (source - torch.cat([far.cos(), far.sin()], -1)).square().mean()
    return dit.unpatchify(dit.head(tokens, e), x.shape[2:]), loss


@torch.no_grad()
def channel_weights(vae, latents):
    """The effect of each latent channel on the decoded video, (16, 1, 1, 1), 1 on average. All channels have the
    same variance, but one holds the brightness, and many hold fine grain."""
    video = vae.decode(latents)
    change = []
    for channel in range(latents.shape[1]):
        other = latents.clone()
        other[:, channel] += 0.5
        change.append((vae.decode(other) - video).square().mean().sqrt())
    change = torch.stack(change)
    return (change / change.mean())[:, None, None, None]


def flow_matching(velocity, x0, levels, rng):
    """The error of the velocity between the clips x0 and noise, the readers' loss, and the level of noise,
    half of the time one of the sampler's own."""
    noise, u = torch.randn_like(x0), torch.rand(len(x0), device=x0.device)
    own = levels[torch.randint(0, len(levels), (len(x0),), device=x0.device)]
    sigma = torch.where(torch.rand_like(u) < 0.5, own, 5 * u / (1 + 4 * u))
    s = sigma[:, None, None, None, None]
    v, readers = velocity((1 - s) * x0 + s * noise, sigma)
    return noise - x0 - v, readers, s


def distillation(velocity, x0, levels, rng):
    """The same from x, which the sampler makes of pure noise in its first 0, 1 or 2 steps: the error of the
    velocity that leads from there to x0 at once."""
    sigma, x = levels[0], torch.randn_like(x0)
    with torch.no_grad():
        for after in levels[1:1 + rng.randrange(3)]:
            x = (1 - after) * (x - sigma * velocity(x, sigma)[0]) + after * torch.randn_like(x)
            sigma = after
    v, readers = velocity(x, sigma)
    return (x - x0) / sigma - v, readers, sigma


def pixel_loss(vae, latents, scenes, moves, rng):
    """How a random quarter of the frame, decoded from latents (B, 16, T, H, W), differs from that of the scenes'
    moves. The latents' own error says little about outlines."""
    mean, std = wan_fp4.latent_statistics(latents.device, latents.shape[1])
    half = latents.shape[-1] // 2
    top, left = rng.randint(0, half), rng.randint(0, half)
    out = vae.reconstruct((latents * std + mean)[..., top:top + half, left:left + half])  # (B, 3, F, h, w)
    window = [8 * edge for edge in (left, top, left + half, top + half)]
    clips = [render(scene, move, window=window) for scene, move in zip(scenes, moves)]
    return visible_loss(out, torch.stack(clips).to(out.device))


STAGES = {  # optimizer steps, learning rate, clips per step, the stage before
    "dit": (1500, 1e-3, 8, None), "distil": (600, 5e-4, 8, "dit"), "pixels": (900, 3e-4, 4, "distil")}


def train_dit(args):
    """The stages dit, distil and pixels, each from the averaged weights of the one before."""
    import evaluate  # which imports this file
    device, stage = args.device, args.stage
    steps, lr, batch, before = STAGES[stage]
    views = torch.load(WORK / "latents.pt", weights_only=True)
    vae = TrainedVAE(VAE).to(device)
    vae.load_state_dict(load_file(HERE / "vae.safetensors"))
    spiece = WORK / "spiece.model"
    if not spiece.exists():
        spiece.write_bytes(tokenizer_model())
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(spiece))
    torch.manual_seed(args.seed)
    nets = networks(tokenizer)
    if args.start:
        start_from(args.start, nets)
    path = WORK / f"{stage}.pt"
    if before and not path.exists():
        nets.load_state_dict(average_of(WORK / f"{before}.pt"))
    if stage == "pixels":
        nets["decoder"] = vae.decoder
        if [view(i, args.seed)[1] for i in range(9)] != [v["moves"].tolist() for v in views[:9]]:
            raise ValueError(f"{WORK}/latents.pt: got another --seed, expected {args.seed}; encode again")
    run = Trainer(nets, path, args.steps or steps, lr, args.seed, device)
    levels = sample.sigmas("normal", 4, 5.0)[:3].to(device)  # the fourth, 0.024, leaves hardly any noise
    some = torch.stack([v["clips"][0] for v in views[:4]]).float().to(device)
    weights = channel_weights(vae, some)
    while run.step < run.steps:
        picked = [(run.rng.randrange(len(views)), run.rng.randrange(2)) for _ in range(args.batch or batch)]
        x0 = torch.stack([views[v]["clips"][i] for v, i in picked]).float().to(device)  # (B, 16, T, H, W)
        y = sample.image_condition(torch.stack([views[v]["condition"] for v, _ in picked]).float().to(device))
        image = nets["clip"](torch.stack([views[v]["pixels"] for v, _ in picked]).float().to(device))
        moves = [MOVES[views[v]["moves"][i]] for v, i in picked]
        text = encode_prompts(nets["umt5"], tokenizer, [run.rng.choice(phrases(move)) for move in moves])

        def velocity(x, sigma):
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=args.fast):
                return with_readers(nets, x, 1000 * sigma.expand(len(x)), text, image, y, moves)

        target = flow_matching if stage == "dit" else distillation
        error, readers, sigma = target(velocity, x0, levels, run.rng)
        loss = (weights * error.float().square()).mean() + 0.1 * readers
        if stage == "pixels":
            scenes = [view(v, args.seed)[0] for v, _ in picked]
            loss = loss + pixel_loss(vae, x0 + sigma * error.float(), scenes, moves, run.rng)
        run.update(loss)
        if run.step % 50 == 0:
            run.report(f"loss {loss.item():.4f}  readers {readers.item():.4f}")
        if run.step % 500 == 0 or run.step == run.steps:
            parts = nets["dit"], nets["umt5"], nets["clip"], vae, tokenizer
            run.report_held_out(evaluate.pipeline(*parts))


# ----------------------------------------------------------------------------------------------------
# Export
# ----------------------------------------------------------------------------------------------------


def export(args):
    import evaluate  # which imports this file
    average, vae = average_of(WORK / "pixels.pt"), HERE / "vae.safetensors"
    part = {kind: {n[len(kind) + 1:]: t for n, t in average.items() if n.startswith(kind + ".")}
            for kind in ("dit", "umt5", "clip")}
    decoder = {n: t for n, t in average.items() if n.startswith("decoder.")}
    save(vae, load_file(vae) | decoder, torch.float16)
    spiece = torch.tensor(list((WORK / "spiece.model").read_bytes()), dtype=torch.uint8)
    save(HERE / "umt5.safetensors", part["umt5"] | {"spiece_model": spiece}, torch.float16)
    # The file has one block more than Wan uses, as CLIP's own has; here it is a copy of the last one
    extra = {n.replace("transformer.1.", "transformer.2."): t for n, t in part["clip"].items()}
    save(HERE / "clip.safetensors", part["clip"] | extra, torch.float16, head_dim=str(CLIP.head_dim))
    save(HERE / "dit-bf16.safetensors", part["dit"], torch.bfloat16, head_dim=str(DIT.head_dim),
         frames=str(FRAMES), area=str(SIDE ** 2), prompt="jump")
    first = evaluate.first_frame("cat face")
    Image.fromarray((first * 255).round().byte().permute(1, 2, 0).numpy()).save(HERE / "cat.png")
    # As a user would type it: the file records its command line, and is to have the same bytes for both
    command = "convert.py -i demo/dit-bf16.safetensors -o demo/dit.safetensors --nvfp4"
    subprocess.run([sys.executable, *command.split()], cwd=HERE.parent, check=True)


@wan_fp4.one_line_errors("train.py", "interrupted; the same command continues from the last checkpoint")
def main():
    stages = {"vae": train_vae, "decoder": train_decoder, "latents": train_latents,
              **dict.fromkeys(STAGES, train_dit), "export": export}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="vae and dit: start from the networks of an "
                        "earlier demo model in this folder, not from scratch")
    parser.add_argument("--steps", type=int, help="optimizer steps, or views to encode")
    parser.add_argument("--batch", type=int, help="clips per step of dit, distil and pixels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fast", action="store_true", help="dit, distil and pixels: compute in bfloat16, for a "
                        "GPU or a CPU that has it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    stages[args.stage](args)


if __name__ == "__main__":
    main()
