// What the operations share on the host's side: checks of tensors, and the kernels of the instruction set in use.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <type_traits>

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

template <typename T>
const Kernels<T>& kernels(bool bf16) {
  if constexpr (std::is_same_v<T, double>) {
    STD_TORCH_CHECK(!bf16, "precision: bf16 products need float32 tensors, got float64");
    return isa().kernels->float64;
  } else {
    return bf16 ? isa().kernels->bf16 : isa().kernels->float32;
  }
}

inline void check_numel(const char* name, const Tensor& tensor, int64_t expected) {
  STD_TORCH_CHECK(tensor.numel() == expected, name, ": expected ", expected, " numbers, got ", tensor.numel());
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

inline void check_width(const char* name, int64_t width) {
  STD_TORCH_CHECK(width <= kMaxWidth, name, ": expected a width of at most ", kMaxWidth, ", got ", width);
}

inline void check_routes(int64_t n_modules, int64_t n_kept) {
  STD_TORCH_CHECK(n_modules >= 1 && n_modules <= kMaxModules, "N: expected 1..", kMaxModules, " modules, got ", n_modules);
  STD_TORCH_CHECK(n_kept >= 1 && n_kept <= n_modules, "K: expected 1..N=", n_modules, ", got ", n_kept);
}

// A tensor of another dtype would be read past its end.
template <typename T>
void check_dtype(const Tensor& tensor) {
  constexpr ScalarType expected = torch::headeronly::CppTypeToScalarType<T>::value;
  STD_TORCH_CHECK(tensor.scalar_type() == expected, "expected a tensor of ", torch::headeronly::toString(expected), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

template <typename T>
T* data(const Tensor& tensor) {
  check_dtype<T>(tensor);
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <typename T>
const T* const_data(const Tensor& tensor) {
  check_dtype<T>(tensor);
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename Body>
void with_dtype(const Tensor& tensor, const Body& body) {
  if (tensor.scalar_type() == ScalarType::Double) return body(double{});
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "expected float32 or float64");
  body(float{});
}

}  // namespace d2r_fast
