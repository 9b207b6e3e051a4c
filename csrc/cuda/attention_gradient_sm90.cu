// Attention's gradients of queries and units in one pass over the queries (else four: reduce.cu, row_gradient.cu, unit_gradient.cu), for sm_90a and
// few units: 16-bit elements of up to 64 columns, up to 64 landmarks and 64 keys of an expert, one expert per query. By specialists; the segments of
// one head are dealt out to `splits` blocks, the largest ones first and back and forth, so that all have nearly the same to do. A pass takes 64 queries, of
// one segment or, where experts have few queries, of up to four: 16 rows, a slot, are of one.
//   one warp lists the queries of every pass, with what is said of each;
//   three warps bring rows: q and dout of such lists into a ring of sets; and the shared units, once, and then an expert's keys and values for every
//   segment, into a ring of stages. Two have whichever of the two is more;
//   two warpgroups weigh, by turns, 64 queries against all their units: P and dS, and with them dq. All units of a query being at hand, delta is
//   exact. Rounded, P and dS go to shared memory. Where keys are nearly the same, dq is what is left when dS cancels, and its rounding does not cancel
//   with it: in dq dS has 32 bits, a rounded part and the rounded rest. With slots, each warp has keys of its own, and products of its own with them;
//   one warpgroup sums over the queries, P^T dout and dS^T q: for the shared units through all segments, for an expert's through one.
#include "launch.h"
#include "routed.cuh"
#include "specialists.cuh"

namespace mita {
namespace {

constexpr int kDP = 64, kUnits = 64;
constexpr int kLists = 8, kPresent = 16, kWeighers = 2;  // a weigher has every second list
template <int SLOTS> constexpr int kSets = SLOTS == 1 ? 4 : 3;
template <int SLOTS> constexpr int kStages = SLOTS == 1 ? 3 : 5;
template <int SLOTS> constexpr int kUnitWarps = SLOTS == 1 ? 1 : 2;  // that bring keys and values: one for both, or one for each; the others bring queries
template <int SLOTS> constexpr int kOutColumns = SLOTS == 1 ? kDP : kDP / 2;  // of dq, that go out at a time
constexpr int kThreads = 128 * (kWeighers + 2), kTurns = 128;  // kTurns: segments of a block
enum Kind { kShared, kRouted, kKinds };  // of units

template <class T, int SLOTS> struct Shared {
  struct {
    TileStorage<T, kDP, kPassRows> q, dout;
  } sets[kSets<SLOTS>];
  UnitStage<T, kDP, kUnits> landmarks, stages[kStages<SLOTS>];
  struct {
    TileStorage<T, kUnits, kPassRows> probabilities[kKinds], dlogits[kKinds];
  } weights[kWeighers];
  TileStorage<T, kOutColumns<SLOTS>, 16> dq[4 * kWeighers];  // on their way out
  struct List {
    alignas(16) std::int32_t query[kPassRows];  // -1: there is none. None in the first place: there are no more lists
    float lse[kPassRows], dlse[kPassRows];
    // Segments are numbered in the order of the block.
    struct alignas(8) Slot {
      std::int32_t segment, stage;
    } slots[SLOTS];
    std::int32_t ended[SLOTS];  // where the sums of a segment belong that ends with the slot; else -1
    std::int32_t until;         // the first segment that whoever weighs this list, and so every second one, meets again
  } lists[kLists];
  alignas(16) std::int32_t numbers[kUnitWarps<SLOTS>][kUnits], next[kUnitWarps<SLOTS>][kUnits];  // of keys on their way, and of those of the next segment
  std::int32_t present[kPresent];  // keys of the last segments
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
  std::uint64_t of_lists[kLists][2], of_sets[kSets<SLOTS>][2], of_landmarks[1][2], of_stages[kUnitWarps<SLOTS>][kStages<SLOTS>][2], of_weights[kWeighers][2];
};

template <class T, int SLOTS> __global__ void __launch_bounds__(kThreads, 1) gradient_specialists_kernel(const AttentionGradientParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using C = Config<T, kDP, true>;
  using Own = Config<T, kDP, SLOTS == 1>;  // products with the keys of experts
  using Memory = Shared<T, SLOTS>;
  static_assert(sizeof(Memory) <= 227 * 1024 && kUnits == kPassRows && kLists % kWeighers == 0);
  static_assert(kStages<SLOTS> > SLOTS);  // whoever waits for the last stage of a list, and for the one before its first, has seen the last use of both
  constexpr int kTiles = kUnits / 8, kSlotRows = kPassRows / SLOTS, kRings = kUnitWarps<SLOTS>, kRowWarps = 3 - kRings;
  const Problem& x = p.problem;
  extern __shared__ __align__(kPanel) unsigned char memory[];
  Window window(memory);
  auto& shared = *reinterpret_cast<Memory*>(memory);
  let_next_kernel_start();
  // Every role counts the lists of queries, and with them sets and weights, and the segments, whose keys are brought.
  unsigned queries = 0, keys = 0;
  const auto list = [&] { return Ring<kLists>{window.of(shared.of_lists), queries}; };
  const auto set = [&] { return Ring<kSets<SLOTS>>{window.of(shared.of_sets), queries}; };
  const auto weights = [&] { return Ring<kWeighers>{window.of(shared.of_weights), queries}; };
  const auto landmarks = [&] { return Ring<1>{window.of(shared.of_landmarks), 0}; };
  const auto stage = [&](int tensor, unsigned segment) {  // a ring for keys and one for values, or one for both
    return Ring<kStages<SLOTS>>{window.of(shared.of_stages[tensor % kRings]), segment};
  };
  // By two warps at once. Loads arrive by themselves, lane by lane.
  if (threadIdx.x == 128) {
    list().init(32 + 1, 32 * kRowWarps + 128 + 128), set().init(32 * kRowWarps, 4), landmarks().init(32 * kRings, 1), weights().init(128, 4);
    for (int tensor = 0; tensor < kRings; ++tensor) stage(tensor, 0).init(32 + 1, 128 * kWeighers);
    fence_barriers();
  }
  if (threadIdx.x == 256) {
    const int bh = blockIdx.x / p.splits, b = bh / x.H, h = bh - b * x.H, key_head = h / (x.H / x.Hkv);
    const Span its_queries = span(x.queries, b), its_keys = span(x.keys, b);
    const std::int64_t row0 = std::int64_t(bh) * x.queries.max_length;
    const auto routed = [&](const RoutedRows& of) { return rounded_rows_from(of, std::int64_t(bh) * max_tiles(x, p.groups.segment_rows) * x.K, x.D); };
    const auto rows = [&](const Rows& rows, int head, std::int64_t start) { return typename Memory::HeadRows{head_rows<T>(rows, b, head, start), rows.row}; };
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
    Work own{};
    if (i < segments) own = p.groups.segments[first + i], sizes[i] = own.entries;
    if (i <= kTurns) shared.works[i] = {0, 0, 0, 0};
    __syncthreads();
    if (own.entries > 0) {
      int place = 0;  // larger ones, and earlier ones of the same size
      for (int j = 0; j < segments; ++j) place += sizes[j] > own.entries || (sizes[j] == own.entries && j < i);
      const int turn = place / p.splits, dealt = place % p.splits, part = blockIdx.x % p.splits;
      if (part == (turn % 2 ? p.splits - 1 - dealt : dealt)) shared.works[turn] = own;
    }
  }
  __syncthreads();
  window.address = opaque(window.address);  // nothing of the above is kept: registers

  const int group = threadIdx.x / 128;
  const auto listed = [&]() -> auto& { return shared.lists[list().at()]; };
  const auto no_more = [&] { return load_shared_int(window.of(listed().query)) < 0; };

  if (group == kWeighers + 1) {
    keep_registers<32>();
    // Starts copying rows of a tensor of `head.rows` by their numbers.
    const auto bring = [&](const auto& tile, int tensor, const auto& numbers) {
      const auto& from = shared.head.rows[tensor];
      load_rows_by_warp<kUnits, T, kDP>(numbers, __all_sync(kAllLanes, numbers(this_lane()) >= 0 && numbers(32 + this_lane()) >= 0), x.D,
                                        Copy<T, kDP>(tile.in(window), from.row0, from.pitch));
    };
    if (this_warp() == 0) {
      int filled = 0;  // rows of the list at hand
      const auto list_of = [&](int place) -> auto& { return shared.lists[(list() + place / kPassRows).at()]; };  // this one or the next
      const auto list_row = [&](int place, int query) {
        auto& to = list_of(place);
        place %= kPassRows;
        to.query[place] = query;
        load_number(window.of(to.lse) + 4 * place, shared.head.lse, query);
        load_number(window.of(to.dlse) + 4 * place, shared.head.dlse, p.dlse ? query : -1);
      };
      const auto list_slot = [&](int place, unsigned segment, int ended) {
        auto& to = list_of(place);
        place = place % kPassRows / kSlotRows;
        to.slots[place] = {static_cast<int>(segment), static_cast<int>(stage(0, segment).at())}, to.ended[place] = ended;
      };
      const auto finish_list = [&] {
        list().there().arrive_loaded();
        __syncwarp();
        if (this_lane() == 0) list().there().arrive();
        ++queries;
      };
      const auto work = [&]() -> auto& { return shared.works[keys]; };
      const auto query_at = [&](int i) { return i < work().entries ? shared.head.entries[work().first + i] : -1; };
      // The next queries are asked for before there is room for them.
      int left = work().entries, query[2] = {query_at(this_lane()), query_at(32 + this_lane())};
#pragma unroll 1
      while (left > 0) {
        const int rows = min(kPassRows, round_up(left, kSlotRows));
        if (filled == 0) list().wait_free();
        if (filled + rows > kPassRows) (list() + 1).wait_free();
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (const int row = 32 * i + this_lane(); row < rows) list_row(filled + row, query[i]);
        if (const int row = this_lane() * kSlotRows; row < rows) list_slot(filled + row, keys, row + kSlotRows >= left ? work().place : -1);
        filled += rows, left -= rows;
        if (filled >= kPassRows) {
          filled -= kPassRows;
          if (this_lane() == 0) listed().until = keys + (filled + left <= kPassRows);
          finish_list();
        }
        if (left <= 0) left = shared.works[++keys].entries;
        const int next = work().entries - left;
#pragma unroll
        for (int i = 0; i < 2; ++i) query[i] = query_at(next + 32 * i + this_lane());
      }
      if (filled > 0) {  // slots without queries, of the last segment
        for (int row = filled + this_lane(); row < kPassRows; row += 32) list_row(row, -1);
        if (const int row = filled + this_lane() * kSlotRows; row < kPassRows) list_slot(row, keys - 1, -1);
        if (this_lane() == 0) listed().until = keys;
        finish_list();
      }
#pragma unroll 1
      for (int i = 0; i < kWeighers; ++i) {
        list().wait_free();
        if (this_lane() == 0) listed().query[0] = -1;
        finish_list();
      }
    } else if (const int one = this_warp() - 1; one < kRowWarps) {
#pragma unroll 1
      for (;; ++queries) {
        list().wait_there();
        if (no_more()) break;
        set().wait_free();
        const auto& rows = shared.sets[set().at()];
#pragma unroll 1
        for (int i = one; i < 2; i += kRowWarps) bring(i ? rows.dout : rows.q, i, RowList{window.of(listed().query)});
        list().done().arrive();
        set().there().arrive_loaded();
      }
    } else {
      const auto first_tensor = [&] { return this_warp() - 1 - kRowWarps; };  // of 0 and 1
      const auto bring_units = [&](const auto& to, int first, const auto& numbers) {
#pragma unroll 1
        for (int tensor = first_tensor(); tensor < 2; tensor += kRings) bring(tensor ? to.v : to.k, first + tensor, numbers);
      };
      bring_units(shared.landmarks, 2, [M = x.M](int m) { return m < opaque(M) ? m : -1; });  // opaque: registers
      landmarks().there().arrive_loaded();
      const auto numbers = [&] { return RowList{window.of(shared.numbers) + first_tensor() * static_cast<unsigned>(sizeof(shared.numbers[0]))}; };
      const auto entries = [&] { return load_shared_int(window.of(shared.works[0].entries) + keys * sizeof(Work)); };
      const auto next = [&](int slot) { return window.of(shared.next) + (first_tensor() * kUnits + slot) * 4; };
      const auto ask = [&] {  // before there is room for the last segment
        const std::int32_t* const its = shared.head.indices + load_shared_int(window.of(shared.works[0].expert) + keys * sizeof(Work)) * x.K;
        const bool more = entries() > 0;
#pragma unroll
        for (int slot = this_lane(); slot < kUnits; slot += 32) load_number(next(slot), its, more && slot < x.K ? slot : -1);
        commit_loads();
      };
#pragma unroll 1
      for (ask(); entries() > 0;) {
        window.address = opaque(window.address);
        const unsigned keys_there = load_shared_int(window.of(shared.head.keys));
        wait_loads<0>();
        // In the place of a key that is not there lies the first one again, which is quicker than zeros; it has no weight.
        int key[2], found = 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) key[i] = load_shared_int(next(32 * i + this_lane()));
        const int first = __shfl_sync(kAllLanes, key[0], 0), other = static_cast<unsigned>(first) < keys_there ? first : -1;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int slot = 32 * i + this_lane();
          const bool present = slot < x.K && static_cast<unsigned>(key[i]) < keys_there;
          found += __popc(__ballot_sync(kAllLanes, present));
          if (!present) key[i] = other;
          store_shared(numbers().address + 4 * slot, key[i]);
        }
        if (first_tensor() == 0) store_shared(window.of(shared.present) + keys % kPresent * 4, found);
        __syncwarp();
        if constexpr (kRings == 2) {  // in the L2 when there is room
          const auto& from = shared.head.rows[4 + first_tensor()];
#pragma unroll
          for (int i = 0; i < 2; ++i) asm volatile("prefetch.global.L2 [%0];" ::"l"(row_behind(from.row0, from.pitch * sizeof(T), max(key[i], 0))));
        }
        ++keys;
        ask();
        const auto its = [&] { return stage(first_tensor(), keys - 1); };
        its().wait_free();
        bring_units(shared.stages[its().at()], 4, numbers());
        its().there().arrive_loaded();
        __syncwarp();
        if (this_lane() == 0) its().there().arrive();
      }
    }
    wait_loads<0>();
  } else if (group < kWeighers) {
    take_registers<160>();
    constexpr float kRescale = power_of_2(kGradientShift<T> - kProbabilityShift<T>), kUnshifted = power_of_2(-kGradientShift<T>);
    landmarks().wait_there();
    queries = group;
#pragma unroll 1
    for (;; queries += kWeighers) {
      list().wait_there();
      if (no_more()) break;
      unsigned thread = this_thread();
      const auto lane = [&] { return static_cast<int>(thread % 32); };
      const auto warp = [&] { return static_cast<int>(thread % 128 / 32); };
      const auto segment_of = [&](int slot) { return static_cast<unsigned>(load_shared_int(window.of(listed().slots[slot].segment))); };
      if (const unsigned first = segment_of(0); keys < first) {  // segments of the other weigher alone
        for (int tensor = 0; tensor < kRings; ++tensor) stage(tensor, first - 1).wait_there();
        for (; keys < first; ++keys)
          for (int tensor = 0; tensor < kRings; ++tensor) stage(tensor, keys).done().arrive();
      }
      const auto wait_for_units = [&](int tensor) { stage(tensor, segment_of(SLOTS - 1)).wait_there(); };
      wait_for_units(0);
      set().wait_there();
      fence_loads();
      const auto own_slot = [&]() -> auto& { return listed().slots[warp() * SLOTS / 4]; };
      const auto units = [&]() -> auto& { return shared.stages[load_shared_int(window.of(own_slot().stage))]; };
      const auto& rows = shared.sets[set().at()];
      const auto to = [&]() -> auto& { return shared.weights[thread / 128]; };
      const GroupRows<T, kDP> q{rows.q.in(window)}, dout{rows.dout.in(window)};
      const auto own_rows = [&](const auto& tile) {
        StoredRows<Own> result;
        result.load(SLOTS == 1 ? tile.in(window) : tile.in(window).from_row(16 * warp()), lane());
        return result;
      };
      float s[kKinds][kTiles][4], gradient[kKinds][kTiles][4];
      product<C>(s[kShared], q, shared.landmarks.k.in(window), lane());
      product<Own>(s[kRouted], own_rows(rows.q), units().k.in(window), lane());
      product<C>(gradient[kShared], dout, shared.landmarks.v.in(window), lane());
      if constexpr (kRings == 2) wait_for_units(1);
      product<Own>(gradient[kRouted], own_rows(rows.dout), units().v.in(window), lane());
      window.address = opaque(window.address);
      // A number of the list, of those that it has of rows: row i of the warp.
      const auto number = [&](int offset, int i) { return load_shared_int(window.of(listed()) + 4 * (16 * warp() + i) + offset); };
      const auto number_of_own = [&](int offset, int i) { return load_shared_int(window.of(listed()) + 4 * (16 * warp() + lane() / 4) + offset + 32 * i); };
      using List = typename Memory::List;
      // What is counted, and what was computed of it, is not kept in registers over products.
      const auto counts = [&] { return window.of(shared.counts[this_thread() / 32]); };
      store_shared2(counts(), __uint_as_float(queries), __uint_as_float(keys));
      __syncwarp();  // of all lanes, the same
      const auto forget = [&] { queries = load_shared_int(counts()), keys = load_shared_int(counts() + 4), thread = this_thread(); };
      const auto address_of = [&](const auto& tile) { return tile.in(window).from_row(16 * warp()).chunk(lane() & 15, lane() >> 4); };
      float lse[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // infinity where a row attended to nothing, or is not there
        const float its = __int_as_float(number_of_own(offsetof(List, lse), i));
        lse[i] = number_of_own(offsetof(List, query), i) < 0 || its == -kInfinity ? kInfinity : its * kLogit<T> - kProbabilityShift<T>;
      }
      weights().wait_free();
      forget();
      wait_products<C, SLOTS == 1 ? 2 : 1>(s[kShared], s[kRouted]);
      float total[2] = {0.0f, 0.0f}, other[2] = {0.0f, 0.0f};  // two sums of each row: latency
#pragma unroll
      for (int kind = 0; kind < kKinds; ++kind) {
        auto& w = s[kind];
        const float scale = (kind == kShared ? p.landmark_scale : p.scale) * kLogit<T>;
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) w[n][i] = fmaf(w[n][i], scale, -lse[i / 2]);
        const int count = kind == kShared ? x.M : load_shared_int(window.of(shared.present[load_shared_int(window.of(own_slot().segment)) % kPresent]));
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
      const auto give_back = [&](int tensor) {
        for (unsigned own = keys, until = load_shared_int(window.of(listed().until)); own < until; ++own) stage(tensor, own).done().arrive();
      };
      if constexpr (kRings == 2) give_back(1);
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
      Pair of_landmarks = differentiate(kShared), of_keys = differentiate(kRouted);
      fence_loads();  // these, too, are for wgmma
      forget();
      weights().there().arrive();
      float sum[kDP / 8][4];
      const auto add = [&](auto config, Pair& dlogits, const auto& unit_keys) {
        add_weighted_rows<decltype(config)>(sum, dlogits.rounded, unit_keys, lane());
        add_weighted_rows<decltype(config)>(sum, dlogits.rest, unit_keys, lane());
        wait_products<C, 0>(sum);
      };
      clear(sum);
      add(C{}, of_landmarks, shared.landmarks.k.in(window));
      const float ratio = p.landmark_scale / p.scale, last[2] = {p.scale * kUnshifted, p.scale * kUnshifted};
#pragma unroll
      for (int d = 0; d < kDP / 8; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[d][i] *= ratio;
      add(Own{}, of_keys, units().k.in(window));
      forget();
      give_back(0);
#pragma unroll
      for (int first = 0; first < kDP; first += kOutColumns<SLOTS>) {
        float columns[kOutColumns<SLOTS> / 8][4];
#pragma unroll
        for (int d = 0; d < kOutColumns<SLOTS> / 8; ++d)
#pragma unroll
          for (int i = 0; i < 4; ++i) columns[d][i] = sum[first / 8 + d][i];
        store_rows_by_warp(shared.dq[thread / 32].in(window), columns, last, x.D - first, lane(), shared.head.dq + first, p.dq.row,
                           [&](int row) { return number(offsetof(List, query), row); });
      }
      forget();
      keys = load_shared_int(window.of(listed().until));
      list().done().arrive();
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
    for (bool begun = false; list().wait_there(), !no_more(); ++queries) {
      set().wait_there();
      weights().wait_there();
      fence_loads();
      // One description for all tiles of a set, and one for all weights: registers.
      Matrix<kDP> of_queries(window.of(shared.sets[set().at()]), true), of_units(window.of(shared.weights[weights().at()]), true);
#pragma unroll 1
      for (int slot = 0; slot < SLOTS; ++slot) {
        begin_products(dk[kShared], dk[kRouted], dv[kShared], dv[kRouted]);
#pragma unroll
        for (int kind = 0; kind < kKinds; ++kind)
#pragma unroll
          for (int k = 0; k < kSlotRows / 16; ++k) {
            constexpr int kStep = 16 * kDP * sizeof(T), kTile = kPassRows * kDP * sizeof(T);
            const bool more = kind == kShared || k > 0 || begun;
            wgmma_transposed<T>(dv[kind], of_units.at(kind * kTile + k * kStep), of_queries.at(kTile + k * kStep), more);
            wgmma_transposed<T>(dk[kind], of_units.at((kKinds + kind) * kTile + k * kStep), of_queries.at(k * kStep), more);
          }
        commit_products();
        const int segment = load_shared_int(window.of(listed().ended[slot]));
        begun = segment < 0;
        of_queries.advance(kSlotRows * kDP * sizeof(T)), of_units.advance(kSlotRows * kDP * sizeof(T));
        wait_products<C, 0>(dk[kShared], dk[kRouted], dv[kShared], dv[kRouted]);
        if (slot == SLOTS - 1 && this_lane() == 0) weights().done().arrive(), set().done().arrive();
        if (!begun && p.routed_dk.numbers) {
          const int row0 = 16 * this_warp(), first = segment * x.K + row0;
          store_rounded_rows<C>(dk[kRouted], dv[kRouted], p.scale * kUnshifted, kProbability, x.D, this_lane(), shared.head.dk, shared.head.dv,
                                [=](int row) { return row0 + row < x.K ? first + row : -1; });
          pin(dk[kRouted]), pin(dv[kRouted]);  // where they are: registers
        }
      }
      list().done().arrive();
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
  return dispatch_16_bits(x.dtype, [&](auto element) {
    using T = decltype(element);
    const auto launch_with = [&](auto slots) {
      constexpr int kSlots = decltype(slots)::value;
      return launch(gradient_specialists_kernel<T, kSlots>, static_cast<unsigned>(x.B) * x.H * p.splits, kThreads, sizeof(Shared<T, kSlots>), stream, p);
    };
    return gradient_slots(x) == 1 ? launch_with(std::integral_constant<int, 1>()) : launch_with(std::integral_constant<int, 4>());
  });
}

}  // namespace mita
