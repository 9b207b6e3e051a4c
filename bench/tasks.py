"""What bench.train learns: handwritten digits, and which value belongs to a key. All of it is on the device; no loader."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PIXELS = 64  # of an edge, enlarged from 8
TRAINING_IMAGES = 1200  # of 1797


@dataclass(frozen=True)
class Digits:
    images: Tensor  # [1797, 1, 8, 8], of mean 0 and deviation 1
    labels: Tensor  # [1797]

    @staticmethod
    def load(path: Path | None, device: torch.device) -> Digits:
        """From the scikit-learn package, or from a copy of the file in it, where that package is not."""
        if path is None:
            try:
                from sklearn.datasets import load_digits
            except ImportError as error:
                raise SystemExit(
                    "the digits are a file of the scikit-learn package: pip install scikit-learn, or copy "
                    "sklearn/datasets/data/digits.csv.gz from an installation and name it: --data digits.csv.gz"
                ) from error
            pixels, labels = load_digits(return_X_y=True)
        else:
            table = np.loadtxt(path, delimiter=",")
            pixels, labels = table[:, :-1], table[:, -1]
        images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)
        images = (images - images.mean()) / images.std()
        return Digits(images.to(device), torch.tensor(labels, dtype=torch.int64).to(device))

    def split(self, seed: int) -> tuple[Digits, Digits]:
        """For training and for testing: another split with every seed, the same for every variant."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed)).to(self.labels.device)
        return tuple(Digits(self.images[part], self.labels[part]) for part in order.tensor_split([TRAINING_IMAGES]))


def enlarged(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """[B, 1, 8, 8] -> [B, 1, PIXELS, PIXELS], bilinear; with a generator each turned, scaled, sheared and moved a little."""
    theta = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)
    if generator is not None:
        noise = torch.rand(theta.shape, generator=generator, device=images.device)
        theta = theta + (2 * noise - 1) * torch.tensor([0.2, 0.2, 0.15], device=images.device)
    grid = F.affine_grid(theta, [len(images), 1, PIXELS, PIXELS], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class Recall:
    """A token is a pair of key and value, or a query. A key is 32 random numbers that name a topic and 32 that name an item of
    it; a value is one of 16. A query holds the key of one pair, and no value. Keys are new in every sequence: they cannot be
    learned by heart.

    Queries come in runs, each about one topic, anywhere among the pairs, which have no order. So neighbours look for similar
    keys, as patches of an image do, and as pooled landmarks need; `scattered` puts the same queries anywhere.
    """

    tokens: int = 4096
    runs: int = 8
    run_length: int = 64
    pairs_per_topic: int = 32
    values: int = 16
    half_key: int = 32

    @property
    def width(self) -> int:
        return 2 * self.half_key + self.values

    def sequences(self, B: int, generator: torch.Generator, scattered: bool = False) -> tuple[Tensor, Tensor]:
        """-> tokens [B, N, width]; the value that each asks for [B, N], -1 where it asks for none."""
        device, N, Q = generator.device, self.tokens, self.runs * self.run_length
        pairs, options = N - Q, {"generator": generator, "device": device}
        topic = torch.arange(pairs, device=device) // self.pairs_per_topic
        topics = torch.randn(B, pairs // self.pairs_per_topic + 1, self.half_key, **options)
        keys = torch.cat([topics[:, topic], torch.randn(B, pairs, self.half_key, **options)], dim=2)
        values = torch.randint(self.values, (B, pairs), **options)

        complete = pairs // self.pairs_per_topic
        asked_topics = torch.rand(B, complete, **options).argsort(1)[:, : self.runs, None]
        items = torch.randint(self.pairs_per_topic, (B, self.runs, self.run_length), **options)
        asked = (asked_topics * self.pairs_per_topic + items).flatten(1)  # [B, Q], which pair

        held = 4 * (F.one_hot(values, self.values) - 1 / self.values)  # half as loud as the key
        asked_keys = keys.gather(1, asked[..., None].expand(-1, -1, keys.shape[2]))
        tokens = torch.cat([torch.cat([keys, held], dim=2), F.pad(asked_keys, (0, self.values))], dim=1)
        answers = torch.cat([values.new_full((B, pairs), -1), values.gather(1, asked)], dim=1)
        order = (torch.rand(B, N, **options) if scattered else self._places(B, pairs, options)).argsort(1)
        return tokens.gather(1, order[..., None].expand_as(tokens)), answers.gather(1, order)

    def _places(self, B, pairs, options):
        """Places [B, N] of the pairs and then of the queries: pairs and runs are shuffled, each run as a whole."""
        lengths = torch.ones(pairs + self.runs, dtype=torch.int64, device=options["device"])
        lengths[pairs:] = self.run_length
        order = torch.rand(B, len(lengths), **options).argsort(1)
        ends = lengths[order].cumsum(1)
        starts = torch.empty_like(order).scatter(1, order, ends - lengths[order])
        within = torch.arange(self.run_length, device=options["device"])
        return torch.cat([starts[:, :pairs], (starts[:, pairs:, None] + within).flatten(1)], dim=1)
