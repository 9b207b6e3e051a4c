import pytest
import torch
from cases import CASES

import mita_ext

DTYPES = {
    "cpu": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def pytest_generate_tests(metafunc):
    """`device` is each device, `backend` each (device, dtype), `case` with one of them each case that the device takes."""
    if "backend" in metafunc.fixturenames:
        name, values = "backend", [(device, dtype) for device in DTYPES for dtype in DTYPES[device]]
    else:
        name, values = "device", list(DTYPES)
    listed = {argument for mark in metafunc.definition.iter_markers("parametrize") for argument in mark.args[0].split(",")}
    if name not in metafunc.fixturenames or name in listed:
        return
    cases = CASES if "case" in metafunc.fixturenames and "case" not in listed else [None]
    rows = []
    for case in cases:
        for value in values:
            words = [value] if name == "device" else [value[0], str(value[1]).removeprefix("torch.")]
            if case is None or words[0] == "cpu" or not case.cpu_only:
                row, words = ([value], words) if case is None else ([case, value], [case.name, *words])
                rows.append(pytest.param(*row, marks=[pytest.mark.gpu] if "cuda" in words else [], id="-".join(words)))
    metafunc.parametrize([name] if cases == [None] else ["case", name], rows)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
        if not mita_ext._C.build_info()["cuda"]:
            pytest.skip("this build of mita_ext has no CUDA kernels")
