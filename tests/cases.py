"""The one list of cases, run on every backend and dtype, and the one rule by which results are judged."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mita_ext import reference

F64 = torch.float64


@dataclass(frozen=True)
class Case:
    """Shapes, options and the kind of inputs; the letters are those of the definition."""

    name: str
    B: int = 2
    H: int = 2
    Hkv: int | None = None  # None: H
    N: int = 50
    L: int | None = None  # None: N
    D: int = 32
    M: int | tuple[int, int] = 6  # a pair is a 2-D pooling grid
    K: int = 8
    routes: int = 1
    shared_expert: bool = True
    scale: float | None = None
    landmark_scale: float | None = None
    pooled: bool = False  # pool the landmarks inside, else pass them
    grid: tuple[int, int] | None = None
    prefix: int = 0
    values: str = "normal"  # see draw()
    layout: str = "slice"  # see lay_out()
    lengths_q: tuple[int, ...] | None = None  # of each sequence; None: all have N
    lengths_k: tuple[int, ...] | None = None
    cpu_only: bool = False

    @property
    def keys(self) -> int:
        return self.N if self.L is None else self.L

    @property
    def landmarks(self) -> int:
        return self.M if isinstance(self.M, int) else self.M[0] * self.M[1]

    @property
    def magnitude(self) -> int:
        return 30 if self.values == "large" else 1

    @property
    def pooling(self) -> dict:
        return {"num_landmarks": self.M, "grid": self.grid, "num_prefix_tokens": self.prefix}

    @property
    def scales(self) -> dict:
        return {"scale": self.scale, "landmark_scale": self.landmark_scale}

    def options(self, landmarks) -> dict:
        """Keyword arguments of `attention` for this case."""
        own = {"topk": self.K, "routes": self.routes, "shared_expert": self.shared_expert, **self.scales}
        return own | (self.pooling if self.pooled else {"landmarks": landmarks})


CASES = [
    Case("basic"),
    Case("topk_equals_keys", K=50),
    Case("topk_exceeds_keys", K=64),
    Case("one_landmark", M=1),
    Case("more_landmarks_than_queries", N=5, L=40, M=12, pooled=True),
    Case("one_query", N=1, L=50),
    Case("one_key", N=50, L=1),
    Case("one_of_everything", B=1, H=1, N=1, D=8, M=1, K=1),
    Case("empty_expert", values="empty_expert"),
    Case("all_queries_one_expert", N=200, values="one_expert"),
    Case("ragged_tile", N=67, L=131, D=40, M=17, K=19),
    Case("duplicate_keys", N=70, K=16, values="duplicate_keys"),
    Case("duplicate_landmarks", routes=2, values="duplicate_landmarks"),
    Case("large_logits", values="large"),
    Case("large_logits_no_shared_expert", values="large", shared_expert=False),
    Case("clustered", N=150, M=9, K=16, values="clustered"),
    Case("clustered_pooled", N=150, M=9, K=16, values="clustered", pooled=True),
    Case("clustered_image", B=1, N=1025, D=64, M=(7, 7), K=49, grid=(32, 32), prefix=1, values="clustered", pooled=True),
    Case("grouped_query", H=6, Hkv=2),
    Case("multi_query", H=3, Hkv=1, routes=2),
    Case("cross_attention", N=37, L=90),
    *(Case(f"head_dim_{D}", D=D, N=70, M=9, K=20) for D in (8, 16, 24, 40, 56, 64, 72, 80, 96, 104, 120, 128)),
    *(Case(f"head_dim_{D}", D=D, N=70, M=9, K=20) for D in (136, 192, 200, 256)),
    Case("head_dim_5", D=5, cpu_only=True),
    Case("head_dim_264", D=264, cpu_only=True),
    Case("routes_0", routes=0),
    Case("routes_2", routes=2),
    Case("routes_3", N=80, M=9, K=20, routes=3),
    Case("routes_8", M=8, routes=8),
    Case("no_shared_expert", shared_expert=False),
    Case("no_shared_expert_routes_2", shared_expert=False, routes=2),
    Case("no_shared_expert_topk_1", shared_expert=False, K=1),
    Case("plain_landmark_scale", landmark_scale=32**-0.5),
    Case("own_scales", scale=0.5, landmark_scale=0.3),
    Case("pooled_1d", M=5, pooled=True),
    Case("pooled_1d_overlapping_windows", N=53, M=7, pooled=True),
    Case("pooled_2d", N=63, M=(3, 2), grid=(7, 9), pooled=True),
    Case("pooled_2d_with_prefix", N=66, M=(3, 2), grid=(7, 9), prefix=1, pooled=True),
    Case("pooled_2d_finer_than_grid", N=8, M=(3, 5), grid=(2, 3), prefix=1, pooled=True),
    Case("pooled_routes_0", M=5, routes=0, pooled=True),
    Case("pooled_no_shared_expert", M=5, shared_expert=False, pooled=True),
    Case("deit", N=197, D=64, M=(5, 5), K=25, grid=(14, 14), prefix=1, pooled=True, layout="fused_qkv"),
    *(Case(f"keys_{L}", B=1, N=40, L=L, M=5, K=16) for L in (31, 32, 33, 63, 64, 65, 127, 128, 129)),
    *(Case(f"keys_{L}", B=1, N=40, L=L, M=5, K=16) for L in (192, 193, 208, 209, 224, 225, 255, 256, 257)),
    *(Case(f"keys_{L}", B=1, N=40, L=L, M=5, K=64) for L in (512, 513, 769, 1000, 1024, 1153, 1665, 2047, 2048)),
    *(Case(f"keys_{L}", B=1, N=40, L=L, M=5, K=64) for L in (2049, 5000, 8193, 20000)),
    *(Case(f"queries_{N}", B=1, N=N, L=100, M=5) for N in (15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1025)),
    *(Case(f"queries_{N}", B=1, N=N, L=100, M=5) for N in (224, 225)),
    # all scores stored, or what groups of them leave; by blocks, or by specialists
    *(
        Case(f"keys_{L}_topk_{K}", B=1, N=40, L=L, D=64, M=66, K=K)
        for L, K in ((3168, 66), (3169, 66), (8192, 200), (8193, 200))
    ),
    *(Case(f"keys_{L}_wide_heads", B=1, N=40, L=L, D=128, M=49, K=64) for L in (4096, 4097, 16383, 16384)),
    *(
        Case(f"keys_{L}_landmarks_{M}", B=1, N=40, L=L, D=64, M=M, K=20)
        for L, M in ((16383, 64), (16384, 64), (16384, 48), (2049, 65))
    ),
    Case("long", B=1, H=1, N=4096, D=64, M=64, K=64, pooled=True),
    *(Case(f"landmarks_{M}", B=1, N=70, L=300, D=16, M=M) for M in (15, 16, 17, 63, 64, 65, 100, 200, 1024)),
    *(Case(f"topk_{K}", B=1, H=1, N=33, L=2500, D=16, M=3, K=K) for K in (1, 2, 63, 64, 65, 100, 256, 300, 1024, 2048)),
    *(Case(f"short_landmarks_{M}", N=70, L=100, D=64, M=M, layout="heads_last") for M in (31, 32, 33)),
    *(Case(f"short_topk_{K}", N=100, M=(4, 4), K=K, grid=(10, 10), values="clustered", pooled=True) for K in (31, 32, 33)),
    Case("short_landmarks_of_few_queries", N=3, L=40, D=64, M=200, K=5, pooled=True),
    Case("short_negative_scales", N=70, L=100, D=64, M=9, K=20, scale=-0.2, landmark_scale=-0.1),
    Case("short_scale_0", N=70, L=100, D=64, M=9, K=40, scale=0.0, landmark_scale=0.1),
    # whole heads in blocks that are alone on a multiprocessor: up to the most tokens, with few units or many
    *(
        Case(f"short_alone_{N}", B=1, N=N, D=64, M=(3, 4), K=32, grid=(1, N - 1), prefix=1, pooled=True)
        for N in (273, 321, 449)
    ),
    Case("short_alone_clustered", N=257, D=64, M=12, K=25, values="clustered", pooled=True, layout="fused_qkv"),
    Case("short_alone_large", N=320, D=64, M=12, K=16, values="large", pooled=True, layout="fused_qkv"),
    Case("short_alone_most", B=1, N=448, D=64, M=10, K=20, pooled=True),
    Case("short_alone_most_keys", N=60, L=448, D=40, M=30, K=32),
    Case("short_alone_most_keys_and_one", N=60, L=449, D=40, M=30, K=32),
    Case("short_alone_duplicate_keys", N=300, L=440, D=64, M=9, K=30, values="duplicate_keys"),
    Case("short_alone_duplicate_landmarks", N=400, L=100, D=64, M=9, K=30, values="duplicate_landmarks"),
    Case("short_alone_one_expert", N=400, D=64, M=17, K=32, values="one_expert"),
    Case("short_alone_no_shared_expert", N=330, D=64, M=17, K=32, shared_expert=False),
    *(Case(f"short_alone_units_{M}_heads_{H}", B=1, H=H, N=300, D=64, M=M, K=32) for M, H in ((32, 2), (33, 32), (33, 33))),
    *(Case(f"short_alone_many_units_{N}", B=1, H=33, Hkv=11, N=N, D=64, M=36, K=40, pooled=True) for N in (320, 321)),
    Case("short_alone_many_units_clustered", B=3, H=11, N=260, D=64, M=36, K=40, values="clustered", pooled=True),
    Case("short_alone_many_keys", B=1, H=33, Hkv=11, N=100, L=257, D=64, M=34, K=200),
    # gradients of whole heads, with room for all rows and not, or for none
    *(Case(f"short_gradient_{N}", N=N, D=64, M=32, K=32, pooled=True, layout="heads_last") for N in (208, 209, 256, 288, 289)),
    *(Case(f"short_gradient_{N}_few_landmarks", N=N, D=64, M=4, K=20, values="clustered") for N in (255, 304, 305)),
    Case("short_gradient_image", N=257, D=64, M=(5, 5), K=25, grid=(16, 16), prefix=1, pooled=True, layout="fused_qkv"),
    Case("short_gradient_clustered", N=261, D=64, M=(4, 4), K=16, grid=(16, 16), prefix=5, values="clustered", pooled=True),
    Case("short_gradient_few_queries", N=40, L=280, D=40, M=9, K=32, values="clustered"),
    Case("short_gradient_few_keys", N=280, L=40, D=56, M=9, K=32, pooled=True),
    Case("short_gradient_large", N=270, D=64, M=9, K=32, values="large"),
    Case("short_gradient_one_expert", N=270, D=64, M=17, K=32, values="one_expert"),
    Case("short_gradient_duplicate_keys", N=260, D=64, M=17, K=32, values="duplicate_keys"),
    # the same by masks: most rows and units, and where few units leave it to lists
    *(Case(f"masked_gradient_{N}", N=N, D=64, M=64, K=64, pooled=True) for N in (64, 65, 192, 256, 257, 272, 273)),
    *(Case(f"masked_gradient_{N}_units_{M}", N=N, D=64, M=M, K=M) for N, M in ((64, 16), (65, 16), (160, 17), (161, 17))),
    *(Case(f"masked_gradient_landmarks_{M}", N=180, D=64, M=M, K=33, values="clustered") for M in (32, 33, 65)),
    Case("masked_gradient_image", N=197, D=64, M=(7, 7), K=49, grid=(14, 14), prefix=1, pooled=True, layout="fused_qkv"),
    Case("masked_gradient_overlapping_windows", N=40, D=56, M=(7, 8), K=9, grid=(6, 6), prefix=2, pooled=True),
    Case("masked_gradient_clustered", N=200, D=64, M=(6, 6), K=36, grid=(14, 14), prefix=4, values="clustered", pooled=True),
    Case("masked_gradient_long_image", N=257, D=64, M=(7, 7), K=49, grid=(16, 16), prefix=1, pooled=True, layout="fused_qkv"),
    Case("masked_gradient_long_cluster", N=261, D=64, M=(6, 6), K=36, grid=(16, 16), prefix=5, values="clustered", pooled=True),
    Case("masked_gradient_long_large", N=270, D=64, M=49, K=49, values="large"),
    Case("masked_gradient_long_duplicate_keys", N=260, D=40, M=49, K=49, values="duplicate_keys"),
    Case("masked_gradient_long_few_queries", N=20, L=265, D=40, M=40, K=100, values="clustered"),
    Case("masked_gradient_long_few_keys", N=265, L=20, D=56, M=49, K=49, pooled=True),
    Case("masked_gradient_all_keys", N=200, D=64, M=33, K=200),
    Case("masked_gradient_few_queries", N=20, L=250, D=40, M=40, K=100, values="clustered"),
    Case("masked_gradient_few_keys", N=250, L=20, D=56, M=49, K=49, pooled=True),
    Case("masked_gradient_large", N=220, D=64, M=49, K=49, values="large"),
    Case("masked_gradient_one_expert", N=220, D=64, M=49, K=49, values="one_expert"),
    Case("masked_gradient_duplicate_keys", N=220, D=64, M=49, K=49, values="duplicate_keys"),
    Case("masked_gradient_negative_scales", N=100, D=64, M=9, K=40, scale=-0.2, landmark_scale=-0.1),
    # of longer heads and more landmarks, by masks in several kernels
    *(Case(f"masked_stages_{N}", N=N, D=64, M=70, K=40, pooled=True) for N in (128, 129, 256, 257)),
    *(Case(f"masked_stages_landmarks_{M}", N=200, D=48, M=M, K=60, values="clustered") for M in (64, 128, 129, 256)),
    Case("masked_stages_many_heads", B=4, H=16, N=273, D=64, M=64, K=64, pooled=True, layout="heads_last"),
    Case("masked_stages_image", N=325, D=64, M=(9, 9), K=81, grid=(18, 18), prefix=1, pooled=True, layout="fused_qkv"),
    Case("masked_stages_clustered", N=290, D=64, M=(6, 6), K=150, grid=(16, 18), prefix=2, values="clustered", pooled=True),
    Case("masked_stages_few_queries", N=20, L=400, D=40, M=70, K=100, values="clustered"),
    Case("masked_stages_few_keys", N=300, L=20, D=56, M=70, K=30, pooled=True),
    Case("masked_stages_all_keys", N=300, D=16, M=40, K=300),
    Case("masked_stages_large", N=220, D=64, M=100, K=49, values="large"),
    Case("masked_stages_one_expert", N=220, D=64, M=80, K=49, values="one_expert"),
    Case("masked_stages_duplicate_keys", N=300, D=64, M=49, K=90, values="duplicate_keys"),
    Case("masked_stages_negative_scales", N=150, D=24, M=70, K=40, scale=-0.2, landmark_scale=-0.1),
    Case("masked_stages_block_to_itself", B=1, H=1, N=1800, D=64, M=100, K=300, pooled=True),
    # attention by masks
    Case("masked_no_shared_expert", N=200, D=64, M=40, K=60, shared_expert=False),
    Case("masked_keys_of_several_heads", B=3, H=12, Hkv=3, N=320, L=300, D=56, M=33, K=300, values="large"),
    Case("masked_empty_expert", N=120, D=64, M=64, K=40, values="empty_expert"),
    # gradients of queries and units in one pass: several segments of an expert, keys of several heads
    Case("one_pass_one_expert", H=4, Hkv=2, N=700, L=300, D=64, M=33, K=50, values="one_expert"),
    Case("one_pass_clustered", H=4, Hkv=2, N=600, D=64, M=64, K=64, values="clustered", pooled=True, layout="heads_last"),
    Case("one_pass_large_logits", B=1, N=300, D=64, M=40, K=64, values="large"),
    # the same, 16 queries of an expert at a time, or 64
    *(Case(f"one_pass_queries_{N}", B=1, H=4, Hkv=2, N=N, L=300, D=64, M=5, K=50) for N in (200, 201, 320, 1300)),
    # the most queries of small experts, and one more
    *(
        Case(f"small_experts_queries_{N}_topk_{K}_head_dim_{D}", B=1, H=4, Hkv=2, N=N, L=300, D=D, M=5, K=K)
        for D, K, most in (
            *((64, 64, 480), (64, 33, 480), (64, 32, 960)),
            *((80, 64, 320), (96, 32, 640), (104, 33, 240), (128, 32, 320)),
        )
        for N in (most, most + 1)
    ),
    # the most landmarks, and more
    *(
        Case(f"small_experts_landmarks_{M}_topk_{K}_head_dim_{D}", B=1, N=300, D=D, M=M, K=K)
        for D, K, most in ((64, 32, 256), (96, 20, 256), (72, 40, 192), (128, 25, 192), (112, 64, 144))
        for M in (most, most + 8)
    ),
    Case("small_experts_one_expert", H=4, Hkv=2, N=900, L=300, D=40, M=5, K=25, values="one_expert"),
    Case("small_experts_wide_one_expert", H=4, Hkv=2, N=600, L=300, D=80, M=9, K=49, values="one_expert"),
    Case("small_experts_wide_pooled", N=449, D=80, M=20, K=25, pooled=True),
    Case("small_experts_wide_large", N=450, D=88, M=(6, 6), K=36, grid=(20, 22), prefix=10, pooled=True, values="large"),
    Case("small_experts_wide_clustered", N=300, D=128, M=49, K=49, values="clustered", layout="heads_last"),
    Case("small_experts_wide_two_routes", N=150, D=128, M=30, K=32, routes=2, layout="heads_last"),
    Case("small_experts_wide_three_routes", N=150, D=96, M=70, K=50, routes=3, values="duplicate_keys"),
    Case("small_experts_wide_few_keys", N=300, L=64, D=80, M=40, K=60),
    # keys of an expert in several tiles: so many, and one more; the most queries, and more
    *(Case(f"small_experts_topk_{K}", N=300, D=64, M=40, K=K, H=4, Hkv=2) for K in (65, 128, 129)),
    *(
        Case(f"small_experts_several_tiles_queries_{N}_head_dim_{D}", B=1, N=N, L=300, D=D, M=32, K=70)
        for D, most in ((56, 1536), (88, 1024), (128, 768))
        for N in (most, most + 1)
    ),
    *(Case(f"small_experts_{M}_topk_{K}", N=200, L=300, D=64, M=M, K=K) for M, K in ((31, 100), (32, 256), (32, 257))),
    *(Case(f"small_experts_most_topk_{K}", B=1, N=300, L=600, D=64, M=70, K=K, values="large") for K in (512, 513)),
    Case("small_experts_several_tiles_one_expert", H=4, Hkv=2, N=500, L=300, D=40, M=33, K=100, values="one_expert"),
    Case("small_experts_several_tiles_two_routes", N=300, D=64, M=40, K=100, routes=2, layout="heads_last"),
    Case("small_experts_several_tiles_three_routes", N=150, D=96, M=70, K=80, routes=3, values="duplicate_keys"),
    Case("small_experts_several_tiles_no_shared_expert", N=300, L=200, D=120, M=33, K=130, shared_expert=False),
    Case("small_experts_several_tiles_few_keys", N=300, L=60, D=64, M=40, K=140, H=4, Hkv=2),
    Case("small_experts_several_tiles_empty_expert", N=400, D=64, M=140, K=100, H=4, Hkv=2, values="empty_expert"),
    # gradients of rows by warps: the most queries of more than 32 units of 128 columns, and more
    *(Case(f"small_experts_wide_queries_{N}", B=1, N=N, D=128, M=9, K=33, pooled=True) for N in (288, 289)),
    # gradients of keys by warps: the most landmarks, and more, with larger experts
    *(
        Case(f"few_landmarks_{M}_head_dim_{D}", N=200, L=333, D=D, M=M, K=100)
        for D, M in ((96, 64), (80, 65), (128, 48), (104, 49))
    ),
    Case("small_experts_wide_no_shared_expert", N=300, L=200, D=120, M=9, K=64, shared_expert=False),
    Case("one_pass_many_queries_one_expert", H=4, Hkv=2, N=700, L=300, D=40, M=5, K=64, values="one_expert"),
    # logits of hundreds: of thousands, one near tie decides the largest error, by the order of its sums
    Case("routes_3_logits_of_hundreds", N=600, D=40, M=24, K=16, routes=3, values="large", scale=0.01),
    # gradients of the landmarks' softmax in one pass over the keys: many tiles of them, in several parts
    Case("many_key_tiles", N=300, L=1500, D=64, M=64, K=64, pooled=True),
    Case("many_key_tiles_one_expert", N=700, L=700, D=48, M=33, K=100, values="one_expert"),
    Case("many_key_tiles_clustered", N=300, L=1000, D=64, M=50, K=49, routes=2, values="clustered", layout="heads_last"),
    Case("many_key_tiles_routes_0", N=100, L=1000, D=64, M=64, routes=0, layout="heads_last"),
    # gradients of more than 64 units, and of the queries of experts with many of them, above 64 columns
    Case("many_units", N=300, L=700, D=128, M=130, K=140, pooled=True),
    Case("many_units_one_expert", H=4, Hkv=2, N=700, L=300, D=72, M=65, K=200, values="one_expert"),
    Case("many_units_clustered", H=4, Hkv=2, N=600, D=128, M=100, K=70, routes=2, values="clustered", layout="heads_last"),
    Case("many_units_routes_0", N=100, L=500, D=96, M=100, routes=0, layout="heads_last"),
    Case("many_units_no_shared_expert", N=200, D=128, M=5, K=100, shared_expert=False),
    Case("many_units_many_queries", N=1300, L=400, D=128, M=9, K=140, pooled=True),
    Case("many_units_many_queries_clustered", H=4, Hkv=2, N=900, D=128, M=6, K=128, values="clustered", layout="heads_last"),
    Case("many_units_many_queries_no_shared_expert", N=700, L=300, D=80, M=5, K=65, shared_expert=False),
    Case("many_units_logits_of_hundreds", B=1, N=900, L=300, D=128, M=6, K=128, values="large", scale=0.01),
    # enough heads for landmarks, experts and groups in one kernel, and one head less
    Case("many_heads", B=33, N=450, L=200, D=64, M=9, K=20, pooled=True, layout="heads_last"),
    Case("many_heads_less_one", B=65, H=1, N=450, L=200, D=64, M=9, K=20, pooled=True),
    Case(
        "many_heads_image",
        B=17,
        H=4,
        Hkv=2,
        N=401,
        L=150,
        D=40,
        M=(5, 7),
        K=49,
        grid=(20, 20),
        prefix=1,
        values="clustered",
        pooled=True,
    ),
    Case("topk_2048_equals_keys", B=1, H=1, N=33, L=2048, D=16, M=3, K=2048),
    Case("fused_qkv_view", layout="fused_qkv"),
    Case("heads_last", H=3, layout="heads_last"),
    Case("expanded_batch", B=3, layout="expanded"),
    Case("unaligned_rows", layout="unaligned"),
    # more columns than one warp sums
    Case("wide_one_of_everything", B=1, H=1, N=1, D=256, M=1, K=1),
    Case("wide_one_query", N=1, L=50, D=136),
    Case("wide_one_key", N=50, L=1, D=192),
    *(Case(f"wide_queries_{N}", B=1, N=N, L=100, D=256, M=3, K=20) for N in (33, 400)),
    *(Case(f"wide_keys_{L}", B=1, N=40, L=L, D=136, M=5, K=K) for L, K in ((33, 16), (300, 64), (5000, 64), (9000, 100))),
    *(Case(f"wide_landmarks_{M}", B=1, N=70, L=150, D=256, M=M) for M in (65, 300)),
    Case("wide_grouped_query", H=6, Hkv=2, D=136),
    Case("wide_multi_query_routes_2", H=3, Hkv=1, D=256, routes=2, layout="heads_last"),
    Case("wide_topk_300", B=1, H=1, N=70, L=400, D=192, M=3, K=300),
    Case("wide_routes_0", N=70, D=256, routes=0),
    Case("wide_no_shared_expert", N=70, D=256, shared_expert=False, layout="unaligned"),
    Case("wide_clustered_pooled", N=150, D=256, M=9, K=16, values="clustered", pooled=True),
    Case("wide_image", N=66, D=192, M=(3, 2), grid=(7, 9), prefix=1, pooled=True, layout="fused_qkv"),
    Case("wide_large_logits", D=256, values="large"),
    Case("wide_one_expert", N=200, D=200, values="one_expert"),
]

BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES)

# Sequences of different lengths: full, none at all, one token, fewer than M or K. One side or both.
SIX = {"B": 6, "lengths_q": (50, 0, 1, 5, 33, 50), "lengths_k": (50, 50, 3, 0, 7, 1)}
SAME = {"B": 5, "lengths_q": (50, 3, 0, 17, 1), "lengths_k": (50, 3, 0, 17, 1)}
LONG = {"B": 5, "N": 60, "L": 5000, "lengths_k": (5000, 300, 0, 4097, 31)}
VARLEN = [
    Case("given", **SIX),
    Case("pooled", **SIX, pooled=True),
    Case("same_lengths", **SAME, pooled=True),
    Case("queries_only", B=4, lengths_q=(50, 0, 20, 1), pooled=True),
    Case("keys_only", B=4, lengths_k=(50, 0, 20, 1), pooled=True),
    Case("zero_length_sequences", B=2, lengths_q=(0, 0), lengths_k=(0, 0), pooled=True),
    Case("grouped_query", **SIX, H=6, Hkv=2, pooled=True),
    Case("cross_attention", B=4, N=37, L=90, H=4, Hkv=1, lengths_q=(12, 37, 5, 0), lengths_k=(90, 13, 64, 70)),
    Case("routes_0", **SIX, routes=0),
    Case("routes_0_pooled", **SIX, routes=0, pooled=True),
    Case("routes_2", **SIX, routes=2, pooled=True),
    Case("no_shared_expert", **SIX, shared_expert=False),
    Case("no_shared_expert_pooled_routes_2", **SIX, shared_expert=False, routes=2, pooled=True),
    Case("more_landmarks_than_queries", **SAME, M=70, pooled=True),
    Case("one_landmark", **SIX, M=1),
    Case("images", B=4, N=197, D=64, M=25, K=25, lengths_q=(197, 0, 100, 24), lengths_k=(197, 0, 100, 24), pooled=True),
    Case("short_alone", B=3, N=400, L=448, D=64, M=12, K=20, lengths_q=(400, 0, 99), lengths_k=(300, 448, 257), pooled=True),
    Case("short_gradient", B=4, N=270, L=288, D=64, M=25, K=32, lengths_q=(270, 0, 3, 256), lengths_k=(288, 9, 257, 100)),
    Case("masked_gradient", B=5, N=256, L=250, D=64, M=49, K=60, lengths_q=(256, 0, 3, 128, 9), lengths_k=(250, 9, 0, 250, 99)),
    Case("masked_gradient_long", B=4, N=272, L=260, D=64, M=49, K=60, lengths_q=(272, 0, 3, 257), lengths_k=(260, 9, 258, 0)),
    Case("masked_stages", B=4, N=300, L=290, D=64, M=70, K=60, lengths_q=(300, 0, 3, 129), lengths_k=(260, 9, 290, 0)),
    Case("images_256", B=3, N=257, D=64, M=25, K=25, lengths_q=(257, 100, 24), lengths_k=(257, 100, 24), pooled=True),
    Case("wide_heads", B=3, H=1, N=300, L=280, D=128, M=17, K=40, lengths_q=(64, 300, 129), lengths_k=(280, 65, 128)),
    Case("wider_heads", B=3, H=2, Hkv=1, N=150, D=256, M=17, K=40, lengths_q=(64, 150, 0), lengths_k=(150, 65, 9), pooled=True),
    Case("wider_heads_routes_2", B=3, H=1, N=150, D=136, M=9, K=20, lengths_q=(150, 3, 129), lengths_k=(100, 150, 0), routes=2),
    Case("many_queries", B=2, H=1, N=700, L=300, D=128, M=3, K=70, lengths_q=(400, 700), lengths_k=(300, 99), pooled=True),
    Case("small_experts_wide", B=3, N=300, L=260, D=88, M=30, K=49, lengths_q=(300, 9, 99), lengths_k=(20, 260, 150)),
    Case("small_experts", B=3, H=1, N=500, L=300, D=64, M=30, K=49, lengths_q=(500, 9, 99), lengths_k=(20, 300, 150), routes=2),
    Case("small_experts_tiles", B=3, Hkv=1, N=500, L=300, D=64, M=40, K=130, lengths_q=(500, 9, 99), lengths_k=(20, 300, 150)),
    Case("one_pass", B=3, H=4, Hkv=2, N=400, L=300, D=64, M=40, K=64, lengths_q=(400, 70, 1), lengths_k=(300, 40, 0)),
    Case(
        "one_pass_many_queries", B=3, H=4, Hkv=2, N=500, L=300, D=64, M=5, K=64, lengths_q=(500, 70, 1), lengths_k=(300, 40, 0)
    ),
    Case("many_key_tiles", B=4, N=400, L=900, D=64, M=40, K=64, lengths_q=(400, 70, 1, 0), lengths_k=(900, 40, 0, 640)),
    Case("many_landmarks", B=3, H=1, N=300, L=400, D=64, M=100, K=64, lengths_q=(300, 40, 99), lengths_k=(30, 400, 200)),
    Case("many_units", B=3, H=2, Hkv=1, N=400, L=300, D=128, M=130, K=140, lengths_q=(400, 70, 0), lengths_k=(300, 9, 99)),
    Case("long_keys", **LONG, K=64),
    Case("long_keys_long_experts", **LONG, K=100, Hkv=1),
    Case("very_long_keys", B=3, H=1, N=20, L=20000, lengths_k=(20000, 2500, 40), K=64),
    Case("long_queries", B=3, H=1, N=3000, L=100, D=64, M=12, lengths_q=(3000, 2049, 70), lengths_k=(100, 60, 2), pooled=True),
]


def draw(case: Case, generator: torch.Generator) -> list[torch.Tensor]:
    """query, key, value, landmarks: float64, contiguous, on the CPU."""
    B, H, N, L, D, M = case.B, case.H, case.N, case.keys, case.D, case.landmarks
    Hkv = case.Hkv or H

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    q, k, v, z = normal(B, H, N, D), normal(B, Hkv, L, D), normal(B, Hkv, L, D), normal(B, H, M, D)
    if case.values == "large":
        q, k, v, z = (case.magnitude * x for x in (q, k, v, z))
    elif case.values == "clustered":  # near-tied scores, skewed routing

        def clustered(like, centres):
            which = torch.randint(16, like.shape[:-1], generator=generator)
            return torch.take_along_dim(centres, which[..., None], 2) + 0.3 * like

        q, k = clustered(q, normal(B, H, 16, D)), clustered(k, normal(B, Hkv, 16, D))
        z = clustered(z, normal(B, H, 16, D))
    elif case.values == "duplicate_keys":
        k = k[:, :, torch.arange(L) % 5]
    elif case.values == "duplicate_landmarks":
        z = z[:, :, torch.arange(M) % 2]
    elif case.values == "one_expert":
        q[..., 0] = 4
        z[..., 0] = 0
        z[:, :, M // 2, 0] = 20
    elif case.values == "empty_expert":
        q[..., 0] = 4
        z[:, :, M // 2, 0] = -20
    else:
        assert case.values == "normal"
    return [q, k, v, z]


def lay_out(tensors: list[torch.Tensor], layout: str) -> list[torch.Tensor]:
    """The same values as views of larger tensors, so that strides are always exercised."""
    if layout == "fused_qkv":
        q, k, v, z = tensors
        qkv = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 2)  # [B, N, 3, H, D]
        return [*(x.transpose(1, 2) for x in qkv.unbind(2)), z]

    def view(x):
        B, H, N, D = x.shape
        if layout == "heads_last":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "expanded":
            return x[:1].expand(x.shape)
        if layout == "unaligned":  # every row starts at an odd element
            larger = x.new_full((B, H, N, D + 1 + D % 2), torch.nan)
            return larger[..., 1 : D + 1].copy_(x) if D % 2 == 0 else larger[..., :D].copy_(x)
        assert layout == "slice"
        larger = x.new_full((B + 1, H + 1, N + 3, D + 8), torch.nan)
        return larger[1:, :-1, 1:-2, :D].copy_(x)

    return [view(x) for x in tensors]


def make_inputs(case: Case, device="cpu", dtype=F64, *, requires_grad=False, seed=0) -> list[torch.Tensor]:
    """query, key, value, landmarks of one case; the values do not depend on the device."""
    tensors = draw(case, torch.Generator().manual_seed(seed))
    tensors = lay_out([x.to(device, dtype) for x in tensors], case.layout)
    return [x.detach().requires_grad_(requires_grad) for x in tensors]


def case_of(name: str, **changes) -> Case:
    return replace(BY_NAME[name], **changes)


def capture(step):
    """A graph of one step, and what it writes; after a step on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        return graph, step()


def given_selection(case: Case, aux, query, key, value, landmarks):
    """The definition on the selection (and the landmarks' rounding) that `aux` reports: out, lse."""
    Z = reference.pool_landmarks(query, case.M, grid=case.grid, num_prefix_tokens=case.prefix) if case.pooled else landmarks
    Z = Z + (aux.landmarks.detach().to(Z.dtype) - Z).detach()
    return reference.attention_given(
        query, key, value, Z, aux.topk_indices, aux.experts, shared_expert=case.shared_expert, **case.scales
    )


def assert_same(got, expected):
    """Equal up to the last bits: for what is promised up to rounding only."""
    fine = torch.finfo(torch.promote_types(got.dtype, torch.float32)).eps
    torch.testing.assert_close(got, expected, rtol=max(8 * fine, 2 * torch.finfo(got.dtype).eps), atol=8 * fine)


def assert_rivals(name: str, got, exact, rival, *, terms: float = 1.0):
    """error(got) <= 2 error(rival) + tiny, for the largest and the mean error; NaN fails.

    `exact` is the float64 definition, `rival` the same definition in the dtype of the test. `tiny` is a few float32
    roundings of the result or of `terms`, the size of what cancels in it: where a rival is exact by luck
    (one key: softmax = 1), another order of the same sums is still right. In float64 the definition itself rounds, so
    there is no rival: `tiny` is 1e-11.
    """
    assert got.shape == exact.shape, name
    eps = 1e-12 if got.dtype == F64 else torch.finfo(torch.float32).eps
    size = max(terms, exact.abs().max().item())
    error, rivals = (got.to(F64) - exact).abs(), (rival.to(F64) - exact).abs()
    for what, of, tiny in (("largest", torch.amax, 16 * eps * size), ("mean", torch.mean, 2 * eps * size)):
        err, bound = of(error).item(), 2 * of(rivals).item() + tiny
        assert err <= bound, f"{name}: {what} error {err:.3g}, bound {bound:.3g}, values up to {size:.3g}"
