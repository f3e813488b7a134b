// Latent attention of one token, in parts that are put together again. "attend" and "merge" are
// bodies, as in matrix.metal; the others say how a cached row is read, by the type of the cache:
// pair_at(row, i) are its values 2i and 2i + 1.

//// F32
inline float2 pair_at(const device uint8_t* row, int i) {
  return reinterpret_cast<const device float2*>(row)[i];
}
//// F16
inline float2 pair_at(const device uint8_t* row, int i) {
  return float2(reinterpret_cast<const device half2*>(row)[i]);
}
//// Q8_0
// 34 bytes hold a float16 scale and 32 signed bytes.
inline float2 pair_at(const device uint8_t* row, int i) {
  const device uint8_t* block = row + i / 16 * 34;
  const float d = float(*reinterpret_cast<const device half*>(block));
  const device int8_t* q = reinterpret_cast<const device int8_t*>(block + 2) + 2 * (i % 16);
  return float2(d * float(q[0]), d * float(q[1]));
}
//// attend
// Scaled queries [heads, kWidth] over a part of the rows uint8 [reserved, bytes], of which past[0]
// and one more are in use, and whose first kValue values are attended to. A simdgroup does one
// head; the heads of a threadgroup share the rows through the cache. Writes context [parts, heads,
// kValue], not yet divided, and state [parts, heads, 2]: the largest score, and the sum of
// exp(score - largest).
constexpr int kPairs = kWidth / 64, kValuePairs = kValue / 64, kAtOnce = 2;
const float minus_infinity = -metal::numeric_limits<float>::infinity();
const int heads = queries_shape[0], bytes = rows_shape[1];
const int length = past[0] + 1;
const int lane = int(thread_index_in_simdgroup);
const int head = int(threadgroup_position_in_grid.y * simdgroups_per_threadgroup +
                     simdgroup_index_in_threadgroup);
const int part = int(threadgroup_position_in_grid.x), parts = int(threadgroups_per_grid.x);
const int per_part = (length + parts - 1) / parts;
const int begin = part * per_part, end = min(begin + per_part, length);
const device float2* from = reinterpret_cast<const device float2*>(queries + head * kWidth);
float2 query[kPairs], total[kValuePairs];
#pragma unroll
for (int j = 0; j < kPairs; ++j) query[j] = from[lane + 32 * j];
#pragma unroll
for (int j = 0; j < kValuePairs; ++j) total[j] = float2(0, 0);
float largest = minus_infinity, sum = 0;
for (int start = begin; start < end; start += kAtOnce) {
  float2 row[kAtOnce][kPairs];
  float score[kAtOnce];
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const device uint8_t* at = rows + int64_t(min(start + i, end - 1)) * bytes;
    score[i] = 0;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      row[i][j] = pair_at(at, lane + 32 * j);
      score[i] += row[i][j].x * query[j].x + row[i][j].y * query[j].y;
    }
  }
  float top = largest;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    score[i] = simd_sum(score[i]);
    if (start + i >= end) score[i] = minus_infinity;
    top = max(top, score[i]);
  }
  const float shrink = exp(largest - top);
  largest = top;
  sum *= shrink;
#pragma unroll
  for (int j = 0; j < kValuePairs; ++j) total[j] *= shrink;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const float weight = exp(score[i] - top);
    sum += weight;
#pragma unroll
    for (int j = 0; j < kValuePairs; ++j) total[j] += weight * row[i][j];
  }
}
const int64_t at = int64_t(part) * heads + head;
device float2* out = reinterpret_cast<device float2*>(context + at * kValue);
#pragma unroll
for (int j = 0; j < kValuePairs; ++j) out[lane + 32 * j] = total[j];
if (lane == 0) {
  state[2 * at] = largest;
  state[2 * at + 1] = sum;
}
//// merge
// y[heads, kValue]: the parts of "attend" together. A threadgroup does one head.
const int parts = context_shape[0], heads = context_shape[1];
const int head = int(threadgroup_position_in_grid.x);
float largest = -metal::numeric_limits<float>::infinity();
for (int p = 0; p < parts; ++p) largest = max(largest, state[2 * (p * heads + head)]);
float sum = 0;
for (int p = 0; p < parts; ++p) {
  const int at = 2 * (p * heads + head);
  sum += state[at + 1] * exp(state[at] - largest);
}
for (int i = int(thread_position_in_threadgroup.x); i < kValue;
     i += int(threads_per_threadgroup.x)) {
  float total = 0;
  for (int p = 0; p < parts; ++p) {
    const int64_t at = int64_t(p) * heads + head;
    total += context[at * kValue + i] * exp(state[2 * at] - largest);
  }
  y[head * kValue + i] = total / sum;
}
