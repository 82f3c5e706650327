// Linear layers on the CPU: host side of linear_cpu.h.
#include "operations.h"
#include "parallel.h"

namespace d2r_fast {
namespace {

// x is [E,B,in], or [B,in] for all networks alike.
LinearSizes linear_sizes(const Tensor& x, const Tensor& weight, bool relu) {
  const bool shared = x.dim() == 2;
  const LinearSizes s{weight.size(0), x.size(shared ? 0 : 1), weight.size(2), weight.size(1), relu};
  STD_TORCH_CHECK(s.n_in <= kMaxWidth && s.n_out <= kMaxWidth, "linear: expected widths of at most ", kMaxWidth, ", got ",
                  s.n_in, " and ", s.n_out);
  check_numel("x", x, (shared ? 1 : s.n_nets) * s.n_rows * s.n_in);
  check_numel("weight", weight, s.n_nets * s.n_out * s.n_in);
  return s;
}

}  // namespace

void linear(Tensor x, Tensor weight, Tensor bias, bool relu, bool bf16, Tensor y) {
  const LinearSizes s = linear_sizes(x, weight, relu);
  check_numel("bias", bias, s.n_nets * s.n_out);
  check_numel("y", y, s.n_nets * s.n_rows * s.n_out);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>(bf16);
    const auto panels = pack_weights(kernel, const_data<T>(weight), s.n_nets, s.n_out, s.n_in, false);
    const LinearArgs<T> args{s, const_data<T>(x), x.dim() == 2 ? 0 : s.n_rows * s.n_in, panels.get(), const_data<T>(bias),
                             data<T>(y)};
    for_each_row_block(s.n_nets, s.n_rows, [&](int64_t net, int64_t first, int64_t n_rows) {
      kernel.linear_forward(args, net, first, n_rows);
    });
  });
}

void linear_backward(Tensor d_y, Tensor x, Tensor weight, Tensor y, bool relu, bool bf16, Tensor d_x, Tensor d_weight,
                     Tensor d_bias) {
  const LinearSizes s = linear_sizes(x, weight, relu);
  const bool to_x = d_x.numel() > 0, to_weight = d_weight.numel() > 0;
  check_numel("d_y", d_y, s.n_nets * s.n_rows * s.n_out);
  if (relu) check_numel("y", y, s.n_nets * s.n_rows * s.n_out);
  if (to_x) check_numel("d_x", d_x, s.n_nets * s.n_rows * s.n_in);
  if (to_weight) check_numel("d_weight", d_weight, s.n_nets * s.n_out * s.n_in);
  if (to_weight) check_numel("d_bias", d_bias, s.n_nets * s.n_out);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>(bf16);
    std::unique_ptr<std::byte[]> panels;
    if (to_x) panels = pack_weights(kernel, const_data<T>(weight), s.n_nets, s.n_out, s.n_in, true);
    const LinearBackwardArgs<T> args{s,
                                     const_data<T>(d_y),
                                     const_data<T>(x),
                                     x.dim() == 2 ? 0 : s.n_rows * s.n_in,
                                     relu ? const_data<T>(y) : nullptr,
                                     panels.get(),
                                     to_x ? data<T>(d_x) : nullptr};
    const GradientSums<T> sums{to_weight ? data<T>(d_weight) : nullptr, s.n_out * s.n_in,
                               to_weight ? data<T>(d_bias) : nullptr, s.n_out};
    if (to_weight && s.n_rows == 0) {
      std::fill_n(sums.weight, s.n_nets * sums.net_weights, T(0));
      std::fill_n(sums.bias, s.n_nets * sums.net_biases, T(0));
      return;
    }
    sum_over_rows(s.n_nets, s.n_rows, sums, [](int64_t) { return 1; },
                  [&](int64_t net, int64_t first, int64_t n_rows, T* weight_sum, T* bias_sum) {
                    kernel.linear_backward(args, net, first, n_rows, weight_sum, bias_sum);
                  });
  });
}

}  // namespace d2r_fast
