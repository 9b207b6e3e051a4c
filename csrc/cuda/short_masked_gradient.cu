// Short sequences: the whole backward pass of one (batch, head) by one block, which holds its queries, keys, values and incoming gradients in shared memory
// and fills a multiprocessor. Products of warpgroups with all keys take the place of lists: what a query's expert did not choose is masked by bits, so that
// K costs nothing. A warpgroup has 64 queries, then 64 keys; between the phases the block meets:
//   1. weigh: the queries' units, 32 at a time, twice: for delta, then for logit gradients dS and with them dq. P and dS of the shared units are left, rounded
//   2. sum over the queries: the gradients of compressed values, and of landmarks as shared units
//   3. compress: the keys weigh all landmarks, and leave dS for those of the landmarks
//   4. sum over the keys: the gradients of the landmarks as queries
//   5. dq, with what queries receive as parts of pooled landmarks: a product with 0 and 1
//   6. the gradients of the keys and values, which queries and landmarks give: the queries 32 at a time
// Where keys are nearly the same, dq and the landmarks' gradients are what is left when dS cancels, and its rounding to 16 bits does not
// cancel with it: in their sums dS has 32 bits, a rounded part and the rounded rest.
#include "device.cuh"
#include "launch.h"
#include "masks.cuh"
#include "stages.cuh"

namespace mita {
namespace {

constexpr int kWarps = 16, kThreads = 32 * kWarps, kDP = 64, kRow = kDP * 2;
constexpr int kRows = 16 * kWarps, kMostUnits = 64;  // at a time; landmarks, at most
constexpr int kStep = 32;                            // units, or queries, at a time
[[maybe_unused]] constexpr int kTiles = kStep / 8;
constexpr int kMaskPitch = kRows / kStep + 1;        // words, one of them for what is behind the first rows; free of bank conflicts

// Shared memory of a block: where what begins, in bytes; queries at 0. `rows` of queries, keys, values, their gradients and both kinds of weights.
//   weights [2] [rows, 64]: P and dS of the queries and the landmarks, then dS of the keys' compression and its rest
//   pooled, pooled_rest [units, 64]: in the place of the first weights, once these are summed
//   masks [units + 1, kMaskPitch]: of every expert a bit for every key, which a lane of the products finds in a byte of its own; of the landmarks
//   statistics [rows, 2], landmark_statistics [units, 2]: lse and delta of the queries, and of the landmarks
//   shares [units]: of a landmark's gradient, for each of its tokens
//   deltas [rows / 16, units, 2]: what the landmarks' deltas are made of, the share of 16 keys
//   key_masks [rows, kMaskPitch]: of every key a bit for every query, in the place of those; members [rows, 2]: a bit for every pooling window that a query is in
// A longer sequence has room for these three only where the first weights are, before and after.
struct Memory {
  int rows, k, v, dout, landmarks, compressed, weights, pooled_rest, weights_apart, masks, statistics, deltas, key_masks, landmark_statistics, shares, members, lengths, experts, bytes;
  Memory(const Problem& x, int units, bool is_long) {
    const int all = std::max(x.queries.max_length, x.keys.max_length), steps = round_up(all, kStep);
    rows = is_long ? round_up(all, 16) : steps;
    k = rows * kRow;
    v = 2 * k;
    dout = 3 * k;
    landmarks = 4 * k;
    compressed = landmarks + units * kRow;
    weights = compressed + units * kRow;
    pooled_rest = weights + units * kRow;
    weights_apart = std::max(rows, 2 * units) * kRow;
    masks = weights + weights_apart + rows * kRow;
    statistics = masks + round_up((units + 1) * kMaskPitch, 4) * 4;
    landmark_statistics = statistics + steps * 8;
    shares = landmark_statistics + units * 8;
    lengths = shares + units * 4;
    experts = lengths + 8;
    bytes = experts + steps * 2;
    deltas = is_long ? weights : round_up(bytes, 16);
    key_masks = is_long ? pooled_rest + units * kRow : deltas;
    members = round_up(std::max(deltas + rows / 16 * units * 8, key_masks + steps * kMaskPitch * 4), 8);
    if (!is_long) bytes = members + rows * 8;
  }
};

// LONG: more rows than the warps have at a time. dq waits where it belongs, and what keys gave to landmarks is computed again instead of kept.
template <class T, int UNITS, bool LONG> __global__ void __launch_bounds__(kThreads, 1) short_masked_gradient_kernel(const ShortGradientParams p, const Memory layout) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using C = Config<T, kDP>;        // products by warps
  using G = Config<T, kDP, true>;  // by warpgroups
  constexpr int kChunks = kDP / kChunk<T>, kUnitTiles = UNITS / 8, kParts = LONG ? 2 : 1;
  constexpr float kUnshifted = power_of_2(-kGradientShift<T>), kRescale = power_of_2(kGradientShift<T> - kProbabilityShift<T>);
  extern __shared__ __align__(kPanel) unsigned char memory[];
  const Window window(memory);
  const auto tile = [&](int at) { return Tile<T, kDP>{window.address + at}; };
  const auto q = tile(0), k = tile(layout.k), v = tile(layout.v), dout = tile(layout.dout), z = tile(layout.landmarks), c = tile(layout.compressed);
  const auto weights = [&](int kind) { return tile(layout.weights + kind * layout.weights_apart); };
  const auto ints_at = [&](int at) { return reinterpret_cast<int*>(memory + at); };
  const auto floats_at = [&](int at) { return reinterpret_cast<float*>(memory + at); };
  const auto shorts_at = [&](int at) { return reinterpret_cast<std::uint16_t*>(memory + at); };
  const ShortParams& f = p.forward;
  const Problem& x = f.problem;
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0), lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
  // Head and batch are not kept: registers.
  const auto head = [] { return opaque(blockIdx.x); };
  const auto batch = [&] { return head() / x.H; };
  const auto rows_of = [&](const Rows& rows, std::int64_t start) { return head_rows<T>(rows, batch(), head() % x.H, start); };
  const Matrix<kDP> rows_at(window.address, false), sums_at(window.address, true);  // of the whole memory
  const int M = x.M;
  int &N = ints_at(layout.lengths)[0], &L = ints_at(layout.lengths)[1];
  const auto find_members = [&] {
    if (const int n = threadIdx.x; f.pool && n < layout.rows) {
      const int length = span(x.queries, batch()).length;
      reinterpret_cast<std::uint64_t*>(memory + layout.members)[n] = n < length ? windows_with<std::uint64_t>(windows_of(f.windows, x.queries, length), n) : 0;
    }
  };
  {
    const int b = batch(), h = head() - b * x.H, n = threadIdx.x;
    const Span queries = span(x.queries, b), keys = span(x.keys, b);
    const std::int64_t at = std::int64_t(head()) * x.queries.max_length + n;
    const bool present = n < queries.length;
    // Lists are asked for first, of a warp the keys of every 16th expert, then rows, and only then are the lists waited for.
    const int asked_expert = present ? f.experts[at] : 0;
    const float lse = present ? f.lse[at] : -kInfinity;
    const float of_landmark = n < M ? f.landmark_lse[std::int64_t(head()) * M + n] : -kInfinity;
    constexpr int kExperts = UNITS / kWarps, kAhead = 2;  // of a warp; keys of a lane
    const std::int32_t* const indices = f.indices + std::int64_t(head()) * M * x.K + lane;
    int key[kExperts][kAhead];
#pragma unroll
    for (int i = 0; i < kExperts; ++i)
#pragma unroll
      for (int j = 0; j < kAhead; ++j) key[i][j] = warp + kWarps * i < M && lane + 32 * j < x.K ? indices[(warp + kWarps * i) * x.K + 32 * j] : -1;
    const auto load = [&](const Tile<T, kDP>& to, const Rows& rows, const Span& from, int count) {
      load_sequence<T, kDP, kThreads>(to, rows, b, h, from, x.D, count);
    };
    load(q, f.q, queries, layout.rows);
    load(dout, p.dout, queries, layout.rows);
    load(z, f.landmarks, {0, M}, UNITS);
    load(c, f.compressed, {0, M}, UNITS);
    load(k, f.k, keys, layout.rows);
    load(v, f.v, keys, layout.rows);
    commit_loads();

    if (n == 0) N = queries.length, L = keys.length;
    for (int i = threadIdx.x; i < UNITS * kMaskPitch; i += kThreads) ints_at(layout.masks)[i] = 0;
    if (warp == 0)
#pragma unroll
      for (int i = 0; i < UNITS / kStep; ++i) {
        const unsigned bits = __ballot_sync(kAllLanes, i * kStep + unit_of(lane) < M);
        if (lane == 0) ints_at(layout.masks)[UNITS * kMaskPitch + i] = bits;
      }
    if (n < UNITS) {
      const int area = f.pool && n < M ? PooledTokens::of<int>(windows_of(f.windows, x.queries, queries.length), n).area : 0;
      floats_at(layout.landmark_statistics)[2 * n] = offset_of<T>(of_landmark), floats_at(layout.shares)[n] = area ? 1.0f / static_cast<float>(area) : 0.0f;
    }
    // What is out of range, no forward pass has left.
    if (n < round_up(layout.rows, kStep)) {
      shorts_at(layout.experts)[n] = static_cast<std::uint16_t>(min(max(asked_expert, 0), M - 1));
      reinterpret_cast<float2*>(memory + layout.statistics)[n] = make_float2(offset_of<T>(lse), 0.0f);
    }
    if (!LONG) find_members();
    __syncthreads();
    const auto set = [&](int m, int its) {
      if (0 <= its && its < keys.length) atomicOr(ints_at(layout.masks) + m * kMaskPitch + its / kStep, 1 << bit_of(its % kStep));
    };
#pragma unroll
    for (int i = 0; i < kExperts; ++i) {
      const int m = warp + kWarps * i;
#pragma unroll
      for (int j = 0; j < kAhead; ++j) set(m, key[i][j]);
#pragma unroll 1
      for (int slot = lane + 32 * kAhead; m < M && slot < x.K; slot += 32) set(m, indices[m * x.K + slot - lane]);
    }
  }
  wait_loads<0>();
  __syncthreads();

  // Products of this warpgroup's rows with 32 others, in the place of logits and of what is given to their weights.
  float s[kTiles][4], d[kTiles][4];
  const auto begin_logits = [&](const Matrix<kDP>& rows, const Matrix<kDP>& others, const Matrix<kDP>& given, const Matrix<kDP>& other_values) {
    begin_products(s, d);
    wgmma_tiles<T>(s, rows, others);
    wgmma_tiles<T>(d, given, other_values);
    commit_products();
  };
  const auto bits_at = [&](std::uint32_t masks, int step) { return static_cast<unsigned>(load_shared_byte(masks + 4 * step)); };

  // 1. weigh
  const auto dq_of = [&](int n) { return reinterpret_cast<std::uint32_t*>(row_behind(rows_of(p.dq, span(x.queries, batch()).start) + 2 * t, p.dq.row * sizeof(T), n)); };
  Weights<T, kDP / 8> dq_rounded;  // or in its place, where it is long
#pragma unroll 1
  for (int part = 0; part < kParts; ++part) {
    const int row0 = 16 * warp + kRows * part, group0 = row0 / 64 * 64;  // where the rows of the warp begin, and of the warpgroup
    if (group0 >= x.queries.max_length) break;
    const bool has_rows = row0 < N;  // of a warpgroup's last warps some have none
    std::uint32_t own[kDP / 16][4] = {}, given[kDP / 16][4] = {}, mask_rows[2] = {};
    float lse[2] = {}, delta[2] = {}, total[2] = {};
    if (has_rows) {
      const auto rows = operand(q, row0 + (lane & 15), lane >> 4), gradients = operand(dout, row0 + (lane & 15), lane >> 4);
#pragma unroll
      for (int step = 0; step < kDP / 16; ++step) ldmatrix(own[step], rows(step, 0)), ldmatrix(given[step], gradients(step, 0));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = row0 + g + 8 * i;
        mask_rows[i] = window.address + layout.masks + 4 * kMaskPitch * shorts_at(layout.experts)[n] + t;
        lse[i] = floats_at(layout.statistics)[2 * n];
      }
    }
    const std::uint32_t landmark_mask = window.address + layout.masks + 4 * kMaskPitch * UNITS + t;
    Matrix<kDP> unit_keys = rows_at, unit_values = rows_at, unit_sums = sums_at;
    const auto units_at = [&](int keys, int values) {
      unit_keys.low = rows_at.low + (keys >> 4), unit_values.low = rows_at.low + (values >> 4), unit_sums.low = sums_at.low + (keys >> 4);
    };
    const auto next_units = [&] { unit_keys.advance(kStep * kRow), unit_values.advance(kStep * kRow), unit_sums.advance(kStep * kRow); };
    const auto weigh = [&](unsigned upper, unsigned lower, float scale) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[j][i] = exponential<T>(has(i / 2 ? lower : upper, j, i % 2) ? fmaf(s[j][i], scale * kLogit<T>, -lse[i / 2]) : -kInfinity);
    };
    const int key_steps = ceil_div(x.keys.max_length, kStep);  // not of L: the same for all threads for certain
    const auto add_statistics = [&](int steps, std::uint32_t upper, std::uint32_t lower, float scale) {
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        begin_products(s, d, own, given);
        wgmma_tiles<T>(s, own, unit_keys);
        wgmma_tiles<T>(d, given, unit_values);
        commit_products();
        wait_products<G, 0>(s, d);
        if (has_rows) {
          weigh(bits_at(upper, step), bits_at(lower, step), scale);
#pragma unroll
          for (int j = 0; j < kTiles; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) total[i / 2] += s[j][i], delta[i / 2] = fmaf(s[j][i], d[j][i], delta[i / 2]);
        }
        next_units();
      }
    };
    units_at(layout.landmarks, layout.compressed);
    add_statistics(UNITS / kStep, landmark_mask, landmark_mask, f.landmark_scale);
    units_at(layout.k, layout.v);
    add_statistics(key_steps, mask_rows[0], mask_rows[1], f.scale);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 1; j < 4; j *= 2) delta[i] += __shfl_xor_sync(kAllLanes, delta[i], j), total[i] += __shfl_xor_sync(kAllLanes, total[i], j);
      const int n = row0 + g + 8 * i;
      const float dlse = p.dlse && n < N ? p.dlse[std::int64_t(head()) * x.queries.max_length + n] : 0.0f;
      delta[i] = exact_delta<T>(delta[i] - dlse * power_of_2(kProbabilityShift<T>), total[i]);
      if (t == 0 && has_rows) floats_at(layout.statistics)[2 * n + 1] = delta[i];
    }
    float dq[kDP / 8][4];
    clear(dq);
    Matrix<kDP> own_rows = rows_at, given_rows = rows_at;
    own_rows.advance(group0 * kRow), given_rows.advance(layout.dout + group0 * kRow);
    // take(query, eight of the units, P of a lane's two of them, their dS as rounded)
    const auto differentiate = [&](int steps, std::uint32_t upper, std::uint32_t lower, float scale, auto&& take) {
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        begin_logits(own_rows, unit_keys, given_rows, unit_values);
        wait_products<G, 0>(s, d, dq);
        Weights<T, kTiles> rounded, rest;
        if (has_rows) {
          weigh(bits_at(upper, step), bits_at(lower, step), scale);
#pragma unroll
          for (int j = 0; j < kTiles; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float lo = s[j][2 * i] * kRescale * (d[j][2 * i] - delta[i]), hi = s[j][2 * i + 1] * kRescale * (d[j][2 * i + 1] - delta[i]);
              split<T>(lo, hi, rounded.packed[j][i], rest.packed[j][i]);
              take(row0 + g + 8 * i, kTiles * step + j, s[j][2 * i], s[j][2 * i + 1], rounded.packed[j][i]);
            }
        }
        begin_products(dq, rounded.packed, rest.packed);
#pragma unroll
        for (const auto* w : {&rounded, &rest})
#pragma unroll
          for (int i = 0; i < kTiles / 2; ++i) wgmma_weighted(dq, *w, i, unit_sums.at(16 * i * kRow));
        commit_products();
        next_units();
      }
      wait_products<G, 0>(dq);
    };
    units_at(layout.landmarks, layout.compressed);
    differentiate(UNITS / kStep, landmark_mask, landmark_mask, f.landmark_scale, [&](int n, int chunk, float lo, float hi, std::uint32_t dlogits) {
      store_shared(weights(0).chunk(n, chunk) + 4 * t, pack<T>(lo, hi));
      store_shared(weights(1).chunk(n, chunk) + 4 * t, dlogits);
    });
    const float ratio = f.landmark_scale / f.scale;
#pragma unroll
    for (int j = 0; j < kDP / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) dq[j][i] *= ratio;
    units_at(layout.k, layout.v);
    differentiate(key_steps, mask_rows[0], mask_rows[1], f.scale, [](auto...) {});
#pragma unroll
    for (int j = 0; j < kDP / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) dq[j][i] *= f.scale * kUnshifted;
    if (!LONG) dq_rounded = Weights<T, kDP / 8>(dq);
    if (LONG)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (const int n = row0 + g + 8 * i; n < N)
#pragma unroll
          for (int j = 0; j < kDP / 8; ++j)
            if (8 * j < x.D) dq_of(n)[4 * j] = pack<T>(dq[j][2 * i], dq[j][2 * i + 1]);
  }
  __syncthreads();

  // 2. sum over the queries. The compressed values are not needed any more: their gradients take their place. A warp has 16 landmarks and 16 columns, of both
  // kinds of weights, or where there are few of one.
  constexpr bool kBoth = UNITS == 64;
  const int m0 = kBoth ? 16 * (warp & 3) : 16 * (warp & 1), column = 16 * (kBoth ? warp >> 2 : warp >> 1 & 3);
  const bool of_values = kBoth || warp < 8, of_landmarks = kBoth || warp >= 8;
  float landmark_sum[1][2][4];
  clear(landmark_sum[0]);
  if (of_values) {
    float sum[1][2][4];
    clear(sum[0]);
    add_transposed(sum, {by_columns(weights(0), m0 / 8)}, dout, column, N);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        constexpr float kFactor = power_of_2(-kProbabilityShift<T>);
        store_shared(c.chunk(m0 + g + 8 * i, column / 8 + j) + 4 * t, pack<T>(sum[0][j][2 * i] * kFactor, sum[0][j][2 * i + 1] * kFactor));
      }
    fence_loads();
  }
  if (of_landmarks) {
    add_transposed(landmark_sum, {by_columns(weights(1), m0 / 8)}, q, column, N);
    const float ratio = f.landmark_scale / f.scale;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) landmark_sum[0][j][i] *= ratio;
  }
  __syncthreads();

  // 3. compress
  float weight[kUnitTiles][4], gradient[kUnitTiles][4];
  const auto weigh_landmarks = [&](int row0) {
    GroupRows<T, kDP> rows;
    rows.load(k.from_row(row0 / 64 * 64), lane);
    product<G>(weight, rows, z, lane);
    rows.load(v.from_row(row0 / 64 * 64), lane);
    product<G>(gradient, rows, c, lane);
    wait_products<G, 0>(weight, gradient);
    if (row0 >= L) return;
#pragma unroll
    for (int j = 0; j < kUnitTiles; ++j) {
      const float4 two = load_shared4(window.address + layout.landmark_statistics + 8 * (8 * j + 2 * t));  // lse in x and z
#pragma unroll
      for (int i = 0; i < 4; ++i)
        weight[j][i] = exponential<T>(row0 + g + 8 * (i / 2) < L ? fmaf(weight[j][i], f.scale * kLogit<T>, -(i & 1 ? two.z : two.x)) : -kInfinity);
    }
  };
#pragma unroll 1
  for (int part = 0; part < kParts; ++part) {
    const int row0 = 16 * warp + kRows * part;
    if (row0 / 64 * 64 >= x.keys.max_length) break;
    weigh_landmarks(row0);
    if (row0 >= L) continue;  // the warpgroup goes on as a whole
#pragma unroll
    for (int j = 0; j < kUnitTiles; ++j) {
      float share[2], total[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        share[i] = fmaf(weight[j][i], gradient[j][i], weight[j][i + 2] * gradient[j][i + 2]), total[i] = weight[j][i] + weight[j][i + 2];
#pragma unroll
        for (int d = 4; d < 32; d *= 2) share[i] += __shfl_xor_sync(kAllLanes, share[i], d), total[i] += __shfl_xor_sync(kAllLanes, total[i], d);
      }
      if (g == 0) *reinterpret_cast<float4*>(floats_at(layout.deltas) + 2 * (row0 / 16 * UNITS + 8 * j + 2 * t)) = make_float4(share[0], total[0], share[1], total[1]);
      __syncwarp();  // else the next sums are begun, and spill
    }
  }
  __syncthreads();
  float landmark_delta[UNITS / 32];  // of landmarks `lane`, `lane` + 32
#pragma unroll
  for (int i = 0; i < UNITS / 32; ++i) {
    float2 sum = {0.0f, 0.0f};
    for (int w = 0; 16 * w < L; ++w) {
      const float2 share = reinterpret_cast<const float2*>(floats_at(layout.deltas))[w * UNITS + 32 * i + lane];
      sum.x += share.x, sum.y += share.y;
    }
    landmark_delta[i] = exact_delta<T>(sum.x, sum.y);
    if (LONG && warp == 0) floats_at(layout.landmark_statistics)[2 * (32 * i + lane) + 1] = landmark_delta[i];
  }
  if (LONG) __syncthreads();
  Weights<T, kUnitTiles> key_weights, key_dlogits;
  // take(eight of the landmarks, upper or lower row, the rest of a lane's two dS)
  const auto differentiate_landmarks = [&](auto&& take) {
#pragma unroll
    for (int j = 0; j < kUnitTiles; ++j) {
      const float two[2] = {__shfl_sync(kAllLanes, landmark_delta[j / 4], 8 * (j % 4) + 2 * t), __shfl_sync(kAllLanes, landmark_delta[j / 4], 8 * (j % 4) + 2 * t + 1)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float lo = weight[j][2 * i] * kRescale * (gradient[j][2 * i] - two[0]), hi = weight[j][2 * i + 1] * kRescale * (gradient[j][2 * i + 1] - two[1]);
        key_weights.packed[j][i] = pack<T>(weight[j][2 * i], weight[j][2 * i + 1]), key_dlogits.packed[j][i] = pack<T>(lo, hi);
        const float2 rounded = unpack<T>(key_dlogits.packed[j][i]);
        take(j, i, pack<T>(lo - rounded.x, hi - rounded.y));
      }
    }
  };
#pragma unroll 1
  for (int part = 0; part < kParts; ++part) {
    const int row0 = 16 * warp + kRows * part;
    if (row0 / 64 * 64 >= x.keys.max_length) break;
    if (LONG) weigh_landmarks(row0);
    if (row0 < L)
      differentiate_landmarks([&](int j, int i, std::uint32_t rest) {
        store_shared(weights(0).chunk(row0 + g + 8 * i, j) + 4 * t, key_dlogits.packed[j][i]);
        store_shared(weights(1).chunk(row0 + g + 8 * i, j) + 4 * t, rest);
      });
  }
  __syncthreads();

  // 4. sum over the keys; meanwhile, of what queries chose, the bits of every key
  if (of_landmarks) {
    float sum[2][2][4];
    clear(sum[0]), clear(sum[1]);
    add_transposed(sum, {by_columns(weights(0), m0 / 8), by_columns(weights(1), m0 / 8)}, k, column, L);
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) landmark_sum[0][j][i] = (landmark_sum[0][j][i] + sum[0][j][i] + sum[1][j][i]) * (f.scale * kUnshifted);
  }
  const auto make_key_masks = [&] {
    const int steps = ceil_div(layout.rows, kStep);
    for (int step = warp & 7; step < steps; step += 8) {
      const int n = step * kStep + unit_of(lane);
      const std::uint32_t its = window.address + layout.masks + 4 * kMaskPitch * shorts_at(layout.experts)[n];
      for (int block = kBoth ? warp >> 3 : 0; block < steps; block += kBoth ? 2 : 1)
        ints_at(layout.key_masks)[(block * kStep + unit_of(lane)) * kMaskPitch + step] = transposed_bits(n < N ? load_shared_int(its + 4 * block) : 0);
    }
  };
  if (!LONG && p.dk.data && of_values) make_key_masks();
  __syncthreads();
  if (LONG && p.dk.data) make_key_masks();
  if (LONG) find_members();
  // What the tokens of landmarks receive, rounded, and the rounded rest.
  if (of_landmarks)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = m0 + g + 8 * i;
      const float share = floats_at(layout.shares)[row];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = column + 8 * j + 2 * t;
        const float lo = landmark_sum[0][j][2 * i], hi = landmark_sum[0][j][2 * i + 1];
        if (f.pool) {
          const std::uint32_t rounded = pack<T>(lo * share, hi * share);
          const float2 two = unpack<T>(rounded);
          store_shared(tile(layout.weights).chunk(row, at / 8) + 4 * t, rounded);
          store_shared(tile(layout.pooled_rest).chunk(row, at / 8) + 4 * t, pack<T>(lo * share - two.x, hi * share - two.y));
        } else if (p.dlandmarks.data && row < M && at < x.D) {
          *reinterpret_cast<std::uint32_t*>(rows_of(p.dlandmarks, row) + at) = pack<T>(lo, hi);
        }
      }
    }
  fence_loads();
  __syncthreads();

  // 5. dq
#pragma unroll 1
  for (int part = 0; part < kParts; ++part) {
    const int row0 = 16 * warp + kRows * part;
    if (row0 / 64 * 64 >= x.queries.max_length) break;
    if (LONG)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < kDP / 8; ++j) {
          const int n = row0 + g + 8 * i;
          dq_rounded.packed[j][i] = n < N && 8 * j < x.D ? dq_of(n)[4 * j] : 0;
        }
    float dq[kDP / 8][4];
#pragma unroll
    for (int j = 0; j < kDP / 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 two = unpack<T>(dq_rounded.packed[j][i]);
        dq[j][2 * i] = two.x, dq[j][2 * i + 1] = two.y;
      }
    if (f.pool) {
      float member[kUnitTiles][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint2 windows = reinterpret_cast<const uint2*>(memory + layout.members)[min(row0 + g + 8 * i, layout.rows - 1)];
#pragma unroll
        for (int j = 0; j < kUnitTiles; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) member[j][2 * i + e] = (j < 4 ? windows.x : windows.y) >> (8 * (j % 4) + 2 * t + e) & 1 ? 1.0f : 0.0f;
      }
      Weights<T, kUnitTiles> members(member);
      begin_products(dq, members.packed);
#pragma unroll
      for (int i = 0; i < UNITS / 8; ++i) wgmma_weighted(dq, members, i % (UNITS / 16), sums_at.at(layout.weights + 16 * i * kRow));  // and then of their rests
      commit_products();
      wait_products<G, 0>(dq);
    }
    const float one[2] = {1.0f, 1.0f};
    if (row0 < N)
      store_rows<C>(weights(1).from_row(row0), dq, one, x.D, lane, rows_of(p.dq, span(x.queries, batch()).start), p.dq.row,
                    [&](int i) { return row0 + i < N ? row0 + i : -1; });
  }
  if (!p.dk.data) return;

  // 6. the keys
#pragma unroll 1
  for (int part = 0; part < kParts; ++part) {
    const int row0 = 16 * warp + kRows * part, group0 = row0 / 64 * 64;
    if (group0 >= x.keys.max_length) break;
    float dk[kDP / 8][4], dv[kDP / 8][4];
    clear(dk), clear(dv);
    Matrix<kDP> own = rows_at, own_values = rows_at;
    own.advance(layout.k + group0 * kRow), own_values.advance(layout.v + group0 * kRow);
    // What `steps` times 32 rows, which lie as `rows` and `gradients` say, give to keys and values.
    const auto give = [&](int steps, int rows, int gradients, int statistics, auto bits_of) {
      Matrix<kDP> row_keys = rows_at, row_values = rows_at, key_sums = sums_at, value_sums = sums_at;
      row_keys.low += rows >> 4, key_sums.low += rows >> 4, row_values.low += gradients >> 4, value_sums.low += gradients >> 4;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        Weights<T, kTiles> probabilities, dlogits;
        begin_logits(own, row_keys, own_values, row_values);
        wait_products<G, 0>(s, d);
        const unsigned bits[2] = {bits_of(0, step), bits_of(8, step)};
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const float4 two = load_shared4(window.address + statistics + 8 * (step * kStep + 8 * j + 2 * t));  // lse and delta of both columns
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            s[j][i] = exponential<T>(has(bits[i / 2], j, i % 2) ? fmaf(s[j][i], f.scale * kLogit<T>, -(i & 1 ? two.z : two.x)) : -kInfinity);
            d[j][i] = s[j][i] * kRescale * (d[j][i] - (i & 1 ? two.w : two.y));
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) probabilities.packed[j][i] = pack<T>(s[j][2 * i], s[j][2 * i + 1]), dlogits.packed[j][i] = pack<T>(d[j][2 * i], d[j][2 * i + 1]);
          __syncwarp();  // else all statistics are loaded first, and registers spill
        }
        begin_products(dk, dv, probabilities.packed, dlogits.packed);
#pragma unroll
        for (int i = 0; i < kTiles / 2; ++i) {
          wgmma_weighted(dv, probabilities, i, value_sums.at(16 * i * kRow));
          wgmma_weighted(dk, dlogits, i, key_sums.at(16 * i * kRow));
        }
        commit_products();
        wait_products<G, 0>(dk, dv);
        row_keys.advance(kStep * kRow), row_values.advance(kStep * kRow), key_sums.advance(kStep * kRow), value_sums.advance(kStep * kRow);
      }
    };
    if (LONG) {
      give(UNITS / kStep, layout.landmarks, layout.compressed, layout.landmark_statistics, [](int, int) { return ~0u; });
    } else {
      add_weighted_rows<G>(dv, key_weights, c, lane);
      add_weighted_rows<G>(dk, key_dlogits, z, lane);
      wait_products<G, 0>(dk, dv);
    }
    const std::uint32_t mask_rows = window.address + layout.key_masks + 4 * kMaskPitch * (min(row0, layout.rows - 16) + g) + t;
    give(ceil_div(x.queries.max_length, kStep), 0, layout.dout, layout.statistics, [&](int row, int step) { return bits_at(mask_rows + 4 * kMaskPitch * row, step); });
    if (row0 >= L) continue;
    const auto index = [&](int i) { return row0 + i < L ? row0 + i : -1; };
    const float k_factor[2] = {f.scale * kUnshifted, f.scale * kUnshifted}, v_factor[2] = {power_of_2(-kProbabilityShift<T>), power_of_2(-kProbabilityShift<T>)};
    store_rows<C>(weights(1).from_row(row0), dk, k_factor, x.D, lane, rows_of(p.dk, span(x.keys, batch()).start), p.dk.row, index);
    store_rows<C>(weights(1).from_row(row0), dv, v_factor, x.D, lane, rows_of(p.dv, span(x.keys, batch()).start), p.dv.row, index);
  }
#endif
}

int rows_of(const Problem& x) { return std::max(x.queries.max_length, x.keys.max_length); }
int units_of(const Problem& x) { return x.M <= 32 && rows_of(x) <= kRows ? 32 : kMostUnits; }
bool is_long(const Problem& x) { return rows_of(x) > kRows; }

}  // namespace

// Of what one kernel can take (`fits_short_gradient`). H200, 384 heads, time against that by lists of up to 32 units: 62 to 105 % up to 64 rows, 62 to 99 % up to 160 where there
// are more than 16 units of both kinds, else 102 to 140 %.
bool fits_short_masked_gradient(const Problem& x) {
  const int few = std::min(x.M, x.K) <= 16 ? 64 : 160;
  if (x.M > kMostUnits || rows_of(x) > (x.M <= 32 && x.K <= 32 ? few : 2 * kRows)) return false;
  int most;
  return device_attribute(most, cudaDevAttrMaxSharedMemoryPerBlockOptin) == cudaSuccess && Memory(x, units_of(x), is_long(x)).bytes <= most;
}

cudaError_t launch_short_masked_gradient(const ShortGradientParams& p, cudaStream_t stream) {
  const Problem& x = p.forward.problem;
  return dispatch_16_bits(x.dtype, [&](auto element) {
    using T = decltype(element);
    const Memory layout(x, units_of(x), is_long(x));
    const auto kernel = is_long(x)         ? short_masked_gradient_kernel<T, kMostUnits, true>
                        : units_of(x) == 32 ? short_masked_gradient_kernel<T, 32, false>
                                            : short_masked_gradient_kernel<T, kMostUnits, false>;
    return launch(kernel, static_cast<unsigned>(x.B) * x.H, kThreads, layout.bytes, stream, p, layout);
  });
}

}  // namespace mita
