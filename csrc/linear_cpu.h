// One linear layer with its bias and its ReLU, y = act(x W^T + b), forward and backward over a block of rows. A library's
// product would leave bias, ReLU and both of their gradients to passes of their own over memory.
#pragma once
#include "workspace.h"

namespace d2r_fast::D2R_ISA {

template <typename T, typename Products>
void linear_forward(const Layer<T>& layer, int64_t n_rows, const T* x, int64_t x_stride, T* y) {
  const auto [n_in, n_out, relu, panels, layer_bias] = layer;
  const int64_t buffer = n_rows * kTileStride<T>, padded = round_up(n_out, kPanel<T>);
  Workspace& workspace = Workspace::of_this_thread();
  workspace.reserve(sizeof(T) * (2 * buffer + padded) + 1024);
  T* x_rows = workspace.take<T>(buffer);
  T* z_rows = workspace.take<T>(buffer);
  T* bias = workspace.take<T>(padded);
  std::copy_n(layer_bias, n_out, bias);
  std::fill(bias + n_out, bias + padded, T(0));
  for (int64_t row = 0; row < n_rows; ++row) std::copy_n(x + row * x_stride, n_in, x_rows + row * kTileStride<T>);
  Products::multiply(n_rows, x_rows, panels, n_in, n_out, bias, z_rows);
  for (int64_t row = 0; row < n_rows; ++row) {
    const T* z = z_rows + row * kTileStride<T>;
    T* y_row = y + row * n_out;
    if (!relu) {
      std::copy_n(z, n_out, y_row);
      continue;
    }
#pragma omp simd
    for (int64_t j = 0; j < n_out; ++j) y_row[j] = z[j] < 0 ? T(0) : z[j];  // a NaN stays one
  }
}

template <typename T, typename Products>
void linear_backward(const Layer<T>& layer, int64_t n_rows, const T* d_y, const T* x, int64_t x_stride, const T* y, T* d_x,
                     T* d_weight, T* d_bias) {
  const int64_t n_in = layer.n_in, n_out = layer.n_out;
  const int64_t buffer = d_x ? n_rows * kTileStride<T> : 0;
  const int64_t in_stride = row_stride<T>(n_in), out_stride = row_stride<T>(n_out);
  const int64_t scratch_size = Products::scratch(n_rows, in_stride + out_stride);
  Workspace& workspace = Workspace::of_this_thread();
  workspace.reserve(sizeof(T) * (2 * buffer + n_rows * (in_stride + out_stride) + scratch_size) + 1024);
  T* dz_buffer = workspace.take<T>(buffer);
  T* dx_buffer = workspace.take<T>(buffer);
  T* dz_rows = workspace.take<T>(n_rows * out_stride);
  T* x_rows = workspace.take<T>(n_rows * in_stride);
  T* scratch = workspace.take<T>(scratch_size);

  for (int64_t row = 0; row < n_rows; ++row) {
    T* dz = dz_rows + row * out_stride;
    std::copy_n(d_y + row * n_out, n_out, dz);
    if (layer.relu) {
      const T* y_row = y + row * n_out;
      // Multiplied, not chosen: compilers turn the choice into a branch, which half of the elements mispredict.
#pragma omp simd
      for (int64_t j = 0; j < n_out; ++j) dz[j] *= static_cast<T>(y_row[j] > 0);
    }
  }
  if (d_bias) {
    for (int64_t row = 0; row < n_rows; ++row) {
      const T* dz = dz_rows + row * out_stride;
#pragma omp simd
      for (int64_t j = 0; j < n_out; ++j) d_bias[j] += dz[j];
      std::copy_n(x + row * x_stride, n_in, x_rows + row * in_stride);
    }
    Products::add_outer(n_rows, {dz_rows, out_stride, n_out}, {x_rows, in_stride, n_in}, d_weight, scratch);
  }
  if (!d_x) return;
  for (int64_t row = 0; row < n_rows; ++row) std::copy_n(dz_rows + row * out_stride, n_out, dz_buffer + row * kTileStride<T>);
  Products::multiply(n_rows, dz_buffer, layer.panels, n_out, n_in, nullptr, dx_buffer);
  for (int64_t row = 0; row < n_rows; ++row) std::copy_n(dx_buffer + row * kTileStride<T>, n_in, d_x + row * n_in);
}

}  // namespace d2r_fast::D2R_ISA
