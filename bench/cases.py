"""The seven cases of every benchmark, their inputs, and the written formulas that times are judged by."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

DEVICE = "cuda"
DTYPE = torch.bfloat16
INPUTS = ("normal", "clustered", "one_expert")

FORMULAS = {
    "X": "B*H*N*D*2 bytes, one q-sized tensor",
    "forward_bytes": "4X: read q, k, v, write out (compulsory)",
    "backward_bytes": "8X: read q, k, v, out, dout, write dq, dk, dv (compulsory)",
    "forward_flops": "B*H*N*D*(10M+4K): scores 2M, compressed values 2M, routing 2M, attention 4(M+K)",
    "backward_flops": "B*H*N*D*(20M+10K): landmark softmax 10M, attention 10(M+K)",
    "floor": "max(bytes / measured copy bandwidth, flops / measured matrix-product rate)",
    "dense_equivalent_flops": "4*B*H*N*N*D forward: what dense attention of the same size computes",
    "extra_memory": "peak allocated minus what was allocated before, the output and the gradients",
}

AUTHORS_SOURCE = (
    "the paper's published code, on one H100 80GB HBM3, bf16, standard-normal inputs, CUDA events with L2 flush, median; "
    "torch 2.11.0+cu130; 2026-11-24"
)


@dataclass(frozen=True)
class Authors:
    """What the authors' published code takes (AUTHORS_SOURCE)."""

    forward_ms: float
    forward_backward_ms: float
    forward_mib: float
    forward_backward_mib: float


@dataclass(frozen=True)
class Case:
    name: str
    B: int
    H: int
    N: int  # queries and keys
    D: int
    M: int
    K: int
    about: str
    authors: Authors | None = None
    num_landmarks: int | tuple[int, int] | None = None  # None: M windows in one dimension
    grid: tuple[int, int] | None = None
    num_prefix_tokens: int = 0

    @property
    def pooling(self) -> dict:
        """Keyword arguments of mita_ext.pool_landmarks; with `topk`, those of mita_ext.attention."""
        if self.grid is None:
            return {"num_landmarks": self.M}
        return {"num_landmarks": self.num_landmarks, "grid": self.grid, "num_prefix_tokens": self.num_prefix_tokens}

    @property
    def normal_form(self) -> tuple[list[int], list[int], int]:
        """(num_landmarks, grid, num_prefix_tokens) as the raw ops take them: one dimension is a grid of one row."""
        if self.grid is None:
            return [1, self.M], [1, self.N], 0
        return list(self.num_landmarks), list(self.grid), self.num_prefix_tokens

    @property
    def x_bytes(self) -> int:
        return self.B * self.H * self.N * self.D * DTYPE.itemsize

    @property
    def work(self) -> dict[str, tuple[int, int]]:
        """Compulsory bytes and flops of each direction."""
        unit = self.B * self.H * self.N * self.D
        forward = 4 * self.x_bytes, unit * (10 * self.M + 4 * self.K)
        backward = 8 * self.x_bytes, unit * (20 * self.M + 10 * self.K)
        both = forward[0] + backward[0], forward[1] + backward[1]
        return {"forward": forward, "backward": backward, "forward_backward": both}

    @property
    def stages(self) -> dict[str, tuple[int, int]]:
        """Bytes and flops of each stage run by itself: what it must read and write, and no more."""
        heads, unit, x = self.B * self.H, self.B * self.H * self.N * self.D, self.x_bytes
        gathered = min(2 * heads * self.M * self.K * self.D * DTYPE.itemsize, 2 * x)  # each key and value row at least once
        rows = 4 * heads * self.N  # one int32 or fp32 per query
        return {
            "pool": (x, unit),
            "landmark_topk": (2 * x, 4 * unit * self.M),
            "route": (x + rows, 2 * unit * self.M),
            "expert_attention": (2 * x + gathered + 2 * rows, 4 * unit * (self.M + self.K)),
            "expert_attention_backward": (6 * x + gathered + 2 * rows, 10 * unit * (self.M + self.K)),
            "landmark_topk_backward": (4 * x, 10 * unit * self.M),
            "pool_backward": (x, unit),
        }


CASES = {
    case.name: case
    for case in (
        Case("A", 256, 6, 197, 64, 25, 25, "DeiT-Small, ImageNet", Authors(5.29, 11.5, 946, 2094), (5, 5), (14, 14), 1),
        Case("B", 8, 12, 1601, 64, 49, 49, "segmentation, ViT-B, 640 px", Authors(3.39, 6.05, 360, 457), (7, 7), (40, 40), 1),
        Case("B2", 32, 6, 1025, 64, 49, 49, "segmentation, ViT-S, 512 px", Authors(3.30, 5.98, 545, 777), (7, 7), (32, 32), 1),
        Case("C", 4, 16, 16384, 64, 64, 64, "long context, batch", Authors(6.22, 11.2, 1856, 1859)),
        Case("D2", 1, 16, 65536, 64, 64, 64, "long context", Authors(6.41, 13.4, 1629, 1629)),
        Case("D", 1, 16, 65536, 128, 128, 128, "long context, LLM-sized heads", Authors(10.1, 21.9, 3392, 3394)),
        Case("E", 1, 8, 1048576, 128, 256, 256, "a million tokens", Authors(91.7, 216.0, 29670, 29674)),
    )
}

SWEEP = [Case(f"N={n}", 1, 16, n, 64, 64, 64, "time against N") for n in (2**i for i in range(8, 21))]
GRID_SIZES = (16, 32, 64, 128, 256)
GRID = [
    Case(f"D={d} M={m} K={k}", 1, 16, 65536, d, m, k, "time against M and K")
    for d, m, k in itertools.product((64, 128), GRID_SIZES, GRID_SIZES)
]


def make_inputs(case: Case, kind: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value.

    normal      standard normal.
    clustered   queries and keys are one of 16 cluster centres per head, plus 0.3 noise: near-tied scores, skewed routing.
    one_expert  all queries are one vector c per head, plus 0.1 noise, and 2c inside the window of landmark 0. So landmark
                0 is near 2c, the others near c (or between, where windows overlap), and every query prefers landmark 0.
    """
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(tokens: int) -> torch.Tensor:
        return torch.randn(case.B, case.H, tokens, case.D, generator=generator, device=DEVICE, dtype=DTYPE)

    query, key, value = normal(case.N), normal(case.N), normal(case.N)
    if kind == "clustered":
        centres = normal(16)

        def near_centres(noise: torch.Tensor) -> torch.Tensor:
            which = torch.randint(16, noise.shape[:3], generator=generator, device=DEVICE)
            return centres.gather(2, which[..., None].expand(noise.shape)).add_(noise, alpha=0.3)

        query, key = near_centres(query), near_centres(key)
    elif kind == "one_expert":
        centre = normal(1)
        query = query.mul_(0.1).add_(centre)
        query[:, :, _first_window(case)] += centre
    elif kind != "normal":
        raise ValueError(f"inputs must be one of {INPUTS}, got {kind!r}")
    return query, key, value


def _first_window(case: Case) -> torch.Tensor:
    """The tokens that landmark 0 averages."""
    (mh, mw), (gh, gw), prefix = case.normal_form
    tokens = torch.arange(gh * gw, device=DEVICE).view(gh, gw) + prefix
    return tokens[: math.ceil(gh / mh), : math.ceil(gw / mw)].flatten()
