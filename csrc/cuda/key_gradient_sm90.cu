// Gradients of the softmax of few landmarks over all keys, in one pass over the keys (else two: row_gradient.cu, unit_gradient.cu), for sm_90a:
// 16-bit elements of up to 64 columns, up to 64 landmarks, as many key heads as query heads. By specialists; a block takes its share of the keys of all heads,
// head after head:
//   two warps bring keys and values, 64 at a time, into a ring of stages;
//   four bring what queries left for these keys as keys of their experts, in the order of a list (key_lists.cu), 32 rows at a time, into two rings of pieces;
//   two warpgroups weigh, by turns, 64 keys against all landmarks: P and dS, and with them dk and dv, to which they add those rows. Rounded, P and dS go to shared
//   memory. Accumulators of dk and dv have their columns in the order in which those rows lie, as copies of the landmarks do;
//   one warpgroup sums over the keys: dS^T k and P^T k for the landmarks' own gradients.
// Delta is that of rounded compressed values here. What dS of a landmark sums to beyond its due is taken back from the landmark's gradient in the end
// (finish_kernel of row_gradient.cu), but not from dk: where keys receive nothing from experts that shows in fp16, and two passes it is.
#include "launch.h"
#include "routed.cuh"
#include "specialists.cuh"

namespace mita {
namespace {

constexpr int kDP = 64, kLandmarks = 64;
constexpr int kStages = 3, kWeighers = 2, kHeads = 2;
constexpr int kPiece = 32, kPieces = 5, kAsked = 4;  // rows of a piece, pieces of each weigher's ring, and those whose rows are asked for
constexpr int kThreads = 128 * (kWeighers + 3);

template <class T> struct Shared {
  UnitStage<T, kDP, kLandmarks> landmarks[kHeads], permuted;  // and the gradients of their compressed values; with columns in the order of routed rows
  UnitStage<T, kDP, kKeyBlock> stages[kStages];
  struct {
    TileStorage<T, kLandmarks, kKeyBlock> probabilities, dlogits;
  } weights[kWeighers];
  TileStorage<T, kDP, 8> ones;
  struct Piece {
    TileStorage<Fixed, kDP, kPiece> rows[2];  // of keys and of values
    alignas(8) float factors[2][kPiece];
    alignas(4) T keys[kPiece];  // as elements; kKeyBlock: there is no such row
    std::int32_t left;          // rows from here on for the same keys
  } pieces[kWeighers][kPieces];
  struct Asked {
    KeyEntry entries[kPiece];
    std::int32_t first_row, left;  // of the head; rows from here on for the same keys, -1: there are no more keys
  } asked[4][kAsked];
  float lse[kHeads][kLandmarks], delta[kHeads][kLandmarks];
  struct {
    T* row0;
    std::int64_t pitch;
  } rows[2][2];  // of landmarks and keys; of gradients of compressed values and values
  struct {
    T* gradients[2];  // of the keys and of the values
    std::int32_t keys, last;  // how many there are; behind the last tile
  } head;  // whose keys are weighed
  std::uint64_t of_landmarks[kHeads][2], of_permuted, of_stages[kStages][2], of_weights[kWeighers][2], of_pieces[kWeighers][kPieces][2];
};
static_assert(sizeof(Shared<__half>) <= 227 * 1024);

template <class T> __global__ void __launch_bounds__(kThreads, 1) key_specialists_kernel(const KeyGradientParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using C = Config<T, kDP, true>;
  constexpr int kTiles = kLandmarks / 8;
  const UnitGradientParams& of_keys = p.keys;
  const Problem& x = of_keys.problem;
  extern __shared__ __align__(kPanel) unsigned char memory[];
  Window window(memory);
  auto& shared = *reinterpret_cast<Shared<T>*>(memory);
  let_next_kernel_start();

  // Tiles of 64 keys.
  const int tiles = ceil_div(x.keys.max_length, kKeyBlock), first_tile = blockIdx.x * p.landmarks.share, last_tile = min(first_tile + p.landmarks.share, x.B * x.H * tiles);
  struct Part {
    int bh, first, last;  // tiles of a head, as far as it has them
    Span keys;
  };
  const auto part_of = [&](int bh) {
    const Span keys = span(x.keys, bh / x.H);
    const int first = max(first_tile - bh * tiles, 0), last = min(last_tile - bh * tiles, ceil_div(keys.length, kKeyBlock));
    return Part{bh, first, max(first, last), keys};
  };
  const auto each_part = [&](auto&& work) {
#pragma unroll 1
    for (int bh = first_tile / tiles; bh * tiles < last_tile; ++bh) work(part_of(bh));
  };
  const bool routed = of_keys.groups.key_ranges != nullptr, wanted = of_keys.dk.data != nullptr;

  const auto landmarks = [&](unsigned i) { return Ring<kHeads>{window.of(shared.of_landmarks), i}; };
  const auto stage = [&](unsigned i) { return Ring<kStages>{window.of(shared.of_stages), i}; };
  const auto weights = [&](unsigned i) { return Ring<kWeighers>{window.of(shared.of_weights), i}; };
  const auto piece = [&](int weigher, unsigned i) { return Ring<kPieces>{window.of(shared.of_pieces[weigher]), i}; };
  const Barrier permuted{window.of(shared.of_permuted)};
  if (threadIdx.x == 0) {
    landmarks(0).init(2 * 32, 128 * kWeighers), permuted.init(128 * kWeighers), stage(0).init(2 * 32, 4 + 4), weights(0).init(128, 4);
    for (int weigher = 0; weigher < kWeighers; ++weigher) piece(weigher, 0).init(2 * (32 + 1), 128);
    fence_barriers();
  }
  for (int i = threadIdx.x; i < 8 * kDP; i += kThreads) shared.ones.data[i] = from_float<T>(1.0f);
  fence_loads();
  wait_for_kernel_before();
  __syncthreads();

  const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32;
  if (group < kWeighers) {
    take_registers<152>();
    constexpr float kRescale = power_of_2(kGradientShift<T> - kProbabilityShift<T>);
    unsigned items = 0, parts = 0, pieces = 0;
    each_part([&](const Part& part) {
      int lane = this_lane();
      landmarks(parts).wait_there();
      const unsigned at = landmarks(parts).at();
      const auto& own = shared.landmarks[at];
      permuted.arrive(), permuted.wait(0);  // nobody is at the head before this one any more
      if (threadIdx.x < 2) shared.head.gradients[threadIdx.x] = head_rows<T>(threadIdx.x ? of_keys.dv : of_keys.dk, part.bh / x.H, part.bh % x.H, part.keys.start);
      if (threadIdx.x == 0) shared.head.keys = part.keys.length, shared.head.last = part.last;
      for (int row = 4 * group + warp; row < 2 * kLandmarks; row += 4 * kWeighers) {  // see column_of_pair
        const auto pair = [&](const auto& units, int i) { return (row % 2 ? units.v : units.k).in(window).chunk(row / 2, i / 4) + 4 * (i % 4); };
        store_shared(pair(shared.permuted, lane), load_shared_int(pair(own, column_of_pair(lane) / 2)));
      }
      fence_loads();
      permuted.arrive(), permuted.wait(1);
      const unsigned before = items - part.first;  // what comes before tile 0 of the head
      items += part.last - part.first;
#pragma unroll 1
      for (int tile = part.first + (before + part.first + group) % kWeighers; tile < load_shared_int(window.of(shared.head.last)); tile += kWeighers) {
        const unsigned i = before + tile;
        lane = this_lane();  // not kept: registers
        stage(i).wait_there();
        fence_loads();
        const auto& rows = shared.stages[stage(i).at()];
        const auto& to = shared.weights[group];
        const GroupRows<T, kDP> k{rows.k.in(window)}, v{rows.v.in(window)};
        float s[kTiles][4], gradient[kTiles][4];
        product<C>(s, k, own.k.in(window), lane);
        product<C>(gradient, v, own.v.in(window), lane);
        const auto number = [&](const float* of_landmarks, int n) { return load_shared2(window.of(of_landmarks[8 * n + 2 * (lane & 3)])); };
        const auto address_of = [&](const auto& tile) { return tile.in(window).from_row(16 * warp).chunk(lane & 15, lane >> 4); };
        weights(i).wait_free();
        wait_products<C, 1>(s);
        const float scale = of_keys.scale * kLogit<T>;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const float2 lse = number(shared.lse[at], n);
          // A landmark that attended to nothing gives nothing; absent landmarks are zeros, and so is all that they give.
          const auto offset = [](float l) { return l == -kInfinity ? -kInfinity : fmaf(l, -kLogit<T>, kProbabilityShift<T>); };
          const float offsets[2] = {offset(lse.x), offset(lse.y)};
#pragma unroll
          for (int j = 0; j < 4; ++j) s[n][j] = fmaf(s[n][j], scale, offsets[j & 1]);
        }
        const int present = load_shared_int(window.of(shared.head.keys)) - tile * kKeyBlock;
        if (present < kKeyBlock)
#pragma unroll
          for (int j = 0; j < 2; ++j)
            if (16 * warp + lane / 4 + 8 * j >= present) mask_row(s, j);
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int j = 0; j < 4; ++j) s[n][j] = exponential<T>(s[n][j]);
        Weights<T, kTiles> probabilities(s);
        store_weights(address_of(to.probabilities), probabilities);
        float dk[kDP / 8][4], dv[kDP / 8][4];
        clear(dv);
        add_weighted_rows<C>(dv, probabilities, shared.permuted.v.in(window), lane);
        wait_products<C, 1>(gradient);
        Weights<T, kTiles> dlogits;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const float2 delta = number(shared.delta[at], n);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const auto dlogit = [&](int c, float delta) { return s[n][2 * j + c] * kRescale * (gradient[n][2 * j + c] - delta); };
            dlogits.packed[n][j] = pack<T>(dlogit(0, delta.x), dlogit(1, delta.y));
            asm volatile("" : "+r"(dlogits.packed[n][j]));  // one after the other: registers
          }
        }
        store_weights(address_of(to.dlogits), dlogits);
        fence_loads();  // these, too, are for wgmma
        weights(i).there().arrive();
        clear(dk);
        add_weighted_rows<C>(dk, dlogits, shared.permuted.k.in(window), lane);
        wait_products<C, 0>(dv, dk);
        if (lane == 0) stage(i).done().arrive();
        if (!wanted) continue;
#pragma unroll
        for (int d = 0; d < kDP / 8; ++d)
#pragma unroll
          for (int j = 0; j < 4; ++j) dk[d][j] *= of_keys.scale * power_of_2(-kGradientShift<T>), dv[d][j] *= power_of_2(-kProbabilityShift<T>);
        if (routed) {
          using Products = RoutedProducts<T>;
          Products of_dk, of_dv;
          const std::uint32_t its_keys[2] = {Products::element_of(16 * warp + lane / 4), Products::element_of(16 * warp + lane / 4 + 8)};
          for (bool more = true; more; ++pieces) {
            const auto at = piece(group, pieces);
            at.wait_there();
            const auto& from = shared.pieces[group][at.at()];
            // Rows of this warp's keys, from an even one on, 16 at a time, of the piece.
            const auto rows_before = [&, key = load_shared_short(window.of(from.keys[lane]))](int first) {
              return __popc(__ballot_sync(kAllLanes, key < int(Products::element_of(first) & 0xffff)));
            };
            const int begin = rows_before(16 * warp), end = rows_before(16 * warp + 16), even = begin & ~1;
            if (begin < end)
#pragma unroll 1
              for (int e = end - even > 16 ? 0 : min(even, 16); e < end; e += 16) {
                std::uint32_t mask[4];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                  const std::uint32_t two = load_shared_int(window.of(from.keys[e + 8 * j + 2 * (lane % 4)]));
                  mask[2 * j] = Products::same(two, its_keys[0]), mask[2 * j + 1] = Products::same(two, its_keys[1]);
                }
                const auto add = [&](Products& products, float (&gradient)[kDP / 8][4], int tensor) {
                  const std::uint32_t factors = window.of(from.factors[tensor][e + 2 * (lane % 4)]);
                  const float2 factor[2] = {load_shared2(factors), load_shared2(factors + 8 * sizeof(float))};
                  products.add(gradient, from.rows[tensor].in(window).chunk(e + lane % 16, lane / 16), mask, factor);
                };
                add(of_dk, dk, 0), add(of_dv, dv, 1);
              }
            more = load_shared_int(window.of(from.left)) > kPiece;
            at.done().arrive();
          }
          of_dk.finish(dk), of_dv.finish(dv);
        }
        const int key0 = tile * kKeyBlock + 16 * warp + lane / 4, keys = load_shared_int(window.of(shared.head.keys));
        const auto store = [&](const float (&gradient)[kDP / 8][4], int tensor, std::int64_t pitch) {
          T* const to = shared.head.gradients[tensor];
#pragma unroll
          for (int j = 0; j < 2; ++j)
            if (const int key = key0 + 8 * j; key < keys)
#pragma unroll
              for (int c = lane % 4; c < kDP / 8; c += 4)
                if (c * kChunk<T> < x.D) {
                  std::uint32_t two[4];
#pragma unroll
                  for (int n = 0; n < 4; ++n) two[n] = pack<T>(gradient[c / 4 * 4 + n][2 * j], gradient[c / 4 * 4 + n][2 * j + 1]);
                  *reinterpret_cast<uint4*>(row_behind(to + c * kChunk<T>, pitch * sizeof(T), key)) = {two[0], two[1], two[2], two[3]};
                }
        };
        store(dk, 0, of_keys.dk.row), store(dv, 1, of_keys.dv.row);
      }
      landmarks(parts++).done().arrive();
    });
  } else if (group == kWeighers) {
    take_registers<96>();
    const Matrix<kDP> ones(window.of(shared.ones), false);
    const int lane = this_lane();
    unsigned i = 0;
    each_part([&](const Part& part) {
      float dz[kDP / 8][4], kappa[kDP / 8][4], rounded[1][4];
      clear(dz), clear(kappa), clear(rounded);
#pragma unroll 1
      for (int tile = part.first; tile < part.last; ++tile, ++i) {
        stage(i).wait_there();
        weights(i).wait_there();
        fence_loads();
        const auto& from = shared.weights[weights(i).at()];
        const Matrix<kDP> rows(window.of(shared.stages[stage(i).at()].k), true), dlogits(window.of(from.dlogits), true), probabilities(window.of(from.probabilities), true);
        begin_products(dz, kappa, rounded);
#pragma unroll
        for (int k = 0; k < kKeyBlock / 16; ++k) {
          constexpr int kStep = 16 * kDP * sizeof(T);
          wgmma_transposed<T>(dz, dlogits.at(k * kStep), rows.at(k * kStep));
          wgmma_transposed<T>(kappa, probabilities.at(k * kStep), rows.at(k * kStep));
          wgmma_sum<T>(rounded, dlogits.at(k * kStep), ones.at(0));
        }
        commit_products();
        wait_products<C, 0>(dz, kappa, rounded);
        if (lane == 0) weights(i).done().arrive(), stage(i).done().arrive();
      }
      const RowGradientParams& to = p.landmarks;
      const std::int64_t row0 = std::int64_t(opaque(blockIdx.x) + part.bh) * x.M;
      const auto store = [&](const float (&sum)[kDP / 8][4], int which, float factor) {
        const float both[2] = {factor, factor};
        store_partial_rows<C>(sum, both, x.D, lane, [&](int i) { return 16 * warp + i < x.M ? to.partial + (2 * (row0 + 16 * warp + i) + which) * x.D : nullptr; });
      };
      store(dz, 0, of_keys.scale * power_of_2(-kGradientShift<T>)), store(kappa, 1, of_keys.scale * power_of_2(-kProbabilityShift<T>));
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (const int m = 16 * warp + lane / 4 + 8 * j; lane % 4 == 0 && m < x.M) {
          float* its = to.partial_sums + 3 * (row0 + m);
          its[0] = its[1] = rounded[0][2 * j] * power_of_2(-kGradientShift<T>), its[2] = 1.0f;
        }
    });
  } else if (group == kWeighers + 1) {
    keep_registers<48>();
    if (!routed || !wanted) return;
    // Each warp brings rows of keys or of values for one weigher. Which ones is asked for some pieces ahead.
    const int tensor = warp / 2, weigher = warp % 2, lane = this_lane();
    Part part = part_of(first_tile / tiles);
    int items = 0, tile = part.first + weigher, known = -32;
    KeyRange ranges, range;  // of 32 tiles from `known` on, one for each lane; of the tile at hand, what is left of it
    const auto next_range = [&] {
      while (tile >= part.last && (part.bh + 1) * tiles < last_tile) {
        items += part.last - part.first;
        part = part_of(part.bh + 1);
        tile = part.first + (items + weigher) % 2;
      }
      range = {0, -1};
      if (tile >= part.last) return;
      const int its = part.bh * tiles + tile;
      if (its >= known + 32) {
        known = its, ranges = {0, 0};
        if (known + lane < last_tile) ranges = of_keys.groups.key_ranges[known + lane];
      }
      range = {__shfl_sync(kAllLanes, ranges.first, its - known), __shfl_sync(kAllLanes, ranges.last, its - known)};
    };
    const auto ask = [&](unsigned i) {
      auto& to = shared.asked[warp][i % kAsked];
      const int left = range.last - range.first, first_row = part.bh * max_tiles(x, of_keys.groups.segment_rows) * x.K;
      if (lane == 0) to.first_row = first_row, to.left = left;
      if (lane < left)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(window.of(to.entries[lane])), "l"(of_keys.groups.key_entries + unsigned(first_row) + range.first + lane) : "memory");
      commit_loads();
      range.first += kPiece;
      if (left <= kPiece) tile += kWeighers, next_range();
    };
    next_range();
    for (int i = 0; i < kAsked - 1; ++i) ask(i);
#pragma unroll 1
    for (unsigned i = 0;; ++i) {
      wait_loads<kAsked - 2>();
      __syncwarp();
      const auto& its = shared.asked[warp][i % kAsked];
      const int left = load_shared_int(window.of(its.left)), first_row = load_shared_int(window.of(its.first_row));
      if (left < 0) break;
      const auto at = piece(weigher, i);
      at.wait_free();
      auto& to = shared.pieces[weigher][at.at()];
      const RoutedRows& from = tensor ? of_keys.routed_dv : of_keys.routed_dk;
      const int c = lane % 8;
      const std::uint32_t target = to.rows[tensor].in(window).chunk(lane / 8, c), numbers = window.of(its.entries[lane / 8].row);
      const Fixed* const source = static_cast<const Fixed*>(from.numbers) + c * kChunk<Fixed>;
#pragma unroll
      for (int e = 0; e < kPiece; e += 4)
        if (c * kChunk<Fixed> < routed_pitch(x.D) && e + lane / 8 < left)
          asm volatile("{ .reg .u64 from; mad.wide.u32 from, %1, %2, %3; cp.async.cg.shared.global [%0], [from], 16; }" ::"r"((target ^ 16 * (e % 8)) + e * kDP * int(sizeof(Fixed))),
                       "r"(first_row + load_shared_int(numbers + e * int(sizeof(KeyEntry)))), "r"(routed_pitch(x.D) * int(sizeof(Fixed))), "l"(source)
                       : "memory");
      const KeyEntry own = lane < left ? its.entries[lane] : KeyEntry{-1 - first_row, kKeyBlock};
      load_number(window.of(to.factors[tensor][lane]), from.factors, first_row + own.row);
      if (tensor == 0) to.keys[lane] = from_float<T>(own.key);
      if (tensor == 0 && lane == 0) to.left = left;
      at.there().arrive_loaded();
      __syncwarp();
      if (lane == 0) at.there().arrive();
      ask(i + kAsked - 1);
    }
    wait_loads<0>();
  } else {
    keep_registers<32>();
    if (warp < 2) {
      const int lane = this_lane();
      const auto bring = [&](const auto& tile, int which, int row0, int present) {
        const auto& from = shared.rows[warp][which];
        load_rows_by_warp<kKeyBlock, T, kDP>([=](int i) { return i < present ? row0 + i : -1; }, present >= kKeyBlock, x.D,
                                             Copy<T, kDP>(tile.in(window), from.row0, from.pitch));
      };
      unsigned items = 0, parts = 0;
      each_part([&](const Part& part) {
        if (lane == 0) {
          const int b = part.bh / x.H, h = part.bh % x.H;
          const auto rows = [&](int which, const Rows& from, std::int64_t start) { shared.rows[warp][which] = {head_rows<T>(from, b, h, start), from.row}; };
          rows(0, warp ? of_keys.row_dout : of_keys.row_q, 0), rows(1, warp ? of_keys.unit_v : of_keys.unit_k, part.keys.start);
        }
        __syncwarp();
        landmarks(parts).wait_free();
        const float* const numbers = (warp ? of_keys.delta : of_keys.lse) + std::int64_t(part.bh) * x.M;
        for (int i = lane; i < kLandmarks; i += 32) load_number(window.of((warp ? shared.delta : shared.lse)[landmarks(parts).at()]) + 4 * i, numbers, i < x.M ? i : -1);
        const auto& to = shared.landmarks[landmarks(parts).at()];
        bring(warp ? to.v : to.k, 0, 0, x.M);
        landmarks(parts++).there().arrive_loaded();
#pragma unroll 1
        for (int tile = part.first; tile < part.last; ++tile, ++items) {
          stage(items).wait_free();
          const auto& to = shared.stages[stage(items).at()];
          bring(warp ? to.v : to.k, 1, tile * kKeyBlock, part.keys.length - tile * kKeyBlock);
          stage(items).there().arrive_loaded();
        }
        __syncwarp();
      });
      wait_loads<0>();
    }
  }
#else
  __trap();
#endif
}

}  // namespace

bool fits_key_specialists(const Problem& x) {
  return has_warpgroups(x.dtype, x.D) && x.D <= kDP && x.D % kCudaHeadDimStep == 0 && x.M <= kLandmarks && x.H == x.Hkv && x.s > 0;
}

cudaError_t launch_key_specialists(const KeyGradientParams& p, cudaStream_t stream) {
  const Problem& x = p.keys.problem;
  if (!fits_key_specialists(x)) return cudaErrorInvalidValue;
  return dispatch_16_bits(x.dtype, [&](auto element) {
    using T = decltype(element);
    return launch(p.early, key_specialists_kernel<T>, ceil_div(x.B * x.H * ceil_div(x.keys.max_length, kKeyBlock), p.landmarks.share), kThreads, sizeof(Shared<T>), stream, p);
  });
}

}  // namespace mita
