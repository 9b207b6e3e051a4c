// Run-time dtype and head dimension -> compile-time constants: the single list of what the CUDA kernels support.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <iterator>

#include "../limits.h"
#include "params.h"

namespace mita {

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int round_up(int a, int step) { return ceil_div(a, step) * step; }

// Of the current device.
inline cudaError_t device_attribute(int& value, cudaDeviceAttr attribute) {
  int device;
  if (cudaError_t status = cudaGetDevice(&device)) return status;
  return cudaDeviceGetAttribute(&value, attribute, device);
}

// A large GPU's multiprocessors, and blocks that fill them once, four each. Constants, so that results do not depend on the device.
constexpr int kMultiprocessors = 132, kBlocksOfAWave = 4 * kMultiprocessors;

// Parts into which the pieces of every head are cut so that they busy a large GPU least long, and how long that is, in halves of a piece: it runs so many
// `blocks` at a time, a block takes so many pieces `at_once`, and its start takes as long as `start`.
struct LeastBusy {
  int parts;
  std::int64_t time;
};
inline LeastBusy least_busy(std::int64_t heads, int pieces, int at_once, int blocks, int start) {
  const auto time = [&](int parts) { return (heads * parts + blocks - 1) / blocks * (2 * ceil_div(ceil_div(pieces, parts), at_once) + start); };
  LeastBusy best{1, time(1)};
  for (int parts = 2; parts <= std::min(ceil_div(pieces, at_once), blocks); ++parts)
    if (time(parts) < best.time) best = {parts, time(parts)};
  return best;
}

// Do sequences differ in length, or may they?
__host__ __device__ inline bool vary(const Sequences& s) { return s.lengths || s.starts; }

// Long windows in one dimension, of what one kernel may pool and route, are summed in pieces, each of the tokens [512 i, 512 (i + 1)) of a sequence for some
// i: these may be at hand in different places.
constexpr int kPoolPiece = 512;
__host__ __device__ inline bool pools_in_pieces(const Problem& x, const Windows& w) {
  return x.dtype != Dtype::fp32 && x.D <= 64 && w.gh == 1 && w.mh == 1 && w.gw >= 4096 && w.gw >= 64 * w.mw;
}
__host__ __device__ inline int pool_pieces(const Problem& x) { return ceil_div(x.queries.max_length, kPoolPiece); }
// PoolRouteParams::memory.
__host__ __device__ inline std::size_t pool_route_bytes(const Problem& x) {
  return std::size_t(x.B) * x.H * x.D * ((pool_pieces(x) + x.M) * sizeof(float) + x.M * 2);
}

// Queries that a block, or a warpgroup of it, holds at a time, by element size and padded head dimension: what fits two blocks'
// registers on a multiprocessor and 99 KB of shared memory.
constexpr int kPassRows = 64;
template <int BYTES, int DP> constexpr int kAttentionRows = BYTES * DP <= 512 ? kPassRows : 32;
template <int BYTES, int DP> constexpr int kRowGradientRows = BYTES * DP <= 256 ? kPassRows : BYTES * DP <= 512 ? 32 : 16;

// Experts whose keys and values fit beside the shared units, for three warps or more, in what a multiprocessor has; and with few queries. H200, forward with 24 to 192 heads
// against that by specialists, at so many queries of an expert. Up to 64 columns: with 49 and 64 keys 71 to 96 % at 64, 83 to 99 % at 96 (25 landmarks 90 to 101 %), 88 to
// 107 % at 128; with 16 to 32 keys 57 to 94 % at 64, 88 to 102 % at 192, 88 to 103 % at 256. 80 columns: 38 to 66 % at 8 to 16, 60 to 91 % at 24 to 32, 84 to 102 % at 64, 88 to
// 106 % at 96; with up to 32 keys 94 to 104 % at 128. 128 columns: 41 to 77 %, 69 to 96 %, 93 to 110 %, 99 to 112 %; with up to 32 keys and 256 landmarks 107 to 112 % at 64.
// (Of 24 heads, 16 landmarks with 49 keys or more took 103 to 121 %.)
// More than 64 keys pass by, 64 at a time, for every 16 queries: with 32 landmarks or more and 72 to 512 keys, 48 and 96 heads, 64 columns 64 to 82 % at 24 queries of an expert,
// 76 to 100 % at 32, 83 to 98 % at 48, 97 to 120 % at 64; 80 columns 58 to 86 % at 16 to 24, 63 to 105 % at 32, 90 to 123 % at 48; 128 columns 50 to 87 % at 8 to 16, 72 to 113 %
// at 24, 91 to 126 % at 32. The worst are those of 32 landmarks with 512 keys. With 16 landmarks and 100 keys 6 to 48 heads took 101 to 148 %.
constexpr int kSmallExpertKeys = 64, kMostSmallKeys = 512;  // at a time; of an expert
constexpr int kSmallPassRows = 16;                          // queries that a warp holds at a time
constexpr int small_columns(int D) { return D <= 64 ? 64 : D <= 96 ? 96 : 128; }  // of a row in shared memory
inline bool small_experts(const Problem& x) {
  if (x.dtype == Dtype::fp32 || x.D > 128 || x.D % kCudaHeadDimStep != 0 || x.s == 0 || x.K > kMostSmallKeys) return false;
  const bool half = x.K <= kSmallExpertKeys / 2, several = x.K > kSmallExpertKeys;
  if (several && (x.M < 32 || x.K > 8 * x.M)) return false;
  const int units = half ? kSmallExpertKeys / 2 : kSmallExpertKeys, columns = small_columns(x.D);
  constexpr int kMostQueries[3][3] = {{192, 96, 48}, {128, 64, 32}, {64, 48, 24}};  // of an expert: by columns, by keys
  const int most_queries = kMostQueries[columns / 32 - 2][half ? 0 : several ? 2 : 1];
  int memory;
  return x.M * std::max(columns, 96) <= (half ? 256 : 192) * 96 && std::int64_t(x.queries.max_length) * x.s <= std::int64_t(most_queries) * x.M &&
         device_attribute(memory, cudaDevAttrMaxSharedMemoryPerMultiprocessor) == cudaSuccess && 4 * columns * units * (ceil_div(x.M, units) + 3) + 4096 <= memory;
}

// Queries of one block, or warp: the smallest tile that takes most experts whole (two standard deviations above the average load), as
// the units that a block brings in cost more than the rows that it leaves empty; or an even part of them, for enough blocks.
constexpr int kMaxAttentionTile = 1024, kMaxRowGradientTile = 512, kMaxSmallTile = 80;
inline int tile_rows(int most, int entries_per_expert, int step = kPassRows) {
  int spread = 0;
  while (spread * spread < 4LL * entries_per_expert) ++spread;
  const int expert = std::max(1, entries_per_expert + spread), rows = ceil_div(expert, ceil_div(expert, most));
  return rows <= 16 ? 16 : rows <= 32 ? 32 : ceil_div(rows, step) * step;
}
// Several passes need a second set of queries in shared memory, for which fp32 and long index lists leave no room everywhere.
inline int attention_tile_rows(const Problem& x, int entries_per_expert) {
  if (small_experts(x)) return tile_rows(kMaxSmallTile, entries_per_expert, kSmallPassRows);
  if (x.D > 128) return tile_rows(x.dtype == Dtype::fp32 ? kAttentionRows<4, 256> : kAttentionRows<2, 256>, entries_per_expert);
  // Of learned or pooled landmarks some have twice the average load. H100, 64 columns: such experts whole take 2 % less, no difference at 128.
  if (x.dtype != Dtype::fp32 && x.D <= 64 && x.K <= 512 && entries_per_expert >= kPassRows && 2 * entries_per_expert <= kMaxAttentionTile / 2)
    return round_up(2 * entries_per_expert, kPassRows);
  return tile_rows(x.dtype == Dtype::fp32 || x.K > 512 ? kPassRows : x.D <= 64 ? kMaxAttentionTile / 2 : kMaxAttentionTile, entries_per_expert);
}

// Keys of a group. It leaves two numbers, its largest score (NaN where none is a number) and 32 bits: the place of that among its keys in the lowest
// four, the second largest score in the others, as `ordered` has it, and all ones where a score is not finite. Or every key is a group, which leaves
// its score alone, where computing scores again would move more than storing all of them. H200, forward with all of them against that with groups, 12 to 96 heads: 46 to
// 101 % for up to 2048 keys; for 2401, of 64 columns 98 to 135 % with K up to 64, 86 to 92 % with 96, of 128 columns 91 to 119 % up to 32, 81 to 96 % with 64; for 4096 the
// last two 97 and 85 to 105 %.
constexpr int kGroupKeys = 16;
constexpr int kShortKeys = 256;    // so many scores eight lanes select from
constexpr int kWarpScores = 2048;  // and a warp; more warps of that launch then put the landmarks' compressed values together
constexpr int kWarpTopk = 64;      // of groups, a warp chooses so many keys
inline int group_keys(int L, int K, int D) {
  const int most = D > 64 ? 64 * K : K > kWarpTopk ? 48 * K : 0;
  return L <= std::max(kWarpScores, std::min(most, 8192)) ? 1 : kGroupKeys;
}
inline bool combines_with_topk(const LandmarkParams& p) { return p.group == 1 && p.problem.keys.max_length <= kWarpScores; }
// Scores of such rows are stored as fp16 where that is half of their bytes and few keys are chosen, for which those that fp16 does not tell apart are computed again.
constexpr int kFewTopk = 64;
inline bool stores_halves(const Problem& x) {
  return x.dtype != Dtype::fp32 && x.D <= 64 && x.K <= kFewTopk && x.keys.max_length > kShortKeys && x.keys.max_length <= kWarpScores;
}

// Rows of many groups are first cut down by a sample of them: one of every `stride`, at a hashed place, as contiguous structure
// cannot mislead that. H100: a smaller sample leaves more candidates, a larger one takes longer to sort.
__host__ __device__ inline int sample_stride(int groups) {
  const int sample = groups / 32 < 1024 ? 1024 : groups / 32 > 4096 ? 4096 : groups / 32;
  return ceil_div(groups, sample);
}
__host__ __device__ inline int sampled_group(int i, int stride) {
  std::uint32_t hash = (i + 1) * 0x9e3779b9u;
  hash = (hash ^ (hash >> 15)) * 0x85ebca6bu;
  return i * stride + static_cast<int>((hash ^ (hash >> 13)) % stride);
}
// Numbers between the rows of scores: whole tiles of the scoring kernel.
inline std::int64_t score_pitch(int L, int group) { return (std::int64_t(L) + 63) / 64 * 64 / group * (group > 1 ? 2 : 1); }

// Queries whose key gradients one block sums: twice the average load, so that usual experts are one segment, and one expert
// with all queries is still the work of many blocks.
inline int segment_rows(int entries_per_expert) { return (2 * entries_per_expert + 127) / 64 * 64; }

// Experts whose queries a pass of the gradient specialists takes at most: one has all 64 rows, each of four 16 of them. H100, time of four against that of one: 92 % at 16
// queries of an expert, 98 % at 32, 103 % at 48; two experts are between.
inline int gradient_slots(const Problem& x) { return x.queries.max_length > 40 * x.M ? 1 : 4; }

// Kernels that sum all of a query's gradient in one place give it the scale of the keys, and what landmarks give to it the ratio of the two.
inline bool have_ratio(float landmark_scale, float scale) { return scale != 0.0f && std::fabs(landmark_scale) <= 1e6f * std::fabs(scale); }

// An fp32 element that products round to TF32: 8 bits of exponent and 10 of mantissa, as tensor cores take them.
struct Tf32 {
  float x;
};

template <class T_, int DP_, bool GROUPS = false>
struct Config {
  using T = T_;                           // element type
  static constexpr int DP = DP_;          // padded head dimension
  static constexpr bool kGroups = GROUPS; // products by warpgroups, which all blocks consist of: sm_90a, 16-bit elements
  // Warps that share 16 rows: each weighs all of them, and sums its own columns, as many as registers hold.
  static constexpr int kSharers = DP <= 128 ? 1 : 2, kColumns = DP / kSharers;
};

// Upper bound, known on the host, of the tiles of `rows` queries that one head can have whatever its routing.
__host__ __device__ inline int max_tiles(const Problem& x, int rows) {
  const int entries = x.queries.max_length * (x.s > 1 ? x.s : 1);
  return entries / rows + (x.s == 0 ? 1 : entries < x.M ? entries : x.M);
}

// Units of one head whose gradients are summed, and parts into which the rows that pass by are cut.
__host__ __device__ inline int units_of(const UnitGradientParams& p) {
  return p.role == UnitRole::compress ? p.problem.keys.max_length : p.role == UnitRole::routed ? p.problem.K : p.problem.M;
}
__host__ __device__ inline int parts_of(const UnitGradientParams& p) {
  return p.role == UnitRole::compress ? 1 : p.role == UnitRole::routed ? max_tiles(p.problem, p.groups.segment_rows) : p.splits;
}

template <class F>
cudaError_t dispatch_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::bf16: return f(__nv_bfloat16{});
    case Dtype::fp16: return f(__half{});
    case Dtype::fp32: return f(float{});
  }
  return cudaErrorInvalidValue;
}

// The same for kernels of 16-bit elements alone.
template <class F>
cudaError_t dispatch_16_bits(Dtype dtype, F&& f) {
  return dispatch_dtype(dtype, [&](auto element) {
    if constexpr (sizeof(element) == 2) return f(element);
    else return cudaErrorInvalidValue;
  });
}

constexpr int kReservedMemory = 1024;  // of a block's shared memory, by the system
// So many blocks of `bytes` each have room on a multiprocessor of sm_90. The same everywhere, as results may depend on it.
inline int blocks_by_memory(std::size_t bytes) { return static_cast<int>(228 * 1024 / (bytes + kReservedMemory)); }

// Is the sm_90a code of this build what runs here?
static inline bool runs_on_hopper() {
#ifdef __CUDA_ARCH_LIST__
  constexpr int built[] = {__CUDA_ARCH_LIST__};
  int major;
  return std::find(std::begin(built), std::end(built), 900) != std::end(built) && device_attribute(major, cudaDevAttrComputeCapabilityMajor) == cudaSuccess && major == 9;
#else
  return false;
#endif
}
// And are there kernels of warpgroups for this?
static inline bool has_warpgroups(Dtype dtype, int D) { return dtype != Dtype::fp32 && D <= 128 && runs_on_hopper(); }

template <class F>
cudaError_t dispatch(Dtype dtype, int D, F&& f) {
  if (D < kCudaHeadDimStep || D > kMaxCudaHeadDim || D % kCudaHeadDimStep != 0) return cudaErrorInvalidValue;
  return dispatch_dtype(dtype, [&](auto element) {  // zeros fill the head up to these columns in shared memory
    using T = decltype(element);
    return D <= 64 ? f(Config<T, 64>{}) : D <= 128 ? f(Config<T, 128>{}) : f(Config<T, 256>{});
  });
}

// `whole_groups`: blocks of whole warpgroups suit this problem. Where they do, and the device has them, they take it.
template <class F>
cudaError_t dispatch(Dtype dtype, int D, bool whole_groups, F&& f) {
  if (!whole_groups || !has_warpgroups(dtype, D)) return dispatch(dtype, D, f);
  return dispatch(dtype, D, [&](auto config) {
    using C = decltype(config);
    if constexpr (sizeof(typename C::T) == 2 && C::DP <= 128) return f(Config<typename C::T, C::DP, true>{});
    else return cudaErrorInvalidValue;
  });
}

// The same for kernels whose products may be rounded to TF32, if the problem says so.
template <class F>
cudaError_t dispatch(const Problem& x, F&& f) {
  if (x.dtype != Dtype::fp32 || !x.tf32) return dispatch(x.dtype, x.D, f);
  return dispatch(x.dtype, x.D, [&](auto config) {
    using C = decltype(config);
    if constexpr (sizeof(typename C::T) == 4) return f(Config<Tf32, C::DP>{});
    else return cudaErrorInvalidValue;
  });
}
template <class F>
cudaError_t dispatch(const Problem& x, bool whole_groups, F&& f) {
  return x.dtype == Dtype::fp32 ? dispatch(x, f) : dispatch(x.dtype, x.D, whole_groups, f);
}

}  // namespace mita
