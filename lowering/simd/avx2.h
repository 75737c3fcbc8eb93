// AVX2 with FMA and F16C; the interface is in portable.h.
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "this kernel was generated for AVX2; the compiler targets something else"
#endif
static inline vf madd(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static inline vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
static inline float sum(vf a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
static inline float highest(vf a) {
  a = vmax(a, __builtin_shufflevector(a, a, 4, 5, 6, 7, 0, 1, 2, 3));
  a = vmax(a, __builtin_shufflevector(a, a, 2, 3, 4, 5, 6, 7, 0, 1));
  a = vmax(a, __builtin_shufflevector(a, a, 1, 2, 3, 4, 5, 6, 7, 0));
  return a[0];
}
constexpr int SUMS = 2;
static inline void store_sums(const vf* a, float* out) {
  __m256 x = _mm256_hadd_ps((__m256)a[0], (__m256)a[1]);
  x = _mm256_hadd_ps(x, x);
  _mm_storel_pi((__m64*)out, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}
static inline uint32_t bits(vi m) { return (uint32_t)_mm256_movemask_ps((__m256)m); }
static inline vi lane_mask(uint32_t b) {
  const vi lane = {1, 2, 4, 8, 16, 32, 64, 128};
  return ((vi{} + (int32_t)b) & lane) == lane;
}
/// Entry b: in byte i the place of the i-th bit of b (`set`), or how many bits of b stand below place i.
struct Places { uint64_t set[256], below[256]; };
static constexpr Places places = [] {
  Places table{};
  for (int b = 0; b < 256; ++b)
    for (uint64_t i = 0, n = 0; i < 8; ++i) {
      table.below[b] |= n << 8 * i;
      if (b >> i & 1) table.set[b] |= i << 8 * n++;
    }
  return table;
}();
static inline __m256i place_bytes(uint64_t bytes) { return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes)); }
static inline vf compact(vf x, uint32_t b) { return (vf)_mm256_permutevar8x32_ps((__m256)x, place_bytes(places.set[b])); }
static inline vf expand(vf x, uint32_t b) { return (vf)_mm256_permutevar8x32_ps((__m256)x, place_bytes(places.below[b])); }
static inline vi bytes_to_int(const uint8_t* p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
static inline void store_bytes(int8_t* p, vi x) {
  const __m256i low = _mm256_shuffle_epi8((__m256i)x, _mm256_set1_epi32(0x0c080400));  // the four bytes of each half, repeated
  const int32_t words[2] = {_mm256_extract_epi32(low, 0), _mm256_extract_epi32(low, 4)};
  std::memcpy(p, words, VL);
}
static inline vi pick_bytes(const uint8_t* p, vi places) {
  return (vi)_mm256_shuffle_epi8(_mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i*)p)), (__m256i)places);
}
static inline void store_halves(void* p, vi low, vi high) {
  const __m256i halves = _mm256_packus_epi32((__m256i)low, (__m256i)high);  // of each half of both
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(halves, 0xd8));
}
static inline vf load_row(const float* p) { return load(p); }
static inline vf load_row(const at::BFloat16* p) {
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
static inline vf load_row(const at::Half* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
constexpr int COLUMNS = 2;  // of 16 registers

/// Pairs of int16, for the nibbles that masks of shifted pairs of bytes leave: low and high ones of the even bytes, then of the odd ones.
static inline void pack_run(const int8_t* coarse, const int8_t* finer, int32_t* words) {
  int16_t pairs[4][2];
  for (int k = 0; k < 4; ++k)
    for (int i = 0; i < 2; ++i) {
      const int d = k % 2 * 4 + 2 * i + k / 2;
      pairs[k][i] = (int16_t)(TERM_RATIO * coarse[d] + finer[d]);
    }
  std::memcpy(words, pairs, sizeof pairs);
}

/// Both terms in one number of 16 bits: as many products as two of 8 bits take, and their sums are int32 already. Not inlined, since
/// the sums then stay in registers.
template <int MT, int RUNS>
static __attribute__((noinline)) void score_group(const uint8_t* plane, const int32_t (*query)[RUNS][4], int32_t (*out)[GROUP]) {
  const __m256i nibble = _mm256_set1_epi16(15);
  __m256i acc[MT][2];
  for (int i = 0; i < MT; ++i) acc[i][0] = acc[i][1] = _mm256_setzero_si256();
  #pragma GCC unroll 2
  for (int r = 0; r < RUNS; ++r) {
    const __m256i* bytes = (const __m256i*)(plane + r * 64);
    const __m256i x[2] = {_mm256_loadu_si256(bytes), _mm256_loadu_si256(bytes + 1)};
    #pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      __m256i nibbles[2];
      for (int part = 0; part < 2; ++part) nibbles[part] = _mm256_and_si256(_mm256_srli_epi16(x[part], 4 * k), nibble);
      for (int i = 0; i < MT; ++i) {
        const __m256i q = _mm256_set1_epi32(query[i][r][k]);
        for (int part = 0; part < 2; ++part) acc[i][part] = _mm256_add_epi32(acc[i][part], _mm256_madd_epi16(nibbles[part], q));
      }
    }
  }
  for (int i = 0; i < MT; ++i)
    for (int part = 0; part < 2; ++part) _mm256_storeu_si256((__m256i*)out[i] + part, acc[i][part]);
}

template <int MT, int BYTES, int CHUNKS>
static inline void dot_nibbles(const uint8_t* const* rows, const int8_t (*query)[CHUNKS][2][32], float* out, int64_t stride) {
  constexpr int padded = CHUNKS * 32;
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  vf sums[MT][SUMS];
  for (int k = 0; k < SUMS; ++k) {
    __m256i acc[MT];
    for (int i = 0; i < MT; ++i) acc[i] = _mm256_setzero_si256();
    #pragma GCC unroll 4
    for (int first = 0; first < padded; first += 128) {  // at most eight products of 2 * 15 * 127 in int16
      __m256i narrow[MT];
      for (int i = 0; i < MT; ++i) narrow[i] = _mm256_setzero_si256();
      #pragma GCC unroll 4
      for (int d = first; d < std::min(first + 128, padded); d += 32) {
        const __m256i x = _mm256_loadu_si256((const __m256i*)(rows[k] + d));
        const __m256i low = _mm256_and_si256(x, nibble), high = _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble);
        for (int i = 0; i < MT; ++i) {
          const __m256i a = _mm256_maddubs_epi16(low, _mm256_loadu_si256((const __m256i*)query[i][d / 32][0]));
          const __m256i b = _mm256_maddubs_epi16(high, _mm256_loadu_si256((const __m256i*)query[i][d / 32][1]));
          narrow[i] = _mm256_add_epi16(narrow[i], _mm256_add_epi16(a, b));
        }
      }
      for (int i = 0; i < MT; ++i) acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(narrow[i], ones));
    }
    for (int i = 0; i < MT; ++i) sums[i][k] = to_float((vi)acc[i]);
  }
  for (int i = 0; i < MT; ++i) store_sums(sums[i], out + i * stride);
}

typedef int16_t vs __attribute__((vector_size(32)));
static inline vs interleave(const uint8_t* a, const uint8_t* b) {
  const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)a)), y = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)b));
  return (vs)_mm256_or_si256(x, _mm256_slli_epi16(y, 8));
}
static inline vs pair_dot(vs bytes, vs weights) { return (vs)_mm256_maddubs_epi16((__m256i)bytes, (__m256i)weights); }
static inline vf to_float(vs x, int v) {
  const __m128i part = v ? _mm256_extracti128_si256((__m256i)x, 1) : _mm256_castsi256_si128((__m256i)x);
  return to_float((vi)_mm256_cvtepi16_epi32(part));
}
