// Linear layers on the CPU: host side of linear_cpu.h.
#include <tuple>

#include "host.h"
#include "parallel.h"

namespace d2r_fast {
namespace {

struct LinearSizes {
  int64_t n_nets, n_rows, n_in, n_out;
  int64_t x_net;  // from one network's rows of x to the next's; 0 where all read the same
};

// x is [E,B,in], or [B,in] for all networks alike.
LinearSizes linear_sizes(const Tensor& x, const Tensor& weight) {
  const bool shared = x.dim() == 2;
  check(shared || x.dim() == 3, "x: expected [E,B,in] or [B,in], got ", shape_text(x.sizes()));
  check(weight.dim() == 3, "weight: expected [E,out,in], got ", shape_text(weight.sizes()));
  LinearSizes s{weight.size(0), x.size(shared ? 0 : 1), weight.size(2), weight.size(1), 0};
  if (!shared) s.x_net = s.n_rows * s.n_in;
  check_width("in", s.n_in);
  check_width("out", s.n_out);
  const ScalarType real = x.scalar_type();
  if (shared)
    check_tensor("x", x, real, {s.n_rows, s.n_in});
  else
    check_tensor("x", x, real, {s.n_nets, s.n_rows, s.n_in});
  check_tensor("weight", weight, real, {s.n_nets, s.n_out, s.n_in});
  return s;
}

Tensor ensemble_linear(Tensor x, Tensor weight, Tensor bias, bool relu, Precision precision) {
  x = readable(x), weight = readable(weight), bias = readable(bias);
  const LinearSizes s = linear_sizes(x, weight);
  const ScalarType real = x.scalar_type();
  check_tensor("bias", bias, real, {s.n_nets, s.n_out});
  Tensor y = fresh(x, {s.n_nets, s.n_rows, s.n_out});
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>(precision);
    const auto run = [&](const std::byte* panels, int64_t net, int64_t first, int64_t n_rows) {
      const Layer<T> layer{s.n_in, s.n_out, relu, panels, const_data<T>(bias) + net * s.n_out};
      kernel.linear_forward(layer, n_rows, const_data<T>(x) + net * s.x_net + first * s.n_in, s.n_in,
                            data<T>(y) + (net * s.n_rows + first) * s.n_out);
    };
    // Of networks enough for all threads, one for each of them at a time.
    if (s.n_nets >= 2 * static_cast<int64_t>(torch::stable::get_num_threads())) {
      const WeightInTurn<T> panels(kernel, const_data<T>(weight), s.n_out, s.n_in, false);
      return for_each_block(s.n_nets, [&](int64_t net) {
        for_each_even_block(s.n_rows, blocks_of(s.n_rows), [&](int64_t first, int64_t n_rows) {
          run(panels.of(net), net, first, n_rows);
        });
      });
    }
    const auto panels = pack_weights(kernel, const_data<T>(weight), s.n_nets, s.n_out, s.n_in, false);
    const size_t bytes = kernel.packed_bytes(s.n_in, s.n_out);
    for_each_row_block(s.n_nets, s.n_rows, [&](int64_t net, int64_t first, int64_t n_rows) {
      run(panels.get() + net * bytes, net, first, n_rows);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> ensemble_linear_backward(Tensor d_y, Tensor x, Tensor weight, Tensor y, bool relu,
                                                            Precision precision, bool to_x, bool to_weight) {
  d_y = readable(d_y), x = readable(x), weight = readable(weight), y = readable(y);
  const LinearSizes s = linear_sizes(x, weight);
  const ScalarType real = x.scalar_type();
  check_tensor("d_y", d_y, real, {s.n_nets, s.n_rows, s.n_out});
  check_tensor("y", y, real, {s.n_nets, s.n_rows, s.n_out});
  Tensor d_x = fresh(x, {s.n_nets, s.n_rows, s.n_in}, to_x);
  Tensor d_weight = fresh(x, {s.n_nets, s.n_out, s.n_in}, to_weight), d_bias = fresh(x, {s.n_nets, s.n_out}, to_weight);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>(precision);
    const WeightInTurn<T> panels(kernel, const_data<T>(weight), s.n_out, s.n_in, true);
    const std::vector<Gradient<T>> gradients{{to_weight ? data<T>(d_weight) : nullptr, s.n_out * s.n_in},
                                             {to_weight ? data<T>(d_bias) : nullptr, s.n_out}};
    sum_over_rows(s.n_nets, s.n_rows, s.n_rows, gradients, [](int64_t, int64_t) { return 1; },
                  [&](int64_t net, int64_t first, int64_t n_rows, T* const* sums) {
                    const int64_t row = net * s.n_rows + first;
                    const Layer<T> layer{s.n_in, s.n_out, relu, to_x ? panels.of(net) : nullptr, nullptr};
                    kernel.linear_backward(layer, n_rows, const_data<T>(d_y) + row * s.n_out,
                                           const_data<T>(x) + net * s.x_net + first * s.n_in, s.n_in,
                                           relu ? const_data<T>(y) + row * s.n_out : nullptr,
                                           to_x ? data<T>(d_x) + row * s.n_in : nullptr, sums[0], sums[1]);
                  });
  });
  return {to_x && x.dim() == 2 ? sum_over_nets(d_x) : d_x, d_weight, d_bias};
}

STABLE_TORCH_LIBRARY_IMPL(d2r_fast, CPU, m) {
  m.impl("ensemble_linear", TORCH_BOX(&ensemble_linear));
  m.impl("ensemble_linear_backward", TORCH_BOX(&ensemble_linear_backward));
}

}  // namespace
}  // namespace d2r_fast
