"""MiTA attention on a photograph: python -m mita_ext.demo [--out out/demo.png]

The photograph is cut into patches, each patch becomes a token, and one attention layer lets similar patches look at each
other. Its weights are fixed and random, not trained: what the picture shows is the mechanism, not a learned model.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from . import attention, reference
from ._C import build_info

PATCH, HEADS, HEAD_DIM = 8, 4, 64
LANDMARKS, TOPK = (4, 4), 64
SHARPNESS = 24.0  # score of two equal patches


def photograph() -> np.ndarray:
    from skimage import data  # the picture is a file of the package: nothing is downloaded

    return data.astronaut()


def tokens(image: np.ndarray) -> tuple[tuple[int, int], torch.Tensor, torch.Tensor]:
    """The grid of patches, what each one looks like (colour, texture, place), and its pixels."""
    gh, gw = image.shape[0] // PATCH, image.shape[1] // PATCH
    pixels = torch.from_numpy(image[: gh * PATCH, : gw * PATCH]).float().div(255)
    patches = pixels.view(gh, PATCH, gw, PATCH, 3).transpose(1, 2).reshape(gh * gw, PATCH * PATCH, 3)
    place = torch.cartesian_prod(torch.linspace(-1, 1, gh), torch.linspace(-1, 1, gw))
    looks = torch.cat([patches.mean(1), patches.std(1)], dim=1)
    looks = (looks - looks.mean(0)) / looks.std(0)
    return (gh, gw), torch.cat([looks, place], dim=1), patches.flatten(1)


def project(looks: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value [1, H, N, D]. Random Fourier features: the score of two patches falls with their distance."""
    generator = torch.Generator().manual_seed(0)
    frequencies = 0.6 * torch.randn(HEADS, looks.shape[1], HEAD_DIM // 2, generator=generator)
    angles = looks @ frequencies
    features = torch.cat([angles.cos(), angles.sin()], dim=-1) / (HEAD_DIM / 2) ** 0.5
    query = key = features * (SHARPNESS * HEAD_DIM**0.5) ** 0.5
    mix = torch.randn(HEADS, pixels.shape[1], HEAD_DIM, generator=generator) / pixels.shape[1] ** 0.5
    return query[None], key[None].clone(), (pixels - pixels.mean(0)).matmul(mix)[None]


def milliseconds(function, device: torch.device, repeats: int = 9) -> float:
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def forward_backward(function, inputs, dout):
    """(output, gradients) of `function` at leaf copies of the inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, dout)


def errors(out, grads, inputs, dout, aux, grid) -> dict[str, float]:
    """Relative error of output and gradients against the float64 definition, given the same selection, head by head."""
    exact = []
    for h in range(HEADS):
        head = slice(h, h + 1)

        def definition(query, key, value, head=head):
            landmarks = reference.pool_landmarks(query, LANDMARKS, grid=grid)
            indices, experts = aux.topk_indices[:, head].cpu(), aux.experts[:, head].cpu()
            return reference.attention_given(query, key, value, landmarks, indices, experts)[0]

        doubles = [tensor[:, head].detach().cpu().double() for tensor in (*inputs, dout)]
        head_out, head_grads = forward_backward(definition, doubles[:3], doubles[3])
        exact.append((head_out, *head_grads))
    references = (torch.cat(parts, dim=1) for parts in zip(*exact, strict=True))
    named = zip(("output", "dquery", "dkey", "dvalue"), (out, *grads), references, strict=True)
    return {name: float((ours.cpu().double() - ref).norm() / ref.norm()) for name, ours, ref in named}


def draw(path: Path, image: np.ndarray, grid: tuple[int, int], aux) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from . import viz

    figure = viz.overview(viz.Look(aux, LANDMARKS, grid), image)
    tokens = f"{grid[0] * grid[1]:,} patches of {PATCH}x{PATCH} pixels"
    figure.suptitle(f"Mixture-of-top-k attention on a photograph, {tokens} (random weights)", fontsize=17)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="MiTA attention on a photograph")
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"), help="the picture (default: %(default)s)")
    args = parser.parse_args()

    on_gpu = torch.cuda.is_available() and build_info()["cuda"]
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    image = photograph()
    grid, looks, pixels = tokens(image)
    inputs = [tensor.to(device, dtype) for tensor in project(looks, pixels)]
    dout = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    options = {"num_landmarks": LANDMARKS, "grid": grid, "topk": TOPK}
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    M, N = LANDMARKS[0] * LANDMARKS[1], grid[0] * grid[1]
    print(f"device      {where}, {str(dtype).removeprefix('torch.')}")
    print(f"photograph  {image.shape[1]}x{image.shape[0]} pixels, {grid[0]}x{grid[1]} patches")
    print(f"attention   B=1 H={HEADS} N=L={N} D={HEAD_DIM}, M={M} landmarks, K={TOPK} keys per expert, 1 expert per query")

    def mita(*qkv):
        return attention(*qkv, **options)

    print(f"\n{'median of 9':18} {'forward':>12} {'forward+backward':>18}")
    for name, function in (("mita_ext.attention", mita), ("dense SDPA", F.scaled_dot_product_attention)):
        forward = milliseconds(lambda f=function: f(*inputs), device)
        both = milliseconds(lambda f=function: forward_backward(f, inputs, dout), device)
        print(f"{name:18} {forward:9.3f} ms {both:15.3f} ms")

    _, aux = attention(*inputs, **options, return_aux=True)
    out, grads = forward_backward(mita, inputs, dout)
    print("\nrelative error against the float64 definition, given the same selection")
    print("  ".join(f"{name} {error:.1e}" for name, error in errors(out, grads, inputs, dout, aux, grid).items()))
    draw(args.out, image, grid, aux)
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
