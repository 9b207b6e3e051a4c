// Queries grouped by expert: a stable counting sort of the N*s (query, slot) entries of every head, and the lists of work for the
// blocks of the attention kernels. Integer counts only, so the result does not depend on timing.
//   count:   one block per chunk of entries -> counts[m][chunk]
//   scan:    one block per (batch, head): exclusive sums, expert-major; tiles and segments of every expert
//   scatter: one block per chunk; each warp places its share of the chunk in order
#include <cub/block/block_scan.cuh>

#include "device.cuh"
#include "launch.h"

namespace mita {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kWarpShare = kGroupChunk / kWarps;
constexpr unsigned kAll = 0xffffffffu;

// The chunk of entries that a block works on.
struct Chunk {
  int bh, index, first, entries;
  const std::int32_t* experts;
  int M;

  __device__ explicit Chunk(const GroupParams& p) : bh(blockIdx.x / p.chunks), index(blockIdx.x % p.chunks), first(index * kGroupChunk), M(p.problem.M) {
    const std::int64_t capacity = std::int64_t(p.problem.queries.max_length) * p.problem.s;
    entries = span(p.problem.queries, bh / p.problem.H).length * p.problem.s;
    experts = p.experts + bh * capacity;
  }
  __device__ bool holds(int i) const { return first + i < entries; }
  // A caller's own experts cannot be checked without waiting for the device; out of range they must not be out of bounds.
  __device__ int expert(int i) const { return min(max(experts[first + i], 0), M - 1); }
};

__global__ void __launch_bounds__(kThreads) count_kernel(const GroupParams p) {
  __shared__ int counts[kMaxLandmarks];
  const Chunk chunk(p);
  for (int m = threadIdx.x; m < chunk.M; m += kThreads) counts[m] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < kGroupChunk; i += kThreads)
    if (chunk.holds(i)) atomicAdd(&counts[chunk.expert(i)], 1);
  __syncthreads();
  for (int m = threadIdx.x; m < chunk.M; m += kThreads) p.counts[(std::int64_t(chunk.bh) * chunk.M + m) * p.chunks + chunk.index] = counts[m];
}

constexpr int kScanThreads = 1024, kScanItems = 4;
static_assert(kScanThreads >= kMaxLandmarks);

// Fills the list of work of one head: pieces of `rows` entries, `starts` the prefix sums of each expert's pieces.
__device__ void write_work(Work* list, int most, int rows, int M, const int* first, const int* starts) {
  for (int i = threadIdx.x; i < most; i += kScanThreads) {
    Work work{0, 0, 0, 0};
    if (i < starts[M]) {
      int m = 0;  // the last expert that does not start behind piece i
      for (int step = kMaxLandmarks; step; step >>= 1)
        if (m + step < M && starts[m + step] <= i) m += step;
      const int from = first[m] + (i - starts[m]) * rows;
      work = {m, from, min(rows, first[m + 1] - from), 0};
    }
    list[i] = work;
  }
}

__global__ void __launch_bounds__(kScanThreads) scan_kernel(const GroupParams p) {
  using Scan = cub::BlockScan<int, kScanThreads>;
  __shared__ typename Scan::TempStorage storage;
  __shared__ int first[kMaxLandmarks + 1], tiles[kMaxLandmarks + 1], segments[kMaxLandmarks + 1];
  const int M = p.problem.M, bh = blockIdx.x, m = threadIdx.x;
  const std::int64_t n = std::int64_t(M) * p.chunks;
  std::int32_t* counts = p.counts + bh * n;
  int total = 0;
  for (std::int64_t base = 0; base < n; base += kScanThreads * kScanItems) {
    int item[kScanItems], sum;
    const std::int64_t at = base + std::int64_t(threadIdx.x) * kScanItems;
#pragma unroll
    for (int i = 0; i < kScanItems; ++i) item[i] = at + i < n ? counts[at + i] : 0;
    Scan(storage).ExclusiveSum(item, item, sum);
#pragma unroll
    for (int i = 0; i < kScanItems; ++i)
      if (at + i < n) counts[at + i] = total + item[i];
    total += sum;
    __syncthreads();
  }
  const int start = m < M ? counts[std::int64_t(m) * p.chunks] : total;
  const int size = m < M ? (m + 1 < M ? counts[std::int64_t(m + 1) * p.chunks] : total) - start : 0;
  int tile, segment;
  Scan(storage).ExclusiveSum(ceil_div(size, p.tile_rows), tile);
  __syncthreads();
  Scan(storage).ExclusiveSum(ceil_div(size, p.segment_rows), segment);
  if (m < M) first[m] = start, tiles[m] = tile, segments[m] = segment;
  if (m == M - 1) first[M] = total, tiles[M] = tile + ceil_div(size, p.tile_rows), segments[M] = segment + ceil_div(size, p.segment_rows);
  __syncthreads();
  if (m <= M) p.segment_starts[std::int64_t(bh) * (M + 1) + m] = segments[m];
  if (m == 0 && M == kScanThreads) p.segment_starts[std::int64_t(bh) * (M + 1) + M] = segments[M];
  const auto list_of = [&](Work* list, int rows) { return list + std::int64_t(bh) * max_tiles(p.problem, rows); };
  write_work(list_of(p.tiles, p.tile_rows), max_tiles(p.problem, p.tile_rows), p.tile_rows, M, first, tiles);
  write_work(list_of(p.segments, p.segment_rows), max_tiles(p.problem, p.segment_rows), p.segment_rows, M, first, segments);
}

__global__ void __launch_bounds__(kThreads) scatter_kernel(const GroupParams p) {
  extern __shared__ int places[];  // [kWarps][M]: counts, then where each warp writes next
  const Chunk chunk(p);
  const int M = chunk.M, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int* mine = places + warp * M;
  for (int i = threadIdx.x; i < kWarps * M; i += kThreads) places[i] = 0;
  __syncthreads();
  for (int i = lane; i < kWarpShare; i += 32)
    if (chunk.holds(warp * kWarpShare + i)) atomicAdd(&mine[chunk.expert(warp * kWarpShare + i)], 1);
  __syncthreads();
  for (int m = threadIdx.x; m < M; m += kThreads) {
    int next = p.counts[(std::int64_t(chunk.bh) * M + m) * p.chunks + chunk.index];
    for (int w = 0; w < kWarps; ++w) {
      const int count = places[w * M + m];
      places[w * M + m] = next;
      next += count;
    }
  }
  __syncthreads();
  std::int32_t* entries = p.entries + std::int64_t(chunk.bh) * p.problem.queries.max_length * p.problem.s;
  for (int base = 0; base < kWarpShare; base += 32) {
    const int i = warp * kWarpShare + base + lane;
    const int expert = chunk.holds(i) ? chunk.expert(i) : -1;
    const unsigned same = __match_any_sync(kAll, expert);
    if (expert >= 0) entries[mine[expert] + __popc(same & ((1u << lane) - 1))] = chunk.first + i;
    __syncwarp();
    if (expert >= 0 && lane == __ffs(same) - 1) mine[expert] += __popc(same);
    __syncwarp();
  }
}

}  // namespace

cudaError_t launch_group(const GroupParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  if (x.M < 1 || x.M > kMaxLandmarks) return cudaErrorInvalidValue;
  const unsigned heads = static_cast<unsigned>(x.B) * x.H;
  count_kernel<<<heads * p.chunks, kThreads, 0, stream>>>(p);
  if (cudaError_t status = cudaGetLastError()) return status;
  scan_kernel<<<heads, kScanThreads, 0, stream>>>(p);
  if (cudaError_t status = cudaGetLastError()) return status;
  scatter_kernel<<<heads * p.chunks, kThreads, kWarps * x.M * sizeof(int), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace mita
