// Attention of one query over a cache that is read once. Sums are fp32 whatever the type, each in one fixed order per thread
// count.

#pragma once

#include "products.h"

namespace {

constexpr int kTile = 64;  // rows of a cache
constexpr int kAhead = 4096;  // bytes of a cache between what is read and what is fetched

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
