// Lists of layers, weight and bias of each, as operations of several layers take them: checks, packing, where gradients go.
#pragma once
#include <vector>

#include "host.h"
#include "parallel.h"

namespace d2r_fast {

// Weights [E,N,out,in] of N layers side by side, or [E,out,in]: N = 1.
struct LayerShape {
  int64_t count, n_out, n_in;
};

// Checks weight and bias of every layer, which take these shapes; what does not lie in one piece is replaced by a copy.
inline void check_layers(std::vector<Tensor>& parameters, const std::vector<LayerShape>& shapes, int64_t n_nets, ScalarType real) {
  for (size_t i = 0; i < parameters.size(); ++i) {
    const auto [count, n_out, n_in] = shapes[i / 2];
    check_width("a layer's input", n_in);
    check_width("a layer's output", n_out);
    const Tensor& parameter = parameters[i];
    check(parameter.scalar_type() == real, "parameters[", i, "]: expected a tensor of ", torch::headeronly::toString(real),
          ", got ", torch::headeronly::toString(parameter.scalar_type()));
    check(parameter.numel() == n_nets * count * n_out * (i % 2 ? 1 : n_in), "parameters[", i, "]: expected ", count,
          " layers of ", n_in, " to ", n_out, " in each of ", n_nets, " networks, got ", shape_text(parameter.sizes()));
    parameters[i] = readable(parameter);
  }
}

// All layers of all networks, [E][layers][N], packed for one direction.
template <typename T>
struct PackedLayers {
  std::unique_ptr<std::byte[]> panels;
  std::vector<Layer<T>> layers;
};

template <typename T>
PackedLayers<T> pack_layers(const Kernels<T>& kernel, const std::vector<Tensor>& parameters,
                            const std::vector<LayerShape>& shapes, int64_t n_nets, bool backward) {
  std::vector<const T*> weights;
  std::vector<size_t> begin;
  std::vector<Layer<T>> layers;
  size_t bytes = 0;
  for (int64_t net = 0; net < n_nets; ++net)
    for (size_t l = 0; l < shapes.size(); ++l) {
      const auto [count, n_out, n_in] = shapes[l];
      for (int64_t i = net * count; i < (net + 1) * count; ++i) {
        weights.push_back(const_data<T>(parameters[2 * l]) + i * n_out * n_in);
        layers.push_back({n_in, n_out, false, nullptr, const_data<T>(parameters[2 * l + 1]) + i * n_out});
        begin.push_back(bytes);
        bytes += backward ? kernel.packed_bytes(n_out, n_in) : kernel.packed_bytes(n_in, n_out);
      }
    }
  PackedLayers<T> packed{std::make_unique_for_overwrite<std::byte[]>(bytes), std::move(layers)};
  for_each_block(static_cast<int64_t>(weights.size()), [&](int64_t i) {
    Layer<T>& layer = packed.layers[i];
    kernel.pack_weight(weights[i], layer.n_out, layer.n_in, backward, packed.panels.get() + begin[i]);
    layer.panels = packed.panels.get() + begin[i];
  });
  return packed;
}

// Where the gradient of each parameter goes; nowhere, if none is wanted.
template <typename T>
std::vector<Gradient<T>> gradients_of(const std::vector<Tensor>& parameters, const std::vector<Tensor>& d_parameters,
                                      int64_t n_nets) {
  check(d_parameters.empty() || d_parameters.size() == parameters.size(), "d_parameters: expected ", parameters.size(),
        " tensors, got ", d_parameters.size());
  std::vector<Gradient<T>> gradients;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const bool wanted = !d_parameters.empty();
    check(!wanted || (d_parameters[i].numel() == parameters[i].numel() && d_parameters[i].is_contiguous() &&
                      d_parameters[i].scalar_type() == parameters[i].scalar_type()),
          "d_parameters[", i, "]: expected a contiguous tensor like the parameter");
    gradients.push_back({wanted ? data<T>(d_parameters[i]) : nullptr, n_nets ? parameters[i].numel() / n_nets : 0});
  }
  return gradients;
}

}  // namespace d2r_fast
