// A chain of linear layers with ReLU between them over a block of rows, which stays in the cache from layer to layer.
#pragma once
#include "linear_cpu.h"

namespace d2r_fast::D2R_ISA {

template <typename T, typename Products>
void chain_forward(const ChainForwardArgs<T>& args, int64_t net, int64_t first, int64_t n_rows) {
  const ChainArgs<T>& s = args.chain;
  const int64_t owner = net / s.n_side, side = net % s.n_side, n_nets = s.n_nets * s.n_side;
  const int64_t tiles = n_rows * kTileStride<T>, out_stride = s.n_side * s.n_out;
  Workspace& workspace = Workspace::of_this_thread<Workspace::Owner::kCaller>();
  workspace.reserve(sizeof(T) * 2 * tiles + 1024);
  T *x = workspace.take<T>(tiles), *y = workspace.take<T>(tiles), *kept = args.kept;
  to_tiles(n_rows, s.n_in, s.x + owner * s.x_net + first * s.x_stride, s.x_stride, x);
  for (int64_t l = 0; l < s.n_layers; ++l, std::swap(x, y)) {
    const Layer<T>& layer = s.layers[(owner * s.n_layers + l) * s.n_side + side];
    const int64_t width = layer.n_out, stride = row_stride<T>(width);
    linear_product<T, Products>(layer, n_rows, x, y);
    if (l == s.n_layers - 1) {
      T* out = args.y + ((owner * s.n_rows + first) * s.n_side + side) * s.n_out;
      for (int64_t r = 0; r < n_rows; ++r, out += out_stride) {
        if (layer.relu)
          relu(width, y + r * kTileStride<T>, out);
        else
          std::copy_n(y + r * kTileStride<T>, width, out);
      }
      return;
    }
    T* keep = args.kept ? kept + (net * s.n_rows + first) * stride : nullptr;
    for (int64_t r = 0; r < n_rows; ++r) {
      T* row = y + r * kTileStride<T>;
      if (layer.relu) relu(width, row, row);
      if (!keep) continue;
      std::copy_n(row, width, keep + r * stride);
      std::fill_n(keep + r * stride + width, stride - width, T(0));  // counts for nothing, but is never undefined
    }
    if (keep) kept += n_nets * s.n_rows * stride;
  }
}

template <typename T, typename Products>
void chain_backward(const ChainBackwardArgs<T>& args, int64_t net, int64_t first, int64_t n_rows, T* const* sums) {
  const ChainArgs<T>& s = args.chain;
  const int64_t owner = net / s.n_side, side = net % s.n_side, n_nets = s.n_nets * s.n_side;
  const int64_t tiles = n_rows * kTileStride<T>, in_stride = row_stride<T>(s.n_in), out_stride = s.n_side * s.n_out;
  Workspace& workspace = Workspace::of_this_thread<Workspace::Owner::kCaller>();
  workspace.reserve(sizeof(T) * (2 * tiles + n_rows * in_stride) + 1024);
  T *dy = workspace.take<T>(tiles), *dx = workspace.take<T>(tiles), *x_rows = workspace.take<T>(n_rows * in_stride);
  const T* kept = args.kept;
  const Layer<T>* layers = s.layers + owner * s.n_layers * s.n_side + side;
  for (int64_t l = 0; l < s.n_layers - 1; ++l) kept += n_nets * s.n_rows * row_stride<T>(layers[l * s.n_side].n_out);
  const T* y = args.y + ((owner * s.n_rows + first) * s.n_side + side) * s.n_out;
  int64_t y_stride = out_stride;
  to_tiles(n_rows, s.n_out, args.d_y + ((owner * s.n_rows + first) * s.n_side + side) * s.n_out, out_stride, dy);
  for (int64_t l = s.n_layers - 1; l >= 0; --l, std::swap(dy, dx)) {
    const Layer<T>& layer = layers[l * s.n_side];
    const T* x = x_rows;
    int64_t x_stride = in_stride;
    if (l > 0) {
      x_stride = row_stride<T>(layer.n_in);
      kept -= n_nets * s.n_rows * x_stride;
      x = kept + (net * s.n_rows + first) * x_stride;
    } else if (sums[1]) {
      copy_rows(n_rows, s.n_in, s.x + owner * s.x_net + first * s.x_stride, s.x_stride, x_rows, in_stride);
    }
    linear_product_backward<T, Products>(layer, n_rows, dy, y, y_stride, x, x_stride, l > 0 || args.d_x ? dx : nullptr,
                                         sums[2 * l], sums[2 * l + 1]);
    y = x, y_stride = x_stride;
  }
  if (args.d_x) from_tiles(n_rows, s.n_in, dy, args.d_x + (net * s.n_rows + first) * s.n_in, s.n_in);
}

}  // namespace d2r_fast::D2R_ISA
