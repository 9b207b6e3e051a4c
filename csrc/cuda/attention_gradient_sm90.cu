// Attention's gradients of queries and units in one pass over the queries (else four: reduce.cu, row_gradient.cu, unit_gradient.cu), for sm_90a and
// few units: 16-bit elements of up to 64 columns, up to 64 landmarks and 64 keys of an expert, one expert per query. By specialists; the segments of
// one head are dealt out to `splits` blocks, the largest ones first and back and forth, so that all have nearly the same to do:
//   one warp lists the queries, 64 at a time, with what is said of each, and the keys of experts;
//   three warps bring the rows of such lists: one q, one dout into a ring of sets; one the shared units, once, and then an expert's keys and values for
//   every segment into a ring of stages;
//   two warpgroups weigh, by turns, 64 queries against all their units: P and dS, and with them dq. All units of a query being at hand, delta is
//   exact. Rounded, P and dS go to shared memory. Where keys are nearly the same, dq is what is left when dS cancels, and its rounding does not cancel
//   with it: in dq dS has 32 bits, a rounded part and the rounded rest;
//   one warpgroup sums over the queries, P^T dout and dS^T q: for the shared units through all segments, for an expert's through one.
#include "launch.h"
#include "routed.cuh"
#include "specialists.cuh"

namespace mita {
namespace {

constexpr int kDP = 64, kUnits = 64;
constexpr int kSets = 4, kStages = 3, kLists = 8, kKeyLists = 4, kWeighers = 2;  // a weigher sees every use of the places that it meets: multiples
constexpr int kThreads = 128 * (kWeighers + 2), kTurns = 128;  // kTurns: segments of a block
enum Kind { kShared, kRouted, kKinds };  // of units

template <class T> struct Shared {
  struct {
    TileStorage<T, kDP, kPassRows> q, dout;
  } sets[kSets];
  UnitStage<T, kDP, kUnits> landmarks, stages[kStages];
  struct {
    TileStorage<T, kUnits, kPassRows> probabilities[kKinds], dlogits[kKinds];
  } weights[kWeighers];
  TileStorage<T, kDP, kPassRows> dq[kWeighers];  // on their way out
  struct List {
    alignas(16) std::int32_t query[kPassRows];  // -1 behind the last
    float lse[kPassRows], dlse[kPassRows];
    std::int32_t stage, keys;  // of their units: where, and how many
  } lists[kLists];
  struct Segment {
    std::int32_t index, first, entries;  // first: its first list; no entries: there was no more
  };
  struct {
    Segment segment;
    alignas(16) std::int32_t key[kUnits];  // -1 behind the last
  } key_lists[kKeyLists];
  Segment segments[kStages];
  Work works[kTurns + 1];  // no entries: there was no more
  std::uint32_t counts[4 * kWeighers][2];  // of a weigher's warp: what it has counted
  struct HeadRows {
    T* row0;
    std::int64_t pitch;
  };
  struct {
    HeadRows rows[6];  // of q, dout, landmarks, compressed values, keys, values
    T* dq;
    const float *lse, *dlse;
    const std::int32_t *entries, *indices;
    RoutedRows dk, dv;
    std::int32_t keys;
  } head;
  std::uint64_t of_lists[kLists][2], of_key_lists[kKeyLists][2], of_sets[kSets][2], of_landmarks[1][2], of_stages[kStages][2], of_weights[kWeighers][2];
};

static_assert(sizeof(Shared<__half>) <= 227 * 1024 && kUnits == kPassRows);

template <class T> __global__ void __launch_bounds__(kThreads, 1) gradient_specialists_kernel(const AttentionGradientParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using C = Config<T, kDP, true>;
  constexpr int kTiles = kUnits / 8;
  const Problem& x = p.problem;
  extern __shared__ __align__(kPanel) unsigned char memory[];
  Window window(memory);
  auto& shared = *reinterpret_cast<Shared<T>*>(memory);
  // Every role counts the lists of queries, and with them sets and weights, and the lists of keys; of stages there is one less, as the first keys are landmarks.
  unsigned queries = 0, keys = 0;
  const auto list = [&] { return Ring<kLists>{window.of(shared.of_lists), queries}; };
  const auto set = [&] { return Ring<kSets>{window.of(shared.of_sets), queries}; };
  const auto weights = [&] { return Ring<kWeighers>{window.of(shared.of_weights), queries}; };
  const auto key_list = [&] { return Ring<kKeyLists>{window.of(shared.of_key_lists), keys}; };
  const auto landmarks = [&] { return Ring<1>{window.of(shared.of_landmarks), 0}; };
  const auto stage = [&] { return Ring<kStages>{window.of(shared.of_stages), keys - 1}; };
  if (threadIdx.x == 0) {  // loads arrive by themselves, lane by lane
    list().init(32 + 1, 2 * 32 + 128), key_list().init(32, 32 + 128), set().init(2 * 32, 128 + 4), landmarks().init(32, 1);
    Ring<kStages>{window.of(shared.of_stages), 0}.init(32 + 1, 128 * kWeighers), weights().init(128, 4);
    fence_barriers();
    const int bh = blockIdx.x / p.splits, b = bh / x.H, h = bh - b * x.H, key_head = h / (x.H / x.Hkv);
    const Span its_queries = span(x.queries, b), its_keys = span(x.keys, b);
    const std::int64_t row0 = std::int64_t(bh) * x.queries.max_length;
    const auto routed = [&](const RoutedRows& of) { return rounded_rows_from(of, std::int64_t(bh) * max_tiles(x, p.groups.segment_rows) * x.K, x.D); };
    const auto rows = [&](const Rows& rows, int head, std::int64_t start) { return typename Shared<T>::HeadRows{head_rows<T>(rows, b, head, start), rows.row}; };
    shared.head = {{rows(p.q, h, its_queries.start), rows(p.dout, h, its_queries.start), rows(p.units.landmarks, h, 0), rows(p.units.compressed, h, 0),
                    rows(p.units.k, key_head, its_keys.start), rows(p.units.v, key_head, its_keys.start)},
                   head_rows<T>(p.dq, b, h, its_queries.start),
                   p.lse + row0,
                   (p.dlse ? p.dlse : p.lse) + row0,
                   p.groups.entries + row0,
                   p.units.indices + std::int64_t(bh) * x.M * x.K,
                   routed(p.routed_dk),
                   routed(p.routed_dv),
                   its_keys.length};
  }
  {
    auto& sizes = reinterpret_cast<std::int32_t (&)[kThreads]>(shared.sets);
    const unsigned i = threadIdx.x, segments = max_tiles(x, p.groups.segment_rows), first = blockIdx.x / p.splits * segments;  // 64 bits: registers
    if (i < segments) sizes[i] = p.groups.segments[first + i].entries;
    if (i <= kTurns) shared.works[i].entries = 0;
    __syncthreads();
    if (i < segments) {
      const int own = sizes[i];
      int place = 0;  // larger ones, and earlier ones of the same size
      for (int j = 0; j < segments; ++j) place += sizes[j] > own || (sizes[j] == own && j < i);
      const int turn = place / p.splits, dealt = place % p.splits, part = blockIdx.x % p.splits;
      if (own > 0 && part == (turn % 2 ? p.splits - 1 - dealt : dealt)) shared.works[turn] = p.groups.segments[first + i];
    }
  }
  __syncthreads();
  window.address = opaque(window.address);  // nothing of the above is kept: registers

  const int group = threadIdx.x / 128;
  const auto is_of = [&](const auto& segment) {  // the list at hand
    return (static_cast<int>(queries) - load_shared_int(window.of(segment.first))) * kPassRows < load_shared_int(window.of(segment.entries));
  };

  if (group == kWeighers + 1) {
    keep_registers<32>();
    // Starts copying rows of a tensor of `head.rows` by their numbers.
    const auto bring = [&](const auto& tile, int tensor, const auto& listed) {
      const auto& from = shared.head.rows[tensor];
      load_rows_by_warp<kUnits, T, kDP>(listed, __all_sync(kAllLanes, listed(32 + this_lane()) >= 0), x.D, Copy<T, kDP>(tile.in(window), {from.row0, 0, 0, from.pitch}, 0, 0, 0));
    };
    if (this_warp() == 0) {
      for (int i = this_lane(); i < kUnits; i += 32) shared.key_lists[0].key[i] = i < x.M ? i : -1;  // the first one: landmarks
      if (this_lane() == 0) shared.key_lists[0].segment.entries = 1;
      key_list().there().arrive();
      ++keys;
#pragma unroll 1
      for (bool more = true; more; ++keys) {
        const auto work = [&]() -> auto& { return shared.works[keys - 1]; };
        more = work().entries > 0;
        const auto query_at = [&](int i) { return i < work().entries ? shared.head.entries[work().first + i] : -1; };
        int query[2], key[2], found = 0;  // those of a tile are asked for before the last ones are listed
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int slot = 32 * i + this_lane();
          key[i] = more && slot < x.K ? shared.head.indices[work().expert * x.K + slot] : -1;
          query[i] = query_at(slot);
        }
        key_list().wait_free();
        auto& to = shared.key_lists[key_list().at()];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const bool present = static_cast<unsigned>(key[i]) < static_cast<unsigned>(shared.head.keys);
          found += __popc(__ballot_sync(kAllLanes, present));
          to.key[32 * i + this_lane()] = present ? key[i] : -1;
        }
        if (this_lane() == 0) to.segment = {work().place, static_cast<int>(queries), work().entries};
        key_list().there().arrive();
#pragma unroll 1
        for (int done = 0; done < work().entries; done += kPassRows, ++queries) {
          list().wait_free();
          auto& to = shared.lists[list().at()];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int place = 32 * i + this_lane();
            to.query[place] = query[i];
            load_number(window.of(to.lse) + 4 * place, shared.head.lse, query[i]);
            load_number(window.of(to.dlse) + 4 * place, shared.head.dlse, p.dlse ? query[i] : -1);
            query[i] = query_at(done + kPassRows + place);
          }
          if (this_lane() == 0) to.stage = stage().at(), to.keys = found;
          list().there().arrive_loaded();
          __syncwarp();
          if (this_lane() == 0) list().there().arrive();
        }
      }
      list().wait_free();  // a list without queries: there are no more
      shared.lists[list().at()].query[this_lane()] = -1;
      list().there().arrive_loaded();
      __syncwarp();
      if (this_lane() == 0) list().there().arrive();
    } else if (this_warp() < 3) {
#pragma unroll 1
      for (;; ++queries) {
        list().wait_there();
        const auto query = RowList{window.of(shared.lists[list().at()].query)};
        if (query(0) < 0) break;
        set().wait_free();
        const auto& rows = shared.sets[set().at()];
        bring(this_warp() == 1 ? rows.q : rows.dout, this_warp() - 1, query);
        list().done().arrive();
        set().there().arrive_loaded();
      }
    } else {
#pragma unroll 1
      for (bool more = true; more; ++keys) {
        const auto from = [&]() -> auto& { return shared.key_lists[key_list().at()]; };
        const auto of_landmarks = [&] { return keys == 0; };
        window.address = opaque(window.address);
        key_list().wait_there();
        more = from().segment.entries > 0;
        if (!of_landmarks()) stage().wait_free();
        if (more)
#pragma unroll 1
          for (int i = 0; i < 2; ++i) {
            const auto& to = of_landmarks() ? shared.landmarks : shared.stages[stage().at()];
            bring(i ? to.v : to.k, (of_landmarks() ? 2 : 4) + i, RowList{window.of(from().key)});
          }
        if (this_lane() == 0 && !of_landmarks()) shared.segments[stage().at()] = from().segment;
        (of_landmarks() ? landmarks().there() : stage().there()).arrive_loaded();
        key_list().done().arrive();
        __syncwarp();
        if (this_lane() == 0 && !of_landmarks()) stage().there().arrive();
      }
    }
    wait_loads<0>();
  } else if (group < kWeighers) {
    take_registers<160>();
    constexpr float kRescale = power_of_2(kGradientShift<T> - kProbabilityShift<T>), kUnshifted = power_of_2(-kGradientShift<T>);
    landmarks().wait_there();
    ++keys;
#pragma unroll 1
    for (; stage().wait_there(), is_of(shared.segments[stage().at()]); ++keys) {
      const auto listed = [&]() -> auto& { return shared.lists[list().at()]; };
      const auto units = [&]() -> auto& { return shared.stages[load_shared_int(window.of(listed().stage))]; };
#pragma unroll 1
      for (; is_of(shared.segments[stage().at()]); ++queries) {
        if (static_cast<int>(weights().at()) != opaque(threadIdx.x) / 128) continue;
        list().wait_there();
        set().wait_there();
        fence_loads();
        int thread = opaque(threadIdx.x);
        const auto lane = [&] { return thread % 32; };
        const auto warp = [&] { return thread % 128 / 32; };
        const auto& rows = shared.sets[set().at()];
        const auto to = [&]() -> auto& { return shared.weights[thread / 128]; };
        const GroupRows<T, kDP> q{rows.q.in(window)}, dout{rows.dout.in(window)};
        float s[kKinds][kTiles][4], gradient[kKinds][kTiles][4];
        product<C>(s[kShared], q, shared.landmarks.k.in(window), lane());
        product<C>(s[kRouted], q, units().k.in(window), lane());
        product<C>(gradient[kShared], dout, shared.landmarks.v.in(window), lane());
        product<C>(gradient[kRouted], dout, units().v.in(window), lane());
        window.address = opaque(window.address);
        // A number of the list, of those that it has of rows: row i of the warp.
        const auto number = [&](int offset, int i) { return load_shared_int(window.of(listed()) + 4 * (16 * warp() + i) + offset); };
        const auto number_of_own = [&](int offset, int i) { return load_shared_int(window.of(listed()) + 4 * (16 * warp() + lane() / 4) + offset + 32 * i); };
        using List = typename Shared<T>::List;
        // What is counted, and what was computed of it, is not kept in registers over products.
        const auto counts = [&] { return window.of(shared.counts[opaque(threadIdx.x) / 32]); };
        store_shared2(counts(), __uint_as_float(queries), __uint_as_float(keys));
        const auto forget = [&] { queries = load_shared_int(counts()), keys = load_shared_int(counts() + 4), thread = opaque(threadIdx.x); };
        const auto address_of = [&](const auto& tile) { return tile.in(window).from_row(16 * warp()).chunk(lane() & 15, lane() >> 4); };
        float lse[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // infinity where a row attended to nothing, or is not there
          const float its = __int_as_float(number_of_own(offsetof(List, lse), i));
          lse[i] = number_of_own(offsetof(List, query), i) < 0 || its == -kInfinity ? kInfinity : its * kLogit<T> - kProbabilityShift<T>;
        }
        weights().wait_free();
        forget();
        wait_products<C, 2>(s[kShared], s[kRouted]);
        float total[2] = {0.0f, 0.0f}, other[2] = {0.0f, 0.0f};  // two sums of each row: latency
#pragma unroll
        for (int kind = 0; kind < kKinds; ++kind) {
          auto& w = s[kind];
          const float scale = (kind == kShared ? p.landmark_scale : p.scale) * kLogit<T>;
#pragma unroll
          for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) w[n][i] = fmaf(w[n][i], scale, -lse[i / 2]);
          const int count = kind == kShared ? x.M : load_shared_int(window.of(listed().keys));
          if (count < kUnits) mask_last_logits(w, count, lane());
#pragma unroll
          for (int k = 0; k < kTiles / 2; ++k) {
#pragma unroll
            for (int n = 2 * k; n < 2 * k + 2; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) (n & 1 ? other : total)[i / 2] += w[n][i] = exponential<T>(w[n][i]);
            store_weights<T>(address_of(to().probabilities[kind]), k,
                             {pack<T>(w[2 * k][0], w[2 * k][1]), pack<T>(w[2 * k][2], w[2 * k][3]), pack<T>(w[2 * k + 1][0], w[2 * k + 1][1]), pack<T>(w[2 * k + 1][2], w[2 * k + 1][3])});
          }
        }
        total[0] += other[0], total[1] += other[1];
        wait_products<C, 0>(gradient[kShared], gradient[kRouted]);
        float delta[2] = {0.0f, 0.0f};
#pragma unroll
        for (int kind = 0; kind < kKinds; ++kind)
#pragma unroll
          for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) delta[i / 2] = fmaf(s[kind][n][i], gradient[kind][n][i], delta[i / 2]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int d = 1; d < 4; d *= 2) delta[i] += __shfl_xor_sync(kAllLanes, delta[i], d), total[i] += __shfl_xor_sync(kAllLanes, total[i], d);
          delta[i] = exact_delta<T>(delta[i] - __int_as_float(number_of_own(offsetof(List, dlse), i)) * power_of_2(kProbabilityShift<T>), total[i]);
        }
        forget();
        struct Pair {
          Weights<T, kTiles> rounded, rest;
        };
        const auto differentiate = [&](int kind) {
          Pair dlogits;
#pragma unroll
          for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const auto dlogit = [&](int j) { return s[kind][n][2 * i + j] * kRescale * (gradient[kind][n][2 * i + j] - delta[i]); };
              const float lo = dlogit(0), hi = dlogit(1);
              std::uint32_t &rounded = dlogits.rounded.packed[n][i], &rest = dlogits.rest.packed[n][i];
              rounded = pack<T>(lo, hi);
              rest = pack<T>(lo - unpack<T>(rounded).x, hi - unpack<T>(rounded).y);
              asm volatile("" : "+r"(rounded), "+r"(rest));  // one after the other: registers
            }
          store_weights(address_of(to().dlogits[kind]), dlogits.rounded);
          return dlogits;
        };
        float sum[kDP / 8][4];
        const auto add = [&](Pair& dlogits, const auto& unit_keys) {
          add_weighted_rows<C>(sum, dlogits.rounded, unit_keys, lane());
          add_weighted_rows<C>(sum, dlogits.rest, unit_keys, lane());
          wait_products<C, 0>(sum);
        };
        Pair of_landmarks = differentiate(kShared), of_keys = differentiate(kRouted);
        fence_loads();  // these, too, are for wgmma
        forget();
        weights().there().arrive();
        clear(sum);
        add(of_landmarks, shared.landmarks.k.in(window));
        const float ratio = p.landmark_scale / p.scale, last[2] = {p.scale * kUnshifted, p.scale * kUnshifted};
#pragma unroll
        for (int d = 0; d < kDP / 8; ++d)
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[d][i] *= ratio;
        add(of_keys, units().k.in(window));
        const auto& dq = shared.dq[thread / 128];
        forget();
        store_rows_by_warp(dq.in(window).from_row(16 * warp()), sum, last, x.D, lane(), shared.head.dq, p.dq.row, [&](int row) { return number(offsetof(List, query), row); });
        forget();
        list().done().arrive();
        set().done().arrive();
      }
      stage().done().arrive();
    }
  } else {
    take_registers<160>();
    float dk[kKinds][kDP / 8][4], dv[kKinds][kDP / 8][4];
    const auto store = [&](float (&sums)[kDP / 8][4], float factor, float* to, std::int64_t first, int units) {
#pragma unroll
      for (int d = 0; d < kDP / 8; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[d][i] *= factor;
      pin(sums);  // where they are: registers
      constexpr float kOne[2] = {1.0f, 1.0f};
      store_partial_rows<C>(sums, kOne, x.D, this_lane(), [=](int i) { return 16 * this_warp() + i < units ? to + (first + 16 * this_warp() + i) * x.D : nullptr; });
      pin(sums);
    };
    constexpr float kUnshifted = power_of_2(-kGradientShift<T>), kProbability = power_of_2(-kProbabilityShift<T>);
    clear(dk[kShared]), clear(dv[kShared]), clear(dk[kRouted]), clear(dv[kRouted]);
    key_list().done().arrive();  // landmarks
    ++keys;
    for (; key_list().wait_there(), is_of(shared.key_lists[key_list().at()].segment); ++keys) {
      for (bool begun = false; is_of(shared.key_lists[key_list().at()].segment); ++queries, begun = true) {
        set().wait_there();
        weights().wait_there();
        fence_loads();
        // One description for all tiles of a set, and one for all weights: registers.
        const auto& rows = shared.sets[set().at()];
        const auto& from = shared.weights[weights().at()];
        const Matrix<kDP> of_queries(window.of(rows), true), of_units(window.of(from), true);
        begin_products(dk[kShared], dk[kRouted], dv[kShared], dv[kRouted]);
#pragma unroll
        for (int kind = 0; kind < kKinds; ++kind)
#pragma unroll
          for (int k = 0; k < kPassRows / 16; ++k) {
            constexpr int kStep = 16 * kDP * sizeof(T), kTile = kPassRows * kDP * sizeof(T);
            const bool more = kind == kShared || k > 0 || begun;
            wgmma_transposed<T>(dv[kind], of_units.at(kind * kTile + k * kStep), of_queries.at(kTile + k * kStep), more);
            wgmma_transposed<T>(dk[kind], of_units.at((kKinds + kind) * kTile + k * kStep), of_queries.at(k * kStep), more);
          }
        commit_products();
        wait_products<C, 0>(dk[kShared], dk[kRouted], dv[kShared], dv[kRouted]);
        if (this_lane() == 0) weights().done().arrive(), set().done().arrive();
      }
      if (p.routed_dk.numbers) {
        const int row0 = 16 * this_warp(), first = load_shared_int(window.of(shared.key_lists[key_list().at()].segment.index)) * x.K + row0;
        store_rounded_rows<C>(dk[kRouted], dv[kRouted], p.scale * kUnshifted, kProbability, x.D, this_lane(), shared.head.dk, shared.head.dv,
                              [=](int row) { return row0 + row < x.K ? first + row : -1; });
        pin(dk[kRouted]), pin(dv[kRouted]);  // where they are: registers
      }
      key_list().done().arrive();
    }
    const std::int64_t first = std::int64_t(opaque(blockIdx.x)) * x.M;
    store(dk[kShared], p.landmark_scale * kUnshifted, p.shared_dk, first, x.M);
    store(dv[kShared], kProbability, p.shared_dv, first, x.M);
  }
#else
  __trap();
#endif
}

}  // namespace

bool fits_specialist_gradient(const Problem& x, bool shared, float scale, float landmark_scale) {
  return has_warpgroups(x.dtype, x.D) && x.D <= kDP && x.D % kCudaHeadDimStep == 0 && x.s == 1 && shared && x.M <= kUnits && x.K <= kUnits &&
         have_ratio(landmark_scale, scale);
}

cudaError_t launch_specialist_gradient(const AttentionGradientParams& p, cudaStream_t stream) {
  const Problem& x = p.problem;
  if (!fits_specialist_gradient(x, p.units.shared, p.scale, p.landmark_scale)) return cudaErrorInvalidValue;
  if (const int segments = max_tiles(x, p.groups.segment_rows); segments > kThreads || segments > kTurns * p.splits) return cudaErrorInvalidValue;
  return dispatch_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) {
      return launch(gradient_specialists_kernel<T>, static_cast<unsigned>(x.B) * x.H * p.splits, kThreads, sizeof(Shared<T>), stream, p);
    } else {
      return cudaErrorInvalidValue;
    }
  });
}

}  // namespace mita
