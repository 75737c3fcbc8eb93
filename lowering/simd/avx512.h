// AVX-512 with VNNI, whose int8 dot products need no int16 between; the interface is in portable.h.
#if !defined(__AVX512F__) || !defined(__AVX512VNNI__) || !defined(__AVX512BW__) || !defined(__AVX512VL__) || !defined(__AVX512DQ__)
#error "this kernel was generated for AVX-512 VNNI; the compiler targets something else"
#endif
static inline vf madd(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
static inline vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
static inline float sum(vf a) { return _mm512_reduce_add_ps((__m512)a); }
static inline float highest(vf a) {
  a = vmax(a, __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  a = vmax(a, __builtin_shufflevector(a, a, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  a = vmax(a, __builtin_shufflevector(a, a, 2, 3, 4, 5, 6, 7, 0, 1, 10, 11, 12, 13, 14, 15, 8, 9));
  a = vmax(a, __builtin_shufflevector(a, a, 1, 2, 3, 4, 5, 6, 7, 0, 9, 10, 11, 12, 13, 14, 15, 8));
  return a[0];
}
constexpr int SUMS = 4;
template <typename T>
static inline void store_sums(const T* a, float* out) {
  T pairs[2];  // lanes 4 l + {0, 1, 2, 3}: a[2i], a[2i + 1], and the other halves of both
  for (int i = 0; i < 2; ++i)
    pairs[i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
               __builtin_shufflevector(a[2 * i], a[2 * i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  const T x = __builtin_shufflevector(pairs[0], pairs[1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
              __builtin_shufflevector(pairs[0], pairs[1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  typedef float four __attribute__((vector_size(16)));
  typedef float loose_four __attribute__((vector_size(16), aligned(4)));
  const auto y = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto z = __builtin_shufflevector(y, y, 0, 1, 2, 3) + __builtin_shufflevector(y, y, 4, 5, 6, 7);
  *(loose_four*)out = __builtin_convertvector(z, four);
}
static inline uint32_t bits(vi m) { return (uint32_t)_mm512_movepi32_mask((__m512i)m); }
static inline vi lane_mask(uint32_t b) { return (vi)_mm512_movm_epi32((__mmask16)b); }
static inline vf compact(vf x, uint32_t b) { return (vf)_mm512_maskz_compress_ps((__mmask16)b, (__m512)x); }
static inline vf expand(vf x, uint32_t b) { return (vf)_mm512_maskz_expand_ps((__mmask16)b, (__m512)x); }
static inline vi bytes_to_int(const uint8_t* p) { return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
static inline void store_bytes(int8_t* p, vi x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)x)); }
static inline vi pick_bytes(const uint8_t* p, vi places) {
  return (vi)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)), (__m512i)places);
}
static inline void store_halves(void* p, vi low, vi high) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)low));
  _mm256_storeu_si256((__m256i*)p + 1, _mm512_cvtepi32_epi16((__m512i)high));
}
static inline vf load_row(const float* p) { return load(p); }
static inline vf load_row(const at::BFloat16* p) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
static inline vf load_row(const at::Half* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
constexpr int COLUMNS = 4;  // of 32 registers

inline Wide Wide::of(vf x) {
  return {(vd)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x)), (vd)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1))};
}
inline vf Wide::to_float() const {
  return (vf)_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)low)), _mm512_cvtpd_ps((__m512d)high), 1);
}
inline double Wide::sum() const { return _mm512_reduce_add_pd((__m512d)(low + high)); }

/// Words of the first term, for low and high nibbles, then of the second.
static inline void pack_run(const int8_t* coarse, const int8_t* finer, int32_t* words) {
  std::memcpy(words, coarse, 8);
  std::memcpy(words + 2, finer, 8);
}

template <int MT, int RUNS>
static inline void score_group(const uint8_t* plane, const int32_t (*query)[RUNS][4], int32_t (*out)[GROUP]) {
  __m512i acc[MT][4];
  for (int i = 0; i < MT; ++i)
    for (int k = 0; k < 4; ++k) acc[i][k] = _mm512_setzero_si512();
  const __m512i nibble = _mm512_set1_epi8(15);
  #pragma GCC unroll 16
  for (int r = 0; r < RUNS; ++r) {
    const __m512i x = _mm512_loadu_si512((const void*)(plane + r * 64));
    const __m512i low = _mm512_and_si512(x, nibble), high = _mm512_and_si512(_mm512_srli_epi16(x, 4), nibble);
    for (int i = 0; i < MT; ++i)
      for (int k = 0; k < 4; ++k) acc[i][k] = _mm512_dpbusd_epi32(acc[i][k], k % 2 ? high : low, _mm512_set1_epi32(query[i][r][k]));
  }
  for (int i = 0; i < MT; ++i) store(out[i], ((vi)acc[i][0] + (vi)acc[i][1]) * TERM_RATIO + ((vi)acc[i][2] + (vi)acc[i][3]));
}

template <int MT, int BYTES, int CHUNKS>
static inline void dot_nibbles(const uint8_t* const* rows, const int8_t (*query)[CHUNKS][2][32], float* out, int64_t stride) {
  vi acc[MT][SUMS];
  for (int i = 0; i < MT; ++i)
    for (int k = 0; k < SUMS; ++k) acc[i][k] = vi{};
  typedef uint16_t half __attribute__((vector_size(32), aligned(1)));
  typedef uint16_t words __attribute__((vector_size(64)));
  words shift{};
  for (int i = 16; i < 32; ++i) shift[i] = 4;
  #pragma GCC unroll 8
  for (int c = 0; c < CHUNKS; ++c) {
    words x[SUMS];
    for (int k = 0; k < SUMS; ++k) {
      const half bytes = *(const half*)(rows[k] + c * 32);
      x[k] = __builtin_shufflevector(bytes, bytes, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,  //
                                     0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15) >> shift & (uint16_t)0x0f0f;
    }
    for (int i = 0; i < MT; ++i) {
      const __m512i q = _mm512_loadu_si512((const void*)query[i][c]);
      for (int k = 0; k < SUMS; ++k) acc[i][k] = (vi)_mm512_dpbusd_epi32((__m512i)acc[i][k], (__m512i)x[k], q);
    }
  }
  for (int i = 0; i < MT; ++i) store_sums(acc[i], out + i * stride);
}

template <int BYTES>
struct PlaneRows {
  static constexpr int VECTORS = (BYTES + VL - 1) / VL;
  alignas(64) uint8_t columns[VECTORS][TILE_ROWS / 4][64];  // VL columns of four rows: lane i holds column i of each

  /// Four rows at a time.
  void fetch(const uint8_t* plane, const int32_t* rows, int count) {
    typedef int32_t row __attribute__((vector_size(16), aligned(1)));
    typedef uint8_t bytes __attribute__((vector_size(64)));
    for (int x = 0; x < count; x += 4) {
      const uint8_t* address[4];
      for (int i = 0; i < 4; ++i) {
        address[i] = plane + (int64_t)rows[x + i] * BYTES;
        prefetch(plane + (int64_t)rows[x + i + TILE_ROWS] * BYTES);
      }
      for (int c = 0; c < VECTORS; ++c) {
        row r[4];
        for (int i = 0; i < 4; ++i) r[i] = *(const row*)(address[i] + c * VL);
        const auto ab = __builtin_shufflevector(r[0], r[1], 0, 1, 2, 3, 4, 5, 6, 7), cd = __builtin_shufflevector(r[2], r[3], 0, 1, 2, 3, 4, 5, 6, 7);
        const vi four = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        // 4 x 4 matrices transposed: the lanes, then the bytes in each quarter
        const bytes quads = (bytes)__builtin_shufflevector(four, four, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        *(bytes*)columns[c][x / 4] = __builtin_shufflevector(quads, quads,  //
                                                             0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                                             16, 20, 24, 28, 17, 21, 25, 29, 18, 22, 26, 30, 19, 23, 27, 31,  //
                                                             32, 36, 40, 44, 33, 37, 41, 45, 34, 38, 42, 46, 35, 39, 43, 47,  //
                                                             48, 52, 56, 60, 49, 53, 57, 61, 50, 54, 58, 62, 51, 55, 59, 63);
      }
    }
  }
  static void prefetch(const uint8_t* row) {
    for (int line = 0; line < BYTES; line += 64) __builtin_prefetch(row + line);
  }
};

/// From the transposed columns.
template <int MT, typename Tile, int OUT>
static inline void add_plane_rows(const Tile& tile, int count, int m, float (*out)[OUT]) {
  constexpr int half = OUT / 2;
  const __m512i nibble = _mm512_set1_epi8(15);
  for (int c = 0; c < Tile::VECTORS; ++c) {
    vf lows[MT], highs[MT];
    for (int i = 0; i < MT; ++i) lows[i] = highs[i] = vf{};
    for (int first = 0; first < count; first += RUN) {
      __m512i low[MT], high[MT];
      for (int i = 0; i < MT; ++i) low[i] = high[i] = _mm512_setzero_si512();
      #pragma GCC unroll 4
      for (int x = first; x < first + RUN; x += 4) {
        const __m512i bytes = _mm512_loadu_si512((const void*)tile.columns[c][x / 4]);
        const __m512i lower = _mm512_and_si512(bytes, nibble), upper = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
        for (int i = 0; i < MT; ++i) {
          int32_t weights;
          std::memcpy(&weights, tile.value[m + i] + x, 4);
          const __m512i w = _mm512_set1_epi32(weights);
          low[i] = _mm512_dpbusd_epi32(low[i], lower, w);
          high[i] = _mm512_dpbusd_epi32(high[i], upper, w);
        }
      }
      for (int i = 0; i < MT; ++i) {
        const vf step = splat(tile.step[m + i][first / RUN]);
        lows[i] = madd(step, to_float((vi)low[i]), lows[i]);
        highs[i] = madd(step, to_float((vi)high[i]), highs[i]);
      }
    }
    for (int i = 0; i < MT; ++i) {
      float* o = out[i] + c * VL;
      store(o, load(o) + lows[i]);
      store(o + half, load(o + half) + highs[i]);
    }
  }
}
