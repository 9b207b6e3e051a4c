"""The properties of the listed cases, on cases that nobody listed, and options that nobody would pass.

Hypothesis draws them from a fixed seed, the same in every run; MITA_EXT_SEED=1 (2, ...) searches elsewhere. What fails is
shrunk and printed as a `Case`, which then belongs into tests/cases.py under a name of its own.
"""

import os

import pytest
import torch
from cases import Case, make_inputs

import mita_ext

pytest.importorskip("hypothesis", reason="hypothesis is not installed: pip install -e .[test]")
import test_attention  # noqa: E402
import test_gradients  # noqa: E402
import test_selection  # noqa: E402
from hypothesis import HealthCheck, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

EXAMPLES = {"cpu": 15, "cuda": 40}  # for each dtype


def search(examples, name):
    """A test function's decorator: its own examples, the same in every run, and no stored ones."""
    quiet = settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    return lambda test: seed(f"{os.environ.get('MITA_EXT_SEED', '0')} {name}")(quiet(test))


@st.composite
def cases(draw, device):
    """Any case that the device takes, with enough numbers and softmaxes in it that errors can be compared."""

    def size(*edges, most):
        return draw(st.sampled_from([1, *edges]) | st.integers(1, most))

    D = size(5, 64, most=80) if device == "cpu" else 8 * size(8, 16, most=16)
    Hkv, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    if draw(st.booleans()):
        M = size(16, 17, 64, 65, most=40)
        grid, prefix, N = None, 0, size(2, 63, 64, 65, 129, most=130)
    else:  # an image between other tokens
        M, grid = ((size(most=5), size(most=5)), (size(most=12), size(most=12)))
        prefix = draw(st.integers(0, 3))
        N = prefix + grid[0] * grid[1] + draw(st.integers(0, 3))
    landmarks = M if grid is None else M[0] * M[1]
    routes = draw(st.integers(0, min(landmarks, 8)))
    scales = st.none() | st.floats(-1, 1, width=16)
    enough = max(-(-1500 // (Hkv * N * D)), -(-64 // (Hkv * group * min(N, landmarks))))
    layout = draw(st.sampled_from(["slice", "heads_last", "unaligned", "fused_qkv"] + ["expanded"] * (enough == 1)))
    if layout == "fused_qkv":
        L, group = N, 1
    else:
        L = size(2, 31, 32, 33, 64, 257, N, most=130)
    return Case(
        name="drawn",
        B=max(draw(st.integers(1, 3)), enough),
        H=Hkv * group,
        Hkv=Hkv,
        N=N,
        L=L,
        D=D,
        M=M,
        K=size(16, 64, L, L + 1, most=40),
        routes=routes,
        shared_expert=routes == 0 or draw(st.booleans()),
        scale=draw(scales),
        landmark_scale=draw(scales),
        pooled=grid is not None or draw(st.booleans()),
        grid=grid,
        prefix=prefix,
        # Not "large": hardly one such softmax in a hundred is more than the choice of one unit; errors of a few are luck.
        values=draw(st.sampled_from(["normal", "clustered", "duplicate_keys", "duplicate_landmarks", "one_expert"])),
        layout=layout,
    )


PROPERTIES = [
    test_selection.test_selection_properties,
    test_attention.test_attention_given_its_selection,
    test_gradients.test_gradients_given_the_selection,
]


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda f: f.__name__.removeprefix("test_"))
def test_property(holds, backend, request):
    @search(EXAMPLES[backend[0]], request.node.name)
    @given(case=cases(backend[0]))
    def on(case):
        holds(case, backend)

    on()


NUMBERS = st.integers(-2, 9) | st.integers() | st.sampled_from([2**31, 2**63, -(2**63)])
ANYTHING = st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=2) | st.lists(NUMBERS, max_size=3)
IMAGE = {"num_landmarks": st.tuples(*[st.integers(2, 4)] * 2), "grid": st.just((3, 6)), "num_prefix_tokens": st.integers(0, 2)}
OTHERS = {
    "topk": st.integers(1, 2048),
    "routes": st.integers(0, 2),
    "shared_expert": st.just(True),
    "scale": st.floats(-3, 3),
    "landmark_scale": st.floats(-3, 3),
    "return_aux": st.booleans(),
}
GOOD = st.fixed_dictionaries({"num_landmarks": st.integers(2, 1024)} | OTHERS) | st.fixed_dictionaries(IMAGE | OTHERS)
ODD = st.dictionaries(st.sampled_from([*IMAGE, *OTHERS, "landmarks", "is_causal"]), ANYTHING, min_size=1, max_size=2)


def test_any_options_are_taken_or_refused(device):
    """No crash and no other exception, whatever is passed."""
    query, key, value, _ = make_inputs(Case("options", B=1, N=20, L=30, D=8), device, torch.float32)
    taken = refused = 0

    @search(300 if device == "cpu" else 2000, "options")
    @given(good=GOOD, odd=st.just({}) | ODD)
    def on(good, odd):
        nonlocal taken, refused
        try:
            result = mita_ext.attention(query, key, value, **good | odd)
        except (TypeError, ValueError) as error:
            assert str(error).startswith("mita_ext.attention: ")
            assert odd
            refused += 1
        else:
            out = result[0] if isinstance(result, tuple) else result
            assert out.shape == query.shape
            taken += 1

    on()
    assert min(taken, refused) > 50
