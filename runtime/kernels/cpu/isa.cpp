// Which instruction set's kernels run: the best of the machine, SMELT_CPU_ISA=NAME to take another.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace smelt {

#define SMELT_SET(name) \
  namespace name {      \
  extern const Kernels table; \
  }
SMELT_SET(baseline)
#if defined(SMELT_X86)
SMELT_SET(avx2)
SMELT_SET(avx512)
SMELT_SET(avx512_vnni)
SMELT_SET(avx512_bf16)
#endif

namespace {

constexpr int kMost = 5;

// From the plainest to the best; returns how many this machine runs.
int available(const Kernels** to) {
  int n = 0;
  to[n++] = &baseline::table;
#if defined(SMELT_X86)
  __builtin_cpu_init();
  const bool two = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("f16c");
  if (two) to[n++] = &avx2::table;
  const bool five = two && __builtin_cpu_supports("avx512f") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq");
  if (five) to[n++] = &avx512::table;
  const bool vnni = five && __builtin_cpu_supports("avx512vnni");
  if (vnni) to[n++] = &avx512_vnni::table;
  if (vnni && __builtin_cpu_supports("avx512bf16")) to[n++] = &avx512_bf16::table;
#endif
  return n;
}

const Kernels* find(const char* name) {
  const Kernels* sets[kMost];
  const int n = available(sets);
  for (int i = 0; i < n; i++)
    if (!std::strcmp(sets[i]->name, name)) return sets[i];
  return nullptr;
}

const Kernels* best() {
  const Kernels* sets[kMost];
  const int n = available(sets);
  const char* wanted = std::getenv("SMELT_CPU_ISA");
  if (!wanted || !*wanted) return sets[n - 1];
  const Kernels* named = find(wanted);
  if (named) return named;
  std::fprintf(stderr, "smelt: SMELT_CPU_ISA=%s is not one of", wanted);
  for (int i = 0; i < n; i++) std::fprintf(stderr, " %s", sets[i]->name);
  std::fprintf(stderr, " on this machine; taking %s\n", sets[n - 1]->name);
  return sets[n - 1];
}

const Kernels*& active() {
  static const Kernels* chosen = best();
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *active(); }

}  // namespace smelt

extern "C" {

#define SMELT_EXPORT __attribute__((visibility("default")))

// Name of the set in use.
SMELT_EXPORT const char* smelt_cpu_isa() { return smelt::kernels().name; }

// Take another set, for tests; 0 where this machine does not have it.
SMELT_EXPORT int smelt_cpu_set_isa(const char* name) {
  const smelt::Kernels* named = smelt::find(name);
  if (named) smelt::active() = named;
  return named != nullptr;
}
}
