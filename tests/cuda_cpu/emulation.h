// CUDA on a CPU, for tests: the device code of csrc/cuda, compiled by g++ and run here with every CUDA thread on a stack of its own.
//
// What is kept of the real thing: blocks in any order and at the same time, __syncthreads, warps with shuffles, atomics, shared memory that
// starts as garbage, 16-byte accesses that must be aligned. A barrier that not all threads reach, and lanes that meet at different
// shuffles, are errors. Shared memory is a piece of the heap that ends where its variable ends: AddressSanitizer sees what is behind it.
//
// Under ThreadSanitizer every CUDA thread of every block is a thread to it, and nothing orders two of them but what orders them on a GPU: a
// barrier, or an atomic of each on one place with a fence before the first and behind the second. So a race is reported whatever the order
// in which the threads happened to run.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define SHARED_MEMORY(Type, name) Type& name = *emulation::shared<Type>()

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

enum class Operation : int { none, block_barrier, warp_barrier, shuffle_xor, shuffle_down };

// The thread that runs.
dim3 thread_index();
dim3 block_index();
// Waits until all threads of the block (block_barrier), or of the warp, are at the same operation.
void meet(Operation operation);
// meet(), after which what was written before it is seen by all who met.
void barrier(Operation operation);
void fence();
void before_atomic(void* place);
void after_atomic(void* place);
// The value of lane `source` of the warp.
uint64_t exchange(Operation operation, uint64_t value, int source);
int lane();
void* shared_memory_before(size_t bytes);  // ends at the end of the block's shared memory
void fail(const std::string& what);        // ends the launch

// Runs `body` as every thread of every block. Blocks run on `workers` CPU threads, in the order of `seed` (0: ascending), as do the threads
// between two barriers. Returns "" or what went wrong.
std::string run(const std::function<void()>& body, dim3 blocks, int threads);

struct Settings {
  int workers = 2;
  unsigned seed = 0;
};
inline Settings settings;
inline std::string error;  // of the last launch; "" = none

template <class T> T* shared() {
  static_assert(sizeof(T) <= 48 << 10, "static shared memory of a block is at most 48 KB");
  return static_cast<T*>(shared_memory_before(sizeof(T)));
}

inline void copy_pack(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) fail("a 16-byte access that is not aligned");
  typedef uint64_t __attribute__((may_alias)) Word;  // ThreadSanitizer does not see a memcpy that g++ has expanded
  for (int i = 0; i < 2; ++i) static_cast<Word*>(to)[i] = static_cast<const Word*>(from)[i];
}

template <class Update> void atomically(void* place, const Update& update) {
  before_atomic(place);
  update();
  after_atomic(place);
}

template <class T> T exchanged(Operation operation, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  if (mask != ~0u) fail("a shuffle of a part of a warp, which is not emulated");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(operation, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulation

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index())

inline void __syncthreads() { emulation::barrier(emulation::Operation::block_barrier); }
inline void __syncwarp() { emulation::barrier(emulation::Operation::warp_barrier); }
inline void __threadfence() { emulation::fence(); }

template <class T> T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulation::exchanged(emulation::Operation::shuffle_xor, mask, value, emulation::lane() ^ lanes);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, int lanes) {
  const int source = emulation::lane() + lanes;
  return emulation::exchanged(emulation::Operation::shuffle_down, mask, value, source < 32 ? source : emulation::lane());
}

inline int atomicAdd(int* p, int value) {
  int before;
  emulation::atomically(p, [&] { before = __atomic_fetch_add(p, value, __ATOMIC_RELAXED); });
  return before;
}

namespace fastlora {

using std::max;
using std::min;
using Stream = void*;

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  _Float16 value;
};

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float to_float(float16 x) { return static_cast<float>(x.value); }

template <class T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bfloat16 from_float<bfloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::isnan(x)) return {0x7FC0};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <> inline float16 from_float<float16>(float x) { return {static_cast<_Float16>(x)}; }

template <class Parameters> void launch(void (*kernel)(Parameters), dim3 blocks, int threads, Stream, const Parameters& parameters) {
  emulation::error = emulation::run([=] { kernel(parameters); }, blocks, threads);
}

}  // namespace fastlora
