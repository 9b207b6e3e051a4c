"""What MiTA attention decided, drawn by matplotlib (`pip install "mita-ext[viz]"`): landmark windows, expert map, selection
map, load.

    looks = viz.look(model, images)                     # a model with MiTAAttention layers, as of integrations.timm.convert
    figure = viz.overview(looks["blocks.3.attn"], image)
    ax = viz.expert_map(looks["blocks.3.attn"], image, sample=1, head=2)

Every drawing of one kind is a function (look, image=None, *, ..., ax=None) -> Axes; without `ax` it makes a figure of its own.
Images are in tokens: x from 0 to gw, y from 0 to gh. Numbers and colours of landmarks, and so of experts, are the same in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from .functional import MiTAAux
from .nn import MiTAAttention

_NUMBERED = 32  # landmarks; more numbers would hide the picture


@dataclass(frozen=True)
class Look:
    """What `attention` returned as aux, and how it pooled; the last three as given to it. For self-attention."""

    aux: MiTAAux
    num_landmarks: int | tuple[int, int]
    grid: tuple[int, int] | None = None
    num_prefix_tokens: int = 0

    @property
    def image(self) -> tuple[int, int]:
        """(gh, gw); without a grid all tokens are an image of one row."""
        return (1, self.aux.lse.shape[2]) if self.grid is None else tuple(self.grid)

    @property
    def windows(self) -> tuple[int, int]:
        """(mh, mw) landmarks."""
        return (1, self.num_landmarks) if self.grid is None else tuple(self.num_landmarks)

    def experts(self, sample: int = 0, head: int = 0) -> np.ndarray:
        """[gh, gw]: the expert to which each token of the image is routed, the best of several; -1 at padding.

        Raises:
            ValueError: routes=0, where there is none.
        """
        if self.aux.experts.shape[3] == 0:
            raise ValueError("mita_ext.viz: routes must be at least 1 for a map of experts, got 0")
        return self._on_image(self.aux.experts[sample, head, :, 0])

    def times_chosen(self, sample: int = 0, heads: Sequence[int] | None = None) -> np.ndarray:
        """[gh, gw]: how many experts hold the key of each token of the image, over these heads, or over all."""
        indices = self.aux.topk_indices[sample] if heads is None else self.aux.topk_indices[sample, list(heads)]
        return self._on_image(indices[indices >= 0].bincount(minlength=self.aux.lse.shape[2]))

    def load(self, sample: int = 0, head: int = 0) -> np.ndarray:
        """[M]: how many tokens each expert serves, those outside the image too; with several routes a token counts for each."""
        experts = self.aux.experts[sample, head]
        return experts[experts >= 0].bincount(minlength=self.aux.landmarks.shape[2]).cpu().numpy()

    def _on_image(self, tokens):
        gh, gw = self.image
        return tokens[self.num_prefix_tokens : self.num_prefix_tokens + gh * gw].reshape(gh, gw).cpu().numpy()


@torch.no_grad()
def look(model: nn.Module, *args, **kwargs) -> dict[str, Look]:
    """Runs model(*args, **kwargs) once, and returns what each of its MiTAAttention layers decided, by the layer's name.

    Every layer attends a second time for it, so this is for looking, not for training. Of a layer that runs more than once
    it is the last time.

    Raises:
        ValueError: a model without such a layer.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MiTAAttention)}
    if not layers:
        raise ValueError(f"mita_ext.viz.look: model must hold a MiTAAttention, got a {type(model).__name__} without one")
    looks = {}

    def hook(name):
        def before(layer, inputs):
            looks[name] = Look(layer.look(inputs[0]), **layer.pooling(inputs[0].shape[1]))

        return before

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return looks


def landmark_windows(look: Look, image=None, *, ax: Axes | None = None) -> Axes:
    """The windows whose queries are averaged, numbered. They may overlap, as in torch's adaptive pooling.

    image: behind it, [H, W] or [H, W, 3], or a tensor [C, H, W]; scaled to its own range, stretched over the grid.
    """
    ax = _axes(ax)
    _show(ax, look, image)
    (mh, mw), (gh, gw), colors = look.windows, look.image, _colors(look)
    for m in range(mh * mw):
        (top, bottom), (left, right) = _window(m // mw, mh, gh), _window(m % mw, mw, gw)
        inset = 0.01 * gw, 0.01 * gh  # neighbours stay apart
        size = right - left - 2 * inset[0], bottom - top - 2 * inset[1]
        ax.add_patch(Rectangle((left + inset[0], top + inset[1]), *size, fill=False, color=colors[m], lw=2.5))
        if mh * mw <= _NUMBERED:
            label = {"facecolor": colors[m], "linewidth": 0}
            ax.text(left + 2 * inset[0], top + 2 * inset[1], str(m), va="top", color="white", weight="bold", bbox=label)
    ax.set_title("Landmarks: the queries of a window, averaged")
    return ax


def expert_map(look: Look, image=None, *, sample: int = 0, head: int = 0, ax: Axes | None = None) -> Axes:
    """Which landmark, and so which expert, each token is routed to; padding stays bare. image: as in `landmark_windows`.

    Raises:
        ValueError: routes=0.
    """
    experts, colors = look.experts(sample, head), _colors(look)
    ax = _axes(ax)
    _show(ax, look, image, grey=True)
    options = {"cmap": ListedColormap(colors), "vmin": -0.5, "vmax": len(colors) - 0.5, "interpolation": "nearest"}
    ax.imshow(np.ma.masked_less(experts, 0), alpha=0.65, extent=_extent(look), aspect=_aspect(look), **options)
    ax.set_title(f"Expert map: where tokens are routed, head {head}")
    return ax


def selection_map(
    look: Look, image=None, *, sample: int = 0, heads: Sequence[int] | None = None, ax: Axes | None = None
) -> Axes:
    """How many experts hold each key, over these heads (all by default). Keys that none holds stay bare: no query sees them but
    through the shared expert. image: as in `landmark_windows`.
    """
    chosen = look.times_chosen(sample, heads)
    ax = _axes(ax)
    _show(ax, look, image, grey=True, faint=True)
    options = {"cmap": "YlOrRd", "vmin": 0, "alpha": 0.9, "interpolation": "nearest"}
    shown = ax.imshow(np.ma.masked_equal(chosen, 0), extent=_extent(look), aspect=_aspect(look), **options)
    ax.figure.colorbar(shown, ax=ax, location="bottom", shrink=0.7, aspect=40, label="times chosen")
    ax.set_title(f"Keys that the experts hold; bare: none does ({(chosen == 0).mean():.0%})")
    return ax


def load(look: Look, *, sample: int = 0, head: int = 0, ax: Axes | None = None) -> Axes:
    """How many tokens each expert serves, next to an even share."""
    served = look.load(sample, head)
    ax = _axes(ax)
    ax.bar(range(len(served)), served, color=_colors(look))
    ax.axhline(served.mean(), color="black", ls="--", lw=1, label=f"an even share: {served.mean():.0f}")
    if len(served) <= _NUMBERED:
        ax.set_xticks(range(len(served)))
    ax.set_xlabel("expert")
    ax.set_ylabel("tokens")
    ax.set_title(f"Load: how many tokens each expert serves, head {head}")
    ax.legend()
    return ax


def overview(look: Look, image=None, *, sample: int = 0, head: int = 0) -> Figure:
    """All four in one figure: windows, expert map of one head, keys that all heads chose, load of one head."""
    figure, axes = plt.subplots(2, 2, figsize=(13, 13.4), layout="constrained")
    landmark_windows(look, image, ax=axes[0, 0])
    expert_map(look, image, sample=sample, head=head, ax=axes[0, 1])
    selection_map(look, image, sample=sample, ax=axes[1, 0])
    load(look, sample=sample, head=head, ax=axes[1, 1])
    return figure


def _axes(ax):
    return plt.subplots(layout="constrained")[1] if ax is None else ax


def _show(ax, look, image, grey=False, faint=False):
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_xlim(0, look.image[1])
    ax.set_ylim(look.image[0], 0)
    if image is None:
        return
    if isinstance(image, Tensor):
        image = image.detach().cpu().movedim(0, -1).float().numpy()
    pixels = np.asarray(image, dtype=float)
    pixels = (pixels - pixels.min()) / max(np.ptp(pixels), 1e-12)
    if pixels.ndim == 3 and (grey or pixels.shape[2] == 1):
        pixels = pixels.mean(axis=2)
    if faint:
        pixels = 0.45 + 0.55 * pixels
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=_extent(look), aspect=_aspect(look))


def _extent(look):
    gh, gw = look.image
    return 0, gw, gh, 0


def _aspect(look):
    return "auto" if look.image[0] == 1 else "equal"


def _window(i, count, length):
    """The tokens that adaptive pooling averages, from and to."""
    return i * length // count, -((i + 1) * length // -count)


def _colors(look):
    """M colours; 18 that are no greys, again and again."""
    mh, mw = look.windows
    distinct = np.delete(plt.get_cmap("tab20").colors, (14, 15), axis=0)
    return distinct[np.arange(mh * mw) % len(distinct)]
