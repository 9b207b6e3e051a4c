// The top-K keys of every landmark, exactly in the total order (larger score, then lower key index; NaN last).
//
// A candidate is one 64-bit number, ordered(score) above the complement of its key index: all candidates differ, so every
// comparison is decided, and nothing depends on the timing of threads. Indices come out ascending; -1 fills the rest.
//
// short rows (L <= kWarpKeys): one warp per landmark, its scores in registers, the K-th largest by bisection between bounds that
//   the best scores of every lane give, ties cut by position.
// long rows: of each group of consecutive keys only the largest score is known. The K best keys lie in the K best groups, in the
//   total order of maxima and group indices: K groups in front of a key's would hold K keys in front of it. One block per landmark
//   1. takes the K best groups. Where there are many, a rank of a stratified sample so low that fewer than K maxima above it are
//      a 6-sigma event cuts them down first; should it have left fewer than K or more than fit, all of them are looked at,
//   2. computes the scores of their keys again,
//   3. takes the K best of those.
#include <cub/block/block_radix_sort.cuh>

#include "device.cuh"
#include "launch.h"

namespace mita {
namespace {

using u32 = std::uint32_t;
using u64 = unsigned long long;
constexpr u32 kAll = 0xffffffffu;

__device__ u64 candidate(u32 ordered_score, int index) { return u64(ordered_score) << 32 | (kAll - static_cast<u32>(index)); }
// The lowest score that a candidate at or above this one can have; -infinity where that is no number.
__device__ float score_of(u64 candidate) {
  const u32 bits = static_cast<u32>(candidate >> 32);
  const float score = __uint_as_float(bits & 0x80000000u ? bits ^ 0x80000000u : ~bits);
  return score == score ? score : -kInfinity;
}
__device__ u32 index_of(u64 candidate) { return kAll - static_cast<u32>(candidate); }

// ---- short rows ----------------------------------------------------------------------------------------------------

constexpr int kShortWarps = 4, kLaneKeys = kWarpKeys / 32;

__global__ void __launch_bounds__(32 * kShortWarps) topk_short_kernel(const LandmarkParams p) {
  const Problem& x = p.problem;
  const std::int64_t row = std::int64_t(blockIdx.x) * kShortWarps + threadIdx.x / 32;
  if (row >= std::int64_t(x.B) * x.H * x.M) return;
  const int lane = threadIdx.x % 32, length = span(x.keys, static_cast<int>(row / x.M / x.H)).length, k = min(x.K, length);
  const float* scores = p.scores + row * score_pitch(x.keys.max_length, 1);
  std::int32_t* indices = p.indices + row * x.K;
  for (int i = k + lane; i < x.K; i += 32) indices[i] = -1;
  if (k == 0) return;

  u32 key[kLaneKeys] = {};  // 0 behind the row
  const auto each = [&](auto&& f) {
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) f(i);
  };
  const auto count = [&](u32 least) {
    int n = 0;
    each([&](int i) { n += key[i] >= least; });
    return static_cast<int>(__reduce_add_sync(kAll, n));
  };
  u32 first = 0, second = 0;  // the best of this lane
  each([&](int i) { key[i] = 32 * i + lane < length ? ordered(scores[32 * i + lane]) : 0; });
  each([&](int i) {
    second = max(second, min(first, key[i]));
    first = max(first, key[i]);
  });

  // At least k keys reach `low`, fewer than k reach `high`.
  u32 low = max(1u, k <= 32 ? __reduce_min_sync(kAll, first) : k <= 64 ? __reduce_min_sync(kAll, second) : 0), high = __reduce_max_sync(kAll, first) + 1;
  bool exact = false;  // exactly k
  while (high - low > 1 && !exact) {
    const u32 middle = low + (high - low) / 2;
    const int n = count(middle);
    exact = n == k;
    (n >= k ? low : high) = middle;
  }
  if (exact) --low;  // now the chosen are those above `low`, and the first few at it
  int ties = exact ? 0 : k - count(low + 1), written = 0;
  const u32 before = (1u << lane) - 1;
  each([&](int i) {
    bool chosen = key[i] > low;
    if (ties > 0) {
      const u32 equal = __ballot_sync(kAll, key[i] == low);
      chosen |= key[i] == low && __popc(equal & before) < ties;
      ties -= min(ties, __popc(equal));
    }
    const u32 all = __ballot_sync(kAll, chosen);
    if (chosen) indices[written + __popc(all & before)] = 32 * i + lane;
    written += __popc(all);
  });
}

// ---- long rows -----------------------------------------------------------------------------------------------------

constexpr int kThreads = 128;         // few: most of the time is latency, and many rows hide it
constexpr int kMinCapacity = 2048, kMaxCapacity = 11264;  // candidates: 88 KB, within the 99 KB of the smallest devices
constexpr int kCountedTopk = 256;     // up to here the chosen are put in order by counting
using Sort = cub::BlockRadixSort<u32, kThreads, kMaxTopk / kThreads>;

struct Selection {  // scratch of the functions below
  u32 histogram[256];
  u64 prefix, differing;
  int rank, bucket, count;
};

// The k-th largest of the n different numbers value(0..n-1): radix digits from the first bit in which they differ, until a digit's
// bucket is taken whole. Returns a number that exactly k of them reach.
template <class Value> __device__ u64 kth_largest(Selection& s, int n, int k, Value value) {
  const u64 any = value(0);
  u64 differing = 0;
  for (int i = threadIdx.x; i < n; i += kThreads) differing |= value(i) ^ any;
  if (threadIdx.x == 0) s.differing = 0;
  __syncthreads();
  const u32 high = __reduce_or_sync(kAll, static_cast<u32>(differing >> 32)), low = __reduce_or_sync(kAll, static_cast<u32>(differing));
  if (threadIdx.x % 32 == 0) atomicOr(&s.differing, u64(high) << 32 | low);
  __syncthreads();
  int known = 64 - __clzll(static_cast<long long>(s.differing | 1));  // bits from here on are the same in all
  if (threadIdx.x == 0) s.prefix = known < 64 ? any >> known << known : 0, s.rank = k;
  for (;;) {
    const int shift = max(known - 8, 0);
    for (int i = threadIdx.x; i < 256; i += kThreads) s.histogram[i] = 0;
    __syncthreads();
    const u64 prefix = s.prefix;
    const int rank = s.rank;
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const u64 v = value(i);
      if (known == 64 || v >> known == prefix >> known) atomicAdd(&s.histogram[(v >> shift) & ((1u << (known - shift)) - 1)], 1u);
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
    known = shift;
    if (s.rank == s.bucket || shift == 0) return s.prefix;
  }
}

// The number of a row's K best that fall into a sample of one in `stride` is binomial with mean K / stride; the threshold is
// the first rank that 6 standard deviations do not reach.
struct Sampling {
  int stride, rank, capacity;
};
__host__ __device__ inline Sampling sampling(int groups, int K) {
  if (groups <= kMinCapacity) return {1, 0, groups};
  const int stride = sample_stride(groups);
  const float mean = static_cast<float>(K) / stride;
  const int rank = static_cast<int>(mean + 6.0f * sqrtf(mean) + 5.0f);
  return {stride, rank, min(kMaxCapacity, max(max(kMinCapacity, groups / stride), 2 * stride * rank))};
}

// The indices of the k largest candidates, in any order.
template <class Value> __device__ void choose(Selection& s, u32* chosen, int n, int k, Value value) {
  const u64 kth = kth_largest(s, n, k, value);
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kThreads)
    if (const u64 c = value(i); c >= kth) chosen[atomicAdd(&s.count, 1)] = index_of(c);
  __syncthreads();
}

// The k best groups of a row of maxima.
__device__ void choose_groups(Selection& s, u32* chosen, u64* candidates, const float* maxima, int groups, int k, const Sampling& plan) {
  const auto in_row = [&](int i) { return candidate(ordered(maxima[i]), i); };
  const auto in_candidates = [&](int i) { return candidates[i]; };
  if (groups <= plan.capacity) {
    for (int i = threadIdx.x; i < groups; i += kThreads) candidates[i] = in_row(i);
    __syncthreads();
    return choose(s, chosen, groups, k, in_candidates);
  }
  const int samples = groups / plan.stride;
  for (int i = threadIdx.x; i < samples; i += kThreads) candidates[i] = in_row(sampled_group(i, plan.stride));
  __syncthreads();
  const u64 threshold = samples > plan.rank ? kth_largest(s, samples, plan.rank, in_candidates) : 0;
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();

  // Four maxima a load and four loads in flight.
  const float least = score_of(threshold);
  constexpr int kLoads = 4, kStride = 4 * kThreads;
  for (int base = 4 * threadIdx.x; base < groups; base += kLoads * kStride) {
    float4 four[kLoads];
#pragma unroll
    for (int l = 0; l < kLoads; ++l)
      if (base + l * kStride < groups) four[l] = *reinterpret_cast<const float4*>(maxima + base + l * kStride);
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      if (base + l * kStride >= groups) break;
      const float score[4] = {four[l].x, four[l].y, four[l].z, four[l].w};
      // Nearly all maxima end here. NaN is below no number, and may be above the threshold.
      if (score[0] < least && score[1] < least && score[2] < least && score[3] < least) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = base + l * kStride + j;
        const u64 c = candidate(ordered(score[j]), i);
        if (i < groups && c >= threshold) {
          const int at = atomicAdd(&s.count, 1);
          if (at < plan.capacity) candidates[at] = c;
        }
      }
    }
  }
  __syncthreads();
  const int count = s.count;
  __syncthreads();
  if (count < k || count > plan.capacity) choose(s, chosen, groups, k, in_row);
  else choose(s, chosen, count, k, in_candidates);
}

// Dynamic shared memory: candidates, or the scores of K groups, or what sorting needs; then K groups and the chosen keys.
struct LongLayout {
  std::size_t groups, keys, bytes;
  __host__ __device__ LongLayout(const Sampling& plan, int K, int group) {
    groups = max(plan.capacity * sizeof(u64), (K * group + 1) / 2 * 2 * sizeof(u32));
    if (K > kCountedTopk) groups = max(groups, (sizeof(typename Sort::TempStorage) + 7) / 8 * 8);
    keys = groups + K * sizeof(u32);
    bytes = keys + (K > kCountedTopk ? kMaxTopk : K) * sizeof(u32);
  }
};

// The k best keys of the chosen groups, whose scores are computed again.
template <class C> __device__ void choose_keys(Selection& s, u32* chosen, const u32* group, int groups, int k, u32* scores, const LandmarkParams& p, int bh, int m) {
  using T = typename C::T;
  const Problem& x = p.problem;
  const int b = bh / x.H, h = bh % x.H, lane = threadIdx.x % 32;
  const Span keys = span(x.keys, b);
  const int count = groups * kGroupKeys;  // keys, eight to a warp: four lanes each, a lane has every fourth 16 bytes of a row
  const auto key_of = [&](int i) { return static_cast<int>(group[i / kGroupKeys] * kGroupKeys) + i % kGroupKeys; };
  constexpr int kChunks = C::DP / kChunk<T> / 4, kAtOnce = kChunks > 2 ? 1 : 2;
  const int chunks = x.D / kChunk<T>, quarter = lane % 4;
  __shared__ Vector<T> z[C::DP / kChunk<T>];
  if (threadIdx.x < chunks) z[threadIdx.x] = load_vector(head_rows<T>(p.landmarks, b, h, m) + threadIdx.x * kChunk<T>);
  __syncthreads();
  const T* rows = head_rows<T>(p.k, b, h / (x.H / x.Hkv), keys.start);
  for (int first = threadIdx.x / 4; first - lane / 4 < count; first += kAtOnce * kThreads / 4) {
    Vector<T> v[kAtOnce][kChunks] = {};
    int key[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (const int i = first + j * kThreads / 4; i < count) {
        key[j] = key_of(i);
        const T* row = rows + min(key[j], keys.length - 1) * p.k.row;
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
          if (quarter + 4 * c < chunks) v[j][c] = load_vector(row + (quarter + 4 * c) * kChunk<T>);
      }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = first + j * kThreads / 4;
      float score = 0.0f;
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
        if (quarter + 4 * c < chunks) {
          Vector<T> landmark;
          landmark.bits = z[quarter + 4 * c].bits;
#pragma unroll
          for (int e = 0; e < kChunk<T>; ++e) score = fmaf(to_float(landmark.element[e]), to_float(v[j][c].element[e]), score);
        }
      score += __shfl_xor_sync(kAll, score, 1);
      score += __shfl_xor_sync(kAll, score, 2);
      if (quarter == 0 && i < count) scores[i] = key[j] < keys.length ? ordered(score) : 0;
    }
  }
  __syncthreads();
  choose(s, chosen, count, k, [&](int i) { return candidate(scores[i], key_of(i)); });
}

template <class C> __global__ void __launch_bounds__(kThreads, 7) topk_long_kernel(const LandmarkParams p, const Sampling plan) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Selection selection;
  const Problem& x = p.problem;
  const LongLayout layout(plan, x.K, p.group);
  u32 *const group = reinterpret_cast<u32*>(memory + layout.groups), *const chosen = reinterpret_cast<u32*>(memory + layout.keys);
  const std::int64_t row = blockIdx.x;
  const int m = static_cast<int>(row % x.M), bh = static_cast<int>(row / x.M);
  const Span keys = span(x.keys, bh / x.H);
  std::int32_t* indices = p.indices + row * x.K;
  const int k = min(x.K, keys.length), row_groups = ceil_div(keys.length, p.group), groups = min(x.K, row_groups);
  for (int i = k + threadIdx.x; i < x.K; i += kThreads) indices[i] = -1;
  if (k == 0) return;
  choose_groups(selection, p.group == 1 ? chosen : group, reinterpret_cast<u64*>(memory), p.scores + row * score_pitch(x.keys.max_length, p.group), row_groups, groups, plan);
  if (p.group > 1) choose_keys<C>(selection, chosen, group, groups, k, reinterpret_cast<u32*>(memory), p, bh, m);

  if (x.K <= kCountedTopk) {
    for (int i = threadIdx.x; i < k; i += kThreads) {
      int before = 0;
      for (int j = 0; j < k; ++j) before += chosen[j] < chosen[i];
      indices[before] = static_cast<std::int32_t>(chosen[i]);
    }
  } else {
    constexpr int kItems = kMaxTopk / kThreads;
    u32 item[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) item[i] = threadIdx.x * kItems + i < k ? chosen[threadIdx.x * kItems + i] : kAll;
    Sort(*reinterpret_cast<typename Sort::TempStorage*>(memory)).Sort(item);
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (threadIdx.x * kItems + i < k) indices[threadIdx.x * kItems + i] = static_cast<std::int32_t>(item[i]);
  }
}

}  // namespace

cudaError_t launch_landmark_topk(const LandmarkParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  if (x.K < 1 || x.K > kMaxTopk) return cudaErrorInvalidValue;
  const unsigned rows = static_cast<unsigned>(x.B) * x.H * x.M;
  if (x.keys.max_length <= kWarpKeys) {
    topk_short_kernel<<<(rows + kShortWarps - 1) / kShortWarps, 32 * kShortWarps, 0, stream>>>(p);
    return cudaGetLastError();
  }
  const Sampling plan = sampling(ceil_div(x.keys.max_length, p.group), x.K);
  const std::size_t bytes = LongLayout(plan, x.K, p.group).bytes;
  return dispatch(x.dtype, x.D, [&](auto config) {
    using C = decltype(config);
    if (cudaError_t status = allow_shared_memory(topk_long_kernel<C>, bytes)) return status;
    topk_long_kernel<C><<<rows, kThreads, bytes, stream>>>(p, plan);
    return cudaGetLastError();
  });
}

}  // namespace mita
