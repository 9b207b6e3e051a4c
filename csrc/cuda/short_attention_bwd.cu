// Short sequences: the whole backward pass of one (batch, head) by one block, which holds its queries, keys, values and incoming gradients in
// shared memory and fills a multiprocessor. The warps of a block take items of one phase after the other, and meet between phases:
//   1. weigh: the units of up to 16 queries of one expert: probabilities P and logit gradients dS, and with them dq. All units of a query are
//      at hand, so that delta is exact. P and dS stay in shared memory, rounded
//   2. sum over the queries: the gradients of landmarks and compressed values as shared units; of 16 keys and values, as units of experts.
//      Any query may give to any key: what an expert did not choose has the weight 0 in a dense product, whose order is fixed
//   3. compress: 16 keys weigh all landmarks; their own gradients are complete then, and leave dS for those of the landmarks
//   4. sum over the keys: the gradients of the landmarks as queries
//   5. dq, with what queries receive as parts of pooled landmarks: a product with 0 and 1
// A longer sequence has no room for all of that at once: incoming gradients are first where the weights of the landmarks will be, and once the queries are weighed in the place
// of the values, which come to where the weights of the landmarks have been; dq waits where it belongs. The keys behind the first 256 are summed by all warps, some columns each.
// Where keys are nearly the same, dq and the landmarks' gradients are what is left when dS cancels, and its rounding to 16 bits does not
// cancel with it: in their sums dS has 32 bits, a rounded part and the rounded rest.
#include "device.cuh"
#include "launch.h"
#include "stages.cuh"

namespace mita {
namespace {

constexpr int kWarps = 16, kThreads = 32 * kWarps, kDP = 64;
constexpr int kKeys = 16 * kWarps;               // a warp keeps the gradients of 16 of them
constexpr int kMoreKeys = 2 * 16;                // behind them: of each 16, half of the warps keep the gradients of some columns
constexpr int kUnits = 32, kTiles = kUnits / 8;  // landmarks, or keys of an expert: at most
constexpr int kPitch = kUnits + 4;               // words of a query's routed weights; column kUnits is 0, for keys that are not chosen
constexpr int kSumPitch = kDP + 8;               // floats: free of bank conflicts

// Shared memory of a block: where what begins, in bytes; queries at 0. `rows` of queries, keys, values and both kinds of weights.
//   shared_weights [N, 2, 32]: P, then dS, of the landmarks; later [L, 2, 32]: dS of the keys' compression, and its rest
//   routed_weights [N, kPitch]: P in the lower half of a word, dS in the upper one, of the keys of the query's expert
//   slots [M, rows]: 4 times the place of a key among those of an expert, 4 * kUnits if it is none of them; slot_rows [N]: the expert's row there
//   sums [32, kSumPitch]: the landmarks' gradients, fp32; deltas [rows / 16, 32, 2]: what the landmarks' deltas are made of, the share of 16 keys
//   lse, dlse, members [N]: of the queries; later, in the place of the first two, P of the keys behind the first ones, as a warp has it in registers; the last one a bit for
//   every pooling window that a query is in
struct Memory {
  int rows, k, v, dout, dq, landmarks, compressed, shared_weights, routed_weights, sums, deltas, landmark_lse, lse, dlse, members, slots, tiles, tile_count, lengths, counts,
      indices, experts, slot_rows, entries, bytes;
  Memory(const Problem& x, bool is_long) {
    constexpr int kRow = kDP * 2;
    const int N = x.queries.max_length;
    rows = round_up(std::max(N, x.keys.max_length), 16);
    k = rows * kRow;
    v = 2 * k;
    dout = (is_long ? 2 : 3) * k;
    dq = 4 * k;
    landmarks = (is_long ? 3 : 5) * k;
    compressed = landmarks + kUnits * kRow;
    shared_weights = compressed + kUnits * kRow;
    routed_weights = shared_weights + rows * kRow;
    sums = routed_weights + rows * kPitch * 4;
    deltas = sums + kUnits * kSumPitch * 4;
    landmark_lse = deltas + rows / 16 * kUnits * 8;
    lse = landmark_lse + kUnits * 4;
    dlse = lse + rows * 4;
    members = dlse + rows * 4;
    slots = members + rows * 4;
    tiles = slots + x.M * rows;
    tile_count = tiles + (N / 16 + std::min(N, x.M)) * static_cast<int>(sizeof(Work));
    lengths = tile_count + 4;
    counts = lengths + 8;
    indices = counts + x.M * 4;
    experts = indices + round_up(x.M * x.K, 2) * 2;
    slot_rows = experts + rows * 2;
    entries = slot_rows + rows * 2;
    bytes = entries + rows * 2;
  }
};

// What rounding takes away from weights.
template <class T> __device__ inline Weights<T, kTiles> rest_of(const float (&x)[kTiles][4]) {
  float rest[kTiles][4];
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const float2 two = unpack<T>(pack<T>(x[n][i], x[n][i + 1]));
      rest[n][i] = x[n][i] - two.x, rest[n][i + 1] = x[n][i + 1] - two.y;
    }
  return Weights<T, kTiles>(rest);
}

// acc += (weights + rest) rows.
template <class T, class Rows>
__device__ inline void add_split_rows(float (&acc)[kDP / 8][4], const Weights<T, kTiles>& weights, const Weights<T, kTiles>& rest, const Rows& rows) {
  const int lane = threadIdx.x % 32;
  const auto address = operand(rows, lane & 15, lane >> 4);
#pragma unroll
  for (int k = 0; k < kTiles / 2; ++k)
#pragma unroll
    for (int d = 0; d < kDP / 16; ++d) {
      std::uint32_t b[4];
      ldmatrix_transposed(b, address(d, k));
      for (const auto* w : {&weights, &rest}) {
        const std::uint32_t a[4] = {w->packed[2 * k][0], w->packed[2 * k][1], w->packed[2 * k + 1][0], w->packed[2 * k + 1][1]};
        mma<T>(acc[2 * d], a, b[0], b[1]);
        mma<T>(acc[2 * d + 1], a, b[2], b[3]);
      }
    }
}

// Of 16 keys, and of 16 queries at a time, the weights of the keys as the queries' experts have chosen them: of queries 2t, 2t + 1, 2t + 8, 2t + 9 the experts' rows of slots,
// there the slots of keys g and g + 8, and their weights. Each look-up needs the one before, so those of the next step go on beside the products of one.
template <int PITCH> struct RoutedWeights {  // PITCH: words of a query
  static constexpr unsigned kProbabilities = 0x5410, kGradients = 0x7632;  // halves of the words
  std::uint32_t slot_rows, slots, weights;  // where they are
  std::uint32_t slot_row[2], w[2][4] = {};
  __device__ RoutedWeights(const Window& window, const Memory& layout, int key0) {
    const int lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
    slot_rows = window.address + layout.slot_rows + 4 * t, slots = window.address + layout.slots + key0 + g, weights = window.address + layout.routed_weights + 4 * PITCH * 2 * t;
  }
  __device__ void find_rows(int step) {
#pragma unroll
    for (int i = 0; i < 2; ++i) slot_row[i] = load_shared_int(slot_rows + 32 * step + 16 * i);
  }
  __device__ void find_weights(int step) {
    std::uint32_t slot[2][4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) slot[r][j] = load_shared_byte(slots + (j & 1 ? slot_row[j / 2] >> 16 : slot_row[j / 2] & 0xffff) + 8 * r);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) w[r][j] = load_shared_int(weights + 4 * PITCH * 16 * step + slot[r][j] + 4 * PITCH * (8 * (j / 2) + j % 2));
  }
  __device__ void take(std::uint32_t (&a)[4], unsigned half) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = __byte_perm(w[i & 1][i & 2], w[i & 1][(i & 2) + 1], half);
  }
};

template <class T, bool LONG> __global__ void __launch_bounds__(kThreads, 1) short_gradient_kernel(const ShortGradientParams p, const Memory layout) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using C = Config<T, kDP>;        // products by warps, but in phase 2
  using G = Config<T, kDP, true>;  // by warpgroups, whose four warps read the queries' rows at once
  constexpr int kChunks = kDP / kChunk<T>;
  constexpr float kUnshifted = power_of_2(-kGradientShift<T>), kRescale = power_of_2(kGradientShift<T> - kProbabilityShift<T>);
  extern __shared__ __align__(kPanel) unsigned char memory[];
  const Window window(memory);
  const auto tile = [&](int at) { return Tile<T, kDP>{window.address + at}; };
  const auto q = tile(0), k = tile(layout.k), v = tile(layout.v), dout = tile(layout.dout), dq = tile(layout.dq), z = tile(layout.landmarks), c = tile(layout.compressed),
             shared_weights = tile(layout.shared_weights);
  const auto ints_at = [&](int at) { return reinterpret_cast<int*>(memory + at); };
  const auto floats_at = [&](int at) { return reinterpret_cast<float*>(memory + at); };
  const auto shorts_at = [&](int at) { return reinterpret_cast<std::uint16_t*>(memory + at); };
  const ShortParams& f = p.forward;
  const Problem& x = f.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
  // Head and batch are not kept: registers.
  const auto head = [] { return opaque(blockIdx.x); };
  const auto batch = [&] { return head() / x.H; };
  const auto rows_of = [&](const Rows& rows, std::int64_t start) { return head_rows<T>(rows, batch(), head() % x.H, start); };
  const int M = x.M;
  int &N = ints_at(layout.lengths)[0], &L = ints_at(layout.lengths)[1];  // there are no registers left for them
  {
    // Lists are asked for first, of a thread one query and two keys of experts, then rows, and only then are the lists waited for.
    const int b = batch(), h = head() - b * x.H, n = threadIdx.x;
    const Span queries = span(x.queries, b), keys = span(x.keys, b);
    const std::int64_t at = std::int64_t(head()) * x.queries.max_length + n;
    const bool present = n < queries.length;
    const int asked_expert = present ? f.experts[at] : 0;
    const float lse = present ? f.lse[at] : -kInfinity, dlse = present && p.dlse ? p.dlse[at] : 0.0f;
    const float of_landmark = n < M ? f.landmark_lse[std::int64_t(head()) * M + n] : -kInfinity;
    constexpr int kPerThread = kUnits * kUnits / kThreads;  // keys of experts
    int key[kPerThread];
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const int i = threadIdx.x + j * kThreads;
      key[j] = i < M * x.K ? f.indices[std::int64_t(head()) * M * x.K + i] : 0;
    }
    const auto load = [&](const Tile<T, kDP>& to, const Rows& rows, const Span& from, int count) {
      load_sequence<T, kDP, kThreads>(to, rows, b, h, from, x.D, count);
    };
    load(q, f.q, queries, layout.rows);
    load(LONG ? shared_weights : dout, p.dout, queries, layout.rows);
    load(z, f.landmarks, {0, M}, kUnits);
    load(c, f.compressed, {0, M}, kUnits);
    load(k, f.k, keys, layout.rows);
    load(v, f.v, keys, layout.rows);
    commit_loads();

    const auto zero = [&](std::uint32_t address) { store_shared4(address, make_uint4(0, 0, 0, 0)); };
    if (n == 0) N = queries.length, L = keys.length;
    if (n < M) ints_at(layout.counts)[n] = 0;
    for (int i = threadIdx.x; i < M * layout.rows / 16; i += kThreads) {
      constexpr std::uint32_t kNone = 4u * kUnits * 0x01010101u;
      store_shared4(window.address + layout.slots + 16 * i, make_uint4(kNone, kNone, kNone, kNone));
    }
    for (int i = threadIdx.x; i < layout.rows * kPitch / 4; i += kThreads) zero(window.address + layout.routed_weights + 16 * i);
    for (int i = queries.length * kChunks + threadIdx.x; !LONG && i < layout.rows * kChunks; i += kThreads) zero(shared_weights.chunk(i / kChunks, i % kChunks));
    __syncthreads();
    // Where a row attended to nothing, or is not there, infinity. Probabilities are shifted from the start.
    const auto offset_of = [](float lse) { return lse == -kInfinity ? kInfinity : lse * kLogit<T> - kProbabilityShift<T>; };
    if (n < kUnits) floats_at(layout.landmark_lse)[n] = offset_of(of_landmark);
    // What is out of range, no forward pass has left.
    if (n < layout.rows) {
      const int expert = min(max(asked_expert, 0), M - 1);
      shorts_at(layout.experts)[n] = static_cast<std::uint16_t>(expert), shorts_at(layout.slot_rows)[n] = static_cast<std::uint16_t>(expert * layout.rows);
      floats_at(layout.lse)[n] = offset_of(lse), floats_at(layout.dlse)[n] = lse == -kInfinity ? 0.0f : dlse;
      if (f.pool) ints_at(layout.members)[n] = present ? windows_with<std::uint32_t>(windows_of(f.windows, x.queries, queries.length), n) : 0;
      if (present) atomicAdd(ints_at(layout.counts) + expert, 1);
    }
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const int i = threadIdx.x + j * kThreads, m = i / x.K, slot = i - m * x.K;
      if (m >= M || slot >= keys.length) continue;
      const int own = min(max(key[j], 0), keys.length - 1);
      shorts_at(layout.indices)[i] = static_cast<std::uint16_t>(own);
      (memory + layout.slots)[m * layout.rows + own] = static_cast<std::uint8_t>(4 * slot);
    }
  }
  __syncthreads();
  if (warp == 0) {
    const int made = order_by_expert(shorts_at(layout.experts), N, 16, ints_at(layout.counts), M, shorts_at(layout.entries), reinterpret_cast<Work*>(memory + layout.tiles));
    if (lane == 0) *ints_at(layout.tile_count) = made;
  }
  wait_loads<0>();
  __syncthreads();

  // Columns 2t and 2t + 1 of query n; the next eight columns are four further.
  const auto dq_of = [&](int n) { return reinterpret_cast<std::uint32_t*>(row_behind(rows_of(p.dq, span(x.queries, batch()).start) + 2 * t, p.dq.row * sizeof(T), n)); };

  // 1. weigh
#pragma unroll 1
  for (int item = warp; item < *ints_at(layout.tile_count); item += kWarps) {
    const Work work = reinterpret_cast<const Work*>(memory + layout.tiles)[item];
    const std::uint32_t list = window.address + layout.entries + 2 * work.first, of_expert = window.address + layout.indices + 2 * work.expert * x.K;
    const auto query = [&](int i) { return load_shared_short(list + 2 * min(g + 8 * i, work.entries - 1)); };  // of the lane's two rows
    SharedRows<T, kDP> own, given;
    own.load(ListedRows<T, kDP, 16>{q, list, work.entries}, lane);
    given.load(ListedRows<T, kDP, 16>{LONG ? shared_weights : dout, list, work.entries}, lane);
    const int chosen = min(x.K, L);
    const ListedRows<T, kDP, kUnits> expert_keys{k, of_expert, chosen}, expert_values{v, of_expert, chosen};
    const float lse[2] = {floats_at(layout.lse)[query(0)], floats_at(layout.lse)[query(1)]};
    float delta[2] = {0.0f, 0.0f}, total[2] = {0.0f, 0.0f};
    float weight[2][kTiles][4], gradient[2][kTiles][4];  // of the shared units, and of the expert's
    const auto weigh = [&](int kind, const auto& unit_keys, const auto& unit_values, int count, float scale) {
      auto &w = weight[kind], &d = gradient[kind];
      product<C>(w, own, unit_keys, lane);
      product<C>(d, given, unit_values, lane);
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) w[j][i] = fmaf(w[j][i], scale * kLogit<T>, -lse[i / 2]);
      mask_logits(w, count, lane);
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[i / 2] += w[j][i] = exponential<T>(w[j][i]);
          delta[i / 2] = fmaf(w[j][i], d[j][i], delta[i / 2]);
        }
    };
    weigh(0, z, c, M, f.landmark_scale);
    if (chosen > 0) weigh(1, expert_keys, expert_values, chosen, f.scale);
    else clear(weight[1]), clear(gradient[1]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int d = 1; d < 4; d *= 2) delta[i] += __shfl_xor_sync(kAllLanes, delta[i], d), total[i] += __shfl_xor_sync(kAllLanes, total[i], d);
      delta[i] = exact_delta<T>(delta[i] - floats_at(layout.dlse)[query(i)] * power_of_2(kProbabilityShift<T>), total[i]);
    }
    float sum[kDP / 8][4];
    clear(sum);
    const auto differentiate = [&](int kind, const auto& unit_keys, auto&& store) {
      auto &w = weight[kind], &d = gradient[kind];
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) d[j][i] = w[j][i] * kRescale * (d[j][i] - delta[i / 2]);
      const Weights<T, kTiles> probabilities(w), dlogits(d), rest(rest_of<T>(d));
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (const int n = query(i); g + 8 * i < work.entries)
#pragma unroll
          for (int j = 0; j < kTiles; ++j) store(n, j, probabilities.packed[j][i], dlogits.packed[j][i]);
      add_split_rows(sum, dlogits, rest, unit_keys);
    };
    if (LONG) __syncwarp();
    differentiate(0, z, [&](int n, int j, std::uint32_t probability, std::uint32_t dlogit) {
      store_shared(shared_weights.chunk(n, j) + 4 * t, probability);
      store_shared(shared_weights.chunk(n, kTiles + j) + 4 * t, dlogit);
    });
    const float ratio = f.landmark_scale / f.scale, last = f.scale * kUnshifted;
#pragma unroll
    for (int d = 0; d < kDP / 8; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[d][i] *= ratio;
    if (chosen > 0)
      differentiate(1, expert_keys, [&](int n, int j, std::uint32_t probability, std::uint32_t dlogit) {
        store_shared2(window.address + layout.routed_weights + 4 * (n * kPitch + 8 * j + 2 * t), __uint_as_float(__byte_perm(probability, dlogit, 0x5410)),
                      __uint_as_float(__byte_perm(probability, dlogit, 0x7632)));
      });
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (const int n = query(i); g + 8 * i < work.entries) {
        std::uint32_t* const in_place = LONG ? dq_of(n) : nullptr;
#pragma unroll
        for (int d = 0; d < kDP / 8; ++d) {
          const std::uint32_t two = pack<T>(sum[d][2 * i] * last, sum[d][2 * i + 1] * last);
          if (!LONG) store_shared(dq.chunk(n, d) + 4 * t, two);
          else if (8 * d < x.D) in_place[4 * d] = two;
        }
      }
  }
  __syncthreads();
  const auto load_again = [&](const Tile<T, kDP>& to, const Rows& rows, const Sequences& sequences) {
    const int b = batch();
    load_sequence<T, kDP, kThreads>(to, rows, b, head() - b * x.H, span(sequences, b), x.D, layout.rows);
    commit_loads();
  };
  if (LONG) {
    load_again(dout, p.dout, x.queries);
    wait_loads<0>();
    __syncthreads();
  }

  // 2. sum over the queries. The compressed values are not needed any more: their gradients take their place.
  {
    const int m = 16 * (warp & 1), column = 16 * (warp >> 1 & 3), kind = warp >> 3;
    static_assert(kWarps == 16);
    float sums[1][2][4], (&sum)[2][4] = sums[0];
    clear(sum);
    add_transposed(sums, {by_columns(shared_weights, kind * kTiles + m / 8)}, kind ? q : dout, column, layout.rows);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int d = 0; d < 2; ++d) {
        const int row = m + g + 8 * i;
        if (kind) {
          const float factor = f.landmark_scale * kUnshifted;
          *reinterpret_cast<float2*>(floats_at(layout.sums) + row * kSumPitch + column + 8 * d + 2 * t) = make_float2(sum[d][2 * i] * factor, sum[d][2 * i + 1] * factor);
        } else {
          constexpr float kFactor = power_of_2(-kProbabilityShift<T>);
          store_shared(c.chunk(row, column / 8 + d) + 4 * t, pack<T>(sum[d][2 * i] * kFactor, sum[d][2 * i + 1] * kFactor));
        }
      }
  }
  if (LONG) {
    __syncthreads();
    load_again(shared_weights, f.v, x.keys);
  }
  const int key0 = 16 * (opaque(threadIdx.x) / 32);  // of this warp's keys
  float dk[kDP / 8][4], dv[kDP / 8][4];
  clear(dk);
  clear(dv);
  if (p.dk.data && key0 / 64 * 64 < L) {
    RoutedWeights<kPitch> routed(window, layout, key0);
    const bool has_keys = key0 < L;  // of a warpgroup's last warps some have none
    const int steps = layout.rows / 16;  // behind the queries zeros; not N, as the same for all threads for certain
    if (has_keys) routed.find_rows(0), routed.find_weights(0);
    const Matrix<kDP> queries_of(q.address, true), gradients_of(dout.address, true);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int next = min(step + 1, steps - 1);
      if (has_keys) routed.find_rows(next);
      std::uint32_t halves[2][4];  // dS, P
      routed.take(halves[0], routed.kGradients), routed.take(halves[1], routed.kProbabilities);
      begin_products(dk, dv, halves);
      wgmma<T>(dk, halves[0], queries_of.at(step * 16 * kDP * sizeof(T)));
      wgmma<T>(dv, halves[1], gradients_of.at(step * 16 * kDP * sizeof(T)));
      commit_products();
      if (has_keys) routed.find_weights(next);
      wait_products<G, 0>(dk, dv);
    }
  }
  if (LONG) wait_loads<0>();
  __syncthreads();

  // 3. compress
  float weight[kTiles][4], gradient[kTiles][4];
  const auto weigh_landmarks = [&](int key0) {
    SharedRows<T, kDP> rows;
    rows.load(k.from_row(key0), lane);
    product<C>(weight, rows, z, lane);
    rows.load((LONG ? shared_weights : v).from_row(key0), lane);
    product<C>(gradient, rows, c, lane);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const float2 lse = load_shared2(window.address + layout.landmark_lse + 4 * (8 * j + 2 * t));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (key0 + g + 8 * (i / 2) >= L) weight[j][i] = -kInfinity;
        else weight[j][i] = fmaf(weight[j][i], f.scale * kLogit<T>, -(i & 1 ? lse.y : lse.x));
        weight[j][i] = exponential<T>(weight[j][i]);
      }
    }
  };
  const auto share_deltas = [&](int keys) {  // the how many-th 16
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      float share[2], total[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        share[i] = fmaf(weight[j][i], gradient[j][i], weight[j][i + 2] * gradient[j][i + 2]), total[i] = weight[j][i] + weight[j][i + 2];
#pragma unroll
        for (int d = 4; d < 32; d *= 2) share[i] += __shfl_xor_sync(kAllLanes, share[i], d), total[i] += __shfl_xor_sync(kAllLanes, total[i], d);
      }
      if (g == 0) *reinterpret_cast<float4*>(floats_at(layout.deltas) + 2 * (keys * kUnits + 8 * j + 2 * t)) = make_float4(share[0], total[0], share[1], total[1]);
      __syncwarp();  // else the next sums are begun, and spill
    }
  };
  if (LONG && kKeys + key0 < L) weigh_landmarks(kKeys + key0), share_deltas(kWarps + warp);
  if (key0 < L) weigh_landmarks(key0), share_deltas(warp);
  __syncthreads();
  const auto more_weights = [&](int tile, int k) { return window.address + layout.lse + 16 * (32 * (kTiles / 2 * tile + k) + lane); };
  // take(P, dS): of 16 keys from `own` on, as they are rounded. dS and its rest are left for the landmarks.
  const auto differentiate_landmarks = [&](int own, auto&& take) {
    const int lane = opaque(threadIdx.x) % 32, g = lane >> 2, t = lane & 3;
    float2 sum = {0.0f, 0.0f};  // of landmark `lane`
    for (int w = 0; 16 * w < L; ++w) {
      const float2 share = reinterpret_cast<const float2*>(floats_at(layout.deltas))[w * kUnits + lane];
      sum.x += share.x, sum.y += share.y;
    }
    const float delta = exact_delta<T>(sum.x, sum.y);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const float two[2] = {__shfl_sync(kAllLanes, delta, 8 * j + 2 * t), __shfl_sync(kAllLanes, delta, 8 * j + 2 * t + 1)};
#pragma unroll
      for (int i = 0; i < 4; ++i) gradient[j][i] = weight[j][i] * kRescale * (gradient[j][i] - two[i & 1]);
    }
    Weights<T, kTiles> probabilities(weight), dlogits(gradient);
    const Weights<T, kTiles> rest(rest_of<T>(gradient));
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        store_shared(shared_weights.chunk(own + g + 8 * i, j) + 4 * t, dlogits.packed[j][i]);
        store_shared(shared_weights.chunk(own + g + 8 * i, kTiles + j) + 4 * t, rest.packed[j][i]);
      }
    take(probabilities, dlogits);
  };
  if (const int own = 16 * (opaque(threadIdx.x) / 32); own < L)  // key0 again: registers
    differentiate_landmarks(own, [&](auto& probabilities, auto& dlogits) {
      add_weighted_rows<C>(dk, dlogits, z, lane);
      add_weighted_rows<C>(dv, probabilities, c, lane);
    });
  if (const int own = 16 * (opaque(threadIdx.x) / 32); LONG && kKeys + own < L) {
    weigh_landmarks(kKeys + own);
    differentiate_landmarks(kKeys + own, [&](auto& probabilities, auto&) {
#pragma unroll
      for (int k = 0; k < kTiles / 2; ++k)
        store_shared4(more_weights(own / 16, k), make_uint4(probabilities.packed[2 * k][0], probabilities.packed[2 * k][1], probabilities.packed[2 * k + 1][0], probabilities.packed[2 * k + 1][1]));
    });
  }
  __syncthreads();

  // The keys behind the first ones: of each 16 a warp sums 16 columns of dk, or of dv.
  if (LONG && L > kKeys) {
    if (const int tile = warp / 8, first = kKeys + 16 * tile, column = warp % 4 * 16; p.dk.data && first < L) {
      const bool of_values = warp & 4;
      const auto rows = operand(of_values ? dout : q, lane & 15, column / 8 + (lane >> 4)), units = operand(of_values ? c : z, lane & 15, column / 8 + (lane >> 4));
      float sum[2][4];
      clear(sum);
      const auto add = [&](const std::uint32_t (&a)[4], std::uint32_t of_rows) {
        std::uint32_t b[4];
        ldmatrix_transposed(b, of_rows);
        mma<T>(sum[0], a, b[0], b[1]);
        mma<T>(sum[1], a, b[2], b[3]);
      };
      SharedRows<T, kDP> dlogits;
      dlogits.load(shared_weights.from_row(first), lane);
#pragma unroll
      for (int k = 0; k < kTiles / 2; ++k) {
        std::uint32_t a[4];
        if (of_values) {
          const float4 four = load_shared4(more_weights(tile, k));
          a[0] = __float_as_uint(four.x), a[1] = __float_as_uint(four.y), a[2] = __float_as_uint(four.z), a[3] = __float_as_uint(four.w);
        } else {
          dlogits.fragment(a, k);
        }
        add(a, units(0, k));
      }
      RoutedWeights<kPitch> routed(window, layout, first);
      const int steps = layout.rows / 16;
      routed.find_rows(0), routed.find_weights(0);
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const int next = min(step + 1, steps - 1);
        std::uint32_t a[4];
        routed.take(a, of_values ? routed.kProbabilities : routed.kGradients);
        routed.find_rows(next);
        add(a, rows(0, step));
        routed.find_weights(next);
      }
      const Rows& to = of_values ? p.dv : p.dk;
      const float factor = of_values ? power_of_2(-kProbabilityShift<T>) : f.scale * kUnshifted;
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int d = 0; d < 2; ++d)
          if (const int key = first + g + 8 * i, at = column + 8 * d; key < L && at < x.D)
            *reinterpret_cast<std::uint32_t*>(row_behind(rows_of(to, span(x.keys, batch()).start) + at + 2 * t, to.row * sizeof(T), key)) = pack<T>(sum[d][2 * i] * factor, sum[d][2 * i + 1] * factor);
    }
    __syncthreads();
  }

  // 4. sum over the keys. The landmarks and the compressed values are not needed any more: what their tokens receive takes their place, rounded, and the
  // rounded rest.
  if (const int item = kWarps - 1 - warp; item < 8) {
    const int m = 16 * (item & 1), column = 16 * (item >> 1);
    float sum[2][2][4];  // of dS as rounded, and of its rest
    clear(sum[0]), clear(sum[1]);
    add_transposed(sum, {by_columns(shared_weights, m / 8), by_columns(shared_weights, kTiles + m / 8)}, k, column, L);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = m + g + 8 * i, area = f.pool && row < M ? PooledTokens::of<int>(windows_of(f.windows, x.queries, N), row).area : 0;
      const float share = area ? 1.0f / static_cast<float>(area) : 0.0f;
#pragma unroll
      for (int d = 0; d < 2; ++d) {
        const int at = column + 8 * d + 2 * t;
        const float2 before = *reinterpret_cast<const float2*>(floats_at(layout.sums) + row * kSumPitch + at);
        const float lo = before.x + (sum[0][d][2 * i] + sum[1][d][2 * i]) * f.scale * kUnshifted, hi = before.y + (sum[0][d][2 * i + 1] + sum[1][d][2 * i + 1]) * f.scale * kUnshifted;
        if (f.pool) {
          const std::uint32_t rounded = pack<T>(lo * share, hi * share);
          const float2 two = unpack<T>(rounded);
          store_shared(z.chunk(row, at / 8) + 4 * t, rounded);
          store_shared(c.chunk(row, at / 8) + 4 * t, pack<T>(lo * share - two.x, hi * share - two.y));
        } else if (p.dlandmarks.data && row < M && at < x.D) {
          *reinterpret_cast<std::uint32_t*>(rows_of(p.dlandmarks, row) + at) = pack<T>(lo, hi);
        }
      }
    }
  }
  if (p.dk.data && key0 < L) {
    const auto index = [&](int i) { return key0 + i < L ? key0 + i : -1; };
    const float k_factor[2] = {f.scale * kUnshifted, f.scale * kUnshifted}, v_factor[2] = {power_of_2(-kProbabilityShift<T>), power_of_2(-kProbabilityShift<T>)};
    store_rows<C>(q.from_row(key0), dk, k_factor, x.D, lane, rows_of(p.dk, span(x.keys, batch()).start), p.dk.row, index);
    store_rows<C>(dout.from_row(key0), dv, v_factor, x.D, lane, rows_of(p.dv, span(x.keys, batch()).start), p.dv.row, index);
  }
  __syncthreads();

  // 5. dq
  for (int first = 16 * warp; first < (LONG && !f.pool ? 0 : N); first += 16 * kWarps) {
    float sum[kDP / 8][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = first + g + 8 * i;
      const std::uint32_t* const in_place = LONG ? dq_of(min(n, N - 1)) : nullptr;
#pragma unroll
      for (int d = 0; d < kDP / 8; ++d) {
        const float2 two = unpack<T>(!LONG ? load_shared_int(dq.chunk(n, d) + 4 * t) : 8 * d < x.D ? in_place[4 * d] : 0);
        sum[d][2 * i] = two.x, sum[d][2 * i + 1] = two.y;
      }
    }
    if (f.pool) {
      float member[kTiles][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int windows = ints_at(layout.members)[first + g + 8 * (i / 2)] >> (2 * t + (i & 1));
#pragma unroll
        for (int j = 0; j < kTiles; ++j) member[j][i] = windows >> 8 * j & 1 ? 1.0f : 0.0f;
      }
      Weights<T, kTiles> members(member);
      add_weighted_rows<C>(sum, members, z, lane);
      add_weighted_rows<C>(sum, members, c, lane);
    }
    const float one[2] = {1.0f, 1.0f};
    __syncwarp();
    store_rows<C>((LONG ? q : dq).from_row(first), sum, one, x.D, lane, rows_of(p.dq, span(x.queries, batch()).start), p.dq.row, [&](int i) { return first + i < N ? first + i : -1; });
  }
#endif
}

bool has_room(const Problem& x, bool is_long) {
  int most;
  return device_attribute(most, cudaDevAttrMaxSharedMemoryPerBlockOptin) == cudaSuccess && Memory(x, is_long).bytes <= most;
}

}  // namespace

// sm_90a: elsewhere a block has no memory for what this is made for. H100: for more units, queries or keys than this, or keys and values of several
// heads, it has none here either.
bool fits_short_gradient(const Problem& x, bool shared, float scale, float landmark_scale) {
  if (!(has_warpgroups(x.dtype, x.D) && x.D <= kDP && x.D % kCudaHeadDimStep == 0 && x.s == 1 && x.H == x.Hkv && shared && have_ratio(landmark_scale, scale))) return false;
  const bool listed = x.M <= kUnits && x.K <= kUnits && x.queries.max_length <= kThreads && x.keys.max_length <= kKeys + kMoreKeys && has_room(x, true);
  return listed || fits_short_masked_gradient(x);
}

cudaError_t launch_short_gradient(const ShortGradientParams& p, cudaStream_t stream) {
  const Problem& x = p.forward.problem;
  if (!fits_short_gradient(x, p.forward.shared, p.forward.scale, p.forward.landmark_scale)) return cudaErrorInvalidValue;
  if (fits_short_masked_gradient(x)) return launch_short_masked_gradient(p, stream);
  return dispatch_16_bits(x.dtype, [&](auto element) {
    using T = decltype(element);
    const auto with = [&](auto is_long) {
      const Memory layout(x, is_long);
      return launch(short_gradient_kernel<T, is_long>, static_cast<unsigned>(x.B) * x.H, kThreads, layout.bytes, stream, p, layout);
    };
    return x.keys.max_length <= kKeys && has_room(x, false) ? with(std::false_type()) : with(std::true_type());
  });
}

}  // namespace mita
