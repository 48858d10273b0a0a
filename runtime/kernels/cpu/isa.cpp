// Which instruction set's kernels run: the best of the machine, SMELT_CPU_ISA=NAME to take another.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(SMELT_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
SMELT_SET(amx_bf16)
#endif

namespace {

constexpr int kMost = 6;

// Whether there are tiles with products of bfloat16 and int8, and the system lets this process use them.
bool may_use_amx() {
#if defined(SMELT_X86) && defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr unsigned kAll = kBf16 | kTile | kInt8;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
  constexpr long kAskPermission = 0x1023, kTileData = 18;  // Linux, Documentation/arch/x86/xstate.rst
  static const bool allowed = syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
  return allowed;
#else
  return false;
#endif
}

#if defined(SMELT_X86)
// AMX multiplies; all else is as without it.
const Kernels& with_amx() {
  static const Kernels made = [] {
    const Kernels& tiles = amx_bf16::table;
    Kernels all = avx512_bf16::table;
    all.name = tiles.name;
    all.dense_most = tiles.dense_most;
    all.dense_scratch = tiles.dense_scratch;
    all.dense_prepare = tiles.dense_prepare;
    all.dense = tiles.dense;
    all.quantized = tiles.quantized;
    all.w8a8 = tiles.w8a8;
    all.attention_chunk = tiles.attention_chunk;
    return all;
  }();
  return made;
}
#endif

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
  const bool half = vnni && __builtin_cpu_supports("avx512bf16");
  if (half) to[n++] = &avx512_bf16::table;
  if (half && may_use_amx()) to[n++] = &with_amx();
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
