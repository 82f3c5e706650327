// A thread's own memory for one block of rows.
#pragma once
#include <memory>
#include <new>

#include "tile_product.h"

namespace d2r_fast::D2R_ISA {

// Memory of one thread that only grows, so that no call pays for fresh pages.
class Workspace {
 public:
  template <typename T>
  T* take(int64_t n) {
    const size_t bytes = round_up(n * sizeof(T), 64);
    used_ += bytes;
    return reinterpret_cast<T*>(bytes_.get() + used_ - bytes);
  }
  void reserve(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    bytes_.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t(64))));
    size_ = bytes;
  }
  // One for a kernel, and one for a kernel that calls others: they would take each other's memory.
  enum class Owner { kKernel, kCaller };
  template <Owner owner = Owner::kKernel>
  static Workspace& of_this_thread() {
    thread_local Workspace workspace;
    return workspace;
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<std::byte, Free> bytes_;
  size_t size_ = 0, used_ = 0;
};

}  // namespace d2r_fast::D2R_ISA
