// Landmark queries by average pooling, and its gradient.
//
// pool: a window, or 512 bytes of its rows, is summed by one warp or by several of a block, long ones piece by piece; fp32 sums,
// combined in a fixed order, divided and rounded once. Long sequences are pooled and routed in one kernel where that is at hand (pool_route_sm90.cu).
// pool_backward: four threads per row of dq; they read the few windows that hold its token, and may add to what is there.
#include "device.cuh"
#include "launch.h"
#include "stages.cuh"

namespace mita {
namespace {

// Loads under way, and so registers, are worth more than warps. H100, one-dimensional windows: three blocks of them 60, six blocks with one load at a time 68 us.
template <class T, class Product> __global__ void __launch_bounds__(32 * kPoolShares, 3) pool_kernel(const PoolParams p, const int shares) {
  const Problem& x = p.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, share = warp % shares;
  const Product landmark = Product(blockIdx.x) * (kPoolShares / shares) + warp / shares;
  const bool exists = landmark < Product(x.B) * x.H * x.M;
  int own_shares = 1;  // as many as its sequence would have alone: the same sums
  const int lanes = min(row_lanes<T>(x.D), 32), own = lane % lanes, c = own + 32 * blockIdx.y;
  const bool inside = c * kChunk<T> < x.D;
  PooledTokens tokens{};
  Range pieces{0, exists};
  bool in_pieces = false;
  const T* q = nullptr;
  if (exists) {
    const int m = static_cast<int>(landmark % x.M), bh = static_cast<int>(landmark / x.M), b = bh / x.H, h = bh % x.H;
    const Span queries = span(x.queries, b);
    const Windows w = windows_of(p.windows, x.queries, queries.length);
    tokens = PooledTokens::of<Product>(w, m);
    own_shares = pool_shares<T>(x, w);
    in_pieces = pools_in_pieces(x, w);
    if (in_pieces) pieces = tokens.pieces();
    q = head_rows<T>(p.q, b, h, queries.start) + (inside ? c * kChunk<T> : 0);
  }
  float sum[kChunk<T>] = {};
  for (int piece = pieces.first; __syncthreads_or(piece < pieces.last); ++piece) {
    float part[kChunk<T>] = {};
    if (piece < pieces.last)
      sum_share<T>(part, in_pieces ? tokens.of_piece(piece) : tokens, lanes, share, own_shares, [&](int token) { return load_vector(q + token * p.q.row); });
    if (shares > 1) {
      __shared__ float parts[kPoolShares][32][kChunk<T>];
      if (lane < lanes)
#pragma unroll
        for (int e = 0; e < kChunk<T>; ++e) parts[warp][lane][e] = part[e];
      __syncthreads();
      if (share == 0)
        for (int i = 1; i < own_shares; ++i)
#pragma unroll
          for (int e = 0; e < kChunk<T>; ++e) part[e] += parts[warp + i][own][e];
    }
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e) sum[e] += part[e];
  }
  if (share > 0 || !exists || lane >= lanes || !inside) return;
  *reinterpret_cast<uint4*>(static_cast<T*>(p.landmarks) + std::int64_t(landmark) * x.D + c * kChunk<T>) = mean_of<T>(sum, tokens.area).bits;
}

constexpr int kThreads = 128, kRowThreads = 4, kBlockRows = kThreads / kRowThreads;  // of a block of pool_backward, of one row of dq

template <class C, class Product> __global__ void __launch_bounds__(kThreads) pool_backward_kernel(const PoolBackwardParams p) {
  using T = typename C::T;
  const Problem& x = p.problem;
  const int chunks = x.D / kChunk<T>, N = x.queries.max_length, blocks = ceil_div(N, kBlockRows);  // of one head
  const int n = blockIdx.x % blocks * kBlockRows + threadIdx.x / kRowThreads, bh = blockIdx.x / blocks, b = bh / x.H;
  const Span queries = span(x.queries, b);
  const Windows w = windows_of(p.windows, x.queries, queries.length);
  if (n >= (x.queries.starts ? queries.length : N) || (p.add && !is_pooled(w, n))) return;
  const T* dlandmarks = head_rows<T>(p.dlandmarks, b, bh % x.H, 0);
  T* dq = head_rows<T>(p.dq, b, bh % x.H, queries.start + n);

  constexpr int kMost = C::DP / kChunk<T> / kRowThreads;  // chunks of one thread, all in flight at once
  const int first = threadIdx.x % kRowThreads;
  float sum[kMost][kChunk<T>] = {};
  const auto each_chunk = [&](auto&& f) {
#pragma unroll
    for (int i = 0; i < kMost; ++i)
      if (const int c = first + i * kRowThreads; c < chunks) f(sum[i], c * kChunk<T>);
  };
  if (p.add)
    each_chunk([&](float(&sum)[kChunk<T>], int d) {
      const Vector<T> before = load_vector(dq + d);
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) sum[e] = to_float(before.element[e]);
    });
  for_each_window<Product>(w, n, [&](int m, float weight) {
    each_chunk([&](float(&sum)[kChunk<T>], int d) {
      const Vector<T> v = load_vector(dlandmarks + m * p.dlandmarks.row + d);
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

// Do products of 32 bits suffice, which are divided in half the instructions? Windows in one dimension may follow the length of a sequence.
bool are_narrow(const Problem& x, const Windows& w) {
  const auto product = [](std::int64_t a, std::int64_t b) { return (a + 1) * (b + 1); };
  return std::max({product(w.gh, w.mh), product(std::max(w.gw, x.queries.max_length), w.mw), std::int64_t(x.B) * x.H * x.M + kPoolShares}) < INT32_MAX;
}

}  // namespace

cudaError_t launch_pool(const PoolParams& p, cudaStream_t stream) {
  return dispatch_dtype(p.problem.dtype, [&](auto element) {
    using T = decltype(element);
    const Problem& x = p.problem;
    const std::int64_t landmarks = std::int64_t(x.B) * x.H * x.M;
    // Shorter sequences may be summed in more shares than pieces are.
    const int shares = vary(x.queries) && pools_in_pieces(x, p.windows) ? kPoolShares : pool_shares<T>(x, p.windows);
    const dim3 blocks(static_cast<unsigned>((landmarks * shares + kPoolShares - 1) / kPoolShares), ceil_div(x.D, 32 * kChunk<T>));
    return launch(are_narrow(x, p.windows) ? pool_kernel<T, int> : pool_kernel<T, std::int64_t>, blocks, 32 * kPoolShares, 0, stream, p, shares);
  });
}

cudaError_t launch_pool_backward(const PoolBackwardParams& p, cudaStream_t stream) {
  return dispatch(p.problem.dtype, p.problem.D, [&](auto config) {
    const Problem& x = p.problem;
    const unsigned blocks = static_cast<unsigned>(x.B) * x.H * ceil_div(x.queries.max_length, kBlockRows);
    using C = decltype(config);
    return launch(are_narrow(x, p.windows) ? pool_backward_kernel<C, int> : pool_backward_kernel<C, std::int64_t>, blocks, kThreads, 0, stream, p);
  });
}

}  // namespace mita
