// The top-K keys of every landmark, exactly in the total order (larger score, then lower key index; NaN last).
//
// A candidate is one 64-bit number, ordered(score) above the complement of its key index: all candidates differ, so every
// comparison is decided, and nothing depends on the timing of threads. Indices come out ascending; -1 fills the rest.
//
// short rows (L <= 2048): one warp per landmark, scores in registers, the K-th largest by bisection over its 32 bits,
//   ties cut by position.
// long rows: one block per landmark.
//   1. threshold: a rank of a stratified sample so low that fewer than K scores above it are a 6-sigma event,
//   2. filter: one pass over the row keeps the candidates above it, about K + 6 sqrt(K r) of them for a sample of L / r,
//   3. select exactly among the candidates, by radix digits in shared memory,
//   4. should the filter have kept fewer than K or more than fit, select over the whole row instead: slow, still exact.
#include <cub/block/block_radix_sort.cuh>

#include "device.cuh"
#include "launch.h"

namespace mita {
namespace {

using u32 = std::uint32_t;
using u64 = unsigned long long;
constexpr u32 kAll = 0xffffffffu;

__device__ u64 candidate(float score, int index) { return u64(ordered(score)) << 32 | (kAll - static_cast<u32>(index)); }
// The lowest score that a candidate at or above this one can have; -infinity where that is no number.
__device__ float score_of(u64 candidate) {
  const u32 bits = static_cast<u32>(candidate >> 32);
  const float score = __uint_as_float(bits & 0x80000000u ? bits ^ 0x80000000u : ~bits);
  return score == score ? score : -kInfinity;
}
__device__ u32 index_of(u64 candidate) { return kAll - static_cast<u32>(candidate); }

// ---- short rows ----------------------------------------------------------------------------------------------------

constexpr int kShortWarps = 4;

template <int PER_LANE> __global__ void __launch_bounds__(32 * kShortWarps) topk_short_kernel(const LandmarkParams p) {
  const Problem& x = p.problem;
  const std::int64_t row = std::int64_t(blockIdx.x) * kShortWarps + threadIdx.x / 32;
  if (row >= std::int64_t(x.B) * x.H * x.M) return;
  const int lane = threadIdx.x % 32, length = span(x.keys, static_cast<int>(row / x.M / x.H)).length, k = min(x.K, length);
  const float* scores = p.scores + row * p.score_pitch;
  std::int32_t* indices = p.indices + row * x.K;

  u32 key[PER_LANE];
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) key[i] = 32 * i + lane < length ? ordered(scores[32 * i + lane]) : 0;

  u32 kth = 0;  // the largest value that at least k keys reach
  for (u32 bit = 1u << 31; bit; bit >>= 1) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) count += key[i] >= (kth | bit);
    if (__reduce_add_sync(kAll, count) >= k) kth |= bit;
  }
  int above = 0;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) above += key[i] > kth;
  int ties = k - __reduce_add_sync(kAll, above), written = 0;  // how many of the keys equal to kth still fit, lowest index first

  const u32 before = (1u << lane) - 1;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    const u32 equal = __ballot_sync(kAll, key[i] == kth && key[i] != 0);
    const bool chosen = key[i] > kth || (key[i] == kth && key[i] != 0 && __popc(equal & before) < ties);
    const u32 all = __ballot_sync(kAll, chosen);
    if (chosen) indices[written + __popc(all & before)] = 32 * i + lane;
    ties -= min(ties, __popc(equal));
    written += __popc(all);
  }
  for (int i = written + lane; i < x.K; i += 32) indices[i] = -1;
}

// ---- long rows -----------------------------------------------------------------------------------------------------

constexpr int kThreads = 512;
constexpr int kSample = 4096;         // at most; also the fewest candidates that there is room for
constexpr int kMaxCapacity = 11264;   // candidates: 88 KB, within the 99 KB of the smallest devices

struct Selection {  // scratch of `kth_largest`
  u32 histogram[256];
  u64 prefix;
  int rank, bucket;
};

// The k-th largest of the n different numbers value(0..n-1): radix digits from the top, until a digit's bucket is taken whole.
// Returns a number that exactly k of them reach.
template <class Value> __device__ u64 kth_largest(Selection& s, int n, int k, Value value) {
  if (threadIdx.x == 0) s.prefix = 0, s.rank = k;
  for (int shift = 56;; shift -= 8) {
    if (threadIdx.x < 256) s.histogram[threadIdx.x] = 0;
    __syncthreads();
    const u64 prefix = s.prefix;
    const int rank = s.rank;
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const u64 v = value(i);
      if (shift == 56 || v >> (shift + 8) == prefix >> (shift + 8)) atomicAdd(&s.histogram[(v >> shift) & 255], 1u);
    }
    __syncthreads();
    if (threadIdx.x < 32) {  // lane i sums the digits 255-8i .. 248-8i, highest first, and finds the one that holds the rank
      u32 sum = 0;
      for (int j = 0; j < 8; ++j) sum += s.histogram[255 - 8 * threadIdx.x - j];
      u32 through = sum;
      for (int d = 1; d < 32; d <<= 1) {
        const u32 other = __shfl_up_sync(kAll, through, d);
        if (static_cast<int>(threadIdx.x) >= d) through += other;
      }
      u32 above = through - sum;
      if (above < static_cast<u32>(rank) && through >= static_cast<u32>(rank)) {
        int digit = 255 - 8 * threadIdx.x;
        while (above + s.histogram[digit] < static_cast<u32>(rank)) above += s.histogram[digit--];
        s.prefix = prefix | u64(digit) << shift;
        s.rank = rank - static_cast<int>(above);
        s.bucket = static_cast<int>(s.histogram[digit]);
      }
    }
    __syncthreads();
    if (s.rank == s.bucket || shift == 0) return s.prefix;
  }
}

// The number of the row's K best that fall into a sample of one in `stride` is binomial with mean K / stride; the threshold is
// the first rank that 6 standard deviations do not reach.
struct Sampling {
  int stride, rank, capacity;
};
__host__ __device__ inline Sampling sampling(int L, int K) {
  const int stride = (L + kSample - 1) / kSample;
  const float mean = static_cast<float>(K) / stride;
  const int rank = static_cast<int>(mean + 6.0f * sqrtf(mean) + 5.0f);
  return {stride, rank, min(kMaxCapacity, max(kSample, 2 * stride * rank))};
}

template <int ITEMS> using Sort = cub::BlockRadixSort<u32, kThreads, ITEMS>;

struct LongShared {
  Selection selection;
  int count;
  u32 chosen[kMaxTopk];
  union {
    typename Sort<1>::TempStorage sort1;
    typename Sort<4>::TempStorage sort4;
  };
};

template <int ITEMS> __device__ void sort_chosen(typename Sort<ITEMS>::TempStorage& storage, u32* chosen) {
  u32 item[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) item[i] = chosen[threadIdx.x * ITEMS + i];
  Sort<ITEMS>(storage).Sort(item);
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) chosen[threadIdx.x * ITEMS + i] = item[i];
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads) topk_long_kernel(const LandmarkParams p, const Sampling plan) {
  extern __shared__ __align__(16) u64 candidates[];  // [capacity]
  __shared__ LongShared shared;
  const Problem& x = p.problem;
  const std::int64_t row = blockIdx.x;
  const int length = span(x.keys, static_cast<int>(row / x.M / x.H)).length, k = min(x.K, length);
  const float* scores = p.scores + row * p.score_pitch;
  const auto in_row = [&](int i) { return candidate(scores[i], i); };
  const auto in_candidates = [&](int i) { return candidates[i]; };

  // 1. threshold. One score per stratum of `stride` keys, at a hashed place: contiguous structure cannot mislead it.
  u64 threshold = 0;
  const int samples = length / plan.stride;
  if (samples > 2 * plan.rank) {
    for (int i = threadIdx.x; i < samples; i += kThreads) {
      u32 hash = (i + 1) * 0x9e3779b9u;
      hash = (hash ^ (hash >> 15)) * 0x85ebca6bu;
      candidates[i] = in_row(i * plan.stride + static_cast<int>((hash ^ (hash >> 13)) % plan.stride));
    }
    __syncthreads();
    threshold = kth_largest(shared.selection, samples, plan.rank, in_candidates);
  }
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();

  // 2. filter, four scores a load and four loads in flight.
  const float least = score_of(threshold);
  constexpr int kLoads = 4, kStride = 4 * kThreads;
  for (int base = 4 * threadIdx.x; base < length; base += kLoads * kStride) {
    float4 four[kLoads];
#pragma unroll
    for (int l = 0; l < kLoads; ++l)
      if (base + l * kStride < length) four[l] = *reinterpret_cast<const float4*>(scores + base + l * kStride);
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const float score[4] = {four[l].x, four[l].y, four[l].z, four[l].w};
      // One branch for four scores, seldom taken. Not "below" lets NaN pass, as the exact comparison will not.
      if (base + l * kStride >= length || (score[0] < least && score[1] < least && score[2] < least && score[3] < least)) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = base + l * kStride + j;
        const u64 c = candidate(score[j], i);
        if (i < length && c >= threshold) {
          const int at = atomicAdd(&shared.count, 1);  // the order does not matter: the chosen are sorted below
          if (at < plan.capacity) candidates[at] = c;
        }
      }
    }
  }
  __syncthreads();

  // 3. and 4. exact selection.
  const int count = shared.count;
  const bool whole_row = count < k || count > plan.capacity;
  const u64 kth = k == 0 ? 0 : whole_row ? kth_largest(shared.selection, length, k, in_row) : kth_largest(shared.selection, count, k, in_candidates);
  for (int i = threadIdx.x; i < kMaxTopk; i += kThreads) shared.chosen[i] = kAll;  // -1, and last when sorted
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  const int n = k == 0 ? 0 : whole_row ? length : count;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const u64 c = whole_row ? in_row(i) : in_candidates(i);
    if (c >= kth) shared.chosen[atomicAdd(&shared.count, 1)] = index_of(c);
  }
  __syncthreads();
  if (x.K <= kThreads) sort_chosen<1>(shared.sort1, shared.chosen);
  else sort_chosen<4>(shared.sort4, shared.chosen);
  for (int i = threadIdx.x; i < x.K; i += kThreads) p.indices[row * x.K + i] = static_cast<std::int32_t>(shared.chosen[i]);
}

}  // namespace

cudaError_t launch_landmark_topk(const LandmarkParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  if (x.K < 1 || x.K > kMaxTopk) return cudaErrorInvalidValue;
  const std::int64_t rows = std::int64_t(x.B) * x.H * x.M;
  const int L = x.keys.max_length;
  if (L <= 2048) {
    const unsigned blocks = static_cast<unsigned>((rows + kShortWarps - 1) / kShortWarps);
    if (L <= 256) topk_short_kernel<8><<<blocks, 32 * kShortWarps, 0, stream>>>(p);
    else topk_short_kernel<64><<<blocks, 32 * kShortWarps, 0, stream>>>(p);
    return cudaGetLastError();
  }
  const Sampling plan = sampling(L, x.K);
  const std::size_t bytes = plan.capacity * sizeof(u64);
  if (cudaError_t status = allow_shared_memory(topk_long_kernel, bytes)) return status;
  topk_long_kernel<<<static_cast<unsigned>(rows), kThreads, bytes, stream>>>(p, plan);
  return cudaGetLastError();
}

}  // namespace mita
