"""Bad input, argument by argument: the error names the function, the argument, what it got and what it needs."""

import inspect
import math
import re
import warnings
from typing import NamedTuple

import pytest
import torch

import mita_ext


class T(NamedTuple):
    """A tensor of zeros to be made: on the device of the test or on another one ("meta" where that is the name)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    elsewhere: bool | str = False

    def make(self, device):
        other = "meta" if device == "cpu" or self.elsewhere == "meta" else "cpu"
        return torch.zeros(self.shape, dtype=self.dtype, device=other if self.elsewhere else device)


def tensor(*shape, dtype=torch.float32, elsewhere=False):
    return T(shape, dtype, elsewhere)


F64, F16, INT = torch.float64, torch.float16, torch.int32
B, H, HKV, N, L, M, K, S, D = 2, 4, 2, 20, 30, 6, 5, 1, 16
NO_QUERY = tensor(B, H, 0, D)
Q, KV, Z = tensor(B, H, N, D), tensor(B, HKV, L, D), tensor(B, H, M, D)
VALID = {
    "attention": {"query": Q, "key": KV, "value": KV},
    "attention_varlen": {
        **{"query": tensor(N, H, D), "key": tensor(L, HKV, D), "value": tensor(L, HKV, D)},
        **{"cu_seqlens_q": tensor(B + 1, dtype=INT), "cu_seqlens_k": tensor(B + 1, dtype=INT)},
        **{"max_seqlen_q": N, "max_seqlen_k": L},
    },
    "pool_landmarks": {"query": Q, "num_landmarks": M},
    "landmark_topk": {"landmarks": Z, "key": KV, "value": KV, "topk": K},
    "route": {"query": Q, "landmarks": Z},
    "expert_attention": {
        **{"query": Q, "key": KV, "value": KV, "landmarks": Z, "compressed": Z},
        **{"indices": tensor(B, H, M, K, dtype=INT), "experts": tensor(B, H, N, S, dtype=INT)},
    },
}


def call(function, device, **changes):
    arguments = VALID[function] | changes
    return getattr(mita_ext, function)(**{k: x.make(device) if isinstance(x, T) else x for k, x in arguments.items()})


@pytest.mark.parametrize("function", VALID)
def test_the_valid_call_is_valid(function, device):
    call(function, device)


with warnings.catch_warnings():  # a prototype, says torch
    warnings.simplefilter("ignore")
    NESTED = torch.nested.nested_tensor([torch.zeros(H, N, D)] * B)

BAD = []  # function, error, message, changes to the valid call
TYPE, VALUE = TypeError, ValueError


def bad(functions, error, message, **changes):
    """The message comes after "mita_ext.function: "; "..." stands for anything."""
    BAD.extend((function, error, message, changes) for function in functions.split())


ALL_Q = "attention pool_landmarks route expert_attention"
ALL_KV = "attention landmark_topk expert_attention"

# tensors: type, dtype, dimensions, sizes, device
bad(ALL_Q, TYPE, "query must be a torch.Tensor, got list", query=[1.0])
bad(ALL_Q, TYPE, "query must be float64, float32, float16 or bfloat16, got torch.int32", query=tensor(B, H, N, D, dtype=INT))
bad(ALL_Q, TYPE, "query must be ... got torch.complex64", query=tensor(B, H, N, D, dtype=torch.complex64))
bad(ALL_Q, VALUE, "query must have 4 dimensions, got 3 (shape [2, 20, 16])", query=tensor(B, N, D))
bad(ALL_Q, VALUE, "query must have at least 1 head and head dimension 1, got shape [2, 4, 20, 0]", query=tensor(B, H, N, 0))
bad(ALL_Q, VALUE, "query must have at least 1 head and head dimension 1, got shape [2, 0, 20, 16]", query=tensor(B, 0, N, D))

bad(ALL_Q, TYPE, "query must be ... got torch.bool", query=tensor(B, H, N, D, dtype=torch.bool))
bad(ALL_Q, TYPE, "query must be ... got torch.float8_e4m3fn", query=tensor(B, H, N, D, dtype=torch.float8_e4m3fn))
bad(ALL_Q, VALUE, "query must have 4 dimensions, got 0 (shape [])", query=tensor())
bad(ALL_Q, VALUE, "query must have 4 dimensions, got 5 (shape [1, 2, 4, 20, 16])", query=tensor(1, B, H, N, D))
bad(ALL_Q, TYPE, "query must be a dense tensor of numbers, got torch.sparse_coo", query=torch.zeros(B, H, N, D).to_sparse())
bad(ALL_Q, TYPE, "query must be a dense tensor of numbers, got torch._mkldnn", query=torch.zeros(B, H, N, D).to_mkldnn())
bad(ALL_Q, TYPE, "query must be a dense tensor of numbers, got a nested tensor", query=NESTED)

bad(ALL_KV, TYPE, "key must be a torch.Tensor, got NoneType", key=None)
bad(ALL_KV, TYPE, "key must be a dense tensor of numbers, got torch.sparse_coo", key=torch.zeros(L, D).to_sparse())
bad(ALL_KV, TYPE, "key must be torch.float32, the dtype of ..., got torch.int64", key=tensor(B, HKV, L, D, dtype=torch.int64))
bad(ALL_KV, VALUE, "the heads of ... (4) must be a multiple of the heads of key, got 0", key=tensor(B, 0, L, D))
bad(ALL_KV, VALUE, "key must be on the device of ..., got meta", key=tensor(B, HKV, L, D, elsewhere="meta"))
bad(ALL_KV, TYPE, "key must be torch.float32, the dtype of ..., got torch.float64", key=tensor(B, HKV, L, D, dtype=F64))
bad(ALL_KV, VALUE, "key must have 4 dimensions, got 3 (shape [2, 30, 16])", key=tensor(B, L, D))
bad(ALL_KV, VALUE, "key must have the batch size of ... (2), got 3", key=tensor(3, HKV, L, D))
bad(ALL_KV, VALUE, "key must have the head dimension of ... (16), got 8", key=tensor(B, HKV, L, 8))
bad(ALL_KV, VALUE, "the heads of ... (4) must be a multiple of the heads of key, got 3", key=tensor(B, 3, L, D))
bad(ALL_KV, VALUE, "the heads of ... (4) must be a multiple of the heads of key, got 8", key=tensor(B, 8, L, D))
bad(ALL_KV, VALUE, "key must hold at least 1 token, got shape [2, 2, 0, 16]", key=tensor(B, HKV, 0, D))
bad(ALL_KV, VALUE, "key must be on the device of ...", key=tensor(B, HKV, L, D, elsewhere=True))

bad(ALL_KV, TYPE, "value must be a torch.Tensor, got int", value=1)
bad(ALL_KV, TYPE, "value must be torch.float32, the dtype of ..., got torch.float16", value=tensor(B, HKV, L, D, dtype=F16))
bad(
    ALL_KV,
    VALUE,
    "value must have the shape of key [B, Hkv, L, D] = [2, 2, 30, 16], got [2, 2, 29, 16]",
    value=tensor(B, HKV, 29, D),
)
bad(ALL_KV, VALUE, "value must have the shape of key ..., got [2, 4, 30, 16]", value=tensor(B, H, L, D))
bad(ALL_KV, VALUE, "value must have the shape of key ..., got [2, 2, 30, 8]", value=tensor(B, HKV, L, 8))
bad(ALL_KV, VALUE, "value must be on the device of ...", value=tensor(B, HKV, L, D, elsewhere=True))

GIVEN = "attention route expert_attention"
bad(f"{GIVEN} landmark_topk", TYPE, "landmarks must be a torch.Tensor, got str", landmarks="mean")
bad(
    GIVEN,
    TYPE,
    "landmarks must be torch.float32, the dtype of query, got torch.float64",
    landmarks=tensor(B, H, M, D, dtype=F64),
)
bad(f"{GIVEN} landmark_topk", VALUE, "landmarks must have 4 dimensions, got 3 (shape [2, 6, 16])", landmarks=tensor(B, M, D))
bad(GIVEN, VALUE, "landmarks must have the shape [B, H, M, D] = [2, 4, M, 16], got [1, 4, 6, 16]", landmarks=tensor(1, H, M, D))
bad(GIVEN, VALUE, "landmarks must have the shape ..., got [2, 2, 6, 16]", landmarks=tensor(B, HKV, M, D))
bad(GIVEN, VALUE, "landmarks must have the shape ..., got [2, 4, 6, 8]", landmarks=tensor(B, H, M, 8))
bad(GIVEN, VALUE, "landmarks must be on the device of query (...), got ...", landmarks=tensor(B, H, M, D, elsewhere=True))
bad(f"{GIVEN} landmark_topk", VALUE, "the number of landmarks must be at least 1, got 0", landmarks=tensor(B, H, 0, D))
bad(f"{GIVEN} landmark_topk", VALUE, "the number of landmarks must be at most 1024, got 1025", landmarks=tensor(B, H, 1025, D))
bad(
    "landmark_topk",
    TYPE,
    "landmarks must be float64, float32, float16 or bfloat16, got torch.int32",
    landmarks=tensor(B, H, M, D, dtype=INT),
)

ONLY = "expert_attention"
bad(ONLY, TYPE, "compressed must be a torch.Tensor, got NoneType", compressed=None)
bad(
    ONLY,
    TYPE,
    "compressed must be torch.float32, the dtype of query, got torch.float16",
    compressed=tensor(B, H, M, D, dtype=F16),
)
bad(
    ONLY, VALUE, "compressed must have the shape [B, H, M, D] = [2, 4, 6, 16], got [2, 4, 5, 16]", compressed=tensor(B, H, 5, D)
)
bad(ONLY, VALUE, "compressed must be on the device of query (...), got ...", compressed=tensor(B, H, M, D, elsewhere=True))
bad(ONLY, TYPE, "indices must be a torch.Tensor, got list", indices=[[0]])
bad(ONLY, TYPE, "indices must be torch.int32, got torch.int64", indices=tensor(B, H, M, K, dtype=torch.int64))
bad(ONLY, VALUE, "indices must have 4 dimensions, got 3 (shape [2, 6, 5])", indices=tensor(B, M, K, dtype=INT))
bad(
    ONLY,
    VALUE,
    "indices must have the shape [B, H, M, K] = [2, 4, 6, 5], got [2, 2, 6, 5]",
    indices=tensor(B, HKV, M, K, dtype=INT),
)
bad(ONLY, VALUE, "indices... must be at least 1, got 0", indices=tensor(B, H, M, 0, dtype=INT))
bad(ONLY, VALUE, "indices... must be at most 2048, got 2049", indices=tensor(B, H, M, 2049, dtype=INT))
bad(ONLY, VALUE, "indices must be on the device of query (...), got ...", indices=tensor(B, H, M, K, dtype=INT, elsewhere=True))
bad(ONLY, TYPE, "experts must be a torch.Tensor, got int", experts=0)
bad(ONLY, TYPE, "experts must be torch.int32, got torch.float32", experts=tensor(B, H, N, S))
bad(ONLY, VALUE, "experts must have 4 dimensions, got 3 (shape [2, 4, 20])", experts=tensor(B, H, N, dtype=INT))
bad(
    ONLY,
    VALUE,
    "experts must have the shape [B, H, N, s] = [2, 4, 20, 1], got [2, 4, 19, 1]",
    experts=tensor(B, H, 19, S, dtype=INT),
)
bad(ONLY, TYPE, "indices must be torch.int32, got torch.bool", indices=tensor(B, H, M, K, dtype=torch.bool))
bad(ONLY, TYPE, "indices must be torch.int32, got torch.float32", indices=tensor(B, H, M, K))
bad(ONLY, VALUE, "indices must be on the device of ..., got meta", indices=tensor(B, H, M, K, dtype=INT, elsewhere="meta"))
bad(ONLY, TYPE, "experts must be torch.int32, got torch.int64", experts=tensor(B, H, N, S, dtype=torch.int64))
bad(ONLY, TYPE, "experts must be torch.int32, got torch.uint8", experts=tensor(B, H, N, S, dtype=torch.uint8))
bad(ONLY, VALUE, "experts must have the shape ..., got [2, 4, 20, 1]", experts=tensor(B, H, N, S, dtype=INT), query=NO_QUERY)
bad(ONLY, VALUE, "routes must be at most 6, got 7", experts=tensor(B, H, N, 7, dtype=INT))
bad(ONLY, VALUE, "experts must be on the device of query (...), got ...", experts=tensor(B, H, N, S, dtype=INT, elsewhere=True))
bad(ONLY, VALUE, "routes=0 needs shared_expert=True, got False", experts=tensor(B, H, N, 0, dtype=INT), shared_expert=False)

# pooling
POOLING = "attention pool_landmarks"
bad(POOLING, VALUE, "num_landmarks must be at least 1, got 0", num_landmarks=0)
bad(POOLING, VALUE, "num_landmarks must be at least 1, got -2", num_landmarks=-2)
bad(POOLING, VALUE, "num_landmarks must be at most 1024 in all, got [1, 1025]", num_landmarks=1025)
bad(POOLING, TYPE, "num_landmarks must be an int, got 4.0", num_landmarks=4.0)
bad(POOLING, TYPE, "num_landmarks must be an int, got '25'", num_landmarks="25")
bad(POOLING, TYPE, "num_landmarks must be a pair of ints, got (1, 2, 3)", num_landmarks=(1, 2, 3), grid=(4, 5))
bad(POOLING, VALUE, "num_landmarks must be at least 1 in each direction, got [0, 2]", num_landmarks=(0, 2), grid=(4, 5))
bad(POOLING, VALUE, "num_landmarks must be at most 1024 in all, got [32, 33]", num_landmarks=(32, 33), grid=(4, 5))
bad(POOLING, VALUE, "grid must be given where num_landmarks is a pair, got num_landmarks=(2, 3)", num_landmarks=(2, 3))
bad(POOLING, VALUE, "num_landmarks must be a pair (mh, mw) where grid is given, got 6", num_landmarks=6, grid=(4, 5))
bad(POOLING, TYPE, "grid must be a pair of ints, got 4", num_landmarks=(2, 3), grid=4)
bad(POOLING, TYPE, "grid[0] must be an int, got 4.0", num_landmarks=(2, 3), grid=(4.0, 5))
bad(POOLING, TYPE, "grid must be a pair of ints, got (4, 5, 1)", num_landmarks=(2, 3), grid=(4, 5, 1))
bad(POOLING, VALUE, "grid must hold at least 1 token in each direction, got [0, 5]", num_landmarks=(2, 3), grid=(0, 5))
bad(
    POOLING,
    VALUE,
    "grid [4, 5] after 1 prefix tokens must lie within the 20 tokens of query",
    **{"num_landmarks": (2, 3), "grid": (4, 5), "num_prefix_tokens": 1},
)
bad(POOLING, VALUE, "grid ... must lie within the 20 tokens", num_landmarks=(2, 3), grid=(2**40, 2**40))
bad(POOLING, VALUE, "num_prefix_tokens must be at least 0, got -1", num_landmarks=(2, 3), grid=(4, 4), num_prefix_tokens=-1)
bad(POOLING, TYPE, "num_prefix_tokens must be an int, got 1.0", num_landmarks=(2, 3), grid=(4, 4), num_prefix_tokens=1.0)
bad(POOLING, VALUE, "num_prefix_tokens needs grid, got 1", num_landmarks=6, num_prefix_tokens=1)
bad("pool_landmarks", TYPE, "num_landmarks must be an int, got None", num_landmarks=None)
bad("attention", VALUE, "num_landmarks must not be given together with landmarks, got 6", landmarks=Z, num_landmarks=6)
bad("attention", VALUE, "grid must not be given together with landmarks, got (4, 5)", landmarks=Z, grid=(4, 5))
bad("attention", VALUE, "num_prefix_tokens needs grid, got 1", landmarks=Z, num_prefix_tokens=1)

bad("attention", VALUE, "grid must be given where num_landmarks is a pair", num_landmarks=(32, 32))
bad(POOLING, TYPE, "num_landmarks must be an int, got True", num_landmarks=True)
bad(POOLING, TYPE, "num_landmarks[1] must be an int, got (2, 3)", num_landmarks=(2, (2, 3)), grid=(4, 5))
bad(POOLING, TYPE, "grid[1] must be an int, got None", num_landmarks=(2, 3), grid=(4, None))
bad(POOLING, VALUE, "grid must hold at least 1 token in each direction, got [4, -5]", num_landmarks=(2, 3), grid=(4, -5))
bad(POOLING, VALUE, "query must hold at least 1 token to be pooled, got 0", num_landmarks=3, query=NO_QUERY)
bad(POOLING, VALUE, "grid [4, 5] after 0 prefix tokens ... 0 tokens", num_landmarks=(2, 3), grid=(4, 5), query=NO_QUERY)

# integers of any size
HUGE = 2**63
bad(POOLING, VALUE, f"num_landmarks must fit in 64 bits, got {HUGE}", num_landmarks=HUGE)
bad(POOLING, VALUE, f"num_landmarks must be at most 1024 in all, got [1, {HUGE - 1}]", num_landmarks=HUGE - 1)
bad(POOLING, VALUE, f"num_landmarks[0] must fit in 64 bits, got {HUGE}", num_landmarks=(HUGE, 1), grid=(4, 5))
bad(POOLING, VALUE, f"grid[1] must fit in 64 bits, got {-HUGE - 1}", num_landmarks=(2, 3), grid=(4, -HUGE - 1))
bad(
    POOLING,
    VALUE,
    f"num_prefix_tokens must fit in 64 bits, got {10**30}",
    **{"num_landmarks": (2, 3), "grid": (4, 4), "num_prefix_tokens": 10**30},
)
bad("attention landmark_topk", VALUE, f"topk must fit in 64 bits, got {HUGE}", topk=HUGE)
bad("attention landmark_topk", VALUE, f"topk must be at most 2048, got {2**31}", topk=2**31)
bad("attention landmark_topk", VALUE, f"topk must be at most 2048, got {2**32 + 1}", topk=2**32 + 1)
bad("attention route", VALUE, f"routes must fit in 64 bits, got {10**30}", routes=10**30)
bad("attention route", VALUE, f"routes must be at most ..., got {2**32}", routes=2**32)

# lengths
PADDED = (("attention", "seqlens_q"), ("attention", "seqlens_k"), ("pool_landmarks", "seqlens"), ("landmark_topk", "seqlens_k"))
for function, name in PADDED:
    bad(function, TYPE, f"{name} must be a torch.Tensor, got list", **{name: [20, 20]})
    bad(function, TYPE, f"{name} must be torch.int32, got torch.int64", **{name: tensor(B, dtype=torch.int64)})
    bad(function, VALUE, f"{name} must have the shape [B] = [2], got [3]", **{name: tensor(B + 1, dtype=INT)})
    bad(function, VALUE, f"{name} must have the shape [B] = [2], got [2, 1]", **{name: tensor(B, 1, dtype=INT)})
    bad(function, VALUE, f"{name} must be on the device of ...", **{name: tensor(B, dtype=INT, elsewhere=True)})
GRID = {"grid": (4, 5), "num_landmarks": (2, 3)}
bad("attention", VALUE, "grid must not be given together with seqlens_q, got (4, 5)", seqlens_q=tensor(B, dtype=INT), **GRID)
bad("pool_landmarks", VALUE, "grid must not be given together with seqlens, got (4, 5)", seqlens=tensor(B, dtype=INT), **GRID)

VARLEN = "attention_varlen"
bad(VARLEN, TYPE, "query must be a torch.Tensor, got NoneType", query=None)
bad(VARLEN, VALUE, "query must have 3 dimensions, got 4 (shape [2, 4, 20, 16])", query=Q)
bad(VARLEN, VALUE, "query must have at least 1 head and head dimension 1, got shape [20, 0, 16]", query=tensor(N, 0, D))
bad(VARLEN, TYPE, "query must be float64, float32, float16 or bfloat16, got torch.int32", query=tensor(N, H, D, dtype=INT))
bad(VARLEN, VALUE, "key must have 3 dimensions, got 4 (shape [2, 2, 30, 16])", key=KV)
bad(VARLEN, VALUE, "key must have the head dimension of query (16), got 8", key=tensor(L, HKV, 8))
bad(VARLEN, VALUE, "the heads of query (4) must be a multiple of the heads of key, got 3", key=tensor(L, 3, D))
bad(VARLEN, TYPE, "value must be torch.float32, the dtype of query, got torch.float16", value=tensor(L, HKV, D, dtype=F16))
bad(
    VARLEN,
    VALUE,
    "value must have the shape of key [total, Hkv, D] = [30, 2, 16], got [29, 2, 16]",
    value=tensor(29, HKV, D),
)
bad(VARLEN, VALUE, "cu_seqlens_q must have the shape [B + 1], got [0]", cu_seqlens_q=tensor(0, dtype=INT))
bad(VARLEN, VALUE, "cu_seqlens_q must have the shape [B + 1], got [3, 1]", cu_seqlens_q=tensor(3, 1, dtype=INT))
bad(VARLEN, VALUE, "cu_seqlens_k must have the shape [B + 1] = [3], got [4]", cu_seqlens_k=tensor(4, dtype=INT))
for name in ("cu_seqlens_q", "cu_seqlens_k"):
    bad(VARLEN, TYPE, f"{name} must be a torch.Tensor, got NoneType", **{name: None})
    bad(VARLEN, TYPE, f"{name} must be torch.int32, got torch.int64", **{name: tensor(B + 1, dtype=torch.int64)})
    bad(VARLEN, VALUE, f"{name} must be on the device of query (...)", **{name: tensor(B + 1, dtype=INT, elsewhere=True)})
for name in ("max_seqlen_q", "max_seqlen_k"):
    bad(VARLEN, VALUE, f"{name} must be at least 0, got -1", **{name: -1})
    bad(VARLEN, VALUE, f"{name} must be at most 2147483647, got 2147483648", **{name: 2**31})
    bad(VARLEN, TYPE, f"{name} must be an int, got 20.0", **{name: 20.0})
bad(VARLEN, VALUE, "landmarks must have the shape ... = [2, 4, M, 16], got [3, 4, 6, 16]", landmarks=tensor(3, H, M, D))
bad(VARLEN, VALUE, "landmarks must have 4 dimensions, got 3 (shape [6, 4, 16])", landmarks=tensor(M, H, D))
bad(VARLEN, VALUE, "landmarks must be on the device of query (...)", landmarks=tensor(B, H, M, D, elsewhere=True))
bad(VARLEN, VALUE, "num_landmarks must not be given together with landmarks, got 6", landmarks=Z, num_landmarks=6)
bad(VARLEN, TYPE, "num_landmarks must be an int, got (2, 3)", num_landmarks=(2, 3))
bad(VARLEN, VALUE, "num_landmarks must be at least 1, got 0", num_landmarks=0)
bad(VARLEN, TYPE, "grid is not an option of this mechanism: sequences of different lengths are pooled in one", grid=(4, 5))
bad(VARLEN, TYPE, "num_prefix_tokens is not an option of this mechanism: ... pooled in one dimension", num_prefix_tokens=1)
bad(VARLEN, TYPE, "is_causal is not an option of this mechanism: every query may attend to every key", is_causal=True)
bad(VARLEN, VALUE, "topk must be at least 1, got 0", topk=0)
bad(VARLEN, VALUE, "routes must be at least 0, got -1", routes=-1)
bad(VARLEN, TYPE, "shared_expert must be a bool, got 'yes'", shared_expert="yes")
bad(VARLEN, TYPE, "scale must be a float, got 'auto'", scale="auto")
bad(VARLEN, TYPE, "landmark_scale must be a float, got [0.1]", landmark_scale=[0.1])
bad(VARLEN, TYPE, "return_aux must be a bool, got 'lse'", return_aux="lse")

# options
TOPK = "attention landmark_topk"
bad(TOPK, VALUE, "topk must be at least 1, got 0", topk=0)
bad(TOPK, VALUE, "topk must be at least 1, got -5", topk=-5)
bad(TOPK, VALUE, "topk must be at most 2048, got 2049", topk=2049)
bad(TOPK, TYPE, "topk must be an int, got 2.0", topk=2.0)
bad(TOPK, TYPE, "topk must be an int, got None", topk=None)
bad("attention route", VALUE, "routes must be at least 0, got -1", routes=-1)
bad("attention", VALUE, "routes must be at most 8, got 9", routes=9)
bad("route", VALUE, "routes must be at most 6, got 7", routes=7)
bad("attention", VALUE, "routes must be at most 2, got 3", routes=3, num_landmarks=2)
bad("attention route", TYPE, "routes must be an int, got 1.0", routes=1.0)
bad("attention", VALUE, "routes=0 needs shared_expert=True, got False", routes=0, shared_expert=False)
bad("attention expert_attention", TYPE, "shared_expert must be a bool, got 'yes'", shared_expert="yes")
bad("attention landmark_topk expert_attention", TYPE, "scale must be a float, got 'auto'", scale="auto")
bad("attention expert_attention", TYPE, "landmark_scale must be a float, got [0.1]", landmark_scale=[0.1])
bad(TOPK, TYPE, "topk must be an int, got True", topk=True)
bad("attention route", TYPE, "routes must be an int, got False", routes=False)
bad("attention route", TYPE, "routes must be an int, got None", routes=None)
bad("attention expert_attention", TYPE, "shared_expert must be a bool, got 1", shared_expert=1)
SCALED = "attention landmark_topk expert_attention"
for not_finite in (math.nan, math.inf, -math.inf, 1e39, 10**400):
    bad(SCALED, VALUE, f"scale must be finite in float32, got {not_finite!r}", scale=not_finite)
    bad(
        "attention expert_attention",
        VALUE,
        f"landmark_scale must be finite in float32, got {not_finite!r}",
        landmark_scale=not_finite,
    )
bad(SCALED, TYPE, "scale must be a float, got True", scale=True)
bad(SCALED, TYPE, "scale must be a float, got 1j", scale=1j)
bad(SCALED, TYPE, "scale must be a float, got tensor(1.)", scale=torch.ones(()))
bad("attention expert_attention", TYPE, "landmark_scale must be a float, got False", landmark_scale=False)
bad("attention", TYPE, "return_aux must be a bool, got 0", return_aux=0)
bad("attention", TYPE, "return_aux must be a bool, got 'lse'", return_aux="lse")

# what other attentions define and this mechanism does not
bad("attention", TYPE, "is_causal is not an option of this mechanism: every query may attend to every key", is_causal=True)
bad("attention", TYPE, "attn_mask is not an option of this mechanism: experts are chosen among all keys", attn_mask=None)
bad("attention", TYPE, "dropout_p is not an option of this mechanism: there is no dropout", dropout_p=0.0)
bad("attention", TYPE, "attn_bias is not an option of this mechanism: experts are chosen among all keys", attn_bias=1)
bad("attention", TYPE, "enable_gqa is not an option of this mechanism: grouped-query heads are recognised", enable_gqa=True)
bad("attention", TYPE, "block_size is not an option of this mechanism", block_size=64)


@pytest.mark.parametrize("function,error,message,changes", BAD, ids=[f"{f}-{'-'.join(c)}" for f, _, _, c in BAD])
def test_error(function, error, message, changes, device):
    with pytest.raises(error, match=f"^mita_ext.{function}: " + ".*".join(map(re.escape, message.split("...")))):
        call(function, device, **changes)


def test_there_are_many_bad_calls():
    assert len({message for _, _, message, _ in BAD}) >= 80


def test_every_argument_has_an_error():
    for function in VALID:
        for name, parameter in inspect.signature(getattr(mita_ext, function)).parameters.items():
            if parameter.kind is not parameter.VAR_KEYWORD:
                assert any(name in changes for f, _, _, changes in BAD if f == function), f"{function}({name})"


@pytest.mark.parametrize("expert", [-1, M, 2**31 - 1])
def test_experts_out_of_range(expert):
    with pytest.raises(ValueError, match=rf"^mita_ext\.expert_attention: experts must .*{M}.*, got {expert}"):
        experts = torch.zeros(B, H, N, S, dtype=INT)
        experts[1, 2, 3] = expert
        call("expert_attention", "cpu", experts=experts)


@pytest.mark.parametrize("function,name", PADDED)
def test_lengths_out_of_range(function, name):
    of, most = ("key", L) if name == "seqlens_k" else ("query", N)
    for length in (-1, most + 1, 2**31 - 1):
        with pytest.raises(ValueError, match=rf"^mita_ext\.{function}: {name} must be .* of {of} \({most}\), got {length}"):
            call(function, "cpu", **{name: torch.tensor([5, length], dtype=INT)})


@pytest.mark.parametrize("side,of,most", [("q", "query", N), ("k", "key", L)])
def test_prefix_sums_out_of_range(side, of, most):
    """On the CPU looking costs little; on CUDA it would need a host synchronisation."""
    for sums, message in (
        ((-1, 3, 5), rf"cu_seqlens_{side} must be at least 0 and at most the tokens of {of} \({most}\), got -1"),
        ((0, 3, most + 1), rf"cu_seqlens_{side} must be .* \({most}\), got {most + 1}"),
        ((0, 5, 3), rf"cu_seqlens_{side} must not decrease, got 3 after 5"),
        ((0, 3, 15), rf"cu_seqlens_{side} must hold no sequence longer than max_seqlen_{side} \(11\), got 12"),
    ):
        with pytest.raises(ValueError, match=rf"^mita_ext\.attention_varlen: {message}"):
            changes = {f"cu_seqlens_{side}": torch.tensor(sums, dtype=INT), f"max_seqlen_{side}": 11}
            call("attention_varlen", "cpu", **changes)


@pytest.mark.gpu
@pytest.mark.parametrize("function", VALID)
def test_cuda_limits(function):
    def all_of(head_dim, dtype):
        tensors = {name: x for name, x in VALID[function].items() if isinstance(x, T)}
        return {name: x if x.dtype == INT else T((*x.shape[:-1], head_dim), dtype) for name, x in tensors.items()}

    prefix = f"^mita_ext.{function}: "
    with pytest.raises(TypeError, match=prefix + "float64 is computed on the CPU only"):
        call(function, "cuda", **all_of(D, F64))
    for head_dim in (4, 12, 264):
        rule = f"the head dimension must be a multiple of 8 and at most 256 on CUDA, got {head_dim}"
        with pytest.raises(ValueError, match=prefix + rule):
            call(function, "cuda", **all_of(head_dim, torch.float32))


@pytest.mark.gpu
def test_cuda_clamps_experts_out_of_range():
    """Checking would need a host synchronisation: the nearest expert answers, and nothing is read out of bounds."""
    q, k, z = (torch.randn(x.shape, device="cuda") for x in (Q, KV, Z))
    T_, C, _ = mita_ext.landmark_topk(z, k, k, topk=K)
    experts = torch.randint(-(2**31), 2**31, (B, H, N, S), device="cuda").int()
    wild = mita_ext.expert_attention(q, k, k, z, C, T_, experts)
    tame = mita_ext.expert_attention(q, k, k, z, C, T_, experts.clamp(0, M - 1))
    assert torch.equal(wild[0], tame[0])
    assert torch.equal(wild[1], tame[1])


@pytest.mark.gpu
def test_two_gpus_are_two_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    for name in ("key", "value", "landmarks"):
        other = VALID["expert_attention"][name].make("cuda:1")
        with pytest.raises(ValueError, match=f"{name} must be on the device of query .cuda:0., got cuda:1"):
            call("attention", "cuda:0", **{name: other})


def columns_first(x):
    return x.mT.contiguous().mT


def negated_view(x):
    return torch._neg_view(-x)  # a bit in the tensor, not in its values


def imaginary_part(x):
    return torch.complex(torch.zeros_like(x), x).imag  # elements two apart


LEGAL = {
    "scale_0": ({"scale": 0, "landmark_scale": -0.0}, {"scale": 1e-30, "landmark_scale": 1e-30}),
    "topk_2048": ({"topk": 2048}, {"topk": L}),
    "pairs_are_lists": ({"num_landmarks": [2, 3], "grid": [4, 5]}, {"num_landmarks": (2, 3), "grid": (4, 5)}),
    "defaults": ({"num_landmarks": 64, "scale": 0.25, "landmark_scale": 0.0625}, {}),
}


@pytest.mark.parametrize("name", LEGAL)
def test_legal_options(name, device):
    query, key, value = (torch.randn(x.shape, device=device) for x in (Q, KV, KV))
    odd, plain = (mita_ext.attention(query, key, value, **options) for options in LEGAL[name])
    assert torch.equal(odd, plain)
    assert odd.isfinite().all()


@pytest.mark.parametrize("odd", [columns_first, negated_view, imaginary_part, torch.nn.Parameter], ids=lambda f: f.__name__)
def test_legal_tensors(odd, device):
    query, key, value = (torch.randn(x.shape, device=device) for x in (Q, KV, KV))
    expected = mita_ext.attention(query, key, value)
    assert torch.equal(mita_ext.attention(odd(query), odd(key), odd(value)), expected)


def test_negative_scales_prefer_the_least_alike(device):
    """Legal, and a softmax like any other; experts are chosen by the score itself, whatever the scale."""
    query, key, value = (torch.randn(x.shape, device=device) for x in (Q, KV, KV))
    landmarks = torch.randn(Z.shape, device=device)
    compressed = mita_ext.landmark_topk(landmarks, key, value, topk=K, scale=-0.7)
    turned = mita_ext.landmark_topk(landmarks, -key, value, topk=K, scale=0.7)
    torch.testing.assert_close(compressed[1], turned[1])
    assert torch.equal(compressed[0], mita_ext.landmark_topk(landmarks, key, value, topk=K)[0])
    assert mita_ext.attention(query, key, value, scale=-0.7).isfinite().all()


def test_errors_leave_no_graph_behind(device):
    """A failed call changes nothing: the next one works."""
    with pytest.raises(ValueError, match="topk"):
        call("attention", device, topk=0)
    call("attention", device)
