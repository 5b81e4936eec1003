// AdamW and gradient norms of the k entries that train, found in the flat buffers by their index; formulas: fastlora/ops/adamw_step.py.
//
//     at = index[i]:   g = clip grad[at];  m[i], v[i], param[at] ← one step              norms_m = √ Σ grad[index[i]]², i of matrix m
//
// Tiling: entries are independent, so a thread takes four that follow each other: moments and index are 16-byte accesses, and so are param
// and grad where the four are neighbours in the buffer too (a mask on B beside an A that trains: most of them). Else they are single ones.
// A norm is split into slices; the last block of a matrix adds its slices up in their order, so that the bits repeat. Squares are summed in
// double, where the square of a float is exact and neither overflows nor vanishes.
//
// Bytes of a step: 32 an entry (param, grad, m, v and index read, param, m, v written): 95 µs for 10 M entries at 3.35 TB/s, where
// they are neighbours; an entry that stands alone moves sectors of 32 bytes of param and grad: 116 bytes. FLOPs: 15. A norm: 8 bytes and
// 2 FLOPs an entry.
//
// Not run on a GPU: compiled for sm_80, sm_90a and sm_100 and run on a CPU (tests/cuda_cpu).
#pragma once
#include "cuda/device.cuh"

namespace fastlora {

constexpr int kQuad = 4;
constexpr int64_t kEntriesOfASlice = 16384, kMostSlices = 64;  // of a norm: 16 quads a thread

struct AdamwScalars {
  float one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_root_bias2, eps, decay;
};

inline AdamwScalars adamw_scalars(int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay) {
  const double bias1 = 1 - std::pow(beta1, step), bias2 = 1 - std::pow(beta2, step);
  return {static_cast<float>(1 - beta1),
          static_cast<float>(beta2),
          static_cast<float>(1 - beta2),
          static_cast<float>(lr / bias1),
          static_cast<float>(1 / std::sqrt(bias2)),
          static_cast<float>(eps),
          static_cast<float>(lr * weight_decay)};
}

struct AdamwStep {
  float* param;
  const float* grad;
  float *exp_avg, *exp_avg_sq;
  const int32_t* index;
  const float* clip;  // [1]
  int64_t k;
  AdamwScalars scalars;
  bool wide;  // index and moments lie on 16 bytes
};

// Four entries of the index; `count` of them are there, the others are the first again.
struct Positions {
  int32_t at[kQuad];
};

__device__ inline Positions load_positions(const int32_t* index, int64_t i, int count, bool wide) {
  Positions p;
  if (wide && count == kQuad) {
    const Pack<int32_t> pack = load_pack(index + i);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) p.at[j] = pack.at[j];
  } else {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) p.at[j] = index[i + (j < count ? j : 0)];
  }
  return p;
}

// Ascending without repeats: the span tells. Then 16 bytes of `buffer` hold all four.
__device__ inline bool adjacent(const float* buffer, const Positions& p) {
  return p.at[kQuad - 1] - p.at[0] == kQuad - 1 && aligned(buffer + p.at[0]);
}

__device__ inline Pack<float> gather(const float* buffer, const Positions& p) {
  if (adjacent(buffer, p)) return load_pack(buffer + p.at[0]);
  Pack<float> values;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) values.at[j] = buffer[p.at[j]];
  return values;
}

__device__ inline void scatter(float* buffer, const Positions& p, const Pack<float>& values, int count) {
  if (count == kQuad && adjacent(buffer, p)) return store_pack(buffer + p.at[0], values);
#pragma unroll
  for (int j = 0; j < kQuad; ++j)
    if (j < count) buffer[p.at[j]] = values.at[j];
}

__device__ inline Pack<float> load_quad(const float* x, int count, bool wide) {
  if (wide && count == kQuad) return load_pack(x);
  Pack<float> values;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) values.at[j] = x[j < count ? j : 0];
  return values;
}

__device__ inline void store_quad(float* x, const Pack<float>& values, int count, bool wide) {
  if (wide && count == kQuad) return store_pack(x, values);
#pragma unroll
  for (int j = 0; j < kQuad; ++j)
    if (j < count) x[j] = values.at[j];
}

// (1 − w) a + w b, from the nearer end: a tiny weight then costs no digits of a, nor a weight of 1 any of b.
__device__ inline float lerp_near(float a, float b, float w) { return w < 0.5f ? a + w * (b - a) : b - (1.0f - w) * (b - a); }

// The parameter is rounded once: decay and update are added up first, where they are small.
__device__ inline void adamw_update(float& param, float g, float& m, float& v, const AdamwScalars& s) {
  m = lerp_near(m, g, s.one_minus_beta1);
  v = s.beta2 * v + s.one_minus_beta2 * (g * g);
  param -= s.step_size * m / (sqrtf(v) * s.inverse_root_bias2 + s.eps) + s.decay * param;
}

__global__ void __launch_bounds__(kThreads) adamw_entries_kernel(const __grid_constant__ AdamwStep p) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kQuad;
  if (i >= p.k) return;
  const int count = min(p.k - i, static_cast<int64_t>(kQuad));
  const Positions at = load_positions(p.index, i, count, p.wide);
  const Pack<float> g = gather(p.grad, at);
  Pack<float> param = gather(p.param, at), m = load_quad(p.exp_avg + i, count, p.wide), v = load_quad(p.exp_avg_sq + i, count, p.wide);
  const float clip = *p.clip;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) adamw_update(param.at[j], clip * g.at[j], m.at[j], v.at[j], p.scalars);
  scatter(p.param, at, param, count);
  store_quad(p.exp_avg + i, m, count, p.wide);
  store_quad(p.exp_avg_sq + i, v, count, p.wide);
}

inline void launch_adamw_step(AdamwStep p, Stream stream) {
  p.wide = aligned(p.index) && aligned(p.exp_avg) && aligned(p.exp_avg_sq);
  if (p.k) launch(adamw_entries_kernel, dim3(ceil_div(p.k, kThreads * kQuad)), kThreads, stream, p);
}

struct GradientNorms {
  const float* grad;
  const int32_t* index;
  const int64_t* ranges;  // [matrices, 2]: first entry, and behind the last
  int matrices, slices;
  double* partial;  // [matrices, slices]
  int* arrivals;    // [matrices], 0
  float* norms;     // [matrices]
  bool wide;
};

// Slices for a largest matrix of so many entries.
inline int slices_of(int64_t entries) {
  const int64_t slices = ceil_div(entries, kEntriesOfASlice);
  return slices < 1 ? 1 : slices < kMostSlices ? slices : kMostSlices;
}

struct NormsShared {
  double of_warp[kThreads / 32];
  bool is_last;
};

// Of all threads of the block, in one order; thread 0 has it.
__device__ inline double block_sum(double x, NormsShared& shared) {
  for (int lanes = 16; lanes; lanes /= 2) x += __shfl_down_sync(~0u, x, lanes);
  if (threadIdx.x % 32 == 0) shared.of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0.0;
  for (int warp = 0; warp < kThreads / 32; ++warp) sum += shared.of_warp[warp];
  return sum;
}

__global__ void __launch_bounds__(kThreads) gradient_norms_kernel(const __grid_constant__ GradientNorms p) {
  SHARED_MEMORY(NormsShared, shared);
  const int matrix = blockIdx.x, slice = blockIdx.y;
  const int64_t begin = p.ranges[2 * matrix], end = p.ranges[2 * matrix + 1];
  const int64_t first = begin / kQuad;  // so that quads lie on 16 bytes
  const int64_t quads = begin < end ? (end + kQuad - 1) / kQuad - first : 0;
  const int64_t of_slice = (quads + p.slices - 1) / p.slices, last = min((slice + 1) * of_slice, quads);
  double squares = 0.0;
  for (int64_t q = slice * of_slice + threadIdx.x; q < last; q += kThreads) {
    const int64_t i = max((first + q) * kQuad, begin);
    const int count = min((first + q + 1) * kQuad, end) - i;
    const Pack<float> g = gather(p.grad, load_positions(p.index, i, count, p.wide));
#pragma unroll
    for (int j = 0; j < kQuad; ++j)
      if (j < count) squares += static_cast<double>(g.at[j]) * g.at[j];
  }
  squares = block_sum(squares, shared);
  if (threadIdx.x == 0) p.partial[matrix * p.slices + slice] = squares;
  if (!last_of(p.slices, p.arrivals + matrix, &shared.is_last) || threadIdx.x) return;
  double total = 0.0;
  for (int s = 0; s < p.slices; ++s) total += p.partial[matrix * p.slices + s];
  p.norms[matrix] = static_cast<float>(sqrt(total));
}

inline void launch_gradient_norms(GradientNorms p, Stream stream) {
  p.wide = aligned(p.index);
  if (p.matrices) launch(gradient_norms_kernel, dim3(p.matrices, p.slices), kThreads, stream, p);
}

}  // namespace fastlora
