// Landmark queries by average pooling, and its gradient.
//
// pool: one block per landmark. A thread owns 16 bytes of a row (neighbouring threads neighbouring bytes) and every
// `lanes`-th row of the window; fp32 sums, combined in a fixed order, divided and rounded once.
// pool_backward: four threads per row of dq; they read the few windows that hold its token, and may add to what is there.
#include "device.cuh"
#include "launch.h"

namespace mita {
namespace {

constexpr int kThreads = 128;

template <class T> __global__ void __launch_bounds__(kThreads) pool_kernel(const PoolParams p) {
  const Problem& x = p.problem;
  const int m = blockIdx.x % x.M, bh = blockIdx.x / x.M, b = bh / x.H, h = bh % x.H;
  const Span queries = span(x.queries, b);
  const Windows w = windows_of(p.windows, x.queries, queries.length);
  const Range rows = overlapping(m / w.mw, w.mh, w.gh), columns = overlapping(m % w.mw, w.mw, w.gw);
  const int width = columns.last - columns.first, area = (rows.last - rows.first) * width;

  const int chunks = x.D / kChunk<T>, lanes = kThreads / chunks;
  const int c = threadIdx.x % chunks, lane = threadIdx.x / chunks;
  float sum[kChunk<T>] = {};
  if (lane < lanes) {
    const T* q = head_rows<T>(p.q, b, h, queries.start + w.prefix) + c * kChunk<T>;
#pragma unroll 4
    for (int i = lane; i < area; i += lanes) {
      const int y = rows.first + i / width, column = columns.first + i % width;
      const Vector<T> v = load_vector(q + (std::int64_t(y) * w.gw + column) * p.q.row, p.q.aligned);
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) sum[e] += to_float(v.element[e]);
    }
  }
  __shared__ float partial[kThreads][kChunk<T>];
#pragma unroll
  for (int e = 0; e < kChunk<T>; ++e) partial[threadIdx.x][e] = sum[e];
  __syncthreads();
  for (int d = threadIdx.x; d < x.D; d += kThreads) {
    float total = 0.0f;
    for (int i = 0; i < lanes; ++i) total += partial[i * chunks + d / kChunk<T>][d % kChunk<T>];
    static_cast<T*>(p.landmarks)[(std::int64_t(bh) * x.M + m) * x.D + d] = from_float<T>(area ? total / static_cast<float>(area) : 0.0f);
  }
}

constexpr int kRowThreads = 4;  // of one row of dq

template <class T> __global__ void __launch_bounds__(kThreads) pool_backward_kernel(const PoolBackwardParams p) {
  const Problem& x = p.problem;
  const int chunks = x.D / kChunk<T>, N = x.queries.max_length;
  const std::int64_t row = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) / kRowThreads;
  if (row >= std::int64_t(x.B) * x.H * N) return;
  const int n = static_cast<int>(row % N), bh = static_cast<int>(row / N), b = bh / x.H;
  const Span queries = span(x.queries, b);
  const Windows w = windows_of(p.windows, x.queries, queries.length);
  if ((x.queries.starts && n >= queries.length) || (p.add && !is_pooled(w, n))) return;
  const T* dlandmarks = head_rows<T>(p.dlandmarks, b, bh % x.H, 0);
  T* dq = head_rows<T>(p.dq, b, bh % x.H, queries.start + n);

  constexpr int kMost = kMaxCudaHeadDim / kChunk<T> / kRowThreads;  // chunks of one thread, all in flight at once
  const int first = threadIdx.x % kRowThreads;
  float sum[kMost][kChunk<T>] = {};
  const auto each_chunk = [&](auto&& f) {
#pragma unroll
    for (int i = 0; i < kMost; ++i)
      if (const int c = first + i * kRowThreads; c < chunks) f(sum[i], c * kChunk<T>);
  };
  if (p.add)
    each_chunk([&](float(&sum)[kChunk<T>], int d) {
      const Vector<T> before = load_vector(dq + d, true);
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) sum[e] = to_float(before.element[e]);
    });
  for_each_window(w, n, [&](int m, float weight) {
    each_chunk([&](float(&sum)[kChunk<T>], int d) {
      const Vector<T> v = load_vector(dlandmarks + m * p.dlandmarks.row + d, p.dlandmarks.aligned);
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) sum[e] += weight * to_float(v.element[e]);
    });
  });
  each_chunk([&](float(&sum)[kChunk<T>], int d) {
    Vector<T> result;
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e) result.element[e] = from_float<T>(sum[e]);
    *reinterpret_cast<uint4*>(dq + d) = result.bits;
  });
}

}  // namespace

cudaError_t launch_pool(const PoolParams& p, cudaStream_t stream) {
  return dispatch_dtype(p.problem.dtype, [&](auto element) {
    const unsigned blocks = static_cast<unsigned>(p.problem.B) * p.problem.H * p.problem.M;
    pool_kernel<decltype(element)><<<blocks, kThreads, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

cudaError_t launch_pool_backward(const PoolBackwardParams& p, cudaStream_t stream) {
  return dispatch_dtype(p.problem.dtype, [&](auto element) {
    using T = decltype(element);
    const Problem& x = p.problem;
    const std::int64_t threads = std::int64_t(x.B) * x.H * x.queries.max_length * kRowThreads;
    pool_backward_kernel<T><<<static_cast<unsigned>((threads + kThreads - 1) / kThreads), kThreads, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace mita
