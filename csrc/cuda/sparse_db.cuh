// The gradient of k chosen entries of a group's B, and the accumulators of study S3, in one launch; formula: fastlora/ops/sparse_db.py.
//
//     db_k[i] = s_m Σ_t dY_m[t, n_i] H_m[t, r_i]          dY_m [t, n_m], H [t, ·], entries sorted by (module, r, n)
//
// Tiling. A block has kColumns columns of one dY_m and kRanks ranks of that module, for a range of tokens; its entries are at most kRanks
// runs of the index, one a rank, found by binary search. It walks its tokens kTokens at a time: the tile of dY and that of H go to shared
// memory in float32, transposed, and every entry takes a dot product of two rows of kTokens there, 16 bytes of each at a time. So dY is
// read from memory once for a rank chunk, in rows of 128 bytes, whatever the number of entries (up to kEntries in a tile; more read it
// again: 8 a column, a density that the dense product of lora_linear serves better). A tile without entries reads nothing at all.
//
// Transposing costs no bank conflicts: column c is row 17 (c % 8) + c / 8 of the tile, and rows are 4 floats longer than their tokens.
// Eight lanes that store one token of eight packs, and eight that read 16 bytes of eight neighbouring columns, hit different banks. (An
// exclusive or of the address does the same, but keeps 64 addresses in registers: 152 bytes of spills.)
//
// Tokens are split, in multiples of kTokens, until there are kBlocks blocks, but not into more than ⌈t / kTokensOfASplit⌉. The last block
// of a tile adds the splits up in their order, so that the bits repeat. A sum is made of sums of kTokens products: error √(t/32), not √t.
//
// Bytes: t Σ_m (n_m ⌈r_m / kRanks⌉ + r_m ⌈n_m / kColumns⌉) elements at most, of which H (t Σ r_m) stays in L2; k indices, 2 · 4 k · splits
// for the partial sums, 4 k written, 32 k for the accumulators. FLOPs: 2 t k. Qwen2.5-1.5B's down_proj (n 1536, r 32), t 8192, bf16: 25 MB
// of dY, 7.5 µs at 3.35 TB/s; by count, shared memory (128 bytes a clock) keeps up with that to some 3.5 entries a column.
//
// Not run on a GPU: compiled for sm_80, sm_90a and sm_100 and run on a CPU (tests/cuda_cpu).
#pragma once
#include "cuda/device.cuh"

namespace fastlora {

constexpr int kColumns = 128, kRanks = 64, kTokens = 32;  // 30 KB of tiles; in bf16 four blocks on an SM have 32 KB of dY in flight
constexpr int kOfAThread = 4, kEntries = kThreads * kOfAThread;
constexpr int kBlocksOfAnSm = 4, kBlocks = kBlocksOfAnSm * 132, kTokensOfASplit = 8 * kTokens;  // constants: no GPU's size changes the bits
constexpr int kMaxModules = 8;

// One module of the group. A module without ranks has no tiles.
struct SparseDbModule {
  const void* dy;      // [t, n]
  int64_t first;       // of B_mᵀ [r, n] in b_flat
  int columns, ranks;  // n_m, r_m
  int h_column;        // of its first rank in H
  float scale;
  bool wide_dy, wide_h;  // packs of 16 bytes may be loaded; of H beyond the last rank too
  int first_tile;
};

struct SparseDb {
  SparseDbModule modules[kMaxModules];
  int module_count;
  int64_t tokens, h_stride;
  const void* h;
  const void* index;  // [k], ascending positions in b_flat
  bool index_is_64;
  int k;
  int tiles, splits;
  int64_t tokens_of_a_split;
  float* partial;  // [splits, k] where there are several
  int* arrivals;   // [tiles], 0
  float* db;       // [k]
  float* sums;     // [4, k] Σg, Σ sign g, Σ|g|, Σg²; or null
};

// Appends a module. H's columns are a module's ranks after the other's, rounded up to 16 where `padded`; `pack`: elements of 16 bytes.
inline void add_module(SparseDb& p, const void* dy, int columns, int ranks, float scale, bool padded, int pack) {
  SparseDbModule m{dy, 0, columns, ranks, 0, scale, false, false, 0};
  if (p.module_count) {
    const SparseDbModule& before = p.modules[p.module_count - 1];
    m.first = before.first + static_cast<int64_t>(before.ranks) * before.columns;
    m.h_column = before.h_column + (padded ? (before.ranks + 15) / 16 * 16 : before.ranks);
  }
  m.wide_dy = aligned(dy) && columns % pack == 0;
  m.wide_h = aligned(p.h) && p.h_stride % pack == 0 && m.h_column % pack == 0 && (padded || ranks % pack == 0);
  p.modules[p.module_count++] = m;
}

// Fills in tiles and splits.
inline void plan(SparseDb& p) {
  p.tiles = 0;
  for (int m = 0; m < p.module_count; ++m) {
    p.modules[m].first_tile = p.tiles;
    p.tiles += ceil_div(p.modules[m].columns, kColumns) * ceil_div(p.modules[m].ranks, kRanks);
  }
  const int64_t wanted = ceil_div(kBlocks, p.tiles ? p.tiles : 1), most = ceil_div(p.tokens, kTokensOfASplit);
  const int64_t splits = wanted < most ? wanted : most;
  p.tokens_of_a_split = splits ? ceil_div(ceil_div(p.tokens, splits), kTokens) * kTokens : kTokens;
  p.splits = p.tokens ? ceil_div(p.tokens, p.tokens_of_a_split) : 1;
}

// Tokens of kRows columns, transposed.
template <int kRows> struct Tile {
  static constexpr int kStride = kTokens + 4, kTurn = kRows / 8 + 1;  // odd
  float at[8 * kTurn * kStride];
  __device__ static int row(int column) { return (kTurn * (column % 8) + column / 8) * kStride; }
};

struct SparseDbShared {
  Tile<kColumns> dy;
  Tile<kRanks> h;
  int begin[kRanks], end[kRanks];  // run of the index of each rank
  int before[kRanks + 1];          // entries of the ranks before
  bool is_last;
};

__device__ inline int64_t position(const SparseDb& p, int i) {
  return p.index_is_64 ? static_cast<const int64_t*>(p.index)[i] : static_cast<const int32_t*>(p.index)[i];
}

// First entry at or behind `wanted`.
__device__ inline int lower_bound(const SparseDb& p, int64_t wanted) {
  int low = 0, high = p.k;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (position(p, middle) < wanted) low = middle + 1;
    else high = middle;
  }
  return low;
}

// rows [tokens, columns] of x into the tile, transposed and in float32; tokens that are missing become 0.
template <int kRows, class T>
__device__ inline void load_tile(Tile<kRows>& tile, const T* x, int64_t stride, int tokens, int columns, bool wide) {
  constexpr int kPack = Pack<T>::kSize;
  if (!wide) {
    for (int i = threadIdx.x; i < columns * kTokens; i += kThreads) {
      const int c = i % columns, t = i / columns;
      tile.at[tile.row(c) + t] = t < tokens ? to_float(x[t * stride + c]) : 0.0f;
    }
    return;
  }
  const int lane = threadIdx.x % 32, strips = (columns + 8 * kPack - 1) / (8 * kPack);  // a warp: 8 packs of each of 4 tokens
  for (int w = threadIdx.x / 32; w < strips * (kTokens / 4); w += kThreads / 32) {
    const int c = (w % strips * 8 + lane % 8) * kPack, t = w / strips * 4 + lane / 8;
    if (c >= columns) continue;
    Pack<T> pack{};
    if (t < tokens) pack = load_pack(x + t * stride + c);
#pragma unroll
    for (int j = 0; j < kPack; ++j) tile.at[tile.row(c + j) + t] = to_float(pack.at[j]);
  }
}

struct Entry {
  int i, dy, h;  // in the index, its rows in the tiles; i = -1: none
};

__device__ inline Entry entry_of(const SparseDb& p, const SparseDbShared& shared, int number, int ranks, int64_t first, int columns_of_b) {
  if (number >= shared.before[ranks]) return {-1, 0, 0};
  int low = 0, high = ranks - 1;  // the last rank that has no more than `number` entries before it
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (shared.before[middle] <= number) low = middle;
    else high = middle - 1;
  }
  const int i = shared.begin[low] + number - shared.before[low];
  const int column = position(p, i) - first - static_cast<int64_t>(low) * columns_of_b;
  return {i, Tile<kColumns>::row(column), Tile<kRanks>::row(low)};
}

__device__ inline float dot(const float* dy, const float* h) {
  float sum = 0.0f;
#pragma unroll
  for (int q = 0; q < kTokens / 4; ++q) {
    const Pack<float> a = load_pack(dy + 4 * q), b = load_pack(h + 4 * q);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += a.at[j] * b.at[j];
  }
  return sum;
}

__device__ inline void finish(const SparseDb& p, int i, float g) {
  p.db[i] = g;
  if (!p.sums) return;
  const int64_t k = p.k;
  p.sums[i] += g;
  p.sums[k + i] += static_cast<float>(g > 0.0f) - static_cast<float>(g < 0.0f);
  p.sums[2 * k + i] += fabsf(g);
  p.sums[3 * k + i] += g * g;
}

template <class T> __global__ void __launch_bounds__(kThreads, kBlocksOfAnSm) sparse_db_kernel(const __grid_constant__ SparseDb p) {
  SHARED_MEMORY(SparseDbShared, shared);
  const int thread = threadIdx.x, block = blockIdx.x;
  int m = p.module_count - 1;
  while (p.modules[m].first_tile > block) --m;
  const SparseDbModule& module = p.modules[m];
  const int rank_chunks = (module.ranks + kRanks - 1) / kRanks, tile = block - module.first_tile;
  const int column0 = tile / rank_chunks * kColumns, rank0 = tile % rank_chunks * kRanks;  // chunks of a strip run together: dY meets in L2
  const int columns = min(module.columns - column0, kColumns), ranks = min(module.ranks - rank0, kRanks);
  const int64_t first = module.first + static_cast<int64_t>(rank0) * module.columns + column0;

  if (thread < 2 * ranks) {
    const int rank = thread / 2, at_end = thread % 2;
    const int found = lower_bound(p, first + static_cast<int64_t>(rank) * module.columns + at_end * columns);
    (at_end ? shared.end : shared.begin)[rank] = found;
  }
  __syncthreads();
  if (thread <= ranks) {
    int before = 0;
    for (int rank = 0; rank < thread; ++rank) before += shared.end[rank] - shared.begin[rank];
    shared.before[thread] = before;
  }
  __syncthreads();

  const int total = shared.before[ranks];
  if (total == 0) return;
  const T* dy = static_cast<const T*>(module.dy) + column0;
  const T* h = static_cast<const T*>(p.h) + module.h_column + rank0;
  const int64_t t_begin = blockIdx.y * p.tokens_of_a_split, t_end = min(t_begin + p.tokens_of_a_split, p.tokens);
  for (int number0 = 0; number0 < total; number0 += kEntries) {
    Entry entries[kOfAThread];
    float sums[kOfAThread] = {};
#pragma unroll
    for (int j = 0; j < kOfAThread; ++j)
      entries[j] = entry_of(p, shared, number0 + j * kThreads + thread, ranks, first, module.columns);
    for (int64_t t = t_begin; t < t_end; t += kTokens) {
      const int tokens = min(t_end - t, static_cast<int64_t>(kTokens));
      load_tile(shared.dy, dy + t * module.columns, module.columns, tokens, columns, module.wide_dy);
      load_tile(shared.h, h + t * p.h_stride, p.h_stride, tokens, ranks, module.wide_h);
      __syncthreads();  // tiles are there
#pragma unroll
      for (int j = 0; j < kOfAThread; ++j)
        if (entries[j].i >= 0) sums[j] += dot(shared.dy.at + entries[j].dy, shared.h.at + entries[j].h);
      __syncthreads();  // tiles were read
    }
#pragma unroll
    for (int j = 0; j < kOfAThread; ++j) {
      const int i = entries[j].i;
      if (i < 0) continue;
      if (p.splits == 1) finish(p, i, module.scale * sums[j]);
      else p.partial[blockIdx.y * static_cast<int64_t>(p.k) + i] = sums[j];
    }
  }
  if (p.splits == 1 || !last_of(p.splits, p.arrivals + block, &shared.is_last)) return;
  for (int number = thread; number < total; number += kThreads) {
    const int i = entry_of(p, shared, number, ranks, first, module.columns).i;
    float sum = 0.0f;
    for (int split = 0; split < p.splits; ++split) sum += p.partial[split * static_cast<int64_t>(p.k) + i];
    finish(p, i, module.scale * sum);
  }
}

// p as `plan` left it.
template <class T> void launch_sparse_db(const SparseDb& p, Stream stream) {
  if (p.tiles && p.k) launch(sparse_db_kernel<T>, dim3(p.tiles, p.splits), kThreads, stream, p);
}

}  // namespace fastlora
