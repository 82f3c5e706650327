// What the operations share on the host's side: checks of tensors, their memory, and the kernels of the instruction set in
// use. Schemas are in d2r_fast/ops, whose public functions check what is cheap to check there; here is checked what would
// read or write out of bounds. Each operation allocates what it returns and is registered at the end of its file.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

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

// An argument `str precision` (d2r_fast/ops/backends.py). Not std::string: torch's conversion to one (2.11 to 2.13) leaks a
// copy of it in every call.
struct Precision {
  bool bf16 = false;
};

// Of the instruction set in use, for products in `precision`.
template <typename T>
const Kernels<T>& kernels(Precision precision = {}) {
  if constexpr (std::is_same_v<T, double>) {
    check(!precision.bf16, "precision: expected float32 tensors for bf16 products, got float64");
    return isa().kernels->float64;
  } else {
    return precision.bf16 ? isa().kernels->bf16 : isa().kernels->float32;
  }
}

// Written as [2, 3] where a message is told: a text made in every check would cost more than the checks.
template <typename Shape>
struct ShapeText {
  const Shape& shape;
  friend std::ostream& operator<<(std::ostream& text, const ShapeText& of) {
    text << "[";
    for (const char* before = ""; const int64_t size : of.shape) text << std::exchange(before, ", ") << size;
    return text << "]";
  }
};
template <typename Shape>
ShapeText<Shape> shape_text(const Shape& shape) {
  return {shape};
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

// The tensor itself, or a copy that has the dtype and lies in one piece: so the kernels read every input.
inline Tensor readable(const Tensor& tensor, ScalarType dtype) {
  Tensor read = tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
  return read.is_contiguous() ? read : torch::stable::contiguous(read);
}
inline Tensor readable(const Tensor& tensor) { return readable(tensor, tensor.scalar_type()); }
inline std::optional<Tensor> readable(const std::optional<Tensor>& tensor, ScalarType dtype) {
  return tensor ? std::optional(readable(*tensor, dtype)) : std::nullopt;
}

// A new tensor that holds anything; one that nobody wants is empty. Past torch::stable::new_empty, which looks torch's
// operation up by its name in every call.
inline Tensor fresh(const Tensor& like, std::initializer_list<int64_t> shape, bool wanted = true,
                    std::optional<ScalarType> dtype = std::nullopt) {
  if (!wanted) return fresh(like, {0}, true, dtype);
  auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype.value_or(like.scalar_type())));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), shape.begin(), static_cast<int64_t>(shape.size()), &code,
                                                   nullptr, nullptr, 0, nullptr, &handle));
  return Tensor(handle);
}

// Of rows that all networks read alike: [E,B,in] -> [B,in].
inline Tensor sum_over_nets(const Tensor& gradient) {
  const int64_t axis = 0;
  return torch::stable::sum(gradient, torch::headeronly::IntHeaderOnlyArrayRef(&axis, 1));
}

template <typename Body>
void with_dtype(const Tensor& tensor, const Body& body) {
  if (tensor.scalar_type() == ScalarType::Double) return body(double{});
  check(tensor.scalar_type() == ScalarType::Float, "expected a tensor of Float or Double, got ",
        torch::headeronly::toString(tensor.scalar_type()));
  body(float{});
}

}  // namespace d2r_fast

template <>
struct torch::stable::detail::ToImpl<d2r_fast::Precision> {
  static d2r_fast::Precision call(StableIValue value, uint64_t /*extension_build_version*/, bool /*is_internal*/) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    const char* text;
    size_t length;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    const bool bf16 = std::string_view(text, length) == "bf16";
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return {bf16};
  }
};
