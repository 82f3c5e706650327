// Modules 1..N-1 over a block of rows, forward and backward, only where a row needs them.
//
// A module's rows of the block are gathered into tiles of kTileRows, multiplied while they lie in the first-level cache,
// and scattered back: compaction costs the gather that routing needs anyway, and no buffer is larger than the block.
//
// What is kept of a row, its modules' outputs and their gradients, lies in one piece: a line of width numbers for each
// module that is active, in their order. Lines of modules that are not active do not exist.
#pragma once
#include <algorithm>
#include <bit>

#include "route_uses.h"
#include "workspace.h"

namespace d2r_fast::D2R_ISA {

// Which of the row's lines is the module's.
inline int64_t line_of(int32_t active, int64_t module) {
  return std::popcount(static_cast<uint32_t>(active) & ((uint64_t{1} << module) - 1));
}

// The line at which each row of a block begins if the rows lie one after another; returns how many lines that takes.
inline int64_t begin_lines(const int32_t* active, int64_t n_rows, int64_t n_modules, int64_t* begin) {
  int64_t n = 0;
  for (int64_t row = 0; row < n_rows; ++row) {
    begin[row] = n;
    n += count_lines(active[row], n_modules);
  }
  return n;
}

// Asks for n numbers of memory before they are needed.
template <typename T>
inline void prefetch(const T* from, int64_t n) {
  for (int64_t j = 0; j < n; j += 64 / sizeof(T)) __builtin_prefetch(from + j, 0, 2);
}

// The rows of a block that need `module`, in order; returns how many.
inline int64_t rows_of_module(const int32_t* active, int64_t n_rows, int64_t module, int32_t* rows) {
  int64_t n = 0;
  for (int64_t row = 0; row < n_rows; ++row) {
    rows[n] = static_cast<int32_t>(row);
    n += static_cast<uint32_t>(active[row]) >> module & 1;
  }
  return n;
}

// x = sum of the kept sources of one route; h holds the row's lines.
template <typename T>
inline void mix_sources(const T* h, int32_t active, const int32_t* index, const T* gate, int64_t kept, int64_t width, T* x) {
  const T* a = h + line_of(active, index[0]) * width;
  const T gate_a = gate[0];
  if (kept == 1) {
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) x[j] = gate_a * a[j];
    return;
  }
  const T* b = h + line_of(active, index[1]) * width;
  const T gate_b = gate[1];
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) x[j] = gate_a * a[j] + gate_b * b[j];
  for (int64_t k = 2; k < kept; ++k) {
    const T* c = h + line_of(active, index[k]) * width;
    const T gate_c = gate[k];
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) x[j] += gate_c * c[j];
  }
}

template <typename T, typename Products>
void forward(const ForwardArgs<T>& args, int64_t net, int64_t first, int64_t n_rows) {
  const auto [n_nets, n_all, n_modules, n_kept, width, residual] = args.size;
  const int64_t routes = n_modules * n_kept, at = net * n_all + first;
  const int64_t stride = row_stride<T>(width), tile = kTileRows * kTileStride<T>;
  Workspace& workspace = Workspace::of_this_thread();
  workspace.reserve(sizeof(T) * (2 * tile + stride + (args.h ? 0 : n_modules * n_rows * width)) + 12 * n_rows + 1024);
  T* x = workspace.take<T>(tile);
  T* z = workspace.take<T>(tile);
  T* bias = workspace.take<T>(stride);
  int32_t* rows = workspace.take<int32_t>(n_rows);
  int64_t* lines = workspace.take<int64_t>(n_rows);
  const int32_t* active = args.active + at;
  const int64_t* begin = args.begin + at;
  T* h = args.h;
  if (!h) {  // without a backward pass the block's module outputs never leave the cache
    h = workspace.take<T>(begin_lines(active, n_rows, n_modules, lines) * width);
    begin = lines;
  }
  std::fill_n(bias, stride, T(0));

  for (int64_t row = 0; row < n_rows; ++row) {
    const T* h0 = args.h0 + (at + row) * width;
    std::copy_n(h0, width, h + begin[row] * width);
    if (!args.h) continue;
    bool* opened = args.opened + begin[row] * width;
    for (int64_t j = 0; j < width; ++j) opened[j] = h0[j] > 0;  // unused, but never undefined
  }
  for (int64_t i = 1; i < n_modules; ++i) {
    const int64_t module = net * (n_modules - 1) + i - 1, kept = std::min(n_kept, i);
    const std::byte* panels = args.panels + module * Products::packed_bytes(width, width);
    std::copy_n(args.bias + module * width, width, bias);
    for_each_tile(rows_of_module(active, n_rows, i, rows), [&](int64_t from, int64_t in_tile) {
      for (int64_t r = 0; r < in_tile; ++r) {
        const int64_t row = rows[from + r], slot = (at + row) * routes + (i - 1) * n_kept;
        mix_sources(h + begin[row] * width, active[row], args.index + slot, args.gate + slot, kept, width,
                    x + r * kTileStride<T>);
      }
      for (int64_t r = from; args.h && r < from + in_tile; ++r) {  // soon written, and so far in no cache
        const int64_t line = (begin[rows[r]] + line_of(active[rows[r]], i)) * width;
        prefetch(args.h + line, width);
        prefetch(args.opened + line, width);
      }
      Products::multiply(in_tile, x, panels, width, width, bias, z);
      for (int64_t r = 0; r < in_tile; ++r) {
        const int64_t row = rows[from + r], line = (begin[row] + line_of(active[row], i)) * width;
        const T *z_row = z + r * kTileStride<T>, *x_row = x + r * kTileStride<T>;
        T* out = h + line;
        // A NaN stays one: z < 0 is false for it.
        if (residual) {
#pragma omp simd
          for (int64_t j = 0; j < width; ++j) out[j] = (z_row[j] < 0 ? T(0) : z_row[j]) + x_row[j];
        } else {
#pragma omp simd
          for (int64_t j = 0; j < width; ++j) out[j] = z_row[j] < 0 ? T(0) : z_row[j];
        }
        if (!args.h) continue;
        bool* opened = args.opened + line;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) opened[j] = z_row[j] > 0;
      }
    });
  }
  for (int64_t row = 0; row < n_rows; ++row) {
    const int64_t slot = (at + row) * routes + (n_modules - 1) * n_kept;
    mix_sources(h + begin[row] * width, active[row], args.index + slot, args.gate + slot, std::min(n_kept, n_modules), width,
                args.mixed + (at + row) * width);
  }
}

template <typename T, typename Products>
void backward(const BackwardArgs<T>& args, int64_t net, int64_t first, int64_t n_rows, T* d_weight, T* d_bias) {
  const auto [n_nets, n_all, n_modules, n_kept, width, residual] = args.size;
  const int64_t routes = n_modules * n_kept, at = net * n_all + first;
  const int64_t stride = row_stride<T>(width), tile = kTileRows * kTileStride<T>;
  const int32_t* active = args.active + at;
  Workspace& workspace = Workspace::of_this_thread();
  workspace.reserve(sizeof(T) * (2 * tile + (2 * n_modules * n_rows + 1) * width + 2 * n_rows * stride +
                                 Products::scratch(n_rows, 2 * stride)) +
                    n_rows * (12 + 2 * (n_modules + routes)) + 1024);
  int32_t* rows = workspace.take<int32_t>(n_rows);
  int64_t* begin = workspace.take<int64_t>(n_rows);
  int16_t* last = workspace.take<int16_t>(n_rows * n_modules);
  int16_t* before = workspace.take<int16_t>(n_rows * routes);
  T* dz_tile = workspace.take<T>(tile);
  T* dx_tile = workspace.take<T>(tile);
  T* dz_rows = workspace.take<T>(n_rows * stride);  // a module's rows, one after another
  T* x_rows = workspace.take<T>(n_rows * stride);
  T* zeros = workspace.take<T>(width);
  T* scratch = workspace.take<T>(Products::scratch(n_rows, 2 * stride));
  // Lines like those of h: the gradient at each module's input, and its part through the residual, which is S.
  const int64_t n_lines = begin_lines(active, n_rows, n_modules, begin);
  T* d_all = workspace.take<T>(n_lines * width);
  T* d_residual = workspace.take<T>(residual ? n_lines * width : 0);
  std::fill_n(zeros, width, T(0));
  std::fill_n(args.d_gate + at * routes, n_rows * routes, T(0));
  for (int64_t row = 0; row < n_rows; ++row) {
    const int64_t n = count_lines(active[row], n_modules) * width;
    prefetch(args.h + args.begin[at + row] * width, n);
    prefetch(args.opened + args.begin[at + row] * width, n);
    list_uses(active[row], args.index + (at + row) * routes, n_modules, n_kept, last + row * n_modules, before + row * routes);
  }

  const auto pull_row = [&]<bool kResidual>(int64_t i, int64_t row, T* to_relu, T* to_residual) {
    const auto use_at = [&](int64_t slot) {
      const int64_t user = slot / n_kept + 1, line = (begin[row] + line_of(active[row], user)) * width;
      const T* all = user == n_modules ? args.d_mixed + (at + row) * width : d_all + line;
      const T* past_mask = residual && user < n_modules ? d_residual + line : zeros;
      slot += (at + row) * routes;
      return Use<T>{all, args.flow[slot] ? all : past_mask, args.gate[slot], args.d_gate + slot};
    };
    const T* h = args.h + (args.begin[at + row] + line_of(active[row], i)) * width;
    pull<kResidual>(last[row * n_modules + i], before + row * routes, use_at, h, width, to_relu, to_residual);
  };

  for (int64_t i = n_modules - 1; i > 0; --i) {
    const std::byte* panels = args.panels + (net * (n_modules - 1) + i - 1) * Products::packed_bytes(width, width);
    T* d_bias_i = d_bias ? d_bias + (i - 1) * width : nullptr;
    const int64_t n = rows_of_module(active, n_rows, i, rows);
    for_each_tile(n, [&](int64_t from, int64_t in_tile) {
      for (int64_t r = 0; r < in_tile; ++r) {
        const int64_t row = rows[from + r], line = line_of(active[row], i);
        const auto* opened = reinterpret_cast<const uint8_t*>(args.opened) + (args.begin[at + row] + line) * width;
        T *dz = dz_tile + r * kTileStride<T>, *dz_kept = dz_rows + (from + r) * stride;
        if (residual)
          pull_row.template operator()<true>(i, row, dz_kept, d_residual + (begin[row] + line) * width);
        else
          pull_row.template operator()<false>(i, row, dz_kept, nullptr);
        // Multiplied, not chosen: compilers turn the choice into a branch, which half of the elements mispredict.
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) dz[j] = dz_kept[j] *= static_cast<T>(opened[j]);
        if (!d_bias_i) continue;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) d_bias_i[j] += dz_kept[j];
      }
      Products::multiply(in_tile, dz_tile, panels, width, width, nullptr, dx_tile);
      for (int64_t r = 0; r < in_tile; ++r) {
        const int64_t row = rows[from + r], slot = (at + row) * routes + (i - 1) * n_kept;
        const int64_t line = (begin[row] + line_of(active[row], i)) * width;
        const T *dx = dx_tile + r * kTileStride<T>, *through = d_residual + line;
        T* all = d_all + line;
        if (residual) {
#pragma omp simd
          for (int64_t j = 0; j < width; ++j) all[j] = dx[j] + through[j];
        } else {
          std::copy_n(dx, width, all);
        }
        if (d_weight)
          mix_sources(args.h + args.begin[at + row] * width, active[row], args.index + slot, args.gate + slot,
                      std::min(n_kept, i), width, x_rows + (from + r) * stride);
      }
    });
    if (d_weight && n)
      Products::add_outer(n, {dz_rows, stride, width}, {x_rows, stride, width}, d_weight + (i - 1) * width * width, scratch);
  }
  // Module 0 has no residual: what would pass it is dropped.
  for (int64_t row = 0; row < n_rows; ++row)
    pull_row.template operator()<false>(0, row, args.d_h0 + (at + row) * width, nullptr);
}

}  // namespace d2r_fast::D2R_ISA
