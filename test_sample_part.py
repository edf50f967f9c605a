import io
import math
import os
import weakref

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file

import av
import sample
import wan_fp4

# sample.py: schedules and samplers

GOLDEN = {  # shift, steps: from ComfyUI's formulas
    ("normal", 5, 4): "1 .909707 .717318 .024414 0",
    ("simple", 5, 4): "1 .9375 .833333 .625 0",
    ("linear_quadratic", 5, 4): "1 .9875 .975 .725 0",
    ("normal", 5, 8): "1 .967923 .926403 .870551 .791397 .670515 .463096 .024414 0",
    ("simple", 5, 8): "1 .972222 .9375 .892857 .833333 .75 .625 .416667 0",
    ("linear_quadratic", 5, 8): "1 .99375 .9875 .98125 .975 .909375 .725 .421875 0",
}


@pytest.mark.parametrize("case", GOLDEN)
def test_sigmas_are_the_golden_ones(case):
    name, shift, steps = case
    got = sample.sigmas(name, steps, shift)
    assert got.dtype == torch.float32 and got.shape == (steps + 1,)
    golden = torch.tensor([float(s) for s in GOLDEN[case].split()])
    assert (got - golden).abs().max() <= 1e-6


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50])
def test_sigmas_by_comfyui_algorithm(shift, steps):
    """ComfyUI's algorithm, on its own table of float32 sigmas, step by step."""
    time_shift = lambda t: shift * t / (1 + (shift - 1) * t)
    table = [time_shift(i / 1000) for i in range(1, 1001)]
    simple = [table[-(1 + int(i * (1000 / steps)))] for i in range(steps)] + [0]
    assert sample.sigmas("simple", steps, shift).tolist() == pytest.approx(simple, abs=1e-6)
    times = np.linspace(1000 * table[-1], 1000 * table[0], steps)
    normal = [time_shift(t / 1000) for t in times] + [0]
    assert sample.sigmas("normal", steps, shift).tolist() == pytest.approx(normal, abs=1e-6)
    got = sample.sigmas("linear_quadratic", steps, shift)
    assert got[0] == 1 and got[-1] == 0 and (got.diff() < 0).all()


def test_normal_sigmas_that_end_at_zero():
    got = sample.sigmas("normal", 4, 0.05)  # sigma_min shifted twice is 2.5e-6: five points, no 0 after them
    lowest = 0.05e-3 / (1 - 0.95e-3)
    lowest = 0.05 * lowest / (1 - 0.95 * lowest)
    assert got.shape == (5,) and got[-1].item() == pytest.approx(lowest, rel=1e-5)


def test_simple_sigmas_are_diffusers_flow_match():
    from diffusers import FlowMatchEulerDiscreteScheduler
    theirs = FlowMatchEulerDiscreteScheduler(shift=5.0)
    theirs.set_timesteps(sigmas=[1 - i / 8 for i in range(8)])  # shifted there
    assert torch.allclose(sample.sigmas("simple", 8, 5.0), theirs.sigmas, atol=1e-6)


@pytest.mark.parametrize("bad", [("cosine", 4, 5), ("normal", 0, 5), ("normal", 4, 0),
                                 ("simple", 4, math.nan)])
def test_bad_schedules_are_refused(bad):
    with pytest.raises(ValueError, match="linear_quadratic" if bad[0] == "cosine" else "steps 0|shift"):
        sample.sigmas(*bad)


@pytest.mark.parametrize("scheduler", sample.SCHEDULERS)
@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_samplers_reach_a_single_point(sampler, scheduler):
    """If all data is one point x0, v is (x - x0) / sigma, and every sampler must end at x0."""
    x0, noise = torch.randn(2, 1, 16, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    levels = sample.sigmas(scheduler, 5, 5.0)
    got = sample.sample_latents(lambda x, s: (x - x0) / s, noise, levels, sampler)
    assert torch.allclose(got, x0, atol=1e-5)


def test_euler_and_heun_follow_a_constant_velocity_exactly():
    noise, v = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0)).double().float()
    for sampler in ("euler", "heun"):
        got = sample.sample_latents(lambda x, s: v, noise, sample.sigmas("simple", 6, 3.0), sampler)
        assert torch.allclose(got, noise - v, atol=1e-6)


def test_orders_of_convergence():
    """Gaussian data of width w: v = x (s - (1-s) w^2) / (s^2 + (1-s)^2 w^2), and x shrinks from 1 to w.
    Halving the step halves euler's error and quarters heun's."""
    w = 0.5

    def velocity(x, s):
        return x * (s - (1 - s) * w * w) / (s * s + (1 - s) ** 2 * w * w)

    def error(sampler, steps):
        levels = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return abs(sample.sample_latents(velocity, torch.ones(1), levels, sampler).item() - w)

    assert 1.8 < error("euler", 32) / error("euler", 64) < 2.2
    assert error("heun", 8) / error("heun", 16) > 3 and error("heun", 16) < error("euler", 16) / 4


def test_lcm_step_by_hand_and_its_seed():
    noise, levels = torch.ones(1, 2), torch.tensor([1.0, 0.5, 0.0])
    seen = []

    def denoise(x, s):
        seen.append((x.clone(), s))
        return 0.1 * x

    a, b, other = (sample.sample_latents(denoise, noise, levels, "lcm", torch.Generator().manual_seed(seed))
                   for seed in (7, 7, 8))
    fresh = torch.randn(1, 2, generator=torch.Generator().manual_seed(7))
    x1 = 0.5 * (noise - 1.0 * 0.1 * noise) + 0.5 * fresh
    assert torch.equal(seen[1][0], x1) and [s for _, s in seen[:2]] == [1.0, 0.5]
    assert torch.allclose(a, x1 - 0.5 * 0.1 * x1)
    assert torch.equal(a, b) and not torch.equal(a, other)


def test_sampler_counts_its_forwards_and_shows_progress():
    calls, shown = [], []
    for sampler, expected in (("lcm", 4), ("euler", 4), ("heun", 7)):
        calls.clear()
        levels = sample.sigmas("normal", 4, 5)
        sample.sample_latents(lambda x, s: calls.append(s) or x, torch.ones(1), levels, sampler,
                              progress=lambda steps: (shown.append(s) or s for s in steps))
        assert len(calls) == expected
    assert len(shown) == 12
    with pytest.raises(ValueError, match="lcm, euler, heun"):
        sample.sample_latents(None, torch.ones(1), torch.tensor([1.0, 0.0]), "dpm")


# sample.py: the picture

def picture(h=48, w=64, seed=0):
    """A smooth random picture (h, w, 3) uint8."""
    low = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(low).resize((w, h), Image.BICUBIC))


def as_uint8(image):
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("ext, mode", [
    *(("png", mode) for mode in ("RGB", "L", "P", "1", "RGBA", "LA", "I;16")),
    ("webp", "RGB"), ("webp", "L"), ("webp", "RGBA"), ("jpg", "RGB"), ("jpg", "L")])
def test_read_image_is_pillow(tmp_path, mode, ext):
    image = Image.fromarray(picture())
    if mode == "RGBA":
        image.putalpha(Image.fromarray(picture(seed=1)[..., 0]))
    elif mode == "I;16":
        image = Image.fromarray(picture()[..., 0].astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    path = tmp_path / f"a%d.{ext}"  # a name that ffmpeg would take for a pattern
    image.save(path, **{"webp": {"lossless": True, "exact": True}, "jpg": {"quality": 95}}.get(ext, {}))
    got = sample.read_image(path)
    assert got.dtype == torch.float32 and got.shape == (3, 48, 64) and got.is_contiguous()
    if mode == "I;16":
        expected = np.repeat(picture()[..., :1], 3, axis=2)
    else:
        rgba = Image.open(path).convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        expected = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
    difference = np.abs(as_uint8(got).astype(int) - expected)
    most, mean = (25, 4) if ext == "jpg" else (1, 0.6)
    assert difference.max() <= most and difference.mean() < mean


@pytest.mark.parametrize("ext", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, ext, orientation):
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ext}"
    Image.fromarray(picture()).save(path, exif=exif, quality=95, subsampling=0, lossless=True)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    got = as_uint8(sample.read_image(path))
    assert got.shape == expected.shape and np.abs(got.astype(int) - expected).mean() < 3


def test_exif_with_big_endian_or_broken_header():
    table = (1).to_bytes(2, "big") + bytes.fromhex("0112 0003 00000001 0006 0000")
    data = b"\xff\xd8\xff\xe1..Exif\0\0MM\0*" + (8).to_bytes(4, "big") + table
    assert sample.exif_orientation(data) == 6
    assert sample.exif_orientation(data[:-13]) == 1 and sample.exif_orientation(b"") == 1


def test_fit_size():
    assert sample.fit_size(832, 480, 480 * 832) == (832, 480)
    assert sample.fit_size(480, 832, 480 * 832) == (480, 832)
    assert sample.fit_size(1000, 1000, 480 * 832) == (624, 624)
    assert sample.fit_size(4000, 3000, 9216) == (112, 80)  # 1.4 is nearer to 4 / 3 than 96 x 80
    for width, height in ((1920, 1080), (3, 7), (10000, 1), (1, 10000), (451, 300), (16, 16)):
        for area in (9216, 480 * 832):
            w, h = sample.fit_size(width, height, area)
            assert w % 16 == h % 16 == 0 and w >= 16 and h >= 16 and w * h <= area


def test_resize():
    image = torch.from_numpy(picture(60, 120).copy()).permute(2, 0, 1) / 255
    for size, crop, box in (((48, 24), False, (0, 0, 120, 60)), ((24, 24), True, (30, 0, 90, 60)),
                            ((48, 16), True, (0, 10, 120, 50)), ((160, 80), True, (0, 0, 120, 60))):
        got = sample.resize(image, *size, crop=crop)
        theirs = Image.fromarray(as_uint8(image)).resize(size, Image.BICUBIC, box=box)
        assert got.shape == (3, size[1], size[0]) and 0 <= got.min() and got.max() <= 1
        assert np.abs(as_uint8(got).astype(int) - np.asarray(theirs)).max() <= 2


def test_clip_pixels_are_transformers():
    from transformers import CLIPImageProcessorPil
    image = torch.from_numpy(picture(90, 120).copy()).permute(2, 0, 1) / 255
    theirs = CLIPImageProcessorPil(size={"height": 56, "width": 56}, do_center_crop=False)(
        as_uint8(image), return_tensors="pt")["pixel_values"]
    got = sample.clip_pixels(image, 56)
    assert got.shape == theirs.shape == (1, 3, 56, 56) and (got - theirs).abs().max() < 0.03


def test_image_condition_is_the_official_regrouping():
    latents = torch.randn(2, 16, 4, 3, 5)
    y = sample.image_condition(latents)
    mask = torch.ones(1, 13, 3, 5)  # as in Wan's own image2video.py
    mask[:, 1:] = 0
    mask = torch.cat([mask[:, :1].repeat_interleave(4, dim=1), mask[:, 1:]], dim=1)
    mask = mask.view(1, 4, 4, 3, 5).transpose(1, 2)
    assert torch.equal(y[:, :4], mask.expand(2, -1, -1, -1, -1)) and torch.equal(y[:, 4:], latents)
    video = sample.first_frame_video(torch.full((1, 3, 4, 6), 0.5), 13)
    assert video.shape == (1, 3, 13, 4, 6) and (video[:, :, 0] == 0.5).all() and (video[:, :, 1:] == 0).all()


# sample.py: the prompt

@pytest.fixture(scope="module")
def spiece():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["pan left", "pan right", "zoom in", "zoom out", "rotate a photo"] * 20),
        model_writer=model, vocab_size=40, hard_vocab_limit=False, pad_id=0, eos_id=3, unk_id=2, bos_id=-1,
        minloglevel=2)
    return model.getvalue()


def test_tokenizer(tmp_path, spiece):
    weights = tmp_path / "t.safetensors"
    save_file({"w": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match="no tokenizer.*spiece.model"):
        sample.load_tokenizer(weights)
    (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
    (tmp_path / "google" / "umt5-xxl" / "spiece.model").write_bytes(spiece)
    beside = sample.load_tokenizer(weights)
    save_file({"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}, weights)
    inside = sample.load_tokenizer(weights)
    ids = sample.tokenize(inside, "  pan \n left\t")
    assert ids.dtype == torch.int64 and ids.shape[0] == 1
    assert ids.tolist() == [inside.encode("pan left") + [3]]  # </s> has the id that the model says
    assert torch.equal(ids, sample.tokenize(beside, "pan left"))
    assert sample.tokenize(inside, "").tolist() == [[3]]
    long = sample.tokenize(inside, "zoom in " * 400)
    assert long.shape == (1, 512) and long[0, -1] == 3


# sample.py: video files

def clip(frames=9, h=48, w=64):
    return torch.from_numpy(np.stack([np.roll(picture(h, w), 3 * i, axis=1) for i in range(frames)]))


def write_video(path, video, **kw):
    with sample.open_video(path, video.shape[2], video.shape[1], **kw) as write_frame:
        for frame in video:
            write_frame(frame)


def psnr(a, b):
    return 10 * math.log10(255 ** 2 / max(1e-9, np.mean((a.astype(float) - b.astype(float)) ** 2)))


def decode(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)])
        return frames, stream.average_rate, stream.codec_context, container.metadata


def test_mp4(tmp_path):
    video = clip()
    write_video(tmp_path / "a.mp4", video, metadata={"title": "pan left", "comment": "seed 0"})
    frames, rate, codec, metadata = decode(tmp_path / "a.mp4")
    assert frames.shape == (9, 48, 64, 3) and rate == 16
    assert codec.name == "h264" and codec.pix_fmt == "yuv420p" and codec.colorspace == 1
    assert metadata["title"] == "pan left" and metadata["comment"] == "seed 0"
    assert psnr(frames, video.numpy()) > 30 and os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("ext", ["gif", "webp"])
def test_gif_and_webp(tmp_path, ext):
    video = clip()
    write_video(tmp_path / f"a.{ext}", video)
    image, milliseconds = Image.open(tmp_path / f"a.{ext}"), 0
    assert image.n_frames == 9 and image.info["loop"] == 0
    for i in range(9):
        image.seek(i)
        image.load()
        milliseconds += image.info["duration"]
        assert psnr(np.asarray(image.convert("RGB")), video[i].numpy()) > 26
    assert abs(milliseconds - 9 * 62.5) < 10


@pytest.mark.parametrize("name", ["out", "out.d/"])
def test_folder_of_png(tmp_path, name):
    video = clip(5)
    write_video(f"{tmp_path}/{name}", video)
    assert sorted(os.listdir(tmp_path / name)) == [f"000{i}.png" for i in range(5)]
    for i in range(5):
        assert np.array_equal(np.asarray(Image.open(tmp_path / name / f"000{i}.png")), video[i].numpy())
    with pytest.raises(ValueError, match="has files in it"):
        write_video(f"{tmp_path}/{name}", video)
    (tmp_path / "empty").mkdir()
    write_video(tmp_path / "empty", video)
    assert len(os.listdir(tmp_path / "empty")) == 5 and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "a"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [0, 3])
def test_no_partial_video(tmp_path, name, error, after):
    with pytest.raises(error, match="boom"):
        with sample.open_video(tmp_path / name, 64, 48) as write_frame:
            hidden, = os.listdir(tmp_path)  # opened before any frame
            assert hidden.startswith(".")
            for frame in clip(after or 1)[:after]:
                write_frame(frame)
            raise error("boom")
    assert os.listdir(tmp_path) == []


def test_a_failed_run_keeps_the_old_video(tmp_path):
    write_video(tmp_path / "a.mp4", clip(1))
    old = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(RuntimeError):
        with sample.open_video(tmp_path / "a.mp4", 64, 48):
            raise RuntimeError
    assert (tmp_path / "a.mp4").read_bytes() == old
    write_video(tmp_path / "a.mp4", clip(5))
    assert (tmp_path / "a.mp4").read_bytes() != old


def test_free_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sample.free_name("x/my photo.jpg", "Pan: 50% left/up*", 3) == "my-photo-Pan-50-left-up-seed3.mp4"
    assert sample.free_name("图.jpg", "", 0) == "seed0.mp4"
    assert len(sample.free_name("photo.jpg", "very " * 100, 0)) < 80
    for expected in ("photo-seed0.mp4", "photo-seed0-1.mp4", "photo-seed0-2.mp4"):
        assert sample.free_name("photo.jpg", "", 0) == expected
        (tmp_path / expected).touch()


# sample.py: the pipeline, with networks that only record what they are given

class Fakes:
    """The VAE repeats averages of 8 x 8 pixels; the DiT's velocity leads to the latents of the picture."""

    def __init__(self, monkeypatch):
        self.log, self.loaded, self.dit_calls, self.clip_pixels, self.prompts = [], [], [], None, []
        for name in ("dit", "vae", "umt5", "clip"):
            monkeypatch.setattr(wan_fp4, f"load_{name}", self.loader(name), raising=False)

    def loader(self, name):
        def load(path, device="cpu", dtype=None):
            assert all(network() is None for network in self.loaded)  # one network in memory at a time
            self.log.append(name)
            module = torch.nn.Module()
            self.loaded.append(weakref.ref(module))
            module.forward = getattr(self, name, None)
            module.encode, module.decode_chunks = self.encode, self.decode_chunks
            module.image_size = 28
            return module
        return load

    def umt5(self, ids, mask):
        assert ids.shape == mask.shape and (mask == 1).all()
        self.prompts.append(ids)
        return ids[..., None].float().expand(-1, -1, 8)

    def clip(self, pixels):
        self.clip_pixels = pixels
        return torch.ones(1, 5, 6)

    def encode(self, video):
        self.video = video
        small = torch.nn.functional.avg_pool3d(video[:, :, ::4], (1, 8, 8))  # (1, 3, T, H, W)
        return torch.cat([small] + [small[:, :1]] * 13, dim=1)

    def decode_chunks(self, latents):
        for i in range(latents.shape[2]):
            piece = latents[:, :3, i:i + 1].repeat(1, 1, 4 if i else 1, 1, 1).clamp(-1, 1)
            yield piece.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)

    def dit(self, x, t, text, image, y):
        self.dit_calls.append((x.clone(), t, text, image, y))
        return (x - y[:, 4:, :1]) / (t / 1000) + 0 * text.mean()


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(sample.gc, "collect", lambda: None)  # slow; the fakes have no cycles
    return Fakes(monkeypatch)


@pytest.fixture
def place(tmp_path, monkeypatch, spiece):
    """A checkout with a demo (headers only), a photo, and nothing else; the current folder."""
    (tmp_path / "demo").mkdir()
    for name in ("vae", "clip"):
        save_file({"w": torch.zeros(1)}, tmp_path / "demo" / f"{name}.safetensors")
    save_file({"w": torch.zeros(1)}, tmp_path / "demo" / "dit.safetensors",
              {"frames": "13", "area": "9216", "prompt": "zoom in"})
    save_file({"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)},
              tmp_path / "demo" / "umt5.safetensors")
    Image.fromarray(picture(150, 200)).save(tmp_path / "photo.png")
    monkeypatch.setattr(sample, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_demo_run(place, fakes, capsys):
    sample.main(["photo.png"])
    out, err = capsys.readouterr()
    assert "demo model" in err and "umt5_xxl_fp16.safetensors" in err
    assert "photo-zoom-in-seed0.mp4: 112x80, 13 frames, seed 0" in out.splitlines()[-1]
    for words in ("200x150 -> 13 frames of 112x80", "peak memory", "text ", "decode ", "'zoom in'"):
        assert words in out
    frames, rate, _, metadata = decode(place / "photo-zoom-in-seed0.mp4")
    assert frames.shape == (13, 80, 112, 3) and rate == 16
    assert metadata["title"] == "zoom in" and "seed 0" in metadata["comment"] and "lcm" in metadata["comment"]
    still = np.asarray(Image.open("photo.png").resize((112, 80), Image.BICUBIC))
    assert psnr(frames[0], still) > 20 and psnr(frames[-1], still) > 20  # the photo, in blocks of 8 x 8

    assert fakes.log == ["umt5", "clip", "vae", "dit", "vae"]
    assert fakes.clip_pixels.shape == (1, 3, 28, 28) and fakes.video.shape == (1, 3, 13, 80, 112)
    assert (fakes.video[:, :, 1:] == 0).all() and fakes.video.min() >= -1 and fakes.video.min() < -0.2
    assert len(fakes.dit_calls) == 4
    for (x, t, text, image, y), sigma in zip(fakes.dit_calls, sample.sigmas("normal", 4, 5)):
        assert x.shape == (1, 16, 4, 10, 14) and x.dtype == torch.float32
        assert t.shape == (1,) and t.item() == pytest.approx(1000 * sigma.item())
        assert text.shape == (1, fakes.prompts[0].shape[1], 8) and image.shape == (1, 5, 6)
        assert y.shape == (1, 20, 4, 10, 14) and (y[:, :4, 0] == 1).all() and (y[:, :4, 1:] == 0).all()
    assert all(network() is None for network in fakes.loaded)  # each was freed
    noise = torch.randn(1, 16, 4, 10, 14, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fakes.dit_calls[0][0], noise)
    assert sorted(os.listdir(place)) == ["demo", "photo-zoom-in-seed0.mp4", "photo.png"]


def test_same_seed_same_pixels(place, fakes):
    fakes.dit = lambda x, t, text, image, y: 0.1 * x  # the noise remains visible
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sample.main(["photo.png", "-o", name, "--seed", str(seed), "--frames", "5", "--steps", "2"])
    a, b, c = ([(place / name / f"{i:04d}.png").read_bytes() for i in range(5)] for name in "abc")
    assert a == b and a != c


def test_size_and_guidance(place, fakes, capsys):
    fakes.dit = lambda x, t, text, image, y: fakes.dit_calls.append(text) or x.sign() * text.mean()
    files, _ = sample.find_files(dict.fromkeys(sample.NETWORKS))
    video = sample.generate(sample.read_image("photo.png"), files, "pan left", 5, (64, 96), steps=1, cfg=3.0,
                            negative="zoom", sampler="euler")
    assert video.shape == (5, 96, 64, 3) and video.dtype == torch.uint8
    positive, negative = (t.mean() for t in fakes.dit_calls)
    noise = torch.randn(1, 16, 2, 12, 8, generator=torch.Generator().manual_seed(0))
    expected = noise - noise.sign() * (negative + 3 * (positive - negative))
    decoded = torch.cat([p for p in fakes.decode_chunks(expected)], dim=2)
    assert torch.equal(video, ((decoded[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0))
    sample.main(["photo.png", "-o", "a.gif", "--size", "70x90", "--frames", "1"])
    assert "1 frames of 64x96" in capsys.readouterr().out  # the nearest multiples of 16


def test_models_folder(place, fakes, capsys):
    for flag, (folder, usual, tiny) in sample.NETWORKS.items():
        (place / "models" / folder).mkdir(parents=True)
        (place / "models" / folder / usual).write_bytes((place / "demo" / tiny).read_bytes())
    files, demo = sample.find_files(dict.fromkeys(sample.NETWORKS))
    assert not demo and files["vae"] == place / "models" / "vae" / "wan_2.1_vae.safetensors"
    sample.main(["photo.png", "-o", "a.mp4"])
    assert "demo" not in capsys.readouterr().err
    other = place / "models" / "vae" / "other.pth"
    other.touch()
    with pytest.raises(ValueError, match=r"2 files: other.pth, wan_2.1_vae.safetensors: choose by --vae"):
        sample.find_files(dict.fromkeys(sample.NETWORKS))
    assert sample.find_files(dict.fromkeys(sample.NETWORKS) | {"vae": str(other)})[0]["vae"] == other


BAD = {  # arguments: what the one line says
    "photo.png --frames 80": "--frames 80: must be 4k+1; the nearest are 77 and 81",
    "photo.png --frames 0": "the nearest are 1 and 5",
    "photo.png --frames x": "--frames",
    "photo.png --steps 0": "steps 0: expected 1 or more",
    "photo.png --shift -1": "shift -1.0: expected a number above 0",
    "photo.png --sampler dpm": "'lcm', 'euler', 'heun'",
    "photo.png --scheduler karras": "'normal', 'simple', 'linear_quadratic'",
    "photo.png --size 64": "WIDTHxHEIGHT",
    "photo.png --size 0x64": "WIDTHxHEIGHT",
    "photo.png --device toaster": "--device toaster: ",
    "photo.png --seed -1": "--seed -1: ",
    "missing.png": "missing.png: no such file",
    "demo": "demo: no such file",
    "text.png": "text.png: not an image that can be read",
    "empty.png": "empty.png: not an image that can be read",
    "film.mp4": "expected an image (png, jpg, webp)",
    "photo.png -o a.avi": "extension '.avi': expected .mp4, .gif, .webp, or a folder",
    "photo.png -o no/a.mp4": "no: no such folder",
    "photo.png -o demo": "is a folder that has files in it",
    "photo.png -o photo": None,  # a folder of png: fine
    "photo.webp -o photo.webp": "is the picture itself",
    "photo.png --models nowhere": "--models nowhere: no such folder",
    "photo.png --models demo": "diffusion_models: no .safetensors or .pth file: put wan2.1",
    "photo.png --dit gone.safetensors": "--dit gone.safetensors: no such file",
    "photo.png --dit text.safetensors": "text.safetensors: not a safetensors file",
    "photo.png --vae demo/vae.safetensors": "models/diffusion_models: no .safetensors",  # never the demo's
    "": "image",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line_and_exit_code_2(place, fakes, capsys, arguments):
    (place / "text.png").write_text("this is not an image\n" * 50)
    (place / "text.safetensors").write_text("this is not a model\n" * 50)
    (place / "empty.png").touch()
    Image.fromarray(picture()).save("photo.webp")
    write_video("film.mp4", clip(3))
    before = sorted(os.listdir(place))
    if BAD[arguments] is None:
        return sample.main(arguments.split())
    with pytest.raises(SystemExit) as stop:
        sample.main(arguments.split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("sample.py: error: ") and err.count("\n") == 1 and BAD[arguments] in err
    assert fakes.log == [] and sorted(os.listdir(place)) == before  # no network loaded, no file left


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_cuda_that_is_not_there(place, fakes, capsys):
    with pytest.raises(SystemExit) as stop:
        sample.main(["photo.png", "--device", "cuda"])
    assert stop.value.code == 2 and "--device cuda: " in capsys.readouterr().err and fakes.log == []


def test_interrupt(place, fakes, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt
    fakes.dit = interrupted
    with pytest.raises(SystemExit) as stop:
        sample.main(["photo.png"])
    assert stop.value.code == 130 and "Traceback" not in capsys.readouterr().err
    assert sorted(os.listdir(place)) == ["demo", "photo.png"]


def test_a_broken_demo_is_an_error(place, fakes, capsys):
    (place / "demo" / "clip.safetensors").unlink()
    with pytest.raises(SystemExit) as stop:
        sample.main(["photo.png"])
    assert stop.value.code == 2 and "clip.safetensors: no such file" in capsys.readouterr().err
