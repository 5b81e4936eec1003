// A token from each row of logits by inverse transform sampling, and its log-probability; formulas in fastlora/ops/sample_rows.py.
#include "cpu/variant.h"

namespace fastlora {
struct SampleRows {
  void (*sample[2])(const void* z, const double* uniforms, int64_t* tokens, float* logp, int64_t rows, int64_t v, float inverse_temperature);
};
}  // namespace fastlora

#ifdef VARIANT
#include <vector>

#include "cpu/simd.h"

namespace fastlora::VARIANT {

constexpr int64_t kBlock = 1024;  // tokens whose probabilities are summed before the sum is looked at

template <class T>
void sample(const void* z_, const double* uniforms, int64_t* tokens, float* logp, int64_t rows, int64_t v, float inverse_temperature) {
  std::vector<double> sums((v + kBlock - 1) / kBlock);
  for (int64_t i = 0; i < rows; ++i) {
    const T* z = (const T*)z_ + i * v;
    floatv top = broadcast(-INFINITY);
    for (int64_t j = 0; j < v; j += kLanes) top = maximum(top, load_upto(z + j, v - j, -INFINITY));
    const float highest = maximum(top);
    auto weight = [&](int64_t j) { return exp((load_upto(z + j, v - j, -INFINITY) - highest) * inverse_temperature); };
    double total = 0;
    for (int64_t block = 0; block * kBlock < v; ++block) {
      floatv part{};
      for (int64_t j = block * kBlock; j < v && j < (block + 1) * kBlock; j += kLanes) part += weight(j);
      total += sums[block] = sum(part);
    }
    // The first token at which the running sum exceeds u: first its block, then the token in it (or behind it, if rounding hid it).
    const double wanted = uniforms[i] * total;
    double below = 0;
    int64_t block = 0, chosen = -1;
    while (block + 1 < (int64_t)sums.size() && below + sums[block] <= wanted) below += sums[block++];
    for (int64_t j = block * kBlock; j < v && chosen < 0; j += kLanes) {
      const floatv w = weight(j);
      for (int64_t lane = 0; lane < kLanes && j + lane < v && chosen < 0; ++lane) {
        if ((below += w[lane]) > wanted) chosen = j + lane;
      }
    }
    // Rounding of the sums left nothing above u: the last token that is possible at all.
    for (int64_t j = v - 1; chosen < 0; --j)
      if (j == 0 || exp((load_first(z + j, 1) - highest) * inverse_temperature)[0] > 0) chosen = j;
    tokens[i] = chosen;
    logp[i] = (float)(((double)load_first(z + tokens[i], 1)[0] - highest) * inverse_temperature - std::log(total));
  }
}

DEFINE_KERNELS(SampleRows) = {{sample<float>, sample<bf16>}};

}  // namespace fastlora::VARIANT

#else
#include "cpu/binding.h"

namespace fastlora {
DECLARE_KERNELS(SampleRows)

std::tuple<Tensor, Tensor> sample_rows(Tensor z, Tensor uniforms, double temperature) {
  const Dtype type = check_rows("sample_rows", z);
  const int64_t rows = z.size(0), v = z.size(1);
  STD_TORCH_CHECK(uniforms.scalar_type() == ScalarType::Double && uniforms.is_contiguous() && uniforms.numel() == rows,
                  "sample_rows: needs one float64 uniform number a row");
  Tensor tokens = torch::stable::new_empty(z, {rows}, ScalarType::Long), logp = torch::stable::new_empty(z, {rows}, ScalarType::Float);
  const auto kernel = SampleRows_kernels().sample[type];
  const char* zs = bytes(z);
  const double* u = uniforms.const_data_ptr<double>();
  int64_t* ids = tokens.mutable_data_ptr<int64_t>();
  float* l = logp.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, rows, grain(v), [&](int64_t begin, int64_t end) {
    kernel(zs + begin * v * width(type), u + begin, ids + begin, l + begin, end - begin, v, (float)(1 / temperature));
  });
  return {tokens, logp};
}

}  // namespace fastlora

STABLE_TORCH_LIBRARY_FRAGMENT(fastlora_cpu, m) { m.def("sample_rows(Tensor z, Tensor uniforms, float temperature) -> (Tensor, Tensor)"); }
STABLE_TORCH_LIBRARY_IMPL(fastlora_cpu, CPU, m) { m.impl("sample_rows", TORCH_BOX(&fastlora::sample_rows)); }
#endif
