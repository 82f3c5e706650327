// The operations of namespace d2r_fast_cpu, on torch's stable ABI: checks, threads and the choice of instruction set.
//
// Outputs are allocated by the caller (d2r_fast/ops/cpp.py), which has checked shapes; what is checked again here is what
// would read or write out of bounds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace d2r_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Isa {
  const char* name;
  const KernelSet* kernels;
};

// Those this processor has, the fastest first.
const std::vector<Isa>& isas() {
  static const std::vector<Isa> found = [] {
    std::vector<Isa> isas;
#if defined(D2R_HAS_avx512)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) isas.push_back({"avx512bf16", &avx512bf16::kernel_set()});
    if (avx512) isas.push_back({"avx512", &avx512::kernel_set()});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isas.push_back({"avx2", &avx2::kernel_set()});
#endif
    isas.push_back({"baseline", &baseline::kernel_set()});
    return isas;
  }();
  return found;
}

std::atomic<const Isa*> g_isa = nullptr;

const Isa& isa() {
  const Isa* chosen = g_isa.load();
  return chosen ? *chosen : isas().front();
}

template <typename T>
const Kernels<T>& kernels(bool bf16) {
  if constexpr (std::is_same_v<T, double>) {
    STD_TORCH_CHECK(!bf16, "precision: bf16 products need float32 tensors, got float64");
    return isa().kernels->float64;
  } else {
    STD_TORCH_CHECK(!bf16 || isa().kernels->bf16, "precision: bf16 products need AVX512-BF16, this processor runs ", isa().name);
    return bf16 ? *isa().kernels->bf16 : isa().kernels->float32;
  }
}

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

void check_numel(const char* name, const Tensor& tensor, int64_t expected) {
  STD_TORCH_CHECK(tensor.numel() == expected, name, ": expected ", expected, " numbers, got ", tensor.numel());
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

void check_sizes(const Sizes& s) {
  STD_TORCH_CHECK(s.n_modules >= 1 && s.n_modules <= kMaxModules, "N: expected 1..", kMaxModules, " modules, got ", s.n_modules);
  STD_TORCH_CHECK(s.width <= kMaxWidth, "D: expected at most ", kMaxWidth, ", got ", s.width);
  STD_TORCH_CHECK(s.n_kept >= 1 && s.n_kept <= s.n_modules, "K: expected 1..N=", s.n_modules, ", got ", s.n_kept);
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <typename T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// Fresh memory of this size comes page by page from the system; asked for in large pages it comes 512 times less often.
void prefer_large_pages(const Tensor& tensor, size_t element) {
#if defined(__linux__)
  constexpr uintptr_t kLargePage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (begin + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t last = (begin + tensor.numel() * element) / kLargePage * kLargePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

Sizes sizes_of(const Tensor& h0, const Tensor& index, bool residual) {
  const Sizes s{h0.size(0), h0.size(1), index.size(2), index.size(3), h0.size(2), residual};
  check_sizes(s);
  return s;
}

template <typename Body>
void with_dtype(const Tensor& tensor, const Body& body) {
  if (tensor.scalar_type() == ScalarType::Double) return body(double{});
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "expected float32 or float64");
  body(float{});
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

void routed_modules(Tensor h0, Tensor weight, Tensor bias, Tensor index, Tensor gate, Tensor active, bool residual, bool bf16,
                    Tensor mixed, Tensor h, Tensor opened) {
  const Sizes s = sizes_of(h0, index, residual);
  const int64_t rows = s.n_nets * s.n_rows, weights = s.n_nets * (s.n_modules - 1) * s.width;
  check_numel("h0", h0, rows * s.width);
  check_numel("weight", weight, weights * s.width);
  check_numel("bias", bias, weights);
  check_numel("index", index, rows * s.n_modules * s.n_kept);
  check_numel("gate", gate, rows * s.n_modules * s.n_kept);
  check_numel("active", active, rows);
  check_numel("mixed", mixed, rows * s.width);
  const bool keep = h.numel() > 0;
  if (keep) {
    check_numel("h", h, rows * s.n_modules * s.width);
    check_numel("opened", opened, rows * s.n_modules * s.width);
  }
  if (rows == 0) return;
  with_dtype(h0, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>(bf16);
    if (keep) prefer_large_pages(h, sizeof(T));
    if (keep) prefer_large_pages(opened, sizeof(bool));
    const auto panels = pack_weights(kernel, const_data<T>(weight), s.n_nets * (s.n_modules - 1), s.width, s.width, false);
    const ForwardArgs<T> args{s,
                              const_data<T>(h0),
                              panels.get(),
                              const_data<T>(bias),
                              const_data<int32_t>(index),
                              const_data<T>(gate),
                              const_data<int32_t>(active),
                              keep ? data<T>(h) : nullptr,
                              keep ? data<bool>(opened) : nullptr,
                              data<T>(mixed)};
    for_each_row_block(s.n_nets, s.n_rows, [&](int64_t net, int64_t first, int64_t n_rows) {
      kernel.forward(args, net, first, n_rows);
    });
  });
}

void routed_modules_backward(Tensor d_mixed, Tensor weight, Tensor index, Tensor gate, Tensor flow, Tensor active, Tensor h,
                             Tensor opened, bool residual, bool bf16, Tensor d_h0, Tensor d_weight, Tensor d_bias, Tensor d_gate) {
  const Sizes s = sizes_of(d_mixed, index, residual);
  const int64_t rows = s.n_nets * s.n_rows, routes = rows * s.n_modules * s.n_kept;
  const int64_t biases = s.n_nets * (s.n_modules - 1) * s.width, weights = biases * s.width;
  check_numel("d_mixed", d_mixed, rows * s.width);
  check_numel("weight", weight, weights);
  check_numel("index", index, routes);
  check_numel("gate", gate, routes);
  check_numel("flow", flow, routes);
  check_numel("active", active, rows);
  check_numel("h", h, rows * s.n_modules * s.width);
  check_numel("opened", opened, rows * s.n_modules * s.width);
  check_numel("d_h0", d_h0, rows * s.width);
  check_numel("d_gate", d_gate, routes);
  const bool to_weight = d_weight.numel() > 0;
  if (to_weight) {
    check_numel("d_weight", d_weight, weights);
    check_numel("d_bias", d_bias, biases);
  }
  with_dtype(d_mixed, [&](auto zero) {
    using T = decltype(zero);
    if (to_weight && rows == 0) {
      std::fill_n(data<T>(d_weight), weights, T(0));
      std::fill_n(data<T>(d_bias), biases, T(0));
    }
    if (rows == 0) return;
    const Kernels<T>& kernel = kernels<T>(bf16);
    const auto panels = pack_weights(kernel, const_data<T>(weight), s.n_nets * (s.n_modules - 1), s.width, s.width, true);
    const BackwardArgs<T> args{s,
                               const_data<T>(d_mixed),
                               panels.get(),
                               const_data<int32_t>(index),
                               const_data<T>(gate),
                               const_data<bool>(flow),
                               const_data<int32_t>(active),
                               const_data<T>(h),
                               const_data<bool>(opened),
                               data<T>(d_h0),
                               data<T>(d_gate)};
    const GradientSums<T> sums{to_weight ? data<T>(d_weight) : nullptr, weights / s.n_nets,
                               to_weight ? data<T>(d_bias) : nullptr, biases / s.n_nets};
    const auto cost = [&](int64_t row) { return std::popcount(static_cast<uint32_t>(args.active[row])); };
    sum_over_rows(s.n_nets, s.n_rows, sums, cost,
                  [&](int64_t net, int64_t first, int64_t n_rows, T* weight_sum, T* bias_sum) {
                    kernel.backward(args, net, first, n_rows, weight_sum, bias_sum);
                  });
  });
}

// x is [E,B,in], or [B,in] for all networks alike.
LinearSizes linear_sizes(const Tensor& x, const Tensor& weight, bool relu) {
  const bool shared = x.dim() == 2;
  const LinearSizes s{weight.size(0), x.size(shared ? 0 : 1), weight.size(2), weight.size(1), relu};
  STD_TORCH_CHECK(s.n_in <= kMaxWidth && s.n_out <= kMaxWidth, "linear: expected widths of at most ", kMaxWidth, ", got ",
                  s.n_in, " and ", s.n_out);
  check_numel("x", x, (shared ? 1 : s.n_nets) * s.n_rows * s.n_in);
  check_numel("weight", weight, s.n_nets * s.n_out * s.n_in);
  return s;
}

void linear(Tensor x, Tensor weight, Tensor bias, bool relu, bool bf16, Tensor y) {
  const LinearSizes s = linear_sizes(x, weight, relu);
  check_numel("bias", bias, s.n_nets * s.n_out);
  check_numel("y", y, s.n_nets * s.n_rows * s.n_out);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>(bf16);
    const auto panels = pack_weights(kernel, const_data<T>(weight), s.n_nets, s.n_out, s.n_in, false);
    const LinearArgs<T> args{s, const_data<T>(x), x.dim() == 2 ? 0 : s.n_rows * s.n_in, panels.get(), const_data<T>(bias),
                             data<T>(y)};
    for_each_row_block(s.n_nets, s.n_rows, [&](int64_t net, int64_t first, int64_t n_rows) {
      kernel.linear_forward(args, net, first, n_rows);
    });
  });
}

void linear_backward(Tensor d_y, Tensor x, Tensor weight, Tensor y, bool relu, bool bf16, Tensor d_x, Tensor d_weight,
                     Tensor d_bias) {
  const LinearSizes s = linear_sizes(x, weight, relu);
  const bool to_x = d_x.numel() > 0, to_weight = d_weight.numel() > 0;
  check_numel("d_y", d_y, s.n_nets * s.n_rows * s.n_out);
  if (relu) check_numel("y", y, s.n_nets * s.n_rows * s.n_out);
  if (to_x) check_numel("d_x", d_x, s.n_nets * s.n_rows * s.n_in);
  if (to_weight) check_numel("d_weight", d_weight, s.n_nets * s.n_out * s.n_in);
  if (to_weight) check_numel("d_bias", d_bias, s.n_nets * s.n_out);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>(bf16);
    std::unique_ptr<std::byte[]> panels;
    if (to_x) panels = pack_weights(kernel, const_data<T>(weight), s.n_nets, s.n_out, s.n_in, true);
    const LinearBackwardArgs<T> args{s,
                                     const_data<T>(d_y),
                                     const_data<T>(x),
                                     x.dim() == 2 ? 0 : s.n_rows * s.n_in,
                                     relu ? const_data<T>(y) : nullptr,
                                     panels.get(),
                                     to_x ? data<T>(d_x) : nullptr};
    const GradientSums<T> sums{to_weight ? data<T>(d_weight) : nullptr, s.n_out * s.n_in,
                               to_weight ? data<T>(d_bias) : nullptr, s.n_out};
    if (to_weight && s.n_rows == 0) {
      std::fill_n(sums.weight, s.n_nets * sums.net_weights, T(0));
      std::fill_n(sums.bias, s.n_nets * sums.net_biases, T(0));
      return;
    }
    sum_over_rows(s.n_nets, s.n_rows, sums, [](int64_t) { return 1; },
                  [&](int64_t net, int64_t first, int64_t n_rows, T* weight_sum, T* bias_sum) {
                    kernel.linear_backward(args, net, first, n_rows, weight_sum, bias_sum);
                  });
  });
}

Sizes route_sizes(const Tensor& index) {
  const Sizes s{index.size(0), index.size(1), index.size(2), index.size(3), 0, false};
  check_sizes(s);
  return s;
}

// Rows that a thread should get at least; a row of 16 modules takes about half a microsecond.
constexpr int64_t kRouteGrain = 64;

void select_routes(Tensor logits, Tensor temperature, Tensor noise, Tensor given, bool resrouting, Tensor index, Tensor gate,
                   Tensor flow, Tensor active) {
  const Sizes s = route_sizes(index);
  const int64_t rows = s.n_nets * s.n_rows, n_logits = s.n_modules * (s.n_modules + 1) / 2, routes = index.numel();
  check_numel("logits", logits, rows * n_logits);
  check_numel("index", index, routes);
  check_numel("gate", gate, routes);
  check_numel("flow", flow, routes);
  check_numel("active", active, rows);
  const bool sampled = noise.numel() > 0, is_given = given.numel() > 0;
  if (sampled) check_numel("noise", noise, rows * n_logits);
  if (sampled) check_numel("temperature", temperature, s.n_rows);
  if (is_given) check_numel("given", given, routes);
  with_dtype(logits, [&](auto zero) {
    using T = decltype(zero);
    const RouteArgs<T> args{s,
                            const_data<T>(logits),
                            sampled ? const_data<T>(temperature) : nullptr,
                            sampled ? const_data<T>(noise) : nullptr,
                            is_given ? const_data<int32_t>(given) : nullptr,
                            resrouting,
                            data<int32_t>(index),
                            data<T>(gate),
                            data<bool>(flow),
                            data<int32_t>(active)};
    const Kernels<T>& kernel = kernels<T>(false);
    torch::stable::parallel_for(0, rows, kRouteGrain,
                                [&](int64_t begin, int64_t end) { kernel.select_routes(args, begin, end - begin); });
  });
}

void select_routes_backward(Tensor d_gate, Tensor index, Tensor gate, Tensor d_logits) {
  const Sizes s = route_sizes(index);
  const int64_t rows = s.n_nets * s.n_rows;
  check_numel("d_gate", d_gate, index.numel());
  check_numel("index", index, index.numel());
  check_numel("gate", gate, index.numel());
  check_numel("d_logits", d_logits, rows * (s.n_modules * (s.n_modules + 1) / 2));
  with_dtype(d_gate, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>(false);
    torch::stable::parallel_for(0, rows, kRouteGrain, [&](int64_t begin, int64_t end) {
      kernel.select_routes_backward(s, const_data<T>(d_gate), const_data<int32_t>(index), const_data<T>(gate),
                                    data<T>(d_logits), begin, end - begin);
    });
  });
}

STABLE_TORCH_LIBRARY(d2r_fast_cpu, m) {
  m.def("routed_modules(Tensor h0, Tensor weight, Tensor bias, Tensor index, Tensor gate, Tensor active, bool residual, "
        "bool bf16, Tensor(a!) mixed, Tensor(b!) h, Tensor(c!) opened) -> ()");
  m.def("routed_modules_backward(Tensor d_mixed, Tensor weight, Tensor index, Tensor gate, Tensor flow, Tensor active, "
        "Tensor h, Tensor opened, bool residual, bool bf16, Tensor(a!) d_h0, Tensor(b!) d_weight, Tensor(c!) d_bias, "
        "Tensor(d!) d_gate) -> ()");
  m.def("linear(Tensor x, Tensor weight, Tensor bias, bool relu, bool bf16, Tensor(a!) y) -> ()");
  m.def("linear_backward(Tensor d_y, Tensor x, Tensor weight, Tensor y, bool relu, bool bf16, Tensor(a!) d_x, "
        "Tensor(b!) d_weight, Tensor(c!) d_bias) -> ()");
  m.def("select_routes(Tensor logits, Tensor temperature, Tensor noise, Tensor given, bool resrouting, Tensor(a!) index, "
        "Tensor(b!) gate, Tensor(c!) flow, Tensor(d!) active) -> ()");
  m.def("select_routes_backward(Tensor d_gate, Tensor index, Tensor gate, Tensor(a!) d_logits) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(d2r_fast_cpu, CPU, m) {
  m.impl("routed_modules", TORCH_BOX(&routed_modules));
  m.impl("routed_modules_backward", TORCH_BOX(&routed_modules_backward));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
  m.impl("select_routes", TORCH_BOX(&select_routes));
  m.impl("select_routes_backward", TORCH_BOX(&select_routes_backward));
}

}  // namespace
}  // namespace d2r_fast

// For Python, through ctypes: number `at` of the instruction sets that this processor has, the fastest first; or null.
extern "C" __attribute__((visibility("default"))) const char* d2r_fast_isa(int at) {
  const auto& isas = d2r_fast::isas();
  return at >= 0 && at < static_cast<int>(isas.size()) ? isas[at].name : nullptr;
}

// Use number `at` from now on; 0, the fastest, is the default. Returns 0, or -1 if there is no such number.
extern "C" __attribute__((visibility("default"))) int d2r_fast_use_isa(int at) {
  const auto& isas = d2r_fast::isas();
  if (at < 0 || at >= static_cast<int>(isas.size())) return -1;
  d2r_fast::g_isa = &isas[at];
  return 0;
}
