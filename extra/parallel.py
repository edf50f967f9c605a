"""One video by several GPUs: torchrun --nproc-per-node N -m extra.parallel photo.jpg ...

The flags are sample.py's. torchrun starts this program N times; each process is a rank, with a GPU of its own.
Rank 0 is sample.py: it checks the arguments, encodes the picture and the prompt, and writes the video. The
functions that sample.generate calls are replaced by some that share the work: all ranks hold the same latents
and draw the same noise, but each computes only its part of the DiT's tokens and of the VAE's tiles.

Ulysses (https://arxiv.org/abs/2309.14509) splits the N tokens of a video: each of R ranks has n = ceil(N / R).
Only self-attention mixes tokens, and it treats heads separately. So an all-to-all before it gives each rank all
tokens of heads / R heads, and another one after it returns n tokens of all heads. With guidance and an even
number of ranks, each half of them computes one of the two velocities, and R is half as large.

The result differs from that of a single process by the order of sums and, on tensor cores, by the tensor scale of
the activations, which each rank computes from its own tokens. Run by processes on CPUs, not yet on GPUs.

Letters in the shapes: B batch, N tokens, D width, d head width; T, H, W and F, h, w as in sample.py.
"""
import os
import platform
import sys
import threading
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from io import BytesIO

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import sample
import wan_fp4
from extra import stream

# ----------------------------------------------------------------------------------------------------
# The program
# ----------------------------------------------------------------------------------------------------

PLAIN = {name: getattr(sample, name) for name in (  # what share_work and main replace
    "reserve", "generate", "encode_text", "encode_images", "encode_first_frames", "load_dit", "sample_latents",
    "decode", "WORKING")}
PATCHES = 12  # least WORKING: the tokens' part before they are split, by arithmetic


@wan_fp4.one_line_errors("extra.parallel")
def main(argv=None):
    with join_ranks() as ranks:
        if sample.make_parser().parse_args(argv).decode:  # also: every rank ends with --help
            raise ValueError("--decode: got several processes, expected one; use sample.py")
        if ranks.rank == 0:
            sample.reserve, sample.generate = reserve, partial(generate, ranks)
            sample.main.__wrapped__(argv)  # without its handler of errors: join_ranks is that of all ranks
        else:
            generate(ranks)


def generate(ranks, *arguments, **on_latents):
    """sample.generate by all ranks. Those of rank 0 are the arguments, and only rank 0 gets the video."""
    image, prompt, files, settings = ranks.once(lambda: arguments)
    settings = replace(settings, device=ranks.device(str(settings.device)))
    share_work(ranks, settings)
    return PLAIN["generate"](image, prompt, files, settings, **on_latents)


def share_work(ranks, settings):
    """Replace what sample.generate calls by functions that share the work."""
    halves = settings.cfg != 1 and ranks.size % 2 == 0
    parts = ranks.size // 2 if halves else ranks.size  # the ranks that share a velocity's tokens
    half, place = divmod(ranks.rank, parts)
    group = ranks.group(parts)

    def encode_text(*args):
        texts = ranks.once(lambda: PLAIN["encode_text"](*args))
        return texts[half:half + 1] if halves else texts  # the prompt's features or the negative prompt's

    def load_dit(*args):
        return SplitDiT(PLAIN["load_dit"](*args), group)

    def sample_latents(velocity, *args):
        def guided(x, sigma):
            v = velocity(x, sigma)  # of this half's prompt: (1, 16, T, H, W)
            both = v.new_zeros(2, *v.shape)
            if place == 0:
                both[half] = v
            v, negative = ranks.sum(both)
            return negative + settings.cfg * (v - negative)  # as in sample.generate

        return PLAIN["sample_latents"](guided if halves else velocity, *args)

    sample.encode_text, sample.load_dit, sample.sample_latents = encode_text, load_dit, sample_latents
    sample.encode_images = lambda *args: ranks.once(lambda: PLAIN["encode_images"](*args))
    sample.encode_first_frames = lambda *args: ranks.once(lambda: PLAIN["encode_first_frames"](*args))
    sample.decode = partial(decode, ranks)
    sample.WORKING = max(PLAIN["WORKING"] / parts, PATCHES)


def decode(ranks, path, latents, settings):
    """sample.decode: rank 0 decodes alone what fits, and returns the video; otherwise all ranks decode tiles."""
    measure = sample.free_memory
    free = min(ranks.gather(measure(latents.device)))
    free = free / ranks.size if latents.is_cpu else free  # all processes of a machine share its memory
    sample.free_memory, stream.decode_tiled = lambda device: free, partial(decode_tiled, ranks)
    video = None
    if ranks.rank == 0:
        video = PLAIN["decode"](path, latents, settings)
    else:
        vae = wan_fp4.load_vae(path, settings.device)
        if (needed := sample.decoding_memory(vae, latents)) > free:
            list(stream.decode_tiled(vae, latents, free, needed))
    sample.free_memory = measure
    return video


def decode_tiled(ranks, vae, latents, free, needed):
    """stream.decode_tiled: each rank decodes some of the tiles."""
    tile = stream.tile_side(latents, free, needed)
    video = stream.decode_tiles(vae, latents, tile, slice(ranks.rank, None, ranks.size))
    yield from wan_fp4.chunks(ranks.sum(video).clamp(-1, 1), 4)


# ----------------------------------------------------------------------------------------------------
# A DiT whose tokens are split over the ranks of a group
# ----------------------------------------------------------------------------------------------------

class SplitDiT(nn.Module):
    """A WanDiT that computes each velocity together with the other ranks of a process group. All of them must
    call it with the same arguments; all get the same velocity. It changes the WanDiT's self-attention for good:
    call only it from then on. Raises ValueError if the number of heads is not a multiple of R."""

    def __init__(self, dit, group):
        super().__init__()
        self.dit, self.split = dit, TokenSplit(group)
        heads = dit.cfg.dim // dit.cfg.head_dim
        if heads % self.split.size:
            counts = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise ValueError(f"the model's {heads} heads: got {self.split.size} ranks that share them, expected "
                             f"{counts}; start torchrun with that many (with --cfg, twice as many)")
        for module in dit.modules():  # not dit.blocks: streamed ones are only callables
            if isinstance(module, wan_fp4.SelfAttention):
                module.attention = partial(self.split.attention, module.attention)

    def forward(self, x, t, text, image, y):
        grid = x.shape[2:]
        x, e, (e0, rope, *context) = self.dit.prepare(x, t, text, image, y)  # (B, N, D)
        x, rope = self.split.share(x), self.split.share(rope)  # (B, n, D), (2, n, d/2)
        for block in self.dit.blocks:
            x = block(x, e0, rope, *context)  # (B, n, D)
        x = self.split.gather(self.dit.head(x, e))  # (B, N, 64)
        return self.dit.unpatchify(x, grid)  # (B, 16, T, H, W)


class TokenSplit:
    """One video's N tokens, split over the R ranks of a process group."""

    def __init__(self, group):
        self.group, self.size, self.tokens = group, dist.get_world_size(group), 0

    def share(self, x):
        """This rank's tokens: (..., N, C) -> (..., n, C). If R does not divide N, zeros are appended first."""
        self.tokens = x.shape[-2]
        x = F.pad(x, (0, 0, 0, -self.tokens % self.size))  # (..., R * n, C)
        return x.chunk(self.size, dim=-2)[dist.get_rank(self.group)].clone()  # (..., n, C), a copy: frees x

    def gather(self, x):
        """The inverse of share, for (B, n, C): every rank gets (B, N, C)."""
        parts = [torch.empty_like(x) for _ in range(self.size)]  # (B, n, C) each
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)[:, :self.tokens]  # (B, N, C)

    def exchange(self, x):
        """All-to-all on x (R, ...): part i goes to rank i; part i of the result comes from rank i."""
        result = torch.empty_like(x)
        dist.all_to_all_single(result, x, group=self.group)
        return result

    def all_tokens(self, x):
        """(B, heads, n, d) of this rank's tokens -> (B, heads/R, N, d) of its heads."""
        x = rearrange(x, "b (r heads) n d -> r b heads n d", r=self.size).contiguous()  # (R, B, heads/R, n, d)
        x = rearrange(self.exchange(x), "r b heads n d -> b heads (r n) d")  # (B, heads/R, R * n, d)
        return x[:, :, :self.tokens]  # (B, heads/R, N, d), without the padding

    def all_heads(self, x):
        """The inverse: (B, heads/R, N, d) -> (B, heads, n, d)."""
        x = F.pad(x, (0, 0, 0, -self.tokens % self.size))  # (B, heads/R, R * n, d)
        x = rearrange(x, "b heads (r n) d -> r b heads n d", r=self.size).contiguous()  # (R, B, heads/R, n, d)
        return rearrange(self.exchange(x), "r b heads n d -> b (r heads) n d")  # (B, heads, n, d)

    def attention(self, whole, q, k, v):
        """Self-attention by the function `whole` over all tokens: (B, heads, n, d) each -> (B, heads, n, d)."""
        return self.all_heads(whole(*map(self.all_tokens, (q, k, v))))


# ----------------------------------------------------------------------------------------------------
# The ranks
# ----------------------------------------------------------------------------------------------------

@contextmanager
def join_ranks():
    """A context that gives the Ranks that torchrun started. Within it, only rank 0 prints.

    The first exception in any rank is raised again in that rank, after "rank 1 (HOST): " is printed to stderr.
    All other ranks end within seconds with exit code 2, even in the middle of a transfer. Raises ValueError if
    ranks have different versions of torch, and ConnectionError if another rank has disappeared.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise ValueError("got a single process, expected torchrun --nproc-per-node N -m extra.parallel ...")
    store, rank, size = next(dist.rendezvous("env://"))
    threading.Thread(target=end_after_failure, args=[store.clone()], daemon=True).start()
    out, err = (sys.stdout, sys.stderr) if rank == 0 else [open(os.devnull, "w")] * 2
    try:
        with redirect_stdout(out), redirect_stderr(err):
            ranks = meet(store, rank, size)
            yield ranks
            ranks.gather("finished")  # no rank leaves while others still need it
            dist.destroy_process_group()
    except (Exception, KeyboardInterrupt) as error:
        if store.add("failures", 1) > 1:
            time.sleep(60)  # another rank failed first and reports it; end_after_failure ends this one
        print(f"rank {rank} ({platform.node()}): ", end="", file=sys.stderr, flush=True)
        # The gloo backend also raises plain RuntimeErrors, which only their text identifies
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ConnectionError("lost the connection to another rank; see torchrun's report on it") from None
        raise


def meet(store, rank, size):
    """Connect this rank to all others. Raises ValueError if its version of torch is not that of rank 0."""
    if rank == 0:
        store.set("torch", torch.__version__)
    version = store.get("torch").decode()
    if version != torch.__version__:
        raise ValueError(f"got torch {torch.__version__}, expected {version} as in rank 0; install that version")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(days=7))
    return Ranks(rank, size)


def end_after_failure(store):
    """End this process 2 seconds after any rank has failed, which leaves that rank time to print its message."""
    with suppress(dist.DistError):  # the machine that keeps the store is lost
        while store.add("failures", 0) == 0:
            time.sleep(0.5)
    time.sleep(2)
    for kept in RESERVED:
        if kept.exists() and kept.stat().st_size == 0:
            kept.unlink()
    os._exit(2)


RESERVED = []


@contextmanager
def reserve(*args):
    """sample.reserve, remembering the file: end_after_failure ends this process without leaving the context."""
    with PLAIN["reserve"](*args) as (output, kept):
        RESERVED.append(kept)
        yield output, kept


@dataclass(frozen=True)
class Ranks:
    """The number of processes that work together, and which of them this one is."""
    rank: int
    size: int

    def once(self, work):
        """Call work() in rank 0 only, and return its result in every rank, with tensors on rank 0's GPU copied to
        each rank's own."""
        result, message = None, [None]
        if self.rank == 0:
            result, buffer = work(), BytesIO()
            torch.save(result, buffer)
            message = [buffer.getvalue()]
        dist.broadcast_object_list(message)
        if self.rank == 0:
            return result
        own = {"cuda:0": f"cuda:{os.environ['LOCAL_RANK']}"}
        return torch.load(BytesIO(message[0]), map_location=own, weights_only=False)

    def gather(self, value):
        """[the value of rank 0, of rank 1, ...], for every rank."""
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, x):
        """Add the other ranks' tensors to x, in place. Returns x."""
        dist.all_reduce(x)
        return x

    def group(self, size):
        """The process group of `size` consecutive ranks to which this one belongs. Every rank must call it."""
        groups = [dist.new_group(range(i, i + size)) for i in range(0, self.size, size)]
        return groups[self.rank // size]

    def device(self, name):
        """The device of this rank: "cuda" gives each its own GPU. Raises ValueError if the machine has too few,
        and for a GPU's number, such as cuda:1."""
        if not name.startswith("cuda"):
            return name
        ranks, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if name != "cuda" or ranks > gpus:
            raise ValueError(f"--device {name}: got {ranks} ranks on a machine with {gpus} GPUs, expected "
                             f"--device cuda and a GPU for each; lower torchrun's --nproc-per-node")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return f"cuda:{os.environ['LOCAL_RANK']}"


if __name__ == "__main__":
    main()
