// Routes that come from outside: what the kernels rely on is looked at once, where they enter.
#pragma once
#include <algorithm>
#include <atomic>

#include "host.h"

namespace d2r_fast {

// What an operation returns of `Routes`, in this order.
struct ChosenRoutes {
  Tensor gate, index, flow, active;
};

inline ChosenRoutes fresh_routes(const Sizes& s, const Tensor& like) {
  const auto of_slots = [&](ScalarType dtype) {
    return fresh(like, {s.n_nets, s.n_rows, s.n_modules, s.n_kept}, true, dtype);
  };
  return {of_slots(like.scalar_type()), of_slots(ScalarType::Int), of_slots(ScalarType::Bool),
          fresh(like, {s.n_nets, s.n_rows}, true, ScalarType::Int)};
}

// The first slot of a row's routes that no route may have, or -1: route i (1..N) reads min(K, i) modules, all below i, none
// twice. Slots past those are not looked at.
template <typename Index>
int64_t find_illegal_slot(const Index* index, int64_t n_modules, int64_t n_kept) {
  for (int64_t i = 1; i <= n_modules; ++i) {
    uint32_t seen = 0;
    for (int64_t k = 0; k < std::min(n_kept, i); ++k) {
      const auto source = static_cast<int64_t>(index[(i - 1) * n_kept + k]);
      if (source < 0 || source >= i || seen >> source & 1) return (i - 1) * n_kept + k;
      seen |= 1u << source;
    }
  }
  return -1;
}

template <typename Index>
[[noreturn]] void refuse_slot(const Index* index, const Sizes& s, int64_t row, int64_t slot) {
  const int64_t route = slot / s.n_kept + 1;
  const auto source = static_cast<int64_t>(index[row * s.n_modules * s.n_kept + slot]);
  refuse("index[", row / s.n_rows, ",", row % s.n_rows, ",", route - 1, ",", slot % s.n_kept, "]: route ", route,
         " reads distinct modules of 0..", route - 1, ", got ", source, source >= 0 && source < route ? " again" : "");
}

// Routes given from outside, in the dtype they came in: checked, and copied to `index`, a block of rows at a time.
class GivenRoutes {
  template <typename Body>
  auto with_index(const Body& body) const {
    if (dtype_ == ScalarType::Byte) return body(static_cast<const uint8_t*>(from_));
    if (dtype_ == ScalarType::Int) return body(static_cast<const int32_t*>(from_));
    return body(static_cast<const int64_t*>(from_));
  }

 public:
  GivenRoutes(const std::optional<Tensor>& given, const Sizes& s, int32_t* index) : size_(s), index_(index) {
    if (!given) return;
    check_shape("index", *given, {s.n_nets, s.n_rows, s.n_modules, s.n_kept});
    dtype_ = given->scalar_type();
    if (dtype_ != ScalarType::Byte && dtype_ != ScalarType::Int) dtype_ = ScalarType::Long;  // rare ones are converted
    given_ = readable(given, dtype_);
    from_ = given_->const_data_ptr();
  }

  bool any() const { return from_ != nullptr; }

  // Rows row..row+n_rows of all networks', which become the rows from `to` of `index`; false, with nothing to run, if one of
  // them is illegal.
  bool take(int64_t row, int64_t n_rows, int64_t to) {
    if (!any()) return true;
    return with_index([&](const auto* given) {
      const int64_t slots = size_.n_modules * size_.n_kept;
      for (int64_t r = 0; r < n_rows; ++r) {
        const auto* from = given + (row + r) * slots;
        if (find_illegal_slot(from, size_.n_modules, size_.n_kept) >= 0) {
          has_illegal_ = true;
          return false;
        }
        int32_t* index = index_ + (to + r) * slots;
        for (int64_t i = 1; i <= size_.n_modules; ++i)
          for (int64_t k = 0; k < size_.n_kept; ++k, ++from, ++index) *index = k < i ? static_cast<int32_t>(*from) : 0;
      }
      return true;
    });
  }

  // After all rows are taken: says which is illegal, if one is.
  void require_legal() const {
    if (!has_illegal_) return;
    with_index([&](const auto* from) {
      for (int64_t row = 0; row < size_.n_nets * size_.n_rows; ++row) {
        const int64_t slot = find_illegal_slot(from + row * size_.n_modules * size_.n_kept, size_.n_modules, size_.n_kept);
        if (slot >= 0) refuse_slot(from, size_, row, slot);
      }
    });
  }

 private:
  Sizes size_;
  int32_t* index_;
  std::optional<Tensor> given_;
  const void* from_ = nullptr;
  ScalarType dtype_ = ScalarType::Int;
  std::atomic<bool> has_illegal_ = false;
};

// Whether routes and active bits of a row fit each other: legal routes, and an active module wherever an active one, or the
// head, reads. More active modules than are read do no harm.
inline bool fits_active(const int32_t* index, int32_t active, int64_t n_modules, int64_t n_kept) {
  if (find_illegal_slot(index, n_modules, n_kept) >= 0) return false;
  for (int64_t i = 1; i <= n_modules; ++i) {
    if (i < n_modules && !(static_cast<uint32_t>(active) >> i & 1)) continue;
    for (int64_t k = 0; k < std::min(n_kept, i); ++k)
      if (!(static_cast<uint32_t>(active) >> index[(i - 1) * n_kept + k] & 1)) return false;
  }
  return true;
}

// Says what is wrong with the first row for which `fits_active` does not hold; returns if there is none.
inline void require_active(const int32_t* index, const int32_t* active, const Sizes& s) {
  const int64_t slots = s.n_modules * s.n_kept;
  for (int64_t row = 0; row < s.n_nets * s.n_rows; ++row) {
    const int32_t* own = index + row * slots;
    if (fits_active(own, active[row], s.n_modules, s.n_kept)) continue;
    const int64_t slot = find_illegal_slot(own, s.n_modules, s.n_kept);
    if (slot >= 0) refuse_slot(index, s, row, slot);
    refuse("active[", row / s.n_rows, ",", row % s.n_rows, "]: expected the bits of all modules that the head reaches, got ",
           active[row]);
  }
}

}  // namespace d2r_fast
