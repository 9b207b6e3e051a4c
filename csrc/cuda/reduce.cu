// The small passes of the backward: row sums and sums of partial gradients, each in a fixed order.
//   delta:  eight lanes own one row; sum of dout * out, minus the gradient of the lse
//   reduce: one thread owns one element of a total and adds the parts in their order
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

template <class T> __global__ void __launch_bounds__(kThreads) reduce_kernel(const ReduceParams p) {
  const std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x, size = std::int64_t(p.rows) * p.D;
  if (i >= p.BH * size) return;
  const bool keys = blockIdx.y == 0;
  float* const total = keys ? p.dk.total : p.dv.total;
  T* const rounded = static_cast<T*>(keys ? p.dk.rounded : p.dv.rounded);
  const float* const partial = (keys ? p.dk.partial : p.dv.partial) + i / size * p.parts * size + i % size;
  float sum = 0.0f;
#pragma unroll 4
  for (int part = 0; part < p.parts; ++part) sum += partial[part * size];
  if (total) total[i] = sum;
  if (rounded) rounded[i] = from_float<T>(sum);
}

}  // namespace

cudaError_t launch_delta(const DeltaParams& p, cudaStream_t stream) {
  return dispatch_dtype(p.dtype, [&](auto element) {
    const std::int64_t threads = std::int64_t(p.B) * p.H * p.sequences.max_length * kLanes;
    delta_kernel<decltype(element)><<<static_cast<unsigned>((threads + kThreads - 1) / kThreads), kThreads, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

cudaError_t launch_reduce(const ReduceParams& p, cudaStream_t stream) {
  return dispatch_dtype(p.dtype, [&](auto element) {
    const std::int64_t elements = std::int64_t(p.BH) * p.rows * p.D;
    reduce_kernel<decltype(element)><<<dim3(static_cast<unsigned>((elements + kThreads - 1) / kThreads), 2), kThreads, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace mita
