// Routing: the s landmarks with the largest q . Z for every query, best first; score ties go to the lower landmark, NaN last.
// A block takes its queries in passes, the next ones on their way while it works; one warp owns 16 queries of a pass. Landmark
// tiles go through shared memory once per round, and round r finds the best pair (score, landmark) after the one of round
// r - 1 in the total order: s > 1 needs no list. Round 0 compares floats, later rounds the order itself.
// On sm_90a, for one route of 16-bit elements, specialists do it: a block takes one piece of a head's queries after the other; some warps bring
// the landmarks, which stay for all passes of a piece, and the queries, 64 of one pass at a time; whole warpgroups take the passes in turn.
#include "launch.h"
#include "specialists.cuh"
#include "stages.cuh"

namespace mita {
namespace {

template <class C> struct Layout : C {
  static constexpr bool kHalf = sizeof(typename C::T) == 2;
  static constexpr int kWarps = (kHalf ? 8 : 4) / (C::DP <= 128 ? 1 : 2);
  static constexpr int kLandmarks = 8 * kWarps;  // of one tile
  struct Shared {
    TileStorage<typename C::T, C::DP, kLandmarks> stage[2];
    TileStorage<typename C::T, C::DP, 16 * kWarps> queries[2];  // of this pass and the next
  };
  static_assert(sizeof(Shared) <= 99 * 1024);
};

struct Best {
  std::uint32_t score;
  int landmark;
  __device__ bool after(const Best& previous) const { return score < previous.score || (score == previous.score && landmark > previous.landmark); }
};

template <class C> __global__ void __launch_bounds__(32 * Layout<C>::kWarps, 2) route_kernel(const RouteParams p, const int most_passes) {
  using L = Layout<C>;
  using T = typename C::T;
  constexpr int DP = C::DP, kRows = 16 * L::kWarps, kTile = L::kLandmarks, kTiles = kTile / 8;
  extern __shared__ __align__(kPanel) unsigned char memory[];
  typename L::Shared& shared = *reinterpret_cast<typename L::Shared*>(memory);
  const Window window(memory);

  const Problem& x = p.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
  const int N = x.queries.max_length, block_rows = most_passes * kRows, blocks = ceil_div(N, block_rows);
  const int first_row = blockIdx.x % blocks * block_rows, passes = min(most_passes, ceil_div(N - first_row, kRows)), bh = blockIdx.x / blocks;
  const int b = bh / x.H, h = bh % x.H, length = span(x.queries, b).length;
  const int tiles = ceil_div(x.M, kTile), steps = x.s * tiles;  // steps run through the tiles once per round
  const auto load_landmarks = [&](int buffer, int step) {
    const int m0 = step % tiles * kTile;
    load_rows<T, DP>(kTile, x.D, x.M - m0, [m0](int i) { return m0 + i; }, Copy<T, DP>(shared.stage[buffer].in(window), p.landmarks, opaque(b), opaque(h), 0));
  };
  const auto load_queries = [&](int pass) {
    const int n0 = first_row + pass * kRows, batch = opaque(b);
    load_rows<T, DP>(kRows, x.D, length - n0, [n0](int i) { return n0 + i; },
                     Copy<T, DP>(shared.queries[pass & 1].in(window), p.q, batch, opaque(h), span(x.queries, batch).start));
  };
  load_queries(0);
  load_landmarks(0, 0);
  commit_loads();

  HeldRows<T, DP> rows;
  Best previous[2], best[2];
  BestLandmark highest;
  int pass = 0, step = 0;
  for (int buffer = 0; pass < passes; buffer ^= 1, step = step + 1 < steps ? step + 1 : (++pass, 0)) {
    if (step + 1 < steps || pass + 1 < passes) {
      if (step + 1 == steps) load_queries(pass + 1);
      load_landmarks(buffer ^ 1, step + 1 < steps ? step + 1 : 0);
    }
    commit_loads();
    wait_loads<1>();
    __syncthreads();
    if (step == 0) {
      rows.load(shared.queries[pass & 1].in(window).from_row(16 * warp), lane);
      highest = BestLandmark();
    }
    float s[kTiles][4];
    product<C>(s, rows, shared.stage[buffer].in(window), lane);
    const int tile = step % tiles, m0 = tile * kTile + 2 * t;
    if (step < tiles) {
      highest.update(s, tile * kTile, x.M);
    } else {
      if (tile == 0) best[0] = best[1] = {0, 0};
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Best next = {ordered(s[n][i]), m0 + 8 * n + (i & 1)};
          if (next.score > best[i / 2].score && next.landmark < x.M && next.after(previous[i / 2])) best[i / 2] = next;
        }
    }
    __syncthreads();
    if (tile + 1 < tiles) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (step < tiles) {
        best[i] = {highest.landmark[i] < 0 ? 1 : ordered(highest.score[i]), highest.of_row(i)};
      } else {
#pragma unroll
        for (int d = 1; d < 4; d <<= 1) {
          const Best other = {__shfl_xor_sync(kAllLanes, best[i].score, d), __shfl_xor_sync(kAllLanes, best[i].landmark, d)};
          if (best[i].after(other)) best[i] = other;
        }
      }
      previous[i] = best[i];
      const int n = first_row + pass * kRows + 16 * warp + g + 8 * i;
      if (t == 0 && n < N) p.experts[(std::int64_t(bh) * N + n) * x.s + step / tiles] = n < length ? best[i].landmark : -1;
    }
  }
}

// ---- by specialists ------------------------------------------------------------------------------------------------

constexpr int kGroups = 4, kThreads = 128 * (kGroups + 1);
constexpr int kTileLandmarks = 64, kStages = 8;  // stages for all landmarks

template <class C> struct Specialists : C {
  static constexpr int kSets = C::DP == 64 ? 10 : 6;
  struct Shared {
    TileStorage<typename C::T, C::DP, kPassRows> queries[kSets];
    TileStorage<typename C::T, C::DP, kTileLandmarks> stages[kStages];
    std::uint64_t of_queries[kSets][2], of_landmarks[kStages][2];
  };
};

template <class C> __global__ void __launch_bounds__(kThreads, 1) route_specialists_kernel(const RouteParams p, const int parts) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using L = Specialists<C>;
  using T = typename C::T;
  constexpr int DP = C::DP;
  extern __shared__ __align__(kPanel) unsigned char memory[];
  const Window window(memory);
  auto& shared = *reinterpret_cast<typename L::Shared*>(memory);
  Ring<L::kSets> set{window.of(shared.of_queries), 0};
  Ring<kStages> stage{window.of(shared.of_landmarks), 0};
  if (threadIdx.x == 0) {
    set.init(128, 4), stage.init(128, 4 * kGroups);
    fence_barriers();
  }
  __syncthreads();

  const Problem& x = p.problem;
  const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const int N = x.queries.max_length, piece_rows = ceil_div(ceil_div(N, kPassRows), parts) * kPassRows, pieces = x.B * x.H * parts, tiles = ceil_div(x.M, kTileLandmarks);
  // A warp's share of 64 rows from `first` on, of those before `end`.
  const auto bring = [&](const auto& place, const Tile<T, DP>& target, const Rows& rows, int b, int h, std::int64_t start, int first, int end) {
    constexpr int kShare = 16;
    first += kShare * warp;
    place.wait_free();
    load_rows_by_warp<kShare, T, DP>([=](int i) { return first + i < end ? first + i : -1; }, first + kShare <= end, x.D,
                                     Copy<T, DP>(target.from_row(kShare * warp), rows, b, h, start));
    place.there().arrive_loaded();
  };
  for (int left = pieces - blockIdx.x; left > 0; left -= gridDim.x) {  // the last ones first: pooling has left them in the L2
    const int item = left - 1, bh = item / parts, b = bh / x.H, h = bh % x.H, first = item % parts * piece_rows, passes = ceil_div(max(min(N - first, piece_rows), 0), kPassRows);
    const Span queries = span(x.queries, b);
    if (group == kGroups) {
      for (int tile = 0; tile < tiles; ++tile)
        bring(stage + tile, shared.stages[(stage + tile).at()].in(window), p.landmarks, b, h, 0, tile * kTileLandmarks, x.M);
      for (int pass = 0; pass < passes; ++pass)
        bring(set + pass, shared.queries[(set + pass).at()].in(window), p.q, b, h, queries.start, first + pass * kPassRows, queries.length);
    } else {
      for (int tile = 0; tile < tiles; ++tile) (stage + tile).wait_there();
      const int skip = (group + kGroups - int(set.count % kGroups)) % kGroups;
      for (int pass = skip; pass < passes; pass += kGroups) {
        const auto own = set + pass;
        own.wait_there();
        fence_loads();
        const BestLandmark highest =
            route_tile<C, kTileLandmarks>({shared.queries[own.at()].in(window)}, [&](int tile) { return shared.stages[(stage + tile).at()].in(window); }, x.M);
        if (lane == 0) own.done().arrive();
        highest.store(p.experts + std::int64_t(bh) * N, first + pass * kPassRows + 16 * warp + lane / 4, queries.length, N);
      }
      if (lane == 0)
        for (int tile = 0; tile < tiles; ++tile) (stage + tile).done().arrive();
    }
    set.count += passes;
    stage.count += tiles;
  }
  wait_loads<0>();
#else
  __trap();
#endif
}

}  // namespace

cudaError_t launch_route(const RouteParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  if (x.s < 1) return cudaErrorInvalidValue;
  return dispatch(x.dtype, x.D, x.s == 1 && x.M <= kStages * kTileLandmarks, [&](auto config) {
    using C = decltype(config);
    if constexpr (C::kGroups) {
      const std::int64_t heads = std::int64_t(x.B) * x.H;
      const int parts = least_busy(heads, ceil_div(x.queries.max_length, kPassRows), 1, kMultiprocessors, 2).parts;
      return launch_specialists(route_specialists_kernel<C>, kThreads, sizeof(typename Specialists<C>::Shared), heads * parts, stream, p, parts);
    } else {
      using L = Layout<C>;
      const int tiles = ceil_div(x.queries.max_length, 16 * L::kWarps);
      const std::int64_t heads = std::int64_t(x.B) * x.H;
      const int passes = heads * tiles >= 4 * kBlocksOfAWave ? 4 : 1;  // where there is work enough for that
      return launch(route_kernel<C>, static_cast<unsigned>(heads * ceil_div(tiles, passes)), 32 * L::kWarps, sizeof(typename L::Shared), stream, p, passes);
    }
  });
}

}  // namespace mita
