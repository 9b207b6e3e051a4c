// The CPU backend: every op of the package, forward and backward, for float64, float32, bfloat16 and float16.
//
// Matrix products go through ATen on 2-D slices, one (batch, head) and one block of rows at a time, so that no score
// matrix of all heads ever exists; those of an expert with few queries are loops. Low precision is widened to float32
// slice by slice; scores are never rounded before a decision, and results are rounded once, when they are stored. T is
// the type that is computed in.
//
// Forward tasks are (batch, head, block of rows); backward tasks are (batch, kv head), so that each dkey and dvalue has
// one owner and the order of every sum is fixed. A task works on the rows of its sequence as if it were alone.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/alignment.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../checks.h"

namespace {

using at::IntArrayRef;
using at::Tensor;
using mita::Lengths;
using mita::Shape;
using OptionalInt = std::optional<int64_t>;
using OptionalTensor = std::optional<Tensor>;

template <class scalar_t>
using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

constexpr double kInf = std::numeric_limits<double>::infinity();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Inside, ATen computes what it is asked: no graph, no autocast. A worker does not inherit the dispatch state of its
// caller.
struct PlainDispatch {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard without_autocast{c10::autocast_dispatch_keyset};
};

// The first exponential of a process, where two threads ask for it at once, is sometimes of low accuracy: 4e-10 in
// float64, in one process of a hundred (torch 2.14 with MKL; in none of 2600 where one thread made it first). So this
// thread makes it.
void prepare_exponentials() {
  [[maybe_unused]] static const bool done = [] {
    const PlainDispatch plain;
    for (const auto dtype : {at::kFloat, at::kDouble}) at::full({16}, 0.5, dtype).exp_().log_();
    return true;
  }();
}

// Runs f(0) .. f(n - 1) on all threads, each call on one thread. At least two iterations are asked for, because a loop
// of one would run outside of a parallel region, where ATen may split a product over threads: then the last bits of a
// score, and so a selection, could depend on how many heads came together.
template <class F>
void parallel(int64_t n, const F& f) {
  prepare_exponentials();
  at::parallel_for(0, std::max<int64_t>(n, 2), 1, [&](int64_t begin, int64_t end) {
    const PlainDispatch plain;
    for (int64_t i = begin; i < std::min(end, n); ++i) f(i);
  });
}

// As above, where no decision is taken: a single task may use the threads of ATen inside.
template <class F>
void parallel_backward(int64_t n, const F& f) {
  prepare_exponentials();
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    const PlainDispatch plain;
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// t[b, h], as one view: calls into ATen are what small heads wait for.
Tensor head(const Tensor& t, int64_t b, int64_t h) {
  return t.as_strided(t.sizes().slice(2), t.strides().slice(2), t.storage_offset() + b * t.stride(0) + h * t.stride(1));
}

at::TensorOptions acc_options(const Tensor& t) { return t.options().dtype(mita::accumulate_type(t.scalar_type())); }

// A copy, unless the slice is as that would be: products then see the same strides and alignment whatever the layout, and give the
// same bits.
Tensor widen(const Tensor& slice) {
  const bool is_as_a_copy = slice.scalar_type() == mita::accumulate_type(slice.scalar_type()) && slice.is_contiguous() &&
                            reinterpret_cast<std::uintptr_t>(slice.const_data_ptr()) % c10::gAlignment == 0;
  return is_as_a_copy ? slice : at::empty(slice.sizes(), acc_options(slice)).copy_(slice);
}

// Where no decision follows, without a copy if it is wide already; strides stay as they are.
Tensor to_acc(const Tensor& slice) { return slice.to(mita::accumulate_type(slice.scalar_type())); }

// ---- Sequences -------------------------------------------------------------------------------------------------------

// Which rows of a padded [B, heads, rows, D] or packed [total, heads, D] tensor belong to which sequence.
struct Sequences {
  bool packed = false, vary = false;
  std::vector<int64_t> start, length;

  Sequences(int64_t B, int64_t longest) : start(B, 0), length(B, longest) {}

  // `x` holds the rows, `seqlens` their lengths or prefix sums, if they vary. Here looking at them costs little.
  Sequences(const char* fn, const char* name, const OptionalTensor& seqlens, const char* x_name, const Tensor& x,
            int64_t B, int64_t longest)
      : Sequences(B, longest) {
    if (!seqlens) return;
    packed = mita::is_packed(x), vary = true;
    const std::string prefixed = std::string(packed ? "cu_" : "") + name;
    const int64_t rows = x.size(packed ? 0 : 2);
    const int32_t* number = seqlens->const_data_ptr<int32_t>();
    for (int64_t i = 0; i < seqlens->size(0); ++i)
      TORCH_CHECK_VALUE(number[i] >= 0 && number[i] <= rows, fn, ": ", prefixed,
                        " must be at least 0 and at most the tokens of ", x_name, " (", rows, "), got ", number[i]);
    for (int64_t b = 0; b < B; ++b) {
      length[b] = number[b];
      if (!packed) continue;
      start[b] = number[b], length[b] = number[b + 1] - start[b];
      TORCH_CHECK_VALUE(length[b] >= 0, fn, ": ", prefixed, " must not decrease, got ", number[b + 1], " after ",
                        number[b]);
      TORCH_CHECK_VALUE(length[b] <= longest, fn, ": ", prefixed, " must hold no sequence longer than max_seqlen_",
                        prefixed.back(), " (", longest, "), got ", length[b]);
    }
  }

  Tensor head(const Tensor& x, int64_t b, int64_t h) const {
    const int64_t of_row = x.stride(packed ? 0 : 2), of_batch = packed ? 0 : b * x.stride(0);
    return x.as_strided({length[b], x.size(-1)}, {of_row, x.stride(-1)},
                        x.storage_offset() + of_batch + h * x.stride(1) + start[b] * of_row);
  }

  // Memory for results, filled with what stays where there is no token.
  Tensor results(IntArrayRef sizes, const at::TensorOptions& options, double absent = 0) const {
    return vary ? at::full(sizes, absent, options) : at::empty(sizes, options);
  }
};

struct Problem : Shape {
  Sequences queries, keys;
};

// The problem of an op whose sequences all have N queries and L keys.
Problem even(const Shape& p) { return {p, {p.B, p.N}, {p.B, p.L}}; }

Problem problem_of(const char* fn, const Shape& p, const Tensor& query, const Tensor& key, const Lengths& lengths) {
  return {p,
          {fn, "seqlens_q", lengths.seqlens_q, "query", query, p.B, p.N},
          {fn, "seqlens_k", lengths.seqlens_k, "key", key, p.B, p.L}};
}

// ---- Rows and columns ------------------------------------------------------------------------------------------------

constexpr int64_t kAhead = 8, kLine = 64;  // rows that are asked for ahead, bytes of a cache line

std::vector<int64_t> ascending(int64_t n) {  // 0 .. n - 1
  std::vector<int64_t> result(n);
  std::iota(result.begin(), result.end(), 0);
  return result;
}

// rows[0 .. n) of a matrix whose last dimension has stride 1, widened, times a factor.
template <class scalar_t, class T>
void gather_rows(const Tensor& matrix, const int64_t* rows, int64_t n, T factor, T* to) {
  const int64_t D = matrix.size(1), stride = matrix.stride(0);
  const scalar_t* from = matrix.const_data_ptr<scalar_t>();
  for (int64_t i = 0; i < n; ++i, to += D) {
    const scalar_t* later = from + rows[std::min(i + kAhead, n - 1)] * stride;
    for (int64_t d = 0; d < D; d += kLine / sizeof(scalar_t)) __builtin_prefetch(later + d);
    const scalar_t* row = from + rows[i] * stride;
    if constexpr (std::is_same_v<scalar_t, T>) {
      if (factor == 1) {
        std::copy_n(row, D, to);
        continue;
      }
    }
    for (int64_t d = 0; d < D; ++d) to[d] = factor * static_cast<T>(row[d]);
  }
}

template <class scalar_t>
Tensor gather_rows(const Tensor& matrix, const int64_t* rows, int64_t n) {
  const Tensor result = at::empty({n, matrix.size(1)}, acc_options(matrix));
  gather_rows<scalar_t>(matrix, rows, n, acc_t<scalar_t>{1}, result.mutable_data_ptr<acc_t<scalar_t>>());
  return result;
}

template <class T>
void add_rows(const Tensor& matrix, const int64_t* rows, const Tensor& terms, T alpha = 1) {
  const int64_t n = terms.size(0), D = terms.size(1), stride = matrix.stride(0);
  const T* from = terms.const_data_ptr<T>();
  T* to = matrix.mutable_data_ptr<T>();
  for (int64_t i = 0; i < n; ++i, from += D)
    for (int64_t d = 0; d < D; ++d) to[rows[i] * stride + d] += alpha * from[d];
}

// Some rows of a matrix, widened if need be.
template <class scalar_t>
class WideRows {
  using T = acc_t<scalar_t>;
  std::vector<T> copies;
  std::vector<const T*> rows;

 public:
  const T* const* operator()(const Tensor& matrix, const int64_t* chosen, int64_t n) {
    const int64_t D = matrix.size(1), stride = matrix.stride(0);
    rows.resize(n);
    if constexpr (std::is_same_v<scalar_t, T>) {
      const T* from = matrix.const_data_ptr<T>();
      for (int64_t i = 0; i < n; ++i) rows[i] = from + chosen[i] * stride;
    } else {
      copies.resize(n * D);
      gather_rows<scalar_t>(matrix, chosen, n, T{1}, copies.data());
      for (int64_t i = 0; i < n; ++i) rows[i] = copies.data() + i * D;
    }
    return rows.data();
  }
};

// to[i] = factor x . rows[i], for n rows of D numbers; four at a time, so that x is loaded once.
template <class T>
void multiply(const T* __restrict x, const T* const* rows, int64_t n, int64_t D, T factor, T* __restrict to) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const T *__restrict A = rows[i], *__restrict B = rows[i + 1], *__restrict C = rows[i + 2], *__restrict E = rows[i + 3];
    T a = 0, b = 0, c = 0, e = 0;
#pragma omp simd reduction(+ : a, b, c, e)
    for (int64_t d = 0; d < D; ++d) a += x[d] * A[d], b += x[d] * B[d], c += x[d] * C[d], e += x[d] * E[d];
    to[i] = factor * a, to[i + 1] = factor * b, to[i + 2] = factor * c, to[i + 3] = factor * e;
  }
  for (; i < n; ++i) {
    const T* __restrict A = rows[i];
    T a = 0;
#pragma omp simd reduction(+ : a)
    for (int64_t d = 0; d < D; ++d) a += x[d] * A[d];
    to[i] = factor * a;
  }
}

// to += sum of weights[i] rows[i].
template <class T>
void add_products(const T* __restrict weights, const T* const* rows, int64_t n, int64_t D, T* __restrict to) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const T *__restrict A = rows[i], *__restrict B = rows[i + 1], *__restrict C = rows[i + 2], *__restrict E = rows[i + 3];
    const T a = weights[i], b = weights[i + 1], c = weights[i + 2], e = weights[i + 3];
    for (int64_t d = 0; d < D; ++d) to[d] += a * A[d] + b * B[d] + c * C[d] + e * E[d];
  }
  for (; i < n; ++i)
    for (int64_t d = 0; d < D; ++d) to[d] += weights[i] * rows[i][d];
}

// The units of one expert, seen from its queries: some rows of a [n, width] matrix, K columns from `column` on, of
// which the first `used` hold units and the rest are empty slots.
struct Block {
  const int64_t* rows;
  int64_t n, column, K, used;
};

template <class T>
Tensor get_block(const Tensor& matrix, const Block& b) {
  const int64_t width = matrix.size(1);
  Tensor result = at::empty({b.n, b.used}, matrix.options());
  const T* from = matrix.const_data_ptr<T>() + b.column;
  T* to = result.mutable_data_ptr<T>();
  for (int64_t i = 0; i < b.n; ++i) std::copy_n(from + b.rows[i] * width, b.used, to + i * b.used);
  return result;
}

template <class T>
void put_block(const Tensor& matrix, const Block& b, const Tensor& block, T empty) {
  const int64_t width = matrix.size(1);
  const T* from = block.const_data_ptr<T>();
  T* to = matrix.mutable_data_ptr<T>() + b.column;
  for (int64_t i = 0; i < b.n; ++i, from += b.used) {
    T* row = to + b.rows[i] * width;
    std::copy_n(from, b.used, row);
    std::fill(row + b.used, row + b.K, empty);
  }
}

// ---- Selection -------------------------------------------------------------------------------------------------------

template <class T>
struct Candidate {
  T score;
  int32_t index;
};

// The total order of every selection: larger score first, then lower index; NaN after all numbers; -0 equals +0.
template <class T>
bool before(const Candidate<T>& a, const Candidate<T>& b) {
  if (a.score > b.score) return true;
  if (a.score < b.score) return false;
  const bool a_nan = std::isnan(a.score), b_nan = std::isnan(b.score);
  return a_nan == b_nan ? a.index < b.index : b_nan;
}

// Whether one of x[0 .. n) may come before a candidate of score `worst`; a loop without branches, which vectorises.
template <class T>
bool any_may_pass(const T* x, int64_t n, T worst) {
  int pass = 0;
  for (int64_t j = 0; j < n; ++j) pass |= !(x[j] < worst);
  return pass != 0;
}

constexpr int64_t kScan = 16;  // scores that are looked at together before any is looked at alone

// highest[i] = the largest of f(x[i]), f(x[i + kScan]), ... of x[0 .. n), without branches; NaN is passed over.
template <class T, class F>
void scan_maxima(const T* __restrict x, int64_t n, T* __restrict highest, const F& f) {
  std::fill_n(highest, kScan, static_cast<T>(-kInf));
  const int64_t whole = n / kScan * kScan;
  for (int64_t j0 = 0; j0 < whole; j0 += kScan)
    for (int64_t j = 0; j < kScan; ++j) highest[j] = f(x[j0 + j]) > highest[j] ? f(x[j0 + j]) : highest[j];
  for (int64_t j = whole; j < n; ++j) highest[0] = f(x[j]) > highest[0] ? f(x[j]) : highest[0];
}

// f over kScan numbers, by halves: a chain would wait for each.
template <class T, class F>
T fold(T* lanes, const F& f) {
  for (int64_t n = kScan / 2; n > 0; n /= 2)
    for (int64_t j = 0; j < n; ++j) lanes[j] = f(lanes[j], lanes[j + n]);
  return lanes[0];
}

// The largest f(x[j]) of x[0 .. n); NaN is passed over.
template <class T, class F>
T largest_of(const T* x, int64_t n, const F& f) {
  T highest[kScan];
  scan_maxima<T>(x, n, highest, f);
  return fold(highest, [](T a, T b) { return a > b ? a : b; });
}

// f(0) + .. + f(n - 1) in kScan sums, which vectorise.
template <class T, class F>
T sum_over(int64_t n, const F& f) {
  T sums[kScan] = {};
  const int64_t whole = n / kScan * kScan;
  for (int64_t j0 = 0; j0 < whole; j0 += kScan)
    for (int64_t j = 0; j < kScan; ++j) sums[j] += f(j0 + j);
  for (int64_t j = whole; j < n; ++j) sums[j - whole] += f(j);
  return fold(sums, std::plus<T>());
}

template <class T>
T sum_of(const T* x, int64_t n) {
  return sum_over<T>(n, [x](int64_t j) { return x[j]; });
}

// A score by itself, the same wherever its rows lie. In a matrix product it has other last bits at the edges than inside, on some processors.
template <class T>
T dot(const T* a, const T* b, int64_t n) {
  return sum_over<T>(n, [a, b](int64_t j) { return a[j] * b[j]; });
}

// The largest finite magnitude in a contiguous tensor.
template <class T>
T magnitude_of(const Tensor& x) {
  const auto finite = [](T number) { return std::abs(number) <= std::numeric_limits<T>::max() ? std::abs(number) : T{0}; };
  return std::max(T{0}, largest_of(x.const_data_ptr<T>(), x.numel(), finite));
}

// So close to each other, scores of a product are compared by `dot`: four times what two orders of D additions differ by at most, of rows whose
// numbers are at most so large.
template <class T>
T closeness(int64_t D, T of_one, T of_other) {
  const T close = 4 * std::numeric_limits<T>::epsilon() * static_cast<T>(D) * static_cast<T>(D) * of_one * of_other;
  return std::isfinite(close) ? close : T{0};
}

// std::count_if in 32 bits, which vectorises.
template <class T, class F>
int32_t count_of(const T* x, int64_t n, const F& f) {
  int32_t count = 0;
  for (int64_t j = 0; j < n; ++j) count += f(x[j]);
  return count;
}

// A number that at least K of x[0 .. n) reach, of which fewer than K exceed it, or K if it is none of them; there are K numbers.
// Halving finds it, unless ties or infinities are in the way: then it is the K-th largest.
template <class T>
T find_cut(const T* x, int64_t n, int64_t K) {
  T high = largest_of(x, n, [](T score) { return score; }), low = -largest_of(x, n, [](T score) { return -score; });
  if (K == n) return low;
  for (int halvings = 0; halvings < 40; ++halvings) {
    const T middle = low + (high - low) / 2;
    if (!(low < middle && middle < high)) break;
    const int32_t reach = count_of(x, n, [&](T score) { return score >= middle; });
    if (reach == K) return middle;
    (reach > K ? low : high) = middle;
  }
  std::vector<T> numbers(n);
  numbers.erase(std::copy_if(x, x + n, numbers.begin(), [](T score) { return !std::isnan(score); }), numbers.end());
  std::nth_element(numbers.begin(), numbers.begin() + (K - 1), numbers.end(), std::greater<T>());
  return numbers[K - 1];
}

// The K first of `scores` in that order, by ascending index; of those that are `close` to the last one, by rescore(j). In long rows K groups have
// a maximum of at least `least`, so the K first are among the few scores that do.
template <class T, class F>
void select_topk(const T* scores, int64_t L, int64_t K, T close, const F& rescore, int32_t* chosen) {
  constexpr int64_t kGroup = 16, kSpan = kGroup * kScan;  // keys of a group, and of groups that are looked at together
  std::vector<T> values;
  std::vector<int32_t> keys;
  const bool is_long = L >= 4 * kGroup * K;
  if (is_long) {
    std::vector<T> maxima(ceil_div(L, kSpan) * kScan);
    for (int64_t i = 0; i * kSpan < L; ++i)
      scan_maxima<T>(scores + i * kSpan, std::min(kSpan, L - i * kSpan), maxima.data() + i * kScan, [](T score) { return score; });
    const T least = find_cut(maxima.data(), maxima.size(), K) - close;
    for (int64_t j0 = 0; j0 < L; j0 += kScan) {
      const int64_t j1 = std::min(j0 + kScan, L);
      if (!any_may_pass(scores + j0, j1 - j0, least)) continue;
      for (int64_t j = j0; j < j1; ++j)
        if (scores[j] >= least) values.push_back(scores[j]), keys.push_back(static_cast<int32_t>(j));
    }
  }
  const T* x = is_long ? values.data() : scores;
  const int64_t candidates = is_long ? values.size() : L;
  int64_t n = 0, absent = K - count_of(x, candidates, [](T score) { return !std::isnan(score); });
  if (absent > 0) {  // all numbers, and the first NaN
    for (int64_t j = 0; n < K; ++j)
      if (!std::isnan(scores[j]) || absent-- > 0) chosen[n++] = static_cast<int32_t>(j);
    return;
  }
  const T last = find_cut(x, candidates, K), low = last - close, high = last + close;
  const auto key = [&](int64_t i) { return is_long ? keys[i] : static_cast<int32_t>(i); };
  if (count_of(x, candidates, [&](T score) { return score >= low; }) == K) {
    for (int64_t i = 0; n < K; ++i) {  // without branches, which nothing could predict
      chosen[n] = key(i);
      n += x[i] >= low;
    }
    return;
  }
  const int64_t wanted = K - count_of(x, candidates, [&](T score) { return score > high; });
  std::vector<Candidate<T>> contested;
  for (int64_t i = 0; i < candidates; ++i)
    if (low <= x[i] && x[i] <= high) contested.push_back({rescore(key(i)), key(i)});
  if (wanted > 0) std::nth_element(contested.begin(), contested.begin() + (wanted - 1), contested.end(), before<T>);
  const auto by_index = [](const Candidate<T>& a, const Candidate<T>& b) { return a.index < b.index; };
  std::sort(contested.begin(), contested.begin() + wanted, by_index);
  auto next = contested.begin();
  for (int64_t i = 0; n < K; ++i) {
    const bool first_of_contested = next != contested.begin() + wanted && next->index == key(i);
    if (x[i] > high || first_of_contested) chosen[n++] = key(i);
    next += first_of_contested;
  }
}

// The first of M scores, for each of n columns of [M, n]; of those that are `close` to the largest one, by rescore(m, column). One choice a loop, or
// the compiler makes branches of them.
template <class T, class F>
void select_best(const T* __restrict scores, int64_t M, int64_t n, T close, const F& rescore, int32_t* __restrict chosen) {
  std::vector<T> highest(n, static_cast<T>(-kInf));
  T* __restrict best = highest.data();
  std::fill_n(chosen, n, -1);
  for (int32_t m = 0; m < M; ++m) {
    const T* __restrict score = scores + m * n;
    for (int64_t i = 0; i < n; ++i) chosen[i] = score[i] > best[i] ? m : chosen[i];
    for (int64_t i = 0; i < n; ++i) best[i] = score[i] > best[i] ? score[i] : best[i];
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int32_t m = 0; chosen[i] < 0 && m < M; ++m)  // the first -inf, or else of NaN
      if (!std::isnan(scores[m * n + i])) chosen[i] = m;
    chosen[i] = std::max(chosen[i], 0);
  }
  std::vector<int32_t> counts(n, 0);
  int32_t* __restrict count = counts.data();
  for (int32_t m = 0; m < M; ++m) {
    const T* __restrict score = scores + m * n;
    for (int64_t i = 0; i < n; ++i) count[i] += score[i] >= best[i] - close;
  }
  for (int64_t i = 0; i < n; ++i)
    if (count[i] > 1) {
      Candidate<T> first{static_cast<T>(-kInf), mita::kMaxLandmarks};
      for (int32_t m = 0; m < M; ++m)
        if (scores[m * n + i] >= best[i] - close) first = std::min(first, Candidate<T>{rescore(m, i), m}, before<T>);
      chosen[i] = first.index;
    }
}

// The s first of M scores, best first, by rescore(m) if they are `close` to the last one or better. s is at most 8: insertion.
template <class T, class F>
void select_routes(const T* scores, int64_t M, int64_t s, T close, const F& rescore, int32_t* chosen) {
  Candidate<T> best[mita::kMaxRoutes];
  for (int64_t m0 = 0; m0 < M; m0 += kScan) {
    const int64_t m1 = std::min(m0 + kScan, M);
    if (m0 >= s && !any_may_pass(scores + m0, m1 - m0, best[s - 1].score)) continue;
    for (int64_t m = m0; m < m1; ++m) {
      const Candidate<T> c{scores[m], static_cast<int32_t>(m)};
      int64_t at = std::min(m, s);
      if (at == s && !before(c, best[s - 1])) continue;
      if (at == s) --at;
      for (; at > 0 && before(c, best[at - 1]); --at) best[at] = best[at - 1];
      best[at] = c;
    }
  }
  std::vector<Candidate<T>> contested;
  for (int64_t m = 0; m < M; ++m)
    if (!(scores[m] < best[s - 1].score - close)) contested.push_back({rescore(m), static_cast<int32_t>(m)});
  std::partial_sort(contested.begin(), contested.begin() + s, contested.end(), before<T>);
  for (int64_t t = 0; t < s; ++t) chosen[t] = contested[t].index;
}

// ---- Pooling ---------------------------------------------------------------------------------------------------------

struct Pooling {
  int64_t mh, mw, gh, gw, prefix;

  Pooling(IntArrayRef num_landmarks, IntArrayRef grid, int64_t num_prefix_tokens)
      : mh(num_landmarks[0]), mw(num_landmarks[1]), gh(grid[0]), gw(grid[1]), prefix(num_prefix_tokens) {}

  // The windows of sequence b follow its own length.
  Pooling of(const Sequences& queries, int64_t b) const {
    Pooling own = *this;
    if (queries.vary) own.gw = queries.length[b];
    return own;
  }

  // Calls f(landmark, token, 1 / size of the window) for every token of every window, in order.
  template <class F>
  void each(const F& f) const {
    for (int64_t i = 0; i < mh; ++i) {
      const int64_t r0 = i * gh / mh, r1 = ceil_div((i + 1) * gh, mh);
      for (int64_t j = 0; j < mw; ++j) {
        const int64_t c0 = j * gw / mw, c1 = ceil_div((j + 1) * gw, mw);
        const double weight = 1.0 / static_cast<double>((r1 - r0) * (c1 - c0));
        for (int64_t r = r0; r < r1; ++r)
          for (int64_t c = c0; c < c1; ++c) f(i * mw + j, prefix + r * gw + c, weight);
      }
    }
  }
};

// Sums in double: windows may be long.
template <class scalar_t>
Tensor pool_head(const Tensor& q, const Pooling& pooling) {
  const int64_t D = q.size(1), stride = q.stride(0);
  Tensor landmarks = at::zeros({pooling.mh * pooling.mw, D}, q.options().dtype(at::kDouble));
  const scalar_t* from = q.const_data_ptr<scalar_t>();
  double* to = landmarks.mutable_data_ptr<double>();
  pooling.each([&](int64_t m, int64_t n, double weight) {
    for (int64_t d = 0; d < D; ++d) to[m * D + d] += weight * static_cast<double>(from[n * stride + d]);
  });
  return landmarks;
}

// dq += the gradient that reaches the queries through their landmarks; both contiguous.
template <class T>
void pool_head_backward(const Tensor& dZ, const Pooling& pooling, const Tensor& dq) {
  const int64_t D = dq.size(1);
  const T* from = dZ.const_data_ptr<T>();
  T* to = dq.mutable_data_ptr<T>();
  pooling.each([&](int64_t m, int64_t n, double weight) {
    for (int64_t d = 0; d < D; ++d) to[n * D + d] += static_cast<T>(weight) * from[m * D + d];
  });
}

Tensor pool_stage(const Problem& x, const Tensor& query, const Pooling& pooling) {
  const Tensor landmarks = at::empty({x.B, x.H, x.M, x.D}, query.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, query.scalar_type(), "mita_ext.pool", [&] {
    parallel(x.B * x.H, [&](int64_t i) {
      const int64_t b = i / x.H, h = i % x.H;
      head(landmarks, b, h).copy_(pool_head<scalar_t>(x.queries.head(query, b, h), pooling.of(x.queries, b)));
    });
  });
  return landmarks;
}

Tensor pool(const Tensor& query, IntArrayRef num_landmarks, IntArrayRef grid, int64_t num_prefix_tokens,
            const OptionalTensor& seqlens) {
  Problem x = even(mita::check_pool(query, num_landmarks, grid, num_prefix_tokens, seqlens));
  x.queries = {"mita_ext.pool_landmarks", "seqlens", seqlens, "query", query, x.B, x.N};
  return pool_stage(x, query, Pooling(num_landmarks, grid, num_prefix_tokens));
}

Tensor pool_backward(const Tensor& dlandmarks, int64_t N, IntArrayRef num_landmarks, IntArrayRef grid,
                     int64_t num_prefix_tokens, const OptionalTensor& seqlens) {
  const Shape p = mita::check_pool_backward(dlandmarks, N, num_landmarks, grid, num_prefix_tokens, seqlens);
  const Pooling pooling(num_landmarks, grid, num_prefix_tokens);
  const Tensor dquery = at::zeros({p.B, p.H, p.N, p.D}, dlandmarks.options());
  const Sequences queries("mita_ext.pool_landmarks backward", "seqlens", seqlens, "query", dquery, p.B, p.N);
  AT_DISPATCH_FLOATING_TYPES(mita::accumulate_type(dlandmarks.scalar_type()), "mita_ext.pool_backward", [&] {
    parallel_backward(p.B * p.H, [&](int64_t i) {
      const int64_t b = i / p.H, h = i % p.H;
      const Tensor dq = at::zeros({queries.length[b], p.D}, acc_options(dlandmarks));
      pool_head_backward<scalar_t>(widen(head(dlandmarks, b, h)), pooling.of(queries, b), dq);
      queries.head(dquery, b, h).copy_(dq);
    });
  });
  return dquery;
}

// ---- Landmarks: scores, top-k, compressed values ---------------------------------------------------------------------

constexpr int64_t kShortRow = 256;  // up to here loops of our own take less time than calls into ATen

// Rows of a contiguous matrix, each times a factor.
template <class T, class F>
void scale_rows(const Tensor& matrix, const F& factor) {
  const int64_t width = matrix.size(1);
  T* row = matrix.mutable_data_ptr<T>();
  for (int64_t i = 0; i < matrix.size(0); ++i, row += width) {
    const T f = factor(i);
    for (int64_t j = 0; j < width; ++j) row[j] *= f;
  }
}

// Of rows of logits the largest, and the sum of the exponentials relative to it. A row of -inf, or of nothing so far, has the sum 0,
// the lse -inf and a softmax of zeros.
template <class T>
struct Exponentials {
  std::vector<T> top, sum;

  explicit Exponentials(int64_t n) : top(n, static_cast<T>(-kInf)), sum(n, T{0}) {}
  explicit Exponentials(const Tensor& logits) : Exponentials(logits.size(0)) { put(0, logits); }

  // Rows from `first` on: logits -> exponentials, in place.
  void put(int64_t first, const Tensor& logits) {
    const int64_t n = logits.size(0), width = logits.size(1);
    if (n * width == 0) return;
    T *x = logits.mutable_data_ptr<T>(), *tops = top.data() + first, *sums = sum.data() + first;
    if (width > kShortRow) {
      const Tensor highest = logits.amax(1, true);
      logits.sub_(highest.clamp_min(std::numeric_limits<T>::lowest())).exp_();
      std::copy_n(highest.const_data_ptr<T>(), n, tops);
      std::copy_n(logits.sum(1).template const_data_ptr<T>(), n, sums);
      return;
    }
    for (int64_t i = 0; i < n; ++i) {
      tops[i] = largest_of(x + i * width, width, [](T logit) { return logit; });
      const T shift = std::max(tops[i], std::numeric_limits<T>::lowest());
      for (int64_t j = 0; j < width; ++j) x[i * width + j] -= shift;
    }
    logits.exp_();
    for (int64_t i = 0; i < n; ++i) sums[i] = sum_of(x + i * width, width);
  }

  // Exponentials -> softmax, in place.
  void normalise(const Tensor& rows) const {
    scale_rows<T>(rows, [&](int64_t i) { return sum[i] == 0 ? T{0} : 1 / sum[i]; });
  }

  T largest() const {  // logit of its row, by magnitude
    T result = 0;
    for (const T of_row : top)
      if (std::isfinite(of_row)) result = std::max(result, std::abs(of_row));
    return result;
  }
  void put_lse(const Tensor& lse) const {  // [n], contiguous
    T* to = lse.mutable_data_ptr<T>();
    for (size_t i = 0; i < top.size(); ++i) to[i] = top[i] + std::log(sum[i]);
  }
};

// Rows of landmark scores that are held at once: 2^20 scores or one row. A function of the keys alone, never of the batch
// or the threads, because the shape of a product can decide its last bits.
int64_t landmark_block(int64_t M, int64_t L) {
  return std::clamp<int64_t>((int64_t{1} << 20) / std::max<int64_t>(L, 1), 1, M);
}

constexpr int64_t kSlab = int64_t{1} << 17;  // scores that are selected from and weighed at once

struct Landmarked {
  Tensor indices, compressed, lse;
};

Landmarked landmark_stage(const Problem& x, const Tensor& landmarks, const Tensor& key, const Tensor& value,
                          double scale) {
  const Sequences& keys = x.keys;
  const Landmarked result{keys.results({x.B, x.H, x.M, x.K}, key.options().dtype(at::kInt), -1),
                          keys.results({x.B, x.H, x.M, x.D}, key.options()),
                          keys.results({x.B, x.H, x.M}, acc_options(key), -kInf)};
  const int64_t blocks = ceil_div(x.M, landmark_block(x.M, x.L));  // of the longest sequence; shorter ones have fewer
  AT_DISPATCH_FLOATING_TYPES(result.lse.scalar_type(), "mita_ext.landmark_topk", [&] {
    std::vector<scalar_t> magnitudes(x.B * x.Hkv);  // of keys
    parallel(x.B * x.Hkv, [&](int64_t i) { magnitudes[i] = magnitude_of<scalar_t>(widen(keys.head(key, i / x.Hkv, i % x.Hkv))); });
    parallel(x.B * x.H * blocks, [&](int64_t i) {
      const int64_t b = i / blocks / x.H, h = i / blocks % x.H, hk = h / (x.H / x.Hkv);
      const int64_t L = keys.length[b], K = std::min(x.K, L), block = landmark_block(x.M, L);
      const int64_t m0 = i % blocks * block, rows = std::min(block, x.M - m0);
      if (rows <= 0 || L == 0) return;
      const Tensor z = widen(head(landmarks, b, h).narrow(0, m0, rows)), k = widen(keys.head(key, b, hk));
      Tensor S = z.mm(k.t());
      const scalar_t *scores = S.const_data_ptr<scalar_t>(), *z_rows = z.const_data_ptr<scalar_t>(), *k_rows = k.const_data_ptr<scalar_t>();
      const scalar_t close = closeness(x.D, magnitude_of<scalar_t>(z), magnitudes[b * x.Hkv + hk]);
      int32_t* chosen = head(result.indices, b, h).mutable_data_ptr<int32_t>() + m0 * x.K;
      Exponentials<scalar_t> weights(rows);
      const int64_t slab = std::clamp<int64_t>(kSlab / L, 1, rows);
      for (int64_t m = 0; m < rows; m += slab) {  // each while its scores are in the cache
        const int64_t n = std::min(slab, rows - m);
        for (int64_t i = m; i < m + n; ++i)
          select_topk(scores + i * L, L, K, close, [&](int64_t j) { return dot(z_rows + i * x.D, k_rows + j * x.D, x.D); }, chosen + i * x.K);
        weights.put(m, S.narrow(0, m, n).mul_(scale));
      }
      const Tensor sums = S.mm(to_acc(keys.head(value, b, hk)));
      scale_rows<scalar_t>(sums, [&](int64_t i) { return 1 / weights.sum[i]; });
      head(result.compressed, b, h).narrow(0, m0, rows).copy_(sums);
      weights.put_lse(head(result.lse, b, h).narrow(0, m0, rows));
    });
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> landmark_topk(const Tensor& landmarks, const Tensor& key, const Tensor& value,
                                                 int64_t topk, double scale, const OptionalTensor& seqlens_k) {
  Problem x = even(mita::check_landmark_topk(landmarks, key, value, topk, seqlens_k));
  x.keys = {"mita_ext.landmark_topk", "seqlens_k", seqlens_k, "key", key, x.B, x.L};
  const auto [indices, compressed, lse] = landmark_stage(x, landmarks, key, value, scale);
  return {indices, compressed, lse};
}

// Softmax of each row of logits, in place. The backward passes start from the logits again and not from the saved lse and
// outputs: those are rounded, which shows where logits are large or keys nearly the same.
Tensor softmax_(const Tensor& logits) {
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "mita_ext.softmax",
                             [&] { Exponentials<scalar_t>(logits).normalise(logits); });
  return logits;
}

// dP -> the gradient of the logits, in place: P (dP - sum(P dP) + dlse).
Tensor softmax_backward_(const Tensor& dP, const Tensor& P, const OptionalTensor& dlse) {
  const Tensor delta = P.mul(dP).sum(1, true);
  if (dlse) delta.sub_(dlse->unsqueeze(1));
  return dP.sub_(delta).mul_(P);
}

// Gradients of one kv head, in the type that is computed in: all its query heads add into them.
struct KeyValueGrad {
  Tensor dk, dv;

  KeyValueGrad(int64_t L, int64_t D, const at::TensorOptions& options)
      : dk(at::zeros({L, D}, options)), dv(at::zeros({L, D}, options)) {}
};

// C = softmax(scale Z k^T) v for one head, backward from dC (and the gradient of its lse). k, v and all gradients are
// widened; dZ is added to.
void compress_backward(const Tensor& Z, const Tensor& k, const Tensor& v, const Tensor& dC, const OptionalTensor& dlse,
                       double scale, const Tensor& dZ, KeyValueGrad& grad) {
  if (k.size(0) == 0) return;
  const int64_t block = landmark_block(Z.size(0), k.size(0));
  for (int64_t m0 = 0; m0 < Z.size(0); m0 += block) {
    const int64_t rows = std::min(block, Z.size(0) - m0);
    const auto part = [&](const Tensor& t) { return t.narrow(0, m0, rows); };
    const Tensor P = softmax_(part(Z).mm(k.t()).mul_(scale));
    const Tensor dS = softmax_backward_(part(dC).mm(v.t()), P, dlse ? OptionalTensor(part(*dlse)) : std::nullopt);
    part(dZ).addmm_(dS, k, 1, scale);
    grad.dk.addmm_(dS.t(), part(Z), 1, scale);
    grad.dv.addmm_(P.t(), part(dC));
  }
}

std::tuple<Tensor, Tensor, Tensor> landmark_topk_backward(const Tensor& dcompressed, const OptionalTensor& dlse,
                                                          const Tensor& landmarks, const Tensor& key,
                                                          const Tensor& value, const Tensor& compressed,
                                                          const Tensor& lse, double scale,
                                                          const OptionalTensor& seqlens_k) {
  const Shape p = mita::check_landmark_topk_backward(dcompressed, dlse, landmarks, key, value, compressed, lse, seqlens_k);
  const Sequences keys("mita_ext.landmark_topk backward", "seqlens_k", seqlens_k, "key", key, p.B, p.L);
  const Tensor dlandmarks = at::empty(landmarks.sizes(), key.options());
  const Tensor dkey = keys.results(key.sizes(), key.options()), dvalue = keys.results(key.sizes(), key.options());
  const int64_t group = p.H / p.Hkv;
  parallel_backward(p.B * p.Hkv, [&](int64_t i) {
    const int64_t b = i / p.Hkv, hk = i % p.Hkv;
    KeyValueGrad grad(keys.length[b], p.D, acc_options(key));
    const Tensor k = to_acc(keys.head(key, b, hk)), v = to_acc(keys.head(value, b, hk));
    for (int64_t h = hk * group; h < (hk + 1) * group; ++h) {
      const Tensor dZ = at::zeros({p.M, p.D}, acc_options(key));
      compress_backward(widen(head(landmarks, b, h)), k, v, widen(head(dcompressed, b, h)),
                        dlse ? OptionalTensor(head(*dlse, b, h)) : std::nullopt, scale, dZ, grad);
      head(dlandmarks, b, h).copy_(dZ);
    }
    keys.head(dkey, b, hk).copy_(grad.dk);
    keys.head(dvalue, b, hk).copy_(grad.dv);
  });
  return {dlandmarks, dkey, dvalue};
}

// ---- Routing ---------------------------------------------------------------------------------------------------------

Tensor route_stage(const Problem& x, const Tensor& query, const Tensor& landmarks) {
  const Tensor experts = x.queries.results({x.B, x.H, x.N, x.s}, query.options().dtype(at::kInt), -1);
  if (experts.numel() == 0) return experts;
  constexpr int64_t block = 2048;
  const int64_t blocks = ceil_div(x.N, block);
  AT_DISPATCH_FLOATING_TYPES(mita::accumulate_type(query.scalar_type()), "mita_ext.route", [&] {
    parallel(x.B * x.H * blocks, [&](int64_t i) {
      const int64_t b = i / blocks / x.H, h = i / blocks % x.H;
      const int64_t n0 = i % blocks * block, rows = std::min(block, x.queries.length[b] - n0);
      if (rows <= 0) return;
      const Tensor z = widen(head(landmarks, b, h)), q = widen(x.queries.head(query, b, h).narrow(0, n0, rows)), S = z.mm(q.t());
      const scalar_t *z_rows = z.const_data_ptr<scalar_t>(), *q_rows = q.const_data_ptr<scalar_t>();
      const scalar_t close = closeness(x.D, magnitude_of<scalar_t>(z), magnitude_of<scalar_t>(q));
      const auto rescore = [&](int64_t m, int64_t n) { return dot(z_rows + m * x.D, q_rows + n * x.D, x.D); };
      int32_t* chosen = head(experts, b, h).mutable_data_ptr<int32_t>() + n0 * x.s;
      if (x.s == 1) return select_best(S.const_data_ptr<scalar_t>(), x.M, rows, close, rescore, chosen);
      const Tensor by_query = S.t().contiguous();
      const scalar_t* scores = by_query.const_data_ptr<scalar_t>();
      for (int64_t n = 0; n < rows; ++n) select_routes(scores + n * x.M, x.M, x.s, close, [&](int64_t m) { return rescore(m, n); }, chosen + n * x.s);
    });
  });
  return experts;
}

Tensor route(const Tensor& query, const Tensor& landmarks, int64_t routes) {
  return route_stage(even(mita::check_route(query, landmarks, routes)), query, landmarks);
}

// ---- Attention over the shared expert and the routed experts ---------------------------------------------------------

constexpr int64_t kQueries = 512;  // of an expert at once: their logits stay in the cache
constexpr int64_t kSmallProduct = int64_t{1} << 15;  // times and adds that take as long as a call into ATen
constexpr double kLargeLogit = 64;

// Merges a softmax over more units into out [n, D], which is one over those `so_far`, for some rows. `sums` are the values weighted by
// the exponentials of `more`. Where there was nothing so far, out need not be there.
template <class T>
void merge_rows(const Tensor& out, Exponentials<T>& so_far, const int64_t* rows, const Tensor& sums, const Exponentials<T>& more) {
  const int64_t D = out.size(1), stride = out.stride(0);
  const T* from = sums.const_data_ptr<T>();
  T* outs = out.mutable_data_ptr<T>();
  for (int64_t i = 0; i < sums.size(0); ++i, from += D) {
    const T more_top = more.top[i], more_sum = more.sum[i];
    if (more_sum == 0) continue;
    T *to = outs + rows[i] * stride, &top = so_far.top[rows[i]], &total = so_far.sum[rows[i]];
    if (total == 0) {
      const T factor = 1 / more_sum;
      for (int64_t d = 0; d < D; ++d) to[d] = factor * from[d];
      top = more_top, total = more_sum;
    } else {
      const T highest = std::max(top, more_top), kept = total * std::exp(top - highest), add = std::exp(more_top - highest);
      top = highest, total = kept + add * more_sum;
      const T of_out = kept / total, of_sums = add / total;
      for (int64_t d = 0; d < D; ++d) to[d] = of_out * to[d] + of_sums * from[d];
    }
  }
}

// One query head. The units of a query are the columns of a matrix: the M landmarks (if the expert is shared), then K
// for each route.
template <class scalar_t>
struct Head {
  using T = acc_t<scalar_t>;
  Shape p;         // L: of this sequence
  Tensor q, k, v;  // slices as they come
  Tensor Z, C;     // widened
  const int32_t* indices;  // [M, K]
  const int32_t* experts;  // [N, s]
  bool shared_expert;
  double scale, landmark_scale;

  Head(const Problem& x, int64_t b, int64_t h, const Tensor& query, const Tensor& key, const Tensor& value,
       const Tensor& landmarks, const Tensor& compressed, const Tensor& indices, const Tensor& experts,
       bool shared_expert, double scale, double landmark_scale)
      : p(x),
        q(x.queries.head(query, b, h)),
        k(x.keys.head(key, b, h / (p.H / p.Hkv))),
        v(x.keys.head(value, b, h / (p.H / p.Hkv))),
        Z(widen(head(landmarks, b, h))),
        C(widen(head(compressed, b, h))),
        indices(head(indices, b, h).const_data_ptr<int32_t>()),
        experts(head(experts, b, h).const_data_ptr<int32_t>()),
        shared_expert(shared_expert),
        scale(scale),
        landmark_scale(landmark_scale) {
    p.L = k.size(0);
  }

  int64_t shared_width() const { return shared_expert ? p.M : 0; }
  int64_t width() const { return shared_width() + p.s * p.K; }
  Tensor shared(const Tensor& matrix) const { return matrix.narrow(1, 0, p.M); }

  // For queries n0 .. n0 + n: calls f(block, keys) for every route and every expert that has queries there. The queries
  // of an expert come in ascending order (a stable counting sort); `keys` are its block.used filled slots.
  template <class F>
  void each_expert(int64_t n0, int64_t n, const F& f) const {
    std::vector<int64_t> start(p.M + 1), rows(n), keys(p.K);
    for (int64_t t = 0; t < p.s; ++t) {
      const auto expert = [&](int64_t i) { return experts[(n0 + i) * p.s + t]; };
      std::fill(start.begin(), start.end(), 0);
      for (int64_t i = 0; i < n; ++i) ++start[expert(i) + 1];
      for (int64_t e = 0; e < p.M; ++e) start[e + 1] += start[e];
      std::vector<int64_t> next(start.begin(), start.end() - 1);
      for (int64_t i = 0; i < n; ++i) rows[next[expert(i)]++] = i;
      for (int64_t e = 0; e < p.M; ++e) {
        const int64_t count = start[e + 1] - start[e];
        if (count == 0) continue;
        int64_t used = 0;
        for (int64_t j = 0; j < p.K; ++j) {
          const int64_t index = indices[e * p.K + j];
          if (index >= 0 && index < p.L) keys[used++] = index;
        }
        f(Block{rows.data() + start[e], count, shared_width() + t * p.K, p.K, used}, keys.data());
      }
    }
  }

  // Whether so few queries meet so few units that a call into ATen would take longer than their products do.
  bool is_small(int64_t queries, int64_t units) const { return queries * units * p.D <= kSmallProduct; }
  bool is_small(const Block& b) const { return is_small(b.n, b.used); }

  // The exponentials of logits(false), in its place; or of logits(true), made in double, where they are large: the rounding of a
  // large logit is the largest error of a softmax. Without experts, whose keys it is that come close, nothing is gained.
  template <class F>
  std::pair<Tensor, Exponentials<T>> exponentials(const F& logits) const {
    Tensor S = logits(false);
    Exponentials<T> rows(S);
    if (p.s > 0 && !std::is_same_v<T, double> && rows.largest() > kLargeLogit) rows = Exponentials<T>(S = logits(true));
    return {S, rows};
  }

  // The softmax of all units of some queries.
  std::pair<Tensor, Exponentials<T>> weights(const Tensor& q, int64_t n0) const {
    const auto result = exponentials([&](bool large) { return logits(q, n0, large); });
    result.second.normalise(result.first);
    return result;
  }

  // Some keys and, before them, the landmarks if wanted, times their scales.
  template <class U>
  Tensor units_of(const int64_t* keys, int64_t n, bool with_landmarks) const {
    const int64_t M = with_landmarks ? p.M : 0;
    const Tensor result = at::empty({M + n, p.D}, Z.options().dtype(c10::CppTypeToScalarType<U>::value));
    U* to = result.template mutable_data_ptr<U>();
    gather_rows<T>(Z, ascending(M).data(), M, static_cast<U>(landmark_scale), to);
    gather_rows<scalar_t>(k, keys, n, static_cast<U>(scale), to + M * p.D);
    return result;
  }

  // Products are made in double where they are large.
  Tensor logits_of(const Tensor& q, const int64_t* keys, int64_t n, bool with_landmarks, bool large) const {
    if (!large) return q.mm(units_of<T>(keys, n, with_landmarks).t());
    return q.to(at::kDouble).mm(units_of<double>(keys, n, with_landmarks).t()).to(q.scalar_type());
  }

  // -inf in empty slots.
  Tensor logits(const Tensor& q, int64_t n0, bool large) const {
    const int64_t n = q.size(0), stride = q.stride(0);
    const Tensor S = at::empty({n, width()}, q.options());
    if (shared_expert) shared(S).copy_(logits_of(q, nullptr, 0, true, large));
    const T* from = q.template const_data_ptr<T>();
    T* to = S.template mutable_data_ptr<T>();
    WideRows<scalar_t> rows_of;
    each_expert(n0, n, [&](const Block& b, const int64_t* keys) {
      constexpr T empty = -std::numeric_limits<T>::infinity();
      if (large || !is_small(b))
        return put_block<T>(S, b, logits_of(gather_rows<T>(q, b.rows, b.n), keys, b.used, false, large), empty);
      const T* const* k_e = rows_of(k, keys, b.used);
      for (int64_t i = 0; i < b.n; ++i) {
        T* row = to + b.rows[i] * width() + b.column;
        multiply(from + b.rows[i] * stride, k_e, b.used, p.D, static_cast<T>(scale), row);
        std::fill(row + b.used, row + b.K, empty);
      }
    });
    return S;
  }

  // Fills out [n, D] and lse [n] of queries n0 .. n0 + n. A query without any unit gets 0 and -inf.
  void forward(int64_t n0, int64_t n, const Tensor& out, const Tensor& lse) const {
    const Tensor wide = std::is_same_v<scalar_t, T> ? out : at::empty(out.sizes(), Z.options());
    const bool at_once = p.s == 0 || is_small(ceil_div(n * p.s, p.M), p.K);
    const Exponentials<T> total = at_once ? attend_at_once(n0, n, wide) : attend_by_expert(n0, n, wide);
    total.put_lse(lse);
    for (int64_t i = 0; i < n; ++i)
      if (total.sum[i] == 0) wide.select(0, i).zero_();
    if (!out.is_same(wide)) out.copy_(wide);
  }

  // Where there are few units, or few queries of an expert: the logits of all queries as one matrix.
  Exponentials<T> attend_at_once(int64_t n0, int64_t n, const Tensor& out) const {
    const auto [P, total] = weights(to_acc(q.narrow(0, n0, n)), n0);
    Tensor result = out;
    if (shared_expert)
      at::mm_out(result, shared(P), C);
    else
      result.zero_();
    const T* from = P.template const_data_ptr<T>();
    T* to = out.template mutable_data_ptr<T>();
    const int64_t stride = out.stride(0);
    WideRows<scalar_t> rows_of;
    each_expert(n0, n, [&, &P = P](const Block& b, const int64_t* keys) {
      if (!is_small(b)) return add_rows<T>(out, b.rows, get_block<T>(P, b).mm(gather_rows<scalar_t>(v, keys, b.used)));
      const T* const* v_e = rows_of(v, keys, b.used);
      for (int64_t i = 0; i < b.n; ++i)
        add_products(from + b.rows[i] * width() + b.column, v_e, b.used, p.D, to + b.rows[i] * stride);
    });
    return total;
  }

  // Where experts have many queries: all units of a route in one product, whose logits stay in the cache. The shared expert goes
  // with the first route; softmaxes of several routes are merged.
  Exponentials<T> attend_by_expert(int64_t n0, int64_t n, const Tensor& out) const {
    Exponentials<T> total(n);
    const int64_t M = shared_width();
    const Tensor q_n = q.narrow(0, n0, n);
    const Tensor units = at::empty({M + p.K, p.D}, Z.options()), values = at::empty_like(units);  // units times their scale
    if (shared_expert) units.narrow(0, 0, M).copy_(Z.mul(landmark_scale)), values.narrow(0, 0, M).copy_(C);
    T *units_of_keys = units.template mutable_data_ptr<T>() + M * p.D, *values_of_keys = values.template mutable_data_ptr<T>() + M * p.D;
    each_expert(n0, n, [&](const Block& b, const int64_t* keys) {
      const int64_t first = b.column == M ? 0 : M, width = M + b.used - first;
      if (width == 0) return;
      gather_rows<scalar_t>(k, keys, b.used, static_cast<T>(scale), units_of_keys);
      gather_rows<scalar_t>(v, keys, b.used, T{1}, values_of_keys);
      const Tensor units_e = units.narrow(0, first, width), values_e = values.narrow(0, first, width);
      for (int64_t i = 0; i < b.n; i += kQueries) {
        const Tensor q_e = gather_rows<scalar_t>(q_n, b.rows + i, std::min(kQueries, b.n - i));
        const auto weighed = exponentials([&](bool large) {
          return large ? logits_of(q_e, keys, b.used, first < M, true) : q_e.mm(units_e.t());
        });
        merge_rows<T>(out, total, b.rows + i, weighed.first.mm(values_e), weighed.second);
      }
    });
    return total;
  }

  // Adds to dq [N, D], dZ, dC [M, D] and the kv gradients, if wanted, what queries n0 .. n0 + n contribute.
  void backward(int64_t n0, int64_t n, const Tensor& dout, const OptionalTensor& dlse, const Tensor& dq,
                const Tensor& dZ, const Tensor& dC, bool want_keys, KeyValueGrad& grad) const {
    const auto part = [&](const Tensor& t) { return t.narrow(0, n0, n); };
    const Tensor q_n = to_acc(part(q)), do_n = to_acc(part(dout)), dq_n = part(dq);
    const Tensor P = weights(q_n, n0).first;
    const Tensor dS = at::empty_like(P);
    if (shared_expert) shared(dS).addmm_(do_n, C.t(), 0, 1);
    each_expert(n0, n, [&](const Block& b, const int64_t* keys) {
      const Tensor v_e = gather_rows<scalar_t>(v, keys, b.used);
      put_block<T>(dS, b, gather_rows<T>(do_n, b.rows, b.n).mm(v_e.t()), 0);
    });
    softmax_backward_(dS, P, dlse ? OptionalTensor(part(*dlse)) : std::nullopt);

    if (shared_expert) {
      dq_n.addmm_(shared(dS), Z, 1, landmark_scale);
      dZ.addmm_(shared(dS).t(), q_n, 1, landmark_scale);
      dC.addmm_(shared(P).t(), do_n);
    }
    const T alpha = static_cast<T>(scale);
    each_expert(n0, n, [&](const Block& b, const int64_t* keys) {
      const Tensor dS_e = get_block<T>(dS, b), P_e = get_block<T>(P, b);
      add_rows<T>(dq_n, b.rows, dS_e.mm(gather_rows<scalar_t>(k, keys, b.used)), alpha);
      if (!want_keys) return;
      add_rows<T>(grad.dk, keys, dS_e.t().mm(gather_rows<T>(q_n, b.rows, b.n)), alpha);
      add_rows<T>(grad.dv, keys, P_e.t().mm(gather_rows<T>(do_n, b.rows, b.n)));
    });
  }
};

// Queries that are attended at once: about 2^21 logits, but enough queries for experts to have several each.
int64_t query_block(const Shape& p) {
  return std::max<int64_t>(1024, (int64_t{1} << 21) / (p.M + std::max<int64_t>(p.s * p.K, 1)));
}

// A loop over experts trusts them; on the CPU looking costs little.
void check_experts(const char* fn, const Problem& x, const Tensor& experts) {
  if (x.s == 0) return;
  for (int64_t b = 0; b < x.B; ++b) {
    const Tensor own = experts.select(0, b).narrow(1, 0, x.queries.length[b]);
    if (own.numel() == 0) continue;
    const int64_t low = own.min().item<int64_t>(), high = own.max().item<int64_t>();
    TORCH_CHECK_VALUE(low >= 0 && high < x.M, fn, ": experts must be at least 0 and below the number of landmarks (",
                      x.M, "), got ", low < 0 ? low : high);
  }
}

std::tuple<Tensor, Tensor> attention_stage(const Problem& x, const Tensor& query, const Tensor& key,
                                           const Tensor& value, const Tensor& landmarks, const Tensor& compressed,
                                           const Tensor& indices, const Tensor& experts, bool shared_expert,
                                           double scale, double landmark_scale) {
  const Tensor out = x.queries.results(query.sizes(), query.options());
  const Tensor lse = x.queries.results({x.B, x.H, x.N}, acc_options(query), -kInf);
  const int64_t block = query_block(x), blocks = ceil_div(x.N, block);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, query.scalar_type(), "mita_ext.expert_attention", [&] {
    parallel(x.B * x.H * blocks, [&](int64_t i) {
      const int64_t b = i / blocks / x.H, h = i / blocks % x.H;
      const int64_t n0 = i % blocks * block, n = std::min(block, x.queries.length[b] - n0);
      if (n <= 0) return;
      const Head<scalar_t> one(x, b, h, query, key, value, landmarks, compressed, indices, experts, shared_expert,
                               scale, landmark_scale);
      one.forward(n0, n, x.queries.head(out, b, h).narrow(0, n0, n), head(lse, b, h).narrow(0, n0, n));
    });
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor> expert_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const Tensor& landmarks, const Tensor& compressed, const Tensor& indices,
                                            const Tensor& experts, bool shared_expert, double scale,
                                            double landmark_scale) {
  const Problem x = even(mita::check_expert_attention(query, key, value, landmarks, compressed, indices, experts,
                                                      shared_expert));
  check_experts("mita_ext.expert_attention", x, experts);
  return attention_stage(x, query, key, value, landmarks, compressed, indices, experts, shared_expert, scale,
                         landmark_scale);
}

// The body of both backward ops. For each (batch, query head), in the order of the kv heads, `after(b, h, one, dq, dZ, dC,
// grad)` may carry dC and dZ further before everything is rounded and stored.
template <class After>
void attend_backward(const Problem& x, const Tensor& dout, const OptionalTensor& dlse, const Tensor& query,
                     const Tensor& key, const Tensor& value, const Tensor& landmarks, const Tensor& compressed,
                     const Tensor& indices, const Tensor& experts, bool shared_expert, double scale,
                     double landmark_scale, bool want_keys, const Tensor& dquery, const Tensor& dkey,
                     const Tensor& dvalue, const After& after) {
  const int64_t group = x.H / x.Hkv, block = query_block(x);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, query.scalar_type(), "mita_ext.attention_backward", [&] {
    parallel_backward(x.B * x.Hkv, [&](int64_t i) {
      const int64_t b = i / x.Hkv, hk = i % x.Hkv, N = x.queries.length[b];
      const auto options = acc_options(query);
      KeyValueGrad grad(x.keys.length[b], x.D, options);
      for (int64_t h = hk * group; h < (hk + 1) * group; ++h) {
        const Head<scalar_t> one(x, b, h, query, key, value, landmarks, compressed, indices, experts, shared_expert,
                                 scale, landmark_scale);
        const Tensor dq = at::zeros({N, x.D}, options);
        const Tensor dZ = at::zeros({x.M, x.D}, options), dC = at::zeros({x.M, x.D}, options);
        const OptionalTensor dlse_h = dlse ? OptionalTensor(head(*dlse, b, h)) : std::nullopt;
        for (int64_t n0 = 0; n0 < N; n0 += block)
          one.backward(n0, std::min(block, N - n0), x.queries.head(dout, b, h), dlse_h, dq, dZ, dC, want_keys, grad);
        after(b, h, one, dq, dZ, dC, grad);
        x.queries.head(dquery, b, h).copy_(dq);
      }
      if (!want_keys) return;
      x.keys.head(dkey, b, hk).copy_(grad.dk);
      x.keys.head(dvalue, b, hk).copy_(grad.dv);
    });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> expert_attention_backward(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& landmarks, const Tensor& compressed, const Tensor& indices, const Tensor& experts, const Tensor& out,
    const Tensor& lse, bool shared_expert, double scale, double landmark_scale) {
  const Problem x = even(mita::check_expert_attention_backward(dout, dlse, query, key, value, landmarks, compressed,
                                                               indices, experts, out, lse, shared_expert));
  check_experts("mita_ext.expert_attention backward", x, experts);
  const Tensor dquery = at::empty(query.sizes(), query.options());
  const Tensor dkey = at::empty(key.sizes(), key.options()), dvalue = at::empty(key.sizes(), key.options());
  const Tensor dlandmarks = at::empty(landmarks.sizes(), query.options());
  const Tensor dcompressed = at::empty(landmarks.sizes(), query.options());
  attend_backward(x, dout, dlse, query, key, value, landmarks, compressed, indices, experts, shared_expert, scale,
                  landmark_scale, true, dquery, dkey, dvalue,
                  [&](int64_t b, int64_t h, const auto&, const Tensor&, const Tensor& dZ, const Tensor& dC,
                      KeyValueGrad&) {
                    head(dlandmarks, b, h).copy_(dZ);
                    head(dcompressed, b, h).copy_(dC);
                  });
  return {dquery, dkey, dvalue, dlandmarks, dcompressed};
}

// ---- Everything at once ----------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& landmarks,
    IntArrayRef num_landmarks, IntArrayRef grid, int64_t num_prefix_tokens, int64_t topk, int64_t routes,
    bool shared_expert, double scale, double landmark_scale, const OptionalTensor& seqlens_q,
    const OptionalTensor& seqlens_k, OptionalInt max_seqlen_q, OptionalInt max_seqlen_k) {
  const Lengths lengths{seqlens_q, seqlens_k, max_seqlen_q, max_seqlen_k};
  const Shape p = mita::check_attention(query, key, value, landmarks, num_landmarks, grid, num_prefix_tokens, topk,
                                        routes, shared_expert, lengths);
  const Problem x = problem_of(mita::attention_name(query), p, query, key, lengths);
  const Tensor Z = landmarks ? *landmarks : pool_stage(x, query, Pooling(num_landmarks, grid, num_prefix_tokens));
  const auto [indices, compressed, landmark_lse] = landmark_stage(x, Z, key, value, scale);
  const Tensor experts = route_stage(x, query, Z);
  const auto [out, lse] = attention_stage(x, query, key, value, Z, compressed, indices, experts, shared_expert, scale,
                                          landmark_scale);
  const Tensor groups = at::empty({0}, experts.options());  // made where they are wanted
  return {out, lse, landmarks ? at::empty({0}, query.options()) : Z, indices, experts, groups, compressed, landmark_lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& landmarks, const Tensor& indices, const Tensor& experts, const Tensor& groups,
    const Tensor& compressed, const Tensor& landmark_lse, const Tensor& out, const Tensor& lse, bool pooled,
    IntArrayRef num_landmarks, IntArrayRef grid, int64_t num_prefix_tokens, bool shared_expert, double scale,
    double landmark_scale, bool want_keys, bool want_landmarks, const OptionalTensor& seqlens_q, const OptionalTensor& seqlens_k,
    OptionalInt max_seqlen_q, OptionalInt max_seqlen_k) {
  const Lengths lengths{seqlens_q, seqlens_k, max_seqlen_q, max_seqlen_k};
  const Shape p = mita::check_attention_backward(dout, dlse, query, key, value, landmarks, indices, experts, groups,
                                                 compressed, landmark_lse, out, lse, pooled, num_landmarks, grid,
                                                 num_prefix_tokens, shared_expert, lengths);
  const char* fn = mita::attention_name(query, true);
  const Problem x = problem_of(fn, p, query, key, lengths);
  check_experts(fn, x, experts);
  const Pooling pooling(num_landmarks, grid, num_prefix_tokens);
  const Tensor dquery = x.queries.results(query.sizes(), query.options());
  const auto of_keys = [&] { return want_keys ? x.keys.results(key.sizes(), key.options()) : at::empty({0}, key.options()); };
  const Tensor dkey = of_keys(), dvalue = of_keys();
  const Tensor dlandmarks = at::empty(pooled || !want_landmarks ? IntArrayRef{0} : landmarks.sizes(), query.options());
  attend_backward(
      x, dout, dlse, query, key, value, landmarks, compressed, indices, experts, shared_expert, scale, landmark_scale,
      want_keys, dquery, dkey, dvalue,
      [&](int64_t b, int64_t h, const auto& one, const Tensor& dq, const Tensor& dZ, const Tensor& dC, KeyValueGrad& grad) {
        if (shared_expert && (want_keys || want_landmarks))
          compress_backward(one.Z, to_acc(one.k), to_acc(one.v), dC, std::nullopt, scale, dZ, grad);
        if (!want_landmarks) return;
        if (!pooled) {
          head(dlandmarks, b, h).copy_(dZ);
        } else {
          AT_DISPATCH_FLOATING_TYPES(dZ.scalar_type(), "mita_ext.pool_backward",
                                     [&] { pool_head_backward<scalar_t>(dZ, pooling.of(x.queries, b), dq); });
        }
      });
  return {dquery, dkey, dvalue, dlandmarks};
}

}  // namespace

TORCH_LIBRARY_IMPL(mita_ext, CPU, m) {
  m.impl("pool", &pool);
  m.impl("pool_backward", &pool_backward);
  m.impl("landmark_topk", &landmark_topk);
  m.impl("landmark_topk_backward", &landmark_topk_backward);
  m.impl("route", &route);
  m.impl("expert_attention", &expert_attention);
  m.impl("expert_attention_backward", &expert_attention_backward);
  m.impl("attention", &attention);
  m.impl("attention_backward", &attention_backward);
}
