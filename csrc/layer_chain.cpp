// Chains of linear layers on the CPU: host side of layer_chain_cpu.h.
#include <tuple>

#include "layer_lists.h"

namespace d2r_fast {
namespace {

struct Chain {
  int64_t n_nets, n_layers, n_side, n_rows, n_in, n_out, x_net;
  int64_t n_kept;  // numbers that backward needs of the layers before the last
  std::vector<LayerShape> shapes;
};

// Checks everything. Rows of x, [B,in] for all networks alike or [E,B,in], may be columns of a wider matrix.
Chain chain_sizes(Tensor& x, std::vector<Tensor>& parameters) {
  check(parameters.size() >= 2 && parameters.size() % 2 == 0, "parameters: expected weight and bias of every layer, got ",
        parameters.size(), " tensors");
  const int64_t dim = parameters[0].dim();
  check(dim == 3 || dim == 4, "parameters[0]: expected a weight [E,out,in] or [E,N,out,in], got ",
        shape_text(parameters[0].sizes()));
  check(x.dim() == 2 || x.dim() == 3, "x: expected [B,in] or [E,B,in], got ", shape_text(x.sizes()));
  const int64_t n_nets = parameters[0].size(0), n_side = dim == 4 ? parameters[0].size(1) : 1, n_rows = x.size(x.dim() - 2);
  Chain s{n_nets, static_cast<int64_t>(parameters.size()) / 2, n_side, n_rows, x.size(x.dim() - 1), 0, 0, 0, {}};
  check(n_side >= 1, "parameters[0]: expected one or more layers side by side, got none");
  const ScalarType real = x.scalar_type();
  if (x.dim() == 3) check_shape("x", x, {n_nets, n_rows, s.n_in});
  if (x.dim() == 3 || (s.n_in > 1 && x.stride(1) != 1)) x = readable(x);
  if (x.dim() == 3) s.x_net = n_rows * s.n_in;
  const auto stride = real == ScalarType::Double ? row_stride<double> : row_stride<float>;
  for (int64_t l = 0, n_in = s.n_in; l < s.n_layers; ++l) {
    const Tensor& weight = parameters[2 * l];
    check(weight.dim() == dim && weight.size(dim - 1) == n_in, "parameters[", 2 * l, "]: expected a weight for ", n_in,
          " inputs, got ", shape_text(weight.sizes()));
    if (l > 0) s.n_kept += n_nets * n_side * n_rows * stride(n_in);
    n_in = weight.size(dim - 2);
    s.shapes.push_back({n_side, n_in, weight.size(dim - 1)});
  }
  s.n_out = s.shapes.back().n_out;
  check_layers(parameters, s.shapes, n_nets, real);
  return s;
}

template <typename T>
PackedLayers<T> pack_chain(const Kernels<T>& kernel, const Chain& s, const std::vector<Tensor>& parameters, bool relu,
                           bool backward) {
  PackedLayers<T> packed = pack_layers(kernel, parameters, s.shapes, s.n_nets, backward);
  for (size_t i = 0; i < packed.layers.size(); ++i)
    packed.layers[i].relu = relu || static_cast<int64_t>(i) / s.n_side % s.n_layers < s.n_layers - 1;
  return packed;
}

template <typename T>
ChainArgs<T> chain_args(const Chain& s, const PackedLayers<T>& packed, const Tensor& x) {
  return {s.n_nets, s.n_layers, s.n_side, s.n_rows, s.n_in, s.n_out, packed.layers.data(), const_data<T>(x), s.x_net,
          x.stride(x.dim() - 2)};
}

// y, and for backward, if `keep`, what the layers before the last gave.
std::tuple<Tensor, Tensor> layer_chain(Tensor x, bool relu, Precision precision, bool keep, std::vector<Tensor> parameters) {
  const Chain s = chain_sizes(x, parameters);
  Tensor y = fresh(x, {s.n_nets, s.n_rows, s.n_side, s.n_out}), kept = fresh(x, {s.n_kept}, keep);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>(precision);
    const PackedLayers<T> packed = pack_chain(kernel, s, parameters, relu, false);
    const ChainForwardArgs<T> args{chain_args(s, packed, x), keep ? data<T>(kept) : nullptr, data<T>(y)};
    for_each_row_block(s.n_nets * s.n_side, s.n_rows, [&](int64_t net, int64_t first, int64_t n_rows) {
      kernel.chain_forward(args, net, first, n_rows);
    });
  });
  return {y, kept};
}

// d_x like x, empty unless `to_x`.
Tensor layer_chain_backward(Tensor d_y, Tensor x, Tensor y, Tensor kept, bool relu, Precision precision, bool to_x,
                            std::vector<Tensor> parameters, std::vector<Tensor> d_parameters) {
  d_y = readable(d_y), y = readable(y), kept = readable(kept);
  const Chain s = chain_sizes(x, parameters);
  const ScalarType real = x.scalar_type();
  check_tensor("d_y", d_y, real, {s.n_nets, s.n_rows, s.n_side, s.n_out});
  check_tensor("y", y, real, {s.n_nets, s.n_rows, s.n_side, s.n_out});
  check_tensor("kept", kept, real, {s.n_kept});
  const bool own = x.dim() == 3 && s.n_side == 1;  // rows that one chain alone reads
  Tensor d_x = own ? fresh(x, {s.n_nets, s.n_rows, s.n_in}, to_x) : fresh(x, {s.n_nets, s.n_side, s.n_rows, s.n_in}, to_x);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>(precision);
    const PackedLayers<T> packed = pack_chain(kernel, s, parameters, relu, true);
    const ChainBackwardArgs<T> args{chain_args(s, packed, x), const_data<T>(kept), const_data<T>(y), const_data<T>(d_y),
                                    to_x ? data<T>(d_x) : nullptr};
    const auto gradients = gradients_of<T>(parameters, d_parameters, s.n_nets * s.n_side);
    const auto run = [&](int64_t net, int64_t first, int64_t n_rows, T* const* sums) {
      kernel.chain_backward(args, net, first, n_rows, sums);
    };
    sum_over_rows(s.n_nets * s.n_side, s.n_rows, s.n_rows, gradients, [](int64_t, int64_t) { return 1; }, run);
  });
  if (!to_x || own) return d_x;
  const int64_t axes[] = {1, 0};
  return torch::stable::sum(d_x, torch::headeronly::IntHeaderOnlyArrayRef(axes, x.dim() == 2 ? 2 : 1));
}

STABLE_TORCH_LIBRARY_IMPL(d2r_fast, CPU, m) {
  m.impl("layer_chain", TORCH_BOX(&layer_chain));
  m.impl("layer_chain_backward", TORCH_BOX(&layer_chain_backward));
}

}  // namespace
}  // namespace d2r_fast
