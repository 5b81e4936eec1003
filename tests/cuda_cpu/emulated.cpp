// Small kernels, right and wrong ones, that show what the emulation does and sees (test_emulation.py). The program runs one of them.
#include <map>

#include "cuda/device.cuh"
#include "elements.h"

using namespace fastlora;

struct Out {
  float* at;
  int* counter;
};

constexpr int kBlocks = 3;  // of the kernels that count blocks

struct Row {
  float at[kThreads];
};

__global__ void reverse_kernel(Out out) {
  SHARED_MEMORY(Row, row);
  const int thread = threadIdx.x;
  row.at[thread] = thread;
  __syncthreads();
  out.at[thread] = row.at[kThreads - 1 - thread];
}

__global__ void no_barrier_kernel(Out out) {
  SHARED_MEMORY(Row, row);
  const int thread = threadIdx.x;
  row.at[thread] = thread;
  out.at[thread] = row.at[kThreads - 1 - thread];
}

// The race lies between two barriers: what comes after the second must not hide it.
__global__ void race_between_barriers_kernel(Out out) {
  SHARED_MEMORY(Row, row);
  const int thread = threadIdx.x;
  __syncthreads();
  row.at[thread] = thread;
  out.at[thread] = row.at[kThreads - 1 - thread];
  __syncthreads();
  __syncthreads();
}

__global__ void warp_sum_kernel(Out out) {
  float x = threadIdx.x, y = x;
  for (int lanes = 16; lanes; lanes /= 2) x += __shfl_down_sync(~0u, x, lanes), y += __shfl_xor_sync(~0u, y, lanes);
  out.at[threadIdx.x] = threadIdx.x % 32 ? y : x;
}

__global__ void lanes_write_kernel(Out out) {  // a shuffle orders nothing
  SHARED_MEMORY(Row, row);
  const int thread = threadIdx.x;
  row.at[thread] = thread;
  __shfl_xor_sync(~0u, 0, 1);
  out.at[thread] = row.at[thread ^ 1];
}

__global__ void lanes_meet_kernel(Out out) {
  SHARED_MEMORY(Row, row);
  const int thread = threadIdx.x;
  row.at[thread] = thread;
  __syncwarp();
  out.at[thread] = row.at[thread ^ 1];
}

__global__ void atomic_kernel(Out out) { atomicAdd(out.counter, 1); }
__global__ void lost_update_kernel(Out out) { ++*out.counter; }
__global__ void divergent_kernel(Out) {
  if (threadIdx.x < 16) __syncthreads();
}
__global__ void early_exit_kernel(Out) {
  if (threadIdx.x == 3) return;
  __syncthreads();
}
__global__ void half_a_warp_kernel(Out) {
  if (threadIdx.x % 32 < 16) __shfl_xor_sync(0xFFFFu, 1, 1);
}
__global__ void misaligned_kernel(Out out) { load_pack(out.at + 1); }
__global__ void garbage_kernel(Out out) {
  SHARED_MEMORY(Row, row);
  out.at[threadIdx.x] = row.at[threadIdx.x];
}
__global__ void behind_shared_kernel(Out out) {
  SHARED_MEMORY(Row, row);
  const float* p = row.at;
  out.at[threadIdx.x] = p[threadIdx.x + 1];
}

// All blocks write, the last one reads what the others wrote.
__global__ void last_block_kernel(Out out) {
  SHARED_MEMORY(bool, is_last);
  const int block = blockIdx.x;
  if (threadIdx.x == 0) out.at[block] = block;
  if (!last_of(kBlocks, out.counter, &is_last) || threadIdx.x) return;
  for (int i = 1; i < kBlocks; ++i) out.at[0] += out.at[i];
}
__global__ void unfenced_kernel(Out out) {
  const int block = blockIdx.x;
  if (threadIdx.x) return;
  out.at[block] = block;
  if (atomicAdd(out.counter, 1) == kBlocks - 1)
    for (int i = 1; i < kBlocks; ++i) out.at[0] += out.at[i];
}

static const std::map<std::string, void (*)(Out)> kKernels{
    {"reverse", reverse_kernel},           {"no_barrier", no_barrier_kernel},       {"race_between_barriers", race_between_barriers_kernel},
    {"warp_sum", warp_sum_kernel},         {"lanes_write", lanes_write_kernel},     {"lanes_meet", lanes_meet_kernel},
    {"atomic", atomic_kernel},             {"lost_update", lost_update_kernel},     {"divergent", divergent_kernel},
    {"early_exit", early_exit_kernel},     {"half_a_warp", half_a_warp_kernel},     {"misaligned", misaligned_kernel},
    {"garbage", garbage_kernel},           {"behind_shared", behind_shared_kernel}, {"last_block", last_block_kernel},
    {"unfenced", unfenced_kernel},
};

extern "C" int run(const char* name, int blocks, int threads, float* out, int* counter) {
  launch(kKernels.at(name), dim3(blocks), threads, nullptr, Out{out, counter});
  return emulation::error.empty() ? 0 : -1;
}

// Name and number of blocks.
int main(int, char** arguments) {
  std::vector<float> out(kThreads);
  int counter = 0;
  return run(arguments[1], std::stoi(arguments[2]), kThreads, out.data(), &counter);
}
