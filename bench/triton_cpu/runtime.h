// What a translated Triton kernel runs on: 16-bit floats, tensors as arrays, checked loads and stores, atomics, the loop over programs.
// Included by the C++ that bench/triton_cpu/emit.py writes; one copy of all state for each kernel's library.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

// bfloat16: arithmetic in float, rounded to nearest even at every assignment, as the GPU's conversion instruction does.
struct bf16 {
  uint16_t bits;
  bf16() = default;
  bf16(float value) {
    uint32_t u;
    std::memcpy(&u, &value, 4);
    bits = value != value ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  }
  operator float() const {
    const uint32_t u = (uint32_t)bits << 16;
    float value;
    std::memcpy(&value, &u, 4);
    return value;
  }
};
using f16 = _Float16;

template <class T, long N> struct Array {
  T v[N];
  T& operator[](long i) { return v[i]; }
  const T& operator[](long i) const { return v[i]; }
};

// The float that a tensor core sees of an operand with inputPrecision = tf32: 10 bits of mantissa, ties to even.
static inline float tf32(float value) {
  uint32_t u;
  std::memcpy(&u, &value, 4);
  u = (u + 0xfff + ((u >> 13) & 1)) & 0xffffe000u;
  std::memcpy(&value, &u, 4);
  return value;
}

// A bit pattern that no test expects: what a masked load without `other` gives.
template <class T> static inline T undefined() {
  T value;
  std::memset(&value, 0x7f, sizeof value);
  return value;
}

namespace launch_state {
// A tensor that the kernel was given. writer[i]: 1 + the program that stored to the i-th pair of bytes, 0 = none yet.
struct Buffer {
  const char *first, *end, *name;
  std::unique_ptr<std::atomic<int32_t>[]> writer;
};
static std::vector<Buffer> buffers;
static char message[512];
static std::atomic<int> failed;
static bool track_writers;

template <class... A> static void fail(const char* format, A... arguments) {
  if (!failed.exchange(1)) std::snprintf(message, sizeof message, format, arguments...);
}

static Buffer* find(const void* pointer, long bytes) {
  const char* p = (const char*)pointer;
  for (auto& buffer : buffers)
    if (p >= buffer.first && p + bytes <= buffer.end) return &buffer;
  return nullptr;
}
static Buffer* checked(const void* pointer, long bytes, const char* what, int program) {
  if (Buffer* buffer = find(pointer, bytes)) return buffer;
  const Buffer* nearest = nullptr;
  for (auto& buffer : buffers)
    if ((const char*)pointer >= buffer.first && (!nearest || buffer.first > nearest->first)) nearest = &buffer;
  fail("%s out of bounds in program %d: %+ld bytes from the end of %s", what, program, nearest ? (long)((const char*)pointer - nearest->end) : 0L,
       nearest ? nearest->name : "nothing that was passed");
  return nullptr;
}
static bool may_load(const void* pointer, long bytes, int program) {
  Buffer* buffer = checked(pointer, bytes, "load", program);
  if (buffer && track_writers) {
    const int other = buffer->writer[((const char*)pointer - buffer->first) / 2].load(std::memory_order_relaxed);
    if (other && other != program + 1) {
      fail("program %d loads from %s what program %d stores: their order is undefined", program, buffer->name, other - 1);
      return false;
    }
  }
  return buffer != nullptr;
}
static bool may_store(const void* pointer, long bytes, int program) {
  Buffer* buffer = checked(pointer, bytes, "store", program);
  if (buffer && track_writers) {
    const int other = buffer->writer[((const char*)pointer - buffer->first) / 2].exchange(program + 1, std::memory_order_relaxed);
    if (other && other != program + 1) {
      fail("programs %d and %d both store to byte %ld of %s", other - 1, program, (long)((const char*)pointer - buffer->first), buffer->name);
      return false;
    }
  }
  return buffer != nullptr;
}
}  // namespace launch_state

template <class T> static T atomic_add(T* address, T value) {
  T old = *address, sum;
  do sum = T(old + value);
  while (!__atomic_compare_exchange(address, &old, &sum, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

// Runs programs 0 to count - 1 in the given order (0: ascending; else shuffled with this seed) on so many threads.
template <class Program> static const char* run_programs(long count, int threads, unsigned order_seed, Program program) {
  std::vector<long> order(count);
  for (long i = 0; i < count; ++i) order[i] = i;
  if (order_seed) std::shuffle(order.begin(), order.end(), std::mt19937(order_seed));
  auto work = [&](int thread) {
    for (long i = thread; i < count && !launch_state::failed; i += threads) program(order[i]);
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (auto& other : others) other.join();
  return launch_state::failed ? launch_state::message : nullptr;
}

static void begin_launch(const char** first, const char** end, const char** names, int count, bool track) {
  launch_state::buffers.clear();
  launch_state::failed = 0;
  launch_state::track_writers = track;
  for (int i = 0; i < count; ++i) {
    launch_state::buffers.push_back({first[i], end[i], names[i], nullptr});
    if (track) launch_state::buffers.back().writer = std::make_unique<std::atomic<int32_t>[]>((end[i] - first[i]) / 2 + 1);
  }
}
