// Landmark queries, the expert of every query, and the queries grouped by expert in one pass over the queries, for sm_90a: heads of 16-bit elements of up to 64
// columns whose queries fit in the shared memory of two blocks, one route. These are a cluster, and read each other's memory:
//   each brings its half of the queries;
//   pairs of lanes pool windows, from wherever their tokens lie, and leave landmarks to both blocks: the same bits as those of `pool`;
//   a warpgroup routes 64 of its block's own queries at a time;
//   each block groups its own queries, once it knows how many the other one has of each expert.
#include "grouping.cuh"
#include "launch.h"
#include "specialists.cuh"
#include "stages.cuh"

namespace mita {
namespace {

constexpr int kDP = 64, kRowBytes = kDP * 2, kMostLandmarks = 256, kMostTokens = 256, kLandmarkTile = 64;

// A warpgroup routes a run of a block's queries, as many eights of them as are its share. Its products are of eight strands of that run at a time, eight queries of each;
// where the run is no whole number of strands they begin before it.
constexpr int kEight = 8;
constexpr int strands(int warps) { return warps / 4 * 8; }
template <int WARPS> struct Strands {
  int rows, first, last, length, begin;  // of the block; of a warpgroup's run, in eights

  __device__ Strands(int rows, int group) : rows(rows) {
    const int eights = ceil_div(rows, kEight);
    first = eights * group / (WARPS / 4), last = eights * (group + 1) / (WARPS / 4), length = ceil_div(last - first, 8), begin = min(first, eights - 8 * length);
  }
  __device__ Range of(int strand) const { return {kEight * max(first, begin + strand * length), min(rows, kEight * min(last, begin + (strand + 1) * length))}; }
};

// A block's memory: landmarks, later what grouping wants; windows, later how many queries of a strand each expert has, a byte each; queries, later, in the place of every
// eight, their experts.
struct Layout {
  int rows, shares;  // queries of a block, shares of a window
  explicit Layout(const Problem& x, int shares = 0) : rows(round_up(ceil_div(x.queries.max_length, 2), kEight)), shares(shares) {}
  __host__ __device__ static int landmark_bytes(int M) { return round_up(M, kLandmarkTile) * kRowBytes; }
  template <int WARPS> __host__ __device__ static int bytes_before_queries(int M) {
    constexpr int kOfLandmark = strands(WARPS) > int(sizeof(int4)) ? strands(WARPS) : int(sizeof(int4));
    return landmark_bytes(M) + round_up(kOfLandmark * M, kPanel);
  }
  template <int WARPS> int bytes(int M) const { return bytes_before_queries<WARPS>(M) + rows * kRowBytes; }
  // Of a block: three of 8 on a multiprocessor, or two of 16, as far as registers go; 0 where it has room for one, which would have too little to do at a time.
  // H200, 1601 queries: with 96 heads, less than two blocks a multiprocessor, 2 % less of forward by 8 warps than by 16; with 192 heads 1 to 2 % more.
  int warps(const Problem& x) const {
    return blocks_by_memory(bytes<8>(x.M)) >= 3 ? 8 : blocks_by_memory(bytes<16>(x.M)) < 2 ? 0 : x.B * x.H <= kMultiprocessors ? 8 : 16;
  }
};

// What grouping wants beside it: how many queries of the block each expert has, and where those of a strand go, [strands][M]. It fits where landmarks were.
template <int WARPS> struct Scratch {
  Lists<32 * WARPS> lists;
  int totals[kLandmarkTile];  // and so on
  __device__ std::uint16_t* places(int M) { return reinterpret_cast<std::uint16_t*>(totals + M); }
  static_assert(sizeof(lists) + kLandmarkTile * (sizeof(int) + strands(WARPS) * sizeof(std::uint16_t)) <= kLandmarkTile * kRowBytes);
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
__device__ inline void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ inline void wait_for_cluster() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// All threads of both blocks. Afterwards each block sees what the other one had written, to either memory.
__device__ inline void sync_cluster() {
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
  wait_for_cluster();
}
// Where in the memory of block `rank` lies what is at this address of this block's.
__device__ inline std::uint32_t address_of_rank(std::uint32_t address, int rank) {
  std::uint32_t its;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(its) : "r"(address), "r"(rank));
  return its;
}
__device__ inline uint4 load_cluster4(std::uint32_t address) {
  uint4 x;
  asm volatile("ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
  return x;
}
__device__ inline int load_cluster_int(std::uint32_t address) {
  int x;
  asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}
__device__ inline void store_cluster2(std::uint32_t address, uint2 x) {
  asm volatile("st.shared::cluster.v2.u32 [%0], {%1,%2};" ::"r"(address), "r"(x.x), "r"(x.y) : "memory");
}
#endif

template <class T, int WARPS> __global__ void __launch_bounds__(32 * WARPS, WARPS == 8 ? 3 : 2) pool_route_group_kernel(const PoolRouteGroupParams p, const Layout layout) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using C = Config<T, kDP, true>;
  constexpr int kThreads = 32 * WARPS, kStrands = strands(WARPS), kChunks = kDP / kChunk<T>;
  extern __shared__ __align__(kPanel) unsigned char memory[];
  const Window window(memory);
  const Problem& x = p.group.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = blockIdx.x % 2, bh = blockIdx.x / 2, N = x.queries.max_length, M = x.M;
  const int first = rank * layout.rows, last = min(N, first + layout.rows), rows = max(last - first, 0);
  const Tile<T, kDP> landmarks{window.address}, queries{window.address + Layout::bytes_before_queries<WARPS>(M)};
  int4* const window_of = reinterpret_cast<int4*>(memory + Layout::landmark_bytes(M));

  load_sequence<T, kDP, kThreads>(queries, p.q, bh / x.H, bh % x.H, {first, rows}, x.D, round_up(rows, kEight));
  commit_loads();
#pragma unroll 1
  for (int m = threadIdx.x; m < M; m += kThreads) {
    const PooledTokens tokens = PooledTokens::of<int>(p.windows, m);
    window_of[m] = make_int4(tokens.first, tokens.width, tokens.area, tokens.inverse_width());
  }
  wait_own_loads<0>();
  sync_cluster();
  let_next_kernel_start();

  // Each block pools half of the windows. Row n lies n rows behind these, in the lower half and in the upper one.
  const std::uint32_t before_upper = layout.rows * kRowBytes, lower = address_of_rank(queries.address, 0), upper = address_of_rank(queries.address, 1) - before_upper;
  const Tile<T, kDP> own_rows_of{queries.address - rank * before_upper};
  const int half = (M + 1) / 2, windows = rank == 0 ? half : M - half;
#pragma unroll 1
  for (int pair = warp, turn = 0; 2 * pair < windows; ++turn, pair = WARPS * turn + (turn % 2 ? WARPS - 1 - warp : warp)) {  // two windows of a warp, first those of both blocks
    const int i = 2 * pair + lane / 16, m = rank == 0 ? max(half - 1 - i, 0) : half + min(i, windows - 1), c = lane / 2 % kChunks;
    const int4 its = window_of[m];
    const PooledTokens tokens{its.x, its.y, its.z, p.windows.gw};
    const bool here = rank == 0 ? tokens.at(its.z - 1, (its.z - 1) / max(its.y, 1)) < layout.rows : its.x >= layout.rows;
    const auto pooled = [&](auto load) { return mean_by_pair<T>(tokens, its.w, layout.shares, load); };
    const Four<T> mean = __all_sync(kAllLanes, here) ? pooled([&](int n) {
      const float4 bits = load_shared4(own_rows_of.chunk(n, c));
      return reinterpret_cast<const Vector<T>&>(bits);
    })
                                                     : pooled([&](int n) { return Vector<T>{load_cluster4(Tile<T, kDP>{n < layout.rows ? lower : upper}.chunk(n, c))}; });
    const int to = m < M - 1 ? m + 1 : round_up(M, kLandmarkTile);  // the last landmark behind all others again, where it never is the first one of the best
#pragma unroll 1
    for (int row = m; row < to && i < windows; ++row)
      for (int r = 0; r < 2; ++r) store_cluster2(address_of_rank(landmarks.chunk(row, c) + lane % 2 * 8, r), reinterpret_cast<const uint2&>(mean));
  }
  sync_cluster();

#pragma unroll 1
  for (int i = 2 * threadIdx.x + rank; i < M * kChunks; i += 2 * kThreads)
    if (const int c = i % kChunks; c * kChunk<T> < x.D) {
      const float4 its = load_shared4(landmarks.chunk(i / kChunks, c));
      *reinterpret_cast<float4*>(static_cast<T*>(p.landmarks) + (std::int64_t(bh) * M + i / kChunks) * x.D + c * kChunk<T>) = its;
    }
  // Of each query: its expert, and how many of that came before it in its strand.
  std::uint8_t* const counts = memory + Layout::landmark_bytes(M);
#pragma unroll 1
  for (int i = threadIdx.x; i < kStrands * M; i += kThreads) counts[i] = 0;
  __syncthreads();
  fence_loads();
  const int group = warp / 4, strand = warp % 4 * 2 + lane / kEight % 2;  // a lane's, when it has the expert of a query
  const Strands<WARPS> of_group(rows, group);
  const Range own_strand = of_group.of(strand);
  const auto routed = [&](int row) { return queries.address + row / kEight * (kEight * kRowBytes) + row % kEight * 2; };
#pragma unroll 1
  for (int round = 0; round < of_group.length; ++round) {
    const Matrix<kDP> eights(queries.address + (of_group.begin + round) * kEight * kRowBytes, false);
    BestLandmark highest;
#pragma unroll 1
    for (int m = 0; m < M; m += kLandmarkTile) {
      float s[kLandmarkTile / 8][4];
      const Matrix<kDP> tile(landmarks.from_row(m).address, false);
      begin_products(s);
#pragma unroll
      for (int k = 0; k < kDP / 16; ++k) wgmma<T>(s, eights.at(32 * k, of_group.length * kEight * kRowBytes), tile.at(32 * k), k > 0);
      commit_products();
      wait_products<C, 0>(s);
      highest.update(s, m, round_up(M, kLandmarkTile));
    }
    asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");  // all have read these queries
    const int upper_row = __shfl_sync(kAllLanes, highest.of_row(0), lane % 8 * 4), lower_row = __shfl_sync(kAllLanes, highest.of_row(1), lane % 8 * 4);
    const int row = (of_group.begin + strand * of_group.length + round) * kEight + lane % kEight, expert = lane < kEight ? upper_row : lower_row;
    const bool exists = lane < 2 * kEight && row >= own_strand.first && row < own_strand.last;
    const unsigned same = __match_any_sync(kAllLanes, exists ? strand * kMostLandmarks + expert : -1), before = same & ((1u << lane) - 1);
    std::uint8_t* const count = counts + (8 * group + strand) * M + expert;
    const int its_place = exists ? *count + __popc(before) : 0;
    __syncwarp();
    if (exists) {
      if (before == 0) *count = static_cast<std::uint8_t>(its_place + __popc(same));
      store_shared_short(routed(row), expert | its_place << 8);
    }
    __syncwarp();
  }
  __syncthreads();

  auto& scratch = *reinterpret_cast<Scratch<WARPS>*>(memory);
  const int m = threadIdx.x;  // the expert of a thread
  int own = 0, other = 0;
  if (m < M) {
#pragma unroll 8
    for (int i = 0; i < kStrands; ++i) own += counts[i * M + m];
    scratch.totals[m] = own;
  }
  sync_cluster();
  if (m < M) other = load_cluster_int(address_of_rank(window.of(scratch.totals[m]), 1 - rank));
  const auto size = [&](int) { return own + other; };
  const auto sums = scratch.lists.sum(p.group, size);
  arrive_at_cluster();  // nobody leaves whose memory is read
  if (m < M) {
    int next = sums.before.entries + (rank == 0 ? 0 : other);
#pragma unroll 8
    for (int i = 0; i < kStrands; ++i) scratch.places(M)[i * M + m] = static_cast<std::uint16_t>(next), next += counts[i * M + m];
  }
  __syncthreads();
  if (rank == 0) scratch.lists.write_tiles(p.group, bh, size, sums);
  else scratch.lists.write_segments(p.group, bh, size, sums);
  std::int32_t *const entries = entries_of(p.group, bh), *const experts = p.experts + std::int64_t(bh) * N;
#pragma unroll 1
  for (int i = warp % 4 * 2; i < warp % 4 * 2 + 2; ++i) {
    const Range its = of_group.of(i);
    const std::uint16_t* const places = scratch.places(M) + (8 * group + i) * M;
#pragma unroll 1
    for (int row = its.first + lane; row < its.last; row += 32) {
      const int of_row = load_shared_short(routed(row)), expert = of_row & 0xff;
      entries[places[expert] + (of_row >> 8)] = first + row;
      experts[first + row] = expert;
    }
  }
  wait_for_cluster();
#else
  __trap();
#endif
}

}  // namespace

bool fits_pool_route_group(const Problem& x, const Windows& w) {
  const auto longest = [](int tokens, int windows) { return ceil_div(tokens, windows) + (tokens % windows != 0); };
  return has_warpgroups(x.dtype, x.D) && x.D <= kDP && x.s == 1 && x.M <= kMostLandmarks && x.queries.max_length > kShortKeys && !vary(x.queries) &&
         longest(w.gh, w.mh) * longest(w.gw, w.mw) <= kMostTokens && Layout(x).warps(x) > 0;
}

cudaError_t launch_pool_route_group(const PoolRouteGroupParams& p, cudaStream_t stream) {
  const Problem& x = p.group.problem;
  if (!fits_pool_route_group(x, p.windows)) return cudaErrorInvalidValue;
  const auto with = [&](auto element, auto warps) {
    using T = decltype(element);
    const auto kernel = pool_route_group_kernel<T, warps>;
    const Layout layout(x, pool_shares<T>(x, p.windows));
    const std::size_t bytes = layout.bytes<warps>(x.M);
    if (cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes))) return status;
    cudaLaunchAttribute cluster{cudaLaunchAttributeClusterDimension};
    cluster.val.clusterDim = {2, 1, 1};
    const cudaLaunchConfig_t how{2 * static_cast<unsigned>(x.B) * x.H, 32 * warps, bytes, stream, &cluster, 1};
    return cudaLaunchKernelEx(&how, kernel, p, layout);
  };
  return dispatch_16_bits(x.dtype, [&](auto element) {
    return Layout(x).warps(x) == 8 ? with(element, std::integral_constant<int, 8>{}) : with(element, std::integral_constant<int, 16>{});
  });
}

}  // namespace mita
