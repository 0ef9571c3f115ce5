// Products of few rows of int8 by int8 weights, which are read once. Sums are int32, exact.

#pragma once

#include "products.h"

namespace {

// Adds to every lane of `sums` products of neighbours; a processor with VNNI takes one factor without sign, which is 128 more.
#if defined(__AVX512VNNI__)
constexpr int kShift = 128, kStep = 4 * kLanes;
typedef __m512i Bytes;
inline Bytes load_bytes(const int8_t* from) { return _mm512_loadu_si512(from); }
inline IVec dot(IVec sums, Bytes x, Bytes w) { return (IVec)_mm512_dpbusd_epi32((__m512i)sums, x, w); }
inline Bytes shifts() { return _mm512_set1_epi8(char(kShift)); }
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
constexpr int kShift = 128, kStep = 4 * kLanes;
typedef __m256i Bytes;
inline Bytes load_bytes(const int8_t* from) { return _mm256_loadu_si256((const __m256i*)from); }
inline IVec dot(IVec sums, Bytes x, Bytes w) { return (IVec)_mm256_dpbusd_avx_epi32((__m256i)sums, x, w); }
inline Bytes shifts() { return _mm256_set1_epi8(char(kShift)); }
#else
constexpr int kShift = 0, kStep = 2 * kLanes;
#if defined(__AVX512BW__)
typedef __m512i Bytes;
inline Bytes load_bytes(const int8_t* from) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from)); }
inline IVec dot(IVec sums, Bytes x, Bytes w) { return sums + (IVec)_mm512_madd_epi16(x, w); }
#elif defined(__AVX2__) && !defined(__AVX512F__)
typedef __m256i Bytes;
inline Bytes load_bytes(const int8_t* from) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from)); }
inline IVec dot(IVec sums, Bytes x, Bytes w) { return sums + (IVec)_mm256_madd_epi16(x, w); }
#else
struct Bytes {
  IVec even, odd;
};
inline Bytes load_bytes(const int8_t* from) {
  Bytes found;
  for (int lane = 0; lane < kLanes; lane++) {
    found.even[lane] = from[lane];
    found.odd[lane] = from[kLanes + lane];
  }
  return found;
}
inline IVec dot(IVec sums, const Bytes& x, const Bytes& w) { return sums + x.even * w.even + x.odd * w.odd; }
#endif
#endif

// Adds to sums those of M rows of the input with N columns' weights, kStep numbers of each at a time. The first to read these
// weights fetches the columns that come next from memory, and adds to `shifted` what each sum has too much.
template <int M, int N, bool First>
inline void multiply_bytes(const int8_t* x, int64_t stride, const int8_t* w, int64_t step, int64_t count, int64_t ahead,
                           IVec* sums, IVec* shifted) {
  IVec own[M][N], over[N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) own[m][n] = sums[m * N + n];
  for (int n = 0; n < N; n++) over[n] = shifted[n];
  for (int64_t k = 0; k < count; k += kStep) {
    Bytes columns[N];
    for (int n = 0; n < N; n++) columns[n] = load_bytes(w + n * step + k);
    if constexpr (First)
      for (int n = 0; n < N; n++) {
        __builtin_prefetch(w + n * step + k + ahead);
#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
        over[n] = dot(over[n], shifts(), columns[n]);
#endif
      }
    for (int m = 0; m < M; m++) {
      Bytes row = load_bytes(x + m * stride + k);
      for (int n = 0; n < N; n++) own[m][n] = dot(own[m][n], row, columns[n]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) sums[m * N + n] = own[m][n];
  for (int n = 0; n < N; n++) shifted[n] = over[n];
}

// N columns of the product of all rows, which come in groups of M, of which `count` are real. Rows of the input have `stride`
// numbers, as many as fill vectors, of which the last are zeros.
template <int M, int N>
inline void columns_of_bytes(const int8_t* x, int64_t stride, const int8_t* w, int32_t* out, int64_t count, int64_t width,
                             int64_t wide) {
  constexpr int kSums = (M * N + kLanes - 1) / kLanes * kLanes, kOver = (N + kLanes - 1) / kLanes * kLanes;
  int64_t whole = width / kStep * kStep;
  alignas(64) int8_t last[N * kStep] = {};
  for (int n = 0; n < N; n++) std::memcpy(last + n * kStep, w + n * width + whole, width - whole);
  IVec shifted[kOver] = {};
  alignas(64) int32_t over[kOver], found[kSums];
  for (int64_t m = 0; m < count; m += M) {
    IVec sums[kSums] = {};
    const int8_t* rows = x + m * stride;
    auto all_of = [&](auto first) {
      constexpr bool kFirst = decltype(first)::value;
      multiply_bytes<M, N, kFirst>(rows, stride, w, width, whole, N * width, sums, shifted);
      if (whole < width) multiply_bytes<M, N, kFirst>(rows + whole, stride, last, kStep, kStep, 0, sums, shifted);
    };
    if (m == 0) {
      all_of(std::true_type());
      for (int i = 0; i < kOver; i += kLanes) store(totals(shifted + i), over + i);
    } else {
      all_of(std::false_type());
    }
    for (int i = 0; i < kSums; i += kLanes) store(totals(sums + i), found + i);
    for (int64_t i = m; i < std::min(m + M, count); i++)
      for (int n = 0; n < N; n++) out[i * wide + n] = found[(i - m) * N + n] - over[n];
  }
}

template <int M, int N>
void product_of_bytes(const int8_t* x, int64_t stride, const int8_t* w, int32_t* out, int64_t count, int64_t width,
                      int64_t wide) {
  int64_t grain = std::max<int64_t>(1, 65536 / (width * N));
  torch::stable::parallel_for(0, (wide + N - 1) / N, grain, [&](int64_t from, int64_t to) {
    for (int64_t n = from * N; n < std::min(to * N, wide); n += N) {
      if (n + N <= wide) {
        columns_of_bytes<M, N>(x, stride, w + n * width, out + n, count, width, wide);
      } else {
        for (int64_t i = n; i < wide; i++) columns_of_bytes<1, 1>(x, stride, w + i * width, out + i, count, width, wide);
      }
    }
  });
}

Tensor linear_int8(Tensor input, Tensor weight) {
  check(input.scalar_type() == ScalarType::Char && weight.scalar_type() == ScalarType::Char, "linear_int8 takes int8");
  check(weight.dim() == 2 && input.size(input.dim() - 1) == weight.size(1), "input and weight have other widths");
  check(weight.is_contiguous(), "the weight is not contiguous");
  check(weight.numel() > 0 && input.numel() > 0 && input.numel() <= kMost * weight.size(1), "linear_int8 takes 1 to 64 rows of a weight");
  if (!input.is_contiguous()) input = torch::stable::contiguous(input);
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape.back() = weight.size(0);
  Tensor output = torch::stable::new_empty(input, shape, ScalarType::Int);
  int64_t width = weight.size(1), wide = weight.size(0), count = output.numel() / wide;
  int64_t stride = (width + kStep - 1) / kStep * kStep, group = count >= kRows ? kRows : count == 1 ? 1 : 2;
  int64_t padded = (count + group - 1) / group * group;
  Floats held = floats((padded * stride + 3) / 4);
  auto x = reinterpret_cast<int8_t*>(held.get());
  auto given = static_cast<const int8_t*>(input.const_data_ptr());
  std::memset(x, 0, padded * stride);
  for (int64_t row = 0; row < count; row++)
    for (int64_t k = 0; k < width; k++) x[row * stride + k] = int8_t(given[row * width + k] ^ kShift);
  auto w = static_cast<const int8_t*>(weight.const_data_ptr());
  auto out = static_cast<int32_t*>(output.mutable_data_ptr());
  if (group == 1) product_of_bytes<1, kColumns>(x, stride, w, out, count, width, wide);
  else if (group == 2) product_of_bytes<2, kColumns>(x, stride, w, out, count, width, wide);
  else product_of_bytes<kRows, kColumns>(x, stride, w, out, count, width, wide);
  return output;
}

}  // namespace
