// Modules 1..N-1 over a block of rows, forward and backward, only where a row needs them.
//
// A module's rows of the block are gathered into tiles of kTileRows, multiplied while they lie in the first-level cache,
// and scattered back: compaction costs the gather that routing needs anyway, and no buffer is larger than the block.
#pragma once
#include <algorithm>

#include "workspace.h"

namespace d2r_fast::D2R_ISA {

// x = sum of the kept sources, source s of the row at h + s * module_stride.
template <typename T>
inline void mix_sources(const T* h, int64_t module_stride, const int32_t* index, const T* gate, int64_t kept, int64_t width,
                        T* x) {
  const T* a = h + index[0] * module_stride;
  const T gate_a = gate[0];
  if (kept == 1) {
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) x[j] = gate_a * a[j];
    return;
  }
  const T* b = h + index[1] * module_stride;
  const T gate_b = gate[1];
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) x[j] = gate_a * a[j] + gate_b * b[j];
  for (int64_t k = 2; k < kept; ++k) {
    const T* c = h + index[k] * module_stride;
    const T gate_c = gate[k];
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) x[j] += gate_c * c[j];
  }
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

template <typename T, typename Products>
void forward(const ForwardArgs<T>& args, int64_t net, int64_t first, int64_t n_rows) {
  const auto [n_nets, n_all, n_modules, n_kept, width, residual] = args.size;
  const int64_t routes = n_modules * n_kept, at = net * n_all + first;
  const int64_t stride = row_stride<T>(width), tile = kTileRows * kTileStride<T>;
  Workspace& workspace = Workspace::of_this_thread();
  workspace.reserve(sizeof(T) * (2 * tile + stride + (args.h ? 0 : n_modules * n_rows * stride)) + 4 * n_rows + 1024);
  T* x = workspace.take<T>(tile);
  T* z = workspace.take<T>(tile);
  T* bias = workspace.take<T>(stride);
  int32_t* rows = workspace.take<int32_t>(n_rows);
  // Without a backward pass the block's module outputs never leave the cache.
  T* h = args.h ? args.h + (net * n_modules * n_all + first) * width : workspace.take<T>(n_modules * n_rows * stride);
  bool* opened = args.h ? args.opened + (net * n_modules * n_all + first) * width : nullptr;
  const int64_t h_row = args.h ? width : stride, h_module = args.h ? n_all * width : n_rows * stride;
  const int32_t* active = args.active + at;
  std::fill_n(bias, stride, T(0));

  for (int64_t row = 0; row < n_rows; ++row) {
    const T* h0 = args.h0 + (at + row) * width;
    std::copy_n(h0, width, h + row * h_row);
    for (int64_t j = 0; opened && j < width; ++j) opened[row * h_row + j] = h0[j] > 0;  // unused, but never undefined
  }
  for (int64_t i = 1; i < n_modules; ++i) {
    const int64_t module = net * (n_modules - 1) + i - 1, kept = std::min(n_kept, i);
    const std::byte* panels = args.panels + module * Products::packed_bytes(width, width);
    std::copy_n(args.bias + module * width, width, bias);
    const int64_t n = rows_of_module(active, n_rows, i, rows);
    for (int64_t begin = 0; begin < n; begin += kTileRows) {
      const int64_t in_tile = std::min<int64_t>(kTileRows, n - begin);
      for (int64_t r = 0; r < in_tile; ++r) {
        const int64_t row = rows[begin + r], slot = (at + row) * routes + (i - 1) * n_kept;
        mix_sources(h + row * h_row, h_module, args.index + slot, args.gate + slot, kept, width, x + r * kTileStride<T>);
      }
      Products::multiply(in_tile, x, panels, width, width, bias, z);
      for (int64_t r = 0; r < in_tile; ++r) {
        const T *z_row = z + r * kTileStride<T>, *x_row = x + r * kTileStride<T>;
        T* out = h + i * h_module + rows[begin + r] * h_row;
        // A NaN stays one: z < 0 is false for it.
        if (residual) {
#pragma omp simd
          for (int64_t j = 0; j < width; ++j) out[j] = (z_row[j] < 0 ? T(0) : z_row[j]) + x_row[j];
        } else {
#pragma omp simd
          for (int64_t j = 0; j < width; ++j) out[j] = z_row[j] < 0 ? T(0) : z_row[j];
        }
        if (!opened) continue;
        bool* open_row = opened + i * h_module + rows[begin + r] * h_row;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) open_row[j] = z_row[j] > 0;
      }
    }
  }
  for (int64_t row = 0; row < n_rows; ++row) {
    const int64_t slot = (at + row) * routes + (n_modules - 1) * n_kept;
    mix_sources(h + row * h_row, h_module, args.index + slot, args.gate + slot, std::min(n_kept, n_modules), width,
                args.mixed + (at + row) * width);
  }
}

// One kept source of one route: both adjoints of the source, this gate's gradient, and the route's input x once more.
// d_main reaches x through the module's layer, d_res through its residual (null: there is none).
template <typename T, bool kResidual, bool kFirst>
inline T push(const T* d_main, const T* d_res, const T* source, T gate, T flow, int64_t width, T* to_relu, T* to_residual,
              T* x) {
  T d_gate = 0;
#pragma omp simd reduction(+ : d_gate)
  for (int64_t j = 0; j < width; ++j) {
    const T main = d_main[j], rest = kResidual ? d_res[j] : T(0), all = main + rest, h = source[j];
    to_relu[j] += gate * (flow * main + rest);
    to_residual[j] += gate * all;
    d_gate += all * h;
    x[j] = kFirst ? gate * h : x[j] + gate * h;
  }
  return d_gate;
}

template <typename T, typename Products>
void backward(const BackwardArgs<T>& args, int64_t net, int64_t first, int64_t n_rows, T* d_weight, T* d_bias) {
  const auto [n_nets, n_all, n_modules, n_kept, width, residual] = args.size;
  const int64_t routes = n_modules * n_kept, at = net * n_all + first;
  const int64_t stride = row_stride<T>(width), tile = kTileRows * kTileStride<T>, adjoint_module = n_rows * stride;
  Workspace& workspace = Workspace::of_this_thread();
  workspace.reserve(sizeof(T) * (2 * tile + 2 * n_modules * adjoint_module + 2 * n_rows * stride +
                                 Products::scratch(n_rows, 2 * stride)) +
                    4 * n_rows + 1024);
  T* dz_tile = workspace.take<T>(tile);
  T* dx_tile = workspace.take<T>(tile);
  T* to_relu = workspace.take<T>(n_modules * adjoint_module);      // A: reaches a module's ReLU layer
  T* to_residual = workspace.take<T>(n_modules * adjoint_module);  // S: reaches a module's residual
  T* dz_rows = workspace.take<T>(n_rows * stride);                 // a module's rows, one after another
  T* x_rows = workspace.take<T>(n_rows * stride);
  T* scratch = workspace.take<T>(Products::scratch(n_rows, 2 * stride));
  int32_t* rows = workspace.take<int32_t>(n_rows);
  const T* h = args.h + (net * n_modules * n_all + first) * width;
  const auto* opened = reinterpret_cast<const uint8_t*>(args.opened) + (net * n_modules * n_all + first) * width;
  const int64_t h_module = n_all * width;
  const int32_t* active = args.active + at;

  for (int64_t module = 0; module < n_modules; ++module) {
    const int64_t n = rows_of_module(active, n_rows, module, rows);
    for (int64_t r = 0; r < n; ++r) {
      std::fill_n(to_relu + module * adjoint_module + rows[r] * stride, width, T(0));
      std::fill_n(to_residual + module * adjoint_module + rows[r] * stride, width, T(0));
    }
  }
  std::fill_n(args.d_gate + at * routes, n_rows * routes, T(0));

  const auto push_route = [&](int64_t i, int64_t row, const T* d_main, const T* d_res, T* x) {
    for (int64_t k = 0; k < std::min(n_kept, i); ++k) {
      const int64_t slot = (at + row) * routes + (i - 1) * n_kept + k, source = args.index[slot];
      const auto step = d_res ? (k ? push<T, true, false> : push<T, true, true>)
                              : (k ? push<T, false, false> : push<T, false, true>);
      args.d_gate[slot] = step(d_main, d_res, h + source * h_module + row * width, args.gate[slot], T(args.flow[slot]), width,
                               to_relu + source * adjoint_module + row * stride,
                               to_residual + source * adjoint_module + row * stride, x);
    }
  };

  for (int64_t row = 0; row < n_rows; ++row) push_route(n_modules, row, args.d_mixed + (at + row) * width, nullptr, x_rows);
  for (int64_t i = n_modules - 1; i > 0; --i) {
    const std::byte* panels = args.panels + (net * (n_modules - 1) + i - 1) * Products::packed_bytes(width, width);
    T* d_bias_i = d_bias ? d_bias + (i - 1) * width : nullptr;
    const int64_t n = rows_of_module(active, n_rows, i, rows);
    for (int64_t begin = 0; begin < n; begin += kTileRows) {
      const int64_t in_tile = std::min<int64_t>(kTileRows, n - begin);
      for (int64_t r = 0; r < in_tile; ++r) {
        const int64_t row = rows[begin + r];
        const T* a = to_relu + i * adjoint_module + row * stride;
        const uint8_t* open_row = opened + i * h_module + row * width;
        T *dz = dz_tile + r * kTileStride<T>, *dz_kept = dz_rows + (begin + r) * stride;
        // Multiplied, not chosen: compilers turn the choice into a branch, which half of the elements mispredict.
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) dz_kept[j] = dz[j] = a[j] * static_cast<T>(open_row[j]);
        if (!d_bias_i) continue;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) d_bias_i[j] += dz_kept[j];
      }
      Products::multiply(in_tile, dz_tile, panels, width, width, nullptr, dx_tile);
      for (int64_t r = 0; r < in_tile; ++r) {
        const int64_t row = rows[begin + r];
        const T* d_res = residual ? to_residual + i * adjoint_module + row * stride : nullptr;
        push_route(i, row, dx_tile + r * kTileStride<T>, d_res, x_rows + (begin + r) * stride);
      }
    }
    if (d_weight && n)
      Products::add_outer(n, {dz_rows, stride, width}, {x_rows, stride, width}, d_weight + (i - 1) * width * width, scratch);
  }
  // Module 0 has no residual: what reached it through one is dropped.
  for (int64_t row = 0; row < n_rows; ++row) std::copy_n(to_relu + row * stride, width, args.d_h0 + (at + row) * width);
}

}  // namespace d2r_fast::D2R_ISA
