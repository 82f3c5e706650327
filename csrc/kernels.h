// What library.cpp asks of the CPU kernels. Letters as everywhere: E networks, B rows, N modules, K kept sources, D width.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>

namespace d2r_fast {

struct Sizes {
  int64_t n_nets;     // E
  int64_t n_rows;     // B
  int64_t n_modules;  // N
  int64_t n_kept;     // K
  int64_t width;      // D
  bool residual;
};

// How many of the N modules a row needs, and so how many lines of D numbers its outputs take.
inline int64_t count_lines(int32_t active, int64_t n_modules) {
  return std::popcount(static_cast<uint32_t>(active) << (32 - n_modules));
}

// Modules 1..N-1 of every row that needs them. Route i is slot i-1 of index and gate; it has min(K, i) used slots.
template <typename T>
struct ForwardArgs {
  Sizes size;
  const T* h0;             // [E,B,D]
  const std::byte* panels; // [E,N-1] packed weights, from pack_weights
  const T* bias;           // [E,N-1,D]
  const int32_t* index;    // [E,B,N,K]
  const T* gate;           // [E,B,N,K]
  const int32_t* active;   // [E,B] bit j: module j is needed
  const int64_t* begin;    // [E,B] the line at which a row's begin in h and opened; rows must not overlap. Null with h
  T* h;                    // lines of D numbers: the outputs of a row's active modules, one after another; or null
  bool* opened;            // in the same places, z_i > 0; null with h
  T* mixed;                // [E,B,D]
};

template <typename T>
struct BackwardArgs {
  Sizes size;
  const T* d_mixed;        // [E,B,D]
  const std::byte* panels; // packed for backward
  const int32_t* index;
  const T* gate;
  const bool* flow;        // [E,B,N,K]
  const int32_t* active;
  const int64_t* begin;    // as in ForwardArgs
  const T* h;
  const bool* opened;
  T* d_h0;                 // [E,B,D]
  T* d_gate;               // [E,B,N,K]
};

template <typename T>
struct RouteArgs {
  Sizes size;               // width and residual unused
  const T* logits;          // [E,B,R]
  const T* temperature;     // [B], null: greedy
  const T* noise;           // [E,B,R], null with temperature
  const int32_t* given;     // [E,B,N,K] or null
  bool resrouting;
  int32_t* index;           // [E,B,N,K]
  T* gate;
  bool* flow;
  int32_t* active;          // [E,B]
};

struct LinearSizes {
  int64_t n_nets;  // E
  int64_t n_rows;  // B
  int64_t n_in, n_out;
  bool relu;
};

template <typename T>
struct LinearArgs {
  LinearSizes size;
  const T* x;               // [E,B,in], networks x_net apart: 0 where all read the same rows
  int64_t x_net;
  const std::byte* panels;  // [E] packed weights
  const T* bias;            // [E,out]
  T* y;                     // [E,B,out]
};

template <typename T>
struct LinearBackwardArgs {
  LinearSizes size;
  const T* d_y;             // [E,B,out]
  const T* x;
  int64_t x_net;
  const T* y;               // forward's output; read with ReLU only
  const std::byte* panels;  // packed for backward; null with d_x
  T* d_x;                   // [E,B,in] or null: not wanted
};

template <typename T>
struct Kernels {
  // A weight [n_out, n_in] takes packed_bytes(n_in, n_out) for the forward product x W^T, (n_out, n_in) for dz W.
  size_t (*packed_bytes)(int64_t depth, int64_t columns);
  void (*pack_weight)(const T* weight, int64_t n_out, int64_t n_in, bool backward, std::byte* panels);
  // Rows first..first+n_rows of one network.
  void (*forward)(const ForwardArgs<T>& args, int64_t net, int64_t first, int64_t n_rows);
  // The same; adds to d_weight [N-1,D,D] and d_bias [N-1,D], which are one caller's own; null: not wanted.
  void (*backward)(const BackwardArgs<T>& args, int64_t net, int64_t first, int64_t n_rows, T* d_weight, T* d_bias);
  void (*linear_forward)(const LinearArgs<T>& args, int64_t net, int64_t first, int64_t n_rows);
  void (*linear_backward)(const LinearBackwardArgs<T>& args, int64_t net, int64_t first, int64_t n_rows, T* d_weight,
                          T* d_bias);
  // Rows first..first+n_rows of the E*B rows.
  void (*select_routes)(const RouteArgs<T>& args, int64_t first, int64_t n_rows);
  void (*select_routes_backward)(const Sizes& size, const T* d_gate, const int32_t* index, const T* gate, T* d_logits,
                                 int64_t first, int64_t n_rows);
};

struct KernelSet {
  Kernels<float> float32;
  Kernels<double> float64;
  const Kernels<float>* bf16;  // products of bf16 operands, accumulated in float32; null where the processor has none
};

// Rows that one call of forward or backward should get: what backward computes of them stays in a second-level cache of
// 512 KB, where blocks of 48 and of 128 rows took 2% to 12% longer.
constexpr int64_t kBlockRows = 64;
constexpr int64_t kMaxWidth = 1024;
constexpr int64_t kMaxModules = 32;

namespace baseline { const KernelSet& kernel_set(); }
namespace avx2 { const KernelSet& kernel_set(); }
namespace avx512 { const KernelSet& kernel_set(); }
namespace avx512bf16 { const KernelSet& kernel_set(); }

}  // namespace d2r_fast
