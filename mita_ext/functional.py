"""The public functions. Here defaults are resolved and options are checked; tensors are checked by the ops themselves
(csrc/checks.h), so that every backend raises the same errors, before anything is launched.

Shapes: query [B, H, N, D]; key, value [B, Hkv, L, D] with H a multiple of Hkv; M landmarks, K keys per expert, s experts
per query. Source: MiTA attention, arXiv 2602.01219.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import autograd

_REFUSED = {
    "is_causal": "every query may attend to every key",
    "attn_mask": "experts are chosen among all keys",
    "attn_bias": "experts are chosen among all keys",
    "dropout_p": "there is no dropout on the attention weights",
    "enable_gqa": "grouped-query heads are recognised by their shapes",
}
_LARGEST = torch.finfo(torch.float32).max


class MiTAAux(NamedTuple):
    """What `attention` decided, for inspection. Only `lse` carries gradients."""

    lse: Tensor  # [B, H, N], natural log; float32 (float64 for float64 inputs)
    landmarks: Tensor  # [B, H, M, D]
    topk_indices: Tensor  # [B, H, M, K] int32, each row a set in ascending order; -1 where there is no key
    experts: Tensor  # [B, H, N, s] int32, best first
    compressed: Tensor  # [B, H, M, D]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    landmarks: Tensor | None = None,
    num_landmarks: int | tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
    num_prefix_tokens: int = 0,
    topk: int = 64,
    routes: int = 1,
    shared_expert: bool = True,
    scale: float | None = None,
    landmark_scale: float | None = None,
    return_aux: bool = False,
    **unsupported,
) -> Tensor | tuple[Tensor, MiTAAux]:
    """MiTA attention: one softmax over M compressed units and the `topk` keys of each routed expert.

        Z = landmarks, or the average pool of query        S = Z k^T
        T[m] = the topk keys of largest S[m]               C = softmax(scale S) v
        r[n] = the `routes` landmarks of largest q[n].Z[m]
        out[n] = softmax([landmark_scale q[n].Z[m] for all m] ++ [scale q[n].k[j] for e in r[n], j in T[e]])
                 . ([C[m]] ++ [v[j]])

    Args:
        query: [B, H, N, D], float64 (CPU only), float32, float16 or bfloat16.
        key, value: [B, Hkv, L, D], dtype and device of query; head h reads key head h // (H / Hkv).
        landmarks: [B, H, M, D], dtype and device of query. Without them query is pooled.
        num_landmarks: M (64 by default), or a pair (mh, mw) with `grid`; not together with landmarks.
        grid: (gh, gw) of an image that starts at token `num_prefix_tokens`, row major; needs a pair as num_landmarks.
        topk: keys per expert, 1 to 2048, clamped to L.
        routes: experts per query, 0 to min(M, 8). 0 leaves the compressed units only and needs shared_expert.
        shared_expert: whether the M compressed units take part.
        scale: D ** -0.5 by default.
        landmark_scale: scale * D ** -0.5 by default, as in the authors' code; pass `scale` for the plain form.

    Returns:
        out [B, H, N, D], contiguous, in the dtype of query; with return_aux also a `MiTAAux`.

    Selections are constants; query, key, value, landmarks and aux.lse are differentiable, once. Ties go to the lower
    index and NaN scores come last, so selections never depend on timing. A last dimension that is not contiguous is
    copied, as are on CUDA rows that do not start on 16 bytes; all other strides are read as they are.

    Raises:
        TypeError: not a tensor, a wrong dtype, an option of the wrong type, or an option this mechanism does not define.
        ValueError: a shape, device or range that does not fit; landmarks together with num_landmarks; grid and pair
            apart; routes=0 without shared_expert.
    """
    fn = "mita_ext.attention"
    for name in unsupported:
        reason = f": {_REFUSED[name]}" if name in _REFUSED else ""
        raise TypeError(f"{fn}: {name} is not an option of this mechanism{reason}")
    query, key, value = _tensors(fn, query=query, key=key, value=value)
    if landmarks is not None:
        query, landmarks = _tensors(fn, query=query, landmarks=landmarks)
    topk, routes = _integer(fn, "topk", topk), _integer(fn, "routes", routes)
    shared_expert, return_aux = _flag(fn, "shared_expert", shared_expert), _flag(fn, "return_aux", return_aux)
    _at_least(fn, "topk", topk, 1)
    _at_least(fn, "routes", routes, 0)
    scale, landmark_scale = _scales(fn, query, scale, landmark_scale)
    if landmarks is None:
        pooling = _pooling(fn, query, 64 if num_landmarks is None else num_landmarks, grid, num_prefix_tokens)
    else:
        for name, given in (("num_landmarks", num_landmarks), ("grid", grid)):
            if given is not None:
                raise ValueError(f"{fn}: {name} must not be given together with landmarks, got {given}")
        if _integer(fn, "num_prefix_tokens", num_prefix_tokens) != 0:
            raise ValueError(f"{fn}: num_prefix_tokens needs grid, got {num_prefix_tokens}")
        pooling = ([1, 1], [1, 1], 0)
    out, lse, pooled, indices, experts, compressed, _ = autograd.Attention.apply(
        query, key, value, landmarks, *pooling, topk, routes, shared_expert, scale, landmark_scale
    )
    if not return_aux:
        return out
    return out, MiTAAux(lse, pooled if landmarks is None else landmarks, indices, experts, compressed)


def pool_landmarks(
    query: Tensor,
    num_landmarks: int | tuple[int, int],
    *,
    grid: tuple[int, int] | None = None,
    num_prefix_tokens: int = 0,
) -> Tensor:
    """Average pool of queries [B, H, N, D] -> landmarks [B, H, M, D] (step 1), as `attention` does it, bit for bit.

    Window i of M covers tokens floor(i N / M) to ceil((i + 1) N / M): torch's adaptive pooling. With num_landmarks =
    (mh, mw) the image `grid` that starts at token `num_prefix_tokens` is pooled in both directions; other tokens take no
    part. Sums are at least float32, rounded once. Differentiable. Raises as `attention` does.
    """
    fn = "mita_ext.pool_landmarks"
    (query,) = _tensors(fn, query=query)
    return autograd.Pool.apply(query, *_pooling(fn, query, num_landmarks, grid, num_prefix_tokens))


def landmark_topk(
    landmarks: Tensor, key: Tensor, value: Tensor, *, topk: int, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The experts' keys and the shared expert's values (steps 2 to 4).

    landmarks [B, H, M, D], key and value [B, Hkv, L, D] -> indices int32 [B, H, M, min(topk, L)], ascending in each row;
    compressed = softmax(scale Z k^T) v [B, H, M, D]; its lse [B, H, M], at least float32. compressed and lse are
    differentiable. Raises as `attention` does.
    """
    fn = "mita_ext.landmark_topk"
    landmarks, key, value = _tensors(fn, landmarks=landmarks, key=key, value=value)
    topk = _integer(fn, "topk", topk)
    _at_least(fn, "topk", topk, 1)
    scale, _ = _scales(fn, landmarks, scale, None)
    return autograd.LandmarkTopk.apply(landmarks, key, value, topk, scale)


def route(query: Tensor, landmarks: Tensor, *, routes: int = 1) -> Tensor:
    """The experts of each query (step 5): query [B, H, N, D], landmarks [B, H, M, D] -> int32 [B, H, N, routes], the
    landmarks of largest q[n].Z[m], best first, the lower index on ties. A selection: no gradient. Raises as `attention` does.
    """
    fn = "mita_ext.route"
    query, landmarks = _tensors(fn, query=query, landmarks=landmarks)
    routes = _integer(fn, "routes", routes)
    _at_least(fn, "routes", routes, 0)
    return autograd.ops.route(query.detach(), landmarks.detach(), routes)


def expert_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor,
    compressed: Tensor,
    indices: Tensor,
    experts: Tensor,
    *,
    shared_expert: bool = True,
    scale: float | None = None,
    landmark_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention given a selection (step 6) -> out [B, H, N, D] and lse [B, H, N], at least float32.

    Shapes as in `attention`; compressed [B, H, M, D]; indices int32 [B, H, M, K] in any order, where a value outside
    [0, L) is an empty slot; experts int32 [B, H, N, s] with values in [0, M): a ValueError on the CPU, while on CUDA, where
    looking would stall the device, values are clamped. A query without any unit gets zeros and lse -inf. All float
    inputs, and lse, are differentiable; a key that comes twice counts twice. Raises as `attention` does.
    """
    fn = "mita_ext.expert_attention"
    query, key, value, landmarks, compressed, indices, experts = _tensors(
        fn,
        query=query,
        key=key,
        value=value,
        landmarks=landmarks,
        compressed=compressed,
        indices=indices,
        experts=experts,
    )
    shared_expert = _flag(fn, "shared_expert", shared_expert)
    scale, landmark_scale = _scales(fn, query, scale, landmark_scale)
    if indices.dtype == torch.int32:  # any other dtype is refused by the op
        empty = (indices < 0) | (indices >= key.shape[2])
        indices = indices.masked_fill(empty, torch.iinfo(torch.int32).max).sort(-1).values
    selection = (indices.contiguous(), experts.contiguous())
    return autograd.ExpertAttention.apply(
        query, key, value, landmarks, compressed, *selection, shared_expert, scale, landmark_scale
    )


def _tensors(fn, **tensors):
    """Tensors as the ops take them: 4 dimensions, one device (the dispatcher would take a mixture with meta tensors),
    contiguous in the last dimension, cast under autocast (float64 is left alone)."""
    first = next(iter(tensors))
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{fn}: transforms of torch.func (grad, vmap, jvp and so on) are not supported;"
            " use torch.autograd, and the batch dimension in the place of vmap"
        )
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{fn}: {name} must be a torch.Tensor, got {type(x).__name__}")
        if x.layout != torch.strided or x.is_nested or x.is_quantized:
            kind = "a nested tensor" if x.is_nested else x.dtype if x.is_quantized else x.layout
            raise TypeError(f"{fn}: {name} must be a dense tensor of numbers, got {kind}")
        if x.dim() != 4:
            raise ValueError(f"{fn}: {name} must have 4 dimensions, got {x.dim()} (shape {list(x.shape)})")
        if x.device != tensors[first].device:
            raise ValueError(f"{fn}: {name} must be on the device of {first} ({tensors[first].device}), got {x.device}")
        device = x.device.type
        if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
            if x.dtype in (torch.float32, torch.float16, torch.bfloat16):
                x = x.to(torch.get_autocast_dtype(device))
        tensors[name] = x if x.stride(-1) == 1 else x.contiguous()
    return tensors.values()


def _integer(fn, name, x):
    if isinstance(x, bool) or not isinstance(x, int | torch.SymInt):
        raise TypeError(f"{fn}: {name} must be an int, got {x!r}")
    if isinstance(x, int) and not -(2**63) <= x < 2**63:
        raise ValueError(f"{fn}: {name} must fit in 64 bits, got {x}")
    return x


def _at_least(fn, name, x, low):
    if x < low:
        raise ValueError(f"{fn}: {name} must be at least {low}, got {x}")


def _flag(fn, name, x):
    if not isinstance(x, bool):
        raise TypeError(f"{fn}: {name} must be a bool, got {x!r}")
    return x


def _pair(fn, name, x):
    if not isinstance(x, tuple | list) or len(x) != 2:
        raise TypeError(f"{fn}: {name} must be a pair of ints, got {x!r}")
    return [_integer(fn, f"{name}[{i}]", side) for i, side in enumerate(x)]


def _scales(fn, query, scale, landmark_scale):
    D = query.shape[-1]
    for name, x in (("scale", scale), ("landmark_scale", landmark_scale)):
        if x is not None and (isinstance(x, bool) or not isinstance(x, int | float | torch.SymFloat)):
            raise TypeError(f"{fn}: {name} must be a float, got {x!r}")
        if x is not None and not abs(x) <= _LARGEST:  # the kernels scale in float32; NaN comes here too
            raise ValueError(f"{fn}: {name} must be finite in float32, got {x!r}")
    scale = max(D, 1) ** -0.5 if scale is None else float(scale)
    return scale, scale * max(D, 1) ** -0.5 if landmark_scale is None else float(landmark_scale)


def _pooling(fn, query, num_landmarks, grid, num_prefix_tokens):
    """The normal form of pooling: ([mh, mw], [gh, gw], num_prefix_tokens). One dimension is a grid of one row."""
    _at_least(fn, "num_prefix_tokens", _integer(fn, "num_prefix_tokens", num_prefix_tokens), 0)
    if grid is not None:
        grid = _pair(fn, "grid", grid)
        if not isinstance(num_landmarks, tuple | list):
            raise ValueError(f"{fn}: num_landmarks must be a pair (mh, mw) where grid is given, got {num_landmarks!r}")
        return _pair(fn, "num_landmarks", num_landmarks), grid, num_prefix_tokens
    if isinstance(num_landmarks, tuple | list):
        raise ValueError(f"{fn}: grid must be given where num_landmarks is a pair, got num_landmarks={num_landmarks!r}")
    _at_least(fn, "num_landmarks", _integer(fn, "num_landmarks", num_landmarks), 1)
    if num_prefix_tokens != 0:
        raise ValueError(f"{fn}: num_prefix_tokens needs grid, got {num_prefix_tokens}")
    if query.shape[2] == 0:
        raise ValueError(f"{fn}: query must hold at least 1 token to be pooled, got shape {list(query.shape)}")
    return [1, num_landmarks], [1, query.shape[2]], 0
