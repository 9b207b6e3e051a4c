// Queries grouped by expert: a stable counting sort of the N*s (query, slot) entries of every head, and the lists of work for the
// blocks of the attention kernels. Integer counts only, so the result does not depend on timing.
//   count:   one block per chunk of entries -> counts[m][chunk], unless these are at hand
//   scan:    one block per (batch, head): exclusive sums, expert-major; tiles and segments of every expert
//   scatter: one block per chunk, sorted in shared memory, each warp placing its share in order; experts' runs of entries are then written whole
//   group:   all of that in one kernel, for heads of one chunk
//   tiles:   where the rest is known, other tiles of it
#include <cub/block/block_scan.cuh>

#include "device.cuh"
#include "launch.h"

namespace mita {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kOwn = kGroupChunk / kThreads;  // entries of one thread

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
  // -1 where there is no such entry. A caller's own experts cannot be checked without waiting for the device; out of range they must not
  // be out of bounds.
  __device__ int expert(int i) const { return first + i < entries ? min(max(experts[first + i], 0), M - 1) : -1; }
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

// Prefix sums over the experts of one head: of their entries, tiles and segments.
struct Lists {
  static constexpr int kItems = ceil_div(kMaxLandmarks, kThreads);  // experts of one thread
  using Scan = cub::BlockScan<int, kThreads>;
  typename Scan::TempStorage storage;
  int first[kMaxLandmarks + 1], tiles[kMaxLandmarks + 1], segments[kMaxLandmarks + 1];

  // starts[m] = the sum of count(0) .. count(m - 1).
  template <class Count> __device__ void sum(int (&starts)[kMaxLandmarks + 1], int M, Count count) {
    int item[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int m = threadIdx.x * kItems + i;
      item[i] = m < M ? count(m) : 0;
    }
    Scan(storage).InclusiveSum(item, item);
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (const int m = threadIdx.x * kItems + i; m < M) starts[m + 1] = item[i];
    if (threadIdx.x == 0) starts[0] = 0;
    __syncthreads();
  }

  // Pieces of `rows` entries, expert by expert; with `pass`, the number of entries in a pass, first those of most passes. `starts` are the prefix sums of each
  // expert's pieces, of so many passes.
  __device__ void write_pieces(Work* lists, int rows, int pass, int (&starts)[kMaxLandmarks + 1], const Problem& x, int bh) {
    const int most = max_tiles(x, rows), most_passes = pass ? rows / pass : 1;
    Work* list = lists + std::int64_t(bh) * most;
    int before = 0;
    for (int passes = most_passes; passes > 0; --passes) {
      const auto has_last = [&](int m) {  // is the last piece of an expert, where it is not a whole one, of so many passes?
        const int last = (first[m + 1] - first[m]) % rows;
        return last > 0 && (pass ? ceil_div(last, pass) : most_passes) == passes;
      };
      const auto whole = [&](int m) { return (first[m + 1] - first[m]) / rows; };
      sum(starts, x.M, [&](int m) { return (passes == most_passes ? whole(m) : 0) + has_last(m); });
      for (int i = threadIdx.x; i < starts[x.M]; i += kThreads) {
        int m = 0;  // the last expert that does not start behind piece i
        for (int step = kMaxLandmarks; step; step >>= 1)
          if (m + step < x.M && starts[m + step] <= i) m += step;
        const int from = first[m] + (i - starts[m] + (passes == most_passes ? 0 : whole(m))) * rows;
        list[before + i] = {m, from, min(rows, first[m + 1] - from), before + i};
      }
      before += starts[x.M];
    }
    for (int i = before + threadIdx.x; i < most; i += kThreads) list[i] = {0, 0, 0, 0};
  }
  // From the number of each expert's entries to the lists of work. All threads must call it.
  template <class Size> __device__ void write_tiles(const GroupParams& p, int bh, Size size) {
    sum(first, p.problem.M, size);
    if (bh == 0 && threadIdx.x == 0) *p.taken = 0;
    write_pieces(p.tiles, p.tile_rows, p.pass_rows, tiles, p.problem, bh);
  }
  template <class Size> __device__ void write(const GroupParams& p, int bh, Size size) {
    write_tiles(p, bh, size);
    write_pieces(p.segments, p.segment_rows, 0, segments, p.problem, bh);
    for (int m = threadIdx.x; m <= p.problem.M; m += kThreads) p.segment_starts[std::int64_t(bh) * (p.problem.M + 1) + m] = segments[m];
  }
};

constexpr int kScanItems = 16;  // of few threads: beside the scores there are a few multiprocessors, for the blocks of all heads at once

__global__ void __launch_bounds__(kThreads) scan_kernel(const GroupParams p) {
  __shared__ Lists lists;
  const int M = p.problem.M, bh = blockIdx.x;
  const std::int64_t n = std::int64_t(M) * p.chunks;
  std::int32_t* counts = p.counts + bh * n;
  int total = 0;
  for (std::int64_t base = 0; base < n; base += kThreads * kScanItems) {
    int item[kScanItems], sum;
    const std::int64_t at = base + std::int64_t(threadIdx.x) * kScanItems;
#pragma unroll
    for (int i = 0; i < kScanItems; ++i) item[i] = at + i < n ? counts[at + i] : 0;
    Lists::Scan(lists.storage).ExclusiveSum(item, item, sum);
#pragma unroll
    for (int i = 0; i < kScanItems; ++i)
      if (at + i < n) counts[at + i] = total + item[i];
    total += sum;
    __syncthreads();
  }
  const auto start = [&](int m) { return m < M ? counts[std::int64_t(m) * p.chunks] : total; };
  lists.write(p, bh, [&](int m) { return start(m + 1) - start(m); });
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

__device__ std::int32_t* entries_of(const GroupParams& p, int bh) { return p.entries + std::int64_t(bh) * p.problem.queries.max_length * p.problem.s; }

__global__ void __launch_bounds__(kThreads) scatter_kernel(const GroupParams p) {
  extern __shared__ int places[];
  __shared__ Lists lists;
  const Chunk chunk(p);
  int* const sorted = places + kWarps * chunk.M;  // [kGroupChunk]: expert, entry of the chunk
  Shares shares{places, kGroupChunk / kWarps};
  shares.count(chunk);
  lists.sum(lists.first, chunk.M, [&](int m) { return shares.total(chunk, m); });
  const int present = lists.first[chunk.M];
  shares.place(chunk, [&](int m) { return lists.first[m]; }, [&](int to, int i, int m) { sorted[to] = m * kGroupChunk + i; });
  __syncthreads();
  // From the place in the chunk to that in the head.
  for (int m = threadIdx.x; m < chunk.M; m += kThreads) lists.first[m] = p.counts[(std::int64_t(chunk.bh) * chunk.M + m) * p.chunks + chunk.index] - lists.first[m];
  __syncthreads();
  std::int32_t* entries = entries_of(p, chunk.bh);
#pragma unroll
  for (int i = threadIdx.x; i < kGroupChunk; i += kThreads)
    if (i < present) entries[lists.first[sorted[i] / kGroupChunk] + i] = chunk.first + sorted[i] % kGroupChunk;
}

__global__ void __launch_bounds__(kThreads) group_kernel(const GroupParams p) {
  extern __shared__ int places[];
  __shared__ Lists lists;
  const Chunk chunk(p);
  Shares shares{places, ceil_div(chunk.entries, 32 * kWarps) * 32};
  shares.count(chunk);
  lists.write(p, chunk.bh, [&](int m) { return shares.total(chunk, m); });
  std::int32_t* entries = entries_of(p, chunk.bh);
  shares.place(chunk, [&](int m) { return lists.first[m]; }, [&](int to, int i, int) { entries[to] = chunk.first + i; });
}

__global__ void __launch_bounds__(kThreads) tiles_kernel(const GroupParams p) {
  __shared__ Lists lists;
  const int bh = blockIdx.x;
  const std::int32_t* starts = p.segment_starts + std::int64_t(bh) * (p.problem.M + 1);
  const Work* segments = p.segments + std::int64_t(bh) * max_tiles(p.problem, p.segment_rows);
  lists.write_tiles(p, bh, [&](int m) {
    const int first = starts[m], last = starts[m + 1] - 1;
    return first > last ? 0 : segments[last].first + segments[last].entries - segments[first].first;
  });
}

}  // namespace

cudaError_t launch_group(const GroupParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  if (x.M < 1 || x.M > kMaxLandmarks) return cudaErrorInvalidValue;
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
