"""MiTA attention (arXiv 2602.01219) in timm's vision transformers: ViT, DeiT, DINOv2 and their like, with their weights."""

from collections.abc import Callable

from timm.layers import Attention, PatchDropout
from timm.models import VisionTransformer

from ..nn import MiTAAttention

_NAME = "mita_ext.integrations.timm.convert"


def convert(model: VisionTransformer, **options) -> Callable[[], None]:
    """Replaces the attention of every block in place, and returns the function that undoes this.

    The layers of the dense attention, which hold its weights, become those of the new one as they are: dtype, device,
    training mode, hooks and optimizers stay, and undo() leaves what was learned meanwhile. The function that the model
    computes changes: accuracy needs training or fine-tuning.

    Args:
        model: a timm VisionTransformer (images and tokens of any size) whose blocks hold timm.layers.Attention.
        options: of `mita_ext.nn.MiTAAttention`, beyond timm's. num_prefix_tokens is the model's by default, and grid_size
            that of its patches where they are not a square: after set_input_size to another such grid, undo and convert
            again. Layers that dwc and gate add are new, and untrained.

    Raises:
        TypeError: another kind of model or attention, named; an option that MiTAAttention does not have.
        ValueError: patch dropout, where patches are pooled or convolved as an image; what MiTAAttention raises.
    """
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"{_NAME}: model must be a timm VisionTransformer, got {type(model).__name__}")
    for i, block in enumerate(model.blocks):
        attn = getattr(block, "attn", None)
        if type(attn) is not Attention:
            raise TypeError(f"{_NAME}: blocks.{i}.attn must be a timm.layers.Attention, got {type(attn).__name__}")
    grid = model.patch_embed.grid_size
    if model.dynamic_img_size or grid is None or grid[0] == grid[1]:
        grid = None  # to be seen in the tokens, so that another square may come
    options = {"num_prefix_tokens": model.num_prefix_tokens, "grid_size": grid, **options}
    converted = [_converted(block.attn, options) for block in model.blocks]
    if isinstance(model.patch_drop, PatchDropout) and (converted[0].dwc or not isinstance(converted[0].num_landmarks, int)):
        raise ValueError(f"{_NAME}: patch_drop leaves no image to pool or convolve; give a number as num_landmarks, and no dwc")

    dense = [block.attn for block in model.blocks]
    for block, attn in zip(model.blocks, converted):
        block.attn = attn

    def undo():
        for block, old, new in zip(model.blocks, dense, converted):
            old.training = new.training
            block.attn = old

    return undo


def _converted(dense, options):
    """A MiTAAttention with the layers of a dense attention."""
    like = dense.qkv.weight
    attn = MiTAAttention(
        like.shape[1],
        dense.num_heads,
        dense.head_dim,
        dense.proj.out_features,
        qkv_bias=dense.qkv.bias is not None,
        gated=dense.gate is not None,
        device=like.device,
        dtype=like.dtype,
        **options,
    ).train(dense.training)
    for name, layer in dense.named_children():
        setattr(attn, name, layer)
    return attn
