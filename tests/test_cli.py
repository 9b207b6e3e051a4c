"""What a user meets first: importing, `python -m mita_ext`, and the errors of an unfit installation."""

import importlib
import os
import re
import subprocess
import sys

import pytest
import torch

import mita_ext
from mita_ext.__main__ import covers, main


def test_report(capsys):
    main()
    report = capsys.readouterr().out
    assert mita_ext.__version__ in report
    assert f"{torch.__version__} running" in report
    for device in range(torch.cuda.device_count()):
        assert torch.cuda.get_device_name(device) in report
    assert "CPU only" not in report or "remedy" in report


def test_build_info_says_what_is_supported():
    info = mita_ext._C.build_info()
    assert set(info) == {"torch_version", "cuda", "cuda_version", "archs", "head_dims", "dtypes", "openmp"}
    assert all(re.fullmatch(r"\d+\.\d+[af]?(\+PTX)?", arch) for arch in info["archs"])
    assert bool(info["archs"]) == info["cuda"]
    assert info["openmp"] or sys.platform != "linux", "the CPU backend would run on one thread"


@pytest.mark.parametrize(
    "arch,capability,fits",
    [
        ("8.0", (8, 6), True),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (12, 0), True),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
        ("9.0", (8, 0), False),
    ],
)
def test_architectures_that_cover_a_gpu(arch, capability, fits):
    assert covers(arch, capability) == fits


def test_runs_where_no_gpu_is_visible():
    program = "import torch, mita_ext; x = torch.randn(1, 2, 70, 8); print(mita_ext.attention(x, x, x).shape)"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[1, 2, 70, 8]" in done.stdout


def test_another_torch_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "1.0.0")
    with pytest.raises(ImportError, match=r"built for torch .* but torch 1\.0\.0 is running; .*pip install"):
        importlib.reload(mita_ext)
