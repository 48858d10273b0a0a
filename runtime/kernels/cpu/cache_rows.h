// Reading and writing the rows of a cache: elements as they are, or quantized values with their
// parameters behind them, by the formulas of runtime/ops/cache_format.py.

inline float cache_top(Form form) { return form == Form::Int4 ? 15.0f : 255.0f; }

inline int64_t value_bytes(Form form, int64_t size) {
  return form == Form::Int4 ? divide_up(size, 2) : size;
}

inline int64_t parameters(Form form) { return form == Form::Fp8 ? 1 : 2; }

// Rows of elements. `at` holds where each row starts; lanes() is not called for those below 0.
template <class T>
struct Elements {
  using Unit = T;
  const T* data;
  const int64_t* at;
  Elements(const T* data, const int64_t* at, int64_t, int64_t) : data(data), at(at) {}
  static int64_t bytes(int64_t size) { return size * (int64_t)sizeof(T); }
  template <class F>
  V lanes(int64_t i, int64_t feature, int64_t size) const {
    return F::lanes(data + at[i] + feature, size - feature);
  }
};

// Sixteen values from `feature` on, as floats without scale.
template <Form form>
inline V load_values_of(const uint8_t* row, int64_t feature, int64_t left) {
  if constexpr (form == Form::Fp8) return load_some((const e4m3*)row + feature, left);
  if constexpr (form == Form::Int8) return load_some(row + feature, left);
  const uint8_t* from = row + feature / 2;
  if (left >= 16) return load_u4(from);
  uint8_t some[8] = {};
  for (int64_t i = 0; i < divide_up(left, 2); i++) some[i] = from[i];
  return load_u4(some);
}

// Quantized rows, of which up to kMost are read together. Lanes past the end of a row hold any
// finite number, unless the row holds NaN.
template <Form form>
struct QuantizedRows {
  using Unit = uint8_t;
  static constexpr int64_t kMost = 64;
  const uint8_t* data;
  const int64_t* at;
  float scale[kMost], zero[kMost];

  QuantizedRows(const uint8_t* data, const int64_t* at, int64_t count, int64_t size)
      : data(data), at(at) {
    f16 stored[2][kMost];
    const int64_t behind = value_bytes(form, size), n = parameters(form);
    for (int64_t i = 0; i < round_up(count, 16); i++) {
      stored[0][i].bits = stored[1][i].bits = 0;
      if (i >= count || at[i] < 0) continue;
      for (int64_t p = 0; p < n; p++)  // a row may start at any byte
        __builtin_memcpy(&stored[p][i], data + at[i] + behind + 2 * p, 2);
    }
    for (int64_t i = 0; i < count; i += 16) {
      store(scale + i, load(stored[0] + i));
      if (n > 1) store(zero + i, load(stored[1] + i));
    }
  }
  static int64_t bytes(int64_t size) { return value_bytes(form, size) + 2 * parameters(form); }
  template <class F>
  V lanes(int64_t i, int64_t feature, int64_t size) const {
    const V q = load_values_of<form>(data + at[i], feature, size - feature);
    if constexpr (form == Form::Fp8) return mul(q, set1(scale[i]));
    return fma(q, set1(scale[i]), set1(zero[i]));
  }
};

inline float rounded_to_f16(float x, f16& bits) {
  f16 lanes[16];
  float wide[16];
  store(lanes, set1(x));
  bits = lanes[0];
  store(wide, load(lanes));
  return wide[0];
}

// e4m3 of |y| <= 448, nearest with halves to even.
inline uint8_t to_e4m3(float y) {
  uint32_t bits, base;
  __builtin_memcpy(&bits, &y, 4);
  const uint32_t sign = bits >> 24 & 0x80, rest = bits & 0x7fffffff;
  if (rest >= 0x3c800000)  // 2^-6 and more: 120 less in the exponent, 20 bits of fraction less
    return (uint8_t)(sign | (rest - 0x3c000000 + 0x7ffff + (rest >> 20 & 1)) >> 20);
  // Steps of 2^-9 are the last bit of a float at 2^14.
  const float large = 16384.0f;
  float moved;
  __builtin_memcpy(&moved, &rest, 4);
  moved += large;
  __builtin_memcpy(&bits, &moved, 4);
  __builtin_memcpy(&base, &large, 4);
  return (uint8_t)(sign | (bits - base));
}

template <class T>
inline void quantize_of(const T* in, Form form, uint8_t* out, int64_t n) {
  const V first = set1([&] {
    float lanes[16];
    store(lanes, load_some(in, 1));
    return lanes[0];
  }());
  // Beyond the end the first value is repeated, which moves neither extreme.
  const auto sixteen = [&](int64_t i) {
    if (n - i >= 16) return load(in + i);
    float lanes[16], all[16];
    store(lanes, load_some(in + i, n - i));
    store(all, first);
    for (int64_t j = 0; j < n - i; j++) all[j] = lanes[j];
    return load(all);
  };
  V most = first, least = sub(zero(), first), wrong = zero();
  for (int64_t i = 0; i < n; i += 16) {
    const V x = sixteen(i);
    most = max(most, x);
    least = max(least, sub(zero(), x));
    wrong = fma(x, zero(), wrong);  // NaN where x is not finite
  }
  // Adding 0 makes 0 of -0: which of two equal zeros is the extreme must not matter.
  const float high = largest(most) + 0.0f, low = 0.0f - largest(least);
  const bool fits = sum(wrong) == 0 && low >= -65504.0f && high <= 65504.0f;

  f16 stored[2] = {{0x7e00}, {0x7e00}};
  const float top = cache_top(form);
  float scale = 0, base = 0;
  if (fits && form == Form::Fp8) {
    scale = rounded_to_f16((0.0f - low > high ? 0.0f - low : high) / 448.0f, stored[0]);
  } else if (fits) {
    base = rounded_to_f16(low, stored[1]);
    scale = rounded_to_f16((high > base ? high - base : 0.0f) / top, stored[0]);
  }
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t count = smaller(16, n - i);
    float lanes[16] = {};
    if (scale > 0) {
      const V y = div(sub(sixteen(i), set1(base)), set1(scale));
      store(lanes, form == Form::Fp8 ? max(min(y, set1(448.0f)), set1(-448.0f))
                                     : max(min(round(y), set1(top)), zero()));
    }
    if (form == Form::Int4) {
      for (int64_t j = count; j < 16; j++) lanes[j] = 0;
      for (int64_t j = 0; j < count; j += 2)
        out[(i + j) / 2] = (uint8_t)((int)lanes[j] | (int)lanes[j + 1] << 4);
    } else {
      for (int64_t j = 0; j < count; j++)
        out[i + j] = form == Form::Fp8 ? to_e4m3(lanes[j]) : (uint8_t)(int)lanes[j];
    }
  }
  __builtin_memcpy(out + value_bytes(form, n), stored, (std::size_t)(2 * parameters(form)));
}

void quantize(Type from, const void* in, Form form, void* out, int64_t n) {
  with_type(from, [&](auto* x) { quantize_of((const decltype(x))in, form, (uint8_t*)out, n); });
}
