// Queries grouped by expert: a stable counting sort of the N*s (query, slot) entries of every head, and the lists of work for the
// blocks of the attention kernels. Integer counts only, so the result does not depend on timing.
//   count:   one block per chunk of entries -> counts[m][chunk], unless these are at hand
//   scan:    one block per (batch, head): exclusive sums, expert-major; tiles and segments of every expert
//   scatter: one block per chunk, sorted in shared memory, each warp placing its share in order; experts' runs of entries are then written whole
//   group:   all of that in one kernel, for heads of one chunk
//   tiles:   where the rest is known, other tiles of it
#include "grouping.cuh"
#include "launch.h"

namespace mita {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kOwn = kGroupChunk / kThreads;  // entries of one thread

// The chunk of a head's entries that a block works on.
struct Chunk {
  int bh, index, first, last;
  const std::int32_t* experts;
  int M;

  __device__ explicit Chunk(const GroupParams& p) : bh(blockIdx.x / p.chunks), index(blockIdx.x % p.chunks), first(index * kGroupChunk), M(p.problem.M) {
    const std::int64_t capacity = std::int64_t(p.problem.queries.max_length) * p.problem.s;
    last = span(p.problem.queries, bh / p.problem.H).length * p.problem.s;
    experts = p.experts + bh * capacity;
  }
  // -1 where there is no such entry. A caller's own experts cannot be checked without waiting for the device; out of range they must not
  // be out of bounds.
  __device__ int expert(int i) const { return first + i < last ? min(max(experts[first + i], 0), M - 1) : -1; }
};

__global__ void __launch_bounds__(kThreads) count_kernel(const GroupParams p) {
  __shared__ int counts[kMaxLandmarks];
  const Chunk chunk(p);
  for (int m = threadIdx.x; m < chunk.M; m += kThreads) counts[m] = 0;
  int own[kOwn];  // all are on their way before the first one is counted
#pragma unroll
  for (int j = 0; j < kOwn; ++j) own[j] = chunk.expert(threadIdx.x + kThreads * j);
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kOwn; ++j)
    if (own[j] >= 0) atomicAdd(&counts[own[j]], 1);
  __syncthreads();
  for (int m = threadIdx.x; m < chunk.M; m += kThreads) p.counts[(std::int64_t(chunk.bh) * chunk.M + m) * p.chunks + chunk.index] = counts[m];
}

using Scan = cub::BlockScan<int, kThreads>;

// Where the entries of every expert of a head begin, in shared memory. All threads must call what is here; size(m): the number of an expert's entries.
struct Experts {
  union {
    typename Scan::TempStorage storage;
    Lists<kThreads> lists;
  };
  int first[kMaxLandmarks + 1];

  template <class Size> __device__ void sum(int M, Size size) {
    const int each = ceil_div(M, kThreads), begin = threadIdx.x * each, end = min(M, begin + each);
    int before = 0, all;
    for (int m = begin; m < end; ++m) before += size(m);
    Scan(storage).ExclusiveSum(before, before, all);
    for (int m = begin; m < end; ++m) first[m] = before, before += size(m);
    if (threadIdx.x == 0) first[M] = all;
    __syncthreads();
  }
  // The same, and the lists of work.
  template <class Size> __device__ void write(const GroupParams& p, int bh, bool want_segments, Size size) {
    const auto sums = lists.sum(p, size);
    lists.store_starts(p, size, sums, first);
    __syncthreads();
    lists.write_tiles(p, bh, size, sums);
    if (want_segments) lists.write_segments(p, bh, size, sums);
    __syncthreads();
  }
};

constexpr int kScanItems = 16;  // of few threads: beside the scores there are a few multiprocessors, for the blocks of all heads at once

__global__ void __launch_bounds__(kThreads) scan_kernel(const GroupParams p) {
  __shared__ Experts of_head;
  const int M = p.problem.M, bh = blockIdx.x;
  const std::int64_t n = std::int64_t(M) * p.chunks;
  std::int32_t* counts = p.counts + bh * n;
  int total = 0;
  for (std::int64_t base = 0; base < n; base += kThreads * kScanItems) {
    int item[kScanItems], sum;
    const std::int64_t at = base + std::int64_t(threadIdx.x) * kScanItems;
#pragma unroll
    for (int i = 0; i < kScanItems; ++i) item[i] = at + i < n ? counts[at + i] : 0;
    Scan(of_head.storage).ExclusiveSum(item, item, sum);
#pragma unroll
    for (int i = 0; i < kScanItems; ++i)
      if (at + i < n) counts[at + i] = total + item[i];
    total += sum;
    __syncthreads();
  }
  const auto start = [&](int m) { return m < M ? counts[std::int64_t(m) * p.chunks] : total; };
  of_head.write(p, bh, true, [&](int m) { return start(m + 1) - start(m); });
}

// Every warp's share of a chunk: how many entries of each expert it holds, then where it places the next one.
struct Shares {
  int* places;  // [kWarps][M]
  int size;     // entries of a warp

  // Experts of the entries of this lane, one of every 32: all are on their way before the first one is used.
  __device__ void load(int (&own)[kOwn], const Chunk& chunk) const {
#pragma unroll
    for (int j = 0; j < kOwn; ++j) own[j] = 32 * j < size ? chunk.expert(threadIdx.x / 32 * size + 32 * j + threadIdx.x % 32) : -1;
  }
  __device__ void count(const Chunk& chunk) {
    const int warp = threadIdx.x / 32;
    int own[kOwn];
    load(own, chunk);
    for (int i = threadIdx.x; i < kWarps * chunk.M; i += kThreads) places[i] = 0;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kOwn; ++j)
      if (own[j] >= 0) atomicAdd(&places[warp * chunk.M + own[j]], 1);
    __syncthreads();
  }
  __device__ int total(const Chunk& chunk, int m) const {
    int sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += places[w * chunk.M + m];
    return sum;
  }
  // put(place, i, m): entry i of the chunk, of expert m, whose entries begin at first(m).
  template <class First, class Put> __device__ void place(const Chunk& chunk, First first, Put put) {
    const int M = chunk.M, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int own[kOwn];
    load(own, chunk);
    for (int m = threadIdx.x; m < M; m += kThreads) {
      int next = first(m);
      for (int w = 0; w < kWarps; ++w) {
        const int count = places[w * M + m];
        places[w * M + m] = next;
        next += count;
      }
    }
    __syncthreads();
    int* mine = places + warp * M;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int i = warp * size + 32 * j + lane, expert = own[j];
      if (32 * j >= size) break;
      const unsigned same = __match_any_sync(kAllLanes, expert);
      if (expert >= 0) put(mine[expert] + __popc(same & ((1u << lane) - 1)), i, expert);
      __syncwarp();
      if (expert >= 0 && lane == __ffs(same) - 1) mine[expert] += __popc(same);
      __syncwarp();
    }
  }
};

__global__ void __launch_bounds__(kThreads) scatter_kernel(const GroupParams p) {
  extern __shared__ int places[];
  __shared__ Experts of_head;
  const Chunk chunk(p);
  int* const sorted = places + kWarps * chunk.M;  // [kGroupChunk]: expert, entry of the chunk
  Shares shares{places, kGroupChunk / kWarps};
  shares.count(chunk);
  of_head.sum(chunk.M, [&](int m) { return shares.total(chunk, m); });
  const int present = of_head.first[chunk.M];
  shares.place(chunk, [&](int m) { return of_head.first[m]; }, [&](int to, int i, int m) { sorted[to] = m * kGroupChunk + i; });
  __syncthreads();
  // From the place in the chunk to that in the head.
  for (int m = threadIdx.x; m < chunk.M; m += kThreads) of_head.first[m] = p.counts[(std::int64_t(chunk.bh) * chunk.M + m) * p.chunks + chunk.index] - of_head.first[m];
  __syncthreads();
  std::int32_t* entries = entries_of(p, chunk.bh);
#pragma unroll
  for (int i = threadIdx.x; i < kGroupChunk; i += kThreads)
    if (i < present) entries[of_head.first[sorted[i] / kGroupChunk] + i] = chunk.first + sorted[i] % kGroupChunk;
}

__global__ void __launch_bounds__(kThreads) group_kernel(const GroupParams p) {
  extern __shared__ int places[];
  __shared__ Experts of_head;
  const Chunk chunk(p);
  Shares shares{places, ceil_div(chunk.last, 32 * kWarps) * 32};
  shares.count(chunk);
  of_head.write(p, chunk.bh, true, [&](int m) { return shares.total(chunk, m); });
  std::int32_t* entries = entries_of(p, chunk.bh);
  shares.place(chunk, [&](int m) { return of_head.first[m]; }, [&](int to, int i, int) { entries[to] = chunk.first + i; });
}

__global__ void __launch_bounds__(kThreads) tiles_kernel(const GroupParams p) {
  __shared__ Experts of_head;
  const int bh = blockIdx.x;
  const std::int32_t* starts = p.segment_starts + std::int64_t(bh) * (p.problem.M + 1);
  const Work* segments = p.segments + std::int64_t(bh) * max_tiles(p.problem, p.segment_rows);
  of_head.write(p, bh, false, [&](int m) {
    const int first = starts[m], last = starts[m + 1] - 1;
    return first > last ? 0 : segments[last].first + segments[last].entries - segments[first].first;
  });
}

}  // namespace

cudaError_t launch_group(const GroupParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  if (x.M < 1 || x.M > kMaxLandmarks) return cudaErrorInvalidValue;
  if (p.pass_rows && (p.tile_rows > kMostPasses * p.pass_rows || max_tiles(x, p.tile_rows) >= 1 << kPassBits)) return cudaErrorInvalidValue;
  const unsigned heads = static_cast<unsigned>(x.B) * x.H;
  const std::size_t bytes = kWarps * x.M * sizeof(int);
  if (!p.experts) return launch(tiles_kernel, heads, kThreads, 0, stream, p);
  if (p.chunks == 1) {
    return launch(group_kernel, heads, kThreads, bytes, stream, p);
  }
  if (!p.counted)
    if (cudaError_t status = launch(count_kernel, heads * p.chunks, kThreads, 0, stream, p)) return status;
  if (cudaError_t status = launch(scan_kernel, heads, kThreads, 0, stream, p)) return status;
  return launch(scatter_kernel, heads * p.chunks, kThreads, bytes + kGroupChunk * sizeof(int), stream, p);
}

}  // namespace mita
