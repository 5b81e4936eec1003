// Log-probability of the target, entropy and log-sum-exp of rows of logits, and the gradient of the logits in their place; formulas in
// fastlora/ops/logprob_rows.py. One row at a time: 49,152 bf16 logits are 96 KB, so that the second and third look at a row hit the L2 cache.
#include "cpu/variant.h"

namespace fastlora {
struct LogprobRows {
  void (*forward[2])(const void* z, const int64_t* targets, float* logp, float* entropy, float* log_z, int64_t rows, int64_t v, float inverse_temperature);
  void (*backward[2])(void* z, const int64_t* targets, const float* dlogp, const float* dentropy, const float* log_z, const float* entropy,
                      int64_t rows, int64_t v, float inverse_temperature);
};
}  // namespace fastlora

#ifdef VARIANT
#include "cpu/simd.h"

namespace fastlora::VARIANT {

template <class T>
void forward(const void* z_, const int64_t* targets, float* logp, float* entropy, float* log_z, int64_t rows, int64_t v, float inverse_temperature) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* z = (const T*)z_ + i * v;
    floatv top = broadcast(-INFINITY);
    for (int64_t j = 0; j < v; j += kLanes) top = maximum(top, load_upto(z + j, v - j, -INFINITY));
    const float highest = maximum(top);
    // 256 additions a lane at a time: one float running through a row of 262,144 entries would lose digits.
    double total = 0, weighted = 0;
    for (int64_t first = 0; first < v; first += 256 * kLanes) {
      const int64_t last = first + 256 * kLanes < v ? first + 256 * kLanes : v;
      floatv exps{}, products{};
      for (int64_t j = first; j < last; j += kLanes) {
        const floatv below = (load_upto(z + j, v - j, -INFINITY) - highest) * inverse_temperature, e = exp(below);
        exps += e;
        products += e > 0.0f ? e * below : floatv{};
      }
      total += sum(exps), weighted += sum(products);
    }
    const double log_total = std::log(total), target = ((double)load_first(z + targets[i], 1)[0] - highest) * inverse_temperature;
    logp[i] = (float)(target - log_total);
    log_z[i] = (float)(highest * (double)inverse_temperature + log_total);
    if (entropy) entropy[i] = (float)(log_total - weighted / total);
  }
}

template <class T>
void backward(void* z_, const int64_t* targets, const float* dlogp, const float* dentropy, const float* log_z, const float* entropy, int64_t rows,
              int64_t v, float inverse_temperature) {
  for (int64_t i = 0; i < rows; ++i) {
    T* z = (T*)z_ + i * v;
    const float a = dlogp[i] * inverse_temperature, b = dentropy ? dentropy[i] * inverse_temperature : 0.0f;
    const float shift = log_z[i], h = dentropy ? entropy[i] : 0.0f;
    const float log_p_target = load_first(z + targets[i], 1)[0] * inverse_temperature - shift;
    for (int64_t j = 0; j < v; j += kLanes) {
      const floatv log_p = load_upto(z + j, v - j) * inverse_temperature - shift, p = exp(log_p);
      const floatv slope = dentropy ? a + b * (log_p + h) : broadcast(a);
      store_upto(z + j, p == 0.0f ? floatv{} : -p * slope, v - j);  // 0 log 0 = 0: a logit of -inf has no gradient
    }
    const float p = std::exp(log_p_target), slope = dentropy ? a + b * (log_p_target + h) : a;
    store_first(z + targets[i], broadcast(p == 0.0f ? a : a - p * slope), 1);
  }
}

DEFINE_KERNELS(LogprobRows) = {{forward<float>, forward<bf16>}, {backward<float>, backward<bf16>}};

}  // namespace fastlora::VARIANT

#else
#include "cpu/binding.h"

namespace fastlora {
DECLARE_KERNELS(LogprobRows)

static void check_targets(const Tensor& targets, int64_t rows, int64_t v) {
  const int64_t* ids = targets.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(targets.numel() == rows, "logprob_rows: ", rows, " rows and ", targets.numel(), " targets");
  for (int64_t i = 0; i < rows; ++i)
    STD_TORCH_CHECK(ids[i] >= 0 && ids[i] < v, "logprob_rows: target ", ids[i], " is outside the vocabulary [0, ", v, ")");
}

std::tuple<Tensor, Tensor, Tensor> logprob_rows_forward(Tensor z, Tensor targets, double temperature, bool with_entropy) {
  const Dtype type = check_rows("logprob_rows", z);
  const int64_t rows = z.size(0), v = z.size(1);
  check_targets(targets, rows, v);
  Tensor logp = torch::stable::new_empty(z, {rows}, ScalarType::Float), log_z = torch::stable::new_empty(z, {rows}, ScalarType::Float);
  Tensor entropy = torch::stable::new_empty(z, {with_entropy ? rows : 0}, ScalarType::Float);
  const auto kernel = LogprobRows_kernels().forward[type];
  const char* zs = bytes(z);
  const int64_t* ids = targets.const_data_ptr<int64_t>();
  float *l = logp.mutable_data_ptr<float>(), *n = log_z.mutable_data_ptr<float>(), *h = with_entropy ? entropy.mutable_data_ptr<float>() : nullptr;
  torch::stable::parallel_for(0, rows, grain(v), [&](int64_t begin, int64_t end) {
    kernel(zs + begin * v * width(type), ids + begin, l + begin, h ? h + begin : nullptr, n + begin, end - begin, v, (float)(1 / temperature));
  });
  return {logp, entropy, log_z};
}

void logprob_rows_backward_(Tensor z, Tensor targets, Tensor dlogp, std::optional<Tensor> dentropy, Tensor log_z, Tensor entropy, double temperature) {
  const Dtype type = check_rows("logprob_rows", z);
  const int64_t rows = z.size(0), v = z.size(1);
  check_targets(targets, rows, v);
  const auto kernel = LogprobRows_kernels().backward[type];
  check_per_row("logprob_rows", "dlogp", dlogp, rows);
  check_per_row("logprob_rows", "log_z", log_z, rows);
  if (dentropy) check_per_row("logprob_rows", "dentropy", *dentropy, rows), check_per_row("logprob_rows", "entropy", entropy, rows);
  char* zs = mutable_bytes(z);
  const int64_t* ids = targets.const_data_ptr<int64_t>();
  const float *a = dlogp.const_data_ptr<float>(), *b = dentropy ? dentropy->const_data_ptr<float>() : nullptr, *n = log_z.const_data_ptr<float>();
  const float* h = dentropy ? entropy.const_data_ptr<float>() : nullptr;
  torch::stable::parallel_for(0, rows, grain(v), [&](int64_t begin, int64_t end) {
    kernel(zs + begin * v * width(type), ids + begin, a + begin, b ? b + begin : nullptr, n + begin, h ? h + begin : nullptr, end - begin, v,
           (float)(1 / temperature));
  });
}

}  // namespace fastlora

STABLE_TORCH_LIBRARY_FRAGMENT(fastlora_cpu, m) {
  m.def("logprob_rows_forward(Tensor z, Tensor targets, float temperature, bool with_entropy) -> (Tensor, Tensor, Tensor)");
  m.def(
      "logprob_rows_backward_(Tensor(a!) z, Tensor targets, Tensor dlogp, Tensor? dentropy, Tensor log_z, Tensor entropy, "
      "float temperature) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastlora_cpu, CPU, m) {
  m.impl("logprob_rows_forward", TORCH_BOX(&fastlora::logprob_rows_forward));
  m.impl("logprob_rows_backward_", TORCH_BOX(&fastlora::logprob_rows_backward_));
}
#endif
