// The library of raw CPU kernels (fastlora_cpu::...), which fastlora/ops calls, and the choice of their instruction set.
#ifndef VARIANT
#include "cpu/binding.h"

#include <atomic>
#include <string>

namespace fastlora {

static const char* const kNames[] = {"generic", "avx2", "avx512", "avx512bf16"};

static InstructionSet best() {
#ifdef HAS_AVX2
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return InstructionSet::avx512bf16;
  if (avx512) return InstructionSet::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return InstructionSet::avx2;
#endif
  return InstructionSet::generic;
}

static std::atomic<InstructionSet> current{best()};

InstructionSet instruction_set() { return current.load(std::memory_order_relaxed); }

std::string instruction_set_name() { return kNames[(int)instruction_set()]; }

// Tests run the kernels of lesser processors too. A better set than the processor's would be an illegal instruction: refused.
void use_instruction_set(std::string name) {
  const int wanted = std::find(std::begin(kNames), std::end(kNames), name) - std::begin(kNames);
  STD_TORCH_CHECK(wanted <= (int)best(), "use_instruction_set: '", name, "' is unknown, or this processor does not have it; it has ",
                  kNames[(int)best()], " and below");
  current.store((InstructionSet)wanted);
}

}  // namespace fastlora

STABLE_TORCH_LIBRARY(fastlora_cpu, m) {
  m.def("instruction_set() -> str");
  m.def("use_instruction_set(str name) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastlora_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&fastlora::instruction_set_name));
  m.impl("use_instruction_set", TORCH_BOX(&fastlora::use_instruction_set));
}
#endif
