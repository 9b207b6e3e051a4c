// The ops of mita_ext: their schemas, and the Python module _C that registers them by being imported.
// No logic here. The backends: cpu/mita_cpu.cpp and cuda/mita_cuda.cpp; shape-only fakes: mita_ext/ops.py.

#include <torch/extension.h>
#include <torch/library.h>
#include <torch/version.h>

#include <sstream>
#include <string>
#include <vector>

#include "checks.h"

// Names as everywhere: B batch, H query heads, Hkv key/value heads, N queries, L keys, M landmarks, K keys per expert,
// s experts per query (routes), D head dimension. 1-D pooling comes as the grid (1, N) with (1, M) landmarks.
// seqlens: int32 lengths [B] of sequences that are padded on the right. attention takes packed ones, too: query, key and
// value [total, heads, D], with prefix sums [B + 1] as seqlens and no sequence longer than max_seqlen. lse and experts are
// as those of a padded batch, with N = max_seqlen_q.
TORCH_LIBRARY(mita_ext, m) {
  m.def(
      "pool(Tensor query, SymInt[2] num_landmarks, SymInt[2] grid, SymInt num_prefix_tokens, Tensor? seqlens=None)"
      " -> Tensor");
  m.def(
      "pool_backward(Tensor dlandmarks, SymInt N, SymInt[2] num_landmarks, SymInt[2] grid, SymInt num_prefix_tokens,"
      " Tensor? seqlens=None) -> Tensor");

  m.def(
      "landmark_topk(Tensor landmarks, Tensor key, Tensor value, SymInt topk, float scale, Tensor? seqlens_k=None)"
      " -> (Tensor indices, Tensor compressed, Tensor lse)");
  m.def(
      "landmark_topk_backward(Tensor dcompressed, Tensor? dlse, Tensor landmarks, Tensor key, Tensor value,"
      " Tensor compressed, Tensor lse, float scale, Tensor? seqlens_k=None)"
      " -> (Tensor dlandmarks, Tensor dkey, Tensor dvalue)");

  m.def("route(Tensor query, Tensor landmarks, SymInt routes) -> Tensor experts");

  m.def(
      "expert_attention(Tensor query, Tensor key, Tensor value, Tensor landmarks, Tensor compressed, Tensor indices,"
      " Tensor experts, bool shared_expert, float scale, float landmark_scale) -> (Tensor out, Tensor lse)");
  m.def(
      "expert_attention_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor landmarks,"
      " Tensor compressed, Tensor indices, Tensor experts, Tensor out, Tensor lse, bool shared_expert, float scale,"
      " float landmark_scale)"
      " -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dlandmarks, Tensor dcompressed)");

  // All stages at once. The output `landmarks` holds the pooled landmarks, or is empty [0] when they were given. groups: the queries of
  // each expert, as attention_backward takes them, or empty [0]: then it makes them again.
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? landmarks, SymInt[2] num_landmarks, SymInt[2] grid,"
      " SymInt num_prefix_tokens, SymInt topk, SymInt routes, bool shared_expert, float scale, float landmark_scale,"
      " Tensor? seqlens_q=None, Tensor? seqlens_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None)"
      " -> (Tensor out, Tensor lse, Tensor landmarks, Tensor indices, Tensor experts, Tensor groups, Tensor compressed,"
      " Tensor landmark_lse)");
  // pooled: the gradient of the landmarks goes on into dquery, and dlandmarks is empty [0]. Without want_keys dkey and
  // dvalue are empty, without want_landmarks dlandmarks is, and nothing goes on into dquery: they are not computed.
  m.def(
      "attention_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor landmarks,"
      " Tensor indices, Tensor experts, Tensor groups, Tensor compressed, Tensor landmark_lse, Tensor out, Tensor lse, bool pooled,"
      " SymInt[2] num_landmarks, SymInt[2] grid, SymInt num_prefix_tokens, bool shared_expert, float scale,"
      " float landmark_scale, bool want_keys, bool want_landmarks, Tensor? seqlens_q=None, Tensor? seqlens_k=None,"
      " SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None) -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dlandmarks)");
}

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch_version"] = TORCH_VERSION;
  std::vector<std::string> archs;
  std::vector<int64_t> head_dims;  // what CUDA is compiled for; the CPU takes any
#ifdef MITA_WITH_CUDA
  info["cuda"] = true;
  info["cuda_version"] = MITA_CUDA_VERSION;
  std::istringstream list(MITA_CUDA_ARCHS);
  for (std::string arch; std::getline(list, arch, ';');) archs.push_back(arch);
  info["dtypes"] = std::vector<std::string>{"bfloat16", "float16", "float32"};
  for (int64_t D = mita::kCudaHeadDimStep; D <= mita::kMaxCudaHeadDim; D += mita::kCudaHeadDimStep)
    head_dims.push_back(D);
#else
  info["cuda"] = false;
  info["cuda_version"] = pybind11::none();
  info["dtypes"] = std::vector<std::string>{"bfloat16", "float16", "float32", "float64"};
#endif
#ifdef _OPENMP  // without it at::parallel_for is a plain loop, and nothing else tells
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["archs"] = archs;
  info["head_dims"] = head_dims;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Importing this module registers the ops of mita_ext.";
  m.def("build_info", &build_info, "What this build holds: torch and CUDA versions, architectures, dtypes, head dims.");
}
