"""The definition in plain PyTorch against itself written as loops, and both implementations against dense attention."""

import math

import pytest
import torch
from cases import case_of, make_inputs
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d
from torch.nn.functional import scaled_dot_product_attention as sdpa

import mita_ext
from mita_ext import reference

F64 = torch.float64


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# ---- the reference against loops over Python floats


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(logits):
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights], top + math.log(sum(weights))


def best(scores, count):
    """Larger score first, then lower index."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def mix(weights, rows):
    return [dot(weights, column) for column in zip(*rows, strict=True)]


def loops_1d(q, M):
    N = len(q)
    windows = [q[i * N // M : -(-(i + 1) * N // M)] for i in range(M)]
    return [[sum(column) / len(rows) for column in zip(*rows, strict=True)] for rows in windows]


def loops_2d(q, M, grid, prefix):
    (mh, mw), (gh, gw) = M, grid
    rows = [range(i * gh // mh, -(-(i + 1) * gh // mh)) for i in range(mh)]
    columns = [range(j * gw // mw, -(-(j + 1) * gw // mw)) for j in range(mw)]
    landmarks = []
    for window in ([q[prefix + y * gw + x] for y in ys for x in xs] for ys in rows for xs in columns):
        landmarks.append([sum(column) / len(window) for column in zip(*window, strict=True)])
    return landmarks


def loops(q, k, v, Z, K, s, shared, scale, landmark_scale):
    """One head: out, lse, experts as sets, routes, compressed."""
    T, C = [], []
    for z in Z:
        scores = [dot(z, key) for key in k]
        T.append(sorted(best(scores, K)))
        C.append(mix(softmax([scale * x for x in scores])[0], v))
    out, lse, routes = [], [], []
    for row in q:
        scores = [dot(row, z) for z in Z]
        routes.append(best(scores, s))
        units = [(landmark_scale * x, c) for x, c in zip(scores, C, strict=True)] if shared else []
        units += [(scale * dot(row, k[j]), v[j]) for m in routes[-1] for j in T[m]]
        weights, total = softmax([logit for logit, _ in units])
        out.append(mix(weights, [value for _, value in units]))
        lse.append(total)
    return out, lse, T, routes, C


LOOPED = [
    case_of("basic", N=6, L=7, D=4, M=3, K=3),
    case_of("basic", N=6, L=7, D=4, M=3, K=9),
    case_of("grouped_query", H=4, Hkv=2, N=5, D=3, M=2, K=2),
    case_of("routes_2", N=6, L=7, D=4, M=3, K=3),
    case_of("routes_0", N=6, L=7, D=4, M=3, K=3),
    case_of("no_shared_expert", N=6, L=7, D=4, M=3, K=3),
    case_of("own_scales", N=6, L=7, D=4, M=3, K=3),
    case_of("duplicate_keys", N=6, L=9, D=4, M=3, K=3),
    case_of("pooled_1d", N=7, L=5, D=4, M=3, K=3),
    case_of("more_landmarks_than_queries", N=3, L=5, D=4, M=5, K=3),
    case_of("pooled_2d_with_prefix", N=15, D=4, M=(2, 3), K=3, grid=(3, 4), prefix=1),
]


@pytest.mark.parametrize("case", LOOPED, ids=lambda case: f"{case.name}_M{case.M}_K{case.K}")
def test_reference_is_the_loops(case):
    q, k, v, z = make_inputs(case)
    out, aux = reference.attention(q, k, v, **case.options(z), return_aux=True)
    scale = case.scale or case.D**-0.5
    landmark_scale = case.landmark_scale or scale * case.D**-0.5
    for b in range(case.B):
        for h in range(case.H):
            rows, g = q[b, h].tolist(), h // (case.H // (case.Hkv or case.H))
            Z = z[b, h].tolist()
            if case.pooled:
                Z = loops_2d(rows, case.M, case.grid, case.prefix) if case.grid else loops_1d(rows, case.M)
            looped = loops(
                rows, k[b, g].tolist(), v[b, g].tolist(), Z, case.K, case.routes, case.shared_expert, scale, landmark_scale
            )
            close(aux.landmarks[b, h], torch.tensor(Z, dtype=F64))
            for got, expected in zip((out, aux.lse, aux.compressed), (looped[0], looped[1], looped[4]), strict=True):
                close(got[b, h], torch.tensor(expected, dtype=F64))
            assert aux.topk_indices[b, h].tolist() == looped[2]
            assert aux.experts[b, h].tolist() == looped[3]


def test_attention_given_is_attention():
    case = case_of("routes_2")
    q, k, v, z = make_inputs(case)
    out, aux = reference.attention(q, k, v, **case.options(z), return_aux=True)
    given = reference.attention_given(q, k, v, z, aux.topk_indices, aux.experts)
    assert torch.equal(given[0], out)
    assert torch.equal(given[1], aux.lse)


# ---- exact facts, of the definition and of the compiled backends

EITHER = pytest.mark.parametrize("mita", [reference, mita_ext], ids=["reference", "mita_ext"])


@EITHER
@pytest.mark.parametrize("M", [1, 6])
@pytest.mark.parametrize("K", [50, 64])
def test_routing_to_all_keys_is_dense_attention(mita, M, K):
    case = case_of("grouped_query", M=M, K=K, shared_expert=False)
    q, k, v, z = make_inputs(case)
    close(mita.attention(q, k, v, **case.options(z)), sdpa(q, k, v, enable_gqa=True))


@EITHER
def test_compressing_only_is_two_dense_attentions(mita):
    case = case_of("routes_0", N=37, L=90)
    q, k, v, z = make_inputs(case)
    scale = 0.3
    out = mita.attention(q, k, v, landmarks=z, routes=0, landmark_scale=scale)
    close(out, sdpa(q, z, sdpa(z, k, v), scale=scale))


@EITHER
def test_landmark_scale_defaults_to_a_second_root_of_the_head_dimension(mita):
    q, k, v, z = make_inputs(case_of("basic"))
    out = mita.attention(q, k, v, landmarks=z, scale=0.4)
    assert torch.equal(out, mita.attention(q, k, v, landmarks=z, scale=0.4, landmark_scale=0.4 * 32**-0.5))
    close(mita.attention(q, k, v, landmarks=z), mita.attention(q, k, v, landmarks=z, scale=32**-0.5, landmark_scale=1 / 32))


@EITHER
def test_defaults_are_64_landmarks_64_keys_one_route(mita):
    q, k, v, _ = make_inputs(case_of("basic", N=100))
    out, aux = mita.attention(q, k, v, return_aux=True)
    assert torch.equal(out, mita.attention(q, k, v, num_landmarks=64, topk=64, routes=1, shared_expert=True))
    assert aux.landmarks.shape[2] == aux.topk_indices.shape[3] == 64
    assert aux.experts.shape[3] == 1


@EITHER
def test_permuting_the_keys_permutes_the_experts_only(mita):
    case = case_of("ragged_tile", routes=2)
    q, k, v, z = make_inputs(case)
    order = torch.randperm(case.keys, generator=torch.Generator().manual_seed(1))
    out, aux = mita.attention(q, k, v, **case.options(z), return_aux=True)
    permuted, moved = mita.attention(q, k[:, :, order], v[:, :, order], **case.options(z), return_aux=True)
    close(permuted, out)
    close(moved.lse, aux.lse)
    assert torch.equal(moved.experts, aux.experts)
    assert torch.equal(order[moved.topk_indices.long()].sort(-1).values, aux.topk_indices.long())


@EITHER
def test_a_key_in_two_experts_counts_twice(mita):
    """Two equal landmarks choose the same keys: the routed units weigh double beside the shared ones."""
    q, k, v, z = make_inputs(case_of("duplicate_landmarks", M=2))
    out, aux = mita.attention(q, k, v, landmarks=z[:, :, :1].expand(-1, -1, 2, -1), topk=5, routes=2, return_aux=True)
    C, T = aux.compressed[:, :, :1], aux.topk_indices[:, :, 0].long()
    keys, values = (torch.take_along_dim(x, T[..., None], 2) for x in (k, v))
    scale = 32**-0.5
    logits = torch.cat([scale**2 * q @ z[:, :, :1].mT, scale * q @ keys.mT], -1) + math.log(2)
    close(out, logits.softmax(-1) @ torch.cat([C, values], 2))
    close(aux.lse, logits.logsumexp(-1))


@EITHER
@pytest.mark.parametrize("N", [5, 12, 50, 53])
def test_pooling_is_torchs_adaptive_average(mita, N):
    q = make_inputs(case_of("basic", N=N))[0]
    expected = adaptive_avg_pool1d(q.flatten(0, 1).mT, 12).mT.unflatten(0, q.shape[:2])
    close(mita.pool_landmarks(q, 12), expected)


@EITHER
@pytest.mark.parametrize("M", [(3, 2), (7, 9), (8, 10), (1, 1)])
def test_2d_pooling_is_torchs_adaptive_average_of_the_grid(mita, M):
    q = make_inputs(case_of("basic", N=66))[0]
    image = q[:, :, 1:64].mT.flatten(0, 1).unflatten(-1, (7, 9))
    expected = adaptive_avg_pool2d(image, M).flatten(2).mT.unflatten(0, q.shape[:2])
    close(mita.pool_landmarks(q, M, grid=(7, 9), num_prefix_tokens=1), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pooling_rounds_once(dtype, device):
    q = make_inputs(case_of("basic", N=1000), device, dtype)[0]
    expected = adaptive_avg_pool1d(q.double().flatten(0, 1).mT, 7).mT.unflatten(0, q.shape[:2])
    for mita in (reference, mita_ext):
        ulp = torch.finfo(dtype).eps * expected.abs()
        assert ((mita.pool_landmarks(q, 7).double() - expected).abs() <= 0.5 * ulp + 1e-6).all()
