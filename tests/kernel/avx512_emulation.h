// The AVX-512 intrinsics that the generated kernels use, in plain C++, so that their AVX-512 path can be run and compared on a
// machine without it. Included after immintrin.h; the macros say that the instruction sets exist.
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#define __AVX512VNNI__ 1
namespace emulated {
template <typename T> struct Lanes { T lane[64 / sizeof(T)]; };
template <typename T, typename V> static inline Lanes<T> split(V x) { Lanes<T> r; std::memcpy(&r, &x, 64); return r; }
template <typename V, typename T> static inline V join(const Lanes<T>& x) { V r; std::memcpy(&r, &x, 64); return r; }
template <typename T, typename V, typename F> static inline V map(V a, F f) {
  auto x = split<T>(a);
  for (auto& lane : x.lane) lane = f(lane);
  return join<V>(x);
}
template <typename T, typename V, typename F> static inline V zip(V a, V b, F f) {
  auto x = split<T>(a), y = split<T>(b);
  for (size_t i = 0; i < 64 / sizeof(T); ++i) x.lane[i] = f(x.lane[i], y.lane[i]);
  return join<V>(x);
}
static inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  auto x = split<float>(a), y = split<float>(b), z = split<float>(c);
  for (int i = 0; i < 16; ++i) x.lane[i] = std::fma(x.lane[i], y.lane[i], z.lane[i]);
  return join<__m512>(x);
}
static inline __m512 max_ps(__m512 a, __m512 b) { return zip<float>(a, b, [](float x, float y) { return x > y ? x : y; }); }
static inline float reduce_add_ps(__m512 a) {
  auto x = split<float>(a);
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; ++i) x.lane[i] += x.lane[i + step];
  return x.lane[0];
}
static inline __mmask16 movepi32_mask(__m512i a) {
  auto x = split<int32_t>(a);
  __mmask16 m = 0;
  for (int i = 0; i < 16; ++i) m |= (x.lane[i] < 0) << i;
  return m;
}
static inline __m512i movm_epi32(__mmask16 m) {
  Lanes<int32_t> x;
  for (int i = 0; i < 16; ++i) x.lane[i] = m >> i & 1 ? -1 : 0;
  return join<__m512i>(x);
}
static inline __m512 maskz_compress_ps(__mmask16 m, __m512 a) {
  auto x = split<float>(a);
  Lanes<float> r{};
  for (int i = 0, n = 0; i < 16; ++i)
    if (m >> i & 1) r.lane[n++] = x.lane[i];
  return join<__m512>(r);
}
static inline __m512 maskz_expand_ps(__mmask16 m, __m512 a) {
  auto x = split<float>(a);
  Lanes<float> r{};
  for (int i = 0, n = 0; i < 16; ++i)
    if (m >> i & 1) r.lane[i] = x.lane[n++];
  return join<__m512>(r);
}
static inline __m512i cvtepu8_epi32(__m128i a) {
  uint8_t b[16];
  Lanes<int32_t> x;
  std::memcpy(b, &a, 16);
  for (int i = 0; i < 16; ++i) x.lane[i] = b[i];
  return join<__m512i>(x);
}
static inline __m512i cvtepu16_epi32(__m256i a) {
  uint16_t b[16];
  Lanes<int32_t> x;
  std::memcpy(b, &a, 32);
  for (int i = 0; i < 16; ++i) x.lane[i] = b[i];
  return join<__m512i>(x);
}
static inline __m512 cvtph_ps(__m256i a) {
  c10::Half b[16];
  Lanes<float> x;
  std::memcpy((void*)b, &a, 32);
  for (int i = 0; i < 16; ++i) x.lane[i] = static_cast<float>(b[i]);
  return join<__m512>(x);
}
static inline __m128i cvtepi32_epi8(__m512i a) {
  auto x = split<int32_t>(a);
  int8_t b[16];
  for (int i = 0; i < 16; ++i) b[i] = (int8_t)x.lane[i];
  __m128i r;
  std::memcpy(&r, b, 16);
  return r;
}
static inline __m256i cvtepi32_epi16(__m512i a) {
  auto x = split<int32_t>(a);
  int16_t h[16];
  for (int i = 0; i < 16; ++i) h[i] = (int16_t)x.lane[i];
  __m256i r;
  std::memcpy(&r, h, 32);
  return r;
}
static inline __m512 i32gather_ps(__m512i places, const float* p, int scale) {
  auto x = split<int32_t>(places);
  Lanes<float> r;
  for (int i = 0; i < 16; ++i) std::memcpy(&r.lane[i], (const char*)p + (int64_t)x.lane[i] * scale, 4);
  return join<__m512>(r);
}
static inline __m512i broadcast_i32x4(__m128i a) {
  char r[64];
  for (int i = 0; i < 4; ++i) std::memcpy(r + 16 * i, &a, 16);
  __m512i all;
  std::memcpy(&all, r, 64);
  return all;
}
static inline __m512i shuffle_epi8(__m512i a, __m512i places) {
  auto x = split<uint8_t>(a), y = split<uint8_t>(places), r = x;
  for (int i = 0; i < 64; ++i) r.lane[i] = y.lane[i] & 0x80 ? 0 : x.lane[i / 16 * 16 + y.lane[i] % 16];
  return join<__m512i>(r);
}
static inline __m512i slli_epi32(__m512i a, int n) { return map<uint32_t>(a, [n](uint32_t x) { return x << n; }); }
static inline __m512i srli_epi16(__m512i a, int n) { return map<uint16_t>(a, [n](uint16_t x) { return (uint16_t)(x >> n); }); }
static inline __m512i and_si512(__m512i a, __m512i b) { return zip<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return x & y; }); }
static inline __m512i set1_epi8(int8_t v) { return map<int8_t>(__m512i{}, [v](int8_t) { return v; }); }
static inline __m512i set1_epi32(int32_t v) { return map<int32_t>(__m512i{}, [v](int32_t) { return v; }); }
static inline __m512i setzero_si512() { return __m512i{}; }
static inline __m512i loadu_si512(const void* p) { __m512i r; std::memcpy(&r, p, 64); return r; }
static inline void storeu_si512(void* p, __m512i a) { std::memcpy(p, &a, 64); }
static inline __m512i dpbusd_epi32(__m512i acc, __m512i unsigned_bytes, __m512i signed_bytes) {
  auto sum = split<int32_t>(acc);
  auto u = split<uint8_t>(unsigned_bytes);
  auto s = split<int8_t>(signed_bytes);
  for (int i = 0; i < 64; ++i) sum.lane[i / 4] += (int32_t)u.lane[i] * (int32_t)s.lane[i];
  return join<__m512i>(sum);
}
static inline __m256 castps512_ps256(__m512 a) { __m256 r; std::memcpy(&r, &a, 32); return r; }
static inline __m512 castps256_ps512(__m256 a) { __m512 r{}; std::memcpy(&r, &a, 32); return r; }
static inline __m256 extractf32x8_ps(__m512 a, int half) { __m256 r; std::memcpy(&r, (const char*)&a + 32 * half, 32); return r; }
static inline __m512 insertf32x8(__m512 a, __m256 b, int half) { std::memcpy((char*)&a + 32 * half, &b, 32); return a; }
static inline __m512d cvtps_pd(__m256 a) {
  float x[8];
  std::memcpy(x, &a, 32);
  Lanes<double> r;
  for (int i = 0; i < 8; ++i) r.lane[i] = x[i];
  return join<__m512d>(r);
}
static inline __m256 cvtpd_ps(__m512d a) {
  auto x = split<double>(a);
  float r[8];
  for (int i = 0; i < 8; ++i) r[i] = (float)x.lane[i];
  __m256 all;
  std::memcpy(&all, r, 32);
  return all;
}
static inline double reduce_add_pd(__m512d a) {
  auto x = split<double>(a);
  for (int step = 4; step; step /= 2)
    for (int i = 0; i < step; ++i) x.lane[i] += x.lane[i + step];
  return x.lane[0];
}
}  // namespace emulated
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_i32gather_ps emulated::i32gather_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_movepi32_mask emulated::movepi32_mask
#define _mm512_movm_epi32 emulated::movm_epi32
#define _mm512_maskz_compress_ps emulated::maskz_compress_ps
#define _mm512_maskz_expand_ps emulated::maskz_expand_ps
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtepi32_epi8 emulated::cvtepi32_epi8
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_broadcast_i32x4 emulated::broadcast_i32x4
#define _mm512_shuffle_epi8 emulated::shuffle_epi8
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_srli_epi16 emulated::srli_epi16
#define _mm512_and_si512 emulated::and_si512
#define _mm512_set1_epi8 emulated::set1_epi8
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_setzero_si512 emulated::setzero_si512
#define _mm512_loadu_si512 emulated::loadu_si512
#define _mm512_storeu_si512 emulated::storeu_si512
#define _mm512_dpbusd_epi32 emulated::dpbusd_epi32
#define _mm512_castps512_ps256 emulated::castps512_ps256
#define _mm512_castps256_ps512 emulated::castps256_ps512
#define _mm512_extractf32x8_ps emulated::extractf32x8_ps
#define _mm512_insertf32x8 emulated::insertf32x8
#define _mm512_cvtps_pd emulated::cvtps_pd
#define _mm512_cvtpd_ps emulated::cvtpd_ps
#define _mm512_reduce_add_pd emulated::reduce_add_pd
