"""Is attention right GIVEN its selection? And what must not change it: layout, strides, splits, streams, other rows."""

import pytest
import torch
from cases import BY_NAME, assert_rivals, assert_same, case_of, given_selection, make_inputs
from torch.nn.functional import scaled_dot_product_attention as sdpa

import mita_ext


def attend(case, tensors):
    q, k, v, z = tensors
    return mita_ext.attention(q, k, v, **case.options(z), return_aux=True)


def at_least_float32(dtype):
    return torch.promote_types(dtype, torch.float32)


def test_attention_given_its_selection(case, backend):
    device, dtype = backend
    tensors = make_inputs(case, device, dtype)
    out, aux = attend(case, tensors)
    assert out.dtype == aux.compressed.dtype == aux.landmarks.dtype == dtype
    assert aux.lse.dtype == at_least_float32(dtype)
    assert out.is_contiguous()
    exact = given_selection(case, aux, *(x.double() for x in tensors))
    rival = given_selection(case, aux, *tensors)
    assert_rivals("out", out, exact[0], rival[0])
    # Its inputs are exact, so lse owes float32 accuracy whatever the dtype.
    upcast = given_selection(case, aux, *(x.to(aux.lse.dtype) for x in tensors))
    assert_rivals("lse", aux.lse, exact[1], upcast[1])

    q, k, v, z = tensors
    group = case.H // (case.Hkv or case.H)
    scale = case.D**-0.5 if case.scale is None else case.scale

    def compress(dtype):
        keys, values = (x.to(dtype).repeat_interleave(group, 1) for x in (k, v))
        return (aux.landmarks.to(dtype) @ keys.mT * scale).softmax(-1) @ values

    assert_rivals("compressed", aux.compressed, compress(torch.float64), compress(dtype))


@pytest.mark.parametrize("name", ["basic", "routes_2", "grouped_query", "no_shared_expert", "routes_0", "deit", "ragged_tile"])
def test_stages_compose_to_attention(name, backend):
    device, dtype = backend
    case = BY_NAME[name]
    q, k, v, z = make_inputs(case, device, dtype)
    out, aux = attend(case, (q, k, v, z))
    Z = mita_ext.pool_landmarks(q, **case.pooling) if case.pooled else z
    T, C, landmark_lse = mita_ext.landmark_topk(Z, k, v, topk=case.K, scale=case.scale)
    r = mita_ext.route(q, Z, routes=case.routes)
    staged, lse = mita_ext.expert_attention(q, k, v, Z, C, T, r, shared_expert=case.shared_expert, **case.scales)
    assert torch.equal(T, aux.topk_indices)
    assert torch.equal(r, aux.experts)
    if device == "cpu" or dtype == torch.float32 or case.routes != 1:
        for got, expected in ((C, aux.compressed), (staged, out), (lse, aux.lse)):
            assert torch.equal(got, expected)
    else:  # short sequences have a kernel of their own: weights are rounded against other running maxima
        eps = torch.finfo(dtype).eps
        for got, expected in ((C, aux.compressed), (staged, out)):
            torch.testing.assert_close(got, expected, rtol=2 * eps, atol=eps)
        assert_same(lse, aux.lse)
    assert landmark_lse.dtype == lse.dtype == at_least_float32(dtype)
    keys = k.double().repeat_interleave(case.H // k.shape[1], 1)
    scale = case.D**-0.5
    exact = (Z.double() @ keys.mT * scale).logsumexp(-1)
    assert_rivals("landmark lse", landmark_lse, exact, (Z.to(lse.dtype) @ keys.to(lse.dtype).mT * scale).logsumexp(-1))


@pytest.mark.parametrize("name", ["topk_equals_keys", "topk_exceeds_keys", "keys_129"])
def test_routing_to_all_keys_is_dense_attention(name, backend):
    device, dtype = backend
    case = case_of(name, shared_expert=False, K=200)
    q, k, v, z = make_inputs(case, device, dtype)
    out = mita_ext.attention(q, k, v, **case.options(z))
    exact = torch.softmax(q.double() @ k.double().mT * case.D**-0.5, -1) @ v.double()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert_rivals("out", out, exact, sdpa(q, k, v))


@pytest.mark.parametrize("layout", ["fused_qkv", "heads_last", "unaligned", "slice"])
@pytest.mark.parametrize("D", [40, 64, 136])
def test_strides_change_nothing(layout, D, backend):
    device, dtype = backend
    case = case_of("basic", N=100, D=D, M=9, K=20, routes=2, layout=layout)
    tensors = make_inputs(case, device, dtype)
    assert not tensors[0].is_contiguous()
    out, aux = attend(case, tensors)
    packed, packed_aux = attend(case, [x.contiguous() for x in tensors])
    assert_same(out, packed)
    assert_same(aux.lse, packed_aux.lse)


def test_last_dimension_need_not_be_contiguous(device):
    case = case_of("basic", layout="heads_last")
    tensors = make_inputs(case, device, torch.float32)
    turned = [x.mT.contiguous().mT for x in tensors]
    assert turned[0].stride(-1) != 1
    assert_same(attend(case, turned)[0], attend(case, tensors)[0])


@pytest.mark.parametrize("B", [0, 2])
def test_empty_batches_and_queries(B, device):
    q, k, v, z = make_inputs(case_of("basic"), device, torch.float32, requires_grad=True)
    q, k, v, z = q[:B, :, : 0 if B else None], k[:B], v[:B], z[:B]
    out, aux = mita_ext.attention(q, k, v, landmarks=z, return_aux=True)
    assert out.shape == q.shape
    assert aux.lse.shape == q.shape[:-1]
    for x, grad in zip((q, k, v, z), torch.autograd.grad(out.sum(), (q, k, v, z)), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


def test_experts_take_any_keys_in_any_order(backend):
    """The caller's own selection: shuffled, with empty slots in between, K larger than what is filled."""
    device, dtype = backend
    case = case_of("ragged_tile", routes=2)
    q, k, v, z = make_inputs(case, device, dtype)
    T, C, _ = mita_ext.landmark_topk(z, k, v, topk=case.K)
    r = mita_ext.route(q, z, routes=2)
    order = torch.randperm(case.K + 4, generator=torch.Generator().manual_seed(0)).to(device)
    padded = torch.cat([T, T.new_full((*T.shape[:-1], 4), -1)], -1)[..., order].contiguous()
    out, lse = mita_ext.expert_attention(q, k, v, z, C, T, r)
    out2, lse2 = mita_ext.expert_attention(q, k, v, z, C, padded, r)
    assert_same(lse2, lse)
    assert_same(out2, out)


@pytest.mark.parametrize("shared", [True, False])
def test_an_expert_without_keys(shared, backend):
    """Queries routed to it see the shared expert alone, or nothing: zeros with zero gradient, never NaN."""
    device, dtype = backend
    q, k, v, z = make_inputs(case_of("basic"), device, dtype, requires_grad=True)
    T, C, _ = (x.detach() for x in mita_ext.landmark_topk(z, k, v, topk=8))
    T[:, :, 2] = -1
    r = mita_ext.route(q, z)
    out, lse = mita_ext.expert_attention(q, k, v, z, C, T, r, shared_expert=shared)
    alone = (r == 2).squeeze(-1)
    assert alone.any()
    if shared:
        without = mita_ext.expert_attention(q, k, v, z, C, T, r[..., :0].contiguous(), shared_expert=True)[0]
        assert_same(out[alone], without[alone])
    else:
        assert (out[alone] == 0).all()
        assert (lse[alone] == -torch.inf).all()
    grads = torch.autograd.grad((out * torch.ones_like(out)).sum(), (q, k, v) if not shared else (q, k, v, z))
    assert all(grad.isfinite().all() for grad in grads)
    if not shared:
        assert (grads[0][alone] == 0).all()


def test_nan_query_reaches_its_row_only(backend):
    device, dtype = backend
    case = case_of("ragged_tile")
    q, k, v, z = make_inputs(case, device, dtype)
    clean = attend(case, (q, k, v, z))[0].clone()
    q[0, 1, 5, 3] = torch.nan
    out = attend(case, (q, k, v, z))[0]
    assert out[0, 1, 5].isnan().all()
    out[0, 1, 5] = clean[0, 1, 5]
    assert_same(out, clean)  # NaN fails


@pytest.mark.parametrize("name", ["ragged_tile", "masked_no_shared_expert"])
def test_nan_value_reaches_the_queries_of_its_experts_only(name, backend):
    device, dtype = backend
    case = case_of(name, shared_expert=False)
    q, k, v, z = make_inputs(case, device, dtype)
    clean, aux = attend(case, (q, k, v, z))
    j = aux.topk_indices[0, 0, 0, 0].item()
    v[0, 0, j] = torch.nan
    out = attend(case, (q, k, v, z))[0]
    holders = (aux.topk_indices == j).any(-1)  # [B, H, M]
    reached = torch.take_along_dim(holders, aux.experts.squeeze(-1).long(), -1)
    reached[1:], reached[:, 1:] = False, False
    assert reached.any()
    assert out[reached].isnan().all()
    assert torch.equal(out[~reached], clean[~reached])


def test_nan_head_leaves_the_others_alone(backend):
    device, dtype = backend
    case = case_of("grouped_query", pooled=True)
    q, k, v, z = make_inputs(case, device, dtype, requires_grad=True)

    def run():
        out = mita_ext.attention(q, k, v, **case.options(z))
        return out, *torch.autograd.grad(out.sum(), (q, k, v))

    clean = run()
    with torch.no_grad():
        q[0, 2], k[0, 0] = torch.nan, torch.nan
    for was, now in zip(clean, run(), strict=True):
        heads = slice(3, None) if was.shape[1] == case.H else slice(1, None)
        assert torch.equal(was[0, heads], now[0, heads])
        assert torch.equal(was[1], now[1])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_non_finite_inputs_return(value, backend):
    """No crash, no hang, no index out of range, forward and backward."""
    device, dtype = backend
    for poisoned in range(4):
        case = case_of("ragged_tile", routes=2)
        tensors = make_inputs(case, device, dtype)
        tensors[poisoned].fill_(value)
        tensors = [x.requires_grad_() for x in tensors]
        out, aux = attend(case, tensors)
        out.sum().backward()
        assert 0 <= aux.topk_indices.min() <= aux.topk_indices.max() < case.keys
        assert 0 <= aux.experts.min() <= aux.experts.max() < case.landmarks


@pytest.mark.gpu
def test_non_default_stream():
    """Inputs that a side stream is still writing, on that stream."""
    case = case_of("deit", B=4)
    tensors = make_inputs(case, "cuda", torch.bfloat16)
    expected = attend(case, tensors)[0]
    late = [torch.full_like(x, torch.nan) for x in tensors]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        for x, y in zip(late, tensors, strict=True):
            x.copy_(y)
        out = attend(case, late)[0]
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    case = case_of("deit")
    out = attend(case, make_inputs(case, "cuda:1", torch.bfloat16))[0]
    assert out.device == torch.device("cuda:1")
    assert torch.equal(out.cpu(), attend(case, make_inputs(case, "cuda:0", torch.bfloat16))[0].cpu())


def run_with_gradients(q, k, v, z, **options):
    out, aux = mita_ext.attention(q, k, v, landmarks=z, return_aux=True, **options)
    return out, aux, torch.autograd.grad(out, (q, k, v, z), torch.ones_like(out))


@pytest.mark.gpu
def test_beyond_int32_queries():
    """2^31 elements and more in query and out: its last rows are those of a small call."""
    D, tail = 128, 999
    N = 2**31 // D + 1000
    if torch.cuda.mem_get_info()[1] < 60e9:
        pytest.skip("needs a GPU with 60 GB")
    _, k, v, z = make_inputs(case_of("basic", B=1, H=1, L=300, D=D, M=5), "cuda", torch.bfloat16)
    q = torch.randn(1, 1, N, D, device="cuda", dtype=torch.bfloat16)
    k, v, z = (x.requires_grad_() for x in (k, v, z))
    out, aux, grads = run_with_gradients(q.requires_grad_(), k, v, z, topk=16)
    end = q[:, :, -tail:].detach().requires_grad_()
    small_out, small_aux, small_grads = run_with_gradients(end, k, v, z, topk=16)
    assert torch.equal(aux.experts[:, :, -tail:], small_aux.experts)
    assert_same(out[:, :, -tail:], small_out)
    assert_same(aux.lse[:, :, -tail:], small_aux.lse)
    assert_same(grads[0][:, :, -tail:], small_grads[0])


@pytest.mark.gpu
def test_beyond_int32_keys():
    """2^31 elements and more in key and value. All that matters is at the end: before it, scores are far below."""
    D, tail = 128, 999
    L = 2**31 // D + 1000
    if torch.cuda.mem_get_info()[1] < 60e9:
        pytest.skip("needs a GPU with 60 GB")
    case = case_of("basic", B=1, H=1, N=300, L=tail, D=D, M=5, K=100)
    q, k, v, z = (x.contiguous() for x in make_inputs(case, "cuda", torch.bfloat16))
    z[..., 0], k[..., 0] = 60, 1
    key = torch.zeros(1, 1, L, D, device="cuda", dtype=torch.bfloat16)
    key[..., 0] = -60
    value = torch.randn(1, 1, L, D, device="cuda", dtype=torch.bfloat16)
    key[:, :, -tail:], value[:, :, -tail:] = k, v
    out, aux, grads = run_with_gradients(*(x.requires_grad_() for x in (q, key, value, z)), topk=100)
    assert aux.topk_indices.min() >= L - tail
    aux = aux._replace(topk_indices=aux.topk_indices - (L - tail))
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in (q, k, v, z)]
        expected = given_selection(case, aux, *leaves)[0]
        results.append((expected, *torch.autograd.grad(expected, leaves, torch.ones_like(expected))))
    for name, got, *others in zip(("out", "dq", "dk", "dv", "dlandmarks"), (out, *grads), *results, strict=True):
        if name in ("dk", "dv"):
            assert (got[:, :, :-tail] == 0).all()
            got = got[:, :, -tail:]
        assert_rivals(name, got, *others, terms=60)


@pytest.mark.gpu
def test_beyond_int32_fused_qkv_view():
    """Three views of one tensor of more than 2^31 elements, with rows 3HD apart."""
    H, D, tail = 4, 128, 500
    N = 2**31 // (3 * H * D) + 1000
    if torch.cuda.mem_get_info()[1] < 60e9:
        pytest.skip("needs a GPU with 60 GB")
    qkv = torch.randn(1, N, 3, H, D, device="cuda", dtype=torch.bfloat16)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    z = q[:, :, :: N // 4][:, :, :4].contiguous()
    out, aux = mita_ext.attention(q, k, v, landmarks=z, topk=16, return_aux=True)
    end = slice(-tail, None)
    given = (z, aux.compressed, aux.topk_indices, aux.experts[:, :, end].contiguous())
    small = mita_ext.expert_attention(q[:, :, end].contiguous(), k.contiguous(), v.contiguous(), *given)
    assert_same(out[:, :, end], small[0])
    assert_same(aux.lse[:, :, end], small[1])
