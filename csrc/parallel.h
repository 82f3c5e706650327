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

// The weights [n_weights, n_out, n_in] of networks, of which each thread packs the one that it comes to in memory of its own:
// multiplied out of its cache, not written to memory with all the others and read back. For threads that take the rows of a
// network one after another.
template <typename T>
class WeightInTurn {
 public:
  WeightInTurn(const Kernels<T>& kernel, const T* weight, int64_t n_out, int64_t n_in, bool backward)
      : kernel_(kernel), weight_(weight), n_out_(n_out), n_in_(n_in), backward_(backward), id_(++made()) {}

  const std::byte* of(int64_t net) const {
    struct Packed {
      int64_t id = 0, net = 0;
      std::vector<std::byte> panels;
    };
    thread_local Packed own;
    if (own.id != id_ || own.net != net) {
      own.panels.resize(backward_ ? kernel_.packed_bytes(n_out_, n_in_) : kernel_.packed_bytes(n_in_, n_out_));
      kernel_.pack_weight(weight_ + net * n_out_ * n_in_, n_out_, n_in_, backward_, own.panels.data());
      own.id = id_, own.net = net;
    }
    return own.panels.data();
  }

 private:
  static std::atomic<int64_t>& made() {
    static std::atomic<int64_t> count = 0;
    return count;
  }
  const Kernels<T>& kernel_;
  const T* weight_;
  int64_t n_out_, n_in_;
  bool backward_;
  int64_t id_;  // no other has had it: memory is used again
};

// Calls body(first, n_rows) for the fewest blocks that split `n_rows` evenly: one short block at the end would leave the
// other threads waiting for whoever got a long one.
template <typename Body>
void for_each_even_block(int64_t n_rows, int64_t n_blocks, const Body& body) {
  for (int64_t block = 0; block < n_blocks; ++block) {
    const int64_t first = block * n_rows / n_blocks;
    body(first, (block + 1) * n_rows / n_blocks - first);
  }
}

inline int64_t blocks_of(int64_t n_rows) { return (n_rows + kBlockRows - 1) / kBlockRows; }

// Calls body(net, first, n_rows) for blocks of rows of every network, none of which reaches over row `boundary`.
template <typename Body>
void for_each_row_block(int64_t n_nets, int64_t n_rows, int64_t boundary, const Body& body) {
  if (n_nets == 0) return;
  // As many blocks for each thread, unless there are so many that the last ones hardly matter.
  const int64_t n_threads = torch::stable::get_num_threads(), rows[] = {boundary, n_rows - boundary};
  int64_t blocks[] = {blocks_of(rows[0]), blocks_of(rows[1])};
  if (n_nets * (blocks[0] + blocks[1]) < 8 * n_threads)
    while (n_nets * (blocks[0] + blocks[1]) % n_threads) {
      const bool second = rows[0] == 0 || rows[0] * blocks[1] < rows[1] * blocks[0];  // has the larger blocks
      if (blocks[second] >= rows[second]) break;
      ++blocks[second];
    }
  const int64_t per_net = blocks[0] + blocks[1];
  for_each_block(n_nets * per_net, [&](int64_t block) {
    const int64_t at = block % per_net, part = at >= blocks[0], begin = part ? boundary : 0;
    const int64_t i = at - (part ? blocks[0] : 0), first = i * rows[part] / blocks[part];
    body(block / per_net, begin + first, (i + 1) * rows[part] / blocks[part] - first);
  });
}
template <typename Body>
void for_each_row_block(int64_t n_nets, int64_t n_rows, const Body& body) {
  for_each_row_block(n_nets, n_rows, n_rows, body);
}

// Rows of one network that one thread owns in backward, and where their share of the weights' gradient goes.
struct Segment {
  int64_t net, first, n_rows, thread;
  int64_t part;  // 0: the gradient itself, which this segment starts; else partial sum number part - 1; -1: no sums
};

// Splits all rows among the threads, in order, so that each has the same cost. The split depends on nothing but the costs
// and the number of threads, and so do the sums, which are over the first `n_summed` rows of each network; no segment
// reaches over that row.
template <typename Cost>
std::vector<Segment> split_rows(int64_t n_nets, int64_t n_rows, int64_t n_summed, int64_t n_threads, const Cost& cost) {
  int64_t total = 0, done = 0, parts = 0;
  for (int64_t net = 0; net < n_nets; ++net)
    for (int64_t row = 0; row < n_rows; ++row) total += cost(net, row);
  std::vector<Segment> segments;
  for (int64_t net = 0; net < n_nets; ++net)
    for (int64_t row = 0; row < n_rows; ++row) {
      const int64_t thread = std::min(n_threads - 1, done * n_threads / std::max<int64_t>(total, 1));
      done += cost(net, row);
      if (row > 0 && row != n_summed && segments.back().thread == thread)
        ++segments.back().n_rows;
      else
        segments.push_back({net, row, 1, thread, row >= n_summed ? -1 : row == 0 ? 0 : ++parts});
    }
  return segments;
}

// A parameter's gradient [E, per_net], a sum over rows; null: not wanted.
template <typename T>
struct Gradient {
  T* sum;
  int64_t per_net;
};

// Calls body(net, first, n_rows, sums) for blocks of rows; sums[i] is where the block adds to gradient i of its network, or
// null. A thread's blocks add to sums of its own, which are then added up in a fixed order. Sums are over the first n_summed
// rows of each network; cost(net, row) is a row's.
template <typename T, typename Cost, typename Body>
void sum_over_rows(int64_t n_nets, int64_t n_rows, int64_t n_summed, const std::vector<Gradient<T>>& gradients,
                   const Cost& cost, const Body& body) {
  int64_t part = 0;  // numbers in one network's sums
  for (const Gradient<T>& gradient : gradients) part += gradient.sum ? gradient.per_net : 0;
  if (std::min(n_rows, n_summed) == 0)
    for (const Gradient<T>& gradient : gradients)
      if (gradient.sum) std::fill_n(gradient.sum, n_nets * gradient.per_net, T(0));
  // A thread with fewer rows than a block would spend its time on its own copy of the sums.
  const int64_t n_threads =
      std::min<int64_t>(torch::stable::get_num_threads(), std::max<int64_t>(1, n_nets * n_rows / kBlockRows));
  const std::vector<Segment> segments = split_rows(n_nets, n_rows, n_summed, n_threads, cost);
  int64_t n_parts = 0;
  for (const Segment& segment : segments) n_parts = part ? std::max(n_parts, segment.part) : 0;
  auto partial = std::make_unique_for_overwrite<T[]>(n_parts * part);
  torch::stable::parallel_for(0, n_threads, 1, [&](int64_t begin, int64_t end) {
    std::vector<T*> sums(gradients.size());
    for (const Segment& segment : segments) {
      if (segment.thread < begin || segment.thread >= end) continue;
      T* own = partial.get() + (segment.part - 1) * part;
      for (size_t i = 0; i < gradients.size(); ++i) {
        const auto [sum, per_net] = gradients[i];
        sums[i] = segment.part < 0 ? nullptr : !sum || segment.part == 0 ? sum : own;
        if (!sums[i]) continue;
        if (segment.part == 0)
          sums[i] += segment.net * per_net;
        else
          own += per_net;
        std::fill_n(sums[i], per_net, T(0));
      }
      for_each_even_block(segment.n_rows, blocks_of(segment.n_rows), [&](int64_t first, int64_t in_block) {
        body(segment.net, segment.first + first, in_block, sums.data());
      });
    }
  });
  torch::stable::parallel_for(0, n_parts ? part : 0, 1 << 14, [&](int64_t begin, int64_t end) {
    for (const Segment& segment : segments) {
      if (segment.part <= 0) continue;
      const T* own = partial.get() + (segment.part - 1) * part;
      int64_t at = 0;  // where gradient i begins in a part
      for (const auto& [sum, per_net] : gradients) {
        if (!sum) continue;
        T* to = sum + segment.net * per_net - at;
        for (int64_t j = std::max(begin, at); j < std::min(end, at + per_net); ++j) to[j] += own[j];
        at += per_net;
      }
    }
  });
}

}  // namespace d2r_fast
