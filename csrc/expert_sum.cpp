// Sums of experts on the CPU: host side of expert_sum_cpu.h.
#include <tuple>

#include "host.h"
#include "parallel.h"

namespace d2r_fast {
namespace {

template <typename T>
ExpertSumArgs<T> expert_args(const Tensor& v, const Tensor& weight, bool orthogonal, double norm_epsilon) {
  check(v.dim() == 4, "v: expected [E,B,N,D], got ", shape_text(v.sizes()));
  check(v.size(2) >= 1, "v: expected one or more experts, got none");
  check_tensor("v", v, v.scalar_type(), {v.size(0), v.size(1), v.size(2), v.size(3)});
  check_tensor("weight", weight, v.scalar_type(), {v.size(0), v.size(1), v.size(2)});
  return {v.size(2), v.size(3), const_data<T>(v), const_data<T>(weight), orthogonal, static_cast<T>(norm_epsilon)};
}

// The same for rows first.. on.
template <typename T>
ExpertSumArgs<T> from_row(ExpertSumArgs<T> args, int64_t first) {
  args.v += first * args.n_experts * args.width;
  args.weight += first * args.n_experts;
  return args;
}

Tensor expert_sum(Tensor v, Tensor weight, bool orthogonal, double norm_epsilon) {
  v = readable(v), weight = readable(weight);
  check(v.dim() == 4, "v: expected [E,B,N,D], got ", shape_text(v.sizes()));
  Tensor y = fresh(v, {v.size(0), v.size(1), v.size(3)});
  with_dtype(v, [&](auto zero) {
    using T = decltype(zero);
    const ExpertSumArgs<T> args = expert_args<T>(v, weight, orthogonal, norm_epsilon);
    for_each_row_block(1, v.size(0) * v.size(1), [&](int64_t, int64_t first, int64_t n_rows) {
      kernels<T>().expert_sum(from_row(args, first), n_rows, data<T>(y) + first * args.width);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> expert_sum_backward(Tensor d_y, Tensor v, Tensor weight, bool orthogonal, double norm_epsilon) {
  d_y = readable(d_y), v = readable(v), weight = readable(weight);
  check(v.dim() == 4, "v: expected [E,B,N,D], got ", shape_text(v.sizes()));
  check_tensor("d_y", d_y, v.scalar_type(), {v.size(0), v.size(1), v.size(3)});
  Tensor d_v = fresh(v, {v.size(0), v.size(1), v.size(2), v.size(3)});
  Tensor d_weight = fresh(v, {v.size(0), v.size(1), v.size(2)});
  with_dtype(v, [&](auto zero) {
    using T = decltype(zero);
    const ExpertSumArgs<T> args = expert_args<T>(v, weight, orthogonal, norm_epsilon);
    for_each_row_block(1, v.size(0) * v.size(1), [&](int64_t, int64_t first, int64_t n_rows) {
      kernels<T>().expert_sum_backward(from_row(args, first), n_rows, const_data<T>(d_y) + first * args.width,
                                       data<T>(d_v) + first * args.n_experts * args.width,
                                       data<T>(d_weight) + first * args.n_experts);
    });
  });
  return {d_v, d_weight};
}

STABLE_TORCH_LIBRARY_IMPL(d2r_fast, CPU, m) {
  m.impl("expert_sum", TORCH_BOX(&expert_sum));
  m.impl("expert_sum_backward", TORCH_BOX(&expert_sum_backward));
}

}  // namespace
}  // namespace d2r_fast
