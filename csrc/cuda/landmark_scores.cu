// Landmark scores and compressed values in one pass over the keys and values.
//
// score_compress: one block per (batch, head, part of the key range, group of landmarks); one warp owns 16 landmarks (two warps above
// 128 columns, half of the values each) and walks over key tiles that the block brings in with cp.async, two stages deep where they fit:
//   S = Z k^T  -> the largest of every group and what bounds the others, or all of them, unscaled in fp32, or as fp16: the selection then computes those again
//   that rounding made equal
//   online softmax over scale * S, O += P v  -> partial values, maximum and sum of this part
// Where fp32 may be rounded to TF32, the values are, and S is not.
// The keys of a tile are permuted, so that the columns of one lane are consecutive keys; where all scores are stored, four by four of four lanes.
// On sm_90a, in 16 bits with many landmarks or keys, specialists do the same: four warps bring keys and values, a share of the rows each, whole
// warpgroups own 64 landmarks, or share them, each with a part of the key range of its own.
// combine: a warp per landmark, or half of one, unless that is done beside the choice of its keys (combines_with_topk).
#include "launch.h"
#include "specialists.cuh"
#include "stages.cuh"

namespace mita {
namespace {

template <class C> constexpr int kKeys = sizeof(typename C::T) == 2 && C::DP <= 128 ? 64 : 32;  // of one tile
template <class C> constexpr int kLaneKeys = kKeys<C> / 4;                                       // of one lane

// The tiles [first, last) of keys that part `split` consists of.
struct Part {
  int first, last;
  __device__ Part(int length, int keys, int splits, int split) {
    const int tiles = ceil_div(length, keys), size = ceil_div(tiles, splits);
    first = split * size, last = min(tiles, first + size);
  }
};

// Of a tile, the key that column i of lane t, i < 2, has in product n; it is row 8n + 2t + i there.
template <class C> __device__ inline int key_of_column(bool all_scores, int t, int n, int i) {
  return all_scores ? n / 2 * 16 + t * 4 + n % 2 * 2 + i : t * kLaneKeys<C> + n * 2 + i;
}
template <class C> __device__ inline int key_of_row(bool all_scores, int row) { return key_of_column<C>(all_scores, row / 2 % 4, row / 8, row % 2); }

constexpr int kGroupLandmarks = 48;  // of more, blocks of whole warpgroups take them

// What is stored of a group's scores (kGroupKeys). The two largest are found with their places in the lowest bits, by exclusive or: they
// are those of the scores but for these bits, and an infinity becomes NaN.
struct GroupScores {
  float highest, first = -kInfinity, second = -kInfinity;

  __device__ static float larger(float a, float b) {  // NaN if one is
    float x;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
    return x;
  }
  __device__ void add(float score, int place) {
    const float placed = __uint_as_float(__float_as_uint(score) ^ place);
    second = fmaxf(second, fminf(first, placed));
    first = larger(first, placed);
  }
  __device__ void add_neighbour() {
    const auto of_neighbour = [](float x) { return __shfl_xor_sync(kAllLanes, x, 1); };
    highest = fmaxf(highest, of_neighbour(highest));
    second = fmaxf(fmaxf(second, of_neighbour(second)), fminf(first, of_neighbour(first)));
    first = larger(first, of_neighbour(first));
  }
  __device__ float others() const {
    constexpr std::uint32_t kPlace = kGroupKeys - 1;
    const std::uint32_t bits = __float_as_uint(second), order = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
    return __uint_as_float(first != first ? 0xffffffffu : (order & ~kPlace) | ((__float_as_uint(first) ^ __float_as_uint(highest)) & kPlace));
  }
};

// The softmax of a warp's 16 landmarks over a part of the keys.
template <class C> struct Compression {
  using T = typename C::T;
  static constexpr int kTiles = kKeys<C> / 8;
  OnlineSoftmax<T> softmax;
  float values[C::kColumns / 8][4];

  // From the scores of landmarks m and m + 8 (a lane's two rows) to what is stored of them, and to weights. halves: those of `p`, or a constant.
  __device__ Weights<T, kTiles> add(const LandmarkParams& p, bool halves, float (&s)[kTiles][4], std::uint32_t bh, int m, int tile, int length) {
    const Problem& x = p.problem;
    const bool all_scores = p.group == 1;
    const int first_key = tile * kKeys<C>, t = threadIdx.x % 4, lane_key = first_key + key_of_column<C>(all_scores, t, 0, 0);
    const auto each_absent = [&](auto&& f) {
      if ((tile + 1) * kKeys<C> > length)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (first_key + key_of_column<C>(all_scores, t, n, i % 2) >= length) f(s[n][i]);
    };
    each_absent([](float& score) { score = NAN; });
    float highest[2];
    const auto find_highest = [&] { highest[0] = highest_of(s, 0), highest[1] = highest_of(s, 1); };
    find_highest();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool stored = column_of_warp<C>() == 0 && m + 8 * i < x.M;
      float* scores = p.scores + std::uint64_t(bh * x.M + m + 8 * i) * p.pitch + (all_scores ? lane_key : lane_key / kGroupKeys * 2);
      if (halves) {
        const float factor = p.scale == 0.0f ? 1.0f : fabsf(p.scale);
        __half* const logits = reinterpret_cast<__half*>(scores - lane_key) + lane_key;
        if (stored)
#pragma unroll
          for (int n = 0; n < kTiles; n += 2)
            *reinterpret_cast<uint2*>(logits + 8 * n) = {pack<__half>(s[n][2 * i] * factor, s[n][2 * i + 1] * factor), pack<__half>(s[n + 1][2 * i] * factor, s[n + 1][2 * i + 1] * factor)};
      } else if (all_scores) {
        if (stored)
#pragma unroll
          for (int n = 0; n < kTiles; n += 2)
            *reinterpret_cast<float4*>(scores + 8 * n) = make_float4(s[n][2 * i], s[n][2 * i + 1], s[n + 1][2 * i], s[n + 1][2 * i + 1]);
      } else {
        constexpr bool kHalf = kLaneKeys<C> < kGroupKeys;  // is a lane's half of a group?
        GroupScores group{highest[i]};
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) group.add(s[n][2 * i + j], (kHalf ? lane_key % kGroupKeys : 0) + 2 * n + j);
        if constexpr (kHalf) group.add_neighbour();
        if (stored && (!kHalf || lane_key % kGroupKeys == 0)) store_to_stay(scores, group.highest, group.others());
      }
    }
    const float scale = p.scale * kLogit<T>, positive = positive_scale(s, scale);
    if (positive != scale) find_highest();
    each_absent([](float& logit) { logit = -kInfinity; });
    softmax.update(s, highest, positive, values);
    return Weights<T, kTiles>(s);
  }

  __device__ void store(const LandmarkParams& p, std::int64_t bh, int split, int m) {
    const Problem& x = p.problem;
    const int lane = threadIdx.x % 32;
    softmax.finish();
    const std::int64_t row0 = (bh * p.splits + split) * x.M;
    const float one[2] = {1.0f, 1.0f};
    store_partial_rows<C>(values, one, x.D, lane, [&](int i) {
      const int row = m - lane / 4 + i;
      return row < x.M ? p.partial_values + (row0 + row) * x.D : nullptr;
    });
    if (lane % 4 == 0 && column_of_warp<C>() == 0)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (m + 8 * i < x.M) *reinterpret_cast<float2*>(p.partial_state + 2 * (row0 + m + 8 * i)) = make_float2(softmax.maximum[i], softmax.sum[i]);
  }
};

template <class C> struct Layout : C {
  static constexpr int kWarps = sizeof(typename C::T) == 2 ? 8 : 4;          // at most; fewer where there are fewer landmarks
  static constexpr int kWarpsAtOnce = sizeof(typename C::T) == 2 ? 20 : 12;  // of a multiprocessor, by registers
  static constexpr int kStages = C::DP * sizeof(typename C::T) <= 512 ? 2 : 1;
  struct Shared {
    UnitStage<typename C::T, C::DP, kKeys<C>> stage[kStages];
    TileStorage<typename C::T, C::DP, rows_of_block<C>(32 * kWarps)> landmarks;  // last: only the rows in use are allocated
  };
  static_assert(sizeof(Shared) <= 96 * 1024);
  // Bounds, for registers: of 64 columns five blocks of one warpgroup on a multiprocessor, or two of two.
  static constexpr bool kMany = C::kGroups && C::DP == 64;
  static constexpr int kThreads = kMany ? 32 * kWarpsAtOnce / 2 : 32 * kWarps, kBlocks = kMany ? 2 : 1;

  int warps, groups;  // groups: of landmarks, a block for each
  std::size_t bytes;
  explicit Layout(int M)
      : warps(std::min(kWarps, C::kGroups ? ceil_div(M, 64) * 4 : ceil_div(M, 16) * C::kSharers)),
        groups(ceil_div(M, rows_of_block<C>(32 * warps))),
        bytes(sizeof(Shared) - rows_of_block<C>(32 * (kWarps - warps)) * C::DP * sizeof(typename C::T)) {}
  int at_once() const { return std::min(kWarpsAtOnce / warps, blocks_by_memory(bytes)); }  // blocks of a multiprocessor
};

template <class C> using Exact = std::conditional_t<std::is_same_v<typename C::T, Tf32>, Config<float, C::DP>, C>;

template <class C> __global__ void __launch_bounds__(Layout<C>::kThreads, Layout<C>::kBlocks) score_compress_kernel(const LandmarkParams p) {
  using L = Layout<C>;
  using T = typename C::T;
  constexpr int DP = C::DP, kRows = kKeys<C>;
  extern __shared__ __align__(kPanel) unsigned char memory[];
  typename L::Shared& shared = *reinterpret_cast<typename L::Shared*>(memory);
  const Window window(memory);

  const Problem& x = p.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rows = rows_of_block<C>(blockDim.x), groups = ceil_div(x.M, rows);
  const int m0 = (blockIdx.x % groups) * rows, split = blockIdx.x / groups % p.splits, bh = blockIdx.x / groups / p.splits;
  const int b = bh / x.H, h = bh % x.H, m = m0 + row_of_warp<C>(warp) + lane / 4;
  const Span keys = span(x.keys, b);
  const Part part(keys.length, kRows, p.splits, split);

  const auto load_stage = [&](int tile) {
    auto& stage = shared.stage[tile & (L::kStages - 1)];
    const int head = h / (x.H / x.Hkv), key0 = tile * kRows;
    const auto key_of = [key0, all_scores = p.group == 1, length = keys.length](int row) {  // a ragged tile lacks the last row and the last key
      const int key = key0 + key_of_row<C>(all_scores, row);
      return key < length ? key : -1;
    };
    load_rows<T, DP>(kRows, x.D, key0 + kRows <= keys.length ? kRows : kRows - 1, key_of,
                     Copy<T, DP>(stage.k.in(window), p.k, b, head, keys.start), Copy<T, DP>(stage.v.in(window), p.v, b, head, keys.start));
  };

  constexpr int kAhead = L::kStages - 1;
  if (kAhead > 0 && part.first < part.last) load_stage(part.first);
  wait_for_kernel_before();
  let_next_kernel_start();
  load_rows<T, DP>(rows, x.D, x.M - m0, [m0](int i) { return m0 + i; }, Copy<T, DP>(shared.landmarks.in(window), p.landmarks, b, h, 0));
  commit_loads();
  wait_loads<0>();
  __syncthreads();

  OwnRows<C> landmarks;
  landmarks.load(shared.landmarks.in(window).from_row(own_rows<C>(warp)), lane);
  Compression<C> compression;
  clear(compression.values);
  for (int tile = part.first; tile < part.last; ++tile) {
    if (tile + kAhead < part.last) load_stage(tile + kAhead);
    commit_loads();
    wait_loads<kAhead>();
    __syncthreads();
    auto& stage = shared.stage[tile & (L::kStages - 1)];
    float s[kRows / 8][4];
    product<Exact<C>>(s, landmarks, stage.k.in(window), lane);
    wait_products<C, 0>(s);
    auto weights = compression.add(p, p.halves, s, bh, m, tile, keys.length);
    add_weighted_rows<C>(compression.values, weights, stage.v.in(window), lane);
    wait_products<C, 0>(compression.values);
    __syncthreads();
  }
  compression.store(p, bh, split, m);
}

// ---- by specialists ------------------------------------------------------------------------------------------------

template <class C> struct Specialists : C {
  static constexpr int kGroups = C::DP == 64 ? 4 : 2, kThreads = 128 * (kGroups + 1), kStages = C::DP == 64 ? 10 : 5;
  // Of a piece of work: warpgroups of other landmarks, 64 each, and those beside them, of other parts of the keys.
  __host__ __device__ static int groups(int M) { return M > 64 * (kGroups - 1) ? kGroups : ceil_div(M, 64); }
  __host__ __device__ static int parts(int M) { return kGroups / groups(M); }
  __host__ __device__ static int row_pieces(int M) { return ceil_div(M, 64 * groups(M)); }
  struct Shared {
    UnitStage<typename C::T, C::DP, kKeys<C>> stages[kStages];
    TileStorage<typename C::T, C::DP, 64 * kGroups> landmarks;
    std::uint64_t of_stages[kStages][2], of_landmarks[1][2];
  };
};

// A block takes one piece of work after the other: some landmarks of a head, and as many parts of its keys as there are warpgroups left. Those take the
// tiles of all these parts by turns: that reads memory in one place.
template <class C> __global__ void __launch_bounds__(Specialists<C>::kThreads, 1) score_compress_specialists_kernel(const LandmarkParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using L = Specialists<C>;
  using T = typename C::T;
  constexpr int DP = C::DP, kRows = kKeys<C>;
  extern __shared__ __align__(kPanel) unsigned char memory[];
  const Window window(memory);
  auto& shared = *reinterpret_cast<typename L::Shared*>(memory);
  Ring<L::kStages> stage{window.of(shared.of_stages), 0};
  Ring<1> landmarks{window.of(shared.of_landmarks), 0};
  const Problem& x = p.problem;
  const int groups = L::groups(x.M), parts = L::parts(x.M);
  if (threadIdx.x == 0) {
    stage.init(128, 4 * groups), landmarks.init(128, 4 * groups * parts);
    fence_barriers();
  }
  wait_for_kernel_before();
  __syncthreads();

  const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const int row_pieces = L::row_pieces(x.M), part_pieces = ceil_div(p.splits, parts), pieces = x.B * x.H * row_pieces * part_pieces;
  struct Piece {
    int bh, m0, first_split;
    Span keys;
    int parts, first, last, rounds;  // tiles: those of all parts
  };
  const auto piece_of = [&](int item) {
    const int bh = item / (row_pieces * part_pieces), first_split = item / row_pieces % part_pieces * parts;
    const Span keys = span(x.keys, bh / x.H);
    const int own = min(parts, p.splits - first_split), first = Part(keys.length, kRows, p.splits, first_split).first;
    const int last = Part(keys.length, kRows, p.splits, first_split + own - 1).last;
    return Piece{bh, item % row_pieces * 64 * groups, first_split, keys, own, first, last, ceil_div(max(last - first, 0), own)};
  };
  if (group == L::kGroups) {
    if constexpr (DP == 64) keep_registers<64>();
    for (int item = blockIdx.x; item < pieces; item += gridDim.x, ++landmarks.count) {
      const Piece piece = piece_of(item);
      const int b = piece.bh / x.H, h = piece.bh % x.H, head = h / (x.H / x.Hkv);
      landmarks.wait_free();
      for (int i = 16 * warp; i < 64 * groups; i += 64)
        load_rows_by_warp<16, T, DP>([&](int row) { return piece.m0 + i + row < x.M ? piece.m0 + i + row : -1; }, piece.m0 + i + 16 <= x.M, x.D,
                                     Copy<T, DP>(shared.landmarks.in(window).from_row(i), p.landmarks, b, h, 0));
      landmarks.there().arrive_loaded();
      for (int round = 0; round < piece.rounds; ++round)
        for (int i = 0; i < parts; ++i, ++stage.count) {
          stage.wait_free();
          if (const int tile = piece.first + round * piece.parts + i; i < piece.parts && tile < piece.last) {
            const auto& to = shared.stages[stage.at()];
            const int key0 = tile * kRows;
            const auto key_of = [key0, all_scores = p.group == 1, first = 16 * warp, length = piece.keys.length](int row) {
              const int key = key0 + key_of_row<C>(all_scores, first + row);
              return key < length ? key : -1;
            };
            load_rows_by_warp<16, T, DP>(key_of, key0 + kRows <= piece.keys.length, x.D,
                                         PassingCopy<T, DP>(to.k.in(window).from_row(16 * warp), p.k, b, head, piece.keys.start),  // so the scores stay
                                         PassingCopy<T, DP>(to.v.in(window).from_row(16 * warp), p.v, b, head, piece.keys.start));
          }
          stage.there().arrive_loaded();
        }
    }
    wait_loads<0>();
  } else {
    if constexpr (DP == 64) take_registers<104>();
    const int own_part = group / groups, first_row = 64 * (group % groups);
    if (own_part >= parts) return;
    for (int item = blockIdx.x; item < pieces; item += gridDim.x, ++landmarks.count) {
      const Piece piece = piece_of(item);
      const int split = piece.first_split + own_part, m = piece.m0 + first_row + 16 * warp + lane / 4;
      Compression<C> compression;
      clear(compression.values);
      pin(compression.values);
      landmarks.wait_there();
      for (int round = 0; round < piece.rounds; ++round) {
        const auto at = stage + (round * parts + own_part);
        at.wait_there();
        if (const int tile = piece.first + round * piece.parts + own_part; own_part < piece.parts && tile < piece.last) {
          fence_loads();
          float s[kRows / 8][4];
          product<C>(s, GroupRows<T, DP>{shared.landmarks.in(window).from_row(first_row)}, shared.stages[at.at()].k.in(window), lane);
          wait_products<C, 0>(s);
          auto weights = compression.add(p, false, s, piece.bh, m, tile, piece.keys.length);
          add_weighted_rows<C>(compression.values, weights, shared.stages[at.at()].v.in(window), lane);
          wait_products<C, 0>(compression.values);
        }
        if (lane == 0) at.done().arrive();
      }
      if (split < p.splits) compression.store(p, piece.bh, split, m);
      __syncwarp();
      if (lane == 0) landmarks.done().arrive();
      stage.count += piece.rounds * parts;
    }
  }
#else
  __trap();
#endif
}

// H200, scores and choice of keys by specialists, against blocks: of up to 64 landmarks 93 to 116 % below 16384 keys, 93 to 100 % of 20000; of more, 86 to 104 % at 64 columns
// and 77 to 112 % at 128, least with many heads or keys.
constexpr int kManyKeys = 16384;
bool by_specialists(const Problem& x) { return (x.M > 64 || x.keys.max_length >= kManyKeys) && !stores_halves(x); }  // where whole warpgroups suit

constexpr int kCombineThreads = 128;

template <class T> __global__ void __launch_bounds__(kCombineThreads) combine_kernel(const LandmarkParams p) { combine_parts<T>(p, blockIdx.x); }

}  // namespace

// As many as busy a large GPU least long. H200, forward of 337 shapes: with these 0 to 2 % longer, in the mean of those of a kind, than with the best number.
int score_splits(const Problem& x) {
  int splits = 1;
  dispatch(x, x.M > kGroupLandmarks, [&](auto config) {
    using C = decltype(config);
    const auto count = [&](int groups, int parts, int blocks) {  // of landmarks; of the keys of a piece of work; of a multiprocessor
      splits = parts * least_busy(std::int64_t(x.B) * x.H * groups, ceil_div(x.keys.max_length, kKeys<C>), parts, blocks * kMultiprocessors, 8).parts;
      return cudaSuccess;
    };
    if constexpr (C::kGroups)
      if (by_specialists(x)) return count(Specialists<C>::row_pieces(x.M), Specialists<C>::parts(x.M), 1);
    const Layout<C> layout(x.M);
    return count(layout.groups, 1, layout.at_once());
  });
  return splits;
}

cudaError_t launch_landmark_scores(const LandmarkParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  return dispatch(x, x.M > kGroupLandmarks, [&](auto config) {
    using C = decltype(config);
    const unsigned heads = static_cast<unsigned>(x.B) * x.H;
    if constexpr (C::kGroups)
      if (by_specialists(x)) {
        using L = Specialists<C>;
        const std::int64_t pieces = std::int64_t(heads) * L::row_pieces(x.M) * ceil_div(p.splits, L::parts(x.M));
        return launch_specialists(p.early, score_compress_specialists_kernel<C>, L::kThreads, sizeof(typename L::Shared), pieces, stream, p);
      }
    const Layout<C> layout(x.M);
    return launch(p.early, score_compress_kernel<C>, heads * p.splits * layout.groups, 32 * layout.warps, layout.bytes, stream, p);
  });
}

cudaError_t launch_landmark_combine(const LandmarkParams& p, cudaStream_t stream) {
  return dispatch_dtype(p.problem.dtype, [&](auto element) { return launch(combine_kernel<decltype(element)>, combine_blocks(p.problem, kCombineThreads), kCombineThreads, 0, stream, p); });
}

}  // namespace mita
