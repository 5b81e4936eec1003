// export_adapter.cuh on the CPU: for ctypes, and as a program for the sanitizers.
#include "cuda/export_adapter.cuh"

#include "elements.h"

using namespace fastlora;

// tiles: int64 [count, 8], see kernels/fastlora_triton/export_layout.py.
extern "C" int export_adapter(int dtype, const float* flat, const int64_t* tiles, const float* scales, int count, void* out_a,
                              void* out_b) {
  emulation::error.clear();
  const ExportAdapter p{flat, reinterpret_cast<const ExportTile*>(tiles), scales, count, out_a, out_b};
  with_element(dtype, [&](auto element) { launch_export_adapter<decltype(element)>(p, nullptr); });
  return emulation::error.empty() ? 0 : -1;
}

// One module of rank 33 in 40, widths that are multiples of eight and that are not; one tile after another as the table would have them.
int main() {
  constexpr int64_t kRank = 33, kOutRank = 40;
  for (const int64_t width : {136, 131}) {
    if (kSlow && width == 136) continue;
    Elements flat(kFloat32, 2 * kRank * width);
    std::vector<int64_t> tiles;
    std::vector<float> scales;
    for (int64_t side = 0; side < 2; ++side)
      for (int64_t r = 0; r < kOutRank; r += kTileRanks)
        for (int64_t c = 0; c < width; c += kTileColumns) {
          for (const int64_t x : {side, side * kRank * width, int64_t{0}, kRank, width, kOutRank, r, c}) tiles.push_back(x);
          scales.push_back(side ? 0.5f : 1.0f);
        }
    std::vector<float> out_a(kOutRank * width, NAN), out_b(kOutRank * width, NAN);
    const float* x = static_cast<const float*>(flat.data());
    if (export_adapter(kFloat32, x, tiles.data(), scales.data(), scales.size(), out_a.data(), out_b.data()))
      return report("export_adapter: " + emulation::error);
    for (int64_t r = 0; r < kOutRank; ++r)
      for (int64_t c = 0; c < width; ++c) {
        const bool there = r < kRank;
        if (out_a[r * width + c] != (there ? flat[r * width + c] : 0)) return report("export_adapter: A is wrong");
        if (out_b[c * kOutRank + r] != (there ? 0.5 * flat[(kRank + r) * width + c] : 0)) return report("export_adapter: B is wrong");
      }
  }
  return 0;
}
