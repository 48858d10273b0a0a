// Sixteen floats in an array: plain C++ that the compiler vectorises for whatever it targets.

struct V {
  float f[16];
};

template <class F>
inline V each(F f) {
  V r;
  for (int i = 0; i < 16; i++) r.f[i] = f(i);
  return r;
}
inline float as_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

inline V set1(float x) {
  return each([=](int) { return x; });
}
inline V zero() { return set1(0); }
inline V load(const float* p) {
  return each([=](int i) { return p[i]; });
}
inline void store(float* p, V a) {
  for (int i = 0; i < 16; i++) p[i] = a.f[i];
}
inline V add(const V& a, const V& b) {
  return each([&](int i) { return a.f[i] + b.f[i]; });
}
inline V sub(const V& a, const V& b) {
  return each([&](int i) { return a.f[i] - b.f[i]; });
}
inline V mul(const V& a, const V& b) {
  return each([&](int i) { return a.f[i] * b.f[i]; });
}
inline V div(const V& a, const V& b) {
  return each([&](int i) { return a.f[i] / b.f[i]; });
}
inline V max(const V& a, const V& b) {
  return each([&](int i) { return a.f[i] > b.f[i] ? a.f[i] : b.f[i]; });
}
inline V min(const V& a, const V& b) {
  return each([&](int i) { return a.f[i] < b.f[i] ? a.f[i] : b.f[i]; });
}
inline V fma(const V& a, const V& b, const V& c) {
  return each([&](int i) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a.f[i], b.f[i], c.f[i]);
#else
    return a.f[i] * b.f[i] + c.f[i];
#endif
  });
}
inline float sum(V a) {
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; i++) a.f[i] += a.f[i + width];
  return a.f[0];
}
inline float largest(const V& a) {
  float best = a.f[0];
  for (int i = 1; i < 16; i++) best = a.f[i] > best ? a.f[i] : best;
  return best;
}
// Adding and taking away 1.5 * 2^23 leaves the nearest integer (for |a| < 2^22).
inline V round(const V& a) {
  return each([&](int i) { return (a.f[i] + 12582912.0f) - 12582912.0f; });
}
inline V times_power_of_two(const V& a, const V& n) {
  return each([&](int i) { return a.f[i] * as_float((uint32_t)((int)n.f[i] + 127) << 23); });
}
inline V where_not_below(const V& x, float limit, const V& a) {
  return each([&](int i) { return x.f[i] < limit ? 0.0f : a.f[i]; });
}

inline V load(const bf16* p) {
  return each([=](int i) { return as_float((uint32_t)p[i].bits << 16); });
}
inline V load(const f16* p) {
  return each([=](int i) {
    uint32_t h = p[i].bits, rest = (h & 0x7fff) << 13;
    // 2^112 moves the exponent's bias from 15 to 127, and makes denormals right as well.
    float x = as_float(rest) * 5.192296858534828e+33f;
    if ((h & 0x7c00) == 0x7c00) x = as_float(rest | 0x7f800000);
    return as_float(as_bits(x) | (h & 0x8000) << 16);
  });
}
inline V load(const int8_t* p) {
  return each([=](int i) { return (float)p[i]; });
}
inline V load(const uint8_t* p) {
  return each([=](int i) { return (float)p[i]; });
}
inline void store(bf16* p, const V& a) {
  for (int i = 0; i < 16; i++) {
    uint32_t x = as_bits(a.f[i]);
    p[i].bits = a.f[i] != a.f[i] ? 0x7fc0 : (uint16_t)((x + 0x7fff + (x >> 16 & 1)) >> 16);
  }
}
inline void store(f16* p, const V& a) {
  for (int i = 0; i < 16; i++) {
    uint32_t x = as_bits(a.f[i]), sign = x >> 16 & 0x8000, rest = x & 0x7fffffff;
    uint32_t h;
    if (rest > 0x7f800000) {
      h = 0x7e00;
    } else if (rest >= 0x47800000) {
      h = 0x7c00;  // 65536 and more: infinity
    } else if (rest < 0x38800000) {
      // Denormal: adding 0.5 leaves the value in the low bits, rounded to nearest even.
      h = as_bits(as_float(rest) + 0.5f) - 0x3f000000;
    } else {
      h = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
    }
    p[i].bits = (uint16_t)(sign | h);
  }
}
// float8 e4m3 but for its NaN, which is never stored.
inline V load(const e4m3* p) {
  return each([=](int i) {
    uint32_t rest = (uint32_t)(p[i].bits & 0x7f) << 20;
    float x = as_float(rest) * 1.329227995784916e+36f;  // 2^120: the exponent's bias, 7 to 127
    return as_float(as_bits(x) | (uint32_t)(p[i].bits & 0x80) << 24);
  });
}
// Sixteen values of four bits, the low half of a byte first.
inline V load_u4(const uint8_t* p) {
  return each([=](int i) { return (float)(p[i / 2] >> (i % 2 * 4) & 15); });
}

inline void load_pair(const bf16* p, V& even, V& odd) {
  even = each([=](int i) { return as_float((uint32_t)p[2 * i].bits << 16); });
  odd = each([=](int i) { return as_float((uint32_t)p[2 * i + 1].bits << 16); });
}

struct Words {
  uint32_t w[16];
};
inline Words load_words(const int32_t* p) {
  Words r;
  for (int i = 0; i < 16; i++) r.w[i] = (uint32_t)p[i];
  return r;
}
inline V field(const Words& n, int shift, int mask, int less) {
  return each([&](int i) { return (float)((int)(n.w[i] >> shift & mask) - less); });
}
inline V nibble(const Words& n, int j) { return field(n, 4 * j, 15, 8); }

inline void transpose(V* r) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < i; j++) {
      float t = r[i].f[j];
      r[i].f[j] = r[j].f[i];
      r[j].f[i] = t;
    }
}
