"""MiTA attention (arXiv 2602.01219) as an attention implementation of transformers, for encoders: ViT, DINOv2, BERT and
their like. Where it cannot be what a model asks for, it refuses, with the reason.
"""

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from ..functional import _REFUSED, _refuse, attention
from ..nn import pooling_of

_REFUSED_HERE = {
    "is_causal": f"{_REFUSED['is_causal']}, so this is for encoders",
    "attention_mask": f"{_REFUSED['attn_mask']}; only padding of self-attention on the right is known, as a mask [B, N]",
    "sliding_window": _REFUSED["is_causal"],
    "output_attentions": "there are no attention weights of every query and key",
    "dropout": f"{_REFUSED['dropout_p']}; set the model's attention dropout to 0 for training",
} | dict.fromkeys(("position_bias", "softcap", "s_aux"), "logits are products of queries and keys alone")


def register(
    name: str = "mita",
    *,
    num_landmarks: int | tuple[int, int] = 64,
    topk: int = 64,
    routes: int = 1,
    shared_expert: bool = True,
    num_prefix_tokens: int = 1,
    grid_size: tuple[int, int] | None = None,
) -> None:
    """Makes MiTA attention known to transformers, for `attn_implementation=name` and `model.set_attn_implementation(name)`.

    Options are those of `mita_ext.nn.MiTAAttention`, here for every layer of every model that takes the name; register
    other options under other names. A pair as num_landmarks is for images, of which there is no padding.

    Masks [B, N] of padding on the right become lengths: each sequence is attended as if it were alone, and rows of padding
    get zeros. They are read as masks of self-attention. Grouped-query heads are read as they are. A mask is looked at
    once a forward, which waits for the device; compiled code asserts on the device instead.

    Raises, when the model runs:
        TypeError: causal attention (decoders), sliding windows, other masks, attention weights as outputs, attention dropout
            in training, biases and caps of logits; each with its reason.
        ValueError: a mask of padding on the left or in between; what `mita_ext.attention` raises.
    """
    fn = f"mita_ext as attn_implementation={name!r}"
    options = {"topk": topk, "routes": routes, "shared_expert": shared_expert}

    def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, **kwargs):
        """query [B, H, N, D], key and value [B, Hkv, L, D], attention_mask: what `lengths` returns -> [B, N, H, D], None."""
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        weights = kwargs.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False)
        asked = {"is_causal": causal, "output_attentions": weights, "dropout": dropout > 0}
        asked |= {option: kwargs.get(option) is not None for option in ("sliding_window", "position_bias", "softcap", "s_aux")}
        asked["attention_mask"] = attention_mask is not None and (attention_mask.dim() != 1 or query.shape[2] != key.shape[2])
        _refuse(fn, [option for option in asked if asked[option]], _REFUSED_HERE)
        pooling = pooling_of(fn, query.shape[2], num_landmarks, num_prefix_tokens, grid_size)
        seqlens = {} if attention_mask is None else {"seqlens_q": attention_mask, "seqlens_k": attention_mask}
        out = attention(query, key, value, scale=scaling, **pooling, **options, **seqlens)
        return out.transpose(1, 2).contiguous(), None

    def lengths(*, mask_function, attention_mask, local_size=None, **kwargs) -> Tensor | None:
        """The lengths int32 [B] of a mask of padding [B, N]."""
        asked = {"sliding_window": local_size is not None, "is_causal": mask_function is causal_mask_function}
        asked["attention_mask"] = mask_function is not bidirectional_mask_function  # and none of those above
        _refuse(fn, [option for option in asked if asked[option]], _REFUSED_HERE)
        if attention_mask is None:
            return None
        seqlens = attention_mask.sum(-1, dtype=torch.int32)
        on_the_right = (attention_mask[:, 1:] <= attention_mask[:, :-1]).all()
        message = f"{fn}: attention_mask must have its padding on the right (tokenizer.padding_side='right')"
        if torch.compiler.is_compiling():
            torch._assert_async(on_the_right, message)
        elif not on_the_right:
            raise ValueError(message)
        return seqlens

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, lengths)
