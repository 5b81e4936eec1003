// What the kernels share: element types, 16-byte packs, shared memory, launches. nvcc compiles this for a GPU; g++ compiles the same
// kernels for a CPU with tests/cuda_cpu/emulation.h. No torch headers here: bindings (*.cu) have them.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SHARED_MEMORY(Type, name) __shared__ Type name

namespace fastlora {

using bfloat16 = __nv_bfloat16;
using float16 = __half;
using Stream = cudaStream_t;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(float16 x) { return __half2float(x); }

// Rounded once, to nearest even.
template <class T> __device__ T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline bfloat16 from_float<bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ inline float16 from_float<float16>(float x) { return __float2half_rn(x); }

template <class Parameters> void launch(void (*kernel)(Parameters), dim3 blocks, int threads, Stream stream, const Parameters& parameters) {
  kernel<<<blocks, threads, 0, stream>>>(parameters);
}

}  // namespace fastlora
#else
#include "emulation.h"
#endif

namespace fastlora {

constexpr int kThreads = 256;  // of every block: eight blocks of at most 32 registers a thread, or four of 64, fill an SM

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 16 bytes of elements, moved by one instruction.
template <class T> struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

__host__ __device__ inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// p must lie on 16 bytes.
template <class T> __device__ inline Pack<T> load_pack(const T* p) {
  Pack<T> pack;
#ifdef __CUDACC__
  *reinterpret_cast<uint4*>(&pack) = *reinterpret_cast<const uint4*>(p);
#else
  emulation::copy_pack(&pack, p);
#endif
  return pack;
}
template <class T> __device__ inline void store_pack(T* p, const Pack<T>& pack) {
#ifdef __CUDACC__
  *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(&pack);
#else
  emulation::copy_pack(p, &pack);
#endif
}

// True in the one block of `blocks` that gets here last; it then sees what all of them wrote before. `arrivals` is 0 at launch. Whichever
// block it is, it adds up the others' numbers in one order: sums repeat to the bit. `is_last` is shared memory.
__device__ inline bool last_of(int blocks, int* arrivals, bool* is_last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // what the barrier has gathered is seen by whoever sees the number
    *is_last = atomicAdd(arrivals, 1) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  return *is_last;
}

}  // namespace fastlora
