// Vectors of a CPU in the compiler's own types (GCC and clang), of the width that the build names: one source for AVX2, AVX-512
// and NEON. Numbers of all types are widened to fp32.

#pragma once

#if defined(__AVX__)
#include <immintrin.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IVec __attribute__((vector_size(4 * kLanes)));

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline float widen(float value) { return value; }
inline float widen(bf16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline float widen(int8_t value) { return value; }
inline float widen(fp16 value) { return c10::detail::fp16_ieee_to_fp32_value(value.bits); }

inline void narrow(float value, float* to) { *to = value; }
inline void narrow(float value, bf16* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  to->bits = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float value, fp16* to) { to->bits = c10::detail::fp16_ieee_from_fp32_value(value); }

inline Vec load(const float* from) {
  Vec result;
  std::memcpy(&result, from, sizeof(result));
  return result;
}
#if defined(__AVX512F__)
inline Vec load(const bf16* from) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
}
inline Vec load(const int8_t* from) {
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
}
inline Vec load(const fp16* from) { return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
#elif defined(__AVX2__) && defined(__F16C__)
inline Vec load(const bf16* from) {
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
}
inline Vec load(const int8_t* from) {
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
}
inline Vec load(const fp16* from) { return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
#else
inline Vec load(const bf16* from) {
  typedef uint16_t Half __attribute__((vector_size(2 * kLanes)));
  typedef uint32_t Wide __attribute__((vector_size(4 * kLanes)));
  Half half;
  std::memcpy(&half, from, sizeof(half));
  return (Vec)(__builtin_convertvector(half, Wide) << 16);
}
inline Vec load(const int8_t* from) {
  Vec result;
  for (int lane = 0; lane < kLanes; lane++) result[lane] = from[lane];
  return result;
}
inline Vec load(const fp16* from) {
  Vec result;
  for (int lane = 0; lane < kLanes; lane++) result[lane] = widen(from[lane]);
  return result;
}
#endif
template <typename V, typename T>
inline void store(V value, T* to) {
  std::memcpy(to, &value, sizeof(value));
}

// Halves are added to halves.
template <typename V>
inline auto total(V value) {
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int lane = 0; lane < step; lane++) value[lane] += value[lane + step];
  return value[0];
}
#if defined(__AVX512F__)
inline float total(Vec value) { return _mm512_reduce_add_ps((__m512)value); }
#endif
// kLanes vectors' totals, one a lane; of fp32 or int32.
template <typename V>
inline V totals(const V* sums) {
#if defined(__AVX512F__)
  V pairs[8], fours[4], halves[2];
  for (int i = 0; i < 8; i++) {
    __m512 a = (__m512)sums[2 * i], b = (__m512)sums[2 * i + 1];
    pairs[i] = (V)_mm512_unpacklo_ps(a, b) + (V)_mm512_unpackhi_ps(a, b);
  }
  for (int i = 0; i < 4; i++) {
    __m512d a = (__m512d)pairs[2 * i], b = (__m512d)pairs[2 * i + 1];
    fours[i] = (V)_mm512_unpacklo_pd(a, b) + (V)_mm512_unpackhi_pd(a, b);
  }
  auto quarters = [](V a, V b) {
    __m512 first = (__m512)a, second = (__m512)b;
    return (V)_mm512_shuffle_f32x4(first, second, 0x88) + (V)_mm512_shuffle_f32x4(first, second, 0xdd);
  };
  for (int i = 0; i < 2; i++) halves[i] = quarters(fours[2 * i], fours[2 * i + 1]);
  return quarters(halves[0], halves[1]);
#else
  V result;
  for (int lane = 0; lane < kLanes; lane++) result[lane] = total(sums[lane]);
  return result;
#endif
}
inline float greatest(Vec value) {
  float most = value[0];
  for (int lane = 1; lane < kLanes; lane++) most = std::max(most, value[lane]);
  return most;
}
inline Vec all(float value) { return value - Vec{}; }

// exp of values at most 0, within 2 ulp; below -87 it is 0.
inline Vec exponential(Vec x) {
  IVec tiny = x < all(-87.0f);
  x = tiny ? all(-87.0f) : x;
  Vec n = x * 1.44269504f + 12582912.0f;  // rounds to whole numbers
  n -= 12582912.0f;
  Vec r = x - n * 0.693359375f;
  r -= n * -2.12194440e-4f;
  Vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  IVec power = (__builtin_convertvector(n, IVec) + 127) << 23;
  p *= (Vec)power;
  return tiny ? Vec{} : p;
}

// Aligned: a vector that lies in two lines of the cache takes two reads.
struct Free {
  void operator()(float* held) const { std::free(held); }
};
using Floats = std::unique_ptr<float[], Free>;
inline Floats floats(int64_t count) {
  return Floats(static_cast<float*>(std::aligned_alloc(64, (count * 4 + 63) / 64 * 64)));
}

template <typename T>
inline void widen_all(const T* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(load(from + i), to + i);
  for (; i < count; i++) to[i] = widen(from[i]);
}

inline void check(bool holds, const char* what) { STD_TORCH_CHECK(holds, "vitcop: ", what); }

}  // namespace
