// A linear layer over a block of rows that are made on the spot and go on at once: what an operation of several layers is
// built of. linear_cpu.h has the layer that reads rows and writes rows.
#pragma once
#include "workspace.h"

namespace d2r_fast::D2R_ISA {

// y = x W^T + b, for several layers one after another, each at most `widest` numbers wide.
template <typename T, typename Products>
class ForwardBlock {
 public:
  static size_t bytes(int64_t n_rows, int64_t widest) {
    return sizeof(T) * (2 * n_rows * kTileStride<T> + round_up(widest, kPanel<T>)) + 3 * 64;
  }
  ForwardBlock(Workspace& workspace, int64_t n_rows, int64_t widest)
      : n_rows_(n_rows),
        x_(workspace.take<T>(n_rows * kTileStride<T>)),
        y_(workspace.take<T>(n_rows * kTileStride<T>)),
        bias_(workspace.take<T>(round_up(widest, kPanel<T>))) {}

  // make(row, x) writes a row's input, which stays for all layers that read it.
  template <typename Make>
  void input(const Make& make) {
    for (int64_t row = 0; row < n_rows_; ++row) make(row, x_ + row * kTileStride<T>);
  }
  // take(row, y) gets a row's output.
  template <typename Take>
  void through(const Layer<T>& layer, const Take& take) {
    std::copy_n(layer.bias, layer.n_out, bias_);
    std::fill(bias_ + layer.n_out, bias_ + round_up(layer.n_out, kPanel<T>), T(0));
    Products::multiply(n_rows_, x_, layer.panels, layer.n_in, layer.n_out, bias_, y_);
    for (int64_t row = 0; row < n_rows_; ++row) take(row, y_ + row * kTileStride<T>);
  }

 private:
  int64_t n_rows_;
  T *x_, *y_, *bias_;
};

// The same back: d_x = d_y W, d_W += d_y^T x, d_b += the sum of d_y over the rows.
template <typename T, typename Products>
class BackwardBlock {
 public:
  static size_t bytes(int64_t n_rows, int64_t widest) {
    const int64_t stride = row_stride<T>(widest);
    return sizeof(T) * (2 * n_rows * (kTileStride<T> + stride) + Products::scratch(n_rows, 2 * stride)) + 5 * 64;
  }
  BackwardBlock(Workspace& workspace, int64_t n_rows, int64_t widest)
      : n_rows_(n_rows),
        stride_(row_stride<T>(widest)),
        in_(workspace.take<T>(n_rows * kTileStride<T>)),
        out_(workspace.take<T>(n_rows * kTileStride<T>)),
        x_(workspace.take<T>(n_rows * stride_)),
        d_y_(workspace.take<T>(n_rows * stride_)),
        scratch_(workspace.take<T>(Products::scratch(n_rows, 2 * stride_))) {}

  // make(row, x) writes a row's input again, which stays for all layers that read it.
  template <typename Make>
  void input(const Make& make) {
    for (int64_t row = 0; row < n_rows_; ++row) make(row, x_ + row * stride_);
  }
  // make(row, d_y) writes the gradient of a row's output, take(row, d_x, x) gets that of its input. d_weight may be null:
  // neither it nor d_bias is wanted.
  template <typename Make, typename Take>
  void back(const Layer<T>& layer, T* d_weight, T* d_bias, const Make& make, const Take& take) {
    gradient(layer, d_weight, d_bias, make);
    for (int64_t row = 0; row < n_rows_; ++row)
      std::copy_n(d_y_ + row * stride_, layer.n_out, in_ + row * kTileStride<T>);
    Products::multiply(n_rows_, in_, layer.panels, layer.n_out, layer.n_in, nullptr, out_);
    for (int64_t row = 0; row < n_rows_; ++row) take(row, out_ + row * kTileStride<T>, x_ + row * stride_);
  }
  // Without the gradient of the input.
  template <typename Make>
  void gradient(const Layer<T>& layer, T* d_weight, T* d_bias, const Make& make) {
    for (int64_t row = 0; row < n_rows_; ++row) make(row, d_y_ + row * stride_);
    if (!d_weight) return;
    for (int64_t row = 0; row < n_rows_; ++row) {
      const T* d_y = d_y_ + row * stride_;
#pragma omp simd
      for (int64_t j = 0; j < layer.n_out; ++j) d_bias[j] += d_y[j];
    }
    Products::add_outer(n_rows_, {d_y_, stride_, layer.n_out}, {x_, stride_, layer.n_in}, d_weight, scratch_);
  }

 private:
  int64_t n_rows_, stride_;
  T *in_, *out_, *x_, *d_y_, *scratch_;
};

}  // namespace d2r_fast::D2R_ISA
