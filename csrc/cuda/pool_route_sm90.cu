// Landmark queries and the expert of every query in one pass over the queries, for sm_90a: long sequences of 16-bit elements of up to 64 columns, one
// route, windows in one dimension. By specialists; a block takes one piece of a head's queries after the other, and has them in shared memory until all
// pieces of that head are pooled everywhere:
//   one warpgroup brings the queries, 64 at a time, into a ring of tiles;
//   two, by turns, sum what a piece gives to windows, each warp some of the columns, and leave that in device memory: landmarks, where a window is all in
//   one piece;
//   two warps make the other landmarks, some of each head, of what its pieces left, in their order: the same bits as those of `pool`;
//   two bring all landmarks of a head;
//   three warpgroups route the queries, 64 at a time, as `route` does, and count those of each expert, for `group`.
// Nobody counts arrivals or fences: memory that others wait for is filled with bits that no sum and no landmark has, and read until they are gone.
// All blocks must run at once, and know that it is filled: the launch is a cooperative one.
#include <cooperative_groups.h>

#include "launch.h"
#include "specialists.cuh"
#include "stages.cuh"

namespace mita {
namespace {

constexpr int kDP = 64, kRouters = 3, kPoolers = 2, kThreads = 128 * (kRouters + kPoolers + 2);  // warpgroups
constexpr int kTileRows = 64, kPieceTiles = kPoolPiece / kTileRows, kTiles = 3 * kPieceTiles;  // of the ring
constexpr int kMostLandmarks = 128, kLandmarkTiles = kMostLandmarks / kTileRows;

template <class T> struct Shared {
  TileStorage<T, kDP, kTileRows> queries[kTiles], landmarks[2][kLandmarkTiles];
  Range windows[kMostLandmarks];
  std::int32_t counts[3][kMostLandmarks];  // of the queries of an expert, for the pieces that have landmarks and those before
  std::uint64_t of_queries[kTiles][2], of_landmarks[2][2];
};
static_assert(sizeof(Shared<__half>) <= 227 * 1024);

// Loads 8 or 16 bytes that another block may be about to write. Until then they are absent: all ones, two NaNs or one that no instruction makes.
template <class V> __device__ inline V look(const V* from) {
  V x;
  if constexpr (sizeof(V) == 8) asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(from) : "memory");
  else asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from) : "memory");
  return x;
}
template <class V> __device__ inline bool is_absent(const V& x) {
  bool absent = ~x.x == 0 || ~x.y == 0;
  if constexpr (sizeof(V) == 16) absent |= ~x.z == 0 || ~x.w == 0;
  return absent;
}
// NUMBER of them, as often as it takes, all at once from when the first one is there; from(i): null for zeros.
template <int NUMBER, class V, class From> __device__ inline void look_until_there(V (&x)[NUMBER], From from) {
  const auto look_from = [&](int first, int last) {
    bool absent = false;
#pragma unroll
    for (int i = first; i < last; ++i) {
      x[i] = V{};
      if (const V* its = from(i)) x[i] = look(its);
    }
#pragma unroll
    for (int i = first; i < last; ++i) absent |= is_absent(x[i]);
    return absent;
  };
  while (look_from(0, 1)) continue;
  while (look_from(1, NUMBER)) continue;
}

template <class T> __global__ void __launch_bounds__(kThreads, 1) pool_route_kernel(const PoolRouteParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using C = Config<T, kDP, true>;
  constexpr int kChunks = kDP / kChunk<T>;
  extern __shared__ __align__(kPanel) unsigned char memory[];
  const Window window(memory);
  auto& shared = *reinterpret_cast<Shared<T>*>(memory);
  Ring<kTiles> tile{window.of(shared.of_queries), 0};
  Ring<2> landmarks{window.of(shared.of_landmarks), 0};
  if (threadIdx.x == 0) {
    tile.init(128, 128 + 4), landmarks.init(64, 32 * kRouters);
    fence_barriers();
  }
  const Problem& x = p.problem;
  for (int m = threadIdx.x; m < x.M; m += kThreads) {
    const PooledTokens its = PooledTokens::of<int>(p.windows, m);
    shared.windows[m] = {its.first, its.first + its.area};
    for (auto& counts : shared.counts) counts[m] = 0;
  }
  const int N = x.queries.max_length, pieces = pool_pieces(x), all = x.B * x.H * pieces;
  if (const int n = blockIdx.x % pieces * kPoolPiece + threadIdx.x; threadIdx.x < kPoolPiece && n < N)  // the first piece, into the L2 meanwhile
    asm volatile("prefetch.global.L2 [%0];" ::"l"(head_rows<T>(p.q, blockIdx.x / pieces / x.H, blockIdx.x / pieces % x.H, n)));
  for (std::size_t i = blockIdx.x * kThreads + threadIdx.x; i < pool_route_bytes(x) / sizeof(uint4); i += gridDim.x * kThreads)
    static_cast<uint4*>(p.memory)[i] = {~0u, ~0u, ~0u, ~0u};
  const int chunks = ceil_div(N, kGroupChunk);
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < x.B * x.H * x.M * chunks; i += gridDim.x * kThreads) p.counts[i] = 0;
  cooperative_groups::this_grid().sync();
  let_next_kernel_start();

  const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  float* const partial = static_cast<float*>(p.memory);
  void* const known = partial + std::int64_t(x.B) * x.H * (pieces + x.M) * x.D;
  const auto row_of_sums = [&](int bh, int piece, int m) { return partial + (std::int64_t(bh) * (pieces + x.M) + piece + m) * x.D; };
  const auto row_of_landmark = [&](void* of, int bh, int m) { return static_cast<T*>(of) + (std::int64_t(bh) * x.M + m) * x.D; };
  const auto in_one_piece = [](const Range& window) { return window.first / kPoolPiece == (window.last - 1) / kPoolPiece; };
  const auto each_piece = [&](auto&& work) {  // of this block
#pragma unroll 1
    for (int item = blockIdx.x; item < all; item += gridDim.x) {
      const int bh = item / pieces, piece = item % pieces, first = piece * kPoolPiece, last = min(N, first + kPoolPiece), tiles = ceil_div(last - first, kTileRows);
      work(bh, piece, first, last, tiles);
      tile.count += tiles, ++landmarks.count;
    }
  };
  if (group < kRouters) {
    each_piece([&](int bh, int piece, int first, int last, int tiles) {
      landmarks.wait_there();
      fence_loads();
      for (int i = (group + kRouters - int(tile.count % kRouters)) % kRouters; i < tiles; i += kRouters) {
        const auto own = tile + i;
        own.wait_there();
        fence_loads();
        const BestLandmark highest =
            route_tile<C, kTileRows>({shared.queries[own.at()].in(window)}, [&](int m) { return shared.landmarks[landmarks.at()][m].in(window); }, x.M);
        if (lane == 0) own.done().arrive();
        const int row = first + i * kTileRows + 16 * warp + lane / 4;
        highest.store(p.experts + std::int64_t(bh) * N, row, N, N);
        highest.count(shared.counts[landmarks.count % 3], row, N);
      }
      if (lane % 4 == 0) landmarks.done().arrive();  // those that have counted
    });
  } else if (group < kRouters + kPoolers) {
    take_registers<80>();
    each_piece([&](int bh, int piece, int first, int last, int tiles) {
      if (landmarks.count % kPoolers != group - kRouters) return;
      // A warp's lanes are rows of some of its chunks of 16 bytes: the strands of `sum_share`.
      constexpr int kStrands = kPieceShares * 32 / kChunks, kSteps = kTileRows / kStrands;
      const int strand = lane % kStrands, c = kChunks / 4 * warp + lane / kStrands;
      float sum[kChunk<T>] = {};
      int m = max(0, first - p.windows.prefix) * x.M / p.windows.gw;
      const auto window_or_none = [&](int m) { return m < x.M ? shared.windows[m] : Range{x.queries.max_length + kTileRows, 0}; };
      Range its = window_or_none(m);
      const auto leave = [&] {
#pragma unroll
        for (int e = 0; e < kChunk<T>; ++e) {
          for (int d = 1; d < kStrands / kPieceShares; d *= 2) sum[e] += __shfl_xor_sync(kAllLanes, sum[e], d);
          float total = sum[e];
#pragma unroll
          for (int i = 1; i < kPieceShares; ++i) total += __shfl_down_sync(kAllLanes, sum[e], i * (kStrands / kPieceShares));
          sum[e] = total;
        }
        if (strand == 0 && c * kChunk<T> < x.D) {
          if (in_one_piece(its)) {
            const Vector<T> mean = mean_of<T>(sum, its.last - its.first);
            for (void* to : {known, p.landmarks}) *reinterpret_cast<uint4*>(row_of_landmark(to, bh, m) + c * kChunk<T>) = mean.bits;
          } else {
            float* const to = row_of_sums(bh, piece, m) + c * kChunk<T>;
#pragma unroll
            for (int e = 0; e < kChunk<T>; e += 4) *reinterpret_cast<float4*>(to + e) = make_float4(sum[e], sum[e + 1], sum[e + 2], sum[e + 3]);
          }
        }
#pragma unroll
        for (int e = 0; e < kChunk<T>; ++e) sum[e] = 0.0f;
      };
#pragma unroll 1
      for (int i = 0; i < tiles; ++i) {
        const auto own = tile + i;
        own.wait_there();
        Vector<T> rows[kSteps];
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
          const float4 bits = load_shared4(shared.queries[own.at()].in(window).chunk(strand + kStrands * j, c));
          rows[j].bits = reinterpret_cast<const uint4&>(bits);
        }
        own.done().arrive();
        const int row0 = first + i * kTileRows, end = row0 + kTileRows;
        while (its.first < end) {
          if (its.first <= row0 && its.last >= end) {
#pragma unroll
            for (int j = 0; j < kSteps; ++j) add(sum, rows[j]);
          } else {
#pragma unroll
            for (int j = 0; j < kSteps; ++j)
              if (const int row = row0 + strand + kStrands * j; row >= its.first && row < its.last) add(sum, rows[j]);
          }
          if (its.last > end) break;
          leave();
          its = window_or_none(++m);
        }
      }
      if (its.first < last) leave();
    });
  } else if (group == kRouters + kPoolers) {
    keep_registers<40>();
    each_piece([&](int bh, int piece, int first, int last, int tiles) {
      // A warp's share of 64 rows.
      constexpr int kShare = kTileRows / 4;
      const int b = bh / x.H, h = bh % x.H;
      for (int i = 0; i < tiles; ++i) {
        const int row0 = first + i * kTileRows + kShare * warp;
        const auto own = tile + i;
        own.wait_free();
        load_rows_by_warp<kShare, T, kDP>([=](int r) { return row0 + r < last ? row0 + r : -1; }, row0 + kShare <= last, x.D,
                                         Copy<T, kDP>(shared.queries[own.at()].in(window).from_row(kShare * warp), p.q, b, h, 0));
        own.there().arrive_loaded();
      }
    });
  } else if (take_registers<88>(); warp < 2) {
    each_piece([&](int bh, int piece, int first, int last, int tiles) {
      const int end = ceil_div((piece + 1) * x.M, pieces);
      for (int m = ceil_div(piece * x.M, pieces) + warp; m < end; m += 2) {
        const Range its = shared.windows[m];
        if (in_one_piece(its)) continue;
        constexpr int kAtOnce = 8;
        float2 sum = {0.0f, 0.0f};
        for (int from = its.first / kPoolPiece; from * kPoolPiece < its.last; from += kAtOnce) {
          uint2 part[kAtOnce];
          look_until_there(part, [&](int i) {
            return (from + i) * kPoolPiece < its.last && 2 * lane < x.D ? reinterpret_cast<const uint2*>(row_of_sums(bh, from + i, m)) + lane : nullptr;
          });
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) sum.x += __uint_as_float(part[i].x), sum.y += __uint_as_float(part[i].y);
        }
        const Mean mean(its.last - its.first);
        const std::uint32_t two = pack<T>(mean(sum.x), mean(sum.y));
        if (2 * lane < x.D)
          for (void* to : {known, p.landmarks}) reinterpret_cast<std::uint32_t*>(row_of_landmark(to, bh, m))[lane] = two;
      }
    });
  } else {
    // Of the piece whose landmarks had this place before.
    const auto leave_counts = [&](const Ring<2>& place) {
      if (place.count < 2) return;
      const int item = blockIdx.x + (place.count - 2) * gridDim.x, chunk = item % pieces * kPoolPiece / kGroupChunk;
      for (int m = threadIdx.x % 64; m < x.M; m += 64) {
        int& count = shared.counts[(place.count - 2) % 3][m];
        atomicAdd(p.counts + (std::int64_t(item / pieces) * x.M + m) * chunks + chunk, count);
        count = 0;
      }
    };
    each_piece([&](int bh, int piece, int first, int last, int tiles) {
      constexpr int kRows = 64 / kChunks, kAtOnce = kTileRows / kRows;
      const int own = (threadIdx.x % 128 - 64) / kChunks, c = threadIdx.x % kChunks;
      const T* const its = row_of_landmark(known, bh, 0) + c * kChunk<T>;
      landmarks.wait_free();
      for (int m0 = own; m0 < round_up(x.M, kTileRows); m0 += kAtOnce * kRows) {
        uint4 chunks[kAtOnce];
        look_until_there(chunks, [&](int i) {
          const int m = m0 + i * kRows;
          return m < x.M && c * kChunk<T> < x.D ? reinterpret_cast<const uint4*>(its + m * x.D) : nullptr;
        });
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int m = m0 + i * kRows;
          store_shared4(shared.landmarks[landmarks.at()][m / kTileRows].in(window).chunk(m % kTileRows, c), chunks[i]);
        }
      }
      fence_loads();
      landmarks.there().arrive();
      leave_counts(landmarks);
    });
    for (int i = 0; i < 2; ++i) (landmarks + i).wait_free(), leave_counts(landmarks + i);
  }
  wait_loads<0>();
#else
  __trap();
#endif
}

// Blocks: as many as there are multiprocessors, or fewer that take the same share of every head. None where their rings cannot hold a head.
int blocks_of(const Problem& x) {
  int multiprocessors;
  if (device_attribute(multiprocessors, cudaDevAttrMultiProcessorCount)) return 0;
  const int pieces = pool_pieces(x), of_each = ceil_div(pieces, multiprocessors);
  if (of_each * kPieceTiles > kTiles || std::int64_t(x.B) * x.H * pieces < multiprocessors) return 0;
  const int whole = of_each > 1 ? ceil_div(pieces, of_each) : multiprocessors / pieces * pieces;
  return 8 * whole >= 7 * multiprocessors ? whole : multiprocessors;
}

}  // namespace

bool fits_pool_route(const Problem& x, const Windows& w) {
  return has_warpgroups(x.dtype, x.D) && pools_in_pieces(x, w) && x.s == 1 && !vary(x.queries) && x.M <= kMostLandmarks && blocks_of(x) > 0;
}

cudaError_t launch_pool_route(const PoolRouteParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  if (!fits_pool_route(x, p.windows)) return cudaErrorInvalidValue;
  return dispatch_16_bits(x.dtype, [&](auto element) {
    using T = decltype(element);
    if (cudaError_t status = cudaFuncSetAttribute(pool_route_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared<T>))) return status;
    PoolRouteParams params = p;
    void* arguments[] = {&params};
    return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(pool_route_kernel<T>), dim3(blocks_of(x)), dim3(kThreads), arguments, sizeof(Shared<T>), stream);
  });
}

}  // namespace mita
