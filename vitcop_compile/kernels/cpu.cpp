// Products of few rows and attention of one query on a CPU, at the rate at which memory is read.
//
// Written in the compiler's vectors (GCC and clang), of the width the build names: one source for AVX2, AVX-512 and NEON. Sums
// are fp32 whatever the type, each in one fixed order per thread count.

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
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 4;  // 32 registers: sums of 4 x 4, 4 of the weight, 1 of the input
#else
constexpr int kRows = 2;  // 16 registers
#endif
constexpr int kColumns = 4;
constexpr int kMost = 64;  // rows
constexpr int kTile = 64;  // rows of a cache
constexpr int kAhead = 4096;  // bytes of a cache between what is read and what is fetched

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
inline void store(Vec value, float* to) { std::memcpy(to, &value, sizeof(value)); }

// Halves are added to halves.
inline float total(Vec value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)value);
#else
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int lane = 0; lane < step; lane++) value[lane] += value[lane + step];
  return value[0];
#endif
}
// kLanes vectors' totals, one a lane.
inline Vec totals(const Vec* sums) {
#if defined(__AVX512F__)
  __m512 pairs[8], fours[4], halves[2];
  for (int i = 0; i < 8; i++) {
    __m512 a = (__m512)sums[2 * i], b = (__m512)sums[2 * i + 1];
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; i++) {
    __m512d a = (__m512d)pairs[2 * i], b = (__m512d)pairs[2 * i + 1];
    fours[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
  }
  for (int i = 0; i < 2; i++)
    halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88),
                              _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xdd));
  return (Vec)_mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                            _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
#else
  Vec result;
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

void check(bool holds, const char* what) { STD_TORCH_CHECK(holds, "vitcop: ", what); }

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

// Scores of M queries with `count` keys: kLanes of them at once.
template <int M, typename T>
inline void score(const float* query, const T* key, int64_t width, int64_t count, float* scores, int64_t stride) {
  constexpr int N = kLanes / M;
  int64_t whole = width / kLanes * kLanes, row = 0;
  for (; row + N <= count; row += N) {
    Vec sums[kLanes] = {};
    const T* rows = key + row * width;
    multiply<M, N, N>(query, width, rows, width, whole, reinterpret_cast<Vec(*)[N]>(sums), rows + kAhead / sizeof(T), width);
    alignas(64) float found[kLanes];
    store(totals(sums), found);
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) scores[m * stride + row + n] = found[m * N + n];
  }
  for (int64_t last = row; last < count; last++)
    for (int m = 0; m < M; m++) {
      Vec sums[1][1] = {};
      multiply<1, 1, 0>(query + m * width, width, key + last * width, width, whole, sums, key, 0);
      scores[m * stride + last] = total(sums[0][0]);
    }
  for (int64_t i = whole; i < width; i++)
    for (row = 0; row < count; row++)
      for (int m = 0; m < M; m++) scores[m * stride + row] += query[m * width + i] * widen(key[row * width + i]);
}

// Adds to M sums those of `count` values, by their scores: N vectors of their width, which stay in registers.
template <int M, int N, typename T>
inline void gather(const float* scores, int64_t stride, const T* value, int64_t width, int64_t count, float* sums) {
  Vec own[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) own[m][n] = load(sums + m * width + n * kLanes);
  for (int64_t row = 0; row < count; row++) {
    Vec values[N];
    for (int n = 0; n < N; n++) {
      values[n] = load(value + row * width + n * kLanes);
      __builtin_prefetch(value + row * width + n * kLanes + kAhead / sizeof(T));
    }
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) own[m][n] += scores[m * stride + row] * values[n];
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) store(own[m][n], sums + m * width + n * kLanes);
}

template <int M, typename T>
inline void gather_all(const float* scores, int64_t stride, const T* value, int64_t width, int64_t count, float* sums) {
  int64_t i = 0;
  constexpr int N = M > 4 ? 2 : 4;  // 32 registers
  for (; i + N * kLanes <= width; i += N * kLanes) gather<M, N>(scores, stride, value + i, width, count, sums + i);
  for (; i + kLanes <= width; i += kLanes) gather<M, 1>(scores, stride, value + i, width, count, sums + i);
  for (; i < width; i++)
    for (int64_t row = 0; row < count; row++)
      for (int m = 0; m < M; m++) sums[m * width + i] += scores[m * stride + row] * widen(value[row * width + i]);
}

// Calls with as many of `shared` queries as go through at once, and with fewer for what is left.
template <typename F>
inline void by_queries(int64_t shared, F call) {
  for (int64_t q = 0; q < shared;) {
    int64_t left = shared - q;
    auto taken = [&](auto queries) {
      call(q, queries);
      q += decltype(queries)::value;
    };
    // Groups of 6, 7 and 8 queries are those of the models there are: one pass, and each row is widened once.
    if constexpr (kLanes >= 16) {
      if (left >= 8) { taken(std::integral_constant<int, 8>()); continue; }
      if (left == 7) { taken(std::integral_constant<int, 7>()); continue; }
      if (left == 6) { taken(std::integral_constant<int, 6>()); continue; }
    }
    if (kRows > 2 && left >= 4) taken(std::integral_constant<int, kRows>());
    else if (left >= 2) taken(std::integral_constant<int, 2>());
    else taken(std::integral_constant<int, 1>());
  }
}

// Attention of `shared` queries to rows [from, to) of one head's caches: what a softmax over all is put together of, and sums.
template <typename T>
void part(const float* query, const T* key, const T* value, int64_t shared, int64_t width, int64_t from, int64_t to,
          float* scores, float* most, float* weight, float* sums) {
  int64_t count = to - from, padded = (count + kLanes - 1) / kLanes * kLanes;
  // In tiles of rows, which all queries read while they are near.
  for (int64_t row = 0; row < count; row += kTile) {
    const T* tile = key + (from + row) * width;
    int64_t taken = std::min<int64_t>(kTile, count - row);
    by_queries(shared, [&](int64_t q, auto queries) {
      score<decltype(queries)::value>(query + q * width, tile, width, taken, scores + q * padded + row, padded);
    });
  }
  for (int64_t q = 0; q < shared; q++) {
    float* own = scores + q * padded;
    for (int64_t row = count; row < padded; row++) own[row] = -std::numeric_limits<float>::infinity();
    Vec high = load(own);
    for (int64_t row = kLanes; row < padded; row += kLanes) {
      Vec next = load(own + row);
      high = next > high ? next : high;
    }
    most[q] = greatest(high);
    Vec sum = {};
    for (int64_t row = 0; row < padded; row += kLanes) {
      Vec powers = exponential(load(own + row) - most[q]);
      store(powers, own + row);
      sum += powers;
    }
    weight[q] = total(sum);
  }
  std::fill(sums, sums + shared * width, 0.0f);
  for (int64_t row = 0; row < count; row += kTile) {
    const T* tile = value + (from + row) * width;
    int64_t taken = std::min<int64_t>(kTile, count - row);
    by_queries(shared, [&](int64_t q, auto queries) {
      gather_all<decltype(queries)::value>(scores + q * padded + row, padded, tile, width, taken, sums + q * width);
    });
  }
}

template <typename T>
void decode(const Tensor& query, const Tensor& key, const Tensor& value, float scale, const int64_t* at, int64_t step,
            Tensor& output) {
  int64_t batch = query.size(0), heads = query.size(1), width = query.size(3);
  int64_t groups = key.size(1), rows = key.size(2), shared = heads / groups;
  auto q = static_cast<const T*>(query.const_data_ptr());
  auto k = static_cast<const T*>(key.const_data_ptr());
  auto v = static_cast<const T*>(value.const_data_ptr());
  auto out = static_cast<T*>(output.mutable_data_ptr());
  int64_t pairs = batch * groups;
  // Rows are split where there are fewer heads than threads.
  int64_t threads = torch::stable::get_num_threads();
  int64_t splits = std::clamp<int64_t>((threads + pairs - 1) / pairs, 1, std::max<int64_t>(1, rows / 128));
  int64_t state = shared * (width + 2);
  Floats states = floats(pairs * splits * state);
  torch::stable::parallel_for(0, pairs * splits, 1, [&](int64_t from, int64_t to) {
    Floats queries = floats(shared * width), scores = floats(shared * (rows / splits + 2 * kLanes));
    for (int64_t task = from; task < to; task++) {
      int64_t pair = task / splits, split = task % splits, sample = pair / groups;
      int64_t length = std::min(at[sample * step] + 1, rows);
      int64_t first = length * split / splits, last = length * (split + 1) / splits;
      float* own = states.get() + task * state;
      for (int64_t i = 0; i < shared * width; i++) queries[i] = scale * widen(q[pair * shared * width + i]);
      if (last == first) {
        std::fill(own, own + shared, -std::numeric_limits<float>::infinity());
        std::fill(own + shared, own + state, 0.0f);
        continue;
      }
      const T* keys = k + pair * rows * width;
      const T* values = v + pair * rows * width;
      part(queries.get(), keys, values, shared, width, first, last, scores.get(), own, own + shared, own + 2 * shared);
    }
  });
  for (int64_t pair = 0; pair < pairs; pair++) {
    for (int64_t i = 0; i < shared; i++) {
      const float* parts = states.get() + pair * splits * state;
      float most = parts[i], weight = 0;
      for (int64_t s = 1; s < splits; s++) most = std::max(most, parts[s * state + i]);
      for (int64_t s = 0; s < splits; s++) weight += parts[s * state + shared + i] * std::exp(parts[s * state + i] - most);
      T* to = out + (pair * shared + i) * width;
      for (int64_t j = 0; j < width; j++) {
        float sum = 0;
        for (int64_t s = 0; s < splits; s++)
          sum += parts[s * state + 2 * shared + i * width + j] * std::exp(parts[s * state + i] - most);
        narrow(sum / weight, to + j);
      }
    }
  }
}

Tensor decode_attention(Tensor query, Tensor key, Tensor value, double scale, Tensor at) {
  check(query.dim() == 4 && query.size(2) == 1, "decode_attention takes one query of every head");
  check(key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(), "types differ");
  check(key.is_contiguous() && value.is_contiguous(), "caches are not contiguous");
  check(key.dim() == 4 && key.size(0) == query.size(0) && query.size(1) % key.size(1) == 0 && key.size(3) == query.size(3) &&
            std::equal(key.sizes().begin(), key.sizes().end(), value.sizes().begin()) && at.numel() == query.size(0),
        "caches are not those of the queries");
  check(at.scalar_type() == ScalarType::Long, "rows are not int64");
  if (!query.is_contiguous()) query = torch::stable::contiguous(query);
  if (!at.is_contiguous()) at = torch::stable::contiguous(at);
  Tensor output = torch::stable::empty_like(query);
  auto rows = static_cast<const int64_t*>(at.const_data_ptr());
  switch (query.scalar_type()) {
    case ScalarType::Float: decode<float>(query, key, value, scale, rows, 1, output); break;
    case ScalarType::BFloat16: decode<bf16>(query, key, value, scale, rows, 1, output); break;
    case ScalarType::Half: decode<fp16>(query, key, value, scale, rows, 1, output); break;
    default: check(false, "decode_attention takes float32, bfloat16 and float16");
  }
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY(vitcop_cpu, m) {
  m.def("linear_few(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
  m.def("decode_attention(Tensor query, Tensor key, Tensor value, float scale, Tensor at) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(vitcop_cpu, CPU, m) {
  m.impl("linear_few", TORCH_BOX(&linear_few));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
}
