// The attention of one token, over the cached rows that all heads share. Of this file a kernel gets
// the part of the rows' type and its own. A row of kWidth elements is read in pairs of neighbours:
//
//   kRowBytes           bytes of a row
//   pair_at(row, i)     elements 2i and 2i + 1
//   store_row(v, row)   a warp writes a row of the values v

//// F32
constexpr int kRowBytes = 4 * kWidth;
__device__ inline float2 pair_at(const uint8_t* row, int i) {
  return reinterpret_cast<const float2*>(row)[i];
}
__device__ inline void store_row(const float* values, uint8_t* row) {
  for (int i = threadIdx.x; i < kWidth; i += 32) reinterpret_cast<float*>(row)[i] = values[i];
}
//// F16
constexpr int kRowBytes = 2 * kWidth;
__device__ inline float2 pair_at(const uint8_t* row, int i) {
  const uint32_t pair = reinterpret_cast<const uint32_t*>(row)[i];
  return {widen(static_cast<half_t>(pair)), widen(static_cast<half_t>(pair >> 16))};
}
__device__ inline void store_row(const float* values, uint8_t* row) {
  for (int i = threadIdx.x; i < kWidth; i += 32) {
    reinterpret_cast<half_t*>(row)[i] = narrow<half_t>(values[i]);
  }
}
//// Q8_0
// Blocks of 32: a float16 scale and 32 signed bytes, rounded as ggml does.
constexpr int kBlockBytes = 34, kRowBytes = kWidth / 32 * kBlockBytes;
__device__ inline float2 pair_at(const uint8_t* row, int i) {
  const uint16_t* block = reinterpret_cast<const uint16_t*>(row + i / 16 * kBlockBytes);
  const float d = widen(static_cast<half_t>(block[0]));
  const uint32_t pair = block[1 + i % 16];
  return {d * static_cast<int8_t>(pair & 255), d * static_cast<int8_t>(pair >> 8)};
}
__device__ inline void store_row(const float* values, uint8_t* row) {
  const int lane = threadIdx.x;
  for (int b = 0; b < kWidth / 32; ++b, row += kBlockBytes) {
    const float v = values[32 * b + lane];
    const float d = all_max(fabsf(v)) / 127;
    const float inverse = d == 0 ? 0 : 1 / d;
    if (lane == 0) *reinterpret_cast<half_t*>(row) = narrow<half_t>(d);
    row[2 + lane] = static_cast<uint8_t>(static_cast<int>(roundf(v * inverse)));
  }
}
//// prepare
// Of one token: its row, the normalized latent [kRank] and the turned key, to be cached; and turned
// [kHeads, rope], the turned ends of its queries q [kHeads, kQuery]. table is [2, positions,
// pairs].
__device__ inline void turn(const float* in, const float* cosine, const float* sine, int pairs,
                            float* out) {
  for (int i = threadIdx.x; i < pairs; i += 32) {
    out[2 * i] = in[2 * i] * cosine[i] - in[2 * i + 1] * sine[i];
    out[2 * i + 1] = in[2 * i] * sine[i] + in[2 * i + 1] * cosine[i];
  }
}
extern "C" __global__ void prepare(const float* kv, const float* q, const float* norm,
                                   const float* table, const int32_t* past, uint8_t* row,
                                   float* turned, int positions, int eps_bits) {
  __shared__ float values[kWidth];
  constexpr int kRope = kWidth - kRank, kPairs = kRope / 2;
  const int lane = threadIdx.x, head = blockIdx.x;
  const float* cosine = table + static_cast<int64_t>(past[0]) * kPairs;
  const float* sine = cosine + static_cast<int64_t>(positions) * kPairs;
  if (head < kHeads) {
    turn(q + (head + 1) * kQuery - kRope, cosine, sine, kPairs, turned + head * kRope);
    return;
  }
  float sum = 0;
  for (int i = lane; i < kRank; i += 32) sum += kv[i] * kv[i];
  const float factor = rsqrtf(all_sum(sum) / kRank + __int_as_float(eps_bits));
  for (int i = lane; i < kRank; i += 32) values[i] = kv[i] * factor * norm[i];
  turn(kv + kRank, cosine, sine, kPairs, values + kRank);
  __syncwarp();
  store_row(values, row);
}
//// attend
// One token's queries, absorbed [heads, kValue] and turned [heads, kWidth - kValue], over a part of
// the reserved rows, of which the first kValue elements are also the values. A warp does one
// head; the heads of a block share the rows through the cache. Writes context [parts, heads,
// kValue], not yet divided, and state [parts, heads, 2]: the largest score, and the sum of
// exp(score - largest).
extern "C" __global__ void attend(const float* absorbed, const float* turned, const uint8_t* rows,
                                  const int32_t* past, float* context, float* state, int heads,
                                  int reserved, int scale_bits) {
  constexpr int kPairs = kWidth / 64, kValuePairs = kValue / 64, kAtOnce = 4;
  const float scale = __int_as_float(scale_bits);
  const int length = past[0] + 1;
  const int lane = threadIdx.x % 32, head = threadIdx.x / 32 + blockIdx.y * (blockDim.x / 32);
  const int per_part = (reserved + gridDim.x - 1) / gridDim.x;
  const int begin = blockIdx.x * per_part, end = min(begin + per_part, length);
  float2 query[kPairs], total[kValuePairs];
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const float* from =
        j < kValuePairs ? absorbed + head * kValue : turned + head * (kWidth - kValue) - kValue;
    query[j] = reinterpret_cast<const float2*>(from)[lane + 32 * j];
    query[j].x *= scale, query[j].y *= scale;
  }
#pragma unroll
  for (int j = 0; j < kValuePairs; ++j) total[j] = {0, 0};
  float largest = minus_infinity(), sum = 0;
  for (int start = begin; start < end; start += kAtOnce) {
    float2 row[kAtOnce][kPairs];
    float score[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const uint8_t* at = rows + static_cast<int64_t>(min(start + i, end - 1)) * kRowBytes;
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
      score[i] = all_sum(score[i]);
      if (start + i >= end) score[i] = minus_infinity();
      top = fmaxf(top, score[i]);
    }
    const float shrink = __expf(largest - top);
    largest = top;
    sum *= shrink;
#pragma unroll
    for (int j = 0; j < kValuePairs; ++j) total[j].x *= shrink, total[j].y *= shrink;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float weight = __expf(score[i] - top);
      sum += weight;
#pragma unroll
      for (int j = 0; j < kValuePairs; ++j) {
        total[j].x += weight * row[i][j].x;
        total[j].y += weight * row[i][j].y;
      }
    }
  }
  const int64_t at = static_cast<int64_t>(blockIdx.x) * heads + head;
#pragma unroll
  for (int j = 0; j < kValuePairs; ++j) {
    reinterpret_cast<float2*>(context + at * kValue)[lane + 32 * j] = total[j];
  }
  if (lane == 0) state[2 * at] = largest, state[2 * at + 1] = sum;
}
//// merge
// y[heads, kValue]: the parts of `attend` together. One block a head, one thread an element.
extern "C" __global__ void merge(const float* context, const float* state, float* y, int parts,
                                 int heads) {
  const int head = blockIdx.x;
  float largest = minus_infinity();
  for (int p = 0; p < parts; ++p) largest = fmaxf(largest, state[2 * (p * heads + head)]);
  float sum = 0;
  for (int p = 0; p < parts; ++p) {
    const float* s = state + 2 * (p * heads + head);
    sum += s[1] * __expf(s[0] - largest);
  }
  for (int i = threadIdx.x; i < kValue; i += blockDim.x) {
    float total = 0;
    for (int p = 0; p < parts; ++p) {
      const int64_t at = static_cast<int64_t>(p) * heads + head;
      total += context[at * kValue + i] * __expf(state[2 * at] - largest);
    }
    y[head * kValue + i] = total / sum;
  }
}
