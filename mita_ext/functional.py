"""The public functions. Here defaults are resolved and options are checked; tensors are checked by the ops themselves
(csrc/checks.h), so that every backend raises the same errors, before anything is launched.

Shapes: query [B, H, N, D]; key, value [B, Hkv, L, D] with H a multiple of Hkv; M landmarks, K keys per expert, s experts
per query. Sequences of different lengths are padded on the right, or packed: [total, heads, D]. Source: MiTA attention,
arXiv 2602.01219.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops

_REFUSED = {
    "is_causal": "every query may attend to every key",
    "attn_mask": "experts are chosen among all keys",
    "attn_bias": "experts are chosen among all keys",
    "dropout_p": "there is no dropout on the attention weights",
    "enable_gqa": "grouped-query heads are recognised by their shapes",
}
_REFUSED_PACKED = dict.fromkeys(("grid", "num_prefix_tokens"), "sequences of different lengths are pooled in one dimension")
_LARGEST = torch.finfo(torch.float32).max


class MiTAAux(NamedTuple):
    """What `attention` decided, for inspection. Only `lse` carries gradients."""

    lse: Tensor  # [B, H, N], natural log; float32 (float64 for float64 inputs); -inf at padding
    landmarks: Tensor  # [B, H, M, D]
    topk_indices: Tensor  # [B, H, M, K] int32, each row a set in ascending order; -1 where there is no key
    experts: Tensor  # [B, H, N, s] int32, best first; -1 at padding
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
    seqlens_q: Tensor | None = None,
    seqlens_k: Tensor | None = None,
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
        seqlens_q, seqlens_k: int32 [B], device of query, 0 to N and 0 to L: how many tokens of each sequence there are; what
            is behind them is padding, of any value. All by default, each on its own: self-attention gives the same one twice.

    Returns:
        out [B, H, N, D], contiguous, in the dtype of query; with return_aux also a `MiTAAux`.

    Selections are constants; query, key, value, landmarks and aux.lse are differentiable, once. Ties go to the lower
    index and NaN scores come last, so selections never depend on timing. A last dimension that is not contiguous is
    copied, as are on CUDA rows that do not start on 16 bytes; all other strides are read as they are.

    With lengths every sequence is attended as if it were alone: windows follow its own length (no grid then, as whether
    every sequence holds it cannot be seen without stalling the device), and padding takes no part. Padding of out and of
    all gradients is zero, of aux.lse -inf and of aux.experts -1. Without tokens landmarks are zeros, and without keys
    compressed values are zeros and indices -1: never NaN. Lengths out of range are a ValueError on the CPU; on CUDA,
    where looking would stall the device, they are clamped.

    Raises:
        TypeError: not a tensor, a wrong dtype, an option of the wrong type, or an option this mechanism does not define.
        ValueError: a shape, device or range that does not fit; landmarks together with num_landmarks; grid and pair
            apart; grid together with seqlens_q; routes=0 without shared_expert.
    """
    fn = "mita_ext.attention"
    _refuse(fn, unsupported, _REFUSED)
    query, key, value = _tensors(fn, query=query, key=key, value=value)
    lengths = _lengths(fn, "seqlens_q", seqlens_q, query, grid), _lengths(fn, "seqlens_k", seqlens_k, query), None, None
    pooling = (num_landmarks, grid, num_prefix_tokens)
    options = (topk, routes, shared_expert, scale, landmark_scale, return_aux)
    return _attend(fn, query, key, value, landmarks, lengths, pooling, *options)


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    landmarks: Tensor | None = None,
    num_landmarks: int | None = None,
    topk: int = 64,
    routes: int = 1,
    shared_expert: bool = True,
    scale: float | None = None,
    landmark_scale: float | None = None,
    return_aux: bool = False,
    **unsupported,
) -> Tensor | tuple[Tensor, MiTAAux]:
    """`attention` of B sequences that are packed one after the other, without padding.

    Args:
        query: [total_q, H, D]; key, value: [total_k, Hkv, D]; dtypes, devices and strides as in `attention`.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], device of query, ascending: sequence b has the tokens cu_seqlens[b] to
            cu_seqlens[b + 1]. Tokens of no sequence take no part, and are zero in out and in gradients.
        max_seqlen_q, max_seqlen_k: no sequence is longer; an upper bound will do, but memory and time grow with it.
        landmarks: [B, H, M, D]. num_landmarks: an int. All other options as in `attention`.

    Returns:
        out [total_q, H, D], contiguous; with return_aux also the `MiTAAux` of the padded batch: lse [B, H, max_seqlen_q],
        experts [B, H, max_seqlen_q, s], and topk_indices that count from the first key of their own sequence.

    Every sequence is attended as if it were alone, as with `seqlens_q` and `seqlens_k` in `attention`; nothing here waits for
    the device. Numbers in cu_seqlens that are out of range, descend, or exceed max_seqlen are a ValueError on the CPU; on
    CUDA they are clamped, and sequences cut off. Raises as `attention` does.
    """
    fn = "mita_ext.attention_varlen"
    _refuse(fn, unsupported, _REFUSED | _REFUSED_PACKED)
    query, key, value = _tensors(fn, 3, query=query, key=key, value=value)
    lengths = []
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if x is None:
            raise TypeError(f"{fn}: {name} must be a torch.Tensor, got NoneType")
        lengths.append(_lengths(fn, name, x, query))
    for name, x in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        _at_least(fn, name, _integer(fn, name, x), 0)
        lengths.append(max(x, 1))
    if num_landmarks is not None:
        _integer(fn, "num_landmarks", num_landmarks)
    options = (topk, routes, shared_expert, scale, landmark_scale, return_aux)
    return _attend(fn, query, key, value, landmarks, lengths, (num_landmarks, None, 0), *options)


def _attend(fn, query, key, value, landmarks, lengths, pooling, topk, routes, shared_expert, scale, landmark_scale, return_aux):
    """`attention` and `attention_varlen` from here on. lengths: as the op takes them, four."""
    if landmarks is not None:
        (landmarks,) = _tensors(fn, 4, query, landmarks=landmarks)
    topk, routes = _integer(fn, "topk", topk), _integer(fn, "routes", routes)
    shared_expert, return_aux = _flag(fn, "shared_expert", shared_expert), _flag(fn, "return_aux", return_aux)
    _at_least(fn, "topk", topk, 1)
    _at_least(fn, "routes", routes, 0)
    scale, landmark_scale = _scales(fn, query, scale, landmark_scale)
    num_landmarks, grid, num_prefix_tokens = pooling
    if landmarks is None:
        N = query.shape[2] if lengths[2] is None else lengths[2]
        pooling = _pooling(fn, N, 64 if num_landmarks is None else num_landmarks, grid, num_prefix_tokens)
    else:
        for name, given in (("num_landmarks", num_landmarks), ("grid", grid)):
            if given is not None:
                raise ValueError(f"{fn}: {name} must not be given together with landmarks, got {given}")
        if _integer(fn, "num_prefix_tokens", num_prefix_tokens) != 0:
            raise ValueError(f"{fn}: num_prefix_tokens needs grid, got {num_prefix_tokens}")
        pooling = ([1, 1], [1, 1], 0)
    out, lse, pooled, indices, experts, _, compressed, _ = ops.attention(
        query, key, value, landmarks, *pooling, topk, routes, shared_expert, scale, landmark_scale, *lengths
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
    seqlens: Tensor | None = None,
) -> Tensor:
    """Average pool of queries [B, H, N, D] -> landmarks [B, H, M, D] (step 1), as `attention` does it, bit for bit.

    Window i of M covers tokens floor(i N / M) to ceil((i + 1) N / M): torch's adaptive pooling. With num_landmarks =
    (mh, mw) the image `grid` that starts at token `num_prefix_tokens` is pooled in both directions; other tokens take no
    part. Sums are at least float32, rounded once. Differentiable. With `seqlens` int32 [B] windows follow the length of
    each sequence (no grid then), as with `seqlens_q` in `attention`. Raises as `attention` does.
    """
    fn = "mita_ext.pool_landmarks"
    (query,) = _tensors(fn, query=query)
    seqlens = _lengths(fn, "seqlens", seqlens, query, grid)
    return ops.pool(query, *_pooling(fn, query.shape[2], num_landmarks, grid, num_prefix_tokens), seqlens)


def landmark_topk(
    landmarks: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    topk: int,
    scale: float | None = None,
    seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The experts' keys and the shared expert's values (steps 2 to 4).

    landmarks [B, H, M, D], key and value [B, Hkv, L, D] -> indices int32 [B, H, M, min(topk, L)], ascending in each row;
    compressed = softmax(scale Z k^T) v [B, H, M, D]; its lse [B, H, M], at least float32. compressed and lse are
    differentiable. With `seqlens_k` int32 [B] keys behind a sequence take no part; indices end in -1 where it has fewer
    keys, and where it has none compressed is zero and lse -inf. Raises as `attention` does.
    """
    fn = "mita_ext.landmark_topk"
    landmarks, key, value = _tensors(fn, landmarks=landmarks, key=key, value=value)
    topk = _integer(fn, "topk", topk)
    _at_least(fn, "topk", topk, 1)
    scale, _ = _scales(fn, landmarks, scale, None)
    seqlens_k = _lengths(fn, "seqlens_k", seqlens_k, landmarks, like="landmarks")
    return ops.landmark_topk(landmarks, key, value, topk, scale, seqlens_k)


def route(query: Tensor, landmarks: Tensor, *, routes: int = 1) -> Tensor:
    """The experts of each query (step 5): query [B, H, N, D], landmarks [B, H, M, D] -> int32 [B, H, N, routes], the
    landmarks of largest q[n].Z[m], best first, the lower index on ties. A selection: no gradient. Raises as `attention` does.
    """
    fn = "mita_ext.route"
    query, landmarks = _tensors(fn, query=query, landmarks=landmarks)
    routes = _integer(fn, "routes", routes)
    _at_least(fn, "routes", routes, 0)
    return ops.route(query.detach(), landmarks.detach(), routes)


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
    inputs, and lse, are differentiable; a key that comes twice counts twice. It knows of no lengths: padded keys are no
    matter where no index names them, padded queries are attended like all others. Raises as `attention` does.
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
    return ops.expert_attention(query, key, value, landmarks, compressed, *selection, shared_expert, scale, landmark_scale)


def _refuse(fn, names, reasons):
    for name in names:
        reason = f": {reasons[name]}" if name in reasons else ""
        raise TypeError(f"{fn}: {name} is not an option of this mechanism{reason}")


def _tensors(fn, dims=4, like=None, **tensors):
    """Tensors as the ops take them: `dims` dimensions, one device (that of the first one, or of the query `like`),
    contiguous in the last dimension, cast under autocast (float64 is left alone)."""
    first = next(iter(tensors)) if like is None else "query"
    like = tensors[first] if like is None else like
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{fn}: transforms of torch.func (grad, vmap, jvp and so on) are not supported;"
            " use torch.autograd, and the batch dimension in the place of vmap"
        )
    for name, x in tensors.items():
        _tensor(fn, name, x, first, like)
        if x.dim() != dims:
            raise ValueError(f"{fn}: {name} must have {dims} dimensions, got {x.dim()} (shape {list(x.shape)})")
    tensors, device = tensors.values(), like.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        half = torch.get_autocast_dtype(device)
        tensors = [x.to(half) if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x for x in tensors]
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _tensor(fn, name, x, like_name, like):
    if not isinstance(x, Tensor):
        raise TypeError(f"{fn}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested or x.is_quantized:
        kind = "a nested tensor" if x.is_nested else x.dtype if x.is_quantized else x.layout
        raise TypeError(f"{fn}: {name} must be a dense tensor of numbers, got {kind}")
    if x.device != like.device:  # the dispatcher would take a mixture with meta tensors
        raise ValueError(f"{fn}: {name} must be on the device of {like_name} ({like.device}), got {x.device}")


def _lengths(fn, name, x, query, grid=None, like="query"):
    if x is None:
        return None
    _tensor(fn, name, x, like, query)
    if grid is not None:
        raise ValueError(f"{fn}: grid must not be given together with {name}, got {grid}")
    return x.contiguous()


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
    first, second = x
    return [_integer(fn, f"{name}[0]", first), _integer(fn, f"{name}[1]", second)]


def _scales(fn, query, scale, landmark_scale):
    D = query.shape[-1]
    for name, x in (("scale", scale), ("landmark_scale", landmark_scale)):
        if x is not None and (isinstance(x, bool) or not isinstance(x, int | float | torch.SymFloat)):
            raise TypeError(f"{fn}: {name} must be a float, got {x!r}")
        if x is not None and not abs(x) <= _LARGEST:  # the kernels scale in float32; NaN comes here too
            raise ValueError(f"{fn}: {name} must be finite in float32, got {x!r}")
    scale = max(D, 1) ** -0.5 if scale is None else float(scale)
    return scale, scale * max(D, 1) ** -0.5 if landmark_scale is None else float(landmark_scale)


def _pooling(fn, N, num_landmarks, grid, num_prefix_tokens):
    """The normal form of pooling: ([mh, mw], [gh, gw], num_prefix_tokens). One dimension is a grid of one row of N."""
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
    if N == 0:
        raise ValueError(f"{fn}: query must hold at least 1 token to be pooled, got 0")
    return [1, num_landmarks], [1, N], 0
