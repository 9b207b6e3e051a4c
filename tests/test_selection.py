"""Is the selection right? The keys of each landmark and the landmarks of each query, apart from any attention."""

import pytest
import torch
from cases import BY_NAME, CASES, F64, case_of, make_inputs

import mita_ext
from mita_ext import reference

SELECTED = ("topk_indices", "experts")


def select(case, tensors):
    """The aux output of one call."""
    q, k, v, z = tensors
    return mita_ext.attention(q, k, v, **case.options(z), return_aux=True)[1]


def heads_of(key, H):
    return key.repeat_interleave(H // key.shape[1], 1)


def scores_and_bounds(rows, columns):
    """float64 scores, and how far a D-term dot product in the accumulation type may be from them."""
    eps = torch.finfo(F64 if rows.dtype == F64 else torch.float32).eps
    rows, columns = rows.to(F64), columns.to(F64)
    return rows @ columns.mT, rows.shape[-1] * eps * (rows.abs() @ columns.abs().mT)


def assert_chosen(scores, bounds, chosen):
    """min(score[chosen]) >= max(score[rest]), as far as the rounding of scores allows."""
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen.long(), True)
    assert torch.equal(mask.sum(-1), torch.full_like(chosen[..., 0], chosen.shape[-1], dtype=torch.long)), "unique"
    least = (scores + bounds).masked_fill(~mask, torch.inf).amin(-1)
    most = (scores - bounds).masked_fill(mask, -torch.inf).amax(-1)
    assert (least >= most).all()


def test_selection_properties(case, backend):
    device, dtype = backend
    q, k, v, z = make_inputs(case, device, dtype)
    aux = select(case, (q, k, v, z))
    T, r, Z = aux.topk_indices, aux.experts, aux.landmarks
    assert T.dtype == r.dtype == torch.int32
    assert T.shape == (case.B, case.H, case.landmarks, min(case.K, case.keys))
    assert r.shape == (case.B, case.H, case.N, case.routes)

    assert T.min() >= 0
    assert T.max() < case.keys
    assert (T.diff(dim=-1) > 0).all(), "ascending, so unique"
    assert_chosen(*scores_and_bounds(Z, heads_of(k, case.H)), T)

    if case.routes:
        assert r.min() >= 0
        assert r.max() < case.landmarks
        scores, bounds = scores_and_bounds(q, Z)
        assert_chosen(scores, bounds, r)
        ranked, slack = (torch.take_along_dim(x, r.long(), -1) for x in (scores, bounds))
        assert ((ranked + slack)[..., :-1] >= (ranked - slack)[..., 1:]).all(), "best first"

    if case.pooled:
        assert torch.equal(Z, mita_ext.pool_landmarks(q, **case.pooling))
    else:
        assert torch.equal(Z, z)
    assert torch.equal(T, mita_ext.landmark_topk(Z, k, v, topk=case.K, scale=case.scale)[0])
    assert torch.equal(r, mita_ext.route(q, Z, routes=case.routes))


# Long sequences, enough of them for landmarks and experts in one pass over the queries: windows of whole pieces of 512 tokens,
# within pieces and across them, tokens in no window, heads that share the multiprocessors evenly and not.
MANY_TOKENS = [
    dict(B=4, H=16, N=16384, D=64, M=64),
    dict(B=1, H=5, N=65536, D=64, M=33),
    dict(B=2, H=9, N=20001, D=64, M=49),
    dict(B=1, H=12, N=33333, D=40, M=128),
    dict(B=16, H=12, N=6003, D=24, M=66, grid=(700, 5000)),
    dict(B=1, H=3, N=131072, D=64, M=1),
]

# Heads enough, and short enough, for all that comes of their queries in one kernel: blocks of two sizes, at their limits and
# beyond; tokens in no window, windows in both halves of a head, landmarks of several tiles.
MANY_HEADS = [
    dict(B=11, H=6, N=257, D=64, M=5),
    dict(B=22, H=3, N=300, D=64, M=64),
    *(dict(B=6, H=11, N=N, D=64, M=49) for N in (1056, 1057, 1648, 1649)),
    *(dict(B=B, H=H, N=N, D=64, M=49) for B, H in ((12, 11), (7, 19)) for N in (1057, 1649)),
    dict(B=8, H=9, N=1000, D=24, M=65, grid=(200, 700)),
    dict(B=7, H=10, N=999, D=64, M=256),
    dict(B=6, H=12, N=1300, D=56, M=128),
]


def pooled_and_routed(q, M, grid=None):
    """`grid`: the first pooled token, and how many."""
    pooling = dict(num_landmarks=(1, M), grid=(1, grid[1]), num_prefix_tokens=grid[0]) if grid else dict(num_landmarks=M)
    k = q[:, :, :64]
    return mita_ext.attention(q, k, k, topk=16, **pooling, return_aux=True)[1], mita_ext.pool_landmarks(q, **pooling)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", MANY_TOKENS + MANY_HEADS, ids=lambda shape: "-".join(map(str, shape.values())))
def test_many_tokens_are_pooled_and_routed_as_by_themselves(shape, dtype):
    B, H, N, D, M, grid = (shape.get(name) for name in ("B", "H", "N", "D", "M", "grid"))
    torch.manual_seed(0)
    q = torch.randn(B, N, H, D, device="cuda", dtype=dtype).transpose(1, 2)
    aux, landmarks = pooled_and_routed(q, M, grid)
    first, tokens = grid or (0, N)
    windows = q[:, :, first : first + tokens].flatten(0, 1).double().mT
    expected = torch.nn.functional.adaptive_avg_pool1d(windows, M).mT.unflatten(0, (B, H))
    torch.testing.assert_close(landmarks, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(aux.landmarks, landmarks)
    assert torch.equal(aux.experts, mita_ext.route(q, landmarks))
    for h in range(0, H, 5):  # too few tokens for one pass
        assert torch.equal(aux.landmarks[:1, h : h + 1], pooled_and_routed(q[:1, h : h + 1], M, grid)[0].landmarks)


@pytest.mark.gpu
@pytest.mark.parametrize("H, N", [(16, 8192), (17, 1000)])
def test_many_tokens_with_one_that_is_not_finite(H, N):
    """It reaches the landmarks of its windows, and no others; all bits that a landmark may have end the wait for it."""
    torch.manual_seed(0)
    q = torch.randn(4, H, N, 64, device="cuda", dtype=torch.bfloat16)
    before, _ = pooled_and_routed(q, 40)
    tokens = [(0, 0, N // 12), (1, 3, N * 5 // 8), (2, 5, N - 1), (3, 2, N // 4)]
    for value, (b, h, n) in zip((torch.inf, -torch.inf, torch.nan), tokens, strict=False):
        q[b, h, n, 7 if value == -torch.inf else slice(None)] = value
    q.view(torch.int16)[tokens[3]] = -1  # a NaN of ones
    aux, landmarks = pooled_and_routed(q, 40)
    assert torch.equal(aux.landmarks.nan_to_num(0.5, 1.5, 2.5), landmarks.nan_to_num(0.5, 1.5, 2.5))
    assert torch.equal(aux.experts, mita_ext.route(q, landmarks))
    changed = (aux.landmarks != before.landmarks).any(-1).nonzero()
    windows = [range(m * N // 40, -(-(m + 1) * N // 40)) for m in range(40)]
    assert changed.tolist() == [[b, h, m] for b, h, n in tokens for m in range(40) if n in windows[m]]


@pytest.mark.gpu
@pytest.mark.parametrize("H, N", [(16, 16384), (17, 1025)])
def test_many_tokens_on_several_streams_and_in_a_graph(H, N):
    """Blocks that wait for each other: two launches at once must both get all of theirs."""
    torch.manual_seed(0)
    q = torch.randn(4, H, N, 64, device="cuda", dtype=torch.bfloat16)
    expected, _ = pooled_and_routed(q, 64)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(pooled_and_routed(q, 64)[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results.append(pooled_and_routed(q, 64)[0])
    graph.replay()
    assert all(torch.equal(aux.landmarks, expected.landmarks) and torch.equal(aux.experts, expected.experts) for aux in results)
    q.neg_()
    graph.replay()
    assert torch.equal(results[-1].landmarks, -expected.landmarks)


INTEGER = [
    case_of("basic", N=80, L=300, M=9, K=20, routes=2),
    case_of("grouped_query", L=700, K=100, D=64, routes=3),
    case_of("topk_300", B=2, N=200, M=17, D=128),
    case_of("wide_keys_5000", M=9, N=100, routes=2),
    case_of("topk_2048"),
    case_of("keys_20000", M=3),
    case_of("landmarks_1024", routes=8),
]


@pytest.mark.parametrize("case", INTEGER, ids=lambda case: case.name)
def test_integers_select_exactly(case, backend):
    """Scores of small integers are exact in any order of summation, and tie often: only the total order decides."""
    device, dtype = backend
    generator = torch.Generator().manual_seed(0)
    q, k, v, z = make_inputs(case, device, dtype)
    for x in (q, k, z):
        x.copy_(torch.randint(-2, 3, x.shape, generator=generator))
    aux = select(case, (q, k, v, z))
    S = z.double() @ heads_of(k, case.H).double().mT
    expected = (-S).sort(dim=-1, stable=True).indices[..., : case.K].sort(-1).values
    assert torch.equal(aux.topk_indices.long(), expected)
    expected = (-(q.double() @ z.double().mT)).sort(dim=-1, stable=True).indices[..., : case.routes]
    assert torch.equal(aux.experts.long(), expected)


def in_order(scores):
    """Places of a list of scores, best first: NaN last, equal ones as they come."""
    return sorted(range(len(scores)), key=lambda j: (scores[j] != scores[j], -scores[j] if scores[j] == scores[j] else 0, j))


@pytest.mark.parametrize("L", [1, 7, 16, 100, 192, 193, 197, 208, 209, 256, 257, 1500])
def test_scores_of_any_distribution(backend, L):
    """Landmark m has column m of the keys as its scores, exactly: there is one right answer."""
    device, dtype = backend
    generator = torch.Generator().manual_seed(L)
    normal, uniform = torch.randn(L, generator=generator), torch.rand(L, generator=generator)
    heavy, even = (3 * normal).exp().clamp(max=3e4), torch.arange(L) / L
    columns = [normal, 1e-6 * normal, normal.sign() * 3e4, normal + 1000 * (even > 0.5), heavy, -heavy, heavy * (uniform < 0.9)]
    columns += [even, -even, even.round(), uniform**30, (4 * uniform).floor(), -(uniform < 0.1).float()]
    columns += [torch.zeros(L), torch.where(uniform < 0.5, -0.0, 0.0), torch.full((L,), -7.0)]
    q = torch.randn(1, 1, 20, 16, generator=generator).to(device, dtype)
    k = torch.stack(columns, -1).to(device, dtype).expand(1, 1, L, 16)
    z = torch.eye(16, device=device, dtype=dtype).expand(1, 1, 16, 16)
    orders = [in_order(scores) for scores in k[0, 0].mT.tolist()]
    for K in {1, 2, L // 8, L // 2, L - 1, L} & set(range(1, L + 1)):
        T = mita_ext.attention(q, k, k, landmarks=z, topk=K, return_aux=True)[1].topk_indices
        assert T[0, 0].tolist() == [sorted(order[:K]) for order in orders], K


@pytest.mark.parametrize("L", [16, 100, 197, 256, 1500])
def test_scores_that_are_not_finite_have_their_place(backend, L):
    device, dtype = backend
    generator = torch.Generator().manual_seed(L)
    normal, uniform = torch.randn(L, generator=generator), torch.rand(L, generator=generator)
    inf, nan = torch.tensor(torch.inf), torch.tensor(torch.nan)
    rows = [normal.where(uniform > share, odd) for odd in (inf, -inf, nan) for share in (1.5 / L, 0.2, 0.9, 1.0)]
    rows.append(normal.where(uniform > 0.2, inf).where(uniform < 0.8, nan).where((uniform - 0.5).abs() > 0.1, -inf))
    q = torch.ones(len(rows), 1, 20, 8, device=device, dtype=dtype)
    k = torch.zeros(len(rows), 1, L, 8)
    k[:, 0, :, 0] = torch.stack(rows)
    k = k.to(device, dtype)
    z = torch.eye(1, 8, device=device, dtype=dtype).expand(len(rows), 1, 1, 8)
    orders = [in_order(scores) for scores in k[:, 0, :, 0].tolist()]
    for K in (1, 2, L // 8, L // 2, L - 1, L):
        T = mita_ext.attention(q, k, k, landmarks=z, topk=K, return_aux=True)[1].topk_indices
        assert T[:, 0, 0].tolist() == [sorted(order[:K]) for order in orders], K


@pytest.mark.parametrize("D", [8, 64])
@pytest.mark.parametrize("L", [300, 700, 1100, 1500, 2000])
def test_scores_of_which_many_round_to_the_same(backend, L, D):
    """Of every `together` scores none is the same as another one in float32, nor differs from it in float16."""
    device, dtype = backend
    generator = torch.Generator().manual_seed(L)
    rows = []
    for together in (1, 2, 3, 8, 40, 150, 600):
        level = torch.randperm(L, generator=generator) // together % 1024
        power = 2.0 ** (level // 128 - 3)
        rows.append(torch.stack([power * (1 + level % 128 / 128), power * torch.randint(256, (L,), generator=generator)], -1))
    k, z = torch.zeros(len(rows), 1, L, D), torch.zeros(len(rows), 1, 1, D)
    k[:, 0, :, :2] = torch.stack(rows)
    z[..., 0], z[..., 1] = 1.0, 2.0**-19
    orders = [in_order(scores) for scores in (k.to(F64) @ z.to(F64).mT)[:, 0, :, 0].tolist()]
    q, k, z = torch.ones(len(rows), 1, 20, D, device=device, dtype=dtype), k.to(device, dtype), z.to(device, dtype)
    for K in (1, 16, 49, 64, 150):
        T = mita_ext.attention(q, k, k, landmarks=z, topk=K, return_aux=True)[1].topk_indices
        assert T[:, 0, 0].tolist() == [sorted(order[:K]) for order in orders], K


@pytest.mark.parametrize("L", [50, 1000, 20000])
@pytest.mark.parametrize("value", [0.0, 0.37])
def test_plateau_takes_the_first_keys(backend, L, value):
    device, dtype = backend
    case = case_of("basic", B=1, L=L, K=33, routes=3)
    q, k, v, z = make_inputs(case, device, dtype)
    k.fill_(value)
    z.copy_(z[:, :, :1].expand_as(z))
    aux = select(case, (q, k, v, z))
    assert (aux.topk_indices == torch.arange(33, device=device)).all()
    assert (aux.experts == torch.arange(3, device=device)).all()


def test_equal_keys_tie(backend):
    """Each key comes five times: whatever its score rounds to, the lower index is taken first."""
    device, dtype = backend
    case = case_of("duplicate_keys", N=50, L=2003, K=77, D=40, M=17, values="normal")
    q, k, v, z = make_inputs(case, device, dtype)
    k.copy_(k[:, :, torch.arange(case.keys, device=device) % 401])
    T = select(case, (q, k, v, z)).topk_indices.long()
    chosen = torch.zeros(*T.shape[:-1], 2005, dtype=torch.bool, device=device).scatter_(-1, T, True)
    copies = chosen.unflatten(-1, (5, 401)).int()
    assert (copies.diff(dim=-2) <= 0).all(), "a later copy without the earlier one"


def test_equal_landmarks_tie(backend):
    device, dtype = backend
    case = case_of("basic", N=333, M=60, D=40, routes=2)
    q, k, v, z = make_inputs(case, device, dtype)
    z.copy_(z[:, :, torch.arange(60, device=device) % 30])
    r = select(case, (q, k, v, z)).experts
    assert torch.equal(r[..., 1], r[..., 0] + 30)


def test_signed_zeros_tie(device):
    case = case_of("basic", B=1, D=8, K=5)
    q, k, v, z = make_inputs(case, device, torch.float32)
    k.copy_(torch.zeros_like(k).index_fill_(2, torch.arange(0, 50, 2, device=device), -0.0))
    aux = select(case, (q, k, v, z.abs().add_(0.1)))
    assert (aux.topk_indices == torch.arange(5, device=device)).all()


@pytest.mark.parametrize("K", [8, 45])
def test_nan_scores_come_last(backend, K):
    """40 of 50 keys are numbers: 8 experts' keys are all numbers, and 45 take the first 5 NaN keys as well."""
    device, dtype = backend
    case = case_of("basic", K=K)
    q, k, v, z = make_inputs(case, device, dtype)
    broken = torch.arange(3, 50, 5, device=device)
    k[:, :, broken, 7] = torch.nan
    T = select(case, (q, k, v, z)).topk_indices
    chosen = torch.zeros(2, 2, 6, 50, dtype=torch.bool, device=device).scatter_(-1, T.long(), True)
    expected = torch.zeros(10, dtype=torch.bool, device=device)
    expected[: K - 40 if K > 40 else 0] = True
    assert (chosen[..., broken] == expected).all()


def test_infinite_scores_are_ordered(device):
    case = case_of("basic", K=4)
    q, k, v, z = make_inputs(case, device, torch.float32)
    z.abs_().add_(0.1)
    k[:, :, 40, 0] = torch.inf
    k[:, :, 10:48, 1] = -torch.inf  # +inf - inf at 40: NaN
    k[:, :, 30, :] = torch.nan
    k[:, :, :4] = torch.nan
    k[:, :, 49, 0] = torch.inf
    T = select(case_of("basic", K=46), (q, k, v, z)).topk_indices
    # finite or +inf: 4..9, 48, 49; -inf: 10..47 but 30 and 40; then NaN by index: 0, 1
    assert (T == torch.tensor([0, 1, *range(4, 30), *range(31, 40), *range(41, 50)], device=device)).all()
    T = select(case_of("basic", K=1), (q, k, v, z)).topk_indices
    assert (T == 49).all()


def test_nan_landmarks_and_queries_select_the_first(device):
    case = case_of("basic", routes=2)
    q, k, v, z = make_inputs(case, device, torch.float32)
    z[:, :, 2] = torch.nan
    q[:, :, 11] = torch.nan
    aux = select(case, (q, k, v, z))
    assert (aux.topk_indices[:, :, 2] == torch.arange(8, device=device)).all()
    assert (aux.experts[:, :, 11] == torch.arange(2, device=device)).all()
    others = torch.arange(50, device=device) != 11
    assert (aux.experts[:, :, others] != 2).all()


SPLIT = ["basic", "clustered_pooled", "grouped_query", "ragged_tile", "routes_3", "deit", "long", "keys_5000", "landmarks_1024"]


@pytest.mark.parametrize("name", SPLIT)
def test_splitting_batch_and_heads_selects_the_same(name, backend):
    """Bit for bit, near ties and all: 2 batch entries and their heads, together and one by one."""
    device, dtype = backend
    case = case_of(name, B=2, layout="slice")
    q, k, v, z = make_inputs(case, device, dtype)
    together = select(case, (q, k, v, z))
    group = case.H // (case.Hkv or case.H)
    for b in range(case.B):
        for h in range(case.H):
            part = [x[b : b + 1, i : i + 1] for x, i in ((q, h), (k, h // group), (v, h // group), (z, h))]
            alone = select(case, part)
            for field in (*SELECTED, "landmarks"):
                assert torch.equal(getattr(alone, field)[0, 0], getattr(together, field)[b, h]), field


def test_clustered_splits_select_the_same(device):
    """Keys that differ in their last bits only: a different order of summation would show."""
    case = case_of("basic", B=3, H=4, N=200, L=1500, M=33, K=100, D=96)
    q, k, v, z = make_inputs(case, device, torch.float32)
    k.copy_(k[:, :, :1] * (1 + 3e-7 * k))
    together = select(case, (q, k, v, z)).topk_indices
    for b in range(3):
        for h in range(4):
            alone = select(case, [x[b : b + 1, h : h + 1] for x in (q, k, v, z)]).topk_indices
            assert torch.equal(alone[0, 0], together[b, h])


@pytest.mark.parametrize("name", [case.name for case in CASES if case.pooled])
def test_pooling_inside_is_pooling_outside(name, backend):
    """Bit for bit in everything that comes out."""
    device, dtype = backend
    case = BY_NAME[name]
    q, k, v, _ = make_inputs(case, device, dtype)
    out, aux = mita_ext.attention(q, k, v, **case.options(None), return_aux=True)
    outside = case_of(name, pooled=False).options(mita_ext.pool_landmarks(q, **case.pooling))
    out2, aux2 = mita_ext.attention(q, k, v, **outside, return_aux=True)
    assert torch.equal(out, out2)
    for field in aux._fields:
        assert torch.equal(getattr(aux, field), getattr(aux2, field)), field


@pytest.mark.parametrize("name", ["basic", "pooled_1d", "pooled_2d_with_prefix", "routes_3", "grouped_query", "keys_2049"])
def test_float64_selects_like_the_reference(name):
    case = BY_NAME[name]
    q, k, v, z = make_inputs(case)
    aux, expected = select(case, (q, k, v, z)), reference.attention(q, k, v, **case.options(z), return_aux=True)[1]
    for field in SELECTED:
        assert torch.equal(getattr(aux, field), getattr(expected, field)), field


def test_route_many_queries(backend):
    """So many that a block of the CUDA kernel takes several passes. Integers: every score is exact, and ties abound."""
    device, dtype = backend
    generator = torch.Generator().manual_seed(3)
    q = torch.randint(-3, 4, (2, 2, 70_001, 16), generator=generator).to(device, dtype)
    z = torch.randint(-3, 4, (2, 2, 70, 16), generator=generator).to(device, dtype)
    assert torch.equal(mita_ext.route(q, z, routes=2), reference.route(q, z, routes=2))
