// Gradients of the units of a softmax, the "keys" and "values" that rows attended to. Three sums, one kernel (UnitRole):
//   shared:   units = landmarks and compressed values, rows = all queries, cut into parts
//   routed:   units = the gathered keys and values of an expert, rows = one segment of its queries
//   compress: units = keys and values, rows = the landmarks; the epilogue adds what the routed sums left for each key
//
// One warp owns 16 units and keeps their dk and dv in registers; row tiles (q, dout, lse, delta) pass by, two stages deep:
//   P^T = exp(scale * k q^T - lse)      dv += P^T dout
//   dS^T = P^T * (v dout^T - delta)     dk += dS^T q
// Every sum has one owner and a fixed order: no atomics. Partial sums are fp32.
#include "device.cuh"
#include "launch.h"

namespace mita {
namespace {

template <class C> struct Layout : C {
  static constexpr bool kHalf = sizeof(typename C::T) == 2;
  static constexpr int kWarps = kHalf || C::DP == 64 ? 4 : 2;     // at most; 16 units each
  static constexpr int kRows = kHalf && C::DP == 64 ? 64 : 32;    // of one tile. Evidence: 64 rows of 128 columns spill
  struct Shared {
    struct {
      TileStorage<typename C::T, C::DP, kRows> q, dout;
      float lse[kRows], delta[kRows];  // lse in the base of T, +infinity for absent rows
    } stage[2];
    TileStorage<typename C::T, C::DP, 16 * kWarps> k, v;
  };
  static_assert(sizeof(Shared) <= 99 * 1024);
};

// Adds the routed gradients of the keys [key0 + 16 * warp, + 16) to dk and dv: landmark after landmark, slot after slot,
// segment after segment. `starts` is scratch for M numbers.
template <int DP>
__device__ void add_routed(const UnitGradientParams& p, int bh, int key0, int block_units, int* starts, float (&dk)[DP / 8][4], float (&dv)[DP / 8][4]) {
  const Problem& x = p.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
  const std::int32_t* segments = p.groups.segments + std::int64_t(bh) * (x.M + 1);
  const std::int32_t* indices = p.indices + std::int64_t(bh) * x.M * x.K;
  __syncthreads();  // the scratch was something else before
  for (int m = threadIdx.x; m < x.M; m += blockDim.x) {  // each landmark's first slot at or after key0; K if not in this block
    const std::int32_t* row = indices + std::int64_t(m) * x.K;
    int low = 0, high = segments[m] < segments[m + 1] ? x.K : 0;  // an expert without queries has left no sums
    while (low < high) {
      const int middle = (low + high) / 2;
      if (static_cast<unsigned>(row[middle]) < static_cast<unsigned>(key0)) low = middle + 1;
      else high = middle;
    }
    const bool here = segments[m] < segments[m + 1] && low < x.K && static_cast<unsigned>(row[low]) < static_cast<unsigned>(key0 + block_units);
    starts[m] = here ? low : x.K;
  }
  __syncthreads();
  for (int m0 = 0; m0 < x.M; m0 += 32) {
    unsigned present = __ballot_sync(0xffffffffu, m0 + lane < x.M && starts[min(m0 + lane, x.M - 1)] < x.K);
    for (; present; present &= present - 1) {
      const int m = m0 + __ffs(present) - 1;
      for (int slot = starts[m]; slot < x.K; ++slot) {
        const unsigned unit = static_cast<unsigned>(indices[std::int64_t(m) * x.K + slot]) - key0;
        if (unit >= static_cast<unsigned>(block_units)) break;
        if (static_cast<int>(unit / 16) != warp || static_cast<int>(unit & 7) != g) continue;
        for (int segment = segments[m]; segment < segments[m + 1]; ++segment) {
          const std::int64_t at = ((std::int64_t(bh) * p.max_segments + segment) * x.K + slot) * x.D + 2 * t;
#pragma unroll
          for (int d = 0; d < DP / 8; ++d) {
            if (8 * d >= x.D) break;
            const float2 a = *reinterpret_cast<const float2*>(p.partial_dk + at + 8 * d), b = *reinterpret_cast<const float2*>(p.partial_dv + at + 8 * d);
            const bool upper = (unit & 8) == 0;
            dk[d][0] += upper ? a.x : 0.0f, dk[d][1] += upper ? a.y : 0.0f, dk[d][2] += upper ? 0.0f : a.x, dk[d][3] += upper ? 0.0f : a.y;
            dv[d][0] += upper ? b.x : 0.0f, dv[d][1] += upper ? b.y : 0.0f, dv[d][2] += upper ? 0.0f : b.x, dv[d][3] += upper ? 0.0f : b.y;
          }
        }
      }
    }
  }
}

template <class C> __global__ void __launch_bounds__(32 * Layout<C>::kWarps, Layout<C>::kHalf ? 2 : 1) unit_gradient_kernel(const UnitGradientParams p) {
  using L = Layout<C>;
  using T = typename C::T;
  constexpr int DP = C::DP, kRows = L::kRows, kTiles = kRows / 8;
  extern __shared__ __align__(128) unsigned char memory[];
  typename L::Shared& shared = *reinterpret_cast<typename L::Shared*>(memory);

  const Problem& x = p.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2;
  const int block_units = blockDim.x / 2, group = x.H / x.Hkv;
  const bool compress = p.role == UnitRole::compress, routed = p.role == UnitRole::routed;

  // What this block works on: units [u0, u0 + block_units) of one head, and the rows that come by in `steps` tiles.
  const int units = compress ? x.keys.max_length : routed ? x.K : x.M, blocks = ceil_div(units, block_units);
  const int parts = compress ? 1 : routed ? p.max_segments : p.splits;
  const int u0 = blockIdx.x % blocks * block_units, part = blockIdx.x / blocks % parts, head = blockIdx.x / blocks / parts;
  const int heads = compress ? x.Hkv : x.H, b = head / heads, h = head % heads, bh = head;  // bh: shared and routed only
  const Span queries = span(x.queries, b), keys = span(x.keys, b);
  WorkItem work = {};
  if (routed) {
    work = find_work(p.groups.segments, p.groups, x, bh, queries.length, part, p.groups.segment_rows);
    if (work.entries <= 0) return;
  }
  const int tiles_per_part = ceil_div(ceil_div(queries.length, kRows), parts);
  const int first_row = compress || routed ? 0 : part * tiles_per_part * kRows;
  const int last_row = compress ? p.landmark_rows : routed ? work.entries : min(queries.length, first_row + tiles_per_part * kRows);
  const int tiles = max(0, ceil_div(last_row - first_row, kRows)), steps = compress ? tiles * group : tiles;

  const auto unit_row = [&](int i) {  // the row of unit u0 + i, -1 where there is none
    if (!routed) return u0 + i < (compress ? keys.length : x.M) ? u0 + i : -1;
    const int index = u0 + i < x.K ? p.indices[(std::int64_t(bh) * x.M + work.expert) * x.K + u0 + i] : -1;
    return static_cast<unsigned>(index) < static_cast<unsigned>(keys.length) ? index : -1;
  };
  const auto load_stage = [&](int step) {
    auto& stage = shared.stage[step & 1];
    const int row_head = compress ? h * group + step / tiles : h, base = first_row + (compress ? step % tiles : step) * kRows;
    const std::int64_t row_start = compress ? 0 : queries.start, stats = (std::int64_t(b) * x.H + row_head) * (compress ? x.M : x.queries.max_length);
    const auto row = [&](int i) { return base + i >= last_row ? -1 : routed ? work.entry(base + i) / work.slots : base + i; };
    const auto load = [&](Tile<T, DP> target, const Rows& rows) {
      const T* data = head_rows<T>(rows, b, row_head, row_start);
      load_rows<T, DP>(target, kRows, x.D, rows.aligned, [&](int i) {
        const int r = row(i);
        return r < 0 ? nullptr : data + r * rows.row;
      });
    };
    load(stage.q.tile(), p.row_q);
    load(stage.dout.tile(), p.row_dout);
    for (int i = threadIdx.x; i < kRows; i += blockDim.x) {
      const int r = row(i);
      const float lse = r < 0 ? kInfinity : p.lse[stats + r] * kLogit<T>;
      stage.lse[i] = lse == -kInfinity ? kInfinity : lse;  // a row that attended to nothing gives nothing
      stage.delta[i] = r < 0 ? 0.0f : p.delta[stats + r];
    }
  };
  const auto load_units = [&](Tile<T, DP> target, const Rows& rows) {
    const T* data = routed ? head_rows<T>(rows, b, h / group, keys.start) : head_rows<T>(rows, b, h, compress ? keys.start : 0);
    load_rows<T, DP>(target, block_units, x.D, rows.aligned, [&](int i) {
      const int r = unit_row(i);
      return r < 0 ? nullptr : data + r * rows.row;
    });
  };
  load_units(shared.k.tile(), p.unit_k);
  load_units(shared.v.tile(), p.unit_v);
  if (steps > 0) load_stage(0);
  commit_loads();

  const SharedRows<T, DP> k{shared.k.tile().from_row(16 * warp)}, v{shared.v.tile().from_row(16 * warp)};
  float dk[DP / 8][4], dv[DP / 8][4];
  clear(dk);
  clear(dv);
  const float scale = p.scale * kLogit<T>;
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) load_stage(step + 1);
    commit_loads();
    wait_loads<1>();
    __syncthreads();
    auto& stage = shared.stage[step & 1];
    float probability[kTiles][4], gradient[kTiles][4];
    clear(probability);
    add_product<T, DP, kTiles>(probability, k, stage.q.tile(), lane);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float2 lse = *reinterpret_cast<const float2*>(&stage.lse[8 * n + 2 * (lane & 3)]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float l = i & 1 ? lse.y : lse.x;
        probability[n][i] = l == kInfinity ? 0.0f : exponential<T>(probability[n][i] * scale - l);
      }
    }
    add_weighted_rows<T, DP, kTiles>(dv, probability, stage.dout.tile(), lane);
    clear(gradient);
    add_product<T, DP, kTiles>(gradient, v, stage.dout.tile(), lane);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float2 delta = *reinterpret_cast<const float2*>(&stage.delta[8 * n + 2 * (lane & 3)]);
#pragma unroll
      for (int i = 0; i < 4; ++i) gradient[n][i] = probability[n][i] * (gradient[n][i] - (i & 1 ? delta.y : delta.x));
    }
    add_weighted_rows<T, DP, kTiles>(dk, gradient, stage.q.tile(), lane);
    __syncthreads();
  }
  wait_loads<0>();

#pragma unroll
  for (int d = 0; d < DP / 8; ++d)
#pragma unroll
    for (int i = 0; i < 4; ++i) dk[d][i] *= p.scale;
  const float one[2] = {1.0f, 1.0f};
  const int own = u0 + 16 * warp;
  if (!compress) {
    const std::int64_t row0 = (std::int64_t(bh) * parts + part) * units;
    const auto row_in = [&](float* partial) { return [=](int i) { return own + i < units ? partial + (row0 + own + i) * x.D : nullptr; }; };
    store_partial_rows<DP>(dk, one, x.D, lane, row_in(p.partial_dk));
    store_partial_rows<DP>(dv, one, x.D, lane, row_in(p.partial_dv));
    return;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (unit_row(16 * warp + g + 8 * i) < 0)  // keys beyond a short sequence
#pragma unroll
      for (int d = 0; d < DP / 8; ++d) dk[d][2 * i] = dk[d][2 * i + 1] = dv[d][2 * i] = dv[d][2 * i + 1] = 0.0f;
  static_assert(sizeof(shared.stage) >= kMaxLandmarks * sizeof(int));
  if (p.indices != nullptr)
    for (int i = 0; i < group; ++i)
      add_routed<DP>(p, b * x.H + h * group + i, u0, block_units, reinterpret_cast<int*>(&shared.stage), dk, dv);
  const auto row_in = [&](const Rows& rows) {
    T* data = head_rows<T>(rows, b, h, keys.start);
    return [=](int i) { return own + i < (x.keys.starts ? keys.length : units) ? data + (own + i) * rows.row : nullptr; };
  };
  __syncthreads();
  store_rows<T, DP>(k.tile, dk, one, x.D, lane, row_in(p.dk));
  store_rows<T, DP>(v.tile, dv, one, x.D, lane, row_in(p.dv));
}

}  // namespace

cudaError_t launch_unit_gradient(const UnitGradientParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  return dispatch(x.dtype, x.D, [&](auto config) {
    using C = decltype(config);
    using L = Layout<C>;
    const bool compress = p.role == UnitRole::compress;
    const int units = compress ? x.keys.max_length : p.role == UnitRole::routed ? x.K : x.M;
    const int parts = compress ? 1 : p.role == UnitRole::routed ? p.max_segments : p.splits;
    const int warps = std::min(L::kWarps, ceil_div(units, 16));
    if (cudaError_t status = allow_shared_memory(unit_gradient_kernel<C>, sizeof(typename L::Shared))) return status;
    const unsigned blocks = static_cast<unsigned>(x.B) * (compress ? x.Hkv : x.H) * parts * ceil_div(units, 16 * warps);
    unit_gradient_kernel<C><<<blocks, 32 * warps, sizeof(typename L::Shared), stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace mita
