"""MiTA attention (arXiv 2602.01219): fast, exact-to-its-definition kernels for PyTorch, on CUDA and on the CPU."""

import torch

__version__ = "0.1.0"

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"mita_ext: its compiled part does not load with torch {torch.__version__} ({error}); "
        "build it against this torch: pip install . --no-build-isolation"
    ) from error

_built_for = _C.build_info()["torch_version"]
if _built_for.split(".")[:2] != torch.__version__.split(".")[:2]:
    raise ImportError(
        f"mita_ext: built for torch {_built_for}, but torch {torch.__version__} is running; "
        "build it again: pip install . --no-build-isolation"
    )

from .functional import (  # noqa: E402
    MiTAAux,
    attention,
    attention_varlen,
    expert_attention,
    landmark_topk,
    pool_landmarks,
    route,
)

__all__ = ["MiTAAux", "attention", "attention_varlen", "expert_attention", "landmark_topk", "pool_landmarks", "route"]
