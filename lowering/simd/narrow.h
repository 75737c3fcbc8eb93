// For targets of eight lanes: planes summed in pairs of rows, and doubles; the interface is in portable.h.
inline Wide Wide::of(vf x) {
  half parts[2];
  std::memcpy(parts, &x, sizeof x);
  return {__builtin_convertvector(parts[0], vd), __builtin_convertvector(parts[1], vd)};
}
inline vf Wide::to_float() const {
  const half parts[2] = {__builtin_convertvector(low, half), __builtin_convertvector(high, half)};
  vf x;
  std::memcpy(&x, parts, sizeof x);
  return x;
}
inline double Wide::sum() const {
  const vd both = low + high;
  double a[VL / 2];
  std::memcpy(a, &both, sizeof both);
  return (a[0] + a[1]) + (a[2] + a[3]);
}

/// interleave of `count` < 16 bytes of each, zero beyond.
static inline vs interleave(const uint8_t* a, const uint8_t* b, int count) {
  uint8_t padded[2][16] = {};
  std::memcpy(padded[0], a, count);
  std::memcpy(padded[1], b, count);
  return interleave(padded[0], padded[1]);
}
static inline vs splat_pair(const int8_t* p) {
  int16_t pair;
  std::memcpy(&pair, p, 2);
  return pair - vs{};
}

template <int BYTES>
struct PlaneRows {
  static constexpr int ROW = BYTES;
  const uint8_t *address[TILE_ROWS], *next[TILE_ROWS];  // of the rows, and of those TILE_ROWS further on in the list

  void fetch(const uint8_t* plane, const int32_t* rows, int count) {
    for (int x = 0; x < count; ++x) {
      address[x] = plane + (int64_t)rows[x] * BYTES;
      next[x] = plane + (int64_t)rows[x + TILE_ROWS] * BYTES;
    }
  }
  static void prefetch(const uint8_t* row) {
    for (int line = 0; line < BYTES; line += 64) __builtin_prefetch(row + line);
  }
};

/// 16 bytes of each row at a time. Sums are int16: RUN / 2 * (2 * 15 * 127) = 30480.
template <int MT, typename Tile, int OUT>
static inline void add_plane_rows(const Tile& tile, int count, int m, float (*out)[OUT]) {
  constexpr int half = OUT / 2;
  for (int d = 0; d < Tile::ROW; d += 16) {
    const auto walk = [&](auto whole) {
      for (int first = 0; first < count; first += RUN) {
        const int last = std::min(count, first + RUN);
        vs low[MT], high[MT];
        for (int i = 0; i < MT; ++i) low[i] = high[i] = vs{};
        for (int x = first; x < last; x += 2) {
          const uint8_t *a = tile.address[x] + d, *b = tile.address[x + 1] + d;
          if (m == 0 && d % 64 < 32) __builtin_prefetch(tile.next[x + (d % 64) / 16] + d / 64 * 64);  // a few at a time: the queue is short
          const vs bytes = whole() ? interleave(a, b) : interleave(a, b, Tile::ROW - d);
          const vs nibbles = bytes & (int16_t)0x0f0f, upper = bytes >> 4 & (int16_t)0x0f0f;
          for (int i = 0; i < MT; ++i) {
            const vs w = splat_pair(tile.value[m + i] + x);
            low[i] += pair_dot(nibbles, w);
            high[i] += pair_dot(upper, w);
          }
        }
        for (int i = 0; i < MT; ++i) {
          const vf step = splat(tile.step[m + i][first / RUN]);
          for (int v = 0; v < 16 && d + v < half; v += VL) {
            float* o = out[i] + d + v;
            store(o, madd(step, to_float(low[i], v), load(o)));
            store(o + half, madd(step, to_float(high[i], v), load(o + half)));
          }
        }
      }
    };
    Tile::ROW - d >= 16 ? walk(std::true_type{}) : walk(std::false_type{});
  }
}
