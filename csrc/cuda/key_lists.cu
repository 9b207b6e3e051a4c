// What queries left for the keys of their experts, sorted by key: the rows of routed sums (UnitGradientParams) that belong to the keys of a block, key
// after key, and of one key in ascending order: landmark after landmark, segment after segment. The gradients of keys are summed in that order.
//
// One block lists those of some keys of a head: it counts them, puts the rows of every key where they belong, as they come, and then each in its order.
// Both kernels run where multiprocessors fall idle at the end of the kernel before them: few instructions, as each runs once, and one round trip to memory
// if it can be.
#include <cub/block/block_scan.cuh>

#include "device.cuh"
#include "launch.h"

namespace mita {
namespace {

constexpr int kListKeys = 4096, kThreads = 1024, kOwn = kListKeys / kThreads;  // keys of a block, and of a thread
constexpr int kRows = 3072, kSlots = 2560;                                     // so many rows, and slots of all experts, are held in shared memory
static_assert(kListKeys % kKeyBlock == 0);
using Scan = cub::BlockScan<int, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;

// Not for the sake of the kernel it ends: those behind it wait for it, and so for the one before too. The other blocks leave their places.
__device__ inline void wait_in_one_block() {
  if (blockIdx.x == 0) wait_for_kernel_before();
}

// The number of those in ascending order, the absent ones last, that are less than `bound`.
__device__ inline int count_less(const std::int32_t* numbers, int count, int bound) {
  int first = 0;
#pragma unroll 1
  for (int last = count; first < last;) {
    const int middle = (first + last) / 2;
    if (static_cast<unsigned>(numbers[middle]) < static_cast<unsigned>(bound)) first = middle + 1;
    else last = middle;
  }
  return first;
}

struct alignas(8) Expert {
  std::uint16_t first, last;  // slots of keys that may be among these
  std::int32_t segment;       // its first one: the last one comes before that of the next expert
};
static_assert(kMaxTopk < 1 << 16);

__global__ void __launch_bounds__(kThreads, 2) key_lists_kernel(const KeyListParams p) {
  __shared__ typename Scan::TempStorage storage;
  __shared__ std::int32_t starts[kListKeys + 1], few[kRows], held[kSlots], before;  // starts[key + 1]: of the rows of a key; before: rows for the keys before these
  extern __shared__ Expert experts[];
  const Problem& x = p.problem;
  const int lists = ceil_div(x.keys.max_length, kListKeys), bh = blockIdx.x / lists, key0 = blockIdx.x % lists * kListKeys;
  const int keys = min(kListKeys, span(x.keys, bh / x.H).length - key0), most = max_tiles(x, p.groups.segment_rows) * x.K;
  const bool holds = x.M * x.K <= kSlots;
  const std::int32_t* const all = p.indices + std::int64_t(bh) * x.M * x.K;
  const std::int32_t* const indices = holds ? held : all;
  let_next_kernel_start();
  if (holds) load_numbers(Window(reinterpret_cast<const unsigned char*>(held)).address, x.M * x.K, all, [](int i) { return i; });
  for (int key = threadIdx.x; key <= kListKeys; key += kThreads) starts[key] = 0;
  if (threadIdx.x == 0) before = 0;
  for (int m = threadIdx.x; m <= x.M; m += kThreads)
    experts[m] = {0, static_cast<std::uint16_t>(x.K), p.groups.segment_starts[std::int64_t(bh) * (x.M + 1) + m]};
  commit_loads(), wait_loads<0>();
  __syncthreads();
  if (lists > 1) {
    for (int m = threadIdx.x; m < x.M; m += kThreads) {
      Expert& its = experts[m];
      its.first = count_less(indices + m * x.K, x.K, key0), its.last = count_less(indices + m * x.K, x.K, key0 + kListKeys);
      atomicAdd(&before, its.first * (experts[m + 1].segment - its.segment));
    }
    __syncthreads();
  }

  std::int32_t* rows = few;
  KeyEntry* entries = nullptr;
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
#pragma unroll 1
    for (int m = threadIdx.x / 32; m < x.M; m += kThreads / 32) {
      const Expert its = experts[m];
      const int segments = experts[m + 1].segment - its.segment;
#pragma unroll 1
      for (int slot = its.first + threadIdx.x % 32; slot < its.last; slot += 32) {
        const int key = indices[m * x.K + slot] - key0;
        if (key < 0 || key >= keys) continue;
        int place = pass < 2 ? atomicAdd(&starts[key + 1], segments) : 0;  // in the second pass it becomes the next key's
#pragma unroll 1
        for (int i = 0; i < segments && pass > 0; ++i) {
          const int row = (its.segment + i) * x.K + slot;
          if (pass == 1) {
            rows[place + i] = row;
            continue;
          }
          place = starts[key];
#pragma unroll 1
          for (int j = starts[key]; j < starts[key + 1]; ++j) place += rows[j] < row;
          entries[place] = {row, key % kKeyBlock};
        }
      }
    }
    __syncthreads();
    if (pass == 0) {
      int own[kOwn], total;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) own[i] = starts[threadIdx.x * kOwn + i + 1];
      Scan(storage).ExclusiveSum(own, own, total);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) starts[threadIdx.x * kOwn + i + 1] = own[i];
      __syncthreads();
      const std::int64_t first = std::int64_t(bh) * most + before;
      entries = p.entries + first;
      if (total > kRows) rows = p.rows + first;
    } else if (pass == 1) {
      const int blocks = ceil_div(x.keys.max_length, kKeyBlock);
      for (int i = threadIdx.x; i < min(kListKeys / kKeyBlock, blocks - key0 / kKeyBlock); i += kThreads)
        p.ranges[std::int64_t(bh) * blocks + key0 / kKeyBlock + i] = {before + starts[i * kKeyBlock], before + starts[(i + 1) * kKeyBlock]};
    }
  }
  wait_in_one_block();
}

constexpr int kFewSlots = 3;  // of experts, that one thread has

// The same for all keys of a head at once, where there are few of them and few slots: these stay in registers.
__global__ void __launch_bounds__(kThreads, 2) few_key_lists_kernel(const KeyListParams p) {
  __shared__ typename Scan::TempStorage storage;
  __shared__ std::int32_t ends[kListKeys + 1], rows[kRows];  // ends[key + 1]: of the rows of a key
  const Problem& x = p.problem;
  const int bh = blockIdx.x, keys = span(x.keys, bh / x.H).length;
  let_next_kernel_start();
  int key[kFewSlots], first_row[kFewSlots], segments[kFewSlots], place[kFewSlots];
#pragma unroll
  for (int i = 0; i < kFewSlots; ++i) {
    const int slot = threadIdx.x + i * kThreads, m = static_cast<unsigned>(slot) / x.K;
    key[i] = -1, first_row[i] = segments[i] = place[i] = 0;
    if (m >= x.M) continue;
    const std::int32_t* const its = p.groups.segment_starts + bh * (x.M + 1) + m;
    key[i] = p.indices[std::int64_t(bh) * x.M * x.K + slot], segments[i] = its[1] - its[0], first_row[i] = (its[0] - m) * x.K + slot;
  }
  for (int i = threadIdx.x; i <= kListKeys; i += kThreads) ends[i] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kFewSlots; ++i) {
    if (static_cast<unsigned>(key[i]) >= static_cast<unsigned>(keys)) segments[i] = 0;
    if (segments[i] > 0) place[i] = atomicAdd(&ends[key[i] + 1], segments[i]);
  }
  __syncthreads();
  int own[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) own[i] = ends[threadIdx.x * kOwn + i + 1];
  Scan(storage).InclusiveSum(own, own);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) ends[threadIdx.x * kOwn + i + 1] = own[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kFewSlots; ++i)
#pragma unroll 1
    for (int segment = 0; segment < segments[i]; ++segment) rows[ends[key[i]] + place[i] + segment] = first_row[i] + segment * x.K;
  const int blocks = ceil_div(x.keys.max_length, kKeyBlock);
  if (const int block = threadIdx.x; block < blocks) p.ranges[bh * blocks + block] = {ends[block * kKeyBlock], ends[(block + 1) * kKeyBlock]};
  __syncthreads();
  KeyEntry* const entries = p.entries + std::int64_t(bh) * max_tiles(x, p.groups.segment_rows) * x.K;
#pragma unroll
  for (int i = 0; i < kFewSlots; ++i)
#pragma unroll 1
    for (int segment = 0; segment < segments[i]; ++segment) {
      const int row = first_row[i] + segment * x.K, end = ends[key[i] + 1];
      int order = ends[key[i]];
#pragma unroll 1
      for (int j = order; j < end; ++j) order += rows[j] < row;
      entries[order] = {row, key[i] % kKeyBlock};
    }
  wait_in_one_block();
}

}  // namespace

cudaError_t launch_key_lists(const KeyListParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  if (x.keys.max_length <= kListKeys && x.M * x.K <= kFewSlots * kThreads && max_tiles(x, p.groups.segment_rows) * x.K <= kRows)
    return launch(runs_on_hopper(), few_key_lists_kernel, static_cast<unsigned>(x.B) * x.H, kThreads, 0, stream, p);
  return launch(runs_on_hopper(), key_lists_kernel, static_cast<unsigned>(x.B) * x.H * ceil_div(x.keys.max_length, kListKeys), kThreads, (x.M + 1) * sizeof(Expert), stream, p);
}

}  // namespace mita
