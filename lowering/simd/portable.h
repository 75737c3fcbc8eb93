// GCC/Clang vector extensions, for any machine. Also where the interface of every target is described.
//
// A target is a header like this one and an entry in isa.py: VL, how many floats its vectors have, and the headers that make it
// up. vectors.h.jinja stands before it (vf, vi and vu, vectors of VL float, int32 and uint32; their loads, stores and selections;
// Wide, VL doubles; GROUP, TILE_ROWS, RUN) and what can be written in terms of it (vexp, rows that end early) behind it.
// Everything is static inline; lanes and bits count from the first lane and the lowest bit. A target defines
//
//   vf madd(vf a, vf b, vf c)              a * b + c, fused where the machine does that as fast
//   vf vmax(vf a, vf b)                    `b` where a lane is NaN, so pass the constant first to keep NaN
//   float sum(vf a), highest(vf a)         over the lanes
//   SUMS                                   an int: how many vectors store_sums reduces at once, and how many rows of K are read at once
//   void store_sums(const T* a, float* p)  p[i] = sum(a[i]) for SUMS vectors; T is vf, and also vi where dot_nibbles sums int32
//   uint32_t bits(vi m)                    one bit for each lane of a comparison's result
//   vi lane_mask(uint32_t b)               its inverse
//   vf compact(vf x, uint32_t b)           the lanes whose bit is set, side by side in the first lanes; anything in the others
//   vf expand(vf x, uint32_t b)            the first lanes in the lanes whose bit is set; anything in the others
//   vi bytes_to_int(const uint8_t* p)      VL bytes
//   void store_bytes(int8_t* p, vi x)      the low byte of each lane
//   vi pick_bytes(const uint8_t* p, vi x)  p[b] for each byte b < VL of the lanes, zero where b's highest bit is set; reads VL bytes
//   void store_halves(void* p, vi a, vi b) 2 VL uint16, of lanes that hold numbers of 16 bits
//   vf load_row(const T* p)                VL elements of the cache: T is float, at::BFloat16 or at::Half
//   Wide::of, Wide::to_float, Wide::sum    declared in Wide
//   COLUMNS                                an int: vectors of the output (1, 2 or 4) that a sum over rows keeps in registers at once
//
// and for the planes, whose bytes are those of layout.py,
//
//   void pack_run(const int8_t* coarse, const int8_t* finer, int32_t* words)
//       eight numbers of a query row, TERM_RATIO * coarse + finer, in four words, as score_group wants them
//   void score_group<MT>(const uint8_t* plane, const int32_t (*query)[RUNS][4], int32_t (*out)[GROUP])
//       int32 dots of MT such query rows with 16 rows of the 4-bit K plane in score order
//   void dot_nibbles<MT, BYTES>(const uint8_t* const* rows, const int8_t (*query)[CHUNKS][2][32], float* out, int64_t stride)
//       dots of MT int8 query rows with SUMS rows, of BYTES each, of a 4-bit K plane in row order, out[i * stride + k]. A query row
//       holds, for each 32 bytes of the plane, what their low nibbles are multiplied by and then the same for the high ones, with
//       zeros behind BYTES. Reads up to 32 * CHUNKS bytes of a row
//   struct PlaneRows<BYTES>
//       void fetch(const uint8_t* plane, const int32_t* rows, int count) takes hold of up to TILE_ROWS rows of a plane, and starts
//       loading those TILE_ROWS further on in the list or leaves that to add_plane_rows; static void prefetch(const uint8_t* row)
//   void add_plane_rows<MT>(const Tile& tile, int count, int m, float (*out)[OUT])
//       out[i] += sum over the tile's rows of step * value * nibble for query row m + i, low nibbles in the first half of `out` and high
//       ones in the second. Tile is a PlaneRows with int8_t value[M][TILE_ROWS], zero beyond the last row, and float step[M][], one for
//       RUN rows; `count` is a multiple of RUN
//
// narrow.h has the last two and Wide's functions for targets of eight lanes. It wants
//
//   vs                                     16 int16
//   vs interleave(const uint8_t* a, const uint8_t* b)   16 pairs of bytes, those of `a` in the low bytes
//   vs pair_dot(vs bytes, vs weights)      unsigned times signed bytes, summed in pairs
//   vf to_float(vs x, int v)               lanes [v, v + VL)
//
// Targets compute the same but for the order of sums and the rounding of madd.
static inline vf madd(vf a, vf b, vf c) { return a * b + c; }
static inline vf vmax(vf a, vf b) { return select(a > b, a, b); }
static inline float sum(vf a) {
  float total = 0;
  for (int i = 0; i < VL; ++i) total += a[i];
  return total;
}
static inline float highest(vf a) {
  float top = a[0];
  for (int i = 1; i < VL; ++i) top = std::max(top, a[i]);
  return top;
}
constexpr int SUMS = 2;
static inline void store_sums(const vf* a, float* out) { out[0] = sum(a[0]), out[1] = sum(a[1]); }
static inline uint32_t bits(vi m) {
  uint32_t b = 0;
  for (int i = 0; i < VL; ++i) b |= (uint32_t)(m[i] & 1) << i;
  return b;
}
static inline vi lane_mask(uint32_t b) {
  vi m{};
  for (int i = 0; i < VL; ++i) m[i] = b >> i & 1 ? -1 : 0;
  return m;
}
static inline vf compact(vf x, uint32_t b) {
  vf r{};
  for (int i = 0, n = 0; i < VL; ++i)
    if (b >> i & 1) r[n++] = x[i];
  return r;
}
static inline vf expand(vf x, uint32_t b) {
  vf r{};
  for (int i = 0, n = 0; i < VL; ++i)
    if (b >> i & 1) r[i] = x[n++];
  return r;
}
static inline vi bytes_to_int(const uint8_t* p) {
  vi r{};
  for (int i = 0; i < VL; ++i) r[i] = p[i];
  return r;
}
static inline void store_bytes(int8_t* p, vi x) {
  for (int i = 0; i < VL; ++i) p[i] = (int8_t)x[i];
}
static inline vi pick_bytes(const uint8_t* p, vi places) {
  uint8_t place[4 * VL], picked[4 * VL];
  std::memcpy(place, &places, sizeof place);
  for (int i = 0; i < 4 * VL; ++i) picked[i] = place[i] & 0x80 ? 0 : p[place[i] % VL];
  vi r;
  std::memcpy(&r, picked, sizeof r);
  return r;
}
static inline void store_halves(void* p, vi low, vi high) {
  uint16_t halves[2 * VL];
  for (int i = 0; i < VL; ++i) halves[i] = (uint16_t)low[i], halves[VL + i] = (uint16_t)high[i];
  std::memcpy(p, halves, sizeof halves);
}
template <typename T>
static inline vf load_row(const T* p) {
  vf r{};
  for (int i = 0; i < VL; ++i) r[i] = static_cast<float>(p[i]);
  return r;
}
constexpr int COLUMNS = 2;

static inline void pack_run(const int8_t* coarse, const int8_t* finer, int32_t* words) {
  int16_t numbers[8];
  for (int d = 0; d < 8; ++d) numbers[d] = (int16_t)(TERM_RATIO * coarse[d] + finer[d]);
  std::memcpy(words, numbers, sizeof numbers);
}
template <int MT, int RUNS>
static inline void score_group(const uint8_t* plane, const int32_t (*query)[RUNS][4], int32_t (*out)[GROUP]) {
  for (int i = 0; i < MT; ++i)
    for (int t = 0; t < GROUP; ++t) {
      int32_t acc = 0;
      for (int r = 0; r < RUNS; ++r) {
        int16_t q[8];
        std::memcpy(q, query[i][r], sizeof q);
        for (int d = 0; d < 4; ++d) {
          const uint8_t x = plane[r * 64 + t * 4 + d];
          acc += (x & 15) * q[d] + (x >> 4) * q[4 + d];
        }
      }
      out[i][t] = acc;
    }
}

template <int MT, int BYTES, int CHUNKS>
static inline void dot_nibbles(const uint8_t* const* rows, const int8_t (*query)[CHUNKS][2][32], float* out, int64_t stride) {
  for (int i = 0; i < MT; ++i)
    for (int k = 0; k < SUMS; ++k) {
      int32_t acc = 0;
      for (int d = 0; d < BYTES; ++d) acc += (rows[k][d] & 15) * query[i][d / 32][0][d % 32] + (rows[k][d] >> 4) * query[i][d / 32][1][d % 32];
      out[i * stride + k] = (float)acc;
    }
}

typedef int16_t vs __attribute__((vector_size(32)));
static inline vs interleave(const uint8_t* a, const uint8_t* b) {
  vs r{};
  for (int i = 0; i < 16; ++i) r[i] = (int16_t)(a[i] | b[i] << 8);
  return r;
}
static inline vs pair_dot(vs bytes, vs weights) { return (bytes & 255) * (weights << 8 >> 8) + (bytes >> 8) * (weights >> 8); }
static inline vf to_float(vs x, int v) {
  int16_t part __attribute__((vector_size(VL * 2)));
  std::memcpy(&part, (const char*)&x + 2 * v, sizeof part);
  return to_float(__builtin_convertvector(part, vi));
}
