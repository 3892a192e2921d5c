// Reading and writing the four float dtypes as T (float, or double for float64). Included like vec.h.

EE_INLINE float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
}
EE_INLINE uint16_t to_bf16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // round to nearest even
}

// IEEE half by integer arithmetic: no F16C needed, and the compiler vectorises it. After Fabian Giesen's public
// domain conversions: subnormals are renormalised by one float multiplication or addition.
EE_INLINE float from_f16(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits & 0x7fff) << 13;
  float value;
  __builtin_memcpy(&value, &wide, 4);
  value *= 0x1p112f;  // exponent bias 15 -> 127, exact, subnormals included
  __builtin_memcpy(&wide, &value, 4);
  wide |= (bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  wide |= static_cast<uint32_t>(bits & 0x8000) << 16;
  __builtin_memcpy(&value, &wide, 4);
  return value;
}
EE_INLINE uint16_t to_f16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t sign = bits & 0x80000000u;
  bits ^= sign;
  uint32_t result;
  if (bits >= 0x47800000u) {  // 65536 and above, infinity, NaN
    result = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (bits < 0x38800000u) {  // below 2^-14: adding 0.5 aligns the subnormal's mantissa
    float aligned;
    __builtin_memcpy(&aligned, &bits, 4);
    aligned += 0.5f;
    __builtin_memcpy(&result, &aligned, 4);
    result -= 0x3f000000u;
  } else {
    result = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1)) >> 13;
  }
  return static_cast<uint16_t>(result | (sign >> 16));
}

// n elements that start at element `offset` of `base`, as T. The dtype is a run-time value, so that each kernel is
// compiled for float and double only.
template <class T>
EE_INLINE void read_as(T* out, const char* base, int64_t offset, int64_t n, DType dtype) {
  if (dtype == DType::f32) {
    const float* p = reinterpret_cast<const float*>(base) + offset;
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(p[i]);
  } else if (dtype == DType::f64) {
    const double* p = reinterpret_cast<const double*>(base) + offset;
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(p[i]);
  } else {
    const uint16_t* p = reinterpret_cast<const uint16_t*>(base) + offset;
    if (dtype == DType::bf16) {
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(from_bf16(p[i]));
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(from_f16(p[i]));
    }
  }
}
template <class T>
EE_INLINE void write_as(char* base, int64_t offset, const T* in, int64_t n, DType dtype) {
  if (dtype == DType::f32) {
    float* p = reinterpret_cast<float*>(base) + offset;
    for (int64_t i = 0; i < n; ++i) p[i] = static_cast<float>(in[i]);
  } else if (dtype == DType::f64) {
    double* p = reinterpret_cast<double*>(base) + offset;
    for (int64_t i = 0; i < n; ++i) p[i] = static_cast<double>(in[i]);
  } else {
    uint16_t* p = reinterpret_cast<uint16_t*>(base) + offset;
    if (dtype == DType::bf16) {
      for (int64_t i = 0; i < n; ++i) p[i] = to_bf16(static_cast<float>(in[i]));
    } else {
      for (int64_t i = 0; i < n; ++i) p[i] = to_f16(static_cast<float>(in[i]));
    }
  }
}

// Whether data of this dtype can be used in place as T.
template <class T>
EE_INLINE bool is_native(DType dtype) {
  return dtype == (sizeof(T) == 4 ? DType::f32 : DType::f64);
}
// n elements as T: in place where the dtype is T, else converted into tmp.
template <class T>
EE_INLINE const T* view_as(const char* base, int64_t offset, int64_t n, DType dtype, T* tmp) {
  if (is_native<T>(dtype)) return reinterpret_cast<const T*>(base) + offset;
  read_as(tmp, base, offset, n, dtype);
  return tmp;
}
