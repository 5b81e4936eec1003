// adamw_step.cuh on the CPU: for ctypes, and as a program for the sanitizers.
#include "cuda/adamw_step.cuh"

#include "elements.h"

using namespace fastlora;

extern "C" int adamw_step(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, const float* clip, const int32_t* index,
                          int64_t k, int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay) {
  emulation::error.clear();
  const AdamwScalars scalars = adamw_scalars(step, lr, beta1, beta2, eps, weight_decay);
  launch_adamw_step({param, grad, exp_avg, exp_avg_sq, index, clip, k, scalars, false}, nullptr);
  return emulation::error.empty() ? 0 : -1;
}

// capacity: doubles that fit into partial. Returns the number of slices, or −1 and emulation_error().
extern "C" int gradient_norms(const float* grad, const int32_t* index, const int64_t* ranges, int matrices, int64_t most_entries,
                              double* partial, int64_t capacity, int* arrivals, float* norms) {
  const int slices = slices_of(most_entries);
  emulation::error.clear();
  if (int64_t{matrices} * slices > capacity) emulation::error = "the test's partial is too small";
  else launch_gradient_norms({grad, index, ranges, matrices, slices, partial, arrivals, norms, false}, nullptr);
  return emulation::error.empty() ? slices : -1;
}

// One matrix of several slices, one empty, one small; entries that are neighbours and entries that are not.
int main() {
  const int64_t size = kSlow ? 3000 : 90000, large = kSlow ? 1000 : 2 * kEntriesOfASlice + 5;
  std::vector<int32_t> index;
  for (int i = 0; i < size; ++i)
    if (i < 1000 || i * 37 % 101 < 50 || i > size - 3) index.push_back(i);  // neighbours, then any pattern
  while (index.size() % kQuad != 1) index.pop_back();
  index.shrink_to_fit();  // so that AddressSanitizer knows its end
  const int64_t k = index.size(), ranges[] = {0, large, large, large, large, k};
  Elements grad(kFloat32, size), param(kFloat32, size), m(kFloat32, k);
  const float* g = static_cast<const float*>(grad.data());
  std::vector<float> norms(3, NAN);
  std::vector<double> partial(9, NAN);
  std::vector<int> arrivals(3, 0);
  const int64_t most = 2 * kEntriesOfASlice + 5;  // three slices
  // In three orders of the blocks: gcc's thread sanitizer has about 255 slots for 512 fibers, and a race is lost where one is used again.
  for (unsigned order = 1; order <= 3; ++order) {
    emulation::settings.seed = order;
    if (gradient_norms(g, index.data(), ranges, 3, most, partial.data(), 9, arrivals.data(), norms.data()) != 3)
      return report("gradient_norms: " + emulation::error);
    for (int matrix = 0; matrix < 3; ++matrix) {
      double squares = 0;
      for (int64_t i = ranges[2 * matrix]; i < ranges[2 * matrix + 1]; ++i) squares += grad[index[i]] * grad[index[i]];
      if (!(std::fabs(std::sqrt(squares) - norms[matrix]) < 1e-4)) return report("gradient_norms: wrong");
    }
  }
  std::vector<float> seconds(k, 1.0f);
  const float clip = 0.5f;
  float* p = static_cast<float*>(param.data());
  if (adamw_step(p, g, static_cast<float*>(m.data()), seconds.data(), &clip, index.data(), k, 1, 0.1, 0.5, 0.5, 0.0, 0.0))
    return report("adamw_step: " + emulation::error);
  for (int64_t i = 0; i < k; ++i) {  // step 1: both corrections are 0.5
    const double half = 0.5 * grad[index[i]], moment = 0.5 * m[i] + 0.5 * half, second = 0.5 + 0.5 * half * half;
    const double truth = param[index[i]] - 0.2 * moment / std::sqrt(2 * second);
    if (!(std::fabs(truth - p[index[i]]) < 1e-5)) return report("adamw_step: wrong");
  }
  return 0;
}
