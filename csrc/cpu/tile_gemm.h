// Small matrix products on packed tiles, for attention: C_mn (+)= L_mk R_kn with float accumulation.
//
// L is row-major. R is packed in panels of kLanes columns; a panel holds, for every step of k, its columns' entries side by side. With
// AVX512-BF16 a step is a pair of k (one vdpbf16ps); everywhere else the operands are floats and a step is one k. Kernels see
// the difference as `Tile<T>::Element`, `kPack` (k per step) and the two pack functions. Included inside the variant's namespace.
#pragma once
#include "cpu/simd.h"

namespace fastlora::VARIANT {

#if defined(__AVX512F__)
constexpr int kRows = 6, kPanels = 4;  // 24 accumulators of 32 registers
#else
constexpr int kRows = 4, kPanels = 3;  // 12 of 16
#endif

// float tiles, for float tensors everywhere and for bf16 tensors where there is no bf16 dot product
struct FloatTile {
  using Element = float;
  static constexpr int64_t kPack = 1;
  INLINE floatv multiply_add(floatv c, const float* l, const float* r) { return c + broadcast(*l) * load(r); }
  INLINE void put(float* p, floatv v) { store(p, v); }
  // One step of a panel: row k of the columns.
  INLINE void put_step(float* p, const floatv* rows) { store(p, rows[0]); }
};

#if defined(__AVX512BF16__)
struct Bf16Tile {
  using Element = bf16;
  static constexpr int64_t kPack = 2;
  INLINE floatv multiply_add(floatv c, const bf16* l, const bf16* r) {
    int32_t pair;
    std::memcpy(&pair, l, 4);
    return (floatv)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(r));
  }
  INLINE void put(bf16* p, floatv v) { store(p, v); }
  // Two rows of k, interleaved column by column.
  INLINE void put_step(bf16* p, const floatv* rows) {
    const uintv even = __builtin_convertvector(round_bf16(rows[0]), uintv), odd = __builtin_convertvector(round_bf16(rows[1]), uintv);
    const uintv pairs = even | (odd << 16);
    std::memcpy(p, &pairs, sizeof pairs);
  }
};
template <class T> struct TileOf { using type = FloatTile; };
template <> struct TileOf<bf16> { using type = Bf16Tile; };
#else
template <class T> struct TileOf { using type = FloatTile; };
#endif

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// One block of registers: `rows` rows by `panels` panels, k steps from 0 to k / kPack. What C holds is added last: a sum over many
// calls is then a sum of their sums, and its rounding error grows with sqrt(k + calls), not with sqrt(k * calls).
template <class Tile, int rows, int panels>
INLINE void tile_block(int64_t k, const typename Tile::Element* l, int64_t ldl, const typename Tile::Element* r, int64_t panel_stride,
                       float* c, int64_t ldc, bool accumulate) {
  floatv sums[rows][panels];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < panels; ++j) sums[i][j] = floatv{};
  for (int64_t step = 0; step < k; step += Tile::kPack) {
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < panels; ++j)
        sums[i][j] = Tile::multiply_add(sums[i][j], l + i * ldl + step, r + j * panel_stride + step * kLanes);
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < panels; ++j) {
      float* to = c + i * ldc + j * kLanes;
      store(to, accumulate ? load(to) + sums[i][j] : sums[i][j]);
    }
}

template <class Tile, int rows>
INLINE void tile_rows(int64_t panels, int64_t k, const typename Tile::Element* l, int64_t ldl, const typename Tile::Element* r,
                      int64_t panel_stride, float* c, int64_t ldc, bool accumulate) {
  int64_t j = 0;
  for (; j + kPanels <= panels; j += kPanels)
    tile_block<Tile, rows, kPanels>(k, l, ldl, r + j * panel_stride, panel_stride, c + j * kLanes, ldc, accumulate);
  for (; j < panels; ++j) tile_block<Tile, rows, 1>(k, l, ldl, r + j * panel_stride, panel_stride, c + j * kLanes, ldc, accumulate);
}

// C [m, kLanes panels] (+)= L [m, k] R. k is padded to whole steps by the packing; panel_stride: elements from one panel to the next.
template <class Tile>
void tile_gemm(int64_t m, int64_t panels, int64_t k, const typename Tile::Element* l, int64_t ldl, const typename Tile::Element* r,
               int64_t panel_stride, float* c, int64_t ldc, bool accumulate) {
  int64_t i = 0;
  for (; i + kRows <= m; i += kRows)
    tile_rows<Tile, kRows>(panels, k, l + i * ldl, ldl, r, panel_stride, c + i * ldc, ldc, accumulate);
  for (; i < m; ++i) tile_rows<Tile, 1>(panels, k, l + i * ldl, ldl, r, panel_stride, c + i * ldc, ldc, accumulate);
}

// Panels of R = X [k, n] (rows of stride ldx, floats): columns of X side by side. n is a multiple of kLanes; k is padded with zeros.
template <class Tile>
void pack_rows(int64_t k, int64_t n, const float* x, int64_t ldx, typename Tile::Element* r, int64_t panel_stride) {
  for (int64_t step = 0; step < k; step += Tile::kPack)
    for (int64_t j = 0; j < n; j += kLanes) {
      floatv rows[2] = {};
      for (int64_t p = 0; p < Tile::kPack && step + p < k; ++p) rows[p] = load(x + (step + p) * ldx + j);
      Tile::put_step(r + j / kLanes * panel_stride + step * kLanes, rows);
    }
}

// out [cols, rows] = X [rows, cols]ᵀ, floats.
INLINE void transpose(int64_t rows, int64_t cols, const float* x, int64_t ldx, float* out, int64_t ldo) {
  for (int64_t i = 0; i < rows; i += 8)
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t p = i; p < rows && p < i + 8; ++p) out[j * ldo + p] = x[p * ldx + j];
}

}  // namespace fastlora::VARIANT
