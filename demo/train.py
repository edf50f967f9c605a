"""Train the embedded demo model: a tiny Wan2.1 I2V that turns a photo and "pan left" into that camera move.

Each stage is a command. An interrupted stage continues from its checkpoint in demo/work, to the same weights:

    python demo/train.py vae      the video autoencoder, on short clips of camera moves over photographs
    python demo/train.py latents  encode a set of clips with it, once
    python demo/train.py dit      flow matching: DiT, text encoder and image tower together, on those clips
    python demo/train.py distil   continue from there on the sampler's own four steps
    python demo/train.py export   write demo/*.safetensors; convert.py makes the NVFP4 DiT from the bf16 one

The photographs come inside the wheels of scikit-image and scikit-learn and in Debian packages of wallpapers,
which the first stage downloads and unpacks. demo/README.md lists their authors and licenses.
"""
import argparse
import math
import random
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy
import sentencepiece
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence

HERE = Path(__file__).resolve().parent
WORK = HERE / "work"  # checkpoints, latents and photographs
sys.path.insert(0, str(HERE.parent))
import sample  # noqa: E402
import wan_fp4  # noqa: E402

FRAMES, AREA = 17, 160 * 160  # of a video: sample.py fits a photo's size to the area
SIZES = [(160, 160), (128, 192), (192, 128)]  # height, width

# ----------------------------------------------------------------------------------------------------
# Photographs and camera moves
# ----------------------------------------------------------------------------------------------------

PACKAGES = {"lomiri-wallpapers-16.04": "20.04.0-2", "lomiri-wallpapers-20.04": "20.04.0-2",
            "mate-backgrounds": "1.26.0-1", "palapeli-data": "4:22.12.3-1",
            "plasma-workspace-wallpapers": "4:5.27.5-2"}  # of Debian 12, with the versions used
# evaluate.VIEWS has the photographs that are never trained on. Names with a slash are paths in the packages.
TRAIN = ["astronaut", "coffee", "rocket", "hubble_deep_field", "retina", "immunohistochemistry", "camera",
         "brick", "grass", "gravel", "coins", "china",
         *(f"backgrounds/{name}.jpg" for name in (
             "Bridge_by_Sander_Klootwijk", "Dragonfly_by_Bolly", "Kleiber_by_Lukas_Baubkus",
             "Picture_0B_by_freespace", "aitzgorri_by_Aitzol_Berasategi", "free_by_Peter_Nerlich",
             "greentock_by_Peter_Nerlich", "life_by_Aitzol_Berasategi", "seeding_by_Clements_Engelhardt",
             "sunset_by_Aitzol_Berasategi")),
         *(f"backgrounds/mate/{name}.jpg" for name in (
             "abstract/Elephants", "nature/Aqua", "nature/Blinds", "nature/Dune", "nature/FreshFlower",
             "nature/Garden", "nature/GreenMeadow", "nature/LadyBird", "nature/RainDrops", "nature/Storm",
             "nature/TwoWings", "nature/Wood", "nature/YellowFlower")),
         *(f"palapeli/collection/{name}.jpg" for name in (
             "cincinnati-bridge", "citrus-fruits", "european-honey-bee", "panther-chameleon-female")),
         *(f"wallpapers/{name}/contents/images/2560x1600.jpg" for name in (
             "BytheWater", "ColdRipple", "ColorfulCups", "FallenLeaf", "Grey", "Kite", "OneStandsOut", "Path",
             "summer_1am")),
         "wallpapers/SafeLanding/contents/images/5120x2880.jpg"]
SHORT_SIDE = 640  # larger photographs are scaled down to it: as sharp as a camera's, and quick to cut from


def debian_photos():
    """The folder that holds the Debian packages' files, downloaded and unpacked at the first call."""
    folder, part = WORK / "photos", WORK / "photos.part"
    if folder.exists():
        return folder / "usr" / "share"
    named = [f"{package}={version}" for package, version in PACKAGES.items()]
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise FileNotFoundError(f"apt-get, dpkg-deb: not found; the photographs are in Debian 12's packages "
                                f"{' '.join(named)}: unpack them into {folder}")
    part.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["apt-get", "download", *named], cwd=part).returncode:
        raise OSError(f"apt-get download {' '.join(named)}: failed; run apt-get update first, or, on another "
                      f"release than Debian 12, unpack these packages into {folder}")
    for package in part.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, part], check=True)
        package.unlink()
    part.rename(folder)
    return folder / "usr" / "share"


def load_photo(name):
    """One photograph as (3, h, w) float32 in [0, 1]."""
    if "/" in name:
        image = Image.open(debian_photos() / name)
        image.draft("RGB", [2 * SHORT_SIDE] * 2)  # JPEG files are decoded at about the size needed
        scale = SHORT_SIDE / min(image.size)
        size = [round(side * min(1, scale)) for side in image.size]
        photo = torch.tensor(numpy.array(image.convert("RGB").resize(size, Image.LANCZOS)))
    elif name in ("china", "flower"):
        from sklearn.datasets import load_sample_image
        photo = torch.tensor(load_sample_image(name + ".jpg"))
    else:
        from skimage import data
        photo = torch.tensor(getattr(data, name)())
    if photo.ndim == 2:
        photo = photo[..., None].expand(-1, -1, 3)
    return (photo[..., :3].permute(2, 0, 1).float() / 255).contiguous()


MOVES = ["pan left", "pan right", "pan up", "pan down", "zoom in", "zoom out", "rotate left", "rotate right",
         "still"]
PAN, ZOOM, TURN = 0.15, 1.25, math.radians(12)  # how far a whole clip moves: frame widths, factor, angle


def camera(move, s):
    """The camera after the fraction s of a move: dx, dy in frames, zoom factor, angle. The camera moves, not
    the picture: "pan left" reveals what is left of the frame, "rotate left" turns the picture clockwise."""
    kind, _, way = move.partition(" ")
    sign = -1 if way in ("left", "up", "out") else 1
    if kind == "pan":
        return (s * PAN * sign, 0, 1, 0) if way in ("left", "right") else (0, s * PAN * sign, 1, 0)
    if kind == "zoom":
        return 0, 0, ZOOM ** (s * sign), 0
    return 0, 0, 1, (s * TURN * sign if kind == "rotate" else 0)


def render(photo, move, frames, h, w, window=None, amount=1.0):
    """The true camera move over a photo (3, H, W) in [0, 1]: a clip (3, frames, h, w). window: center x,
    center y and width of frame 0 in pixels of the photo; None: the largest in its middle."""
    _, H, W = photo.shape
    x, y, width = window or (W / 2, H / 2, min(W, H * w / h))
    reach = max(width, width * h / w)  # moves stay within this part of the photo
    left, top = max(0, int(x - reach)), max(0, int(y - reach))
    photo = photo[:, top:int(y + reach) + 1, left:int(x + reach) + 1]
    x, y, (_, H, W) = x - left, y - top, photo.shape
    scale = w / width  # resize first, so that sampling does not alias
    H2, W2 = max(8, round(H * scale)), max(8, round(W * scale))
    small = F.interpolate(photo[None], size=(H2, W2), mode="bicubic", antialias=True).clamp(0, 1)
    clip = []
    for f in range(frames):
        dx, dy, zoom, angle = camera(move, amount * f / max(frames - 1, 1))
        cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
        cx, cy = 2 * (x * scale + dx * w) / W2 - 1, 2 * (y * scale + dy * h) / H2 - 1
        affine = torch.tensor([[[cos * w / W2, -sin * h / W2, cx], [sin * w / H2, cos * h / H2, cy]]])
        grid = F.affine_grid(affine, (1, 3, h, w), align_corners=False)
        clip.append(F.grid_sample(small, grid, "bicubic", "reflection", align_corners=False))
    return torch.stack(clip, dim=2)[0].clamp(0, 1)


def augment(clip, rng):
    """Permute the colors of (3, frames, h, w); vary gain, gamma and saturation: more photographs out of few."""
    if rng.random() < 0.3:
        clip = clip[rng.sample(range(3), 3)]
    gamma = math.exp(rng.uniform(-0.4, 0.4))
    gain = torch.tensor([rng.uniform(0.75, 1.1) for _ in range(3)])[:, None, None, None]
    gray = rng.uniform(0, 0.5) if rng.random() < 0.5 else 0
    clip = clip.lerp(clip.mean(0, keepdim=True), gray)
    return clip.pow(gamma) * gain


def random_view(photos, h, w, rng):
    """A random photo, flipped at random, and a window (x, y, width) in it for h x w pixels. Every move stays
    inside the photo if it is large enough. A view of less than AREA is part of a frame, and as sharp."""
    photo = rng.choice(photos).flip(rng.choice([(), (2,), (1,), (1, 2)]))
    _, H, W = photo.shape
    most = min(W, H * w / h) / 1.4 * min(1, math.sqrt(h * w / AREA))  # 1.4: room for the moves
    width = math.exp(rng.uniform(math.log(min(w, most)), math.log(most)))
    mx, my = 0.7 * width, 0.7 * width * h / w
    x, y = rng.uniform(min(mx, W / 2), max(W - mx, W / 2)), rng.uniform(min(my, H / 2), max(H - my, H / 2))
    return photo, (x, y, width)


def random_clip(photos, move, frames, h, w, rng, amount=1.0):
    """A clip (3, frames, h, w) in [-1, 1] of a move over a random view, augmented."""
    photo, window = random_view(photos, h, w, rng)
    return augment(render(photo, move, frames, h, w, window, amount), rng) * 2 - 1


# ----------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1]."""
    return 10 * math.log10(4 / max((a - b).square().mean().item(), 1e-12))


SAVE_EVERY = 100  # steps


def save_whole(path, save, content, *more):
    """Write a file under a temporary name, renamed on success."""
    part = Path(f"{path}.part")
    save(content, part, *more)
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
        if self.step % SAVE_EVERY == 0 or self.step == self.steps:
            save_whole(self.path, torch.save, {
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

    def report(self, text):
        rate = (time.time() - self.start) / max(self.step - self.first, 1)
        print(f"step {self.step}/{self.steps}  {text}  {rate:.2f} s/step", flush=True)


VAE = wan_fp4.VAEConfig(dims=(16, 32, 64, 80), num_res_blocks=1)


class TrainedVAE(wan_fp4.WanVAE):
    def forward(self, clips):
        """Clips (B, 3, F, h, w) -> their reconstruction, and the KL divergence per latent value."""
        cache = {}
        moments = torch.cat([self.conv1(self.encoder(x, cache), cache) for x in wan_fp4.chunks(clips, 8)], 2)
        mean, logvar = moments.chunk(2, dim=1)
        logvar = logvar.clamp(-12, 6)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        cache = {}
        video = torch.cat([self.decoder(self.conv2(x, cache), cache) for x in wan_fp4.chunks(z, 4)], 2)
        return video, kl


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
    error = out - clips
    return error.abs().mean() + 10 * error.square().mean()


def fit_linear_decoder(vae, photos, rng, device, steps=600):
    """Fit the decoder to the PCA encoder, without the residual branches: a minute that saves an hour."""
    forward = wan_fp4.ResidualBlock.forward

    def only_shortcut(self, x, cache):
        return x if self.shortcut is None else self.shortcut(x, cache)

    wan_fp4.ResidualBlock.forward = only_shortcut
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), 3e-3, betas=(0.9, 0.98), weight_decay=0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 30) * (1 - step / steps)
        clips = torch.stack([random_clip(photos, "still", 1, 64, 64, rng) for _ in range(16)]).to(device)
        out, _ = vae(clips)
        optimizer.zero_grad()
        vae_loss(out, clips).backward()
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"linear start {step + 1}/{steps}  {psnr(out.detach(), clips):.2f} dB", flush=True)
    wan_fp4.ResidualBlock.forward = forward


def train_vae(args):
    import evaluate  # which imports this file
    photos = [load_photo(name) for name in TRAIN]
    torch.manual_seed(args.seed)
    vae, path = TrainedVAE(VAE).to(args.device), WORK / "vae.pt"
    if not path.exists():
        rng = random.Random(args.seed)
        images = torch.stack([random_clip(photos, "still", 1, 64, 64, rng)[:, 0] for _ in range(1500)])
        pca_start(vae, images)
        fit_linear_decoder(vae, photos, rng, args.device)
    run = Trainer(vae, path, args.steps or 7000, 8e-4, args.seed, args.device)
    shapes = [(5, 64, 64, 6), (9, 64, 64, 4), (1, 64, 64, 24)]  # frames, height, width, batch
    while run.step < run.steps:
        frames, h, w, batch = run.rng.choice(shapes)
        clips = [random_clip(photos, run.rng.choice(MOVES), frames, h, w, run.rng, run.rng.uniform(0.3, 1))
                 for _ in range(batch)]
        clips = torch.stack(clips).to(args.device)  # (B, 3, F, h, w)
        out, kl = vae(clips)  # in float32: bfloat16 changes the latents by 3 %
        run.update(vae_loss(out, clips) + 2e-4 * kl)
        if run.step % 50 == 0:
            run.report(f"{frames} frames: {psnr(out.detach(), clips):.2f} dB  kl {kl.item():.3f}")
        if run.step % 1000 == 0 or run.step == run.steps:
            with run.averaged(), torch.no_grad():
                quality, _, same = evaluate.figures(evaluate.autoencoder(vae))
            run.report(f"held-out: {quality:.2f} dB, SSIM {same:.3f}")
    vae.cpu().load_state_dict(run.average)
    rng = random.Random(args.seed)
    normalize(vae, [random_clip(photos, rng.choice(MOVES), FRAMES, *SIZES[0], rng) for _ in range(100)])
    save(HERE / "vae.safetensors", vae.state_dict(), torch.float16)


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


# ----------------------------------------------------------------------------------------------------
# Latents
# ----------------------------------------------------------------------------------------------------


def save(path, tensors, dtype, **metadata):
    tensors = {n: (t.to(dtype) if t.is_floating_point() else t).contiguous() for n, t in tensors.items()}
    save_whole(path, save_file, tensors, metadata)


def average_of(path):
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint; run the stage that writes it first")
    return torch.load(path, weights_only=True, map_location="cpu")["average"]


def clip_pixels(frame):
    """A frame (3, h, w) in [-1, 1] -> normalized pixels of the image tower, as sample.py prepares them."""
    return sample.clip_pixels((frame + 1) / 2, CLIP_SIZE)[0]


def train_latents(args):
    photos, rng = [load_photo(name) for name in TRAIN], random.Random(args.seed)
    vae = wan_fp4.load_vae(HERE / "vae.safetensors", args.device)
    start, views = time.time(), []
    for i in range(args.steps or 600):
        h, w = rng.choice(SIZES)
        photo, window = random_view(photos, h, w, rng)
        moves, looks = rng.sample(range(len(MOVES)), 4), rng.random()
        clips = torch.stack([augment(render(photo, MOVES[m], FRAMES, h, w, window), random.Random(looks))
                             for m in moves])
        clips = clips.to(args.device) * 2 - 1  # (4, 3, F, h, w)
        with torch.no_grad():
            z = vae.encode(torch.cat([sample.first_frame_video(clips[:1, :, 0], FRAMES), clips]))
        views.append({"condition": z[0].half().cpu(), "clips": z[1:].half().cpu(),
                      "moves": torch.tensor(moves), "pixels": clip_pixels(clips[0, :, 0].cpu()).half()})
        if (i + 1) % 100 == 0:
            print(f"{i + 1} views, {(time.time() - start) / (i + 1):.2f} s each", flush=True)
    save_whole(WORK / "latents.pt", torch.save, views)


# ----------------------------------------------------------------------------------------------------
# DiT, text encoder and image tower
# ----------------------------------------------------------------------------------------------------

PHRASES = {
    "pan": ["pan {}", "pan to the {}", "the camera pans {}", "camera moves {}", "move the camera to the {}",
            "slow pan {}"],
    "zoom": ["zoom {}", "the camera zooms {}", "slow zoom {}", "camera moves {} closer", "smooth zoom {}"],
    "rotate": ["rotate {}", "rotate to the {}", "the camera rotates {}", "camera turns {}",
               "turn the camera to the {}"],
    "still": ["still", "a still picture", "the camera does not move", "no movement", "static camera"],
}


def phrases(move):
    """The prompts for a move that training uses, the plainest first."""
    kind, _, way = move.partition(" ")
    out = [p.format(way) for p in PHRASES[kind]]
    return [p.replace("out closer", "away") for p in out]


DIT = wan_fp4.DiTConfig(dim=192, ffn_dim=768, num_blocks=6, head_dim=64, text_dim=64, image_dim=64)
UMT5 = dict(dim=64, ffn_dim=128, num_blocks=2, heads=4, inner=64)
CLIP = wan_fp4.CLIPConfig(dim=64, ffn_dim=256, num_blocks=2, head_dim=32, patch=14, tokens=65)
CLIP_SIZE = 112


def tokenizer_model():
    """A SentencePiece unigram model of the phrases, as bytes: case-insensitive, with UMT5's special ids."""
    import io
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([p for m in MOVES for p in phrases(m)] * 20), model_writer=out, vocab_size=128,
        hard_vocab_limit=False, normalization_rule_name="nmt_nfkc_cf", pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, minloglevel=2)
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
    """Prompts -> features (B, L, D), padded with zeros to the longest of all phrases: compiled blocks need the
    same L in every step."""
    longest = max((phrase for m in MOVES for phrase in phrases(m)), key=lambda p: len(tokenizer.encode(p)))
    ids = [sample.tokenize(tokenizer, prompt)[0] for prompt in (*prompts, longest)]
    mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)  # (B, L)
    ids = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_id())  # (B, L)
    device = next(umt5.parameters()).device
    return umt5(ids[:-1].to(device), mask[:-1].to(device))


def places(frames, height, width):
    """The position of each of frames * height * width tokens: (row, column) from the center, (N, 2)."""
    rows, columns = (torch.arange(n) - (n - 1) / 2 for n in (height, width))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1).repeat(frames, 1)


def sources(move, frames, height, width):
    """The offset from each token to where the first frame shows its content: (row, column) in tokens, (N, 2)."""
    place, out = places(1, height, width), []
    for f in range(frames):
        dx, dy, zoom, angle = camera(move, max(0, 4 * f - 1.5) / (4 * frames - 4))  # a latent holds 4 frames
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) / zoom
        out.append(place @ turn + torch.tensor([dy * height, dx * width]) - place)
    return torch.cat(out)


def with_readers(nets, x, t, text, image, y, moves):
    """The DiT's velocity, and the loss of two linear readers, which help to train it and are not exported:
    `place` predicts each token's row and column from the second block's output; `source` predicts from the
    third's how far away the first frame shows the token's content.

    To zoom or rotate, a token needs its position. RoPE only encodes the distance between tokens; the frame's
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
    """The error of the velocity between the clips x0 and noise, and the readers' loss. Half of the time at the
    sampler's own levels of noise."""
    noise, u = torch.randn_like(x0), torch.rand(len(x0), device=x0.device)
    own = levels[torch.randint(0, len(levels), (len(x0),), device=x0.device)]
    sigma = torch.where(torch.rand_like(u) < 0.5, own, 5 * u / (1 + 4 * u))
    s = sigma[:, None, None, None, None]
    v, readers = velocity((1 - s) * x0 + s * noise, sigma)
    return noise - x0 - v, readers


def distillation(velocity, x0, levels, rng):
    """The same from x, which the sampler makes of pure noise in its first 0, 1 or 2 steps: the error of the
    velocity that leads from there to x0 at once."""
    sigma, x = levels[0], torch.randn_like(x0)
    with torch.no_grad():
        for after in levels[1:1 + rng.randrange(3)]:
            x = (1 - after) * (x - sigma * velocity(x, sigma)[0]) + after * torch.randn_like(x)
            sigma = after
    v, readers = velocity(x, sigma)
    return (x - x0) / sigma - v, readers


def train_dit(args, distil=False):
    import evaluate  # which imports this file
    device = args.device
    views = torch.load(WORK / "latents.pt", weights_only=True)
    by_size = [[v for v in views if v["condition"].shape[2:] == (h // 8, w // 8)] for h, w in SIZES]
    vae = wan_fp4.load_vae(HERE / "vae.safetensors", device)
    spiece = WORK / "spiece.model"
    if not spiece.exists():
        spiece.write_bytes(tokenizer_model())
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(spiece))
    torch.manual_seed(args.seed)
    nets = networks(tokenizer)
    path, steps, lr = ("distil.pt", 1200, 6e-4) if distil else ("dit.pt", 3000, 1.5e-3)
    if distil and not (WORK / path).exists():
        nets.load_state_dict(average_of(WORK / "dit.pt"))
    run = Trainer(nets, WORK / path, args.steps or steps, lr, args.seed, device)
    if args.fast:
        for block in nets["dit"].blocks:
            block.compile()
    levels = sample.sigmas("normal", 4, 5.0)[:3].to(device)  # the fourth, 0.024, leaves hardly any noise
    some = torch.stack([v["clips"][0] for v in by_size[0][:4]]).float().to(device)
    weights = channel_weights(vae, some)
    while run.step < run.steps:
        group = run.rng.choice(by_size)
        picked = [(run.rng.choice(group), run.rng.randrange(4)) for _ in range(args.batch)]
        x0 = torch.stack([v["clips"][i] for v, i in picked]).float().to(device)  # (B, 16, T, H, W)
        y = sample.image_condition(torch.stack([v["condition"] for v, _ in picked]).float().to(device))
        image = nets["clip"](torch.stack([v["pixels"] for v, _ in picked]).float().to(device))
        moves = [MOVES[v["moves"][i]] for v, i in picked]
        text = encode_prompts(nets["umt5"], tokenizer, [run.rng.choice(phrases(move)) for move in moves])

        def velocity(x, sigma):
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=args.fast):
                return with_readers(nets, x, 1000 * sigma.expand(len(x)), text, image, y, moves)

        error, readers = (distillation if distil else flow_matching)(velocity, x0, levels, run.rng)
        loss = (weights * error.float().square()).mean() + 0.1 * readers
        run.update(loss)
        if run.step % 50 == 0:
            run.report(f"loss {loss.item():.4f}  readers {readers.item():.4f}")
        if run.step % 1000 == 0 or run.step == run.steps:
            parts = nets["dit"], nets["umt5"], nets["clip"], vae, tokenizer
            with run.averaged(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
                quality, right, same = evaluate.figures(evaluate.pipeline(*parts))
            run.report(f"held-out: {quality:.2f} dB, right move {right:.1%}, SSIM {same:.3f}")


# ----------------------------------------------------------------------------------------------------
# Export
# ----------------------------------------------------------------------------------------------------


CONVERT = "python convert.py -i demo/dit-bf16.safetensors -o demo/dit.safetensors --nvfp4"


def export(args):
    average = average_of(WORK / "distil.pt")
    part = {kind: {n[len(kind) + 1:]: t for n, t in average.items() if n.startswith(kind + ".")}
            for kind in ("dit", "umt5", "clip")}
    spiece = torch.tensor(list((WORK / "spiece.model").read_bytes()), dtype=torch.uint8)
    save(HERE / "umt5.safetensors", part["umt5"] | {"spiece_model": spiece}, torch.float16)
    # The file has one block more than Wan uses, as CLIP's own has; here it is a copy of the last one
    extra = {n.replace("transformer.1.", "transformer.2."): t for n, t in part["clip"].items()}
    save(HERE / "clip.safetensors", part["clip"] | extra, torch.float16, head_dim=str(CLIP.head_dim))
    save(HERE / "dit-bf16.safetensors", part["dit"], torch.bfloat16, head_dim=str(DIT.head_dim),
         frames=str(FRAMES), area=str(AREA), prompt="zoom in")
    # As a user would type it: the file records its command line, and is to have the same bytes for both
    subprocess.run([sys.executable, *CONVERT.split()[1:]], cwd=HERE.parent, check=True)


def main():
    stages = {"vae": train_vae, "latents": train_latents, "dit": train_dit,
              "distil": lambda args: train_dit(args, distil=True), "export": export}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--steps", type=int, help="optimizer steps, or views to encode")
    parser.add_argument("--batch", type=int, default=16, help="clips per step of the dit stage")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fast", action="store_true", help="dit and distil: compute in bfloat16 with "
                        "torch.compile, for a GPU or a CPU that has bfloat16, and a C++ compiler")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    try:
        stages[args.stage](args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"train.py: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ntrain.py: interrupted; the same command continues from the last checkpoint\n")


if __name__ == "__main__":
    main()
