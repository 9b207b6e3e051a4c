// Argument checks, shared by the backends so that both give the same words: one function per op, to be called before
// anything is allocated or launched. Each returns the shape of the problem. Errors name the argument, what it got and
// what it needs; shapes, devices and ranges are ValueErrors, dtypes are TypeErrors.
//
// After a check, a backend may rely on: all sizes agree; every float tensor has the dtype of the first one and a last
// dimension of stride 1 (all other strides are arbitrary, 0 included); lse, dlse, indices, experts and lengths are
// contiguous; all tensors share one device; B and N may be 0, everything else is at least 1. What lengths hold is not
// looked at.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "limits.h"

namespace mita {

// Sizes that an op does not have are 0. N, L: of the longest sequence. K: the slots of one expert, min(topk, L) where
// topk is an argument.
struct Shape {
  int64_t B = 0, H = 0, Hkv = 0, N = 0, L = 0, M = 0, K = 0, D = 0, s = 0;
};

// Which tokens belong to which sequence. Tensors [B, heads, rows, D] are padded on the right, and seqlens [B] are the
// lengths (none: all rows). Tensors [total, heads, D] are packed: seqlens [B + 1] say where sequences begin, and where the
// last one ends, and `max` bounds the lengths.
struct Lengths {
  std::optional<at::Tensor> seqlens_q, seqlens_k;
  std::optional<int64_t> max_q, max_k;
};

constexpr int64_t kMaxPacked = std::numeric_limits<int32_t>::max();  // tokens that int32 prefix sums reach

inline bool is_packed(const at::Tensor& t) { return t.dim() == 3; }

// lse and everything that decides is at least float32.
inline at::ScalarType accumulate_type(at::ScalarType t) { return t == at::kDouble ? at::kDouble : at::kFloat; }

namespace detail {

inline std::string dtype_name(at::ScalarType t) { return "torch." + std::string(c10::getDtypeNames(t).first); }

// `names` says the rule in letters, such as "[B, H, N, D]".
inline void check_sizes(const char* fn, const char* name, const at::Tensor& t, at::IntArrayRef sizes,
                        const char* names) {
  TORCH_CHECK_VALUE(t.sizes() == sizes, fn, ": ", name, " must have the shape ", names, " = ", sizes, ", got ",
                    t.sizes());
}

inline void check_like(const char* fn, const char* name, const at::Tensor& t, const char* like_name,
                       const at::Tensor& like, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(t.device() == like.device(), fn, ": ", name, " must be on the device of ", like_name, " (",
                    like.device(), "), got ", t.device());
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, fn, ": ", name, " must be ", dtype_name(dtype),
                   dtype == like.scalar_type() ? std::string(", the dtype of ") + like_name : std::string(), ", got ",
                   dtype_name(t.scalar_type()));
}

inline void check_last_stride(const char* fn, const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.size(-1) <= 1 || t.numel() == 0 || t.stride(-1) == 1, fn, ": ", name,
                    " must have a contiguous last dimension, got strides ", t.strides());
}

// The first tensor of an op: any float [B, H, rows, D], or packed.
inline void check_first(const char* fn, const char* name, const at::Tensor& t, bool may_be_packed = false) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble || t.scalar_type() == at::kHalf ||
                       t.scalar_type() == at::kBFloat16,
                   fn, ": ", name, " must be float64, float32, float16 or bfloat16, got ",
                   dtype_name(t.scalar_type()));
  TORCH_CHECK_VALUE(t.dim() == 4 || (may_be_packed && is_packed(t)), fn, ": ", name,
                    " must have 4 dimensions [B, H, N, D], got ", t.dim(), " (shape ", t.sizes(), ")");
  TORCH_CHECK_VALUE(t.size(1) >= 1 && t.size(-1) >= 1, fn, ": ", name,
                    " must have at least 1 head and head dimension 1, got shape ", t.sizes());
  check_last_stride(fn, name, t);
}

// A float tensor of known sizes that follows `like` in dtype and device.
inline void check_float(const char* fn, const char* name, const at::Tensor& t, const char* like_name,
                        const at::Tensor& like, at::IntArrayRef sizes, const char* names) {
  check_like(fn, name, t, like_name, like, like.scalar_type());
  check_sizes(fn, name, t, sizes, names);
  check_last_stride(fn, name, t);
}

inline void check_contiguous(const char* fn, const char* name, const at::Tensor& t, const char* like_name,
                         const at::Tensor& like, at::ScalarType dtype, at::IntArrayRef sizes, const char* names) {
  check_like(fn, name, t, like_name, like, dtype);
  check_sizes(fn, name, t, sizes, names);
  TORCH_CHECK_VALUE(t.is_contiguous(), fn, ": ", name, " must be contiguous, got strides ", t.strides());
}

inline void check_range(const char* fn, const char* name, int64_t x, int64_t low, int64_t high) {
  TORCH_CHECK_VALUE(x >= low, fn, ": ", name, " must be at least ", low, ", got ", x);
  TORCH_CHECK_VALUE(x <= high, fn, ": ", name, " must be at most ", high, ", got ", x);
}

inline void check_padded(const char* fn, const char* name, const std::optional<at::Tensor>& seqlens,
                         const char* like_name, const at::Tensor& like, const Shape& p) {
  if (seqlens) check_contiguous(fn, name, *seqlens, like_name, like, at::kInt, {p.B}, "[B]");
}

// The lengths of an attention. Fills B, N and L where it is packed.
inline void check_lengths(const char* fn, const at::Tensor& query, const Lengths& lengths, Shape& p) {
  if (!is_packed(query)) {
    check_padded(fn, "seqlens_q", lengths.seqlens_q, "query", query, p);
    check_padded(fn, "seqlens_k", lengths.seqlens_k, "query", query, p);
    return;
  }
  TORCH_CHECK_VALUE(lengths.seqlens_q && lengths.seqlens_k && lengths.max_q && lengths.max_k, fn,
                    ": packed tensors need cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k");
  TORCH_CHECK_VALUE(lengths.seqlens_q->dim() == 1 && lengths.seqlens_q->size(0) >= 1, fn,
                    ": cu_seqlens_q must have the shape [B + 1], got ", lengths.seqlens_q->sizes());
  p.B = lengths.seqlens_q->size(0) - 1;
  check_contiguous(fn, "cu_seqlens_q", *lengths.seqlens_q, "query", query, at::kInt, {p.B + 1}, "[B + 1]");
  check_contiguous(fn, "cu_seqlens_k", *lengths.seqlens_k, "query", query, at::kInt, {p.B + 1}, "[B + 1]");
  check_range(fn, "the tokens of query", query.size(0), 0, kMaxPacked);
  check_range(fn, "max_seqlen_q", p.N = *lengths.max_q, 1, kMaxPacked);
  check_range(fn, "max_seqlen_k", p.L = *lengths.max_k, 1, kMaxPacked);
}

// key and value: [B, Hkv, L, D] beside `q` [B, H, *, D], or packed like it. Fills Hkv and, unless packed, L.
inline void check_key_value(const char* fn, const char* q_name, const at::Tensor& q, const at::Tensor& key,
                            const at::Tensor& value, Shape& p) {
  check_like(fn, "key", key, q_name, q, q.scalar_type());
  const bool packed = is_packed(q);
  TORCH_CHECK_VALUE(key.dim() == q.dim(), fn, ": key must have ", q.dim(), " dimensions ",
                    packed ? "[total, Hkv, D]" : "[B, Hkv, L, D]", ", got ", key.dim(), " (shape ", key.sizes(), ")");
  TORCH_CHECK_VALUE(packed || key.size(0) == p.B, fn, ": key must have the batch size of ", q_name, " (", p.B,
                    "), got ", key.size(0));
  TORCH_CHECK_VALUE(key.size(-1) == p.D, fn, ": key must have the head dimension of ", q_name, " (", p.D, "), got ",
                    key.size(-1));
  p.Hkv = key.size(1);
  if (!packed) p.L = key.size(2);
  TORCH_CHECK_VALUE(p.Hkv >= 1 && p.H % p.Hkv == 0, fn, ": the heads of ", q_name, " (", p.H,
                    ") must be a multiple of the heads of key, got ", p.Hkv);
  if (packed) check_range(fn, "the tokens of key", key.size(0), 0, kMaxPacked);
  TORCH_CHECK_VALUE(p.L >= 1, fn, ": key must hold at least 1 token, got shape ", key.sizes());
  check_last_stride(fn, "key", key);
  check_float(fn, "value", value, q_name, q, key.sizes(), packed ? "of key [total, Hkv, D]" : "of key [B, Hkv, L, D]");
}

// landmarks: [B, H, M, D] beside query. Fills M.
inline void check_landmarks(const char* fn, const at::Tensor& query, const at::Tensor& landmarks, Shape& p) {
  check_like(fn, "landmarks", landmarks, "query", query, query.scalar_type());
  TORCH_CHECK_VALUE(landmarks.dim() == 4 && landmarks.size(0) == p.B && landmarks.size(1) == p.H &&
                        landmarks.size(3) == p.D,
                    fn, ": landmarks must have the shape [B, H, M, D] = [", p.B, ", ", p.H, ", M, ", p.D, "], got ",
                    landmarks.sizes());
  p.M = landmarks.size(2);
  check_range(fn, "the number of landmarks", p.M, 1, kMaxLandmarks);
  check_last_stride(fn, "landmarks", landmarks);
}

// `vary`: windows follow the length of each sequence.
inline void check_pooling(const char* fn, at::IntArrayRef num_landmarks, at::IntArrayRef grid, int64_t prefix,
                          bool vary, Shape& p) {
  TORCH_CHECK_VALUE(num_landmarks[0] >= 1 && num_landmarks[1] >= 1, fn,
                    ": num_landmarks must be at least 1 in each direction, got ", num_landmarks);
  TORCH_CHECK_VALUE(num_landmarks[0] <= kMaxLandmarks && num_landmarks[1] <= kMaxLandmarks / num_landmarks[0], fn,
                    ": num_landmarks must be at most ", kMaxLandmarks, " in all, got ", num_landmarks);
  p.M = num_landmarks[0] * num_landmarks[1];
  TORCH_CHECK_VALUE(!vary || (num_landmarks[0] == 1 && grid[0] == 1 && grid[1] == p.N && prefix == 0), fn,
                    ": grid must not be given where the lengths of the queries are, got ", grid);
  TORCH_CHECK_VALUE(grid[0] >= 1 && grid[1] >= 1, fn, ": grid must hold at least 1 token in each direction, got ",
                    grid);
  check_range(fn, "num_prefix_tokens", prefix, 0, p.N);
  TORCH_CHECK_VALUE(grid[0] <= p.N && grid[1] <= (p.N - prefix) / grid[0], fn, ": grid ", grid, " after ", prefix,
                    " prefix tokens must lie within the ", p.N, " tokens of query");
}

inline void check_routes(const char* fn, int64_t routes, bool shared_expert, Shape& p) {
  check_range(fn, "routes", routes, 0, std::min(p.M, kMaxRoutes));
  TORCH_CHECK_VALUE(routes > 0 || shared_expert, fn, ": routes=0 needs shared_expert=True, got False");
  p.s = routes;
}

inline Shape rows_of(const at::Tensor& query) {
  Shape p;
  p.H = query.size(1), p.D = query.size(-1);
  if (!is_packed(query)) p.B = query.size(0), p.N = query.size(2);
  return p;
}

// Everything that attention has to say about tensors that already exist when experts attend.
inline void check_selection(const char* fn, const at::Tensor& query, const at::Tensor& compressed,
                            const at::Tensor& indices, const at::Tensor& experts, bool shared_expert, Shape& p) {
  check_float(fn, "compressed", compressed, "query", query, {p.B, p.H, p.M, p.D}, "[B, H, M, D]");
  TORCH_CHECK_VALUE(indices.dim() == 4, fn, ": indices must have 4 dimensions [B, H, M, K], got ", indices.dim());
  p.K = indices.size(3);
  check_range(fn, "indices.size(3)", p.K, 1, kMaxTopk);
  check_contiguous(fn, "indices", indices, "query", query, at::kInt, {p.B, p.H, p.M, p.K}, "[B, H, M, K]");
  TORCH_CHECK_VALUE(experts.dim() == 4, fn, ": experts must have 4 dimensions [B, H, N, s], got ", experts.dim());
  check_routes(fn, experts.size(3), shared_expert, p);
  check_contiguous(fn, "experts", experts, "query", query, at::kInt, {p.B, p.H, p.N, p.s}, "[B, H, N, s]");
}

inline void check_out(const char* fn, const at::Tensor& dout, const std::optional<at::Tensor>& dlse,
                      const at::Tensor& out, const at::Tensor& lse, const at::Tensor& query, const Shape& p) {
  const auto acc = accumulate_type(query.scalar_type());
  check_float(fn, "dout", dout, "query", query, query.sizes(), "of query");
  check_float(fn, "out", out, "query", query, query.sizes(), "of query");
  check_contiguous(fn, "lse", lse, "query", query, acc, {p.B, p.H, p.N}, "[B, H, N]");
  if (dlse) check_contiguous(fn, "dlse", *dlse, "query", query, acc, {p.B, p.H, p.N}, "[B, H, N]");
}

}  // namespace detail

inline Shape check_pool(const at::Tensor& query, at::IntArrayRef num_landmarks, at::IntArrayRef grid,
                        int64_t num_prefix_tokens, const std::optional<at::Tensor>& seqlens) {
  constexpr auto fn = "mita_ext.pool_landmarks";
  detail::check_first(fn, "query", query);
  Shape p = detail::rows_of(query);
  detail::check_padded(fn, "seqlens", seqlens, "query", query, p);
  detail::check_pooling(fn, num_landmarks, grid, num_prefix_tokens, seqlens.has_value(), p);
  return p;
}

inline Shape check_pool_backward(const at::Tensor& dlandmarks, int64_t N, at::IntArrayRef num_landmarks,
                                 at::IntArrayRef grid, int64_t num_prefix_tokens,
                                 const std::optional<at::Tensor>& seqlens) {
  constexpr auto fn = "mita_ext.pool_landmarks backward";
  detail::check_first(fn, "dlandmarks", dlandmarks);
  Shape p = detail::rows_of(dlandmarks);
  p.N = N;
  detail::check_padded(fn, "seqlens", seqlens, "dlandmarks", dlandmarks, p);
  detail::check_pooling(fn, num_landmarks, grid, num_prefix_tokens, seqlens.has_value(), p);
  detail::check_sizes(fn, "dlandmarks", dlandmarks, {p.B, p.H, p.M, p.D}, "[B, H, M, D]");
  return p;
}

inline Shape check_landmark_topk(const at::Tensor& landmarks, const at::Tensor& key, const at::Tensor& value,
                                 int64_t topk, const std::optional<at::Tensor>& seqlens_k) {
  constexpr auto fn = "mita_ext.landmark_topk";
  detail::check_first(fn, "landmarks", landmarks);
  Shape p = detail::rows_of(landmarks);
  p.M = p.N, p.N = 0;
  detail::check_range(fn, "the number of landmarks", p.M, 1, kMaxLandmarks);
  detail::check_padded(fn, "seqlens_k", seqlens_k, "landmarks", landmarks, p);
  detail::check_key_value(fn, "landmarks", landmarks, key, value, p);
  detail::check_range(fn, "topk", topk, 1, kMaxTopk);
  p.K = std::min(topk, p.L);
  return p;
}

inline Shape check_landmark_topk_backward(const at::Tensor& dcompressed, const std::optional<at::Tensor>& dlse,
                                          const at::Tensor& landmarks, const at::Tensor& key, const at::Tensor& value,
                                          const at::Tensor& compressed, const at::Tensor& lse,
                                          const std::optional<at::Tensor>& seqlens_k) {
  constexpr auto fn = "mita_ext.landmark_topk backward";
  Shape p = check_landmark_topk(landmarks, key, value, 1, seqlens_k);
  p.K = 0;
  const auto acc = accumulate_type(landmarks.scalar_type());
  const at::IntArrayRef sizes = landmarks.sizes();
  detail::check_float(fn, "dcompressed", dcompressed, "landmarks", landmarks, sizes, "[B, H, M, D]");
  detail::check_float(fn, "compressed", compressed, "landmarks", landmarks, sizes, "[B, H, M, D]");
  detail::check_contiguous(fn, "lse", lse, "landmarks", landmarks, acc, {p.B, p.H, p.M}, "[B, H, M]");
  if (dlse) detail::check_contiguous(fn, "dlse", *dlse, "landmarks", landmarks, acc, {p.B, p.H, p.M}, "[B, H, M]");
  return p;
}

inline Shape check_route(const at::Tensor& query, const at::Tensor& landmarks, int64_t routes) {
  constexpr auto fn = "mita_ext.route";
  detail::check_first(fn, "query", query);
  Shape p = detail::rows_of(query);
  detail::check_landmarks(fn, query, landmarks, p);
  detail::check_routes(fn, routes, true, p);
  return p;
}

// p.K = indices.size(3), which may exceed L: an index outside [0, L) is an empty slot, wherever it stands.
inline Shape check_expert_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                    const at::Tensor& landmarks, const at::Tensor& compressed,
                                    const at::Tensor& indices, const at::Tensor& experts, bool shared_expert) {
  constexpr auto fn = "mita_ext.expert_attention";
  detail::check_first(fn, "query", query);
  Shape p = detail::rows_of(query);
  detail::check_key_value(fn, "query", query, key, value, p);
  detail::check_landmarks(fn, query, landmarks, p);
  detail::check_selection(fn, query, compressed, indices, experts, shared_expert, p);
  return p;
}

inline Shape check_expert_attention_backward(const at::Tensor& dout, const std::optional<at::Tensor>& dlse,
                                             const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                             const at::Tensor& landmarks, const at::Tensor& compressed,
                                             const at::Tensor& indices, const at::Tensor& experts,
                                             const at::Tensor& out, const at::Tensor& lse, bool shared_expert) {
  const Shape p =
      check_expert_attention(query, key, value, landmarks, compressed, indices, experts, shared_expert);
  detail::check_out("mita_ext.expert_attention backward", dout, dlse, out, lse, query, p);
  return p;
}

inline const char* attention_name(const at::Tensor& query, bool backward = false) {
  if (is_packed(query)) return backward ? "mita_ext.attention_varlen backward" : "mita_ext.attention_varlen";
  return backward ? "mita_ext.attention backward" : "mita_ext.attention";
}

inline Shape check_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                             const std::optional<at::Tensor>& landmarks, at::IntArrayRef num_landmarks,
                             at::IntArrayRef grid, int64_t num_prefix_tokens, int64_t topk, int64_t routes,
                             bool shared_expert, const Lengths& lengths) {
  const char* fn = attention_name(query);
  detail::check_first(fn, "query", query, true);
  Shape p = detail::rows_of(query);
  detail::check_lengths(fn, query, lengths, p);
  detail::check_key_value(fn, "query", query, key, value, p);
  if (landmarks) {
    detail::check_landmarks(fn, query, *landmarks, p);
  } else {
    detail::check_pooling(fn, num_landmarks, grid, num_prefix_tokens, lengths.seqlens_q.has_value(), p);
  }
  detail::check_range(fn, "topk", topk, 1, kMaxTopk);
  p.K = std::min(topk, p.L);
  detail::check_routes(fn, routes, shared_expert, p);
  return p;
}

inline Shape check_attention_backward(const at::Tensor& dout, const std::optional<at::Tensor>& dlse,
                                      const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                      const at::Tensor& landmarks, const at::Tensor& indices,
                                      const at::Tensor& experts, const at::Tensor& groups, const at::Tensor& compressed,
                                      const at::Tensor& landmark_lse, const at::Tensor& out, const at::Tensor& lse,
                                      bool pooled, at::IntArrayRef num_landmarks, at::IntArrayRef grid,
                                      int64_t num_prefix_tokens, bool shared_expert, const Lengths& lengths) {
  const char* fn = attention_name(query, true);
  detail::check_first(fn, "query", query, true);
  Shape p = detail::rows_of(query);
  detail::check_lengths(fn, query, lengths, p);
  detail::check_key_value(fn, "query", query, key, value, p);
  detail::check_landmarks(fn, query, landmarks, p);
  detail::check_selection(fn, query, compressed, indices, experts, shared_expert, p);
  detail::check_out(fn, dout, dlse, out, lse, query, p);
  detail::check_contiguous(fn, "landmark_lse", landmark_lse, "query", query, accumulate_type(query.scalar_type()),
                       {p.B, p.H, p.M}, "[B, H, M]");
  detail::check_contiguous(fn, "groups", groups, "query", query, at::kInt, {groups.numel()}, "[numbers]");
  if (pooled) {
    Shape pooling = p;
    detail::check_pooling(fn, num_landmarks, grid, num_prefix_tokens, lengths.seqlens_q.has_value(), pooling);
    TORCH_CHECK_VALUE(pooling.M == p.M, fn, ": num_landmarks must multiply to the number of landmarks (", p.M,
                      "), got ", num_landmarks);
  }
  return p;
}

// What the CUDA kernels do not take although the CPU does. `fn` as in the messages above.
inline void check_cuda_limits(const char* fn, const Shape& p, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype != at::kDouble, fn, ": float64 is computed on the CPU only; use float32, float16 or bfloat16");
  TORCH_CHECK_VALUE(p.D % kCudaHeadDimStep == 0 && p.D <= kMaxCudaHeadDim, fn,
                    ": the head dimension must be a multiple of ", kCudaHeadDimStep, " and at most ", kMaxCudaHeadDim,
                    " on CUDA, got ", p.D);
}

}  // namespace mita
