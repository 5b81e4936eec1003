// What the three harnesses share: element types by number, and random arrays of them that end where their memory ends.
#pragma once
#include <cstdio>
#include <random>
#include <vector>

#include "emulation.h"

#ifdef WITH_TSAN
constexpr bool kSlow = true;  // making a thread takes ThreadSanitizer half a millisecond: one case has to do
#else
constexpr bool kSlow = false;
#endif

enum { kFloat32, kBFloat16, kFloat16 };

template <class Call> void with_element(int dtype, const Call& call) {
  if (dtype == kFloat32) call(float{});
  else if (dtype == kBFloat16) call(fastlora::bfloat16{});
  else call(fastlora::float16{});
}

// Normal numbers, rounded to dtype.
class Elements {
 public:
  Elements(int dtype, int64_t count) : values_(count), floats_(dtype == kFloat32 ? count : 0), halves_(dtype == kFloat32 ? 0 : count) {
    std::mt19937 random(count);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) {
      const float x = normal(random);
      values_[i] = x;
      if (dtype == kFloat32) floats_[i] = x;
      else halves_[i] = fastlora::from_float<fastlora::bfloat16>(x), values_[i] = fastlora::to_float(halves_[i]);
    }
  }
  void* data() { return floats_.empty() ? static_cast<void*>(halves_.data()) : floats_.data(); }
  double operator[](int64_t i) const { return values_[i]; }

 private:
  std::vector<double> values_;
  std::vector<float> floats_;
  std::vector<fastlora::bfloat16> halves_;
};

inline int report(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  return 1;
}

extern "C" const char* emulation_error() { return emulation::error.c_str(); }
extern "C" void emulation_settings(int workers, unsigned seed) { emulation::settings = {workers, seed}; }
