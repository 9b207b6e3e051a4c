// The small passes of the backward: row sums and sums of partial gradients, each in a fixed order.
//   delta:  eight lanes own one row; sum of dout * out, minus the gradient of the lse
//   reduce: half a warp, or a whole one, owns one row of a total and adds the parts in their order
#include "device.cuh"
#include "launch.h"

namespace mita {
namespace {

constexpr int kThreads = 256, kLanes = 8;

template <class T> __global__ void __launch_bounds__(kThreads) delta_kernel(const DeltaParams p) {
  const int rows = p.sequences.max_length;
  const std::int64_t row = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) / kLanes, total = std::int64_t(p.B) * p.H * rows;
  const int lane = threadIdx.x % kLanes, bh = static_cast<int>(min(row, total - 1) / rows), b = bh / p.H, n = static_cast<int>(min(row, total - 1) % rows);
  const Span sequence = span(p.sequences, b);
  const bool present = row < total && n < sequence.length;
  float sum = 0.0f;
  if (present) {
    const T* dout = head_rows<T>(p.dout, b, bh % p.H, sequence.start + n);
    const T* out = head_rows<T>(p.out, b, bh % p.H, sequence.start + n);
    for (int c = lane; c < p.D / kChunk<T>; c += kLanes) {
      const Vector<T> a = load_vector(dout + c * kChunk<T>), b = load_vector(out + c * kChunk<T>);
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) sum += to_float(a.element[e]) * to_float(b.element[e]);
    }
  }
#pragma unroll
  for (int d = 1; d < kLanes; d <<= 1) sum += __shfl_xor_sync(kAllLanes, sum, d);
  if (row < total && lane == 0) p.delta[row] = present ? sum - (p.dlse ? p.dlse[row] : 0.0f) : 0.0f;
}

template <class T> __global__ void __launch_bounds__(kThreads, 5) reduce_kernel(const ReduceParams p) {
  wait_for_kernel_before();
  let_next_kernel_start();
  const int lanes = lanes_of_sum(p.D), lane = threadIdx.x % lanes;
  const std::int64_t own = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) / lanes, row = min(own, std::int64_t(p.BH) * p.rows - 1);
  const int bh = static_cast<int>(row / p.rows), m = static_cast<int>(row % p.rows);
  const bool keys = blockIdx.y > 0, delta = !keys && p.delta;
  const float* const partial = (keys ? p.dk.partial : p.dv.partial) + (std::int64_t(bh) * p.parts * p.rows + m) * p.D;
  T* const total = static_cast<T*>(keys ? p.dk.total : p.dv.total);
  const T* const values = head_rows<T>(p.values, bh / p.H, bh % p.H, m);
  float dot = 0.0f;
#pragma unroll 1
  for (int d = 4 * lane; d < p.D; d += 4 * lanes) {
    const Four<T> its = delta ? *reinterpret_cast<const Four<T>*>(values + d) : Four<T>{};
    float4 sum[1] = {};
    add_in_order<6>(sum, partial + d, 0, p.rows * p.D, p.parts);
    const Four<T> all = rounded<T>(sum[0]);
    if (own == row) *reinterpret_cast<Four<T>*>(total + row * p.D + d) = all;
#pragma unroll
    for (int i = 0; i < 4; ++i) dot += to_float(all.element[i]) * to_float(its.element[i]);
  }
  if (!delta) return;
  for (int other = 1; other < lanes; other *= 2) dot += __shfl_xor_sync(kAllLanes, dot, other);
  if (lane == 0 && own == row) p.delta[row] = dot;
}

}  // namespace

cudaError_t launch_delta(const DeltaParams& p, cudaStream_t stream) {
  return dispatch_dtype(p.dtype, [&](auto element) {
    const std::int64_t threads = std::int64_t(p.B) * p.H * p.sequences.max_length * kLanes;
    return launch(delta_kernel<decltype(element)>, static_cast<unsigned>((threads + kThreads - 1) / kThreads), kThreads, 0, stream, p);
  });
}

cudaError_t launch_reduce(const ReduceParams& p, cudaStream_t stream) {
  return dispatch_dtype(p.dtype, [&](auto element) {
    const std::int64_t threads = std::int64_t(p.BH) * p.rows * lanes_of_sum(p.D);
    return launch(p.early, reduce_kernel<decltype(element)>, dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads), p.dk.total ? 2 : 1), kThreads, 0, stream, p);
  });
}

}  // namespace mita
