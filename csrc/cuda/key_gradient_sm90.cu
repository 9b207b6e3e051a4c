// Gradients of the softmax of few landmarks over all keys, in one pass over the keys (else two: row_gradient.cu, unit_gradient.cu), for sm_90a:
// 16-bit elements of up to 64 columns, up to 64 landmarks, as many key heads as query heads. By specialists; a block takes a part of one head's keys:
//   two warps bring keys and values, 64 at a time, into a ring of stages;
//   one warpgroup sums what queries left for these keys as keys of their experts, in the order of a list (key_lists.cu): two warps for every other 64 of them;
//   two warpgroups weigh, by turns, 64 keys against all landmarks: P and dS, and with them dk and dv. Rounded, P and dS go to shared memory;
//   one warpgroup sums over the keys: dS^T k and P^T k for the landmarks' own gradients.
// Delta is that of rounded compressed values here. What dS of a landmark sums to beyond its due is taken back from the landmark's gradient in the end
// (finish_kernel of row_gradient.cu), but not from dk: where keys receive nothing from experts that shows in fp16, and two passes it is.
#include "launch.h"
#include "routed.cuh"
#include "specialists.cuh"

namespace mita {
namespace {

constexpr int kDP = 64, kLandmarks = 64;
constexpr int kStages = 3, kWeighers = 2, kSums = kWeighers, kPiece = 32;  // those who weigh and those who sum the same keys use the same place
constexpr int kPitch = sizeof(float) * (kDP + 8);  // bytes of the rows of sums, free of bank conflicts for accumulators
constexpr int kThreads = 128 * (kWeighers + 3);

template <class T> struct Shared {
  UnitStage<T, kDP, kLandmarks> landmarks;  // and the gradients of their compressed values
  UnitStage<T, kDP, kKeyBlock> stages[kStages];
  struct {
    TileStorage<T, kLandmarks, kKeyBlock> probabilities, dlogits;
  } weights[kWeighers];
  TileStorage<T, kDP, kKeyBlock> gradients[kWeighers];  // on their way out
  TileStorage<T, kDP, 8> ones;
  struct {
    float gradient[2][kKeyBlock + 1][kPitch / sizeof(float)];  // of keys and of values; the last row takes what is no key's
    std::uint32_t rows[2];                                     // bits: of those that there are
  } sums[kSums];
  alignas(16) Fixed routed[4][2][kPiece][kDP];  // of routed sums, those of a warp
  float factors[4][2][kPiece];
  float lse[kLandmarks], delta[kLandmarks];
  struct {
    struct {
      T* row0;
      std::int64_t pitch;
    } rows[4];  // of landmarks, gradients of compressed values, keys, values
    RoutedRows routed[2];
    const KeyRange* ranges;
    const KeyEntry* entries;
  } head;
  std::uint64_t of_landmarks[1][2], of_stages[kStages][2], of_weights[kWeighers][2], of_sums[kSums][2];
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

  // Tiles of 64 keys: `count` of them from the first one on.
  const int bh = blockIdx.x / of_keys.splits, part = blockIdx.x % of_keys.splits, b = bh / x.H, h = bh - b * x.H;
  const Span keys = span(x.keys, b);
  const int tiles = ceil_div(keys.length, kKeyBlock), per_part = ceil_div(tiles, of_keys.splits), first = part * per_part, count = max(0, min(per_part, tiles - first));
  const bool routed = of_keys.groups.key_ranges != nullptr, wanted = of_keys.dk.data != nullptr;

  const auto landmarks = [&] { return Ring<1>{window.of(shared.of_landmarks), 0}; };
  const auto stage = [&](unsigned i) { return Ring<kStages>{window.of(shared.of_stages), i}; };
  const auto weights = [&](unsigned i) { return Ring<kWeighers>{window.of(shared.of_weights), i}; };
  const auto sums = [&](unsigned i) { return Ring<kSums>{window.of(shared.of_sums), i}; };
  if (threadIdx.x == 0) {
    landmarks().init(2 * 32, 1), stage(0).init(2 * 32, 4 + 4), weights(0).init(128, 4), sums(0).init(2 * 32, 128);
    fence_barriers();
    const auto rows = [&](int i, const Rows& from, std::int64_t start) { shared.head.rows[i] = {head_rows<T>(from, b, h, start), from.row}; };
    rows(0, of_keys.row_q, 0), rows(1, of_keys.row_dout, 0), rows(2, of_keys.unit_k, keys.start), rows(3, of_keys.unit_v, keys.start);
    const std::int64_t routed_row0 = std::int64_t(bh) * max_tiles(x, of_keys.groups.segment_rows) * x.K;
    const auto routed_rows = [&](int i, const RoutedRows& from) { shared.head.routed[i] = {static_cast<Fixed*>(from.numbers) + routed_row0 * routed_pitch(x.D), from.factors + routed_row0}; };
    routed_rows(0, of_keys.routed_dk), routed_rows(1, of_keys.routed_dv);
    shared.head.ranges = of_keys.groups.key_ranges + std::int64_t(bh) * ceil_div(x.keys.max_length, kKeyBlock), shared.head.entries = of_keys.groups.key_entries + routed_row0;
  }
  for (int i = threadIdx.x; i < 8 * kDP; i += kThreads) shared.ones.data[i] = from_float<T>(1.0f);
  fence_loads();
  __syncthreads();

  const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  if (group < kWeighers) {
    take_registers<144>();
    constexpr float kRescale = power_of_2(kGradientShift<T> - kProbabilityShift<T>);
    const float one[2] = {1.0f, 1.0f};
    landmarks().wait_there();
    for (int i = group; i < count; i += kWeighers) {
      stage(i).wait_there();
      fence_loads();
      const auto& rows = shared.stages[stage(i).at()];
      const auto& to = shared.weights[group];
      const GroupRows<T, kDP> k{rows.k.in(window)}, v{rows.v.in(window)};
      float s[kTiles][4], gradient[kTiles][4];
      product<C>(s, k, shared.landmarks.k.in(window), lane);
      product<C>(gradient, v, shared.landmarks.v.in(window), lane);
      const auto number = [&](const float* of_landmarks, int n) { return load_shared2(window.of(of_landmarks[8 * n + 2 * (lane & 3)])); };
      const auto address_of = [&](const auto& tile) { return tile.in(window).from_row(16 * warp).chunk(lane & 15, lane >> 4); };
      weights(i).wait_free();
      wait_products<C, 1>(s);
      const float scale = of_keys.scale * kLogit<T>;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const float2 lse = number(shared.lse, n);
        // A landmark that attended to nothing gives nothing; absent landmarks are zeros, and so is all that they give.
        const auto offset = [](float l) { return l == -kInfinity ? -kInfinity : fmaf(l, -kLogit<T>, kProbabilityShift<T>); };
        const float offsets[2] = {offset(lse.x), offset(lse.y)};
#pragma unroll
        for (int j = 0; j < 4; ++j) s[n][j] = fmaf(s[n][j], scale, offsets[j & 1]);
      }
      const int present = keys.length - (first + i) * kKeyBlock - 16 * warp - lane / 4;
      if (first + i == tiles - 1)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          if (8 * j >= present) mask_row(s, j);
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) s[n][j] = exponential<T>(s[n][j]);
      Weights<T, kTiles> probabilities(s);
      store_weights(address_of(to.probabilities), probabilities);
      float dk[kDP / 8][4], dv[kDP / 8][4];
      clear(dv);
      add_weighted_rows<C>(dv, probabilities, shared.landmarks.v.in(window), lane);
      wait_products<C, 1>(gradient);
      Weights<T, kTiles> dlogits;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const float2 delta = number(shared.delta, n);
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
      add_weighted_rows<C>(dk, dlogits, shared.landmarks.k.in(window), lane);
      wait_products<C, 0>(dv, dk);
      if (lane == 0) stage(i).done().arrive();
      if (!wanted) continue;
#pragma unroll
      for (int d = 0; d < kDP / 8; ++d)
#pragma unroll
        for (int j = 0; j < 4; ++j) dk[d][j] *= of_keys.scale * power_of_2(-kGradientShift<T>), dv[d][j] *= power_of_2(-kProbabilityShift<T>);
      if (routed) {
        sums(i).wait_there();
        const auto& more = shared.sums[sums(i).at()];
        const int of_warp = load_shared_int(window.of(more.rows[warp / 2])) >> (16 * warp % 32) & 0xffff;
        if (of_warp != 0)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int row = lane / 4 + 8 * j;
            if (of_warp >> row & 1)
#pragma unroll
              for (int d = 0; d < kDP / 8; ++d) {
                const auto add = [&](float (&sum)[4], int tensor) {
                  const float2 two = load_shared2(window.of(more.gradient[tensor][16 * warp + row][8 * d + 2 * (lane & 3)]));
                  sum[2 * j] += two.x, sum[2 * j + 1] += two.y;
                };
                add(dk[d], 0), add(dv[d], 1);
              }
          }
        sums(i).done().arrive();
      }
      const int key0 = (first + i) * kKeyBlock + 16 * warp;
      const auto index = [&](int row) { return key0 + row < keys.length ? key0 + row : -1; };
      const auto out = [&](const auto& gradients, const Rows& rows) {
        store_rows<C>(shared.gradients[group].in(window).from_row(16 * warp), gradients, one, x.D, lane, head_rows<T>(rows, b, h, keys.start), rows.row, index);
      };
      out(dk, of_keys.dk), out(dv, of_keys.dv);
    }
  } else if (group == kWeighers) {
    take_registers<96>();
    float dz[kDP / 8][4], kappa[kDP / 8][4], rounded[1][4];
    clear(dz), clear(kappa), clear(rounded);
    const Matrix<kDP> ones(window.of(shared.ones), false);
    for (int i = 0; i < count; ++i) {
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
    const std::int64_t row0 = std::int64_t(blockIdx.x) * x.M;
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
  } else if (group == kWeighers + 1) {
    keep_registers<64>();
    if (!routed) return;
    // Each warp sums gradients of keys or of values. A list is taken in pieces of 32 sums: when those of one are added, those of the next one are on
    // their way, and the entries of the one after that.
    struct Piece {
      KeyEntry mine;  // of this lane
      int left;       // sums from here on for the same keys
    };
    const int tensor = warp / 2, turn = warp % 2;
    const auto range_of = [&](int i) {
      KeyRange range{0, 0};
      if (i < count) range = shared.head.ranges[first + i];
      return range;
    };
    int asked = turn;
    KeyRange range = range_of(asked);
    const auto ask = [&] {
      Piece piece{{0, kKeyBlock}, range.last - range.first};
      if (lane < piece.left) piece.mine = shared.head.entries[range.first + lane];
      range.first += kPiece;
      if (piece.left <= kPiece) range = range_of(asked += kSums);
      return piece;
    };
    constexpr int kFew = 4, kRow = sizeof(shared.routed[0][0][0]);
    unsigned pieces = 0;
    const auto fetch = [&](const Piece& piece) {
      const int column = kChunk<T> * (lane % 8);
      const Fixed* const from = static_cast<const Fixed*>(shared.head.routed[tensor].numbers) + column;
      const std::uint32_t to = window.of(shared.routed[warp][pieces % 2][lane / 8][column]);
#pragma unroll
      for (int e = 0; e < kPiece; e += 4) {
        const int row = __shfl_sync(kAllLanes, piece.mine.row, e + lane / 8);
        if (column < routed_pitch(x.D) && e + lane / 8 < piece.left)
          asm volatile("{ .reg .u64 from; mad.wide.u32 from, %1, %2, %3; cp.async.cg.shared.global [%0], [from], 16; }" ::"r"(to + e * kRow), "r"(row),
                       "r"(routed_pitch(x.D) * int(sizeof(Fixed))), "l"(from)
                       : "memory");
      }
      load_number(window.of(shared.factors[warp][pieces % 2][lane]), shared.head.routed[tensor].factors, lane < piece.left ? piece.mine.row : -1);
      commit_loads();
      ++pieces;
    };
    Piece coming = ask();
    fetch(coming);
    Piece next = ask();
#pragma unroll 1
    for (int i = turn; i < count; i += kSums) {
      sums(i).wait_free();
      auto& to = shared.sums[sums(i).at()];
      const std::uint32_t own = window.of(to.gradient[tensor][0][column_of_pair(lane)]);
      std::uint32_t rows[2] = {0, 0};
      int last = -1;
      float2 sum = {0.0f, 0.0f};  // of the last key
#pragma unroll 1
      for (bool more = true; more;) {
        const Piece piece = coming;
        const std::uint32_t from = window.of(shared.routed[warp][(pieces - 1) % 2][0][2 * lane]), factors = window.of(shared.factors[warp][(pieces - 1) % 2][0]);
        coming = next;
        fetch(coming);
        next = ask();
        wait_loads<1>();
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 2; ++j) rows[j] |= __reduce_or_sync(kAllLanes, piece.mine.key / 32 == j ? 1u << piece.mine.key % 32 : 0);
        // The first and the last sum of a key are marked. One that goes on in the next piece is stored twice.
        const int before = __shfl_up_sync(kAllLanes, piece.mine.key, 1), after = __shfl_down_sync(kAllLanes, piece.mine.key, 1);
        const bool starts = piece.mine.key != (lane == 0 ? last : before), ends = lane == 31 || piece.mine.key != after;
        constexpr unsigned kStarts = 1u << 31, kEnds = 1u << 30;  // above a quarter of the key's place, which a shift by two leaves
        const unsigned mark = piece.mine.key * (kPitch / 4) | (starts ? kStarts : 0) | (ends ? kEnds : 0);
        last = __shfl_sync(kAllLanes, piece.mine.key, 31);
#pragma unroll 1
        for (int e = 0; e < min(kPiece, piece.left); e += kFew) {
          std::uint32_t marks[kFew], values[kFew];
          float factor[kFew];
#pragma unroll
          for (int j = 0; j < kFew; ++j)
            marks[j] = __shfl_sync(kAllLanes, mark, e + j), values[j] = load_shared_int(from + (e + j) * kRow), factor[j] = __int_as_float(load_shared_int(factors + 4 * (e + j)));
#pragma unroll
          for (int j = 0; j < kFew; ++j) {
            const float2 two = unpack<Fixed>(values[j]);
            if (marks[j] & kStarts) sum = {0.0f, 0.0f};
            sum = {fmaf(two.x, factor[j], sum.x), fmaf(two.y, factor[j], sum.y)};
            asm volatile("{ .reg .pred ends; setp.ne.u32 ends, %0, 0; @ends st.shared.v2.f32 [%1], {%2,%3}; }" ::"r"(marks[j] & kEnds), "r"(own + (marks[j] << 2)), "f"(sum.x), "f"(sum.y)
                         : "memory");
          }
        }
        more = piece.left > kPiece;
        __syncwarp();  // other sums take the place of these
      }
      if (tensor == 0 && lane == 0) store_shared(window.of(to.rows[0]), rows[0]), store_shared(window.of(to.rows[1]), rows[1]);
      sums(i).there().arrive();
    }
    wait_loads<0>();
  } else {
    keep_registers<32>();
    if (warp < 2) {
      // `present` rows of a tensor of `head.rows`, from `row0` on.
      const auto bring = [&](const auto& tile, int tensor, int row0, int present) {
        const auto& from = shared.head.rows[tensor];
        load_rows_by_warp<kKeyBlock, T, kDP>([=](int i) { return i < present ? row0 + i : -1; }, present >= kKeyBlock, x.D,
                                             Copy<T, kDP>(tile.in(window), from.row0, from.pitch));
      };
      const float* const numbers = (warp ? of_keys.delta : of_keys.lse) + std::int64_t(bh) * x.M;
      for (int i = lane; i < kLandmarks; i += 32) load_number(window.of(warp ? shared.delta : shared.lse) + 4 * i, numbers, i < x.M ? i : -1);
#pragma unroll 1
      for (int i = -1; i < count; ++i) {
        const bool of_landmarks = i < 0;
        if (!of_landmarks) stage(i).wait_free();
        const auto& to = of_landmarks ? shared.landmarks : shared.stages[stage(i).at()];
        const int row0 = of_landmarks ? 0 : (first + i) * kKeyBlock;
        bring(warp ? to.v : to.k, (of_landmarks ? 0 : 2) + warp, row0, (of_landmarks ? x.M : keys.length) - row0);
        (of_landmarks ? landmarks().there() : stage(i).there()).arrive_loaded();
      }
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
  return dispatch_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) {
      return launch(key_specialists_kernel<T>, static_cast<unsigned>(x.B) * x.H * p.keys.splits, kThreads, sizeof(Shared<T>), stream, p);
    } else {
      return cudaErrorInvalidValue;
    }
  });
}

}  // namespace mita
