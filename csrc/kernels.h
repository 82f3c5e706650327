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

struct RouteSizes {
  int64_t n_modules;  // N
  int64_t n_kept;     // K
};

// Rows of one network, one after another.
template <typename T>
struct RouteArgs {
  RouteSizes size;
  const T* logits;          // [n,R]
  const T* temperature;     // [n], null: greedy
  const T* noise;           // [n,R], null with temperature
  bool given;               // index holds the routes, legal ones (route_checks.h)
  bool resrouting;
  int32_t* index;           // [n,N,K]
  T* gate;
  bool* flow;
  int32_t* active;          // [n]
};

// One linear layer of one network, y = x W^T + b.
template <typename T>
struct Layer {
  int64_t n_in, n_out;
  bool relu;                // y = max(0, x W^T + b)
  const std::byte* panels;  // the packed weight, for the direction that the layer is used in
  const T* bias;            // [out]; forward only
};

// A network's layers in the order of its parameters (d2r_fast/ops/routed_network.py); the routing network's come last. Task
// and modules are no plain layers: their entries among the layers stay empty.
enum NetworkLayer : int64_t { kBase0, kBase1, kTask, kModule0, kModules, kHead, kRoute };

// What a forward and a backward pass of whole networks both read.
template <typename T>
struct NetworkArgs {
  int64_t n_tasks, n_layers;
  const Layer<T>* layers;  // [E][n_layers]
  const T* task_rows;      // [E,T+1,H] what scales the base's output, by task; the last row for any other number
  const T* x;              // [B,in], rows x_stride numbers apart
  int64_t x_stride;
  const int64_t* task;     // [B]
};

template <typename T>
struct NetworkForwardArgs {
  NetworkArgs<T> network;
  RouteArgs<T> routes;     // of row 0 of network 0; logits unused
  ForwardArgs<T> modules;  // h0 and mixed unused
  T* activations;          // what backward needs of the layers: see network_cpu.h; null with modules.h: no backward follows
  T* out;                  // [E,B,out]
  int64_t n_chosen;        // rows of noise; the first of each network. Rows after them, and after those given, are greedy
  int64_t n_back;          // the first rows of each network, of which is kept what backward needs. No block reaches over either
};

template <typename T>
struct NetworkBackwardArgs {
  NetworkArgs<T> network;
  BackwardArgs<T> modules;  // d_mixed is scratch, too
  const T* activations;
  const T* d_out;           // [E,n_back,out], of the first rows of each network
  const T* to_gate;         // [E,B,N,K] gradient that reaches the gates from outside, or null
  T* d_mixed;               // [E,B,D] scratch
  T* d_x;                   // [E,n_back-first_to_x,in], or null: not wanted
  int64_t n_back, first_to_x;  // no block reaches over row first_to_x
};

// N chains of linear layers side by side in each network, which read the same rows.
template <typename T>
struct ChainArgs {
  int64_t n_nets, n_layers, n_side, n_rows, n_in, n_out;  // E, L, N, B; n_in of the first layer, n_out of the last
  const Layer<T>* layers;                                 // [E,L,N]
  const T* x;                                             // [E,B,n_in], rows x_stride numbers apart, networks x_net
  int64_t x_net, x_stride;
};

template <typename T>
struct ChainForwardArgs {
  ChainArgs<T> chain;
  T* kept;  // what each layer but the last gives, [E N,B,row_stride] each, one after another; or null: no backward follows
  T* y;     // [E,B,N,n_out]
};

template <typename T>
struct ChainBackwardArgs {
  ChainArgs<T> chain;
  const T *kept, *y, *d_y;
  T* d_x;  // [E,N,B,n_in], or null: not wanted
};

// y = sum_k w_k v_k over N vectors a row; or, orthogonal, of what Gram-Schmidt makes of them:
// b_k = r_k / (|r_k| + norm_epsilon), r_k = v_k - sum_{j<k} <v_k, b_j> b_j.
template <typename T>
struct ExpertSumArgs {
  int64_t n_experts, width;  // N, D
  const T *v, *weight;       // [n,N,D] and [n,N]
  bool orthogonal;
  T norm_epsilon;
};

// L levels of N modules side by side: a module of the first reads u, one of a later level the ReLU of a mix of the level
// before it, and the output is the ReLU of a mix of the last. Mix l = 1..L of target j starts at ((l - 1) N + j) N of a
// row's G = (L - 1) N^2 + N gates.
template <typename T>
struct LevelsArgs {
  int64_t n_levels, n_modules, n_rows, n_in, width;  // L, N, B, H, D
  const Layer<T>* layers;                            // [E,L,N]
  const T* u;                                        // [E,B,H]
  const T* gate;                                     // [E,B,G]
};

template <typename T>
struct LevelsForwardArgs {
  LevelsArgs<T> levels;
  T* m;  // [E,B,L,N,D] the modules' outputs, or null: no backward follows
  T* y;  // [E,B,D]
};

template <typename T>
struct LevelsBackwardArgs {
  LevelsArgs<T> levels;
  const T *m, *y, *d_y;
  T* d_u;     // [E,B,H]
  T* d_gate;  // [E,B,G]
};

// The gates of these mixes, a softmax over N sources each, from c: logits of mix 1 from ReLU(c), those of a later mix from
// ReLU(s c), where s is a layer over the gates of all mixes before it.
template <typename T>
struct GatesArgs {
  int64_t n_levels, n_modules, n_rows, n_in;  // n_in: C
  const Layer<T>* layers;                     // [E,2 L - 1] logits of mix 1, then s and logits of each mix after it
  const T* c;                                 // [E,B,C]
};

template <typename T>
struct GatesForwardArgs {
  GatesArgs<T> gates;
  T* scale;  // [E,B,L-1,C] s of each mix, or null: no backward follows
  T* p;      // [E,B,G]
};

template <typename T>
struct GatesBackwardArgs {
  GatesArgs<T> gates;
  const T *scale, *p, *d_p;
  T* d_c;  // [E,B,C]
};

// A run of one network's parameters with all that a step of Adam changes.
template <typename T>
struct AdamPiece {
  T* values;
  const T* gradient;
  T *first, *second;  // moments
  T* targets;         // what follows the values slowly, or null
  int64_t n;
};

template <typename T>
struct AdamConstants {
  T beta1, beta2, eps;
  T second_scale;  // 1 / sqrt(1 - beta2^step)
  T target_rate;
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
  // A block of rows: x [n,in], whose rows lie x_stride numbers apart, y [n,out].
  void (*linear_forward)(const Layer<T>& layer, int64_t n_rows, const T* x, int64_t x_stride, T* y);
  // The same; adds to d_weight [out,in] and d_bias [out]. y is read with ReLU only. d_x, or d_bias with d_weight, may be
  // null: not wanted. (An empty d_weight is null, too.)
  void (*linear_backward)(const Layer<T>& layer, int64_t n_rows, const T* d_y, const T* x, int64_t x_stride, const T* y,
                          T* d_x, T* d_weight, T* d_bias);
  // The first n_rows rows of what args point at.
  void (*select_routes)(const RouteArgs<T>& args, int64_t n_rows);
  // d_logits [n,R] from d_gate, index and gate [n,N,K].
  void (*select_routes_backward)(const RouteSizes& size, const T* d_gate, const int32_t* index, const T* gate, T* d_logits,
                                 int64_t n_rows);
  // Rows first..first+n_rows of one network through all of its layers.
  void (*network_forward)(const NetworkForwardArgs<T>& args, int64_t net, int64_t first, int64_t n_rows);
  // The same; adds to sums[2 l] the gradient of layer l's weight, to sums[2 l + 1] its bias's; all null: not wanted.
  void (*network_backward)(const NetworkBackwardArgs<T>& args, int64_t net, int64_t first, int64_t n_rows, T* const* sums);
  // Rows first..first+n_rows of chain `net` of all E N. backward adds to sums[2 l] the gradient of the weight of its layer l,
  // to sums[2 l + 1] its bias's; all null: not wanted.
  void (*chain_forward)(const ChainForwardArgs<T>& args, int64_t net, int64_t first, int64_t n_rows);
  void (*chain_backward)(const ChainBackwardArgs<T>& args, int64_t net, int64_t first, int64_t n_rows, T* const* sums);
  // The first n_rows rows of what args point at: y [n,D]; from d_y, d_v [n,N,D] and d_weight [n,N].
  void (*expert_sum)(const ExpertSumArgs<T>& args, int64_t n_rows, T* y);
  void (*expert_sum_backward)(const ExpertSumArgs<T>& args, int64_t n_rows, const T* d_y, T* d_v, T* d_weight);
  // Rows first..first+n_rows of one network through levels of modules. backward adds to sums[2 l] the gradient of level l's
  // weights, to sums[2 l + 1] its biases'; all null: not wanted. The same for the layers of the gates.
  void (*levels_forward)(const LevelsForwardArgs<T>& args, int64_t net, int64_t first, int64_t n_rows);
  void (*levels_backward)(const LevelsBackwardArgs<T>& args, int64_t net, int64_t first, int64_t n_rows, T* const* sums);
  void (*gates_forward)(const GatesForwardArgs<T>& args, int64_t net, int64_t first, int64_t n_rows);
  void (*gates_backward)(const GatesBackwardArgs<T>& args, int64_t net, int64_t first, int64_t n_rows, T* const* sums);
  // -log(-log u) of n uniform numbers, in place.
  void (*gumbel)(T* uniform, int64_t n);
  double (*squared_norm)(const T* x, int64_t n);
  // One step along `scale` times the gradient; step_size is the learning rate over 1 - beta1^step.
  void (*adam)(const AdamPiece<T>& piece, const AdamConstants<T>& constants, T scale, T step_size);
};

struct KernelSet {
  Kernels<float> float32;
  Kernels<double> float64;
  Kernels<float> bf16;  // products of operands rounded to bf16, summed in float32
};

// Rows that one call of forward or backward should get: what backward computes of them stays in a second-level cache of
// 512 KB, where blocks of 48 and of 128 rows took 2% to 12% longer.
constexpr int64_t kBlockRows = 64;
constexpr int64_t kMaxWidth = 1024;

// Distance between rows that a product reads side by side: whole panels on every instruction set, and an odd number of
// cache lines, since rows a power of two apart would share a few sets of the first-level cache.
template <typename T>
constexpr int64_t row_stride(int64_t width) {
  const int64_t bytes = width * static_cast<int64_t>(sizeof(T));
  return ((bytes + 127) / 128 * 128 + 64) / static_cast<int64_t>(sizeof(T));
}
constexpr int64_t kMaxModules = 32;

namespace baseline { const KernelSet& kernel_set(); }
namespace avx2 { const KernelSet& kernel_set(); }
namespace avx512 { const KernelSet& kernel_set(); }
namespace avx512bf16 { const KernelSet& kernel_set(); }

}  // namespace d2r_fast
