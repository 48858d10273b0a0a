// The vector of sixteen floats that the kernels are written in, for the set being compiled, and
// what follows from it. Everything is internal to the unit (included inside its own unnamed
// namespace): two sets must never share a function.
#if defined(SMELT_AVX512)
#include "vec_avx512.h"
#elif defined(SMELT_AVX2)
#include "vec_avx2.h"
#else
#include "vec_portable.h"
#endif

inline void load_pair(const float* p, V& a, V& b) {
  a = load(p);
  b = load(p + 16);
}
inline void load_pair(const f16* p, V& a, V& b) {
  a = load(p);
  b = load(p + 16);
}

// x within low .. high; NaN stays NaN, because max and min give their second operand then.
inline V between(float low, V x, float high) { return min(set1(high), max(set1(low), x)); }

// exp to about 2 ulp, exactly 0 below -87, for x <= 88; NaN of NaN.
inline V exp(V x) {
  V bounded = between(-87.0f, x, 88.0f);
  V n = round(mul(bounded, set1(1.44269504088896341f)));
  V r = fma(n, set1(-0.693359375f), bounded);
  r = fma(n, set1(2.12194440e-4f), r);
  V p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  return where_not_below(x, -87.0f, times_power_of_two(p, n));
}
inline float exp(float x) { 
  float lanes[16];
  store(lanes, exp(set1(x)));
  return lanes[0];
}

inline V tanh(V x) {
  V bounded = between(-20.0f, x, 20.0f);
  V e = exp(add(bounded, bounded));
  return sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
// Rows to have room for, where more than sixteen are read sixteen at a time.
inline int64_t whole_tiles(int64_t rows) { return rows < 16 ? rows : round_up(rows, 16); }

// The first n <= 16 of a vector, from and to memory that ends there.
template <class T>
inline V load_some(const T* p, int64_t n) {
  if (n >= 16) return load(p);
  T lanes[16] = {};
  for (int64_t i = 0; i < n; i++) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
inline void store_some(T* p, V a, int64_t n) {
  if (n >= 16) return store(p, a);
  T lanes[16];
  store(lanes, a);
  for (int64_t i = 0; i < n; i++) p[i] = lanes[i];
}
