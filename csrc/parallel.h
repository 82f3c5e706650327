// Blocks of rows over torch's threads, and sums over rows whose order does not depend on who was faster.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "kernels.h"

namespace d2r_fast {

// Threads take blocks as they come free: rows differ in how much they need.
template <typename Body>
void for_each_block(int64_t n_blocks, const Body& body) {
  std::atomic<int64_t> next = 0;
  const int64_t n_threads = std::min<int64_t>(torch::stable::get_num_threads(), n_blocks);
  torch::stable::parallel_for(0, n_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t block = next++; block < n_blocks; block = next++) body(block);
  });
}

// All weights of a layer or of all modules, [n_weights, n_out, n_in], packed one after another.
template <typename T>
std::unique_ptr<std::byte[]> pack_weights(const Kernels<T>& kernel, const T* weight, int64_t n_weights, int64_t n_out,
                                          int64_t n_in, bool backward) {
  const size_t bytes = backward ? kernel.packed_bytes(n_out, n_in) : kernel.packed_bytes(n_in, n_out);
  auto panels = std::make_unique_for_overwrite<std::byte[]>(n_weights * bytes);
  for_each_block(n_weights, [&](int64_t i) {
    kernel.pack_weight(weight + i * n_out * n_in, n_out, n_in, backward, panels.get() + i * bytes);
  });
  return panels;
}

// Calls body(net, first, n_rows) for blocks of rows of every network.
template <typename Body>
void for_each_row_block(int64_t n_nets, int64_t n_rows, const Body& body) {
  const int64_t per_net = (n_rows + kBlockRows - 1) / kBlockRows;
  for_each_block(n_nets * per_net, [&](int64_t block) {
    const int64_t first = block % per_net * kBlockRows;
    body(block / per_net, first, std::min(kBlockRows, n_rows - first));
  });
}

// Rows of one network that one thread owns in backward, and where their share of the weights' gradient goes.
struct Segment {
  int64_t net, first, n_rows, thread;
  int64_t part;  // 0: the gradient itself, which this segment starts; else partial sum number part - 1
};

// Splits all rows among the threads, in order, so that each has the same cost. The split depends on nothing but the costs
// and the number of threads, and so do the sums.
template <typename Cost>
std::vector<Segment> split_rows(int64_t n_nets, int64_t n_rows, int64_t n_threads, const Cost& cost) {
  int64_t total = 0, done = 0, parts = 0;
  for (int64_t row = 0; row < n_nets * n_rows; ++row) total += cost(row);
  std::vector<Segment> segments;
  for (int64_t net = 0; net < n_nets; ++net)
    for (int64_t row = 0; row < n_rows; ++row) {
      const int64_t thread = std::min(n_threads - 1, done * n_threads / std::max<int64_t>(total, 1));
      done += cost(net * n_rows + row);
      if (row > 0 && segments.back().thread == thread)
        ++segments.back().n_rows;
      else
        segments.push_back({net, row, 1, thread, row == 0 ? 0 : ++parts});
    }
  return segments;
}

// Where the gradients of weights and biases are summed; weight null: not wanted.
template <typename T>
struct GradientSums {
  T* weight;
  int64_t net_weights;  // a network's
  T* bias;
  int64_t net_biases;
};

// Calls body(net, first, n_rows, weight_sum, bias_sum) for blocks of rows; a thread's blocks add to sums of its own, which
// are then added up in a fixed order.
template <typename T, typename Cost, typename Body>
void sum_over_rows(int64_t n_nets, int64_t n_rows, const GradientSums<T>& sums, const Cost& cost, const Body& body) {
  // A thread with fewer rows than a block would spend its time on its own copy of the sums.
  const int64_t n_threads =
      std::min<int64_t>(torch::stable::get_num_threads(), std::max<int64_t>(1, n_nets * n_rows / kBlockRows));
  const std::vector<Segment> segments = split_rows(n_nets, n_rows, n_threads, cost);
  const int64_t part = sums.net_weights + sums.net_biases, n_parts = static_cast<int64_t>(segments.size()) - n_nets;
  auto partial = std::make_unique_for_overwrite<T[]>(sums.weight ? n_parts * part : 0);
  torch::stable::parallel_for(0, n_threads, 1, [&](int64_t begin, int64_t end) {
    for (const Segment& segment : segments) {
      if (segment.thread < begin || segment.thread >= end) continue;
      T *weight_sum = nullptr, *bias_sum = nullptr;
      if (sums.weight) {
        T* of_part = partial.get() + (segment.part - 1) * part;
        weight_sum = segment.part ? of_part : sums.weight + segment.net * sums.net_weights;
        bias_sum = segment.part ? of_part + sums.net_weights : sums.bias + segment.net * sums.net_biases;
        std::fill_n(weight_sum, sums.net_weights, T(0));
        std::fill_n(bias_sum, sums.net_biases, T(0));
      }
      for (int64_t row = 0; row < segment.n_rows; row += kBlockRows)
        body(segment.net, segment.first + row, std::min(kBlockRows, segment.n_rows - row), weight_sum, bias_sum);
    }
  });
  if (!sums.weight || n_parts == 0) return;
  torch::stable::parallel_for(0, part, 1 << 14, [&](int64_t begin, int64_t end) {
    for (const Segment& segment : segments) {
      if (segment.part == 0) continue;
      const T* from = partial.get() + (segment.part - 1) * part;
      T* weight_sum = sums.weight + segment.net * sums.net_weights;
      T* bias_sum = sums.bias + segment.net * sums.net_biases - sums.net_weights;
      for (int64_t j = begin; j < std::min(end, sums.net_weights); ++j) weight_sum[j] += from[j];
      for (int64_t j = std::max(begin, sums.net_weights); j < end; ++j) bias_sum[j] += from[j];
    }
  });
}

}  // namespace d2r_fast
