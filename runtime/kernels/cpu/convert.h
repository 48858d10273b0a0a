// Element types: choosing code by Type, and converting.

template <class F>
inline void with_type(Type type, F f) {
  if (type == Type::F32) {
    f((float*)nullptr);
  } else if (type == Type::F16) {
    f((f16*)nullptr);
  } else {
    f((bf16*)nullptr);
  }
}

inline int64_t size_of(Type type) { return type == Type::F32 ? 4 : 2; }

template <class From, class To>
inline void convert_row(const From* in, To* out, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, load(in + i));
  if (i < n) store_some(out + i, load_some(in + i, n - i), n - i);
}

void convert(Type from, const void* in, Type to, void* out, int64_t n) {
  if (from == to) {
    __builtin_memcpy(out, in, (std::size_t)(n * size_of(from)));
    return;
  }
  with_type(from, [&](auto* a) {
    with_type(to, [&](auto* b) {
      convert_row((const decltype(a))in, (decltype(b))out, n);
    });
  });
}
