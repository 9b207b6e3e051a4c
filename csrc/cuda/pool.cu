// Landmark queries by average pooling, and its gradient.
//
// pool: a window, or 512 bytes of its rows, is summed by one warp or by several of a block, long ones piece by piece; fp32 sums,
// combined in a fixed order, divided and rounded once. Long sequences are pooled and routed in one kernel where that is at hand (pool_route_sm90.cu), many
// heads of shorter ones pooled, routed and grouped (pool_route_group_sm90.cu).
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
template <class C> constexpr int kRowHeads = C::DP <= 64 ? 2 : 1;                    // whose rows n one thread takes: windows are those of n

template <class C, class Product> __global__ void __launch_bounds__(kThreads) pool_backward_kernel(const PoolBackwardParams p) {
  using T = typename C::T;
  const Problem& x = p.problem;
  const int chunks = x.D / kChunk<T>, N = x.queries.max_length, blocks = ceil_div(N, kBlockRows), heads = ceil_div(x.H, kRowHeads<C>);  // heads: some at a time
  const int n = blockIdx.x % blocks * kBlockRows + threadIdx.x / kRowThreads, b = blockIdx.x / blocks / heads, h = blockIdx.x / blocks % heads * kRowHeads<C>;
  const Span queries = span(x.queries, b);
  const Windows w = windows_of(p.windows, x.queries, queries.length);
  const bool pooled = is_pooled(w, n), written = n < (x.queries.starts ? queries.length : N) && (pooled || !p.add);
  const T* dlandmarks = head_rows<T>(p.dlandmarks, b, h, 0);
  T* dq = head_rows<T>(p.dq, b, h, queries.start + n);

  constexpr int kOfHead = C::DP / kChunk<T> / kRowThreads, kMost = kRowHeads<C> * kOfHead;  // chunks of one thread, all in flight at once
  const int own = threadIdx.x % kRowThreads;
  float sum[kMost][kChunk<T>] = {};
  const auto each_chunk = [&](auto* row, std::int64_t head, auto&& f) {
#pragma unroll
    for (int i = 0; i < kMost; ++i)
      if (const int c = own + i % kOfHead * kRowThreads; c < chunks && h + i / kOfHead < x.H) f(sum[i], row + i / kOfHead * head + c * kChunk<T>);
  };
  if (p.add && written)
    each_chunk(dq, p.dq.head, [&](float(&sum)[kChunk<T>], const T* at) {
      const Vector<T> before = load_vector(at);
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) sum[e] = to_float(before.element[e]);
    });
  wait_for_kernel_before();
  if (!written) return;
  if (pooled) {
    // The threads of a row divide for each other: one bound of the lines, or columns, that overlap line i and column j each.
    static_assert(kRowThreads == 4);
    const unsigned together = ((1u << kRowThreads) - 1) << (threadIdx.x % 32 / kRowThreads * kRowThreads);
    const bool columns = own >= 2, end = own % 2;
    const auto overlapping_both = [&](int i, int j, int h, int w, int other_h, int other_w) {
      const int mine = bound_of_overlapping<Product>(columns ? j : i, columns ? w : h, columns ? other_w : other_h, end);
      const auto bound = [&](int which) { return __shfl_sync(together, mine, which, kRowThreads); };
      return std::pair<Range, Range>{{bound(0), bound(1)}, {bound(2), bound(3)}};
    };
    const int cell = n - w.prefix, line = cell / w.gw;
    const auto [lines, places] = overlapping_both(line, cell - line * w.gw, w.gh, w.gw, w.mh, w.mw);
#pragma unroll 1  // registers
    for (int i = lines.first; i < lines.last; ++i)
#pragma unroll 1
      for (int j = places.first; j < places.last; ++j) {
        const auto [height, width] = overlapping_both(i, j, w.mh, w.mw, w.gh, w.gw);
        const float weight = 1.0f / static_cast<float>((height.last - height.first) * (width.last - width.first));
        each_chunk(dlandmarks + (i * w.mw + j) * p.dlandmarks.row, p.dlandmarks.head, [&](float(&sum)[kChunk<T>], const T* at) {
          const Vector<T> v = load_vector(at);
#pragma unroll
          for (int e = 0; e < kChunk<T>; ++e) sum[e] += weight * to_float(v.element[e]);
        });
      }
  }
  each_chunk(dq, p.dq.head, [&](const float(&sum)[kChunk<T>], T* at) {
    Vector<T> result;
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e) result.element[e] = from_float<T>(sum[e]);
    *reinterpret_cast<uint4*>(at) = result.bits;
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
    using C = decltype(config);
    const unsigned blocks = static_cast<unsigned>(x.B) * ceil_div(x.H, kRowHeads<C>) * ceil_div(x.queries.max_length, kBlockRows);
    return launch(p.early, are_narrow(x, p.windows) ? pool_backward_kernel<C, int> : pool_backward_kernel<C, std::int64_t>, blocks, kThreads, 0, stream, p);
  });
}

}  // namespace mita
