// Small matrix products out of registers: the tile that everything in routed_modules_cpu.h multiplies with.
#pragma once
#include <algorithm>
#include <bit>
#include <type_traits>
#include <utility>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "vectors.h"

namespace d2r_fast::D2R_ISA {

// kTileRows x kPanel accumulators, kPanel values of B and one of A fill the vector registers: 32 or 16 of them.
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kPanelVectors = 2;
template <typename T>
constexpr int kPanel = kPanelVectors * kLanes<T>;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows of a tile buffer, however many it holds, lie a constant distance apart, so that one address register serves all of them. 8704 bytes:
// the widest row, and rows land eight cache lines apart in the first-level cache.
template <typename T>
constexpr int64_t kTileStride = 8704 / sizeof(T);
static_assert(kMaxWidth * sizeof(double) < 8704);

enum class Start { kZero, kRow, kLoad };

// How one step of a product multiplies: operands as they are, or pairs of bf16 with the sum in float32.
template <typename T>
struct Multiply {
  using Element = T;
  using Sum = T;
  static void add(Vector<T>& sum, const Vector<T>& column, T value) { sum += column * value; }
};
struct MultiplyPairs {
  using Element = uint32_t;  // two consecutive k, the first in the low half
  using Sum = float;
  static void add(Vector<float>& sum, const Vector<uint32_t>& column, uint32_t value) {
#if defined(__AVX512BF16__)
    sum = _mm512_dpbf16_ps(sum, (__m512bh)column, (__m512bh)_mm512_set1_epi32(static_cast<int>(value)));
#else
    // What that instruction does, bit by bit but for denormal numbers, which it takes for zero: the second product first. A
    // product of two bf16 numbers is exact in float32, so a fused multiply-add rounds no differently.
    sum += std::bit_cast<Lanes<float>>(column & 0xffff0000u) * std::bit_cast<float>(value & 0xffff0000u);
    sum += std::bit_cast<Lanes<float>>(column << 16) * std::bit_cast<float>(value << 16);
#endif
  }
};

// C[r, :] (+)= sum_k A[r, k] B[k, :] for kRows rows and one panel of columns, or the first kVectors vectors of it.
// A lies in a tile buffer (kTransposed: A[r, k] at a[k * a_stride + r]); B[k, :] at b + k * b_stride; C[r, :] at
// c + r * c_stride. C starts from zero, from the row `start`, or from itself.
template <typename Step, int kRows, bool kTransposed, Start kStart, int kVectors = kPanelVectors>
inline void tile_product(int64_t depth, const typename Step::Element* a, int64_t a_stride, const typename Step::Element* b,
                         int64_t b_stride, typename Step::Sum* c, int64_t c_stride, const typename Step::Sum* start) {
  using E = typename Step::Element;
  using T = typename Step::Sum;
  Vector<T> sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kStart == Start::kZero) sum[r][v] = Vector<T>{};
      if constexpr (kStart == Start::kRow) sum[r][v] = vector_at(start + v * kLanes<T>);
      if constexpr (kStart == Start::kLoad) sum[r][v] = vector_at(c + r * c_stride + v * kLanes<T>);
    }
  for (int64_t k = 0; k < depth; ++k) {
    Vector<E> column[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) column[v] = vector_at(b + k * b_stride + v * kLanes<E>);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const E value = kTransposed ? a[k * a_stride + r] : a[r * kTileStride<E> + k];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) Step::add(sum[r][v], column[v], value);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) vector_at(c + r * c_stride + v * kLanes<T>) = sum[r][v];
}

// Calls body with the constant n, 1 <= n <= kTileRows.
template <typename Body>
inline void with_constant_rows(int64_t n, const Body& body) {
  [&]<int... kLess>(std::integer_sequence<int, kLess...>) {
    (void)((n == kLess + 1 ? (body(std::integral_constant<int, kLess + 1>{}), true) : false) || ...);
  }(std::make_integer_sequence<int, kTileRows>{});
}

// Calls body with the constant number of vectors of a panel that `columns` columns reach into.
template <typename T, typename Body>
inline void with_constant_vectors(int64_t columns, const Body& body) {
  if (columns <= kLanes<T>)
    body(std::integral_constant<int, 1>{});
  else
    body(std::integral_constant<int, kPanelVectors>{});
}

// Calls body(begin, in_tile) for n rows in tiles of equal size, nearly: in one of few rows, each step of a product would
// wait for the step before it.
template <typename Body>
inline void for_each_tile(int64_t n, const Body& body) {
  const int64_t n_tiles = (n + kTileRows - 1) / kTileRows;
  for (int64_t tile = 0; tile < n_tiles; ++tile) {
    const int64_t begin = n * tile / n_tiles;
    body(begin, n * (tile + 1) / n_tiles - begin);
  }
}

// This many steps of a panel, 16 KB, and of a tile's rows stay in the first-level cache while the panel meets all tiles.
constexpr int64_t kStepsAtOnce = 256;

// out[r, :] = start + a[r, :] B for n_rows rows of a tile buffer; start null: zero. `out` has room for whole panels.
// Once in the library for all that call it: its tiles of every number of rows are much code.
template <typename Step>
[[gnu::noinline]] inline void multiply_rows(int64_t n_rows, int64_t depth, const typename Step::Element* a, const typename Step::Element* panels,
                          int64_t columns, const typename Step::Sum* start, typename Step::Sum* out) {
  using T = typename Step::Sum;
  const int64_t n_parts = std::max<int64_t>(1, (depth + kStepsAtOnce - 1) / kStepsAtOnce);
  for (int64_t part = 0; part < n_parts; ++part) {
    const int64_t k = depth * part / n_parts, steps = depth * (part + 1) / n_parts - k;
    const auto* panel = panels + k * kPanel<T>;
    for (int64_t first = 0; first < columns; first += kPanel<T>, panel += depth * kPanel<T>)
      with_constant_vectors<T>(columns - first, [&](auto vectors) {
        for_each_tile(n_rows, [&](int64_t row, int64_t in_tile) {
          const auto* a_at = a + row * kTileStride<T> + k;
          T* c = out + row * kTileStride<T> + first;
          with_constant_rows(in_tile, [&](auto rows) {
            const auto multiply = [&](auto from, const T* row_of_start) {
              tile_product<Step, rows(), false, from(), vectors()>(steps, a_at, 0, panel, kPanel<T>, c, kTileStride<T>,
                                                                   row_of_start);
            };
            if (part > 0)
              multiply(std::integral_constant<Start, Start::kLoad>{}, nullptr);
            else if (start)
              multiply(std::integral_constant<Start, Start::kRow>{}, start + first);
            else
              multiply(std::integral_constant<Start, Start::kZero>{}, nullptr);
          });
        });
      });
  }
}

// Where the `depth` rows of an operand of a transposed product lie, and how many columns of them count. Rows have room
// for whole panels.
template <typename E>
struct Rows {
  const E* at;
  int64_t stride, columns;
};

// sum [a.columns, b.columns] += a^T b.
template <typename Step>
[[gnu::noinline]] inline void add_transposed_product(int64_t depth, Rows<typename Step::Element> a, Rows<typename Step::Element> b,
                                   typename Step::Sum* sum) {
  using T = typename Step::Sum;
  for (int64_t top = 0; top < a.columns; top += kTileRows)
    with_constant_rows(std::min<int64_t>(kTileRows, a.columns - top), [&](auto rows) {
      for (int64_t first = 0; first < b.columns; first += kPanel<T>) {
        T* c = sum + top * b.columns + first;
        const auto *a_at = a.at + top, *b_at = b.at + first;
        const int64_t columns = b.columns - first;
        with_constant_vectors<T>(columns, [&](auto vectors) {
          constexpr int64_t width = vectors() * kLanes<T>;
          if (columns >= width) {
            // The sum is too large for the first-level cache: its next tile is asked for while this one is multiplied.
            for (int r = 0; r < rows(); ++r) __builtin_prefetch(c + r * b.columns + kPanel<T>);
            tile_product<Step, rows(), true, Start::kLoad, vectors()>(depth, a_at, a.stride, b_at, b.stride, c, b.columns,
                                                                      nullptr);
            return;
          }
          T tail[kTileRows * kPanel<T>];
          tile_product<Step, rows(), true, Start::kZero, vectors()>(depth, a_at, a.stride, b_at, b.stride, tail, width,
                                                                    nullptr);
          for (int r = 0; r < rows(); ++r)
            for (int64_t j = 0; j < columns; ++j) c[r * b.columns + j] += tail[r * width + j];
        });
      }
    });
}

// A weight as panels of columns of B, each with its `depth` steps one after another; element(k, column) says what B holds.
// kByStep: step by step, else column by column: the order in which the weight lies.
template <bool kByStep, typename E, typename Element>
inline void pack_panels(int64_t depth, int64_t columns, E* panel, const Element& element) {
  constexpr int64_t width = kPanel<E>;
  for (int64_t first = 0; first < columns; first += width, panel += depth * width) {
    const auto pack = [&](int64_t k, int64_t j) {
      panel[k * width + j] = first + j < columns ? element(k, first + j) : E(0);
    };
    if constexpr (kByStep) {
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t j = 0; j < width; ++j) pack(k, j);
    } else {
      // In blocks that stay in the first-level cache: a whole column's steps would be written to as many lines of it as
      // there are steps, each of which comes back for the next column.
      constexpr int64_t at_once = 64 / sizeof(E);
      for (int64_t begin = 0; begin < depth; begin += at_once)
        for (int64_t k = begin; k < std::min(begin + at_once, depth); ++k)
          for (int64_t j = 0; j < width; ++j) pack(k, j);
    }
  }
}

#if __has_builtin(__builtin_shufflevector)
// Of two rows of a square of vectors that lie kStep apart: the half of each that is the other's, exchanged.
template <typename T, int kStep, size_t... kLane>
inline void exchange(Lanes<T>& upper, Lanes<T>& lower, std::index_sequence<kLane...>) {
  constexpr int n = kLanes<T>;
  const Lanes<T> a = upper, b = lower;
  upper = __builtin_shufflevector(a, b, (kLane & kStep ? n + static_cast<int>(kLane) - kStep : static_cast<int>(kLane))...);
  lower = __builtin_shufflevector(a, b, (kLane & kStep ? n + static_cast<int>(kLane) : static_cast<int>(kLane) + kStep)...);
}
template <typename T, int kStep = kLanes<T> / 2>
inline void transpose_square(Lanes<T>* rows) {
  if constexpr (kStep > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i)
      if (!(i & kStep)) exchange<T, kStep>(rows[i], rows[i + kStep], std::make_index_sequence<kLanes<T>>{});
    transpose_square<T, kStep / 2>(rows);
  }
}
#endif

// As pack_panels, of W [n_out, n_in]^T: in squares of vectors, for W lies the other way.
template <typename T>
inline void pack_transposed(const T* weight, int64_t n_out, int64_t n_in, T* panel) {
  constexpr int64_t width = kPanel<T>, n = kLanes<T>;
  for (int64_t first = 0; first < n_out; first += width, panel += n_in * width)
    for (int64_t part = 0; part < width; part += n)
      for (int64_t begin = 0; begin < n_in; begin += n) {
        const int64_t rows = std::clamp<int64_t>(n_out - first - part, 0, n), steps = std::min(n, n_in - begin);
        const T* from = weight + (first + part) * n_in + begin;
        T* to = panel + begin * width + part;
#if __has_builtin(__builtin_shufflevector)
        if (rows == n && steps == n) {
          Lanes<T> square[n];
#pragma GCC unroll 16
          for (int64_t j = 0; j < n; ++j) square[j] = load<Lanes<T>>(from + j * n_in);
          transpose_square<T>(square);
#pragma GCC unroll 16
          for (int64_t k = 0; k < n; ++k) store(to + k * width, square[k]);
          continue;
        }
#endif
        for (int64_t k = 0; k < steps; ++k)
          for (int64_t j = 0; j < n; ++j) to[k * width + j] = j < rows ? from[j * n_in + k] : T(0);
      }
}

// Products of operands as they are stored. Weights are [n_out, n_in]: forward multiplies by W^T, backward by W.
template <typename T>
struct PlainProducts {
  static size_t packed_bytes(int64_t depth, int64_t columns) { return depth * round_up(columns, kPanel<T>) * sizeof(T); }

  static void pack_weight(const T* weight, int64_t n_out, int64_t n_in, bool backward, std::byte* panels) {
    T* to = reinterpret_cast<T*>(panels);
    if (backward)
      pack_panels<true>(n_out, n_in, to, [=](int64_t k, int64_t j) { return weight[k * n_in + j]; });
    else
      pack_transposed(weight, n_out, n_in, to);
  }

  static void multiply(int64_t n_rows, const T* a, const std::byte* panels, int64_t depth, int64_t columns, const T* start,
                       T* out) {
    multiply_rows<Multiply<T>>(n_rows, depth, a, reinterpret_cast<const T*>(panels), columns, start, out);
  }

  static int64_t scratch(int64_t, int64_t) { return 0; }

  static void add_outer(int64_t n_rows, Rows<T> a, Rows<T> b, T* sum, T*) {
    add_transposed_product<Multiply<T>>(n_rows, a, b, sum);
  }
};

// Products of operands rounded to bf16, two steps at once, summed in float32: the same numbers on every instruction set.
struct Bf16Products {
  static size_t packed_bytes(int64_t depth, int64_t columns) {
    return (depth + 1) / 2 * round_up(columns, kPanel<float>) * sizeof(uint32_t);
  }

  static void pack_weight(const float* weight, int64_t n_out, int64_t n_in, bool backward, std::byte* panels) {
    const int64_t depth = backward ? n_out : n_in, columns = backward ? n_in : n_out;
    const auto at = [=](int64_t k, int64_t j) {
      return k >= depth ? 0.0f : backward ? weight[k * n_in + j] : weight[j * n_in + k];
    };
    const auto pairs = [=](int64_t k, int64_t j) { return pair(at(2 * k, j), at(2 * k + 1, j)); };
    uint32_t* to = reinterpret_cast<uint32_t*>(panels);
    if (backward)
      pack_panels<true>((depth + 1) / 2, columns, to, pairs);
    else
      pack_panels<false>((depth + 1) / 2, columns, to, pairs);
  }

  static void multiply(int64_t n_rows, const float* a, const std::byte* panels, int64_t depth, int64_t columns,
                       const float* start, float* out) {
    alignas(64) thread_local uint32_t pairs[kBlockRows * kTileStride<uint32_t>];
    for (int64_t r = 0; r < n_rows; ++r) pair_columns(depth, a + r * kTileStride<float>, pairs + r * kTileStride<uint32_t>);
    const auto* packed = reinterpret_cast<const uint32_t*>(panels);
    multiply_rows<MultiplyPairs>(n_rows, (depth + 1) / 2, pairs, packed, columns, start, out);
  }

  // Floats that add_outer needs for rows of these strides together.
  static int64_t scratch(int64_t n_rows, int64_t strides) { return (n_rows + 1) / 2 * strides; }

  static void add_outer(int64_t n_rows, Rows<float> a, Rows<float> b, float* sum, float* scratch) {
    const int64_t depth = (n_rows + 1) / 2;
    uint32_t* a_pairs = reinterpret_cast<uint32_t*>(scratch);
    uint32_t* b_pairs = a_pairs + depth * a.stride;
    pair_rows(n_rows, a, a_pairs);
    pair_rows(n_rows, b, b_pairs);
    add_transposed_product<MultiplyPairs>(depth, {a_pairs, a.stride, a.columns}, {b_pairs, b.stride, b.columns}, sum);
  }

 private:
  static uint32_t pair(float low, float high) { return bf16(low) | bf16(high) << 16; }

  // Rounded to nearest, ties to even; a NaN stays one.
  static uint32_t bf16(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    return value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }

#if defined(__AVX512BF16__)
  // Elements 2k and 2k+1 of a row side by side; past the last one zero.
  static void pair_columns(int64_t n, const float* row, uint32_t* pairs) {
    for (int64_t j = 0; j < n; j += 2 * kLanes<float>) {
      const __mmask32 inside = n - j >= 32 ? ~0u : (1u << (n - j)) - 1;
      const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(inside), row + j);
      const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(inside >> 16), row + j + kLanes<float>);
      _mm512_storeu_si512(pairs + j / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }

  // Rows 2k and 2k+1 side by side, element by element; past the last row zeros.
  static void pair_rows(int64_t n_rows, Rows<float> from, uint32_t* pairs) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                                21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const float* rows = from.at;
    for (int64_t row = 0; row < n_rows; row += 2, rows += 2 * from.stride, pairs += from.stride)
      for (int64_t j = 0; j < from.columns; j += kLanes<float>) {
        const __m512 low = _mm512_loadu_ps(rows + j);
        const __m512 high = row + 1 < n_rows ? _mm512_loadu_ps(rows + from.stride + j) : _mm512_setzero_ps();
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        _mm512_storeu_si512(pairs + j, _mm512_permutexvar_epi16(interleave, both));
      }
  }
#else
  static void pair_columns(int64_t n, const float* row, uint32_t* pairs) {
#pragma omp simd
    for (int64_t k = 0; k < n / 2; ++k) pairs[k] = pair(row[2 * k], row[2 * k + 1]);
    if (n % 2) pairs[n / 2] = pair(row[n - 1], 0);
  }

  static void pair_rows(int64_t n_rows, Rows<float> from, uint32_t* pairs) {
    const float* rows = from.at;
    for (int64_t row = 0; row < n_rows; row += 2, rows += 2 * from.stride, pairs += from.stride) {
      const bool has_second = row + 1 < n_rows;
#pragma omp simd
      for (int64_t j = 0; j < from.columns; ++j) pairs[j] = pair(rows[j], has_second ? rows[from.stride + j] : 0);
    }
  }
#endif
};

}  // namespace d2r_fast::D2R_ISA
