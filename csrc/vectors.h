// Vectors as wide as the instruction set has them, and memory that is read and written through them.
#pragma once
#include <cstring>

namespace d2r_fast::D2R_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);

template <typename T>
struct VectorOf {
  // May lie anywhere an element may, and alias it.
  typedef T Type __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  typedef T Value __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vector = typename VectorOf<T>::Type;
// A template's argument loses attributes, and with them Vector its meaning; a value needs none.
template <typename T>
using Lanes = typename VectorOf<T>::Value;

template <typename T>
inline Vector<T>& vector_at(T* p) {
  return *reinterpret_cast<Vector<T>*>(p);
}
template <typename T>
inline const Vector<T>& vector_at(const T* p) {
  return *reinterpret_cast<const Vector<T>*>(p);
}

// V is Lanes<T>, or T for what is left of a row.
template <typename V, typename T>
inline V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}
template <typename V, typename T>
inline void store(T* to, const V& value) {
  std::memcpy(to, &value, sizeof(V));
}

// By halves: a sum lane by lane would wait for every addition.
template <typename T>
inline T sum_of_lanes(const Lanes<T>& value) {
  T lanes[kLanes<T>];
  std::memcpy(lanes, &value, sizeof(lanes));
  for (int n = kLanes<T> / 2; n > 0; n /= 2)
    for (int j = 0; j < n; ++j) lanes[j] += lanes[j + n];
  return lanes[0];
}

}  // namespace d2r_fast::D2R_ISA
