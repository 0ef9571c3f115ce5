// Products of few rows by weights that are read once and widened in registers. Sums are fp32 whatever the type, each in one fixed
// order per thread count.

#pragma once

#include "vectors.h"

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 4;  // 32 registers: sums of 4 x 4, 4 of the weight, 1 of the input
#else
constexpr int kRows = 2;  // 16 registers
#endif
constexpr int kColumns = 4;
constexpr int kMost = 64;  // rows

// Numbers of a weight's row that are taken at once.
template <typename W>
constexpr int kChunk = sizeof(W) == 4 ? 256 : 512;

// Adds to sums those of M rows of the input with N columns' weights, over `count` numbers of each, while as many of P columns
// of what comes next are fetched from memory.
template <int M, int N, int P, typename W, typename A>
inline void multiply(const float* x, int64_t stride, const W* w, int64_t step, int64_t count, Vec (*sums)[N],
                     const A* ahead, int64_t ahead_step, float* wide = nullptr) {
  Vec own[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) own[m][n] = sums[m][n];
  for (int64_t k = 0; k < count; k += kLanes) {
    Vec columns[N];
    for (int n = 0; n < N; n++) columns[n] = load(w + n * step + k);
    if constexpr (!std::is_same_v<W, float>)
      if (wide != nullptr)
        for (int n = 0; n < N; n++) store(columns[n], wide + n * kChunk<W> + k);
    for (int p = 0; p < P; p++) __builtin_prefetch(ahead + p * ahead_step + k);
    for (int m = 0; m < M; m++) {
      Vec row = load(x + m * stride + k);
      for (int n = 0; n < N; n++) own[m][n] += row * columns[n];
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) sums[m][n] = own[m][n];
}

// N columns of the product of all rows, which come in groups of M, of which `count` are real.
template <int M, int N, typename T, typename W>
inline void columns(const float* x, const W* w, const T* bias, T* out, int64_t count, int64_t width, int64_t stride) {
  constexpr int kSums = (kMost * N + kLanes - 1) / kLanes * kLanes;
  Vec sums[kSums];
  for (int64_t i = 0; i < std::min<int64_t>(kSums, (count + M) * N + kLanes); i++) sums[i] = Vec{};
  constexpr int kTaken = kChunk<W>;
  alignas(64) float wide[N * kTaken];
  int64_t whole = width / kLanes * kLanes, groups = (count + M - 1) / M;
  // In chunks, so that all rows' share of the input stays in the first cache.
  for (int64_t k = 0; k < whole; k += kTaken) {
    int64_t taken = std::min<int64_t>(kTaken, whole - k);
    const W* ahead = k + kTaken < whole ? w + k + kTaken : w + N * width;
    auto own = [&](int64_t g) { return reinterpret_cast<Vec(*)[N]>(sums + g * M * N); };
    if (groups < N) multiply<M, N, N>(x + k, width, w + k, width, taken, own(0), ahead, width, groups > 1 ? wide : nullptr);
    else multiply<M, N, 1>(x + k, width, w + k, width, taken, own(0), ahead, width, wide);
    // What more than one group reads is widened once.
    auto others = [&](const auto* read, int64_t step) {
      for (int64_t g = 1; g < groups; g++) {
        const float* rows = x + g * M * width + k;
        if (groups >= N && g < N) multiply<M, N, 1>(rows, width, read, step, taken, own(g), ahead + g * width, width);
        else multiply<M, N, 0>(rows, width, read, step, taken, own(g), ahead, width);
      }
    };
    if constexpr (std::is_same_v<W, float>) others(w + k, width);
    else others(static_cast<const float*>(wide), kTaken);
  }
  alignas(64) float found[kLanes];
  for (int64_t i = 0; i < count * N; i++) {
    if (i % kLanes == 0) store(totals(sums + i), found);
    int64_t m = i / N, n = i % N;
    float sum = found[i % kLanes];
    for (int64_t k = whole; k < width; k++) sum += x[m * width + k] * widen(w[n * width + k]);
    narrow(sum + (bias ? widen(bias[n]) : 0.0f), out + m * stride + n);
  }
}

template <int M, int N, typename T, typename W>
void product(const float* x, const W* w, const T* bias, T* out, int64_t count, int64_t width, int64_t wide) {
  int64_t blocks = (wide + N - 1) / N;
  // Some 64 KiB of weights are read faster than a thread wakes.
  int64_t grain = std::max<int64_t>(1, 16384 / (width * N));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t from, int64_t to) {
    for (int64_t n = from * N; n < std::min(to * N, wide); n += N) {
      if (n + N <= wide) {
        columns<M, N>(x, w + n * width, bias ? bias + n : nullptr, out + n, count, width, wide);
      } else {
        for (int64_t i = n; i < wide; i++)
          columns<1, 1>(x, w + i * width, bias ? bias + i : nullptr, out + i, count, width, wide);
      }
    }
  });
}

template <typename T, typename W>
void product_of(const Tensor& input, const Tensor& weight, const T* bias, Tensor& output) {
  int64_t width = weight.size(1), wide = weight.size(0), count = output.numel() / wide;
  int group = count >= kRows ? kRows : count == 1 ? 1 : 2;
  int64_t padded = (count + group - 1) / group * group;
  auto given = static_cast<const T*>(input.const_data_ptr());
  Floats held;
  const float* x = nullptr;
  if constexpr (std::is_same_v<T, float>) x = given;
  if (x == nullptr || padded != count) {
    held = floats(padded * width);
    std::fill(held.get() + count * width, held.get() + padded * width, 0.0f);
    widen_all(given, held.get(), count * width);
    x = held.get();
  }
  auto w = static_cast<const W*>(weight.const_data_ptr());
  auto out = static_cast<T*>(output.mutable_data_ptr());
  if (group == 1) return product<1, sizeof(W) == 4 ? 2 : kColumns>(x, w, bias, out, count, width, wide);
  if (group == 2) return product<2, kColumns>(x, w, bias, out, count, width, wide);
  return product<kRows, kColumns>(x, w, bias, out, count, width, wide);
}

template <typename T>
void product_by(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, Tensor& output) {
  auto added = bias.has_value() ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
  if (weight.scalar_type() == ScalarType::Char) return product_of<T, int8_t>(input, weight, added, output);
  return product_of<T, T>(input, weight, added, output);
}

Tensor linear_few(Tensor input, Tensor weight, std::optional<Tensor> bias) {
  bool same = weight.scalar_type() == input.scalar_type() || weight.scalar_type() == ScalarType::Char;
  check(same && (!bias.has_value() || bias->scalar_type() == input.scalar_type()), "input, weight and bias have other types");
  check(weight.dim() == 2 && input.size(input.dim() - 1) == weight.size(1), "input and weight have other widths");
  check(weight.is_contiguous(), "the weight is not contiguous");
  check(weight.numel() > 0 && input.numel() <= kMost * weight.size(1), "linear_few takes 1 to 64 rows of a weight");
  check(!bias.has_value() || bias->numel() == weight.size(0), "the bias is not the weight's");
  if (!input.is_contiguous()) input = torch::stable::contiguous(input);
  if (bias.has_value() && !bias->is_contiguous()) bias = torch::stable::contiguous(*bias);
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape.back() = weight.size(0);
  Tensor output = torch::stable::new_empty(input, shape);
  switch (input.scalar_type()) {
    case ScalarType::Float: product_by<float>(input, weight, bias, output); break;
    case ScalarType::BFloat16: product_by<bf16>(input, weight, bias, output); break;
    case ScalarType::Half: product_by<fp16>(input, weight, bias, output); break;
    default: check(false, "linear_few takes float32, bfloat16 and float16");
  }
  return output;
}

}  // namespace
