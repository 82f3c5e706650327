// A whole network over a block of rows, forward and backward: base, task, routing network, modules, head. From one layer to
// the next the block's activations stay in the second-level cache, and a pass is one region of parallel work.
#pragma once
#include "linear_cpu.h"
#include "routed_modules_cpu.h"
#include "select_routes_cpu.h"

namespace d2r_fast::D2R_ISA {

// What a backward pass reads again, of one block: lies in `NetworkForwardArgs::activations` as [E,B,stride], in this order,
// then the routing network's. h0 and mixed are rows of D numbers; between others lies row_stride<T>, so that the product
// for a weight's gradient reads them where they are.
template <typename T>
struct BlockActivations {
  T *base0, *base1;  // [n,H]; base1 is f
  T *h0, *mixed;     // [n,D]
  T** route;         // [n,width] of each of the routing network's layers but the last
};

// take(stride) gives [n,stride] of memory, or null.
template <typename T, typename Take>
BlockActivations<T> lay_out(const NetworkArgs<T>& network, int64_t width, T** route, const Take& take) {
  const int64_t hidden = row_stride<T>(network.layers[kBase0].n_out);
  BlockActivations<T> block{take(hidden), take(hidden), take(width), take(width), route};
  for (int64_t l = kRoute; l < network.n_layers - 1; ++l) route[l - kRoute] = take(row_stride<T>(network.layers[l].n_out));
  return block;
}

template <typename T>
T* kept_activations(T*& at, const Sizes& s, int64_t net, int64_t first, int64_t stride) {
  T* block = at + (net * s.n_rows + first) * stride;
  at += s.n_nets * s.n_rows * stride;
  return block;
}

template <typename T>
int64_t widest_input(const NetworkArgs<T>& network) {
  int64_t widest = 0;
  for (int64_t l = 0; l < network.n_layers; ++l) widest = std::max(widest, network.layers[l].n_in);
  return widest;
}

template <typename T>
const T* task_row(const NetworkArgs<T>& network, int64_t net, int64_t task, int64_t hidden) {
  const bool known = task >= 0 && task < network.n_tasks;
  return network.task_rows + (net * (network.n_tasks + 1) + (known ? task : network.n_tasks)) * hidden;
}

// What the base's output f goes on as, in a tile buffer: f g, to the routing network, and in the place of f ReLU(f), to
// module 0.
template <typename T>
void split_base(const NetworkArgs<T>& network, int64_t net, const int64_t* task, int64_t n_rows, T* base, T* scaled) {
  const int64_t hidden = network.layers[kBase0].n_out;
  for (int64_t r = 0; r < n_rows; ++r) {
    const T* g = task_row(network, net, task[r], hidden);
    T *f = base + r * kTileStride<T>, *u = scaled + r * kTileStride<T>;
#pragma omp simd
    for (int64_t j = 0; j < hidden; ++j) {
      u[j] = f[j] * g[j];
      f[j] = f[j] < 0 ? T(0) : f[j];
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
  const int64_t last = network.n_layers - 1, row = net * s.n_rows + first;
  const int64_t n_logits = layers[last].n_out, n_out = layers[kHead].n_out, tiles = n_rows * kTileStride<T>;
  Workspace& workspace = Workspace::of_this_thread<Workspace::Owner::kCaller>();
  workspace.reserve(sizeof(T) * (3 * tiles + n_rows * (n_logits + 2 * s.width)) + network.n_layers * sizeof(T*) + 1024);
  T *x = workspace.take<T>(tiles), *y = workspace.take<T>(tiles), *scaled = workspace.take<T>(tiles);
  T* logits = workspace.take<T>(n_rows * n_logits);
  T** route = workspace.take<T*>(network.n_layers);
  const bool keeps = first < args.n_back;
  T* at = args.activations;
  auto block = lay_out(network, s.width, route, [&](int64_t stride) -> T* {
    return keeps ? kept_activations(at, s, net, first, stride) : nullptr;
  });
  if (!keeps) block.h0 = workspace.take<T>(n_rows * s.width), block.mixed = workspace.take<T>(n_rows * s.width);

  // Layer l from one tile buffer to another, and to where backward looks for it.
  const auto run = [&](int64_t l, const T* in, T* out, T* kept) {
    const int64_t width = layers[l].n_out, stride = row_stride<T>(width);
    linear_product<T, Products>(layers[l], n_rows, in, out);
    for (int64_t r = 0; r < n_rows; ++r) {
      T* y_row = out + r * kTileStride<T>;
      if (layers[l].relu) relu(width, y_row, y_row);
      if (!kept) continue;
      std::copy_n(y_row, width, kept + r * stride);
      std::fill_n(kept + r * stride + width, stride - width, T(0));  // counts for nothing, but is never undefined
    }
  };
  to_tiles(n_rows, layers[kBase0].n_in, network.x + first * network.x_stride, network.x_stride, x);
  run(kBase0, x, y, block.base0);
  run(kBase1, y, x, block.base1);
  split_base(network, net, network.task + first, n_rows, x, scaled);
  for (int64_t l = kRoute; l < last; ++l, std::swap(y, scaled)) run(l, scaled, y, route[l - kRoute]);
  linear_product<T, Products>(layers[last], n_rows, scaled, y);
  from_tiles(n_rows, n_logits, y, logits, n_logits);
  select_routes(routes_of_block(args, net, first, logits), n_rows);
  linear_product<T, Products>(layers[kModule0], n_rows, x, y);
  for (int64_t r = 0; r < n_rows; ++r) relu(s.width, y + r * kTileStride<T>, block.h0 + r * s.width);
  if (keeps) {
    ForwardArgs<T> modules = args.modules;
    modules.h0 = block.h0 - row * s.width;
    modules.mixed = block.mixed - row * s.width;
    forward<T, Products>(modules, net, first, n_rows);
  } else {
    forward<T, Products>(alone<T, Products>(args.modules, net, first, n_rows, block.h0, block.mixed), 0, 0, n_rows);
  }
  to_tiles(n_rows, s.width, block.mixed, s.width, x);
  linear_product<T, Products>(layers[kHead], n_rows, x, y);
  from_tiles(n_rows, n_out, y, args.out + row * n_out, n_out);
}

// The gradient of the task layer: d_g of a row goes to the column of its task. Rows of a task stand together in a batch, so
// a run of them is summed before it goes to the columns, which lie apart. d_g is a tile buffer.
template <typename T>
void add_task_gradient(const NetworkArgs<T>& network, const int64_t* task, int64_t n_rows, const T* d_g, int64_t hidden,
                       T* d_weight, T* d_bias) {
  T run[kMaxWidth];
  for (int64_t begin = 0, end; begin < n_rows; begin = end) {
    std::fill_n(run, hidden, T(0));
    for (end = begin; end < n_rows && task[end] == task[begin]; ++end) {
#pragma omp simd
      for (int64_t j = 0; j < hidden; ++j) run[j] += d_g[end * kTileStride<T> + j];
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
  const int64_t hidden = layers[kBase0].n_out, n_in = layers[kBase0].n_in, n_out = layers[kHead].n_out;
  const int64_t last = network.n_layers - 1, row = net * s.n_rows + first;
  const int64_t tiles = n_rows * kTileStride<T>, input = n_rows * row_stride<T>(widest_input(network));
  const int64_t f_stride = row_stride<T>(hidden), n_logits = layers[last].n_out;
  Workspace& workspace = Workspace::of_this_thread<Workspace::Owner::kCaller>();
  workspace.reserve(sizeof(T) * (3 * tiles + input + n_rows * n_logits) + network.n_layers * sizeof(T*) + 1024);
  // A layer's gradient comes in one tile buffer and goes on in another; the third holds what waits.
  T *dy = workspace.take<T>(tiles), *dx = workspace.take<T>(tiles), *d_opened = workspace.take<T>(tiles);
  T* x_rows = workspace.take<T>(input);  // a layer's input, where it is not kept as the products read it
  T* d_logits = workspace.take<T>(n_rows * n_logits);
  T** route = workspace.take<T*>(network.n_layers);
  T* at = const_cast<T*>(args.activations);  // only read: the pointers serve forward, too
  const auto block = lay_out(network, s.width, route,
                             [&](int64_t stride) { return kept_activations(at, s, net, first, stride); });
  const bool learns = sums[2 * kBase0 + 1];

  const auto back = [&](int64_t l, T* d_y, const T* y, int64_t y_stride, const T* x, T* d_x) {
    linear_product_backward<T, Products>(layers[l], n_rows, d_y, y, y_stride, x, row_stride<T>(layers[l].n_in), d_x,
                                         sums[2 * l], sums[2 * l + 1]);
  };
  // x_rows = part(f, g), row by row.
  const auto input_from_base = [&](const auto& part) {
    for (int64_t r = 0; learns && r < n_rows; ++r) {
      const T *f = block.base1 + r * f_stride, *g = task_row(network, net, network.task[first + r], hidden);
      T* x = x_rows + r * f_stride;
#pragma omp simd
      for (int64_t j = 0; j < hidden; ++j) x[j] = part(f[j], g[j]);
    }
  };

  to_tiles(n_rows, n_out, args.d_out + (net * args.n_back + first) * n_out, n_out, dy);
  if (learns) copy_rows(n_rows, s.width, block.mixed, s.width, x_rows, row_stride<T>(s.width));
  back(kHead, dy, nullptr, 0, x_rows, dx);
  from_tiles(n_rows, s.width, dx, args.d_mixed + row * s.width, s.width);
  backward<T, Products>(args.modules, net, first, n_rows, sums[2 * kModules], sums[2 * kModules + 1]);
  to_tiles(n_rows, s.width, args.modules.d_h0 + row * s.width, s.width, dy);
  input_from_base([](T f, T) { return f < 0 ? T(0) : f; });
  back(kModule0, dy, block.h0, s.width, x_rows, d_opened);

  const int64_t slots = s.n_modules * s.n_kept;
  T* d_gate = args.modules.d_gate + row * slots;
  if (args.to_gate)
    for (int64_t j = 0; j < n_rows * slots; ++j) d_gate[j] += args.to_gate[row * slots + j];
  select_routes_backward({s.n_modules, s.n_kept}, d_gate, args.modules.index + row * slots, args.modules.gate + row * slots,
                         d_logits, n_rows);
  to_tiles(n_rows, n_logits, d_logits, n_logits, dy);
  for (int64_t l = last; l > kRoute; --l, std::swap(dy, dx))
    back(l, dy, l < last ? route[l - kRoute] : nullptr, row_stride<T>(layers[l].n_out), route[l - 1 - kRoute], dx);
  input_from_base([](T f, T g) { return f * g; });
  back(kRoute, dy, kRoute < last ? route[0] : nullptr, row_stride<T>(layers[kRoute].n_out), x_rows, dx);

  // d_f in the place of d_opened, and d_g in that of the gradient to f g.
  T *d_f = d_opened, *d_g = dx;
  for (int64_t r = 0; r < n_rows; ++r) {
    const T *f = block.base1 + r * f_stride, *g = task_row(network, net, network.task[first + r], hidden);
    T *to_f = d_f + r * kTileStride<T>, *to_g = d_g + r * kTileStride<T>;
#pragma omp simd
    for (int64_t j = 0; j < hidden; ++j) {
      to_f[j] = to_f[j] * static_cast<T>(f[j] > 0) + to_g[j] * g[j];
      to_g[j] *= f[j];
    }
  }
  if (sums[2 * kTask])
    add_task_gradient(network, network.task + first, n_rows, d_g, hidden, sums[2 * kTask], sums[2 * kTask + 1]);
  back(kBase1, d_f, nullptr, 0, block.base0, dy);
  if (learns) copy_rows(n_rows, n_in, network.x + first * network.x_stride, network.x_stride, x_rows, row_stride<T>(n_in));
  const bool to_x = args.d_x && first >= args.first_to_x;
  back(kBase0, dy, block.base0, f_stride, x_rows, to_x ? dx : nullptr);
  if (to_x)
    from_tiles(n_rows, n_in, dx,
               args.d_x + (net * (args.n_back - args.first_to_x) + first - args.first_to_x) * n_in, n_in);
}

}  // namespace d2r_fast::D2R_ISA
