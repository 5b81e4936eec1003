// sparse_db.cuh on the CPU: for ctypes, and as a program for the sanitizers.
#include "cuda/sparse_db.cuh"

#include "elements.h"

using namespace fastlora;

// padded: the layout of H. capacity: floats that fit into partial. Returns the number of splits, or −1 and emulation_error().
extern "C" int sparse_db(int dtype, int modules, const void* const* dys, const int* columns, const int* ranks, const float* scales,
                         const void* h, int64_t h_stride, int padded, int64_t tokens, const void* index, int index_is_64, int k,
                         float* partial, int64_t capacity, int* arrivals, float* db, float* sums) {
  SparseDb p{};
  p.tokens = tokens, p.h = h, p.h_stride = h_stride, p.index = index, p.index_is_64 = index_is_64, p.k = k;
  p.partial = partial, p.arrivals = arrivals, p.db = db, p.sums = sums;
  for (int m = 0; m < modules; ++m) add_module(p, dys[m], columns[m], ranks[m], scales[m], padded, dtype == kFloat32 ? 4 : 8);
  plan(p);
  emulation::error.clear();
  if (p.splits * static_cast<int64_t>(k) > capacity) emulation::error = "the test's partial is too small";
  else with_element(dtype, [&](auto element) { launch_sparse_db<decltype(element)>(p, nullptr); });
  return emulation::error.empty() ? p.splits : -1;
}

// Two modules with every kind of edge: several tiles, splits and passes over a tile; entries everywhere, nowhere and one in seven.
int main() {
  const int columns[] = {136, 40, 24}, ranks[] = {70, 0, 3}, modules = 3;
  const float scales[] = {2.0f, 1.0f, 0.5f};
  const int64_t tokens = kSlow ? 260 : 520, h_stride = 80 + 16;
  for (int dtype : {kFloat32, kBFloat16}) {
    Elements h(dtype, tokens * h_stride), dy0(dtype, tokens * columns[0]), dy1(dtype, tokens * columns[1]), dy2(dtype, tokens * columns[2]);
    const void* dys[] = {dy0.data(), dy1.data(), dy2.data()};
    for (int step : {7, 1}) {
      if (kSlow && (step == 1 || dtype == kFloat32)) continue;
      std::vector<int32_t> index;
      for (int i = 0; i < 70 * 136 + 3 * 24; i += step) index.push_back(i);
      index.shrink_to_fit();  // so that AddressSanitizer knows its end
      const int k = index.size();
      std::vector<float> partial(4 * k), db(k, NAN), sums(4 * k, 0.0f);
      std::vector<int> arrivals(5, 0);
      const int splits = sparse_db(dtype, modules, dys, columns, ranks, scales, h.data(), h_stride, 1, tokens, index.data(), 0, k,
                                   partial.data(), partial.size(), arrivals.data(), db.data(), sums.data());
      if (splits != (kSlow ? 2 : 3)) return report("sparse_db: " + emulation::error);
      double wrong = 0;
      for (int i = 0; i < k; ++i) {
        const bool first = index[i] < 70 * 136;
        const int m = first ? 0 : 2, at = first ? index[i] : index[i] - 70 * 136;
        const int r = at / columns[m] + (first ? 0 : 80), n = at % columns[m];
        double truth = 0;
        for (int64_t t = 0; t < tokens; ++t) truth += (first ? dy0 : dy2)[t * columns[m] + n] * h[t * h_stride + r];
        wrong = std::max(wrong, std::fabs(scales[m] * truth - db[i]));
      }
      if (!(wrong < 1e-3)) return report("sparse_db: wrong by " + std::to_string(wrong));
    }
  }
  return 0;
}
