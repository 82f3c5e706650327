// Levels of N modules side by side, each of which reads a mix of the level before it, and the gates of these mixes; over a
// block of rows. Nothing but the modules' outputs is kept for backward, which mixes again what they read.
#pragma once
#include <cmath>

#include "block_layers.h"
#include "mix.h"

namespace d2r_fast::D2R_ISA {

template <typename T, typename Products>
void levels_forward(const LevelsForwardArgs<T>& args, int64_t net, int64_t first, int64_t n_rows) {
  const LevelsArgs<T>& s = args.levels;
  const int64_t n_levels = s.n_levels, n = s.n_modules, n_in = s.n_in, width = s.width;
  const int64_t line = n * width, n_gates = (n_levels - 1) * n * n + n, at = net * s.n_rows + first;
  const int64_t widest = std::max(n_in, width), kept = args.m ? 0 : n_rows * 2 * line;
  Workspace& workspace = Workspace::of_this_thread();
  workspace.reserve(ForwardBlock<T, Products>::bytes(n_rows, widest) + sizeof(T) * kept + 64);
  ForwardBlock<T, Products> block(workspace, n_rows, widest);
  T* own = workspace.take<T>(kept);  // two levels in turn, where no backward follows
  const auto m = [&](int64_t row, int64_t level) {
    return args.m ? args.m + ((at + row) * n_levels + level) * line : own + (row * 2 + level % 2) * line;
  };
  const auto gate = [&](int64_t row, int64_t level) { return s.gate + (at + row) * n_gates + (level - 1) * n * n; };
  const Layer<T>* layer = s.layers + net * n_levels * n;
  block.input([&](int64_t row, T* x) { std::copy_n(s.u + (at + row) * n_in, n_in, x); });
  for (int64_t level = 0; level < n_levels; ++level)
    for (int64_t j = 0; j < n; ++j, ++layer) {
      if (level > 0)
        block.input([&](int64_t row, T* x) { mix(n, width, gate(row, level) + j * n, m(row, level - 1), x, kRelu); });
      block.through(*layer, [&](int64_t row, const T* y) { std::copy_n(y, width, m(row, level) + j * width); });
    }
  for (int64_t row = 0; row < n_rows; ++row)
    mix(n, width, gate(row, n_levels), m(row, n_levels - 1), args.y + (at + row) * width, kRelu);
}

template <typename T, typename Products>
void levels_backward(const LevelsBackwardArgs<T>& args, int64_t net, int64_t first, int64_t n_rows, T* const* sums) {
  const LevelsArgs<T>& s = args.levels;
  const int64_t n_levels = s.n_levels, n = s.n_modules, n_in = s.n_in, width = s.width;
  const int64_t line = n * width, n_gates = (n_levels - 1) * n * n + n, at = net * s.n_rows + first;
  const int64_t widest = std::max(n_in, width);
  Workspace& workspace = Workspace::of_this_thread();
  workspace.reserve(BackwardBlock<T, Products>::bytes(n_rows, widest) + sizeof(T) * (2 * n_rows * line + width) + 3 * 64);
  BackwardBlock<T, Products> block(workspace, n_rows, widest);
  T* d_m = workspace.take<T>(n_rows * line);       // of the level in turn
  T* d_before = workspace.take<T>(n_rows * line);  // and of the one before it
  T* d_x = workspace.take<T>(width);
  const auto m = [&](int64_t row, int64_t level) { return args.m + ((at + row) * n_levels + level) * line; };
  const auto gate_at = [&](int64_t row, int64_t level) { return (at + row) * n_gates + (level - 1) * n * n; };

  std::fill_n(d_m, n_rows * line, T(0));
  for (int64_t row = 0; row < n_rows; ++row) {
    const T *d_y = args.d_y + (at + row) * width, *y = args.y + (at + row) * width;
    for (int64_t d = 0; d < width; ++d) d_x[d] = d_y[d] * static_cast<T>(y[d] > 0);
    const int64_t gate = gate_at(row, n_levels);
    mix_backward(n, width, d_x, s.gate + gate, m(row, n_levels - 1), args.d_gate + gate, d_m + row * line);
  }
  for (int64_t level = n_levels - 1; level > 0; --level, std::swap(d_m, d_before)) {
    std::fill_n(d_before, n_rows * line, T(0));
    for (int64_t j = 0; j < n; ++j) {
      T *d_weight = sums[2 * level], *d_bias = sums[2 * level + 1];
      if (d_weight) d_weight += j * width * width, d_bias += j * width;
      block.input([&](int64_t row, T* x) {
        mix(n, width, s.gate + gate_at(row, level) + j * n, m(row, level - 1), x, kRelu);
      });
      block.back(
          s.layers[(net * n_levels + level) * n + j], d_weight, d_bias,
          [&](int64_t row, T* d_y) { std::copy_n(d_m + row * line + j * width, width, d_y); },
          [&](int64_t row, T* d, const T* x) {
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) d[i] *= static_cast<T>(x[i] > 0);
            const int64_t gate = gate_at(row, level) + j * n;
            mix_backward(n, width, d, s.gate + gate, m(row, level - 1), args.d_gate + gate, d_before + row * line);
          });
    }
  }
  block.input([&](int64_t row, T* x) { std::copy_n(s.u + (at + row) * n_in, n_in, x); });
  for (int64_t j = 0; j < n; ++j) {
    T *d_weight = sums[0], *d_bias = sums[1];
    if (d_weight) d_weight += j * width * n_in, d_bias += j * width;
    block.back(
        s.layers[net * n_levels * n + j], d_weight, d_bias,
        [&](int64_t row, T* d_y) { std::copy_n(d_m + row * line + j * width, width, d_y); },
        [&](int64_t row, const T* d, const T*) {
          T* d_u = args.d_u + (at + row) * n_in;
          if (j == 0) return void(std::copy_n(d, n_in, d_u));
#pragma omp simd
          for (int64_t i = 0; i < n_in; ++i) d_u[i] += d[i];
        });
  }
}

// p = softmax(z) over n numbers.
template <typename T>
void softmax(int64_t n, const T* z, T* p) {
  T most = z[0], sum = 0;
  for (int64_t k = 1; k < n; ++k) most = z[k] > most ? z[k] : most;
  for (int64_t k = 0; k < n; ++k) sum += p[k] = std::exp(z[k] - most);
  for (int64_t k = 0; k < n; ++k) p[k] /= sum;
}

// Layers of a network: the first gate's, then for every mix after it what scales c, and its gate's.
template <typename T, typename Products>
void gates_forward(const GatesForwardArgs<T>& args, int64_t net, int64_t first, int64_t n_rows) {
  const GatesArgs<T>& s = args.gates;
  const int64_t n_levels = s.n_levels, n = s.n_modules, n_in = s.n_in;
  const int64_t n_gates = (n_levels - 1) * n * n + n, at = net * s.n_rows + first, widest = std::max(n_in, n_gates);
  const int64_t kept = args.scale ? 0 : n_rows * n_in;
  Workspace& workspace = Workspace::of_this_thread();
  workspace.reserve(ForwardBlock<T, Products>::bytes(n_rows, widest) + sizeof(T) * kept + 64);
  ForwardBlock<T, Products> block(workspace, n_rows, widest);
  T* own = workspace.take<T>(kept);  // where no backward follows
  const auto c = [&](int64_t row) { return s.c + (at + row) * n_in; };
  const auto p = [&](int64_t row) { return args.p + (at + row) * n_gates; };
  const Layer<T>* layer = s.layers + net * (2 * n_levels - 1);
  for (int64_t level = 0; level < n_levels; ++level) {
    const auto scale = [&](int64_t row) {
      return args.scale ? args.scale + ((at + row) * (n_levels - 1) + level - 1) * n_in : own + row * n_in;
    };
    const int64_t before = level * n * n;
    if (level > 0) {
      block.input([&](int64_t row, T* x) { std::copy_n(p(row), before, x); });
      block.through(*layer++, [&](int64_t row, const T* y) { std::copy_n(y, n_in, scale(row)); });
    }
    block.input([&](int64_t row, T* x) {
      const T *c_row = c(row), *by = level > 0 ? scale(row) : nullptr;
      for (int64_t i = 0; i < n_in; ++i) x[i] = kRelu(by ? by[i] * c_row[i] : c_row[i]);
    });
    block.through(*layer++, [&](int64_t row, const T* z) {
      for (int64_t j = 0; j < std::min(n * n, n_gates - before); j += n) softmax(n, z + j, p(row) + before + j);
    });
  }
}

template <typename T, typename Products>
void gates_backward(const GatesBackwardArgs<T>& args, int64_t net, int64_t first, int64_t n_rows, T* const* sums) {
  const GatesArgs<T>& s = args.gates;
  const int64_t n_levels = s.n_levels, n = s.n_modules, n_in = s.n_in;
  const int64_t n_gates = (n_levels - 1) * n * n + n, at = net * s.n_rows + first, widest = std::max(n_in, n_gates);
  Workspace& workspace = Workspace::of_this_thread();
  workspace.reserve(BackwardBlock<T, Products>::bytes(n_rows, widest) + sizeof(T) * n_rows * (n_in + n_gates) + 2 * 64);
  BackwardBlock<T, Products> block(workspace, n_rows, widest);
  T* d_scale = workspace.take<T>(n_rows * n_in);
  T* d_p = workspace.take<T>(n_rows * n_gates);
  std::copy_n(args.d_p + at * n_gates, n_rows * n_gates, d_p);
  for (int64_t level = n_levels - 1; level >= 0; --level) {
    const int64_t before = level * n * n, l = 2 * level, n_own = std::min(n * n, n_gates - before);
    const auto scale = [&](int64_t row) { return args.scale + ((at + row) * (n_levels - 1) + level - 1) * n_in; };
    block.input([&](int64_t row, T* x) {
      const T *c = s.c + (at + row) * n_in, *by = level > 0 ? scale(row) : nullptr;
      for (int64_t i = 0; i < n_in; ++i) x[i] = kRelu(by ? by[i] * c[i] : c[i]);
    });
    block.back(
        s.layers[net * (2 * n_levels - 1) + l], sums[2 * l], sums[2 * l + 1],
        [&](int64_t row, T* d_z) {
          const T *p = args.p + (at + row) * n_gates + before, *d = d_p + row * n_gates + before;
          for (int64_t j = 0; j < n_own; j += n) {
            T sum = 0;
            for (int64_t k = j; k < j + n; ++k) sum += d[k] * p[k];
            for (int64_t k = j; k < j + n; ++k) d_z[k] = p[k] * (d[k] - sum);
          }
        },
        [&](int64_t row, const T* d, const T* x) {
          const T *c = s.c + (at + row) * n_in, *by = level > 0 ? scale(row) : nullptr;
          T *d_c = args.d_c + (at + row) * n_in, *d_by = d_scale + row * n_in;
          const bool is_first = level == n_levels - 1;  // to be written
#pragma omp simd
          for (int64_t i = 0; i < n_in; ++i) {
            const T d_x = d[i] * static_cast<T>(x[i] > 0);
            d_c[i] = (is_first ? T(0) : d_c[i]) + (by ? d_x * by[i] : d_x);
            d_by[i] = d_x * c[i];
          }
        });
    if (level == 0) continue;
    block.input([&](int64_t row, T* x) { std::copy_n(args.p + (at + row) * n_gates, before, x); });
    block.back(
        s.layers[net * (2 * n_levels - 1) + l - 1], sums[2 * l - 2], sums[2 * l - 1],
        [&](int64_t row, T* d_y) { std::copy_n(d_scale + row * n_in, n_in, d_y); },
        [&](int64_t row, const T* d, const T*) {
          for (int64_t i = 0; i < before; ++i) d_p[row * n_gates + i] += d[i];
        });
  }
}

}  // namespace d2r_fast::D2R_ISA
