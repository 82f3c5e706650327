// Whole networks on the CPU: host side of network_cpu.h.
#include <array>
#include <tuple>
#include <vector>

#include "host.h"
#include "operations.h"
#include "parallel.h"
#include "route_checks.h"

namespace d2r_fast {
namespace {

struct NetworkSizes {
  Sizes modules;
  int64_t n_in, hidden, n_out, n_tasks, n_logits;
  int64_t n_layers;  // by NetworkLayer, the routing network's at the end
};

// The shape of layer l's weight without the networks' axis: how many matrices, and their sizes.
struct WeightShape {
  int64_t count, n_out, n_in;
  int64_t numel() const { return count * n_out * n_in; }
};

WeightShape weight_shape(const NetworkSizes& s, const std::vector<Tensor>& parameters, int64_t l) {
  const Sizes& m = s.modules;
  switch (l) {
    case kBase0: return {1, s.hidden, s.n_in};
    case kBase1: return {1, s.hidden, s.hidden};
    case kTask: return {1, s.hidden, s.n_tasks};
    case kModule0: return {1, m.width, s.hidden};
    case kModules: return {m.n_modules - 1, m.width, m.width};
    case kHead: return {1, s.n_out, m.width};
    default: break;
  }
  const int64_t n_in = l == kRoute ? s.hidden : parameters[2 * (l - 1)].size(1);
  return {1, l == s.n_layers - 1 ? s.n_logits : parameters[2 * l].size(1), n_in};
}

// `shape` has an axis for how many matrices the layer has, which only the modules have.
void check_parameter(int64_t at, const char* what, const Tensor& parameter, ScalarType real,
                     std::initializer_list<int64_t> shape) {
  std::array<int64_t, 4> expected;
  auto end = std::copy(shape.begin(), shape.end(), expected.begin());
  if (at / 2 != kModules) end = std::copy(expected.begin() + 2, end, expected.begin() + 1);
  const torch::headeronly::IntHeaderOnlyArrayRef wanted(expected.data(), end - expected.begin());
  check(parameter.scalar_type() == real, "parameters[", at, "], ", what, ": expected a tensor of ",
        torch::headeronly::toString(real), ", got ", torch::headeronly::toString(parameter.scalar_type()));
  const auto got = parameter.sizes();
  check(std::equal(got.begin(), got.end(), wanted.begin(), wanted.end()), "parameters[", at, "], ", what,
        ": expected shape ", shape_text(wanted), ", got ", shape_text(got));
}

// Checks everything; what does not lie in one piece is replaced by a copy that does, once the shapes are known. Rows of x
// may be columns of a wider matrix.
NetworkSizes network_sizes(Tensor& x, Tensor& task, std::vector<Tensor>& parameters, int64_t n_kept, bool residual) {
  const int64_t n_layers = static_cast<int64_t>(parameters.size()) / 2;
  check(n_layers > kRoute && parameters.size() % 2 == 0, "parameters: expected weight and bias of at least ", kRoute + 1,
        " layers, got ", parameters.size(), " tensors");
  const Tensor &base = parameters[2 * kBase0], &head = parameters[2 * kHead];
  for (int64_t l = 0; l < n_layers; ++l) {
    const int64_t dim = l == kModules ? 4 : 3;
    check(parameters[2 * l].dim() == dim, "parameters[", 2 * l, "], a weight: expected ", dim, " axes, got ",
          shape_text(parameters[2 * l].sizes()));
  }
  check(x.dim() == 2, "x: expected [B,in], got ", shape_text(x.sizes()));
  const int64_t n_modules = parameters[2 * kModules].size(1) + 1;
  NetworkSizes s{{base.size(0), x.size(0), n_modules, n_kept, head.size(2), residual},
                 base.size(2), base.size(1), head.size(1), parameters[2 * kTask].size(2), 0, n_layers};
  const Sizes& m = s.modules;
  check_routes(m.n_modules, m.n_kept);
  s.n_logits = m.n_modules * (m.n_modules + 1) / 2;
  const ScalarType real = x.scalar_type();
  check_shape("x", x, {m.n_rows, s.n_in});
  if (s.n_in > 1 && x.stride(1) != 1) x = readable(x);
  task = readable(task, ScalarType::Long);
  check_shape("task", task, {m.n_rows});
  for (int64_t l = 0; l < n_layers; ++l) {
    const auto [count, n_out, n_in] = weight_shape(s, parameters, l);
    check_width("a layer's input", n_in);
    check_width("a layer's output", n_out);
    check_parameter(2 * l, "a weight", parameters[2 * l], real, {m.n_nets, count, n_out, n_in});
    check_parameter(2 * l + 1, "a bias", parameters[2 * l + 1], real, {m.n_nets, count, n_out});
  }
  for (Tensor& parameter : parameters) parameter = readable(parameter);
  return s;
}

// Of a row in `activations`, as network_cpu.h lays them out.
int64_t activation_width(const NetworkSizes& s, const std::vector<Tensor>& parameters, ScalarType real) {
  const auto stride = real == ScalarType::Double ? row_stride<double> : row_stride<float>;
  int64_t width = 2 * stride(s.hidden) + 2 * s.modules.width;
  for (int64_t l = kRoute; l < s.n_layers - 1; ++l) width += stride(parameters[2 * l].size(1));
  return width;
}

// The layers of every network, packed for one direction.
template <typename T>
struct Packed {
  std::unique_ptr<std::byte[]> panels;
  const std::byte* modules;        // [E,N-1]
  std::vector<Layer<T>> layers;    // [E][n_layers]
  std::unique_ptr<T[]> task_rows;  // [E,T+1,H]
};

template <typename T>
Packed<T> pack_network(const Kernels<T>& kernel, const NetworkSizes& s, const std::vector<Tensor>& parameters, bool backward) {
  struct Job {
    const T* weight;
    WeightShape shape;
    size_t at;
  };
  const int64_t n_nets = s.modules.n_nets;
  std::vector<Job> jobs;
  std::vector<size_t> begin(s.n_layers);
  size_t bytes = 0;
  for (int64_t l = 0; l < s.n_layers; ++l) {
    const WeightShape shape = weight_shape(s, parameters, l);
    begin[l] = bytes;
    if (l == kTask) continue;
    for (int64_t i = 0; i < n_nets * shape.count; ++i) {
      jobs.push_back({const_data<T>(parameters[2 * l]) + i * shape.n_out * shape.n_in, shape, bytes});
      bytes += backward ? kernel.packed_bytes(shape.n_out, shape.n_in) : kernel.packed_bytes(shape.n_in, shape.n_out);
    }
  }
  Packed<T> packed{std::make_unique_for_overwrite<std::byte[]>(bytes), nullptr, {},
                   std::make_unique_for_overwrite<T[]>(n_nets * (s.n_tasks + 1) * s.hidden)};
  for_each_block(static_cast<int64_t>(jobs.size()), [&](int64_t i) {
    kernel.pack_weight(jobs[i].weight, jobs[i].shape.n_out, jobs[i].shape.n_in, backward, packed.panels.get() + jobs[i].at);
  });
  packed.modules = packed.panels.get() + begin[kModules];
  for (int64_t net = 0; net < n_nets; ++net)
    for (int64_t l = 0; l < s.n_layers; ++l) {
      if (l == kTask || l == kModules) {
        packed.layers.push_back({});
        continue;
      }
      const auto [count, n_out, n_in] = weight_shape(s, parameters, l);
      const size_t own = backward ? kernel.packed_bytes(n_out, n_in) : kernel.packed_bytes(n_in, n_out);
      const bool relu = l == kBase0 || l == kModule0 || (l >= kRoute && l < s.n_layers - 1);
      packed.layers.push_back({n_in, n_out, relu, packed.panels.get() + begin[l] + net * own,
                               const_data<T>(parameters[2 * l + 1]) + net * n_out});
    }
  const T *weight = const_data<T>(parameters[2 * kTask]), *bias = const_data<T>(parameters[2 * kTask + 1]);
  T* row = packed.task_rows.get();
  for (int64_t net = 0; net < n_nets; ++net, weight += s.hidden * s.n_tasks, bias += s.hidden)
    for (int64_t task = 0; task <= s.n_tasks; ++task, row += s.hidden)
      for (int64_t j = 0; j < s.hidden; ++j) row[j] = bias[j] + (task < s.n_tasks ? weight[j * s.n_tasks + task] : T(0));
  return packed;
}

// Where each row's lines begin in h and opened: every row has room for all modules, since which of them it needs is known
// only in the middle of its block. What it does not need is never touched.
std::vector<int64_t> begin_lines(const Sizes& s) {
  std::vector<int64_t> begin(s.n_nets * s.n_rows);
  for (size_t row = 0; row < begin.size(); ++row) begin[row] = static_cast<int64_t>(row) * s.n_modules;
  return begin;
}

template <typename T>
NetworkArgs<T> network_args(const NetworkSizes& s, const Packed<T>& packed, const Tensor& x, const Tensor& task) {
  return {s.n_tasks,          s.n_layers,  packed.layers.data(), packed.task_rows.get(),
          const_data<T>(x), x.stride(0), const_data<int64_t>(task)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> routed_network(
    Tensor x, Tensor task, std::optional<Tensor> temperature, std::optional<Tensor> noise, std::optional<Tensor> given,
    int64_t k, bool residual, bool resrouting, Precision precision, int64_t n_back, std::vector<Tensor> parameters) {
  const NetworkSizes s = network_sizes(x, task, parameters, k, residual);
  const Sizes& m = s.modules;
  const ScalarType real = x.scalar_type();
  temperature = readable(temperature, real), noise = readable(noise, real);
  check(noise.has_value() == temperature.has_value(), "temperature: expected one where there is noise, and none elsewhere");
  check((!noise || noise->dim() == 3) && (!given || given->dim() == 4),
        "noise, index: expected [E,n,R] and [E,n,N,K], of the first n rows");
  const int64_t n_chosen = noise ? noise->size(1) : given ? given->size(1) : 0;
  check(n_chosen <= m.n_rows, "noise, index: expected at most ", m.n_rows, " rows, got ", n_chosen);
  check(n_back >= 0 && n_back <= m.n_rows, "n_back: expected 0..", m.n_rows, ", got ", n_back);
  check(n_back == 0 || n_chosen == 0 || n_back == n_chosen || std::max(n_back, n_chosen) == m.n_rows,
        "n_back: expected the rows of the choice, ", n_chosen, ", or all ", m.n_rows, ", got ", n_back);
  if (noise) check_tensor("noise", *noise, real, {m.n_nets, n_chosen, s.n_logits});
  if (temperature) check_tensor("temperature", *temperature, real, {n_chosen});
  const bool keep = n_back > 0;
  Tensor out = fresh(x, {m.n_nets, m.n_rows, s.n_out});
  const ChosenRoutes chosen = fresh_routes(m, x);
  Tensor activations = fresh(x, {m.n_nets * m.n_rows * activation_width(s, parameters, real)}, keep);
  Tensor h = fresh(x, {m.n_nets, m.n_modules, m.n_rows, m.width}, keep);
  Tensor opened = fresh(x, {m.n_nets, m.n_modules, m.n_rows, m.width}, keep, ScalarType::Bool);
  Sizes given_size = m;
  given_size.n_rows = n_chosen;
  GivenRoutes given_routes(given, given_size, data<int32_t>(chosen.index));
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>(precision);
    const Packed<T> packed = pack_network(kernel, s, parameters, false);
    const auto begin = keep ? begin_lines(m) : std::vector<int64_t>();
    const RouteArgs<T> route_args{{m.n_modules, m.n_kept},
                                  nullptr,
                                  noise ? const_data<T>(*temperature) : nullptr,
                                  noise ? const_data<T>(*noise) : nullptr,
                                  given_routes.any(),
                                  resrouting,
                                  data<int32_t>(chosen.index),
                                  data<T>(chosen.gate),
                                  data<bool>(chosen.flow),
                                  data<int32_t>(chosen.active)};
    const ForwardArgs<T> modules{m,
                                 nullptr,
                                 packed.modules,
                                 const_data<T>(parameters[2 * kModules + 1]),
                                 const_data<int32_t>(chosen.index),
                                 const_data<T>(chosen.gate),
                                 const_data<int32_t>(chosen.active),
                                 keep ? begin.data() : nullptr,
                                 keep ? data<T>(h) : nullptr,
                                 keep ? data<bool>(opened) : nullptr,
                                 nullptr};
    const NetworkForwardArgs<T> args{network_args(s, packed, x, task), route_args, modules,
                                     keep ? data<T>(activations) : nullptr, data<T>(out), n_chosen, n_back};
    const int64_t boundary = n_chosen && n_chosen < m.n_rows ? n_chosen : n_back ? n_back : m.n_rows;
    for_each_row_block(m.n_nets, m.n_rows, boundary, [&](int64_t net, int64_t first, int64_t n_rows) {
      if (first < n_chosen && !given_routes.take(net * n_chosen + first, n_rows, net * m.n_rows + first)) return;
      kernel.network_forward(args, net, first, n_rows);
    });
  });
  given_routes.require_legal();
  return {out, chosen.gate, chosen.index, chosen.flow, chosen.active, activations, h, opened};
}

Tensor routed_network_backward(Tensor d_out, std::optional<Tensor> to_gate, Tensor x, Tensor task,
                               std::vector<Tensor> parameters, Tensor gate, Tensor index, Tensor flow, Tensor active,
                               Tensor activations, Tensor h, Tensor opened, bool residual, Precision precision,
                               int64_t n_learning, int64_t first_to_x, std::vector<Tensor> d_parameters) {
  check(index.dim() == 4, "index: expected [E,B,N,K], got ", shape_text(index.sizes()));
  const NetworkSizes s = network_sizes(x, task, parameters, index.size(3), residual);
  const Sizes& m = s.modules;
  const int64_t rows = m.n_nets * m.n_rows, routes = rows * m.n_modules * m.n_kept;
  const ScalarType real = x.scalar_type();
  const bool to_parameters = !d_parameters.empty();
  d_out = readable(d_out), to_gate = readable(to_gate, real);
  check(d_out.dim() == 3 && d_out.size(1) <= m.n_rows, "d_out: expected [E,n,out] of at most ", m.n_rows, " rows, got ",
        shape_text(d_out.sizes()));
  const int64_t n_back = d_out.size(1);
  check_tensor("d_out", d_out, real, {m.n_nets, n_back, s.n_out});
  check(n_learning >= 0 && n_learning <= n_back && first_to_x >= 0 && first_to_x <= n_back,
        "n_learning, first_to_x: expected 0..", n_back, ", got ", n_learning, " and ", first_to_x);
  if (to_gate) check_tensor("to_gate", *to_gate, real, {m.n_nets, m.n_rows, m.n_modules, m.n_kept});
  check_tensor("gate", gate, real, {m.n_nets, m.n_rows, m.n_modules, m.n_kept});
  check_tensor("index", index, ScalarType::Int, {m.n_nets, m.n_rows, m.n_modules, m.n_kept});
  check_tensor("flow", flow, ScalarType::Bool, {m.n_nets, m.n_rows, m.n_modules, m.n_kept});
  check_tensor("active", active, ScalarType::Int, {m.n_nets, m.n_rows});
  if (n_back > 0) {
    check_tensor("activations", activations, real, {rows * activation_width(s, parameters, real)});
    check_tensor("h", h, real, {m.n_nets, m.n_modules, m.n_rows, m.width});
    check_tensor("opened", opened, ScalarType::Bool, {m.n_nets, m.n_modules, m.n_rows, m.width});
  }
  const bool to_x = first_to_x < n_back;
  Tensor d_x = fresh(x, {m.n_nets, n_back - first_to_x, s.n_in}, to_x);
  check(!to_parameters || d_parameters.size() == parameters.size(), "d_parameters: expected ", parameters.size(),
        " tensors, got ", d_parameters.size());
  for (size_t i = 0; i < d_parameters.size(); ++i)
    check(d_parameters[i].numel() == parameters[i].numel() && d_parameters[i].is_contiguous() &&
              d_parameters[i].scalar_type() == real,
          "d_parameters[", i, "]: expected a contiguous tensor like the parameter");
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>(precision);
    const Packed<T> packed = pack_network(kernel, s, parameters, true);
    const auto begin = begin_lines(m);
    const int64_t wide = rows * m.width;
    const auto scratch = std::make_unique_for_overwrite<T[]>(2 * wide + routes);
    T* d_mixed = scratch.get();
    const BackwardArgs<T> modules{m,
                                  d_mixed,
                                  packed.modules,
                                  const_data<int32_t>(index),
                                  const_data<T>(gate),
                                  const_data<bool>(flow),
                                  const_data<int32_t>(active),
                                  begin.data(),
                                  const_data<T>(h),
                                  const_data<bool>(opened),
                                  d_mixed + wide,
                                  d_mixed + 2 * wide};
    const NetworkBackwardArgs<T> args{network_args(s, packed, x, task), modules, const_data<T>(activations),
                                      const_data<T>(d_out), to_gate ? const_data<T>(*to_gate) : nullptr, d_mixed,
                                      to_x ? data<T>(d_x) : nullptr, n_back, first_to_x};
    std::vector<Gradient<T>> gradients;
    int64_t per_row = 0;  // multiply-adds of a row without the modules
    for (size_t i = 0; i < parameters.size(); ++i) {
      const int64_t per_net = m.n_nets ? parameters[i].numel() / m.n_nets : 0;
      gradients.push_back({to_parameters ? data<T>(d_parameters[i]) : nullptr, per_net});
      if (i != 2 * kModules) per_row += per_net;
    }
    const auto cost = [&](int64_t net, int64_t row) {
      const int64_t products = to_parameters && row < n_learning ? 2 : 1;
      return products * (per_row + m.width * m.width * count_lines(modules.active[net * m.n_rows + row], m.n_modules));
    };
    const auto run = [&](int64_t net, int64_t first, int64_t n_rows, T* const* sums) {
      const int64_t before = std::clamp<int64_t>(first_to_x - first, 0, n_rows);
      if (before > 0) kernel.network_backward(args, net, first, before, sums);
      if (before < n_rows) kernel.network_backward(args, net, first + before, n_rows - before, sums);
    };
    sum_over_rows(m.n_nets, n_back, n_learning, gradients, cost, run);
  });
  return to_x ? sum_over_nets(d_x) : fresh(x, {0, s.n_in});
}

STABLE_TORCH_LIBRARY_IMPL(d2r_fast, CPU, m) {
  m.impl("routed_network", TORCH_BOX(&routed_network));
  m.impl("routed_network_backward", TORCH_BOX(&routed_network_backward));
}

}  // namespace d2r_fast
