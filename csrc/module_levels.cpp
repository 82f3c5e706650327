// Levels of modules and their gates on the CPU: host side of module_levels_cpu.h.
#include <tuple>
#include <vector>

#include "layer_lists.h"

namespace d2r_fast {
namespace {

struct Levels {
  int64_t n_nets, n_rows, n_levels, n_modules, n_in, width, n_gates;
  std::vector<LayerShape> shapes;
};

Levels level_sizes(const Tensor& u, const Tensor& gate, std::vector<Tensor>& parameters) {
  check(u.dim() == 3, "u: expected [E,B,H], got ", shape_text(u.sizes()));
  check(parameters.size() >= 2 && parameters.size() % 2 == 0 && parameters[0].dim() == 4,
        "parameters: expected weight [E,N,out,in] and bias [E,N,out] of every level, got ", parameters.size(), " tensors");
  Levels s{u.size(0), u.size(1), static_cast<int64_t>(parameters.size()) / 2, parameters[0].size(1), u.size(2),
           parameters[0].size(2), 0, {}};
  check(s.n_modules >= 1, "parameters: expected one or more modules in a level, got none");
  s.n_gates = (s.n_levels - 1) * s.n_modules * s.n_modules + s.n_modules;
  const ScalarType real = u.scalar_type();
  check_tensor("u", u, real, {s.n_nets, s.n_rows, s.n_in});
  check_tensor("gate", gate, real, {s.n_nets, s.n_rows, s.n_gates});
  for (int64_t l = 0; l < s.n_levels; ++l) s.shapes.push_back({s.n_modules, s.width, l ? s.width : s.n_in});
  check_layers(parameters, s.shapes, s.n_nets, real);
  return s;
}

// y, and for backward, if `keep`, what every module gave.
std::tuple<Tensor, Tensor> module_levels(Tensor u, Tensor gate, Precision precision, bool keep, std::vector<Tensor> parameters) {
  u = readable(u), gate = readable(gate);
  const Levels s = level_sizes(u, gate, parameters);
  Tensor y = fresh(u, {s.n_nets, s.n_rows, s.width});
  Tensor m = fresh(u, {s.n_nets, s.n_rows, s.n_levels, s.n_modules, s.width}, keep);
  with_dtype(u, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>(precision);
    const PackedLayers<T> packed = pack_layers(kernel, parameters, s.shapes, s.n_nets, false);
    const LevelsForwardArgs<T> args{{s.n_levels, s.n_modules, s.n_rows, s.n_in, s.width, packed.layers.data(),
                                     const_data<T>(u), const_data<T>(gate)},
                                    keep ? data<T>(m) : nullptr,
                                    data<T>(y)};
    for_each_row_block(s.n_nets, s.n_rows, [&](int64_t net, int64_t first, int64_t n_rows) {
      kernel.levels_forward(args, net, first, n_rows);
    });
  });
  return {y, m};
}

std::tuple<Tensor, Tensor> module_levels_backward(Tensor d_y, Tensor u, Tensor gate, Tensor y, Tensor m, Precision precision,
                                                  std::vector<Tensor> parameters, std::vector<Tensor> d_parameters) {
  d_y = readable(d_y), u = readable(u), gate = readable(gate), m = readable(m), y = readable(y);
  const Levels s = level_sizes(u, gate, parameters);
  const ScalarType real = u.scalar_type();
  check_tensor("d_y", d_y, real, {s.n_nets, s.n_rows, s.width});
  check_tensor("y", y, real, {s.n_nets, s.n_rows, s.width});
  check_tensor("m", m, real, {s.n_nets, s.n_rows, s.n_levels, s.n_modules, s.width});
  Tensor d_u = fresh(u, {s.n_nets, s.n_rows, s.n_in}), d_gate = fresh(u, {s.n_nets, s.n_rows, s.n_gates});
  with_dtype(u, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>(precision);
    const PackedLayers<T> packed = pack_layers(kernel, parameters, s.shapes, s.n_nets, true);
    const LevelsBackwardArgs<T> args{{s.n_levels, s.n_modules, s.n_rows, s.n_in, s.width, packed.layers.data(),
                                      const_data<T>(u), const_data<T>(gate)},
                                     const_data<T>(m),
                                     const_data<T>(y),
                                     const_data<T>(d_y),
                                     data<T>(d_u),
                                     data<T>(d_gate)};
    const auto run = [&](int64_t net, int64_t first, int64_t n_rows, T* const* sums) {
      kernel.levels_backward(args, net, first, n_rows, sums);
    };
    const auto gradients = gradients_of<T>(parameters, d_parameters, s.n_nets);
    sum_over_rows(s.n_nets, s.n_rows, s.n_rows, gradients, [](int64_t, int64_t) { return 1; }, run);
  });
  return {d_u, d_gate};
}

struct Gates {
  int64_t n_nets, n_rows, n_levels, n_modules, n_in, n_gates;
  std::vector<LayerShape> shapes;
};

Gates gate_sizes(const Tensor& c, int64_t n_modules, std::vector<Tensor>& parameters) {
  check(c.dim() == 3, "c: expected [E,B,C], got ", shape_text(c.sizes()));
  check(parameters.size() >= 2 && parameters.size() % 4 == 2,
        "parameters: expected weight and bias of an odd number of layers, got ", parameters.size(), " tensors");
  check(n_modules >= 1 && n_modules <= kMaxModules, "n_modules: expected 1..", kMaxModules, ", got ", n_modules);
  Gates s{c.size(0), c.size(1), static_cast<int64_t>(parameters.size() + 2) / 4, n_modules, c.size(2), 0, {}};
  const int64_t square = n_modules * n_modules;
  s.n_gates = (s.n_levels - 1) * square + n_modules;
  const ScalarType real = c.scalar_type();
  check_tensor("c", c, real, {s.n_nets, s.n_rows, s.n_in});
  for (int64_t l = 0; l < s.n_levels; ++l) {
    if (l > 0) s.shapes.push_back({1, s.n_in, l * square});
    s.shapes.push_back({1, l < s.n_levels - 1 ? square : n_modules, s.n_in});
  }
  check_layers(parameters, s.shapes, s.n_nets, real);
  return s;
}

// p, and for backward, if `keep`, what scaled c.
std::tuple<Tensor, Tensor> level_gates(Tensor c, int64_t n_modules, Precision precision, bool keep,
                                       std::vector<Tensor> parameters) {
  c = readable(c);
  const Gates s = gate_sizes(c, n_modules, parameters);
  Tensor p = fresh(c, {s.n_nets, s.n_rows, s.n_gates});
  Tensor scale = fresh(c, {s.n_nets, s.n_rows, s.n_levels - 1, s.n_in}, keep);
  with_dtype(c, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>(precision);
    const PackedLayers<T> packed = pack_layers(kernel, parameters, s.shapes, s.n_nets, false);
    const GatesForwardArgs<T> args{
        {s.n_levels, s.n_modules, s.n_rows, s.n_in, packed.layers.data(), const_data<T>(c)},
        keep ? data<T>(scale) : nullptr,
        data<T>(p)};
    for_each_row_block(s.n_nets, s.n_rows, [&](int64_t net, int64_t first, int64_t n_rows) {
      kernel.gates_forward(args, net, first, n_rows);
    });
  });
  return {p, scale};
}

Tensor level_gates_backward(Tensor d_p, Tensor c, Tensor p, Tensor scale, int64_t n_modules, Precision precision,
                            std::vector<Tensor> parameters, std::vector<Tensor> d_parameters) {
  d_p = readable(d_p), c = readable(c), p = readable(p), scale = readable(scale);
  const Gates s = gate_sizes(c, n_modules, parameters);
  const ScalarType real = c.scalar_type();
  check_tensor("d_p", d_p, real, {s.n_nets, s.n_rows, s.n_gates});
  check_tensor("p", p, real, {s.n_nets, s.n_rows, s.n_gates});
  check_tensor("scale", scale, real, {s.n_nets, s.n_rows, s.n_levels - 1, s.n_in});
  Tensor d_c = fresh(c, {s.n_nets, s.n_rows, s.n_in});
  with_dtype(c, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>(precision);
    const PackedLayers<T> packed = pack_layers(kernel, parameters, s.shapes, s.n_nets, true);
    const GatesBackwardArgs<T> args{{s.n_levels, s.n_modules, s.n_rows, s.n_in, packed.layers.data(), const_data<T>(c)},
                                    const_data<T>(scale),
                                    const_data<T>(p),
                                    const_data<T>(d_p),
                                    data<T>(d_c)};
    const auto run = [&](int64_t net, int64_t first, int64_t n_rows, T* const* sums) {
      kernel.gates_backward(args, net, first, n_rows, sums);
    };
    const auto gradients = gradients_of<T>(parameters, d_parameters, s.n_nets);
    sum_over_rows(s.n_nets, s.n_rows, s.n_rows, gradients, [](int64_t, int64_t) { return 1; }, run);
  });
  return d_c;
}

STABLE_TORCH_LIBRARY_IMPL(d2r_fast, CPU, m) {
  m.impl("module_levels", TORCH_BOX(&module_levels));
  m.impl("module_levels_backward", TORCH_BOX(&module_levels_backward));
  m.impl("level_gates", TORCH_BOX(&level_gates));
  m.impl("level_gates_backward", TORCH_BOX(&level_gates_backward));
}

}  // namespace
}  // namespace d2r_fast
