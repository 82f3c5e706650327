// What the operations share on the host's side: checks of tensors, and the kernels of the instruction set in use.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "kernels.h"

namespace d2r_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Isa {
  const char* name;
  const KernelSet* kernels;
};

// The instruction set in use (library.cpp).
const Isa& isa();

// A ValueError in Python.
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) refuse(parts...);
}

template <typename T>
const Kernels<T>& kernels(bool bf16) {
  if constexpr (std::is_same_v<T, double>) {
    check(!bf16, "precision: expected float32 tensors for bf16 products, got float64");
    return isa().kernels->float64;
  } else {
    return bf16 ? isa().kernels->bf16 : isa().kernels->float32;
  }
}

inline std::string shape_text(const auto& shape) {
  std::ostringstream text;
  for (const char* before = "["; const int64_t size : shape) text << std::exchange(before, ", ") << size;
  return shape.size() ? text.str() + "]" : "[]";
}

// A tensor of another shape or dtype would be read past its end.
inline void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected) {
  const auto shape = tensor.sizes();
  check(std::equal(shape.begin(), shape.end(), expected.begin(), expected.end()), name, ": expected shape ",
        shape_text(expected), ", got ", shape_text(shape));
}
inline void check_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
  check(tensor.scalar_type() == dtype, name, ": expected a tensor of ", torch::headeronly::toString(dtype), ", got ",
        torch::headeronly::toString(tensor.scalar_type()));
}
inline void check_tensor(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape) {
  check_dtype(name, tensor, dtype);
  check_shape(name, tensor, shape);
  check(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

inline void check_width(const char* name, int64_t width) {
  check(width <= kMaxWidth, name, ": expected a width of at most ", kMaxWidth, ", got ", width);
}

inline void check_routes(int64_t n_modules, int64_t n_kept) {
  check(n_modules >= 1 && n_modules <= kMaxModules, "N: expected 1..", kMaxModules, " modules, got ", n_modules);
  check(n_kept >= 1 && n_kept <= n_modules, "K: expected 1..N=", n_modules, ", got ", n_kept);
}

// Of tensors whose dtype has been checked.
template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <typename T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename Body>
void with_dtype(const Tensor& tensor, const Body& body) {
  if (tensor.scalar_type() == ScalarType::Double) return body(double{});
  check(tensor.scalar_type() == ScalarType::Float, "expected a tensor of Float or Double, got ",
        torch::headeronly::toString(tensor.scalar_type()));
  body(float{});
}

}  // namespace d2r_fast
