"""What a user meets first: importing, `python -m mita_ext`, and the errors of an unfit installation."""

import importlib
import os
import re
import runpy
import subprocess
import sys
import warnings

import pytest
import torch

import mita_ext
from mita_ext import demo
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
        ("sm_90", (9, 0), False),
    ],
)
def test_architectures_that_cover_a_gpu(arch, capability, fits):
    assert covers(arch, capability) == fits


@pytest.mark.parametrize(
    "archs,capability,says",
    [
        (["8.0+PTX", "9.0a"], (9, 0), "compute capability 9.0: covered by 8.0+PTX, 9.0a"),
        (["9.0a"], (8, 6), "compute capability 8.6: not covered; rebuild with TORCH_CUDA_ARCH_LIST=8.6"),
        (["8.0+PTX"], (7, 5), "compute capability 7.5: too old, the kernels need 8.0 or newer"),
        ([], (9, 0), "compute capability 9.0: no CUDA code in this build; rebuild with MITA_EXT_CUDA=1"),
    ],
)
def test_report_of_a_gpu(archs, capability, says, monkeypatch, capsys):
    """Whatever GPU this machine has: one that says it is another."""
    info = {**mita_ext._C.build_info(), "cuda": bool(archs), "archs": archs, "cuda_version": "13.0", "head_dims": [8, 16, 128]}
    monkeypatch.setattr("mita_ext._C.build_info", lambda: info)
    facts = {"is_available": True, "device_count": 1, "get_device_name": "GPU", "get_device_capability": capability}
    for name, fact in facts.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, fact=fact: fact)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # runpy: mita_ext.__main__ is imported already
        runpy.run_module("mita_ext", run_name="__main__")
    report = capsys.readouterr().out
    assert says in report
    assert ("head dims 8, 16, ... 128" in report) == bool(archs)


def test_demo(monkeypatch, tmp_path, capsys):
    """On a corner of the photograph: a picture, and gradients that are those of the definition."""
    pytest.importorskip("skimage")
    pytest.importorskip("matplotlib")
    corner = demo.photograph()[:128, :160]
    monkeypatch.setattr(demo, "photograph", lambda: corner)
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path / "new" / "demo.png")])
    demo.main()
    assert (tmp_path / "new" / "demo.png").stat().st_size > 10_000
    report = capsys.readouterr().out
    errors = [float(x) for x in re.findall(r"(?:output|dquery|dkey|dvalue) (\S+)", report)]
    assert len(errors) == 4
    assert max(errors) < 0.1, report


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


def test_a_compiled_part_that_does_not_load_is_named_with_the_remedy(monkeypatch):
    monkeypatch.delattr(mita_ext, "_C")
    monkeypatch.setitem(sys.modules, "mita_ext._C", None)
    with pytest.raises(ImportError, match=r"compiled part does not load with torch .*pip install"):
        importlib.reload(mita_ext)
