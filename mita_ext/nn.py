"""MiTA attention (arXiv 2602.01219) as a module, in the place of the `Attention` of timm's vision transformers: the same
constructor, the same forward, the same keys of the state dict.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .functional import _REFUSED, MiTAAux, _refuse, attention

_NAME = "mita_ext.nn.MiTAAttention"
_REFUSED_HERE = _REFUSED | {"attn_drop": f"{_REFUSED['dropout_p']}; set it to 0 for training"}


class MiTAAttention(nn.Module):
    """Self-attention of x [B, N, dim] -> [B, N, dim_out], any dtype of `mita_ext.attention`:

        q, k, v = heads of qkv(x), q and k through their norms
        out = attention(q, k, v) + dwc(v)      dwc on the image alone
        out = norm(out) * sigmoid(gate(x))     timm's `gated`; silu instead of sigmoid: `gate`, of the paper
        result = proj_drop(proj(out))

    Args:
        dim ... dtype: as in timm.layers.Attention. Keys of the state dict are timm's (qkv, q_norm, k_norm, norm, gate,
            proj), so the weights of a dense block load as they are. attn_drop above 0 is refused in training.
        num_landmarks: a pair (mh, mw) pools the image in two dimensions; a number pools all tokens in one.
        topk, routes, shared_expert: as in `mita_ext.attention`.
        num_prefix_tokens: tokens before the image (class, register tokens), which are attended but not pooled.
        grid_size: (gh, gw) of the image, row major; tokens behind it are treated like those before. None: the square that
            all tokens after the prefix fill. Neither is looked at where num_landmarks is a number and dwc is False.
        dwc: 3 x 3 depthwise convolution of the values on the image, added to the attention. Key: dwc.
        gate: silu gate, from a fourth projection of x. Key: gate. Not together with `gated`.

    The defaults are those of the paper's DeiT: 5 x 5 landmarks, 25 keys, an image behind one class token.

    Raises:
        ValueError: a dim that heads do not divide, norms without norm_layer, both gates; in forward an x of other than 3
            dimensions, tokens that are no square, a grid that does not fit, and what `mita_ext.attention` raises.
        TypeError: in forward attn_mask, is_causal, attn_drop in training, and what `mita_ext.attention` raises.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] | None = None,
        device=None,
        dtype=None,
        *,
        num_landmarks: int | tuple[int, int] = (5, 5),
        topk: int = 25,
        routes: int = 1,
        shared_expert: bool = True,
        num_prefix_tokens: int = 1,
        grid_size: tuple[int, int] | None = None,
        dwc: bool = False,
        gate: bool = False,
    ):
        super().__init__()
        if attn_head_dim is None and dim % num_heads != 0:
            raise ValueError(f"{_NAME}: dim must be a multiple of num_heads, got {dim} and {num_heads}")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError(f"{_NAME}: norm_layer must be given where qk_norm or scale_norm is, got None")
        if gated and gate:
            raise ValueError(f"{_NAME}: gated (sigmoid) and gate (silu) must not be given together")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads if attn_head_dim is None else attn_head_dim
        self.attn_dim = num_heads * self.head_dim
        self.scale = self.head_dim**-0.5
        self.num_landmarks, self.topk, self.routes, self.shared_expert = num_landmarks, topk, routes, shared_expert
        self.num_prefix_tokens, self.grid_size = num_prefix_tokens, grid_size

        self.qkv = nn.Linear(dim, self.attn_dim * 3, bias=qkv_bias, **dd)
        self.q_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.dwc = nn.Conv2d(self.attn_dim, self.attn_dim, 3, padding=1, groups=self.attn_dim, **dd) if dwc else None
        self.norm = norm_layer(self.attn_dim, **dd) if scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, self.attn_dim, bias=qkv_bias, **dd) if gated or gate else None
        self.gate_activation = F.silu if gate else F.sigmoid
        self.proj = nn.Linear(self.attn_dim, dim_out or dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        asked = {
            "attn_mask": attn_mask is not None,
            "is_causal": is_causal,
            "attn_drop": self.training and self.attn_drop.p > 0,
        }
        _refuse(_NAME, [name for name in asked if asked[name]], _REFUSED_HERE)
        if x.dim() != 3:
            raise ValueError(f"{_NAME}: x must have 3 dimensions, got {x.dim()} (shape {list(x.shape)})")
        B, N, _ = x.shape
        q, k, v = self._heads(x)
        out = attention(q, k, v, **self.pooling(N), **self._options()).transpose(1, 2).reshape(B, N, self.attn_dim)
        if self.dwc is not None:
            out = out + self._convolved(v.transpose(1, 2).reshape(B, N, self.attn_dim))
        out = self.norm(out)
        if self.gate is not None:
            out = out * self.gate_activation(self.gate(x))
        return self.proj_drop(self.proj(out))

    def look(self, x: Tensor) -> MiTAAux:
        """What attention decides for x [B, N, dim]: experts, keys, landmarks, for `mita_ext.viz` or for counting."""
        return attention(*self._heads(x), **self.pooling(x.shape[1]), **self._options(), return_aux=True)[1]

    def pooling(self, N: int) -> dict:
        """The options of `mita_ext.attention` that pool N tokens: num_landmarks and, for an image, grid, num_prefix_tokens."""
        return pooling_of(_NAME, N, self.num_landmarks, self.num_prefix_tokens, self.grid_size)

    def _options(self):
        return {"topk": self.topk, "routes": self.routes, "shared_expert": self.shared_expert, "scale": self.scale}

    def _heads(self, x):
        """Query, key, value [B, H, N, D]."""
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def _convolved(self, v):
        """dwc of values [B, N, attn_dim] on the image, zero at all other tokens."""
        N, before = v.shape[1], self.num_prefix_tokens
        gh, gw = grid_of(_NAME, N, before, self.grid_size)
        image = v[:, before : before + gh * gw].unflatten(1, (gh, gw)).permute(0, 3, 1, 2)
        return F.pad(self.dwc(image).flatten(2).mT, (0, 0, before, N - before - gh * gw))

    def extra_repr(self):
        names = ("num_heads", "num_landmarks", "topk", "routes", "shared_expert", "num_prefix_tokens", "grid_size")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def pooling_of(fn, N, num_landmarks, num_prefix_tokens, grid_size):
    """The options of `mita_ext.attention` that pool N tokens, some of them an image where num_landmarks is a pair."""
    if not isinstance(num_landmarks, tuple | list):
        return {"num_landmarks": num_landmarks}
    grid = grid_of(fn, N, num_prefix_tokens, grid_size)
    return {"num_landmarks": num_landmarks, "grid": grid, "num_prefix_tokens": num_prefix_tokens}


def grid_of(fn, N, num_prefix_tokens, grid_size):
    """The image in N tokens: (gh, gw) as given, or the square that all tokens after the prefix fill."""
    tokens = N - num_prefix_tokens
    if grid_size is None:
        side = int(max(tokens, 0) ** 0.5)  # exact for all squares below 2^52, and unlike isqrt known to torch.compile
        if tokens < 1 or side * side != tokens:
            raise ValueError(
                f"{fn}: {tokens} tokens after num_prefix_tokens={num_prefix_tokens} are no square image; give grid_size,"
                " the right num_prefix_tokens, or a number as num_landmarks"
            )
        return side, side
    gh, gw = grid_size
    if gh * gw > tokens:
        raise ValueError(f"{fn}: grid_size must fit into the {tokens} tokens after the prefix, got {tuple(grid_size)}")
    return gh, gw


def from_authors(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a model that was trained with the authors' code, with the keys of `MiTAAttention`.

    Their qkv, proj and dwc [attn_dim, 1, 3, 3] are named and shaped as here. Their qkvg, weight [4 attn_dim, dim] and bias
    [4 attn_dim], becomes qkv and, from its last quarter, gate. All other keys, of any module around, stay as they are.

    Their code pools all tokens but the last one as a square image, the class token as its first pixel:
    `MiTAAttention(..., num_prefix_tokens=0, grid_size=(gh, gw))`. Their kv_topk counts in one direction: 5 is topk=25.

    Raises:
        ValueError: norms of queries, before which their code pools and this module after; a qkvg that is not a multiple
            of 4 long.
    """
    renamed = {}
    for key, x in state_dict.items():
        *path, module, parameter = key.rsplit(".", 2) if "." in key else ("", key)
        if module == "q_norm":
            raise ValueError(f"mita_ext.nn.from_authors: {key}: the authors' code pools queries before their norm")
        if module != "qkvg":
            renamed[key] = x
            continue
        if x.shape[0] % 4 != 0:
            raise ValueError(f"mita_ext.nn.from_authors: {key} must be a multiple of 4 long, got {x.shape[0]}")
        *qkv, gate = x.chunk(4)
        renamed[".".join([*path, "qkv", parameter])] = x[: -len(gate)]
        renamed[".".join([*path, "gate", parameter])] = gate
    return renamed
