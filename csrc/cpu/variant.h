// One kernel source, several instruction sets. setup.py compiles every file of csrc/cpu once with -DVARIANT=<name> for each set that
// the architecture knows (the kernels, in a namespace of that name) and once without (the bindings). A file's kernels are reached
// through a table of function pointers, one table per set, and the set is chosen at run time.
#pragma once
#include <cstdint>

namespace fastlora {

enum class InstructionSet : int { generic, avx2, avx512, avx512bf16 };

// The best that the processor has, or what `fastlora_cpu::use_instruction_set` asked for (module.cpp).
InstructionSet instruction_set();

// Element types of the kernels: index into the function pairs of a table.
enum Dtype : int { kFloat = 0, kBFloat16 = 1 };

}  // namespace fastlora

#ifdef HAS_AVX2
#define FASTLORA_IF_X86(code) code
#else
#define FASTLORA_IF_X86(code)
#endif

// In a binding: `DECLARE_KERNELS(Table)` declares the tables of all sets and `const Table& Table_kernels()`, the one to use now.
#define DECLARE_KERNELS(Table)                                                              \
  namespace generic { extern const Table table_of_##Table; }                                \
  FASTLORA_IF_X86(namespace avx2 { extern const Table table_of_##Table; })                  \
  FASTLORA_IF_X86(namespace avx512 { extern const Table table_of_##Table; })                \
  FASTLORA_IF_X86(namespace avx512bf16 { extern const Table table_of_##Table; })            \
  inline const Table& Table##_kernels() {                                                   \
    switch (instruction_set()) {                                                            \
      FASTLORA_IF_X86(case InstructionSet::avx2 : return avx2::table_of_##Table;)           \
      FASTLORA_IF_X86(case InstructionSet::avx512 : return avx512::table_of_##Table;)       \
      FASTLORA_IF_X86(case InstructionSet::avx512bf16 : return avx512bf16::table_of_##Table;) \
      default: return generic::table_of_##Table;                                            \
    }                                                                                       \
  }
// In a kernel: `DEFINE_KERNELS(Table) = {...};` inside namespace VARIANT.
#define DEFINE_KERNELS(Table) extern const Table table_of_##Table; const Table table_of_##Table
