// The packed adapter in a sampler's layout, s_m folded into B, in one launch; formulas: fastlora/ops/export_adapter.py.
//
//     out_a[m] [r', d_m] = A_m, then zeros            out_b[m] [n_m, r'] = (s_m B_mᵀ)ᵀ, then zeros
//
// Tiling: a block moves one tile of kTileRanks ranks × kTileColumns columns of a table (kernels/fastlora_triton/export_layout.py). It
// reads rows of 512 bytes, 16 bytes a thread. A's tile is written as it comes. B's goes through shared memory: a thread reads 8 ranks of
// one column there and writes them as 16 bytes (32 in float32), four threads a column: with r' = 32 a warp writes 512 bytes in one piece.
// No bank conflicts: 16 bytes number v of row r lie at v ^ 2 (r / 8): the 8 columns × 4 ranks that a warp reads at once lie in 32 banks.
// Where offsets, widths or r' are no multiples of the pack, elements move one by one.
//
// Bytes: 4 Σ r_m (d_m + n_m) read, Σ r' (d_m + n_m) elements written, each once; 64 of the table a tile of 16 KB. FLOPs: a product for
// each entry of B. Qwen2.5-1.5B at r 32, bfloat16: 221 MB, 66 µs at 3.35 TB/s.
//
// Not run on a GPU: compiled for sm_80, sm_90a and sm_100 and run on a CPU (tests/cuda_cpu).
#pragma once
#include "cuda/device.cuh"

namespace fastlora {

constexpr int kTileRanks = 32, kTileColumns = 128, kEight = 8;

// A row of the table.
struct ExportTile {
  int64_t side;  // 0: A, 1: B
  int64_t source, target;  // first element of the matrix in the buffer and in its output
  int64_t rank, columns, out_rank;
  int64_t first_rank, first_column;
};

struct ExportAdapter {
  const float* flat;
  const ExportTile* tiles;
  const float* scales;  // [tiles]
  int count;
  void *out_a, *out_b;
};

struct ExportShared {
  float at[kTileRanks][kTileColumns];
};

__device__ inline int swizzled(int row, int column) { return ((column / 4) ^ (2 * (row / 8))) * 4 + column % 4; }

// Eight numbers from `from`, of which `there` are there and the others 0.
__device__ inline void load_eight(float* values, const float* from, int there, bool wide) {
  if (wide && there == kEight) {
    const Pack<float> low = load_pack(from), high = load_pack(from + 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) values[j] = low.at[j], values[4 + j] = high.at[j];
  } else {
#pragma unroll
    for (int j = 0; j < kEight; ++j) values[j] = j < there ? from[j] : 0.0f;
  }
}

template <class T> __device__ inline void store_eight(T* to, const float* values, int there, bool wide) {
  if (wide && there == kEight) {
    constexpr int kPack = Pack<T>::kSize;
#pragma unroll
    for (int i = 0; i < kEight; i += kPack) {
      Pack<T> pack;
#pragma unroll
      for (int j = 0; j < kPack; ++j) pack.at[j] = from_float<T>(values[i + j]);
      store_pack(to + i, pack);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kEight; ++j)
      if (j < there) to[j] = from_float<T>(values[j]);
  }
}

// Rows of the matrix as they lie in the buffer.
template <class T> __device__ inline void copy_a(const ExportAdapter& p, const ExportTile& tile, int rows, int columns) {
  T* out = static_cast<T*>(p.out_a) + tile.target;
  const float* from = p.flat + tile.source;
  const bool wide = tile.columns % kEight == 0 && aligned(from) && aligned(out);
  constexpr int kOfARow = kTileColumns / kEight;
  for (int i = threadIdx.x; i < rows * kOfARow; i += kThreads) {
    const int c = i % kOfARow * kEight, there = min(columns - c, kEight);
    if (there <= 0) continue;
    const int64_t row = tile.first_rank + i / kOfARow, at = row * tile.columns + tile.first_column + c;
    float values[kEight];
    load_eight(values, from + at, row < tile.rank ? there : 0, wide);
    store_eight(out + at, values, there, wide);
  }
}

// Four columns a thread, scaled, into shared memory; ranks that there are not become 0.
__device__ inline void load_b(const ExportAdapter& p, const ExportTile& tile, float scale, int rows, int columns, ExportShared& shared) {
  const float* from = p.flat + tile.source;
  const bool wide = tile.columns % 4 == 0 && aligned(from);
  constexpr int kOfARow = kTileColumns / 4;
  for (int i = threadIdx.x; i < rows * kOfARow; i += kThreads) {
    const int row = i / kOfARow, c = i % kOfARow * 4;
    const int there = tile.first_rank + row < tile.rank ? min(columns - c, 4) : 0;
    const float* four = from + (tile.first_rank + row) * tile.columns + tile.first_column + c;
    Pack<float> values{};
    if (wide && there == 4) values = load_pack(four);
    else
      for (int j = 0; j < there; ++j) values.at[j] = four[j];
#pragma unroll
    for (int j = 0; j < 4; ++j) values.at[j] *= scale;
    store_pack(&shared.at[row][swizzled(row, c)], values);
  }
}

template <class T>
__device__ inline void store_b(const ExportAdapter& p, const ExportTile& tile, int rows, int columns, const ExportShared& shared) {
  T* out = static_cast<T*>(p.out_b) + tile.target;
  const bool wide = tile.out_rank % kEight == 0 && aligned(out);
  constexpr int kOfAColumn = kTileRanks / kEight;
  for (int i = threadIdx.x; i < columns * kOfAColumn; i += kThreads) {
    const int c = i / kOfAColumn, r = i % kOfAColumn * kEight, there = min(rows - r, kEight);
    if (there <= 0) continue;
    float values[kEight];
#pragma unroll
    for (int j = 0; j < kEight; ++j) values[j] = j < there ? shared.at[r + j][swizzled(r, c)] : 0.0f;
    store_eight(out + (tile.first_column + c) * tile.out_rank + tile.first_rank + r, values, there, wide);
  }
}

template <class T> __global__ void __launch_bounds__(kThreads) export_adapter_kernel(const __grid_constant__ ExportAdapter p) {
  SHARED_MEMORY(ExportShared, shared);
  const ExportTile tile = p.tiles[blockIdx.x];
  const int rows = min(tile.out_rank - tile.first_rank, static_cast<int64_t>(kTileRanks));
  const int columns = min(tile.columns - tile.first_column, static_cast<int64_t>(kTileColumns));
  if (tile.side == 0) return copy_a<T>(p, tile, rows, columns);
  load_b(p, tile, p.scales[blockIdx.x], rows, columns, shared);
  __syncthreads();  // the tile is there
  store_b<T>(p, tile, rows, columns, shared);
}

template <class T> void launch_export_adapter(const ExportAdapter& p, Stream stream) {
  if (p.count) launch(export_adapter_kernel<T>, dim3(p.count), kThreads, stream, p);
}

}  // namespace fastlora
