// A whole network over a block of rows, forward and backward: base, task, routing network, modules, head. From one layer to
// the next the block's activations stay in the second-level cache, and a pass is one region of parallel work.
#pragma once
#include "linear_cpu.h"
#include "routed_modules_cpu.h"
#include "select_routes_cpu.h"

namespace d2r_fast::D2R_ISA {

// What a backward pass reads again, of one block. Each lies in `NetworkForwardArgs::activations` as [E,B,width], in this
// order; or, where no backward follows, in a thread's own memory.
template <typename T>
struct BlockActivations {
  T *base0, *base1;  // [n,H]; base1 is f
  T *h0, *mixed;     // [n,D]
  T** route;         // [n,width] of each of the routing network's layers but the last
};

// take(width) gives [n,width] of memory.
template <typename T, typename Take>
BlockActivations<T> lay_out(const NetworkArgs<T>& network, int64_t width, T** route, const Take& take) {
  const int64_t hidden = network.layers[kBase0].n_out;
  BlockActivations<T> block{take(hidden), take(hidden), take(width), take(width), route};
  for (int64_t l = kRoute; l < network.n_layers - 1; ++l) route[l - kRoute] = take(network.layers[l].n_out);
  return block;
}

template <typename T>
T* kept_activations(T*& at, const Sizes& s, int64_t net, int64_t first, int64_t width) {
  T* block = at + (net * s.n_rows + first) * width;
  at += s.n_nets * s.n_rows * width;
  return block;
}

// Numbers of memory for one row of everything that a pass may hold: activations, and twice the widest layers' worth.
template <typename T>
int64_t numbers_per_row(const NetworkArgs<T>& network, int64_t width) {
  int64_t sum = 2 * width, widest = width;
  for (int64_t l = 0; l < network.n_layers; ++l) {
    const auto& layer = network.layers[l];
    sum += layer.n_out;
    widest = std::max({widest, layer.n_in, layer.n_out});
  }
  return sum + 4 * widest;
}

template <typename T>
const T* task_row(const NetworkArgs<T>& network, int64_t net, int64_t task, int64_t hidden) {
  const bool known = task >= 0 && task < network.n_tasks;
  return network.task_rows + (net * (network.n_tasks + 1) + (known ? task : network.n_tasks)) * hidden;
}

// What the base's output f goes on as: f g, to the routing network, and ReLU(f), to module 0.
template <typename T>
void split_base(const NetworkArgs<T>& network, int64_t net, int64_t first, int64_t n_rows, const T* base, T* scaled, T* opened) {
  const int64_t hidden = network.layers[kBase0].n_out;
  for (int64_t r = 0; r < n_rows; ++r) {
    const T *f = base + r * hidden, *g = task_row(network, net, network.task[first + r], hidden);
    T *u = scaled + r * hidden, *p = opened + r * hidden;
#pragma omp simd
    for (int64_t j = 0; j < hidden; ++j) {
      u[j] = f[j] * g[j];
      p[j] = f[j] < 0 ? T(0) : f[j];
    }
  }
}

// The same rows as networks of their own: for a block whose activations lie in a thread's memory.
template <typename T, typename Products>
ForwardArgs<T> alone(ForwardArgs<T> modules, int64_t net, int64_t first, int64_t n_rows, const T* h0, T* mixed) {
  Sizes& s = modules.size;
  const int64_t per_net = s.n_modules - 1, at = net * s.n_rows + first, slot = at * s.n_modules * s.n_kept;
  modules.panels += net * per_net * Products::packed_bytes(s.width, s.width);
  modules.bias += net * per_net * s.width;
  modules.index += slot;
  modules.gate += slot;
  modules.active += at;
  modules.h0 = h0;
  modules.mixed = mixed;
  modules.begin = nullptr;
  modules.h = nullptr;
  modules.opened = nullptr;
  s.n_nets = 1;
  s.n_rows = n_rows;
  return modules;
}

template <typename T>
RouteArgs<T> routes_of_block(const NetworkForwardArgs<T>& args, int64_t net, int64_t first, const T* logits) {
  RouteArgs<T> routes = args.routes;
  const int64_t n_modules = routes.size.n_modules, row = net * args.modules.size.n_rows + first;
  const int64_t slot = row * n_modules * routes.size.n_kept;
  routes.logits = logits;
  if (first >= args.n_chosen) {
    routes.temperature = routes.noise = nullptr;
    routes.given = false;
  } else if (routes.noise) {
    routes.temperature += first;
    routes.noise += (net * args.n_chosen + first) * (n_modules * (n_modules + 1) / 2);
  }
  routes.index += slot;
  routes.gate += slot;
  routes.flow += slot;
  routes.active += row;
  return routes;
}

template <typename T, typename Products>
void network_forward(const NetworkForwardArgs<T>& args, int64_t net, int64_t first, int64_t n_rows) {
  const NetworkArgs<T>& network = args.network;
  const Sizes& s = args.modules.size;
  const Layer<T>* layers = network.layers + net * network.n_layers;
  const int64_t hidden = layers[kBase0].n_out, last = network.n_layers - 1, row = net * s.n_rows + first;
  Workspace& workspace = Workspace::of_this_thread<Workspace::Owner::kCaller>();
  workspace.reserve(sizeof(T) * n_rows * numbers_per_row(network, s.width) + (network.n_layers + 8) * (64 + sizeof(T*)));
  T** route = workspace.take<T*>(network.n_layers);
  T* at = first < args.n_back ? args.activations : nullptr;
  const bool keeps = at;
  const auto block = lay_out(network, s.width, route, [&](int64_t width) {
    return at ? kept_activations(at, s, net, first, width) : workspace.take<T>(n_rows * width);
  });
  T* scaled = workspace.take<T>(n_rows * hidden);
  T* opened = workspace.take<T>(n_rows * hidden);
  T* logits = workspace.take<T>(n_rows * layers[last].n_out);

  const auto run = [&](int64_t l, const T* x, T* y) { linear_forward<T, Products>(layers[l], n_rows, x, layers[l].n_in, y); };
  linear_forward<T, Products>(layers[kBase0], n_rows, network.x + first * network.x_stride, network.x_stride, block.base0);
  run(kBase1, block.base0, block.base1);
  split_base(network, net, first, n_rows, block.base1, scaled, opened);
  const T* in = scaled;
  for (int64_t l = kRoute; l < last; in = route[l++ - kRoute]) run(l, in, route[l - kRoute]);
  run(last, in, logits);
  select_routes(routes_of_block(args, net, first, logits), n_rows);
  run(kModule0, opened, block.h0);
  if (keeps) {
    ForwardArgs<T> modules = args.modules;
    modules.h0 = block.h0 - row * s.width;
    modules.mixed = block.mixed - row * s.width;
    forward<T, Products>(modules, net, first, n_rows);
  } else {
    forward<T, Products>(alone<T, Products>(args.modules, net, first, n_rows, block.h0, block.mixed), 0, 0, n_rows);
  }
  run(kHead, block.mixed, args.out + row * layers[kHead].n_out);
}

// The gradient of the task layer: d_g of a row goes to the column of its task. Rows of a task stand together in a batch, so
// a run of them is summed before it goes to the columns, which lie apart.
template <typename T>
void add_task_gradient(const NetworkArgs<T>& network, const int64_t* task, int64_t n_rows, const T* d_g, int64_t hidden,
                       T* run, T* d_weight, T* d_bias) {
  for (int64_t begin = 0, end; begin < n_rows; begin = end) {
    std::fill_n(run, hidden, T(0));
    for (end = begin; end < n_rows && task[end] == task[begin]; ++end) {
#pragma omp simd
      for (int64_t j = 0; j < hidden; ++j) run[j] += d_g[end * hidden + j];
    }
    const bool known = task[begin] >= 0 && task[begin] < network.n_tasks;
    for (int64_t j = 0; j < hidden; ++j) {
      d_bias[j] += run[j];
      if (known) d_weight[j * network.n_tasks + task[begin]] += run[j];
    }
  }
}

template <typename T, typename Products>
void network_backward(const NetworkBackwardArgs<T>& args, int64_t net, int64_t first, int64_t n_rows, T* const* sums) {
  const NetworkArgs<T>& network = args.network;
  const Sizes& s = args.modules.size;
  const Layer<T>* layers = network.layers + net * network.n_layers;
  const int64_t hidden = layers[kBase0].n_out, last = network.n_layers - 1, row = net * s.n_rows + first;
  Workspace& workspace = Workspace::of_this_thread<Workspace::Owner::kCaller>();
  const int64_t per_row = numbers_per_row(network, s.width) + 3 * hidden;
  workspace.reserve(sizeof(T) * (n_rows * per_row + hidden) + (2 * network.n_layers + 8) * (64 + sizeof(T*)));
  T** route = workspace.take<T*>(network.n_layers);
  // Only read: the pointers serve forward, too.
  T* at = const_cast<T*>(args.activations);
  const auto block = lay_out(network, s.width, route,
                             [&](int64_t width) { return kept_activations(at, s, net, first, width); });
  T* scaled = workspace.take<T>(n_rows * hidden);
  T* opened = workspace.take<T>(n_rows * hidden);
  T* d_scaled = workspace.take<T>(n_rows * hidden);
  T* d_opened = workspace.take<T>(n_rows * hidden);
  T* run = workspace.take<T>(hidden);

  const auto back_from = [&](int64_t l, const T* d_y, const T* x, int64_t x_stride, const T* y, T* d_x) {
    linear_backward<T, Products>(layers[l], n_rows, d_y, x, x_stride, y, d_x, sums[2 * l], sums[2 * l + 1]);
  };
  const auto back = [&](int64_t l, const T* d_y, const T* x, const T* y, T* d_x) {
    back_from(l, d_y, x, layers[l].n_in, y, d_x);
  };
  split_base(network, net, first, n_rows, block.base1, scaled, opened);

  back(kHead, args.d_out + (net * args.n_back + first) * layers[kHead].n_out, block.mixed, nullptr, args.d_mixed + row * s.width);
  backward<T, Products>(args.modules, net, first, n_rows, sums[2 * kModules], sums[2 * kModules + 1]);
  back(kModule0, args.modules.d_h0 + row * s.width, opened, block.h0, d_opened);

  const int64_t slots = s.n_modules * s.n_kept;
  T* d_gate = args.modules.d_gate + row * slots;
  if (args.to_gate)
    for (int64_t j = 0; j < n_rows * slots; ++j) d_gate[j] += args.to_gate[row * slots + j];
  T* d_y = workspace.take<T>(n_rows * layers[last].n_out);  // of layer l, from the last to the first
  select_routes_backward({s.n_modules, s.n_kept}, d_gate, args.modules.index + row * slots, args.modules.gate + row * slots,
                         d_y, n_rows);
  for (int64_t l = last; l >= kRoute; --l) {
    const T *x = l > kRoute ? route[l - 1 - kRoute] : scaled, *y = l < last ? route[l - kRoute] : nullptr;
    T* d_in = l > kRoute ? workspace.take<T>(n_rows * layers[l].n_in) : d_scaled;
    back(l, d_y, x, y, d_in);
    d_y = d_in;
  }

  // d_f, and d_g in the place of d_scaled.
  for (int64_t r = 0; r < n_rows; ++r) {
    const T *f = block.base1 + r * hidden, *g = task_row(network, net, network.task[first + r], hidden);
    T *d_u = d_scaled + r * hidden, *d_p = d_opened + r * hidden;
#pragma omp simd
    for (int64_t j = 0; j < hidden; ++j) {
      d_p[j] = d_p[j] * static_cast<T>(f[j] > 0) + d_u[j] * g[j];
      d_u[j] *= f[j];
    }
  }
  if (sums[2 * kTask])
    add_task_gradient(network, network.task + first, n_rows, d_scaled, hidden, run, sums[2 * kTask], sums[2 * kTask + 1]);
  T* d_base0 = scaled;  // read for the last time above
  back(kBase1, d_opened, block.base0, nullptr, d_base0);
  T* d_x = nullptr;
  if (args.d_x && first >= args.first_to_x)
    d_x = args.d_x + (net * (args.n_back - args.first_to_x) + first - args.first_to_x) * layers[kBase0].n_in;
  back_from(kBase0, d_base0, network.x + first * network.x_stride, network.x_stride, block.base0, d_x);
}

}  // namespace d2r_fast::D2R_ISA
