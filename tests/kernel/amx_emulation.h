// The matrix tiles of simd/amx.h in plain C++, so that kernels for them can be run and compared on a machine without.
#define EMULATED_TILES 1
namespace emulated_tiles {
struct alignas(64) Shapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
struct Tile {
  uint8_t bytes[16][64];
  int rows;
};
static thread_local Tile tile[8];
template <typename T> static inline T number(const Tile& t, int row, int i) {
  T x;
  std::memcpy(&x, t.bytes[row] + i * sizeof(T), sizeof(T));
  return x;
}
template <int T> static inline void load(const void* p, int64_t stride) {
  for (int r = 0; r < tile[T].rows; ++r) std::memcpy(tile[T].bytes[r], (const char*)p + r * stride, 64);
}
template <int T> static inline void store(void* p, int64_t stride) {
  for (int r = 0; r < tile[T].rows; ++r) std::memcpy((char*)p + r * stride, tile[T].bytes[r], 64);
}
template <int T> static inline void zero() { std::memset(tile[T].bytes, 0, sizeof tile[T].bytes); }
static inline float widened(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float r;
  std::memcpy(&r, &bits, 4);
  return std::fpclassify(r) == FP_SUBNORMAL ? 0.f : r;
}
template <int C, int A, int B> static inline void dot_bfloat16() {
  for (int r = 0; r < tile[C].rows; ++r)
    for (int c = 0; c < 16; ++c) {
      float sum = number<float>(tile[C], r, c);
      for (int p = 0; p < 16; ++p)
        for (int i = 0; i < 2; ++i) sum += widened(number<uint16_t>(tile[A], r, 2 * p + i)) * widened(number<uint16_t>(tile[B], p, 2 * c + i));
      std::memcpy(tile[C].bytes[r] + 4 * c, &sum, 4);
    }
}
static inline void configure(const Shapes& shapes) {
  for (int t = 0; t < 8; ++t) tile[t].rows = shapes.rows[t], std::memset(tile[t].bytes, 0, sizeof tile[t].bytes);
}
static inline void release() {
  for (Tile& t : tile) t.rows = 0;
}
static inline bool permitted() { return true; }
}  // namespace emulated_tiles
