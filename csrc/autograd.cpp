// The gradients of the ops: their kernels at the key Autograd, between the schemas and the backends. No mathematics.
//
// Each op calls itself below autograd and saves inputs, selections, outputs and logsumexps, never probabilities; its
// backward calls the op of its gradients. Selections (indices, experts) are constants, gradients once differentiable.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using OptionalSymInt = std::optional<SymInt>;

// ---- Calls -----------------------------------------------------------------------------------------------------------

template <class T>
constexpr bool is_tensor = std::is_same_v<T, Tensor> || std::is_same_v<T, OptionalTensor>;

// Calls an op as if no gradient were wanted. The arguments have the very types of its schema.
template <class Result, class... Args>
Result call(const char* op, const Args&... args) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  using Signature = Result(std::conditional_t<is_tensor<Args>, const Args&, Args>...);
  return c10::Dispatcher::singleton().findSchemaOrThrow(op, "").typed<Signature>().call(args...);
}

// Between the results of ops and the lists of autograd.
variable_list list_of(const Tensor& result) { return {result}; }

template <class... Tensors>
variable_list list_of(const std::tuple<Tensors...>& results) {
  return std::apply([](const auto&... x) { return variable_list{x...}; }, results);
}

template <class Result>
Result result_of(const variable_list& list) {
  if constexpr (std::is_same_v<Result, Tensor>) {
    return list[0];
  } else {
    Result results;
    size_t i = 0;
    std::apply([&](auto&... x) { ((x = list[i++]), ...); }, results);
    return results;
  }
}

template <class T>
bool has_tangent(const T& x) {
  if constexpr (std::is_same_v<T, Tensor>) return x.defined() && x._fw_grad(0).defined();
  if constexpr (std::is_same_v<T, OptionalTensor>) return x && has_tangent(*x);
  return false;
}

// The kernel of an op at the key Autograd: F, whose forward takes the arguments of the op.
template <class F, class... Args>
auto kernel_of(variable_list (*)(AutogradContext*, Args...)) {
  return +[](Args... args) {
    TORCH_CHECK_NOT_IMPLEMENTED(!(... || has_tangent(args)),
                                "mita_ext: forward mode differentiation is not supported; use torch.autograd.grad or backward");
    return result_of<typename F::Result>(F::apply(args...));
  };
}

// ---- Gradients -------------------------------------------------------------------------------------------------------

OptionalTensor if_defined(const Tensor& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; }

// The gradient of an output, as the ops take it: always there, its last dimension contiguous.
Tensor incoming(const Tensor& dout, const Tensor& out) {
  if (!dout.defined()) return at::zeros_like(out);
  return dout.sym_stride(-1) == 1 ? dout : dout.contiguous();
}

// That of a logsumexp: contiguous, or absent.
OptionalTensor incoming_lse(const Tensor& dlse) {
  return dlse.defined() ? OptionalTensor(dlse.contiguous()) : std::nullopt;
}

// One gradient per argument of an op, from those of the tensors that come first: undefined where none is needed, and for
// every option.
template <class... Args>
variable_list wanted(variable_list (*)(AutogradContext*, Args...), const AutogradContext* ctx, variable_list grads) {
  for (size_t i = 0; i < grads.size(); ++i)
    if (!ctx->needs_input_grad(i)) grads[i] = Tensor();
  grads.resize(sizeof...(Args));
  return grads;
}

void refuse_second_derivative() {
  TORCH_CHECK(!at::GradMode::is_enabled(),
              "mita_ext: a second derivative is not defined; differentiate without create_graph=True (transforms of"
              " torch.func are not supported: they ask for one)");
}

struct Pool : Function<Pool> {
  using Result = Tensor;

  static variable_list forward(AutogradContext* ctx, const Tensor& query, SymIntArrayRef num_landmarks,
                               SymIntArrayRef grid, SymInt num_prefix_tokens, const OptionalTensor& seqlens) {
    ctx->saved_data["N"] = query.sym_size(2);
    ctx->saved_data["num_landmarks"] = num_landmarks;
    ctx->saved_data["grid"] = grid;
    ctx->saved_data["num_prefix_tokens"] = num_prefix_tokens;
    ctx->save_for_backward({seqlens.value_or(Tensor())});
    return list_of(call<Result>("mita_ext::pool", query, num_landmarks, grid, num_prefix_tokens, seqlens));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_second_derivative();
    const auto num_landmarks = ctx->saved_data["num_landmarks"].toSymIntVector();
    const auto grid = ctx->saved_data["grid"].toSymIntVector();
    const Tensor dquery = call<Tensor>("mita_ext::pool_backward", incoming(grads[0], grads[0]),
                                       ctx->saved_data["N"].toSymInt(), SymIntArrayRef(num_landmarks),
                                       SymIntArrayRef(grid), ctx->saved_data["num_prefix_tokens"].toSymInt(),
                                       if_defined(ctx->get_saved_variables()[0]));
    return wanted(&forward, ctx, {dquery});
  }
};

struct LandmarkTopk : Function<LandmarkTopk> {
  using Result = std::tuple<Tensor, Tensor, Tensor>;

  static variable_list forward(AutogradContext* ctx, const Tensor& landmarks, const Tensor& key, const Tensor& value,
                               SymInt topk, double scale, const OptionalTensor& seqlens_k) {
    const auto result = call<Result>("mita_ext::landmark_topk", landmarks, key, value, topk, scale, seqlens_k);
    const auto& [indices, compressed, lse] = result;
    ctx->saved_data["scale"] = scale;
    ctx->mark_non_differentiable({indices});
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({landmarks, key, value, compressed, lse, seqlens_k.value_or(Tensor())});
    return list_of(result);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_second_derivative();
    if (!grads[1].defined() && !grads[2].defined()) return wanted(&forward, ctx, {});
    const variable_list saved = ctx->get_saved_variables();
    return wanted(&forward, ctx,
                  list_of(call<std::tuple<Tensor, Tensor, Tensor>>(
                      "mita_ext::landmark_topk_backward", incoming(grads[1], saved[3]), incoming_lse(grads[2]),
                      saved[0], saved[1], saved[2], saved[3], saved[4], ctx->saved_data["scale"].toDouble(),
                      if_defined(saved[5]))));
  }
};

struct ExpertAttention : Function<ExpertAttention> {
  using Result = std::tuple<Tensor, Tensor>;

  static variable_list forward(AutogradContext* ctx, const Tensor& query, const Tensor& key, const Tensor& value,
                               const Tensor& landmarks, const Tensor& compressed, const Tensor& indices,
                               const Tensor& experts, bool shared_expert, double scale, double landmark_scale) {
    const auto result = call<Result>("mita_ext::expert_attention", query, key, value, landmarks, compressed, indices,
                                     experts, shared_expert, scale, landmark_scale);
    const auto& [out, lse] = result;
    ctx->saved_data["shared_expert"] = shared_expert;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["landmark_scale"] = landmark_scale;
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({query, key, value, landmarks, compressed, indices, experts, out, lse});
    return list_of(result);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_second_derivative();
    if (!grads[0].defined() && !grads[1].defined()) return wanted(&forward, ctx, {});
    const variable_list saved = ctx->get_saved_variables();
    return wanted(&forward, ctx,
                  list_of(call<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>>(
                      "mita_ext::expert_attention_backward", incoming(grads[0], saved[7]), incoming_lse(grads[1]),
                      saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6], saved[7], saved[8],
                      ctx->saved_data["shared_expert"].toBool(), ctx->saved_data["scale"].toDouble(),
                      ctx->saved_data["landmark_scale"].toDouble())));
  }
};

struct Attention : Function<Attention> {
  using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

  static variable_list forward(AutogradContext* ctx, const Tensor& query, const Tensor& key, const Tensor& value,
                               const OptionalTensor& given, SymIntArrayRef num_landmarks, SymIntArrayRef grid,
                               SymInt num_prefix_tokens, SymInt topk, SymInt routes, bool shared_expert, double scale,
                               double landmark_scale, const OptionalTensor& seqlens_q, const OptionalTensor& seqlens_k,
                               OptionalSymInt max_seqlen_q, OptionalSymInt max_seqlen_k) {
    const auto result = call<Result>("mita_ext::attention", query, key, value, given, num_landmarks, grid,
                                     num_prefix_tokens, topk, routes, shared_expert, scale, landmark_scale, seqlens_q,
                                     seqlens_k, max_seqlen_q, max_seqlen_k);
    const auto& [out, lse, pooled, indices, experts, groups, compressed, landmark_lse] = result;
    ctx->saved_data["pooled"] = !given.has_value();
    ctx->saved_data["num_landmarks"] = num_landmarks;
    ctx->saved_data["grid"] = grid;
    ctx->saved_data["num_prefix_tokens"] = num_prefix_tokens;
    ctx->saved_data["shared_expert"] = shared_expert;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["landmark_scale"] = landmark_scale;
    ctx->saved_data["max_seqlen_q"] = max_seqlen_q;
    ctx->saved_data["max_seqlen_k"] = max_seqlen_k;
    ctx->mark_non_differentiable({pooled, indices, experts, groups, compressed, landmark_lse});
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({query, key, value, given ? *given : pooled, indices, experts, groups, compressed,
                            landmark_lse, out, lse, seqlens_q.value_or(Tensor()), seqlens_k.value_or(Tensor())});
    return list_of(result);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_second_derivative();
    if (!grads[0].defined() && !grads[1].defined()) return wanted(&forward, ctx, {});
    const variable_list saved = ctx->get_saved_variables();
    auto& option = ctx->saved_data;
    const bool pooled = option["pooled"].toBool();
    const auto num_landmarks = option["num_landmarks"].toSymIntVector(), grid = option["grid"].toSymIntVector();
    const bool want_keys = ctx->needs_input_grad(1) || ctx->needs_input_grad(2);
    const bool want_landmarks = ctx->needs_input_grad(pooled ? 0 : 3);
    variable_list results = list_of(call<std::tuple<Tensor, Tensor, Tensor, Tensor>>(
        "mita_ext::attention_backward", incoming(grads[0], saved[9]), incoming_lse(grads[1]), saved[0], saved[1], saved[2],
        saved[3], saved[4], saved[5], saved[6], saved[7], saved[8], saved[9], saved[10], pooled,
        SymIntArrayRef(num_landmarks), SymIntArrayRef(grid), option["num_prefix_tokens"].toSymInt(),
        option["shared_expert"].toBool(), option["scale"].toDouble(), option["landmark_scale"].toDouble(), want_keys,
        want_landmarks, if_defined(saved[11]), if_defined(saved[12]), option["max_seqlen_q"].toOptional<SymInt>(),
        option["max_seqlen_k"].toOptional<SymInt>()));
    if (pooled) results.pop_back();  // landmarks were no argument
    return wanted(&forward, ctx, results);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(mita_ext, Autograd, m) {
  m.impl("pool", kernel_of<Pool>(&Pool::forward));
  m.impl("landmark_topk", kernel_of<LandmarkTopk>(&LandmarkTopk::forward));
  m.impl("expert_attention", kernel_of<ExpertAttention>(&ExpertAttention::forward));
  m.impl("attention", kernel_of<Attention>(&Attention::forward));
}
