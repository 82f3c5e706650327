// One linear layer with its bias and its ReLU, y = act(x W^T + b), forward and backward over a block of rows. A library's
// product would leave bias, ReLU and both of their gradients to passes of their own over memory.
//
// Products read and write tile buffers (tile_product.h); a caller that runs several layers hands them on from one to the
// next.
#pragma once
#include "workspace.h"

namespace d2r_fast::D2R_ISA {

template <typename T>
void copy_rows(int64_t n_rows, int64_t width, const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  for (int64_t row = 0; row < n_rows; ++row) std::copy_n(from + row * from_stride, width, to + row * to_stride);
}
template <typename T>
void to_tiles(int64_t n_rows, int64_t width, const T* from, int64_t stride, T* tiles) {
  copy_rows(n_rows, width, from, stride, tiles, kTileStride<T>);
}
template <typename T>
void from_tiles(int64_t n_rows, int64_t width, const T* tiles, T* to, int64_t stride) {
  copy_rows(n_rows, width, tiles, kTileStride<T>, to, stride);
}

// to = max(0, from); may be in place.
template <typename T>
void relu(int64_t n, const T* from, T* to) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] = from[j] < 0 ? T(0) : from[j];  // a NaN stays one
}

// z = x W^T + b, without the ReLU; x and z are tile buffers.
template <typename T, typename Products>
void linear_product(const Layer<T>& layer, int64_t n_rows, const T* x, T* z) {
  alignas(64) T bias[kMaxWidth + kPanel<T>];  // room for whole panels
  std::copy_n(layer.bias, layer.n_out, bias);
  std::fill_n(bias + layer.n_out, kPanel<T>, T(0));
  Products::multiply(n_rows, x, layer.panels, layer.n_in, layer.n_out, bias, z);
}

// From d_y in the tile buffer `dz`, which becomes the gradient before the ReLU. y, rows y_stride numbers apart, is read with
// ReLU only; x, whose rows have room for whole panels, with d_bias only. d_x is a tile buffer. d_x, or d_bias with
// d_weight, may be null: not wanted. (An empty d_weight is null, too.)
template <typename T, typename Products>
void linear_product_backward(const Layer<T>& layer, int64_t n_rows, T* dz, const T* y, int64_t y_stride, const T* x,
                             int64_t x_stride, T* d_x, T* d_weight, T* d_bias) {
  const int64_t n_in = layer.n_in, n_out = layer.n_out, stride = row_stride<T>(n_out);
  for (int64_t row = 0; layer.relu && row < n_rows; ++row) {
    T* dz_row = dz + row * kTileStride<T>;
    const T* y_row = y + row * y_stride;
    // Multiplied, not chosen: compilers turn the choice into a branch, which half of the elements mispredict.
#pragma omp simd
    for (int64_t j = 0; j < n_out; ++j) dz_row[j] *= static_cast<T>(y_row[j] > 0);
  }
  if (d_bias) {
    const int64_t scratch_size = Products::scratch(n_rows, x_stride + stride);
    Workspace& workspace = Workspace::of_this_thread();
    workspace.reserve(sizeof(T) * (n_rows * stride + scratch_size) + 1024);
    T* dz_rows = workspace.take<T>(n_rows * stride);  // rows of a tile buffer would share a few sets of the cache
    T* scratch = workspace.take<T>(scratch_size);
    for (int64_t row = 0; row < n_rows; ++row) {
      const T* from = dz + row * kTileStride<T>;
      T* to = dz_rows + row * stride;
#pragma omp simd
      for (int64_t j = 0; j < n_out; ++j) {
        to[j] = from[j];
        d_bias[j] += from[j];
      }
    }
    Products::add_outer(n_rows, {dz_rows, stride, n_out}, {x, x_stride, n_in}, d_weight, scratch);
  }
  if (d_x) Products::multiply(n_rows, dz, layer.panels, n_out, n_in, nullptr, d_x);
}

template <typename T, typename Products>
void linear_forward(const Layer<T>& layer, int64_t n_rows, const T* x, int64_t x_stride, T* y) {
  Workspace& workspace = Workspace::of_this_thread<Workspace::Owner::kCaller>();
  workspace.reserve(sizeof(T) * 2 * n_rows * kTileStride<T> + 1024);
  T* x_tiles = workspace.take<T>(n_rows * kTileStride<T>);
  T* z_tiles = workspace.take<T>(n_rows * kTileStride<T>);
  to_tiles(n_rows, layer.n_in, x, x_stride, x_tiles);
  linear_product<T, Products>(layer, n_rows, x_tiles, z_tiles);
  if (!layer.relu) return from_tiles(n_rows, layer.n_out, z_tiles, y, layer.n_out);
  for (int64_t row = 0; row < n_rows; ++row) relu(layer.n_out, z_tiles + row * kTileStride<T>, y + row * layer.n_out);
}

template <typename T, typename Products>
void linear_backward(const Layer<T>& layer, int64_t n_rows, const T* d_y, const T* x, int64_t x_stride, const T* y, T* d_x,
                     T* d_weight, T* d_bias) {
  const int64_t n_in = layer.n_in, n_out = layer.n_out, stride = row_stride<T>(n_in);
  Workspace& workspace = Workspace::of_this_thread<Workspace::Owner::kCaller>();
  workspace.reserve(sizeof(T) * n_rows * (2 * kTileStride<T> + stride) + 1024);
  T* dz = workspace.take<T>(n_rows * kTileStride<T>);
  T* dx_tiles = workspace.take<T>(n_rows * kTileStride<T>);
  T* x_rows = workspace.take<T>(n_rows * stride);
  to_tiles(n_rows, n_out, d_y, n_out, dz);
  if (d_bias) copy_rows(n_rows, n_in, x, x_stride, x_rows, stride);
  linear_product_backward<T, Products>(layer, n_rows, dz, y, n_out, x_rows, stride, d_x ? dx_tiles : nullptr, d_weight,
                                       d_bias);
  if (d_x) from_tiles(n_rows, n_in, dx_tiles, d_x, n_in);
}

}  // namespace d2r_fast::D2R_ISA
